"""Videos of any kind as arrays of a fixed number of frames.

Files are read by `mammut.data.video_reader`; GIF and animated WebP, folders of frames, sequences of
pictures and arrays here. Frames are chosen by the time at which they are shown, never by a rate and
a duration: both may be wrong, and many videos have no constant rate.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import UInt8

from mammut.core.fields import require
from mammut.data.animation import is_animation, open_animation
from mammut.data.file_bytes import first_bytes, is_video_file
from mammut.data.images import ImageTransform, draw_crop
from mammut.data.video_reader import BadVideo, Frames, open_video

__all__ = ["BadVideo", "Clip", "VideoTransform", "is_animation", "is_video"]

# A path, bytes, an open file, a sequence of pictures, a folder of frames, uint8[N, height, width,
# 3], or a Clip of one of these; a picture is a video of one frame.
VideoLike = Any

_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
# The first bytes of the pictures that Pillow reads; everything else goes to PyAV.
_PICTURE_STARTS = (
    *(b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*"),
    *(b"P%d" % number for number in range(1, 7)),
)


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video, or the part of it between two times.

    Attributes:
      file: a path, the bytes of a file, an open file, a folder of frames, a sequence of pictures
        (the frames), or uint8[N, height, width, 3].
      start: seconds from the first frame; None: the start of the video.
      end: seconds from the first frame, at most the end of the video; None: that end.

    Example:
      >>> clip = mammut.Clip("cooking.mp4", start=12.5, end=20)
      >>> mammut.caption(model, processor, [clip])
      ['a person cuts an onion']
    """

    file: Any
    start: float | int | None = None
    end: float | int | None = None

    def __post_init__(self):
        for name in ("start", "end"):
            value = getattr(self, name)
            require(
                value is None or _is_number(value),
                f"Clip.{name} is {value!r}, expected seconds, a finite number, or None",
            )


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool | str | bytes) and math.isfinite(value)
    except (TypeError, OverflowError):  # none; beyond all floats
        return False


