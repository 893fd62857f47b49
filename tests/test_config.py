"""Configs survive JSON and refuse what cannot work.

Errors are one sentence that names the field.
"""

import dataclasses
import importlib.util
import inspect
import json
import math
import pathlib
import re
import subprocess
import sys

import pytest

from mammut import presets
from mammut.config import (
    AugmentConfig,
    ComputeConfig,
    DataConfig,
    DecoderConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    VisionConfig,
    from_dict,
    to_dict,
)
from mammut.models.losses import CONTRASTIVE

PRESETS = [
    function for name, function in inspect.getmembers(presets, inspect.isfunction) if name[0] != "_"
]
ROOT = pathlib.Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs").glob("*.py"))


def run_file(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_a_preset_survives_json(preset):
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(preset())))) == preset()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_survives_json(path):
    config = run_file(path).get_config()
    assert isinstance(config, TrainConfig)
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_every_field_survives_json():
    """Every number of a run, changed: nothing falls back to its default."""

    def changed(config):
        values = {}
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if dataclasses.is_dataclass(value):
                values[field.name] = changed(value)
            elif isinstance(value, float) and field.name not in (
                "focal_alpha",
                "max_bad_share",
                "prefix_dropout",
            ):
                values[field.name] = value / 2 + 0.015625
        return dataclasses.replace(config, **values)

    config = changed(TrainConfig())
    assert config.optimizer.learning_rate != TrainConfig().optimizer.learning_rate
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_a_missing_field_takes_its_default():
    assert from_dict(TrainConfig, {"steps": 7, "model": {"vision": {"width": 96}}}) == TrainConfig(
        steps=7, model=ModelConfig(vision=VisionConfig(width=96))
    )


def test_an_unknown_field_is_refused_with_its_name_and_its_file():
    with pytest.raises(
        ValueError, match=r"runs/a/config\.json has sped, stepz, which TrainConfig does not know"
    ):
        from_dict(TrainConfig, {"stepz": 1, "steps": 2, "sped": 3}, "runs/a/config.json")
    with pytest.raises(ValueError, match=r"^a has '\\n', which"):
        from_dict(TrainConfig, {"\n": None}, "a")


def test_an_unknown_field_deep_inside_is_refused_with_the_way_to_it():
    with pytest.raises(
        ValueError, match=r"config\.json: model: vision has dept, which VisionConfig does not know"
    ):
        from_dict(TrainConfig, {"model": {"vision": {"dept": 1}}}, "config.json")


@pytest.mark.parametrize("values", [None, [], 3, "steps"])
def test_what_is_not_an_object_is_refused(values):
    kind = type(values).__name__
    with pytest.raises(
        ValueError, match=f"config.json holds {kind}, expected an object with the fields of Train"
    ):
        from_dict(TrainConfig, values, "config.json")
    with pytest.raises(ValueError, match=f"config.json: loss holds {kind}"):
        from_dict(TrainConfig, {"loss": values}, "config.json")


def test_a_config_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().steps = 3


