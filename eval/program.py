"""The part that all evaluation programs share.

It has the options, and the way from a model to scores.

Each program first writes its predictions and then scores that file. Scoring again needs no model: a
predictions file may be given in place of one. Scores go to `--out NAME.json`, predictions to
NAME.predictions.jsonl beside it. Files of other settings are not replaced without `--overwrite`.
Of a program that ends early, what it has predicted so far is in NAME.predictions.jsonl.partial.

A program that is stopped by Ctrl-C ends with status 130, one that cannot work with status 1.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import jax
import tyro

import mammut
from mammut.config import AugmentConfig, MeshConfig
from mammut.core import distributed, sharding
from mammut.core.environment import require_device, set_arithmetic
from mammut.data.examples import Source
from mammut.data.processor import Processor
from mammut.data.sources import open_source
from mammut.data.video import VideoTransform
from mammut.evaluation.predictions import PREDICTIONS_SUFFIX, PartialFile, Predictions
from mammut.evaluation.predictor import Predictor, place_on_mesh
from mammut.evaluation.requirements import require_scorable
from mammut.evaluation.scores import Scores, require_same_result, save_scores
from mammut.evaluation.scoring import (
    EVALUATIONS,
    load_predictions,
    require_records,
    require_same_set,
    score,
)
from mammut.models.requirements import require_video
from mammut.models.video import count_left_out
from mammut.weights.files.tensor_file import SUFFIXES


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
    # CHECKPOINT/eval/PROGRAM_DATA_HASH.json, of a file FOLDER/eval/PROGRAM_FILE_DATA_HASH.json. The
    # hash stands for all options that change the result.
    out: pathlib.Path | None = None
    # Replace files of --out that hold the results of other options or of another model.
    overwrite: bool = False
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
    # Read the set as videos of so many frames. By default as the model was trained, if on videos;
    # a model of images then encodes frame by frame.
    frames: int | None = None
    # Put the frames of each video in a random order: a control that shows whether the model sees
    # motion.
    shuffle_frames: bool = False
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

    def check(self) -> None:
        """Checks the ranges of the options.

        Raises:
          ValueError: an option is out of its range.
        """
        for name in ("batch_size", "limit", "image_size", "threads", "frames"):
            require_range(self, name, 1)
        require_range(self, "max_bad_share", 0, 1)


# Options that do not change the result.
_SAME_RESULT = {
    "checkpoint",
    "out",
    "overwrite",
    "batch_size",
    "threads",
    "mesh",
    "max_bad_share",
}

# Options that name a set or a file.
_FILES = ("data", "shots_data", "classes", "tfds_dir")

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
    # What the terminal or the log cannot show is escaped: a name must not end hours of work.
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        distributed.require_one_process(program)
        options = tyro.cli(options_class, args=argv, prog=program, description=description)
        options.check()
        if options.out is not None and options.out.suffix != ".json":
            raise ValueError(f"--out is {options.out}, expected a name that ends in .json")
        set_arithmetic()
        require_device()
        path = pathlib.Path(os.path.expanduser(options.checkpoint))
        if path.is_file() and not path.name.endswith(SUFFIXES):
            return _score_again(options, path, task)
        return _evaluate(options, path, task, predict)
    except KeyboardInterrupt as stop:
        sentence = PartialFile.with_note(stop, "stopped by Ctrl-C, without scores")
        print(f"{program}: {sentence}", file=sys.stderr)
        sys.exit(130)
    except jax.errors.JaxRuntimeError as error:
        if os.environ.get("MAMMUT_TRACEBACK") or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sentence = (
            f"--batch-size {options.batch_size} needs more memory than the devices have: "
            f"{str(error).splitlines()[0]}"
        )
        sys.exit(f"{program}: {PartialFile.with_note(error, sentence)}")
    except (ValueError, OSError) as error:
        if os.environ.get("MAMMUT_TRACEBACK"):
            raise
        sys.exit(f"{program}: {PartialFile.with_note(error, str(error))}")


def require_range(options: Options, name: str, low: float, high: float = math.inf) -> None:
    """Checks that an option is a finite number from `low` to `high`, or None.

    Raises:
      ValueError: it is not.
    """
    value = getattr(options, name)
    # Every comparison with NaN is False.
    if value is None or (low <= value <= high and math.isfinite(value)):
        return
    expected = f"at least {low}"
    if high < math.inf:
        expected = f"a number from {low} to {high}"
    raise ValueError(f"--{name.replace('_', '-')} is {value}, expected {expected}")


def _score_again(options: Options, path: pathlib.Path, task: str) -> Scores:
    predictions = load_predictions(path, task)
    if options.data is not None:
        image_size = predictions.settings.get("image_size", 1)
        video = predictions.settings.get("frames") is not None
        require_same_set(predictions, _open_data(options, image_size, task, video))
    out = options.out or path.with_name(path.name.removesuffix(PREDICTIONS_SUFFIX) + ".json")
    if not options.overwrite:
        names = ("task", "data", "checkpoint", "settings")
        require_same_result(out, {name: getattr(predictions, name) for name in names})
    return _scored(predictions, out)


def _open_data(options: Options, image_size: int, task: str, video: bool) -> Source:
    field = EVALUATIONS[task].field
    settings = {"image_size": image_size, "tfds_dir": options.tfds_dir, "video": video}
    return open_source(options.data, field=field, **settings)


def _video_of(options: Options, processor: Processor) -> VideoTransform | None:
    """Says how the set is read as videos; None: as pictures."""
    video = processor.video
    if options.frames is not None:
        video = dataclasses.replace(video or VideoTransform(), frames=options.frames)
    if options.shuffle_frames:
        if video is None:
            raise ValueError("--shuffle-frames is given for pictures, expected --frames, too")
        video = dataclasses.replace(video, shuffled=True)
    return video


def _few_frames(vision: Any, frames: int) -> list[str]:
    """Says which tubes a model does not have in so few frames; a single one is an image."""
    left_out = count_left_out(vision, frames)
    if frames == 1 or not left_out:
        return []
    return [
        f"read as {frames} frames, too few for {left_out} of the {len(vision.video.tubes)} kinds "
        "of tubes, which have no token then: the model is made for "
        f"{vision.video.frames} (VideoConfig.frames)"
    ]


def _evaluate(
    options: AnyOptions, checkpoint: pathlib.Path, task: str, predict: Callable
) -> Scores:
    if options.data is None:
        raise ValueError(
            "--data is missing, expected what to evaluate on: jsonl:PATH, tfds:NAME/SPLIT, ..."
        )
    asked = _asked(options)
    out = options.out or _default_out(checkpoint, task, options)
    predictions_file = out.with_name(out.stem + PREDICTIONS_SUFFIX)
    if options.out is not None and not options.overwrite:
        result = {"task": task, "checkpoint": str(options.checkpoint), "options": asked}
        require_same_result(out, result)
        require_same_result(predictions_file, result)
    mesh = sharding.make_mesh(options.mesh)
    sharding.require_divisible(options.batch_size, mesh, "--batch-size")
    model, processor = mammut.load(checkpoint, mesh=mesh, image_size=options.image_size)
    processor.video = _video_of(options, processor)
    frames = 1 if processor.video is None else processor.video.frames
    require_video(model.config, frames, AugmentConfig(), given="an example of --frames")
    source = _open_data(options, processor.image.image_size, task, processor.video is not None)
    require_scorable(source, task, options.limit)
    # A folder that cannot be written is an error now, not after the model has run.
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out.parent):
        pass
    with jax.set_mesh(mesh), PartialFile(predictions_file) as partial:
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
            finished=partial.add,
        )
        predictions = predict(predictor, params, source, options)
        predictions.settings["options"] = asked
        if notes := _few_frames(model.config.vision, frames):
            predictions.settings["set_notes"] = predictions.settings.get("set_notes", []) + notes
        require_records(predictions)
        _save(predictions, predictions_file, partial.count)
    return _scored(load_predictions(predictions_file, task), out)


def _save(predictions: Predictions, path: pathlib.Path, kept: int = 0) -> None:
    """Writes the predictions, of which `kept` records are in the partial file."""
    try:
        predictions.save(path)
    except OSError as error:
        message = f"{path} cannot be written ({error.strerror})"
        if lost := len(predictions.records) - kept:
            message += f": the predictions for {lost} records are lost"
        raise OSError(message) from error
    print(f"predictions: {path}")


def _scored(predictions: Predictions, out: pathlib.Path) -> Scores:
    scores = score(predictions)
    try:
        save_scores(out, predictions, scores)
    except OSError as error:
        raise OSError(
            f"{out} cannot be written ({error.strerror}): the scores are lost, the predictions are "
            "there to be scored again"
        ) from error
    items = ", ".join(f"{count:,} {name}" for name, count in scores.items.items())
    print(f"{predictions.data}: {items}")
    for line in _lines(scores.metrics, scores.chance):
        print(f"  {line}")
    for note in scores.notes:
        print(f"  {note}")
    print(f"scores: {out}")
    return scores


def _lines(
    metrics: dict[str, Any], chance: dict[str, float] | None = None, most: int = 12
) -> list[str]:
    """Formats the metrics as lines of text, with the score of a random guess beside each.

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
            line = f"{key:<24} {value:.4f}"
            if chance and key in chance:
                line += f"  (chance {chance[key]:.4f})"
            lines.append(line)
        else:
            lines.append(f"{key:<24} {value}")
    return lines


