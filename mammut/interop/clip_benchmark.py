"""A model as CLIP_benchmark (LAION-AI/CLIP_benchmark 1.6, package `clip_benchmark`) scores it.

    model, transform, tokenizer = load("runs/flickr8k") loader =
    torch.utils.data.DataLoader(dataset_of_pictures(transform=transform), batch_size=64)
    zeroshot_retrieval.evaluate(model, loader, tokenizer, device="cpu", amp=False, recall_k_list=[1,
    5, 10])

Its command line takes the model with `clip_benchmark.models.TYPE2FUNC["mammut"] = load` and
"mammut" among its `MODEL_TYPES`; `--pretrained` is then the folder. By default (`amp=True`) it
compares embeddings in 16 bits.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

import mammut.weights.model_folder
from mammut.data.images import ImageLike, ImageTransform
from mammut.data.processor import Processor
from mammut.generation.text import caption
from mammut.models.mammut import MaMMUT

_CLIP_END = 49_407  # "<end_of_text>" of CLIP's vocabulary


class ClipBenchmarkModel:
    """`encode_image`, `encode_text` and `generate` on torch tensors; the model itself runs in JAX, on JAX's device.

    `transform` and `tokenizer` make what they take. Both can be pickled, for the workers of a
    `DataLoader`.

    Args:
      batch_size: rows the model takes at a time; batches of any size are cut and filled up to it.
    """

    def __init__(self, model: MaMMUT, processor: Processor, batch_size: int = 64):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        self.transform = functools.partial(_pixels, processor.image)
        self.tokenizer = functools.partial(_tokenize, processor)
        self._model, self._processor, self._batch_size = model, processor, batch_size
        self._split = nnx.split(model)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings float32[B, E] of unit norm, on the device of `images`, which `transform` made."""
        return self._in_batches(_encode_image, images, self._pixels_of(images))

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings float32[B, E] of unit norm, on the device of `tokens`, which `tokenizer` made.

        Raises:
          ValueError: another tokenizer made them.
        """
        ids, vocab_size = tokens.cpu().numpy(), self._processor.vocab_size
        if (
            ids.dtype != np.int64
            or ids.ndim != 2
            or ids.size
            and not -1 <= ids.min() <= ids.max() < vocab_size
        ):
            raise ValueError(
                f"tokens are {tokens.dtype}{list(tokens.shape)}, expected int64[B, L] of ids below {vocab_size} and -1 "
                "at pads: the tokenizer that belongs to this model makes them"
            )
        valid = ids >= 0
        return self._in_batches(
            _encode_text, tokens, np.where(valid, ids, 0).astype(np.int32), valid
        )

    def generate(self, images: torch.Tensor) -> torch.Tensor:
        """Greedy captions of images that `transform` made, as int64[B, N] ids of CLIP's vocabulary.

        `clip_benchmark.metrics.captioning` decodes with CLIP's vocabulary whatever the model's is.
        That vocabulary begins with the 256 single bytes: each caption is spelled in these, and
        comes back letter by letter.
        """
        rows = list(self._pixels_of(images))
        texts = caption(self._model, self._processor, rows, batch_size=self._batch_size)
        return _spelled(texts).to(images.device)

    def to(self, *args: Any, **kwargs: Any) -> "ClipBenchmarkModel":
        """Nothing to do: results go to the device of what was given."""
        return self

    def eval(self) -> "ClipBenchmarkModel":
        """Nothing to do: no layer behaves otherwise in training."""
        return self

    def train(self, mode: bool = True) -> "ClipBenchmarkModel":
        """Nothing to do, as `eval`."""
        return self

    def _pixels_of(self, images: torch.Tensor) -> np.ndarray:
        size = self._processor.image.image_size
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (size, size, 3):
            raise ValueError(
                f"images are {images.dtype}{list(images.shape)}, expected uint8[B, {size}, {size}, 3]: the transform "
                "that belongs to this model makes them"
            )
        return images.cpu().numpy()

    def _in_batches(self, encode: Any, given: torch.Tensor, *arrays: np.ndarray) -> torch.Tensor:
        embeds = []
        for start in range(0, max(1, len(given)), self._batch_size):
            chunk = [array[start : start + self._batch_size] for array in arrays]
            fill = self._batch_size - len(chunk[0])
            chunk = [np.pad(array, ((0, fill), *((0, 0),) * (array.ndim - 1))) for array in chunk]
            embeds.append(np.asarray(encode(*self._split, *chunk)))
        return torch.from_numpy(np.concatenate(embeds)[: len(given)].copy()).to(given.device)


def load(
    pretrained: str, model_name: str = "", cache_dir: str | None = None, device: Any = "cpu"
) -> tuple:
    """(model, transform, tokenizer) of a folder that `mammut.load` reads: what CLIP_benchmark wants of a loader.

    The other arguments are those that it calls every loader with; JAX chooses the device itself.
    """
    model = ClipBenchmarkModel(*mammut.weights.model_folder.load(pretrained))
    return model, model.transform, model.tokenizer


def _pixels(transform: ImageTransform, picture: ImageLike) -> torch.Tensor:
    """uint8[height, width, 3]: exactly what the model is given; mean and deviation are its own affair."""
    return torch.from_numpy(transform(picture))


def _tokenize(processor: Processor, texts: str | Sequence[str]) -> torch.Tensor:
    """int64[B, L] with -1 at pads: no id marks them, since the pad's may be a word's, too."""
    tokens, valid = processor.encode_text([texts] if isinstance(texts, str) else texts)
    return torch.from_numpy(np.where(valid, tokens, -1).astype(np.int64))


def _spelled(texts: list[str]) -> torch.Tensor:
    # GPT-2's order of bytes: the printable ones first.
    order = sorted(
        range(256), key=lambda byte: not (33 <= byte < 127 or 161 <= byte < 173 or 174 <= byte)
    )
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
