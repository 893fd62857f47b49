"""The image encoder in training: which kernel attends, patches left out, images of a lower size."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from test_flops import product_flops

from mammut import presets
from mammut.config import AugmentConfig, ComputeConfig, ModelConfig
from mammut.models import attention_kernels as kernels
from mammut.models import vit
from mammut.models.attention_kernels import attention_kernel
from mammut.models.compute import Augment
from mammut.models.flops import forward_flops
from mammut.models.mammut import MaMMUT
from mammut.performance.step_time import image_attention_kernel
from mammut.testing import tiny_batch, tiny_config, tiny_model


def with_vision(config: ModelConfig, **changes) -> ModelConfig:
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, **changes))


WIDE = with_vision(tiny_config(), image_size=32)  # 16 patches
BATCH = tiny_batch(WIDE)
KEY = jax.random.key(0)


def encode(config: ModelConfig, image, augment=Augment(), compute=ComputeConfig()):
    graphdef, params = nnx.split(tiny_model(config, compute=compute))

    @jax.jit
    def tokens(params, image, augment):
        return nnx.merge(graphdef, params).image_tokens(image, augment)

    return tokens(params, image, augment)


# Which kernel attends


@pytest.fixture
def gpu(monkeypatch, caplog):
    """A GPU, as far as the choice of a kernel can tell, and the list of kernels that were tried.

    XLA's attention on the CPU stands in for cuDNN's.
    """
    real = kernels._attention_and_gradients
    tried = []

    def attend(kernel, *shape):
        tried.append(kernel)
        return real("xla", *shape)

    monkeypatch.setattr(kernels, "_attention_and_gradients", attend)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    kernels._works.cache_clear()
    yield tried
    kernels._works.cache_clear()


def fused_results(monkeypatch, change):
    """What the fused kernel gives is `change` of what XLA's does."""
    attend = kernels._attention_and_gradients
    monkeypatch.setattr(
        kernels,
        "_attention_and_gradients",
        lambda kernel, *shape: (
            change(attend(kernel, *shape)) if kernel == "cudnn" else attend(kernel, *shape)
        ),
    )


def refuse(results):
    raise NotImplementedError("The head dim must be <= 128\nand a multiple of 8")


def test_the_fused_kernel_is_tried_once_for_each_shape(gpu, caplog):
    compute = ComputeConfig(dtype="bfloat16")
    for _ in range(3):
        chosen = image_attention_kernel(WIDE, compute)
        assert chosen == attention_kernel(jnp.bfloat16, 16, 16) == "cudnn"
    assert gpu == ["xla", "cudnn"]
    assert attention_kernel(jnp.bfloat16, 17, 16) == "cudnn" and len(gpu) == 4
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (refuse, "NotImplementedError: The head dim must be <= 128 and a multiple of 8"),
        (lambda results: [2 * x for x in results], "its results are 100% off"),
        (lambda results: [*results[:3], results[3] * np.nan], "its results are nan% off"),
        (lambda results: [results[0], *(-x for x in results[1:])], "its results are 200% off"),
    ],
    ids=["raises", "wrong", "nan", "wrong gradients"],
)
def test_a_kernel_that_does_not_work_is_replaced_with_one_line_in_the_log(
    gpu, caplog, monkeypatch, change, reason
):
    fused_results(monkeypatch, change)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert attention_kernel(jnp.bfloat16, 16, 16) == "xla"
    (record,) = [record for record in caplog.records if record.name.startswith("mammut")]
    assert record.getMessage() == (
        "image attention of 16 tokens with heads of 16 in bfloat16 runs on XLA, "
        "cudnn does not work here: " + reason
    )


def test_what_is_traced_may_choose_a_kernel(gpu):
    """The probe computes, which inside of a trace would be staged and not run."""
    chosen = []

    @jax.jit
    def traced(x):
        chosen.append(attention_kernel(jnp.bfloat16, 9, 8))
        return x

    traced(1.0)
    assert chosen == ["cudnn"] and gpu == ["xla", "cudnn"]


def test_nothing_is_tried_in_float32_for_other_devices_or_when_told(gpu):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    assert attention_kernel(jnp.float32, 16, 16) == "xla"
    assert attention_kernel(jnp.bfloat16, 16, 16, "tpu") == "xla"
    with jax.set_mesh(mesh):  # of CPU devices: what is compiled here is for them
        assert attention_kernel(jnp.bfloat16, 16, 16) == "xla"
    compute = ComputeConfig(dtype="bfloat16", image_attention="xla")
    assert image_attention_kernel(WIDE, compute) == "xla"
    assert not gpu


