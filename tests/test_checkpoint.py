"""A run's checkpoints: exact when whole, passed over when damaged."""

import dataclasses
import errno
import hashlib
import json
import logging
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damage import assert_identical, flip, one_sentence
from flax import nnx
from marks import long

import mammut
from mammut.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from mammut.core import sharding
from mammut.core.files import make_manifest
from mammut.testing import tiny_config, tiny_processor
from mammut.training.run import resolve
from mammut.training.run_folder import read_run, write_run
from mammut.training.step import TrainState, make_trainer
from mammut.training.tasks import ImageTextTask
from mammut.weights.checkpoints import CheckpointError, Checkpoints, saved_steps

TEXTS = ["one red circle on the left", "two squares", ""]
CONFIG = TrainConfig(model=tiny_config(), data=DataConfig(batch_size=8), steps=10)


def abstract_state(config: TrainConfig = CONFIG, mesh: MeshConfig | None = None) -> TrainState:
    """Return the shapes and placement of a state; compile nothing.

    The state is on one device unless a mesh is given.
    """
    mesh = sharding.make_mesh(mesh or MeshConfig(), jax.devices() if mesh else jax.devices()[:1])
    return make_trainer(config, ImageTextTask(config.loss), mesh).abstract_state


def random_state(abstract: TrainState, seed: int) -> TrainState:
    rng = np.random.default_rng(seed)

    def draw(x):
        values = (
            rng.normal(size=x.shape) if x.dtype == jnp.float32 else rng.integers(0, 1000, x.shape)
        )
        return jax.device_put(np.asarray(values, x.dtype), x.sharding)

    return jax.tree.map(draw, abstract)


def position(step: int) -> dict:
    return {
        "examples": 200,
        "seed": 0,
        "position": 8 * step,
        "read": 8 * step,
        "bad": {"corrupt": step},
    }


@pytest.fixture(scope="module")
def abstract() -> TrainState:
    return abstract_state()


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory, abstract) -> pathlib.Path:
    """The folder of a run that saved steps 3, 6 and 9 and keeps two."""
    workdir = tmp_path_factory.mktemp("run")
    write_run(workdir, CONFIG, ["--steps", "10"])
    tiny_processor().save(workdir)
    with Checkpoints(workdir, keep=2) as checkpoints:
        for step in (3, 6, 9):
            checkpoints.save(step, random_state(abstract, step), position(step))
    return workdir


@pytest.fixture
def workdir(three_steps, tmp_path) -> pathlib.Path:
    """A copy to damage."""
    return shutil.copytree(three_steps, tmp_path / "run")


def step_files(workdir: pathlib.Path, step: int) -> list[pathlib.Path]:
    return sorted(
        path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file()
    )


def largest_file(workdir: pathlib.Path, step: int) -> pathlib.Path:
    return max(step_files(workdir, step), key=lambda path: path.stat().st_size)


def assert_restores(workdir: pathlib.Path, abstract: TrainState, step: int) -> None:
    with Checkpoints(workdir, keep=2) as checkpoints:
        restored = checkpoints.restore(abstract)
    assert restored.step == step and restored.data == position(step)
    assert_identical(restored.state, random_state(abstract, step))


def test_the_newest_step_comes_back_bit_for_bit_with_its_place_in_the_data(workdir, abstract):
    assert_restores(workdir, abstract, 9)
    config, overrides = read_run(workdir)
    assert config == CONFIG and overrides == ["--steps", "10"]


