"""What is done with the adapters of a model: added, switched on and off, merged into plain weights, saved, loaded.

Every function gives a new model over the same arrays and leaves the one it was given as it is. An
adapter's folder, a small one beside a large base that many adapters share, is what `save_adapter`
writes:

    adapter.json          format, version, the `AdapterConfig`s, the base's config and its hash, what else is there
    adapter.safetensors   the adapter's parameters, and those others, named by their path in the model
    manifest.json         size and SHA-256 of both, checked by `load_adapter`
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from mammut.models.adapter_modules import IA3, AdapterConfig, Adapters, LoRA
from mammut.models.layers import initialise
from mammut.models.mammut import MaMMUT, ModelConfig


def add_adapter(model: MaMMUT, *configs: AdapterConfig, rngs: nnx.Rngs) -> MaMMUT:
    """The model with new adapters, switched on beside those that were.

    Raises:
      ValueError: the model has an adapter of such a name already, or there is no such site
        (`mammut.models.adapter_modules`).
    """

    # Compiled as one: op by op, each site would be compiled for itself.
    @nnx.jit
    def make(key: jax.Array) -> Adapters:
        return new_adapters(model, configs, key)

    return extended(model, configs, make(rngs.params()))


def remove_adapter(model: MaMMUT, name: str) -> MaMMUT:
    """The model without the adapter `name`; raises ValueError when there is none."""
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
    """The model with the adapters `names` at work, in the order of `ModelConfig.adapters`, and no others.

    A model that is made or loaded has all of its adapters at work.

    Raises:
      ValueError: there is no adapter of such a name.
    """
    require_adapters(model, *names)
    model = _copy(model)
    model.active_adapters = tuple(name for name in _names(model.config) if name in names)
    return model


def merge_adapter(model: MaMMUT, name: str) -> MaMMUT:
    """The model without the adapter `name`, of LoRA and (IA)^3, and with plain weights that do the same.

    The sums are float32 and rounded once, to the type that the weights are stored in.

    Raises:
      ValueError: there is no such adapter, a bottleneck is part of it, which is no change of
        weights, or another works before it on the same map.
    """
    require_adapters(model, name)
    names = _names(model.config)
    earlier = [model.adapters[other] for other in names[: names.index(name)]]
    merged = remove_adapter(model, name)
    for key, adapter in model.adapters[name].items():
        place = key.replace("/", ".")
        if not isinstance(adapter, LoRA | IA3):
            raise ValueError(
                f"the adapter {name!r} is a bottleneck on {place}, which plain weights cannot stand for"
            )
        before = [other[key] for other in earlier if key in other]
        if before and not all(isinstance(other, LoRA) for other in (adapter, *before)):
            raise ValueError(
                f"another adapter works on {place} before {name!r}: merge or remove that one first"
            )
        linear = functools.reduce(getattr, key.split("/"), merged)
        old = [
            None if value is None else value[...].astype(jnp.float32)
            for value in (linear.kernel, linear.bias)
        ]
        for value, new in zip(
            (linear.kernel, linear.bias), jax.vmap(type(adapter).merged)(adapter, *old), strict=True
        ):
            if value is not None:
                value.set_value(new.astype(value.dtype))
    return merged


def num_adapter_params(model: MaMMUT, name: str | None = None) -> int:
    """Parameters of the adapter `name`, or of all; raises ValueError when there is no such adapter."""
    if name is None:
        return sum(leaf.size for leaf in jax.tree.leaves(model.adapters))
    require_adapters(model, name)
    return sum(leaf.size for leaf in jax.tree.leaves(model.adapters[name]))


def _copy(model: MaMMUT) -> MaMMUT:
    return jax.tree.map(lambda leaf: leaf, model)


def _names(config: ModelConfig) -> tuple[str, ...]:
    return tuple(dict.fromkeys(adapter.name for adapter in config.adapters))


def require_adapters(model: MaMMUT, *names: str) -> None:
    there = _names(model.config)
    for name in names:
        if name not in there:
            raise ValueError(
                f"the model has no adapter {name!r}, it has {', '.join(there) or 'none'}"
            )


def new_adapters(model: MaMMUT, configs: Sequence[AdapterConfig], key: jax.Array) -> Adapters:
    """Makes new adapters for a model, which are not part of it yet."""
    towers = {"text": model.text, "vision": model.vision}
    adapters = Adapters(configs, towers, dtypes=model.compute.dtypes)
    return initialise(adapters, key, "adapters")


def extended(model: MaMMUT, configs: Sequence[AdapterConfig], fresh: Adapters) -> MaMMUT:
    """The model with `fresh`, made for `configs`, beside the adapters that it has."""
    there = _names(model.config)
    if taken := [name for name in fresh if name in there]:
        raise ValueError(
            f"the model has an adapter {taken[0]!r} already: give the new one another name"
        )
    model = _copy(model)
    for name in there:
        fresh[name] = model.adapters[name]
    model.adapters = nnx.data(fresh)
    model.config = dataclasses.replace(model.config, adapters=(*model.config.adapters, *configs))
    new = tuple(name for name in _names(model.config) if name not in there)
    model.active_adapters = (*model.active_adapters, *new)
    return model
