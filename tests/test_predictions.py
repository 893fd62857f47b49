"""Predictions files: what comes back is what was written; what is damaged or of another kind is refused."""

import json

import pytest

from mammut.evaluation.predictions import Predictions

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
    predictions.save(path)
    return path, predictions


def test_what_was_written_comes_back_whatever_its_letters(tmp_path):
    path, predictions = write(tmp_path)
    assert Predictions.load(path) == predictions == Predictions.load(path, "caption")
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
    ([CAPTION | {"logprob": float("nan")}], "record 0 has a logprob that is not finite: the model has diverged"),
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
        Predictions.load(path)


def test_the_same_id_may_ask_for_texts_and_for_images(tmp_path):
    write(tmp_path, [RETRIEVAL, RETRIEVAL | {"query": "image"}], "retrieval")
    with pytest.raises(ValueError, match="has 'text 0' twice"):
        write(tmp_path, [RETRIEVAL, RETRIEVAL], "retrieval")
    with pytest.raises(ValueError, match="scores that is not finite"):
        write(tmp_path, [RETRIEVAL | {"scores": [float("-inf")]}], "retrieval")
