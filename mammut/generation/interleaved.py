"""Prompts of images and texts in any order, for models with an image prefix (MAGMA, arXiv 2112.05253, section 3).

An image becomes the embeddings the decoder takes of it, a text those of its ids; all of them in
order, with neither a start nor an end between them, are the prefix of the text that is generated.
Prompts of a batch may have different lengths and numbers of images: pads stand in front of the
shorter ones, where nothing attends to them and no position is counted, so that a prompt's text does
not depend on its neighbours.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int, Int32, Key, UInt8

from mammut.core.typing import Array
from mammut.data.processor import Processor
from mammut.generation.search import GenerateConfig, Generation
from mammut.generation.text import Text, generate_after, require_same_vocabulary, texts_of
from mammut.models.mammut import MaMMUT, ModelConfig


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as ids and images: n positions."""

    images: tuple[Any, ...]
    tokens: Int32[np.ndarray, " n"]  # 0 where an image stands
    # in the embeddings of its images, one after the other; -1 where a text stands
    place: Int32[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.tokens)


def encode_prompt(pieces: Sequence[Any], processor: Processor, image_tokens: int) -> EncodedPrompt:
    """The prompt of `pieces`: each str is a text, anything else an image, which has `image_tokens` positions.

    Texts are encoded one by one as they are: where a vocabulary tells words by the space in front,
    so does a piece.

    Raises:
      ValueError: `pieces` is not a list or tuple; there is nothing in it; it ends in a space. The
        message goes on after the prompt's name.
    """
    if not isinstance(pieces, list | tuple):
        raise ValueError(f"is a {type(pieces).__name__}, expected a list of images and str")
    images, tokens, place = [], [], []
    for piece in pieces:
        if isinstance(piece, str):
            ids = processor.tokenizer.encode(piece) if piece else []
            tokens += ids
            place += [-1] * len(ids)
        else:
            tokens += [0] * image_tokens
            place += range(len(images) * image_tokens, (len(images) + 1) * image_tokens)
            images.append(piece)
    if not tokens:
        raise ValueError("is empty, expected an image or a text")
    last = next(piece for piece in reversed(pieces) if not isinstance(piece, str) or piece)
    if isinstance(last, str) and last[-1] == " ":
        raise ValueError(
            f"ends in a space, {last[-40:]!r}, expected none: the words a model learnt begin with their space, and "
            "after one it has to go on with what is rare"
        )
    return EncodedPrompt(tuple(images), np.array(tokens, np.int32), np.array(place, np.int32))


def prompt_room(config: ModelConfig, max_new_tokens: int | None) -> int:
    """The most positions of a prompt that leave room for a text.

    Raises:
      ValueError: the model has no image prefix, or there are none.
    """
    if config.conditioning != "prefix":
        raise ValueError(
            f"the model sees images by {config.conditioning!r} (ModelConfig.conditioning), prompts of images and texts "
            "need 'prefix'"
        )
    room = config.text.max_length - (max_new_tokens or 1)
    if room < 1:
        raise ValueError(
            f"GenerateConfig.max_new_tokens is {max_new_tokens}, expected fewer than DecoderConfig.max_length "
            f"{config.text.max_length}: a prompt has places, too"
        )
    return room


