"""VQA accuracy against the official tool's answers and by hand, exact match, the scores by type."""

import dataclasses
import hashlib
import json

import pytest

from mammut.evaluation.metrics.vqa import (
    _CONTRACTIONS,
    derived_answer_type,
    exact,
    exact_match,
    first_word,
    magma_truncated_accuracy,
    normalize_answer,
    strip_punctuation,
    vqa_accuracy,
    vqa_scores,
)
from mammut.evaluation.predictions import Predictions
from mammut.evaluation.scoring import score as score_predictions


def json_lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def record(prediction, *answers, **types):
    return {"prediction": prediction, "answers": list(answers), **types}


def test_every_string_is_normalised_as_the_official_tool_does(shared):
    rows = json_lines(shared / "fixtures/vqa_accuracy/normalisation.jsonl")
    assert len(rows) == 66
    assert [strip_punctuation(row["in"]) for row in rows] == [row["punct"] for row in rows]
    assert [normalize_answer(row["in"]) for row in rows] == [row["out"] for row in rows]


def test_every_question_scores_what_the_official_tool_gives_it(shared):
    rows = json_lines(shared / "fixtures/vqa_accuracy/questions.jsonl")
    assert len(rows) == 240
    scores = [round(100 * vqa_accuracy(row["prediction"], row["answers"]), 2) for row in rows]
    assert scores == [row["official_accuracy"] for row in rows]


def test_the_set_scores_what_the_official_tool_prints(shared):
    folder = shared / "fixtures/vqa_accuracy"
    official = json.loads((folder / "scores.json").read_text("utf-8"))
    scores = vqa_scores(json_lines(folder / "questions.jsonl"))
    assert scores.questions == 240 and scores.answer_type_source == "records"
    assert round(100 * scores.vqa_acc, 2) == official["overall"]
    for ours, theirs in (
        (scores.by_answer_type, official["perAnswerType"]),
        (scores.by_question_type, official["perQuestionType"]),
    ):
        assert {name: round(100 * group.vqa_acc, 2) for name, group in ours.items()} == theirs
        assert sum(group.questions for group in ours.values()) == 240
        mean = sum(group.exact_match * group.questions for group in ours.values()) / 240
        assert mean == pytest.approx(scores.exact_match)


def test_the_contraction_table_is_the_official_one():
    """The checksum is of the official table, mistakes included."""
    lines = "\n".join(f"{key} {value}" for key, value in sorted(_CONTRACTIONS.items()))
    digest = "b847028bf993545e795d0f95864b82668b85d531cc6ee3525ae719909a2d1e54"
    assert hashlib.sha256(lines.encode()).hexdigest() == digest


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a-b", "b"),  # each mark a space, then the article goes
        ("red-ish", "red ish"),
        # the comma stands beside a space and goes, the hyphen does not
        ("red-ish, no", "red ish no"),
        ("red-ish - no", "redish no"),  # one hyphen beside a space: all of them go
        ("2,000 red-ish", "2000 redish"),  # a comma between digits: every mark goes without a space
        # the space that the semicolon leaves is beside no hyphen of the text as it came
        ("red-;ish-y", "red ish y"),
        ("1.5.", "1.5"),
        (".5", ".5"),
        ("3.a", "3a"),
        ("im theyre", "im they're"),  # the table has "Im", and no word is a capital one by then
        ("somebody'd", "somebodyd"),
        ("None", "0"),
        ("eleven", "eleven"),
        ("THE Ten", "10"),
        ("<b>red</b>", "b red b"),
        ("100%", "100%"),
        ("." * 40, "." * 8),  # the official tool removes 32 periods
        ("", ""),
    ],
)
def test_normalisation_worked_by_hand(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("red", ["red"] + ["blue"] * 9, 0.3),  # set aside once: 9 times 1/3 and once 0
        ("red", ["red"] * 2 + ["blue"] * 8, 0.6),  # twice 1/3 and 8 times 2/3
        ("red", ["red"] * 3 + ["blue"] * 7, 0.9),  # three times 2/3 and 7 times 1
        ("red", ["red"] * 4 + ["blue"] * 6, 1.0),
        ("green", ["red"] * 4 + ["blue"] * 6, 0.0),
        ("red", ["red", "blue"], 1 / 6),  # once 0 and once 1/3
        ("red", ["red"] * 3, 2 / 3),
        ("red", ["red"] * 4, 1.0),
        ("Red.", ["red"] * 10, 0.0),  # all answers the same: nothing is normalised
        ("Red.", ["red"] * 9 + ["RED"], 1.0),
        ("Red.", ["red"] * 9 + [" red\n"], 0.0),  # the same but for the space around them
        ("hot\tdog\n", ["hot dog"] * 10, 1.0),
        ("hot\ndog", ["hot dog"] * 10, 1.0),
        ("", ["red"] * 9 + ["blue"], 0.0),
        ("the", ["A"] + ["blue"] * 9, 0.3),  # articles alone: both are empty
        ("none", ["0"] * 5 + ["zero"] * 5, 1.0),
        ("<b>red</b>", ["red"] * 9 + ["blue"], 0.0),  # markup is not taken out
    ],
)
def test_accuracy_worked_by_hand(prediction, answers, expected):
    assert vqa_accuracy(prediction, answers) == pytest.approx(expected, abs=1e-15)
    assert vqa_accuracy(prediction, answers[::-1]) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Yes.", ["yes"] * 10, True),  # always normalised
        ("two", ["3", "2"], True),
        ("a red\tball\n", ["red ball"], True),
        ("- red-ish", ["red ish"], False),  # a hyphen beside a space: "redish"
        # the space around the text goes first: no hyphen is beside one
        ("  -red-ish", ["red ish"], True),
        ("red", ["dark red"], False),
        ("", ["red"], False),
        ("<b>red</b>", ["red"], False),
    ],
)
def test_exact_match_worked_by_hand(prediction, answers, expected):
    assert exact_match(prediction, answers) is expected


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["Yes", "yes.", "2"], "yes/no"),
        (["two"], "number"),
        (["2,000"], "number"),
        (["1.5"], "number"),
        ([".5"], "number"),
        (["none", "none", "no"], "number"),
        (["10:30"], "other"),
        (["2 dogs"], "other"),
        (["inf"], "other"),
        (["red", "no"], "yes/no"),  # of equals the first in the alphabet
        (["red", "red", "no"], "other"),
    ],
)
def test_the_answer_type_is_derived_from_the_most_frequent_answer(answers, expected):
    assert derived_answer_type(answers) == expected
    assert derived_answer_type(answers[::-1]) == expected


