"""The other image encoder: CLIP's ResNets without their attention pool, and the norm-free ResNet.

Those of MAGMA (arXiv 2112.05253, section 3.1). Images and features are laid out [B, height, width,
channels], kernels [height, width, inputs, outputs]. The bottlenecks of a stage after its first have
the same shapes: they are stacked, as the layers of a transformer are.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Key, UInt8

from mammut.core.fields import require, require_at_most, require_choices, require_positive
from mammut.core.sharding import constrain
from mammut.core.typing import Array
from mammut.models.compute import Dtypes, Remat, keeping, recomputed, scan, stack
from mammut.models.image_encoder import EncoderOutput, normalised, require_pixels
from mammut.models.layers import param

_NORM_EPS = 1e-5
# Of the norm-free ResNet (arXiv 2101.08692): a bottleneck adds `_ALPHA` times what it computes;
# `_GAMMA` brings the output of a ReLU back to variance 1, sqrt(2 / (1 - 1 / pi)) as its authors
# measured it.
_ALPHA = 0.2
_GAMMA = 1.7139588594436646


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """A ResNet image encoder, four stages of bottlenecks; an image token is what its last stage says of 32 x 32 pixels.

    clip: that of CLIP (arXiv 2103.00020, section 2.4) without its attention pool: three
      convolutions first, averages
    in place of strides, batch norms that keep their stored statistics. nf: the norm-free ResNet
    (arXiv 2101.08692): standardised kernels, activations in front. The defaults are CLIP's RN50;
    RN50x16, that of MAGMA, has stem_width 96, stages (6, 8, 18, 8) and an image_size of 384.
    """

    kind: Literal["clip", "nf"] = "clip"
    # channels of the stem; those of the bottlenecks, and 2, 4 and 8 times as many in later stages
    stem_width: int = 64
    stages: tuple[int, int, int, int] = (3, 4, 6, 3)  # bottlenecks of each
    image_size: int = 224  # pixels; images are square
    # Images of this size are taken too: those of `TrainConfig.low_image_steps`.
    low_image_size: int | None = None
    # of pixels scaled to 0..1: CLIP's
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    # What a `VisionConfig` may say, and what holds of every ResNet.
    pooling: ClassVar[str] = "mean"
    norm_after_pooling: ClassVar[bool] = False
    class_token: ClassVar[bool] = False
    cropped_pos_embed: ClassVar[bool] = False
    patch_drop: ClassVar[float] = 0.0

    def __post_init__(self):
        require_choices(self)
        require_positive(self, "stem_width", "image_size")
        require_at_most(self, {"stem_width": 2**11, "image_size": 2**14})
        require(
            all(0 < depth <= 2**10 for depth in self.stages),
            f"ResNetConfig.stages is {self.stages}, expected numbers of bottlenecks, 1 to {2**10}",
        )
        require(
            self.kind != "clip" or self.stem_width % 2 == 0,
            f"ResNetConfig.stem_width is {self.stem_width}, expected an even number: the stem begins with half of it",
        )
        require(
            self.image_size % 32 == 0,
            f"ResNetConfig.image_size {self.image_size} is not a multiple of 32, its stride",
        )
        low = self.low_image_size
        require(
            low is None or (0 < low < self.image_size and low % 32 == 0),
            f"ResNetConfig.low_image_size is {low}, expected a multiple of 32 below image_size {self.image_size}",
        )
        require_pixels(self)

    @property
    def width(self) -> int:
        """The size of an image token: the channels of the last stage."""
        return 32 * self.stem_width

    @property
    def depth(self) -> int:
        """Bottlenecks of all stages."""
        return sum(self.stages)

    @property
    def grid(self) -> tuple[int, int]:
        """Image tokens down and across."""
        return self.image_size // 32, self.image_size // 32

    @property
    def num_tokens(self) -> int:
        """Image tokens that the decoder attends to."""
        return self.grid[0] * self.grid[1]

    @property
    def summary(self) -> str:
        """In words, for reports and model cards."""
        kind = {"clip": "CLIP's ResNet", "nf": "a norm-free ResNet"}[self.kind]
        stages = ", ".join(map(str, self.stages))
        return f"{kind}, stages of {stages} bottlenecks, stem of {self.stem_width}, tokens of {self.width} numbers"


def _kernel(size: int, inputs: int, outputs: int, *, rngs: nnx.Rngs, dtypes: Dtypes) -> nnx.Param:
    """A kernel [size, size, inputs, outputs] of variance 2 / fan-in: a ReLU halves what comes in."""
    stddev = math.sqrt(2 / (size * size * inputs))
    values = (
        stddev
        * jax.random.truncated_normal(rngs.params(), -2, 2, (size, size, inputs, outputs))
        / 0.87962566
    )
    return param(values.astype(dtypes.param), None, None, None, "embed")


def _vector(size: int, value: int, dtype: Any) -> nnx.Param:
    return param(jnp.full(size, value, dtype), "embed")


def _convolved(
    x: Float[Array, "B H W C"], kernel: Float[Array, "K K C E"], stride: int
) -> Float[Array, "B h w E"]:
    """A convolution with zeros around, so that stride 1 keeps the size."""
    around = kernel.shape[0] // 2, kernel.shape[0] // 2
    # Gathered whole where it is split: what is split is the batch.
    kernel = constrain(kernel.astype(x.dtype), None, None, None, None)
    y = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), (around, around), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return constrain(y, "batch", None, None, "embed")


def _halved(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """The averages of 2 x 2 pixels."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


