"""Contrastive and captioning losses: arrays in, float32 inside, per-example values out.

The contrastive losses take the embeddings of the global batch. Under `jax.jit` an array that is
sharded over devices is the global batch, so a sharded step has the same negatives, and the same
loss, as a step on one device.

To add a contrastive loss, write its function and give it a row of `CONTRASTIVE`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int

from mammut.core.sharding import partition_spec
from mammut.core.typing import Array
from mammut.models.ring_loss import ring_pairs, ring_softmax


def contrastive_logits(
    image_embed: Float[Array, "B E"],
    text_embed: Float[Array, "B E"],
    log_scale: Float[Array, ""],
    bias: Float[Array, ""] | float = 0.0,
) -> Float[Array, "B B"]:
    """Computes the scaled cosines of images and texts, float[B, B].

    Images are rows, texts are columns.
    """
    # In full float32: by default a TPU multiplies in bfloat16, and a scale of 100 turns the
    # rounding into errors of up to 0.4.
    cosines = jnp.matmul(
        image_embed.astype(jnp.float32),
        text_embed.astype(jnp.float32).T,
        precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.exp(log_scale) * cosines + bias


def softmax_contrastive(logits: Float[Array, "B B"]) -> Float[Array, "B"]:
    """Computes the InfoNCE loss of each pair, float[B].

    The source is CLIP (arXiv 2103.00020, figure 3).

    The mean of two cross-entropies: of the image among all texts, and of the text among all images.
    """
    # Not `jnp.diagonal`, for which the partitioner moves rows between devices.
    matched = jnp.where(jnp.eye(len(logits), dtype=bool), logits, 0).sum(1)
    image_to_text = jax.nn.logsumexp(logits, axis=1) - matched
    text_to_image = jax.nn.logsumexp(logits, axis=0) - matched
    return (image_to_text + text_to_image) / 2


def sigmoid_contrastive(logits: Float[Array, "B B"]) -> Float[Array, "B"]:
    """Computes the sigmoid loss of each image, float[B].

    It is summed over the texts.

    Every image with every text is a pair of its own, which matches or does not (SigLIP, arXiv
    2303.15343, algorithm 1).
    """
    return sigmoid_pairs(logits, jnp.eye(len(logits), dtype=bool)).sum(1)


def sigmoid_pairs(logits: Float[Array, "Q R"], matched: Bool[Array, "Q R"]) -> Float[Array, "Q R"]:
    """Computes the sigmoid loss of each image-text pair, float[Q, R]."""
    return -jax.nn.log_sigmoid(jnp.where(matched, logits, -logits))


def focal_contrastive(
    logits: Float[Array, "B B"],
    *,
    gamma: float = 1.0,
    alpha: float = 0.5,
    normalization: str = "batch",
) -> Float[Array, "B"]:
    """Computes the focal sigmoid loss of each image, float[B].

    The sum runs over the texts (MaMMUT, section 3.2; RO-ViT, arXiv 2305.07011, section 3.3). With p
    the probability that the model gives to the true state of a pair, the pair costs -(1 - p)^gamma
    log p. The cost is multiplied by 2 alpha for a pair that matches and by 2 (1 - alpha) for a pair
    that does not, so that alpha = 0.5 is the unweighted form of the paper. The paper adds
    image-to-text and text-to-image; over a full B x B matrix these are one number, which is counted
    once here.

    `normalization` is the divisor of the sum over all B x B pairs in the mean of the returned
    values: B for "batch", as in the paper, or B * B for "pairs". Divided by B, a batch of 16,384
    starts at about 5,700 at temperature 1, beside a captioning loss of 11. Weights of 1 and 1 then
    make sense only with a negative bias, as in SigLIP.
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
    """Computes the focal loss of each image-text pair, float[Q, R]."""
    logits = jnp.where(matched, logits, -logits)
    log_p = jax.nn.log_sigmoid(logits)
    log_not_p = jax.nn.log_sigmoid(-logits)
    return -jnp.where(matched, 2 * alpha, 2 * (1 - alpha)) * jnp.exp(gamma * log_not_p) * log_p


def _ring_focal(
    image_embed: Float[Array, "B E"],
    text_embed: Float[Array, "B E"],
    log_scale: Float[Array, ""],
    bias: Float[Array, ""],
    *,
    chunk: int,
    gamma: float = 1.0,
    alpha: float = 0.5,
    normalization: str = "batch",
) -> Float[Array, "B"]:
    """Computes the ring form of `focal_contrastive`, float[B]."""
    pair_loss = functools.partial(focal_pairs, gamma=gamma, alpha=alpha)
    losses = ring_pairs(pair_loss, image_embed, text_embed, log_scale, bias, chunk=chunk)
    return losses if normalization == "batch" else losses / len(losses)


@dataclasses.dataclass(frozen=True)
class ContrastiveLoss:
    """A contrastive loss: its forms and its initial scalars.

    Each row of `CONTRASTIVE` is one.

    Attributes:
      matrix: `matrix(logits, **options)` gives the loss of each example, float[B], of the logits
        float[B, B] of every image with every text.
      logit_scale_init: Logit scale at the start of a fresh run.
      logit_bias_init: Logit bias at the start of a fresh run.
      uses_bias: Whether the logit bias is added to the logits.
      ring: `ring(image_embed, text_embed, log_scale, bias, *, chunk, **options)` gives the same
        values without the B x B matrix (`mammut.models.ring_loss`); it takes no `bias` where the
        loss does not use one. For a sum over single pairs it is `functools.partial(ring_pairs,
        pair_loss)`. None: the loss has the matrix form only.
    """

    matrix: Callable[..., Float[Array, "B"]]
    logit_scale_init: float
    logit_bias_init: float
    uses_bias: bool = True
    ring: Callable[..., Float[Array, "B"]] | None = None


