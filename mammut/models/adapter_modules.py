"""Adapters: small modules on the maps, attentions and MLPs of a model that is otherwise left as it is.

    sequential         f(x) + A(f(x))    A: down, ReLU, up, with biases; f an attention or an MLP, before it joins the
    parallel           f(x) + A(x)       residual stream (Houlsby et al., arXiv 1902.00751; MAGMA, arXiv 2112.05253)
    scaled_parallel    f(x) + s A(x)     s one learned number, 1 at first (He et al., arXiv 2110.04366)
    lora               f(x) + a/r B(A(x))     A, B linear maps to and from r numbers (Hu et al., arXiv 2106.09685)
    ia3                s * f(x), of an MLP's second map f(s * x)     s a learned vector (Liu et al., arXiv 2205.05638)

A site is the path of a module inside a stack of layers, such as text.layers.mlp or
vision.layers.attn.query. Adapters are a tree of their own, `Adapters`, so that the base keeps its
paths; `Adapters.attached` puts them into a copy of a tower for the time of a call. What is done
with the adapters of a whole model is in `mammut.models.adapters`.
"""

import dataclasses
import difflib
import fnmatch
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from mammut.core.fields import require, require_choices, require_positive
from mammut.core.sharding import constrain
from mammut.models.compute import Dtypes, stack
from mammut.models.layers import LayerNorm, Linear, param
from mammut.models.transformer import MLP, Attention, Layer

Tower = TypeVar("Tower", bound=nnx.Module)
Function = Callable[[jax.Array], jax.Array]

