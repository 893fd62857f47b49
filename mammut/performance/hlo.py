"""Reads a compiled program's text (XLA's HLO).

It lists the program's collectives and its traffic to memory.

Loops count as often as they run. XLA's own cost analysis counts the body of a loop once, and a
scanned tower is a loop.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator

import numpy as np

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_BYTES = {"pred": 1, "c64": 8, "c128": 16}
# Operations that move nothing by themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "iota", "opt-barrier",
}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather"}
_PASSED_ON = {"tuple", "parameter", *KINDS}
_VIEWS = {"bitcast", "reshape", "copy", "convert", "transpose"}


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array of the program on one device."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool = True  # False: it lies in another memory of the chip

    @property
    def bytes(self) -> int:
        """Size in bytes.

        Types below a byte, and types without data, count as nothing.
        """
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.dims) * _BYTES.get(self.dtype, int(bits[0]) // 8 if bits else 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # tensors of the result; a tuple has several
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def called(self) -> tuple[str, ...]:
        """The names of the computations that it runs."""
        # they name the computation that their start runs
        if self.opcode.endswith(("-done", "-update")):
            return ()
        names = re.findall(
            r"(?:calls|to_apply|body|called_computation)=%?([\w.-]+)", self.attributes
        )
        lists = re.findall(
            r"(?:branch_computations|called_computations)=\{([^}]*)\}", self.attributes
        )
        for listed in lists:
            names += re.findall(r"[\w.-]+", listed)
        return tuple(names)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a program, as one device sees it.

    Attributes:
      kind: one of KINDS, or "send": what a TPU gives its host for other slices.
      runs: how often it runs in one run of the program.
      group: one group of devices that take part, by their position in the mesh.
      local: the bytes that a device brings.
      shapes: the shapes of its result.
      in_product: whether it is a piece of a larger one, which the compiler interleaves with the
        matrix product that needs it.
      source: the operation that it comes from, as JAX names it.
    """

    kind: str
    runs: int
    group: tuple[int, ...]
    local: int
    shapes: tuple[Shape, ...]
    in_product: bool
    source: str

    @property
    def bytes(self) -> int:
        """Bytes of the tensor that one run gathers, reduces or moves."""
        return self.local * len(self.group) if self.kind == "all-gather" else self.local

    @property
    def sent(self) -> int:
        """Bytes that a device sends in one run, in a ring.

        The devices form the ring.
        """
        return self.ring_bytes(len(self.group))

    def ring_bytes(self, devices: int) -> int:
        """Counts the bytes that each device in a ring sends.

        The ring has `devices` devices. The count is for one run.
        """
        if self.kind == "send":
            return self.local
        if self.kind in ("collective-permute", "collective-broadcast") and devices > 1:
            return self.local
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.bytes * (devices - 1) // devices


