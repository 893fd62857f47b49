"""The folder of a run: its config and data position."""

import collections
import pathlib
from typing import Any

from mammut.core import distributed
from mammut.core.fields import to_dict
from mammut.core.files import read_json_object, write_json
from mammut.data.processor import Processor
from mammut.training.config import TrainConfig
from mammut.weights.files.tensor_file import CheckpointError
from mammut.weights.formats.mammut_folder import MANIFEST_FILE
from mammut.weights.formats.mammut_run import RUN_FILE
from mammut.weights.old_configs import upgraded
from mammut.weights.opened import read_config


def write_run(workdir: pathlib.Path, config: TrainConfig, overrides: list[str]) -> None:
    """Writes `run.json`: the resolved config and its overrides.

    The overrides come from the command line.

    The overrides are part of the config; a run that is resumed with a recipe applies them again.
    """
    write_json(workdir / RUN_FILE, {"config": to_dict(config), "overrides": overrides})


def read_run(workdir: pathlib.Path, *, resume: bool = False) -> tuple[TrainConfig, list[str]]:
    """Reads the config and the overrides in `run.json`.

    `resume` says whether the run is to go on.

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
    config = run["config"]
    if isinstance(config, dict):
        current = upgraded(config)
        config = current.config
        if resume and current.without_norm_bias:
            raise CheckpointError(
                f"{path} has model.{current.without_norm_bias[0]}.norm_bias False, expected True: "
                "a run whose layer norms have no bias can be loaded, but not resumed"
            )
    return read_config(TrainConfig, config, path), run["overrides"]


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

    It does so only when no process refuses anything.

    Raises:
      ValueError: this process does not see the folder.
    """
    distributed.meet("nothing is refused")
    if distributed.first() and fresh:
        processor.save(workdir)
        write_run(workdir, config, overrides)
    distributed.meet("the folder is made")
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


def position_of_all(step: int, position: dict[str, Any], share: int) -> dict[str, Any]:
    """Makes the data position with the counts of all shares.

    It does so on process 0.

    `position` has the counts of `share` alone.
    """
    parts = {}
    for part, read, bad in distributed.gather(
        f"counts/{step}", [share, position["read"], position["bad"]]
    ):
        parts[part] = read, bad  # processes of the same share have read the same
    total = sum(read for read, _ in parts.values())
    bad = collections.Counter()
    for _, counts in parts.values():
        bad.update(counts)
    return position | {"read": total, "bad": dict(bad)}


def position_of_one(position: dict[str, Any], share: int) -> dict[str, Any]:
    """Makes the data position that one share continues from.

    The first share takes over all counts.
    """
    return position if share == 0 else position | {"read": 0, "bad": {}}
