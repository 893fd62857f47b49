"""Pictures of any kind as arrays of one size.

They are opened, turned upright, resized and cropped.
"""

import dataclasses
import io
import math
import os
import pathlib
import threading
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

from mammut.core.fields import require_choices
from mammut.data.file_bytes import first_bytes, is_video_file
from mammut.data.picture_metadata import without_metadata

# Bytes, a path, an open file, a PIL image, or an array uint8[height, width], [height, width, 1],
# [height, width, 3] or [height, width, 4].
ImageLike = Any
Cause = Literal[
    *("missing file", "empty", "corrupt", "truncated", "oversized", "unsupported"),
    *("no video", "empty clip"),  # of a BadVideo alone
]
# A fixed list, so that no picture from the web reaches the formats that Pillow hands to other
# programs (EPS to Ghostscript).
_FORMATS = "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"


class BadImage(ValueError):
    """An image that cannot be used.

    The message states in one sentence which image it is, and the reason.

    Attributes:
      cause: "missing file" (or unreadable), "empty" (no bytes, no pixels or no frames), "corrupt"
        (not an image, or damaged), "truncated", "oversized" (more pixels than
        `ImageTransform.max_image_pixels`) or "unsupported" (a pixel format, array or object that
        cannot be read).

    Example:
      >>> try:
      ...     batch = processor(images=["photo.jpg"])
      ... except mammut.BadImage as error:
      ...     print(error.cause, error)
    """

    def __init__(self, message: str, cause: Cause):
        super().__init__(message, cause)  # both, so that it can be pickled
        self.cause = cause

    def __str__(self) -> str:
        return self.args[0]


class Crop(NamedTuple):
    """A part of a picture, in shares of its width and height."""

    x: float
    y: float
    across: float
    down: float


