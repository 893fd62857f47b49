"""An opened model: its config, its tensors and their checks.

The tensors have names. The checks make sure that config and tensors fit together.
"""

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
from mammut.core.params import by_name
from mammut.data.processor import Processor
from mammut.models.compute import ComputeConfig
from mammut.models.mammut import MaMMUT, ModelConfig
from mammut.weights.files.tensor_file import CheckpointError, TensorSpec
from mammut.weights.old_configs import upgraded


@runtime_checkable
class Tensors(Protocol):
    """Named arrays that are read one by one.

    A `mammut.weights.files.tensor_file.TensorFile` is one, and so is the result of a table.
    """

    specs: Mapping[str, TensorSpec]
    read: Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class LazyTensors:
    """`Tensors` that a function reads."""

    specs: Mapping[str, TensorSpec]
    read: Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model whose files are opened and checked.

    Its parameters are read one by one, later.

    Attributes:
      config: the architecture.
      tensors: the parameters, by path such as "text.layers.attn.query.kernel".
      processor: makes images and texts for it. None: the files have none.
      where: the file or folder, for errors.
      parts: the parts that the files hold. For an image encoder alone this is ("vision",), and the
        rest of `config` means nothing.
      positions: the way in which the makers of the model resample its position grid.
      notes: sentences on parts of the files that our model lacks, on parts of our model that the
        files lack, and on the reasons.
      compute: the default way of computing the model; its number types are those of `tensors`.

    Raises:
      CheckpointError: the processor makes other images or texts than the config's model takes.
        Every difference is named.
    """

    config: ModelConfig
    tensors: Tensors
    processor: Processor | None
    where: str
    parts: tuple[str, ...] = ("vision", "text", "rest")
    positions: Literal["bicubic", "bilinear"] = "bicubic"
    notes: tuple[str, ...] = ()
    compute: ComputeConfig = ComputeConfig()

    def __post_init__(self):
        if self.processor is None:
            return
        vision = self.config.vision
        text = self.config.text
        problems = []

        ids = self.processor.vocab_size
        if ids > text.vocab_size:
            problems.append(
                f"the tokenizer has {ids} ids, too many for a vocab_size of {text.vocab_size}"
            )
        pixels = self.processor.image.image_size
        if pixels != vision.image_size:
            problems.append(
                f"images of {pixels} pixels, expected an image_size of {vision.image_size}"
            )
        length = self.processor.max_length
        room = self.config.text_length
        if length > room or (length < room and text.whole_length):
            problems.append(f"texts of {length} tokens, expected a max_length of {room}")

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
    """Checks that a model may be written to `folder`.

    Nothing is written before the check.

    Args:
      folder: the folder to write to; it need not exist.
      opened: the model to write.
      files: the files that would be written, or removed as parts of an older model.
      foreign: files of folders of another kind, which are never overwritten.
      overwrite: whether `files` may be replaced.

    Raises:
      ValueError: `opened` is a part of a model or is read from `folder` itself, or a file is in the
        way.
    """
    if set(opened.parts) != {"vision", "text", "rest"}:
        raise ValueError(
            f"{opened.where} holds {' and '.join(opened.parts)} alone, expected a whole model"
        )
    if opened.processor is None:
        raise ValueError(f"{opened.where} has no processor, which a model folder needs")
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected a folder to write to")
    foreign_there = [name for name in foreign if os.path.exists(folder / name)]
    if foreign_there:
        raise ValueError(
            f"{folder} holds {foreign_there[0]} of a folder of another kind: give a new folder"
        )
    files_there = [name for name in files if os.path.exists(folder / name)]
    if files_there and not overwrite:
        raise ValueError(
            f"{folder} holds {files_there[0]} already: give a new folder, or overwrite=True"
        )
    if overwrite and os.path.exists(opened.where) and folder.is_dir():
        source = opened.where
        if not os.path.isdir(source):
            source = os.path.dirname(source) or "."
        if os.path.samefile(source, folder):
            raise ValueError(f"{folder} is where {opened.where} is read from: give a new folder")


def model_specs(
    config: ModelConfig, compute: ComputeConfig = ComputeConfig()
) -> dict[str, TensorSpec]:
    """Lists shape and type of every parameter of a `MaMMUT`.

    They are named by path.

    A path is a name such as "text.layers.attn.query.kernel".
    """

    def make() -> MaMMUT:
        return MaMMUT(config, compute=compute, rngs=nnx.Rngs(0))

    state = nnx.state(nnx.eval_shape(make), nnx.Param)
    return {
        name: TensorSpec(leaf.shape, np.dtype(leaf.dtype))
        for name, leaf in by_name(nnx.to_pure_dict(state)).items()
    }


def rounded(array: np.ndarray, dtype: np.dtype, where: str) -> np.ndarray:
    """Rounds floats to another type; `where` names file and key in errors.

    Raises:
      CheckpointError: a finite number is too large for the type.
    """
    if float(ml_dtypes.finfo(array.dtype).max) <= float(ml_dtypes.finfo(dtype).max):
        return array.astype(dtype, copy=False)
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    if (np.isinf(narrow) & ~np.isinf(array)).any():
        raise CheckpointError(f"{where} holds finite numbers that are too large for {dtype}")
    return narrow


def read_config(cls: type, values: Any, path: pathlib.Path) -> Any:
    """Reads a config of type `cls` from a file's values.

    The file is `path`.

    Raises:
      CheckpointError: there are no values, or they belong to another type of config.
    """
    try:
        return from_dict(cls, values, str(path))
    except (ValueError, TypeError) as error:  # an unknown field, or a value that is not allowed
        raise CheckpointError(f"{path} does not hold a {cls.__name__}: {error}") from error


def read_model(
    values: Any, path: pathlib.Path
) -> tuple[ModelConfig, ComputeConfig, tuple[str, ...]]:
    """Reads the configs of a model in the file `path`.

    The values are {"model": ..., "compute": ...}, in the fields of any version.

    The third value names the towers ("vision", "text") whose layer norms have no bias in the file:
    it is zero.

    Raises:
      CheckpointError: the values are none of a model.
    """
    new = upgraded({name: values[name] for name in ("model", "compute") if name in values})
    config = read_config(ModelConfig, new.config.get("model"), path)
    compute = read_config(ComputeConfig, new.config.get("compute", {}), path)
    return config, compute, new.without_norm_bias


def host_tensors(
    arrays: Mapping[str, Any],
) -> tuple[dict[str, TensorSpec], Callable[[str], np.ndarray]]:
    """Lists the specs of arrays by name.

    Returns also a function that brings one array to the host.

    `mammut.weights.files.tensor_file` writes them with these two. Of several processes, each has to
    bring every array, in the order of the specs, which is the order in which they are written.
    """
    specs = {name: TensorSpec(array.shape, np.dtype(array.dtype)) for name, array in arrays.items()}
    specs = dict(sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize))

    def read(name: str) -> np.ndarray:
        array = arrays[name]
        if not isinstance(array, jax.Array):
            return np.asarray(array)
        if array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array)
        return multihost_utils.process_allgather(array, tiled=True)

    return specs, read


def mismatches(found: Mapping[str, Any], expected: Mapping[str, Any], left_over: str) -> list[str]:
    """Compares named arrays, or specs, with the expected ones.

    Args:
      found: the arrays in the file; anything with a shape and a dtype.
      expected: the arrays that there should be.
      left_over: the words behind the name of an array that is not expected.

    Returns:
      The differences, a sentence each.
    """
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} {left_over}" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(found.keys() & expected.keys()):
        got = found[name]
        want = expected[name]
        if tuple(got.shape) != tuple(want.shape) or got.dtype != want.dtype:
            problems.append(
                f"{name} is {got.dtype}{list(got.shape)}, expected {want.dtype}{list(want.shape)}"
            )
    return problems
