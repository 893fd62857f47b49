"""The HTML page of a run or predictions file: its content, its isolation, its attention maps."""

import base64
import configparser
import dataclasses
import functools
import html.parser
import io
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from old_version import as_version_0_1
from PIL import Image

import mammut
from mammut import testing
from mammut.config import ComputeConfig, DataConfig, TrainConfig
from mammut.data import moving
from mammut.data.tokenizer import train_sentencepiece
from mammut.evaluation.predictions import Predictions
from mammut.models.flops import num_params
from mammut.pages.report import write_report
from mammut.pages.report_pictures import Album, Pictures, curves
from mammut.pages.word_maps import overlay, split_words, word_maps
from mammut.training.run_folder import write_run
from mammut.weights import model_folder

HOSTILE = "<script>alert(1)</script> \"><img src=http://x> \u202etxet\u202c nul\x00 & 'quoted'"
WORDS = ("one red circle", "one blue square on the left", "one green triangle on the right")
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


class Page(html.parser.HTMLParser):
    """The elements of a page, in order, and its text."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text, self._hidden, self._open = "", False, []
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        assert self._open == []  # every element is closed, in order

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._hidden = tag == "style"
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        self._hidden = False
        self.text += " " if tag in ("th", "td", "dt", "dd") else ""

    def handle_data(self, data):
        if not self._hidden:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def make_data(folder: pathlib.Path, names=("p0.png", "p1.png", "p2.png")) -> str:
    folder.mkdir()
    lines = []
    for number, name in enumerate(names):
        pixels = np.full((30, 40, 3), (60 * number, 200, 100), np.uint8)
        Image.fromarray(pixels).save(folder / name)
        qa = [{"question": f"what is {number}?", "answers": ["red"]}]
        lines.append(
            json.dumps({"file": name, "captions": [WORDS[number]], "qa": qa, "name": "circle"})
        )
    (folder / "data.jsonl").write_text("\n".join(lines))
    return f"jsonl:{folder / 'data.jsonl'}"


def all_predictions(data: str, model: str) -> dict[str, Predictions]:
    at = [{"key": f"p{number}.png", "index": number} for number in range(3)]
    captions = [
        at[0]
        | {"prediction": "one red circle", "logprob": -2.5, "references": [WORDS[0], HOSTILE]},
        at[1] | {"prediction": "", "logprob": -9.0, "references": [WORDS[1]]},
        at[2] | {"prediction": HOSTILE, "logprob": -1.0, "references": [WORDS[2]]},
    ]
    asked = [
        ("Red!", ["red", "red", "blue"], "other"),
        ("two", ["three"], "number"),
        (HOSTILE, [], "other"),
    ]
    vqa = [
        at[n]
        | dict(
            id=f"q{n}", question=f"what is {n}?", prediction=said, answers=answers, answer_type=kind
        )
        for n, (said, answers, kind) in enumerate(asked)
    ]
    classify = [
        at[n] | dict(label=label, ranked=ranked, scores=[0.5, 0.3, 0.2])
        for n, (label, ranked) in enumerate(
            [
                ("cat", ["cat", "dog", HOSTILE]),
                ("cat", ["dog", "cat", HOSTILE]),
                (HOSTILE, ["dog", "cat", HOSTILE]),
            ]
        )
    ]
    retrieval = [
        dict(
            query="text",
            id=0,
            text=WORDS[0],
            relevant=[0],
            ranked=[0, 1, 2],
            scores=[0.9, 0.5, 0.1],
        ),
        dict(
            query="text",
            id=1,
            text=HOSTILE,
            relevant=[1],
            ranked=[2, 0],
            scores=[0.8, 0.2],
            reranked=[1, 0],
        ),
        at[0] | dict(query="image", id=0, relevant=[0], ranked=[1, 0], scores=[0.4, 0.3]),
    ]
    by_task = {"caption": captions, "vqa": vqa, "classify": classify, "retrieval": retrieval}
    settings = {"image_size": 16, "note": HOSTILE}
    return {
        task: Predictions(task, records, data, model, settings) for task, records in by_task.items()
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """A run with curves, scores and predictions of all four tasks."""
    folder = tmp_path_factory.mktemp("reports") / "run"
    data = make_data(folder.parent / "data")
    config = TrainConfig(
        model=testing.tiny_config(),
        data=DataConfig(train=data, val=data, batch_size=8),
        steps=1234,
        compute=ComputeConfig(dtype="bfloat16"),
    )
    model_folder.save(folder, testing.tiny_model(), testing.tiny_processor())
    write_run(folder, config, ["--steps", "1234"])
    steps = [
        {
            "step": step,
            "train/loss": 9.0 / step,
            "train/loss_contrastive": 5 / step,
            "train/loss_caption": 4 / step,
        }
        | {"train/learning_rate": 1e-3, "train/grad_norm": math.nan}
        for step in range(1, 20)
    ]
    steps.append({"step": 19, "eval/val/t2i_r1": 0.125, "eval/val/cider": 1.25})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)) + '\n{"step": 20, "tra')
    for task, predictions in all_predictions(data, str(folder)).items():
        predictions.save(folder / "eval" / f"my_{task}.predictions.jsonl")
    by_type = {"number": {"exact_match": 0.5, "questions": 7}}
    scores = {
        "metrics": {"vqa_acc": 0.625, "cider": 0.875, "by_answer_type": by_type},
        "notes": [HOSTILE, "half a pair \ud800"],
    }
    (folder / "eval" / "my_vqa.json").write_text(json.dumps(scores))
    return folder


@pytest.fixture(scope="module")
def page(run) -> Page:
    path = write_report(run)
    assert path == run / "report.html"
    return Page(path)


def test_page_of_a_run_has_all_its_sections_in_order(page):
    titles = [
        "Scores",
        "Training",
        "Retrieval: my_retrieval",
        "Captions: my_caption",
        "Questions: my_vqa",
    ]
    positions = [page.text.rindex(title) for title in [*titles, "Classification: my_classify"]]
    assert positions == sorted(positions)
    assert not [notice for notice in page.elements if notice[1].get("class") == "notice"]


def test_page_describes_the_run(page, run):
    assert page.all("title") and page.words.startswith("run – mammut report")
    total = sum(x.size for x in jax.tree.leaves(nnx.state(testing.tiny_model())))
    for text in (
        f"{total:,} parameters",
        "16 pixels; patches of 8; 2 layers",
        "1,234 steps of 8",
        "computed in bfloat16",
        "--steps 1234",
    ):
        assert text in page.words
    assert f"by mammut {mammut.__version__}" in page.words


def test_the_version_on_a_page_is_that_of_the_package():
    package = configparser.ConfigParser()
    package.read(pathlib.Path(__file__).parents[1] / "setup.cfg")
    assert package["metadata"]["version"] == mammut.__version__


def test_scores_are_percent_where_they_are_shares(page):
    for text in (
        "VQA accuracy 62.5%",
        "CIDEr 0.875",
        "number 50.0% 7",
        "text to image R@1 12.5%",
        "CIDEr 1.250",
    ):
        assert text in page.words


def test_curves_name_their_ends_in_words(page):
    charts = [
        image["alt"] for image in page.all("img") if image["src"].startswith("data:image/svg+xml")
    ]
    titles = ["Losses", "Learning rate", "Gradient norm", "Evaluation, val", "Evaluation, val"]
    assert [alt.split(":")[0] for alt in charts] == titles
    assert "total 9 to 0.4737, steps 1 to 19" in charts[0]


def test_captions_stand_with_references_probability_and_a_map_for_each_word(page):
    for text in ("one red circle", WORDS[1], "log-probability -2.50", "(nothing)"):
        assert text in page.words
    maps = [image["alt"] for image in page.all("img") if image["alt"].startswith("attention for")]
    assert maps[:3] == ["attention for one", "attention for red", "attention for circle"]


def test_retrieval_shows_ranks_marks_and_the_right_one_that_was_missed(page):
    for text in (
        "1 of 2 queries have a right image",
        "1 of 1 queries have a right text among the first 5",
        "the first right image is at rank 1",
        "no right image among the 2 ranked",
        "Scored again by likelihood: the first right image is at rank 1",
        "the right one",
        "By embedding: the first right text is at rank 2",
    ):
        assert text in page.words
    assert "✓0.900" in page.text and "✗0.500" in page.text


def test_answers_are_right_after_normalisation_and_unscored_where_there_are_none(page):
    assert "1 of 2 predictions equal an answer (50.0%)" in page.words
    # with classification
    assert [page.text.count(sign) for sign in ("✓ right", "✗ wrong", "not scored")] == [2, 3, 1]
    assert "red (2), blue" in page.words
    assert "number 1 0.0% other 1 100.0%" in page.words


def test_classification_shows_the_pairs_confused(page):
    assert "1 of 3 are right at first (33.3%)" in page.words
    assert "cat dog 1 2" in page.words


def test_bars_are_as_long_as_the_scores(page):
    bars = [span["style"] for span in page.all("span") if span.get("class") == "bar"]
    assert bars == [f"background-size: {length}% 100%" for length in (100, 60, 40)] * 3


@pytest.mark.parametrize("right, shown", [(8, (3, 3)), (1, (1, 5)), (19, (5, 1)), (0, (0, 6))])
def test_what_is_shown_is_half_right_and_half_wrong_as_far_as_there_are(right, shown, tmp_path):
    names = [["a", "b"] if number < right else ["b", "a"] for number in range(20)]
    records = [
        {"key": str(n), "index": n, "label": "a", "ranked": ranked}
        for n, ranked in enumerate(names)
    ]
    Predictions("classify", records, "jsonl:none", "none").save(tmp_path / "x.predictions.jsonl")
    path = write_report(tmp_path / "x.predictions.jsonl", items=6)
    text = Page(path).text
    assert (text.count("✓ right"), text.count("✗ wrong")) == shown
    date = re.compile(r"written.*?by")
    first = date.sub("", " ".join(text.split()))
    assert first == date.sub(
        "", Page(write_report(tmp_path / "x.predictions.jsonl", items=6)).words
    )


def test_everything_quoted_is_escaped(page):
    assert "<script>alert(1)</script>" in page.text  # as text
    assert not page.all("script")
    assert {name for name, _ in page.elements} <= set(
        "html head meta title style body header h1 h2 h3 dl div dt dd p nav ul ol li a main "
        "section article figure "
        "figcaption img span table caption thead tbody tr th td details summary".split()
    )
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert not set("\0\u202e\u202c") & set(page.source)
    assert "\ufffdtxet\ufffd nul\ufffd" in page.text and "half a pair \ufffd" in page.text


def test_page_loads_nothing(page):
    policy = [
        meta["content"]
        for meta in page.all("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    for _, attrs in page.elements:
        assert attrs.get("src", "data:image/").startswith("data:image/")
        assert attrs.get("href", "#").startswith("#")
        assert not {"srcset", "action", "formaction", "data", "poster", "background"} & set(attrs)
    assert not re.search(
        r"url\(|@import|http", re.sub(r'data:image/[^"]*|http-equiv|http://x', "", page.source)
    )


def test_page_is_accessible(page):
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:]))
    assert all(image["alt"].strip() for image in page.all("img"))
    assert page.all("html")[0]["lang"] == "en"
    links, targets = page.all("a"), {attrs.get("id") for _, attrs in page.elements}
    assert links and {link["href"][1:] for link in links} <= targets


def test_pictures_are_those_of_the_source(page, run):
    shot = next(image for image in page.all("img") if image["alt"] == "p1.png")
    shown = np.asarray(
        Image.open(io.BytesIO(base64.b64decode(shot["src"].partition(",")[2]))), float
    )
    pictures = [np.asarray(Image.open(run.parent / "data" / f"p{n}.png"), float) for n in range(3)]
    assert [shown.shape == picture.shape for picture in pictures] == [True] * 3
    errors = [np.abs(shown - picture).mean() for picture in pictures]
    assert errors[1] == min(errors) and errors[1] < 3


def test_predictions_alone_have_a_page_beside_them(run, tmp_path):
    folder = tmp_path / "elsewhere"
    shutil.copytree(run / "eval", folder)
    path = write_report(folder / "my_caption.predictions.jsonl", items=1)
    assert path == folder / "my_caption.report.html"
    page = Page(path)
    assert (
        "The first 1 of 3" in page.words
        and "parameters" in page.words
        and "attention for one" in page.source
    )
    assert "Training" not in page.words and WORDS[2] not in page.words


def notices(path: pathlib.Path) -> tuple[str, Page]:
    page = Page(path)
    return " ".join(re.findall(r'<p class="notice">(.*?)</p>', page.source, re.DOTALL)), page


def test_a_source_that_is_gone_is_said_and_the_rest_shown(run, tmp_path):
    predictions = all_predictions(f"jsonl:{tmp_path / 'gone.jsonl'}", str(run))["caption"]
    predictions.save(tmp_path / "a.predictions.jsonl")
    said, page = notices(write_report(tmp_path / "a.predictions.jsonl"))
    assert "The pictures cannot be shown" in said and "gone.jsonl" in said
    assert "one red circle" in page.words and not page.all("img")


def test_a_picture_that_is_gone_or_another_now_is_left_out_alone(run, tmp_path):
    data = make_data(tmp_path / "data", ("p0.png", "renamed.png", "p2.png"))
    (tmp_path / "data" / "p2.png").unlink()
    all_predictions(data, str(run))["vqa"].save(tmp_path / "a.predictions.jsonl")
    said, page = notices(write_report(tmp_path / "a.predictions.jsonl"))
    assert (
        "Pictures that cannot be shown: 2" in said and "is now renamed.png, it was p1.png" in said
    )
    assert [image["alt"] for image in page.all("img")] == ["p0.png"]


def test_a_model_that_cannot_be_loaded_costs_only_the_maps(run, tmp_path):
    data = make_data(tmp_path / "data")
    all_predictions(data, str(tmp_path / "nowhere"))["caption"].save(
        tmp_path / "a.predictions.jsonl"
    )
    said, page = notices(write_report(tmp_path / "a.predictions.jsonl"))
    assert "The model cannot be described" in said and "There are no heat maps" in said
    assert len(page.all("img")) == 3


def test_a_model_folder_of_version_0_1_is_described(tmp_path):
    config = testing.tiny_config()
    model_folder.save(tmp_path / "old", testing.tiny_model(), testing.tiny_processor())
    about = {"format": "mammut", "version": 1, "model": as_version_0_1(config)}
    (tmp_path / "old" / "config.json").write_text(json.dumps(about))
    data = make_data(tmp_path / "data")
    all_predictions(data, str(tmp_path / "old"))["vqa"].save(tmp_path / "a.predictions.jsonl")
    said, page = notices(write_report(tmp_path / "a.predictions.jsonl"))
    assert said == "" and f"{num_params(config)['total']:,} parameters" in page.words


def test_a_picture_whose_classes_were_not_ranked_is_shown(run, tmp_path):
    given = all_predictions(make_data(tmp_path / "data"), str(run))["classify"]
    given.records[0].update(ranked=[], scores=[])
    given.save(tmp_path / "a.predictions.jsonl")
    assert given.records[0]["label"] in Page(write_report(tmp_path / "a.predictions.jsonl")).words


def test_a_blind_model_has_no_maps_over_pictures_it_never_saw(run, tmp_path):
    given = all_predictions(make_data(tmp_path / "data"), str(run))["caption"]
    Predictions("caption", given.records, given.data, str(run), {"blind": True}).save(
        tmp_path / "a.predictions.jsonl"
    )
    said, page = notices(write_report(tmp_path / "a.predictions.jsonl"))
    assert "black pictures" in said and len(page.all("img")) == 3


def test_a_run_that_was_moved_still_finds_its_model_and_a_bad_file_spoils_nothing(run, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    path = moved / "eval" / "my_caption.predictions.jsonl"
    path.write_text(path.read_text().replace(json.dumps(str(run)), '"was/here"', 1))
    (moved / "eval" / "my_vqa.predictions.jsonl").write_text("{")
    (moved / "eval" / "my_classify.json").write_text("[]")
    said, page = notices(write_report(moved, tmp_path / "new" / "page.html"))
    assert (
        "my_vqa.predictions.jsonl is not a predictions file" in said
        and "Questions: my_vqa" not in page.words
    )
    assert "my_classify.json is not a score file" in page.words
    assert "attention for red" in page.source and "heat maps" not in said
    assert "VQA accuracy 62.5%" in page.words  # scores without predictions


def test_a_run_without_anything_else_has_a_page(tmp_path):
    write_run(tmp_path, TrainConfig(model=testing.tiny_config()), [])
    assert "parameters" in Page(write_report(tmp_path)).words


def test_pictures_beyond_what_a_page_can_hold_are_counted(run, monkeypatch, tmp_path):
    monkeypatch.setattr("mammut.pages.report_pictures._BUDGET", 10_000)
    said, page = notices(write_report(run, tmp_path / "page.html"))
    charts = sum(len(image["src"]) for image in page.all("img") if "svg" in image["src"])
    assert re.search(r"\d+ pictures are left out", said)
    assert sum(len(image["src"]) for image in page.all("img")) - charts <= 10_000


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: folder / "missing", "is neither a run"),
        (lambda folder: folder, "is neither a run"),
        (lambda folder: folder / "notes.txt", "is not a predictions file"),
        (lambda folder: folder / "bad", "run.json"),
    ],
)
def test_a_bad_target_is_one_sentence(make, message, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=message) as caught:
        write_report(make(tmp_path))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.html"))


def test_no_items_are_refused(run):
    with pytest.raises(ValueError, match="items is 0, expected at least 1"):
        write_report(run, items=0)


@pytest.mark.long
def test_the_program_prints_the_page_and_ends_in_one_sentence(run, tmp_path):
    root = pathlib.Path(__file__).parents[1]
    command = [sys.executable, "-m", "eval.report"]
    ask = functools.partial(subprocess.run, capture_output=True, text=True, cwd=root)
    done = ask(
        [
            *command,
            str(run / "eval" / "my_vqa.predictions.jsonl"),
            "--out",
            str(tmp_path / "p.html"),
        ]
    )
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'p.html'}\n"), done.stderr
    failed = ask([*command, str(tmp_path / "none")])
    assert (
        failed.returncode == 1
        and failed.stderr.startswith("eval.report: ")
        and failed.stderr.count("\n") == 1
    )


# Attention


@pytest.fixture(scope="module")
def model() -> mammut.MaMMUT:
    return testing.tiny_model()


@pytest.fixture(scope="module")
def attention(model):
    """`model.cross_attention`, compiled once for `tiny_batch()`."""
    # The model is an argument: XLA computes with constants as it compiles.
    compiled = functools.partial(jax.jit(type(model).cross_attention), model)
    return lambda batch: np.asarray(compiled(batch["image"], batch["tokens"], batch["text_valid"]))


def test_cross_attention_weights_reproduce_the_caption_pass(model, attention):
    """Each cross-attention layer again in NumPy, and the whole pass with those weights."""
    text, batch = model.text, testing.tiny_batch()
    tokens, valid = jnp.asarray(batch["tokens"]), jnp.asarray(batch["text_valid"])
    image_tokens = jax.jit(type(model).image_tokens)(model, batch["image"]).tokens
    weights = attention(batch)
    assert weights.shape == (2, 4, 3, 12, 4) and weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    assert weights.std(-1).mean() > 0.05  # they are not all even

    causal = jnp.tril(jnp.ones((12, 12), bool))[None, None] & valid[:, None, None, :]
    x = text.token_embed(tokens) + text.pos_embed[:12]
    for group in range(2):
        for layer in range(2 * group, 2 * group + 2):
            x = jax.tree.map(lambda p, n=layer: p[n], text.layers)(x, mask=causal)
        cross = jax.tree.map(lambda p, n=group: p[n], text.cross_layers)
        normed = np.asarray(cross.attn_norm(x), np.float64)
        kernels = {
            name: np.asarray(getattr(cross.attn, name).kernel[...], np.float64)
            for name in ("query", "key")
        }
        biases = {
            name: np.asarray(getattr(cross.attn, name).bias[...], np.float64)
            for name in ("query", "key")
        }
        query = np.einsum("bld,dnk->blnk", normed, kernels["query"]) + biases["query"]
        key = (
            np.einsum("bpd,dnk->bpnk", np.asarray(image_tokens, np.float64), kernels["key"])
            + biases["key"]
        )
        scores = np.exp(np.einsum("blnk,bpnk->bnlp", query, key) / math.sqrt(16))
        np.testing.assert_allclose(
            weights[group], scores / scores.sum(-1, keepdims=True), rtol=1e-4, atol=1e-6
        )
        x = x + cross.attn.out(
            jnp.einsum("bnlp,bpnk->blnk", weights[group], cross.attn.value(image_tokens))
        )
        x = x + cross.mlp(cross.mlp_norm(x))
    np.testing.assert_allclose(
        text.norm(x), text.caption_pass(tokens, valid, image_tokens), rtol=1e-4, atol=1e-4
    )


def test_a_later_token_changes_no_earlier_attention(attention):
    batch = testing.tiny_batch()
    before = attention(batch)
    batch["tokens"][0, 7] += 1  # of a text without pads
    after = attention(batch)
    np.testing.assert_array_equal(before[..., :7, :], after[..., :7, :])
    assert np.abs(before - after)[:, 0, :, 7:].max() > 1e-4


def test_without_text_valid_every_token_counts(model, attention):
    batch = testing.tiny_batch()
    everything = attention(batch | {"text_valid": np.ones_like(batch["text_valid"])})
    np.testing.assert_allclose(
        jax.jit(type(model).cross_attention)(model, batch["image"], batch["tokens"]),
        everything,
        rtol=1e-5,
    )


def test_a_words_map_is_the_mean_over_the_positions_that_predict_its_tokens(model, attention):
    processor, images = testing.tiny_processor(), testing.tiny_batch()["image"]
    texts = ["one green triangle", "", "red", "red"]
    maps = word_maps(model, processor, list(images), texts)
    assert [[word for word, _ in of_text] for of_text in maps] == [
        ["one", "green", "triangle"],
        [],
        ["red"],
        ["red"],
    ]

    tokens, valid = processor.encode_text(texts)
    rows = attention({"image": images, "tokens": tokens, "text_valid": valid}).mean((0, 2))[0]
    lengths = [len(processor.tokenizer.encode(word)) for word in texts[0].split()]
    # words of several pieces, encoded one by one
    assert max(lengths) > 1 and sum(lengths) == valid[0].sum() - 2
    start = 0
    for (_, weights), length in zip(maps[0], lengths):
        np.testing.assert_allclose(
            weights.reshape(-1), rows[start : start + length].mean(0), rtol=1e-5
        )
        assert weights.shape == (2, 2) and weights.sum() == pytest.approx(1, rel=1e-5)
        start += length


def test_every_token_belongs_to_one_word_also_where_a_character_takes_several():
    captions = [f"a {a}{b} dog" for a in "bcdfghjklm" for b in "aeiou"] + ["an elephant here"]
    tokenizer = train_sentencepiece(captions, 600, lowercase=True)
    ids = tokenizer.encode("a dog \N{ELEPHANT}\N{ELEPHANT} zzz")
    words = split_words(tokenizer, ids)
    assert [word for word, _ in words] == ["a", "dog", "\N{ELEPHANT}\N{ELEPHANT}", "zzz"]
    assert [place for _, places in words for place in places] == list(range(len(ids)))
    assert len(words[2][1]) >= 8  # four bytes each
    for word, places in words:
        assert tokenizer.decode([ids[place] for place in places]).strip() == word


def test_colour_lies_where_the_model_looks_and_nowhere_at_an_even_share():
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    even = overlay(picture, np.full((2, 2), 0.25), 0.25)
    assert even.shape == picture.shape and (even == even[..., :1]).all()
    shown = overlay(picture, np.array([[0.1, 0.1], [0.7, 0.1]]), 0.7).astype(int)
    colour = shown[..., 0] - shown[..., 2]  # orange
    quarters = [colour[:15, :25], colour[:15, 35:], colour[25:, :25], colour[25:, 35:]]
    assert (
        quarters[2].min() > 100
        and max(quarter.mean() for quarter in (*quarters[:2], quarters[3])) < 40
    )


def test_colour_does_not_lie_where_the_model_cuts_a_rest_off():
    picture = np.full((50, 50, 3), 128, np.uint8)
    weights = np.array([[0.0, 0.0], [0.0, 1.0]])
    shown = overlay(picture, weights, 1.0, 0.8).astype(int)
    colour = shown[..., 0] - shown[..., 2]
    assert colour[30:38, 30:38].min() > 100
    assert (colour[40:] == 0).all() and (colour[:, 40:] == 0).all()


def test_unequal_images_and_texts_are_refused(model):
    with pytest.raises(ValueError, match="0 images for 1 texts"):
        word_maps(model, testing.tiny_processor(), [], ["one"])


def test_the_same_curves_give_the_same_bytes_and_leave_gaps():
    series = {"a": ([1, 2, 3], [1.0, math.inf, 3.0])}
    assert curves(series) == curves(series)
    assert curves(series) != curves({"a": ([1, 2, 3], [1.0, 2.0, 3.0])})


# In a browser

# Frames are as narrow as they are told to be; a browser's window is not.
CONTROL = "http://control.invalid/"
WRAPPER = """<!DOCTYPE html><img src="%s">
<iframe id="phone" width="360" height="800" src="report.html"></iframe>
<iframe id="desk" width="1200" height="800" src="report.html"></iframe><pre id="found"></pre>
<script>onload = () => {
  const found = {};
  for (const id of ["phone", "desk"]) {
    const page = document.getElementById(id).contentDocument, root = page.documentElement;
    const images = [...page.images];
    found[id] = {
      inner: page.defaultView.innerWidth, scroll: root.scrollWidth,
      images: images.length, title: page.title,
      loaded: images.filter(
        i => i.complete && i.naturalWidth > 0 && i.getBoundingClientRect().width > 0).length,
      text: page.body.innerText.includes("<script>alert(1)</" + "script>"),
      scripts: page.scripts.length,
      outside: [...page.querySelectorAll("body *")].filter(
        e => !e.closest(".scroll")
          && e.getBoundingClientRect().right > root.clientWidth + 1).length};
  }
  document.getElementById("found").textContent = JSON.stringify(found);
}</script>""".replace("%s", CONTROL)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to open the page in")
def test_in_a_browser_everything_shows_fits_a_phone_and_nothing_is_requested(page, run, tmp_path):
    shutil.copy(run / "report.html", tmp_path)
    (tmp_path / "wrapper.html").write_text(WRAPPER)
    log = tmp_path / "net.json"
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking "
        "--disable-component-update --disable-sync --allow-file-access-from-files "
        "--virtual-time-budget=10000"
    ).split()
    flags.append("--host-resolver-rules=MAP * ~NOTFOUND")
    command = [
        CHROMIUM,
        *flags,
        f"--user-data-dir={tmp_path / 'user'}",
        f"--log-net-log={log}",
        "--dump-dom",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XLA")}
    done = subprocess.run(
        [*command, f"file://{tmp_path / 'wrapper.html'}"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)[1])
    for frame, width in (("phone", 360), ("desk", 1200)):
        seen = found[frame]
        assert seen["inner"] == width and seen["title"] == "run – mammut report"
        assert seen["images"] == seen["loaded"] == len(page.all("img")) > 20
        assert seen["text"] and not seen["scripts"]
        assert seen["scroll"] <= width and not seen["outside"]
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    started = [event for event in events if "initiator" in event]
    # What the browser asks for by itself has no origin. The wrapper's own request shows that a
    # page's would be seen.
    assert {request["url"] for request in started if request["initiator"] != "not an origin"} == {
        CONTROL
    }


def test_videos_are_shown_as_frames_in_order_and_without_heat_maps(tmp_path):
    record = {"key": "moving:val 0", "index": 0, "prediction": "a", "references": ["a"]}
    frames = moving.draw("val", 0, 32)

    def shown(count: int) -> Pictures:
        settings = {"frames": count, "image_size": 32}
        predictions = Predictions("caption", [record], "moving:val", "runs/x", settings)
        return Pictures(predictions, tmp_path, Album())

    pictures = shown(16)
    assert len(pictures.thumbnail(record)) < 10_000
    strip = pictures._pixels(record)
    grey = np.full((32, 2, 3), 128, np.uint8)
    parts = [part for number in (2, 6, 10, 14) for part in (frames[number], grey)]
    np.testing.assert_array_equal(strip, np.concatenate(parts[:-1], axis=1))
    assert pictures.word_maps([record]) == [[]]
    assert pictures.notices == ["There are no heat maps: the model was shown videos."]
    # What is shown is no more than the model was.
    np.testing.assert_array_equal(shown(1)._pixels(record), frames[8])
    assert shown(2)._pixels(record).shape == (32, 66, 3)


@pytest.mark.parametrize("task", ["caption", "vqa", "retrieval"])
def test_pages_of_every_task_show_frames_of_videos(task, tmp_path):
    """The second video has one frame, which is shown once."""
    lines = []
    for number, count in enumerate((8, 1, 8)):
        names = [f"{number}_{frame}.png" for frame in range(count)]
        for shade, name in enumerate(names):
            pixels = np.full((120, 160, 3), (60 * number, 30 * shade, 100), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name)
        line = {"video_id": f"p{number}.png", "frames": [{"file": name} for name in names]}
        lines.append(line | {"captions": ["a"], "qa": [{"question": "b?", "answers": ["red"]}]})
    (tmp_path / "videos.jsonl").write_text("\n".join(map(json.dumps, lines)))
    predictions = all_predictions(f"jsonl:{tmp_path / 'videos.jsonl'}", "none")[task]
    predictions = dataclasses.replace(predictions, settings={"frames": 8, "image_size": 16})
    predictions.save(tmp_path / "x.predictions.jsonl")
    said, page = notices(write_report(tmp_path / "x.predictions.jsonl"))
    assert "cannot be shown" not in said
    sizes = {}
    for shot in page.all("img"):
        jpeg = base64.b64decode(shot["src"].partition(",")[2])
        sizes[shot["alt"]] = Image.open(io.BytesIO(jpeg)).size
    strip, still = (390, 72), (96, 72)
    of_all = {"p0.png": strip, "p1.png": still, "p2.png": strip}
    assert sizes == ({"p0.png": strip} if task == "retrieval" else of_all)
    assert [section.get("class") for section in page.all("section")] == ["videos"]
    assert "frames of each, evenly spaced, the first on the left" in page.words
    assert "where the model looked" not in page.words
