"""Reads foreign JSON objects, key by key."""

import json
from collections.abc import Collection
from typing import Any


class JsonObject:
    """A JSON object that is read key by key.

    All problems are collected, so that one error can name every one of them. A value that is not
    allowed is added to the problems, and the reader gets an allowed value in its place.

    Args:
      name: the name of the object in the problems.
      values: the object as it was read.
      problems: the list that problems are added to, in sentences.
    """

    def __init__(self, name: str, values: Any, problems: list[str]):
        if not isinstance(values, dict):
            problems.append(f"{name} is {shown(values)}, expected an object")
            values = {}
        self.name = name
        self._values = values
        self._problems = problems
        self._known: set[str] = set()

    def value(self, key: str, default: Any = None) -> Any:
        """Reads the value of a key, unchecked."""
        self._known.add(key)
        return self._values.get(key, default)

    def refuse(self, key: str, expected: str) -> None:
        """Adds the value of `key` to the problems."""
        self._problems.append(
            f"{self.name}.{key} is {shown(self._values.get(key))}, expected {expected}"
        )

    def whole(self, key: str, default: int | None, low: int = 1, high: int = 2**16) -> int:
        """Reads a whole number from `low` to `high`.

        Where `default` is None, the key must be present.
        """
        value = self.value(key, default)
        if type(value) is int and low <= value <= high:
            return value
        self.refuse(key, f"a whole number from {low} to {high}")
        return low

    def side(self, key: str, default: int) -> int:
        """Reads a number of pixels.

        It is given once, or as an equal pair for both sides.
        """
        value = self.value(key, default)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if type(value) is int and 1 <= value <= 2**14:
            return value
        self.refuse(key, f"a whole number from 1 to {2**14}, the same for both sides")
        return 1

    def number(self, key: str, default: float, low: float, high: float) -> float:
        """Reads a number from `low` to `high`."""
        value = self.value(key, default)
        if type(value) in (int, float) and low <= value <= high:
            return float(value)
        self.refuse(key, f"a number from {low} to {high}")
        return low

    def flag(self, key: str, default: bool | None = False) -> bool:
        """Reads True or False.

        Where `default` is None, null is allowed, too, and means False.
        """
        value = self.value(key, default)
        if type(value) is not bool and value is not default:
            self.refuse(key, "true or false")
        return value is True

    def choice(self, key: str, default: Any, choices: dict[Any, Any]) -> Any:
        """Reads the entry of `choices` for the value."""
        value = self.value(key, default)
        if isinstance(value, str | None) and value in choices:
            return choices[value]
        self.refuse(key, " or ".join(map(shown, choices)))
        return next(iter(choices.values()))

    def only(self, key: str, *values: Any) -> None:
        """Refuses a value other than `values`.

        Our model has nothing for other values. A missing key counts as the first of `values`.
        """
        if self.value(key, values[0]) not in values:
            self.refuse(key, " or ".join(map(shown, values)))

    def close(self, without_effect: Collection[str] = ()) -> None:
        """Refuses the keys that were not read and are not in `without_effect`."""
        unknown = sorted(self._values.keys() - self._known - set(without_effect))
        self._problems += [f"{self.name}.{shown(key)[1:-1]} is not known" for key in unknown]


def shown(value: Any) -> str:
    """Writes a JSON value for an error, cut to 60 characters."""
    if isinstance(value, dict | list):  # it may be nested without end
        return "an object" if isinstance(value, dict) else "a list"
    return f"{json.dumps(value):.60}"
