"""ResNet image encoders: CLIP's from open_clip's checkpoints, the norm-free one from timm's.

Only the image encoder is read, up to the grid of its last stage: not CLIP's attention pool, not
timm's classifier. The weights determine the architecture.

    visual.conv1.weight visual.layer1.0.conv1.weight   CLIP: RN50, RN101, RN50x4, RN50x16, RN50x64
    conv1.weight layer1.0.conv1.weight                 its `visual` alone
    stem.conv.weight stages.0.0.conv1.gain             timm's nf_resnet26, nf_resnet50, nf_resnet101
"""

import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mammut.core.files import read_json_object
from mammut.data.images import ImageTransform
from mammut.data.processor import Processor
from mammut.data.tokenizer import MissingTokenizer
from mammut.models.mammut import ModelConfig
from mammut.models.resnet import ResNetConfig
from mammut.weights.files.tensor_file import (
    CheckpointError,
    TensorFile,
    TensorSpec,
    open_tensors,
    stored_specs,
)
from mammut.weights.formats import open_clip_folder
from mammut.weights.formats.json_object import JsonObject, shown
from mammut.weights.formats.open_clip_config import read_preprocess
from mammut.weights.opened import OpenedModel, model_specs
from mammut.weights.tables import Entry, Reshaped, Same, Shape, Table, unused_notes

KIND = "ResNet of CLIP or timm"
# Mean and deviation of the pixels of ImageNet, timm's defaults.
_IMAGENET_MEAN = [0.485, 0.456, 0.406]
_IMAGENET_STD = [0.229, 0.224, 0.225]
_NF_SIZE = 256  # image size in pixels that timm's nf_resnet50 was trained with


