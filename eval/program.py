"""The part that all evaluation programs share.

It has the options, and the way from a model to scores.

Each program first writes its predictions and then scores that file. Scoring again needs no model: a
predictions file may be given in place of one. Scores go to `--out NAME.json`, predictions to
NAME.predictions.jsonl beside it.
"""

import dataclasses
import os
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import jax
import tyro

import mammut
from mammut.config import MeshConfig
from mammut.core import distributed, sharding
from mammut.core.environment import require_device, set_arithmetic
from mammut.data.examples import Source
from mammut.data.sources import open_source
from mammut.evaluation.predictions import Predictions
from mammut.evaluation.predictor import Predictor, place_on_mesh
from mammut.evaluation.scores import Scores, save_scores
from mammut.evaluation.scoring import (
    EVALUATIONS,
    load_predictions,
    require_records,
    require_same_set,
    score,
)

_SUFFIX = ".predictions.jsonl"
_MODEL_FILES = (".npz", ".safetensors", ".safetensors.index.json", ".pt", ".pth", ".bin", ".ckpt")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every evaluation program."""

    # Whatever mammut.load reads: a model folder or run, a folder or file of open_clip, an .npz of
    # big_vision; or a predictions file, to be scored again.
    checkpoint: Annotated[str, tyro.conf.Positional]
    # Set to evaluate on: jsonl:PATH, tfds:NAME/SPLIT, coco:..., vqav2:..., each with an optional
    # [a:b].
    data: str | None = None
    # File of the scores; the predictions go beside it. By default
    # CHECKPOINT/eval/PROGRAM_DATA.json, of a file FOLDER/eval/PROGRAM_FILE_DATA.json.
    out: pathlib.Path | None = None
    # Number of examples at a time, over all devices.
    batch_size: int = 64
    # Number of examples, from the first on. By default all.
    limit: int | None = None
    # Side of the images in pixels. By default the model's own; for another one its position
    # embeddings are resampled.
    image_size: int | None = None
    # Threads that decode and resize images.
    threads: int = 4
    # Largest share of examples that may be unusable.
    max_bad_share: float = 0.1
    # The data_dir of tensorflow-datasets.
    tfds_dir: str | None = None
    # Make every image black, to measure how well the model does with the text alone.
    blind: bool = False
    # Devices along the axes of the mesh.
    mesh: MeshConfig = MeshConfig()

    @property
    def part(self) -> str:
        """The name of the part of the set and of the settings.

        It becomes a part of the scores' file name; it is "" by default.
        """
        return f"_first_{self.limit}" if self.limit else ""


AnyOptions = TypeVar("AnyOptions", bound=Options)


def run(
    argv: list[str],
    options_class: type[AnyOptions],
    task: str,
    predict: Callable[[Predictor, Any, Source, AnyOptions], Predictions],
    description: str,
) -> Scores:
    """Runs a program: predicts, scores, prints and writes.

    The predictions of the model go to a file. The scores of this file are printed and written.

    Errors end the program in one sentence; if MAMMUT_TRACEBACK is set they are raised.

    Args:
      argv: the command line.
      options_class: the dataclass of its options.
      task: a name of `mammut.evaluation.scoring.EVALUATIONS`.
      predict: makes the predictions, given a predictor, parameters, a source and the options.
      description: the text of `--help`.
    """
    program = f"python -m eval.{task}"
    try:
        distributed.require_one_process(program)
        options = tyro.cli(options_class, args=argv, prog=program, description=description)
        set_arithmetic()
        require_device()
        path = pathlib.Path(os.path.expanduser(options.checkpoint))
        if path.is_file() and not path.name.endswith(_MODEL_FILES):
            return _score_again(options, path, task)
        return _evaluate(options, path, task, predict)
    except (ValueError, OSError) as error:
        if os.environ.get("MAMMUT_TRACEBACK"):
            raise
        sys.exit(f"{program}: {error}")


def _score_again(options: Options, path: pathlib.Path, task: str) -> Scores:
    predictions = load_predictions(path, task)
    if options.data is not None:
        image_size = predictions.settings["image_size"]
        require_same_set(predictions, _open_data(options, image_size, task))
    out = options.out or path.with_name(path.name.removesuffix(_SUFFIX) + ".json")
    return _scored(predictions, out)


def _open_data(options: Options, image_size: int, task: str) -> Source:
    field = EVALUATIONS[task].field
    settings = {"image_size": image_size, "tfds_dir": options.tfds_dir}
    return open_source(options.data, field=field, **settings)


def _evaluate(
    options: AnyOptions, checkpoint: pathlib.Path, task: str, predict: Callable
) -> Scores:
    for name in ("batch_size", "limit", "threads"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected at least 1")
    if options.data is None:
        raise ValueError(
            "--data is missing, expected what to evaluate on: jsonl:PATH, tfds:NAME/SPLIT, ..."
        )
    out = options.out or _default_out(checkpoint, task, options)
    if out.suffix != ".json":
        raise ValueError(f"--out is {out}, expected a name that ends in .json")
    mesh = sharding.make_mesh(options.mesh)
    sharding.require_divisible(options.batch_size, mesh, "--batch-size")
    model, processor = mammut.load(checkpoint, mesh=mesh, image_size=options.image_size)
    source = _open_data(options, processor.image.image_size, task)
    # A folder that cannot be written is an error now, not after the model has run.
    out.parent.mkdir(parents=True, exist_ok=True)
    with jax.set_mesh(mesh):
        model_of, params = place_on_mesh(model, mesh)
        predictor = Predictor(
            model_of,
            processor,
            mesh,
            checkpoint=str(options.checkpoint),
            batch_size=options.batch_size,
            threads=options.threads,
            max_bad_share=options.max_bad_share,
            blind=options.blind,
            progress=True,
        )
        predictions = predict(predictor, params, source, options)
    require_records(predictions)
    path = out.with_name(out.stem + _SUFFIX)
    predictions.save(path)
    print(f"predictions: {path}")
    return _scored(load_predictions(path, task), out)


def _scored(predictions: Predictions, out: pathlib.Path) -> Scores:
    scores = score(predictions)
    save_scores(out, predictions, scores)
    items = ", ".join(f"{count:,} {name}" for name, count in scores.items.items())
    print(f"{predictions.data}: {items}")
    for line in _lines(scores.metrics):
        print(f"  {line}")
    for note in scores.notes:
        print(f"  {note}")
    print(f"scores: {out}")
    return scores


def _lines(metrics: dict[str, Any], most: int = 12) -> list[str]:
    """Formats the metrics as lines of text.

    A long dict by class or type is cut after its first entries.
    """
    lines = []
    for key, value in metrics.items():
        if isinstance(value, dict):
            title = key
            if len(value) > most:
                title += f" (the first {most} of {len(value)})"
            lines.append(title)
            lines += [f"  {line}" for line in _lines(dict(list(value.items())[:most]))]
        elif isinstance(value, float):
            lines.append(f"{key:<24} {value:.4f}")
        else:
            lines.append(f"{key:<24} {value}")
    return lines


def _default_out(checkpoint: pathlib.Path, task: str, options: Options) -> pathlib.Path:
    """Returns the default file of the scores.

    It is named after the set and the part of it that is used.
    """
    name = _name(options.data) + options.part
    # A folder holds one model. A model in a file may have others beside it: its name is needed.
    if checkpoint.is_dir():
        return checkpoint / "eval" / f"{task}_{name}.json"
    return checkpoint.parent / "eval" / f"{task}_{_name(checkpoint.name)}_{name}.json"


def _name(data: str) -> str:
    """Turns a spec into a part of a file name.

    It keeps the last letters and digits.
    """
    return re.sub(r"[^A-Za-z0-9]+", "_", data).strip("_")[-60:]
