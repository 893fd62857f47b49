"""In what a run of a soak differs from one that nothing disturbed."""

import itertools
import json
import pathlib
import re
from typing import Any

import jax
from damage import by_name
from soak_program import STEPS, rows

from mammut.config import MeshConfig
from mammut.core import sharding
from mammut.training.run_folder import read_run
from mammut.training.step import make_trainer
from mammut.training.tasks import ImageTextTask
from mammut.weights.checkpoints import Checkpoints


def saved_state(workdir: pathlib.Path) -> tuple[int, Any, dict[str, bytes]]:
    """The last step, the position in the data, and the arrays of parameters and optimizer."""
    config, _ = read_run(workdir)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    abstract = make_trainer(config, ImageTextTask(config.loss), mesh).abstract_state
    with Checkpoints(workdir, keep=config.keep_checkpoints) as checkpoints:
        restored = checkpoints.restore(abstract)
    arrays = {name: x.tobytes() for name, x in by_name(restored.state).items()}
    return restored.step, restored.data, arrays


def records(workdir: pathlib.Path, exempt: set[int]) -> list[str]:
    """The lines of the log, without how fast the steps were and without the steps `exempt`."""
    return [
        json.dumps({name: value for name, value in row.items() if not name.startswith("perf/")})
        for row in rows(workdir)
        if row.get("step") not in exempt
    ]


def exported(workdir: pathlib.Path) -> dict[str, str]:
    """The files of the exported model and of its evaluation, without the name of the folder."""
    paths = [workdir / name for name in ("model.safetensors", "processor.json", "tokenizer.model")]
    paths += [workdir / "config.json", *sorted((workdir / "eval").glob("*.json*"))]
    name = re.compile(r'"checkpoint": "[^"]*"')
    return {
        str(path.relative_to(workdir)): name.sub("", path.read_text(encoding="latin-1"))
        for path in paths
    }


def differences(got: pathlib.Path, want: pathlib.Path, exempt: set[int]) -> list[str]:
    """In what a run differs from the undisturbed one."""
    step, data, arrays = saved_state(got)
    want_step, want_data, want_arrays = saved_state(want)
    found = []
    if (step, data) != (want_step, want_data):
        found.append(f"step {step} and {data}, not {want_step} and {want_data}")
    found += [name for name in want_arrays if arrays.get(name) != want_arrays[name]]
    for line, other in itertools.zip_longest(records(got, exempt), records(want, exempt)):
        if line != other:
            found.append(f"the record {line}, not {other}")
            break
    files, want_files = exported(got), exported(want)
    names = want_files if STEPS not in exempt else [x for x in want_files if "eval" not in x]
    found += [name for name in names if files.get(name) != want_files[name]]
    found += [
        f"{path.relative_to(got)} is left over"
        for path in got.rglob("*")
        if path.suffix == ".partial" or "orbax-checkpoint-tmp" in path.name
    ]
    return found
