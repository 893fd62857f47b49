"""The search for a text, token by token: greedy, sampling, beams; one jitted loop of static shapes each.

A search asks for the next token through a `Decoding`: from a cache in `mammut.generation.text`, or
in any other way. The loop stops when every row has ended.

Log-probabilities are natural logarithms and those of the model (log-softmax of its logits),
whatever temperature, filters or penalties chose the tokens.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Float, Int, Key

from mammut.core.typing import Array


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How tokens are chosen. The defaults are greedy decoding."""

    # of a text, its end token included; None: as many as the model has places for
    max_new_tokens: int | None = None
    num_beams: int = 1  # more than 1: beam search
    length_penalty: float = 1.0  # a text scores its log-probability / length ** length_penalty
    num_groups: int = 1  # the beams in so many groups, each kept from repeating the ones before
    # for each earlier group that chose a token at this position (arXiv 1610.02424)
    diversity_penalty: float = 0.0
    temperature: float = 0.0  # 0: the likeliest token; else sample
    top_k: int = 0  # sample from the k likeliest; 0: from all
    top_p: float = 1.0  # sample from the likeliest that together reach p (arXiv 1904.09751)
    min_p: float = 0.0  # sample from those with at least this share of the likeliest's probability
    # logits of tokens already there are divided (if positive) or multiplied by it
    repetition_penalty: float = 1.0

    def __post_init__(self):
        def require(condition: bool, name: str, expected: str) -> None:
            if not condition:
                raise ValueError(
                    f"GenerateConfig.{name} is {getattr(self, name)}, expected {expected}"
                )

        sampling, searching = self.temperature > 0, self.num_beams > 1
        require(
            self.max_new_tokens is None or self.max_new_tokens >= 1, "max_new_tokens", "at least 1"
        )
        require(self.num_beams >= 1, "num_beams", "at least 1")
        # a power in float32
        require(-10 <= self.length_penalty <= 10, "length_penalty", "a number from -10 to 10")
        require(
            self.num_groups >= 1 and self.num_beams % self.num_groups == 0,
            "num_groups",
            "a divisor of num_beams",
        )
        require(self.diversity_penalty >= 0, "diversity_penalty", "at least 0")
        require(
            self.temperature == 0 or self.temperature >= 1e-6, "temperature", "0, or at least 1e-6"
        )
        require(self.top_k >= 0, "top_k", "at least 0")
        require(0 < self.top_p <= 1, "top_p", "0 < p <= 1")
        require(0 <= self.min_p <= 1, "min_p", "0 <= p <= 1")
        require(self.repetition_penalty > 0, "repetition_penalty", "a positive number")
        # A setting that would do nothing is a misunderstanding.
        require(
            self.diversity_penalty == 0 or self.num_groups > 1,
            "diversity_penalty",
            "0 with one group of beams",
        )
        require(not (sampling and searching), "temperature", "0 with num_beams above 1")
        require(
            self.repetition_penalty == 1 or not searching,
            "repetition_penalty",
            "1 with num_beams above 1",
        )
        for name, neutral in (("top_k", 0), ("top_p", 1), ("min_p", 0)):
            require(
                sampling or getattr(self, name) == neutral, name, f"{neutral} with temperature 0"
            )


@struct.dataclass
class Generation:
    """What was generated; n hypotheses an image, best first (n = num_beams).

    A score of minus infinity says that there is no such text: there are fewer texts than beams, or
    the model's logits were not numbers, as after training diverged.
    """

    tokens: Any  # int[B, n, L]: start, prompt, text, and the end token from where it ended on
    logprobs: Any  # float[B, n, L] of each generated token, its end token included; 0 elsewhere
    num_tokens: Any  # int[B, n]: how many were generated, the end token included
    scores: Any  # float[B, n]: the sum of logprobs / num_tokens ** length_penalty
    steps: Any  # int[]: how many positions the loop went through


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How a search asks a model for the next token: from a cache, as `generate` does, or in any other way.

    `step(text int[R, L], position int[], state)` gives the logits float[R, V] of the token after
    `position`, given all up to there, and the next state. Rows [i * R / B, (i + 1) * R / B) are
    texts of image i. `take(state, beam int[B, n])` gives the state for n rows an image: beam[i, j]
    is the row, of those image i has now, that its row j goes on from.
    """

    step: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
    take: Callable[[Any, jax.Array], Any]
    state: Any  # for one row an image; it knows what precedes the last token that all prompts have


def search(
    decoding: Decoding,
    tokens: Int[Array, "B L"],
    lengths: Int[Array, "B"],
    config: GenerateConfig,
    *,
    eos_id: int,
    keys: Key[Array, "B"] | None = None,
) -> Generation:
    """Continues `tokens`, of which `lengths` are each row's prompt and the rest are `eos_id`: what `generate` does."""
    limit = jnp.minimum(tokens.shape[1], lengths + (config.max_new_tokens or tokens.shape[1]))
    if config.num_beams > 1:
        return _beam_search(decoding, tokens, lengths, limit, config, eos_id)
    return _sample(decoding, tokens, lengths, limit, config, eos_id, keys)


