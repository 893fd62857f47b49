"""Generation against plain loops over the whole, uncached model and against exhaustive search."""

import dataclasses
import functools
import itertools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from marks import long

import mammut
from mammut.config import MeshConfig
from mammut.core import sharding
from mammut.core.params import logical_axes
from mammut.generation.search import (
    Decoding,
    GenerateConfig,
    Generation,
    filter_logits,
    search,
)
from mammut.generation.text import _generate, generate, generate_text
from mammut.testing import tiny_batch, tiny_config, tiny_model, tiny_processor

# What is here is compiled more than it is run.
CONFIG = dataclasses.replace(
    tiny_config(), text=dataclasses.replace(tiny_config().text, tie_embeddings=False, max_length=8)
)
LENGTH, VOCAB = CONFIG.text.max_length, CONFIG.text.vocab_size


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
    run = jax.jit(
        lambda params, image, tokens: nnx.merge(graphdef, params).caption_logits(image, tokens)
    )
    return functools.partial(run, params)


def padded(prompts, width):
    """Prompts (lists of ids) as `prompt` and `prompt_valid`."""
    prompt = np.array([row + [9] * (width - len(row)) for row in prompts])
    return prompt, np.arange(width) < np.array([[len(row)] for row in prompts])


@pytest.fixture(scope="module")
def generated(model):
    """`generate` for images and prompts (lists of ids), as NumPy arrays."""
    graphdef, params = nnx.split(model)

    @functools.partial(jax.jit, static_argnums=(4, 5))
    def run(params, image, prompt, valid, config, eos_id):
        return generate(nnx.merge(graphdef, params), image, prompt, valid, config, eos_id=eos_id)

    def call(image, prompts, config, eos_id, width=7, params=params):
        return jax.tree.map(np.asarray, run(params, image, *padded(prompts, width), config, eos_id))

    return call


@pytest.fixture(scope="module")
def greedy(generated):
    """Greedy tokens from a start alone, int[B, L]."""
    return lambda image, bos_id, eos_id: generated(
        image, [[bos_id]] * len(image), GenerateConfig(), eos_id, width=1
    ).tokens[:, 0]


def by_loop(logits, image, bos_id, eos_id):
    """One image: the likeliest token after all tokens so far, until the end or the last place."""
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
    assert len(set(where)) >= 3 and max(where) >= LENGTH - 1, (
        "the model's captions are too alike for these tests"
    )
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


def test_a_caption_that_ends_at_once_is_empty_and_has_the_probability_of_its_end(processor, images):
    model = always(processor.eos_id)
    # All other tokens share a logit of 0.
    logit = float((model.text.norm.bias[...] ** 2).sum())
    logprob = logit - math.log(math.exp(logit) + VOCAB - 1)
    for found in generate_text(model, processor, images):
        assert found.text == ""
        assert found.token_logprobs == (found.logprob,) == pytest.approx((logprob,), abs=1e-5)


def test_a_caption_that_never_ends_has_every_place_but_the_start(processor, images):
    word = processor.tokenizer.encode("one")[0]
    expected = processor.tokenizer.decode([word] * (LENGTH - 1))
    assert mammut.caption(always(word), processor, list(images[:1]), batch_size=4) == [expected]


def test_captions_are_the_texts_of_the_greedy_tokens_in_the_order_of_the_images(
    model, processor, greedy, images
):
    captions = mammut.caption(model, processor, list(images), batch_size=6)
    assert captions == processor.decode(greedy(images, processor.bos_id, processor.eos_id))
    assert len(set(captions)) > 1


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_size_of_batches_changes_no_caption(model, processor, images, batch_size):
    """Of 4 and 2, the last batch is filled up with images that get no caption."""
    whole = mammut.caption(model, processor, list(images), batch_size=6)
    assert mammut.caption(model, processor, list(images), batch_size=batch_size) == whole


def test_batches_have_one_shape_and_few_images_a_small_one(model, processor, images):
    """Each new shape would be compiled anew."""

    def compiled(num_images, batch_size, prompts=None):
        before = _generate._cache_size()
        config = GenerateConfig(max_new_tokens=3)
        texts = generate_text(
            model, processor, images[:num_images], prompts, config, batch_size=batch_size
        )
        assert len(texts) == num_images and all(
            1 <= len(found.token_logprobs) <= 3 for found in texts
        )
        return _generate._cache_size() - before

    assert compiled(5, batch_size=2) == 1  # two batches and a half
    assert compiled(2, batch_size=32) == 0  # two images are a batch of 2
    assert compiled(3, batch_size=2, prompts=["", "one red", "one"]) == 1
    # 3 and 4 tokens with the start
    assert compiled(3, batch_size=2, prompts=["one", "red", "one red circle"]) == 0


