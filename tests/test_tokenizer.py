"""Vocabularies against their reference encodings, special ids, training and what saving keeps."""

import gzip
import html
import json

import ftfy
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mammut.data.tokenizer import (
    MissingTokenizer,
    load_tokenizer,
    restore_tokenizer,
    train_sentencepiece,
)
from mammut.data.tokenizer_kinds import clean
from mammut.testing import shared_dir

SHARED = shared_dir()
needs_shared = pytest.mark.skipif(
    SHARED is None, reason="the shared folder with the reference encodings is absent"
)
CAPTIONS = [
    "A dog runs on green grass .",
    "Two dogs play with a red ball .",
    "A child in a pink dress climbs stairs .",
]


@pytest.fixture(scope="module")
def clip():
    return load_tokenizer(SHARED / "vocabs/clip_bpe_simple_vocab_16e6.txt.gz", lowercase=False)


@pytest.fixture(scope="module")
def t5():
    return load_tokenizer(SHARED / "vocabs/t5_base_32k.sentencepiece.model", lowercase=False)


def golden(name):
    lines = (SHARED / "vocabs" / name).read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def save_pipeline(path, model, pre_tokenizer=None, special=()):
    pipeline = tokenizers.Tokenizer(model)
    if pre_tokenizer is not None:
        pipeline.pre_tokenizer = pre_tokenizer
    pipeline.add_special_tokens(list(special))
    pipeline.save(str(path))
    return path


def word_level(path, *special):
    words = {word: token for token, word in enumerate(("[UNK]", "a", "dog", *special))}
    model = tokenizers.models.WordLevel(words, unk_token="[UNK]")
    return save_pipeline(path, model, tokenizers.pre_tokenizers.WhitespaceSplit(), special)


@needs_shared
def test_clip_encodes_and_decodes_as_openai(clip):
    rows = golden("clip_bpe_golden.jsonl")
    assert len(rows) == 256
    for row in rows:
        assert clip.encode(row["text"]) == row["ids"], row["text"]
        # Start and end, which one of the texts spells out, are no part of our decoded text.
        expected = row["decoded"].removeprefix("<|startoftext|>").removesuffix("<|endoftext|>")
        assert clip.decode(row["ids"]) == expected


@needs_shared
def test_t5_encodes_and_decodes_as_sentencepiece(t5):
    rows = golden("t5_base_32k_golden.jsonl")
    assert len(rows) == 256
    for row in rows:
        assert t5.encode(row["text"]) == row["ids"], row["text"]
        assert t5.decode(row["ids"]) == row["decoded"]


@needs_shared
def test_special_ids_and_sizes(clip, t5):
    assert (clip.bos_id, clip.eos_id, clip.pad_id, clip.vocab_size) == (49406, 49407, 0, 49408)
    # T5 starts with its pad
    assert (t5.bos_id, t5.eos_id, t5.pad_id, t5.vocab_size) == (0, 1, 0, 32_000)


@needs_shared
def test_clip_always_lowercases(clip):
    assert clip.lowercase
    assert clip.encode("A DOG") == clip.encode("a dog")


@needs_shared
def test_clip_reads_special_tokens_in_text_only_as_whole_words(clip):
    assert clip.encode("a<start_of_text>b") == [*clip.encode("a"), 49406, *clip.encode("b")]
    assert 49406 not in clip.encode("!<start_of_text>")  # the run of signs "!<" comes first


@needs_shared
@pytest.mark.parametrize("text", ["</s>", "<s> <pad> </s> <unk>", "a dog</s>"])
def test_sentencepiece_text_never_becomes_a_control_id(t5, text):
    trained = train_sentencepiece(CAPTIONS, 600, lowercase=True)
    for tokenizer in (t5, trained):
        assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(
            tokenizer.encode(text)
        )
        assert tokenizer.encode(text)
    assert trained.decode(trained.encode(text)) == text


def test_half_an_emoji_is_encoded():
    tokenizer = train_sentencepiece(CAPTIONS, 600, lowercase=True)
    assert tokenizer.decode(tokenizer.encode("a \ud83d dog")) == "a dog"
    assert tokenizer.decode(tokenizer.encode("dog \ud83d\udc36")) == "dog \U0001f436"


