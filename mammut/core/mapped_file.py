"""Memory-mapped tensor files: the part that all formats share.

A file is mapped whole and read through views: nothing is loaded before it is read. Each read
releases the memory of the read before it. Resident memory therefore stays near the size of the
largest tensor, however large the file is.
"""

import collections
import dataclasses
import json
import math
import mmap
import pathlib
import stat
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

MAX_TENSORS = 100_000
MAX_HEADER = 100_000_000  # bytes
_MAX_JSON_VALUES = 32 * MAX_TENSORS  # a tensor's entry has about a dozen
# Bytes of one tensor: more than any file has, and within the integers of NumPy's strides.
_MAX_BYTES = 2**48
_MAX_AXES = 32


class CheckpointError(ValueError):
    """Raised for a checkpoint that is missing, damaged, or of another model.

    Example:
      >>> try:
      ...     model, processor = mammut.load("runs/damaged")
      ... except mammut.CheckpointError as error:
      ...     print(error)
    """


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Shape and type of a tensor, without its values."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """How many bytes the values take."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its spec and a reading function."""

    spec: TensorSpec
    read: Callable[[], np.ndarray]


def tensor_spec(where: str, shape: Sequence[Any], dtype: np.dtype) -> TensorSpec:
    """Makes the spec of a tensor from an untrusted shape.

    Args:
      where: file and key, for errors.
      shape: the shape as the file states it; it may be anything.
      dtype: the type of its values.

    Raises:
      CheckpointError: no array can have that shape.
    """
    # The error does not show the values: one may be an integer of a million digits, or a list that
    # holds itself.
    if len(shape) > _MAX_AXES or not all(type(size) is int and size >= 0 for size in shape):
        raise CheckpointError(
            f"{where} has no shape of at most {_MAX_AXES} axes, none of them negative"
        )
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize > _MAX_BYTES:
        raise CheckpointError(f"{where} is said to take more than {_MAX_BYTES} bytes")
    return TensorSpec(tuple(shape), dtype)


def array_view(
    where: str,
    buffer: Any,
    start: int,
    spec: TensorSpec,
    strides: tuple[int, ...] | None = None,
    byteorder: str = "little",
) -> np.ndarray:
    """Returns the tensor that lies `start` bytes into a buffer, read-only.

    It is a view of the buffer, or a copy where the bytes must be swapped.

    Args:
      where: file and key, for errors.
      buffer: holds the bytes; the caller has checked that the tensor lies within it.
      start: bytes from the start of the buffer.
      spec: shape and type of the tensor.
      strides: bytes from one element to the next, for each axis; None: C order.
      byteorder: "little" or "big", as in `sys.byteorder`.

    Raises:
      CheckpointError: a truth value is neither 0 nor 1.
    """
    if 0 in spec.shape:
        array = np.empty(spec.shape, spec.dtype)
    else:
        array = np.ndarray(spec.shape, spec.dtype, buffer, start, strides)
    if spec.dtype == np.bool_ and array.size and array.view(np.uint8).max() > 1:
        raise CheckpointError(f"{where} holds bytes that are neither true nor false")
    if byteorder != sys.byteorder:
        array = array.byteswap()
    array.flags.writeable = False
    return array


class MappedFile:
    """A regular file, mapped for reading.

    The file must not be cut short while arrays of it are in use.

    Raises:
      CheckpointError: it is missing, empty, a folder or a pipe, or cannot be read.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._resident = (0, 0)
        try:
            status = path.stat()
            # Checked before opening: opening a pipe that nobody writes to would wait forever.
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path} is a folder, a pipe or a device, expected a file")
            if status.st_size == 0:
                raise CheckpointError(f"{path} is empty")
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        self.size = len(self._map)

    def bytes(self, start: int, stop: int) -> bytes:
        """Copies a range; the copy is shorter where the file ends."""
        return self._map[start:stop]

    def crc32(self, start: int, stop: int) -> int:
        """Computes the CRC-32 of a range."""
        self._use(start, stop)
        with memoryview(self._map)[start:stop] as view:
            return zlib.crc32(view)

    def array(
        self,
        where: str,
        start: int,
        spec: TensorSpec,
        strides: tuple[int, ...] | None = None,
        byteorder: str = "little",
    ) -> np.ndarray:
        """Returns the tensor that lies at `start`: `array_view` of the file."""
        self._use(start, start + spec.nbytes)
        return array_view(where, self._map, start, spec, strides, byteorder)

    def let_go(self) -> None:
        """Releases the memory of everything that was read.

        Arrays in use stay valid: they are read again from the file.
        """
        self._release(0, self.size)

    def _use(self, start: int, stop: int) -> None:
        """Releases the range that was read last.

        It is kept if the new range is a part of it.
        """
        if not self._resident[0] <= start <= stop <= self._resident[1]:
            self._release(*self._resident)
            self._resident = (start, stop)

    def _release(self, start: int, stop: int) -> None:
        if stop > start and hasattr(mmap, "MADV_DONTNEED"):
            start -= start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)


def json_object(raw: bytes, where: str) -> dict[str, Any]:
    """Reads a JSON object that is not trusted.

    `where` names its file in errors.

    Raises:
      CheckpointError: the bytes are no JSON object, name a key twice, hold NaN or Infinity, or
        would take far more memory than a list of tensors does.
    """
    if len(raw) > MAX_HEADER or sum(map(raw.count, (b",", b"[", b"{"))) > _MAX_JSON_VALUES:
        raise CheckpointError(
            f"{where} has more than {MAX_HEADER} bytes or {_MAX_JSON_VALUES} values"
        )
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_distinct, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested without end
        raise CheckpointError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is a JSON {type(value).__name__}, expected an object")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        key, count = collections.Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key!r} is there {count} times")
    return value


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")
