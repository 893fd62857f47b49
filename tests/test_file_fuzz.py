"""Files of examples, predictions, runs and processors, damaged at random.

Whatever is done to a file, it is read as something defined, or refused by our own error.
"""

import io
import json
import tarfile

import pytest
from fuzz import damaged, mutated, refused
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from mammut.config import TrainConfig
from mammut.core.fields import to_dict
from mammut.core.files import check_manifest, make_manifest
from mammut.data.examples import BadExample, Example
from mammut.data.images import BadImage, ImageTransform
from mammut.data.processor import Processor
from mammut.data.sources import open_source
from mammut.data.tar_files import Damage, read_files
from mammut.evaluation.predictions import Predictions
from mammut.evaluation.scoring import load_predictions, score
from mammut.testing import tiny_processor
from mammut.training.run_folder import read_run, write_run

_fuzzed = settings(
    max_examples=50,
    deadline=5000,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
FIELDS = ("captions", "qa", "name")
RECORD = {
    "file": "0.png",
    "captions": ["a red circle", "one circle"],
    "name": "circle",
    "qa": [{"question": "what color?", "answers": ["red", "Red"], "question_id": 7}],
}
PNG = io.BytesIO()
Image.new("RGB", (4, 3), (255, 0, 0)).save(PNG, "png")
PNG = PNG.getvalue()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Indexes of shards are kept outside of the user's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def read_all(spec: str, field: str) -> None:
    """Reads every example and its picture; each is defined, or bad by a cause."""
    source = refused(lambda: open_source(spec, image_size=16, field=field), ValueError)
    for index in range(len(source) if source else 0):
        example = refused(lambda index=index: source[index], BadExample)
        if example is not None:
            assert_defined(example, field)
            refused(lambda image=example.image: ImageTransform(16)(image), BadImage)
        pairs = refused(lambda index=index: source.pairs(index), BadExample)
        assert pairs is None or all(text for pair in pairs for text in pair[1:])


def assert_defined(example: Example, field: str) -> None:
    texts = [example.key, *example.captions]
    if field == "captions":
        assert example.captions and all(caption.strip() for caption in example.captions)
    elif field == "name":
        assert example.name.strip()
        texts.append(example.name)
    else:
        assert example.qa and len({question.id for question in example.qa}) == len(example.qa)
        for question in example.qa:
            texts += [question.text, question.id, *question.answers]
    for text in texts:
        text.encode()


# --- examples


@pytest.mark.parametrize("field", FIELDS)
@_fuzzed
@given(data=st.data())
def test_lines_damaged_at_random_are_read_or_refused(tmp_path, field, data):
    (tmp_path / "0.png").write_bytes(PNG)
    line = json.dumps(RECORD).encode() + b"\n"
    (tmp_path / "set.jsonl").write_bytes(data.draw(damaged(2 * line)))
    read_all(f"jsonl:{tmp_path}/set.jsonl", field)


@pytest.mark.parametrize("field", FIELDS)
@_fuzzed
@given(record=mutated(RECORD))
def test_a_line_with_any_value_is_read_or_refused(tmp_path, field, record):
    (tmp_path / "0.png").write_bytes(PNG)
    (tmp_path / "set.jsonl").write_text(json.dumps(record) + "\n")
    read_all(f"jsonl:{tmp_path}/set.jsonl", field)


def tar_of(files: dict[str, bytes], form: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, content in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return file.getvalue()


FORMS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
LONG = "long/" * 30 + "é"  # a name that takes a header of its own


@pytest.mark.parametrize("form", FORMS)
@_fuzzed
@given(data=st.data())
def test_a_shard_damaged_at_random_is_read_or_refused(tmp_path, form, data):
    name = LONG if form != tarfile.USTAR_FORMAT else "short"
    shard = tar_of({f"{name}.png": PNG, f"{name}.json": json.dumps(RECORD).encode()}, form)
    (tmp_path / "0.tar").write_bytes(data.draw(damaged(shard.rstrip(b"\0") + bytes(1024))))
    read_all(f"tar:{tmp_path}/0.tar", data.draw(st.sampled_from(FIELDS)))


def with_checksum(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header)


@_fuzzed
@given(data=st.data())
def test_a_header_with_any_field_and_the_right_checksum_is_read_or_refused(tmp_path, data):
    """The checksum is made right after the damage: the fields are read, whatever they say."""
    shard = bytearray(tar_of({"0.png": PNG, "0.txt": b"a red circle"}, tarfile.GNU_FORMAT))
    at = data.draw(st.sampled_from([0, 512 * (2 + len(PNG) // 512)]))
    header = shard[at : at + 512]
    for _ in range(data.draw(st.integers(1, 3))):
        start, end = data.draw(
            st.sampled_from([(0, 100), (124, 136), (156, 157), (257, 265), (345, 500)])
        )
        value = data.draw(
            st.binary(max_size=end - start)
            | st.sampled_from([b"", b"7" * 12, b"\x80" + b"\xff" * 11, b"-1", b"L", b"x", b"5"])
        )[: end - start]
        header[start : start + len(value)] = value
    shard[at : at + 512] = with_checksum(header)
    (tmp_path / "0.tar").write_bytes(shard)
    read_all(f"tar:{tmp_path}/0.tar", "captions")


@_fuzzed
@given(records=st.lists(st.binary(max_size=12) | st.sampled_from([b"12 path=ab\n", b"9 size=1\n"])))
def test_pax_records_of_anything_are_read_or_refused(records):
    content = b"".join(records)
    header = bytearray(512)
    header[:1], header[124:135], header[156:157] = b"x", f"{len(content):011o}".encode(), b"x"
    tar = with_checksum(header) + content + bytes(-len(content) % 512)
    tar += tar_of({"0.txt": b"a red circle"}, tarfile.USTAR_FORMAT)
    refused(lambda: list(read_files(lambda at, size: tar[at : at + size], len(tar))), Damage)


# --- predictions

PREDICTIONS = {
    "caption": {"key": "0.png", "index": 0, "prediction": "a", "logprob": -1.0,
                "references": ["a"]},
    "vqa": {"id": "7", "key": "0.png", "index": 0, "question": "what?", "prediction": "red",
            "logprob": -1.0, "answers": ["red"], "answer_type": "other", "question_type": "what"},
    "classify": {"key": "0.png", "index": 0, "label": "a", "ranked": ["a", "b"],
                 "scores": [0.5, 0.1]},
    "retrieval": {"query": "text", "id": 0, "text": "a", "relevant": [0], "ranked": [0],
                  "scores": [0.5]},
}  # fmt: skip


def lines_of(task: str, record: dict) -> list:
    settings = {"classes": ["a", "b"], "images": 1, "texts": 1}
    header = {"format": "mammut predictions", "version": 1, "task": task, "records": 1}
    return [header | {"data": "d", "checkpoint": "c", "settings": settings, "left_out": {}}, record]


def load_and_score(path) -> None:
    predictions = refused(lambda: load_predictions(path), ValueError, str(path))
    if predictions is not None and predictions.task != "caption":  # its scorers are not ours
        metrics = refused(lambda: score(predictions).metrics, ValueError)
        assert metrics is None or all(isinstance(name, str) for name in metrics)


@pytest.mark.parametrize("task", PREDICTIONS)
@_fuzzed
@given(data=st.data())
def test_predictions_damaged_at_random_are_read_or_refused(tmp_path, task, data):
    path = tmp_path / "x.predictions.jsonl"
    lines = lines_of(task, PREDICTIONS[task])
    whole = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(whole)
    assert isinstance(load_predictions(path), Predictions)
    path.write_bytes(data.draw(damaged(whole)))
    load_and_score(path)


@pytest.mark.parametrize("task", PREDICTIONS)
@_fuzzed
@given(data=st.data())
def test_predictions_with_any_value_are_read_or_refused(tmp_path, task, data):
    path = tmp_path / "x.predictions.jsonl"
    lines = data.draw(mutated(lines_of(task, PREDICTIONS[task])))
    assume(isinstance(lines, list))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    load_and_score(path)


# --- the files of runs and models


@pytest.fixture(scope="module")
def run_file(tmp_path_factory) -> dict:
    """What `run.json` holds, without the checksum that would tell of every change."""
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, TrainConfig(), ["--seed", "0"])
    run = json.loads((folder / "run.json").read_text())
    del run["sha256"]
    return run


@_fuzzed
@given(data=st.data())
def test_the_file_of_a_run_damaged_at_random_is_read_or_refused(tmp_path, run_file, data):
    content = json.dumps(run_file).encode()
    (tmp_path / "run.json").write_bytes(data.draw(damaged(content)))
    assert_run_is_read_or_refused(tmp_path)


@_fuzzed
@given(data=st.data())
def test_the_file_of_a_run_with_any_value_is_read_or_refused(tmp_path, run_file, data):
    (tmp_path / "run.json").write_text(json.dumps(data.draw(mutated(run_file))))
    assert_run_is_read_or_refused(tmp_path)


def assert_run_is_read_or_refused(folder) -> None:
    run = refused(lambda: read_run(folder, resume=True), ValueError, str(folder))
    if run is not None:
        config, overrides = run[:2]
        json.dumps(to_dict(config))
        assert isinstance(config, TrainConfig) and all(isinstance(x, str) for x in overrides)


@_fuzzed
@given(data=st.data())
def test_a_processor_with_any_value_is_read_or_refused(tmp_path, data):
    tiny_processor().save(tmp_path)
    values = json.loads((tmp_path / "processor.json").read_text())
    (tmp_path / "processor.json").write_text(json.dumps(data.draw(mutated(values))))
    processor = refused(lambda: Processor.load(tmp_path), ValueError, str(tmp_path))
    if processor is not None:
        tokens, valid = processor.encode_text(["one red circle"])
        assert tokens.shape == valid.shape == (1, processor.max_length)


@_fuzzed
@given(data=st.data())
def test_a_manifest_with_any_value_tells_of_problems_unless_it_fits(tmp_path, data):
    file = tmp_path / "a"
    file.write_bytes(b"content")
    entry = make_manifest(tmp_path, [file])["a"]
    values = data.draw(mutated({"a": entry}))
    (tmp_path / "manifest").write_text(json.dumps(values))
    problems = check_manifest(tmp_path, tmp_path / "manifest")
    assert not any("\n" in problem for problem in problems)
    if not problems:
        assert "a" not in values or values["a"].items() >= entry.items()
