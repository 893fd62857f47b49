"""The loop of a run: what is saved, evaluated and logged, whatever fails or stops it."""

import contextlib
import json
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest
from marks import long

from mammut.config import MeshConfig, TrainConfig
from mammut.core import distributed, sharding, stopping
from mammut.core.stopping import Stopped, Stopping
from mammut.data.batches import TrainBatches
from mammut.data.prefetch import prefetch
from mammut.testing import tiny_config
from mammut.training.log import RunLog
from mammut.training.loop import Loop
from mammut.training.step import Trainer, TrainState
from mammut.training.validation import Evaluator, ValidationResult
from mammut.weights.checkpoints import Checkpoints


class Batches(TrainBatches):
    """Batches whose number is their position; reading number `stuck` takes for ever."""

    spec = "jsonl:stuck"

    def __init__(self, position: int = 0, stuck: int | None = None):
        self._position, self._stuck = position, stuck
        self.gate = threading.Event()

    def __next__(self) -> dict[str, np.ndarray]:
        if self._position + 1 == self._stuck:
            self.gate.wait()
        self._position += 1
        return {"number": np.full(8, self._position)}

    def state(self) -> dict:
        return {"position": self._position, "read": self._position, "bad": {}}

    def close(self) -> None:
        self.gate.set()


class Saved(Checkpoints):
    """Checkpoints that note what is saved."""

    steps = None

    def __init__(self, events: list[str]):
        self.steps: dict[int, tuple] = {}
        self._events = events

    def save(self, step: int, state, position: dict) -> None:
        assert step not in self.steps and position["position"] == step
        self._events.append(f"save {step}")
        self.steps[step] = state, position

    def poll(self) -> None:
        pass

    def wait(self) -> None:
        self._events.append("whole")


class Steps(Trainer):
    """Steps that are not computed."""

    def __init__(self, step: Callable):
        self.step = step
        self.mesh = sharding.make_mesh(MeshConfig(data=8))


class Evaluations(Evaluator):
    """Evaluations of a function of the step."""

    def __init__(self, function: Callable[[int], ValidationResult]):
        self._function = function

    def __call__(self, params) -> ValidationResult:
        return self._function(params["step"])


def state_of(step: int) -> TrainState:
    return TrainState(step, {"step": step}, None, 0, 0)


class Run:
    """A loop of steps that are not computed.

    Its state is the number of the last step.
    """

    def __init__(self, folder: pathlib.Path, evaluate: Callable[[int], dict[str, float]], **config):
        self.folder, self._evaluate = folder, evaluate
        settings = {"steps": 8, "eval_every": 3, "checkpoint_every": 3, "log_every": 1} | config
        self.config = TrainConfig(model=tiny_config(), **settings)
        self.events: list[str] = []
        self.during: Callable[[int], None] = lambda step: None

    def step(self, state, batch) -> tuple:
        number = int(batch["number"][0])
        assert number == state.step + 1
        self.during(number)
        self.events.append(f"step {number}")
        metrics = {"loss": 1 / number, "nonfinite": 0, "nonfinite_in_a_row": 0}
        return state_of(number), jax.tree.map(jax.numpy.asarray, metrics)

    def evaluate(self, step: int) -> ValidationResult:
        self.events.append(f"evaluate {step}")
        return ValidationResult(self._evaluate(step), [], 1, 1, {})

    def __call__(self, start: int = 0, stuck: int | None = None) -> bool:
        self.checkpoints = Saved(self.events)
        log = RunLog(self.folder, start=start, steps=8, batch_size=8, silent=False)
        watchdog = distributed.Watchdog(60.0, "train.py")
        batches = Batches(start, stuck)
        with (
            Stopping("train.py") as self.stopping,
            self.stopping.deferred(),
            contextlib.closing(log),
            contextlib.closing(batches),
        ):
            self.loop = Loop(
                self.config,
                Steps(self.step),
                batches,
                0,
                Evaluations(self.evaluate),
                self.checkpoints,
                log,
                watchdog,
                self.stopping,
                contextlib.nullcontext,
            )
            state, done = self.loop.loop(state_of(start), start)
            assert not done or state.step == 8
            return done

    def rows(self) -> list[dict]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [
            {key: value for key, value in row.items() if not key.startswith("perf/")}
            for row in rows
        ]


