"""Models of open_clip: MaMMUT and CoCa, and LAION's openMaMMUT, read and written.

The input is a folder as on the Hugging Face hub (`open_clip_folder`), or a file of weights, with
its config beside it or without one. Without a config only the 15 openMaMMUT sizes are recognised.
`open_clip_config` lists the models of open_clip.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from mammut.data.processor import Processor
from mammut.models.mammut import ModelConfig
from mammut.weights.files.tensor_file import (
    CheckpointError,
    TensorFile,
    open_tensors,
    stored_specs,
)
from mammut.weights.formats import resnets
from mammut.weights.formats.json_object import shown
from mammut.weights.formats.open_clip_config import (
    CLIP_VOCAB,
    OPENMAMMUT_SIZES,
    image_transform,
    model_config,
    openmammut,
)
from mammut.weights.formats.open_clip_export import save, to_open_clip
from mammut.weights.formats.open_clip_folder import CONFIG_FILE, find_weights, read_config
from mammut.weights.formats.open_clip_tables import table
from mammut.weights.formats.open_clip_tokenizer import open_tokenizer
from mammut.weights.opened import OpenedModel, model_specs

__all__ = [
    "model_config",
    "open_model",
    "openmammut",
    "recognises",
    "save",
    "table",
    "to_open_clip",
]

KIND = f"folder of open_clip (no {CONFIG_FILE}) or file of its weights"
# The beginning of the tensor names of its image encoders: its own ViT, or one of timm's.
_VISUAL = (
    "visual.conv1.",
    "visual.class_embedding",
    "visual.positional_embedding",
    "visual.transformer.",
    "visual.trunk.",
)


def recognises(path: pathlib.Path) -> bool:
    """Whether `path` is a model of open_clip.

    It is a folder with open_clip's config, or a file with its image encoder. CLIP's ResNets come in
    the same folders; `resnets` opens them.

    Raises:
      CheckpointError: the weights are missing or damaged.
    """
    if os.path.isdir(path):
        return os.path.exists(path / CONFIG_FILE) and not resnets.recognises(path)
    specs = stored_specs(path)
    return any(name.startswith(_VISUAL) for name in specs) and not resnets.is_resnet(specs)


def open_model(path: str | os.PathLike, *, image_size: int | None = None) -> OpenedModel:
    """Opens a model with its processor.

    Only the headers of the weights are read.

    Args:
      path: a folder with `open_clip_config.json` and weights, or a file of weights, a training
        checkpoint included. The config of a file is the one beside it.
      image_size: not used: the config has it.

    Raises:
      CheckpointError: a file is damaged or missing, the config is of a model that mammut does not
        have, or the weights do not fit it. Every mismatch is named.
    """
    path = pathlib.Path(path)
    weights = find_weights(path)
    folder = weights.parent
    config = read_config(path)
    theirs = open_tensors(weights)
    config_source = str(folder / CONFIG_FILE)
    if config is None:
        config = {"model_cfg": _openmammut_of(theirs)}
        config_source = str(weights)
    if unknown := config.keys() - {"model_cfg", "preprocess_cfg"}:
        names = ", ".join(map(shown, sorted(unknown)))
        raise CheckpointError(f"{config_source} has {names}, expected model_cfg and preprocess_cfg")

    ours = model_config(config.get("model_cfg"), config.get("preprocess_cfg"), config_source)
    rules = table(ours, theirs.specs)
    tensors = rules.to_ours(theirs, model_specs(ours), str(weights))
    processor = _processor(folder, ours, config, config_source)
    notes = [f"{name} of {weights} is not used: {reason}" for name, reason in rules.unused.items()]
    notes += [f"{name} is {value}: {reason}" for name, (value, reason) in rules.constant.items()]
    return OpenedModel(ours, tensors, processor, str(path), notes=tuple(notes))


def _openmammut_of(theirs: TensorFile) -> dict[str, Any]:
    """Finds the `model_cfg` of the openMaMMUT with these tensors.

    Only three tensors are read here: the table compares all.
    """
    shapes = {name: tuple(spec.shape) for name, spec in theirs.specs.items()}
    patches = shapes.get("visual.conv1.weight")
    embedding = shapes.get("text.token_embedding.weight")
    for size in OPENMAMMUT_SIZES:
        model_cfg = openmammut(size)
        vision = model_cfg["vision_cfg"]
        kernel = (vision["width"], 3, vision["patch_size"], vision["patch_size"])
        same_sizes = patches == kernel and embedding == (CLIP_VOCAB, model_cfg["embed_dim"])
        if same_sizes and "map_viz2txt_kv" in shapes:
            return model_cfg
    raise CheckpointError(
        f"{theirs.path} is of none of the {len(OPENMAMMUT_SIZES)} openMaMMUT sizes: "
        f"put the {CONFIG_FILE} of its model beside it"
    )


def _processor(
    folder: pathlib.Path, model: ModelConfig, config: Mapping[str, Any], config_source: str
) -> Processor:
    """Makes the processor of a folder.

    In a folder that `save` wrote it is the saved one; in others, the one that the config describes.
    """
    text_cfg = config["model_cfg"].get("text_cfg") or config["model_cfg"]["multimodal_cfg"]
    try:
        if (folder / "processor.json").exists():
            return Processor.load(folder)
        tokenizer = open_tokenizer(folder, text_cfg, model.text.vocab_size)
        transform = image_transform(config.get("preprocess_cfg"), model.vision.image_size)
        return Processor(tokenizer, transform, model.text.max_length)
    except ValueError as error:
        raise CheckpointError(f"{config_source}: {error}") from error
