"""The program `python train.py`.

A run from start to end, killed and resumed bit for bit, and everything it refuses.
"""

import contextlib
import dataclasses
import html
import importlib.util
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import mammut
from mammut.config import MeshConfig, TokenizerConfig, TrainConfig
from mammut.core import sharding
from mammut.core.params import by_name
from mammut.data import synthetic
from mammut.data.images import ImageTransform
from mammut.data.processor import Processor
from mammut.data.sources import open_source
from mammut.evaluation.predictions import Predictions
from mammut.performance.out_of_memory import enough_memory, out_of_memory_advice
from mammut.testing import tiny_config, tiny_model, tiny_processor
from mammut.training.command_line import load_recipe
from mammut.training.new_processor import make_processor
from mammut.training.run import resolve, with_overrides
from mammut.training.run_folder import read_run, write_run
from mammut.training.step import TrainState, make_trainer
from mammut.training.tasks import ImageTextTask
from mammut.weights.checkpoints import Checkpoints, Restored
from mammut.weights.model_folder import open_model
from mammut.weights.resample import resample_positions

TRAIN = pathlib.Path(__file__).parents[1] / "train.py"
STEPS, BATCH = 30, 16
RECIPE = """
from mammut.config import (
    DataConfig, DecoderConfig, LossConfig, ModelConfig, OptimizerConfig, TrainConfig, VisionConfig
)


def get_config():
    return TrainConfig(
        model=ModelConfig(
            vision=VisionConfig(
                image_size=16, patch_size=8, width=WIDTH, depth=2, num_heads=2, mlp_dim=32
            ),
            text=DecoderConfig(
                vocab_size=64, max_length=16, width=16, depth=2, num_heads=2, mlp_dim=32
            ),
        ),
        data=DataConfig(
            train="synthetic:train[:200]", val="synthetic:val[:16]",
            batch_size=16, eval_batch_size=16, threads=2,
            crop_scale=(0.5, 1.0),
        ),
        loss=LossConfig(contrastive_weight=0.5, caption_weight=2.0),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        steps=30, log_every=1, eval_every=20, checkpoint_every=3, max_nonfinite_steps=3,
    )
"""


def write_recipe(folder: pathlib.Path, width: int = 16) -> pathlib.Path:
    path = folder / "small.py"
    path.write_text(RECIPE.replace("WIDTH", str(width)))
    return path


class Program:
    """`train.py` as others start it: a process of its own, one device, away from the checkout."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.recipe = folder, write_recipe(folder)
        flags = os.environ["XLA_FLAGS"].split()
        self._environment = os.environ | {
            "XLA_FLAGS": " ".join(flag for flag in flags if "device_count" not in flag),
            "JAX_PLATFORMS": "cpu",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PATH": "",  # without Java, which takes seconds to start: METEOR is left out
        }

    def start(self, *argv: str) -> subprocess.Popen:
        command = [
            sys.executable,
            str(TRAIN),
            *argv,
            "--compilation-cache",
            str(self.folder / "xla"),
        ]
        return subprocess.Popen(command, cwd=self.folder, env=self._environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    def run(self, *argv: str, code: int = 0) -> tuple[str, str]:
        """Runs to the end; what it wrote to stdout and stderr."""
        process = self.start(*argv)
        out, err = process.communicate(timeout=300)
        assert process.returncode == code, out + err
        return out, err

    def interrupt(self, workdir: str, at: int, kind: signal.Signals, *argv: str) -> tuple[int, str]:
        """Sends a signal once step `at` is in the log; the exit code and stdout."""
        process = self.start(*argv)
        deadline = time.monotonic() + 300
        while not any(row["step"] >= at for row in metrics(self.folder / workdir)):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.001)
        process.send_signal(kind)
        out, _ = process.communicate(timeout=120)
        return process.returncode, out


def metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    """The steps in the log, in the order written."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if "train/loss" in row]


def learned(row: dict[str, float]) -> dict[str, float]:
    """What a step computed, without how fast."""
    return {name: value for name, value in row.items() if not name.startswith("perf/")}


def restore(workdir: pathlib.Path) -> Restored:
    config, _ = read_run(workdir)
    with Checkpoints(workdir, keep=config.keep_checkpoints) as checkpoints:
        return checkpoints.restore(abstract_state(config))


def abstract_state(config: TrainConfig) -> TrainState:
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    return make_trainer(config, ImageTextTask(config.loss), mesh).abstract_state


def assert_same_run(workdir: pathlib.Path, expected: pathlib.Path) -> None:
    """Assert that two runs give the same results.

    Compared are the parameters, the optimizer state, the position in the data, the model folder and
    the losses of every step.
    """
    got, want = restore(workdir), restore(expected)
    assert got.step == want.step == STEPS and got.data == want.data
    for (path, x), y in zip(
        jax.tree.leaves_with_path(want.state), jax.tree.leaves(got.state), strict=True
    ):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)
    for name in ("model.safetensors", "config.json", "processor.json", "tokenizer.model"):
        assert (workdir / name).read_bytes() == (expected / name).read_bytes(), name
    losses = {row["step"]: learned(row) for row in metrics(expected)}
    rows = metrics(workdir)
    assert {row["step"] for row in rows} == {*range(1, STEPS + 1)}
    for row in rows:  # steps done twice included
        assert learned(row) == losses[row["step"]], row["step"]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Program:
    return Program(tmp_path_factory.mktemp("program"))


