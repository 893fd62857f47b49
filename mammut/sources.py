"""Sets of examples by index: drawn scenes, a folder of images with JSON lines, a prepared tensorflow-datasets set.

A source is opened for one `Field`: captions, questions with answers ("qa"), or the name of what an image shows.
"""

import abc
import array
import dataclasses
import json
import os
import pathlib
import re
import weakref
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from mammut import synthetic

Field = Literal["captions", "qa", "name"]


class BadExample(ValueError):
    """An example that cannot be used; `cause` says why in a word or two, to be counted by."""

    def __init__(self, message: str, cause: str):
        super().__init__(message)
        self.cause = cause


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about an image, and what people answered."""

    text: str
    answers: list[str]  # one for each person asked; empty where a benchmark keeps them back
    id: str  # names the question in predictions
    answer_type: str | None = None  # as a benchmark sorts its questions: yes/no, number, other
    question_type: str | None = None  # what it begins with: "how many"


@dataclasses.dataclass
class Example:
    """One image and what is said about it; only the field that its source was opened for is filled."""

    image: Any  # encoded bytes, a path, uint8[height, width, 3] or a PIL image, as `Processor.image` takes them
    captions: list[str]
    key: str  # names the example in messages and predictions: its file, where it has one
    qa: list[Question] = dataclasses.field(default_factory=list)
    name: str | None = None  # what the image shows: the class

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """What is given and what is to be said: an empty prompt and a caption or name, a question and an answer."""
        said = [*self.captions, *([] if self.name is None else [self.name])]
        return [("", text) for text in said] + [(q.text, answer) for q in self.qa for answer in q.answers]


class Source(abc.ABC):
    """A set of examples by index; `source[i]` raises BadExample where there is no usable example.

    Subclass it to train on data of your own: `spec` (its name in messages), `__len__` and `__getitem__` are enough.
    Examples are read from several threads at once.
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


def open_source(spec: str, *, image_size: int, tfds_dir: str | None = None, field: Field = "captions") -> Source:
    """Opens a set of images with captions, with questions and answers, or with names.

    Args:
      spec: One of these, each with an optional slice in examples or percent such as `[1000:]` or `[:90%]`.
        `synthetic:train`, `synthetic:val`: the drawn scenes of `mammut.synthetic`.
        `jsonl:PATH`: one object a line with a "file", relative to PATH, which is the .jsonl or a folder that holds
        exactly one; and with the field asked for: "captions", a list of texts; "qa", a list of
        `{"question", "answers": [...]}`, optionally with "question_id", "answer_type" and "question_type"; or "name".
        Only the place of each line is kept in memory.
        `tfds:NAME/SPLIT`: a set that tensorflow-datasets has prepared as array_record; NAME may have a config and a
        version, or be the folder of the prepared set. The image is its field `image`, the captions are its first field
        of `captions` (a sequence of texts, or of objects with a `text`, as in COCO), `caption` and `text`.
      image_size: Pixels of the drawn scenes; other sources give their images as they are stored.
      tfds_dir: The `data_dir` of tensorflow-datasets; None is its default.
      field: What an example must have; one without it is a BadExample.

    Raises:
      ValueError: the spec is none of these, the set does not exist, or there is nothing in it.
    """
    name, start, stop = re.fullmatch(r"(.*?)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", spec, re.DOTALL).groups()
    kind, _, name = name.partition(":")
    if kind == "synthetic" and name in ("train", "val"):
        source = _Synthetic(name, image_size, field)
    elif kind == "jsonl" and name:
        source = _Jsonl(spec, pathlib.Path(name).expanduser(), field)
    elif kind == "tfds" and all(name.rpartition("/")):
        source = _Tfds(spec, name, tfds_dir)
    else:
        raise ValueError(
            f"data source {spec!r} is not synthetic:train, synthetic:val, jsonl:PATH or tfds:NAME/SPLIT, "
            "each with an optional [a:b] in examples or percent"
        )

    def bound(text: str | None) -> int | None:
        if text is None or not text.endswith("%"):
            return text and int(text)
        return round(len(source) * int(text[:-1]) / 100)

    rows = range(len(source))[bound(start) : bound(stop)]
    if not rows:
        raise ValueError(f"data source {spec!r} is empty, expected at least one example; the set has {len(source)}")
    return _Slice(spec, source, rows)


class _Slice(Source):
    def __init__(self, spec: str, source: Source, rows: range):
        self.spec, self._source, self._rows = spec, source, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        return self._source[self._rows[index]]

    def pairs(self, index: int) -> list[tuple[str, str]]:
        return self._source.pairs(self._rows[index])


class _Synthetic(Source):
    def __init__(self, split: synthetic.Split, image_size: int, field: Field):
        self._split, self._image_size, self._field = split, image_size, field

    def __len__(self) -> int:
        return synthetic.num_scenes(self._split)

    def __getitem__(self, index: int) -> Example:
        return self._example(index, synthetic.draw(self._split, index, self._image_size))

    def pairs(self, index: int) -> list[tuple[str, str]]:
        return self._example(index, None).pairs

    def _example(self, index: int, image: Any) -> Example:
        key, shown = f"synthetic:{self._split} {index}", synthetic.combination(self._split, index)
        if self._field == "captions":
            return Example(image, synthetic.captions(shown), key)
        if self._field == "name":
            return Example(image, [], key, name=shown.shape)
        asked = synthetic.questions(shown)
        qa = [Question(text, [answer], f"{key}#{n}") for n, (text, answer) in enumerate(asked)]
        return Example(image, [], key, qa)


