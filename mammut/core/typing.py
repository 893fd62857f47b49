"""`Array` for shape annotations: what takes a JAX array takes a NumPy array too."""

import jax
import numpy as np

Array = jax.Array | np.ndarray
