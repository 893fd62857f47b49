"""Configs of version 0.1.

Fields that moved, that follow from others or that went; what is refused.
"""

import copy
import dataclasses
import hashlib
import json
import operator
import pathlib
import shutil
import tarfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from damage import one_sentence
from flax import nnx
from old_version import as_version_0_1
from prefix_models import prefix_config
from safetensors.numpy import load_file, save_file

import mammut
from mammut import presets
from mammut.config import (
    AdapterConfig,
    AugmentConfig,
    ComputeConfig,
    DecoderConfig,
    ModelConfig,
    TrainConfig,
    VisionConfig,
    from_dict,
    to_dict,
)
from mammut.core.fields import differences
from mammut.models.layers import LayerNorm
from mammut.models.mammut import MaMMUT
from mammut.testing import tiny_config, tiny_model, tiny_processor
from mammut.training.command_line import load_recipe
from mammut.training.run import resolve
from mammut.training.run_folder import read_run, write_run
from mammut.weights.files.tensor_file import CheckpointError
from mammut.weights.model_folder import read_model_config
from mammut.weights.old_configs import MOVED, upgraded

ARCHIVE = pathlib.Path(__file__).parent / "data" / "version_0_1.tar.xz"
# A value of each field that moved, which is not its default.
VALUES = {
    "model.dtype": "bfloat16",
    "model.param_dtype": "bfloat16",
    "model.remat": "dots",
    "model.unroll": 3,
    "model.passes": "fused",
    "model.image_attention": "xla",
    "model.logit_scale_init": 20.0,
    "model.logit_bias_init": -3.0,
    "model.text.param_dtype": "bfloat16",
    "model.prefix_dropout": 0.25,
    "model.vision.patch_drop": 0.5,
    "model.vision.cropped_pos_embed": True,
}


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """A config with the fields of these dotted names, and what is around them."""
    config = {"model": {"vision": {}, "text": {}}}
    for name, value in values.items():
        *sections, field = name.split(".")
        part = config
        for section in sections:
            part = part.setdefault(section, {})
        part[field] = value
    return config


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> pathlib.Path:
    """What version 0.1 left in the test data."""
    folder = tmp_path_factory.mktemp("version_0_1")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def sign(folder: pathlib.Path) -> None:
    """Makes the manifest fit the files again."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest:
        content = (folder / name).read_bytes()
        manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def rewrite(folder: pathlib.Path, name: str, change: Callable[[dict], None]) -> None:
    """Changes a JSON file of a folder, and its manifest with it."""
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))
    sign(folder)


# Fields that moved


def test_every_field_that_moved_has_a_value_here():
    assert VALUES.keys() == MOVED.keys()


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_a_field_that_moved_is_found_where_it_is_today(old, new):
    value = VALUES[old]
    got = upgraded(nested({old: value}))
    assert got.config == nested({new: value}) and got.without_norm_bias == ()
    assert operator.attrgetter(new)(TrainConfig()) != value
    section, name = new.split(".")
    of_section = type(getattr(TrainConfig(), section))
    assert getattr(from_dict(of_section, got.config[section]), name) == value


def test_a_whole_model_of_version_0_1_becomes_the_configs_of_today():
    config = dataclasses.replace(prefix_config(), adapters=(AdapterConfig(),))
    compute = ComputeConfig("bfloat16", text_param_dtype="bfloat16", remat="full", unroll=2)
    augment = AugmentConfig(patch_drop=0.25, crop_positions=True, prefix_dropout=0.1)
    old = {"model": as_version_0_1(config, compute, augment, 12.0, -4.0)}
    assert set(old["model"]) > {"dtype", "conditioning", "prefix_dropout", "logit_scale_init"}
    got = upgraded(old).config
    assert from_dict(ModelConfig, got.pop("model")) == config
    assert from_dict(ComputeConfig, got.pop("compute")) == compute
    assert from_dict(AugmentConfig, got.pop("augment")) == augment
    assert got == {"loss": {"logit_scale_init": 12.0, "logit_bias_init": -4.0}}


def test_the_fields_of_these_tests_are_those_that_version_0_1_wrote(old):
    """By the folders and the run that it left in the test data."""
    for name in ("mammut", "coca", "magma", "run"):
        if name == "run":
            values = json.loads((old / "run" / "run.json").read_text())["config"]
        else:
            values = {"model": json.loads((old / name / "config.json").read_text())["model"]}
        new = upgraded(values).config
        config = from_dict(ModelConfig, new["model"])
        compute = from_dict(ComputeConfig, new["compute"])
        augment = from_dict(AugmentConfig, new["augment"])
        scale = values["model"]["logit_scale_init"]
        bias = values["model"]["logit_bias_init"]
        mine = as_version_0_1(config, compute, augment, scale, bias)
        if name == "coca":
            mine["text"]["norm_bias"] = False
        # Whatever that version wrote; a later one may have more.
        assert differences(mine, values["model"], set()) == []


# Where the scale and the bias of a loss start


@pytest.mark.parametrize(
    ("loss", "scale", "bias", "kept"),
    [
        ({}, 1 / 0.07, 0.0, {}),
        ({"contrastive": "softmax"}, 1 / 0.07, 0.0, {}),
        ({"contrastive": "sigmoid"}, 10.0, -10.0, {}),
        ({"contrastive": "focal"}, 10.0, -10.0, {}),
        # the defaults of version 0.1, which are not those of these losses today
        (
            {"contrastive": "focal"},
            1 / 0.07,
            0.0,
            {"logit_scale_init": 1 / 0.07, "logit_bias_init": 0.0},
        ),
        ({"contrastive": "softmax"}, 10.0, 0.0, {"logit_scale_init": 10.0}),
    ],
)
def test_a_start_that_is_the_losss_own_is_not_set(loss, scale, bias, kept):
    """A recipe of today leaves it out, and the run of such a recipe goes on."""
    model = {"logit_scale_init": scale, "logit_bias_init": bias}
    got = upgraded({"model": model, "loss": loss}).config
    assert got == {"model": {}, "loss": loss | kept}
    today = {"model": {}, "loss": loss | model}
    assert upgraded(today).config == today


# Fields that follow from others


@pytest.mark.parametrize(
    ("text", "conditioning"),
    [
        ({}, "cross_attention"),
        ({"cross_attn_every": 2}, "cross_attention"),
        ({"cross_attn_every": 0}, "prefix"),
    ],
)
def test_what_follows_from_the_cross_attention_is_dropped(text, conditioning):
    config = {"model": {"conditioning": conditioning, "text": text}}
    assert upgraded(config).config == {"model": {"text": text}}


@pytest.mark.parametrize(
    ("text", "class_token"),
    [
        ({}, False),
        ({"pooling": "end"}, False),
        ({"pooling": "class"}, True),
    ],
)
def test_what_follows_from_the_pooling_is_dropped(text, class_token):
    config = {"model": {"text": text | {"class_token": class_token}}}
    assert upgraded(config).config == {"model": {"text": text}}
    # The image encoder's is a field of its own.
    config = {"model": {"vision": {"class_token": class_token}}}
    assert upgraded(config).config == config


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"model.conditioning": "prefix"}, "conditioning"),
        (
            {"model.conditioning": "cross_attention", "model.text.cross_attn_every": 0},
            "conditioning",
        ),
        ({"model.conditioning": None}, "conditioning"),
        ({"model.text.class_token": True}, "class_token"),
        ({"model.text.class_token": False, "model.text.pooling": "class"}, "class_token"),
        ({"model.text.class_token": 0}, "class_token"),
        ({"model.text.norm_bias": "yes"}, "norm_bias"),
        ({"model.vision.norm_bias": 0}, "norm_bias"),
        ({"model.text.mlp_before_cross_attn": "no"}, "mlp_before_cross_attn"),
    ],
)
def test_what_does_not_go_with_the_others_is_refused_by_name(values, name):
    """Version 0.1 refused it, too."""
    with pytest.raises(ValueError, match=f"{name}, which .*Config does not know"):
        from_dict(ModelConfig, upgraded(nested(values)).config["model"])


# Layer norms without biases, and layers without MLPs


@pytest.mark.parametrize("towers", [(), ("vision",), ("text",), ("vision", "text")])
def test_towers_whose_norms_have_no_bias_are_told(towers):
    values = {f"model.{tower}.norm_bias": tower not in towers for tower in ("vision", "text")}
    got = upgraded(nested(values))
    assert got.config == nested({}) and got.without_norm_bias == towers


@pytest.mark.parametrize(
    ("position", "today"),
    [
        ({}, "last_bare"),
        ({"cross_attn_position": "last"}, "last_bare"),
        ({"cross_attn_position": "first"}, "first_bare"),
    ],
)
def test_a_layer_without_mlp_is_a_position_of_cross_attention(position, today):
    bare = {"model": {"text": position | {"mlp_before_cross_attn": False}}}
    got = upgraded(bare).config
    assert got == {"model": {"text": {"cross_attn_position": today}}}
    assert from_dict(ModelConfig, got["model"]).text.has_bare_layers
    whole = {"model": {"text": position | {"mlp_before_cross_attn": True}}}
    assert upgraded(whole).config == {"model": {"text": position}}


@pytest.mark.parametrize("position", ["last", "first", "inside"])
def test_every_position_of_no_cross_attention_is_read(position):
    """Version 0.1 took "inside" there, too, where it means nothing."""
    text = {"cross_attn_every": 0, "cross_attn_position": position}
    got = upgraded({"model": {"text": text}}).config
    today = "last" if position == "inside" else position
    assert got == {"model": {"text": {"cross_attn_every": 0, "cross_attn_position": today}}}
    assert from_dict(DecoderConfig, got["model"]["text"]).has_prefix
    seen = {"cross_attn_every": 2, "cross_attn_position": position}
    assert upgraded({"model": {"text": seen}}).config == {"model": {"text": seen}}


def test_a_layer_without_mlp_has_no_cross_attention_inside():
    text = {"cross_attn_position": "inside", "mlp_before_cross_attn": False}
    with pytest.raises((ValueError, TypeError), match="inside_bare"):
        from_dict(ModelConfig, upgraded({"model": {"text": text}}).config["model"])


def every_norm() -> ModelConfig:
    """A model with a norm in each place of a tower where one can be."""
    tiny = tiny_config()
    vision = {"input_norm": True, "qk_norm": True, "pooling": "queries", "pool_queries": 3}
    text = {"image_norm": True, "qk_norm": True, "cross_attn_position": "first_bare", "depth": 2}
    text |= {"layout": "serial", "pooling": "class", "text_only_depth": 1}
    return dataclasses.replace(
        tiny,
        vision=dataclasses.replace(tiny.vision, pool_heads=2, depth=1, **vision),
        text=dataclasses.replace(tiny.text, **text),
        image_projection="embedding",
    )


def norm_biases(config: ModelConfig) -> set[str]:
    """Paths of the biases of all layer norms, found by the type of their module."""

    def make() -> MaMMUT:
        return MaMMUT(config, rngs=nnx.Rngs(0))

    return {
        ".".join([*map(str, path), "bias"])
        for path, module in nnx.iter_graph(nnx.eval_shape(make))
        if isinstance(module, LayerNorm)
    }


@pytest.mark.parametrize("towers", [("text",), ("vision", "text")])
def test_a_folder_whose_norms_have_no_biases_gets_zeros_and_every_other_number_as_it_is(
    towers, tmp_path
):
    config = every_norm()
    biases = {path for path in norm_biases(config) if path.split(".")[0] in towers}
    assert len(biases) > 6 * len(towers)
    mammut.save(tmp_path / "old", tiny_model(config), tiny_processor())
    arrays = load_file(tmp_path / "old" / "model.safetensors")
    assert biases <= arrays.keys()
    stored = {path: array for path, array in arrays.items() if path not in biases}
    save_file(stored, tmp_path / "old" / "model.safetensors")
    old = as_version_0_1(config, ComputeConfig(remat="dots"))

    def change(values: dict) -> None:
        del values["compute"]
        values.update(version=1, model=old)
        for tower in towers:
            old[tower]["norm_bias"] = False

    rewrite(tmp_path / "old", "config.json", change)
    model, _ = mammut.load(tmp_path / "old")
    assert (model.config, model.compute) == (config, ComputeConfig(remat="dots"))
    assert read_model_config(tmp_path / "old") == config
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        path = ".".join(path)
        expected = np.zeros(leaf.shape, np.float32) if path in biases else arrays[path]
        np.testing.assert_array_equal(leaf.get_value(), expected, err_msg=path)
    # Any other parameter that is missing, and a bias where the config says that there is one, is.
    for missing in ("text.layers.attn.query.bias", min(stored)):
        less = {path: array for path, array in stored.items() if path != missing}
        save_file(less, tmp_path / "old" / "model.safetensors")
        sign(tmp_path / "old")
        with pytest.raises(CheckpointError, match=f"{missing} is missing"):
            mammut.load(tmp_path / "old")
    save_file(stored, tmp_path / "old" / "model.safetensors")
    rewrite(tmp_path / "old", "config.json", lambda c: c["model"]["text"].update(norm_bias=True))
    with pytest.raises(CheckpointError, match="text.norm.bias is missing"):
        mammut.load(tmp_path / "old")


# What is left alone, and what is refused


PREFIX = TrainConfig(
    task="caption", model=prefix_config(), augment=AugmentConfig(prefix_dropout=0.1)
)


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        PREFIX,
        TrainConfig(model=presets.mammut_b16(), compute=ComputeConfig("bfloat16", remat="dots")),
        TrainConfig(model=ModelConfig(text=DecoderConfig(cross_attn_position="last_bare"))),
        TrainConfig(
            task="caption",
            model=ModelConfig(VisionConfig(class_token=True), DecoderConfig(pooling="none")),
            augment=AugmentConfig(patch_drop=0.5, crop_positions=True),
        ),
    ],
    ids=["default", "prefix", "b16", "bare", "augmented"],
)
def test_a_config_in_the_fields_of_today_comes_back_as_it_is(config):
    values = json.loads(json.dumps(to_dict(config)))
    got = upgraded(values)
    assert got.config == values and got.without_norm_bias == ()
    assert from_dict(TrainConfig, got.config) == config


def test_nothing_is_changed_in_place():
    old = {"model": as_version_0_1(prefix_config()), "loss": {"contrastive": "focal"}}
    old["model"]["text"]["norm_bias"] = False
    before = copy.deepcopy(old)
    got = upgraded(old).config
    assert old == before != got
    got["model"]["text"]["width"] = got["loss"]["contrastive"] = "changed"
    assert old == before


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"model": None},
        {"model": 7},
        {"model": {"text": [], "vision": "vit"}},
        {"model": {}, "loss": 3},
        {"model": {"dtype": "bfloat16"}, "compute": 3},
        {"loss": {"contrastive": []}, "model": {"logit_bias_init": 1.0}},
    ],
)
def test_values_that_are_no_objects_are_left_for_the_reader_to_refuse(values):
    assert upgraded(values).config.keys() == values.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].update(colour="red"), "has colour, which ModelConfig does not know"),
        (
            lambda c: c["model"]["text"].update(dtype="float32"),
            "has dtype, which DecoderConfig does not know",
        ),
        (
            lambda c: c["model"]["vision"].update(drop=1),
            "has drop, which VisionConfig does not know",
        ),
        (lambda c: c["model"].update(dtype=None), "has dtype None, expected"),
        (
            lambda c: c["model"].update(unroll="4"),
            "has unroll '4', expected int for ComputeConfig.unroll",
        ),
        (
            lambda c: c["model"].update(unroll=0),
            "ComputeConfig.unroll is 0, expected a positive number",
        ),
    ],
)
def test_an_old_folder_with_a_field_that_no_version_had_is_refused(change, message, tmp_path):
    mammut.save(tmp_path / "old", tiny_model(), tiny_processor())

    def of_version_1(values: dict) -> None:
        del values["compute"]
        values.update(version=1, model=as_version_0_1(tiny_config()))
        change(values)

    rewrite(tmp_path / "old", "config.json", of_version_1)
    with pytest.raises(CheckpointError) as error:
        mammut.load(tmp_path / "old")
    assert message in one_sentence(error) and "config.json" in str(error.value)


# Runs


@pytest.fixture
def old_run(old, tmp_path) -> pathlib.Path:
    """A copy of the run of version 0.1 in the test data."""
    return shutil.copytree(old / "run", tmp_path / "run")


def resumed(
    folder: pathlib.Path, *overrides: str, recipe: pathlib.Path | None = None
) -> TrainConfig:
    run = resolve(recipe, pathlib.Path("tiny.py"), folder, list(overrides), resume=True)
    return run.config


def write_recipe_of(values: dict[str, Any], folder: pathlib.Path) -> pathlib.Path:
    recipe = folder / "recipe.py"
    recipe.write_text(
        "from mammut.config import TrainConfig, from_dict\n"
        "def get_config():\n"
        f"    return from_dict(TrainConfig, {values!r})\n"
    )
    return recipe


def test_a_run_of_version_0_1_is_read_in_the_fields_of_today(old_run):
    config, overrides = read_run(old_run)
    assert overrides == [] and config.seed == 7
    assert config.augment == AugmentConfig(patch_drop=0.25, crop_positions=True)
    assert config.compute == ComputeConfig()
    assert config.loss.contrastive == "focal"
    # 10 and -10 in its run.json, which are those of the loss.
    assert (config.loss.logit_scale_init, config.loss.logit_bias_init) == (None, None)
    assert resumed(old_run) == config
    assert read_model_config(old_run) == config.model


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_run_whose_norms_have_no_biases_is_read_but_not_resumed(old_run, tower):
    values = json.loads((old_run / "run.json").read_text())
    values["config"]["model"][tower]["norm_bias"] = False
    (old_run / "run.json").write_text(json.dumps(values))
    read_run(old_run)
    with pytest.raises(CheckpointError) as error:
        resumed(old_run)
    assert f"has model.{tower}.norm_bias False, expected True" in one_sentence(error)


def test_a_run_that_starts_elsewhere_than_its_loss_says_so(old_run):
    run = json.loads((old_run / "run.json").read_text())
    run["config"]["model"].update(logit_scale_init=12.5, logit_bias_init=-4.0, remat="dots")
    (old_run / "run.json").write_text(json.dumps(run))
    config, _ = read_run(old_run)
    assert (config.loss.logit_scale_init, config.loss.logit_bias_init) == (12.5, -4.0)
    assert config.compute.remat == "dots"
    run["config"]["model"]["colour"] = "red"
    (old_run / "run.json").write_text(json.dumps(run))
    with pytest.raises(CheckpointError, match="run.json.*has colour, which ModelConfig does not"):
        read_run(old_run)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("--compute.dtype bfloat16", "compute.dtype is bfloat16, it was float32"),
        ("--model.dtype bfloat16", "compute.dtype is bfloat16, it was float32"),
        ("--augment.patch-drop 0.5", "augment.patch_drop is 0.5, it was 0.25"),
        ("--model.vision.patch-drop 0.5", "augment.patch_drop is 0.5, it was 0.25"),
        ("--augment.crop-positions False", "augment.crop_positions is False, it was True"),
        ("--loss.logit-scale-init 20", "loss.logit_scale_init is 20.0, it was 10.0"),
        ("--model.logit-bias-init 1", "loss.logit_bias_init is 1.0, it was -10.0"),
        (
            "--compute.text-param-dtype bfloat16",
            "compute.text_param_dtype is bfloat16, it was None",
        ),
    ],
)
def test_what_a_resumed_run_changes_is_told_by_the_names_of_today(old_run, override, told):
    with pytest.raises(ValueError, match="cannot go on with another config") as error:
        resumed(old_run, *override.split())
    assert f"another config: {told} in its run.json" in one_sentence(error)


def test_a_start_that_is_given_and_is_also_that_of_the_loss_is_the_same_run(old_run):
    assert resumed(old_run, "--loss.logit-scale-init", "10").loss.logit_scale_init == 10.0


def test_what_a_resumed_run_may_change_it_may_by_either_name(old_run):
    assert resumed(old_run, "--compute.remat", "full").compute.remat == "full"
    assert resumed(old_run, "--model.remat", "full").compute.remat == "full"


def test_a_recipe_of_today_resumes_a_run_of_version_0_1_with_its_old_overrides(old_run, tmp_path):
    """Overrides that are in run.json are those of a command line of version 0.1."""
    run = json.loads((old_run / "run.json").read_text())
    run["overrides"] = ["--model.vision.patch-drop", "0.25", "--model.conditioning=cross_attention"]
    (old_run / "run.json").write_text(json.dumps(run))
    values = to_dict(dataclasses.replace(read_run(old_run)[0], augment=AugmentConfig()))
    values["augment"]["crop_positions"] = True
    recipe = write_recipe_of(values, tmp_path)
    assert resumed(old_run, recipe=recipe) == read_run(old_run)[0]


def test_a_run_of_version_0_1_keeps_what_it_had_of_the_model_it_started_from(old_run, tmp_path):
    """That version took how to compute, what to draw and the loss's start from that model, too."""
    mammut.save(tmp_path / "start", tiny_model(), tiny_processor())
    run = json.loads((old_run / "run.json").read_text())
    run["config"]["init"] = str(tmp_path / "start")
    run["config"]["model"].update(dtype="bfloat16", remat="dots", logit_scale_init=12.5)
    (old_run / "run.json").write_text(json.dumps(run))
    saved, _ = read_run(old_run)
    values = to_dict(dataclasses.replace(saved, compute=ComputeConfig(), augment=AugmentConfig()))
    values["loss"]["logit_scale_init"] = None
    recipe = write_recipe_of(values, tmp_path)
    expected = dataclasses.replace(saved, compute=ComputeConfig("bfloat16"))
    asked = resolve(recipe, pathlib.Path("tiny.py"), old_run, [], resume=True)
    assert asked.config == expected
    # The run.json of a resumed run is one of today: it goes on with the recipe once more.
    write_run(old_run, asked.config, asked.overrides)
    assert resumed(old_run, recipe=recipe) == expected
    # What the recipe says of the rest still counts.
    values["seed"] += 1
    with pytest.raises(ValueError, match="seed is 8, it was 7"):
        resumed(old_run, recipe=write_recipe_of(values, tmp_path))


