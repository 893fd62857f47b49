"""The tokenizer that open_clip would make for a model.

It is made from local files; nothing is downloaded.
"""

import gzip
import importlib.util
import json
import pathlib
from typing import Any

from mammut.core.files import read_json_object
from mammut.core.mapped_file import MAX_HEADER
from mammut.data.tokenizer import ClipTokenizer, MissingTokenizer, Tokenizer, load_tokenizer
from mammut.weights.formats.json_object import shown
from mammut.weights.formats.open_clip_config import CLIP_VOCAB

_CLIP_IDS = 49_406, 49_407, 0  # start, end, pad
_CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"
_CLIP_MERGES = 48_894
_SPECIAL = "bos", "eos", "pad"


def open_tokenizer(folder: pathlib.Path, text_cfg: dict[str, Any], vocab_size: int) -> Tokenizer:
    """Opens the tokenizer of a `text_cfg` or `multimodal_cfg`.

    Without its vocabulary, the special ids may still be known: it is then a `MissingTokenizer`,
    which refuses texts.

    Args:
      folder: the folder with the files of the tokenizer.
      text_cfg: the object of `open_clip_config.json`.
      vocab_size: the number of ids of the model.

    Raises:
      ValueError: a file is damaged, or texts would not become `[start] ids [end]`, as our models
        take them.
    """
    kind = text_cfg.get("tokenizer_type")
    name = text_cfg.get("hf_tokenizer_name")
    mode = text_cfg.get("tokenizer_mode")
    options = text_cfg.get("tokenizer_kwargs") or {}
    if not isinstance(options, dict):
        raise ValueError(f"its tokenizer_kwargs are {shown(options)}, expected an object")
    default = "lower"
    if kind == "tiktoken":
        default = None
    elif name:
        default = "whitespace"
    clean = options.get("clean", default)
    if kind not in (None, "", "tiktoken") or clean not in (None, "whitespace", "lower") or mode:
        raise ValueError(
            f"its tokenizer has tokenizer_type {shown(kind)}, tokenizer_mode {shown(mode)} "
            f"and clean {shown(clean)}, "
            'expected "tiktoken" or null, no mode, and "whitespace", "lower" or null'
        )
    known = {"clean", *(key for key in ("add_bos", "add_eos") if options.get(key) is True)}
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"its tokenizer_kwargs have {', '.join(unknown)}, which mammut cannot do")
    if kind or name:
        return _named(folder, text_cfg, vocab_size, clean)
    if clean != "lower":
        raise ValueError(f'its tokenizer is CLIP\'s with clean {shown(clean)}, expected "lower"')
    return _clip(folder, text_cfg, vocab_size)


def _clip(folder: pathlib.Path, text_cfg: dict[str, Any], vocab_size: int) -> Tokenizer:
    """Opens CLIP's byte-pair encoding or a SentencePiece model.

    The SentencePiece model is a file that somebody put into the folder; its tokenizer does not
    change the texts.
    """
    if files := [*sorted(folder.glob("*.txt.gz")), *sorted(folder.glob("*.model"))]:
        return load_tokenizer(files[0], lowercase=False)
    path = folder / "tokenizer.json"
    if path.exists() and (merges := _merges(path)):
        try:
            return ClipTokenizer(merges, True)
        except Exception as error:  # the library raises its own kinds of errors
            raise ValueError(f"{path} has merges that are not CLIP's: {error}") from error
    if vocab_size < CLIP_VOCAB:
        needs = (
            f"its {vocab_size} ids are too few for CLIP's: "
            f"put its *.model or *.txt.gz into {folder}"
        )
        return MissingTokenizer(_special_ids(text_cfg, vocab_size), vocab_size, needs)
    package = importlib.util.find_spec("open_clip")
    if package is not None:
        for location in package.submodule_search_locations or ():
            vocabulary = pathlib.Path(location) / _CLIP_FILE
            if vocabulary.exists():
                return load_tokenizer(vocabulary, lowercase=True)
    return MissingTokenizer(_CLIP_IDS, CLIP_VOCAB, f"put open_clip's {_CLIP_FILE} into {folder}")


def _merges(path: pathlib.Path) -> bytes | None:
    """Reads CLIP's merges from a Hugging Face `tokenizer.json`.

    They are returned as the file that `ClipTokenizer` reads. None: the merges are not CLIP's.
    """
    model = read_json_object(path, MAX_HEADER).get("model")
    merges = model.get("merges") if isinstance(model, dict) else None
    if not isinstance(merges, list) or len(merges) != _CLIP_MERGES:
        return None
    lines = [merge if isinstance(merge, str) else " ".join(map(str, merge)) for merge in merges]
    return gzip.compress("\n".join(["", *lines]).encode())


def _named(
    folder: pathlib.Path, text_cfg: dict[str, Any], vocab_size: int, clean: str | None
) -> Tokenizer:
    """Opens a tokenizer of tiktoken or Hugging Face.

    It is read from a `tokenizer.json`.
    """
    path = folder / "tokenizer.json"
    ids = _special_ids(text_cfg, vocab_size)
    if not path.exists():
        return MissingTokenizer(ids, vocab_size, f"put its tokenizer.json into {folder}")
    named: dict[str, Any] = {
        f"{role}_token_id": token
        for role, token in zip(_SPECIAL, ids, strict=True)
        if token is not None
    }
    if clean:
        named["fix_text"] = True
    tokenizer = load_tokenizer(path, clean == "lower", **named)
    if text_cfg.get("hf_tokenizer_name"):
        _check_template(path, tokenizer)
    return tokenizer


def _special_ids(
    text_cfg: dict[str, Any], vocab_size: int
) -> tuple[int | None, int | None, int | None]:
    """Reads the start, end and pad ids of the config.

    None stands for an id that the config does not give.
    """
    ids = [text_cfg.get(f"{role}_id") for role in _SPECIAL]
    for role, token in zip(_SPECIAL, ids, strict=True):
        if token is not None and not (type(token) is int and 0 <= token < vocab_size):
            raise ValueError(
                f"{role}_id is {shown(token)}, expected one of the {vocab_size} of the vocabulary"
            )
    return tuple(ids)


def _check_template(path: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Checks that `tokenizer.json` adds only start and end ids.

    Raises:
      ValueError: it adds other ids to a text.
    """
    from tokenizers import Tokenizer as Pipeline

    ids = Pipeline.from_str(path.read_text("utf-8")).encode("a dog").ids
    if ids != [tokenizer.bos_id, *tokenizer.encode("a dog"), tokenizer.eos_id]:
        raise ValueError(
            f"{path} makes {json.dumps(ids)} of 'a dog', "
            "expected its ids between a start and an end"
        )
