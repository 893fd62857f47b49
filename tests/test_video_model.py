"""Videos in the model: which tokens there are and where, an image as a video of one frame."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mammut import presets
from mammut.config import (
    AugmentConfig,
    ComputeConfig,
    DataConfig,
    DecoderConfig,
    MeshConfig,
    ModelConfig,
    ResNetConfig,
    TrainConfig,
    TubeConfig,
    VideoConfig,
    VisionConfig,
)
from mammut.core import sharding
from mammut.core.params import by_name
from mammut.models.compute import Augment, Dtypes, require_computable
from mammut.models.flops import forward_flops
from mammut.models.layers import initialise, unit
from mammut.models.mammut import MaMMUT
from mammut.models.video import (
    count_patches,
    count_tokens,
    paper_tubes,
    token_centres,
    token_kinds,
)
from mammut.models.video_embed import VideoEmbed, cut_tubes, fixed_code, join_tubes
from mammut.performance.compile_report import compile_report
from mammut.performance.hlo import Program
from mammut.testing import tiny_batch, tiny_config, tiny_model
from mammut.training.optimizer import make_optimizer
from mammut.training.start_report import untrained_towers
from mammut.training.step import TrainState, make_trainer
from mammut.training.tasks import ImageTextTask

FRAMES = 8
TUBES = paper_tubes(FRAMES, patch_size=8)
PAPER = VisionConfig(video=VideoConfig(tubes=paper_tubes()))
KEY = jax.random.key(0)


def with_video(video: VideoConfig | None, config: ModelConfig | None = None, **vision):
    config = config or tiny_config()
    return dataclasses.replace(
        config, vision=dataclasses.replace(config.vision, video=video, **vision)
    )


# Of 8 frames: 4 patches of frames 0 and 4, and two tubes of each kind.
OF_TUBES = with_video(VideoConfig(frames=FRAMES, patch_stride=4, tubes=TUBES))
OF_FRAMES = with_video(VideoConfig("frames", frames=4, frame_embed=True))
# The image's patches of every second frame, and no tubes.
OF_PATCHES = with_video(VideoConfig(frames=4, patch_stride=2))
OF_IMAGES = tiny_config()
VIDEO = tiny_batch(OF_IMAGES, batch_size=2, frames=FRAMES)["image"]


@functools.partial(jax.jit, static_argnames="graphdef")
def _image_tokens(graphdef, params, image):
    return nnx.merge(graphdef, params).image_tokens(image)


def encode(model: MaMMUT, image):
    graphdef, params = nnx.split(model)
    return _image_tokens(graphdef, params, image)


def gated(config: ModelConfig, gate: float) -> MaMMUT:
    model = tiny_model(config)
    model.vision.video_embed.gate[...] = jnp.float32(gate)
    return model


# Which tokens, and where


@pytest.mark.parametrize(
    ("frames", "patches", "tubes"),
    [
        (32, 196, (98, 147, 98)),
        (64, 392, (196, 392, 196)),
        (20, 196, (49, 49, 98)),
        (16, 196, (49, 0, 49)),
        (8, 196, (49, 0, 49)),
        (4, 196, (0, 0, 49)),
        (2, 196, (0, 0, 0)),
        (1, 196, (0, 0, 0)),
        (96, 588, (294, 637, 294)),
    ],
)
def test_the_table_of_the_paper_has_so_many_tokens(frames, patches, tubes):
    """With 32 frames 539, which the paper calls 559."""
    counts = [math.prod(kind.counts(frames, 224)) for kind in token_kinds(PAPER)]
    assert counts == [patches, *tubes]
    assert count_patches(PAPER, frames) == count_tokens(PAPER, frames) == patches + sum(tubes)
    assert token_centres(PAPER, frames).shape == (patches + sum(tubes), 3)


def test_tubes_are_where_the_paper_has_them():
    t, y, x = zip(*(kind.centres(32, 224) for kind in token_kinds(PAPER)))
    assert [list(row) for row in t] == [[0], [3.5, 19.5], [11.5, 17.5, 23.5], [1.5, 17.5]]
    firsts = [[7.5, 23.5], [3.5, 35.5], [9.5, 41.5], [21.5, 53.5]]
    assert [list(row[:2]) for row in y] == [list(row[:2]) for row in x] == firsts
    # In the order of the tokens: patches, then the kinds; times, rows, columns.
    where = token_centres(PAPER, 32)
    np.testing.assert_array_equal(where[[0, 1, 14, 196, 197, 203, 245, 294]], [
        [0, 7.5, 7.5], [0, 7.5, 23.5], [0, 23.5, 7.5],
        [3.5, 3.5, 3.5], [3.5, 3.5, 35.5], [3.5, 35.5, 3.5], [19.5, 3.5, 3.5], [11.5, 9.5, 9.5],
    ])  # fmt: skip


def test_the_table_is_scaled_to_other_frames_and_patches():
    tubes = paper_tubes(frames=16, patch_size=8)
    assert [(tube.size, tube.stride, tube.offset) for tube in tubes] == [
        ((4, 4, 4), (8, 16, 16), (0, 0, 0)),
        ((8, 2, 2), (3, 16, 16), (2, 4, 4)),
        ((2, 6, 6), (8, 16, 16), (0, 8, 8)),
    ]
    video = VideoConfig(frames=16, patch_stride=16, tubes=tubes)
    vision = VisionConfig(image_size=32, patch_size=8, video=video)
    counts = [math.prod(kind.counts(16, 32)) for kind in token_kinds(vision)]
    assert counts == [16, 8, 12, 8] and count_patches(vision, 16) == 44
    assert paper_tubes() == paper_tubes(32, 16)
    # However few the frames, an image has no tubes.
    for frames in (1, 2, 5):
        assert all(tube.counts(1, 32) [0] == 0 for tube in paper_tubes(frames, 8))  # fmt: skip


def test_joined_tubes_have_the_mean_of_their_centres():
    tube = TubeConfig((4, 4, 4), stride=(8, 16, 16), join=(2, 1, 2))
    t, y, x = tube.centres(frames=16, image_size=56)
    # Starts 0, 4, 8 and 12 are two pairs; of the seven along x, 0 to 48, the last is left over.
    assert tube.parts == 4 and tube.counts(16, 56) == (2, 4, 3)
    assert (list(t), list(y), list(x)) == ([3.5, 11.5], [1.5, 17.5, 33.5, 49.5], [5.5, 21.5, 37.5])


def test_without_tubes_the_tokens_are_those_of_all_frames():
    for vision in (VisionConfig(image_size=32), with_video(None, image_size=32).vision):
        grid = vision.grid[0] ** 2
        where = token_centres(vision, 3)
        assert count_tokens(vision, 3) == count_patches(vision, 3) == len(where) == 3 * grid
        np.testing.assert_array_equal(where[:, 0], np.repeat([0, 1, 2], grid))
        np.testing.assert_array_equal(where[:grid], token_centres(vision))
    resnet = ResNetConfig(image_size=64)
    assert token_centres(resnet, 2)[4:6].tolist() == [[1, 15.5, 15.5], [1, 15.5, 47.5]]
    assert count_tokens(resnet, 5) == 20
    learned = dataclasses.replace(PAPER, pooling="queries", pool_queries=9)
    assert count_tokens(learned, 32) == 8
    assert count_tokens(dataclasses.replace(learned, video=None), 32) == 8 * 32
    everything = dataclasses.replace(PAPER, class_token=True, pooling="mean_all")
    assert count_tokens(everything, 32) == 540


# From pixels to tokens


@pytest.mark.parametrize("join", [(1, 1, 1), (2, 2, 1)])
def test_a_tube_is_a_convolution_over_its_box_alone(join):
    """Compared with loops over slices; joined tubes stand channel behind channel."""
    tube = TubeConfig((3, 4, 4), stride=(2, 6, 4), offset=(1, 0, 2), join=join)
    rng = np.random.default_rng(0)
    video = rng.normal(size=(2, 9, 20, 20, 3))
    kernel = rng.normal(size=(3 * 4 * 4 * 3, 5))
    counts = tube.counts(9, 20)
    starts = tube.starts(9, 20)
    expected = np.zeros((2, *(len(axis) for axis in starts), 5))
    for i, t in enumerate(starts[0]):
        for j, y in enumerate(starts[1]):
            for k, x in enumerate(starts[2]):
                box = video[:, t : t + 3, y : y + 4, x : x + 4]
                expected[:, i, j, k] = box.reshape(2, -1) @ kernel
    pieces = cut_tubes(video.astype(np.float32), tube)
    found = join_tubes(pieces.reshape(2, -1, len(kernel)) @ kernel.astype(np.float32), tube, counts)
    assert found.shape == (2, math.prod(counts), 5 * tube.parts)
    found = found.reshape(2, *counts, *join, 5).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-4)


def code_by_hand(t: float, y: float, x: float, width: int) -> np.ndarray:
    """TubeViT's code, one number after the other."""
    count = width // 6
    blocks = [
        [function(place / 10_000 ** (j / count)) for j in range(count)]
        for place in (t, y, x) for function in (math.sin, math.cos)
    ]  # fmt: skip
    return np.array([*sum(blocks, []), *[0] * (width - 6 * count)])


