"""Adapters as small folders, saved without their base model.

They are loaded onto the same base model again, which many adapters may share. A folder has:

    adapter.json          format, version, the `AdapterConfig`s, config and hash of the base, and
                          the names of other parameters that were trained with the adapter
    adapter.safetensors   the parameters of the adapter and the other trained parameters, by
                          their path in the model
    manifest.json         size and SHA-256 of both files, which `load_adapter` checks
"""

import dataclasses
import fnmatch
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from types import NoneType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mammut.core import distributed
from mammut.core.fields import differences, require_kind, to_dict
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

_FORMAT = "mammut adapter"
_VERSION = 2
_CONFIG = "adapter.json"
_WEIGHTS = "adapter.safetensors"
_MANIFEST = "manifest.json"
# The parameters that turn an image into a prefix are trained together with the adapters of a
# language model; a MaMMUT has them from its own training.
_PREFIX = ("image_projection.*", "prefix_norm.*")
# Fields of a ModelConfig and its parts that may differ between the bases that an adapter is trained
# on and used with.
_FREE = {"adapters", "low_image_size"}


def base_hash(config: ModelConfig) -> str:
    """Computes the SHA-256 of the config that an adapter depends on.

    The hash covers canonical JSON without the fields at their default: a field that a later version
    adds changes no hash while it has its default. Adapters and the second image size are left out.
    """
    text = json.dumps(_set_fields(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def save_adapter(
    folder: str | os.PathLike, model: MaMMUT, name: str, *, also: Sequence[str] | None = None
) -> None:
    """Writes the adapter `name` to a folder of its own.

    An adapter that is already in the folder is replaced.

    Of several processes, all have to call it; process 0 writes.

    Args:
      folder: made where it is missing.
      model: the model with the adapter.
      name: the adapter's name in the model.
      also: patterns of paths (fnmatch) of base parameters that were trained with the adapter, such
        as vision.*; they are saved, too. None: those that make the image prefix,
        `image_projection.*` and `prefix_norm.*`, of a model that has one; else none.

    Raises:
      ValueError: there is no such adapter, or a pattern fits no parameter of the base.

    Example:
      >>> mammut.save_adapter("runs/questions", model, "questions")
      >>> model = mammut.load_adapter(base, "runs/questions")
    """
    require_adapters(model, name)
    require_kind("also", also, list, tuple, NoneType)
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
    chosen = {*others, *(path for path in specs if path.startswith(f"adapters.{name}."))}
    saved = {path: spec for path, spec in specs.items() if path in chosen}
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
    """Adds a saved adapter to a model and switches it on.

    The adapter was saved by `save_adapter`.

    Other adapters of the model stay as they are. Base parameters in the folder replace the model's.
    Numbers are stored in the model's types.

    Args:
      model: the base that the adapter was trained on, with or without other adapters.
      folder: the folder of the adapter.
      name: the adapter's name in the model; None: the name that it was saved by.

    Returns:
      The model with the adapter.

    Raises:
      CheckpointError: the folder is not one of `save_adapter`, is damaged, or does not fit its
        config.
      ValueError: the adapter is of another base, or the model has an adapter of that name already.

    Example:
      >>> model, processor = mammut.load("runs/base")
      >>> model = mammut.load_adapter(model, "runs/questions")
    """
    require_kind("folder", folder, str, os.PathLike)
    folder = pathlib.Path(folder)
    if problems := check_manifest(folder, folder / _MANIFEST):
        raise CheckpointError(f"{folder} is damaged: {'; '.join(problems)}")
    listed = read_json_object(folder / _MANIFEST, MAX_HEADER).keys()
    if unlisted := sorted({_CONFIG, _WEIGHTS} - listed):
        raise CheckpointError(f"{folder / _MANIFEST} does not list {', '.join(unlisted)}")
    configs, others = _read_about(folder / _CONFIG, model.config)
    saved_name = configs[0].name
    name = name or saved_name
    configs = [dataclasses.replace(config, name=name) for config in configs]
    model = extended(
        model, configs, nnx.eval_shape(lambda: new_adapters(model, configs, jax.random.key(0)))
    )

    params = by_name(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    chosen = {path for path in others if not path.startswith("adapters.")}
    chosen |= {path for path in params if path.startswith(f"adapters.{name}.")}
    expected = {path: leaf for path, leaf in params.items() if path in chosen}

    tensors = open_tensors(folder / _WEIGHTS)
    # The name in the file of each parameter, by its path in the model.
    saved_names = {
        path.replace(f"adapters.{saved_name}.", f"adapters.{name}.", 1): path
        for path in tensors.specs
    }
    specs = {
        path: _as_stored(tensors.specs[saved], expected.get(path))
        for path, saved in saved_names.items()
    }
    if problems := mismatches(specs, expected, "is no parameter of the adapter"):
        raise CheckpointError(f"{folder / _WEIGHTS} does not fit its config: {'; '.join(problems)}")

    for path, saved in saved_names.items():
        old = expected[path]
        array = np.array(tensors.read(saved), old.dtype)
        new = jax.device_put(array, getattr(old, "sharding", None))
        functools.reduce(getattr, path.split("."), model).set_value(new)
    return model


def _set_fields(config: Any) -> dict[str, Any]:
    """Lists the type of a config and its non-default fields.

    The fields in `_FREE` are left out.
    """
    fields = {"type": type(config).__name__}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            fields[field.name] = _set_fields(value)
        elif field.name not in _FREE and value != field.default:
            if isinstance(value, tuple) and all(map(dataclasses.is_dataclass, value)):
                value = [_set_fields(item) for item in value]
            fields[field.name] = value
    return fields


def _read_about(path: pathlib.Path, config: ModelConfig) -> tuple[list[AdapterConfig], list[str]]:
    """Reads `adapter.json`, for a model of `config`.

    Returns:
      The configs of the adapter, and the paths of the base parameters saved with it.

    Raises:
      CheckpointError: the file is not one of `save_adapter`.
      ValueError: the adapter is of another base.
    """
    about = read_json_object(path)
    if about.get("format") != _FORMAT or about.get("version") not in (1, _VERSION):
        raise CheckpointError(
            f"{path} has format {about.get('format')!r} version {about.get('version')!r}, "
            f"expected {_FORMAT!r} version 1 or {_VERSION}"
        )
    match about:
        case {
            "adapters": [_, *_] as adapters,
            "also": list(others),
            "base_hash": str(saved_hash),
            "base": dict(base),
        }:
            configs = [read_config(AdapterConfig, adapter, path) for adapter in adapters]
        case _:
            raise CheckpointError(
                f"{path} does not have the keys adapters, also, base_hash and base of an adapter"
            )
    for item in others:
        if not isinstance(item, str):
            raise CheckpointError(f"{path} has {item!r} in also, expected paths of parameters")
    if len({adapter.name for adapter in configs}) > 1:
        raise CheckpointError(f"{path} has adapters of several names, expected one")
    if about["version"] == 1:
        # The saved hash covers the fields of its version: the hash of its base is computed again.
        base_config, _, _ = read_model({"model": base}, path)
        base = json.loads(json.dumps(to_dict(base_config)))  # lists, as in the file
        saved_hash = base_hash(base_config)
    if saved_hash != base_hash(config):
        free = {f"{part}{name}" for part in ("", "vision.", "text.") for name in _FREE}
        changed = differences(base, json.loads(json.dumps(to_dict(config))), free)
        reason = "; ".join(changed) or "its hash is not that of this model"
        raise ValueError(f"{path} is of another base: {reason}")
    return configs, others


def _as_stored(spec: TensorSpec, param: Any) -> TensorSpec:
    """Makes the spec of a saved tensor with its parameter's type.

    The type changes only where both types are floats.
    """
    if param is None:
        return spec
    if all(jnp.issubdtype(dtype, jnp.floating) for dtype in (spec.dtype, param.dtype)):
        return TensorSpec(spec.shape, np.dtype(param.dtype))
    return spec
