"""Models of big_vision, from `.npz` files: ViT, SigLIP and CapPa.

Source: github.com/google-research/big_vision, of which nothing is needed. Such a file holds arrays
and their names, nothing else: names and shapes must show what the model is. Other settings
are taken from big_vision's configs, and the notes of the opened model report this.

    params/...  opt/...  chrono/...   a train state, of which `params` are read
    opt/target/...                    a train state from before optax
    img/ txt/ t b                     two towers (models/proj/image_text/two_towers.py): SigLIP
    encoder/ decoder/ ...             an encoder and a decoder (models/proj/cappa/cappa.py): CapPa
    embedding/ Transformer/ ...       an image encoder alone (models/vit.py), by new or old names
"""

import dataclasses
import pathlib
import re

import numpy as np

from mammut.data.images import ImageTransform
from mammut.data.processor import Processor
from mammut.data.tokenizer import MissingTokenizer, Tokenizer, load_tokenizer
from mammut.weights.files.tensor_file import CheckpointError, open_tensors, stored_specs
from mammut.weights.formats.big_vision_arrays import Arrays
from mammut.weights.formats.big_vision_tables import Model, cappa, image_encoder, two_towers
from mammut.weights.opened import LazyTensors, OpenedModel, model_specs
from mammut.weights.tables import Table, unused_notes

KIND = "file of big_vision's (.npz)"
_PATH = re.compile(r"(.+\.npz)(?::([\w/]+))?", re.DOTALL)
# Start, end and pad of big_vision's vocabularies, which have no start token of their own.
_SPECIAL_IDS = 0, 1, 0


def recognises(path: str | pathlib.Path) -> bool:
    """Whether `path` is an `.npz` file with an image encoder.

    It may also be a part of a file, such as "FILE.npz:img". Every model of big_vision has an image
    encoder, and every image encoder has a kernel of its patches.

    Raises:
      CheckpointError: the file is missing or damaged.
    """
    match = _PATH.fullmatch(str(path))
    if match is None:
        return False
    specs = stored_specs(pathlib.Path(match[1]))
    return any(f"/{name}".endswith("/embedding/kernel") for name in specs)


def open_model(
    path: str | pathlib.Path, *, image_size: int | None = None, max_length: int | None = None
) -> OpenedModel:
    """Opens a SigLIP, a CapPa or an image encoder alone.

    SigLIP and CapPa come with their processor. Only headers are read. The one SentencePiece
    `*.model` beside the file is taken as its vocabulary.

    Args:
      path: the file; "FILE.npz:img" is the image encoder of a SigLIP, as in big_vision's own
      configs.
      image_size: pixels, which the file does not give: it tells the number and size of the patches,
      which leave a rest of some sizes out. Needed with computed positions (`posemb="sincos2d"`).
      max_length: tokens of a text, for a CapPa with computed positions.

    Raises:
      CheckpointError: the file is damaged, or of a model that mammut does not have. Every mismatch
      is named.
    """
    file, part = _PATH.fullmatch(str(path)).groups()
    theirs = open_tensors(file)
    arrays = Arrays(str(path), theirs.specs, f"{part}/" if part else "")
    if arrays.under("img/") and arrays.under("txt/"):
        model = two_towers(arrays, image_size)
    elif arrays.under("encoder/") and arrays.under("decoder/"):
        model = cappa(arrays, image_size, max_length)
    else:
        model = image_encoder(arrays, image_size)
    whole = model.text_form is not None
    parts = ("vision", "text", "rest") if whole else ("vision",)
    specs = model_specs(model.config)
    if not whole:
        specs = {name: spec for name, spec in specs.items() if name.startswith("vision.")}

    unused = arrays.outside | {arrays.key(name): why for name, why in model.unused.items()}
    constant = {name: (0.0, why) for name, why in model.zero.items()}
    constant |= dict.fromkeys(model.computed, (0.0, "computed"))
    entries = [
        dataclasses.replace(entry, theirs=arrays.key(entry.theirs)) for entry in model.entries
    ]
    stored = Table(entries, unused, constant).to_ours(theirs, specs, str(path))

    def read(name: str) -> np.ndarray:
        if name in model.computed:
            return model.computed[name]()
        return stored.read(name)

    tensors = LazyTensors(specs, read)
    processor = _processor(pathlib.Path(file), model) if whole else None
    zero_notes = [f"{name} is 0: {why}" for name, why in model.zero.items()]
    notes = (*unused_notes(unused), *zero_notes, *model.notes)
    return OpenedModel(model.config, tensors, processor, str(path), parts, "bilinear", notes)


def _processor(file: pathlib.Path, model: Model) -> Processor:
    """Makes a processor as in big_vision's configs.

    resize(...) is bilinear, without antialiasing.
    """
    text = model.config.text
    transform = ImageTransform(model.config.vision.image_size, "squash", "bilinear_aliased")
    tokenizer = _tokenizer(file, text.vocab_size)
    if model.text_form == "start_end" and tokenizer.bos_id != 0:
        raise CheckpointError(
            f"the vocabulary beside {file} has the start id {tokenizer.bos_id}, CapPa starts with 0"
        )
    return Processor(tokenizer, transform, text.max_length, model.text_form)


def _tokenizer(file: pathlib.Path, vocab_size: int) -> Tokenizer:
    """Opens the vocabulary beside the file.

    Texts are lower-cased, as in big_vision's configs.
    """
    beside = sorted(file.parent.glob("*.model"))
    if len(beside) != 1:
        seen = "there is none"
        if beside:
            seen = f"there are {', '.join(path.name for path in beside)}"
        needs = f"put its SentencePiece vocabulary, one *.model file, beside {file} ({seen})"
        return MissingTokenizer(_SPECIAL_IDS, vocab_size, needs)
    try:
        return load_tokenizer(beside[0], lowercase=True)
    except ValueError as error:
        raise CheckpointError(f"{file} is not loaded: {error}") from error
