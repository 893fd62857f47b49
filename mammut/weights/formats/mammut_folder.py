"""A model folder that `mammut.save` wrote.

Its manifest is checked.
"""

import os
import pathlib
from collections.abc import Collection, Mapping

import numpy as np

from mammut.core.files import check_manifest, read_json_object
from mammut.core.mapped_file import MAX_HEADER
from mammut.data.processor import Processor
from mammut.models.compute import ComputeConfig
from mammut.models.mammut import ModelConfig
from mammut.weights.files.tensor_file import CheckpointError, TensorSpec, open_tensors
from mammut.weights.opened import (
    LazyTensors,
    OpenedModel,
    Tensors,
    mismatches,
    model_specs,
    read_model,
)

KIND = "model folder (no manifest.json)"
VERSION = 2
CONFIG_FILE = "config.json"
MANIFEST_FILE = "manifest.json"
WEIGHTS_STEM = "model"  # the names of model.safetensors, or of its shards and their index


def recognises(path: pathlib.Path) -> bool:
    """Whether `path` is a complete model folder.

    A complete folder has a manifest, which is written last.
    """
    return os.path.exists(path / MANIFEST_FILE)


def open_model(folder: pathlib.Path, *, image_size: int | None = None) -> OpenedModel:
    """Opens the model and its processor.

    Only the headers of the weights are kept.

    Args:
      folder: for which `recognises` holds.
      image_size: not used: the config has it.

    Raises:
      CheckpointError: a file is damaged, missing or not in the manifest; or config, weights and
        processor do not fit each other. Every mismatch is named.
    """
    if problems := check_manifest(folder, folder / MANIFEST_FILE):
        raise CheckpointError(f"{folder} is damaged: {'; '.join(problems)}")
    config, compute, without_norm_bias = read_configs(folder)

    index = folder / f"{WEIGHTS_STEM}.safetensors.index.json"
    weights = index if index.exists() else folder / f"{WEIGHTS_STEM}.safetensors"
    tensors = open_tensors(weights)
    processor = read_processor(folder)

    read = {CONFIG_FILE, "processor.json", *processor.tokenizer.files, weights.name}
    if weights == index:
        read |= set(read_json_object(index, MAX_HEADER)["weight_map"].values())
    listed = read_json_object(folder / MANIFEST_FILE, MAX_HEADER).keys()
    if unlisted := sorted(read - listed):
        raise CheckpointError(f"{folder / MANIFEST_FILE} does not list {', '.join(unlisted)}")

    tensors = with_norm_biases(tensors, model_specs(config, compute), without_norm_bias)
    require_fit(config, compute, tensors.specs, str(weights))
    return OpenedModel(config, tensors, processor, str(folder), compute=compute)


def read_configs(folder: pathlib.Path) -> tuple[ModelConfig, ComputeConfig, tuple[str, ...]]:
    """Reads the configs in `config.json`.

    Returns also the towers whose layer norms have no bias there.

    Raises:
      CheckpointError: the file is missing, is of another format or version, or holds no
        `ModelConfig`.
    """
    path = folder / CONFIG_FILE
    config = read_json_object(path)
    if config.get("format") != "mammut" or config.get("version") not in (1, VERSION):
        raise CheckpointError(
            f"{path} has format {config.get('format')!r} version {config.get('version')!r}, "
            f"expected 'mammut' version 1 or {VERSION}"
        )
    return read_model(config, path)


def read_processor(folder: pathlib.Path) -> Processor:
    """Reads the processor in `folder`.

    Raises CheckpointError where it is missing or damaged.
    """
    try:
        return Processor.load(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def with_norm_biases(
    tensors: Tensors, expected: Mapping[str, TensorSpec], towers: Collection[str]
) -> Tensors:
    """Adds biases of zero to the layer norms of `towers`.

    Version 0.1 could leave these biases out.
    """
    zero = {
        path: spec
        for path, spec in expected.items()
        if path not in tensors.specs and path.endswith("norm.bias") and path.split(".")[0] in towers
    }
    if not zero:
        return tensors

    def read(path: str) -> np.ndarray:
        if path in zero:
            return np.zeros(zero[path].shape, zero[path].dtype)
        return tensors.read(path)

    return LazyTensors({**tensors.specs, **zero}, read)


def require_fit(
    config: ModelConfig, compute: ComputeConfig, specs: Mapping[str, TensorSpec], where: str
) -> None:
    """Checks that tensors are the parameters of a model.

    `where` names their file in errors.

    Raises:
      CheckpointError: a tensor is missing, left over, of another shape or type. All are named.
    """
    if problems := mismatches(
        specs, model_specs(config, compute), "is not a parameter of the model"
    ):
        raise CheckpointError(f"{where} does not fit its config: {'; '.join(problems)}")
