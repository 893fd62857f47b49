"""Tar shards as webdataset users have them, read at random: each shard's headers are indexed once, nothing is unpacked.

The files of an example share a key: the name up to the first dot after the last slash. What follows
the dot tells what
a file is: `jpg`, `jpeg`, `png` or `webp` the image, `txt` and `json` what is said about it; others
are left alone. The convention is that of github.com/webdataset/webdataset, "The WebDataset Format";
unlike there, the files of an example need not stand side by side. The tar format: POSIX.1-2017,
pax, "EXTENDED DESCRIPTION", and GNU's long names and large numbers (GNU tar manual, "Basic Tar
Format").
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
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt32

from mammut.core.files import replacing_file

_log = logging.getLogger(__name__)

IMAGE, TXT, JSON = COLUMNS = range(3)  # the files of an example that are indexed
# in place of where a file starts; where the same name comes again, -2 - start takes the place of
# start
_ABSENT = -1

# Of several images with one key the first of these is meant.
_COLUMNS = {
    b"jpg": IMAGE,
    b"jpeg": IMAGE,
    b"png": IMAGE,
    b"webp": IMAGE,
    b"txt": TXT,
    b"json": JSON,
}
_RANKS = {extension: rank for rank, extension in enumerate(_COLUMNS)}

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_MAX_EXTENSION = 2**20  # bytes of a long name or of pax records
_MAX_FILE = 2**32 - 1  # bytes of a file with its headers, as an index has them
_MAX_SHARDS = 10**6
_MAX_OPEN = 256  # shards; a process may have 1,024 files open by default
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_FORMAT = 1  # of the kept indexes
_BRACES = re.compile(r"\{(?:([0-9]+)\.\.([0-9]+)|([^{}]*,[^{}]*))\}")


class Index(NamedTuple):
    """Where a shard has the files of its examples, in the columns IMAGE, TXT and JSON.

    A file is everything from its first header, long names and pax records included, to the last of
    its bytes.
    """

    # bytes into the shard; -1 without a file, -2 - start where there are two
    starts: Int64[np.ndarray, "examples 3"]
    lengths: UInt32[np.ndarray, "examples 3"]  # bytes


class TarShards:
    """The examples of all shards that a pattern means, each file of them read when it is asked for.

    Examples have the order of the shards, and in a shard that of their first file.

    Args:
      pattern: See `shard_paths`.

    Raises:
      ValueError: the pattern means no shard, or one that is missing, cut short, compressed or
        damaged.
    """

    def __init__(self, pattern: str):
        from tqdm import tqdm

        self.paths = shard_paths(pattern)
        # Threads, because what takes time is a disk or a network that is asked for one header after
        # the other.
        pool = futures.ThreadPoolExecutor(8, thread_name_prefix="mammut-index")
        try:
            opened = [pool.submit(open_index, path) for path in self.paths]
            waited = tqdm(opened, "indexing shards", unit="shard", delay=2, disable=None)
            errors = [
                error for future in waited if isinstance(error := future.exception(), ValueError)
            ]
        finally:
            pool.shutdown(cancel_futures=True)
        if errors:
            others = (
                f" ({len(errors) - 1} of the other shards cannot be used either)"
                if len(errors) > 1
                else ""
            )
            raise ValueError(f"{errors[0]}{others}") from errors[0]
        indexes = [future.result() for future in opened]
        self._starts = np.concatenate([index.starts for index in indexes])
        self._lengths = np.concatenate([index.lengths for index in indexes])
        self._ends = list(itertools.accumulate(len(index.starts) for index in indexes))
        self._open = functools.lru_cache(_MAX_OPEN)(_OpenShard)

    def __len__(self) -> int:
        return len(self._starts)

    def shard(self, example: int) -> int:
        """The place in `paths` of the shard that an example is in."""
        return bisect.bisect_right(self._ends, example)

    def count(self, example: int, column: int) -> int:
        """How many files an example has in a column: 2 where a name comes again in its shard."""
        start = self._starts[example, column]
        return 0 if start == _ABSENT else 1 if start >= 0 else 2

    def name(self, example: int) -> str:
        """The name of a file of the example."""
        return self.read(
            example, next(column for column in COLUMNS if self.count(example, column))
        )[0]

    def read(self, example: int, column: int) -> tuple[str, bytes]:
        """Name and bytes of a file that the example has, the first of two, in any thread.

        Raises:
          ValueError: the shard cannot be read any more, or is not the one that was indexed.
        """
        path = self.paths[self.shard(example)]
        start, length = int(self._starts[example, column]), int(self._lengths[example, column])
        try:
            content = self._open(path).read(length, max(start, -2 - start))
        except OSError as error:
            raise ValueError(f"shard {path} cannot be read any more: {error.strerror}") from error
        try:
            file = next(_files(lambda place, size: content[place : place + size], length))
            if len(content) == length == file.data + file.size:
                return file.name.decode(errors="replace"), content[file.data :]
        except (_Damage, StopIteration):
            pass
        raise ValueError(
            f"shard {path} has changed while it was in use, expected the one that was opened"
        )


class _OpenShard:
    """Closed when the last thread that reads from it has let go of it, whoever has dropped it meanwhile."""

    def __init__(self, path: pathlib.Path):
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def read(self, length: int, start: int) -> bytes:
        # Not mapped: reading a mapped file that somebody cuts short ends the process.
        return os.pread(self._file, length, start)


def shard_paths(pattern: str) -> list[pathlib.Path]:
    """The shards that a pattern means, in its order; those that a wildcard finds are sorted.

    Args:
      pattern: A path with ranges `{00000..00127}`, lists `{a,b}` and the wildcards `*`, `**`, `?`
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
            found = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else [name]
            if not found:
                raise ValueError(f"no file is called {name}, expected at least one shard")
            paths += map(pathlib.Path, found)
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(paths)} shards do not exist, the first is {missing[0]}: get them, or leave "
            "them out by a narrower pattern; several are joined by ::"
        )
    return paths


