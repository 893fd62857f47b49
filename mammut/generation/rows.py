"""Texts generated from prompts, in batches of one shape.

Prompts are padded and run; the results are cut and decoded. This is the one loop behind
`generate_text`, `generate_prompts` and the evaluations of captions and answers.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Key

from mammut.core.fields import plain_number, require, require_whole
from mammut.core.typing import Array
from mammut.data.processor import Processor
from mammut.generation.search import GenerateConfig, Generation


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt of a batch."""

    prompt: Any
    length: int  # columns of the prompt in the generated tokens; the text begins after them
    number: int = 0  # position in the caller's list; the random key of a sample depends on it
    name: str = "a prompt"  # in errors


@dataclasses.dataclass(frozen=True)
class GeneratedRow:
    """The best text after one prompt."""

    text: str  # as the tokenizer decodes it, with the spaces around it
    logprobs: Float[np.ndarray, " L"]  # of each generated token, 0 in all other columns
    token_logprobs: Float[np.ndarray, " n"]  # of the generated tokens alone, the end token included


def checked_numbers(config: Any, batch_size: Any, seed: Any) -> tuple[int, int]:
    """Checks the settings of a generation.

    Returns:
      `batch_size` and `seed`.

    Raises:
      ValueError: a setting is of another kind or out of its range.
    """
    batch_size = plain_number(batch_size)
    seed = plain_number(seed)
    require(
        isinstance(config, GenerateConfig), f"config is {config!r:.80}, expected a GenerateConfig"
    )
    require_whole("batch_size", batch_size, 1, 2**20)
    require_whole("seed", seed, -(2**63), 2**63 - 1)
    return batch_size, seed


def generate_rows(
    rows: Iterable[Row],
    run: Callable[[list[Row]], Generation],
    processor: Processor,
    *,
    batch_size: int,
) -> Iterator[GeneratedRow]:
    """Generates the best text of each row, in order.

    `run` always gets `batch_size` rows. Rows are taken from the iterable one batch at a time.

    Raises:
      ValueError: the model's logits are not numbers. A text of such a model is never given.
    """
    for batch in batched(rows, batch_size):
        # Copies of the last row fill the batch up: they end when that row ends and cost no further
        # step.
        padding = batch[-1:] * (batch_size - len(batch))
        out = jax.device_get(run(batch + padding))

        for position, row in enumerate(batch):
            require_numbers(out.scores[position, 0], f"the model's logits for {row.name}")
            tokens = out.tokens[position, 0, row.length :].tolist()
            logprobs = out.logprobs[position, 0]
            end = row.length + out.num_tokens[position, 0]
            yield GeneratedRow(
                text=processor.tokenizer.decode(tokens),
                logprobs=logprobs,
                token_logprobs=logprobs[row.length : end],
            )


def require_numbers(values: Any, what: str) -> None:
    """Raises ValueError where numbers that a model computed are not finite."""
    require(
        bool(np.isfinite(values).all()),
        f"{what} are not numbers: its parameters are damaged, or its training diverged",
    )


def row_keys(rows: list[Row], config: GenerateConfig, seed: int) -> Key[Array, " B"] | None:
    """Makes a random key for each row.

    A key depends on `seed` and the number of the row. The result is None if nothing is drawn.
    """
    if config.temperature == 0:
        return None
    numbers = np.array([row.number for row in rows])
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)


def batched(items: Iterable, size: int) -> Iterator[list]:
    """Yields lists of `size` items; the last list may be shorter."""
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
