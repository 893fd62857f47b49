"""The image encoder: a ViT with learned positions and no class token (paper, section 3.1)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Float, Key, UInt8

from mammut.config import ModelConfig
from mammut.layers import Dtypes, Layer, LayerNorm, Linear, param, scan, stack
from mammut.sharding import constrain
from mammut.typing import Array

# Cropped positional embedding (RO-ViT, section 3.2): the table is enlarged to so many positions a side, then cropped to
# a box of this area and aspect.
_CROP_RESOLUTION = 64
_CROP_AREA = (0.1, 1.0)
_CROP_ASPECT = (0.5, 2.0)


@struct.dataclass
class EncoderOutput:
    """What the encoder says of an image: every patch, their mean, and how the patches lie."""

    tokens: jax.Array  # float[B, P, D], row by row
    pooled: jax.Array  # float32[B, D], the mean over P
    grid: tuple[int, int] = struct.field(pytree_node=False)  # P = down * across


class ViT(nnx.Module):
    """Images to image tokens. Pixels are normalised here, on the device."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtypes: Dtypes):
        vision = config.vision
        self.config, self.remat, self.unroll, self.dtype = vision, config.remat, config.unroll, dtypes.compute
        self.patch_embed = Linear(
            {"patch": vision.patch_size**2 * 3}, {"embed": vision.width}, rngs=rngs, dtypes=dtypes
        )
        positions = jax.random.normal(rngs.params(), (*vision.grid, vision.width)) / math.sqrt(vision.width)
        self.pos_embed = param(positions.astype(dtypes.param), None, None, "embed")
        self.layers = stack(lambda r: Layer(vision, rngs=r, dtypes=dtypes), vision.depth, rngs=rngs)
        self.norm = LayerNorm(vision.width, vision.norm_eps, dtypes=dtypes)

    def __call__(
        self,
        image: UInt8[Array, "B height width 3"] | Float[Array, "B height width 3"],
        crop_key: Key[Array, ""] | None = None,
    ) -> EncoderOutput:
        """Encodes images of `image_size`.

        Args:
          image: uint8[B, height, width, 3] RGB, normalised here; or float, taken as normalised already.
          crop_key: with it, and with `cropped_pos_embed`, each image sees a random crop of the position table.

        Raises:
          ValueError: the images are not of `VisionConfig.image_size`.
        """
        size = self.config.image_size
        if image.shape[1:] != (size, size, 3):
            raise ValueError(f"images are {image.shape[1:]}, expected {(size, size, 3)} from VisionConfig.image_size")
        if image.dtype == jnp.uint8:
            mean, std = jnp.array(self.config.image_mean), jnp.array(self.config.image_std)
            image = (image.astype(jnp.float32) / 255 - mean) / std
        x = self.patch_embed(patchify(image.astype(self.dtype), self.config.patch_size))

        pos_embed = constrain(self.pos_embed[...].astype(self.dtype), None, None, None)
        if self.config.cropped_pos_embed and crop_key is not None:
            pos_embed = crop_pos_embed(crop_key, pos_embed, image.shape[0])
        x = x + pos_embed.reshape(-1, *x.shape[1:])
        x = constrain(x, "batch", "patch", "embed")

        x = scan(lambda x, layer: layer(x), x, self.layers, remat=self.remat, unroll=self.unroll)
        tokens = self.norm(x)
        return EncoderOutput(tokens, tokens.mean(1, dtype=jnp.float32), self.config.grid)


def patchify(image: Float[Array, "B height width 3"], patch_size: int) -> Float[Array, "B P F"]:
    """Cuts images into flattened patches float[B, P, patch_size * patch_size * 3], row by row."""
    batch, height, width, channels = image.shape
    down, across = height // patch_size, width // patch_size
    x = image.reshape(batch, down, patch_size, across, patch_size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, down * across, patch_size * patch_size * channels)


def crop_pos_embed(
    key: Key[Array, ""], pos_embed: Float[Array, "down across D"], batch: int
) -> Float[Array, "B down across D"]:
    """A random crop of the position table for each of `batch` images, float[B, down, across, D].

    Cropped positional embedding (RO-ViT, arXiv 2305.07011, section 3.2; used by the paper for a last 100K steps): the
    table is enlarged bilinearly, cropped to a random box and sampled back to its own size, so that the image passes for
    a region of a larger one. All three steps are linear and separable: one small matrix for each axis.
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


def _crop_matrix(start: Float[Array, "B"], extent: Float[Array, "B"], size: int) -> Float[Array, "B S S"]:
    """Enlarges `size` positions, then samples as many evenly from [start, start + extent] of 0..1: float[B, S, S]."""
    centres = start[:, None] + extent[:, None] * (jnp.arange(size) + 0.5) / size
    crop = _bilinear(centres, _CROP_RESOLUTION)
    enlarge = _bilinear((jnp.arange(_CROP_RESOLUTION) + 0.5)[None] / _CROP_RESOLUTION, size)[0]
    return crop @ enlarge


def _bilinear(points: Float[Array, "B Q"], size: int) -> Float[Array, "B Q S"]:
    """The weights of `size` cell centres at `points` in 0..1; beyond the outermost centres the edge is held."""
    position = jnp.clip(points * size - 0.5, 0, size - 1)
    return jnp.maximum(0, 1 - jnp.abs(position[..., None] - jnp.arange(size)))
