"""Starts a model from others: the source of each parameter.

A run starts from a whole model (`TrainConfig.init`), from an image encoder (`init_vision`), from a
text decoder (`init_text`), or from a whole model with one or both towers from elsewhere.
The rules:

  image size     the position grid is resampled as the makers of the model do it; a class token
                 keeps its position. A ResNet needs nothing
  patch size     the patch kernel is resized by pseudo-inverse (FlexiViT), the position grid as
                 above
  text length    shorter: the first positions are kept; longer: the additional ones are random. A
                 class token keeps its own; rotary positions need nothing
  vocabulary     (`tokenizer.replace`) the token embedding and the vocabulary head are random
  image pooling  (a tower alone) the pool is random, and so is the norm where only one of the two
                 pools by queries
  video          (an image model) the kernels of tubes are those of the patches, inflated; the gate
                 of the fixed code and the vectors of frames are zero. Joined tubes are random. A
                 plain code, which would change what is seen of images, is refused
  frames         the vectors of the first frames are kept, as a run of fewer frames reads them;
                 the additional ones are zero. So an image, a video of one frame, stays the same
  number type    numbers are rounded or widened
  other towers   (a tower alone) random; parameters beside the towers belong to none of them

Any other difference is refused. `WarmStart` prints what happens to every parameter.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from mammut.core.fields import differences, to_dict
from mammut.models.compute import ComputeConfig
from mammut.models.mammut import ModelConfig
from mammut.models.resnet import ResNetConfig
from mammut.models.vit import VisionConfig
from mammut.weights.files.tensor_file import TensorSpec
from mammut.weights.opened import OpenedModel, Tensors, model_specs
from mammut.weights.resample import find_resampling
from mammut.weights.video_start import require_gate, start_of_video

Start = Literal["init", "init_vision", "init_text"]  # the fields of `TrainConfig`
What = Literal["loaded", "resampled", "inflated", "zero", "cut", "in part", "random", "left out"]

# Fields of an image encoder that say how a model uses it, not what it is.
_USE = ("pooling", "pool_queries", "pool_heads", "norm_after_pooling")
# Fields that may differ from the models to start from: each has a rule above.
SIZES = {
    "model.vision.image_size",
    "model.vision.patch_size",
    "model.vision.cut_rest",
    "model.vision.video.frames",
    "model.vision.video.patch_stride",
    "model.text.max_length",
}
VOCABULARY = {"model.text.vocab_size", "model.text.pad_id"}
_OF_VOCABULARY = {"text.token_embed.embedding", "text.vocab_head.kernel", "text.vocab_head_bias"}


@dataclasses.dataclass(frozen=True)
class Row:
    """What happens to one parameter.

    It is a parameter of the model, or one left out of a model that it starts from.
    """

    path: str
    count: int  # its count of numbers
    what: What
    source: str  # its source, such as "init_vision vit.npz"; "": no file
    why: str


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """Where every parameter of a model starts; printed, it is a table.

    Nothing is read before `read`.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...]  # the notes of the opened models, each with its file
    _reads: Mapping[str, Callable[[Any], np.ndarray]]

    @property
    def random(self) -> frozenset[str]:
        """The parameters that are random, wholly or in part."""
        return frozenset(row.path for row in self.rows if row.what in ("random", "in part"))

    def read(self, path: str, value: Any = None) -> Any:
        """Reads the value that a parameter starts with.

        Args:
          path: the parameter.
          value: its random value, for a parameter in `random`.

        Raises:
          CheckpointError: the file is damaged.
        """
        if path not in self._reads:
            return value
        return self._reads[path](value)

    def __str__(self) -> str:
        lines = [f"{'warm start':<34}{'numbers':>14}  "]
        # Parameters of one module with one fate share a line, in the order of the model.
        groups: dict[tuple[str, ...], int] = {}
        for row in self.rows:
            key = ".".join(row.path.split(".")[:2]), row.what, row.source, row.why
            groups[key] = groups.get(key, 0) + row.count
        for (name, *fate), count in groups.items():
            lines.append(
                f"{name:<34}{count:>14,}  {fate[0]:<10}" + ", ".join(filter(None, fate[1:]))
            )
        return "\n".join([*(line.rstrip() for line in lines), *self.notes])


