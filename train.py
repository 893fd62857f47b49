"""Trains a MaMMUT: mesh, data, model, optimizer, restore, loop.

    python train.py [configs/RECIPE.py] [--workdir DIR] [--resume] [--compile-only] [--dotted.override VALUE]

The recipe's `get_config()` returns the run's `TrainConfig`; any of its fields can be overridden by its dotted name
(`--optimizer.learning-rate 1e-3`). A fresh run never writes into a used folder; `--resume` continues one bit for bit.
"""

import argparse
import importlib.util
import logging
import pathlib
import signal
import sys
import time
from typing import Any

import jax
import numpy as np
import tyro

from mammut import checkpoint, data, sharding, sources
from mammut.config import TrainConfig, to_dict
from mammut.evaluation import Evaluator
from mammut.model import forward_flops
from mammut.processor import ImageTransform, Processor
from mammut.run_log import RunLog
from mammut.tasks import TASKS
from mammut.tokenizer import load_tokenizer, train_sentencepiece
from mammut.training import Trainer, make_trainer

DEFAULT_RECIPE = pathlib.Path(__file__).parent / "configs" / "tiny.py"
SAMPLES_PRINTED = 10
# What a resumed run may change: how it is watched, placed and fed, and how long it goes on; not what it computes.
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
    return module.get_config()


def resolve(args: argparse.Namespace, overrides: list[str]) -> tuple[TrainConfig, pathlib.Path]:
    """The run's config and folder; refuses a used folder, or a config that does not fit the run to resume."""
    workdir = args.workdir or default_workdir((args.recipe or DEFAULT_RECIPE).stem, args.resume)
    used = (workdir / "run.json").exists()
    if args.resume and not used:
        raise ValueError(f"there is no run to resume in {workdir}: run.json is missing")
    if used and not args.resume:
        raise ValueError(f"{workdir} holds a run already: give another --workdir, or --resume")
    if not args.resume:
        return parse_overrides(load_recipe(args.recipe or DEFAULT_RECIPE), overrides), workdir
    saved, saved_overrides = checkpoint.read_run(workdir)
    base = parse_overrides(load_recipe(args.recipe), saved_overrides) if args.recipe else saved
    config = parse_overrides(base, overrides)
    if changed := differences(to_dict(saved), to_dict(config)):
        raise ValueError(f"the run in {workdir} cannot go on with another config: {'; '.join(changed)} in its run.json")
    return config, workdir


def parse_overrides(config: TrainConfig, overrides: list[str]) -> TrainConfig:
    """The config with `--dotted.name VALUE` overrides; a flag that does not exist is refused with the nearest that does."""
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
        tokenizer = train_sentencepiece(sources.captions(source), vocab_size, config.tokenizer.lowercase)
    else:
        tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.lowercase)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer.path {config.tokenizer.path} has {tokenizer.vocab_size} pieces, more than the {vocab_size} of "
            "model.text.vocab_size"
        )
    image = ImageTransform(config.model.vision.image_size, max_image_pixels=config.data.max_image_pixels)
    return Processor(tokenizer, image, config.model.text.max_length)


def report(config: TrainConfig, trainer: Trainer, source: sources.Source, processor: Processor) -> str:
    """What the run is about to do: data, parameters and their placement, FLOPs."""
    params = trainer.abstract_state.params
    flops = {part: 3 * count * config.data.batch_size for part, count in forward_flops(config.model).items()}
    share = ", ".join(f"{part} {count / sum(flops.values()):.0%}" for part, count in flops.items())
    mesh = " x ".join(f"{name} {size}" for name, size in trainer.mesh.shape.items())
    return "\n".join([
        f"data        {source.spec}: {len(source):,} examples, batch {config.data.batch_size}, "
        f"{processor.vocab_size:,} pieces of vocabulary",
        f"mesh        {mesh} on {trainer.mesh.devices.flat[0].device_kind}",
        sharding.placement_report(params, jax.tree.map(lambda x: x.sharding, params)),
        f"{sum(flops.values()) / 1e9:,.1f} GFLOP a step, backward included: {share}",
    ])


