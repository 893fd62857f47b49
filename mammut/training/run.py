"""From a command line to a run: recipe, overrides and folder.

A resumed run may change some settings only.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from mammut.core import distributed
from mammut.core.fields import differences, to_dict
from mammut.core.params import first_fitting, trained_names
from mammut.training.command_line import (
    default_workdir,
    load_recipe,
    parse_overrides,
    with_fitting_warmup,
    without,
)
from mammut.training.config import TrainConfig, fitting_warmup
from mammut.training.run_folder import (
    clear,
    is_unused,
    read_run,
    require_free,
    require_whole,
    write_run,
)
from mammut.weights.checkpoints import saved_steps
from mammut.weights.formats.mammut_run import RUN_FILE
from mammut.weights.model_folder import open_model
from mammut.weights.opened import OpenedModel, model_specs
from mammut.weights.warm_start import SIZES, VOCABULARY, Start, start_config

# Settings that a resumed run may change: how it is watched, placed and fed, its memory, and how
# long it goes on (the learning rate follows the new length from there); nothing else.
RESUMABLE = {
    "steps",
    "log_every",
    "eval_every",
    "stop_on_failed_evaluation",
    "checkpoint_every",
    "keep_checkpoints",
    "max_nonfinite_steps",
    "step_timeout",
    "mesh",
    "compute.remat",
    "loss.vocab_chunk",
    "compilation_cache",
    "data.val",
    "data.eval_batch_size",
    "data.val_examples",
    "data.threads",
    "data.max_bad_share",
    "data.tfds_dir",
}

# Fields in which the processes of one run may differ.
PER_PROCESS = {"compilation_cache", "data.threads", "data.tfds_dir"}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, as a command line describes it."""

    config: TrainConfig
    workdir: pathlib.Path
    overrides: list[str]  # all overrides of the config, with those that a resumed run had already
    # The models that a run without checkpoints starts from, by the field that names each.
    starts: dict[Start, OpenedModel]
    # Whether the run starts afresh where another one was (`--overwrite`).
    overwrite: bool = False


def resolve(
    recipe: pathlib.Path | None,
    default_recipe: pathlib.Path,
    workdir: pathlib.Path | None,
    overrides: list[str],
    *,
    resume: bool,
    overwrite: bool = False,
) -> Run:
    """Finds the run that a command line asks for.

    Raises:
      ValueError: the folder is used, or the config does not fit the run to resume.
    """
    workdir = workdir or default_workdir((recipe or default_recipe).stem, resume)
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir {workdir} is a file, expected a folder or a new name")
    if not resume:
        require_free(workdir, overwrite)
        base = load_recipe(recipe or default_recipe)
        overrides = _with_fitting_warmup(base, overrides)
        config, starts = with_overrides(base, overrides)
        return Run(config, workdir, overrides, starts, overwrite)
    if overwrite:
        raise ValueError("--resume and --overwrite are given, expected one of them")
    if not (workdir / RUN_FILE).exists():
        raise ValueError(f"there is no run to resume in {workdir}: run.json is missing")
    saved, saved_overrides = read_run(workdir, resume=True)
    if is_unused(workdir):  # there is nothing that other settings could contradict
        base = load_recipe(recipe) if recipe else saved
        overrides = _with_fitting_warmup(base, saved_overrides + overrides)
        config, starts = with_overrides(base, overrides)
        return Run(config, workdir, overrides, starts)
    require_whole(workdir)
    base = _of_recipe(load_recipe(recipe), saved, saved_overrides) if recipe else saved
    config = parse_overrides(base, overrides)
    if changed := differences(_settings(saved), _settings(config), RESUMABLE):
        raise ValueError(
            f"the run in {workdir} cannot go on with another config: {'; '.join(changed)} in its "
            f"run.json"
        )
    starts = {} if saved_steps(workdir) else _opened(config)
    return Run(config, workdir, saved_overrides + overrides, starts)


def _with_fitting_warmup(base: TrainConfig, overrides: list[str]) -> list[str]:
    """Adds a warm-up that fits `--steps`, and says so."""
    fitting = with_fitting_warmup(base, overrides)
    if fitting != overrides:
        distributed.say(
            f"the recipe's warm-up of {base.optimizer.warmup_steps} steps does not fit into "
            f"--steps: it is {fitting[-1]} steps (--optimizer.warmup-steps sets it)"
        )
    return fitting


