"""ResNet image encoders from files of open_clip and timm.

They give the originals' numbers, take pictures as those do, and a run starts from them.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from resnet_originals import arrays, features, original
from safetensors.numpy import save_file

import mammut
from mammut.config import DecoderConfig, ModelConfig, ResNetConfig, TrainConfig, VisionConfig
from mammut.data.images import ImageTransform
from mammut.data.sources import open_source
from mammut.models.compute import AugmentConfig, ComputeConfig
from mammut.models.layers import initialise
from mammut.models.resnet import ResNet
from mammut.testing import tiny_config
from mammut.training.new_processor import make_processor
from mammut.training.run import with_overrides
from mammut.weights.files.tensor_file import CheckpointError
from mammut.weights.formats.open_clip import to_open_clip
from mammut.weights.model_folder import open_model, read_model_config
from mammut.weights.opened import OpenedModel
from mammut.weights.resample import at_image_size
from mammut.weights.warm_start import warm_start

CLIP = ResNetConfig(stem_width=8, stages=(1, 2, 1, 1), image_size=64)
NORM_FREE = ResNetConfig(
    kind="nf", stem_width=8, stages=(1, 3, 1, 2), image_size=64,
    image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225),
)  # fmt: skip
TIMM = {
    "architecture": "nf_resnet50",
    "num_classes": 7,
    "pretrained_cfg": {"input_size": [3, 64, 64]},
}
TEXT_TOWER = "logit_scale", "token_embedding.weight", "transformer.resblocks.0.ln_1.weight"


def tower_of(opened: OpenedModel) -> ResNet:
    """The image encoder with the weights of a file."""

    def make() -> ResNet:
        return initialise(ResNet(opened.config.vision, ComputeConfig()), jax.random.key(0))

    graphdef, state = nnx.split(nnx.eval_shape(make))

    def read(path, leaf):
        value = jnp.asarray(opened.tensors.read("vision." + ".".join(entry.key for entry in path)))
        assert (value.shape, value.dtype) == (leaf.shape, leaf.dtype)
        return value

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(read, nnx.to_pure_dict(state)))


def write(path: pathlib.Path, config: ResNetConfig) -> pathlib.Path:
    """The original's weights as a checkpoint has them: of CLIP, beside a text tower."""
    tensors = arrays(original(config), "visual." if config.kind == "clip" else "")
    if config.kind == "clip":
        tensors |= {name: np.ones((2, 3), np.float32) for name in TEXT_TOWER}
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module", params=[CLIP, NORM_FREE], ids=["clip", "nf"])
def weights(request, tmp_path_factory) -> pathlib.Path:
    """A folder of each, as on the Hugging Face hub."""
    folder = tmp_path_factory.mktemp(request.param.kind)
    if request.param.kind == "clip":
        cfg = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "patch_size": None}
        cfg = {
            "model_cfg": {"embed_dim": 16, "vision_cfg": cfg, "text_cfg": {}},
            "preprocess_cfg": {},
        }
        (folder / "open_clip_config.json").write_text(json.dumps(cfg))
        write(folder / "open_clip_model.safetensors", request.param)
    else:
        (folder / "config.json").write_text(json.dumps(TIMM))
        write(folder / "model.safetensors", request.param)
    return folder


def config_of(folder: pathlib.Path) -> ResNetConfig:
    return NORM_FREE if (folder / "config.json").exists() else CLIP


def test_image_tokens_are_those_of_the_original(weights):
    opened, config = open_model(weights), config_of(weights)
    assert opened.config.vision == config == read_model_config(weights).vision
    assert opened.parts == ("vision",) and all(
        name.startswith("vision.") for name in opened.tensors.specs
    )
    image = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    expected = features(original(config), image)
    encoded = jax.jit(tower_of(opened).__call__)(image)
    assert expected.std() > 0.1
    np.testing.assert_allclose(encoded.tokens, expected, atol=1e-4)
    np.testing.assert_allclose(encoded.pooled, expected.mean(1), atol=1e-4)


@pytest.mark.parametrize("kind", ["clip", "nf"])
def test_image_tokens_of_a_full_size_resnet_50_are_those_of_the_original(kind, tmp_path):
    config = ResNetConfig(kind=kind, image_size=64)
    opened = open_model(write(tmp_path / "model.safetensors", config))
    assert (opened.config.vision.stages, opened.config.vision.width) == ((3, 4, 6, 3), 2048)
    image = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
    opened = at_image_size(opened, 64)
    expected = features(original(config), image)
    np.testing.assert_allclose(
        jax.jit(tower_of(opened).__call__)(image).tokens, expected, atol=1e-4
    )


def test_what_is_left_out_is_named_with_its_reason(weights):
    notes = " ".join(open_model(weights).notes)
    if config_of(weights) == CLIP:
        assert (
            "are not used: of the attention pool: the image tokens are what goes into it" in notes
        )
        assert ", ".join(TEXT_TOWER) + " is not used: of no image encoder" in notes
        assert "how many batches its statistics are of" in notes
    else:
        assert notes == "head.fc.bias, head.fc.weight is not used: the classifier"


def test_pictures_are_taken_as_the_original_takes_them(weights):
    """Pictures are prepared as the original prepares them at inference.

    The short side is resized by bicubic interpolation, the centre is cropped, and the mean is the
    original's.
    """
    assert open_model(weights).processor.image == ImageTransform(64, "shortest", "bicubic")


