"""Videos as examples have them."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Clip:
    """A part of a video file; without `start` and `end` the whole.

    Attributes:
      file: a path, bytes, an open file, pictures (the frames), a folder of frames, or
        uint8[N, height, width, 3].
      start: where it begins, in seconds.
      end: where it ends, in seconds.
    """

    file: Any
    start: float | None = None
    end: float | None = None
