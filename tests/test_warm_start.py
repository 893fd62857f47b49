"""Warm starts of a model from others.

What each parameter starts from, the rules where sizes differ, and everything that has no rule.
"""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from mammut.config import (
    AdapterConfig,
    DataConfig,
    DecoderConfig,
    MeshConfig,
    ModelConfig,
    TrainConfig,
    VisionConfig,
)
from mammut.core import sharding
from mammut.data.tokenizer import MissingTokenizer
from mammut.models.compute import ComputeConfig
from mammut.models.vit import patchify
from mammut.testing import tiny_config, tiny_model, tiny_processor
from mammut.training.run import Run
from mammut.training.start_report import other_dtype
from mammut.training.step import make_trainer
from mammut.training.tasks import ImageTextTask
from mammut.weights.files.tensor_file import TensorSpec
from mammut.weights.opened import LazyTensors, OpenedModel
from mammut.weights.resample import at_image_size, resample_patches, resample_positions
from mammut.weights.warm_start import start_config, warm_start

CONFIG = tiny_config()
WHOLE = "vision", "text", "rest"


def numbers(
    config: ModelConfig, seed: int = 1, compute: ComputeConfig = ComputeConfig()
) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(tiny_model(config, seed, compute), nnx.Param))
    return {".".join(path): np.asarray(param.get_value()) for path, param in flat}


def opened(
    config: ModelConfig = CONFIG, *, parts: tuple[str, ...] = WHOLE, where: str = "a", **others
) -> OpenedModel:
    """A model to start from, as the readers of files give it."""
    arrays = numbers(config, compute=others.get("compute", ComputeConfig()))
    if parts != WHOLE:
        arrays = {path: value for path, value in arrays.items() if path.split(".")[0] in parts}
    specs = {path: TensorSpec(value.shape, value.dtype) for path, value in arrays.items()}
    return OpenedModel(config, LazyTensors(specs, arrays.__getitem__), None, where, parts, **others)


def vision(**changes) -> ModelConfig:
    return dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, **changes))


def pooled(pooling: str, **changes) -> ModelConfig:
    changed = dataclasses.replace(CONFIG.vision, pooling=pooling, **changes)
    return dataclasses.replace(CONFIG, vision=changed, image_projection="separate")


def text(**changes) -> ModelConfig:
    return dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, **changes))


def fates(warm) -> dict[str, str]:
    return {row.path: row.what for row in warm.rows if row.what != "left out"}


def left_out(warm) -> dict[str, str]:
    return {row.path: row.why for row in warm.rows if row.what == "left out"}


# --- resampling


@pytest.mark.parametrize(
    "old, new", [((7, 7), (14, 14)), ((16, 16), (14, 14)), ((5, 3), (3, 4)), ((1, 1), (3, 3))]
)
def test_positions_are_resampled_as_the_makers_of_each_format_do(old, new):
    torch = pytest.importorskip("torch")
    ndimage = pytest.importorskip("scipy.ndimage")
    table = np.random.default_rng(0).normal(size=(*old, 5))
    bicubic = (
        torch.nn.functional.interpolate(
            torch.tensor(table).permute(2, 0, 1)[None],
            size=new,
            mode="bicubic",
            antialias=True,
            align_corners=False,
        )[0]
        .permute(1, 2, 0)
        .numpy()
    )
    np.testing.assert_allclose(
        resample_positions(table, new, "bicubic"), bicubic, rtol=0, atol=1e-12
    )
    zoomed = ndimage.zoom(table, (new[0] / old[0], new[1] / old[1], 1), order=1)
    np.testing.assert_allclose(
        resample_positions(table, new, "bilinear"), zoomed, rtol=0, atol=1e-12
    )


def test_positions_resampled_by_hand():
    """Compare resampled positions with values computed by hand.

    Bilinear between corners, and Keys' cubic (a = -0.5) of twice the width where the grid is
    halved.
    """
    ramp = np.array([0, 4.0])[:, None, None] * np.ones((1, 2, 1))
    assert resample_positions(ramp, (3, 2), "bilinear")[:, 0, 0].tolist() == [0, 2, 4]
    # centres 0.5 to 3.5; those of two positions are 1 and 3
    row = np.array([1, 7, 0, 8.0])[None, :, None]

    def near(x):
        return 1.5 * x**3 - 2.5 * x**2 + 1

    weights = np.array(
        [near(0.25), near(0.25), near(0.75), -0.5 * 1.25**3 + 2.5 * 1.25**2 - 4 * 1.25 + 2]
    )
    expected = weights @ [1, 7, 0, 8] / weights.sum()
    assert resample_positions(row, (1, 2), "bicubic")[0, 0, 0] == pytest.approx(expected, abs=1e-12)


