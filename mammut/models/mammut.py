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
from mammut.models.image_encoder import EncodedImage, Image, Video
from mammut.models.inputs import require_images, require_texts
from mammut.models.layers import Constant, LayerNorm, Linear, dropout, initialise, param, unit
from mammut.models.masks import caption_labels
from mammut.models.requirements import (
    require_embedding,
    require_prefix,
    require_video,
    require_video_config,
)
from mammut.models.resnet import ResNet, ResNetConfig
from mammut.models.video import reads_tubes
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
        require_embedding(self)
        require_prefix(self)
        require_video_config(self)

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

        video = config.vision.video
        if video is not None and video.frame_embed:
            sizes = video.frames, config.image_token_size
            self.frame_embed = param(Constant(0.0), sizes, dtypes.param, None, "embed")
        else:
            self.frame_embed = None

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
        """Encodes images or videos for both passes.

        Returns tokens float[B, P, D] and a vector float32[B, E].

        With `VideoConfig.mode` "tubes" the encoder sees all frames of a video at once. In other
        models it sees each frame alone: the tokens are those of all frames, one frame after the
        other, and the vector is the mean of the frames' unit vectors. A video of one frame is an
        image, bit for bit.

        Args:
          image: uint8[B, height, width, 3] RGB, or videos uint8[B, T, height, width, 3]; or float
            of such a shape, normalised already:
            (pixel / 255 - `VisionConfig.image_mean`) / `VisionConfig.image_std`.
          augment: the random draws of a training step.

        Raises:
          ValueError: the images are of another size or type, or their float pixels not normalised;
            or they are videos, which the model does not read (`requirements.require_video`).
        """
        frames = 1
        if getattr(image, "ndim", None) == 5:  # the encoder refuses what is no image
            require_images(image, self.config.vision)
            frames = image.shape[1]
            require_video(self.config, frames, augment)
            if frames == 1:
                image = image[:, 0]
        apart = frames > 1 and not reads_tubes(self.config.vision)
        if apart:
            image = image.reshape(len(image) * frames, *image.shape[2:])

        encoded = self._encoded(image, augment)
        if apart:
            encoded = self._joined(encoded, frames)
        elif self.frame_embed is not None:
            first = self.frame_embed[...][0].astype(encoded.tokens.dtype)
            encoded = encoded.replace(tokens=encoded.tokens + first)

        tokens = encoded.tokens
        if augment.prefix_dropout:
            key = jax.random.fold_in(augment.key, _DROPOUT_STREAM)
            tokens = dropout(key, tokens, augment.prefix_dropout)
        if self.prefix_norm is not None:
            tokens = self.prefix_norm(tokens)
        return encoded.replace(tokens=tokens)

    def _encoded(self, image: Image, augment: Augment) -> EncodedImage:
        """Encodes images, or videos whose frames the encoder sees at once."""
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
        return EncodedImage(tokens, vector, encoded.grid)

    def _joined(self, encoded: EncodedImage, frames: int) -> EncodedImage:
        """Joins frames that were encoded one by one, [B * T, ...], to videos, [B, ...]."""
        rows, count, width = encoded.tokens.shape
        batch = rows // frames
        tokens = encoded.tokens.reshape(batch, frames, count, width)
        if self.frame_embed is not None:
            each = self.frame_embed[...][:frames, None].astype(tokens.dtype)
            tokens = tokens + each
        if self.config.prefix_tokens is not None:
            tokens = tokens.mean(1)
        else:
            tokens = tokens.reshape(batch, frames * count, width)
        vector = unit(encoded.vector).reshape(batch, frames, encoded.vector.shape[1]).mean(1)
        return EncodedImage(constrain(tokens, "batch", None, "embed"), vector, None)

    def encode_image(self, image: Image, augment: Augment = Augment()) -> Float[Array, "B E"]:
        """Embeds images or videos as unit vectors float32[B, E].

        Args:
          image: uint8[B, height, width, 3] RGB; or videos, or float, as for `image_tokens`.
          augment: the random draws of a training step.

        Raises:
          ValueError: the model has no contrastive pass, or `image_tokens` refuses the images.
        """
        self.config.text.require_contrastive_pass()
        return unit(self.image_tokens(image, augment).vector)

    def encode_video(self, video: Video, augment: Augment = Augment()) -> Float[Array, "B E"]:
        """Embeds videos as unit vectors float32[B, E].

        It is `encode_image` for videos alone: what has no axis of frames is refused.

        Args:
          video: uint8[B, T, height, width, 3] RGB; or float, normalised as for `image_tokens`.
          augment: the random draws of a training step.

        Raises:
          ValueError: `video` is none, or what `encode_image` refuses.

        Example:
          >>> model.encode_video(np.zeros((2, 8, 48, 48, 3), np.uint8)).shape
          (2, 64)
        """
        given = f"{video.dtype}{list(video.shape)}" if hasattr(video, "shape") else type(video)
        require(
            getattr(video, "ndim", None) == 5,
            f"video is {given}, expected uint8[B, T, height, width, 3]",
        )
        return self.encode_image(video, augment)

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
        """Scores the token after each of `tokens`, given the image or video.

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
