"""Scores predictions files, without a model.

`EVALUATIONS` is the table of all evaluations. A new evaluation is a file beside this one, a row of
the table and a program in `eval/`.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, NotRequired

from mammut.core.fields import Count, require_fields
from mammut.data.config import Field
from mammut.data.examples import BadExample, Source
from mammut.evaluation.classification import score_classes
from mammut.evaluation.generated_texts import score_answers, score_captions
from mammut.evaluation.predictions import Predictions, record_place
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
    # values of a record, and their types, as in `mammut.core.fields.require_fields`
    record: Mapping[str, Any]
    # values that identify a record
    identity: tuple[str, ...]
    # values of the settings that `score` needs, and their types
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    uses_java: bool = False  # True: `score` also takes `java`


# Values of every example in a record, and settings of every evaluation.
_EXAMPLE = {"key": str, "index": Count}
_GENERATED = {
    "prediction": str,
    "logprob": NotRequired[float],
    "too_long": NotRequired[bool],
}
_SETTINGS = {
    "image_size": NotRequired[Count],
    "blind": NotRequired[bool],
    "frames": NotRequired[Count],
    "options": NotRequired[dict],
    "set_notes": NotRequired[list[str]],
}

# The evaluations by `Predictions.task`.
EVALUATIONS = {
    "retrieval": EvaluationKind(
        score_rankings,
        field="captions",
        record={
            "query": Literal["image", "text"],
            "id": Count,
            "relevant": list[Count],
            "ranked": list[Count],
            "rank": NotRequired[Count],
            "scores": NotRequired[list[float]],
            "reranked": NotRequired[list[Count]],
            "reranked_scores": NotRequired[list[float]],
            "key": NotRequired[str],
            "index": NotRequired[Count],
            "text": NotRequired[str],
        },
        identity=("query", "id"),
        settings={"images": Count, "texts": Count},
    ),
    "caption": EvaluationKind(
        score_captions,
        field="captions",
        record=_EXAMPLE | _GENERATED | {"references": list[str]},
        identity=("key",),
        uses_java=True,
    ),
    "vqa": EvaluationKind(
        score_answers,
        field="qa",
        record=_EXAMPLE
        | _GENERATED
        | {
            "id": str,
            "question": str,
            "answers": list[str],
            "answer_type": NotRequired[str | None],
            "question_type": NotRequired[str | None],
        },
        identity=("id",),
    ),
    "classify": EvaluationKind(
        score_classes,
        field="name",
        record=_EXAMPLE | {"label": str, "ranked": list[str], "scores": NotRequired[list[float]]},
        identity=("key",),
        settings={
            "classes": list[str],
            "untrained": NotRequired[list[str]],
            "names_of_set": NotRequired[bool],
        },
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
    where = f"predictions for {predictions.data!r}, settings"
    require_fields(predictions.settings, _settings_of(predictions.task), where)
    evaluation = EVALUATIONS[predictions.task]
    settings = {"java": java} if evaluation.uses_java else {}
    scores = evaluation.score(predictions, **settings)
    notes = list(predictions.settings.get("set_notes", []))
    notes += [f"left out: {count} {cause}" for cause, count in predictions.left_out.items()]
    return dataclasses.replace(scores, notes=scores.notes + notes)


def load_predictions(path: str | os.PathLike, task: str | None = None) -> Predictions:
    """Reads a predictions file and checks its records.

    Raises:
      ValueError: the file is missing, cut short, damaged or not of `task`; its task is not in the
        table; or a record does not hold what the task needs, or is there twice.
    """
    predictions = Predictions.load(path, task)
    require_records(predictions, str(path))
    # A setting that is missing is refused where it is needed, by `score`: a page shows the rest.
    kinds = {
        name: kind
        for name, kind in _settings_of(predictions.task).items()
        if name in predictions.settings
    }
    require_fields(predictions.settings, kinds, f"{path}, line 1, settings")
    return predictions


def require_records(predictions: Predictions, where: str | None = None) -> None:
    """Checks that predictions hold what their task needs.

    Args:
      where: the subject of the error; by default "predictions for" the set.

    Raises:
      ValueError: the task is not in the table, a record lacks a value or has one of another type,
        or two records are of the same image, question or query.
    """
    in_file = where is not None
    if where is None:
        where = f"predictions for {predictions.data!r}"
    if predictions.task not in EVALUATIONS:
        raise ValueError(
            f"{where} is of task {predictions.task!r}, expected one of {', '.join(EVALUATIONS)}"
        )
    evaluation = EVALUATIONS[predictions.task]
    numbers: dict[tuple, int] = {}
    for number, record in enumerate(predictions.records):
        place = record_place(where, number, in_file)
        require_fields(record, evaluation.record, place)
        identity = tuple(record[name] for name in evaluation.identity)
        if identity in numbers:
            name = " ".join(map(str, identity))
            raise ValueError(
                f"{where} has {name!r} twice, in records {numbers[identity]} and {number}: "
                "expected it once"
            )
        numbers[identity] = number


def _settings_of(task: str) -> dict[str, Any]:
    """Lists the types of the settings that scoring reads."""
    return {**_SETTINGS, **EVALUATIONS[task].settings}


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
        key = record.get("key")
        if example.key != key:
            raise ValueError(f"{where} is {example.key!r}, the predictions have {key!r}")

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
