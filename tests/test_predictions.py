"""Predictions files: what is read is what was written; damaged or other files are refused."""

import json

import pytest

from mammut.evaluation.predictions import Predictions
from mammut.evaluation.scores import Scores, save_scores
from mammut.evaluation.scoring import (
    EVALUATIONS,
    EvaluationKind,
    load_predictions,
    require_records,
    score,
)
from mammut.pages.report import write_report

CAPTION = {
    "key": "a.jpg",
    "index": 0,
    "prediction": "ein Hund \u2028 läuft\n",
    "logprob": -1.5,
    "references": ["x"],
}
RETRIEVAL = {"query": "text", "id": 0, "text": "x", "relevant": [0], "ranked": [0], "scores": [0.5]}


def write(tmp_path, records=(CAPTION, CAPTION | {"key": "b.jpg", "index": 1}), task="caption"):
    path = tmp_path / "new" / "x.predictions.jsonl"
    predictions = Predictions(
        task, list(records), "jsonl:x", "runs/x", {"num_beams": 4}, {"corrupt": 2}
    )
    require_records(predictions)
    predictions.save(path)
    return path, predictions


def test_what_was_written_comes_back_whatever_its_letters(tmp_path):
    path, predictions = write(tmp_path)
    assert Predictions.load(path) == predictions == Predictions.load(path, "caption")
    assert load_predictions(path) == predictions == load_predictions(path, "caption")
    # one line each, line separators inside the text or not
    assert len(path.read_text().split("\n")) == 4
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_of_another_task_or_none_of_ours_is_refused(tmp_path):
    path, _ = write(tmp_path)
    with pytest.raises(ValueError, match="holds predictions of task 'caption', expected 'vqa'"):
        Predictions.load(path, "vqa")
    for text in ("", "[1, 2]\n", '{"prediction": "x"}\n', "no JSON\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="is not a predictions file of this library"):
            Predictions.load(path)
    with pytest.raises(ValueError, match="is not a predictions file"):
        Predictions.load(tmp_path / "nowhere.jsonl")


def test_a_file_cut_short_is_refused(tmp_path):
    path, _ = write(tmp_path)
    lines = path.read_text().split("\n")
    path.write_text("\n".join(lines[:2]) + "\n")
    with pytest.raises(ValueError, match="has 1 records, its first line promises 2"):
        Predictions.load(path)
    path.write_text("\n".join(lines[:2]) + "\n" + lines[2][:20])
    with pytest.raises(ValueError, match="is not a predictions file of this library"):
        Predictions.load(path)


@pytest.mark.parametrize("records, message", [
    ([], "holds no records"),
    ([CAPTION, CAPTION], "has 'a.jpg' twice, in records 0 and 1"),
    ([CAPTION | {"prediction": None}], "record 0 has no 'prediction' of type str"),
    ([CAPTION, {"key": "b.jpg"}], "record 1 has no .index. of type int"),
    ([CAPTION | {"logprob": float("nan")}],
     "record 0 has a logprob that is not finite: the model has diverged"),
])  # fmt: skip
def test_records_that_cannot_be_scored_are_refused_before_and_after_they_are_written(
    tmp_path, records, message
):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, records)
    path, _ = write(tmp_path)
    header = json.loads(path.read_text().split("\n")[0]) | {"records": len(records)}
    path.write_text("\n".join(json.dumps(value) for value in (header, *records)) + "\n")
    with pytest.raises(ValueError, match=message):
        load_predictions(path)


def test_the_same_id_may_ask_for_texts_and_for_images(tmp_path):
    write(tmp_path, [RETRIEVAL, RETRIEVAL | {"query": "image"}], "retrieval")
    with pytest.raises(ValueError, match="has 'text 0' twice"):
        write(tmp_path, [RETRIEVAL, RETRIEVAL], "retrieval")
    with pytest.raises(ValueError, match="scores that is not finite"):
        write(tmp_path, [RETRIEVAL | {"scores": [float("-inf")]}], "retrieval")


def test_a_task_that_is_not_in_the_table_is_refused(tmp_path):
    predictions = Predictions("counting", [CAPTION], "jsonl:x", "runs/x")
    predictions.save(tmp_path / "x.predictions.jsonl")
    expected = "is of task 'counting', expected one of retrieval, caption, vqa, classify"
    with pytest.raises(ValueError, match=expected):
        load_predictions(tmp_path / "x.predictions.jsonl")
    with pytest.raises(ValueError, match=f"predictions for 'jsonl:x' {expected}"):
        score(predictions)


def test_a_new_evaluation_is_one_row_of_the_table(tmp_path, monkeypatch):
    """Loaded, scored, written and shown in a report, with nothing else to touch."""

    def score_counts(predictions: Predictions) -> Scores:
        right = [record["count"] == record["truth"] for record in predictions.records]
        return Scores({"acc": sum(right) / len(right)}, [], {"images": len(right)})

    record = {"key": str, "count": int, "truth": int}
    row = EvaluationKind(score_counts, field="captions", record=record, identity=("key",))
    monkeypatch.setitem(EVALUATIONS, "counting", row)
    records = [{"key": "a", "count": 1, "truth": 1}, {"key": "b", "count": 2, "truth": 3}]
    path = tmp_path / "x.predictions.jsonl"
    Predictions("counting", records, "jsonl:x", "runs/x").save(path)

    predictions = load_predictions(path, "counting")
    scores = score(predictions)
    assert scores.metrics == {"acc": 0.5} and scores.items == {"images": 2}
    save_scores(tmp_path / "x.json", predictions, scores)
    page = write_report(path).read_text()
    assert "counting: x" in page and "accuracy" in page and "50.0%" in page
    Predictions("counting", records * 2, "jsonl:x", "runs/x").save(path)
    with pytest.raises(ValueError, match="has 'a' twice, in records 0 and 2"):
        load_predictions(path)
