"""Tests of the converter between model formats.

What goes in comes out, in either direction, in one type or another, in bounded memory.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import mammut
from mammut import convert
from mammut.config import DecoderConfig, ModelConfig, VisionConfig
from mammut.data.tokenizer import MissingTokenizer
from mammut.models.flops import num_params
from mammut.testing import tiny_batch, tiny_model, tiny_processor

MAMMUT2 = ModelConfig(
    VisionConfig(
        image_size=16,
        patch_size=8,
        width=32,
        depth=2,
        num_heads=2,
        mlp_dim=128,
        activation="gelu",
        norm_eps=1e-5,
        patch_bias=False,
        class_token=True,
        input_norm=True,
        norm_after_pooling=True,
    ),
    DecoderConfig(
        vocab_size=60,
        max_length=12,
        width=24,
        depth=4,
        num_heads=3,
        mlp_dim=96,
        activation="gelu",
        norm_eps=1e-5,
        cross_attn_position="first",
        image_norm=True,
        tie_embeddings=False,
        pad_masking="contrastive",
    ),
    embed_dim=24,
    image_projection="separate",
    projection_bias=False,
)


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> pathlib.Path:
    """A folder of ours that open_clip's format can express."""
    folder = tmp_path_factory.mktemp("convert") / "ours"
    processor = tiny_processor(MAMMUT2)
    image = dataclasses.replace(processor.image, mode="shortest")
    mammut.save(
        folder,
        tiny_model(MAMMUT2),
        mammut.Processor(processor.tokenizer, image, processor.max_length),
    )
    return folder


def run(*args) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mammut.convert", *map(str, args)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def refusal(*args) -> str:
    with pytest.raises(SystemExit) as error:
        convert.main([str(arg) for arg in args])
    message = str(error.value)
    assert message.startswith("convert: ") and "\n" not in message
    return message


def assert_same_files(one: pathlib.Path, other: pathlib.Path) -> None:
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype and array.tobytes() == other[name].tobytes(), name


@pytest.mark.long
def test_a_model_goes_to_open_clip_and_back_bit_for_bit(ours, tmp_path):
    said = run(ours, tmp_path / "theirs", "--to", "open_clip")
    total = num_params(MAMMUT2)["total"]
    theirs = load_file(tmp_path / "theirs" / "open_clip_model.safetensors")
    written = f"{len(theirs)} tensors, {sum(x.nbytes for x in theirs.values()):,} bytes"
    assert f"{tmp_path / 'theirs'}: {written}, of a model of {total:,} parameters" in said
    assert "open_clip takes CLIP's tokenizer for this model" in said
    assert theirs["visual.conv1.weight"].shape == (32, 3, 8, 8) and theirs[
        "text.lm_head"
    ].shape == (24, 60)
    config = json.loads((tmp_path / "theirs" / "open_clip_config.json").read_text())
    assert config["model_cfg"]["multimodal_cfg"]["cross_attn_ratio"] == 2

    said = run(tmp_path / "theirs", tmp_path / "back", "--to", "mammut")
    assert f"{total:,} parameters" in said
    assert_same_files(ours / "model.safetensors", tmp_path / "back" / "model.safetensors")
    run(tmp_path / "back", tmp_path / "again", "--to", "open_clip")
    assert_same_files(
        tmp_path / "theirs/open_clip_model.safetensors",
        tmp_path / "again/open_clip_model.safetensors",
    )

    model, processor = mammut.load(tmp_path / "back")
    assert model.config == MAMMUT2
    expected = mammut.load(ours)[1]
    np.testing.assert_array_equal(
        processor.encode_text(["one red circle"]), expected.encode_text(["one red circle"])
    )


def test_both_folders_give_the_same_embeddings(ours, tmp_path):
    convert.convert(ours, tmp_path / "theirs", "open_clip")
    batch, graphdef = tiny_batch(MAMMUT2), nnx.graphdef(mammut.load(ours)[0])
    embed = jax.jit(
        lambda state: nnx.merge(graphdef, state).encode_text(batch["tokens"], batch["text_valid"])
    )
    states = [nnx.state(mammut.load(folder)[0]) for folder in (ours, tmp_path / "theirs")]
    np.testing.assert_array_equal(embed(states[0]), embed(states[1]))


def test_bfloat16_is_the_nearest_number_and_loses_nothing_more_on_the_way_back(ours, tmp_path):
    convert.convert(ours, tmp_path / "half", "mammut", dtype="bfloat16")
    exact, half = (
        load_file(ours / "model.safetensors"),
        load_file(tmp_path / "half" / "model.safetensors"),
    )
    for name, array in exact.items():
        expected = array if array.shape == () else array.astype(ml_dtypes.bfloat16)
        assert half[name].dtype == expected.dtype and half[name].tobytes() == expected.tobytes(), (
            name
        )
    assert mammut.load(tmp_path / "half")[0].text.norm.scale.dtype == jnp.bfloat16
    convert.convert(tmp_path / "half", tmp_path / "theirs", "open_clip")
    convert.convert(tmp_path / "theirs", tmp_path / "back", "mammut", dtype="bfloat16")
    assert_same_files(
        tmp_path / "half" / "model.safetensors", tmp_path / "back" / "model.safetensors"
    )


