"""Contrastive and captioning losses: arrays in, float32 inside, per-example values out.

The contrastive losses take the embeddings of the global batch. Under `jax.jit` an array sharded
over devices is the global batch, so a sharded step has the same negatives, and the same loss, as
one device.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int

from mammut.core.sharding import partition_spec
from mammut.core.typing import Array


def contrastive_logits(
    image_embed: Float[Array, "B E"],
    text_embed: Float[Array, "B E"],
    log_scale: Float[Array, ""],
    bias: Float[Array, ""] | float = 0.0,
) -> Float[Array, "B B"]:
    """Scaled cosines float[B, B] of every image (rows) with every text (columns)."""
    # In full: by default a TPU multiplies in bfloat16, and a scale of 100 makes errors of 0.4 of
    # that.
    cosines = jnp.matmul(
        image_embed.astype(jnp.float32),
        text_embed.astype(jnp.float32).T,
        precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.exp(log_scale) * cosines + bias


def softmax_contrastive(logits: Float[Array, "B B"]) -> Float[Array, "B"]:
    """InfoNCE (CLIP, arXiv 2103.00020, figure 3): the mean of image-to-text and text-to-image per pair, float[B]."""
    # Not `jnp.diagonal`, for which the partitioner moves rows between devices.
    matched = jnp.where(jnp.eye(len(logits), dtype=bool), logits, 0).sum(1)
    image_to_text = jax.nn.logsumexp(logits, axis=1) - matched
    text_to_image = jax.nn.logsumexp(logits, axis=0) - matched
    return (image_to_text + text_to_image) / 2


def sigmoid_contrastive(logits: Float[Array, "B B"]) -> Float[Array, "B"]:
    """SigLIP (arXiv 2303.15343, algorithm 1): each pair on its own is matched or not; float[B], summed over the texts.

    Start it with a logit scale of 10 and a bias of -10: B - 1 of B pairs are negatives.
    """
    return sigmoid_pairs(logits, jnp.eye(len(logits), dtype=bool)).sum(1)


def sigmoid_pairs(logits: Float[Array, "Q R"], matched: Bool[Array, "Q R"]) -> Float[Array, "Q R"]:
    """What each pair costs by the sigmoid loss, float[Q, R]."""
    return -jax.nn.log_sigmoid(jnp.where(matched, logits, -logits))


def focal_contrastive(
    logits: Float[Array, "B B"],
    *,
    gamma: float = 1.0,
    alpha: float = 0.5,
    normalization: str = "batch",
) -> Float[Array, "B"]:
    """The paper's focal sigmoid loss (section 3.2; RO-ViT, arXiv 2305.07011, section 3.3): float[B], over the texts.

    With p the probability given to the truth of a pair, a pair costs -(1 - p)^gamma log p, weighted
    2 alpha if matched and 2 (1 - alpha) if not, so that alpha = 0.5 is the unweighted form of the
    paper. The paper adds image-to-text and text-to-image; over a full B x B matrix these are one
    number, which is counted once here.

    `normalization` is what the mean over the batch of the returned values divides the sum over B x
    B pairs by: "batch", as in the paper, by B; "pairs" by B * B. By B, a batch of 16K starts at
    about 5,700 at temperature 1, beside a captioning loss of 11: weights of 1 and 1 then mean
    something only with a negative bias, as SigLIP has.
    """
    pairs = focal_pairs(logits, jnp.eye(len(logits), dtype=bool), gamma=gamma, alpha=alpha)
    return pairs.sum(1) if normalization == "batch" else pairs.mean(1)


def focal_pairs(
    logits: Float[Array, "Q R"],
    matched: Bool[Array, "Q R"],
    *,
    gamma: float = 1.0,
    alpha: float = 0.5,
) -> Float[Array, "Q R"]:
    """What each pair costs by the focal loss, float[Q, R]."""
    logits = jnp.where(matched, logits, -logits)
    log_p, log_not_p = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return -jnp.where(matched, 2 * alpha, 2 * (1 - alpha)) * jnp.exp(gamma * log_not_p) * log_p


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

    The scores exist for `chunk` text positions at a time, float32[B, chunk, V], and are computed
    again in the backward pass: all at once they are 33 MB an example at V = 64,000.
    `label_smoothing` spreads that share of the target evenly over the vocabulary; `z_loss` weighs
    log(Z)^2, which keeps the scores from drifting. To train, `summed_caption_loss` is faster.
    """

    @jax.checkpoint
    def token_losses(xs):
        features, labels = xs
        logits = _vocab_logits(features, vocab_kernel, vocab_bias)
        return _token_losses(logits, _is_label(logits, labels), label_smoothing, z_loss)[0]

    losses = _joined(jax.lax.map(token_losses, _chunks((features, labels), chunk)), labels.shape)
    return jnp.where(loss_mask, losses, 0)


def summed_caption_loss(
    features: Float[Array, "B L D"],
    vocab_kernel: Float[Array, "D V"],
    labels: Int[Array, "B L"],
    loss_mask: Bool[Array, "B L"],
    *,
    vocab_bias: Float[Array, "V"] | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = 16,
) -> Float[Array, ""]:
    """The sum of `caption_loss`, float32, with the same peak of scores and three matrix products in place of four.

    The gradient of a sum is known but for one factor, so it is taken in the forward pass, chunk by
    chunk, while the scores are there. It is summed in float32, and multiplied in the type of
    `features` like any other.
    """
    return _summed(
        label_smoothing, z_loss, chunk, features, vocab_kernel, vocab_bias, labels, loss_mask
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _summed(label_smoothing, z_loss, chunk, features, vocab_kernel, vocab_bias, labels, loss_mask):
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss, "chunk": chunk}
    return caption_loss(
        features, vocab_kernel, labels, loss_mask, vocab_bias=vocab_bias, **options
    ).sum()


