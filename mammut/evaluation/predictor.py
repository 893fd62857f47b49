"""Batch prediction over a set of examples, on any mesh.

All batches have one shape. Each evaluation is a file of its own beside this one: functions that
take a `Predictor` and return `Predictions`, ready to be written and scored.
"""

import collections
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mammut.core import distributed, sharding
from mammut.core.params import logical_axes
from mammut.data.batches import EvalBatch, describe_bad, eval_batches
from mammut.data.examples import Example, Source
from mammut.data.processor import Processor
from mammut.evaluation.predictions import Predictions
from mammut.models.mammut import MaMMUT


def place_on_mesh(model: MaMMUT, mesh: Mesh) -> tuple[Callable[[Any], MaMMUT], Any]:
    """Places a model's parameters on a mesh.

    Returns:
      The function that makes a model of parameters, and the parameters.
    """
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    shardings = sharding.param_shardings(params, logical_axes(model), mesh)
    return functools.partial(nnx.merge, graphdef), jax.device_put(params, shardings)


class Predictor:
    """Runs functions of a model on sets of examples, inside `jax.set_mesh(mesh)`.

    Every process reads the whole set and hands its devices their rows, so that results are exact on
    any mesh. The last, smaller batch is padded. Examples that cannot be used are left out and
    counted.

    Args:
      model_of: makes the model of given parameters: `Trainer.model`, or the function that
        `place_on_mesh` returns.
      checkpoint: the folder of the parameters, named in the predictions.
      threads: threads that read and resize images.
      max_bad_share: the largest share of examples that may be unusable.
      blind: every image is black.
      progress: shows a progress bar on a terminal.
      alive: called before every batch that the model is run on.
      finished: takes each record of the predictions when it is finished, except of retrieval, whose
        records are all finished at the end.

    Raises:
      ValueError: `batch_size` does not divide over the mesh.
    """

    def __init__(
        self,
        model_of: Callable[[Any], MaMMUT],
        processor: Processor,
        mesh: Mesh,
        *,
        checkpoint: str,
        batch_size: int,
        threads: int = 4,
        max_bad_share: float = 0.1,
        blind: bool = False,
        progress: bool = False,
        alive: Callable[[], None] = lambda: None,
        finished: Callable[[dict[str, Any]], None] = lambda record: None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        sharding.require_divisible(batch_size, mesh, "batch_size")
        self.model_of = model_of
        self.processor = processor
        self.batch_size = batch_size
        self.threads = threads
        self.blind = blind
        self.finished = finished
        self._mesh = mesh
        self._checkpoint = checkpoint
        self._max_bad_share = max_bad_share
        self._progress = progress
        self._alive = alive
        self._compiled: dict[tuple, Callable] = {}

    @property
    def image_size(self) -> int:
        """The side of the model's images, in pixels."""
        return self.processor.image.image_size

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of one image: height, width, 3; of a video T, height, width, 3."""
        return self.processor.image_shape

    # Running functions of the model
    # ---------------------------------------------------------------------------------------------

    def run(self, function: Callable, params: Any, *arrays: Any, **static: Any) -> Any:
        """Computes `function(model, *arrays, **static)`, with the same result on all devices.

        The function is compiled when it is first needed.

        Args:
          function: a pure function of a model and arrays with a leading batch axis. Its compiled
            program is found by its identity: give a function of a module or a method, not a new
            lambda.
          arrays: NumPy arrays, which are placed on the mesh, or results of `run_sharded`.
          static: settings that the program is compiled for; they must be hashable.
        """
        everywhere = jax.NamedSharding(self._mesh, jax.P())
        return self._run(function, everywhere, params, arrays, static)

    def run_sharded(self, function: Callable, params: Any, *arrays: Any, **static: Any) -> Any:
        """Computes like `run`, but leaves the result on its devices."""
        return self._run(function, None, params, arrays, static)

    def run_rows(
        self, function: Callable, params: Any, *arrays: np.ndarray, shared: tuple = ()
    ) -> np.ndarray:
        """Computes `function(model, *shared, *arrays)` for any number of rows.

        The rows run in batches of one shape.

        Args:
          arrays: arrays with the same number of rows, at least one.
          shared: arguments that are the same for all rows.

        Returns:
          The results of the rows, along the first axis.
        """
        results = []
        for start in range(0, len(arrays[0]), self.batch_size):
            batch = [self._padded(array[start : start + self.batch_size]) for array in arrays]
            results.append(np.asarray(self.run(function, params, *shared, *batch)))
        return np.concatenate(results)[: len(arrays[0])]

    def _run(self, function, out_shardings, params, arrays, static) -> Any:
        key = (function, out_shardings, tuple(sorted(static.items())))
        if key not in self._compiled:

            def of_params(params, *arrays):
                return function(self.model_of(params), *arrays, **static)

            jitted = jax.jit(of_params, out_shardings=out_shardings)
            self._compiled[key] = distributed.compiled_by_all(jitted)
        self._alive()
        return self._compiled[key](params, *map(self._on_mesh, arrays))

    def _on_mesh(self, array: Any) -> Any:
        if isinstance(array, np.ndarray):
            return sharding.global_batch(array, self._mesh)
        return array

    def _padded(self, array: np.ndarray) -> np.ndarray:
        missing = self.batch_size - len(array)
        return np.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1)))

    # Reading a set
    # ---------------------------------------------------------------------------------------------

    def check(self, source: Source, limit: int) -> None:
        """Reads the first `limit` examples.

        Raises:
          ValueError: too many of them cannot be used.
        """
        for _ in self.batches(source, limit, collections.Counter()):
            pass

    def batches(
        self, source: Source, limit: int | None, left_out: collections.Counter
    ) -> Iterator[EvalBatch]:
        """Yields batches of the first `limit` examples of a set.

        A progress bar is shown.

        Args:
          limit: None for all examples.
          left_out: counts the examples that cannot be used, by cause.

        Raises:
          ValueError: too many examples were left out, or `limit` is not positive.
        """
        from tqdm import tqdm

        settings = {"batch_size": self.batch_size, "threads": self.threads, "blind": self.blind}
        total = len(source)
        if limit is not None:
            if limit < 1:
                raise ValueError(f"limit is {limit}, expected at least 1 example")
            total = min(limit, total)
        hidden = None if self._progress else True  # None: hidden where there is no terminal
        with tqdm(total=total, unit="example", disable=hidden, dynamic_ncols=True) as bar:
            for batch in eval_batches(source, self.processor, limit=limit, **settings):
                left_out.update(batch.bad)
                bad = left_out.total()
                # As soon as there are too many, not after the model has run on all others.
                if bad == total or bad > self._max_bad_share * total:
                    raise ValueError(
                        f"{bad} of {total} examples of {source.spec!r} could not be used "
                        f"({describe_bad(left_out)}), max_bad_share allows "
                        f"{self._max_bad_share:.0%}"
                    )
                yield batch
                bar.update(int((batch.index >= 0).sum()))

    def examples(
        self, source: Source, limit: int | None, left_out: collections.Counter
    ) -> Iterator[tuple[int, np.ndarray, Example]]:
        """Yields the usable examples of a set.

        Each comes as its index in the set, the image as the model sees it, and the example.
        """
        for batch in self.batches(source, limit, left_out):
            rows = zip(batch.index.tolist(), batch.image, batch.examples, strict=True)
            for index, image, example in rows:
                if example is not None:
                    yield index, image, example

    def predictions(
        self,
        task: str,
        records: list[dict[str, Any]],
        source: Source,
        left_out: collections.Counter,
        settings: dict[str, Any],
    ) -> Predictions:
        """Makes the `Predictions` of a set.

        It adds the settings that every evaluation has.
        """
        settings = settings | {"image_size": self.image_size, "blind": self.blind}
        frames = self.image_shape[:-3]
        if frames:
            settings["frames"] = frames[0]
        if notes := source.notes():
            settings["set_notes"] = notes
        return Predictions(task, records, source.spec, self._checkpoint, settings, dict(left_out))


def require_slot(text: str, what: str) -> None:
    """Checks that a prompt or template has a {}.

    Raises:
      ValueError: it has none; `what` names it in the error.
    """
    if "{}" not in text:
        raise ValueError(f"the {what} is {text!r}, expected a text with {{}} in it")


def require_prior(prior: float) -> None:
    """Checks the share of a prior that is subtracted.

    Raises:
      ValueError: it is not a number from 0 to 1.
    """
    if not 0 <= prior <= 1:  # nor NaN
        raise ValueError(f"prior is {prior}, expected a number from 0 to 1")


def require_new(name: str, seen: set[str], source: Source) -> None:
    """Adds an example's key, or a question's id, to those seen.

    Raises:
      ValueError: it was seen before. This ends an evaluation before the model runs any further.
    """
    if name in seen:
        raise ValueError(
            f"{source.spec!r} has {name!r} more than once, "
            "expected every image and question id once"
        )
    seen.add(name)
