"""Runs over several processes: how they find each other, agree, and all end when one of them does.

A program calls `processes` once, in its main process; nothing else connects anything. Within it,
process 0 decides and writes, the others follow (`from_first`, `meet`). A process that fails tells
the others, which end too; one that is killed or stopped is missed by its heartbeat; one that makes
no progress is ended by its `Watchdog`.
"""

import contextlib
import dataclasses
import faulthandler
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax.sharding import Mesh

from mammut.core import sharding

# Errors that are said in one sentence; any other is a defect, and shown with its traceback.
EXPECTED = (ValueError, FloatingPointError, OSError, MemoryError)

# Where a launcher says how many processes it has started. Slurm's is that of `srun`: a batch script
# does not have it.
_LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": "Slurm",
    "OMPI_COMM_WORLD_SIZE": "Open MPI",
    "TPU_WORKER_HOSTNAMES": "the TPU pod",
}
_FAILURE, _KNOWN = "mammut/failure", "mammut/known/"
_NONE = json.dumps(None)  # the failure of a run that had none
_LONG = 7 * 24 * 3600 * 1000  # ms: what takes too long is ended by the watchdog, not here
_GOODBYE = 5.0  # seconds that the coordinator waits for the others to learn why it ends

_ending = threading.Lock()  # taken for good by the thread that ends this process
_compilations = itertools.count()  # the same on all processes, which run the same program
_joined = threading.Event()  # this process and the others can talk


@dataclasses.dataclass(frozen=True)
class Processes:
    """How a program is told of the processes it is one of.

    `cluster` takes all from the TPU pod, Slurm or Open MPI; otherwise the three others say it. With
    none of them the program is one process. A process that is not heard of for `timeout` seconds
    ends all; three times as long is waited for all to come.
    """

    cluster: bool = False
    coordinator: str | None = None  # HOST:PORT of process 0
    count: int | None = None
    index: int | None = None
    timeout: float = 100.0

    def __post_init__(self):
        given = [value is not None for value in (self.coordinator, self.count, self.index)]
        if self.cluster and any(given):
            raise ValueError(
                "--distributed is given with --coordinator, --num-processes or --process-id: give either"
            )
        if self.count is not None and self.count < 1:
            raise ValueError(f"--num-processes is {self.count}, expected at least 1")
        if any(given) and not all(given) and not (self.count == 1 and sum(given) == 1):
            raise ValueError(
                "--coordinator, --num-processes and --process-id go together: give all three or none"
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
                    f"--process-id is {self.index} of --num-processes {self.count}, expected 0 to {self.count - 1}"
                )


def launched() -> tuple[int, str]:
    """How many processes a launcher says there are, and which it is; (1, "") where none says of more."""
    for variable, name in _LAUNCHERS.items():
        value = os.environ.get(variable, "")
        count = int(value) if value.isdecimal() else len(value.split(","))
        if count > 1:
            return count, f"{name} ({variable})"
    return 1, ""


def require_one_process(program: str) -> None:
    """Raises ValueError where a launcher has started a program several times that is made for one process."""
    count, launcher = launched()
    if count > 1:
        raise ValueError(
            f"{launcher} has started {count} processes, expected one: {program} does not divide its work"
        )


@contextlib.contextmanager
def processes(asked: Processes, program: str) -> Iterator[None]:
    """Connects this process to the others that `asked` tells of, until all are done.

    An error in one of several processes ends all of them: each exits with 1 after one sentence on
    stderr, without waiting for what the others take part in. Of a single process errors are raised.

    Raises:
      ValueError: a launcher tells of several processes and `asked` does not, or nothing tells
        `cluster` of any.
      RuntimeError: this process, which is to be connected, is a worker of another, or connected
        already.
    """
    if not asked.cluster and asked.coordinator is None:
        count, launcher = launched()
        if count > 1 and asked.count != 1:
            raise ValueError(
                f"{launcher} has started {count} processes: --distributed makes one run of them, --num-processes 1 a "
                "run of each"
            )
        yield
        return
    watch = _connect(asked, program)
    try:
        _require_same_count()
        yield
        meet("end")
    except BaseException as error:
        if not isinstance(error, SystemExit) or error.code:  # --help ends all of them as it should
            _end(program, _sentence(error))
    if first():
        _state().client.key_value_set(_FAILURE, _NONE)
    watch.join(_GOODBYE)  # a thread still in JAX when Python ends would abort the process
    _joined.clear()
    jax.distributed.shutdown()


def first() -> bool:
    """Whether this process is number 0: the one that decides, writes and prints."""
    return _state().process_id == 0 if _connected() else jax.process_index() == 0


def say(text: str) -> None:
    """Prints on process 0."""
    if first():
        print(text, flush=True)


