"""Batches from a source: shuffled each epoch, split by process, resumable.

`TrainBatches` draws endless training batches from a source, `eval_batches` passes over it once.
Batches are NumPy arrays of this process' share.
"""

import collections
import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, UInt8

from mammut.data.config import DataConfig
from mammut.data.examples import BadExample, Example, Source
from mammut.data.images import BadImage, ImageTransform
from mammut.data.processor import Processor

_log = logging.getLogger(__name__)

_MIN_READ = 100  # examples that are read before the share of bad ones is judged
_MAX_BAD_IN_A_ROW = 100


class TooManyBadExamples(ValueError):
    """More examples than `DataConfig.max_bad_share` allows could not be used."""


@dataclasses.dataclass
class _Read:
    """The result of reading an example.

    It goes through Grain, where an exception would be lost.
    """

    bad: list[tuple[str, str]]  # cause and message of each example that could not be used
    example: Example | None = None
    image: np.ndarray | None = None
    pair: tuple[str, str] = ("", "")  # a prompt and the target text after it
    error: Exception | None = None  # any other error, to be raised again


class TrainBatches:
    """Endless training batches, each a dict with this process's rows.

    Every epoch visits all examples once in a new order. Each visit draws one of the captions, or of
    the questions and answers, the frames of a video and, where the config says so, a crop and a
    flip, the same for all frames. All of this depends only on the seed and on the position in the
    run, so a run continues bit for bit from `state()`, with another number of threads or processes
    too. An example that cannot be used is replaced by another one, drawn at random: batches stay
    full, and all processes stay at the same position.

    With any number of processes, batch k of all of them together has the same examples, with the
    same crops and texts. Their order differs: `jax.make_array_from_process_local_data` puts the
    processes' rows one after the other. The losses, sums over a batch, do not depend on it.

    The target text follows `config.prompt`, in which its question takes the place of the {}.

    Shapes of a batch, with b = config.batch_size // process_count rows:
      image: uint8[b, image_size, image_size, 3]; uint8[b, T, image_size, image_size, 3] of videos,
        where `processor.video` is set.
      tokens: int32[b, L].
      text_valid: bool[b, L], False on pads.
      target: bool[b, L], True on the tokens of the target text, False on those of the prompt.

    Args:
      source: the examples.
      processor: sets the image size and makes the tokens.
      config: its fields from `batch_size` to `max_bad_share` are used.
      seed: random seed of the order, captions, crops and flips.
      process_index: the number of this process, below `process_count`.
      process_count: how many processes share each batch; row i of the whole batch goes to process
        i % process_count.
      low_image_size: size in pixels of the images in the first `low_steps` batches of the run.
      low_steps: how many batches have such images; 0: none.
      images: False: no image is opened, and a batch has none.
      state: a result of `state()`, to continue from.

    Example:
      >>> source = open_source("synthetic:train", image_size=32)
      >>> batches = TrainBatches(source, processor, DataConfig(batch_size=64), seed=0)
      >>> next(batches)["image"].shape
      (64, 32, 32, 3)

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
                f"{source.spec!r} has {len(source)} examples, "
                f"expected at least data.batch_size {config.batch_size}"
            )
        if low_steps and low_image_size is None:
            raise ValueError(
                f"low_steps is {low_steps} and low_image_size None, "
                "expected the size of those images"
            )
        if low_steps and processor.video is not None:
            raise ValueError(
                f"low_steps is {low_steps} with data.frames {processor.video.frames}: videos have "
                "one size"
            )
        if processor.room(config.prompt_of("")) < 1:
            raise ValueError(
                f"data.prompt is {config.prompt!r}, "
                f"which leaves no room in a text of {processor.max_length} tokens"
            )
        self.source = source
        self.processor = processor
        self._config = config
        self._images = images
        self._low_image_size = low_image_size
        self._low_end = low_steps * config.batch_size  # in examples of all processes

        self._state = _start(source, seed, state)
        self._read = self._state["read"]
        self._bad = collections.Counter(self._state["bad"])
        self._position = self._state["position"]  # in examples of all processes

        self._process_index = process_index
        self._process_count = process_count
        self._order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
        self._options = grain.ReadOptions(config.threads, max(config.threads, self._rows))
        self._reads = self._open()

    def __iter__(self) -> "TrainBatches":
        return self

    @property
    def threads(self) -> int:
        """The number of threads that read."""
        return self._config.threads

    def _open(self) -> Iterator[_Read]:
        """Starts to read ahead from the position.

        Images have the size that belongs to that position.
        """
        transform = self.processor.image
        self._low = self._position < self._low_end
        if self._low:
            transform = dataclasses.replace(transform, image_size=self._low_image_size)
        # The random numbers are drawn before the slice: they belong to the position in the run,
        # whichever process reads it.
        drawn = self._order.random_map(functools.partial(self._load, transform))
        own = drawn[self._position + self._process_index :: self._process_count]
        return iter(own.to_iter_dataset(self._options))

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
        if not self._images:
            return texts
        return {"image": np.stack([read.image for read in reads]), **texts}

    def state(self) -> dict[str, Any]:
        """Returns the position after the last batch returned, as JSON values."""
        return self._state

    @property
    def spec(self) -> str:
        """The name of the source in messages."""
        return self.source.spec

    @property
    def bad_counts(self) -> dict[str, int]:
        """Counts of unusable examples since the run began, by cause.

        They are the examples that this process has read.
        """
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
        """Draws a prompt and the target text after it.

        Raises:
          BadExample: no text of the example fits.
        """
        pairs = example.pairs
        if not pairs:
            raise BadExample(f"{example.key} has no answer to learn", "no answer")
        question, text = pairs[rng.integers(len(pairs))]
        prompt = self._config.prompt_of(question)
        if not question:
            return prompt, text  # a caption that is too long is cut
        # The model would learn half an answer as a whole answer.
        if len(self.processor.encode_after(prompt, text)) > self.processor.room(prompt):
            raise BadExample(
                f"{example.key}: {prompt!r} with {text!r} has more than the "
                f"{self.processor.max_length} tokens of a text",
                "too long",
            )
        return prompt, text

    def draw_image(
        self, example: Example, rng: np.random.Generator, transform: ImageTransform
    ) -> np.ndarray | None:
        """Draws the crop and flip of an image, and the frames of a video.

        Returns:
          uint8[height, width, 3], of a video uint8[T, height, width, 3]; None if batches have no
          images.
        """
        config, processor = self._config, self.processor
        if not self._images:
            return None
        if config.blind:
            size = transform.image_size
            return np.zeros((*processor.image_shape[:-3], size, size, 3), np.uint8)
        crop = config.crop_scale, config.crop_ratio
        image = processor.draw(example.image, rng, *crop, transform=transform)
        if config.horizontal_flip and rng.random() < 0.5:
            image = image[..., ::-1, :]
        return image

    def _check_share(self, stop: bool) -> None:
        """Raises TooManyBadExamples where the share of bad examples is too high.

        With `stop` it raises the error at any share.
        """
        bad = self._bad.total()
        allowed = self._config.max_bad_share
        judged = self._read >= min(_MIN_READ, len(self.source))
        if stop or (judged and bad > allowed * self._read):
            raise TooManyBadExamples(
                f"{bad} of {self._read} examples read from {self.source.spec!r} could not be used "
                f"({describe_bad(self._bad)}), data.max_bad_share allows {allowed:.0%}"
            )


def _start(source: Source, seed: int, state: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the position to start from: that of `state`, or the beginning.

    Raises:
      ValueError: `state` belongs to another set or seed, or the set has changed since.
    """
    fingerprint = source.fingerprint()
    start = {
        "examples": len(source),
        "fingerprint": fingerprint,
        "seed": seed,
        "position": 0,
        "read": 0,
        "bad": {},
    }
    if state is None:
        return start
    for name in ("examples", "seed"):
        if state[name] != start[name]:
            raise ValueError(
                f"the data position to resume from is of a run with {name} {state[name]}, this one "
                f"has {name} {start[name]} ({source.spec!r}): expected the same data and seed"
            )
    # Runs of older versions have none, as have sets that cannot tell.
    before = state.get("fingerprint")
    known = None not in (before, fingerprint)
    # What a fingerprint has after a + is of a later version than `before` may be.
    if known and before != fingerprint and not fingerprint.startswith(f"{before}+"):
        raise ValueError(
            f"{source.spec!r} has changed since the run began, though it still has {len(source)} "
            "examples: put the former data there, or begin a new run, which can take this one's "
            "weights (--init)"
        )
    return state | {"fingerprint": fingerprint or before}