def start_config(config: ModelConfig, starts: Mapping[Start, OpenedModel]) -> ModelConfig:
    """Gives `config` the architecture of the models it starts from.

    `init` brings all of it, but for adapters and videos where it has none, and for the second,
    smaller size of images; `init_vision` the image encoder but for how it is pooled, and videos as
    before; `init_text` the text decoder, and where that has no cross-attention, an image prefix.

    Raises:
      ValueError: a start holds no such part, or the parts do not go together.
    """
    needs = {"init": {"vision", "text", "rest"}, "init_vision": {"vision"}, "init_text": {"text"}}
    for name, opened in starts.items():
        if missing := sorted(needs[name] - set(opened.parts)):
            raise ValueError(
                f"{name} {opened.where} holds {' and '.join(opened.parts)} alone, expected "
                f"{' and '.join(missing)} "
                "as well: init_vision takes an image encoder, init_text a text decoder, init a "
                "whole model"
            )
    asked = config
    vision, text = config.vision, config.text
    if "init" in starts:
        config = starts["init"].config
        # Adapters of the run are added to a model that has none.
        config = dataclasses.replace(config, adapters=config.adapters or asked.adapters)
        vision = dataclasses.replace(
            config.vision,
            low_image_size=asked.vision.low_image_size,
            video=config.vision.video or asked.vision.video,
        )
        text = config.text
    if "init_vision" in starts:
        theirs = starts["init_vision"].config.vision
        used = _fields(vision, (*_USE, "low_image_size"), theirs)
        vision = dataclasses.replace(theirs, **used, video=theirs.video or vision.video)
    if "init_text" in starts:
        text = starts["init_text"].config.text
    projection = config.image_projection
    if text.has_prefix and not config.text.has_prefix:
        projection = "decoder"
    return dataclasses.replace(config, vision=vision, text=text, image_projection=projection)


def _fields(
    vision: VisionConfig | ResNetConfig,
    names: tuple[str, ...],
    other: VisionConfig | ResNetConfig,
) -> dict[str, Any]:
    """Reads the fields of `vision` in `names` that both kinds have.

    The other kind is the kind of the encoder `other`.
    """
    known = {field.name for field in dataclasses.fields(vision)} & {
        field.name for field in dataclasses.fields(other)
    }
    return {name: getattr(vision, name) for name in names if name in known}


def warm_start(
    config: ModelConfig,
    starts: Mapping[Start, OpenedModel],
    *,
    compute: ComputeConfig = ComputeConfig(),
    new_vocabulary: bool = False,
) -> WarmStart:
    """Finds the source of each parameter of a model.

    The rules are at the top of this module.

    Args:
      config: the config of the model; `start_config`, perhaps with other sizes.
      starts: at least one opened model, by the field of `TrainConfig` that names it.
      compute: has the number types of the model's parameters.
      new_vocabulary: whether ids mean other tokens than in the model to start from.

    Raises:
      ValueError: the model differs in a way that has no rule. Every difference is named.
    """
    names = {name: f"{name} {opened.where}" for name, opened in starts.items()}
    free = SIZES | {"model.vision.low_image_size"}
    if new_vocabulary:
        free = free | VOCABULARY
    expected = to_dict(start_config(config, starts))
    if changed := differences(expected, to_dict(config), free, "model."):
        raise ValueError(
            f"the model to start from, {', '.join(names.values())}, is another one: "
            f"{'; '.join(changed)}"
        )
    require_gate(config.vision, starts)

    rows: list[Row] = []
    reads: dict[str, Callable[[Any], np.ndarray]] = {}
    problems: list[str] = []
    taken = {name: set() for name in starts}
    for path, spec in model_specs(config, compute).items():
        name, why = _start_of(path, config, starts, new_vocabulary)
        if name is None:
            rows.append(Row(path, math.prod(spec.shape), "random", "", why))
            continue
        theirs = starts[name].tensors
        if path not in theirs.specs and (made := start_of_video(path, starts[name], config)):
            rows.append(Row(path, math.prod(spec.shape), made.what, names[name], made.why))
            if made.read is not None:
                reads[path] = functools.partial(_made, made.read, spec)
            continue
        taken[name].add(path)
        what, why, rule = _rule(path, starts[name], config)
        got = theirs.specs.get(path)
        if got is None:
            problems.append(f"{path} is not in {names[name]}")
        elif what == "loaded" and got.shape != spec.shape:
            problems.append(f"{path} is {list(spec.shape)}, in {names[name]} {list(got.shape)}")
        elif got.dtype != spec.dtype:
            why = f"{why}; {got.dtype} -> {spec.dtype}".removeprefix("; ")
        rows.append(Row(path, math.prod(spec.shape), what, names[name], why))
        reads[path] = functools.partial(_read, theirs, path, rule, spec.dtype)

    for name, opened in starts.items():
        for path, spec in opened.tensors.specs.items():
            if path in taken[name]:
                continue
            why = _why_left_out(path, name, config, starts, new_vocabulary)
            if not why:
                problems.append(f"{path} of {names[name]} has no place")
            rows.append(Row(path, math.prod(spec.shape), "left out", names[name], why))
    if problems:
        raise ValueError(
            "the model does not fit what it starts from, by model.vision.width, "
            f"model.text.width, model.embed_dim or model.vision.pool_*: {'; '.join(problems)}"
        )
    notes = (f"{names[name]}: {note}" for name, opened in starts.items() for note in opened.notes)
    return WarmStart(tuple(rows), tuple(notes), reads)


