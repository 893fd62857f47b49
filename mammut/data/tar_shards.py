"""Tar shards of webdataset as a source.

They are indexed once, read at random, and never unpacked.

The files of an example share a key: the name up to the first dot after the last slash. The
extension after that dot gives the kind of a file: `jpg`, `jpeg`, `png` or `webp` is the image,
`txt` and `json` are its texts; other files are ignored. This is the convention of webdataset
(github.com/webdataset/webdataset, "The WebDataset Format"), but here the files of an example need
not stand side by side.
"""

import array
import bisect
import functools
import glob
import hashlib
import itertools
import json
import logging
import os
import pathlib
import re
import stat
import weakref
import zlib
from collections.abc import Callable
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt32

from mammut.core.environment import cache_folder
from mammut.core.files import replacing_file
from mammut.data.examples import BadExample, Example, Source, SourceOptions
from mammut.data.records import ABSENT, decode_text, make_example, parse_object
from mammut.data.tar_files import Damage, read_files, shown

_log = logging.getLogger(__name__)

# The columns of an index: the files of an example.
IMAGE, TXT, JSON = COLUMNS = range(3)
# The start of an absent file in an index. Where two files have one name, it is -2 - start.
_ABSENT = -1

# Of several images with one key, the first of these extensions counts.
_COLUMNS = {
    b"jpg": IMAGE,
    b"jpeg": IMAGE,
    b"png": IMAGE,
    b"webp": IMAGE,
    b"txt": TXT,
    b"json": JSON,
}
_RANKS = {extension: rank for rank, extension in enumerate(_COLUMNS)}

_MAX_FILE = 2**32 - 1  # bytes of a file with its headers: an index has 32 bits for them
_MAX_SHARDS = 10**6
_MAX_OPEN = 256  # shards; a process may have 1,024 files open by default
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_FORMAT = 1  # version of the stored indexes
_BRACES = re.compile(r"\{(?:([0-9]+)\.\.([0-9]+)|([^{}]*,[^{}]*))\}")


class Index(NamedTuple):
    """The positions of the files in one shard.

    A row is an example; the columns are IMAGE, TXT and JSON.

    A file is everything from its first header, long names and pax records included, to the last of
    its bytes.

    Attributes:
      starts: the byte where a file starts; -1 without a file, -2 - start where there are two.
      lengths: bytes of a file.
    """

    starts: Int64[np.ndarray, "examples 3"]
    lengths: UInt32[np.ndarray, "examples 3"]


class TarShards:
    """The files of the examples in all shards of a pattern.

    Each file is read when it is needed. Examples have the order of the shards and, in a shard, of
    their first files.

    Args:
      pattern: the shards; see `shard_paths`.

    Raises:
      ValueError: the pattern matches no shard, or one that is missing, cut short, compressed or
        damaged.
    """

    def __init__(self, pattern: str):
        from tqdm import tqdm

        self.paths = shard_paths(pattern)
        # In threads: a disk or a network needs time to return each of the many headers.
        pool = futures.ThreadPoolExecutor(8, thread_name_prefix="mammut-index")
        try:
            opened = [pool.submit(open_index, path) for path in self.paths]
            progress = tqdm(opened, "indexing shards", unit="shard", delay=2, disable=None)
            raised = [future.exception() for future in progress]
            errors = [error for error in raised if isinstance(error, ValueError)]
        finally:
            pool.shutdown(cancel_futures=True)
        if errors:
            others = ""
            if len(errors) > 1:
                others = f" ({len(errors) - 1} of the other shards cannot be used either)"
            raise ValueError(f"{errors[0]}{others}") from errors[0]
        indexes = [future.result() for future in opened]
        self._starts = np.concatenate([index.starts for index in indexes])
        self._lengths = np.concatenate([index.lengths for index in indexes])
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
        start = self._starts[example, column]
        if start == _ABSENT:
            return 0
        return 1 if start >= 0 else 2

    def name(self, example: int) -> str:
        """Returns the name of a file of the example."""
        column = next(column for column in COLUMNS if self.count(example, column))
        return self.read(example, column)[0]

    def read(self, example: int, column: int) -> tuple[str, bytes]:
        """Reads a file of the example: its name and its bytes.

        Of two files of one name it reads the first. Any thread may call it.

        Raises:
          ValueError: the shard cannot be read any more, or is not the one that was indexed.
        """
        path = self.paths[self.shard(example)]
        start = int(self._starts[example, column])
        length = int(self._lengths[example, column])
        try:
            content = self._open(path).read(length, max(start, -2 - start))
        except OSError as error:
            raise ValueError(f"shard {path} cannot be read any more: {error.strerror}") from error
        try:
            file = next(read_files(lambda offset, size: content[offset : offset + size], length))
            if len(content) == length == file.data + file.size:
                return file.name.decode(errors="replace"), content[file.data :]
        except (Damage, StopIteration):
            pass
        raise ValueError(
            f"shard {path} has changed while it was in use, expected the one that was opened"
        )