@pytest.fixture(autouse=True)
def no_exit(monkeypatch) -> Iterator[list[int]]:
    """Notes the statuses that would end the tests."""
    statuses = []
    monkeypatch.setattr(stopping.os, "_exit", statuses.append)
    return statuses


def send(number: signal.Signals, after: float = 0.0) -> None:
    threading.Timer(after, os.kill, [os.getpid(), number]).start()


# --- evaluations


def test_a_step_is_saved_whole_before_it_is_evaluated(tmp_path):
    run = Run(tmp_path, lambda step: {"score": float(step)})
    assert run()
    after = run.events[run.events.index("step 3") :][:4]
    assert after == ["step 3", "save 3", "whole", "evaluate 3"]
    assert [*run.checkpoints.steps] == [3, 6, 8]
    assert [row["step"] for row in run.rows() if "eval/val/score" in row] == [3, 6]


def fails(error: BaseException) -> Callable:
    def evaluate(step: int):
        raise error

    return evaluate


@pytest.mark.parametrize("error, cause", [
    (ValueError("the set has 'a.jpg' more than once"), "the set has 'a.jpg' more than once"),
    (OSError(5, "Input/output error"), "[Errno 5] Input/output error"),
    (MemoryError(), "MemoryError"),
    (BrokenPipeError(32, "Broken pipe"), "[Errno 32] Broken pipe"),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nand more"),
     "JaxRuntimeError: RESOURCE_EXHAUSTED: out of memory"),
    (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
])  # fmt: skip
def test_an_evaluation_that_fails_is_told_and_counted_and_training_goes_on(
    tmp_path, capsys, error, cause
):
    run = Run(tmp_path, fails(error))
    assert run()
    said = [line for line in capsys.readouterr().out.splitlines() if "failed" in line]
    assert said == [
        f"the evaluation at step 3 failed, number 1 of this run that did: {cause}",
        f"the evaluation at step 6 failed, number 2 of this run that did: {cause}",
    ]
    failed = [row for row in run.rows() if "eval_failed" in row]
    assert failed == [{"step": step, "eval_failed": cause} for step in (3, 6)]
    assert [*run.checkpoints.steps] == [3, 6, 8]


def test_a_run_may_be_told_to_stop_at_an_evaluation_that_fails(tmp_path):
    """The step is saved, although no checkpoint is due, and evaluated again on resume."""
    run = Run(tmp_path, fails(OSError("gone")), stop_on_failed_evaluation=True, checkpoint_every=8)
    message = "the evaluation at step 3 failed: gone; the run is saved, go on with --resume"
    with pytest.raises(ValueError, match=message):
        run()
    assert run.events[-3:] == ["save 3", "whole", "evaluate 3"]

    again = Run(tmp_path, lambda step: {"score": float(step)}, stop_on_failed_evaluation=True)
    assert again(start=3) and again.events[0] == "evaluate 3"


def test_an_evaluation_that_fails_to_be_written_is_told(tmp_path, capsys):
    run = Run(tmp_path, lambda step: {"score": 1.0})
    assert run()
    assert run.loop.evaluate(8, state_of(8), samples=1, save=fails(OSError(28, "No space left")))
    assert "the evaluation at step 8 failed" in capsys.readouterr().out


@pytest.mark.parametrize("at", [3, 6])
def test_a_run_that_was_killed_in_an_evaluation_has_the_records_of_one_that_was_not(tmp_path, at):
    folders = [tmp_path / name for name in ("straight", "killed")]
    for folder in folders:
        folder.mkdir()

    def evaluate(step: int):
        return {"score": step / 8}

    class Killed(BaseException):
        pass

    def killed(step: int):
        if step == at:
            raise Killed
        return evaluate(step)

    straight = Run(folders[0], evaluate)
    assert straight()
    with pytest.raises(Killed):
        Run(folders[1], killed)()
    resumed = Run(folders[1], evaluate)
    assert resumed(start=at)
    assert resumed.events[0] == f"evaluate {at}"
    assert resumed.rows() == straight.rows()
    once_more = Run(folders[1], evaluate)
    assert once_more(start=6) and once_more.events[0] == "step 7"  # it has its record


