"""The text tower: embeddings, positions, masks, and the contrastive pass.

`TextTower` is the part of the text decoder that never sees an image; `decoder.TextDecoder` adds the
caption pass. Some published models have text-only layers, whose output is the output of the
contrastive pass: CoCa has them in front of its other layers, SigLIP has no other layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int

from mammut.core.fields import require, require_at_most, require_positive
from mammut.core.sharding import constrain
from mammut.core.typing import Array
from mammut.models.compute import ComputeConfig, scan, stack
from mammut.models.layers import Embedding, LayerConfig, Normal, make_norm, param
from mammut.models.masks import attn_mask, shift_valid
from mammut.models.transformer import Layer, Rotation, rotation


@dataclasses.dataclass(frozen=True)
class TextTowerConfig(LayerConfig):
    """The text side of a decoder: vocabulary, positions, pooling."""

    OF_WEIGHTS: ClassVar[tuple[str, ...]] = (
        *LayerConfig.OF_WEIGHTS,
        "rope_dims",
        "rope_theta",
        "text_only_depth",
        "text_only_heads",
        "causal_contrastive",
        "pad_masking",
        "pad_id",
    )

    # Number of token ids.
    vocab_size: int = 64_000
    # Longest text in tokens, start and end included.
    max_length: int = 64
    # Kind of positions: learned, or rotary ones in self-attention. rope turns interleaved pairs of
    # a head's numbers (GPT-J), rope_half pairs its first half with its second (GPT-NeoX).
    positions: Literal["learned", "rope", "rope_half"] = "learned"
    # Count of a head's numbers that rotary positions turn, from the first on; None: all.
    rope_dims: int | None = None
    # Base of the frequencies of rotary positions.
    rope_theta: float = 10_000.0
    # How the features of the contrastive pass become an embedding. mean: their mean over real
    # tokens. mean_all: their mean over all positions. last: the feature at the last position. end:
    # the feature of the last real token. class: the feature of a learned token behind the text.
    # none: there is no contrastive pass.
    pooling: Literal["mean", "mean_all", "last", "end", "class", "none"] = "mean"
    # Number of layers in front of the others, without cross-attention, that alone make the text
    # embedding: the text tower of CoCa. With `depth` 0 there is no caption pass: SigLIP.
    text_only_depth: int = 0
    # Attention heads of the text-only layers; None: `num_heads`.
    text_only_heads: int | None = None
    # Whether the contrastive pass is causal, as the caption pass is.
    causal_contrastive: bool = False
    # Passes in which pads are masked: both, the contrastive pass alone, or none. shifted: as in
    # open_clip's CoCa: in the text-only layers, one position too late.
    pad_masking: Literal["both", "contrastive", "none", "shifted"] = "both"
    # Id of pads, at any position; None: only `text_valid` marks pads.
    pad_id: int | None = None

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "vocab_size", "rope_theta")
        limits = {"vocab_size": 2**24, "max_length": 2**17, "text_only_depth": 2**10}
        require_at_most(self, limits)
        require(
            self.max_length >= 2,
            f"DecoderConfig.max_length is {self.max_length}, expected at least 2 tokens",
        )
        for name in ("depth", "text_only_depth"):
            value = getattr(self, name)
            require(value >= 0, f"DecoderConfig.{name} is {value}, expected at least 0")
        require(
            self.depth + self.text_only_depth > 0,
            "DecoderConfig.depth is 0, expected at least 1 layer",
        )
        require(
            self.pad_id is None or 0 <= self.pad_id < self.vocab_size,
            f"DecoderConfig.pad_id is {self.pad_id}, expected an id below vocab_size "
            f"{self.vocab_size}",
        )
        heads = self.text_only_heads
        require(
            heads is None or (heads > 0 and self.width % heads == 0),
            f"DecoderConfig.text_only_heads is {heads}, expected a divisor of the width "
            f"{self.width}",
        )
        require(
            self.pad_masking != "shifted" or (self.class_token and self.text_only_depth > 0),
            "DecoderConfig.pad_masking is 'shifted', which needs pooling 'class' and "
            "text_only_depth",
        )
        self._require_rotary()

    def _require_rotary(self) -> None:
        head_size = self.width // self.num_heads
        require(
            self.positions == "learned" or head_size % 2 == 0,
            f"DecoderConfig.positions is {self.positions!r}, which needs heads of even size, not "
            f"{head_size}",
        )
        dims = self.rope_dims
        rotary = self.positions != "learned"
        require(
            dims is None or (rotary and 0 < dims <= head_size and dims % 2 == 0),
            f"DecoderConfig.rope_dims is {dims}, expected an even number up to the head size "
            f"{head_size}, with rotary positions, not {self.positions!r}",
        )

    @property
    def class_token(self) -> bool:
        """Whether a learned token follows the text in the contrastive pass."""
        return self.pooling == "class"

    @property
    def whole_length(self) -> bool:
        """Whether the embedding depends on the last position.

        If so, texts are padded to `max_length`.
        """
        return self.pooling in ("mean_all", "last", "class")

    def require_contrastive_pass(self) -> None:
        """Raises ValueError where the model has no contrastive pass."""
        require(
            self.pooling != "none",
            "the model has no contrastive pass: DecoderConfig.pooling is 'none'",
        )


class TextTower(nnx.Module):
    """Token embeddings, positions and text-only layers; what both passes begin with."""

    def __init__(self, config: Any, compute: ComputeConfig):
        self.config = config
        self.compute = compute
        dtypes = compute.text_dtypes
        self.dtype = dtypes.compute
        width = config.width

        self.token_embed = Embedding(config.vocab_size, width, dtypes=dtypes)
        vector = Normal(0.02)
        if config.positions == "learned":
            positions = config.max_length + config.class_token
            self.pos_embed = param(vector, (positions, width), dtypes.param, "text", "embed")
        else:
            self.pos_embed = None
        if config.class_token:
            self.class_embed = param(vector, (1, width), dtypes.param, "text", "embed")
        else:
            self.class_embed = None

        if config.text_only_depth:
            heads = config.text_only_heads or config.num_heads
            text_only = dataclasses.replace(config, num_heads=heads)
            layer = Layer(text_only, dtypes=dtypes)
            self.text_only_layers = stack(layer, config.text_only_depth)
            self.text_only_norm = make_norm(config, dtypes=dtypes)
        else:
            self.text_only_layers = None
            self.text_only_norm = None

    def valid(self, tokens: Int[Array, "*B"], text_valid: Bool[Array, "*B"]) -> Bool[Array, "*B"]:
        """Marks tokens of `text_valid` other than `DecoderConfig.pad_id`."""
        if self.config.pad_id is None:
            return text_valid
        return text_valid & (tokens != self.config.pad_id)

    def contrastive_pass(
        self, tokens: Int[Array, "B L"], text_valid: Bool[Array, "B L"]
    ) -> Float[Array, "B Lc D"]:
        """Computes features of the text alone, float[B, L, D].

        Features at pads mean nothing.

        The pass is bidirectional unless `DecoderConfig.causal_contrastive`. With pooling "class"
        there is one more position at the end, the class token's.

        Raises:
          ValueError: the model has no contrastive pass, or the texts are too long.
        """
        self.config.require_contrastive_pass()
        x = self.embed(tokens, class_token=self.config.class_token)
        mask = self.contrastive_mask(tokens, text_valid, x.shape[1])
        rotate = self.rotation_at(jnp.arange(x.shape[1]))
        if self.text_only_layers is not None:
            return self.text_only_norm(self.run_text_only(x, mask, rotate))
        return self.run_layers(x, mask, rotate)

    def pooled(
        self,
        features: Float[Array, "B Lc D"],
        tokens: Int[Array, "B L"],
        text_valid: Bool[Array, "B L"],
    ) -> Float[Array, "B D"]:
        """Pools contrastive features to one vector a text, float[B, D]."""
        pooling = self.config.pooling
        if pooling == "mean":
            weights = self.valid(tokens, text_valid).astype(jnp.float32)[..., None]
            total = (features.astype(jnp.float32) * weights).sum(1)
            return total / jnp.maximum(weights.sum(1), 1)
        if pooling == "mean_all":
            return features.mean(1, dtype=jnp.float32)
        if pooling == "end":
            last = jnp.maximum(self.valid(tokens, text_valid).sum(1) - 1, 0)
            return jnp.take_along_axis(features, last[:, None, None], axis=1)[:, 0]
        # The last position belongs to the text (last), or to the class token behind it (class).
        return features[:, -1]

    def run_layers(self, x: jax.Array, mask: jax.Array, rotate: Rotation | None) -> jax.Array:
        """Runs the decoder's own layers in the contrastive pass; abstract here."""
        raise NotImplementedError

    def run_text_only(self, x: jax.Array, mask: jax.Array, rotate: Rotation | None) -> jax.Array:
        """Runs the text-only layers, float[B, L, D]."""

        def step(x: jax.Array, layer: Layer) -> jax.Array:
            return layer(x, mask=mask, rotate=rotate)

        return self.scan(step, x, self.text_only_layers, self.compute.unroll)

    def scan(self, step: Callable, x: jax.Array, stacked: Any, unroll: int) -> jax.Array:
        """Applies `step` to each layer, or group of layers, of a stack."""
        return scan(step, x, stacked, remat=self.compute.remat, unroll=unroll)

    @property
    def shifted(self) -> bool:
        """Whether pads are masked one position too late, as in open_clip's CoCa."""
        return self.config.pad_masking == "shifted"

    def contrastive_mask(
        self, tokens: Int[Array, "B L"], text_valid: Bool[Array, "B L"], length: int
    ) -> Bool[Array, "#B 1 Lc Lc"]:
        """Makes the mask of the contrastive pass.

        `length` counts its positions, with the class token if there is one.
        """
        config = self.config
        valid = self.valid(tokens, text_valid)
        if config.pad_masking == "none":
            valid = jnp.ones((1, length), bool)
        elif config.pad_masking == "shifted":
            valid = shift_valid(valid)
        else:
            behind = ((0, 0), (0, length - valid.shape[1]))
            valid = jnp.pad(valid, behind, constant_values=True)
        return attn_mask(valid, jnp.full(length, config.causal_contrastive))

    def rotation_at(self, positions: Int[Array, "*B L"]) -> Rotation | None:
        """Computes the rotary angles of tokens at `positions`; None: positions are learned."""
        config = self.config
        if config.positions == "learned":
            return None
        size = config.rope_dims or config.width // config.num_heads
        halves = config.positions == "rope_half"
        return rotation(positions, size, config.rope_theta, halves=halves)

    def embed(self, tokens: Int[Array, "B L"], class_token: bool = False) -> Float[Array, "B Lc D"]:
        """Looks tokens up and adds learned positions, float[B, L, D].

        With `class_token` there is one more position, at the end.
        """
        self.require_length(tokens.shape[1])
        x = self.token_embed(tokens)
        if class_token:
            last = self.class_embed[...].astype(self.dtype)
            last = jnp.broadcast_to(last, (x.shape[0], 1, x.shape[2]))
            x = jnp.concatenate([x, last], axis=1)
        if self.pos_embed is not None:
            x = x + constrain(self.pos_embed[: x.shape[1]].astype(self.dtype), "text", None)
        return constrain(x, "batch", "text", "embed")

    def require_length(self, length: int, what: str = "the text") -> None:
        """Raises ValueError where `what` is longer than `DecoderConfig.max_length`."""
        longest = self.config.max_length
        if length > longest:
            raise ValueError(f"{what} has {length} tokens, DecoderConfig.max_length is {longest}")
