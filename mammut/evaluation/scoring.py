"""Scores predictions files, without a model.

`EVALUATIONS` is the table of all evaluations. A new evaluation is a file beside this one, a row of
the table and a program in `eval/`.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

from mammut.data.config import Field
from mammut.data.examples import BadExample, Source
from mammut.evaluation.classification import score_classes
from mammut.evaluation.generated_texts import score_answers, score_captions
from mammut.evaluation.predictions import Predictions
from mammut.evaluation.retrieval import score_rankings
from mammut.evaluation.scores import Scores


@dataclasses.dataclass(frozen=True)
class EvaluationKind:
    """A row of the table of evaluations.

    It has the field that an evaluation needs, the values of its records, and the function that
    scores them.
    """

    # function that scores predictions
    score: Callable[..., Scores]
    # field that an example of the set must have, for `mammut.data.sources.open_source`
    field: Field
    # values that every record must have, and their types
    record: Mapping[str, type]
    # values that identify a record
    identity: tuple[str, ...]
    uses_java: bool = False  # True: `score` also takes `java`


# The evaluations by `Predictions.task`.
EVALUATIONS = {
    "retrieval": EvaluationKind(
        score_rankings,
        field="captions",
        record={"query": str, "id": int, "relevant": list, "ranked": list},
        identity=("query", "id"),
    ),
    "caption": EvaluationKind(
        score_captions,
        field="captions",
        record={"key": str, "index": int, "prediction": str, "references": list},
        identity=("key",),
        uses_java=True,
    ),
    "vqa": EvaluationKind(
        score_answers,
        field="qa",
        record={
            "id": str,
            "key": str,
            "index": int,
            "question": str,
            "prediction": str,
            "answers": list,
        },
        identity=("id",),
    ),
    "classify": EvaluationKind(
        score_classes,
        field="name",
        record={"key": str, "index": int, "label": str, "ranked": list},
        identity=("key",),
    ),
}


def score(predictions: Predictions, *, java: bool | None = None) -> Scores:
    """Scores predictions as the official tool of their benchmark does.

    Args:
      java: whether pycocoevalcap scores captions with Java. None: if both are installed.

    Raises:
      ValueError: a record does not hold what its task needs, or there is nothing to score against:
        questions without answers, captions without references.
    """
    require_records(predictions)
    evaluation = EVALUATIONS[predictions.task]
    settings = {"java": java} if evaluation.uses_java else {}
    scores = evaluation.score(predictions, **settings)
    notes = [f"left out: {count} {cause}" for cause, count in predictions.left_out.items()]
    return dataclasses.replace(scores, notes=scores.notes + notes)


def load_predictions(path: str | os.PathLike, task: str | None = None) -> Predictions:
    """Reads a predictions file and checks its records.

    Raises:
      ValueError: the file is missing, cut short, damaged or not of `task`; its task is not in the
        table; or a record does not hold what the task needs, or is there twice.
    """
    predictions = Predictions.load(path, task)
    require_records(predictions, str(path))
    return predictions


def require_records(predictions: Predictions, where: str | None = None) -> None:
    """Checks that predictions hold what their task needs.

    Args:
      where: the subject of the error; by default "predictions for" the set.

    Raises:
      ValueError: the task is not in the table, a record lacks a value or has one of another type,
        or two records are of the same image, question or query.
    """
    if where is None:
        where = f"predictions for {predictions.data!r}"
    if predictions.task not in EVALUATIONS:
        raise ValueError(
            f"{where} is of task {predictions.task!r}, expected one of {', '.join(EVALUATIONS)}"
        )
    evaluation = EVALUATIONS[predictions.task]
    numbers: dict[tuple, int] = {}
    for number, record in enumerate(predictions.records):
        for name, kind in evaluation.record.items():
            if not isinstance(record.get(name), kind):
                raise ValueError(
                    f"{where}, record {number} has no {name!r} of type {kind.__name__}"
                )
        identity = tuple(record[name] for name in evaluation.identity)
        if identity in numbers:
            name = " ".join(map(str, identity))
            raise ValueError(
                f"{where} has {name!r} twice, in records {numbers[identity]} and {number}: "
                "expected it once"
            )
        numbers[identity] = number


def require_same_set(predictions: Predictions, source: Source) -> None:
    """Checks that predictions were made on the set `source`.

    Raises:
      ValueError: an example is not in `source`, or has another key, label, or other references or
        answers there.
    """
    for record in predictions.records:
        if "index" not in record:  # a text query of retrieval: its image has a record with one
            continue
        index = record["index"]
        where = f"the predictions were made on another set than {source.spec!r}: example {index}"
        if index >= len(source):
            raise ValueError(f"{where} is not there, it has {len(source)}")
        try:
            example = source[index]
        except BadExample as error:
            raise ValueError(f"{where} cannot be read: {error}") from error
        if example.key != record["key"]:
            raise ValueError(f"{where} is {example.key!r}, the predictions have {record['key']!r}")

        answers = {question.id: question.answers for question in example.qa}
        truth: dict[str, Any] = {
            "references": example.captions,
            "label": example.name,
            "answers": answers.get(record.get("id")),
        }
        for name, value in truth.items():
            if name in record and record[name] != value:
                raise ValueError(
                    f"{where}, {example.key!r}, has {value!r:.60} for {name}, "
                    f"not {record[name]!r:.60}"
                )
