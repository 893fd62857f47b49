"""The evaluation programs end to end: predictions, scores, scores without a model, refusals."""

import dataclasses
import errno
import importlib
import io
import json
import pathlib
import shutil
from collections import Counter

import jax
import numpy as np
import pytest
from embedding_recall import embedding_recall
from PIL import Image

import mammut
from eval import caption, classify, program, report, retrieval, speed, vqa
from mammut.config import VideoConfig
from mammut.data.video import VideoTransform
from mammut.evaluation.metrics import captions
from mammut.evaluation.predictions import PREDICTIONS_SUFFIX, PartialFile, Predictions
from mammut.evaluation.predictor import Predictor
from mammut.evaluation.scores import load_scores, require_same_result
from mammut.evaluation.scoring import load_predictions, score
from mammut.models.video import paper_tubes
from mammut.testing import tiny_config, tiny_model, tiny_processor
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
    ("caption", ["--threads", "-1"], "--threads is -1, expected at least 1"),
    ("caption", ["--image-size", "0"], "--image-size is 0, expected at least 1"),
    ("caption", ["--num-beams", "0"], "--num-beams is 0, expected at least 1"),
    ("caption", ["--length-penalty", "inf"], "--length-penalty is inf, expected a number from -10"),
    ("vqa", ["--num-beams", "-3"], "--num-beams is -3, expected at least 1"),
    ("vqa", ["--max-bad-share", "nan"], "--max-bad-share is nan, expected a number from 0 to 1"),
    ("vqa", ["--max-bad-share", "1.5"], "--max-bad-share is 1.5, expected a number from 0 to 1"),
    ("retrieval", ["--rerank", "-1"], "--rerank is -1, expected at least 0"),
    ("retrieval", ["--prior", "nan"], "--prior is nan, expected a number from 0 to 1"),
    ("classify", ["--prior", "-0.5"], "--prior is -0.5, expected a number from 0 to 1"),
    ("classify", ["--prior", "inf"], "--prior is inf, expected a number from 0 to 1"),
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


# Names of files


def default_out(options, checkpoint="model", task="caption") -> pathlib.Path:
    return program._default_out(pathlib.Path(checkpoint), task, options)


def test_every_option_that_changes_the_result_has_a_file_of_its_own(tmp_path):
    checkpoint = str(tmp_path)
    data = {
        "slices": ("jsonl:s[:200]", "jsonl:s[200:]", "jsonl:s"),
        "other scripts": ("jsonl:写真.jsonl", "jsonl:фото.jsonl", "jsonl:写真", "jsonl:\udcff"),
        "equal endings": (f"jsonl:a/{'x' * 80}.jsonl", f"jsonl:b/{'x' * 80}.jsonl"),
        "marks": ("jsonl:a-b", "jsonl:a_b", "jsonl:a b"),
        "long": ("jsonl:" + "写" * 400,),
    }
    options = [caption.Options(checkpoint, data=one) for group in data.values() for one in group]
    own = [
        {"num_beams": 1},
        {"prompt": "a"},
        {"blind": True},
        {"limit": 7},
        {"image_size": 32},
        {"length_penalty": 0.5},
        {"max_new_tokens": 4},
        {"shots": 2},
        {"shots": 2, "shots_seed": 1},
        {"shots": 2, "shots_data": "jsonl:other"},
        {"shots": 2, "instruction": "a"},
    ]
    options += [caption.Options(checkpoint, data="jsonl:s", **changed) for changed in own]
    names = [default_out(item, checkpoint).name for item in options]
    assert len(set(names)) == len(names)
    assert all(
        len(name.encode()) + len(".predictions.jsonl.12345678.partial") < 255 for name in names
    )
    assert any("写真" in name for name in names)
    rankings = [{}, {"rerank": 5}, {"rerank": 5, "prior": 0.5}]
    classes = [
        {},
        {"method": "likelihood"},
        {"templates": ("{}",)},
        {"classes": tmp_path / "a.json"},
    ]
    for kind, changes in ((retrieval.Options, rankings), (classify.Options, classes)):
        found = {
            default_out(kind(checkpoint, data="jsonl:s", **own), checkpoint) for own in changes
        }
        assert len(found) == len(changes)


