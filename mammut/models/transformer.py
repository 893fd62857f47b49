"""The transformer layer: attention, MLP, and both with their norms."""

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

_ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "gelu": recomputed(lambda x: jax.nn.gelu(x, approximate=False)),
    "gelu_tanh": recomputed(lambda x: jax.nn.gelu(x, approximate=True)),
    "quick_gelu": recomputed(lambda x: x * jax.nn.sigmoid(1.702 * x)),
    "relu2": recomputed(lambda x: jnp.square(jax.nn.relu(x))),
}


def attention_weights(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B S N K"],
    mask: Bool[Array, "#B 1 L S"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B N L S"]:
    """Softmax in float32 of the scores times `scale`; None: over the root of the head size.

    A row whose keys are all masked attends evenly: defined, never NaN.
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
    """The values weighed by `attention_weights`."""
    weights = attention_weights(query, key, mask, scale).astype(value.dtype)
    return jnp.einsum("BNLS,BSNK->BLNK", weights, value)


class KeyValue(NamedTuple):
    """What attention attends to: the tokens of an image, of the text itself, or of the text so far (a cache)."""

    key: jax.Array  # float[B, S, N, K]
    value: jax.Array  # float[B, S, N, K]


@struct.dataclass
class Rotation:
    """Rotary positions (arXiv 2104.09864) of L tokens: cosines and sines, float32[L, R / 2] or [B, L, R / 2] each.

    The first R of a head's numbers are turned, in pairs (0, 1), (2, 3), ..., or, where `halves`,
    (0, R / 2), (1, R / 2 + 1), ...
    """

    cos: jax.Array
    sin: jax.Array
    halves: bool = struct.field(pytree_node=False, default=False)

    def __call__(self, x: Float[Array, "B L N K"]) -> Float[Array, "B L N K"]:
        """Turns the pairs of each head's numbers by the angles of their token."""
        size = 2 * self.cos.shape[-1]
        turned, rest = x[..., :size].astype(jnp.float32), x[..., size:]
        pairs = (size // 2, 2) if not self.halves else (2, size // 2)
        axis = -2 if self.halves else -1
        first, second = jnp.moveaxis(turned.reshape(*x.shape[:-1], *pairs), axis, 0)
        cos, sin = jnp.expand_dims(self.cos, -2), jnp.expand_dims(self.sin, -2)
        turned = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=axis)
        turned = turned.reshape(*x.shape[:-1], size).astype(x.dtype)
        return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def rotation(
    positions: Int[Array, "*B L"], size: int, theta: float, *, halves: bool = False
) -> Rotation:
    """The rotary angles of tokens at `positions`: position * theta ^ (-2 i / size) for pair i."""
    frequencies = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return Rotation(jnp.cos(angles), jnp.sin(angles), halves)


class Attention(nnx.Module):
    """Multi-head attention of some tokens to keys and values made of the same or of other tokens.

    `kv_width` is the width of those others where it differs. `config` says what it has beside the
    four maps. `fused` lets a fused kernel take over where there is no mask.
    """

    def __init__(
        self,
        config: LayerConfig,
        *,
        rngs: nnx.Rngs,
        dtypes: Dtypes,
        kv_width: int | None = None,
        fused: bool = False,
    ):
        self.fused = fused
        self.scale = None if config.attn_scale else 1.0
        self.adapter: nnx.Module | None = nnx.data(None)
        heads = {"heads": config.num_heads, "head_size": config.width // config.num_heads}
        embed, others = {"embed": config.width}, {"embed": kv_width or config.width}
        options: dict[str, Any] = {"rngs": rngs, "dtypes": dtypes, "use_bias": config.attn_bias}
        self.query = Linear(embed, heads, **options)
        self.key = Linear(others, heads, **options)
        self.value = Linear(others, heads, **options)
        out_bias = config.attn_bias if config.attn_out_bias is None else config.attn_out_bias
        self.out = Linear(heads, embed, **{**options, "use_bias": out_bias})
        self.gate = (
            Linear(embed, heads, **{**options, "use_bias": config.gate_bias})
            if config.attn_gate
            else None
        )
        norms = [
            make_norm(config, dtypes=dtypes, width=heads["head_size"], axis="head_size")
            if config.qk_norm
            else None
            for _ in range(2)
        ]
        self.query_norm, self.key_norm = norms

    def queries(
        self, x: Float[Array, "B L D"], rotate: Rotation | None = None
    ) -> Float[Array, "B L N K"]:
        """What tokens ask."""
        query = self.query(x) if self.query_norm is None else self.query_norm(self.query(x))
        return constrain(
            query if rotate is None else rotate(query), "batch", None, "heads", "head_size"
        )

    def keys_values(self, x: Float[Array, "B S D"], rotate: Rotation | None = None) -> KeyValue:
        """Keys and values of tokens to be attended to."""
        key = self.key(x) if self.key_norm is None else self.key_norm(self.key(x))
        key = key if rotate is None else rotate(key)
        return KeyValue(
            *(constrain(y, "batch", None, "heads", "head_size") for y in (key, self.value(x)))
        )

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
        else:  # by hand: the mask handling of fused kernels has open bugs, and texts are short
            attended = dot_product_attention(query, kv.key, kv.value, mask, self.scale)
        if self.gate is not None:
            attended = attended * jax.nn.sigmoid(self.gate(x))
        return self.out(attended)


class MLP(nnx.Module):
    """Two linear maps with an activation between; of "swiglu", the first is gated by a third (arXiv 2002.05202)."""

    def __init__(self, config: LayerConfig, *, rngs: nnx.Rngs, dtypes: Dtypes):
        self.activation = config.activation
        self.adapter: nnx.Module | None = nnx.data(None)
        options: dict[str, Any] = {"rngs": rngs, "dtypes": dtypes, "use_bias": config.mlp_bias}
        self.up = Linear({"embed": config.width}, {"mlp": config.mlp_dim}, **options)
        self.down = Linear({"mlp": config.mlp_dim}, {"embed": config.width}, **options)
        self.gate = (
            Linear({"embed": config.width}, {"mlp": config.mlp_dim}, **options)
            if self.activation == "swiglu"
            else None
        )

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return adapted(self, self._map, x)

    def _map(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        hidden = constrain(self.up(x), "batch", None, "mlp")
        if self.gate is None:
            return self.down(_ACTIVATIONS[self.activation](hidden))
        return self.down(hidden * jax.nn.silu(constrain(self.gate(x), "batch", None, "mlp")))


class Layer(nnx.Module):
    """A pre-norm transformer layer: attention, then an MLP, each added to its input; or both to one input, parallel.

    Called with `kv` it attends to those keys and values, of an image or of a cache
    (`image_keys_values`, `own_keys_values`); without, to its own tokens. `has_mlp` False leaves the
    MLP out; `image_norm` norms image tokens, which have the size `image_width`; None: the tower's
    width. `fused` is that of `Attention`.
    """

    def __init__(
        self,
        config: LayerConfig,
        *,
        rngs: nnx.Rngs,
        dtypes: Dtypes,
        has_mlp: bool = True,
        image_norm: bool = False,
        image_width: int | None = None,
        fused: bool = False,
    ):
        self.attn_norm = make_norm(config, dtypes=dtypes)
        self.attn = Attention(config, rngs=rngs, dtypes=dtypes, kv_width=image_width, fused=fused)
        self.image_norm = (
            make_norm(config, dtypes=dtypes, width=image_width) if image_norm else None
        )
        self.parallel = config.layout != "serial"
        self.mlp_norm = (
            make_norm(config, dtypes=dtypes) if has_mlp and config.layout != "parallel" else None
        )
        self.mlp = MLP(config, rngs=rngs, dtypes=dtypes) if has_mlp else None

    def own_keys_values(self, x: Float[Array, "B L D"], rotate: Rotation | None = None) -> KeyValue:
        """What self-attention attends to: keys and values of the normed tokens."""
        return self.attn.keys_values(self.attn_norm(x), rotate)

    def image_keys_values(self, image_tokens: Float[Array, "B P D"]) -> KeyValue:
        """What cross-attention attends to."""
        return self.attn.keys_values(
            image_tokens if self.image_norm is None else self.image_norm(image_tokens)
        )

    def attend(
        self,
        x: Float[Array, "B L D"],
        kv: KeyValue | None = None,
        mask: Bool[Array, "#B 1 L S"] | None = None,
        rotate: Rotation | None = None,
    ) -> Float[Array, "B L D"]:
        """The first half of the layer; of a parallel one, whose MLP reads the same input, all of it."""
        normed = self.attn_norm(x)
        kv = self.attn.keys_values(normed, rotate) if kv is None else kv
        y = x + self.attn(normed, kv, mask, rotate)
        if self.parallel and self.mlp is not None:
            y = y + self.mlp(normed if self.mlp_norm is None else self.mlp_norm(x))
        return constrain(y, "batch", None, "embed")

    def feed_forward(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """The second half: `x` as it is where there is no MLP, or none left to do."""
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
