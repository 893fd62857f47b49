"""Batches that are read and moved to the device ahead of the step."""

import collections
import logging
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import numpy as np

from mammut.data.batches import TrainBatches

_log = logging.getLogger(__name__)

_STALLED = 30.0  # seconds without a batch between two warnings


def prefetch(
    batches: TrainBatches, transfer: Callable[[dict[str, np.ndarray]], Any], size: int = 2
) -> Iterator[tuple[Any, dict[str, Any], float]]:
    """Reads and transfers up to `size` batches ahead, in a thread.

    A warning that names the source is logged when the caller has waited for 30 seconds, and again
    every 30 seconds.

    Args:
      batches: the batches to read.
      transfer: the function that the thread applies to a batch, such as moving it to the devices.
      size: how many batches are read ahead.

    Yields:
      `(transfer(batch), state, wait)`: the batch, the state after exactly this batch, not after
      those read ahead, and the seconds that the caller waited for it.

    Raises:
      Exception: any that the thread raised.
    """

    def load() -> tuple[Any, dict[str, Any]]:
        batch = next(batches)
        return transfer(batch), batches.state()

    # A pool of one, because its tasks end by themselves: no thread can be left waiting for a
    # consumer that has gone.
    pool = futures.ThreadPoolExecutor(1, thread_name_prefix="mammut-prefetch")
    try:
        ahead = collections.deque(pool.submit(load) for _ in range(size))
        while True:
            first = ahead.popleft()
            start = time.perf_counter()
            while not futures.wait([first], _STALLED).done:
                waited = time.perf_counter() - start
                _log.warning(
                    "no batch from %r for %.0f s: its disk or network may be stuck",
                    batches.spec,
                    waited,
                )
            batch, state = first.result()
            wait = time.perf_counter() - start
            ahead.append(pool.submit(load))
            yield batch, state, wait
    finally:
        pool.shutdown(cancel_futures=True)
