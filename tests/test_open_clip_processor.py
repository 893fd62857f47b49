"""The tokenizer and the image transform that come along with a model of open_clip's."""

import gzip
import importlib.util
import json
import pathlib
import shutil
import unicodedata

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from open_clip_models import CONFIGS, JSON, MODERN, changed, random_arrays, write_folder
from safetensors.numpy import load_file
from test_tokenizer import TEXTS

from mammut.data.images import ImageTransform
from mammut.data.processor import Processor
from mammut.data.tokenizer import MissingTokenizer, load_tokenizer
from mammut.data.tokenizer_kinds import clean
from mammut.testing import tiny_processor
from mammut.weights.files.tensor_file import CheckpointError
from mammut.weights.formats import open_clip
from mammut.weights.formats.open_clip_tokenizer import open_tokenizer


def test_texts_become_the_tokens_of_open_clip(shared, tmp_path):
    golden = json.loads((shared / "fixtures" / "preprocess" / "tokens.json").read_text("utf-8"))
    for length in (77, 76, 16):
        model_cfg = changed(CONFIGS["fork"], "text_cfg.context_length", length)
        folder = write_folder(tmp_path / str(length), model_cfg, random_arrays(model_cfg))
        shutil.copy(next((shared / "vocabs").rglob("*.txt.gz")), folder)
        processor = open_clip.open_model(folder).processor
        assert processor(text=golden["texts"])["tokens"].tolist() == golden[f"ctx{length}"]


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_any_text_has_the_ids_of_open_clip(both_tokenizers, text):
    ours, theirs = both_tokenizers
    text = clean(text, lowercase=False, tidy=True)
    # Two libraries of regular expressions may know other letters of Unicode's newest versions.
    assume(all(unicodedata.category(sign) != "Cn" for sign in text))
    assert ours.encode(text) == theirs.encode(text)


@pytest.fixture(scope="module")
def both_tokenizers():
    """Our tokenizer and open_clip's, of one vocabulary."""
    package = importlib.util.find_spec("open_clip")
    if package is None or importlib.util.find_spec("torch") is None:
        pytest.skip("open_clip's own tokenizer needs open_clip and torch")
    path = pathlib.Path(package.submodule_search_locations[0], "tokenizer.py")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # its file alone: the package imports much more
    return load_tokenizer(module.default_bpe(), lowercase=True), module.SimpleTokenizer()


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("picture", ["gray_333x251", "land_640x427", "small_90x70"])
def test_pictures_become_the_pixels_of_open_clip(mode, picture, shared, tmp_path):
    folder = shared / "fixtures" / "preprocess"
    model_cfg = changed(CONFIGS["mammut2"], "vision_cfg.image_size", 224)
    opened = open_clip.open_model(
        write_folder(tmp_path, model_cfg, random_arrays(model_cfg), resize_mode=mode)
    )
    pixels = opened.processor(images=[folder / f"{picture}.png"])["image"][0, ::4, ::4].transpose(
        2, 0, 1
    )
    expected = load_file(folder / "preprocessed.safetensors")[f"{mode}.{picture}"]
    vision = opened.config.vision
    mean, std = (np.array(x)[:, None, None] for x in (vision.image_mean, vision.image_std))
    assert np.abs(pixels / 255 - (expected * std + mean)).max() < 1 / 255


def test_without_a_vocabulary_images_and_ready_tokens_still_work(tmp_path):
    folder = write_folder(tmp_path, CONFIGS["mammut2"], random_arrays(CONFIGS["mammut2"]))
    processor = open_clip.open_model(folder).processor
    assert processor(images=[np.zeros((5, 7, 3), np.uint8)])["image"].shape == (1, 16, 16, 3)
    tokens = np.array([[1, 2]])
    for call in (
        lambda: processor(text=["a dog"]),
        lambda: processor.decode(tokens),
        lambda: processor.bos_id,
    ):
        with pytest.raises(ValueError, match="came without a vocabulary .* put its "):
            call()