def test_a_model_of_our_own_kind_is_not_for_open_clip_and_the_fields_are_named(tmp_path):
    mammut.save(tmp_path / "native", tiny_model(), tiny_processor())
    message = refusal(tmp_path / "native", tmp_path / "theirs", "--to", "open_clip")
    for field in ("image_projection", "cross_attn_position", "tie_embeddings", "class_token"):
        assert field in message
    assert not (tmp_path / "theirs").exists()


def test_numbers_that_bfloat16_does_not_hold_are_refused(tmp_path):
    model = tiny_model()
    model.text.norm.scale[...] = jnp.full(model.text.norm.scale.shape, 3.4e38)
    mammut.save(tmp_path / "ours", model, tiny_processor())
    message = refusal(tmp_path / "ours", tmp_path / "half", "--to", "mammut", "--dtype", "bfloat16")
    assert (
        f"{tmp_path / 'ours'}: text.norm.scale holds finite numbers that are too large for bfloat16"
        in message
    )
    assert not list((tmp_path / "half").iterdir())


def test_a_model_without_its_vocabulary_goes_through_and_the_converter_says_so(tmp_path, capsys):
    processor = tiny_processor(MAMMUT2)
    missing = mammut.Processor(
        MissingTokenizer((1, 2, 0), 60, "put it into here"), processor.image, 12
    )
    mammut.save(tmp_path / "ours", tiny_model(MAMMUT2), missing)
    convert.main([str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "open_clip"])
    assert "open_clip takes CLIP's tokenizer" in capsys.readouterr().out
    convert.main([str(tmp_path / "theirs"), str(tmp_path / "back"), "--to", "mammut"])
    assert "the model came without a vocabulary for its texts: " in capsys.readouterr().out
    assert_same_files(
        tmp_path / "ours" / "model.safetensors", tmp_path / "back" / "model.safetensors"
    )


@pytest.mark.parametrize("to", ["mammut", "open_clip"])
def test_a_target_that_is_a_file_or_the_source_is_refused(ours, tmp_path, to):
    (tmp_path / "file").write_text("text")
    assert "file is a file, expected a folder" in refusal(
        ours, tmp_path / "file", "--to", to, "--overwrite"
    )
    before = {path.name: path.read_bytes() for path in ours.iterdir()}
    message = refusal(ours, ours, "--to", to, "--overwrite")
    assert "is read from" in message or "holds manifest.json" in message
    assert {path.name: path.read_bytes() for path in ours.iterdir()} == before


def test_what_is_there_is_overwritten_only_when_asked(ours, tmp_path):
    convert.convert(ours, tmp_path / "theirs", "open_clip")
    before = (tmp_path / "theirs" / "open_clip_model.safetensors").read_bytes()
    assert "holds" in refusal(ours, tmp_path / "theirs", "--to", "open_clip")
    assert (tmp_path / "theirs" / "open_clip_model.safetensors").read_bytes() == before
    convert.main([str(ours), str(tmp_path / "theirs"), "--to", "open_clip", "--overwrite"])


def test_a_conversion_that_is_interrupted_ends_with_one_line(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "convert", interrupted)
    with pytest.raises(SystemExit) as ended:
        convert.main(["x", "y", "--to", "mammut"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "convert: Ctrl-C: nothing is converted\n"


@pytest.mark.parametrize("name", ["nothing", "empty", "text.txt"])
def test_a_source_that_is_no_model_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    assert name in refusal(tmp_path / name, tmp_path / "out", "--to", "mammut")
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_conversion_holds_few_tensors_at_a_time(tmp_path):
    """Of 500 MB, in both directions: peak memory stays below the size of the file."""
    code = f"""
import dataclasses, resource
import jax, numpy as np
from mammut import convert, testing
from mammut.config import ModelConfig
from mammut.weights.opened import LazyTensors, OpenedModel, model_specs
from mammut.weights.model_folder import save_opened
from tests.test_convert import MAMMUT2
text = dataclasses.replace(MAMMUT2.text, width=1200, num_heads=12, mlp_dim=4800)
config = dataclasses.replace(MAMMUT2, text=text, embed_dim=1200)
specs = model_specs(config)
jax.block_until_ready(jax.numpy.zeros(3))
read = lambda name: np.full(specs[name].shape, 0.5, specs[name].dtype)
save_opened(
    {str(tmp_path / "ours")!r},
    OpenedModel(config, LazyTensors(specs, read), testing.tiny_processor(), "it"),
)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10
before = peak()
import pathlib
folder = pathlib.Path({str(tmp_path)!r})
convert.convert(folder / "ours", folder / "theirs", "open_clip")
there = peak() - before
convert.convert(folder / "theirs", folder / "back", "mammut")
print(sum(spec.nbytes for spec in specs.values()) // 2**20, there, peak() - before)
"""
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    size, there, back = map(int, done.stdout.split())
    assert size > 350 and there < 0.6 * size and back < 0.6 * size, (size, there, back)
    assert_same_files(
        tmp_path / "ours" / "model.safetensors", tmp_path / "back" / "model.safetensors"
    )
