"""From a command line to a run: its recipe, the overrides of it, its folder, and what a resumed run may change."""

import dataclasses
import importlib.util
import pathlib
import sys
from typing import Any

from mammut import checkpoint
from mammut.config import TrainConfig, to_dict

# What a resumed run may change: how it is watched, placed and fed, and how long it goes on (the learning rate follows
# the new length from there); nothing else.
RESUMABLE = {
    "steps", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints", "max_nonfinite_steps", "mesh",
    "compilation_cache", "data.val", "data.eval_batch_size", "data.val_examples", "data.threads", "data.max_bad_share",
    "data.tfds_dir",
}  # fmt: skip
# What a run may change of the model it starts from: how it is computed, not what it is.
COMPUTED = {"model.dtype", "model.remat", "model.unroll"}


def resolve(
    recipe: pathlib.Path | None, default_recipe: pathlib.Path, workdir: pathlib.Path | None, overrides: list[str], *,
    resume: bool,
) -> tuple[TrainConfig, pathlib.Path, list[str]]:  # fmt: skip
    """The run's config, its folder, and all overrides that made the config, those of the run to resume included.

    Raises:
      ValueError: the folder is used, or the config does not fit the run to resume or the model to start from.
    """
    workdir = workdir or default_workdir((recipe or default_recipe).stem, resume)
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir {workdir} is a file, expected a folder or a new name")
    used = sorted(path.name for path in workdir.iterdir()) if workdir.exists() else []
    if resume and "run.json" not in used:
        raise ValueError(f"there is no run to resume in {workdir}: run.json is missing")
    if used and not resume:
        raise ValueError(f"--workdir {workdir} is not empty (it holds {used[0]}): give another, or --resume its run")
    if not resume:
        return with_overrides(load_recipe(recipe or default_recipe), overrides), workdir, overrides
    saved, saved_overrides = checkpoint.read_run(workdir)
    base = with_overrides(load_recipe(recipe), saved_overrides) if recipe else saved
    config = parse_overrides(base, overrides)
    if changed := differences(to_dict(saved), to_dict(config), RESUMABLE):
        raise ValueError(f"the run in {workdir} cannot go on with another config: {'; '.join(changed)} in its run.json")
    return config, workdir, saved_overrides + overrides


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


def with_overrides(config: TrainConfig, overrides: list[str]) -> TrainConfig:
    """The config with its overrides; where it starts from a model (`init`), with the architecture of that model.

    Raises:
      ValueError: an override asks for another architecture than that of the model to start from.
    """
    overridden = parse_overrides(config, overrides)
    if overridden.init is None:
        return overridden
    if overridden.tokenizer.path is not None and not overridden.tokenizer.replace:
        raise ValueError("tokenizer.path and init are given: tokenizer.replace True takes the former's vocabulary")
    model = checkpoint.read_model_config(pathlib.Path(overridden.init).expanduser())
    config = parse_overrides(dataclasses.replace(config, model=model), overrides)
    free = COMPUTED | ({"model.text.vocab_size"} if config.tokenizer.replace else set())
    if changed := differences(to_dict(model), to_dict(config.model), free, "model."):
        raise ValueError(f"the model to start from, init {config.init}, is another one: {'; '.join(changed)}")
    return config


def parse_overrides(config: TrainConfig, overrides: list[str]) -> TrainConfig:
    """The config with `--dotted.name VALUE` overrides; an unknown name is refused, with the nearest that exists."""
    import tyro

    flags = (tyro.conf.FlagConversionOff,)  # every override has a value, booleans too
    return tyro.cli(TrainConfig, default=config, args=overrides, prog="train.py", config=flags)


def differences(saved: dict[str, Any], config: dict[str, Any], free: set[str], prefix: str = "") -> list[str]:
    """The fields of `config` that are not what they were, but for those in `free`."""
    changed = []
    for name, value in config.items():
        field, old = prefix + name, saved.get(name)
        if field in free or value == old:
            continue
        if isinstance(value, dict) and isinstance(old, dict):
            changed += differences(old, value, free, field + ".")
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