@pytest.fixture(scope="module")
def straight(program) -> tuple[pathlib.Path, str]:
    """The folder and the output of a run that nothing disturbed."""
    out, _ = program.run("small.py", "--workdir", "straight")
    return program.folder / "straight", out


# --- a run


def test_a_run_leaves_its_log_its_config_and_a_model_that_loads(straight):
    workdir, out = straight
    config, overrides = read_run(workdir)
    assert (
        config.steps == STEPS
        and config.loss.caption_weight == 2
        and "--compilation-cache" in overrides
    )
    assert json.loads((workdir / "run.json").read_text())["state"] == "done"
    assert not (workdir / "run.lock").exists()

    rows = metrics(workdir)
    assert [row["step"] for row in rows] == [*range(1, STEPS + 1)]
    for row in rows:
        weighted = 0.5 * row["train/loss_contrastive"] + 2 * row["train/loss_caption"]
        assert row["train/loss"] == pytest.approx(weighted, rel=1e-5)
    assert all(
        0 <= row["perf/data_wait"] <= 1 and row["perf/examples_per_sec"] > 0 for row in rows[1:]
    )
    assert rows[-1]["train/loss_caption"] < rows[0]["train/loss_caption"] - 0.2
    assert [row["train/learning_rate"] for row in rows[:3]] == pytest.approx([0, 1.5e-3, 3e-3])

    evaluations = [
        json.loads(line)
        for line in (workdir / "metrics.jsonl").read_text().splitlines()
        if "eval/" in line
    ]
    assert [row["step"] for row in evaluations] == [20, STEPS]
    for row in evaluations:
        assert 0 <= row["eval/val/t2i_r1"] <= row["eval/val/t2i_r5"] <= row["eval/val/t2i_r10"] <= 1
    events = b"".join(path.read_bytes() for path in (workdir / "tensorboard").iterdir())
    for name in (
        b"train/loss_contrastive",
        b"train/loss_caption",
        b"perf/data_wait",
        b"eval/val/i2t_r1",
    ):
        assert name in events

    model, processor = mammut.load(workdir)
    assert model.config == config.model and processor.encode_text(["one red circle"])[1].sum() > 2
    state = restore(workdir)
    assert state.step == STEPS and state.data["position"] == STEPS * BATCH
    saved = nnx.to_pure_dict(nnx.state(model))
    assert jax.tree.all(jax.tree.map(np.array_equal, saved, state.state.params))


def test_a_run_says_what_it_does_and_how_well_it_went(straight):
    workdir, out = straight
    assert "200 examples" in out and "data 1 x fsdp 1 x model 1 on cpu" in out
    assert f"starting at step 0 of {STEPS} in straight" in out
    line = rf"^step 7/{STEPS}  contrastive \d+\.\d+  caption \d+\.\d+  .* images/s  data wait \d+%"
    assert re.search(line, out, re.M)
    assert (
        "val at step 20" in out
        and f"val at step {STEPS}: 16 images, 48 texts (chance R@1 6.2%)" in out
    )
    assert re.search(
        r"text to image  R@1 [\d.]+%  R@5 [\d.]+%  R@10 [\d.]+%\n  image to text  R@1 ", out
    )
    final = out[out.index(f"val at step {STEPS}") :]
    assert final.count("    says  ") == final.count("    ref   ") == 10
    assert out.strip().endswith(
        "model saved: mammut.load('straight')\nreport: straight/report.html"
    )


def test_a_run_ends_with_its_predictions_their_scores_and_a_report(straight):
    workdir, _ = straight
    last = [
        json.loads(line)
        for line in (workdir / "metrics.jsonl").read_text().splitlines()
        if "eval/" in line
    ][-1]
    retrieval = Predictions.load(workdir / "eval" / "retrieval_val.predictions.jsonl", "retrieval")
    captions = Predictions.load(workdir / "eval" / "caption_val.predictions.jsonl", "caption")
    assert len(retrieval.records) == 16 + 48 and len(captions.records) == 16
    scores = json.loads((workdir / "eval" / "retrieval_val.json").read_text())["metrics"]
    assert {f"eval/val/{name}": value for name, value in scores.items()}.items() <= last.items()
    model, processor = mammut.load(workdir)
    images = [synthetic.draw("val", record["index"], 16) for record in captions.records]
    assert [record["prediction"] for record in captions.records] == mammut.caption(
        model, processor, images
    )
    page = (workdir / "report.html").read_text()
    assert all(html.escape(record["prediction"]) in page for record in captions.records[:3])


# --- a run that starts from another


