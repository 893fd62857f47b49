"""The loop of a run: steps, checkpoints and evaluations, and where it stops."""

import contextlib
import dataclasses
import functools
import os
import traceback
from collections.abc import Callable

import jax

from mammut.core import distributed, sharding
from mammut.core.stopping import Stopped, Stopping
from mammut.data.batches import TrainBatches, describe_bad
from mammut.data.prefetch import prefetch
from mammut.training.config import TrainConfig
from mammut.training.log import RunLog
from mammut.training.run_folder import position_of_all
from mammut.training.step import Trainer, TrainState
from mammut.training.validation import Evaluator, ValidationResult
from mammut.weights.checkpoints import Checkpoints


@dataclasses.dataclass
class Loop:
    """What the steps of a run need.

    Attributes:
      shard: the shard of the batches that this process reads.
      evaluator: None where the run has no validation set.
      memory: makes the context in which a program that does not fit into memory is explained.
    """

    config: TrainConfig
    trainer: Trainer
    batches: TrainBatches
    shard: int
    evaluator: Evaluator | None
    checkpoints: Checkpoints
    log: RunLog
    watchdog: distributed.Watchdog
    stopping: Stopping
    memory: Callable[[], contextlib.AbstractContextManager]

    def loop(self, state: TrainState, start: int) -> tuple[TrainState, bool]:
        """Steps from `start` to `config.steps`, inside `stopping.deferred`.

        Returns the state, and whether the run is done. It is not done if a signal ended it early;
        the last whole step is saved then.
        """
        config = self.config
        metrics = None
        position = self.batches.state()
        self._saved = start or None  # the newest step that is saved
        if self._is_evaluated(start) and not self._was_evaluated(start):
            # The run was stopped or killed in this evaluation, such as for its memory.
            self.log.print(
                f"making the evaluation at step {start}, in which the run ended: --eval-every 0 "
                "makes none"
            )
            if not self.evaluate(start, state, samples=2):
                return self._stop(start, state, position)
        take_step = distributed.compiled_by_all(self.trainer.step)
        transfer = functools.partial(sharding.device_batch, mesh=self.trainer.mesh)
        ahead = prefetch(self.batches, transfer, stop=lambda: self.stopping.alone)
        with contextlib.closing(ahead):
            for step in range(start + 1, config.steps + 1):
                self.watchdog.doing(f"waiting for the batch of step {step}")
                ready = next(ahead, None)
                if ready is None:
                    return self._stop(step - 1, state, position)
                batch, position, waited = ready

                self.watchdog.doing(f"step {step}")
                before = metrics
                with self.memory():
                    state, metrics = take_step(state, batch)
                    if before is None:
                        jax.block_until_ready(metrics)
                self.stopping.unsaved = True
                # The check is one step behind: waiting for this step's metrics would leave the
                # device idle while the host goes on.
                check_finite(before, config)
                self.checkpoints.poll()
                self.log.step(step, metrics, waited, record=step % config.log_every == 0)

                stop = self.stopping.now()
                last = step == config.steps
                evaluates = self._is_evaluated(step)
                is_due = step % config.checkpoint_every == 0
                if is_due or last or stop or (evaluates and config.stop_on_failed_evaluation):
                    position = self._save(step, state, position)
                if evaluates and not stop:
                    self.checkpoints.wait()  # no evaluation can lose what was saved
                    self.stopping.unsaved = self._saved != step
                    stop = not self.evaluate(step, state, samples=2)
                if stop and not last:
                    return self._stop(step, state, position)

        check_finite(metrics, config)
        if position["bad"]:
            self.log.print(f"examples that could not be used: {describe_bad(position['bad'])}")
        return state, True

    def evaluate(
        self,
        step: int,
        state: TrainState,
        samples: int,
        save: Callable[[ValidationResult], None] | None = None,
    ) -> bool:
        """Evaluates a state and logs the evaluation, or why it failed.

        `save` takes the evaluation on process 0.

        Returns False where a signal ended the evaluation: it is to be made again.

        Raises:
          ValueError: it failed, and `config.stop_on_failed_evaluation` is True; or it failed on one
            of several processes alone, which cannot go on together.
        """
        self.watchdog.doing(f"the evaluation at step {step}")
        try:
            with self.stopping.interruptible():
                evaluation = self.evaluator(state.all_params)
        except Stopped:
            return False
        except Exception as error:
            if self.stopping.alone:  # something has turned `Stopped` into an error of its own
                return False
            cause = _cause(error)
            alike = distributed.same_everywhere(f"evaluation/{step}", cause)
            self._failed(step, cause, error, goes_on=alike)
            return True
        self.log.evaluation(step, "val", evaluation, samples)
        if save and distributed.first():
            try:
                save(evaluation)
            except Exception as error:
                self._failed(step, _cause(error), error, goes_on=True)
        return True

    def _failed(self, step: int, cause: str, error: Exception, goes_on: bool) -> None:
        if os.environ.get("MAMMUT_TRACEBACK"):
            traceback.print_exception(error)
        if self.config.stop_on_failed_evaluation or not goes_on:
            raise ValueError(
                f"the evaluation at step {step} failed: {cause}; the run is saved, go on with "
                "--resume"
            ) from error
        self.log.evaluation_failed(step, cause)

    def _is_evaluated(self, step: int) -> bool:
        """Tells whether the loop evaluates a step; the last one is evaluated after it."""
        every = self.config.eval_every
        is_due = 0 < step < self.config.steps and every > 0 and step % every == 0
        return self.evaluator is not None and is_due

    def _was_evaluated(self, step: int) -> bool:
        known = distributed.broadcast_from_first(
            "evaluated", lambda: b"yes" if self.log.evaluated(step) else b""
        )
        return bool(known)

    def _save(self, step: int, state: TrainState, position: dict) -> dict:
        """Saves a step that is not saved yet; returns the position with the counts of all."""
        if step == self._saved:
            return position
        self.watchdog.doing(f"saving step {step}")
        position = position_of_all(step, position, self.shard)
        self.checkpoints.save(step, state, position)
        self._saved = step
        return position

    def _stop(self, step: int, state: TrainState, position: dict) -> tuple[TrainState, bool]:
        self._save(step, state, position)
        self.checkpoints.wait()
        self.say_stopped(step)
        return state, False

    def say_stopped(self, step: int) -> None:
        """Says that a signal ended the run, which is saved."""
        self.log.print(f"{self.stopping.name}: saved step {step}, go on with --resume")
        self.stopping.saved()


def progress(watchdog: distributed.Watchdog, stopping: Stopping) -> None:
    """Notes that an evaluation makes progress, and ends it where a signal stops the run."""
    watchdog.alive()
    stopping.check()


def check_finite(metrics: dict[str, jax.Array] | None, config: TrainConfig) -> None:
    """Stops the run after too many skipped updates in a row.

    All processes have the same metrics.

    Raises:
      FloatingPointError: the last `config.max_nonfinite_steps` updates were skipped.
    """
    if metrics is not None and int(metrics["nonfinite_in_a_row"]) >= config.max_nonfinite_steps:
        raise FloatingPointError(
            f"the loss or its gradient was not finite {config.max_nonfinite_steps} steps in a row "
            "(max_nonfinite_steps); the parameters are those before"
        )


def _cause(error: Exception) -> str:
    """Describes an error in one line."""
    text = next(iter(str(error).splitlines()), "")
    if isinstance(error, distributed.EXPECTED) and text:
        return text
    return f"{type(error).__name__}: {text}".removesuffix(": ")
