"""Trains a MaMMUT: mesh, data, model, optimizer, restore, loop.

python train.py [configs/RECIPE.py] [OPTIONS]

The recipe's `get_config()` returns the run's `TrainConfig`; an option changes a field of it by its
dotted name (`--optimizer.learning-rate 1e-3`). A fresh run never writes into a used folder;
`--resume` continues one bit for bit. One process drives all devices of its machine. A run over
several machines is this command on each, with the same folder.
"""

import contextlib
import functools
import logging
import os
import pathlib
import sys
from collections.abc import Callable

import jax

from mammut.config import TrainConfig
from mammut.core import distributed, sharding
from mammut.data import batches as data
from mammut.data import sources
from mammut.data.prefetch import prefetch
from mammut.data.processor import Processor
from mammut.pages.report import write_report
from mammut.performance.compile_report import compile_report
from mammut.performance.out_of_memory import enough_memory
from mammut.training import command_line
from mammut.training.log import RunLog
from mammut.training.new_processor import shared_processor
from mammut.training.run import Run, require_same, resolve, stages
from mammut.training.run_folder import (
    claim_folder,
    position_of_all,
    position_of_one,
    renew_folder,
)
from mammut.training.start_report import start_report
from mammut.training.step import Trainer, TrainState, make_trainer
from mammut.training.tasks import TASKS, Task
from mammut.training.validation import Evaluator
from mammut.weights import model_folder
from mammut.weights.checkpoints import Checkpoints, Restored
from mammut.weights.model_card import write_card
from mammut.weights.warm_start import WarmStart, warm_start

DEFAULT_RECIPE = pathlib.Path(__file__).parent / "configs" / "tiny.py"
SAMPLES_PRINTED = 10


def train(run: Run, watchdog: distributed.Watchdog) -> bool:
    """Trains the run, or the rest of one.

    Returns False if a SIGTERM ended it early.

    What can be refused is refused before anything is compiled and before anything is written. Every
    process of the run calls this. Each reads its part of the data; the first writes and prints.
    """
    config = run.config
    workdir = run.workdir
    fresh = not (workdir / "processor.json").exists()
    use_compilation_cache(config)
    mesh = sharding.make_mesh(config.mesh)
    shard, shard_count = distributed.batch_shard(mesh)
    task = TASKS[config.task](config.loss)

    watchdog.doing("opening the data")
    source, val = open_sources(config, task)
    warm = None
    if run.starts:
        warm = warm_start(
            config.model,
            run.starts,
            compute=config.compute,
            new_vocabulary=config.tokenizer.replace,
        )
    watchdog.doing("making the vocabulary")
    processor = shared_processor(config, source, run.starts) if fresh else Processor.load(workdir)

    with jax.set_mesh(mesh):
        trainer = make_trainer(config, task, mesh)
        evaluator = None
        if val:
            evaluator = Evaluator(val, processor, config, trainer, str(workdir), watchdog.alive)
        open_batches = batches_of(config, task, source, processor, shard, shard_count)
        batches = open_batches()
        distributed.say(start_report(run, trainer, source, processor.vocab_size, warm, fresh))
        claim_folder(workdir, config, run.overrides, processor, fresh)
        checkpoints = Checkpoints(workdir, config.keep_checkpoints, cleanup=True)
        start = 0
        restored = newest_checkpoint(checkpoints, trainer, watchdog)
        if restored:
            start = restored.step
            batches = open_batches(state=position_of_one(restored.data, shard))
        if start > config.steps:
            raise ValueError(
                f"steps is {config.steps}, {workdir} has a checkpoint of step {start}: expected no "
                "fewer"
            )
        if not fresh:
            renew_folder(workdir, config, run.overrides)

        log = RunLog(
            workdir,
            start=start,
            steps=config.steps,
            batch_size=config.data.batch_size,
            silent=not distributed.first(),
        )
        beginning = "starting" if fresh else "resuming"
        log.print(f"{beginning} at step {start} of {config.steps} in {workdir}")
        with contextlib.closing(log), checkpoints, contextlib.closing(batches):
            state = restored.state if restored else fresh_state(config, trainer, warm)
            state, done = loop(
                config, trainer, state, start, batches, shard, evaluator, checkpoints, log, watchdog
            )
            if not done:
                return False
            save_model(run, trainer, state, processor, evaluator, log, watchdog)

    # Outside of the mesh: the first process runs the model alone, and would wait for the others
    # without end.
    if distributed.first():
        watchdog.doing("the report")
        distributed.say(f"report: {write_report(workdir)}")
    return True