def test_an_enlarged_image_has_the_tokens_it_had_before():
    rng = np.random.default_rng(0)
    image, kernel = rng.normal(size=(1, 24, 24, 3)), rng.normal(size=(8 * 8 * 3, 6))
    old = patchify(jnp.asarray(image, jnp.float32), 8) @ kernel
    # Patch by patch: resized as a whole, a patch's edge would see its neighbours.
    patches = np.asarray(patchify(jnp.asarray(image, jnp.float32), 8)).reshape(9, 8, 8, 3)
    enlarged = jax.image.resize(patches, (9, 13, 13, 3), "linear").reshape(9, -1)
    np.testing.assert_allclose(
        enlarged @ resample_patches(kernel, 8, 13), old[0], rtol=0, atol=1e-4
    )


def test_a_reduced_kernel_is_the_least_squares_one_over_white_noise():
    kernel = np.random.default_rng(0).normal(size=(6 * 6 * 3, 2))
    basis = np.eye(36).reshape(36, 6, 6, 1)
    reduce = np.asarray(jax.image.resize(basis, (36, 4, 4, 1), "linear", antialias=False)).reshape(
        36, 16
    )
    expected = np.linalg.lstsq(reduce, kernel.reshape(36, -1), rcond=None)[0].reshape(4 * 4 * 3, 2)
    np.testing.assert_allclose(resample_patches(kernel, 6, 4), expected, rtol=0, atol=1e-5)


# --- a whole model


def test_a_model_of_the_same_sizes_is_loaded_bit_for_bit():
    warm = warm_start(CONFIG, {"init": opened()})
    expected = numbers(CONFIG)
    assert set(fates(warm).values()) == {"loaded"} and not warm.random and not left_out(warm)
    assert fates(warm).keys() == expected.keys()
    for path, value in expected.items():
        assert warm.read(path).tobytes() == value.tobytes(), path


@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
def test_another_resolution_resamples_the_grid_alone_and_keeps_the_position_of_the_class_token(
    method,
):
    old, new = (vision(class_token=True, image_size=size) for size in (16, 40))
    warm = warm_start(new, {"init": opened(old, positions=method)})
    expected = numbers(old)
    assert {path for path, what in fates(warm).items() if what != "loaded"} == {"vision.pos_embed"}
    resampled = resample_positions(expected["vision.pos_embed"], (5, 5), method)
    np.testing.assert_array_equal(warm.read("vision.pos_embed"), resampled)
    np.testing.assert_array_equal(
        warm.read("vision.class_pos_embed"), expected["vision.class_pos_embed"]
    )
    assert f"2 x 2 -> 5 x 5, {method}" in str(warm)


def test_another_patch_size_resizes_the_kernel_and_the_grid():
    warm = warm_start(vision(patch_size=4), {"init": opened()})
    assert {path for path, what in fates(warm).items() if what == "resampled"} == {
        "vision.pos_embed", "vision.patch_embed.kernel"
    }  # fmt: skip
    kernel = resample_patches(numbers(CONFIG)["vision.patch_embed.kernel"], 8, 4)
    np.testing.assert_array_equal(warm.read("vision.patch_embed.kernel"), kernel)
    assert kernel.shape == (48, 32) and warm.read("vision.pos_embed").shape == (4, 4, 32)
    # The same grid with larger patches leaves the positions as they are.
    warm = warm_start(vision(patch_size=16, image_size=32), {"init": opened()})
    assert (
        fates(warm)["vision.pos_embed"] == "loaded"
        and fates(warm)["vision.patch_embed.kernel"] == "resampled"
    )


