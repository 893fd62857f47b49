"""The pictures of a report, as data URIs.

They are examples of a source, maps of attention, and curves.
"""

import base64
import contextlib
import dataclasses
import functools
import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from mammut.data.images import ImageTransform
from mammut.data.sources import open_source
from mammut.data.video import VideoTransform
from mammut.evaluation.predictions import Predictions
from mammut.evaluation.scoring import EVALUATIONS
from mammut.models.mammut import ModelConfig
from mammut.pages.word_maps import overlay, word_maps
from mammut.training.config import TrainConfig
from mammut.training.run_folder import read_run
from mammut.weights import model_folder
from mammut.weights.formats.mammut_run import RUN_FILE

_PICTURE = 160  # pixels of the longer side of a picture
_MAP = 96  # pixels of the side of a heat map
_FRAMES = 4  # of a video that are shown at most
_FRAME = 96  # pixels of the longer side of a frame
_GAP = 2  # grey pixels between frames
_BUDGET = 2_200_000  # characters of all pictures in a page
# Colours that can be read on white and on black.
_GREY = "#7d828a"
_COLOURS = ("#2f81d6", "#d9730d", "#2c9a61", "#a05cc9", "#c23b53", "#8a7b1f")


def folder_config(folder: pathlib.Path) -> TrainConfig | ModelConfig:
    """Reads the config of a run, or of a model.

    The model's config is read where the folder holds no run.

    Raises:
      ValueError: there is neither, or it cannot be read.
    """
    if (folder / RUN_FILE).is_file():
        return read_run(folder)[0]
    return model_folder.read_model_config(folder)


class Album:
    """The pictures of a page, and the models that it loaded.

    All pictures share the page's budget of characters.
    """

    def __init__(self):
        self._left = _BUDGET
        self.left_out = 0
        self.load = functools.cache(model_folder.load)

    def uri(self, pixels: UInt8[np.ndarray, "height width 3"]) -> str | None:
        """Encodes a picture as a JPEG data URI.

        Returns None where the page is full; `left_out` counts these pictures.
        """
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=80)
        uri = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        if len(uri) > self._left:
            self.left_out += 1
            return None
        self._left -= len(uri)
        return uri


