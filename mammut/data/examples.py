"""The interface of a set: examples, questions, and unusable examples."""

import abc
import dataclasses
import unicodedata
from collections.abc import Callable
from typing import Any

from mammut.data.config import Field

# Unicode's categories of characters that show nothing alone: control, format, marks and separators.
_INVISIBLE = {"Cc", "Cf", "Mn", "Me", "Zs", "Zl", "Zp"}


def is_blank(text: str) -> bool:
    """Tells whether a text shows nothing: it is empty, of NULs, or of zero-width characters."""
    return all(unicodedata.category(character) in _INVISIBLE for character in text)


def spelled(name: str) -> str:
    r"""Spells a file's name in UTF-8.

    A byte that is not UTF-8 is a lone surrogate in Python's names and `\udcff` here.
    """
    return name.encode("utf-8", "backslashreplace").decode()


class BadExample(ValueError):
    """An example that cannot be used.

    `cause` is the reason in one or two words, for counting.
    """

    def __init__(self, message: str, cause: str):
        super().__init__(message)
        self.cause = cause


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about an image, and what people answered.

    Attributes:
      text: the question.
      answers: one for each person asked, blank where a person gave none; [] where the benchmark
        does not publish them.
      id: the name of the question in predictions.
      answer_type: the benchmark's type of the answer: yes/no, number, other.
      question_type: the first words of the question, such as "how many".
    """

    text: str
    answers: list[str]
    id: str
    answer_type: str | None = None
    question_type: str | None = None


@dataclasses.dataclass
class Example:
    """One image with its texts.

    Only the field that its source was opened for is filled.

    Attributes:
      image: encoded bytes, a path, uint8[height, width, 3] or a PIL image, or a
        `mammut.data.video.Clip`; anything that `Processor.read` reads.
      captions: texts that describe the image.
      key: the name of the example in messages and predictions: its file, where it has one.
      qa: questions about the image, with their answers.
      name: the name of the image's class.
    """

    image: Any
    captions: list[str]
    key: str
    qa: list[Question] = dataclasses.field(default_factory=list)
    name: str | None = None

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Pairs of a prompt and the target text after it.

        A caption or a name has an empty prompt; an answer has its question.
        """
        pairs = [("", caption) for caption in self.captions]
        if self.name is not None:
            pairs.append(("", self.name))
        for question in self.qa:
            pairs += [
                (question.text, answer) for answer in question.answers if not is_blank(answer)
            ]
        return pairs


class Source(abc.ABC):
    """A set of examples by index.

    `source[i]` raises BadExample where the example cannot be used.

    Subclass it to train on data of your own: `spec`, `__len__` and `__getitem__` are enough.
    Examples are read from several threads at once.

    Example:
      >>> class MySource(Source):
      ...     spec = "my photos"  # its name in messages
      ...     def __len__(self):
      ...         return len(PHOTOS)
      ...     def __getitem__(self, index):
      ...         file, caption = PHOTOS[index]
      ...         return Example(image=file, captions=[caption], key=file)
    """

    spec: str

    @abc.abstractmethod
    def __len__(self) -> int:
        """Returns the number of examples."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Example:
        """Returns the example at `index`, 0 to len - 1."""

    def pairs(self, index: int) -> list[tuple[str, str]]:
        """Returns `Example.pairs` of the example at `index`.

        A subclass may leave the image unread.
        """
        return self[index].pairs

    def fingerprint(self) -> str | None:
        """Returns a text that differs where the examples do, and says nothing of where they lie.

        A resumed run compares it. None: the set cannot tell.
        """
        return None

    def notes(self) -> list[str]:
        """Returns what scores say of the set: its split, how many of its videos were found."""
        return []


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """The parts of a spec, and the arguments of `open_source`."""

    spec: str  # the whole spec, for messages
    kind: str  # the part before the first colon
    name: str  # the part after the first colon, without a slice
    field: Field  # the field that every example must have
    image_size: int  # pixels, of drawn scenes
    tfds_dir: str | None  # the `data_dir` of tensorflow-datasets; None: its default
    video: bool = False  # examples are read as videos
    alive: Callable[[], None] = lambda: None  # called again and again while a large set is opened
