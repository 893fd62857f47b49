"""The report: one HTML page of a run or a predictions file.

It shows scores, curves, pictures and predictions.

The page is a single file that loads nothing: its pictures are inside it, it has no script, and its
content security policy forbids both. Texts from outside are escaped. Where a picture or the model
is missing, the page says so and shows the rest.
"""

import collections
import datetime
import importlib.resources
import json
import os
import pathlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mammut.core.files import replacing_file
from mammut.core.version import VERSION
from mammut.evaluation.metrics.vqa import exact_match
from mammut.evaluation.predictions import PREDICTIONS_SUFFIX, Predictions
from mammut.evaluation.scoring import EVALUATIONS, load_predictions
from mammut.models.flops import num_params
from mammut.models.mammut import ModelConfig
from mammut.pages.report_pictures import Album, Pictures, folder_config
from mammut.pages.report_scores import MAX_ROWS, read_scores, read_training
from mammut.training.config import TrainConfig
from mammut.training.run_folder import read_run
from mammut.weights.formats.mammut_run import RUN_FILE

_TOP = 5  # of a ranking
_MAX_TEXT = 400  # characters of a text
# Marks that reorder the text around them.
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def write_report(
    target: str | os.PathLike, out: str | os.PathLike | None = None, *, items: int = 12
) -> pathlib.Path:
    """Writes the report and returns its path.

    The page of a run shows its curves and every `RUN/eval/NAME.predictions.jsonl`, with the scores
    in `NAME.json` beside it. Its pictures take at most 2.2 MB; those beyond are left out, and the
    page says so.

    Args:
      target: the run, a folder with run.json, or the predictions file.
      out: the page; by default RUN/report.html, or NAME.report.html beside NAME.predictions.jsonl.
      items: how many queries each way, captions, questions and classified pictures of each
        predictions file are shown at most.

    Raises:
      ValueError: `target` is neither or cannot be read, or `items` is not positive.
    """
    if items < 1:
        raise ValueError(f"items is {items}, expected at least 1 of each kind to show")
    target = pathlib.Path(target)
    if (target / RUN_FILE).is_file():
        page = _of_run(target, items)
        default = target / "report.html"
    elif target.is_file():
        page = _of_predictions(target, items)
        default = target.with_name(f"{_name(target)}.report.html")
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
    """Makes the values for the page of a run."""
    config, overrides = read_run(run)
    notices = []
    files = {}
    for path in sorted(run.glob(f"eval/*{PREDICTIONS_SUFFIX}")):
        try:
            files[path] = load_predictions(path)
        except ValueError as error:
            notices.append(f"{error}.")
    others = [
        path
        for path in sorted(run.glob("eval/*.json"))
        if path.with_suffix(PREDICTIONS_SUFFIX) not in files
    ]

    optimizer = config.optimizer
    facts = _model_facts(config.model) | {
        "computed in": config.compute.dtype,
        "training": f"{config.task}, {config.steps:,} steps of {config.data.batch_size:,} "
        f"examples, {optimizer.name} at {optimizer.learning_rate:g}",
        "data": config.data.train,
    }
    if overrides:
        facts["overrides"] = " ".join(map(str, overrides))
    page = _page(run.resolve().name, facts, notices, files, others, items, run)
    return page | read_training(run / "metrics.jsonl")


