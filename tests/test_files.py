"""Files that are whole or absent: a failed write leaves the old file, and nothing beside it."""

import dataclasses
import json
import os
import pathlib

import numpy as np
import pytest

from mammut.core.files import read_json_object, replacing_file, write_json
from mammut.data import tar_shards
from mammut.evaluation.predictions import Predictions
from mammut.evaluation.scores import Scores, save_scores
from mammut.testing import tiny_processor
from mammut.training.config import TrainConfig
from mammut.training.run_folder import claim_folder


class DiskFull(Exception):
    """What the write of a file is made to end with."""


@pytest.fixture
def disk_full(monkeypatch):
    """From the call on, half of what is written to a file arrives; then the disk is full."""

    def start() -> None:
        write_text, write_bytes = pathlib.Path.write_text, pathlib.Path.write_bytes

        def half_text(path, text, *args, **kwargs):
            write_text(path, text[: len(text) // 2], *args, **kwargs)
            raise DiskFull

        def half_bytes(path, content):
            write_bytes(path, content[: len(content) // 2])
            raise DiskFull

        monkeypatch.setattr(pathlib.Path, "write_text", half_text)
        monkeypatch.setattr(pathlib.Path, "write_bytes", half_bytes)

    return start


def content_of(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_file_is_replaced_at_the_end_and_not_before(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with replacing_file(path) as new:
        new.write_text("new")
        assert path.read_text() == "old" and new.parent == tmp_path
    assert content_of(tmp_path) == {"x.txt": b"new"}


@pytest.mark.parametrize("error", [DiskFull, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [b"old", None])
@pytest.mark.parametrize("written", [True, False])
def test_a_write_that_fails_half_way_leaves_the_old_file_and_nothing_else(
    tmp_path, old, written, error
):
    path = tmp_path / "x.txt"
    if old is not None:
        path.write_bytes(old)
    before = content_of(tmp_path)
    with pytest.raises(error):
        with replacing_file(path) as new:
            if written:
                new.write_text("ha")
            raise error
    assert content_of(tmp_path) == before


def test_of_two_writers_of_one_file_the_last_wins_and_both_are_whole(tmp_path):
    path = tmp_path / "x.txt"
    with replacing_file(path) as first:
        with replacing_file(path) as second:
            first.write_text("first")
            second.write_text("second")
        assert path.read_text() == "second"
    assert content_of(tmp_path) == {"x.txt": b"first"}


def test_what_killed_writers_left_is_removed_when_a_run_takes_its_folder(tmp_path):
    kept = ["run.json", "x.partial", "x.json.0123456.partial", "x.json.0123456G.partial"]
    kept += ["checkpoints/x.json.01234567.partial"]
    left = ["run.json.0123abcd.partial", "checkpoint_manifests/3.json.89abcdef.partial"]
    for name in kept + left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with replacing_file(tmp_path / "y.json") as new:
        new.write_text("{}")
        mine = tmp_path / f"z{new.name}"
        mine.write_text("the name of today")
    claim_folder(tmp_path, TrainConfig(), [], tiny_processor(), fresh=False)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {*kept, "y.json"}


def test_a_replaced_file_has_the_rights_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("x")
    with replacing_file(tmp_path / "replaced") as new:
        new.write_text("x")
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes["replaced"] == modes["plain"]


def test_json_is_written_whole_or_not_at_all(tmp_path, disk_full):
    write_json(tmp_path / "x.json", {"a": 1})
    before = content_of(tmp_path)
    disk_full()
    with pytest.raises(DiskFull):
        write_json(tmp_path / "x.json", {"a": 2, "b": [1, 2, 3]})
    assert content_of(tmp_path) == before and read_json_object(tmp_path / "x.json") == {"a": 1}


def test_a_processor_is_written_whole_or_not_at_all(tmp_path, disk_full):
    processor = tiny_processor()
    processor.save(tmp_path)
    before = content_of(tmp_path)
    assert set(before) == {"processor.json", "tokenizer.model"}
    processor.image = dataclasses.replace(processor.image, image_size=24)
    disk_full()
    with pytest.raises(DiskFull):
        processor.save(tmp_path)
    assert content_of(tmp_path) == before


def test_a_processor_json_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    """The vocabulary has been written by then; it is the same."""
    processor = tiny_processor()
    processor.save(tmp_path)
    before = content_of(tmp_path)
    processor.image = dataclasses.replace(processor.image, image_size=24)
    replace = os.replace

    def refuse(source, target):
        if pathlib.Path(target).name == "processor.json":
            raise DiskFull
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(DiskFull):
        processor.save(tmp_path)
    assert content_of(tmp_path) == before


def test_predictions_and_scores_are_written_whole_or_not_at_all(tmp_path, disk_full, monkeypatch):
    records = [{"index": 0, "key": "a", "prediction": "a dog", "references": ["a dog"]}]
    predictions = Predictions("caption", records, "jsonl:x", "model")
    predictions.save(tmp_path / "x.jsonl")
    scores = Scores({"cider": 1.0}, [], {"captions": 1})
    save_scores(tmp_path / "x.json", predictions, scores)
    before = content_of(tmp_path)
    disk_full()
    with pytest.raises(DiskFull):
        save_scores(tmp_path / "x.json", predictions, scores)
    monkeypatch.setattr(json, "dumps", broken_from_the_second_line())
    with pytest.raises(DiskFull):
        predictions.save(tmp_path / "x.jsonl")
    assert content_of(tmp_path) == before


def broken_from_the_second_line():
    dumps, calls = json.dumps, []

    def broken(*args, **kwargs):
        calls.append(args)
        if len(calls) > 1:
            raise DiskFull
        return dumps(*args, **kwargs)

    return broken


def test_an_index_of_a_shard_is_written_whole_or_not_at_all(tmp_path, disk_full):
    index = tar_shards.Index(np.zeros((2, 3), np.int64), np.zeros((2, 3), np.uint32), {}, "")
    tar_shards._store(tmp_path, "x", {"size": 1}, index)
    before = content_of(tmp_path)
    assert set(before) == {"x"}
    disk_full()
    with pytest.raises(DiskFull):
        tar_shards._store(tmp_path, "x", {"size": 2}, index)
    assert content_of(tmp_path) == before
