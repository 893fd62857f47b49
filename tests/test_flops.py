"""Counts of FLOPs: the formulas against the products and convolutions of the traced program."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import Jaxpr
from marks import long
from test_architectures import CONFIGS as ARCHITECTURES

from mammut.config import (
    AugmentConfig,
    DecoderConfig,
    MeshConfig,
    ModelConfig,
    ResNetConfig,
    TubeConfig,
    VideoConfig,
    VisionConfig,
)
from mammut.core.sharding import make_mesh
from mammut.models.compute import Augment
from mammut.models.flops import forward_flops, training_flops
from mammut.models.mammut import MaMMUT
from mammut.models.video import count_tokens
from mammut.testing import tiny_config

VISION = VisionConfig(image_size=16, patch_size=8, width=32, depth=2, num_heads=2, mlp_dim=48)
TEXT = DecoderConfig(vocab_size=50, max_length=9, width=24, depth=4, num_heads=3, mlp_dim=40)
GATED = {"activation": "swiglu", "attn_gate": True}
RESNET = ResNetConfig(stem_width=8, stages=(1, 2, 3, 1), image_size=64)
CONFIGS = ARCHITECTURES | {
    "mammut": tiny_config(),
    "gated": ModelConfig(
        dataclasses.replace(VISION, **GATED),
        dataclasses.replace(TEXT, **GATED, causal_contrastive=True),
    ),
    "gated_queries": ModelConfig(
        dataclasses.replace(VISION, **GATED, pooling="queries", pool_queries=5, pool_heads=4),
        TEXT,
        image_projection="embedding",
    ),
    "gated_map": ModelConfig(
        dataclasses.replace(VISION, **GATED, pooling="map", class_token=True),
        TEXT,
        image_projection="separate",
    ),
    "windows": ModelConfig(
        VISION,
        dataclasses.replace(TEXT, pooling="none", local_windows=(0, 3)),
        image_projection="decoder",
    ),
    "magma": ModelConfig(
        RESNET,
        dataclasses.replace(
            TEXT, cross_attn_every=0, positions="rope", layout="parallel", pooling="none"
        ),
        image_projection="decoder",
        prefix_norm=True,
    ),
    "prefix_of_pooled": ModelConfig(
        RESNET,
        dataclasses.replace(TEXT, cross_attn_every=0, layout="parallel_two_norms"),
        image_projection="separate",
        prefix_tokens=3,
    ),
    "cut_rest": ModelConfig(dataclasses.replace(VISION, image_size=21, cut_rest=True), TEXT),
    "norm_free": ModelConfig(dataclasses.replace(RESNET, kind="nf"), TEXT),
}
# Of 8 frames: 4 of two frames, and tubes, some joined; or 8 images.
TUBES = (TubeConfig((2, 4, 6), (3, 8, 8)), TubeConfig((2, 5, 5), (4, 8, 8), join=(2, 1, 1)))
VIDEO_CONFIGS = {
    "tubes": dataclasses.replace(VISION, video=VideoConfig(patch_stride=4, tubes=TUBES)),
    "tubes_queries": dataclasses.replace(
        VISION, video=VideoConfig(tubes=TUBES), pooling="queries", pool_queries=5, pool_heads=4
    ),
    "frames": dataclasses.replace(VISION, class_token=True, pooling="mean_all"),
    "frame_embed": dataclasses.replace(VISION, video=VideoConfig("frames", frame_embed=True)),
    "resnet": dataclasses.replace(RESNET, kind="nf"),
}
CONTRASTIVE = [name for name, config in CONFIGS.items() if config.text.pooling != "none"]
CAPTIONING = [name for name, config in CONFIGS.items() if config.text.depth]


# Counting in a traced program


def product_flops(jaxpr: Jaxpr) -> int:
    """FLOPs of the matrix products and convolutions in a jaxpr, 2 for each multiply-add.

    A scan counts as often as it runs, a function inside of `shard_map` once for each device. A
    `while` loop, whose number of turns is not known, and a `cond` must have no products.
    """
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            sizes = eqn.invars[0].aval.shape
            total += 2 * eqn.outvars[0].aval.size * math.prod(sizes[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            # Every number of the result is a sum over the kernel but for its output channels.
            kernel = eqn.invars[1].aval
            outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * eqn.outvars[0].aval.size * (kernel.size // outputs)

        inner = sum(
            product_flops(getattr(value, "jaxpr", value))
            for value in jax.tree.leaves(eqn.params)
            if hasattr(value, "eqns")
        )
        if name in ("while", "cond"):
            assert inner == 0
        elif name == "scan":
            inner *= eqn.params["length"]
        elif name == "shard_map":
            inner *= eqn.params["mesh"].size
        total += inner
    return total


def traced_flops(function: Callable, *args) -> int:
    return product_flops(jax.make_jaxpr(function)(*args).jaxpr)


@jax.custom_vjp
def _doubled(x):
    return 2 * x @ x


_doubled.defvjp(lambda x: (_doubled(x), x), lambda x, g: (g @ x,))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x @ x, 54),
        (lambda x: jnp.einsum("ij,kj->ik", x, x[:2]), 36),
        (lambda x: jax.lax.scan(lambda y, _: (x @ y, None), x, length=5)[0], 5 * 54),
        (lambda x: jax.jit(jax.checkpoint(lambda x: jnp.sin(x @ x)))(x), 54),
        (lambda x: jax.grad(lambda x: jax.checkpoint(lambda x: jnp.sin(x @ x))(x).sum())(x), 216),
        (_doubled, 54),
        (jax.vmap(lambda row: row @ row), 18),
        # A 2 x 2 kernel over 3 x 3 pixels of one channel with a border: 4 x 4 results.
        (
            lambda x: jax.lax.conv_general_dilated(
                x[None, None], x[None, None, :2, :2], (1, 1), [(1, 1), (1, 1)]
            ),
            2 * 16 * 4,
        ),
    ],
    ids=["product", "einsum", "scan", "remat", "gradient", "custom_vjp", "vmap", "convolution"],
)
def test_the_products_of_a_program_are_counted(function, expected):
    """A product of two 3 x 3 matrices is 27 multiply-adds; with remat its gradient has four."""
    assert traced_flops(function, jax.ShapeDtypeStruct((3, 3), jnp.float32)) == expected


def test_products_on_several_devices_are_counted_on_each():
    mesh = make_mesh(MeshConfig(), jax.devices()[:4])
    rows = jax.sharding.PartitionSpec("data")
    function = jax.shard_map(
        lambda x: x @ jnp.ones((5, 7)), mesh=mesh, in_specs=rows, out_specs=rows
    )
    assert traced_flops(function, jax.ShapeDtypeStruct((8, 5), jnp.float32)) == 2 * 8 * 5 * 7


# The parts of a forward pass


def abstract(config: ModelConfig):
    return nnx.split(nnx.eval_shape(lambda: MaMMUT(config, rngs=nnx.Rngs(0))))


def inputs(config: ModelConfig, length: int | None = None) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Image, tokens and `text_valid` of one example."""
    size = config.vision.image_size
    length = config.text_length if length is None else length
    return (
        jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8),
        jax.ShapeDtypeStruct((1, length), jnp.int32),
        jax.ShapeDtypeStruct((1, length), jnp.bool_),
    )


