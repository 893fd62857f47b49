"""Trains a MaMMUT: mesh, data, model, optimizer, restore, loop.

python train.py [configs/RECIPE.py] [OPTIONS]

The recipe's `get_config()` returns the run's `TrainConfig`; an option changes a field of it by its
dotted name (`--optimizer.learning-rate 1e-3`). A fresh run never writes into a used folder;
`--resume` continues one bit for bit. One process drives all devices of its machine. A run over
several machines is this command on each, with the same folder.

SIGTERM, SIGHUP and Ctrl-C stop a run, which is saved first: exit status 75. Where there was nothing
to save it is 128 and the signal's number. A second Ctrl-C ends the program at once.
"""

import contextlib
import functools
import logging
import os
import pathlib
import signal
import sys
from collections.abc import Callable

if __name__ == "__main__":
    # A file opened later would take the place of an output that is closed, and its prints.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)

    # Ctrl-C while the libraries below are read, which takes seconds, shows no traceback of them.
    def interrupted(*_) -> None:
        os.write(2, b"train.py: Ctrl-C: stopped before there was anything to save\n")
        os._exit(128 + signal.SIGINT)

    signal.signal(signal.SIGINT, interrupted)

import jax

from mammut.config import TrainConfig
from mammut.core import distributed, sharding
from mammut.core.environment import require_device, set_arithmetic, use_compilation_cache
from mammut.core.stopping import STOPPED, Stopped, Stopping, leave
from mammut.core.terminal import say
from mammut.data import batches as data
from mammut.data import sources
from mammut.data.processor import Processor
from mammut.pages.report import write_report
from mammut.performance.compile_report import compile_report
from mammut.performance.out_of_memory import enough_memory
from mammut.training import command_line
from mammut.training.claim import claim
from mammut.training.log import RunLog
from mammut.training.loop import Loop, progress
from mammut.training.new_processor import shared_processor
from mammut.training.run import Run, require_same, resolve, stages
from mammut.training.run_folder import (
    claim_folder,
    is_fresh,
    position_of_one,
    renew_folder,
    write_run,
    write_state,
)
from mammut.training.start_report import start_report
from mammut.training.step import Trainer, TrainState, make_trainer, require_precise
from mammut.training.tasks import TASKS, Task
from mammut.training.validation import Evaluator, ValidationResult
from mammut.weights import model_folder
from mammut.weights.checkpoints import Checkpoints, Restored
from mammut.weights.model_card import write_card
from mammut.weights.warm_start import WarmStart, warm_start

DEFAULT_RECIPE = pathlib.Path(__file__).parent / "configs" / "tiny.py"
SAMPLES_PRINTED = 10


