"""eval.speed: its numbers fit together, both sides do the same work, its fits are right."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from flax import nnx
from open_clip_models import original_package

import mammut
from eval import speed
from mammut.config import (
    ComputeConfig,
    DecoderConfig,
    MeshConfig,
    ModelConfig,
    TrainConfig,
    VisionConfig,
)
from mammut.core.fields import to_dict
from mammut.models.flops import forward_flops, num_params
from mammut.performance import beside_peer, child, growth, peers, tables
from mammut.performance import step_time as train_step
from mammut.performance.chips import CHIPS
from mammut.performance.timing import exponent, in_turns, ratio, summary
from mammut.testing import tiny_config, tiny_model, tiny_processor

pytestmark = pytest.mark.long
DOTS = train_step.RunSettings(remat="dots")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model folder whose decoder has one group of layers."""
    folder = tmp_path_factory.mktemp("model")
    mammut.save(folder, tiny_model(), tiny_processor())
    return str(folder)


def run(checkpoint, tmp_path_factory, options):
    out = tmp_path_factory.mktemp("speed") / "new" / "times.json"
    speed.main([checkpoint, *options.split(), "--out", str(out)])
    return json.loads(out.read_text("utf-8"))


@pytest.fixture(scope="module")
def result(checkpoint, tmp_path_factory):
    """What the program writes of generation."""
    return run(
        checkpoint, tmp_path_factory, "--what generate --batch-sizes 1 2 --beams 1 2 --new-tokens 4"
    )


@pytest.fixture(scope="module")
def training(checkpoint, tmp_path_factory):
    """What it writes of the training step; the batch is split over eight devices."""
    return run(
        checkpoint,
        tmp_path_factory,
        "--what train parts growth --grow batch --grow-sizes 8 16 --batch-size 8 --steps 3 "
        "--warmup 1",
    )


def test_every_batch_size_is_timed_with_every_number_of_beams(result):
    assert [(row["batch"], row["beams"]) for row in result["generate"]] == [
        (1, 1),
        (1, 2),
        (2, 1),
        (2, 2),
    ]


def test_both_loops_give_every_image_the_same_text_of_so_many_tokens(result):
    for row in result["generate"]:
        assert row["texts_equal"] == row["batch"]
        assert row["max_score_difference"] < 1e-5
        assert row["steps"] == [4, 4]


def test_rates_follow_from_the_median_of_the_times(result):
    for row in result["generate"]:
        for loop in (row["cached"], row["uncached"]):
            times = sorted(loop["all_seconds"])
            assert len(times) == 6 and times[0] > 0 and loop["compile_s"] > 0
            assert loop["seconds"] == pytest.approx((times[2] + times[3]) / 2)
            assert 0 <= loop["seconds_iqr"] <= times[-1] - times[0]
            assert loop["captions_per_s"] == pytest.approx(row["batch"] / loop["seconds"])
            assert loop["new_tokens_per_s"] == pytest.approx(4 * loop["captions_per_s"])
            assert loop["ms_per_token"] == pytest.approx(250 * loop["seconds"])
        assert row["speedup"] == pytest.approx(
            row["uncached"]["seconds"] / row["cached"]["seconds"]
        )


def test_the_file_says_what_was_timed_and_where(result, checkpoint):
    assert result["model"] == checkpoint
    assert result["parameters"] == num_params(tiny_config())["total"]
    assert result["config"]["text"]["vocab_size"] == 60 and result["compute"]["dtype"] == "float32"
    assert result["versions"]["jax"] == jax.__version__ and result["machine"]["platform"] == "cpu"
    assert (result["new_tokens"], result["rounds"]) == (4, 3)


def test_the_table_of_generation_has_a_line_for_each_loop(result):
    for row in result["generate"]:
        of_cached, of_uncached = (
            re.split(" +", line.strip()) for line in tables.generation(row).split("\n")
        )
        assert of_cached[:4] == [
            str(row["batch"]),
            str(row["beams"]),
            f"{row['batch']}/{row['batch']}",
            "cached",
        ]
        assert of_uncached[0] == "uncached" and len(of_cached) == len(of_uncached) + 4


