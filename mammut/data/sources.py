"""Sets of examples by index: drawn scenes, JSON lines, tar shards, benchmarks as downloaded, prepared tfds sets.

A source is opened for one `Field`: captions, questions with answers ("qa"), or the name of what an
image shows.
"""

import array
import json
import os
import pathlib
import re
import reprlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mammut.data import annotations, synthetic, tar_shards
from mammut.data.config import Field
from mammut.data.examples import BadExample, Example, Question, Source


def open_source(
    spec: str, *, image_size: int, tfds_dir: str | None = None, field: Field = "captions"
) -> Source:
    """Opens a set of images with captions, with questions and answers, or with names.

    Args:
      spec: One of these, each with an optional slice such as `[1000:]`, `[:90%]` or `[::5]`, every
        fifth example; `[!::5]` is all the others. `synthetic:train`, `synthetic:val`: the drawn
        scenes of `mammut.data.synthetic`. `jsonl:PATH`: one object a line with a "file", relative
        to PATH, which is the .jsonl or a folder that holds exactly one; and with the field asked
        for: "captions", a list of texts; "qa", a list of `{"question", "answers": [...]}`,
        optionally with "question_id", "answer_type" and "question_type"; or "name". Only the place
        of each line is kept in memory. `tar:PATTERN`: plain tar files as webdataset has them, such
        as `tar:data/{00000..00127}.tar`; wildcards go, too, and several patterns joined by `::`.
        Files that share a key are an example: an image (jpg, jpeg, png, webp) and a caption in a
        `txt`, or a `json` that has the field asked for as a JSON line has it, or one "caption", as
        img2dataset writes it. The shards' headers are read once; see `mammut.data.tar_shards`.
        `coco:ANNOTATIONS.json,IMAGES`, `karpathy:DATASET.json,IMAGES,SPLIT` (captions) and
        `vqav2:QUESTIONS.json,ANNOTATIONS.json,IMAGES` (qa; without answers where ANNOTATIONS.json
        is left empty): benchmarks as they are downloaded, IMAGES a folder, no comma in a path; see
        `mammut.data.annotations`. `tfds:NAME/SPLIT`: a set that tensorflow-datasets has prepared as
        array_record; NAME may have a config and a version, or be the folder of the prepared set.
        The image is its field `image`. Captions are its first field of `captions` (a sequence of
        texts, or of objects with a `text`, as in COCO), `caption` and `text`. Questions are its
        sequence `qa`, `qas` or `question_answer` (as in CLEVR) of objects with a `question` and
        with `answers` or an `answer`, or it has these fields itself. The name is its `label`, a
        class, or its `name`, a text.
      image_size: Pixels of the drawn scenes; other sources give their images as they are stored.
      tfds_dir: The `data_dir` of tensorflow-datasets; None is its default.
      field: What an example must have; one without it is a BadExample.

    Raises:
      ValueError: the spec is none of these, the set does not exist, is not of its format or not of
        the field, or there is nothing in it.
    """
    pattern = r"(.*?)(?:\[(!)?(-?\d+%?)?:(-?\d+%?)?(?::([1-9]\d*)?)?\])?"
    name, others, start, stop, step = re.fullmatch(pattern, spec, re.DOTALL).groups()
    kind, _, name = name.partition(":")
    if kind == "synthetic" and name in ("train", "val"):
        source = _Synthetic(name, image_size, field)
    elif kind == "jsonl" and name:
        source = _Jsonl(spec, pathlib.Path(name).expanduser(), field)
    elif kind == "tar" and name:
        source = _Tar(spec, name, field)
    elif kind in annotations.FORMS and name:
        source = _Benchmark(spec, kind, name, field)
    elif kind == "tfds" and all(name.rpartition("/")):
        source = _Tfds(spec, name, tfds_dir, field)
    else:
        forms = ", ".join(f"{kind}:{form}" for kind, (_, form) in annotations.FORMS.items())
        raise ValueError(
            f"data source {spec!r} is not synthetic:train, synthetic:val, jsonl:PATH, tar:PATTERN, {forms} or "
            "tfds:NAME/SPLIT, "
            "each with an optional [a:b] in examples or percent, [a:b:step], or [!a:b:step] for all the others"
        )

    def bound(text: str | None) -> int | None:
        if text is None or not text.endswith("%"):
            return text and int(text)
        return round(len(source) * int(text[:-1]) / 100)

    rows = range(len(source))[bound(start) : bound(stop) : step and int(step)]
    if others:
        rows = np.setdiff1d(range(len(source)), rows).tolist()
    if not rows:
        raise ValueError(
            f"data source {spec!r} is empty, expected at least one example; the set has {len(source)}"
        )
    return _Slice(spec, source, rows)