def _num_tokens(text, lengths, limit, eos_id) -> Int[Array, "B n"]:
    """How many tokens were generated in texts [B, n, L]: up to an end token after the prompt, or to the limit."""
    length = text.shape[2]
    ended = (text == eos_id) & (jnp.arange(length) >= lengths[:, None, None])
    end = jnp.where(ended.any(2), ended.argmax(2) + 1, length)
    return jnp.minimum(end, limit[:, None]) - lengths[:, None]


def _sample(decoding: Decoding, tokens, lengths, limit, config, eos_id, keys) -> Generation:
    """Greedy decoding or sampling."""
    start = lengths.min()

    def running(carry):
        *_, done = carry
        return ~done.all()  # at its limit every row is

    def step(carry):
        position, state, tokens, logprobs, done = carry
        logits, state = decoding.step(tokens, position - 1, state)
        all_logprobs = jax.nn.log_softmax(logits)
        chosen = _choose(logits, tokens, position, config, keys)
        logprob = jnp.take_along_axis(all_logprobs, chosen[:, None], axis=1)[:, 0]
        # Where logits are not numbers the text ends: it has no probability.
        broken = jnp.isnan(all_logprobs).any(1)
        chosen, logprob = jnp.where(broken, eos_id, chosen), jnp.where(broken, -jnp.inf, logprob)
        in_prompt = position < lengths
        kept = in_prompt | done  # what is there is the prompt, or the end
        tokens = tokens.at[:, position].set(
            jnp.where(kept, tokens[:, position], chosen).astype(tokens.dtype)
        )
        logprobs = logprobs.at[:, position].set(jnp.where(kept, 0, logprob))
        done |= ~in_prompt & ((chosen == eos_id) | (position + 1 == limit))
        return position + 1, state, tokens, logprobs, done

    carry = (start, decoding.state, tokens, jnp.zeros(tokens.shape), jnp.zeros(len(tokens), bool))
    position, _, tokens, logprobs, _ = jax.lax.while_loop(running, step, carry)
    tokens, logprobs = tokens[:, None], logprobs[:, None]
    num_tokens = _num_tokens(tokens, lengths, limit, eos_id)
    scores = logprobs.sum(2) / num_tokens**config.length_penalty
    return Generation(tokens, logprobs, num_tokens, scores, position - start)


def _choose(logits, tokens, position, config, keys) -> Int[Array, "R"]:
    """The next token of each row."""
    if config.repetition_penalty != 1:
        rows, vocab = logits.shape
        there = jnp.where(jnp.arange(tokens.shape[1]) < position, tokens, vocab)
        seen = (
            jnp.zeros(logits.shape, bool)
            .at[jnp.arange(rows)[:, None], there]
            .set(True, mode="drop")
        )
        penalised = jnp.where(
            logits > 0, logits / config.repetition_penalty, logits * config.repetition_penalty
        )
        logits = jnp.where(seen, penalised, logits)
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / config.temperature
    filters = {"top_k": config.top_k, "top_p": config.top_p, "min_p": config.min_p}
    if filters != {"top_k": 0, "top_p": 1, "min_p": 0}:  # to keep all, nothing need be sorted
        logits = filter_logits(logits, **filters)
    row_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, position)
    return jax.vmap(jax.random.categorical)(row_keys, logits)


