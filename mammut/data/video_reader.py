"""The frames of a video file, by PyAV: which there are, and the pictures of those asked for.

Which frames there are is known from the packets alone. Then only as much is decoded as lies before
the last frame asked for, and only frames asked for become pictures.

What is known of a file's time stamps decides how a frame is found. By its time stamp; but avi has
none (those of its packets are in the order of decoding), as has a bare h264 stream: there frames
are counted from the start.
"""

import collections
import contextlib
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from mammut.data.file_bytes import has_lost_index, is_cut
from mammut.data.images import BadImage

# FFmpeg's names of the formats. A fixed list, so that no file from the web reaches those that open
# other files or addresses, such as playlists.
_FORMATS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,flv,asf,ogg,ivf,h264,hevc"
_WITHOUT_TIMES = ("avi", "ivf")
# A file whose packets end so long before the end that its header states has lost some of them.
_MISSING_SECONDS = 0.5
_MISSING_SHARE = 0.05


class BadVideo(BadImage):
    """A video that cannot be used.

    Attributes:
      cause: as of `BadImage`; "no video" (nothing but sound, or the index of the file is lost) or
        "empty clip" (the end of the clip is before its start, or its start after the video's end).

    Example:
      >>> try:
      ...     batch = processor(images=["clip.mp4"])
      ... except BadVideo as error:
      ...     print(error.cause, error)
    """


class Frames(NamedTuple):
    """The frames of a video, in the order in which they are shown.

    Attributes:
      starts: int64[N], the time of each in units, increasing; N is at least 1.
      end: the time when the last one ends.
      unit: seconds; None where nothing is known about times: `starts` are 0, 1, 2, ...
      read: gives the pictures with the indices asked for, which have to increase.
    """

    starts: Int64[np.ndarray, " N"]
    end: int
    unit: Fraction | None
    read: Callable[[Sequence[int]], Iterator[Any]]


class _Packets(NamedTuple):
    """What the packets of a video stream say about its frames."""

    starts: Int64[np.ndarray, " N"]
    end: int
    unit: Fraction
    keyframes: Int64[np.ndarray, " K"]  # the times of those that need no other to be decoded
    counted: bool  # whether frames are found by counting, not by their time


# The functions below raise BadVideo with a message that continues after the video's name.
@contextlib.contextmanager
def open_video(file: Any, max_pixels: int) -> Iterator[Frames]:
    """Opens a video file.

    Its frames can be read inside of the context. They are uint8[height, width, 3], upright.

    Args:
      file: a path, the bytes of a file, or an open file.
      max_pixels: a video with larger frames is refused, undecoded.

    Raises:
      BadVideo: the file is no video or is damaged; also while frames are read.
      ValueError: PyAV is not installed.
    """
    with contextlib.ExitStack() as opened:
        if isinstance(file, bytes):
            file = io.BytesIO(file)
        elif not hasattr(file, "read"):
            # By ourselves: FFmpeg would take "http://..." or "concat:..." for more than a name.
            try:
                file = opened.enter_context(open(file, "rb"))
            except (OSError, ValueError) as error:
                raise BadVideo(f"cannot be read: {error}", "missing file") from error
        if not file.seek(0, io.SEEK_END):
            raise BadVideo("is empty, expected a video file", "empty")
        if has_lost_index(file):
            raise BadVideo("has lost the index of its streams (moov): is it cut?", "no video")
        if is_cut(file):
            raise BadVideo("is truncated: it ends before its headers say", "truncated")
        with _decoding_errors(), _container(file, max_pixels) as (container, stream):
            packets = _packets(container, stream)

            def read(wanted: Sequence[int]) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
                with _decoding_errors():
                    yield from _read(file, max_pixels, container, stream, packets, wanted)

            yield Frames(packets.starts, packets.end, packets.unit, read)


@contextlib.contextmanager
def _decoding_errors() -> Iterator[None]:
    """Turns PyAV's errors into BadVideo."""
    av = import_av()
    try:
        yield
    except av.FFmpegError as error:
        raise BadVideo(f"is corrupt or no video: {error.strerror}", "corrupt") from error


def import_av() -> Any:
    """Imports PyAV, which is an optional package; raises ValueError without it."""
    try:
        import av
    except ImportError as error:
        raise ValueError(
            "videos are read by PyAV, which is not installed: pip install 'mammut-jax[video]'"
        ) from error
    return av


@contextlib.contextmanager
def _container(file: Any, max_pixels: int) -> Iterator[tuple[Any, Any]]:
    """Opens a file for decoding: PyAV's container and its first video stream."""
    av = import_av()
    file.seek(0)
    limit = {"max_pixels": str(max_pixels)}  # twice: FFmpeg decodes when it opens a file, too
    options = limit | {"format_whitelist": _FORMATS}
    # Titles need not be UTF-8.
    with av.open(file, options=options, metadata_errors="replace") as container:
        covers = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & covers]
        if not streams:
            kinds = ", ".join({stream.type for stream in container.streams}) or "nothing"
            raise BadVideo(f"has no video stream, but {kinds}", "no video")
        stream = streams[0]
        if stream.codec_context is None:
            raise BadVideo("has a video stream of an unknown codec", "unsupported")
        if stream.width * stream.height > max_pixels:
            raise BadVideo(
                f"has frames of {stream.width} x {stream.height} pixels, more than "
                f"max_image_pixels {max_pixels}",
                "oversized",
            )
        # The reader's own threads are enough, and FFmpeg's have been seen to hang beside others.
        stream.thread_type = "NONE"
        # Damage is an error, not a guess at what the picture may have been.
        stream.codec_context.options = limit | {"err_detect": "explode"}
        yield container, stream


