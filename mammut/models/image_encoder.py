"""The contract of image encoders: pixels in; tokens and a vector out."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Float, UInt8

from mammut.core.fields import require
from mammut.core.typing import Array

Image = UInt8[Array, "B height width 3"] | Float[Array, "B height width 3"]


def require_pixels(config: Any) -> None:
    """Raises ValueError where an encoder's `image_mean` or `image_std` are no usable numbers."""
    for name, low, expected in (("image_mean", -math.inf, "finite"), ("image_std", 0, "positive")):
        values = getattr(config, name)
        require(
            all(low < value < math.inf for value in values),
            f"{type(config).__name__}.{name} is {values}, expected {expected} numbers",
        )


def require_image_sizes(config: Any, stride: int, named: str) -> None:
    """Raises ValueError where an encoder's image sizes are no multiples of `stride`.

    `named` is what the message calls the stride. `low_image_size` has to be the smaller size.
    """
    name = type(config).__name__
    size = config.image_size
    low = config.low_image_size
    require(size % stride == 0, f"{name}.image_size {size} is not a multiple of {named}")
    require(
        low is None or (0 < low < size and low % stride == 0),
        f"{name}.low_image_size is {low}, expected a multiple of {named} below image_size {size}",
    )


@struct.dataclass
class EncoderOutput:
    """Output of an image encoder: tokens, one vector, and the grid.

    Dv is the width of the encoder, E the size of the embedding. `MaMMUT.image_tokens` turns the
    output into an `EncodedImage`, in the decoder's terms.
    """

    # float[B, P, Dv]: the patches row by row, after the class token with pooling "mean_all" only.
    # With pooling "queries": float[B, P, E], what the learned queries of size E read.
    tokens: jax.Array
    # float32[B, Dv], or float32[B, E]: the whole image, pooled as in `VisionConfig.pooling`.
    pooled: jax.Array
    # Patches down and across; None where patches were dropped (`AugmentConfig.patch_drop`), which
    # are others in each image.
    grid: tuple[int, int] | None = struct.field(pytree_node=False)


@struct.dataclass
class EncodedImage:
    """An encoded image: its tokens and its unnormalised embedding.

    The decoder reads the tokens.
    """

    tokens: jax.Array  # float[B, P, D]: the tokens that the caption pass sees
    vector: jax.Array  # float32[B, E], of any length; `encode_image` gives unit vectors
    # Patches down and across; None where patches were dropped (`AugmentConfig.patch_drop`), which
    # are others in each image.
    grid: tuple[int, int] | None = struct.field(pytree_node=False)


def normalised(image: Image, config: Any) -> Float[Array, "B height width 3"]:
    """Normalises pixels for an image encoder.

    Float pixels are returned unchanged.

    Args:
      image: uint8[B, height, width, 3] RGB, or float, taken as normalised already.
      config: the encoder's `VisionConfig` or `ResNetConfig`.

    Raises:
      ValueError: the images have none of its sizes.
    """
    sizes = [size for size in (config.image_size, config.low_image_size) if size is not None]
    if image.shape[1:] not in [(size, size, 3) for size in sizes]:
        low = "" if len(sizes) == 1 else f" or {(sizes[1], sizes[1], 3)} from low_image_size"
        expected = f"{(sizes[0], sizes[0], 3)} from {type(config).__name__}.image_size{low}"
        raise ValueError(f"images are {image.shape[1:]}, expected {expected}")
    if image.dtype != jnp.uint8:
        return image
    scaled = image.astype(jnp.float32) / 255
    return (scaled - jnp.array(config.image_mean)) / jnp.array(config.image_std)
