"""From a source to batches: every example read by index, shuffled anew each epoch, split by process, resumable.

`TrainBatches` draws endless training batches from a source, `eval_batches` passes over it once,
`prefetch` moves batches to the device ahead of the step. Batches are NumPy arrays of this process'
share.
"""

import collections
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, UInt8

from mammut.data.config import DataConfig
from mammut.data.examples import BadExample, Example, Source
from mammut.data.images import BadImage, ImageTransform
from mammut.data.processor import Processor

_log = logging.getLogger(__name__)

_MIN_READ = 100  # the share of bad examples is judged from so many examples on
_MAX_BAD_IN_A_ROW = 100
_STALLED = 30.0  # seconds without a batch, after each of which a warning is logged


class TooManyBadExamples(ValueError):
    """More examples than `DataConfig.max_bad_share` allows could not be used."""


@dataclasses.dataclass
class _Read:
    """What reading an example came to, passed on through Grain, where a raised exception would be lost."""

    bad: list[tuple[str, str]]  # cause and message of each example that could not be used
    example: Example | None = None
    image: np.ndarray | None = None
    pair: tuple[str, str] = ("", "")  # a prompt and the text to be said after it
    error: Exception | None = None  # anything else that went wrong: not for us to swallow


class TrainBatches:
    """Endless training batches of this process' share: `image`, `tokens`, `text_valid` and `target` in a dict.

    Every epoch visits all examples once in a new order; each visit draws one of the captions, or of
    the questions and answers, and, where the config asks for them, a crop and a flip. All of that
    depends only on the seed and on the position in the run, so a run continues bit for bit from
    `state()`, with another number of threads or processes too. In place of an example that cannot
    be used another is drawn at random, so batches stay full and all processes stay at the same
    position.

    However many processes there are, batch k of all of them together has the same examples, drawn
    alike. Their order in it differs where the processes' shares are put one after the other, as
    `jax.make_array_from_process_local_data` does; the losses, sums over a batch, do not depend on
    it.

    A text to be said follows `config.prompt`, with its question in place of the {}.

    Shapes of a batch, b = config.batch_size // process_count:
      image uint8[b, image_size, image_size, 3], tokens int32[b, L], text_valid bool[b, L],
      target bool[b, L]: the tokens to be said, not those of a question.

    Args:
      source: The examples.
      processor: Decides the image size and the tokens.
      config: The fields from `batch_size` to `max_bad_share` are used.
      seed: Of the order, captions, crops and flips.
      process_index: This process, of `process_count`.
      process_count: Processes that share each batch; row i of the whole batch goes to process i %
        process_count.
      low_image_size: Pixels of the images of the first `low_steps` batches of the run, drawn alike,
        before those of the processor's size.
      low_steps: 0 for none.
      images: False: no image is opened, and a batch has none.
      state: What `state()` returned; the batches then go on from there.

    Raises:
      ValueError: the set is smaller than a batch, the batch is not a multiple of `process_count`,
        `low_steps` comes without `low_image_size`, or `state` belongs to another set or seed.
      TooManyBadExamples: when iterating, more than `config.max_bad_share` of the examples could not
        be used.
    """

    def __init__(
        self,
        source: Source,
        processor: Processor,
        config: DataConfig,
        *,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        low_image_size: int | None = None,
        low_steps: int = 0,
        images: bool = True,
        state: dict[str, Any] | None = None,
    ):
        import grain

        self._rows = _share("data.batch_size", config.batch_size, process_count)
        if len(source) < config.batch_size:
            raise ValueError(
                f"{source.spec!r} has {len(source)} examples, expected at least data.batch_size {config.batch_size}"
            )
        if low_steps and low_image_size is None:
            raise ValueError(
                f"low_steps is {low_steps} and low_image_size None, expected the size of those images"
            )
        if processor.room(config.prompt_of("")) < 1:
            raise ValueError(
                f"data.prompt is {config.prompt!r}, which leaves no room in a text of {processor.max_length} tokens"
            )
        self.source, self.processor, self._config, self._images = (
            source,
            processor,
            config,
            images,
        )
        self._low_image_size, self._low_end = low_image_size, low_steps * config.batch_size
        start = {"examples": len(source), "seed": seed, "position": 0, "read": 0, "bad": {}}
        self._state = start if state is None else state
        for name in ("examples", "seed"):
            if self._state[name] != start[name]:
                raise ValueError(
                    f"the data position to resume from is of a run with {name} {self._state[name]}, "
                    f"this one has {name} {start[name]} ({source.spec!r}): expected the same data and seed"
                )
        self._read = self._state["read"]
        self._bad = collections.Counter(self._state["bad"])
        self._position = self._state["position"]  # in examples of all processes
        self._process_index, self._process_count = process_index, process_count
        self._order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
        self._options = grain.ReadOptions(config.threads, max(config.threads, self._rows))
        self._reads = self._open()

    def __iter__(self) -> "TrainBatches":
        return self

    @property
    def threads(self) -> int:
        """How many threads read."""
        return self._config.threads

    def _open(self) -> Iterator[_Read]:
        """Reads on from the position, ahead of it, in images of one size."""
        transform = self.processor.image
        self._low = self._position < self._low_end
        if self._low:
            transform = dataclasses.replace(transform, image_size=self._low_image_size)
        # Randomness before the slice: it belongs to the position in the run, whichever process
        # reads it.
        drawn = self._order.random_map(functools.partial(self._load, transform))
        mine = drawn[self._position + self._process_index :: self._process_count]
        return iter(mine.to_iter_dataset(self._options))

    def __next__(self) -> dict[str, np.ndarray]:
        if self._low and self._position >= self._low_end:
            self._reads.close()
            self._reads = self._open()
        reads = []
        while len(reads) < self._rows:
            read = next(self._reads)
            if read.error is not None:
                raise read.error
            _count(self._bad, read.bad)
            self._read += len(read.bad) + (read.example is not None)
            self._check_share(stop=read.example is None)
            reads.append(read)
        self._position += self._rows * self._process_count
        self._state = self._state | {
            "position": self._position,
            "read": self._read,
            "bad": self.bad_counts,
        }
        tokens, text_valid, target = self.processor.encode_pairs([read.pair for read in reads])
        texts = {"tokens": tokens, "text_valid": text_valid, "target": target}
        return (
            {"image": np.stack([read.image for read in reads]), **texts} if self._images else texts
        )

    def state(self) -> dict[str, Any]:
        """The position after the batches handed out so far, as JSON values."""
        return self._state

    @property
    def spec(self) -> str:
        """The name of the source in messages."""
        return self.source.spec

    @property
    def bad_counts(self) -> dict[str, int]:
        """How many examples could not be used since the start of the run, by cause; this process' share."""
        return dict(self._bad)

    def close(self) -> None:
        """Stops reading ahead."""
        self._reads.close()

    def _load(self, transform: ImageTransform, index: int, rng: np.random.Generator) -> _Read:
        bad = []
        try:
            while len(bad) < _MAX_BAD_IN_A_ROW:
                try:
                    example = self.source[int(index)]
                    pair = self.draw_pair(example, rng)
                    return _Read(bad, example, self.draw_image(example, rng, transform), pair)
                except (BadExample, BadImage) as error:
                    bad.append((error.cause, str(error)))
                    index = rng.integers(len(self.source))
        except Exception as error:
            return _Read(bad, error=error)
        return _Read(bad)

    def draw_pair(self, example: Example, rng: np.random.Generator) -> tuple[str, str]:
        pairs = example.pairs
        if not pairs:
            raise BadExample(f"{example.key} has no answer to learn", "no answer")
        question, text = pairs[rng.integers(len(pairs))]
        prompt = self._config.prompt_of(question)
        # A caption that is too long is cut; half an answer would be learnt as a whole one.
        if question and len(self.processor.encode_after(prompt, text)) > self.processor.room(
            prompt
        ):
            longest = self.processor.max_length
            raise BadExample(
                f"{example.key}: {prompt!r} with {text!r} has more than the {longest} tokens of a text",
                "too long",
            )
        return prompt, text

    def draw_image(
        self, example: Example, rng: np.random.Generator, transform: ImageTransform
    ) -> np.ndarray | None:
        config = self._config
        if not self._images:
            return None
        if config.blind:
            return np.zeros((transform.image_size, transform.image_size, 3), np.uint8)
        if config.crop_scale == (1, 1):
            image = transform(example.image)
        else:
            image = transform.random_resized_crop(
                example.image, rng, config.crop_scale, config.crop_ratio
            )
        return image[:, ::-1] if config.horizontal_flip and rng.random() < 0.5 else image

    def _check_share(self, stop: bool) -> None:
        bad, allowed = self._bad.total(), self._config.max_bad_share
        if stop or (self._read >= min(_MIN_READ, len(self.source)) and bad > allowed * self._read):
            raise TooManyBadExamples(
                f"{bad} of {self._read} examples read from {self.source.spec!r} could not be used "
                f"({describe_bad(self._bad)}), data.max_bad_share allows {allowed:.0%}"
            )


