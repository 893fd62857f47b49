"""The ring form of the losses: values and gradients of the matrix, in memory that does not grow."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mammut.config import LossConfig, MeshConfig
from mammut.core import sharding
from mammut.models.losses import (
    contrastive_logits,
    focal_contrastive,
    focal_pairs,
    sigmoid_contrastive,
    sigmoid_pairs,
    softmax_contrastive,
)
from mammut.models.ring_loss import ring_pairs, ring_softmax
from mammut.testing import tiny_model
from mammut.training.tasks import ImageTextTask

# What is here is compiled more than it is run.
FOCAL = {"gamma": 1.5, "alpha": 0.3}
MATRIX = {
    "softmax": softmax_contrastive,
    "sigmoid": sigmoid_contrastive,
    "focal": functools.partial(focal_contrastive, **FOCAL),
}
PAIRS = {"sigmoid": sigmoid_pairs, "focal": functools.partial(focal_pairs, **FOCAL)}
MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(1, 8),
    "2 x 2 x 2": MeshConfig(2, 2, 2),
}
LOSSES = pytest.mark.parametrize("name", MATRIX)


def embeds_of(batch: int, size: int = 16) -> list[np.ndarray]:
    vectors = np.random.default_rng(batch).normal(size=(2, batch, size)).astype(np.float32)
    return [x / np.linalg.norm(x, axis=1, keepdims=True) for x in vectors]


def by_matrix(name, image, text, log_scale, bias):
    return MATRIX[name](
        contrastive_logits(image, text, log_scale, 0.0 if name == "softmax" else bias)
    )


def by_ring(name, image, text, log_scale, bias, chunk=4):
    if name == "softmax":
        return ring_softmax(image, text, log_scale, chunk=chunk)
    return ring_pairs(PAIRS[name], image, text, log_scale, bias, chunk=chunk)


def with_gradients(losses):
    """The losses, and the gradients of a sum that weighs no two of them alike."""

    def weighted(*args):
        values = losses(*args)
        return (values * jnp.linspace(0.5, 2, len(values))).sum(), values

    return jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2, 3), has_aux=True))


def assert_equal(got, expected, atol=1e-12):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape and np.isfinite(b).all()
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max() + atol


@LOSSES
def test_tiles_of_any_size_give_the_losses_and_the_gradients_of_the_matrix(name):
    args = (*embeds_of(13), np.float32(2.3), np.float32(-1))
    expected = with_gradients(functools.partial(by_matrix, name))(*args)
    for chunk in (5, 1_000):  # 13 pairs in tiles of 5: the last one has two rows of padding
        assert_equal(with_gradients(functools.partial(by_ring, name, chunk=chunk))(*args), expected)


@LOSSES
@pytest.mark.parametrize("mesh", MESHES)
def test_the_ring_of_devices_gives_the_losses_and_the_gradients_of_one(name, mesh):
    """Five pairs on a device, or ten: tiles of 4 divide neither."""
    args = (*embeds_of(40), np.float32(2.3), np.float32(-1))
    expected = with_gradients(functools.partial(by_matrix, name))(*args)
    mesh = sharding.make_mesh(MESHES[mesh])
    with jax.set_mesh(mesh):
        placed = [sharding.global_batch(x, mesh) for x in args[:2]]
        assert_equal(with_gradients(functools.partial(by_ring, name))(*placed, *args[2:]), expected)


def test_the_ring_equals_sums_in_float64():
    image, text = embeds_of(11)
    scores = 7.0 * image.astype(np.float64) @ text.T.astype(np.float64)
    to_text = np.log(np.exp(scores).sum(1)) - np.diagonal(scores)
    to_image = np.log(np.exp(scores).sum(0)) - np.diagonal(scores)
    losses = ring_softmax(image, text, jnp.log(7.0), chunk=3)
    np.testing.assert_allclose(losses, (to_text + to_image) / 2, rtol=1e-5)
    truth = np.where(np.eye(11), 1, -1) * (scores - 2)
    losses = ring_pairs(sigmoid_pairs, image, text, jnp.log(7.0), -2.0, chunk=3)
    np.testing.assert_allclose(losses, np.log1p(np.exp(-truth)).sum(1), rtol=1e-5)


@LOSSES
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_of_all_100_or_all_minus_100_stay_finite(name, sign):
    """exp(-100) is 0 in float32, and 0 has no logarithm; the last tile has padding too."""
    image = np.tile(np.float32([1, 0]), (7, 1))
    args = (image, sign * image, np.log(np.float32(100)), np.float32(0))
    expected = with_gradients(functools.partial(by_matrix, name))(*args)
    # Some gradients are nothing but the rounding of sums of 100s.
    assert_equal(with_gradients(functools.partial(by_ring, name))(*args), expected, atol=1e-4)


@LOSSES
def test_losses_are_float32_and_gradients_as_the_embeddings_are(name):
    image, text = (jnp.asarray(x, jnp.bfloat16) for x in embeds_of(6))
    args = (jnp.float32(1), jnp.float32(-1))
    (_, losses), grads = with_gradients(functools.partial(by_ring, name))(image, text, *args)
    assert (
        losses.dtype == jnp.float32
        and [x.dtype.name for x in grads] == ["bfloat16"] * 2 + ["float32"] * 2
    )
    exact = by_ring(name, image.astype(jnp.float32), text.astype(jnp.float32), *args)
    np.testing.assert_allclose(losses, exact, rtol=1e-6)


def compiled(losses, batch, devices):
    mesh = sharding.make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        embed = jax.ShapeDtypeStruct(
            (batch, 16), jnp.float32, sharding=sharding.batch_sharding(mesh)
        )
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        mean = jax.jit(jax.value_and_grad(lambda *args: losses(*args).mean(), argnums=(0, 1, 2, 3)))
        return mean.lower(embed, embed, scalar, scalar).compile()


@pytest.mark.long
@LOSSES
def test_memory_does_not_grow_with_the_devices_and_only_blocks_travel(name):
    """At 64 pairs a device. The matrix has all columns on every device."""
    used = {}
    for losses in (by_ring, by_matrix):
        for devices in (2, 8):
            program = compiled(functools.partial(losses, name), 64 * devices, devices)
            used[losses, devices] = program.memory_analysis().temp_size_in_bytes
            if losses is by_ring:
                text = program.as_text()
                assert (
                    "collective-permute" in text
                    and "all-gather" not in text
                    and "all-to-all" not in text
                )
                shapes = [
                    map(int, dims.split(",")) for dims in re.findall(r"f32\[([\d,]+)\]", text)
                ]
                # the embeddings of a block; the tiles are 4 x 4
                assert max(map(math.prod, shapes)) == 64 * 16
    assert used[by_ring, 8] < 1.05 * used[by_ring, 2]
    assert used[by_matrix, 8] > 3 * used[by_matrix, 2]


@LOSSES
def test_on_one_device_memory_grows_as_the_batch_and_not_as_its_square(name):
    used = [
        compiled(functools.partial(losses, name, **options), batch, 1)
        .memory_analysis()
        .temp_size_in_bytes
        for losses, options in ((by_ring, {"chunk": 64}), (by_matrix, {}))
        for batch in (1_024, 4_096)
    ]
    assert used[1] < 4.1 * used[0] and used[3] > 15 * used[2]
    assert used[1] < 4_096**2  # a byte a pair: the matrix has four and more


def test_pairs_that_do_not_divide_over_the_devices_are_refused():
    image, text = embeds_of(12)
    with jax.set_mesh(sharding.make_mesh(MESHES["fsdp 8"])):
        with pytest.raises(
            ValueError, match=r"^loss.contrastive_form 'ring' has 12 pairs, .* over the 8 "
        ):
            ring_softmax(image, text, jnp.float32(0), chunk=4)


# --- the task


@pytest.fixture(scope="module")
def model():
    return nnx.split(tiny_model())


def task_loss(model, config):
    graphdef, params = model

    def loss(params, image, text):
        return ImageTextTask(config).contrastive(nnx.merge(graphdef, params), image, text)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))), params


@LOSSES
@pytest.mark.parametrize("normalization", ["batch", "pairs"])
def test_both_forms_of_a_task_are_one_loss(model, name, normalization):
    args = embeds_of(16, 48)
    results = []
    for form in ("matrix", "ring"):
        config = LossConfig(
            name, contrastive_form=form, contrastive_chunk=5, focal_gamma=2.0, focal_alpha=0.2,
            focal_normalization=normalization,
        )  # fmt: skip
        run, params = task_loss(model, config)
        value, (param_grads, *embed_grads) = run(params, *args)
        results.append((value, param_grads["logit_scale"], param_grads["logit_bias"], embed_grads))
    assert_equal(results[1], results[0])


@LOSSES
@pytest.mark.parametrize("mesh", MESHES)
def test_in_the_matrix_form_a_device_holds_its_rows_and_gathers_the_texts_alone(model, name, mesh):
    mesh = sharding.make_mesh(MESHES[mesh])
    run, params = task_loss(model, LossConfig(name))
    with jax.set_mesh(mesh):
        embed = jax.ShapeDtypeStruct((64, 48), jnp.float32, sharding=sharding.batch_sharding(mesh))
        text = run.lower(params, embed, embed).compile().as_text()
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    assert f"f32[{64 // ways},64]" in text and "f32[64,64]" not in text
    assert "all-to-all" not in text and "collective-permute" not in text
    gathered = re.findall(r"= (\S+?)\{\S* all-gather\(", text)
    assert "f32[64,48]" in gathered and gathered.count("f32[64,48]") <= 2