@pytest.mark.long
def test_a_run_starts_from_the_weights_and_the_processor_of_another(program, straight):
    """A run takes its weights and its processor from another model.

    A learning rate next to nothing leaves the weights where they were, whatever the recipe's own
    architecture.
    """
    workdir, still = (
        straight[0],
        ["--optimizer.learning-rate", "1e-9", "--steps", "2", "--optimizer.warmup-steps", "0"],
    )
    write_recipe(program.folder, width=32).rename(program.folder / "wide.py")
    write_recipe(program.folder)
    out, _ = program.run(
        "wide.py", "--workdir", "tuned", "--init", "straight", "--task", "caption", *still
    )
    tuned = program.folder / "tuned"
    assert (tuned / "processor.json").read_bytes() == (workdir / "processor.json").read_bytes()
    (before, _), (after, _) = mammut.load(workdir), mammut.load(tuned)
    assert before.config == after.config
    before, after = (nnx.to_pure_dict(nnx.state(model)) for model in (before, after))
    assert (
        max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), before, after)))
        < 1e-7
    )
    assert "contrastive" not in out and "\n  cider " in out and out.count("    says  ") == 10
    captions = Predictions.load(tuned / "eval" / "caption_val.predictions.jsonl", "caption")
    assert len(captions.records) == 16

    replace = ["--tokenizer.replace", "True", "--model.text.vocab-size", "48"]
    program.run(
        "small.py", "--workdir", "new", "--init", "straight", "--task", "classify", *replace, *still
    )
    model, processor = mammut.load(program.folder / "new")
    assert processor.vocab_size <= 48 and model.config.text.vocab_size == 48
    new = nnx.to_pure_dict(nnx.state(model))
    assert (
        float(
            abs(
                new["vision"]["patch_embed"]["kernel"] - before["vision"]["patch_embed"]["kernel"]
            ).max()
        )
        < 1e-7
    )
    labels = Predictions.load(
        program.folder / "new" / "eval" / "classify_val.predictions.jsonl", "classify"
    )
    assert set(labels.settings["classes"]) == {"circle", "cross", "square", "triangle"}


@pytest.mark.long
def test_a_run_starts_from_an_image_encoder_alone_and_would_resume_without_it(program):
    """The tower brings its architecture and the way images are taken; the recipe has the rest."""
    config = tiny_config()
    tower = dataclasses.replace(config.vision, depth=1, class_token=True)
    config = dataclasses.replace(config, vision=tower)
    transform = ImageTransform(16, mode="longest", interpolation="bilinear")
    processor = Processor(tiny_processor().tokenizer, transform, config.text.max_length)
    before = tiny_model(config)
    mammut.save(program.folder / "tower", before, processor)
    argv = [
        "--init-vision",
        "tower",
        "--model.vision.image-size",
        "24",
        "--task",
        "caption",
        "--data.val",
        "None",
    ]
    still = ["--optimizer.learning-rate", "1e-9", "--steps", "2", "--optimizer.warmup-steps", "0"]
    out, _ = program.run("small.py", "--workdir", "seen", *argv, *still)
    assert re.search(
        r"^vision.pos_embed +288  resampled init_vision tower, 2 x 2 -> 3 x 3, bicubic$", out, re.M
    )
    assert re.search(r"^vision.layers +[\d,]+  loaded    init_vision tower$", out, re.M)
    assert re.search(r"^text.layers +[\d,]+  random    no start has this part$", out, re.M)
    assert re.search(
        r"^text.layers +[\d,]+  left out  init_vision tower, of no image encoder$", out, re.M
    )

    model, processor = mammut.load(program.folder / "seen")
    assert model.config.vision == dataclasses.replace(tower, image_size=24)
    assert model.config.text == load_recipe(program.recipe).model.text
    assert (
        processor.image == dataclasses.replace(transform, image_size=24)
        and processor.max_length == 16
    )
    table = resample_positions(np.asarray(before.vision.pos_embed[...]), (3, 3), "bicubic")
    np.testing.assert_allclose(model.vision.pos_embed[...], table, rtol=0, atol=1e-7)
    same = [
        (m.vision.layers.mlp.up.kernel[...], m.vision.class_embed[...]) for m in (before, model)
    ]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-7), *same)
    # 0.02, in the tower's file 0.2
    assert 0 < abs(np.asarray(model.text.token_embed.embedding[...])).mean() < 0.1

    shutil.rmtree(program.folder / "tower")
    run = resolve(None, TRAIN, program.folder / "seen", ["--steps", "3"], resume=True)
    assert (
        run.starts == {} and run.config.init_vision == "tower" and run.config.model == model.config
    )


@pytest.fixture
def model_folder(tmp_path) -> pathlib.Path:
    mammut.save(tmp_path / "model", tiny_model(), tiny_processor())
    return tmp_path / "model"