def _summed_forward(
    label_smoothing, z_loss, chunk, features, vocab_kernel, vocab_bias, labels, loss_mask
):
    def step(carry, xs):
        total, kernel_grad, bias_grad = carry
        features, labels, counted = xs
        logits = _vocab_logits(features, vocab_kernel, vocab_bias)
        is_label = _is_label(logits, labels)
        losses, log_z = _token_losses(logits, is_label, label_smoothing, z_loss)
        weights = counted.astype(jnp.float32)[..., None]
        target = (1 - label_smoothing) * is_label + label_smoothing / logits.shape[-1]
        slopes = weights * ((1 + 2 * z_loss * log_z) * jnp.exp(logits - log_z) - target)
        bias_grad = None if bias_grad is None else bias_grad + slopes.sum((0, 1))
        slopes = slopes.astype(features.dtype)
        kernel_grad += jnp.einsum(
            "BLD,BLV->DV", features, slopes, preferred_element_type=jnp.float32
        )
        features_grad = jnp.matmul(slopes, vocab_kernel.T, preferred_element_type=jnp.float32)
        return (total + jnp.where(counted, losses, 0).sum(), kernel_grad, bias_grad), features_grad

    zeros = lambda x: None if x is None else jnp.zeros(x.shape, jnp.float32)  # noqa: E731
    start = (jnp.float32(0), zeros(vocab_kernel), zeros(vocab_bias))
    (total, *grads), features_grad = jax.lax.scan(
        step, start, _chunks((features, labels, loss_mask), chunk)
    )
    like = jax.tree.map(lambda x: jnp.zeros(0, x.dtype), (features, vocab_kernel, vocab_bias))
    return total, ((_joined(features_grad, labels.shape), *grads), like)


def _summed_backward(label_smoothing, z_loss, chunk, saved, factor):
    return *jax.tree.map(lambda grad, like: (factor * grad).astype(like.dtype), *saved), None, None


_summed.defvjp(_summed_forward, _summed_backward)


def _vocab_logits(features: Array, vocab_kernel: Array, vocab_bias: Array | None) -> Array:
    logits = jnp.matmul(features, vocab_kernel, preferred_element_type=jnp.float32)
    return logits if vocab_bias is None else logits + vocab_bias


def _is_label(logits: Array, labels: Array) -> Array:
    return jnp.arange(logits.shape[-1]) == labels[..., None]


def _token_losses(
    logits: Array, is_label: Array, label_smoothing: float, z_loss: float
) -> tuple[Array, Array]:
    """The losses float[B, L] of logits float[B, L, V], and log(Z) float[B, L, 1]."""
    log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    # A sum and no look-up, so that a vocabulary that is split over devices stays where it is.
    target = (1 - label_smoothing) * jnp.where(is_label, logits, 0).sum(
        -1
    ) + label_smoothing * logits.mean(-1)
    return log_z[..., 0] - target + z_loss * log_z[..., 0] ** 2, log_z


def _chunks(tree: Any, chunk: int) -> Any:
    """Arrays [B, L, ...] -> [chunks, B, at most `chunk`, ...]: text is cut, so that the batch keeps its sharding."""

    def split(x):
        count = math.ceil(x.shape[1] / chunk)
        size = math.ceil(x.shape[1] / count)
        x = jnp.pad(x, ((0, 0), (0, count * size - x.shape[1])) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(len(x), count, size, *x.shape[2:]), 1, 0)

    return jax.tree.map(split, tree)


def _joined(x: Array, shape: tuple[int, int]) -> Array:
    """What `_chunks` took apart, [B, L, ...]."""
    return jnp.moveaxis(x, 0, 1).reshape(shape[0], -1, *x.shape[3:])[:, : shape[1]]


def caption_sum(
    features: jax.Array,
    vocab_kernel: jax.Array,
    vocab_bias: jax.Array | None,
    labels: jax.Array,
    loss_mask: jax.Array,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = 16,
) -> jax.Array:
    """`summed_caption_loss` over the batch, on every device over its own rows.

    Else the vocabulary's kernel would be gathered, and its gradient reduced, once for every chunk.
    """
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss, "chunk": chunk}

    def summed(features, vocab_kernel, vocab_bias, labels, loss_mask):
        return summed_caption_loss(
            features, vocab_kernel, labels, loss_mask, vocab_bias=vocab_bias, **options
        )[None]

    mesh = jax.sharding.get_abstract_mesh()
    axes = None if mesh.empty else partition_spec(("batch",), labels.shape[:1], mesh)[0]
    if axes:
        rows, whole = PartitionSpec(axes), PartitionSpec()
        summed = jax.shard_map(
            summed,
            in_specs=(rows, whole, whole, rows, rows),
            out_specs=rows,
            axis_names={axes} if isinstance(axes, str) else set(axes),
            check_vma=False,
        )
    return summed(features, vocab_kernel, vocab_bias, labels, loss_mask).sum()
