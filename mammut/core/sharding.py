"""The mesh, and the table from logical axes to mesh axes.

Layers name the logical axes of their parameters and activations; only this file knows which mesh
axis each becomes. The mesh has `AxisType.Auto` axes: the compiler chooses every sharding that is
not constrained here. (With `Explicit` axes shardings are part of array types, and an embedding
lookup needs a sharding of its own.)
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
    """Numbers of devices along the axes of the mesh.

    One of them may be -1: this axis takes all devices that are left.

    Example:
      >>> mesh = mammut.make_mesh(mammut.MeshConfig(data=1, fsdp=-1))
    """

    # Devices that split the batch and replicate the parameters. -1: all devices that are left.
    data: int = -1
    # Devices that split the batch and the parameters.
    fsdp: int = 1
    # Devices that split the attention heads, the MLPs and the vocabulary.
    model: int = 1

    def __post_init__(self):
        for name, value in vars(self).items():
            if type(value) is not int:
                raise ValueError(f"MeshConfig.{name} is {value!r}, expected a whole number")

    def sizes(self, num_devices: int) -> tuple[int, int, int]:
        """Returns the sizes of the three axes for `num_devices` devices.

        Raises:
          ValueError: the product of the sizes is not `num_devices`.
        """
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
    """Makes a `data` x `fsdp` x `model` mesh.

    Within a TPU slice, neighbours along a mesh axis are neighbours in the torus. The network
    between slices (or GPU boxes) is far slower: `data`, which communicates once a step, is the
    first axis to cross it, then `fsdp`, then `model`.

    Args:
      config: the devices along each axis.
      devices: the devices to use; None: all.

    Raises:
      ValueError: the sizes in `config` do not multiply to the number of devices.

    Example:
      >>> mesh = mammut.make_mesh(mammut.MeshConfig(data=1, fsdp=-1))
      >>> with jax.set_mesh(mesh):
      ...     batch = mammut.core.sharding.device_batch(processor(images=photos), mesh)
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
    """Makes the spec of an array with logical `axes`.

    A dimension that a mesh axis does not divide stays whole.
    """
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
        if len(entry) > 1:
            entries.append(tuple(entry))
        else:
            entries.append(entry[0] if entry else None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation with logical `axes` on the current mesh (`jax.set_mesh`).

    Without a mesh it does nothing. Without constraints, the partitioner turned FSDP into
    all-to-alls and used 7 times the memory on 64 chips.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))


def param_shardings(abstract_params: Any, axes: dict[tuple[str, ...], tuple], mesh: Mesh) -> Any:
    """Gives the `NamedSharding` of each parameter in a nested dict.

    `axes` has the logical axes of each parameter by path: the result of
    `mammut.core.params.logical_axes`.

    """

    def sharding(path, leaf):
        names = axes[tuple(entry.key for entry in path)]
        # Vectors stay whole: gathering a norm's scale costs more than the memory it would save.
        if sum(name != "layer" for name in names) < 2:
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, partition_spec(names, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, abstract_params)


def state_shardings(abstract_state: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Makes the shardings of a train state.

    A leaf that mirrors a parameter, as Adam's moments do, is split like it; the rest is replicated.
    A leaf mirrors a parameter when its path ends with the parameter's path and the shapes agree.
    Adafactor's factored moments mirror no parameter, and they are small.
    """
    by_path = {
        tuple(entry.key for entry in path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def sharding_of(path, leaf):
        names = [str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path]
        for start in range(len(names)):
            shape, sharding = by_path.get(tuple(names[start:]), (None, None))
            if shape == leaf.shape:
                return sharding
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding_of, abstract_state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Makes the sharding of arrays [B, ...]: over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def device_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on the mesh.

    The rows [b, ...] become a part of the global batch [B, ...].
    """
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }


def global_batch(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """Splits an array [B, ...] over the devices of the mesh.

    Every process holds the whole array.
    """
    return jax.make_array_from_callback(x.shape, batch_sharding(mesh), lambda index: x[index])


def require_divisible(batch_size: int, mesh: Mesh, field: str) -> None:
    """Checks that `batch_size` splits evenly over the mesh.

    Raises:
      ValueError: it does not; the error names `field`.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise ValueError(
            f"{field} {batch_size} does not divide over the {ways} devices of mesh.data x mesh.fsdp"
        )


def placement_report(params: Any, shardings: Any) -> str:
    """Makes a table of the parameters by module.

    Its columns are count, MB, MB per device, and the mesh axes in use.
    """
    rows: dict[str, list] = {}  # of each module: count, bytes, bytes of a device, mesh axes
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
            f"{module:<28}{count:>14,}{size / 1e6:>10.1f}{local / 1e6:>11.1f}  "
            f"{', '.join(sorted(specs))}"
        )
    return "\n".join(lines)
