"""Crops of a learned table of positions."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Float, Key

from mammut.core.typing import Array

# Cropped positional embedding (RO-ViT, section 3.2): the table is enlarged to _CROP_RESOLUTION
# positions a side, then cropped to a box of a random area and aspect within these bounds.
_CROP_RESOLUTION = 64
_CROP_AREA = (0.1, 1.0)
_CROP_ASPECT = (0.5, 2.0)


def crop_pos_embed(
    key: Key[Array, ""], pos_embed: Float[Array, "down across D"], batch: int
) -> Float[Array, "B down across D"]:
    """Draws a crop of the position table for each image.

    Returns float[B, down, across, D].

    Cropped positional embedding (RO-ViT, arXiv 2305.07011, section 3.2; MaMMUT's paper uses it in
    the last 100K steps): the table is enlarged bilinearly, cropped to a random box and sampled back
    to its own size, so that the image has the positions of a region of a larger one. All three
    steps are linear and separable: one small matrix for each axis.
    """
    area_key, aspect_key, top_key, left_key = jax.random.split(key, 4)
    area = jax.random.uniform(area_key, (batch,), minval=_CROP_AREA[0], maxval=_CROP_AREA[1])
    low, high = (math.log(aspect) for aspect in _CROP_ASPECT)
    aspect = jnp.exp(jax.random.uniform(aspect_key, (batch,), minval=low, maxval=high))
    height = jnp.minimum(jnp.sqrt(area / aspect), 1)
    width = jnp.minimum(jnp.sqrt(area * aspect), 1)
    top = jax.random.uniform(top_key, (batch,)) * (1 - height)
    left = jax.random.uniform(left_key, (batch,)) * (1 - width)
    rows = _crop_matrix(top, height, pos_embed.shape[0]).astype(pos_embed.dtype)
    columns = _crop_matrix(left, width, pos_embed.shape[1]).astype(pos_embed.dtype)
    return jnp.einsum("bIi,bJj,ijD->bIJD", rows, columns, pos_embed)


def _crop_matrix(
    start: Float[Array, "B"], extent: Float[Array, "B"], size: int
) -> Float[Array, "B S S"]:
    """Makes matrices that enlarge an axis and sample its crop.

    Returns float[B, S, S].

    The axis has `size` positions and goes from 0 to 1, the crop from `start` to `start + extent`.
    As many positions are sampled from the crop, evenly.
    """
    centres = start[:, None] + extent[:, None] * (jnp.arange(size) + 0.5) / size
    crop = _bilinear(centres, _CROP_RESOLUTION)
    enlarge = _bilinear((jnp.arange(_CROP_RESOLUTION) + 0.5)[None] / _CROP_RESOLUTION, size)[0]
    return crop @ enlarge


def _bilinear(points: Float[Array, "B Q"], size: int) -> Float[Array, "B Q S"]:
    """Computes bilinear weights of cell centres at `points`, float[B, Q, S].

    They are the centres of `size` equal cells from 0 to 1. Beyond the outermost centres the value
    of the nearest one holds.
    """
    position = jnp.clip(points * size - 0.5, 0, size - 1)
    return jnp.maximum(0, 1 - jnp.abs(position[..., None] - jnp.arange(size)))
