"""Settings as checked dataclasses, converted to JSON and back.

A config refuses values that cannot work when it is built, in one sentence that names the field. The
configs themselves are defined beside the code that they configure; `mammut.config` has them all.
"""

import ast
import dataclasses
import inspect
import math
import reprlib
import textwrap
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, NewType, NotRequired, Union, get_args, get_origin

import numpy as np

# A whole number of at least 0 in a JSON file: a number of things, or a position.
Count = NewType("Count", int)


def require(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_kind(name: str, value: Any, *kinds: type) -> None:
    """Raises ValueError where an argument is of none of `kinds`."""
    require(
        isinstance(value, kinds),
        f"{name} is {value!r:.60}, expected {' or '.join(kind.__name__ for kind in kinds)}",
    )


def require_types(config: Any) -> None:
    """Checks that every field has a value of its type; a whole number is a float, too.

    A list is taken for a tuple, and becomes one: a config can be hashed. A number of NumPy becomes
    one of Python.
    """
    for field in dataclasses.fields(config):
        value = _as_tuples(plain_number(getattr(config, field.name)))
        object.__setattr__(config, field.name, value)
        kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
        require(
            _fits(value, field.type),
            f"{type(config).__name__}.{field.name} is {value!r:.80}, expected {kind}",
        )


def require_whole(name: str, value: Any, low: int, high: int) -> None:
    """Checks that a value is a whole number from `low` to `high`; True is none."""
    require(
        type(value) is int and low <= value <= high,
        f"{name} is {value!r}, expected a whole number from {low} to {high}",
    )


def require_number(name: str, value: Any, low: int | float, high: int | float) -> None:
    """Checks that a value is a number from `low` to `high`; NaN and True are none."""
    require(
        isinstance(value, int | float) and type(value) is not bool and low <= value <= high,
        f"{name} is {value!r}, expected a number from {low} to {high}",
    )


def plain_number(value: Any) -> Any:
    """Turns a number of NumPy into one of Python, which JSON takes; other values stay."""
    return value.item() if isinstance(value, np.number) else value


def require_positive(config: Any, *names: str) -> None:
    """Checks that the named fields are positive and finite."""
    for name in names:
        value = getattr(config, name)
        require(
            0 < value < math.inf,
            f"{type(config).__name__}.{name} is {value}, expected a positive number",
        )


def require_at_most(config: Any, limits: dict[str, int]) -> None:
    """Checks that fields are not above their limits.

    No real model is above them: a file with a larger number is damaged or a trap, and is refused
    before anything is allocated.
    """
    for name, limit in limits.items():
        value = getattr(config, name)
        require(
            value <= limit, f"{type(config).__name__}.{name} is {value}, expected at most {limit}"
        )


def require_fraction(config: Any, *names: str) -> None:
    """Checks that the named fields are numbers in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        require(
            0 <= value < 1,
            f"{type(config).__name__}.{name} is {value}, expected a number in [0, 1)",
        )


def require_choices(config: Any) -> None:
    """Checks that every Literal field has one of its values.

    Unchecked, a misspelt choice would silently act as the last one: code compares with one value
    after the other, then "else".
    """
    for field in dataclasses.fields(config):
        kinds = _options(field.type) or (field.type,)
        for kind in kinds:
            if get_origin(kind) is not Literal:
                continue
            value = getattr(config, field.name)
            choices = get_args(kind)
            require(
                value in choices or (value is None and type(None) in kinds),
                f"{type(config).__name__}.{field.name} is {value!r}, "
                f"expected one of {', '.join(choices)}",
            )


def to_dict(config: Any) -> dict[str, Any]:
    """Converts a config to plain JSON values."""
    return dataclasses.asdict(config)


def differences(
    old: dict[str, Any], new: dict[str, Any], free: set[str], prefix: str = ""
) -> list[str]:
    """Describes the fields that differ between two results of `to_dict`.

    The fields in `free` are left out.
    """
    changed = []
    for name, value in new.items():
        field = prefix + name
        was = old.get(name)
        if field in free or value == was:
            continue
        if isinstance(value, dict) and isinstance(was, dict):
            changed += differences(was, value, free, field + ".")
        else:
            changed.append(f"{field} is {value}, it was {was}")
    return changed


def from_dict(cls: type, values: Any, where: str = "config"):
    """Builds the dataclass `cls` from plain JSON values.

    `where` names their file in errors.

    Raises:
      ValueError: `values` is not an object, or has a field that `cls` does not have. A missing
        field takes its default.
    """
    if not isinstance(values, dict):
        raise ValueError(
            f"{where} holds {type(values).__name__}, "
            f"expected an object with the fields of {cls.__name__}"
        )
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        # An error is one line, whatever the file holds.
        names = [name if name.isprintable() else repr(name) for name in unknown]
        raise ValueError(f"{where} has {', '.join(names)}, which {cls.__name__} does not know")
    built = {}
    for name, value in values.items():
        kind = _dataclass_for(value, fields[name].type)
        if dataclasses.is_dataclass(kind):
            value = from_dict(kind, value, f"{where}: {name}")
        elif _is_list_of(kind, dataclasses.is_dataclass) and isinstance(value, list | tuple):
            value = [from_dict(get_args(kind)[0], item, f"{where}: {name}") for item in value]
        elif not _fits(value, kind):
            expected = kind.__name__ if isinstance(kind, type) else str(kind)
            raise ValueError(
                f"{where} has {name} {value!r}, expected {expected} for {cls.__name__}.{name}"
            )
        built[name] = _as_tuples(value)
    return cls(**built)


def require_fields(values: Any, kinds: Mapping[str, Any], where: str) -> None:
    """Checks an object that was read from JSON.

    Fields that `kinds` does not name may hold anything: other versions may write more.

    Args:
      values: the object; it may be anything.
      kinds: the type of each field; one that is `NotRequired[...]` may be missing.
      where: the place of the object, for errors.

    Raises:
      ValueError: it is no object, a field is missing or of another type, or a number is not finite.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} is no object: {reprlib.repr(values)}")
    for name, kind in kinds.items():
        optional = get_origin(kind) is NotRequired
        if optional:
            (kind,) = get_args(kind)
        if name not in values and optional:
            continue
        value = values.get(name)
        fits = _fits(value, kind)
        if get_origin(kind) is Literal:
            fits = value in get_args(kind)
        if not fits:
            given = f": it is {reprlib.repr(value)}" if name in values else ""
            raise ValueError(f"{where} has no {name!r} of type {_type_name(kind)}{given}")


