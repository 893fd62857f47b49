"""The ResNet image encoders.

The tests show what no batch and no step may change, their sizes, and a model that has one.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from marks import long
from resnet_originals import original

import mammut
from mammut.config import (
    AugmentConfig,
    ComputeConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ResNetConfig,
    TrainConfig,
    VisionConfig,
    from_dict,
    to_dict,
)
from mammut.core import sharding
from mammut.core.params import logical_axes
from mammut.core.sharding import param_shardings
from mammut.models.compute import Augment
from mammut.models.flops import forward_flops, resnet_flops
from mammut.models.image_encoder import EncoderOutput
from mammut.models.layers import initialise
from mammut.models.mammut import require_computable
from mammut.models.resnet import ResNet
from mammut.pages.word_maps import word_maps
from mammut.testing import tiny_batch, tiny_config, tiny_model, tiny_processor
from mammut.training.run import parse_overrides
from mammut.training.step import make_trainer
from mammut.training.tasks import ImageTextTask
from mammut.weights.opened import model_specs

CLIP = ResNetConfig(stem_width=8, stages=(1, 2, 1, 1), image_size=64)
NORM_FREE = ResNetConfig(kind="nf", stem_width=8, stages=(1, 3, 1, 1), image_size=64)
BOTH = pytest.mark.parametrize("vision", [CLIP, NORM_FREE], ids=["clip", "nf"])
RN50X16 = ResNetConfig(stem_width=96, stages=(6, 8, 18, 8), image_size=384)
STATISTICS = "mean", "variance"


def with_tower(vision: ResNetConfig, **fields) -> ModelConfig:
    return dataclasses.replace(tiny_config(), vision=vision, **fields)


def images(rows: int, size: int = 64) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (rows, size, size, 3), np.uint8)


@jax.jit
def encode(tower: ResNet, pixels: np.ndarray) -> EncoderOutput:
    """The tower is an argument: XLA computes with constants as it compiles."""
    return tower(pixels)


def leaves(model: nnx.Module) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(path): np.asarray(param[...]) for path, param in flat}


@BOTH
def test_tokens_of_an_image_depend_on_no_other_image_in_training_either(vision):
    tower, batch = tiny_model(with_tower(vision)).vision, images(3)
    trained = jax.jit(lambda tower, x: tower(x, Augment(jax.random.key(0))))(tower, batch)
    alone = encode(tower, batch[1:2])
    largest = np.abs(alone.tokens).max()
    np.testing.assert_allclose(trained.tokens[1:2], alone.tokens, atol=1e-5 * largest)
    assert np.abs(trained.tokens[0] - trained.tokens[1]).max() > 0.01 * largest


@BOTH
def test_tokens_lie_row_by_row_and_are_averaged(vision):
    tower, pixels = tiny_model(with_tower(vision)).vision, images(1)
    encoded = encode(tower, pixels)
    assert (
        encoded.tokens.shape == (1, 4, 256)
        and encoded.grid == (2, 2) == vision.grid
        and vision.num_tokens == 4
    )
    np.testing.assert_allclose(encoded.pooled, encoded.tokens.mean(1), rtol=1e-5)
    pixels[:, :2, -2:] = 255 - pixels[:, :2, -2:]  # in the upper right corner
    moved = np.abs(encode(tower, pixels).tokens - encoded.tokens).max(2)[0]
    assert moved.argmax() == 1


@BOTH
def test_bfloat16_stays_close_to_float32(vision):
    towers = (
        tiny_model(with_tower(vision), compute=ComputeConfig(dtype=dtype)).vision
        for dtype in ("float32", "bfloat16")
    )
    exact, rounded = (encode(tower, images(2)).tokens for tower in towers)
    assert rounded.dtype == jnp.bfloat16
    error = np.abs(np.asarray(rounded, np.float32) - exact)
    assert 0 < error.max() < 0.05 * np.abs(exact).max()


@BOTH
def test_every_parameter_but_the_statistics_has_a_gradient(vision):
    graphdef, params = nnx.split(tiny_model(with_tower(vision)).vision)
    weights = np.random.default_rng(2).normal(size=(2, 4, 256))

    def loss(params):
        return (nnx.merge(graphdef, params)(images(2)).tokens * weights).sum()

    gradients = leaves(nnx.merge(graphdef, jax.jit(jax.grad(loss))(params)))
    moved = {name for name, value in gradients.items() if np.abs(value).max() > 0}
    assert {name for name in gradients if name not in moved} == {
        n for n in gradients if n.endswith(STATISTICS)
    }
    assert any(name.endswith(STATISTICS) for name in gradients) == (vision.kind == "clip")


@pytest.mark.long
def test_steps_of_training_move_everything_but_the_statistics():
    config = TrainConfig(
        model=with_tower(CLIP),
        steps=4,
        data=DataConfig(batch_size=4),
        optimizer=OptimizerConfig(weight_decay=0.5),
    )
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        trainer = make_trainer(config, ImageTextTask(config.loss), mesh)
        state = trainer.init_from(nnx.to_pure_dict(nnx.state(tiny_model(config.model), nnx.Param)))
        before = leaves(trainer.model(jax.tree.map(np.array, state.all_params)))
        for seed in range(2):
            state, metrics = trainer.step(
                state, sharding.device_batch(tiny_batch(config.model, seed=seed), mesh)
            )
        after = leaves(trainer.model(state.all_params))
    assert np.isfinite(metrics["loss"])
    for name in (name for name in before if name.startswith("vision.")):
        assert np.array_equal(before[name], after[name]) == name.endswith(STATISTICS), name


@pytest.mark.long
@BOTH
def test_a_new_encoder_keeps_its_numbers_in_bounds(vision):
    vision = dataclasses.replace(vision, stages=(2, 2, 2, 2))
    tower = initialise(ResNet(vision, ComputeConfig()), jax.random.key(0))
    tokens = encode(tower, images(2)).tokens
    assert 0.05 < tokens.std() < 5


@pytest.mark.long
@pytest.mark.parametrize(("remat", "unroll"), [long("dots", 2), ("full", 1)])
def test_recomputing_and_unrolling_change_no_gradient(remat, unroll):
    def gradients(compute):
        graphdef, params = nnx.split(tiny_model(with_tower(NORM_FREE), compute=compute).vision)
        loss = jax.grad(
            lambda params: jnp.square(nnx.merge(graphdef, params)(images(2)).tokens).sum()
        )
        return leaves(nnx.merge(graphdef, jax.jit(loss)(params)))

    plain = gradients(ComputeConfig())
    other = gradients(ComputeConfig(remat=remat, unroll=unroll))
    for name, value in plain.items():
        np.testing.assert_allclose(
            other[name], value, atol=1e-4 * np.abs(value).max(), err_msg=name
        )


@BOTH
def test_a_mesh_changes_no_token(vision):
    model = tiny_model(with_tower(vision)).vision
    graphdef, params = nnx.split(model)
    params, batch = nnx.to_pure_dict(params), images(4)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    shardings = param_shardings(params, logical_axes(model), mesh)
    assert shardings["stage4"]["first"]["conv3"]["kernel"].spec[3] == "fsdp"
    run = jax.jit(lambda params, batch: nnx.merge(graphdef, params)(batch).tokens)
    alone = run(params, batch)
    with jax.set_mesh(mesh):
        spread = run(
            jax.device_put(params, shardings),
            sharding.device_batch({"image": batch}, mesh)["image"],
        )
    assert np.abs(spread - alone).max() < 1e-5 * np.abs(alone).max()


def test_images_of_another_size_are_refused_in_a_sentence_that_names_the_field():
    tower = tiny_model(
        with_tower(dataclasses.replace(CLIP, image_size=96, low_image_size=64))
    ).vision
    shapes = [jax.eval_shape(lambda x: tower(x).tokens, images(1, size)).shape for size in (64, 96)]
    assert shapes == [(1, 4, 256), (1, 9, 256)]
    sizes = (
        r"\(32, 32, 3\), expected \(96, 96, 3\) from ResNetConfig.image_size "
        r"or \(64, 64, 3\) from low_image_size"
    )
    with pytest.raises(ValueError, match=sizes):
        tower(images(1, 32))


def test_the_encoder_of_magma_has_its_published_sizes():
    """136.2 million parameters without the pool, and 12 x 12 tokens of 3072 numbers."""
    specs = {
        name: spec
        for name, spec in model_specs(with_tower(RN50X16)).items()
        if name.startswith("vision.")
    }
    sizes = {name: math.prod(spec.shape) for name, spec in specs.items()}
    assert sum(size for name, size in sizes.items() if not name.endswith(STATISTICS)) == 136_202_640
    pixels = jnp.zeros((2, 384, 384, 3), jnp.uint8)
    tokens = nnx.eval_shape(
        lambda: mammut.MaMMUT(with_tower(RN50X16), rngs=nnx.Rngs(0)).vision(pixels).tokens
    )
    assert tokens.shape == (2, 144, 3072) == (
        2,
        RN50X16.num_tokens,
        RN50X16.width,
    ) and RN50X16.grid == (12, 12)


@pytest.mark.parametrize(
    "vision",
    [CLIP, NORM_FREE, RN50X16, ResNetConfig(kind="nf", image_size=256)],
    ids=["clip", "nf", "RN50x16", "nf50"],
)
def test_flops_are_those_that_pytorch_counts(vision):
    torch = pytest.importorskip("torch", reason="it counts them")
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        module, size = original(vision), vision.image_size
        module.attnpool = module.head = torch.nn.Identity()
        with FlopCounterMode(display=False) as counter:
            module(torch.zeros(1, 3, size, size))
    assert resnet_flops(vision) == counter.get_total_flops()


def test_flops_of_a_model_are_those_of_its_encoder_and_its_decoder():
    config = with_tower(CLIP)
    to_decoder = 2 * CLIP.num_tokens * CLIP.width * config.text.width
    assert forward_flops(config)["vision"] == resnet_flops(CLIP) + to_decoder


def test_a_model_with_a_resnet_is_saved_loaded_and_looked_into(tmp_path):
    config = with_tower(NORM_FREE)
    model, processor, batch = tiny_model(config), tiny_processor(config), tiny_batch(config)
    mammut.save(tmp_path / "model", model, processor)
    again, _ = mammut.load(tmp_path / "model")
    assert again.config == config
    run = jax.jit(lambda m: m.caption_logits(batch["image"], batch["tokens"]))
    logits, same = run(model), run(again)
    np.testing.assert_array_equal(same, logits)
    assert (
        "a norm-free ResNet, stages of 1, 3, 1, 1 bottlenecks"
        in (tmp_path / "model/README.md").read_text()
    )
    maps = word_maps(again, processor, list(batch["image"][:1]), ["one red circle"])
    assert [word.weights.shape for word in maps[0]] == [(2, 2)] * 3


def test_config_travels_as_json_and_older_files_are_of_a_vit():
    config = with_tower(dataclasses.replace(NORM_FREE, low_image_size=32))
    assert from_dict(ModelConfig, to_dict(config)) == config
    assert from_dict(ModelConfig, {"vision": {"image_size": 96}}).vision == VisionConfig(
        image_size=96
    )
    assert from_dict(ModelConfig, {"vision": {"kind": "nf"}}).vision == ResNetConfig(kind="nf")
    with pytest.raises(ValueError, match=r"vision has depht, which ResNetConfig does not know"):
        from_dict(ModelConfig, {"vision": {**to_dict(CLIP), "depht": 3}})
    with pytest.raises(
        ValueError, match=r"vision holds int, expected an object with the fields of VisionConfig"
    ):
        from_dict(ModelConfig, {"vision": 3})


def test_overrides_name_the_fields_of_either_encoder(capsys):
    vit, resnet = TrainConfig(), TrainConfig(model=ModelConfig(vision=ResNetConfig()))
    for config in (vit, resnet):
        changed = parse_overrides(config, ["--model.vision.image-size", "64"]).model.vision
        assert changed == dataclasses.replace(config.model.vision, image_size=64)
    stages = parse_overrides(
        resnet, ["--model.vision.stages", "1", "2", "1", "1"]
    ).model.vision.stages
    assert stages == (1, 2, 1, 1)
    with pytest.raises(SystemExit):
        parse_overrides(resnet, ["--model.vision.patch-size", "8"])
    assert "model.vision.patch-size" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("patch_drop", 0.5), ("crop_positions", True)])
@BOTH
def test_draws_of_patches_are_refused_by_their_field(vision, name, value):
    message = f"AugmentConfig.{name} is {value}, which a ResNet has no patches for"
    with pytest.raises(ValueError, match=message):
        require_computable(with_tower(vision), ComputeConfig(), AugmentConfig(**{name: value}))
    with pytest.raises(ValueError, match=message):
        TrainConfig(model=with_tower(vision), augment=AugmentConfig(**{name: value}))
    require_computable(with_tower(vision), ComputeConfig())


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("image_size", 100, "image_size 100 is not a multiple of 32"),
        ("image_size", 0, "image_size is 0, expected a positive number"),
        (
            "low_image_size",
            224,
            "low_image_size is 224, expected a multiple of 32 below image_size 224",
        ),
        ("stem_width", 7, "stem_width is 7, expected an even number"),
        ("stages", (3, 4, 0, 3), r"stages is \(3, 4, 0, 3\), expected numbers of bottlenecks"),
        (
            "image_std",
            (1.0, 0.0, 1.0),
            r"ResNetConfig.image_std is \(1.0, 0.0, 1.0\), expected positive numbers",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused(field, value, says):
    with pytest.raises(ValueError, match=says):
        ResNetConfig(**{field: value})
