"""A tiny model with an image prefix, its processor and pictures, for the tests of prompts."""

import dataclasses

import numpy as np

from mammut.config import ModelConfig
from mammut.data.images import ImageTransform
from mammut.data.processor import Processor
from mammut.data.tokenizer import train_sentencepiece
from mammut.models.mammut import MaMMUT
from mammut.testing import tiny_config, tiny_model

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)


def prefix_config(**text) -> ModelConfig:
    """`tiny_config` with an image prefix of 4 tokens and a context of 64.

    The prefix stands in place of cross-attention.
    """
    tiny = tiny_config()
    text = {"cross_attn_every": 0, "pooling": "none", "max_length": 64, "depth": 2} | text
    text = dataclasses.replace(tiny.text, **text)
    return dataclasses.replace(tiny, text=text, image_projection="decoder", prefix_norm=True)


def prefix_model(**text) -> MaMMUT:
    """Confident, so that texts differ and rounding decides nothing."""
    model = tiny_model(prefix_config(**text))
    model.text.token_embed.embedding[...] *= 3
    return model


def prefix_processor() -> Processor:
    """Knows the words of questions and captions; 60 ids."""
    texts = [
        "Q: what? A: red",
        "Q: where? A: on the left",
        "one blue circle",
        "A picture of one green square",
    ]
    tokenizer = train_sentencepiece(texts, 60, lowercase=False)
    return Processor(tokenizer, ImageTransform(16), prefix_config().text_length)
