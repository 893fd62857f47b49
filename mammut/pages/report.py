"""One HTML page of a run or of a predictions file: scores, curves, and pictures with what the model said of them.

The page is a single file that loads nothing: its pictures are inside it, it has no script, and its
content security policy forbids both. What it quotes is escaped. Where a picture or the model is
gone it says so and shows the rest.
"""

import collections
import datetime
import importlib.metadata
import importlib.resources
import json
import os
import pathlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mammut.core.files import replacing_file
from mammut.evaluation.metrics.vqa import exact_match
from mammut.evaluation.predictions import Predictions
from mammut.models.flops import num_params
from mammut.models.mammut import ModelConfig
from mammut.pages.report_pictures import Album, Pictures, curves, folder_config
from mammut.training.config import TrainConfig
from mammut.training.run_folder import read_run

_SUFFIX = ".predictions.jsonl"
_TITLES = {
    "retrieval": "Retrieval",
    "caption": "Captions",
    "vqa": "Questions",
    "classify": "Classification",
}
_TOP = 5  # of a ranking
_MAX_TEXT = 400  # characters of a text
_MAX_ROWS = 40  # of a table
# of the text around them
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# a metric that is a share by name
_SHARE = re.compile(r"(^|_)(r\d+|top\d+|acc|accuracy|recall|exact|share)($|_)")


def write_report(
    target: str | os.PathLike, out: str | os.PathLike | None = None, *, items: int = 12
) -> pathlib.Path:
    """Writes the page of a run (a folder with run.json) or of a predictions file, and returns its path.

    The page of a run shows its curves and every `RUN/eval/NAME.predictions.jsonl`, with the scores
    in `NAME.json` beside it. Its pictures take at most 2.2 MB; those beyond are left out, and the
    page says so.

    Args:
      target: the run or the predictions file.
      out: the page; by default RUN/report.html, or NAME.report.html beside NAME.predictions.jsonl.
      items: at most so many queries each way, captions, questions and classified pictures of each
        predictions file.

    Raises:
      ValueError: `target` is neither or cannot be read, or `items` is not positive.
    """
    if items < 1:
        raise ValueError(f"items is {items}, expected at least 1 of each kind to show")
    target = pathlib.Path(target)
    if (target / "run.json").is_file():
        page, default = _of_run(target, items), target / "report.html"
    elif target.is_file():
        page, default = (
            _of_predictions(target, items),
            target.with_name(f"{_name(target)}.report.html"),
        )
    else:
        raise ValueError(
            f"{target} is neither a run, a folder with run.json, nor a predictions file"
        )
    out = default if out is None else pathlib.Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(out) as new:
        new.write_text(_render(page), encoding="utf-8")
    return out


def _of_run(run: pathlib.Path, items: int) -> dict[str, Any]:
    config, overrides = read_run(run)
    notices, found = [], {}
    for path in sorted(run.glob(f"eval/*{_SUFFIX}")):
        try:
            found[path] = Predictions.load(path)
        except ValueError as error:
            notices.append(f"{error}.")
    others = [
        path for path in sorted(run.glob("eval/*.json")) if path.with_suffix(_SUFFIX) not in found
    ]
    facts = _model_facts(config.model) | {
        "training": f"{config.task}, {config.steps:,} steps of {config.data.batch_size:,} examples, "
        f"{config.optimizer.name} at {config.optimizer.learning_rate:g}",
        "data": config.data.train,
    }
    if overrides:
        facts["overrides"] = " ".join(map(str, overrides))
    return _page(run.resolve().name, facts, notices, found, others, items, run) | _training(
        run / "metrics.jsonl"
    )


def _of_predictions(path: pathlib.Path, items: int) -> dict[str, Any]:
    predictions, facts, notices = Predictions.load(path), {}, []
    try:
        config = folder_config(pathlib.Path(predictions.checkpoint))
        facts = _model_facts(config.model if isinstance(config, TrainConfig) else config)
    except ValueError as error:
        notices.append(f"The model cannot be described: {error}.")
    return _page(path.name, facts, notices, {path: predictions}, [], items)


