"""Text to ids and back: CLIP's byte-pair vocabulary, SentencePiece, Hugging Face `tokenizer.json`.

`load_tokenizer` reads a user's vocabulary file, `train_sentencepiece` makes one from captions, `restore_tokenizer` reads
back what `Tokenizer.save` wrote. The special ids of a SentencePiece or Hugging Face vocabulary:

  end    must exist; a vocabulary without one is refused
  pad    its own pad, else the end id
  start  its own start (or BERT's [CLS]), else its own pad (what T5's decoder starts with), else the end id

No id marks a pad: 0 is "!" in CLIP's vocabulary and its pad, too. `text_valid` of the processor marks the real tokens.
"""

import gzip
import html
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

_CLIP_MERGES = 49_152 - 256 - 2  # the file holds more lines than CLIP uses
_CLIP_SPECIAL = "<start_of_text>", "<end_of_text>"
_CLIP_WORDS = r"<start_of_text>|<end_of_text>|(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_HF_END = "<|endoftext|>", "</s>", "[SEP]", "<|end_of_text|>", "<end_of_text>", "<|im_end|>", "<eos>"
_HF_PAD = "<pad>", "[PAD]", "<|pad|>"
_HF_START = "<|startoftext|>", "<start_of_text>", "<s>", "[CLS]", "<|begin_of_text|>", "<bos>"
_MIN_VOCAB_FOR_BYTES = 512  # byte pieces take 256 places; a smaller vocabulary needs them for characters and words


