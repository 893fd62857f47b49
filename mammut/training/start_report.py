"""The report that a run prints before its first step.

It shows data, mesh, parameters, FLOPs and weights to start from.
"""

from collections.abc import Collection
from typing import Any

import jax

from mammut.core import sharding
from mammut.core.params import STATISTICS, by_name
from mammut.data.examples import Source
from mammut.models.flops import training_flops
from mammut.models.video import is_of_tubes
from mammut.training.run import Run
from mammut.training.step import Trainer, TrainState
from mammut.training.tasks import Task
from mammut.weights.warm_start import WarmStart


def start_report(
    run: Run, trainer: Trainer, source: Source, vocab_size: int, warm: WarmStart | None, fresh: bool
) -> str:
    """Writes the report of a run.

    It shows data, mesh, parameters and their placement, FLOPs, and weights to start from.
    """
    config = run.config
    state = trainer.abstract_state
    params = state.all_params
    rows = config.data.batch_size
    flops = trainer.task.flops(config)
    forward = sum(flops.values())
    parts = ", ".join(f"{part} {count / forward:.0%}" for part, count in flops.items())
    total = training_flops(flops) * rows
    condition = " as if all were trained" if state.frozen else ""
    mesh = " x ".join(f"{name} {size}" for name, size in trainer.mesh.shape.items())

    lines = [
        f"data: {source.spec}, {len(source):,} examples, {rows} a step; {vocab_size:,} text pieces",
        f"mesh: {mesh} on {trainer.mesh.devices.flat[0].device_kind}",
        sharding.placement_report(params, jax.tree.map(lambda x: x.sharding, params)),
    ]
    if state.frozen:
        lines.append(_trained_line(state))
    lines.append(f"{total / 1e9:,.1f} GFLOP a step, backward included{condition}: {parts}")
    if warm:
        lines.append(str(warm))
    lines += other_dtype(run)
    if fresh:
        for tower in untrained_towers(state, run.starts, trainer.task):
            lines.append(
                f"warning: {tower} is frozen at random weights (trainable): init_{tower} names a "
                "model"
            )
    return "\n".join(lines)


def untrained_towers(state: TrainState, starts: Collection[str], task: Task) -> list[str]:
    """Lists the towers that are frozen at random weights.

    The towers are "text" or "vision", and the task runs them.

    `starts` are the fields of `TrainConfig` that name a model to start from, such as "init_text".
    """
    towers = {
        name.partition(".")[0]
        for name in by_name(state.frozen)
        # A run of images trains all of the tower but its tubes.
        if task.runs(name) and not is_of_tubes(name) and name.rpartition(".")[2] not in STATISTICS
    }
    random = []
    for tower in ("text", "vision"):
        if tower in towers and not {"init", f"init_{tower}"} & set(starts):
            random.append(tower)
    return random


def other_dtype(run: Run) -> list[str]:
    """Says in one line where the run computes in another type than the model of `init`."""
    ours = run.config.compute.dtype
    start = run.starts.get("init")
    if start is None or start.compute.dtype == ours:
        return []
    return [
        f"init {start.where} is computed in {start.compute.dtype}, this run in {ours}: "
        "--compute.dtype"
    ]


def _trained_line(state: TrainState) -> str:
    trained, size = _size(state.params)
    frozen, frozen_size = _size(state.frozen)
    _, moments = _size(state.opt_state)
    return (
        f"trained: {trained:,} parameters, {trained / (trained + frozen):.2%} of all "
        f"({size / 1e6:,.1f} MB, and {moments / 1e6:,.1f} MB of optimizer state); "
        f"frozen: {frozen:,} ({frozen_size / 1e6:,.1f} MB)"
    )


def _size(tree: Any) -> tuple[int, int]:
    """Counts the numbers and the bytes of a tree of arrays."""
    leaves = jax.tree.leaves(tree)
    return sum(x.size for x in leaves), sum(x.size * x.dtype.itemsize for x in leaves)