def test_only_the_newest_two_steps_are_kept_with_their_checksums(workdir):
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["6", "9"]
    assert sorted(path.name for path in (workdir / "checkpoint_manifests").iterdir()) == [
        "6.json",
        "9.json",
    ]
    manifest = json.loads((workdir / "checkpoint_manifests" / "9.json").read_text())
    assert {workdir / "checkpoints" / "9" / name for name in manifest} == {*step_files(workdir, 9)}
    for name, entry in manifest.items():
        content = (workdir / "checkpoints" / "9" / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_second_save_of_a_step_changes_nothing(workdir, abstract):
    with Checkpoints(workdir, keep=2) as checkpoints:
        checkpoints.save(9, random_state(abstract, 1), position(1))
        assert checkpoints.steps == [6, 9]
    assert_restores(workdir, abstract, 9)


def test_a_state_may_be_given_away_as_soon_as_save_returns(tmp_path, abstract):
    """The next step overwrites its memory."""
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        state = random_state(abstract, 9)
        checkpoints.save(9, state, position(9))
        jax.tree.map(lambda x: x.delete(), state)
    assert_restores(tmp_path, abstract, 9)


def test_every_file_of_a_step_is_guarded_against_every_damage(three_steps, tmp_path):
    names = [path.relative_to(three_steps) for path in step_files(three_steps, 9)]
    assert len(names) >= 5
    for name in [*names, pathlib.Path("checkpoint_manifests/9.json")]:
        for damage in (lambda path: path.write_bytes(path.read_bytes()[:-2]), pathlib.Path.unlink):
            workdir = shutil.copytree(three_steps, tmp_path / "run")
            damage(workdir / name)
            with Checkpoints(workdir, keep=2) as checkpoints:
                step = 6
                if name.suffix == ".json" and not (workdir / name).exists():
                    step = 9  # as a kill between the step and its checksums leaves it
                assert next(checkpoints._candidates()) == (step, step == 6), name
            shutil.rmtree(workdir)


def test_a_file_that_the_disk_cannot_read_is_named_with_the_reason(
    workdir, abstract, caplog, monkeypatch
):
    broken = largest_file(workdir, 9)
    digest = hashlib.file_digest

    def file_digest(file, name):
        if file.name == os.fspath(broken):
            raise OSError(errno.EIO, "Input/output error")
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", file_digest)
    with caplog.at_level(logging.WARNING):
        assert_restores(workdir, abstract, 6)
    assert f"{broken.name} cannot be read (Input/output error)" in caplog.text


def test_a_manifest_that_lists_no_file_says_nothing_of_its_step(workdir, abstract, caplog):
    (workdir / "checkpoint_manifests" / "9.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert_restores(workdir, abstract, 6)
    assert "9.json lists no file" in caplog.text


def test_a_flipped_bit_in_the_newest_step_means_the_step_before_and_a_warning(
    workdir, abstract, caplog
):
    flip(largest_file(workdir, 9))
    with caplog.at_level(logging.WARNING):
        assert_restores(workdir, abstract, 6)
    warnings = [
        record.getMessage() for record in caplog.records if record.name.startswith("mammut")
    ]
    assert len(warnings) == 1 and warnings[0].startswith("checkpoint 9 is damaged (")
    assert largest_file(workdir, 9).name in warnings[0]


def test_a_step_that_a_kill_left_without_checksums_is_read_used_and_said(workdir, abstract, caplog):
    manifest = workdir / "checkpoint_manifests" / "9.json"
    checksums = manifest.read_bytes()
    manifest.unlink()
    with caplog.at_level(logging.WARNING):
        assert_restores(workdir, abstract, 9)  # a reader, which writes nothing
    assert "checkpoint 9 has no checksums" in caplog.text and "is used" in caplog.text
    assert not manifest.exists()
    with Checkpoints(workdir, keep=2, cleanup=True) as checkpoints:  # the run itself
        assert checkpoints.restore(abstract).step == 9
    assert manifest.read_bytes() == checksums


@pytest.mark.parametrize("damage", [
    lambda folder: shutil.rmtree(folder / "state"),
    lambda folder: [shutil.rmtree(folder), folder.mkdir()],
    lambda folder: [path.write_bytes(b"") for path in folder.rglob("*") if path.is_file()],
])  # fmt: skip
def test_a_step_without_checksums_that_cannot_be_read_gives_way_to_a_verified_one(
    workdir, abstract, caplog, damage
):
    """It is replaced by the next save, which is whole before anything else is removed."""
    (workdir / "checkpoint_manifests" / "9.json").unlink()
    damage(workdir / "checkpoints" / "9")
    with caplog.at_level(logging.WARNING), Checkpoints(workdir, 1, cleanup=True) as checkpoints:
        assert checkpoints.restore(abstract).step == 6
        checkpoints.save(7, random_state(abstract, 7), position(7))
    assert "checkpoint 9 has no checksums and cannot be read (" in caplog.text
    assert_restores(workdir, abstract, 7)


def test_where_no_step_has_checksums_the_newest_is_used_with_a_warning(workdir, abstract, caplog):
    shutil.rmtree(workdir / "checkpoint_manifests")
    with caplog.at_level(logging.WARNING):
        assert_restores(workdir, abstract, 9)
    assert "checkpoint 9 has no checksums" in caplog.text
    with caplog.at_level(logging.WARNING):
        mammut.load(workdir)


def test_no_step_is_removed_before_a_newer_one_has_its_checksums(tmp_path, abstract, monkeypatch):
    """With one step kept, a kill while the checksums of the next are made leaves the old one."""
    seen = []

    def manifest(folder, files):
        seen.append(sorted(path.name for path in (tmp_path / "checkpoints").iterdir()))
        return make_manifest(folder, files)

    monkeypatch.setattr("mammut.weights.checkpoints.make_manifest", manifest)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in (3, 6, 9):
            checkpoints.save(step, random_state(abstract, step), position(step))
    assert seen == [["3"], ["3", "6"], ["6", "9"]]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["9"]
    assert [path.name for path in (tmp_path / "checkpoint_manifests").iterdir()] == ["9.json"]


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_names_of_strangers_in_the_folders_of_checkpoints_change_nothing(workdir, abstract, kind):
    names = ["._9", "._9.json", "lost+found", ".DS_Store", "nohup.out", "9.bak", "7.json.tmp"]
    strangers = [
        workdir / folder / name
        for folder in ("checkpoints", "checkpoint_manifests")
        for name in [*names, "x.json"]
    ]
    for path in strangers:
        if kind == "file":
            path.write_text("{")
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to(workdir / "nowhere")
    assert saved_steps(workdir) == [6, 9]
    with Checkpoints(workdir, keep=1, cleanup=True) as checkpoints:
        assert checkpoints.steps == [6, 9]
        checkpoints.save(12, random_state(abstract, 12), position(12))
        checkpoints.wait()
        assert checkpoints.restore(abstract).step == 12
    assert saved_steps(workdir) == [12] and all(path in path.parent.iterdir() for path in strangers)


def test_a_file_named_like_a_step_is_no_step(workdir):
    (workdir / "checkpoints" / "12").write_text("")
    (workdir / "checkpoints" / "15").symlink_to(workdir / "nowhere")
    assert saved_steps(workdir) == [6, 9]
    with Checkpoints(workdir, keep=2) as checkpoints:
        assert checkpoints.steps == [6, 9]


def test_a_run_whose_every_step_is_damaged_is_an_error(workdir, abstract):
    for step in (6, 9):
        flip(largest_file(workdir, step))
    with Checkpoints(workdir, keep=2) as checkpoints:
        with pytest.raises(
            CheckpointError, match=r"holds no good checkpoint: all of \[6, 9\] are damaged"
        ) as error:
            checkpoints.restore(abstract)
    assert str(workdir / "checkpoints") in one_sentence(error)
    with pytest.raises(CheckpointError, match="holds no good checkpoint"):
        mammut.load(workdir)


def test_a_run_that_saved_nothing_is_an_error(tmp_path, abstract):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps == []
        with pytest.raises(CheckpointError, match="holds no good checkpoint$"):
            checkpoints.restore(abstract)


def test_after_a_damaged_step_the_run_saves_on_and_replaces_it(workdir, abstract):
    flip(largest_file(workdir, 9))
    with Checkpoints(workdir, keep=2) as checkpoints:
        assert checkpoints.restore(abstract).step == 6
        for step in (7, 9):  # one that falls between, and the damaged one
            checkpoints.save(step, random_state(abstract, step), position(step))
            checkpoints.wait()
            assert checkpoints.steps[-1] == step
    assert_restores(workdir, abstract, 9)
    assert sorted(path.name for path in (workdir / "checkpoint_manifests").iterdir()) == [
        "7.json",
        "9.json",
    ]


def test_a_damaged_list_of_steps_is_named_where_nothing_can_be_opened(workdir):
    metadata = workdir / "checkpoints" / "9" / "_CHECKPOINT_METADATA"
    text = metadata.read_text()
    metadata.write_text(text.replace("performance_metrics", "performance_metrhcs"))
    assert metadata.read_text() != text
    with pytest.raises(
        CheckpointError, match="cannot be opened .* remove its damaged steps, 9$"
    ) as error:
        Checkpoints(workdir, keep=2)
    one_sentence(error)


def test_a_step_that_was_never_finished_is_no_step(workdir, abstract):
    steps = workdir / "checkpoints"
    shutil.copytree(steps / "9", steps / "12.orbax-checkpoint-tmp")
    (steps / "12.orbax-checkpoint-tmp" / "commit_success.txt").unlink(missing_ok=True)
    with Checkpoints(workdir, keep=2) as checkpoints:
        assert checkpoints.steps == [6, 9] and checkpoints.restore(abstract).step == 9
        checkpoints.save(12, random_state(abstract, 12), position(12))
    assert_restores(workdir, abstract, 12)
    assert sorted(path.name for path in steps.iterdir()) == ["12", "9"]


@pytest.mark.parametrize("mesh", [
    MeshConfig(data=1, fsdp=8),
    long(MeshConfig(data=2, fsdp=2, model=2)),
])  # fmt: skip
def test_a_state_saved_on_one_device_is_restored_onto_a_mesh_and_back(
    workdir, abstract, mesh, tmp_path
):
    spread = abstract_state(mesh=mesh)
    with Checkpoints(workdir, keep=2) as checkpoints:
        state = checkpoints.restore(spread).state
    assert_identical(state, random_state(abstract, 9))
    for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(spread), strict=True):
        assert leaf.sharding == like.sharding
    kernel = state.params["vision"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.nbytes * (8 if mesh.fsdp == 8 else 4) == kernel.nbytes

    with Checkpoints(tmp_path / "spread", keep=2) as checkpoints:
        checkpoints.save(9, state, position(9))
    assert_restores(tmp_path / "spread", abstract, 9)


def other_model() -> TrainConfig:
    vision = dataclasses.replace(CONFIG.model.vision, width=64)
    return dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, vision=vision))


