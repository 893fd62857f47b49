"""The ViT image encoder, with learned positions.

It follows section 3.1 of the paper.
"""

import dataclasses
import functools
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Key

from mammut.core.fields import require, require_at_most, require_positive
from mammut.core.sharding import constrain
from mammut.core.typing import Array
from mammut.models.compute import Augment, ComputeConfig, Dtypes, scan, stack
from mammut.models.image_encoder import (
    EncoderOutput,
    Image,
    normalise,
    require_image_sizes,
    require_pixels,
)
from mammut.models.inputs import require_images
from mammut.models.layers import LayerConfig, Linear, Normal, make_norm, param
from mammut.models.positions import crop_pos_embed
from mammut.models.transformer import MLP, Attention, Layer
from mammut.models.video import VideoConfig, reads_tubes, require_video_sizes
from mammut.models.video_embed import VideoEmbed

# Stream of `Augment.key` that draws which patches to drop. `crop_pos_embed` splits the key into
# four: they are streams 0 to 3.
_DROP_STREAM = 4


@dataclasses.dataclass(frozen=True)
class VisionConfig(LayerConfig):
    """Configuration of a ViT image encoder.

    It has patches, learned positions and pre-norm layers; by default it has no class token.

    Example:
      >>> vision = VisionConfig(image_size=96, patch_size=8, width=384, num_heads=6, mlp_dim=1536)
      >>> vision.num_tokens
      144
    """

    NOUN: ClassVar[str] = "Image encoder"
    OF_WEIGHTS: ClassVar[tuple[str, ...]] = (
        *LayerConfig.OF_WEIGHTS,
        "patch_bias",
        "input_norm",
        "norm_after_pooling",
        "pool_heads",
        "cut_rest",
    )

    # Height and width of an image in pixels; images are square.
    image_size: int = 224
    # Height and width of a patch in pixels.
    patch_size: int = 16
    # Whether the image may be larger than its whole patches; the rest, below and on the right, is
    # cut off, as a convolution without padding does (SigLIP So400m/14 at 384 pixels).
    cut_rest: bool = False
    # Whether the patch projection has a bias.
    patch_bias: bool = True
    # Whether a learned token stands before the patches.
    class_token: bool = False
    # Whether a norm comes before the first layer.
    input_norm: bool = False
    # Vector that represents an image. mean: the mean of its patches. mean_all: the mean of all its
    # tokens. class: the class token. queries: the first of `pool_queries` learned queries that
    # attend to all tokens (CoCa); the others go to the decoder in place of the patches. map: one
    # such query with an MLP (SigLIP's head).
    pooling: Literal["mean", "mean_all", "class", "queries", "map"] = "mean"
    # Number of learned queries of pooling "queries".
    pool_queries: int = 256
    # Attention heads of pooling "queries".
    pool_heads: int = 8
    # Whether the last norm acts on the pooled vector only; the decoder then sees tokens without it.
    norm_after_pooling: bool = False
    # A second, smaller image size that the encoder takes, with its positions resampled, for
    # `TrainConfig.low_image_steps`. None: one size.
    low_image_size: int | None = None
    # Mean of each colour channel, of pixels scaled to 0..1; subtracted before the first layer.
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    # Standard deviation of each colour channel; pixels less their mean are divided by it.
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    # How videos are read. None: frame by frame, as an image model does. An option of `train.py` for
    # a field of it makes it one of mode "frames", where the recipe has None.
    video: VideoConfig | None = None

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "depth", "image_size", "patch_size", "pool_queries", "pool_heads")
        require_at_most(self, {"image_size": 2**14, "pool_queries": 2**14})
        named = f"patch_size {self.patch_size}"
        require_image_sizes(self, self.patch_size, named, cut_rest=self.cut_rest)
        require_pixels(self)
        require(
            self.class_token or self.pooling != "class",
            "VisionConfig.pooling is 'class', which needs class_token True",
        )
        require(
            self.pooling != "queries" or self.pool_queries > 1,
            f"VisionConfig.pool_queries is {self.pool_queries}, expected at least 2: the first is "
            "not the decoder's",
        )
        require(
            self.pooling != "map" or not self.norm_after_pooling,
            "VisionConfig.norm_after_pooling is True, which does not go with pooling 'map'",
        )
        if self.video is not None:
            require_video_sizes(self)

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
        with_class_token = self.class_token and self.pooling == "mean_all"
        return self.grid[0] * self.grid[1] + with_class_token

    @property
    def covered_size(self) -> int:
        """Height and width of the part of an image that patches cover, in pixels."""
        return self.grid[0] * self.patch_size

    @property
    def summary(self) -> str:
        """The encoder in words, for reports and model cards."""
        return (
            f"patches of {self.patch_size}; {self.depth} layers of width {self.width}, "
            f"{self.num_heads} heads"
        )


