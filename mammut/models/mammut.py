"""MaMMUT: one image encoder, one text decoder, two passes; and MAGMA: an image prefix and adapters on that decoder."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Bool, Float, Int, Key, UInt8

from mammut.config import ModelConfig, ResNetConfig
from mammut.core.sharding import constrain
from mammut.core.typing import Array
from mammut.models.adapter_modules import Adapters
from mammut.models.decoder import TextDecoder
from mammut.models.layers import Dtypes, LayerNorm, Linear
from mammut.models.resnet import ResNet, resnet_flops
from mammut.models.vit import EncoderOutput, ViT, patches_kept

# Of the key of an image's crop: that of a patch drop is 4 (`vit`).
_DROPOUT_STREAM = 5
_PREFIX_NORM_EPS = 1e-5  # PyTorch's default, as in MAGMA

Image = UInt8[Array, "B height width 3"] | Float[Array, "B height width 3"]


@struct.dataclass
class TwoPassOutput:
    """What one training forward gives: the image was encoded once."""

    image_embed: jax.Array  # float[B, E], unit vectors
    text_embed: jax.Array  # float[B, E], unit vectors
    features: jax.Array  # float[B, L, D] of the caption pass; `model.text.logits` scores them


class MaMMUT(nnx.Module):
    """The model of "MaMMUT: A Simple Architecture for Joint Learning for MultiModal Tasks" (arXiv 2303.16839).

    The image embedding is the mean of the patch tokens, the text embedding the mean of the contrastive pass over real
    tokens; there is no class token, no pooler and no projection head (section 4.5 finds each unnecessary). One linear
    map brings image tokens to the decoder's width, so E is that width. Images are uint8 and normalised on the device.
    The models of others, from openMaMMUT to SigLIP and CapPa, are values of `ModelConfig` (`mammut.interop`).

    With `ModelConfig.conditioning` "prefix" it is the model of "MAGMA: Multimodal Augmentation of Generative Models
    through Adapter-based Finetuning" (arXiv 2112.05253): the image tokens, mapped to the decoder's width, dropped out
    and normed, stand in front of the text.

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
        text_dtypes = dataclasses.replace(dtypes, param=jnp.dtype(config.text.param_dtype or config.param_dtype))
        self.text = TextDecoder(config, rngs=rngs, dtypes=text_dtypes)
        to_embedding = config.image_projection in ("separate", "embedding")
        self.image_embed_projection = linear(config.vision_size, config.embed_size) if to_embedding else None
        self.text_embed_projection = linear(config.text.width, config.embed_size) if config.text_projection else None
        # Scalars of the contrastive loss stay float32 whatever the storage type; the scale is kept as its logarithm.
        self.logit_scale = nnx.Param(jnp.log(jnp.float32(config.logit_scale_init)), axes=())
        self.logit_bias = nnx.Param(jnp.float32(config.logit_bias_init), axes=())
        self.prefix_norm = LayerNorm(config.text.width, _PREFIX_NORM_EPS, dtypes=dtypes) if config.prefix_norm else None
        # Last, so that they leave the random weights of the rest as they are.
        towers = {"text": self.text, "vision": self.vision}
        self.adapters = Adapters(config.adapters, towers, rngs=rngs, dtypes=dtypes) if config.adapters else None
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
        return self.adapters.attached(tower, name, self.active_adapters) if self.active_adapters else tower

    def image_tokens(self, image: Image, crop_key: Key[Array, ""] | None = None) -> EncoderOutput:
        """The image as the decoder takes it, `tokens` float[B, P, D]; `pooled` float[B, E], of any length.

        `crop_key` is given in training: beside what the encoder draws from it (`ViT`), a prefix is dropped out.
        """
        encoded = self.encoder(image, crop_key)
        # Pinned, as every layer's output: unpinned, the backward pass of micro-batches moved them between devices.
        tokens = constrain(encoded.tokens, "batch", None, "embed")
        if self.config.prefix_tokens is not None:
            tokens = encoded.pooled.astype(tokens.dtype)
        if self.image_projection is not None:
            tokens = constrain(self.image_projection(tokens), "batch", None, "embed")
        pooled = encoded.pooled
        if self.config.image_projection == "shared":
            pooled = constrain(tokens.mean(1, dtype=jnp.float32), "batch", "embed")
        elif self.image_embed_projection is not None:
            pooled = self.image_embed_projection(pooled.astype(self.vision.dtype)).astype(jnp.float32)
        dropout = self.config.prefix_dropout
        if dropout and crop_key is not None:
            kept = jax.random.bernoulli(jax.random.fold_in(crop_key, _DROPOUT_STREAM), 1 - dropout, tokens.shape)
            tokens = jnp.where(kept, tokens / (1 - dropout), 0)
        if self.prefix_norm is not None:
            tokens = self.prefix_norm(tokens)
        return EncoderOutput(tokens, pooled, encoded.grid)

    def encode_image(self, image: Image, crop_key: Key[Array, ""] | None = None) -> Float[Array, "B E"]:
        """Image embeddings float[B, E] of unit norm, for uint8[B, height, width, 3] images."""
        if self.config.text.pooling == "none":
            raise ValueError("the model has no contrastive pass: DecoderConfig.pooling is 'none'")
        return unit(self.image_tokens(image, crop_key).pooled)

    def encode_text(self, tokens: Int[Array, "B L"], text_valid: Bool[Array, "B L"]) -> Float[Array, "B E"]:
        """Text embeddings float[B, E] of unit norm: the mean over real tokens of the contrastive pass.

        Other ways are values of `DecoderConfig.pooling`; "mean_all" and "last" want texts padded to `max_length`, as
        they were in training.
        """
        return unit(self.text_vector(tokens, text_valid))

    def text_vector(self, tokens: Int[Array, "B L"], text_valid: Bool[Array, "B L"]) -> Float[Array, "B E"]:
        """What `encode_text` gives, float[B, E] of any length."""
        return self._pooled_text(self.decoder.contrastive_pass(tokens, text_valid), tokens, text_valid)

    def _pooled_text(
        self, features: Float[Array, "B Lc D"], tokens: Int[Array, "B L"], text_valid: Bool[Array, "B L"]
    ) -> Float[Array, "B E"]:
        pooling = self.config.text.pooling
        if pooling == "mean":
            weights = self.text.valid(tokens, text_valid).astype(jnp.float32)[..., None]
            pooled = (features.astype(jnp.float32) * weights).sum(1) / jnp.maximum(weights.sum(1), 1)
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

        Without `text_valid` all tokens count as real. Pads at the end change nothing before them either way.
        """
        if text_valid is None:
            text_valid = jnp.ones(tokens.shape, bool)
        image_tokens = self.image_tokens(image).tokens
        return self.text.logits(self.decoder.caption_pass(tokens, text_valid, image_tokens))

    def cross_attention(
        self, image: Image, tokens: Int[Array, "B L"], text_valid: Bool[Array, "B L"] | None = None
    ) -> Float[Array, "G B N L P"]:
        """Where `caption_logits` looks: float32[G, B, N, L, P] of G cross-attention layers and N heads.

        Row i of a text weighs the P image tokens that the decoder sees, as `image_tokens` gives them, when it predicts
        token i + 1; it sums to 1. With an image prefix they are of the G self-attention layers, and the text has the
        rest.
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

        `ModelConfig.passes` says whether in two calls of the decoder or in one traversal; the numbers are the same.
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
    return {tuple(path): param.axes for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def num_params(config: ModelConfig) -> dict[str, int]:
    """Parameters of a MaMMUT without making one: by part, and their `total`."""
    abstract = nnx.eval_shape(lambda: MaMMUT(config, rngs=nnx.Rngs(0)))
    counts = {
        **{"vision": 0, "image_projection": 0, "token_embed": 0, "layers": 0, "cross_layers": 0},
        **({"adapters": 0} if config.adapters else {}),
        "other": 0,
    }
    for path, param in nnx.to_flat_state(nnx.state(abstract, nnx.Param)):
        part = path[1] if path[0] == "text" else path[0]
        part = "layers" if part in ("bare_layers", "text_only_layers") else part
        counts[part if part in counts else "other"] += param.get_value().size
    return {**counts, "total": sum(counts.values())}


def forward_flops(
    config: ModelConfig, training: bool = False, length: int | None = None, sees_image: bool = True
) -> dict[str, int]:
    """FLOPs of one example forward (2 a multiply-add), by part: vision, contrastive pass, caption pass, vocabulary.

    A text has `length` tokens, beside those of an image prefix; None: as many as the model has places for. With
    `training`, what it is in a training step, where `VisionConfig.patch_drop` leaves patches out; such a step is three
    times the sum. Without `sees_image` the caption pass is a language pass. Attention counts in full where it is
    bidirectional and half where it is causal. What remat recomputes is not counted, nor are the B x B contrastive
    logits, nor adapters.
    """
    vision, text = config.vision, config.text
    length = config.text_length if length is None else length
    # Of the caption pass: a prefix takes the start's place.
    sequence = length + (max(config.num_prefix_tokens - 1, 0) if sees_image else 0)
    patches = vision.grid[0] * vision.grid[1]
    dropped = patches - patches_kept(patches, vision.patch_drop) if training else 0
    tokens = patches - dropped + vision.class_token
    seen = vision.num_tokens - (0 if vision.pooling == "queries" else dropped)  # by the decoder

    def attention(tower, asking, attended, causal=False, size=None):  # `size` of what is attended to
        own = (3 if tower.attn_gate else 2) * asking * tower.width
        maps = 2 * tower.width * (own + 2 * attended * (size or tower.width))
        return maps + 4 * asking * attended * tower.width // (2 if causal else 1)

    def mlp(tower, asking):
        return (6 if tower.activation == "swiglu" else 4) * asking * tower.width * tower.mlp_dim

    def projected(count, *sizes):
        return 2 * count * math.prod(sizes)

    groups, inside = text.num_cross_layers, text.cross_attn_position == "inside"
    mlps = text.depth if text.mlp_before_cross_attn else text.depth - groups
    text_only = text.text_only_depth

    def text_layers(depth, mlps, causal, length):
        return depth * attention(text, length, length, causal) + mlps * mlp(text, length)

    def vit():
        pool = {
            "map": attention(vision, 1, tokens) + mlp(vision, 1),
            "queries": 4 * vision.pool_queries * tokens * config.vision_size
            + projected(2, config.vision_size, vision.pool_queries * config.vision_size + tokens * vision.width),
        }
        layers = vision.depth * (attention(vision, tokens, tokens) + mlp(vision, tokens))
        return projected(patches, vision.patch_size**2 * 3, vision.width) + layers + pool.get(vision.pooling, 0)

    to_decoder = config.image_projection in ("shared", "separate", "decoder")
    to_embedding = config.image_projection in ("separate", "embedding")
    cross = attention(text, length, seen, size=config.image_token_size)
    cross += 0 if inside else mlp(text, length)
    contrastive = (text_only, text_only) if text_only else (text.depth, mlps)
    early = text_layers(text_only, text_only, True, sequence) if text.depth else 0
    of_pooled = config.prefix_tokens is not None
    return {
        "vision": (resnet_flops(vision) if isinstance(vision, ResNetConfig) else vit())
        + to_decoder * projected(config.prefix_tokens if of_pooled else seen, config.vision_size, text.width)
        + to_embedding * projected(1, config.vision_size, config.embed_size),
        "contrastive_pass": 0
        if text.pooling == "none"
        else text_layers(*contrastive, text.causal_contrastive, length)
        + config.text_projection * projected(1, text.width, config.embed_size),
        "caption_pass": early + text_layers(text.depth, mlps, True, sequence) + sees_image * groups * cross,
        "vocabulary": projected(length, text.width, text.vocab_size) if text.depth else 0,
    }
