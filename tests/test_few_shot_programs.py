"""Questions and captions after examples, end to end, against prompts put together by hand."""

import json

import pytest
from PIL import Image
from prefix_models import IMAGES, prefix_model, prefix_processor

import mammut
from eval import caption, vqa
from mammut.data.sources import open_source
from mammut.evaluation.few_shot import FewShot, Query, answer_part
from mammut.evaluation.metrics.vqa import magma_truncated_accuracy
from mammut.evaluation.predictions import Predictions
from mammut.generation.search import GenerateConfig
from mammut.testing import tiny_model, tiny_processor

pytestmark = pytest.mark.long

QUESTIONS = "what?", "where?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with an image prefix, and 6 pictures with a caption and a question of two types."""
    folder = tmp_path_factory.mktemp("few_shot")
    mammut.save(folder / "model", prefix_model(), prefix_processor())
    mammut.save(folder / "other", tiny_model(), tiny_processor())
    lines = []
    for i, pixels in enumerate(IMAGES):
        Image.fromarray(pixels).save(folder / f"{i}.png")
        question = {"question": QUESTIONS[i % 2], "question_type": QUESTIONS[i % 2]}
        qa = [question | {"answers": ["red"] * 3 + ["on the left"] * 2}]
        lines.append({"file": f"{i}.png", "captions": ["one green square"], "qa": qa})
    (folder / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def ask(program, folder, *argv, model: str = "model"):
    """The predictions and scores a program wrote."""
    common = [str(folder / model), "--data", f"jsonl:{folder / 'set.jsonl'}", "--batch-size", "8"]
    program.main([*common, *map(str, argv)])


def written(folder, name: str):
    out = folder / "model" / "eval" / f"{name}.json"
    return json.loads(out.read_text()), Predictions.load(
        out.with_name(out.stem + ".predictions.jsonl")
    )


def by_hand(folder, predictions: Predictions, field: str, config: GenerateConfig) -> list[str]:
    """The texts after prompts made and run apart from the programs."""
    model, processor = mammut.load(folder / "model")
    source, settings = (
        open_source(predictions.data, image_size=16, field=field),
        predictions.settings,
    )
    few_shot = FewShot(
        source, settings["shots"], seed=settings["shots_seed"], instruction=settings["instruction"]
    )
    prompts = []
    for record in predictions.records:
        text = settings["prompt"].replace("{}", record.get("question", ""))
        kind = record.get("question_type")
        query = Query(record["index"], record["key"], text, question_type=kind)
        image = folder / record["key"]
        prompts.append(few_shot.pieces(query, image, settings["prompt"], processor.image))
    texts = mammut.generate_prompts(model, processor, prompts, config, batch_size=3)
    return [answer_part(found.text, settings["prompt"]) for found in texts]


def test_questions_are_asked_after_examples_and_scored_both_ways(folder, capsys):
    ask(vqa, folder, "--shots", 2, "--shots-seed", 5)
    name = next((folder / "model" / "eval").glob("vqa_*_2_shots.json")).stem
    scores, predictions = written(folder, name)
    settings = {
        "shots": 2,
        "shots_seed": 5,
        "prompt": "Q: {} A:",
        "instruction": "",
        "max_new_tokens": 10,
    }
    assert settings.items() <= predictions.settings.items()
    assert predictions.settings["shots_data"] == predictions.data
    said = [record["prediction"] for record in predictions.records]
    assert (
        said == by_hand(folder, predictions, "qa", GenerateConfig(max_new_tokens=10))
        and len(set(said)) > 1
    )

    own = [
        magma_truncated_accuracy(record["prediction"], record["answers"])
        for record in predictions.records
    ]
    assert scores["metrics"]["magma_truncated_accuracy"] == pytest.approx(sum(own) / 6)
    assert "vqa_acc" in scores["metrics"] and any(
        "this raises the score" in note for note in scores["notes"]
    )
    before = capsys.readouterr().out
    vqa.main(
        [
            str(folder / "model" / "eval" / f"{name}.predictions.jsonl"),
            "--out",
            str(folder / "again.json"),
        ]
    )
    assert json.loads((folder / "again.json").read_text())["metrics"] == scores["metrics"]
    assert (
        "magma_truncated_accuracy" in before
        and "magma_truncated_accuracy" in capsys.readouterr().out
    )


def test_captions_are_asked_after_examples_with_beams(folder, monkeypatch):
    monkeypatch.setenv("PATH", "")  # without Java, which takes seconds to start
    ask(
        caption,
        folder,
        "--shots",
        2,
        "--num-beams",
        2,
        "--max-new-tokens",
        4,
        "--instruction",
        "one",
    )
    scores, predictions = written(
        folder, next((folder / "model" / "eval").glob("caption_*_2_shots.json")).stem
    )
    assert {
        "prompt": "A picture of",
        "instruction": "one",
        "num_beams": 2,
    }.items() <= predictions.settings.items()
    config = GenerateConfig(num_beams=2, max_new_tokens=4)
    assert [r["prediction"] for r in predictions.records] == by_hand(
        folder, predictions, "captions", config
    )
    assert "magma_truncated_accuracy" not in scores["metrics"]


def test_a_question_that_does_not_fit_is_answered_with_nothing_and_its_neighbours_as_without_it(
    folder,
):
    lines = [json.loads(line) for line in (folder / "set.jsonl").read_text().splitlines()]
    lines[2]["qa"].append(lines[2]["qa"][0] | {"question": "what? " * 40})
    (folder / "long.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shown = ["--shots", "1", "--shots-data", f"jsonl:{folder / 'set.jsonl'}", "--batch-size", "8"]
    found = {}
    for name in ("set", "long"):
        out = folder / f"asked_{name}.json"
        vqa.main(
            [
                str(folder / "model"),
                "--data",
                f"jsonl:{folder / f'{name}.jsonl'}",
                *shown,
                "--out",
                str(out),
            ]
        )
        found[name] = Predictions.load(out.with_name(f"asked_{name}.predictions.jsonl"))
        assert any(
            "1 prompts are longer" in note for note in json.loads(out.read_text())["notes"]
        ) == (name == "long")
    *before, long, after_it, _, _ = found["long"].records
    assert (
        long["question"].startswith("what? what?") and long["index"] == 2 and after_it["index"] == 3
    )
    assert long["too_long"] and long["prediction"] == ""
    neighbours = [record for record in found["long"].records if record is not long]
    said = [record["prediction"] for record in neighbours]
    assert said == [record["prediction"] for record in found["set"].records] and len(set(said)) > 1
    assert not any("too_long" in record for record in neighbours)
    assert [r["logprob"] for r in neighbours] == pytest.approx(
        [r["logprob"] for r in found["set"].records], abs=1e-4
    )


@pytest.mark.parametrize("program, argv, model, message", [
    (vqa, ["--shots", "2"], "other", "DecoderConfig.cross_attn_every is 2, expected 0"),
    (vqa, ["--shots", "20"], "model", "has 6 examples to show, expected at least 20"),
    (vqa, ["--shots", "6"], "model", "has 5 examples to show beside"),
    (vqa, ["--shots", "5", "--max-new-tokens", "45"], "model",
     "a query after 5 shots has 6 images of 4 tokens each"),
    (vqa, ["--shots", "-1"], "model", "--shots is -1, expected at least 0"),
    (vqa, ["--shots", "1", "--shots-seed", "-2"], "model", "--shots-seed is -2, expected at least"),
    (vqa, ["--max-new-tokens", "0"], "model", "--max-new-tokens is 0, expected at least 1"),
    (vqa, ["--shots-seed", "3"], "model", "--shots-seed is 3, which needs --shots"),
    (caption, ["--instruction", "Look."], "model", "--instruction is 'Look.', which needs --shots"),
    (vqa, ["--shots", "1", "--prompt", "Q: {} A: "], "model",
     "the prompt 'Q: {} A: ' ends in a space, expected none"),
    (vqa, ["--shots", "1", "--shots-data", "jsonl:nowhere"], "model", "nowhere"),
])  # fmt: skip
def test_what_cannot_be_asked_is_refused_in_one_sentence(folder, program, argv, model, message):
    with pytest.raises(SystemExit) as stopped:
        ask(program, folder, *argv, "--out", folder / "x.json", model=model)
    assert message in stopped.value.code and "\n" not in stopped.value.code
    assert not (folder / "x.json").exists()
