"""Caption metrics: the official tool's numbers, cases worked by hand, every way Java can fail."""

import gzip
import importlib.util
import json
import math
import os
import pathlib
import shutil
import sys

import pytest

from mammut.evaluation.metrics.captions import (
    _java_tokenize,
    _own_scores,
    _spice,
    caption_scores,
    ptb_tokenize,
)

SETS = (
    "cococaption_fakecap_in_val2017",
    "human_leave_one_out_400",
    "human_shuffled_400",
    "degenerate_300",
)
OFFICIAL_NAMES = {f"bleu_{n}": f"Bleu_{n}" for n in (1, 2, 3, 4)} | {
    "rouge_l": "ROUGE_L",
    "cider": "CIDEr",
}
NO_PYCOCOEVALCAP = importlib.util.find_spec("pycocoevalcap") is None
needs_pycocoevalcap = pytest.mark.skipif(NO_PYCOCOEVALCAP, reason="pycocoevalcap is not installed")
needs_java = pytest.mark.skipif(
    NO_PYCOCOEVALCAP or not shutil.which("java"), reason="no Java or no pycocoevalcap"
)

# Text and the official tokenizer's answer (`~` is a no-break space); with Java, a test below asks
# it again.
TOKENIZED = [
    ("A dog runs.", "a dog runs"),
    (
        "can't CANNOT gonna gotta lemme won't it's",
        "ca n't can not gon na got ta lem me wo n't it 's",
    ),
    (
        "They've said I'd go; dogs' bones aren't James's",
        "they 've said i 'd go dogs bones are n't james 's",
    ),
    ("dog’s “bone” don’t ‘sit’", "dog 's bone do n't sit"),
    (
        "'tis rock'n'roll, ma'am, 5 o'clock y'all 'em",
        "'t is rock 'n' roll ma'am 5 o'clock y' all 'em",
    ),
    ("near a 'no parking' sign", "near a no parking sign"),
    (
        "Mr. Smith of the U.S. at 5 p.m. on Main St. etc.",
        "mr. smith of the u.s. at 5 p.m. on main st. etc.",
    ),
    ("bus no. 5, no. I meant 6.", "bus no. 5 no i meant 6"),
    ("Vitamin K. A dog", "vitamin k a dog"),
    ("street.the dog., then", "street.the dog. then"),
    ("a T-shirt - well-dressed -- 3-year-old — a–b", "a t-shirt well-dressed 3-year-old a b"),
    (
        "1,000 at 10:30am, $5.00 50% #1 1980's '90s",
        "1,000 at 10:30 am $ 5.00 50 % # 1 1980 's '90s",
    ),
    ("and/or 1/2 cup, 23 3/4 cups 3½", "and/or 1/2 cup 23~3/4 cups 3 1/2"),
    (
        "(round) [square] {curly} <b>bold</b>",
        "-lrb- round -rrb- -lsb- square -rsb- -lcb- curly -rcb- <b> bold </b>",
    ),
    ("call (555) 555-1234", "call -lrb-555-rrb-~555-1234"),
    ("wait... what?! no!!! …and .. so . . .", "wait what ?! no !!! and so"),
    ("AT&T, R&B, a&b, C++ a*b a_b **", "at&t r&b a & b c++ a * b a_b **"),
    (
        "www.foo.com, me@bar.com http://a.org/x #tag @me",
        "www.foo.com me@bar.com http://a.org/x #tag @me",
    ),
    ("smile :) :-( ;D", "smile :-rrb- :--lrb- ;d"),
    ("Café naïve 日本 €5 £5 5¢ 20° ™", "café naïve 日本 $ 5 # 5 5 cents 20 ° ™"),
    ("a cat😀dog ❤\ufe0f so\xadft", "a cat dog ❤ soft"),
    ("fish &amp; chips", "fish & chips"),
    ("", ""),
    (" .,;:- ", ""),
]


def fixture_rows(shared: pathlib.Path, name: str) -> list[dict]:
    return [
        json.loads(line)
        for line in open(shared / "fixtures/caption_metrics" / f"{name}.jsonl", encoding="utf-8")
    ]


def fixture_scores(shared: pathlib.Path, name: str) -> dict[str, float]:
    return json.loads((shared / "fixtures/caption_metrics/scores.json").read_text())[name]


