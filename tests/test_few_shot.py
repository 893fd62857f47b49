"""Examples shown before a query: which are drawn, the prompt, where an answer ends."""

from collections import Counter

import numpy as np
import pytest

from mammut.data.examples import BadExample, Example, Question, Source
from mammut.data.images import BadImage
from mammut.evaluation.few_shot import FewShot, Query, answer_part


class Answered(Source):
    """Pictures with their index in every pixel.

    The fourth is no example, the sixth cannot be decoded.

    Each has two questions, of type "how many" and, from place 2 on, "what". Places 0 and 1 have the
    same key.
    """

    spec = "answered"

    def __init__(self, size: int = 12, typed: bool = True, field: str = "qa"):
        self._size, self._typed, self._field = size, typed, field

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        if index == 3:
            raise BadExample("the fourth is broken", "broken")
        key, image = f"picture {max(index, 1)}", np.full((2, 2, 3), index, np.uint8)
        if self._field == "captions":
            return Example(image, [f"caption {index}", f"other {index}"], key)
        types = ("how many", "what" if index > 1 else "how many") if self._typed else (None, None)
        answers = [f"answer {index}", "", " two ", "three"]
        qa = [
            Question(f"{index}-{n}?", answers, f"{index}-{n}", question_type=kind)
            for n, kind in enumerate(types)
        ]
        return Example(image, [], key, qa)


def read(image: np.ndarray) -> np.ndarray:
    if image[0, 0, 0] == 5:
        raise BadImage("the sixth is damaged", "corrupt")
    return image


def query(index: int = 7, number: int = 0, kind: str | None = "how many") -> Query:
    return Query(index, f"picture {max(index, 1)}", f"Q: {index}-{number}? A:", number, kind)


def shown(few_shot: FewShot, asked: Query) -> list[tuple[int, int]]:
    """Place and question of the examples in a prompt."""
    pieces = few_shot.pieces(asked, np.full((2, 2, 3), 99, np.uint8), "Q: {} A:", read)
    texts = [piece for piece in pieces if isinstance(piece, str) and piece.startswith("Q:")]
    return [tuple(map(int, text.split()[1].rstrip("?").split("-"))) for text in texts[:-1]]


def test_a_prompt_is_the_examples_and_then_the_query_each_behind_the_instruction():
    few_shot = FewShot(Answered(), 2, instruction="Answer.")
    image = np.full((2, 2, 3), 99, np.uint8)
    pieces = few_shot.pieces(query(), image, "Q: {} A:", read)
    assert pieces[::3] == ["Answer."] * 3 and pieces[7] is image and pieces[8] == "Q: 7-0? A:"
    for picture, text, (index, number) in zip(
        pieces[1::3], pieces[2::3], shown(few_shot, query()), strict=False
    ):
        assert (picture == index).all()
        assert text in [
            f"Q: {index}-{number}? A: {answer}" for answer in (f"answer {index}", "two", "three")
        ]


def test_captions_follow_their_prompt():
    few_shot = FewShot(Answered(field="captions"), 3)
    pieces = few_shot.pieces(
        Query(7, "picture 7", "A picture of"), np.zeros((2, 2, 3), np.uint8), "A picture of", read
    )
    texts = [piece for piece in pieces if isinstance(piece, str) and piece]
    assert texts[-1] == "A picture of"
    for picture, text in zip(pieces[1::3], texts[:-1], strict=False):
        index = picture[0, 0, 0]
        assert (
            text in (f"A picture of caption {index}", f"A picture of other {index}") and index != 7
        )


def test_no_shots_are_the_format_alone():
    pieces = FewShot(Answered(), 0).pieces(query(), np.zeros((2, 2, 3), np.uint8), "Q: {} A:", read)
    assert [piece for piece in pieces if isinstance(piece, str) and piece] == ["Q: 7-0? A:"]


@pytest.mark.parametrize("index", [0, 1, 7])
def test_examples_differ_have_the_type_asked_for_and_are_never_about_the_querys_image(index):
    own = {0, 1} if index < 2 else {index}
    for seed in range(40):
        few_shot = FewShot(Answered(), 4, seed=seed)
        for kind, numbers in (("how many", {0}), ("what", {1})):
            drawn = shown(few_shot, query(index, 0, kind))
            assert len(set(drawn)) == 4
            assert not own & {place for place, _ in drawn}
            assert {number for place, number in drawn if place > 1} <= numbers


