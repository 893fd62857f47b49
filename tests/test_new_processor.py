"""The vocabulary of a fresh run: what it says and how it stays alive while it is made."""

import base64
import dataclasses
import json
import threading
import time

import pytest

from mammut.config import DataConfig, TrainConfig
from mammut.core import distributed
from mammut.data import sources
from mammut.testing import tiny_config
from mammut.training import new_processor
from mammut.training.new_processor import make_processor, shared_processor


@pytest.fixture
def config() -> TrainConfig:
    return TrainConfig(model=tiny_config(), data=DataConfig(batch_size=8), steps=10)


@pytest.fixture
def source() -> sources.Source:
    return sources.open_source("synthetic:val[:40]", image_size=16)


def test_every_example_read_for_the_vocabulary_is_a_sign_of_life(
    config, source, monkeypatch, capsys
):
    monkeypatch.setattr(new_processor, "_TOLD_EVERY", 0)
    calls = []
    make_processor(config, source, {}, lambda: calls.append(0))
    assert len(calls) >= 40
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [
        "making the vocabulary: read 0 of 40 examples",
        "making the vocabulary: read 1 of 40 examples",
    ]


def test_every_example_read_for_the_names_of_classes_is_a_sign_of_life(config, tmp_path):
    lines = [json.dumps({"file": f"{n}.png", "name": "a cat or a dog"[n % 9 :]}) for n in range(90)]
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    source = sources.open_source(f"jsonl:{tmp_path}/set.jsonl", image_size=16, field="name")
    config = dataclasses.replace(config, task="classify")
    calls = []
    made = make_processor(config, source, {}, lambda: calls.append(0))
    assert len(made.classes.names) == 9
    assert len(calls) >= 2 * 90  # for the vocabulary, and for the names


def test_a_small_vocabulary_is_made_without_a_line(config, source, capsys):
    make_processor(config, source, {})
    assert capsys.readouterr().out == ""


def test_training_the_vocabulary_gives_signs_of_life(config, source, monkeypatch):
    monkeypatch.setattr(new_processor, "_ALIVE_EVERY", 0.01)
    read, alive = threading.Event(), threading.Event()

    def alive_after_reading():
        if read.is_set():
            alive.set()

    train = new_processor.train_sentencepiece

    def slow(captions, *args):
        texts = list(captions)
        read.set()
        assert alive.wait(10)
        return train(texts, *args)

    monkeypatch.setattr(new_processor, "train_sentencepiece", slow)
    make_processor(config, source, {}, alive_after_reading)
    threads = [thread for thread in threading.enumerate() if thread.name == "mammut-vocabulary"]
    assert threads == []


def test_a_process_that_waits_for_the_vocabulary_is_alive(config, source, monkeypatch, tmp_path):
    monkeypatch.setattr(new_processor, "_ALIVE_EVERY", 0.01)
    made = make_processor(config, source, {})
    made.save(tmp_path)
    files = {path.name: base64.b64encode(path.read_bytes()).decode() for path in tmp_path.iterdir()}
    alive = threading.Event()

    def wait(name, make):
        assert alive.wait(10)
        return json.dumps(files).encode()

    monkeypatch.setattr(distributed, "first", lambda: False)
    monkeypatch.setattr(distributed, "broadcast_from_first", wait)
    assert shared_processor(config, source, {}, alive.set).tokenizer.encode("a red") == (
        made.tokenizer.encode("a red")
    )


def test_a_source_that_hangs_gives_no_sign_of_life(config, source, monkeypatch):
    """The watchdog has to see it."""
    monkeypatch.setattr(new_processor, "_ALIVE_EVERY", 0.01)
    calls = []

    def pairs(index):
        seen = len(calls)
        if index == 20:
            time.sleep(0.1)
        assert len(calls) == seen
        return [("", f"text {index}")]

    monkeypatch.setattr(source, "pairs", pairs)
    make_processor(config, source, {}, lambda: calls.append(0))