def _start_of(
    path: str, config: ModelConfig, starts: Mapping[Start, OpenedModel], new_vocabulary: bool
) -> tuple[Start | None, str]:
    """Finds the start that a parameter comes from.

    Returns the start and "", or None and the reason.
    """
    tower = f"init_{path.partition('.')[0]}"
    name = tower if tower in starts else "init"
    if name not in starts:
        return None, "no start has this part"
    if new_vocabulary and path in _OF_VOCABULARY:
        return None, "another vocabulary"
    if path.startswith("adapters.") and not starts[name].config.adapters:
        return None, "a new adapter"
    old = starts[name].config.vision.pooling
    new = config.vision.pooling
    other_pool = path.startswith("vision.pool.") and old != new
    # The norm acts on the tokens, or on the queries that stand for them.
    other_norm = path.startswith("vision.norm.") and (old == "queries") != (new == "queries")
    if other_pool or other_norm:
        return None, f"pooling is {new!r}, there {old!r}"
    return name, ""


def _why_left_out(
    path: str,
    name: Start,
    config: ModelConfig,
    starts: Mapping[Start, OpenedModel],
    new_vocabulary: bool,
) -> str:
    """Explains why a parameter of a start is left out.

    Returns "" where the parameter should have a place in the model.
    """
    tower = f"init_{path.partition('.')[0]}"
    if name == "init" and tower in starts:
        return f"{tower} takes its place"
    if name in ("init", tower):
        return _start_of(path, config, starts, new_vocabulary)[1]
    return "of no " + {"init_vision": "image encoder", "init_text": "text decoder"}[name]


def _rule(
    path: str, opened: OpenedModel, config: ModelConfig
) -> tuple[What, str, Callable[[np.ndarray, Any], np.ndarray]]:
    """Describes what happens to a parameter of `opened`.

    Returns:
      What, why, and a function that makes the new value from the stored one and a random one.
    """
    resampling = find_resampling(path, opened, config.vision)
    if resampling is not None:
        why, resample = resampling
        return "resampled", why, lambda value, random: resample(value)

    if path == "text.pos_embed":
        old = opened.config.text.max_length
        new = config.text.max_length
        # Behind the positions of the tokens, a class token may have one.
        if new < old:
            why = f"the first {new} of {old} positions"
            return "cut", why, lambda value, random: np.concatenate([value[:new], value[old:]])
        if new > old:
            why = f"{old} of {new} positions, the others random"

            def lengthen(value: np.ndarray, random: Any) -> np.ndarray:
                return np.concatenate([value[:old], random[old:new], value[old:]])

            return "in part", why, lengthen

    if path == "frame_embed":
        old = opened.config.vision.video.frames
        new = config.vision.video.frames
        if new < old:
            why = f"the first {new} of {old} frames"
            return "cut", why, lambda value, random: value[:new]
        if new > old:
            why = f"{old} of {new} frames, the others zero"
            missing = (0, new - old), (0, 0)
            return "in part", why, lambda value, random: np.pad(value, missing)

    why = ""
    after_pooling = opened.config.vision.norm_after_pooling
    if path.startswith("vision.norm.") and after_pooling != config.vision.norm_after_pooling:
        names = "the tokens", "the pooled image"
        why = f"the start norms {names[after_pooling]}, the model norms {names[not after_pooling]}"
    return "loaded", why, lambda value, random: value


def _read(theirs: Tensors, path: str, rule: Callable, dtype: np.dtype, random: Any) -> np.ndarray:
    """Reads the stored value, changed by its rule.

    It has the number type of the model.
    """
    return rule(theirs.read(path), random).astype(dtype, copy=False)


def _made(read: Callable[[], np.ndarray | float], spec: TensorSpec, random: Any) -> np.ndarray:
    """Makes a value that the start has no parameter for, in the shape and type of the model."""
    return np.broadcast_to(read(), spec.shape).astype(spec.dtype)
