"""Reads zip archives that strangers wrote, and the arrays of an `.npz`.

They are archives as `numpy.savez` and `torch.save` write them. `zipfile` trusts the directory of
an archive. Here every member is checked against the file before anything is unpacked: its offset,
its sizes, its name in both directories, and that no two members share a byte.
"""

import ast
import dataclasses
import math
import struct
import zlib
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from mammut.core.mapped_file import (
    MAX_HEADER,
    MAX_TENSORS,
    CheckpointError,
    MappedFile,
    StoredTensor,
    array_view,
    tensor_spec,
)

_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_MAX_MEMBERS = 2 * MAX_TENSORS  # a checkpoint has a few beside its tensors
_UTF8 = 0x800  # flag of a member: its name is UTF-8
_UNREADABLE = 0x2061  # flags of a member that is encrypted or patched, or has masked headers
_STORED = 0  # methods of packing
_DEFLATED = 8
_MAX_RATIO = 1032  # number of bytes that deflate can unpack from one byte
_PIECE = 1 << 16  # bytes that are unpacked at a time

_MAX_NPY_HEADER = 10_000  # bytes, as in NumPy's own reader
_NPY_DTYPES = {f"{x.kind}{x.itemsize}": x for x in map(np.dtype, "?bhilBHILefdFD")}
# NumPy has no bfloat16, and writes it as two bytes without a type.
_NPY_DTYPES["V2"] = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Member:
    """A file within the archive."""

    name: str
    start: int  # its first byte in the archive
    stored: int  # its number of bytes in the archive
    size: int  # its number of bytes when unpacked
    crc: int
    deflated: bool


