"""Losses, compared with numbers worked by hand, with loops in float64, and with themselves.

With themselves: in chunks, over devices, at extreme values.
"""

import dataclasses
import re
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mammut.config import LossConfig, MeshConfig, TrainConfig
from mammut.core.sharding import batch_sharding, make_mesh, partition_spec
from mammut.models.losses import (
    CONTRASTIVE,
    ContrastiveLoss,
    caption_loss,
    caption_sum,
    contrastive_logits,
    focal_contrastive,
    sigmoid_contrastive,
    softmax_contrastive,
)
from mammut.testing import tiny_config, tiny_model
from mammut.training.step import random_params
from mammut.training.tasks import ImageTextTask

# What is here is compiled more than it is run.

# Worked by hand: rows are images, columns texts. softplus(-3 -2 -1 0 1) = .048587 .126928 .313262
# .693147 1.313262
HAND = jnp.array([[2.0, 0.0], [1.0, 3.0]])


def logits_of(size=6, seed=0, scale=4.0):
    return scale * np.random.default_rng(seed).normal(size=(size, size))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_softmax_loss_by_hand():
    # Image 0 against texts, (2, 0): log(1 + e^-2); image 1, (1, 3): the same.
    # Text 0 against images, (2, 1): log(1 + e^-1); text 1, (0, 3): log(1 + e^-3).
    expected = [(0.126928 + 0.313262) / 2, (0.126928 + 0.048587) / 2]
    np.testing.assert_allclose(softmax_contrastive(HAND), expected, atol=2e-6)


def test_sigmoid_loss_by_hand():
    # Matched pairs cost softplus(-logit), the others softplus(logit).
    expected = [0.126928 + 0.693147, 1.313262 + 0.048587]
    np.testing.assert_allclose(sigmoid_contrastive(HAND), expected, atol=2e-6)


def test_focal_loss_by_hand():
    # 1 - p of the four pairs: sigmoid(-2) = .119203, sigmoid(0) = .5, sigmoid(1) = .731059,
    # sigmoid(-3) = .047426.
    matched = [0.119203 * 0.126928, 0.047426 * 0.048587]
    others = [0.5 * 0.693147, 0.731059 * 1.313262]
    np.testing.assert_allclose(focal_contrastive(HAND), np.add(matched, others), atol=2e-6)
    weighted = 2 * 0.25 * np.array(matched) + 2 * 0.75 * np.array(others)
    np.testing.assert_allclose(focal_contrastive(HAND, alpha=0.25), weighted, atol=2e-6)


def test_softmax_loss_equals_a_loop():
    logits = logits_of()
    expected = []
    for i in range(len(logits)):
        to_text = -np.log(
            np.exp(logits[i, i]) / sum(np.exp(logits[i, j]) for j in range(len(logits)))
        )
        to_image = -np.log(
            np.exp(logits[i, i]) / sum(np.exp(logits[j, i]) for j in range(len(logits)))
        )
        expected.append((to_text + to_image) / 2)
    np.testing.assert_allclose(softmax_contrastive(jnp.float32(logits)), expected, rtol=1e-5)


