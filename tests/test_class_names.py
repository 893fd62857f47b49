"""The classes that a model was trained to name: kept with it, and the default of eval.classify."""

import collections
import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest

import mammut
from eval import classify
from mammut.config import DataConfig, MeshConfig, TrainConfig
from mammut.core import sharding
from mammut.data.processor import Classes, Processor
from mammut.data.sources import open_source
from mammut.evaluation.classification import score_classes
from mammut.evaluation.metrics.rankings import chance_recall
from mammut.evaluation.predictions import Predictions
from mammut.evaluation.predictor import Predictor
from mammut.evaluation.scoring import score
from mammut.testing import tiny_config, tiny_model, tiny_processor
from mammut.training.log import RunLog
from mammut.training.new_processor import make_processor
from mammut.training.validation import ValidationResult, _classes_of

FLOWERS = ("daisy", "rose", "tulip")


@pytest.fixture
def by_class(tmp_path):
    """The spec of a file that is sorted by class, 4 lines of each."""
    lines = [{"file": f"{i}.jpg", "name": FLOWERS[i // 4]} for i in range(12)]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return f"jsonl:{tmp_path / 'set.jsonl'}"


def names(spec):
    return open_source(spec, image_size=16, field="name")


def trained_processor(classes: Classes | None) -> Processor:
    processor = tiny_processor()
    processor.classes = classes
    return processor


def test_classes_are_kept_with_the_model(tmp_path):
    classes = Classes(FLOWERS, "a {}")
    mammut.save(tmp_path / "model", tiny_model(), trained_processor(classes))
    assert mammut.load(tmp_path / "model")[1].classes == classes
    mammut.save(tmp_path / "other", tiny_model(), tiny_processor())
    assert mammut.load(tmp_path / "other")[1].classes is None
    assert "classes" not in json.loads((tmp_path / "other" / "processor.json").read_text())


@pytest.mark.parametrize("wrong", [
    {"names": []}, {"names": ["a", "a"]}, {"names": [1]}, {"names": None}, {"template": "a"},
    {"method": "luck"}, [], "x",
])  # fmt: skip
def test_classes_that_are_none_are_refused_with_their_file(tmp_path, wrong):
    trained_processor(Classes(FLOWERS)).save(tmp_path)
    values = json.loads((tmp_path / "processor.json").read_text())
    values["classes"] = values["classes"] | wrong if isinstance(wrong, dict) else wrong
    (tmp_path / "processor.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="processor.json"):
        Processor.load(tmp_path)


@pytest.mark.parametrize("task, prompt, expected", [
    ("classify", "{}", Classes(FLOWERS[1:], "{}")),
    ("classify", "a photo of a {}", Classes(FLOWERS[1:], "a photo of a {}")),
    ("caption", "{}", None),
])  # fmt: skip
def test_a_run_keeps_the_names_of_its_training_set(tmp_path, by_class, task, prompt, expected):
    """The validation set is the slice of the first class alone."""
    tiny_processor().save(tmp_path / "start")
    data = DataConfig(train=f"{by_class}[4:]", val=f"{by_class}[:4]", prompt=prompt)
    tokenizer = mammut.TokenizerConfig(path=str(tmp_path / "start" / "tokenizer.model"))
    config = TrainConfig(task=task, model=tiny_config(), data=data, tokenizer=tokenizer)
    assert make_processor(config, names(data.train), {}).classes == expected


def test_validation_chooses_among_the_names_of_training_and_says_what_is_missing(by_class, capsys):
    """An untrained model would be right with every image if the slice's own name were all."""
    processor = trained_processor(Classes(FLOWERS[1:], "a {}"))
    assert _classes_of(names(f"{by_class}[4:6]"), processor, "") == ([*FLOWERS[1:]], "a {}")
    assert capsys.readouterr().out == ""
    found, _ = _classes_of(names(f"{by_class}[:4]"), processor, "")
    assert sorted(found) == sorted(FLOWERS)
    said = capsys.readouterr().out
    assert "1 of 1 names of" in said and "not in the training set, such as 'daisy'" in said


@pytest.fixture
def asked(monkeypatch, by_class):
    """What eval.classify asks of a model with these classes."""

    def ask(classes: Classes | None, *argv):
        calls = {}

        def predict_classes(predictor, params, source, classes, **settings):
            calls.update(settings, classes=list(classes))
            return Predictions("classify", [{"key": "a"}], source.spec, "here")

        monkeypatch.setattr(classify, "predict_classes", predict_classes)
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        settings = {"checkpoint": "here", "batch_size": 1}
        predictor = Predictor(lambda _: tiny_model(), trained_processor(classes), mesh, **settings)
        options = classify.Options("here", data=by_class, **dict(argv))
        calls["result"] = classify.predict(predictor, {}, names(by_class), options)
        return calls

    return ask


def test_a_model_is_asked_as_it_was_trained(asked, tmp_path):
    trained = asked(Classes((*FLOWERS, "iris"), "a {}"))
    assert trained["classes"] == [*FLOWERS, "iris"]
    assert trained["method"] == "likelihood" and trained["templates"] == ("a {}",)

    other = asked(None)
    assert other["classes"] == list(FLOWERS) and other["method"] == "contrastive"
    assert "a photo of a {}." in other["templates"]
    assert other["result"].settings["names_of_set"]

    given = asked(Classes(FLOWERS), ("method", "contrastive"), ("templates", ("x {}",)))
    assert given["method"] == "contrastive" and given["templates"] == ("x {}",)
    (tmp_path / "names.json").write_text('["rose", "iris"]')
    given = asked(Classes(FLOWERS), ("classes", tmp_path / "names.json"))
    assert given["classes"] == ["rose", "iris"] and given["method"] == "likelihood"


def classified(labels, classes, **settings) -> Predictions:
    records = [
        {"key": str(i), "index": i, "label": label, "ranked": list(classes)[:5]}
        for i, label in enumerate(labels)
    ]
    return Predictions("classify", records, "set", "here", {"classes": list(classes), **settings})


def test_the_chance_level_and_missing_names_stand_beside_the_scores():
    scores = score_classes(classified(["rose", "daisy"], FLOWERS))
    assert scores.chance == {"top1": 1 / 3, "top5": 1.0, "mean_per_class_recall": 1 / 3}
    assert any("1 of 3 classes have no image here, such as 'tulip'" in n for n in scores.notes)
    (only,) = score_classes(classified(["rose"], ["rose"])).notes
    assert "'rose' is the only class: every image is right, whatever the model" in only
    untrained = score_classes(classified(FLOWERS, FLOWERS, untrained=["rose"], names_of_set=True))
    assert any(
        "1 of 3 classes are not among those that the model was" in n for n in untrained.notes
    )
    assert any("the classes are the names in this set" in note for note in untrained.notes)


def test_the_log_of_a_run_says_the_chance_level(tmp_path, capsys):
    predictions = classified(["rose", "daisy"], FLOWERS)
    metrics = {"top1": 0.5}
    evaluation = ValidationResult(metrics, [predictions], num_images=2, num_texts=2, bad={})
    with contextlib.closing(RunLog(tmp_path, start=0, steps=1, batch_size=1, silent=False)) as log:
        log.evaluation(1, "val", evaluation, samples=0)
    assert "(chance top-1 33.3%)" in capsys.readouterr().out


def test_chance_recall_is_that_of_random_rankings():
    """Counted over random rankings; 3 of 7 candidates are right, or 1."""
    rng = np.random.default_rng(0)
    relevant = [[0, 1, 2], [4]]
    expected = chance_recall(relevant, 7)
    found = collections.Counter()
    for _ in range(4000):
        order = rng.permutation(7).tolist()
        for right in relevant:
            rank = min(map(order.index, right))
            found.update({f"r{k}": 1 for k in (1, 5, 10) if rank < k})
    for name, value in expected.items():
        assert found[name] / 8000 == pytest.approx(value, abs=0.02)
    assert expected["r1"] == pytest.approx((3 / 7 + 1 / 7) / 2) and expected["r10"] == 1


def test_retrieval_has_its_chance_level():
    records = [
        {"query": query, "id": i, "relevant": [i], "ranked": [0, 1, 2, 3]}
        for query in ("image", "text")
        for i in range(4)
    ]
    settings = {"images": 4, "texts": 4}
    scores = score(Predictions("retrieval", records, "set", "here", settings))
    assert scores.chance["t2i_r1"] == scores.chance["i2t_r1"] == 1 / 4
    assert scores.chance["mean_recall"] == pytest.approx((1 / 4 + 1 + 1) / 3)
    assert dataclasses.asdict(scores)["chance"] == scores.chance