def test_a_kernel_is_asked_for_at_the_shape_that_is_run(monkeypatch):
    """Tokens, class token included, and the size of a head, by the image tower alone."""
    asked = []
    monkeypatch.setattr(
        "mammut.models.transformer.attention_kernel",
        lambda dtype, *shape: asked.append((dtype.name, *shape)) or "xla",
    )
    config = with_vision(WIDE, class_token=True)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: MaMMUT(config, rngs=nnx.Rngs(0))))
    jax.eval_shape(
        lambda p: nnx.merge(graphdef, p).caption_logits(BATCH["image"], BATCH["tokens"]), params
    )
    assert asked == [("float32", 17, 16)]


def test_on_a_cpu_auto_is_xla_to_the_bit():
    compute = ComputeConfig(dtype="bfloat16")
    assert image_attention_kernel(presets.mammut_b16(), compute) == "xla"
    auto = encode(WIDE, BATCH["image"], compute=compute)
    compute = dataclasses.replace(compute, image_attention="xla")
    xla = encode(WIDE, BATCH["image"], compute=compute)
    np.testing.assert_array_equal(auto.tokens.astype(np.float32), xla.tokens.astype(np.float32))


# Patches left out (FLIP)


@pytest.mark.parametrize(("drop", "kept"), [(0.5, 8), (0.75, 4), (0.3, 11), (0.99, 1)])
def test_the_share_that_is_kept_is_exact(drop, kept):
    numbers = jnp.arange(16.0)[None, :, None].repeat(64, 0)  # each patch says which it is
    chosen = np.asarray(vit.drop_patches(KEY, numbers, drop))[..., 0]
    assert chosen.shape == (64, kept) == (64, vit.patches_kept(16, drop))
    assert (np.diff(chosen, axis=1) > 0).all()  # none twice, and in their order
    assert kept == 1 or len({tuple(row) for row in chosen}) > 32  # every image its own
    counts = np.bincount(chosen.astype(int).ravel(), minlength=16)
    # every place as often
    assert counts.min() > 0 and counts.max() < 64 * kept / 16 + 5 * np.sqrt(64 * kept / 16)


def test_what_is_kept_is_seen_as_if_the_rest_of_the_image_did_not_exist():
    """Compared with the parts of the tower, run over the chosen rows alone.

    This covers positions, the class token and the pooling.
    """
    config = with_vision(WIDE, class_token=True, pooling="mean_all")
    graphdef, params = nnx.split(tiny_model(config))

    @jax.jit
    def both(params, image):
        model = nnx.merge(graphdef, params)
        tower, noise = model.vision, jax.random.fold_in(KEY, 4)
        pixels = (image.astype(jnp.float32) / 255 - 0.5) / 0.5
        x = tower.patch_embed(vit.patchify(pixels, 8)) + tower.pos_embed[...].reshape(16, -1)
        x = vit.drop_patches(noise, x, 0.5)
        first = jnp.broadcast_to(tower.class_embed[...] + tower.class_pos_embed[...], (4, 1, 32))
        x = jnp.concatenate([first, x], axis=1)
        for i in range(config.vision.depth):
            x = jax.tree.map(lambda leaf, i=i: leaf[i], tower.layers)(x)
        tokens = model.image_projection(tower.norm(x))
        augment = Augment(KEY, AugmentConfig(patch_drop=0.5))
        return model.image_tokens(image, augment), tokens

    encoded, expected = both(params, BATCH["image"])
    assert encoded.tokens.shape == (4, 9, 48) and encoded.grid is None
    np.testing.assert_allclose(encoded.tokens, expected, atol=1e-5)
    np.testing.assert_allclose(encoded.vector, expected.mean(1), atol=1e-5)


def test_without_a_key_every_patch_is_seen():
    graphdef, params = nnx.split(tiny_model(WIDE))
    plain = jax.jit(lambda p, x: nnx.merge(graphdef, p).image_tokens(x))(params, BATCH["image"])
    undrawn = encode(WIDE, BATCH["image"], Augment())
    np.testing.assert_array_equal(undrawn.tokens, plain.tokens)
    assert undrawn.grid == plain.grid == (4, 4)


def test_dropping_patches_leaves_the_crops_as_they_are(monkeypatch):
    """With both on, but a drop that keeps all patches, the tokens are those of the crops alone."""
    monkeypatch.setattr(vit, "drop_patches", lambda key, x, share: x)
    crops, both = (
        encode(WIDE, BATCH["image"], Augment(KEY, AugmentConfig(drop, crop_positions=True)))
        for drop in (0.0, 0.5)
    )
    np.testing.assert_array_equal(both.tokens, crops.tokens)


def test_patches_are_not_drawn_with_the_numbers_of_the_crops():
    """`fold_in` of a key with 1 is the second key of its split, which draws a crop's aspect."""

    def numbers(key):
        return tuple(np.asarray(jax.random.key_data(key)))

    of_crops = {numbers(key) for key in jax.random.split(KEY, 4)}
    assert numbers(jax.random.fold_in(KEY, 1)) in of_crops
    assert numbers(jax.random.fold_in(KEY, vit._DROP_STREAM)) not in of_crops


