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

import jax

from mammut.config import TrainConfig
from mammut.core import distributed, sharding
from mammut.data import batches as data
from mammut.data import sources
from mammut.data.processor import Processor
from mammut.pages.report import write_report
from mammut.performance.compile_report import compile_report
from mammut.performance.out_of_memory import enough_memory
from mammut.training import command_line
from mammut.training.log import RunLog
from mammut.training.new_processor import shared_processor
from mammut.training.run import Run, require_same, resolve, stages
from mammut.training.run_folder import position_of_all, position_of_one, require_shared, write_run
from mammut.training.start_report import start_report, untrained_towers
from mammut.training.step import Trainer, TrainState, make_trainer
from mammut.training.tasks import TASKS
from mammut.training.validation import Evaluator
from mammut.weights import model_folder
from mammut.weights.checkpoints import Checkpoints
from mammut.weights.model_card import write_card
from mammut.weights.warm_start import WarmStart, warm_start

DEFAULT_RECIPE = pathlib.Path(__file__).parent / "configs" / "tiny.py"
SAMPLES_PRINTED = 10


def train(run: Run, watchdog: distributed.Watchdog) -> bool:
    """The run, or the rest of one; False if a SIGTERM ended it early.

    What can be refused is refused before anything is compiled, and before anything is written. Of
    several processes all come through here. Each reads its share of the data; the first writes and
    prints.
    """
    config, workdir = run.config, run.workdir
    fresh = not (workdir / "processor.json").exists()
    if config.compilation_cache:
        jax.config.update(
            "jax_compilation_cache_dir", str(pathlib.Path(config.compilation_cache).expanduser())
        )
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        # Read back from the cache, a program for several CPU devices runs its collectives in no
        # order: a deadlock.
        jax.config.update("jax_enable_compilation_cache", False)
    mesh = sharding.make_mesh(config.mesh)
    share, shares = distributed.batch_share(mesh)
    task = TASKS[config.task](config.loss)
    settings = {
        "image_size": config.model.vision.image_size,
        "tfds_dir": config.data.tfds_dir,
        "field": task.field,
    }
    watchdog.doing("opening the data")
    source = sources.open_source(config.data.train, **settings)
    val = config.data.val and sources.open_source(config.data.val, **settings)
    warm = (
        warm_start(
            config.model,
            run.starts,
            compute=config.compute,
            new_vocabulary=config.tokenizer.replace,
        )
        if run.starts
        else None
    )
    watchdog.doing("making the vocabulary")
    processor = shared_processor(config, source, run.starts) if fresh else Processor.load(workdir)

    with jax.set_mesh(mesh):
        trainer = make_trainer(config, task, mesh)
        evaluator = val and Evaluator(val, processor, config, trainer, str(workdir), watchdog.alive)
        place = {"process_index": share, "process_count": shares, "images": task.sees_images}
        low = {
            "low_image_size": config.model.vision.low_image_size,
            "low_steps": config.low_image_steps,
        }
        open_batches = functools.partial(
            data.TrainBatches, source, processor, config.data, seed=config.seed, **place, **low
        )
        batches = open_batches()
        distributed.say(start_report(config, trainer, source, processor.vocab_size))
        if warm:
            distributed.say(str(warm))
        for tower in untrained_towers(trainer.abstract_state, run.starts, task) if fresh else ():
            distributed.say(
                f"warning: {tower} is frozen at random weights (trainable): init_{tower} names a model"
            )
        distributed.meet("nothing is refused")
        if distributed.first() and fresh:
            processor.save(workdir)
            write_run(workdir, config, run.overrides)
        distributed.meet("the folder is made")
        require_shared(workdir)
        checkpoints = Checkpoints(workdir, config.keep_checkpoints, cleanup=True)
        start, state = 0, None
        # By the list of process 0: that of another may be of a moment ago, and all have to restore.
        if distributed.from_first("has checkpoints", lambda: b"yes" if checkpoints.steps else b""):
            watchdog.doing("restoring")
            restored = checkpoints.restore(trainer.abstract_state)
            start, state = restored.step, restored.state
            batches = open_batches(state=position_of_one(restored.data, share))
        if start > config.steps:
            raise ValueError(
                f"steps is {config.steps}, {workdir} has a checkpoint of step {start}: expected no fewer"
            )
        if distributed.first() and not fresh:
            # what may change in a resumed run is changed for good
            write_run(workdir, config, run.overrides)
            # Until the run is done again, the model is that of the newest checkpoint, not what an
            # earlier end exported.
            (workdir / "manifest.json").unlink(missing_ok=True)
        silent = not distributed.first()
        log = RunLog(
            workdir,
            start=start,
            steps=config.steps,
            batch_size=config.data.batch_size,
            silent=silent,
        )
        log.print(
            f"{'starting' if fresh else 'resuming'} at step {start} of {config.steps} in {workdir}"
        )
        with contextlib.closing(log), checkpoints, contextlib.closing(batches):
            state = fresh_state(config, trainer, warm) if state is None else state
            state, done = loop(
                config, trainer, state, start, batches, share, evaluator, checkpoints, log, watchdog
            )
            if not done:
                return False
            watchdog.doing("saving the model")
            model_folder.save(workdir, trainer.model(state.all_params), processor, overwrite=True)
            watchdog.doing("the last evaluation")
            evaluation = evaluator and evaluator(state.all_params)
            if silent:
                return True
            if evaluation:
                log.evaluation(config.steps, "val", evaluation, samples=SAMPLES_PRINTED)
                evaluation.save(workdir, "val")
            write_card(workdir, config.model, processor, config.compute)
            log.print(f"model saved: mammut.load({str(workdir)!r})")
    # Outside of the mesh: the first process asks the model alone, and would wait for the others for
    # ever.
    watchdog.doing("the report")
    print(f"report: {write_report(workdir)}")
    return True