def draw_crop(
    rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> Crop:
    """Draws a part of a picture, of any size; see `ImageTransform.random_resized_crop`."""
    if not (0 < scale[0] <= scale[1] <= 1 and 0 < ratio[0] <= ratio[1]):
        raise ValueError(
            f"scale {scale} and ratio {ratio} of a crop, expected 0 < low <= high, scale up to 1"
        )
    area_draw, aspect_draw, x_draw, y_draw = rng.random(4)
    area = scale[0] + (scale[1] - scale[0]) * area_draw
    # Beyond these, one side would be longer than the picture's.
    low, high = np.log(np.clip(ratio, area, 1 / area))
    aspect = math.exp(low + (high - low) * aspect_draw)
    across = min(1.0, math.sqrt(area * aspect))
    down = min(1.0, math.sqrt(area / aspect))
    return Crop((1 - across) * x_draw, (1 - down) * y_draw, across, down)


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """Resizes any picture to `uint8[image_size, image_size, 3]`, as open_clip does at inference.

    Attributes:
      image_size: side of the output in pixels; it is square.
      mode: "squash" resizes both sides; "shortest" resizes the shortest side and crops; "longest"
        resizes the longest side and pads.
      interpolation: "bicubic" and "bilinear" are Pillow's, antialiased; "bilinear_aliased", of
        big_vision, is tf.image.resize with its defaults, the fractions of pixel values cut off.
      fill: grey value of the padding, in mode "longest".
      max_image_pixels: an image whose header says that it has more pixels is refused, undecoded.

    Example:
      >>> transform = mammut.ImageTransform(image_size=224, mode="shortest")
      >>> transform("photo.jpg").shape
      (224, 224, 3)
    """

    image_size: int
    mode: Literal["squash", "shortest", "longest"] = "squash"
    interpolation: Literal["bicubic", "bilinear", "bilinear_aliased"] = "bicubic"
    fill: int = 0
    max_image_pixels: int = 100_000_000

    def __post_init__(self):
        require_choices(self)
        for name, low, high in (
            ("image_size", 1, 2**14),
            ("fill", 0, 255),
            ("max_image_pixels", 1, 2**31),
        ):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(
                    f"ImageTransform.{name} is {value!r}, "
                    f"expected a whole number from {low} to {high}"
                )

    def read(self, image: ImageLike):
        """Reads a picture: a PIL image in mode RGB, upright.

        The top of `mammut.data.processor` lists how each kind of picture is converted.

        Raises:
          BadImage: the image cannot be used as a whole; a truncated file is never half a picture.
        """
        return self._read(image)

    def __call__(self, image: ImageLike) -> UInt8[np.ndarray, "height width 3"]:
        """Reads and resizes a picture as at inference; raises what `read` raises."""
        size = self.image_size
        if isinstance(image, np.ndarray) and image.dtype == np.uint8:
            # Frames of a drawn or stored video: nothing to resize, and there are many of them.
            if image.shape == (size, size, 3) and size * size <= self.max_image_pixels:
                return image.copy()
        picture = self._read(image)
        width, height = picture.size
        if self.mode == "squash":
            return self._resized(picture, (size, size))
        # The two roundings are open_clip's: down after "shortest", to the nearest after "longest".
        if self.mode == "shortest":
            resized = [size * side // min(width, height) for side in (width, height)]
        else:
            resized = [
                max(1, round(side / (max(width, height) / size))) for side in (width, height)
            ]
        if math.prod(resized) > max(self.max_image_pixels, size * size):
            raise BadImage(
                f"an image of {width} x {height} pixels is too narrow to resize its short side",
                "oversized",
            )
        pixels = self._resized(picture, tuple(resized))
        if self.mode == "shortest":
            top, left = (round((side - size) / 2) for side in pixels.shape[:2])
            return pixels[top : top + size, left : left + size]
        square = np.full((size, size, 3), self.fill, np.uint8)
        top, left = ((size - side) // 2 for side in pixels.shape[:2])
        square[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
        return square

    def random_resized_crop(
        self,
        image: ImageLike,
        rng: np.random.Generator,
        scale: tuple[float, float],
        ratio: tuple[float, float],
    ) -> UInt8[np.ndarray, "height width 3"]:
        """Cuts out a random part and squashes it to the output size.

        A JPEG given as bytes or path is decoded at a fraction of its size where that leaves twice
        the pixels needed. With `scale` and `ratio` (1, 1) the part is the whole picture, as in mode
        "squash".

        Args:
          image: anything that `read` takes; it raises what `read` raises.
          rng: source of the random numbers.
          scale: the part's share of the area, low and high; uniform between them.
          ratio: the part's width / height relative to the picture's, low and high; uniform in the
            logarithm, as far as such a part fits.
        """
        return self.cut(image, draw_crop(rng, scale, ratio))

    def cut(self, image: ImageLike, crop: Crop) -> UInt8[np.ndarray, "height width 3"]:
        """Cuts a part out of a picture as `random_resized_crop` does."""
        sides = math.ceil(2 * self.image_size / min(crop.across, crop.down))
        picture = self._read(image, sides=sides)
        width, height = picture.size
        right = min(1.0, crop.x + crop.across)
        bottom = min(1.0, crop.y + crop.down)
        box = (crop.x * width, crop.y * height, right * width, bottom * height)
        return self._resized(picture, (self.image_size, self.image_size), box)

    def _resized(
        self, picture, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
    ):
        """Resizes the part of a picture in `box` to `size`.

        `size` is (width, height). With `box` None the part is the whole picture.

        Returns:
          uint8[height, width, 3].
        """
        from PIL.Image import Resampling

        if self.interpolation == "bilinear_aliased":
            return _resized_without_antialiasing(
                np.array(picture), size, box or (0.0, 0.0, *map(float, picture.size))
            )
        filters = {"bicubic": Resampling.BICUBIC, "bilinear": Resampling.BILINEAR}
        return np.array(picture.resize(size, filters[self.interpolation], box=box))

    def _read(self, image: ImageLike, sides: int | None = None):
        """Reads a picture, a JPEG at a fraction of its size.

        The fraction keeps both sides at `sides` pixels or more; None: the whole size.
        """
        import PIL.Image

        name = f"image {image}" if isinstance(image, str | pathlib.Path) else "image"
        try:
            content = _content(image)
            with PILLOW_LIMIT:
                try:
                    return self._decoded(content, sides)
                except BadImage:
                    raise
                except Exception:
                    plain = without_metadata(content)
                    if plain is None:
                        raise
                    return self._decoded(plain, sides)
        except BadImage as error:
            raise BadImage(f"{name} {error}", error.cause) from error.__cause__
        except PIL.UnidentifiedImageError as error:
            raise BadImage(
                f"{name} is corrupt or none of {', '.join(_FORMATS)}", "corrupt"
            ) from error
        except Exception as error:  # Pillow's decoders raise many kinds of errors
            cause = "truncated" if "truncated" in str(error).lower() else "corrupt"
            raise BadImage(f"{name} is {cause}: {error}", cause) from error

    def _decoded(self, content: Any, sides: int | None):
        """Decodes what `_content` returns; `sides` as in `_read`."""
        import PIL.Image

        picture = content
        if isinstance(content, bytes):
            if is_video_file(first_bytes(content)):
                raise BadImage("is a video, expected a picture", "unsupported")
            picture = PIL.Image.open(io.BytesIO(content), formats=_FORMATS)
        if not all(picture.size):
            raise BadImage(f"has {picture.width} x {picture.height} pixels", "empty")
        if math.prod(picture.size) > self.max_image_pixels:
            size = f"{picture.width} x {picture.height} pixels"
            raise BadImage(
                f"has {size}, more than max_image_pixels {self.max_image_pixels}", "oversized"
            )
        if isinstance(content, bytes) and sides is not None:
            picture.draft(None, (sides, sides))
        picture.load()
        return _upright_rgb(picture)


class _PillowLimit:
    """Lifts Pillow's own pixel limit: `max_image_pixels` replaces it.

    Pillow's limit is one of the whole process, asked when a file is opened and, in some formats,
    when it is decoded. The first thread that reads lifts it, the last one puts it back.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._readers = 0
        self._limit: int | None = None

    def __enter__(self) -> None:
        import PIL.Image

        with self._lock:
            if not self._readers:
                self._limit = PIL.Image.MAX_IMAGE_PIXELS
                PIL.Image.MAX_IMAGE_PIXELS = None
            self._readers += 1

    def __exit__(self, *_) -> None:
        import PIL.Image

        with self._lock:
            self._readers -= 1
            # Another value than None was set meanwhile, by the program that uses this library.
            if not self._readers and PIL.Image.MAX_IMAGE_PIXELS is None:
                PIL.Image.MAX_IMAGE_PIXELS = self._limit


PILLOW_LIMIT = _PillowLimit()


def _resized_without_antialiasing(
    pixels: UInt8[np.ndarray, "height width 3"],
    size: tuple[int, int],
    box: tuple[float, float, float, float],
) -> UInt8[np.ndarray, "height2 width2 3"]:
    """Samples the `box` of an image bilinearly, without antialiasing.

    The samples are taken at the centres of `size` (width, height) pixels.
    """
    lines: np.ndarray = pixels
    for axis, count, start, end in ((1, size[0], box[0], box[2]), (0, size[1], box[1], box[3])):
        step = np.float32((end - start) / count)
        centres = np.float32(start) + (np.arange(count, dtype=np.float32) + 0.5) * step - 0.5
        low = np.floor(centres)
        sides = [np.clip(low + side, 0, pixels.shape[axis] - 1).astype(int) for side in (0, 1)]
        near, far = (lines.take(side, axis).astype(np.float32) for side in sides)
        share = (centres - low).reshape((-1, 1) if axis else (-1, 1, 1))
        lines = near + (far - near) * share
    return lines.astype(np.uint8)


# The three functions below raise BadImage with a message that continues after the image's name.
def _content(image: ImageLike):
    """Returns the encoded bytes of a picture, or the PIL image where it is decoded already."""
    import PIL.Image

    if isinstance(image, PIL.Image.Image):
        return image
    # Of NumPy, of JAX; a str of NumPy is an array, too.
    if hasattr(image, "__array__") and not isinstance(image, str | bytes):
        return _from_array(np.asarray(image))
    if isinstance(image, str | os.PathLike):
        try:
            image = pathlib.Path(image).read_bytes()
        except (OSError, ValueError) as error:
            raise BadImage(f"cannot be read: {error}", "missing file") from error
    if hasattr(image, "seek") and hasattr(image, "read"):  # an open file
        image.seek(0)  # as Pillow does
        image = image.read()
    if isinstance(image, bytearray | memoryview):
        image = bytes(image)
    if not isinstance(image, bytes):
        kinds = "bytes, a path, an open file, a PIL image or an array"
        raise BadImage(f"is of type {type(image).__name__}, expected {kinds}", "unsupported")
    if not image:
        raise BadImage("is empty, expected an image file", "empty")
    return image


def _from_array(array: np.ndarray):
    import PIL.Image

    given = f"{array.dtype}{list(array.shape)}"
    expected = "uint8[height, width] or [height, width, 1, 3 or 4]"
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    has_channels = array.ndim == 3 and array.shape[2] in (3, 4)
    if array.dtype != np.uint8 or not (array.ndim == 2 or has_channels):
        raise BadImage(f"is {given}, expected {expected}", "unsupported")
    if not array.size:
        raise BadImage(f"is {given}, expected at least one pixel", "empty")
    return PIL.Image.fromarray(array)


def _orientation(picture) -> Any:
    """Returns the orientation of the picture's EXIF; None where that is absent or damaged."""
    try:
        return picture.getexif().get(0x0112)
    except Exception:  # Pillow's readers of metadata raise many kinds of errors
        return None


def _upright_rgb(picture):
    import PIL.Image
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = turns.get(_orientation(picture))
    # Pillow would clip the values, not scale them.
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM"):
        picture = PIL.Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise BadImage(
            f"has 32-bit pixels (Pillow's mode {picture.mode}), expected 8 or 16 bits",
            "unsupported",
        )
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, "white"), picture)
    if turn is None and picture.mode == "RGB":
        return picture
    upright = picture.convert("RGB")
    if turn is not None:
        upright = upright.transpose(turn)
    upright.info = {}  # its orientation must not be applied a second time
    return upright
