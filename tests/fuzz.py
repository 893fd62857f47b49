"""Strategies of hypothesis for files: bytes damaged at random, JSON with any value in any place."""

import copy
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

any_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63, 2**64, 10**400, -1, 0])
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["", " ", "\0", "../..", "\ud800", "x" * 5000]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def damaged(draw, data: bytes) -> bytes:
    """Return the bytes after random damage.

    The damage is a few flips, overwritten or inserted runs, deletions, repetitions and cuts.
    """
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(out) - 1)))
        size = draw(st.integers(1, 16))
        match draw(
            st.sampled_from(["flip", "overwrite", "number", "insert", "delete", "repeat", "cut"])
        ):
            case "flip" if out:
                out[at] ^= 1 << draw(st.integers(0, 7))
            case "overwrite":
                out[at : at + size] = draw(st.binary(min_size=size, max_size=size))
            case "number":
                number = draw(
                    st.sampled_from(
                        [0, 1, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
                    )
                )
                width = draw(st.sampled_from([2, 4, 8]))
                out[at : at + width] = (number % 256**width).to_bytes(width, "little")
            case "insert":
                out[at:at] = draw(st.binary(max_size=size))
            case "delete":
                del out[at : at + size]
            case "repeat":
                out[at:at] = out[at : at + size] * draw(st.integers(1, 100))
            case "cut":
                del out[at:]
    return bytes(out)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values within a JSON value, itself first."""
    children = []
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    return [path] + [place for key, child in children for place in places(child, (*path, key))]


@st.composite
def mutated(draw, value: Any) -> Any:
    """Return a copy in which one or two values are dropped, doubled, or anything."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(places(value)))
        if not path:
            continue
        *parents, last = path
        parent = value
        for key in parents:
            parent = parent[key]
        match draw(st.sampled_from(["any", "any", "drop", "extra"])):
            case "any":
                parent[last] = draw(any_json)
            case "drop":
                del parent[last]
            case "extra" if isinstance(parent, dict):
                parent[draw(st.text(max_size=3))] = draw(any_json)
            case "extra":
                parent.append(parent[last])
    return value


def refused(call: Callable[[], Any], kind: type[ValueError], where: str = "") -> Any:
    """The result of a call; None where it is refused by an error of ours, in one sentence.

    An error of ours is of `kind`, defined by this library or a plain ValueError.
    """
    try:
        return call()
    except kind as error:
        assert type(error) is ValueError or type(error).__module__.startswith("mammut"), repr(error)
        # The tests check annotations too, in many lines, before the library checks the value.
        text = str(error).partition("Type-check error")[0]
        assert text.strip() and "\n" not in text and where in text, text
        return None