def uncounted_half(config: ModelConfig, layers: int, positions: int) -> int:
    """The half of causal attention that the program computes and masks: scores and weighted sum."""
    return layers * 2 * positions**2 * config.text.width


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_of_the_image_encoder_are_those_of_its_products(name):
    config = CONFIGS[name]
    graphdef, params = abstract(config)
    image, _, _ = inputs(config)
    counted = traced_flops(lambda p, x: nnx.merge(graphdef, p).image_tokens(x), params, image)
    assert counted == forward_flops(config)["vision"]


@pytest.mark.parametrize(
    ("name", "patch_drop"),
    [*((name, 0.0) for name in VIDEO_CONFIGS), ("tubes", 0.5), ("tubes_queries", 0.5),
     ("frames", 0.5)],
)  # fmt: skip
def test_flops_of_videos_are_those_of_their_products(name, patch_drop):
    """In the image encoder and in the caption pass, which sees all of their tokens."""
    vision = VIDEO_CONFIGS[name]
    config = ModelConfig(vision, TEXT, image_projection="separate")
    graphdef, params = abstract(config)
    image, *texts = inputs(config)
    video = jax.ShapeDtypeStruct((1, 8, *image.shape[1:]), image.dtype)
    augment = Augment(jax.random.key(0), AugmentConfig(patch_drop=patch_drop))

    def encode(params, video):
        return nnx.merge(graphdef, params).image_tokens(video, augment)

    flops = forward_flops(config, patch_drop, frames=8)
    assert traced_flops(encode, params, video) == flops["vision"]

    tokens = jax.eval_shape(lambda p, x: encode(p, x).tokens, params, video)
    if not patch_drop:
        assert tokens.shape[1] == count_tokens(vision, 8)
    counted = traced_flops(
        lambda p, *x: nnx.merge(graphdef, p).text.caption_pass(*x), params, *texts, tokens
    )
    half = uncounted_half(config, TEXT.depth, config.text_length)
    assert counted == flops["caption_pass"] + half
    assert forward_flops(config, patch_drop)["vision"] < flops["vision"] / 1.4


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_flops_of_the_contrastive_pass_are_those_of_its_products(name):
    config = CONFIGS[name]
    text = config.text
    graphdef, params = abstract(config)
    _, *texts = inputs(config)
    counted = traced_flops(lambda p, *x: nnx.merge(graphdef, p).encode_text(*x), params, *texts)

    expected = forward_flops(config)["contrastive_pass"]
    if text.causal_contrastive:
        layers = text.text_only_depth or text.depth
        expected += uncounted_half(config, layers, config.text_length + text.class_token)
    assert counted == expected