def meet(name: str) -> None:
    """Waits until every process is here; each name is for one meeting."""
    if _connected():
        _state().client.wait_at_barrier(f"mammut/meet/{name}", _LONG)


def from_first(name: str, make: Callable[[], bytes]) -> bytes:
    """What `make` returns on process 0, on all of them; each name is for one value."""
    if not _connected():
        return make()
    client, key = _state().client, f"mammut/first/{name}"
    if not first():
        return client.blocking_key_value_get_bytes(key, _LONG)
    value = make()
    client.key_value_set_bytes(key, value)
    return value


def gather(name: str, value: Any) -> list[Any]:
    """The JSON values of all processes in their order, on process 0; an empty list on the others."""
    if not _connected():
        return [value]
    state, key = _state(), f"mammut/gather/{name}/"
    state.client.key_value_set(f"{key}{state.process_id}", json.dumps(value))
    if not first():
        return []
    values = [
        json.loads(state.client.blocking_key_value_get(f"{key}{i}", _LONG))
        for i in range(state.num_processes)
    ]
    state.client.key_value_delete(key)
    return values


def compiled_by_all(function: Callable) -> Callable:
    """A jitted function of arrays that no process runs before all have compiled it.

    One machine compiles faster than another, and what waits in a computation waits briefly: 30 s on
    CPU (gloo).
    """
    if not _connected():
        return function
    compiled = {}

    def call(*args: Any) -> Any:
        kind = tuple((x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(args))
        if kind not in compiled:
            compiled[kind] = function.lower(*args).compile()
            meet(f"compiled/{next(_compilations)}")
        return compiled[kind](*args)

    return call


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process reads, of how many: `process_index`, `process_count` of `TrainBatches`.

    Processes whose devices hold the same rows (the axis `model` goes across them) read the same
    part.

    Raises:
      ValueError: the rows of a process overlap with those of another without being the same; or the
        devices are those of several processes which nothing has connected.
    """
    if jax.process_count() > 1 and not _connected():
        raise ValueError(
            f"the devices here are those of {jax.process_count()} processes: --distributed connects them"
        )
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    held: dict[int, set[int]] = {}
    for device, (rows,) in sharding.batch_sharding(mesh).devices_indices_map((ways,)).items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != ways:
        shape = " x ".join(map(str, mesh.shape.values()))
        raise ValueError(
            f"mesh.data x fsdp x model is {shape}, which cuts the batch across the devices of the {len(held)} "
            "processes: expected a mesh.model that divides or is a multiple of the devices of a process"
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


class Termination:
    """Whether a SIGTERM to any of the processes asks the run to stop.

    Several processes agree on the step in the background (JAX's preemption service: the one after
    the furthest that any has come to); asking costs a look at a number.
    """

    def __init__(self):
        self._asked, self._calls = threading.Event(), 0
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, lambda *_: self._asked.set())

    def now(self) -> bool:
        """Whether to stop after this step; all processes ask once a step, and get the same answer."""
        if jax.process_count() == 1:
            return self._asked.is_set()
        from jax.experimental import multihost_utils

        # Counted from 1, not from the step that a run is resumed at: a SIGTERM before the first
        # call means call 1.
        self._calls += 1
        return multihost_utils.reached_preemption_sync_point(self._calls)


class Watchdog:
    """Ends this process, and with it all, when it has made no progress for `seconds` (TrainConfig.step_timeout).

    Progress is what calls `doing` (the run goes on to something else: the next batch, the next
    step) or `alive` (a batch evaluated), and whatever JAX traces, lowers or compiles: one
    compilation may take as long as the limit. Time in which this process itself is stopped, by
    Ctrl-Z say, is not counted.
    """

    _TICK = 1.0

    def __init__(self, seconds: float, program: str):
        self._seconds, self._program = seconds, program
        self._doing, self._idle = "starting", 0.0
        self._closed = threading.Event()

    def __enter__(self) -> "Watchdog":
        jax.monitoring.register_event_duration_secs_listener(self._compiled)
        threading.Thread(target=self._watch, name="mammut-watchdog", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()
        jax.monitoring.unregister_event_duration_listener(self._compiled)

    def doing(self, what: str) -> None:
        """From now on this process does something else, named in the message."""
        self._doing = what
        self.alive()

    def alive(self) -> None:
        """The process goes on."""
        self._idle = 0.0

    def _compiled(self, *_, **__) -> None:
        self.alive()

    def _watch(self) -> None:
        # In ticks, not by a clock: a process that was stopped sees one long tick when it goes on.
        while not self._closed.wait(self._TICK):
            self._idle += self._TICK
            if self._idle >= self._seconds:
                sentence = f"{self._doing}: no progress for {self._seconds:g} s, the limit that step_timeout sets"
                _end(self._program, sentence, stacks=True)


def _state() -> Any:
    """JAX's own account of the processes, with the client of its coordination service."""
    from jax._src import distributed  # what jax.distributed offers ends at initialize and shutdown

    return distributed.global_state


def _connected() -> bool:
    return _joined.is_set()


def _connect(asked: Processes, program: str) -> threading.Thread:
    if multiprocessing.parent_process() is not None:
        raise RuntimeError(
            "the processes of a run are connected by its main process, not by a worker of it"
        )
    if jax.distributed.is_initialized():
        raise RuntimeError("the processes of this run are connected already")
    # JAX aborts a process that has lost the others: with the stacks of all threads
    faulthandler.enable()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    where = asked.coordinator or "the coordinator of the cluster"
    patience = 3 * asked.timeout
    # JAX would abort, with no word of what to do.
    late = threading.Timer(patience, _end, [program, (
        f"not all processes came together at {where} within {patience:g} s (three times --peer-timeout): expected one "
        "of every --process-id below --num-processes, and a coordinator that all can reach"
    )])  # fmt: skip
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            asked.coordinator,
            asked.count,
            asked.index,
            cluster_detection_method=None if asked.cluster else "deactivate",
            initialization_timeout=int(patience) + 60,
            heartbeat_timeout_seconds=int(asked.timeout),
            shutdown_timeout_seconds=int(asked.timeout),
        )
    except (ValueError, RuntimeError, OSError) as error:
        if asked.cluster:
            raise ValueError(
                f"--distributed found no processes of a TPU pod, Slurm or Open MPI ({_first_line(error)}): expected "
                "one of these, or --coordinator, --num-processes and --process-id"
            ) from error
        raise ValueError(
            f"the processes cannot be connected at {where}: {_first_line(error)}"
        ) from error
    finally:
        late.cancel()
    _joined.set()
    watch = threading.Thread(target=_watch_others, args=[program], name="mammut-peers", daemon=True)
    watch.start()
    return watch


