"""ResNet image encoders of MAGMA.

One is CLIP's ResNet without its attention pool, the other has no norms.

MAGMA (arXiv 2112.05253, section 3.1) uses both. Images and features are laid out [B, height, width,
channels], kernels [height, width, inputs, outputs]. The bottlenecks of a stage after its first have
the same shapes: they are stacked, as the layers of a transformer are.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from mammut.core.fields import (
    require,
    require_at_most,
    require_choices,
    require_positive,
    require_types,
)
from mammut.core.sharding import constrain
from mammut.core.typing import Array
from mammut.models.compute import (
    Augment,
    ComputeConfig,
    Dtypes,
    Remat,
    recomputed,
    scan,
    stack,
    with_remat,
)
from mammut.models.image_encoder import (
    EncoderOutput,
    Image,
    normalised,
    require_image_sizes,
    require_pixels,
)
from mammut.models.layers import Constant, FanIn, param
from mammut.models.video import VideoConfig, require_video_sizes

_NORM_EPS = 1e-5
# Numbers of the norm-free ResNet (arXiv 2101.08692). A bottleneck adds `_ALPHA` times its result.
# `_GAMMA` brings the output of a ReLU back to variance 1: sqrt(2 / (1 - 1 / pi)), as its authors
# measured it.
_ALPHA = 0.2
_GAMMA = 1.7139588594436646


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """A ResNet image encoder: four stages of bottlenecks.

    It makes one image token of 32 x 32 pixels. The defaults are CLIP's RN50. RN50x16, that of
    MAGMA, has stem_width 96, stages (6, 8, 18, 8) and an image_size of 384.

    Example:
      >>> ResNetConfig(stem_width=96, stages=(6, 8, 18, 8), image_size=384).num_tokens
      144
    """

    # Kind of the ResNet. clip: CLIP's (arXiv 2103.00020, section 2.4) without its attention
    # pool: three convolutions first, averages in place of strides, batch norms that keep their
    # stored statistics. nf: the norm-free ResNet (arXiv 2101.08692): standardised kernels,
    # activations in front.
    kind: Literal["clip", "nf"] = "clip"
    # Channels of the stem and of the first stage's bottlenecks; later stages have 2, 4, 8 times
    # as many.
    stem_width: int = 64
    # Number of bottlenecks of each stage.
    stages: tuple[int, int, int, int] = (3, 4, 6, 3)
    # Height and width of an image in pixels, a multiple of 32; images are square.
    image_size: int = 224
    # A second, smaller image size that the ResNet takes, for `TrainConfig.low_image_steps`.
    # None: one size.
    low_image_size: int | None = None
    # Mean of each colour channel, of pixels scaled to 0..1; the default is CLIP's.
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    # Standard deviation of each colour channel; the default is CLIP's.
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    # How videos are read, of mode "frames". None: frame by frame, too, with the other defaults.
    video: VideoConfig | None = None

    # Fields of a `VisionConfig` that have one value for every ResNet.
    pooling: ClassVar[str] = "mean"
    norm_after_pooling: ClassVar[bool] = False
    class_token: ClassVar[bool] = False

    def __post_init__(self):
        require_types(self)
        require_choices(self)
        require_positive(self, "stem_width", "image_size")
        require_at_most(self, {"stem_width": 2**11, "image_size": 2**14})
        require(
            all(0 < depth <= 2**10 for depth in self.stages),
            f"ResNetConfig.stages is {self.stages}, expected numbers of bottlenecks, 1 to {2**10}",
        )
        require(
            self.kind != "clip" or self.stem_width % 2 == 0,
            f"ResNetConfig.stem_width is {self.stem_width}, expected an even number: the stem "
            "begins with half of it",
        )
        require_image_sizes(self, 32, "32")
        require_pixels(self)
        if self.video is not None:
            require(
                self.video.mode == "frames",
                "ResNetConfig.video has VideoConfig.mode 'tubes', which a ResNet cannot read: "
                "expected 'frames'",
            )
            require_video_sizes(self)

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
    def covered_size(self) -> int:
        """Height and width of the part of an image that tokens cover, in pixels: all of it."""
        return self.image_size

    @property
    def num_tokens(self) -> int:
        """Image tokens that the decoder attends to."""
        return self.grid[0] * self.grid[1]

    @property
    def summary(self) -> str:
        """The encoder in words, for reports and model cards."""
        kind = {"clip": "CLIP's ResNet", "nf": "a norm-free ResNet"}[self.kind]
        stages = ", ".join(map(str, self.stages))
        return (
            f"{kind}, stages of {stages} bottlenecks, stem of {self.stem_width}, tokens of "
            f"{self.width} numbers"
        )


def _kernel(size: int, inputs: int, outputs: int, *, dtypes: Dtypes) -> nnx.Param:
    """Makes a kernel [size, size, inputs, outputs]."""
    # A variance of 2 / fan-in: a ReLU halves the variance of its input.
    kernel_init = FanIn(size * size * inputs, gain=2.0)
    sizes = (size, size, inputs, outputs)
    return param(kernel_init, sizes, dtypes.param, None, None, None, "embed")


def _vector(size: int, value: float, dtype: Any) -> nnx.Param:
    return param(Constant(value), (size,), dtype, "embed")


def _convolved(
    x: Float[Array, "B height width inputs"],
    kernel: Float[Array, "size size inputs outputs"],
    stride: int,
) -> Float[Array, "B new_height new_width outputs"]:
    """Convolves with zeros around the image.

    With stride 1 the image keeps its size.
    """
    around = kernel.shape[0] // 2, kernel.shape[0] // 2
    # The batch is split over devices, so each device needs the whole kernel.
    kernel = constrain(kernel.astype(x.dtype), None, None, None, None)
    y = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), (around, around), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return constrain(y, "batch", None, None, "embed")


def _halved(
    x: Float[Array, "B height width channels"],
) -> Float[Array, "B new_height new_width channels"]:
    """Averages 2 x 2 pixels."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


