"""What a model may be given: type, shape, dtype and range of images and texts.

Every public method of a model asks here. Values are checked outside of `jax.jit` only: under a
trace an array has a shape and a dtype, but no numbers yet.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mammut.core.fields import require

# Float pixels may lie this many times farther from zero than black and white. Pixels that were not
# normalised, 0 to 255, lie farther.
_MARGIN = 10.0


def require_images(image: Any, config: Any) -> None:
    """Checks images for an image encoder with the `VisionConfig` or `ResNetConfig` `config`.

    Raises:
      ValueError: `image` is not uint8[B, height, width, 3] of one of its sizes, or a video
        uint8[B, T, height, width, 3] of its `image_size`, or float of such a shape with pixels
        normalised as in `normalised`.
    """
    expected = 'uint8[B, height, width, 3] as processor(images=[...])["image"] gives'
    _require_array("image", image, expected)
    name = type(config).__name__
    sizes = [size for size in (config.image_size, config.low_image_size) if size is not None]
    given = f"{image.dtype}{list(image.shape)}"
    require(
        image.ndim in (4, 5),
        f"image is {given}, expected {expected}, or a video uint8[B, T, height, width, 3]",
    )
    if image.ndim == 5:
        side = sizes[0]
        require(image.shape[1] > 0, f"image is a video {given} of no frames, expected one or more")
        require(
            image.shape[2:] == (side, side, 3),
            f"frames of the video are {image.shape[2:]}, expected {(side, side, 3)} from "
            f"{name}.image_size",
        )
    elif image.shape[1:] not in [(size, size, 3) for size in sizes]:
        low = "" if len(sizes) == 1 else f" or {(sizes[1], sizes[1], 3)} from low_image_size"
        shape = f"{(sizes[0], sizes[0], 3)} from {name}.image_size{low}"
        raise ValueError(f"images are {image.shape[1:]}, expected {shape}")
    if image.dtype == jnp.uint8:
        return
    normal = f"float pixels normalised by {name}: (pixel / 255 - image_mean) / image_std"
    require(
        jnp.issubdtype(image.dtype, jnp.floating),
        f"image is {given}, expected {expected}, or {normal}",
    )
    if not _has_numbers(image):
        return
    farthest = max(
        max(abs(mean), abs(1 - mean)) / std
        for mean, std in zip(config.image_mean, config.image_std, strict=True)
    )
    # On its own device: images are large.
    own = jnp if isinstance(image, jax.Array) else np
    with jax.ensure_compile_time_eval():  # numbers may be known under a trace, too
        largest = float(own.abs(image).max())
    require(
        bool(largest <= _MARGIN * farthest),  # NaN is not
        f"image is {image.dtype} with numbers up to {largest:.6g}, expected {normal}",
    )


def require_texts(
    tokens: Any, text_valid: Any, config: Any, *, image: Any = None, target: Any = None
) -> Any:
    """Checks texts for a decoder with the `DecoderConfig` `config`.

    Args:
      tokens: the ids of the texts.
      text_valid: marks real tokens; None: all of them are.
      image: the images that the texts are about; None: there are none.
      target: marks tokens to predict; None: there are no marks.

    Returns:
      `text_valid`, made where it is None.

    Raises:
      ValueError: `tokens` is not int[B, L] of ids in the vocabulary, with a text for each image;
        or `text_valid` or `target` is not bool[B, L].
    """
    _require_array("tokens", tokens, "int[B, L]")
    given = f"{tokens.dtype}{list(tokens.shape)}"
    whole = jnp.issubdtype(tokens.dtype, jnp.integer)
    require(
        whole and tokens.ndim == 2 and tokens.shape[1] > 0,
        f"tokens is {given}, expected int[B, L] with a token or more",
    )
    if getattr(image, "ndim", None) in (4, 5):  # the encoder refuses others
        require(
            len(image) == len(tokens),
            f"there are {len(tokens)} texts in tokens for {len(image)} images, "
            "expected one for each",
        )
    if text_valid is None:
        text_valid = np.ones(tokens.shape, bool)
    for name, marks in (("text_valid", text_valid), ("target", target)):
        if marks is None:
            continue
        _require_array(name, marks, f"bool{list(tokens.shape)} as tokens")
        require(
            marks.dtype == bool and marks.shape == tokens.shape,
            f"{name} is {marks.dtype}{list(marks.shape)}, expected bool{list(tokens.shape)} as "
            f"tokens {given}",
        )
    if _has_numbers(tokens):
        ids = np.asarray(tokens)
        most = config.vocab_size - 1
        worst = int(ids.min() if ids.min() < 0 else ids.max())
        require(
            0 <= worst <= most,
            f"tokens hold the id {worst}, expected 0 to {most} by DecoderConfig.vocab_size",
        )
    return text_valid


def _require_array(name: str, value: Any, expected: str) -> None:
    require(
        isinstance(value, np.ndarray | jax.Array),
        f"{name} is a {type(value).__name__}, expected an array {expected}",
    )
    require(
        value.dtype.isnative,
        f"{name} is {value.dtype.str}, expected an array of this machine's byte order, {expected}",
    )


def _has_numbers(array: np.ndarray | jax.Array) -> bool:
    """Whether this process knows the numbers of an array, and there are some."""
    if isinstance(array, jax.Array):
        if isinstance(array, jax.core.Tracer) or not array.is_fully_addressable:
            return False
    return array.size > 0
