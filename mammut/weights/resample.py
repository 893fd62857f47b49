"""Resamples position tables and patch kernels.

The target has another size of image or patch, or it is a tube of a video.
"""

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
_POSITIONS = "vision.pos_embed"


def resample_positions(
    table: Float[np.ndarray, "down across D"],
    grid: tuple[int, int],
    method: Literal["bicubic", "bilinear"],
) -> Float[np.ndarray, "down2 across2 D"]:
    """Resamples a table of positions to another grid.

    Args:
      table: float[down, across, D].
      grid: rows and columns of the new table.
      method: "bicubic" is open_clip's resize, torch's interpolate with antialias=True and
        align_corners=False: a = -0.5, half-pixel centres, the filter widened where the grid
        shrinks. "bilinear" is big_vision's resample_posemb, scipy's zoom with order=1: the corners
        stay corners.

    Returns:
      float[*grid, D].
    """
    weights = {"bicubic": _bicubic, "bilinear": _bilinear_corners}[method]
    return _along_both(weights, table, grid)


def resample_patches(
    kernel: Float[np.ndarray, "old_patch D"], old: int, new: int
) -> Float[np.ndarray, "new_patch D"]:
    """Resizes a patch kernel to patches of another size.

    It multiplies by the pseudo-inverse of bilinear resizing (FlexiViT, arXiv 2212.08013, section
    3.4): an enlarged image has exactly the tokens of the original; a reduced image has the nearest
    ones, in the mean over images of white noise.

    Args:
      kernel: float[old * old * 3, D].
      old: pixels along one side of a patch.
      new: the same, of the new patches.

    Returns:
      float[new * new * 3, D].
    """

    def inverse(old: int, new: int) -> np.ndarray:
        return np.linalg.pinv(_bilinear_pixels(old, new).T)

    rows = _along_both(inverse, kernel.reshape(old, old, -1), (new, new))
    return rows.reshape(new * new * 3, kernel.shape[1])


def inflate_patches(
    kernel: Float[np.ndarray, "patch D"], patch_size: int, size: tuple[int, int, int]
) -> Float[np.ndarray, "tube D"]:
    """Makes the kernel of a tube from that of the patches.

    A window of the tube's height and width that stands still over its frames has exactly the token
    that it has when it is enlarged bilinearly to a patch. The sum of the numbers is kept, and all
    frames have the same share of it (I3D, arXiv 1705.07750, section 2.3).

    Args:
      kernel: float[patch_size * patch_size * 3, D].
      patch_size: pixels along one side of a patch.
      size: frames, height and width of the tube, as in `TubeConfig.size`.

    Returns:
      float[frames * height * width * 3, D].
    """

    def transposed(old: int, new: int) -> np.ndarray:
        return _bilinear_pixels(new, old).T

    frames, *window = size
    still = _along_both(transposed, kernel.reshape(patch_size, patch_size, -1), tuple(window))
    each = still.reshape(-1, kernel.shape[1]) / frames
    return np.tile(each, (frames, 1)).astype(kernel.dtype)


def _along_both(
    weights: Callable[[int, int], np.ndarray], table: np.ndarray, grid: tuple[int, int]
) -> np.ndarray:
    """Multiplies both axes of a table with matrices.

    `weights` makes the matrices, [new, old].
    """
    down, across = (weights(old, new) for old, new in zip(table.shape[:2], grid, strict=True))
    moved = np.einsum("Ii,Jj,ijD->IJD", down, across, table.astype(np.float64), optimize=True)
    return moved.astype(table.dtype)


def _bicubic(old: int, new: int) -> np.ndarray:
    step = old / new
    centres = (np.arange(new)[:, None] + 0.5) * step
    x = np.abs(np.arange(old) + 0.5 - centres) / max(step, 1)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


def _bilinear_corners(old: int, new: int) -> np.ndarray:
    return _between(np.arange(new) * (old - 1) / max(new - 1, 1), old)


def _bilinear_pixels(old: int, new: int) -> np.ndarray:
    return _between(np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1), old)


def _between(points: np.ndarray, size: int) -> np.ndarray:
    """Computes linear interpolation weights at `points`.

    The weights are for the integers below `size`.
    """
    return np.maximum(0, 1 - np.abs(points[:, None] - np.arange(size)))


def at_image_size(opened: OpenedModel, image_size: int) -> OpenedModel:
    """Resamples the model for images of another size.

    Its position grid is resampled; nothing else changes.

    Args:
      opened: a whole model or an image encoder.
      image_size: pixels along one side.

    Raises:
      ValueError: `image_size` is not a multiple of the patch size where the model cuts off no rest
        (`VisionConfig.cut_rest`), or of the stride of a ResNet.
    """
    # `low_image_size` is for the start of a training run. Here it is not used, and it need not be
    # below the new size.
    vision = dataclasses.replace(opened.config.vision, image_size=image_size, low_image_size=None)
    tensors = opened.tensors
    resampling = find_resampling(_POSITIONS, opened, vision)
    if resampling is not None:
        _, resample = resampling
        spec = tensors.specs[_POSITIONS]
        resampled = TensorSpec((*vision.grid, spec.shape[-1]), spec.dtype)

        def read(path: str) -> np.ndarray:
            array = opened.tensors.read(path)
            return resample(array) if path == _POSITIONS else array

        tensors = LazyTensors({**tensors.specs, _POSITIONS: resampled}, read)

    config = dataclasses.replace(opened.config, vision=vision)
    processor = copy.copy(opened.processor)
    if processor is not None:
        processor.image = dataclasses.replace(processor.image, image_size=image_size)
        # A larger image may be a longer prefix, which leaves fewer positions for the text.
        processor.max_length = min(processor.max_length, config.text_length)
    return dataclasses.replace(opened, config=config, tensors=tensors, processor=processor)


def find_resampling(
    path: str, opened: OpenedModel, vision: Tower
) -> tuple[str, Callable[[np.ndarray], np.ndarray]] | None:
    """Finds how a parameter gets the sizes of `vision`.

    Returns the way in words, and as a function.

    None: it has these sizes already.
    """
    old = opened.config.vision
    if isinstance(old, ResNetConfig):
        return None

    if path == _POSITIONS and old.grid != vision.grid:
        grids = " -> ".join(f"{down} x {across}" for down, across in (old.grid, vision.grid))

        def resample(table: np.ndarray) -> np.ndarray:
            return resample_positions(table, vision.grid, opened.positions)

        return f"{grids}, {opened.positions}", resample

    if path == "vision.patch_embed.kernel" and old.patch_size != vision.patch_size:

        def resize(kernel: np.ndarray) -> np.ndarray:
            return resample_patches(kernel, old.patch_size, vision.patch_size)

        return f"patch {old.patch_size} -> {vision.patch_size}, pseudo-inverse", resize
    return None