class Convolution(nnx.Module):
    """What both kinds of convolution have: a kernel and a bias."""

    def __init__(self, size: int, inputs: int, outputs: int, *, dtypes: Dtypes):
        self.kernel = _kernel(size, inputs, outputs, dtypes=dtypes)
        self.bias = _vector(outputs, 0.0, dtypes.param)


class NormedConvolution(Convolution):
    """A convolution, then a batch norm with stored statistics.

    The statistics never come from the batch: an image has the same tokens in training as at
    inference, whatever is beside it. Scale and bias are trained like any parameter. Mean and
    variance are parameters only in that they are saved; their gradient is zero. `last` starts with
    a scale of zero, so that a new bottleneck is the identity.
    """

    def __init__(self, size: int, inputs: int, outputs: int, *, dtypes: Dtypes, last: bool = False):
        super().__init__(size, inputs, outputs, dtypes=dtypes)
        self.scale = _vector(outputs, 0.0 if last else 1.0, dtypes.param)
        self.mean = _vector(outputs, 0.0, jnp.float32)
        self.variance = _vector(outputs, 1.0, jnp.float32)

    def __call__(
        self, x: Float[Array, "B height width inputs"], stride: int = 1
    ) -> Float[Array, "B new_height new_width outputs"]:
        @recomputed
        def normed(x, scale, bias, mean, variance):
            mean, variance = jax.lax.stop_gradient((mean, variance))
            factor = jax.lax.rsqrt(variance + _NORM_EPS) * scale.astype(jnp.float32)
            return ((x.astype(jnp.float32) - mean) * factor + bias).astype(x.dtype)

        vectors = self.scale[...], self.bias[...], self.mean[...], self.variance[...]
        return normed(_convolved(x, self.kernel[...], stride), *vectors)


