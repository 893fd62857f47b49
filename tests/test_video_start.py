"""Video models that start from image models, and as files."""

import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_video_model import OF_FRAMES, OF_IMAGES, OF_TUBES, VIDEO, encode, with_video
from test_warm_start import fates, opened

import mammut
from mammut.config import AdapterConfig, ModelConfig, TubeConfig, VideoConfig, from_dict, to_dict
from mammut.models.layers import unit
from mammut.models.mammut import MaMMUT
from mammut.models.vit import patchify
from mammut.testing import tiny_batch, tiny_model, tiny_processor
from mammut.training.command_line import load_recipe
from mammut.weights.adapter_folder import base_hash
from mammut.weights.opened import LazyTensors
from mammut.weights.resample import inflate_patches, resample_patches
from mammut.weights.warm_start import start_config, warm_start


def started(config: ModelConfig, image_config: ModelConfig = OF_IMAGES) -> MaMMUT:
    """A model of `config` that starts from a tiny model of images."""
    warm = warm_start(config, {"init": opened(image_config)})
    model = tiny_model(config, seed=5)
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = ".".join(map(str, path))
        module = functools.reduce(getattr, path, model)
        module.set_value(jnp.asarray(warm.read(name, param.get_value())))
    return model


@functools.partial(jax.jit, static_argnames="graphdef")
def _logits(graphdef, params, tokens, image_tokens):
    text = nnx.merge(graphdef, params)
    valid = jnp.ones(tokens.shape, bool)
    return text.logits(text.caption_pass(tokens, valid, image_tokens))


def answers(model: MaMMUT, image):
    """The embedding and the logits of captions; the text decoder is compiled once."""
    encoded = encode(model, image)
    graphdef, params = nnx.split(model.text)
    return unit(encoded.vector), _logits(graphdef, params, TOKENS, encoded.tokens)


TOKENS = tiny_batch(batch_size=2)["tokens"]


@pytest.mark.parametrize(("frames", "height", "width"), [(8, 8, 8), (16, 4, 4), (4, 12, 12), (2, 3, 5)])  # fmt: skip # noqa: E501
def test_a_still_window_has_the_token_of_the_enlarged_patch(frames, height, width):
    rng = np.random.default_rng(0)
    kernel, window = rng.normal(size=(16 * 16 * 3, 7)), rng.normal(size=(height, width, 3))
    tube = inflate_patches(kernel, 16, (frames, height, width))
    enlarged = jax.image.resize(window, (16, 16, 3), "linear", antialias=False)
    token = np.broadcast_to(window, (frames, *window.shape)).reshape(-1) @ tube
    np.testing.assert_allclose(token, np.asarray(enlarged).reshape(-1) @ kernel, atol=1e-4)
    np.testing.assert_allclose(tube.sum(0), kernel.sum(0), atol=1e-9)


@pytest.mark.parametrize("config", [OF_TUBES, OF_FRAMES], ids=["tubes", "frames"])
def test_a_video_model_starts_as_the_image_model(config):
    """By embedding and logits of videos of one frame, which are its images."""
    expected = answers(tiny_model(OF_IMAGES, seed=1), VIDEO[:, 0])
    for found, want in zip(answers(started(config), VIDEO[:, :1]), expected):
        np.testing.assert_array_equal(found, want)