def _expanded(text: str) -> list[str]:
    """The names that ranges and lists in braces stand for, as in a shell."""
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
    """The index of a shard: the one kept for it, or a new one, which is then kept.

    Indexes are kept in `mammut/shards` of XDG_CACHE_HOME, by default `~/.cache`, and made again
    where the shard's size or time of change is another.

    Raises:
      ValueError: the shard is not a whole, uncompressed tar file.
    """
    try:
        # opening a pipe would wait for who writes into it
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
            folder = (
                pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
                / "mammut/shards"
            )
            kept = _load(folder / name, identity)
            if kept is not None:
                return kept

            def read(place: int, size: int) -> bytes:
                file.seek(place)
                return file.read(size)

            index = _make_index(read, before.st_size)
            after = os.fstat(file.fileno())
    except OSError as error:
        raise ValueError(f"shard {path} cannot be read: {error.strerror}") from error
    except _Damage as error:
        raise ValueError(f"shard {path} {error}") from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ValueError(f"shard {path} is being written, expected one that is done")
    try:
        _store(folder, name, identity, index)
    except OSError as error:
        _warn_once(
            f"indexes of tar shards cannot be kept in {folder}, so each start makes them anew: {error.strerror}"
        )
    return index


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning("%s", message)


def _load(path: pathlib.Path, identity: dict[str, str | int]) -> Index | None:
    """The index kept under `path`, if it is whole and of the shard as it is now."""
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
    """Keeps an index; whoever reads or writes it meanwhile has a whole one."""
    content = index.starts.astype("<i8").tobytes() + index.lengths.astype("<u4").tobytes()
    head = json.dumps(identity | {"crc32": zlib.crc32(content)}).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_file(folder / name) as new:
        new.write_bytes(head + b"\n" + content)


class _Damage(Exception):
    """What is wrong with a shard, to go on after its name."""


class _File(NamedTuple):
    name: bytes
    start: int  # of its first header
    data: int  # of its bytes
    size: int  # of its bytes


def _make_index(read: Callable[[int, int], bytes], size: int) -> Index:
    """Reads the headers of a shard of `size` bytes; `read(place, size)` returns some of them."""
    head = read(0, 6)
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise _Damage(
                f"is compressed ({name}), which has no random access: unpack it into a plain .tar"
            )
    rows: dict[bytes, int] = {}
    starts, lengths, ranks = array.array("q"), array.array("I"), array.array("b")
    for file in _files(read, size):
        folder, slash, name = file.name.rpartition(b"/")
        stem, _, extension = name.partition(b".")
        extension = extension.lower()
        if not stem or extension not in _COLUMNS:
            continue
        length = file.data + file.size - file.start
        if length > _MAX_FILE:
            raise _Damage(
                f"has the file {_shown(file.name)} of {file.size:,} bytes, expected less than 4 GiB"
            )
        row = rows.setdefault(folder + slash + stem, len(rows))
        if 3 * row == len(starts):
            starts.extend((_ABSENT, _ABSENT, _ABSENT))
            lengths.extend((0, 0, 0))
            ranks.extend((len(_RANKS),) * 3)
        cell, rank = 3 * row + _COLUMNS[extension], _RANKS[extension]
        if rank < ranks[cell]:
            starts[cell], lengths[cell], ranks[cell] = file.start, length, rank
        elif rank == ranks[cell]:
            starts[cell] = min(starts[cell], -2 - starts[cell])
    return Index(
        np.array(starts, np.int64).reshape(-1, 3), np.array(lengths, np.uint32).reshape(-1, 3)
    )