@dataclasses.dataclass(frozen=True)
class VideoTransform:
    """Reads a fixed number of frames of any video, as `uint8[T, image_size, image_size, 3]`.

    A video with fewer frames repeats them in order: 5 frames become 0 0 1 2 2 3 4 4.

    Attributes:
      frames: T, frames that are read.
      fps: None: the whole video or clip, in T segments of equal length, one frame from each; else
        frames a second: T frames one after the other, T / fps seconds in all. A clip that is
        shorter, or pictures without times, are read as a whole.
      shuffled: put the frames of a call in a random order, the same for the same frames. It is a
        control: a model that sees motion does worse then.

    Example:
      >>> transform = mammut.VideoTransform(frames=8)
      >>> transform("clip.mp4", mammut.ImageTransform(224)).shape
      (8, 224, 224, 3)
    """

    frames: int = 8
    fps: float | None = None
    shuffled: bool = False

    def __post_init__(self):
        require(
            type(self.frames) is int and 1 <= self.frames <= 2**12,
            f"VideoTransform.frames is {self.frames!r}, expected a whole number from 1 to {2**12}",
        )
        require(
            self.fps is None or (_is_number(self.fps) and self.fps > 0),
            f"VideoTransform.fps is {self.fps!r}, expected a positive number or None",
        )

    def __call__(
        self, video: VideoLike, image: ImageTransform
    ) -> UInt8[np.ndarray, "T height width 3"]:
        """Reads a video as at inference.

        The frames are those in the middle of each segment; with `fps`, those of the middle of the
        video.

        Args:
          video: anything that `Clip.file` may be, a Clip, or a picture: a video of one frame.
          image: makes the arrays of the frames.

        Raises:
          BadVideo: the video cannot be used as a whole.
          BadImage: a picture of a sequence cannot be used.
        """
        frames = np.stack(self.map(video, image, image.max_image_pixels))
        if self.shuffled:
            frames = np.random.default_rng(zlib.crc32(frames)).permutation(frames)
        return frames

    def map(
        self, video: VideoLike, picture: Callable[[Any], Any], max_image_pixels: int
    ) -> list[Any]:
        """Calls a function for each frame that a call reads, of full size.

        A frame that is repeated gives the same object again. The function is called with anything
        that `ImageTransform.read` takes.
        """
        return self._read(video, [Fraction(1, 2)] * self.frames, max_image_pixels, picture)

    def random(
        self,
        video: VideoLike,
        rng: np.random.Generator,
        image: ImageTransform,
        scale: tuple[float, float],
        ratio: tuple[float, float],
    ) -> UInt8[np.ndarray, "T height width 3"]:
        """Reads a video as in training: random frames, one random crop for all of them.

        A frame comes from anywhere in its segment; with `fps`, the frames from anywhere in the
        video.

        Args:
          video: as of a call; it raises what a call raises.
          rng: source of the random numbers; as many are drawn, whatever the video is.
          image: makes the arrays of the frames.
          scale: as of `ImageTransform.random_resized_crop`; (1, 1): no crop, as at inference.
          ratio: as of `ImageTransform.random_resized_crop`.
        """
        shares = [Fraction(share) for share in rng.random(self.frames).tolist()]
        crop = draw_crop(rng, scale, ratio)
        whole = scale[0] == scale[1] == 1

        def picture(frame: Any) -> UInt8[np.ndarray, "height width 3"]:
            return image(frame) if whole else image.cut(frame, crop)

        return np.stack(self._read(video, shares, image.max_image_pixels, picture))

    def _read(
        self,
        video: VideoLike,
        shares: Sequence[Fraction],
        max_pixels: int,
        picture: Callable[[Any], Any],
    ) -> list[Any]:
        """Reads the frames at a share of each segment; with `fps`, from the first share on."""
        clip = video if isinstance(video, Clip) else Clip(video)
        name = f"video {clip.file}" if isinstance(clip.file, str | os.PathLike) else "video"
        try:
            with _opened(clip.file, max_pixels) as frames:
                indices = self._chosen(frames, clip, shares)
                wanted = sorted(set(indices))
                # One at a time: a frame of full size is larger than all of the result may be.
                read = zip(wanted, frames.read(wanted), strict=True)
                pictures = {index: picture(frame) for index, frame in read}
        except BadVideo as error:
            raise BadVideo(f"{name} {error}", error.cause) from error.__cause__
        return [pictures[index] for index in indices]

    def _chosen(self, frames: Frames, clip: Clip, shares: Sequence[Fraction]) -> list[int]:
        """Chooses frames: of each moment the last one that began before it.

        Times are whole numbers and fractions, so that no rounding chooses another frame.
        """
        low, high = _bounds(frames, clip)
        length = high - low
        if self.fps is not None and frames.unit is not None:
            window = Fraction(self.frames) / Fraction(self.fps) / frames.unit
            if window < length:
                low += (length - window) * shares[0]
                length = window
            shares = [Fraction(1, 2)] * self.frames
        moments = [
            low + (segment + share) * length / self.frames for segment, share in enumerate(shares)
        ]
        found = np.searchsorted(frames.starts, [math.floor(time) for time in moments], "right") - 1
        return np.maximum(found, 0).tolist()


def _bounds(frames: Frames, clip: Clip) -> tuple[Fraction, Fraction]:
    """Returns the start and end of a clip, in the units of the frames' times."""
    first, end = Fraction(int(frames.starts[0])), Fraction(frames.end)
    if clip.start is None and clip.end is None:
        return first, end
    if frames.unit is None:
        raise BadVideo(
            "is made of pictures without times, expected no start and end", "unsupported"
        )
    low, high = first, end
    if clip.start is not None:
        low = max(first, first + Fraction(float(clip.start)) / frames.unit)
    if clip.end is not None:
        high = min(end, first + Fraction(float(clip.end)) / frames.unit)
    if low >= high:
        seconds = float((end - first) * frames.unit)
        raise BadVideo(
            f"has nothing between start {clip.start} and end {clip.end}, it is {seconds:.2f} s "
            "long: expected start < end",
            "empty clip",
        )
    return low, high