def prefetch(
    batches: TrainBatches, transfer: Callable[[dict[str, np.ndarray]], Any], size: int = 2
) -> Iterator[tuple[Any, dict[str, Any], float]]:
    """Reads and transfers up to `size` batches ahead in a thread of its own.

    Yields `(transfer(batch), state, wait)`: the state after exactly this batch, not after those
    read ahead, and the seconds the caller had to wait for it. Whatever the thread raises is raised
    here. A caller that waits for 30 seconds is told so by a warning that names the source, and
    again after every 30 seconds more.
    """

    def load() -> tuple[Any, dict[str, Any]]:
        batch = next(batches)
        return transfer(batch), batches.state()

    # A pool of one, because its tasks end by themselves: no thread can be left waiting for a
    # consumer that has gone.
    pool = futures.ThreadPoolExecutor(1, thread_name_prefix="mammut-prefetch")
    try:
        ahead = collections.deque(pool.submit(load) for _ in range(size))
        while True:
            start, first = time.perf_counter(), ahead.popleft()
            while not futures.wait([first], _STALLED).done:
                waited = time.perf_counter() - start
                _log.warning(
                    "no batch from %r for %.0f s: its disk or network may be stuck",
                    batches.spec,
                    waited,
                )
            batch, state = first.result()
            wait = time.perf_counter() - start
            ahead.append(pool.submit(load))
            yield batch, state, wait
    finally:
        pool.shutdown(cancel_futures=True)


