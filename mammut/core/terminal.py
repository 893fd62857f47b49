"""What a program prints: an output that is gone, or that nobody reads, never ends or stops it."""

import os
import select
import sys
from typing import Any

_PATIENCE = 5.0  # seconds that an output is waited for, until it counts as one that nobody reads
_PIECE = 1000  # characters, which a pipe that is ready takes without a wait

_unread: set[str] = set()  # the outputs that nobody reads


def say(text: str, to: str = "stdout") -> None:
    """Prints a line to "stdout" or "stderr".

    Characters that the output's encoding lacks are printed as escapes. An output that is closed,
    broken or full is left out from then on; one that nobody reads, such as that of a paused `less`,
    is left out until it is read. What is left out of stdout is said on stderr.
    """
    stream = getattr(sys, to)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    line = text.encode(encoding, "backslashreplace").decode(encoding) + "\n"
    try:
        for start in range(0, len(line), _PIECE):
            if not is_read(stream, 0.0 if to in _unread else _PATIENCE):
                is_new = to not in _unread
                _unread.add(to)
                if is_new and to == "stdout":
                    say("stdout is not read: what it would show is left out so long", "stderr")
                return
            print(line[start : start + _PIECE], end="", file=stream, flush=True)
        _unread.discard(to)
    except (OSError, ValueError) as error:  # ValueError: it was closed
        # What the old one holds unwritten is dropped with it, or Python would fail when it ends.
        setattr(sys, to, open(os.devnull, "w", encoding="utf-8"))
        if to == "stdout":
            say(f"stdout cannot be written to ({error}): what it would show is left out", "stderr")


def is_read(stream: Any, seconds: float = 0.0) -> bool:
    """Tells whether an output takes what is written to it, within some seconds.

    A pipe or terminal whose reader has stopped does not: a write would wait for ever.
    """
    try:
        ready = select.poll()
        ready.register(stream.fileno(), select.POLLOUT)
    except (AttributeError, OSError, ValueError):  # no file, or a closed one
        return True
    return bool(ready.poll(1000 * seconds))


def is_terminal(to: str) -> bool:
    """Tells whether "stdout" or "stderr" is a terminal."""
    try:
        return getattr(sys, to).isatty()
    except (AttributeError, OSError, ValueError):  # there is none, or it was closed
        return False
