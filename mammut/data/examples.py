"""What every set of examples gives: the example, its questions, and what makes one unusable."""

import abc
import dataclasses
from typing import Any

from mammut.data.config import Field


class BadExample(ValueError):
    """An example that cannot be used; `cause` says why in a word or two, to be counted by."""

    def __init__(self, message: str, cause: str):
        super().__init__(message)
        self.cause = cause


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about an image, and what people answered."""

    text: str
    # one for each person asked, blank where one said nothing; [] where they are kept back
    answers: list[str]
    id: str  # names the question in predictions
    answer_type: str | None = None  # as a benchmark sorts its questions: yes/no, number, other
    question_type: str | None = None  # what it begins with: "how many"


@dataclasses.dataclass
class Example:
    """One image and what is said about it; only the field that its source was opened for is filled."""

    # encoded bytes, a path, uint8[height, width, 3] or a PIL image, as `Processor.image` takes them
    image: Any
    captions: list[str]
    key: str  # names the example in messages and predictions: its file, where it has one
    qa: list[Question] = dataclasses.field(default_factory=list)
    name: str | None = None  # what the image shows: the class

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """What is given and what is to be said: an empty prompt and a caption or name, a question and an answer."""
        said = [*self.captions, *([] if self.name is None else [self.name])]
        answered = [(q.text, answer) for q in self.qa for answer in q.answers if answer.strip()]
        return [("", text) for text in said] + answered


class Source(abc.ABC):
    """A set of examples by index; `source[i]` raises BadExample where there is no usable example.

    Subclass it to train on data of your own: `spec` (its name in messages), `__len__` and
    `__getitem__` are enough. Examples are read from several threads at once.
    """

    spec: str

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many examples there are."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Example:
        """The example at `index`, 0 to len - 1."""

    def pairs(self, index: int) -> list[tuple[str, str]]:
        """`Example.pairs`, without the cost of the image where that can be saved."""
        return self[index].pairs


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """What a source is opened with: the parts of its spec, and what `open_source` was given."""

    spec: str  # the whole spec, for messages
    kind: str  # what stands before the first colon
    name: str  # what stands after it, without a slice
    field: Field  # what every example must have
    image_size: int  # pixels, of drawn scenes
    tfds_dir: str | None  # the `data_dir` of tensorflow-datasets; None: its default
