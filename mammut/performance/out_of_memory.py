"""The error text of a run that is too large for memory.

It names settings that help.
"""

import contextlib
import math
import re
from collections.abc import Iterator

import jax

from mammut.core.sharding import RULES
from mammut.training.config import TrainConfig

# The amount in the backends' messages: the TPU compiler's, then the allocators'.
_AMOUNTS = (
    r"Used [\d.]+\w* of [\d.]+\w*(?: \w+)?",
    r"[Oo]ut of memory (?:while trying to allocate|allocating|trying to allocate) [\d.,]+ ?\w+",
    r"total memory required for [\w ]+ \([\d.]+\w*\) exceeds available \w+ \([\d.]+\w*\)",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of JAX says that memory did not suffice.

    The error may come from compiling or from a step.
    """
    # A step on the CPU fails with INTERNAL and one of the amounts.
    return "RESOURCE_EXHAUSTED" in str(error) or re.search(_AMOUNTS[1], str(error)) is not None


def out_of_memory_advice(config: TrainConfig, error: BaseException) -> str:
    """Explains what did not fit, and which settings need less memory.

    The cheapest settings come first.

    Args:
      config: the run whose state or step does not fit.
      error: an error that `is_out_of_memory` accepts.
    """
    amount = ""
    for pattern in _AMOUNTS:
        if match := re.search(pattern, str(error)):
            amount = f" ({match[0][0].lower()}{match[0][1:]})"
            break
    mesh = jax.sharding.get_abstract_mesh()
    ways = math.prod(mesh.shape.get(axis, 1) for axis in RULES["batch"])
    # Rows of a micro-batch on one device.
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
    return (
        f"the run does not fit into the memory of a device{amount}: "
        f"what helps is {', '.join(knobs)}"
    )


@contextlib.contextmanager
def enough_memory(config: TrainConfig) -> Iterator[None]:
    """Raises MemoryError with `out_of_memory_advice` where a program inside does not fit.

    It may fail when it is compiled, or when it runs.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(out_of_memory_advice(config, error)) from error
