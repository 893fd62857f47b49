"""Runs over several processes: they connect, agree, and end together.

A program calls `processes` once, in its main process; nothing else connects anything. Inside it,
process 0 decides and writes, and the others follow (`broadcast_from_first`, `barrier`). A process
that fails tells the others, and they end too. The others also end when the heartbeat of a process
stops: it was killed or stopped. A process that makes no progress is ended by its `Watchdog`.
"""

import contextlib
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from mammut.core import sharding, terminal
from mammut.core.coordination import EXPECTED as EXPECTED
from mammut.core.coordination import (
    LONG,
    Processes,
    connect,
    connected,
    disconnect,
    end,
    sentence,
    state,
)

# Environment variables by which launchers give the number of processes that they have started.
# `srun` sets Slurm's variable; in a batch script it is not set.
_LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": "Slurm",
    "OMPI_COMM_WORLD_SIZE": "Open MPI",
    "TPU_WORKER_HOSTNAMES": "the TPU pod",
}
_compilations = itertools.count()  # the same on all processes, which run the same program


def launched() -> tuple[int, str]:
    """Returns how many processes a launcher has started, and its name.

    The result is (1, "") without a launcher.
    """
    for variable, name in _LAUNCHERS.items():
        value = os.environ.get(variable, "")  # a number, or a list of host names
        count = int(value) if value.isdecimal() else len(value.split(","))
        if count > 1:
            return count, f"{name} ({variable})"
    return 1, ""


def require_one_process(program: str) -> None:
    """Raises ValueError where a launcher has started several processes of `program`."""
    count, launcher = launched()
    if count > 1:
        raise ValueError(
            f"{launcher} has started {count} processes, expected one: "
            f"{program} does not divide its work"
        )


@contextlib.contextmanager
def processes(settings: Processes, program: str) -> Iterator[None]:
    """Connects this process to the others of its run.

    At the end of the context it waits until all processes are done.

    An error in one of several processes ends all of them: each exits with 1 after one sentence on
    stderr, and waits for nothing that the others take part in. With a single process the error is
    raised.

    Raises:
      ValueError: a launcher has started several processes and `settings` name one, or `cluster`
        finds none.
      RuntimeError: this process is a worker of another one, or connected already.
    """
    if not settings.cluster and settings.coordinator is None:
        count, launcher = launched()
        if count > 1 and settings.count != 1:
            raise ValueError(
                f"{launcher} has started {count} processes: --distributed makes one run of them, "
                "--num-processes 1 a run of each"
            )
        yield
        return
    watch = connect(settings, program)
    try:
        _require_same_count()
        yield
        barrier("end")
    except BaseException as error:
        # SystemExit without a code is --help, which ends every process as it should.
        if not isinstance(error, SystemExit) or error.code:
            end(program, sentence(error))
    disconnect(watch)


def first() -> bool:
    """Tells whether this process is number 0, which decides, writes and prints."""
    return state().process_id == 0 if connected() else jax.process_index() == 0


def say(text: str) -> None:
    """Prints on process 0."""
    if first():
        terminal.say(text)


def barrier(name: str) -> None:
    """Waits until every process has called it.

    Each name is for one barrier.
    """
    if connected():
        state().client.wait_at_barrier(f"mammut/barrier/{name}", LONG)


def broadcast_from_first(name: str, make: Callable[[], bytes]) -> bytes:
    """Calls `make` on process 0 and returns its value everywhere.

    Each name is for one value.
    """
    if not connected():
        return make()
    client = state().client
    key = f"mammut/first/{name}"
    if not first():
        return client.blocking_key_value_get_bytes(key, LONG)
    value = make()
    client.key_value_set_bytes(key, value)
    return value


def gather(name: str, value: Any) -> list[Any]:
    """Gathers the JSON values of all processes on process 0.

    Process 0 gets them in the order of the processes; the others get [].
    """
    if not connected():
        return [value]
    client = state().client
    key = f"mammut/gather/{name}/"
    client.key_value_set(f"{key}{state().process_id}", json.dumps(value))
    if not first():
        return []
    values = [
        json.loads(client.blocking_key_value_get(f"{key}{index}", LONG))
        for index in range(state().num_processes)
    ]
    client.key_value_delete(key)
    return values


