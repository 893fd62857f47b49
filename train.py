"""Trains a MaMMUT: mesh, data, model, optimizer, restore, loop.

    python train.py [configs/RECIPE.py] [--workdir DIR] [--resume] [--compile-only] [--dotted.override VALUE]

The recipe's `get_config()` returns the run's `TrainConfig`; any of its fields can be overridden by its dotted name
(`--optimizer.learning-rate 1e-3`). A fresh run never writes into a used folder; `--resume` continues one bit for bit.
"""

import argparse
import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import signal
import sys

import jax

from mammut import checkpoint, data, model_folder, sharding, sources
from mammut.compile_report import compile_report
from mammut.config import TrainConfig
from mammut.evaluation import Evaluation, Evaluator
from mammut.interop.rules import OpenedModel
from mammut.model_card import write_card
from mammut.processor import ImageTransform, Processor
from mammut.recipes import Run, resolve
from mammut.report import write_report
from mammut.run_log import RunLog
from mammut.scoring import save_scores, score
from mammut.tasks import TASKS
from mammut.tokenizer import MissingTokenizer, load_tokenizer, train_sentencepiece
from mammut.training import Trainer, TrainState, make_trainer, start_report
from mammut.warm_start import Start, WarmStart, warm_start

DEFAULT_RECIPE = pathlib.Path(__file__).parent / "configs" / "tiny.py"
SAMPLES_PRINTED = 10


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits the command line into this program's own arguments and the overrides of the config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, add_help=False)  # fmt: skip
    parser.add_argument("--workdir", type=pathlib.Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--topology")
    # The recipe comes first: later on, a bare word is the value of an override.
    first = argv[:1] if argv and not argv[0].startswith("-") else []
    args, overrides = parser.parse_known_args(argv[len(first) :])
    args.recipe = pathlib.Path(first[0]) if first else None
    return args, overrides


def make_processor(config: TrainConfig, source: sources.Source, starts: dict[Start, OpenedModel]) -> Processor:
    """The processor of a fresh run: of what it starts from, or with a given or a newly trained vocabulary."""
    of = {name: opened.processor for name, opened in starts.items()}
    text, settings = config.model.text, config.tokenizer
    decoder = next((name for name in ("init_text", "init") if name in starts), None)
    tokenizer = missing = None
    if decoder and not settings.replace:
        tokenizer = of[decoder] and of[decoder].tokenizer
        if isinstance(tokenizer, MissingTokenizer):
            tokenizer, missing = None, tokenizer
        if tokenizer and settings.path:
            raise ValueError(f"tokenizer.path and {decoder} are given: tokenizer.replace True takes another vocabulary")
        if not (tokenizer or settings.path):
            raise ValueError(
                f"{decoder} {starts[decoder].where} comes without a tokenizer: tokenizer.path says where it is, "
                "tokenizer.replace True takes another"
            )
    if tokenizer is None and settings.path:
        tokenizer = load_tokenizer(settings.path, settings.lowercase)
    elif tokenizer is None:
        tokenizer = train_sentencepiece(sources.texts(source), text.vocab_size, settings.lowercase)
    if tokenizer.vocab_size > text.vocab_size:
        raise ValueError(
            f"tokenizer.path {settings.path} has {tokenizer.vocab_size} pieces, more than the {text.vocab_size} of "
            "model.text.vocab_size"
        )
    size = config.model.vision.image_size
    image = next((of[name].image for name in ("init_vision", "init") if of.get(name)), ImageTransform(size))
    image = dataclasses.replace(image, image_size=size, max_image_pixels=config.data.max_image_pixels)
    form = of[decoder].text_form if of.get(decoder) else "start_end"
    processor = Processor(tokenizer, image, text.max_length, form)
    if missing:
        missing.require_same_ids(tokenizer)
    if settings.replace and text.pad_id not in (None, processor.pad_id):
        raise ValueError(f"model.text.pad_id is {text.pad_id}, the pad of the new vocabulary is {processor.pad_id}")
    return processor


def train(run: Run, *, resume: bool) -> None:
    """The run. What can be refused is refused before anything is compiled, and before anything is written."""
    config, workdir = run.config, run.workdir
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(config.compilation_cache).expanduser()))
    if jax.process_count() > 1:
        raise ValueError(f"there are {jax.process_count()} processes, expected 1: runs over several are not there yet")
    mesh = sharding.make_mesh(config.mesh)
    task = TASKS[config.task](config.loss)
    settings = {"image_size": config.model.vision.image_size, "tfds_dir": config.data.tfds_dir, "field": task.field}
    source = sources.open_source(config.data.train, **settings)
    val = config.data.val and sources.open_source(config.data.val, **settings)
    warm = warm_start(config.model, run.starts, new_vocabulary=config.tokenizer.replace) if run.starts else None
    processor = Processor.load(workdir) if resume else make_processor(config, source, run.starts)

    with jax.set_mesh(mesh):
        trainer = make_trainer(config, task, mesh)
        evaluator = val and Evaluator(val, processor, config, trainer, str(workdir))
        open_batches = functools.partial(data.TrainBatches, source, processor, config.data, seed=config.seed)
        batches = open_batches()
        print(start_report(config, trainer, source, processor.vocab_size), flush=True)
        if warm:
            print(warm, flush=True)
        if not resume:
            processor.save(workdir)
            checkpoint.write_run(workdir, config, run.overrides)
        checkpoints = checkpoint.Checkpoints(workdir, config.keep_checkpoints, cleanup=True)
        start, state = 0, None
        if checkpoints.steps:
            restored = checkpoints.restore(trainer.abstract_state)
            start, state, batches = restored.step, restored.state, open_batches(state=restored.data)
        if start > config.steps:
            raise ValueError(f"steps is {config.steps}, {workdir} has a checkpoint of step {start}: expected no fewer")
        if resume:
            checkpoint.write_run(workdir, config, run.overrides)  # what may change in a resumed run is changed for good
            # Until the run is done again, the model is that of the newest checkpoint, not what an earlier end exported.
            (workdir / "manifest.json").unlink(missing_ok=True)
        log = RunLog(workdir, start=start, steps=config.steps, batch_size=config.data.batch_size)
        log.print(f"{'resuming' if resume else 'starting'} at step {start} of {config.steps} in {workdir}")
        with contextlib.closing(log), contextlib.closing(checkpoints), contextlib.closing(batches):
            state = fresh_state(config, trainer, warm) if state is None else state
            state, done = loop(config, trainer, state, start, batches, evaluator, checkpoints, log)
            if not done:
                return
            model_folder.save(workdir, trainer.model(state.params), processor, overwrite=True)
            if evaluator:
                evaluation = evaluator(state.params)
                log.evaluation(config.steps, "val", evaluation, samples=SAMPLES_PRINTED)
                save_evaluation(workdir, "val", evaluation)
            write_card(workdir, config.model, processor)
            log.print(f"model saved: mammut.load({str(workdir)!r})")
        print(f"report: {write_report(workdir)}")


def fresh_state(config: TrainConfig, trainer: Trainer, warm: WarmStart | None) -> TrainState:
    """The state at step 0: random weights, or those of what the run starts from."""
    if warm is None:
        return trainer.init(config.seed)
    return trainer.init_from(trainer.start_params(config.seed, warm.random, warm.read))


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
        run = resolve(args.recipe, DEFAULT_RECIPE, args.workdir, overrides, resume=args.resume)
        if args.compile_only:
            print(compile_report(run.config, args.topology))
        else:
            train(run, resume=args.resume)
    except (ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("MAMMUT_TRACEBACK"):
            raise
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