class _Jsonl(Source):
    def __init__(self, spec: str, path: pathlib.Path, field: Field):
        if path.is_dir():
            found = sorted(path.glob("*.jsonl"))
            if len(found) != 1:
                raise ValueError(f"data source {spec!r} is a folder with {len(found)} .jsonl files, expected one")
            path = found[0]
        if not path.is_file():
            raise ValueError(f"data source {spec!r} names {path}, which does not exist; expected a .jsonl file")
        starts, numbers, end = array.array("q"), array.array("q"), 0
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.isspace():
                    starts.append(end)
                    numbers.append(number)
                end += len(line)
        starts.append(end)
        self._path, self._field = path, field
        self._bounds, self._numbers = np.array(starts), np.array(numbers)
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Example:
        where = f"{self._path}, line {self._numbers[index]}"
        start, end = self._bounds[index : index + 2].tolist()
        try:
            record = json.loads(os.pread(self._file, end - start, start).decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise BadExample(f"{where} is not UTF-8", "not UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise BadExample(f"{where} is not JSON", "not JSON") from error
        if not isinstance(record, dict):
            raise BadExample(f"{where} is not a JSON object", "not an object")
        file = record.get("file")
        if not isinstance(file, str) or not file:
            raise BadExample(f'{where} has no "file"', "missing field")
        image = self._path.parent / file
        if self._field == "captions":
            return Example(image, _captions(record.get("captions"), where), file)
        if self._field == "name":
            return Example(image, [], file, name=_text(record.get("name"), where, '"name"'))
        return Example(image, [], file, _questions(record.get("qa"), where, file))


class _Tfds(Source):
    def __init__(self, spec: str, name: str, tfds_dir: str | None):
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import read_only_builder

        name, _, split = os.path.expanduser(name).rpartition("/")
        try:
            # From files, never from tensorflow-datasets' code for the set: that may reach for the network.
            if pathlib.Path(name, "features.json").exists():
                builder = read_only_builder.builder_from_directory(name)
            else:
                builder = read_only_builder.builder_from_files(name, data_dir=tfds_dir and os.path.expanduser(tfds_dir))
        except ValueError as error:  # its own messages run over many lines
            raise ValueError(
                f"data source {spec!r} is not prepared in {tfds_dir or 'the default data_dir'} (data.tfds_dir); "
                "prepare it once with `python -m mammut.prepare jsonl:PATH --data-dir DIR --name NAME` or "
                "tfds.builder(NAME, data_dir=DIR, file_format='array_record').download_and_prepare()"
            ) from error
        features = builder.info.features
        field = next((field for field in ("captions", "caption", "text") if field in features), None)
        if split not in builder.info.splits:
            splits = ", ".join(builder.info.splits)
            raise ValueError(f"data source {spec!r} has no such split, expected one of {splits}")
        if field is None or "image" not in features:
            raise ValueError(
                f"data source {spec!r} has the fields {', '.join(features)}, "
                "expected image and one of captions, caption, text"
            )
        images = [name for name, feature in features.items() if isinstance(feature, tfds.features.Image)]
        decoders = dict.fromkeys(images, tfds.decode.SkipDecoding())
        try:
            self._records = builder.as_data_source(split, decoders=decoders)
        except NotImplementedError as error:
            raise ValueError(
                f"data source {spec!r} is prepared as {builder.info.file_format.value}, expected array_record: "
                "prepare it again with file_format='array_record'"
            ) from error
        self._spec, self._field = spec, field

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        where = f"{self._spec}, example {index}"
        captions = record[self._field]
        if isinstance(captions, dict):
            captions = captions["text"]
        if isinstance(captions, bytes):
            captions = [captions]
        try:
            captions = [caption.decode() for caption in captions]
        except UnicodeDecodeError as error:
            raise BadExample(f"{where} is not UTF-8", "not UTF-8") from error
        file = record.get("image/filename", b"").decode(errors="replace")
        return Example(record["image"], _captions(captions, where), file or where)


def _text(value: Any, where: str, what: str) -> str:
    """A text of the set, checked."""
    if not isinstance(value, str) or not value.strip():
        raise BadExample(f"{where} has no {what}, a text", "missing field")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise BadExample(f"{where} has a text that is not UTF-8", "not UTF-8") from error
    return value


def _captions(values: Any, where: str) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(caption, str) for caption in values):
        raise BadExample(f'{where} has no "captions", a list of texts', "missing field")
    captions = [_text(caption, where, "caption") for caption in values if caption.strip()]
    if not captions:
        raise BadExample(f"{where} has no caption", "no caption")
    return captions


def _questions(values: Any, where: str, file: str) -> list[Question]:
    if not isinstance(values, list) or not all(isinstance(question, dict) for question in values):
        raise BadExample(f'{where} has no "qa", a list of objects with a question and answers', "missing field")
    questions = []
    for number, value in enumerate(values):
        answers = value.get("answers", [])
        if not isinstance(answers, list):
            raise BadExample(f'{where} has "answers" that are not a list of texts', "missing field")
        questions.append(
            Question(
                _text(value.get("question"), where, '"question"'),
                [_text(answer, where, "answer") for answer in answers],
                str(value.get("question_id", f"{file}#{number}")),
                value.get("answer_type"),
                value.get("question_type"),
            )
        )
    if not questions:
        raise BadExample(f"{where} has no question", "no question")
    return questions


def texts(source: Source) -> Iterator[str]:
    """All texts in order, to train a tokenizer on; examples that cannot be read are left out."""
    for index in range(len(source)):
        try:
            yield from (text for pair in source.pairs(index) for text in pair if text)
        except BadExample:
            continue