def test_no_images_have_no_captions(model, processor):
    assert mammut.caption(model, processor, []) == []


@pytest.mark.parametrize(
    "num_beams, expected",
    [(0, "a whole number from 1 to 4096"), (VOCAB, "fewer than the 60")],
)
def test_impossible_numbers_of_beams_are_refused(model, processor, images, num_beams, expected):
    with pytest.raises(ValueError, match=f"num_beams is {num_beams}, expected {expected}"):
        mammut.caption(model, processor, list(images), num_beams=num_beams)


def test_an_image_that_cannot_be_read_is_refused(model, processor):
    with pytest.raises(mammut.BadImage, match="corrupt"):
        mammut.caption(model, processor, [b"not an image"])


def test_a_caption_holds_only_tokens_that_the_tokenizer_knows(images):
    config = dataclasses.replace(
        CONFIG, text=dataclasses.replace(CONFIG.text, vocab_size=VOCAB + 40)
    )
    model, processor = tiny_model(config, seed=1), tiny_processor(CONFIG)
    unknown = model.text.vocab_head.kernel
    # what the tokenizer lacks is all the model wants to say
    unknown[...] = unknown[...].at[:, VOCAB:].multiply(50.0)

    @jax.jit
    def wanted(image):
        prompt = jnp.ones((2, 1), int)
        return generate(model, image, prompt, prompt > 0, eos_id=2).tokens

    assert (wanted(images[:2])[:, 0, 1:] >= VOCAB).any(1).all()
    # to decode an unknown id is an error
    assert len(mammut.caption(model, processor, images[:2])) == 2


# The fifth leaves one place.
PROMPTS = [[1], [1, 7, 30, 2], [1, 44], [1, 7], [1, 5, 6, 8, 11, 12, 13], [1, 50, 51]]


def continued(logits, image, prompt, end):
    """`by_loop` from a prompt; and the log-probability of every token said."""
    tokens, logprobs = list(prompt), [0.0] * len(prompt)
    while len(tokens) < LENGTH and (len(tokens) == len(prompt) or tokens[-1] != end):
        text = np.array([tokens + [7] * (LENGTH - len(tokens))], np.int32)
        row = np.asarray(jax.nn.log_softmax(logits(image[None], text)[0, len(tokens) - 1]))
        tokens.append(int(row.argmax()))
        logprobs.append(float(row.max()))
    rest = LENGTH - len(tokens)
    return tokens + [end] * rest, logprobs + [0.0] * rest


def test_prompts_of_differing_length_go_on_as_each_would_alone(generated, logits, images, end):
    """An end token inside a prompt ends nothing."""
    out = generated(images, PROMPTS, GenerateConfig(), end)
    expected = [continued(logits, image, prompt, end) for image, prompt in zip(images, PROMPTS)]
    np.testing.assert_array_equal(out.tokens[:, 0], [tokens for tokens, _ in expected])
    np.testing.assert_allclose(
        out.logprobs[:, 0], [logprobs for _, logprobs in expected], atol=1e-5
    )
    num_tokens = np.array([np.count_nonzero(logprobs) for _, logprobs in expected])
    np.testing.assert_array_equal(out.num_tokens[:, 0], num_tokens)
    sums = [sum(logprobs) / count for (_, logprobs), count in zip(expected, num_tokens)]
    np.testing.assert_allclose(out.scores[:, 0], sums, atol=1e-5)


def test_a_text_ends_at_most_at_its_limit_whatever_the_length_of_its_prompt(generated, images, end):
    """Two tokens: those that it starts with without a limit, and their probabilities."""
    free = generated(images, PROMPTS, GenerateConfig(), end)
    out = generated(images[:4], PROMPTS[:4], GenerateConfig(max_new_tokens=2), end, width=4)
    assert out.tokens.shape == (4, 1, 4 + 2) and out.steps == 4 + 2 - 1
    for row, prompt in enumerate(PROMPTS[:4]):
        count = min(2, free.num_tokens[row, 0])
        assert out.num_tokens[row, 0] == count
        said = free.tokens[row, 0, : len(prompt) + count].tolist()
        assert out.tokens[row, 0].tolist() == said + [end] * (6 - len(said))
        logprobs = free.logprobs[row, 0, len(prompt) : len(prompt) + count]
        np.testing.assert_allclose(out.scores[row, 0], logprobs.mean(), atol=1e-5)