@pytest.mark.parametrize("argv, message", [
    (["--init", "nowhere"], "there is no nowhere: expected a folder or a file"),
    (["--init-vision", "nowhere"], "there is no nowhere: expected a folder or a file"),
    (["--init", "model", "--model.vision.width", "64"],
     "the model to start from, init model, is another one: model.vision.width is 64, it was 32"),
    (["--init-vision", "model", "--model.vision.depth", "3", "--model.vision.mlp-dim", "8"],
     "init_vision model, is another one: model.vision.depth is 3, it was 2; "
     "model.vision.mlp_dim is 8, it was 64"),
    (["--init-text", "model", "--model.text.vocab-size", "50"],
     "model.text.vocab_size is 50, it was 60"),
    (["--init", "model", "--tokenizer.path", "x.model"],
     "tokenizer.path and init are given: tokenizer.replace True"),
    (["--init-text", "model", "--tokenizer.path", "x.model"],
     "tokenizer.path and init_text are given"),
    (["--init", "model", "--tokenizer.replace", "True", "--model.text.pad-id", "7",
      "--model.text.vocab-size", "64"],
     "model.text.pad_id is 7, the pad of the new vocabulary is 0"),
])  # fmt: skip
def test_a_run_does_not_start_from_a_model_that_is_not_there_or_another(
    refusal, model_folder, argv, message
):
    assert message in refusal("small.py", "--workdir", "new", *argv)


@pytest.mark.parametrize("overrides, sizes", [
    ([], (16, 8, 12, 60)),
    (["--model.vision.image-size", "24"], (24, 8, 12, 60)),
    (["--model.vision.image-size", "20", "--model.vision.patch_size=10"], (20, 10, 12, 60)),
    (["--model.text.max-length", "30", "--model.text.vocab_size", "7",
      "--tokenizer.replace", "True"],
     (16, 8, 30, 7)),
])  # fmt: skip
def test_the_sizes_of_a_model_to_start_from_can_be_overridden(
    model_folder, tmp_path, overrides, sizes
):
    """Sizes that the recipe's own patches would not fit are no error."""
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace("patch_size=8", "patch_size=16"))
    recipe = load_recipe(path)
    config, starts = with_overrides(recipe, ["--init", str(model_folder), *overrides])
    vision, text = config.model.vision, config.model.text
    assert (vision.image_size, vision.patch_size, text.max_length, text.vocab_size) == sizes
    assert list(starts) == ["init"] and vision.width == 32 and config.optimizer == recipe.optimizer


@pytest.mark.long
def test_a_run_whose_recipe_does_not_fit_the_model_it_started_from_is_resumed_with_it(
    model_folder, tmp_path
):
    """The overrides that made the recipe fit are applied before the model is."""
    path = TRAIN.parent / "configs" / "magma.py"
    overrides = ["--augment.prefix-dropout", "0", "--tokenizer.max-length", "12"]
    overrides += ["--init", str(model_folder), "--model.vision.image-size", "24"]
    recipe = load_recipe(path)
    assert recipe.augment.prefix_dropout and recipe.model.text.has_prefix
    config, _ = with_overrides(recipe, overrides)
    assert not config.model.text.has_prefix and config.model.vision.image_size == 24
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", config, overrides)
    resumed = resolve(path, TRAIN, tmp_path / "run", ["--steps", "5000"], resume=True)
    assert resumed.config == dataclasses.replace(config, steps=5000)
    with pytest.raises(ValueError, match="augment.patch_drop is 0.5, it was 0.0"):
        resolve(path, TRAIN, tmp_path / "run", ["--augment.patch-drop", "0.5"], resume=True)


def test_a_task_that_the_model_cannot_do_is_refused():
    model = tiny_config()
    mute = dataclasses.replace(model.text, depth=0, text_only_depth=2)
    with pytest.raises(
        ValueError, match="task is 'caption', which needs a caption pass: model.text.depth is 0"
    ):
        TrainConfig(task="caption", model=dataclasses.replace(model, text=mute))
    blind = dataclasses.replace(model, text=dataclasses.replace(model.text, pooling="none"))
    with pytest.raises(
        ValueError, match="task is 'image_text', but with model.text.pooling 'none'"
    ):
        TrainConfig(model=blind)
    assert TrainConfig(task="caption", model=blind).model == blind


def test_a_model_without_a_tokenizer_wants_to_be_told_of_one(tmp_path, model_folder):
    tiny_processor().save(tmp_path / "vocabulary")
    opened = open_model(model_folder)
    bare = {"init_text": dataclasses.replace(opened, processor=None)}
    config = TrainConfig(model=opened.config)
    source = open_source("synthetic:val[:8]", image_size=16)
    with pytest.raises(
        ValueError, match="init_text .*model comes without a tokenizer: tokenizer.path says where"
    ):
        make_processor(config, source, bare)
    path = str(tmp_path / "vocabulary" / "tokenizer.model")
    config = dataclasses.replace(config, tokenizer=TokenizerConfig(path=path))
    processor = make_processor(config, source, bare)
    text = ["one red circle"]
    assert np.array_equal(processor.encode_text(text)[0], tiny_processor().encode_text(text)[0])
    with pytest.raises(ValueError, match="tokenizer.path and init_text are given"):
        make_processor(config, source, {"init_text": opened})