def _require_same_count() -> None:
    count = str(_state().num_processes)
    of_first = from_first("count", count.encode).decode()
    if count != of_first:
        raise ValueError(f"process {_state().process_id} is one of {count}, process 0 one of {of_first}: "
                         "expected the same --num-processes everywhere")  # fmt: skip


def _watch_others(program: str) -> None:
    """Ends this process when another says that it has failed, or when the coordinator is gone."""
    while True:
        try:
            failure = json.loads(_state().client.blocking_key_value_get(_FAILURE, _LONG))
            break
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                failure = {"process": 0, "sentence": "it cannot be reached", "stacks": True}
                break
    if failure is not None:
        _end(
            program,
            f"process {failure['process']} has ended: {failure['sentence']}",
            stacks=failure["stacks"],
        )


def _end(program: str, sentence: str, *, stacks: bool = False) -> NoReturn:
    """Ends this process with 1 and one sentence, and lets the others know why; nothing else is waited for."""
    _ending.acquire()
    try:
        with contextlib.suppress(OSError, ValueError):  # nobody may be reading any more
            sys.stdout.flush()
        with contextlib.suppress(OSError, ValueError):
            if stacks:
                faulthandler.dump_traceback()
            print(f"{program}: {sentence}", file=sys.stderr, flush=True)
        if _connected():
            # In a thread, as the coordinator may not answer any more.
            telling = threading.Thread(target=_tell_others, args=[sentence, stacks], daemon=True)
            telling.start()
            telling.join(_GOODBYE)
    finally:
        os._exit(1)


def _tell_others(sentence: str, stacks: bool) -> None:
    state = _state()
    failure = {"process": state.process_id, "sentence": sentence, "stacks": stacks}
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # only the first failure counts
        state.client.key_value_set(_FAILURE, json.dumps(failure))
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator may be gone
        state.client.key_value_set(f"{_KNOWN}{state.process_id}", "")
        if state.process_id == 0:  # it is the coordinator, without whom nobody learns of anything
            for index in range(state.num_processes):
                state.client.blocking_key_value_get(f"{_KNOWN}{index}", _LONG)
            time.sleep(1)  # they are about to end, and would be aborted if it was gone before them


def _sentence(error: BaseException) -> str:
    """An error in one sentence; of one that is not to be expected, the traceback is printed."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, str) else f"it exits with {error.code}"
    if os.environ.get("MAMMUT_TRACEBACK") or not isinstance(
        error, (*EXPECTED, jax.errors.JaxRuntimeError)
    ):
        traceback.print_exception(error)
    if isinstance(error, jax.errors.JaxRuntimeError):
        return f"the processes cannot go on together, as when one of them is gone: {_first_line(error)}"
    return (
        str(error)
        if isinstance(error, EXPECTED)
        else f"{type(error).__name__}: {_first_line(error)}"
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")
