"""The folder of a run: its config, its state and its data position.

`run.json` says what the folder is:

  begun    the run has saved no step: the folder counts as unused
  running  it has saved a step, and goes on from the newest one
  done     the folder holds the model of its last step, too

The run.json of an earlier version has no state.
"""

import collections
import contextlib
import operator
import os
import pathlib
import re
import shutil
from typing import Any, Literal, get_args

from mammut.core import distributed
from mammut.core.fields import to_dict
from mammut.core.files import (
    check_files,
    make_manifest,
    remove_partial_files,
)
from mammut.data.processor import Processor
from mammut.training.config import TrainConfig
from mammut.weights.checkpoints import saved_steps
from mammut.weights.files.tensor_file import CheckpointError
from mammut.weights.formats.mammut_folder import MANIFEST_FILE
from mammut.weights.formats.mammut_run import RUN_FILE, read_run_file, write_run_file
from mammut.weights.formats.open_clip_folder import CONFIG_FILE as OPEN_CLIP_FILE
from mammut.weights.old_configs import MOVED, upgraded
from mammut.weights.opened import read_config

State = Literal["begun", "running", "done"]

# What a run writes, by the folder that it lies in. README.md is not among it: a user may edit it.
_WRITTEN = {
    "checkpoints": re.compile(r"[0-9]+(\.orbax-checkpoint-tmp.*)?"),
    "checkpoint_manifests": re.compile(r"[0-9]+\.json"),
    "frozen": re.compile(r"frozen\.safetensors|manifest\.json|\.partial"),
    "eval": re.compile(r"\w+_val\.(predictions\.jsonl|json)"),
    "tensorboard": re.compile(r"events\.out\.tfevents\..*"),
    "": re.compile(
        r"metrics\.jsonl|report\.html|config\.json|manifest\.json|processor\.json|\.partial|"
        r"tokenizer\.(model|txt\.gz|json)|tokenizer_config\.json|"
        r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    ),
}
_LANGUAGE_MODEL = "language_model"
_CARD = "README.md"


def write_run(
    workdir: pathlib.Path,
    config: TrainConfig,
    overrides: list[str],
    state: State | None = None,
    processor: Processor | None = None,
) -> None:
    """Writes `run.json`: the resolved config and its overrides.

    The overrides come from the command line.

    The overrides are part of the config; a run that is resumed with a recipe applies them again.

    Args:
      workdir: the folder of the run.
      config: the config of the run.
      overrides: the overrides that are part of it.
      state: what the folder is; None: as a run.json of an earlier version, which does not say.
      processor: the processor that is saved in the folder, whose files the run needs.
    """
    run = {"config": to_dict(config), "overrides": overrides}
    if state is not None:
        run["state"] = state
    if processor is not None:
        names = ["processor.json", *processor.tokenizer.files]
        run["processor"] = make_manifest(workdir, [workdir / name for name in names])
    write_run_file(workdir, run)


def write_state(workdir: pathlib.Path, state: State, *, after: State | None = None) -> None:
    """Changes the state in `run.json`; with `after`, only where it is that one."""
    run = read_run_file(workdir)
    if after is None or run.get("state") == after:
        write_run_file(workdir, run | {"state": state})


def is_unused(workdir: pathlib.Path) -> bool:
    """Whether a run has begun in the folder and left no step.

    Its language model (`TrainConfig.text_steps`) has left none, either.
    """
    language_model = workdir / _LANGUAGE_MODEL
    return (
        _state(workdir) == "begun"
        and not saved_steps(workdir)
        and not saved_steps(language_model)
        and not (language_model / MANIFEST_FILE).exists()
    )


def is_fresh(workdir: pathlib.Path) -> bool:
    """Whether the run in the folder starts at step 0, with a new processor."""
    if saved_steps(workdir):
        return False
    return _state(workdir) == "begun" or not (workdir / "processor.json").exists()


def _state(workdir: pathlib.Path) -> State | None:
    """Reads the state of a folder; None where there is no run, or one of an earlier version.

    Raises:
      CheckpointError: `run.json` holds another state.
    """
    path = workdir / RUN_FILE
    if not path.exists():
        return None
    state = read_run_file(workdir).get("state")
    if state is not None and state not in get_args(State):
        raise CheckpointError(
            f"{path} has the state {state!r}, expected one of {', '.join(get_args(State))}"
        )
    return state


