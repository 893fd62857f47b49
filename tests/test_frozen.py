"""What is frozen stays as it is, bit for bit; the checks are tried on the usual mistakes, too."""

import dataclasses
import json
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from damage import assert_identical, by_name, flip, one_sentence
from marks import long
from prefix_models import prefix_config

import mammut
from mammut.config import (
    AdapterConfig,
    ComputeConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from mammut.core import sharding
from mammut.models.compute import Augment
from mammut.testing import tiny_batch, tiny_config, tiny_model, tiny_processor
from mammut.training.optimizer import learning_rate_schedule, make_optimizer
from mammut.training.run_folder import write_run
from mammut.training.start_report import untrained_towers
from mammut.training.step import Trainer, TrainState, make_trainer
from mammut.training.tasks import TASKS
from mammut.weights.checkpoints import CheckpointError, Checkpoints

TRAINABLE = ("image_projection.*", "text.layers.mlp.*")
# Half as deep as `tiny_config`, which compiles faster.
MODEL = dataclasses.replace(
    tiny_config(), text=dataclasses.replace(tiny_config().text, depth=2, cross_attn_every=1)
)
CONFIG = TrainConfig(
    task="caption",
    model=MODEL,
    trainable=TRAINABLE,
    data=DataConfig(batch_size=8),
    optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.5),
    steps=40,
)


def trainer_of(config: TrainConfig = CONFIG, mesh: MeshConfig = MeshConfig()) -> Trainer:
    devices = jax.devices()[: math.prod(max(size, 1) for size in dataclasses.astuple(mesh))]
    return make_trainer(config, TASKS[config.task](config.loss), sharding.make_mesh(mesh, devices))


def batches(count: int = 4, config: TrainConfig = CONFIG) -> list[dict[str, np.ndarray]]:
    """Batches of images as floats, the third of them full of NaN."""
    made = []
    for seed in range(count):
        batch = tiny_batch(config.model, batch_size=8, seed=seed)
        batch["target"] = batch["text_valid"]
        batch["image"] = batch["image"].astype(np.float32) * (np.nan if seed == 2 else 1)
        made.append(batch)
    return made


def begun(trainer: Trainer, config: TrainConfig = CONFIG) -> TrainState:
    """A state with random numbers in every parameter."""
    whole = jax.tree.map(np.asarray, nnx_params(config))
    with jax.set_mesh(trainer.mesh):
        return trainer.init_from(whole)


def nnx_params(config: TrainConfig) -> dict:
    from flax import nnx

    model = tiny_model(config.model, compute=config.compute)
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def after(trainer: Trainer, state: TrainState, run: list[dict]) -> TrainState:
    with jax.set_mesh(trainer.mesh):
        for batch in run:
            state, _ = trainer.step(state, sharding.device_batch(batch, trainer.mesh))
    return jax.device_get(state)


def require_frozen(before: dict, state_after: dict, trained: frozenset[str]) -> None:
    """Requires that the trained parameters, and no others, have other bits than before."""
    before = mammut.core.params.by_name(before)
    got = mammut.core.params.by_name(state_after)
    moved = {
        name
        for name in before
        if np.asarray(before[name]).tobytes() != np.asarray(got[name]).tobytes()
    }
    assert moved == trained


def require_no_optimizer_state(opt_state, params, trained: frozenset[str]) -> None:
    """Two moments of every trained parameter, and counters: not a number more."""
    sizes = {name: leaf.size for name, leaf in mammut.core.params.by_name(params).items()}
    moments = [
        leaf for leaf in jax.tree.leaves(opt_state) if leaf.ndim or leaf.dtype == jnp.float32
    ]
    assert len(moments) == 2 * len(trained)
    assert sum(leaf.size for leaf in moments) == 2 * sum(sizes[name] for name in trained)


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return trainer_of()


@pytest.fixture(scope="module")
def trained() -> frozenset[str]:
    return mammut.core.params.trained_names(
        mammut.core.params.by_name(nnx_params(CONFIG)), TRAINABLE
    )