def test_the_table_tells_what_tubes_gate_and_frames_start_from():
    joined = TubeConfig((2, 8, 8), (4, 8, 8), join=(2, 1, 1))
    tubes = (*OF_TUBES.vision.video.tubes[:1], joined)
    config = with_video(VideoConfig(tubes=tubes))
    warm = warm_start(config, {"init": opened()})
    prefix = "vision.video_embed"
    assert {path: what for path, what in fates(warm).items() if what != "loaded"} == {
        f"{prefix}.tubes.0.kernel": "inflated", f"{prefix}.tubes.0.bias": "inflated",
        f"{prefix}.tubes.1.kernel": "random", f"{prefix}.tubes.1.bias": "random",
        f"{prefix}.gate": "zero",
    }  # fmt: skip
    assert warm.random == {f"{prefix}.tubes.1.kernel", f"{prefix}.tubes.1.bias"}
    table = re.sub(" +", " ", str(warm))
    assert f"{prefix} 3,072 inflated init a, kernel of the patches, 8 x 8 -> 2 x 4 x 4" in table
    assert f"{prefix} 32 inflated init a, bias of the patches" in table
    assert f"{prefix} 1 zero init a, no fixed code at first" in table
    assert f"{prefix} 6,160 random init a, 2 tubes are joined to a token" in table
    warm = warm_start(OF_FRAMES, {"init": opened()})
    assert fates(warm)["frame_embed"] == "zero" and not warm.random
    assert not warm.read("frame_embed").any() and warm.read("frame_embed").shape == (4, 48)


def test_tubes_start_from_patches_of_another_size_as_the_patches_do():
    finer = with_video(VideoConfig(tubes=OF_TUBES.vision.video.tubes), patch_size=4)
    start = opened()
    warm = warm_start(finer, {"init": start})
    kernel = resample_patches(start.tensors.read("vision.patch_embed.kernel"), 8, 4)
    expected = inflate_patches(kernel, 4, (2, 4, 4))
    np.testing.assert_array_equal(warm.read("vision.video_embed.tubes.0.kernel"), expected)
    # The tube's window of 4 x 4 is a patch.
    patch = np.random.default_rng(0).normal(size=(1, 4, 4, 3)).astype(np.float32)
    token = np.asarray(patchify(patch, 4))[0, 0]
    np.testing.assert_allclose(np.tile(token, 2) @ expected, token @ kernel, atol=1e-5)


def test_a_run_brings_its_videos_and_a_video_model_its_own():
    other = dataclasses.replace(OF_TUBES.vision.video, tubes=())
    asked = with_video(other)
    assert start_config(OF_TUBES, {"init": opened()}) == OF_TUBES
    assert start_config(OF_IMAGES, {"init": opened(OF_TUBES)}) == OF_TUBES
    assert start_config(asked, {"init": opened(OF_TUBES)}) == OF_TUBES
    encoder = opened(parts=("vision",))
    assert start_config(OF_TUBES, {"init_vision": encoder}).vision.video == OF_TUBES.vision.video
    assert set(fates(warm_start(OF_TUBES, {"init": opened(OF_TUBES)})).values()) == {"loaded"}
    with pytest.raises(ValueError, match=r"model.vision.video.tubes is \(\), it was \(\{"):
        warm_start(asked, {"init": opened(OF_TUBES)})
    longer = dataclasses.replace(OF_TUBES.vision.video, frames=16, patch_stride=8)
    assert not warm_start(with_video(longer), {"init": opened(OF_TUBES)}).random


@pytest.mark.parametrize("name", ["init", "init_vision"])
def test_a_plain_code_is_no_start_from_images(name):
    """It would change what the model sees of an image, which the gate does not."""
    plain, start = with_video(VideoConfig(fixed_code="plain")), {name: opened()}
    message = rf"VideoConfig.fixed_code is 'plain', .* {name} a sees of .*: expected 'gated'"
    with pytest.raises(ValueError, match=message):
        warm_start(plain, start)
    assert set(fates(warm_start(plain, {"init": opened(plain)})).values()) == {"loaded"}


