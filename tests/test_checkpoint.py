"""Model folders and a run's checkpoints: exact when whole, refused or passed over when damaged."""

import dataclasses
import hashlib
import json
import logging
import pathlib
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import mammut
from mammut import checkpoint, sharding
from mammut.checkpoint import CheckpointError, Checkpoints
from mammut.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from mammut.tasks import ImageTextTask
from mammut.testing import tiny_batch, tiny_config, tiny_model, tiny_processor
from mammut.training import TrainState, make_trainer

TEXTS = ["one red circle on the left", "two squares", ""]
CONFIG = TrainConfig(model=tiny_config(), data=DataConfig(batch_size=8), steps=10)


def by_name(tree) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def assert_identical(tree, expected) -> None:
    got, want = by_name(tree), by_name(expected)
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype and got[name].shape == x.shape, name
        assert got[name].tobytes() == x.tobytes(), name


def flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def one_sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert text and "\n" not in text.strip()
    return text


# --- a model folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    mammut.save(folder, tiny_model(), tiny_processor())
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> pathlib.Path:
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "copy")


def sign(folder: pathlib.Path) -> None:
    """Makes the manifest fit the files again, as one would who changed them on purpose."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest:
        content = (folder / name).read_bytes()
        manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def rewrite_weights(folder: pathlib.Path, change: Callable[[dict], None]) -> None:
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors")
    sign(folder)


def rewrite_config(folder: pathlib.Path, change: Callable[[dict], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    sign(folder)


def test_a_saved_model_loads_bit_for_bit_with_its_processor(saved):
    model, processor = mammut.load(saved)
    expected, expected_processor = tiny_model(), tiny_processor()
    assert model.config == expected.config
    assert_identical(nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(expected)))
    for got, want in zip(processor.encode_text(TEXTS), expected_processor.encode_text(TEXTS), strict=True):
        np.testing.assert_array_equal(got, want)
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    np.testing.assert_array_equal(processor.image(picture), expected_processor.image(picture))

    batch = tiny_batch()
    graphdef = nnx.graphdef(expected)
    embed = jax.jit(lambda state: nnx.merge(graphdef, state).encode_text(batch["tokens"], batch["text_valid"]))
    np.testing.assert_array_equal(embed(nnx.state(model)), embed(nnx.state(expected)))


def test_weights_in_bfloat16_stay_bfloat16(tmp_path):
    config = dataclasses.replace(tiny_config(), param_dtype="bfloat16", logit_bias_init=-10.0)
    model = tiny_model(config)
    mammut.save(tmp_path / "model", model, tiny_processor())
    loaded, _ = mammut.load(tmp_path / "model")
    assert loaded.config == config
    assert loaded.text.token_embed.embedding.dtype == jnp.bfloat16 and loaded.logit_scale.dtype == jnp.float32
    assert_identical(nnx.to_pure_dict(nnx.state(loaded)), nnx.to_pure_dict(nnx.state(model)))


def test_the_weights_are_named_by_their_path_and_need_nothing_of_this_library(saved):
    arrays = load_file(saved / "model.safetensors")
    assert arrays["vision.layers.attn.query.kernel"].shape == (2, 32, 2, 16)
    assert arrays["text.token_embed.embedding"].shape == (60, 48)
    assert sum(x.size for x in arrays.values()) == mammut.model.num_params(tiny_config())["total"]


def test_a_folder_that_holds_a_model_is_not_overwritten_unasked(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="holds config.json already"):
        mammut.save(folder, tiny_model(seed=1), tiny_processor())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    mammut.save(folder, tiny_model(seed=1), tiny_processor(), overwrite=True)
    loaded = nnx.to_pure_dict(nnx.state(mammut.load(folder)[0]))
    assert_identical(loaded, nnx.to_pure_dict(nnx.state(tiny_model(seed=1))))


FILES = ["config.json", "model.safetensors", "processor.json", "tokenizer.model"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "longer", "gone"])
def test_every_damage_to_a_file_is_noticed_and_the_file_named(folder, name, damage):
    assert {path.name for path in folder.iterdir()} == {*FILES, "manifest.json"}
    path = folder / name
    if damage == "flipped bit":
        flip(path)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if damage == "cut short" else path.read_bytes() + b" ")
    with pytest.raises(CheckpointError, match=rf"is damaged: {name} ") as error:
        mammut.load(folder)
    assert str(folder) in one_sentence(error)


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "{}]", '{"config.json": 3}', '{"config.json": {}}'])
def test_a_manifest_that_is_none_is_an_error_that_names_it(folder, content):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match="manifest.json") as error:
        mammut.load(folder)
    one_sentence(error)


@pytest.mark.parametrize("content", ["", "no JSON", "[1, 2]", "\udcff"])
def test_a_config_that_is_no_json_object_is_an_error_that_names_it(folder, content):
    (folder / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    sign(folder)
    with pytest.raises(CheckpointError, match=r"config\.json (is not a JSON file|holds list)") as error:
        mammut.load(folder)
    one_sentence(error)


@pytest.mark.parametrize("change, message", [
    (lambda c: c.update(version=99), "format 'mammut' version 99, expected 'mammut' version 1"),
    (lambda c: c.update(format="open_clip"), "format 'open_clip' version 1"),
    (lambda c: c.pop("version"), "version None"),
    (lambda c: c.pop("model"), "holds NoneType, expected an object"),
    (lambda c: c["model"].update(colour="red"), "has colour, which ModelConfig does not know"),
    (lambda c: c["model"]["text"].update(depth=5), "depth 5 is not a multiple of cross_attn_every 2"),
])  # fmt: skip
def test_a_config_that_cannot_be_is_refused_by_its_file(folder, change, message):
    rewrite_config(folder, change)
    with pytest.raises(CheckpointError) as error:
        mammut.load(folder)
    assert message in one_sentence(error) and str(folder / "config.json") in str(error.value)


def test_a_setting_of_another_type_is_an_error_that_names_the_file(folder, tmp_path):
    rewrite_config(folder, lambda c: c["model"]["text"].update(width="48"))
    with pytest.raises(CheckpointError, match=f"{folder / 'config.json'} does not hold a ModelConfig"):
        mammut.load(folder)
    (tmp_path / "run.json").write_text('{"config": {"steps": "many"}, "overrides": []}')
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'run.json'} does not hold a TrainConfig"):
        checkpoint.read_run(tmp_path)


def test_the_config_of_another_model_is_refused_and_every_misfit_named(folder):
    rewrite_config(folder, lambda c: c["model"]["vision"].update(width=64))
    with pytest.raises(CheckpointError, match="does not fit its config") as error:
        mammut.load(folder)
    text = one_sentence(error)
    assert "vision.patch_embed.kernel is float32[192, 32], expected float32[192, 64]" in text
    assert "image_projection.kernel is float32[32, 48], expected float32[64, 48]" in text
    assert "text." not in text.replace("does not fit its config", "")


def test_keys_missing_left_over_misshapen_and_of_another_type_are_all_reported_at_once(folder):
    def change(arrays):
        del arrays["text.norm.scale"], arrays["vision.pos_embed"]
        arrays["text.norm.gain"] = np.zeros(3, np.float32)
        arrays["text.pos_embed"] = arrays["text.pos_embed"][:-1]
        arrays["logit_scale"] = arrays["logit_scale"].astype(np.float16)

    rewrite_weights(folder, change)
    with pytest.raises(CheckpointError, match="model.safetensors does not fit its config") as error:
        mammut.load(folder)
    text = one_sentence(error)
    for problem in (
        "text.norm.scale is missing",
        "vision.pos_embed is missing",
        "text.norm.gain is not a parameter of the model",
        "text.pos_embed is float32[11, 48], expected float32[12, 48]",
        "logit_scale is float16[], expected float32[]",
    ):
        assert problem in text


def test_weights_that_are_no_safetensors_are_refused(folder):
    (folder / "model.safetensors").write_bytes(b"\x80\x04pickle" * 10)
    sign(folder)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        mammut.load(folder)


def test_a_processor_that_cannot_be_read_is_a_checkpoint_error_too(folder):
    (folder / "processor.json").write_text("{}")
    sign(folder)
    with pytest.raises(CheckpointError, match="processor"):
        mammut.load(folder)


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_a_model_is_refused(tmp_path, exists):
    folder = tmp_path / "nothing"
    if exists:
        folder.mkdir()
    with pytest.raises(CheckpointError, match=r"nothing is no model folder \(no manifest.json\) and no run") as error:
        mammut.load(folder)
    one_sentence(error)


# --- the checkpoints of a run


def abstract_state(config: TrainConfig = CONFIG, mesh: MeshConfig | None = None) -> TrainState:
    """Shapes and placement of a state, on one device unless a mesh is given; nothing is compiled."""
    mesh = sharding.make_mesh(mesh or MeshConfig(), jax.devices() if mesh else jax.devices()[:1])
    return make_trainer(config, ImageTextTask(config.loss), mesh).abstract_state


def random_state(abstract: TrainState, seed: int) -> TrainState:
    rng = np.random.default_rng(seed)

    def draw(x):
        values = rng.normal(size=x.shape) if x.dtype == jnp.float32 else rng.integers(0, 1000, x.shape)
        return jax.device_put(np.asarray(values, x.dtype), x.sharding)

    return jax.tree.map(draw, abstract)


def position(step: int) -> dict:
    return {"examples": 200, "seed": 0, "position": 8 * step, "read": 8 * step, "bad": {"corrupt": step}}


@pytest.fixture(scope="module")
def abstract() -> TrainState:
    return abstract_state()


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory, abstract) -> pathlib.Path:
    """The folder of a run that saved steps 3, 6 and 9 and keeps two."""
    workdir = tmp_path_factory.mktemp("run")
    checkpoint.write_run(workdir, CONFIG, ["--steps", "10"])
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
    return sorted(path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file())


def largest_file(workdir: pathlib.Path, step: int) -> pathlib.Path:
    return max(step_files(workdir, step), key=lambda path: path.stat().st_size)


def assert_restores(workdir: pathlib.Path, abstract: TrainState, step: int) -> None:
    with Checkpoints(workdir, keep=2) as checkpoints:
        restored = checkpoints.restore(abstract)
    assert restored.step == step and restored.data == position(step)
    assert_identical(restored.state, random_state(abstract, step))


def test_the_newest_step_comes_back_bit_for_bit_with_its_place_in_the_data(workdir, abstract):
    assert_restores(workdir, abstract, 9)
    config, overrides = checkpoint.read_run(workdir)
    assert config == CONFIG and overrides == ["--steps", "10"]


def test_only_the_newest_two_steps_are_kept_with_their_checksums(workdir):
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["6", "9"]
    assert sorted(path.name for path in (workdir / "checkpoint_manifests").iterdir()) == ["6.json", "9.json"]
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
                assert checkpoints._newest_good() == 6, name
            shutil.rmtree(workdir)


def test_a_flipped_bit_in_the_newest_step_means_the_step_before_and_a_warning(workdir, abstract, caplog):
    flip(largest_file(workdir, 9))
    with caplog.at_level(logging.WARNING):
        assert_restores(workdir, abstract, 6)
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("mammut")]
    assert len(warnings) == 1 and warnings[0].startswith("checkpoint 9 is damaged (")
    assert largest_file(workdir, 9).name in warnings[0]


def test_a_step_without_checksums_gives_way_to_a_verified_one(workdir, abstract):
    (workdir / "checkpoint_manifests" / "9.json").unlink()
    assert_restores(workdir, abstract, 6)


def test_where_no_step_has_checksums_the_newest_is_used_with_a_warning(workdir, abstract, caplog):
    shutil.rmtree(workdir / "checkpoint_manifests")
    with caplog.at_level(logging.WARNING):
        assert_restores(workdir, abstract, 9)
    assert "checkpoint 9 has no checksums and is used unchecked" in caplog.text


def test_a_run_whose_every_step_is_damaged_is_an_error(workdir, abstract):
    for step in (6, 9):
        flip(largest_file(workdir, step))
    with Checkpoints(workdir, keep=2) as checkpoints:
        with pytest.raises(CheckpointError, match=r"holds no good checkpoint: all of \[6, 9\] are damaged") as error:
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
    assert sorted(path.name for path in (workdir / "checkpoint_manifests").iterdir()) == ["7.json", "9.json"]


def test_a_damaged_list_of_steps_is_named_where_nothing_can_be_opened(workdir):
    metadata = workdir / "checkpoints" / "9" / "_CHECKPOINT_METADATA"
    text = metadata.read_text()
    metadata.write_text(text.replace("performance_metrics", "performance_metrhcs"))
    assert metadata.read_text() != text
    with pytest.raises(CheckpointError, match="cannot be opened .* remove its damaged steps, 9$") as error:
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


@pytest.mark.parametrize("mesh", [MeshConfig(data=1, fsdp=8), MeshConfig(data=2, fsdp=2, model=2)])
def test_a_state_saved_on_one_device_is_restored_onto_a_mesh_and_back(workdir, abstract, mesh, tmp_path):
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
    (other_model(), "params.vision.patch_embed.kernel is float32[192, 32], expected float32[192, 64]"),
    (untied_model(), "params.text.vocab_head.kernel is missing"),
    (dataclasses.replace(CONFIG, optimizer=OptimizerConfig("adafactor")), "mu.text.token_embed.embedding is left over"),
])  # fmt: skip
def test_the_state_of_another_model_or_optimizer_is_refused_by_its_leaves(workdir, config, problem):
    with Checkpoints(workdir, keep=2) as checkpoints:
        with pytest.raises(CheckpointError, match="does not fit this run's model and optimizer") as error:
            checkpoints.restore(abstract_state(config))
    assert problem in one_sentence(error) and str(workdir / "checkpoints" / "9") in str(error.value)


def test_a_run_without_a_model_folder_loads_from_its_newest_good_checkpoint(workdir, abstract):
    model, processor = mammut.load(workdir)
    assert model.config == CONFIG.model and processor.vocab_size == tiny_processor().vocab_size
    assert_identical(nnx.to_pure_dict(nnx.state(model)), random_state(abstract, 9).params)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    flip(largest_file(workdir, 9))
    before[largest_file(workdir, 9)] = largest_file(workdir, 9).read_bytes()
    assert_identical(nnx.to_pure_dict(nnx.state(mammut.load(workdir)[0])), random_state(abstract, 6).params)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("content, message", [
    ("{", "is not a JSON file"),
    ("[]", "holds list, expected a JSON object"),
    ('{"config": {}}', "is not a run's config, expected the keys config and overrides"),
    ('{"config": {"colour": 1}, "overrides": []}', "has colour, which TrainConfig does not know"),
    (None, "is missing"),
])  # fmt: skip
def test_a_run_whose_config_cannot_be_read_is_an_error_that_names_the_file(workdir, content, message):
    (workdir / "run.json").unlink() if content is None else (workdir / "run.json").write_text(content)
    with pytest.raises(CheckpointError) as error:
        mammut.load(workdir)
    assert message in one_sentence(error) and str(workdir / "run.json") in str(error.value)


def test_an_error_of_the_writing_thread_is_raised_by_the_next_save(tmp_path, abstract, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    checkpoints = Checkpoints(tmp_path, keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "make_manifest", full)
        checkpoints.save(3, random_state(abstract, 3), position(3))
        with pytest.raises(OSError, match="no space left"):
            checkpoints.save(6, random_state(abstract, 6), position(6))
    checkpoints.save(9, random_state(abstract, 9), position(9))
    checkpoints.close()
    assert_restores(tmp_path, abstract, 9)