def is_video(value: Any) -> bool:
    """Tells whether something is surely a video.

    It is one if it is a Clip, a path that ends in .mp4, .m4v, .mov, .webm, .mkv or .avi, bytes or
    an open file that begin so, a folder, a list or tuple (of pictures), or an array uint8[N,
    height, width, 3]. A GIF is a picture here; see `is_animation`.
    """
    import PIL.Image

    if isinstance(value, Clip | list | tuple):
        return True
    if isinstance(value, PIL.Image.Image):
        return False
    if isinstance(value, str | os.PathLike):  # first: a str of NumPy is an array, too
        return os.fspath(value).lower().endswith(_SUFFIXES) or os.path.isdir(value)
    if hasattr(value, "__array__") and not isinstance(value, bytes):
        array = value if hasattr(value, "ndim") else np.asarray(value)
        return array.ndim == 4 and str(array.dtype) in ("uint8", "torch.uint8")
    return is_video_file(first_bytes(value))


# The functions below raise BadVideo with a message that continues after the video's name.
@contextlib.contextmanager
def _opened(file: VideoLike, max_pixels: int) -> Iterator[Frames]:
    """Opens a video of any kind."""
    import PIL.Image

    if isinstance(file, list | tuple):
        yield _sequence(file)
    elif hasattr(file, "__array__") and not isinstance(file, PIL.Image.Image | str | bytes):
        array = np.asarray(file)
        if array.ndim < 4:
            yield _sequence([file])
        elif array.ndim == 4 and array.dtype == np.uint8:
            yield _sequence(list(array))
        else:
            raise BadVideo(
                f"is {array.dtype}{list(array.shape)}, expected uint8[N, height, width, 3]",
                "unsupported",
            )
    elif isinstance(file, str | os.PathLike) and os.path.isdir(file):
        yield _sequence(_pictures_in(pathlib.Path(file)))
    elif is_animation(file):
        with open_animation(file, max_pixels) as frames:
            yield frames
    else:
        if isinstance(file, bytearray | memoryview):
            file = bytes(file)
        try:
            head = first_bytes(file)
        except (OSError, ValueError) as error:
            raise BadVideo(f"cannot be read: {error}", "missing file") from error
        is_file = isinstance(file, str | os.PathLike | bytes) or hasattr(file, "read")
        if not is_file or head.startswith(_PICTURE_STARTS) or head[8:12] == b"WEBP":
            yield _sequence([file])
        else:
            with open_video(file, max_pixels) as frames:
                yield frames


def _sequence(pictures: Sequence[Any]) -> Frames:
    """The frames of pictures, about whose times nothing is known."""
    if not len(pictures):
        raise BadVideo("has no frames", "empty")
    starts = np.arange(len(pictures), dtype=np.int64)
    return Frames(starts, len(pictures), None, lambda wanted: (pictures[index] for index in wanted))


def _pictures_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """Lists the pictures of a folder in natural order: frame2.jpg before frame10.jpg."""

    def key(path: pathlib.Path) -> list[Any]:
        parts = re.split(r"(\d+)", path.name)
        return [(int(part), part) if part.isdecimal() else part for part in parts]

    try:
        files = list(folder.iterdir())
    except OSError as error:
        raise BadVideo(f"cannot be read: {error}", "missing file") from error
    # macOS puts `._NAME` beside a file on other file systems.
    files = [file for file in files if not file.name.startswith(".")]
    return sorted((file for file in files if file.suffix.lower() in _PICTURES), key=key)