@pytest.mark.parametrize("normalization", ["batch", "pairs"])
@pytest.mark.parametrize(("gamma", "alpha"), [(1.0, 0.5), (2.0, 0.25), (0.5, 0.9), (0.0, 0.3)])
def test_focal_loss_equals_a_loop(gamma, alpha, normalization):
    logits = logits_of()
    expected = np.zeros(len(logits))
    for i in range(len(logits)):
        for j in range(len(logits)):
            p = sigmoid(logits[i, j]) if i == j else 1 - sigmoid(logits[i, j])
            expected[i] -= 2 * (alpha if i == j else 1 - alpha) * (1 - p) ** gamma * np.log(p)
    if normalization == "pairs":
        expected /= len(logits)
    losses = focal_contrastive(
        jnp.float32(logits), gamma=gamma, alpha=alpha, normalization=normalization
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_focal_loss_without_focus_or_balance_is_the_sigmoid_loss():
    logits = jnp.float32(logits_of())
    losses = focal_contrastive(logits, gamma=0.0, alpha=0.5)
    np.testing.assert_allclose(losses, sigmoid_contrastive(logits), rtol=1e-6)


def test_the_mean_is_the_papers_sum_over_pairs_divided_by_the_batch():
    logits = logits_of()
    p = np.where(np.eye(6), sigmoid(logits), 1 - sigmoid(logits))
    pairs = -(1 - p) * np.log(p)
    np.testing.assert_allclose(
        focal_contrastive(jnp.float32(logits)).mean(), pairs.sum() / 6, rtol=1e-5
    )
    losses = focal_contrastive(jnp.float32(logits), normalization="pairs")
    np.testing.assert_allclose(losses.mean(), pairs.sum() / 36, rtol=1e-5)


@pytest.mark.parametrize("batch", [4, 64])
def test_at_temperature_1_an_undecided_pair_costs_half_of_log_2(batch):
    """So a batch of 16,384 costs 5,678 an image: the docstring's warning."""
    nothing = jnp.zeros((batch, 8))
    logits = contrastive_logits(nothing, nothing, jnp.log(1.0))
    np.testing.assert_allclose(focal_contrastive(logits), batch * np.log(2) / 2, rtol=1e-6)
    np.testing.assert_allclose(
        focal_contrastive(logits, normalization="pairs"), np.log(2) / 2, rtol=1e-6
    )
    assert 16_384 * np.log(2) / 2 == pytest.approx(5_678, abs=1)


def test_a_batch_that_knows_nothing_costs_log_b_by_softmax():
    np.testing.assert_allclose(softmax_contrastive(jnp.zeros((16, 16))), np.log(16), rtol=1e-6)


def test_logits_are_scaled_cosines_of_images_with_texts_plus_the_bias():
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(5, 4)), rng.normal(size=(5, 4))
    logits = contrastive_logits(
        jnp.float32(image), jnp.float32(text), jnp.log(jnp.float32(7.0)), -3.0
    )
    expected = np.array([[7 * (i @ t) - 3 for t in text] for i in image])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [softmax_contrastive, sigmoid_contrastive, focal_contrastive])
def test_large_logits_cost_much_and_stay_finite(loss):
    """Every pair is wrong, at the largest scale and far beyond it; the gradient is not zero."""
    for scale in (100.0, 1e4):
        logits = scale * (1 - 2 * jnp.eye(4))
        value, grad = jax.value_and_grad(lambda x: loss(x).mean())(logits)
        assert np.isfinite(value) and value > scale
        assert np.isfinite(grad).all() and np.abs(grad).max() > 0.1
        assert loss(-logits).max() < 1e-6


@pytest.mark.parametrize("loss", [softmax_contrastive, sigmoid_contrastive, focal_contrastive])
def test_the_losses_are_float32_for_embeddings_in_bfloat16(loss):
    embed = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.bfloat16)
    losses = loss(contrastive_logits(embed, embed, jnp.float32(1.0)))
    assert losses.dtype == jnp.float32 and losses.shape == (8,)
    exact = embed.astype(jnp.float32)
    np.testing.assert_allclose(
        losses, loss(contrastive_logits(exact, exact, jnp.float32(1.0))), rtol=1e-6
    )


@pytest.mark.parametrize("loss", [softmax_contrastive, sigmoid_contrastive, focal_contrastive])
def test_a_batch_on_eight_devices_has_the_negatives_and_the_gradients_of_one(loss):
    rng = np.random.default_rng(0)
    embeds = [rng.normal(size=(16, 8)).astype(np.float32) for _ in range(2)]
    embeds = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in embeds]

    def mean(image, text, log_scale, bias):
        return loss(contrastive_logits(image, text, log_scale, bias)).mean()

    def run(image, text):
        return jax.jit(jax.value_and_grad(mean, argnums=(0, 1, 2, 3)))(
            image, text, jnp.float32(2.0), jnp.float32(-1.0)
        )

    single = run(*embeds)
    sharding = NamedSharding(make_mesh(MeshConfig(data=8)), PartitionSpec("data"))
    placed = [jax.device_put(x, sharding) for x in embeds]
    assert len(placed[0].addressable_shards) == 8 and placed[0].addressable_shards[
        0
    ].data.shape == (2, 8)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), single, run(*placed)
    )
    alone = mean(embeds[0][:2], embeds[1][:2], jnp.float32(2.0), jnp.float32(-1.0))
    assert abs(alone - single[0]) > 0.1  # what a device would say of its own two pairs


