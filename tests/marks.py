"""Marks of test cases."""

from typing import Any

import pytest


def long(*values: Any) -> Any:
    """Marks a case of a parametrized test as long: a quicker case covers the same path."""
    return pytest.param(*values, marks=pytest.mark.long)