def test_a_prompt_of_nothing_but_pads_is_its_start_token(generated, images, end):
    nothing = generated(images, [[]] * 6, GenerateConfig(), end)  # pads are 9
    np.testing.assert_array_equal(
        nothing.tokens, generated(images, [[9]] * 6, GenerateConfig(), end).tokens
    )


def every_text(vocab_size, end, most=3):
    """All texts of at most three tokens: int[N, 1 + 3], start and ends included; their lengths."""
    texts = itertools.product(range(vocab_size), repeat=most)
    texts = sorted({text[: text.index(end) + 1] if end in text else text for text in texts})
    tokens = np.array([[1, *text, *[end] * (most - len(text))] for text in texts])
    return tokens, np.array([len(text) for text in texts])


def check_best(found, row, tokens, lengths, logprobs, length_penalty):
    """The first three of a search are the best three of all texts, by these log-probabilities."""
    logprobs = np.where(np.arange(3) < lengths[:, None], logprobs, 0)
    scores = logprobs.sum(1) / lengths**length_penalty
    best = np.argsort(-scores)[:3]
    np.testing.assert_array_equal(found.tokens[row, :3, :4], tokens[best])
    np.testing.assert_allclose(found.scores[row, :3], scores[best], atol=1e-5)
    np.testing.assert_allclose(found.logprobs[row, :3, 1:4], logprobs[best], atol=1e-5)
    np.testing.assert_array_equal(found.num_tokens[row, :3], lengths[best])


def test_a_wide_beam_finds_what_trying_every_text_finds():
    text = dataclasses.replace(CONFIG.text, max_length=6, vocab_size=7)
    config = dataclasses.replace(CONFIG, text=text)
    # its best texts differ from the first token on
    graphdef, params = nnx.split(tiny_model(config, seed=1))
    images = tiny_batch(config, batch_size=3)["image"]
    tokens, lengths = every_text(7, end=2)

    @jax.jit
    def every(params, image):
        image = jnp.broadcast_to(image, (len(tokens), *image.shape))
        logits = nnx.merge(graphdef, params).caption_logits(image, tokens)[:, :-1]
        return jnp.take_along_axis(
            jax.nn.log_softmax(logits), jnp.asarray(tokens)[:, 1:, None], axis=2
        )[..., 0]

    @jax.jit
    def search(params, images):
        prompt = jnp.ones((3, 1), int)
        config = GenerateConfig(max_new_tokens=3, num_beams=6)
        return generate(nnx.merge(graphdef, params), images, prompt, prompt > 0, config, eos_id=2)

    found = search(params, images)
    for row, image in enumerate(images):
        check_best(found, row, tokens, lengths, np.asarray(every(params, image)), length_penalty=1)


def test_beams_of_a_batch_are_those_of_its_images_one_by_one(generated, images, end):
    """Whatever the lengths of the prompts."""
    search = GenerateConfig(num_beams=4)
    together = generated(images, PROMPTS, search, end)
    for row in range(len(images)):
        alone = generated(images[row : row + 1], PROMPTS[row : row + 1], search, end)
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
        np.testing.assert_allclose(together.scores[row], alone.scores[0], atol=1e-5)
    assert (np.diff(together.scores, axis=1) <= 0).all()


# --- how tokens are chosen, by a model whose logits depend on the row and its last token alone


TABLE = 2 * np.random.default_rng(0).normal(size=(6, VOCAB, VOCAB)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=1)
def search_table(table, config, keys):
    def step(text, position, row):
        return table[row, text[:, position]], row

    def take(row, beam):
        return jnp.take_along_axis(row.reshape(len(beam), -1), beam, axis=1).reshape(-1)

    start, rows = jnp.full((len(table), LENGTH), 2).at[:, 0].set(1), jnp.arange(len(table))
    return search(
        Decoding(step, take, rows), start, jnp.ones_like(rows), config, eos_id=2, keys=keys
    )


def by_table(config, table=TABLE, keys=None):
    """`search` with logits `table[row, last token]`; start token 1, end token 2."""
    return jax.tree.map(np.asarray, search_table(jnp.asarray(table, jnp.float32), config, keys))


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 2.0])
def test_the_length_penalty_divides_by_its_power_of_the_length(length_penalty):
    table = TABLE[:, :7, :7]
    found = by_table(GenerateConfig(3, num_beams=6, length_penalty=length_penalty), table)
    tokens, lengths = every_text(7, end=2)
    logprobs = table - np.log(np.exp(table).sum(2, keepdims=True))
    for row in range(6):
        check_best(
            found,
            row,
            tokens,
            lengths,
            logprobs[row, tokens[:, :-1], tokens[:, 1:]],
            length_penalty,
        )


