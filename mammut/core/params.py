"""Which parameters of a model are trained: by patterns of their paths, such as `adapters.*` or `vision.*`.

The parameters are two trees, the trained and the frozen. Gradients are taken of the one and the
optimizer knows no other: masking the updates of a single tree is where frozen weights come to move
(`optax.masked` hands on the raw gradients of what it leaves out, and weight decay needs no gradient
at all).
"""

import fnmatch
from collections.abc import Collection, Iterable
from typing import Any

import jax
from flax import nnx

Params = Any  # nested dict of arrays

# What a batch norm has seen in its own training: it has no gradient worth the name, and no
# optimizer may decay it.
STATISTICS = ("mean", "variance")


def path_name(path: tuple) -> str:
    """The name of a parameter from its path in a nested dict, as JAX gives it: "text.norm.scale"."""
    return ".".join(str(entry.key) for entry in path)


def by_name(params: Params) -> dict[str, Any]:
    """The leaves of a nested dict by name."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def trained_names(names: Collection[str], patterns: Iterable[str]) -> frozenset[str]:
    """The names that a pattern (fnmatch) fits, but for the statistics of batch norms, which are never trained.

    Raises:
      ValueError: a pattern fits no parameter that can be trained, or there is no pattern.
    """
    able = [name for name in names if name.rpartition(".")[2] not in STATISTICS]
    trained: set[str] = set()
    for pattern in patterns:
        fitting = fnmatch.filter(able, pattern)
        if not fitting:
            raise ValueError(
                f"trainable has {pattern!r}, which fits no parameter to train: expected patterns of {_some(able)}"
            )
        trained.update(fitting)
    if not trained:
        raise ValueError(
            f"trainable is empty, so nothing would be trained: expected patterns of {_some(able)}"
        )
    return frozenset(trained)


def first_fitting(names: Collection[str], patterns: Iterable[str]) -> dict[str, str]:
    """The first pattern that fits each name; names that none fits are left out.

    Raises:
      ValueError: a pattern is the first of no name.
    """
    first: dict[str, str] = {}
    for pattern in patterns:
        fitting = [name for name in fnmatch.filter(names, pattern) if name not in first]
        if not fitting:
            raise ValueError(
                f"optimizer.learning_rates has {pattern!r}, which fits no trained parameter that those before it "
                f"leave: expected patterns of {_some(names)}"
            )
        first |= dict.fromkeys(fitting, pattern)
    return first


def _some(names: Iterable[str]) -> str:
    """Some of the paths, one for each of the first modules."""
    modules = dict((".".join(name.split(".")[:2]), name) for name in sorted(names, reverse=True))
    return ", ".join(list(modules.values())[::-1][:6]) + (" ..." if len(modules) > 6 else "")


def split(params: Params, trained: Collection[str]) -> tuple[Params, Params]:
    """The trained and the other leaves of a nested dict, each with their paths; {} where there are none."""
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
    """Two nested dicts that share no leaf, as one: what `split` took apart."""
    both = {key: merged(params[key], others[key]) for key in params.keys() & others.keys()}
    return {**params, **others, **both}


def logical_axes(model: nnx.Module) -> dict[tuple[str, ...], tuple[str | None, ...]]:
    """Lists the logical axes of every parameter, by path.

    `model` may be abstract (`nnx.eval_shape`).
    """
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {tuple(path): param.axes for path, param in params}
