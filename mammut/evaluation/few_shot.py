"""Examples in front of a question or a caption: how they are drawn and what the prompt looks like (MAGMA's protocol).

The prompt of a query, as in the first public code of MAGMA (arXiv 2112.05253), is for every example
and then for the query itself: the instruction, if there is one; the image; the text. An example's
text is the prompt's, such as "Q: what is it? A:" or "A picture of", a space, and one of its answers
or captions; the query's ends with the prompt, without a space.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mammut.data.examples import BadExample, Question, Source
from mammut.data.images import BadImage


@dataclasses.dataclass(frozen=True)
class Query:
    """What is asked: the `number`-th question of the example at `index`, or its caption."""

    index: int
    key: str  # of the example
    text: str  # the prompt, with the question in its place
    number: int = 0
    question_type: str | None = None


class FewShot:
    """Draws examples for queries and makes prompts of them.

    The rule: the examples of a query are `shots` different questions (or captioned images) of
    `source`, in random order, all equally likely; none about an image with the key of the query's
    own. Where the query has a question type, so have they, as MAGMA draws them for VQAv2 and OKVQA,
    as far as there are so many; the rest are any. Each comes with one of its answers (captions),
    all equally likely, blank ones left out. One that cannot be read is passed over for the next.
    Everything random follows from `seed`, the query's index in its set and its number there:
    neither the order of queries nor the batch matters.

    Args:
      source: read once, at the start, where there are shots, for the questions and their types: of
        a large set in archives, give a part.
      shots: 0 makes the prompt without examples.
      instruction: said in front of every example and the query.

    Raises:
      ValueError: `shots` or `seed` is negative, or `source` has too few examples; when a prompt is
        made, too few that are not about the query's own image.
    """

    def __init__(self, source: Source, shots: int, *, seed: int = 0, instruction: str = ""):
        for name, value in (("number", shots), ("seed", seed)):
            if value < 0:
                raise ValueError(f"the {name} of shots is {value}, expected at least 0")
        self.source, self.shots, self.seed, self.instruction = source, shots, seed, instruction
        self._items: list[tuple[int, int]] = []  # example in the source, question in the example
        self._keys: list[str] = []
        self._of_type: dict[str, list[int]] = {}
        for index in range(len(source) if shots else 0):
            try:
                example = source[index]
            except BadExample:
                continue
            types = [(number, q.question_type) for number, q in enumerate(example.qa) if _said(q)]
            for number, question_type in types or [(0, None)] * bool(example.captions):
                self._of_type.setdefault(question_type, []).append(len(self._items))
                self._items.append((index, number))
                self._keys.append(example.key)
        if len(self._items) < shots:
            raise ValueError(
                f"{source.spec!r} has {len(self._items)} examples to show, expected at least {shots}"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """What tells these prompts from others, for a predictions file."""
        values = {"shots": self.shots, "shots_seed": self.seed, "instruction": self.instruction}
        return values | {"shots_data": self.source.spec}

    def pieces(
        self, query: Query, image: Any, prompt: str, read: Callable[[Any], Any]
    ) -> list[Any]:
        """The prompt of a query about `image`, for `mammut.generation.interleaved`; `read` makes pictures of the examples' images.

        `prompt` is what examples are asked with, {} in place of the question.
        """
        shown = [*self._drawn(query, prompt, read), (image, query.text.rstrip())]
        return [piece for image, text in shown for piece in (self.instruction, image, text)]

    def _drawn(
        self, query: Query, prompt: str, read: Callable[[Any], Any]
    ) -> list[tuple[Any, str]]:
        rng = np.random.default_rng([self.seed, query.index, query.number])
        drawn = []
        places = self._places(rng, query)
        while len(drawn) < self.shots:
            place = next(places, None)
            if place is None:
                raise ValueError(
                    f"{self.source.spec!r} has {len(drawn)} examples to show beside {query.key!r}, expected at least "
                    f"{self.shots}"
                )
            index, number = self._items[place]
            try:
                example = self.source[index]
                image = read(example.image)
            except (BadExample, BadImage):
                continue
            question = example.qa[number] if example.qa else None
            texts = _said(question) if question else example.captions
            asked = prompt.replace("{}", question.text) if question else prompt
            drawn.append((image, f"{asked} {texts[rng.integers(len(texts))]}".strip()))
        return drawn

    def _places(self, rng: np.random.Generator, query: Query) -> Iterator[int]:
        """Places in `_items`, in random order: those of the query's type first, none about its image."""
        of_type = self._of_type.get(query.question_type, []) if query.question_type else []
        seen = set()
        for pool in (of_type, range(len(self._items))):
            for i in _shuffled(rng, len(pool)):
                if pool[i] not in seen and self._keys[pool[i]] != query.key:
                    seen.add(pool[i])
                    yield pool[i]


def answer_part(text: str, prompt: str, instruction: str = "") -> str:
    """What a model said, up to a line break or the next example: the instruction, or what `prompt` begins with.

    A beginning such as "Q:" or "A picture of" ends the answer where it stands as words of its own;
    one that is a single word, such as "a", may well be a part of it.
    """
    text, heads = text.partition("\n")[0], (instruction.strip(), prompt.partition("{}")[0].strip())
    for head in heads:
        if head and not head.isalnum():
            text = re.split(rf"(?<!\w){re.escape(head)}(?!\w)", text, maxsplit=1)[0]
    return text.strip()


def _said(question: Question) -> list[str]:
    return [answer.strip() for answer in question.answers if answer.strip()]


def _shuffled(rng: np.random.Generator, count: int) -> Iterator[int]:
    """0 to `count` - 1 in random order, drawn only as far as they are asked for (Fisher-Yates)."""
    moved: dict[int, int] = {}
    for i in range(count):
        j = int(rng.integers(i, count))
        yield moved.get(j, j)
        moved[j] = moved.get(i, i)
