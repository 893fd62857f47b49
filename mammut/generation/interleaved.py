"""Prompts of images and texts in any order.

They are for models with an image prefix.

As in MAGMA (arXiv 2112.05253, section 3), an image becomes embeddings that the decoder reads, and a
text becomes the embeddings of its ids. All of them in order, with no start or end token between
them, are the prefix of the generated text.

Videos may stand in place of the images of a prompt, for a model whose prefix of a video is as long
as that of an image: with `ModelConfig.prefix_tokens`, of the pooled video, or with an encoder of
tubes whose pooling is "queries".

The prompts of a batch may differ in length and in their number of images: shorter prompts have pads
in front. Nothing attends to a pad, and a pad does not count as a position, so that a prompt's text
does not depend on the other prompts.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int, Int32, Key, UInt8

from mammut.core.typing import Array
from mammut.data.processor import Processor, as_images
from mammut.generation.rows import GeneratedRow, Row, checked_numbers, generate_rows, row_keys
from mammut.generation.search import GenerateConfig, Generation
from mammut.generation.text import Text, generate_after, require_same_vocabulary, text_of
from mammut.models.compute import Augment
from mammut.models.mammut import MaMMUT, ModelConfig
from mammut.models.requirements import require_video

# Columns of the prompt in the generated tokens: the start token. The prompt itself is the prefix.
START_LENGTH = 1


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as token ids and images: n positions."""

    images: tuple[Any, ...]  # pictures, or videos
    tokens: Int32[np.ndarray, " n"]  # 0 where an image stands
    # the row of each position in the embeddings of the prompt's images; -1 where a text stands
    image_row: Int32[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.tokens)


def encode_prompt(pieces: Sequence[Any], processor: Processor, image_tokens: int) -> EncodedPrompt:
    """Encodes a list of texts (str) and images or videos (anything else).

    An image or a video takes `image_tokens` positions. Each text is encoded by itself, as it is: if
    the vocabulary marks words by the space in front, a piece has to bring that space.

    Raises:
      ValueError: `pieces` is not a list or tuple, is empty, or ends in a space. The message is the
        rest of a sentence that begins with the prompt's name.
    """
    try:
        pieces = as_images(pieces)
    except ValueError:
        raise ValueError(
            f"is a {type(pieces).__name__}, expected a list of images and str"
        ) from None
    images = []
    tokens = []
    image_row = []
    for piece in pieces:
        if isinstance(piece, str):
            ids = processor.tokenizer.encode(piece) if piece else []
            tokens += ids
            image_row += [-1] * len(ids)
        else:
            tokens += [0] * image_tokens
            image_row += range(len(images) * image_tokens, (len(images) + 1) * image_tokens)
            images.append(piece)
    if not tokens:
        raise ValueError("is empty, expected an image or a text")
    last = next(piece for piece in reversed(pieces) if not isinstance(piece, str) or piece)
    if isinstance(last, str) and last[-1] == " ":
        raise ValueError(
            f"ends in a space, {last[-40:]!r}, expected none: a model learns a word with the space "
            "before it, and rarely sees a text go on after a space"
        )
    return EncodedPrompt(tuple(images), np.array(tokens, np.int32), np.array(image_row, np.int32))


def prompt_room(config: ModelConfig, max_new_tokens: int | None) -> int:
    """Returns the largest number of positions of a prompt.

    Raises:
      ValueError: the model has no image prefix, or the new tokens leave no room for a prompt.
    """
    if not config.text.has_prefix:
        raise ValueError(
            f"DecoderConfig.cross_attn_every is {config.text.cross_attn_every}, expected 0: only a "
            "model with an image prefix reads prompts of images and texts"
        )
    room = config.text.max_length - (max_new_tokens or 1)
    if room < 1:
        raise ValueError(
            f"GenerateConfig.max_new_tokens is {max_new_tokens}, expected fewer than "
            f"DecoderConfig.max_length {config.text.max_length}: the prompt needs positions, too"
        )
    return room


def require_room(images: int, length: int, room: int, config: ModelConfig) -> None:
    """Checks that a prompt fits into `room` positions.

    Args:
      images: the number of its images.
      length: the number of its positions, including the positions of its images.

    Raises:
      ValueError: it does not fit. The message is the rest of a sentence that begins with the
        prompt's name.
    """
    each = config.num_prefix_tokens
    most = config.text.max_length
    context = f"DecoderConfig.max_length {most} less {most - room} for the text"
    if images * each > room:
        raise ValueError(
            f"has {images} images of {each} tokens each, expected at most {room // each}: {context}"
        )
    if length > room:
        raise ValueError(
            f"has {length} tokens, its {images} images included, expected at most {room}: {context}"
        )