@dataclasses.dataclass
class EvalBatch:
    """A batch of one pass over a set, this process' share; rows that are not an example are zero.

    A row is not an example where the last batch is padded or the example could not be used; `bad`
    counts the latter.
    """

    image: UInt8[np.ndarray, "b height width 3"]
    example_valid: Bool[np.ndarray, " b"]
    index: Int32[np.ndarray, " b"]  # of the example in the source; -1 in padding
    examples: list[Example | None]  # None where example_valid is False
    bad: dict[str, int]  # by cause


def eval_batches(
    source: Source,
    processor: Processor,
    *,
    batch_size: int,
    limit: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    blind: bool = False,
) -> Iterator[EvalBatch]:
    """Passes once over the first `limit` examples in order, without randomness, in batches of one shape.

    Process p holds rows [p * b, (p + 1) * b) of every batch, b = batch_size // process_count, and
    all processes get the same number of batches. With `blind` every image is black.

    Raises:
      ValueError: at the call, `batch_size` is not a multiple of `process_count`.
    """
    rows = _share("data.eval_batch_size", batch_size, process_count)
    total = len(source) if limit is None else min(limit, len(source))
    size = processor.image.image_size
    blank = np.zeros((size, size, 3), np.uint8)

    def load(place: int) -> tuple[int, _Read]:
        batch, row = divmod(int(place), rows)
        index = batch * batch_size + process_index * rows + row
        if index >= total:
            return -1, _Read([])
        try:
            example = source[index]
            return index, _Read([], example, blank if blind else processor.image(example.image))
        except (BadExample, BadImage) as error:
            return index, _Read([(error.cause, str(error))])
        except Exception as error:
            return index, _Read([], error=error)

    def batches() -> Iterator[EvalBatch]:
        import grain

        places = grain.MapDataset.range(-(-total // batch_size) * rows)
        loaded = iter(
            places.map(load).to_iter_dataset(grain.ReadOptions(threads, max(threads, rows)))
        )
        bad = collections.Counter()
        try:
            for _ in range(len(places) // rows):
                index, reads = zip(*(next(loaded) for _ in range(rows)), strict=True)
                for read in reads:
                    if read.error is not None:
                        raise read.error
                    _count(bad, read.bad)
                yield EvalBatch(
                    image=np.stack([blank if read.image is None else read.image for read in reads]),
                    example_valid=np.array([read.example is not None for read in reads]),
                    index=np.array(index, np.int32),
                    examples=[read.example for read in reads],
                    bad=dict(collections.Counter(cause for read in reads for cause, _ in read.bad)),
                )
        finally:
            loaded.close()

    return batches()


def describe_bad(counts: dict[str, int]) -> str:
    """Counts by cause as words, the most frequent first: "12 corrupt, 3 no caption"."""
    return ", ".join(
        f"{count} {cause}" for cause, count in collections.Counter(counts).most_common()
    )


def _count(counts: collections.Counter, bad: list[tuple[str, str]]) -> None:
    """Counts bad examples by cause and tells of the first of each cause."""
    for cause, message in bad:
        counts[cause] += 1
        if counts[cause] == 1:
            _log.warning("skipped, as any other example like it (%s): %s", cause, message)


def _share(field: str, batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise ValueError(f"{field} {batch_size} is not a multiple of the {process_count} processes")
    return batch_size // process_count
