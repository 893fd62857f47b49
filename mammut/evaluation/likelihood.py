"""The likelihood of many texts, given images, in batches of one shape."""

from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from mammut.core.typing import Array
from mammut.evaluation.predictor import Predictor
from mammut.generation.likelihood import text_logprob
from mammut.models.mammut import MaMMUT


def image_tokens(
    predictor: Predictor, params: Any, image: UInt8[np.ndarray, "B *T height width 3"]
) -> Any:
    """Computes the image tokens [B, P, D] of a batch.

    They stay on the devices that computed them.
    """
    return predictor.run_sharded(_image_tokens, params, image)


def black_image_tokens(predictor: Predictor, params: Any) -> Any:
    """Computes the image tokens [B, P, D] of black images.

    They give the model's prior over texts.
    """
    black = np.zeros((predictor.batch_size, *predictor.image_shape), np.uint8)
    return image_tokens(predictor, params, black)


def pair_logprobs(
    predictor: Predictor,
    params: Any,
    tokens_of_images: Any,
    rows: np.ndarray,
    encoded: tuple[np.ndarray, np.ndarray],
    texts: np.ndarray,
) -> Float[np.ndarray, " N"]:
    """Computes log P(text | image) of N pairs, float[N].

    Args:
      tokens_of_images: the result of `image_tokens`.
      rows: int[N], the row in `tokens_of_images` of each pair's image.
      encoded: tokens and text_valid of all texts.
      texts: int[N], the row in `encoded` of each pair's text.
    """
    rows = rows.astype(np.int32)
    logprobs = []
    # One batch of pairs at a time: the tokens of all pairs could fill the memory.
    for start in range(0, len(texts), predictor.batch_size):
        own = slice(start, start + predictor.batch_size)
        tokens, text_valid = (array[texts[own]] for array in encoded)
        arrays = (rows[own], tokens, text_valid)
        batch = predictor.run_rows(text_logprob, params, *arrays, shared=(tokens_of_images,))
        logprobs.append(batch)
    return np.concatenate(logprobs)


def _image_tokens(
    model: MaMMUT, image: UInt8[Array, "B *T height width 3"]
) -> Float[Array, "B P D"]:
    return model.image_tokens(image).tokens
