"""The evaluation programs end to end: predictions, scores, scores without a model, refusals."""

import importlib
import json
import shutil

import numpy as np
import pytest
from embedding_recall import embedding_recall
from PIL import Image

import mammut
from mammut.evaluation.metrics import captions
from mammut.evaluation.predictions import Predictions
from mammut.evaluation.scoring import score
from mammut.testing import tiny_model, tiny_processor
from mammut.weights.files.tensor_file import open_tensors, write_sharded
from mammut.weights.formats import open_clip
from mammut.weights.model_folder import open_model

COLOURS = ("red", "green", "blue", "yellow")
PROGRAMS = {
    "caption": ["--num-beams", "2"],
    "vqa": [],
    "retrieval": ["--rerank", "2"],
    "classify": ["--templates", "one {}", "{} right"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and 10 pictures with captions, questions and names; one picture is broken."""
    folder = tmp_path_factory.mktemp("programs")
    model = tiny_model()
    model.text.token_embed.embedding[...] *= 3
    mammut.save(folder / "model", model, tiny_processor())
    lines = []
    for i in range(10):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)).save(
            folder / f"{i}.png"
        )
        qa = [{"question": "right?", "answers": ["yes"] * 8 + ["no"] * 2, "answer_type": "yes/no"}]
        qa += [
            {"question": "<b>one</b> & 'red'", "answers": ["one red circle", "red", "red", "red"]}
        ] * (i % 2)
        qa = [
            question | {"answer_type": "other"} if "one" in question["question"] else question
            for question in qa
        ]
        captions = [f"one {COLOURS[i % 4]} circle on the left", f"one {COLOURS[i % 4]} square"]
        lines.append(
            {"file": f"{i}.png", "captions": captions, "qa": qa, "name": f"{COLOURS[i % 4]} circle"}
        )
    (folder / "4.png").write_bytes(b"broken")
    (folder / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "empty.jsonl").write_text("\n")
    for name in ("other", "mute", "open"):
        own = json.loads(json.dumps(lines))
        for line in own:
            if name == "other":
                line["captions"][0] += " or right"
            elif name == "mute":
                line["captions"] = []
            else:
                line["qa"] = [question | {"answers": []} for question in line["qa"]]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, own)))
    return folder


def run(name: str, *argv: str) -> None:
    importlib.import_module(f"eval.{name}").main([str(arg) for arg in argv])


def ask(folder, name: str, out, *argv: str, data: str = "set.jsonl") -> None:
    common = ["--data", f"jsonl:{folder / data}", "--batch-size", "8", "--out", str(out)]
    run(name, folder / "model", *common, *PROGRAMS[name], *argv)


@pytest.fixture(scope="module", autouse=True)
def java_asked_once():
    """Java takes seconds to start: the METEOR of the same captions is kept."""
    known, meteor = {}, captions._meteor

    def once(truth, predicted):
        asked = json.dumps([truth, predicted])
        if asked not in known:
            known[asked] = meteor(truth, predicted)
        return known[asked]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captions, "_meteor", once)
        yield


@pytest.fixture(scope="module")
def results(folder):
    """What every program wrote: its scores and its predictions file."""
    written = {}
    for name in PROGRAMS:
        out = folder / "results" / f"{name}.json"
        ask(folder, name, out)
        written[name] = json.loads(out.read_text()), out.with_name(f"{name}.predictions.jsonl")
    return written


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_writes_predictions_and_scores_of_them(results, name):
    scores, path = results[name]
    predictions = Predictions.load(path, name)
    assert scores["metrics"] == json.loads(json.dumps(score(predictions).metrics))
    assert scores["left_out"] == predictions.left_out == {"corrupt": 1}
    assert any("corrupt" in note for note in scores["notes"])
    assert scores["data"].endswith("set.jsonl") and scores["checkpoint"].endswith("model")
    assert all(
        np.isfinite(value) for value in scores["metrics"].values() if isinstance(value, float)
    )


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_file_is_scored_again_without_the_model_and_checked_against_its_set(
    results, folder, tmp_path, name
):
    scores, path = results[name]
    copy = tmp_path / "moved.predictions.jsonl"
    shutil.copy(path, copy)
    run(name, copy, "--data", f"jsonl:{folder / 'set.jsonl'}")
    assert json.loads((tmp_path / "moved.json").read_text())["metrics"] == scores["metrics"]


def test_the_scores_are_those_of_the_set(results, folder):
    said = results["caption"][0]["metrics"]
    assert {"bleu_1", "bleu_4", "rouge_l", "cider"} <= said.keys() and said["bleu_1"] > 0
    vqa = results["vqa"][0]
    assert vqa["items"] == {"questions": 9 + 5} and set(vqa["metrics"]["by_answer_type"]) == {
        "yes/no",
        "other",
    }
    assert vqa["metrics"]["most_common_exact_match"] == 9 / 14
    classify = results["classify"][0]
    assert classify["settings"]["classes"] == sorted(f"{colour} circle" for colour in COLOURS)
    assert classify["metrics"]["top5"] == 1.0

    model, processor = mammut.load(folder / "model")
    lines = [json.loads(line) for i, line in enumerate((folder / "set.jsonl").open()) if i != 4]
    batch = processor(images=[folder / line["file"] for line in lines])
    texts = processor(text=[text for line in lines for text in line["captions"]])
    recall = embedding_recall(
        np.asarray(model.encode_image(batch["image"])),
        np.asarray(model.encode_text(texts["tokens"], texts["text_valid"])),
        np.repeat(range(9), 2),
    )
    retrieval = results["retrieval"][0]["metrics"]
    assert {name: retrieval[name] for name in recall} == pytest.approx(recall)
    assert "t2i_r1_reranked" in retrieval and retrieval["t2i_r5_reranked"] == retrieval["t2i_r5"]


@pytest.fixture
def refusal(folder, tmp_path, capsys):
    """The one sentence with which a program ends, having written no scores."""

    def refuse(name: str, *argv: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            run(name, *argv, "--out", tmp_path / "x.json")
        message = stopped.value.code
        assert (
            isinstance(message, str)
            and message.startswith(f"python -m eval.{name}: ")
            and "\n" not in message
        )
        assert not (tmp_path / "x.json").exists()
        return message

    return refuse


def test_predictions_of_another_set_are_refused(results, folder, refusal):
    other = ["--data", f"jsonl:{folder / 'other.jsonl'}"]
    assert "were made on another set" in refusal("caption", results["caption"][1], *other)
    fewer = ["--data", f"jsonl:{folder / 'set.jsonl'}[:3]"]
    assert "is not there, it has 3" in refusal("retrieval", results["retrieval"][1], *fewer)
    shifted = ["--data", f"jsonl:{folder / 'set.jsonl'}[1:]"]
    assert "the predictions have '0.png'" in refusal("classify", results["classify"][1], *shifted)
    assert "holds predictions of task 'vqa', expected 'caption'" in refusal(
        "caption", results["vqa"][1]
    )


@pytest.mark.parametrize("name, argv, message", [
    ("caption", [], "--data is missing"),
    ("caption", ["--data", "jsonl:{}/empty.jsonl"], "is empty, expected at least one example"),
    ("caption", ["--data", "jsonl:{}/mute.jsonl"], "10 of 10 examples of"),
    ("caption", ["--data", "jsonl:{}/set.jsonl", "--max-bad-share", "0.05"],
     "max_bad_share allows 5%"),
    ("caption", ["--data", "jsonl:{}/set.jsonl", "--batch-size", "0"],
     "--batch-size is 0, expected at least 1"),
    ("caption", ["--data", "jsonl:{}/set.jsonl", "--batch-size", "3"],
     "--batch-size 3 does not divide over the 8"),
    ("caption", ["--data", "jsonl:{}/set.jsonl", "--batch-size", "8", "--num-beams", "99"],
     "num_beams"),
    ("caption", ["--data", "jsonl:{}/set.jsonl", "--limit", "0"], "--limit is 0"),
    ("classify", ["--data", "jsonl:{}/set.jsonl", "--batch-size", "8", "--templates", "a"],
     "expected a text with {}"),
    ("retrieval", ["--data", "nonsense:x"], "data source 'nonsense:x'"),
])  # fmt: skip
def test_what_cannot_work_is_refused_in_one_sentence(refusal, folder, name, argv, message):
    argv = [arg.replace("{}", str(folder)) if "jsonl" in arg else arg for arg in argv]
    assert message in refusal(name, folder / "model", *argv)


def test_a_folder_without_a_model_is_refused(refusal, folder):
    assert "there is no " in refusal(
        "vqa", folder / "nowhere", "--data", f"jsonl:{folder / 'set.jsonl'}"
    )


def test_questions_without_answers_are_answered_and_not_scored(folder, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        ask(folder, "vqa", tmp_path / "x.json", data="open.jsonl")
    assert "15 of 15 questions" in stopped.value.code or "14 of 14 questions" in stopped.value.code
    predictions = Predictions.load(tmp_path / "x.predictions.jsonl", "vqa")
    assert len(predictions.records) == 14 and not (tmp_path / "x.json").exists()


def test_labels_that_are_not_among_the_classes_are_refused(folder, tmp_path):
    (tmp_path / "classes.json").write_text('["red circle", "blue circle"]')
    with pytest.raises(SystemExit) as stopped:
        ask(folder, "classify", tmp_path / "x.json", "--classes", str(tmp_path / "classes.json"))
    assert "'1.png' is 'green circle', not one of the 2 classes" in stopped.value.code


def test_two_model_files_of_one_folder_have_their_own_scores(folder, tmp_path):
    """One of them in shards, whose index is a model and not predictions."""
    vision = {
        "image_size": 16,
        "patch_size": 8,
        "width": 32,
        "layers": 2,
        "head_width": 16,
        "pool_type": "avg",
    }
    text = {
        "context_length": 12,
        "vocab_size": 60,
        "width": 24,
        "heads": 3,
        "layers": 4,
        "cross_attn_ratio": 2,
    }
    model_cfg = {"embed_dim": 24, "vision_cfg": vision, "multimodal_cfg": text, "custom_text": True}
    config = open_clip.model_config(model_cfg, None, "it")
    mammut.save(tmp_path / "ours", tiny_model(config), tiny_processor(config))
    open_clip.save(tmp_path, open_model(tmp_path / "ours"))
    tensors = open_tensors(tmp_path / "open_clip_model.safetensors")
    write_sharded(tmp_path, "large", tensors.specs, tensors.read, max_bytes=100_000)
    for name in ("open_clip_model.safetensors", "large.safetensors.index.json"):
        run(
            "retrieval",
            tmp_path / name,
            "--data",
            f"jsonl:{folder / 'set.jsonl'}",
            "--batch-size",
            "8",
        )
    scores = [json.loads(path.read_text()) for path in (tmp_path / "eval").glob("*.json")]
    found = {values["checkpoint"] for values in scores}
    assert found == {
        str(tmp_path / "open_clip_model.safetensors"),
        str(tmp_path / "large.safetensors.index.json"),
    }
