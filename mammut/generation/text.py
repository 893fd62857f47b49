"""Text from images, by a search over the cached caption pass.

The image is encoded once. Its keys and values are computed once and shared by its beams. All
columns of the prompts but the last run in one pass. From there on all rows advance one position at
a time, and a row with a longer prompt reads its own prompt until the prompt ends.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int, Int32, Key, UInt8

from mammut.core.typing import Array
from mammut.data.processor import Processor, as_images, as_texts
from mammut.generation.rows import GeneratedRow, Row, checked_numbers, generate_rows, row_keys
from mammut.generation.search import Decoding, GenerateConfig, Generation, search
from mammut.models.cached_decoder import DecodeCache, cached_step, prefill
from mammut.models.inputs import require_texts
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
    """Continues prompts, given their images.

    It is a pure function, for `jax.jit`, on any mesh.

    The length L of the result is `ModelConfig.text_length`, or Q + `config.max_new_tokens` if that
    is smaller.

    Args:
      image: uint8[B, height, width, 3], or videos uint8[B, T, height, width, 3]; or float,
        normalised as for `MaMMUT.image_tokens`.
      prompt: int[B, Q], the start token first; no end token.
      prompt_valid: bool[B, Q], True for the prompt's tokens, which come before all pads. The first
        token always counts.
      eos_id: the token that ends a text. With an id outside the vocabulary, such as -1, no token
        does.
      vocab_size: only ids below it are chosen, and only they share the probability: a model's
        vocabulary may be larger than its tokenizer's. None: the model's vocabulary.
      keys: a random key for each row [B], used if `config.temperature` is not 0. A row's tokens
        depend on its own key, not on the other rows.

    Raises:
      ValueError: the prompt leaves no room below `ModelConfig.text_length`; there are as many beams
        as tokens in the vocabulary, or more; there are no images, or another number of prompts; or
        there are no keys to sample with.
    """
    if not len(prompt) or len(prompt) != len(image):
        raise ValueError(
            f"there are {len(prompt)} prompts for {len(image)} images, expected one each, "
            "and at least one"
        )
    require_texts(prompt, prompt_valid, model.config.text, image=image)
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
    """Continues prompts as `generate` does, from encoded images or a prefix.

    The image tokens are float[B, P, D]. A model with an image prefix takes any prefix in place of
    them.

    A prefix may hold several images and texts between them (`mammut.generation.interleaved`), with
    pads in front where `prefix_valid` is False. The length L of the result is what
    `DecoderConfig.max_length` leaves after the prefix, or less.
    """
    text = model.config.text
    rows, width = prompt.shape
    longest = text.max_length
    if model.decoder.has_prefix:
        longest -= image_tokens.shape[1] - 1  # the prefix stands in place of the start token
    if width >= longest:
        raise ValueError(
            f"prompts have {width} tokens, expected fewer than the {longest} for which "
            f"DecoderConfig.max_length {text.max_length} has room"
        )
    vocab_size = min(text.vocab_size, vocab_size or text.vocab_size)
    if config.num_beams >= vocab_size:
        raise ValueError(
            f"num_beams is {config.num_beams}, expected fewer than the {vocab_size} of the "
            "vocabulary"
        )
    if config.temperature > 0 and keys is None:
        raise ValueError(
            f"GenerateConfig.temperature is {config.temperature}, expected a key for each row with "
            "it"
        )

    prompt_valid = jnp.asarray(prompt_valid).at[:, 0].set(True)
    length = min(longest, width + (config.max_new_tokens or longest))
    tokens = jnp.full((rows, length), eos_id, jnp.int32)
    tokens = tokens.at[:, :width].set(jnp.where(prompt_valid, prompt, eos_id))
    # The loop starts with a prompt's last token, at the latest: the columns before the last one are
    # enough.
    decoder = model.decoder
    _, cache = prefill(decoder, prompt[:, :-1], image_tokens, length, prefix_valid)

    def step(text, position, cache):
        features, cache = cached_step(decoder, text[:, position], position, cache)
        return decoder.logits(features)[:, :vocab_size], cache

    decoding = Decoding(step, functools.partial(_take_beams, rows), cache)
    return search(decoding, tokens, prompt_valid.sum(1), config, eos_id=eos_id, keys=keys)


def _take_beams(images: int, cache: DecodeCache, beam: Int[Array, "B n"]) -> DecodeCache:
    """Picks the beams [B, n] of each image in a cache.

    The image's keys and values are shared by all beams and stay as they are.
    """
    # Image by image, so that no row leaves its device on a mesh.
    take = jax.vmap(lambda rows, beam: rows[:, :, beam], in_axes=(2, 0), out_axes=2)

    def pick(x):
        by_image = x.reshape(*x.shape[:2], images, -1, *x.shape[3:])
        taken = take(by_image, beam)
        return taken.reshape(*x.shape[:2], -1, *x.shape[3:])

    return cache.replace(text=jax.tree.map(pick, cache.text))


@functools.partial(jax.jit, static_argnames=("graphdef", "config", "eos_id", "vocab_size"))
def _generate(
    graphdef, params, image, prompt, prompt_valid, config, *, eos_id, vocab_size, keys
) -> Generation:
    model = nnx.merge(graphdef, params)
    settings = {"eos_id": eos_id, "vocab_size": vocab_size, "keys": keys}
    return generate(model, image, prompt, prompt_valid, config, **settings)


@dataclasses.dataclass(frozen=True)
class Text:
    """A generated text with its log-probabilities, natural logarithms.

    Example:
      >>> [text] = mammut.generate_text(model, processor, ["dog.jpg"])
      >>> text.text, text.logprob
      ('a dog on the grass', -3.1)
    """

    text: str
    logprob: float  # of the text and its end token: the sum of `token_logprobs`
    # one for each token; the end token is the last, unless there was no room left for it
    token_logprobs: tuple[float, ...]


def generate_text(
    model: MaMMUT,
    processor: Processor,
    images: Iterable[Any],
    prompts: Iterable[str] | None = None,
    config: GenerateConfig = GenerateConfig(),
    *,
    batch_size: int = 32,
    seed: int = 0,
) -> list[Text]:
    """Generates the best text for each image.

    All batches have one shape, the last one is padded: the program is compiled once.

    Args:
      images: any list of what `processor` reads: arrays, PIL images, paths, open files, bytes;
        or videos alone, which `Processor.__call__` tells from pictures.
      prompts: the beginning of each text, which is not part of the result. None: no beginning.
      batch_size: images at a time; fewer images make a smaller batch.
      seed: the seed of sampling. The text of an image depends on it and on the image's position in
        the list, not on the batch.

    Raises:
      ValueError: an image cannot be read; `prompts` are not as many str as `images`; a prompt
        leaves no room for a text; `processor` is not the model's; or the model's logits are not
        numbers, as after training diverged.

    Example:
      >>> config = mammut.GenerateConfig(num_beams=4)
      >>> texts = mammut.generate_text(model, processor, ["dog.jpg"], ["a picture of"], config)
      >>> texts[0].text
      'a dog on the grass'
    """
    batch_size, seed = checked_numbers(config, batch_size, seed)
    images = as_images(images)
    ids = _prompt_ids(model, processor, images, prompts)
    if not ids:
        return []

    processor = processor.for_model(model.config)
    # Few sizes, all powers of two: a call with other images or prompts finds its program compiled.
    batch_size = min(batch_size, _power_of_two(len(ids)))
    width = min(_power_of_two(max(map(len, ids))), model.config.text_length - 1)
    config = with_text_limit(config, processor)
    graphdef, params = nnx.split(model)
    settings = {"eos_id": processor.eos_id, "vocab_size": processor.vocab_size}

    axes = set()

    def rows() -> Iterator[Row]:
        for start in range(0, len(ids), batch_size):
            pixels = processor(images=images[start : start + batch_size])["image"]
            axes.add(pixels.ndim)
            if len(axes) > 1:  # `processor` has seen one batch alone
                raise ValueError(
                    "images has videos and pictures, expected videos alone or pictures alone"
                )
            for number, image in enumerate(pixels, start):
                yield Row((image, ids[number]), len(ids[number]), number, f"image {number}")

    def run(rows: list[Row]) -> Generation:
        batch = image_prompt_batch(rows, width, processor.pad_id)
        keys = row_keys(rows, config, seed)
        return _generate(graphdef, params, *batch, config, keys=keys, **settings)

    generated = generate_rows(rows(), run, processor, batch_size=batch_size)
    return [text_of(row) for row in generated]


def image_prompt_batch(
    rows: Sequence[Row], width: int, pad_id: int
) -> tuple[UInt8[Array, "B *T height width 3"], Int32[Array, "B Q"], Bool[Array, "B Q"]]:
    """Makes the arguments of `generate` from images and prompt ids.

    They are image, prompt and prompt_valid.

    Args:
      rows: each prompt is an image uint8[height, width, 3], or all are videos uint8[T, height,
        width, 3], and a list of ids, the start first.
      width: Q, the tokens that prompts are padded to.
      pad_id: the id in the padding.
    """
    images, prompts = zip(*(row.prompt for row in rows), strict=True)
    tokens = np.array([ids + [pad_id] * (width - len(ids)) for ids in prompts], np.int32)
    valid = np.arange(width) < np.array([len(ids) for ids in prompts])[:, None]
    return np.stack(images), tokens, valid


def with_text_limit(config: GenerateConfig, processor: Processor) -> GenerateConfig:
    """Sets the limit of new tokens where the config has none.

    It is then the length of the processor's texts.

    The context of a language model may be a hundred times as long as the texts it is used for.
    """
    limit = config.max_new_tokens or processor.max_length - 1
    return dataclasses.replace(config, max_new_tokens=limit)


def text_of(row: GeneratedRow) -> Text:
    """Returns the text of a row, without the spaces around it."""
    logprobs = row.token_logprobs.tolist()
    return Text(row.text.strip(), sum(logprobs), tuple(logprobs))


def _prompt_ids(
    model: MaMMUT, processor: Processor, images: Sequence[Any], prompts: Any
) -> list[list[int]]:
    """Encodes each image's prompt, with the start token first."""
    require_same_vocabulary(model, processor)
    text_length = model.config.text_length
    if prompts is None:
        prompts = [""] * len(images)
    prompts = as_texts(prompts, "prompts")
    if len(prompts) != len(images):
        raise ValueError(f"there are {len(prompts)} prompts for {len(images)} images")

    ids = [[processor.bos_id, *processor.encode_prompt(text)] for text in prompts]
    for i, row in enumerate(ids):
        if len(row) >= text_length:
            raise ValueError(
                f"prompt {i}, {prompts[i]!r:.60}, has {len(row)} tokens with the start, expected "
                f"fewer than the {text_length} for which DecoderConfig.max_length "
                f"{model.config.text.max_length} has room"
            )
    return ids


