"""Files and folders that are written whole or not at all.

A manifest lists the size and SHA-256 of every file of a folder.
"""

import codecs
import contextlib
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from typing import Any

from mammut.core.mapped_file import MAX_HEADER, CheckpointError, MappedFile, json_object

_MAX_CONFIG = 4_000_000  # bytes
_PARTIAL = re.compile(r".+\.[0-9a-f]{8}\.partial")  # the names that `replacing_file` writes to


def make_manifest(folder: pathlib.Path, files: list[pathlib.Path]) -> dict[str, Any]:
    """Makes the manifest of `files` in `folder`.

    It holds `bytes` and `sha256` of each file, by its path within `folder`.
    """
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in files
    }


def check_manifest(folder: pathlib.Path, manifest: pathlib.Path) -> list[str]:
    """Compares the files of `folder` with their manifest.

    Returns:
      The errors in the files or in the manifest, in sentences; an empty list where all is right.
    """
    try:
        entries = read_json_object(manifest, MAX_HEADER)
    except CheckpointError as error:
        return [str(error)]
    if not entries:  # of no file it would be true
        return [f"{manifest} lists no file"]
    return check_files(folder, entries, str(manifest))


def check_files(folder: pathlib.Path, entries: dict[str, Any], manifest: str) -> list[str]:
    """Compares the files of `folder` with the entries of a manifest, as `check_manifest` does."""
    problems = []
    try:
        for name, entry in entries.items():
            size = entry["bytes"]
            sha256 = entry["sha256"]
            path = folder / name
            posix = pathlib.PurePosixPath(name)
            if posix.is_absolute() or ".." in posix.parts:
                problems.append(f"{manifest} lists {name}, which is not in {folder}")
            elif not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != size:
                problems.append(f"{name} has {path.stat().st_size} bytes, its manifest says {size}")
            elif problem := _problem(path, sha256):
                problems.append(f"{name} {problem}")
    # The structure is another one, or a name cannot be a file's.
    except (KeyError, TypeError, ValueError, OSError):
        return [f"{manifest} does not give the bytes and sha256 of every file"]
    return problems


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    with replacing_file(path) as new:
        new.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def checksum(values: dict[str, Any]) -> str:
    """Computes the SHA-256 of a JSON object: of its content, not of how it is laid out."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_json_object(path: pathlib.Path, max_bytes: int = _MAX_CONFIG) -> dict[str, Any]:
    """Reads an object from a JSON file that is not trusted.

    Raises:
      CheckpointError: the file is missing, no regular file or larger than `max_bytes`; or it holds
        something else, a key twice, or NaN or Infinity.
    """
    file = MappedFile(path)
    if file.size > max_bytes:
        raise CheckpointError(f"{path} has {file.size} bytes, expected at most {max_bytes}")
    # An editor may have put a byte order mark before it.
    raw = file.bytes(0, file.size).removeprefix(codecs.BOM_UTF8)
    return json_object(raw, str(path))


@contextlib.contextmanager
def replacing_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Replaces a file at once.

    It gives a path to write to. At the end the new file takes the place of `path`.

    Readers of `path` see the old file or the new one, never a part. On an error `path` stays as it
    was, and nothing is left beside it. Several processes may write one `path`: the last one wins.
    """
    new = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield new
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def remove_partial_files(folder: pathlib.Path) -> None:
    """Removes what `replacing_file` left in a folder where its process was killed.

    No other process may be writing there.
    """
    for path in folder.glob("*.partial"):
        if _PARTIAL.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(
    folder: pathlib.Path, last: str, stale: Collection[str] = ()
) -> Iterator[pathlib.Path]:
    """Replaces files of a folder at once.

    It gives a new folder to write to. At the end its files take the places of the old ones in
    `folder`.

    Until then `folder` stays as it was. Its file `last` is then removed first and put there last:
    a folder that has it is complete. Of the files `stale`, those not written are removed.
    """
    new = folder / ".partial"
    shutil.rmtree(new, ignore_errors=True)  # left behind by a process that was killed
    new.mkdir(parents=True)
    try:
        yield new
        names = {path.name for path in new.iterdir()}
        (folder / last).unlink(missing_ok=True)
        for name in set(stale) - names:
            (folder / name).unlink(missing_ok=True)
        for name in (*sorted(names - {last}), last):
            os.replace(new / name, folder / name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _problem(path: pathlib.Path, sha256: str) -> str:
    """Compares a file with its checksum; "" where it is right."""
    try:
        if _sha256(path) != sha256:
            return "does not have the SHA-256 of its manifest"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return ""


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
