"""The train state, its start, and the compiled step.

The frozen parameters (`TrainConfig.trainable`) are a tree of their own beside the trained ones: no
gradient is taken of them, the optimizer does not know them, and a step passes their arrays on
unchanged.
"""

import dataclasses
import functools
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
from mammut.core.typing import Batch, Metrics
from mammut.models.compute import Augment
from mammut.models.mammut import MAX_LOGIT_SCALE, MaMMUT
from mammut.models.video import is_of_tubes
from mammut.training.config import TrainConfig
from mammut.training.optimizer import learning_rate_schedule, make_optimizer
from mammut.training.tasks import Task


@struct.dataclass
class TrainState:
    """Everything that a step changes, and the parameters that it does not.

    Attributes:
      step: Updates done or skipped, int32.
      params: Trained parameters.
      opt_state: State of the optimizer.
      nonfinite: Updates skipped because a loss or gradient was not finite, int32.
      nonfinite_in_a_row: The same, since the last update that was done.
      frozen: All other parameters; {} where all are trained.
    """

    step: Any
    params: Params
    opt_state: Any
    nonfinite: Any
    nonfinite_in_a_row: Any
    frozen: Params = struct.field(default_factory=dict)

    @property
    def all_params(self) -> Params:
        """Parameters of the whole model."""
        return merged(self.params, self.frozen)


@dataclasses.dataclass
class Trainer:
    """The compiled pieces of one run; all are called inside `jax.set_mesh(mesh)`.

    Attributes:
      mesh: Devices of the run.
      task: The task of the run.
      abstract_state: Shapes, types and shardings of the state.
      init: `init(seed)` makes a state of random weights in place on the mesh.
      init_from: `init_from(params)` makes a state of given weights of the whole model, and takes
        them over.
      start_params: `start_params(seed, random, read)` makes such weights one by one, without a
        second copy of the model. The weight of a path such as "text.norm.scale" is `read(path,
        value)`; `value` is the random weight of `init(seed)` if `random` has the path, else None.
      step: `step(state, batch)` returns the next state and the metrics of the batch. It donates the
        state that it is given; the frozen parameters stay where they are in memory.
      model: `model(params)` is the model with the weights `TrainState.all_params`.

    Example:
      >>> mesh = sharding.make_mesh(config.mesh)
      >>> trainer = make_trainer(config, TASKS[config.task](config.loss), mesh)
      >>> with jax.set_mesh(mesh):
      ...     state = trainer.init(config.seed)
      ...     state, metrics = trainer.step(state, sharding.device_batch(batch, mesh))
    """

    mesh: Mesh
    task: Task
    abstract_state: TrainState
    init: Callable[[int], TrainState]
    init_from: Callable[[Params], TrainState]
    start_params: Callable[[int, Collection[str], Callable[[str, jax.Array | None], Any]], Params]
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    model: Callable[[Params], MaMMUT]


def require_precise(params: Params) -> None:
    """Checks that no parameter that is trained is stored in bfloat16.

    bfloat16 has 8 significant bits: an update of less than 1/512 of a number leaves it as it is,
    and most updates are that small.

    Raises:
      ValueError: one is.
    """
    names = [name for name, param in by_name(params).items() if param.dtype == jnp.bfloat16]
    if names:
        raise ValueError(
            f"{names[0]} is trained and stored in bfloat16 (as {len(names)} in all), in which most "
            "updates are lost to rounding: expected float32 in compute.param_dtype and "
            "compute.text_param_dtype, with compute.dtype bfloat16 for the products; only frozen "
            "parameters may be stored in bfloat16"
        )


def make_trainer(config: TrainConfig, task: Task, mesh: Mesh) -> Trainer:
    """Builds the pieces of a run, without computing anything.

    Raises:
      ValueError: the batch does not divide over the mesh, or a pattern of `trainable` or
        `optimizer.learning_rates` fits no parameter.
    """
    sharding.require_divisible(
        config.data.batch_size // config.accumulation, mesh, "data.batch_size / accumulation"
    )

    # The model and its parameters, as shapes and types only.
    abstract_model = nnx.eval_shape(
        lambda: MaMMUT(config.model, compute=config.compute, rngs=nnx.Rngs(0))
    )
    abstract_params = jax.eval_shape(functools.partial(random_params, config), 0)
    model = functools.partial(nnx.merge, nnx.graphdef(abstract_model))

    # The trained parameters and their state.
    runs = [name for name in by_name(abstract_params) if task.runs(name)]
    if config.data.frames in (None, 1):
        # Images have no tubes: weight decay alone would move them.
        runs = [name for name in runs if not is_of_tubes(name)]
    trained = trained_names(runs, config.trainable)
    optimizer = make_optimizer(config.optimizer, config.steps)

    def init(seed: jax.Array) -> TrainState:
        return _first_state(optimizer, *split(random_params(config, seed), trained))

    abstract_state = jax.eval_shape(init, 0)

    # The shardings of all arrays on the mesh.
    param_shardings = sharding.param_shardings(abstract_params, logical_axes(abstract_model), mesh)
    shardings = sharding.state_shardings(abstract_state, abstract_params, param_shardings, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())

    def init_from(params: Params) -> TrainState:
        given, frozen = split(jax.device_put(params, param_shardings), trained)
        return _state_from(optimizer, given, frozen, shardings)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return _train_step(config, task, model, optimizer, state, batch)

    return Trainer(
        mesh=mesh,
        task=task,
        abstract_state=jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            abstract_state,
            shardings,
        ),
        init=jax.jit(init, out_shardings=shardings),
        init_from=init_from,
        start_params=functools.partial(_start_params, config, param_shardings),
        step=jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(shardings, sharding.batch_sharding(mesh)),
            out_shardings=(shardings, replicated),
        ),
        model=model,
    )


