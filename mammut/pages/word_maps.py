"""Attention maps of the image, for each word of a caption."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from mammut.data.processor import Processor
from mammut.data.tokenizer import Tokenizer
from mammut.models.mammut import MaMMUT

# The colour of full attention, laid over a grey picture.
_COLOUR = np.array((255, 96, 0), np.float32)


class WordMap(NamedTuple):
    """A word of a text, and its attention to the patches.

    It is the attention at the position where the model predicts the word.
    """

    word: str
    weights: np.ndarray  # float32[down, across] over the patches; they sum to 1


def word_maps(
    model: MaMMUT, processor: Processor, images: Sequence[Any], texts: Sequence[str]
) -> list[list[WordMap]]:
    """Maps the attention of every word of each text.

    A map is the cross-attention, averaged over layers, heads and tokens of the word.

    A token's weights are the weights of the position before it, which predicts it. The texts are
    encoded again, so words are spelled as the tokenizer decodes them; words beyond the processor's
    `max_length` have no map.

    Args:
      model: a model that attends to patches.
      processor: the model's processor.
      images: one for each text, anything that `processor` reads.
      texts: the model's text for each image.

    Raises:
      ValueError: an image cannot be read or is a video, there are not as many images as texts, or
        the decoder sees learned queries (`VisionConfig.pooling`) or tokens of the pooled image
        (`ModelConfig.prefix_tokens`) and no patches.
    """
    if len(images) != len(texts):
        raise ValueError(
            f"there are {len(images)} images for {len(texts)} texts, expected one each"
        )
    if model.config.vision.pooling == "queries":
        raise ValueError(
            "VisionConfig.pooling is 'queries': the decoder attends to those, expected patches"
        )
    if model.config.prefix_tokens is not None:
        raise ValueError(
            "ModelConfig.prefix_tokens are made of the pooled image: the decoder sees no patches"
        )
    if not texts:
        return []
    batch = processor(images=list(images), text=list(texts))
    if batch["image"].ndim == 5:
        raise ValueError("heat maps are of images, these are videos")
    graphdef, params = nnx.split(model)
    weights = np.asarray(
        _mean_weights(graphdef, params, batch["image"], batch["tokens"], batch["text_valid"])
    )
    grid = model.config.vision.grid
    # Without the class token, whose share is spread over the patches.
    weights = weights[..., -grid[0] * grid[1] :]
    weights = weights / weights.sum(-1, keepdims=True)
    maps = []
    for row, tokens, valid in zip(weights, batch["tokens"], batch["text_valid"]):
        ids = tokens[1 : valid.sum() - 1].tolist()
        words = split_words(processor.tokenizer, ids)
        maps.append(
            [WordMap(word, row[positions].mean(0).reshape(grid)) for word, positions in words]
        )
    return maps


@functools.partial(jax.jit, static_argnames="graphdef")
def _mean_weights(graphdef, params, image, tokens, text_valid) -> Float[jax.Array, "B L P"]:
    return nnx.merge(graphdef, params).cross_attention(image, tokens, text_valid).mean((0, 2))


def split_words(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Splits the decoded text of `ids` into words.

    Each word comes with the positions of its tokens in `ids`.

    A token that adds no text (the space before a word, the first bytes of a character) belongs to
    the word after it.
    """
    words: list[str] = []
    positions: list[list[int]] = []  # of each word
    waiting: list[int] = []  # positions whose word is not known yet
    for position in range(len(ids)):
        waiting.append(position)
        decoded = tokenizer.decode(ids[: position + 1]).split()
        if decoded == words:
            continue
        positions += [[] for _ in range(len(decoded) - len(positions))]
        positions[-1] += waiting
        words = decoded
        waiting = []
    if positions:
        positions[-1] += waiting
    return [(word, own) for word, own in zip(words, positions) if own]


def overlay(
    picture: UInt8[np.ndarray, "height width 3"],
    weights: Float[np.ndarray, "down across"],
    full: float,
    covered: float = 1.0,
) -> UInt8[np.ndarray, "height width 3"]:
    """Draws the picture in grey, with colour where the model looks.

    A patch has no colour at an even share, 1 / patches, or less, and full colour at the weight
    `full`. The map is enlarged smoothly to the picture's size, or to the share `covered` of its
    sides: a model may cut off a rest, below and on the right (`VisionConfig.cut_rest`).
    """
    from PIL import Image

    height, width = picture.shape[:2]
    even = 1 / weights.size
    strength = np.clip((weights - even) / max(full - even, 1e-9), 0, 1).astype(np.float32)
    down = round(height * covered)
    across = round(width * covered)
    enlarged = Image.fromarray(strength).resize((across, down), Image.Resampling.BICUBIC)
    alpha = np.zeros((height, width, 1), np.float32)
    alpha[:down, :across, 0] = 0.8 * np.clip(np.asarray(enlarged), 0, 1)
    # Neither black nor white, so that the colour stands out.
    grey = 70 + 0.6 * picture.mean(-1, keepdims=True)
    return np.round(grey * (1 - alpha) + _COLOUR * alpha).astype(np.uint8)
