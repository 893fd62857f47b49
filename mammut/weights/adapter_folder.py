"""Adapters as small folders: saved without the model they belong to, loaded onto the same one."""

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

from mammut.core import distributed
from mammut.core.fields import differences, to_dict
from mammut.core.files import check_manifest, make_manifest, read_json_object, replacing, write_json
from mammut.core.mapped_file import MAX_HEADER
from mammut.core.params import by_name
from mammut.models.adapter_modules import AdapterConfig
from mammut.models.adapters import extended, new_adapters, require_adapters
from mammut.models.mammut import MaMMUT, ModelConfig
from mammut.weights.files.tensor_file import (
    CheckpointError,
    TensorSpec,
    open_tensors,
    write_safetensors,
)
from mammut.weights.opened import host_tensors, mismatches, read_config, read_model

_FORMAT, _VERSION = "mammut adapter", 2
_CONFIG, _WEIGHTS, _MANIFEST = "adapter.json", "adapter.safetensors", "manifest.json"
# What makes an image a prefix is trained with the adapters of a language model; a MaMMUT has it
# from its own training.
_PREFIX = ("image_projection.*", "prefix_norm.*")
# Fields of a ModelConfig and its parts that may differ between the bases that an adapter is trained
# on and used with.
_FREE = {"adapters", "low_image_size"}


def base_hash(config: ModelConfig) -> str:
    """SHA-256 of all of a `ModelConfig` that an adapter depends on, as canonical JSON without fields at their default.

    Adapters and the second image size are left out. A field that a later version adds changes no
    hash while it has its default.
    """
    return hashlib.sha256(
        json.dumps(_told(config), sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def save_adapter(
    folder: str | os.PathLike, model: MaMMUT, name: str, *, also: Sequence[str] | None = None
) -> None:
    """Writes the adapter `name` to a folder of its own; one that is there already is replaced.

    Of several processes, all call it, process 0 writes.

    Args:
      also: patterns of paths (fnmatch) of parameters of the base that were trained with it, such as
        vision.*. None: of a model with an image prefix, what makes the prefix, `image_projection.*`
        and `prefix_norm.*`; of others, none.

    Raises:
      ValueError: there is no such adapter, or a pattern fits no parameter of the base.
    """
    require_adapters(model, name)
    specs, read = host_tensors(by_name(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    base = [path for path in specs if not path.startswith("adapters.")]
    for pattern in also or ():
        if not fnmatch.filter(base, pattern):
            raise ValueError(
                f"`also` has {pattern!r}, which fits no parameter of the base, such as {base[0]}"
            )
    if also is None:
        also = _PREFIX if model.config.conditioning == "prefix" else ()
    others = [path for path in base if any(fnmatch.fnmatchcase(path, pattern) for pattern in also)]
    saved = {
        path: spec
        for path, spec in specs.items()
        if path.startswith(f"adapters.{name}.") or path in others
    }
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

    What the folder has of the base takes the place of the model's own. Numbers become of the
    model's storage types.

    Args:
      name: what the adapter is called here; None: as it was saved.

    Raises:
      CheckpointError: the folder is none of `save_adapter`, is damaged, or does not fit its config.
      ValueError: it is of another base, or the model has an adapter of that name already.
    """
    folder = pathlib.Path(folder)
    if problems := check_manifest(folder, folder / _MANIFEST):
        raise CheckpointError(f"{folder} is damaged: {'; '.join(problems)}")
    if unlisted := sorted(
        {_CONFIG, _WEIGHTS} - read_json_object(folder / _MANIFEST, MAX_HEADER).keys()
    ):
        raise CheckpointError(f"{folder / _MANIFEST} does not list {', '.join(unlisted)}")
    configs, others = _read_about(folder / _CONFIG, model.config)
    saved_as, name = configs[0].name, name or configs[0].name
    configs = [dataclasses.replace(config, name=name) for config in configs]
    model = extended(
        model, configs, nnx.eval_shape(lambda: new_adapters(model, configs, jax.random.key(0)))
    )
    tensors, params = (
        open_tensors(folder / _WEIGHTS),
        by_name(nnx.to_pure_dict(nnx.state(model, nnx.Param))),
    )
    source = {
        path.replace(f"adapters.{saved_as}.", f"adapters.{name}.", 1): path
        for path in tensors.specs
    }
    others = [path for path in others if path in params and not path.startswith("adapters.")]
    wanted = {
        path: leaf
        for path, leaf in params.items()
        if path in others or path.startswith(f"adapters.{name}.")
    }
    found = {
        path: _as_stored(tensors.specs[there], wanted.get(path)) for path, there in source.items()
    }
    if problems := mismatches(found, wanted, "is no parameter of the adapter"):
        raise CheckpointError(f"{folder / _WEIGHTS} does not fit its config: {'; '.join(problems)}")
    for path, there in source.items():
        old = wanted[path]
        new = jax.device_put(
            np.array(tensors.read(there), old.dtype), getattr(old, "sharding", None)
        )
        functools.reduce(getattr, path.split("."), model).set_value(new)
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
    if about.get("format") != _FORMAT or about.get("version") not in (1, _VERSION):
        raise CheckpointError(
            f"{path} has format {about.get('format')!r} version {about.get('version')!r}, "
            f"expected {_FORMAT!r} version {_VERSION}"
        )
    match about:
        case {
            "adapters": [_, *_] as adapters,
            "also": list(others),
            "base_hash": str(found),
            "base": dict(base),
        }:
            configs = [read_config(AdapterConfig, adapter, path) for adapter in adapters]
        case _:
            raise CheckpointError(f"{path} does not tell of adapters, also, base_hash and base")
    if len({adapter.name for adapter in configs}) > 1:
        raise CheckpointError(f"{path} has adapters of several names, expected one")
    if about["version"] == 1:
        # Its hash is of the fields of its time: that of the base it names is made anew.
        base_config, _, _ = read_model({"model": base}, path)
        base = json.loads(json.dumps(to_dict(base_config)))  # lists, as in the file
        found = base_hash(base_config)
    if found != base_hash(config):
        free = {f"{part}{name}" for part in ("", "vision.", "text.") for name in _FREE}
        changed = differences(base, json.loads(json.dumps(to_dict(config))), free)
        raise ValueError(
            f"{path} is of another base: {'; '.join(changed) or 'its hash is not that of this model'}"
        )
    return configs, others


def _as_stored(found: TensorSpec, wanted: Any) -> TensorSpec:
    """The spec of a tensor in its file as it would be in the model: numbers may be stored as others."""
    floats = wanted is not None and all(
        jnp.issubdtype(dtype, jnp.floating) for dtype in (found.dtype, wanted.dtype)
    )
    return TensorSpec(found.shape, np.dtype(wanted.dtype)) if floats else found
