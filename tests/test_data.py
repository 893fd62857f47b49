"""Sources and batches: what is read, in which order, how a run goes on, what bad data does."""

import collections
import dataclasses
import functools
import json
import logging
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from mammut import prepare
from mammut.config import DataConfig
from mammut.data import batches as data
from mammut.data import sources, synthetic
from mammut.data.examples import BadExample, Example, Source
from mammut.data.images import ImageTransform
from mammut.data.prefetch import prefetch
from mammut.data.processor import Processor
from mammut.data.tokenizer import train_sentencepiece
from mammut.performance.reading_time import measure_reading
from mammut.testing import shared_dir
from mammut.training.log import RunLog

SIZE = 16
CONFIG = DataConfig(batch_size=4, threads=2)


@functools.cache
def processor() -> Processor:
    texts = [f"picture number {i}" for i in range(100)] + [
        f"a grey level of {i}" for i in range(100)
    ]
    return Processor(
        train_sentencepiece(texts, 60, lowercase=True),
        ImageTransform(image_size=SIZE),
        max_length=24,
    )


def captions_of(i: int) -> list[str]:
    return [f"picture number {i}", f"a grey level of {i}"]


def write_set(folder, num_examples: int) -> str:
    """Image i is of grey level i. Returns the spec."""
    folder.mkdir(exist_ok=True)
    lines = []
    for i in range(num_examples):
        Image.new("RGB", (20, 20), (i, i, i)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file": f"{i}.png", "captions": captions_of(i)}))
    (folder / "set.jsonl").write_text("\n".join(lines) + "\n")
    return f"jsonl:{folder / 'set.jsonl'}"


def bad_lines(folder) -> dict[bytes, str]:
    """Lines that cannot be used, and why; writes the broken images that they name."""
    (folder / "empty.png").write_bytes(b"")
    (folder / "corrupt.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"nothing of the kind" * 20)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(
        folder / "whole.jpg"
    )
    (folder / "truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:1000])
    return {
        b'{"file": "0.png", "captions": ["cut off': "not JSON",
        b"[" * 100_000: "not JSON",
        b'{"file": "0.png", "captions": ["caf\xe9"]}': "not UTF-8",
        b'{"file": "0.png", "captions": ["half a pair: \\ud800"]}': "not UTF-8",
        b'["0.png", "a list"]': "not an object",
        b'{"captions": ["no file"]}': "missing field",
        b'{"file": 3, "captions": ["the file is a number"]}': "missing field",
        b'{"file": "0.png"}': "missing field",
        b'{"file": "0.png", "captions": 3}': "missing field",
        b'{"file": "0.png", "captions": []}': "no caption",
        b'{"file": "0.png", "captions": ["", " \\n"]}': "no caption",
        b'{"file": "nowhere.png", "captions": ["x"]}': "missing file",
        b'{"file": "empty.png", "captions": ["x"]}': "empty",
        b'{"file": "corrupt.png", "captions": ["x"]}': "corrupt",
        b'{"file": "truncated.jpg", "captions": ["x"]}': "truncated",
    }


def write_set_with_bad(folder, num_good: int) -> str:
    """A good set with each kind of bad line in it, spread out."""
    spec = write_set(folder, num_good)
    lines = (folder / "set.jsonl").read_bytes().splitlines()
    for place, line in enumerate(bad_lines(folder)):
        lines.insert(1 + 2 * place, line)
    (folder / "set.jsonl").write_bytes(b"\n".join(lines))
    return spec


def said(batch: data.EvalBatch) -> list[list[str]]:
    """The captions of each row; none where it is not an example."""
    return [example.captions if example else [] for example in batch.examples]


def open_set(spec: str, **options) -> Source:
    return sources.open_source(spec, image_size=SIZE, **options)


def ids(batch) -> list[int]:
    return batch["image"][:, 0, 0, 0].tolist()


def texts(batch) -> list[str]:
    return processor().decode(batch["tokens"])


def take(batches: data.TrainBatches, num_batches: int) -> list[dict]:
    try:
        return [next(batches) for _ in range(num_batches)]
    finally:
        batches.close()


def train(source, config=CONFIG, seed=0, **options) -> data.TrainBatches:
    return data.TrainBatches(source, processor(), config, seed=seed, **options)


def assert_same(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for name in ("image", "tokens", "text_valid"):
            np.testing.assert_array_equal(a[name], b[name])


# Sources


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("", "synthetic:train"),
        ("imagenet", "synthetic:train"),
        ("synthetic:test", "synthetic:val"),
        ("jsonl:", "jsonl:PATH"),
        ("tar:", "tar:PATTERN"),
        ("jsonl:/nowhere/set.jsonl", "/nowhere/set.jsonl"),
        ("tfds:flickr", "tfds:NAME/SPLIT"),
        ("synthetic:val[5]", r"\[a:b\]"),
        ("synthetic:val[96:]", "empty"),
        ("synthetic:val[:0%]", "empty"),
    ],
)
def test_a_wrong_spec_is_named_with_what_is_expected(spec, expected):
    with pytest.raises(ValueError, match=expected) as error:
        open_set(spec)
    assert repr(spec) in str(error.value) and "\n" not in str(error.value)


def test_slices():
    whole = open_set("synthetic:val")
    assert len(whole) == 96
    for spec, rows in {
        "[:10]": (0, 10),
        "[90:]": (90, 96),
        "[25%:50%]": (24, 48),
        "[-6:]": (90, 96),
    }.items():
        part = open_set(f"synthetic:val{spec}")
        assert [part[i].key for i in range(len(part))] == [
            f"synthetic:val {i}" for i in range(*rows)
        ]
    fifth, others = open_set("synthetic:val[1:90:5]"), open_set("synthetic:val[!1:90:5]")
    assert [fifth[i].key for i in range(len(fifth))] == [
        f"synthetic:val {i}" for i in range(1, 90, 5)
    ]
    left = [i for i in range(96) if i not in range(1, 90, 5)]
    assert [others[i].key for i in range(len(others))] == [f"synthetic:val {i}" for i in left]
    assert len(open_set("synthetic:val[:33%]")) + len(open_set("synthetic:val[33%:]")) == 96
    with pytest.raises(IndexError):
        open_set("synthetic:val[:10]")[10]


def test_synthetic_source():
    example = open_set("synthetic:train")[5]
    np.testing.assert_array_equal(example.image, synthetic.draw("train", 5, SIZE))
    assert example.captions == synthetic.captions(synthetic.combination("train", 5))
    assert len(open_set("synthetic:train")) == 100_000


def test_jsonl_skips_blank_lines_and_blank_captions(tmp_path):
    line = '{"file": "a/%d.png", "captions": ["", "zwölf %d", " "], "official_split": "train"}'
    first, second, third = (line % (i, i) for i in (1, 2, 3))
    (tmp_path / "set.jsonl").write_text(f"\ufeff{first}\n\n  \r\n{second}\r\n\t\n{third}", "utf-8")
    source = open_set(f"jsonl:{tmp_path}")
    examples = list(source)
    assert [example.captions for example in examples] == [["zwölf 1"], ["zwölf 2"], ["zwölf 3"]]
    assert examples[0].image == tmp_path / "a/1.png" and examples[0].key == "a/1.png"


def test_a_folder_needs_exactly_one_jsonl(tmp_path):
    write_set(tmp_path, 3)
    assert len(open_set(f"jsonl:{tmp_path}")) == 3
    (tmp_path / "other.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="2 .jsonl files, expected one"):
        open_set(f"jsonl:{tmp_path}")


def test_an_empty_jsonl_is_refused(tmp_path):
    (tmp_path / "set.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match="empty"):
        open_set(f"jsonl:{tmp_path}")


def test_each_bad_line_says_why_and_where(tmp_path):
    write_set(tmp_path, 1)
    lines = bad_lines(tmp_path)
    (tmp_path / "set.jsonl").write_bytes(b"\n\n" + b"\n".join(lines))
    source = open_set(f"jsonl:{tmp_path}")
    causes = []
    for number in range(len(source)):
        try:
            processor().image.read(source[number].image)
        except BadExample as error:
            assert f"set.jsonl, line {number + 3} " in str(error)
            causes.append(error.cause)
        except ValueError as error:
            causes.append(error.cause)
    assert causes == list(lines.values())


def test_threads_read_the_same(tmp_path):
    source = open_set(write_set(tmp_path, 50))
    wrong = []

    def read():
        wrong.extend(i for _ in range(5) for i in range(50) if source[i].captions != captions_of(i))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_captions_leave_out_what_cannot_be_read(tmp_path):
    source = open_set(write_set_with_bad(tmp_path, 20))
    readable_without_image = ["x"] * 4
    assert sorted(sources.texts(source)) == sorted(
        [caption for i in range(20) for caption in captions_of(i)] + readable_without_image
    )
    assert list(sources.texts(open_set("synthetic:val[:1]"))) == synthetic.captions(
        synthetic.combination("val", 0)
    )


# Training batches


def test_batch_shapes_and_matching_captions(tmp_path):
    (batch,) = take(train(open_set(write_set(tmp_path, 10))), 1)
    assert batch["image"].shape == (4, SIZE, SIZE, 3) and batch["image"].dtype == np.uint8
    assert batch["tokens"].shape == batch["text_valid"].shape == (4, 24)
    assert batch["tokens"].dtype == np.int32 and batch["text_valid"].dtype == bool
    for i, text in zip(ids(batch), texts(batch), strict=True):
        assert text in captions_of(i)


def test_each_epoch_visits_everything_once_in_a_new_order(tmp_path):
    source = open_set(write_set(tmp_path, 10))
    seen = [i for batch in take(train(source), 10) for i in ids(batch)]
    epochs = [seen[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert seen != [i for batch in take(train(source, seed=1), 10) for i in ids(batch)]


def test_every_caption_is_drawn(tmp_path):
    batches = take(train(open_set(write_set(tmp_path, 8))), 30)
    assert {text for batch in batches for text in texts(batch)} == {
        text for i in range(8) for text in captions_of(i)
    }


def test_two_processes_share_each_batch(tmp_path):
    source = open_set(write_set_with_bad(tmp_path, 24))
    config = dataclasses.replace(CONFIG, batch_size=6, max_bad_share=0.6, crop_scale=(0.3, 1.0))
    whole = take(train(source, config), 20)
    halves = [take(train(source, config, process_index=p, process_count=2), 20) for p in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        for p, part in enumerate(parts):
            assert_same([part], [{name: rows[p::2] for name, rows in batch.items()}])
    clean = open_set(write_set(tmp_path / "clean", 12))
    first, second = (
        [
            i
            for batch in take(train(clean, config, process_index=p, process_count=2), 2)
            for i in ids(batch)
        ]
        for p in range(2)
    )
    assert sorted(first + second) == list(range(12))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("done", [0, 1, 5, 12])
def test_resuming_is_bit_exact(tmp_path, threads, done):
    source = open_set(write_set_with_bad(tmp_path, 16))
    config = dataclasses.replace(
        CONFIG, max_bad_share=0.7, crop_scale=(0.2, 0.8), horizontal_flip=True
    )
    batches = train(source, dataclasses.replace(config, threads=threads))
    for _ in range(done):
        next(batches)
    state = json.loads(json.dumps(batches.state()))
    following = take(batches, 12)  # 12 batches of 4 pass the end of an epoch of 31
    resumed = train(source, config, state=state)
    assert resumed.state() == state
    assert_same(take(resumed, 12), following)
    assert resumed.bad_counts == batches.bad_counts and resumed.state() == batches.state()


def test_a_state_fits_another_number_of_processes(tmp_path):
    source = open_set(write_set(tmp_path, 11))
    batches = train(source)
    take(batches, 3)
    whole = take(train(source, state=batches.state()), 3)
    half = take(train(source, state=batches.state(), process_index=1, process_count=2), 3)
    assert_same(half, [{name: rows[1::2] for name, rows in batch.items()} for batch in whole])


def test_a_state_of_other_data_is_refused(tmp_path):
    source = open_set(write_set(tmp_path, 10))
    state = train(source).state()
    with pytest.raises(ValueError, match="examples 10.*examples 9"):
        train(open_set(f"jsonl:{tmp_path}[:9]"), state=state)
    with pytest.raises(ValueError, match="seed 0.*seed 1"):
        train(source, seed=1, state=state)


def test_bad_examples_are_replaced_and_counted(tmp_path, caplog):
    source = open_set(write_set_with_bad(tmp_path, 30))
    batches = train(source, dataclasses.replace(CONFIG, batch_size=15, max_bad_share=0.6))
    with caplog.at_level(logging.WARNING):
        taken = take(batches, 3)  # one epoch
    assert all(len(ids(batch)) == 15 for batch in taken)
    assert set(range(30)) <= {i for batch in taken for i in ids(batch)}
    expected = collections.Counter(bad_lines(tmp_path).values())
    assert set(batches.bad_counts) == set(expected)
    assert all(batches.bad_counts[cause] >= count for cause, count in expected.items())
    assert sum("no caption" in message and "line" in message for message in caplog.messages) == 1


def test_too_many_bad_examples_stop_the_run(tmp_path):
    spec = write_set(tmp_path, 20)
    for i in range(0, 20, 4):
        (tmp_path / f"{i}.png").unlink()
    with pytest.raises(
        data.TooManyBadExamples, match="missing file.*data.max_bad_share allows 10%"
    ) as error:
        take(train(open_set(spec)), 10)
    assert spec in str(error.value)
    take(train(open_set(spec), dataclasses.replace(CONFIG, max_bad_share=0.5)), 50)


def test_a_few_bad_examples_at_the_start_do_not_stop_a_run(tmp_path):
    spec = write_set(tmp_path, 200)
    source = open_set(spec)
    first = ids(take(train(source), 1)[0])
    for i in first:
        (tmp_path / f"{i}.png").unlink()
    batches = train(source)
    take(batches, 40)
    assert batches.bad_counts == {"missing file": 4}


def test_a_set_without_one_good_example_stops_the_run(tmp_path):
    spec = write_set(tmp_path, 5)
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(data.TooManyBadExamples, match=r"100 of 100 .*\(100 empty\)"):
        take(train(open_set(spec), dataclasses.replace(CONFIG, max_bad_share=0.99)), 1)


class Broken(Source):
    spec = "broken"

    def __len__(self):
        return 10

    def __getitem__(self, index):
        raise ZeroDivisionError(f"at {index}")


def test_other_errors_reach_the_caller():
    with pytest.raises(ZeroDivisionError, match="at "):
        take(train(Broken()), 1)
    with pytest.raises(ZeroDivisionError, match="at 0"):
        next(data.eval_batches(Broken(), processor(), batch_size=2))


def test_what_does_not_fit_is_refused(tmp_path):
    source = open_set(write_set(tmp_path, 10))
    with pytest.raises(ValueError, match="10 examples.*data.batch_size 11"):
        train(source, dataclasses.replace(CONFIG, batch_size=11))
    with pytest.raises(ValueError, match="data.batch_size 4 is not a multiple of the 3 processes"):
        train(source, process_count=3)
    with pytest.raises(
        ValueError, match="data.eval_batch_size 4 is not a multiple of the 3 processes"
    ):
        data.eval_batches(source, processor(), batch_size=4, process_count=3)


class LeftAndRight(Source):
    """White on the left of black."""

    spec = "left and right"

    def __len__(self):
        return 8

    def __getitem__(self, index):
        image = np.zeros((SIZE, SIZE, 3), np.uint8)
        image[:, : SIZE // 2] = 255
        return Example(image, ["white on the left"], str(index))


def test_left_stays_left_unless_flips_are_asked_for():
    def left(config):
        return [
            bool(image[0, 0, 0])
            for batch in take(train(LeftAndRight(), config), 8)
            for image in batch["image"]
        ]

    assert all(left(CONFIG))
    assert all(left(dataclasses.replace(CONFIG, crop_scale=(0.9, 1.0))))
    assert 4 < sum(left(dataclasses.replace(CONFIG, horizontal_flip=True))) < 28


def test_crops_are_taken_where_asked_for():
    def columns(config):
        batches = take(train(LeftAndRight(), config), 4)
        return {
            int((image[SIZE // 2, :, 0] > 127).sum())
            for batch in batches
            for image in batch["image"]
        }

    assert columns(CONFIG) == {SIZE // 2}
    assert len(columns(dataclasses.replace(CONFIG, crop_scale=(0.2, 0.6)))) > 3


# Small images first

LOW = 8


def test_the_first_steps_have_small_images_drawn_alike(tmp_path):
    source = open_set(write_set_with_bad(tmp_path, 16))
    config = dataclasses.replace(
        CONFIG, max_bad_share=0.7, crop_scale=(0.2, 0.8), horizontal_flip=True
    )
    full = take(train(source, config), 12)
    small = processor()
    small = Processor(small.tokenizer, ImageTransform(image_size=LOW), small.max_length)
    all_small = take(data.TrainBatches(source, small, config, seed=0), 9)
    # 9 batches of 4 pass an epoch of 31
    mixed = take(train(source, config, low_image_size=LOW, low_steps=9), 12)
    assert [batch["image"].shape[1:] for batch in mixed] == [(LOW, LOW, 3)] * 9 + [
        (SIZE, SIZE, 3)
    ] * 3
    assert_same(mixed, all_small + full[9:])
    assert_same(
        mixed, [batch | {"image": other["image"]} for batch, other in zip(full, mixed, strict=True)]
    )


@pytest.mark.parametrize("done", [0, 2, 4, 5, 7])
def test_small_images_end_at_the_same_step_in_a_resumed_run_of_more_processes(tmp_path, done):
    source = open_set(write_set(tmp_path, 11))
    options = {"low_image_size": LOW, "low_steps": 5}
    whole = take(train(source, dataclasses.replace(CONFIG, threads=1), **options), 8)
    batches = train(source, **options)
    take(batches, done)
    state = json.loads(json.dumps(batches.state()))
    half = train(source, state=state, process_index=1, process_count=2, **options)
    assert_same(
        take(half, 8 - done),
        [{name: rows[1::2] for name, rows in batch.items()} for batch in whole[done:]],
    )
    assert_same(take(train(source, state=state, **options), 8 - done), whole[done:])


def test_steps_of_small_images_need_their_size(tmp_path):
    with pytest.raises(ValueError, match="low_steps is 3 and low_image_size None"):
        train(open_set(write_set(tmp_path, 10)), low_steps=3)


# Prefetch


class Gated(Source):
    """Drawn scenes, each read when the gate is open."""

    spec = "jsonl:/on/a/stuck/disk"

    def __init__(self):
        self.gate = threading.Event()
        self._scenes = open_set("synthetic:val")

    def __len__(self):
        return 96

    def __getitem__(self, index):
        self.gate.wait()
        return self._scenes[index]


def test_a_source_that_stalls_is_named_until_it_goes_on(monkeypatch, caplog):
    monkeypatch.setattr("mammut.data.prefetch._STALLED", 0.05)
    source = Gated()
    batches = train(source)
    ahead = prefetch(batches, lambda batch: batch)

    def release():
        for _ in range(2_000):
            if len(caplog.messages) >= 3:
                break
            time.sleep(0.01)
        source.gate.set()

    with caplog.at_level(logging.WARNING):
        thread = threading.Thread(target=release)
        thread.start()
        _, _, wait = next(ahead)
        thread.join()
    assert wait >= 0.15 and len(caplog.messages) >= 3
    assert all(
        "no batch from 'jsonl:/on/a/stuck/disk' for " in message for message in caplog.messages
    )
    ahead.close()
    batches.close()


def test_a_batch_that_is_there_is_not_waited_for():
    source, read = Gated(), threading.Semaphore(0)
    source.gate.set()
    batches = train(source)
    ahead = prefetch(batches, lambda batch: read.release(), size=2)
    next(ahead)  # starts reading
    for _ in range(3):
        read.acquire()
    source.gate.clear()  # two batches are ready, and no other will come
    waits = [next(ahead)[2] for _ in range(2)]
    threading.Timer(1, source.gate.set).start()
    waits += [next(ahead)[2]]
    assert waits[0] < 0.5 and waits[1] < 0.5
    ahead.close()
    batches.close()


class Slow(Source):
    """20 milliseconds an example."""

    spec = "slow"

    def __init__(self):
        self._scenes = open_set("synthetic:val")

    def __len__(self):
        return 96

    def __getitem__(self, index):
        time.sleep(0.02)
        return self._scenes[index]


@pytest.mark.parametrize(("slow", "low", "high"), [("data", 0.5, 1.0), ("step", 0.0, 0.5)])
def test_the_wait_in_the_log_is_the_share_of_time_without_a_batch(tmp_path, slow, low, high):
    source = Slow() if slow == "data" else open_set("synthetic:val")
    batches = train(source, dataclasses.replace(CONFIG, threads=1))
    ahead = prefetch(batches, lambda batch: batch)
    log = RunLog(tmp_path, start=0, steps=9, batch_size=4, silent=False)
    for step in range(1, 10):
        _, _, waited = next(ahead)
        if slow == "step":
            time.sleep(0.1)
        log.step(step, {"loss": 1.0, "nonfinite": 0}, waited, record=step == 9)
    ahead.close()
    batches.close()
    log.close()
    _, last = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert low < last["perf/data_wait"] < high


@pytest.mark.long
def test_the_rate_of_reading_is_that_of_the_source():
    batches = train(Slow(), dataclasses.replace(CONFIG, threads=1))
    found = measure_reading(batches, seconds=0.5)
    batches.close()
    # 8 may have been read before
    assert 0 < found["images_per_s"] < 50 * (1 + 8 / 20) and found["threads"] == 1
    assert (
        found["record_ms"] >= 20
        and found["image_ms"] > 0
        and found["text_ms"] > 0
        and found["cores_busy"] > 0
    )
    with pytest.raises(ValueError, match="seconds is 0.0, expected a positive number"):
        measure_reading(batches, seconds=0.0)


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("mammut-prefetch")]


def test_prefetch_hands_out_the_state_of_each_batch(tmp_path):
    source = open_set(write_set(tmp_path, 10))
    expected = train(source)
    batches = train(source)
    ahead = prefetch(batches, lambda batch: batch | {"on device": True}, size=3)
    for _ in range(5):
        batch, state, wait = next(ahead)
        assert batch["on device"] and wait >= 0
        assert_same([batch], [next(expected)])
        assert state == expected.state()
    ahead.close()
    assert batches.state()["position"] > state["position"]  # it did read ahead
    assert_same(take(train(source, state=state), 2), take(expected, 2))
    batches.close()
    assert not prefetch_threads()


def test_prefetch_raises_what_its_thread_raised(tmp_path):
    def fail(batch):
        raise RuntimeError("no such device")

    batches = train(open_set(write_set(tmp_path, 10)))
    with pytest.raises(RuntimeError, match="no such device"):
        next(prefetch(batches, fail))
    batches.close()
    assert not prefetch_threads()
    with pytest.raises(ZeroDivisionError):
        next(prefetch(train(Broken()), lambda batch: batch))


def test_a_program_that_fails_while_reading_ahead_ends(tmp_path):
    program = """
from mammut.data import batches as data, sources
from mammut.data.prefetch import prefetch
from mammut.config import DataConfig
from mammut.data.processor import ImageTransform, Processor
from mammut.data.tokenizer import train_sentencepiece
source = sources.open_source("synthetic:train", image_size=16)
tokenizer = train_sentencepiece(["a b", "b a"], 40, True)
processor = Processor(tokenizer, ImageTransform(16), max_length=8)
batches = data.TrainBatches(source, processor, DataConfig(batch_size=64), seed=0)
ahead = prefetch(batches, lambda batch: batch)
next(ahead)
raise SystemExit(7)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 7


# Evaluation batches


def test_evaluation_is_one_pass_in_order_with_a_padded_end(tmp_path):
    batches = list(data.eval_batches(open_set(write_set(tmp_path, 10)), processor(), batch_size=4))
    assert [batch.index.tolist() for batch in batches] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, -1, -1],
    ]
    for batch in batches:
        assert batch.image.shape == (4, SIZE, SIZE, 3) and batch.image.dtype == np.uint8
        np.testing.assert_array_equal(batch.example_valid, batch.index >= 0)
        assert batch.image[:, 0, 0, 0].tolist() == [max(i, 0) for i in batch.index]
        assert said(batch) == [captions_of(i) if i >= 0 else [] for i in batch.index]
    assert not batches[-1].image[2:].any()


def test_evaluation_leaves_bad_rows_empty_and_counts_them(tmp_path):
    spec = write_set(tmp_path, 6)
    (tmp_path / "1.png").write_bytes(b"")
    (batch,) = data.eval_batches(open_set(spec), processor(), batch_size=8, limit=3)
    assert batch.example_valid.tolist() == [True, False, True] + [False] * 5
    assert batch.index.tolist() == [0, 1, 2] + [-1] * 5
    assert batch.bad == {"empty": 1} and batch.examples[1] is None and not batch.image[1].any()


def test_processes_evaluate_parts_of_the_same_batches(tmp_path):
    source = open_set(write_set(tmp_path, 9))
    evaluate = functools.partial(data.eval_batches, source, processor(), batch_size=4)
    whole = list(evaluate())
    parts = [list(evaluate(process_index=p, process_count=2)) for p in range(2)]
    assert len(parts[0]) == len(parts[1]) == len(whole) == 3
    for batch, first, second in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(np.concatenate([first.index, second.index]), batch.index)
        np.testing.assert_array_equal(np.concatenate([first.image, second.image]), batch.image)


# tensorflow-datasets


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A JSONL set with bad lines, prepared by the command: spec, data_dir and its output."""
    folder = tmp_path_factory.mktemp("prepared")
    spec = write_set_with_bad(folder / "set", 20)
    command = [
        sys.executable,
        "-m",
        "mammut.prepare",
        spec,
        "--data-dir",
        str(folder),
        "--name",
        "greys",
    ]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    done = subprocess.run(
        [*command, "--max-bad-share", "0.5"], capture_output=True, text=True, check=True
    )
    return spec, str(folder), refused, done.stdout


def test_a_prepared_set_gives_what_the_jsonl_gives(prepared, monkeypatch):
    spec, folder, _, printed = prepared
    good = [
        batch
        for batch in data.eval_batches(open_set(spec), processor(), batch_size=1)
        if batch.example_valid[0]
    ]
    source = open_set("tfds:greys/train", tfds_dir=folder)
    packed = list(data.eval_batches(source, processor(), batch_size=1))
    assert len(packed) == len(good) == 20
    for ours, theirs in zip(packed, good, strict=True):
        assert said(ours) == said(theirs) and ours.examples[0].key == theirs.examples[0].key
        assert ours.examples[0].image == theirs.examples[0].image.read_bytes()
        np.testing.assert_array_equal(ours.image, theirs.image)
    assert "4 missing field" in printed and "1 truncated" in printed
    assert len(open_set("tfds:greys:1.0.0/train[50%:]", tfds_dir=folder)) == 10
    assert len(open_set(f"tfds:{folder}/greys/1.0.0/train")) == 20
    monkeypatch.setenv("HOME", folder)
    assert (
        len(open_set("tfds:greys/train", tfds_dir="~"))
        == len(open_set("tfds:~/greys/1.0.0/train"))
        == 20
    )
    take(train(source), 6)


def test_a_prepared_set_is_an_ordinary_tfds_set(prepared):
    program = f"""
import sys
import tensorflow_datasets as tfds
records = tfds.builder("greys", data_dir={prepared[1]!r}).as_data_source("train")
record = records[3]
print(len(records), record["image"].shape, record["image"][0, 0], record["captions"][0].decode())
assert "tensorflow" not in sys.modules
"""
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert shown.strip() == "20 (20, 20, 3) [3 3 3] picture number 3"


def test_too_bad_a_set_is_not_prepared(prepared):
    refused = prepared[2]
    assert refused.returncode == 1
    assert (
        refused.stderr.startswith("15 of the 35 examples")
        and "--max-bad-share allows 10%" in refused.stderr
    )


def test_prepare_refuses_what_exists_and_what_it_cannot_name(prepared):
    spec, folder, _, _ = prepared
    with pytest.raises(ValueError, match="exists already"):
        prepare.prepare(spec, folder, "greys", 0.5)
    with pytest.raises(ValueError, match="'My-Set', expected lower-case"):
        prepare.prepare(spec, folder, "My-Set")
    with pytest.raises(ValueError, match="expected jsonl:PATH"):
        prepare.prepare("synthetic:val", folder, "scenes")


@pytest.mark.parametrize("error, status, said", [
    (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
    (KeyboardInterrupt(), 130, "prepare: Ctrl-C: the set is not prepared"),
])  # fmt: skip
def test_what_ends_prepare_is_told_in_one_line(monkeypatch, capsys, error, status, said):
    def ended(*_, **__):
        raise error

    monkeypatch.setattr(prepare, "prepare", ended)
    monkeypatch.setattr(sys, "argv", ["prepare", "jsonl:x", "--data-dir", "x", "--name", "x"])
    with pytest.raises(SystemExit) as exit_:
        prepare._main()
    assert exit_.value.code == status and capsys.readouterr().err == f"{said}\n"


def test_what_tfds_does_not_have_is_named(prepared):
    folder = prepared[1]
    for name in ("absent", "not a name", "/nowhere/absent/1.0.0"):
        with pytest.raises(
            ValueError, match=f"'tfds:{name}/train' is not prepared .*mammut.prepare"
        ) as error:
            open_set(f"tfds:{name}/train", tfds_dir=folder)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="expected one of train"):
        open_set("tfds:greys/test", tfds_dir=folder)


def test_a_set_without_random_access_is_refused(prepared, tmp_path):
    folder = shutil.copytree(f"{prepared[1]}/greys/1.0.0", tmp_path / "greys/1.0.0")
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="prepared as tfrecord, expected array_record"):
        open_set("tfds:greys/train", tfds_dir=str(tmp_path))


def test_captions_as_coco_has_them(tmp_path):
    import tensorflow_datasets as tfds

    def write(name, features, example):
        class Set(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, dl_manager):
                return {"val": iter([(0, example)])}

            def _generate_examples(self):
                raise NotImplementedError

        Set.name = name
        Set(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
        return open_set(f"tfds:{name}/val", tfds_dir=str(tmp_path))

    picture = tfds.features.Image()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "nine.png")
    pixels = (tmp_path / "nine.png").read_bytes()
    nested = tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()})
    said = [{"id": 1, "text": "a cat"}, {"id": 2, "text": "eine Katze, süß"}]
    coco = write(
        "coco_like", {"image": picture, "captions": nested}, {"image": pixels, "captions": said}
    )
    assert coco[0].captions == ["a cat", "eine Katze, süß"]
    assert (processor().image(coco[0].image) == 9).all()
    single = write(
        "single",
        {"image": picture, "text": tfds.features.Text()},
        {"image": pixels, "text": "a cat"},
    )
    assert single[0].captions == ["a cat"] and single[0].key == "tfds:single/val, example 0"
    with pytest.raises(ValueError, match="expected image and one of captions, caption, text"):
        write("labels", {"image": picture, "label": np.int64}, {"image": pixels, "label": 1})


# Real photographs


def test_flickr8k():
    if shared_dir() is None:
        pytest.skip("no shared data")
    source = open_set(f"jsonl:{shared_dir() / 'data/flickr8k'}")
    assert len(source) == 6_000
    assert (
        source[0].captions[1] == "A girl going into a wooden building ."
        and len(source[0].captions) == 5
    )
    (batch,) = data.eval_batches(source, processor(), batch_size=8, limit=8)
    assert batch.example_valid.all() and batch.image.std() > 20
