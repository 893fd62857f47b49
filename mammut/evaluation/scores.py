"""Scores of a set of predictions, and their file."""

import dataclasses
import json
import os
import pathlib
from typing import Any

from mammut.core.files import replacing_file
from mammut.evaluation.predictions import Predictions


@dataclasses.dataclass(frozen=True)
class Scores:
    """The metrics of one predictions file; shares are 0 to 1."""

    metrics: dict[str, Any]  # numbers, or dicts of numbers: by answer type, by class
    notes: list[str]  # how the metrics were computed, and which of them were left out
    items: dict[str, int]  # the numbers of items that were scored: {"images": 1000, "texts": 5000}


def save_scores(path: str | os.PathLike, predictions: Predictions, scores: Scores) -> None:
    """Writes scores as JSON, whole or not at all.

    The file also describes the predictions that were scored.
    """
    path = pathlib.Path(path)
    names = ("task", "data", "checkpoint", "settings", "left_out")
    values = {name: getattr(predictions, name) for name in names}
    values |= dataclasses.asdict(scores)
    with replacing_file(path) as new:
        new.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
