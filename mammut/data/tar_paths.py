"""The shards that a pattern of paths names: ranges and lists in braces, and wildcards."""

import glob
import os
import pathlib
import re

_MAX_SHARDS = 10**6
_BRACES = re.compile(r"\{(?:([0-9]+)\.\.([0-9]+)|([^{}]*,[^{}]*))\}")


def shard_paths(pattern: str) -> list[pathlib.Path]:
    """Lists the shards of a pattern, in its order.

    The shards of a wildcard are sorted.

    Args:
      pattern: a path with ranges `{00000..00127}`, lists `{a,b}` and the wildcards `*`, `**`, `?`
        and `[...]`; several are joined by `::`.

    Raises:
      ValueError: a shard of a range or list is missing, or a wildcard finds none.
    """
    parts = pattern.split("::")
    if len(parts) > 1 and all(map(_found, _expanded(pattern))):
        parts = [pattern]  # the path of a shard that has :: in it
    paths = []
    for part in parts:
        if ("://" in part or part.startswith("pipe:")) and not os.path.exists(part):
            raise ValueError(
                f"{part} is not a path: shards are read at random, so copy or mount them first"
            )
        for name in _expanded(os.path.expanduser(part)):
            names = _found(name) if glob.has_magic(name) else [name]
            if not names:
                raise ValueError(f"no file is called {name}, expected at least one shard")
            paths += map(pathlib.Path, names)
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(paths)} shards do not exist, the first is {missing[0]}: "
            "get them, or leave them out by a narrower pattern; several are joined by ::"
        )
    return paths


def _found(name: str) -> list[str]:
    """Lists the files that a name with wildcards means, sorted; hidden ones are left out.

    A file or folder that has such a name itself, such as `set[1]`, is meant before the wildcard.
    """
    if os.path.exists(name):
        return [name]
    parts = pathlib.Path(name).parts
    count = next(
        (
            count
            for count in range(len(parts) - 1, 0, -1)
            if os.path.isdir(os.path.join(*parts[:count]))
        ),
        0,
    )
    folder = os.path.join("", *parts[:count])
    return sorted(glob.glob(os.path.join(glob.escape(folder), *parts[count:]), recursive=True))


def _expanded(text: str) -> list[str]:
    """Expands ranges and lists in braces, as a shell does.

    A path that exists, or a folder before its last slash that does, stays as it is.
    """
    match = _BRACES.search(text)
    while match and os.path.isdir(text[: text.find("/", match.end()) + 1]):
        match = _BRACES.search(text, match.end())
    if match is None or os.path.exists(text):
        return [text]
    low, high, names = match.groups()
    if names is None:
        if abs(int(high) - int(low)) >= _MAX_SHARDS:
            raise ValueError(f"{match[0]} is a range of more than {_MAX_SHARDS:,} shards")
        width = max(len(low), len(high)) if "0" in (low[0], high[0]) else 1
        step = 1 if int(low) <= int(high) else -1
        choices = [f"{number:0{width}}" for number in range(int(low), int(high) + step, step)]
    else:
        choices = names.split(",")
    rest = _expanded(text[match.end() :])
    if len(choices) * len(rest) > _MAX_SHARDS:
        raise ValueError(f"{text} means more than {_MAX_SHARDS:,} shards")
    return [text[: match.start()] + choice + end for choice in choices for end in rest]
