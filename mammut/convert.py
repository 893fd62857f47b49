"""Converts a model from one format to another.

Tensors are read and written one at a time, so a large model needs little memory.

    python -m mammut.convert SRC DST --to mammut|open_clip [--dtype float32|bfloat16] [--overwrite]

SRC is whatever `mammut.load` reads. DST is a folder: a model folder of mammut, or one that
open_clip loads ("local-dir:DST"). A model that open_clip's format cannot express is refused,
and the error names the fields that stand in the way.
"""

import argparse
import dataclasses
import math
import pathlib
import sys

import numpy as np

from mammut.weights.files.tensor_file import TensorSpec
from mammut.weights.formats import open_clip_export
from mammut.weights.model_folder import open_model, save_opened
from mammut.weights.opened import LazyTensors, OpenedModel, model_specs, rounded


@dataclasses.dataclass(frozen=True)
class Converted:
    """The result of a conversion: what was written."""

    tensors: int  # how many were written
    nbytes: int  # their size
    parameters: int  # how many numbers the source model has
    notes: tuple[str, ...]  # sentences about things that only one of the two formats has


def convert(
    source: pathlib.Path,
    target: pathlib.Path,
    to: str,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Converted:
    """Reads `source` and writes `target`, with a progress bar on a terminal.

    Args:
      source: whatever `mammut.load` reads.
      target: the folder to write.
      to: the format of the target, "mammut" or "open_clip".
      dtype: the type of the parameters written, "float32" or "bfloat16". None: the type of the
        source as mammut reads it.
      overwrite: whether a model that is in `target` is replaced.

    Raises:
      ValueError: the source cannot be read, the target holds something else, or its format cannot
        express the model.
    """
    from tqdm import tqdm

    opened = open_model(source)
    if dtype is not None:
        opened = stored_as(opened, dtype)
    specs = opened.tensors.specs.values()
    total = sum(spec.nbytes for spec in specs)
    write = save_opened if to == "mammut" else open_clip_export.save
    sizes: list[int] = []
    with tqdm(total=total, unit="B", unit_scale=True, desc=str(target), disable=None) as bar:

        def progress(nbytes: int) -> None:
            sizes.append(nbytes)
            bar.update(nbytes)

        notes = write(target, opened, overwrite=overwrite, progress=progress)
    parameters = sum(math.prod(spec.shape) for spec in specs)
    return Converted(len(sizes), sum(sizes), parameters, (*opened.notes, *notes))


def stored_as(opened: OpenedModel, dtype: str) -> OpenedModel:
    """Gives the model with its parameters in another type.

    Parameters that are always float32 keep their type.
    """
    compute = dataclasses.replace(opened.compute, param_dtype=dtype, text_param_dtype=None)
    types = {name: spec.dtype for name, spec in model_specs(opened.config, compute).items()}
    specs = {
        name: TensorSpec(spec.shape, types[name]) for name, spec in opened.tensors.specs.items()
    }

    def read(name: str) -> np.ndarray:
        return rounded(opened.tensors.read(name), specs[name].dtype, f"{opened.where}: {name}")

    tensors = LazyTensors(specs, read)
    return dataclasses.replace(opened, compute=compute, tensors=tensors)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mammut.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=pathlib.Path, metavar="SRC")
    parser.add_argument("target", type=pathlib.Path, metavar="DST")
    parser.add_argument("--to", choices=["mammut", "open_clip"], required=True)
    dtype_help = "the type of what is written; default: as it is read, float32 for foreign files"
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help=dtype_help)
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args(argv)
    try:
        done = convert(
            args.source, args.target, args.to, dtype=args.dtype, overwrite=args.overwrite
        )
    except (ValueError, OSError) as error:
        sys.exit(f"convert: {error}")
    except KeyboardInterrupt:
        print("convert: Ctrl-C: nothing is converted", file=sys.stderr)
        sys.exit(130)
    for note in done.notes:
        print(note)
    print(
        f"{args.target}: {done.tensors} tensors, {done.nbytes:,} bytes, "
        f"of a model of {done.parameters:,} parameters"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
