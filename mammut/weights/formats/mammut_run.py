"""The folder of a run that has not ended.

The model is read from its newest good checkpoint.

A run that has ended is a model folder (`mammut_folder`).
"""

import os
import pathlib
from typing import Any

from mammut.core.files import checksum, read_json_object, write_json
from mammut.models.compute import ComputeConfig
from mammut.models.mammut import ModelConfig
from mammut.weights.checkpoints import Checkpoints
from mammut.weights.files.tensor_file import CheckpointError, TensorSpec
from mammut.weights.formats import mammut_folder
from mammut.weights.opened import LazyTensors, OpenedModel, model_specs, read_model

KIND = "run (no checkpoints)"
RUN_FILE = "run.json"
_CHECKSUM = "sha256"


def recognises(path: pathlib.Path) -> bool:
    """Whether `path` is the folder of an unfinished run.

    Such a folder has checkpoints and no manifest.
    """
    return os.path.isdir(path / "checkpoints") and not mammut_folder.recognises(path)


def open_model(folder: pathlib.Path, *, image_size: int | None = None) -> OpenedModel:
    """Opens the model of the newest good checkpoint.

    Its parameters are read.

    Args:
      folder: for which `recognises` holds.
      image_size: not used: the run's config has it.

    Raises:
      CheckpointError: there is no good checkpoint, `run.json` or the processor cannot be read, or
        they do not fit each other.
    """
    config, compute, without_norm_bias = read_configs(folder)
    with Checkpoints(folder, keep=None) as checkpoints:
        arrays = checkpoints.restore_params()
    specs = {name: TensorSpec(array.shape, array.dtype) for name, array in arrays.items()}
    tensors = mammut_folder.with_norm_biases(
        LazyTensors(specs, arrays.__getitem__), model_specs(config, compute), without_norm_bias
    )
    mammut_folder.require_fit(config, compute, tensors.specs, str(folder / "checkpoints"))
    processor = mammut_folder.read_processor(folder)
    return OpenedModel(config, tensors, processor, str(folder), compute=compute)


def write_run_file(folder: pathlib.Path, run: dict[str, Any]) -> None:
    """Writes `run.json` with a checksum: a flipped bit in a config is often another config."""
    write_json(folder / RUN_FILE, run | {_CHECKSUM: checksum(run)})


def read_run_file(folder: pathlib.Path) -> dict[str, Any]:
    """Reads `run.json`: `config` and `overrides`, of newer versions also `state` and `processor`.

    Raises:
      CheckpointError: the file is missing, has other keys than a run's, or was changed after it was
        written.
    """
    path = folder / RUN_FILE
    run = read_json_object(path)
    required = {"config", "overrides"}
    if not required <= run.keys() <= required | {"state", "processor", _CHECKSUM}:
        raise CheckpointError(
            f"{path} is not a run's config, expected the keys config and overrides"
        )
    expected = run.pop(_CHECKSUM, None)
    if expected not in (None, checksum(run)):
        raise CheckpointError(
            f"{path} does not have the {_CHECKSUM} that it was written with: put it back, or "
            f"remove the field {_CHECKSUM} if it was changed on purpose"
        )
    return run


def read_configs(folder: pathlib.Path) -> tuple[ModelConfig, ComputeConfig, tuple[str, ...]]:
    """Reads the model and compute configs in `run.json`.

    Nothing else of the run's config is read. The third value names the towers whose layer norms
    have no bias.

    Raises:
      CheckpointError: the file is missing, has other keys than a run's, or holds no `ModelConfig`.
    """
    path = folder / RUN_FILE
    config = read_run_file(folder)["config"]
    if not isinstance(config, dict) or "model" not in config:
        raise CheckpointError(
            f"{path} is not a run's config, expected the key config with an object that has model"
        )
    return read_model(config, path)
