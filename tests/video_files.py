"""Video files that tests make with PyAV."""

import fractions
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

MARKS = 8  # bits of the number that each frame shows


def marked(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A frame that shows its number as columns of black and white, the lowest bit on the left."""
    frame = np.zeros((height, width, 3), np.uint8)
    for bit in range(MARKS):
        frame[:, bit * width // MARKS : (bit + 1) * width // MARKS] = 255 * (number >> bit & 1)
    return frame


def number_of(frame: np.ndarray) -> int:
    """The number that a frame of `marked` shows, at any size."""
    width = frame.shape[1]
    middle = frame[frame.shape[0] // 2, :, 1]
    columns = [int(width * (bit + 0.5) / MARKS) for bit in range(MARKS)]
    return sum(1 << bit for bit, column in enumerate(columns) if middle[column] > 127)


def video_file(
    frames: int | Sequence[np.ndarray] = 20,
    *,
    format: str = "mp4",
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rate: int = 10,
    times: Sequence[int] | None = None,
    sound: bool = False,
    rotation: int | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> bytes:
    """Encodes frames, by default those of `marked`.

    `times` are the times of the frames in hundredths of a second.
    """
    import av

    if isinstance(frames, int):
        frames = [marked(number) for number in range(frames)]
    with tempfile.TemporaryDirectory() as folder:  # "faststart" opens the file again
        path = pathlib.Path(folder) / "video"
        with av.open(path, "w", format=format, options=container_options or {}) as container:
            audio = container.add_stream("aac", rate=16000) if sound else None
            if len(frames):
                stream = container.add_stream(codec, rate=rate, options=options or {})
                stream.height, stream.width = frames[0].shape[:2]
                stream.pix_fmt = pix_fmt
                stream.codec_context.thread_count = 1
                if times is not None:
                    stream.codec_context.time_base = fractions.Fraction(1, 100)
                if rotation is not None:
                    if not hasattr(stream, "set_display_rotation"):
                        pytest.skip("this PyAV is too old to write a rotation")
                    stream.set_display_rotation(rotation)
                _encode(container, stream, frames, times)
            if audio is not None:
                for _ in range(30):
                    silence = np.zeros((1, 1024), np.float32)
                    part = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
                    part.sample_rate = 16000
                    container.mux(audio.encode(part))
                container.mux(audio.encode())
        return path.read_bytes()


def _encode(container: Any, stream: Any, frames: Sequence[np.ndarray], times: Any) -> None:
    import av

    for number, frame in enumerate(frames):
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        if times is not None:
            picture.pts, picture.time_base = times[number], fractions.Fraction(1, 100)
        container.mux(stream.encode(picture))
    container.mux(stream.encode())


def save(folder: pathlib.Path, name: str, **settings: Any) -> pathlib.Path:
    """Writes `video_file` into a folder; the format follows from the name."""
    path = folder / name
    format = {"mkv": "matroska", "ts": "mpegts"}.get(path.suffix[1:], path.suffix[1:])
    path.write_bytes(video_file(format=format, **settings))
    return path
