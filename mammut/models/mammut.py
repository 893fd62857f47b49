"""MaMMUT: one image encoder, one text decoder, two passes; and MAGMA: an image prefix and adapters on that decoder."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Bool, Float, Int, Key, UInt8

from mammut.core.fields import require, require_choices, require_positive, require_share
from mammut.core.sharding import constrain
from mammut.core.typing import Array
from mammut.models.adapter_modules import AdapterConfig, Adapters
from mammut.models.attention_kernels import Kernel, attention_kernel
from mammut.models.compute import Dtype, Dtypes, Remat
from mammut.models.decoder import DecoderConfig, TextDecoder
from mammut.models.image_encoder import EncoderOutput
from mammut.models.layers import LayerNorm, Linear
from mammut.models.masks import caption_labels
from mammut.models.resnet import ResNet, ResNetConfig
from mammut.models.vit import VisionConfig, ViT

# Of the key of an image's crop: that of a patch drop is 4 (`vit`).
_DROPOUT_STREAM = 5
_PREFIX_NORM_EPS = 1e-5  # PyTorch's default, as in MAGMA

Image = UInt8[Array, "B height width 3"] | Float[Array, "B height width 3"]


# The logit scale is kept below this in training, as in CLIP: past it the softmax of cosines is all
# but one-hot.
MAX_LOGIT_SCALE = 100.0
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One image encoder and one text decoder: a MaMMUT, or with an image prefix a MAGMA (arXiv 2112.05253)."""

    vision: VisionConfig | ResNetConfig = VisionConfig()
    text: DecoderConfig = DecoderConfig()
    embed_dim: int | None = None  # E of the embeddings; None: the decoder's width
    # From the image encoder: one map takes the tokens to the decoder and, averaged, to the
    # embedding; two maps do; one takes them to the decoder and there is no embedding; one makes the
    # embedding and the decoder sees the tokens as they are; none does either.
    image_projection: Literal["shared", "separate", "decoder", "embedding", "none"] = "shared"
    # How the decoder sees the image: its cross-attention layers attend to the image tokens, or
    # these stand in front of the text, in place of its start token.
    conditioning: Literal["cross_attention", "prefix"] = "cross_attention"
    # so many are made of the pooled image; None: every image token is one
    prefix_tokens: int | None = None
    prefix_dropout: float = 0.0  # in training, after the projection
    prefix_norm: bool = False  # a layer norm after that
    adapters: tuple[AdapterConfig, ...] = ()
    text_projection: bool = False  # a map takes the pooled text to the embedding
    projection_bias: bool = True
    # the inverse temperature of the contrastive logits at the start
    logit_scale_init: float = 1 / 0.07
    logit_bias_init: float = 0.0  # added to the contrastive logits by the sigmoid and focal losses
    dtype: Dtype = "float32"  # compute
    param_dtype: Dtype = "float32"  # storage
    # what the backward pass keeps of a layer: all of it, its matrix products, its input
    remat: Remat = "none"
    # layers unrolled per step of the scan over layers; a small model on a CPU wants all of them
    unroll: int = 1
    # Training runs the decoder twice, or once with both passes stacked on a new axis: split weights
    # are gathered once.
    passes: Literal["two_calls", "fused"] = "two_calls"
    # auto: a fused kernel where there is one that works here, else XLA's.
    image_attention: Literal["auto", "xla"] = "auto"

    def __post_init__(self):
        require_choices(self)
        require_positive(self, "logit_scale_init", "unroll")
        require(
            math.isfinite(self.logit_bias_init),
            f"ModelConfig.logit_bias_init is {self.logit_bias_init}, expected a finite number",
        )
        require(
            self.logit_scale_init <= MAX_LOGIT_SCALE,
            f"ModelConfig.logit_scale_init is {self.logit_scale_init}, expected at most {MAX_LOGIT_SCALE}",
        )
        require(
            self.embed_dim is None or 0 < self.embed_dim <= 2**16,
            f"ModelConfig.embed_dim is {self.embed_dim}, expected 1 to {2**16}",
        )
        require(
            self.text_projection
            or self.text.pooling == "none"
            or self.embed_size == self.text.width,
            f"ModelConfig.embed_dim is {self.embed_dim}, which without text_projection is the text width "
            f"{self.text.width}",
        )
        require(
            self.image_projection != "shared" or self.embed_size == self.text.width,
            f"ModelConfig.embed_dim is {self.embed_dim}, which with image_projection 'shared' is the text width "
            f"{self.text.width}",
        )
        require(
            self.image_projection != "shared"
            or (self.vision.pooling in ("mean", "mean_all") and not self.vision.norm_after_pooling),
            f"ModelConfig.image_projection is 'shared', which goes with VisionConfig.pooling 'mean' or 'mean_all' and "
            f"norm_after_pooling False, not {self.vision.pooling!r} and {self.vision.norm_after_pooling}",
        )
        require(
            self.image_projection != "none"
            or self.text.pooling == "none"
            or self.vision_size == self.embed_size,
            f"ModelConfig.image_projection is 'none', which needs images of {self.embed_size} numbers, not "
            f"{self.vision_size}",
        )
        if self.vision.pooling == "queries":
            require(
                self.embed_size % self.vision.pool_heads == 0,
                f"ModelConfig.embed_dim {self.embed_size} is not a multiple of VisionConfig.pool_heads "
                f"{self.vision.pool_heads}",
            )
        text = self.text
        prefix = self.conditioning == "prefix"
        require(
            prefix == (text.cross_attn_every == 0),
            f"ModelConfig.conditioning is {self.conditioning!r}, which does not go with DecoderConfig.cross_attn_every "
            f"{text.cross_attn_every}: 0 goes with 'prefix', others with 'cross_attention'",
        )
        require_share(self, "prefix_dropout")
        require(
            prefix
            or (self.prefix_tokens is None and not self.prefix_dropout and not self.prefix_norm),
            "ModelConfig.prefix_tokens, prefix_dropout and prefix_norm need conditioning 'prefix'",
        )
        require(
            self.prefix_tokens is None
            or (self.prefix_tokens > 0 and self.image_projection in ("separate", "decoder")),
            f"ModelConfig.prefix_tokens is {self.prefix_tokens}, expected at least 1, with image_projection 'separate' "
            f"or 'decoder', not {self.image_projection!r}",
        )
        require(
            self.image_projection != "decoder" or text.pooling == "none",
            f"ModelConfig.image_projection is 'decoder', which makes no image embedding for DecoderConfig.pooling "
            f"{text.pooling!r}",
        )
        require(
            not prefix or self.image_token_size == text.width,
            f"ModelConfig.image_projection is {self.image_projection!r}, which leaves image tokens of "
            f"{self.image_token_size} numbers: a prefix has those of the decoder, {text.width}",
        )
        require(
            self.text_length >= 2,
            f"DecoderConfig.max_length {text.max_length} has no room for text after the {self.num_prefix_tokens} "
            "tokens of an image",
        )
        require(
            not prefix or not text.text_only_depth,
            f"DecoderConfig.text_only_depth is {text.text_only_depth}, expected 0 with ModelConfig.conditioning "
            "'prefix'",
        )
        require(
            self.passes != "fused"
            or (text.pooling not in ("none", "class") and not text.text_only_depth),
            "ModelConfig.passes is 'fused', which needs two passes over the same tokens and layers: not "
            f"DecoderConfig.pooling {text.pooling!r} with text_only_depth {text.text_only_depth}",
        )
        require(
            not prefix or self.passes != "fused",
            "ModelConfig.passes is 'fused', which has no place for a prefix",
        )

    @property
    def embed_size(self) -> int:
        """E, the size of the embeddings."""
        return self.text.width if self.embed_dim is None else self.embed_dim

    @property
    def vision_size(self) -> int:
        """The size of an image token; learned queries have that of the embedding."""
        return self.embed_size if self.vision.pooling == "queries" else self.vision.width

    @property
    def image_token_size(self) -> int:
        """The size of an image token as the decoder attends to it."""
        return (
            self.text.width
            if self.image_projection in ("shared", "separate", "decoder")
            else self.vision_size
        )

    @property
    def num_prefix_tokens(self) -> int:
        """Positions of the decoder that an image takes; 0 where cross-attention sees it."""
        if self.conditioning != "prefix":
            return 0
        return self.vision.num_tokens if self.prefix_tokens is None else self.prefix_tokens

    @property
    def text_length(self) -> int:
        """Tokens of a text beside its image, start and end included: an image prefix takes the start's place."""
        return self.text.max_length - max(self.num_prefix_tokens - 1, 0)