def untied_model() -> TrainConfig:
    text = dataclasses.replace(CONFIG.model.text, tie_embeddings=False)
    return dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, text=text))


@pytest.mark.parametrize("config, problem", [
    (other_model(),
     "params.vision.patch_embed.kernel is float32[192, 32], expected float32[192, 64]"),
    (untied_model(), "params.text.vocab_head.kernel is missing"),
    (dataclasses.replace(CONFIG, optimizer=OptimizerConfig("adafactor")),
     "mu.text.token_embed.embedding is left over"),
])  # fmt: skip
def test_the_state_of_another_model_or_optimizer_is_refused_by_its_leaves(workdir, config, problem):
    with Checkpoints(workdir, keep=2) as checkpoints:
        with pytest.raises(
            CheckpointError, match="does not fit this run's model and optimizer"
        ) as error:
            checkpoints.restore(abstract_state(config))
    assert problem in one_sentence(error) and str(workdir / "checkpoints" / "9") in str(error.value)


def test_a_run_without_a_model_folder_loads_from_its_newest_good_checkpoint(workdir, abstract):
    model, processor = mammut.load(workdir)
    assert model.config == CONFIG.model and processor.vocab_size == tiny_processor().vocab_size
    assert_identical(nnx.to_pure_dict(nnx.state(model)), random_state(abstract, 9).params)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    flip(largest_file(workdir, 9))
    before[largest_file(workdir, 9)] = largest_file(workdir, 9).read_bytes()
    assert_identical(
        nnx.to_pure_dict(nnx.state(mammut.load(workdir)[0])), random_state(abstract, 6).params
    )
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_the_parameters_of_a_run_are_read_without_its_moments(tmp_path):
    """Of 300 MB; the parameters take none of them."""
    code = f"""
import pathlib, resource
from mammut.weights.checkpoints import Checkpoints
with Checkpoints(pathlib.Path({str(tmp_path)!r}), keep=2) as checkpoints:
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10
    before = peak()
    print(checkpoints.restore_params(), peak() - before)
"""
    zero, moments = np.zeros((), np.int32), {"mu": np.full((75, 10**6), 0.5, np.float32)}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, TrainState(zero, {"a": np.arange(9.0)}, moments, zero, zero), {})
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    params, _, grown = done.stdout.strip().rpartition(" ")
    assert params == "{'a': array([0., 1., 2., 3., 4., 5., 6., 7., 8.])}" and int(grown) < 100


