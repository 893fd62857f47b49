"""The train step: schedule, optimizer, what a NaN does, and that micro-batches change nothing."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from embedding_recall import embedding_recall
from flax import nnx
from marks import long

import mammut
from mammut import presets
from mammut.config import DataConfig, LossConfig, MeshConfig, OptimizerConfig, TrainConfig
from mammut.core import sharding
from mammut.models.compute import Augment, AugmentConfig, ComputeConfig
from mammut.models.mammut import MaMMUT
from mammut.testing import tiny_batch, tiny_config, tiny_model
from mammut.training.optimizer import learning_rate_schedule, make_optimizer
from mammut.training.step import Trainer, TrainState, make_trainer, require_precise
from mammut.training.tasks import ImageTextTask

# Half as deep as `tiny_config`, which compiles faster.
MODEL = dataclasses.replace(
    tiny_config(), text=dataclasses.replace(tiny_config().text, depth=2, cross_attn_every=1)
)
BATCH = jax.tree.map(jnp.asarray, tiny_batch(MODEL, batch_size=8))
CONFIG = TrainConfig(
    model=MODEL,
    data=DataConfig(batch_size=8),
    loss=LossConfig(contrastive_weight=0.5, caption_weight=3.0),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
    steps=80,
)


def one_device_trainer(config: TrainConfig) -> Trainer:
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    return make_trainer(config, ImageTextTask(config.loss), mesh)


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return one_device_trainer(CONFIG)


def random_state(trainer: Trainer) -> TrainState:
    """A state at step 0 with random numbers in every parameter; nothing is compiled."""
    params = nnx.to_pure_dict(nnx.state(tiny_model(MODEL), nnx.Param))
    zero = np.int32(0)
    state = TrainState(
        zero, params, make_optimizer(CONFIG.optimizer, CONFIG.steps).init(params), zero, zero
    )
    return place(state, trainer)


def place(state: TrainState, trainer: Trainer) -> TrainState:
    """A copy: a step gives the memory of its state away."""
    host = jax.tree.map(np.array, state)
    return jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding), host, trainer.abstract_state
    )


@pytest.fixture(scope="module")
def embeds(trainer) -> Callable:
    """Of parameters: the image and text embeddings of the batch."""

    @jax.jit
    def embed(params):
        model = trainer.model(params)
        return model.encode_image(BATCH["image"]), model.encode_text(
            BATCH["tokens"], BATCH["text_valid"]
        )

    return lambda params: [np.asarray(x, np.float64) for x in embed(params)]


def by_name(tree) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path): np.array(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_identical(tree, expected) -> None:
    got, want = by_name(tree), by_name(expected)
    assert got.keys() == want.keys()
    # NaN equals NaN
    assert [name for name in want if got[name].tobytes() != want[name].tobytes()] == []


# --- the schedule


def test_the_learning_rate_warms_up_then_falls_along_a_cosine_to_zero_at_the_last_step():
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=8.0, warmup_steps=4), steps=10)
    cosine = [4 * (1 + math.cos(math.pi * k / 6)) for k in range(7)]
    np.testing.assert_allclose([schedule(i) for i in range(11)], [0, 2, 4, 6, *cosine], atol=1e-6)
    assert cosine[0] == 8 and cosine[3] == pytest.approx(4) and float(schedule(10)) == 0


def test_the_linear_schedule_falls_by_the_same_amount_every_step():
    config = OptimizerConfig(learning_rate=6.0, warmup_steps=2, schedule="linear")
    schedule = learning_rate_schedule(config, steps=8)
    np.testing.assert_allclose(
        [schedule(i) for i in range(9)], [0, 3, 6, 5, 4, 3, 2, 1, 0], atol=1e-6
    )


@pytest.mark.parametrize("kind, halfway", [("cosine", 2.0), ("linear", 2.0)])
def test_without_warm_up_the_first_step_has_the_peak_rate(kind, halfway):
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=4.0, schedule=kind), steps=10)
    np.testing.assert_allclose([schedule(i) for i in (0, 5, 10)], [4, halfway, 0], atol=1e-6)


# --- the optimizer


def small_params(rng: np.random.Generator) -> dict:
    shapes = {"kernel": (3, 4), "bias": (4,), "embedding": (5, 3)}
    return {
        "layer": {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    }


@pytest.mark.parametrize("clip_norm", [0.0, 0.7])
def test_adamw_equals_its_formula_in_numpy(clip_norm):
    """Four updates by Adam's algorithm 1 with decoupled decay, in float64.

    The gradients have very different lengths.
    """
    config = OptimizerConfig(
        learning_rate=0.1, warmup_steps=2, schedule="linear", weight_decay=0.3, b1=0.8, b2=0.9,
        eps=1e-3, clip_norm=clip_norm,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    params = small_params(rng)
    expected = {name: value.astype(np.float64) for name, value in params["layer"].items()}
    first, second = (
        {name: np.zeros(value.shape) for name, value in expected.items()} for _ in range(2)
    )
    optimizer = make_optimizer(config, steps=6)
    state = optimizer.init(params)
    # warm-up 0, 0.05, then 0.1 falling by a quarter of itself over the four steps left
    for t, rate in enumerate([0.0, 0.05, 0.1, 0.075], start=1):
        grads = jax.tree.map(lambda x: x * np.float32(10.0 ** (t - 2)), small_params(rng))  # noqa: B023
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(lambda p, u: p + u, params, updates)

        norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads["layer"].values()))
        scale = min(1, clip_norm / norm) if clip_norm else 1
        for name, grad in grads["layer"].items():
            g = scale * grad.astype(np.float64)
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g**2
            step = first[name] / (1 - 0.8**t) / (np.sqrt(second[name] / (1 - 0.9**t)) + 1e-3)
            expected[name] -= rate * (step + (0.3 * expected[name] if name == "kernel" else 0))
        for name, value in expected.items():
            np.testing.assert_allclose(
                params["layer"][name], value, rtol=2e-5, atol=1e-6, err_msg=f"{name} {t}"
            )


def test_weight_decay_touches_the_kernels_and_nothing_else():
    config = OptimizerConfig(learning_rate=0.5, weight_decay=0.1)
    params = nnx.to_pure_dict(nnx.state(tiny_model(MODEL), nnx.Param))
    optimizer = make_optimizer(config, steps=10)
    no_gradient = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(no_gradient, optimizer.init(params), params)
    moved = {name for name, update in by_name(updates).items() if update.any()}
    assert moved == {name for name in by_name(params) if name.endswith("['kernel']")}
    # Some of what stays has as many dimensions as a kernel.
    still = by_name(params).keys() - moved
    for part in (
        "attn_norm']['scale",
        "query']['bias",
        "pos_embed",
        "embedding",
        "logit_scale",
        "logit_bias",
    ):
        assert any(part in name for name in still), part
    for name, value in by_name(params).items():
        if name in moved:
            np.testing.assert_allclose(by_name(updates)[name], -0.5 * 0.1 * value, rtol=1e-6)


def test_adafactor_divides_by_the_root_of_row_and_column_means():
    """Rows and columns describe a gradient whose size is an outer product: it becomes its sign."""
    rng = np.random.default_rng(0)
    size = np.outer(rng.uniform(0.1, 10, 40), rng.uniform(0.1, 10, 50))
    sign = rng.choice([-1.0, 1.0], size.shape)
    config = OptimizerConfig(
        "adafactor", learning_rate=0.2, weight_decay=0.0, b1=0.9, clip_norm=0.0
    )
    optimizer = make_optimizer(config, steps=10)
    params = {"kernel": jnp.zeros(size.shape)}
    updates, _ = optimizer.update(
        {"kernel": jnp.float32(size * sign)}, optimizer.init(params), params
    )
    # the average of updates starts at zero and takes a tenth of the first one
    np.testing.assert_allclose(updates["kernel"], -0.2 * 0.1 * sign, rtol=1e-4)


def test_adafactor_keeps_one_moment_where_adamw_keeps_two():
    config = presets.mammut_b16()
    abstract = nnx.eval_shape(lambda: MaMMUT(config, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(abstract, nnx.Param))
    sizes, states = {}, {}
    for name in ("adamw", "adafactor"):
        states[name] = jax.eval_shape(make_optimizer(OptimizerConfig(name), 10).init, params)
        sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(states[name]))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert 2 * count <= sizes["adamw"] <= 2 * count + 10
    assert count < sizes["adafactor"] < 1.02 * count
    # Optax keeps the whole second moment, `v`, only of what it does not factor.
    unfactored = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(states["adafactor"])
        if ".v[" in jax.tree_util.keystr(path)
        and "kernel" in jax.tree_util.keystr(path)
        and leaf.size > 1
    ]
    assert unfactored == []


# --- the step


def test_the_same_seed_gives_the_same_state_and_another_seed_another(trainer):
    with jax.set_mesh(trainer.mesh):
        first, second, other = (jax.device_get(trainer.init(seed)) for seed in (3, 3, 4))
    assert_identical(second, first)
    first, other = by_name(first.params), by_name(other.params)
    different = {name for name in first if not np.array_equal(first[name], other[name])}
    constant = {
        name
        for name in first
        if name.endswith(("['bias']", "['scale']", "['logit_scale']", "['logit_bias']"))
    }
    assert different == first.keys() - constant


def test_a_few_steps_learn_eight_pairs_by_heart_and_compile_once(trainer, embeds):
    with jax.set_mesh(trainer.mesh):
        state, history = trainer.init(0), []
        for _ in range(CONFIG.steps):
            state, metrics = trainer.step(state, BATCH)
            history.append(jax.device_get(metrics))
        image_embed, text_embed = embeds(state.params)
    assert trainer.step._cache_size() == 1
    assert history[0]["loss_contrastive"] > 1.5 and history[0]["loss_caption"] > 3.5
    assert history[-1]["loss_contrastive"] < 0.05 and history[-1]["loss_caption"] < 0.1
    recall = embedding_recall(image_embed, text_embed, np.arange(8))
    assert recall["t2i_r1"] == recall["i2t_r1"] == 1
    assert int(state.step) == CONFIG.steps and int(state.nonfinite) == 0


def test_both_losses_are_logged_unweighted_beside_their_weighted_sum(trainer, embeds):
    with jax.set_mesh(trainer.mesh):
        state = random_state(trainer)
        image_embed, text_embed = embeds(state.params)
        scale = float(state.params["logit_scale"])
        metrics = jax.device_get(trainer.step(state, BATCH)[1])
    logits = np.exp(scale) * image_embed @ text_embed.T
    by_row, by_column = np.exp(logits).sum(1), np.exp(logits).sum(0)
    infonce = (np.log(by_row) + np.log(by_column)).mean() / 2 - np.diagonal(logits).mean()
    assert metrics["loss_contrastive"] == pytest.approx(infonce, rel=1e-5)
    weighted = 0.5 * metrics["loss_contrastive"] + 3 * metrics["loss_caption"]
    assert metrics["loss"] == pytest.approx(weighted, rel=1e-6)
    assert abs(metrics["loss"] - metrics["loss_contrastive"] - metrics["loss_caption"]) > 1


def test_the_logit_scale_stays_at_or_below_100_and_can_come_down_from_it(trainer):
    state = jax.tree.map(np.array, random_state(trainer))
    state.params["logit_scale"] = np.float32(np.log(150))
    with jax.set_mesh(trainer.mesh):
        state, _ = trainer.step(place(state, trainer), BATCH)  # at rate 0, the first of the warm-up
        assert float(state.params["logit_scale"]) == pytest.approx(np.log(100), abs=1e-6)
        state, _ = trainer.step(state, BATCH)  # random pairs: less scale is less loss
        assert float(state.params["logit_scale"]) < np.log(100) - 1e-3


@pytest.mark.parametrize("part, module, name, value", [
    ("vision", "patch_embed", "kernel", np.nan),
    ("text", "token_embed", "embedding", np.inf),
])  # fmt: skip
def test_a_step_whose_loss_is_not_finite_changes_no_parameter_and_no_moment(
    trainer, part, module, name, value
):
    with jax.set_mesh(trainer.mesh):
        state, first = trainer.step(random_state(trainer), BATCH)
        good = jax.device_get(state)

        poisoned = jax.tree.map(np.array, good)
        poisoned.params[part][module][name][1, 2] = value
        state, bad = trainer.step(place(poisoned, trainer), BATCH)
        state, bad = trainer.step(state, BATCH)
        skipped = jax.device_get(state)
        assert_identical((skipped.params, skipped.opt_state), (poisoned.params, poisoned.opt_state))
        assert not np.isfinite(bad["loss"])
        assert (int(skipped.step), int(skipped.nonfinite), int(skipped.nonfinite_in_a_row)) == (
            3,
            2,
            2,
        )

        # Healed, it goes on as if the two steps had not been, except that it counts them.
        state, after = trainer.step(
            place(dataclasses.replace(skipped, params=good.params), trainer), BATCH
        )
        assert (int(state.step), int(state.nonfinite), int(state.nonfinite_in_a_row)) == (4, 2, 0)
        unharmed, expected = trainer.step(place(good, trainer), BATCH)
        assert_identical((state.params, state.opt_state), (unharmed.params, unharmed.opt_state))
    # Warm-up over 5 steps to 1e-2: what is logged is the rate that moved the parameters.
    assert [float(m["learning_rate"]) for m in (first, after)] == pytest.approx([0, 2e-3])
    assert float(after["learning_rate"]) == float(expected["learning_rate"])


@pytest.mark.long
def test_two_micro_batches_are_the_same_training_as_one_batch(trainer):
    halves = one_device_trainer(dataclasses.replace(CONFIG, accumulation=2))
    with jax.set_mesh(trainer.mesh):
        whole, split = random_state(trainer), random_state(trainer)
        step = halves.step.lower(split, BATCH).compile()
        for _ in range(3):
            whole, expected = trainer.step(whole, BATCH)
            split, metrics = step(split, BATCH)
            assert metrics.keys() == expected.keys()
            for name in metrics:
                assert float(metrics[name]) == pytest.approx(float(expected[name]), rel=1e-4), name
    # Of Adam's state, what is linear in the gradients: it divides by their size, which may be
    # nothing but rounding.
    expected, got = by_name(whole.opt_state[1].mu), by_name(split.opt_state[1].mu)
    for name, want in expected.items():
        assert np.abs(got[name] - want).max() <= 1e-4 * max(np.abs(want).max(), 0.1), name


def test_a_run_that_starts_from_other_weights_keeps_their_scale_and_bias():
    """What it starts from has learnt them; a parameter that it lacks starts as in a fresh run."""
    trainer = one_device_trainer(dataclasses.replace(CONFIG, loss=LossConfig("sigmoid")))
    given = mammut.core.params.by_name(nnx.to_pure_dict(nnx.state(tiny_model(MODEL), nnx.Param)))

    def read(name, value):
        return given[name] if value is None else value

    with jax.set_mesh(trainer.mesh):
        loaded = trainer.start_params(0, set(), read)
        lacking = trainer.start_params(0, {"logit_bias"}, read)
    for params in (loaded, lacking):
        assert float(params["logit_scale"]) == float(given["logit_scale"])
    assert float(loaded["logit_bias"]) == float(given["logit_bias"])
    assert float(lacking["logit_bias"]) == -10


class AllContrastive(ImageTextTask):
    """The three contrastive losses at once, in a mixture in which none makes up for another."""

    def contrastive(self, model, image_embed, text_embed):
        mixture = {"softmax": 1.0, "sigmoid": 0.37, "focal": 0.83}
        return sum(
            weight * ImageTextTask(self.of(name)).contrastive(model, image_embed, text_embed)
            for name, weight in mixture.items()
        )

    def of(self, name):
        return dataclasses.replace(self.config, contrastive=name)


@pytest.fixture(scope="module")
def whole_batch():
    """A task, a model in two halves, and the gradient and metrics of the whole batch at once."""
    loss = LossConfig(contrastive_weight=0.7, caption_weight=1.3, label_smoothing=0.1, z_loss=1e-3)
    task, (graphdef, state) = AllContrastive(loss), nnx.split(tiny_model(MODEL))
    params = nnx.to_pure_dict(state)

    @jax.jit
    def gradient(params, batch):
        return jax.grad(
            lambda p: task.loss(nnx.merge(graphdef, p), batch, Augment()), has_aux=True
        )(params)

    return task, graphdef, params, gradient(params, BATCH)


@pytest.mark.parametrize("accumulation, form", [long(2, "matrix"), (4, "matrix"), long(8, "ring")])
def test_micro_batches_give_the_gradient_of_the_whole_batch(whole_batch, accumulation, form):
    """The last have one pair each; the ring takes the eight in tiles of three."""
    task, graphdef, params, (expected, expected_metrics) = whole_batch
    task = AllContrastive(
        dataclasses.replace(task.config, contrastive_form=form, contrastive_chunk=3)
    )

    @jax.jit
    def gradient(params, batch):
        augment = Augment(jax.random.key(0))
        return task.gradients(
            lambda p: nnx.merge(graphdef, p), params, batch, augment, accumulation
        )

    grads, metrics = gradient(params, BATCH)
    for name in ("loss", "loss_contrastive", "loss_caption"):
        assert float(metrics[name]) == pytest.approx(float(expected_metrics[name]), rel=1e-5), name
    expected, grads = by_name(expected), by_name(grads)
    assert grads.keys() == expected.keys()
    for name, want in expected.items():
        assert np.abs(grads[name] - want).max() <= 1e-5 * max(np.abs(want).max(), 1), name


@pytest.mark.parametrize("what", [long("patches and positions"), long("prefix")])
def test_both_forwards_of_a_micro_batch_see_the_same_of_an_image(what):
    """Each micro-batch crops and drops by a key of its own, which a direct gradient uses once."""
    config = MODEL
    if what == "prefix":
        # and 12 beside an image
        text = dataclasses.replace(config.text, cross_attn_every=0, max_length=15)
        config = dataclasses.replace(config, text=text)
        drawn = AugmentConfig(prefix_dropout=0.4)
    else:
        drawn = AugmentConfig(patch_drop=0.5, crop_positions=True)
    graphdef, params = nnx.split(tiny_model(config))
    task, params = ImageTextTask(LossConfig()), nnx.to_pure_dict(params)

    def merge(params):
        return nnx.merge(graphdef, params)

    def direct(params, batch, key):
        model = merge(params)

        def forward(micro):
            micro_key, rows = micro
            return task.embed_and_caption(model, rows, Augment(micro_key, drawn))

        # rows go to the micro-batches in turn
        rows = {k: jnp.stack([x[i::4] for i in range(4)]) for k, x in batch.items()}
        embeds, captions = jax.lax.map(forward, (jax.random.split(key, 4), rows))
        contrastive = task.contrastive(model, *(jnp.concatenate(x) for x in embeds))
        return task.total(contrastive, captions.sum() / task.caption_tokens(model, batch))

    @jax.jit
    def gradients(params, batch, key):
        expected = jax.grad(direct, has_aux=True)(params, batch, key)
        return expected, task.gradients(merge, params, batch, Augment(key, drawn), 4)

    (expected, expected_metrics), (grads, metrics) = gradients(params, BATCH, jax.random.key(3))
    (_, other), _ = gradients(params, BATCH, jax.random.key(4))
    assert abs(float(other["loss"]) / float(metrics["loss"]) - 1) > 1e-3  # the key matters
    assert float(metrics["loss"]) == pytest.approx(float(expected_metrics["loss"]), rel=1e-5)
    expected, grads = by_name(expected), by_name(grads)
    for name, want in expected.items():
        assert np.abs(grads[name] - want).max() <= 1e-5 * max(np.abs(want).max(), 1), name


@pytest.mark.long
def test_one_device_takes_a_step_of_32768_pairs_without_their_matrix():
    """Compiled, not run: in micro-batches of 512 it needs a quarter of a byte for a pair."""
    batch_size, config = 32_768, MODEL
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(config, text=dataclasses.replace(config.text, max_length=4)),
        data=DataConfig(batch_size=batch_size),
        loss=LossConfig(contrastive_form="ring", contrastive_chunk=512),
        accumulation=64,
    )
    trainer = one_device_trainer(config)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype),
        tiny_batch(config.model, 1),
    )
    with jax.set_mesh(trainer.mesh):
        step = trainer.step.lower(trainer.abstract_state, batch).compile()
    assert step.memory_analysis().temp_size_in_bytes < batch_size**2 / 4


@pytest.mark.parametrize("contrastive", ["softmax", "sigmoid", "focal"])
def test_the_mean_over_micro_batches_would_be_another_loss(contrastive):
    """The gradients compared above could tell: a micro-batch on its own has fewer negatives."""
    task, model, rng = (
        ImageTextTask(LossConfig(contrastive)),
        tiny_model(MODEL),
        np.random.default_rng(0),
    )
    image_embed, text_embed = (
        jnp.float32(x / np.linalg.norm(x, axis=1, keepdims=True))
        for x in rng.normal(size=(2, 8, 48))
    )
    whole = float(task.contrastive(model, image_embed, text_embed))
    parts = [
        float(task.contrastive(model, image_embed[i : i + 4], text_embed[i : i + 4]))
        for i in (0, 4)
    ]
    assert abs(np.mean(parts) / whole - 1) > 0.2


def test_a_batch_that_does_not_split_into_micro_batches_is_refused():
    with pytest.raises(
        ValueError, match=r"^data.batch_size 8 is not a multiple of accumulation 3$"
    ):
        dataclasses.replace(CONFIG, accumulation=3)
    mesh = sharding.make_mesh(MeshConfig())
    with pytest.raises(
        ValueError, match=r"^data.batch_size / accumulation 4 does not divide over the 8 devices"
    ):
        make_trainer(dataclasses.replace(CONFIG, accumulation=2), ImageTextTask(CONFIG.loss), mesh)


@pytest.mark.parametrize("compute, first", [
    (ComputeConfig(param_dtype="bfloat16"), "image_projection.bias"),
    (ComputeConfig(text_param_dtype="bfloat16"), "text."),
    (ComputeConfig("bfloat16", param_dtype="bfloat16", text_param_dtype="float32"), "image_proj"),
])  # fmt: skip
def test_trained_parameters_that_are_stored_in_bfloat16_are_refused(compute, first):
    config = TrainConfig(model=tiny_config(), compute=compute, data=DataConfig(batch_size=8))
    with pytest.raises(ValueError, match=f"^{first}.* is trained and stored in bfloat16") as error:
        require_precise(one_device_trainer(config).abstract_state.params)
    assert "expected float32 in compute.param_dtype" in str(error.value)
    # Frozen ones may be, and so may the products.
    frozen = dataclasses.replace(
        config,
        trainable=("vision.patch_embed.*",),
        compute=ComputeConfig("bfloat16", text_param_dtype="bfloat16"),
    )
    require_precise(one_device_trainer(frozen).abstract_state.params)
