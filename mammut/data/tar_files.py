"""Headers of a plain tar file: its files and their positions.

The tar format: POSIX.1-2017, pax, "EXTENDED DESCRIPTION", and GNU's long names and large numbers
(GNU tar manual, "Basic Tar Format").
"""

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

_BLOCK = 512
_MAX_EXTENSION = 2**20  # bytes of a long name or of pax records
_END = 2 * _BLOCK  # the end mark, which zeros follow up to a whole record
_RECORD = 20 * _BLOCK  # of GNU tar and Python's tarfile; some programs write none
# Kinds of entries that have no content.
_OTHERS = {b"1": "links", b"2": "links", b"3": "devices", b"4": "devices", b"6": "pipes"}
_LONG_RECORDS = tuple(2**power for power in range(14, 21))  # of `tar -b`


class Damage(Exception):
    """A tar file that cannot be used.

    The message continues after the name of the file.
    """


class TarFile(NamedTuple):
    """An entry of a tar that is no folder: its name and its position in bytes."""

    name: bytes
    start: int  # offset of its first header
    data: int  # offset of its content
    size: int  # bytes of its content
    other: str = ""  # what it is, such as "links", where it is no file


def read_files(read: Callable[[int, int], bytes], size: int) -> Iterator[TarFile]:
    """Finds the entries of a tar that are no folders.

    It may be several tars joined one after the other.

    Args:
      read: `read(offset, size)` returns some bytes of the tar; fewer at its end.
      size: bytes of the tar.

    Raises:
      Damage: the tar is cut short, damaged, has a sparse file, or more zeros than a tar ends with.
    """
    offset = start = 0
    first = end = 0  # where this one of several tars starts, and the zeros at its end
    ended = False
    name = None  # of the file that follows, from GNU's header for long names
    pax: dict[bytes, bytes] = {}  # records of the file that follows
    while offset < size:
        block = read(offset, _BLOCK)
        # A block of zeros is the end; it may be incomplete, as the last block of the tar.
        if block.count(0) == len(block):
            end = end if ended else offset
            ended = not pax and name is None
            offset += _BLOCK
            start = offset
            continue
        if ended:
            _check_zeros(first, end, offset)
            first = offset
        ended = False
        kind, plain_name, length = _header(block, offset)
        data = offset + _BLOCK
        if kind in b"LKxXg":  # a header about the file that follows
            content = _extension(read, offset, length)
            if len(content) < length:
                break
            if kind == b"L":
                name = content.partition(b"\0")[0]
            elif kind in b"xX":
                pax = _pax_records(content, data)
            offset = data + _padded(length)
            continue

        name = pax.get(b"path", name or plain_name)
        length = _decimal(pax.get(b"size"), length, offset)
        if kind == b"S" or any(key.startswith(b"GNU.sparse.") for key in pax):
            raise Damage(f"has {shown(name)} as a sparse file: pack it again without --sparse")
        # Folders, links and devices have no content, even if their headers have a size.
        if kind in b"123456" or (kind == b"\0" and name.endswith(b"/")):
            length = 0
            if kind in _OTHERS:
                yield TarFile(name, start, data, length, _OTHERS[kind])
        elif data + length > size:
            raise Damage(
                f"is cut short or damaged: its file {shown(name)} should end at byte "
                f"{data + length:,} of {size:,}; get it again, or leave it out by a narrower "
                "pattern"
            )
        elif kind in b"07\0":
            yield TarFile(name, start, data, length)
        else:
            yield TarFile(name, start, data, length, f"entries of kind {shown(kind)}")
        offset = start = data + _padded(length)
        name = None
        pax = {}
    _check_end(first, end if ended else None, size)


def _check_end(first: int, end: int | None, size: int) -> None:
    """Checks the end of the last tar; `end` None: it has no end mark."""
    if end is None:
        raise Damage(
            "is cut short: it has no end mark, so files may be missing; get it again, or leave it "
            "out by a narrower pattern"
        )
    # The last record may be incomplete.
    if size - first > _padded(end - first + _END, _RECORD):
        _check_zeros(first, end, size, _LONG_RECORDS)


def _check_zeros(
    first: int, end: int, size: int, records: Collection[int] = (_BLOCK, _RECORD)
) -> None:
    """Checks the zeros that a tar ends with: they go on to the end of a record.

    Args:
      first: the byte where the tar starts.
      end: the byte where its last file ends and the zeros start.
      size: the byte where they end.
      records: the possible sizes of a record.

    Raises:
      Damage: there are more or fewer zeros.
    """
    if size - first not in {_padded(end - first + _END, record) for record in records}:
        raise Damage(
            f"is damaged: it has zeros from byte {end:,} to {size:,}, other than a tar ends with, "
            "so files may be missing; get it again, or leave it out by a narrower pattern"
        )


def _padded(length: int, block: int = _BLOCK) -> int:
    """Counts the bytes that a content takes, in whole blocks."""
    return -(-length // block) * block


def _extension(read: Callable[[int, int], bytes], offset: int, length: int) -> bytes:
    """Reads the content of a header about the file that follows."""
    if length > _MAX_EXTENSION:
        raise Damage(f"has a header of {length:,} bytes at byte {offset:,}, expected at most 1 MiB")
    return read(offset + _BLOCK, length)


def _header(block: bytes, offset: int) -> tuple[bytes, bytes, int]:
    """Reads a header: the entry's kind, name, and size in bytes."""
    if len(block) < _BLOCK or not _has_checksum(block, _number(block[148:156], offset)):
        raise Damage(
            f"is damaged at byte {offset:,}, where the header of a file should be, or no tar file; "
            "get it again, or leave it out by a narrower pattern"
        )
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:  # GNU's own format has other things there
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return block[156:157], name, _number(block[124:136], offset)


def _has_checksum(block: bytes, stored: int) -> bool:
    """Tells whether the checksum stored in a header is that of its bytes.

    It is their sum, with spaces in its own place. Some old programs add them as signed numbers.
    """
    counted = block[:148] + b" " * 8 + block[156:]
    return stored == sum(counted) or stored == sum(memoryview(counted).cast("b"))


def _number(field: bytes, offset: int) -> int:
    """Reads a number in a header, in octal digits."""
    if field[0] == 0x80:  # GNU's form of a number too large for octal digits
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    if digits.strip(b"01234567"):
        raise Damage(
            f"is damaged at byte {offset:,}, where a header has {digits!r} for a number, "
            "or no tar file"
        )
    return int(digits or b"0", 8)


def _pax_records(content: bytes, offset: int) -> dict[bytes, bytes]:
    """Reads pax records, lines "length name=value", by name."""
    records = {}
    while content:
        length = _decimal(content[:20].partition(b" ")[0], 0, offset)
        line = content[:length]
        content = content[length:]
        name, equals, value = line.partition(b" ")[2].partition(b"=")
        if len(line) != length or not equals or not value.endswith(b"\n"):
            raise Damage(f"is damaged at byte {offset:,}, where pax records should be")
        records[name] = value[:-1]
    return records


def _decimal(digits: bytes | None, default: int, offset: int) -> int:
    """Reads a number in a pax record; None: `default`."""
    if digits is None:
        return default
    if not digits.isdigit() or len(digits) > 20:
        raise Damage(
            f"is damaged before byte {offset:,}: a pax record has {digits[:20]!r} for a number"
        )
    return int(digits)


def shown(name: bytes) -> str:
    """Formats the name of a file in a tar, for messages."""
    return repr(name.decode(errors="replace"))