def compile_only(trainer: Trainer, config: TrainConfig) -> str:
    """Compiles the step for the devices here and says what it takes of each."""
    batch_size, text, side = config.data.batch_size, config.model.text, config.model.vision.image_size
    shapes = {"image": ((batch_size, side, side, 3), np.uint8), "tokens": ((batch_size, text.max_length), np.int32),
              "text_valid": ((batch_size, text.max_length), np.bool_)}  # fmt: skip
    place = sharding.batch_sharding(trainer.mesh)
    batch = {name: jax.ShapeDtypeStruct(*shape, sharding=place) for name, shape in shapes.items()}
    start = time.perf_counter()
    memory = trainer.step.lower(trainer.abstract_state, batch).compile().memory_analysis()
    return (
        f"compiled in {time.perf_counter() - start:.0f} s; MB a device: arguments {memory.argument_size_in_bytes / 1e6:,.1f}"
        f" (donated {memory.alias_size_in_bytes / 1e6:,.1f}), temporaries {memory.temp_size_in_bytes / 1e6:,.1f}"
    )


def train(config: TrainConfig, workdir: pathlib.Path, *, resume: bool, only_compile: bool, overrides: list[str]) -> None:
    """The run. Everything that can be refused is refused before anything is compiled."""
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(config.compilation_cache).expanduser()))
    first = jax.process_index() == 0
    mesh = sharding.make_mesh(config.mesh)
    image_size = config.model.vision.image_size
    source = sources.open_source(config.data.train, image_size=image_size, tfds_dir=config.data.tfds_dir)
    val = config.data.val and sources.open_source(config.data.val, image_size=image_size, tfds_dir=config.data.tfds_dir)
    processor = Processor.load(workdir) if resume else make_processor(config, source)

    with jax.set_mesh(mesh):
        trainer = make_trainer(config, TASKS[config.task](config.loss), mesh)
        evaluator = val and Evaluator(val, processor, config.data, trainer)
        if first:
            print(report(config, trainer, source, processor), flush=True)
        if only_compile:
            print(compile_only(trainer, config))
            return
        with checkpoint.Checkpoints(workdir, config.keep_checkpoints) as checkpoints:
            start, position = 0, None
            if resume and checkpoints.steps:
                restored = checkpoints.restore(trainer.abstract_state)
                start, state, position = restored.step, restored.state, restored.data
            else:
                state = trainer.init(config.seed)
            batches = data.TrainBatches(source, processor, config.data, seed=config.seed, state=position,
                                        process_index=jax.process_index(), process_count=jax.process_count())  # fmt: skip
            if not resume and first:
                processor.save(workdir)
                checkpoint.write_run(workdir, config, overrides)
            print(f"{'resuming' if resume else 'starting'} at step {start} of {config.steps} in {workdir}", flush=True)
            log = RunLog(workdir, start=start, steps=config.steps, batch_size=config.data.batch_size, enabled=first)
            state = loop(config, trainer, state, start, batches, evaluator, checkpoints, log)
        if first and int(state.step) == config.steps:
            checkpoint.save(workdir, trainer.model(jax.device_get(state.params)), processor, overwrite=True)
            log.print(f"model saved: mammut.load({str(workdir)!r})")
        log.close()


def loop(config, trainer, state, start, batches, evaluator, checkpoints, log):
    """Steps from `start` to `config.steps`; a SIGTERM saves a checkpoint and stops."""
    terminated = []
    signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
    position, metrics, step = batches.state(), None, start
    transferred = data.prefetch(batches, lambda batch: sharding.device_batch(batch, trainer.mesh))
    try:
        for step in range(start + 1, config.steps + 1):
            batch, position, waited = next(transferred)
            state, current = trainer.step(state, batch)
            # One step behind: reading this step's metrics now would leave the device idle while the host goes on.
            check_finite(metrics, config)
            metrics = current
            log.advance(waited)
            if step == start + 1:
                jax.block_until_ready(metrics)
                log.train(step, metrics)
            elif step % config.log_every == 0:
                log.train(step, metrics)
            stop = bool(terminated)
            if evaluator and config.eval_every and step % config.eval_every == 0 and step < config.steps and not stop:
                log.evaluation(step, "val", evaluator(state.params), samples=2)
                log.restart_clock()
            if step % config.checkpoint_every == 0 or step == config.steps or stop:
                checkpoints.save(step, state, position)
            if stop:
                log.print(f"SIGTERM: saved step {step}; go on with --resume")
                return state
        check_finite(metrics, config)
    finally:
        transferred.close()
        batches.close()
    if batches.bad_counts:
        log.print(f"examples that could not be used: {data.describe_bad(batches.bad_counts)}")
    if evaluator:
        log.evaluation(config.steps, "val", evaluator(state.params), samples=SAMPLES_PRINTED)
    return state


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
        config, workdir = resolve(args, overrides)
        train(config, workdir, resume=args.resume, only_compile=args.compile_only, overrides=overrides)
    except (ValueError, FloatingPointError) as error:
        logging.getLogger().debug("refused", exc_info=True)
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
