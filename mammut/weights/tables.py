"""A format as a table: which of its tensors are which of our parameters, and how each is laid out.

A table is a list of `Entry`, made for one config, so that it names every key there is. Read one way
it is a loader, the other way an exporter; neither touches a number before the whole table has been
checked, and both work tensor by tensor: what comes out is `Tensors`, which read when they are
asked. Every mismatch is reported at once. A key that is left over on either side is an error unless
the table lists it with a reason.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mammut.weights.files.tensor_file import CheckpointError, TensorSpec
from mammut.weights.opened import LazyTensors, Tensors, rounded

Shape = tuple[int, ...]


@runtime_checkable
class Layout(Protocol):
    """How one of their tensors holds one or several of our parameters, one layer of each where those are stacked."""

    def shape(self, ours: Sequence[Shape]) -> Shape:
        """Their shape, from the shapes of our parameters."""

    def load(self, theirs: np.ndarray, ours: Sequence[Shape], place: int) -> np.ndarray:
        """Our parameter at `place` among those of the entry, from their tensor of that shape."""

    def save(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Their tensor, from our parameters."""


class _InOrder:
    """The same numbers in the same order: all that differs is the shape."""

    def load(self, theirs: np.ndarray, ours: Sequence[Shape], place: int) -> np.ndarray:
        """Ours."""
        return theirs.reshape(ours[place])

    def save(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Theirs."""
        return ours[0].reshape(self.shape([ours[0].shape]))


@dataclasses.dataclass(frozen=True)
class Reshaped(_InOrder):
    """The same numbers in the same order, in another shape."""

    theirs: Shape

    def shape(self, ours: Sequence[Shape]) -> Shape:
        """As given."""
        return self.theirs


@dataclasses.dataclass(frozen=True)
class Same(_InOrder):
    """The same numbers in the same shape, or with `flat` axes joined to one: a bias [N, K] is theirs as [N * K]."""

    flat: bool = False

    def shape(self, ours: Sequence[Shape]) -> Shape:
        """Ours, or its size."""
        return (math.prod(ours[0]),) if self.flat else ours[0]


@dataclasses.dataclass(frozen=True)
class Rows(_InOrder):
    """The same numbers with all axes but the last joined to one: of a vector [D] a row, of a grid [I, J, D] I * J."""

    def shape(self, ours: Sequence[Shape]) -> Shape:
        """[rows, D]."""
        return math.prod(ours[0][:-1]), ours[0][-1]


@dataclasses.dataclass(frozen=True)
class Kernel(_InOrder):
    """The weight of transformers' Conv1D, [inputs, outputs], of our kernel [*inputs, *outputs].

    `inputs` of the kernel's axes are inputs, as for `Transposed`.
    """

    inputs: int = 1

    def shape(self, ours: Sequence[Shape]) -> Shape:
        """[inputs, outputs]."""
        return math.prod(ours[0][: self.inputs]), math.prod(ours[0][self.inputs :])


@dataclasses.dataclass(frozen=True)
class Transposed:
    """The weight of a torch.nn.Linear, [outputs, inputs], for our kernel [*inputs, *outputs].

    `inputs` of the kernel's axes are inputs: 1 for [D, N, K], 2 for [N, K, D].
    """

    inputs: int = 1

    def shape(self, ours: Sequence[Shape]) -> Shape:
        """[outputs, inputs]."""
        return math.prod(ours[0][self.inputs :]), math.prod(ours[0][: self.inputs])

    def load(self, theirs: np.ndarray, ours: Sequence[Shape], place: int) -> np.ndarray:
        """Ours."""
        return theirs.T.reshape(ours[place])

    def save(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Theirs."""
        return ours[0].reshape(math.prod(ours[0].shape[: self.inputs]), -1).T


@dataclasses.dataclass(frozen=True)
class Patches:
    """The weight of a torch.nn.Conv2d over patches, [outputs, 3, patch, patch], of our kernel [patch ** 2 * 3, D]."""

    patch_size: int

    def shape(self, ours: Sequence[Shape]) -> Shape:
        """[outputs, 3, patch, patch]."""
        return ours[0][1], 3, self.patch_size, self.patch_size

    def load(self, theirs: np.ndarray, ours: Sequence[Shape], place: int) -> np.ndarray:
        """Ours."""
        return theirs.transpose(2, 3, 1, 0).reshape(ours[place])

    def save(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Theirs."""
        return ours[0].reshape(self.patch_size, self.patch_size, 3, -1).transpose(3, 2, 0, 1)


@dataclasses.dataclass(frozen=True)
class Joined:
    """Several of our parameters one after the other along an axis of theirs, each in `layout`: fused q, k and v."""

    layout: Layout
    axis: int = 0

    def shape(self, ours: Sequence[Shape]) -> Shape:
        """The sum along the axis."""
        shapes = [self.layout.shape([shape]) for shape in ours]
        size = sum(shape[self.axis] for shape in shapes)
        return *shapes[0][: self.axis], size, *shapes[0][self.axis + 1 :]

    def load(self, theirs: np.ndarray, ours: Sequence[Shape], place: int) -> np.ndarray:
        """Ours."""
        ends = np.cumsum([self.layout.shape([shape])[self.axis] for shape in ours])
        part = np.split(theirs, ends[:-1], axis=self.axis)[place]
        return self.layout.load(part, ours[place : place + 1], 0)

    def save(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Theirs."""
        return np.concatenate([self.layout.save([array]) for array in ours], axis=self.axis)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of their tensors, and what of ours it holds: paths such as "text.layers.attn.query.kernel".

    `layer` picks one layer of stacked parameters; None: the whole parameter.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: Layout = Same()
    layer: int | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """A format for one config.

    `unused` are keys of theirs that have no place in our model, `constant` our parameters that they
    have not, with the value each takes; every one of both has its reason.
    """

    entries: Sequence[Entry]
    unused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    constant: Mapping[str, tuple[float, str]] = dataclasses.field(default_factory=dict)

    def to_ours(self, theirs: Tensors, ours: Mapping[str, TensorSpec], where: str) -> LazyTensors:
        """Our parameters, of the specs `ours`, read from `theirs`; `where` names the file in errors.

        Floats of any size are taken and come out as `ours` has them; to read one that is too large
        for that raises CheckpointError.

        Raises:
          CheckpointError: a key is missing, left over, of another shape or not of floats; all of
            them are named.
        """
        problems = self._uncovered(ours)
        expected = self._their_shapes(ours)
        problems += [f"{key} is missing" for key in expected if key not in theirs.specs]
        for key, spec in theirs.specs.items():
            if key in expected and tuple(spec.shape) != expected[key]:
                problems.append(f"{key} is {list(spec.shape)}, expected {list(expected[key])}")
            elif key in expected and not _is_float(spec.dtype):
                problems.append(f"{key} holds {spec.dtype}, expected floats")
            elif key not in expected and key not in self.unused:
                problems.append(f"{key} is not a tensor of this model")
        if problems:
            raise CheckpointError(f"{where} does not fit its config: {'; '.join(problems)}")
        places: dict[str, list[tuple[Entry, int]]] = {}
        for entry in self.entries:
            for place, path in enumerate(entry.ours):
                places.setdefault(path, []).append((entry, place))

        def read(path: str) -> np.ndarray:
            spec = ours[path]
            if path in self.constant:
                return np.full(spec.shape, self.constant[path][0], spec.dtype)
            out = np.empty(spec.shape, spec.dtype)
            for entry, place in places[path]:
                value = entry.layout.load(
                    theirs.read(entry.theirs), self._our_shapes(entry, ours), place
                )
                value = rounded(value, spec.dtype, f"{where}: {entry.theirs}")
                out[... if entry.layer is None else entry.layer] = value
            return out

        return LazyTensors(dict(ours), read)

    def to_theirs(self, ours: Tensors) -> LazyTensors:
        """Their tensors, read from our parameters; each has the type of the parameter it is made of.

        Layers of one parameter follow each other: read in this order, every parameter is read once.

        Raises:
          CheckpointError: a parameter has no place in their format; all of them are named.
        """
        if problems := self._uncovered(ours.specs):
            raise CheckpointError(f"the model does not fit the format: {'; '.join(problems)}")
        entries = {entry.theirs: entry for entry in self.entries}
        shapes = self._their_shapes(ours.specs)

        held: dict[str, np.ndarray] = {}

        def read(key: str) -> np.ndarray:
            entry = entries[key]
            for path in held.keys() - set(entry.ours):
                del held[path]
            for path in entry.ours:
                if path not in held:
                    held[path] = ours.read(path)
            arrays = [
                held[path] if entry.layer is None else held[path][entry.layer]
                for path in entry.ours
            ]
            return entry.layout.save(arrays)

        in_order = sorted(entries, key=lambda key: entries[key].ours)
        specs = {
            key: TensorSpec(shapes[key], ours.specs[entries[key].ours[0]].dtype) for key in in_order
        }
        return LazyTensors(specs, read)

    def _our_shapes(self, entry: Entry, ours: Mapping[str, TensorSpec]) -> list[Shape]:
        shapes = [tuple(ours[path].shape) for path in entry.ours]
        return shapes if entry.layer is None else [shape[1:] for shape in shapes]

    def _their_shapes(self, ours: Mapping[str, TensorSpec]) -> dict[str, Shape]:
        known = [entry for entry in self.entries if all(path in ours for path in entry.ours)]
        return {
            entry.theirs: tuple(entry.layout.shape(self._our_shapes(entry, ours)))
            for entry in known
        }

    def _uncovered(self, ours: Mapping[str, TensorSpec]) -> list[str]:
        """Where the table and our parameters do not meet one to one."""
        covered: dict[str, set[int | None]] = {path: {None} for path in self.constant}
        for entry in self.entries:
            for path in entry.ours:
                covered.setdefault(path, set()).add(entry.layer)
        problems = [f"there is no parameter {path} for it" for path in covered if path not in ours]
        for path, spec in ours.items():
            layers = covered.get(path, set())
            if layers != {None} and layers != set(range(spec.shape[0] if spec.shape else 0)):
                problems.append(
                    f"there is nothing for {'a layer of ' if layers else ''}the parameter {path}"
                )
        return problems


def unused_notes(unused: Mapping[str, str]) -> Iterator[str]:
    """A sentence for each reason: the moments of an optimizer are thousands of arrays."""
    groups = collections.defaultdict(list)
    for key, why in unused.items():
        groups[why].append(key)
    for why, keys in groups.items():
        named = (
            f"{', '.join(keys)} is"
            if len(keys) < 4
            else f"{len(keys)} arrays, {keys[0]} to {keys[-1]}, are"
        )
        yield f"{named} not used: {why}"


def _is_float(dtype: Any) -> bool:
    dtype = np.dtype(dtype)
    return dtype.kind == "f" or dtype.name in ("bfloat16",)