def test_a_run_of_version_0_1_from_random_weights_has_its_recipes_settings(old_run, tmp_path):
    run = json.loads((old_run / "run.json").read_text())
    run["config"]["model"]["dtype"] = "bfloat16"
    (old_run / "run.json").write_text(json.dumps(run))
    values = to_dict(dataclasses.replace(read_run(old_run)[0], compute=ComputeConfig()))
    with pytest.raises(ValueError, match="compute.dtype is float32, it was bfloat16"):
        resumed(old_run, recipe=write_recipe_of(values, tmp_path))


def test_a_language_model_of_version_0_1_goes_on_with_its_recipe(tmp_path):
    """Its config had the prefix dropout of the MAGMA it was to become; no image is dropped from."""
    recipe = pathlib.Path(__file__).parents[1] / "configs" / "caption_lm.py"
    config = load_recipe(recipe)
    values = to_dict(config)
    augment = dataclasses.replace(config.augment, prefix_dropout=0.1)
    del values["compute"], values["augment"]
    values["model"] = as_version_0_1(config.model, config.compute, augment)
    (tmp_path / "run.json").write_text(json.dumps({"config": values, "overrides": []}))
    assert read_run(tmp_path)[0].augment.prefix_dropout == 0.1
    assert resumed(tmp_path, recipe=recipe) == config
    captions = dataclasses.replace(config, task="caption", augment=augment)
    write_run(tmp_path, captions, [])
    with pytest.raises(ValueError, match="augment.prefix_dropout is 0.0, it was 0.1"):
        resumed(tmp_path, "--augment.prefix-dropout", "0")


