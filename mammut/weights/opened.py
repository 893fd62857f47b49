"""A model as opened from a file: its config, its tensors by name, and whether they fit together."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from mammut.core.fields import from_dict
from mammut.data.processor import Processor
from mammut.models.compute import ComputeConfig
from mammut.models.mammut import MaMMUT, ModelConfig
from mammut.weights.files.tensor_file import CheckpointError, TensorSpec
from mammut.weights.old_configs import upgraded


@runtime_checkable
class Tensors(Protocol):
    """Named arrays that are read one by one: a `mammut.weights.files.tensor_file.TensorFile`, or what a table makes of one."""

    specs: Mapping[str, TensorSpec]
    read: Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class LazyTensors:
    """`Tensors` from a function."""

    specs: Mapping[str, TensorSpec]
    read: Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model whose files were opened and checked, and whose parameters are read when they are asked for.

    Raises:
      CheckpointError: the processor makes other images or texts than the config's model takes; all
        of it is named.
    """

    config: ModelConfig
    tensors: Tensors  # ours, by path such as "text.layers.attn.query.kernel"
    processor: Processor | None  # None: the files say nothing of one
    where: str  # the file or folder, for errors
    # What is there: of a lone image encoder, "vision" alone, and `config` means nothing beyond it.
    parts: tuple[str, ...] = ("vision", "text", "rest")
    # how its makers resample the position grid
    positions: Literal["bicubic", "bilinear"] = "bicubic"
    # what of its files has no place in our model, and what of ours they do not have; why
    notes: tuple[str, ...] = ()
    # How the model is computed unless somebody says otherwise; its types are those of `tensors`.
    compute: ComputeConfig = ComputeConfig()

    def __post_init__(self):
        if self.processor is None:
            return
        image, vision, text = self.processor.image, self.config.vision, self.config.text
        problems = []
        if self.processor.vocab_size > text.vocab_size:
            found = f"the tokenizer has {self.processor.vocab_size} ids"
            problems.append(f"{found}, too many for a vocab_size of {text.vocab_size}")
        if image.image_size != vision.image_size:
            problems.append(
                f"images of {image.image_size} pixels, expected an image_size of {vision.image_size}"
            )
        found, room = self.processor.max_length, self.config.text_length
        if found > room or (found < room and text.whole_length):
            problems.append(f"texts of {found} tokens, expected a max_length of {room}")
        if problems:
            raise CheckpointError(
                f"the processor of {self.where} is of another model: {'; '.join(problems)}"
            )


def require_target(
    folder: pathlib.Path,
    opened: OpenedModel,
    files: Collection[str],
    foreign: Collection[str],
    overwrite: bool,
) -> None:
    """Whether a model may be written to `folder`, asked before anything is touched.

    Args:
      files: what would be written, or of an older model there removed.
      foreign: files of folders of another kind, which are not overwritten even when asked.

    Raises:
      ValueError: `opened` is a part of a model, is read from `folder` itself, or there is something
        in the way.
    """
    if opened.processor is None or set(opened.parts) != {"vision", "text", "rest"}:
        raise ValueError(
            f"{opened.where} is {' and '.join(opened.parts)} without a processor, expected a whole model"
        )
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected a folder to write to")
    if there := [name for name in foreign if os.path.exists(folder / name)]:
        raise ValueError(
            f"{folder} holds {there[0]} of a folder of another kind: give a new folder"
        )
    if (there := [name for name in files if os.path.exists(folder / name)]) and not overwrite:
        raise ValueError(f"{folder} holds {there[0]} already: give a new folder, or overwrite=True")
    home = opened.where if os.path.isdir(opened.where) else os.path.dirname(opened.where) or "."
    if (
        overwrite
        and os.path.exists(opened.where)
        and folder.is_dir()
        and os.path.samefile(home, folder)
    ):
        raise ValueError(f"{folder} is where {opened.where} is read from: give a new folder")


def model_specs(
    config: ModelConfig, compute: ComputeConfig = ComputeConfig()
) -> dict[str, TensorSpec]:
    """Lists shape and type of every parameter of a MaMMUT, by path.

    A path is such as "text.layers.attn.query.kernel".
    """

    def make() -> MaMMUT:
        return MaMMUT(config, compute=compute, rngs=nnx.Rngs(0))

    state = nnx.state(nnx.eval_shape(make), nnx.Param)
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state))
    return {
        ".".join(entry.key for entry in path): TensorSpec(leaf.shape, np.dtype(leaf.dtype))
        for path, leaf in leaves
    }


def rounded(array: np.ndarray, dtype: np.dtype, where: str) -> np.ndarray:
    """The floats as another type's; `where` names file and key in errors.

    Raises:
      CheckpointError: a finite one is beyond the type's largest.
    """
    if float(ml_dtypes.finfo(array.dtype).max) <= float(ml_dtypes.finfo(dtype).max):
        return array.astype(dtype, copy=False)
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    if (np.isinf(narrow) & ~np.isinf(array)).any():
        raise CheckpointError(f"{where} holds finite numbers that are too large for {dtype}")
    return narrow


def read_config(cls: type, values: Any, path: pathlib.Path) -> Any:
    """A config of type `cls` from the values in the file `path`; raises CheckpointError when they are none."""
    try:
        return from_dict(cls, values, str(path))
    except (ValueError, TypeError) as error:  # a field that there is not, a value that cannot be
        raise CheckpointError(f"{path} does not hold a {cls.__name__}: {error}") from error


def read_model(
    values: Any, path: pathlib.Path
) -> tuple[ModelConfig, ComputeConfig, tuple[str, ...]]:
    """Reads {"model": ..., "compute": ...} of the file `path`, in the fields of any version.

    The third value names the towers ("vision", "text") whose layer norms have no bias in the file:
    it is zero.

    Raises:
      CheckpointError: the values are none of a model.
    """
    new = upgraded({name: values.get(name) for name in ("model", "compute") if name in values})
    config = read_config(ModelConfig, new.config.get("model"), path)
    compute = read_config(ComputeConfig, new.config.get("compute", {}), path)
    return config, compute, new.without_norm_bias


def host_tensors(
    arrays: Mapping[str, Any],
) -> tuple[dict[str, TensorSpec], Callable[[str], np.ndarray]]:
    """The specs of arrays by name, and what brings one to the host, to be written with `tensor_files`.

    Of several processes, all bring all of them, in the order of the specs, which is that in which
    they are written.
    """
    specs = {name: TensorSpec(array.shape, np.dtype(array.dtype)) for name, array in arrays.items()}
    specs = dict(sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize))

    def read(name: str) -> np.ndarray:
        array = arrays[name]
        if isinstance(array, jax.Array) and not (
            array.is_fully_addressable or array.is_fully_replicated
        ):
            return multihost_utils.process_allgather(array, tiled=True)
        return np.asarray(array)

    return specs, read


def mismatches(found: Mapping[str, Any], expected: Mapping[str, Any], left_over: str) -> list[str]:
    """Where named arrays, or what has their shape and dtype, differ; `left_over` is said of those not expected."""
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} {left_over}" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(found.keys() & expected.keys()):
        got, want = found[name], expected[name]
        if tuple(got.shape) != tuple(want.shape) or got.dtype != want.dtype:
            problems.append(
                f"{name} is {got.dtype}{list(got.shape)}, expected {want.dtype}{list(want.shape)}"
            )
    return problems
