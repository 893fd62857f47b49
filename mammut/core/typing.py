"""Types of arrays, for shape annotations, and dicts of arrays."""

import jax
import numpy as np

Array = jax.Array | np.ndarray

# The arrays of a training step, by name.
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