# The table of the contrastive losses


def test_the_choices_of_a_config_are_the_rows():
    """The error of a name without a row is in test_config."""
    fields = {field.name: field.type for field in dataclasses.fields(LossConfig)}
    assert get_args(fields["contrastive"]) == tuple(CONTRASTIVE)


def test_a_row_is_all_that_a_loss_needs(monkeypatch):
    """Its function has no options and no bias, and is not one of the others under another name."""
    added = ContrastiveLoss(
        matrix=lambda logits: jnp.full(len(logits), 2 * logits.sum()),
        logit_scale_init=3.0,
        logit_bias_init=-2.0,
        uses_bias=False,
    )
    monkeypatch.setitem(CONTRASTIVE, "sigmoid", added)
    config, model = LossConfig("sigmoid"), tiny_model()
    rng = np.random.default_rng(0)
    embeds = [jnp.float32(rng.normal(size=(4, 48))) for _ in range(2)]
    expected = 2 * contrastive_logits(*embeds, model.logit_scale[...]).sum()
    assert ImageTextTask(config).contrastive(model, *embeds) == pytest.approx(float(expected))
    assert (config.first_logit_scale, config.first_logit_bias) == (3.0, -2.0)
    with pytest.raises(ValueError, match="form is 'ring', which LossConfig.contrastive 'sigmoid'"):
        LossConfig("sigmoid", contrastive_form="ring")


@pytest.mark.parametrize("loss, scale, bias", [
    (LossConfig(), 1 / 0.07, 0),
    (LossConfig("sigmoid"), 10, -10),
    (LossConfig("focal"), 10, -10),
    (LossConfig("sigmoid", logit_scale_init=20.0), 20, -10),
    (LossConfig(logit_bias_init=-3.5), 1 / 0.07, -3.5),
])  # fmt: skip
def test_a_fresh_run_starts_at_the_scale_and_the_bias_of_its_loss(loss, scale, bias):
    config = TrainConfig(model=tiny_config(), loss=loss)

    @jax.jit
    def start(seed):
        params = random_params(config, seed)
        return params["logit_scale"], params["logit_bias"]

    got_scale, got_bias = start(0)
    assert got_scale.dtype == got_bias.dtype == jnp.float32
    assert float(got_scale) == pytest.approx(np.log(scale), rel=1e-6) and got_bias == bias


@pytest.mark.parametrize("field, value", [
    ("logit_scale_init", 0.0), ("logit_scale_init", 101.0), ("logit_scale_init", np.nan),
    ("logit_bias_init", np.inf), ("logit_bias_init", np.nan),
])  # fmt: skip
def test_a_start_that_cannot_work_is_refused(field, value):
    with pytest.raises(ValueError, match=f"^LossConfig.{field} is {value}, expected"):
        LossConfig(**{field: value})


# The caption loss

BATCH, LENGTH, WIDTH, VOCAB = 3, 10, 6, 11


@pytest.fixture(scope="module")
def caption():
    rng = np.random.default_rng(0)
    loss_mask = np.arange(LENGTH) < np.array([[9], [4], [0]])
    return {
        "features": rng.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32),
        "vocab_kernel": rng.normal(size=(WIDTH, VOCAB)).astype(np.float32),
        "labels": rng.integers(0, VOCAB, (BATCH, LENGTH), np.int32),
        "loss_mask": loss_mask,
    }


def caption_by_loop(features, vocab_kernel, labels, loss_mask, label_smoothing, z_loss):
    losses = np.zeros(labels.shape)
    for b, i in np.ndindex(*labels.shape):
        logits = features[b, i].astype(np.float64) @ vocab_kernel.astype(np.float64)
        log_z = np.log(np.exp(logits).sum())
        target = np.full(len(logits), label_smoothing / len(logits))
        target[labels[b, i]] += 1 - label_smoothing
        losses[b, i] = loss_mask[b, i] * (-(target * (logits - log_z)).sum() + z_loss * log_z**2)
    return losses


