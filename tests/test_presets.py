"""Every preset builds, at its full size and without memory.

It has the parameters that its paper counts.
"""

import dataclasses
import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mammut import presets
from mammut.config import ComputeConfig, ModelConfig
from mammut.models.flops import forward_flops, num_params
from mammut.models.mammut import MaMMUT
from mammut.models.video import count_patches
from mammut.testing import tiny_config, tiny_model

NAMES = [
    name
    for name, function in inspect.getmembers(presets, inspect.isfunction)
    if not name.startswith("_")
]
WITH_PREFIX = ["magma_v1", "magma_v2", "frozen", "limber", "magma_tiny"]
VIDEO = ["tiny_video", "mammut_b16_video", "mammut_l14_video", "paper_2b_video"]
TWO_PASS = sorted(set(NAMES) - set(WITH_PREFIX))


@functools.cache
def counts(name: str) -> dict[str, int]:
    return num_params(getattr(presets, name)())


def millions(count: int, expected: float, tolerance: float) -> None:
    assert count / 1e6 == pytest.approx(expected, rel=tolerance)


def layer_params(width: int, mlp_dim: int) -> int:
    """A plain transformer layer: 4 d^2 + 2 d h of matrices, their biases, and two norms."""
    return 4 * width**2 + 2 * width * mlp_dim + 4 * width + mlp_dim + width + 2 * 2 * width


def test_the_presets_are_the_sizes_of_the_field_and_of_the_paper():
    assert set(NAMES) == {
        *(
            "tiny",
            "mammut_s16",
            "mammut_s14",
            "mammut_b16",
            "mammut_b14",
            "mammut_l16",
            "mammut_l14",
        ),
        *("paper_ablation", "paper_2b"),
        *VIDEO,
        *WITH_PREFIX,
    }


COMPUTE = [ComputeConfig(), ComputeConfig(dtype="bfloat16", remat="dots")]