def test_a_shorter_text_keeps_the_first_positions_and_that_of_the_class_token():
    classed = {"pooling": "class"}
    warm = warm_start(text(max_length=5, **classed), {"init": opened(text(**classed))})
    table = numbers(text(**classed))["text.pos_embed"]
    assert table.shape == (13, 48) and fates(warm)["text.pos_embed"] == "cut" and not warm.random
    np.testing.assert_array_equal(warm.read("text.pos_embed"), table[[0, 1, 2, 3, 4, 12]])


def test_a_longer_text_has_random_positions_at_its_end_and_says_so():
    classed = {"pooling": "class"}
    warm = warm_start(text(max_length=20, **classed), {"init": opened(text(**classed))})
    table = numbers(text(**classed))["text.pos_embed"]
    assert warm.random == {"text.pos_embed"} and fates(warm)["text.pos_embed"] == "in part"
    drawn = np.random.default_rng(0).normal(size=(21, 48)).astype(np.float32)
    expected = np.concatenate([table[:12], drawn[12:20], table[12:]])
    np.testing.assert_array_equal(warm.read("text.pos_embed", drawn), expected)
    assert "12 of 20 positions, the others random" in str(warm)


def test_rotary_positions_take_any_length():
    warm = warm_start(
        text(max_length=20, positions="rope"), {"init": opened(text(positions="rope"))}
    )
    assert set(fates(warm).values()) == {"loaded"}


def test_another_vocabulary_leaves_the_embedding_and_the_head_random():
    own = {"tie_embeddings": False, "vocab_bias": True}
    warm = warm_start(
        text(vocab_size=50, **own), {"init": opened(text(**own))}, new_vocabulary=True
    )
    vocabulary = {"text.token_embed.embedding", "text.vocab_head.kernel", "text.vocab_head_bias"}
    assert warm.random == vocabulary and left_out(warm) == dict.fromkeys(
        vocabulary, "another vocabulary"
    )
    # A new vocabulary of the same size has other tokens all the same.
    assert (
        warm_start(text(**own), {"init": opened(text(**own))}, new_vocabulary=True).random
        == vocabulary
    )


def test_numbers_of_another_type_are_rounded_and_the_table_says_so():
    compute = ComputeConfig(param_dtype="bfloat16")
    warm = warm_start(CONFIG, {"init": opened()}, compute=compute)
    value, scale = warm.read("text.norm.scale"), warm.read("logit_scale")
    assert value.dtype == ml_dtypes.bfloat16 and scale.dtype == np.float32
    np.testing.assert_array_equal(
        value, numbers(CONFIG)["text.norm.scale"].astype(ml_dtypes.bfloat16)
    )
    assert re.search(r"text.norm +96  loaded    init a, float32 -> bfloat16", str(warm))


@pytest.mark.parametrize("config, message", [
    (vision(depth=3), "model.vision.depth is 3, it was 2"),
    (vision(activation="gelu"), "model.vision.activation is gelu, it was gelu_tanh"),
    (vision(pooling="mean_all"), "model.vision.pooling is mean_all, it was mean"),
    (text(vocab_size=50), "model.text.vocab_size is 50, it was 60"),
    (text(positions="rope", norm_eps=1e-5),
     "model.text.norm_eps is 1e-05, it was 1e-06; model.text.positions is rope"),
    (dataclasses.replace(CONFIG, text_projection=True),
     "model.text_projection is True, it was False"),
])  # fmt: skip
def test_what_has_no_rule_is_refused_by_name(config, message):
    with pytest.raises(
        ValueError, match="the model to start from, init a, is another one: "
    ) as error:
        warm_start(config, {"init": opened()})
    assert message in str(error.value)


def test_adapters_of_the_run_start_random_on_a_model_without_and_the_rest_is_loaded():
    asked = dataclasses.replace(
        vision(depth=1), adapters=(AdapterConfig(), AdapterConfig("low", "lora", ("*.query",)))
    )
    starts = {"init": opened()}
    config = start_config(asked, starts)
    assert config == dataclasses.replace(CONFIG, adapters=asked.adapters)
    warm = warm_start(config, starts)
    expected = numbers(CONFIG)
    assert {path for path, what in fates(warm).items() if what == "loaded"} == set(
        expected
    ) and not left_out(warm)
    assert warm.random == numbers(config).keys() - set(expected)
    assert warm.random and {path.split(".")[0] for path in warm.random} == {"adapters"}
    for path, value in expected.items():
        np.testing.assert_array_equal(warm.read(path), value)
    drawn = np.ones(3)
    assert all(warm.read(path, drawn) is drawn for path in warm.random)
    assert re.search(r"adapters.default +\d[\d,]*  random    a new adapter", str(warm))


