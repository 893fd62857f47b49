"""`Array` for shape annotations: a JAX array or a NumPy array."""

import jax
import numpy as np

Array = jax.Array | np.ndarray