def train(run: Run, watchdog: distributed.Watchdog, stopping: Stopping) -> bool:
    """Trains the run, or the rest of one.

    Returns False if a SIGTERM or Ctrl-C ended it early.

    What can be refused is refused before anything is compiled and before anything is written. Every
    process of the run calls this. Each reads its part of the data; the first writes and prints.
    """
    config = run.config
    workdir = run.workdir
    fresh = run.overwrite or is_fresh(workdir)
    use_compilation_cache(config.compilation_cache)
    mesh = sharding.make_mesh(config.mesh)
    shard, shard_count = distributed.batch_shard(mesh)
    task = TASKS[config.task](config.loss)

    watchdog.doing("opening the data")
    source, val = open_sources(config, task, watchdog.alive)
    warm = warm_start_of(run)
    processor = processor_of(run, source, fresh, watchdog)

    with jax.set_mesh(mesh):
        trainer = make_trainer(config, task, mesh)
        if fresh:
            require_precise(trainer.abstract_state.params)
        evaluator = None
        if val:
            alive = functools.partial(progress, watchdog, stopping)
            evaluator = Evaluator(val, processor, config, trainer, str(workdir), alive)
        open_batches = batches_of(config, task, source, processor, shard, shard_count)
        batches = open_batches()
        distributed.say(start_report(run, trainer, source, processor.vocab_size, warm, fresh))
        claim_folder(workdir, config, run.overrides, processor, fresh, run.overwrite)
        checkpoints, restored = open_checkpoints(run, trainer, watchdog)
        start = 0
        if restored:
            start = restored.step
            batches = open_batches(state=position_of_one(restored.data, shard))
        if not fresh:
            renew_folder(workdir, config, run.overrides, processor, start)

        log = RunLog(
            workdir,
            start=start,
            steps=config.steps,
            batch_size=config.data.batch_size,
            silent=not distributed.first(),
            videos=config.data.frames is not None,
        )
        beginning = "starting" if fresh else "resuming"
        log.print(f"{beginning} at step {start} of {config.steps} in {workdir}")
        memory = functools.partial(enough_memory, config)
        parts = (batches, shard, evaluator, checkpoints, log, watchdog, stopping, memory)
        closing = contextlib.closing
        with stopping.deferred(), closing(log), checkpoints, closing(batches):
            state = restored.state if restored else fresh_state(config, trainer, warm)
            loop = Loop(config, trainer, *parts)
            state, done = loop.loop(state, start)
            if not (done and save_model(run, state, processor, loop)):
                return False

    # Outside of the mesh: the first process runs the model alone, and would wait for the others
    # without end.
    if distributed.first():
        write_run(workdir, config, run.overrides, "done", processor)
        watchdog.doing("the report")
        with stopping.deferred():
            say_report(workdir)
    return True


def say_report(workdir: pathlib.Path) -> None:
    """Writes the report of a run that is done, or says why it cannot."""
    try:
        said = f"report: {write_report(workdir)}"
    except (OSError, ValueError) as error:
        said = f"the run is done, but its report cannot be written: {error}"
    distributed.say(said)


def open_sources(
    config: TrainConfig, task: Task, alive: Callable[[], None]
) -> tuple[sources.Source, sources.Source | None]:
    """Opens the training set, and the validation set if any.

    `alive` is called again and again meanwhile.
    """
    open_source = functools.partial(
        sources.open_source,
        image_size=config.model.vision.image_size,
        tfds_dir=config.data.tfds_dir,
        field=task.field,
        video=config.data.frames is not None,
        alive=alive,
    )
    source = open_source(config.data.train)
    val = open_source(config.data.val) if config.data.val else None
    return source, val


def warm_start_of(run: Run) -> WarmStart | None:
    """Reads the models that a run starts from; None where there are none."""
    if not run.starts:
        return None
    return warm_start(
        run.config.model,
        run.starts,
        compute=run.config.compute,
        new_vocabulary=run.config.tokenizer.replace,
    )


def processor_of(
    run: Run, source: sources.Source, fresh: bool, watchdog: distributed.Watchdog
) -> Processor:
    """Makes the processor of a fresh run, or reads that of the run to go on with."""
    if not fresh:
        return Processor.load(run.workdir)
    watchdog.doing("making the vocabulary")
    return shared_processor(run.config, source, run.starts, watchdog.alive)


def batches_of(
    config: TrainConfig,
    task: Task,
    source: sources.Source,
    processor: Processor,
    shard_index: int,
    shard_count: int,
) -> Callable[..., data.TrainBatches]:
    """Returns the function that opens the batches of this process.

    This process reads the shard `shard_index` of `shard_count`.
    """
    return functools.partial(
        data.TrainBatches,
        source,
        processor,
        config.data,
        seed=config.seed,
        process_index=shard_index,
        process_count=shard_count,
        low_image_size=config.model.vision.low_image_size,
        low_steps=config.low_image_steps,
        images=task.sees_images,
    )


