"""What the folder of a run is: free, begun, running, done; and whose it is."""

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from damage import one_sentence

from mammut.config import DataConfig, OptimizerConfig, TrainConfig
from mammut.testing import tiny_config, tiny_processor
from mammut.training import claim as claims
from mammut.training.claim import InUse, claim, claimed
from mammut.training.run import resolve, stages
from mammut.training.run_folder import (
    claim_folder,
    clear,
    is_fresh,
    is_unused,
    read_run,
    renew_folder,
    require_free,
    require_whole,
    write_run,
    write_state,
)
from mammut.weights.checkpoints import CheckpointError

TINY = pathlib.Path(__file__).parents[1] / "configs" / "tiny.py"
CONFIG = TrainConfig(model=tiny_config(), data=DataConfig(batch_size=8), steps=10)
# Names that others leave in a folder.
STRANGERS = ("._4.json", ".DS_Store", "lost+found", "train.log", "nohup.out", "slurm-12.out", "x")


def make_run(workdir: pathlib.Path, state: str | None, steps: tuple[int, ...] = ()) -> None:
    """Makes the folder of a run; its steps are empty folders."""
    tiny_processor().save(workdir)
    write_run(workdir, CONFIG, [], state, tiny_processor() if state else None)
    for step in steps:
        (workdir / "checkpoints" / str(step)).mkdir(parents=True)


def content(workdir: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(workdir)): path.read_bytes()
        for path in workdir.rglob("*")
        if path.is_file()
    }


def resume(workdir: pathlib.Path, *overrides: str):
    return resolve(None, TINY, workdir, list(overrides), resume=True)


def start(workdir: pathlib.Path, *overrides: str, overwrite: bool = False):
    return resolve(None, TINY, workdir, list(overrides), resume=False, overwrite=overwrite)


# --- what a folder is


def test_a_run_goes_from_begun_to_running_to_done_in_its_run_json(tmp_path):
    claim_folder(tmp_path, CONFIG, ["--seed", "0"], tiny_processor(), fresh=True)
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "begun"
    assert is_fresh(tmp_path) and is_unused(tmp_path)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    write_state(tmp_path, "running", after="begun")
    assert not is_fresh(tmp_path) and not is_unused(tmp_path)
    require_whole(tmp_path)
    write_state(tmp_path, "done")
    write_state(tmp_path, "running", after="begun")  # as the last save may, a moment late
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "done"
    longer = dataclasses.replace(CONFIG, steps=20)
    (tmp_path / "manifest.json").write_text("{}")
    renew_folder(tmp_path, longer, ["--steps", "20"], tiny_processor(), start=3)
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "running"
    assert not (tmp_path / "manifest.json").exists()
    assert read_run(tmp_path) == (longer, ["--steps", "20"])


@pytest.mark.parametrize("state", ["running", "done"])
@pytest.mark.parametrize("loss", ["folder", "steps", "a file in its place", "a dangling link"])
def test_a_run_whose_checkpoints_are_gone_is_not_resumed_from_step_0(tmp_path, state, loss):
    make_run(tmp_path, state)
    (tmp_path / "model.safetensors").write_text("the finished model")
    if loss == "steps":
        (tmp_path / "checkpoints").mkdir()
    elif loss == "a file in its place":
        (tmp_path / "checkpoints").write_text("")
    elif loss == "a dangling link":
        (tmp_path / "checkpoints").symlink_to(tmp_path / "nowhere")
    before = content(tmp_path)
    with pytest.raises(CheckpointError, match=f"is {state}, but .*checkpoints has none") as error:
        resume(tmp_path)
    assert "--overwrite" in one_sentence(error) and content(tmp_path) == before


def test_a_finished_run_of_an_earlier_version_without_checkpoints_is_not_resumed_either(tmp_path):
    make_run(tmp_path, None)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is done, but .*checkpoints has none of its steps"):
        resume(tmp_path)
    (tmp_path / "manifest.json").unlink()
    assert resume(tmp_path).config == CONFIG  # killed before its first step: as that version did