def require_free(workdir: pathlib.Path, overwrite: bool) -> None:
    """Checks that a fresh run may start in a folder.

    Files of names that no run writes, such as train.log or lost+found, are nobody's business.

    Raises:
      ValueError: the folder holds a run or a model, or with `overwrite` something else.
    """
    names = sorted(path.name for path in workdir.iterdir()) if workdir.exists() else []
    ours = {RUN_FILE, _LANGUAGE_MODEL, *_WRITTEN}
    used = [name for name in names if name in ours or _WRITTEN[""].fullmatch(name)]
    if OPEN_CLIP_FILE in names:
        raise ValueError(f"--workdir {workdir} holds {OPEN_CLIP_FILE} of another model")
    if not used:
        _require_places(workdir)
        return
    if overwrite and RUN_FILE not in names:
        raise ValueError(
            f"--overwrite is given, but {workdir} (it holds {used[0]}) is no run: run.json is "
            "missing"
        )
    if not (overwrite or is_unused(workdir)):
        raise ValueError(
            f"--workdir {workdir} is not empty (it holds {used[0]}): give another, or --resume its "
            "run, or --overwrite it"
        )
    linked = [name for name in _WRITTEN if name and (workdir / name).is_symlink()]
    if linked:  # what lies there may be of other runs, too
        raise ValueError(f"{workdir / linked[0]} is a link, which a fresh run does not empty")
    _require_places(workdir)


def _require_places(workdir: pathlib.Path) -> None:
    """Checks early that nothing stands where a run saves later."""
    for path in workdir.iterdir() if workdir.exists() else []:
        is_file = _WRITTEN[""].fullmatch(path.name) or path.name == _CARD
        if is_file and path.name != ".partial" and path.is_dir():
            raise ValueError(f"{path} is a folder, where the run writes a file")
    for name in filter(None, _WRITTEN):
        path = workdir / name
        usable = path.is_dir() and os.access(path, os.W_OK | os.X_OK)
        if os.path.lexists(path) and not usable:
            raise ValueError(f"{path} is no folder that can be written to, which the run needs")


def require_whole(workdir: pathlib.Path) -> None:
    """Checks that a folder has what its `run.json` says that the run needs.

    Raises:
      CheckpointError: its checkpoints are gone; or its processor is gone, or another one.
      ValueError: a file stands in place of a folder, or one cannot be written to.
    """
    run = read_run_file(workdir)
    state = _state(workdir)
    if state is None and (workdir / MANIFEST_FILE).exists():
        state = "done"
    if not saved_steps(workdir):
        if state in ("running", "done"):
            raise CheckpointError(
                f"the run in {workdir} is {state}, but {workdir / 'checkpoints'} has none of its "
                "steps: put them back, or start afresh with --overwrite"
            )
        return
    needed = run.get("processor", {})
    if not isinstance(needed, dict):
        raise CheckpointError(f"{workdir / RUN_FILE} has a processor that is not an object")
    problems = check_files(workdir, needed, str(workdir / RUN_FILE))
    if not (needed or (workdir / "processor.json").exists()):
        problems = ["processor.json is missing"]
    if problems:
        raise CheckpointError(
            f"the run in {workdir} needs the processor that it began with: {'; '.join(problems)}"
        )
    _require_places(workdir)


def clear(workdir: pathlib.Path, *, language_model: bool) -> None:
    """Removes what a run has written, by the names; run.json stays, to be replaced.

    With `language_model`, that of the run's language model is removed, too.
    """
    for name, pattern in _WRITTEN.items():
        folder = workdir / name
        if not folder.is_dir() or (name and folder.is_symlink()):
            continue
        for path in list(folder.iterdir()):
            if not pattern.fullmatch(path.name):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        if name:
            with contextlib.suppress(OSError):  # a stranger's file is in it
                folder.rmdir()
    folder = workdir / _LANGUAGE_MODEL
    if language_model and (folder / RUN_FILE).exists():
        clear(folder, language_model=False)
        (folder / RUN_FILE).unlink()