@pytest.mark.parametrize("changes, mesh", [
    ({}, MeshConfig()),
    long({"accumulation": 4}, MeshConfig()),
    ({"task": "image_text", "accumulation": 2}, MeshConfig(data=2, fsdp=2)),
    long({"task": "image_text"}, MeshConfig(data=1, fsdp=4)),
])  # fmt: skip
def test_the_base_keeps_every_bit_through_decay_momentum_micro_batches_and_a_batch_of_nan(
    changes, mesh, trained
):
    config = dataclasses.replace(CONFIG, **changes)
    trainer = trainer_of(config, mesh)
    state = after(trainer, begun(trainer, config), batches())
    assert int(state.nonfinite) == 1
    require_frozen(nnx_params(config), state.all_params, trained)
    require_no_optimizer_state(state.opt_state, state.all_params, trained)
    assert mammut.core.params.by_name(state.params).keys() == trained


def test_a_base_in_bfloat16_keeps_every_bit_under_a_float32_rest():
    compute = ComputeConfig(text_param_dtype="bfloat16")
    trainable = ("image_projection.*", "vision.*")
    config = dataclasses.replace(CONFIG, compute=compute, trainable=trainable)
    trainer = trainer_of(config)
    before = nnx_params(config)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(before["text"])} == {"bfloat16"}
    state = after(trainer, begun(trainer, config), batches())
    names = frozenset(
        name
        for name in mammut.core.params.by_name(before)
        if name.startswith(("vision.", "image_projection."))
    )
    require_frozen(before, state.all_params, names)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.params)} == {"float32"}


def test_adapters_in_float32_are_trained_on_a_base_in_bfloat16_that_keeps_every_bit():
    """The arrangement of MAGMA: an image prefix, a frozen language model, adapters."""
    model = dataclasses.replace(prefix_config(max_length=16), adapters=(AdapterConfig(),))
    compute = ComputeConfig(text_param_dtype="bfloat16")
    config = dataclasses.replace(CONFIG, model=model, compute=compute, trainable=("adapters.*",))
    trainer = trainer_of(config)
    before = nnx_params(config)
    names = frozenset(
        name for name in mammut.core.params.by_name(before) if name.startswith("adapters.")
    )
    state = after(trainer, begun(trainer, config), batches(config=config))
    require_frozen(before, state.all_params, names)
    require_no_optimizer_state(state.opt_state, state.all_params, names)
    assert mammut.core.params.by_name(state.params).keys() == names
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.params)} == {"float32"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.frozen["text"])} == {"bfloat16"}


@pytest.mark.parametrize("trainable, starts, task, untrained", [
    (("vision.*", "image_projection.*"), (), "caption", ["text"]),
    (("vision.*", "image_projection.*"), ("init_text",), "caption", []),
    (("vision.*", "image_projection.*"), ("init_vision",), "caption", ["text"]),
    (("image_projection.*",), (), "caption", ["text", "vision"]),
    (("image_projection.*",), ("init",), "caption", []),
    (("text.layers.*",), ("init_text",), "text", []),  # it sees no images
    (("text.*",), (), "text", []),  # nor does it run the cross-attention, which stays frozen
    (("text.layers.*",), (), "text", ["text"]),
    (("*",), (), "caption", []),
])  # fmt: skip
def test_a_tower_that_would_stay_random_is_named(trainable, starts, task, untrained):
    config = dataclasses.replace(CONFIG, trainable=trainable, task=task)
    state = trainer_of(config).abstract_state
    assert untrained_towers(state, starts, TASKS[task](config.loss)) == untrained


def test_the_step_computes_no_gradient_of_the_base_and_hands_it_on_as_it_is(trainer):
    """In the traced step a frozen output is the input itself; compiled, it has no second copy."""
    abstract = trainer.abstract_state
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batches(1)[0])
    with jax.set_mesh(trainer.mesh):
        (call,) = jax.make_jaxpr(trainer.step)(abstract, batch).eqns
        memory = trainer.step.lower(abstract, batch).compile().memory_analysis()
    step = call.params["jaxpr"].jaxpr
    frozen, state = len(jax.tree.leaves(abstract.frozen)), len(jax.tree.leaves(abstract))
    assert frozen > 20
    inputs, outputs = step.invars[state - frozen : state], step.outvars[state - frozen : state]
    assert all(given is returned for given, returned in zip(inputs, outputs, strict=True))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    assert memory.alias_size_in_bytes == size
    assert memory.output_size_in_bytes - size < 1_000  # the metrics


def test_frozen_arrays_stay_where_they_are_in_memory(trainer):
    state, at = begun(trainer), []
    with jax.set_mesh(trainer.mesh):
        for batch in batches(3):
            state, _ = trainer.step(state, sharding.device_batch(batch, trainer.mesh))
            at.append([leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.frozen)])
    assert at[0] == at[1] == at[2]  # before the first step they are NumPy's, on a CPU


