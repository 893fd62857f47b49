"""Prompts of images and texts, alone and in batches, against full passes over their embeddings."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prefix_models import IMAGES, prefix_config, prefix_model, prefix_processor

import mammut
from mammut.config import VideoConfig
from mammut.data.video import Clip, VideoTransform
from mammut.generation.interleaved import (
    encode_prompt,
    generate_interleaved,
    interleave,
    padded_size,
    prompt_batch,
)
from mammut.generation.search import GenerateConfig, Generation
from mammut.testing import tiny_config, tiny_model, tiny_processor

TEN = GenerateConfig(max_new_tokens=10)
# The first two share a batch, with one image and two, and 24 and 21 tokens; the others have none
# and one.
PROMPTS = [
    [IMAGES[0], "Q: what? A: red", IMAGES[1], "Q: where? A:"],
    ["one red circle", IMAGES[2], "on the left", "Q: where? A:"],
    ["one blue"],
    [IMAGES[2]],
]


@pytest.fixture(scope="module")
def model():
    return prefix_model()


@pytest.fixture(scope="module")
def processor():
    return prefix_processor()


@pytest.fixture(scope="module")
def batched(model, processor):
    return mammut.generate_prompts(model, processor, PROMPTS, TEN)


@pytest.fixture(scope="module")
def next_logits(model, processor):
    """Log-probabilities of the token after a prompt and `said` ids, from one pass over all."""
    graphdef, params = nnx.split(model)

    @jax.jit
    def full_pass(params, embeddings):
        decoder = nnx.merge(graphdef, params).text
        return jax.nn.log_softmax(
            decoder.logits(decoder.causal_pass(embeddings[None]))[0, :, : processor.vocab_size]
        )

    seen = jax.jit(lambda params, image: nnx.merge(graphdef, params).image_tokens(image).tokens)(
        params, IMAGES
    )
    seen = {image.tobytes(): np.asarray(own) for image, own in zip(IMAGES, seen, strict=True)}
    words = np.asarray(model.text.token_embed.embedding[...])

    def next_logits(pieces, said):
        ids = lambda piece: np.array(processor.tokenizer.encode(piece), int)  # noqa: E731
        parts = [
            words[ids(piece)] if isinstance(piece, str) else seen[piece.tobytes()]
            for piece in pieces
        ]
        embeddings = np.concatenate([*parts, words[np.array(said, int)]])
        # What is behind it changes nothing: causal.
        padded = np.pad(embeddings, ((0, 64 - len(embeddings)), (0, 0)))
        return np.asarray(full_pass(params, padded))[len(embeddings) - 1]

    return next_logits


def require_greedy(found, prompt, next_logits, processor, most):
    said, logprobs = [], []
    while len(said) < most and processor.eos_id not in said:
        scores = next_logits(prompt, said)
        said.append(int(scores.argmax()))
        logprobs.append(float(scores.max()))
    assert found.text == processor.tokenizer.decode(said).strip()
    np.testing.assert_allclose(found.token_logprobs, logprobs, atol=2e-4)


def test_greedy_text_is_that_of_full_passes_over_the_embeddings_in_order(
    next_logits, batched, processor
):
    lengths = [len(encode_prompt(prompt, processor, 4)) for prompt in PROMPTS[:2]]
    assert lengths[0] > lengths[1] and len(set(map(padded_size, lengths))) == 1
    for prompt, found in zip(PROMPTS, batched, strict=True):
        require_greedy(found, prompt, next_logits, processor, 10)
    assert len({found.logprob for found in batched}) == len(PROMPTS)


def test_a_prompt_says_in_a_batch_what_it_says_alone(processor):
    model = prefix_model(positions="rope")
    together = mammut.generate_prompts(model, processor, PROMPTS[:2], TEN)
    alone = mammut.generate_prompts(model, processor, PROMPTS[:2], TEN, batch_size=1)
    for found, own in zip(together, alone, strict=True):
        assert found.text == own.text
        np.testing.assert_allclose(found.token_logprobs, own.token_logprobs, atol=1e-4)


def test_order_of_images_and_of_texts_matters(model, processor):
    first, second = IMAGES[:2]
    prompts = [
        [first, second, "one"],
        [second, first, "one"],
        [first, "one", second],
        ["one", first, second],
    ]
    found = mammut.generate_prompts(model, processor, prompts, TEN)
    assert len({one.logprob for one in found}) == 4


def test_an_image_alone_says_its_caption(model, processor):
    captions = mammut.generate_text(model, processor, list(IMAGES[:4]), config=TEN)
    found = mammut.generate_prompts(
        model, processor, [[image] for image in IMAGES[:3]] + [(IMAGES[3], "")], TEN
    )
    assert [one.text for one in found] == [one.text for one in captions]
    for one, other in zip(found, captions, strict=True):
        np.testing.assert_allclose(one.token_logprobs, other.token_logprobs, atol=1e-5)


def test_beams_find_at_least_as_likely_a_text(model, processor, batched):
    config = dataclasses.replace(TEN, num_beams=3, length_penalty=0.0)
    found = mammut.generate_prompts(model, processor, PROMPTS[:2], config)
    gains = [one.logprob - greedy.logprob for one, greedy in zip(found, batched, strict=False)]
    assert min(gains) > -1e-4 and max(gains) > 0.01


def test_every_token_of_every_beam_has_the_probability_that_full_passes_give_it(
    model, processor, next_logits
):
    """Beams that swap places must take what was cached of their texts along."""
    encoded = [encode_prompt(prompt, processor, 4) for prompt in PROMPTS[:2]]
    batch = prompt_batch(encoded, padded_size(max(map(len, encoded))), (16, 16, 3))
    config = dataclasses.replace(TEN, num_beams=3)
    ids = {
        "bos_id": processor.bos_id,
        "eos_id": processor.eos_id,
        "vocab_size": processor.vocab_size,
    }
    graphdef, params = nnx.split(model)
    generate = jax.jit(
        lambda params, *batch: generate_interleaved(
            nnx.merge(graphdef, params), *batch, config, **ids
        )
    )
    found = jax.device_get(generate(params, *batch))
    for prompt, beams, logprobs, counts in zip(
        PROMPTS, found.tokens, found.logprobs, found.num_tokens, strict=False
    ):
        assert len({tuple(beam) for beam in beams.tolist()}) == 3
        for beam, own, count in zip(beams, logprobs, counts, strict=True):
            said = beam[1 : count + 1]
            expected = [next_logits(prompt, said[:i])[token] for i, token in enumerate(said)]
            np.testing.assert_allclose(own[1 : count + 1], expected, atol=2e-4)


def test_what_is_sampled_depends_on_the_place_in_the_list_not_on_the_batch(model, processor):
    config = GenerateConfig(max_new_tokens=10, temperature=2.0)
    prompts = [[IMAGES[0], "one"], [IMAGES[1], "one"], [IMAGES[0], "one"]]
    found = mammut.generate_prompts(model, processor, prompts, config, seed=1)
    assert found[0].text != found[2].text
    again = mammut.generate_prompts(model, processor, prompts, config, seed=1, batch_size=1)
    assert [one.text for one in again] == [one.text for one in found]


def test_the_callers_prompts_stay_as_they_are_and_paths_are_images(
    model, processor, tmp_path, batched
):
    from PIL import Image

    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    for image, path in zip(IMAGES, paths, strict=False):
        Image.fromarray(image).save(path)
    prompt = [paths[0], PROMPTS[0][1], paths[1], PROMPTS[0][3]]
    before = list(prompt)
    found = mammut.generate_prompts(model, processor, [prompt, PROMPTS[1]], TEN)
    assert [one.text for one in found] == [one.text for one in batched[:2]]
    assert prompt == before


def test_a_text_ends_where_the_context_does(model, processor, next_logits):
    """61 of 64 places are taken: there is room for three tokens more."""
    prompt = [*IMAGES, *IMAGES, *IMAGES[:3], "one"]
    assert len(encode_prompt(prompt, processor, 4)) == 61
    found = mammut.generate_prompts(model, processor, [prompt])[0]
    assert len(found.token_logprobs) == 3
    require_greedy(found, prompt, next_logits, processor, 3)


@pytest.mark.parametrize("prompt, message", [
    ([*IMAGES] * 3,
     "prompt 1 has 18 images of 4 tokens each, expected at most 13: DecoderConfig.max_length 64 "
     "less"),
    ([IMAGES[0], "on the left " * 11 + "on"],
     r"prompt 1 has \d+ tokens, its 1 images included, expected at most 54"),
    ([IMAGES[0], "Q: what? A: "], "prompt 1 ends in a space, 'Q: what. A: ', expected none"),
    ([IMAGES[0], "Q: what? A: ", ""], "prompt 1 ends in a space"),
    ([], "prompt 1 is empty, expected an image or a text"),
    ([""], "prompt 1 is empty"),
    ("one", "prompt 1 is a str, expected a list of images and str"),
    ([IMAGES[0], 3], "image is of type int"),
])  # fmt: skip
def test_what_is_no_prompt_is_refused_in_one_sentence(model, processor, prompt, message):
    with pytest.raises(ValueError, match=message) as error:
        mammut.generate_prompts(model, processor, [[IMAGES[0]], prompt], TEN)
    assert "\n" not in str(error.value) and not re.search(r"\. [A-Z]", str(error.value))


# Videos

CLIPS = IMAGES.reshape(2, 3, 16, 16, 3)


@pytest.fixture(scope="module")
def video_model():
    """A video is two tokens, the means of those of its frames, as an image is."""
    model = tiny_model(dataclasses.replace(prefix_config(), prefix_tokens=2, prefix_norm=False))
    model.text.token_embed.embedding[...] *= 3
    return model


@pytest.fixture(scope="module")
def video_processor(processor):
    """It reads three frames."""
    video = VideoTransform(3)
    return mammut.Processor(processor.tokenizer, processor.image, processor.max_length, video=video)


def test_a_video_of_a_prompt_has_the_frames_that_its_model_is_made_for(
    video_model, video_processor, processor
):
    config = video_model.config
    video = VideoConfig(mode="frames", frames=3)
    vision = dataclasses.replace(config.vision, video=video)
    model = tiny_model(dataclasses.replace(config, vision=vision))
    model.text.token_embed.embedding[...] *= 3
    prompts = [[CLIPS.reshape(6, 16, 16, 3), "Q: what? A:"]]
    expected = mammut.generate_prompts(model, video_processor, prompts, TEN)
    for own in (processor, processor.for_model(model.config)):
        assert mammut.generate_prompts(model, own, prompts, TEN) == expected


def test_a_video_is_the_prefix_that_the_model_makes_of_it(video_model, video_processor):
    """Told as arrays, as lists of frames and as a Clip, against one pass over all embeddings."""
    prompts = [
        ["one", CLIPS[0], "Q: what? A: red", list(CLIPS[1]), "Q: where? A:"],
        [Clip(CLIPS[1]), "Q: where? A:", CLIPS[0], "one red", "Q: what? A:"],
    ]
    order = [(0, 1), (1, 0)]
    two = GenerateConfig(max_new_tokens=2)
    found = mammut.generate_prompts(video_model, video_processor, prompts, two)

    graphdef, params = nnx.split(video_model)
    seen = jax.jit(lambda params: nnx.merge(graphdef, params).image_tokens(CLIPS).tokens)(params)
    assert seen.shape == (2, 2, 48)
    words = np.asarray(video_model.text.token_embed.embedding[...])

    @jax.jit
    def next_logprobs(params, embeddings):
        text = nnx.merge(graphdef, params).text
        logits = text.logits(text.causal_pass(embeddings[None]))[0, :, :vocab_size]
        return jax.nn.log_softmax(logits)

    vocab_size = video_processor.vocab_size
    for prompt, clips, one in zip(prompts, order, found, strict=True):
        clips = iter(clips)
        parts = [
            words[video_processor.tokenizer.encode(piece)]
            if isinstance(piece, str)
            else np.asarray(seen[next(clips)])
            for piece in prompt
        ]
        expected = np.concatenate(parts)
        encoded = [encode_prompt(prompt, video_processor, 2)]
        arrays = tuple(video_processor(images=encoded[0].images)["image"])
        encoded = [dataclasses.replace(encoded[0], images=arrays)]
        batch = prompt_batch(encoded, len(expected), (3, 16, 16, 3))
        np.testing.assert_allclose(
            jax.jit(interleave)(video_model, *batch[:3])[0], expected, atol=1e-5
        )
        padded = np.pad(expected, ((0, 64 - len(expected)), (0, 0)))
        best = next_logprobs(params, padded)[len(expected) - 1].max()
        np.testing.assert_allclose(one.token_logprobs[0], best, atol=2e-4)
    assert abs(found[0].logprob - found[1].logprob) > 1e-2


def test_prompts_of_videos_and_of_pictures_share_no_batch(
    without_a_search, video_model, video_processor
):
    prompts = [[CLIPS[0], "one"], [IMAGES[0], "one"], ["one", CLIPS[1]], ["one blue"]]
    texts = mammut.generate_prompts(video_model, video_processor, prompts, TEN)
    assert len(texts) == 4
    with pytest.raises(ValueError, match="prompt 1 has 1 videos among its 2 images, expected vid"):
        mammut.generate_prompts(video_model, video_processor, [["a"], [CLIPS[0], IMAGES[0]]], TEN)


def test_a_prefix_as_long_as_the_video_is_refused(model, processor, video_processor):
    for own, frames in ((processor, 8), (video_processor, 3)):
        message = f"prompt 1 has an image that is a video of {frames} frames, which has no place in"
        with pytest.raises(ValueError, match=message):
            mammut.generate_prompts(model, own, [["a"], [CLIPS[0], "one"]], TEN)


def test_a_space_before_an_image_is_none_at_the_end(processor):
    assert len(encode_prompt(["one ", IMAGES[0]], processor, 4)) > 4


def test_no_prompts_have_no_texts(model, processor):
    assert mammut.generate_prompts(model, processor, []) == []


def test_a_model_that_sees_images_by_cross_attention_is_refused():
    with pytest.raises(ValueError, match="DecoderConfig.cross_attn_every is 2, expected 0: "):
        mammut.generate_prompts(tiny_model(), tiny_processor(), [[IMAGES[0]]])


def test_more_new_tokens_than_the_context_holds_are_refused(model, processor):
    with pytest.raises(
        ValueError, match="max_new_tokens is 64, expected fewer than DecoderConfig.max_length 64"
    ):
        mammut.generate_prompts(model, processor, [[IMAGES[0]]], GenerateConfig(max_new_tokens=64))


def test_a_processor_of_another_model_and_a_batch_of_none_are_refused(model):
    more = dataclasses.replace(tiny_config().text, vocab_size=90)
    other = tiny_processor(dataclasses.replace(tiny_config(), text=more))
    assert other.vocab_size > 60
    with pytest.raises(ValueError, match="they do not belong together"):
        mammut.generate_prompts(model, other, [[IMAGES[0]]])
    with pytest.raises(ValueError, match="batch_size is 0"):
        mammut.generate_prompts(model, other, [[IMAGES[0]]], batch_size=0)


def test_sizes_are_few_and_waste_little():
    sizes = [padded_size(n) for n in range(2049)]
    assert all(n <= size < max(1.25 * n, n + 1) for n, size in enumerate(sizes))
    assert sizes == sorted(sizes) and len(set(sizes)) == 1 + 8 + 4 * 8


@pytest.fixture
def without_a_search(monkeypatch, as_users_have_it):
    """Ends every text at once, so that nothing is compiled."""

    def ended(graphdef, params, batch, config, *, bos_id, eos_id, vocab_size, keys):
        rows = len(batch[0])
        tokens = np.full((rows, 1, 2), eos_id)
        ones = np.ones((rows, 1))
        return Generation(tokens, np.zeros(tokens.shape), ones.astype(int), -ones, np.ones(()))

    monkeypatch.setattr("mammut.generation.interleaved._generate", ended)


def test_any_list_of_prompts_of_any_lists_is_one(without_a_search, model, processor):
    prompts = [IMAGES, iter([IMAGES[0], "what?"]), (IMAGES[0],), np.stack(IMAGES)]
    for some in (list(prompts), tuple(map(list, prompts[:1])), (prompt for prompt in [["a"]])):
        assert {text.text for text in mammut.generate_prompts(model, processor, some)} == {""}
    with pytest.raises(ValueError, match="^prompts is one str 'what', expected a list"):
        mammut.generate_prompts(model, processor, "what")
    with pytest.raises(ValueError, match="mammut.load returns both"):
        mammut.generate_prompts("runs/x", processor, [["a"]])


PIECES = (
    st.sampled_from(list(IMAGES)) | st.text(max_size=4) | st.none() | st.integers() | st.binary()
    | st.just(IMAGES) | st.just([IMAGES[0]]) | st.just([])
)  # fmt: skip


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.lists(PIECES, max_size=3) | PIECES, max_size=3) | PIECES, PIECES)
def test_whatever_is_prompted_is_continued_or_refused(
    without_a_search, model, processor, prompts, number
):
    for options in ({}, {"batch_size": number}, {"seed": number}, {"config": number}):
        try:
            texts = mammut.generate_prompts(model, processor, prompts, **options)
        except ValueError:
            continue
        assert len(texts) == len(prompts)