def _page(
    title: str,
    facts: dict[str, str],
    notices: list[str],
    found: Mapping[pathlib.Path, Predictions],
    others: Sequence[pathlib.Path],
    items: int,
    run: pathlib.Path | None = None,
) -> dict[str, Any]:
    """What the template shows; `others` are score files without predictions."""
    album = Album()
    order = sorted(found, key=lambda path: (list(_TITLES).index(found[path].task), path))
    sections = [_section(path, found[path], album, items, run) for path in order]
    scores = [_scores(path.with_name(f"{_name(path)}.json")) for path in order] + [
        _scores(path) for path in others
    ]
    if album.left_out:
        notices.append(f"{album.left_out} pictures are left out, to keep the page below 3 MB.")
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {
        "title": title,
        "facts": facts | {"written": f"{now} by mammut {_version()}"},
        "notices": notices,
        "scores": [score for score in scores if score is not None],
        "last": {},
        "curves": [],
        "sections": sections,
        "top": _TOP,
    }


def _section(
    path: pathlib.Path, predictions: Predictions, album: Album, items: int, run: pathlib.Path | None
) -> dict[str, Any]:
    """The part of the page that shows one predictions file."""
    folder = pathlib.Path(predictions.checkpoint)
    if run is not None and not folder.is_dir():  # the run was moved, and its predictions with it
        folder = run
    pictures = Pictures(predictions, folder, album)
    show = {"caption": _captions, "vqa": _questions, "classify": _classes, "retrieval": _retrieval}[
        predictions.task
    ]
    shown = show(predictions.records, pictures, items)
    facts = {"data": predictions.data, "model": predictions.checkpoint, "file": path.name}
    if predictions.settings:
        facts["settings"] = ", ".join(
            f"{name} {_setting(value)}" for name, value in predictions.settings.items()
        )
    if predictions.left_out:
        facts["left out"] = ", ".join(
            f"{count} {cause}" for cause, count in predictions.left_out.items()
        )
    title = f"{_TITLES[predictions.task]}: {_name(path)}"
    return {
        "title": title,
        "task": predictions.task,
        "facts": facts,
        "notices": pictures.notices,
        **shown,
    }


# Scores and curves
# -----------------------------------------------------------------------------------------------


