"""How a model is computed, which its weights do not depend on: number types, memory, randomness.

`ComputeConfig` stands beside the `ModelConfig`, never inside: the architecture travels with the
weights, the way of computing is chosen by whoever runs them. `AugmentConfig` is what a training run
draws at random inside the model, `Augment` the draw of one step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx, struct

from mammut.core.fields import require_choices, require_positive, require_share

Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full"]

_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Dtypes:
    """Number types of a module: `compute` of its products, `param` of its stored parameters."""

    compute: Any
    param: Any


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How a model is computed; the same weights give the same results up to rounding.

    Example:
      >>> compute = ComputeConfig(dtype="bfloat16", remat="dots")
      >>> model = mammut.MaMMUT(mammut.presets.mammut_b16(), compute=compute, rngs=nnx.Rngs(0))
    """

    # Number type of the products. Statistics of norms, softmax and losses are float32 anyway.
    dtype: Dtype = "float32"
    # Number type of the stored parameters.
    param_dtype: Dtype = "float32"
    # Number type of the text decoder's stored parameters; None: `param_dtype`. bfloat16 is for a
    # frozen decoder: in a trained one it would round small updates away.
    text_param_dtype: Dtype | None = None
    # What the backward pass keeps of a layer: all of it, its matrix products (dots), or its input
    # alone (full); it computes the rest again.
    remat: Remat = "none"
    # Layers unrolled in each turn of the scan over layers; a small model on a CPU wants all.
    unroll: int = 1
    # Training runs the decoder twice, or once with both passes stacked on a new axis (fused), so
    # that weights which are split over devices are gathered once.
    passes: Literal["two_calls", "fused"] = "two_calls"
    # Attention of the image encoder: a fused kernel where one works here (auto), or XLA's.
    image_attention: Literal["auto", "xla"] = "auto"

    def __post_init__(self):
        require_choices(self)
        require_positive(self, "unroll")

    @property
    def dtypes(self) -> Dtypes:
        """Number types of all of a model but its text decoder."""
        return Dtypes(jnp.dtype(self.dtype), jnp.dtype(self.param_dtype))

    @property
    def text_dtypes(self) -> Dtypes:
        """Number types of the text decoder."""
        stored = self.text_param_dtype or self.param_dtype
        return Dtypes(jnp.dtype(self.dtype), jnp.dtype(stored))


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """What training draws at random inside the model; at the defaults, nothing."""

    # Share of an image's patches that is left out at random (FLIP, arXiv 2212.00794).
    patch_drop: float = 0.0
    # A random crop of the position table for each image (RO-ViT, arXiv 2305.07011).
    crop_positions: bool = False
    # Dropout of an image prefix, after its projection (MAGMA, arXiv 2112.05253).
    prefix_dropout: float = 0.0

    def __post_init__(self):
        require_share(self, "patch_drop", "prefix_dropout")


@struct.dataclass
class Augment:
    """The random draws of one training step; without a key, as at inference, nothing is random.

    One `key` gives a stream of its own to each kind of draw, so that turning one on changes no
    other.

    Example:
      >>> augment = Augment(jax.random.key(0), AugmentConfig(patch_drop=0.5))
      >>> tokens = model.image_tokens(image, augment).tokens   # of half of the patches
    """

    key: jax.Array | None = None
    config: AugmentConfig = struct.field(pytree_node=False, default=AugmentConfig())

    def __post_init__(self):
        if self.key is None and self.config != AugmentConfig():
            raise ValueError("Augment.key is None, expected a random key with an AugmentConfig")

    @property
    def patch_drop(self) -> float:
        """Share of an image's patches to leave out."""
        return self.config.patch_drop

    @property
    def crop_positions(self) -> bool:
        """Whether each image gets a random crop of the position table."""
        return self.config.crop_positions

    @property
    def prefix_dropout(self) -> float:
        """Share of an image prefix's numbers to drop."""
        return self.config.prefix_dropout

    def split(self, count: int) -> "Augment":
        """The draws of `count` micro-batches, with keys on a leading axis, for a scan."""
        return self.replace(key=jax.random.split(self.key, count))


def recomputed(function: Callable) -> Callable:
    """Returns the function with a backward pass that keeps its arguments alone.

    For what is cheap to compute and has large intermediates: a norm or an activation costs less
    than writing and reading what its gradient needs, also where the layers around it are not
    recomputed (`ComputeConfig.remat`).
    """
    # XLA may well find it cheaper to keep something: outside of a loop nothing forbids it.
    return jax.checkpoint(function, prevent_cse=False)


def stack(module: nnx.Module, depth: int) -> nnx.Module:
    """Makes `module` a stack of `depth`: every parameter gets a leading `layer` axis.

    To be called before the parameters have numbers (`layers.initialise`).
    """
    for _, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Param):
            one = variable.get_value()
            variable.set_value(jax.ShapeDtypeStruct((depth, *one.shape), one.dtype))
            variable.set_metadata(axes=("layer", *variable.axes))
    return module


def keeping(step: Callable, remat: Remat) -> Callable:
    """Returns the step with a backward pass that keeps what `remat` says."""
    return step if remat == "none" else jax.checkpoint(step, policy=_REMAT_POLICIES[remat])


def scan(step: Callable, x: jax.Array, layers: Any, *, remat: Remat, unroll: int) -> jax.Array:
    """Applies `x = step(x, layer)` for each layer of a stack, as one `jax.lax.scan`.

    `unroll` layers are laid out in each turn of the loop: XLA's CPU code is up to 1.7 times faster
    when all are.
    """
    keep = keeping(step, remat)
    depth = jax.tree.leaves(layers)[0].shape[0]

    def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        return keep(x, layer), None

    return jax.lax.scan(body, x, layers, unroll=min(unroll, depth))[0]
