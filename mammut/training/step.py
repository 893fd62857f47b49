"""Train state, optimizer and the jitted step.

What is frozen (`TrainConfig.trainable`) is a tree of its own beside the trained parameters: no gradient is taken of it,
the optimizer does not know it, and a step hands its arrays on as they are.
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

from mammut.config import MAX_LOGIT_SCALE, OptimizerConfig, TrainConfig
from mammut.core import sharding
from mammut.core.params import STATISTICS, Params, by_name, first_fitting, merged, path_name, split, trained_names
from mammut.models.mammut import MaMMUT, forward_flops, logical_axes
from mammut.training.tasks import Batch, ImageTextTask, Metrics, TextTask


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

    A parameter of `config.learning_rates` has its update, weight decay included, times its peak / `learning_rate`: the
    schedule has the same shape for all.

    Raises:
      ValueError: from `init`, a pattern of `learning_rates` fits no parameter.
    """
    schedule = learning_rate_schedule(config, steps)
    if config.name == "adamw":
        scale = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    else:
        # Attention kernels end in [heads, 64]: the usual threshold of 128 would leave them unfactored.
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

    def update(updates: Params, state: optax.EmptyState, params: Params = None) -> tuple[Params, optax.EmptyState]:
        of = patterns(updates)

        def scale(path, update):
            name = path_name(path)
            return update * (peaks[of[name]] / config.learning_rate) if name in of else update

        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(init, update)


def accumulated_gradients(
    task: ImageTextTask,
    merge: Callable[[Params], MaMMUT],
    params: Params,
    batch: Batch,
    crop_key: jax.Array,
    accumulation: int,
) -> tuple[Params, Metrics]:
    """Gradients of both losses over the whole batch, in micro-batches: exact, every negative included.

    The contrastive loss depends on the parameters only through the embeddings and the logit scale. So: embed all
    micro-batches without gradients; take the loss, and its gradient in every embedding, once; then run each micro-batch
    again, and pull its share of that gradient back together with its captioning loss (GradCache, arXiv 2101.06983).
    """

    micros, keys = _micro_batches(batch, crop_key, accumulation)
    embeds = jax.lax.map(lambda xs: task.embed(merge(params), _pinned(xs[0]), xs[1]), (micros, keys))
    # In the order of the batch again: its rows never leave their devices.
    flat = [sharding.constrain(x.swapaxes(0, 1).reshape(-1, x.shape[-1]), "batch", None) for x in embeds]

    def contrastive_loss(params, image_embed, text_embed):
        return task.contrastive(merge(params), image_embed, text_embed)

    contrastive, (grads, *embed_grads) = jax.value_and_grad(contrastive_loss, argnums=(0, 1, 2))(params, *flat)
    embed_grads = [_split(g, accumulation) for g in embed_grads]
    num_tokens = task.caption_tokens(merge(params), batch)
    weight = task.config.contrastive_weight
    grads = jax.tree.map(lambda g: weight * g, grads)

    def step(carry, xs):
        grads, caption = carry
        micro, key, embed_grads = xs
        image_grad, text_grad = (sharding.constrain(grad, "batch", None) for grad in embed_grads)

        def surrogate(params):
            (image_embed, text_embed), caption_sum = task.embed_and_caption(merge(params), _pinned(micro), key)
            pulled = (image_embed * image_grad).sum() + (text_embed * text_grad).sum()
            caption = caption_sum / num_tokens
            return weight * pulled + task.config.caption_weight * caption, caption

        micro_grads, micro_caption = jax.grad(surrogate, has_aux=True)(params)
        return (jax.tree.map(jnp.add, grads, micro_grads), caption + micro_caption), None

    (grads, caption), _ = jax.lax.scan(step, (grads, jnp.float32(0)), (micros, keys, embed_grads))
    return grads, task.total(contrastive, caption)[1]


def accumulated_text_gradients(
    task: TextTask,
    merge: Callable[[Params], MaMMUT],
    params: Params,
    batch: Batch,
    crop_key: jax.Array,
    accumulation: int,
) -> tuple[Params, Metrics]:
    """Gradients of a loss over single examples, in micro-batches: those of the mean over all target tokens."""
    num_tokens = task.target_tokens(merge(params), batch)

    def step(carry, xs):
        micro, key = xs
        loss = lambda params: task.loss_sum(merge(params), _pinned(micro), key) / num_tokens  # noqa: E731
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(loss)(params)), None

    start = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    (loss, grads), _ = jax.lax.scan(step, start, _micro_batches(batch, crop_key, accumulation))
    return grads, {"loss": loss, "loss_caption": loss}


def _micro_batches(batch: Batch, crop_key: jax.Array, accumulation: int) -> tuple[Batch, jax.Array]:
    """The batch with a leading axis of micro-batches, and a key for each."""
    return {name: _split(x, accumulation) for name, x in batch.items()}, jax.random.split(crop_key, accumulation)


def _split(x: jax.Array, accumulation: int) -> jax.Array:
    """[B, ...] -> [accumulation, B / accumulation, ...]; every device gives rows to each, so nothing moves."""
    return x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1)


def _pinned(micro: Batch) -> Batch:
    return {name: sharding.constrain(x, "batch", *(None,) * (x.ndim - 1)) for name, x in micro.items()}


