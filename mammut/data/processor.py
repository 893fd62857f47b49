"""The processor: images and texts become the arrays of a model.

It is saved with the weights.

How each kind of picture becomes 8-bit RGB:

  EXIF orientation        applied
  grey, black and white   three equal channels
  16 bits a channel       the high byte
  palette, transparency   looked up; composited on white
  CMYK, YCbCr, LAB        converted by Pillow, without colour profiles
  several frames          the first one of a file
  32-bit int or float     refused: their range is not known

Where a video may stand for a picture, see `Processor.read` and `Processor.__call__`.

Images stay uint8: the model itself subtracts the mean and divides by the standard deviation.
"""

import copy
import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence, Set
from types import NoneType
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Int32, UInt8

from mammut.core.fields import from_dict, require, require_choices, require_kind
from mammut.core.files import read_json_object, write_json
from mammut.data.animation import is_animation
from mammut.data.images import BadImage, ImageTransform
from mammut.data.tokenizer import Tokenizer, restore_tokenizer
from mammut.data.video import VideoTransform, is_video

TextForm = Literal["start_end", "end", "end_filled"]

_FILE = "processor.json"
_FORMAT = 1
_MAX_LENGTH = 2**17  # the limit of DecoderConfig.max_length, too


def as_images(images: Any, name: str = "images") -> Sequence[Any]:
    """Lists the pictures or videos of any list of them.

    It may be a tuple, a generator, an array of four axes, or of five: of videos.

    Raises:
      ValueError: `images` is a picture alone, or no list; the message calls it `name`.
    """
    return _as_list(images, name, "images", axes=(4, 5))


def as_texts(texts: Any, name: str) -> Sequence[str]:
    """Lists the texts of any list of str.

    Raises:
      ValueError: `texts` is a text alone, or no list of str; the message calls it `name`.
    """
    texts = _as_list(texts, name, "str", axes=(1,))
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name} {row} is a {type(text).__name__}, expected a list of str")
    return texts


def _as_list(values: Any, name: str, of: str, axes: tuple[int, ...]) -> Sequence[Any]:
    """Lists the elements of any list; an array counts as one where it has so many `axes`."""
    dims = getattr(values, "ndim", None)
    listed = isinstance(values, Iterable) if dims is None else dims in axes
    # Text, bytes and open files can be iterated too, and so can what has no order.
    alone = isinstance(values, str | bytes | bytearray | memoryview | Mapping | Set)
    if not listed or alone or hasattr(values, "read"):
        shown = f" {values!r:.50}" if isinstance(values, str) else ""
        shown = f" of shape {list(values.shape)}" if hasattr(values, "shape") else shown
        raise ValueError(
            f"{name} is one {type(values).__name__}{shown}, expected a list of {of}: give [...]"
        )
    # A sequence may make its elements when they are asked for: all of them may not fit in memory.
    return values if isinstance(values, Sequence) else list(values)