def test_one_answer_a_question_has_an_exact_match_and_no_accuracy():
    """Five questions: three right; always "2" would have been right twice."""
    records = [
        record("Two", "2"),
        record("3", "2"),
        record("yes", "Yes."),
        record("", "no"),
        record("a chair", "chair"),
    ]
    scores = vqa_scores(records)
    assert scores.questions == 5 and scores.exact_match == 3 / 5
    assert scores.vqa_acc is None and "5 of 5 questions have fewer" in scores.vqa_acc_missing
    assert (scores.most_common_answer, scores.most_common_exact_match) == ("2", 2 / 5)
    assert scores.answer_type_source == "derived" and scores.by_question_type == {}
    assert dataclasses.asdict(scores)["by_answer_type"] == {
        "number": {"questions": 2, "exact_match": 0.5, "vqa_acc": None},
        "other": {"questions": 1, "exact_match": 1.0, "vqa_acc": None},
        "yes/no": {"questions": 2, "exact_match": 0.5, "vqa_acc": None},
    }
    assert json.loads(json.dumps(dataclasses.asdict(scores))) == dataclasses.asdict(scores)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("couch", "couch", True),
        (" Couch\n", "couch", True),
        ("couch", "COUCH ", True),
        ("a couch", "couch", False),
        ("couch.", "couch", False),
        ("2", "two", False),
        ("person", "peson", False),
        ("", "couch", False),
    ],
)
def test_the_score_of_one_answer_evens_out_case_and_space_alone(prediction, answer, expected):
    assert exact(prediction, answer) is expected


def test_questions_are_put_together_by_their_first_word():
    questions = {
        "What is a man doing?": "what",
        "  who sings": "who",
        "how many?": "how",
        "when": "when",
        "where is it": "where",
        "colour of the car?": "color",
        "color of the car?": "color",
        "whats this": "other",
        "is it red?": "other",
        "": "other",
    }
    assert {question: first_word(question) for question in questions} == questions


def asked(question: str, prediction: str, *answers: str, **more) -> dict:
    place = {
        "id": f"{question} {prediction}",
        "key": "video1.avi",
        "index": 0,
        "question": question,
    }
    return place | record(prediction, *answers, **more)


VIDEO_QA = [
    asked("who sings?", "Man ", "man"),
    asked("who runs?", "a man", "man"),
    asked("how many?", "2", "two"),
    asked("is it red?", "yes", "yes"),
    asked("what is it, " + "very " * 40, "", "dog", too_long=True),
]


def test_one_answer_each_is_scored_as_video_questions_are_and_every_question_counts():
    settings = {"set_notes": ["test_qa.json: 1 of 2 videos found, with 5 of 9 questions"]}
    scores = score_predictions(Predictions("vqa", VIDEO_QA, "msvd-qa:...", "here", settings))
    assert next(iter(scores.metrics.items())) == ("exact", 2 / 5)
    assert scores.metrics["exact_match"] == 4 / 5 and "vqa_acc" not in scores.metrics
    assert scores.metrics["by_first_word"] == {
        "what": {"questions": 1, "exact": 0.0},
        "who": {"questions": 2, "exact": 0.5},
        "how": {"questions": 1, "exact": 0.0},
        "other": {"questions": 1, "exact": 1.0},
    }
    assert scores.items == {"questions": 5}
    assert settings["set_notes"][0] in scores.notes
    assert any(note.startswith("exact: equal to the one answer") for note in scores.notes)


