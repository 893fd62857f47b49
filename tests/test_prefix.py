"""The image prefix of a model: dropout, tokens of the pooled image, and the room for texts."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from prefix_models import IMAGES, prefix_config, prefix_processor

import mammut
from mammut.config import AugmentConfig, TokenizerConfig, TrainConfig
from mammut.data.sources import open_source
from mammut.generation.search import GenerateConfig
from mammut.models.compute import Augment
from mammut.models.mammut import MaMMUT
from mammut.testing import tiny_config, tiny_model, tiny_processor
from mammut.training.new_processor import make_processor

BARE = dataclasses.replace(prefix_config(), prefix_norm=False)
DROPOUT = AugmentConfig(prefix_dropout=0.25)


@jax.jit
def prefix(model: MaMMUT, augment: Augment = Augment()) -> jax.Array:
    return model.image_tokens(IMAGES, augment).tokens


def dropped_prefix(model: MaMMUT, seed: int) -> np.ndarray:
    return np.asarray(prefix(model, Augment(jax.random.key(seed), DROPOUT)))


def test_dropout_acts_in_training_alone_and_follows_from_the_key():
    model = tiny_model(BARE)
    whole = np.asarray(prefix(model))
    assert np.array_equal(prefix(model), whole) and (whole != 0).all()
    dropped, again, other = (dropped_prefix(model, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(again, dropped)
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], whole[kept] / 0.75, rtol=1e-5)
    assert (kept != (other != 0)).mean() > 0.2
    # Number by number: every token of every image has its own.
    assert abs(kept.mean() - 0.75) < 5 * (0.25 * 0.75 / kept.size) ** 0.5
    assert len({mask.tobytes() for mask in kept.reshape(-1, kept.shape[-1])}) == 6 * 4


def test_the_norm_comes_after_the_dropout():
    model = tiny_model(dataclasses.replace(BARE, prefix_norm=True))
    x = dropped_prefix(tiny_model(BARE), seed=3).astype(np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    expected = x * np.asarray(model.prefix_norm.scale[...]) + np.asarray(
        model.prefix_norm.bias[...]
    )
    np.testing.assert_allclose(dropped_prefix(model, seed=3), expected, atol=1e-4)


@pytest.fixture(scope="module")
def frozen() -> MaMMUT:
    """A model like Frozen (arXiv 2106.13884, section 3.1): two tokens from the pooled image."""
    return tiny_model(dataclasses.replace(prefix_config(), prefix_tokens=2, prefix_norm=False))


def test_a_map_of_the_pooled_image_is_split_into_tokens(frozen):
    pooled = np.asarray(jax.jit(lambda model: model.vision(IMAGES).tokens)(frozen)).mean(1)
    kernel, bias = (
        np.asarray(x[...]) for x in (frozen.image_projection.kernel, frozen.image_projection.bias)
    )
    width = frozen.config.text.width
    flat = pooled @ kernel.reshape(-1, 2 * width) + bias.reshape(2 * width)
    expected = np.stack([flat[:, :width], flat[:, width:]], axis=1)
    assert np.abs(expected[:, 0] - expected[:, 1]).max() > 0.1
    np.testing.assert_allclose(prefix(frozen), expected, atol=1e-4)


def test_a_model_of_two_image_tokens_captions(frozen):
    config, processor = frozen.config, prefix_processor()
    assert config.num_prefix_tokens == 2 and config.text_length == 63
    tokens = np.full((6, 5), processor.bos_id, np.int32)
    logits = jax.jit(lambda model: model.caption_logits(IMAGES, tokens))(frozen)
    assert logits.shape == (6, 5, 60)
    found = mammut.generate_text(
        frozen, processor, list(IMAGES), config=GenerateConfig(max_new_tokens=3)
    )
    best = jax.nn.log_softmax(logits[:, 0, : processor.vocab_size]).max(-1)
    np.testing.assert_allclose([text.token_logprobs[0] for text in found], best, atol=1e-4)
    assert len(set(np.asarray(best).tolist())) == 6  # each sees its image


def test_a_larger_image_leaves_less_room_for_text(tmp_path):
    mammut.save(tmp_path / "model", tiny_model(prefix_config()), prefix_processor())
    model, processor = mammut.load(tmp_path / "model", image_size=24)
    assert prefix_processor().max_length == 64 - 3 and model.config.num_prefix_tokens == 9
    assert processor.max_length == model.config.text_length == 64 - 8
    batch = processor(images=list(IMAGES[:2]), text=["one blue circle", "on the left " * 60])
    assert batch["tokens"].shape == (2, 56) and batch["image"].shape == (2, 24, 24, 3)
    graphdef, params = nnx.split(model)
    logits = jax.jit(
        lambda params: nnx.merge(graphdef, params).caption_logits(batch["image"], batch["tokens"])
    )
    assert np.isfinite(logits(params)).all() and logits(params).shape == (2, 56, 60)


def test_texts_of_a_run_may_be_shorter_than_its_model_has_places_for(tmp_path):
    tiny_processor().save(tmp_path)
    (vocabulary,) = tmp_path.glob("*.model")
    tokenizer = TokenizerConfig(path=str(vocabulary), max_length=7)
    config = TrainConfig(model=tiny_config(), tokenizer=tokenizer)
    processor = make_processor(
        config, open_source("synthetic:train[:5]", image_size=16, field="captions"), {}
    )
    model = tiny_model()
    mammut.save(tmp_path / "model", model, processor)
    _, loaded = mammut.load(tmp_path / "model")
    assert loaded.max_length == 7 < model.config.text.max_length
    texts = ["one red circle on the left or right", "one"]
    tokens, valid = loaded.encode_text(texts)
    assert tokens.shape == (2, 7) and valid.sum(1).max() == 7
    # Pads change nothing: of a text that fits the embedding is that of the longer form.
    embed = jax.jit(lambda model, *text: model.encode_text(*text))
    longer = embed(model, *tiny_processor().encode_text(texts))
    short = embed(model, tokens, valid)
    np.testing.assert_allclose(short[1], longer[1], atol=1e-5)
    assert np.abs(short[0] - longer[0]).max() > 1e-3


def test_texts_whose_last_position_counts_have_the_length_of_the_model():
    text = dataclasses.replace(tiny_config().text, pooling="last")
    model = dataclasses.replace(tiny_config(), text=text)
    assert TrainConfig(model=model, tokenizer=TokenizerConfig(max_length=12)).text_length == 12
    with pytest.raises(
        ValueError, match="tokenizer.max_length is 7, which with model.text.pooling 'last' is 12"
    ):
        TrainConfig(model=model, tokenizer=TokenizerConfig(max_length=7))