# of the weights and biases that MAGMA's bottlenecks start from; cut at twice that
_MAGMA_STDDEV = 1e-3
_NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Small modules on the maps, attentions and MLPs of a model that is otherwise left as it is (`mammut.models.adapter_modules`).

    Several with one `name` make up one adapter, which is saved, loaded and switched on as a whole.
    """

    name: str = "default"
    # Bottlenecks (down, ReLU, up) on the output of an attention or MLP: of its output (sequential),
    # or of its input (parallel), times a learned number (scaled_parallel). lora: a product of two
    # thin matrices beside a linear map. ia3: a learned factor for each output of a map, or input of
    # an MLP's second.
    kind: Literal["sequential", "parallel", "scaled_parallel", "lora", "ia3"] = "sequential"
    # Patterns of paths (fnmatch), such as text.layers.mlp, text.layers.attn.query,
    # vision.layers.*.value
    sites: tuple[str, ...] = ("text.layers.mlp",)
    reduction: int = 4  # of a bottleneck: the width over its hidden size
    rank: int = 8  # of lora
    alpha: float = 8.0  # of lora: the product is multiplied by alpha / rank
    norm: bool = False  # of a bottleneck: a layer norm in front
    # magma: N(0, 1e-3) cut at 2e-3, biases too (MAGMA); zero: the second map is zero, the adapter
    # changes nothing yet. lora and ia3 always change nothing at first.
    init: Literal["magma", "zero"] = "magma"

    def __post_init__(self):
        require_choices(self)
        require_positive(self, "reduction", "rank", "alpha")
        require(
            self.name.isidentifier(),
            f"AdapterConfig.name is {self.name!r}, expected letters, digits and underscores",
        )
        require(
            len(self.sites) > 0,
            "AdapterConfig.sites is empty, expected patterns such as text.layers.mlp",
        )
        bottleneck, lora = ("reduction", "norm", "init"), ("rank", "alpha")
        unread = {"lora": bottleneck, "ia3": bottleneck + lora}.get(self.kind, lora)
        for field in dataclasses.fields(self):
            # A setting that would do nothing is a misunderstanding; "zero" is what lora and ia3
            # always start from.
            value = getattr(self, field.name)
            require(
                field.name not in unread or value == field.default or value == "zero",
                f"AdapterConfig.{field.name} is {value!r}, which {self.kind!r} does not have",
            )


class Bottleneck(nnx.Module):
    """`width` numbers through `width // reduction`: down, ReLU, up; added to the output of an attention or MLP."""

    def __init__(self, config: AdapterConfig, width: int, *, rngs: nnx.Rngs, dtypes: Dtypes):
        self.kind = config.kind
        inside, outside = {"mlp": width // config.reduction}, {"embed": width}
        self.norm = LayerNorm(width, _NORM_EPS, dtypes=dtypes) if config.norm else None
        self.down = Linear(outside, inside, rngs=rngs, dtypes=dtypes)
        self.up = Linear(inside, outside, rngs=rngs, dtypes=dtypes)
        self.scale = param(jnp.ones((), dtypes.param)) if self.kind == "scaled_parallel" else None
        if config.init == "zero":
            self.up.kernel.set_value(jnp.zeros_like(self.up.kernel[...]))
            return
        for value in (self.down.kernel, self.down.bias, self.up.kernel, self.up.bias):
            drawn = jnp.clip(jax.random.normal(rngs.params(), value.shape), -2, 2)
            value.set_value((_MAGMA_STDDEV * drawn).astype(dtypes.param))

    def __call__(self, function: Function, x: jax.Array) -> jax.Array:
        y = function(x)
        z = y if self.kind == "sequential" else x
        z = z if self.norm is None else self.norm(z)
        z = self.up(jax.nn.relu(constrain(self.down(z), "batch", None, "mlp")))
        return y + (z if self.scale is None else self.scale[...].astype(z.dtype) * z)


class LoRA(nnx.Module):
    """A product of two thin maps beside a linear map: the first starts as peft's does, the second as zero."""

    def __init__(
        self,
        config: AdapterConfig,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        rngs: nnx.Rngs,
        dtypes: Dtypes,
    ):
        self.scale = config.alpha / config.rank
        self.down = Linear(inputs, {"rank": config.rank}, rngs=rngs, dtypes=dtypes, use_bias=False)
        self.up = Linear({"rank": config.rank}, outputs, rngs=rngs, dtypes=dtypes, use_bias=False)
        bound = 1 / math.sqrt(math.prod(inputs.values()))
        drawn = jax.random.uniform(
            rngs.params(), self.down.kernel.shape, minval=-bound, maxval=bound
        )
        self.down.kernel.set_value(drawn.astype(dtypes.param))
        self.up.kernel.set_value(jnp.zeros_like(self.up.kernel[...]))

    def __call__(self, function: Function, x: jax.Array) -> jax.Array:
        return function(x) + self.scale * self.up(constrain(self.down(x), "batch", None, "rank"))

    def merged(
        self, kernel: jax.Array, bias: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Float32 kernel and bias of the plain map that does the same as one with `kernel` and `bias` and this."""
        down, up = (linear.kernel[...].astype(jnp.float32) for linear in (self.down, self.up))
        return kernel + self.scale * jnp.tensordot(down, up, 1, precision="highest"), bias


class IA3(nnx.Module):
    """A factor for each output of a linear map, its bias included; of an MLP's second map, for each input. 1 at first.

    Hidden activations of an MLP are thus scaled after the activation function, as in peft's
    `feedforward_modules`.
    """

    def __init__(self, sizes: dict[str, int], of_input: bool, *, dtypes: Dtypes):
        self.of_input = of_input
        self.scale = param(jnp.ones(tuple(sizes.values()), dtypes.param), *sizes)

    def __call__(self, function: Function, x: jax.Array) -> jax.Array:
        scale = self.scale[...]
        if self.of_input:
            return function(x * scale.astype(x.dtype))
        y = function(x)
        return y * scale.astype(y.dtype)

    def merged(
        self, kernel: jax.Array, bias: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Float32 kernel and bias of the plain map that does the same as one with `kernel` and `bias` and this."""
        scale = self.scale[...].astype(jnp.float32)
        if self.of_input:
            return kernel * scale[:, None], bias
        return kernel * scale, None if bias is None else bias * scale


class _Both(nnx.Module):
    """Two adapters on one site: the second adapts what the first makes of it."""

    def __init__(self, first: nnx.Module, second: nnx.Module):
        self.first, self.second = first, second

    def __call__(self, function: Function, x: jax.Array) -> jax.Array:
        return self.second(functools.partial(self.first, function), x)


def sites(towers: Mapping[str, nnx.Module]) -> dict[str, nnx.Module]:
    """Every place for an adapter in the stacks of layers of `towers` ("text", "vision"): its module, by path."""
    return {
        ".".join((prefix, name, *map(str, path))): module
        for prefix, tower in towers.items()
        for name, layers in vars(tower).items()
        if isinstance(layers, Layer)
        for path, module in nnx.iter_modules(layers)
        if isinstance(module, Attention | MLP | Linear)
    }


def chosen(config: AdapterConfig, places: Mapping[str, nnx.Module]) -> list[str]:
    """Those of `places`, from `sites`, that an adapter is on: of the right kind, fitting one of its patterns.

    Raises:
      ValueError: a pattern fits none of the right kind.
    """
    wanted, what = {
        "lora": (Linear, "a linear map"),
        "ia3": (Linear, "a linear map"),
    }.get(config.kind, (Attention | MLP, "an attention or MLP"))
    right = [place for place, module in places.items() if isinstance(module, wanted)]
    for pattern in config.sites:
        if not fnmatch.filter(right, pattern):
            other = fnmatch.filter(places, pattern)
            near = (
                ", ".join(difflib.get_close_matches(pattern, right, 4, cutoff=0))
                or "this model has none of"
            )
            raise ValueError(
                f"AdapterConfig.sites has {pattern!r}, which is {'no site' if not other else f'not {what}'} of this "
                f"model: {config.kind!r} goes on {what}, such as {near}"
            )
    return [
        place
        for place in right
        if any(fnmatch.fnmatchcase(place, pattern) for pattern in config.sites)
    ]


class Adapters(nnx.Dict):
    """The adapters of a model: for each name the modules by site, with / for the dots of its path.

    A module has a leading `layer` axis, as the stack that it goes with: the parameter
    adapters.default.text/layers/mlp.down.kernel is float[layer, D, D / reduction].

    Args:
      configs: what there is, `ModelConfig.adapters`.
      towers: the towers by name, "text" and "vision".

    Raises:
      ValueError: a pattern of sites fits none of the right kind, two adapters of one name are on
        one site, or a bottleneck or rank does not fit the site; in one sentence.
    """

    def __init__(
        self,
        configs: Sequence[AdapterConfig],
        towers: Mapping[str, nnx.Module],
        *,
        rngs: nnx.Rngs,
        dtypes: Dtypes,
    ):
        super().__init__()
        places = sites(towers)
        for config in configs:
            if hasattr(Adapters, config.name):
                raise ValueError(
                    f"AdapterConfig.name is {config.name!r}, which has another meaning: choose another"
                )
            modules = self.setdefault(config.name, nnx.Dict())
            for place in chosen(config, places):
                key = place.replace(".", "/")
                if key in modules:
                    raise ValueError(
                        f"two adapters of AdapterConfig.name {config.name!r} are on the site {place}"
                    )
                modules[key] = _make(config, place, places[place], rngs, dtypes)

    def attached(self, tower: Tower, prefix: str, active: Sequence[str]) -> Tower:
        """A copy of `tower`, whose sites begin with `prefix`, in which the adapters `active` work, in their order.

        The parameters are not copied. For the time of a call: the copy is no model to be kept.
        """
        if not active:
            return tower
        tower = jax.tree.map(lambda leaf: leaf, tower)
        for name in active:
            for key, adapter in self[name].items():
                top, *path = key.split("/")
                if top == prefix:
                    module = functools.reduce(getattr, path, tower)
                    module.adapter = (
                        adapter if module.adapter is None else _Both(module.adapter, adapter)
                    )
        return tower


def _make(
    config: AdapterConfig, place: str, module: nnx.Module, rngs: nnx.Rngs, dtypes: Dtypes
) -> nnx.Module:
    """One stack of adapters for the stack of modules at `place`."""
    if not isinstance(module, Linear):
        last = module.out if isinstance(module, Attention) else module.down
        depth, width = last.kernel.shape[0], last.kernel.shape[-1]
        if config.reduction > width:
            raise ValueError(
                f"AdapterConfig.reduction is {config.reduction}, expected at most the width {width}"
            )
        return stack(lambda r: Bottleneck(config, width, rngs=r, dtypes=dtypes), depth, rngs=rngs)
    depth, *shape = module.kernel.shape
    axes = list(zip(module.kernel.axes[1:], shape, strict=True))
    inputs, outputs = dict(axes[: module.num_inputs]), dict(axes[module.num_inputs :])
    if config.kind == "ia3":
        of_input = place.endswith(".mlp.down")
        return stack(
            lambda r: IA3(inputs if of_input else outputs, of_input, dtypes=dtypes),
            depth,
            rngs=rngs,
        )
    largest = min(math.prod(inputs.values()), math.prod(outputs.values()))
    if config.rank > largest:
        raise ValueError(
            f"AdapterConfig.rank is {config.rank}, expected at most {largest}, as {place} has"
        )
    return stack(lambda r: LoRA(config, inputs, outputs, rngs=r, dtypes=dtypes), depth, rngs=rngs)
