"""The costs of a train step on each device, from compiling.

Nothing runs, and no data is needed.

With a topology the devices belong to a TPU slice that need not exist: libtpu compiles for it on
any machine.
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
    """Compiles the step of a run and reports on one device.

    The report has memory, FLOPs, collectives and time.

    The time is an estimate, by the roofline.

    Args:
      config: the run.
      topology: a TPU slice such as "v5e:8x8", or several as in "2*v5e:8x8"; None: the devices here.

    Raises:
      ValueError: the topology is unknown or libtpu missing, the mesh or the batch do not divide
        over the devices, or the step does not fit into their memory.
    """
    devices = jax.devices() if topology is None else topology_devices(topology)
    mesh = sharding.make_mesh(config.mesh, devices)
    start = time.perf_counter()
    chip = find_chip(devices[0].device_kind)
    with jax.set_mesh(mesh):
        compiled = compile_step(config, make_trainer(config, TASKS[config.task](config.loss), mesh))
        seconds = time.perf_counter() - start
        memory = _memory_lines(config, compiled.memory_analysis(), chip)
    program = Program(compiled.as_text())
    collectives = program.collectives()
    mesh_sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    lines = [
        f"compiled in {seconds:.0f} s for {topology or 'the devices here'}: "
        f"{len(devices)} x {devices[0].device_kind}, mesh {mesh_sizes}; "
        f"{config.data.batch_size // len(devices):,} examples a device, "
        f"remat {config.compute.remat}",
        *memory,
        *_flops_lines(config, len(devices)),
        *_collective_lines(collectives, mesh),
        *_loop_lines(program),
        *_estimate_lines(config, program, collectives, mesh, chip),
    ]
    return "\n".join(lines)


def topology_devices(topology: str) -> list[Any]:
    """Makes the devices of a TPU slice to compile for.

    "v5e:8x8" is one slice, "2*v5e:8x8" are two.

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
            f"--topology {topology} needs libtpu, which is not installed "
            "(pip install 'mammut-jax[tpu]')"
        )
    # There may be no TPU here: libtpu must not look for one, nor claim it, and JAX computes on the
    # CPU. The last two variables only keep libtpu from warning that it does not know its host.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    jax.config.update("jax_platforms", "cpu")
    several = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(parts[2], "tpu", **several).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"{expected} ({' '.join(str(error).split())})") from error


def compile_step(config: TrainConfig, trainer: Trainer) -> Any:
    """Compiles the step of a run; returns a `jax.stages.Compiled`.

    Raises:
      ValueError: the step does not fit into the memory of the devices; the message says which
        settings help.
    """
    split = sharding.batch_sharding(trainer.mesh)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split)
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
      The FLOPs of the model, three times the FLOPs of a forward pass; and the FLOPs that run, which
      are more where something is computed again: the towers once with remat "full" (with "dots",
      next to nothing), both embeddings once with accumulation. Fewer run where parameters are
      frozen: nothing computes their gradients. That is not subtracted.
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
    """Lists the memory of one device.

    Raises:
      ValueError: it is more than the chip has.
    """
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "output": output,
        "code": memory.generated_code_size_in_bytes,
    }
    total = sum(sizes.values())
    if chip and total > chip.memory:  # not every compiler refuses such a program
        amount = f"Used {total / GIB:.2f}G of {chip.memory / GIB:.2f}G"
        raise ValueError(out_of_memory_advice(config, MemoryError(amount)))
    donated = memory.alias_size_in_bytes / 1e6
    notes = {"arguments": f"state and batch; {donated:,.1f} of it donated to the output"}
    if chip:
        notes["total"] = f"{total / chip.memory:.0%} of {chip.memory / 1e6:,.0f}"
    lines = ["memory of a device, MB"]
    for name, size in (sizes | {"total": total}).items():
        lines.append(f"  {name:<12}{size / 1e6:>12,.1f}  {notes.get(name, '')}".rstrip())
    return lines


def _flops_lines(config: TrainConfig, devices: int) -> list[str]:
    model, run = step_flops(config)
    return [
        f"GFLOP of a step: {model / 1e9:,.1f} (3 x forward), "
        f"{model / devices / 1e9:,.1f} a device; "
        f"{run / devices / 1e9:,.1f} with what is computed again"
    ]


