"""MaMMUT: one image encoder, one text decoder, two passes."""

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Bool, Float, Int, Key, UInt8

from mammut.config import ModelConfig
from mammut.decoder import TextDecoder
from mammut.layers import Dtypes, Linear
from mammut.typing import Array
from mammut.vit import EncoderOutput, ViT

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

    `MaMMUT(presets.mammut_b16(), rngs=nnx.Rngs(0))` makes random weights.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtypes = Dtypes(jnp.dtype(config.dtype), jnp.dtype(config.param_dtype))
        self.vision = ViT(config, rngs=rngs, dtypes=dtypes)
        self.image_projection = Linear(
            {"embed": config.vision.width}, {"shared": config.text.width}, rngs=rngs, dtypes=dtypes
        )
        self.text = TextDecoder(config, rngs=rngs, dtypes=dtypes)
        # Scalars of the contrastive loss stay float32 whatever the storage type; the scale is kept as its logarithm.
        self.logit_scale = nnx.Param(jnp.log(jnp.float32(config.logit_scale_init)), axes=())
        self.logit_bias = nnx.Param(jnp.float32(config.logit_bias_init), axes=())

    def image_tokens(self, image: Image, crop_key: Key[Array, ""] | None = None) -> EncoderOutput:
        """The image in the decoder's width: `tokens` float[B, P, D], `pooled` float[B, D]."""
        encoded = self.vision(image, crop_key)
        tokens = self.image_projection(encoded.tokens)
        return EncoderOutput(tokens, tokens.mean(1, dtype=jnp.float32), encoded.grid)

    def encode_image(self, image: Image, crop_key: Key[Array, ""] | None = None) -> Float[Array, "B E"]:
        """Image embeddings float[B, E] of unit norm, for uint8[B, height, width, 3] images."""
        return unit(self.image_tokens(image, crop_key).pooled)

    def encode_text(self, tokens: Int[Array, "B L"], text_valid: Bool[Array, "B L"]) -> Float[Array, "B E"]:
        """Text embeddings float[B, E] of unit norm: the mean over real tokens of the contrastive pass."""
        features = self.text.contrastive_pass(tokens, text_valid).astype(jnp.float32)
        weights = text_valid.astype(jnp.float32)[..., None]
        return unit((features * weights).sum(1) / jnp.maximum(weights.sum(1), 1))

    def caption_logits(
        self, image: Image, tokens: Int[Array, "B L"], text_valid: Bool[Array, "B L"] | None = None
    ) -> Float[Array, "B L V"]:
        """Logits float[B, L, V] of the token after each of `tokens`, given the image.

        Without `text_valid` all tokens count as real. Pads at the end change nothing before them either way.
        """
        if text_valid is None:
            text_valid = jnp.ones(tokens.shape, bool)
        image_tokens = self.image_tokens(image).tokens
        return self.text.logits(self.text.caption_pass(tokens, text_valid, image_tokens))

    def cross_attention(
        self, image: Image, tokens: Int[Array, "B L"], text_valid: Bool[Array, "B L"] | None = None
    ) -> Float[Array, "G B N L P"]:
        """Where `caption_logits` looks: float32[G, B, N, L, P] of G cross-attention layers and N heads.

        Row i of a text weighs the P patches, row by row from the top left, when it predicts token i + 1; it sums to 1.
        """
        if text_valid is None:
            text_valid = jnp.ones(tokens.shape, bool)
        return self.text.cross_attention(tokens, text_valid, self.image_tokens(image).tokens)

    def two_pass(
        self,
        image: Image,
        tokens: Int[Array, "B L"],
        text_valid: Bool[Array, "B L"],
        crop_key: Key[Array, ""] | None = None,
    ) -> TwoPassOutput:
        """Both passes on one batch, with the image encoded once: what a training step needs."""
        encoded = self.image_tokens(image, crop_key)
        return TwoPassOutput(
            image_embed=unit(encoded.pooled),
            text_embed=self.encode_text(tokens, text_valid),
            features=self.text.caption_pass(tokens, text_valid, encoded.tokens),
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
    counts = {"vision": 0, "image_projection": 0, "token_embed": 0, "layers": 0, "cross_layers": 0, "other": 0}
    for path, param in nnx.to_flat_state(nnx.state(abstract, nnx.Param)):
        part = path[1] if path[0] == "text" else path[0]
        counts[part if part in counts else "other"] += param.get_value().size
    return {**counts, "total": sum(counts.values())}


def forward_flops(config: ModelConfig) -> dict[str, int]:
    """FLOPs of one example forward (2 a multiply-add), by part: vision, contrastive pass, caption pass, vocabulary.

    Attention counts in full where it is bidirectional and half where it is causal. A training step is three times the
    sum; what remat recomputes is not counted, nor are the B x B contrastive logits.
    """
    vision, text = config.vision, config.text
    patches, length = vision.grid[0] * vision.grid[1], text.max_length

    def layer(asking, attended, width, mlp_dim, causal=False):
        projections = 2 * width * width * (2 * asking + 2 * attended)
        attention = 4 * asking * attended * width // (2 if causal else 1)
        return projections + attention + 4 * asking * width * mlp_dim

    cross = (text.depth // text.cross_attn_every) * layer(length, patches, text.width, text.mlp_dim)
    return {
        "vision": 2 * patches * vision.patch_size**2 * 3 * vision.width
        + vision.depth * layer(patches, patches, vision.width, vision.mlp_dim)
        + 2 * patches * vision.width * text.width,
        "contrastive_pass": text.depth * layer(length, length, text.width, text.mlp_dim),
        "caption_pass": text.depth * layer(length, length, text.width, text.mlp_dim, causal=True) + cross,
        "vocabulary": 2 * length * text.width * text.vocab_size,
    }