class Program:
    """A compiled program, from its text: `jax.stages.Compiled.as_text()`."""

    def __init__(self, text: str):
        self.num_devices = int((re.search(r"num_partitions=(\d+)", text) or [0, 1])[1])
        self.computations: dict[str, dict[str, Instruction]] = {}
        self._entry = ""
        for line in text.splitlines():
            header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$", line)
            if header:
                current = self.computations.setdefault(header[2], {})
                self._entry = header[2] if header[1] else self._entry
            elif " = " in line and self.computations and (instruction := _instruction(line)):
                current[instruction.name] = instruction
        # The computations that run, in order: the name, how often it runs, and the loop body (or
        # the entry) that it is part of.
        self._running = list(self._run(self._entry, 1, self._entry)) if self._entry else []
        self.unknown_loops = sum(
            i.opcode == "while" and self._trips(i) is None
            for name, _, _ in self._running
            for i in self._of(name)
        )

    def collectives(self) -> list[Collective]:
        """Lists every collective once, with its number of runs.

        A TPU program spreads a collective over several fused computations, even through loops, to
        compute while it is under way: they share its channel. An all-reduce that is fused with the
        slice that follows is a reduce-scatter.
        """
        collectives = {}
        for name, runs, body in self._running:
            for i in self._of(name):
                kind = i.opcode.removesuffix("-start")
                is_send = kind == "send" and "xla_megascale" in i.attributes
                if kind not in KINDS and not is_send:
                    continue
                channel = re.search(r"channel_id=(\d+)", i.attributes)
                key = (kind, channel[1]) if channel else (body, i.name)
                if key in collectives and collectives[key].runs <= runs:
                    continue
                if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"
                operands = i.operands
                group = (0,)
                if is_send:
                    operands = operands[:1]
                else:
                    group = _group(i.attributes, self.num_devices)
                shapes = i.shapes
                if i.opcode != kind and len(shapes) > 1:  # a start has its operand first
                    shapes = shapes[1:2]
                source = re.search(r'op_name="([^"]*)"', i.attributes)
                collectives[key] = Collective(
                    kind,
                    runs,
                    group,
                    sum(s.bytes for operand in operands for s in self._shapes(name, operand)),
                    shapes,
                    in_product="windowed_dot_general" in body,
                    source=source[1] if source else "",
                )
        return list(collectives.values())

    def bytes_accessed(self) -> int:
        """Bytes read from and written to a device's memory, by every operation.

        Where an operand is only sliced, the slice counts. Values in the chip's other memories do
        not count.
        """
        total = 0
        for name, runs, body in self._running:
            if name == body or name in self._called_plainly:
                total += runs * sum(self._accessed(name, i) for i in self._of(name))
        return total

    @functools.cached_property
    def _called_plainly(self) -> set[str]:
        plain = [
            i
            for name, _, _ in self._running
            for i in self._of(name)
            if i.opcode in ("call", "conditional")
        ]
        return {called for i in plain for called in i.called}

    def _of(self, name: str) -> list[Instruction]:
        return list(self.computations.get(name, {}).values())

    def _run(self, name: str, runs: int, body: str) -> Iterator[tuple[str, int, str]]:
        yield name, runs, body
        for i in self._of(name):
            for called in i.called:
                if i.opcode == "while":
                    yield from self._run(called, runs * (self._trips(i) or 1), called)
                else:
                    yield from self._run(called, runs, body)

    def _trips(self, loop: Instruction) -> int | None:
        """Counts the runs of a loop.

        Returns None where the text does not show it.
        """
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(known[1])
        # In TPU programs it is the only number in the condition, which compares it with a counter
        # that starts at 0.
        condition = re.search(r"condition=%?([\w.-]+)", loop.attributes)
        if condition is None:
            return None
        bounds = [i.operands[0] for i in self._of(condition[1]) if i.opcode == "constant"]
        return int(bounds[0]) if len(bounds) == 1 and bounds[0].isdigit() else None

    def _shapes(self, name: str, operand: str) -> tuple[Shape, ...]:
        instruction = self.computations[name].get(operand)
        return instruction.shapes if instruction else ()

    def _accessed(self, name: str, i: Instruction) -> int:
        if i.opcode in _FREE or i.opcode.endswith(("-done", "-update")):
            return 0
        # Calls of a library, such as cuBLAS, begin with "__"; the others mark shardings or reserved
        # memory.
        if i.opcode == "custom-call" and 'custom_call_target="__' not in i.attributes:
            return 0
        if i.opcode == "fusion":
            return self._fusion(name, i)
        given = [shape for operand in i.operands for shape in self._shapes(name, operand)]
        if i.opcode == "all-gather-start":  # its shapes: of its operand and of its result
            return _hbm(given) + _hbm(i.shapes[-1:])
        # The start of a copy, a slice or another collective reads as much as it writes.
        if i.opcode.endswith("-start"):
            moved = min((shape.bytes for shape in i.shapes if len(shape.dims)), default=0)
            return moved * (
                any(s.in_hbm for s in given) + any(s.in_hbm for s in i.shapes if s.bytes == moved)
            )
        written = _hbm(i.shapes)
        if i.opcode in _SLICES:
            return 2 * written
        if i.opcode == "dynamic-update-slice":
            return 2 * _hbm(self._shapes(name, i.operands[1]))
        return written + _hbm(given)

    def _fusion(self, name: str, i: Instruction) -> int:
        """Bytes that a fused computation reads and writes."""
        (inner,) = i.called
        parameters = {
            int(j.operands[0]): j.name for j in self._of(inner) if j.opcode == "parameter"
        }
        total = 0
        for position, operand in enumerate(i.operands):
            for shape in self._shapes(name, operand)[:1]:
                if shape.in_hbm:
                    total += min(shape.bytes, self._read(inner, parameters[position], shape.bytes))
        root = next(j for j in self._of(inner) if j.is_root)
        roots = [root]
        if root.opcode == "tuple":
            roots = [self.computations[inner][operand] for operand in root.operands]
        for shape, result in zip(i.shapes, roots, strict=False):
            if shape.in_hbm:
                total += self._written(inner, result, shape.bytes)
        return total

    def _read(self, name: str, value: str, whole: int) -> int:
        """Counts the bytes that a fused computation reads of a value.

        The value has `whole` bytes in all.
        """
        total = 0
        for i in self._of(name):
            if value not in i.operands:
                continue
            if i.opcode in _SLICES and i.operands[0] == value:
                total += sum(shape.bytes for shape in i.shapes)
            elif (
                i.opcode == "dynamic-update-slice"
                and i.operands[0] == value
                or i.opcode in _PASSED_ON
            ):
                continue  # tensors written in place, or the buffer of a running collective
            elif i.opcode in _VIEWS:
                total += self._read(name, i.name, whole)
            elif i.opcode == "fusion":
                (inner,) = i.called
                inside = {
                    int(j.operands[0]): j.name for j in self._of(inner) if j.opcode == "parameter"
                }
                total += sum(
                    self._read(inner, inside[n], whole)
                    for n, o in enumerate(i.operands)
                    if o == value
                )
            else:
                return whole
        return total

    def _written(self, name: str, result: Instruction, whole: int) -> int:
        """Bytes of a result, `whole` in all, that a fused computation writes."""
        while result.opcode in _VIEWS and result.operands[0] in self.computations[name]:
            result = self.computations[name][result.operands[0]]
        if result.opcode in _PASSED_ON:
            return 0
        if result.opcode == "dynamic-update-slice":
            return sum(shape.bytes for shape in self._shapes(name, result.operands[1]))
        return whole