def test_decode_stops_at_the_end_and_skips_the_start():
    tokenizer = train_sentencepiece(CAPTIONS, 600, lowercase=True)
    ids, other = tokenizer.encode("a dog"), tokenizer.encode("grass")
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, *other, -1]) == "a dog"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("outside", [-1, 10**6])
def test_decode_refuses_ids_outside_the_vocabulary(outside):
    tokenizer = train_sentencepiece(CAPTIONS, 600, lowercase=True)
    with pytest.raises(ValueError, match=f"id {outside} is not in the vocabulary"):
        tokenizer.decode([5, outside])


def test_training_is_repeatable_and_round_trips():
    first, second = (train_sentencepiece(iter(CAPTIONS), 600, lowercase=True) for _ in range(2))
    assert first._content == second._content
    assert (first.pad_id, first.bos_id, first.eos_id) == (0, 1, 2)
    assert first.vocab_size <= 600
    text = "A Dog — 東京 🐶 Ünïcode"
    assert first.decode(first.encode(text)) == text.lower()  # in bytes: nothing is unknown
    kept = train_sentencepiece(CAPTIONS, 600, lowercase=False)
    assert kept.decode(kept.encode("A Dog")) == "A Dog"


@pytest.mark.parametrize("vocab_size", [48, 300, 511, 512, 2000])
def test_trained_vocabulary_keeps_its_limit(vocab_size):
    tokenizer = train_sentencepiece(CAPTIONS, vocab_size, lowercase=True)
    assert tokenizer.vocab_size <= vocab_size
    assert tokenizer.decode(tokenizer.encode(CAPTIONS[0])) == CAPTIONS[0].lower()


@pytest.mark.parametrize("captions", [[], ["", "  \n"]])
def test_training_needs_captions(captions):
    with pytest.raises(ValueError, match="no captions"):
        train_sentencepiece(captions, 600, lowercase=True)


def test_training_refuses_a_vocabulary_below_its_characters():
    with pytest.raises(
        ValueError,
        match=r"vocab_size 10 \(model.text.vocab_size\) fits .*Vocabulary size is smaller",
    ):
        train_sentencepiece(CAPTIONS, 10, lowercase=True)


def test_huggingface_ids_come_from_the_config_beside_it(tmp_path):
    path = word_level(tmp_path / "tokenizer.json", "<end>", "<go>", "</s>", "<fill>")
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "</s>", "bos_token": "<go>"})
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<end>"}, "pad_token": "<fill>", "cls_token": None})
    )
    tokenizer = load_tokenizer(path, lowercase=True)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id, tokenizer.vocab_size) == (
        3,
        4,
        6,
        7,
    )
    assert tokenizer.encode("A dog") == [1, 2]


@pytest.mark.parametrize(
    ("special", "bos_eos_pad"),
    [
        (("<|endoftext|>",), (3, 3, 3)),  # GPT-2
        (("[CLS]", "[SEP]", "[PAD]"), (3, 4, 5)),  # BERT
        (("<pad>", "</s>"), (3, 4, 3)),  # T5
        (("<|startoftext|>", "<|endoftext|>"), (3, 4, 4)),  # CLIP
    ],
)
def test_huggingface_ids_are_found_by_their_well_known_names(tmp_path, special, bos_eos_pad):
    tokenizer = load_tokenizer(word_level(tmp_path / "tokenizer.json", *special), lowercase=True)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == bos_eos_pad
    assert tokenizer.decode([tokenizer.bos_id, 1, 2, tokenizer.eos_id, 1]) == "a dog"


def test_huggingface_text_never_becomes_the_end(tmp_path):
    words = word_level(tmp_path / "words.json", "<s>", "</s>")
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((sign, -3.0) for sign in "▁adog</s>")]
    unigram = save_pipeline(
        tmp_path / "unigram.json", tokenizers.models.Unigram(pieces, 0, False), special=["</s>"]
    )
    for path in (words, unigram):
        tokenizer = load_tokenizer(path, lowercase=True)
        assert tokenizer.eos_id not in tokenizer.encode("a dog </s> a")
        assert tokenizer.bos_id not in tokenizer.encode("<s> a dog")


def test_huggingface_truncation_and_padding_of_the_file_are_ignored(tmp_path):
    path = word_level(tmp_path / "tokenizer.json", "</s>")
    pipeline = tokenizers.Tokenizer.from_file(str(path))
    pipeline.enable_truncation(2)
    pipeline.enable_padding(length=8)
    pipeline.save(str(path))
    tokenizer = load_tokenizer(path, lowercase=True)
    assert tokenizer.encode("a dog a") == [1, 2, 1]
    assert tokenizer.encode("a") == [1]


