"""Text from images: one jitted loop over the cached caption pass, for greedy decoding, sampling and beam search.

Every loop has static shapes. The image is encoded once; its keys and values are made once and shared by its beams.
The prompt is run in one pass, then one position at a time for all rows together: a row whose prompt is longer is fed
its prompt until that ends. The loop stops when every row has.

Log-probabilities are those of the model (log-softmax of its logits), whatever temperature, filters or penalties chose
the tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Bool, Float, Int, Key

from mammut.model import Image, MaMMUT
from mammut.processor import Processor
from mammut.typing import Array

_NEVER = -1e9  # a log-probability that is never chosen, and finite, so that differences of two are no NaN


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How tokens are chosen. The defaults are greedy decoding."""

    num_beams: int = 1  # more than 1: beam search
    length_penalty: float = 1.0  # a finished beam scores its log-probability / length ** length_penalty
    num_groups: int = 1  # the beams in so many groups, each kept from repeating the ones before
    diversity_penalty: float = 0.0  # for each earlier group that chose a token at this position (arXiv 1610.02424)
    temperature: float = 0.0  # 0: the likeliest token; else sample
    top_k: int = 0  # sample from the k likeliest; 0: from all
    top_p: float = 1.0  # sample from the likeliest that together reach p (arXiv 1904.09751)
    min_p: float = 0.0  # sample from those with at least this share of the likeliest's probability
    repetition_penalty: float = 1.0  # logits of tokens already there are divided (if positive) or multiplied by it

    def __post_init__(self):
        def require(condition: bool, name: str, expected: str) -> None:
            if not condition:
                raise ValueError(f"GenerateConfig.{name} is {getattr(self, name)}, expected {expected}")

        require(self.num_beams >= 1, "num_beams", "at least 1")
        require(self.num_groups >= 1 and self.num_beams % self.num_groups == 0, "num_groups", "a divisor of num_beams")
        require(self.temperature >= 0, "temperature", "at least 0")
        require(self.top_k >= 0, "top_k", "at least 0")
        require(0 < self.top_p <= 1, "top_p", "0 < p <= 1")
        require(0 <= self.min_p <= 1, "min_p", "0 <= p <= 1")
        require(self.repetition_penalty > 0, "repetition_penalty", "a positive number")
        require(self.diversity_penalty >= 0, "diversity_penalty", "at least 0")
        require(self.num_beams == 1 or self.temperature == 0, "temperature", "0 with num_beams above 1")


@struct.dataclass
class Generation:
    """What was generated; n hypotheses an image, best first (n = num_beams)."""

    tokens: Any  # int[B, n, L]: start, prompt, text, and the end token from where it ended on
    logprobs: Any  # float[B, n, L] of each generated token, its end token included; 0 elsewhere
    scores: Any  # float[B, n]: the sum of logprobs / length ** length_penalty


def generate(
    model: MaMMUT,
    image: Image,
    prompt: Int[Array, "B Q"],
    prompt_valid: Bool[Array, "B Q"],
    config: GenerateConfig = GenerateConfig(),
    *,
    eos_id: int,
    vocab_size: int | None = None,
    keys: Key[Array, "B"] | None = None,
) -> Generation:
    """Continues prompts, given their images. Pure: to be called under `jax.jit`.

    Args:
      image: uint8[B, height, width, 3].
      prompt: int[B, Q], the start token first; no end token.
      prompt_valid: bool[B, Q], True for the prompt's tokens, which come before any pad.
      eos_id: ends a text.
      vocab_size: only ids below it are chosen, and only they share the probability: a model's vocabulary may be
        larger than its tokenizer's. None: the model's.
      keys: a random key for each row [B], used where `config.temperature` is not 0. A row's tokens depend on its own
        key alone, not on the rows beside it.

    Raises:
      ValueError: the prompt leaves no room below `DecoderConfig.max_length`, or there are not fewer beams than tokens
        in the vocabulary.
    """
    text = model.config.text
    if prompt.shape[1] >= text.max_length:
        raise ValueError(
            f"the prompt has {prompt.shape[1]} tokens, expected fewer than DecoderConfig.max_length {text.max_length}"
        )
    vocab_size = text.vocab_size if vocab_size is None else vocab_size
    if config.num_beams >= vocab_size:
        raise ValueError(f"num_beams is {config.num_beams}, expected fewer than the {vocab_size} of the vocabulary")

    def logits(features):
        return model.text.logits(features)[..., :vocab_size].astype(jnp.float32)

    image_tokens = model.image_tokens(image).tokens
    features, cache = model.text.prefill(prompt, image_tokens, text.max_length)
    lengths = prompt_valid.sum(1)
    start = lengths.min()
    features = jax.lax.dynamic_index_in_dim(features, start - 1, axis=1, keepdims=False)
    tokens = jnp.full((len(prompt), text.max_length), eos_id, jnp.int32)
    tokens = tokens.at[:, : prompt.shape[1]].set(jnp.where(prompt_valid, prompt, eos_id))
    state = features, cache, tokens, lengths
    if config.num_beams > 1:
        return _beam_search(model.text.cached_step, logits, state, eos_id, config)
    return _sample(model.text.cached_step, logits, state, eos_id, config, keys)