def _type_name(kind: Any) -> str:
    """Describes the type of a field in an error."""
    if kind is Count:
        return "int, at least 0"
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if isinstance(kind, type):
        return kind.__name__
    return str(kind).replace(f"{__name__}.", "")


def _dataclass_for(value: Any, kind: Any) -> Any:
    """Chooses the type of a field's value.

    Of several dataclasses it is the one that has most of the value's names, or else the first.
    None is a value of its own where the field may be None.
    """
    options = _options(kind)
    if types.NoneType in options:
        if value is None:
            return kind
        options = tuple(option for option in options if option is not types.NoneType)
    if not options or not all(map(dataclasses.is_dataclass, options)):
        return kind
    names = set(value) if isinstance(value, dict) else set()

    def shared_names(option: type) -> int:
        return len(names & {field.name for field in dataclasses.fields(option)})

    return max(options, key=shared_names)


def _options(kind: Any) -> tuple[Any, ...]:
    """Lists the types of a union; other types have none."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else ()


def _is_list_of(kind: Any, what: Callable[[Any], bool] = lambda item: True) -> bool:
    """Tells whether a type is a tuple of any length.

    `what` checks the type of its items.
    """
    args = get_args(kind)
    return get_origin(kind) is tuple and len(args) == 2 and args[1] is Ellipsis and what(args[0])


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


def _fits(value: Any, kind: Any) -> bool:
    """Tells whether a JSON value fits the type of a field."""
    if get_origin(kind) is Literal:
        return isinstance(value, str)  # the config itself checks which one
    if options := _options(kind):
        return any(_fits(value, option) for option in options)
    if _is_list_of(kind):
        return isinstance(value, list | tuple) and all(
            _fits(item, get_args(kind)[0]) for item in value
        )
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        has_length = isinstance(value, list | tuple) and len(value) == len(kinds)
        return has_length and all(map(_fits, value, kinds))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(
            _fits(item, get_args(kind)[1]) for item in value.values()
        )
    if kind is types.NoneType:
        return value is None
    if kind is Count:
        return type(value) is int and 0 <= value < 2**53
    if kind is float:
        return isinstance(value, float) or type(value) is int and abs(value) < 2**53
    return type(value) is kind


def field_texts(cls: type) -> dict[str, str]:
    """Reads the help text of each field of a dataclass.

    The text is the comment directly above the field. A field without a comment has no text. Fields
    of base classes are read too: where the class has a `NOUN`, their texts begin with it, since
    other classes inherit them as well.
    """
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        noun = getattr(cls, "NOUN", None) if base is not cls else None
        lines = inspect.getsource(base).splitlines()
        for node in ast.parse(textwrap.dedent("\n".join(lines))).body[0].body:
            if not isinstance(node, ast.AnnAssign):
                continue
            comment = []
            for line in reversed(lines[: node.lineno - 1]):
                if not line.strip().startswith("#"):
                    break
                comment.insert(0, line.strip().removeprefix("#").strip())
            if comment:
                text = " ".join(comment)
                texts[node.target.id] = f"{noun}: {text[0].lower()}{text[1:]}" if noun else text
    return texts
