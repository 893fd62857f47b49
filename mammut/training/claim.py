"""The claim of a run on its folder: one run at a time writes there.

`run.lock` in the folder says which process holds it. The file is locked, and a lock ends with its
process: what a killed run leaves is no claim. A lock may not reach other machines, so the file is
touched every few seconds, too.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator

from mammut.core import distributed
from mammut.core.coordination import at_end, end
from mammut.training.command_line import default_workdir

LOCK = "run.lock"
_PROGRAM = "train.py"
_BEAT = 10.0  # seconds between two touches
_SILENCE = 60.0  # seconds without a touch after which the run of another machine counts as gone


class InUse(ValueError):
    """Raised for a folder that another run has claimed."""


@contextlib.contextmanager
def claim(workdir: pathlib.Path | None, recipe: str, resume: bool) -> Iterator[pathlib.Path]:
    """Claims the folder of a run, as long as the context lasts.

    Process 0 claims it for all. Without a `workdir` it is chosen (`default_workdir`); two runs that
    are started together get two folders.

    Raises:
      ValueError: another run has claimed the folder, or it cannot be written to.
    """
    with contextlib.ExitStack() as stack:

        def choose() -> bytes:
            while True:
                chosen = workdir or default_workdir(recipe, resume)
                is_new = workdir is None and not resume
                try:
                    stack.enter_context(claimed(chosen, is_new=is_new))
                except FileExistsError:  # another run has made it in the meantime
                    continue
                return os.fsencode(chosen)

        chosen = distributed.broadcast_from_first("workdir", choose)
        yield workdir or pathlib.Path(os.fsdecode(chosen))


@contextlib.contextmanager
def claimed(workdir: pathlib.Path, *, is_new: bool = False) -> Iterator[None]:
    """Claims one folder for this process.

    The folder is made where it is missing. At the end it is removed again if it is empty.

    Raises:
      ValueError: another process has claimed the folder, or it cannot be written to.
      FileExistsError: it should be new, and is not.
    """
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    path = workdir / LOCK
    try:
        workdir.parent.mkdir(parents=True, exist_ok=True)
        workdir.mkdir(exist_ok=not is_new)
        descriptor, content = _lock(path)
    except OSError as error:
        if is_new and isinstance(error, FileExistsError) and os.path.lexists(workdir):
            raise
        raise ValueError(
            f"--workdir {workdir} cannot be written to ({error.strerror}): expected a folder or a "
            "new name"
        ) from error
    closed = threading.Event()
    threading.Thread(target=_touch, args=(path, content, closed), daemon=True).start()

    def release() -> None:
        closed.set()
        with contextlib.suppress(OSError):
            if path.read_text("utf-8") == content:
                path.unlink()  # before the lock ends: never the file of the next run
        with contextlib.suppress(OSError):
            os.close(descriptor)
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()

    at_end.append(release)  # a process that ends for another one leaves no claim behind
    try:
        yield
    finally:
        at_end.remove(release)
        release()


def _lock(path: pathlib.Path) -> tuple[int, str]:
    """Locks the file and writes into it whose it is.

    Returns its descriptor and its content.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = _try_lock(path, descriptor)
            _require_gone(path, locked)
            # A run that ended in the meantime has removed the file: the lock is on nothing then.
            if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(descriptor)):
                content = json.dumps(
                    {
                        "program": _PROGRAM,
                        "process": os.getpid(),
                        "host": socket.gethostname(),
                        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
                    }
                )
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, content.encode(), 0)
                return descriptor, content
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _try_lock(path: pathlib.Path, descriptor: int) -> bool:
    """Locks an open file; False where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InUse(_sentence(path)) from None
    except OSError:
        return False
    return True


def _require_gone(path: pathlib.Path, locked: bool) -> None:
    """Checks that the process that wrote the file does not run any more.

    One of this machine would hold the lock. One of another machine would touch the file: its time
    is watched, since the clocks of two machines differ.
    """
    holder = _holder(path)
    if not holder or (locked and holder["host"] == socket.gethostname()):
        return
    before = _touched(path)
    deadline = time.monotonic() + _SILENCE
    print(f"{_sentence(path)}; waiting up to {_SILENCE:g} s for a sign of it", flush=True)
    while time.monotonic() < deadline:
        time.sleep(min(1.0, _BEAT / 2))
        now = _touched(path)
        if now is None:
            return
        if now != before:
            raise InUse(_sentence(path))


def _touched(path: pathlib.Path) -> int | None:
    try:
        with open(path) as file:  # on a network file system, only opening asks for the newest time
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _touch(path: pathlib.Path, content: str, closed: threading.Event) -> None:
    """Touches the file until `closed`; ends this process where the file is another's."""
    while not closed.wait(_BEAT):
        with contextlib.suppress(OSError):
            if path.read_text("utf-8") == content:
                os.utime(path)
            elif not closed.is_set():
                end(_PROGRAM, f"{_sentence(path)}: it took this one, which was stopped, for gone")


def _holder(path: pathlib.Path) -> dict[str, str]:
    """Reads whose the file is; {} where it does not say."""
    try:
        holder = json.loads(path.read_text("utf-8"))
        return {name: str(holder[name]) for name in ("program", "process", "host", "since")}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _sentence(path: pathlib.Path) -> str:
    holder = _holder(path)
    by = "another run"
    if holder:
        by = "{program}, process {process} on {host}, since {since}".format(**holder)
    return f"{path.parent} is in use by {by}: wait for its end, or give another --workdir"
