"""The image encoder: a ViT with learned positions; as in the paper (section 3.1) without a class token, or with one."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Key, UInt8

from mammut.core.fields import require, require_at_most, require_positive, require_share
from mammut.core.sharding import constrain
from mammut.core.typing import Array
from mammut.models.compute import Dtypes, scan, stack
from mammut.models.image_encoder import EncoderOutput, normalised, require_pixels
from mammut.models.layers import LayerConfig, Linear, make_norm, param
from mammut.models.transformer import MLP, Attention, Layer

# Cropped positional embedding (RO-ViT, section 3.2): the table is enlarged to so many positions a
# side, then cropped to a box of this area and aspect.
_CROP_RESOLUTION = 64
_CROP_AREA = (0.1, 1.0)
_CROP_ASPECT = (0.5, 2.0)
# Of the key of an image's crop: `crop_pos_embed` splits it in four, and a split's i-th key is what
# `fold_in` i gives.
_DROP_STREAM = 4


@dataclasses.dataclass(frozen=True)
class VisionConfig(LayerConfig):
    """The ViT image encoder: patches, learned positions, pre-norm blocks; by default no class token."""

    image_size: int = 224  # pixels; images are square
    patch_size: int = 16  # pixels
    patch_bias: bool = True
    class_token: bool = False  # a learned token before the patches
    input_norm: bool = False  # a norm before the first layer
    # What an image is represented by: the mean of its patches, of all tokens, the class token, the
    # first of `pool_queries` learned queries that attend to all tokens (CoCa; the others go to the
    # decoder in place of the patches), or one such query with an MLP (the MAP head of SigLIP).
    pooling: Literal["mean", "mean_all", "class", "queries", "map"] = "mean"
    pool_queries: int = 256  # of pooling "queries"
    pool_heads: int = 8  # of pooling "queries"
    # the last norm is of the pooled image alone; the decoder sees tokens without
    norm_after_pooling: bool = False
    # train with a random crop of the position table for each image (RO-ViT)
    cropped_pos_embed: bool = False
    # in training, this share of an image's patches is left out at random (FLIP)
    patch_drop: float = 0.0
    # Images of this size are taken too, with the positions resampled: those of
    # `TrainConfig.low_image_steps`.
    low_image_size: int | None = None
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of pixels scaled to 0..1
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "depth", "image_size", "patch_size", "pool_queries", "pool_heads")
        require_at_most(self, {"image_size": 2**14, "pool_queries": 2**14})
        require(
            self.image_size % self.patch_size == 0,
            f"VisionConfig.image_size {self.image_size} is not a multiple of patch_size {self.patch_size}",
        )
        low = self.low_image_size
        require(
            low is None or (0 < low < self.image_size and low % self.patch_size == 0),
            f"VisionConfig.low_image_size is {low}, expected a multiple of patch_size {self.patch_size} below "
            f"image_size {self.image_size}",
        )
        require_share(self, "patch_drop")
        require_pixels(self)
        require(
            self.class_token or self.pooling != "class",
            "VisionConfig.pooling is 'class', which needs class_token True",
        )
        require(
            self.pooling != "queries" or self.pool_queries > 1,
            f"VisionConfig.pool_queries is {self.pool_queries}, expected at least 2: the first is not the decoder's",
        )
        require(
            self.pooling != "map" or not self.norm_after_pooling,
            "VisionConfig.norm_after_pooling is True, which does not go with pooling 'map'",
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_tokens(self) -> int:
        """Image tokens that the decoder attends to."""
        if self.pooling == "queries":
            return self.pool_queries - 1
        return self.grid[0] * self.grid[1] + (self.class_token and self.pooling == "mean_all")

    @property
    def summary(self) -> str:
        """In words, for reports and model cards."""
        return f"patches of {self.patch_size}; {self.depth} layers of width {self.width}, {self.num_heads} heads"


class QueryPool(nnx.Module):
    """Learned queries that attend to all tokens of an image (CoCa, arXiv 2205.01917, section 3.2), float[B, Q, E]."""

    def __init__(self, config: VisionConfig, width: int, *, rngs: nnx.Rngs, dtypes: Dtypes):
        pool = dataclasses.replace(config, width=width, num_heads=config.pool_heads)
        query = jax.random.normal(rngs.params(), (config.pool_queries, width))
        self.query = param(query.astype(dtypes.param), None, "shared")
        self.query_norm = make_norm(pool, dtypes=dtypes)
        self.token_norm = make_norm(config, dtypes=dtypes)
        self.attn = Attention(pool, rngs=rngs, dtypes=dtypes, kv_width=config.width)

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B Q E"]:
        query = self.query_norm(self.query[...].astype(x.dtype))
        query = jnp.broadcast_to(query, (x.shape[0], *query.shape))
        return self.attn(query, self.attn.keys_values(self.token_norm(x)))


class MapPool(nnx.Module):
    """A learned query that attends to all tokens of an image, then an MLP (arXiv 2106.04560, section 3.4)."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtypes: Dtypes):
        query = jax.random.normal(rngs.params(), (config.width,)) / math.sqrt(config.width)
        self.query = param(query.astype(dtypes.param), "embed")
        self.attn = Attention(config, rngs=rngs, dtypes=dtypes)
        self.mlp_norm = make_norm(config, dtypes=dtypes)
        self.mlp = MLP(config, rngs=rngs, dtypes=dtypes)

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B D"]:
        query = jnp.broadcast_to(self.query[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        pooled = self.attn(query, self.attn.keys_values(x))
        return (pooled + self.mlp(self.mlp_norm(pooled)))[:, 0]


class ViT(nnx.Module):
    """Images to image tokens. Pixels are normalised here, on the device."""

    def __init__(self, config: Any, *, rngs: nnx.Rngs, dtypes: Dtypes):
        vision = config.vision
        self.config, self.remat, self.unroll, self.dtype = (
            vision,
            config.remat,
            config.unroll,
            dtypes.compute,
        )
        self.patch_embed = Linear(
            {"patch": vision.patch_size**2 * 3},
            {"embed": vision.width},
            rngs=rngs,
            dtypes=dtypes,
            use_bias=vision.patch_bias,
        )
        positions = jax.random.normal(rngs.params(), (*vision.grid, vision.width)) / math.sqrt(
            vision.width
        )
        self.pos_embed = param(positions.astype(dtypes.param), None, None, "embed")
        fused = config.image_attention == "auto"
        self.layers = stack(
            lambda r: Layer(vision, rngs=r, dtypes=dtypes, fused=fused), vision.depth, rngs=rngs
        )
        # After the rest, so that these options leave the random weights of the rest as they are.

        def vector():
            values = jax.random.normal(rngs.params(), (vision.width,)) / math.sqrt(vision.width)
            return param(values.astype(dtypes.param), "embed")

        self.class_embed = vector() if vision.class_token else None
        self.class_pos_embed = vector() if vision.class_token else None
        self.input_norm = make_norm(vision, dtypes=dtypes) if vision.input_norm else None
        pools = {
            "queries": lambda: QueryPool(vision, config.vision_size, rngs=rngs, dtypes=dtypes),
            "map": lambda: MapPool(vision, rngs=rngs, dtypes=dtypes),
        }
        self.pool = pools.get(vision.pooling, lambda: None)()
        self.norm = make_norm(vision, dtypes=dtypes, width=config.vision_size)

    def __call__(
        self,
        image: UInt8[Array, "B height width 3"] | Float[Array, "B height width 3"],
        crop_key: Key[Array, ""] | None = None,
    ) -> EncoderOutput:
        """Encodes images of `image_size`, or of `low_image_size`.

        Smaller images have the position table resampled to their patches (RECLIP, arXiv 2304.06028;
        CLIPA-v2, arXiv 2306.15658: most of the training on small images, the end of it on whole
        ones): bilinear with antialiasing, so that a position is the average of those it covers. It
        is done here and not in the table, whose gradient is then the same map transposed: one table
        learns from both sizes, and the change of size needs no change of weights.

        Args:
          image: uint8[B, height, width, 3] RGB, normalised here; or float, taken as normalised
            already.
          crop_key: given in training. With `cropped_pos_embed` each image sees a random crop of the
            position table, with `patch_drop` a random subset of its patches.

        Raises:
          ValueError: the images are of another size.
        """
        vision = self.config
        x = self.patch_embed(
            patchify(normalised(image, vision).astype(self.dtype), vision.patch_size)
        )

        pos_embed = constrain(self.pos_embed[...].astype(self.dtype), None, None, None)
        grid = image.shape[1] // vision.patch_size, image.shape[2] // vision.patch_size
        if grid != vision.grid:
            pos_embed = jax.image.resize(
                pos_embed, (*grid, vision.width), "bilinear", antialias=True
            )
        if vision.cropped_pos_embed and crop_key is not None:
            pos_embed = crop_pos_embed(crop_key, pos_embed, image.shape[0])
        x = x + pos_embed.reshape(-1, *x.shape[1:])
        if vision.patch_drop and crop_key is not None:
            x, grid = (
                drop_patches(jax.random.fold_in(crop_key, _DROP_STREAM), x, vision.patch_drop),
                None,
            )
        if self.class_embed is not None:
            first = (self.class_embed[...] + self.class_pos_embed[...]).astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, x.shape[2])), x], axis=1)
        x = constrain(x, "batch", "patch", "embed")
        if self.input_norm is not None:
            x = self.input_norm(x)

        x = scan(lambda x, layer: layer(x), x, self.layers, remat=self.remat, unroll=self.unroll)
        return EncoderOutput(*self._pooled(x), grid)

    def _pooled(self, x: Float[Array, "B P D"]) -> tuple[jax.Array, jax.Array]:
        """The decoder's tokens, and one vector for the image in float32."""
        pooling, after = self.config.pooling, self.config.norm_after_pooling
        if pooling == "queries":
            x = self.norm(self.pool(x))
            return x[:, 1:], x[:, 0].astype(jnp.float32)
        x = x if after else self.norm(x)
        patches = x[:, 1:] if self.config.class_token else x
        tokens = x if pooling == "mean_all" else patches
        if pooling == "class":
            pooled = x[:, 0].astype(jnp.float32)
        elif pooling == "map":
            pooled = self.pool(x).astype(jnp.float32)
        else:
            pooled = tokens.mean(1, dtype=jnp.float32)
        return tokens, self.norm(pooled) if after else pooled


