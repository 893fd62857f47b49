"""The kinds of tokenizer: CLIP's byte pairs, SentencePiece, Hugging Face's, and a missing one.

`mammut.data.tokenizer` makes them from files, and has the rules for their special ids.
"""

import abc
import gzip
import html
import io
import pathlib
from collections.abc import Iterable
from typing import Any, NoReturn

from mammut.core.files import read_json_object, replacing_file, write_json

_CLIP_MERGES = 49_152 - 256 - 2  # the file holds more lines than CLIP uses
_CLIP_BYTES = 2**24  # five times the file; what a stranger's would unpack to beyond is not read
_CLIP_START, _CLIP_END = 49_406, 49_407
_CLIP_SPECIAL = {  # open_clip's spelling, then OpenAI's
    "<start_of_text>": _CLIP_START,
    "<end_of_text>": _CLIP_END,
    "<|startoftext|>": _CLIP_START,
    "<|endoftext|>": _CLIP_END,
}
_CLIP_WORDS = (
    r"<start_of_text>|<end_of_text>|<\|startoftext\|>|<\|endoftext\|>"
    r"|(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
)
# For each special token of a tokenizer.json: its names in the config beside it, then well-known
# tokens.
_HF_TOKENS = {
    "bos": (
        ("bos_token", "cls_token"),
        ("<|startoftext|>", "<start_of_text>", "<s>", "[CLS]", "<|begin_of_text|>", "<bos>"),
    ),
    "eos": (
        ("eos_token", "sep_token"),
        (
            "<|endoftext|>",
            "</s>",
            "[SEP]",
            "<|end_of_text|>",
            "<end_of_text>",
            "<|im_end|>",
            "<eos>",
        ),
    ),
    "pad": (("pad_token",), ("<pad>", "[PAD]", "<|pad|>")),
}
SETTINGS = "kind", "lowercase", "vocab_size", "bos_id", "eos_id", "pad_id"
_MAX_VOCAB = 2**24


class Tokenizer(abc.ABC):
    """Text to ids and back. Use `load_tokenizer` or `train_sentencepiece` to make one.

    `lowercase` says whether text is lower-cased before it is encoded. `vocab_size` is one more than
    the largest id.
    """

    kind: str
    files: tuple[str, ...]  # their names in a saved folder, the vocabulary first
    # Whether a text that follows another has to bring the space between them along: byte-level BPE
    # tells a word by it, where other vocabularies add it themselves.
    needs_space = False

    def __init__(
        self, content: bytes, lowercase: bool, special_ids: tuple[int, int, int], vocab_size: int
    ):
        self._content = content
        self.lowercase = lowercase
        self.bos_id, self.eos_id, self.pad_id = special_ids
        self.vocab_size = vocab_size

    @classmethod
    def from_file(cls, path: pathlib.Path, lowercase: bool):
        """Reads a vocabulary file; `load_tokenizer` picks the class."""
        return cls(path.read_bytes(), lowercase)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without start and end. Unlike CLIP's own, the other kinds never read an end in `text`."""
        return self._encode(clean(text, self.lowercase))

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
                raise ValueError(
                    f"id {token} is not in the vocabulary, expected 0 to {self.vocab_size - 1}"
                )
        return self._decode([token for token in ids if token != self.bos_id])

    def settings(self) -> dict[str, Any]:
        """What `restore_tokenizer` needs beside the vocabulary file, and checks of it, as JSON values."""
        return {name: getattr(self, name) for name in SETTINGS}

    def save(self, folder: pathlib.Path) -> dict[str, Any]:
        """Writes the vocabulary file into `folder` and returns `settings()`."""
        with replacing_file(folder / self.files[0]) as new:
            new.write_bytes(self._content)
        return self.settings()

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Ids of text that is cleaned already."""

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Text of ids that are inside the vocabulary."""