@pytest.mark.parametrize(
    ("label_smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.3), (0.2, 0.05)]
)
def test_caption_loss_equals_a_loop(caption, label_smoothing, z_loss):
    losses = caption_loss(**caption, label_smoothing=label_smoothing, z_loss=z_loss)
    expected = caption_by_loop(**caption, label_smoothing=label_smoothing, z_loss=z_loss)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)


def test_caption_loss_by_hand():
    """Logits (log 1, log 3): the two tokens have probabilities 1/4 and 3/4."""
    kernel, features = jnp.array([[0.0, np.log(3)]]), jnp.ones((1, 3, 1))
    labels, mask = jnp.array([[0, 1, 1]]), jnp.array([[True, True, False]])
    losses = caption_loss(features, kernel, labels, mask)
    np.testing.assert_allclose(losses, [[1.386294, 0.287682, 0]], atol=1e-6)  # log 4, log 4/3
    # targets 3/4, 1/4 and the reverse
    smooth = caption_loss(features, kernel, labels, mask, label_smoothing=0.5)
    expected = [[0.75 * 1.386294 + 0.25 * 0.287682, 0.25 * 1.386294 + 0.75 * 0.287682, 0]]
    np.testing.assert_allclose(smooth, expected, atol=1e-6)
    squared = caption_loss(features, kernel, labels, mask, z_loss=0.1)  # Z = 4
    np.testing.assert_allclose(squared, [[1.386294 + 0.192181, 0.287682 + 0.192181, 0]], atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4, 5, 9])
def test_chunks_change_neither_the_caption_loss_nor_its_gradient(caption, chunk):
    """Chunks of 4 and 9 do not divide the length."""

    def loss(features, kernel, chunk):
        losses = caption_loss(
            features,
            kernel,
            caption["labels"],
            caption["loss_mask"],
            label_smoothing=0.1,
            z_loss=0.1,
            chunk=chunk,
        )
        return (losses * np.arange(1, LENGTH + 1)).sum(), losses

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    whole = run(caption["features"], caption["vocab_kernel"], LENGTH)
    chunked = run(caption["features"], caption["vocab_kernel"], chunk)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole, chunked
    )


@pytest.mark.parametrize("chunk", [4, LENGTH])
def test_a_masked_token_costs_exactly_nothing_and_has_no_gradient(caption, chunk):
    mask = caption["loss_mask"]

    def loss(features):
        losses = caption_loss(
            **{**caption, "features": features}, label_smoothing=0.1, z_loss=0.1, chunk=chunk
        )
        return losses.sum(), losses

    (_, losses), grad = jax.value_and_grad(loss, has_aux=True)(caption["features"])
    assert (np.asarray(losses)[~mask] == 0).all() and (np.asarray(losses)[mask] > 0).all()
    assert (np.asarray(grad)[~mask] == 0).all() and (
        np.abs(np.asarray(grad)[mask]).max(-1) > 0
    ).all()


def test_large_scores_stay_finite_and_a_sure_wrong_token_costs_their_difference():
    features, kernel = jnp.full((1, 2, 1), 1e4), jnp.array([[1.0, -1.0, 0.0]])
    losses = caption_loss(features, kernel, jnp.array([[0, 1]]), jnp.ones((1, 2), bool))
    np.testing.assert_allclose(losses, [[0, 2e4]], atol=1e-3)


def test_the_caption_loss_is_summed_in_float32_for_features_in_bfloat16():
    """Logits in bfloat16 would be off by up to 1/256 of their size: they are kept in float32."""
    rng = np.random.default_rng(0)
    features = jnp.asarray(8 * rng.normal(size=(2, 3, 16)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(16, 50)), jnp.bfloat16)
    labels, mask = rng.integers(0, 50, (2, 3), np.int32), np.ones((2, 3), bool)
    losses = caption_loss(features, kernel, labels, mask)
    assert losses.dtype == jnp.float32
    expected = caption_by_loop(np.asarray(features), np.asarray(kernel), labels, mask, 0, 0)
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-4)


# Its sum, with the gradient taken on the way