def _sample(cached_step: Callable, logits_of: Callable, start: tuple, eos_id: int, config, keys) -> Generation:
    """Greedy decoding or sampling, from the features at the last prompt position that all rows share."""
    features, cache, tokens, lengths = start
    rows, length = tokens.shape

    def running(carry):
        position, _, _, _, _, done = carry
        return (position < length) & ~done.all()

    def step(carry):
        position, features, cache, tokens, logprobs, done = carry
        logits = logits_of(features)
        chosen = _choose(logits, tokens, position, config, keys)
        in_prompt = position < lengths
        token = jnp.where(in_prompt, tokens[:, position], jnp.where(done, eos_id, chosen)).astype(tokens.dtype)
        logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen[:, None], axis=1)[:, 0]
        logprobs = logprobs.at[:, position].set(jnp.where(in_prompt | done, 0, logprob))
        tokens = tokens.at[:, position].set(token)
        done = done | (~in_prompt & (token == eos_id))
        features, cache = cached_step(token, position, cache)
        return position + 1, features, cache, tokens, logprobs, done

    state = (lengths.min(), features, cache, tokens, jnp.zeros((rows, length)), jnp.zeros(rows, bool))
    _, _, _, tokens, logprobs, _ = jax.lax.while_loop(running, step, state)
    ended = (tokens == eos_id) & (jnp.arange(length) >= lengths[:, None])
    generated = jnp.where(ended.any(1), ended.argmax(1) + 1, length) - lengths
    scores = logprobs.sum(1) / generated**config.length_penalty
    return Generation(tokens[:, None], logprobs[:, None], scores[:, None])


def _choose(logits, tokens, position, config, keys) -> Int[Array, "R"]:
    """The next token of each row."""
    if config.repetition_penalty != 1:
        there = (jnp.arange(tokens.shape[1]) < position)[None, :, None]
        seen = (jax.nn.one_hot(tokens, logits.shape[-1], dtype=jnp.bool_) & there).any(1)
        penalised = jnp.where(logits > 0, logits / config.repetition_penalty, logits * config.repetition_penalty)
        logits = jnp.where(seen, penalised, logits)
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = filter_logits(logits / config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p)
    row_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, position)
    return jax.vmap(jax.random.categorical)(row_keys, logits)