def test_a_vocabulary_without_end_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="tokenizer.json cannot be used as a vocabulary: it has no end token"
    ):
        load_tokenizer(word_level(tmp_path / "tokenizer.json", "<s>"), lowercase=True)


@pytest.mark.parametrize("name", ["vocab.txt.gz", "vocab.model", "tokenizer.json"])
def test_damaged_and_missing_files_are_named(tmp_path, name):
    with pytest.raises(ValueError, match=f"no vocabulary file .*{name}"):
        load_tokenizer(tmp_path / name, lowercase=True)
    (tmp_path / name).write_bytes(b"not a vocabulary")
    with pytest.raises(ValueError, match=f"{name} cannot be used as a vocabulary"):
        load_tokenizer(tmp_path / name, lowercase=True)


def test_a_short_clip_file_is_refused(tmp_path):
    (tmp_path / "vocab.txt.gz").write_bytes(gzip.compress(b"#version\ni n\nt h\n"))
    with pytest.raises(ValueError, match="48894 lines"):
        load_tokenizer(tmp_path / "vocab.txt.gz", lowercase=True)


def test_a_damaged_config_beside_tokenizer_json_is_named(tmp_path):
    path = word_level(tmp_path / "tokenizer.json", "</s>")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json is not JSON"):
        load_tokenizer(path, lowercase=True)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "eos_token": "<end>"}')
    with pytest.raises(
        ValueError, match="tokenizer_config.json is not JSON: the key 'eos_token' is there 2 times"
    ):
        load_tokenizer(path, lowercase=True)


def test_an_unknown_kind_of_file_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(ValueError, match=r"vocab.txt is of no known kind, expected a \*.txt.gz"):
        load_tokenizer(tmp_path / "vocab.txt", lowercase=True)


@pytest.mark.parametrize(
    "text",
    [
        "zebra " * 2_000,  # longer than SentencePiece takes by default
        "ü" * 5_000 + " zebra",
        "zebra \u2585 zebra",  # its mark of unknown pieces
        "zebra\tzebra",
        "zebra\0zebra",
        "zebra\u200bzebra",
        "zebra \ud800",
    ],
)
def test_no_caption_is_left_out_of_a_trained_vocabulary(text):
    # The pieces of the other captions have no z.
    tokenizer = train_sentencepiece([*CAPTIONS * 4, *[text] * 9], 300, lowercase=True)
    assert len(tokenizer.encode("zebra")) < len("zebra")


@pytest.mark.parametrize("blank", ["", " ", "\0\0", "\u200b\ufeff", "\u0301"])
def test_captions_that_show_nothing_make_no_vocabulary(blank):
    with pytest.raises(ValueError, match="no captions to train a vocabulary on"):
        train_sentencepiece([blank] * 5, 300, lowercase=True)


def test_saved_and_restored_alike_for_every_kind(tmp_path):
    # what names the end must not be needed again
    config = tmp_path / "source" / "tokenizer_config.json"
    config.parent.mkdir()
    config.write_text(json.dumps({"eos_token": "<end>"}))
    made = [
        train_sentencepiece(CAPTIONS, 600, lowercase=True),
        load_tokenizer(word_level(config.parent / "tokenizer.json", "<end>"), lowercase=True),
    ]
    if SHARED is not None:
        made.append(
            load_tokenizer(SHARED / "vocabs/clip_bpe_simple_vocab_16e6.txt.gz", lowercase=True)
        )
        made.append(
            load_tokenizer(SHARED / "vocabs/t5_base_32k.sentencepiece.model", lowercase=False)
        )
    for number, tokenizer in enumerate(made):
        folder = tmp_path / str(number)
        folder.mkdir()
        settings = json.loads(json.dumps(tokenizer.save(folder)))
        restored = restore_tokenizer(folder, settings)
        assert restored.settings() == tokenizer.settings() == settings
        for text in (*CAPTIONS[:3], "A Dog &amp; </s>", "naïve 東京 <|endoftext|>"):
            assert restored.encode(text) == tokenizer.encode(text)
            assert restored.decode(tokenizer.encode(text)) == tokenizer.decode(
                tokenizer.encode(text)
            )