class NormedConvolution(nnx.Module):
    """A convolution, then a batch norm with the statistics it came with.

    Those are never of the batch: in training, too, an image's tokens are its own, the same as at
    inference. Scale and bias are trained as any parameter; mean and variance are parameters only in
    that they are saved, and their gradient is zero. `last` starts with a scale of zero: a new
    bottleneck is the identity.
    """

    def __init__(
        self,
        size: int,
        inputs: int,
        outputs: int,
        *,
        rngs: nnx.Rngs,
        dtypes: Dtypes,
        last: bool = False,
    ):
        self.kernel = _kernel(size, inputs, outputs, rngs=rngs, dtypes=dtypes)
        self.scale = _vector(outputs, 0 if last else 1, dtypes.param)
        self.bias = _vector(outputs, 0, dtypes.param)
        self.mean, self.variance = (
            _vector(outputs, 0, jnp.float32),
            _vector(outputs, 1, jnp.float32),
        )

    def __call__(self, x: Float[Array, "B H W C"], stride: int = 1) -> Float[Array, "B h w E"]:
        @recomputed
        def normed(x, scale, bias, mean, variance):
            mean, variance = jax.lax.stop_gradient((mean, variance))
            factor = jax.lax.rsqrt(variance + _NORM_EPS) * scale.astype(jnp.float32)
            return ((x.astype(jnp.float32) - mean) * factor + bias).astype(x.dtype)

        vectors = self.scale[...], self.bias[...], self.mean[...], self.variance[...]
        return normed(_convolved(x, self.kernel[...], stride), *vectors)


