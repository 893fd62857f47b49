"""What is done with the adapters of a model: added, switched on and off, merged into plain weights, saved, loaded.

Every function gives a new model over the same arrays and leaves the one it was given as it is. An adapter's folder, a
small one beside a large base that many adapters share, is what `save_adapter` writes:

    adapter.json          format, version, the `AdapterConfig`s, the base's config and its hash, what else is there
    adapter.safetensors   the adapter's parameters, and those others, named by their path in the model
    manifest.json         size and SHA-256 of both, checked by `load_adapter`
"""

import dataclasses
import fnmatch
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mammut.config import RUN_FIELDS, RUN_VISION_FIELDS, AdapterConfig, ModelConfig, differences, to_dict
from mammut.core import distributed
from mammut.core.files import check_manifest, make_manifest, read_json_object, replacing, write_json
from mammut.core.mapped_file import MAX_HEADER
from mammut.core.params import by_name
from mammut.models.adapter_modules import IA3, Adapters, LoRA
from mammut.models.layers import Dtypes
from mammut.models.mammut import MaMMUT
from mammut.weights.checkpoints import host_tensors, mismatches, read_config
from mammut.weights.files.tensor_file import CheckpointError, TensorSpec, open_tensors, write_safetensors

_FORMAT, _VERSION = "mammut adapter", 1
_CONFIG, _WEIGHTS, _MANIFEST = "adapter.json", "adapter.safetensors", "manifest.json"
# What makes an image a prefix is trained with the adapters of a language model; a MaMMUT has it from its own training.
_PREFIX = ("image_projection.*", "prefix_norm.*")
# Fields of a ModelConfig and its parts that may differ between the bases that an adapter is trained on and used with.
_FREE = {"adapters", *RUN_FIELDS, *RUN_VISION_FIELDS}


def add_adapter(model: MaMMUT, *configs: AdapterConfig, rngs: nnx.Rngs) -> MaMMUT:
    """The model with new adapters, switched on beside those that were.

    Raises:
      ValueError: the model has an adapter of such a name already, or there is no such site (`mammut.models.adapter_modules`).
    """
    # Compiled as one: op by op, each site would be compiled for itself.
    return _extended(model, configs, nnx.jit(lambda rngs: _fresh(model, configs, rngs))(rngs))


def remove_adapter(model: MaMMUT, name: str) -> MaMMUT:
    """The model without the adapter `name`; raises ValueError when there is none."""
    _require_names(model, name)
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
    _require_names(model, *names)
    model = _copy(model)
    model.active_adapters = tuple(name for name in _names(model.config) if name in names)
    return model


def merge_adapter(model: MaMMUT, name: str) -> MaMMUT:
    """The model without the adapter `name`, of LoRA and (IA)^3, and with plain weights that do the same.

    The sums are float32 and rounded once, to the type that the weights are stored in.

    Raises:
      ValueError: there is no such adapter, a bottleneck is part of it, which is no change of weights, or another works
        before it on the same map.
    """
    _require_names(model, name)
    names = _names(model.config)
    earlier = [model.adapters[other] for other in names[: names.index(name)]]
    merged = remove_adapter(model, name)
    for key, adapter in model.adapters[name].items():
        place = key.replace("/", ".")
        if not isinstance(adapter, LoRA | IA3):
            raise ValueError(f"the adapter {name!r} is a bottleneck on {place}, which plain weights cannot stand for")
        before = [other[key] for other in earlier if key in other]
        if before and not all(isinstance(other, LoRA) for other in (adapter, *before)):
            raise ValueError(f"another adapter works on {place} before {name!r}: merge or remove that one first")
        linear = functools.reduce(getattr, key.split("/"), merged)
        old = [None if value is None else value[...].astype(jnp.float32) for value in (linear.kernel, linear.bias)]
        for value, new in zip((linear.kernel, linear.bias), jax.vmap(type(adapter).merged)(adapter, *old), strict=True):
            if value is not None:
                value.set_value(new.astype(value.dtype))
    return merged


