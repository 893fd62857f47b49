"""The kinds of tokenizer: CLIP, SentencePiece, Hugging Face, and a missing one.

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
_CLIP_BYTES = 2**24  # five times the unpacked file: a limit for damaged or hostile files
_CLIP_START = 49_406
_CLIP_END = 49_407
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
# The special tokens of a tokenizer.json: their fields in the config beside it, then well-known
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
    """Text to ids and back; `load_tokenizer` and `train_sentencepiece` make one.

    Attributes:
      kind: its name in saved settings.
      files: names of its files in a saved folder, the vocabulary first.
      needs_space: whether a text that follows another must begin with the space between them.
        Byte-level BPE marks a word by that space; other vocabularies add it themselves.
      lowercase: whether text is lower-cased before it is encoded.
      vocab_size: one more than the largest id.
      bos_id: the id of the start.
      eos_id: the id of the end.
      pad_id: the id of pads; a real token may have it too.
    """

    kind: str
    files: tuple[str, ...]
    needs_space = False
    _repairs_text = False  # whether texts are tidied as open_clip does, before they are lower-cased

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
        """Encodes a text, without start and end.

        In CLIP's vocabulary alone, special tokens written out in the text become their ids.
        """
        return self._encode(clean(text, self.lowercase, self._repairs_text))

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids up to the first end; start ids are skipped.

        With CLIP's vocabulary the text ends with a space.

        Raises:
          ValueError: an id before the end is outside the vocabulary.
        """
        ids = [int(token) for token in ids]
        if ids[:1] == [self.bos_id]:  # before the end, because GPT-2 has one id for both
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
        """Returns the JSON values that `restore_tokenizer` needs and checks."""
        return {name: getattr(self, name) for name in SETTINGS}

    def save(self, folder: pathlib.Path) -> dict[str, Any]:
        """Writes the vocabulary file into `folder` and returns `settings()`."""
        with replacing_file(folder / self.files[0]) as new:
            new.write_bytes(self._content)
        return self.settings()

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Encodes text that is clean already."""

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Decodes ids that are in the vocabulary."""


class ClipTokenizer(Tokenizer):
    """CLIP's byte-pair encoding of cleaned, lower-cased text, with open_clip's ids.

    As in open_clip, "<start_of_text>" and "<end_of_text>" in a text become the special ids, and so
    do OpenAI's spellings "<|startoftext|>" and "<|endoftext|>".
    """

    kind = "clip"
    files = ("tokenizer.txt.gz",)
    _repairs_text = True

    def __init__(self, content: bytes, lowercase: bool):
        from tokenizers import Regex, models, pre_tokenizers
        from tokenizers import Tokenizer as Pipeline

        unpacked = gzip.GzipFile(fileobj=io.BytesIO(content)).read(_CLIP_BYTES)
        text = unpacked.decode("utf-8", "ignore")
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
        if not any(special in text for special in _CLIP_SPECIAL):
            return self._pipeline.encode(text, add_special_tokens=False).ids
        ids = []
        for word, _ in self._words.pre_tokenize_str(text):
            if word in _CLIP_SPECIAL:
                ids.append(_CLIP_SPECIAL[word])
            else:
                ids += self._pipeline.encode(word).ids
        return ids

    def _decode(self, ids: list[int]) -> str:
        units = "".join(self._pieces[token] for token in ids)
        text = bytes(map(self._bytes.get, units)).decode("utf-8", errors="replace")
        return text.replace("</w>", " ")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, unigram or byte-pair.

    "</s>" in a text is ordinary text.
    """

    kind = "sentencepiece"
    files = ("tokenizer.model",)

    def __init__(self, content: bytes, lowercase: bool):
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        ids = self._model.bos_id(), self._model.eos_id(), self._model.pad_id()
        special_ids = _special_ids(*(None if token < 0 else token for token in ids))
        super().__init__(content, lowercase, special_ids, self._model.vocab_size())

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`, without its truncation, padding and special-token template.

    `named` has the fields of the config files beside it: its special tokens, `eos_token` and so on,
    or their ids, `eos_token_id`, which the vocabulary itself may lack. With `fix_text` texts are
    cleaned as in open_clip.
    """

    kind = "huggingface"
    files = ("tokenizer.json", "tokenizer_config.json")

    def __init__(self, content: bytes, lowercase: bool, named: dict[str, Any]):
        from tokenizers import Tokenizer as Pipeline

        self._pipeline = Pipeline.from_str(content.decode("utf-8"))
        self._pipeline.no_truncation()
        self._pipeline.no_padding()
        self._pipeline.encode_special_tokens = True  # "</s>" in a text is text
        self._repairs_text = named.get("fix_text") is True
        special_ids = _special_ids(*(self._find(role, named) for role in ("bos", "eos", "pad")))
        vocab_size = 1 + max(*self._pipeline.get_vocab().values(), *special_ids)
        super().__init__(content, lowercase, special_ids, vocab_size)
        self.needs_space = self.decode(self.encode("a") + self.encode("b")) == "ab"

    @classmethod
    def from_file(cls, path: pathlib.Path, lowercase: bool, **named: Any):
        """Reads a `tokenizer.json`.

        Its special tokens come from the files beside it and from `named`.
        """
        fields = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            config = path.with_name(name)
            if config.is_file():
                fields |= read_json_object(config)
        return cls(path.read_bytes(), lowercase, fields | named)

    def save(self, folder: pathlib.Path) -> dict[str, Any]:
        """Writes the vocabulary, and a `tokenizer_config.json` with its special tokens."""
        ids = {role: getattr(self, f"{role}_id") for role in _HF_TOKENS}
        named = {f"{role}_token": self._pipeline.id_to_token(token) for role, token in ids.items()}
        named |= {
            f"{role}_token_id": token
            for role, token in ids.items()
            if named[f"{role}_token"] is None
        }
        if self._repairs_text:
            named["fix_text"] = True
        write_json(folder / self.files[1], named)
        return super().save(folder)

    def _find(self, role: str, named: dict[str, Any]) -> int | None:
        """Finds the id of a special token; None where there is none."""
        if type(named.get(f"{role}_token_id")) is int:
            return named[f"{role}_token_id"]
        fields, known = _HF_TOKENS[role]
        tokens = [named.get(field) for field in fields]
        tokens = [token.get("content") if isinstance(token, dict) else token for token in tokens]
        ids = (self._pipeline.token_to_id(token) for token in (*tokens, *known) if token)
        return next((token for token in ids if token is not None), None)

    def _encode(self, text: str) -> list[int]:
        # A unigram vocabulary has "</s>" among its pieces, so a text can give its id.
        ids = self._pipeline.encode(text, add_special_tokens=False).ids
        return [token for token in ids if token not in (self.bos_id, self.eos_id)]

    def _decode(self, ids: list[int]) -> str:
        return self._pipeline.decode(ids, skip_special_tokens=True)


