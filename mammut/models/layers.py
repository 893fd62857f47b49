"""Norms, linear maps and embeddings of both towers.

Every parameter names its logical axes.

Axes: B batch, L text or image tokens, N heads, K head size, D width, V vocabulary. Parameters are
stored in `ComputeConfig.param_dtype` and cast to `dtype` where they are used; statistics of norms
are float32.

A module is built without numbers: each parameter knows its shape, its axes and how it starts.
`initialise` then draws them all.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int, Key

from mammut.core.fields import (
    require,
    require_at_most,
    require_choices,
    require_positive,
    require_types,
)
from mammut.core.sharding import constrain
from mammut.core.typing import Array
from mammut.models.compute import Dtypes, recomputed

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu2", "swiglu"]
Module = TypeVar("Module", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """Configuration of the layers of a tower.

    The defaults are those of the published vision transformer.
    """

    # Fields that only other people's weights set: `train.py --help` leaves them out.
    OF_WEIGHTS: ClassVar[tuple[str, ...]] = (
        "norm",
        "norm_eps",
        "attn_bias",
        "attn_out_bias",
        "attn_scale",
        "mlp_bias",
        "layout",
        "qk_norm",
        "attn_gate",
        "gate_bias",
    )

    # Size of a token.
    width: int = 768
    # Number of layers.
    depth: int = 12
    # Attention heads; they divide the width.
    num_heads: int = 12
    # Hidden size of the MLP.
    mlp_dim: int = 3072
    # Activation of the MLP. gelu is exact (PyTorch's default), gelu_tanh is its approximation
    # (Flax's), quick_gelu x * sigmoid(1.702 x) (OpenAI's CLIP), relu2 the square of a ReLU, swiglu
    # a linear map gated by the SiLU of another linear map.
    activation: Activation = "gelu_tanh"
    # Kind of the norms: LayerNorm or RMSNorm.
    norm: Literal["layer", "rms"] = "layer"
    # Number added to the variance in a norm.
    norm_eps: float = 1e-6
    # Whether attention's maps have biases.
    attn_bias: bool = True
    # Whether attention's last map has a bias; None: the same as `attn_bias`.
    attn_out_bias: bool | None = None
    # Whether attention scores are divided by the root of the head size; GPT-Neo's are not.
    attn_scale: bool = True
    # Whether the MLP's maps have biases.
    mlp_bias: bool = True
    # Order of a layer. serial: the MLP reads the sum of input and attention. parallel: MLP and
    # attention read one norm of the layer's input (GPT-J). parallel_two_norms: each has a norm of
    # its own (GPT-NeoX).
    layout: Literal["serial", "parallel", "parallel_two_norms"] = "serial"
    # Whether each head's queries and keys are normed.
    qk_norm: bool = False
    # Whether attention's result is multiplied by a sigmoid of the layer's normed input.
    attn_gate: bool = False
    # Whether the map of that gate has a bias.
    gate_bias: bool = True

    def __post_init__(self):
        require_types(self)
        require_choices(self)
        require_positive(self, "width", "num_heads", "mlp_dim", "norm_eps")
        require_at_most(self, {"width": 2**16, "depth": 2**10, "mlp_dim": 2**18})
        require(
            self.width % self.num_heads == 0,
            f"{type(self).__name__}.width {self.width} is not a multiple of num_heads "
            f"{self.num_heads}",
        )


@dataclasses.dataclass(frozen=True)
class Constant:
    """Starts a parameter with one value."""

    value: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jnp.full(shape, self.value, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Normal:
    """Starts a parameter with normally distributed numbers.

    They are cut at `cut` standard deviations; None: they are not cut.
    """

    stddev: float
    cut: float | None = None

    def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        drawn = jax.random.normal(key, shape, jnp.float32)
        if self.cut is not None:
            drawn = jnp.clip(drawn, -self.cut, self.cut)
        return self.stddev * drawn


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Starts a parameter with numbers drawn evenly from -bound to bound."""

    bound: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.uniform(key, shape, jnp.float32, -self.bound, self.bound)


@dataclasses.dataclass(frozen=True)
class FanIn:
    """Starts a kernel with normal numbers of variance gain / fan-in.

    Numbers beyond two standard deviations are drawn again.
    """

    fan_in: int
    gain: float = 1.0

    def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        # The deviation of a standard normal number that is redrawn beyond 2.
        truncated = 0.87962566
        stddev = math.sqrt(self.gain / self.fan_in) / truncated
        return stddev * jax.random.truncated_normal(key, -2, 2, shape, jnp.float32)


Initializer = Constant | Normal | Uniform | FanIn


def param(
    initializer: Initializer, sizes: tuple[int, ...], dtype: Any, *axes: str | None
) -> nnx.Param:
    """Makes a parameter without numbers yet.

    It has a logical axis name for each dimension.

    Args:
      initializer: how `initialise` draws it.
      sizes: its shape.
      dtype: the number type that it is stored in.
      axes: the names; None: the dimension is never split over devices.
    """
    if len(axes) != len(sizes):
        raise ValueError(f"a parameter of shape {sizes} was given {len(axes)} axis names: {axes}")
    return nnx.Param(jax.ShapeDtypeStruct(sizes, dtype), axes=axes, initializer=initializer)