class TarSource(Source):
    """The examples of tar shards, `tar:PATTERN`: an image and its texts."""

    def __init__(self, options: SourceOptions):
        try:
            self._shards = TarShards(options.name)
        except ValueError as error:
            raise ValueError(f"data source {options.spec!r}: {error}") from error
        paths = [os.path.abspath(path) for path in self._shards.paths]
        folder = os.path.commonpath([os.path.dirname(path) for path in paths])
        self._names = [os.path.relpath(path, folder) for path in paths]
        self._field = options.field
        self._text_columns = (TXT, JSON) if options.field == "captions" else (JSON,)

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> Example:
        name, image = self._read(index, (IMAGE,), "no image")
        return self._example(index, image, name)

    def pairs(self, index: int) -> list[tuple[str, str]]:
        return self._example(index, None, "").pairs

    def _example(self, index: int, image: Any, image_name: str) -> Example:
        name, content = self._read(index, self._text_columns, ABSENT[self._field])
        shard = self._shards.shard(index)
        where = f"{self._shards.paths[shard]}, {name}"
        if name.lower().endswith(".json"):
            record = parse_object(content, where)
            if self._field == "captions" and isinstance(record.get("caption"), str):
                record = {"captions": [record["caption"]]} | record
            if self._field not in record:
                raise BadExample(f'{where} has no "{self._field}"', "missing field")
            value = record[self._field]
        else:
            value = [decode_text(content, where).strip()]
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
            raise BadExample(f"{where} has {absent}", absent)
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


def shard_paths(pattern: str) -> list[pathlib.Path]:
    """Lists the shards of a pattern, in its order.

    The shards of a wildcard are sorted.

    Args:
      pattern: a path with ranges `{00000..00127}`, lists `{a,b}` and the wildcards `*`, `**`, `?`
        and `[...]`; several are joined by `::`.

    Raises:
      ValueError: a shard of a range or list is missing, or a wildcard finds none.
    """
    paths = []
    for part in pattern.split("::"):
        if "://" in part or part.startswith("pipe:"):
            raise ValueError(
                f"{part} is not a path: shards are read at random, so copy or mount them first"
            )
        for name in _expanded(os.path.expanduser(part)):
            names = [name]
            if glob.has_magic(name):
                names = sorted(glob.glob(name, recursive=True))
            if not names:
                raise ValueError(f"no file is called {name}, expected at least one shard")
            paths += map(pathlib.Path, names)
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(paths)} shards do not exist, the first is {missing[0]}: "
            "get them, or leave them out by a narrower pattern; several are joined by ::"
        )
    return paths


def _expanded(text: str) -> list[str]:
    """Expands ranges and lists in braces, as a shell does."""
    match = _BRACES.search(text)
    if match is None:
        return [text]
    low, high, names = match.groups()
    if names is None:
        if abs(int(high) - int(low)) >= _MAX_SHARDS:
            raise ValueError(f"{match[0]} is a range of more than {_MAX_SHARDS:,} shards")
        width = max(len(low), len(high)) if "0" in (low[0], high[0]) else 1
        step = 1 if int(low) <= int(high) else -1
        choices = [f"{number:0{width}}" for number in range(int(low), int(high) + step, step)]
    else:
        choices = names.split(",")
    rest = _expanded(text[match.end() :])
    if len(choices) * len(rest) > _MAX_SHARDS:
        raise ValueError(f"{text} means more than {_MAX_SHARDS:,} shards")
    return [text[: match.start()] + choice + end for choice in choices for end in rest]


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
    examples = len(content) // 36
    starts = np.frombuffer(content, "<i8", 3 * examples).reshape(-1, 3)
    return Index(starts, np.frombuffer(content, "<u4", 3 * examples, 24 * examples).reshape(-1, 3))


def _store(folder: pathlib.Path, name: str, identity: dict[str, str | int], index: Index) -> None:
    """Stores an index, whole or not at all."""
    content = index.starts.astype("<i8").tobytes() + index.lengths.astype("<u4").tobytes()
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
    # Three numbers a row: starts, lengths, and how far the extensions are from the first choice.
    starts = array.array("q")
    lengths = array.array("I")
    ranks = array.array("b")
    for file in read_files(read, size):
        folder, slash, name = file.name.rpartition(b"/")
        stem, _, extension = name.partition(b".")
        extension = extension.lower()
        if not stem or extension not in _COLUMNS:
            continue
        length = file.data + file.size - file.start
        if length > _MAX_FILE:
            raise Damage(
                f"has the file {shown(file.name)} of {file.size:,} bytes, expected less than 4 GiB"
            )
        row = rows.setdefault(folder + slash + stem, len(rows))
        if 3 * row == len(starts):
            starts.extend((_ABSENT, _ABSENT, _ABSENT))
            lengths.extend((0, 0, 0))
            ranks.extend((len(_RANKS),) * 3)
        cell = 3 * row + _COLUMNS[extension]
        rank = _RANKS[extension]
        if rank < ranks[cell]:
            starts[cell] = file.start
            lengths[cell] = length
            ranks[cell] = rank
        elif rank == ranks[cell]:
            starts[cell] = min(starts[cell], -2 - starts[cell])
    return Index(
        np.array(starts, np.int64).reshape(-1, 3), np.array(lengths, np.uint32).reshape(-1, 3)
    )
