"""Adapter modules: small additions to linear maps, attentions and MLPs.

    sequential        f(x) + A(f(x))     A: down, ReLU, up, with biases; f: an attention or an MLP
                                         before it joins the residual stream (Houlsby et al.,
                                         arXiv 1902.00751; MAGMA, arXiv 2112.05253)
    parallel          f(x) + A(x)        the same
    scaled_parallel   f(x) + s A(x)      s: one learned number, 1 at first (He et al.,
                                         arXiv 2110.04366)
    lora              f(x) + a/r B A x   A, B: linear maps to r numbers and from them; f: a linear
                                         map (Hu et al., arXiv 2106.09685)
    ia3               s * f(x)           s: a learned vector; on an MLP's second map f(s * x)
                                         (Liu et al., arXiv 2205.05638)

A site is the path of a module inside a stack of layers, such as text.layers.mlp or
vision.layers.attn.query. Adapters are a tree of their own, `Adapters`, so that the base keeps its
paths; `Adapters.attached` puts them into a copy of a tower for the time of a call.
`mammut.models.adapters` adds them to a whole model, removes and merges them.
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

from mammut.core.fields import (
    require,
    require_choices,
    require_positive,
    require_types,
)
from mammut.core.sharding import constrain
from mammut.models.compute import Dtypes, stack
from mammut.models.layers import Constant, LayerNorm, Linear, Normal, Uniform, param
from mammut.models.transformer import MLP, Attention, Layer

Tower = TypeVar("Tower", bound=nnx.Module)
Function = Callable[[jax.Array], jax.Array]

# Standard deviation of the initial weights and biases of MAGMA's bottlenecks; numbers are cut
# at twice this deviation.
_MAGMA_STDDEV = 1e-3
_NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The description of an adapter: small modules added to a model.

    The other parameters of the model do not change.

    Several configs with one `name` make up one adapter, which is saved, loaded and switched on as a
    whole.

    Example:
      >>> sites = ("text.layers.attn.*", "vision.layers.*.value")
      >>> lora = mammut.AdapterConfig(name="shapes", kind="lora", sites=sites)
      >>> model = mammut.add_adapter(model, lora, rngs=nnx.Rngs(0))
    """

    # Name of the adapter.
    name: str = "default"
    # Kind of its modules. sequential, parallel, scaled_parallel: bottlenecks (down, ReLU, up) on an
    # attention or MLP; they read its output, its input, or its input with a learned factor. lora: a
    # product of two thin matrices beside a linear map. ia3: a learned factor for each output of a
    # map, or for each input of an MLP's second map.
    kind: Literal["sequential", "parallel", "scaled_parallel", "lora", "ia3"] = "sequential"
    # Patterns (fnmatch) of the paths that get the modules, such as text.layers.mlp,
    # text.layers.attn.query, vision.layers.*.value.
    sites: tuple[str, ...] = ("text.layers.mlp",)
    # Width over hidden size of a bottleneck.
    reduction: int = 4
    # Rank of lora.
    rank: int = 8
    # Scale of lora: its product is multiplied by alpha / rank.
    alpha: float = 8.0
    # Whether a layer norm stands in front of a bottleneck.
    norm: bool = False
    # Start of a bottleneck. magma: N(0, 1e-3) cut at 2e-3, biases too (MAGMA). zero: the second map
    # is zero, so that the adapter changes nothing at first. lora and ia3 never change anything at
    # first.
    init: Literal["magma", "zero"] = "magma"

    def __post_init__(self):
        require_types(self)
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
        bottleneck = ("reduction", "norm", "init")
        lora = ("rank", "alpha")
        unread = {"lora": bottleneck, "ia3": bottleneck + lora}.get(self.kind, lora)
        for field in dataclasses.fields(self):
            # A setting without effect is a misunderstanding; "zero" is the state that lora and ia3
            # always start from.
            value = getattr(self, field.name)
            require(
                field.name not in unread or value == field.default or value == "zero",
                f"AdapterConfig.{field.name} is {value!r}, which {self.kind!r} does not have",
            )


