"""Times the start of a run, stage by stage.

The run starts in a fresh process that makes one training step.

python -m mammut.performance.child < REQUEST.json > ANSWER.json
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from typing import Any

from mammut.core.fields import to_dict
from mammut.performance.timing import exponent
from mammut.training.config import TrainConfig


def ask(
    config: TrainConfig, *, cache: str | None = None, fake_devices: int | None = None
) -> dict[str, Any]:
    """Times the first step of a run in its own process.

    Args:
      config: the run.
      cache: folder of the compilation cache; None: no cache.
      fake_devices: how many devices the CPU is divided into; they share its cores.

    Returns:
      `seconds` of the stages `import`, `trace`, `compile`, `run` and their `total`; `devices`;
      `memory_gib` of the step.

    Raises:
      RuntimeError: the process failed; the message ends with its last words.
    """
    # The calling process may hold most of a GPU's memory.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
    if fake_devices is not None:
        environment["JAX_PLATFORMS"] = "cpu"
        flags = [
            flag for flag in environment.get("XLA_FLAGS", "").split() if "device_count" not in flag
        ]
        environment["XLA_FLAGS"] = " ".join(
            [*flags, f"--xla_force_host_platform_device_count={fake_devices}"]
        )
    request = json.dumps({"config": to_dict(config), "cache": cache, "asked": time.time()})
    command = [sys.executable, "-m", "mammut.performance.child"]
    done = subprocess.run(
        command, input=request, capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(
            f"the process that makes a first step failed: {' '.join(done.stderr.split()[-40:])}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Times the stages in this process, for `ask`.

    The first stage begins when `ask` was called, so it includes the start of Python.
    """
    import jax

    from mammut.core import sharding
    from mammut.core.fields import from_dict
    from mammut.performance.step_time import memory, noise_batch
    from mammut.training.step import make_trainer
    from mammut.training.tasks import ImageTextTask

    jax.devices()
    seconds = {"import": time.time() - request["asked"]}
    if request["cache"] is not None:
        jax.config.update("jax_compilation_cache_dir", request["cache"])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    config = from_dict(TrainConfig, request["config"])
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        batch = sharding.device_batch(noise_batch(config), mesh)

        def stage(name, call):
            started = time.perf_counter()
            result = call()
            seconds[name] = seconds.get(name, 0) + time.perf_counter() - started
            return result

        trainer = stage("trace", lambda: make_trainer(config, ImageTextTask(config.loss), mesh))
        init = stage("trace", lambda: trainer.init.lower(config.seed))
        lowered = stage("trace", lambda: trainer.step.lower(trainer.abstract_state, batch))
        init = stage("compile", init.compile)
        compiled = stage("compile", lowered.compile)
        stage("run", lambda: jax.block_until_ready(compiled(init(config.seed), batch)[1]))
    seconds["total"] = sum(seconds.values())
    return {"seconds": seconds, "devices": jax.device_count(), "memory_gib": memory(compiled)}


def startup(config: TrainConfig, cache: str) -> dict[str, Any]:
    """Times a first step `cold`, then `warm`.

    The cold step compiles into the empty folder `cache`.
    """
    return {name: ask(config, cache=cache)["seconds"] for name in ("cold", "warm")}


def over_devices(config: TrainConfig, counts: list[int]) -> dict[str, Any]:
    """Measures one device's memory on several fake CPU devices.

    Batch and parameters are split over the devices.

    Fake devices share the cores, so their times mean nothing for real ones. On an accelerator, time
    a run with another `mesh` instead.

    Raises:
      ValueError: there are not two counts.
    """
    if len(set(counts)) < 2:
        raise ValueError(f"devices grow over {counts}, expected two counts or more")
    rows = []
    for count in counts:
        mesh = dataclasses.replace(config.mesh, data=1, fsdp=count, model=1)
        measured = ask(dataclasses.replace(config, mesh=mesh), fake_devices=count)
        rows.append({"devices": count, "memory_gib": measured["memory_gib"]})
    exponents = {
        name: exponent(counts, [row["memory_gib"][name] for row in rows])
        for name in ("state_and_batch", "temporaries")
    }
    return {"axis": "devices", "sizes": counts, "exponents": exponents, "rows": rows}


if __name__ == "__main__":
    print(json.dumps(answer(json.load(sys.stdin))))
