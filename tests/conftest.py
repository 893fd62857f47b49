"""Eight CPU devices, quick compilation and shape checks at run time, for every test.

All of it is set in the environment, before jax or mammut is imported, so that the processes that
tests start have it too.
"""

import importlib.metadata
import os

# Nearly all time of the tests is that of compiling programs that then run for milliseconds.
QUICK = ""
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Flags of XLA itself, which ends the process at one it does not know: for the version they were
    # tried with. The older of its two code generators compiles one operation in 20 ms, not 150.
    QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} {QUICK} --xla_force_host_platform_device_count=8"
)

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("mammut", "beartype.beartype")

import collections  # noqa: E402
import gc  # noqa: E402
import pathlib  # noqa: E402
from collections.abc import Iterator  # noqa: E402

import hypothesis  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

from mammut.testing import shared_dir  # noqa: E402

# Tracing makes millions of objects that live on: Python's collector goes through them again and
# again (docs/log.md has the measured times).
gc.set_threshold(100_000, 50, 100)

# The same examples each time: a change is not blamed for what another one left to be found. Others
# are tried with `--hypothesis-profile default`.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")

# The files that take longest. pytest-xdist gives out whole files, those with most tests first: a
# long file of few tests would start last, and one worker would wait for it.
LONGEST = (
    "test_compile_report.py",
    "test_eval_programs.py",
    "test_frozen.py",
    "test_fused_passes.py",
    "test_resnet.py",
    "test_sharding.py",
    "test_train_program.py",
    "test_training.py",
    "test_version_0_1.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, then those with most tests."""
    sizes = collections.Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in LONGEST, -sizes[item.path]))


def pytest_configure(config: pytest.Config) -> None:
    """Leaves the order of files to `pytest_collection_modifyitems`."""
    config.option.loadscopereorder = False


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of shared data, fixtures and vocabularies."""
    path = shared_dir()
    if path is None:
        pytest.skip("the shared data is not here: set MAMMUT_SHARED to its folder")
    return path


@pytest.fixture
def as_users_have_it() -> Iterator[None]:
    """Without the checks of types and shapes that only tests have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
