"""Generation against plain loops over the whole, uncached model and against exhaustive search."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mammut
from mammut.generate import GenerateConfig, filter_logits, generate
from mammut.testing import tiny_batch, tiny_config, tiny_model, tiny_processor

# What is here is compiled more than it is run.
pytestmark = pytest.mark.usefixtures("quick_compilation")

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
    run = jax.jit(lambda params, image, tokens: nnx.merge(graphdef, params).caption_logits(image, tokens))
    return functools.partial(run, params)


@pytest.fixture(scope="module")
def greedy(model):
    graphdef, params = nnx.split(model)


    @functools.partial(jax.jit, static_argnums=(2, 3))
    def run(params, image, bos_id, eos_id):
        prompt = jnp.full((len(image), 1), bos_id)
        return generate(nnx.merge(graphdef, params), image, prompt, prompt == bos_id, eos_id=eos_id).tokens[:, 0]

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


@pytest.mark.parametrize("num_beams, expected", [(0, "at least 1"), (VOCAB, "fewer than the 60")])
def test_impossible_numbers_of_beams_are_refused(model, processor, images, num_beams, expected):
    with pytest.raises(ValueError, match=f"num_beams is {num_beams}, expected {expected}"):
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
        @jax.jit
        def run(params, image):
            prompt = jnp.ones((2, 1), int)
            return generate(nnx.merge(graphdef, params), image, prompt, prompt > 0, eos_id=2, vocab_size=vocab_size)

        return np.asarray(run(params, images[:2]).tokens)

    assert greedy(None).max() >= VOCAB > greedy(VOCAB).max()
    assert len(mammut.caption(model, processor, list(images[:2]), batch_size=2)) == 2


@pytest.fixture(scope="module")
def generated(model):
    """`generate` for images and prompts (lists of ids), as NumPy arrays."""
    graphdef, params = nnx.split(model)

    @functools.partial(jax.jit, static_argnums=(4, 5))
    def run(params, image, prompt, valid, config, eos_id, keys):
        return generate(nnx.merge(graphdef, params), image, prompt, valid, config, eos_id=eos_id, keys=keys)

    def call(image, prompts, config, eos_id, keys=None):
        width = max(map(len, prompts))
        prompt = np.array([row + [9] * (width - len(row)) for row in prompts])
        valid = np.arange(width) < np.array([[len(row)] for row in prompts])
        return jax.tree.map(np.asarray, run(params, image, prompt, valid, config, eos_id, keys))

    return call


PROMPTS = [[1], [1, 7, 30, 2], [1, 44], [1, 7], [1, 5, 6, 8, 11], [1, 50, 51]]


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
    np.testing.assert_allclose(out.logprobs[:, 0], [logprobs for _, logprobs in expected], atol=1e-5)
    sums = [sum(logprobs) / max(1, np.count_nonzero(logprobs)) for _, logprobs in expected]
    np.testing.assert_allclose(out.scores[:, 0], sums, atol=1e-5)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_a_wide_beam_finds_what_trying_every_text_finds(length_penalty):
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, max_length=4, vocab_size=7))
    graphdef, params = nnx.split(tiny_model(config))
    images = tiny_batch(config, batch_size=3)["image"]
    texts = {text[: text.index(2) + 1] if 2 in text else text for text in itertools.product(range(7), repeat=3)}
    tokens = np.array([[1, *text, *[2] * (3 - len(text))] for text in sorted(texts)])
    lengths = np.array([len(text) for text in sorted(texts)])

    @jax.jit
    def every(params, image):
        image = jnp.broadcast_to(image, (len(tokens), *image.shape))
        logits = nnx.merge(graphdef, params).caption_logits(image, tokens)[:, :-1]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(tokens)[:, 1:, None], axis=2)[..., 0]

    @jax.jit
    def search(params, images):
        search = GenerateConfig(num_beams=6, length_penalty=length_penalty)
        prompt = jnp.ones((3, 1), int)
        return generate(nnx.merge(graphdef, params), images, prompt, prompt > 0, search, eos_id=2)

    found = search(params, images)
    for row, image in enumerate(images):
        logprobs = np.where(np.arange(3) < lengths[:, None], np.asarray(every(params, image)), 0)
        scores = logprobs.sum(1) / lengths**length_penalty
        best = np.argsort(-scores)[:3]
        np.testing.assert_array_equal(found.tokens[row, :3], tokens[best])
        np.testing.assert_allclose(found.scores[row, :3], scores[best], atol=1e-5)
        np.testing.assert_allclose(found.logprobs[row, :3, 1:], logprobs[best], atol=1e-5)


def test_beams_of_a_batch_are_those_of_its_images_one_by_one(generated, images, end):
    """Whatever the lengths of the prompts; and the best beam scores no worse than the greedy text."""
    search = GenerateConfig(num_beams=3)
    together = generated(images, PROMPTS, search, end)
    for row in range(len(images)):
        alone = generated(images[row : row + 1], PROMPTS[row : row + 1], search, end)
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
        np.testing.assert_allclose(together.scores[row], alone.scores[0], atol=1e-5)
    assert (np.diff(together.scores, axis=1) <= 0).all()


def test_diverse_groups_say_different_things(generated, images, end):
    """Without a penalty two groups are the same search twice; with one their first words differ."""
    same = generated(images, [[1]] * 6, GenerateConfig(num_beams=4, num_groups=2), end)
    assert all(len({tuple(beam) for beam in row}) == 2 for row in same.tokens.tolist())
    diverse = GenerateConfig(num_beams=2, num_groups=2, diversity_penalty=1e3)
    out = generated(images, [[1]] * 6, diverse, end)
    assert (out.tokens[:, 0, 1] != out.tokens[:, 1, 1]).all()
    # The penalty chooses, it does not count: scores are the model's log-probabilities.
    np.testing.assert_allclose(out.scores.max(1), out.scores[:, 0])
    assert (out.scores > -1e2).all()


@pytest.mark.parametrize("options", [
    {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4},
])  # fmt: skip
def test_sampling_narrowed_to_one_token_is_greedy(generated, images, end, options):
    keys = jax.random.split(jax.random.key(0), 6)
    out = generated(images, PROMPTS, GenerateConfig(**{"temperature": 1.0, **options}), end, keys)
    np.testing.assert_array_equal(out.tokens, generated(images, PROMPTS, GenerateConfig(), end).tokens)


def test_what_is_sampled_depends_on_the_key_of_the_row_alone(generated, images, end):
    keys, config = jax.random.split(jax.random.key(0), 6), GenerateConfig(temperature=1.5)
    together = generated(images, [[1]] * 6, config, end, keys)
    alone = [generated(images[i : i + 1], [[1]], config, end, keys[i : i + 1]).tokens[0] for i in range(6)]
    np.testing.assert_array_equal(together.tokens, alone)
    others = generated(images, [[1]] * 6, config, end, jax.random.split(jax.random.key(1), 6))
    assert (together.tokens != others.tokens).any()


def test_a_repetition_penalty_keeps_a_text_from_repeating_itself(generated, images):
    penalised = generated(images, [[1]] * 6, GenerateConfig(repetition_penalty=1e6), 59).tokens[:, 0]
    plain = generated(images, [[1]] * 6, GenerateConfig(), 59).tokens[:, 0]
    assert any(len(set(row)) < LENGTH for row in plain.tolist())
    for row in penalised.tolist():
        said = row[: row.index(59)] if 59 in row else row
        assert len(set(said)) == len(said)


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
    questions = ["one red circle", "one", "blue square on the left or right or left or right", "", "green", "on"]
    with pytest.raises(ValueError, match="the prompt has .* tokens, expected fewer than DecoderConfig.max_length 8"):
        mammut.answer(model, processor, list(images), questions)
    questions[2] = "blue"
    answers = mammut.answer(model, processor, list(images), questions, batch_size=4)
    one_by_one = [mammut.answer(model, processor, [i], [q], batch_size=1)[0] for i, q in zip(images, questions)]
    assert answers == one_by_one
    with pytest.raises(ValueError, match="5 prompts for 6 images"):
        mammut.answer(model, processor, list(images), questions[:5])
