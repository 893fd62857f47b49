"""Text from images: a search over the cached caption pass.

The image is encoded once; its keys and values are made once and shared by its beams. The prompts
but for their last column are run in one pass, then one position at a time for all rows together: a
row whose prompt is longer is fed its prompt until that ends.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int, Key

from mammut.core.typing import Array
from mammut.data.processor import Processor
from mammut.generation.search import Decoding, GenerateConfig, Generation, search
from mammut.models.cached_decoder import cached_step, prefill
from mammut.models.mammut import Image, MaMMUT


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
    """Continues prompts, given their images. Pure: to be called under `jax.jit`, on any mesh.

    L of what comes back is `ModelConfig.text_length`, or Q + `config.max_new_tokens` where that is
    less.

    Args:
      image: uint8[B, height, width, 3].
      prompt: int[B, Q], the start token first; no end token.
      prompt_valid: bool[B, Q], True for the prompt's tokens, which come before any pad. The first
        always counts.
      eos_id: ends a text. An id outside of the vocabulary, such as -1: nothing does.
      vocab_size: only ids below it are chosen, and only they share the probability: a model's
        vocabulary may be larger than its tokenizer's. None: the model's.
      keys: a random key for each row [B], used where `config.temperature` is not 0. A row's tokens
        depend on its own key alone, not on the rows beside it.

    Raises:
      ValueError: the prompt leaves no room below `ModelConfig.text_length`, there are not fewer
        beams than tokens in the vocabulary, no images, not as many prompts as images, or no keys to
        sample with.
    """
    if not len(prompt) or len(prompt) != len(image):
        raise ValueError(
            f"there are {len(prompt)} prompts for {len(image)} images, expected one each, and at least one"
        )
    image_tokens = model.image_tokens(image).tokens
    settings = {"eos_id": eos_id, "vocab_size": vocab_size, "keys": keys}
    return generate_after(model, image_tokens, prompt, prompt_valid, config, **settings)


def generate_after(
    model: MaMMUT,
    image_tokens: Float[Array, "B P D"],
    prompt: Int[Array, "B Q"],
    prompt_valid: Bool[Array, "B Q"],
    config: GenerateConfig = GenerateConfig(),
    *,
    eos_id: int,
    prefix_valid: Bool[Array, "B P"] | None = None,
    vocab_size: int | None = None,
    keys: Key[Array, "B"] | None = None,
) -> Generation:
    """`generate` with the images as the decoder takes them, or, of a model with an image prefix, with any prefix.

    Such a prefix may hold several images and texts between them (`mammut.generation.interleaved`),
    with pads in front where `prefix_valid` is False. L is what `DecoderConfig.max_length` leaves,
    or less.
    """
    text, (rows, width) = model.config.text, prompt.shape
    longest = text.max_length - (image_tokens.shape[1] - 1 if model.decoder.has_prefix else 0)
    if width >= longest:
        raise ValueError(
            f"prompts have {width} tokens, expected fewer than the {longest} for which DecoderConfig.max_length "
            f"{text.max_length} has room"
        )
    vocab_size = min(text.vocab_size, vocab_size or text.vocab_size)
    if config.num_beams >= vocab_size:
        raise ValueError(
            f"num_beams is {config.num_beams}, expected fewer than the {vocab_size} of the vocabulary"
        )
    if config.temperature > 0 and keys is None:
        raise ValueError(
            f"GenerateConfig.temperature is {config.temperature}, expected a key for each row with it"
        )

    prompt_valid = jnp.asarray(prompt_valid).at[:, 0].set(True)
    length = min(longest, width + (config.max_new_tokens or longest))
    tokens = (
        jnp.full((rows, length), eos_id, jnp.int32)
        .at[:, :width]
        .set(jnp.where(prompt_valid, prompt, eos_id))
    )
    # The loop starts with a prompt's last token, at the latest: what precedes the last column is
    # enough.
    decoder = model.decoder
    _, cache = prefill(decoder, prompt[:, :-1], image_tokens, length, prefix_valid)

    def step(text, position, cache):
        features, cache = cached_step(decoder, text[:, position], position, cache)
        return decoder.logits(features)[:, :vocab_size], cache

    def take(cache, beam):
        # Image by image, so that on a mesh no row leaves its device; the image's keys and values
        # have no beams.
        def pick(x):
            by_image = x.reshape(*x.shape[:2], rows, -1, *x.shape[3:])
            taken = jax.vmap(lambda x, beam: x[:, :, beam], in_axes=(2, 0), out_axes=2)(
                by_image, beam
            )
            return taken.reshape(*x.shape[:2], -1, *x.shape[3:])

        return cache.replace(text=jax.tree.map(pick, cache.text))

    return search(
        Decoding(step, take, cache), tokens, prompt_valid.sum(1), config, eos_id=eos_id, keys=keys
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "config", "eos_id", "vocab_size"))
def _generate(
    graphdef, params, image, prompt, prompt_valid, config, *, eos_id, vocab_size, keys
) -> Generation:
    model = nnx.merge(graphdef, params)
    return generate(
        model, image, prompt, prompt_valid, config, eos_id=eos_id, vocab_size=vocab_size, keys=keys
    )


@dataclasses.dataclass(frozen=True)
class Text:
    """A text that was generated, and what the model makes of it."""

    text: str
    logprob: float  # of the text and its end, natural logarithm: the sum of `token_logprobs`
    # of each token, the end token last, unless there was no place left for it
    token_logprobs: tuple[float, ...]


def generate_text(
    model: MaMMUT,
    processor: Processor,
    images: Sequence[Any] | np.ndarray,
    prompts: Sequence[str] | None = None,
    config: GenerateConfig = GenerateConfig(),
    *,
    batch_size: int = 32,
    seed: int = 0,
) -> list[Text]:
    """The best text for each image. All batches have one shape, so that all is compiled once: the last is padded.

    Args:
      images: whatever `processor` reads: arrays, PIL images, paths, bytes.
      prompts: what each text starts with; it is not part of what comes back. None: nothing.
      batch_size: of images at a time; fewer images make a smaller batch.
      seed: of sampling; the text of an image depends on it and on the image's place in the list,
        not on the batch.

    Raises:
      ValueError: an image cannot be read, `prompts` are not as many str as `images`, or one leaves
        no room for a text; `processor` is not the model's; the model's logits are not numbers, as
        after training diverged.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    ids = _prompt_ids(model, processor, images, prompts)
    if not ids:
        return []
    # Few sizes, so that a call with other images or prompts can use what was compiled: powers of
    # two.
    batch_size = min(batch_size, _power_of_two(len(ids)))
    width = min(_power_of_two(max(map(len, ids))), model.config.text_length - 1)
    graphdef, params = nnx.split(model)
    settings = {"eos_id": processor.eos_id, "vocab_size": processor.vocab_size}
    # The context of a language model may be a hundred times as long as the texts it is used for.
    config = dataclasses.replace(
        config, max_new_tokens=config.max_new_tokens or processor.max_length - 1
    )
    texts: list[Text] = []
    for start in range(0, len(ids), batch_size):
        rows = min(batch_size, len(ids) - start)
        # Padding repeats the last row: it ends no later than the others.
        padded = [*range(start, start + rows), *[start + rows - 1] * (batch_size - rows)]
        image = processor(images=images[start : start + rows])["image"][np.array(padded) - start]
        prompt = np.array(
            [ids[i] + [processor.pad_id] * (width - len(ids[i])) for i in padded], np.int32
        )
        prompt_valid = np.arange(width) < np.array([len(ids[i]) for i in padded])[:, None]
        keys = None
        if config.temperature > 0:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.array(padded))
        out = jax.device_get(
            _generate(graphdef, params, image, prompt, prompt_valid, config, keys=keys, **settings)
        )
        own = range(start, start + rows)
        texts += texts_of(out, [len(ids[i]) for i in own], processor, [f"image {i}" for i in own])
    return texts


