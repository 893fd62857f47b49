"""The search for a text, token by token: greedy, sampling or beams.

Each is one jitted loop of static shapes, which stops when every row has ended. A search asks for
the next token through a `Decoding`: from a cache as in `mammut.generation.text`, or in any other
way.

Log-probabilities are natural logarithms. They are the model's own (log-softmax of its logits), even
if temperature, filters or penalties chose the tokens.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Float, Int, Key

from mammut.core.fields import plain_number, require, require_number, require_whole
from mammut.core.typing import Array


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How tokens are chosen; by default greedily.

    Raises:
      ValueError: a value is out of range, or has no effect with the other values.

    Example:
      >>> beam_search = mammut.GenerateConfig(num_beams=4, max_new_tokens=20)
      >>> sampling = mammut.GenerateConfig(temperature=0.7, top_p=0.9)
      >>> texts = mammut.generate_text(model, processor, ["dog.jpg"], config=sampling)
    """

    # tokens of a text, its end token included; None: as many as the model has room for
    max_new_tokens: int | None = None
    num_beams: int = 1  # more than 1: beam search
    # a text scores its log-probability / length ** length_penalty
    length_penalty: float = 1.0
    # groups of beams; each group is kept from repeating the groups before it
    num_groups: int = 1
    # subtracted for each beam of an earlier group that chose this token here (arXiv 1610.02424)
    diversity_penalty: float = 0.0
    temperature: float = 0.0  # 0: the likeliest token; more: a sample
    top_k: int = 0  # sample from the k likeliest tokens; 0: from all
    # sample from the likeliest tokens that together reach probability p (arXiv 1904.09751)
    top_p: float = 1.0
    # sample from tokens with at least this share of the likeliest token's probability
    min_p: float = 0.0
    # divides the positive logits of tokens already in the text and multiplies the negative ones
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, plain_number(getattr(self, field.name)))
        if self.max_new_tokens is not None:
            require_whole("GenerateConfig.max_new_tokens", self.max_new_tokens, 1, 2**17)
        require_whole("GenerateConfig.num_beams", self.num_beams, 1, 2**12)
        require_whole("GenerateConfig.num_groups", self.num_groups, 1, 2**12)
        require_whole("GenerateConfig.top_k", self.top_k, 0, 2**24)
        for name, low, high in (
            ("length_penalty", -10, 10),  # a power in float32
            ("diversity_penalty", 0, 1e6),
            ("temperature", 0, 1e6),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("repetition_penalty", 1e-6, 1e6),
        ):
            require_number(f"GenerateConfig.{name}", getattr(self, name), low, high)
            # JAX raises no integer to the power of -10.
            object.__setattr__(self, name, float(getattr(self, name)))
        sampling = self.temperature > 0
        searching = self.num_beams > 1
        divides = self.num_beams % self.num_groups == 0
        self._require(divides, "num_groups", "a divisor of num_beams")
        usable = self.temperature == 0 or self.temperature >= 1e-6
        self._require(usable, "temperature", "0, or at least 1e-6")
        self._require(self.top_p > 0, "top_p", "0 < p <= 1")

        # A setting without an effect is a misunderstanding.
        undiversified = self.diversity_penalty == 0 or self.num_groups > 1
        self._require(undiversified, "diversity_penalty", "0 with one group of beams")
        self._require(not (sampling and searching), "temperature", "0 with num_beams above 1")
        unpenalised = self.repetition_penalty == 1 or not searching
        self._require(unpenalised, "repetition_penalty", "1 with num_beams above 1")
        for name, neutral in (("top_k", 0), ("top_p", 1), ("min_p", 0)):
            is_neutral = getattr(self, name) == neutral
            self._require(sampling or is_neutral, name, f"{neutral} with temperature 0")

    def _require(self, condition: bool, name: str, expected: str) -> None:
        require(condition, f"GenerateConfig.{name} is {getattr(self, name)}, expected {expected}")