@pytest.mark.parametrize("content, message", [
    ("{", "is not JSON"),
    ("", "is empty"),
    ("[]", "is a JSON list, expected an object"),
    ('{"config": {}, "config": {}, "overrides": []}', "the key 'config' is there 2 times"),
    ('{"config": {"steps": NaN}, "overrides": []}', "NaN is no number"),
    (" " * 4_000_001 + "{}", "has 4000003 bytes, expected at most 4000000"),
    ('{"config": {}}', "is not a run's config, expected the keys config and overrides"),
    ('{"config": {"model": {}}, "overrides": [], "colour": 1}', "expected the keys config and"),
    ('{"config": {}, "overrides": []}', "expected the key config with an object that has model"),
    ('{"config": {"model": {"colour": 1}}, "overrides": []}',
     "has colour, which ModelConfig does not know"),
    (None, "is missing"),
])  # fmt: skip
def test_a_run_whose_config_cannot_be_read_is_an_error_that_names_the_file(
    workdir, content, message
):
    (workdir / "run.json").unlink() if content is None else (workdir / "run.json").write_text(
        content
    )
    with pytest.raises(CheckpointError) as error:
        mammut.load(workdir)
    assert message in one_sentence(error) and str(workdir / "run.json") in str(error.value)


@pytest.mark.parametrize("content, message", [
    ('{"config": {}}', "is not a run's config, expected the keys config and overrides"),
    ('{"config": {"colour": 1}, "overrides": []}', "has colour, which TrainConfig does not know"),
    ('{"config": {}, "overrides": "--steps 3"}', "has overrides that are not a list of texts"),
    ('{"config": {}, "overrides": ["--steps", 3]}', "has overrides that are not a list of texts"),
])  # fmt: skip
def test_a_run_whose_config_or_overrides_cannot_be_is_not_resumed(tmp_path, content, message):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(CheckpointError) as read:
        read_run(tmp_path)
    assert message in one_sentence(read) and str(tmp_path / "run.json") in str(read.value)
    with pytest.raises(CheckpointError) as resumed:
        resolve(None, pathlib.Path("tiny.py"), tmp_path, [], resume=True)
    assert str(resumed.value) == str(read.value)