@pytest.mark.parametrize("name", ["processor.json", "tokenizer.model"])
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_run_whose_processor_is_gone_or_another_one_is_not_resumed(tmp_path, name, damage):
    make_run(tmp_path, "running", steps=(3,))
    assert resume(tmp_path).config == CONFIG
    path = tmp_path / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    before = content(tmp_path)
    with pytest.raises(CheckpointError, match="needs the processor that it began with") as error:
        resume(tmp_path)
    assert name in one_sentence(error) and content(tmp_path) == before


def test_a_run_of_an_earlier_version_without_its_processor_is_not_resumed(tmp_path):
    make_run(tmp_path, None, steps=(3,))
    (tmp_path / "processor.json").unlink()
    with pytest.raises(CheckpointError, match="began with: processor.json is missing"):
        resume(tmp_path)


@pytest.mark.parametrize("change", [
    {"state": "gone"}, {"state": 3}, {"processor": []}, {"processor": {"x": 1}}, {"extra": 1},
    {"sha256": 3}, {"sha256": "0" * 64},
])  # fmt: skip
def test_a_run_json_that_cannot_be_is_refused_by_name(tmp_path, change):
    make_run(tmp_path, "running", steps=(3,))
    run = json.loads((tmp_path / "run.json").read_text())
    del run["sha256"]  # as who changes it on purpose is told to do
    (tmp_path / "run.json").write_text(json.dumps(run))
    resume(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(run | change))
    with pytest.raises(CheckpointError, match="run.json") as error:
        resume(tmp_path)
    one_sentence(error)


def test_a_run_json_with_one_flipped_bit_is_refused_by_name(tmp_path):
    """A flipped bit of a digit, or of a letter in a text, is another config."""
    make_run(tmp_path, "running", steps=(3,))
    whole = (tmp_path / "run.json").read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.choice(len(whole), 300, replace=False):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        (tmp_path / "run.json").write_bytes(damaged)
        for read in (read_run, lambda workdir: write_state(workdir, "done")):
            with pytest.raises(CheckpointError, match="run.json") as error:
                read(tmp_path)
            one_sentence(error)
        assert (tmp_path / "run.json").read_bytes() == damaged


# --- a folder without a step


def test_a_run_without_a_step_blocks_neither_a_fresh_run_nor_other_settings(tmp_path):
    make_run(tmp_path, "begun")
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)  # never whole
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n')
    fresh = start(tmp_path, "--seed", "5")
    assert fresh.config.seed == 5 and fresh.starts == {}
    # Data that was wrong is corrected.
    run = resume(tmp_path, "--seed", "5", "--data.train", "synthetic:train[:99]")
    assert (run.config.seed, run.config.data.train) == (5, "synthetic:train[:99]")
    assert run.config.model == CONFIG.model
    claim_folder(tmp_path, run.config, run.overrides, tiny_processor(), fresh=is_fresh(tmp_path))
    assert read_run(tmp_path) == (run.config, run.overrides)
    assert not (tmp_path / "metrics.jsonl").exists() and not (tmp_path / "checkpoints").exists()


def test_a_begun_run_that_has_a_step_is_used(tmp_path):
    """Killed between its first step and the note of it in run.json."""
    make_run(tmp_path, "begun", steps=(3,))
    with pytest.raises(ValueError, match="is not empty"):
        start(tmp_path)
    with pytest.raises(ValueError, match="cannot go on with another config: seed is 5"):
        resume(tmp_path, "--seed", "5")
    assert not is_fresh(tmp_path)