@struct.dataclass
class Generation:
    """Generated texts: n for each image, best first (n = num_beams).

    A score of minus infinity means that there is no such text: there are fewer texts than beams, or
    the model's logits were not numbers, as after training diverged.
    """

    tokens: Any  # int[B, n, L]: start, prompt, text, and the end token in all columns after it
    logprobs: Any  # float[B, n, L] of each generated token, its end token included; 0 elsewhere
    num_tokens: Any  # int[B, n]: the number of generated tokens, the end token included
    scores: Any  # float[B, n]: the sum of logprobs / num_tokens ** length_penalty
    steps: Any  # int[]: the number of positions that the loop went through


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How a search asks a model for the next token.

    `step(text int[R, L], position int[], state)` gives the logits float[R, V] of the token after
    `position`, given all tokens up to there, and the next state. Rows [i * R / B, (i + 1) * R / B)
    are texts of image i. `take(state, beam int[B, n])` gives the state for n rows an image:
    beam[i, j] is the row, among those that image i has now, that its row j goes on from.
    """

    step: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
    take: Callable[[Any, jax.Array], Any]
    # for one row an image; it knows the tokens before the last one that all prompts have
    state: Any


def search(
    decoding: Decoding,
    tokens: Int[Array, "B L"],
    lengths: Int[Array, "B"],
    config: GenerateConfig,
    *,
    eos_id: int,
    keys: Key[Array, "B"] | None = None,
) -> Generation:
    """Continues prompts; the search behind `generate`.

    Args:
      tokens: int[B, L], each row's prompt and `eos_id` after it.
      lengths: int[B], the tokens of each prompt.
    """
    limit = jnp.minimum(tokens.shape[1], lengths + (config.max_new_tokens or tokens.shape[1]))
    if config.num_beams > 1:
        return _beam_search(decoding, tokens, lengths, limit, config, eos_id)
    return _sample(decoding, tokens, lengths, limit, config, eos_id, keys)


def _num_tokens(text, lengths, limit, eos_id) -> Int[Array, "B n"]:
    """Counts the generated tokens in texts [B, n, L].

    They go up to the end token after the prompt, or to the limit.
    """
    length = text.shape[2]
    ended = (text == eos_id) & (jnp.arange(length) >= lengths[:, None, None])
    end = jnp.where(ended.any(2), ended.argmax(2) + 1, length)
    return jnp.minimum(end, limit[:, None]) - lengths[:, None]


def _sample(decoding: Decoding, tokens, lengths, limit, config, eos_id, keys) -> Generation:
    """Searches greedily or by sampling."""
    start = lengths.min()

    def running(carry):
        *_, done = carry
        return ~done.all()  # a row is done at its limit

    def step(carry):
        position, state, tokens, logprobs, done = carry
        logits, state = decoding.step(tokens, position - 1, state)
        all_logprobs = jax.nn.log_softmax(logits)
        chosen = _choose(logits, tokens, position, config, keys)
        logprob = jnp.take_along_axis(all_logprobs, chosen[:, None], axis=1)[:, 0]
        # Where logits are not numbers the text ends: it has no probability.
        broken = jnp.isnan(all_logprobs).any(1)
        chosen = jnp.where(broken, eos_id, chosen)
        logprob = jnp.where(broken, -jnp.inf, logprob)
        in_prompt = position < lengths
        kept = in_prompt | done  # the prompt, or the end token, is there already
        column = jnp.where(kept, tokens[:, position], chosen).astype(tokens.dtype)
        tokens = tokens.at[:, position].set(column)
        logprobs = logprobs.at[:, position].set(jnp.where(kept, 0, logprob))
        done |= ~in_prompt & ((chosen == eos_id) | (position + 1 == limit))
        return position + 1, state, tokens, logprobs, done

    carry = (start, decoding.state, tokens, jnp.zeros(tokens.shape), jnp.zeros(len(tokens), bool))
    position, _, tokens, logprobs, _ = jax.lax.while_loop(running, step, carry)
    tokens = tokens[:, None]  # one text an image
    logprobs = logprobs[:, None]
    num_tokens = _num_tokens(tokens, lengths, limit, eos_id)
    scores = logprobs.sum(2) / num_tokens**config.length_penalty
    return Generation(tokens, logprobs, num_tokens, scores, position - start)


def _choose(logits, tokens, position, config, keys) -> Int[Array, "R"]:
    """Chooses the next token of each row."""
    if config.repetition_penalty != 1:
        rows, vocab = logits.shape
        # Columns from `position` on hold no token yet: the id `vocab` drops them.
        written = jnp.where(jnp.arange(tokens.shape[1]) < position, tokens, vocab)
        seen = jnp.zeros(logits.shape, bool)
        seen = seen.at[jnp.arange(rows)[:, None], written].set(True, mode="drop")
        penalty = config.repetition_penalty
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(seen, penalised, logits)
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / config.temperature
    filters = {"top_k": config.top_k, "top_p": config.top_p, "min_p": config.min_p}
    if filters != {"top_k": 0, "top_p": 1, "min_p": 0}:  # else all are kept: no sort
        logits = filter_logits(logits, **filters)
    row_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, position)
    return jax.vmap(jax.random.categorical)(row_keys, logits)


def filter_logits(
    logits: Float[Array, "R V"], *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Float[Array, "R V"]:
    """Masks the logits of tokens that may not be sampled.

    The logits float[R, V] of these tokens become minus infinity.

    The likeliest token always stays. `top_p` keeps the smallest set of likeliest tokens whose
    probabilities reach p: a token stays if those likelier than it do not reach p yet.
    """
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    probs = jax.nn.softmax(ranked, axis=-1)
    keep = jnp.cumsum(probs, axis=-1) - probs < top_p
    keep &= probs >= min_p * probs[:, :1]
    if top_k:
        keep &= jnp.arange(logits.shape[-1]) < top_k
    keep = keep.at[:, 0].set(True)
    # From the order of probability back to the order of the vocabulary.
    rows = jnp.arange(len(logits))[:, None]
    keep = jnp.zeros_like(keep).at[rows, order].set(keep)
    return jnp.where(keep, logits, -jnp.inf)


class _Beams(NamedTuple):
    """Texts of the n beams of a group, or of all.

    Either running ones, or finished ones with their final scores.
    """

    score: jax.Array  # float[B, n]; minus infinity: there is no such text
    text: jax.Array  # int[B, n, L]
    logprobs: jax.Array  # float[B, n, L]

    def pick(self, positions) -> "_Beams":
        """Returns the beams at positions int[B, m], in that order."""

        def picked(x):
            index = positions.reshape(*positions.shape, *(1,) * (x.ndim - 2))
            return jnp.take_along_axis(x, index, axis=1)

        return jax.tree.map(picked, self)


def _beam_search(decoding: Decoding, tokens, lengths, limit, config, eos_id) -> Generation:
    """Searches with beams, in one group or in several.

    Each group avoids the choices of the groups before it.

    A beam that ends competes by its score with the beams that ended before it. The search of an
    image stops when none of its running beams can beat the worst of those. Rows are images x beams.
    """
    images, length = tokens.shape
    beams = config.num_beams
    start = lengths.min()
    rules = _BeamRules(lengths, limit, config, eos_id)

    def step(carry):
        position, state, running, finished, done, broken = carry
        rows = running.text.reshape(images * beams, length)
        logits, state = decoding.step(rows, position - 1, state)
        logprobs = jax.nn.log_softmax(logits).reshape(images, beams, -1)
        # Where logits are not numbers the search ends: its image has no text at all.
        nan = jnp.isnan(logprobs)
        broken |= rules.is_broken(nan, position, running) & ~done
        logprobs = jnp.where(nan, -jnp.inf, logprobs)
        running, finished, beam = rules.advance_all(logprobs, position, running, finished)
        done = rules.is_done(position, running, finished) | broken
        return position + 1, decoding.take(state, beam), running, finished, done, broken

    def searching(carry):
        *_, done, _ = carry
        return ~done.all()  # at its limit an image has no running beam

    # All beams of a group start alike: all but the first are held back until they differ.
    score = jnp.where(jnp.arange(beams) % rules.group_size == 0, 0.0, -jnp.inf)
    text = jnp.broadcast_to(tokens[:, None], (images, beams, length))
    running = _Beams(jnp.tile(score, (images, 1)), text, jnp.zeros(text.shape))
    finished = running._replace(score=jnp.full((images, beams), -jnp.inf))
    state = decoding.take(decoding.state, jnp.zeros((images, beams), int))
    none = jnp.zeros(images, bool)
    carry = (start, state, running, finished, none, none)
    position, _, _, finished, _, broken = jax.lax.while_loop(searching, step, carry)

    finished = finished._replace(score=jnp.where(broken[:, None], -jnp.inf, finished.score))
    best = finished.pick(jnp.argsort(-finished.score, axis=1, stable=True))
    num_tokens = _num_tokens(best.text, lengths, limit, eos_id)
    return Generation(best.text, best.logprobs, num_tokens, best.score, position - start)


@dataclasses.dataclass(frozen=True)
class _BeamRules:
    """How beams advance by one token, and when their search is done."""

    lengths: jax.Array  # int[B] of the prompts
    limit: jax.Array  # int[B]: a text ends before this position
    config: GenerateConfig
    eos_id: int

    @property
    def group_size(self) -> int:
        """The number of beams in a group."""
        return self.config.num_beams // self.config.num_groups

    def advance_all(self, logprobs, position, running, finished):
        """Advances all groups, one after the other.

        Returns the running beams, the finished ones, and the beam int[B, n] that each running one
        goes on from.
        """
        images, _, vocab = logprobs.shape
        chosen = jnp.zeros((images, vocab))
        by_group = []
        for first in range(0, self.config.num_beams, self.group_size):
            own = slice(first, first + self.group_size)
            group = jax.tree.map(lambda x: x[:, own], (logprobs, running, finished))  # noqa: B023
            *result, chosen = self._advance(group[0], position, *group[1:], chosen)
            result[2] += first
            by_group.append(result)
        return jax.tree.map(lambda *x: jnp.concatenate(x, 1), *by_group)

    def _advance(self, logprobs, position, running, finished, chosen):
        """Advances one group.

        Returns its running beams, its finished ones, the beam that each running one goes on from,
        and `chosen` float[B, V]: how many beams of all groups so far chose each token.
        """
        images, size, vocab = logprobs.shape

        def flat(x):
            return x.reshape(images, size * vocab)

        forced = (position < self.lengths)[:, None]  # still in the prompt
        candidates = running.score[..., None] + logprobs
        ranked = flat(candidates - self.config.diversity_penalty * chosen[:, None])
        rank, best = jax.lax.top_k(ranked, 2 * size)  # twice as many: half of them may end here
        beam = best // vocab
        token = (best % vocab).astype(running.text.dtype)
        score = jnp.take_along_axis(flat(candidates), best, axis=1)
        logprob = jnp.take_along_axis(flat(logprobs), best, axis=1)
        grown = running.pick(beam)
        grown = _Beams(
            score,
            grown.text.at[:, :, position].set(token),
            grown.logprobs.at[:, :, position].set(logprob),
        )
        # The last position ends every beam, as the end token ends the others.
        at_end = (token == self.eos_id) | (position + 1 == self.limit)[:, None]
        ends = at_end & ~forced & jnp.isfinite(score)

        # Beams that end here compete with those that ended before.
        final_score = jnp.where(ends, self._normalised(score, position + 1), -jnp.inf)
        ended = grown._replace(score=final_score)
        ended = jax.tree.map(lambda old, new: jnp.concatenate([old, new], 1), finished, ended)
        finished = ended.pick(jax.lax.top_k(ended.score, size)[1])

        # The best of those that do not end run on.
        grown = grown._replace(score=jnp.where(ends, -jnp.inf, score))
        _, kept = jax.lax.top_k(jnp.where(ends, -jnp.inf, rank), size)

        def unless_forced(old, new):
            return jnp.where(forced.reshape(images, *(1,) * (new.ndim - 1)), old, new)

        running = jax.tree.map(unless_forced, running, grown.pick(kept))
        beam = jnp.where(forced, jnp.arange(size), jnp.take_along_axis(beam, kept, axis=1))
        counts = jnp.isfinite(running.score) & ~forced
        choices = jax.nn.one_hot(running.text[:, :, position], vocab) * counts[..., None]
        return running, finished, beam, chosen + choices.sum(1)

    def is_broken(self, nan, position, running) -> jax.Array:
        """Tells for each image whether the logits of a running beam are not numbers.

        `nan` is bool[B, n, V]. In a prompt no logits are used.
        """
        beams = nan.any(2) & jnp.isfinite(running.score)
        return (position >= self.lengths) & beams.any(1)

    def is_done(self, position, running, finished) -> jax.Array:
        """Tells for each image whether its search is done.

        It is done when no running beam can beat the finished ones.

        Returns:
          bool[B].
        """
        # A running beam can only lose log-probability. Its best score is at the length that
        # divides it by the most.
        end = position + 1
        if self.config.length_penalty > 0:
            end = self.limit
        hope = self._normalised(running.score, end)
        return (position >= self.lengths) & (hope.max(1) <= finished.score.min(1))

    def _normalised(self, score, end):
        """Normalises scores [B, ...] of texts that end before `end`.

        `end` is int[] or int[B].
        """
        num_tokens = jnp.maximum(end - self.lengths, 1).reshape(-1, *(1,) * (score.ndim - 1))
        return score / num_tokens**self.config.length_penalty
