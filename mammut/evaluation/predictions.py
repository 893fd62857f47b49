"""Predictions files: what a model said of a set, one JSON object a line, scored without the model.

The first line says what the rest is:

    {"format": "mammut predictions", "version": 1, "task": "caption", "records": 1000, "data":
     "jsonl:...", "checkpoint": "runs/flickr8k", "settings": {...}, "left_out": {"corrupt": 2}}

then there are as many records. Those of each task (`index` is the example's place in the source,
`key` its name there):

    caption    key, index, prediction, logprob, references [text]
    vqa        id, key, index, question, prediction, logprob, answers [text], answer_type, question_type
    classify   key, index, label, ranked [class, best first], scores [float]
    retrieval  query "image" or "text", id (of the query), relevant [id], ranked [id, best first], scores [float];
               an image query has key and index, a text query its text. Ids count images and texts
               from 0. reranked [id, best first] and reranked_scores, where candidates were scored
               again by caption likelihood

A record of caption or vqa whose prompt did not fit the model's context has too_long and the empty
prediction. After examples (`shots` in the settings), the prediction ends at a line break or the
next example, and the logprob is that of all that was generated.
"""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any, Literal

from mammut.core.files import replacing_file

Task = Literal["caption", "vqa", "classify", "retrieval"]

_FORMAT = "mammut predictions"
_VERSION = 1
_FIELDS = {
    "caption": {"key": str, "index": int, "prediction": str, "references": list},
    "vqa": {
        "id": str,
        "key": str,
        "index": int,
        "question": str,
        "prediction": str,
        "answers": list,
    },
    "classify": {"key": str, "index": int, "label": str, "ranked": list},
    "retrieval": {"query": str, "id": int, "relevant": list, "ranked": list},
}
_IDENTITY = {
    "caption": ("key",),
    "vqa": ("id",),
    "classify": ("key",),
    "retrieval": ("query", "id"),
}


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a model said of one set."""

    task: Task
    records: list[dict[str, Any]]
    data: str  # the spec of the source
    checkpoint: str  # the folder of the model
    # how it was asked: beams, templates, ...
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    # examples that could not be used, by cause
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        _check(self.task, self.records, f"predictions for {self.data!r}")

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
        header |= {
            name: getattr(self, name) for name in ("data", "checkpoint", "settings", "left_out")
        }
        with replacing_file(path) as new, new.open("w", encoding="utf-8") as file:
            for value in (header, *self.records):
                file.write(json.dumps(value, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike, task: Task | None = None) -> "Predictions":
        """Reads what `save` wrote.

        Raises:
          ValueError: the file is missing, cut short, damaged, not of `task`, or has a record twice.
        """
        path = pathlib.Path(path)
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
            header, *records = (json.loads(line) for line in lines if line)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path} is not a predictions file of this library: {error}"
            ) from error
        if (
            not isinstance(header, dict)
            or header.get("format") != _FORMAT
            or header.get("version") != _VERSION
        ):
            raise ValueError(
                f"{path} is not a predictions file of this library, version {_VERSION}"
            )
        if task is not None and header["task"] != task:
            raise ValueError(
                f"{path} holds predictions of task {header['task']!r}, expected {task!r}"
            )
        if len(records) != header["records"]:
            raise ValueError(
                f"{path} has {len(records)} records, its first line promises {header['records']}"
            )
        _check(header["task"], records, str(path))
        names = ("task", "data", "checkpoint", "settings", "left_out")
        return cls(records=records, **{name: header[name] for name in names})


def _check(task: str, records: list[Any], where: str) -> None:
    if task not in _FIELDS:
        raise ValueError(f"{where} is of task {task!r}, expected one of {', '.join(_FIELDS)}")
    if not records:
        raise ValueError(f"{where} holds no records, expected at least one")
    seen = {}
    for number, record in enumerate(records):
        for name, kind in _FIELDS[task].items():
            if not isinstance(record, dict) or not isinstance(record.get(name), kind):
                raise ValueError(
                    f"{where}, record {number} has no {name!r} of type {kind.__name__}"
                )
        identity = tuple(record[name] for name in _IDENTITY[task])
        if identity in seen:
            name = " ".join(map(str, identity))
            raise ValueError(
                f"{where} has {name!r} twice, in records {seen[identity]} and {number}: expected it once"
            )
        seen[identity] = number
        for name in ("logprob", "scores", "reranked_scores"):
            values = record.get(name, 0)
            if not all(map(math.isfinite, values if isinstance(values, list) else [values])):
                raise ValueError(
                    f"{where}, record {number} has a {name} that is not finite: the model has diverged"
                )