class StandardisedConvolution(Convolution):
    """A convolution with a standardised kernel, and a bias.

    For each output the kernel has mean 0 and variance gain^2 / fan-in: scaled weight
    standardisation (arXiv 2101.08692, section 4.1). `last` starts with a gain of zero.
    """

    def __init__(self, size: int, inputs: int, outputs: int, *, dtypes: Dtypes, last: bool = False):
        super().__init__(size, inputs, outputs, dtypes=dtypes)
        self.gain = _vector(outputs, 0.0 if last else 1.0, dtypes.param)

    def __call__(
        self, x: Float[Array, "B height width inputs"], stride: int = 1
    ) -> Float[Array, "B new_height new_width outputs"]:
        kernel = self.kernel[...].astype(jnp.float32)
        gain = self.gain[...].astype(jnp.float32)
        centred = kernel - kernel.mean((0, 1, 2))
        variance = jnp.square(centred).mean((0, 1, 2))
        scale = gain * jax.lax.rsqrt(variance + _NORM_EPS) * _GAMMA / math.sqrt(kernel[..., 0].size)
        return _convolved(x, centred * scale, stride) + self.bias[...].astype(x.dtype)


class Bottleneck(nnx.Module):
    """Three convolutions beside a shortcut.

    The convolutions are 1 x 1, 3 x 3 and 1 x 1.
    """

    convolution: ClassVar[type[NormedConvolution] | type[StandardisedConvolution]]

    def __init__(self, inputs: int, width: int, *, stride: int, dtypes: Dtypes):
        self.stride = stride
        outputs = 4 * width
        self.conv1 = self.convolution(1, inputs, width, dtypes=dtypes)
        self.conv2 = self.convolution(3, width, width, dtypes=dtypes)
        self.conv3 = self.convolution(1, width, outputs, dtypes=dtypes, last=True)
        if stride > 1 or inputs != outputs:
            self.shortcut = self.convolution(1, inputs, outputs, dtypes=dtypes)
        else:
            self.shortcut = None


class ClipBottleneck(Bottleneck):
    """CLIP's bottleneck.

    Where it halves the image, it averages.
    """

    convolution = NormedConvolution

    def __call__(
        self, x: Float[Array, "B height width inputs"]
    ) -> Float[Array, "B new_height new_width outputs"]:
        y = jax.nn.relu(self.conv2(jax.nn.relu(self.conv1(x))))
        if self.stride > 1:
            x = _halved(x)
            y = _halved(y)
        if self.shortcut is not None:
            x = self.shortcut(x)
        return jax.nn.relu(self.conv3(y) + x)


class NormFreeBottleneck(Bottleneck):
    """The norm-free bottleneck, with its activations in front.

    It is called with `beta`, which is 1 over the standard deviation of `x`.
    """

    convolution = StandardisedConvolution

    def __call__(
        self, x: Float[Array, "B height width inputs"], beta: Float[Array, ""]
    ) -> Float[Array, "B new_height new_width outputs"]:
        y = jax.nn.relu(x) * beta.astype(x.dtype)
        if self.shortcut is not None:
            x = self.shortcut(_halved(y) if self.stride > 1 else y)
        y = self.conv2(jax.nn.relu(self.conv1(y)), self.stride)
        return x + _ALPHA * self.conv3(jax.nn.relu(y))