def test_image_size_mean_and_deviation_come_from_the_files_beside_the_weights(tmp_path):
    write(tmp_path / "model.safetensors", NORM_FREE)
    alone = open_model(tmp_path / "model.safetensors")
    assert (
        alone.config.vision.image_size == 256
        and "no config.json of timm gives it" in alone.notes[-1]
    )
    cfg = TIMM["pretrained_cfg"] | {
        "input_size": [3, 96, 96],
        "mean": [0.1, 0.2, 0.3],
        "crop_pct": 0.94,
    }
    (tmp_path / "config.json").write_text(
        json.dumps(TIMM | {"pretrained_cfg": cfg | {"interpolation": "bilinear"}})
    )
    beside = open_model(tmp_path)
    assert beside.config.vision.grid == (3, 3) and beside.config.vision.image_mean == (
        0.1,
        0.2,
        0.3,
    )
    assert beside.processor.image == ImageTransform(96, "shortest", "bilinear")
    assert "pretrained_cfg.crop_pct is 0.94, which is not used" in beside.notes[-1]
    (tmp_path / "config.json").write_text(
        json.dumps(TIMM | {"pretrained_cfg": {"input_size": [3, 64, 96]}})
    )
    with pytest.raises(
        CheckpointError, match=r"config.json: pretrained_cfg.input_size is .*, expected \[3, N, N\]"
    ):
        open_model(tmp_path)


def test_the_visual_module_of_clip_is_read_alone(tmp_path):
    tensors = {
        name: x for name, x in arrays(original(CLIP)).items() if not name.startswith("attnpool.")
    }
    save_file(tensors, tmp_path / "visual.safetensors")
    opened = open_model(tmp_path / "visual.safetensors")
    assert (
        opened.config.vision.image_size == 224
        and "image_size is 224: the file does not tell" in opened.notes[-1]
    )
    np.testing.assert_array_equal(
        opened.tensors.read("vision.stem.conv2.bias"), tensors["bn2.bias"]
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"visual.bn2.running_var": -np.ones(4, np.float32)},
            "running_var holds -1.0, expected numbers of 0 or more",
        ),
        ({"visual.layer2.1.bn1.weight": None}, "visual.layer2.1.bn1.weight is missing"),
        (
            {"visual.layer2.1.conv2.weight": np.ones((16, 16, 1, 1), np.float32)},
            r"\[16, 16, 1, 1\], expected",
        ),
        (
            {"visual.layer3.0.se.weight": np.ones(3, np.float32)},
            "layer3.0.se.weight is not a tensor of this model",
        ),
        (
            {"visual.layer5.0.bn1.weight": np.ones(3, np.float32)},
            "a ResNet of 5 stages, expected 4",
        ),
        (
            {"visual.attnpool.positional_embedding": np.ones((1, 9), np.float32)},
            "image_size is 0, expected a positive",
        ),
    ],
)
def test_damaged_weights_are_refused_by_name(change, says, tmp_path):
    tensors = arrays(original(CLIP), "visual.") | change
    save_file(
        {name: value for name, value in tensors.items() if value is not None},
        tmp_path / "w.safetensors",
    )
    with pytest.raises(CheckpointError, match=says):
        open_model(tmp_path / "w.safetensors").tensors.read("vision.stem.conv2.variance")


def test_a_config_of_another_size_is_refused(tmp_path):
    write(tmp_path / "open_clip_model.safetensors", CLIP)
    cfg = {"model_cfg": {"vision_cfg": {"image_size": 96}}, "preprocess_cfg": {"size": 64}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(cfg))
    with pytest.raises(
        CheckpointError, match="vision_cfg.image_size is 96, the weights are of 64 pixels"
    ):
        open_model(tmp_path)


def test_a_run_starts_from_the_encoder_whatever_its_recipe_has(weights):
    text = DecoderConfig(vocab_size=60, max_length=12, width=48, depth=2, num_heads=3, mlp_dim=80)
    vit = VisionConfig(pooling="class", class_token=True)
    recipe = TrainConfig(model=ModelConfig(vit, text, image_projection="separate"))
    overrides = ["--init-vision", str(weights), "--model.vision.image-size", "96"]
    config, starts = with_overrides(recipe, overrides)
    assert config.model.vision == dataclasses.replace(config_of(weights), image_size=96)
    plan = warm_start(config.model, starts)
    rows = {row.path: row.what for row in plan.rows if row.path.startswith("vision.")}
    assert rows and set(rows.values()) == {"loaded"}
    drops_patches = dataclasses.replace(recipe, augment=AugmentConfig(patch_drop=0.5))
    with pytest.raises(ValueError, match="patch_drop is 0.5, which a ResNet has no patches for"):
        with_overrides(drops_patches, overrides)
    assert all(name in plan.random for name in ("text.norm.scale", "image_projection.kernel"))
    processor = make_processor(
        config, open_source("synthetic:train[:50]", image_size=64, field="captions"), starts
    )
    assert (
        processor.image == ImageTransform(96, "shortest", "bicubic") and processor.max_length == 12
    )


def test_a_whole_model_is_neither_loaded_from_an_encoder_nor_exported_with_one(weights):
    with pytest.raises(CheckpointError, match="holds vision alone, expected a whole model"):
        mammut.load(weights)
    with pytest.raises(
        ValueError, match="open_clip cannot express this model: its ResNets have an attention pool"
    ):
        to_open_clip(dataclasses.replace(tiny_config(), vision=CLIP))
