"""Language models of Hugging Face: GPT-2, GPT-Neo, GPT-J and GPT-NeoX (Pythia).

A folder as transformers saves it holds config.json, the weights (one file of safetensors or its
shards with their index, or one pytorch_model.bin) and the tokenizer. `huggingface_config` reads the
config, `huggingface_tables` the weights, `huggingface_tokenizer` the tokenizer. Such a folder holds
a text decoder alone.
"""

import os
import pathlib

import numpy as np

from mammut.core.files import read_json_object
from mammut.data.images import ImageTransform
from mammut.data.processor import Processor
from mammut.models.decoder import DecoderConfig
from mammut.models.mammut import ModelConfig
from mammut.models.vit import VisionConfig
from mammut.weights.files.tensor_file import CheckpointError, open_tensors
from mammut.weights.formats import open_clip_folder
from mammut.weights.formats.huggingface_config import decoder_config
from mammut.weights.formats.huggingface_tables import table
from mammut.weights.formats.huggingface_tokenizer import open_tokenizer
from mammut.weights.opened import LazyTensors, OpenedModel, Tensors, model_specs
from mammut.weights.tables import Table

KIND = "folder of a language model (no config.json with a model_type)"
CONFIG_FILE = "config.json"
_WEIGHTS = "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin"
# A `ModelConfig` needs an image encoder, and such a folder has none: a minimal one stands in for
# it.
_NO_VISION = VisionConfig(width=8, depth=1, num_heads=1, mlp_dim=8, image_size=16)
_EMBEDDING = "text.token_embed.embedding"


def recognises(path: pathlib.Path) -> bool:
    """Whether `path` is a folder of a transformers model.

    The config.json of such a model has a `model_type`. Folders of open_clip and of timm may have
    one, too. But an open_clip folder has open_clip's config beside it, and timm writes an
    `architecture` in config.json.

    Raises:
      CheckpointError: config.json is no JSON object.
    """
    if not os.path.exists(path / CONFIG_FILE) or os.path.exists(
        path / open_clip_folder.CONFIG_FILE
    ):
        return False
    config = read_json_object(path / CONFIG_FILE)
    return "model_type" in config and "architecture" not in config


def open_model(folder: pathlib.Path, *, image_size: int | None = None) -> OpenedModel:
    """Opens a language model with its tokenizer.

    Its one part is "text". Only the headers of the weights are read.

    Args:
      folder: a folder that `recognises` accepts.
      image_size: not used: there are no images.

    Raises:
      CheckpointError: a file is damaged or missing, the config is of a model that mammut does not
      have, or weights or tokenizer do not fit it. Every mismatch is named.
    """
    values = read_json_object(folder / CONFIG_FILE)
    config = model_config(decoder_config(values, str(folder / CONFIG_FILE)))
    weights = next((folder / name for name in _WEIGHTS if os.path.exists(folder / name)), None)
    if weights is None:
        raise CheckpointError(
            f"{folder} has a {CONFIG_FILE} and no weights, expected one of {', '.join(_WEIGHTS)}"
        )
    theirs = open_tensors(weights)
    rules = table(values["model_type"], config.text, theirs.specs)
    specs = {path: spec for path, spec in model_specs(config).items() if path.startswith("text.")}
    tensors = _compared(rules.to_ours(theirs, specs, str(weights)), rules, theirs)
    try:
        tokenizer = open_tokenizer(folder, values, config.text.vocab_size)
        processor = Processor(
            tokenizer, ImageTransform(config.vision.image_size), config.text_length
        )
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    notes = tuple(
        f"{name} of {weights} is not used: {reason}" for name, reason in rules.unused.items()
    )
    return OpenedModel(config, tensors, processor, str(folder), parts=("text",), notes=notes)


def model_config(text: DecoderConfig) -> ModelConfig:
    """Makes a model config with this decoder.

    The other parts mean nothing.
    """
    return ModelConfig(
        vision=_NO_VISION,
        text=text,
        image_projection="decoder",
        prefix_tokens=1,
    )


def _compared(ours: Tensors, rules: Table, theirs: Tensors) -> LazyTensors:
    """Adds a check of the embedding to `ours`.

    The check compares it with the tied head, where a file has the head as well. Reading the
    embedding raises CheckpointError where the two differ.
    """
    names = [entry.theirs for entry in rules.entries if entry.ours == (_EMBEDDING,)]

    def read(path: str) -> np.ndarray:
        if path == _EMBEDDING and len({theirs.read(name).tobytes() for name in names}) > 1:
            raise CheckpointError(
                f"{' and '.join(names)} differ, which tie_word_embeddings in config.json makes one"
            )
        return ours.read(path)

    return LazyTensors(ours.specs, read)