@pytest.fixture
def own_java(monkeypatch, tmp_path):
    """Puts a shell script on the PATH as `java`; it finds the real one in $REAL_JAVA."""

    def put(script: str) -> None:
        program = tmp_path / "java"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("REAL_JAVA", shutil.which("java") or "")
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return put


@pytest.mark.parametrize("text, expected", TOKENIZED)
def test_tokens_are_those_of_the_official_tokenizer(text, expected):
    assert " ".join(ptb_tokenize(text)) == expected.replace("~", "\xa0")


@needs_java
def test_the_official_tokenizer_gives_the_tokens_this_file_expects_of_it():
    # A line of small letters between them: the official tokenizer looks into the next line.
    answers = _java_tokenize([[text, "then"] for text, _ in TOKENIZED])
    assert [answer for answer, _ in answers] == [
        expected.replace("~", "\xa0") for _, expected in TOKENIZED
    ]


@pytest.mark.parametrize("name", SETS)
def test_every_fixture_string_is_tokenized_as_by_the_official_tool(shared, name):
    for row in fixture_rows(shared, name):
        texts, expected = [*row["refs"], row["cand"]], [*row["refs_tok"], row["cand_tok"]]
        assert [" ".join(ptb_tokenize(text)) for text in texts] == expected


@needs_java
def test_coco_captions_are_tokenized_as_by_the_official_tool_but_for_a_letter_before_the_next_line(
    shared,
):
    file = shared / "fixtures/coco_captions_val2017_text_only.json.gz"
    texts = [annotation["caption"] for annotation in json.load(gzip.open(file))["annotations"]]
    texts = [text.replace("\n", " ") for text in texts]
    (official,) = _java_tokenize([texts])
    different = [
        text for text, answer in zip(texts, official) if " ".join(ptb_tokenize(text)) != answer
    ]
    assert len(texts) == 24669
    assert len(different) <= 3 and all(text[-3] == " " and text[-1] == "." for text in different)


@pytest.mark.parametrize("name", SETS)
def test_scores_without_java_are_the_official_ones(shared, name):
    rows, expected = fixture_rows(shared, name), fixture_scores(shared, name)
    scores = caption_scores(
        [row["cand"] for row in rows], [row["refs"] for row in rows], java=False
    )
    assert scores.metrics.keys() == OFFICIAL_NAMES.keys()
    for ours, official in OFFICIAL_NAMES.items():
        assert scores.metrics[ours] == pytest.approx(expected[official], rel=1e-12, abs=0)
    for ours, official in (("bleu_4", "Bleu_4"), ("cider", "CIDEr"), ("rouge_l", "ROUGE_L")):
        assert scores.per_image[ours] == pytest.approx(
            [row[official] for row in rows], rel=1e-12, abs=1e-12
        )
    assert scores.left_out.keys() == {"meteor", "spice"}


@pytest.mark.long
@needs_java
def test_scores_with_java_are_the_official_ones_with_meteor(shared):
    rows, expected = fixture_rows(shared, SETS[0]), fixture_scores(shared, SETS[0])
    scores = caption_scores([row["cand"] for row in rows], [row["refs"] for row in rows], java=True)
    for ours, official in (OFFICIAL_NAMES | {"meteor": "METEOR"}).items():
        assert scores.metrics[ours] == expected[official]
    for ours, official in (
        ("bleu_4", "Bleu_4"),
        ("cider", "CIDEr"),
        ("rouge_l", "ROUGE_L"),
        ("meteor", "METEOR"),
    ):
        assert scores.per_image[ours] == [row[official] for row in rows]
    assert "pycocoevalcap" in scores.tool and "Stanford" in scores.tokenizer


@pytest.mark.long
@needs_java
def test_empty_captions_and_line_breaks_score_alike_with_and_without_java(capfd):
    predictions = ["", "a cat", "a dog\u2028runs\ron\n\n\tthe\x85grass", "two\vbirds\f", "\n"]
    references = [
        ["a cat sat"],
        [""],
        ["a dog runs on grass", "x"],
        ["two birds\r\n", "\u2029birds"],
        ["."],
    ]
    with_java = caption_scores(predictions, references, java=True)
    printed = capfd.readouterr()
    without = caption_scores(predictions, references, java=False)
    for name, values in without.per_image.items():
        assert with_java.per_image[name] == pytest.approx(values, rel=1e-12, abs=1e-15)
        assert with_java.metrics[name] == pytest.approx(without.metrics[name], rel=1e-12)
    assert with_java.per_image["rouge_l"] == [0, 0, pytest.approx(1.0, abs=0.1), 1, 1]
    assert all(map(math.isfinite, with_java.metrics.values())) and "meteor" in with_java.metrics
    assert printed.out == printed.err == ""


