"""Drawn shapes that move, to tell whether a model sees motion.

A clip shows a combination of five attributes: a shape, its first and its last colour, a direction
and a speed ("a red circle turns blue and moves left slowly"). It moves on a torus: what leaves the
picture on one side comes in on the other, from a start anywhere. So a single frame says nothing of
direction and speed, whichever frame it is. The colour changes in the first half of a clip as often
as in the second, and as long from its middle: neither the frame in the middle nor all frames
without their order tell which colour came first.

A sixth of the combinations is held out, as in `mammut.data.synthetic`: the clips of split "train"
never show one of them, and the clips of split "val" show each of them once.
"""

import functools
import hashlib
import itertools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from mammut.data.examples import Example, Question, Source, SourceOptions
from mammut.data.synthetic import COLOURS, SHAPES, Split

TRAIN_CLIPS = 100_000
NUM_FRAMES = 16
# Frames that have the first colour. The middle is 8.
_CHANGES = (5, 6, 7, 9, 10, 11)

_DIRECTIONS = {  # steps down and across
    "left": (0, -1),
    "right": (0, 1),
    "up": (-1, 0),
    "down": (1, 0),
}
_SPEEDS = {"slowly": 0.02, "fast": 0.0625}  # a frame, as a share of the image's side
# The square of the drawn scenes has the area of the circle: in so small a picture its corners are
# all that tells them apart, and a model that sees motion took one for the other half of the time.
_CORNERS = SHAPES | {"square": ((-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0))}
_RADIUS = 0.25  # of a shape: the paper's tubes see a tenth of the pixels, and miss a small one
_FINE = 4  # a picture is drawn so many times larger and averaged, for smooth edges


class Combination(NamedTuple):
    """The attributes that a clip shows."""

    shape: str
    first: str  # colour
    last: str  # colour
    direction: str
    speed: str


def captions(combination: Combination) -> list[str]:
    """Writes all captions of a combination: two sentences of the same content."""
    shape, first, last, direction, speed = combination
    return [
        f"a {first} {shape} turns {last} and moves {direction} {speed}",
        f"moving {direction} {speed}, a {first} {shape} turns {last}",
    ]


def questions(combination: Combination) -> list[tuple[str, str, str]]:
    """Writes questions and answers, one for each attribute, with the attribute's name first."""
    shape, first, last, direction, speed = combination
    return [
        ("direction", "which way does it move?", direction),
        ("speed", "does it move slowly or fast?", speed),
        ("first color", "which color comes first?", first),
        ("last color", "which color comes last?", last),
        ("shape", "what shape is it?", shape),
    ]


@functools.cache
def combinations(split: Split) -> tuple[Combination, ...]:
    """Lists all combinations of a split.

    Their order and the division into splits never change.
    """
    attributes = itertools.product(SHAPES, COLOURS, COLOURS, _DIRECTIONS, _SPEEDS)
    every = itertools.starmap(Combination, attributes)
    mixed = sorted(
        (combination for combination in every if combination.first != combination.last),
        key=lambda combination: hashlib.sha256(captions(combination)[0].encode()).digest(),
    )
    held_out = len(mixed) // 6
    return tuple(mixed[:held_out] if split == "val" else mixed[held_out:])


def combination(split: Split, index: int) -> Combination:
    """Returns the combination that clip `index` of the split shows."""
    return _scene(split, index)[0]


