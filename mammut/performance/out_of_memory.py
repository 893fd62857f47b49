"""What to say when a run does not fit into the memory of a device: how much did not, and what helps."""

import contextlib
import math
import re
from collections.abc import Iterator

import jax

from mammut.core.sharding import RULES
from mammut.training.config import TrainConfig

# What the backends say of the amount: TPU compiler, then allocators.
_AMOUNTS = (
    r"Used [\d.]+\w* of [\d.]+\w*(?: \w+)?",
    r"[Oo]ut of memory (?:while trying to allocate|allocating|trying to allocate) [\d.,]+ ?\w+",
    r"total memory required for [\w ]+ \([\d.]+\w*\) exceeds available \w+ \([\d.]+\w*\)",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of JAX, at compile time or of a step, says that memory did not suffice."""
    # A step on CPU says INTERNAL of it.
    return "RESOURCE_EXHAUSTED" in str(error) or re.search(_AMOUNTS[1], str(error)) is not None


def out_of_memory_advice(config: TrainConfig, error: BaseException) -> str:
    """One sentence: what did not fit, and the settings of `config` that take less memory, the cheapest first.

    Args:
      config: of the run whose state or step does not fit.
      error: for which `is_out_of_memory` is True.
    """
    said = next((found[0] for amount in _AMOUNTS if (found := re.search(amount, str(error)))), None)
    amount = f" ({said[0].lower()}{said[1:]})" if said else ""
    mesh = jax.sharding.get_abstract_mesh()
    ways = math.prod(mesh.shape.get(axis, 1) for axis in RULES["batch"])
    # of a device in a micro-batch
    rows, left = divmod(config.data.batch_size, config.accumulation * ways)
    knobs = []
    if rows > 1 and not left:
        factor = next(n for n in range(2, rows + 1) if rows % n == 0)
        knobs.append(f"--accumulation {factor * config.accumulation} (now {config.accumulation})")
    if config.compute.remat != "full":
        knobs.append(f"--compute.remat full (now {config.compute.remat})")
    knobs.append(f"a larger --mesh.fsdp (now {config.mesh.fsdp}) over more devices")
    if config.loss.vocab_chunk > 1:
        knobs.append(
            f"--loss.vocab-chunk {config.loss.vocab_chunk // 2} (now {config.loss.vocab_chunk})"
        )
    knobs.append(f"a smaller --data.batch-size (now {config.data.batch_size})")
    return f"the run does not fit into the memory of a device{amount}: what helps is {', '.join(knobs)}"


@contextlib.contextmanager
def enough_memory(config: TrainConfig) -> Iterator[None]:
    """Raises MemoryError with `out_of_memory_advice` where a program does not fit, as it is compiled or as it runs."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(out_of_memory_advice(config, error)) from error