def test_a_vocabulary_that_is_larger_than_the_model_is_refused(shared, tmp_path):
    folder = write_folder(tmp_path, CONFIGS["mammut2"], random_arrays(CONFIGS["mammut2"]))
    shutil.copy(next((shared / "vocabs").rglob("*.txt.gz")), folder)
    with pytest.raises(
        CheckpointError, match="the tokenizer has 49408 ids, too many for a vocab_size of 60"
    ):
        open_clip.open_model(folder)


def write_words(folder: pathlib.Path, template: bool) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "a", "dog", "Dog"])}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        special = [("<s>", 1), ("</s>", 2)]
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A </s>", special_tokens=special
        )
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_named_tokenizer_has_the_ids_of_the_config(tmp_path):
    # tiktoken's, which the vocabulary itself does not have
    ids = {"bos_id": 58, "eos_id": 57, "pad_id": 59}
    model_cfg = {
        **CONFIGS["modern"],
        "multimodal_cfg": MODERN | ids | {"tokenizer_kwargs": {"clean": "whitespace"}},
    }
    model_cfg["embed_dim"] = 24
    folder = write_folder(tmp_path, model_cfg, random_arrays(model_cfg))
    assert open_clip.open_model(folder).processor.eos_id == 57
    write_words(folder, template=False)
    opened = open_clip.open_model(folder)
    expected = [[58, 3, 5, 57] + [59] * 8]
    assert opened.processor(text=["a &#68;og"])["tokens"].tolist() == expected
    open_clip.save(tmp_path / "out", opened)
    assert (
        open_clip.open_model(tmp_path / "out").processor(text=["a &#68;og"])["tokens"].tolist()
        == expected
    )


def test_a_tokenizer_of_hugging_face_must_put_texts_between_start_and_end(tmp_path):
    model_cfg = changed(CONFIGS["mammut"], "multimodal_cfg.hf_tokenizer_name", "words")
    folder = write_folder(tmp_path, model_cfg, random_arrays(model_cfg))
    write_words(folder, template=True)
    assert open_clip.open_model(folder).processor(text=["a dog"])["tokens"][0, :5].tolist() == [
        1,
        3,
        4,
        2,
        2,
    ]
    write_words(folder, template=False)
    with pytest.raises(CheckpointError, match="expected its ids between a start and an end"):
        open_clip.open_model(folder)


def test_clips_merges_in_a_tokenizer_json_are_clips_tokenizer(shared, tmp_path):
    vocabulary = next((shared / "vocabs").rglob("*.txt.gz"))
    merges = gzip.decompress(vocabulary.read_bytes()).decode().split("\n")[1:48_895]
    folder = write_folder(tmp_path, CONFIGS["fork"], random_arrays(CONFIGS["fork"]))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "merges": merges}}))
    processor = open_clip.open_model(folder).processor
    text = "x!=y &amp; Zebras"
    assert (
        processor.tokenizer.encode(text) == load_tokenizer(vocabulary, True).encode(text)
        and processor.pad_id == 0
    )
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "BPE", "merges": ["a b c"] * 48_894}})
    )
    with pytest.raises(CheckpointError, match="tokenizer.json has merges that are not CLIP's"):
        open_clip.open_model(folder)


def test_a_processor_of_another_model_is_refused(tmp_path):
    folder = write_folder(tmp_path, CONFIGS["mammut"], random_arrays(CONFIGS["mammut"]))
    processor = tiny_processor()
    Processor(processor.tokenizer, ImageTransform(48), 5).save(folder)
    message = (
        "is of another model: images of 48 pixels, expected an image_size of 16; "
        "texts of 5 tokens, expected"
    )
    with pytest.raises(CheckpointError, match=message):
        open_clip.open_model(folder)


KEYS = (
    "hf_tokenizer_name",
    "tokenizer_type",
    "tokenizer_mode",
    "tokenizer_kwargs",
    "bos_id",
    "eos_id",
    "pad_id",
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), JSON))
def test_no_value_of_a_tokenizer_does_more_than_be_refused(text_cfg):
    try:
        tokenizer = open_tokenizer(pathlib.Path("no such folder"), text_cfg, 60)
    except ValueError:
        return
    assert isinstance(tokenizer, MissingTokenizer) and tokenizer.vocab_size == 60
