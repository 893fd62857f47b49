"""Eight CPU devices and shape checks at run time, for every test: set before jax or mammut is imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("mammut", "beartype.beartype")

import pathlib  # noqa: E402
from collections.abc import Iterator  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

from mammut.testing import shared_dir  # noqa: E402


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of shared data, fixtures and vocabularies."""
    path = shared_dir()
    if path is None:
        pytest.skip("the shared data is not here: set MAMMUT_SHARED to its folder")
    return path


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Compiles in half the time what then runs slower."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
