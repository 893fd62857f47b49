"""Scores of predictions files, without a model: the functions behind every program of `eval/` and training's own."""

import dataclasses
import json
import os
import pathlib
from typing import Any

from mammut.core.files import replacing_file
from mammut.data.examples import BadExample, Source
from mammut.evaluation.metrics.captions import caption_scores
from mammut.evaluation.metrics.rankings import classification_scores, ranking_recall
from mammut.evaluation.metrics.vqa import magma_truncated_accuracy, vqa_scores
from mammut.evaluation.predictions import Predictions


@dataclasses.dataclass(frozen=True)
class Scores:
    """The metrics of one predictions file; shares are 0 to 1."""

    metrics: dict[str, Any]  # numbers, or dicts of numbers: by answer type, by class
    notes: list[str]  # how they were made, and what was left out
    items: dict[str, int]  # how many of what were scored


def score(predictions: Predictions, *, java: bool | None = None) -> Scores:
    """Scores predictions as their benchmark's official tool does.

    Args:
      java: whether captions are scored by pycocoevalcap with Java, or without; None: with, where
        both are there.

    Raises:
      ValueError: there is nothing to score against: captions without references, questions without
        answers.
    """
    scores = {"caption": _caption, "vqa": _vqa, "classify": _classify, "retrieval": _retrieval}[
        predictions.task
    ]
    scores = scores(predictions, java) if predictions.task == "caption" else scores(predictions)
    notes = [f"left out: {count} {cause}" for cause, count in predictions.left_out.items()]
    return dataclasses.replace(scores, notes=scores.notes + notes)


def _caption(predictions: Predictions, java: bool | None) -> Scores:
    said = [record["prediction"] for record in predictions.records]
    scores = caption_scores(
        said, [record["references"] for record in predictions.records], java=java
    )
    notes = [f"scored by {scores.tool}, text split by {scores.tokenizer}"]
    notes += [f"no {name}: {reason}" for name, reason in scores.left_out.items()]
    notes += _too_long(predictions.records)
    return Scores(scores.metrics, notes, {"captions": len(said)})


def _too_long(records: list[dict[str, Any]]) -> list[str]:
    count = sum(record.get("too_long", False) for record in records)
    return (
        [f"{count} prompts are longer than the model's context: answered with the empty text"]
        if count
        else []
    )


def _vqa(predictions: Predictions) -> Scores:
    records = predictions.records
    if without := sum(not record["answers"] for record in records):
        raise ValueError(
            f"{without} of {len(records)} questions of {predictions.data!r} have no answers to score against: "
            "the predictions are there to be sent to whoever keeps the answers"
        )
    scores = vqa_scores(records)
    types = {"records": "the set's", "derived": "told by the answer, not the official ones"}
    notes = [
        f"always saying {scores.most_common_answer!r}, the commonest answer here: "
        f"exact match {scores.most_common_exact_match:.2%}",
        f"answer types are {types[scores.answer_type_source]}",
    ]
    if scores.vqa_acc is None:
        notes.append(f"no VQA accuracy: {scores.vqa_acc_missing}")
    notes += _too_long(records)
    metrics = {} if scores.vqa_acc is None else {"vqa_acc": scores.vqa_acc}
    if "shots" in predictions.settings and scores.vqa_acc is not None:
        own = [
            magma_truncated_accuracy(record["prediction"], record["answers"]) for record in records
        ]
        metrics["magma_truncated_accuracy"] = sum(own) / len(own)
        notes.append(
            "magma_truncated_accuracy, MAGMA's own score, cuts what was said to the word count of the longest answer: "
            "a leak that raises it, not to be compared with vqa_acc"
        )
    metrics |= {
        "exact_match": scores.exact_match,
        "most_common_exact_match": scores.most_common_exact_match,
    }
    for by in ("by_answer_type", "by_question_type"):
        for name, own in getattr(scores, by).items():
            kept = {
                key: value for key, value in dataclasses.asdict(own).items() if value is not None
            }
            metrics.setdefault(by, {})[name] = kept
    return Scores(metrics, notes, {"questions": len(records)})


def _classify(predictions: Predictions) -> Scores:
    records = predictions.records
    ranked, labels = ([record[name] for record in records] for name in ("ranked", "label"))
    metrics = classification_scores(ranked, labels, predictions.settings["classes"])
    return Scores(
        metrics, [], {"images": len(records), "classes": len(predictions.settings["classes"])}
    )


def _retrieval(predictions: Predictions) -> Scores:
    settings, metrics = predictions.settings, {}
    for lists, suffix in (("ranked", ""), ("reranked", "_reranked")):
        if any(lists not in record for record in predictions.records):
            continue
        recalls = {}
        for query, way, candidates in (("text", "t2i", "images"), ("image", "i2t", "texts")):
            records = [record for record in predictions.records if record["query"] == query]
            ranked, relevant = (
                [record[name] for record in records] for name in (lists, "relevant")
            )
            # Candidates past the re-ranked ones stay behind them, in the order of their embeddings.
            ranked = [
                own + [i for i in record["ranked"] if i not in set(own)]
                for own, record in zip(ranked, records)
            ]
            recall = ranking_recall(ranked, relevant, num_candidates=settings[candidates])
            recalls |= {f"{way}_{name}": value for name, value in recall.items()}
        recalls["mean_recall"] = sum(recalls.values()) / len(recalls)
        metrics |= {name + suffix: value for name, value in recalls.items()}
    return Scores(metrics, [], {name: settings[name] for name in ("images", "texts")})


def require_same_set(predictions: Predictions, source: Source) -> None:
    """Refuses predictions made on another set than `source`.

    Raises:
      ValueError: an example is not there or has another key, other references, answers or another
        label.
    """
    for record in predictions.records:
        if "index" not in record:  # a text of retrieval belongs to an image that has one
            continue
        where = f"the predictions were made on another set than {source.spec!r}: example {record['index']}"
        if record["index"] >= len(source):
            raise ValueError(f"{where} is not there, it has {len(source)}")
        try:
            example = source[record["index"]]
        except BadExample as error:
            raise ValueError(f"{where} cannot be read: {error}") from error
        if example.key != record["key"]:
            raise ValueError(f"{where} is {example.key!r}, the predictions have {record['key']!r}")
        answers = {question.id: question.answers for question in example.qa}
        said = {
            "references": example.captions,
            "label": example.name,
            "answers": answers.get(record.get("id")),
        }
        for name, value in said.items():
            if name in record and record[name] != value:
                raise ValueError(
                    f"{where}, {example.key!r}, has {value!r:.60} for {name}, not {record[name]!r:.60}"
                )


def save_scores(path: str | os.PathLike, predictions: Predictions, scores: Scores) -> None:
    """Writes scores as JSON, with what they are of; whole or not at all."""
    path = pathlib.Path(path)
    values = {
        name: getattr(predictions, name)
        for name in ("task", "data", "checkpoint", "settings", "left_out")
    }
    values |= dataclasses.asdict(scores)
    with replacing_file(path) as new:
        new.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
