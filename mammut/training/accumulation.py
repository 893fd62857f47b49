"""Gradients of a whole batch in micro-batches: the same as of the batch at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mammut.core import sharding
from mammut.core.params import Params
from mammut.models.compute import Augment
from mammut.models.mammut import Batch, MaMMUT, Metrics
from mammut.training.tasks import ImageTextTask, TextTask


def accumulated_gradients(
    task: ImageTextTask,
    merge: Callable[[Params], MaMMUT],
    params: Params,
    batch: Batch,
    augment: Augment,
    accumulation: int,
) -> tuple[Params, Metrics]:
    """Gradients of both losses over the whole batch, in micro-batches: exact, every negative included.

    The contrastive loss depends on the parameters only through the embeddings and the logit scale.
    So: embed all micro-batches without gradients; take the loss, and its gradient in every
    embedding, once; then run each micro-batch again, and pull its share of that gradient back
    together with its captioning loss (GradCache, arXiv 2101.06983).
    """

    micros, keys = _micro_batches(batch, augment, accumulation)
    embeds = jax.lax.map(
        lambda xs: task.embed(merge(params), _pinned(xs[0]), xs[1]), (micros, keys)
    )
    # In the order of the batch again: its rows never leave their devices.
    flat = [
        sharding.constrain(x.swapaxes(0, 1).reshape(-1, x.shape[-1]), "batch", None) for x in embeds
    ]

    def contrastive_loss(params, image_embed, text_embed):
        return task.contrastive(merge(params), image_embed, text_embed)

    contrastive, (grads, *embed_grads) = jax.value_and_grad(contrastive_loss, argnums=(0, 1, 2))(
        params, *flat
    )
    embed_grads = [_split(g, accumulation) for g in embed_grads]
    num_tokens = task.caption_tokens(merge(params), batch)
    weight = task.config.contrastive_weight
    grads = jax.tree.map(lambda g: weight * g, grads)

    def step(carry, xs):
        grads, caption = carry
        micro, key, embed_grads = xs
        image_grad, text_grad = (sharding.constrain(grad, "batch", None) for grad in embed_grads)

        def surrogate(params):
            (image_embed, text_embed), caption_sum = task.embed_and_caption(
                merge(params), _pinned(micro), key
            )
            pulled = (image_embed * image_grad).sum() + (text_embed * text_grad).sum()
            caption = caption_sum / num_tokens
            return weight * pulled + task.config.caption_weight * caption, caption

        micro_grads, micro_caption = jax.grad(surrogate, has_aux=True)(params)
        return (jax.tree.map(jnp.add, grads, micro_grads), caption + micro_caption), None

    (grads, caption), _ = jax.lax.scan(step, (grads, jnp.float32(0)), (micros, keys, embed_grads))
    return grads, task.total(contrastive, caption)[1]


def accumulated_text_gradients(
    task: TextTask,
    merge: Callable[[Params], MaMMUT],
    params: Params,
    batch: Batch,
    augment: Augment,
    accumulation: int,
) -> tuple[Params, Metrics]:
    """Gradients of a loss over single examples, in micro-batches: those of the mean over all target tokens."""
    num_tokens = task.target_tokens(merge(params), batch)

    def step(carry, xs):
        micro, key = xs
        loss = lambda params: task.loss_sum(merge(params), _pinned(micro), key) / num_tokens  # noqa: E731
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(loss)(params)), None

    start = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    (loss, grads), _ = jax.lax.scan(step, start, _micro_batches(batch, augment, accumulation))
    return grads, {"loss": loss, "loss_caption": loss}


def _micro_batches(batch: Batch, augment: Augment, accumulation: int) -> tuple[Batch, Augment]:
    """The batch with a leading axis of micro-batches, and a key for each."""
    return {name: _split(x, accumulation) for name, x in batch.items()}, augment.split(accumulation)


def _split(x: jax.Array, accumulation: int) -> jax.Array:
    """[B, ...] -> [accumulation, B / accumulation, ...]; every device gives rows to each, so nothing moves."""
    return x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1)


def _pinned(micro: Batch) -> Batch:
    return {
        name: sharding.constrain(x, "batch", *(None,) * (x.ndim - 1)) for name, x in micro.items()
    }
