"""Tables between foreign tensors and our parameters.

Each table says which tensors are which parameters, and in what layout.

"Ours" are the parameters of a `MaMMUT`, "theirs" the tensors of the format. A table is a list of
`Entry`, made for one config, so that it names every key. Read in one direction it loads, in the
other it exports. Both check the whole table before they read a number, report every mismatch at
once, and then work tensor by tensor. A key that is left over on either side is an error, unless the
table lists it with a reason.
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
    """How one of their tensors holds one or several of our parameters.

    Of stacked parameters, "a parameter" here is one layer.
    """

    def shape(self, ours: Sequence[Shape]) -> Shape:
        """Computes their shape from the shapes of our parameters."""

    def load(self, theirs: np.ndarray, ours: Sequence[Shape], index: int) -> np.ndarray:
        """Takes one of our parameters out of their tensor.

        Args:
          theirs: the tensor, of the shape that `shape` computes.
          ours: the shapes of all our parameters in it.
          index: which of `ours` the parameter is.
        """

    def save(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Makes their tensor from our parameters."""


class _InOrder:
    """The same numbers in the same order; only the shape differs."""

    def load(self, theirs: np.ndarray, ours: Sequence[Shape], index: int) -> np.ndarray:
        """Loads their tensor in our shape."""
        return theirs.reshape(ours[index])

    def save(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Saves our parameter in their shape."""
        return ours[0].reshape(self.shape([ours[0].shape]))


@dataclasses.dataclass(frozen=True)
class Reshaped(_InOrder):
    """The same numbers in the same order, in the shape `theirs`."""

    theirs: Shape

    def shape(self, ours: Sequence[Shape]) -> Shape:
        """Returns the given shape."""
        return self.theirs


@dataclasses.dataclass(frozen=True)
class Same(_InOrder):
    """The same numbers in the same shape.

    With `flat`, all axes are joined to one: our bias [N, K] is theirs as [N * K].
    """

    flat: bool = False

    def shape(self, ours: Sequence[Shape]) -> Shape:
        """Returns our shape, or with `flat` its size."""
        return (math.prod(ours[0]),) if self.flat else ours[0]


@dataclasses.dataclass(frozen=True)
class Rows(_InOrder):
    """The same numbers with all axes but the last joined to one.

    A vector [D] is one row [1, D], a grid [I, J, D] has the rows [I * J, D].
    """

    def shape(self, ours: Sequence[Shape]) -> Shape:
        """Returns the shape [rows, D]."""
        return math.prod(ours[0][:-1]), ours[0][-1]


@dataclasses.dataclass(frozen=True)
class Kernel(_InOrder):
    """The weight [inputs, outputs] of transformers' Conv1D, of our kernel [*inputs, *outputs].

    Attributes:
      inputs: how many axes of the kernel are inputs, as for `Transposed`.
    """

    inputs: int = 1

    def shape(self, ours: Sequence[Shape]) -> Shape:
        """Returns the shape [inputs, outputs]."""
        return math.prod(ours[0][: self.inputs]), math.prod(ours[0][self.inputs :])


@dataclasses.dataclass(frozen=True)
class Transposed:
    """The weight [outputs, inputs] of a torch.nn.Linear, of our kernel [*inputs, *outputs].

    Attributes:
      inputs: how many axes of the kernel are inputs: 1 of [D, N, K], 2 of [N, K, D].
    """

    inputs: int = 1

    def shape(self, ours: Sequence[Shape]) -> Shape:
        """Returns the shape [outputs, inputs]."""
        return math.prod(ours[0][self.inputs :]), math.prod(ours[0][: self.inputs])

    def load(self, theirs: np.ndarray, ours: Sequence[Shape], index: int) -> np.ndarray:
        """Loads their weight, transposed, in our shape."""
        return theirs.T.reshape(ours[index])

    def save(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Saves our kernel as a matrix, transposed."""
        return ours[0].reshape(math.prod(ours[0].shape[: self.inputs]), -1).T


@dataclasses.dataclass(frozen=True)
class Patches:
    """The weight [D, 3, patch, patch] of a torch.nn.Conv2d.

    Our kernel is [patch ** 2 * 3, D].
    """

    patch_size: int

    def shape(self, ours: Sequence[Shape]) -> Shape:
        """Returns the shape [D, 3, patch, patch]."""
        return ours[0][1], 3, self.patch_size, self.patch_size

    def load(self, theirs: np.ndarray, ours: Sequence[Shape], index: int) -> np.ndarray:
        """Loads their weight with pixels row by row.

        The three colours of a pixel are together.
        """
        return theirs.transpose(2, 3, 1, 0).reshape(ours[index])

    def save(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Saves our kernel with colours before pixels."""
        return ours[0].reshape(self.patch_size, self.patch_size, 3, -1).transpose(3, 2, 0, 1)


@dataclasses.dataclass(frozen=True)
class Joined:
    """Several of our parameters, joined along one of their axes.

    Each is in `layout`. An example is fused q, k and v.
    """

    layout: Layout
    axis: int = 0

    def shape(self, ours: Sequence[Shape]) -> Shape:
        """Returns their shape, with the sizes along the axis added."""
        shapes = [self.layout.shape([shape]) for shape in ours]
        size = sum(shape[self.axis] for shape in shapes)
        return *shapes[0][: self.axis], size, *shapes[0][self.axis + 1 :]

    def load(self, theirs: np.ndarray, ours: Sequence[Shape], index: int) -> np.ndarray:
        """Loads the part of their tensor at `index`, in its layout."""
        ends = np.cumsum([self.layout.shape([shape])[self.axis] for shape in ours])
        part = np.split(theirs, ends[:-1], axis=self.axis)[index]
        return self.layout.load(part, ours[index : index + 1], 0)

    def save(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Saves our parameters in their layouts, joined."""
        return np.concatenate([self.layout.save([array]) for array in ours], axis=self.axis)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of their tensors, and which of our parameters it holds.

    Attributes:
      theirs: the name of the tensor.
      ours: the paths of the parameters, such as "text.layers.attn.query.kernel".
      layout: how the tensor holds them.
      layer: which layer of stacked parameters it holds. None: the whole parameter.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: Layout = Same()
    layer: int | None = None


def linear_entries(
    theirs: str,
    ours: str,
    layer: int | None = None,
    layout: Layout = Transposed(),
    *,
    bias: bool = True,
) -> Iterator[Entry]:
    """Lists the entries of a torch.nn.Linear.

    With the layout `Kernel` it is a Conv1D.
    """
    yield Entry(f"{theirs}.weight", (f"{ours}.kernel",), layout, layer)
    if bias:
        yield Entry(f"{theirs}.bias", (f"{ours}.bias",), Same(flat=True), layer)


def norm_entries(
    theirs: str, ours: str, layer: int | None = None, *, bias: bool = True
) -> Iterator[Entry]:
    """Lists the entries of a torch.nn.LayerNorm, or of a norm without a bias."""
    yield Entry(f"{theirs}.weight", (f"{ours}.scale",), layer=layer)
    if bias:
        yield Entry(f"{theirs}.bias", (f"{ours}.bias",), layer=layer)


@dataclasses.dataclass(frozen=True)
class Table:
    """A format for one config.

    Attributes:
      entries: which tensors hold which parameters.
      unused: the tensors that have no place in our model, each with the reason.
      constant: our parameters that the format does not have, each with its value and the reason.
    """

    entries: Sequence[Entry]
    unused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    constant: Mapping[str, tuple[float, str]] = dataclasses.field(default_factory=dict)

    def to_ours(self, theirs: Tensors, ours: Mapping[str, TensorSpec], where: str) -> LazyTensors:
        """Makes our parameters from their tensors, read later.

        Floats of any type get the type of `ours`. Reading a number that is too large for that type
        raises CheckpointError.

        Args:
          theirs: the tensors of a file.
          ours: the specs of our parameters.
          where: the file, for errors.

        Raises:
          CheckpointError: a key is missing, left over, of another shape or not of floats. Every one
            is named.
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
        holders: dict[str, list[tuple[Entry, int]]] = {}
        for entry in self.entries:
            for index, path in enumerate(entry.ours):
                holders.setdefault(path, []).append((entry, index))

        def read(path: str) -> np.ndarray:
            spec = ours[path]
            if path in self.constant:
                return np.full(spec.shape, self.constant[path][0], spec.dtype)
            out = np.empty(spec.shape, spec.dtype)
            for entry, index in holders[path]:
                shapes = self._our_shapes(entry, ours)
                value = entry.layout.load(theirs.read(entry.theirs), shapes, index)
                value = rounded(value, spec.dtype, f"{where}: {entry.theirs}")
                if entry.layer is None:
                    out[...] = value
                else:
                    out[entry.layer] = value
            return out

        return LazyTensors(dict(ours), read)

    def to_theirs(self, ours: Tensors) -> LazyTensors:
        """Makes their tensors from our parameters.

        A tensor has the type of the parameter that it is made from. The layers of one parameter
        follow each other: in this order, every parameter is read once.

        Raises:
          CheckpointError: a parameter has no place in the format. Every one is named.
        """
        if problems := self._uncovered(ours.specs):
            raise CheckpointError(f"the model does not fit the format: {'; '.join(problems)}")
        entries = {entry.theirs: entry for entry in self.entries}
        shapes = self._their_shapes(ours.specs)
        # The parameters that were read for the last tensor: the next one may need them again.
        held: dict[str, np.ndarray] = {}

        def read(key: str) -> np.ndarray:
            entry = entries[key]
            for path in held.keys() - set(entry.ours):
                del held[path]
            for path in entry.ours:
                if path not in held:
                    held[path] = ours.read(path)
            arrays = [held[path] for path in entry.ours]
            if entry.layer is not None:
                arrays = [array[entry.layer] for array in arrays]
            return entry.layout.save(arrays)

        in_order = sorted(entries, key=lambda key: entries[key].ours)
        specs = {
            key: TensorSpec(shapes[key], ours.specs[entries[key].ours[0]].dtype) for key in in_order
        }
        return LazyTensors(specs, read)

    def _our_shapes(self, entry: Entry, ours: Mapping[str, TensorSpec]) -> list[Shape]:
        """Lists the shapes of an entry's parameters.

        Where the entry is of one layer, the shapes are of one layer.
        """
        shapes = [tuple(ours[path].shape) for path in entry.ours]
        return shapes if entry.layer is None else [shape[1:] for shape in shapes]

    def _their_shapes(self, ours: Mapping[str, TensorSpec]) -> dict[str, Shape]:
        """Lists the shape of each of their tensors, by name."""
        known = [entry for entry in self.entries if all(path in ours for path in entry.ours)]
        return {
            entry.theirs: tuple(entry.layout.shape(self._our_shapes(entry, ours)))
            for entry in known
        }

    def _uncovered(self, ours: Mapping[str, TensorSpec]) -> list[str]:
        """Lists parameters that only the table or the model has.

        Each is a sentence.
        """
        covered: dict[str, set[int | None]] = {path: {None} for path in self.constant}
        for entry in self.entries:
            for path in entry.ours:
                covered.setdefault(path, set()).add(entry.layer)
        sources = {path: entry.theirs for entry in self.entries for path in entry.ours}
        problems = [
            f"there is no parameter {path} for {sources.get(path, 'a constant')}"
            for path in covered
            if path not in ours
        ]
        for path, spec in ours.items():
            layers = covered.get(path, set())
            depth = spec.shape[0] if spec.shape else 0
            if layers == {None} or layers == set(range(depth)):
                continue
            missing = "a layer of the parameter" if layers else "the parameter"
            problems.append(f"there is nothing for {missing} {path}")
        return problems


def unused_notes(unused: Mapping[str, str]) -> Iterator[str]:
    """Writes notes on unused tensors, one for each reason.

    One for each tensor would be too many: the moments of an optimizer are thousands of arrays.
    """
    groups = collections.defaultdict(list)
    for key, why in unused.items():
        groups[why].append(key)
    for why, keys in groups.items():
        if len(keys) < 4:
            yield f"{', '.join(keys)} is not used: {why}"
        else:
            yield f"{len(keys)} arrays, {keys[0]} to {keys[-1]}, are not used: {why}"


def _is_float(dtype: Any) -> bool:
    dtype = np.dtype(dtype)
    return dtype.kind == "f" or dtype.name == "bfloat16"  # whose kind is "V" to NumPy
