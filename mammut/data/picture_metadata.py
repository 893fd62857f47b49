"""The metadata of PNG and JPEG files, dropped where a damaged part of it hides whole pixels."""

import zlib
from typing import Any

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
# The chunks of a PNG that its pixels do not need: of all others, damage is damage to the picture.
_PNG_METADATA = (
    *(b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"cICP", b"mDCV"),
    *(b"cLLI", b"sBIT", b"bKGD", b"hIST", b"pHYs", b"sPLT", b"tIME", b"acTL", b"fcTL", b"fdAT"),
)


def without_metadata(content: Any) -> bytes | None:
    """Drops the metadata of a PNG or JPEG, but EXIF, for its orientation; None where there is none.

    Pillow refuses a PNG for its texts, its colour profile or its animation, and a JPEG for the
    header of any metadata.
    """
    plain = None
    if isinstance(content, bytes) and content.startswith(_PNG):
        plain = _plain_png(content)
    elif isinstance(content, bytes) and content.startswith(_JPEG):
        plain = _plain_jpeg(content)
    return plain if plain is not None and len(plain) < len(content) else None


def _plain_jpeg(content: bytes) -> bytes:
    """Drops the metadata of a JPEG. Format: ITU-T T.81, section B.1.1.3."""
    kept = [_JPEG]
    start = len(_JPEG)
    # The segments before the first scan; each has its marker and its length in front.
    while content[start : start + 1] == b"\xff" and content[start + 1 : start + 2] != b"\xda":
        end = start + 2 + int.from_bytes(content[start + 2 : start + 4], "big")
        marker = content[start + 1]
        data = content[start + 4 : end]
        # Adobe's says how colours are stored.
        has_use = data.startswith(b"Exif\0\0") or (data.startswith(b"Adobe") and len(data) >= 12)
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE) or has_use:
            kept.append(content[start:end])
        start = end
    return b"".join(kept) + content[start:]


def _plain_png(content: bytes) -> bytes:
    """Drops the metadata of a PNG. Format: W3C, "PNG Specification", third edition, section 5.3."""
    kept = [_PNG]
    start = len(_PNG)
    while start < len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        kind = content[start + 4 : start + 8]
        is_whole = zlib.crc32(content[start + 4 : end - 4]) == int.from_bytes(
            content[end - 4 : end]
        )
        if kind not in _PNG_METADATA or (kind == b"eXIf" and is_whole):
            kept.append(content[start:end])
        start = end
    return b"".join(kept)
