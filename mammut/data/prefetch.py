"""Batches that are read and moved to the device ahead of the step."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mammut.data.batches import TrainBatches

_log = logging.getLogger(__name__)

_STALLED = 30.0  # seconds without a batch between two warnings
_SLICE = 0.2  # seconds of waiting between two questions whether to stop
_PATIENCE = 5.0  # seconds that a read under way is waited for at the end


def prefetch(
    batches: TrainBatches,
    transfer: Callable[[dict[str, np.ndarray]], Any],
    size: int = 2,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Any, dict[str, Any], float]]:
    """Reads and transfers up to `size` batches ahead, in a thread.

    A warning that names the source is logged when the caller has waited for 30 seconds, and again
    every 30 seconds.

    Args:
      batches: the batches to read.
      transfer: the function that the thread applies to a batch, such as moving it to the devices.
      size: how many batches are read ahead.
      stop: asked while the caller waits. True ends the iteration: there is no other batch.

    Yields:
      `(transfer(batch), state, wait)`: the batch, the state after exactly this batch, not after
      those read ahead, and the seconds that the caller waited for it.

    Raises:
      Exception: any that the thread raised.
    """
    asked: queue.SimpleQueue[None] = queue.SimpleQueue()  # an item for each batch to read
    ready: queue.SimpleQueue[tuple | BaseException] = queue.SimpleQueue()
    ended = threading.Event()

    def read() -> None:
        try:
            while True:
                asked.get()
                if ended.is_set():
                    return
                batch = next(batches)
                ready.put((transfer(batch), batches.state()))
        except BaseException as error:
            ready.put(error)

    # A daemon: a read that hangs does not keep the program from its end.
    reader = threading.Thread(target=read, name="mammut-prefetch", daemon=True)
    reader.start()
    try:
        for _ in range(size):
            asked.put(None)
        while True:
            start = time.perf_counter()
            first = _waited_for(ready, batches.spec, stop)
            if first is None:
                return
            if isinstance(first, BaseException):
                raise first
            asked.put(None)
            yield *first, time.perf_counter() - start
    finally:
        ended.set()
        asked.put(None)
        reader.join(_PATIENCE)


def _waited_for(ready: queue.SimpleQueue, spec: str, stop: Callable[[], bool]) -> Any:
    """Waits for the next batch or error; None where `stop` ends the wait."""
    start = warned = time.perf_counter()
    while True:
        try:
            return ready.get(timeout=min(_SLICE, _STALLED))
        except queue.Empty:
            if stop():
                return None
        if time.perf_counter() - warned >= _STALLED:
            warned = time.perf_counter()
            _log.warning(
                "no batch from %r for %.0f s: its disk or network may be stuck",
                spec,
                warned - start,
            )