def test_the_fixed_code_of_a_point():
    expected = [
        -.3508, .0350, -.9365, .9994, -.3508, .0350, -.9365, .9994, -.8090, .3476, -.5878, .9376,
        0, 0,
    ]  # fmt: skip
    code = fixed_code(np.array([1, 3.5]), np.array([0, 9, 3.5]), np.array([35.5]), 14)
    assert code.shape == (2, 3, 1, 14)
    np.testing.assert_allclose(code[1, 2, 0], expected, atol=1e-4)
    np.testing.assert_allclose(code_by_hand(3.5, 3.5, 35.5, 14), expected, atol=1e-4)
    np.testing.assert_allclose(code[0, 1, 0], code_by_hand(1, 9, 35.5, 14), atol=1e-6)


def test_a_tube_has_the_images_position_at_its_centre_and_the_code_of_its_place():
    video = VideoConfig(patch_stride=8, tubes=paper_tubes(16, 8))
    table = np.random.default_rng(0).normal(size=(4, 4, 12)).astype(np.float32)

    def positions(fixed: str, gate: float | None = None):
        settings = dataclasses.replace(video, fixed_code=fixed)
        vision = VisionConfig(image_size=32, patch_size=8, width=12, num_heads=2, video=settings)
        module = initialise(VideoEmbed(vision, dtypes=Dtypes(jnp.float32, jnp.float32)), KEY)
        if fixed == "gated":
            assert module.gate[...] == pytest.approx(1 / math.sqrt(6))  # then as long as 1
            module.gate[...] = jnp.float32(gate)
        else:
            assert module.gate is None
        return module.positions(table, 16)

    found = positions("gated", 0.3)
    centres = token_centres(VisionConfig(image_size=32, patch_size=8, video=video), 16)
    assert found.shape == (len(centres), 12) == (60, 12)
    for (t, y, x), position in zip(centres, np.asarray(found)):
        down, across = np.clip((y + 0.5) / 8 - 0.5, 0, 3), np.clip((x + 0.5) / 8 - 0.5, 0, 3)
        top, left = int(min(down, 2)), int(min(across, 2))
        rows = np.array([1 - (down - top), down - top])
        columns = np.array([1 - (across - left), across - left])
        learned = np.einsum("i,j,ijd", rows, columns, table[top : top + 2, left : left + 2])
        expected = learned + 0.3 * code_by_hand(t, y, x, 12)
        np.testing.assert_allclose(position, expected, atol=1e-5)
    np.testing.assert_allclose(positions("plain"), positions("gated", 1), atol=1e-6)
    np.testing.assert_array_equal(positions("none"), positions("gated", 0))


