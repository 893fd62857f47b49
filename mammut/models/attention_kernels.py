"""Choice of the kernel for the image tower's attention.

On a GPU cuDNN's fused attention never holds the P x P scores. They cost up to 28 % of a step where
they are held. It takes 16-bit numbers and some head sizes; which ones depends on its version. So it
is tried once for each shape, and XLA's own attention runs where it fails. Other devices run XLA's,
TPUs too: the Pallas kernels take only lengths that are multiples of their blocks, and they would
have to be split over the mesh by hand.
"""

import functools
import logging
import threading
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Kernel = Literal["cudnn", "xla"]

_log = logging.getLogger(__name__)
# Largest difference of two kernels, as a share of the largest number of a result. Two correct
# kernels in bfloat16 (8 bits) differ by less than 1 %; a wrong kernel differs by far more.
_TOLERANCE = 0.03


def attention_kernel(
    dtype: Any, tokens: int, head_size: int, platform: str | None = None
) -> Kernel:
    """Chooses the fastest kernel that works for self-attention without a mask.

    In float32 it is always XLA's.

    Args:
      dtype: the number type of queries, keys and values.
      tokens: the number of tokens.
      head_size: the size of a head.
      platform: "cpu", "gpu" or "tpu"; None: the platform of the current mesh. A program may be
        compiled for devices that are not here, such as a TPU slice: nothing is tried for those.
    """
    platform = platform or _platform()
    if platform != "gpu" or jax.default_backend() != "gpu" or jnp.dtype(dtype) == jnp.float32:
        return "xla"
    return "cudnn" if _works("cudnn", jnp.dtype(dtype), tokens, head_size) else "xla"


def _platform() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device
    return getattr(device, "platform", device) or jax.default_backend()


@functools.cache
def _works(kernel: Kernel, dtype: Any, tokens: int, head_size: int) -> bool:
    """Tests whether `kernel` runs here and agrees with XLA's attention.

    Results and gradients are compared.

    Logs one line where it does not.
    """
    problems: list[str] = []

    def probe() -> None:
        try:
            expected = _attention_and_gradients("xla", dtype, tokens, head_size)
            actual = _attention_and_gradients(kernel, dtype, tokens, head_size)
            errors = [
                np.abs(a - e).max() / np.abs(e).max() for a, e in zip(actual, expected, strict=True)
            ]
            # NumPy's maximum is NaN where one error is; a NaN is not below the tolerance.
            largest = np.max(errors)
            if not largest <= _TOLERANCE:
                problems.append(f"its results are {largest:.0%} off")
        except Exception as error:  # an error of any kind: XLA's attention runs instead
            problems.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    # In a thread of its own, because the caller may be tracing a program, for another mesh: a new
    # thread does not share this context, so that the probe runs at once.
    thread = threading.Thread(target=probe)
    thread.start()
    thread.join()
    if problems:
        _log.warning(
            "image attention of %d tokens with heads of %d in %s runs on XLA, "
            "%s does not work here: %s",
            *(tokens, head_size, dtype, kernel, problems[0]),
        )
    return not problems


def _attention_and_gradients(
    kernel: Kernel, dtype: Any, tokens: int, head_size: int
) -> list[np.ndarray]:
    """Computes attention of random numbers, and its gradients.

    The arrays are float32 and on the first device.

    There are two images and two heads.
    """
    numbers = np.random.default_rng(0).normal(size=(4, 2, tokens, 2, head_size)).astype(np.float32)
    query, key, value, weight = (jnp.asarray(x, dtype) for x in numbers)

    def run(query, key, value, weight):
        attention = functools.partial(jax.nn.dot_product_attention, implementation=kernel)
        out, pullback = jax.vjp(attention, query, key, value)
        return out, *pullback(weight)

    return [np.asarray(x, np.float32) for x in jax.jit(run)(query, key, value, weight)]
