"""Tar shards of webdataset as a source.

They are indexed once, read at random, and never unpacked.

The files of an example share a key: the name up to the first dot after the last slash. The
extension after that dot gives the kind of a file: `jpg`, `jpeg`, `png` or `webp` is the image,
`mp4`, `webm`, `mkv`, `mov`, `avi` or `gif` the video, `txt` and `json` are its texts, and `cls` is
the name of its class; all else is left out, and counted. Of an image and a video with one key the
image counts, or the video where examples are read as videos. This is the convention of webdataset
("The WebDataset Format") and video2dataset; here the files of an example may stand apart.
"""

import array
import bisect
import functools
import hashlib
import itertools
import json
import logging
import os
import pathlib
import stat
import threading
import weakref
import zlib
from collections.abc import Callable
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt32

from mammut.core.environment import cache_folder
from mammut.core.files import replacing_file
from mammut.data import tar_left_out
from mammut.data.config import Field
from mammut.data.examples import BadExample, Example, Source, SourceOptions, spelled
from mammut.data.records import (
    ABSENT,
    decode_text,
    make_example,
    parse_object,
    require_readable,
    value_of,
)
from mammut.data.tar_files import Damage, read_files, shown
from mammut.data.tar_left_out import LeftOut
from mammut.data.tar_paths import shard_paths

_log = logging.getLogger(__name__)
_warning = threading.Lock()

# The columns of an index: the files of an example. The last two are there only as far as a shard
# has such files.
IMAGE, TXT, JSON = COLUMNS = range(3)
CLS, VIDEO = MORE_COLUMNS = range(3, 5)
# The start of an absent file in an index. Where two files have one name, it is -2 - start.
_ABSENT = -1

# Of several images or videos with one key, the first of these extensions counts.
_COLUMNS = {
    **dict.fromkeys((b"jpg", b"jpeg", b"png", b"webp"), IMAGE),
    b"txt": TXT,
    b"json": JSON,
    b"cls": CLS,
    **dict.fromkeys((b"mp4", b"webm", b"mkv", b"mov", b"avi", b"gif"), VIDEO),
}
# The columns with the texts of a field, the first choice first.
_TEXT_COLUMNS: dict[Field, tuple[int, ...]] = {
    "captions": (TXT, JSON),
    "qa": (JSON,),
    "name": (CLS, JSON),
}
_RANKS = {extension: rank for rank, extension in enumerate(_COLUMNS)}

_MAX_FILE = 2**32 - 1  # bytes of a file with its headers: an index has 32 bits for them
_MAX_OPEN = 256  # shards; a process may have 1,024 files open by default
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_FIRST_BYTES = 4096  # of every file go into the fingerprint
_FORMAT = 3  # version of the stored indexes


class Index(NamedTuple):
    """The positions of the files in one shard.

    A row is an example; the columns are IMAGE, TXT and JSON, then CLS and VIDEO where needed.

    A file is everything from its first header, long names and pax records included, to the last of
    its bytes.

    Attributes:
      starts: the byte where a file starts; -1 without a file, -2 - start where there are two.
      lengths: bytes of a file.
      left_out: counts of the files that are not in the index, by the reason, each with a name.
      digest: SHA-256 of the names, the sizes and the first bytes of the files in the index.
    """

    starts: Int64[np.ndarray, "examples columns"]
    lengths: UInt32[np.ndarray, "examples columns"]
    left_out: LeftOut
    digest: str