def texts_of(
    out: Generation, lengths: Sequence[int], processor: Processor, names: Sequence[str]
) -> list[Text]:
    """The best text of each of the first rows, what follows its prompt of so many tokens.

    Raises:
      ValueError: a row's logits were not numbers; `names` says whose.
    """
    texts = []
    for row, (first, name) in enumerate(zip(lengths, names, strict=True)):
        if not np.isfinite(out.scores[row, 0]):
            raise ValueError(
                f"the model's logits for {name} are not numbers: its parameters are damaged, or its training diverged"
            )
        logprobs = out.logprobs[row, 0, first : first + out.num_tokens[row, 0]].tolist()
        text = processor.tokenizer.decode(out.tokens[row, 0, first:].tolist()).strip()
        texts.append(Text(text, sum(logprobs), tuple(logprobs)))
    return texts


def _prompt_ids(
    model: MaMMUT, processor: Processor, images: Sequence[Any] | np.ndarray, prompts: Any
) -> list:
    """The ids of each image's prompt, the start first."""
    text_length = model.config.text_length
    require_same_vocabulary(model, processor)
    prompts = [""] * len(images) if prompts is None else prompts
    if isinstance(prompts, str) or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"prompts is {prompts!r:.80}, expected a list of str")
    if len(prompts) != len(images):
        raise ValueError(f"there are {len(prompts)} prompts for {len(images)} images")
    ids = [[processor.bos_id, *processor.encode_prompt(text)] for text in prompts]
    for i, row in enumerate(ids):
        if len(row) >= text_length:
            raise ValueError(
                f"prompt {i}, {prompts[i]!r:.60}, has {len(row)} tokens with the start, expected fewer than the "
                f"{text_length} for which DecoderConfig.max_length {model.config.text.max_length} has room"
            )
    return ids