# An image is a video of one frame


@pytest.mark.parametrize("config", [OF_TUBES, OF_FRAMES, OF_IMAGES], ids=["tubes", "frames", "image"])  # fmt: skip # noqa: E501
def test_an_image_is_a_video_of_one_frame_to_the_bit(config):
    model = tiny_model(config)
    image, video = encode(model, VIDEO[:, 0]), encode(model, VIDEO[:, :1])
    np.testing.assert_array_equal(image.tokens, video.tokens)
    np.testing.assert_array_equal(image.vector, video.vector)
    assert image.grid == video.grid == (2, 2) and image.tokens.shape == (2, 4, 48)


def test_an_image_of_a_video_model_has_the_code_of_the_first_frame_and_the_vector_of_it():
    image = encode(tiny_model(OF_IMAGES), VIDEO[:, 0])
    np.testing.assert_allclose(encode(gated(OF_TUBES, 0), VIDEO[:, 0]).tokens, image.tokens, atol=1e-5)  # fmt: skip # noqa: E501
    assert np.abs(encode(gated(OF_TUBES, 1), VIDEO[:, 0]).tokens - image.tokens).max() > 1e-2
    model = tiny_model(OF_FRAMES)
    expected = image.tokens + model.frame_embed[...][0]
    np.testing.assert_allclose(encode(model, VIDEO[:, 0]).tokens, expected, atol=1e-5)