class _Slice(Source):
    def __init__(self, spec: str, source: Source, rows: Sequence[int]):
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
                raise ValueError(
                    f"data source {spec!r} is a folder with {len(found)} .jsonl files, expected one"
                )
            path = found[0]
        if not path.is_file():
            raise ValueError(
                f"data source {spec!r} names {path}, which does not exist; expected a .jsonl file"
            )
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
        record = _record(os.pread(self._file, end - start, start), where)
        file = record.get("file")
        if not isinstance(file, str) or not file:
            video = (
                ", but the frames of a video, which cannot be read yet"
                if "frames" in record
                else ""
            )
            raise BadExample(f'{where} has no "file"{video}', "missing field")
        if self._field not in record:
            raise BadExample(f'{where} has no "{self._field}"', "missing field")
        return _example(self._path.parent / file, file, self._field, record[self._field], where)


class _Tar(Source):
    def __init__(self, spec: str, pattern: str, field: Field):
        try:
            self._shards = tar_shards.TarShards(pattern)
        except ValueError as error:
            raise ValueError(f"data source {spec!r}: {error}") from error
        paths = [os.path.abspath(path) for path in self._shards.paths]
        folder = os.path.commonpath([os.path.dirname(path) for path in paths])
        self._names = [os.path.relpath(path, folder) for path in paths]
        self._field = field
        self._said_in = (
            (tar_shards.TXT, tar_shards.JSON) if field == "captions" else (tar_shards.JSON,)
        )

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> Example:
        name, image = self._read(index, (tar_shards.IMAGE,), "no image")
        return self._example(index, image, name)

    def pairs(self, index: int) -> list[tuple[str, str]]:
        return self._example(index, None, "").pairs

    def _example(self, index: int, image: Any, image_name: str) -> Example:
        name, content = self._read(index, self._said_in, _ABSENT[self._field])
        shard = self._shards.shard(index)
        where = f"{self._shards.paths[shard]}, {name}"
        if name.lower().endswith(".json"):
            record = _record(content, where)
            if self._field == "captions" and isinstance(record.get("caption"), str):
                record = {"captions": [record["caption"]]} | record
            if self._field not in record:
                raise BadExample(f'{where} has no "{self._field}"', "missing field")
            value = record[self._field]
        else:
            value = [_decoded(content, where).strip()]
        # Named with the shard: another may have the same names.
        key, questions = (f"{self._names[shard]}/{file}" for file in (image_name, name))
        return _example(image, key, self._field, value, where, questions)

    def _read(self, index: int, columns: tuple[int, ...], absent: str) -> tuple[str, bytes]:
        """The first of the files that the example has."""
        shards = self._shards
        column = next((column for column in columns if shards.count(index, column)), None)
        if column is not None and shards.count(index, column) == 1:
            return shards.read(index, column)
        where = f"{shards.paths[shards.shard(index)]}, the key of {shards.name(index)}"
        if column is None:
            raise BadExample(f"{where} has {absent}", absent)
        raise BadExample(f"{where} has two files of one name", "duplicate key")


class _Benchmark(Source):
    def __init__(self, spec: str, kind: str, form: str, field: Field):
        offered, _ = annotations.FORMS[kind]
        if field != offered:
            raise ValueError(
                f"data source {spec!r} offers the field {offered!r}, expected one that offers {field!r}"
            )
        try:
            self._path, self._images, self._records = annotations.read(kind, form)
        except ValueError as error:
            raise ValueError(f"data source {spec!r}: {error}") from error
        self._field = field

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        file = record["file"]
        return _example(
            self._images / file,
            file,
            self._field,
            record[self._field],
            f"{self._path}, image {file}",
        )


_QUESTION = ("question", "answers", "answer", "question_id", "answer_type", "question_type")

# Where tensorflow-datasets' sets have a field: the first of these features that is of one of these
# types.
_TFDS_FEATURES: dict[Field, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "captions": (("captions", "caption", "text"), ("Sequence", "Text")),
    "qa": (("qa", "qas", "question_answer", "question"), ("Sequence", "Text")),
    "name": (("label", "name"), ("ClassLabel", "Text")),
}


