"""A run's folder: its config, and the position in its data."""

import collections
import pathlib
from typing import Any

from mammut.core import distributed
from mammut.core.fields import to_dict
from mammut.core.files import read_json_object, write_json
from mammut.training.config import TrainConfig
from mammut.weights.files.tensor_file import CheckpointError
from mammut.weights.old_configs import upgraded
from mammut.weights.opened import read_config


def write_run(workdir: pathlib.Path, config: TrainConfig, overrides: list[str]) -> None:
    """Writes `run.json`: the resolved config of a run, and the command-line overrides that are part of it."""
    write_json(workdir / "run.json", {"config": to_dict(config), "overrides": overrides})


def read_run(workdir: pathlib.Path) -> tuple[TrainConfig, list[str]]:
    """The config and overrides in `run.json`.

    Raises:
      CheckpointError: it is missing or not what `write_run` writes.
    """
    path = workdir / "run.json"
    run = read_json_object(path)
    if run.keys() != {"config", "overrides"}:
        raise CheckpointError(
            f"{path} is not a run's config, expected the keys config and overrides"
        )
    config = run["config"]
    if isinstance(config, dict):
        config = upgraded(config).config
    return read_config(TrainConfig, config, path), run["overrides"]


def require_shared(workdir: pathlib.Path) -> None:
    """Raises ValueError where a process does not see the `run.json` that process 0 has written."""
    if not (workdir / "run.json").is_file():
        raise ValueError(
            f"--workdir {workdir} is without the run.json that process 0 has written there: expected a folder on a "
            "file system that all processes share"
        )


def position_of_all(step: int, position: dict[str, Any], share: int) -> dict[str, Any]:
    """The position in the data with the counts of all shares in place of those of `share` alone, on process 0."""
    parts = {}
    for part, read, bad in distributed.gather(
        f"counts/{step}", [share, position["read"], position["bad"]]
    ):
        parts[part] = read, bad  # processes of the same share have read the same
    bad = collections.Counter()
    for _, counts in parts.values():
        bad.update(counts)
    return position | {"read": sum(read for read, _ in parts.values()), "bad": dict(bad)}


def position_of_one(position: dict[str, Any], share: int) -> dict[str, Any]:
    """The position for one share to go on from: the first takes over the counts, whatever wrote them."""
    return position if share == 0 else position | {"read": 0, "bad": {}}