def test_adapters_of_the_model_it_starts_from_are_its_own():
    own = dataclasses.replace(CONFIG, adapters=(AdapterConfig(),))
    starts = {"init": opened(own)}
    assert start_config(CONFIG, starts) == own
    warm = warm_start(own, starts)
    assert not warm.random and set(fates(warm).values()) == {"loaded"}


# --- towers


def test_a_lone_image_encoder_starts_the_tower_and_nothing_else():
    """The tower brings its architecture; the recipe says how it is pooled."""
    encoder = dataclasses.replace(
        CONFIG,
        vision=VisionConfig(
            image_size=24,
            patch_size=8,
            width=40,
            depth=3,
            num_heads=4,
            mlp_dim=56,
            class_token=True,
            pooling="class",
            input_norm=True,
            image_mean=(0.1, 0.2, 0.3),
        ),
        image_projection="separate",
    )
    starts = {"init_vision": opened(encoder, parts=("vision",), where="vit.npz")}
    config = start_config(CONFIG, starts)
    assert (
        config.vision == dataclasses.replace(encoder.vision, pooling="mean")
        and config.text == CONFIG.text
    )
    warm = warm_start(config, starts)
    assert {path for path, what in fates(warm).items() if what == "loaded"} == set(
        starts["init_vision"].tensors.specs
    )
    assert warm.random == {
        path for path in fates(warm) if not path.startswith("vision.")
    } and not left_out(warm)
    larger = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=32))
    assert warm_start(larger, starts).read("vision.pos_embed").shape == (4, 4, 40)
    narrower = dataclasses.replace(config, vision=dataclasses.replace(config.vision, width=32))
    with pytest.raises(
        ValueError, match="init_vision vit.npz, is another one: model.vision.width is 32, it was 40"
    ):
        warm_start(narrower, starts)


@pytest.mark.parametrize("there, here, random", [
    ("map", "mean", []),
    ("mean", "map", ["vision.pool"]),
    ("map", "map", []),
    ("queries", "map", ["vision.norm", "vision.pool"]),
    ("mean", "queries", ["vision.norm", "vision.pool"]),
    ("queries", "queries", []),
])  # fmt: skip
def test_a_pool_goes_along_where_the_image_is_pooled_the_same_way(there, here, random):
    """The norm is of the image's tokens, or of the queries that stand for them."""
    source, target = (pooled(pooling, pool_queries=5) for pooling in (there, here))
    starts = {"init_vision": opened(source)}
    assert start_config(target, starts) == target
    warm = warm_start(target, starts)
    found = {".".join(path.split(".")[:2]) for path in warm.random if path.startswith("vision.")}
    assert sorted(found) == random
    dropped = {path: why for path, why in left_out(warm).items() if path.startswith("vision.")}
    assert bool(dropped) == (there != here and there != "mean" or here == "queries" != there)
    assert all(why == f"pooling is {here!r}, there {there!r}" for why in dropped.values())
    assert {why for path, why in left_out(warm).items() if path not in dropped} == {
        "of no image encoder"
    }


def test_a_pool_of_other_sizes_is_refused():
    configs = [pooled("queries", pool_queries=n, pool_heads=heads) for n, heads in ((5, 8), (9, 4))]
    with pytest.raises(ValueError) as error:
        warm_start(configs[1], {"init_vision": opened(configs[0])})
    message = str(error.value)
    assert (
        "vision.pool.query is [9, 48], in init_vision a [5, 48]" in message
        and "model.vision.pool_*" in message
    )
    assert "vision.pool.attn.query.kernel is [48, 4, 12], in init_vision a [48, 8, 6]" in message