def random_params(config: TrainConfig, seed: int | jax.Array) -> Params:
    """Draws the random parameters of a run's model.

    Logit scale and bias start at the values of the loss.
    """
    model = MaMMUT(config.model, compute=config.compute, rngs=nnx.Rngs(jax.random.key(seed)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    params["logit_scale"] = jnp.log(jnp.float32(config.loss.first_logit_scale))
    params["logit_bias"] = jnp.float32(config.loss.first_logit_bias)
    return params


def _first_state(
    optimizer: optax.GradientTransformation, params: Params, frozen: Params
) -> TrainState:
    """Makes the state at step 0."""
    zero = jnp.int32(0)
    return TrainState(
        step=zero,
        params=params,
        opt_state=optimizer.init(params),
        nonfinite=zero,
        nonfinite_in_a_row=zero,
        frozen=frozen,
    )


def _state_from(
    optimizer: optax.GradientTransformation, params: Params, frozen: Params, shardings: TrainState
) -> TrainState:
    """Makes the state at step 0 from given parameters.

    The parameters are already on their devices.
    """

    # The parameters do not pass through the program, which would copy them.
    def rest(params: Params) -> TrainState:
        return _first_state(optimizer, params, {}).replace(params=None)

    made = jax.jit(rest, out_shardings=shardings.replace(params=None, frozen={}))(params)
    return made.replace(params=params, frozen=frozen)


def _start_params(
    config: TrainConfig,
    param_shardings: Any,
    seed: int,
    random: Collection[str],
    read: Callable[[str, jax.Array | None], Any],
) -> Params:
    """Reads the weights that a run starts from, one by one.

    See `Trainer.start_params`.
    """
    drawn_shardings = {
        name: sharding for name, sharding in by_name(param_shardings).items() if name in random
    }

    # Only the drawn parameters leave the program: XLA computes no others.
    def draw(seed: jax.Array) -> dict[str, jax.Array]:
        params = by_name(random_params(config, seed))
        return {name: params[name] for name in drawn_shardings}

    drawn = {}
    if drawn_shardings:
        drawn = jax.jit(draw, out_shardings=drawn_shardings)(seed)

    def put(path, sharding):
        name = path_name(path)
        value = read(name, drawn.get(name))
        if isinstance(value, jax.Array):
            return value
        return jax.make_array_from_callback(
            value.shape, sharding, lambda index: np.array(value[index])
        )

    return jax.tree_util.tree_map_with_path(put, param_shardings)


def _train_step(
    config: TrainConfig,
    task: Task,
    model: Callable[[Params], MaMMUT],
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, Metrics]:
    """Updates the state once: gradients, then optimizer.

    Nothing changes where a number is not finite.
    """
    # The key depends on the seed and the step alone, so that a resumed run draws what the first
    # would have drawn.
    step_key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    augment = Augment(step_key, config.augment)

    def whole_model(params: Params) -> MaMMUT:
        return model(merged(params, state.frozen))

    grads, metrics = task.gradients(whole_model, state.params, batch, augment, config.accumulation)
    grad_norm = optax.global_norm(grads)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)

    # The optimizer counts the updates that it applied.
    updates_done = state.step - state.nonfinite
    learning_rate = learning_rate_schedule(config.optimizer, config.steps)(updates_done)
    params, opt_state = _updated(optimizer, grads, state)
    # A NaN would spread from one batch to every parameter and moment: such an update leaves them
    # unchanged.
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, opt_state),
        (state.params, state.opt_state),
    )

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


def _updated(
    optimizer: optax.GradientTransformation, grads: Params, state: TrainState
) -> tuple[Params, Any]:
    """Updates the trained parameters and the optimizer's state."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # The scale is capped here, not in the loss, where the gradient would vanish at the cap and hold
    # it there for good.
    if "logit_scale" in params:
        params["logit_scale"] = jnp.minimum(params["logit_scale"], math.log(MAX_LOGIT_SCALE))
    return params, opt_state