class ClipTokenizer(Tokenizer):
    """CLIP's byte-pair encoding of cleaned, lower-cased text, with open_clip's ids.

    As there, "<start_of_text>" and "<end_of_text>" in a text become the special ids, and so do
    OpenAI's spellings "<|startoftext|>" and "<|endoftext|>".
    """

    kind = "clip"
    files = ("tokenizer.txt.gz",)

    def __init__(self, content: bytes, lowercase: bool):
        from tokenizers import Regex, models, pre_tokenizers
        from tokenizers import Tokenizer as Pipeline

        text = (
            gzip.GzipFile(fileobj=io.BytesIO(content)).read(_CLIP_BYTES).decode("utf-8", "ignore")
        )
        lines = text.split("\n")[1 : 1 + _CLIP_MERGES]
        merges = [tuple(line.split()) for line in lines]
        if len(merges) < _CLIP_MERGES or any(len(merge) != 2 for merge in merges):
            raise ValueError(f"expected a heading and {_CLIP_MERGES} lines of two pieces")
        self._bytes = _visible_bytes()
        units = [*self._bytes, *(unit + "</w>" for unit in self._bytes)]
        self._pieces = [*units, *("".join(merge) for merge in merges)]
        ids = {piece: token for token, piece in enumerate(self._pieces)}
        self._words = pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True)
        self._pipeline = Pipeline(models.BPE(vocab=ids, merges=merges, end_of_word_suffix="</w>"))
        self._pipeline.pre_tokenizer = pre_tokenizers.Sequence(
            [self._words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        super().__init__(content, True, (_CLIP_START, _CLIP_END, 0), _CLIP_END + 1)

    def _encode(self, text: str) -> list[int]:
        text = _tidy(text).lower()
        if not any(special in text for special in _CLIP_SPECIAL):
            return self._pipeline.encode(text, add_special_tokens=False).ids
        words = [word for word, _ in self._words.pre_tokenize_str(text)]
        ids = (
            [_CLIP_SPECIAL[word]] if word in _CLIP_SPECIAL else self._pipeline.encode(word).ids
            for word in words
        )
        return [token for word in ids for token in word]

    def _decode(self, ids: list[int]) -> str:
        text = "".join(self._pieces[token] for token in ids)
        return (
            bytes(map(self._bytes.get, text)).decode("utf-8", errors="replace").replace("</w>", " ")
        )


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, unigram or byte-pair; "</s>" in a text is ordinary text."""

    kind = "sentencepiece"
    files = ("tokenizer.model",)

    def __init__(self, content: bytes, lowercase: bool):
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        found = self._model.bos_id(), self._model.eos_id(), self._model.pad_id()
        special_ids = _special_ids(*(None if token < 0 else token for token in found))
        super().__init__(content, lowercase, special_ids, self._model.vocab_size())

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`; its own truncation, padding and special-token template are not used.

    `named` holds what the config files beside it call its special tokens, `eos_token` and so on; or
    their ids, `eos_token_id`, which it need not have itself. With `fix_text` texts are cleaned as
    open_clip does.
    """

    kind = "huggingface"
    files = ("tokenizer.json", "tokenizer_config.json")

    def __init__(self, content: bytes, lowercase: bool, named: dict[str, Any]):
        from tokenizers import Tokenizer as Pipeline

        self._pipeline = Pipeline.from_str(content.decode("utf-8"))
        self._pipeline.no_truncation()
        self._pipeline.no_padding()
        self._pipeline.encode_special_tokens = True  # "</s>" in a text is text
        self._fix_text = named.get("fix_text") is True
        special_ids = _special_ids(*(self._find(role, named) for role in ("bos", "eos", "pad")))
        vocab_size = 1 + max(*self._pipeline.get_vocab().values(), *special_ids)
        super().__init__(content, lowercase, special_ids, vocab_size)
        self.needs_space = self.decode(self.encode("a") + self.encode("b")) == "ab"

    @classmethod
    def from_file(cls, path: pathlib.Path, lowercase: bool, **named: Any):
        """Reads a `tokenizer.json`, and of its special tokens the two files beside it, where they are, and `named`."""
        beside = [
            path.with_name(name) for name in ("special_tokens_map.json", "tokenizer_config.json")
        ]
        told = {}
        for config in filter(pathlib.Path.is_file, beside):
            told |= read_json_object(config)
        return cls(path.read_bytes(), lowercase, told | named)

    def save(self, folder: pathlib.Path) -> dict[str, Any]:
        """As `Tokenizer.save`; a `tokenizer_config.json` keeps the names of the special tokens."""
        ids = {role: getattr(self, f"{role}_id") for role in _HF_TOKENS}
        named = {f"{role}_token": self._pipeline.id_to_token(token) for role, token in ids.items()}
        named |= {
            f"{role}_token_id": token
            for role, token in ids.items()
            if named[f"{role}_token"] is None
        }
        named |= {"fix_text": True} if self._fix_text else {}
        write_json(folder / self.files[1], named)
        return super().save(folder)

    def _find(self, role: str, named: dict[str, Any]) -> int | None:
        if type(named.get(f"{role}_token_id")) is int:
            return named[f"{role}_token_id"]
        fields, known = _HF_TOKENS[role]
        tokens = [named.get(field) for field in fields]
        tokens = [token.get("content") if isinstance(token, dict) else token for token in tokens]
        found = (self._pipeline.token_to_id(token) for token in (*tokens, *known) if token)
        return next((token for token in found if token is not None), None)

    def _encode(self, text: str) -> list[int]:
        # A unigram vocabulary lists "</s>" as a piece like any other, so that its id can still come
        # out of a text.
        text = _tidy(text) if self._fix_text else text
        ids = self._pipeline.encode(text, add_special_tokens=False).ids
        return [token for token in ids if token not in (self.bos_id, self.eos_id)]

    def _decode(self, ids: list[int]) -> str:
        return self._pipeline.decode(ids, skip_special_tokens=True)


class MissingTokenizer(Tokenizer):
    """A tokenizer whose vocabulary file is not at hand. A model with it still takes images, and ready tokens.

    Texts are refused, and so are those special ids that are not known (None); `needs` says which
    file to put where.
    """

    kind = "missing"
    files = ()

    def __init__(
        self, special_ids: tuple[int | None, int | None, int | None], vocab_size: int, needs: str
    ):
        self._special_ids, self._needs = special_ids, needs
        self.lowercase, self.vocab_size = False, vocab_size

    @property
    def bos_id(self) -> int:
        """The start; raises ValueError where it is not known."""
        return self._special_id(0)

    @property
    def eos_id(self) -> int:
        """The end; raises ValueError where it is not known."""
        return self._special_id(1)

    @property
    def pad_id(self) -> int:
        """The pad; raises ValueError where it is not known."""
        return self._special_id(2)

    @property
    def problem(self) -> str:
        """What is missing, and what to do, as a sentence."""
        return f"the model came without a vocabulary for its texts: {self._needs}, and load or convert it again"

    @classmethod
    def from_settings(cls, settings: dict[str, Any]):
        """What had these `settings()`; raises ValueError when they are none."""
        match settings:
            case {"vocab_size": int(size), "needs": str(needs), **rest} if (
                rest.keys() == {"kind", "bos_id", "eos_id", "pad_id"}
                and type(size) is int
                and 1 <= size <= _MAX_VOCAB
            ):
                ids = rest["bos_id"], rest["eos_id"], rest["pad_id"]
                if all(token is None or type(token) is int and 0 <= token < size for token in ids):
                    return cls(ids, size, needs)
        raise ValueError(
            f"settings of a missing tokenizer are {settings}, expected a vocab_size, ids below it, needs"
        )

    def settings(self) -> dict[str, Any]:
        """Its ids, null where they are not known, and what it needs."""
        bos_id, eos_id, pad_id = self._special_ids
        ids = {"bos_id": bos_id, "eos_id": eos_id, "pad_id": pad_id}
        return {"kind": self.kind, "vocab_size": self.vocab_size, **ids, "needs": self._needs}

    def save(self, folder: pathlib.Path) -> dict[str, Any]:
        """Returns `settings()`: there is no file."""
        return self.settings()

    def require_same_ids(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError where a special id that is known is another one in `tokenizer`, which takes its place."""
        names = "start", "end", "pad"
        others = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
        for name, known, other in zip(names, self._special_ids, others):
            if known is not None and known != other:
                raise ValueError(
                    f"the vocabulary given has the {name} id {other}, the model was trained with {known}"
                )

    def _special_id(self, place: int) -> int:
        token = self._special_ids[place]
        return self._refuse() if token is None else token

    def _encode(self, text: str) -> list[int]:
        self._refuse()

    def _decode(self, ids: list[int]) -> str:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError(self.problem)


def _special_ids(bos: int | None, eos: int | None, pad: int | None) -> tuple[int, int, int]:
    if eos is None:
        raise ValueError(
            "it has no end token (of a tokenizer.json, eos_token in tokenizer_config.json names it)"
        )
    start = next(token for token in (bos, pad, eos) if token is not None)
    return start, eos, eos if pad is None else pad


def clean(text: str, lowercase: bool) -> str:
    # A JSON escape may hold half an emoji, a lone surrogate, which none of the libraries takes.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.lower() if lowercase else text


def _tidy(text: str) -> str:
    """Broken encodings and HTML entities undone, each run of white space one space: open_clip's cleaning."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def _visible_bytes() -> dict[str, int]:
    # GPT-2's stand-ins: a printable byte is its own character, the other bytes follow from U+0100
    # on, in that order.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(hidden)
    }
