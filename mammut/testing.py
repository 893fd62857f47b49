"""Helpers for tests of code that uses mammut.

They make a tiny model, processor and batch, and find the folder of shared data.
"""

import functools
import os
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mammut.data.images import ImageTransform
from mammut.data.processor import Processor
from mammut.data.tokenizer import train_sentencepiece
from mammut.models.compute import ComputeConfig
from mammut.models.decoder import DecoderConfig
from mammut.models.mammut import MaMMUT, ModelConfig
from mammut.models.vit import VisionConfig


def tiny_config() -> ModelConfig:
    """Makes the config of the smallest model with all parts.

    It has 4 patches, 12 tokens and two cross-attention layers. Images have 16 pixels a side. Sizes
    that could be mixed up differ. It compiles fast; for training, `presets.tiny()` is better.
    """
    return ModelConfig(
        vision=VisionConfig(
            image_size=16, patch_size=8, width=32, depth=2, num_heads=2, mlp_dim=64
        ),
        text=DecoderConfig(
            vocab_size=60, max_length=12, width=48, depth=4, num_heads=3, mlp_dim=80
        ),
    )


def tiny_model(
    config: ModelConfig | None = None, seed: int = 0, compute: ComputeConfig = ComputeConfig()
) -> MaMMUT:
    """Makes a model with random numbers in every parameter.

    Biases of 0 and norms of 1 would hide errors. Nothing is compiled. A parameter is the same in
    all configs where it has the same name and shape.

    Args:
      config: the model's config; None: `tiny_config()`.
      seed: random seed of the numbers.

    Example:
      >>> model = testing.tiny_model()
      >>> batch = testing.tiny_batch()
      >>> model.encode_image(batch["image"]).shape
      (4, 48)
    """

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = 0.2 * rng.normal(size=leaf.shape)
        if "['variance']" in name:
            values = 1 + np.abs(values)
        elif "['scale']" in name or "['gain']" in name:
            values = 1 + values
        return jnp.asarray(values, leaf.dtype)

    graphdef, params = _abstract_model(config or tiny_config(), compute)
    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, params))


@functools.cache
def _abstract_model(config: ModelConfig, compute: ComputeConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Splits a model without numbers; most tests make the same few models again and again."""

    def make() -> MaMMUT:
        return MaMMUT(config, compute=compute, rngs=nnx.Rngs(0))

    return nnx.split(nnx.eval_shape(make))


def tiny_processor(config: ModelConfig | None = None) -> Processor:
    """Makes a processor that knows a few words.

    Its special ids are pad 0, start 1, end 2 and unknown 3. It fits `config`; None:
    `tiny_config()`.
    """
    config = config or tiny_config()
    colours = ("red", "green", "blue", "yellow")
    shapes = ("circle", "square", "triangle")
    captions = [
        f"one {colour} {shape} on the left or right" for colour in colours for shape in shapes
    ]
    tokenizer = train_sentencepiece(captions, config.text.vocab_size, lowercase=True)
    return Processor(tokenizer, ImageTransform(config.vision.image_size), config.text_length)


def tiny_batch(
    config: ModelConfig | None = None,
    batch_size: int = 4,
    seed: int = 0,
    frames: int | None = None,
) -> dict[str, np.ndarray]:
    """Makes a random batch for `config`; the first text has no pads.

    Args:
      config: the model's config; None: `tiny_config()`.
      batch_size: B.
      seed: random seed of the numbers.
      frames: T of a batch of videos; None: images.

    Returns:
      `image` uint8[B, height, width, 3] or, for videos, uint8[B, T, height, width, 3],
      `tokens` int32[B, L], `text_valid` bool[B, L].
    """
    config = config or tiny_config()
    rng = np.random.default_rng(seed)
    size = config.vision.image_size
    longest = config.text_length
    lengths = rng.integers(min(3, longest), longest + 1, batch_size)
    lengths[:1] = longest
    tokens = rng.integers(3, config.text.vocab_size, (batch_size, longest), np.int32)
    tokens[:, 0] = 1
    tokens[np.arange(batch_size), lengths - 1] = 2
    text_valid = np.arange(longest) < lengths[:, None]
    axes = (batch_size,) if frames is None else (batch_size, frames)
    image = rng.integers(0, 256, (*axes, size, size, 3), np.uint8)
    return {"image": image, "tokens": tokens * text_valid, "text_valid": text_valid}


def shared_dir() -> pathlib.Path | None:
    """Finds the shared folder outside the repository.

    It holds data sets, fixtures and vocabularies. The result is None if it is absent.
    `MAMMUT_SHARED` names it; by default it is `shared` beside the checkout.
    """
    default = pathlib.Path(__file__).resolve().parents[2] / "shared"
    path = pathlib.Path(os.environ.get("MAMMUT_SHARED", default))
    return path if path.is_dir() else None


def shared_data(name: str) -> pathlib.Path:
    """Finds the data set `name` in the shared folder.

    The path is below `shared` in the current folder where there is no shared folder.
    """
    return (shared_dir() or pathlib.Path("shared")) / "data" / name
