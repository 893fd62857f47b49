"""What a program prints: an output that is gone never ends the program."""

import os
import sys


def say(text: str, to: str = "stdout") -> None:
    """Prints a line to "stdout" or "stderr".

    Characters that the output's encoding lacks are printed as escapes. An output that is closed,
    broken or full is left out from then on; that of stdout is said on stderr.
    """
    stream = getattr(sys, to)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except (OSError, ValueError) as error:  # ValueError: it was closed
        # What the old one holds unwritten is dropped with it, or Python would fail when it ends.
        setattr(sys, to, open(os.devnull, "w", encoding="utf-8"))
        if to == "stdout":
            say(f"stdout cannot be written to ({error}): what it would show is left out", "stderr")


def is_terminal(to: str) -> bool:
    """Tells whether "stdout" or "stderr" is a terminal."""
    try:
        return getattr(sys, to).isatty()
    except (AttributeError, OSError, ValueError):  # there is none, or it was closed
        return False
