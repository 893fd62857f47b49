"""Visual question answering scores: the official accuracy and exact match.

Both are also given by type of question and answer. Where each question has one answer, as in
MSRVTT-QA and MSVD-QA, the score of these benchmarks, `exact`, comes first.

The reference is `vqaEval.py` of GT-Vision-Lab/VQA at a013f004, with all its oddities. The formula
is in Antol et al. 2015 (arXiv:1505.00468), and in its averaged form on
visualqa.org/evaluation.html.
"""

import dataclasses
import functools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# The marks that are removed; ' $ % & * : ^ ~ | # stay, and so do periods before a digit.
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
# The official tool passes the flag re.UNICODE, 32, where the number of replacements belongs: at
# most 32 periods are removed.
_MAX_PERIODS = 32
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_ARTICLES = frozenset(("a", "an", "the"))
_DIGITS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
# The official table to the letter: some keys have capitals, which no lower-case word matches; "im"
# is missing; "somebodyd" is reversed.
_CONTRACTIONS = dict(
    pair.split(":")
    for pair in """
'ow'sat:'ow's'at 'ows'at:'ow's'at I'dve:I'd've Id've:I'd've Im:I'm Ive:I've aint:ain't arent:aren't
cant:can't couldn'tve:couldn't've couldnt:couldn't couldnt've:couldn't've couldve:could've
didnt:didn't doesnt:doesn't dont:don't hadn'tve:hadn't've hadnt:hadn't hadnt've:hadn't've
hasnt:hasn't havent:haven't he'dve:he'd've hed:he'd hed've:he'd've hes:he's howd:how'd howll:how'll
hows:how's isnt:isn't it'dve:it'd've itd:it'd itd've:it'd've itll:it'll let's:let's maam:ma'am
mightn'tve:mightn't've mightnt:mightn't mightnt've:mightn't've mightve:might've mustnt:mustn't
mustve:must've neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at
shant:shan't she'dve:she'd've she's:she's shed've:she'd've shouldn'tve:shouldn't've
shouldnt:shouldn't shouldnt've:shouldn't've shouldve:should've somebody'd:somebodyd
somebody'dve:somebody'd've somebodyd've:somebody'd've somebodyll:somebody'll somebodys:somebody's
someone'dve:someone'd've someoned:someone'd someoned've:someone'd've someonell:someone'll
someones:someone's something'dve:something'd've somethingd:something'd somethingd've:something'd've
somethingll:something'll thats:that's there'dve:there'd've thered:there'd thered've:there'd've
therere:there're theres:there's they'dve:they'd've theyd:they'd theyd've:they'd've theyll:they'll
theyre:they're theyve:they've twas:'twas wasnt:wasn't we'dve:we'd've wed've:we'd've werent:weren't
weve:we've whatll:what'll whatre:what're whats:what's whatve:what've whens:when's whered:where'd
wheres:where's whereve:where've who'dve:who'd've whod:who'd whod've:who'd've wholl:who'll whos:who's
whove:who've whyll:why'll whyre:why're whys:why's wont:won't wouldn'tve:wouldn't've wouldnt:wouldn't
wouldnt've:wouldn't've wouldve:would've y'all'dve:y'all'd've y'alld've:y'all'd've y'allll:y'all'll
yall:y'all yall'd've:y'all'd've yall'll:y'all'll you'dve:you'd've youd:you'd youd've:you'd've
youll:you'll youre:you're youve:you've
""".split()
)


_FIRST_WORDS = ("what", "who", "how", "when", "where", "color")


def strip_punctuation(text: str) -> str:
    """Strips punctuation, as the official normalisation does first.

    A mark is removed everywhere if it stands next to a space anywhere in the text. All marks are
    removed if a comma stands between two digits anywhere in the text. Otherwise a mark becomes a
    space. Periods that are not before a digit are removed.
    """
    joined = _DIGIT_COMMA_DIGIT.search(text)
    result = text
    for mark in _MARKS:
        # in the original text, whatever was removed before
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if joined or beside_space else " ")
    return _PERIOD.sub("", result, count=_MAX_PERIODS)


