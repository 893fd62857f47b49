"""The tokenizer of a Hugging Face language model: its tokenizer.json, or GPT-2's older pair of files made into one."""

import pathlib
from typing import Any

from mammut.core.files import read_json_object
from mammut.data.tokenizer import HuggingFaceTokenizer, MissingTokenizer, Tokenizer, load_tokenizer
from mammut.weights.formats.json_object import shown

_SPECIAL = "bos", "eos", "pad"


def open_tokenizer(folder: pathlib.Path, config: dict[str, Any], vocab_size: int) -> Tokenizer:
    """The tokenizer whose files are in `folder`; case is kept.

    Where there are none, a `MissingTokenizer` that knows the special ids of `config`, a
    config.json.

    Raises:
      ValueError: a file is damaged, or the vocabulary has no end token.
    """
    if (folder / "tokenizer.json").exists():
        return load_tokenizer(folder / "tokenizer.json", lowercase=False)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return _byte_level(folder)
    ids = (config.get(f"{role}_token_id") for role in _SPECIAL)
    known = tuple(
        token if type(token) is int and 0 <= token < vocab_size else None for token in ids
    )
    needs = f"put its tokenizer.json, or its vocab.json and merges.txt, into {folder}"
    return MissingTokenizer(known, vocab_size, needs)


def _byte_level(folder: pathlib.Path) -> Tokenizer:
    """GPT-2's byte-level BPE of vocab.json and merges.txt, with what added_tokens.json adds to it."""
    from tokenizers import Tokenizer as Pipeline
    from tokenizers import decoders, models, pre_tokenizers

    files = [
        folder / name
        for name in ("special_tokens_map.json", "tokenizer_config.json", "added_tokens.json")
    ]
    *told, added = (read_json_object(file) if file.exists() else {} for file in files)
    named = told[0] | told[1]
    try:
        pipeline = Pipeline(
            models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        )
    except Exception as error:  # the library raises its own kinds
        raise ValueError(
            f"{folder / 'vocab.json'} and merges.txt cannot be used as a vocabulary: {error}"
        ) from error
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=named.get("add_prefix_space") is True
    )
    pipeline.decoder = decoders.ByteLevel()
    # by id, whatever else it may be
    for token in sorted(added, key=lambda token: str(added[token]).zfill(8)):
        pipeline.add_special_tokens([token])
        if pipeline.token_to_id(token) != added[token]:
            raise ValueError(
                f"{files[-1]} gives {shown(token)} the id {shown(added[token])}, which is not the next one"
            )
    return HuggingFaceTokenizer(pipeline.to_str().encode(), False, named)