def test_the_rate_and_the_utilisation_of_a_step_follow_from_its_time(training):
    """By hand: three forward passes of `forward_flops`, over the time and eight peaks."""
    row = training["train"]
    assert row["per_s"] == pytest.approx(8 / row["seconds"])
    assert (
        row["seconds"] == pytest.approx(float(np.median(row["all_seconds"]))) and row["calls"] == 3
    )
    flops = 3 * 8 * sum(forward_flops(tiny_config()).values())
    assert row["tflops"] == pytest.approx(flops / row["seconds"] / 1e12)
    assert row["mfu"] == pytest.approx(flops / row["seconds"] / (8 * training["peak_flops"]))


def test_utilisation_of_a_known_chip_is_told_against_its_makers_figure_in_bfloat16_alone(
    monkeypatch,
):
    """One H200, 2 examples of 3 x 40 FLOPs a step of 0.5 s, a measured peak of 960 FLOP/s."""
    device = type("Device", (), {"device_kind": "NVIDIA H200"})
    monkeypatch.setattr(train_step.jax, "devices", lambda: [device])
    monkeypatch.setattr(train_step.jax, "device_count", lambda: 1)
    monkeypatch.setattr(train_step, "step_flops", lambda config: (2 * 3 * 40, 0))
    config = TrainConfig(model=tiny_config())
    assert train_step.utilisation(config, 0.5, 960.0) == {"tflops": 480 / 1e12, "mfu": 0.5}
    config = dataclasses.replace(config, compute=ComputeConfig(dtype="bfloat16"))
    told = train_step.utilisation(config, 0.5, 960.0)
    assert told["mfu_stated"] == pytest.approx(480 / CHIPS["NVIDIA H200"].flops)


def test_the_parts_of_a_step_and_the_rest_are_the_step(training):
    parts = training["parts"]
    assert list(parts) == [
        "step",
        "image encoder",
        "contrastive pass",
        "caption pass",
        "vocabulary and caption loss",
        "contrastive loss",
        "optimizer",
        "rest",
    ]
    own = [row for name, row in parts.items() if name != "step"]
    assert sum(row["seconds"] for row in own) == pytest.approx(parts["step"]["seconds"])
    assert sum(row["share"] for row in own) == pytest.approx(1)
    assert sum(row.get("flops_share", 0) for row in own) == pytest.approx(1)
    counted = forward_flops(tiny_config())
    assert parts["contrastive pass"]["flops_share"] == counted["contrastive_pass"] / sum(
        counted.values()
    )


def test_what_grows_has_a_row_for_each_size_and_twice_the_batch_is_twice_the_work(training):
    (found,) = training["growth"]
    assert found["axis"] == "batch" and [row["batch"] for row in found["rows"]] == [8, 16]
    assert found["exponents"]["flops"] == pytest.approx(1)
    first, second = (row["seconds"] for row in found["rows"])
    assert found["exponents"]["seconds"] == pytest.approx(np.log2(second / first))
    assert found["rows"][0]["memory_gib"]["state_and_batch"] > 0


@pytest.mark.parametrize("axis, expected", [
    ("batch", (4, 8, 16)), ("image_size", (8, 16, 24)), ("length", (6, 12, 24))
])  # fmt: skip
def test_sizes_to_grow_over_suit_the_model(axis, expected):
    assert growth.default_sizes(axis, tiny_config(), 8) == expected
    for size in expected:
        growth.grown(tiny_config(), axis, size)  # patches divide images


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.5, 1.0, 2.2])
def test_a_fit_finds_the_exponent_that_values_were_made_with(power):
    sizes = [3, 7, 20, 51]
    assert exponent(sizes, [5 * size**power for size in sizes]) == pytest.approx(power, abs=1e-9)


def test_a_fit_takes_noise_for_noise():
    sizes = np.array([1, 2, 4, 8, 16, 32])
    noise = np.random.default_rng(0).normal(1, 0.03, 6)
    assert exponent(sizes.tolist(), (sizes**1.5 * noise).tolist()) == pytest.approx(1.5, abs=0.05)


@pytest.mark.parametrize(
    "sizes, values", [([4], [1.0]), ([4, 4], [1.0, 2.0]), ([1, 2], [0.0, 1.0])]
)
def test_what_has_no_exponent_is_refused(sizes, values):
    with pytest.raises(ValueError, match="expected two sizes, all positive"):
        exponent(sizes, values)