def draw(
    split: Split, index: int, image_size: int
) -> UInt8[np.ndarray, "16 image_size image_size 3"]:
    """Draws clip `index` of the split.

    The same arguments give the same pixels everywhere.

    Returns:
      RGB, uint8[16, image_size, image_size, 3].
    """
    (shape, first, last, direction, speed), rng = _scene(split, index)
    background = rng.integers(95, 150) + rng.integers(-8, 9, size=3)
    start = rng.random(2)
    change = rng.choice(_CHANGES)
    colours = np.array([COLOURS[first]] * change + [COLOURS[last]] * (NUM_FRAMES - change))
    # Quarters of a pixel: the shape is drawn once for each of them, and shifted by whole pixels.
    steps = np.rint(path(start, direction, speed) * image_size * _FINE).astype(int)
    pixels, quarters = divmod(steps, _FINE)
    rows, columns = ((np.arange(image_size) - axis[:, None]) % image_size for axis in pixels.T)
    down, across = quarters.T[:, :, None, None]
    share = _covers(shape, image_size)[down, across, rows[:, :, None], columns[:, None, :]]
    shown = background + share[..., None] * (colours[:, None, None] - background)
    frames = np.rint(shown).astype(np.int16)
    frames += rng.integers(-6, 7, size=frames.shape, dtype=np.int16)
    return np.clip(frames, 0, 255).astype(np.uint8)


def path(start: Float[np.ndarray, "2"], direction: str, speed: str) -> Float[np.ndarray, "16 2"]:
    """Computes where the shape is in each frame: down and across, as shares of the side.

    It is the place on the torus, 0 to 1.
    """
    step = np.array(_DIRECTIONS[direction]) * _SPEEDS[speed]
    return (start + np.arange(NUM_FRAMES)[:, None] * step) % 1


@functools.cache
def _covers(shape: str, image_size: int) -> Float[np.ndarray, "4 4 image_size image_size"]:
    """Draws a shape around the corner of a torus: 1 inside, 0 outside, shares at its edges.

    There is a picture for each shift by quarters of a pixel, down and across.
    """
    from PIL import Image, ImageDraw

    side = image_size * _FINE
    canvas = Image.new("L", (side, side))
    pen = ImageDraw.Draw(canvas)
    middle = side / 2
    radius = _RADIUS * side
    if corners := _CORNERS[shape]:
        pen.polygon([(middle + radius * x, middle + radius * y) for x, y in corners], fill=1)
    else:
        pen.ellipse((middle - radius, middle - radius, middle + radius, middle + radius), fill=1)
    cover = np.roll(np.asarray(canvas, np.float32), (-(side // 2), -(side // 2)), (0, 1))
    shifts = itertools.product(range(_FINE), repeat=2)
    shifted = np.stack([np.roll(cover, shift, (0, 1)) for shift in shifts])
    means = shifted.reshape(-1, image_size, _FINE, image_size, _FINE).mean((2, 4))
    return means.reshape(_FINE, _FINE, image_size, image_size)


def _scene(split: Split, index: int) -> tuple[Combination, np.random.Generator]:
    """Returns the combination of a clip and its random generator.

    The generator gives the numbers that decide the rest of the clip.
    """
    rng = np.random.default_rng([("train", "val").index(split), index])
    choices = combinations(split)
    if split == "train":
        index = rng.integers(len(choices))
    return choices[index], rng


class MovingSource(Source):
    """The clips of a split, `moving:train` or `moving:val`."""

    def __init__(self, options: SourceOptions):
        self._split: Split = options.name
        self._image_size = options.image_size
        self._field = options.field

    def __len__(self) -> int:
        return len(combinations("val")) if self._split == "val" else TRAIN_CLIPS

    def __getitem__(self, index: int) -> Example:
        return self._example(index, draw(self._split, index, self._image_size))

    def pairs(self, index: int) -> list[tuple[str, str]]:
        return self._example(index, None).pairs

    def _example(self, index: int, video: Any) -> Example:
        key = f"moving:{self._split} {index}"
        shown = combination(self._split, index)
        if self._field == "captions":
            return Example(video, captions(shown), key)
        if self._field == "name":
            return Example(video, [], key, name=shown.direction)
        qa = [
            Question(text, [answer], f"{key}#{number}", question_type=kind)
            for number, (kind, text, answer) in enumerate(questions(shown))
        ]
        return Example(video, [], key, qa)