def test_an_option_that_does_not_change_the_result_has_the_same_file(tmp_path):
    plain = vqa.Options("model", data="jsonl:s")
    other = vqa.Options("./model", data="jsonl:s", batch_size=8, threads=1, max_bad_share=0.5)
    assert default_out(plain, tmp_path) == default_out(other, tmp_path)
    files = [tmp_path / "a-b.npz", tmp_path / "a_b.npz"]
    assert len({default_out(plain, file) for file in files}) == 2


def test_a_set_is_read_as_videos_where_the_model_or_the_options_say_so():
    processor = tiny_processor()
    video_of = program._video_of
    assert video_of(vqa.Options("model"), processor) is None
    assert video_of(vqa.Options("model", frames=4), processor) == VideoTransform(4)
    with pytest.raises(ValueError, match="--shuffle-frames is given for pictures"):
        video_of(vqa.Options("model", shuffle_frames=True), processor)
    processor.video = VideoTransform(16, fps=5.0)
    assert video_of(vqa.Options("model"), processor) == processor.video
    shuffled = video_of(vqa.Options("model", frames=1, shuffle_frames=True), processor)
    assert shuffled == VideoTransform(1, fps=5.0, shuffled=True)


def test_a_relative_set_of_another_directory_has_another_file(tmp_path, monkeypatch):
    folders = [tmp_path / "a", tmp_path / "b"]
    found = {}
    for data in ("jsonl:val.jsonl", f"jsonl:{tmp_path}/val.jsonl", "synthetic:val"):
        found[data] = set()
        for folder in folders:
            folder.mkdir(exist_ok=True)
            monkeypatch.chdir(folder)
            found[data].add(default_out(vqa.Options("model", data=data), tmp_path))
    assert [len(names) for names in found.values()] == [2, 1, 1]


@pytest.mark.parametrize("kind, changed", [
    (classify.Options, {"classes": pathlib.Path("names.json")}),
    (caption.Options, {"shots": 1, "shots_data": "jsonl:train.jsonl"}),
    (caption.Options, {"data": "coco:/annotations.json,images"}),
    (caption.Options, {"data": "tfds:coco/val", "tfds_dir": "sets"}),
])  # fmt: skip
def test_a_relative_file_of_another_directory_makes_another_file(
    tmp_path, monkeypatch, kind, changed
):
    found = set()
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        monkeypatch.chdir(folder)
        found.add(default_out(kind("model", **({"data": "jsonl:/s"} | changed)), tmp_path))
    assert len(found) == 2


def test_files_of_another_result_are_not_replaced(results, folder, tmp_path):
    scores, path = results["retrieval"]
    out = path.with_name("retrieval.json")
    before = path.read_bytes(), out.read_bytes()
    asked = ["--data", f"jsonl:{folder / 'set.jsonl'}", "--batch-size", "8", "--out", out]
    for changed in (["--rerank", "3"], ["--rerank", "2", "--blind"], []):
        with pytest.raises(SystemExit) as stopped:
            run("retrieval", folder / "model", *asked, *changed)
        assert f"{out} holds another result (its options is " in stopped.value.code
        assert "give another --out, or --overwrite" in stopped.value.code
    with pytest.raises(SystemExit) as stopped:
        run("vqa", folder / "model", *asked)
    assert "its task is 'retrieval', not 'vqa'" in stopped.value.code
    assert (path.read_bytes(), out.read_bytes()) == before

    # The same options again, and a file that is scored again.
    options = load_predictions(path).settings["options"]
    assert options == {"data": f"jsonl:{folder / 'set.jsonl'}", "rerank": 2}
    result = {"task": "retrieval", "checkpoint": str(folder / "model"), "options": options}
    require_same_result(path, result)
    require_same_result(out, result)
    run("retrieval", path)
    assert json.loads(out.read_text()) == scores

    copy = tmp_path / f"x{PREDICTIONS_SUFFIX}"
    shutil.copy(path, copy)
    shutil.copy(results["vqa"][1].with_name("vqa.json"), tmp_path / "x.json")
    with pytest.raises(SystemExit, match="x.json holds another result"):
        run("retrieval", copy)
    run("retrieval", copy, "--overwrite")
    assert load_scores(tmp_path / "x.json")["metrics"] == scores["metrics"]
    with pytest.raises(SystemExit, match="expected a name that ends in .json"):
        run("retrieval", copy, "--out", copy)


