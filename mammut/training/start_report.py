"""What a run prints before its first step: data, mesh, parameters, FLOPs."""

from collections.abc import Collection
from typing import Any

import jax

from mammut.core import sharding
from mammut.core.params import STATISTICS, by_name
from mammut.models.flops import forward_flops
from mammut.training.config import TrainConfig
from mammut.training.step import Trainer, TrainState
from mammut.training.tasks import ImageTextTask, TextTask


def task_flops(config: TrainConfig) -> dict[str, int]:
    """`forward_flops` of one example of a run, of the parts that its task runs."""
    parts = forward_flops(
        config.model,
        config.augment.patch_drop,
        config.text_length,
        sees_image=config.task != "text",
    )
    left_out = {"image_text": (), "text": ("vision", "contrastive_pass")}.get(
        config.task, ("contrastive_pass",)
    )
    return {part: count for part, count in parts.items() if part not in left_out}


def start_report(config: TrainConfig, trainer: Trainer, source: Any, vocab_size: int) -> str:
    """What a run is about to do: its data, its parameters and their placement, the FLOPs of a step."""
    state = trainer.abstract_state
    flops = {part: 3 * count * config.data.batch_size for part, count in task_flops(config).items()}
    total = sum(flops.values())
    mesh = " x ".join(f"{name} {size}" for name, size in trainer.mesh.shape.items())
    return "\n".join(
        [
            f"data: {source.spec}, {len(source):,} examples, {config.data.batch_size} a step; {vocab_size:,} text pieces",
            f"mesh: {mesh} on {trainer.mesh.devices.flat[0].device_kind}",
            sharding.placement_report(
                state.all_params, jax.tree.map(lambda x: x.sharding, state.all_params)
            ),
            *_trained_line(state),
            f"{total / 1e9:,.1f} GFLOP a step, backward included{' as if all were trained' if state.frozen else ''}: "
            + ", ".join(f"{part} {count / total:.0%}" for part, count in flops.items()),
        ]
    )


def untrained_towers(
    state: TrainState, starts: Collection[str], task: ImageTextTask | TextTask
) -> list[str]:
    """The towers, "text" or "vision", that are frozen at random weights: `starts` has no start of theirs."""
    towers = {
        name.partition(".")[0]
        for name in by_name(state.frozen)
        if name.rpartition(".")[2] not in STATISTICS
    }
    seen = {"text", "vision"} if task.sees_images else {"text"}
    return [tower for tower in sorted(towers & seen) if not {"init", f"init_{tower}"} & set(starts)]


def _trained_line(state: TrainState) -> list[str]:
    if not state.frozen:
        return []
    (trained, size), (frozen, frozen_size), (_, moments) = map(
        _size, (state.params, state.frozen, state.opt_state)
    )
    return [
        f"trained: {trained:,} parameters, {trained / (trained + frozen):.2%} of all ({size / 1e6:,.1f} MB, and "
        f"{moments / 1e6:,.1f} MB of optimizer state); frozen: {frozen:,} ({frozen_size / 1e6:,.1f} MB)"
    ]


def _size(tree: Any) -> tuple[int, int]:
    """How many numbers, in how many bytes."""
    leaves = jax.tree.leaves(tree)
    return sum(x.size for x in leaves), sum(x.size * x.dtype.itemsize for x in leaves)
