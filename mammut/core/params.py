"""Parameters by name, and the choice of those to train.

Patterns such as `vision.*` choose them.

The parameters are two trees, the trained and the frozen ones. Only the trained tree has gradients,
and the optimizer knows only this tree. Masking the updates of a single tree can move frozen
weights: `optax.masked` passes on the raw gradients of the leaves that it leaves out, and weight
decay needs no gradient at all.
"""

import fnmatch
from collections.abc import Collection, Iterable
from typing import Any

import jax
from flax import nnx

Params = Any  # nested dict of arrays

# The statistics of a batch norm, from its own training: they have no useful gradient, and no
# optimizer may decay them.
STATISTICS = ("mean", "variance")


def path_name(path: tuple) -> str:
    """Returns the name of a parameter, such as "text.norm.scale".

    `path` is JAX's path in a nested dict.
    """
    return ".".join(str(entry.key) for entry in path)


def by_name(params: Params) -> dict[str, Any]:
    """Returns the leaves of a nested dict by name."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def trained_names(names: Collection[str], patterns: Iterable[str]) -> frozenset[str]:
    """Finds the names that a pattern (fnmatch) fits.

    Statistics of batch norms are left out.

    Raises:
      ValueError: a pattern fits no parameter that can be trained, or there is no pattern.
    """
    able = [name for name in names if name.rpartition(".")[2] not in STATISTICS]
    trained: set[str] = set()
    for pattern in patterns:
        fitting = fnmatch.filter(able, pattern)
        if not fitting:
            raise ValueError(
                f"trainable has {pattern!r}, which fits no parameter to train: "
                f"expected patterns of {_some(able)}"
            )
        trained.update(fitting)
    if not trained:
        raise ValueError(
            f"trainable is empty, so nothing would be trained: expected patterns of {_some(able)}"
        )
    return frozenset(trained)


def first_fitting(names: Collection[str], patterns: Iterable[str]) -> dict[str, str]:
    """Finds the first pattern that fits each name.

    Names that no pattern fits are left out.

    Raises:
      ValueError: a pattern is not the first for any name.
    """
    first: dict[str, str] = {}
    for pattern in patterns:
        fitting = [name for name in fnmatch.filter(names, pattern) if name not in first]
        if not fitting:
            raise ValueError(
                f"optimizer.learning_rates has {pattern!r}, which fits no trained parameter that "
                f"those before it leave: expected patterns of {_some(names)}"
            )
        first |= dict.fromkeys(fitting, pattern)
    return first


def _some(names: Iterable[str]) -> str:
    """Lists at most six names for messages, one for each module."""
    first: dict[str, str] = {}
    for name in sorted(names):
        first.setdefault(".".join(name.split(".")[:2]), name)
    some = ", ".join(list(first.values())[:6])
    return f"{some} ..." if len(first) > 6 else some


def split(params: Params, trained: Collection[str]) -> tuple[Params, Params]:
    """Splits a nested dict into its trained and other leaves.

    Each of the two is {} if it has no leaf.
    """
    return _kept(params, "", trained, True), _kept(params, "", trained, False)


def _kept(tree: Params, prefix: str, trained: Collection[str], wanted: bool) -> Params:
    kept = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            if inner := _kept(value, f"{prefix}{key}.", trained, wanted):
                kept[key] = inner
        elif (f"{prefix}{key}" in trained) == wanted:
            kept[key] = value
    return kept


def merged(params: Params, others: Params) -> Params:
    """Merges two nested dicts that share no leaf.

    The two results of `split` are such dicts.
    """
    both = {key: merged(params[key], others[key]) for key in params.keys() & others.keys()}
    return {**params, **others, **both}


def logical_axes(model: nnx.Module) -> dict[tuple[str, ...], tuple[str | None, ...]]:
    """Lists the logical axes of every parameter, by path.

    `model` may be abstract (`nnx.eval_shape`).
    """
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {tuple(path): param.axes for path, param in params}