def test_a_ratio_is_that_of_medians_and_lies_in_its_interval():
    rng = np.random.default_rng(1)
    slow, fast = ((scale * (1 + 0.1 * rng.random((6, 4)))).tolist() for scale in (3.0, 1.0))
    found = ratio(slow, fast)
    assert found["ratio"] == pytest.approx(np.median(slow) / np.median(fast))
    assert found["of_fastest"] == pytest.approx(np.min(slow) / np.min(fast))
    assert 2.7 < found["low"] < found["ratio"] < found["high"] < 3.3
    assert ratio(slow, slow)["low"] < 1 < ratio(slow, slow)["high"]


def test_turns_alternate_and_their_first_calls_are_not_counted():
    order = []
    turns = in_turns(
        {name: lambda name=name: order.append(name) for name in "ab"}, rounds=2, per_turn=2
    )
    assert "".join(order) == 2 * ("aaa" + "bbb" + "bbb" + "aaa")
    assert [len(turn) for turn in turns["a"]] == [2, 2, 2, 2]


def test_a_summary_is_of_the_single_times():
    found = summary([4.0, 1.0, 2.0, 3.0], per_call=10)
    assert found == {
        "seconds": 2.5,
        "seconds_iqr": 1.5,
        "per_s": 4.0,
        "calls": 4,
        "all_seconds": [4.0, 1.0, 2.0, 3.0],
    }


def test_a_fresh_process_tells_its_stages_and_leaves_a_cache_for_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    config = train_step.RunSettings(mesh=MeshConfig(data=1, fsdp=2)).train_config(tiny_config(), 8)
    found = child.ask(config, cache=str(tmp_path), fake_devices=2)
    seconds = found["seconds"]
    assert (
        list(seconds) == ["import", "trace", "compile", "run", "total"]
        and min(seconds.values()) > 0
    )
    assert seconds["total"] == pytest.approx(sum(seconds.values()) - seconds["total"])
    assert found["devices"] == 2 and any(
        path.name.startswith("jit_step") for path in tmp_path.iterdir()
    )


def test_a_process_that_fails_says_why():
    config = train_step.RunSettings(mesh=MeshConfig(data=3)).train_config(tiny_config(), 8)
    with pytest.raises(
        RuntimeError, match="mesh.data x fsdp x model is 3 x 1 x 1, expected a product of 1 devices"
    ):
        child.ask(config, fake_devices=1)


def test_over_devices_the_state_of_one_shrinks(monkeypatch):
    asked = []

    def ask(config, fake_devices):
        asked.append(config.mesh)
        return {"memory_gib": {"state_and_batch": 1 / fake_devices, "temporaries": 0.1}}

    monkeypatch.setattr(child, "ask", ask)
    found = child.over_devices(TrainConfig(), [1, 2, 8])
    assert found["exponents"] == pytest.approx({"state_and_batch": -1, "temporaries": 0})
    assert [mesh.fsdp for mesh in asked] == [1, 2, 8] and {mesh.data for mesh in asked} == {1}


COCA_SIZE = peers.Size(image_size=32, depth=2, width=64, length=12, batch=8)


@pytest.fixture(scope="module")
def peer():
    """A CoCa of open_clip's."""
    original_package()
    return peers.OpenClip(
        "open_clip", peers.peer_config(COCA_SIZE, "coca", 500), "coca", COCA_SIZE.batch
    )


def test_a_peer_with_our_weights_has_our_losses_and_both_are_timed(peer):
    ours = beside_peer.load_ours(peer)
    row = beside_peer.train(peer, ours, train_step.RunSettings(), rounds=1, per_turn=1)
    assert max(row["losses"]["relative_difference"].values()) < 1e-5
    assert [row["times"][name]["calls"] for name in ("mammut", "eager")] == [2, 2]
    expected = row["times"]["eager"]["seconds"] / row["times"]["mammut"]["seconds"]
    assert row["speedup"]["eager"]["ratio"] == pytest.approx(expected)
    assert "ahead of the peer, eager" in tables.beside(row)


