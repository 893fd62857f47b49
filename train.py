"""Trains a MaMMUT: mesh, data, model, optimizer, restore, loop.

    python train.py [configs/RECIPE.py] [--workdir DIR] [--resume] [--compile-only] [--dotted.override VALUE]

The recipe's `get_config()` returns the run's `TrainConfig`; any of its fields can be overridden by its dotted name
(`--optimizer.learning-rate 1e-3`). A fresh run never writes into a used folder; `--resume` continues one bit for bit.
"""

import argparse
import contextlib
import functools
import logging
import os
import pathlib
import signal
import sys

import jax
from flax import nnx

from mammut import checkpoint, data, sharding, sources
from mammut.config import TrainConfig
from mammut.evaluation import Evaluation, Evaluator
from mammut.processor import ImageTransform, Processor
from mammut.recipes import resolve
from mammut.report import write_report
from mammut.run_log import RunLog
from mammut.scoring import save_scores, score
from mammut.tasks import TASKS
from mammut.tokenizer import load_tokenizer, train_sentencepiece
from mammut.training import Trainer, TrainState, compile_report, make_trainer, start_report

DEFAULT_RECIPE = pathlib.Path(__file__).parent / "configs" / "tiny.py"
SAMPLES_PRINTED = 10


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits the command line into this program's own arguments and the overrides of the config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, add_help=False)  # fmt: skip
    parser.add_argument("--workdir", type=pathlib.Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--compile-only", action="store_true")
    # The recipe comes first: later on, a bare word is the value of an override.
    first = argv[:1] if argv and not argv[0].startswith("-") else []
    args, overrides = parser.parse_known_args(argv[len(first) :])
    args.recipe = pathlib.Path(first[0]) if first else None
    return args, overrides


def make_processor(config: TrainConfig, source: sources.Source) -> Processor:
    """The processor of a fresh run: that of the model it starts from, or with a given or a newly trained vocabulary."""
    of_init = config.init and Processor.load(pathlib.Path(config.init).expanduser())
    if of_init and not config.tokenizer.replace:
        return of_init
    vocab_size = config.model.text.vocab_size
    if config.tokenizer.path is None:
        tokenizer = train_sentencepiece(sources.texts(source), vocab_size, config.tokenizer.lowercase)
    else:
        tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.lowercase)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer.path {config.tokenizer.path} has {tokenizer.vocab_size} pieces, more than the {vocab_size} of "
            "model.text.vocab_size"
        )
    image = ImageTransform(config.model.vision.image_size, max_image_pixels=config.data.max_image_pixels)
    return Processor(tokenizer, of_init.image if of_init else image, config.model.text.max_length)


def train(
    config: TrainConfig, workdir: pathlib.Path, overrides: list[str], *, resume: bool, only_compile: bool
) -> None:
    """The run. What can be refused is refused before anything is compiled, and before anything is written."""
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(config.compilation_cache).expanduser()))
    if jax.process_count() > 1:
        raise ValueError(f"there are {jax.process_count()} processes, expected 1: runs over several are not there yet")
    mesh = sharding.make_mesh(config.mesh)
    task = TASKS[config.task](config.loss)
    settings = {"image_size": config.model.vision.image_size, "tfds_dir": config.data.tfds_dir, "field": task.field}
    source = sources.open_source(config.data.train, **settings)
    val = config.data.val and sources.open_source(config.data.val, **settings)
    processor = Processor.load(workdir) if resume else make_processor(config, source)

    with jax.set_mesh(mesh):
        trainer = make_trainer(config, task, mesh)
        evaluator = val and Evaluator(val, processor, config, trainer, str(workdir))
        open_batches = functools.partial(data.TrainBatches, source, processor, config.data, seed=config.seed)
        batches = open_batches()
        print(start_report(config, trainer, source, processor.vocab_size), flush=True)
        if only_compile:
            print(compile_report(config, trainer))
            return
        if not resume:
            processor.save(workdir)
            checkpoint.write_run(workdir, config, overrides)
        checkpoints = checkpoint.Checkpoints(workdir, config.keep_checkpoints, cleanup=True)
        start, state = 0, None
        if checkpoints.steps:
            restored = checkpoints.restore(trainer.abstract_state)
            start, state, batches = restored.step, restored.state, open_batches(state=restored.data)
        if start > config.steps:
            raise ValueError(f"steps is {config.steps}, {workdir} has a checkpoint of step {start}: expected no fewer")
        if resume:
            checkpoint.write_run(workdir, config, overrides)  # what may change in a resumed run has changed for good
            # Until the run is done again, the model is that of the newest checkpoint, not what an earlier end exported.
            (workdir / "manifest.json").unlink(missing_ok=True)
        log = RunLog(workdir, start=start, steps=config.steps, batch_size=config.data.batch_size)
        log.print(f"{'resuming' if resume else 'starting'} at step {start} of {config.steps} in {workdir}")
        with contextlib.closing(log), contextlib.closing(checkpoints), contextlib.closing(batches):
            state = fresh_state(config, trainer) if state is None else state
            state, done = loop(config, trainer, state, start, batches, evaluator, checkpoints, log)
            if not done:
                return
            checkpoint.save(workdir, trainer.model(jax.device_get(state.params)), processor, overwrite=True)
            if evaluator:
                evaluation = evaluator(state.params)
                log.evaluation(config.steps, "val", evaluation, samples=SAMPLES_PRINTED)
                save_evaluation(workdir, "val", evaluation)
            log.print(f"model saved: mammut.load({str(workdir)!r})")
        print(f"report: {write_report(workdir)}")