def _hbm(shapes: Iterable[Shape]) -> int:
    """Bytes in the main memory of a device."""
    return sum(shape.bytes for shape in shapes if shape.in_hbm)


def _instruction(line: str) -> Instruction | None:
    """Parses a line of a computation; None where it is no instruction."""
    left, _, right = line.strip().partition(" = ")
    is_root = left.startswith("ROOT ")
    name = left.removeprefix("ROOT ").removeprefix("%")
    end = _closing(right, 0) if right.startswith("(") else right.find(" ")
    call = re.match(r" ?([\w-]+)\(", right[end:])
    if call is None:
        return None
    first = end + call.end() - 1
    last = _closing(right, first)
    inside = right[first + 1 : last - 1]
    operands = re.findall(r"%([\w.-]+)", inside) or re.findall(r"[\w.-]+", inside)
    return Instruction(name, call[1], _shapes(right[:end]), tuple(operands), right[last:], is_root)


def _closing(text: str, start: int) -> int:
    """Finds the position after a closing parenthesis.

    It closes the one at `start`.
    """
    depth = 0
    for end in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        if depth == 0:
            return end + 1
    return len(text)


def _shapes(text: str) -> tuple[Shape, ...]:
    shapes = []
    for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", text):
        sizes = tuple(map(int, dims.split(","))) if dims else ()
        # S(0), or none, is the main memory of a device; S(1) and higher are others.
        shapes.append(Shape(dtype, sizes, not re.search(r"S\([1-9]", layout)))
    return tuple(shapes)


def _group(attributes: str, num_devices: int) -> tuple[int, ...]:
    """Reads the first group of devices of a collective.

    All forms of HLO are understood.
    """
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        ends = [tuple(map(int, pair)) for pair in re.findall(r"\{(\d+),(\d+)", pairs[0])]
        return next((pair for pair in ends if len(set(pair)) > 1), ends[0])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(map(int, listed[1].split(",")))
    if tiled := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        groups, dims, order = (
            list(map(int, part.split(","))) if part else None for part in tiled.groups()
        )
        return tuple(
            np.arange(num_devices).reshape(dims).transpose(order).reshape(groups)[0].tolist()
        )
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        return _mesh_group(named[1], named[2], attributes, num_devices)
    return tuple(range(num_devices))


def _mesh_group(mesh: str, names: str, attributes: str, num_devices: int) -> tuple[int, ...]:
    """Makes the first group of a collective over named axes.

    An example is `'data'=2,'fsdp'=4` and `'fsdp'`.
    """
    axes = [(name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)]
    # 'x': the whole axis; 'x':(2)4: the 4 devices within each of 2 parts.
    over = {
        name: (int(outer or 1), int(part or 0))
        for name, outer, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", names)
    }
    along = []
    for name, size in axes:
        outer, part = over.get(name, (1, 1))
        part = part or size
        along.append(np.arange(part) * (size // outer // part))
    ids = np.arange(num_devices)
    if ordered := re.search(r"device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\)", attributes):
        dims, order = (list(map(int, part.split(","))) for part in ordered.groups())
        ids = ids.reshape(dims).transpose(order)
    ids = ids.reshape([size for _, size in axes])
    return tuple(ids[np.ix_(*along)].flatten().tolist())