def test_beside_a_peer_nothing_is_computed_again_and_the_file_says_so(tmp_path, monkeypatch):
    """On an accelerator, too, where our steps alone run in bfloat16 and recompute."""
    monkeypatch.setattr(train_step.jax, "default_backend", lambda: "gpu")
    assert train_step.RunSettings().compute(tiny_config()).remat == "dots"
    measured = []

    class Stop(Exception):
        pass

    def make_step(config, model, batch):
        measured.append(config.compute)
        raise Stop

    monkeypatch.setattr(beside_peer, "make_step", make_step)
    tokens = np.ones((2, 4), int)

    class Peer(peers.OpenClip):
        version = "0"

        def __init__(self):
            self.batch = {"image": np.zeros((2, 16, 16, 3), np.uint8), "tokens": tokens}
            self.model_cfg = {}

    fake = Peer()
    for settings, remat in ((train_step.RunSettings(), "none"), (DOTS, "dots")):
        with pytest.raises(Stop):
            beside_peer.train(fake, tiny_model(), settings, rounds=1, per_turn=1)
        assert (measured[-1].dtype, measured[-1].remat) == ("float32", remat)

    monkeypatch.setattr(speed, "OpenClip", lambda *arguments: fake)
    monkeypatch.setattr(beside_peer, "load_ours", lambda peer: tiny_model())
    monkeypatch.setattr(beside_peer, "train", lambda *arguments, **others: None)
    monkeypatch.setattr(tables, "beside", str)
    result = speed.measure_peer(speed.Options(peer="open_clip", what=("train",)))
    assert result["compute"] == to_dict(measured[0])


def test_a_peer_with_one_other_weight_is_not_timed(peer):
    ours = beside_peer.load_ours(peer)
    peer.model.visual.proj.data[0, 0] += 1
    with pytest.raises(peers.PeerError, match="contrastive_loss is .* here and .* there"):
        beside_peer.train(peer, ours, train_step.RunSettings(), rounds=1, per_turn=1)
    peer.model.visual.proj.data[0, 0] -= 1


def test_a_loss_that_is_no_number_is_not_equal_to_another():
    losses = dict.fromkeys(beside_peer.TOLERANCES, 1.0)
    assert set(beside_peer.require_equal(losses, losses).values()) == {0.0}
    with pytest.raises(peers.PeerError, match="caption_loss is nan here and nan there"):
        beside_peer.require_equal(*[losses | {"caption_loss": float("nan")}] * 2)


def test_a_peer_that_generates_gives_our_texts_and_one_that_cannot_says_why(peer):
    row = beside_peer.generation(
        peer, beside_peer.load_ours(peer), train_step.RunSettings(), 2, 1, 4, rounds=1
    )
    if "not_run" in row:
        assert "times" not in row and "not run: " in tables.beside_generation(row)
    else:
        assert row["texts_equal"] == 2 and row["times"]["peer"]["captions_per_s"] > 0


def test_a_peer_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(
        peers.PeerError, match="expected open_clip or a folder that holds the package open_clip"
    ):
        peers.import_open_clip(str(tmp_path))


def test_a_preset_is_given_random_weights_and_computes_as_told(monkeypatch):
    small = ModelConfig(
        vision=VisionConfig(image_size=8, patch_size=8, width=8, depth=1, num_heads=1, mlp_dim=8),
        text=DecoderConfig(vocab_size=9, max_length=4, width=8, depth=2, num_heads=1, mlp_dim=8),
    )
    monkeypatch.setattr(mammut.presets, "mammut_s16", lambda: small)
    model, processor, source = speed.load_model(speed.Options(preset="mammut_s16"))
    assert source == "preset mammut_s16 with random weights" and processor is None
    told = train_step.computed(
        model, train_step.RunSettings(dtype="bfloat16", remat="full", unroll=1)
    )
    assert (told.compute.dtype, told.compute.remat, told.compute.unroll) == ("bfloat16", "full", 1)
    assert told.text.dtype == "bfloat16"
    # they are stored as they were
    assert {str(x.dtype) for x in jax.tree.leaves(nnx.state(told))} == {"float32"}
    assert train_step.RunSettings().compute(small).unroll == 2  # all layers, on a CPU


def test_another_compute_type_changes_no_weight(checkpoint):
    model = speed.load_model(speed.Options(checkpoint))[0]
    model = train_step.computed(model, train_step.RunSettings(dtype="bfloat16"))
    image, tokens = np.zeros((1, 16, 16, 3), np.uint8), np.ones((1, 4), int)
    compute = jax.jit(lambda: tuple(m.caption_logits(image, tokens) for m in (model, tiny_model())))
    in_bfloat16, in_float32 = map(np.asarray, compute())
    assert 0 < np.abs(in_bfloat16 - in_float32).max() < 0.1 * np.abs(in_float32).max()