def test_a_begun_run_whose_language_model_has_a_step_is_used(tmp_path):
    make_run(tmp_path, "begun")
    assert is_unused(tmp_path)
    (tmp_path / "language_model" / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(ValueError, match="is not empty"):
        start(tmp_path)
    with pytest.raises(ValueError, match="cannot go on with another config: seed is 5"):
        resume(tmp_path, "--seed", "5")
    assert is_fresh(tmp_path)  # itself it starts at step 0
    claim_folder(tmp_path, CONFIG, [], tiny_processor(), fresh=True)
    assert (tmp_path / "language_model" / "checkpoints" / "3").is_dir()


def test_a_language_model_makes_its_folder_itself(tmp_path):
    folder = tmp_path / "run" / "language_model"
    claim_folder(folder, CONFIG, [], tiny_processor(), fresh=True)
    assert is_unused(folder)


def test_a_language_model_whose_checkpoints_are_gone_is_not_trained_again(tmp_path):
    config = dataclasses.replace(CONFIG, task="caption", text_steps=5, trainable=("vision.*",))
    write_run(tmp_path, config, [], "begun")
    (tmp_path / "language_model").mkdir()
    make_run(tmp_path / "language_model", "running")
    with pytest.raises(CheckpointError, match="language_model is running, but"):
        next(stages(resume(tmp_path)))


# --- files of others


@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_a_folder_with_a_strangers_file_is_free_and_keeps_it(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    require_free(tmp_path, overwrite=False)
    require_free(tmp_path, overwrite=True)
    claim_folder(tmp_path, CONFIG, [], tiny_processor(), fresh=True, overwrite=True)
    assert path in [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", [
    "run.json", "metrics.jsonl", "checkpoints", "processor.json", "tokenizer.model", "config.json",
    "model.safetensors", "model-00001-of-00002.safetensors", "eval", "frozen", "language_model",
])  # fmt: skip
@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_a_folder_with_a_name_that_a_run_writes_is_not_free(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "file":
        path.write_text("{}")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError) as error:
        require_free(tmp_path, overwrite=False)
    assert name in one_sentence(error)


def test_a_folder_that_could_not_take_the_model_at_the_end_is_refused_at_the_start(tmp_path):
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds open_clip_config.json of another model"):
        require_free(tmp_path, overwrite=False)


# --- overwrite


def test_overwrite_starts_afresh_and_removes_what_a_run_has_written_and_nothing_else(tmp_path):
    make_run(tmp_path, "done", steps=(3, 6))
    make_run(tmp_path / "language_model", "done", steps=(9,))
    written = ["checkpoint_manifests/3.json", "frozen/frozen.safetensors", "frozen/manifest.json",
               "eval/caption_val.json", "eval/caption_val.predictions.jsonl", "metrics.jsonl",
               "tensorboard/events.out.tfevents.1.host", "model.safetensors", "config.json",
               "manifest.json", "report.html", "checkpoints/3/state/x"]  # fmt: skip
    kept = ["notes.txt", "eval/caption_coco.json", "checkpoints/keep.txt", "README.md"]
    kept += ["model.safetensors.bak", "language_model/notes.txt", "frozen/manifest.json.old"]
    for name in written + kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    run = start(tmp_path, "--seed", "5", overwrite=True)
    assert run.overwrite and set(written) <= content(tmp_path).keys()  # not yet
    claim_folder(tmp_path, run.config, run.overrides, tiny_processor(), True, run.overwrite)
    new = {"run.json", "processor.json", "tokenizer.model"}
    assert content(tmp_path).keys() == {*kept, *new}
    assert is_unused(tmp_path) and read_run(tmp_path)[0].seed == 5


def test_overwrite_follows_no_link_out_of_the_folder(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "3").mkdir(parents=True)
    (elsewhere / "3" / "x").write_text("mine")
    make_run(tmp_path / "run", "running")
    (tmp_path / "run" / "checkpoints").symlink_to(elsewhere)
    (tmp_path / "run" / "frozen").mkdir()
    (tmp_path / "run" / "frozen" / "frozen.safetensors").symlink_to(elsewhere / "3" / "x")
    clear(tmp_path / "run", language_model=True)
    assert content(elsewhere) == {"3/x": b"mine"}


def test_overwrite_of_a_run_whose_folder_is_a_link_is_refused(tmp_path):
    """Else the fresh run would go on from the old one's checkpoints, which are not removed."""
    (tmp_path / "elsewhere" / "3").mkdir(parents=True)
    make_run(tmp_path / "run", "done")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    assert resume(tmp_path / "run").config == CONFIG  # with its checkpoints on another disk
    with pytest.raises(ValueError, match="checkpoints is a link") as error:
        start(tmp_path / "run", overwrite=True)
    one_sentence(error)


@pytest.mark.parametrize("name", ["checkpoint_manifests", "eval", "tensorboard", "frozen"])
@pytest.mark.parametrize("kind", ["file", "dangling link", "without rights"])
def test_what_stands_where_a_run_saves_later_is_refused_at_the_start(
    tmp_path, monkeypatch, name, kind
):
    path = tmp_path / name
    make_run(tmp_path, "running", steps=(3,))
    if kind == "file":
        path.write_text("")
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.mkdir()
        monkeypatch.setattr(os, "access", lambda path, *_: path.name != name)
    with pytest.raises(ValueError, match=f"{name} is no folder that can be written to") as error:
        require_whole(tmp_path)
    one_sentence(error)
    if kind != "dangling link":
        with pytest.raises(ValueError, match=f"{name} is no folder that can be written to"):
            require_free(tmp_path, overwrite=True)


@pytest.mark.parametrize("name", ["README.md", "report.html", "model.safetensors", "config.json"])
def test_a_folder_where_a_run_writes_a_file_later_is_refused_at_the_start(tmp_path, name):
    if name == "README.md":
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=f"{name} is a folder, where the run writes a file"):
            require_free(tmp_path, overwrite=False)
        (tmp_path / name).rmdir()
    make_run(tmp_path, "running", steps=(3,))
    (tmp_path / ".partial").mkdir()  # left by a kill
    require_whole(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"{name} is a folder, where the run writes a file") as no:
        require_whole(tmp_path)
    one_sentence(no)