def test_a_lone_text_decoder_starts_the_decoder_with_its_vocabulary():
    decoder = dataclasses.replace(
        CONFIG,
        text=DecoderConfig(vocab_size=70, max_length=9, width=64, depth=2, num_heads=4, mlp_dim=72),
    )
    starts = {"init_text": opened(decoder, where="cap")}
    config = start_config(CONFIG, starts)
    assert config.text == decoder.text and config.vision == CONFIG.vision
    warm = warm_start(config, starts)
    assert {path for path, what in fates(warm).items() if what == "loaded"} == {
        path for path in numbers(decoder) if path.startswith("text.")
    }
    assert set(left_out(warm).values()) == {"of no text decoder"}
    assert warm.random == {path for path in fates(warm) if not path.startswith("text.")}


def test_a_tower_takes_the_place_of_that_of_a_whole_model():
    starts = {
        "init": opened(where="whole"),
        "init_vision": opened(vision(depth=1, patch_size=4), where="tower"),
    }
    config = start_config(CONFIG, starts)
    assert config == vision(depth=1, patch_size=4)
    warm = warm_start(config, starts)
    sources = {row.path: row.source for row in warm.rows if row.what == "loaded"}
    assert all(source == ("init_vision tower" if path.startswith("vision.") else "init whole")
               for path, source in sources.items())  # fmt: skip
    assert not warm.random and warm.read("image_projection.kernel").shape == (32, 48)
    assert set(left_out(warm).values()) == {"of no image encoder", "init_vision takes its place"}


def test_a_tower_that_does_not_fit_the_whole_model_is_refused():
    starts = {"init": opened(where="whole"), "init_vision": opened(vision(width=64), where="tower")}
    with pytest.raises(ValueError) as error:
        warm_start(start_config(CONFIG, starts), starts)
    assert "image_projection.kernel is [64, 48], in init whole [32, 48]" in str(error.value)
    assert "model.vision.width" in str(error.value)


@pytest.mark.parametrize("name, parts, missing", [
    ("init", ("vision",), "rest and text"),
    ("init_text", ("vision",), "text"),
    ("init_vision", ("text",), "vision"),
])  # fmt: skip
def test_a_start_without_the_part_that_is_asked_of_it_is_refused(name, parts, missing):
    with pytest.raises(
        ValueError, match=f"{name} a holds {parts[0]} alone, expected {missing} as well"
    ):
        start_config(CONFIG, {name: opened(parts=parts)})


def test_a_damaged_start_is_never_filled_with_random_numbers():
    start = opened()
    specs = dict(start.tensors.specs)
    del specs["text.norm.scale"]
    specs["text.norm.gain"] = TensorSpec((48,), np.dtype(np.float32))
    with pytest.raises(
        ValueError, match="text.norm.scale is not in init a; text.norm.gain of init a has no place"
    ):
        warm_start(
            CONFIG,
            {"init": dataclasses.replace(start, tensors=LazyTensors(specs, start.tensors.read))},
        )


# --- the table


def test_the_table_accounts_for_every_number():
    starts = {"init_vision": opened(pooled("map"), where="vit.npz", positions="bilinear")}
    config = vision(image_size=24)
    warm = warm_start(config, starts)
    printed = str(warm)
    lines = printed.splitlines()
    assert lines[0].split() == ["warm", "start", "numbers"]
    assert (
        f"{'vision.pos_embed':<34}{9 * 32:>14,}  resampled init_vision vit.npz, 2 x 2 -> 3 x 3, "
        f"bilinear" in lines
    )
    assert (
        f"{'vision.patch_embed':<34}{(192 + 1) * 32:>14,}  loaded    init_vision vit.npz" in lines
    )
    assert f"{'text.token_embed':<34}{60 * 48:>14,}  random    no start has this part" in lines
    left_out = r"vision.pool .* left out  init_vision vit.npz, pooling is 'mean', there 'map'"
    assert any(re.fullmatch(left_out, line) for line in lines)
    counts = {"model": 0, "left out": 0}
    for line in lines[1:]:
        _, count, what = re.fullmatch(r"(\S+) +([\d,]+)  (left out|\w+).*", line).groups()
        counts[what if what == "left out" else "model"] += int(count.replace(",", ""))
    total = sum(value.size for value in numbers(config).values())
    assert counts["model"] == total
    in_source = sum(value.size for value in numbers(pooled("map")).values())
    # of a grid of 9, not 4
    used = sum(row.count for row in warm.rows if row.what in ("loaded", "resampled")) - 5 * 32
    assert counts["left out"] + used == in_source


# --- on the devices


