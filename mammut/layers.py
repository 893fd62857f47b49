"""Norms, linear maps, attention, MLP, embeddings and the two kinds of layer. Every parameter names its logical axes.

Axes in einsum strings: B batch, L text or image tokens that ask, S tokens that are attended to, N heads, K head size,
D width. Parameters are stored in `param_dtype` and cast to `dtype` where they are used; statistics of norms and softmax
are float32.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int

from mammut.config import Activation, Remat
from mammut.sharding import constrain
from mammut.typing import Array


@dataclasses.dataclass(frozen=True)
class Dtypes:
    """Compute and storage types of a module."""

    compute: Any
    param: Any


def param(value: jax.Array, *axes: str | None) -> nnx.Param:
    """A parameter with one logical axis name for each dimension (None: never split)."""
    if len(axes) != value.ndim:
        raise ValueError(f"a parameter of shape {value.shape} was given {len(axes)} axis names: {axes}")
    return nnx.Param(value, axes=axes)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, with scale and bias."""

    def __init__(self, width: int, eps: float, *, dtypes: Dtypes):
        self.eps = eps
        self.scale = param(jnp.ones(width, dtypes.param), "embed")
        self.bias = param(jnp.zeros(width, dtypes.param), "embed")

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        mean = x32.mean(-1, keepdims=True)
        centred = x32 - mean
        variance = (centred * centred).mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class Linear(nnx.Module):
    """An affine map from axes `inputs` to axes `outputs`, each a dict of logical axis name to size.

    `Linear({"embed": D}, {"heads": N, "head_size": K})` has a kernel [D, N, K] and maps [..., D] to [..., N, K].
    Initialised with variance 1 / fan-in; biases with zero.
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
        kernel = stddev * jax.random.truncated_normal(rngs.params(), -2, 2, shape, jnp.float32) / 0.87962566
        self.kernel = param(kernel.astype(dtypes.param), *inputs, *outputs)
        self.bias = param(jnp.zeros(tuple(outputs.values()), dtypes.param), *outputs) if use_bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
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
        # Gathered whole along `embed` first: a lookup in a table that is split there comes out split the wrong way.
        return constrain(self.embedding[...].astype(self.dtype), "vocab", None)[tokens]


def dot_product_attention(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N K"],
    mask: Bool[Array, "#B 1 L S"] | None = None,
) -> Float[Array, "B L N K"]:
    """Softmax attention with float32 scores. A row whose keys are all masked attends evenly: defined, never NaN."""
    scores = jnp.einsum("BLNK,BSNK->BNLS", query, key, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("BNLS,BSNK->BLNK", weights, value)


class KeyValue(NamedTuple):
    """What attention attends to: the tokens of an image, of the text itself, or of the text so far (a cache)."""

    key: jax.Array  # float[B, S, N, K]
    value: jax.Array  # float[B, S, N, K]


class Attention(nnx.Module):
    """Multi-head attention of some tokens to keys and values made of the same or of other tokens."""

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs, dtypes: Dtypes):
        heads = {"heads": num_heads, "head_size": width // num_heads}
        embed = {"embed": width}
        self.query = Linear(embed, heads, rngs=rngs, dtypes=dtypes)
        self.key = Linear(embed, heads, rngs=rngs, dtypes=dtypes)
        self.value = Linear(embed, heads, rngs=rngs, dtypes=dtypes)
        self.out = Linear(heads, embed, rngs=rngs, dtypes=dtypes)

    def keys_values(self, x: Float[Array, "B S D"]) -> KeyValue:
        """Keys and values of tokens to be attended to."""
        return KeyValue(*(constrain(y, "batch", None, "heads", "head_size") for y in (self.key(x), self.value(x))))

    def __call__(
        self, x: Float[Array, "B L D"], kv: KeyValue, mask: Bool[Array, "#B 1 L S"] | None = None
    ) -> Float[Array, "B L D"]:
        query = constrain(self.query(x), "batch", None, "heads", "head_size")
        if mask is None:  # where there is no mask a fused kernel can take over; their mask handling has open bugs
            attended = jax.nn.dot_product_attention(query, kv.key, kv.value)
        else:
            attended = dot_product_attention(query, kv.key, kv.value, mask)
        return self.out(attended)


class MLP(nnx.Module):
    """Two linear maps with a GELU between."""

    def __init__(self, width: int, mlp_dim: int, activation: Activation, *, rngs: nnx.Rngs, dtypes: Dtypes):
        self.approximate = activation == "gelu_tanh"
        self.up = Linear({"embed": width}, {"mlp": mlp_dim}, rngs=rngs, dtypes=dtypes)
        self.down = Linear({"mlp": mlp_dim}, {"embed": width}, rngs=rngs, dtypes=dtypes)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        hidden = constrain(self.up(x), "batch", None, "mlp")
        return self.down(jax.nn.gelu(hidden, approximate=self.approximate))


class Layer(nnx.Module):
    """A pre-norm transformer layer: attention, then an MLP, each added to its input.

    Called with `kv` it attends to those keys and values, of an image or of a cache (`keys_values`); without, to its own
    tokens. `config` is a `VisionConfig` or `DecoderConfig`.
    """

    def __init__(self, config: Any, *, rngs: nnx.Rngs, dtypes: Dtypes):
        self.attn_norm = LayerNorm(config.width, config.norm_eps, dtypes=dtypes)
        self.attn = Attention(config.width, config.num_heads, rngs=rngs, dtypes=dtypes)
        self.mlp_norm = LayerNorm(config.width, config.norm_eps, dtypes=dtypes)
        self.mlp = MLP(config.width, config.mlp_dim, config.activation, rngs=rngs, dtypes=dtypes)

    def own_keys_values(self, x: Float[Array, "B L D"]) -> KeyValue:
        """What self-attention attends to: keys and values of the normed tokens."""
        return self.attn.keys_values(self.attn_norm(x))

    def __call__(
        self,
        x: Float[Array, "B L D"],
        kv: KeyValue | None = None,
        mask: Bool[Array, "#B 1 L S"] | None = None,
    ) -> Float[Array, "B L D"]:
        kv = self.own_keys_values(x) if kv is None else kv
        x = constrain(x + self.attn(self.attn_norm(x), kv, mask), "batch", None, "embed")
        return constrain(x + self.mlp(self.mlp_norm(x)), "batch", None, "embed")


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` modules as one, every parameter with a leading `layer` axis."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make_all(rngs):
        return make(rngs)

    layers = make_all(rngs)
    for _, variable in nnx.iter_graph(layers):
        if isinstance(variable, nnx.Param):
            variable.set_metadata(axes=("layer", *variable.axes))
    return layers


_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def scan(step: Callable, x: jax.Array, layers: Any, *, remat: Remat, unroll: int) -> jax.Array:
    """`x = step(x, layer)` for each layer of a stack, as one `jax.lax.scan`.

    `remat` is what the backward pass keeps of a layer: "none" recomputes nothing, "dots" recomputes all but the matrix
    products, "full" everything from the layer's input. `unroll` layers are laid out in each turn of the loop: XLA's CPU
    code is up to 1.7 times faster when all are.
    """
    if remat != "none":
        step = jax.checkpoint(step, policy=_REMAT_POLICIES[remat])
    depth = jax.tree.leaves(layers)[0].shape[0]
    return jax.lax.scan(lambda x, layer: (step(x, layer), None), x, layers, unroll=min(unroll, depth))[0]