@pytest.mark.long
def test_compile_only_tells_the_memory_of_the_step_and_trains_nothing(program, straight):
    out, _ = program.run(
        "small.py", "--workdir", "compiled", "--compile-only", "--init", "straight"
    )
    assert re.search(
        r"compiled in \d+ s for the devices here: 1 x cpu, mesh data 1 x fsdp 1 x model 1", out
    )
    assert re.search(r"temporaries +\d+\.\d", out) and "step 1/" not in out
    assert not (program.folder / "compiled").exists()


# --- killed and resumed


@pytest.mark.long
def test_a_run_killed_twice_and_resumed_with_other_threads_is_bit_for_bit_the_undisturbed_one(
    program, straight
):
    first, second = random.randint(2, 10), random.randint(13, 18)  # the evaluation at 20 gives time
    print(f"killed once step {first}, then step {second} was logged")
    code, _ = program.interrupt("killed", first, signal.SIGKILL, "small.py", "--workdir", "killed")
    assert code == -signal.SIGKILL
    resume = ["--workdir", "killed", "--resume"]
    code, _ = program.interrupt("killed", second, signal.SIGKILL, *resume, "--data.threads", "5")
    assert code == -signal.SIGKILL
    workdir = program.folder / "killed"
    assert not (workdir / "config.json").exists() and metrics(workdir)[-1]["step"] < STEPS
    model, _ = mammut.load(workdir)  # a run without an end has a model too
    assert model.config.vision.width == 16
    out, _ = program.run(*resume, "--data.threads", "1")
    started = int(re.search(rf"resuming at step (\d+) of {STEPS} in killed", out)[1])
    assert started % 3 == 0 and started <= metrics(workdir)[-1]["step"]
    assert_same_run(workdir, straight[0])


@pytest.mark.long
def test_a_sigterm_saves_the_step_it_came_in_and_the_run_goes_on_from_there(program, straight):
    at = random.choice([step for step in range(4, 19) if step % 3])
    print(f"terminated once step {at} was logged")
    code, out = program.interrupt(
        "terminated", at, signal.SIGTERM, "small.py", "--workdir", "terminated"
    )
    assert code == 75
    workdir = program.folder / "terminated"
    last = metrics(workdir)[-1]["step"]
    assert at <= last < STEPS and f"SIGTERM: saved step {last}, go on with --resume" in out
    assert not (workdir / "config.json").exists()
    saved = restore(workdir)
    assert saved.step == last and saved.data["position"] == last * BATCH

    out, _ = program.run("small.py", "--workdir", "terminated", "--resume")
    assert f"resuming at step {last} of {STEPS}" in out
    assert_same_run(workdir, straight[0])
    # no step was done twice
    assert [row["step"] for row in metrics(workdir)] == [*range(1, STEPS + 1)]


def test_help_tells_of_the_program_and_of_every_setting(train, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    for option in ("--coordinator", "--num-processes", "--process-id", "HOST:PORT of process 0"):
        assert option in said
    assert (
        "One process drives all devices of its machine" in said
        and "--optimizer.learning-rate" in said
    )


@pytest.mark.long
def test_a_folder_is_refused_while_a_run_goes_on_and_free_when_that_was_killed(program):
    """Killed before its first checkpoint, the run blocks neither a fresh one nor other settings."""
    argv = ("small.py", "--workdir", "held", "--checkpoint-every", "1000")
    process = program.start(*argv)
    deadline = time.monotonic() + 300
    while not metrics(program.folder / "held"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)  # it would end too soon
    for more in ([], ["--resume"], ["--overwrite"]):
        _, err = program.run("small.py", "--workdir", "held", *more, code=1)
        assert f"held is in use by train.py, process {process.pid} on " in err
    process.kill()
    process.communicate()
    workdir = program.folder / "held"
    assert json.loads((workdir / "run.json").read_text())["state"] == "begun"
    short = ("--steps", "4", "--checkpoint-every", "2", "--data.val", "None")
    out, _ = program.run("--workdir", "held", "--resume", "--seed", "3", *short)
    assert "starting at step 0 of 4 in held" in out and read_run(workdir)[0].seed == 3
    assert [row["step"] for row in metrics(workdir)] == [1, 2, 3, 4]
    out, _ = program.run("small.py", "--workdir", "held", "--overwrite", *short)
    assert "starting at step 0 of 4 in held" in out and read_run(workdir)[0].seed == 0
    shutil.rmtree(workdir / "checkpoints")
    _, err = program.run("--workdir", "held", "--resume", "--steps", "8", code=1)
    assert "the run in held is done, but held/checkpoints has none of its steps" in err


# --- a language model first


@pytest.mark.long
def test_a_run_that_makes_its_language_model_first_is_resumed_in_either_stage(program):
    """A SIGTERM in both stages changes no bit.

    The language model is trained on the captions alone, then frozen.
    """
    only = [
        f"--{name}={value}"
        for name, value in {
            "task": "caption",
            "text-steps": 100,
            "steps": 100,
            "checkpoint-every": 50,
            "eval-every": 0,
            "data.val": "None",
        }.items()
    ]
    only += ["--trainable", "vision.*", "image_projection.*"]
    program.run("small.py", "--workdir", "language", *only)
    whole = program.folder / "language"
    weights = mammut.load(whole)[0], mammut.load(whole / "language_model")[0]
    ours, theirs = (
        by_name(nnx.to_pure_dict(nnx.state(model.text, nnx.Param))) for model in weights
    )
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)
    assert (
        metrics(whole / "language_model")[-1]["train/loss"]
        < metrics(whole / "language_model")[0]["train/loss"]
    )

    args = ("small.py", "--workdir", "stopped", *only)
    assert program.interrupt("stopped/language_model", 2, signal.SIGTERM, *args)[0] == 75
    assert not (program.folder / "stopped" / "processor.json").exists()
    assert (
        program.interrupt("stopped", 2, signal.SIGTERM, "--workdir", "stopped", "--resume")[0] == 75
    )
    # the run is on its own from its first checkpoint on
    shutil.rmtree(program.folder / "stopped" / "language_model")
    program.run("--workdir", "stopped", "--resume")
    assert (program.folder / "stopped" / "model.safetensors").read_bytes() == (
        whole / "model.safetensors"
    ).read_bytes()


