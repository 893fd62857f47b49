"""A model for CLIP_benchmark (LAION-AI/CLIP_benchmark 1.6, package `clip_benchmark`).

    model, transform, tokenizer = load("runs/flickr8k")
    loader = torch.utils.data.DataLoader(pictures(transform=transform), batch_size=64)
    settings = {"device": "cpu", "amp": False, "recall_k_list": [1, 5, 10]}
    zeroshot_retrieval.evaluate(model, loader, tokenizer, **settings)

For its command line, set `clip_benchmark.models.TYPE2FUNC["mammut"] = load` and add "mammut" to its
`MODEL_TYPES`; `--pretrained` is then the folder. By default (`amp=True`) CLIP_benchmark compares
embeddings in 16 bits.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

import mammut.weights.model_folder
from mammut.data.images import BadImage, ImageLike, ImageTransform
from mammut.data.processor import Processor
from mammut.data.video import is_video
from mammut.generation.rows import require_numbers
from mammut.generation.text import caption
from mammut.models.mammut import MaMMUT

_CLIP_END = 49_407  # "<end_of_text>" of CLIP's vocabulary


class ClipBenchmarkModel:
    """`encode_image`, `encode_text` and `generate` on torch tensors.

    The model itself runs in JAX, on JAX's device. `transform` and `tokenizer` make the inputs; both
    can be pickled, for the workers of a `DataLoader`.

    Args:
      batch_size: rows that the model runs at a time; batches of any size are cut or padded to it.
    """

    def __init__(self, model: MaMMUT, processor: Processor, batch_size: int = 64):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        self.transform = functools.partial(_pixels, processor.image)
        self.tokenizer = functools.partial(_tokenize, processor)
        self._model = model
        self._processor = processor
        self._batch_size = batch_size
        self._split = nnx.split(model)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings float32[B, E] of unit norm, on the device of the images.

        Args:
          images: uint8[B, height, width, 3], made by `transform`.
        """
        return self._in_batches(_encode_image, images, self._pixels_of(images))

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings float32[B, E] of unit norm, on the device of the tokens.

        Args:
          tokens: int64[B, L], made by `tokenizer`.

        Raises:
          ValueError: another tokenizer made them.
        """
        ids = tokens.cpu().numpy()
        vocab_size = self._processor.vocab_size
        in_range = not ids.size or -1 <= ids.min() <= ids.max() < vocab_size
        if ids.dtype != np.int64 or ids.ndim != 2 or not in_range:
            raise ValueError(
                f"tokens are {tokens.dtype}{list(tokens.shape)}, expected int64[B, L] of ids below "
                f"{vocab_size} and -1 at pads: the tokenizer that belongs to this model makes them"
            )
        valid = ids >= 0
        own_ids = np.where(valid, ids, 0).astype(np.int32)
        return self._in_batches(_encode_text, tokens, own_ids, valid)

    def generate(self, images: torch.Tensor) -> torch.Tensor:
        """Generates greedy captions as ids of CLIP's vocabulary.

        Returns int64[B, N].

        `clip_benchmark.metrics.captioning` decodes with CLIP's vocabulary, whatever the model's is.
        That vocabulary begins with the 256 single bytes: captions are spelled in them, and CLIP's
        vocabulary decodes them letter by letter.

        Args:
          images: uint8[B, height, width, 3], made by `transform`.
        """
        rows = list(self._pixels_of(images))
        texts = caption(self._model, self._processor, rows, batch_size=self._batch_size)
        return _spelled(texts).to(images.device)

    def to(self, *args: Any, **kwargs: Any) -> "ClipBenchmarkModel":
        """Does nothing: results go to the device of the inputs."""
        return self

    def eval(self) -> "ClipBenchmarkModel":
        """Does nothing: no layer behaves differently in training."""
        return self

    def train(self, mode: bool = True) -> "ClipBenchmarkModel":
        """Does nothing, as `eval`."""
        return self

    def _pixels_of(self, images: torch.Tensor) -> np.ndarray:
        size = self._processor.image.image_size
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (size, size, 3):
            raise ValueError(
                f"images are {images.dtype}{list(images.shape)}, expected "
                f"uint8[B, {size}, {size}, 3]: the transform that belongs to this model makes them"
            )
        return images.cpu().numpy()

    def _in_batches(self, encode: Any, inputs: torch.Tensor, *arrays: np.ndarray) -> torch.Tensor:
        """Embeds all rows of `arrays`.

        The embeddings are on the device of `inputs`.
        """
        embeds = []
        for start in range(0, max(1, len(inputs)), self._batch_size):
            chunk = [array[start : start + self._batch_size] for array in arrays]
            fill = self._batch_size - len(chunk[0])
            chunk = [np.pad(array, ((0, fill), *((0, 0),) * (array.ndim - 1))) for array in chunk]
            embeds.append(np.asarray(encode(*self._split, *chunk)))
            require_numbers(embeds[-1], "the model's embeddings")
        return torch.from_numpy(np.concatenate(embeds)[: len(inputs)].copy()).to(inputs.device)


def load(
    pretrained: str, model_name: str = "", cache_dir: str | None = None, device: Any = "cpu"
) -> tuple:
    """Loads (model, transform, tokenizer) for CLIP_benchmark.

    Args:
      pretrained: a model that `mammut.load` reads.
      model_name, cache_dir, device: not used; CLIP_benchmark gives them to every loader. JAX
        chooses the device itself.
    """
    model = ClipBenchmarkModel(*mammut.weights.model_folder.load(pretrained))
    return model, model.transform, model.tokenizer


def _pixels(transform: ImageTransform, picture: ImageLike) -> torch.Tensor:
    """Makes the model's input from a picture, uint8[height, width, 3].

    The model normalises it itself.
    """
    if is_video(picture):
        raise BadImage(
            f"image {picture!r:.80} is a video, expected a picture: CLIP_benchmark has sets of "
            "pictures alone, eval.retrieval and eval.classify score videos",
            "unsupported",
        )
    return torch.from_numpy(transform(picture))


def _tokenize(processor: Processor, texts: str | Sequence[str]) -> torch.Tensor:
    """Makes token ids int64[B, L], with -1 at pads.

    The id of the pad may also be the id of a word.
    """
    if isinstance(texts, str):
        texts = [texts]
    tokens, valid = processor.encode_text(texts)
    return torch.from_numpy(np.where(valid, tokens, -1).astype(np.int64))


def _spelled(texts: list[str]) -> torch.Tensor:
    """Writes the bytes of texts as ids of CLIP's vocabulary.

    Returns int64[B, N], with ends at the end of each row.
    """

    def not_printable(byte: int) -> bool:
        return not (33 <= byte < 127 or 161 <= byte < 173 or 174 <= byte)

    # CLIP's vocabulary has GPT-2's order of bytes: the printable ones first.
    order = sorted(range(256), key=not_printable)
    rows = [[order.index(byte) for byte in text.encode()] for text in texts]
    width = 1 + max(map(len, rows), default=0)
    filled = [row + [_CLIP_END] * (width - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.int64).reshape(len(rows), width)


@functools.partial(jax.jit, static_argnames="graphdef")
def _encode_image(graphdef, params, image):
    return nnx.merge(graphdef, params).encode_image(image)


@functools.partial(jax.jit, static_argnames="graphdef")
def _encode_text(graphdef, params, tokens, text_valid):
    return nnx.merge(graphdef, params).encode_text(tokens, text_valid)