def test_parameters_are_measured_in_the_number_types_of_the_checkpoint(monkeypatch):
    stored = ComputeConfig(text_param_dtype="bfloat16")
    model = mammut.MaMMUT(tiny_config(), compute=stored, rngs=nnx.Rngs(0))
    told = train_step.computed(model, train_step.RunSettings())
    assert told.compute.text_param_dtype == "bfloat16"
    assert told.compute.param_dtype == "float32"

    monkeypatch.setattr(speed, "load_model", lambda options: (model, None, "a model"))
    monkeypatch.setattr(speed, "measured_peak", lambda dtype: 1.0)
    monkeypatch.setattr(tables, "grown", str)
    monkeypatch.setattr(tables, "steps", str)
    monkeypatch.setattr(speed, "make_step", lambda config, model: config)
    monkeypatch.setattr(growth, "make_step", lambda config: config)
    monkeypatch.setattr(speed, "measure", lambda config, *others: to_dict(config.compute))
    measured = []

    def measure(config, *others):
        measured.append(to_dict(config.compute))
        return {"seconds": 1.0, "tflops": 1.0, "memory_gib": {"temporaries": 1.0}}

    monkeypatch.setattr(growth, "measure", measure)
    result = speed.measure_model(speed.Options(what=("train", "growth"), grow=("batch",)))
    assert result["compute"] == result["train"] == measured[0]
    assert result["compute"]["text_param_dtype"] == "bfloat16"


@pytest.mark.parametrize("arguments, expected", [
    ("--preset nope", "--preset is 'nope', "
     "expected a function of mammut.presets such as tiny or mammut_b16"),
    ("--preset VisionConfig", "--preset is 'VisionConfig', expected a function"),
    ("--preset _vit", "--preset is '_vit', expected a function"),
    ("CHECKPOINT --what generate --new-tokens 12",
     "--new-tokens is 12, expected fewer than the 12 of DecoderConfig."),
    ("CHECKPOINT --what generate --new-tokens 3 --beams 60",
     "num_beams is 60, expected fewer than the 60 of the voc"),
    ("CHECKPOINT --what train --batch-size 12",
     "data.batch_size / accumulation 12 does not divide over the 8"),
    ("CHECKPOINT --what video --new-tokens 12", "--new-tokens is 12, expected fewer than the 12"),
    ("CHECKPOINT --what video --new-tokens 3 --videos /nowhere.mp4",
     "video /nowhere.mp4 cannot be read"),
    ("/nowhere", "there is no /nowhere"),
])  # fmt: skip
def test_what_cannot_be_timed_is_refused_in_one_sentence(checkpoint, arguments, expected):
    with pytest.raises(SystemExit) as error:
        speed.main(arguments.replace("CHECKPOINT", checkpoint).split())
    assert str(error.value).startswith(f"python -m eval.speed: {expected}") and "\n" not in str(
        error.value
    )


@pytest.mark.parametrize("arguments, expected", [
    ("--batch-sizes 4 0", "--batch-sizes is 4 0, expected numbers of at least 1"),
    ("--beams", "--beams is empty, expected numbers of at least 1"),
    ("--new-tokens 0", "--new-tokens is 0, expected at least 1"),
    ("--rounds 2", "--rounds is 2, expected at least 3"),
    ("--steps 0", "--steps is 0, expected at least 1"),
    ("--frames 0", "--frames is 0, expected at least 1"),
    ("--what data", "--what has data, expected --data"),
    ("--grow batch length --grow-sizes 4 8", "--grow-sizes is given for 2 of --grow, expected one"),
    ("somewhere --preset tiny",
     "both CHECKPOINT somewhere and --preset tiny are given, expected one"),
    ("--peer open_clip --preset tiny", "--peer is given with a model"),
    ("--out times.txt", "--out is times.txt, expected a name that ends in .json"),
    ("--dtype float16", "float16"),
])  # fmt: skip
def test_wrong_options_are_refused_before_anything_is_loaded(capsys, arguments, expected):
    with pytest.raises(SystemExit) as error:
        speed.main(arguments.split())
    assert error.value.code not in (0, None)
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
    assert expected in said