# The usual mistakes, each a way to "freeze" with one tree of parameters: (optimizer, which
# gradients it is given).
def masked_alone(mask):
    return optax.masked(optax.adamw(1e-2, weight_decay=0.0), mask), lambda grads: grads


def gradients_set_to_zero(mask):
    def zeroed(grads):
        return jax.tree.map(lambda m, g: g if m else jnp.zeros_like(g), mask, grads)

    return optax.adamw(1e-2, weight_decay=0.5), zeroed


def nothing_stopped(mask):
    return optax.adamw(1e-2, weight_decay=0.0), lambda grads: grads


def updates_set_to_zero_at_the_end(mask):
    last = optax.multi_transform({True: optax.identity(), False: optax.set_to_zero()}, mask)
    return optax.chain(optax.adamw(1e-2, weight_decay=0.5), last), lambda grads: grads


@pytest.fixture(scope="module")
def a_few_steps(trainer, trained):
    """Of a mistake: parameters before and after two steps with it, and the optimizer's state."""
    before, task = nnx_params(CONFIG), TASKS["caption"](CONFIG.loss)
    mask = jax.tree_util.tree_map_with_path(
        lambda path, _: mammut.core.params.path_name(path) in trained, before
    )

    def loss(params, batch):
        return task.loss(trainer.model(params), batch, Augment())[0]

    gradient = jax.jit(jax.grad(loss))

    def steps(mistake):
        optimizer, given = mistake(mask)
        params, opt_state = before, optimizer.init(before)
        for batch in batches(2):
            updates, opt_state = optimizer.update(given(gradient(params, batch)), opt_state, params)
            params = optax.apply_updates(params, updates)
        return before, params, opt_state

    return steps


@pytest.mark.parametrize("mistake", [masked_alone, gradients_set_to_zero, nothing_stopped])
def test_the_check_of_bits_catches_weights_that_were_meant_to_be_frozen(
    mistake, trained, a_few_steps
):
    before, params, _ = a_few_steps(mistake)
    with pytest.raises(AssertionError):
        require_frozen(before, params, trained)


def test_the_check_of_optimizer_state_catches_moments_of_what_does_not_move(trained, a_few_steps):
    before, params, opt_state = a_few_steps(updates_set_to_zero_at_the_end)
    require_frozen(before, params, trained)
    with pytest.raises(AssertionError):
        require_no_optimizer_state(opt_state, params, trained)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, trainer) -> tuple[pathlib.Path, TrainState]:
    """A run that has saved steps 2 and 4, and its state at 4."""
    workdir = tmp_path_factory.mktemp("run")
    write_run(workdir, CONFIG, [])
    tiny_processor().save(workdir)
    with Checkpoints(workdir, keep=2) as checkpoints, jax.set_mesh(trainer.mesh):
        state = begun(trainer)
        for step, batch in enumerate(batches(), start=1):
            state, _ = trainer.step(state, sharding.device_batch(batch, trainer.mesh))
            if step % 2 == 0:
                checkpoints.save(step, state, {"position": step})
    return workdir, jax.device_get(state)


def restored(workdir: pathlib.Path, trainer: Trainer) -> TrainState:
    with Checkpoints(workdir, keep=2) as checkpoints:
        return checkpoints.restore(trainer.abstract_state).state


def test_a_resumed_run_goes_on_bit_for_bit(saved, trainer):
    workdir, state = saved
    back = restored(workdir, trainer)
    assert_identical(back, state)
    straight = after(trainer, begun(trainer), [*batches(), *batches(2)])
    assert_identical(after(trainer, back, batches(2)), straight)


@pytest.mark.parametrize("mesh", [MeshConfig(data=1, fsdp=4), MeshConfig(data=2, fsdp=2, model=2)])
def test_the_base_is_restored_onto_a_mesh_as_the_mesh_says(saved, mesh):
    workdir, state = saved
    spread = trainer_of(mesh=mesh)
    back = restored(workdir, spread)
    assert_identical(back, state)
    for leaf, like in zip(
        jax.tree.leaves(back), jax.tree.leaves(spread.abstract_state), strict=True
    ):
        assert leaf.sharding == like.sharding


def test_the_base_is_written_once_and_not_into_the_checkpoints(saved):
    workdir, state = saved
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.frozen))
    (file,) = (path for path in workdir.rglob("*.safetensors"))
    assert file.parent.name == "frozen" and size < file.stat().st_size < size + 10_000
    for step in ("2", "4"):
        names = json.loads((workdir / "checkpoints" / step / "state" / "_METADATA").read_text())[
            "tree_metadata"
        ]
        assert names and not any("frozen" in name or "token_embed" in name for name in names)