class TarShards:
    """The files of the examples in all shards of a pattern.

    Each file is read when it is needed. Examples have the order of the shards and, in a shard, of
    their first files.

    Args:
      pattern: the shards; see `shard_paths`.
      alive: is called after every shard.

    Raises:
      ValueError: the pattern matches no shard, or one that is missing, cut short, compressed or
        damaged.
    """

    def __init__(self, pattern: str, alive: Callable[[], None] = lambda: None):
        from tqdm import tqdm

        self.paths = shard_paths(pattern)
        # In threads: a disk or a network needs time to return each of the many headers.
        pool = futures.ThreadPoolExecutor(8, thread_name_prefix="mammut-index")
        try:
            opened = [pool.submit(open_index, path) for path in self.paths]
            progress = tqdm(opened, "indexing shards", unit="shard", delay=2, disable=None)
            errors = []
            for future in progress:
                if isinstance(future.exception(), ValueError):
                    errors.append(future.exception())
                alive()
        finally:
            pool.shutdown(cancel_futures=True)
        if errors:
            others = ""
            if len(errors) > 1:
                others = f" ({len(errors) - 1} of the other shards cannot be used either)"
            raise ValueError(f"{errors[0]}{others}") from errors[0]
        indexes = [future.result() for future in opened]
        columns = max(index.starts.shape[1] for index in indexes)
        self._starts = _joined([index.starts for index in indexes], columns, _ABSENT)
        self._lengths = _joined([index.lengths for index in indexes], columns, 0)
        self.left_out = tar_left_out.summed(index.left_out for index in indexes)
        digests = "".join(index.digest for index in indexes)
        self.digest = hashlib.sha256(digests.encode()).hexdigest()
        self._ends = list(itertools.accumulate(len(index.starts) for index in indexes))
        self._open = functools.lru_cache(_MAX_OPEN)(_OpenShard)

    def __len__(self) -> int:
        return len(self._starts)

    def shard(self, example: int) -> int:
        """Returns the index in `paths` of the shard with an example."""
        return bisect.bisect_right(self._ends, example)

    def count(self, example: int, column: int) -> int:
        """Counts the files of an example in a column.

        The count is 2 where the shard has two files of one name.
        """
        starts = self._starts[example]
        if column >= len(starts) or starts[column] == _ABSENT:
            return 0
        return 1 if starts[column] >= 0 else 2

    def name(self, example: int) -> str:
        """Returns the name of a file of the example."""
        column = next(column for column in (*COLUMNS, *MORE_COLUMNS) if self.count(example, column))
        return self.read(example, column)[0]

    def read(self, example: int, column: int) -> tuple[str, bytes]:
        """Reads a file of the example: its name and its bytes.

        Of two files of one name it reads the first. Any thread may call it.

        Raises:
          BadExample: the disk cannot read this part of the shard.
          ValueError: the shard cannot be read any more, or is not the one that was indexed.
        """
        path = self.paths[self.shard(example)]
        start = int(self._starts[example, column])
        length = int(self._lengths[example, column])
        try:
            content = self._open(path).read(length, max(start, -2 - start))
        except OSError as error:
            require_readable(error, f"{path}, byte {start}")
            raise ValueError(f"shard {path} cannot be read any more: {error.strerror}") from error
        try:
            file = next(read_files(lambda offset, size: content[offset : offset + size], length))
            if len(content) == length == file.data + file.size:
                return spelled(os.fsdecode(file.name)), content[file.data :]
        except (Damage, StopIteration):
            pass
        raise ValueError(
            f"shard {path} has changed while it was in use, expected the one that was opened"
        )