def same_everywhere(name: str, value: str, seconds: float = 60.0) -> bool:
    """Tells whether every process gives the same value within some seconds.

    Each name is for one value.
    """
    if not connected():
        return True
    client = state().client
    key = f"mammut/same/{name}/"
    client.key_value_set(f"{key}{state().process_id}", value)
    try:
        for index in range(state().num_processes):
            if client.blocking_key_value_get(f"{key}{index}", int(1000 * seconds)) != value:
                return False
    except jax.errors.JaxRuntimeError:  # one of them has no value to give
        return False
    return True


def compiled_by_all(function: Callable) -> Callable:
    """Wraps a jitted function so that all processes compile it first.

    No process runs the function before all of them have compiled it. Its arguments are arrays.

    One machine compiles faster than another, and a process that waits inside of a computation gives
    up soon: after 30 s on CPUs (gloo).
    """
    if not connected():
        return function
    compiled = {}

    def call(*args: Any) -> Any:
        kind = tuple((x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(args))
        if kind not in compiled:
            compiled[kind] = function.lower(*args).compile()
            barrier(f"compiled/{next(_compilations)}")
        return compiled[kind](*args)

    return call


def batch_shard(mesh: Mesh) -> tuple[int, int]:
    """Returns which shard of every batch this process reads.

    The result is the index of the shard and the count of the shards. They are `process_index` and
    `process_count` of `TrainBatches`. Processes whose devices hold the same rows (the mesh axis
    `model` goes across them) read the same shard.

    Raises:
      ValueError: two processes share some of their rows but not all; or the devices belong to
        several processes that nothing has connected.
    """
    if jax.process_count() > 1 and not connected():
        raise ValueError(
            f"the devices here are those of {jax.process_count()} processes: "
            "--distributed connects them"
        )
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    held: dict[int, set[int]] = {}
    for device, (rows,) in sharding.batch_sharding(mesh).devices_indices_map((ways,)).items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    shards = sorted({tuple(sorted(rows)) for rows in held.values()})
    if len({len(shard) for shard in shards}) > 1 or sum(map(len, shards)) != ways:
        shape = " x ".join(map(str, mesh.shape.values()))
        raise ValueError(
            f"mesh.data x fsdp x model is {shape}, which cuts the batch across the devices of the "
            f"{len(held)} processes: expected a mesh.model that divides or is a multiple of the "
            "devices of a process"
        )
    return shards.index(tuple(sorted(held[jax.process_index()]))), len(shards)


class Watchdog:
    """Watchdog that ends the run when this process makes no progress.

    The limit, `seconds`, is TrainConfig.step_timeout. After it this process ends, and all others
    with it. A call of `doing` (the next batch, the next step) or of `alive` (a batch evaluated) is
    progress, and so is everything that JAX traces, lowers or compiles: one compilation may take as
    long as the limit. Time in which this process itself is stopped, for example by Ctrl-Z, does not
    count.
    """

    _TICK = 1.0

    def __init__(self, seconds: float, program: str):
        self._seconds = seconds
        self._program = program
        self._doing = "starting"
        self._idle = 0.0  # seconds without progress
        self._closed = threading.Event()

    def __enter__(self) -> "Watchdog":
        jax.monitoring.register_event_duration_secs_listener(self._compiled)
        threading.Thread(target=self._watch, name="mammut-watchdog", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()
        jax.monitoring.unregister_event_duration_listener(self._compiled)

    def doing(self, what: str) -> None:
        """Notes progress, and what the process does now, for the message."""
        self._doing = what
        self.alive()

    def alive(self) -> None:
        """Notes progress."""
        self._idle = 0.0

    def _compiled(self, *_, **__) -> None:
        self.alive()

    def _watch(self) -> None:
        # Counted in ticks, not by a clock: a process that was stopped sees one long tick.
        while not self._closed.wait(self._TICK):
            self._idle += self._TICK
            if self._idle >= self._seconds:
                message = (
                    f"{self._doing}: no progress for {self._seconds:g} s, "
                    "the limit that step_timeout sets"
                )
                end(self._program, message, stacks=True)


def _require_same_count() -> None:
    count = str(state().num_processes)
    of_first = broadcast_from_first("count", count.encode).decode()
    if count != of_first:
        raise ValueError(
            f"process {state().process_id} is one of {count}, process 0 one of {of_first}: "
            "expected the same --num-processes everywhere"
        )