def test_every_example_and_answer_is_as_likely():
    few_shot, counts, answers = FewShot(Answered(), 2), Counter(), Counter()
    for index in range(100, 500):
        asked = query(index, kind="what")
        counts.update(place for place, _ in shown(few_shot, asked))
        pieces = few_shot.pieces(asked, np.zeros((2, 2, 3), np.uint8), "Q: {} A:", read)
        answers[pieces[2].split("A: ")[1].split()[0]] += 1
    assert sorted(counts) == [2, 4, 6, 7, 8, 9, 10, 11]  # no third: it is broken; no sixth: damaged
    assert all(abs(count - 100) < 5 * (100 * 3 / 4) ** 0.5 for count in counts.values())
    assert sorted(answers) == ["answer", "three", "two"]
    assert all(abs(count - 400 / 3) < 5 * (400 / 3 * 2 / 3) ** 0.5 for count in answers.values())


def test_where_a_type_has_too_few_the_rest_are_any():
    drawn = shown(FewShot(Answered(), 12), query(7, 1, "what"))
    assert {number for _, number in drawn[:7]} == {1} and len(set(drawn)) == 12
    assert {place for place, _ in drawn[:7]} == {2, 4, 6, 8, 9, 10, 11}
    assert {number for _, number in drawn[7:]} == {0} | (
        {1} & {number for place, number in drawn[7:] if place < 2}
    )


def test_without_types_any_question_will_do():
    few_shot = FewShot(Answered(typed=False), 4)
    drawn = [pair for index in range(100, 150) for pair in shown(few_shot, query(index, kind=None))]
    assert {number for _, number in drawn} == {0, 1} and {place for place, _ in drawn} >= {
        0,
        1,
        2,
        4,
    }


def test_what_is_drawn_follows_from_the_seed_and_the_question_alone():
    queries = [query(index, number) for index in range(8) for number in range(2) if index != 3]
    first, again, other = (FewShot(Answered(), 3, seed=seed) for seed in (0, 0, 1))
    drawn = [shown(first, asked) for asked in queries]
    assert [shown(again, asked) for asked in reversed(queries)] == drawn[::-1]
    assert [shown(other, asked) for asked in queries] != drawn
    # neither the same for every picture nor every question
    assert len(set(map(tuple, drawn))) > len(queries) // 2


@pytest.mark.parametrize("shots, seed, message", [
    (-1, 0, "the number of shots is -1, expected at least 0"),
    (1, -1, "the seed of shots is -1, expected at least 0"),
    (30, 0, "'answered' has 22 examples to show, expected at least 30"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_refused(shots, seed, message):
    with pytest.raises(ValueError, match=message):
        FewShot(Answered(), shots, seed=seed)


def test_too_few_beside_the_query_are_refused():
    few_shot = FewShot(Answered(size=3), 3)
    with pytest.raises(
        ValueError,
        match="'answered' has 2 examples to show beside 'picture 1', expected at least 3",
    ):
        shown(few_shot, query(0))


@pytest.mark.parametrize("text, prompt, answer", [
    (" a cat\nQ: what? A: a dog", "Q: {} A:", "a cat"),
    (" a cat Q: what? A: a dog", "Q: {} A:", "a cat"),
    ("\n a cat", "Q: {} A:", ""),
    (" a faq: yes", "Q: {} A:", "a faq: yes"),
    (" a cat Q: what?", "Question: {} Answer:", "a cat Q: what?"),
    (" a cat Question: what?", "Question: {} Answer:", "a cat"),
    (" a cat", "{}", "a cat"),
    (" a cat A picture of a dog", "A picture of", "a cat"),
    (" a cat", "", "a cat"),
    (" a dog on a beach", "a", "a dog on a beach"),  # a beginning that is any word
])  # fmt: skip
def test_an_answer_ends_at_a_line_break_or_the_next_example(text, prompt, answer):
    assert answer_part(text, prompt) == answer


def test_an_answer_ends_at_the_instruction_of_the_next_example():
    assert answer_part(" cat Please answer. Q: x", "Q: {} A:", "Please answer.") == "cat"
    assert answer_part(" cat Q: x Please answer.", "Q: {} A:", "Please answer.") == "cat"
