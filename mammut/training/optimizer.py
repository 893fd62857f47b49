"""The optimizer of a run.

It has clipping, AdamW or Adafactor, a schedule, weight decay, and learning rates by group.
"""

from typing import Any

import jax
import optax

from mammut.core.params import Params, by_name, first_fitting, path_name
from mammut.training.config import OptimizerConfig

_OTHERS = ""  # group of the parameters that no pattern fits; the empty pattern fits no path


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Makes the learning rate by step.

    It rises linearly from 0 to the peak, then follows the schedule.

    The schedule falls to 0 at `config.decay_steps` (None: at `steps`), or stays at the peak.
    """
    peak = config.learning_rate
    decay_steps = (config.decay_steps or steps) - config.warmup_steps
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, decay_steps)
    else:
        end = 0.0 if config.schedule == "linear" else peak
        decay = optax.linear_schedule(peak, end, decay_steps)
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def decay_mask(params: Params) -> Any:
    """Marks the parameters that weight decay acts on: the kernels.

    Returns a tree of bools. Names decide, not ranks: the scale of a stacked norm has two dimensions
    as well.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Makes the optimizer: clipping, then AdamW or Adafactor with decoupled weight decay.

    The update of a parameter that `config.learning_rates` gives a peak, weight decay included, is
    multiplied by that peak / `learning_rate`: the schedule has the same shape for all.

    Raises:
      ValueError: from `init`, a pattern of `learning_rates` fits no parameter.
    """
    schedule = learning_rate_schedule(config, steps)
    if config.name == "adamw":
        scale = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    else:
        # Attention kernels end in [heads, 64]: the usual threshold of 128 would not factor them.
        scale = optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=32),
            optax.clip_by_block_rms(1.0),
            optax.ema(config.b1, debias=False),
        )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    transforms = [
        clip,
        scale,
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(schedule),
    ]
    if config.learning_rates:
        transforms.append(_scale_by_group(config))
    return optax.chain(*transforms)


def _scale_by_group(config: OptimizerConfig) -> optax.GradientTransformation:
    """Multiplies the updates of each group of parameters.

    The factor is the group's peak learning rate / `learning_rate`.
    """
    patterns = [pattern for pattern, _ in config.learning_rates]

    def groups(params: Params) -> Params:
        first = first_fitting(by_name(params), patterns)
        return jax.tree_util.tree_map_with_path(
            lambda path, _: first.get(path_name(path), _OTHERS), params
        )

    scales = {
        pattern: optax.scale(peak / config.learning_rate) for pattern, peak in config.learning_rates
    }
    partition = optax.partition({_OTHERS: optax.identity(), **scales}, groups)

    # The state of the partition has no arrays, only nested containers. An empty state stands for
    # it, as in the checkpoints of earlier versions: Orbax refuses a tree of another structure.
    def init(params: Params) -> optax.EmptyState:
        partition.init(params)  # refuses a pattern that fits nothing
        return optax.EmptyState()

    def update(
        updates: Params, state: optax.EmptyState, params: Params | None = None
    ) -> tuple[Params, optax.EmptyState]:
        scaled, _ = partition.update(updates, partition.init(updates), params)
        return scaled, state

    return optax.GradientTransformation(init, update)
