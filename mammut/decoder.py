"""The text decoder and its two passes over the same weights (paper, section 3.2).

| pass | self-attention | cross-attention | gives |
|---|---|---|---|
| contrastive pass | bidirectional, pads masked | none | features whose masked mean is the text embedding |
| caption pass | causal | after every k-th layer | features whose vocabulary scores are the caption's logits |

Which pass runs is the name of the method called, never inferred from an argument that is missing.
"""

import math
import operator

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Bool, Float, Int

from mammut.config import ModelConfig
from mammut.layers import Dtypes, Embedding, KeyValue, Layer, LayerNorm, Linear, param, scan, stack
from mammut.masks import attn_mask
from mammut.sharding import constrain
from mammut.typing import Array


@struct.dataclass
class DecodeCache:
    """Keys and values of the caption pass, by group of layers; R rows of text share the B images."""

    text: KeyValue  # float[groups, layers, R, S, N, K] each, S positions of which the first are written
    image: KeyValue  # float[groups, B, P, N, K] each


class TextDecoder(nnx.Module):
    """`depth` self-attention layers, with a cross-attention layer of its own MLP after every `cross_attn_every`-th.

    The paper inserts M cross-attention layers, M about half of N, of the decoder's own width and MLP; only with an MLP
    of their own do they have the 420M parameters it counts. It does not state their slots: here, the end of each group.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtypes: Dtypes):
        text = config.text
        self.config, self.remat, self.unroll, self.dtype = text, config.remat, config.unroll, dtypes.compute
        self.token_embed = Embedding(text.vocab_size, text.width, rngs=rngs, dtypes=dtypes)
        positions = 0.02 * jax.random.normal(rngs.params(), (text.max_length, text.width))
        self.pos_embed = param(positions.astype(dtypes.param), "text", "embed")
        self.layers = stack(lambda r: Layer(text, rngs=r, dtypes=dtypes), text.depth, rngs=rngs)
        groups = text.depth // text.cross_attn_every
        self.cross_layers = stack(lambda r: Layer(text, rngs=r, dtypes=dtypes), groups, rngs=rngs)
        self.norm = LayerNorm(text.width, text.norm_eps, dtypes=dtypes)
        self.vocab_head = (
            None
            if text.tie_embeddings
            else Linear({"embed": text.width}, {"vocab": text.vocab_size}, rngs=rngs, dtypes=dtypes, use_bias=False)
        )

    def contrastive_pass(
        self, tokens: Int[Array, "B L"], text_valid: Bool[Array, "B L"]
    ) -> Float[Array, "B L D"]:
        """Bidirectional features of the text alone, float[B, L, D]; those at pads mean nothing."""
        mask = attn_mask(text_valid, jnp.zeros(tokens.shape[1], bool))
        x = self._embed(tokens)
        x = scan(lambda x, layer: layer(x, mask=mask), x, self.layers, remat=self.remat, unroll=self.unroll)
        return self.norm(x)

    def caption_pass(
        self, tokens: Int[Array, "B L"], text_valid: Bool[Array, "B L"], image_tokens: Float[Array, "B P D"]
    ) -> Float[Array, "B L D"]:
        """Causal features that see the image, float[B, L, D]; `image_tokens` come in the decoder's width."""
        mask = attn_mask(text_valid, jnp.ones(tokens.shape[1], bool))

        def group(x, stacked):
            layers, cross_layer = stacked
            for layer in self._unstacked(layers):
                x = layer(x, mask=mask)
            return cross_layer(x, cross_layer.attn.keys_values(image_tokens))

        unroll = max(1, self.unroll // self.config.cross_attn_every)
        x = scan(group, self._embed(tokens), (self._grouped(), self.cross_layers), remat=self.remat, unroll=unroll)
        return self.norm(x)

    def cross_attention(
        self, tokens: Int[Array, "B L"], text_valid: Bool[Array, "B L"], image_tokens: Float[Array, "B P D"]
    ) -> Float[Array, "G B N L P"]:
        """Where the caption pass looks: the weights float32[G, B, N, L, P] of its G cross-attention layers, in order.

        Those of one text position and head sum to 1 over the image tokens. At position i they serve to predict token
        i + 1. The caption pass itself need not hold them: a fused kernel never does.
        """
        mask = attn_mask(text_valid, jnp.ones(tokens.shape[1], bool))

        def group(x, stacked):
            layers, cross_layer = stacked
            for layer in self._unstacked(layers):
                x = layer(x, mask=mask)
            image = cross_layer.attn.keys_values(image_tokens)
            query = cross_layer.attn.query(cross_layer.attn_norm(x))
            scores = jnp.einsum("BLNK,BPNK->BNLP", query, image.key, preferred_element_type=jnp.float32)
            return cross_layer(x, image), jax.nn.softmax(scores / math.sqrt(query.shape[-1]), axis=-1)

        return jax.lax.scan(group, self._embed(tokens), (self._grouped(), self.cross_layers))[1]

    def prefill(
        self, tokens: Int[Array, "B L"], image_tokens: Float[Array, "B P D"], length: int
    ) -> tuple[Float[Array, "B L D"], DecodeCache]:
        """The caption pass over prompts, and the cache to go on from it, with room for `length` positions.

        Pads may stand at the end of a prompt: what the cache holds of them is overwritten before it is attended to.
        """
        prompt_length = tokens.shape[1]
        mask = attn_mask(jnp.ones((1, prompt_length), bool), jnp.ones(prompt_length, bool))
        room = ((0, 0), (0, length - prompt_length), (0, 0), (0, 0))

        def group(x, stacked):
            layers, cross_layer = stacked
            kept = []
            for layer in self._unstacked(layers):
                kv = layer.own_keys_values(x)
                x = layer(x, kv, mask)
                kept.append(jax.tree.map(lambda y: jnp.pad(y, room), kv))
            image = cross_layer.attn.keys_values(image_tokens)
            return cross_layer(x, image), (_stacked(kept), image)

        x, (text, image) = jax.lax.scan(group, self._embed(tokens), (self._grouped(), self.cross_layers))
        return self.norm(x), DecodeCache(text, image)

    def cached_step(
        self, tokens: Int[Array, "R"], position: Int[Array, ""], cache: DecodeCache
    ) -> tuple[Float[Array, "R D"], DecodeCache]:
        """The caption pass for one more token of each of R rows, all at `position`: float[R, D], and the next cache.

        R is a multiple of the B images of the cache: rows [i * R / B, (i + 1) * R / B) belong to image i, whose keys
        and values they share.
        """
        rows, images = tokens.shape[0], cache.image.key.shape[1]
        x = self.token_embed(tokens[:, None]) + self.pos_embed[...][position].astype(self.dtype)
        mask = (jnp.arange(cache.text.key.shape[3]) <= position)[None, None, None]

        def group(x, stacked):
            layers, cross_layer, text, image = stacked
            kept = []
            for i, layer in enumerate(self._unstacked(layers)):
                past = jax.tree.map(operator.itemgetter(i), text)
                kv = jax.tree.map(
                    lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, position, axis=1),
                    past,
                    layer.own_keys_values(x),
                )
                x = layer(x, kv, mask)
                kept.append(kv)
            # The rows of an image ask together, as if they were the tokens of one text: its cache is never repeated.
            x = cross_layer(x.reshape(images, rows // images, -1), image)
            return x.reshape(rows, 1, -1), _stacked(kept)

        stacks = (self._grouped(), self.cross_layers, cache.text, cache.image)
        x, text = jax.lax.scan(group, x, stacks)
        return self.norm(x)[:, 0], DecodeCache(text, cache.image)

    def _grouped(self) -> Layer:
        """The self-attention layers with axes [groups, layers of a group] in front."""
        every = self.config.cross_attn_every
        return jax.tree.map(lambda x: x.reshape(-1, every, *x.shape[1:]), self.layers)

    def _unstacked(self, layers: Layer) -> list[Layer]:
        return [jax.tree.map(operator.itemgetter(i), layers) for i in range(self.config.cross_attn_every)]

    def logits(self, features: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Next-token scores float32[..., V] of features of the caption pass."""
        return jnp.matmul(features, self.vocab_kernel, preferred_element_type=jnp.float32)

    @property
    def vocab_kernel(self) -> Float[Array, "D V"]:
        """The vocabulary head float[D, V]: the token embedding transposed, or a matrix of its own."""
        if self.vocab_head is None:
            return self.token_embed.embedding[...].astype(self.dtype).T
        return self.vocab_head.kernel[...].astype(self.dtype)

    def _embed(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        length, longest = tokens.shape[1], self.config.max_length
        if length > longest:
            raise ValueError(f"the text has {length} tokens, DecoderConfig.max_length is {longest}")
        pos_embed = constrain(self.pos_embed[:length].astype(self.dtype), "text", None)
        x = self.token_embed(tokens) + pos_embed
        return constrain(x, "batch", "text", "embed")


def _stacked(kept: list[KeyValue]) -> KeyValue:
    return jax.tree.map(lambda *x: jnp.stack(x), *kept)