def test_an_evaluation_that_is_made_again_says_how_to_leave_it_out(tmp_path, capsys):
    """Where it ends every time, such as for its memory, the run would never go on."""
    run = Run(tmp_path, lambda step: {"score": 1.0})
    assert run(start=3) and run.events[0] == "evaluate 3"
    said = "making the evaluation at step 3, in which the run ended: --eval-every 0 makes none"
    assert said in capsys.readouterr().out
    (tmp_path / "metrics.jsonl").unlink()
    assert Run(tmp_path, fails(MemoryError()), eval_every=0)(start=3)


def test_a_step_that_could_not_be_saved_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
    run = Run(tmp_path, lambda step: {"score": 1.0}, eval_every=0, checkpoint_every=3)

    def poll(checkpoints: Saved) -> None:
        if checkpoints.steps:
            raise OSError("step 3 could not be saved: No space left on device")

    monkeypatch.setattr(Saved, "poll", poll)
    with pytest.raises(OSError, match="step 3 could not be saved"):
        run()
    assert run.events == ["step 1", "step 2", "step 3", "save 3", "step 4"]


# --- signals


@pytest.fixture
def restored_hangup():
    """SIGHUP as a terminal sets it; tests that run under nohup would ignore it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number, name", [
    (signal.SIGTERM, "SIGTERM"),
    (signal.SIGINT, "Ctrl-C"),
    (signal.SIGHUP, "SIGHUP"),
])  # fmt: skip
def test_a_signal_saves_the_step_it_came_in(tmp_path, capsys, restored_hangup, number, name):
    run = Run(tmp_path, lambda step: {"score": 1.0})

    def signalled(step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), number)
            time.sleep(0.5)  # a step takes its time: the answer is said meanwhile

    run.during = signalled
    assert not run()
    assert [*run.checkpoints.steps] == [3, 4]
    assert run.events[-2:] == ["save 4", "whole"]
    said = capsys.readouterr()
    assert f"{name}: saved step 4, go on with --resume" in said.out
    assert f"train.py: {name}: stopping, Ctrl-C stops at once" in said.err


def test_a_signal_at_a_step_that_is_evaluated_leaves_the_evaluation_to_the_resumed_run(tmp_path):
    run = Run(tmp_path, lambda step: {"score": 1.0})
    run.during = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 6 else None
    assert not run() and run.events[-1] == "whole" and [*run.checkpoints.steps] == [3, 6]
    assert "evaluate 6" not in run.events
    again = Run(tmp_path, lambda step: {"score": 1.0})
    assert again(start=6) and again.events[0] == "evaluate 6"


@pytest.mark.parametrize("checkpoint_every", [3, 8])
def test_a_signal_in_an_evaluation_drops_it_within_seconds(tmp_path, checkpoint_every):
    def evaluate(step: int):
        send(signal.SIGTERM, after=0.1)
        time.sleep(60)

    run = Run(tmp_path, evaluate, checkpoint_every=checkpoint_every)
    start = time.monotonic()
    assert not run()
    assert time.monotonic() - start < 20
    assert [*run.checkpoints.steps] == [3]
    assert not [row for row in run.rows() if any(key.startswith("eval") for key in row)]


def test_a_signal_is_seen_before_every_batch_of_an_evaluation(tmp_path):
    """Where something in the evaluation takes the exception for an error of its own."""

    def evaluate(step: int):
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        run.stopping.check()  # what the evaluator calls
        return {"score": 1.0}

    run = Run(tmp_path, evaluate)
    assert not run() and [*run.checkpoints.steps] == [3]


@pytest.mark.parametrize("stuck, saved", [long(1, 0), (6, 5), long(7, 6)])
def test_a_signal_while_waiting_for_a_batch_saves_the_last_whole_step(tmp_path, stuck, saved):
    run = Run(tmp_path, lambda step: {"score": 1.0}, eval_every=0)
    send(signal.SIGINT, after=1.0)
    start = time.monotonic()
    with contextlib.closing(Batches()):
        assert not run(stuck=stuck)
    assert time.monotonic() - start < 30
    assert max(run.checkpoints.steps) == saved


def test_a_second_ctrl_c_ends_the_program_at_once(tmp_path, no_exit, capsys):
    with Stopping("train.py") as asked, asked.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.4)
        assert asked.now() and not no_exit
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 20
        while not no_exit and time.monotonic() < deadline:
            time.sleep(0.01)
    assert no_exit[0] == 130 and "Ctrl-C twice: ended at once" in capsys.readouterr().err


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_there_is_anything_to_save_ends_the_start(number, status):
    with pytest.raises(Stopped, match="stopped before there was anything to save") as stopped:
        with Stopping("train.py"):
            os.kill(os.getpid(), number)
            time.sleep(60)
    assert stopped.value.status == status
    assert not isinstance(stopped.value, Exception)


def test_a_signal_that_was_raised_where_nothing_raises_ends_the_start_all_the_same():
    with pytest.raises(Stopped):
        with Stopping("train.py") as asked:
            with contextlib.suppress(Stopped):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
            with asked.deferred():
                raise AssertionError("the run has begun")


def test_a_signal_that_became_another_error_is_a_signal_still():
    with pytest.raises(Stopped) as stopped:
        with Stopping("train.py"):
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
            except Stopped as error:  # as Orbax does while it restores
                raise KeyError("failed to load") from error
    assert stopped.value.status == 130


class Dying:
    """Does something in its destructor, where Python raises nothing."""

    def __init__(self, call: Callable[[], None]):
        self.call = call

    def __del__(self):
        self.call()


def test_what_cannot_be_raised_is_printed_only_where_it_tells_something_new(monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda error: printed.append(str(error.exc_value)))

    def fail(message: str) -> None:
        raise RuntimeError(message)

    def signal_itself() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    with pytest.raises(Stopped):
        with Stopping("train.py") as asked:
            Dying(lambda: fail("Event loop is closed"))  # tensorstore, after a full disk
            Dying(lambda: fail("a defect"))
            Dying(signal_itself)
            with asked.deferred():
                raise AssertionError("the run has begun")
    assert printed == ["a defect"]


@pytest.mark.parametrize("unsaved, statuses", [(False, [75]), (True, [])])
def test_a_compilation_is_not_waited_for_where_nothing_is_lost(
    monkeypatch, no_exit, unsaved, statuses
):
    """The main thread is in one call; the watch ends the program beside it."""
    monkeypatch.setattr(stopping, "_PATIENCE", 0.05)
    with Stopping("train.py") as asked, asked.deferred():
        asked.unsaved = unsaved
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.6)
    assert no_exit == statuses


def test_what_does_not_end_when_all_is_saved_is_not_waited_for(monkeypatch, no_exit):
    monkeypatch.setattr(stopping, "_PATIENCE", 0.05)
    with Stopping("train.py") as asked, asked.deferred():
        asked.saved()
        time.sleep(0.5)
    assert no_exit == [stopping.STOPPED] == [75]


def test_handlers_are_put_back(no_exit):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Stopping("train.py"):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_hangup_is_ignored_where_nohup_ignores_it(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stopping("train.py") as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
            assert not asked.now()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_in_a_thread_has_no_signals(tmp_path, no_exit):
    done = []
    run = Run(tmp_path, lambda step: {"score": 1.0})
    thread = threading.Thread(target=lambda: done.append(run()))
    thread.start()
    thread.join()
    assert done == [True] and not no_exit


def test_a_reader_that_hangs_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("mammut.data.prefetch._PATIENCE", 0.1)
    batches = Batches(stuck=3)
    ahead = prefetch(batches, lambda batch: batch)
    next(ahead)
    start = time.monotonic()
    ahead.close()
    assert time.monotonic() - start < 10
    batches.close()