def patchify(image: Float[Array, "B height width 3"], patch_size: int) -> Float[Array, "B P F"]:
    """Cuts images into flattened patches float[B, P, patch_size * patch_size * 3], row by row."""
    batch, height, width, channels = image.shape
    down, across = height // patch_size, width // patch_size
    x = image.reshape(batch, down, patch_size, across, patch_size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(
        batch, down * across, patch_size * patch_size * channels
    )


def patches_kept(patches: int, patch_drop: float) -> int:
    """How many of the patches of an image `drop_patches` keeps: a whole number, at least one."""
    return max(1, round((1 - patch_drop) * patches))


def drop_patches(
    key: Key[Array, ""], x: Float[Array, "B P D"], patch_drop: float
) -> Float[Array, "B Q D"]:
    """A random subset of the patches of each image, float[B, Q, D] of Q = `patches_kept`, in their order.

    FLIP (arXiv 2212.00794, section 3): half of the patches make half of the image encoder's work,
    and of its memory.
    """
    x = constrain(x, "batch", "patch", "embed")
    shuffled = jnp.argsort(jax.random.uniform(key, x.shape[:2]), axis=1)
    kept = jnp.sort(shuffled[:, : patches_kept(x.shape[1], patch_drop)], axis=1)
    return jnp.take_along_axis(x, kept[..., None], axis=1)


def crop_pos_embed(
    key: Key[Array, ""], pos_embed: Float[Array, "down across D"], batch: int
) -> Float[Array, "B down across D"]:
    """A random crop of the position table for each of `batch` images, float[B, down, across, D].

    Cropped positional embedding (RO-ViT, arXiv 2305.07011, section 3.2; used by the paper for a
    last 100K steps): the table is enlarged bilinearly, cropped to a random box and sampled back to
    its own size, so that the image passes for a region of a larger one. All three steps are linear
    and separable: one small matrix for each axis.
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
    """Enlarges `size` positions, then samples as many evenly from [start, start + extent] of 0..1: float[B, S, S]."""
    centres = start[:, None] + extent[:, None] * (jnp.arange(size) + 0.5) / size
    crop = _bilinear(centres, _CROP_RESOLUTION)
    enlarge = _bilinear((jnp.arange(_CROP_RESOLUTION) + 0.5)[None] / _CROP_RESOLUTION, size)[0]
    return crop @ enlarge


def _bilinear(points: Float[Array, "B Q"], size: int) -> Float[Array, "B Q S"]:
    """The weights of `size` cell centres at `points` in 0..1; beyond the outermost centres the edge is held."""
    position = jnp.clip(points * size - 0.5, 0, size - 1)
    return jnp.maximum(0, 1 - jnp.abs(position[..., None] - jnp.arange(size)))