def _asked(options: Options) -> dict[str, Any]:
    """Lists the options that change the result and are not at their defaults."""
    values = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name not in _SAME_RESULT and value != field.default:
            values[field.name] = value
    return json.loads(json.dumps(values, default=str))  # as the file has them


def _default_out(checkpoint: pathlib.Path, task: str, options: Options) -> pathlib.Path:
    """Returns the default file of the scores.

    Its name can be read, which loses letters: a hash tells sets and options apart.
    """
    asked = json.dumps(_asked(options), sort_keys=True)
    if checkpoint.is_dir():
        folder = checkpoint
        name = _name(options.data)
    else:
        # A folder holds one model. A model in a file may have others beside it.
        folder = checkpoint.parent
        name = f"{_name(checkpoint.name)}_{_name(options.data)}"
        asked += json.dumps(checkpoint.name)
    files = [getattr(options, name, None) for name in _FILES]
    if any(_is_relative(str(file)) for file in files if file is not None):
        asked += json.dumps(os.getcwd())  # the same name is another file in another directory
    number = hashlib.sha256(asked.encode()).hexdigest()[:8]
    return folder / "eval" / f"{task}_{name}_{number}{options.part}.json"


def _is_relative(spec: str) -> bool:
    """Whether a set or a file is looked for in the current directory."""
    kind, _, paths = spec.partition(":")
    if kind in ("synthetic", "tfds"):
        return False
    # A set of several files has commas between them.
    return not all(os.path.isabs(os.path.expanduser(path)) for path in (paths or kind).split(","))


def _name(text: str) -> str:
    """Turns a spec into a part of a file name.

    It keeps the last letters and digits of any script, 60 bytes at most.
    """
    letters = re.sub(r"[\W_]+", "_", text).strip("_")
    return letters.encode()[-60:].decode(errors="ignore").strip("_")
