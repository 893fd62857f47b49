"""The text decoder and its passes over the same weights.

MaMMUT, section 3.2; MAGMA, arXiv 2112.05253, section 3.

| pass | self-attention | the image | its features |
|---|---|---|---|
| contrastive | bidirectional, pads masked | unseen | their masked mean is the text embedding |
| caption | causal | cross-attention in every k-th layer | `logits` scores them |
| caption | causal | a prefix in place of the start token | `logits` scores them |
| language | causal | unseen | `logits` scores them |

The name of the method decides which pass runs, never a missing argument.
A decoder without cross-attention layers sees the image as a prefix. `fused_passes` runs two passes
in one traversal.

An image prefix, float[B, P, D], may be any sequence of embeddings, such as several images
and the texts between them. It takes the place of the start token: the sequence is [prefix,
tokens[:, 1:]], and the feature of the prefix's last position stands for the start's. So tokens,
labels, loss masks and features belong to a text [start, ..., end] either way.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from mammut.core.fields import require
from mammut.core.sharding import constrain
from mammut.core.typing import Array
from mammut.models.compute import ComputeConfig, stack
from mammut.models.inputs import require_texts
from mammut.models.layers import Constant, Linear, make_norm, param
from mammut.models.masks import attn_mask, behind_prefix, shift_valid, within
from mammut.models.text_tower import TextTower, TextTowerConfig
from mammut.models.transformer import Layer, Rotation, attention_weights

# Self-attention layers with an MLP, those without one, and cross-attention layers, each a stack.
Stacks = tuple[Layer | None, Layer | None, Layer | None]


@dataclasses.dataclass(frozen=True)
class DecoderConfig(TextTowerConfig):
    """The text decoder: self-attention layers, and cross-attention layers between them.

    There are `depth` self-attention layers and `depth / cross_attn_every` cross-attention layers,
    or none. The defaults are MaMMUT as its paper has it; other values make up the models of others
    (`mammut.weights.formats`).

    Example:
      >>> text = DecoderConfig(width=384, num_heads=6, mlp_dim=1536, depth=6, cross_attn_every=3)
      >>> text.num_cross_layers
      2
    """

    NOUN: ClassVar[str] = "Text decoder"
    OF_WEIGHTS: ClassVar[tuple[str, ...]] = TextTowerConfig.OF_WEIGHTS + (
        *("cross_attn_position", "image_norm", "local_windows", "vocab_bias"),
    )

    # Number of self-attention layers for each cross-attention layer; 0: there is none, the image is
    # a prefix of the text.
    cross_attn_every: int = 2
    # Place of a cross-attention layer among the self-attention layers that share it. last, first:
    # after the last or the first of them, as a layer with an MLP of its own. last_bare, first_bare:
    # the same, and the layer that it follows has no MLP. inside: between the self-attention and the
    # MLP of the first, without an MLP of its own.
    cross_attn_position: Literal["last", "first", "last_bare", "first_bare", "inside"] = "last"
    # Whether every cross-attention layer norms the image tokens first.
    image_norm: bool = False
    # Windows of the caption pass: a token of layer i sees the last local_windows[i % n] tokens,
    # itself included; 0: all.
    local_windows: tuple[int, ...] = (0,)
    # Whether the vocabulary head is the token embedding, transposed.
    tie_embeddings: bool = True
    # Whether the vocabulary head has a bias.
    vocab_bias: bool = False

    def __post_init__(self):
        super().__post_init__()
        every = self.cross_attn_every
        windows = self.local_windows
        require(every >= 0, f"DecoderConfig.cross_attn_every is {every}, expected at least 0")
        require(
            every == 0 or self.depth % every == 0,
            f"DecoderConfig.depth {self.depth} is not a multiple of cross_attn_every {every}",
        )
        require(
            every > 0 or self.cross_attn_position in ("last", "first"),
            f"DecoderConfig.cross_attn_position is {self.cross_attn_position!r}, which needs "
            "cross-attention: cross_attn_every is 0",
        )
        require(
            self.layout == "serial" or every == 0 or self.cross_attn_position != "inside",
            f"DecoderConfig.layout is {self.layout!r}, which has no place between attention and "
            "MLP for cross_attn_position 'inside'",
        )
        group = f"cross_attn_every {every}" if every else f"the depth {self.depth}"
        require(
            len(windows) > 0 and min(windows) >= 0 and (every or self.depth) % len(windows) == 0,
            f"DecoderConfig.local_windows is {windows}, expected numbers of tokens, 0 or more, as "
            f"many as divide {group}",
        )
        require(
            windows == (0,) or self.pooling == "none",
            f"DecoderConfig.local_windows is {windows}, which needs pooling 'none': a contrastive "
            "pass has no windows",
        )
        require(
            not self.vocab_bias or self.depth > 0,
            "DecoderConfig.vocab_bias is True, which needs a caption pass: depth is 0",
        )

    @property
    def has_prefix(self) -> bool:
        """Whether the image is a prefix, for lack of cross-attention."""
        return self.cross_attn_every == 0

    @property
    def num_cross_layers(self) -> int:
        """Number of layers that attend to the image."""
        return self.depth // self.cross_attn_every if self.cross_attn_every else 0

    @property
    def has_bare_layers(self) -> bool:
        """Whether the self-attention layer before each cross-attention layer has no MLP."""
        return self.cross_attn_position in ("last_bare", "first_bare")

    @property
    def group_size(self) -> int:
        """Self-attention layers of a group, which share a cross-attention layer or windows."""
        return self.cross_attn_every or len(self.local_windows)

    @property
    def cross_attn_slot(self) -> int | None:
        """Index in its group of the layer before cross-attention, if any."""
        if not self.cross_attn_every:
            return None
        return self.group_size - 1 if self.cross_attn_position in ("last", "last_bare") else 0


class TextDecoder(TextTower):
    """The text tower, with a caption pass that sees the image.

    The paper inserts M cross-attention layers, M about half of the N self-attention layers, of the
    decoder's own width and MLP; only with an MLP of their own do they have the 420M parameters that
    it counts. It does not say where they stand. Here each follows its group of self-attention
    layers; `DecoderConfig` moves them for the models of others.

    `image_width` is the size of the image tokens that cross-attention sees.
    """

    def __init__(self, config: DecoderConfig, compute: ComputeConfig, *, image_width: int):
        super().__init__(config, compute)
        self.has_prefix = config.has_prefix
        dtypes = compute.text_dtypes

        groups = config.num_cross_layers
        bare = groups if config.has_bare_layers else 0
        if config.depth > bare:
            self.layers = stack(Layer(config, dtypes=dtypes), config.depth - bare)
        else:
            self.layers = None
        if bare:
            self.bare_layers = stack(Layer(config, dtypes=dtypes, has_mlp=False), bare)
        else:
            self.bare_layers = None
        if groups:
            cross_layer = Layer(
                config,
                dtypes=dtypes,
                has_mlp=config.cross_attn_position != "inside",
                image_norm=config.image_norm,
                image_width=image_width,
            )
            self.cross_layers = stack(cross_layer, groups)
        else:
            self.cross_layers = None

        self.norm = make_norm(config, dtypes=dtypes) if config.depth else None
        if config.depth and not config.tie_embeddings:
            embed = {"embed": config.width}
            vocab = {"vocab": config.vocab_size}
            self.vocab_head = Linear(embed, vocab, dtypes=dtypes, use_bias=False)
        else:
            self.vocab_head = None
        if config.vocab_bias:
            sizes = (config.vocab_size,)
            self.vocab_head_bias = param(Constant(0.0), sizes, dtypes.param, "vocab")
        else:
            self.vocab_head_bias = None

    def run_layers(self, x: jax.Array, mask: jax.Array, rotate: Rotation | None) -> jax.Array:
        """Runs the self-attention layers and the last norm, float[B, L, D]."""
        if self.bare_layers is None:

            def step(x: jax.Array, layer: Layer) -> jax.Array:
                return layer(x, mask=mask, rotate=rotate)

            return self.norm(self.scan(step, x, self.layers, self.compute.unroll))

        def group(x: jax.Array, stacks: Stacks) -> jax.Array:
            for layer in self._in_order(stacks):
                x = layer(x, mask=mask, rotate=rotate)
            return x

        return self.norm(self.scan(group, x, self.groups(), self.unrolled_groups))

    def caption_pass(
        self,
        tokens: Int[Array, "B L"],
        text_valid: Bool[Array, "B L"],
        image_tokens: Float[Array, "B P Dv"],
        prefix_valid: Bool[Array, "B P"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Computes causal features that see the image, float[B, L, D].

        Args:
          tokens: the ids of the texts.
          text_valid: marks real tokens.
          image_tokens: the images, as `MaMMUT.image_tokens` gives them.
          prefix_valid: marks what is no pad in an image prefix; pads stand in its front. None: all
            of it.

        Raises:
          ValueError: the model has no caption pass, or the texts are too long.
        """

        def see_image(layer: Layer, x: jax.Array) -> jax.Array:
            return layer(x, layer.image_keys_values(image_tokens))

        x, mask, rotate = self.caption_start(tokens, text_valid, image_tokens, prefix_valid)
        x = self._run_caption(x, mask, rotate, see_image)
        return x[:, image_tokens.shape[1] - 1 :] if self.has_prefix else x

    def language_pass(
        self, tokens: Int[Array, "B L"], text_valid: Bool[Array, "B L"]
    ) -> Float[Array, "B L D"]:
        """Computes causal features of a text alone, float[B, L, D]."""
        text_valid = require_texts(tokens, text_valid, self.config)
        return self.causal_pass(self.token_embed(tokens), self.valid(tokens, text_valid))

    def causal_pass(
        self, x: Float[Array, "B L D"], valid: Bool[Array, "B L"] | None = None
    ) -> Float[Array, "B L D"]:
        """Computes causal features of embeddings, float[B, L, D], without cross-attention.

        Positions are added here. They count `valid` tokens only, so that pads may stand in front;
        None: all of it.
        """

        def see_nothing(layer: Layer, x: jax.Array) -> jax.Array:
            return x

        self._require_causal()
        if valid is None:
            valid = jnp.ones(x.shape[:2], bool)
        x, mask, rotate = self._with_positions(x, valid)
        if self.text_only_layers is not None:
            x = self.run_text_only(x, mask, rotate)
        return self._run_caption(x, mask, rotate, see_nothing)

    def _run_caption(
        self, x: jax.Array, mask: jax.Array, rotate: Rotation | None, see_image: Callable
    ) -> jax.Array:
        def attend_text(layer: Layer, x: jax.Array, window: int) -> jax.Array:
            return layer.attend(x, mask=within(mask, window), rotate=rotate)

        def group(x: jax.Array, stacks: Stacks) -> jax.Array:
            return self.caption_group(stacks, x, attend_text, see_image)

        return self.norm(self.scan(group, x, self.groups(), self.unrolled_groups))

    def cross_attention(
        self,
        tokens: Int[Array, "B L"],
        text_valid: Bool[Array, "B L"],
        image_tokens: Float[Array, "B P Dv"],
    ) -> Float[Array, "G B N L P"]:
        """Computes the cross-attention weights of the caption pass.

        Returns float32[G, B, N, L, P], for G cross-attention layers. The weights of one text
        position and head sum to 1 over the image tokens; the weights at position i serve to predict
        token i + 1. With an image prefix the function returns the weights of the image tokens in
        the self-attention of all G layers; these sum to 1 together with the weights of the text.

        The caption pass itself does not return the weights, since a fused kernel never holds them.
        """
        x, mask, rotate = self.caption_start(tokens, text_valid, image_tokens)
        size = image_tokens.shape[1]

        def group(x: jax.Array, stacks: Stacks) -> tuple[jax.Array, jax.Array]:
            weights = []

            def see_image(layer: Layer, x: jax.Array) -> jax.Array:
                image = layer.image_keys_values(image_tokens)
                query = layer.attn.queries(layer.attn_norm(x))
                weights.append(attention_weights(query, image.key, scale=layer.attn.scale))
                return layer(x, image)

            def attend_text(layer: Layer, x: jax.Array, window: int) -> jax.Array:
                kv = layer.own_keys_values(x, rotate)
                seen = within(mask, window)
                if self.has_prefix:
                    query = layer.attn.queries(layer.attn_norm(x), rotate)
                    shares = attention_weights(query, kv.key, seen, layer.attn.scale)
                    weights.append(shares[:, :, size - 1 :, :size])
                return layer.attend(x, kv, seen, rotate)

            x = self.caption_group(stacks, x, attend_text, see_image)
            return x, jnp.stack(weights)

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
        run_layer: Callable | None = None,
    ) -> tuple[Float[Array, "B Lp D"], Bool[Array, "#B 1 Lp Lp"], Rotation | None]:
        """Computes the input of the caption pass's layers: embeddings, mask, rotary angles.

        The embedded text follows its prefix where there is one; text-only layers have run already.
        `run_layer(layer, x, mask, rotate)` runs one text-only layer in place of the scan, for a
        caller that keeps something of each.
        """
        self._require_causal()
        valid = self.valid(tokens, text_valid)
        if self.has_prefix:
            if prefix_valid is None:
                prefix_valid = jnp.ones(image_tokens.shape[:2], bool)
            valid = behind_prefix(prefix_valid, valid)
            text = self.token_embed(tokens[:, 1:])
            x = jnp.concatenate([image_tokens.astype(self.dtype), text], axis=1)
            return self._with_positions(x[:, : valid.shape[1]], valid)

        length = tokens.shape[1]
        causal = jnp.ones(length, bool)
        masked = valid if self.config.pad_masking == "both" else jnp.ones((1, length), bool)
        mask = attn_mask(masked, causal)
        rotate = self.rotation_at(jnp.arange(length))
        x = self.embed(tokens)
        if self.text_only_layers is not None:
            early = mask
            if self.shifted:
                early = attn_mask(shift_valid(valid)[:, :length], causal)
            if run_layer is None:
                x = self.run_text_only(x, early, rotate)
            else:
                for i in range(self.config.text_only_depth):
                    layer = jax.tree.map(operator.itemgetter(i), self.text_only_layers)
                    x = run_layer(layer, x, early, rotate)
        return x, mask, rotate

    def _with_positions(
        self, x: Float[Array, "B L D"], valid: Bool[Array, "B L"]
    ) -> tuple[Float[Array, "B L D"], Bool[Array, "B 1 L L"], Rotation | None]:
        """Adds positions to embeddings; returns them, the causal mask and rotary angles.

        Positions count valid tokens only.
        """
        what = "prefix and text together" if self.has_prefix else "the text"
        self.require_length(x.shape[1], what)
        positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
        if self.pos_embed is not None:
            x = x + constrain(self.pos_embed[...].astype(self.dtype), None, None)[positions]
        mask = attn_mask(valid, jnp.ones(x.shape[1], bool))
        return constrain(x, "batch", "text", "embed"), mask, self.rotation_at(positions)

    def caption_group(
        self,
        stacks: Stacks,
        x: jax.Array,
        attend_text: Callable,
        see_image: Callable,
        feed_forward: Callable = Layer.feed_forward,
    ) -> jax.Array:
        """Runs one group of layers of the caption pass.

        Args:
          stacks: the layers of the group, as a scan over `groups` gives them; `x` goes in.
          attend_text: `(layer, x, window)`, runs the self-attention of a layer.
          see_image: `(layer, x)`, runs a whole cross-attention layer.
          feed_forward: `(layer, x)`, runs the MLP of a layer.
        """
        config = self.config
        cross_layer = stacks[-1]
        inside = config.cross_attn_position == "inside"
        for i, layer in enumerate(self._in_order(stacks)):
            x = attend_text(layer, x, config.local_windows[i % len(config.local_windows)])
            if i == config.cross_attn_slot and inside:
                x = see_image(cross_layer, x)
            x = feed_forward(layer, x)
            if i == config.cross_attn_slot and not inside:
                x = see_image(cross_layer, x)
        return x

    @property
    def unrolled_groups(self) -> int:
        """Number of unrolled groups in each turn of the scan."""
        return max(1, self.compute.unroll // self.config.group_size)

    def groups(self) -> Stacks:
        """Returns the stacks of layers with a leading axis of groups.

        Those with an MLP have two leading axes: the groups, and the layers of a group.
        """
        groups = self.config.depth // self.config.group_size
        layers = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), self.layers)
        return layers, self.bare_layers, self.cross_layers

    def _in_order(self, stacks: Stacks) -> list[Layer]:
        """Lists the self-attention layers of a group in running order."""
        layers, bare, _ = stacks
        count = self.config.group_size - (bare is not None)
        in_order = [jax.tree.map(operator.itemgetter(i), layers) for i in range(count)]
        if bare is not None:
            in_order.insert(self.config.cross_attn_slot, bare)
        return in_order

    def logits(self, features: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Scores the next token, float32[..., V], from features of the caption pass."""
        scores = jnp.matmul(features, self.vocab_kernel, preferred_element_type=jnp.float32)
        if self.vocab_bias is not None:
            scores = scores + self.vocab_bias
        return scores

    @property
    def vocab_kernel(self) -> Float[Array, "D V"]:
        """The vocabulary head, float[D, V]: the token embedding transposed, or a matrix."""
        if self.vocab_head is None:
            return self.token_embed.embedding[...].astype(self.dtype).T
        return self.vocab_head.kernel[...].astype(self.dtype)

    @property
    def vocab_bias(self) -> Float[Array, "V"] | None:
        """The bias of every token's score, float32[V]; None: there is none."""
        if self.vocab_head_bias is None:
            return None
        return self.vocab_head_bias[...].astype(jnp.float32)