class ClipStem(nnx.Module):
    """Three 3 x 3 convolutions and an average.

    The sides of the image shrink to a quarter.
    """

    def __init__(self, width: int, *, dtypes: Dtypes):
        self.conv1 = NormedConvolution(3, 3, width // 2, dtypes=dtypes)
        self.conv2 = NormedConvolution(3, width // 2, width // 2, dtypes=dtypes)
        self.conv3 = NormedConvolution(3, width // 2, width, dtypes=dtypes)

    def __call__(
        self, x: Float[Array, "B height width 3"]
    ) -> Float[Array, "B new_height new_width channels"]:
        x = jax.nn.relu(self.conv2(jax.nn.relu(self.conv1(x, 2))))
        return _halved(jax.nn.relu(self.conv3(x)))


class NormFreeStem(nnx.Module):
    """A 7 x 7 convolution and a maximum.

    The sides of the image shrink to a quarter.
    """

    def __init__(self, width: int, *, dtypes: Dtypes):
        self.conv = StandardisedConvolution(7, 3, width, dtypes=dtypes)

    def __call__(
        self, x: Float[Array, "B height width 3"]
    ) -> Float[Array, "B new_height new_width channels"]:
        around = (0, 0), (1, 1), (1, 1), (0, 0)
        return jax.lax.reduce_window(
            self.conv(x, 2), -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), around
        )


class Stage(nnx.Module):
    """Bottlenecks of one size.

    The first may halve the image; the others are a stack.
    """

    def __init__(self, config: ResNetConfig, index: int, *, dtypes: Dtypes):
        bottleneck = {"clip": ClipBottleneck, "nf": NormFreeBottleneck}[config.kind]
        width = config.stem_width * 2**index
        depth = config.stages[index]
        inputs, stride = (2 * width, 2) if index > 0 else (width, 1)
        self.first = bottleneck(inputs, width, stride=stride, dtypes=dtypes)
        if depth > 1:
            other = bottleneck(4 * width, width, stride=1, dtypes=dtypes)
            self.others = stack(other, depth - 1)
        else:
            self.others = None

        if config.kind == "nf":
            # The variance of each bottleneck's input. The shortcut of a stage's first bottleneck
            # brings it back to 1, and every bottleneck adds `_ALPHA`^2: `added` counts the
            # bottlenecks that have added theirs.
            before = config.stages[index - 1] if index > 0 else 0
            added = (before, *range(1, depth))
            self.betas = tuple(1 / math.sqrt(1 + _ALPHA**2 * count) for count in added)
        else:
            self.betas = None

    def __call__(
        self, x: Float[Array, "B height width inputs"], *, remat: Remat, unroll: int
    ) -> Float[Array, "B new_height new_width outputs"]:
        def step(x: jax.Array, layer: tuple) -> jax.Array:
            bottleneck, *beta = layer
            return bottleneck(x, *beta)

        first: tuple = (self.first,)
        others: tuple = (self.others,)
        if self.betas is not None:
            first += (jnp.array(self.betas[0]),)
            others += (jnp.array(self.betas[1:]),)
        x = with_remat(step, remat)(x, first)
        if self.others is None:
            return x
        return scan(step, x, others, remat=remat, unroll=unroll)


class ResNet(nnx.Module):
    """A ResNet, which turns images into image tokens.

    There is one token for each 32 x 32 pixels.

    Pixels are normalised here, on the device.
    """

    def __init__(self, config: ResNetConfig, compute: ComputeConfig):
        self.config = config
        self.compute = compute
        dtypes = compute.dtypes
        self.dtype = dtypes.compute
        stem = {"clip": ClipStem, "nf": NormFreeStem}[config.kind]
        self.stem = stem(config.stem_width, dtypes=dtypes)
        stages = (Stage(config, index, dtypes=dtypes) for index in range(4))
        self.stage1, self.stage2, self.stage3, self.stage4 = stages

    def __call__(self, image: Image, augment: Augment = Augment()) -> EncoderOutput:
        """Encodes images and pools them by their mean.

        The images have `image_size` or `low_image_size`.

        Args:
          image: uint8[B, height, width, 3] RGB, normalised here; or float, normalised already:
            (pixel / 255 - `image_mean`) / `image_std`.
          augment: not used, since nothing is random here; every encoder takes it.

        Raises:
          ValueError: the images are of another size.
        """
        x = self.stem(normalised(image, self.config).astype(self.dtype))
        for stage in (self.stage1, self.stage2, self.stage3, self.stage4):
            x = stage(x, remat=self.compute.remat, unroll=self.compute.unroll)
        # The norm-free stages end without an activation. CLIP's stages end with this one, and a
        # second call changes nothing.
        x = jax.nn.relu(x)
        grid = x.shape[1], x.shape[2]
        tokens = constrain(x.reshape(x.shape[0], -1, x.shape[3]), "batch", "patch", "embed")
        return EncoderOutput(tokens, tokens.mean(1, dtype=jnp.float32), grid)
