"""Helpers for tests of files.

Trees are compared bit for bit, a bit is flipped, and errors are one sentence.
"""

import pathlib

import jax
import numpy as np
import pytest


def by_name(tree) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_identical(tree, expected) -> None:
    got, want = by_name(tree), by_name(expected)
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype and got[name].shape == x.shape, name
        assert got[name].tobytes() == x.tobytes(), name


def flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def one_sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert text and "\n" not in text.strip()
    return text
