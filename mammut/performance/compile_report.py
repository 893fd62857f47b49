"""What the train step takes of each device, found out by compiling it: nothing runs, and no data are needed.

With a topology the devices are those of a TPU slice that need not be there: libtpu compiles for it
on any machine.
"""

import collections
import dataclasses
import importlib.util
import os
import re
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from mammut.core import sharding
from mammut.models.flops import training_flops
from mammut.performance.chips import GIB, Chip, find_chip
from mammut.performance.hlo import Collective, Program
from mammut.performance.out_of_memory import is_out_of_memory, out_of_memory_advice
from mammut.training.config import TrainConfig
from mammut.training.step import Trainer, make_trainer
from mammut.training.tasks import TASKS


def compile_report(config: TrainConfig, topology: str | None = None) -> str:
    """Compiles the step of a run and says, for one device: memory, FLOPs, collectives, and an estimate of the time.

    Args:
      config: of the run.
      topology: a TPU slice such as "v5e:8x8", or several as in "2*v5e:8x8"; None: the devices here.

    Raises:
      ValueError: the topology is unknown or libtpu missing, the mesh or the batch do not divide
        over the devices, or the step does not fit into their memory.
    """
    devices = jax.devices() if topology is None else topology_devices(topology)
    mesh = sharding.make_mesh(config.mesh, devices)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = compile_step(config, make_trainer(config, TASKS[config.task](config.loss), mesh))
        seconds = time.perf_counter() - start
        memory = _memory_lines(
            config, compiled.memory_analysis(), chip := find_chip(devices[0].device_kind)
        )
    program = Program(compiled.as_text())
    collectives = program.collectives()
    return "\n".join([
        f"compiled in {seconds:.0f} s for {topology or 'the devices here'}: {len(devices)} x {devices[0].device_kind}, "
        f"mesh {' x '.join(f'{name} {size}' for name, size in mesh.shape.items())}; "
        f"{config.data.batch_size // len(devices):,} examples a device, remat {config.compute.remat}",
        *memory,
        *_flops_lines(config, len(devices)),
        *_collective_lines(collectives, mesh),
        *_loop_lines(program),
        *_estimate_lines(config, program, collectives, mesh, chip),
    ])  # fmt: skip


def topology_devices(topology: str) -> list[Any]:
    """The devices of a TPU slice to compile for: "v5e:8x8", or "2*v5e:8x8" of two slices.

    Raises:
      ValueError: libtpu is not installed, or does not know the topology.
    """
    expected = (
        f"--topology is {topology!r}, expected a TPU slice such as v5e:8x8, v5p:4x4x4 or 2*v6e:8x8"
    )
    if not (parts := re.fullmatch(r"(?:([1-9]\d*)\*)?(\w+:\w+)", topology)):
        raise ValueError(expected)
    slices = int(parts[1] or 1)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"--topology {topology} needs libtpu, which is not installed (pip install 'mammut[tpu]')"
        )
    # There may be no TPU here: libtpu is not to look for one, nor to claim it, and what is computed
    # here is on the CPU. The last two only keep it from complaining that it does not know where it
    # is.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    jax.config.update("jax_platforms", "cpu")
    several = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(parts[2], "tpu", **several).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"{expected} ({' '.join(str(error).split())})") from error


def compile_step(config: TrainConfig, trainer: Trainer) -> Any:
    """The compiled step of a run: a `jax.stages.Compiled`.

    Raises:
      ValueError: the step does not fit into the memory of the devices, with the settings that help.
    """
    rows = sharding.batch_sharding(trainer.mesh)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)
        for name, x in trainer.task.abstract_batch(config).items()
    }
    try:
        with jax.set_mesh(trainer.mesh):
            return trainer.step.lower(trainer.abstract_state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if is_out_of_memory(error):
            raise ValueError(out_of_memory_advice(config, error)) from error
        raise


def step_flops(config: TrainConfig) -> tuple[int, int]:
    """Counts the FLOPs of a step over the whole batch.

    Returns:
      The FLOPs of the model, three times those of a forward pass; and the FLOPs that run, which are
      more where something is computed again: the towers once with remat "full" (with "dots", next
      to nothing), both embeddings once with accumulation. Fewer run where parameters are frozen:
      nothing computes their gradients. That is not subtracted.
    """
    task = TASKS[config.task](config.loss)
    parts = task.flops(config)
    recomputed = []
    if config.compute.remat == "full":
        recomputed += [part for part in parts if part != "vocabulary"]
    if config.accumulation > 1:
        recomputed += task.recomputed_parts
    rows = config.data.batch_size
    return training_flops(parts) * rows, training_flops(parts, recomputed) * rows


def _memory_lines(config: TrainConfig, memory: Any, chip: Chip | None) -> list[str]:
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "output": output,
        "code": memory.generated_code_size_in_bytes,
    }
    total = sum(sizes.values())
    if chip and total > chip.memory:  # not every compiler refuses it
        amount = f"Used {total / GIB:.2f}G of {chip.memory / GIB:.2f}G"
        raise ValueError(out_of_memory_advice(config, MemoryError(amount)))
    share = f"{total / chip.memory:.0%} of {chip.memory / 1e6:,.0f}" if chip else ""
    notes = {
        "arguments": f"state and batch; {memory.alias_size_in_bytes / 1e6:,.1f} of it donated to the output"
    }
    return [
        "memory of a device, MB",
        *(
            f"  {name:<12}{size / 1e6:>12,.1f}  {notes.get(name, '')}".rstrip()
            for name, size in sizes.items()
        ),
        f"  {'total':<12}{total / 1e6:>12,.1f}  {share}".rstrip(),
    ]


