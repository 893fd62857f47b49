"""Scores of a set of predictions, and their file (docs/formats.md)."""

import dataclasses
import json
import os
import pathlib
import reprlib
from collections.abc import Mapping
from typing import Any, NotRequired

from mammut.core.fields import Count, require_fields
from mammut.core.files import replacing_file
from mammut.evaluation.predictions import ABOUT, PREDICTIONS_SUFFIX, Predictions

_SCORES = (
    ABOUT
    | {"metrics": dict, "notes": list[str], "items": dict[str, Count]}
    | {"chance": NotRequired[dict[str, float]]}
)


@dataclasses.dataclass(frozen=True)
class Scores:
    """The metrics of one predictions file; shares are 0 to 1."""

    metrics: dict[str, Any]  # numbers, or dicts of numbers: by answer type, by class
    notes: list[str]  # how the metrics were computed, and which of them were left out
    # the scores of a random guess, by the names of metrics
    chance: dict[str, float] = dataclasses.field(default_factory=dict, kw_only=True)
    items: dict[str, int]  # the numbers of items that were scored: {"images": 1000, "texts": 5000}


def save_scores(path: str | os.PathLike, predictions: Predictions, scores: Scores) -> None:
    """Writes scores as JSON, whole or not at all.

    The file also describes the predictions that were scored.
    """
    values = {name: getattr(predictions, name) for name in ABOUT} | dataclasses.asdict(scores)
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    with replacing_file(pathlib.Path(path)) as new:
        # A lone surrogate, as of a path that is not UTF-8, is written as JSON spells it.
        new.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def load_scores(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a file of scores: what describes the predictions, metrics, notes and items.

    Raises:
      ValueError: the file is missing or damaged, or a field is of another type.
    """
    try:
        values = json.loads(
            pathlib.Path(path).read_text(encoding="utf-8-sig"), parse_constant=_no_number
        )
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a score file of this library: {error}") from error
    require_fields(values, _SCORES, str(path))
    _require_numbers(values["metrics"], f"{path}, metrics")
    return values


def require_same_result(path: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Checks that a file to be written does not replace another result.

    Args:
      path: the file of scores or predictions; it need not exist.
      result: what has to be equal in the file: names of `ABOUT`, and "options" of its settings.

    Raises:
      ValueError: the file is there and holds something else.
    """
    if not path.exists():
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.name.endswith(PREDICTIONS_SUFFIX):
            text = text.partition("\n")[0]
        there = json.loads(text)
        there["options"] = there["settings"].get("options")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        there = {}
    changed = [
        f"its {name} is {reprlib.repr(there.get(name))}, not {reprlib.repr(value)}"
        for name, value in result.items()
        if there.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{path} holds another result ({'; '.join(changed)}): give another --out, or "
            "--overwrite"
        )


def _require_numbers(metrics: Mapping[str, Any], where: str) -> None:
    """Checks that metrics are finite numbers, or objects of such numbers."""
    for name, value in metrics.items():
        if isinstance(value, dict):
            _require_numbers(value, f"{where}, {name}")
        elif value is not None:
            require_fields(metrics, {name: float}, where)


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")