@pytest.fixture(scope="module")
def asked_as_videos(folder):
    """Asks a model that is never run; returns the notes of the scores."""

    def predict(predictor, params, source, options):
        records = [{"key": "0.png", "index": 0, "label": "a", "ranked": ["a", "b"]}]
        return predictor.predictions(
            "classify", records, source, Counter(), {"classes": ["a", "b"]}
        )

    def ask(config, frames: int) -> list[str]:
        mammut.save(folder / "videos", tiny_model(config), tiny_processor(), overwrite=True)
        argv = [str(folder / "videos"), "--data", f"jsonl:{folder / 'set.jsonl'}", "--overwrite"]
        argv += ["--out", str(folder / "videos.json"), "--frames", str(frames)]
        return program.run(argv, classify.Options, "classify", predict, "").notes

    return ask


def test_scores_say_that_frames_are_too_few_for_tubes(asked_as_videos):
    """A single frame is the control without any tubes."""
    config = tiny_config()
    tubes = VideoConfig(frames=16, patch_stride=16, tubes=paper_tubes(16, patch_size=8))
    videos = dataclasses.replace(config, vision=dataclasses.replace(config.vision, video=tubes))
    assert [note for note in asked_as_videos(videos, 8) if "tubes" in note] == [
        "read as 8 frames, too few for 1 of the 3 kinds of tubes, which have no token then: the "
        "model is made for 16 (VideoConfig.frames)"
    ]
    for model, frames in ((videos, 1), (videos, 10), (config, 8)):
        assert program._few_frames(model.vision, frames) == []


# What is refused before the model is asked


def test_videos_that_the_model_does_not_read_are_refused_at_once(asked_as_videos):
    config = tiny_config()
    video = VideoConfig("frames", frames=4, frame_embed=True)
    of_frames = dataclasses.replace(config, vision=dataclasses.replace(config.vision, video=video))
    text = dataclasses.replace(config.text, cross_attn_every=0, max_length=64)
    prefix = dataclasses.replace(config, text=text)
    for model, said in ((of_frames, "more than VideoConfig.frames 4"), (prefix, "an image prefix")):
        with pytest.raises(SystemExit, match=f"an example of --frames is a video of 8.*{said}"):
            asked_as_videos(model, 8)


@pytest.mark.parametrize("name, changed, argv, message", [
    ("caption", {"file": "1.png"}, [], "has '1.png' more than once"),
    ("retrieval", {"file": "1.png"}, [], "has '1.png' more than once"),
    ("classify", {"file": "1.png"}, [], "has '1.png' more than once"),
    ("classify", {}, ["--classes", '["red circle", "blue circle"]'],
     "'1.png' is 'green circle', not one of the 2 classes"),
    ("classify", {}, ["--classes", '["red circle", "red circle"]'],
     "the class 'red circle' is named twice"),
    ("classify", {}, ["--classes", "[1]"], "is not a JSON list of texts"),
    ("classify", {}, ["--classes", "["], "is not JSON"),
    # One question a line: the lines of a picture have the same ids.
    ("vqa", {"file": "1.png"}, [],
     "has the question '1.png#0' more than once, expected each once: put all questions of a"),
    ("vqa", {"qa": [{"question": "why?"}]}, [], "1 of 15 questions of"),
    ("vqa", {"qa": [{"question": "why?", "answers": ["yes"] * 4}]}, [], "have no answer_type"),
])  # fmt: skip
def test_what_cannot_be_scored_is_refused_before_the_model_is_asked(
    folder, refusal, tmp_path, monkeypatch, name, changed, argv, message
):
    lines = [json.loads(line) for line in (folder / "set.jsonl").open()]
    lines[0] |= changed
    lines = [line | {"file": str(folder / line["file"])} for line in lines]
    if "file" in changed:
        message = message.replace("1.png", str(folder / "1.png"))
    message = message.replace("'1.png' is", f"{str(folder / '1.png')!r} is")
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    if argv:
        (tmp_path / "classes.json").write_text(argv[1])
        argv = [argv[0], tmp_path / "classes.json"]

    def never(*_):
        raise AssertionError("the model was asked")

    monkeypatch.setattr(Predictor, "_run", never)
    asked = ["--data", f"jsonl:{tmp_path / 'set.jsonl'}", "--batch-size", "8", *argv]
    assert message in refusal(name, folder / "model", *asked)


# Faults at the end


