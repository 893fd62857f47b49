"""Text to ids and back: CLIP's byte-pair vocabulary, SentencePiece, Hugging Face `tokenizer.json`.

`load_tokenizer` reads a vocabulary file, `train_sentencepiece` makes a vocabulary from captions,
`restore_tokenizer` reads back what `Tokenizer.save` wrote. The special ids of a SentencePiece or
Hugging Face vocabulary:

  end    must exist; a vocabulary without one is refused
  pad    its own pad, else the end id
  start  its own start (or BERT's [CLS]), else its own pad (the start of T5's decoder), else the end

No id marks a pad: in CLIP's vocabulary 0 is the pad, and "!" too. The processor's `text_valid`
marks the real tokens.
"""

import io
import pathlib
from collections.abc import Iterable
from typing import Any

from mammut.data.examples import is_blank
from mammut.data.tokenizer_kinds import (
    SETTINGS,
    ClipTokenizer,
    HuggingFaceTokenizer,
    MissingTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    clean,
)

# Pieces for single bytes take 256 ids; a smaller vocabulary needs those for characters and words.
_MIN_VOCAB_FOR_BYTES = 512
# SentencePiece leaves out texts, without a word, that are longer than this by default or have the
# character that it marks unknown pieces with.
_SENTENCEPIECE_BYTES = 4192
_SENTENCEPIECE_MARK = "\u2585"


def load_tokenizer(path: str | pathlib.Path, lowercase: bool, **named: Any) -> Tokenizer:
    """Reads a vocabulary file.

    The special tokens of a `tokenizer.json` are those that `tokenizer_config.json` or
    `special_tokens_map.json` beside it names, else well-known ones such as <|endoftext|>, </s> and
    [SEP].

    Args:
      path: CLIP's `*.txt.gz`, a SentencePiece `*.model`, or a Hugging Face `tokenizer.json`.
      lowercase: lower-case texts before they are encoded; CLIP's vocabulary always does.
      named: special tokens of a `tokenizer.json`, in place of those of its files; see
        `HuggingFaceTokenizer`.

    Raises:
      ValueError: `path` is missing, of no known kind, damaged, or has no end token.

    Example:
      >>> tokenizer = load_tokenizer("bpe_simple_vocab_16e6.txt.gz", lowercase=True)
      >>> tokenizer.encode("a dog")
      [320, 1929]
    """
    path = pathlib.Path(path)
    kinds = {
        ".txt.gz": ClipTokenizer,
        ".model": SentencePieceTokenizer,
        ".json": HuggingFaceTokenizer,
    }
    cls = next((cls for suffix, cls in kinds.items() if path.name.endswith(suffix)), None)
    if cls is None:
        raise ValueError(
            f"vocabulary {path} is of no known kind, expected a *.txt.gz, *.model or *.json file"
        )
    return _read(cls, path, lowercase, **named)


def restore_tokenizer(folder: pathlib.Path, settings: dict[str, Any]) -> Tokenizer:
    """Reads back the tokenizer whose `save(folder)` returned `settings`.

    Raises:
      ValueError: a file is missing or damaged, or does not fit the settings.
    """
    if settings.get("kind") == MissingTokenizer.kind:
        return MissingTokenizer.from_settings(settings)
    classes = ClipTokenizer, SentencePieceTokenizer, HuggingFaceTokenizer
    cls = next((cls for cls in classes if cls.kind == settings.get("kind")), None)
    if cls is None or set(settings) != set(SETTINGS):
        kinds = ", ".join(cls.kind for cls in classes)
        raise ValueError(
            f"{folder} has tokenizer settings {settings}, expected {SETTINGS}, kind one of {kinds}"
        )
    path = folder / cls.files[0]
    tokenizer = _read(cls, path, settings["lowercase"])
    if tokenizer.settings() != settings:
        raise ValueError(
            f"{path} has settings {tokenizer.settings()}, but was saved with {settings}"
        )
    return tokenizer


def train_sentencepiece(captions: Iterable[str], vocab_size: int, lowercase: bool) -> Tokenizer:
    """Trains a SentencePiece vocabulary on captions: byte-pair encoding.

    Its special ids are pad 0, start 1, end 2, unknown 3. The same captions give the same bytes.

    Args:
      captions: the texts.
      vocab_size: how many pieces it has at most. From 512 on, 256 of them are single bytes, so that
        no character is unknown.
      lowercase: lower-case texts before they are encoded.

    Raises:
      ValueError: there is no text to train on, or `vocab_size` is too small for its characters.
    """
    import sentencepiece

    texts = [
        clean(caption, lowercase).replace(_SENTENCEPIECE_MARK, " ")
        for caption in captions
        if not is_blank(caption)
    ]
    if not texts:
        raise ValueError(
            "there are no captions to train a vocabulary on; give captions or set tokenizer.path"
        )
    longest = max(len(text.encode()) for text in texts)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            max_sentence_length=max(longest, _SENTENCEPIECE_BYTES),
            hard_vocab_limit=False,
            byte_fallback=vocab_size >= _MIN_VOCAB_FOR_BYTES,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            # has whole words from a few hundred pieces on, where unigram still spells them
            model_type="bpe",
            num_threads=1,  # the sums of several threads depend on their number
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).rpartition("] ")[2]  # without the line of SentencePiece's source
        raise ValueError(
            f"no vocabulary of vocab_size {vocab_size} (model.text.vocab_size) "
            f"fits these captions: {reason}"
        ) from error
    return SentencePieceTokenizer(model.getvalue(), lowercase)


def _read(cls: type[Tokenizer], path: pathlib.Path, lowercase: bool, **named: Any) -> Tokenizer:
    if not path.is_file():
        raise ValueError(f"there is no vocabulary file {path}")
    try:
        return cls.from_file(path, lowercase, **named)
    except Exception as error:  # each of the three libraries has errors of its own
        raise ValueError(f"{path} cannot be used as a vocabulary: {error}") from error