def _of_recipe(recipe: TrainConfig, saved: TrainConfig, overrides: list[str]) -> TrainConfig:
    """Applies the overrides of a saved run to a recipe, as `with_overrides` did.

    The models that the run started from may be gone: their architecture is in `saved`.
    """
    if not saved.starts_from:
        return parse_overrides(recipe, overrides)
    # The recipe has to fit that architecture only with the overrides.
    config = parse_overrides(recipe, without(overrides, SIZES | VOCABULARY))
    return parse_overrides(dataclasses.replace(config, model=saved.model), overrides)


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Returns the settings that make a run the run that it is.

    Recipes and runs may give the logit scale and bias at the start or leave them to the loss: the
    same run either way. A run without images drops nothing of an image prefix.
    """
    settings = to_dict(config)
    if config.task == "text":
        del settings["augment"]["prefix_dropout"]
    settings["loss"]["logit_scale_init"] = config.loss.first_logit_scale
    settings["loss"]["logit_bias_init"] = config.loss.first_logit_bias
    return settings


def stages(run: Run) -> Iterator[Run]:
    """Yields the runs that make up a run.

    With `text_steps` the run of its language model comes first, then the run itself. The second run
    is opened when the caller takes it: the first has to be done by then.

    Raises:
      ValueError: there are several processes, which could not agree on two runs one after the
      other; or the run after the language model cannot work.
    """
    config, folder = run.config, run.workdir / "language_model"
    if config.makes_language_model and (run.overwrite or not saved_steps(run.workdir)):
        if jax.process_count() > 1:
            raise ValueError(
                f"text_steps is {config.text_steps} with several processes, expected --init-text, "
                f"or a run of "
                "--task text before"
            )
        if config.tokenizer.replace:
            raise ValueError(
                "tokenizer.replace is True with text_steps, whose language model would lose its "
                "words"
            )
        language_config = _language_config(config)
        # Errors that would come later are raised before the language model is trained.
        trained = trained_names(model_specs(config.model, config.compute), config.trainable)
        first_fitting(trained, [pattern for pattern, _ in config.optimizer.learning_rates])
        if run.overwrite:
            clear(run.workdir, language_model=True)
            run = dataclasses.replace(run, overwrite=False)
        if not (folder / "manifest.json").exists():
            run.workdir.mkdir(parents=True, exist_ok=True)
            write_run(run.workdir, config, run.overrides, "begun")  # to be resumed from here on
            if (folder / RUN_FILE).exists():
                require_whole(folder)
            yield Run(language_config, folder, [], {})
        run = dataclasses.replace(run, starts={**run.starts, "init_text": open_model(folder)})
    yield run


def _language_config(config: TrainConfig) -> TrainConfig:
    warmup = fitting_warmup(config.optimizer.warmup_steps, config.text_steps)
    if warmup != config.optimizer.warmup_steps:
        distributed.say(f"the language model's {config.text_steps} steps warm up in {warmup}")
    return dataclasses.replace(
        config,
        task="text",
        trainable=("text.*",),
        init_vision=None,
        text_steps=0,
        steps=config.text_steps,
        low_image_steps=0,
        accumulation=1,
        model=dataclasses.replace(config.model, adapters=()),
        data=dataclasses.replace(config.data, prompt="{}"),
        optimizer=dataclasses.replace(
            config.optimizer, warmup_steps=warmup, learning_rates=(), decay_steps=None
        ),
    )


def _opened(config: TrainConfig) -> dict[Start, OpenedModel]:
    return {
        name: open_model(pathlib.Path(os.path.expanduser(path)))
        for name, path in config.starts_from.items()
    }


def require_same(run: Run) -> None:
    """Checks that all processes have the same run.

    Raises:
      ValueError: the command line of this process gives another run than that of process 0.
    """
    asked = json.loads(json.dumps(to_dict(run.config) | {"workdir": str(run.workdir)}))
    of_first = json.loads(
        distributed.broadcast_from_first("run", lambda: json.dumps(asked).encode())
    )
    if changed := differences(of_first, asked, PER_PROCESS):
        raise ValueError(
            f"this process was asked for another run than process 0: {'; '.join(changed)} there"
        )


def with_overrides(
    config: TrainConfig, overrides: list[str]
) -> tuple[TrainConfig, dict[Start, OpenedModel]]:
    """Applies overrides and the architecture of the models to start from.

    Returns the config and these models, opened.

    Raises:
      ValueError: a model to start from cannot be opened, or does not fit the rest.
    """
    # Fields that may differ from these models are not compared with the recipe's architecture.
    overridden = parse_overrides(config, without(overrides, SIZES | VOCABULARY))
    if starts := _opened(overridden):
        config = dataclasses.replace(overridden, model=start_config(overridden.model, starts))
    return parse_overrides(config, overrides), starts