@needs_pycocoevalcap
def test_metrics_equal_the_official_ones_on_odd_token_strings():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    candidates = ["", "a a a a a a", "a b", "b a b a c\xa0d", "a"]
    references = [
        ["a"],
        ["a b", "", "a a a"],
        ["b a", "a b"],
        ["a b c d", "c\xa0d"],
        ["b", "a", "a a a a a a a a"],
    ]
    for count in (1, 2, 5):
        truth = dict(enumerate(references[:count]))
        said = {image: [text] for image, text in enumerate(candidates[:count])}
        scores = _own_scores(candidates[:count], references[:count])
        bleu, bleu_of_image = Bleu(4).compute_score(truth, said, verbose=0)
        official = {f"bleu_{n + 1}": (bleu[n], bleu_of_image[n]) for n in range(4)}
        official |= {
            "rouge_l": Rouge().compute_score(truth, said),
            "cider": Cider().compute_score(truth, said),
        }
        for name, (total, of_image) in official.items():
            assert scores[name][0] == pytest.approx(total, rel=1e-12, abs=0)
            assert scores[name][1] == pytest.approx(list(of_image), rel=1e-12, abs=0)


def test_bleu_of_a_short_caption_is_its_precision_times_the_brevity_penalty():
    scores = caption_scores(["the cat"], [["the cat sat"]], java=False)
    assert scores.metrics["bleu_1"] == pytest.approx(math.exp(1 - 3 / 2), rel=1e-8)


def test_bleu_takes_the_shorter_of_two_equally_close_references():
    scores = caption_scores(["red green blue"], [["red green", "red green blue pink"]], java=False)
    assert scores.metrics["bleu_1"] == pytest.approx(1, rel=1e-8)


def test_bleu_counts_a_word_as_often_as_one_reference_has_it():
    scores = caption_scores(["the the the"], [["the cat", "the the dog"]], java=False)
    assert scores.metrics["bleu_1"] == pytest.approx(2 / 3, rel=1e-8)


def test_rouge_l_of_a_pair_worked_by_hand():
    # Longest common subsequence "red blue pink": precision 3/4, recall 3/5, beta 1.2.
    scores = caption_scores(["red green blue pink"], [["red blue green pink sky"]], java=False)
    assert scores.metrics["rouge_l"] == pytest.approx(
        (1 + 1.44) * 0.75 * 0.6 / (0.6 + 1.44 * 0.75), rel=1e-12
    )


def test_rouge_l_takes_best_precision_and_best_recall_over_the_references():
    # Precision 2/3 from the first reference, recall 1 from the second.
    scores = caption_scores(["red green blue"], [["red green sky sea", "blue"]], java=False)
    assert scores.metrics["rouge_l"] == pytest.approx(
        2.44 * (2 / 3) / (1 + 1.44 * 2 / 3), rel=1e-12
    )


def test_cider_of_two_images_worked_by_hand():
    # Every n-gram is in one of two images, so each weighs log 2, which cancels. First image:
    # unigrams (2, 2) against (1, 1), clipped: 2 / (sqrt 8 sqrt 2); bigrams (2, 1) against (1, 0): 1
    # / sqrt 5; 3 bigrams against 1, so exp(-2^2 / (2 6^2)). Second: half of the unigrams.
    scores = caption_scores(
        ["red green red green", "big dog"], [["red green"], ["big cat"]], java=False
    )
    first = 10 / 4 * (1 / 2 + 1 / math.sqrt(5)) * math.exp(-4 / 72)
    assert scores.per_image["cider"] == pytest.approx([first, 10 / 4 / 2], rel=1e-12)
    assert scores.metrics["cider"] == pytest.approx((first + 10 / 4 / 2) / 2, rel=1e-12)