def num_adapter_params(model: MaMMUT, name: str | None = None) -> int:
    """Parameters of the adapter `name`, or of all; raises ValueError when there is no such adapter."""
    if name is None:
        return sum(leaf.size for leaf in jax.tree.leaves(model.adapters))
    _require_names(model, name)
    return sum(leaf.size for leaf in jax.tree.leaves(model.adapters[name]))


def base_hash(config: ModelConfig) -> str:
    """SHA-256 of all of a `ModelConfig` that an adapter depends on, as canonical JSON without fields at their default.

    Adapters, how a run computes and trains (`RUN_FIELDS`) and storage types are left out. A field that a later version
    adds changes no hash while it has its default.
    """
    return hashlib.sha256(json.dumps(_told(config), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def save_adapter(folder: str | os.PathLike, model: MaMMUT, name: str, *, also: Sequence[str] | None = None) -> None:
    """Writes the adapter `name` to a folder of its own; one that is there already is replaced.

    Of several processes, all call it, process 0 writes.

    Args:
      also: patterns of paths (fnmatch) of parameters of the base that were trained with it, such as vision.*. None: of
        a model with an image prefix, what makes the prefix, `image_projection.*` and `prefix_norm.*`; of others, none.

    Raises:
      ValueError: there is no such adapter, or a pattern fits no parameter of the base.
    """
    _require_names(model, name)
    specs, read = host_tensors(by_name(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    base = [path for path in specs if not path.startswith("adapters.")]
    for pattern in also or ():
        if not fnmatch.filter(base, pattern):
            raise ValueError(f"`also` has {pattern!r}, which fits no parameter of the base, such as {base[0]}")
    if also is None:
        also = _PREFIX if model.config.conditioning == "prefix" else ()
    others = [path for path in base if any(fnmatch.fnmatchcase(path, pattern) for pattern in also)]
    saved = {path: spec for path, spec in specs.items() if path.startswith(f"adapters.{name}.") or path in others}
    if not distributed.first():
        for path in saved:
            read(path)
        return
    about = {
        "format": _FORMAT,
        "version": _VERSION,
        "adapters": [to_dict(config) for config in model.config.adapters if config.name == name],
        "also": others,
        "base_hash": base_hash(model.config),
        "base": to_dict(dataclasses.replace(model.config, adapters=())),
    }
    with replacing(pathlib.Path(folder), _MANIFEST) as new:
        write_safetensors(new / _WEIGHTS, saved, read, metadata={"format": _FORMAT})
        write_json(new / _CONFIG, about)
        write_json(new / _MANIFEST, make_manifest(new, [new / _CONFIG, new / _WEIGHTS]))


def load_adapter(model: MaMMUT, folder: str | os.PathLike, name: str | None = None) -> MaMMUT:
    """The model with an adapter that `save_adapter` wrote, switched on beside those that were.

    What the folder has of the base takes the place of the model's own. Numbers become of the model's storage types.

    Args:
      name: what the adapter is called here; None: as it was saved.

    Raises:
      CheckpointError: the folder is none of `save_adapter`, is damaged, or does not fit its config.
      ValueError: it is of another base, or the model has an adapter of that name already.
    """
    folder = pathlib.Path(folder)
    if problems := check_manifest(folder, folder / _MANIFEST):
        raise CheckpointError(f"{folder} is damaged: {'; '.join(problems)}")
    if unlisted := sorted({_CONFIG, _WEIGHTS} - read_json_object(folder / _MANIFEST, MAX_HEADER).keys()):
        raise CheckpointError(f"{folder / _MANIFEST} does not list {', '.join(unlisted)}")
    configs, others = _read_about(folder / _CONFIG, model.config)
    saved_as, name = configs[0].name, name or configs[0].name
    configs = [dataclasses.replace(config, name=name) for config in configs]
    model = _extended(model, configs, nnx.eval_shape(lambda: _fresh(model, configs, nnx.Rngs(0))))
    tensors, params = open_tensors(folder / _WEIGHTS), by_name(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    source = {path.replace(f"adapters.{saved_as}.", f"adapters.{name}.", 1): path for path in tensors.specs}
    others = [path for path in others if path in params and not path.startswith("adapters.")]
    wanted = {path: leaf for path, leaf in params.items() if path in others or path.startswith(f"adapters.{name}.")}
    found = {path: _as_stored(tensors.specs[there], wanted.get(path)) for path, there in source.items()}
    if problems := mismatches(found, wanted, "is no parameter of the adapter"):
        raise CheckpointError(f"{folder / _WEIGHTS} does not fit its config: {'; '.join(problems)}")
    for path, there in source.items():
        old = wanted[path]
        new = jax.device_put(np.array(tensors.read(there), old.dtype), getattr(old, "sharding", None))
        functools.reduce(getattr, path.split("."), model).set_value(new)
    return model


def _copy(model: MaMMUT) -> MaMMUT:
    return jax.tree.map(lambda leaf: leaf, model)


def _names(config: ModelConfig) -> tuple[str, ...]:
    return tuple(dict.fromkeys(adapter.name for adapter in config.adapters))


def _require_names(model: MaMMUT, *names: str) -> None:
    there = _names(model.config)
    for name in names:
        if name not in there:
            raise ValueError(f"the model has no adapter {name!r}, it has {', '.join(there) or 'none'}")


def _fresh(model: MaMMUT, configs: Sequence[AdapterConfig], rngs: nnx.Rngs) -> Adapters:
    """New adapters for a model, which are not part of it yet."""
    dtypes = Dtypes(jnp.dtype(model.config.dtype), jnp.dtype(model.config.param_dtype))
    return Adapters(configs, {"text": model.text, "vision": model.vision}, rngs=rngs, dtypes=dtypes)


def _extended(model: MaMMUT, configs: Sequence[AdapterConfig], fresh: Adapters) -> MaMMUT:
    """The model with `fresh`, made for `configs`, beside the adapters that it has."""
    there = _names(model.config)
    if taken := [name for name in fresh if name in there]:
        raise ValueError(f"the model has an adapter {taken[0]!r} already: give the new one another name")
    model = _copy(model)
    for name in there:
        fresh[name] = model.adapters[name]
    model.adapters = nnx.data(fresh)
    model.config = dataclasses.replace(model.config, adapters=(*model.config.adapters, *configs))
    new = tuple(name for name in _names(model.config) if name not in there)
    model.active_adapters = (*model.active_adapters, *new)
    return model


def _told(config: Any) -> dict[str, Any]:
    """The fields of a config that are not at their default, but for those that may differ, and its type."""
    told = {"type": type(config).__name__}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            told[field.name] = _told(value)
        elif field.name not in _FREE and value != field.default:
            told[field.name] = value
    return told


def _read_about(path: pathlib.Path, config: ModelConfig) -> tuple[list[AdapterConfig], list[str]]:
    """What `adapter.json` says there is: the adapter, for a model of `config`, and parameters of the base."""
    about = read_json_object(path)
    if about.get("format") != _FORMAT or about.get("version") != _VERSION:
        raise CheckpointError(
            f"{path} has format {about.get('format')!r} version {about.get('version')!r}, "
            f"expected {_FORMAT!r} version {_VERSION}"
        )
    match about:
        case {"adapters": [_, *_] as adapters, "also": list(others), "base_hash": str(found), "base": dict(base)}:
            configs = [read_config(AdapterConfig, adapter, path) for adapter in adapters]
        case _:
            raise CheckpointError(f"{path} does not tell of adapters, also, base_hash and base")
    if len({adapter.name for adapter in configs}) > 1:
        raise CheckpointError(f"{path} has adapters of several names, expected one")
    if found != base_hash(config):
        free = {f"{part}{name}" for part in ("", "vision.", "text.") for name in _FREE}
        changed = differences(base, json.loads(json.dumps(to_dict(config))), free)
        raise ValueError(f"{path} is of another base: {'; '.join(changed) or 'its hash is not that of this model'}")
    return configs, others


def _as_stored(found: TensorSpec, wanted: Any) -> TensorSpec:
    """The spec of a tensor in its file as it would be in the model: numbers may be stored as others."""
    floats = wanted is not None and all(jnp.issubdtype(dtype, jnp.floating) for dtype in (found.dtype, wanted.dtype))
    return TensorSpec(found.shape, np.dtype(wanted.dtype)) if floats else found