def fresh_state(config: TrainConfig, trainer: Trainer, warm: WarmStart | None) -> TrainState:
    """The state at step 0: random weights, or those of what the run starts from."""
    with enough_memory(config):
        if warm is None:
            return trainer.init(config.seed)
        return trainer.init_from(trainer.start_params(config.seed, warm.random, warm.read))


def loop(
    config: TrainConfig,
    trainer: Trainer,
    state: TrainState,
    start: int,
    batches: data.TrainBatches,
    share: int,
    evaluator: Evaluator | None,
    checkpoints: Checkpoints,
    log: RunLog,
    watchdog: distributed.Watchdog,
) -> tuple[TrainState, bool]:
    """Steps from `start` to `config.steps`; returns the state, and False if a SIGTERM ended it (and saved it) early."""
    termination = distributed.Termination()
    metrics, position = None, batches.state()
    take_step = distributed.compiled_by_all(trainer.step)
    transfer = functools.partial(sharding.device_batch, mesh=trainer.mesh)
    with contextlib.closing(data.prefetch(batches, transfer)) as transferred:
        for step in range(start + 1, config.steps + 1):
            watchdog.doing(f"waiting for the batch of step {step}")
            batch, position, waited = next(transferred)
            watchdog.doing(f"step {step}")
            before = metrics
            with enough_memory(config):
                state, metrics = take_step(state, batch)
                if before is None:
                    jax.block_until_ready(metrics)
            # One step behind: waiting for this step's metrics would leave the device idle while the
            # host goes on.
            check_finite(before, config)
            log.step(step, metrics, waited, record=step % config.log_every == 0)
            stop, last = termination.now(), step == config.steps
            # Before the checkpoint: a run killed in an evaluation does it again when it is resumed.
            if (
                evaluator
                and config.eval_every
                and step % config.eval_every == 0
                and not (stop or last)
            ):
                watchdog.doing(f"the evaluation at step {step}")
                log.evaluation(step, "val", evaluator(state.all_params), samples=2)
            if step % config.checkpoint_every == 0 or last or stop:
                watchdog.doing(f"saving step {step}")
                position = position_of_all(step, position, share)
                checkpoints.save(step, state, position)
            if stop and not last:
                log.print(f"SIGTERM: saved step {step}, go on with --resume")
                return state, False
    check_finite(metrics, config)
    if position["bad"]:
        log.print(f"examples that could not be used: {data.describe_bad(position['bad'])}")
    return state, True


def check_finite(metrics: dict[str, jax.Array] | None, config: TrainConfig) -> None:
    """Stops the run after too many skipped updates in a row; all processes have the same metrics."""
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
                "--compile-only is given with several processes, expected one process for all devices"
            )
        if args.compile_only:
            run = resolve(recipe, DEFAULT_RECIPE, args.workdir, overrides, resume=args.resume)
            print(compile_report(run.config, args.topology))
            return
        with distributed.processes(asked, "train.py"):
            run = resolve(recipe, DEFAULT_RECIPE, args.workdir, overrides, resume=args.resume)
            require_same(run)
            with distributed.Watchdog(run.config.step_timeout, "train.py") as watchdog:
                # a stage that was ended early ends them
                all(train(stage, watchdog) for stage in stages(run))
    except distributed.EXPECTED as error:
        if os.environ.get("MAMMUT_TRACEBACK"):
            raise
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