@dataclasses.dataclass
class Trainer:
    """The compiled pieces of one run: where its state lives, how it starts, and its step.

    `init(seed)` makes the state in place on the mesh, `init_from(params)` starts from given weights and takes
    them over. `start_params(seed, random, read)` makes such weights one by one, without a second copy of the model:
    that of a path such as "text.norm.scale" is `read(path, value)`, `value` being the random one of `init`, or None
    where `random` does not have the path.
    `step(state, batch)` donates the state it is given and returns the next, with the metrics of the batch; what is
    frozen stays where it is in memory. `model(params)` is the model with the weights `TrainState.all_params`.
    All are called inside `jax.set_mesh(mesh)`.
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
      ValueError: the batch does not divide over the mesh, or a pattern of `trainable` or `optimizer.learning_rates`
        fits no parameter.
    """
    sharding.require_divisible(config.data.batch_size // config.accumulation, mesh, "data.batch_size / accumulation")
    abstract_model = nnx.eval_shape(lambda: MaMMUT(config.model, rngs=nnx.Rngs(0)))
    graphdef = nnx.graphdef(abstract_model)
    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = learning_rate_schedule(config.optimizer, config.steps)

    def merge(params: Params) -> MaMMUT:
        return nnx.merge(graphdef, params)

    def random_params(seed: jax.Array) -> Params:
        model = MaMMUT(config.model, rngs=nnx.Rngs(params=jax.random.key(seed)))
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
        some = lambda seed: {path: x for path, x in by_name(random_params(seed)).items() if path in places}  # noqa: E731
        values = jax.jit(some, out_shardings=places)(seed) if places else {}

        def put(path, place):
            name = path_name(path)
            value = read(name, values.get(name))
            if isinstance(value, jax.Array):
                return value
            return jax.make_array_from_callback(value.shape, place, lambda index: np.array(value[index]))

        return jax.tree_util.tree_map_with_path(put, param_shardings)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # The key depends on the seed and the step alone, so that a resumed run draws what the first would have drawn.
        crop_key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        whole = lambda params: merge(merged(params, state.frozen))  # noqa: E731
        if config.accumulation > 1:
            accumulated = accumulated_gradients if isinstance(task, ImageTextTask) else accumulated_text_gradients
            grads, metrics = accumulated(task, whole, state.params, batch, crop_key, config.accumulation)
        else:
            grads, metrics = jax.grad(lambda params: task.loss(whole(params), batch, crop_key), has_aux=True)(
                state.params
            )
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # Capped here and not in the loss, where the gradient would vanish at the cap and hold the scale there for good.
        if "logit_scale" in params:
            params["logit_scale"] = jnp.minimum(params["logit_scale"], math.log(MAX_LOGIT_SCALE))
        # A NaN would spread from one batch to every parameter and moment: such an update leaves all as they were.
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        learning_rate = schedule(state.step - state.nonfinite)  # the optimizer counts the updates it applied
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
    run = lambda name: task.sees_images or name.startswith("text.") and not name.startswith("text.cross_layers.")  # noqa: E731
    trained = trained_names(list(filter(run, by_name(abstract_params))), config.trainable)
    abstract_state = jax.eval_shape(init, 0)
    param_shardings = sharding.param_shardings(abstract_params, logical_axes(abstract_model), mesh)
    shardings = sharding.state_shardings(abstract_state, abstract_params, param_shardings, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    return Trainer(
        mesh=mesh,
        abstract_state=jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract_state, shardings
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


def task_flops(config: TrainConfig) -> dict[str, int]:
    """`forward_flops` of one example of a run, of the parts that its task runs."""
    parts = forward_flops(
        config.model, training=True, length=config.text_length, sees_image=config.task != "text"
    )
    left_out = {"image_text": (), "text": ("vision", "contrastive_pass")}.get(config.task, ("contrastive_pass",))
    return {part: count for part, count in parts.items() if part not in left_out}


def start_report(config: TrainConfig, trainer: Trainer, source: Any, vocab_size: int) -> str:
    """What a run is about to do: its data, its parameters and their placement, the FLOPs of a step."""
    state = trainer.abstract_state
    flops = {part: 3 * count * config.data.batch_size for part, count in task_flops(config).items()}
    total = sum(flops.values())
    mesh = " x ".join(f"{name} {size}" for name, size in trainer.mesh.shape.items())
    return "\n".join([
        f"data: {source.spec}, {len(source):,} examples, {config.data.batch_size} a step; {vocab_size:,} text pieces",
        f"mesh: {mesh} on {trainer.mesh.devices.flat[0].device_kind}",
        sharding.placement_report(state.all_params, jax.tree.map(lambda x: x.sharding, state.all_params)),
        *_trained_line(state),
        f"{total / 1e9:,.1f} GFLOP a step, backward included{' as if all were trained' if state.frozen else ''}: "
        + ", ".join(f"{part} {count / total:.0%}" for part, count in flops.items()),
    ])


def untrained_towers(state: TrainState, starts: Collection[str], task: ImageTextTask | TextTask) -> list[str]:
    """The towers, "text" or "vision", that are frozen at random weights: `starts` has no start of theirs."""
    towers = {name.partition(".")[0] for name in by_name(state.frozen) if name.rpartition(".")[2] not in STATISTICS}
    seen = {"text", "vision"} if task.sees_images else {"text"}
    return [tower for tower in sorted(towers & seen) if not {"init", f"init_{tower}"} & set(starts)]


def _trained_line(state: TrainState) -> list[str]:
    if not state.frozen:
        return []
    (trained, size), (frozen, frozen_size), (_, moments) = map(_size, (state.params, state.frozen, state.opt_state))
    return [
        f"trained: {trained:,} parameters, {trained / (trained + frozen):.2%} of all ({size / 1e6:,.1f} MB, and "
        f"{moments / 1e6:,.1f} MB of optimizer state); frozen: {frozen:,} ({frozen_size / 1e6:,.1f} MB)"
    ]


def _size(tree: Any) -> tuple[int, int]:
    """How many numbers, in how many bytes."""
    leaves = jax.tree.leaves(tree)
    return sum(x.size for x in leaves), sum(x.size * x.dtype.itemsize for x in leaves)
