"""The tokenizer of a Hugging Face language model.

It is read from its tokenizer.json, or from GPT-2's older pair of files, vocab.json and merges.txt.
"""

import pathlib
from typing import Any

from mammut.core.files import read_json_object
from mammut.data.tokenizer import HuggingFaceTokenizer, MissingTokenizer, Tokenizer, load_tokenizer
from mammut.weights.formats.json_object import shown

_SPECIAL = "bos", "eos", "pad"


def open_tokenizer(folder: pathlib.Path, config: dict[str, Any], vocab_size: int) -> Tokenizer:
    """Opens the tokenizer whose files are in `folder`.

    It keeps upper and lower case. Without files it is a `MissingTokenizer`, which knows the special
    ids.

    Args:
      folder: the folder of the model.
      config: the values of its config.json, with the special ids.
      vocab_size: the number of ids of the model.

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
    """Opens GPT-2's byte-level BPE from vocab.json and merges.txt.

    The ids of added_tokens.json are added.
    """
    from tokenizers import Tokenizer as Pipeline
    from tokenizers import decoders, models, pre_tokenizers

    def read(name: str) -> dict[str, Any]:
        if not (folder / name).exists():
            return {}
        return read_json_object(folder / name)

    named = read("special_tokens_map.json") | read("tokenizer_config.json")
    added = read("added_tokens.json")
    try:
        pipeline = Pipeline(
            models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        )
    except Exception as error:  # the library raises its own kinds of errors
        raise ValueError(
            f"{folder / 'vocab.json'} and merges.txt cannot be used as a vocabulary: {error}"
        ) from error
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=named.get("add_prefix_space") is True
    )
    pipeline.decoder = decoders.ByteLevel()
    # In the order of the ids, which may be anything: the file is foreign.
    for token in sorted(added, key=lambda token: str(added[token]).zfill(8)):
        pipeline.add_special_tokens([token])
        if pipeline.token_to_id(token) != added[token]:
            raise ValueError(
                f"{folder / 'added_tokens.json'} gives {shown(token)} "
                f"the id {shown(added[token])}, which is not the next one"
            )
    return HuggingFaceTokenizer(pipeline.to_str().encode(), False, named)