class ZipArchive:
    """The members of an archive, by name.

    They are in the order of the directory.

    Raises:
      CheckpointError: the archive is damaged or encrypted, or its directory does not fit the file.
    """

    def __init__(self, file: MappedFile):
        self.file = file
        self._checked: set[str] = set()
        try:
            self.members = self._read_directory()
        except struct.error:
            raise CheckpointError(
                f"{file.path} is a damaged zip archive: it ends within its directory"
            ) from None

    def _refuse(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path} is a damaged zip archive: {reason}")

    def _read_directory(self) -> dict[str, Member]:
        start, stop, count = self._find_directory()
        members: dict[str, Member] = {}
        ranges = [(start, self.file.size, "its directory")]
        at = start
        for _ in range(count):
            header_start, member, size = self._read_entry(at)
            at += size
            if member.name in members:
                raise self._refuse(f"the name {member.name!r} is there twice")
            members[member.name] = member
            ranges.append((header_start, member.start + member.stored, repr(member.name)))
        if at != stop:
            raise self._refuse(
                f"its {count} members take {at - start} bytes of its directory of {stop - start}"
            )
        ranges.sort()
        for (_, end, name), (begin, _, following) in zip(ranges, ranges[1:]):
            if end > begin:
                raise self._refuse(f"{name} runs into {following}")
        return members

    def _find_directory(self) -> tuple[int, int, int]:
        """Finds the first and last byte of the central directory.

        Returns also the number of its members.
        """
        size = self.file.size
        tail_start = max(0, size - _END.size - 0xFFFF)
        end = tail_start + self.file.bytes(tail_start, size).rfind(b"PK\5\6")
        if end < tail_start:
            raise self._refuse("it has no directory at its end, as one that was cut short")
        *numbers, comment = _END.unpack(self.file.bytes(end, end + _END.size))[1:]
        if end + _END.size + comment != size:
            raise self._refuse("its directory is not at its end")
        where = end - _LOCATOR64.size
        if where >= 0 and self.file.bytes(where, where + 4) == b"PK\6\7":
            _, _, end, _ = _LOCATOR64.unpack(self.file.bytes(where, where + _LOCATOR64.size))
            signature, _, _, _, *numbers = _END64.unpack(
                self.file.bytes(end, min(end + _END64.size, where))
            )
            if signature != b"PK\6\6":
                raise self._refuse("its zip64 directory is not where it says")
        disk, first_disk, here, count, length, start = numbers
        if disk or first_disk or here != count:
            raise self._refuse("it is one of several volumes")
        if count > _MAX_MEMBERS or length > MAX_HEADER:
            raise self._refuse(
                f"it lists {count} members in {length} bytes, "
                f"more than {_MAX_MEMBERS} in {MAX_HEADER}"
            )
        if start + length != end:
            raise self._refuse(
                f"its directory of {length} bytes at byte {start} does not end at byte {end}"
            )
        return start, start + length, count

    def _read_entry(self, at: int) -> tuple[int, Member, int]:
        """Reads the entry at byte `at` of the directory.

        Returns:
          The first byte of the member's local header, the member, and the size of the entry.
        """
        fields = _ENTRY.unpack(self.file.bytes(at, at + _ENTRY.size))
        signature, _, _, flags, method, _, _, crc, stored, size = fields[:10]
        name_size, extra_size, comment_size = fields[10:13]
        header_start = fields[-1]
        if signature != b"PK\1\2":
            raise self._refuse(f"there is no member at byte {at} of its directory")
        raw_name = self.file.bytes(at + _ENTRY.size, at + _ENTRY.size + name_size)
        try:
            name = raw_name.decode("utf-8" if flags & _UTF8 else "cp437")
        except UnicodeDecodeError as error:
            raise self._refuse(f"a member has a name that is not text ({error})") from error
        extra_start = at + _ENTRY.size + name_size
        wide = _zip64_numbers(self.file.bytes(extra_start, extra_start + extra_size))
        # A number that is too large for 4 bytes has all its bits set.
        size, stored, header_start = (
            next(wide, n) if n == 0xFFFFFFFF else n for n in (size, stored, header_start)
        )

        if flags & _UNREADABLE:
            raise self._refuse(f"{name!r} is encrypted")
        if method not in (_STORED, _DEFLATED):
            raise self._refuse(
                f"{name!r} is packed by method {method}, expected stored or deflated"
            )
        if method == _STORED:
            possible = size == stored
        else:
            possible = size <= _MAX_RATIO * stored
        if not possible:
            raise self._refuse(f"{name!r} is said to hold {size} bytes in {stored}")
        if header_start + _LOCAL.size > self.file.size:
            raise self._refuse(f"{name!r} begins at byte {header_start} of {self.file.size}")
        fields = _LOCAL.unpack(self.file.bytes(header_start, header_start + _LOCAL.size))
        start = header_start + _LOCAL.size + fields[-2] + fields[-1]
        local_name = self.file.bytes(
            header_start + _LOCAL.size, header_start + _LOCAL.size + fields[-2]
        )
        if fields[0] != b"PK\3\4" or fields[3] != method or local_name != raw_name:
            raise self._refuse(f"{name!r} is not at byte {header_start}, where its directory says")
        member = Member(name, start, stored, size, crc, method == _DEFLATED)
        return header_start, member, _ENTRY.size + name_size + extra_size + comment_size

    def check(self, member: Member) -> None:
        """Checks a stored member against its checksum, the first time."""
        if member.name not in self._checked:
            self._check_crc(member, self.file.crc32(member.start, member.start + member.stored))
            self._checked.add(member.name)

    def _check_crc(self, member: Member, crc: int) -> None:
        if crc != member.crc:
            raise CheckpointError(
                f"{self.file.path}: {member.name!r} does not have its checksum: "
                "the file is damaged, or was saved with torch's checksums switched off"
            )

    def head(self, member: Member, size: int) -> bytes:
        """Reads the first `size` bytes of a member, unchecked.

        Fewer are returned where the member is shorter.
        """
        if not member.deflated:
            return self.file.bytes(member.start, member.start + min(size, member.stored))
        head = b""
        for piece in self._pieces(member):
            head += piece
            if len(head) >= size:
                break
        return head[:size]

    def read(self, member: Member) -> bytes | bytearray:
        """Reads all bytes of a member and checks them.

        The checks are its size and its checksum.
        """
        if not member.deflated:
            self.check(member)
            return self.file.bytes(member.start, member.start + member.stored)
        data = bytearray()
        for piece in self._pieces(member):
            data += piece
            if len(data) > member.size:
                break
        if len(data) != member.size:
            raise self._refuse(
                f"{member.name!r} does not unpack to the {member.size} bytes "
                "that its directory says"
            )
        self._check_crc(member, zlib.crc32(data))
        return data

    def _pieces(self, member: Member) -> Iterator[bytes]:
        """Unpacks a deflated member, one piece at a time."""
        unpack = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            for start in range(member.start, member.start + member.stored, _PIECE):
                packed = self.file.bytes(start, min(start + _PIECE, member.start + member.stored))
                while not unpack.eof and (piece := unpack.decompress(packed, _PIECE)):
                    yield piece
                    packed = unpack.unconsumed_tail
        except zlib.error as error:
            raise self._refuse(f"{member.name!r} cannot be unpacked: {error}") from error


