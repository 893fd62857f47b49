"""Help for tests of code that uses mammut: a tiny model, its processor, a batch for it, and the place of the shared data.

    model = mammut.MaMMUT(tiny_config(), rngs=nnx.Rngs(0))
    batch = tiny_batch(tiny_config())
    out = model.two_pass(batch["image"], batch["tokens"], batch["text_valid"])
"""

import os
import pathlib

import numpy as np

from mammut.config import DecoderConfig, ModelConfig, VisionConfig
from mammut.processor import ImageTransform, Processor
from mammut.tokenizer import train_sentencepiece


def tiny_config() -> ModelConfig:
    """The smallest model that has everything: 16-pixel images in 4 patches, 12 tokens, two cross-attention layers.

    No two sizes that could be mixed up are equal. Laid out for compile time; `presets.tiny()` is for training.
    """
    return ModelConfig(
        vision=VisionConfig(image_size=16, patch_size=8, width=32, depth=2, num_heads=2, mlp_dim=64),
        text=DecoderConfig(vocab_size=60, max_length=12, width=48, depth=4, num_heads=3, mlp_dim=80),
    )


def tiny_processor(config: ModelConfig | None = None) -> Processor:
    """A processor for `config` (default: `tiny_config()`) with a vocabulary of a few words: pad 0, start 1, end 2."""
    config = config or tiny_config()
    captions = [
        f"{count} {colour} {shape} on the {side}"
        for count in ("one", "two", "three")
        for colour in ("red", "green", "blue")
        for shape in ("circle", "square")
        for side in ("left", "right")
    ]
    tokenizer = train_sentencepiece(captions, config.text.vocab_size, lowercase=True)
    return Processor(tokenizer, ImageTransform(config.vision.image_size), config.text.max_length)


def tiny_batch(config: ModelConfig | None = None, batch_size: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    """A random batch for `config` (default: `tiny_config()`), the same for the same `seed`.

    Texts are a start (1), ids from 3 up, an end (2) and pads (0), of differing lengths; the first has no pads.

    Returns:
      `image` uint8[B, height, width, 3], `tokens` int32[B, L], `text_valid` bool[B, L].
    """
    config = config or tiny_config()
    rng = np.random.default_rng(seed)
    size, longest = config.vision.image_size, config.text.max_length
    lengths = rng.integers(min(3, longest), longest + 1, batch_size)
    lengths[:1] = longest
    tokens = rng.integers(3, config.text.vocab_size, (batch_size, longest), np.int32)
    tokens[:, 0] = 1
    tokens[np.arange(batch_size), lengths - 1] = 2
    text_valid = np.arange(longest) < lengths[:, None]
    image = rng.integers(0, 256, (batch_size, size, size, 3), np.uint8)
    return {"image": image, "tokens": np.where(text_valid, tokens, 0).astype(np.int32), "text_valid": text_valid}


def shared_dir() -> pathlib.Path | None:
    """The folder with data sets, fixtures and vocabularies that the repository does not contain; None if absent.

    `MAMMUT_SHARED` names it; without that it is `shared` beside the checkout.
    """
    default = pathlib.Path(__file__).resolve().parents[2] / "shared"
    path = pathlib.Path(os.environ.get("MAMMUT_SHARED", default))
    return path if path.is_dir() else None