def test_overwrite_is_for_runs(tmp_path):
    tiny_processor().save(tmp_path)
    with pytest.raises(ValueError, match="--overwrite is given, but .* is no run: run.json") as no:
        start(tmp_path, overwrite=True)
    one_sentence(no)
    make_run(tmp_path, "done")
    with pytest.raises(ValueError, match="--resume and --overwrite are given"):
        resolve(None, TINY, tmp_path, [], resume=True, overwrite=True)
    (tmp_path / "run.json").write_text("{")  # a damaged one is overwritten too
    assert start(tmp_path, overwrite=True).overwrite


# --- the number of steps


def test_a_run_that_is_too_short_for_its_recipes_warm_up_says_what_it_does(tmp_path, capsys):
    run = start(tmp_path / "run", "--steps", "60")
    assert (
        "warm-up of 100 steps does not fit into --steps: it is 6 steps" in capsys.readouterr().out
    )
    assert (run.config.steps, run.config.optimizer.warmup_steps) == (60, 6)
    assert run.overrides == ["--steps", "60", "--optimizer.warmup-steps", "6"]
    # It is part of the run, with its recipe as without, and however long the run goes on.
    (tmp_path / "run" / "checkpoints" / "60").mkdir(parents=True)
    tiny_processor().save(tmp_path / "run")
    write_run(tmp_path / "run", run.config, run.overrides, "done", tiny_processor())
    longer = dataclasses.replace(run.config, steps=2000)
    for recipe in (None, TINY):
        resumed = resolve(recipe, TINY, tmp_path / "run", ["--steps", "2000"], resume=True)
        assert resumed.config == longer
    assert capsys.readouterr().out == ""


