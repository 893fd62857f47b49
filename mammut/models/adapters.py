"""Adds adapters to a model, removes, switches and merges them.

Every function returns a new model over the same arrays; the given model does not change.
`mammut.weights.adapter_folder` saves adapters.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from mammut.core.fields import require, require_kind
from mammut.models.adapter_modules import IA3, AdapterConfig, Adapters, LoRA
from mammut.models.layers import Linear, initialise
from mammut.models.mammut import MaMMUT


def add_adapter(model: MaMMUT, *configs: AdapterConfig, rngs: nnx.Rngs) -> MaMMUT:
    """Adds new adapters to a model and switches them on.

    The adapters that the model already has do not change, whether on or off.

    Raises:
      ValueError: the model has an adapter of this name already, or there is no such site
        (`mammut.models.adapter_modules`).

    Example:
      >>> lora = mammut.AdapterConfig(name="shapes", kind="lora", sites=("text.layers.attn.*",))
      >>> model = mammut.add_adapter(model, lora, rngs=nnx.Rngs(0))
    """
    require_kind("model", model, MaMMUT)
    require_kind("rngs", rngs, nnx.Rngs)
    for config in configs:
        require(
            isinstance(config, AdapterConfig), f"{config!r:.60} is given, expected an AdapterConfig"
        )

    # Compiled as one program: otherwise each site would be compiled on its own.
    @nnx.jit
    def make(key: jax.Array) -> Adapters:
        return new_adapters(model, configs, key)

    return extended(model, configs, make(rngs.params()))


def remove_adapter(model: MaMMUT, name: str) -> MaMMUT:
    """Removes the adapter `name` from a model.

    Raises:
      ValueError: the model has no such adapter.

    Example:
      >>> base = mammut.remove_adapter(model, "shapes")
    """
    require_adapters(model, name)
    model = _copy(model)
    del model.adapters[name]
    left = tuple(config for config in model.config.adapters if config.name != name)
    model.config = dataclasses.replace(model.config, adapters=left)
    model.active_adapters = tuple(other for other in model.active_adapters if other != name)
    if not left:
        model.adapters = nnx.static(None)
    return model


def set_active_adapters(model: MaMMUT, *names: str) -> MaMMUT:
    """Switches the adapters `names` of a model on, and all others off.

    They work in the order of `ModelConfig.adapters`. In a model that was just made or loaded all
    adapters are on.

    Raises:
      ValueError: the model has no adapter of one of the names.

    Example:
      >>> plain = mammut.set_active_adapters(model)
      >>> adapted = mammut.set_active_adapters(model, "shapes")
    """
    require_adapters(model, *names)
    model = _copy(model)
    model.active_adapters = tuple(name for name in model.config.adapter_names if name in names)
    return model


def merge_adapter(model: MaMMUT, name: str) -> MaMMUT:
    """Merges the adapter `name` into the weights of its model.

    Only LoRA and (IA)^3 adapters can be merged. The returned model computes the same without the
    adapter. The sums are computed in float32 and rounded once, to the type in which the weights are
    stored.

    Raises:
      ValueError: the model has no such adapter; or the adapter has a bottleneck, which is not a
      change of weights; or another adapter works before it on the same map.

    Example:
      >>> plain = mammut.merge_adapter(model, "shapes")
    """
    require_adapters(model, name)
    names = model.config.adapter_names
    earlier = [model.adapters[other] for other in names[: names.index(name)]]
    merged = remove_adapter(model, name)
    for key, adapter in model.adapters[name].items():
        site = key.replace("/", ".")
        if not isinstance(adapter, LoRA | IA3):
            raise ValueError(
                f"the adapter {name!r} is a bottleneck on {site}, which cannot be merged into "
                "weights"
            )
        before = [other[key] for other in earlier if key in other]
        # Sums of weights may be taken in any order, products of sums may not.
        if before and not all(isinstance(other, LoRA) for other in (adapter, *before)):
            raise ValueError(
                f"another adapter works on {site} before {name!r}: merge or remove that one first"
            )
        _merge(adapter, functools.reduce(getattr, key.split("/"), merged))
    return merged


def _merge(adapter: LoRA | IA3, linear: Linear) -> None:
    """Merges an adapter into the weights of a linear map.

    Both are stacks of layers.
    """
    bias = None if linear.bias is None else linear.bias[...].astype(jnp.float32)
    kernel = linear.kernel[...].astype(jnp.float32)
    kernel, bias = jax.vmap(type(adapter).merged)(adapter, kernel, bias)
    linear.kernel.set_value(kernel.astype(linear.kernel.dtype))
    if bias is not None:
        linear.bias.set_value(bias.astype(linear.bias.dtype))


def num_adapter_params(model: MaMMUT, name: str | None = None) -> int:
    """Counts the parameters of the adapter `name`; None: of all adapters.

    Raises:
      ValueError: the model has no such adapter.

    Example:
      >>> mammut.num_adapter_params(model, "shapes")
      8192
    """
    require_kind("model", model, MaMMUT)
    if name is None:
        return sum(leaf.size for leaf in jax.tree.leaves(model.adapters))
    require_adapters(model, name)
    return sum(leaf.size for leaf in jax.tree.leaves(model.adapters[name]))


def _copy(model: MaMMUT) -> MaMMUT:
    """Copies a model; both have the same arrays."""
    return jax.tree.map(lambda leaf: leaf, model)


def require_adapters(model: MaMMUT, *names: str) -> None:
    """Raises ValueError where the model lacks an adapter of `names`."""
    require_kind("model", model, MaMMUT)
    there = model.config.adapter_names
    for name in names:
        if name not in there:
            raise ValueError(
                f"the model has no adapter {name!r}, it has {', '.join(there) or 'none'}"
            )


def new_adapters(model: MaMMUT, configs: Sequence[AdapterConfig], key: jax.Array) -> Adapters:
    """Makes new adapters for a model, without adding them."""
    towers = {"text": model.text, "vision": model.vision}
    adapters = Adapters(configs, towers, dtypes=model.compute.dtypes)
    return initialise(adapters, key, "adapters")


def extended(model: MaMMUT, configs: Sequence[AdapterConfig], fresh: Adapters) -> MaMMUT:
    """Adds the adapters `fresh`, made for `configs`, to a model.

    Raises:
      ValueError: the model has an adapter of this name already.
    """
    there = model.config.adapter_names
    if taken := [name for name in fresh if name in there]:
        raise ValueError(
            f"the model has an adapter {taken[0]!r} already: give the new one another name"
        )
    model = _copy(model)
    for name in there:
        fresh[name] = model.adapters[name]
    model.adapters = nnx.data(fresh)
    model.config = dataclasses.replace(model.config, adapters=(*model.config.adapters, *configs))
    new = tuple(name for name in model.config.adapter_names if name not in there)
    model.active_adapters = (*model.active_adapters, *new)
    return model