@pytest.mark.parametrize("compute", COMPUTE, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", TWO_PASS)
def test_every_preset_runs_both_passes(name, compute):
    config = getattr(presets, name)()
    assert isinstance(config, ModelConfig)
    length, size = config.text.max_length, config.vision.image_size
    frames = (config.vision.video.frames,) if name in VIDEO else ()
    image = jax.ShapeDtypeStruct((2, *frames, size, size, 3), jnp.uint8)
    tokens, valid = (jax.ShapeDtypeStruct((2, length), dtype) for dtype in (jnp.int32, jnp.bool))
    graphdef, params = nnx.split(
        nnx.eval_shape(lambda: MaMMUT(config, compute=compute, rngs=nnx.Rngs(0)))
    )

    def forward(params, *batch):
        out = nnx.merge(graphdef, params).two_pass(*batch)
        return out.image_embed, out.text_embed, out.features

    image_embed, text_embed, features = jax.eval_shape(forward, params, image, tokens, valid)
    assert image_embed.shape == text_embed.shape == (2, config.text.width)
    assert features.shape == (2, length, config.text.width)
    assert image_embed.dtype == text_embed.dtype == jnp.float32
    assert features.dtype == compute.dtypes.compute


@pytest.mark.parametrize("compute", COMPUTE, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", WITH_PREFIX)
def test_every_preset_with_an_image_prefix_runs_its_caption_pass(name, compute):
    config = getattr(presets, name)()
    length, size = config.text_length, config.vision.image_size
    image = jax.ShapeDtypeStruct((2, size, size, 3), jnp.uint8)
    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)
    graphdef, params = nnx.split(
        nnx.eval_shape(lambda: MaMMUT(config, compute=compute, rngs=nnx.Rngs(0)))
    )
    logits_of = lambda params, *batch: nnx.merge(graphdef, params).caption_logits(*batch)  # noqa: E731
    logits = jax.eval_shape(logits_of, params, image, tokens)
    assert logits.shape == (2, length, config.text.vocab_size)
    assert logits.dtype == jnp.float32
    assert length - 1 + config.num_prefix_tokens == config.text.max_length


def test_magmas_presets_have_the_parameters_that_are_published():
    """GPT-J has 6.05 billion, the adapters 3.9 % of that.

    RN50x16 has no pool and gives 144 tokens; Frozen has two.
    """
    # logit scale, bias
    language_model = sum(counts("limber")[part] for part in ("token_embed", "layers", "other")) - 2
    millions(language_model, 6_050, 0.001)
    millions(counts("magma_v1")["adapters"], 235.0, 0.0005)
    millions(counts("magma_v2")["adapters"], 235.1, 0.0005)
    # down and up, with biases, behind 28 MLPs
    assert counts("magma_v1")["adapters"] == 28 * (2 * 4096 * 1024 + 1024 + 4096)
    assert counts("magma_v2")["adapters"] == 2 * 28 * (2 * 4096 * 512 + 512 + 4096)
    millions(counts("magma_v1")["vision"], 136.2, 0.002)
    millions(counts("frozen")["vision"], 23.5, 0.005)
    assert counts("limber")["image_projection"] == (3072 + 1) * 4096
    assert counts("frozen")["image_projection"] == (2048 + 1) * 2 * 4096
    tokens = [
        getattr(presets, name)().num_prefix_tokens
        for name in ("magma_v1", "magma_v2", "limber", "frozen")
    ]
    assert tokens == [144, 144, 144, 2]


@pytest.mark.parametrize("name", TWO_PASS)
def test_the_counts_follow_from_the_widths(name):
    config, count = getattr(presets, name)(), counts(name)
    vision, text = config.vision, config.text
    layer = layer_params(text.width, text.mlp_dim)
    assert count["layers"] == text.depth * layer
    assert count["cross_layers"] == text.depth // text.cross_attn_every * layer
    assert count["token_embed"] == text.vocab_size * text.width
    patches = (vision.image_size // vision.patch_size) ** 2
    stem = (vision.patch_size**2 * 3 + 1) * vision.width + patches * vision.width
    if name in VIDEO:
        stem += 1  # the gate of the fixed code
        for tube in vision.video.tubes:
            stem += (math.prod(tube.size) * 3 + 1) * vision.width
    assert (
        count["vision"]
        == vision.depth * layer_params(vision.width, vision.mlp_dim) + stem + 2 * vision.width
    )
    assert count["image_projection"] == (vision.width + 1) * text.width
    # positions, norm, scale and bias
    assert count["other"] == text.max_length * text.width + 2 * text.width + 2
    assert count["total"] == sum(value for part, value in count.items() if part != "total")


@pytest.mark.parametrize(
    ("name", "frames", "tokens"),
    [
        ("tiny_video", 16, 44), ("mammut_b16_video", 32, 539), ("paper_2b_video", 32, 539),
        ("mammut_l14_video", 32, 704), ("mammut_l14_video", 16, 704), ("tiny_video", 8, 40),
    ],
)  # fmt: skip
def test_video_presets_have_the_papers_tubes_and_see_an_image_as_others_do(name, frames, tokens):
    vision = getattr(presets, name)(frames).vision
    assert count_patches(vision, frames) == tokens and vision.video.frames == frames
    assert count_patches(vision) == math.prod(vision.grid)
    base = getattr(presets, name.removesuffix("_video"))().vision
    sizes = {"video": None, "image_size": base.image_size}
    assert dataclasses.replace(vision, **sizes) == base


def test_the_counts_are_those_of_a_model_that_is_made():
    leaves = jax.tree.leaves(nnx.state(tiny_model(), nnx.Param))
    assert num_params(tiny_config())["total"] == sum(leaf.size for leaf in leaves)


def test_the_main_model_has_the_parameters_of_the_paper():
    """Paper, section 4.1: ViT-H has 630M to 650M, the decoder 1B, the model 2B.

    420M of the decoder are cross-attention, in 9 of 18 layers.
    """
    count = counts("paper_2b")
    # 9.4M of attention, 37.7M of MLP, the rest biases and norms
    assert layer_params(1536, 12_288) == 47_212_032
    millions(count["layers"], 849, 0.002)
    millions(count["cross_layers"], 420, 0.015)
    millions(count["cross_layers"], 425, 0.002)
    millions(count["vision"], 632, 0.005)
    millions(count["token_embed"], 98.3, 0.001)
    millions(count["total"], 2_020, 0.01)
    millions(count["layers"] + count["token_embed"], 1_000, 0.06)


def test_the_ablation_model_has_the_parameters_of_the_paper():
    """Paper, section 4.5: ViT-B of 86M and 8 layers of width 1024, 100.7M of matrices."""
    count = counts("paper_ablation")
    millions(count["vision"], 86, 0.005)
    millions(count["layers"], 100.7, 0.002)
    assert (
        presets.paper_ablation().text.depth // presets.paper_ablation().text.cross_attn_every == 4
    )


@pytest.mark.parametrize(
    ("name", "published"),
    [("s16", 22), ("s14", 22), ("b16", 86), ("b14", 86), ("l16", 304), ("l14", 304)],
)
def test_the_image_encoders_have_the_sizes_of_their_letters(name, published):
    """ViT and DeiT publish 22M, 86M and 304M for S, B and L; ours lack the class token."""
    millions(counts(f"mammut_{name}")["vision"], published, 0.02)


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads"),
    [("s", 384, 12, 6), ("b", 768, 12, 12), ("l", 1024, 24, 16)],
)
def test_the_letters_have_the_shapes_of_the_field(name, width, depth, heads):
    for patch in (14, 16):
        config = getattr(presets, f"mammut_{name}{patch}")()
        for tower in (config.vision, config.text):
            assert (tower.width, tower.depth, tower.num_heads, tower.mlp_dim) == (
                width,
                depth,
                heads,
                4 * width,
            )
        assert config.vision.grid == (224 // patch, 224 // patch)


def test_flops_are_two_a_parameter_and_token_plus_attention():
    """A ViT-B/16 of 224 pixels and a class token is published with 17.5 billion multiply-adds."""
    config = presets.mammut_b16()
    flops = forward_flops(config)
    assert flops["vision"] / 2 == pytest.approx(17.5e9, rel=0.02)
    text = config.text
    matrices = text.depth * (4 * text.width**2 + 2 * text.width * text.mlp_dim)
    attention = text.depth * 2 * 2 * text.max_length**2 * text.width
    assert flops["contrastive_pass"] == 2 * text.max_length * matrices + attention
    assert flops["vocabulary"] == 2 * text.max_length * text.width * text.vocab_size
    assert flops["caption_pass"] > flops["contrastive_pass"]


def test_flops_are_those_that_the_compiler_counts():
    """XLA counts the body of a loop once, so all layers of the tiny model are unrolled."""
    config = presets.tiny()
    compute = ComputeConfig(unroll=config.vision.depth)
    graphdef, params = nnx.split(
        nnx.eval_shape(lambda: MaMMUT(config, compute=compute, rngs=nnx.Rngs(0)))
    )
    size = config.vision.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
    lowered = jax.jit(lambda p, x: nnx.merge(graphdef, p).encode_image(x)).lower(params, image)
    cost = lowered.compile().cost_analysis()
    assert forward_flops(config)["vision"] == pytest.approx(cost["flops"], rel=0.1)
    assert np.isfinite(cost["flops"])
