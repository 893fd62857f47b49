"""The folder of a run: its config and data position."""

import collections
import operator
import pathlib
from typing import Any

from mammut.core import distributed
from mammut.core.fields import to_dict
from mammut.core.files import read_json_object, remove_partial_files, write_json
from mammut.data.processor import Processor
from mammut.training.config import TrainConfig
from mammut.weights.files.tensor_file import CheckpointError
from mammut.weights.formats.mammut_folder import MANIFEST_FILE
from mammut.weights.formats.mammut_run import RUN_FILE
from mammut.weights.old_configs import MOVED, upgraded
from mammut.weights.opened import read_config


def write_run(workdir: pathlib.Path, config: TrainConfig, overrides: list[str]) -> None:
    """Writes `run.json`: the resolved config and its overrides.

    The overrides come from the command line.

    The overrides are part of the config; a run that is resumed with a recipe applies them again.
    """
    write_json(workdir / RUN_FILE, {"config": to_dict(config), "overrides": overrides})


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
    run = read_json_object(path)
    if run.keys() != {"config", "overrides"}:
        raise CheckpointError(
            f"{path} is not a run's config, expected the keys config and overrides"
        )
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
) -> None:
    """Makes a folder the folder of a run, on process 0.

    It does so only when no process refuses anything. What a killed process left half-written there
    is removed.

    Raises:
      ValueError: this process does not see the folder.
    """
    distributed.barrier("nothing is refused")
    if distributed.first():
        # A killed process leaves them, each under a new name.
        for folder in (workdir, workdir / "checkpoint_manifests"):
            remove_partial_files(folder)
    if distributed.first() and fresh:
        processor.save(workdir)
        write_run(workdir, config, overrides)
    distributed.barrier("the folder is made")
    require_shared(workdir)


def renew_folder(workdir: pathlib.Path, config: TrainConfig, overrides: list[str]) -> None:
    """Renews the folder of a resumed run, on process 0."""
    if not distributed.first():
        return
    # The changed settings of a resumed run are kept for later.
    write_run(workdir, config, overrides)
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