def _scores(path: pathlib.Path) -> dict[str, Any] | None:
    """The metrics in a score file as tables: the numbers, then each object of numbers; None without such a file."""
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text("utf-8"))
        tables, notes = _tables(values["metrics"]), [str(note) for note in values.get("notes", [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        tables, notes = [], [f"{path.name} is not a score file: {error!r}."]
    return {"title": path.stem, "tables": tables, "notices": notes}


def _tables(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tables of at most 40 rows: `title`, `columns`, `rows` of texts, and how many rows are `left_out`."""
    groups = {name: value for name, value in metrics.items() if isinstance(value, Mapping)}
    groups = {"": {name: value for name, value in metrics.items() if name not in groups}} | groups
    tables = []
    for title, group in groups.items():
        columns = list(
            dict.fromkeys(
                key for value in group.values() if isinstance(value, Mapping) for key in value
            )
        )
        if columns:
            rows = [
                (name, *(_number((title, key), value.get(key)) for key in columns))
                for name, value in group.items()
                if isinstance(value, Mapping)
            ]
        else:
            rows = [
                (name if title else _label(name), _number((title, name), value))
                for name, value in group.items()
            ]
        if rows:
            columns = [_label(key) for key in columns] or ["value"]
            left_out = max(0, len(rows) - _MAX_ROWS)
            tables.append(
                {
                    "title": _label(title),
                    "columns": columns,
                    "rows": rows[:_MAX_ROWS],
                    "left_out": left_out,
                }
            )
    return tables


def _label(name: str) -> str:
    words = {
        "t2i": "text to image",
        "i2t": "image to text",
        "cider": "CIDEr",
        "vqa": "VQA",
        "acc": "accuracy",
    }
    return " ".join(words.get(word, re.sub(r"^r(\d+)$", r"R@\1", word)) for word in name.split("_"))


def _number(path: Sequence[str], value: Any) -> str:
    """A score as it is read: a share in percent where its name says that it is one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if any(_SHARE.search(name) for name in path) and 0 <= value <= 1 and isinstance(value, float):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def _training(path: pathlib.Path) -> dict[str, Any]:
    """The curves in metrics.jsonl, and the last evaluation of each set."""
    series: dict[str, tuple[list, list]] = collections.defaultdict(lambda: ([], []))
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            values = json.loads(line)
            step = int(values.pop("step"))
            numbers = {name: float(value) for name, value in values.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # cut short by a kill
        for name, value in numbers.items():
            series[name][0].append(step)
            series[name][1].append(value)
    losses = {
        "total": "train/loss",
        "contrastive": "train/loss_contrastive",
        "caption": "train/loss_caption",
    }
    groups = {
        "Losses": {name: series[key] for name, key in losses.items() if key in series},
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
    charts = []
    for title, group in groups.items():
        if group:
            uri = curves(group, share=title.endswith(": shares"))
            ends = (
                f"{name} {y[0]:.4g} to {y[-1]:.4g}, steps {x[0]:,} to {x[-1]:,}"
                for name, (x, y) in group.items()
            )
            charts.append({"title": title, "picture": uri, "alt": f"{title}: {'; '.join(ends)}"})
    return {"curves": charts, "last": {name: _tables(metrics)[0] for name, metrics in last.items()}}


def _model_facts(config: ModelConfig) -> dict[str, str]:
    vision, text = config.vision, config.text
    return {
        "model": f"{num_params(config)['total']:,} parameters, {config.dtype}",
        "image": f"{vision.image_size} pixels; {vision.summary}",
        "text": f"up to {config.text_length} tokens of {text.vocab_size:,}; "
        f"width {text.width}, depth {text.depth}, {text.num_heads} heads, "
        + (
            f"an image is {config.num_prefix_tokens} positions before the text"
            if config.num_prefix_tokens
            else f"cross-attention after every {text.cross_attn_every} layers"
        ),
    }


# What each task shows
# --------------------------------------------------------------------------------------------


def _captions(records: list[dict[str, Any]], pictures: Pictures, items: int) -> dict[str, Any]:
    shown = [record | {"picture": pictures.thumbnail(record)} for record in records[:items]]
    for item, words in zip(shown, pictures.word_maps(records[:items])):
        item["words"] = words
    return {"shown": shown, "total": len(records)}


def _questions(records: list[dict[str, Any]], pictures: Pictures, items: int) -> dict[str, Any]:
    """Right is what equals an answer; a question whose answers are kept back is neither right nor wrong."""
    right = [exact_match(r["prediction"], r["answers"]) if r["answers"] else None for r in records]
    by_type = collections.defaultdict(list)
    for record, hit in zip(records, right):
        if hit is not None:
            by_type[str(record.get("answer_type") or "all")].append(hit)
    shown = []
    for row in _mix(right, items):
        record = records[row]
        counts = collections.Counter(record["answers"]).most_common()
        answers = [f"{text} ({count})" if count > 1 else text for text, count in counts]
        shown.append(
            record | {"picture": pictures.thumbnail(record), "answers": answers, "hit": right[row]}
        )
    rows = [(name, len(hits), sum(hits) / len(hits)) for name, hits in sorted(by_type.items())]
    known = [hit for hit in right if hit is not None]
    return {"shown": shown, "total": len(known), "hits": sum(known), "by_type": rows[:_MAX_ROWS]}


def _classes(records: list[dict[str, Any]], pictures: Pictures, items: int) -> dict[str, Any]:
    right = [record["ranked"][:1] == [record["label"]] for record in records]
    sizes = collections.Counter(record["label"] for record in records)
    wrong = [record for record, hit in zip(records, right) if record["ranked"] and not hit]
    pairs = collections.Counter((record["label"], record["ranked"][0]) for record in wrong)
    confused = [
        (label, said, count, sizes[label]) for (label, said), count in pairs.most_common(items)
    ]
    shown = []
    for row in _mix(right, items):
        record = records[row]
        top = _ranking(record["ranked"], record.get("scores"), [record["label"]])
        scores = [entry["score"] or 0 for entry in top]
        low = min(0, *scores)  # log-probabilities are below 0: their bars start at the least shown
        for entry, score in zip(top, scores):
            entry["bar"] = round(100 * (score - low) / ((max(scores) - low) or 1))
        picture = pictures.thumbnail(record)
        shown.append(
            {"picture": picture, "label": record["label"], "hit": right[row], "ranked": top}
        )
    return {"shown": shown, "total": len(records), "hits": sum(right), "confused": confused}


def _retrieval(records: list[dict[str, Any]], pictures: Pictures, items: int) -> dict[str, Any]:
    """Queries both ways; a hit has a right one among the first shown."""
    of_kind = {
        kind: {r["id"]: r for r in records if r["query"] == kind} for kind in ("text", "image")
    }

    def found(kind: str, name: Any) -> dict[str, Any]:
        """What an id stands for. One that was no query is known by its number alone."""
        record = of_kind[kind].get(name, {})
        if kind == "text":
            return {"text": record.get("text", f"text {name}")}
        return {"key": record.get("key", f"image {name}"), "picture": pictures.thumbnail(record)}

    def line(
        title: str, other: str, ranked: list, scores: list | None, relevant: list
    ) -> dict[str, Any]:
        rank = _rank(ranked, relevant)
        top = [entry | found(other, entry["name"]) for entry in _ranking(ranked, scores, relevant)]
        missed = relevant[:1] if rank is None else [ranked[rank - 1]] if rank > _TOP else []
        right = [found(other, name) for name in missed]
        return {"title": title, "top": top, "rank": rank, "depth": len(ranked), "right": right}

    ways = []
    for kind, other in (("text", "image"), ("image", "text")):
        queries = list(of_kind[kind].values())
        hits = [_rank(query["ranked"][:_TOP], query["relevant"]) is not None for query in queries]
        shown = []
        for row in _mix(hits, items):
            query = queries[row]
            relevant, again = query["relevant"], query.get("reranked")
            lines = [line("By embedding", other, query["ranked"], query.get("scores"), relevant)]
            if again:
                lines.append(
                    line(
                        "Scored again by likelihood",
                        other,
                        again,
                        query.get("reranked_scores"),
                        relevant,
                    )
                )
            shown.append(found(kind, query["id"]) | {"lines": lines})
        if queries:
            ways.append(
                {
                    "query": kind,
                    "other": other,
                    "shown": shown,
                    "total": len(queries),
                    "hits": sum(hits),
                }
            )
    return {"ways": ways}


def _rank(ranked: Sequence[Any], relevant: Sequence[Any]) -> int | None:
    return next((rank for rank, name in enumerate(ranked, 1) if name in relevant), None)


def _ranking(
    ranked: Sequence[Any], scores: Sequence[float] | None, relevant: Sequence[Any]
) -> list[dict[str, Any]]:
    """The first of a ranking: `name`, `score` (None where there is none), `hit`."""
    scores = [*(scores or []), *[None] * _TOP]
    return [
        {"name": name, "score": score, "hit": name in relevant}
        for name, score in zip(ranked[:_TOP], scores)
    ]


def _mix(hits: Sequence[bool | None], items: int) -> list[int]:
    """Rows drawn at random with seed 0, half hits and half misses as far as there are, in the order of the file."""
    order = np.random.default_rng(0).permutation(len(hits)).tolist()
    good, bad = [row for row in order if hits[row]], [row for row in order if not hits[row]]
    good = good[: max(items - items // 2, items - len(bad))]
    return sorted(good + bad[: items - len(good)])


# The page
# --------------------------------------------------------------------------------------------------------


def _render(page: dict[str, Any]) -> str:
    import jinja2

    template = (
        importlib.resources.files("mammut.pages").joinpath("report.html.jinja").read_text("utf-8")
    )
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_visible,
    )
    environment.filters["clip"] = _clip
    return environment.from_string(template).render(page)


def _visible(value: Any) -> Any:
    """Text with U+FFFD for what a page cannot hold or show: control characters, lone surrogates, reordering marks."""
    if not isinstance(value, str):
        return value
    bad = {
        char
        for char in set(value)
        if unicodedata.category(char) in ("Cc", "Cs") or char in _REORDERING
    }
    return value.translate(dict.fromkeys(map(ord, bad - {"\n", "\t"}), "\ufffd"))


def _setting(value: Any) -> str:
    many = isinstance(value, list) and len(value) > 4
    return f"{len(value)} values" if many else json.dumps(value, ensure_ascii=False)


def _clip(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} …"


def _name(path: pathlib.Path) -> str:
    """What a predictions file is called without its endings."""
    return path.name.removesuffix(_SUFFIX).removesuffix(".jsonl")


def _version() -> str:
    try:
        return importlib.metadata.version("mammut")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "of a checkout"