class Pictures:
    """The pictures of one predictions file.

    They are read by `index` from the source that the file names. `folder` holds the model. The page
    is about the predictions, so no error with a picture or the model is raised: `notices` lists
    them.
    """

    def __init__(self, predictions: Predictions, folder: pathlib.Path, album: Album):
        self._folder = folder
        self._album = album
        self._source = None
        self._thumbnails: dict[int, np.ndarray | None] = {}
        self._missing: list[str] = []
        self._problems: list[str] = []
        self._blind = predictions.settings.get("blind", False)
        self._frames = predictions.settings.get("frames")
        tfds_dir = None
        # An unreadable folder is reported where the page describes the model, and where the model
        # runs.
        with contextlib.suppress(ValueError):
            config = folder_config(folder)
            if isinstance(config, TrainConfig):
                tfds_dir = config.data.tfds_dir
        try:
            field = EVALUATIONS[predictions.task].field
            # A drawn scene is the same scene at any size.
            size = predictions.settings.get("image_size", _PICTURE)
            self._source = open_source(
                predictions.data,
                image_size=size,
                tfds_dir=tfds_dir,
                field=field,
                video=self.has_videos,
            )
        except Exception as error:  # what tensorflow-datasets raises is not known
            self._problems.append(f"The pictures cannot be shown: {error}.")

    @property
    def has_videos(self) -> bool:
        """Whether the examples are videos."""
        return self._frames is not None

    @property
    def notices(self) -> list[str]:
        """Pictures that could not be shown, and why, in sentences."""
        if not self._missing:
            return self._problems
        count = len(self._missing)
        missing = f"Pictures that cannot be shown: {count}. The first: {self._missing[0]}."
        return [*self._problems, missing]

    def thumbnail(self, record: Mapping[str, Any]) -> str | None:
        """Makes the data URI of a record's picture, or of frames of its video, side by side.

        A picture has at most 160 pixels a side, a frame 96. The result is None where the record has
        no picture.
        """
        pixels = self._pixels(record)
        return None if pixels is None else self._album.uri(pixels)

    def word_maps(self, records: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
        """Makes `word`, `picture` and `peak` for each word of each prediction.

        `picture` shows where the model looked, `peak` is the largest weight of a patch as a
        multiple of an even share. The colours of one caption have one scale.
        """
        usable = [row for row, record in enumerate(records) if self._pixels(record) is not None]
        words: list[list[dict[str, Any]]] = [[] for _ in records]
        if self._blind:
            self._problems.append(
                "There are no heat maps: the model was shown black pictures in place of these."
            )
        if self.has_videos:
            self._problems.append("There are no heat maps: the model was shown videos.")
        if self._blind or self.has_videos or not usable:
            return words
        try:
            model, processor = self._album.load(self._folder)
            images = [self._image(records[row]) for row in usable]
            texts = [records[row]["prediction"] for row in usable]
            maps = word_maps(model, processor, images, texts)
        except Exception as error:  # Orbax and XLA have errors of their own
            self._problems.append(
                f"There are no heat maps, because the model cannot be used: {error}."
            )
            return words
        # The picture as the model sees it, at the size of the page.
        view = dataclasses.replace(processor.image, image_size=_MAP)
        covered = model.config.vision.covered_size / model.config.vision.image_size
        for row, image, maps_of_words in zip(usable, images, maps):
            pixels = view(image)
            full = max((float(weights.max()) for _, weights in maps_of_words), default=0.0)
            for word, weights in maps_of_words:
                uri = self._album.uri(overlay(pixels, weights, full, covered))
                words[row].append(
                    {"word": word, "picture": uri, "peak": float(weights.max()) * weights.size}
                )
        return words

    def _pixels(self, record: Mapping[str, Any]) -> np.ndarray | None:
        index = record.get("index")
        if self._source is None or index is None:
            return None
        if index not in self._thumbnails:
            try:
                image = self._image(record)
                picture = self._strip(image) if self.has_videos else _shrunk(image, _PICTURE)
                self._thumbnails[index] = np.asarray(picture)
            except Exception as error:  # a source may raise anything
                self._thumbnails[index] = None
                self._missing.append(str(error))
        return self._thumbnails[index]

    def _strip(self, video: Any) -> Any:
        """Puts frames of a video side by side, in order: a Pillow image.

        They are evenly spaced, and no more than the model was shown.
        """
        from PIL import Image

        transform = VideoTransform(min(_FRAMES, self._frames))
        shrink = functools.partial(_shrunk, side=_FRAME)
        frames = transform.map(video, shrink, ImageTransform.max_image_pixels)
        frames = list({id(frame): frame for frame in frames}.values())  # a repeated one is one
        width = sum(frame.width + _GAP for frame in frames) - _GAP
        strip = Image.new("RGB", (width, max(frame.height for frame in frames)), "grey")
        left = 0
        for frame in frames:
            strip.paste(frame, (left, 0))
            left += frame.width + _GAP
        return strip

    def _image(self, record: Mapping[str, Any]) -> Any:
        index = record["index"]
        key = record["key"]
        if not 0 <= index < len(self._source):
            raise ValueError(f"{self._source.spec} has no example {index}")
        example = self._source[index]
        if example.key != key:  # the wrong picture would be worse than none
            raise ValueError(
                f"example {index} of {self._source.spec} is now {example.key}, it was {key}"
            )
        return example.image


def _shrunk(image: Any, side: int) -> Any:
    """Reads an image as a Pillow image of at most `side` pixels a side."""
    picture = ImageTransform(side).read(image).copy()
    picture.thumbnail((side, side))
    return picture


def curves(
    series: Mapping[str, tuple[Sequence[int], Sequence[float]]], *, share: bool = False
) -> str:
    """Draws values over steps, as the data URI of an SVG.

    The picture can be read on white and on black.

    Args:
      series: the steps and values of each name; a value that is not finite leaves a gap.
      share: the values are shares, shown in percent.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(5.2, 2.7), layout="constrained")
    axes = figure.subplots()
    for number, (name, (steps, values)) in enumerate(series.items()):
        values = [value if math.isfinite(value) else math.nan for value in values]
        axes.plot(
            steps,
            values,
            label=name,
            color=_COLOURS[number % len(_COLOURS)],
            linestyle=("-", "--", ":", "-.")[number % 4],
            marker="o" if len(steps) < 12 else None,
            markersize=3.5,
        )
    axes.set_xlabel("step", color=_GREY)
    axes.tick_params(colors=_GREY)
    axes.grid(color=_GREY, alpha=0.25)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_GREY)
    if share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(bottom=0)
    if len(series) > 1:
        figure.legend(
            loc="outside upper left",
            ncols=3 if len(series) == 3 else 2,
            frameon=False,
            labelcolor=_GREY,
        )
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "mammut"}):  # the same curves give the same bytes
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()