def open_checkpoints(
    run: Run, trainer: Trainer, watchdog: distributed.Watchdog
) -> tuple[Checkpoints, Restored | None]:
    """Opens the checkpoints of a run and restores the newest good one, if there is any.

    Raises:
      ValueError: the run is to have fewer steps than it has.
    """
    checkpoints = Checkpoints(
        run.workdir,
        run.config.keep_checkpoints,
        cleanup=True,
        saved=functools.partial(write_state, run.workdir, "running", after="begun"),
    )
    # By the list of process 0: another list may be a moment older, and all have to restore.
    if not distributed.broadcast_from_first(
        "has checkpoints", lambda: b"yes" if checkpoints.steps else b""
    ):
        return checkpoints, None
    watchdog.doing("restoring")
    restored = checkpoints.restore(trainer.abstract_state)
    if restored.step > run.config.steps:
        raise ValueError(
            f"steps is {run.config.steps}, {run.workdir} has a checkpoint of step {restored.step}: "
            "expected no fewer"
        )
    return checkpoints, restored


def fresh_state(config: TrainConfig, trainer: Trainer, warm: WarmStart | None) -> TrainState:
    """Makes the state at step 0.

    The weights are random, or those of the model that the run starts from.
    """
    with enough_memory(config):
        if warm is None:
            return trainer.init(config.seed)
        return trainer.init_from(trainer.start_params(config.seed, warm.random, warm.read))


def save_model(run: Run, state: TrainState, processor: Processor, loop: Loop) -> bool:
    """Writes the model of a finished run.

    Its last evaluation and its card are written, too.

    Returns False where a signal ended the last evaluation.
    """
    loop.watchdog.doing("saving the model")
    model = loop.trainer.model(state.all_params)
    model_folder.save(run.workdir, model, processor, overwrite=True)
    if loop.evaluator:
        loop.checkpoints.wait()
        loop.stopping.unsaved = False
        save = functools.partial(ValidationResult.save, workdir=run.workdir, name="val")
        if not loop.evaluate(run.config.steps, state, SAMPLES_PRINTED, save):
            loop.say_stopped(run.config.steps)
            return False
    if distributed.first():
        write_card(run.workdir, run.config.model, processor, run.config.compute)
        loop.log.print(f"model saved: mammut.load({str(run.workdir)!r})")
    return True


def main(argv: list[str]) -> int:
    """Runs the program and returns its exit status.

    An error ends it with one sentence and status 1.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        return run_program(argv)
    except Stopped as stopped:
        say(f"train.py: {stopped}", "stderr")
        return stopped.status
    except distributed.EXPECTED as error:
        if os.environ.get("MAMMUT_TRACEBACK"):
            raise
        sys.exit(f"train.py: {error}")


def run_program(argv: list[str]) -> int:
    """Does what a command line asks for, and returns the exit status."""
    recipe, args, overrides = command_line.parse(argv)
    if {"-h", "--help"} & {*argv}:
        command_line.print_help(command_line.load_recipe(recipe or DEFAULT_RECIPE), __doc__)
    asked = distributed.Processes(
        args.distributed,
        args.coordinator,
        args.num_processes,
        args.process_id,
        args.peer_timeout,
    )
    if args.topology and not args.compile_only:
        raise ValueError(
            f"--topology {args.topology} is given without --compile-only, which compiles for it"
        )
    if args.compile_only and (asked.cluster or asked.count is not None):
        raise ValueError(
            "--compile-only is given with several processes, expected one process for all devices"
        )
    set_arithmetic()
    if args.compile_only:
        run = resolve(recipe, DEFAULT_RECIPE, args.workdir, overrides, resume=args.resume)
        print(compile_report(run.config, args.topology))
        return 0
    name = (recipe or DEFAULT_RECIPE).stem
    with (
        distributed.processes(asked, "train.py"),
        Stopping("train.py") as stopping,
        claim(args.workdir, name, args.resume) as workdir,
    ):
        require_device()
        run = resolve(
            recipe,
            DEFAULT_RECIPE,
            workdir,
            overrides,
            resume=args.resume,
            overwrite=args.overwrite,
        )
        require_same(run)
        with distributed.Watchdog(run.config.step_timeout, "train.py") as watchdog:
            # a stage that a signal ended is the last
            done = all(train(stage, watchdog, stopping) for stage in stages(run))
    return 0 if done else STOPPED


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