def test_a_language_model_of_few_steps_warms_up_in_fewer(tmp_path, capsys):
    optimizer = OptimizerConfig(warmup_steps=100)
    config = dataclasses.replace(
        CONFIG, task="caption", text_steps=60, steps=200, optimizer=optimizer
    )
    write_run(tmp_path, config, [], "begun")
    language_model = next(stages(resume(tmp_path)))
    assert language_model.config.optimizer.warmup_steps == 6
    assert "the language model's 60 steps warm up in 6" in capsys.readouterr().out


@pytest.mark.parametrize("optimizer, steps, is_said", [
    (OptimizerConfig(), 20, True),
    (OptimizerConfig(schedule="linear"), 5, True),
    (OptimizerConfig(), 10, False),
    (OptimizerConfig(schedule="constant"), 20, False),
    (OptimizerConfig(decay_steps=30), 20, False),
])  # fmt: skip
def test_a_schedule_that_other_steps_stretch_is_said(tmp_path, capsys, optimizer, steps, is_said):
    make_run(tmp_path, "running", steps=(4,))
    config = dataclasses.replace(CONFIG, optimizer=optimizer, steps=steps)
    renew_folder(tmp_path, config, [], tiny_processor(), start=4)
    said = capsys.readouterr().out
    expected = (
        f"steps is {steps}, it was 10: from step 4 on the learning rate follows the "
        f"{optimizer.schedule} schedule that reaches 0 at step {steps}, not at 10\n"
    )
    assert said == (expected if is_said else "")


# --- the claim