@pytest.mark.parametrize("chunk", [4, 16])
@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.0, 0.0), (0.2, 0.05)])
def test_the_summed_loss_has_the_value_and_the_gradients_of_the_sum(
    caption, label_smoothing, z_loss, chunk
):
    bias = np.linspace(-1, 1, VOCAB, dtype=np.float32)
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss, "chunk": chunk}

    def run(loss):
        def scaled(features, vocab_kernel, vocab_bias):
            arrays = {
                **caption,
                "features": features,
                "vocab_kernel": vocab_kernel,
                "vocab_bias": vocab_bias,
            }
            return 0.3 * loss(**arrays, **options).sum()

        arrays = caption["features"], caption["vocab_kernel"], bias
        return jax.jit(jax.value_and_grad(scaled, argnums=(0, 1, 2)))(*arrays), jax.jit(scaled)(
            *arrays
        )

    expected, got = run(caption_loss), run(caption_sum)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.abs(a - b).max() <= 1e-6 * np.abs(b).max()


def test_a_masked_token_has_no_gradient_in_the_summed_loss_either(caption):
    def loss(features):
        return caption_sum(
            **{**caption, "features": features, "vocab_bias": None},
            label_smoothing=0.1,
            z_loss=0.1,
            chunk=4,
        )

    grad = np.asarray(jax.grad(loss)(caption["features"]))
    assert (grad[~caption["loss_mask"]] == 0).all() and (
        np.abs(grad[caption["loss_mask"]]).max(-1) > 0
    ).all()


def test_the_gradients_of_the_summed_loss_are_of_the_types_of_its_arguments(caption):
    rounded = [jnp.bfloat16(caption[name]) for name in ("features", "vocab_kernel")]

    def loss(features, vocab_kernel):
        return caption_sum(
            features, vocab_kernel, None, caption["labels"], caption["loss_mask"], chunk=4
        )

    grads = jax.grad(loss, argnums=(0, 1))
    for grad, want in zip(grads(*rounded), grads(*map(jnp.float32, rounded)), strict=True):
        assert grad.dtype == jnp.bfloat16 and want.dtype == jnp.float32
        np.testing.assert_allclose(grad.astype(jnp.float32), want, atol=0.02 * np.abs(want).max())


@pytest.mark.parametrize("mesh", [MeshConfig(1, 1, 8), MeshConfig(2, 2, 2), MeshConfig(1, 8, 1)])
def test_the_vocabulary_is_gathered_once_where_fsdp_splits_it_and_stays_split_over_model(mesh):
    """Four chunks, by the task: nothing as large as the kernel travels in their loop."""
    rng = np.random.default_rng(0)
    features, embedding = rng.normal(size=(16, 16, 24)), rng.normal(size=(1_000, 24))
    labels, mask = rng.integers(0, 1_000, (16, 16), np.int32), np.ones((16, 16), bool)
    mask[:, 13:] = False

    def loss(features, embedding, labels, mask):
        return caption_sum(features, embedding.T, None, labels, mask, chunk=4)

    run = jax.value_and_grad(loss, argnums=(0, 1))
    args = [jnp.asarray(x) for x in (np.float32(features), np.float32(embedding), labels, mask)]
    expected = jax.jit(run)(*args)
    mesh = make_mesh(mesh)
    rows = batch_sharding(mesh)
    table = NamedSharding(mesh, partition_spec(("vocab", "embed"), embedding.shape, mesh))
    with jax.set_mesh(mesh):
        program = jax.jit(
            run, in_shardings=(rows, table, rows, rows), out_shardings=(None, (rows, table))
        )
        program = program.lower(*args).compile()
        got = program(*map(jax.device_put, args, program.input_shardings[0]))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    text = program.as_text()
    assert "all-to-all" not in text and "collective-permute" not in text
    local = 1_000 // mesh.shape["model"]
    gathered = re.findall(r"= (\S+?)\{\S* all-gather\(", text)
    assert gathered == ([f"f32[24,{local}]"] if mesh.shape["fsdp"] > 1 else [])
    reduced = [
        line
        for line in text.splitlines()
        if re.search(r" all-reduce\(", line) and f"f32[24,{local}]" in line
    ]
    assert len(reduced) == (1 if mesh.shape["fsdp"] > 1 else 0) and not any(
        "while" in line for line in reduced
    )
    if mesh.shape["model"] > 1:
        # neither the table nor scores, whole
        assert not re.search(r"f32\[[\d,]*\b1000\b[\d,]*\]", text)