def test_a_still_video_is_its_image_and_order_counts_by_the_code_alone():
    """Patches alone, their mean: duplicated tokens change no average of attention."""
    video = VIDEO[:, :4]
    still, other = np.repeat(VIDEO[:, :1], 4, axis=1), video[:, [2, 1, 0, 3]]
    model = gated(OF_PATCHES, 0)
    image = unit(encode(model, VIDEO[:, 0]).vector)
    np.testing.assert_allclose(unit(encode(model, still).vector), image, atol=1e-5)
    vectors = [unit(encode(model, x).vector) for x in (video, other)]
    np.testing.assert_allclose(*vectors, atol=1e-5)
    assert np.abs(vectors[0] - image).max() > 1e-2
    model = gated(OF_PATCHES, 1)
    vectors = [unit(encode(model, x).vector) for x in (video, other)]
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-2


def test_tubes_see_the_order_of_frames_without_the_code():
    other = VIDEO[:, [0, 5, 2, 7, 4, 1, 6, 3]]  # the frames of the patches stay
    first, second = (encode(gated(OF_TUBES, 0), x) for x in (VIDEO, other))
    assert first.tokens.shape == (2, count_tokens(OF_TUBES.vision, FRAMES), 48) == (2, 14, 48)
    assert np.abs(unit(first.vector) - unit(second.vector)).max() > 1e-2
    assert first.grid is None


def test_frames_are_encoded_one_by_one():
    """The mean of unit embeddings; the decoder attends to the tokens of all frames."""
    config = OF_FRAMES
    model = tiny_model(config)
    alone = [encode(tiny_model(OF_IMAGES), VIDEO[:, t]) for t in range(4)]
    joined = encode(model, VIDEO[:, :4])
    tokens = [one.tokens + model.frame_embed[...][t] for t, one in enumerate(alone)]
    np.testing.assert_allclose(joined.tokens, np.concatenate(tokens, axis=1), atol=1e-5)
    expected = unit(sum(unit(one.vector) for one in alone))
    np.testing.assert_allclose(unit(joined.vector), expected, atol=1e-5)
    assert joined.grid is None


def test_every_entrance_takes_videos():
    """By their shapes alone."""
    batch = tiny_batch(OF_TUBES, frames=FRAMES)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: MaMMUT(OF_TUBES, rngs=nnx.Rngs(0))))

    def call(params, image, tokens, text_valid):
        model = nnx.merge(graphdef, params)
        drop = Augment(KEY, AugmentConfig(patch_drop=0.5))
        return (
            model.encode_video(image),
            model.caption_logits(image, tokens, text_valid),
            model.cross_attention(image, tokens, text_valid),
            model.two_pass(image, tokens, text_valid).image_embed,
            model.image_tokens(image, drop).tokens,
        )

    embed, logits, attention, both, dropped = jax.eval_shape(call, params, *batch.values())
    assert embed.shape == both.shape == (4, 48) and logits.shape == (4, 12, 60)
    assert attention.shape == (2, 4, 3, 12, 14)
    assert dropped.shape == (4, 7, 48)


def test_a_prefix_of_the_pooled_video():
    """The mean of the frames' prefixes, or what tubes make of all frames at once."""
    text = DecoderConfig(vocab_size=60, max_length=16, width=48, depth=1, num_heads=3, mlp_dim=80,
                         cross_attn_every=0)  # fmt: skip
    shared = {"image_projection": "separate", "prefix_tokens": 3}
    model = tiny_model(ModelConfig(OF_IMAGES.vision, text, **shared))
    frames = encode(model, VIDEO[:, :2].reshape(4, 16, 16, 3)).tokens.reshape(2, 2, 3, 48)
    joined = encode(model, VIDEO[:, :2])
    assert joined.tokens.shape == (2, 3, 48)
    np.testing.assert_allclose(joined.tokens, frames.mean(1), atol=1e-5)
    model = tiny_model(ModelConfig(OF_TUBES.vision, text, **shared))
    assert jax.eval_shape(lambda x: model.image_tokens(x).tokens, VIDEO).shape == (2, 3, 48)


# What is refused


def prefix(config: ModelConfig) -> ModelConfig:
    text = dataclasses.replace(config.text, cross_attn_every=0, max_length=64)
    return dataclasses.replace(config, text=text)