def test_parameters_go_to_their_places_and_random_ones_are_those_of_the_seed():
    config = TrainConfig(model=text(max_length=20), data=DataConfig(batch_size=8), steps=10)
    warm = warm_start(config.model, {"init_text": opened()})
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, model=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        trainer = make_trainer(config, ImageTextTask(config.loss), mesh)
        state = trainer.init_from(trainer.start_params(3, warm.random, warm.read))
        fresh = trainer.init(3)
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(
        lambda x: x.sharding, trainer.abstract_state
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, state.opt_state, fresh.opt_state))
    expected = numbers(CONFIG)
    for path, value in nnx.traversals.flatten_mapping(state.params, sep=".").items():
        random = nnx.traversals.flatten_mapping(fresh.params, sep=".")[path]
        if path == "text.pos_embed":
            np.testing.assert_array_equal(value, np.concatenate([expected[path], random[12:]]))
        else:
            np.testing.assert_array_equal(
                value, expected[path] if path.startswith("text.") else random
            )


# --- another resolution


def test_a_model_at_another_image_size_has_that_grid_and_processor():
    small = dataclasses.replace(opened(), processor=tiny_processor())
    large = at_image_size(small, 32)
    assert large.config == vision(image_size=32) and large.processor.image.image_size == 32
    assert (
        small.processor.image.image_size == 16
        and large.processor.tokenizer is small.processor.tokenizer
    )
    expected = resample_positions(numbers(CONFIG)["vision.pos_embed"], (4, 4), "bicubic")
    np.testing.assert_array_equal(large.tensors.read("vision.pos_embed"), expected)
    shapes = {path: value.shape for path, value in numbers(large.config).items()}
    assert {path: spec.shape for path, spec in large.tensors.specs.items()} == shapes
    same = at_image_size(small, 16)
    assert same.config == CONFIG and np.array_equal(
        same.tensors.read("logit_scale"), small.tensors.read("logit_scale")
    )
    with pytest.raises(
        ValueError, match="VisionConfig.image_size 20 is not a multiple of patch_size 8"
    ):
        at_image_size(small, 20)


def test_a_run_says_how_the_model_it_starts_from_is_computed():
    """The model to start from has a say in the architecture alone, not in the number types."""
    theirs = ComputeConfig(dtype="bfloat16", param_dtype="bfloat16", unroll=3)
    starts = {"init": opened(compute=theirs)}
    started = start_config(vision(depth=1), starts)
    assert started == CONFIG
    stored = numbers(CONFIG, compute=theirs)
    assert {str(value.dtype) for value in stored.values()} == {"bfloat16", "float32"}
    warm = warm_start(started, starts, compute=ComputeConfig(dtype="bfloat16", remat="full"))
    assert set(fates(warm).values()) == {"loaded"}
    for path, value in stored.items():
        read = warm.read(path)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, value.astype(np.float32), err_msg=path)
    types = ComputeConfig(text_param_dtype="bfloat16")
    warm = warm_start(started, starts, compute=types)
    of_text = {str(warm.read(path).dtype) for path in stored if path.startswith("text.")}
    others = {str(warm.read(path).dtype) for path in stored if not path.startswith("text.")}
    assert (of_text, others) == ({"bfloat16"}, {"float32"})


def test_a_run_in_another_type_than_the_model_it_starts_from_says_so():
    start = opened(compute=ComputeConfig(dtype="bfloat16"))

    def line(dtype: str, name: str = "init") -> list[str]:
        config = TrainConfig(model=CONFIG, compute=ComputeConfig(dtype=dtype))
        return other_dtype(Run(config, pathlib.Path("run"), [], {name: start}))

    told = f"init {start.where} is computed in bfloat16, this run in float32: --compute.dtype"
    assert line("float32") == [told]
    assert line("bfloat16") == line("float32", "init_text") == []


def test_a_vocabulary_for_a_model_that_came_without_has_its_special_ids():
    missing = MissingTokenizer((1, 2, None), 60, "nothing")
    tokenizer = tiny_processor().tokenizer  # start 1, end 2, pad 0
    missing.require_same_ids(tokenizer)
    with pytest.raises(ValueError, match="has the end id 2, the model was trained with 7"):
        MissingTokenizer((1, 7, 0), 60, "nothing").require_same_ids(tokenizer)