class TarSource(Source):
    """The examples of tar shards, `tar:PATTERN`: an image and its texts."""

    def __init__(self, options: SourceOptions):
        try:
            self._shards = TarShards(options.name, options.alive)
        except ValueError as error:
            raise ValueError(f"data source {options.spec!r}: {error}") from error
        paths = [os.path.abspath(path) for path in self._shards.paths]
        folder = os.path.commonpath([os.path.dirname(path) for path in paths])
        self._names = [os.path.relpath(path, folder) for path in paths]
        self._field = options.field
        self._text_columns = _TEXT_COLUMNS[options.field]
        self._image_columns = (VIDEO, IMAGE) if options.video else (IMAGE, VIDEO)
        if self._shards.left_out:
            left_out = tar_left_out.described(self._shards.left_out, _COLUMNS)
            if not len(self._shards):
                raise ValueError(
                    f"data source {options.spec!r} is empty, expected at least one example: "
                    f"{left_out}"
                )
            _log.warning("%s: %s", options.spec, left_out)

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> Example:
        name, image = self._read(index, self._image_columns, "no image")
        return self._example(index, image, name)

    def pairs(self, index: int) -> list[tuple[str, str]]:
        return self._example(index, None, "").pairs

    def fingerprint(self) -> str:
        return self._shards.digest

    def _example(self, index: int, image: Any, image_name: str) -> Example:
        name, content = self._read(index, self._text_columns, ABSENT[self._field])
        shard = self._shards.shard(index)
        where = f"{self._shards.paths[shard]}, {name}"
        if name.lower().endswith(".json"):
            value = value_of(parse_object(content, where), self._field, where)
        else:
            value = decode_text(content, where).strip()
        # Named with the shard: another may have the same names.
        key = f"{self._names[shard]}/{image_name}"
        questions = f"{self._names[shard]}/{name}"
        return make_example(image, key, self._field, value, where, questions)

    def _read(self, index: int, columns: tuple[int, ...], absent: str) -> tuple[str, bytes]:
        """Reads the first file that the example has among `columns`.

        Raises:
          BadExample: it has none, with the cause `absent`, or two of one name.
        """
        shards = self._shards
        column = next((column for column in columns if shards.count(index, column)), None)
        if column is not None and shards.count(index, column) == 1:
            return shards.read(index, column)
        where = f"{shards.paths[shards.shard(index)]}, the key of {shards.name(index)}"
        if column is None:
            looked_for = ", ".join(
                name.decode() for name, place in _COLUMNS.items() if place in columns
            )
            raise BadExample(f"{where} has {absent}, a file of {looked_for}", absent)
        raise BadExample(f"{where} has two files of one name", "duplicate key")


class _OpenShard:
    """An open file that several threads may read.

    It is closed when the last of them has finished.
    """

    def __init__(self, path: pathlib.Path):
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def read(self, length: int, start: int) -> bytes:
        # Not mapped into memory: if another program shortened a mapped file, reading it would end
        # the process.
        return os.pread(self._file, length, start)


