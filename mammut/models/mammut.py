"""The model: an image encoder and a text decoder."""

import dataclasses
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int

from mammut.core.fields import (
    require,
    require_choices,
    require_kind,
    require_types,
)
from mammut.core.sharding import constrain
from mammut.core.typing import Array
from mammut.models.adapter_modules import AdapterConfig, Adapters
from mammut.models.compute import Augment, ComputeConfig, require_computable
from mammut.models.decoder import DecoderConfig, TextDecoder
from mammut.models.fused_passes import TwoPassOutput, both_passes
from mammut.models.image_encoder import EncodedImage, Image
from mammut.models.inputs import require_texts
from mammut.models.layers import Constant, LayerNorm, Linear, dropout, initialise, param, unit
from mammut.models.masks import caption_labels
from mammut.models.resnet import ResNet, ResNetConfig
from mammut.models.vit import VisionConfig, ViT

# Largest logit scale in training, as in CLIP: above it the softmax of cosines is all but one-hot.
MAX_LOGIT_SCALE = 100.0
# Logit scale of a new model, CLIP's; a training run starts with the scale of its loss.
_LOGIT_SCALE = 1 / 0.07
# Stream of `Augment.key` that drops numbers of a prefix; `vit` has streams 0 to 4.
_DROPOUT_STREAM = 5
# Number added to the variance in the norm of a prefix: PyTorch's default, as in MAGMA.
_PREFIX_NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of a model: image encoder and text decoder.

    It travels with the weights. With cross-attention layers it is a MaMMUT, with an image prefix a
    MAGMA (arXiv 2112.05253).

    Example:
      >>> config = mammut.presets.mammut_b16()
      >>> large_images = dataclasses.replace(config.vision, image_size=384)
      >>> config = dataclasses.replace(config, vision=large_images)
    """

    OF_WEIGHTS: ClassVar[tuple[str, ...]] = ("text_projection", "projection_bias")

    # The image encoder.
    vision: VisionConfig | ResNetConfig = VisionConfig()
    # The text decoder.
    text: DecoderConfig = DecoderConfig()
    # Size E of the embeddings; None: the decoder's width.
    embed_dim: int | None = None
    # Linear maps behind the image encoder. shared: one map of the tokens, for the decoder; their
    # mean is the embedding. separate: a map of the tokens for the decoder, another for the
    # embedding. decoder: a map for the decoder, and no embedding. embedding: a map for the
    # embedding; the decoder sees the tokens as they are. none: no map.
    image_projection: Literal["shared", "separate", "decoder", "embedding", "none"] = "shared"
    # Number of prefix tokens that are made of the pooled image; None: the image tokens are the
    # prefix.
    prefix_tokens: int | None = None
    # Whether a layer norm follows the projection of a prefix.
    prefix_norm: bool = False
    # Adapters on the model, in the order in which they work.
    adapters: tuple[AdapterConfig, ...] = ()
    # Whether a linear map takes the pooled text to the embedding.
    text_projection: bool = False
    # Whether the linear maps behind encoder and decoder have biases.
    projection_bias: bool = True

    def __post_init__(self):
        require_types(self)
        require_choices(self)
        self._require_embedding()
        self._require_prefix()

    def _require_embedding(self) -> None:
        vision = self.vision
        text = self.text
        projection = self.image_projection
        require(
            self.embed_dim is None or 0 < self.embed_dim <= 2**16,
            f"ModelConfig.embed_dim is {self.embed_dim}, expected 1 to {2**16}",
        )
        require(
            self.text_projection or text.pooling == "none" or self.embed_size == text.width,
            f"ModelConfig.embed_dim is {self.embed_dim}, which without text_projection is the text "
            f"width {text.width}",
        )
        require(
            projection != "shared" or self.embed_size == text.width,
            f"ModelConfig.embed_dim is {self.embed_dim}, which with image_projection 'shared' is "
            f"the text width {text.width}",
        )
        mean_of_tokens = vision.pooling in ("mean", "mean_all") and not vision.norm_after_pooling
        require(
            projection != "shared" or mean_of_tokens,
            f"ModelConfig.image_projection is 'shared', which goes with VisionConfig.pooling "
            f"'mean' or 'mean_all' and norm_after_pooling False, not {vision.pooling!r} and "
            f"{vision.norm_after_pooling}",
        )
        require(
            projection != "none" or text.pooling == "none" or self.vision_size == self.embed_size,
            f"ModelConfig.image_projection is 'none', which needs images of {self.embed_size} "
            f"numbers, not {self.vision_size}",
        )
        require(
            projection != "decoder" or text.pooling == "none",
            f"ModelConfig.image_projection is 'decoder', which makes no image embedding for "
            f"DecoderConfig.pooling {text.pooling!r}",
        )
        if vision.pooling == "queries":
            require(
                self.embed_size % vision.pool_heads == 0,
                f"ModelConfig.embed_dim {self.embed_size} is not a multiple of "
                f"VisionConfig.pool_heads {vision.pool_heads}",
            )

    def _require_prefix(self) -> None:
        text = self.text
        prefix = text.has_prefix
        require(
            prefix or (self.prefix_tokens is None and not self.prefix_norm),
            "ModelConfig.prefix_tokens and prefix_norm need an image prefix: "
            "DecoderConfig.cross_attn_every 0",
        )
        require(
            self.prefix_tokens is None
            or (self.prefix_tokens > 0 and self.image_projection in ("separate", "decoder")),
            f"ModelConfig.prefix_tokens is {self.prefix_tokens}, expected at least 1, with "
            f"image_projection 'separate' or 'decoder', not {self.image_projection!r}",
        )
        require(
            not prefix or self.image_token_size == text.width,
            f"ModelConfig.image_projection is {self.image_projection!r}, which leaves image tokens "
            f"of {self.image_token_size} numbers: a prefix has those of the decoder, {text.width}",
        )
        require(
            self.text_length >= 2,
            f"DecoderConfig.max_length {text.max_length} has no room for text after the "
            f"{self.num_prefix_tokens} tokens of an image",
        )
        require(
            not prefix or not text.text_only_depth,
            f"DecoderConfig.text_only_depth is {text.text_only_depth}, expected 0 with an image "
            "prefix",
        )

    @property
    def conditioning(self) -> Literal["cross_attention", "prefix"]:
        """How the decoder sees the image."""
        return "prefix" if self.text.has_prefix else "cross_attention"

    @property
    def embed_size(self) -> int:
        """E, the size of the embeddings."""
        return self.text.width if self.embed_dim is None else self.embed_dim

    @property
    def vision_size(self) -> int:
        """The size of an image token of the encoder."""
        # learned queries have the size of the embedding
        return self.embed_size if self.vision.pooling == "queries" else self.vision.width

    @property
    def maps_tokens(self) -> bool:
        """Whether a linear map takes image tokens to the decoder's width."""
        return self.image_projection in ("shared", "separate", "decoder")

    @property
    def maps_embedding(self) -> bool:
        """Whether a linear map of its own makes the image embedding."""
        return self.image_projection in ("separate", "embedding")

    @property
    def image_token_size(self) -> int:
        """The size of an image token as the decoder attends to it."""
        return self.text.width if self.maps_tokens else self.vision_size

    @property
    def num_prefix_tokens(self) -> int:
        """Number of decoder positions that an image takes; 0: cross-attention sees it."""
        if not self.text.has_prefix:
            return 0
        return self.vision.num_tokens if self.prefix_tokens is None else self.prefix_tokens

    @property
    def text_length(self) -> int:
        """Longest text beside an image, in tokens, start and end included."""
        # an image prefix takes the place of the start
        return self.text.max_length - max(self.num_prefix_tokens - 1, 0)

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Names of the adapters, each once."""
        return tuple(dict.fromkeys(adapter.name for adapter in self.adapters))


class MaMMUT(nnx.Module):
    """The MaMMUT model (arXiv 2303.16839); with a prefix, MAGMA (2112.05253).

    The image embedding is the mean of the patch tokens. The text embedding is the mean of the
    contrastive pass's features over real tokens. There is no class token, no pooler and no
    projection head: section 4.5 of the paper finds each unnecessary. One linear map brings image
    tokens to the decoder's width, so E equals that width. In a MAGMA the mapped tokens stand in
    front of the text, with dropout and a norm. Other published models, from openMaMMUT to SigLIP
    and CapPa, are values of `ModelConfig` (`mammut.weights.formats`).

    Args:
      config: the architecture.
      compute: the way of computing; ValueError where it is not possible (`require_computable`).
      rngs: the source of the random weights; the key of each parameter is folded from its path.

    Example:
      >>> model = mammut.MaMMUT(mammut.presets.tiny(), rngs=nnx.Rngs(0))
      >>> model.encode_image(np.zeros((2, 48, 48, 3), np.uint8)).shape
      (2, 64)
    """

    def __init__(
        self, config: ModelConfig, *, compute: ComputeConfig = ComputeConfig(), rngs: nnx.Rngs
    ):
        require_kind("config", config, ModelConfig)
        require_kind("compute", compute, ComputeConfig)
        require_kind("rngs", rngs, nnx.Rngs)
        require_computable(config, compute)
        self.config = config
        self.compute = compute
        dtypes = compute.dtypes

        if isinstance(config.vision, ResNetConfig):
            self.vision = ResNet(config.vision, compute)
        else:
            self.vision = ViT(config.vision, compute, pooled_size=config.vision_size)
        self.text = TextDecoder(config.text, compute, image_width=config.image_token_size)

        def linear(exists: bool, inputs: dict[str, int], outputs: dict[str, int]) -> Linear | None:
            if not exists:
                return None
            return Linear(inputs, outputs, dtypes=dtypes, use_bias=config.projection_bias)

        vision = {"embed": config.vision_size}
        text = {"embed": config.text.width}
        embedding = {"shared": config.embed_size}
        to_decoder = {"shared": config.text.width}
        if config.prefix_tokens is not None:
            to_decoder = {"patch": config.prefix_tokens, **to_decoder}
        self.image_projection = linear(config.maps_tokens, vision, to_decoder)
        self.image_embed_projection = linear(config.maps_embedding, vision, embedding)
        self.text_embed_projection = linear(config.text_projection, text, embedding)
        prefix_norm = LayerNorm(config.text.width, _PREFIX_NORM_EPS, dtypes=dtypes)
        self.prefix_norm = prefix_norm if config.prefix_norm else None

        # Scalars of the contrastive loss are float32, whatever `param_dtype` is. The scale is kept
        # as its logarithm.
        self.logit_scale = param(Constant(math.log(_LOGIT_SCALE)), (), jnp.float32)
        self.logit_bias = param(Constant(0.0), (), jnp.float32)

        if config.adapters:
            towers = {"text": self.text, "vision": self.vision}
            self.adapters = Adapters(config.adapters, towers, dtypes=dtypes)
        else:
            self.adapters = None
        self.active_adapters = config.adapter_names
        initialise(self, rngs.params())

    @property
    def encoder(self) -> ViT | ResNet:
        """The image encoder `vision` with the active adapters on it."""
        return self._adapted(self.vision, "vision")

    @property
    def decoder(self) -> TextDecoder:
        """The text decoder `text` with the active adapters on it."""
        return self._adapted(self.text, "text")

    def _adapted(self, tower: nnx.Module, name: str) -> nnx.Module:
        if not self.active_adapters:
            return tower
        return self.adapters.attached(tower, name, self.active_adapters)

    def image_tokens(self, image: Image, augment: Augment = Augment()) -> EncodedImage:
        """Encodes images for both passes.

        Returns tokens float[B, P, D] and a vector float32[B, E].

        Args:
          image: uint8[B, height, width, 3] RGB; or float of that shape, normalised already:
            (pixel / 255 - `VisionConfig.image_mean`) / `VisionConfig.image_std`.
          augment: the random draws of a training step.

        Raises:
          ValueError: the images are of another size or type, or their float pixels not normalised.
        """
        encoded = self.encoder(image, augment)
        # Without this line the backward pass of micro-batches moved the tokens between devices.
        tokens = constrain(encoded.tokens, "batch", None, "embed")
        if self.config.prefix_tokens is not None:
            tokens = encoded.pooled.astype(tokens.dtype)
        if self.image_projection is not None:
            tokens = constrain(self.image_projection(tokens), "batch", None, "embed")

        vector = encoded.pooled
        if self.config.image_projection == "shared":
            vector = constrain(tokens.mean(1, dtype=jnp.float32), "batch", "embed")
        elif self.image_embed_projection is not None:
            vector = self.image_embed_projection(vector.astype(self.vision.dtype))
            vector = vector.astype(jnp.float32)

        if augment.prefix_dropout:
            key = jax.random.fold_in(augment.key, _DROPOUT_STREAM)
            tokens = dropout(key, tokens, augment.prefix_dropout)
        if self.prefix_norm is not None:
            tokens = self.prefix_norm(tokens)
        return EncodedImage(tokens, vector, encoded.grid)

    def encode_image(self, image: Image, augment: Augment = Augment()) -> Float[Array, "B E"]:
        """Embeds images as unit vectors float32[B, E].

        Args:
          image: uint8[B, height, width, 3] RGB; or float, normalised as for `image_tokens`.
          augment: the random draws of a training step.

        Raises:
          ValueError: the model has no contrastive pass, or `image_tokens` refuses the images.
        """
        self.config.text.require_contrastive_pass()
        return unit(self.image_tokens(image, augment).vector)

    def encode_text(
        self, tokens: Int[Array, "B L"], text_valid: Bool[Array, "B L"]
    ) -> Float[Array, "B E"]:
        """Embeds texts as unit vectors float32[B, E], by the contrastive pass.

        The embedding is the mean over real tokens, or what `DecoderConfig.pooling` says. The
        poolings "mean_all" and "last" need texts padded to `max_length`, as in training.

        Raises:
          ValueError: the model has no contrastive pass; the texts are too long; an id is not in
            the vocabulary; or the arrays are of another shape or type.
        """
        return unit(self.text_vector(tokens, text_valid))

    def text_vector(
        self, tokens: Int[Array, "B L"], text_valid: Bool[Array, "B L"]
    ) -> Float[Array, "B E"]:
        """Computes the embedding of texts before normalisation, float32[B, E] of any length."""
        text_valid = require_texts(tokens, text_valid, self.config.text)
        features = self.decoder.contrastive_pass(tokens, text_valid)
        return self._projected_text(self.text.pooled(features, tokens, text_valid))

    def _projected_text(self, pooled: Float[Array, "B D"]) -> Float[Array, "B E"]:
        if self.text_embed_projection is not None:
            pooled = self.text_embed_projection(pooled.astype(self.text.dtype))
        return pooled.astype(jnp.float32)

    def caption_logits(
        self, image: Image, tokens: Int[Array, "B L"], text_valid: Bool[Array, "B L"] | None = None
    ) -> Float[Array, "B L V"]:
        """Scores the token after each of `tokens`, given the image.

        Returns float32[B, L, V]. Without `text_valid` all tokens count as real. Either way pads at
        the end change no score before them. Float images are normalised as for `image_tokens`.

        Raises:
          ValueError: the model has no caption pass, or what `image_tokens` or `encode_text` refuse.
        """
        text_valid = require_texts(tokens, text_valid, self.config.text, image=image)
        image_tokens = self.image_tokens(image).tokens
        return self.text.logits(self.decoder.caption_pass(tokens, text_valid, image_tokens))

    def caption_labels(
        self,
        tokens: Int[Array, "B L"],
        text_valid: Bool[Array, "B L"],
        target: Bool[Array, "B L"] | None = None,
    ) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
        """Makes the labels of the caption pass and their loss mask.

        Returns int[B, L] and bool[B, L], as `masks.caption_labels` does, but a
        `DecoderConfig.pad_id` is never a label.
        """
        text_valid = require_texts(tokens, text_valid, self.config.text, target=target)
        if self.config.text.pad_id is not None:
            real = self.text.valid(tokens, text_valid)
            target = real if target is None else target & real
        return caption_labels(tokens, text_valid, target)

    def cross_attention(
        self, image: Image, tokens: Int[Array, "B L"], text_valid: Bool[Array, "B L"] | None = None
    ) -> Float[Array, "G B N L P"]:
        """Computes the attention of `caption_logits` to the image.

        Returns float32[G, B, N, L, P], with G cross-attention layers. Row i of a text holds the
        weights of the image tokens when token i + 1 is predicted, and sums to 1. With an image
        prefix the layers are those of self-attention, and a row sums to 1 with the weights of the
        text. It takes and refuses what `caption_logits` does.
        """
        text_valid = require_texts(tokens, text_valid, self.config.text, image=image)
        return self.decoder.cross_attention(tokens, text_valid, self.image_tokens(image).tokens)

    def two_pass(
        self,
        image: Image,
        tokens: Int[Array, "B L"],
        text_valid: Bool[Array, "B L"],
        augment: Augment = Augment(),
    ) -> TwoPassOutput:
        """Runs both passes on one batch, for a training step.

        Images are encoded once; `ComputeConfig.passes` says whether the decoder runs once or twice.
        It takes and refuses what `caption_logits` does.
        """
        text_valid = require_texts(tokens, text_valid, self.config.text, image=image)
        encoded = self.image_tokens(image, augment)
        decoder = self.decoder
        if self.compute.passes == "fused":
            contrastive, caption = both_passes(decoder, tokens, text_valid, encoded.tokens)
        else:
            contrastive = decoder.contrastive_pass(tokens, text_valid)
            caption = decoder.caption_pass(tokens, text_valid, encoded.tokens)
        pooled_text = self.text.pooled(contrastive, tokens, text_valid)
        return TwoPassOutput(
            image_embed=unit(encoded.vector),
            text_embed=unit(self._projected_text(pooled_text)),
            features=caption,
        )
