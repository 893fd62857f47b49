"""The transformer layer of both towers.

It has attention, an MLP, and norms between them.

Axes in einsum strings: B batch, L tokens with queries, S tokens with keys and values, N heads, K
head size, D width.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Bool, Float, Int

from mammut.core.sharding import constrain
from mammut.core.typing import Array
from mammut.models.attention_kernels import attention_kernel
from mammut.models.compute import Dtypes, recomputed
from mammut.models.layers import Activation, LayerConfig, Linear, adapted, make_norm


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _relu2(x: jax.Array) -> jax.Array:
    return jnp.square(jax.nn.relu(x))


_ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "gelu": recomputed(_gelu),
    "gelu_tanh": recomputed(_gelu_tanh),
    "quick_gelu": recomputed(_quick_gelu),
    "relu2": recomputed(_relu2),
}


def attention_weights(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B S N K"],
    mask: Bool[Array, "#B 1 L S"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B N L S"]:
    """Computes attention weights, float32[B, N, L, S].

    The weights are a softmax of the scores, in float32.

    `scale` multiplies the scores; None: 1 / sqrt(head size). A query whose keys are all masked
    attends to all alike: its weights are defined, never NaN.
    """
    scores = jnp.einsum("BLNK,BSNK->BNLS", query, key, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(query.shape[-1]) if scale is None else scores * scale
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)


def dot_product_attention(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N K"],
    mask: Bool[Array, "#B 1 L S"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B L N K"]:
    """Sums the values weighed by `attention_weights`, float[B, L, N, K]."""
    weights = attention_weights(query, key, mask, scale).astype(value.dtype)
    return jnp.einsum("BNLS,BSNK->BLNK", weights, value)


class KeyValue(NamedTuple):
    """Keys and values of tokens.

    The tokens are of an image, a text, or the beginning of a text.
    """

    key: jax.Array  # float[B, S, N, K]
    value: jax.Array  # float[B, S, N, K]


@struct.dataclass
class Rotation:
    """Rotary positions (arXiv 2104.09864) of L tokens, as cosines and sines.

    Both are float32[L, R / 2] or float32[B, L, R / 2]. The first R of a head's numbers are turned,
    in pairs (0, 1), (2, 3), ..., or, where `halves`, (0, R / 2), (1, R / 2 + 1), ...
    """

    cos: jax.Array
    sin: jax.Array
    halves: bool = struct.field(pytree_node=False, default=False)

    def __call__(self, x: Float[Array, "B L N K"]) -> Float[Array, "B L N K"]:
        """Rotates the pairs of each head by their token's angles."""
        size = 2 * self.cos.shape[-1]
        turned = x[..., :size].astype(jnp.float32)
        rest = x[..., size:]
        if self.halves:
            pairs = (2, size // 2)
            axis = -2
        else:
            pairs = (size // 2, 2)
            axis = -1
        first, second = jnp.moveaxis(turned.reshape(*x.shape[:-1], *pairs), axis, 0)

        cos = jnp.expand_dims(self.cos, -2)
        sin = jnp.expand_dims(self.sin, -2)
        turned = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=axis)
        turned = turned.reshape(*x.shape[:-1], size).astype(x.dtype)
        return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def rotation(
    positions: Int[Array, "*B L"], size: int, theta: float, *, halves: bool = False
) -> Rotation:
    """Computes rotary angles at `positions`.

    Pair i gets position * theta^(-2 i / size).
    """
    frequencies = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return Rotation(jnp.cos(angles), jnp.sin(angles), halves)


class Attention(nnx.Module):
    """Multi-head attention of tokens to themselves or to other tokens.

    Args:
      config: the layers of the tower; what attention has beside its four maps.
      dtypes: the number types.
      kv_width: the width of the tokens with keys and values; None: the tower's.
      fused: lets a fused kernel compute it where there is no mask.
    """

    def __init__(
        self,
        config: LayerConfig,
        *,
        dtypes: Dtypes,
        kv_width: int | None = None,
        fused: bool = False,
    ):
        self.fused = fused
        self.scale = None if config.attn_scale else 1.0
        self.adapter: nnx.Module | None = nnx.data(None)

        head_size = config.width // config.num_heads
        heads = {"heads": config.num_heads, "head_size": head_size}
        embed = {"embed": config.width}
        others = {"embed": kv_width or config.width}
        options: dict[str, Any] = {"dtypes": dtypes, "use_bias": config.attn_bias}
        self.query = Linear(embed, heads, **options)
        self.key = Linear(others, heads, **options)
        self.value = Linear(others, heads, **options)
        out_bias = config.attn_bias if config.attn_out_bias is None else config.attn_out_bias
        self.out = Linear(heads, embed, dtypes=dtypes, use_bias=out_bias)

        if config.attn_gate:
            self.gate = Linear(embed, heads, dtypes=dtypes, use_bias=config.gate_bias)
        else:
            self.gate = None
        if config.qk_norm:
            norm = {"dtypes": dtypes, "width": head_size, "axis": "head_size"}
            self.query_norm = make_norm(config, **norm)
            self.key_norm = make_norm(config, **norm)
        else:
            self.query_norm = None
            self.key_norm = None

    def queries(
        self, x: Float[Array, "B L D"], rotate: Rotation | None = None
    ) -> Float[Array, "B L N K"]:
        """Computes the queries of tokens, float[B, L, N, K]."""
        query = self.query(x)
        if self.query_norm is not None:
            query = self.query_norm(query)
        if rotate is not None:
            query = rotate(query)
        return constrain(query, "batch", None, "heads", "head_size")

    def keys_values(self, x: Float[Array, "B S D"], rotate: Rotation | None = None) -> KeyValue:
        """Computes the keys and values of tokens, float[B, S, N, K] each."""
        key = self.key(x)
        if self.key_norm is not None:
            key = self.key_norm(key)
        if rotate is not None:
            key = rotate(key)
        axes = ("batch", None, "heads", "head_size")
        return KeyValue(constrain(key, *axes), constrain(self.value(x), *axes))

    def __call__(
        self,
        x: Float[Array, "B L D"],
        kv: KeyValue,
        mask: Bool[Array, "#B 1 L S"] | None = None,
        rotate: Rotation | None = None,
    ) -> Float[Array, "B L D"]:
        return adapted(self, lambda x: self._attend(x, kv, mask, rotate), x)

    def _attend(
        self,
        x: Float[Array, "B L D"],
        kv: KeyValue,
        mask: jax.Array | None,
        rotate: Rotation | None,
    ) -> Float[Array, "B L D"]:
        query = self.queries(x, rotate)
        if mask is None:
            kernel = attention_kernel(query.dtype, *query.shape[1::2]) if self.fused else "xla"
            attended = jax.nn.dot_product_attention(
                query, kv.key, kv.value, scale=self.scale, implementation=kernel
            )
        else:
            # No fused kernel is used: these have open bugs in their handling of masks, and texts
            # are short.
            attended = dot_product_attention(query, kv.key, kv.value, mask, self.scale)
        if self.gate is not None:
            attended = attended * jax.nn.sigmoid(self.gate(x))
        return self.out(attended)


class MLP(nnx.Module):
    """Two linear maps with an activation between them.

    With "swiglu" a third map gates the first (arXiv 2002.05202).
    """

    def __init__(self, config: LayerConfig, *, dtypes: Dtypes):
        self.activation = config.activation
        self.adapter: nnx.Module | None = nnx.data(None)
        embed = {"embed": config.width}
        hidden = {"mlp": config.mlp_dim}
        options: dict[str, Any] = {"dtypes": dtypes, "use_bias": config.mlp_bias}
        self.up = Linear(embed, hidden, **options)
        self.down = Linear(hidden, embed, **options)
        self.gate = Linear(embed, hidden, **options) if self.activation == "swiglu" else None

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return adapted(self, self._map, x)

    def _map(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        hidden = constrain(self.up(x), "batch", None, "mlp")
        if self.gate is None:
            return self.down(_ACTIVATIONS[self.activation](hidden))
        gate = constrain(self.gate(x), "batch", None, "mlp")
        return self.down(hidden * jax.nn.silu(gate))


class Layer(nnx.Module):
    """A pre-norm transformer layer: attention, then an MLP.

    The output of each is added to its input. In a parallel layer both read the same input. With
    `kv` the layer attends to these keys and values, of an image or of a cache (`image_keys_values`,
    `own_keys_values`); without `kv` it attends to its own tokens.

    Args:
      config: the layers of the tower.
      dtypes: the number types.
      has_mlp: whether there is an MLP.
      image_norm: whether image tokens are normed first.
      image_width: the size of image tokens; None: the tower's width.
      fused: as in `Attention`.
    """

    def __init__(
        self,
        config: LayerConfig,
        *,
        dtypes: Dtypes,
        has_mlp: bool = True,
        image_norm: bool = False,
        image_width: int | None = None,
        fused: bool = False,
    ):
        self.parallel = config.layout != "serial"
        self.attn_norm = make_norm(config, dtypes=dtypes)
        self.attn = Attention(config, dtypes=dtypes, kv_width=image_width, fused=fused)
        if image_norm:
            self.image_norm = make_norm(config, dtypes=dtypes, width=image_width)
        else:
            self.image_norm = None
        if has_mlp and config.layout != "parallel":
            self.mlp_norm = make_norm(config, dtypes=dtypes)
        else:
            self.mlp_norm = None
        self.mlp = MLP(config, dtypes=dtypes) if has_mlp else None

    def own_keys_values(self, x: Float[Array, "B L D"], rotate: Rotation | None = None) -> KeyValue:
        """Computes keys and values of the normed tokens, for self-attention."""
        return self.attn.keys_values(self.attn_norm(x), rotate)

    def image_keys_values(self, image_tokens: Float[Array, "B P D"]) -> KeyValue:
        """Computes keys and values of the image tokens, for cross-attention."""
        if self.image_norm is not None:
            image_tokens = self.image_norm(image_tokens)
        return self.attn.keys_values(image_tokens)

    def attend(
        self,
        x: Float[Array, "B L D"],
        kv: KeyValue | None = None,
        mask: Bool[Array, "#B 1 L S"] | None = None,
        rotate: Rotation | None = None,
    ) -> Float[Array, "B L D"]:
        """Runs the first half of the layer, the attention.

        In a parallel layer it runs the whole layer.
        """
        normed = self.attn_norm(x)
        if kv is None:
            kv = self.attn.keys_values(normed, rotate)
        y = x + self.attn(normed, kv, mask, rotate)
        if self.parallel and self.mlp is not None:
            if self.mlp_norm is not None:
                normed = self.mlp_norm(x)
            y = y + self.mlp(normed)
        return constrain(y, "batch", None, "embed")

    def feed_forward(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Runs the second half of the layer, its MLP.

        It does nothing where `attend` has already run the MLP.
        """
        if self.mlp is None or self.parallel:
            return x
        return constrain(x + self.mlp(self.mlp_norm(x)), "batch", None, "embed")

    def __call__(
        self,
        x: Float[Array, "B L D"],
        kv: KeyValue | None = None,
        mask: Bool[Array, "#B 1 L S"] | None = None,
        rotate: Rotation | None = None,
    ) -> Float[Array, "B L D"]:
        return self.feed_forward(self.attend(x, kv, mask, rotate))
