"""Times generation with the cache and without.

The images and the search are the same.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mammut.generation.search import Decoding, GenerateConfig, Generation, search
from mammut.generation.text import generate
from mammut.models.mammut import MaMMUT
from mammut.performance.step_time import exact_float32
from mammut.performance.timing import in_turns, summary

_NO_END = -1  # no token has this id, so no text ends early


def cached(
    model: MaMMUT,
    image: jax.Array,
    start: jax.Array,
    config: GenerateConfig,
    vocab_size: int | None = None,
) -> Generation:
    """Calls `generate` with start tokens int[B, 1].

    The texts have no end, and their ids are below `vocab_size`.
    """
    valid = jnp.ones(start.shape, bool)
    return generate(model, image, start, valid, config, eos_id=_NO_END, vocab_size=vocab_size)


def uncached(
    model: MaMMUT, image: jax.Array, start: jax.Array, config: GenerateConfig
) -> Generation:
    """Generates the same texts without a cache.

    Every step runs a caption pass over the whole text.
    """

    def step(text, position, image_tokens):
        features = model.decoder.caption_pass(text, jnp.ones(text.shape, bool), image_tokens)
        return model.text.logits(features[:, position]), image_tokens

    def take(image_tokens, beam):
        # The rows of an image see the same image tokens, so only their number matters.
        rows_now = len(image_tokens) // len(beam)
        return jnp.repeat(image_tokens, beam.shape[1] // rows_now, axis=0)

    decoding = Decoding(step, take, model.image_tokens(image).tokens)
    text = jnp.pad(start, ((0, 0), (0, config.max_new_tokens)), constant_values=_NO_END)
    return search(decoding, text, jnp.ones(len(text), int), config, eos_id=_NO_END)


def compiled_loop(
    loop: Callable, model: MaMMUT, image: jax.Array, start: jax.Array, config: GenerateConfig
) -> tuple[Callable[[], Generation], float]:
    """Compiles `cached` or `uncached`.

    Returns a call that waits for its end, and the seconds.
    """
    graphdef, params = nnx.split(model)

    def run(params, image, start):
        return loop(nnx.merge(graphdef, params), image, start, config)

    with exact_float32(model.compute.dtype):
        began = time.perf_counter()
        compiled = jax.jit(run).lower(params, image, start).compile()
        compile_s = time.perf_counter() - began
    return lambda: jax.block_until_ready(compiled(params, image, start)), compile_s


def rates(turns: list[list[float]], rows: int, new_tokens: int) -> dict[str, Any]:
    """Computes times and rates of a loop for `rows` images."""
    times = summary(sum(turns, []))
    median = times["seconds"]
    return times | {
        "captions_per_s": rows / median,
        "new_tokens_per_s": rows * new_tokens / median,
        "ms_per_token": 1000 * median / new_tokens,
    }


def measure_generation(
    model: MaMMUT, image: jax.Array, start: jax.Array, config: GenerateConfig, rounds: int
) -> dict[str, Any]:
    """Measures both loops on one batch.

    It tests whether they give the same texts, then times them.
    """
    row: dict[str, Any] = {"batch": len(image), "beams": config.num_beams}
    calls = {}
    results = {}
    for name, loop in (("cached", cached), ("uncached", uncached)):
        calls[name], compile_s = compiled_loop(loop, model, image, start, config)
        row[name] = {"compile_s": compile_s}
        results[name] = jax.device_get(calls[name]())

    with_cache = results["cached"]
    without = results["uncached"]
    row["steps"] = [int(with_cache.steps), int(without.steps)]
    row["texts_equal"] = int((with_cache.tokens[:, 0] == without.tokens[:, 0]).all(1).sum())
    row["max_score_difference"] = float(abs(with_cache.scores[:, 0] - without.scores[:, 0]).max())
    for name, turns in in_turns(calls, rounds, per_turn=1).items():
        row[name] |= rates(turns, len(image), config.max_new_tokens)
    row["speedup"] = row["uncached"]["seconds"] / row["cached"]["seconds"]
    return row
