"""Drawn scenes with exact captions, for first runs and tests.

A scene shows a combination of five attributes ("two small red circles on the left"). A sixth of the
combinations is held out: the scenes of split "train" never show one of them, and the scenes of
split "val" show each of them once. A model that only remembers whole captions, and does not connect
words with the image, therefore fails on "val".
"""

import functools
import hashlib
import itertools
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

from mammut.data.examples import Example, Question, Source, SourceOptions

Split = Literal["train", "val"]

TRAIN_SCENES = 100_000

_COUNTS = {1: "one", 2: "two", 3: "three"}
_SIZES = {"small": 0.17, "large": 0.28}  # width of a shape as a share of the image's
COLOURS = {
    "red": (215, 35, 35),
    "green": (35, 160, 50),
    "blue": (40, 70, 225),
    "yellow": (240, 220, 40),
    "white": (245, 245, 245),
    "black": (12, 12, 12),
}
SHAPES = {  # corners in [-1, 1], y down; the circle has none
    "circle": (),
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "triangle": ((0.0, -1.0), (1.0, 0.9), (-1.0, 0.9)),
    "cross": (
        *((-0.36, -1.0), (0.36, -1.0), (0.36, -0.36), (1.0, -0.36), (1.0, 0.36), (0.36, 0.36)),
        *((0.36, 1.0), (-0.36, 1.0), (-0.36, 0.36), (-1.0, 0.36), (-1.0, -0.36), (-0.36, -0.36)),
    ),
}
_PLACES = {  # the words, the axis that the place fixes (0: x, 1: y), the centre on it
    "left": ("on the left", 0, 0.25),
    "right": ("on the right", 0, 0.75),
    "top": ("at the top", 1, 0.25),
    "bottom": ("at the bottom", 1, 0.75),
}


class Combination(NamedTuple):
    """The attributes that a scene shows."""

    count: int
    size: str
    colour: str
    shape: str
    place: str


def captions(combination: Combination) -> list[str]:
    """Writes all captions of a combination: three sentences of the same content."""
    count, size, colour, shape, place = combination
    plural = ""
    if count > 1:
        plural = "es" if shape == "cross" else "s"
    things = f"{_COUNTS[count]} {size} {colour} {shape}{plural}"
    where = _PLACES[place][0]
    return [f"{things} {where}", f"{where} {things}", f"a picture of {things} {where}"]


def questions(combination: Combination) -> list[tuple[str, str]]:
    """Writes five questions and answers, one for each attribute."""
    count, size, colour, shape, place = combination
    return [
        ("how many shapes are there?", _COUNTS[count]),
        ("are they small or large?", size),
        ("what color is it?", colour),
        ("what shape is it?", shape),
        ("where in the picture is it?", place),
    ]


@functools.cache
def combinations(split: Split) -> tuple[Combination, ...]:
    """Lists all combinations of a split.

    Their order and the division into splits never change.
    """
    every = itertools.starmap(
        Combination, itertools.product(_COUNTS, _SIZES, COLOURS, SHAPES, _PLACES)
    )
    mixed = sorted(
        every, key=lambda combination: hashlib.sha256(captions(combination)[0].encode()).digest()
    )
    held_out = len(mixed) // 6
    return tuple(mixed[:held_out] if split == "val" else mixed[held_out:])


def num_scenes(split: Split) -> int:
    """Returns the number of scenes of a split.

    "train" has 100,000, "val" has one for each combination that is held out.
    """
    return len(combinations("val")) if split == "val" else TRAIN_SCENES


def combination(split: Split, index: int) -> Combination:
    """Returns the combination that scene `index` of the split shows."""
    return _scene(split, index)[0]


def draw(split: Split, index: int, image_size: int) -> UInt8[np.ndarray, "image_size image_size 3"]:
    """Draws scene `index` of the split.

    The same arguments give the same pixels everywhere; another `image_size` gives the same scene.

    Returns:
      RGB, uint8[image_size, image_size, 3].
    """
    from PIL import Image, ImageDraw

    (count, size, colour, shape, place), rng = _scene(split, index)
    _, axis, centre = _PLACES[place]
    side = image_size * 4  # drawn large and averaged, for smooth edges

    background = rng.integers(95, 150) + rng.integers(-8, 9, size=3)
    canvas = Image.new("RGB", (side, side), tuple(background.tolist()))
    pen = ImageDraw.Draw(canvas)
    # The objects stand in a row along the half of the image that `place` names, in cells of a third
    # of its length. The row is centred, so that one object "on the left" is not also "at the top".
    row_shift = rng.uniform(-0.1, 0.1) if count < 3 else 0.0
    for k in range(count):
        radius = _SIZES[size] * rng.uniform(0.94, 1.0) / 2
        slack = min(1 / 6 - radius - 0.025, 0.03)  # neighbours stay a pixel apart at 32 pixels
        along = 0.5 + (k - (count - 1) / 2) / 3 + row_shift + rng.uniform(-slack, slack)
        across = centre + rng.uniform(-0.1, 0.1)
        x, y = (across, along) if axis == 0 else (along, across)
        fill = tuple(
            np.clip(np.add(COLOURS[colour], rng.integers(-10, 11, size=3)), 0, 255).tolist()
        )
        if corners := SHAPES[shape]:
            pen.polygon(
                [((x + radius * dx) * side, (y + radius * dy) * side) for dx, dy in corners],
                fill=fill,
            )
        else:
            pen.ellipse(
                [
                    (x - radius) * side,
                    (y - radius) * side,
                    (x + radius) * side,
                    (y + radius) * side,
                ],
                fill=fill,
            )
    image = np.asarray(canvas.reduce(4), dtype=np.int16)
    noise = rng.integers(-6, 7, size=image.shape, dtype=np.int16)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def _scene(split: Split, index: int) -> tuple[Combination, np.random.Generator]:
    """Returns the combination of a scene and its random generator.

    The generator gives the numbers that decide the rest of the scene.
    """
    rng = np.random.default_rng([("train", "val").index(split), index])
    choices = combinations(split)
    if split == "train":
        index = rng.integers(len(choices))
    return choices[index], rng


class SyntheticSource(Source):
    """The drawn scenes of a split, `synthetic:train` or `synthetic:val`."""

    def __init__(self, options: SourceOptions):
        self._split: Split = options.name
        self._image_size = options.image_size
        self._field = options.field

    def __len__(self) -> int:
        return num_scenes(self._split)

    def __getitem__(self, index: int) -> Example:
        return self._example(index, draw(self._split, index, self._image_size))

    def pairs(self, index: int) -> list[tuple[str, str]]:
        return self._example(index, None).pairs

    def _example(self, index: int, image: Any) -> Example:
        key = f"synthetic:{self._split} {index}"
        shown = combination(self._split, index)
        if self._field == "captions":
            return Example(image, captions(shown), key)
        if self._field == "name":
            return Example(image, [], key, name=shown.shape)
        qa = [
            Question(text, [answer], f"{key}#{number}")
            for number, (text, answer) in enumerate(questions(shown))
        ]
        return Example(image, [], key, qa)
