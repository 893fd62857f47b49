"""How what a video model has beside an image model starts from the image model."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from mammut.models.mammut import ModelConfig
from mammut.weights.opened import OpenedModel
from mammut.weights.resample import find_resampling, inflate_patches

_PATCHES = "vision.patch_embed"
_TUBES = "vision.video_embed.tubes."


@dataclasses.dataclass(frozen=True)
class Made:
    """A parameter that is made, since the model to start from has none like it."""

    what: Literal["inflated", "zero", "random"]
    why: str
    # Makes the value; None: it stays random.
    read: Callable[[], np.ndarray | float] | None = None


def start_of_video(path: str, opened: OpenedModel, config: ModelConfig) -> Made | None:
    """Finds how a parameter for videos starts from a model of images.

    With it the new model sees an image as the old one does.

    Args:
      path: a parameter that `opened` does not have.
      opened: the model to start from.
      config: the config of the new model.

    Returns:
      None where the parameter is none for videos.
    """
    if path == "vision.video_embed.gate":
        return Made("zero", "no fixed code at first", lambda: 0.0)
    if path == "frame_embed":
        return Made("zero", "all frames alike at first", lambda: 0.0)
    if not path.startswith(_TUBES):
        return None

    number, _, leaf = path.removeprefix(_TUBES).partition(".")
    tube = config.vision.video.tubes[int(number)]
    if tube.parts > 1:
        return Made("random", f"{tube.parts} tubes are joined to a token")
    if leaf == "bias":
        return Made(
            "inflated", "bias of the patches", lambda: opened.tensors.read(f"{_PATCHES}.bias")
        )
    size = " x ".join(map(str, tube.size))
    patch_size = config.vision.patch_size

    def inflated() -> np.ndarray:
        kernel = opened.tensors.read(f"{_PATCHES}.kernel")
        resampling = find_resampling(f"{_PATCHES}.kernel", opened, config.vision)
        if resampling is not None:
            kernel = resampling[1](kernel)
        return inflate_patches(kernel, patch_size, tube.size)

    return Made(
        "inflated", f"kernel of the patches, {patch_size} x {patch_size} -> {size}", inflated
    )
