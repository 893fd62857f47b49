"""What scoring demands of a set, checked before the model is asked."""

from collections.abc import Iterator

from mammut.data.examples import BadExample, Example, Source
from mammut.evaluation.predictor import require_new


def readable(source: Source, limit: int | None = None) -> Iterator[Example]:
    """Yields the examples that can be read; no image is decoded.

    Args:
      limit: the number of examples, from the first on; None for all.
    """
    size = len(source)
    for index in range(size if limit is None else min(limit, size)):
        try:
            yield source[index]
        except BadExample:
            continue


def require_scorable(source: Source, task: str, limit: int | None = None) -> None:
    """Checks a set as scoring checks its predictions; no image is decoded.

    Args:
      task: a name of `mammut.evaluation.scoring.EVALUATIONS`.
      limit: the number of examples, from the first on; None for all.

    Raises:
      ValueError: two examples have one key, or of "vqa" two questions one id; or only some of the
        questions have answers, or types. Where none has answers, a server has them.
    """
    seen: set[str] = set()
    if task == "vqa":
        _require_questions(source, limit)
        return
    for example in readable(source, limit):
        if not isinstance(example.key, str):
            raise ValueError(f"{source.spec!r} has the key {example.key!r}, expected a text")
        require_new(example.key, seen, source)


def _require_questions(source: Source, limit: int | None) -> None:
    seen: set[str] = set()
    count = 0
    missing = {"answers": 0, "answer_type": 0, "question_type": 0}
    for example in readable(source, limit):
        for question in example.qa:
            if question.id in seen:
                raise ValueError(
                    f"{source.spec!r} has the question {question.id!r} more than once, expected "
                    "each once: put all questions of a picture together, or give each its own "
                    "question_id"
                )
            seen.add(question.id)
            count += 1
            for name in missing:
                missing[name] += not getattr(question, name)
    for name, without in missing.items():
        if 0 < without < count and missing["answers"] < count:
            raise ValueError(
                f"{without} of {count} questions of {source.spec!r} have no {name}, expected all "
                "to have it, or none"
            )
