"""JAX and folders as this package needs them, whatever the environment of a program sets."""

import os
import pathlib

import jax

from mammut.core.terminal import say

# Settings of JAX that change what an expression computes, or whether it does, with the values that
# this code is written for.
_ARITHMETIC = {
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_enable_x64": False,
    "jax_transfer_guard": None,
}


def set_arithmetic() -> None:
    """Sets JAX's rules of types and ranks for the whole program; says what was set otherwise."""
    for name, value in _ARITHMETIC.items():
        given = getattr(jax.config, name)
        given = getattr(given, "value", given)  # of an enum
        if given != value:
            jax.config.update(name, value)
            say(f"{name} is {given!r}: set to {value!r}, as this program needs it", "stderr")


def require_arithmetic() -> None:
    """Checks JAX's rules in a program that is not ours, which may have set its own.

    Raises:
      ValueError: JAX refuses to promote types or ranks, which the models rely on.
    """
    for name, refusal in (
        ("jax_numpy_dtype_promotion", "strict"),
        ("jax_numpy_rank_promotion", "raise"),
    ):
        if getattr(jax.config, name) == refusal:
            raise ValueError(
                f"{name} is {refusal!r}, set in the program or by {name.upper()}: expected "
                f"{_ARITHMETIC[name]!r}, with which the models compute"
            )


def require_device() -> None:
    """Checks that JAX has a device to compute on.

    Raises:
      ValueError: the platform that JAX_PLATFORMS names is not here.
    """
    try:
        jax.devices()
    except RuntimeError as error:
        raise ValueError(
            f"JAX finds no device to compute on: {str(error).splitlines()[0]}"
        ) from error


def use_compilation_cache(path: str | None) -> None:
    """Keeps XLA's compiled programs in a folder, where that is safe; None: they are not kept."""
    if path is not None:
        folder = cache_folder(path)
        if folder is None:
            say(f"there is no home folder for {path}: compiled programs are not kept", "stderr")
        else:
            jax.config.update("jax_compilation_cache_dir", str(folder))
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        # A program for several CPU devices that is read from the cache runs its collectives in no
        # fixed order: a deadlock.
        jax.config.update("jax_enable_compilation_cache", False)


def cache_folder(path: str) -> pathlib.Path | None:
    """Expands the path of a cache; None where it begins with ~ and there is no home folder."""
    expanded = os.path.expanduser(path)  # pathlib's raises RuntimeError there
    return None if expanded.startswith("~") else pathlib.Path(expanded)
