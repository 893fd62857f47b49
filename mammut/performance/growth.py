"""The growth of a step's cost with one size.

The size is the batch, the resolution or the text length. The growth has an exponent.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from mammut.models.compute import ComputeConfig
from mammut.models.mammut import ModelConfig
from mammut.performance.step_time import RunSettings, make_step, measure
from mammut.performance.timing import exponent

Axis = Literal["batch", "image_size", "length"]


def default_sizes(axis: Axis, model: ModelConfig, batch_size: int) -> tuple[int, ...]:
    """Chooses half, once and twice the given size.

    The size is the model's or the batch's. For images the factors are 0.5, 1 and 1.5.
    """
    if axis == "image_size":
        side = model.vision.grid[0]
        pixels = model.vision.covered_size // side  # size of one image token
        return tuple(sorted({pixels * max(1, round(side * share)) for share in (0.5, 1, 1.5)}))
    whole = batch_size if axis == "batch" else model.text_length
    return tuple(sorted({max(2, whole // 2), whole, 2 * whole}))


def grown(model: ModelConfig, axis: Axis, size: int) -> ModelConfig:
    """Makes the config of `model` for images or texts of another size."""
    if axis == "image_size":
        vision = dataclasses.replace(model.vision, image_size=size, low_image_size=None)
        return dataclasses.replace(model, vision=vision)
    if axis == "length":
        # an image prefix takes some of the positions
        places = size + model.text.max_length - model.text_length
        return dataclasses.replace(model, text=dataclasses.replace(model.text, max_length=places))
    return model


def measure_growth(
    axis: Axis,
    sizes: Sequence[int],
    model: ModelConfig,
    batch_size: int,
    settings: RunSettings,
    stored: ComputeConfig = ComputeConfig(),
    *,
    steps: int,
    warmup: int,
    peak: float,
) -> dict[str, Any]:
    """Measures the step at each size, and its growth.

    Each size has a row. The growth of time, FLOPs and memory is measured.

    Args:
      axis: what grows.
      sizes: its values.
      model: the model at its own size.
      batch_size: examples of a step, where the batch does not grow.
      settings: how the step is computed.
      stored: as for `RunSettings.compute`.
      steps: steps that are timed at each size.
      warmup: steps before them.
      peak: FLOP/s of one device.

    Returns:
      `axis`, `sizes`, `exponents` of `seconds`, `flops` and (temporary) `memory`, and `rows`.

    Raises:
      ValueError: there are not two sizes, or one does not suit the model or the devices.
    """
    if len(set(sizes)) < 2:
        raise ValueError(f"{axis} grows over {list(sizes)}, expected two sizes or more")
    rows = []
    for size in sizes:
        examples = size if axis == "batch" else batch_size
        config = settings.train_config(grown(model, axis, size), examples, stored)
        rows.append(measure(make_step(config), steps, warmup, peak))
    seconds = [row["seconds"] for row in rows]
    tflop = [row["tflops"] * row["seconds"] for row in rows]
    temporaries = [row["memory_gib"]["temporaries"] for row in rows]
    exponents = {
        "seconds": exponent(sizes, seconds),
        "flops": exponent(sizes, tflop),
        "memory": exponent(sizes, temporaries),
    }
    return {"axis": axis, "sizes": list(sizes), "exponents": exponents, "rows": rows}
