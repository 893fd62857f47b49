"""Signals ask a run to stop; it stops where its state is whole."""

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from mammut.core.coordination import connected, end
from mammut.core.terminal import say

STOPPED = 75  # status of a run that was stopped and saved: EX_TEMPFAIL of sysexits.h

_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C", signal.SIGHUP: "SIGHUP"}
_PATIENCE = 5.0  # seconds after which an end that loses nothing is not waited for
_DOUBLE = 0.2  # seconds in which a second Ctrl-C is the first one, passed on by a parent process


class Stopped(BaseException):
    """The run was asked to stop where it has nothing to save.

    It is no Exception, so that nothing that handles errors takes it for one. `status` is the exit
    status of the program.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Stopping:
    """Whether a SIGTERM, a Ctrl-C or a SIGHUP stops the run.

    Inside the context a signal raises `Stopped` in the main thread, but not in `deferred`: what
    runs there asks `now`, and sets `unsaved` once it has something to save. Until then the program
    ends within seconds whatever it does. A second Ctrl-C ends it at once.

    With several processes nothing is raised: a signal to any of them stops all, at the next call of
    `now` that all of them make. They agree in the background (JAX's preemption service). Outside
    of the main thread there are no signals.
    """

    def __init__(self, program: str):
        self.unsaved = False  # whether there are steps that no checkpoint has
        self._program = program
        self._number = signal.SIGTERM  # the signal
        self._watching: threading.Thread | None = None
        self._received = threading.Event()
        self._agreed = False
        self._deferred = False
        self._begun = False  # whether the run can be resumed
        self._calls = 0
        self._timer: threading.Timer | None = None
        self._before = contextlib.ExitStack()  # puts back what was before

    def __enter__(self) -> "Stopping":
        # It stays: threads of tensorstore tell of a failed write until the program has ended.
        sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)
        if threading.current_thread() is threading.main_thread():
            # Python's handlers run between two steps of the main thread, which may be in a long
            # compilation: the watch learns of a signal at once.
            read, write = os.pipe()
            os.set_blocking(write, False)
            self._before.callback(os.close, write)
            self._before.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(write))
            for number in _NAMES:
                if number == signal.SIGTERM and connected():
                    continue  # it is JAX's
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup
                self._before.callback(signal.signal, number, signal.signal(number, self._handle))
            watch = threading.Thread(
                target=self._watch, args=[read], name="mammut-signals", daemon=True
            )
            watch.start()
            self._watching = watch
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        self._before.close()
        if self._watching:
            self._watching.join(1.0)  # it may be about to start the timer
        if self._timer:
            self._timer.cancel()
        # A library has turned `Stopped` into an error of its own.
        if isinstance(error, Exception) and self.alone and not self._begun:
            self._raise()

    @property
    def name(self) -> str:
        """The name of the signal, such as "SIGTERM" or "Ctrl-C"."""
        return _NAMES[self._number]

    def now(self) -> bool:
        """Tells whether to stop here.

        All processes call it at the same places and get the same answer. It costs nothing.
        """
        if not connected():
            return self._received.is_set()
        if not self._agreed:
            from jax.experimental import multihost_utils

            # Counted from 1, not from the step that a run is resumed at: a SIGTERM before the first
            # call means call 1.
            self._calls += 1
            self._agreed = multihost_utils.reached_preemption_sync_point(self._calls)
        return self._agreed

    @property
    def alone(self) -> bool:
        """Whether this process has to stop, and need not agree with others."""
        return not connected() and self._received.is_set()

    def check(self) -> None:
        """Raises `Stopped` where `now` tells to stop; all processes call it."""
        if self.now():
            self._raise()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A signal is not raised inside of it."""
        if self.alone:  # it was raised where nothing raises, as in a destructor
            self._raise()
        self._deferred = self._begun = True
        self.unsaved = False
        try:
            yield
        finally:
            self._deferred = False

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside of `deferred`, a signal is raised again."""
        self._deferred = False
        try:
            if self.alone:
                self._raise()
            yield
        finally:
            self._deferred = True

    def saved(self) -> None:
        """Notes that all is saved: what hangs from now on is not waited for."""
        self._end_soon(STOPPED)

    def _handle(self, number: int, _) -> None:
        self._number = number
        self._received.set()
        if not self._deferred and not connected():
            self._raise()

    def _raise(self) -> NoReturn:
        message = f"{self.name}: stopped before there was anything to save"
        raise Stopped(message, 128 + self._number)

    def _watch(self, read: int) -> None:
        """Answers the signals, whose numbers it reads, beside the main thread."""
        last = None
        with os.fdopen(read, "rb", buffering=0) as numbers:
            while byte := numbers.read(1):
                number = byte[0]
                now = time.monotonic()
                if number not in _NAMES:
                    continue
                if number == signal.SIGINT and last is not None and now - last > _DOUBLE:
                    self._end_at_once()
                if last is None:
                    last = now
                    self._received_first(number)

    def _received_first(self, number: int) -> None:
        if connected():
            os.kill(os.getpid(), signal.SIGTERM)  # JAX tells the others
        elif not self.unsaved:
            # Nothing is lost, and a compilation may take minutes.
            self._end_soon(STOPPED if self._begun else 128 + number)
        if self._deferred or connected():
            say(f"{self._program}: {_NAMES[number]}: stopping, Ctrl-C stops at once", "stderr")

    def _end_soon(self, status: int) -> None:
        if connected() or self._watching is None:
            return
        self._timer = threading.Timer(_PATIENCE, self._end, [status])
        self._timer.daemon = True
        self._timer.start()

    def _end(self, status: int) -> None:
        say(f"{self._program}: ended without waiting any longer, nothing is lost", "stderr")
        os._exit(status)

    def _end_at_once(self) -> None:
        message = "Ctrl-C twice: ended at once, nothing was saved"
        if connected():
            end(self._program, message)
        say(f"{self._program}: {message}", "stderr")
        os._exit(128 + signal.SIGINT)


def _unraisable(before: Callable[[Any], None], unraisable: Any) -> None:
    """Prints what Python cannot raise where it comes up, but for what tells nothing new."""
    error = unraisable.exc_value
    # A signal in a destructor; it is noted, and raised at the next place that can.
    is_signal = isinstance(error, Stopped)
    # From tensorstore, for each array of a checkpoint whose write has failed already.
    is_late = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
    if not (is_signal or is_late):
        before(unraisable)


def leave(status: int) -> NoReturn:
    """Ends the program without waiting for threads, which may hang in a read."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(status)
