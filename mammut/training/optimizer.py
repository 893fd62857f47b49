"""The optimizer of a run: clipping, AdamW or Adafactor, schedule, weight decay, learning rates by group."""

from typing import Any

import jax
import optax

from mammut.core.params import Params, by_name, first_fitting, path_name
from mammut.training.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then cosine or linear decay to 0 at `decay_steps` or `steps`, or neither."""
    peak, decay_steps = config.learning_rate, (config.decay_steps or steps) - config.warmup_steps
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, decay_steps)
    else:
        end = 0.0 if config.schedule == "linear" else peak
        decay = optax.linear_schedule(peak, end, decay_steps)
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def decay_mask(params: Params) -> Any:
    """True for what weight decay touches: the kernels. Not biases, norms, embeddings, positions or the logit scale.

    By name, not by rank: a stacked norm has two dimensions as well.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW or Adafactor, with the schedule and decoupled weight decay of `config`.

    A parameter of `config.learning_rates` has its update, weight decay included, times its peak /
    `learning_rate`: the schedule has the same shape for all.

    Raises:
      ValueError: from `init`, a pattern of `learning_rates` fits no parameter.
    """
    schedule = learning_rate_schedule(config, steps)
    if config.name == "adamw":
        scale = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    else:
        # Attention kernels end in [heads, 64]: the usual threshold of 128 would leave them
        # unfactored.
        scale = optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=32),
            optax.clip_by_block_rms(1.0),
            optax.ema(config.b1, debias=False),
        )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        scale,
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(schedule),
        *([_scale_by_group(config)] if config.learning_rates else []),
    )


def _scale_by_group(config: OptimizerConfig) -> optax.GradientTransformation:
    peaks = dict(config.learning_rates)

    def patterns(params: Params) -> dict[str, str]:
        return first_fitting(by_name(params), [pattern for pattern, _ in config.learning_rates])

    def init(params: Params) -> optax.EmptyState:
        patterns(params)
        return optax.EmptyState()

    def update(
        updates: Params, state: optax.EmptyState, params: Params = None
    ) -> tuple[Params, optax.EmptyState]:
        of = patterns(updates)

        def scale(path, update):
            name = path_name(path)
            return update * (peaks[of[name]] / config.learning_rate) if name in of else update

        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(init, update)