def _require_picture(image: Any) -> None:
    """Checks that the image of an example is no video.

    Raises:
      BadImage: it is one.
    """
    if is_video(image):
        name = f" {image}" if isinstance(image, str | pathlib.Path) else ""
        raise BadImage(
            f"image{name} is a video, expected a picture: data.frames, in evaluations --frames, is "
            "the number of frames that are read of each video",
            "unsupported",
        )


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes that a model was trained to name, and how it was asked for them.

    Attributes:
      names: the names of the training set, sorted.
      template: the text that the model was trained on, with {} in place of the name.
      method: how `eval.classify` ranks the classes by default.
    """

    names: tuple[str, ...]
    template: str = "{}"
    method: Literal["contrastive", "likelihood"] = "likelihood"

    def __post_init__(self):
        require_choices(self)
        require(len(self.names) > 0, "Classes.names is empty, expected one name or more")
        require(
            len(set(self.names)) == len(self.names),
            "Classes.names has a name twice, expected each once",
        )
        require(
            "{}" in self.template,
            f"Classes.template is {self.template!r}, expected a text with {{}} in it",
        )


class Processor:
    """The image transform, the tokenizer and the text rules of one model.

    A text becomes `[start] + ids + [end]`, padded to `max_length`; a text that is too long is cut
    and keeps the end.

    Args:
      tokenizer: turns texts into ids and back.
      image: turns pictures into arrays of one size.
      max_length: tokens of a text, start and end included.
      text_form: "start_end" as above; "end": without the start (SigLIP 2); "end_filled": without
        the start, and padded with ends (SigLIP).
      classes: the classes that the model was trained to name, if it was.
      video: how the examples of a set are read as videos; None: they are pictures.

    Example:
      >>> model, processor = mammut.load("runs/flickr8k")
      >>> batch = processor(images=["photo.jpg"], text=["a dog on grass"])
      >>> batch["image"].shape, batch["tokens"].shape
      ((1, 224, 224, 3), (1, 64))
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image: ImageTransform,
        max_length: int,
        text_form: TextForm = "start_end",
        classes: Classes | None = None,
        video: VideoTransform | None = None,
    ):
        if type(max_length) is not int or not 2 <= max_length <= _MAX_LENGTH:
            raise ValueError(
                f"max_length is {max_length!r}, expected 2 tokens, start and end, to {_MAX_LENGTH}"
            )
        if text_form not in get_args(TextForm):
            raise ValueError(
                f"text_form is {text_form!r}, expected one of {', '.join(get_args(TextForm))}"
            )
        require_kind("tokenizer", tokenizer, Tokenizer)
        require_kind("image", image, ImageTransform)
        require_kind("classes", classes, Classes, NoneType)
        self.tokenizer = tokenizer
        self.image = image
        self.max_length = max_length
        self.text_form = text_form
        self.classes = classes
        self.video = video
        self._default_video = VideoTransform()

    def for_model(self, config: Any) -> "Processor":
        """Makes this processor for a model: without `video`, it reads the model's frames.

        They are as many as `VideoConfig.frames`; for a model without it nothing changes.

        Args:
          config: the `ModelConfig` of the model.
        """
        settings = config.vision.video
        if settings is None:
            return self
        processor = copy.copy(self)
        processor._default_video = VideoTransform(settings.frames)
        return processor

    @property
    def video_transform(self) -> VideoTransform:
        """How a call reads videos."""
        return self.video or self._default_video

    def __call__(self, images: Any = None, text: Any = None) -> dict[str, np.ndarray]:
        """Makes a batch of images or videos, of texts, or of both.

        What `is_video` takes for a video is one: a path such as "clip.mp4", a Clip, a folder, a
        list of frames, uint8[T, height, width, 3]. A GIF and an animated WebP are videos where
        `video` is set, else pictures. Videos are read as `video` says. Without it a video is read
        as a whole, in as many frames as the model is made for (`VideoConfig.frames`) that the
        processor was loaded with; in 8 where that is not known.

        Args:
          images: any list of images that `ImageTransform.read` takes: a list, a tuple, a generator,
            an array uint8[B, height, width, 3]; or any list of videos.
          text: any list of str.

        Returns:
          A dict with `image` uint8[B, height, width, 3], or of videos uint8[B, T, height, width,
          3], where images are given, and `tokens` int32[B, L] and `text_valid` bool[B, L], False on
          pads, where texts are given.

        Raises:
          ValueError: an image or a text is alone, not in a list; a text is no str; there are
            neither images nor texts, or images beside videos.
          BadImage: an image cannot be used; BadVideo: a video.
        """
        if images is None and text is None:
            raise ValueError("neither images nor text is given, expected at least one of them")
        batch = {}
        if images is not None:
            batch["image"] = self._pixels(as_images(images))
        if text is not None:
            batch["tokens"], batch["text_valid"] = self.encode_text(text)
        return batch

    def _pixels(self, images: Sequence[Any]) -> UInt8[np.ndarray, "B *T height width 3"]:
        video = self.video_transform
        size = self.image.image_size
        arrays, places = [], {}  # the first place of a picture and of a video
        for place, image in enumerate(images):
            moves = self.reads_video(image)
            places.setdefault(moves, place)
            if len(places) == 2:
                raise ValueError(
                    f"images has a video at {places[True]} and a picture at {places[False]}, "
                    "expected videos alone or pictures alone"
                )
            arrays.append(video(image, self.image) if moves else self.image(image))
        shape = (video.frames, size, size, 3) if True in places else (size, size, 3)
        return np.array(arrays, np.uint8).reshape(-1, *shape)

    def reads_video(self, image: Any) -> bool:
        """Tells whether a call reads an image as a video; see there."""
        return is_video(image) or (self.video is not None and is_animation(image))

    def read(self, image: Any) -> UInt8[np.ndarray, "*T height width 3"]:
        """Reads the image of an example of a set, as at inference.

        With `video` set it is a video uint8[T, height, width, 3]: a picture too, all of whose
        frames are the same. Else it is a picture uint8[height, width, 3].

        Raises:
          BadImage: the image cannot be used; or it is a video, and `video` is not set.
        """
        if self.video is not None:
            return self.video(image, self.image)
        _require_picture(image)
        return self.image(image)

    def draw(
        self,
        image: Any,
        rng: np.random.Generator,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        transform: ImageTransform | None = None,
    ) -> UInt8[np.ndarray, "*T height width 3"]:
        """Reads the image of an example as in training; otherwise as `read`.

        Args:
          image: the image, in which a part is drawn; of a video the frames are drawn too.
          rng: source of the random numbers.
          scale: as of `ImageTransform.random_resized_crop`; (1, 1): no crop, as at inference.
          ratio: as of `ImageTransform.random_resized_crop`.
          transform: used in place of `image` of this processor, for images of another size.
        """
        transform = transform or self.image
        if self.video is not None:
            return self.video.random(image, rng, transform, scale, ratio)
        _require_picture(image)
        if tuple(scale) == (1, 1):
            return transform(image)
        return transform.random_resized_crop(image, rng, scale, ratio)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of an example's image: (height, width, 3), of videos (T, height, width, 3)."""
        size = self.image.image_size
        frames = () if self.video is None else (self.video.frames,)
        return (*frames, size, size, 3)

    def encode_text(
        self, texts: Iterable
    ) -> tuple[Int32[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
        """Encodes texts as `tokens` and `text_valid`.

        An empty text has only the special tokens of `text_form`: start and end, or the end
        alone.

        Raises:
          ValueError: `texts` is one str, or holds something else.
        """
        return self.encode_pairs([("", text) for text in as_texts(texts, "text")])[:2]

    def encode_pairs(
        self, pairs: Sequence[tuple[str, str]]
    ) -> tuple[Int32[np.ndarray, "B L"], Bool[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
        """Encodes prompts, each with the target text after it.

        A prompt and its text are encoded apart, as when the text is generated. A text that is too
        long is cut; `room` counts the tokens that fit.

        Returns:
          `tokens`, `text_valid`, and `target`, True on the text and its end.
        """
        tokens = np.full((len(pairs), self.max_length), self.pad_id, np.int32)
        text_valid = np.zeros(tokens.shape, bool)
        target = np.zeros(tokens.shape, bool)
        for row, (prompt, text) in enumerate(pairs):
            start = [*self._start, *self.encode_prompt(prompt)]
            ids = (start + self.encode_after(prompt, text))[: self.max_length - 1] + [self.eos_id]
            tokens[row, : len(ids)] = ids
            text_valid[row, : len(ids)] = True
            target[row, len(start) : len(ids)] = True
        return tokens, text_valid, target

    def encode_prompt(self, prompt: str) -> list[int]:
        """Encodes a prompt, without the start; the empty prompt has no ids.

        Where a vocabulary marks words by the space before them, the prompt ends without a space:
        the text after it begins with one.
        """
        prompt = prompt.rstrip() if self.tokenizer.needs_space else prompt
        return self.tokenizer.encode(prompt) if prompt else []

    def encode_after(self, prompt: str, text: str) -> list[int]:
        """Encodes the target text after a prompt.

        After "A:" it may have to be " yes" (see `encode_prompt`), after the empty prompt "yes".
        Directly after an image it is "yes" too, as in MAGMA.
        """
        if self.tokenizer.needs_space and prompt.strip() and text and not text[0].isspace():
            text = f" {text}"
        return self.tokenizer.encode(text)

    def room(self, prompt: str) -> int:
        """Counts the tokens that fit between a prompt and the end.

        The count is negative where the prompt itself does not fit.
        """
        return self.max_length - 1 - len(self._start) - len(self.encode_prompt(prompt))

    def decode(self, tokens: Any) -> list[str]:
        """Decodes int[B, L] tokens, each row up to its end.

        Raises:
          ValueError: the tokens are of another shape, or an id is not in the vocabulary.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens are {tokens.dtype}{list(tokens.shape)}, expected int[B, L]")
        return [self.tokenizer.decode(row).strip() for row in tokens.tolist()]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self.tokenizer.vocab_size

    @property
    def bos_id(self) -> int:
        """The id of the start."""
        return self.tokenizer.bos_id

    @property
    def eos_id(self) -> int:
        """The id of the end."""
        return self.tokenizer.eos_id

    @property
    def pad_id(self) -> int:
        """The id of a pad.

        A real token may have the same id: only `text_valid` marks pads.
        """
        return self.eos_id if self.text_form == "end_filled" else self.tokenizer.pad_id

    @property
    def _start(self) -> list[int]:
        return [self.bos_id] if self.text_form == "start_end" else []

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes `processor.json` and the vocabulary file into `folder`, made where missing."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        values = {
            "format": _FORMAT,
            "image": dataclasses.asdict(self.image),
            "max_length": self.max_length,
            "text_form": self.text_form,
            "tokenizer": self.tokenizer.save(folder),
        }
        if self.classes is not None:
            values["classes"] = dataclasses.asdict(self.classes)
        if self.video is not None:
            values["video"] = dataclasses.asdict(self.video)
        write_json(folder / _FILE, values)  # last: it names the others

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> "Processor":
        """Reads the processor that `save` wrote into `folder`.

        Raises:
          ValueError: a file is missing or damaged, or of another format than this version writes.
        """
        path = pathlib.Path(folder) / _FILE
        # The first files had no text_form.
        values = {"text_form": "start_end"} | read_json_object(path)
        classes = values.pop("classes", None)  # of a model that was trained to name them
        video = values.pop("video", None)  # of a model of videos
        if values.get("format") != _FORMAT:
            raise ValueError(
                f"{path} has format {values.get('format')!r}, this version reads {_FORMAT}"
            )
        if set(values) != {"format", "image", "max_length", "text_form", "tokenizer"}:
            expected = "format, image, max_length, text_form and tokenizer"
            raise ValueError(f"{path} has {sorted(values)}, expected {expected}")
        try:
            image = from_dict(ImageTransform, values["image"], "image")
            tokenizer = restore_tokenizer(path.parent, values["tokenizer"])
            if classes is not None:
                classes = from_dict(Classes, classes, "classes")
            if video is not None:
                video = from_dict(VideoTransform, video, "video")
            return cls(tokenizer, image, values["max_length"], values["text_form"], classes, video)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{path} holds a value of the wrong type: {error}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
