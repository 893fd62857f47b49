"""Captions from images, token by token."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from mammut.model import Image, MaMMUT
from mammut.processor import Processor
from mammut.typing import Array


def greedy_tokens(
    model: MaMMUT, image: Image, bos_id: int, eos_id: int, vocab_size: int | None = None
) -> Int[Array, "B L"]:
    """The likeliest next token, again and again: int[B, L] from `bos_id` on, `eos_id` from the end of the caption on.

    The image is encoded once; the caption pass runs over all L positions for every token. Ends early when every caption
    has ended. Only ids below `vocab_size` are chosen: a model's vocabulary may be larger than its tokenizer's.
    """
    batch, length = image.shape[0], model.config.text.max_length
    image_tokens = model.image_tokens(image).tokens
    positions = jnp.arange(length)

    def running(carry):
        i, _, done = carry
        return (i < length) & ~done.all()

    def extend(carry):
        i, tokens, done = carry
        # Positions from i on are not yet written: they are marked as pads, whatever their ids.
        text_valid = jnp.broadcast_to(positions < i, tokens.shape)
        features = model.text.caption_pass(tokens, text_valid, image_tokens)
        last = jax.lax.dynamic_index_in_dim(features, i - 1, axis=1, keepdims=False)
        token = jnp.argmax(model.text.logits(last)[:, :vocab_size], axis=-1).astype(tokens.dtype)
        token = jnp.where(done, eos_id, token)
        return i + 1, tokens.at[:, i].set(token), done | (token == eos_id)

    tokens = jnp.full((batch, length), eos_id, jnp.int32).at[:, 0].set(bos_id)
    return jax.lax.while_loop(running, extend, (jnp.int32(1), tokens, jnp.zeros(batch, bool)))[1]


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _greedy(graphdef: Any, params: Any, image: jax.Array, bos_id: int, eos_id: int, vocab_size: int) -> jax.Array:
    return greedy_tokens(nnx.merge(graphdef, params), image, bos_id, eos_id, vocab_size)


def caption(
    model: MaMMUT, processor: Processor, images: Sequence[Any], *, num_beams: int = 1, batch_size: int = 32
) -> list[str]:
    """Captions of images, one each: greedy decoding.

    Args:
      images: whatever `processor` reads: arrays, PIL images, paths, bytes.
      num_beams: 1; beam search is not there yet.
      batch_size: images at a time; the last batch is padded, so that one shape is compiled.

    Raises:
      ValueError: `num_beams` is not 1, or an image cannot be read.
    """
    if num_beams != 1:
        raise ValueError(f"num_beams is {num_beams}, expected 1: beam search is not implemented yet")
    graphdef, params = nnx.split(model)
    captions = []
    for start in range(0, len(images), batch_size):
        chunk = images[start : start + batch_size]
        image = processor(images=chunk)["image"]
        image = np.pad(image, ((0, batch_size - len(chunk)), (0, 0), (0, 0), (0, 0)))
        tokens = _greedy(graphdef, params, image, processor.bos_id, processor.eos_id, processor.vocab_size)
        captions += processor.decode(np.asarray(tokens)[: len(chunk)])
    return captions
