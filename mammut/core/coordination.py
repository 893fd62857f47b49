"""The connection between the processes of a run, for `mammut.core.distributed`.

`connect` joins them, `end` ends this process and tells the others why, `disconnect` parts them.
"""

import contextlib
import dataclasses
import faulthandler
import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax

# Errors that are printed in one sentence; any other is a defect, and printed with its traceback.
EXPECTED = (ValueError, FloatingPointError, OSError, MemoryError)

# Keys at the coordinator: the failure that ends the run, and each process that knows of it.
_FAILURE = "mammut/failure"
_KNOWN = "mammut/known/"
_NONE = json.dumps(None)  # the failure of a run that had none
LONG = 7 * 24 * 3600 * 1000  # ms, longer than any run: the watchdog ends what takes too long
_GOODBYE = 5.0  # seconds that the coordinator waits for the others to learn why it ends

at_end: list[Callable[[], None]] = []  # what `end` still calls; it may not wait or raise
_ending = threading.Lock()  # taken for good by the thread that ends this process
_joined = threading.Event()  # this process and the others can talk


@dataclasses.dataclass(frozen=True)
class Processes:
    """Settings of the processes of a run.

    Without any setting the program is one process.

    Attributes:
      cluster: take all settings from the TPU pod, Slurm or Open MPI.
      coordinator: HOST:PORT of process 0.
      count: how many processes there are.
      index: the number of this process.
      timeout: all processes end when one has given no sign of life for so many seconds. The start
        waits three times as long for all of them.
    """

    cluster: bool = False
    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    timeout: float = 100.0

    def __post_init__(self):
        given = [value is not None for value in (self.coordinator, self.count, self.index)]
        if self.cluster and any(given):
            raise ValueError(
                "--distributed is given with --coordinator, --num-processes or --process-id: "
                "give either"
            )
        if self.count is not None and self.count < 1:
            raise ValueError(f"--num-processes is {self.count}, expected at least 1")
        if any(given) and not all(given) and not (self.count == 1 and sum(given) == 1):
            raise ValueError(
                "--coordinator, --num-processes and --process-id go together: "
                "give all three or none"
            )
        if not 1 <= self.timeout <= 86_400:
            raise ValueError(f"--peer-timeout is {self.timeout:g}, expected 1 to 86400 seconds")
        if all(given):
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
                raise ValueError(
                    f"--coordinator is {self.coordinator!r}, expected HOST:PORT of process 0"
                )
            if not 0 <= self.index < self.count:
                raise ValueError(
                    f"--process-id is {self.index} of --num-processes {self.count}, "
                    f"expected 0 to {self.count - 1}"
                )


def state() -> Any:
    """Returns JAX's own state of the processes.

    Its `client` talks to JAX's coordination service.
    """
    from jax._src import distributed  # jax.distributed offers initialize and shutdown alone

    return distributed.global_state


def connected() -> bool:
    """Tells whether `connect` has joined this process and the others."""
    return _joined.is_set()


def connect(settings: Processes, program: str) -> threading.Thread:
    """Connects this process; the thread returned watches the others."""
    if multiprocessing.parent_process() is not None:
        raise RuntimeError(
            "the processes of a run are connected by its main process, not by a worker of it"
        )
    if jax.distributed.is_initialized():
        raise RuntimeError("the processes of this run are connected already")
    faulthandler.enable()  # JAX aborts a process that has lost the others: print all stacks
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = settings.coordinator or "the coordinator of the cluster"
    patience = 3 * settings.timeout
    # JAX would abort without a word of what to do.
    too_late = (
        f"not all processes came together at {address} within {patience:g} s (three times "
        "--peer-timeout): expected one of every --process-id below --num-processes, and a "
        "coordinator that all can reach"
    )
    late = threading.Timer(patience, end, [program, too_late])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            settings.coordinator,
            settings.count,
            settings.index,
            cluster_detection_method=None if settings.cluster else "deactivate",
            initialization_timeout=int(patience) + 60,
            heartbeat_timeout_seconds=int(settings.timeout),
            shutdown_timeout_seconds=int(settings.timeout),
        )
    except (ValueError, RuntimeError, OSError) as error:
        if settings.cluster:
            raise ValueError(
                "--distributed found no processes of a TPU pod, Slurm or Open MPI "
                f"({_first_line(error)}): expected one of these, or --coordinator, --num-processes "
                "and --process-id"
            ) from error
        raise ValueError(
            f"the processes cannot be connected at {address}: {_first_line(error)}"
        ) from error
    finally:
        late.cancel()
    _joined.set()
    watch = threading.Thread(target=_watch_others, args=[program], name="mammut-peers", daemon=True)
    watch.start()
    return watch


def disconnect(watch: threading.Thread) -> None:
    """Disconnects the processes after a run without failure.

    `watch` is the result of `connect`.
    """
    if state().process_id == 0:
        state().client.key_value_set(_FAILURE, _NONE)
    watch.join(_GOODBYE)  # a thread still in JAX when Python ends would abort the process
    _joined.clear()
    jax.distributed.shutdown()


def _watch_others(program: str) -> None:
    """Ends this process when another fails or the coordinator disappears."""
    while True:
        try:
            failure = json.loads(state().client.blocking_key_value_get(_FAILURE, LONG))
            break
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                failure = {"process": 0, "sentence": "it cannot be reached", "stacks": True}
                break
    if failure is not None:
        message = f"process {failure['process']} has ended: {failure['sentence']}"
        end(program, message, stacks=failure["stacks"])


def end(program: str, message: str, *, stacks: bool = False) -> NoReturn:
    """Ends this process with code 1 and tells the others why.

    It prints `message`, one sentence. It waits for nothing else.
    """
    _ending.acquire()
    try:
        with contextlib.suppress(OSError, ValueError):  # nobody may be reading any more
            sys.stdout.flush()
        with contextlib.suppress(OSError, ValueError):
            if stacks:
                faulthandler.dump_traceback()
            print(f"{program}: {message}", file=sys.stderr, flush=True)
        if connected():
            # In a thread: the coordinator may not answer any more.
            telling = threading.Thread(target=_tell_others, args=[message, stacks], daemon=True)
            telling.start()
            telling.join(_GOODBYE)
        for call in at_end:
            call()
    finally:
        os._exit(1)


def _tell_others(message: str, stacks: bool) -> None:
    processes = state()
    failure = {"process": processes.process_id, "sentence": message, "stacks": stacks}
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # only the first failure counts
        processes.client.key_value_set(_FAILURE, json.dumps(failure))
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator may be gone
        processes.client.key_value_set(f"{_KNOWN}{processes.process_id}", "")
        if processes.process_id == 0:  # the coordinator, through which the others learn of it
            for index in range(processes.num_processes):
                processes.client.blocking_key_value_get(f"{_KNOWN}{index}", LONG)
            time.sleep(1)  # the others are about to end; without it JAX would abort them


def sentence(error: BaseException) -> str:
    """Describes an error in one sentence.

    The traceback of an unexpected error is printed.
    """
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, str) else f"it exits with {error.code}"
    expected = isinstance(error, (*EXPECTED, jax.errors.JaxRuntimeError))
    if os.environ.get("MAMMUT_TRACEBACK") or not expected:
        traceback.print_exception(error)
    if isinstance(error, jax.errors.JaxRuntimeError):
        return (
            "the processes cannot go on together, as when one of them is gone: "
            f"{_first_line(error)}"
        )
    if isinstance(error, EXPECTED):
        return str(error)
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")
