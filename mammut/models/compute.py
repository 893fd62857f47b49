"""How a model is computed: its number types, what the backward pass keeps, and scans over layers."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
from flax import nnx

Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full"]
# How a run computes and trains a model, which its weights do not depend on: fields of ModelConfig
# and VisionConfig.
RUN_FIELDS = (
    "dtype",
    "param_dtype",
    "remat",
    "unroll",
    "passes",
    "image_attention",
    "prefix_dropout",
)
RUN_VISION_FIELDS = ("cropped_pos_embed", "patch_drop", "low_image_size")
_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Dtypes:
    """Compute and storage types of a module."""

    compute: Any
    param: Any


def recomputed(function: Callable) -> Callable:
    """The same function; its backward pass keeps its arguments alone and computes the rest again.

    For what is cheap to compute and has large intermediates: a norm or an activation costs less
    than writing and reading what its gradient needs, also where the layers around it are not
    recomputed (`ModelConfig.remat`).
    """
    # XLA may well find it cheaper to keep something: outside of a loop nothing forbids it.
    return jax.checkpoint(function, prevent_cse=False)


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` modules as one, every parameter with a leading `layer` axis."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make_all(rngs):
        return make(rngs)

    layers = make_all(rngs)
    for _, variable in nnx.iter_graph(layers):
        if isinstance(variable, nnx.Param):
            variable.set_metadata(axes=("layer", *variable.axes))
    return layers


def keeping(step: Callable, remat: Remat) -> Callable:
    """The same step; its backward pass keeps what `remat` says."""
    return step if remat == "none" else jax.checkpoint(step, policy=_REMAT_POLICIES[remat])


def scan(step: Callable, x: jax.Array, layers: Any, *, remat: Remat, unroll: int) -> jax.Array:
    """`x = step(x, layer)` for each layer of a stack, as one `jax.lax.scan`.

    `remat` is what the backward pass keeps of a layer: "none" recomputes nothing, "dots" recomputes
    all but the matrix products, "full" everything from the layer's input. `unroll` layers are laid
    out in each turn of the loop: XLA's CPU code is up to 1.7 times faster when all are.
    """
    step = keeping(step, remat)
    depth = jax.tree.leaves(layers)[0].shape[0]
    return jax.lax.scan(
        lambda x, layer: (step(x, layer), None), x, layers, unroll=min(unroll, depth)
    )[0]
