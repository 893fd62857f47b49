"""JSON lines as a source: one object a line, read when needed."""

import array
import os
import pathlib
import weakref

import numpy as np

from mammut.data.examples import BadExample, Example, Source, SourceOptions
from mammut.data.records import make_example, parse_object


class JsonlSource(Source):
    """The lines of a `.jsonl` file.

    Only the position of each line is kept in memory.
    """

    def __init__(self, options: SourceOptions):
        path = _file(options.spec, pathlib.Path(os.path.expanduser(options.name)))
        starts = array.array("q")
        numbers = array.array("q")
        end = 0
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.isspace():
                    starts.append(end)
                    numbers.append(number)
                end += len(line)
        starts.append(end)

        self._path = path
        self._field = options.field
        self._bounds = np.array(starts)
        self._numbers = np.array(numbers)
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Example:
        where = f"{self._path}, line {self._numbers[index]}"
        start, end = self._bounds[index : index + 2].tolist()
        record = parse_object(os.pread(self._file, end - start, start), where)
        file = record.get("file")
        if not isinstance(file, str) or not file:
            video = ""
            if "frames" in record:
                video = ", but the frames of a video, which cannot be read yet"
            raise BadExample(f'{where} has no "file"{video}', "missing field")
        if self._field not in record:
            raise BadExample(f'{where} has no "{self._field}"', "missing field")
        image = self._path.parent / file
        return make_example(image, file, self._field, record[self._field], where)


def _file(spec: str, path: pathlib.Path) -> pathlib.Path:
    """Finds the `.jsonl` file that a spec names.

    It is `path` itself, or the only `.jsonl` file in the folder `path`.
    """
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
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