def test_diverse_groups_say_different_things():
    """Without a penalty two groups are the same search twice; with one their first words differ."""
    same = by_table(GenerateConfig(num_beams=4, num_groups=2))
    np.testing.assert_array_equal(same.tokens[:, ::2], same.tokens[:, 1::2])
    np.testing.assert_array_equal(same.tokens[:, ::2], by_table(GenerateConfig(num_beams=2)).tokens)
    out = by_table(GenerateConfig(num_beams=2, num_groups=2, diversity_penalty=1e3))
    assert (out.tokens[:, 0, 1:5] != out.tokens[:, 1, 1:5]).all()


def test_a_diversity_penalty_chooses_but_does_not_count():
    """Scores are the model's log-probabilities, even of tokens chosen in spite of a penalty."""
    out = by_table(GenerateConfig(num_beams=2, num_groups=2, diversity_penalty=0.3))
    assert (out.tokens[:, 0, 1:5] == out.tokens[:, 1, 1:5]).any() and (
        out.tokens[:, 0] != out.tokens[:, 1]
    ).any()
    assert (np.diff(out.scores, axis=1) <= 0).all()
    logprobs = TABLE - np.log(np.exp(TABLE).sum(2, keepdims=True))
    for row, beam in np.ndindex(6, 2):
        text = out.tokens[row, beam, : 1 + out.num_tokens[row, beam]]
        assert out.scores[row, beam] == pytest.approx(
            logprobs[row, text[:-1], text[1:]].mean(), abs=1e-5
        )


@pytest.mark.parametrize("options", [
    {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-6},
])  # fmt: skip
def test_sampling_narrowed_to_one_token_is_greedy(options):
    out = by_table(
        GenerateConfig(**{"temperature": 1.0, **options}),
        keys=jax.random.split(jax.random.key(0), 6),
    )
    np.testing.assert_array_equal(out.tokens, by_table(GenerateConfig()).tokens)


def test_sampled_tokens_are_as_frequent_as_they_are_likely():
    probs, keys = (
        np.array([0.1, 0.2, 0.3, 0.4], np.float32),
        jax.random.split(jax.random.key(0), 4000),
    )
    out = by_table(GenerateConfig(1, temperature=2.0), np.tile(np.log(probs), (4000, 4, 1)), keys)
    shares = np.bincount(out.tokens[:, 0, 1], minlength=4) / 4000
    np.testing.assert_allclose(shares, probs**0.5 / (probs**0.5).sum(), atol=0.03)


def test_what_is_sampled_depends_on_the_key_of_the_row_alone():
    keys, config = jax.random.split(jax.random.key(0), 6), GenerateConfig(temperature=1.5)
    together = by_table(config, keys=keys)
    for row in (0, 5):
        alone = by_table(config, TABLE[row : row + 1], keys[row : row + 1])
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
    assert (
        together.tokens != by_table(config, keys=jax.random.split(jax.random.key(1), 6)).tokens
    ).any()


def test_what_is_sampled_for_an_image_does_not_depend_on_the_size_of_batches(
    model, processor, images
):
    config = GenerateConfig(max_new_tokens=2, temperature=1.5)
    texts = generate_text(model, processor, images, config=config, batch_size=4, seed=3)
    assert texts[4:] != texts[:2]
    again = generate_text(model, processor, images, config=config, seed=3)
    np.testing.assert_equal([found.text for found in again], [found.text for found in texts])


def test_a_repetition_penalty_keeps_a_text_from_repeating_itself():
    table = np.abs(TABLE) + 6 * np.eye(VOCAB)  # a token is likely to follow itself
    table[:, :, 2] = -99

    def repeats(config):
        return [LENGTH - len(set(row)) for row in by_table(config, table).tokens[:, 0].tolist()]

    assert min(repeats(GenerateConfig())) > 0
    # the start is not repeated either
    assert max(repeats(GenerateConfig(repetition_penalty=1e6))) == 0


def test_a_limit_beyond_the_last_place_changes_nothing():
    limited, free = (by_table(GenerateConfig(limit, num_beams=2)) for limit in (99, None))
    np.testing.assert_array_equal(limited.tokens, free.tokens)
    np.testing.assert_array_equal(limited.scores, free.scores)


