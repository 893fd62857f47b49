"""How what a video model has beside an image model starts from the image model."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from mammut.core.fields import require
from mammut.models.mammut import ModelConfig
from mammut.models.video import reads_tubes
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


def require_gate(vision: Any, starts: Mapping[str, OpenedModel]) -> None:
    """Checks that an encoder of videos sees images as the encoder that it starts from.

    Args:
      vision: the config of the new encoder.
      starts: the models to start from, by the field of `TrainConfig` that names each.

    Raises:
      ValueError: it does not, by a fixed code that is added at full strength.
    """
    name = next((name for name in ("init_vision", "init") if name in starts), None)
    if name is None or starts[name].config.vision.video is not None or not reads_tubes(vision):
        return
    require(
        vision.video.fixed_code != "plain",
        f"VideoConfig.fixed_code is 'plain', which changes at once what {name} "
        f"{starts[name].where} sees of an image: expected 'gated', a code that begins at zero, or "
        "'none'",
    )


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
