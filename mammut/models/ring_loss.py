"""Contrastive losses in tiles, without the B x B matrix.

The values are the same as in `mammut.models.losses`.

Every device keeps its images. Blocks of texts go round the devices, each with the sums over its
columns, until they are back where they started. Of the B x B scores a device holds one tile of at
most `chunk` x `chunk`; the backward pass computes the tiles again. On one device there is one
block, cut into tiles. So the memory does not grow with the square of the global batch. The idea
comes from Inf-CL (arXiv 2410.17243) and from SigLIP's chunks (arXiv 2303.15343, section 3.3).

A score is an entry of `losses.contrastive_logits`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Float

from mammut.core.sharding import RULES
from mammut.core.typing import Array

# Nested dicts and tuples of arrays; the first axis is the batch, or the rows or columns of a tile.
Tree = Any


def ring_softmax(
    image_embed: Float[Array, "B E"],
    text_embed: Float[Array, "B E"],
    log_scale: Float[Array, ""],
    *,
    chunk: int,
) -> Float[Array, "B"]:
    """Computes the ring form of `losses.softmax_contrastive`.

    Returns the loss of each pair, float32[B].

    Raises:
      ValueError: the pairs do not divide over the devices of mesh.data x mesh.fsdp.
    """
    image, text = _scaled(image_embed, text_embed, log_scale)
    image_to_text, text_to_image, matched = _log_sums(chunk, image, text)
    return (image_to_text + text_to_image) / 2 - matched


def ring_pairs(
    pair_loss: Callable[[jax.Array, jax.Array], jax.Array],
    image_embed: Float[Array, "B E"],
    text_embed: Float[Array, "B E"],
    log_scale: Float[Array, ""],
    bias: Float[Array, ""] | float = 0.0,
    *,
    chunk: int,
) -> Float[Array, "B"]:
    """Computes the ring form of a loss over single pairs.

    Returns the loss of each image over the texts, float32[B].

    `pair_loss(scores, matched)` gives the loss of each pair, float[Q, R], as `losses.sigmoid_pairs`
    and `losses.focal_pairs` do; `matched` is bool[Q, R].

    Raises:
      ValueError: the pairs do not divide over the devices of mesh.data x mesh.fsdp.
    """
    image, text = _scaled(image_embed, text_embed, log_scale)
    return _pair_sums(pair_loss, chunk, image, text, jnp.full(len(image), bias, jnp.float32))


def _scaled(image_embed: Array, text_embed: Array, log_scale: Array) -> tuple[jax.Array, jax.Array]:
    image = jnp.exp(log_scale) * jnp.asarray(image_embed, jnp.float32)
    return image, jnp.asarray(text_embed, jnp.float32)


# --- Softmax: the log of the sum of exp(score) by row and by column, and the scores that match.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_sums(
    chunk: int, image: jax.Array, text: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return _log_sums_forward(chunk, image, text)[0]


def _log_sums_forward(chunk, image, text):
    # The largest score and the sum of exp(score - largest) are kept apart. The log of both in one
    # number near 100 would be rounded so that the probabilities of the backward pass would miss a
    # sum of 1 by 1e-5.
    def added(sums, scores, axis):
        top, total = sums
        new_top = jnp.maximum(top, scores.max(axis))
        new_terms = jnp.exp(scores - jnp.expand_dims(new_top, axis)).sum(axis)
        return new_top, total * jnp.exp(top - new_top) + new_terms

    def add(row, row_sums, column, column_sums):
        scores, matched, real = _scores(row, column)
        by_row, diagonal = row_sums
        diagonal += jnp.where(matched & real, scores, 0).sum(1)
        scores = jnp.where(real, scores, -jnp.inf)
        return (added(by_row, scores, 1), diagonal), added(column_sums, scores, 0)

    zero = jnp.zeros(len(image))
    nothing = jnp.full(len(image), jnp.finfo(jnp.float32).min), zero
    (by_row, diagonal), by_column = _every_pair(
        add, {"embed": image}, (nothing, zero), {"embed": text}, nothing, chunk
    )

    log_sums = [top + jnp.log(total) for top, total in (by_row, by_column)]
    return (*log_sums, diagonal), (image, text, by_row, by_column)


def _log_sums_backward(chunk, saved, grads):
    image, text, by_row, by_column = saved
    by_row_grad, by_column_grad, diagonal_grad = grads

    def slope(scores, matched, row, column):
        slopes = row["grad"][:, None] * jnp.exp(scores - row["top"][:, None])
        slopes += column["grad"] * jnp.exp(scores - column["top"])
        return slopes + jnp.where(matched, row["diagonal_grad"][:, None], 0)

    rows = {
        "embed": image,
        "top": by_row[0],
        "grad": by_row_grad / by_row[1],
        "diagonal_grad": diagonal_grad,
    }
    columns = {"embed": text, "top": by_column[0], "grad": by_column_grad / by_column[1]}
    return _gradients(slope, rows, columns, chunk)[:2]


_log_sums.defvjp(_log_sums_forward, _log_sums_backward)


# --- Sigmoid and focal: a sum over single pairs.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _pair_sums(
    pair_loss: Callable, chunk: int, image: jax.Array, text: jax.Array, bias: jax.Array
) -> jax.Array:
    def add(row, total, column, nothing):
        scores, matched, real = _scores(row, column)
        return total + jnp.where(real, pair_loss(scores, matched), 0).sum(1), nothing

    return _every_pair(
        add, {"embed": image, "bias": bias}, jnp.zeros(len(image)), {"embed": text}, (), chunk
    )[0]


def _pair_sums_forward(pair_loss, chunk, image, text, bias):
    return _pair_sums(pair_loss, chunk, image, text, bias), (image, text, bias)


def _pair_sums_backward(pair_loss, chunk, saved, grad):
    image, text, bias = saved

    def slope(scores, matched, row, column):
        slopes = jax.vjp(lambda x: pair_loss(x, matched), scores)[1](jnp.ones_like(scores))[0]
        return row["grad"][:, None] * slopes

    return _gradients(slope, {"embed": image, "bias": bias, "grad": grad}, {"embed": text}, chunk)


_pair_sums.defvjp(_pair_sums_forward, _pair_sums_backward)


# --- All losses: the pass over every tile.


# Products in full float32, as in `losses.contrastive_logits`.
_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _scores(row: Tree, column: Tree) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the scores of a tile.

    Returns also which pairs match, and which are real (neither side is padding).
    """
    scores = _product(row["embed"], column["embed"].T)
    if "bias" in row:
        scores += row["bias"][:, None]
    row_number = row["number"][:, None]
    column_number = column["number"]
    real = (row_number > 0) & (column_number > 0)
    return scores, row_number == column_number, real


