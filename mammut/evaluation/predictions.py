"""Predictions files: a model's output for a set, as JSON lines.

A file is scored without the model (docs/formats.md). Its first line describes the rest:

    {"format": "mammut predictions", "version": 1, "task": "caption", "records": 1000, "data":
     "jsonl:...", "checkpoint": "runs/flickr8k", "settings": {...}, "left_out": {"corrupt": 2}}

The records follow. `mammut.evaluation.scoring` has the table of tasks and what their records must
hold. In full they are (`index` is the example's position in the source, `key` its name there):

    caption    key, index, prediction, logprob, references [text]
    vqa        id, key, index, question, prediction, logprob, answers [text], answer_type,
               question_type
    classify   key, index, label, ranked [class, best first], scores [float]
    retrieval  query "image" or "text", id (of the query), relevant [id], ranked [id, best first],
               scores [float], rank (of the first relevant id among all candidates, from 1); an
               image query has key and index, a text query its text. Ids count images and texts
               from 0. reranked [id, best first] and reranked_scores, if candidates
               were scored again by caption likelihood

While a model is asked, the records that are finished are in NAME.predictions.jsonl.partial, without
a first line and in any order (`PartialFile`).

A record of caption or vqa whose prompt did not fit the model's context has too_long and the empty
prediction. With examples shown first (`shots` in the settings), the prediction ends at a line break
or the next example, and the logprob counts all generated tokens.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
from typing import Any, Literal

from mammut.core.fields import Count, require_fields
from mammut.core.files import replacing_file

PREDICTIONS_SUFFIX = ".predictions.jsonl"  # end of the name of a predictions file
_FORMAT = "mammut predictions"
_VERSION = 1
# What describes the predictions, in their file and in the file of their scores.
ABOUT = {
    "task": str,
    "data": str,
    "checkpoint": str,
    "settings": dict,
    "left_out": dict[str, Count],
}
_HEADER = {"format": Literal[_FORMAT], "version": Literal[_VERSION], "records": Count} | ABOUT


# A lone surrogate, as of a path that is not UTF-8, is written as JSON spells it.
_ENCODING = {"encoding": "utf-8", "errors": "backslashreplace"}


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The output of a model for one set.

    Raises:
      ValueError: there are no records, or a number in them is not finite.
    """

    task: str  # a name of the table in `mammut.evaluation.scoring`
    records: list[dict[str, Any]]
    data: str  # the spec of the source
    checkpoint: str  # the folder of the model
    # how the model was asked: beams, templates, ...
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    # the number of examples that could not be used, by cause
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        _check_records(self.records, f"predictions for {self.data!r}")

    def save(self, path: str | os.PathLike) -> None:
        """Writes the file, whole or not at all."""
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "task": self.task,
            "records": len(self.records),
        }
        for name in ("data", "checkpoint", "settings", "left_out"):
            header[name] = getattr(self, name)
        with replacing_file(path) as new, new.open("w", **_ENCODING) as file:
            for value in (header, *self.records):
                file.write(_line(value))

    @classmethod
    def load(cls, path: str | os.PathLike, task: str | None = None) -> "Predictions":
        """Reads what `save` wrote.

        `scoring.load_predictions` also checks the records against their task.

        Raises:
          ValueError: the file is missing, cut short, damaged or not of `task`.
        """
        path = pathlib.Path(path)
        no_file = f"{path} is not a predictions file of this library"
        try:
            lines = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
        except (OSError, ValueError) as error:
            raise ValueError(f"{no_file}: {error}") from error
        values = []
        for number, line in enumerate(lines, 1):
            try:
                values.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{no_file}: line {number} is not JSON ({error})") from error
        header, *records = values
        is_header = isinstance(header, dict) and header.get("format") == _FORMAT
        if not is_header or header.get("version") != _VERSION:
            raise ValueError(f"{no_file}, version {_VERSION}")
        require_fields(header, _HEADER, f"{path}, line 1")
        if task is not None and header["task"] != task:
            raise ValueError(
                f"{path} holds predictions of task {header['task']!r}, expected {task!r}"
            )
        if len(records) != header["records"]:
            raise ValueError(
                f"{path} has {len(records)} records, its first line promises {header['records']}"
            )
        _check_records(records, str(path), in_file=True)
        return cls(records=records, **{name: header[name] for name in ABOUT})


class PartialFile:
    """Records of an evaluation that goes on, in a file beside its predictions file.

    A context: at its end the file is removed. After an error the file stays, and a note of the
    error says where (`with_note`). The next evaluation overwrites it.

    Attributes:
      count: how many records the file has.
    """

    _NOTE = "the predictions so far, "

    def __init__(self, predictions_file: pathlib.Path):
        self.count = 0
        self._path = predictions_file.with_name(predictions_file.name + ".partial")
        self._file = None
        self._is_full = False

    def __enter__(self) -> "PartialFile":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk
                self._file.close()
        if error is None:
            self._path.unlink(missing_ok=True)
        elif self.count:
            error.add_note(f"{self._NOTE}{self.count} records, are in {self._path}")

    def add(self, record: dict[str, Any]) -> None:
        """Writes a record, so that it outlives this process."""
        _require_finite(record, f"{self._path}, record {self.count}")
        if self._is_full:
            return
        try:
            if self._file is None:
                self._file = self._path.open("w", **_ENCODING, buffering=1)  # line by line
            self._file.write(_line(record))
            self.count += 1
        except OSError:  # such as of a full disk: it may have room again at the end
            self._is_full = True

    @classmethod
    def with_note(cls, error: BaseException, sentence: str) -> str:
        """Adds to a sentence where the predictions are that were made before the error."""
        notes = [note for note in getattr(error, "__notes__", []) if note.startswith(cls._NOTE)]
        return "; ".join([sentence, *notes])


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def record_place(where: str, number: int, in_file: bool) -> str:
    """Names a record in errors; in a file by its line, too."""
    return (
        f"{where}, line {number + 2}, record {number}" if in_file else f"{where}, record {number}"
    )


def _check_records(records: list[Any], where: str, in_file: bool = False) -> None:
    if not records:
        raise ValueError(f"{where} holds no records, expected at least one")
    for number, record in enumerate(records):
        place = record_place(where, number, in_file)
        if not isinstance(record, dict):
            raise ValueError(f"{place} is no object: {record!r:.60}")
        _require_finite(record, place)


def _require_finite(record: dict[str, Any], place: str) -> None:
    for name in ("logprob", "scores", "reranked_scores"):
        values = record.get(name, 0)
        if not isinstance(values, list):
            values = [values]
        if any(isinstance(value, float) and not math.isfinite(value) for value in values):
            raise ValueError(f"{place} has a {name} that is not finite: the model has diverged")