def _packets(container: Any, stream: Any) -> _Packets:
    """Reads all packets of a file, undecoded."""
    times, durations, keyframes = [], [], []
    count = 0
    # Of each stream its unit, first start and last end, in units: fractions take half of the time.
    spans: dict[int, tuple[Fraction, int, int]] = {}
    for packet in container.demux():
        if not packet.size:
            continue
        index, start, duration = packet.stream_index, packet.pts, packet.duration or 0
        if start is not None:
            unit, first, last = spans.get(index) or (packet.time_base, start, start)
            spans[index] = unit, min(first, start), max(last, start + duration)
        if index != stream.index:
            continue
        count += 1
        # An edit list may hide frames that others need.
        if packet.is_discard:
            continue
        times.append(start)
        durations.append(duration)
        if packet.is_keyframe:
            keyframes.append(start)
    first = min((unit * first for unit, first, _ in spans.values()), default=None)
    last = max((unit * last for unit, _, last in spans.values()), default=None)
    _require_all(container, stream, count, first, last)
    if not times:
        raise BadVideo("has no frames", "empty")
    if None in times:
        rate = stream.average_rate or stream.guessed_rate or 25
        starts = np.arange(len(times), dtype=np.int64)
        return _Packets(starts, len(times), 1 / Fraction(rate), starts[:0], counted=True)
    counted = container.format.name in _WITHOUT_TIMES
    order = np.argsort(times, kind="stable")
    starts = np.array(times, np.int64)[order]
    # Webm has no duration of its last frame.
    duration = durations[order[-1]] or int(np.median(np.diff(starts))) if len(starts) > 1 else 1
    duration = max(1, duration)
    end = int(starts[-1]) + duration
    if not counted:
        starts = np.unique(starts)
    return _Packets(starts, end, stream.time_base, np.unique(keyframes), counted)


def _require_all(
    container: Any, stream: Any, count: int, first: Fraction | None, last: Fraction | None
) -> None:
    """Checks that no packets are missing, as far as the header counts them.

    Raises:
      BadVideo: packets are missing.
    """
    if container.format.name.startswith("mov"):
        if count < stream.frames:
            raise BadVideo(
                f"is truncated: {count} of its {stream.frames} frames are there", "truncated"
            )
    elif container.duration and first is not None:
        stated = container.duration / 1_000_000
        missing = stated - float(last - min(first, 0))
        if missing > max(_MISSING_SECONDS, _MISSING_SHARE * stated):
            raise BadVideo(f"is corrupt: the last {missing:.1f} of its {stated:.1f} s", "corrupt")


def _read(
    file: Any,
    max_pixels: int,
    container: Any,
    stream: Any,
    packets: _Packets,
    wanted: Sequence[int],
) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """Reads frames by their indices.

    Where seeking fails it goes on from the start: the index of a file may be wrong or absent, and
    what comes after some keyframes needs frames before them.
    """
    positions = list(wanted) if packets.counted else packets.starts[list(wanted)].tolist()
    done = 0
    if not packets.counted and len(packets.keyframes):
        with contextlib.suppress(import_av().FFmpegError, BadVideo):
            for picture in _sought(container, stream, packets.keyframes, positions):
                yield picture
                done += 1
        if done == len(positions):
            return
    with _container(file, max_pixels) as (container, stream):
        decoded = container.decode(stream)
        placed = enumerate(decoded) if packets.counted else _timed(decoded)
        yield from _picked(placed, positions[done:])


def _sought(
    container: Any, stream: Any, keyframes: Int64[np.ndarray, " K"], times: Sequence[int]
) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """Reads frames by their times, with a seek wherever a keyframe lies between them."""
    before = np.maximum(np.searchsorted(keyframes, times, "right") - 1, 0)
    for keyframe, group in itertools.groupby(
        zip(keyframes[before].tolist(), times, strict=True), key=lambda pair: pair[0]
    ):
        container.seek(keyframe, stream=stream)
        decoded = _timed(container.decode(stream))
        yield from _picked(decoded, [time for _, time in group])


def _timed(decoded: Iterator[Any]) -> Iterator[tuple[int, Any]]:
    return ((frame.pts, frame) for frame in decoded if frame.pts is not None)


def _picked(
    placed: Iterator[tuple[int, Any]], positions: Sequence[int]
) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """Makes pictures of the frames at some positions, which increase.

    Some packets give no frame, such as those that say that nothing has changed: the last frame
    before is still shown.

    Args:
      placed: the decoded frames, each with its position: its time, or its index.
    """
    left = collections.deque(positions)
    shown = None
    for position, frame in placed:
        while left and left[0] < position:
            if shown is None:
                raise BadVideo("is corrupt: its first frames cannot be decoded", "corrupt")
            yield _picture(shown)
            left.popleft()
        shown = frame
        if left and left[0] == position:
            yield _picture(frame)
            left.popleft()
        if not left:
            return
    raise BadVideo("is truncated: its last frames cannot be decoded", "truncated")


def _picture(frame: Any) -> UInt8[np.ndarray, "height width 3"]:
    """Converts a decoded frame and turns it upright."""
    if frame.is_corrupt:
        raise BadVideo("is corrupt: a frame is damaged", "corrupt")
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
