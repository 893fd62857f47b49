"""A folder of open_clip's: its config and its weights.

It is laid out as on the Hugging Face hub.

MaMMUT, CoCa (`open_clip`) and CLIP's ResNets (`resnets`) come in such folders.
"""

import os
import pathlib
from typing import Any

from mammut.core.files import read_json_object
from mammut.weights.files.tensor_file import CheckpointError

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
# The weights of a folder: the first pattern that fits a file. Two files that fit one pattern are
# refused; shards have an index, which is one file.
_WEIGHTS = (
    WEIGHTS_FILE,
    "*.safetensors.index.json",
    "*.safetensors",
    "open_clip_pytorch_model.bin",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
)


def read_config(path: pathlib.Path) -> dict[str, Any] | None:
    """Reads the object in `open_clip_config.json`.

    It has the key "model_cfg". Returns None where there is no file.

    Args:
      path: the folder, or the file of weights beside the config.

    Raises:
      CheckpointError: the file does not hold a JSON object.
    """
    folder = path if os.path.isdir(path) else path.parent
    if not os.path.exists(folder / CONFIG_FILE):
        return None
    config = read_json_object(folder / CONFIG_FILE)
    # a file of open_clip's own model_configs, under this name
    if "model_cfg" not in config and "vision_cfg" in config:
        return {"model_cfg": config}
    return config


def find_weights(path: pathlib.Path) -> pathlib.Path:
    """Finds the file of weights in the folder `path`.

    Any other `path` is returned unchanged.

    Raises:
      CheckpointError: the folder has no file of weights, or several of one kind.
    """
    if not os.path.isdir(path):
        return path
    for pattern in _WEIGHTS:
        files = sorted(path.glob(pattern))
        if len(files) == 1:
            return files[0]
        if files:
            names = ", ".join(file.name for file in files)
            raise CheckpointError(
                f"{path} has {len(files)} files of weights, {names}: give the path of one of them"
            )
    raise CheckpointError(
        f"{path} has a config and no weights, expected {WEIGHTS_FILE} or another file"
    )