# --- what stops a run


@pytest.mark.long
def test_a_run_whose_loss_stays_nan_stops_and_says_so(program, straight):
    """A state with a NaN in it, three steps before the end: every step skips its update."""
    workdir = program.folder / "poisoned"
    workdir.mkdir()
    for name in ("run.json", "processor.json", "tokenizer.model"):
        shutil.copy(straight[0] / name, workdir)
    with Checkpoints(straight[0], keep=2) as checkpoints:
        assert checkpoints.steps == [27, 30]
    shutil.copytree(straight[0] / "checkpoints" / "27", workdir / "checkpoints" / "27")
    saved = restore(workdir)
    params = saved.state.params
    params["image_projection"]["bias"] = params["image_projection"]["bias"].at[3].set(np.nan)
    shutil.rmtree(workdir / "checkpoints")
    with Checkpoints(workdir, keep=2) as checkpoints:
        checkpoints.save(27, saved.state, saved.data)

    out, err = program.run(
        "--workdir", "poisoned", "--resume", "--max-nonfinite-steps", "2", code=1
    )
    last = err.strip().splitlines()[-1]
    assert last.startswith(
        "train.py: the loss or its gradient was not finite 2 steps in a row (max_nonfinite_steps)"
    )
    assert "Traceback" not in err and "model saved" not in out
    assert [row["train/nonfinite_in_a_row"] for row in metrics(workdir)] in ([1, 2], [1, 2, 3])
    assert all(row["train/loss"] is None for row in metrics(workdir))  # JSON has no NaN


