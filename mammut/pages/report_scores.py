"""The numbers of a report: tables of scores, and training curves.

They come from score files and from a run's metrics.jsonl.
"""

import collections
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mammut.pages.report_pictures import curves

MAX_ROWS = 40  # of a table

# A metric that is a share by its name.
_SHARE = re.compile(r"(^|_)(r\d+|top\d+|acc|accuracy|recall|exact|share)($|_)")
_WORDS = {
    "t2i": "text to image",
    "i2t": "image to text",
    "cider": "CIDEr",
    "vqa": "VQA",
    "acc": "accuracy",
    "medr": "median rank",
    "meanr": "mean rank",
}
_LOSSES = {
    "total": "train/loss",
    "contrastive": "train/loss_contrastive",
    "caption": "train/loss_caption",
}

# The steps of a metric and its values.
Series = tuple[list[int], list[float]]


def read_scores(path: pathlib.Path) -> dict[str, Any] | None:
    """Reads a score file as `title`, `tables` and `notices`.

    Returns None where there is no file.
    """
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text("utf-8"))
        tables = score_tables(values["metrics"] | {"chance": values.get("chance") or {}})
        notices = [str(note) for note in values.get("notes", [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        tables = []
        notices = [f"{path.name} is not a score file: {error!r}."]
    return {"title": path.stem, "tables": tables, "notices": notices}


def score_tables(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Metrics as tables: the plain numbers first, then each object of numbers.

    A table has at most 40 rows: `title`, `columns`, `rows` of texts, and how many are `left_out`.
    """
    objects = {name: value for name, value in metrics.items() if isinstance(value, Mapping)}
    numbers = {name: value for name, value in metrics.items() if name not in objects}
    tables = []
    for title, group in ({"": numbers} | objects).items():
        table = _table(title, group)
        if table["rows"]:
            tables.append(table)
    return tables


def _table(title: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """Makes one table of scores.

    It has a row for each object in `group`, or else a row for each number.
    """
    inner = {name: value for name, value in group.items() if isinstance(value, Mapping)}
    columns = list(dict.fromkeys(key for value in inner.values() for key in value))
    if columns:
        rows = [
            (name, *(_number((title, key), value.get(key)) for key in columns))
            for name, value in inner.items()
        ]
    else:
        rows = []
        for name, value in group.items():
            label = name if title else _label(name)
            rows.append((label, _number((title, name), value)))
    return {
        "title": _label(title),
        "columns": [_label(key) for key in columns] or ["value"],
        "rows": rows[:MAX_ROWS],
        "left_out": max(0, len(rows) - MAX_ROWS),
    }


def _label(name: str) -> str:
    """Puts the name of a metric in words.

    "t2i_r1" becomes "text to image R@1".
    """
    words = (_WORDS.get(word, re.sub(r"^r(\d+)$", r"R@\1", word)) for word in name.split("_"))
    return " ".join(words)


def _number(path: Sequence[str], value: Any) -> str:
    """Formats a score as text.

    A metric that is a share by its name is given in percent.
    """
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if any(_SHARE.search(name) for name in path) and 0 <= value <= 1:
        return f"{value:.1%}"
    return f"{value:,.3f}"


def read_training(path: pathlib.Path) -> dict[str, Any]:
    """Reads metrics.jsonl.

    It returns the `curves` as pictures, and the `last` evaluation of each set.
    """
    series = _read_series(path)
    groups = {
        "Losses": {name: series[key] for name, key in _LOSSES.items() if key in series},
        "Learning rate": {key: series[key] for key in ("train/learning_rate",) if key in series},
        "Gradient norm": {key: series[key] for key in ("train/grad_norm",) if key in series},
    }
    last: dict[str, dict[str, Any]] = {}
    for key, (steps, values) in series.items():
        kind, _, rest = key.partition("/")
        name, _, metric = rest.rpartition("/")
        if kind != "eval":
            continue
        kind = "shares" if _SHARE.search(metric) else "scores"
        groups.setdefault(f"Evaluation, {name}: {kind}", {})[_label(metric)] = (steps, values)
        last.setdefault(f"{name}, step {steps[-1]:,}", {})[metric] = values[-1]
    return {
        "curves": [_chart(title, group) for title, group in groups.items() if group],
        "last": {name: score_tables(metrics)[0] for name, metrics in last.items()},
    }


def _read_series(path: pathlib.Path) -> dict[str, Series]:
    """Reads every metric of the file; none where there is no file."""
    series: dict[str, Series] = collections.defaultdict(lambda: ([], []))
    if not path.is_file():
        return series
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
            step = int(values.pop("step"))
            numbers = {
                name: math.nan if value is None else float(value) for name, value in values.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            continue  # cut short by a kill
        for name, value in numbers.items():
            series[name][0].append(step)
            series[name][1].append(value)
    return series


def _chart(title: str, group: Mapping[str, Series]) -> dict[str, str]:
    """Draws some curves in one picture.

    Their last values are also given in words, for readers who cannot see the picture.
    """
    picture = curves(group, share=title.endswith(": shares"))
    ends = (
        f"{name} {values[0]:.4g} to {values[-1]:.4g}, steps {steps[0]:,} to {steps[-1]:,}"
        for name, (steps, values) in group.items()
    )
    return {"title": title, "picture": picture, "alt": f"{title}: {'; '.join(ends)}"}