class Bottleneck(nnx.Module):
    """A bottleneck on an attention or MLP: down, ReLU, up.

    It has `width // reduction` numbers inside. Its result is added to the output of its site.
    """

    def __init__(self, config: AdapterConfig, width: int, *, dtypes: Dtypes):
        self.kind = config.kind
        inside = {"mlp": width // config.reduction}
        outside = {"embed": width}
        self.norm = LayerNorm(width, _NORM_EPS, dtypes=dtypes) if config.norm else None
        if config.init == "zero":
            self.down = Linear(outside, inside, dtypes=dtypes)
            self.up = Linear(inside, outside, dtypes=dtypes, kernel_init=Constant(0.0))
        else:
            initializer = Normal(_MAGMA_STDDEV, cut=2.0)
            options = {"dtypes": dtypes, "kernel_init": initializer, "bias_init": initializer}
            self.down = Linear(outside, inside, **options)
            self.up = Linear(inside, outside, **options)
        if self.kind == "scaled_parallel":
            self.scale = param(Constant(1.0), (), dtypes.param)
        else:
            self.scale = None

    def __call__(self, function: Function, x: jax.Array) -> jax.Array:
        y = function(x)
        z = y if self.kind == "sequential" else x
        if self.norm is not None:
            z = self.norm(z)
        z = self.up(jax.nn.relu(constrain(self.down(z), "batch", None, "mlp")))
        if self.scale is not None:
            z = self.scale[...].astype(z.dtype) * z
        return y + z


class LoRA(nnx.Module):
    """LoRA: a product of two thin maps beside a linear map.

    The first map starts as peft's does, the second with zeros: at first the product is zero.
    """

    def __init__(
        self,
        config: AdapterConfig,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        dtypes: Dtypes,
    ):
        self.scale = config.alpha / config.rank
        rank = {"rank": config.rank}
        kernel_init = Uniform(1 / math.sqrt(math.prod(inputs.values())))
        self.down = Linear(inputs, rank, dtypes=dtypes, use_bias=False, kernel_init=kernel_init)
        self.up = Linear(rank, outputs, dtypes=dtypes, use_bias=False, kernel_init=Constant(0.0))

    def __call__(self, function: Function, x: jax.Array) -> jax.Array:
        return function(x) + self.scale * self.up(constrain(self.down(x), "batch", None, "rank"))

    def merged(
        self, kernel: jax.Array, bias: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Merges the adapter into the float32 `kernel` and `bias` of its map."""
        down = self.down.kernel[...].astype(jnp.float32)
        up = self.up.kernel[...].astype(jnp.float32)
        return kernel + self.scale * jnp.tensordot(down, up, 1, precision="highest"), bias


class IA3(nnx.Module):
    """(IA)^3: a learned factor for each output of a linear map.

    Factors are 1 at first; they multiply the bias, too. On an MLP's second map the factors multiply
    its inputs (`of_input`): they scale the hidden numbers of the MLP behind the activation
    function, as in peft's `feedforward_modules`.
    """

    def __init__(self, sizes: dict[str, int], of_input: bool, *, dtypes: Dtypes):
        self.of_input = of_input
        self.scale = param(Constant(1.0), tuple(sizes.values()), dtypes.param, *sizes)

    def __call__(self, function: Function, x: jax.Array) -> jax.Array:
        scale = self.scale[...]
        if self.of_input:
            return function(x * scale.astype(x.dtype))
        y = function(x)
        return y * scale.astype(y.dtype)

    def merged(
        self, kernel: jax.Array, bias: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Merges the adapter into the float32 `kernel` and `bias` of its map."""
        scale = self.scale[...].astype(jnp.float32)
        if self.of_input:
            return kernel * scale[:, None], bias
        if bias is not None:
            bias = bias * scale
        return kernel * scale, bias


class _Both(nnx.Module):
    """Two adapters on one site.

    The second adapts the output of the first.
    """

    def __init__(self, first: nnx.Module, second: nnx.Module):
        self.first = first
        self.second = second

    def __call__(self, function: Function, x: jax.Array) -> jax.Array:
        return self.second(functools.partial(self.first, function), x)


def sites(towers: Mapping[str, nnx.Module]) -> dict[str, nnx.Module]:
    """Lists the sites of `towers` by path.

    `towers` maps "text" and "vision" to modules. A site is a module in a stack of layers.
    """
    modules: dict[str, nnx.Module] = {}
    for prefix, tower in towers.items():
        for name, layers in vars(tower).items():
            if not isinstance(layers, Layer):
                continue
            for path, module in nnx.iter_modules(layers):
                if isinstance(module, Attention | MLP | Linear):
                    modules[".".join((prefix, name, *map(str, path)))] = module
    return modules


def chosen(config: AdapterConfig, modules: Mapping[str, nnx.Module]) -> list[str]:
    """Chooses the sites of an adapter by its kind and patterns.

    `modules` is what `sites` gives.

    Raises:
      ValueError: a pattern fits none of the right kind.
    """
    if config.kind in ("lora", "ia3"):
        wanted = Linear
        what = "a linear map"
    else:
        wanted = Attention | MLP
        what = "an attention or MLP"
    right = [site for site, module in modules.items() if isinstance(module, wanted)]
    for pattern in config.sites:
        if not fnmatch.filter(right, pattern):
            problem = f"not {what}" if fnmatch.filter(modules, pattern) else "no site"
            close = ", ".join(difflib.get_close_matches(pattern, right, 4, cutoff=0))
            right_sites = f"such as {close}" if close else "which this model does not have"
            raise ValueError(
                f"AdapterConfig.sites has {pattern!r}, which is {problem} of this model: "
                f"{config.kind!r} goes on {what}, {right_sites}"
            )
    return [
        site
        for site in right
        if any(fnmatch.fnmatchcase(site, pattern) for pattern in config.sites)
    ]


class Adapters(nnx.Dict):
    """The adapters of a model, by name, then by site.

    The key of a site is its path with / for the dots. A module has a leading `layer` axis, as the
    stack that it goes with: the parameter adapters.default.text/layers/mlp.down.kernel is
    float[layer, D, D / reduction].

    Args:
      configs: the adapters, `ModelConfig.adapters`.
      towers: the towers by name, "text" and "vision".

    Raises:
      ValueError: a pattern fits no site of the right kind, two adapters of one name are on one
        site, or a bottleneck or rank does not fit its site.
    """

    def __init__(
        self,
        configs: Sequence[AdapterConfig],
        towers: Mapping[str, nnx.Module],
        *,
        dtypes: Dtypes,
    ):
        super().__init__()
        all_sites = sites(towers)
        for config in configs:
            if hasattr(Adapters, config.name):
                raise ValueError(
                    f"AdapterConfig.name is {config.name!r}, which has another meaning: choose "
                    "another"
                )
            modules = self.setdefault(config.name, nnx.Dict())
            for site in chosen(config, all_sites):
                key = site.replace(".", "/")
                if key in modules:
                    raise ValueError(
                        f"two adapters of AdapterConfig.name {config.name!r} are on the site {site}"
                    )
                modules[key] = _make(config, site, all_sites[site], dtypes)

    def attached(self, tower: Tower, prefix: str, active: Sequence[str]) -> Tower:
        """Copies `tower` with the adapters `active` at work, in their order.

        `prefix` is the beginning of the tower's sites. The parameters are not copied. The copy
        is for the time of a call: it is no model to be kept.
        """
        if not active:
            return tower
        tower = jax.tree.map(lambda leaf: leaf, tower)
        for name in active:
            for key, adapter in self[name].items():
                top, *path = key.split("/")
                if top != prefix:
                    continue
                module = functools.reduce(getattr, path, tower)
                if module.adapter is not None:
                    adapter = _Both(module.adapter, adapter)
                module.adapter = adapter
        return tower


def _make(config: AdapterConfig, site: str, module: nnx.Module, dtypes: Dtypes) -> nnx.Module:
    """Makes one stack of adapters for the stack of modules at `site`."""
    if not isinstance(module, Linear):
        last = module.out if isinstance(module, Attention) else module.down
        depth, *_, width = last.kernel.shape
        if config.reduction > width:
            raise ValueError(
                f"AdapterConfig.reduction is {config.reduction}, expected at most the width {width}"
            )
        return stack(Bottleneck(config, width, dtypes=dtypes), depth)

    depth, *shape = module.kernel.shape
    axes = list(zip(module.kernel.axes[1:], shape, strict=True))
    inputs = dict(axes[: module.num_inputs])
    outputs = dict(axes[module.num_inputs :])
    if config.kind == "ia3":
        of_input = site.endswith(".mlp.down")
        sizes = inputs if of_input else outputs
        return stack(IA3(sizes, of_input, dtypes=dtypes), depth)
    largest = min(math.prod(inputs.values()), math.prod(outputs.values()))
    if config.rank > largest:
        raise ValueError(
            f"AdapterConfig.rank is {config.rank}, expected at most {largest}, the smaller size of "
            f"{site}"
        )
    return stack(LoRA(config, inputs, outputs, dtypes=dtypes), depth)