def fresh_state(config: TrainConfig, trainer: Trainer) -> TrainState:
    """The state at step 0: random weights, or those of the model to start from."""
    if config.init is None:
        return trainer.init(config.seed)
    model, _ = checkpoint.load(pathlib.Path(config.init).expanduser())
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    if config.tokenizer.replace:  # an id is another token now
        fresh = jax.device_get(trainer.init(config.seed).params["text"])
        params["text"] |= {name: fresh[name] for name in ("token_embed", "vocab_head") if name in fresh}
    return trainer.init_from(params)


def save_evaluation(workdir: pathlib.Path, name: str, evaluation: Evaluation) -> None:
    """Writes the last evaluation's predictions and scores into the run, as the programs of `eval/` would."""
    for predictions in evaluation.predictions:
        stem = workdir / "eval" / f"{predictions.task}_{name}"
        predictions.save(stem.with_name(stem.name + ".predictions.jsonl"))
        save_scores(stem.with_name(stem.name + ".json"), predictions, score(predictions, java=False))


def loop(
    config: TrainConfig,
    trainer: Trainer,
    state: TrainState,
    start: int,
    batches: data.TrainBatches,
    evaluator: Evaluator | None,
    checkpoints: checkpoint.Checkpoints,
    log: RunLog,
) -> tuple[TrainState, bool]:
    """Steps from `start` to `config.steps`; returns the state, and False if a SIGTERM ended it (and saved it) early."""
    terminated = []
    signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
    metrics, position = None, batches.state()
    transfer = functools.partial(sharding.device_batch, mesh=trainer.mesh)
    with contextlib.closing(data.prefetch(batches, transfer)) as transferred:
        for step in range(start + 1, config.steps + 1):
            batch, position, waited = next(transferred)
            before, (state, metrics) = metrics, trainer.step(state, batch)
            # One step behind: waiting for this step's metrics would leave the device idle while the host goes on.
            check_finite(before, config)
            log.step(step, metrics, waited, record=step % config.log_every == 0)
            stop, last = bool(terminated), step == config.steps
            # Before the checkpoint: a run killed in an evaluation does it again when it is resumed.
            if evaluator and config.eval_every and step % config.eval_every == 0 and not (stop or last):
                log.evaluation(step, "val", evaluator(state.params), samples=2)
            if step % config.checkpoint_every == 0 or last or stop:
                checkpoints.save(step, state, position)
            if stop and not last:
                log.print(f"SIGTERM: saved step {step}, go on with --resume")
                return state, False
    check_finite(metrics, config)
    if position["bad"]:
        log.print(f"examples that could not be used: {data.describe_bad(position['bad'])}")
    return state, True


def check_finite(metrics: dict[str, jax.Array] | None, config: TrainConfig) -> None:
    """Stops the run after too many skipped updates in a row."""
    if metrics is not None and int(metrics["nonfinite_in_a_row"]) >= config.max_nonfinite_steps:
        raise FloatingPointError(
            f"the loss or its gradient was not finite {config.max_nonfinite_steps} steps in a row "
            "(max_nonfinite_steps); the parameters are those before"
        )


def main(argv: list[str]) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    args, overrides = parse_args(argv)
    try:
        config, workdir, overrides = resolve(args.recipe, DEFAULT_RECIPE, args.workdir, overrides, resume=args.resume)
        train(config, workdir, overrides, resume=args.resume, only_compile=args.compile_only)
    except (ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("MAMMUT_TRACEBACK"):
            raise
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
