"""Train state, optimizer and the jitted step.

What is frozen (`TrainConfig.trainable`) is a tree of its own beside the trained parameters: no
gradient is taken of it, the optimizer does not know it, and a step hands its arrays on as they are.
"""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mammut.core import sharding
from mammut.core.params import (
    Params,
    by_name,
    logical_axes,
    merged,
    path_name,
    split,
    trained_names,
)
from mammut.models.compute import Augment
from mammut.models.mammut import MAX_LOGIT_SCALE, Batch, MaMMUT, Metrics
from mammut.training.accumulation import accumulated_gradients, accumulated_text_gradients
from mammut.training.config import TrainConfig
from mammut.training.optimizer import learning_rate_schedule, make_optimizer
from mammut.training.tasks import ImageTextTask, TextTask


@struct.dataclass
class TrainState:
    """All that a step changes, and the parameters that it does not."""

    step: Any  # int32: updates done or skipped
    params: Params  # the trained ones
    opt_state: Any
    nonfinite: Any  # int32: updates skipped for a loss or gradient that was not finite
    nonfinite_in_a_row: Any  # int32
    frozen: Params = struct.field(default_factory=dict)  # the others; {} where all are trained

    @property
    def all_params(self) -> Params:
        """The parameters of the whole model."""
        return merged(self.params, self.frozen)


@dataclasses.dataclass
class Trainer:
    """The compiled pieces of one run: where its state lives, how it starts, and its step.

    `init(seed)` makes the state in place on the mesh, `init_from(params)` starts from given weights
    and takes them over. `start_params(seed, random, read)` makes such weights one by one, without a
    second copy of the model: that of a path such as "text.norm.scale" is `read(path, value)`,
    `value` being the random one of `init`, or None where `random` does not have the path.
    `step(state, batch)` donates the state it is given and returns the next, with the metrics of the
    batch; what is frozen stays where it is in memory. `model(params)` is the model with the weights
    `TrainState.all_params`. All are called inside `jax.set_mesh(mesh)`.
    """

    mesh: Mesh
    abstract_state: TrainState  # shapes, dtypes and shardings
    init: Callable[[int], TrainState]
    init_from: Callable[[Params], TrainState]
    start_params: Callable[[int, Collection[str], Callable[[str, jax.Array | None], Any]], Params]
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    model: Callable[[Params], MaMMUT]


def make_trainer(config: TrainConfig, task: ImageTextTask | TextTask, mesh: Mesh) -> Trainer:
    """Builds the pieces of a run without computing anything.

    Raises:
      ValueError: the batch does not divide over the mesh, or a pattern of `trainable` or
        `optimizer.learning_rates` fits no parameter.
    """
    sharding.require_divisible(
        config.data.batch_size // config.accumulation, mesh, "data.batch_size / accumulation"
    )
    abstract_model = nnx.eval_shape(
        lambda: MaMMUT(config.model, compute=config.compute, rngs=nnx.Rngs(0))
    )
    graphdef = nnx.graphdef(abstract_model)
    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = learning_rate_schedule(config.optimizer, config.steps)

    def merge(params: Params) -> MaMMUT:
        return nnx.merge(graphdef, params)

    def random_params(seed: jax.Array) -> Params:
        model = MaMMUT(config.model, compute=config.compute, rngs=nnx.Rngs(jax.random.key(seed)))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def start(params: Params, frozen: Params) -> TrainState:
        zero = jnp.int32(0)
        return TrainState(zero, params, optimizer.init(params), zero, zero, frozen)

    def init(seed: jax.Array) -> TrainState:
        return start(*split(random_params(seed), trained))

    def init_from(params: Params) -> TrainState:
        params, frozen = split(jax.device_put(params, param_shardings), trained)
        # The parameters do not pass through the program, which would copy them.
        rest = jax.jit(
            lambda params: start(params, {}).replace(params=None),
            out_shardings=shardings.replace(params=None, frozen={}),
        )
        return rest(params).replace(params=params, frozen=frozen)

    def start_params(
        seed: int, random: Collection[str], read: Callable[[str, jax.Array | None], Any]
    ) -> Params:
        places = {path: place for path, place in by_name(param_shardings).items() if path in random}
        # Only these leave the program: XLA computes no others.
        some = lambda seed: {
            path: x for path, x in by_name(random_params(seed)).items() if path in places
        }  # noqa: E731
        values = jax.jit(some, out_shardings=places)(seed) if places else {}

        def put(path, place):
            name = path_name(path)
            value = read(name, values.get(name))
            if isinstance(value, jax.Array):
                return value
            return jax.make_array_from_callback(
                value.shape, place, lambda index: np.array(value[index])
            )

        return jax.tree_util.tree_map_with_path(put, param_shardings)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # The key depends on the seed and the step alone, so that a resumed run draws what the first
        # would have drawn.
        step_key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        augment = Augment(step_key, config.augment)
        whole = lambda params: merge(merged(params, state.frozen))  # noqa: E731
        if config.accumulation > 1:
            accumulated = (
                accumulated_gradients
                if isinstance(task, ImageTextTask)
                else accumulated_text_gradients
            )
            grads, metrics = accumulated(
                task, whole, state.params, batch, augment, config.accumulation
            )
        else:
            grads, metrics = jax.grad(
                lambda params: task.loss(whole(params), batch, augment), has_aux=True
            )(state.params)
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # Capped here and not in the loss, where the gradient would vanish at the cap and hold the
        # scale there for good.
        if "logit_scale" in params:
            params["logit_scale"] = jnp.minimum(params["logit_scale"], math.log(MAX_LOGIT_SCALE))
        # A NaN would spread from one batch to every parameter and moment: such an update leaves all
        # as they were.
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        # the optimizer counts the updates it applied
        learning_rate = schedule(state.step - state.nonfinite)
        skipped = 1 - finite.astype(jnp.int32)
        state = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            nonfinite=state.nonfinite + skipped,
            nonfinite_in_a_row=(state.nonfinite_in_a_row + 1) * skipped,
        )
        metrics |= {
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "logit_scale": jnp.exp(state.all_params["logit_scale"]),
            "nonfinite": state.nonfinite,
            "nonfinite_in_a_row": state.nonfinite_in_a_row,
        }
        return state, metrics

    abstract_params = jax.eval_shape(random_params, 0)
    # What the task does not run has no gradient: weight decay alone would move it.
    run = lambda name: (
        task.sees_images or name.startswith("text.") and not name.startswith("text.cross_layers.")
    )  # noqa: E731
    trained = trained_names(list(filter(run, by_name(abstract_params))), config.trainable)
    abstract_state = jax.eval_shape(init, 0)
    param_shardings = sharding.param_shardings(abstract_params, logical_axes(abstract_model), mesh)
    shardings = sharding.state_shardings(abstract_state, abstract_params, param_shardings, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    return Trainer(
        mesh=mesh,
        abstract_state=jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            abstract_state,
            shardings,
        ),
        init=jax.jit(init, out_shardings=shardings),
        init_from=init_from,
        start_params=start_params,
        step=jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(shardings, sharding.batch_sharding(mesh)),
            out_shardings=(shardings, replicated),
        ),
        model=merge,
    )