def test_a_full_disk_says_what_is_lost(results, tmp_path, monkeypatch):
    predictions = load_predictions(results["retrieval"][1])

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(program, "save_scores", full)
    with pytest.raises(
        OSError, match="x.json cannot be written .No space .* the predictions are there"
    ):
        program._scored(predictions, tmp_path / "x.json")
    monkeypatch.setattr("pathlib.Path.open", full)
    with pytest.raises(
        OSError, match="cannot be written .* the predictions for 27 records are lost"
    ):
        program._save(predictions, tmp_path / "x.predictions.jsonl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, error", [
    ("caption", OSError("the disk is gone")),
    ("vqa", KeyboardInterrupt()),
    ("classify", RuntimeError("a defect")),
])  # fmt: skip
def test_what_is_predicted_before_an_evaluation_ends_early_is_kept(
    results, folder, tmp_path, monkeypatch, capsys, name, error
):
    partial = tmp_path / f"x{PREDICTIONS_SUFFIX}.partial"
    computed = Predictor.run

    def run_one_batch(*args, **settings):
        if partial.exists() and partial.read_text().count("\n") >= 7:  # a batch is done
            raise error
        return computed(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "run", run_one_batch)
        with pytest.raises((SystemExit, RuntimeError)) as ended:
            ask(folder, name, tmp_path / "x.json")
    records = [json.loads(line) for line in partial.read_text().splitlines()]
    whole = Predictions.load(results[name][1]).records
    assert 7 <= len(records) < len(whole) and all(record in whole for record in records)
    assert len({json.dumps(record) for record in records}) == len(records)
    said = f"{ended.value} {getattr(ended.value, '__notes__', '')} {capsys.readouterr().err}"
    assert f"the predictions so far, {len(records)} records, are in {partial}" in said
    assert [path.name for path in tmp_path.iterdir()] == [partial.name]
    if name == "caption":
        ask(folder, name, tmp_path / "x.json")
        assert not partial.exists()
        assert (tmp_path / f"x{PREDICTIONS_SUFFIX}").read_bytes() == results[name][1].read_bytes()


def test_a_full_disk_ends_no_evaluation_before_its_end(tmp_path):
    """What the partial file has no room for is lost only if the process ends, too."""
    (tmp_path / "x.partial").symlink_to("/dev/full")
    with pytest.raises(ValueError) as ended, PartialFile(tmp_path / "x") as partial:
        partial.add({"key": "a"})
        partial.add({"key": "b"})
        raise ValueError("other")
    assert partial.count == 0 and PartialFile.with_note(ended.value, "other") == "other"


def test_what_the_terminal_cannot_show_ends_no_program(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr(program, "_evaluate", lambda *_: print("写真 \udcff"))
    run("caption", "model")
    terminal.flush()
    assert terminal.buffer.getvalue() == rb"\u5199\u771f \udcff" + b"\n"


@pytest.mark.parametrize("main, name", [
    (caption.main, "python -m eval.caption"),
    (speed.main, "python -m eval.speed"),
    (report.main, "eval.report"),
])  # fmt: skip
def test_ctrl_c_ends_a_program_with_one_line_and_status_130(monkeypatch, capsys, main, name):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for place in ("eval.program._evaluate", "eval.speed.run", "eval.report.write_report"):
        monkeypatch.setattr(place, interrupted)
    argv = ["model"] if name.endswith(("caption", "report")) else []
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 130
    assert error.startswith(f"{name}: stopped by Ctrl-C") and error.count("\n") == 1


def test_a_batch_that_does_not_fit_the_memory_is_named(monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore lines")

    monkeypatch.setattr(program, "_evaluate", full)
    with pytest.raises(SystemExit, match="--batch-size 64 needs more memory .*: Out of memory$"):
        run("caption", "model")


@pytest.mark.parametrize("main, argv, message", [
    (report.main, ["run", "--items", "0"], "--items is 0, expected at least 1"),
    (speed.main, ["--threads", "0"], "--threads is 0, expected at least 1"),
    (speed.main, ["--grow", "batch", "--grow-sizes", "4", "-1"], "--grow-sizes is 4 -1, expected"),
])  # fmt: skip
def test_numbers_out_of_range_are_refused_by_their_option(capsys, main, argv, message):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    printed = f"{stopped.value.code} {capsys.readouterr().err}"
    assert stopped.value.code != 0 and message in " ".join(printed.replace("│", "").split())