class MissingTokenizer(Tokenizer):
    """A tokenizer without its vocabulary file.

    Its model still takes images and ready tokens. Texts are refused, and so are special ids that
    are not known (None). `needs` tells the user which file is missing and where to put it.
    """

    kind = "missing"
    files = ()

    def __init__(
        self, special_ids: tuple[int | None, int | None, int | None], vocab_size: int, needs: str
    ):
        self._special_ids = special_ids
        self._needs = needs
        self.lowercase = False
        self.vocab_size = vocab_size

    @property
    def bos_id(self) -> int:
        """The id of the start; raises ValueError where it is not known."""
        return self._special_id(0)

    @property
    def eos_id(self) -> int:
        """The id of the end; raises ValueError where it is not known."""
        return self._special_id(1)

    @property
    def pad_id(self) -> int:
        """The id of the pad; raises ValueError where it is not known."""
        return self._special_id(2)

    @property
    def problem(self) -> str:
        """A sentence that names the missing file and what to do."""
        return (
            "the model came without a vocabulary for its texts: "
            f"{self._needs}, and load or convert it again"
        )

    @classmethod
    def from_settings(cls, settings: dict[str, Any]):
        """Makes the tokenizer with these `settings()`; raises ValueError where they are invalid."""
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
            f"settings of a missing tokenizer are {settings}, "
            "expected a vocab_size, ids below it, needs"
        )

    def settings(self) -> dict[str, Any]:
        """Returns its special ids and what the user has to do.

        An id that is not known is None.
        """
        bos_id, eos_id, pad_id = self._special_ids
        ids = {"bos_id": bos_id, "eos_id": eos_id, "pad_id": pad_id}
        return {"kind": self.kind, "vocab_size": self.vocab_size, **ids, "needs": self._needs}

    def save(self, folder: pathlib.Path) -> dict[str, Any]:
        """Returns `settings()`: there is no file."""
        return self.settings()

    def require_same_ids(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError where `tokenizer`, its replacement, has another special id."""
        names = "start", "end", "pad"
        others = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
        for name, known, other in zip(names, self._special_ids, others):
            if known is not None and known != other:
                raise ValueError(
                    f"the vocabulary given has the {name} id {other}, "
                    f"the model was trained with {known}"
                )

    def _special_id(self, index: int) -> int:
        token = self._special_ids[index]
        if token is None:
            self._refuse()
        return token

    def _encode(self, text: str) -> list[int]:
        self._refuse()

    def _decode(self, ids: list[int]) -> str:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError(self.problem)


def _special_ids(bos: int | None, eos: int | None, pad: int | None) -> tuple[int, int, int]:
    """Finds start, end and pad by the rules of `mammut.data.tokenizer`."""
    if eos is None:
        raise ValueError(
            "it has no end token (of a tokenizer.json, eos_token in tokenizer_config.json names it)"
        )
    start = next(token for token in (bos, pad, eos) if token is not None)
    return start, eos, eos if pad is None else pad


def clean(text: str, lowercase: bool, tidy: bool = False) -> str:
    """Tidies a text where asked, replaces lone surrogates, and lower-cases where asked.

    A JSON escape may hold half an emoji, a lone surrogate, which none of the libraries takes. The
    order is open_clip's: "cafÃ©" is a "café" in the wrong encoding, "cafã©" cannot be repaired.
    """
    if tidy:
        text = _tidy(text)
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.lower() if lowercase else text


def _tidy(text: str) -> str:
    """Repairs encodings, HTML entities and white space, as open_clip cleans its texts."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def _visible_bytes() -> dict[str, int]:
    """Maps GPT-2's characters to the bytes that they stand for.

    A printable byte is its own character; the characters of the others follow from U+0100.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(hidden)
    }
