"""Trains a MaMMUT: mesh, data, model, optimizer, restore, loop.

    python train.py [configs/RECIPE.py] [--workdir DIR] [--resume] [--compile-only] [--dotted.override VALUE]

The recipe's `get_config()` returns the run's `TrainConfig`; any of its fields can be overridden by its dotted name
(`--optimizer.learning-rate 1e-3`). A fresh run never writes into a used folder; `--resume` continues one bit for bit.
"""

import argparse
import contextlib
import functools
import importlib.util
import logging
import os
import pathlib
import signal
import sys
from typing import Any

import jax
import tyro

from mammut import checkpoint, data, sharding, sources
from mammut.config import TrainConfig, to_dict
from mammut.evaluation import Evaluator
from mammut.processor import ImageTransform, Processor
from mammut.run_log import RunLog
from mammut.tasks import TASKS
from mammut.tokenizer import load_tokenizer, train_sentencepiece
from mammut.training import Trainer, TrainState, compile_report, make_trainer, start_report

DEFAULT_RECIPE = pathlib.Path(__file__).parent / "configs" / "tiny.py"
SAMPLES_PRINTED = 10
# What a resumed run may change: how it is watched, placed and fed, and how long it goes on (the learning rate follows
# the new length from there); nothing else.
RESUMABLE = {
    "steps", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints", "max_nonfinite_steps", "mesh",
    "compilation_cache", "data.val", "data.eval_batch_size", "data.val_examples", "data.threads", "data.max_bad_share",
    "data.tfds_dir",
}  # fmt: skip


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


def load_recipe(path: pathlib.Path) -> TrainConfig:
    """The config of a recipe file."""
    if not path.is_file():
        raise ValueError(f"there is no recipe {path}, expected a Python file with get_config() -> TrainConfig")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"the recipe {path} has no get_config(), expected one that returns a TrainConfig")
    config = module.get_config()
    if not isinstance(config, TrainConfig):
        raise ValueError(f"get_config() of {path} returns a {type(config).__name__}, expected a TrainConfig")
    return config


def resolve(args: argparse.Namespace, overrides: list[str]) -> tuple[TrainConfig, pathlib.Path, list[str]]:
    """The run's config, its folder, and all overrides that made the config, those of the run to resume included.

    Refuses a used folder, or a config that does not fit the run to resume.
    """
    workdir = args.workdir or default_workdir((args.recipe or DEFAULT_RECIPE).stem, args.resume)
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir {workdir} is a file, expected a folder or a new name")
    used = sorted(path.name for path in workdir.iterdir()) if workdir.exists() else []
    if args.resume and "run.json" not in used:
        raise ValueError(f"there is no run to resume in {workdir}: run.json is missing")
    if used and not args.resume:
        raise ValueError(f"--workdir {workdir} is not empty (it holds {used[0]}): give another, or --resume its run")
    if not args.resume:
        return parse_overrides(load_recipe(args.recipe or DEFAULT_RECIPE), overrides), workdir, overrides
    saved, saved_overrides = checkpoint.read_run(workdir)
    base = parse_overrides(load_recipe(args.recipe), saved_overrides) if args.recipe else saved
    config = parse_overrides(base, overrides)
    if changed := differences(to_dict(saved), to_dict(config)):
        raise ValueError(f"the run in {workdir} cannot go on with another config: {'; '.join(changed)} in its run.json")
    return config, workdir, saved_overrides + overrides


def parse_overrides(config: TrainConfig, overrides: list[str]) -> TrainConfig:
    """The config with `--dotted.name VALUE` overrides; an unknown name is refused, with the nearest that exists."""
    flags = (tyro.conf.FlagConversionOff,)  # every override has a value, booleans too
    return tyro.cli(TrainConfig, default=config, args=overrides, prog="train.py", description=__doc__, config=flags)


def differences(saved: dict[str, Any], config: dict[str, Any], prefix: str = "") -> list[str]:
    """The fields that keep a run from being resumed."""
    changed = []
    for name, value in config.items():
        field, old = prefix + name, saved.get(name)
        if field in RESUMABLE or value == old:
            continue
        if isinstance(value, dict) and isinstance(old, dict):
            changed += differences(old, value, field + ".")
        else:
            changed.append(f"{field} is {value}, it was {old}")
    return changed


def default_workdir(recipe: str, resume: bool) -> pathlib.Path:
    """runs/RECIPE, or -2, -3 ...: the newest used one to resume, the first free one otherwise."""
    names = (pathlib.Path("runs") / (recipe if n == 1 else f"{recipe}-{n}") for n in range(1, sys.maxsize))
    newest = pathlib.Path("runs") / recipe
    for workdir in names:
        if not workdir.exists():
            return newest if resume else workdir
        newest = workdir


def make_processor(config: TrainConfig, source: sources.Source) -> Processor:
    """The processor of a fresh run: a given vocabulary, or one trained on the captions of the training set."""
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
    return Processor(tokenizer, image, config.model.text.max_length)


def train(
    config: TrainConfig, workdir: pathlib.Path, overrides: list[str], *, resume: bool, only_compile: bool
) -> None:
    """The run. What can be refused is refused before anything is compiled, and before anything is written."""
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(config.compilation_cache).expanduser()))
    if jax.process_count() > 1:
        raise ValueError(f"there are {jax.process_count()} processes, expected 1: runs over several are not there yet")
    mesh = sharding.make_mesh(config.mesh)
    settings = {"image_size": config.model.vision.image_size, "tfds_dir": config.data.tfds_dir}
    source = sources.open_source(config.data.train, **settings)
    val = config.data.val and sources.open_source(config.data.val, **settings)
    processor = Processor.load(workdir) if resume else make_processor(config, source)

    with jax.set_mesh(mesh):
        trainer = make_trainer(config, TASKS[config.task](config.loss), mesh)
        evaluator = val and Evaluator(val, processor, config.data, trainer)
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
            state = trainer.init(config.seed) if state is None else state
            state, done = loop(config, trainer, state, start, batches, evaluator, checkpoints, log)
            if done and evaluator:
                log.evaluation(config.steps, "val", evaluator(state.params), samples=SAMPLES_PRINTED)
            if done:
                checkpoint.save(workdir, trainer.model(jax.device_get(state.params)), processor, overwrite=True)
                log.print(f"model saved: mammut.load({str(workdir)!r})")


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
        config, workdir, overrides = resolve(args, overrides)
        train(config, workdir, overrides, resume=args.resume, only_compile=args.compile_only)
    except (ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("MAMMUT_TRACEBACK"):
            raise
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