def test_filters_keep_what_their_definitions_keep():
    """Probabilities .4 .3 .2 .1, out of order: .1 .4 .2 .3."""
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))

    def kept(**options):
        return np.isfinite(np.asarray(filter_logits(logits, **options)))[0].tolist()

    assert kept() == [True] * 4
    assert kept(top_k=2) == [False, True, False, True]
    assert kept(top_p=0.5) == [False, True, False, True]  # .4 does not reach it, .4 + .3 does
    assert kept(top_p=0.39) == [False, True, False, False]
    assert kept(top_p=0.95) == [True] * 4
    assert kept(min_p=0.6) == [False, True, False, True]  # at least .6 of .4
    assert kept(top_k=3, min_p=0.6) == kept(min_p=0.6)


def test_an_answer_does_not_repeat_its_question(model, processor, images):
    questions = ["one red circle", "one red", "green circle on"]
    answers = mammut.answer(model, processor, images[:3], questions, batch_size=2)
    one_by_one = [mammut.answer(model, processor, [i], [q])[0] for i, q in zip(images, questions)]
    assert answers == one_by_one
    assert not any(answer.startswith("one red") for answer in answers)


def test_prompts_that_cannot_be_continued_are_refused(model, processor, images):
    long = "blue square on the left or right or left or right"
    expected = (
        f"prompt 1, '{long}', has 15 tokens with the start, expected fewer than the 8 for which "
        "DecoderConfig.max_length 8 has room"
    )
    with pytest.raises(ValueError, match=f"^{expected}$"):
        mammut.answer(model, processor, images[:2], ["one", long])
    with pytest.raises(ValueError, match="^there are 5 prompts for 6 images$"):
        mammut.answer(model, processor, images, ["one"] * 5)
    alone = r"^questions is one str 'onered', expected a list of str: give \[...\]$"
    with pytest.raises(ValueError, match=alone):
        mammut.answer(model, processor, images, "onered")


def test_the_processor_of_another_model_is_refused(model, images):
    larger = tiny_processor(
        dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, vocab_size=64))
    )
    with pytest.raises(
        ValueError,
        match="^the processor's vocabulary has 64 ids, DecoderConfig.vocab_size .* is 60",
    ):
        mammut.caption(model, larger, images)


def test_a_batch_of_no_images_at_a_time_is_refused(model, processor, images):
    with pytest.raises(
        ValueError, match="^batch_size is 0, expected a whole number from 1 to 1048576$"
    ):
        mammut.caption(model, processor, images, batch_size=0)


def test_a_text_has_the_log_probabilities_of_its_tokens(model, processor, logits, images):
    prompts = ["one red circle", "one red", "green circle on"]
    for image, text, found in zip(
        images, prompts, generate_text(model, processor, images[:3], prompts, batch_size=2)
    ):
        prompt = [processor.bos_id, *processor.encode_prompt(text)]
        tokens, logprobs = continued(logits, image, prompt, processor.eos_id)
        logprobs = [logprob for logprob in logprobs if logprob]
        assert found.text == processor.tokenizer.decode(tokens[len(prompt) :])
        np.testing.assert_allclose(found.token_logprobs, logprobs, atol=1e-5)
        assert found.logprob == pytest.approx(sum(logprobs), abs=1e-4)


# --- what a search costs


def test_the_loop_stops_when_every_text_has_ended(generated, images, end):
    out = generated(images, [[1]] * 6, GenerateConfig(), end)
    assert out.steps == out.num_tokens.max()
    first = out.num_tokens[:, 0].argmin()
    assert (
        generated(images[[first] * 6], [[1]] * 6, GenerateConfig(), end).steps
        == out.num_tokens.min()
        < out.steps
    )


@pytest.mark.parametrize("config, steps", [
    (GenerateConfig(), 1),
    # After two tokens there are three ended texts that no longer one can beat, without a length to
    # be divided by.
    (GenerateConfig(num_beams=3, length_penalty=0.0), 2),
])  # fmt: skip
def test_a_search_whose_texts_end_early_is_short(generated, images, config, steps):
    out = generated(images, [[1]] * 6, config, 2, width=1, params=nnx.state(always(2)))
    assert out.steps == steps
    assert (out.tokens[:, 0, 1:] == 2).all() and (out.num_tokens[:, 0] == 1).all()


def test_beams_share_the_keys_and_values_of_their_image(model, images):
    """In the whole program nothing has an axis of image tokens and one of images x beams."""
    graphdef, params = nnx.split(model)

    def shapes(num_beams):
        def run(params, image):
            prompt, config = jnp.ones((5, 1), int), GenerateConfig(num_beams=num_beams)
            return generate(
                nnx.merge(graphdef, params), image, prompt, prompt > 0, config, eos_id=2
            )

        text = jax.jit(run).lower(params, images[:5]).as_text()
        return {
            tuple(map(int, dims[:-1].split("x")))
            for dims in re.findall(r"tensor<((?:\d+x)+)", text)
        }

    patches, heads, head_size = 4, 3, 16
    assert (5, patches, heads, head_size) in shapes(7)
    assert not {shape for shape in shapes(7) if 35 in shape and patches in shape}
    assert (35, LENGTH, heads, head_size) in shapes(7)


