"""Files that others touch: every field of each, changed in every way, is read or refused by name.

The files are predictions, scores, JSON lines of examples, run.json and config.json. Each is read as
before, as docs/formats.md says, or refused in one sentence that names the file.
"""

import copy
import json
import math
import pathlib

import pytest
from marks import long

from mammut.config import TrainConfig, to_dict
from mammut.data.examples import BadExample
from mammut.data.sources import open_source
from mammut.evaluation.predictions import Predictions
from mammut.evaluation.scores import Scores, load_scores, save_scores
from mammut.evaluation.scoring import EVALUATIONS, load_predictions, require_same_set, score
from mammut.models.compute import ComputeConfig
from mammut.testing import tiny_config
from mammut.training.run_folder import read_run, write_run
from mammut.weights.formats.mammut_folder import read_configs
from mammut.weights.model_card import _scores

DROPPED = object()
OTHERS = {
    "dropped": DROPPED,
    "null": None,
    "a text": "x",
    "a number": 7,
    "a fraction": 0.5,
    "true": True,
    "a list": [],
    "a list of numbers": [1.5],
    "an object": {},
    "NaN": math.nan,
    "infinite": math.inf,
    "negative": -1,
    "huge": 10**400,
    "a huge fraction": 1e300,
    "half a surrogate pair": "\ud800",
}
PATHS = {
    "predictions": "x.predictions.jsonl",
    "scores": "x.json",
    "examples": "set.jsonl",
    "run": "run.json",
    "config": "config.json",
}
SET = "jsonl:set.jsonl"
SETTINGS = {"image_size": 16, "blind": False, "set_notes": ["split test"]}
PREDICTIONS = {
    "caption": Predictions(
        "caption",
        [
            {
                "key": "a.jpg",
                "index": 0,
                "prediction": "a dog",
                "logprob": -1.5,
                "references": ["a dog runs", "a dog"],
            }
        ],
        SET,
        "runs/x",
        SETTINGS | {"num_beams": 4},
        {"corrupt": 2},
    ),
    "vqa": Predictions(
        "vqa",
        [
            {
                "id": "a.jpg#0",
                "key": "a.jpg",
                "index": 0,
                "question": "what?",
                "prediction": "",
                "logprob": -1,
                "too_long": True,
                "answers": ["a dog", "dog"] * 3,
                "answer_type": "other",
                "question_type": "what",
            }
        ],
        SET,
        "runs/x",
        SETTINGS | {"shots": 0},
    ),
    "classify": Predictions(
        "classify",
        [
            {
                "key": "a.jpg",
                "index": 0,
                "label": "dog",
                "ranked": ["cat", "dog"],
                "scores": [0.5, 0.25],
            }
        ],
        SET,
        "runs/x",
        SETTINGS | {"classes": ["cat", "dog"], "untrained": ["cat"], "names_of_set": True},
    ),
    "retrieval": Predictions(
        "retrieval",
        [
            {
                "query": "image",
                "id": 0,
                "key": "a.jpg",
                "index": 0,
                "relevant": [0],
                "ranked": [0],
                "scores": [0.5],
                "rank": 1,
                "reranked": [0],
                "reranked_scores": [-1.5],
            },
            {
                "query": "text",
                "id": 0,
                "text": "a dog",
                "relevant": [0],
                "ranked": [0],
                "scores": [0.5],
                "rank": 1,
                "reranked": [0],
                "reranked_scores": [-1.5],
            },
        ],
        SET,
        "runs/x",
        SETTINGS | {"images": 1, "texts": 1},
    ),
}
EXAMPLE = {
    "file": "a.jpg",
    "captions": ["a dog runs", "a dog"],
    "name": "dog",
    "qa": [
        {
            "question": "what?",
            "question_id": "a.jpg#0",
            "answers": ["a dog", "dog"] * 3,
            "answer_type": "other",
            "question_type": "what",
        }
    ],
}


def fields(value, path=()):
    """The paths of all fields and items within a JSON value."""
    items = []
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for name, inner in items:
        yield (*path, name)
        yield from fields(inner, (*path, name))


def changed(value, path, other):
    """A copy of a JSON value in which one field is another one."""
    value = copy.deepcopy(value)
    *outer, last = path
    within = value
    for name in outer:
        within = within[name]
    if other is DROPPED:
        del within[last]
    else:
        within[last] = other
    return value


def read_predictions(path: pathlib.Path) -> None:
    """Reads, scores and compares as the programs do."""
    predictions = load_predictions(path)
    field = EVALUATIONS[predictions.task].field
    source = open_source(f"jsonl:{path.with_name('set.jsonl')}", image_size=16, field=field)
    scores = score(predictions, java=False)
    save_scores(path.with_name("again.json"), predictions, scores)
    assert load_scores(path.with_name("again.json"))["metrics"] == scores.metrics
    predictions.save(path.with_name("again.predictions.jsonl"))
    require_same_set(predictions, source)


def read_examples(path: pathlib.Path) -> None:
    for field in ("captions", "qa", "name"):
        source = open_source(f"jsonl:{path}", image_size=16, field=field)
        # A name that is not UTF-8 has a key that spells it out.
        assert source[0].key in ("a.jpg", "x", "\\ud800")
        source.pairs(0)


def read_scores(path: pathlib.Path) -> None:
    (path.parent / "eval").mkdir(exist_ok=True)
    (path.parent / "eval" / "x.json").write_bytes(path.read_bytes())
    _scores(path.parent)  # the model card takes what it can read
    load_scores(path)