class StandardisedConvolution(nnx.Module):
    """A convolution whose kernel has mean 0 and variance gain^2 / fan-in for each output, and a bias.

    Scaled weight standardisation (arXiv 2101.08692, section 4.1). `last` starts with a gain of
    zero.
    """

    def __init__(
        self,
        size: int,
        inputs: int,
        outputs: int,
        *,
        rngs: nnx.Rngs,
        dtypes: Dtypes,
        last: bool = False,
    ):
        self.kernel = _kernel(size, inputs, outputs, rngs=rngs, dtypes=dtypes)
        self.gain = _vector(outputs, 0 if last else 1, dtypes.param)
        self.bias = _vector(outputs, 0, dtypes.param)

    def __call__(self, x: Float[Array, "B H W C"], stride: int = 1) -> Float[Array, "B h w E"]:
        kernel, gain = self.kernel[...].astype(jnp.float32), self.gain[...].astype(jnp.float32)
        centred = kernel - kernel.mean((0, 1, 2))
        variance = jnp.square(centred).mean((0, 1, 2))
        scale = gain * jax.lax.rsqrt(variance + _NORM_EPS) * _GAMMA / math.sqrt(kernel[..., 0].size)
        return _convolved(x, centred * scale, stride) + self.bias[...].astype(x.dtype)