def test_the_whole_model_of_such_a_run_loads_from_its_folder_alone(saved):
    workdir, state = saved
    model, _ = mammut.load(workdir)
    from flax import nnx

    assert_identical(nnx.to_pure_dict(nnx.state(model, nnx.Param)), state.all_params)


@pytest.mark.parametrize("damage, message", [
    (lambda file: flip(file), "frozen.safetensors does not have the SHA-256 of its manifest"),
    (lambda file: file.unlink(), "frozen.safetensors is missing"),
    (lambda file: shutil.rmtree(file.parent), "manifest.json"),
])  # fmt: skip
def test_a_damaged_base_is_an_error_that_names_it(saved, trainer, tmp_path, damage, message):
    workdir = shutil.copytree(saved[0], tmp_path / "run")
    damage(workdir / "frozen" / "frozen.safetensors")
    with pytest.raises(CheckpointError) as error:
        restored(workdir, trainer)
    assert message in one_sentence(error)


def test_a_base_of_another_model_is_refused(saved, tmp_path):
    text = dataclasses.replace(CONFIG.model.text, vocab_size=61)
    other = trainer_of(
        dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, text=text))
    )
    with pytest.raises(CheckpointError) as error:
        restored(saved[0], other)
    assert (
        "text.token_embed.embedding is float32[60, 48], expected float32[61, 48]"
        in one_sentence(error)
    )


RATES = (("image_projection.bias", 3e-3), ("image_projection.*", 1e-4), ("text.*.up.*", 5e-2))


def test_every_group_is_adamw_with_its_own_peak():
    """Compared with AdamW written out, with warm-up, decay and clipping.

    (arXiv 1711.05101, algorithm 2.)
    """
    config = OptimizerConfig(
        learning_rate=1e-2,
        learning_rates=RATES,
        warmup_steps=2,
        schedule="linear",
        weight_decay=0.1,
        b1=0.9,
        b2=0.95,
    )
    rng = np.random.default_rng(0)
    mlp = {"up": {"kernel": (4, 2)}}
    shapes = {"image_projection": {"kernel": (3, 4), "bias": (4,)}, "text": {"mlp": mlp, "a": (5,)}}

    def draw():
        return jax.tree.map(
            lambda s: 0.1 * rng.normal(size=s), shapes, is_leaf=lambda s: type(s) is tuple
        )

    peaks = {
        "image_projection.kernel": 1e-4,
        "image_projection.bias": 3e-3,
        "text.mlp.up.kernel": 5e-2,
        "text.a": 1e-2,
    }
    start, grads, steps = draw(), [draw() for _ in range(6)], 8
    optimizer = make_optimizer(config, steps)

    params = jax.tree.map(jnp.float32, start)
    opt_state = optimizer.init(params)
    for grad in grads:
        updates, opt_state = optimizer.update(
            jax.tree.map(lambda g: jnp.float32(10 * g), grad), opt_state, params
        )
        params = optax.apply_updates(params, updates)

    flat = mammut.core.params.by_name(start)
    first, second = ({name: np.zeros_like(x) for name, x in flat.items()} for _ in range(2))
    for count, grad in enumerate(map(mammut.core.params.by_name, grads)):
        norm = np.sqrt(sum((g**2).sum() for g in grad.values()))
        # of the schedule: from 0 to 1, and to 0 again
        shape = min(count / 2, (steps - count) / (steps - 2))
        for name, g in grad.items():
            g = 10 * g * min(1, 1 / (10 * norm))
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            step = (first[name] / (1 - 0.9 ** (count + 1))) / (
                np.sqrt(second[name] / (1 - 0.95 ** (count + 1))) + 1e-8
            )
            decay = 0.1 * flat[name] if name.endswith("kernel") else 0
            flat[name] = flat[name] - peaks[name] * shape * (step + decay)
    for name, got in mammut.core.params.by_name(params).items():
        moved = np.abs(flat[name] - mammut.core.params.by_name(start)[name]).max()
        np.testing.assert_allclose(got, flat[name], atol=2e-5 * moved + 1e-7, rtol=0)


