"""The mesh and the one table that maps logical axes to mesh axes.

Layers name the logical axes of their parameters and activations; only this file knows which mesh
axis each becomes. The mesh has `AxisType.Auto` axes: the compiler places everything that is not
constrained here. (With `Explicit` axes shardings are part of array types, and an embedding gather
needs one of its own.)
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "model")

# Logical axis -> mesh axes. A mesh axis is used once per array, from the left: in an activation
# [batch, text, embed] the batch takes `fsdp`, so `embed` stays whole; in a kernel [embed, mlp]
# there is no batch, and `embed` is split.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "shared": ("fsdp",),
    "heads": ("model",),
    "mlp": ("model",),
    "vocab": ("model",),
    "layer": (),
    "patch": (),
    "text": (),
    "head_size": (),
    "rank": (),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1, at most once, takes all that are left."""

    data: int = -1  # batch split, parameters replicated
    fsdp: int = 1  # batch split, parameters split
    model: int = 1  # heads, MLP and vocabulary split

    def sizes(self, num_devices: int) -> tuple[int, int, int]:
        """The three sizes for `num_devices`; raises ValueError when they do not multiply to it."""
        sizes = dataclasses.astuple(self)
        known = math.prod(size for size in sizes if size != -1)
        if sizes.count(-1) == 1 and known > 0 and num_devices % known == 0:
            sizes = tuple(num_devices // known if size == -1 else size for size in sizes)
        if min(sizes) < 1 or math.prod(sizes) != num_devices:
            given = " x ".join(map(str, dataclasses.astuple(self)))
            raise ValueError(
                f"mesh.data x fsdp x model is {given}, expected a product of {num_devices} devices"
            )
        return sizes


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """A `data` x `fsdp` x `model` mesh over `devices` (default: all).

    Within a TPU slice, neighbours along a mesh axis are neighbours in the torus. Across slices (or
    GPU boxes), whose network is far slower, goes `data` first, which communicates once a step; then
    `fsdp`, then `model`.

    Raises:
      ValueError: the sizes in `config` do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    slices = left = len({getattr(device, "slice_index", 0) for device in devices})
    across = []
    for size in sizes:
        across.append(math.gcd(size, left))
        left //= across[-1]
    if slices > 1:
        within = [size // count for size, count in zip(sizes, across, strict=True)]
        arranged = create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )
    else:
        arranged = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def partition_spec(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Any
) -> PartitionSpec:
    """The spec of an array with logical `axes`; a dimension that a mesh axis does not divide stays whole."""
    used: set[str] = set()
    entries = []
    for axis, size in zip(axes, shape, strict=True):
        entry = []
        for mesh_axis in RULES[axis] if axis else ():
            ways = mesh.shape.get(mesh_axis, 1)
            if mesh_axis not in used and ways > 1 and size % ways == 0:
                entry.append(mesh_axis)
                size //= ways
                used.add(mesh_axis)
        entries.append(tuple(entry) if len(entry) > 1 else entry[0] if entry else None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation with logical `axes` to the current mesh (`jax.set_mesh`); without a mesh, does nothing.

    Unpinned, the partitioner turned FSDP into all-to-alls and kept 7 times the memory on 64 chips.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))


def param_shardings(abstract_params: Any, axes: dict[tuple[str, ...], tuple], mesh: Mesh) -> Any:
    """A tree of `NamedSharding` for a nested dict of parameters with logical `axes` by path (`model.logical_axes`)."""

    def sharding(path, leaf):
        names = axes[tuple(entry.key for entry in path)]
        # Vectors stay whole: gathering a norm's scale costs more than it weighs.
        if sum(name != "layer" for name in names) < 2:
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, partition_spec(names, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, abstract_params)


def state_shardings(abstract_state: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings for a train state: what mirrors a parameter (Adam's moments) is placed as it is, the rest replicated.

    A leaf mirrors a parameter when its path ends with the parameter's and the shapes agree;
    Adafactor's factored moments do not, and are small.
    """
    by_path = {
        tuple(entry.key for entry in path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def place(path, leaf):
        names = [str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path]
        for start in range(len(names)):
            shape, sharding = by_path.get(tuple(names[start:]), (None, None))
            if shape == leaf.shape:
                return sharding
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The placement of an array [B, ...]: split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def device_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of a batch [b, ...] -> the global batch [B, ...] on the mesh."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }


def replicated_batch(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """An array [B, ...] that every process holds in full -> the global array, split over the batch."""
    return jax.make_array_from_callback(x.shape, batch_sharding(mesh), lambda index: x[index])


def require_divisible(batch_size: int, mesh: Mesh, field: str) -> None:
    """Raises ValueError, naming `field`, when `batch_size` does not split evenly over the mesh."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise ValueError(
            f"{field} {batch_size} does not divide over the {ways} devices of mesh.data x mesh.fsdp"
        )


def placement_report(params: Any, shardings: Any) -> str:
    """A table of the parameters by top-level module: count, bytes, bytes per device, and the specs in use."""
    rows: dict[str, list] = {}
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
    ):
        module = ".".join(str(entry.key) for entry in path[:2])
        count = int(np.prod(leaf.shape))
        local = int(np.prod(sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        row = rows.setdefault(module, [0, 0, 0, set()])
        row[0] += count
        row[1] += count * leaf.dtype.itemsize
        row[2] += local
        row[3].update(str(entry) for entry in sharding.spec if entry)
    lines = [f"{'parameters':<28}{'count':>14}{'MB':>10}{'MB/device':>11}  split over"]
    rows["total"] = [sum(row[i] for row in rows.values()) for i in range(3)] + [set()]
    for module, (count, size, local, specs) in rows.items():
        lines.append(
            f"{module:<28}{count:>14,}{size / 1e6:>10.1f}{local / 1e6:>11.1f}  {', '.join(sorted(specs))}"
        )
    return "\n".join(lines)