@pytest.mark.parametrize("check", ["poll", "save"])
def test_an_error_of_the_writing_thread_is_raised_at_the_next_step(
    tmp_path, abstract, monkeypatch, check
):
    """At the next save, too, but not again at the end."""
    asked = threading.Event()

    def full(*_):
        asked.wait()
        raise OSError("no space left on device")

    checkpoints = Checkpoints(tmp_path, keep=2)
    with monkeypatch.context() as patch:
        patch.setattr("mammut.weights.checkpoints.make_manifest", full)
        checkpoints.save(3, random_state(abstract, 3), position(3))
        checkpoints.poll()  # nothing has failed yet: it does not wait
        asked.set()
        with pytest.raises(OSError, match="step 3 could not be saved: no space left") as error:
            if check == "save":
                checkpoints.save(6, random_state(abstract, 6), position(6))
            while check == "poll":
                time.sleep(0.01)
                checkpoints.poll()
    one_sentence(error)
    checkpoints.save(9, random_state(abstract, 9), position(9))
    checkpoints.close()
    assert_restores(tmp_path, abstract, 9)


def test_a_step_that_the_disk_has_no_room_for_is_refused_in_one_sentence(workdir, abstract):
    """A limit on the size of files stands for a full disk; the steps before stay whole."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="step 12 could not be saved: ") as error:
            with Checkpoints(workdir, keep=1) as checkpoints:
                checkpoints.save(12, random_state(abstract, 12), position(12))
                while True:
                    time.sleep(0.01)
                    checkpoints.poll()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    one_sentence(error)
    assert saved_steps(workdir) == [9]  # one is kept
    assert_restores(workdir, abstract, 9)