def require_same_vocabulary(model: MaMMUT, processor: Processor) -> None:
    """Raises ValueError where the processor has ids that the model does not."""
    vocab_size = model.config.text.vocab_size
    if processor.vocab_size > vocab_size:
        raise ValueError(
            f"the processor's vocabulary has {processor.vocab_size} ids, DecoderConfig.vocab_size of the model is "
            f"{vocab_size}: they do not belong together"
        )


def _power_of_two(n: int) -> int:
    """The first power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def caption(
    model: MaMMUT,
    processor: Processor,
    images: Sequence[Any] | np.ndarray,
    *,
    num_beams: int = 1,
    batch_size: int = 32,
) -> list[str]:
    """Captions of images, one each: greedy, or by beam search with `num_beams` above 1. See `generate_text`."""
    config = GenerateConfig(num_beams=num_beams)
    return [
        found.text
        for found in generate_text(model, processor, images, None, config, batch_size=batch_size)
    ]


def answer(
    model: MaMMUT,
    processor: Processor,
    images: Sequence[Any] | np.ndarray,
    questions: Sequence[str],
    *,
    prompt: str = "{}",
    num_beams: int = 1,
    batch_size: int = 32,
) -> list[str]:
    """Answers to questions, one an image: what the model says after the question. See `generate_text`.

    `prompt` is what a question is put into, {} being its place: that of the model's training, such
    as "Q: {} A:".
    """
    if "{}" not in prompt:
        raise ValueError(
            f"prompt is {prompt!r}, expected a text with {{}} in it, the place of the question"
        )
    config = GenerateConfig(num_beams=num_beams)
    asked = (
        questions if prompt == "{}" else [prompt.replace("{}", question) for question in questions]
    )
    return [
        found.text
        for found in generate_text(model, processor, images, asked, config, batch_size=batch_size)
    ]