class QueryPool(nnx.Module):
    """Learned queries that attend to all tokens of an image.

    They return float[B, Q, E], as in CoCa (arXiv 2205.01917, section 3.2).
    """

    def __init__(self, config: VisionConfig, width: int, *, dtypes: Dtypes):
        pool = dataclasses.replace(config, width=width, num_heads=config.pool_heads)
        sizes = config.pool_queries, width
        self.query = param(Normal(1.0), sizes, dtypes.param, None, "shared")
        self.query_norm = make_norm(pool, dtypes=dtypes)
        self.token_norm = make_norm(config, dtypes=dtypes)
        self.attn = Attention(pool, dtypes=dtypes, kv_width=config.width)

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B Q E"]:
        query = self.query_norm(self.query[...].astype(x.dtype))
        query = jnp.broadcast_to(query, (x.shape[0], *query.shape))
        return self.attn(query, self.attn.keys_values(self.token_norm(x)))


class MapPool(nnx.Module):
    """A learned query that attends to all tokens, then an MLP.

    It returns float[B, D]. It is the head of SigLIP (arXiv 2106.04560, section 3.4).
    """

    def __init__(self, config: VisionConfig, *, dtypes: Dtypes):
        initializer = Normal(1 / math.sqrt(config.width))
        self.query = param(initializer, (config.width,), dtypes.param, "embed")
        self.attn = Attention(config, dtypes=dtypes)
        self.mlp_norm = make_norm(config, dtypes=dtypes)
        self.mlp = MLP(config, dtypes=dtypes)

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B D"]:
        query = jnp.broadcast_to(self.query[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        pooled = self.attn(query, self.attn.keys_values(x))
        return (pooled + self.mlp(self.mlp_norm(pooled)))[:, 0]


class ViT(nnx.Module):
    """A vision transformer: images to image tokens.

    Pixels are normalised here, on the device.

    Args:
      config: the architecture.
      compute: how it is computed.
      pooled_size: the size of the pooled vector, which with pooling "queries" may differ from the
        width; None: the width.
    """

    def __init__(
        self, config: VisionConfig, compute: ComputeConfig, *, pooled_size: int | None = None
    ):
        self.config = config
        self.compute = compute
        dtypes = compute.dtypes
        self.dtype = dtypes.compute
        pooled_size = pooled_size or config.width

        pixels = {"patch": config.patch_size**2 * 3}
        embed = {"embed": config.width}
        self.patch_embed = Linear(pixels, embed, dtypes=dtypes, use_bias=config.patch_bias)
        position = Normal(1 / math.sqrt(config.width))
        sizes = (*config.grid, config.width)
        self.pos_embed = param(position, sizes, dtypes.param, None, None, "embed")
        self.video_embed = VideoEmbed(config, dtypes=dtypes) if reads_tubes(config) else None
        if config.class_token:
            self.class_embed = param(position, (config.width,), dtypes.param, "embed")
            self.class_pos_embed = param(position, (config.width,), dtypes.param, "embed")
        else:
            self.class_embed = None
            self.class_pos_embed = None
        self.input_norm = make_norm(config, dtypes=dtypes) if config.input_norm else None

        fused = compute.image_attention == "auto"
        self.layers = stack(Layer(config, dtypes=dtypes, fused=fused), config.depth)

        if config.pooling == "queries":
            self.pool = QueryPool(config, pooled_size, dtypes=dtypes)
        elif config.pooling == "map":
            self.pool = MapPool(config, dtypes=dtypes)
        else:
            self.pool = None
        self.norm = make_norm(config, dtypes=dtypes, width=pooled_size)

    def __call__(self, image: Image, augment: Augment = Augment()) -> EncoderOutput:
        """Encodes images of `image_size`, or of `low_image_size`; in mode "tubes" videos, too.

        Args:
          image: uint8[B, height, width, 3] RGB, normalised here; or float, normalised already:
            (pixel / 255 - `image_mean`) / `image_std`. A video is [B, T, height, width, 3]; other
            modes than "tubes" of `VideoConfig.mode` take its frames as images.
          augment: the random draws of a training step: which patches to drop, a crop of the
            position table for each image.

        Raises:
          ValueError: the images have another size, or are videos that have to come as frames.
        """
        require_images(image, self.config)
        if self.video_embed is None:
            x, grid = self._image_patches(image, augment)
        else:
            x, grid = self._video_patches(image)

        if augment.patch_drop:
            drop_key = jax.random.fold_in(augment.key, _DROP_STREAM)
            x = drop_patches(drop_key, x, augment.patch_drop)
            grid = None
        if self.class_embed is not None:
            first = (self.class_embed[...] + self.class_pos_embed[...]).astype(self.dtype)
            first = jnp.broadcast_to(first, (x.shape[0], 1, x.shape[2]))
            x = jnp.concatenate([first, x], axis=1)
        x = constrain(x, "batch", "patch", "embed")
        if self.input_norm is not None:
            x = self.input_norm(x)

        def step(x: jax.Array, layer: Layer) -> jax.Array:
            return layer(x)

        compute = self.compute
        x = scan(step, x, self.layers, remat=compute.remat, unroll=compute.unroll)
        tokens, pooled = self._pooled(x)
        return EncoderOutput(tokens, pooled, grid)

    def _image_patches(
        self, image: Image, augment: Augment
    ) -> tuple[Float[Array, "B P D"], tuple[int, int]]:
        """Embeds the patches of images, with their positions; returns their grid, too.

        RECLIP (arXiv 2304.06028) and CLIPA-v2 (arXiv 2306.15658) train mostly on small images and
        at the end on whole ones. For small images the position table is resampled to their patches:
        bilinear with antialiasing, so that a position is the average of those that it covers. That
        happens here, the table itself keeps its size: one table learns from both image sizes, and
        no weights change when the size does.
        """
        config = self.config
        require(
            image.ndim == 4,
            f"image is {image.dtype}{list(image.shape)}, a video, expected its frames as images: "
            "VisionConfig.video has no tubes (`MaMMUT.encode_video` takes videos)",
        )
        patches = patchify(normalise(image, config).astype(self.dtype), config.patch_size)
        x = self.patch_embed(patches)

        pos_embed = self._position_table()
        grid = image.shape[1] // config.patch_size, image.shape[2] // config.patch_size
        if grid != config.grid:
            shape = (*grid, config.width)
            pos_embed = jax.image.resize(pos_embed, shape, "bilinear", antialias=True)
        if augment.crop_positions:
            pos_embed = crop_pos_embed(augment.key, pos_embed, image.shape[0])
        return x + pos_embed.reshape(-1, *x.shape[1:]), grid

    def _video_patches(self, video: Image) -> tuple[Float[Array, "B P D"], tuple[int, int] | None]:
        """Embeds patches and tubes of videos, with their positions; an image is one frame."""
        config = self.config
        if video.ndim == 4:
            video = video[:, None]
        frames = video.shape[1]
        cut = video[:, :: config.video.patch_stride]
        batch, count, *image = cut.shape
        pixels = normalise(cut.reshape(batch * count, *image), config).astype(self.dtype)
        patches = self.patch_embed(patchify(pixels, config.patch_size))
        patches = patches.reshape(batch, count * math.prod(config.grid), config.width)

        tubes = self.video_embed.tokens(video, functools.partial(normalise, config=config))
        x = jnp.concatenate([patches, *tubes], axis=1)
        x = x + self.video_embed.positions(self._position_table(), frames)
        return x, config.grid if frames == 1 else None

    def _position_table(self) -> Float[Array, "down across D"]:
        return constrain(self.pos_embed[...].astype(self.dtype), None, None, None)

    def _pooled(self, x: Float[Array, "B P D"]) -> tuple[jax.Array, jax.Array]:
        """Splits the last layer's output into tokens and one vector.

        The decoder reads the tokens. The vector is float32.
        """
        pooling = self.config.pooling
        if pooling == "queries":
            x = self.norm(self.pool(x))
            return x[:, 1:], x[:, 0].astype(jnp.float32)

        norm_after = self.config.norm_after_pooling
        if not norm_after:
            x = self.norm(x)
        tokens = x
        if self.config.class_token and pooling != "mean_all":
            tokens = x[:, 1:]

        if pooling == "class":
            pooled = x[:, 0].astype(jnp.float32)
        elif pooling == "map":
            pooled = self.pool(x).astype(jnp.float32)
        else:
            pooled = tokens.mean(1, dtype=jnp.float32)
        if norm_after:
            pooled = self.norm(pooled)
        return tokens, pooled


def patchify(image: Float[Array, "B height width 3"], patch_size: int) -> Float[Array, "B P F"]:
    """Cuts images into patches, row by row.

    What is left over below and on the right belongs to no patch. Returns
    float[B, P, patch_size * patch_size * 3].
    """
    batch, height, width, channels = image.shape
    down = height // patch_size
    across = width // patch_size
    x = image[:, : down * patch_size, : across * patch_size]
    x = x.reshape(batch, down, patch_size, across, patch_size, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, down * across, patch_size * patch_size * channels)


def patches_kept(patches: int, patch_drop: float) -> int:
    """Counts the patches of an image that `drop_patches` keeps: at least one."""
    return max(1, round((1 - patch_drop) * patches))


def drop_patches(
    key: Key[Array, ""], x: Float[Array, "B P D"], patch_drop: float
) -> Float[Array, "B Q D"]:
    """Keeps a random subset of each image's patches, float[B, Q, D].

    They stay in their order. Q is what `patches_kept` counts. FLIP (arXiv 2212.00794, section 3):
    with half of the patches the image encoder has half of the work, and needs half of the memory.
    """
    x = constrain(x, "batch", "patch", "embed")
    shuffled = jnp.argsort(jax.random.uniform(key, x.shape[:2]), axis=1)
    kept = jnp.sort(shuffled[:, : patches_kept(x.shape[1], patch_drop)], axis=1)
    return jnp.take_along_axis(x, kept[..., None], axis=1)
