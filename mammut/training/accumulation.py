"""Micro-batches: parts of a batch that a step takes in turn.

A task sums over micro-batches the losses of single examples, and divides by a count of the whole
batch, so that the gradient is the gradient of the whole batch at once (`mammut.training.tasks`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mammut.core import sharding
from mammut.core.params import Params
from mammut.core.typing import Batch
from mammut.models.compute import Augment


def micro_batches(batch: Batch, augment: Augment, accumulation: int) -> tuple[Batch, Augment]:
    """Splits a batch into micro-batches along a new leading axis.

    Each has random draws of its own.
    """
    micros = {name: split_rows(x, accumulation) for name, x in batch.items()}
    return micros, augment.split(accumulation)


def split_rows(x: jax.Array, accumulation: int) -> jax.Array:
    """Splits [B, ...] into [accumulation, B / accumulation, ...].

    Row i goes to micro-batch i % accumulation: every device gives rows to each, so nothing moves.
    """
    return x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1)


def joined_rows(x: jax.Array) -> jax.Array:
    """Joins the micro-batches of `split_rows` in order.

    [accumulation, b, E] becomes [B, E].
    """
    return sharding.constrain(x.swapaxes(0, 1).reshape(-1, x.shape[-1]), "batch", None)


def pinned(micro: Batch) -> Batch:
    """Splits the rows of a micro-batch over the devices.

    They are split as the rows of a batch are.
    """
    return {
        name: sharding.constrain(x, "batch", *(None,) * (x.ndim - 1)) for name, x in micro.items()
    }


def summed_gradients(
    loss: Callable[[Params, Batch, Augment], jax.Array],
    params: Params,
    batch: Batch,
    augment: Augment,
    accumulation: int,
) -> tuple[jax.Array, Params]:
    """Sums `loss(params, micro_batch, augment)` over the micro-batches.

    Returns the sum and its gradient.
    """

    def add(sums, xs):
        micro, augment = xs

        def micro_loss(params):
            return loss(params, pinned(micro), augment)

        return jax.tree.map(jnp.add, sums, jax.value_and_grad(micro_loss)(params)), None

    zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    sums, _ = jax.lax.scan(add, zeros, micro_batches(batch, augment, accumulation))
    return sums
