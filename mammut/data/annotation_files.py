"""Values of annotation files, each checked, with its place in the file for messages.

A benchmark's file is read whole. `where` names a place, such as "captions.json, images[3]".
"""

import csv
import hashlib
import io
import json
import os
import pathlib
import reprlib
from collections.abc import Callable, Iterator
from typing import Any

from mammut.data.config import Field
from mammut.data.examples import SourceOptions

ID = (int, str)
_KINDS = {str: "a text", int: "a whole number", ID: "a whole number or a text", list: "a list"}


def require_offered(options: SourceOptions, offered: Field) -> None:
    """Checks that a set is opened for the field that it offers.

    Raises:
      ValueError: it is not.
    """
    if options.field != offered:
        raise ValueError(
            f"data source {options.spec!r} offers the field {offered!r}, "
            f"expected one that offers {options.field!r}"
        )


def expanded(text: str) -> pathlib.Path:
    """Returns the path that a part of a spec names; `~` is the home folder."""
    return pathlib.Path(os.path.expanduser(text))


def digest_of(form: str) -> str:
    """Returns SHA-256 of the files that a spec names, one after the other."""
    digest = hashlib.sha256()
    for path in map(expanded, filter(None, form.split(","))):
        if path.is_file():  # neither the folder of the images nor the name of a split
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_text(path: pathlib.Path) -> str:
    """Reads a file in UTF-8, with or without a byte order mark.

    Raises:
      ValueError: it cannot be read or is not UTF-8; the line is named.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line} is not UTF-8") from error


def read_json(
    path: pathlib.Path,
    object_hook: Callable[[dict[str, Any]], Any] | None = None,
    kind: type = dict,
) -> Any:
    """Reads a JSON file that holds one object; or a list, where `kind` is list.

    Raises:
      ValueError: the file cannot be read, is not JSON or holds another value.
    """
    try:
        content = json.loads(path.read_text("utf-8-sig"), object_hook=object_hook)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON") from error
    if not isinstance(content, kind):
        name = "object" if kind is dict else kind.__name__
        raise ValueError(f"{path} is not a JSON {name}")
    return content


def get_field(value: dict[str, Any], key: str, kind: Any, where: Any) -> Any:
    """Returns a field of an object.

    Raises:
      ValueError: the object has no such field of that kind: `str`, `int`, `ID` or `list`.
    """
    if not isinstance(value.get(key), kind):
        raise ValueError(f'{where} has no "{key}", {_KINDS[kind]}')
    return value[key]


def objects_in(value: dict[str, Any], key: str, where: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the objects of a list, each with its position for messages.

    Raises:
      ValueError: the field is no list, or an item of it no object.
    """
    for number, item in enumerate(get_field(value, key, list, where)):
        at = f"{where}, {key}[{number}]"
        if not isinstance(item, dict):
            raise ValueError(f"{at} is not a JSON object")
        yield at, item


def objects_of(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the objects of a JSON file that holds a list of them, each with its position.

    Raises:
      ValueError: the file cannot be read or holds something else.
    """
    for number, item in enumerate(read_json(path, kind=list)):
        at = f"{path}, item {number}"
        if not isinstance(item, dict):
            raise ValueError(f"{at} is not a JSON object")
        yield at, item


def rows_of(
    path: pathlib.Path, columns: tuple[str, ...], delimiter: str = ","
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields the rows of a CSV file by the names in its first line, each with its place.

    Args:
      columns: names that the first line must have; all others are yielded, too.

    Raises:
      ValueError: the file cannot be read, lacks a column, or a row has more or fewer cells than the
        first line.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
    try:
        header = next(reader, [])
        for name in columns:
            if name not in header:
                raise ValueError(
                    f"{path}, line 1 has no column {name!r}, it has {reprlib.repr(header)}"
                )
        start = reader.line_num + 1
        for cells in reader:
            where = f"{path}, line {start}"
            start = reader.line_num + 1
            if not cells:  # an empty line
                continue
            if len(cells) != len(header):
                raise ValueError(f"{where} has {len(cells)} cells, expected {len(header)}")
            yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def require_once(identity: Any, seen: Any, where: str, what: str) -> None:
    """Checks that an id is not among those `seen`.

    Raises:
      ValueError: it is; `what` names the id in the error.
    """
    if identity in seen:
        raise ValueError(
            f"{where} has the {what} {reprlib.repr(identity)} of one before it, expected each once"
        )
