"""The text decoder and its passes over the same weights (MaMMUT, section 3.2; MAGMA, arXiv 2112.05253, section 3).

| pass | self-attention | the image | gives |
|---|---|---|---|
| contrastive pass | bidirectional, pads masked | unseen | features whose masked mean is the text embedding |
| caption pass | causal | cross-attention, once in every k layers | features whose vocabulary scores are the logits |
| caption pass | causal | a prefix in place of the start token | the same |
| language pass | causal | unseen | the same, of a text alone |

Which pass runs is the name of the method called, never inferred from an argument that is missing;
how the caption pass sees the image is the model's `ModelConfig.conditioning`. `both_passes` runs
two in one traversal, stacked on an axis of their own.

An image prefix, float[B, P, D], may be any sequence of embeddings, such as that of several images
and the texts between them. It has the place of the start token: positions are [prefix, tokens[:,
1:]], and the feature of the prefix's last position is the start's. So tokens, labels, loss masks
and features are those of a text [start, ..., end] either way.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int

from mammut.core.fields import require, require_at_most, require_positive
from mammut.core.sharding import constrain
from mammut.core.typing import Array
from mammut.models.compute import Dtype, Dtypes, scan, stack
from mammut.models.layers import Embedding, LayerConfig, Linear, make_norm, param
from mammut.models.masks import attn_mask, shift_valid
from mammut.models.transformer import Layer, Rotation, attention_weights, rotation


@dataclasses.dataclass(frozen=True)
class DecoderConfig(LayerConfig):
    """The text decoder: `depth` self-attention layers and `depth / cross_attn_every` cross-attention layers, or none.

    The defaults are MaMMUT as its paper has it; the other values make up the models of others
    (`mammut.interop`).
    """

    vocab_size: int = 64_000
    max_length: int = 64  # tokens, start and end included
    # one cross-attention layer for every k self-attention layers; 0: none
    cross_attn_every: int = 2
    # Where in such a group: after its last layer or its first, as a layer with an MLP of its own;
    # or between the self-attention and the MLP of the first, without.
    cross_attn_position: Literal["last", "first", "inside"] = "last"
    # False: the layer that a cross-attention layer follows has no MLP
    mlp_before_cross_attn: bool = True
    image_norm: bool = False  # every cross-attention layer norms the image tokens first
    # Rotary, in self-attention: rope turns interleaved pairs of a head's numbers (GPT-J), rope_half
    # pairs its first half with its second (GPT-NeoX).
    positions: Literal["learned", "rope", "rope_half"] = "learned"
    rope_dims: int | None = None  # the first so many of a head's numbers are turned; None: all
    rope_theta: float = 10_000.0
    # In the caption pass a token of layer i sees the last local_windows[i % n] tokens, itself
    # included; 0: all.
    local_windows: tuple[int, ...] = (0,)
    tie_embeddings: bool = True  # the vocabulary head is the token embedding, transposed
    vocab_bias: bool = False
    # How the contrastive pass becomes an embedding: the mean over real tokens, over all positions,
    # the token at the last position, the last real token (the end), the class token; none: there is
    # no contrastive pass.
    pooling: Literal["mean", "mean_all", "last", "end", "class", "none"] = "mean"
    # Layers in front of the others, without cross-attention, that alone make the text embedding:
    # the text tower of CoCa; with `depth` 0, a model without a caption pass, that of SigLIP.
    text_only_depth: int = 0
    text_only_heads: int | None = None  # None: `num_heads`
    causal_contrastive: bool = False  # the contrastive pass is causal, too
    class_token: bool = False  # a learned token at the end of the contrastive pass
    # Pads that no token attends to: in both passes, in the contrastive pass, in none. "shifted" is
    # open_clip's CoCa: of its text-only layers, and one position too late.
    pad_masking: Literal["both", "contrastive", "none", "shifted"] = "both"
    pad_id: int | None = None  # this id is a pad wherever it stands; None: only `text_valid` tells
    # Storage of the decoder's parameters; None: `ModelConfig.param_dtype`. bfloat16 is for a frozen
    # decoder: of a trained one it would round small updates away.
    param_dtype: Dtype | None = None

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "vocab_size", "rope_theta")
        require_at_most(self, {"vocab_size": 2**24, "max_length": 2**17, "text_only_depth": 2**10})
        require(
            self.max_length >= 2,
            f"DecoderConfig.max_length is {self.max_length}, expected at least 2 tokens",
        )
        for name in ("depth", "text_only_depth"):
            require(
                getattr(self, name) >= 0,
                f"DecoderConfig.{name} is {getattr(self, name)}, expected at least 0",
            )
        require(
            self.depth + self.text_only_depth > 0,
            "DecoderConfig.depth is 0, expected at least 1 layer",
        )
        every, windows = self.cross_attn_every, self.local_windows
        require(every >= 0, f"DecoderConfig.cross_attn_every is {every}, expected at least 0")
        require(
            not every or self.depth % every == 0,
            f"DecoderConfig.depth {self.depth} is not a multiple of cross_attn_every {every}",
        )
        require(
            len(windows) > 0 and min(windows) >= 0 and (every or self.depth) % len(windows) == 0,
            f"DecoderConfig.local_windows is {windows}, expected numbers of tokens, 0 or more, as many as divide "
            f"{f'cross_attn_every {every}' if every else f'the depth {self.depth}'}",
        )
        require(
            windows == (0,) or self.pooling == "none",
            f"DecoderConfig.local_windows is {windows}, which needs pooling 'none': a contrastive pass has no windows",
        )
        require(
            self.layout == "serial" or not every or self.cross_attn_position != "inside",
            f"DecoderConfig.layout is {self.layout!r}, which has no place between attention and MLP for "
            "cross_attn_position 'inside'",
        )
        require(
            every > 0 or self.mlp_before_cross_attn,
            "DecoderConfig.mlp_before_cross_attn is False, which needs cross-attention: cross_attn_every is 0",
        )
        require(
            self.mlp_before_cross_attn or self.cross_attn_position != "inside",
            "DecoderConfig.mlp_before_cross_attn is False, which cross_attn_position 'inside' has no place for",
        )
        require(
            self.pad_id is None or 0 <= self.pad_id < self.vocab_size,
            f"DecoderConfig.pad_id is {self.pad_id}, expected an id below vocab_size {self.vocab_size}",
        )
        require(
            not self.vocab_bias or self.depth > 0,
            "DecoderConfig.vocab_bias is True, which needs a caption pass: depth is 0",
        )
        heads = self.text_only_heads
        require(
            heads is None or (heads > 0 and self.width % heads == 0),
            f"DecoderConfig.text_only_heads is {heads}, expected a divisor of the width {self.width}",
        )
        require(
            self.class_token == (self.pooling == "class"),
            f"DecoderConfig.class_token is {self.class_token}, which does not go with pooling {self.pooling!r}",
        )
        head_size = self.width // self.num_heads
        require(
            self.positions == "learned" or head_size % 2 == 0,
            f"DecoderConfig.positions is {self.positions!r}, which needs heads of even size, not {head_size}",
        )
        dims = self.rope_dims
        require(
            dims is None
            or (self.positions != "learned" and 0 < dims <= head_size and dims % 2 == 0),
            f"DecoderConfig.rope_dims is {dims}, expected an even number up to the head size {head_size}, with rotary "
            f"positions, not {self.positions!r}",
        )
        require(
            self.pad_masking != "shifted" or (self.class_token and self.text_only_depth > 0),
            "DecoderConfig.pad_masking is 'shifted', which needs class_token and text_only_depth",
        )

    @property
    def num_cross_layers(self) -> int:
        """Layers that attend to the image."""
        return self.depth // self.cross_attn_every if self.cross_attn_every else 0

    @property
    def whole_length(self) -> bool:
        """Whether the text embedding depends on the last position, so that texts are padded to `max_length`."""
        return self.pooling in ("mean_all", "last", "class")

    @property
    def group_size(self) -> int:
        """Self-attention layers that are laid out together: those that share a cross-attention layer, or windows."""
        return self.cross_attn_every or len(self.local_windows)


class TextDecoder(nnx.Module):
    """`depth` self-attention layers, and a cross-attention layer with its own MLP for every `cross_attn_every` of them.

    The paper inserts M cross-attention layers, M about half of N, of the decoder's own width and
    MLP; only with an MLP of their own do they have the 420M parameters it counts. It does not state
    their slots: here, the end of each group. `DecoderConfig` moves them for the models of others,
    and puts layers in front that only the text goes through.
    """

    def __init__(self, config: Any, *, rngs: nnx.Rngs, dtypes: Dtypes):
        text = config.text
        self.config, self.remat, self.unroll, self.dtype = (
            text,
            config.remat,
            config.unroll,
            dtypes.compute,
        )
        self.has_prefix = config.conditioning == "prefix"

        def layers(depth, config=text, **options):
            return (
                stack(lambda r: Layer(config, rngs=r, dtypes=dtypes, **options), depth, rngs=rngs)
                if depth
                else None
            )

        def vectors(count):
            values = 0.02 * jax.random.normal(rngs.params(), (count, text.width))
            return param(values.astype(dtypes.param), "text", "embed")

        self.token_embed = Embedding(text.vocab_size, text.width, rngs=rngs, dtypes=dtypes)
        self.pos_embed = (
            vectors(text.max_length + text.class_token) if text.positions == "learned" else None
        )
        groups = text.num_cross_layers
        # Self-attention layers: those with an MLP, and those without, one in each group, where
        # there are any.
        self.layers = layers(text.depth if text.mlp_before_cross_attn else text.depth - groups)
        inside = text.cross_attn_position == "inside"
        self.cross_layers = layers(
            groups,
            has_mlp=not inside,
            image_norm=text.image_norm,
            image_width=config.image_token_size,
        )
        self.norm = make_norm(text, dtypes=dtypes) if text.depth else None
        self.vocab_head = (
            None
            if text.tie_embeddings or not text.depth
            else Linear(
                {"embed": text.width},
                {"vocab": text.vocab_size},
                rngs=rngs,
                dtypes=dtypes,
                use_bias=False,
            )
        )
        self.vocab_head_bias = (
            param(jnp.zeros(text.vocab_size, dtypes.param), "vocab") if text.vocab_bias else None
        )
        self.bare_layers = None if text.mlp_before_cross_attn else layers(groups, has_mlp=False)
        text_only = dataclasses.replace(text, num_heads=text.text_only_heads or text.num_heads)
        self.text_only_layers = layers(text.text_only_depth, text_only)
        self.text_only_norm = make_norm(text, dtypes=dtypes) if text.text_only_depth else None
        self.class_embed = vectors(1) if text.class_token else None

    def valid(self, tokens: Int[Array, "*B"], text_valid: Bool[Array, "*B"]) -> Bool[Array, "*B"]:
        """Real tokens: those of `text_valid` that are not `DecoderConfig.pad_id`."""
        return (
            text_valid
            if self.config.pad_id is None
            else text_valid & (tokens != self.config.pad_id)
        )

    def contrastive_pass(
        self, tokens: Int[Array, "B L"], text_valid: Bool[Array, "B L"]
    ) -> Float[Array, "B Lc D"]:
        """Features of the text alone, float[B, L, D], as a rule bidirectional; those at pads mean nothing.

        With `DecoderConfig.class_token` there is one more at the end, the class token's.
        """
        text = self.config
        if text.pooling == "none":
            raise ValueError("the model has no contrastive pass: DecoderConfig.pooling is 'none'")
        x = self._embed(tokens, class_token=text.class_token)
        mask = self._contrastive_mask(tokens, text_valid, x.shape[1])
        rotate = self.rotation_at(jnp.arange(x.shape[1]))
        if self.text_only_layers is not None:
            return self.text_only_norm(self._text_only(x, mask, rotate))
        if self.bare_layers is None:
            x = self._scan(
                lambda x, layer: layer(x, mask=mask, rotate=rotate), x, self.layers, self.unroll
            )
            return self.norm(x)

        def group(x, stacked):
            for layer in self._in_order(stacked):
                x = layer(x, mask=mask, rotate=rotate)
            return x

        return self.norm(self._scan(group, x, self.groups(), self._unrolled_groups))

    def caption_pass(
        self,
        tokens: Int[Array, "B L"],
        text_valid: Bool[Array, "B L"],
        image_tokens: Float[Array, "B P Dv"],
        prefix_valid: Bool[Array, "B P"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Causal features that see the image, float[B, L, D]; `image_tokens` come from `MaMMUT.image_tokens`.

        Of an image prefix, `prefix_valid` marks what is no pad; None: all of it. Pads stand at its
        front.
        """
        x, mask, rotate = self.caption_start(tokens, text_valid, image_tokens, prefix_valid)
        x = self._causal(
            x, mask, rotate, lambda layer, x: layer(x, layer.image_keys_values(image_tokens))
        )
        return x[:, image_tokens.shape[1] - 1 :] if self.has_prefix else x

    def language_pass(
        self, tokens: Int[Array, "B L"], text_valid: Bool[Array, "B L"]
    ) -> Float[Array, "B L D"]:
        """Causal features of a text alone, float[B, L, D]: those of a language model."""
        return self.causal_pass(self.token_embed(tokens), self.valid(tokens, text_valid))

    def causal_pass(
        self, x: Float[Array, "B L D"], valid: Bool[Array, "B L"] | None = None
    ) -> Float[Array, "B L D"]:
        """Causal features of embeddings, float[B, L, D], cross-attention left out.

        Positions are added here; they count what is `valid`, so that pads may stand in front. None:
        all is.
        """
        self._require_causal()
        valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
        x, mask, rotate = self._placed(x, valid)
        if self.text_only_layers is not None:
            x = self._text_only(x, mask, rotate)
        return self._causal(x, mask, rotate, lambda layer, x: x)

    def _causal(
        self, x: jax.Array, mask: jax.Array, rotate: Rotation | None, see_image: Callable
    ) -> jax.Array:
        def attend_text(layer, x, window):
            return layer.attend(x, mask=within(mask, window), rotate=rotate)

        def group(x, stacked):
            return self.caption_group(stacked, x, attend_text, see_image)

        return self.norm(self._scan(group, x, self.groups(), self._unrolled_groups))

    def both_passes(
        self,
        tokens: Int[Array, "B L"],
        text_valid: Bool[Array, "B L"],
        image_tokens: Float[Array, "B P Dv"],
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"]]:
        """What `contrastive_pass` and `caption_pass` give, in one traversal: under FSDP each weight is gathered once.

        The passes lie on a new leading axis, float[2, B, L, D]: side by side on the batch axis,
        which is split over devices, rows would move between them. Cross-attention layers see the
        caption pass alone. `ModelConfig` refuses models whose passes differ in length or layers.
        """
        x, caption_mask, rotate = self.caption_start(tokens, text_valid, image_tokens)
        contrastive_mask = self._contrastive_mask(tokens, text_valid, x.shape[1])
        masks = jnp.stack(jnp.broadcast_arrays(contrastive_mask, caption_mask))

        def in_both(step, *stacked):
            # No mesh axis for the new dimension: that pins it whole, where `None` would leave it to
            # the compiler.
            return jax.vmap(step, spmd_axis_name=())(*stacked)

        def see_image(layer, x):
            return jnp.stack([x[0], layer(x[1], layer.image_keys_values(image_tokens))])

        def group(x, stacked):
            return self.caption_group(
                stacked,
                x,
                lambda layer, x, _: in_both(
                    lambda x, mask: layer.attend(x, mask=mask, rotate=rotate), x, masks
                ),
                see_image,
                lambda layer, x: in_both(layer.feed_forward, x),
            )

        x = jnp.stack([x, x])
        contrastive, caption = self.norm(self._scan(group, x, self.groups(), self._unrolled_groups))
        return contrastive, caption

    def cross_attention(
        self,
        tokens: Int[Array, "B L"],
        text_valid: Bool[Array, "B L"],
        image_tokens: Float[Array, "B P Dv"],
    ) -> Float[Array, "G B N L P"]:
        """Where the caption pass looks: the weights float32[G, B, N, L, P] of its G cross-attention layers, in order.

        Those of one text position and head sum to 1 over the image tokens. At position i they serve
        to predict token i + 1. The caption pass itself need not hold them: a fused kernel never
        does. With an image prefix they are the shares that the image has in the self-attention of
        all G layers, and sum to 1 with those of the text.
        """
        x, mask, rotate = self.caption_start(tokens, text_valid, image_tokens)
        size = image_tokens.shape[1]

        def group(x, stacked):
            weights = []

            def see_image(layer, x):
                image, query = (
                    layer.image_keys_values(image_tokens),
                    layer.attn.queries(layer.attn_norm(x)),
                )
                weights.append(attention_weights(query, image.key, scale=layer.attn.scale))
                return layer(x, image)

            def attend_text(layer, x, window):
                kv, seen = layer.own_keys_values(x, rotate), within(mask, window)
                if self.has_prefix:
                    query = layer.attn.queries(layer.attn_norm(x), rotate)
                    shares = attention_weights(query, kv.key, seen, layer.attn.scale)
                    weights.append(shares[:, :, size - 1 :, :size])
                return layer.attend(x, kv, seen, rotate)

            return self.caption_group(stacked, x, attend_text, see_image), jnp.stack(weights)

        weights = jax.lax.scan(group, x, self.groups())[1]
        return weights.reshape(-1, *weights.shape[2:])

    def _require_causal(self) -> None:
        if not self.config.depth:
            raise ValueError("the model has no caption pass: DecoderConfig.depth is 0")

    def caption_start(
        self,
        tokens: Int[Array, "B L"],
        text_valid: Bool[Array, "B L"],
        image_tokens: Float[Array, "B P Dv"],
        prefix_valid: Bool[Array, "B P"] | None = None,
        layer: Callable | None = None,
    ) -> tuple[Float[Array, "B Lp D"], Bool[Array, "#B 1 Lp Lp"], Rotation | None]:
        """What the groups of the caption pass start from: the embedded text, behind its prefix where there is one, and
        after the text-only layers; mask, angles.

        `layer(layer, x, mask, rotate)` runs one text-only layer, for those who keep something of
        each.
        """
        self._require_causal()
        valid = self.valid(tokens, text_valid)
        if self.has_prefix:
            prefix_valid = (
                jnp.ones(image_tokens.shape[:2], bool) if prefix_valid is None else prefix_valid
            )
            valid = self.behind_prefix(prefix_valid, valid)
            x = jnp.concatenate(
                [image_tokens.astype(self.dtype), self.token_embed(tokens[:, 1:])], axis=1
            )
            return self._placed(x[:, : valid.shape[1]], valid)
        causal = jnp.ones(tokens.shape[1], bool)
        both = self.config.pad_masking == "both"
        mask = attn_mask(valid if both else jnp.ones((1, tokens.shape[1]), bool), causal)
        rotate = self.rotation_at(jnp.arange(tokens.shape[1]))
        x = self._embed(tokens)
        if self.text_only_layers is not None:
            early = (
                attn_mask(shift_valid(valid)[:, : tokens.shape[1]], causal)
                if self.shifted
                else mask
            )
            if layer is None:
                x = self._text_only(x, early, rotate)
            else:
                for i in range(self.config.text_only_depth):
                    x = layer(
                        jax.tree.map(operator.itemgetter(i), self.text_only_layers),
                        x,
                        early,
                        rotate,
                    )
        return x, mask, rotate

    def behind_prefix(
        self, prefix_valid: Bool[Array, "B P"], valid: Bool[Array, "B L"]
    ) -> Bool[Array, "B Lp"]:
        """What is no pad, of prefix and text together; before the first token of a text, all of the prefix but its
        last position.
        """
        together = jnp.concatenate([prefix_valid, valid[:, 1:]], axis=1)
        return together[:, : prefix_valid.shape[1] - 1 + valid.shape[1]]

    def _placed(
        self, x: Float[Array, "B L D"], valid: Bool[Array, "B L"]
    ) -> tuple[Float[Array, "B L D"], Bool[Array, "B 1 L L"], Rotation | None]:
        """Embeddings with their positions, which count what is valid; mask, angles."""
        self._require_length(x.shape[1])
        places = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
        if self.pos_embed is not None:
            x = x + constrain(self.pos_embed[...].astype(self.dtype), None, None)[places]
        mask = attn_mask(valid, jnp.ones(x.shape[1], bool))
        return constrain(x, "batch", "text", "embed"), mask, self.rotation_at(places)

    def caption_group(
        self,
        stacked: Any,
        x: jax.Array,
        attend_text: Callable,
        see_image: Callable,
        feed_forward: Callable = Layer.feed_forward,
    ) -> jax.Array:
        """One group of the caption pass: `attend_text(layer, x, window)` is the self-attention of a layer,
        `feed_forward` its MLP, `see_image(layer, x)` a whole cross-attention layer.
        """
        text, cross_layer, position = self.config, stacked[-1], self.config.cross_attn_position
        slot = (
            (text.cross_attn_every - 1 if position == "last" else 0)
            if cross_layer is not None
            else None
        )
        for i, layer in enumerate(self._in_order(stacked)):
            x = attend_text(layer, x, text.local_windows[i % len(text.local_windows)])
            if i == slot and position == "inside":
                x = see_image(cross_layer, x)
            x = feed_forward(layer, x)
            if i == slot and position != "inside":
                x = see_image(cross_layer, x)
        return x

    def _contrastive_mask(
        self, tokens: Int[Array, "B L"], text_valid: Bool[Array, "B L"], length: int
    ) -> Bool[Array, "#B 1 Lc Lc"]:
        """Who attends to whom in the contrastive pass, over `length` positions: a class token stands after the text."""
        text, valid = self.config, self.valid(tokens, text_valid)
        if text.pad_masking == "none":
            valid = jnp.ones((1, length), bool)
        elif text.pad_masking == "shifted":
            valid = shift_valid(valid)
        else:
            valid = jnp.pad(valid, ((0, 0), (0, length - valid.shape[1])), constant_values=True)
        return attn_mask(valid, jnp.full(length, text.causal_contrastive))

    def _text_only(self, x: jax.Array, mask: jax.Array, rotate: Rotation | None) -> jax.Array:
        return self._scan(
            lambda x, layer: layer(x, mask=mask, rotate=rotate),
            x,
            self.text_only_layers,
            self.unroll,
        )

    def _scan(self, step: Callable, x: jax.Array, stacked: Any, unroll: int) -> jax.Array:
        return scan(step, x, stacked, remat=self.remat, unroll=unroll)

    @property
    def _unrolled_groups(self) -> int:
        return max(1, self.unroll // self.config.group_size)

    @property
    def shifted(self) -> bool:
        return self.config.pad_masking == "shifted"

    def groups(self) -> tuple[Layer | None, Layer | None, Layer | None]:
        """Self-attention layers with axes [groups, layers of a group] in front, those without MLP, cross-attention."""
        groups = self.config.depth // self.config.group_size
        layers = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), self.layers)
        return layers, self.bare_layers, self.cross_layers

    def _in_order(self, stacked: tuple[Layer | None, Layer | None, Layer | None]) -> list[Layer]:
        """The self-attention layers of one group."""
        layers, bare, _ = stacked
        count = self.config.group_size - (bare is not None)
        full = [jax.tree.map(operator.itemgetter(i), layers) for i in range(count)]
        if bare is None:
            return full
        return [*full, bare] if self.config.cross_attn_position == "last" else [bare, *full]

    def rotation_at(self, positions: Int[Array, "*B L"]) -> Rotation | None:
        text = self.config
        if text.positions == "learned":
            return None
        size = text.rope_dims or text.width // text.num_heads
        return rotation(positions, size, text.rope_theta, halves=text.positions == "rope_half")

    def logits(self, features: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Next-token scores float32[..., V] of features of the caption pass."""
        scores = jnp.matmul(features, self.vocab_kernel, preferred_element_type=jnp.float32)
        return scores if self.vocab_bias is None else scores + self.vocab_bias

    @property
    def vocab_kernel(self) -> Float[Array, "D V"]:
        """The vocabulary head float[D, V]: the token embedding transposed, or a matrix of its own."""
        if self.vocab_head is None:
            return self.token_embed.embedding[...].astype(self.dtype).T
        return self.vocab_head.kernel[...].astype(self.dtype)

    @property
    def vocab_bias(self) -> Float[Array, "V"] | None:
        """What is added to every token's score, float32[V]."""
        return (
            None if self.vocab_head_bias is None else self.vocab_head_bias[...].astype(jnp.float32)
        )

    def _embed(
        self, tokens: Int[Array, "B L"], class_token: bool = False
    ) -> Float[Array, "B Lc D"]:
        self._require_length(tokens.shape[1])
        x = self.token_embed(tokens)
        if class_token:
            last = jnp.broadcast_to(
                self.class_embed[...].astype(self.dtype), (x.shape[0], 1, x.shape[2])
            )
            x = jnp.concatenate([x, last], axis=1)
        if self.pos_embed is not None:
            x = x + constrain(self.pos_embed[: x.shape[1]].astype(self.dtype), "text", None)
        return constrain(x, "batch", "text", "embed")

    def _require_length(self, length: int) -> None:
        if length > self.config.max_length:
            what = "the text" if not self.has_prefix else "prefix and text together"
            raise ValueError(
                f"{what} has {length} tokens, DecoderConfig.max_length is {self.config.max_length}"
            )


def within(
    mask: Bool[Array, "#B 1 L S"], window: int, first: Int[Array, ""] | int = 0
) -> Bool[Array, "#B 1 L S"]:
    """`mask` for queries at `first` and after that see no further back than `window` tokens; 0: as it is."""
    if not window:
        return mask
    asking, asked = jnp.arange(mask.shape[2]) + first, jnp.arange(mask.shape[3])
    return mask & (asking[:, None] - asked < window)