def padded_size(n: int) -> int:
    """Returns the size that n is padded to.

    There are few sizes: four between one power of two and the next.
    """
    if not n:
        return 0
    step = max(1, (1 << (n - 1).bit_length()) // 8)
    return -(-n // step) * step


def prompt_batch(
    prompts: Sequence[EncodedPrompt], size: int, image_shape: tuple[int, ...]
) -> tuple[
    UInt8[np.ndarray, "B M *T height width 3"],
    Int32[np.ndarray, "B P"],
    Int32[np.ndarray, "B P"],
    Bool[np.ndarray, "B P"],
]:
    """Makes a batch of prompts for `generate_interleaved`.

    It is image, tokens, image_row, valid.

    P is `size`; pads stand in front. M is the largest number of images in a prompt, padded to one
    of few sizes; images that a prompt does not have are black. `image_shape` is (height, width, 3),
    of videos (T, height, width, 3).
    """
    count = padded_size(max(len(prompt.images) for prompt in prompts))
    image = np.zeros((len(prompts), count, *image_shape), np.uint8)
    tokens = np.zeros((len(prompts), size), np.int32)
    image_row = np.full((len(prompts), size), -1, np.int32)
    for row, prompt in enumerate(prompts):
        if prompt.images:
            image[row, : len(prompt.images)] = prompt.images
        tokens[row, size - len(prompt) :] = prompt.tokens
        image_row[row, size - len(prompt) :] = prompt.image_row
    valid = np.arange(size) >= size - np.array([len(prompt) for prompt in prompts])[:, None]
    return image, tokens, image_row, valid


def interleave(
    model: MaMMUT,
    image: UInt8[Array, "B M *T height width 3"],
    tokens: Int[Array, "B P"],
    image_row: Int[Array, "B P"],
) -> Float[Array, "B P D"]:
    """Computes the embeddings of prompts, float[B, P, D].

    Args:
      image: the M images or videos of each prompt.
      tokens: the token at each position that is not an image's.
      image_row: the row of each position in the embeddings of the prompt's images, one image after
        the other; -1 for a token.
    """
    text = model.decoder.token_embed(tokens)
    if not image.shape[1]:
        return text
    seen = model.image_tokens(image.reshape(-1, *image.shape[2:])).tokens
    seen = seen.reshape(image.shape[0], -1, seen.shape[-1])
    # Row by row, so that no row leaves its device on a mesh.
    seen = jnp.take_along_axis(seen, jnp.maximum(image_row, 0)[..., None], axis=1)
    return jnp.where(image_row[..., None] >= 0, seen, text)


def generate_interleaved(
    model: MaMMUT,
    image: UInt8[Array, "B M *T height width 3"],
    tokens: Int[Array, "B P"],
    image_row: Int[Array, "B P"],
    valid: Bool[Array, "B P"],
    config: GenerateConfig = GenerateConfig(),
    *,
    bos_id: int,
    eos_id: int,
    vocab_size: int | None = None,
    keys: Key[Array, "B"] | None = None,
) -> Generation:
    """Continues the prompts of `prompt_batch`. A pure function, as `generate` is.

    The tokens of the result begin with the start token, which no prompt embeds.
    """
    prefix = interleave(model, image, tokens, image_row)
    start = jnp.full((tokens.shape[0], START_LENGTH), bos_id, jnp.int32)
    settings = {"eos_id": eos_id, "prefix_valid": valid, "vocab_size": vocab_size, "keys": keys}
    return generate_after(model, prefix, start, jnp.ones(start.shape, bool), config, **settings)


@functools.partial(
    jax.jit, static_argnames=("graphdef", "config", "bos_id", "eos_id", "vocab_size")
)
def _generate(graphdef, params, batch, config, *, keys, **ids) -> Generation:
    return generate_interleaved(nnx.merge(graphdef, params), *batch, config, keys=keys, **ids)


def generate_prompts(
    model: MaMMUT,
    processor: Processor,
    prompts: Sequence[Sequence[Any]],
    config: GenerateConfig = GenerateConfig(),
    *,
    batch_size: int = 32,
    seed: int = 0,
) -> list[Text]:
    """Generates the best text after each prompt of images and texts.

    A str is a text; an image is anything else that `processor` reads: an array, a PIL image, a
    `pathlib.Path`, bytes; or a video, which `Processor.__call__` tells from a picture. A prompt may
    have any number of each in any order. See `encode_prompt`; `generate_text` is for one image and
    one text.

    Prompts of one size run together. Set `config.max_new_tokens`: prompts are then padded to few
    sizes, so that few programs are compiled. If it is None they are not padded, since pads would
    take room from the text.

    Args:
      prompts: lists of images and str; they are not changed.
      batch_size: prompts at a time.
      seed: the seed of sampling. A text depends on it and on the prompt's position in the list, not
        on the batch.

    Raises:
      ValueError: the model sees images by cross-attention; a prompt is not a list, is empty, ends
        in a space, has videos beside pictures or that the model does not read, or is longer than
        `DecoderConfig.max_length` less `config.max_new_tokens`; an image cannot be read;
        `processor` is not the model's; or the model's logits are not numbers.

    Example:
      >>> prompt = [cat, "Q: what is it? A: a cat", dog, "Q: what is it? A:"]
      >>> config = mammut.GenerateConfig(max_new_tokens=10)
      >>> mammut.generate_prompts(model, processor, [prompt], config)[0].text
      'a dog'
    """
    batch_size, seed = checked_numbers(config, batch_size, seed)
    require_same_vocabulary(model, processor)
    processor = processor.for_model(model.config)
    room = prompt_room(model.config, config.max_new_tokens)

    encoded = _encode_all(prompts, model.config, processor, room)
    by_shape: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for number, prompt in enumerate(encoded):
        size = len(prompt)
        if config.max_new_tokens is not None:
            size = min(padded_size(size), room)
        shape = size, _image_shape(prompt, processor)
        by_shape.setdefault(shape, []).append(number)

    graphdef, params = nnx.split(model)
    ids = {
        "bos_id": processor.bos_id,
        "eos_id": processor.eos_id,
        "vocab_size": processor.vocab_size,
    }

    def generated(
        size: int, image_shape: tuple[int, ...], numbers: list[int]
    ) -> Iterator[GeneratedRow]:
        def run(rows: list[Row]) -> Generation:
            batch = prompt_batch([row.prompt for row in rows], size, image_shape)
            keys = row_keys(rows, config, seed)
            return _generate(graphdef, params, batch, config, keys=keys, **ids)

        prompts = ((number, _with_pixels(encoded[number], processor)) for number in numbers)
        rows = (Row(prompt, START_LENGTH, n, f"prompt {n}") for n, prompt in prompts)
        own_batch_size = min(batch_size, padded_size(len(numbers)))
        return generate_rows(rows, run, processor, batch_size=own_batch_size)

    texts: dict[int, Text] = {}
    for shape, numbers in by_shape.items():
        for number, row in zip(numbers, generated(*shape, numbers), strict=True):
            texts[number] = text_of(row)
    return [texts[number] for number in range(len(encoded))]


def _encode_all(
    prompts: Sequence[Sequence[Any]], config: ModelConfig, processor: Processor, room: int
) -> list[EncodedPrompt]:
    """Encodes prompts.

    An error names the prompt by its position in the list.
    """
    encoded = []
    for number, pieces in enumerate(as_images(prompts, "prompts")):
        try:
            prompt = encode_prompt(pieces, processor, config.num_prefix_tokens)
            require_room(len(prompt.images), len(prompt), room, config)
            _require_videos(prompt, config, processor)
        except ValueError as error:
            raise ValueError(f"prompt {number} {error}") from error
        encoded.append(prompt)
    return encoded


def _require_videos(prompt: EncodedPrompt, config: ModelConfig, processor: Processor) -> None:
    """Checks that the model reads a prompt's videos, if it has any.

    Raises:
      ValueError: it does not, or there are pictures beside them. The message is the rest of a
        sentence that begins with the prompt's name.
    """
    moving = [processor.reads_video(image) for image in prompt.images]
    if not any(moving):
        return
    if not all(moving):
        raise ValueError(
            f"has {sum(moving)} videos among its {len(moving)} images, expected videos alone or "
            "pictures alone"
        )
    frames = _image_shape(prompt, processor)[0]
    require_video(config, frames, Augment(), "has an image that")


def _image_shape(prompt: EncodedPrompt, processor: Processor) -> tuple[int, ...]:
    """The shape of each image of a prompt: (height, width, 3), of a video (T, height, width, 3)."""
    size = processor.image.image_size
    if prompt.images and processor.reads_video(prompt.images[0]):
        return (processor.video_transform.frames, size, size, 3)
    return (size, size, 3)


def _with_pixels(prompt: EncodedPrompt, processor: Processor) -> EncodedPrompt:
    images = processor(images=prompt.images)["image"]
    return dataclasses.replace(prompt, images=tuple(images))
