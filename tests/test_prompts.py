"""Prompts of images and texts: against full passes over their embeddings, alone and in batches, and what is refused."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mammut
from mammut.config import ModelConfig
from mammut.processor import ImageTransform, Processor
from mammut.prompts import encode_prompt, padded_size
from mammut.search import GenerateConfig
from mammut.testing import tiny_config, tiny_model, tiny_processor
from mammut.tokenizer import train_sentencepiece

pytestmark = pytest.mark.usefixtures("quick_compilation")

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
TEN = GenerateConfig(max_new_tokens=10)
# Lengths from 1 to 33 tokens, no, one, two or three images, in every order.
PROMPTS = [
    [IMAGES[0], "Q: what? A: red", IMAGES[1], "Q: where? A:"],
    [IMAGES[2]],
    ["one red circle", IMAGES[3], "on the left"],
    ["one blue"],
    [IMAGES[4], IMAGES[5], IMAGES[0], "Q: what? A: green", IMAGES[1], "Q: what color is the shape? A:"],
    [IMAGES[5], "", "Q: what? A:"],
]


def prefix_config(**text) -> ModelConfig:
    """`tiny_config` with an image prefix of 4 tokens in place of cross-attention, and a context of 64."""
    tiny = tiny_config()
    text = {"cross_attn_every": 0, "pooling": "none", "max_length": 64, "depth": 2} | text
    return dataclasses.replace(
        tiny, text=dataclasses.replace(tiny.text, **text), conditioning="prefix", image_projection="decoder",
        prefix_norm=True,
    )  # fmt: skip


def prefix_model(**text):
    """Confident, so that texts differ and rounding decides nothing."""
    model = tiny_model(prefix_config(**text))
    model.text.token_embed.embedding[...] *= 3
    return model


@pytest.fixture(scope="module")
def model():
    return prefix_model()


@pytest.fixture(scope="module")
def processor():
    texts = ["Q: what? A: red", "Q: where? A: on the left", "one blue circle", "A picture of one green square"]
    tokenizer = train_sentencepiece(texts, 60, lowercase=False)
    return Processor(tokenizer, ImageTransform(16), prefix_config().text_length)


@pytest.fixture(scope="module")
def batched(model, processor):
    return mammut.generate_prompts(model, processor, PROMPTS, TEN)


@pytest.fixture(scope="module")
def next_logits(model, processor):
    """Log-probabilities of the token after a prompt and `said` ids, from one pass over all embeddings."""
    graphdef, params = nnx.split(model)

    @jax.jit
    def full_pass(params, embeddings, valid):
        decoder = nnx.merge(graphdef, params).text
        return jax.nn.log_softmax(decoder.logits(decoder.causal_pass(embeddings, valid))[0])

    def next_logits(pieces, said):
        parts = []
        for piece in [*pieces, said]:
            if isinstance(piece, np.ndarray):
                parts.append(np.asarray(model.image_tokens(piece[None]).tokens[0]))
            else:
                ids = processor.tokenizer.encode(piece) if isinstance(piece, str) else piece
                parts.append(np.asarray(model.text.token_embed.embedding[...])[np.array(ids, int)])
        embeddings = np.concatenate(parts)
        length = len(embeddings)
        padded = np.pad(embeddings, ((0, 64 - length), (0, 0)))  # behind it: causal, so that it changes nothing
        return np.asarray(full_pass(params, jnp.asarray(padded[None]), jnp.ones((1, 64), bool)))[
            length - 1, : processor.vocab_size
        ]

    return next_logits


@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_greedy_text_is_that_of_full_passes_over_the_embeddings_in_order(
    next_logits, batched, processor, number
):
    said, logprobs = [], []
    while len(said) < 10 and processor.eos_id not in said:
        scores = next_logits(PROMPTS[number], said)
        said.append(int(scores.argmax()))
        logprobs.append(float(scores.max()))
    assert batched[number].text == processor.tokenizer.decode(said).strip()
    np.testing.assert_allclose(batched[number].token_logprobs, logprobs, atol=2e-4)


def test_texts_differ(batched):
    """Else the tests here would see nothing."""
    assert len({found.text for found in batched}) == len(PROMPTS)
    assert len({padded_size(n) for n in (2, 4, 15)}) == 3


@pytest.mark.parametrize("text", [{}, {"positions": "rope"}])
def test_a_prompt_says_in_a_batch_what_it_says_alone(processor, text):
    model = prefix_model(**text)
    # Of one padded size, so that they share a batch: 20 to 24 tokens, one or two images.
    prompts = [
        [IMAGES[0], "Q: what? A: red", IMAGES[1]],
        ["one blue circle", IMAGES[2], "Q: what? A:"],
        [IMAGES[3], IMAGES[4], "on the left on the left"],
    ]
    lengths = [len(encode_prompt(prompt, processor, 4)) for prompt in prompts]
    sizes = {padded_size(length) for length in lengths}
    assert len(sizes) == 1 and len(set(lengths)) > 1 and max(lengths) <= sizes.pop()
    together = mammut.generate_prompts(model, processor, prompts, TEN)
    alone = [mammut.generate_prompts(model, processor, [prompt], TEN)[0] for prompt in prompts]
    assert [found.text for found in together] == [found.text for found in alone]
    for found, own in zip(together, alone, strict=True):
        np.testing.assert_allclose(found.token_logprobs, own.token_logprobs, atol=1e-4)