# Adapters


ADAPTERS = (AdapterConfig(), AdapterConfig("default", "lora", ("*.query",)))
# The `base_hash` that version 0.1 wrote for this base: of the fields of its time.
OLD_HASH = "4dd28479276d361ae28b7ea46f01917c4edf0045de5b3a156c50fd6b7219dad1"


@pytest.fixture(scope="module")
def old_adapter(tmp_path_factory) -> tuple[pathlib.Path, MaMMUT]:
    """An adapter on a model with an image prefix, as version 0.1 saved it, and that model."""
    folder = tmp_path_factory.mktemp("adapter")
    trained = tiny_model(dataclasses.replace(prefix_config(), adapters=ADAPTERS), seed=1)
    mammut.save_adapter(folder, trained, "default")
    augment = AugmentConfig(prefix_dropout=0.1)
    base = as_version_0_1(prefix_config(), ComputeConfig(remat="full"), augment)
    rewrite(
        folder,
        "adapter.json",
        lambda about: about.update(version=1, base=base, base_hash=OLD_HASH),
    )
    return folder, trained


def test_an_adapter_of_version_0_1_goes_on_its_base(old_adapter):
    folder, trained = old_adapter
    image = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    tokens = np.random.default_rng(1).integers(3, 60, (2, 8)).astype(np.int32)
    base = tiny_model(prefix_config(), seed=1)
    logits = jax.jit(lambda model: model.caption_logits(image, tokens))
    loaded = mammut.load_adapter(base, folder)
    assert loaded.config.adapters == ADAPTERS
    np.testing.assert_array_equal(logits(loaded), logits(trained))
    assert np.abs(logits(loaded) - logits(base)).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prefix_norm": False}, "prefix_norm is False, it was True"),
        ({"text": {"mlp_dim": 96}}, "text.mlp_dim is 96, it was 80"),
        ({"text": {"layout": "parallel"}}, "text.layout is parallel, it was serial"),
        (
            {"vision": {"image_mean": (0.4, 0.5, 0.5)}},
            "vision.image_mean is [0.4, 0.5, 0.5], it was [0.5, 0.5, 0.5]",
        ),
    ],
)
def test_an_adapter_of_version_0_1_is_refused_on_another_base(old_adapter, change, told):
    folder, _ = old_adapter
    config = prefix_config()
    for name, value in change.items():
        if isinstance(value, dict):
            value = dataclasses.replace(getattr(config, name), **value)
        config = dataclasses.replace(config, **{name: value})
    with pytest.raises(ValueError, match="is of another base: ") as error:
        mammut.load_adapter(tiny_model(config), folder)
    assert one_sentence(error).endswith(f"is of another base: {told}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda about: about["base"].update(colour="red"),
            "has colour, which ModelConfig does not know",
        ),
        (
            lambda about: about["adapters"][0].update(colour="red"),
            "has colour, which AdapterConfig does not know",
        ),
        (
            lambda about: about.update(version=3),
            "version 3, expected 'mammut adapter' version 1 or 2",
        ),
        (
            lambda about: about["also"].append(3),
            "has 3 in also, expected paths of parameters",
        ),
        (
            lambda about: about.pop("base_hash"),
            "does not have the keys adapters, also, base_hash and base",
        ),
    ],
)
def test_an_adapter_of_version_0_1_that_cannot_be_is_refused(
    old_adapter, tmp_path, change, message
):
    folder, _ = old_adapter
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rewrite(tmp_path, "adapter.json", change)
    with pytest.raises(CheckpointError) as error:
        mammut.load_adapter(tiny_model(prefix_config()), tmp_path)
    assert message in one_sentence(error)
