"""Examples shown before a question or a caption, by MAGMA's protocol.

The prompt has the form of MAGMA's first public code (arXiv 2112.05253). It has three pieces for
every example and then for the query itself: the instruction, if there is one; the image; the text.
An example's text is the prompt, such as "Q: what is it? A:" or "A picture of", then a space, then
one of its answers or captions. The query's text ends with the prompt, without a space.
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
    """A question about an example, or the request for its caption."""

    index: int  # of the example in its set
    key: str  # of the example
    text: str  # the prompt with the question in it
    number: int = 0  # of the question in the example
    question_type: str | None = None


class FewShot:
    """Draws examples for queries and makes prompts of them.

    The examples of a query are `shots` different questions (or captioned images) of `source`, in
    random order, all equally likely. None is about an image with the key of the query's image. If
    the query has a question type, examples of that type are drawn first, as MAGMA does for VQAv2
    and OKVQA; others follow if there are too few of them. Each example has one of its answers
    (captions), all equally likely, blank ones left out. An example that cannot be read is replaced
    by the next one.

    All randomness depends on `seed`, the query's index in its set and its number there: neither the
    order of queries nor the batch matters.

    Args:
      source: the set that examples are drawn from. If `shots` is not 0 it is read once at the
        start, for the questions and their types: of a large set in archives, give a part.
      shots: the number of examples; 0 makes the prompt without examples.
      instruction: a text in front of every example and the query.

    Raises:
      ValueError: `shots` or `seed` is negative, or `source` has too few examples; when a prompt is
        made, too few that are not about the query's own image.
    """

    def __init__(self, source: Source, shots: int, *, seed: int = 0, instruction: str = ""):
        for name, value in (("number", shots), ("seed", seed)):
            if value < 0:
                raise ValueError(f"the {name} of shots is {value}, expected at least 0")
        self.source = source
        self.shots = shots
        self.seed = seed
        self.instruction = instruction
        # All candidates: the index of an example and the number of its question.
        self._items: list[tuple[int, int]] = []
        self._keys: list[str] = []  # of the examples of `_items`
        self._of_type: dict[str | None, list[int]] = {}  # positions in `_items` by question type
        if shots:
            self._list_items()
        if len(self._items) < shots:
            raise ValueError(
                f"{source.spec!r} has {len(self._items)} examples to show, "
                f"expected at least {shots}"
            )

    def _list_items(self) -> None:
        for index in range(len(self.source)):
            try:
                example = self.source[index]
            except BadExample:
                continue
            types = [
                (number, question.question_type)
                for number, question in enumerate(example.qa)
                if _written_answers(question)
            ]
            if not types and example.captions:
                types = [(0, None)]
            for number, question_type in types:
                self._of_type.setdefault(question_type, []).append(len(self._items))
                self._items.append((index, number))
                self._keys.append(example.key)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that these prompts depend on, for a predictions file."""
        values = {"shots": self.shots, "shots_seed": self.seed, "instruction": self.instruction}
        return values | {"shots_data": self.source.spec}

    def pieces(
        self, query: Query, image: Any, prompt: str, read: Callable[[Any], Any]
    ) -> list[Any]:
        """Makes the prompt of a query: a list of texts and images.

        Args:
          image: the query's image, as it is to appear in the prompt.
          prompt: the text of an example up to its answer, {} in place of the question.
          read: makes the images of the prompt from the images of the examples.

        Raises:
          ValueError: there are too few examples that are not about the query's image.
        """
        shown = [*self._drawn(query, prompt, read), (image, query.text.rstrip())]
        return [piece for image, text in shown for piece in (self.instruction, image, text)]

    def _drawn(
        self, query: Query, prompt: str, read: Callable[[Any], Any]
    ) -> list[tuple[Any, str]]:
        """Draws the image and text of each example."""
        rng = np.random.default_rng([self.seed, query.index, query.number])
        drawn = []
        candidates = self._candidates(rng, query)
        while len(drawn) < self.shots:
            candidate = next(candidates, None)
            if candidate is None:
                raise ValueError(
                    f"{self.source.spec!r} has {len(drawn)} examples to show beside {query.key!r}, "
                    f"expected at least {self.shots}"
                )
            index, number = self._items[candidate]
            try:
                example = self.source[index]
                image = read(example.image)
            except (BadExample, BadImage):
                continue
            texts = example.captions
            beginning = prompt
            if example.qa:
                question = example.qa[number]
                texts = _written_answers(question)
                beginning = prompt.replace("{}", question.text)
            text = texts[rng.integers(len(texts))]
            drawn.append((image, f"{beginning} {text}".strip()))
        return drawn

    def _candidates(self, rng: np.random.Generator, query: Query) -> Iterator[int]:
        """Yields positions in `_items` in random order.

        Items about the query's image are left out.

        Those of the query's question type come first.
        """
        of_type = []
        if query.question_type:
            of_type = self._of_type.get(query.question_type, [])
        seen = set()
        for pool in (of_type, range(len(self._items))):
            for i in _shuffled(rng, len(pool)):
                if pool[i] not in seen and self._keys[pool[i]] != query.key:
                    seen.add(pool[i])
                    yield pool[i]


def answer_part(text: str, prompt: str, instruction: str = "") -> str:
    """Cuts a generated text after its answer.

    The answer ends at a line break or at the next example.

    The next example begins with the instruction, or with the beginning of `prompt`. A beginning
    such as "Q:" or "A picture of" ends the answer where it stands as words of its own. A beginning
    of one word without punctuation, such as "a", may well belong to the answer and does not end it.
    """
    text = text.partition("\n")[0]
    for head in (instruction.strip(), prompt.partition("{}")[0].strip()):
        if head and not head.isalnum():
            text = re.split(rf"(?<!\w){re.escape(head)}(?!\w)", text, maxsplit=1)[0]
    return text.strip()


def _written_answers(question: Question) -> list[str]:
    """Lists the answers that are not blank."""
    return [answer.strip() for answer in question.answers if answer.strip()]


def _shuffled(rng: np.random.Generator, count: int) -> Iterator[int]:
    """Yields 0 to `count` - 1 in random order (Fisher-Yates).

    The numbers are drawn one by one as they are needed.
    """
    moved: dict[int, int] = {}
    for i in range(count):
        j = int(rng.integers(i, count))
        yield moved.get(j, j)
        moved[j] = moved.get(i, i)