def initialise(module: Module, key: jax.Array, path: str = "") -> Module:
    """Gives every parameter of a new module its numbers; returns the module.

    The key of a parameter is folded from its path: an option that adds or removes parameters
    changes no other.

    Args:
      module: a module whose parameters have no numbers yet.
      key: the key that all others are folded from.
      path: the path of the module in its model, such as "adapters".
    """
    for steps, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Param):
            name = ".".join(filter(None, (path, *map(str, steps))))
            spec = variable.get_value()
            number = np.uint32(zlib.crc32(name.encode()))
            drawn = _draw(variable.initializer, spec.shape, spec.dtype, key, number)
            variable.set_value(drawn)
    return module


# Compiled as one program: otherwise a new model would compile four programs for each shape.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _draw(
    initializer: Initializer,
    shape: tuple[int, ...],
    dtype: Any,
    key: jax.Array,
    number: jax.Array | np.uint32,
) -> jax.Array:
    """Draws one parameter.

    The key is folded from `number`, which comes from the parameter's path.
    """
    return initializer(jax.random.fold_in(key, number), shape).astype(dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, with scale and bias."""

    def __init__(self, width: int, eps: float, *, dtypes: Dtypes, axis: str = "embed"):
        self.eps = eps
        self.scale = param(Constant(1.0), (width,), dtypes.param, axis)
        self.bias = param(Constant(0.0), (width,), dtypes.param, axis)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        @recomputed
        def normed(x, scale, bias):
            x32 = x.astype(jnp.float32)
            mean = x32.mean(-1, keepdims=True)
            centred = x32 - mean
            variance = (centred * centred).mean(-1, keepdims=True)
            y = centred * jax.lax.rsqrt(variance + self.eps) * scale
            return (y + bias).astype(x.dtype)

        return normed(x, self.scale[...], self.bias[...])


class RMSNorm(nnx.Module):
    """Division by the root mean square of the last axis.

    A learned scale follows (arXiv 1910.07467).
    """

    def __init__(self, width: int, eps: float, *, dtypes: Dtypes, axis: str = "embed"):
        self.eps = eps
        self.scale = param(Constant(1.0), (width,), dtypes.param, axis)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        @recomputed
        def normed(x, scale):
            x32 = x.astype(jnp.float32)
            y = x32 * jax.lax.rsqrt((x32 * x32).mean(-1, keepdims=True) + self.eps)
            return (y * scale).astype(x.dtype)

        return normed(x, self.scale[...])


def make_norm(
    config: LayerConfig, *, dtypes: Dtypes, width: int | None = None, axis: str = "embed"
) -> nnx.Module:
    """Makes the norm that `config` names, over `width` numbers.

    None: the tower's width.
    """
    kind = {"layer": LayerNorm, "rms": RMSNorm}[config.norm]
    return kind(width or config.width, config.norm_eps, dtypes=dtypes, axis=axis)


def adapted(
    module: nnx.Module, function: Callable[[Array], jax.Array], x: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Applies `function` to `x`, through the module's adapter if any.

    `function` does the work of `module`.

    `mammut.models.adapter_modules` puts the adapter there for the time of a call.
    """
    return function(x) if module.adapter is None else module.adapter(function, x)


class Linear(nnx.Module):
    """An affine map from axes `inputs` to axes `outputs`.

    Each is a dict of logical axis name to size: `Linear({"embed": D}, {"heads": N, "head_size":
    K})` has a kernel [D, N, K] and maps [..., D] to [..., N, K]. Kernels start with variance 1 /
    fan-in, biases with zero.
    """

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        dtypes: Dtypes,
        use_bias: bool = True,
        kernel_init: Initializer | None = None,
        bias_init: Initializer = Constant(0.0),
    ):
        self.num_inputs = len(inputs)
        self.dtype = dtypes.compute
        kernel_init = kernel_init or FanIn(math.prod(inputs.values()))
        sizes = (*inputs.values(), *outputs.values())
        self.kernel = param(kernel_init, sizes, dtypes.param, *inputs, *outputs)
        if use_bias:
            self.bias = param(bias_init, tuple(outputs.values()), dtypes.param, *outputs)
        else:
            self.bias = None
        self.adapter: nnx.Module | None = nnx.data(None)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return adapted(self, self._map, x)

    def _map(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = jnp.tensordot(x, self.kernel[...].astype(self.dtype), self.num_inputs)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Embedding(nnx.Module):
    """A table of V vectors, looked up by id."""

    def __init__(self, vocab_size: int, width: int, *, dtypes: Dtypes):
        self.dtype = dtypes.compute
        sizes = vocab_size, width
        self.embedding = param(Normal(0.02), sizes, dtypes.param, "vocab", "embed")

    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        # First the table is gathered whole along `embed`: a lookup in a table that is split there
        # comes out split the wrong way.
        return constrain(self.embedding[...].astype(self.dtype), "vocab", None)[tokens]


def unit(x: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """Divides vectors by their length, in float32.

    A zero vector stays zero, with a finite gradient.
    """
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24))


def dropout(key: Key[Array, ""], x: Float[Array, "*B D"], rate: float) -> Float[Array, "*B D"]:
    """Sets a random share `rate` of the numbers to zero.

    The others are divided by 1 - `rate`.
    """
    share = 1 - rate
    return jnp.where(jax.random.bernoulli(key, share, x.shape), x / share, 0)