def read_run(workdir: pathlib.Path, *, resume: bool = False) -> tuple[TrainConfig, list[str]]:
    """Reads the config and the overrides in `run.json`.

    A run of version 0.1 that started from another model took that model's settings of
    `old_configs.MOVED` with the architecture. Such settings come as overrides, the first ones: the
    recipe does not have them. `resume` says whether the run is to go on.

    Raises:
      CheckpointError: it is missing or not what `write_run` writes; or the run is to go on and has
        layer norms without a bias, which version 0.1 could train.
    """
    path = workdir / RUN_FILE
    run = read_run_file(workdir)
    overrides = run["overrides"]
    if not (isinstance(overrides, list) and all(isinstance(item, str) for item in overrides)):
        raise CheckpointError(f"{path} has overrides that are not a list of texts")
    values = run["config"]
    if isinstance(values, dict):
        current = upgraded(values)
        values = current.config
        if resume and current.without_norm_bias:
            raise CheckpointError(
                f"{path} has model.{current.without_norm_bias[0]}.norm_bias False, expected True: "
                "a run whose layer norms have no bias can be loaded, but not resumed"
            )
    config = read_config(TrainConfig, values, path)
    is_old = values != run["config"]
    if is_old and config.starts_from:
        overrides = _inherited(config) + overrides
    return config, overrides


def _inherited(config: TrainConfig) -> list[str]:
    """Lists the settings of a run of version 0.1 that the model it started from gave."""
    # The recipe decides how a run uses the memory; any run may change that.
    fields = [field for field in MOVED.values() if field != "compute.remat"]
    return [f"--{field}={operator.attrgetter(field)(config)}" for field in fields]


def require_shared(workdir: pathlib.Path) -> None:
    """Checks that this process sees `run.json` of process 0.

    Raises:
      ValueError: it does not see the file.
    """
    if not (workdir / RUN_FILE).is_file():
        raise ValueError(
            f"--workdir {workdir} is without the run.json that process 0 has written there: "
            "expected a folder on a file system that all processes share"
        )


def claim_folder(
    workdir: pathlib.Path,
    config: TrainConfig,
    overrides: list[str],
    processor: Processor,
    fresh: bool,
    overwrite: bool = False,
) -> None:
    """Makes a folder the folder of a run, on process 0.

    It does so only when no process refuses anything. What a killed process left half-written there
    is removed; in the folder of a fresh run, also what a run without a step has left there, or with
    `overwrite` any run.

    Raises:
      ValueError: this process does not see the folder.
    """
    distributed.barrier("nothing is refused")
    if distributed.first():
        # A killed process leaves them, each under a new name.
        for folder in (workdir, workdir / "checkpoint_manifests"):
            remove_partial_files(folder)
    if distributed.first() and fresh:
        clear(workdir, language_model=overwrite)
        processor.save(workdir)
        write_run(workdir, config, overrides, "begun", processor)
    distributed.barrier("the folder is made")
    require_shared(workdir)


def renew_folder(
    workdir: pathlib.Path,
    config: TrainConfig,
    overrides: list[str],
    processor: Processor,
    start: int,
) -> None:
    """Renews the folder of a run that is resumed at step `start`, on process 0.

    It says so where another number of steps changes the learning rate from there on.
    """
    if not distributed.first():
        return
    old_steps = read_run(workdir)[0].steps
    optimizer = config.optimizer
    is_fixed = optimizer.schedule == "constant" or optimizer.decay_steps is not None
    if config.steps != old_steps and not is_fixed:
        distributed.say(
            f"steps is {config.steps}, it was {old_steps}: from step {start} on the learning rate "
            f"follows the {optimizer.schedule} schedule that reaches 0 at step {config.steps}, not "
            f"at {old_steps}"
        )
    # The changed settings of a resumed run are kept for later.
    state = "running" if saved_steps(workdir) else "begun"
    write_run(workdir, config, overrides, state, processor)
    # Until the run is done again, the newest checkpoint has the model, not the folder that an
    # earlier end exported.
    (workdir / MANIFEST_FILE).unlink(missing_ok=True)


def position_of_all(step: int, position: dict[str, Any], shard_index: int) -> dict[str, Any]:
    """Makes the data position with the counts of all shards.

    It does so on process 0.

    `position` has the counts of the shard `shard_index` alone.
    """
    parts = {}
    for part, read, bad in distributed.gather(
        f"counts/{step}", [shard_index, position["read"], position["bad"]]
    ):
        parts[part] = read, bad  # processes of the same shard have read the same
    total = sum(read for read, _ in parts.values())
    bad = collections.Counter()
    for _, counts in parts.values():
        bad.update(counts)
    return position | {"read": total, "bad": dict(bad)}


def position_of_one(position: dict[str, Any], shard_index: int) -> dict[str, Any]:
    """Makes the data position that one shard continues from.

    The first shard takes over all counts.
    """
    return position if shard_index == 0 else position | {"read": 0, "bad": {}}