@dataclasses.dataclass(frozen=True)
class Convolution:
    """The weight [outputs, inputs, height, width] of a torch.nn.Conv2d.

    Our kernel is [height, width, inputs, outputs].
    """

    def shape(self, ours: Sequence[Shape]) -> Shape:
        """Returns the shape [outputs, inputs, height, width]."""
        height, width, inputs, outputs = ours[0]
        return outputs, inputs, height, width

    def load(self, theirs: np.ndarray, ours: Sequence[Shape], index: int) -> np.ndarray:
        """Loads their weight with the axes in our order."""
        return theirs.transpose(2, 3, 1, 0)

    def save(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Saves our kernel with the axes in their order."""
        return ours[0].transpose(3, 2, 0, 1)


@dataclasses.dataclass(frozen=True)
class Variances(Same):
    """Numbers of which none may be below zero."""

    def load(self, theirs: np.ndarray, ours: Sequence[Shape], index: int) -> np.ndarray:
        """Loads the same numbers.

        Raises:
          CheckpointError: one of them is negative.
        """
        if not (theirs >= 0).all():
            raise CheckpointError(
                f"a batch norm's running_var holds {theirs.min()}, expected numbers of 0 or more"
            )
        return super().load(theirs, ours, index)


def recognises(path: pathlib.Path) -> bool:
    """Whether `path` holds the weights of a ResNet image encoder.

    `path` is a file or a folder. A folder is one of timm's, by the architecture in its
    `config.json`, or one of open_clip's.

    Raises:
      CheckpointError: the weights are missing or damaged.
    """
    if not os.path.isdir(path):
        return is_resnet(stored_specs(path))
    if os.path.exists(path / open_clip_folder.CONFIG_FILE):
        return is_resnet(stored_specs(open_clip_folder.find_weights(path)))
    return str(_timm_config(path).get("architecture", "")).startswith("nf_resnet")


def open_model(path: pathlib.Path, *, image_size: int | None = None) -> OpenedModel:
    """Opens an image encoder and its image transform.

    Args:
      path: a file or folder that `recognises` accepts.
      image_size: not used: the files give it, or it is the size of the published models.

    Raises:
      CheckpointError: a file is missing or damaged, the tensors are not those of one ResNet, or a
        config beside them is of another. Every mismatch is named.
    """
    weights = open_clip_folder.find_weights(path)
    theirs = open_tensors(weights)
    if not is_resnet(theirs.specs):
        raise CheckpointError(
            f"{weights} holds other tensors than a ResNet of CLIP's or a norm-free one of timm's"
        )
    return open_resnet(theirs, weights.parent, open_clip_folder.read_config(path), str(path))


def is_resnet(specs: Mapping[str, TensorSpec]) -> bool:
    """Whether the tensors of such an image encoder are among these."""
    return _clip_prefix(specs) is not None or _is_norm_free(specs)


def open_resnet(
    theirs: TensorFile, folder: pathlib.Path, config: Mapping[str, Any] | None, where: str
) -> OpenedModel:
    """Opens the image encoder in a file of weights.

    Returns also its image transform.

    Args:
      theirs: tensors for which `is_resnet` holds.
      folder: the folder of the file; of timm's models, its config.json is read.
      config: the values of `open_clip_config.json`; None: there is none.
      where: the file or folder, for errors.

    Raises:
      CheckpointError: the tensors are not those of one ResNet, or a config beside them is of
        another. Every mismatch is named.
    """
    specs = theirs.specs
    prefix = _clip_prefix(specs)
    if prefix is not None:
        vision, transform, notes = _clip(specs, prefix, config or {}, where)
        reasons = {name: _why_unused(name, prefix) for name in specs}
        unused = {name: why for name, why in reasons.items() if why}
        rules = Table(list(clip_entries(vision, prefix)), unused)
    else:
        vision, transform, notes = _norm_free(specs, folder, where)
        unused = {name: "the classifier" for name in specs if name.startswith("head.")}
        rules = Table(list(_norm_free_entries(vision)), unused)
    model = ModelConfig(vision=vision)
    ours = {name: spec for name, spec in model_specs(model).items() if name.startswith("vision.")}
    tensors = rules.to_ours(theirs, ours, where)
    # Only the image encoder and its transform are used: texts are refused.
    tokenizer = MissingTokenizer(
        (None, None, None), model.text.vocab_size, f"{where} is an image encoder"
    )
    processor = Processor(tokenizer, transform, model.text.max_length)
    return OpenedModel(
        model, tensors, processor, where, ("vision",), notes=(*unused_notes(rules.unused), *notes)
    )


def _clip_prefix(specs: Mapping[str, TensorSpec]) -> str | None:
    """Finds the beginning of the names of CLIP's ResNet; None: absent.

    The third convolution of its stem distinguishes it from other ResNets.
    """
    for prefix in ("visual.", ""):
        if f"{prefix}conv3.weight" in specs and f"{prefix}layer1.0.conv1.weight" in specs:
            return prefix
    return None


def _is_norm_free(specs: Mapping[str, TensorSpec]) -> bool:
    return "stem.conv.gain" in specs and "stages.0.0.conv1.gain" in specs


def _why_unused(name: str, prefix: str) -> str:
    """Explains why a tensor of CLIP's is not read.

    Returns "" where it is read.
    """
    if not name.startswith(prefix):
        return "of no image encoder"
    if name.startswith(f"{prefix}attnpool."):
        return "of the attention pool: the image tokens are what goes into it"
    if name.endswith(".num_batches_tracked"):
        return "how many batches its statistics are of"
    return ""


def stages(specs: Mapping[str, TensorSpec], pattern: str, where: str) -> tuple[int, int, int, int]:
    """Counts the bottlenecks of each stage.

    Args:
      specs: the tensors of a ResNet, and others.
      pattern: a regular expression for the start of a name, whose groups are the numbers of the
        stage and of the bottleneck.
      where: the file, for errors.

    Raises:
      CheckpointError: there are other than four stages.
    """
    blocks: dict[str, set[str]] = {}
    for match in filter(None, map(re.compile(pattern).match, specs)):
        blocks.setdefault(match[1], set()).add(match[2])
    if len(blocks) != 4:
        raise CheckpointError(f"{where} has a ResNet of {len(blocks)} stages, expected 4")
    return tuple(len(blocks[stage]) for stage in sorted(blocks, key=int))


def _config(where: str, **fields: Any) -> ResNetConfig:
    try:
        return ResNetConfig(**fields)
    except ValueError as error:
        raise CheckpointError(
            f"{where} describes a model that mammut does not have: {error}"
        ) from error


def _clip(
    specs: Mapping[str, TensorSpec], prefix: str, config: Mapping[str, Any], where: str
) -> tuple[ResNetConfig, ImageTransform, list[str]]:
    """Makes config, image transform and notes of CLIP's ResNet."""
    problems: list[str] = []
    notes: list[str] = []
    image = read_preprocess(config.get("preprocess_cfg"), problems)
    model_cfg = _object(config, "model_cfg")
    config_size = _object(model_cfg, "vision_cfg").get("image_size")
    pool = specs.get(f"{prefix}attnpool.positional_embedding")
    if pool is not None:  # it has a position for each image token, and one for their mean
        size = 32 * math.isqrt(max(pool.shape[0] - 1, 0))
        if config_size not in (None, size):
            problems.append(
                f"vision_cfg.image_size is {config_size}, the weights are of {size} pixels"
            )
    elif config_size is not None:
        size = config_size
    else:
        size = ResNetConfig().image_size
        notes.append(f"vision.image_size is {size}: the file does not tell it")
    if problems:
        raise CheckpointError(f"{where}: {'; '.join(problems)}")
    vision = _config(
        where, stem_width=specs[f"{prefix}conv3.weight"].shape[0],
        stages=stages(specs, rf"{re.escape(prefix)}layer(\d+)\.(\d+)\.", where),
        image_size=size, image_mean=image["mean"], image_std=image["std"],
    )  # fmt: skip
    transform = ImageTransform(size, image["mode"], image["interpolation"], image["fill"])
    return vision, transform, notes


def _object(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Reads the object at a key.

    It is empty where there is none.
    """
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def _timm_config(folder: pathlib.Path) -> dict[str, Any]:
    """Reads the values of timm's `config.json`.

    There are none where it is missing or damaged.
    """
    path = folder / "config.json"
    try:
        return read_json_object(path) if path.exists() else {}
    except CheckpointError:
        return {}


def _norm_free(
    specs: Mapping[str, TensorSpec], folder: pathlib.Path, where: str
) -> tuple[ResNetConfig, ImageTransform, list[str]]:
    """Makes config, image transform and notes of timm's norm-free ResNet."""
    problems: list[str] = []
    notes: list[str] = []
    pretrained_cfg = _timm_config(folder).get("pretrained_cfg")
    if not pretrained_cfg:
        notes.append(f"vision.image_size is {_NF_SIZE}: no config.json of timm gives it")
    cfg = JsonObject("pretrained_cfg", pretrained_cfg or {}, problems)
    preprocess = {"mean": _IMAGENET_MEAN, "std": _IMAGENET_STD}
    for key in ("mean", "std", "interpolation"):
        if cfg.value(key) is not None:
            preprocess[key] = cfg.value(key)
    image = read_preprocess(preprocess, problems, "pretrained_cfg")

    sides = cfg.value("input_size", [3, _NF_SIZE, _NF_SIZE])
    match sides:
        case [3, int(height), int(width)] if height == width and type(width) is int:
            pass
        case _:
            cfg.refuse("input_size", "[3, N, N]")
    if problems:
        raise CheckpointError(f"{folder / 'config.json'}: {'; '.join(problems)}")
    if cfg.value("crop_pct") not in (None, 1, 1.0):
        notes.append(
            f"pretrained_cfg.crop_pct is {shown(cfg.value('crop_pct'))}, which is not used: "
            "images are cropped along one side alone"
        )
    vision = _config(
        where, kind="nf", stem_width=specs["stem.conv.gain"].shape[0],
        stages=stages(specs, r"stages\.(\d+)\.(\d+)\.", where),
        image_size=sides[-1], image_mean=image["mean"], image_std=image["std"],
    )  # fmt: skip
    transform = ImageTransform(sides[-1], image["mode"], image["interpolation"], image["fill"])
    return vision, transform, notes


def _bottlenecks(config: ResNetConfig) -> Iterable[tuple[int, int, str, int | None]]:
    """Lists every bottleneck.

    Each has its stage, its number there, our path, and its layer in our stack.
    """
    for stage, depth in enumerate(config.stages):
        ours = f"vision.stage{stage + 1}"
        yield stage, 0, f"{ours}.first", None
        yield from ((stage, number, f"{ours}.others", number - 1) for number in range(1, depth))


def clip_entries(config: ResNetConfig, prefix: str) -> Iterable[Entry]:
    """Makes the entries of CLIP's ResNet.

    They end at the grid of the last stage.

    Args:
      config: its config.
      prefix: the beginning of its tensors' names.
    """

    def normed(convolution, norm, ours, layer=None):
        yield Entry(f"{convolution}.weight", (f"{ours}.kernel",), Convolution(), layer)
        yield Entry(f"{norm}.weight", (f"{ours}.scale",), layer=layer)
        yield Entry(f"{norm}.bias", (f"{ours}.bias",), layer=layer)
        yield Entry(f"{norm}.running_mean", (f"{ours}.mean",), layer=layer)
        yield Entry(f"{norm}.running_var", (f"{ours}.variance",), Variances(), layer)

    for i in (1, 2, 3):
        yield from normed(f"{prefix}conv{i}", f"{prefix}bn{i}", f"vision.stem.conv{i}")
    for stage, number, ours, layer in _bottlenecks(config):
        theirs = f"{prefix}layer{stage + 1}.{number}"
        for i in (1, 2, 3):
            yield from normed(f"{theirs}.conv{i}", f"{theirs}.bn{i}", f"{ours}.conv{i}", layer)
        if number == 0:
            yield from normed(
                f"{theirs}.downsample.0", f"{theirs}.downsample.1", f"{ours}.shortcut"
            )


def _norm_free_entries(config: ResNetConfig) -> Iterable[Entry]:
    def standardised(theirs, ours, outputs, layer=None):
        yield Entry(f"{theirs}.weight", (f"{ours}.kernel",), Convolution(), layer)
        yield Entry(f"{theirs}.bias", (f"{ours}.bias",), layer=layer)
        yield Entry(f"{theirs}.gain", (f"{ours}.gain",), Reshaped((outputs, 1, 1, 1)), layer)

    yield from standardised("stem.conv", "vision.stem.conv", config.stem_width)
    for stage, number, ours, layer in _bottlenecks(config):
        theirs = f"stages.{stage}.{number}"
        width = config.stem_width * 2**stage
        for i, outputs in ((1, width), (2, width), (3, 4 * width)):
            yield from standardised(f"{theirs}.conv{i}", f"{ours}.conv{i}", outputs, layer)
        if number == 0:
            yield from standardised(f"{theirs}.downsample.conv", f"{ours}.shortcut", 4 * width)