@pytest.mark.parametrize("name", CAPTIONING)
def test_flops_of_the_caption_pass_and_the_vocabulary_are_those_of_their_products(name):
    config = CONFIGS[name]
    text = config.text
    graphdef, params = abstract(config)
    image, *texts = inputs(config)
    tokens = jax.eval_shape(
        lambda p, x: nnx.merge(graphdef, p).image_tokens(x).tokens, params, image
    )

    def caption_pass(params, tokens, text_valid, image_tokens):
        return nnx.merge(graphdef, params).text.caption_pass(tokens, text_valid, image_tokens)

    flops = forward_flops(config)
    positions = config.text_length + max(config.num_prefix_tokens - 1, 0)
    layers = text.text_only_depth + text.depth
    counted = traced_flops(caption_pass, params, *texts, tokens)
    assert counted == flops["caption_pass"] + uncounted_half(config, layers, positions)

    features = jax.eval_shape(caption_pass, params, *texts, tokens)
    logits = traced_flops(lambda p, x: nnx.merge(graphdef, p).text.logits(x), params, features)
    assert logits == flops["vocabulary"]


@pytest.mark.parametrize("name", ["mammut", "magma", "prefix_of_pooled"])
def test_a_language_pass_of_a_shorter_text_has_no_image_and_fewer_tokens(name):
    config = CONFIGS[name]
    graphdef, params = abstract(config)
    _, *texts = inputs(config, length=5)
    counted = traced_flops(
        lambda p, *x: nnx.merge(graphdef, p).text.language_pass(*x), params, *texts
    )
    flops = forward_flops(config, length=5, sees_image=False)["caption_pass"]
    assert counted == flops + uncounted_half(config, config.text.depth, 5)
    assert flops < forward_flops(config, length=5)["caption_pass"]


# A training step


def gradient_flops(config: ModelConfig) -> int:
    """The products of the gradients of both passes and of the logits in all parameters."""
    graphdef, params = abstract(config)

    def value(params, image, tokens, text_valid):
        model = nnx.merge(graphdef, params)
        out = model.two_pass(image, tokens, text_valid)
        outputs = out.image_embed, out.text_embed, model.text.logits(out.features)
        return sum((x**2).sum() for x in outputs)

    return traced_flops(jax.value_and_grad(value), params, *inputs(config))


@pytest.mark.parametrize(
    "name",
    ["mammut", long("openmammut"), "moderntext", long("coca"), "gptj", long("gated_map")],
)
def test_a_training_step_is_three_forward_passes(name):
    """Less the gradient in the pixels, which nothing needs, with the masked half of attention."""
    config = CONFIGS[name]
    text, vision = config.text, config.vision
    forward = forward_flops(config)

    masked = uncounted_half(config, text.text_only_depth + text.depth, config.text_length)
    if text.causal_contrastive:
        layers = text.text_only_depth or text.depth
        masked += uncounted_half(config, layers, config.text_length + text.class_token)
    pixels = 2 * math.prod(vision.grid) * vision.patch_size**2 * 3 * vision.width
    assert gradient_flops(config) == training_flops(forward) + 3 * masked - pixels


def test_a_part_that_is_computed_again_counts_once_more_each_time():
    parts = {"vision": 100, "caption_pass": 10, "vocabulary": 1}
    assert training_flops(parts) == 333
    assert training_flops(parts, ["vision", "caption_pass", "vision"]) == 333 + 210
    assert training_flops(parts, parts) == 4 * 111