class Tokenizer:
    """Text to ids and back. Use `load_tokenizer` or `train_sentencepiece` to make one.

    `lowercase` says whether text is lower-cased before it is encoded. `vocab_size` is one more than the largest id.
    """

    kind: str
    file: str  # its name in a saved folder

    def __init__(self, content: bytes, lowercase: bool, special_ids: tuple[int, int, int], vocab_size: int):
        self._content = content
        self.lowercase = lowercase
        self.bos_id, self.eos_id, self.pad_id = special_ids
        self.vocab_size = vocab_size
        if not 0 <= min(special_ids) <= max(special_ids) < vocab_size:
            raise ValueError(f"start, end and pad ids are {special_ids}, expected ids below vocab_size {vocab_size}")

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without start and end. Unlike CLIP's own, the other kinds never read an end in `text`."""
        return self._encode(_clean(text, self.lowercase))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` up to the first end id; start ids are skipped. CLIP's vocabulary leaves a space at the end.

        Raises:
          ValueError: an id before the end is outside the vocabulary.
        """
        ids = [int(token) for token in ids]
        if ids[:1] == [self.bos_id]:  # first of all, because GPT-2 starts and ends with the same id
            ids = ids[1:]
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"id {token} is outside the {self.kind} vocabulary, expected 0 to {self.vocab_size - 1}")
        return self._decode([token for token in ids if token != self.bos_id])

    def settings(self) -> dict[str, Any]:
        """What `restore_tokenizer` needs beside the vocabulary file, as JSON values."""
        names = "kind", "lowercase", "vocab_size", "bos_id", "eos_id", "pad_id"
        return {name: getattr(self, name) for name in names}

    def save(self, folder: pathlib.Path) -> dict[str, Any]:
        """Writes the vocabulary file into `folder` and returns `settings()`."""
        (folder / self.file).write_bytes(self._content)
        return self.settings()

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError


class ClipTokenizer(Tokenizer):
    """CLIP's byte-pair encoding of cleaned, lower-cased text, with open_clip's ids for every string.

    As there, "<start_of_text>" and "<end_of_text>" in a text become the special ids.
    """

    kind = "clip"
    file = "tokenizer.txt.gz"

    def __init__(self, content: bytes, lowercase: bool, special_ids: tuple[int, int, int] | None = None):
        from tokenizers import Regex, Tokenizer as Pipeline, models, pre_tokenizers

        lines = gzip.decompress(content).decode("utf-8").split("\n")[1 : 1 + _CLIP_MERGES]
        merges = [tuple(line.split()) for line in lines]
        if len(merges) < _CLIP_MERGES or any(len(merge) != 2 for merge in merges):
            raise ValueError(f"expected a heading and {_CLIP_MERGES} lines of two pieces")
        self._bytes = _visible_bytes()
        units = [*self._bytes, *(unit + "</w>" for unit in self._bytes)]
        self._pieces = [*units, *("".join(merge) for merge in merges), *_CLIP_SPECIAL]
        ids = {piece: token for token, piece in enumerate(self._pieces)}
        self._special = {text: ids[text] for text in _CLIP_SPECIAL}
        self._words = pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True)
        self._pipeline = Pipeline(models.BPE(vocab=ids, merges=merges, end_of_word_suffix="</w>"))
        self._pipeline.pre_tokenizer = pre_tokenizers.Sequence(
            [self._words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        super().__init__(content, True, special_ids or (*self._special.values(), 0), len(ids))

    def _encode(self, text: str) -> list[int]:
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        text = " ".join(text.split()).lower()
        if not any(special in text for special in _CLIP_SPECIAL):
            return self._pipeline.encode(text, add_special_tokens=False).ids
        words = [word for word, _ in self._words.pre_tokenize_str(text)]
        ids = ([self._special[word]] if word in self._special else self._pipeline.encode(word).ids for word in words)
        return [token for word in ids for token in word]

    def _decode(self, ids: list[int]) -> str:
        text = "".join(self._pieces[token] for token in ids)
        return bytes(map(self._bytes.get, text)).decode("utf-8", errors="replace").replace("</w>", " ")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, unigram or byte-pair; "</s>" in a text is ordinary text."""

    kind = "sentencepiece"
    file = "tokenizer.model"

    def __init__(self, content: bytes, lowercase: bool, special_ids: tuple[int, int, int] | None = None):
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        if special_ids is None:
            found = (self._model.bos_id(), self._model.eos_id(), self._model.pad_id())
            special_ids = _special_ids(*(None if token < 0 else token for token in found))
        super().__init__(content, lowercase, special_ids, self._model.vocab_size())

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`; its own truncation, padding and special-token template are not used."""

    kind = "huggingface"
    file = "tokenizer.json"

    def __init__(self, content: bytes, lowercase: bool, special_ids: tuple[int, int, int] | None = None):
        from tokenizers import Tokenizer as Pipeline

        self._pipeline = Pipeline.from_str(content.decode("utf-8"))
        self._pipeline.no_truncation()
        self._pipeline.no_padding()
        self._pipeline.encode_special_tokens = True  # "</s>" in a text is text
        special_ids = special_ids or find_special_ids({}, self._pipeline.token_to_id)
        super().__init__(content, lowercase, special_ids, 1 + max(self._pipeline.get_vocab().values()))

    def _encode(self, text: str) -> list[int]:
        # A unigram vocabulary lists "</s>" as a piece like any other, so that its id can still come out of a text.
        ids = self._pipeline.encode(text, add_special_tokens=False).ids
        return [token for token in ids if token not in (self.bos_id, self.eos_id)]

    def _decode(self, ids: list[int]) -> str:
        return self._pipeline.decode(ids, skip_special_tokens=True)


def load_tokenizer(path: str | pathlib.Path, lowercase: bool) -> Tokenizer:
    """Reads a vocabulary file: CLIP's `*.txt.gz`, a SentencePiece `*.model` or a Hugging Face `tokenizer.json`.

    The special tokens of a `tokenizer.json` are those that `tokenizer_config.json` or `special_tokens_map.json` beside it
    name, else well-known ones such as <|endoftext|>, </s> and [SEP]. CLIP's vocabulary lower-cases in any case.

    Raises:
      ValueError: `path` is missing, of no known kind, damaged, or has no end token.
    """
    path = pathlib.Path(path)
    kinds = {".txt.gz": ClipTokenizer, ".model": SentencePieceTokenizer, ".json": HuggingFaceTokenizer}
    cls = next((cls for suffix, cls in kinds.items() if path.name.endswith(suffix)), None)
    if cls is None:
        raise ValueError(f"vocabulary {path} is of no known kind, expected a *.txt.gz, *.model or *.json file")
    named = _named_special_tokens(path.parent) if cls is HuggingFaceTokenizer else {}
    tokenizer = _build(cls, path, lowercase)
    return tokenizer


def restore_tokenizer(folder: pathlib.Path, settings: dict[str, Any]) -> Tokenizer:
    """The tokenizer whose `save(folder)` returned `settings`; raises ValueError when file and settings do not fit."""