@pytest.mark.parametrize("frames", [3, 6])
def test_vectors_of_other_numbers_of_frames_start_as_the_first_ones(frames):
    """So an image, a video of one frame, stays what it was."""
    video = dataclasses.replace(OF_FRAMES.vision.video, frames=frames)
    start = opened(OF_FRAMES)
    vectors = np.repeat(np.arange(1, 5, dtype=np.float32)[:, None], 48, axis=1)
    tensors = LazyTensors(start.tensors.specs, {"frame_embed": vectors}.__getitem__)
    start = dataclasses.replace(start, tensors=tensors)
    warm = warm_start(with_video(video), {"init": start})
    read = warm.read("frame_embed", np.full((frames, 48), 7.0))
    np.testing.assert_array_equal(read[:, 0], [1, 2, 3, 4, 0, 0][:frames])
    assert read.shape == (frames, 48)
    said = {
        3: "frame_embed 144 cut init a, the first 3 of 4 frames",
        6: "frame_embed 288 in part init a, 4 of 6 frames, the others zero",
    }
    assert said[frames] in re.sub(" +", " ", str(warm))


RECIPE = pathlib.Path(__file__).parents[1] / "configs" / "video_folder.py"


@pytest.mark.parametrize("mode", ["frames", "tubes"])
def test_the_recipe_of_ones_own_videos_starts_from_an_image_model(tmp_path, mode):
    """As it is, and with the tubes that its docstring offers in place of its line."""
    source = RECIPE.read_text()
    if mode == "tubes":
        (line,) = re.findall(r"`(video=VideoConfig\(.*\))`", source)
        (imports,) = re.findall(r"`(from mammut.* import paper_tubes)`", source)
        source = re.sub(r"( +)video=VideoConfig\(mode=.*\),", rf"\g<1>{line},", source)
        source = source.replace("FRAMES = 8", f"{imports}\n\nFRAMES = 16")
    (tmp_path / "recipe.py").write_text(source)
    config = load_recipe(tmp_path / "recipe.py")
    video = config.model.vision.video
    assert (video.mode, len(video.tubes)) == (mode, 3 if mode == "tubes" else 0)
    assert config.data.frames == video.frames == (16 if mode == "tubes" else 8)
    image_model = opened(OF_IMAGES)
    model = start_config(config.model, {"init": image_model})
    assert model.vision == dataclasses.replace(OF_IMAGES.vision, video=video)
    assert not warm_start(model, {"init": image_model}).random


# Files


@pytest.mark.parametrize("config", [OF_TUBES, OF_FRAMES], ids=["tubes", "frames"])
def test_a_folder_of_a_video_model_is_read_as_it_was_written(tmp_path, config):
    model = tiny_model(config)
    mammut.save(tmp_path / "model", model, tiny_processor())
    loaded, _ = mammut.load(tmp_path / "model")
    assert loaded.config == config
    for one, other in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, loaded)), strict=True):
        np.testing.assert_array_equal(one, other)
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"| video | {config.vision.video.summary} |" in card


def test_configs_of_videos_are_json_and_back():
    for config in (OF_TUBES, OF_FRAMES, OF_IMAGES):
        values = json.loads(json.dumps(to_dict(config)))
        assert from_dict(ModelConfig, values) == config
    del values["vision"]["video"]  # as older versions wrote it
    assert from_dict(ModelConfig, values) == OF_IMAGES
    for bad in ("tubes", {"mode": "tubes", "tubes": [{"size": [1, 2]}]}, {"frames": "8"}):
        values["vision"]["video"] = bad
        with pytest.raises(ValueError, match="config: vision"):
            from_dict(ModelConfig, values)


def test_an_adapter_belongs_to_a_base_with_its_videos(tmp_path):
    hashes = {base_hash(config) for config in (OF_TUBES, OF_FRAMES, OF_IMAGES)}
    assert len(hashes) == 3
    model = tiny_model(dataclasses.replace(OF_TUBES, adapters=(AdapterConfig(),)))
    mammut.save_adapter(tmp_path / "adapter", model, "default")
    mammut.load_adapter(tiny_model(OF_TUBES), tmp_path / "adapter")
    with pytest.raises(ValueError, match="adapter"):
        mammut.load_adapter(tiny_model(OF_IMAGES), tmp_path / "adapter")
