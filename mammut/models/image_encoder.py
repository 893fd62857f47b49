"""The contract of image encoders: pixels in; tokens and a vector out."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Float, UInt8

from mammut.core.fields import require
from mammut.core.typing import Array
from mammut.models.inputs import require_images

Video = UInt8[Array, "B T height width 3"] | Float[Array, "B T height width 3"]
# Images, or videos where an image may stand.
Image = UInt8[Array, "B height width 3"] | Float[Array, "B height width 3"] | Video


def require_pixels(config: Any) -> None:
    """Raises ValueError where an encoder's `image_mean` or `image_std` are no usable numbers."""
    for name, low, expected in (("image_mean", -math.inf, "finite"), ("image_std", 0, "positive")):
        values = getattr(config, name)
        require(
            all(low < value < math.inf for value in values),
            f"{type(config).__name__}.{name} is {values}, expected {expected} numbers",
        )


def require_image_sizes(config: Any, stride: int, named: str, *, cut_rest: bool = False) -> None:
    """Raises ValueError where an encoder's image sizes are no multiples of `stride`.

    `named` is what the message calls the stride. `low_image_size` has to be the smaller size. With
    `cut_rest` the sizes are any that have room for a patch.
    """
    name = type(config).__name__
    size = config.image_size
    low = config.low_image_size
    if cut_rest:
        require(size >= stride, f"{name}.image_size {size} is smaller than {named}")
        require(
            low is None or stride <= low < size,
            f"{name}.low_image_size is {low}, expected {named} or more, below image_size {size}",
        )
        return
    hint = ""
    if hasattr(config, "cut_rest"):
        hint = f", and {name}.cut_rest, with which some published models cut the rest off, is False"
    require(size % stride == 0, f"{name}.image_size {size} is not a multiple of {named}{hint}")
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
    # Patches down and across. None where patches were dropped (`AugmentConfig.patch_drop`), which
    # are others in each image, and for a video: `video.token_centres` tells where its tokens lie.
    grid: tuple[int, int] | None = struct.field(pytree_node=False)


@struct.dataclass
class EncodedImage:
    """An encoded image: its tokens and its unnormalised embedding.

    The decoder reads the tokens.
    """

    tokens: jax.Array  # float[B, P, D]: the tokens that the caption pass sees
    vector: jax.Array  # float32[B, E], of any length; `encode_image` gives unit vectors
    # Patches down and across. None where patches were dropped (`AugmentConfig.patch_drop`), which
    # are others in each image, and for a video: `video.token_centres` tells where its tokens lie.
    grid: tuple[int, int] | None = struct.field(pytree_node=False)


def normalised(image: Image, config: Any) -> Float[Array, "*B height width 3"]:
    """Normalises pixels for an image encoder.

    Float pixels are returned unchanged.

    Args:
      image: uint8[B, height, width, 3] RGB; or float of that shape, normalised already as here:
        (pixel / 255 - `image_mean`) / `image_std`.
      config: the encoder's `VisionConfig` or `ResNetConfig`.

    Raises:
      ValueError: the images are none of its images (`mammut.models.inputs`).
    """
    require_images(image, config)
    return normalise(image, config)


def normalise(
    pixels: UInt8[Array, "*B 3"] | Float[Array, "*B 3"], config: Any
) -> Float[Array, "*B 3"]:
    """Normalises pixels that were checked; float pixels are returned unchanged."""
    if pixels.dtype != jnp.uint8:
        return pixels
    scaled = pixels.astype(jnp.float32) / 255
    return (scaled - jnp.array(config.image_mean)) / jnp.array(config.image_std)