def filter_logits(
    logits: Float[Array, "R V"], *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Float[Array, "R V"]:
    """Logits float[R, V] with those not to be sampled at minus infinity; the likeliest always stays.

    `top_p` keeps the smallest set of likeliest tokens whose probabilities reach p: a token stays if those likelier than
    it do not reach p yet.
    """
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    probs = jax.nn.softmax(ranked, axis=-1)
    keep = jnp.cumsum(probs, axis=-1) - probs < top_p
    keep &= probs >= min_p * probs[:, :1]
    if top_k:
        keep &= jnp.arange(logits.shape[-1]) < top_k
    rows = jnp.arange(len(logits))[:, None]
    return jnp.where(jnp.zeros_like(keep).at[rows, order].set(keep.at[:, 0].set(True)), logits, -jnp.inf)


def _beam_search(cached_step: Callable, logits_of: Callable, start: tuple, eos_id: int, config) -> Generation:
    """Beam search, in groups that avoid each other's choices where `num_groups` is more than 1.

    A beam that ends competes by its score with the beams that ended before it; the search of an image stops when no
    running beam of it can beat the worst of those. Rows are images x beams.
    """
    features, cache, tokens, lengths = start
    images, length = tokens.shape
    beams, groups = config.num_beams, config.num_groups
    size = beams // groups  # beams of a group

    def normalised(logprob, position):
        return logprob / jnp.maximum(position + 1 - lengths, 1).reshape(-1, *(1,) * (logprob.ndim - 1)) ** (
            config.length_penalty
        )

    def advance(group, logprobs, position, running, finished, chosen):
        """One group's next token: its running beams and finished ones, and the tokens it chose."""
        scores, text, history = (x[:, group] for x in running)  # [B, size], [B, size, L] twice
        end_scores, end_text, end_history = (x[:, group] for x in finished)
        logprob = logprobs[:, group]  # [B, size, V]
        vocab = logprob.shape[-1]
        forced = (position < lengths)[:, None]  # still in the prompt
        candidates = scores[..., None] + logprob
        ranked = candidates - config.diversity_penalty * chosen[:, None]
        _, best = jax.lax.top_k(ranked.reshape(images, -1), 2 * size)  # twice as many: half of them may end here
        beam, token = best // vocab, (best % vocab).astype(tokens.dtype)
        score = jnp.take_along_axis(candidates.reshape(images, -1), best, axis=1)
        rank = jnp.take_along_axis(ranked.reshape(images, -1), best, axis=1)
        step_logprob = jnp.take_along_axis(logprob.reshape(images, -1), best, axis=1)
        next_text = jnp.take_along_axis(text, beam[..., None], axis=1).at[:, :, position].set(token)
        next_history = jnp.take_along_axis(history, beam[..., None], axis=1).at[:, :, position].set(step_logprob)
        # The last position ends every beam, as the others are ended by their end token.
        ends = ((token == eos_id) | (position == length - 1)) & ~forced & (score > _NEVER / 2)

        # Those that end compete with those that have.
        all_scores = jnp.concatenate([end_scores, jnp.where(ends, normalised(score, position), _NEVER)], 1)
        end_scores, place = jax.lax.top_k(all_scores, size)
        merge = lambda old, new: jnp.take_along_axis(jnp.concatenate([old, new], 1), place[..., None], axis=1)  # noqa: E731
        finished = (end_scores, merge(end_text, next_text), merge(end_history, next_history))

        # The best that do not end run on.
        _, place = jax.lax.top_k(jnp.where(ends, _NEVER * 2, rank), size)
        pick = lambda x: jnp.take_along_axis(x, place.reshape(*place.shape, *(1,) * (x.ndim - 2)), axis=1)  # noqa: E731
        beam = jnp.where(forced, jnp.arange(size), pick(beam))
        token = jnp.where(forced, text[:, :, position], pick(token))
        running = (
            jnp.where(forced, scores, jnp.where(pick(ends), _NEVER, pick(score))),
            jnp.where(forced[..., None], text, pick(next_text)),
            jnp.where(forced[..., None], history, pick(next_history)),
        )
        alive = (running[0] > _NEVER / 2) & ~forced
        chosen = chosen + (jax.nn.one_hot(token, vocab) * alive[..., None]).sum(1)
        return running, finished, beam, chosen

    def step(carry):
        position, features, cache, running, finished, _ = carry
        logprobs = jax.nn.log_softmax(logits_of(features)).reshape(images, groups, size, -1)
        chosen = jnp.zeros((images, logprobs.shape[-1]))
        by_group = []
        for group in range(groups):
            *result, chosen = advance(group, logprobs, position, running, finished, chosen)
            by_group.append(result)
        running, finished, beam = jax.tree.map(lambda *x: jnp.stack(x, 1), *by_group)
        # The caches follow their beams; only the text's, since the image's are shared.
        rows = (jnp.arange(images * groups).reshape(images, groups, 1) * size + beam).reshape(-1)
        text_cache = jax.tree.map(lambda x: x[:, :, rows], cache.text)
        token = running[1][..., position].reshape(-1)
        features, cache = cached_step(token, position, cache.replace(text=text_cache))
        # A running beam can only lose log-probability; its best score is at the length that divides it the most.
        longest = length - 1 if config.length_penalty > 0 else position
        hope = normalised(running[0], longest).max((1, 2))
        done = (position >= lengths) & (hope <= finished[0].min((1, 2)))
        return position + 1, features, cache, running, finished, done

    def searching(carry):
        position, _, _, _, _, done = carry
        return (position < length) & ~done.all()

    repeat = lambda x: jnp.broadcast_to(x[:, None, None], (images, groups, size, *x.shape[1:]))  # noqa: E731
    # All beams of a group start alike: all but the first are held back until they differ.
    scores = jnp.where(jnp.arange(size) == 0, 0.0, _NEVER) + jnp.zeros((images, groups, size))
    history = jnp.zeros((images, groups, size, length))
    running = (scores, repeat(tokens), history)
    finished = (jnp.full((images, groups, size), _NEVER), repeat(tokens), history)
    rows = jnp.repeat(jnp.arange(images), beams)
    cache = cache.replace(text=jax.tree.map(lambda x: x[:, :, rows], cache.text))
    state = (lengths.min(), features[rows], cache, running, finished, jnp.zeros(images, bool))
    _, _, _, running, finished, _ = jax.lax.while_loop(searching, step, state)

    scores, text, history = (x.reshape(images, beams, *x.shape[3:]) for x in finished)
    order = jnp.argsort(-scores, axis=1, stable=True)
    scores = jnp.take_along_axis(scores, order, axis=1)
    text, history = (jnp.take_along_axis(x, order[..., None], axis=1) for x in (text, history))
    return Generation(text, history, scores)


@functools.partial(jax.jit, static_argnames=("graphdef", "config", "eos_id", "vocab_size"))
def _generate(graphdef, params, image, prompt, prompt_valid, config, *, eos_id, vocab_size, keys) -> Generation:
    model = nnx.merge(graphdef, params)
    return generate(model, image, prompt, prompt_valid, config, eos_id=eos_id, vocab_size=vocab_size, keys=keys)


def generate_text(
    model: MaMMUT,
    processor: Processor,
    images: Sequence[Any],
    prompts: Sequence[str] | None = None,
    config: GenerateConfig = GenerateConfig(),
    *,
    batch_size: int = 32,
    seed: int = 0,
) -> list[str]:
    """Text for images, one each, in batches of one shape: the last is padded.

    Args:
      images: whatever `processor` reads: arrays, PIL images, paths, bytes.
      prompts: what each text starts with; it is not part of what comes back. None: nothing.
      seed: of sampling; the text of an image depends on it and on the image's place in the list, not on the batch.

    Raises:
      ValueError: an image cannot be read, `prompts` are not as many as `images`, or one leaves no room for a text.
    """
    if prompts is not None and len(prompts) != len(images):
        raise ValueError(f"there are {len(prompts)} prompts for {len(images)} images")
    if not len(images):
        return []
    ids = [[processor.bos_id, *processor.tokenizer.encode(text)] for text in prompts or [""] * len(images)]
    width = max(map(len, ids))
    graphdef, params = nnx.split(model)
    ids_of = {"eos_id": processor.eos_id, "vocab_size": processor.vocab_size}
    texts = []
    for start in range(0, len(images), batch_size):
        chunk = ids[start : start + batch_size]
        pad = batch_size - len(chunk)
        image = np.pad(processor(images=images[start : start + batch_size])["image"], ((0, pad), *((0, 0),) * 3))
        chunk += chunk[:1] * pad
        prompt = np.array([row + [processor.pad_id] * (width - len(row)) for row in chunk], np.int32)
        prompt_valid = np.arange(width) < np.array([len(row) for row in chunk])[:, None]
        keys = jax.random.split(jax.random.key(seed), start + batch_size)[start:]
        out = _generate(graphdef, params, image, prompt, prompt_valid, config, keys=keys, **ids_of)
        best = np.asarray(out.tokens)[: batch_size - pad, 0]
        texts += [processor.tokenizer.decode(row[len(own) :]).strip() for row, own in zip(best.tolist(), chunk)]
    return texts


def caption(
    model: MaMMUT, processor: Processor, images: Sequence[Any], *, num_beams: int = 1, batch_size: int = 32
) -> list[str]:
    """Captions of images, one each: greedy, or by beam search with `num_beams` above 1. See `generate_text`."""
    return generate_text(model, processor, images, config=GenerateConfig(num_beams=num_beams), batch_size=batch_size)


def answer(
    model: MaMMUT,
    processor: Processor,
    images: Sequence[Any],
    questions: Sequence[str],
    *,
    num_beams: int = 1,
    batch_size: int = 32,
) -> list[str]:
    """Answers to questions, one an image: what the model says after the question. See `generate_text`."""
    config = GenerateConfig(num_beams=num_beams)
    return generate_text(model, processor, images, questions, config, batch_size=batch_size)
