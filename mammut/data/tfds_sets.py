"""Prepared sets of tensorflow-datasets as a source of examples."""

import hashlib
import os
import pathlib
from collections.abc import Callable
from concurrent import futures
from typing import Any

import numpy as np

from mammut.data.config import Field
from mammut.data.examples import BadExample, Example, Source, SourceOptions
from mammut.data.records import make_example

_QUESTION = ("question", "answers", "answer", "question_id", "answer_type", "question_type")

_TAIL = 2**16  # bytes at the end of a shard, with the places of its records
# Parts of a shard that go into its fingerprint, and bytes of each: all of a small shard.
_PARTS = 256
_PART = 4096

# Where a prepared set has a field: the first of these features that is of one of these types.
_FEATURES: dict[Field, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "captions": (("captions", "caption", "text"), ("Sequence", "Text")),
    "qa": (("qa", "qas", "question_answer", "question"), ("Sequence", "Text")),
    "name": (("label", "name"), ("ClassLabel", "Text")),
}


class TfdsSource(Source):
    """A split of a prepared set, `NAME/SPLIT`.

    Its ArrayRecord files are read at random.
    """

    def __init__(self, options: SourceOptions):
        import tensorflow_datasets as tfds

        self._spec = options.spec
        self._field = options.field
        name, _, split = os.path.expanduser(options.name).rpartition("/")
        builder = self._builder(name, options.tfds_dir)
        features = builder.info.features
        if split not in builder.info.splits:
            splits = ", ".join(builder.info.splits)
            raise ValueError(
                f"data source {self._spec!r} has no such split, expected one of {splits}"
            )

        self._feature = self._find_feature(features)
        self._class_name = None
        if type(features[self._feature]).__name__ == "ClassLabel":
            self._class_name = features[self._feature].int2str
        images = [
            name for name, feature in features.items() if isinstance(feature, tfds.features.Image)
        ]
        decoders = dict.fromkeys(images, tfds.decode.SkipDecoding())
        try:
            self._records = builder.as_data_source(split, decoders=decoders)
        except NotImplementedError as error:
            raise ValueError(
                f"data source {self._spec!r} is prepared as {builder.info.file_format.value}, "
                "expected array_record: prepare it again with file_format='array_record'"
            ) from error
        try:
            self._digest = _checked_shards(
                builder.info.splits[split].file_instructions, options.alive
            )
        except ValueError as error:
            raise ValueError(f"data source {self._spec!r}: {error}") from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        where = f"{self._spec}, example {index}"
        try:
            record = self._records[index]
        except MemoryError:
            raise
        except (
            Exception
        ) as error:  # array_record, protobuf and their caller have errors of their own
            raise BadExample(f"{where} cannot be read: {_line(error)}", "corrupt record") from error
        try:
            value = self._value(record)
        except UnicodeDecodeError as error:
            raise BadExample(f"{where} is not UTF-8", "not UTF-8") from error
        except (LookupError, TypeError, ValueError) as error:  # such as a label beyond the names
            raise BadExample(
                f"{where} is not of the form of its set: {_line(error)}", "corrupt record"
            ) from error
        file = os.fsdecode(record.get("image/filename", b""))
        # Questions are not named by the file: in some sets every question comes with its image
        # anew.
        return make_example(
            record["image"], file or where, self._field, value, where, questions=where
        )

    def fingerprint(self) -> str:
        return self._digest

    def _builder(self, name: str, tfds_dir: str | None) -> Any:
        """Makes the builder of a prepared set, by name or folder.

        It is made from files, never from tensorflow-datasets' code for the set: that code may use
        the network.
        """
        from tensorflow_datasets.core import read_only_builder

        try:
            if pathlib.Path(name, "features.json").exists():
                return read_only_builder.builder_from_directory(name)
            data_dir = tfds_dir and os.path.expanduser(tfds_dir)
            return read_only_builder.builder_from_files(name, data_dir=data_dir)
        except ValueError as error:  # its own messages run over many lines
            raise ValueError(
                f"data source {self._spec!r} is not prepared in "
                f"{tfds_dir or 'the default data_dir'} (data.tfds_dir); prepare it once with "
                "`python -m mammut.prepare jsonl:PATH --data-dir DIR --name NAME` or "
                "tfds.builder(NAME, data_dir=DIR, file_format='array_record')"
                ".download_and_prepare()"
            ) from error
        except Exception as error:  # its readers of descriptions have errors of their own
            raise ValueError(
                f"data source {self._spec!r} cannot be opened: its dataset_info.json is missing or "
                f"damaged ({_line(error)})"
            ) from error

    def _find_feature(self, features: Any) -> str:
        """Finds the name of the feature that holds the field."""
        types = {name: type(feature).__name__ for name, feature in features.items()}
        names, expected = _FEATURES[self._field]
        feature = next((name for name in names if types.get(name) in expected), None)
        if feature is None or "image" not in features:
            fields = ", ".join(f"{name} ({types[name]})" for name in sorted(types))
            raise ValueError(
                f"data source {self._spec!r} has the fields {fields}, "
                f"expected image and one of {', '.join(names)} ({' or '.join(expected)})"
            )
        return feature

    def _value(self, record: dict[str, Any]) -> Any:
        """Converts the field of a record to the form of JSON lines."""
        value = _plain(record[self._feature])
        if self._field == "name":
            if self._class_name is None:
                return value
            return self._class_name(value) if value >= 0 else None  # -1: not annotated
        if self._field == "captions":
            if isinstance(value, str):
                return [value]
            return value.get("text", []) if isinstance(value, dict) else value

        if self._feature == "question":
            value = {name: [_plain(column)] for name, column in record.items() if name in _QUESTION}
        columns = {}
        if isinstance(value, dict):
            columns = {name: value[name] for name in _QUESTION if name in value}
        questions = [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
        return [{"answers": [q["answer"]]} | q if "answer" in q else q for q in questions]


def _checked_shards(shards: list[Any], alive: Callable[[], None]) -> str:
    """Checks that every shard is there with all of its records.

    A shard is opened when its first record is read, which may be hours later.

    Args:
      shards: the file instructions of tensorflow-datasets.
      alive: is called after every shard.

    Returns:
      SHA-256 of the sizes of the shards and of the places of their records, and that of parts of
      the shards.

    Raises:
      ValueError: a shard is missing, cut short or damaged.
    """
    from tqdm import tqdm

    # In threads: a disk or a network needs time to return each of the many ends.
    pool = futures.ThreadPoolExecutor(8, thread_name_prefix="mammut-shards")
    try:
        opened = [
            pool.submit(_checked_shard, os.fspath(shard.filename), shard.examples_in_shard)
            for shard in shards
        ]
        progress = tqdm(opened, "opening shards", unit="shard", delay=2, disable=None)
        digests = []
        for future in progress:
            digests.append(future.result())
            alive()
    finally:
        pool.shutdown(cancel_futures=True)
    # Joined by a +, as `TrainBatches` compares them.
    return "+".join(
        hashlib.sha256("".join(digest).encode()).hexdigest()
        for digest in zip(*digests, strict=True)
    )


def _checked_shard(path: str, records: int) -> tuple[str, str]:
    from array_record.python import array_record_module

    try:
        reader = array_record_module.ArrayRecordReader(path)
        found = reader.num_records()
        reader.close()
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            places = hashlib.sha256(b"%d %d " % (size, found) + file.read())
            parts = hashlib.sha256()
            for start in range(0, size, max(_PART, size // _PARTS)):
                file.seek(start)
                parts.update(file.read(_PART))
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"shard {path} is missing, cut short or damaged ({_line(error)}): get it again, or "
            "prepare the set again"
        ) from error
    if found != records:
        raise ValueError(
            f"shard {path} has {found} records, expected {records}: get it again, or prepare the "
            "set again"
        )
    return places.hexdigest(), parts.hexdigest()


def _line(error: Exception) -> str:
    """Describes an error of a library in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _plain(value: Any) -> Any:
    """Converts a value of tensorflow-datasets to the types of JSON."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {name: _plain(column) for name, column in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return [_plain(item) for item in value] if isinstance(value, list) else value