def test_ten_answers_are_scored_by_the_official_formula():
    """One question of several answers is enough: the set is none of one answer each."""
    ten = asked("what?", "dog", *["dog"] * 10)
    scores = score_predictions(Predictions("vqa", [ten], "vqav2:...", "here"))
    assert next(iter(scores.metrics)) == "vqa_acc"
    for records in ([ten], [ten, *VIDEO_QA]):
        metrics = score_predictions(Predictions("vqa", records, "set", "here")).metrics
        assert "exact" not in metrics and "by_first_word" not in metrics


def test_four_answers_to_each_question_have_an_accuracy():
    """The first: 2 of 4 match, (1/3 + 1/3 + 2/3 + 2/3) / 4. The second: no answer matches."""
    types = {"answer_type": "colour", "question_type": "what is"}
    records = [
        record("red", "red", "Red", "blue", "pink", **types),
        record("Red", *["red"] * 4, **types),
    ]
    scores = vqa_scores(records)
    assert scores.vqa_acc == pytest.approx(0.25) and scores.vqa_acc_missing is None
    assert scores.exact_match == 1 and scores.most_common_exact_match == 1
    assert scores.by_answer_type["colour"] == scores.by_question_type["what is"]
    assert scores.by_answer_type["colour"].vqa_acc == scores.vqa_acc
    assert vqa_scores([*records, record("red", "red", "red", "red", **types)]).vqa_acc is None


def test_the_most_common_answer_counts_every_answer_of_every_question():
    records = [
        record("x", "red", "red", "blue"),
        record("x", "Blue", "blue", "green"),
        record("x", "pink", "pink"),
    ]
    scores = vqa_scores(records)
    assert (scores.most_common_answer, scores.most_common_exact_match) == ("blue", 2 / 3)
    assert vqa_scores(records[::-1]) == scores


@pytest.mark.parametrize("answers", [[], "yes"])
def test_answers_that_are_no_list_of_strings_are_refused(answers):
    for score in (vqa_accuracy, exact_match):
        with pytest.raises(ValueError, match="answers must be a list of one string or more"):
            score("yes", answers)


def test_the_accuracy_of_a_question_with_one_answer_is_refused():
    with pytest.raises(ValueError, match="got 1 answer"):
        vqa_accuracy("red", ["red"])


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"answers": ["red"]}, "record 1 has the prediction None"),
        (record(None, "red"), "record 1 has the prediction None"),
        (record("red"), r"record 1: answers must be a list of one string or more, got \[\]"),
        ({"prediction": "red", "answers": "red"}, "record 1: answers must be a list"),
        ({"prediction": "red"}, "record 1: answers must be a list .* got None"),
        (record("2", 2), r"record 1: answers must be a list .* got \[2\]"),
        (record("red", "red", answer_type="other"), "1 of 2 records have no answer_type"),
        (record("red", "red", question_type="what is"), "1 of 2 records have no question_type"),
    ],
)
def test_a_record_that_cannot_be_scored_is_refused(bad, error):
    with pytest.raises(ValueError, match=error):
        vqa_scores([record("red", "red"), bad])


def test_no_records_are_refused():
    with pytest.raises(ValueError, match="at least one record, got none"):
        vqa_scores([])


@pytest.mark.parametrize("prediction, answers, expected", [
    # Cut at the next question: 3 of 10 agree. Setting one of them aside leaves 2, another 3: (3 x
    # 2/3 + 7 x 1) / 10.
    ("Red. Q: what? A: blue", ["red"] * 3 + ["dark red"] * 2 + ["blue"] * 5, 0.9),
    ("red\nblue", ["red"] * 3 + ["dark red"] * 2 + ["blue"] * 5, 0.9),
    # Cut to the one word that the longest answer has, which the official score does not do.
    ("red car on a road", ["red"] * 4 + ["blue"] * 6, 1.0),
    ("red car on a road", ["red car"] * 2 + ["blue"] * 8, (2 * 1 / 3 + 8 * 2 / 3) / 10),
    # First normalised, then cut; the words of the answers are counted as they are written.
    ("the red car", ["red"] * 4 + ["blue"] * 6, 1.0),
    ("red car", ["the red"] * 4 + ["blue"] * 6, 0.0),
    # Normalised in any case: the official score leaves texts as they are where all answers agree.
    ("Two", ["2"] * 10, 1.0),
    ("", ["red"] * 10, 0.0),
    ("red", ["red"], None),
])  # fmt: skip
def test_magmas_own_accuracy_truncates_to_the_longest_answer(prediction, answers, expected):
    if expected is None:
        with pytest.raises(
            ValueError, match="compares with the other answers of a question, got 1 answer"
        ):
            magma_truncated_accuracy(prediction, answers)
    else:
        assert magma_truncated_accuracy(prediction, answers) == pytest.approx(expected)


def test_the_official_accuracy_does_not_truncate():
    assert vqa_accuracy("red car on a road", ["red"] * 4 + ["blue"] * 6) == 0