TUBE = TubeConfig((2, 8, 8), (4, 8, 8))
BAD_CONFIGS = {
    "a negative offset": (lambda: TubeConfig((2, 8, 8), (4, 8, 8), (0, -1, 0)),
        r"TubeConfig.offset is \(0, -1, 0\), expected whole numbers from 0"),
    "no stride": (lambda: TubeConfig((2, 8, 8), (0, 8, 8)), "TubeConfig.stride is"),
    "join of another stride": (lambda: TubeConfig((2, 8, 8), (4, 8, 8), join=(3, 1, 1)),
        r"TubeConfig.stride is \(4, 8, 8\), expected multiples of TubeConfig.join \(3, 1, 1\)"),
    "tubes of frames": (lambda: VideoConfig("frames", tubes=(TUBE,)), "VideoConfig.tubes are set"),
    "a stride of frames": (lambda: VideoConfig("frames", patch_stride=4),
        "VideoConfig.patch_stride is 4, which VideoConfig.mode 'frames' does not have"),
    "a code of frames": (lambda: VideoConfig("frames", fixed_code="plain"),
        "VideoConfig.fixed_code is 'plain', which VideoConfig.mode 'frames' does not have"),
    "frame_embed of tubes": (lambda: VideoConfig(frame_embed=True), "VideoConfig.frame_embed is"),
    "a tube of a frame": (lambda: VideoConfig(tubes=(TubeConfig((1, 8, 8), (1, 8, 8)),)),
        r"a tube of size \(1, 8, 8\), which fits in one frame"),
    "another mode": (lambda: VideoConfig("tube"), "VideoConfig.mode is 'tube'"),
    "a large tube": (lambda: with_video(VideoConfig(tubes=(TubeConfig((2, 17, 8), (1, 8, 8)),))),
        "does not fit in images of VisionConfig.image_size 16"),
    "join of a large distance": (
        lambda: with_video(VideoConfig(tubes=(TubeConfig((2, 8, 8), (2, 32, 8), join=(1, 2, 1)),))),
        r"a tube of size \(2, 8, 8\), .* join \(1, 2, 1\), which does not fit in images of Vis"),
    "join of another width": (
        lambda: with_video(VideoConfig(tubes=(TubeConfig((2, 8, 8), (3, 8, 8), join=(3, 1, 1)),))),
        "VisionConfig.width 32 is not a multiple of the 3 tubes of TubeConfig.join"),
    "low_image_size": (lambda: with_video(VideoConfig(), low_image_size=8),
        "VisionConfig.low_image_size is 8, expected None"),
    "a ResNet with tubes": (lambda: ResNetConfig(video=VideoConfig()),
        "ResNetConfig.video has VideoConfig.mode 'tubes', which a ResNet cannot read"),
    "a ResNet of two sizes": (lambda: ResNetConfig(video=VideoConfig("frames"), low_image_size=64),
        "ResNetConfig.low_image_size is 64, expected None"),
    "a prefix of tubes": (lambda: prefix(OF_TUBES), "VisionConfig.video is of mode 'tubes', which"),
    "a prefix of frames": (lambda: prefix(with_video(VideoConfig("frames"))),
        "VisionConfig.video is of mode 'frames'"),
    "a prefix and frame_embed": (lambda: prefix(OF_FRAMES), "VideoConfig.frame_embed is True"),
    "cropped positions": (lambda: require_computable(
        OF_TUBES, ComputeConfig(), AugmentConfig(crop_positions=True)),
        "AugmentConfig.crop_positions is True, which VisionConfig.video has no place for"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_configs_that_make_no_sense_are_refused(as_users_have_it, case):
    make, message = BAD_CONFIGS[case]
    with pytest.raises(ValueError, match=message):
        make()


LOW = with_video(None, image_size=16, low_image_size=8)
BAD_VIDEOS = {
    "no frames": (OF_TUBES, VIDEO[:, :0], "image is a video .* of no frames, expected one or more"),
    "six axes": (OF_TUBES, VIDEO[None], r"image is uint8\[1, .*, or a video uint8\[B, T, height"),
    "another size": (OF_TUBES, VIDEO[:, :, :8], r"frames of the video are \(8, 16, 3\), expected"),
    "a low size": (LOW, VIDEO[:, :, :8, :8], r"video are \(8, 8, 3\), expected \(16, 16, 3\) from"),
    "int32": (OF_IMAGES, VIDEO.astype(np.int32), "image is int32.*, or float pixels normalised"),
    "0 to 255": (OF_IMAGES, VIDEO.astype(np.float32), "image is float32 with numbers up to 25"),
    "a prefix": (prefix(OF_IMAGES), VIDEO, "a video of 8 frames, which has no place in an image "
        "prefix of 4 tokens"),
    "many frames": (OF_FRAMES, VIDEO, "a video of 8 frames, more than VideoConfig.frames 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_VIDEOS)
def test_videos_that_the_model_does_not_read_are_refused(as_users_have_it, case):
    config, video, message = BAD_VIDEOS[case]
    model = tiny_model(config)
    for call in (model.image_tokens, model.encode_image):
        with pytest.raises(ValueError, match=message):
            call(video)
        with pytest.raises(ValueError, match="expected|more than"):  # under a trace: by shape
            jax.eval_shape(call, video.astype(np.int16))


def test_what_else_is_refused(as_users_have_it):
    model = tiny_model(OF_TUBES)
    for given in (VIDEO[:, 0], VIDEO.tolist(), None):
        with pytest.raises(ValueError, match=r"video is .*, expected uint8\[B, T, height, width"):
            model.encode_video(given)
    crop = Augment(KEY, AugmentConfig(crop_positions=True))
    with pytest.raises(ValueError, match="a video of 8 frames, which AugmentConfig.crop_positions"):
        tiny_model(OF_IMAGES).image_tokens(VIDEO, crop)
    with pytest.raises(ValueError, match="image is uint8.*, a video, expected its frames"):
        tiny_model(OF_IMAGES).vision(VIDEO)
    with pytest.raises(ValueError, match="there are 4 texts in tokens for 2 images"):
        model.caption_logits(VIDEO, tiny_batch()["tokens"])


def test_a_prefix_model_reads_a_video_of_one_frame():
    model = tiny_model(prefix(OF_IMAGES))
    tokens = jax.eval_shape(lambda x: model.image_tokens(x).tokens, VIDEO[:, :1])
    assert tokens.shape == (2, 4, 48)


# In training


def train_config(model: ModelConfig = OF_TUBES, frames: int | None = FRAMES, **changes):
    data = DataConfig(batch_size=8, frames=frames)
    return TrainConfig(model=model, data=data, steps=2, **changes)


def test_a_run_of_videos_has_batches_of_videos_and_counts_their_flops():
    config = train_config()
    task = ImageTextTask(config.loss)
    assert task.abstract_batch(config)["image"].shape == (8, FRAMES, 16, 16, 3)
    flops = task.flops(config)
    assert flops == forward_flops(OF_TUBES, frames=FRAMES)
    assert flops["vision"] > 2 * forward_flops(OF_TUBES)["vision"]
    images = train_config(frames=None)
    assert task.abstract_batch(images)["image"].shape == (8, 16, 16, 3)
    assert task.flops(images) == forward_flops(OF_TUBES)


@pytest.mark.parametrize("frames", [None, 1, FRAMES])
def test_tubes_stay_as_they_are_where_a_run_has_none(frames):
    """Without a gradient, weight decay alone would move them."""
    config = train_config(frames=frames)
    task = ImageTextTask(config.loss)
    state = make_trainer(config, task, sharding.make_mesh(MeshConfig())).abstract_state
    frozen = {name.rpartition(".")[0] for name in by_name(state.frozen)}
    tubes = {f"vision.video_embed.tubes.{number}" for number in range(3)}
    assert frozen == (set() if frames == FRAMES else tubes)
    assert untrained_towers(state, (), task) == []


@pytest.mark.parametrize(
    ("model", "augment", "message"),
    [
        (prefix(OF_IMAGES), {}, "which has no place in an image prefix of 4 tokens"),
        (OF_FRAMES, {}, "more than VideoConfig.frames 4"),
        (OF_IMAGES, {"crop_positions": True}, "AugmentConfig.crop_positions True has no place"),
    ],
)
def test_a_run_of_videos_that_its_model_does_not_read_is_refused(model, augment, message):
    changes = {"task": "caption", "augment": AugmentConfig(**augment)}
    with pytest.raises(ValueError, match=f"an example of data.frames is a video of 8.*{message}"):
        train_config(model, **changes)
    train_config(model, frames=1, **changes)


def test_a_run_of_too_few_frames_for_its_tubes_is_refused():
    """An image, a video of one frame, has no tubes by design."""
    model = with_video(VideoConfig(frames=32, tubes=paper_tubes(32, patch_size=8)))
    message = (
        "data.frames is 8, too few for 1 of the 3 kinds of VideoConfig.tubes, .*frames, 32, or"
    )
    with pytest.raises(ValueError, match=message):
        train_config(model, frames=8)
    with pytest.raises(ValueError, match="data.frames is 7, too few for 2 of the 3 kinds"):
        train_config(model, frames=7)
    for frames in (None, 1, 20, 32):
        train_config(model, frames=frames)
    # A kind has no token, either, where fewer fit than are joined to one.
    joined = with_video(VideoConfig(tubes=(TubeConfig((2, 8, 8), (8, 8, 8), join=(2, 1, 1)),)))
    with pytest.raises(ValueError, match="data.frames is 5, too few for 1 of the 1 kinds"):
        train_config(joined, frames=5)
    train_config(joined, frames=6)


def gradients(config: TrainConfig, mesh: MeshConfig, devices: list) -> tuple[dict, dict, str]:
    """The metrics of a step, Adam's first moments, which are the gradients, and the program."""
    made = sharding.make_mesh(mesh, devices)
    trainer = make_trainer(config, ImageTextTask(config.loss), made)
    params = nnx.to_pure_dict(nnx.state(tiny_model(config.model), nnx.Param))
    zero = np.int32(0)
    moments = make_optimizer(config.optimizer, config.steps).init(params)
    begun = TrainState(zero, params, moments, zero, zero)
    with jax.set_mesh(made):
        state = jax.tree.map(
            lambda x, like: jax.device_put(np.array(x), like.sharding),
            begun, trainer.abstract_state,
        )  # fmt: skip
        batch = tiny_batch(config.model, batch_size=8, frames=FRAMES)
        batch = sharding.device_batch(batch, made)
        step = trainer.step.lower(state, batch).compile()
        state, metrics = step(state, batch)
        return jax.device_get(metrics), jax.device_get(state.opt_state[1].mu), step.as_text()


def close(found: tuple[dict, dict, str], expected: tuple[dict, dict, str]) -> None:
    for name in ("loss_contrastive", "loss_caption", "grad_norm"):
        assert found[0][name] == pytest.approx(expected[0][name], rel=1e-4), name
    pairs = zip(*map(jax.tree_util.tree_leaves_with_path, (found[1], expected[1])), strict=True)
    for (path, got), (_, want) in pairs:
        bound = 1e-4 * max(np.abs(want).max(), 1e-3)
        np.testing.assert_allclose(got, want, rtol=0, atol=bound, err_msg=str(path))


@pytest.mark.long
@pytest.mark.parametrize("name", ["tubes", "frames"])
def test_eight_devices_train_on_videos_as_one_does(name):
    of_frames = with_video(VideoConfig("frames", frames=FRAMES, frame_embed=True))
    model = {"tubes": OF_TUBES, "frames": of_frames}[name]
    one = gradients(train_config(model), MeshConfig(), jax.devices()[:1])
    assert np.abs(one[1]["vision"]["patch_embed"]["kernel"]).max() > 1e-6
    for mesh in (MeshConfig(data=1, fsdp=8), MeshConfig(2, 2, 2)):
        many = gradients(train_config(model), mesh, jax.devices())
        close(many, one)
        kinds = {collective.kind for collective in Program(many[2]).collectives()}
        assert "all-to-all" not in kinds and "all-gather" in kinds


@pytest.mark.long
def test_how_a_video_step_is_computed_changes_no_gradient():
    one_device = MeshConfig(), jax.devices()[:1]
    expected = gradients(train_config(), *one_device)
    unrolled = ComputeConfig(unroll=2, remat="full", passes="fused")
    close(gradients(train_config(compute=unrolled), *one_device), expected)
    close(gradients(train_config(accumulation=2), *one_device), expected)


@pytest.mark.long
def test_the_step_of_a_video_run_is_compiled_ahead_of_time():
    """As `train.py --compile-only` does, without a video."""
    config = train_config(presets.tiny_video(), frames=16)
    report = compile_report(config)
    flops = 3 * 8 * sum(forward_flops(config.model, frames=16).values())
    assert f"GFLOP of a step: {flops / 1e9:,.1f} (3 x forward)" in report
    assert "all-to-all" not in report