def require_same_vocabulary(model: MaMMUT, processor: Processor) -> None:
    """Checks that the model has all ids of the processor.

    Raises:
      ValueError: the processor has ids that the model does not have, or one of them is none.
    """
    for value, kind in ((model, MaMMUT), (processor, Processor)):
        if not isinstance(value, kind):
            raise ValueError(
                f"{value!r:.60} is given, expected a {kind.__name__}: mammut.load returns both"
            )
    vocab_size = model.config.text.vocab_size
    if processor.vocab_size > vocab_size:
        raise ValueError(
            f"the processor's vocabulary has {processor.vocab_size} ids, DecoderConfig.vocab_size "
            f"of the model is {vocab_size}: they do not belong together"
        )


def _power_of_two(n: int) -> int:
    """Returns the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def caption(
    model: MaMMUT,
    processor: Processor,
    images: Iterable[Any],
    *,
    num_beams: int = 1,
    batch_size: int = 32,
) -> list[str]:
    """Captions images, one caption each.

    Args:
      images: any list of what `processor` reads: arrays, PIL images, paths, open files, bytes;
        or videos alone, which `Processor.__call__` tells from pictures.
      num_beams: 1 for greedy decoding, more for beam search.
      batch_size: images at a time.

    Raises:
      ValueError: see `generate_text`.

    Example:
      >>> mammut.caption(model, processor, ["dog.jpg", "cat.jpg"], num_beams=4)
      ['a dog on the grass', 'a cat in a box']
    """
    config = GenerateConfig(num_beams=num_beams)
    texts = generate_text(model, processor, images, None, config, batch_size=batch_size)
    return [text.text for text in texts]


def answer(
    model: MaMMUT,
    processor: Processor,
    images: Iterable[Any],
    questions: Iterable[str],
    *,
    prompt: str = "{}",
    num_beams: int = 1,
    batch_size: int = 32,
) -> list[str]:
    """Answers questions, one about each image.

    Args:
      images: any list of what `processor` reads: arrays, PIL images, paths, open files, bytes;
        or videos alone, which `Processor.__call__` tells from pictures.
      questions: one for each image.
      prompt: a text with {} in place of the question, as in the model's training: "Q: {} A:".
      num_beams: 1 for greedy decoding, more for beam search.
      batch_size: images at a time.

    Raises:
      ValueError: `prompt` has no {}; otherwise see `generate_text`.

    Example:
      >>> mammut.answer(model, processor, ["dog.jpg"], ["what animal is this?"])
      ['dog']
    """
    if not isinstance(prompt, str) or "{}" not in prompt:
        raise ValueError(
            f"prompt is {prompt!r}, expected a text with {{}} in it, the place of the question"
        )
    config = GenerateConfig(num_beams=num_beams)
    questions = as_texts(questions, "questions")
    prompts = [prompt.replace("{}", question) for question in questions]
    texts = generate_text(model, processor, images, prompts, config, batch_size=batch_size)
    return [text.text for text in texts]
