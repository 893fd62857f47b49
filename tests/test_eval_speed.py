"""The program that times generation: its numbers fit together, and the two loops it compares say the same."""

import json
import re

import jax
import numpy as np
import pytest
from flax import nnx

import mammut
from eval import speed
from mammut.config import DecoderConfig, ModelConfig, VisionConfig
from mammut.testing import tiny_config, tiny_model, tiny_processor

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model folder whose decoder has one group of layers."""
    folder = tmp_path_factory.mktemp("model")
    mammut.save(folder, tiny_model(), tiny_processor())
    return str(folder)


@pytest.fixture(scope="module")
def result(checkpoint, tmp_path_factory):
    """What the program writes."""
    out = tmp_path_factory.mktemp("speed") / "new" / "times.json"
    options = "--batch-sizes 1 2 --beams 1 2 --new-tokens 4 --out"
    speed.main([checkpoint, *options.split(), str(out)])
    return json.loads(out.read_text("utf-8"))


def test_every_batch_size_is_timed_with_every_number_of_beams(result):
    assert [(row["batch"], row["beams"]) for row in result["rows"]] == [(1, 1), (1, 2), (2, 1), (2, 2)]


def test_both_loops_give_every_image_the_same_text_of_so_many_tokens(result):
    for row in result["rows"]:
        assert row["texts_equal"] == row["batch"]
        assert row["max_score_difference"] < 1e-5
        assert row["steps"] == [4, 4]


def test_rates_follow_from_the_median_of_the_times(result):
    for row in result["rows"]:
        for loop in (row["cached"], row["uncached"]):
            times = sorted(loop["all_seconds"])
            assert len(times) == 6 and times[0] > 0 and loop["compile_s"] > 0
            assert loop["seconds"] == pytest.approx((times[2] + times[3]) / 2)
            assert 0 <= loop["seconds_iqr"] <= times[-1] - times[0]
            assert loop["captions_per_s"] == pytest.approx(row["batch"] / loop["seconds"])
            assert loop["new_tokens_per_s"] == pytest.approx(4 * loop["captions_per_s"])
            assert loop["ms_per_token"] == pytest.approx(250 * loop["seconds"])
        assert row["speedup"] == pytest.approx(row["uncached"]["seconds"] / row["cached"]["seconds"])


def test_the_file_says_what_was_timed_and_where(result, checkpoint):
    assert result["model"] == checkpoint
    assert result["parameters"] == mammut.model.num_params(tiny_config())["total"]
    assert result["config"]["text"]["vocab_size"] == 60 and result["config"]["dtype"] == "float32"
    assert result["versions"]["jax"] == jax.__version__ and result["machine"]["platform"] == "cpu"
    assert (result["new_tokens"], result["rounds"]) == (4, 3)


def test_the_table_has_a_line_for_each_loop_and_names_the_machine(result, capsys):
    for row in result["rows"]:
        of_cached, of_uncached = (re.split(" +", line.strip()) for line in speed.lines(row).split("\n"))
        assert of_cached[:4] == [str(row["batch"]), str(row["beams"]), f"{row['batch']}/{row['batch']}", "cached"]
        assert of_uncached[0] == "uncached" and len(of_cached) == len(of_uncached) + 4


def test_a_preset_is_given_random_weights_and_room_for_the_new_tokens(monkeypatch):
    small = ModelConfig(
        vision=VisionConfig(image_size=8, patch_size=8, width=8, depth=1, num_heads=1, mlp_dim=8),
        text=DecoderConfig(vocab_size=9, max_length=4, width=8, depth=2, num_heads=1, mlp_dim=8),
    )
    monkeypatch.setattr(mammut.presets, "mammut_s16", lambda: small)
    model, bos_id, source = speed.load_model(speed.Options(preset="mammut_s16", new_tokens=20, dtype="bfloat16"))
    assert model.config.text.max_length == 21 and bos_id < 9
    assert source == "preset mammut_s16 with random weights"
    assert model.config.dtype == "bfloat16" and model.text.dtype == "bfloat16"
    assert {str(x.dtype) for x in jax.tree.leaves(nnx.state(model))} == {"float32"}  # they are stored as they were


def test_another_compute_type_changes_no_weight(checkpoint):
    model = speed.load_model(speed.Options(checkpoint, new_tokens=4, dtype="bfloat16"))[0]
    image, tokens = np.zeros((1, 16, 16, 3), np.uint8), np.ones((1, 4), int)
    run = jax.jit(lambda: tuple(m.caption_logits(image, tokens) for m in (model, tiny_model())))
    in_bfloat16, in_float32 = map(np.asarray, run())
    assert 0 < np.abs(in_bfloat16 - in_float32).max() < 0.1 * np.abs(in_float32).max()


@pytest.mark.parametrize("arguments, expected", [
    ("--preset nope", "--preset is 'nope', expected a function of mammut.presets such as tiny or mammut_b16"),
    ("--preset VisionConfig", "--preset is 'VisionConfig', expected a function"),
    ("--preset _vit", "--preset is '_vit', expected a function"),
    ("CHECKPOINT --new-tokens 12", "--new-tokens is 12, expected fewer than the 12 of DecoderConfig.max_length in "),
    ("CHECKPOINT --new-tokens 3 --beams 60", "num_beams is 60, expected fewer than the 60 of the vocabulary"),
    ("/nowhere", "there is no /nowhere"),
])  # fmt: skip
def test_what_cannot_be_timed_is_refused_in_one_sentence(checkpoint, arguments, expected):
    with pytest.raises(SystemExit) as error:
        speed.main(arguments.replace("CHECKPOINT", checkpoint).split())
    assert str(error.value).startswith(f"python -m eval.speed: {expected}") and "\n" not in str(error.value)


@pytest.mark.parametrize("arguments, expected", [
    ("--batch-sizes 4 0", "--batch-sizes is 4 0, expected numbers of at least 1"),
    ("--beams", "--beams is empty, expected numbers of at least 1"),
    ("--new-tokens 0", "--new-tokens is 0, expected at least 1"),
    ("--rounds 2", "--rounds is 2, expected at least 3"),
    ("somewhere --preset tiny", "both CHECKPOINT somewhere and --preset tiny are given, expected one"),
    ("--out times.txt", "--out is times.txt, expected a name that ends in .json"),
    ("--dtype float16", "float16"),
])  # fmt: skip
def test_wrong_options_are_refused_before_anything_is_loaded(capsys, arguments, expected):
    with pytest.raises(SystemExit) as error:
        speed.main(arguments.split())
    assert error.value.code not in (0, None)
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
    assert expected in said