def use_compilation_cache(config: TrainConfig) -> None:
    """Keeps XLA's compiled programs in the configured folder.

    It does so only where that is safe.
    """
    if config.compilation_cache:
        folder = pathlib.Path(config.compilation_cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        # A program for several CPU devices that is read from the cache runs its collectives in no
        # fixed order: a deadlock.
        jax.config.update("jax_enable_compilation_cache", False)


def open_sources(config: TrainConfig, task: Task) -> tuple[sources.Source, sources.Source | None]:
    """Opens the training set, and the validation set if any."""
    open_source = functools.partial(
        sources.open_source,
        image_size=config.model.vision.image_size,
        tfds_dir=config.data.tfds_dir,
        field=task.field,
    )
    source = open_source(config.data.train)
    val = open_source(config.data.val) if config.data.val else None
    return source, val


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


def newest_checkpoint(
    checkpoints: Checkpoints, trainer: Trainer, watchdog: distributed.Watchdog
) -> Restored | None:
    """Finds the newest good checkpoint; None if there is no checkpoint."""
    # By the list of process 0: another list may be a moment older, and all have to restore.
    if not distributed.broadcast_from_first(
        "has checkpoints", lambda: b"yes" if checkpoints.steps else b""
    ):
        return None
    watchdog.doing("restoring")
    return checkpoints.restore(trainer.abstract_state)


def fresh_state(config: TrainConfig, trainer: Trainer, warm: WarmStart | None) -> TrainState:
    """Makes the state at step 0.

    The weights are random, or those of the model that the run starts from.
    """
    with enough_memory(config):
        if warm is None:
            return trainer.init(config.seed)
        return trainer.init_from(trainer.start_params(config.seed, warm.random, warm.read))


def save_model(
    run: Run,
    trainer: Trainer,
    state: TrainState,
    processor: Processor,
    evaluator: Evaluator | None,
    log: RunLog,
    watchdog: distributed.Watchdog,
) -> None:
    """Writes the model of a finished run.

    Its last evaluation and its card are written, too.
    """
    watchdog.doing("saving the model")
    model = trainer.model(state.all_params)
    model_folder.save(run.workdir, model, processor, overwrite=True)
    watchdog.doing("the last evaluation")
    evaluation = evaluator(state.all_params) if evaluator else None
    if not distributed.first():
        return
    if evaluation:
        log.evaluation(run.config.steps, "val", evaluation, samples=SAMPLES_PRINTED)
        evaluation.save(run.workdir, "val")
    write_card(run.workdir, run.config.model, processor, run.config.compute)
    log.print(f"model saved: mammut.load({str(run.workdir)!r})")


def loop(
    config: TrainConfig,
    trainer: Trainer,
    state: TrainState,
    start: int,
    batches: data.TrainBatches,
    shard: int,
    evaluator: Evaluator | None,
    checkpoints: Checkpoints,
    log: RunLog,
    watchdog: distributed.Watchdog,
) -> tuple[TrainState, bool]:
    """Steps from `start` to `config.steps`.

    Returns the state, and whether the run is done.

    It is not done if a SIGTERM ended it early; the state is saved then.
    """
    termination = distributed.Termination()
    metrics = None
    position = batches.state()
    take_step = distributed.compiled_by_all(trainer.step)
    transfer = functools.partial(sharding.device_batch, mesh=trainer.mesh)
    with contextlib.closing(prefetch(batches, transfer)) as transferred:
        for step in range(start + 1, config.steps + 1):
            watchdog.doing(f"waiting for the batch of step {step}")
            batch, position, waited = next(transferred)

            watchdog.doing(f"step {step}")
            before = metrics
            with enough_memory(config):
                state, metrics = take_step(state, batch)
                if before is None:
                    jax.block_until_ready(metrics)
            # The check is one step behind: waiting for this step's metrics would leave the device
            # idle while the host goes on.
            check_finite(before, config)
            log.step(step, metrics, waited, record=step % config.log_every == 0)

            stop = termination.now()
            last = step == config.steps
            evaluates = evaluator and config.eval_every and step % config.eval_every == 0
            # The evaluation comes before the checkpoint: a run killed in it evaluates again when it
            # is resumed.
            if evaluates and not (stop or last):
                watchdog.doing(f"the evaluation at step {step}")
                log.evaluation(step, "val", evaluator(state.all_params), samples=2)
            if step % config.checkpoint_every == 0 or last or stop:
                watchdog.doing(f"saving step {step}")
                position = position_of_all(step, position, shard)
                checkpoints.save(step, state, position)
            if stop and not last:
                log.print(f"SIGTERM: saved step {step}, go on with --resume")
                return state, False

    check_finite(metrics, config)
    if position["bad"]:
        log.print(f"examples that could not be used: {data.describe_bad(position['bad'])}")
    return state, True


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


def main(argv: list[str]) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    recipe, args, overrides = command_line.parse(argv)
    try:
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
                "--compile-only is given with several processes, expected one process for all "
                "devices"
            )
        if args.compile_only:
            run = resolve(recipe, DEFAULT_RECIPE, args.workdir, overrides, resume=args.resume)
            print(compile_report(run.config, args.topology))
            return
        with distributed.processes(asked, "train.py"):
            run = resolve(recipe, DEFAULT_RECIPE, args.workdir, overrides, resume=args.resume)
            require_same(run)
            with distributed.Watchdog(run.config.step_timeout, "train.py") as watchdog:
                # a stage that a SIGTERM ended is the last
                all(train(stage, watchdog) for stage in stages(run))
    except distributed.EXPECTED as error:
        if os.environ.get("MAMMUT_TRACEBACK"):
            raise
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