def _zip64_numbers(extra: bytes) -> Iterator[int]:
    """Reads the 8-byte numbers of an entry.

    They stand for the numbers that are too large for 4 bytes.
    """
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            for position in range(at + 4, min(at + 4 + size, len(extra)) - 7, 8):
                yield int.from_bytes(extra[position : position + 8], "little")
        at += 4 + size


def npz_tensors(archive: ZipArchive) -> dict[str, StoredTensor]:
    """Reads the arrays of an `.npz`, by name without ".npy".

    A stored array is a view; a deflated one is unpacked when it is read. Two-byte void, which NumPy
    writes for types that it does not know, is read as bfloat16.

    Raises:
      CheckpointError: a member is no array of numbers, or has another size than its header says.
    """
    for name in archive.members:
        if not name.endswith(".npy"):
            raise CheckpointError(
                f"{archive.file.path} is a zip archive of {name!r}, not .npz nor of torch.save"
            )
    return {
        name.removesuffix(".npy"): _npy_tensor(archive, member)
        for name, member in archive.members.items()
    }


def _npy_tensor(archive: ZipArchive, member: Member) -> StoredTensor:
    """Reads an array in the NumPy file format.

    Source: numpy.org/doc/stable/reference/generated/numpy.lib.format.html.
    """
    where = f"{archive.file.path}: {member.name.removesuffix('.npy')!r}"
    head = archive.head(member, _MAX_NPY_HEADER + 12)
    version = tuple(head[6:8])
    if head[:6] != b"\x93NUMPY" or version not in ((1, 0), (2, 0), (3, 0)):
        raise CheckpointError(f"{where} is not an array in format 1 to 3 of .npy")
    start = 10 if version == (1, 0) else 12
    data_start = start + int.from_bytes(head[8:start], "little")
    if data_start > len(head):
        raise CheckpointError(f"{where} has a header longer than itself or {_MAX_NPY_HEADER} bytes")
    encoding = "utf-8" if version == (3, 0) else "latin-1"
    try:
        header = ast.literal_eval(head[start:data_start].decode(encoding).strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        header = None
    match header:
        case {"descr": str(descr), "fortran_order": bool(fortran), "shape": tuple(shape)} if (
            len(header) == 3
        ):
            pass
        case {"descr": list()}:
            raise CheckpointError(f"{where} is a table of named fields, expected numbers")
        case _:
            raise CheckpointError(
                f"{where} has a header that does not give descr, fortran_order and shape"
            )
    if "O" in descr:
        raise CheckpointError(
            f"{where} holds Python objects, which would run code, expected numbers"
        )
    if descr[:1] not in tuple("<>|=") or descr[1:] not in _NPY_DTYPES:
        raise CheckpointError(
            f"{where} has dtype {descr!r}, expected one of {', '.join(_NPY_DTYPES)}"
        )
    spec = tensor_spec(where, shape, _NPY_DTYPES[descr[1:]])
    if data_start + spec.nbytes != member.size:
        raise CheckpointError(
            f"{where} is {spec.dtype}{list(spec.shape)}, {spec.nbytes} bytes, "
            f"and has {member.size - data_start}"
        )
    strides = None
    if fortran:
        strides = tuple(
            spec.dtype.itemsize * math.prod(spec.shape[:axis]) for axis in range(len(shape))
        )
    byteorder = "big" if descr[0] == ">" else "little"

    def read() -> np.ndarray:
        if member.deflated:
            unpacked = archive.read(member)
            return array_view(where, unpacked, data_start, spec, strides, byteorder)
        archive.check(member)
        return archive.file.array(where, member.start + data_start, spec, strides, byteorder)

    return StoredTensor(spec, read)
