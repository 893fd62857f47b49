"""Norms, linear maps, attention, MLP, embeddings and the layer of both towers. Every parameter names its logical axes.

Axes in einsum strings: B batch, L text or image tokens that ask, S tokens that are attended to, N
heads, K head size, D width. Parameters are stored in `param_dtype` and cast to `dtype` where they
are used; statistics of norms and softmax are float32.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from mammut.core.fields import require, require_at_most, require_choices, require_positive
from mammut.core.sharding import constrain
from mammut.core.typing import Array
from mammut.models.compute import Dtypes, recomputed

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu2", "swiglu"]


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """What the layers of a tower are made of; the defaults are those of the vision transformer as published."""

    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    # gelu is exact (PyTorch's default), gelu_tanh its approximation (Flax's), quick_gelu x *
    # sigmoid(1.702 x) (OpenAI's CLIP), relu2 the square of a ReLU, swiglu a linear map gated by the
    # SiLU of another
    activation: Activation = "gelu_tanh"
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-6
    norm_bias: bool = True  # of LayerNorm; an RMSNorm has none
    attn_bias: bool = True
    attn_out_bias: bool | None = None  # of attention's last map; None: as `attn_bias`
    # attention scores are divided by the root of the head size; GPT-Neo's are not
    attn_scale: bool = True
    mlp_bias: bool = True
    # serial: the MLP reads what attention has been added to. parallel: both read one norm of the
    # layer's input (GPT-J); parallel_two_norms: each has a norm of its own (GPT-NeoX).
    layout: Literal["serial", "parallel", "parallel_two_norms"] = "serial"
    qk_norm: bool = False  # a norm over each head's queries and keys
    # what a layer attended to is multiplied by a sigmoid of the layer's normed input
    attn_gate: bool = False
    gate_bias: bool = True

    def __post_init__(self):
        require_choices(self)
        require_positive(self, "width", "num_heads", "mlp_dim", "norm_eps")
        require_at_most(self, {"width": 2**16, "depth": 2**10, "mlp_dim": 2**18})
        require(
            self.width % self.num_heads == 0,
            f"{type(self).__name__}.width {self.width} is not a multiple of num_heads {self.num_heads}",
        )


def param(value: jax.Array, *axes: str | None) -> nnx.Param:
    """A parameter with one logical axis name for each dimension (None: never split)."""
    if len(axes) != value.ndim:
        raise ValueError(
            f"a parameter of shape {value.shape} was given {len(axes)} axis names: {axes}"
        )
    return nnx.Param(value, axes=axes)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, with scale and, unless told otherwise, bias."""

    def __init__(
        self, width: int, eps: float, *, dtypes: Dtypes, axis: str = "embed", use_bias: bool = True
    ):
        self.eps = eps
        self.scale = param(jnp.ones(width, dtypes.param), axis)
        self.bias = param(jnp.zeros(width, dtypes.param), axis) if use_bias else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        @recomputed
        def normed(x, scale, bias):
            x32 = x.astype(jnp.float32)
            mean = x32.mean(-1, keepdims=True)
            centred = x32 - mean
            variance = (centred * centred).mean(-1, keepdims=True)
            y = centred * jax.lax.rsqrt(variance + self.eps) * scale
            return (y if bias is None else y + bias).astype(x.dtype)

        return normed(x, self.scale[...], None if self.bias is None else self.bias[...])


class RMSNorm(nnx.Module):
    """Division by the root mean square of the last axis (arXiv 1910.07467), with scale."""

    def __init__(self, width: int, eps: float, *, dtypes: Dtypes, axis: str = "embed"):
        self.eps = eps
        self.scale = param(jnp.ones(width, dtypes.param), axis)

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
    """The norm that `config` asks for, over `width` numbers; None: the tower's width."""
    width = width or config.width
    if config.norm == "rms":
        return RMSNorm(width, config.norm_eps, dtypes=dtypes, axis=axis)
    return LayerNorm(width, config.norm_eps, dtypes=dtypes, axis=axis, use_bias=config.norm_bias)


def adapted(
    module: nnx.Module, function: Callable[[Array], jax.Array], x: Float[Array, "..."]
) -> Float[Array, "..."]:
    """`function(x)`, the work of `module`, or what its adapter makes of both (`mammut.models.adapter_modules` puts it there)."""
    return function(x) if module.adapter is None else module.adapter(function, x)


class Linear(nnx.Module):
    """An affine map from axes `inputs` to axes `outputs`, each a dict of logical axis name to size.

    `Linear({"embed": D}, {"heads": N, "head_size": K})` has a kernel [D, N, K] and maps [..., D] to
    [..., N, K]. Initialised with variance 1 / fan-in; biases with zero.
    """

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        rngs: nnx.Rngs,
        dtypes: Dtypes,
        use_bias: bool = True,
    ):
        self.num_inputs = len(inputs)
        self.dtype = dtypes.compute
        shape = (*inputs.values(), *outputs.values())
        stddev = 1 / math.sqrt(math.prod(inputs.values()))
        kernel = (
            stddev
            * jax.random.truncated_normal(rngs.params(), -2, 2, shape, jnp.float32)
            / 0.87962566
        )
        self.kernel = param(kernel.astype(dtypes.param), *inputs, *outputs)
        self.bias = (
            param(jnp.zeros(tuple(outputs.values()), dtypes.param), *outputs) if use_bias else None
        )
        self.adapter: nnx.Module | None = nnx.data(None)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return adapted(self, self._map, x)

    def _map(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        n = self.num_inputs
        y = jnp.tensordot(x, self.kernel[...].astype(self.dtype), n)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Embedding(nnx.Module):
    """A table of V vectors, looked up by id."""

    def __init__(self, vocab_size: int, width: int, *, rngs: nnx.Rngs, dtypes: Dtypes):
        self.dtype = dtypes.compute
        table = 0.02 * jax.random.normal(rngs.params(), (vocab_size, width), jnp.float32)
        self.embedding = param(table.astype(dtypes.param), "vocab", "embed")

    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        # Gathered whole along `embed` first: a lookup in a table that is split there comes out
        # split the wrong way.
        return constrain(self.embedding[...].astype(self.dtype), "vocab", None)[tokens]