@pytest.mark.parametrize("every", [2, 0], ids=["cross_attention", "prefix"])
@pytest.mark.parametrize("pooling", ["mean", "mean_all", "queries"])
def test_the_flops_of_a_training_step_are_those_of_the_patches_that_are_kept(pooling, every):
    """Counted in the program; causal attention counts half there and whole here."""
    options = {"class_token": True, "pooling": pooling, "pool_queries": 5, "pool_heads": 4}
    text = dataclasses.replace(WIDE.text, cross_attn_every=every, max_length=32)
    config = dataclasses.replace(WIDE, text=text, image_projection="separate")
    config = with_vision(config, **options)
    augment = Augment(KEY, AugmentConfig(patch_drop=0.5))
    graphdef, params = nnx.split(nnx.eval_shape(lambda: MaMMUT(config, rngs=nnx.Rngs(0))))
    batch = tiny_batch(config, batch_size=1)
    program = jax.make_jaxpr(lambda p: nnx.merge(graphdef, p).two_pass(*batch.values(), augment))(
        params
    )
    flops = forward_flops(config, patch_drop=0.5)
    # Half of the 16 patches stand in front of the text; or the queries, one of which is pooled.
    prefix = {"mean": 8, "mean_all": 9, "queries": 4}[pooling]
    positions = text.max_length if every else config.text_length + prefix - 1
    causal = 2 * positions**2 * text.width * text.depth
    assert product_flops(program.jaxpr) == sum(flops.values()) - flops["vocabulary"] + causal
    assert forward_flops(config)["vision"] > 1.4 * flops["vision"]


# Images of a lower size

BOTH_SIZES = with_vision(tiny_config(), image_size=56, low_image_size=24)  # 7 and 3 patches a side
SMALL = tiny_batch(with_vision(tiny_config(), image_size=24))["image"]


def test_a_small_image_is_seen_as_by_a_small_model_with_a_resized_table():
    """Pillow resizes the table: each of its channels is an image of floats."""
    graphdef, params = nnx.split(tiny_model(with_vision(tiny_config(), image_size=24)))
    params = nnx.to_pure_dict(params)
    table = np.asarray(tiny_model(BOTH_SIZES).vision.pos_embed[...])
    channels = [Image.fromarray(channel) for channel in table.transpose(2, 0, 1)]
    resized = [
        np.asarray(channel.resize((3, 3), Image.Resampling.BILINEAR)) for channel in channels
    ]
    params["vision"]["pos_embed"] = jnp.asarray(np.stack(resized, axis=-1))
    expected = jax.jit(lambda p, x: nnx.merge(graphdef, p).image_tokens(x))(params, SMALL)
    actual = encode(BOTH_SIZES, SMALL)
    assert actual.grid == expected.grid == (3, 3)
    np.testing.assert_allclose(actual.tokens, expected.tokens, atol=1e-5)


def test_a_small_image_teaches_every_position_of_the_table():
    graphdef, params = nnx.split(tiny_model(BOTH_SIZES))
    grads = jax.jit(
        jax.grad(lambda p: (nnx.merge(graphdef, p).image_tokens(SMALL).tokens ** 2).sum())
    )(params)
    assert (np.abs(grads["vision"]["pos_embed"][...]).max(-1) > 1e-3).all()


def test_whole_images_do_not_know_of_small_ones():
    image = tiny_batch(BOTH_SIZES)["image"]
    without = encode(with_vision(BOTH_SIZES, low_image_size=None), image)
    np.testing.assert_array_equal(encode(BOTH_SIZES, image).tokens, without.tokens)


def test_positions_of_small_images_are_cropped_and_their_patches_left_out():
    same = np.repeat(SMALL[:1], 2, axis=0)
    both = AugmentConfig(patch_drop=0.5, crop_positions=True)
    tokens = encode(BOTH_SIZES, same, Augment(KEY, both)).tokens
    assert tokens.shape == (2, 4, 48)  # half of 9 patches, to an even number
    crops = AugmentConfig(crop_positions=True)
    whole = encode(BOTH_SIZES, same, Augment(KEY, crops)).tokens
    assert whole.shape == (2, 9, 48) and np.abs(whole[0] - whole[1]).max() > 1e-3


def test_images_of_a_third_size_are_refused():
    sizes = r"\(56, 56, 3\) from VisionConfig.image_size or \(24, 24, 3\) from low_image_size"
    for side in (16, 48):
        with pytest.raises(
            ValueError, match=rf"images are \({side}, {side}, 3\), expected {sizes}"
        ):
            tiny_model(BOTH_SIZES).vision(np.zeros((1, side, side, 3), np.uint8))
