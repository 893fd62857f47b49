"""How long a video takes: to decode, to read, to encode and to caption."""

import itertools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8

from mammut.data.images import ImageTransform
from mammut.data.video import VideoTransform
from mammut.data.video_reader import import_av
from mammut.generation.search import GenerateConfig
from mammut.models.mammut import EncodedImage, MaMMUT
from mammut.performance.generation_time import cached, compiled_loop
from mammut.performance.timing import summary

_FRAMES_PER_SECOND = 30
_BLOCK = 8  # pixels


def make_clip(
    path: str | os.PathLike, frames: int = 300, height: int = 240, width: int = 320
) -> None:
    """Writes an H.264 video of 30 frames a second: coloured blocks that slide.

    Raises:
      ValueError: PyAV is not installed.
    """
    av = import_av()
    rows, columns = height // _BLOCK + 1, width // _BLOCK + 1
    colours = np.random.default_rng(0).integers(0, 256, (rows, columns, 3), np.uint8)
    picture = colours.repeat(_BLOCK, 0).repeat(_BLOCK, 1)
    with av.open(os.fspath(path), "w") as container:
        stream = container.add_stream("libx264", rate=_FRAMES_PER_SECOND)
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            shifted = np.roll(picture, (number, 2 * number), (0, 1))[:height, :width]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(shifted), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def measure_reading(
    videos: Sequence[Any], transform: VideoTransform, image: ImageTransform, calls: int
) -> list[dict[str, Any]]:
    """Measures how fast videos are read, in this thread alone.

    Args:
      videos: anything that `transform` reads. A call reads all of them.
      transform: chooses the frames.
      image: makes the arrays of the frames.
      calls: calls that are timed.

    Returns:
      Two rows: `decoded`, the frames as arrays of full size; and `read`, the same and resized.
    """

    def decode() -> None:
        for video in videos:
            transform.map(video, lambda frame: None, image.max_image_pixels)

    def read() -> None:
        for video in videos:
            transform(video, image)

    work = {"decoded": decode, "read": read}
    return [{"work": name, **_timed(call, calls, len(videos))} for name, call in work.items()]


def batch_of(
    videos: Sequence[Any], transform: VideoTransform, image: ImageTransform, batch_size: int
) -> UInt8[np.ndarray, "B T height width 3"]:
    """Reads a batch of videos; where there are fewer, they are repeated."""
    read = [transform(video, image) for video in videos[:batch_size]]
    return np.stack([*itertools.islice(itertools.cycle(read), batch_size)])


def measure_encoding(
    model: MaMMUT, video: UInt8[jax.Array, "B T height width 3"], calls: int
) -> dict[str, Any]:
    """Measures how fast a batch of videos is encoded, on the devices."""
    no_text = jnp.zeros((len(video), 1), jnp.int32)
    call, compile_s = compiled_loop(_encode, model, video, no_text, GenerateConfig())
    row = {"work": "encoded", "batch": len(video), "compile_s": compile_s}
    return row | _timed(call, calls, len(video))


def measure_captioning(
    model: MaMMUT,
    video: UInt8[jax.Array, "B T height width 3"],
    start: Int[jax.Array, "B 1"],
    config: GenerateConfig,
    calls: int,
) -> dict[str, Any]:
    """Measures how fast a batch of videos is encoded and captioned, on the devices.

    The texts start with `start`, and none ends early.
    """
    call, compile_s = compiled_loop(cached, model, video, start, config)
    row = {"work": "captioned", "batch": len(video), "beams": config.num_beams}
    return row | {"compile_s": compile_s} | _timed(call, calls, len(video))


def _encode(
    model: MaMMUT, video: jax.Array, start: jax.Array, config: GenerateConfig
) -> EncodedImage:
    """Encodes videos for both passes; `start` and `config` are those of a loop, not needed."""
    return model.image_tokens(video)


def _timed(call: Callable[[], Any], calls: int, clips: int) -> dict[str, Any]:
    """Times calls by the clock and in this process's CPU time, after one that is not timed.

    The CPU time is that of all threads. Other programs on the machine change it less than the time
    by the clock.

    Returns:
      What `summary` returns for `clips`, `cpu_ms` of a clip and `all_cpu_seconds`.
    """
    call()
    seconds, cpu_seconds = [], []
    for _ in range(calls):
        began = time.perf_counter()
        cpu_began = time.process_time()
        call()
        cpu_seconds.append(time.process_time() - cpu_began)
        seconds.append(time.perf_counter() - began)
    cpu_ms = 1000 * float(np.median(cpu_seconds)) / clips
    return {**summary(seconds, clips), "cpu_ms": cpu_ms, "all_cpu_seconds": cpu_seconds}