def test_a_group_has_the_bits_of_the_common_update_times_its_share_of_the_rate():
    """The updates without groups, each times peak / learning_rate, to the last bit."""
    config = OptimizerConfig(learning_rate=3e-3, learning_rates=RATES, warmup_steps=1)
    alike = make_optimizer(dataclasses.replace(config, learning_rates=()), steps=8)
    grouped = make_optimizer(config, steps=8)
    rng = np.random.default_rng(0)

    def draw():
        kernel, bias = jnp.float32(rng.normal(size=(3, 4))), jnp.float32(rng.normal(size=4))
        projection = {"kernel": kernel, "bias": bias}
        return {
            "image_projection": projection,
            "text": {"mlp": {"up": {"kernel": kernel.T}}, "a": bias},
        }

    params = draw()
    peaks = dict(RATES)
    of = mammut.core.params.first_fitting(mammut.core.params.by_name(params), list(peaks))
    assert set(of.values()) == set(peaks) and len(of) < len(mammut.core.params.by_name(params))
    states = [optimizer.init(params) for optimizer in (alike, grouped)]
    for _ in range(2):
        grads = draw()
        expected, states[0] = alike.update(grads, states[0], params)
        got, states[1] = grouped.update(grads, states[1], params)
        got = mammut.core.params.by_name(got)
        for name, update in mammut.core.params.by_name(expected).items():
            if name in of:
                update = update * (peaks[of[name]] / config.learning_rate)
            assert np.asarray(got[name]).tobytes() == np.asarray(update).tobytes(), name
    assert_identical(states[1][:-1], states[0])
    assert states[1][-1] == optax.EmptyState()  # as in the checkpoints of earlier versions


def test_magmas_schedule_rises_for_100_steps_and_would_be_at_zero_at_300_000():
    """facts: peak 8e-4, 30,000 steps of it are run."""
    config = OptimizerConfig(
        learning_rate=8e-4, warmup_steps=100, schedule="linear", decay_steps=300_000
    )
    schedule = learning_rate_schedule(config, 30_000)
    assert [float(schedule(step)) for step in (0, 50, 100)] == pytest.approx([0, 4e-4, 8e-4])
    assert float(schedule(30_000)) == pytest.approx(8e-4 * 270_000 / 299_900)
    constant = learning_rate_schedule(
        OptimizerConfig(learning_rate=3e-4, schedule="constant"), 30_000
    )
    assert {float(constant(step)) for step in (0, 1, 29_999)} == {np.float32(3e-4)}


@pytest.mark.parametrize("changes, message", [
    ({"trainable": ("adapters.*",)},
     "trainable has 'adapters.*', which fits no parameter to train: expected patterns"),
    ({"trainable": ()}, "trainable is empty, so nothing would be trained"),
    ({"optimizer": OptimizerConfig(learning_rates=(("vision.*", 2e-6),))},
     "optimizer.learning_rates has 'vision.*', which fits no trained parameter"),
    ({"optimizer": OptimizerConfig(
        learning_rates=(("image*", 1e-3), ("image_projection.bias", 2e-3)))},
     "learning_rates has 'image_projection.bias', which fits no trained parameter that those "
     "before it leave"),
])  # fmt: skip
def test_a_pattern_that_fits_nothing_is_refused(changes, message):
    with pytest.raises(ValueError) as error:
        trainer_of(dataclasses.replace(CONFIG, **changes))
    assert message in one_sentence(error) and "image_projection" in str(error.value)


def test_statistics_of_batch_norms_are_never_trained():
    params = {
        "vision": {"norm": {"mean": 1, "variance": 2, "scale": 3, "bias": 4}},
        "text": {"norm": {"scale": 5}},
    }
    trained = mammut.core.params.trained_names(mammut.core.params.by_name(params), ("*",))
    own, frozen = mammut.core.params.split(params, trained)
    assert frozen == {"vision": {"norm": {"mean": 1, "variance": 2}}}
    assert own == {"vision": {"norm": {"scale": 3, "bias": 4}}, "text": {"norm": {"scale": 5}}}
    assert mammut.core.params.merged(own, frozen) == params
    with pytest.raises(ValueError, match="fits no parameter to train"):
        mammut.core.params.trained_names(mammut.core.params.by_name(params), ("vision.norm.mean",))


def test_where_all_is_trained_the_checkpoint_is_that_of_earlier_versions():
    state = trainer_of(dataclasses.replace(CONFIG, trainable=("*",))).abstract_state
    assert state.frozen == {} and by_name(state.all_params).keys() == by_name(state.params).keys()