def padded_size(n: int) -> int:
    """At least n, of few sizes: four from one power of two to the next."""
    step = max(1, (1 << (n - 1).bit_length()) // 8) if n else 1
    return -(-n // step) * step


def prompt_batch(
    prompts: Sequence[EncodedPrompt], size: int, image_shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The arguments of `interleave` for B prompts, and `valid` bool[B, P]: P is `size`, pads in front.

    Their images are uint8[image_shape]; M is the most images of a prompt, or a few more. Absent
    ones are black.
    """
    count = padded_size(max(len(prompt.images) for prompt in prompts))
    image = np.zeros((len(prompts), count, *image_shape), np.uint8)
    tokens, place = (
        np.zeros((len(prompts), size), np.int32),
        np.full((len(prompts), size), -1, np.int32),
    )
    for row, prompt in enumerate(prompts):
        if prompt.images:
            image[row, : len(prompt.images)] = prompt.images
        tokens[row, size - len(prompt) :] = prompt.tokens
        place[row, size - len(prompt) :] = prompt.place
    valid = np.arange(size) >= size - np.array([len(prompt) for prompt in prompts])[:, None]
    return image, tokens, place, valid


def interleave(
    model: MaMMUT,
    image: UInt8[Array, "B M height width 3"],
    tokens: Int[Array, "B P"],
    place: Int[Array, "B P"],
) -> Float[Array, "B P D"]:
    """The embeddings of prompts, float[B, P, D]: `place` of a prompt's M images one after the other, -1 the token's."""
    text = model.decoder.token_embed(tokens)
    if not image.shape[1]:
        return text
    seen = model.image_tokens(image.reshape(-1, *image.shape[2:])).tokens
    seen = seen.reshape(image.shape[0], -1, seen.shape[-1])
    # Row by row, so that on a mesh no row leaves its device.
    seen = jnp.take_along_axis(seen, jnp.maximum(place, 0)[..., None], axis=1)
    return jnp.where(place[..., None] >= 0, seen, text)


def generate_interleaved(
    model: MaMMUT,
    image: UInt8[Array, "B M height width 3"],
    tokens: Int[Array, "B P"],
    place: Int[Array, "B P"],
    valid: Bool[Array, "B P"],
    config: GenerateConfig = GenerateConfig(),
    *,
    bos_id: int,
    eos_id: int,
    vocab_size: int | None = None,
    keys: Key[Array, "B"] | None = None,
) -> Generation:
    """Continues the prompts of `prompt_batch`. Pure, as `generate` is, whose tokens these are: the start token first.

    The start only has its column; no prompt embeds it.
    """
    prefix = interleave(model, image, tokens, place)
    start = jnp.full((tokens.shape[0], 1), bos_id, jnp.int32)
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
    """The best text after each prompt of images and texts: `[image, "Q: what? A: a cat", image, "Q: where? A:"]`.

    A str is a text; an image is anything else that `processor` reads: an array, a PIL image, a
    `pathlib.Path`, bytes. A prompt may have any number of each in any order. See `encode_prompt`;
    `generate_text` is for one image and one text.

    A prompt runs together with those of its size. Give `config.max_new_tokens`: it is padded to one
    of few sizes then, so that little is compiled; with None it is not, as pads would take of the
    room that the text has to the end.

    Args:
      prompts: left as they are.
      batch_size: of prompts at a time.
      seed: of sampling; a text depends on it and on the prompt's place in the list, not on the
        batch.

    Raises:
      ValueError: the model sees images by cross-attention; a prompt is no list, empty, ends in a
        space, or is longer than `DecoderConfig.max_length` less `config.max_new_tokens`; an image
        cannot be read; `processor` is not the model's; the model's logits are not numbers.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    room = prompt_room(model.config, config.max_new_tokens)
    require_same_vocabulary(model, processor)
    encoded = []
    for number, pieces in enumerate(prompts):
        try:
            encoded.append(encode_prompt(pieces, processor, model.config.num_prefix_tokens))
            require_room(len(encoded[-1].images), len(encoded[-1]), room, model.config)
        except ValueError as error:
            raise ValueError(f"prompt {number} {error}") from error
    by_size: dict[int, list[int]] = {}
    for number, prompt in enumerate(encoded):
        size = len(prompt) if config.max_new_tokens is None else min(padded_size(len(prompt)), room)
        by_size.setdefault(size, []).append(number)

    graphdef, params = nnx.split(model)
    ids = {
        "bos_id": processor.bos_id,
        "eos_id": processor.eos_id,
        "vocab_size": processor.vocab_size,
    }
    texts: dict[int, Text] = {}
    for size, numbers in by_size.items():
        rows = min(batch_size, padded_size(len(numbers)))
        for start in range(0, len(numbers), rows):
            own = numbers[start : start + rows]
            read = [_with_pixels(encoded[number], processor) for number in own]
            # Padding repeats the last row: it ends no later than the others.
            padding = rows - len(own)
            batch = prompt_batch(
                read + read[-1:] * padding, size, (processor.image.image_size,) * 2 + (3,)
            )
            keys = None
            if config.temperature > 0:
                places = np.array(own + own[-1:] * padding)
                keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), places)
            out = jax.device_get(_generate(graphdef, params, batch, config, keys=keys, **ids))
            found = texts_of(out, [1] * len(own), processor, [f"prompt {number}" for number in own])
            texts.update(zip(own, found, strict=True))
    return [texts[number] for number in range(len(encoded))]


def _with_pixels(prompt: EncodedPrompt, processor: Processor) -> EncodedPrompt:
    return dataclasses.replace(prompt, images=tuple(map(processor.image, prompt.images)))


def require_room(images: int, length: int, room: int, config: ModelConfig) -> None:
    """Refuses a prompt of `length` positions, `images` images among them, that does not fit into `room`.

    Raises:
      ValueError: it does not; the message goes on after the prompt's name.
    """
    each, most = config.num_prefix_tokens, config.text.max_length
    context = f"DecoderConfig.max_length {most} less {most - room} for the text"
    if images * each > room:
        raise ValueError(
            f"has {images} images of {each} tokens each, expected at most {room // each}: {context}"
        )
    if length > room:
        raise ValueError(
            f"has {length} tokens, its {images} images included, expected at most {room}: {context}"
        )
