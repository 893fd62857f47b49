"""What the bytes of a video file say of it, without a decoder.

They tell what a file is, and whether it has all its bytes: decoders play what is left of a file
that was cut, and half a video would be taken for a whole one.
"""

import io
import os
from typing import Any

_HEAD = 32  # bytes that tell what a file is
_MATROSKA = b"\x1aE\xdf\xa3"
_FIRST_BOXES = b"ftyp", b"moov", b"mdat", b"wide"  # of an mp4 or mov
_TO_THE_END = 0  # the size of a last box that ends with the file


def first_bytes(value: Any) -> bytes:
    """Returns the first bytes of a path, bytes or an open file; none of what is no file.

    Raises:
      OSError, ValueError: the file cannot be read.
    """
    if isinstance(value, str | os.PathLike):
        with open(value, "rb") as file:
            return file.read(_HEAD)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value[:_HEAD])
    if hasattr(value, "seek") and hasattr(value, "read"):
        value.seek(0)
        head = value.read(_HEAD)
        value.seek(0)
        return head if isinstance(head, bytes) else b""
    return b""


# Pictures, and sequences of pictures, in the container of mp4: AVIF and HEIC.
_PICTURE_BRANDS = b"avif avis heic heix heim heis hevc hevx mif1 msf1".split()


def is_video_file(head: bytes) -> bool:
    """Tells whether a file that begins so is mp4, mov, mkv, webm or avi."""
    if head[:4] == b"RIFF":
        return head[8:12] == b"AVI "
    if head[4:8] == b"ftyp" and head[8:12] in _PICTURE_BRANDS:
        return False
    return head[:4] == _MATROSKA or head[4:8] in _FIRST_BOXES


def is_animation_file(head: bytes) -> bool:
    """Tells whether a file that begins so is a GIF or an animated WebP.

    Format: RFC 9649, "WebP Image Format", section 2.7.
    """
    animated_webp = head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and head[20:21]
    return head[:4] == b"GIF8" or bool(animated_webp and head[20] & 2)


def is_cut(file: Any) -> bool:
    """Tells whether a file ends before its headers say.

    It knows mp4 and mov, mkv and webm, avi and animated WebP, and GIF. Of others, and of a
    recording whose size was not known when it was begun, it says False.
    """
    head = _read(file, 0, 12)
    size = file.seek(0, io.SEEK_END)
    if head[:4] == b"RIFF":
        # avi may go on in further chunks; one that was never finished has size 0
        return 8 + int.from_bytes(head[4:8], "little") > size
    if head[:4] == _MATROSKA:
        return _end_of_matroska(file) > size
    if head[:4] == b"GIF8":
        return not _gif_has_end(file)
    return _boxes(file)[1] > size


def has_lost_index(file: Any) -> bool:
    """Tells whether a file is an mp4 or mov without all of `moov`, the index of its streams."""
    kinds, end = _boxes(file)
    whole = kinds if end <= file.seek(0, io.SEEK_END) else kinds[:-1]
    return bool(kinds) and b"moov" not in whole


def _read(file: Any, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _boxes(file: Any) -> tuple[list[bytes], int]:
    """Lists the top-level boxes of an mp4, and where the last of them ends.

    Format: ISO/IEC 14496-12, section 4.2. Bytes after the last box that are none are ignored.
    """
    kinds = []
    start = 0
    if _read(file, 4, 4) not in _FIRST_BOXES:
        return kinds, start
    while True:
        head = _read(file, start, 16)
        size, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if size == 1:
            size = int.from_bytes(head[8:], "big")
        if len(head) < 8 or not kind.isalnum() or size < 8:
            if kind.isalnum() and size == _TO_THE_END:
                kinds.append(kind)
            return kinds, start
        kinds.append(kind)
        start += size


def _end_of_matroska(file: Any) -> int:
    """Returns where the segment of a Matroska file ends; 0 where it does not say.

    Format: RFC 8794 (EBML), sections 4 and 5; RFC 9559 (Matroska), section 5.1.
    """
    head = _read(file, 0, 12)
    header_size, start = _vint(head, 4)
    segment = _read(file, start + (header_size or 0), 12)
    size, start_in_segment = _vint(segment, 4)
    if header_size is None or size is None or segment[:4] != b"\x18S\x80g":
        return 0
    return start + header_size + start_in_segment + size


def _vint(head: bytes, start: int) -> tuple[int | None, int]:
    """Reads an EBML size; None where it is the reserved one, unknown, or none at all.

    Returns:
      The size and where the number ends.
    """
    first = head[start] if start < len(head) else 0
    length = 9 - first.bit_length()
    end = start + length
    if not first or end > len(head):
        return None, end
    bits = 7 * length
    value = int.from_bytes(head[start:end], "big") & ((1 << bits) - 1)
    return (None if value == (1 << bits) - 1 else value), end


def _gif_has_end(file: Any) -> bool:
    """Walks over the blocks of a GIF to its trailer.

    Format: CompuServe, "Graphics Interchange Format, version 89a", sections 15 to 27.
    """
    content = _read(file, 0, -1)

    def table(flags: int) -> int:
        return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0

    try:
        at = 13 + table(content[10])
        while content[at] != ord(";"):
            kind = content[at]
            at += 1
            if kind == ord(","):  # a picture: its place, its colours, its code size
                at += 10 + table(content[at + 8])
            elif kind == ord("!"):  # an extension and its label
                at += 1
            else:  # bytes between blocks, which Pillow ignores too
                continue
            while content[at]:
                at += 1 + content[at]
            at += 1
    except IndexError:
        return False
    return True