@pytest.fixture(scope="module")
def jsonl(program) -> str:
    """64 pictures, 4 of them broken, and one line without a caption."""
    folder = program.folder / "pictures"
    folder.mkdir()
    lines = []
    for i in range(64):
        Image.new("RGB", (16, 16), (i, 255 - i, i)).save(folder / f"{i}.png")
        lines.append(
            {
                "file": f"{i}.png",
                "captions": [f"one small red circle number {i}", "at the top on the left"],
            }
        )
    for i in range(4):
        (folder / f"{i}.png").write_bytes(b"no picture")
    lines[9]["captions"] = []
    (folder / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return "jsonl:pictures/set.jsonl"


@pytest.mark.long
def test_pictures_that_cannot_be_used_are_counted_and_named_once(program, straight, jsonl):
    out, err = program.run(
        "small.py", "--workdir", "bad", "--data.train", jsonl, "--data.max-bad-share", "0.3",
        "--data.val", "None",
    )  # fmt: skip
    counts = restore(program.folder / "bad").data["bad"]
    # 30 batches of 16 are 7.5 passes over the set.
    assert (
        counts.keys() == {"corrupt", "no caption"}
        and counts["corrupt"] >= 4 * 7
        and counts["no caption"] >= 7
    )
    told = re.search(r"examples that could not be used: (\d+) corrupt, (\d+) no caption", out)
    # with those read ahead
    assert int(told[1]) >= counts["corrupt"] and int(told[2]) >= counts["no caption"]
    assert err.count("skipping this example and others like it") == 2


@pytest.mark.long
def test_a_set_with_too_many_bad_pictures_stops_the_run_with_the_counts(program, straight, jsonl):
    argv = ["small.py", "--workdir", "worse", "--data.train", jsonl, "--data.max-bad-share", "0.01"]
    _, err = program.run(*argv, code=1)
    last = err.strip().splitlines()[-1]
    assert re.fullmatch(
        r"train.py: \d+ of \d+ examples read from 'jsonl:pictures/set.jsonl' could not be used "
        r"\(.*corrupt.*\), "
        r"data.max_bad_share allows 1%",
        last,
    )
    assert "Traceback" not in err


# --- what is refused before anything is compiled or written


@pytest.fixture(scope="module")
def train():
    spec = importlib.util.spec_from_file_location("train_program", TRAIN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def nothing_compiled() -> Iterator[None]:
    events = []

    def listen(event: str, *_, **__) -> None:
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not [event for event in events if "backend_compile" in event]


@pytest.fixture
def refusal(train, tmp_path, monkeypatch) -> Callable[..., str]:
    """Give a function that returns the one sentence of a refused run.

    `train.py ARGV` ends with it in a folder with a recipe, and changes nothing there.
    """
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)

    def files() -> dict[pathlib.Path, bytes | None]:
        # Python stores the compiled recipe beside it, unless it is told not to.
        paths = [path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts]
        return {path: path.read_bytes() if path.is_file() else None for path in paths}

    def refuse(*argv: str) -> str:
        before = files()
        with nothing_compiled(), pytest.raises(SystemExit) as stopped:
            train.main([*argv, "--compilation-cache", "None"])
        assert files().keys() == before.keys()
        assert all(files()[path] == content for path, content in before.items())
        message = stopped.value.code  # Python prints a text to stderr, and exits with 1
        assert isinstance(message, str) and message.startswith("train.py: ") and "\n" not in message
        return message.removeprefix("train.py: ")

    return refuse


def write_small_run(workdir: pathlib.Path) -> None:
    """A run that was killed before its first checkpoint."""
    workdir.mkdir()
    write_run(workdir, load_recipe(pathlib.Path("small.py")), [])
    tiny_processor().save(workdir)


def test_compilations_would_be_seen():
    with pytest.raises(AssertionError):
        with nothing_compiled():
            jax.jit(lambda x: x * 3 + 1)(np.arange(random.randint(1000, 100_000)))


def test_what_the_user_has_set_in_jax_is_looked_at_before_a_run(refusal, monkeypatch):
    def absent():
        raise RuntimeError("no tpu")

    monkeypatch.setattr(jax, "devices", absent)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    try:
        said = refusal("small.py", "--workdir", "new")
        assert said == "JAX finds no device to compute on: no tpu"
        assert jax.config.jax_numpy_rank_promotion == "allow"
    finally:
        jax.config.update("jax_numpy_rank_promotion", "allow")


def test_a_run_that_is_done_is_done_although_its_report_cannot_be_written(
    train, tmp_path, monkeypatch, capsys
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "write_report", full)
    train.say_report(tmp_path)
    said = "the run is done, but its report cannot be written: [Errno 28] No space left on device"
    assert said in capsys.readouterr().out


def test_a_used_folder_is_refused_without_resume(refusal, tmp_path):
    write_small_run(tmp_path / "used")
    message = refusal("small.py", "--workdir", "used")
    assert (
        message.startswith("--workdir used is not empty (it holds ")
        and "or --resume its run" in message
    )


def test_a_folder_with_a_model_that_is_no_run_is_refused(refusal, tmp_path):
    mammut.save(tmp_path / "exported", mammut.testing.tiny_model(), tiny_processor())
    assert refusal("small.py", "--workdir", "exported").startswith(
        "--workdir exported is not empty (it holds "
    )


@pytest.mark.parametrize("argv", [["--workdir", "nowhere"], []])
def test_a_run_that_does_not_exist_cannot_be_resumed(refusal, argv):
    place = "nowhere" if argv else "runs/tiny"
    assert (
        refusal(*argv, "--resume") == f"there is no run to resume in {place}: run.json is missing"
    )


@pytest.mark.parametrize("argv, changed", [
    (["--model.vision.width", "32"], "model.vision.width is 32, it was 16"),
    (["--optimizer.learning-rate", "1.0"], "optimizer.learning_rate is 1.0, it was 0.003"),
    (["--data.train", "synthetic:train[:300]"],
     "data.train is synthetic:train[:300], it was synthetic:train[:200]"),
    (["--seed", "1"], "seed is 1, it was 0"),
])  # fmt: skip
def test_a_run_is_not_resumed_with_what_would_make_it_another(refusal, tmp_path, argv, changed):
    write_small_run(tmp_path / "run")
    message = refusal("--workdir", "run", "--resume", *argv)
    assert (
        message.startswith("the run in run cannot go on with another config: ")
        and changed in message
    )


def test_a_recipe_of_another_model_does_not_resume_a_run(refusal, tmp_path):
    write_small_run(tmp_path / "run")
    # Python takes a compiled file for that of any source of the same second and length.
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    write_recipe(tmp_path, width=32)
    assert "model.vision.width is 32, it was 16" in refusal(
        "small.py", "--workdir", "run", "--resume"
    )


def test_a_run_whose_config_is_damaged_is_not_resumed(refusal, tmp_path):
    write_small_run(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("{")
    assert refusal("--workdir", "run", "--resume").startswith("run/run.json is not JSON")


def test_a_recipe_that_is_missing_or_makes_no_config_is_refused(refusal, tmp_path):
    assert refusal("nowhere.py").startswith("there is no recipe nowhere.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    assert refusal("empty.py").startswith("the recipe empty.py has no get_config()")


@pytest.mark.parametrize("argv, message", [
    (["--data.batch-size", "208"],
     "'synthetic:train[:200]' has 200 examples, expected at least data.batch_size 208"),
    (["--data.train", "nonsense:here"], "data source 'nonsense:here' is not synthetic:train"),
    (["--data.val", "synthetic:test"], "data source 'synthetic:test' is not synthetic:train"),
    (["--data.train", "jsonl:nowhere.jsonl"], "which does not exist; expected a .jsonl file"),
    (["--data.train", "jsonl:empty.jsonl"], "data source 'jsonl:empty.jsonl' is empty"),
    (["--data.train", "synthetic:train[200:100]"],
     "data source 'synthetic:train[200:100]' is empty"),
    (["--data.batch-size", "12"], "data.batch_size"),
    (["--data.eval-batch-size", "12"],
     "data.eval_batch_size 12 does not divide over the 8 devices"),
    (["--accumulation", "4"], "does not divide over the 8 devices"),
    (["--compute.param-dtype", "bfloat16"], "is trained and stored in bfloat16"),
    (["--mesh.data", "3"], "mesh"),
    (["--tokenizer.path", "large/tokenizer.model", "--model.text.vocab-size", "40"],
     "tokenizer.path large/tokenizer.model has 60 pieces, more than the 40 of "
     "model.text.vocab_size"),
    (["--tokenizer.path", "nowhere.model"], "there is no vocabulary file nowhere.model"),
    (["--model.text.vocab-size", "10"],
     "no vocabulary of vocab_size 10 (model.text.vocab_size) fits these captions"),
])  # fmt: skip
def test_what_cannot_work_is_refused_in_one_sentence(refusal, tmp_path, argv, message):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "large").mkdir()
    tiny_processor().save(tmp_path / "large")
    assert message in refusal("small.py", "--workdir", "new", *argv)


@pytest.mark.parametrize("argv, told", [
    (["--optimizer.learning-rat", "1e-3"], "--optimizer.learning-rate"),
    (["--data.batchsize", "8"], "--data.batch-size"),
    (["--steps", "many"], "--steps"),
    (["--optimizer.name", "sgd"], "adafactor"),
    (["--accumulation", "3"], "accumulation"),
    (["--optimizer.warmup-steps", "30"], "warmup_steps"),
])  # fmt: skip
def test_an_override_that_is_unknown_or_impossible_is_refused_with_what_would_do(
    train, tmp_path, monkeypatch, capsys, argv, told
):
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    with nothing_compiled(), pytest.raises(SystemExit) as stopped:
        train.main(["small.py", "--workdir", "new", *argv])
    assert stopped.value.code not in (0, None)
    assert told in capsys.readouterr().err + str(stopped.value.code)
    assert not (tmp_path / "new").exists()


# --- out of memory

TERABYTES = [
    "--model.text.width",
    "65536",
    "--model.text.mlp-dim",
    "262144",
    "--model.text.depth",
    "64",
]


@pytest.mark.long
def test_a_model_that_no_memory_holds_ends_in_one_sentence_with_what_helps(
    train, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        train.main(["small.py", "--workdir", "new", *TERABYTES, "--compute.remat", "full",
                    "--data.val", "None", "--task", "caption",
                    "--compilation-cache", "None"])  # fmt: skip
    message = stopped.value.code
    assert message.startswith(
        "train.py: the run does not fit into the memory of a device (out of memory allocating "
    )
    assert (
        "\n" not in message and "--accumulation 2 (now 1), a larger --mesh.fsdp (now 1)" in message
    )
    assert "--loss.vocab-chunk 8 (now 16)" in message and "--compute.remat" not in message


@pytest.mark.parametrize("said, amount", [
    ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12.50GiB.",
     "out of memory while trying to allocate"),
    ("RESOURCE_EXHAUSTED: Ran out of memory. Used 20.00G of 15.75G hbm. Exceeded by ...",
     "used 20.00G of 15.75G hbm"),
])  # fmt: skip
def test_how_much_memory_is_missing_is_told_in_the_words_of_the_device(said, amount):
    config = TrainConfig(model=tiny_config(), accumulation=128)
    assert f"a device ({amount}" in out_of_memory_advice(config, RuntimeError(said))
    assert "--accumulation 256 (now 128), --compute.remat full" in out_of_memory_advice(
        config, RuntimeError(said)
    )
    with pytest.raises(RuntimeError, match="another"), enough_memory(config):
        raise jax.errors.JaxRuntimeError("INTERNAL: another error")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5e:4x4"], "--topology v5e:4x4 is given without --compile-only"),
        (["--compile-only", "--distributed"], "--compile-only is given with several processes"),
        (["--num-processes", "0"], "--num-processes is 0, expected at least 1"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(train, arguments, message):
    with pytest.raises(SystemExit, match=f"^train.py: {message}"):
        train.main(arguments)
