"""Greedy captions against a plain loop over the whole model, alone and in batches, and their ends."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mammut
from mammut.generate import greedy_tokens
from mammut.testing import tiny_batch, tiny_config, tiny_model, tiny_processor

CONFIG = dataclasses.replace(
    tiny_config(), text=dataclasses.replace(tiny_config().text, tie_embeddings=False, max_length=8)
)
LENGTH, VOCAB = CONFIG.text.max_length, CONFIG.text.vocab_size


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """These models are compiled more than they are run."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def model():
    """Its captions differ from image to image: the cross-attention speaks up."""
    model = tiny_model(CONFIG, seed=1)
    cross = model.text.cross_layers.attn.out.kernel
    cross[...] = 4 * cross[...]
    return model


@pytest.fixture(scope="module")
def images():
    return tiny_batch(CONFIG, batch_size=6, seed=3)["image"]


@pytest.fixture(scope="module")
def logits(model):
    graphdef, params = nnx.split(model)
    run = jax.jit(lambda params, image, tokens: nnx.merge(graphdef, params).caption_logits(image, tokens))
    return functools.partial(run, params)


@pytest.fixture(scope="module")
def greedy(model):
    graphdef, params = nnx.split(model)


    @functools.partial(jax.jit, static_argnums=(2, 3))
    def run(params, image, bos_id, eos_id):
        return greedy_tokens(nnx.merge(graphdef, params), image, bos_id, eos_id)

    return lambda *args: np.asarray(run(params, *args))


def by_loop(logits, image, bos_id, eos_id):
    """One image: ask for the logits of all that is written, take the likeliest, until the end or the last place."""
    tokens = [bos_id]
    while len(tokens) < LENGTH and (len(tokens) == 1 or tokens[-1] != eos_id):
        # What has not been written is any id: it cannot change the logits before it.
        text = np.array([tokens + [7] * (LENGTH - len(tokens))], np.int32)
        tokens.append(int(np.argmax(logits(image[None], text)[0, len(tokens) - 1])))
    return tokens + [eos_id] * (LENGTH - len(tokens))


@pytest.fixture(scope="module")
def without_end(logits, images):
    """Captions that never end: the end is an id that the loop does not meet."""
    return [by_loop(logits, image, 1, -1) for image in images]


@pytest.fixture(scope="module")
def end(without_end):
    """An id that ends some captions early, some late or never."""
    places = {token: [row.index(token, 1) if token in row[1:] else LENGTH for row in without_end]
              for row in without_end for token in row[1:]}  # fmt: skip
    token, where = max(places.items(), key=lambda item: len(set(item[1])))
    assert len(set(where)) >= 3 and max(where) >= LENGTH - 1, "the model's captions are too alike for these tests"
    return token


def test_greedy_tokens_equal_a_loop_over_the_whole_model(greedy, logits, images, end):
    expected = [by_loop(logits, image, 1, end) for image in images]
    np.testing.assert_array_equal(greedy(images, 1, end), expected)


def test_another_start_gives_another_caption(greedy, logits, images, end):
    expected = [by_loop(logits, image, 5, end) for image in images]
    tokens = greedy(images, 5, end)
    np.testing.assert_array_equal(tokens, expected)
    assert (tokens[:, 0] == 5).all() and (tokens[:, 1:] != greedy(images, 1, end)[:, 1:]).any()


def test_a_batch_is_captioned_as_its_images_one_by_one(greedy, images, end):
    """A caption that has ended waits, and changes nothing for the others."""
    alone = np.concatenate([greedy(image[None], 1, end) for image in images])
    np.testing.assert_array_equal(greedy(images, 1, end), alone)
    np.testing.assert_array_equal(greedy(images[::-1], 1, end), alone[::-1])


def test_after_its_end_a_caption_holds_nothing_but_ends(greedy, images, end):
    tokens = greedy(images, 1, end)
    ended = np.cumsum(tokens[:, 1:] == end, axis=1) > 0
    assert 0 < ended.sum() < ended.size
    assert (tokens[:, 1:][ended] == end).all()


def test_a_start_that_is_the_end_too_does_not_end_the_caption(greedy, logits, images):
    """GPT-2 starts and ends with the same id."""
    tokens = greedy(images, 1, 1)
    np.testing.assert_array_equal(tokens, [by_loop(logits, image, 1, 1) for image in images])
    assert (tokens[:, 1] != 1).any()


@pytest.fixture(scope="module")
def processor():
    processor = tiny_processor(CONFIG)
    assert processor.vocab_size == VOCAB  # the model can say no id that the vocabulary lacks
    return processor


def always(token: int):
    """A model that says `token` whatever it sees."""
    model = tiny_model(CONFIG)
    model.text.norm.scale[...] = jnp.zeros_like(model.text.norm.scale[...])
    kernel = jnp.zeros_like(model.text.vocab_head.kernel[...])
    model.text.vocab_head.kernel[...] = kernel.at[:, token].set(model.text.norm.bias[...])
    return model


def test_a_caption_that_ends_at_once_is_empty(processor, images):
    assert mammut.caption(always(processor.eos_id), processor, list(images), batch_size=4) == [""] * 6


def test_a_caption_that_never_ends_has_every_place_but_the_start(processor, images):
    word = processor.tokenizer.encode("one")[0]
    expected = processor.tokenizer.decode([word] * (LENGTH - 1))
    assert mammut.caption(always(word), processor, list(images[:1]), batch_size=4) == [expected]


def test_captions_are_the_texts_of_the_greedy_tokens_in_the_order_of_the_images(model, processor, greedy, images):
    captions = mammut.caption(model, processor, list(images), batch_size=6)
    assert captions == processor.decode(greedy(images, processor.bos_id, processor.eos_id))
    assert len(set(captions)) > 1


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_size_of_batches_changes_no_caption(model, processor, images, batch_size):
    """Of 4 and 2, the last batch is filled up with black images, which get no caption."""
    whole = mammut.caption(model, processor, list(images), batch_size=6)
    assert mammut.caption(model, processor, list(images), batch_size=batch_size) == whole


def test_no_images_have_no_captions(model, processor):
    assert mammut.caption(model, processor, []) == []


@pytest.mark.parametrize("num_beams", [0, 4])
def test_beams_are_refused_while_there_are_none(model, processor, images, num_beams):
    with pytest.raises(ValueError, match=f"num_beams is {num_beams}, expected 1"):
        mammut.caption(model, processor, list(images), num_beams=num_beams)


def test_an_image_that_cannot_be_read_is_refused(model, processor):
    with pytest.raises(mammut.BadImage, match="corrupt"):
        mammut.caption(model, processor, [b"not an image"])


def test_a_caption_holds_only_tokens_that_the_tokenizer_knows(images):
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, vocab_size=VOCAB + 40))
    model, processor = tiny_model(config, seed=1), tiny_processor(CONFIG)
    unknown = model.text.vocab_head.kernel
    unknown[...] = unknown[...].at[:, VOCAB:].multiply(50.0)  # what the tokenizer lacks is all the model wants to say
    graphdef, params = nnx.split(model)

    def greedy(vocab_size):
        run = jax.jit(lambda params, image: greedy_tokens(nnx.merge(graphdef, params), image, 1, 2, vocab_size))
        return np.asarray(run(params, images[:2]))

    assert greedy(None).max() >= VOCAB > greedy(VOCAB).max()
    assert len(mammut.caption(model, processor, list(images[:2]), batch_size=2)) == 2
