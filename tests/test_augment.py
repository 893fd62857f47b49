"""Random draws of training inside the model.

Nothing is drawn without a key, and each kind of draw has a stream of its own.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prefix_models import IMAGES, prefix_config

from mammut.config import AugmentConfig, ComputeConfig
from mammut.models.compute import Augment
from mammut.models.mammut import MaMMUT, require_computable
from mammut.testing import tiny_config, tiny_model

KEY = jax.random.key(5)
# Without its norm, which would hide what the dropout drops.
PREFIX = dataclasses.replace(prefix_config(), prefix_norm=False)


@functools.cache
def model(flat_positions: bool = False) -> MaMMUT:
    """A model with an image prefix.

    With `flat_positions` a crop of the position table changes nothing.
    """
    made = tiny_model(PREFIX)
    if flat_positions:
        table = made.vision.pos_embed
        table.set_value(jnp.zeros_like(table[...]))
    return made


@jax.jit
def _tokens(model: MaMMUT, augment: Augment) -> jax.Array:
    return model.image_tokens(IMAGES, augment).tokens


def tokens(flat_positions: bool = False, key: jax.Array = KEY, **rates) -> np.ndarray:
    return np.asarray(_tokens(model(flat_positions), Augment(key, AugmentConfig(**rates))))


@jax.jit
def _outputs(model: MaMMUT, *augment: Augment) -> tuple[jax.Array, ...]:
    image, text = IMAGES[:2], (jnp.ones((2, 12), int), jnp.ones((2, 12), bool))
    encoded = model.image_tokens(image, *augment)
    both = model.two_pass(image, *text, *augment)
    embed = model.encode_image(image, *augment)
    return encoded.tokens, encoded.vector, embed, both.image_embed, both.features


@pytest.fixture(scope="module")
def plain_outputs() -> tuple[jax.Array, ...]:
    return _outputs(tiny_model())


@pytest.mark.parametrize("augment", [Augment(), Augment(KEY), Augment(KEY, AugmentConfig())])
def test_without_rates_nothing_is_drawn(augment, plain_outputs):
    """Neither by the default of the methods, nor by a key alone."""
    undrawn = _outputs(tiny_model(), augment)
    for expected, got in zip(plain_outputs, undrawn, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_each_kind_of_draw_does_something():
    plain = tokens()
    for rates in ({"crop_positions": True}, {"patch_drop": 0.5}, {"prefix_dropout": 0.25}):
        drawn = tokens(**rates)
        assert drawn.shape != plain.shape or np.abs(drawn - plain).max() > 1e-3
        np.testing.assert_array_equal(drawn, tokens(**rates))
        other = tokens(key=jax.random.key(6), **rates)
        assert np.abs(other - drawn).max() > 1e-3


def test_crops_change_no_other_draw():
    """Of a table of zeros every crop is the same: what is left of the randomness must be, too."""
    for rates in ({"patch_drop": 0.5}, {"prefix_dropout": 0.25}):
        alone = tokens(flat_positions=True, **rates)
        with_crops = tokens(flat_positions=True, crop_positions=True, **rates)
        np.testing.assert_allclose(with_crops, alone, atol=1e-6)
        assert np.abs(tokens(crop_positions=True, **rates) - tokens(**rates)).max() > 1e-3


def test_dropout_changes_no_other_draw():
    """What it leaves is what there was without it, scaled."""
    for rates in ({"patch_drop": 0.5}, {"crop_positions": True}):
        whole = tokens(**rates)
        dropped = tokens(prefix_dropout=0.25, **rates)
        kept = dropped != 0
        assert 0.6 < kept.mean() < 0.9
        np.testing.assert_allclose(dropped[kept], whole[kept] / 0.75, rtol=1e-5)


def test_micro_batches_have_draws_of_their_own():
    config = AugmentConfig(patch_drop=0.5)
    parts = Augment(KEY, config).split(3)
    assert parts.config == config and parts.key.shape == (3,)
    numbers = {tuple(row) for row in np.asarray(jax.random.key_data(parts.key)).tolist()}
    assert len(numbers) == 3

    assert Augment().split(3) == Augment()

    def drawn(_, augment):
        return None, model().image_tokens(IMAGES, augment).tokens

    _, of_scan = jax.jit(lambda parts: jax.lax.scan(drawn, None, parts))(parts)
    for i in range(3):
        np.testing.assert_allclose(of_scan[i], tokens(key=parts.key[i], patch_drop=0.5), atol=1e-5)


@pytest.mark.parametrize(
    "rates", [{"patch_drop": 0.5}, {"crop_positions": True}, {"prefix_dropout": 0.1}]
)
def test_rates_without_a_key_are_refused(rates):
    with pytest.raises(ValueError, match="^Augment.key is None, expected a random key"):
        Augment(config=AugmentConfig(**rates))
    assert Augment().key is None


def test_dropout_of_a_prefix_needs_a_prefix():
    dropout = AugmentConfig(prefix_dropout=0.1)
    message = "AugmentConfig.prefix_dropout is 0.1, which needs an image prefix"
    with pytest.raises(ValueError, match=message):
        require_computable(tiny_config(), ComputeConfig(), dropout)
    require_computable(PREFIX, ComputeConfig(), dropout)
