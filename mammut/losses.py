"""Contrastive and captioning losses: arrays in, float32 inside, per-example values out.

The contrastive losses take the embeddings of the global batch. Under `jax.jit` an array sharded over devices is the
global batch, so a sharded step has the same negatives, and the same loss, as one device.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from mammut.typing import Array


def contrastive_logits(
    image_embed: Float[Array, "B E"],
    text_embed: Float[Array, "B E"],
    log_scale: Float[Array, ""],
    bias: Float[Array, ""] | float = 0.0,
) -> Float[Array, "B B"]:
    """Scaled cosines float[B, B] of every image (rows) with every text (columns)."""
    return jnp.exp(log_scale) * (image_embed.astype(jnp.float32) @ text_embed.astype(jnp.float32).T) + bias


def softmax_contrastive(logits: Float[Array, "B B"]) -> Float[Array, "B"]:
    """InfoNCE (CLIP, arXiv 2103.00020, figure 3): the mean of image-to-text and text-to-image per pair, float[B]."""
    matched = jnp.diagonal(logits)
    image_to_text = jax.nn.logsumexp(logits, axis=1) - matched
    text_to_image = jax.nn.logsumexp(logits, axis=0) - matched
    return (image_to_text + text_to_image) / 2


def sigmoid_contrastive(logits: Float[Array, "B B"]) -> Float[Array, "B"]:
    """SigLIP (arXiv 2303.15343, algorithm 1): each pair on its own is matched or not; float[B], summed over the texts.

    Start it with a logit scale of 10 and a bias of -10: B - 1 of B pairs are negatives.
    """
    signs = 2 * jnp.eye(len(logits)) - 1
    return -jax.nn.log_sigmoid(signs * logits).sum(1)


def focal_contrastive(
    logits: Float[Array, "B B"], *, gamma: float = 1.0, alpha: float = 0.5, normalization: str = "batch"
) -> Float[Array, "B"]:
    """The paper's focal sigmoid loss (section 3.2; RO-ViT, arXiv 2305.07011, section 3.3): float[B], over the texts.

    With p the probability given to the truth of a pair, a pair costs -(1 - p)^gamma log p, weighted 2 alpha if matched
    and 2 (1 - alpha) if not, so that alpha = 0.5 is the unweighted form of the paper. The paper adds image-to-text and
    text-to-image; over a full B x B matrix these are one number, which is counted once here.

    `normalization` is what the mean over the batch of the returned values divides the sum over B x B pairs by:
    "batch", as in the paper, by B; "pairs" by B * B. By B, a batch of 16K starts at about 5,700 at temperature 1,
    beside a captioning loss of 11: weights of 1 and 1 then mean something only with a negative bias, as SigLIP has.
    """
    signs = 2 * jnp.eye(len(logits)) - 1
    log_p = jax.nn.log_sigmoid(signs * logits)
    log_not_p = jax.nn.log_sigmoid(-signs * logits)
    weights = jnp.where(signs > 0, 2 * alpha, 2 * (1 - alpha))
    pairs = -weights * jnp.exp(gamma * log_not_p) * log_p
    return pairs.sum(1) if normalization == "batch" else pairs.mean(1)


def caption_loss(
    features: Float[Array, "B L D"],
    vocab_kernel: Float[Array, "D V"],
    labels: Int[Array, "B L"],
    loss_mask: Bool[Array, "B L"],
    *,
    vocab_bias: Float[Array, "V"] | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = 16,
) -> Float[Array, "B L"]:
    """Cross-entropy of each label in nats, float[B, L]; zero where `loss_mask` is False.

    The scores exist for `chunk` text positions at a time, float32[B, chunk, V], and are computed again in the backward
    pass: all at once they are 33 MB an example at V = 64,000. `label_smoothing` spreads that share of the target evenly
    over the vocabulary; `z_loss` weighs log(Z)^2, which keeps the scores from drifting.
    """

    def token_loss(features, labels):
        logits = jnp.matmul(features, vocab_kernel, preferred_element_type=jnp.float32)
        if vocab_bias is not None:
            logits = logits + vocab_bias
        log_z = jax.nn.logsumexp(logits, axis=-1)
        target = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        target = (1 - label_smoothing) * target + label_smoothing * logits.mean(-1)
        return log_z - target + z_loss * log_z**2

    length = features.shape[1]
    if length <= chunk:
        losses = token_loss(features, labels)
    else:
        pad = -length % chunk

        def split(x):  # [B, L, ...] -> [chunks, B, chunk, ...]: text is cut, so the batch keeps its sharding
            x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
            return jnp.moveaxis(x.reshape(len(x), -1, chunk, *x.shape[2:]), 1, 0)

        step = jax.checkpoint(token_loss)
        losses = jax.lax.map(lambda xs: step(*xs), (split(features), split(labels)))
        losses = jnp.moveaxis(losses, 0, 1).reshape(len(features), -1)[:, :length]
    return jnp.where(loss_mask, losses, 0)