@struct.dataclass
class TwoPassOutput:
    """What one training forward gives: the image was encoded once."""

    image_embed: jax.Array  # float[B, E], unit vectors
    text_embed: jax.Array  # float[B, E], unit vectors
    features: jax.Array  # float[B, L, D] of the caption pass; `model.text.logits` scores them


class MaMMUT(nnx.Module):
    """The model of "MaMMUT: A Simple Architecture for Joint Learning for MultiModal Tasks" (arXiv 2303.16839).

    The image embedding is the mean of the patch tokens, the text embedding the mean of the
    contrastive pass over real tokens; there is no class token, no pooler and no projection head
    (section 4.5 finds each unnecessary). One linear map brings image tokens to the decoder's width,
    so E is that width. Images are uint8 and normalised on the device. The models of others, from
    openMaMMUT to SigLIP and CapPa, are values of `ModelConfig` (`mammut.interop`).

    With `ModelConfig.conditioning` "prefix" it is the model of "MAGMA: Multimodal Augmentation of
    Generative Models through Adapter-based Finetuning" (arXiv 2112.05253): the image tokens, mapped
    to the decoder's width, dropped out and normed, stand in front of the text.

    `MaMMUT(presets.mammut_b16(), rngs=nnx.Rngs(0))` makes random weights.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtypes = Dtypes(jnp.dtype(config.dtype), jnp.dtype(config.param_dtype))
        tower = ResNet if isinstance(config.vision, ResNetConfig) else ViT
        self.vision = tower(config, rngs=rngs, dtypes=dtypes)

        def linear(inputs, outputs, split=None):
            maps = {"embed": inputs}, {**({"patch": split} if split else {}), "shared": outputs}
            return Linear(*maps, rngs=rngs, dtypes=dtypes, use_bias=config.projection_bias)

        to_decoder = config.image_projection in ("shared", "separate", "decoder")
        size = config.vision_size, config.text.width
        self.image_projection = linear(*size, config.prefix_tokens) if to_decoder else None
        text_dtypes = dataclasses.replace(
            dtypes, param=jnp.dtype(config.text.param_dtype or config.param_dtype)
        )
        self.text = TextDecoder(config, rngs=rngs, dtypes=text_dtypes)
        to_embedding = config.image_projection in ("separate", "embedding")
        self.image_embed_projection = (
            linear(config.vision_size, config.embed_size) if to_embedding else None
        )
        self.text_embed_projection = (
            linear(config.text.width, config.embed_size) if config.text_projection else None
        )
        # Scalars of the contrastive loss stay float32 whatever the storage type; the scale is kept
        # as its logarithm.
        self.logit_scale = nnx.Param(jnp.log(jnp.float32(config.logit_scale_init)), axes=())
        self.logit_bias = nnx.Param(jnp.float32(config.logit_bias_init), axes=())
        self.prefix_norm = (
            LayerNorm(config.text.width, _PREFIX_NORM_EPS, dtypes=dtypes)
            if config.prefix_norm
            else None
        )
        # Last, so that they leave the random weights of the rest as they are.
        towers = {"text": self.text, "vision": self.vision}
        self.adapters = (
            Adapters(config.adapters, towers, rngs=rngs, dtypes=dtypes) if config.adapters else None
        )
        self.active_adapters = tuple(dict.fromkeys(adapter.name for adapter in config.adapters))

    @property
    def encoder(self) -> ViT | ResNet:
        """The image encoder as it works: `vision` with the active adapters."""
        return self._adapted(self.vision, "vision")

    @property
    def decoder(self) -> TextDecoder:
        """The text decoder as it works: `text` with the active adapters."""
        return self._adapted(self.text, "text")

    def _adapted(self, tower: nnx.Module, name: str) -> nnx.Module:
        return (
            self.adapters.attached(tower, name, self.active_adapters)
            if self.active_adapters
            else tower
        )

    def image_tokens(self, image: Image, crop_key: Key[Array, ""] | None = None) -> EncoderOutput:
        """The image as the decoder takes it, `tokens` float[B, P, D]; `pooled` float[B, E], of any length.

        `crop_key` is given in training: beside what the encoder draws from it (`ViT`), a prefix is
        dropped out.
        """
        encoded = self.encoder(image, crop_key)
        # Pinned, as every layer's output: unpinned, the backward pass of micro-batches moved them
        # between devices.
        tokens = constrain(encoded.tokens, "batch", None, "embed")
        if self.config.prefix_tokens is not None:
            tokens = encoded.pooled.astype(tokens.dtype)
        if self.image_projection is not None:
            tokens = constrain(self.image_projection(tokens), "batch", None, "embed")
        pooled = encoded.pooled
        if self.config.image_projection == "shared":
            pooled = constrain(tokens.mean(1, dtype=jnp.float32), "batch", "embed")
        elif self.image_embed_projection is not None:
            pooled = self.image_embed_projection(pooled.astype(self.vision.dtype)).astype(
                jnp.float32
            )
        dropout = self.config.prefix_dropout
        if dropout and crop_key is not None:
            kept = jax.random.bernoulli(
                jax.random.fold_in(crop_key, _DROPOUT_STREAM), 1 - dropout, tokens.shape
            )
            tokens = jnp.where(kept, tokens / (1 - dropout), 0)
        if self.prefix_norm is not None:
            tokens = self.prefix_norm(tokens)
        return EncoderOutput(tokens, pooled, encoded.grid)

    def encode_image(
        self, image: Image, crop_key: Key[Array, ""] | None = None
    ) -> Float[Array, "B E"]:
        """Image embeddings float[B, E] of unit norm, for uint8[B, height, width, 3] images."""
        if self.config.text.pooling == "none":
            raise ValueError("the model has no contrastive pass: DecoderConfig.pooling is 'none'")
        return unit(self.image_tokens(image, crop_key).pooled)

    def encode_text(
        self, tokens: Int[Array, "B L"], text_valid: Bool[Array, "B L"]
    ) -> Float[Array, "B E"]:
        """Text embeddings float[B, E] of unit norm: the mean over real tokens of the contrastive pass.

        Other ways are values of `DecoderConfig.pooling`; "mean_all" and "last" want texts padded to
        `max_length`, as they were in training.
        """
        return unit(self.text_vector(tokens, text_valid))

    def text_vector(
        self, tokens: Int[Array, "B L"], text_valid: Bool[Array, "B L"]
    ) -> Float[Array, "B E"]:
        """What `encode_text` gives, float[B, E] of any length."""
        return self._pooled_text(
            self.decoder.contrastive_pass(tokens, text_valid), tokens, text_valid
        )

    def _pooled_text(
        self,
        features: Float[Array, "B Lc D"],
        tokens: Int[Array, "B L"],
        text_valid: Bool[Array, "B L"],
    ) -> Float[Array, "B E"]:
        pooling = self.config.text.pooling
        if pooling == "mean":
            weights = self.text.valid(tokens, text_valid).astype(jnp.float32)[..., None]
            pooled = (features.astype(jnp.float32) * weights).sum(1) / jnp.maximum(
                weights.sum(1), 1
            )
        elif pooling == "mean_all":
            pooled = features.mean(1, dtype=jnp.float32)
        elif pooling == "end":
            last = jnp.maximum(self.text.valid(tokens, text_valid).sum(1) - 1, 0)
            pooled = jnp.take_along_axis(features, last[:, None, None], axis=1)[:, 0]
        else:  # the last position, of the text or of the class token
            pooled = features[:, -1]
        if self.text_embed_projection is not None:
            pooled = self.text_embed_projection(pooled.astype(self.text.dtype))
        return pooled.astype(jnp.float32)

    def caption_logits(
        self, image: Image, tokens: Int[Array, "B L"], text_valid: Bool[Array, "B L"] | None = None
    ) -> Float[Array, "B L V"]:
        """Logits float[B, L, V] of the token after each of `tokens`, given the image.

        Without `text_valid` all tokens count as real. Pads at the end change nothing before them
        either way.
        """
        if text_valid is None:
            text_valid = jnp.ones(tokens.shape, bool)
        image_tokens = self.image_tokens(image).tokens
        return self.text.logits(self.decoder.caption_pass(tokens, text_valid, image_tokens))

    def cross_attention(
        self, image: Image, tokens: Int[Array, "B L"], text_valid: Bool[Array, "B L"] | None = None
    ) -> Float[Array, "G B N L P"]:
        """Where `caption_logits` looks: float32[G, B, N, L, P] of G cross-attention layers and N heads.

        Row i of a text weighs the P image tokens that the decoder sees, as `image_tokens` gives
        them, when it predicts token i + 1; it sums to 1. With an image prefix they are of the G
        self-attention layers, and the text has the rest.
        """
        if text_valid is None:
            text_valid = jnp.ones(tokens.shape, bool)
        return self.decoder.cross_attention(tokens, text_valid, self.image_tokens(image).tokens)

    def two_pass(
        self,
        image: Image,
        tokens: Int[Array, "B L"],
        text_valid: Bool[Array, "B L"],
        crop_key: Key[Array, ""] | None = None,
    ) -> TwoPassOutput:
        """Both passes on one batch, with the image encoded once: what a training step needs.

        `ModelConfig.passes` says whether in two calls of the decoder or in one traversal; the
        numbers are the same.
        """
        encoded = self.image_tokens(image, crop_key)
        if self.config.passes == "fused":
            contrastive, caption = self.decoder.both_passes(tokens, text_valid, encoded.tokens)
        else:
            contrastive = self.decoder.contrastive_pass(tokens, text_valid)
            caption = self.decoder.caption_pass(tokens, text_valid, encoded.tokens)
        return TwoPassOutput(
            image_embed=unit(encoded.pooled),
            text_embed=unit(self._pooled_text(contrastive, tokens, text_valid)),
            features=caption,
        )


def unit(x: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """`x` divided by its length, in float32; a zero vector stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24))