class ClipBottleneck(nnx.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut; where it halves the image, it averages."""

    def __init__(self, inputs: int, width: int, *, stride: int, rngs: nnx.Rngs, dtypes: Dtypes):
        self.stride, outputs = stride, 4 * width
        self.conv1 = NormedConvolution(1, inputs, width, rngs=rngs, dtypes=dtypes)
        self.conv2 = NormedConvolution(3, width, width, rngs=rngs, dtypes=dtypes)
        self.conv3 = NormedConvolution(1, width, outputs, rngs=rngs, dtypes=dtypes, last=True)
        other = stride > 1 or inputs != outputs
        self.shortcut = (
            NormedConvolution(1, inputs, outputs, rngs=rngs, dtypes=dtypes) if other else None
        )

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w E"]:
        y = jax.nn.relu(self.conv2(jax.nn.relu(self.conv1(x))))
        if self.stride > 1:
            x, y = _halved(x), _halved(y)
        return jax.nn.relu(self.conv3(y) + (x if self.shortcut is None else self.shortcut(x)))


class NormFreeBottleneck(nnx.Module):
    """The same with the activations in front, and a ReLU of variance 1: `beta` is 1 over the deviation of `x`."""

    def __init__(self, inputs: int, width: int, *, stride: int, rngs: nnx.Rngs, dtypes: Dtypes):
        self.stride, outputs = stride, 4 * width
        self.conv1 = StandardisedConvolution(1, inputs, width, rngs=rngs, dtypes=dtypes)
        self.conv2 = StandardisedConvolution(3, width, width, rngs=rngs, dtypes=dtypes)
        self.conv3 = StandardisedConvolution(1, width, outputs, rngs=rngs, dtypes=dtypes, last=True)
        other = stride > 1 or inputs != outputs
        self.shortcut = (
            StandardisedConvolution(1, inputs, outputs, rngs=rngs, dtypes=dtypes) if other else None
        )

    def __call__(
        self, x: Float[Array, "B H W C"], beta: Float[Array, ""]
    ) -> Float[Array, "B h w E"]:
        y = jax.nn.relu(x) * beta.astype(x.dtype)
        if self.shortcut is not None:
            x = self.shortcut(_halved(y) if self.stride > 1 else y)
        y = self.conv2(jax.nn.relu(self.conv1(y)), self.stride)
        return x + _ALPHA * self.conv3(jax.nn.relu(y))


class ClipStem(nnx.Module):
    """Three 3 x 3 convolutions and an average: a quarter of the image's sides."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtypes: Dtypes):
        self.conv1 = NormedConvolution(3, 3, width // 2, rngs=rngs, dtypes=dtypes)
        self.conv2 = NormedConvolution(3, width // 2, width // 2, rngs=rngs, dtypes=dtypes)
        self.conv3 = NormedConvolution(3, width // 2, width, rngs=rngs, dtypes=dtypes)

    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        x = jax.nn.relu(self.conv2(jax.nn.relu(self.conv1(x, 2))))
        return _halved(jax.nn.relu(self.conv3(x)))


class NormFreeStem(nnx.Module):
    """A 7 x 7 convolution and a maximum: a quarter of the image's sides."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtypes: Dtypes):
        self.conv = StandardisedConvolution(7, 3, width, rngs=rngs, dtypes=dtypes)

    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        around = (0, 0), (1, 1), (1, 1), (0, 0)
        return jax.lax.reduce_window(
            self.conv(x, 2), -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), around
        )


class Stage(nnx.Module):
    """Bottlenecks of one size: the first, which may halve the image, and a stack of the others."""

    def __init__(self, config: ResNetConfig, place: int, *, rngs: nnx.Rngs, dtypes: Dtypes):
        bottleneck = {"clip": ClipBottleneck, "nf": NormFreeBottleneck}[config.kind]
        width, depth = config.stem_width * 2**place, config.stages[place]
        first, stride = (2 * width, 2) if place else (width, 1)
        self.first = bottleneck(first, width, stride=stride, rngs=rngs, dtypes=dtypes)
        self.others = (
            stack(
                lambda r: bottleneck(4 * width, width, stride=1, rngs=r, dtypes=dtypes),
                depth - 1,
                rngs=rngs,
            )
            if depth > 1
            else None
        )
        # Of a norm-free stage, the variance of what comes in: 1 where the stage begins, and more
        # with each bottleneck.
        before = config.stages[place - 1] if place else 0
        betas = [1 / math.sqrt(1 + _ALPHA**2 * added) for added in (before, *range(1, depth))]
        self.betas = tuple(betas) if config.kind == "nf" else None

    def __call__(
        self, x: Float[Array, "B H W C"], *, remat: Remat, unroll: int
    ) -> Float[Array, "B h w E"]:
        def step(x, layer):
            bottleneck, *beta = layer
            return bottleneck(x, *beta)

        betas = (
            ((), ())
            if self.betas is None
            else ((jnp.array(self.betas[0]),), (jnp.array(self.betas[1:]),))
        )
        x = keeping(step, remat)(x, (self.first, *betas[0]))
        return (
            x
            if self.others is None
            else scan(step, x, (self.others, *betas[1]), remat=remat, unroll=unroll)
        )


class ResNet(nnx.Module):
    """Images to image tokens, one for each 32 x 32 pixels. Pixels are normalised here, on the device."""

    def __init__(self, config: Any, *, rngs: nnx.Rngs, dtypes: Dtypes):
        vision = config.vision
        self.config, self.remat, self.unroll, self.dtype = (
            vision,
            config.remat,
            config.unroll,
            dtypes.compute,
        )
        stem = {"clip": ClipStem, "nf": NormFreeStem}[vision.kind]
        self.stem = stem(vision.stem_width, rngs=rngs, dtypes=dtypes)
        stages = (Stage(vision, place, rngs=rngs, dtypes=dtypes) for place in range(4))
        self.stage1, self.stage2, self.stage3, self.stage4 = stages

    def __call__(
        self,
        image: UInt8[Array, "B height width 3"] | Float[Array, "B height width 3"],
        crop_key: Key[Array, ""] | None = None,
    ) -> EncoderOutput:
        """Encodes images of `image_size`, or of `low_image_size`; they are pooled by their mean.

        Args:
          image: uint8[B, height, width, 3] RGB, normalised here; or float, taken as normalised
            already.
          crop_key: of no use: nothing here is random. It is what any encoder is given in training.

        Raises:
          ValueError: the images are of another size.
        """
        x = self.stem(normalised(image, self.config).astype(self.dtype))
        for stage in (self.stage1, self.stage2, self.stage3, self.stage4):
            x = stage(x, remat=self.remat, unroll=self.unroll)
        x = jax.nn.relu(x)  # which leaves those of CLIP, a ReLU's output, as they are
        grid = x.shape[1], x.shape[2]
        tokens = constrain(x.reshape(x.shape[0], -1, x.shape[3]), "batch", "patch", "embed")
        return EncoderOutput(tokens, tokens.mean(1, dtype=jnp.float32), grid)