# --- on a mesh


@pytest.mark.long
@pytest.mark.parametrize("mesh, num_beams", [
    long(MeshConfig(data=1, fsdp=8), 1), (MeshConfig(data=2, fsdp=2, model=2), 4),
])  # fmt: skip
def test_a_mesh_of_devices_says_what_one_device_says(
    model, generated, images, end, mesh, num_beams
):
    config, rows, mesh = (
        GenerateConfig(num_beams=num_beams),
        [0, 1, 2, 3, 4, 5, 0, 1],
        sharding.make_mesh(mesh),
    )
    expected = generated(images, PROMPTS, config, end)
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    params = jax.device_put(params, sharding.param_shardings(params, logical_axes(model), mesh))
    prompt, valid = padded(PROMPTS, 7)
    batch = sharding.device_batch(
        {"image": images[rows], "prompt": prompt[rows], "valid": valid[rows]}, mesh
    )

    @jax.jit
    def run(params, image, prompt, valid):
        out = generate(nnx.merge(graphdef, params), image, prompt, valid, config, eos_id=end)
        return out.tokens, out.logprobs, out.scores

    with jax.set_mesh(mesh):
        program = run.lower(params, *batch.values()).compile()
        tokens, logprobs, scores = program(params, *batch.values())
    np.testing.assert_array_equal(tokens, expected.tokens[rows])
    np.testing.assert_allclose(logprobs, expected.logprobs[rows], atol=1e-5)
    np.testing.assert_allclose(scores, expected.scores[rows], atol=1e-5)
    # A device keeps the cache of its rows when beams change places: it is in nothing that devices
    # exchange.
    exchanges = re.findall(
        r".*(?:all-gather|all-reduce|all-to-all|collective-permute)\(.*", program.as_text()
    )
    places, heads, head_size = LENGTH, 3, 16
    assert exchanges and not [
        line for line in exchanges if f",{places},{heads},{head_size}]" in line
    ]


# --- what cannot be generated


@pytest.mark.long
def test_a_model_that_diverged_says_nothing_and_is_named(processor, images, generated):
    """Its logits are NaN: the text ends there, at a score of minus infinity."""
    diverged = tiny_model(CONFIG, seed=1)
    diverged.text.norm.bias[...] = jnp.full(48, jnp.nan)
    for config in (GenerateConfig(), GenerateConfig(num_beams=3, length_penalty=0.0)):
        out = generated(images, [[1]] * 6, config, 2, width=1, params=nnx.state(diverged))
        assert out.steps == 1 and (out.tokens[:, :, 1:] == 2).all()
        assert (out.scores == -np.inf).all()
    with pytest.raises(
        ValueError, match="^the model's logits for image 0 are not numbers: .* training diverged$"
    ):
        mammut.caption(diverged, processor, images, batch_size=6)
    sampling = GenerateConfig(temperature=0.5, top_k=3)
    for config in (GenerateConfig(num_beams=3), sampling):
        with pytest.raises(ValueError, match="^the model's logits for image 0 are not numbers"):
            generate_text(diverged, processor, images, config=config, batch_size=6)


@pytest.mark.parametrize("num_groups", [1, 2])
def test_an_image_whose_search_meets_logits_that_are_not_numbers_has_no_text(num_groups):
    """Its first token is scored by numbers, so that a beam has ended when the rest breaks."""
    config = GenerateConfig(num_beams=4, num_groups=num_groups)
    table = np.full((2, 9, 9), -1.0, np.float32)
    table[:, 1, 2] = 0.0  # the end, after the start
    expected = by_table(config, table)
    table[1, np.arange(9) != 1] = np.nan
    out = by_table(config, table)
    assert (out.scores[1] == -np.inf).all() and np.isfinite(expected.scores).all()
    np.testing.assert_array_equal(out.scores[0], expected.scores[0])


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_whose_logits_are_not_numbers_changes_no_other(num_beams, bad):
    config, table = GenerateConfig(num_beams=num_beams), TABLE.copy()
    expected = by_table(config, table)
    table[2, :, 7] = bad
    out, others = by_table(config, table), np.arange(6) != 2
    np.testing.assert_array_equal(out.tokens[others], expected.tokens[others])
    np.testing.assert_array_equal(out.scores[others], expected.scores[others])
    assert (out.scores[2] == -np.inf).all() and (out.tokens[2, :, 1:] == 2).all()


