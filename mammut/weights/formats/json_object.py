"""JSON objects that strangers wrote."""

import json
from collections.abc import Collection
from typing import Any


class JsonObject:
    """A JSON object that is read key by key.

    A value that cannot be is added to `problems`, and one that can takes its place: reading goes
    on.
    """

    def __init__(self, name: str, values: Any, problems: list[str]):
        if not isinstance(values, dict):
            problems.append(f"{name} is {shown(values)}, expected an object")
            values = {}
        self.name, self._values, self._problems, self._known = name, values, problems, set()

    def value(self, key: str, default: Any = None) -> Any:
        """As it is."""
        self._known.add(key)
        return self._values.get(key, default)

    def refuse(self, key: str, expected: str) -> None:
        """Adds the value of `key` to the problems."""
        self._problems.append(
            f"{self.name}.{key} is {shown(self._values.get(key))}, expected {expected}"
        )

    def whole(self, key: str, default: int | None, low: int = 1, high: int = 2**16) -> int:
        """A whole number from `low` to `high`; `default` None: it must be there."""
        value = self.value(key, default)
        if type(value) is int and low <= value <= high:
            return value
        self.refuse(key, f"a whole number from {low} to {high}")
        return low

    def side(self, key: str, default: int) -> int:
        """Pixels, once or for both sides."""
        value = self.value(key, default)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if type(value) is int and 1 <= value <= 2**14:
            return value
        self.refuse(key, f"a whole number from 1 to {2**14}, the same for both sides")
        return 1

    def number(self, key: str, default: float, low: float, high: float) -> float:
        """A number from `low` to `high`."""
        value = self.value(key, default)
        if type(value) in (int, float) and low <= value <= high:
            return float(value)
        self.refuse(key, f"a number from {low} to {high}")
        return low

    def flag(self, key: str, default: bool | None = False) -> bool:
        """With `default` None, null is a value, too: off."""
        value = self.value(key, default)
        if type(value) is not bool and value is not default:
            self.refuse(key, "true or false")
        return value is True

    def choice(self, key: str, default: Any, choices: dict[Any, Any]) -> Any:
        """What `choices` has for the value."""
        value = self.value(key, default)
        if isinstance(value, str | None) and value in choices:
            return choices[value]
        self.refuse(key, " or ".join(map(shown, choices)))
        return next(iter(choices.values()))

    def only(self, key: str, *values: Any) -> None:
        """Refuses what is none of `values`, for which there is nothing in our model; a key left out is the first."""
        if self.value(key, values[0]) not in values:
            self.refuse(key, " or ".join(map(shown, values)))

    def close(self, without_effect: Collection[str] = ()) -> None:
        """Refuses the keys that were not asked for."""
        unknown = sorted(self._values.keys() - self._known - set(without_effect))
        self._problems += [f"{self.name}.{shown(key)[1:-1]} is not known" for key in unknown]


def shown(value: Any) -> str:
    """A JSON value for an error, cut short."""
    if isinstance(value, dict | list):  # nested without end, perhaps
        return "an object" if isinstance(value, dict) else "a list"
    return f"{json.dumps(value):.60}"