def _flops_lines(config: TrainConfig, devices: int) -> list[str]:
    model, run = step_flops(config)
    return [
        f"GFLOP of a step: {model / 1e9:,.1f} (3 x forward), {model / devices / 1e9:,.1f} a device; "
        f"{run / devices / 1e9:,.1f} with what is computed again"
    ]


def _axes(collective: Collective, mesh: Mesh) -> str:
    """The mesh axes that a collective goes over."""
    if collective.kind == "send":
        return "other slices"
    places = np.array(np.unravel_index(collective.group, mesh.devices.shape))
    names = [
        name for name, along in zip(mesh.axis_names, places, strict=True) if len(set(along)) > 1
    ]
    return " x ".join(names) or "-"


def _collective_lines(collectives: list[Collective], mesh: Mesh) -> list[str]:
    rows: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for collective in collectives:
        kind = collective.kind + " *" * collective.in_product
        row = rows[kind, _axes(collective, mesh)]
        for i, value in enumerate((1, collective.bytes, collective.sent)):
            row[i] += collective.runs * value
    lines = [
        f"{'collectives of a step':<24}{'over':<16}{'count':>8}{'MB':>12}{'MB sent a device':>18}"
    ]
    for (kind, axes), (count, size, sent) in sorted(rows.items()):
        lines.append(f"  {kind:<22}{axes:<16}{count:>8,}{size / 1e6:>12,.1f}{sent / 1e6:>18,.1f}")
    if any(collective.in_product for collective in collectives):
        lines.append(
            "  * pieces of gathers and reductions, which the compiler passes on while it multiplies"
        )
    return lines if rows else ["collectives of a step: none"]


def _loop_lines(program: Program) -> list[str]:
    if not program.unknown_loops:
        return []
    return [
        f"  {program.unknown_loops} loops do not say how often they run: what is in them is counted once"
    ]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The least seconds of a step that each part of a device alone would take."""

    compute: float
    memory: float
    links: float

    @property
    def best(self) -> float:
        """With all three at the same time."""
        return max(self.compute, self.memory, self.links)

    @property
    def worst(self) -> float:
        """With one after the other."""
        return self.compute + self.memory + self.links


def estimate(
    config: TrainConfig,
    program: Program,
    collectives: list[Collective],
    devices: list[Any],
    chip: Chip,
) -> Estimate:
    """The roofline of a step on `devices`, in the order of the mesh.

    compute: FLOPs that run on a device / its peak. memory: bytes that its operations read and write
      / its bandwidth.
    links: bytes that it sends in its collectives, each as a ring, / the sum of its links; what
    leaves the slice / the bandwidth of the network.
    """
    of_slice = [getattr(device, "slice_index", 0) for device in devices]
    inside = outside = 0.0
    for collective in collectives:
        slices = len({of_slice[i] for i in collective.group})
        if collective.kind == "send":
            outside += collective.runs * collective.sent
        # first within the slices, so that a device takes only its share of the tensor outside
        elif slices > 1:
            share = len(collective.group) // slices
            outside += collective.runs * collective.ring_bytes(slices) / share
            inside += collective.runs * collective.ring_bytes(share)
        else:
            inside += collective.runs * collective.sent
    return Estimate(
        compute=step_flops(config)[1] / len(devices) / chip.flops,
        memory=program.bytes_accessed() / chip.memory_bandwidth,
        links=inside / (chip.link * _links(devices, chip)) + outside / chip.network,
    )


def _links(devices: list[Any], chip: Chip) -> int:
    """To how many neighbours a device sends at a time: two along an axis of its slice that is a ring, else one."""
    if chip.ring is None:
        return 1
    lengths = np.array([device.coords for device in devices]).max(0) + 1
    return max(1, sum(2 if length % chip.ring == 0 else 1 for length in lengths if length > 1))


def _estimate_lines(
    config: TrainConfig,
    program: Program,
    collectives: list[Collective],
    mesh: Mesh,
    chip: Chip | None,
) -> list[str]:
    if chip is None:
        return [
            f"no estimate of the time: mammut.performance.chips has no figures of {mesh.devices.flat[0].device_kind!r}"
        ]
    times, model = (
        estimate(config, program, collectives, list(mesh.devices.flat), chip),
        step_flops(config)[0],
    )
    peak, rows = mesh.size * chip.flops, config.data.batch_size
    parts = {"compute": times.compute, "memory": times.memory, "links": times.links}
    bound = max(parts, key=parts.get)
    return [
        "estimate by the roofline, no measurement: "
        + ", ".join(f"{k} {v * 1e3:,.1f} ms" for k, v in parts.items()),
        f"  a step takes {times.best * 1e3:,.1f} ms if all overlap ({bound} is what it waits for) to "
        f"{times.worst * 1e3:,.1f} ms if nothing does: MFU {model / peak / times.best:.0%} to "
        f"{model / peak / times.worst:.0%}, {rows / times.best:,.0f} to {rows / times.worst:,.0f} images/s",
    ]