def test_texts_that_do_not_exist_have_a_score_of_minus_infinity():
    """Of one token, of which three can be said: three texts for four beams."""
    table = np.where(np.arange(5) < 3, 0.0, -np.inf) * np.ones((1, 5, 1), np.float32)
    scores = by_table(GenerateConfig(1, num_beams=4), table).scores
    np.testing.assert_allclose(scores[0, :3], -math.log(3), atol=1e-6)
    assert scores[0, 3] == -np.inf


@pytest.mark.parametrize("rows, config, expected", [
    (0, {}, "there are 0 prompts for 0 images, expected one each, and at least one"),
    (1, {"temperature": 0.5},
     "GenerateConfig.temperature is 0.5, expected a key for each row with it"),
])  # fmt: skip
def test_what_no_text_can_be_made_of_is_refused(model, images, rows, config, expected):
    prompt = jnp.ones((rows, 1), int)
    with pytest.raises(ValueError, match=f"^{expected}$"):
        generate(model, images[:rows], prompt, prompt > 0, GenerateConfig(**config), eos_id=2)


@pytest.mark.parametrize("field, value, others", [
    ("max_new_tokens", 0, {}),
    ("max_new_tokens", True, {}),
    ("max_new_tokens", 2**40, {}),
    ("num_beams", 2.0, {}),
    ("num_beams", 2**31, {}),
    ("num_groups", 2.0, {"num_beams": 4}),
    ("length_penalty", True, {}),
    ("diversity_penalty", float("inf"), {"num_beams": 2, "num_groups": 2}),
    ("temperature", float("inf"), {}),
    ("temperature", None, {}),
    ("top_k", 2**31, {"temperature": 1.0}),
    ("top_k", 1.0, {"temperature": 1.0}),
    ("top_p", None, {"temperature": 1.0}),
    ("repetition_penalty", float("inf"), {}),
    ("repetition_penalty", float("nan"), {}),
    ("num_beams", 0, {}),
    ("length_penalty", float("nan"), {}),
    ("num_groups", 2, {"num_beams": 3}),
    ("diversity_penalty", -1.0, {"num_beams": 2, "num_groups": 2}),
    ("temperature", float("nan"), {}),
    ("top_k", -1, {"temperature": 1.0}),
    ("top_p", 0.0, {"temperature": 1.0}),
    ("min_p", 1.5, {"temperature": 1.0}),
    ("repetition_penalty", 0.0, {}),
    # What would do nothing:
    ("diversity_penalty", 1.0, {"num_beams": 2}),
    ("temperature", 1.0, {"num_beams": 2}),
    ("repetition_penalty", 2.0, {"num_beams": 2}),
    ("top_k", 5, {}),
    ("top_p", 0.9, {}),
    ("min_p", 0.1, {}),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused_by_name(as_users_have_it, field, value, others):
    with pytest.raises(ValueError, match=f"^GenerateConfig.{field} is {value}, expected "):
        GenerateConfig(**{field: value, **others})


_NUMBERS = st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=2)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(
        st.sampled_from([field.name for field in dataclasses.fields(GenerateConfig)]), _NUMBERS
    )
)
def test_any_settings_are_taken_as_they_are_or_refused_by_name(as_users_have_it, values):
    try:
        config = GenerateConfig(**values)
    except ValueError as error:
        assert re.match(r"GenerateConfig\.\w+ is .*, expected ", str(error))
        return
    assert json.loads(json.dumps(vars(config), allow_nan=False)) == vars(config)


def test_numbers_of_numpy_are_taken_and_kept_as_pythons(as_users_have_it):
    for kind in (np.int8, np.uint64, int):
        config = GenerateConfig(max_new_tokens=kind(5), num_beams=kind(4), num_groups=kind(2))
        assert [type(value) for value in vars(config).values()].count(int) == 4
        assert config == GenerateConfig(max_new_tokens=5, num_beams=4, num_groups=2)
    for kind in (np.float16, np.float32, np.float64, float):
        config = GenerateConfig(temperature=kind(0.5), top_p=kind(0.25), top_k=np.int32(3))
        assert json.dumps(vars(config)) == json.dumps(
            vars(GenerateConfig(temperature=0.5, top_p=0.25, top_k=3))
        )
    for wrong in (np.float32(2), np.bool_(True), np.array(2), np.complex64(2)):
        with pytest.raises(ValueError, match="^GenerateConfig.num_beams is "):
            GenerateConfig(num_beams=wrong)
    with pytest.raises(ValueError, match="^GenerateConfig.temperature is nan"):
        GenerateConfig(temperature=np.float32("nan"))