def filter_logits(
    logits: Float[Array, "R V"], *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Float[Array, "R V"]:
    """Logits float[R, V] with those not to be sampled at minus infinity; the likeliest always stays.

    `top_p` keeps the smallest set of likeliest tokens whose probabilities reach p: a token stays if
    those likelier than it do not reach p yet.
    """
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    probs = jax.nn.softmax(ranked, axis=-1)
    keep = jnp.cumsum(probs, axis=-1) - probs < top_p
    keep &= probs >= min_p * probs[:, :1]
    if top_k:
        keep &= jnp.arange(logits.shape[-1]) < top_k
    rows = jnp.arange(len(logits))[:, None]
    return jnp.where(
        jnp.zeros_like(keep).at[rows, order].set(keep.at[:, 0].set(True)), logits, -jnp.inf
    )


class _Beams(NamedTuple):
    """Texts of a group of beams, or of all: running ones, or finished ones with their final scores."""

    score: jax.Array  # float[B, n]; minus infinity: there is none
    text: jax.Array  # int[B, n, L]
    logprobs: jax.Array  # float[B, n, L]

    def pick(self, place) -> "_Beams":
        """Those at place int[B, m], in that order."""
        one = lambda x: jnp.take_along_axis(
            x, place.reshape(*place.shape, *(1,) * (x.ndim - 2)), axis=1
        )  # noqa: E731
        return jax.tree.map(one, self)


def _beam_search(decoding: Decoding, tokens, lengths, limit, config, eos_id) -> Generation:
    """Beam search, in groups that avoid each other's choices where `num_groups` is more than 1.

    A beam that ends competes by its score with the beams that ended before it; the search of an
    image stops when no running beam of it can beat the worst of those. Rows are images x beams.
    """
    images, length = tokens.shape
    beams, groups = config.num_beams, config.num_groups
    size = beams // groups  # beams of a group
    start = lengths.min()

    def normalised(score, end):
        """Scores [B, ...] of texts that end before `end`, int[] or int[B]."""
        num_tokens = jnp.maximum(end - lengths, 1).reshape(-1, *(1,) * (score.ndim - 1))
        return score / num_tokens**config.length_penalty

    def advance(logprobs, position, running, finished, chosen):
        """A group's next tokens: its running beams, its finished ones, where the former were, what all groups chose."""
        vocab = logprobs.shape[2]
        flat = lambda x: x.reshape(images, size * vocab)  # noqa: E731
        forced = (position < lengths)[:, None]  # still in the prompt
        candidates = running.score[..., None] + logprobs
        ranked = flat(candidates - config.diversity_penalty * chosen[:, None])
        rank, best = jax.lax.top_k(ranked, 2 * size)  # twice as many: half of them may end here
        beam, token = best // vocab, (best % vocab).astype(tokens.dtype)
        score, logprob = (
            jnp.take_along_axis(flat(x), best, axis=1) for x in (candidates, logprobs)
        )
        grown = running.pick(beam)
        grown = _Beams(
            score,
            grown.text.at[:, :, position].set(token),
            grown.logprobs.at[:, :, position].set(logprob),
        )
        # The last position ends every beam, as the others are ended by their end token.
        ends = (
            ((token == eos_id) | (position + 1 == limit)[:, None]) & ~forced & jnp.isfinite(score)
        )

        # Those that end compete with those that have.
        ended = grown._replace(score=jnp.where(ends, normalised(score, position + 1), -jnp.inf))
        ended = jax.tree.map(lambda old, new: jnp.concatenate([old, new], 1), finished, ended)
        finished = ended.pick(jax.lax.top_k(ended.score, size)[1])

        # The best that do not end run on.
        grown = grown._replace(score=jnp.where(ends, -jnp.inf, score))
        _, place = jax.lax.top_k(jnp.where(ends, -jnp.inf, rank), size)
        keep = lambda old, new: jnp.where(forced.reshape(images, *(1,) * (new.ndim - 1)), old, new)  # noqa: E731
        running = jax.tree.map(keep, running, grown.pick(place))
        beam = jnp.where(forced, jnp.arange(size), jnp.take_along_axis(beam, place, axis=1))
        counts = jnp.isfinite(running.score) & ~forced
        chosen += (jax.nn.one_hot(running.text[:, :, position], vocab) * counts[..., None]).sum(1)
        return running, finished, beam, chosen

    def step(carry):
        position, state, running, finished, _ = carry
        logits, state = decoding.step(
            running.text.reshape(images * beams, length), position - 1, state
        )
        logprobs = jax.nn.log_softmax(logits).reshape(images, beams, -1)
        # logits that are not numbers: no text
        logprobs = jnp.where(jnp.isnan(logprobs), -jnp.inf, logprobs)
        chosen = jnp.zeros((images, logprobs.shape[2]))
        by_group = []
        for first in range(0, beams, size):
            of_group = lambda x: x[:, first : first + size]  # noqa: B023, E731
            group = jax.tree.map(of_group, (logprobs, running, finished))
            *result, chosen = advance(group[0], position, *group[1:], chosen)
            result[2] += first
            by_group.append(result)
        running, finished, beam = jax.tree.map(lambda *x: jnp.concatenate(x, 1), *by_group)
        # A running beam can only lose log-probability; its best score is at the length that divides
        # it the most.
        hope = normalised(running.score, limit if config.length_penalty > 0 else position + 1)
        done = (position >= lengths) & (hope.max(1) <= finished.score.min(1))
        return position + 1, decoding.take(state, beam), running, finished, done

    def searching(carry):
        *_, done = carry
        return ~done.all()  # at its limit an image has no running beam

    # All beams of a group start alike: all but the first are held back until they differ.
    score = jnp.where(jnp.arange(beams) % size == 0, 0.0, -jnp.inf)
    text = jnp.broadcast_to(tokens[:, None], (images, beams, length))
    running = _Beams(jnp.tile(score, (images, 1)), text, jnp.zeros(text.shape))
    finished = running._replace(score=jnp.full((images, beams), -jnp.inf))
    state = decoding.take(decoding.state, jnp.zeros((images, beams), int))
    carry = (start, state, running, finished, jnp.zeros(images, bool))
    position, _, _, finished, _ = jax.lax.while_loop(searching, step, carry)

    found = finished.pick(jnp.argsort(-finished.score, axis=1, stable=True))
    num_tokens = _num_tokens(found.text, lengths, limit, eos_id)
    return Generation(found.text, found.logprobs, num_tokens, found.score, position - start)
