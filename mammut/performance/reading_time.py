"""How long reading a batch takes, stage by stage."""

import collections
import contextlib
import time

import numpy as np

from mammut.data.batches import TrainBatches
from mammut.data.examples import BadExample
from mammut.data.images import BadImage


def measure_reading(batches: TrainBatches, seconds: float = 5.0) -> dict[str, float]:
    """Measures how fast training batches are made, without a device.

    It takes `seconds`, and a little more for 200 random examples read one after the other.

    Returns:
      `images_per_s` of this process and its `threads`; `cores_busy`, the CPU seconds of the process
      per second; and the milliseconds of one example in one thread: `record_ms` (the source),
      `image_ms` (reading the file where the source has not, decoding, cropping, resizing) and
      `text_ms` (tokenizing).

    Raises:
      ValueError: `seconds` is not positive.
      TooManyBadExamples: as when iterating.
    """
    if not seconds > 0:
        raise ValueError(f"seconds is {seconds}, expected a positive number")
    next(batches)  # starts the threads

    images = 0
    start = time.perf_counter()
    cpu = time.process_time()
    while (elapsed := time.perf_counter() - start) < seconds:
        images += len(next(batches)["image"])
    cpu = time.process_time() - cpu

    rates = {
        "images_per_s": images / elapsed,
        "threads": batches.threads,
        "cores_busy": cpu / elapsed,
    }
    return rates | _stages(batches)


def _stages(batches: TrainBatches, examples: int = 200) -> dict[str, float]:
    """Milliseconds of each stage of a random example, in this thread alone.

    An example that cannot be used counts with the stages that it came through.
    """
    rng = np.random.default_rng(0)
    stages = collections.Counter(record_ms=0.0, image_ms=0.0, text_ms=0.0)
    for index in rng.integers(len(batches.source), size=examples):
        times = [time.perf_counter()]
        with contextlib.suppress(BadExample, BadImage):
            example = batches.source[int(index)]
            times.append(time.perf_counter())
            batches.draw_image(example, rng, batches.processor.image)
            times.append(time.perf_counter())
            batches.processor.encode_pairs([batches.draw_pair(example, rng)])
            times.append(time.perf_counter())
        for name, seconds in zip(stages, np.diff(times).tolist()):
            stages[name] += 1000 * seconds / examples
    return dict(stages)