@dataclasses.dataclass
class EvalBatch:
    """A batch of one pass over a set: this process's rows.

    A row is zero where the last batch is padded, or where the example could not be used.

    Attributes:
      image: uint8[b, height, width, 3]; of videos uint8[b, T, height, width, 3].
      example_valid: bool[b], False on such rows.
      index: int32[b], of the example in the source; -1 in padding.
      examples: the examples; None where `example_valid` is False.
      bad: counts of the examples that could not be used, by cause.
    """

    image: UInt8[np.ndarray, "b *T height width 3"]
    example_valid: Bool[np.ndarray, " b"]
    index: Int32[np.ndarray, " b"]
    examples: list[Example | None]
    bad: dict[str, int]


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
    """Passes once over a set in order, in batches of one shape.

    Nothing is random. Process p holds rows [p * b, (p + 1) * b) of every batch, with b = batch_size
    // process_count, and all processes get the same number of batches.

    Args:
      source: the examples.
      processor: reads the images.
      batch_size: rows of a batch over all processes.
      limit: the number of examples, from the first on; None: all.
      process_index: the number of this process, below `process_count`.
      process_count: how many processes share each batch.
      threads: threads that read.
      blind: every image is black.

    Raises:
      ValueError: at the call, `batch_size` is not a multiple of `process_count`.
    """
    rows = _share("data.eval_batch_size", batch_size, process_count)
    total = len(source) if limit is None else min(limit, len(source))
    blank = np.zeros(processor.image_shape, np.uint8)

    def load(number: int) -> tuple[int, _Read]:
        batch, row = divmod(int(number), rows)
        index = batch * batch_size + process_index * rows + row
        if index >= total:
            return -1, _Read([])
        try:
            example = source[index]
            image = blank if blind else processor.read(example.image)
            return index, _Read([], example, image)
        except (BadExample, BadImage) as error:
            return index, _Read([(error.cause, str(error))])
        except Exception as error:
            return index, _Read([], error=error)

    def batches() -> Iterator[EvalBatch]:
        import grain

        num_batches = -(-total // batch_size)
        options = grain.ReadOptions(threads, max(threads, rows))
        numbers = grain.MapDataset.range(num_batches * rows)
        loaded = iter(numbers.map(load).to_iter_dataset(options))
        bad = collections.Counter()
        try:
            for _ in range(num_batches):
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
    """Describes counts by cause, such as "12 corrupt, 3 no caption".

    The most frequent cause comes first.
    """
    return ", ".join(
        f"{count} {cause}" for cause, count in collections.Counter(counts).most_common()
    )


def _count(counts: collections.Counter, bad: list[tuple[str, str]]) -> None:
    """Counts bad examples by cause, and logs the first of each."""
    for cause, message in bad:
        counts[cause] += 1
        if counts[cause] == 1:
            _log.warning("skipping this example and others like it (%s): %s", cause, message)


def _share(field: str, batch_size: int, process_count: int) -> int:
    """Returns the number of rows of one process.

    Raises:
      ValueError: `batch_size` is not a multiple of `process_count`; the error names `field`.
    """
    if batch_size % process_count:
        raise ValueError(f"{field} {batch_size} is not a multiple of the {process_count} processes")
    return batch_size // process_count
