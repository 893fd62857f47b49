"""Sizes that the linter does not check: the lines of a file and of a function."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(
    [*(ROOT / "mammut").rglob("*.py"), *(ROOT / "eval").rglob("*.py"), ROOT / "train.py"]
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_have_at_most_450_lines_and_functions_fewer_than_80(path):
    text = path.read_text()
    if "tables" not in path.stem:  # rules in rows, which are read one by one
        assert len(text.splitlines()) <= 450
    functions = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [node.name for node in functions if node.end_lineno - node.lineno >= 80] == []