def _axes(collective: Collective, mesh: Mesh) -> str:
    """Finds the mesh axes that a collective goes over."""
    if collective.kind == "send":
        return "other slices"
    # Of each axis, the coordinates of the devices that take part.
    coordinates = np.array(np.unravel_index(collective.group, mesh.devices.shape))
    names = [
        name
        for name, along in zip(mesh.axis_names, coordinates, strict=True)
        if len(set(along)) > 1
    ]
    return " x ".join(names) or "-"


def _collective_lines(collectives: list[Collective], mesh: Mesh) -> list[str]:
    if not collectives:
        return ["collectives of a step: none"]
    rows: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for collective in collectives:
        kind = collective.kind + " *" * collective.in_product
        row = rows[kind, _axes(collective, mesh)]
        for column, value in enumerate((1, collective.bytes, collective.sent)):
            row[column] += collective.runs * value
    lines = [
        f"{'collectives of a step':<24}{'over':<16}{'count':>8}{'MB':>12}{'MB sent a device':>18}"
    ]
    for (kind, axes), (count, size, sent) in sorted(rows.items()):
        lines.append(f"  {kind:<22}{axes:<16}{count:>8,}{size / 1e6:>12,.1f}{sent / 1e6:>18,.1f}")
    if any(collective.in_product for collective in collectives):
        lines.append(
            "  * pieces of gathers and reductions, which the compiler passes on while it multiplies"
        )
    return lines


def _loop_lines(program: Program) -> list[str]:
    if not program.unknown_loops:
        return []
    return [
        f"  {program.unknown_loops} loops do not say how often they run: "
        "their operations are counted once"
    ]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The least seconds of a step, by part of a device.

    Each is computed as if that part alone were the limit.
    """

    compute: float
    memory: float
    links: float

    @property
    def best(self) -> float:
        """Seconds of a step where all three work at the same time."""
        return max(self.compute, self.memory, self.links)

    @property
    def worst(self) -> float:
        """Seconds of a step whose parts work one after the other."""
        return self.compute + self.memory + self.links


def estimate(
    config: TrainConfig,
    program: Program,
    collectives: list[Collective],
    devices: list[Any],
    chip: Chip,
) -> Estimate:
    """Estimates a step on `devices` by the roofline.

    The devices are in the order of the mesh.

    Returns:
      compute: the FLOPs that run on a device, divided by its peak.
      memory: the bytes that its operations read and write, divided by its bandwidth.
      links: the bytes that it sends in its collectives, each as a ring, divided by the sum of its
      links; and the bytes that leave the slice, divided by the bandwidth of the network.
    """
    of_slice = [getattr(device, "slice_index", 0) for device in devices]
    inside = outside = 0.0
    for collective in collectives:
        slices = len({of_slice[i] for i in collective.group})
        if collective.kind == "send":
            outside += collective.runs * collective.sent
        elif slices > 1:
            # First inside of the slices, so that a device sends only its share of the tensor out.
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
    """Counts the neighbours that a device sends to at a time.

    Along each axis of its slice it is two where the axis is a ring, else one.
    """
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
        kind = mesh.devices.flat[0].device_kind
        return [f"no estimate of the time: mammut.performance.chips has no figures of {kind!r}"]
    times = estimate(config, program, collectives, list(mesh.devices.flat), chip)
    parts = {"compute": times.compute, "memory": times.memory, "links": times.links}
    bound = max(parts, key=parts.get)
    # Seconds of the model's FLOPs at the peak of all devices: MFU is their share of the time.
    ideal = step_flops(config)[0] / (mesh.size * chip.flops)
    rows = config.data.batch_size
    examples = "images" if config.data.frames is None else "clips"
    return [
        "estimate by the roofline, no measurement: "
        + ", ".join(f"{name} {seconds * 1e3:,.1f} ms" for name, seconds in parts.items()),
        f"  a step takes {times.best * 1e3:,.1f} ms if all overlap ({bound} is what it waits for) "
        f"to {times.worst * 1e3:,.1f} ms if nothing does: MFU {ideal / times.best:.0%} "
        f"to {ideal / times.worst:.0%}, {rows / times.best:,.0f} to {rows / times.worst:,.0f} "
        f"{examples}/s",
    ]