# The contrastive losses by name, as `LossConfig.contrastive` takes it. `**options` of both forms
# are `LossConfig.contrastive_options`: a loss without options needs nothing there.
CONTRASTIVE: dict[str, ContrastiveLoss] = {
    "softmax": ContrastiveLoss(
        matrix=softmax_contrastive,
        ring=ring_softmax,
        uses_bias=False,  # a constant cancels in a softmax
        logit_scale_init=1 / 0.07,  # CLIP, section 2.5
        logit_bias_init=0.0,
    ),
    # All but one of B pairs do not match: with SigLIP's start (section 3.2) they cost little.
    "focal": ContrastiveLoss(
        matrix=focal_contrastive,
        ring=_ring_focal,
        logit_scale_init=10.0,
        logit_bias_init=-10.0,
    ),
    "sigmoid": ContrastiveLoss(
        matrix=sigmoid_contrastive,
        ring=functools.partial(ring_pairs, sigmoid_pairs),
        logit_scale_init=10.0,
        logit_bias_init=-10.0,
    ),
}


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
    """Computes the cross-entropy of each label in nats, float[B, L].

    The loss is zero where `loss_mask` is False. The logits exist for `chunk` text positions at a
    time, float32[B, chunk, V], and are computed again in the backward pass: all at once they would
    take 33 MB an example at V = 64,000. `label_smoothing` spreads that share of the target evenly
    over the vocabulary; `z_loss` weighs log(Z)^2, which keeps the logits from drifting. For
    training, `caption_sum` is faster.
    """

    @jax.checkpoint
    def token_losses(xs):
        features, labels = xs
        logits = _vocab_logits(features, vocab_kernel, vocab_bias)
        return _token_losses(logits, _is_label(logits, labels), label_smoothing, z_loss)[0]

    losses = _joined(jax.lax.map(token_losses, _chunks((features, labels), chunk)), labels.shape)
    return jnp.where(loss_mask, losses, 0)


def caption_sum(
    features: Float[Array, "B L D"],
    vocab_kernel: Float[Array, "D V"],
    vocab_bias: Float[Array, "V"] | None,
    labels: Int[Array, "B L"],
    loss_mask: Bool[Array, "B L"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = 16,
) -> Float[Array, ""]:
    """Sums `caption_loss` over a batch, with fewer matrix products.

    Returns a float32 scalar. The options are those of `caption_loss`.

    The gradient of a sum is known up to one factor. So it is computed in the forward pass, chunk by
    chunk, while the logits of the chunk exist: three matrix products in place of four, and the same
    peak of memory. The gradient is summed in float32; its products are in the type of `features`,
    as in any backward pass.

    Every device sums its own rows. Otherwise the kernel of the vocabulary would be gathered, and
    its gradient reduced, once for every chunk.
    """

    def summed(*arrays):
        return _summed(label_smoothing, z_loss, chunk, *arrays)[None]

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

    # `vocab_bias` may be None, which is an empty tree.
    zero_grads = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (vocab_kernel, vocab_bias))
    (total, *grads), features_grad = jax.lax.scan(
        step, (jnp.float32(0), *zero_grads), _chunks((features, labels, loss_mask), chunk)
    )
    # Empty arrays that carry the types for the backward pass.
    like = jax.tree.map(lambda x: jnp.zeros(0, x.dtype), (features, vocab_kernel, vocab_bias))
    return total, ((_joined(features_grad, labels.shape), *grads), like)


def _summed_backward(label_smoothing, z_loss, chunk, saved, factor):
    grads = jax.tree.map(lambda grad, like: (factor * grad).astype(like.dtype), *saved)
    return *grads, None, None  # labels and mask have no gradient


_summed.defvjp(_summed_forward, _summed_backward)


def _vocab_logits(features: Array, vocab_kernel: Array, vocab_bias: Array | None) -> Array:
    logits = jnp.matmul(features, vocab_kernel, preferred_element_type=jnp.float32)
    return logits if vocab_bias is None else logits + vocab_bias


def _is_label(logits: Array, labels: Array) -> Array:
    return jnp.arange(logits.shape[-1]) == labels[..., None]


def _token_losses(
    logits: Array, is_label: Array, label_smoothing: float, z_loss: float
) -> tuple[Array, Array]:
    """Computes token losses float[B, L] from logits float[B, L, V].

    Returns also log(Z), float[B, L, 1].
    """
    log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    # A sum, not a look-up, so that a vocabulary that is split over devices is not moved.
    label_logit = jnp.where(is_label, logits, 0).sum(-1)
    target = (1 - label_smoothing) * label_logit + label_smoothing * logits.mean(-1)
    return log_z[..., 0] - target + z_loss * log_z[..., 0] ** 2, log_z


def _chunks(tree: Any, chunk: int) -> Any:
    """Cuts arrays along the text into chunks.

    [B, L, ...] becomes [chunks, B, at most `chunk`, ...].

    The batch axis is not cut, so that it keeps its sharding.
    """

    def split(x):
        count = math.ceil(x.shape[1] / chunk)
        size = math.ceil(x.shape[1] / count)
        other_axes = ((0, 0),) * (x.ndim - 2)
        x = jnp.pad(x, ((0, 0), (0, count * size - x.shape[1]), *other_axes))
        return jnp.moveaxis(x.reshape(len(x), count, size, *x.shape[2:]), 1, 0)

    return jax.tree.map(split, tree)


def _joined(x: Array, shape: tuple[int, int]) -> Array:
    """Puts together what `_chunks` cut, [B, L, ...]."""
    return jnp.moveaxis(x, 0, 1).reshape(shape[0], -1, *x.shape[3:])[:, : shape[1]]