def open_index(path: pathlib.Path) -> Index:
    """Reads the stored index of a shard, or makes one.

    Indexes are stored in `mammut/shards` of XDG_CACHE_HOME, by default `~/.cache`. They are made
    again where the shard's size or time of change differs.

    Raises:
      ValueError: the shard is not a whole, uncompressed tar file.
    """
    try:
        # Opening a pipe would wait for its writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"shard {path} is not a file")
        with open(path, "rb") as file:
            before = os.fstat(file.fileno())
            identity = {
                "format": _FORMAT,
                "shard": str(path.resolve()),
                "size": before.st_size,
                "mtime_ns": before.st_mtime_ns,
            }
            name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
            cache = cache_folder(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
            if cache is not None:
                folder = cache / "mammut" / "shards"
                kept = _load(folder / name, identity)
                if kept is not None:
                    return kept

            def read(offset: int, size: int) -> bytes:
                file.seek(offset)
                return file.read(size)

            index = _make_index(read, before.st_size)
            after = os.fstat(file.fileno())
    except OSError as error:
        raise ValueError(f"shard {path} cannot be read: {error.strerror}") from error
    except Damage as error:
        raise ValueError(f"shard {path} {error}") from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ValueError(f"shard {path} is being written, expected one that is done")
    if cache is None:
        return index
    try:
        _store(folder, name, identity, index)
    except OSError as error:
        with _warning:  # several threads may come here at once
            _warn_once(
                f"indexes of tar shards cannot be kept in {folder}, so each start makes them anew: "
                f"{error.strerror}"
            )
    return index


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning("%s", message)


def _load(path: pathlib.Path, identity: dict[str, str | int]) -> Index | None:
    """Reads the index stored at `path`.

    Returns None where it is damaged or belongs to another shard.
    """
    try:
        head, _, content = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    if head != json.dumps(identity | {"crc32": zlib.crc32(content)}).encode():
        return None
    about, _, content = content.partition(b"\n")
    about = json.loads(about)
    columns = about["columns"]
    count = len(content) // 12  # of the starts, 8 bytes each, and of the lengths, 4 bytes each
    starts = np.frombuffer(content, "<i8", count).reshape(-1, columns)
    lengths = np.frombuffer(content, "<u4", count, 8 * count).reshape(-1, columns)
    left_out = {reason: (count, name) for reason, (count, name) in about["left_out"].items()}
    return Index(starts, lengths, left_out, about["digest"])


def _store(folder: pathlib.Path, name: str, identity: dict[str, str | int], index: Index) -> None:
    """Stores an index, whole or not at all."""
    about = {
        "columns": index.starts.shape[1],
        "left_out": index.left_out,
        "digest": index.digest,
    }
    content = json.dumps(about).encode() + b"\n"
    content += index.starts.astype("<i8").tobytes() + index.lengths.astype("<u4").tobytes()
    head = json.dumps(identity | {"crc32": zlib.crc32(content)}).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_file(folder / name) as new:
        new.write_bytes(head + b"\n" + content)


def _make_index(read: Callable[[int, int], bytes], size: int) -> Index:
    """Makes the index of a shard of `size` bytes.

    `read(offset, size)` returns some of these bytes.
    """
    head = read(0, 6)
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise Damage(
                f"is compressed ({name}), which has no random access: unpack it into a plain .tar"
            )
    rows: dict[bytes, int] = {}  # of each key
    # Four numbers a row: starts, lengths, and how far the extensions are from the first choice.
    columns = VIDEO + 1
    starts = array.array("q")
    lengths = array.array("I")
    ranks = array.array("b")
    left_out: LeftOut = {}
    digest = hashlib.sha256()
    for file in read_files(read, size):
        folder, slash, name = file.name.rpartition(b"/")
        stem, _, extension = name.partition(b".")
        extension = extension.lower()
        if file.other or not stem or extension not in _COLUMNS:
            tar_left_out.count(left_out, file, _COLUMNS)
            continue
        length = file.data + file.size - file.start
        if length > _MAX_FILE:
            raise Damage(
                f"has the file {shown(file.name)} of {file.size:,} bytes, expected less than 4 GiB"
            )
        digest.update(b"%d %s\0%d\0" % (len(file.name), file.name, file.size))
        digest.update(read(file.data, min(file.size, _FIRST_BYTES)))
        row = rows.setdefault(folder + slash + stem, len(rows))
        if columns * row == len(starts):
            starts.extend((_ABSENT,) * columns)
            lengths.extend((0,) * columns)
            ranks.extend((len(_RANKS),) * columns)
        cell = columns * row + _COLUMNS[extension]
        rank = _RANKS[extension]
        if rank < ranks[cell]:
            starts[cell] = file.start
            lengths[cell] = length
            ranks[cell] = rank
        elif rank == ranks[cell]:
            starts[cell] = min(starts[cell], -2 - starts[cell])
    all_starts = np.array(starts, np.int64).reshape(-1, columns)
    all_lengths = np.array(lengths, np.uint32).reshape(-1, columns)
    while columns > CLS and not all_lengths[:, columns - 1].any():
        columns -= 1
    return Index(
        np.ascontiguousarray(all_starts[:, :columns]),
        np.ascontiguousarray(all_lengths[:, :columns]),
        left_out,
        digest.hexdigest(),
    )


def _joined(arrays: list[np.ndarray], columns: int, absent: int) -> np.ndarray:
    """Joins the rows of arrays; those with fewer columns get `absent` in the others."""
    widths = [((0, 0), (0, columns - array.shape[1])) for array in arrays]
    return np.concatenate(
        [
            np.pad(array, width, constant_values=absent) if any(width[1]) else array
            for array, width in zip(arrays, widths, strict=True)
        ]
    )