READERS = {
    "predictions": read_predictions,
    "scores": read_scores,
    "examples": read_examples,
    "run": lambda path: read_run(path.parent),
    "config": lambda path: read_configs(path.parent),
}


def lines_of(kind: str, folder: pathlib.Path, task: str) -> list:
    """The JSON values of a file, one a line."""
    path = folder / PATHS[kind]
    if kind == "predictions":
        PREDICTIONS[task].save(path)
        return list(map(json.loads, path.read_text().splitlines()))
    if kind == "scores":
        save_scores(path, PREDICTIONS[task], score(PREDICTIONS[task], java=False))
    elif kind == "examples":
        return [EXAMPLE]
    elif kind == "run":
        write_run(folder, TrainConfig(), ["--steps", "5"])
        run = json.loads(path.read_text())
        del run["sha256"]  # it would tell of every change
        return [run]
    else:
        configs = {"model": to_dict(tiny_config()), "compute": to_dict(ComputeConfig())}
        return [{"format": "mammut", "version": 2} | configs]
    return [json.loads(path.read_text())]


@pytest.mark.parametrize("kind, task", [
    *(("predictions", task) for task in PREDICTIONS),
    *(("scores", task) for task in PREDICTIONS),
    ("examples", ""),
    long("run", ""),
    long("config", ""),
])  # fmt: skip
def test_a_field_that_is_changed_is_read_or_refused_in_one_sentence(tmp_path, kind, task):
    (tmp_path / "set.jsonl").write_text(json.dumps(EXAMPLE))
    lines = lines_of(kind, tmp_path, task)
    path = tmp_path / PATHS[kind]
    write(path, lines)
    READERS[kind](path)
    refused = 0
    for line, field, (name, other) in (
        (line, field, item)
        for line, value in enumerate(lines)
        for field in fields(value)
        for item in OTHERS.items()
    ):
        own = list(lines)
        own[line] = changed(lines[line], field, other)
        write(path, own)
        try:
            READERS[kind](path)
        except ValueError as error:  # BadExample and CheckpointError are ValueErrors
            refused += 1
            assert type(error) is ValueError or type(error).__module__.startswith("mammut"), name
            # The tests check types at every call, and see a wrong choice before the config does.
            if "Type-check error" not in str(error):
                assert "\n" not in str(error) and len(str(error)) < 1000
        except Exception as error:
            raise AssertionError(f"{field} is {name}: {error!r}") from error
    assert refused > 50


def write(path: pathlib.Path, lines: list) -> None:
    path.write_text("\n".join(map(json.dumps, lines)))


@pytest.mark.parametrize("kind", PATHS)
def test_a_byte_order_mark_is_read(tmp_path, kind):
    (tmp_path / "set.jsonl").write_text(json.dumps(EXAMPLE))
    path = tmp_path / PATHS[kind]
    write(path, lines_of(kind, tmp_path, "caption"))
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    READERS[kind](path)


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("text", ["", "[" * 20_000, "null", "[]", "{}", "7", "\\", '{"a": NaN}'])
def test_a_file_that_holds_something_else_is_refused(tmp_path, kind, text):
    (tmp_path / "set.jsonl").write_text(json.dumps(EXAMPLE))
    path = tmp_path / PATHS[kind]
    path.write_text(text)
    with pytest.raises(ValueError, match=path.name):
        READERS[kind](path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=path.name):
        READERS[kind](path)


def test_a_record_that_is_wrong_is_named_by_its_line(tmp_path):
    path = tmp_path / "x.predictions.jsonl"
    record = PREDICTIONS["caption"].records[0]
    records = [record, record | {"key": "b.jpg", "index": "1"}]
    header = {"format": "mammut predictions", "version": 1, "task": "caption", "records": 2}
    header |= {"data": SET, "checkpoint": "runs/x", "settings": {}, "left_out": {}}
    write(path, [header, *records])
    expected = (
        r"x.predictions.jsonl, line 3, record 1 has no 'index' of type int, at least 0: it is '1'"
    )
    with pytest.raises(ValueError, match=expected):
        load_predictions(path)
    write(path, [header | {"left_out": {"corrupt": "two"}}, *records])
    with pytest.raises(ValueError, match="line 1 has no 'left_out' of type dict"):
        load_predictions(path)


def test_a_name_that_is_not_utf_8_comes_back(tmp_path):
    records = [PREDICTIONS["caption"].records[0] | {"key": "b\udcff.jpg"}]
    predictions = Predictions("caption", records, SET, "runs/\udcff")
    path = tmp_path / "x.predictions.jsonl"
    predictions.save(path)
    assert load_predictions(path) == predictions
    path.read_text(encoding="utf-8")
    save_scores(tmp_path / "x.json", predictions, Scores({}, [], {}))
    assert load_scores(tmp_path / "x.json")["checkpoint"] == "runs/\udcff"


def test_every_field_is_in_the_page(tmp_path):
    page = (pathlib.Path(__file__).parents[1] / "docs" / "formats.md").read_text()
    for kind in ("predictions", "scores", "examples"):
        for task in PREDICTIONS:
            for value in lines_of(kind, tmp_path, task):
                for name in value:
                    assert f"`{name}`" in page, name
    for evaluation in EVALUATIONS.values():
        for name in (*evaluation.record, *evaluation.settings):
            assert f"`{name}`" in page, name


def test_a_bad_example_is_named_by_its_line(tmp_path):
    (tmp_path / "set.jsonl").write_text("\n" + json.dumps(EXAMPLE | {"captions": [7]}))
    source = open_source(f"jsonl:{tmp_path / 'set.jsonl'}", image_size=16)
    with pytest.raises(BadExample, match="set.jsonl, line 2"):
        source[0]
