"""How long reading a batch takes, stage by stage."""

import time

from mammut.data.batches import TrainBatches


def measure_reading(batches: TrainBatches, seconds: float = 5.0) -> dict[str, float]:
    """How fast training batches are made here, apart from any device; takes `seconds` and a little more.

    Returns:
      `images_per_s` of this process and its `threads`; `cores_busy`, the CPU seconds of the process
      per second; and, from 200 examples one after the other in one thread, the milliseconds of each
      for its `record_ms` (the source), `image_ms` (reading the file where the source has not,
      decoding, cropping, resizing) and `text_ms` (tokenizing).

    Raises:
      ValueError: `seconds` is not positive.
      TooManyBadExamples: as when iterating.
    """
    if not seconds > 0:
        raise ValueError(f"seconds is {seconds}, expected a positive number")
    next(batches)  # starts the threads
    images, start, cpu = 0, time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - start) < seconds:
        images += len(next(batches)["image"])
    cpu = time.process_time() - cpu
    rates = {
        "images_per_s": images / elapsed,
        "threads": batches.threads,
        "cores_busy": cpu / elapsed,
    }
    return rates | batches.time_stages()