def logical_axes(model: nnx.Module) -> dict[tuple[str, ...], tuple[str | None, ...]]:
    """The logical axes of every parameter, by path; `model` may be abstract (`nnx.eval_shape`)."""
    return {
        tuple(path): param.axes for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def labels(
    model: MaMMUT, batch: Batch, target: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """What the caption pass of `model` is to predict, int[B, L], and where, bool[B, L]: see `caption_labels`."""
    tokens, text_valid = batch["tokens"], batch["text_valid"]
    # no label, wherever it stands; as an input it is a token like any other
    if model.config.text.pad_id is not None:
        real = model.text.valid(tokens, text_valid)
        target = real if target is None else target & real
    return caption_labels(tokens, text_valid, target)


def image_attention_kernel(config: ModelConfig, platform: str | None = None) -> Kernel:
    """What the attention of the image tower of `config` runs on, whole images of `image_size` given; a ResNet has none.

    `platform` is "cpu", "gpu" or "tpu"; None: that of the current mesh, or the default one.
    """
    vision = config.vision
    tokens = math.prod(vision.grid) + vision.class_token
    if config.image_attention == "xla" or isinstance(vision, ResNetConfig):
        return "xla"
    return attention_kernel(
        jnp.dtype(config.dtype), tokens, vision.width // vision.num_heads, platform
    )