# Another run, as far as its claim goes.
OTHER = """
import fcntl, json, os, socket, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
holder = {"program": "train.py", "process": os.getpid(), "host": socket.gethostname()}
file.write(json.dumps(holder | {"since": "today"}))
file.flush()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder."""
    command = [sys.executable, "-c", OTHER, str(tmp_path / "run.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_claimed_folder_is_refused_by_host_and_process(tmp_path, other):
    with pytest.raises(InUse) as error, claimed(tmp_path):
        pass
    said = one_sentence(error)
    who = f"train.py, process {other.pid} on {socket.gethostname()}, since today"
    assert f"{tmp_path} is in use by {who}: wait for its end, or give another" in said
    assert (tmp_path / "run.lock").exists()


def test_a_claim_ends_with_its_run_and_leaves_nothing(tmp_path):
    with claimed(tmp_path / "runs" / "run"):
        assert [path.name for path in (tmp_path / "runs" / "run").iterdir()] == ["run.lock"]
        with pytest.raises(InUse, match=f"process {os.getpid()} "):
            with claimed(tmp_path / "runs" / "run"):
                pass
        assert (tmp_path / "runs" / "run" / "run.lock").exists()
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(KeyboardInterrupt), claimed(tmp_path / "run"):
        (tmp_path / "run" / "run.json").write_text("{}")
        raise KeyboardInterrupt
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


def test_the_claim_of_a_killed_run_is_taken_over_at_once(tmp_path, other, capsys):
    other.kill()
    other.wait()
    assert (tmp_path / "run.lock").exists()
    with claimed(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["process"] == os.getpid()
    assert capsys.readouterr().out == "" and not (tmp_path / "run.lock").exists()


def test_a_run_that_is_stopped_keeps_its_claim(tmp_path, other):
    other.send_signal(signal.SIGSTOP)
    with pytest.raises(InUse), claimed(tmp_path):
        pass


def write_lock(workdir: pathlib.Path, host: str) -> pathlib.Path:
    path = workdir / "run.lock"
    holder = {"program": "train.py", "process": 7, "host": host, "since": "today"}
    path.write_text(json.dumps(holder))
    return path


def test_the_claim_of_another_machine_is_watched_for_a_sign_of_life(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(claims, "_BEAT", 0.1)
    monkeypatch.setattr(claims, "_SILENCE", 0.5)
    path = write_lock(tmp_path, "elsewhere")
    os.utime(path, (0, 0))  # whatever the clock of that machine says
    alive = threading.Event()

    def touch() -> None:
        while not alive.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(InUse, match="process 7 on elsewhere, since today"), claimed(tmp_path):
            pass
    finally:
        alive.set()
        thread.join()
    with claimed(tmp_path):
        assert json.loads(path.read_text())["process"] == os.getpid()
    assert "waiting up to 0.5 s for a sign of it" in capsys.readouterr().out


def test_a_claim_is_touched_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "_BEAT", 0.05)
    with claimed(tmp_path):
        os.utime(tmp_path / "run.lock", (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / "run.lock").stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_run_whose_claim_another_has_taken_over_ends(tmp_path, monkeypatch):
    """Stopped for longer than another machine waits, then let go on."""
    monkeypatch.setattr(claims, "_BEAT", 0.05)
    ended = threading.Event()
    said = []

    def end(program: str, message: str) -> None:
        said.append(message)
        ended.set()

    monkeypatch.setattr(claims, "end", end)
    with claimed(tmp_path):
        write_lock(tmp_path, "elsewhere")
        assert ended.wait(10)
    assert "is in use by train.py, process 7 on elsewhere" in said[0]


@pytest.mark.parametrize("garbage", ["", "{", "[]", "{}", "\0" * 9])
def test_a_lock_file_that_says_nothing_is_no_claim(tmp_path, garbage):
    (tmp_path / "run.lock").write_text(garbage)
    with claimed(tmp_path):
        pass
    assert [*tmp_path.iterdir()] == []


def test_without_locks_the_signs_of_life_alone_count(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "_BEAT", 0.1)
    monkeypatch.setattr(claims, "_SILENCE", 0.3)

    def no_locks(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(claims.fcntl, "flock", no_locks)
    with claimed(tmp_path):
        with pytest.raises(InUse), claimed(tmp_path):
            pass
    write_lock(tmp_path, socket.gethostname())
    with claimed(tmp_path):
        pass


def test_runs_that_start_together_without_a_folder_get_one_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with claim(None, "tiny", False) as first, claim(None, "tiny", False) as second:
        assert (str(first), str(second)) == ("runs/tiny", "runs/tiny-2")
    # Both see the same free name; one of them makes it first.
    names = iter([first, first, second])
    monkeypatch.setattr(claims, "default_workdir", lambda *_: next(names))
    with claim(None, "tiny", False) as one, claim(None, "tiny", False) as two:
        assert (one, two) == (first, second)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("obstacle", ["file", "dangling link"])
def test_a_folder_of_all_runs_that_is_none_is_refused(tmp_path, monkeypatch, obstacle):
    """No name below it is ever free."""
    monkeypatch.chdir(tmp_path)
    if obstacle == "file":
        (tmp_path / "runs").write_text("")
    else:
        (tmp_path / "runs").symlink_to("nowhere")
    names = iter([pathlib.Path("runs/tiny")])
    monkeypatch.setattr(claims, "default_workdir", lambda *_: next(names))
    with pytest.raises(ValueError, match="runs/tiny cannot be written to") as error:
        with claim(None, "tiny", False):
            pass
    one_sentence(error)


def test_of_two_runs_with_one_folder_the_second_is_refused(tmp_path):
    for resuming in (False, True):
        with claim(tmp_path / "run", "tiny", resuming):
            with pytest.raises(InUse), claim(tmp_path / "run", "tiny", resuming):
                pass


@pytest.mark.parametrize("obstacle", ["file", "dangling link", "below a file"])
def test_a_folder_that_cannot_be_written_to_is_refused_at_the_start(tmp_path, obstacle):
    path = tmp_path / "run"
    if obstacle == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.write_text("")
    workdir = path / "deep" if obstacle == "below a file" else path
    with pytest.raises(ValueError, match="cannot be written to") as error, claimed(workdir):
        pass
    one_sentence(error)


def test_a_folder_without_the_right_to_write_is_refused_at_the_start(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(claims.os, "open", denied)
    with pytest.raises(ValueError, match=r"cannot be written to \(Permission denied\)"):
        with claimed(tmp_path / "run"):
            pass
