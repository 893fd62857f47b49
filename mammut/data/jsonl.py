"""JSON lines as a source: one object a line, read when needed."""

import array
import hashlib
import os
import pathlib
import weakref

import numpy as np

from mammut.data.examples import Example, Source, SourceOptions
from mammut.data.records import (
    image_of,
    make_example,
    parse_object,
    require_readable,
    value_of,
)

_LINES = 10_000  # between two signs of life while a file is read


class JsonlSource(Source):
    """The lines of a `.jsonl` file.

    Only the position of each line is kept in memory.
    """

    def __init__(self, options: SourceOptions):
        path = _file(options.spec, pathlib.Path(os.path.expanduser(options.name)))
        starts = array.array("q")
        numbers = array.array("q")
        end = 0
        digest = hashlib.sha256()
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.isspace():
                    starts.append(end)
                    numbers.append(number)
                end += len(line)
                digest.update(line)
                if number % _LINES == 0:
                    options.alive()
        starts.append(end)

        self._path = path
        self._field = options.field
        self._digest = digest.hexdigest()
        self._bounds = np.array(starts)
        self._numbers = np.array(numbers)
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Example:
        where = f"{self._path}, line {self._numbers[index]}"
        start, end = self._bounds[index : index + 2].tolist()
        try:
            line = os.pread(self._file, end - start, start)
        except OSError as error:
            require_readable(error, where)
            raise
        record = parse_object(line, where)
        image, key = image_of(record, self._path.parent, where)
        value = value_of(record, self._field, where)
        # Lines of one question each may be about one image.
        questions = key if "qa" in record else f"{key}, line {self._numbers[index]}"
        return make_example(image, key, self._field, value, where, questions)

    def fingerprint(self) -> str:
        return self._digest


def _file(spec: str, path: pathlib.Path) -> pathlib.Path:
    """Finds the `.jsonl` file that a spec names.

    It is `path` itself, or the only `.jsonl` file in the folder `path`.
    """
    if path.is_dir():
        # macOS puts `._NAME` beside a file on other file systems.
        files = [file for file in sorted(path.glob("*.jsonl")) if not file.name.startswith(".")]
        if len(files) != 1:
            raise ValueError(
                f"data source {spec!r} is a folder with {len(files)} .jsonl files, expected one"
            )
        path = files[0]
    if not path.is_file():
        raise ValueError(
            f"data source {spec!r} names {path}, which does not exist; expected a .jsonl file"
        )
    return path