def _files(read: Callable[[int, int], bytes], size: int) -> Iterator[_File]:
    """The regular files of a tar of `size` bytes, those of tars joined one after the other, too."""
    place = start = 0
    ended, name, pax = False, None, {}
    while place < size:
        block = read(place, _BLOCK)
        # the end; a last block that is not whole matters to nobody
        if block.count(0) == len(block):
            ended, place = not pax and name is None, place + _BLOCK
            start = place
            continue
        ended = False
        kind, plain_name, length = _header(block, place)
        data = place + _BLOCK
        if kind in b"LKxXg":  # about the file that follows
            if length > _MAX_EXTENSION:
                raise _Damage(
                    f"has a header of {length:,} bytes at byte {place:,}, expected at most 1 MiB"
                )
            content = read(data, length)
            if len(content) < length:
                break
            if kind == b"L":
                name = content.partition(b"\0")[0]
            elif kind in b"xX":
                pax = _pax_records(content, data)
            place = data + -(-length // _BLOCK) * _BLOCK
            continue
        name, length = (
            pax.get(b"path", name or plain_name),
            _decimal(pax.get(b"size"), length, place),
        )
        if kind == b"S" or any(key.startswith(b"GNU.sparse.") for key in pax):
            raise _Damage(f"has {_shown(name)} as a sparse file: pack it again without --sparse")
        # Folders, links and devices have no bytes, whatever their size says.
        if kind in b"123456" or (kind == b"\0" and name.endswith(b"/")):
            length = 0
        elif data + length > size:
            raise _Damage(
                f"is cut short or damaged: its file {_shown(name)} should end at byte {data + length:,} of {size:,}; "
                "get it again, or leave it out by a narrower pattern"
            )
        elif kind in b"07\0":
            yield _File(name, start, data, length)
        place = start = data + -(-length // _BLOCK) * _BLOCK
        name, pax = None, {}
    if not ended:
        raise _Damage(
            "is cut short: it has no end mark, so files may be missing; get it again, or leave it out by a narrower "
            "pattern"
        )


def _header(block: bytes, place: int) -> tuple[bytes, bytes, int]:
    """The kind of what follows, its name and its size in bytes."""
    if len(block) < _BLOCK or sum(block) - sum(block[148:156]) + 8 * ord(" ") != _number(
        block[148:156], place
    ):
        raise _Damage(
            f"is damaged at byte {place:,}, where the header of a file should be, or no tar file; get it again, or "
            "leave it out by a narrower pattern"
        )
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:  # GNU's own format has other things there
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return block[156:157], name, _number(block[124:136], place)


def _number(field: bytes, place: int) -> int:
    if field[0] == 0x80:  # GNU's form of what does not fit into octal digits
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    if digits.strip(b"01234567"):
        raise _Damage(
            f"is damaged at byte {place:,}, where a header has {digits!r} for a number, or no tar file"
        )
    return int(digits or b"0", 8)


def _pax_records(content: bytes, place: int) -> dict[bytes, bytes]:
    """The values by their names of "length name=value" lines."""
    records = {}
    while content:
        length = _decimal(content[:20].partition(b" ")[0], 0, place)
        line, content = content[:length], content[length:]
        name, equals, value = line.partition(b" ")[2].partition(b"=")
        if len(line) != length or not equals or not value.endswith(b"\n"):
            raise _Damage(f"is damaged at byte {place:,}, where pax records should be")
        records[name] = value[:-1]
    return records


def _decimal(digits: bytes | None, default: int, place: int) -> int:
    if digits is None:
        return default
    if not digits.isdigit() or len(digits) > 20:
        raise _Damage(
            f"is damaged before byte {place:,}: a pax record has {digits[:20]!r} for a number"
        )
    return int(digits)


def _shown(name: bytes) -> str:
    return repr(name.decode(errors="replace"))
