"""Manifests, the size and SHA-256 of every file of a folder, and the JSON files around them."""

import hashlib
import json
import os
import pathlib
from typing import Any

from mammut.tensor_files import CheckpointError


def make_manifest(folder: pathlib.Path, files: list[pathlib.Path]) -> dict[str, Any]:
    """`bytes` and `sha256` of each of `files`, by its path within `folder`."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }


def check_manifest(folder: pathlib.Path, manifest: pathlib.Path) -> list[str]:
    """What is wrong with the files of `folder`, or with the manifest that lists them."""
    problems = []
    try:
        for name, entry in read_json_object(manifest).items():
            path, size, sha256 = folder / name, entry["bytes"], entry["sha256"]
            if pathlib.PurePosixPath(name).is_absolute() or ".." in pathlib.PurePosixPath(name).parts:
                problems.append(f"{manifest} lists {name}, which is not in {folder}")
            elif not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != size:
                problems.append(f"{name} has {path.stat().st_size} bytes, its manifest says {size}")
            elif _sha256(path) != sha256:
                problems.append(f"{name} does not have the SHA-256 of its manifest")
    except CheckpointError as error:
        return [str(error)]
    except (KeyError, TypeError, ValueError, OSError):  # another structure, or a name that can be no file's
        return [f"{manifest} does not give the bytes and sha256 of every file"]
    return problems


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file that is never seen half-written."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json_object(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      CheckpointError: the file is missing, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (ValueError, OSError, RecursionError) as error:  # neither JSON nor UTF-8, no file, nested without end
        raise CheckpointError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
