"""Models of big_vision (github.com/google-research/big_vision) from `.npz` files: ViT, SigLIP's two towers, CapPa.

Such a file holds arrays under names and nothing else: names and shapes must tell what the model is.
What they do not tell is taken as big_vision's configs have it, and said in the notes of what is
opened. Nothing of big_vision is needed.

    params/...  opt/...  chrono/...   a train state, of which `params` are read
    opt/target/...                    the same, of before optax
    img/ txt/ t b                     two towers (models/proj/image_text/two_towers.py): SigLIP
    encoder/ decoder/ ...             an encoder and a decoder (models/proj/cappa/cappa.py): CapPa
    embedding/ Transformer/ ...       an image encoder alone (models/vit.py), also in the names of older versions
"""

import dataclasses
import pathlib
import re

from mammut.data.images import ImageTransform
from mammut.data.processor import Processor
from mammut.data.tokenizer import MissingTokenizer, Tokenizer, load_tokenizer
from mammut.weights.files.tensor_file import CheckpointError, open_tensors, stored_specs
from mammut.weights.formats.big_vision_tables import Found, Model, cappa, image_encoder, two_towers
from mammut.weights.opened import LazyTensors, OpenedModel, model_specs
from mammut.weights.tables import Table, unused_notes

_PATH = re.compile(r"(.+\.npz)(?::([\w/]+))?", re.DOTALL)
KIND = "file of big_vision's (.npz)"
# start, end and pad of big_vision's vocabularies, which have no start of their own
_SPECIAL_IDS = 0, 1, 0


def recognises(path: str | pathlib.Path) -> bool:
    """Whether `path` is an `.npz` file, or a part of one, "FILE.npz:img", with an image encoder.

    Every model of big_vision has one, and this kernel in it.

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
    """A SigLIP or CapPa model with its processor, or an image encoder alone; only headers are read.

    A SentencePiece `*.model` beside the file is taken for its vocabulary, if it is the only one.

    Args:
      path: the file; "FILE.npz:img" is the image encoder of a SigLIP, as in big_vision's own
        configs.
      image_size: of a model whose positions are computed (`posemb="sincos2d"`), which its file does
        not tell.
      max_length: the text length of a CapPa with computed positions.

    Raises:
      CheckpointError: the file is damaged, or of a model that mammut does not have. Every mismatch
        is named.
    """
    file, part = _PATH.fullmatch(str(path)).groups()
    theirs = open_tensors(file)
    found = Found(str(path), theirs.specs, f"{part}/" if part else "")
    if found.under("img/") and found.under("txt/"):
        model = two_towers(found)
    elif found.under("encoder/") and found.under("decoder/"):
        model = cappa(found, image_size, max_length)
    else:
        model = image_encoder(found, image_size)
    parts = ("vision",) if model.text_form is None else ("vision", "text", "rest")
    specs = {
        name: spec
        for name, spec in model_specs(model.config).items()
        if "rest" in parts or name.startswith("vision.")
    }
    unused = found.outside | {found.key(name): why for name, why in model.unused.items()}
    constant = {name: (0.0, why) for name, why in model.zero.items()}
    constant |= {name: (0.0, "computed") for name in model.computed}
    entries = [
        dataclasses.replace(entry, theirs=found.key(entry.theirs)) for entry in model.entries
    ]
    read = Table(entries, unused, constant).to_ours(theirs, specs, str(path)).read
    tensors = LazyTensors(
        specs, lambda name: model.computed[name]() if name in model.computed else read(name)
    )
    notes = (
        *unused_notes(unused),
        *(f"{name} is 0: {why}" for name, why in model.zero.items()),
        *model.notes,
    )
    processor = None if model.text_form is None else _processor(pathlib.Path(file), model)
    return OpenedModel(model.config, tensors, processor, str(path), parts, "bilinear", notes)


def _processor(file: pathlib.Path, model: Model) -> Processor:
    """Images and texts as in big_vision's configs, whose resize(...) is bilinear and takes no care of aliasing."""
    text = model.config.text
    transform = ImageTransform(model.config.vision.image_size, "squash", "bilinear_aliased")
    tokenizer = _tokenizer(file, text.vocab_size)
    if model.text_form == "start_end" and tokenizer.bos_id != 0:
        raise CheckpointError(
            f"the vocabulary beside {file} has the start id {tokenizer.bos_id}, CapPa starts with 0"
        )
    return Processor(tokenizer, transform, text.max_length, model.text_form)


def _tokenizer(file: pathlib.Path, vocab_size: int) -> Tokenizer:
    """The vocabulary beside the file; texts are lower-cased, as in big_vision's configs."""
    beside = sorted(file.parent.glob("*.model"))
    if len(beside) != 1:
        seen = f"there are {', '.join(path.name for path in beside)}" if beside else "there is none"
        needs = f"put its SentencePiece vocabulary, one *.model file, beside {file} ({seen})"
        return MissingTokenizer(_SPECIAL_IDS, vocab_size, needs)
    try:
        return load_tokenizer(beside[0], lowercase=True)
    except ValueError as error:
        raise CheckpointError(f"{file} is not loaded: {error}") from error
