"""The frames of a GIF or an animated WebP, by Pillow."""

import contextlib
import io
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from mammut.data.file_bytes import first_bytes, is_animation_file, is_cut
from mammut.data.images import PILLOW_LIMIT
from mammut.data.video_reader import BadVideo, Frames

_DEFAULT_MILLISECONDS = 100  # of a frame that says 0, as browsers have it


def is_animation(value: Any) -> bool:
    """Tells whether something is a GIF or an animated WebP.

    It may be a path, bytes, an open file or a PIL image.
    """
    import PIL.Image

    if isinstance(value, PIL.Image.Image):
        return value.format == "GIF" or (value.format == "WEBP" and value.is_animated)
    try:
        return is_animation_file(first_bytes(value))
    except (OSError, ValueError):
        return False


# The functions below raise BadVideo with a message that continues after the video's name.
@contextlib.contextmanager
def open_animation(file: Any, max_pixels: int) -> Iterator[Frames]:
    """Opens what `is_animation` takes; its frames can be read inside of the context.

    Args:
      file: a path, bytes, an open file or a PIL image.
      max_pixels: an animation with larger frames is refused, undecoded.

    Raises:
      BadVideo: the file is damaged; also while frames are read.
    """
    import PIL.Image

    picture, position = file, None
    if isinstance(file, PIL.Image.Image):
        position = file.tell()
    else:
        content = _content(file)
        if is_cut(io.BytesIO(content)):
            raise BadVideo("is truncated: it ends before its blocks do", "truncated")
        with _pillow():
            picture = PIL.Image.open(io.BytesIO(content), formats=("GIF", "WEBP"))

    def show(index: int) -> None:
        picture.seek(index)
        # Of each frame: a GIF grows where a later frame does not fit in.
        if math.prod(picture.size) > max_pixels:
            raise BadVideo(
                f"has frames of {picture.width} x {picture.height} pixels, more than "
                f"max_image_pixels {max_pixels}",
                "oversized",
            )
        picture.load()

    def read(wanted: Sequence[int]) -> Iterator[Any]:
        for index in wanted:
            with _pillow():
                show(index)
                frame = picture.copy()
            yield frame

    ends = []
    with _pillow():
        for index in range(picture.n_frames):
            show(index)  # a WebP knows how long a frame is shown when it has decoded it
            duration = int(picture.info.get("duration") or _DEFAULT_MILLISECONDS)
            ends.append((ends[-1] if ends else 0) + duration)
    yield Frames(np.array([0, *ends[:-1]], np.int64), ends[-1], Fraction(1, 1000), read)
    if position is not None:
        picture.seek(position)


def _content(file: Any) -> bytes:
    if isinstance(file, str | os.PathLike):
        try:
            return pathlib.Path(file).read_bytes()
        except OSError as error:
            raise BadVideo(f"cannot be read: {error}", "missing file") from error
    if hasattr(file, "read"):
        file.seek(0)
        return file.read()
    return bytes(file)


@contextlib.contextmanager
def _pillow() -> Iterator[None]:
    """Turns Pillow's errors, which are of many kinds, into BadVideo."""
    with PILLOW_LIMIT:
        try:
            yield
        except BadVideo:
            raise
        except Exception as error:
            cause = "truncated" if "truncated" in str(error).lower() else "corrupt"
            raise BadVideo(f"is {cause}: {error}", cause) from error