def test_a_whole_length_penalty_is_taken_whatever_its_sign(as_users_have_it):
    for penalty in (-10, np.int64(-1)):
        expected = by_table(GenerateConfig(num_beams=3, length_penalty=float(penalty)), TABLE)
        found = by_table(GenerateConfig(num_beams=3, length_penalty=penalty), TABLE)
        np.testing.assert_array_equal(found.tokens, expected.tokens)


@pytest.mark.parametrize("name, value, expected", [
    ("batch_size", 0, "a whole number from 1 to"),
    ("batch_size", 2.0, "a whole number from 1 to"),
    ("batch_size", True, "a whole number from 1 to"),
    ("batch_size", 2**40, "a whole number from 1 to"),
    ("seed", 2**80, "a whole number from "),
    ("seed", 0.5, "a whole number from "),
    ("config", {"num_beams": 2}, "a GenerateConfig"),
])  # fmt: skip
def test_numbers_beside_the_settings_are_refused_by_name(
    as_users_have_it, model, processor, images, name, value, expected
):
    given = f"^{name} is {re.escape(repr(value))}, expected {expected}"
    with pytest.raises(ValueError, match=given):
        generate_text(model, processor, images, **{name: value})


# --- whatever is given


@pytest.fixture
def without_a_search(monkeypatch, as_users_have_it):
    """Ends every text at once, so that nothing is compiled."""

    def ended(graphdef, params, image, prompt, prompt_valid, config, *, eos_id, vocab_size, keys):
        assert image.dtype == np.uint8 and len(image) == len(prompt) == len(prompt_valid)
        tokens = np.full((len(prompt), 1, prompt.shape[1] + 1), eos_id)
        ones = np.ones((len(prompt), 1))
        return Generation(tokens, np.zeros(tokens.shape), ones.astype(int), -ones, np.ones(()))

    monkeypatch.setattr("mammut.generation.text._generate", ended)


def test_any_list_of_images_and_questions_is_one(without_a_search, model, processor, images):
    for some in (list(images), iter(images), tuple(images), jnp.asarray(images), images):
        assert mammut.caption(model, processor, some) == [""] * 6
    assert mammut.caption(model, processor, images, batch_size=np.int64(4)) == [""] * 6
    assert len(generate_text(model, processor, images, seed=np.uint32(4))) == 6
    for some in (["red"] * 6, ("red",) * 6, iter(["red"] * 6), np.array(["red"] * 6)):
        assert mammut.answer(model, processor, images, some, prompt="one {}") == [""] * 6


@pytest.mark.parametrize("prompt", ["{}", "Q: {} A:"])
@pytest.mark.parametrize("questions", ["why", "why???", b"why", 3, None, {"why": 1}])
def test_a_question_alone_is_no_list_of_letters(
    without_a_search, model, processor, images, questions, prompt
):
    with pytest.raises(ValueError, match="^questions is one .*, expected a list of str"):
        mammut.answer(model, processor, images, questions, prompt=prompt)


def test_a_model_and_its_processor_are_expected(without_a_search, model, processor, images):
    for first, second in (("runs/x", processor), (model, None), (processor, model)):
        with pytest.raises(ValueError, match="mammut.load returns both"):
            mammut.caption(first, second, images)


PIXELS = np.zeros((3, 5, 3), np.uint8)
JUNK = st.none() | st.integers() | st.binary(max_size=3) | st.text(max_size=3)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(st.just(PIXELS) | JUNK, max_size=3) | JUNK | st.just(PIXELS),
    st.lists(st.text(max_size=3) | JUNK, max_size=3) | JUNK,
    JUNK | st.just("{}") | st.just("Q: {}"),
    JUNK | st.integers(-1, 3),
    JUNK | st.integers(-1, 3),
)
def test_whatever_is_asked_is_answered_or_refused(
    without_a_search, model, processor, some, questions, prompt, num_beams, batch_size
):
    options = {"num_beams": num_beams, "batch_size": batch_size}
    for ask in (
        lambda: mammut.caption(model, processor, some, **options),
        lambda: mammut.answer(model, processor, some, questions, prompt=prompt, **options),
        lambda: generate_text(model, processor, some, questions, seed=num_beams),
    ):
        try:
            texts = ask()
        except ValueError:
            continue
        assert len(texts) == len(some)