def _gradients(
    slope: Callable, rows: Tree, columns: Tree, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of the rows, the columns and the biases.

    `slope(scores, matched, row, column)` gives the derivative of the loss in each score.
    """

    def add(row, row_sums, column, column_grad):
        scores, matched, real = _scores(row, column)
        slopes = jnp.where(real, slope(scores, matched, row, column), 0)
        row_grad, bias_grad = row_sums
        row_grad += _product(slopes, column["embed"])
        return (row_grad, bias_grad + slopes.sum(1)), column_grad + _product(slopes.T, row["embed"])

    row_sums = jnp.zeros_like(rows["embed"]), jnp.zeros(len(rows["embed"]))
    (row_grad, bias_grad), column_grad = _every_pair(
        add, rows, row_sums, columns, jnp.zeros_like(columns["embed"]), chunk
    )
    return row_grad, column_grad, bias_grad


def _every_pair(
    add: Callable, rows: Tree, row_sums: Tree, columns: Tree, column_sums: Tree, chunk: int
) -> tuple[Tree, Tree]:
    """Sums over all pairs, by row and by column.

    `add(row, row_sums, column, column_sums)` adds the sums of one tile and returns the result. It
    finds in `row` and `column` the `number` of each example too, from 1; a row or column that only
    pads a tile has number 0.
    """
    batch = len(rows["embed"])
    number = jnp.arange(1, batch + 1)
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in RULES["batch"] if mesh.shape.get(axis, 1) > 1)
    ways = math.prod(mesh.shape[axis] for axis in axes)
    if batch % ways:
        raise ValueError(
            f"loss.contrastive_form 'ring' has {batch} pairs, which do not divide over the {ways} "
            "devices of mesh.data x mesh.fsdp"
        )
    size = batch // ways
    tiles = math.ceil(size / chunk)
    tile = math.ceil(size / tiles)

    def split(x):
        padding = ((0, tiles * tile - size),) + ((0, 0),) * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(tiles, tile, *x.shape[1:])

    def joined(x):
        return x.reshape(tiles * tile, *x.shape[2:])[:size]

    def next_device(x):
        return jax.lax.ppermute(x, axes, [(i, (i + 1) % ways) for i in range(ways)])

    def local(rows, row_sums, columns, column_sums):
        rows, *carry = jax.tree.map(split, (rows, row_sums, columns, column_sums))

        def hop(_, carry):
            row_sums, columns, column_sums = carry

            def add_column(row_sums, xs):
                column, column_sums = xs

                def add_row(column_sums, xs):
                    row, row_sums = xs
                    return add(row, row_sums, column, column_sums)[::-1]

                return jax.lax.scan(add_row, column_sums, (rows, row_sums))[::-1]

            row_sums, column_sums = jax.lax.scan(add_column, row_sums, (columns, column_sums))
            if axes:
                # Arrays that do not depend on the sums can travel while the sums are computed.
                columns, column_sums = jax.tree.map(next_device, (columns, column_sums))
            return row_sums, columns, column_sums

        row_sums, _, column_sums = jax.lax.fori_loop(0, ways, hop, tuple(carry))
        return jax.tree.map(joined, (row_sums, column_sums))

    args = (rows | {"number": number}, row_sums, columns | {"number": number}, column_sums)
    if not axes:
        return local(*args)
    spec = PartitionSpec(axes)
    # Without `check_vma`: it would need a declaration that the sums are the same along `model`.
    return jax.shard_map(local, in_specs=spec, out_specs=spec, check_vma=False)(*args)
