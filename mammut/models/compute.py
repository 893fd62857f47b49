"""How a model is computed, beside its weights: number types, memory, randomness.

`ComputeConfig` stands beside the `ModelConfig`, never inside it: the architecture travels with the
weights, and the user chooses how to compute them. `AugmentConfig` sets what a training run
draws at random inside the model, `Augment` holds the draws of one step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx, struct

from mammut.core.fields import (
    require,
    require_choices,
    require_fraction,
    require_positive,
    require_types,
)

Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full"]

_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Dtypes:
    """Number types of a module.

    `compute` is the type of its products, `param` the type of its stored parameters.
    """

    compute: Any
    param: Any


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How a model is computed, which changes its results by rounding alone.

    Example:
      >>> compute = ComputeConfig(dtype="bfloat16", remat="dots")
      >>> model = mammut.MaMMUT(mammut.presets.mammut_b16(), compute=compute, rngs=nnx.Rngs(0))
    """

    # Number type of the products. Statistics of norms, softmax and losses are float32 anyway.
    dtype: Dtype = "float32"
    # Number type of the stored parameters.
    param_dtype: Dtype = "float32"
    # Number type of the text decoder's stored parameters; None: `param_dtype`. bfloat16 is for a
    # frozen decoder: a trained one would lose small updates to rounding.
    text_param_dtype: Dtype | None = None
    # Numbers of a layer that the forward pass keeps for the backward pass: all (none), the matrix
    # products (dots), or the input alone (full). The backward pass computes the rest again.
    remat: Remat = "none"
    # Number of layers unrolled in each turn of the scan over layers. A small model on a CPU runs
    # fastest with all of them.
    unroll: int = 1
    # Runs of the decoder in a training step: one for each pass (two_calls), or one with both passes
    # stacked on a new axis (fused), so that weights that are split over devices are gathered once.
    passes: Literal["two_calls", "fused"] = "two_calls"
    # Kernel of the image encoder's attention: a fused one where it works here (auto), or XLA's.
    image_attention: Literal["auto", "xla"] = "auto"

    def __post_init__(self):
        require_types(self)
        require_choices(self)
        require_positive(self, "unroll")

    @property
    def dtypes(self) -> Dtypes:
        """Number types of all of a model except its text decoder."""
        return Dtypes(jnp.dtype(self.dtype), jnp.dtype(self.param_dtype))

    @property
    def text_dtypes(self) -> Dtypes:
        """Number types of the text decoder."""
        stored = self.param_dtype if self.text_param_dtype is None else self.text_param_dtype
        return Dtypes(jnp.dtype(self.dtype), jnp.dtype(stored))


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Rates of the random draws inside the model in training.

    By default nothing is random.

    Example:
      >>> augment = AugmentConfig(patch_drop=0.5, crop_positions=True)
      >>> config = dataclasses.replace(config, augment=augment)  # of a `TrainConfig`
    """

    # Share of an image's patches that are left out (FLIP, arXiv 2212.00794).
    patch_drop: float = 0.0
    # Whether each image gets a random crop of the position table (RO-ViT, arXiv 2305.07011).
    crop_positions: bool = False
    # Share of an image prefix's numbers that are set to zero, behind its projection (MAGMA, arXiv
    # 2112.05253).
    prefix_dropout: float = 0.0

    def __post_init__(self):
        require_types(self)
        require_fraction(self, "patch_drop", "prefix_dropout")


def require_computable(
    config: Any, compute: ComputeConfig, augment: AugmentConfig = AugmentConfig()
) -> None:
    """Checks that a model can be computed and trained as configured.

    Args:
      config: its `ModelConfig`.
      compute: the way of computing.
      augment: the random draws of training.

    Raises:
      ValueError: the configs do not fit together.
    """
    text = config.text
    same_passes = text.pooling not in ("none", "class") and text.text_only_depth == 0
    require(
        compute.passes != "fused" or same_passes,
        "ComputeConfig.passes is 'fused', which needs two passes over the same tokens and layers: "
        f"not DecoderConfig.pooling {text.pooling!r} with text_only_depth {text.text_only_depth}",
    )
    require(
        compute.passes != "fused" or not text.has_prefix,
        "ComputeConfig.passes is 'fused', which has no place for a prefix",
    )
    for name in ("patch_drop", "crop_positions"):
        value = getattr(augment, name)
        require(
            hasattr(config.vision, "patch_size") or not value,
            f"AugmentConfig.{name} is {value}, which a ResNet has no patches for",
        )
    require(
        config.vision.video is None or not augment.crop_positions,
        "AugmentConfig.crop_positions is True, which VisionConfig.video has no place for: cropped "
        "positions are those of images",
    )
    require(
        text.has_prefix or not augment.prefix_dropout,
        f"AugmentConfig.prefix_dropout is {augment.prefix_dropout}, which needs an image prefix: "
        "DecoderConfig.cross_attn_every 0",
    )


@struct.dataclass
class Augment:
    """The random draws of one training step; `Augment()` draws nothing.

    Each kind of draw has a stream of its own, folded from the one `key`: turning one on changes no
    other.

    Raises:
      ValueError: there is no key, but `config` has something to draw.

    Example:
      >>> augment = Augment(jax.random.key(0), AugmentConfig(patch_drop=0.5))
      >>> tokens = model.image_tokens(image, augment).tokens  # of half of the patches
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
        """Share of an image prefix's numbers to set to zero."""
        return self.config.prefix_dropout

    def split(self, count: int) -> "Augment":
        """Splits the draws for `count` micro-batches.

        The keys have a leading axis for a scan.
        """
        if self.key is None:
            return self
        return self.replace(key=jax.random.split(self.key, count))


def recomputed(function: Callable) -> Callable:
    """Wraps a function so that its backward pass computes it again.

    Nothing is kept for the gradient but the arguments.

    This is for functions that are cheap but have large intermediate results, such as norms and
    activations: to compute them again takes less time than to write and read what the gradient
    needs, even where the layers around them are kept (`ComputeConfig.remat`).
    """
    # `prevent_cse` would forbid XLA to keep a result where keeping it is cheaper. Here XLA may.
    return jax.checkpoint(function, prevent_cse=False)


def stack(module: nnx.Module, depth: int) -> nnx.Module:
    """Makes `module` a stack of `depth` layers.

    Every parameter gets a leading `layer` axis.

    The parameters must not have numbers yet (`layers.initialise`).
    """
    for _, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Param):
            one = variable.get_value()
            variable.set_value(jax.ShapeDtypeStruct((depth, *one.shape), one.dtype))
            variable.set_metadata(axes=("layer", *variable.axes))
    return module


def with_remat(step: Callable, remat: Remat) -> Callable:
    """Wraps a step so that its backward pass recomputes values.

    `remat` says which values are kept.
    """
    if remat == "none":
        return step
    return jax.checkpoint(step, policy=_REMAT_POLICIES[remat])


def scan(step: Callable, x: jax.Array, layers: Any, *, remat: Remat, unroll: int) -> jax.Array:
    """Applies `x = step(x, layer)` for each layer of a stack.

    The layers run in one `jax.lax.scan`.

    Each turn of the loop runs `unroll` layers: on CPUs a loop of one turn, with all layers in it,
    is up to 1.7 times faster.
    """
    step = with_remat(step, remat)
    depth = jax.tree.leaves(layers)[0].shape[0]

    def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        return step(x, layer), None

    return jax.lax.scan(body, x, layers, unroll=min(unroll, depth))[0]