@functools.lru_cache(100_000)  # the answers of a set repeat: ten times faster
def normalize_answer(text: str) -> str:
    """Normalises an answer as the official tool does before it compares.

    Punctuation is stripped (`strip_punctuation`), letters become lower case, number words become
    digits ("none" becomes "0"), articles are removed, contractions get their apostrophe. An answer
    of articles alone becomes "".
    """
    words = (_DIGITS.get(word, word) for word in strip_punctuation(text).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Computes the official accuracy of one prediction, from 0 to 1.

    It is the mean over the answers of min(1, matches / 3), each with that answer left out. With ten
    answers, 1, 2, 3 and 4 or more matches give 0.3, 0.6, 0.9 and 1. Normalisation is skipped if all
    answers are equal but for the space around them: then case and punctuation of the prediction
    count.

    Raises:
      ValueError: there are fewer than 2 answers. The official formula would be 0 for any
        prediction; with fewer than 4 answers it stays below 1.
    """
    _check_answers(answers)
    if len(answers) < 2:
        raise ValueError(
            f"VQA accuracy compares with the other answers of a question, got {len(answers)} answer"
        )
    prediction = _clean(prediction)
    answers = [_clean(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction = normalize_answer(prediction)
        answers = [normalize_answer(answer) for answer in answers]
    matches = answers.count(prediction)
    return _mean([min(1.0, (matches - (answer == prediction)) / 3) for answer in answers])


def magma_truncated_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Computes MAGMA's own accuracy of one prediction, from 0 to 1.

    Do not compare it with `vqa_accuracy`, the official one. The prediction is lower-cased, cut at
    "q:" or a line break, normalised, and then cut to the number of words of the longest answer:
    that leaks the length of the answer and raises scores. The result is the mean over the answers
    of min(1, matches / 3), each with that answer left out; answers are always normalised.
    Reference: `vqa_eval.py` of Aleph-Alpha/magma at 5f11ad3.

    Raises:
      ValueError: there are fewer than 2 answers.
    """
    _check_answers(answers)
    if len(answers) < 2:
        raise ValueError(
            "MAGMA's accuracy compares with the other answers of a question, got "
            f"{len(answers)} answer"
        )
    prediction = _normalize(prediction.lower().partition("q:")[0].partition("\n")[0])
    longest = max(len(answer.split()) for answer in answers)
    prediction = " ".join(prediction.split()[:longest])
    matches = [_normalize(answer) == prediction for answer in answers]
    return _mean([min(1.0, (sum(matches) - match) / 3) for match in matches])


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Tells whether the normalised prediction is one of the normalised answers.

    Both are always normalised, unlike in `vqa_accuracy`: "Yes." matches ten times "yes".

    Raises:
      ValueError: there are no answers.
    """
    _check_answers(answers)
    return _normalize(prediction) in map(_normalize, answers)


def exact(prediction: str, answer: str) -> bool:
    """Tells whether a prediction is the one answer, but for case and the space around it.

    So MSRVTT-QA, MSVD-QA and their like are scored, and every question of the test set counts: also
    one whose answer is misspelt, or rare in training. Nothing else is evened out, unlike in
    `exact_match`: "a dog" is not "dog".
    """
    return prediction.strip().lower() == answer.strip().lower()


def first_word(question: str) -> str:
    """Returns the group of a question: its first word, or "other".

    The groups are those that results on MSRVTT-QA and MSVD-QA are given for.
    """
    word = next(iter(question.lower().split()), "")
    word = {"colour": "color"}.get(word, word)
    return word if word in _FIRST_WORDS else "other"


@dataclasses.dataclass(frozen=True)
class TypeScores:
    """Scores of the questions of one type, from 0 to 1."""

    questions: int
    exact_match: float
    vqa_acc: float | None  # None if `VqaScores.vqa_acc` is None


@dataclasses.dataclass(frozen=True)
class WordScores:
    """The score of the questions with one first word, from 0 to 1."""

    questions: int
    exact: float


@dataclasses.dataclass(frozen=True)
class VqaScores:
    """Scores of a set of answered questions, from 0 to 1.

    The values can be written as JSON.

    Attributes:
      questions: the number of questions.
      exact: the mean of `exact`; None if a question has several answers.
      exact_match: the mean of `exact_match`.
      vqa_acc: the mean of `vqa_accuracy`; None if a question has fewer than 4 answers, since its
        accuracy cannot reach 1.
      vqa_acc_missing: the reason why `vqa_acc` is None, or None.
      most_common_answer: the most frequent answer in this set, normalised; of equals the first in
        the alphabet.
      most_common_exact_match: the exact match of always giving that answer: a score that needs no
        image.
      answer_type_source: "records", or "derived" if the types come from `derived_answer_type`.
      by_answer_type: scores by answer type.
      by_question_type: scores by question type; empty if the records have no question types.
      by_first_word: `exact` by the question's first word; empty where `exact` is None.
    """

    questions: int
    exact: float | None
    exact_match: float
    vqa_acc: float | None
    vqa_acc_missing: str | None
    most_common_answer: str
    most_common_exact_match: float
    answer_type_source: str
    by_answer_type: dict[str, TypeScores]
    by_question_type: dict[str, TypeScores]
    by_first_word: dict[str, WordScores]


def vqa_scores(records: Sequence[Mapping[str, Any]]) -> VqaScores:
    """Scores the records of a predictions file.

    Args:
      records: each with `prediction` (str) and `answers` (list of str of equal weight); all of them
        or none with `answer_type` and `question_type` (str). Scores by first word need `question`.

    Raises:
      ValueError: there are no records, a record has no prediction or no answers, or only some of
        the records have types.
    """
    if not records:
        raise ValueError("VQA scores need at least one record, got none")
    for number, record in enumerate(records):
        _check_record(number, record)
    matches = [exact_match(record["prediction"], record["answers"]) for record in records]
    plain = []
    if all(len(record["answers"]) == 1 for record in records):
        plain = [exact(record["prediction"], record["answers"][0]) for record in records]
    accuracies = None
    missing = None
    if few := sum(len(record["answers"]) < 4 for record in records):
        missing = (
            f"vqa_acc cannot reach 1 under 4 answers a question: {few} of {len(records)} questions "
            "have fewer"
        )
    else:
        accuracies = [vqa_accuracy(record["prediction"], record["answers"]) for record in records]

    def scores(rows: Sequence[int]) -> TypeScores:
        accuracy = None
        if accuracies is not None:
            accuracy = _mean([accuracies[row] for row in rows])
        return TypeScores(len(rows), _mean([matches[row] for row in rows]), accuracy)

    def by(types: Sequence[str]) -> dict[str, TypeScores]:
        rows = defaultdict(list)
        for row, name in enumerate(types):
            rows[name].append(row)
        return {name: scores(rows[name]) for name in sorted(rows)}

    answer_types = _types(records, "answer_type")
    source = "records"
    if answer_types is None:
        answer_types = [derived_answer_type(record["answers"]) for record in records]
        source = "derived"
    answers = [[_normalize(answer) for answer in record["answers"]] for record in records]
    most_common = _most_frequent([answer for own in answers for answer in own])
    whole = scores(range(len(records)))
    return VqaScores(
        questions=whole.questions,
        exact=_mean(plain) if plain else None,
        exact_match=whole.exact_match,
        vqa_acc=whole.vqa_acc,
        vqa_acc_missing=missing,
        most_common_answer=most_common,
        most_common_exact_match=_mean([most_common in own for own in answers]),
        answer_type_source=source,
        by_answer_type=by(answer_types),
        by_question_type=by(_types(records, "question_type") or []),
        by_first_word=_by_first_word(records, plain),
    )


def _by_first_word(
    records: Sequence[Mapping[str, Any]], plain: Sequence[bool]
) -> dict[str, WordScores]:
    """Groups `exact` of each question by its first word; records may have no question."""
    if not plain or not all(isinstance(record.get("question"), str) for record in records):
        return {}
    words = defaultdict(list)
    for record, match in zip(records, plain, strict=True):
        words[first_word(record["question"])].append(match)
    order = [word for word in (*_FIRST_WORDS, "other") if word in words]
    return {word: WordScores(len(words[word]), _mean(words[word])) for word in order}


def derived_answer_type(answers: Sequence[str]) -> str:
    """Derives the type of a question from its answers.

    The most frequent normalised answer decides: the type is "yes/no", "number" or "other".

    The official answer types are split in the same way, but a question's official label may differ.

    Raises:
      ValueError: there are no answers.
    """
    _check_answers(answers)
    answer = _most_frequent([_normalize(answer) for answer in answers])
    if answer in ("yes", "no"):
        return "yes/no"
    return "number" if re.fullmatch(r"\d*\.?\d+", answer) else "other"


def _clean(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _normalize(text: str) -> str:
    return normalize_answer(_clean(text))


def _most_frequent(answers: Iterable[str]) -> str:
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))


def _mean(values: Sequence[float | bool]) -> float:
    return sum(values) / len(values)


def _types(records: Sequence[Mapping[str, Any]], field: str) -> list[str] | None:
    """Lists the types of all records; None if no record has one."""
    types = [record.get(field) for record in records]
    missing = types.count(None)
    if 0 < missing < len(types):
        raise ValueError(
            f"{missing} of {len(types)} records have no {field}: give it in all of them or in none"
        )
    return None if missing else types


def _check_answers(answers: Any) -> None:
    is_list = isinstance(answers, Sequence) and not isinstance(answers, str)
    if not is_list or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"answers must be a list of one string or more, got {answers!r}")


def _check_record(number: int, record: Mapping[str, Any]) -> None:
    if not isinstance(record.get("prediction"), str):
        raise ValueError(
            f"record {number} has the prediction {record.get('prediction')!r}, a string is expected"
        )
    try:
        _check_answers(record.get("answers"))
    except ValueError as error:
        raise ValueError(f"record {number}: {error}") from None
