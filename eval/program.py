"""What the evaluation programs share: their options, and the way from a model to predictions to scores.

Each writes its predictions first and then scores the file, so that scoring again needs no model: a
predictions file takes the place of the model. Scores go to `--out NAME.json`, the predictions to
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
from mammut.data.config import Field
from mammut.data.examples import Source
from mammut.data.sources import open_source
from mammut.evaluation.predictions import Predictions, Task
from mammut.evaluation.predictor import Predictor, place
from mammut.evaluation.scoring import Scores, require_same_set, save_scores, score

_SUFFIX = ".predictions.jsonl"
_MODEL_FILES = ".npz", ".safetensors", ".safetensors.index.json", ".pt", ".pth", ".bin", ".ckpt"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every evaluation program."""

    # Whatever mammut.load reads: a model folder or run, a folder or file of open_clip, an .npz of
    # big_vision; or a predictions file, to be scored again.
    checkpoint: Annotated[str, tyro.conf.Positional]
    # What to evaluate on: jsonl:PATH, tfds:NAME/SPLIT, coco:..., vqav2:..., each with an optional
    # [a:b].
    data: str | None = None
    # Where the scores go; the predictions go beside them. By default
    # CHECKPOINT/eval/PROGRAM_DATA.json, of a file FOLDER/eval/PROGRAM_FILE_DATA.json.
    out: pathlib.Path | None = None
    batch_size: int = 64  # examples at a time, over all devices
    limit: int | None = None  # only the first so many examples
    image_size: int | None = None  # pixels, if not the model's own: its positions are resampled
    threads: int = 4  # decode and resize in so many threads
    max_bad_share: float = 0.1  # more examples that cannot be used are an error
    tfds_dir: str | None = None  # tensorflow-datasets' data_dir
    blind: bool = False  # every image is black: what can be said from the text alone
    mesh: MeshConfig = MeshConfig()

    @property
    def part(self) -> str:
        """What of the set is asked and how, as part of the scores' file name; empty: all of it, as always."""
        return f"_first_{self.limit}" if self.limit else ""


AnyOptions = TypeVar("AnyOptions", bound=Options)


def run(
    argv: list[str],
    options_class: type[AnyOptions],
    task: Task,
    field: Field,
    predict: Callable[[Predictor, Any, Source, AnyOptions], Predictions],
    description: str,
) -> Scores:
    """Runs a program: predictions of a model written to a file, that file scored, the scores printed and written.

    Errors end the program in one sentence; with MAMMUT_TRACEBACK set they are raised.
    """
    program = f"python -m eval.{task}"
    try:
        distributed.require_one_process(program)
        options = tyro.cli(options_class, args=argv, prog=program, description=description)
        given = pathlib.Path(options.checkpoint).expanduser()
        if given.is_file() and not given.name.endswith(_MODEL_FILES):
            return _score_again(options, given, task, field)
        return _evaluate(options, given, task, field, predict)
    except (ValueError, OSError) as error:
        if os.environ.get("MAMMUT_TRACEBACK"):
            raise
        sys.exit(f"{program}: {error}")


def _score_again(options: Options, path: pathlib.Path, task: Task, field: Field) -> Scores:
    predictions = Predictions.load(path, task)
    if options.data is not None:
        image_size = predictions.settings["image_size"]
        source = open_source(
            options.data, image_size=image_size, tfds_dir=options.tfds_dir, field=field
        )
        require_same_set(predictions, source)
    return _scored(
        predictions, path, options.out or path.with_name(path.name.removesuffix(_SUFFIX) + ".json")
    )


def _evaluate(
    options: AnyOptions, checkpoint: pathlib.Path, task: Task, field: Field, predict: Callable
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
    source = open_source(
        options.data, image_size=processor.image.image_size, tfds_dir=options.tfds_dir, field=field
    )
    # what cannot be written is found out before the model is asked
    out.parent.mkdir(parents=True, exist_ok=True)
    with jax.set_mesh(mesh):
        model_of, params = place(model, mesh)
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
    path = out.with_name(out.stem + _SUFFIX)
    predictions.save(path)
    print(f"predictions: {path}")
    return _scored(Predictions.load(path, task), path, out)


def _scored(predictions: Predictions, path: pathlib.Path, out: pathlib.Path) -> Scores:
    scores = score(predictions)
    save_scores(out, predictions, scores)
    print(
        f"{predictions.data}: {', '.join(f'{count:,} {name}' for name, count in scores.items.items())}"
    )
    for line in _lines(scores.metrics):
        print(f"  {line}")
    for note in scores.notes:
        print(f"  {note}")
    print(f"scores: {out}")
    return scores


def _lines(metrics: dict[str, Any], most: int = 12) -> list[str]:
    """The metrics as lines of text; of a long dict by class or type, the first."""
    lines = []
    for key, value in metrics.items():
        if isinstance(value, dict):
            lines.append(
                f"{key}" + (f" (the first {most} of {len(value)})" if len(value) > most else "")
            )
            lines += [f"  {line}" for line in _lines(dict(list(value.items())[:most]))]
        else:
            lines.append(
                f"{key:<24} {value:.4f}" if isinstance(value, float) else f"{key:<24} {value}"
            )
    return lines


def _default_out(checkpoint: pathlib.Path, task: Task, options: Options) -> pathlib.Path:
    """A folder holds one model; of a file, its name tells it from the others beside it. A part of a set is named."""
    name = _name(options.data) + options.part
    if checkpoint.is_dir():
        return checkpoint / "eval" / f"{task}_{name}.json"
    return checkpoint.parent / "eval" / f"{task}_{_name(checkpoint.name)}_{name}.json"


def _name(data: str) -> str:
    """A spec as part of a file name: its last letters and digits."""
    return re.sub(r"[^A-Za-z0-9]+", "_", data).strip("_")[-60:]