class _Tfds(Source):
    def __init__(self, spec: str, name: str, tfds_dir: str | None, field: Field):
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import read_only_builder

        name, _, split = os.path.expanduser(name).rpartition("/")
        try:
            # From files, never from tensorflow-datasets' code for the set: that may reach for the
            # network.
            if pathlib.Path(name, "features.json").exists():
                builder = read_only_builder.builder_from_directory(name)
            else:
                builder = read_only_builder.builder_from_files(
                    name, data_dir=tfds_dir and os.path.expanduser(tfds_dir)
                )
        except ValueError as error:  # its own messages run over many lines
            raise ValueError(
                f"data source {spec!r} is not prepared in {tfds_dir or 'the default data_dir'} (data.tfds_dir); "
                "prepare it once with `python -m mammut.prepare jsonl:PATH --data-dir DIR --name NAME` or "
                "tfds.builder(NAME, data_dir=DIR, file_format='array_record').download_and_prepare()"
            ) from error
        features = builder.info.features
        if split not in builder.info.splits:
            splits = ", ".join(builder.info.splits)
            raise ValueError(f"data source {spec!r} has no such split, expected one of {splits}")
        types = {name: type(feature).__name__ for name, feature in features.items()}
        names, expected = _TFDS_FEATURES[field]
        self._feature = next((name for name in names if types.get(name) in expected), None)
        if self._feature is None or "image" not in features:
            found = ", ".join(f"{name} ({types[name]})" for name in sorted(types))
            raise ValueError(
                f"data source {spec!r} has the fields {found}, "
                f"expected image and one of {', '.join(names)} ({' or '.join(expected)})"
            )
        self._class_name = (
            features[self._feature].int2str if types[self._feature] == "ClassLabel" else None
        )
        images = [
            name for name, feature in features.items() if isinstance(feature, tfds.features.Image)
        ]
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
        try:
            value = self._value(record)
        except UnicodeDecodeError as error:
            raise BadExample(f"{where} is not UTF-8", "not UTF-8") from error
        file = record.get("image/filename", b"").decode(errors="replace")
        # Not named by the file: in some sets every question comes with its image anew.
        return _example(record["image"], file or where, self._field, value, where, questions=where)

    def _value(self, record: dict[str, Any]) -> Any:
        """The field as JSON lines have it."""
        value = _plain(record[self._feature])
        if self._field == "name":
            return (
                value
                if self._class_name is None
                else self._class_name(value)
                if value >= 0
                else None
            )
        if self._field == "captions":
            return (
                [value]
                if isinstance(value, str)
                else value.get("text", [])
                if isinstance(value, dict)
                else value
            )
        if self._feature == "question":
            value = {name: [_plain(column)] for name, column in record.items() if name in _QUESTION}
        columns = (
            {name: value[name] for name in _QUESTION if name in value}
            if isinstance(value, dict)
            else {}
        )
        questions = [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
        return [{"answers": [q["answer"]]} | q if "answer" in q else q for q in questions]


def _plain(value: Any) -> Any:
    """What tensorflow-datasets gives, in the types that JSON gives."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {name: _plain(column) for name, column in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _record(content: bytes, where: str) -> dict[str, Any]:
    """A JSON object."""
    text = _decoded(content, where)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadExample(f"{where} is not JSON", "not JSON") from error
    if not isinstance(record, dict):
        raise BadExample(f"{where} is not a JSON object", "not an object")
    return record


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadExample(f"{where} is not UTF-8", "not UTF-8") from error


_ABSENT: dict[Field, str] = {"captions": "no caption", "qa": "no question", "name": "no name"}


def _example(
    image: Any, key: str, field: Field, value: Any, where: str, questions: str | None = None
) -> Example:
    """The example whose field has `value`, as JSON lines have it; `questions` names those that have no id."""
    # as opposed to a field that is not there: the set has it, this image was not annotated
    if value is None:
        raise BadExample(f'{where} is not annotated: its "{field}" is null', _ABSENT[field])
    if field == "captions":
        return Example(image, _captions(value, where), key)
    if field == "name":
        return Example(image, [], key, name=_text(value, where, "its name"))
    return Example(image, [], key, _questions(value, where, questions or key))


def _text(value: Any, where: str, what: str, blank: bool = False) -> str:
    """A text of the set, checked."""
    if not isinstance(value, str) or not (blank or value.strip()):
        raise BadExample(
            f"{where} has {reprlib.repr(value)} for {what}, expected a text", "missing field"
        )
    try:
        value.encode()
    # JSON can spell half a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise BadExample(f"{where} has a text that is not UTF-8", "not UTF-8") from error
    return value


def _captions(values: Any, where: str) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(caption, str) for caption in values):
        raise BadExample(f'{where} has no "captions", a list of texts', "missing field")
    captions = [_text(caption, where, "a caption") for caption in values if caption.strip()]
    if not captions:
        raise BadExample(f"{where} has no caption", "no caption")
    return captions


def _questions(values: Any, where: str, prefix: str) -> list[Question]:
    if not isinstance(values, list) or not all(isinstance(question, dict) for question in values):
        raise BadExample(
            f'{where} has no "qa", a list of objects with a question and answers', "missing field"
        )
    questions = {}
    for number, value in enumerate(values):
        value = {name: item for name, item in value.items() if item is not None}
        answers, identity = value.get("answers", []), value.get("question_id", f"{prefix}#{number}")
        if not isinstance(answers, list):
            raise BadExample(
                f"{where} has answers {reprlib.repr(answers)}, expected a list of texts",
                "missing field",
            )
        if not isinstance(identity, int | str):
            raise BadExample(
                f"{where} has question_id {reprlib.repr(identity)}, expected a text",
                "missing field",
            )
        if str(identity) in questions:
            raise BadExample(f"{where} has the question_id {identity!r} twice", "duplicate id")
        questions[str(identity)] = Question(
            _text(value.get("question"), where, "a question"),
            # A blank answer stays: one who said nothing counts among the people asked.
            [_text(answer, where, "an answer", blank=True) for answer in answers],
            str(identity),
            *(
                _text(value[name], where, name) if name in value else None
                for name in ("answer_type", "question_type")
            ),
        )
    if not questions:
        raise BadExample(f"{where} has no question", "no question")
    return list(questions.values())


def texts(source: Source) -> Iterator[str]:
    """All texts in order, to train a tokenizer on; examples that cannot be read are left out."""
    for index in range(len(source)):
        try:
            yield from (text for pair in source.pairs(index) for text in pair if text)
        except BadExample:
            continue