def test_restoring_refuses_what_does_not_fit(tmp_path):
    settings = train_sentencepiece(CAPTIONS, 600, lowercase=True).save(tmp_path)
    with pytest.raises(
        ValueError, match="expected .* kind one of clip, sentencepiece, huggingface"
    ):
        restore_tokenizer(tmp_path, settings | {"kind": "words"})
    with pytest.raises(ValueError, match="expected .*'pad_id'"):
        restore_tokenizer(tmp_path, settings | {"file": "../other.model"})
    train_sentencepiece(CAPTIONS, 300, lowercase=True).save(tmp_path)
    with pytest.raises(ValueError, match="tokenizer.model has settings .* but was saved with"):
        restore_tokenizer(tmp_path, settings)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="no vocabulary file .*tokenizer.model"):
        restore_tokenizer(tmp_path, settings)


def test_a_missing_vocabulary_is_still_missing_once_saved(tmp_path):
    missing = MissingTokenizer((1, 2, None), 60, "put it into here")
    settings = json.loads(json.dumps(missing.save(tmp_path)))
    assert list(tmp_path.iterdir()) == []
    restored = restore_tokenizer(tmp_path, settings)
    assert restored.settings() == settings
    assert (restored.vocab_size, restored.bos_id, restored.eos_id) == (60, 1, 2)
    for call in (
        lambda: restored.pad_id,
        lambda: restored.encode("a"),
        lambda: restored.decode([3]),
    ):
        with pytest.raises(
            ValueError,
            match="came without a vocabulary for its texts: put it into here, and load or",
        ):
            call()


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 0},
        {"vocab_size": True},
        {"bos_id": 60},
        {"pad_id": -1},
        {"needs": 1},
        {"more": 1},
    ],
)
def test_settings_of_a_missing_vocabulary_that_cannot_be_are_refused(tmp_path, change):
    settings = MissingTokenizer((1, 2, None), 60, "put it into here").settings() | change
    with pytest.raises(ValueError, match="settings of a missing tokenizer are"):
        restore_tokenizer(tmp_path, settings)


_PIECES = st.one_of(
    st.sampled_from(
        ("CAFÉ", "cafÃ©", "ÃƒÂ©", "&AMP;lt;", "Σ", "İ", "’S", "\ud83d", "<end_of_text>")
    ),
    st.text(max_size=6),
    # mojibake of both usual kinds
    st.text(max_size=5).map(lambda text: text.encode("utf-8", "replace").decode("latin-1")),
    st.text(max_size=5).map(
        lambda text: text.encode("utf-8", "replace").decode("cp1252", "replace")
    ),
)
TEXTS = st.lists(_PIECES, max_size=5).map(" ".join) | st.lists(_PIECES, max_size=5).map("".join)


def cleaned_as_in_open_clip(text):
    """The `_clean_lower` of open_clip's tokenizer.py."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return " ".join(text.split()).strip().lower()


@settings(max_examples=200, deadline=None)
@given(TEXTS)
@example("CAFÃ© &AMP;")
def test_texts_are_repaired_before_they_are_lowercased(text):
    assert clean(text, lowercase=True, tidy=True) == cleaned_as_in_open_clip(text)
    assert clean("cafÃ©", lowercase=True, tidy=True) == "café"


@needs_shared
def test_mojibake_has_the_ids_of_the_text_that_it_was(clip):
    assert clip.encode("cafÃ©") == clip.encode("café") == [15304]


def test_huggingface_texts_are_repaired_before_they_are_lowercased(tmp_path):
    model = tokenizers.models.WordLevel({"[UNK]": 0, "café": 1, "</s>": 2}, unk_token="[UNK]")
    path = save_pipeline(
        tmp_path / "tokenizer.json", model, tokenizers.pre_tokenizers.WhitespaceSplit(), ["</s>"]
    )
    assert load_tokenizer(path, lowercase=True, fix_text=True).encode("CAFÃ©") == [1]


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_a_huggingface_text_is_normalised_by_its_own_tokenizer_alone(normalising, text):
    ours, theirs = normalising
    text = clean(text, lowercase=False)  # lone surrogates, which tokenizers itself refuses
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def normalising(tmp_path_factory):
    """Our tokenizer and the library's, both of CLIP's normalizer in a tokenizer.json."""
    path = tmp_path_factory.mktemp("normalising") / "tokenizer.json"
    signs = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pipeline = tokenizers.Tokenizer(
        tokenizers.models.BPE({sign: token for token, sign in enumerate(signs)}, [])
    )
    pipeline.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFC(), tokenizers.normalizers.Lowercase()]
    )
    pipeline.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.add_special_tokens(["</s>"])
    pipeline.save(str(path))
    pipeline.encode_special_tokens = True
    return load_tokenizer(path, lowercase=False), pipeline