def test_cider_ignores_what_every_image_has():
    scores = caption_scores(["a", "a"], [["a red"], ["a green"]], java=False)
    assert scores.per_image["cider"] == [0, 0]


def test_one_image_alone_has_a_cider_of_zero():
    scores = caption_scores(["a red dog"], [["a red dog"]], java=False)
    assert scores.metrics["cider"] == 0 and scores.metrics["bleu_3"] == pytest.approx(1, rel=1e-8)


def test_captions_without_a_word_have_finite_scores():
    scores = caption_scores(["", "."], [[""], ["?", "-"]], java=False)
    assert all(map(math.isfinite, scores.metrics.values()))
    assert scores.metrics["bleu_1"] == scores.metrics["cider"] == 0


@pytest.mark.parametrize(
    "predictions, references, message",
    [
        ([], [], "at least one image"),
        (["a"], [["a"], ["b"]], "1 predictions and references for 2 images"),
        (["a", "b"], [["a"], []], r"references\[1\] must be a list of one or more captions"),
        (["a"], ["a cat"], r"references\[0\] must be a list of one or more captions, got 'a cat'"),
        ("a", [["a"]], "must be a list of captions, got the string 'a'"),
    ],
)
def test_bad_input_is_refused_by_what_was_given(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        caption_scores(predictions, references, java=False)


@needs_pycocoevalcap
def test_without_java_on_the_path_the_rest_is_scored_and_the_reason_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = caption_scores(["a dog", "a cat"], [["a dog"], ["a bird"]])
    assert scores.left_out == dict.fromkeys(("meteor", "spice"), "Java was not found on the PATH")
    assert scores.tool == "mammut" and "Java was not found" in scores.tokenizer
    with pytest.raises(ValueError, match="java=True was asked for, but Java was not found"):
        caption_scores(["a dog"], [["a dog"]], java=True)


def test_without_pycocoevalcap_the_reason_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    scores = caption_scores(["a dog", "a cat"], [["a dog"], ["a bird"]])
    assert "pip install 'mammut-jax[eval]'" in scores.left_out["meteor"]


@needs_pycocoevalcap
@pytest.mark.parametrize("script", ["echo no memory >&2; exit 1", "cat > /dev/null; echo a dog"])
def test_where_java_fails_or_loses_lines_the_python_tokenizer_takes_over(own_java, script):
    own_java(script)
    predictions, references = ["a dog", "a cat"], [["a dog"], ["a bird", "a cat"]]
    scores = caption_scores(predictions, references)
    assert (
        "the Java tokenizer failed" in scores.tokenizer
        and "the Java tokenizer failed" in scores.left_out["meteor"]
    )
    assert scores.metrics == caption_scores(predictions, references, java=False).metrics


@needs_java
@pytest.mark.parametrize(
    "death", ["echo no memory >&2; exit 1", "head -c 1 > /dev/null; echo nonsense"]
)
def test_where_meteor_dies_the_other_metrics_remain(own_java, death):
    own_java(f'case "$*" in *meteor*) {death};; *) exec "$REAL_JAVA" "$@";; esac')
    scores = caption_scores(["a dog", "a cat"], [["a dog"], ["a bird"]])
    assert (
        "the METEOR process failed" in scores.left_out["meteor"] and "meteor" not in scores.metrics
    )
    assert "pycocoevalcap" in scores.tool and scores.metrics["rouge_l"] == pytest.approx(0.75)


@needs_java
def test_references_without_a_word_do_not_stop_the_official_cider(own_java):
    own_java('case "$*" in *meteor*) exit 1;; *) exec "$REAL_JAVA" "$@";; esac')
    scores = caption_scores(["a dog", ""], [["."], [""]])
    assert scores.per_image["cider"] == [0, 0] and "pycocoevalcap" in scores.tool


@needs_java
def test_spice_is_never_downloaded():
    folder = pathlib.Path(importlib.util.find_spec("pycocoevalcap.spice").origin).parent / "lib"
    if (folder / "stanford-corenlp-3.6.0.jar").exists():
        pytest.skip("the SPICE jars are here")
    with pytest.raises(ValueError, match="stanford-corenlp-3.6.0.jar is not in pycocoevalcap"):
        _spice({0: ["a dog"]}, {0: ["a dog"]})
