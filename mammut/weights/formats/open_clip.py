"""Models of open_clip: MaMMUT and CoCa, and LAION's openMaMMUT (`open_clip_config` says which), in and out.

A folder as on the Hugging Face hub is read, `open_clip_config.json` beside the weights, or a file
of weights with or without one: what it is without can be told of the 15 openMaMMUT sizes alone, and
of two kinds that are others' to open, the ResNets (`resnets`) and MAGMA (`magma`).
"""

import os
import pathlib
from typing import Any

from mammut.core.files import read_json_object
from mammut.data.processor import Processor
from mammut.models.mammut import ModelConfig
from mammut.weights.files.tensor_file import CheckpointError, TensorFile, open_tensors
from mammut.weights.formats import magma, resnets
from mammut.weights.formats.json_object import shown
from mammut.weights.formats.open_clip_config import (
    CLIP_VOCAB,
    OPENMAMMUT_SIZES,
    image_transform,
    model_config,
    openmammut,
)
from mammut.weights.formats.open_clip_export import CONFIG_FILE, WEIGHTS_FILE, save, to_open_clip
from mammut.weights.formats.open_clip_tables import table
from mammut.weights.formats.open_clip_tokenizer import open_tokenizer
from mammut.weights.opened import OpenedModel, model_specs

__all__ = [
    "is_open_clip",
    "model_config",
    "open_model",
    "openmammut",
    "save",
    "table",
    "to_open_clip",
]

# The weights of a folder, the first that is there; never two files of one kind, unless they are
# shards.
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
_FILES = ".safetensors", ".pt", ".pth", ".bin", ".ckpt"


def is_open_clip(path: pathlib.Path) -> bool:
    """Whether `path` looks like a model of open_clip: a folder with its config, or a file of weights."""
    path = pathlib.Path(path)
    if os.path.isdir(path):
        return os.path.exists(path / CONFIG_FILE)
    return path.name.endswith((*_FILES, ".safetensors.index.json"))


def open_model(path: pathlib.Path, config: dict[str, Any] | None = None) -> OpenedModel:
    """A model with its processor, or a ResNet image encoder alone; nothing but headers is read of the weights.

    Args:
      path: a folder with `open_clip_config.json` and weights, or a file of weights, a training
        checkpoint included.
      config: what `open_clip_config.json` would hold. None: the file beside the weights.

    Raises:
      CheckpointError: a file is damaged or missing, the config is of a model that mammut does not
        have, or the weights do not fit it. Every mismatch is named.
    """
    path = pathlib.Path(path)
    folder = path if os.path.isdir(path) else path.parent
    weights = _weights(path) if folder == path else path
    told = str(folder / CONFIG_FILE) if config is None else "the config given"
    if config is None and os.path.exists(folder / CONFIG_FILE):
        config = read_json_object(folder / CONFIG_FILE)
        # as in open_clip's own model_configs
        if "model_cfg" not in config and "vision_cfg" in config:
            config = {"model_cfg": config}
    theirs = open_tensors(weights)
    if resnets.is_resnet(theirs.specs):
        return resnets.open_resnet(theirs, folder, config, str(path))
    if magma.is_magma(theirs.specs):
        return magma.open_magma(theirs, folder, str(path))
    if config is None:
        config, told = {"model_cfg": _recognised(theirs)}, str(weights)
    if unknown := config.keys() - {"model_cfg", "preprocess_cfg"}:
        names = ", ".join(map(shown, sorted(unknown)))
        raise CheckpointError(f"{told} has {names}, expected model_cfg and preprocess_cfg")
    ours = model_config(config.get("model_cfg"), config.get("preprocess_cfg"), told)
    rules = table(ours, theirs.specs)
    tensors = rules.to_ours(theirs, model_specs(ours), str(weights))
    processor = _processor(folder, ours, config, told)
    notes = [f"{name} of {weights} is not used: {reason}" for name, reason in rules.unused.items()]
    notes += [f"{name} is {value}: {reason}" for name, (value, reason) in rules.constant.items()]
    return OpenedModel(ours, tensors, processor, str(path), notes=tuple(notes))


def _weights(folder: pathlib.Path) -> pathlib.Path:
    for pattern in _WEIGHTS:
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(path.name for path in found)
            raise CheckpointError(
                f"{folder} has {len(found)} files of weights, {names}: give the path of one of them"
            )
    raise CheckpointError(
        f"{folder} has a {CONFIG_FILE} and no weights, expected {WEIGHTS_FILE} or another file"
    )


def _recognised(theirs: TensorFile) -> dict[str, Any]:
    """The `model_cfg` of the openMaMMUT size that has these tensors; the rest of them is compared later."""
    shapes = {key: tuple(spec.shape) for key, spec in theirs.specs.items()}
    patches = shapes.get("visual.conv1.weight", ())
    decoder = shapes.get("text.token_embedding.weight", ())
    for size in OPENMAMMUT_SIZES:
        model_cfg = openmammut(size)
        vision = model_cfg["vision_cfg"]
        kernel = vision["width"], 3, vision["patch_size"], vision["patch_size"]
        if (
            patches == kernel
            and decoder == (CLIP_VOCAB, model_cfg["embed_dim"])
            and "map_viz2txt_kv" in shapes
        ):
            return model_cfg
    raise CheckpointError(
        f"{theirs.path} is of none of the {len(OPENMAMMUT_SIZES)} openMaMMUT sizes: put the {CONFIG_FILE} of its model "
        "beside it"
    )


def _processor(
    folder: pathlib.Path, config: ModelConfig, files: dict[str, Any], told: str
) -> Processor:
    """Of a folder that `save` wrote, its own; else what open_clip would make of the config."""
    text_cfg = files["model_cfg"].get("text_cfg") or files["model_cfg"]["multimodal_cfg"]
    try:
        if (folder / "processor.json").exists():
            return Processor.load(folder)
        tokenizer = open_tokenizer(folder, text_cfg, config.text.vocab_size)
        transform = image_transform(files.get("preprocess_cfg"), config.vision.image_size)
        return Processor(tokenizer, transform, config.text.max_length)
    except ValueError as error:
        raise CheckpointError(f"{told}: {error}") from error
