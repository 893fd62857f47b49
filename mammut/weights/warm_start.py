"""Starting a model from others: which parameters come from where, and what happens where sizes differ.

A run starts from a whole model (`TrainConfig.init`), from an image encoder (`init_vision`), a text
decoder (`init_text`), or from a whole model one or both of whose towers another replaces. The
rules:

  image size        the position grid is resampled as the model's makers do it; a class token keeps its position. A
                    ResNet needs nothing
  patch size        the patch kernel is resized by pseudo-inverse (FlexiViT), the position grid as above
  text length       shorter: the first positions; longer: those there are, the new ones random. A class token keeps its
                    own; rotary positions need nothing
  vocabulary        (`tokenizer.replace`) the token embedding and the vocabulary head are random
  image pooling     (a tower alone) its pool, and the norm where one pools by queries and the other not, are random
  number type       rounded or widened
  other towers      (a tower alone) random; what a model has beside its towers counts to none of them

Anything else that differs is refused. `WarmStart` prints what became of every parameter.
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
from mammut.weights.opened import OpenedModel, Tensors, model_specs
from mammut.weights.resample import Tower, _resampling

Start = Literal["init", "init_vision", "init_text"]  # fields of `TrainConfig`
What = Literal["loaded", "resampled", "cut", "in part", "random", "left out"]

# Of an image encoder: how a model uses it, not what it is.
_USE = ("pooling", "pool_queries", "pool_heads", "norm_after_pooling")
# Fields that may differ from those of the models to start from: what a rule above is about.
SIZES = {"model.vision.image_size", "model.vision.patch_size", "model.text.max_length"}
VOCABULARY = {"model.text.vocab_size", "model.text.pad_id"}
_OF_VOCABULARY = {"text.token_embed.embedding", "text.vocab_head.kernel", "text.vocab_head_bias"}


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of one parameter, of the model's or (left out) of one it starts from."""

    path: str
    count: int  # its numbers
    what: What
    source: str  # such as "init_vision vit.npz"; "": none
    why: str


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """Where every parameter of a model starts. Nothing has been read yet; printed, it is a table."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...]  # what the files hold beside a model of ours, and what of it they lack
    _reads: Mapping[str, Callable[[Any], np.ndarray]]

    @property
    def random(self) -> frozenset[str]:
        """The parameters that are random, wholly or in part."""
        return frozenset(row.path for row in self.rows if row.what in ("random", "in part"))

    def read(self, path: str, value: Any = None) -> Any:
        """The value that a parameter starts with; `value` is the random one of a parameter in `random`.

        Raises:
          CheckpointError: the file is damaged.
        """
        return value if path not in self._reads else self._reads[path](value)

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
    """`config` with the architecture of what it starts from.

    `init` brings all of it, but for adapters where it has none, and for the second, smaller size of
    images; `init_vision` the image encoder but for how it is pooled; `init_text` the text decoder,
    and where that has no cross-attention, an image prefix.

    Raises:
      ValueError: a start holds no such part, or the parts do not go together.
    """
    needs = {"init": {"vision", "text", "rest"}, "init_vision": {"vision"}, "init_text": {"text"}}
    for name, opened in starts.items():
        if missing := sorted(needs[name] - set(opened.parts)):
            raise ValueError(
                f"{name} {opened.where} holds {' and '.join(opened.parts)} alone, expected {' and '.join(missing)} "
                "as well: init_vision takes an image encoder, init_text a text decoder, init a whole model"
            )
    asked = config
    vision, text = config.vision, config.text
    if "init" in starts:
        config = starts["init"].config
        # Adapters of the run go on a model that has none.
        config = dataclasses.replace(config, adapters=config.adapters or asked.adapters)
        vision = dataclasses.replace(config.vision, low_image_size=asked.vision.low_image_size)
        text = config.text
    if "init_vision" in starts:
        theirs = starts["init_vision"].config.vision
        used = _fields(vision, (*_USE, "low_image_size"), theirs)
        vision = dataclasses.replace(theirs, **used)
    if "init_text" in starts:
        text = starts["init_text"].config.text
    projection = config.image_projection
    if text.has_prefix and not config.text.has_prefix:
        projection = "decoder"
    return dataclasses.replace(config, vision=vision, text=text, image_projection=projection)


def _fields(vision: Tower, names: tuple[str, ...], other: Tower) -> dict[str, Any]:
    """Those of `vision` among `names` that an encoder of the kind of `other` has, too."""
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
    """Where the parameters of a model start from, by the rules at the top of this module.

    Args:
      config: of the model; without overrides, `start_config`.
      starts: at least one opened model, by the field of `TrainConfig` that names it.
      compute: says the number types of the model's parameters.
      new_vocabulary: ids mean other tokens than in the model to start from.

    Raises:
      ValueError: the model differs in something that has no rule; every difference is named.
    """
    names = {name: f"{name} {opened.where}" for name, opened in starts.items()}
    free = SIZES | {"model.vision.low_image_size"} | (VOCABULARY if new_vocabulary else set())
    if changed := differences(
        to_dict(start_config(config, starts)), to_dict(config), free, "model."
    ):
        raise ValueError(
            f"the model to start from, {', '.join(names.values())}, is another one: {'; '.join(changed)}"
        )
    rows, reads, problems = [], {}, []
    taken = {name: set() for name in starts}
    for path, spec in model_specs(config, compute).items():
        name, why = _start_of(path, config, starts, new_vocabulary)
        if name is None:
            rows.append(Row(path, math.prod(spec.shape), "random", "", why))
            continue
        taken[name].add(path)
        theirs, (what, why, rule) = starts[name].tensors, _rule(path, starts[name], config)
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
            f"the model does not fit what it starts from, by model.vision.width, model.text.width, model.embed_dim or "
            f"model.vision.pool_*: {'; '.join(problems)}"
        )
    notes = (f"{names[name]}: {note}" for name, opened in starts.items() for note in opened.notes)
    return WarmStart(tuple(rows), tuple(notes), reads)


def _start_of(
    path: str, config: ModelConfig, starts: Mapping[Start, OpenedModel], new_vocabulary: bool
) -> tuple[Start | None, str]:
    """The start that a parameter comes from; or None, and why."""
    tower = f"init_{path.partition('.')[0]}"
    name = tower if tower in starts else "init"
    if name not in starts:
        return None, "in nothing it starts from"
    if new_vocabulary and path in _OF_VOCABULARY:
        return None, "another vocabulary"
    if path.startswith("adapters.") and not starts[name].config.adapters:
        return None, "a new adapter"
    old, new = starts[name].config.vision.pooling, config.vision.pooling
    pool, norm = path.startswith("vision.pool."), path.startswith("vision.norm.")
    # The norm is of the tokens, or of the queries that stand for them.
    if pool and old != new or norm and (old == "queries") != (new == "queries"):
        return None, f"pooling is {new!r}, there {old!r}"
    return name, ""


def _why_left_out(
    path: str,
    name: Start,
    config: ModelConfig,
    starts: Mapping[Start, OpenedModel],
    new_vocabulary: bool,
) -> str:
    """Why a parameter of a start has no place in the model; "": it should have one."""
    tower = f"init_{path.partition('.')[0]}"
    if name == "init" and tower in starts:
        return f"{tower} takes its place"
    if name in ("init", tower):
        return _start_of(path, config, starts, new_vocabulary)[1]
    return "of no " + {"init_vision": "image encoder", "init_text": "text decoder"}[name]


def _rule(
    path: str, opened: OpenedModel, config: ModelConfig
) -> tuple[What, str, Callable[[np.ndarray, Any], np.ndarray]]:
    """What becomes of a parameter of `opened`, why, and how: a function of its value and of a random one."""
    if resampling := _resampling(path, opened, config.vision):
        return "resampled", resampling[0], lambda value, _: resampling[1](value)
    old, new = opened.config.text.max_length, config.text.max_length
    if path == "text.pos_embed" and new < old:
        why = f"the first {new} of {old} positions"
        return "cut", why, lambda value, _: np.concatenate([value[:new], value[old:]])
    if path == "text.pos_embed" and new > old:
        why = f"{old} of {new} positions, the others random"
        return (
            "in part",
            why,
            lambda value, random: np.concatenate([value[:old], random[old:new], value[old:]]),
        )
    pooled, here = opened.config.vision.norm_after_pooling, config.vision.norm_after_pooling
    moved = path.startswith("vision.norm.") and pooled != here
    why = f"there of {'the pooled image' if pooled else 'the tokens'}, here not" if moved else ""
    return "loaded", why, lambda value, _: value


def _read(theirs: Tensors, path: str, rule: Callable, dtype: np.dtype, random: Any) -> np.ndarray:
    return rule(theirs.read(path), random).astype(dtype, copy=False)
