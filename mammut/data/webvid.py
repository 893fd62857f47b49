"""WebVid's CSV files as a source: millions of rows, read when needed.

A spec is `webvid:RESULTS.csv,VIDEOS`, such as `webvid:results_2M_train.csv,videos`. The video of a
row is VIDEOS/PAGE_DIR/VIDEOID.mp4, its caption the row's name. Only the place of each row is kept
in memory. Rows whose video is missing are left out, and counted in one warning and in the notes of
the scores.
"""

import array
import csv
import hashlib
import logging
import os
import pathlib
import weakref
from collections.abc import Iterator

from mammut.data.annotation_files import expanded, require_offered
from mammut.data.examples import Example, Source, SourceOptions
from mammut.data.records import make_example
from mammut.data.video import Clip

_COLUMNS = ("videoid", "page_dir", "name")
_MAX_BYTES = 1 << 20  # of a row: a quote that is never closed swallows the rest of the file
_ROWS = 10_000  # between two signs of life while the file is read
_log = logging.getLogger(__name__)


class WebVidSource(Source):
    """The rows of a CSV file of WebVid whose video is there."""

    def __init__(self, options: SourceOptions):
        require_offered(options, "captions")
        try:
            self._open(options)
        except ValueError as error:
            raise ValueError(f"data source {options.spec!r}: {error}") from error

    def _open(self, options: SourceOptions) -> None:
        match options.name.split(","):
            case file, videos if file and videos:
                self._path = expanded(file)
                self._videos = expanded(videos)
            case _:
                raise ValueError(
                    f"{options.name!r} is not RESULTS.csv,VIDEOS, with no comma in a path"
                )
        if not self._videos.is_dir():
            raise ValueError(f"{self._videos} is not a folder, expected that of the videos")
        try:
            self._file = os.open(self._path, os.O_RDONLY)
        except OSError as error:
            raise ValueError(f"{self._path} cannot be read: {error.strerror}") from error
        weakref.finalize(self, os.close, self._file)

        self._places = array.array("q")  # the start, the end and the line of each row
        digest = hashlib.sha256()
        files: dict[str, frozenset[str]] = {}  # of the folders that were listed
        total = 0
        rows = _rows(self._path)
        _, _, content = next(rows, (1, 0, b""))
        digest.update(content)
        self._header = self._cells(content, 1)
        for name in _COLUMNS:
            if name not in self._header:
                raise ValueError(f"{self._path}, line 1 has no column {name!r}")
        for line, start, content in rows:
            total += 1
            if total % _ROWS == 0:
                options.alive()
            file, _ = self._row(content, line)
            folder, _, name = file.rpartition("/")
            if folder not in files:
                files[folder] = _listed(self._videos / folder)
            if name in files[folder]:
                self._places.extend((start, start + len(content), line))
                digest.update(content)
        self._digest = digest.hexdigest()

        self._note = f"{self._path.name}: {len(self):,} of {total:,} videos found"
        if total and not len(self):
            raise ValueError(
                f"{self._videos} has none of {total:,} videos, expected files such as {file}"
            )
        if len(self) < total:
            _log.warning("%s: %s in %s", options.spec, self._note, self._videos)

    def _row(self, content: bytes, line: int) -> tuple[str, str]:
        """Returns the file of a row's video, relative to the folder, and its caption."""
        cells = self._cells(content, line)
        if len(cells) != len(self._header):
            raise ValueError(
                f"{self._path}, line {line} has {len(cells)} cells, expected {len(self._header)}"
            )
        row = dict(zip(self._header, cells, strict=True))
        return f"{row['page_dir']}/{row['videoid']}.mp4", row["name"]

    def _cells(self, content: bytes, line: int) -> list[str]:
        try:
            return next(csv.reader([content.decode("utf-8-sig")]), [])
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._path}, line {line} is not UTF-8") from error
        except csv.Error as error:
            raise ValueError(f"{self._path}, line {line}: {error}") from error

    def __len__(self) -> int:
        return len(self._places) // 3

    def __getitem__(self, index: int) -> Example:
        start, end, line = self._places[3 * index : 3 * index + 3]
        file, caption = self._row(os.pread(self._file, end - start, start), line)
        where = f"{self._path}, line {line}"
        return make_example(Clip(self._videos / file), file, "captions", [caption], where)

    def fingerprint(self) -> str:
        return self._digest

    def notes(self) -> list[str]:
        return [self._note]


def _rows(path: pathlib.Path) -> Iterator[tuple[int, int, bytes]]:
    """Yields the line, the place and the bytes of each row of a CSV file; empty lines are no rows.

    A cell within quotes may hold line breaks.
    """
    start = 0
    row = b""
    first = 1
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            row += line
            if row.count(b'"') % 2:
                if len(row) > _MAX_BYTES:
                    raise ValueError(f"{path}, line {first} has a quote that is never closed")
                continue
            if not row.isspace():
                yield first, start, row
            start += len(row)
            row = b""
            first = number + 1
    if row:
        raise ValueError(f"{path}, line {first} has a quote that is never closed")


def _listed(folder: pathlib.Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError:
        return frozenset()
