"""Which kernel the attention of the image tower runs on, found out by trying.

On a GPU cuDNN's fused attention never holds the P x P scores, which unfused cost up to 28 % of a
step. It takes 16-bit numbers and some sizes of heads, and which changes with its version: it is
tried on the device once for each shape, and XLA's own attention is the fall-back. Elsewhere XLA's
runs, on TPU too: the Pallas kernels for it take only lengths that are multiples of their blocks,
and would have to be laid out over the mesh by hand.
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
# Of the largest number of a result. Two kernels in bfloat16 (8 bits) are within 1 %; a wrong one is
# not even near.
_TOLERANCE = 0.03


def attention_kernel(
    dtype: Any, tokens: int, head_size: int, platform: str | None = None
) -> Kernel:
    """The fastest kernel that works for self-attention without a mask, of `tokens` tokens and heads of `head_size`.

    The program under way may be for other devices than those here, a TPU slice say: what counts is
    the mesh's platform, and nothing is tried for another. In float32 it is always XLA's.
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
    """Whether `kernel` runs here, forward and backward, and says what XLA's attention says; logs one line if not."""
    found: list[str] = []

    def probe() -> None:
        try:
            expected, actual = (
                _attention_and_gradients(name, dtype, tokens, head_size) for name in ("xla", kernel)
            )
            errors = [
                np.abs(a - e).max() / np.abs(e).max() for a, e in zip(actual, expected, strict=True)
            ]
            if not np.max(errors) <= _TOLERANCE:  # NumPy's maximum, of which a NaN is one
                found.append(f"its results are {np.max(errors):.0%} off")
        except Exception as error:  # whatever it is, the other kernel runs
            found.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    # In a thread of its own: what the caller traces, and for which mesh, is not seen there.
    thread = threading.Thread(target=probe)
    thread.start()
    thread.join()
    if found:
        _log.warning(
            "image attention of %d tokens with heads of %d in %s runs on XLA, %s does not work here: %s",
            *(tokens, head_size, dtype, kernel, found[0]),
        )
    return not found


def _attention_and_gradients(
    kernel: Kernel, dtype: Any, tokens: int, head_size: int
) -> list[np.ndarray]:
    """Attention of two images over random numbers with two heads, and its gradients; float32, on the first device."""
    numbers = np.random.default_rng(0).normal(size=(4, 2, tokens, 2, head_size)).astype(np.float32)
    query, key, value, weight = (jnp.asarray(x, dtype) for x in numbers)

    def run(query, key, value, weight):
        out, pullback = jax.vjp(
            lambda *qkv: jax.nn.dot_product_attention(*qkv, implementation=kernel),
            query,
            key,
            value,
        )
        return out, *pullback(weight)

    return [np.asarray(x, np.float32) for x in jax.jit(run)(query, key, value, weight)]