def _of_predictions(path: pathlib.Path, items: int) -> dict[str, Any]:
    """Makes the values for the page of a single predictions file."""
    predictions = load_predictions(path)
    facts = {}
    notices = []
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
    files: Mapping[pathlib.Path, Predictions],
    others: Sequence[pathlib.Path],
    items: int,
    run: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Makes the values of the template.

    `others` are score files without predictions.
    """
    album = Album()
    tasks = list(EVALUATIONS)
    order = sorted(files, key=lambda path: (tasks.index(files[path].task), path))
    sections = [_section(path, files[path], album, items, run) for path in order]
    score_files = [path.with_name(f"{_name(path)}.json") for path in order]
    scores = [read_scores(path) for path in [*score_files, *others]]
    if album.left_out:
        notices.append(f"{album.left_out} pictures are left out, to keep the page below 3 MB.")
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {
        "title": title,
        "facts": facts | {"written": f"{now} by mammut {VERSION}"},
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
    """Makes the part of the page for one predictions file."""
    folder = pathlib.Path(predictions.checkpoint)
    if run is not None and not folder.is_dir():  # the run was moved, and its predictions with it
        folder = run
    pictures = Pictures(predictions, folder, album)
    # An evaluation without a row in the table is shown by its scores alone.
    title, show = _SHOWN.get(predictions.task, (predictions.task, None))
    shown = show(predictions.records, pictures, items) if show else {}
    facts = {"data": predictions.data, "model": predictions.checkpoint, "file": path.name}
    if predictions.settings:
        facts["settings"] = ", ".join(
            f"{name} {_setting(value)}" for name, value in predictions.settings.items()
        )
    if predictions.left_out:
        facts["left out"] = ", ".join(
            f"{count} {cause}" for cause, count in predictions.left_out.items()
        )
    if pictures.has_videos:
        facts["videos"] = "frames of each, evenly spaced, the first on the left"
    return {
        "title": f"{title}: {_name(path)}",
        "task": predictions.task,
        "videos": pictures.has_videos,
        "facts": facts,
        "notices": pictures.notices,
        **shown,
    }


def _model_facts(config: ModelConfig) -> dict[str, str]:
    """Describes the model in a few lines."""
    vision = config.vision
    text = config.text
    if config.num_prefix_tokens:
        image = f"an image is {config.num_prefix_tokens} positions before the text"
    else:
        image = f"cross-attention after every {text.cross_attn_every} layers"
    return {
        "model": f"{num_params(config)['total']:,} parameters",
        "image": f"{vision.image_size} pixels; {vision.summary}",
        "text": f"up to {config.text_length} tokens of {text.vocab_size:,}; "
        f"width {text.width}, depth {text.depth}, {text.num_heads} heads, {image}",
    }


# The examples of each task


def _captions(records: list[dict[str, Any]], pictures: Pictures, items: int) -> dict[str, Any]:
    shown = [record | {"picture": pictures.thumbnail(record)} for record in records[:items]]
    for item, words in zip(shown, pictures.word_maps(records[:items])):
        item["words"] = words
    return {"shown": shown, "total": len(records)}


def _questions(records: list[dict[str, Any]], pictures: Pictures, items: int) -> dict[str, Any]:
    """Shows questions; a prediction is right where it equals an answer.

    A question whose answers are kept back is neither right nor wrong.
    """
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
    return {"shown": shown, "total": len(known), "hits": sum(known), "by_type": rows[:MAX_ROWS]}


def _classes(records: list[dict[str, Any]], pictures: Pictures, items: int) -> dict[str, Any]:
    right = [record["ranked"][:1] == [record["label"]] for record in records]
    sizes = collections.Counter(record["label"] for record in records)
    wrong = [record for record, hit in zip(records, right) if record["ranked"] and not hit]
    pairs = collections.Counter((record["label"], record["ranked"][0]) for record in wrong)
    confused = [
        (label, predicted, count, sizes[label])
        for (label, predicted), count in pairs.most_common(items)
    ]
    shown = []
    for row in _mix(right, items):
        record = records[row]
        top = _ranking(record["ranked"], record.get("scores"), [record["label"]])
        scores = [entry["score"] or 0 for entry in top]
        # Log-probabilities are below 0: their bars start at the least that is shown.
        low = min([0, *scores])
        extent = max(scores, default=0) - low or 1
        for entry, score in zip(top, scores):
            entry["bar"] = round(100 * (score - low) / extent)
        picture = pictures.thumbnail(record)
        shown.append(
            {"picture": picture, "label": record["label"], "hit": right[row], "ranked": top}
        )
    return {"shown": shown, "total": len(records), "hits": sum(right), "confused": confused}


def _retrieval(records: list[dict[str, Any]], pictures: Pictures, items: int) -> dict[str, Any]:
    """Shows queries both ways.

    A query is a hit if one of the first results shown is right.
    """
    by_id = {
        kind: {r["id"]: r for r in records if r["query"] == kind} for kind in ("text", "image")
    }
    ways = []
    for kind, other in (("text", "image"), ("image", "text")):
        queries = list(by_id[kind].values())
        if not queries:
            continue
        hits = [_rank(query["ranked"][:_TOP], query["relevant"]) is not None for query in queries]
        shown = []
        for row in _mix(hits, items):
            query = queries[row]
            lines = _retrieval_lines(query, other, by_id[other], pictures)
            shown.append(
                _retrieval_item(kind, query["id"], by_id[kind], pictures) | {"lines": lines}
            )
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


def _retrieval_lines(
    query: dict[str, Any], other: str, results: dict[Any, dict[str, Any]], pictures: Pictures
) -> list[dict[str, Any]]:
    """Lists the rankings of a query.

    The first is by embedding; the second, where it was made, is by likelihood.
    """
    relevant = query["relevant"]

    def line(title: str, ranked: list, scores: list | None) -> dict[str, Any]:
        rank = _rank(ranked, relevant)
        top = [
            entry | _retrieval_item(other, entry["name"], results, pictures)
            for entry in _ranking(ranked, scores, relevant)
        ]
        # The right result is shown beside the first results where it is not among them.
        missed = []
        if rank is None:
            missed = relevant[:1]
        elif rank > _TOP:
            missed = [ranked[rank - 1]]
        right = [_retrieval_item(other, name, results, pictures) for name in missed]
        return {"title": title, "top": top, "rank": rank, "depth": len(ranked), "right": right}

    lines = [line("By embedding", query["ranked"], query.get("scores"))]
    if again := query.get("reranked"):
        lines.append(line("Scored again by likelihood", again, query.get("reranked_scores")))
    return lines


def _retrieval_item(
    kind: str, name: Any, records: dict[Any, dict[str, Any]], pictures: Pictures
) -> dict[str, Any]:
    """Finds the text or image of an id.

    For an id that was no query only the number is known.
    """
    record = records.get(name, {})
    if kind == "text":
        return {"text": record.get("text", f"text {name}")}
    return {"key": record.get("key", f"image {name}"), "picture": pictures.thumbnail(record)}


# For each evaluation: the title of its section, and the function that makes the section.
_SHOWN = {
    "retrieval": ("Retrieval", _retrieval),
    "caption": ("Captions", _captions),
    "vqa": ("Questions", _questions),
    "classify": ("Classification", _classes),
}


def _rank(ranked: Sequence[Any], relevant: Sequence[Any]) -> int | None:
    """Finds the rank of the first right result, from 1.

    It is None where there is none.
    """
    return next((rank for rank, name in enumerate(ranked, 1) if name in relevant), None)


def _ranking(
    ranked: Sequence[Any], scores: Sequence[float] | None, relevant: Sequence[Any]
) -> list[dict[str, Any]]:
    """Lists the first results of a ranking.

    Each has `name`, `score` (None where there is none) and `hit`.
    """
    scores = [*(scores or []), *[None] * _TOP]
    return [
        {"name": name, "score": score, "hit": name in relevant}
        for name, score in zip(ranked[:_TOP], scores)
    ]


def _mix(hits: Sequence[bool | None], items: int) -> list[int]:
    """Draws rows at random, half hits and half misses.

    The seed is 0. Where there are too few of one kind, more of the other kind are drawn. Rows keep
    the order of the file.
    """
    order = np.random.default_rng(0).permutation(len(hits)).tolist()
    good = [row for row in order if hits[row]]
    bad = [row for row in order if not hits[row]]
    good = good[: max(items - items // 2, items - len(bad))]
    return sorted(good + bad[: items - len(good)])


# The page


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
    """Replaces characters that a page cannot show by U+FFFD.

    These are control characters, lone surrogates and marks that reorder text.
    """
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
    """Returns the name of a predictions file without its endings."""
    return path.name.removesuffix(PREDICTIONS_SUFFIX).removesuffix(".jsonl")
