"""Position tables and patch kernels for another size of image or patch."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Float

from mammut.models.resnet import ResNetConfig
from mammut.models.vit import VisionConfig
from mammut.weights.files.tensor_file import TensorSpec
from mammut.weights.opened import LazyTensors, OpenedModel

Tower = VisionConfig | ResNetConfig


def resample_positions(
    table: Float[np.ndarray, "down across D"],
    grid: tuple[int, int],
    method: Literal["bicubic", "bilinear"],
) -> Float[np.ndarray, "down2 across2 D"]:
    """A table of positions for another grid, float[*grid, D].

    "bicubic" is open_clip's resize (torch's interpolate with antialias=True, align_corners=False: a
    = -0.5, half-pixel centres, the filter widened where the grid shrinks); "bilinear" is
    big_vision's resample_posemb (scipy's zoom with order=1: the corners stay corners).
    """
    weights = {"bicubic": _bicubic, "bilinear": _bilinear_corners}[method]
    return _along_both(weights, table, grid)


def resample_patches(
    kernel: Float[np.ndarray, "old_patch D"], old: int, new: int
) -> Float[np.ndarray, "new_patch D"]:
    """A patch kernel float[old * old * 3, D] for patches of `new` pixels a side.

    By the pseudo-inverse of bilinear resizing (FlexiViT, arXiv 2212.08013, section 3.4): an
    enlarged image has the tokens of the original, exactly; a reduced one those nearest to them, on
    the mean over images of white noise.
    """

    def inverse(old: int, new: int) -> np.ndarray:
        return np.linalg.pinv(_bilinear_pixels(old, new).T)

    rows = _along_both(inverse, kernel.reshape(old, old, -1), (new, new))
    return rows.reshape(new * new * 3, kernel.shape[1])


def _along_both(
    weights: Callable[[int, int], np.ndarray], table: np.ndarray, grid: tuple[int, int]
) -> np.ndarray:
    down, across = (weights(old, new) for old, new in zip(table.shape[:2], grid, strict=True))
    moved = np.einsum("Ii,Jj,ijD->IJD", down, across, table.astype(np.float64), optimize=True)
    return moved.astype(table.dtype)


def _bicubic(old: int, new: int) -> np.ndarray:
    step = old / new
    centres = (np.arange(new)[:, None] + 0.5) * step
    x = np.abs(np.arange(old) + 0.5 - centres) / max(step, 1)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


def _bilinear_corners(old: int, new: int) -> np.ndarray:
    return _between(np.arange(new) * (old - 1) / max(new - 1, 1), old)


def _bilinear_pixels(old: int, new: int) -> np.ndarray:
    return _between(np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1), old)


def _between(points: np.ndarray, size: int) -> np.ndarray:
    """The weights of the integers below `size` at `points` among them."""
    return np.maximum(0, 1 - np.abs(points[:, None] - np.arange(size)))


def at_image_size(opened: OpenedModel, image_size: int) -> OpenedModel:
    """The model for images of another size: its position grid is resampled, everything else stays as it is.

    Raises:
      ValueError: `image_size` is not a multiple of the patch size, or of the stride of a ResNet.
    """
    # Of the sizes that its training went through, the smaller one may not be below this one.
    vision = dataclasses.replace(opened.config.vision, image_size=image_size, low_image_size=None)
    resampled = _resampling("vision.pos_embed", opened, vision)
    specs, read = dict(opened.tensors.specs), opened.tensors.read
    if resampled:
        spec = specs["vision.pos_embed"]
        specs["vision.pos_embed"] = TensorSpec((*vision.grid, spec.shape[-1]), spec.dtype)

    def read_resampled(path: str) -> np.ndarray:
        return resampled[1](read(path)) if resampled and path == "vision.pos_embed" else read(path)

    config, processor = (
        dataclasses.replace(opened.config, vision=vision),
        copy.copy(opened.processor),
    )
    if processor is not None:
        processor.image = dataclasses.replace(processor.image, image_size=image_size)
        # a longer prefix leaves less room
        processor.max_length = min(processor.max_length, config.text_length)
    return dataclasses.replace(
        opened, config=config, tensors=LazyTensors(specs, read_resampled), processor=processor
    )


def _resampling(
    path: str, opened: OpenedModel, vision: Tower
) -> tuple[str, Callable[[np.ndarray], np.ndarray]] | None:
    """How a parameter gets the sizes of `vision`, in words and as a function; None: it has them."""
    old = opened.config.vision
    if isinstance(old, ResNetConfig):
        return None
    if path == "vision.pos_embed" and old.grid != vision.grid:
        grids = " -> ".join(f"{down} x {across}" for down, across in (old.grid, vision.grid))
        return f"{grids}, {opened.positions}", lambda x: resample_positions(
            x, vision.grid, opened.positions
        )
    if path == "vision.patch_embed.kernel" and old.patch_size != vision.patch_size:
        sizes = old.patch_size, vision.patch_size
        return "patch {} -> {}, pseudo-inverse".format(*sizes), lambda x: resample_patches(
            x, *sizes
        )
    return None