REFUSED = [
    *((tower, name, value) for tower in (VisionConfig, DecoderConfig) for value in (0, -1)
      for name in ("width", "depth", "num_heads", "mlp_dim")),
    (VisionConfig, "norm_eps", 0.0),
    (DecoderConfig, "norm_eps", -1e-6),
    (VisionConfig, "width", 100),  # not a multiple of 12 heads
    (DecoderConfig, "num_heads", 7),
    (VisionConfig, "image_size", 0),
    (VisionConfig, "image_size", 225),
    (VisionConfig, "image_size", 50),
    (VisionConfig, "patch_size", -16),
    (VisionConfig, "patch_size", 15),
    (VisionConfig, "image_std", (0.5, 0.0, 0.5)),
    (DecoderConfig, "vocab_size", 0),
    (DecoderConfig, "max_length", 1),
    (DecoderConfig, "cross_attn_every", -1),
    (DecoderConfig, "cross_attn_every", 5),
    (DecoderConfig, "depth", 13),
    (ComputeConfig, "unroll", 0),
    (AugmentConfig, "patch_drop", 1.0),
    (AugmentConfig, "patch_drop", -0.1),
    (AugmentConfig, "prefix_dropout", 1.0),
    (AugmentConfig, "prefix_dropout", -0.1),
    (DataConfig, "batch_size", 0),
    (DataConfig, "eval_batch_size", 0),
    (DataConfig, "val_examples", 0),
    (DataConfig, "threads", 0),
    (DataConfig, "max_image_pixels", 0),
    (DataConfig, "max_bad_share", 1.0),
    (DataConfig, "max_bad_share", -0.1),
    (DataConfig, "crop_scale", (0.0, 1.0)),
    (DataConfig, "crop_scale", (0.9, 0.5)),
    (DataConfig, "crop_scale", (0.5, 1.5)),
    (DataConfig, "crop_ratio", (2.0, 1.0)),
    (DataConfig, "crop_ratio", (0.0, 1.0)),
    (LossConfig, "label_smoothing", 1.0),
    (LossConfig, "vocab_chunk", 0),
    (LossConfig, "focal_alpha", 0.0),
    (LossConfig, "focal_alpha", 1.0),
    (LossConfig, "contrastive_weight", -1.0),
    (LossConfig, "caption_weight", -1.0),
    (LossConfig, "focal_gamma", -1.0),
    (LossConfig, "z_loss", -1.0),
    (LossConfig, "contrastive_weight", math.inf),
    (LossConfig, "caption_weight", math.nan),
    (OptimizerConfig, "learning_rate", 0.0),
    (OptimizerConfig, "eps", 0.0),
    (OptimizerConfig, "b1", 1.0),
    (OptimizerConfig, "b2", -0.1),
    (OptimizerConfig, "warmup_steps", -1),
    (OptimizerConfig, "weight_decay", -0.1),
    (OptimizerConfig, "clip_norm", -1.0),
    (TrainConfig, "steps", 0),
    (TrainConfig, "accumulation", 0),
    (TrainConfig, "accumulation", 3),  # of 256 examples
    (TrainConfig, "log_every", 0),
    (TrainConfig, "eval_every", -1),
    (TrainConfig, "checkpoint_every", 0),
    (TrainConfig, "keep_checkpoints", 0),
    (TrainConfig, "max_nonfinite_steps", 0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("cls", "name", "value"), REFUSED, ids=lambda x: x.__name__ if isinstance(x, type) else str(x)
)
def test_a_value_that_cannot_work_is_refused_with_its_field(cls, name, value):
    with pytest.raises(ValueError, match=rf"\b{name}\b") as error:
        cls(**{name: value})
    message = str(error.value)
    assert str(value) in message and "\n" not in message
    assert re.match(rf"{cls.__name__}\.|(data|optimizer)\.", message)
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        from_dict(cls, {name: list(value) if isinstance(value, tuple) else value})


@pytest.mark.parametrize("contrastive_weight, batch_size", [(0.0, 8), (1.0, 1)])
def test_a_run_that_would_learn_nothing_is_refused(contrastive_weight, batch_size):
    loss = LossConfig(contrastive_weight=contrastive_weight, caption_weight=0.0)
    data = DataConfig(batch_size=batch_size)
    with pytest.raises(ValueError, match="from which nothing is learnt: expected a weight above 0"):
        TrainConfig(loss=loss, data=data)
    TrainConfig(loss=LossConfig(contrastive_weight=contrastive_weight), data=data)
    TrainConfig(loss=LossConfig(caption_weight=0.0), data=DataConfig(batch_size=8))
    TrainConfig(task="caption", loss=loss, data=data)  # its one loss has no weight


_ACTIVATIONS = "gelu, gelu_tanh, quick_gelu, relu2, swiglu"
CHOICES = [
    ("VisionConfig", "activation", "relu", _ACTIVATIONS),
    ("DecoderConfig", "activation", "silu", _ACTIVATIONS),
    (
        "DecoderConfig",
        "cross_attn_position",
        "bare",
        "last, first, last_bare, first_bare, inside",
    ),
    ("ComputeConfig", "dtype", "float16", "float32, bfloat16"),
    ("ComputeConfig", "param_dtype", "int8", "float32, bfloat16"),
    ("ComputeConfig", "text_param_dtype", "int8", "float32, bfloat16"),
    ("ComputeConfig", "remat", "some", "none, dots, full"),
    ("ComputeConfig", "passes", "both", "two_calls, fused"),
    ("ComputeConfig", "image_attention", "cudnn", "auto, xla"),
    ("LossConfig", "contrastive", "siglip", ", ".join(CONTRASTIVE)),
    ("LossConfig", "focal_normalization", "none", "batch, pairs"),
    ("OptimizerConfig", "name", "sgd", "adamw, adafactor"),
    ("OptimizerConfig", "schedule", "step", "cosine, linear, constant"),
    ("TrainConfig", "task", "image-text", "image_text, caption, vqa, classify, text"),
]


@pytest.fixture(scope="module")
def unchecked_errors() -> list[str]:
    """The errors that users get for CHOICES.

    They are made in a process of their own: in this one the type checker would come first.
    """
    program = """
import json, sys
from mammut import config

errors = []
for cls, name, value, _ in json.load(sys.stdin):
    try:
        config.from_dict(getattr(config, cls), {name: value})
        errors.append("")
    except ValueError as error:
        errors.append(str(error))
print(json.dumps(errors))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, input=json.dumps(CHOICES), capture_output=True, text=True, cwd=ROOT, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("index", range(len(CHOICES)), ids=lambda i: ".".join(CHOICES[i][:2]))
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(index, unchecked_errors):
    cls, name, value, choices = CHOICES[index]
    expected = f"{cls}.{name} is {value!r}, expected one of {choices}"
    assert unchecked_errors[index] == expected


@pytest.mark.parametrize(
    ("compute", "augment", "message"),
    [
        (ComputeConfig(passes="fused"), AugmentConfig(), None),
        (ComputeConfig(), AugmentConfig(patch_drop=0.5, crop_positions=True), None),
        (
            ComputeConfig(),
            AugmentConfig(prefix_dropout=0.1),
            "AugmentConfig.prefix_dropout is 0.1, which needs an image prefix: "
            "DecoderConfig.cross_attn_every 0",
        ),
    ],
)
def test_a_run_refuses_what_its_model_cannot_be_computed_with(compute, augment, message):
    if message is None:
        assert TrainConfig(compute=compute, augment=augment).compute == compute
    else:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            TrainConfig(compute=compute, augment=augment)


def test_a_run_refuses_fused_passes_of_different_length():
    text = DecoderConfig(pooling="class")
    message = "ComputeConfig.passes is 'fused', which needs two passes over the same tokens"
    with pytest.raises(ValueError, match=message):
        TrainConfig(model=ModelConfig(text=text), compute=ComputeConfig(passes="fused"))


def test_the_architecture_says_nothing_of_how_it_is_computed_or_trained():
    """A model folder keeps the `ModelConfig`: later runs of the weights inherit its fields."""
    of_model = set()
    for config in (ModelConfig(), VisionConfig(), DecoderConfig()):
        of_model |= {field.name for field in dataclasses.fields(config)}
    for config in (ComputeConfig(), AugmentConfig()):
        assert not of_model & {field.name for field in dataclasses.fields(config)}


def test_a_warm_up_as_long_as_the_run_is_refused():
    with pytest.raises(ValueError, match=r"optimizer\.warmup_steps 100 is not below steps 100"):
        TrainConfig(steps=100, optimizer=OptimizerConfig(warmup_steps=100))
    assert TrainConfig(steps=101, optimizer=OptimizerConfig(warmup_steps=100)).steps == 101


@pytest.mark.parametrize(
    ("mesh", "sizes"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=2, fsdp=-1), (2, 4, 1)),
        (MeshConfig(data=-1, fsdp=2, model=2), (2, 2, 2)),
        (MeshConfig(data=1, fsdp=1, model=8), (1, 1, 8)),
    ],
)
def test_a_mesh_takes_all_devices(mesh, sizes):
    assert mesh.sizes(8) == sizes


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=3),
        MeshConfig(data=4),
        MeshConfig(data=-1, fsdp=-1),
        MeshConfig(fsdp=3),
        MeshConfig(data=0),
        MeshConfig(data=-1, fsdp=0),
        MeshConfig(data=-2, fsdp=-4),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh):
    given = " x ".join(map(str, dataclasses.astuple(mesh)))
    with pytest.raises(ValueError, match=rf"mesh\.data x fsdp x model is {given}, .*\b8 devices"):
        mesh.sizes(8)


def test_the_paper_sections_defaults_hold():
    """Loss weights of 1 and 1, an unbalanced focal loss with gamma 1, AdamW with weight decay 0.01.

    Texts have 64 tokens.
    """
    loss, optimizer = LossConfig(), OptimizerConfig()
    assert (loss.contrastive_weight, loss.caption_weight, loss.focal_alpha, loss.focal_gamma) == (
        1,
        1,
        0.5,
        1,
    )
    assert (optimizer.name, optimizer.weight_decay, optimizer.learning_rate) == (
        "adamw",
        0.01,
        1e-3,
    )
    assert DecoderConfig().max_length == 64 and DecoderConfig().cross_attn_every == 2


@pytest.mark.parametrize("value", [[0.5, float("nan"), 0.5], [0.5, float("inf"), 0.5]])
@pytest.mark.parametrize("name", ["image_mean", "image_std"])
def test_pixel_statistics_that_are_no_numbers_are_refused(name, value):
    with pytest.raises(
        ValueError, match=rf"VisionConfig\.{name} is .*, expected (finite|positive) numbers"
    ):
        from_dict(VisionConfig, {name: value})


def test_an_integer_too_large_for_a_float_is_refused_where_one_is_expected():
    with pytest.raises(ValueError, match="expected float for VisionConfig.norm_eps"):
        from_dict(VisionConfig, {"norm_eps": 10**400})
