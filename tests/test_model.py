"""The two passes: what they see and do not see.

Also pads, order, numbers against NumPy, precision, memory policies and positions.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from marks import long

from mammut.config import AugmentConfig, ComputeConfig, LossConfig, ModelConfig, VisionConfig
from mammut.models import positions, vit
from mammut.models.compute import Augment, Dtypes, scan, stack
from mammut.models.flops import num_params
from mammut.models.layers import LayerConfig, LayerNorm, initialise, unit
from mammut.models.losses import caption_loss
from mammut.models.mammut import MaMMUT
from mammut.models.masks import caption_labels
from mammut.models.transformer import MLP, Layer, dot_product_attention
from mammut.testing import tiny_batch, tiny_config, tiny_model
from mammut.training.tasks import ImageTextTask

# What is here is compiled more than it is run.
CONFIG = tiny_config()
LENGTH, VOCAB, WIDTH = CONFIG.text.max_length, CONFIG.text.vocab_size, CONFIG.text.width
FLOAT32 = Dtypes(jnp.dtype("float32"), jnp.dtype("float32"))


def with_text(config: ModelConfig, **changes) -> ModelConfig:
    return dataclasses.replace(config, text=dataclasses.replace(config.text, **changes))


def with_vision(config: ModelConfig, **changes) -> ModelConfig:
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, **changes))


@functools.cache
def weights(config: ModelConfig = CONFIG, compute: ComputeConfig = ComputeConfig()):
    return nnx.split(tiny_model(config, compute=compute))


def forward(model: MaMMUT, image, tokens, text_valid):
    """All that a model says of a batch."""
    encoded = model.image_tokens(image)
    features = model.text.caption_pass(tokens, text_valid, encoded.tokens)
    task = ImageTextTask(LossConfig())
    batch = {"image": image, "tokens": tokens, "text_valid": text_valid}
    return {
        "image_tokens": encoded.tokens,
        "vector": encoded.vector,
        "image_embed": model.encode_image(image),
        "contrastive_features": model.text.contrastive_pass(tokens, text_valid),
        "text_embed": model.encode_text(tokens, text_valid),
        "caption_features": features,
        "logits": model.caption_logits(image, tokens, text_valid),
        "token_losses": caption_loss(
            features, model.text.vocab_kernel, *caption_labels(tokens, text_valid)
        ),
        "metrics": task.loss(model, batch, Augment(jax.random.key(0)))[1],
    }


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, params, image, tokens, text_valid):
    return forward(nnx.merge(graphdef, params), image, tokens, text_valid)


def run(batch, config: ModelConfig = CONFIG, params=None, compute=ComputeConfig()):
    graphdef, own_params = weights(config, compute)
    out = _run(graphdef, own_params if params is None else params, **batch)
    return jax.tree.map(np.asarray, out)


@functools.partial(jax.jit, static_argnums=0)
def _text_gradients(graphdef, params, batch, text_weights):
    def weighted(params):
        return (
            nnx.merge(graphdef, params).encode_text(batch["tokens"], batch["text_valid"])
            * text_weights
        ).sum()

    return jax.grad(weighted)(params)


def text_gradients(batch):
    """Gradients of a sum that depends on all of the text embedding."""
    text_weights = (
        np.random.default_rng(5).normal(size=(len(batch["tokens"]), WIDTH)).astype(np.float32)
    )
    return nnx.to_pure_dict(
        jax.tree.map(np.asarray, _text_gradients(*weights(), batch, text_weights))
    )


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_gradients(graphdef, params, batch):
    def loss(params):
        augment = Augment(jax.random.key(0))
        return ImageTextTask(LossConfig()).loss(nnx.merge(graphdef, params), batch, augment)[0]

    return jax.value_and_grad(loss)(params)


def loss_and_gradients(batch, compute: ComputeConfig = ComputeConfig()):
    """The training loss, both parts of it, and its gradients."""
    loss, grads = _loss_and_gradients(*weights(CONFIG, compute), batch)
    return float(loss), nnx.to_pure_dict(jax.tree.map(np.asarray, grads))


@pytest.fixture(scope="module")
def batch():
    """Lengths of 12, 9, 8 and 5 tokens of 12."""
    return tiny_batch()


@pytest.fixture(scope="module")
def out(batch):
    return run(batch)


def close(actual, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


def changed(actual, expected, threshold=1e-3):
    """Where two arrays differ by more than `threshold` anywhere along the last axis."""
    return np.abs(actual - expected).max(-1) > threshold


# What each pass sees


def test_the_contrastive_pass_ignores_the_image(batch, out):
    other = run({**batch, "image": 255 - batch["image"]})
    np.testing.assert_array_equal(other["text_embed"], out["text_embed"])
    np.testing.assert_array_equal(other["contrastive_features"], out["contrastive_features"])
    assert changed(other["image_embed"], out["image_embed"]).all()


def test_the_caption_pass_sees_the_image_at_every_token(batch, out):
    other = run({**batch, "image": 255 - batch["image"]})
    assert changed(other["logits"], out["logits"])[batch["text_valid"]].all()


def test_the_caption_pass_of_an_example_sees_its_own_image_only(batch, out):
    image = batch["image"].copy()
    image[1] = 255 - image[1]
    other = run({**batch, "image": image})
    np.testing.assert_array_equal(
        changed(other["logits"], out["logits"]).all(1), [False, True, False, False]
    )
    np.testing.assert_array_equal(
        changed(other["image_embed"], out["image_embed"]), [False, True, False, False]
    )


def used(grads) -> set[str]:
    """The parameters with a gradient, without biases of keys.

    A bias of the keys shifts all scores of a query alike, so that its gradient is zero.
    """
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    names = {jax.tree_util.keystr(path) for path, leaf in leaves if np.abs(leaf).max() > 0}
    return {name for name in names if "['key']['bias']" not in name}


def test_the_text_embedding_has_no_gradient_in_the_image_and_the_cross_attention(batch):
    grads = text_gradients(batch)
    for part in (grads["vision"], grads["image_projection"], grads["text"]["cross_layers"]):
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(part))
    assert used(grads["text"]["layers"]) == used(
        jax.tree.map(np.ones_like, grads["text"]["layers"])
    )


def test_the_two_losses_reach_every_parameter_but_the_bias_of_other_losses(batch):
    _, grads = loss_and_gradients(batch)
    assert used(jax.tree.map(np.ones_like, grads)) - used(grads) == {"['logit_bias']"}


# Pads


def test_ids_of_pads_change_no_embedding_no_logit_before_them_and_no_loss(batch, out):
    noise = np.random.default_rng(1).integers(0, VOCAB, batch["tokens"].shape, np.int32)
    other = run({**batch, "tokens": np.where(batch["text_valid"], batch["tokens"], noise)})
    assert (noise != batch["tokens"])[~batch["text_valid"]].any()
    for name in ("text_embed", "image_embed", "token_losses", "metrics"):
        close(other[name], out[name], 1e-6)
    close(other["logits"][batch["text_valid"]], out["logits"][batch["text_valid"]], 1e-6)


def test_pad_length_changes_no_embedding_no_logit_before_the_pads_and_no_loss(batch):
    """The three texts of at most 9 tokens, among 9 and among 12."""
    long = {name: value[[1, 2, 3, 3]] for name, value in batch.items()}
    assert not long["text_valid"][:, 9:].any() and long["text_valid"][:, 8].any()
    short = {
        "image": long["image"],
        "tokens": long["tokens"][:, :9],
        "text_valid": long["text_valid"][:, :9],
    }
    out_long, out_short = run(long), run(short)
    close(out_short["text_embed"], out_long["text_embed"])
    close(out_short["metrics"], out_long["metrics"])
    valid = short["text_valid"]
    close(out_short["logits"][valid], out_long["logits"][:, :9][valid])
    close(out_short["token_losses"], out_long["token_losses"][:, :9])
    assert (out_long["token_losses"][:, 9:] == 0).all()


def test_id_0_is_a_token_where_it_is_valid(batch, out):
    """0 is "!" in CLIP's vocabulary; the validity alone tells pads."""
    tokens = batch["tokens"].copy()
    tokens[:, 2] = 0
    other = run({**batch, "tokens": tokens})
    assert changed(other["text_embed"], out["text_embed"]).all()
    assert (other["token_losses"][:, 1] > 0).all()


def test_the_text_embedding_is_the_mean_over_real_tokens(batch, out):
    for row in range(4):
        mean = out["contrastive_features"][row][batch["text_valid"][row]].astype(np.float64).mean(0)
        close(out["text_embed"][row], mean / np.linalg.norm(mean), 1e-5)


def test_a_text_of_pads_alone_has_an_embedding_of_zeros_and_finite_gradients(batch):
    text_valid = batch["text_valid"].copy()
    text_valid[2] = False
    empty = {**batch, "text_valid": text_valid}
    out = run(empty)
    np.testing.assert_array_equal(out["text_embed"][2], np.zeros(WIDTH))
    assert (out["token_losses"][2] == 0).all()
    everything = out, text_gradients(empty), loss_and_gradients(empty)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(everything))


def test_the_caption_loss_of_a_batch_is_its_mean_over_labels_not_over_examples(batch, out):
    labels = batch["text_valid"].sum() - 4
    close(out["metrics"]["loss_caption"], out["token_losses"].sum() / labels)


# Order


@pytest.mark.parametrize("place", [1, 5, 11])
def test_a_later_token_changes_no_earlier_logit_and_all_later_ones(batch, out, place):
    tokens = batch["tokens"].copy()
    tokens[0, place] = 4 if tokens[0, place] != 4 else 5
    other = run({**batch, "tokens": tokens})
    np.testing.assert_array_equal(
        changed(other["logits"][0], out["logits"][0], 1e-6), np.arange(LENGTH) >= place
    )
    close(other["logits"][1:], out["logits"][1:], 1e-6)


def test_in_the_contrastive_pass_a_later_token_changes_earlier_features(batch, out):
    tokens = batch["tokens"].copy()
    tokens[0, 11] = 4 if tokens[0, 11] != 4 else 5
    other = run({**batch, "tokens": tokens})
    assert changed(other["contrastive_features"][0], out["contrastive_features"][0], 1e-5).all()


def test_the_order_of_tokens_matters_in_both_passes(batch, out):
    tokens = batch["tokens"].copy()
    tokens[:, [1, 2]] = tokens[:, [2, 1]]
    assert (tokens != batch["tokens"]).any(1).all()
    other = run({**batch, "tokens": tokens})
    assert changed(other["text_embed"], out["text_embed"]).all()
    assert changed(other["logits"][:, 3], out["logits"][:, 3]).all()


def test_the_order_of_patches_matters(batch, out):
    """The two halves of the picture change places; without positions the mean would stay."""
    other = run({**batch, "image": np.roll(batch["image"], 8, axis=2)})
    assert changed(other["image_embed"], out["image_embed"]).all()


# Embeddings, shapes, sizes


def test_embeddings_have_length_1_and_differ(out):
    for name in ("image_embed", "text_embed"):
        close(np.linalg.norm(out[name].astype(np.float64), axis=1), np.ones(4), 1e-6)
        cosines = out[name] @ out[name].T
        assert cosines[~np.eye(4, dtype=bool)].max() < 0.999


def test_the_vector_of_an_image_is_the_mean_of_its_tokens(out):
    close(out["vector"], out["image_tokens"].mean(1))
    close(out["image_embed"], out["vector"] / np.linalg.norm(out["vector"], axis=1, keepdims=True))


def test_the_encoder_says_what_it_sees_and_how_it_lies(batch):
    graphdef, params = weights()
    encoded = jax.jit(lambda params, image: nnx.merge(graphdef, params).vision(image))(
        params, batch["image"]
    )
    assert encoded.tokens.shape == (4, 4, 32) and encoded.grid == (2, 2)
    close(encoded.pooled, np.asarray(encoded.tokens).mean(1))


def test_one_training_forward_equals_the_passes_one_by_one(batch, out):
    graphdef, params = weights()

    @jax.jit
    def two_pass(params, batch):
        both = nnx.merge(graphdef, params).two_pass(
            batch["image"], batch["tokens"], batch["text_valid"]
        )
        return both.image_embed, both.text_embed, both.features

    image_embed, text_embed, features = two_pass(params, batch)
    close(image_embed, out["image_embed"])
    close(text_embed, out["text_embed"])
    close(features, out["caption_features"])


def test_without_validity_all_tokens_count(batch):
    graphdef, params = weights()
    logits = jax.jit(lambda p, *a: nnx.merge(graphdef, p).caption_logits(*a))(
        params, batch["image"], batch["tokens"]
    )
    everything = run({**batch, "text_valid": np.ones_like(batch["text_valid"])})
    close(logits, everything["logits"])
    assert logits.shape == (4, LENGTH, VOCAB)


def test_an_image_of_another_size_is_refused(batch):
    for shape in ((1, 24, 16, 3), (1, 16, 24, 3), (1, 32, 32, 3)):
        with pytest.raises(
            ValueError,
            match=rf"\({shape[1]}, {shape[2]}, 3\).*\(16, 16, 3\).*VisionConfig.image_size",
        ):
            tiny_model().encode_image(np.zeros(shape, np.uint8))


def test_a_text_that_is_too_long_is_refused(batch):
    tokens, valid = np.ones((1, 13), np.int32), np.ones((1, 13), bool)
    with pytest.raises(ValueError, match="13 tokens, DecoderConfig.max_length is 12"):
        tiny_model().encode_text(tokens, valid)
    with pytest.raises(ValueError, match="DecoderConfig.max_length"):
        tiny_model().caption_logits(batch["image"][:1], tokens, valid)


@pytest.mark.parametrize("every", [1, 2, 4])
def test_there_is_a_cross_attention_layer_for_every_kth_layer(every):
    config = with_text(CONFIG, cross_attn_every=every)
    params = nnx.to_pure_dict(weights(config)[1])
    for name, depth in (("layers", 4), ("cross_layers", 4 // every)):
        assert {len(leaf) for leaf in jax.tree.leaves(params["text"][name])} == {depth}


def test_a_tied_head_is_the_embedding_and_a_separate_one_a_matrix_of_its_own(batch, out):
    config = with_text(CONFIG, tie_embeddings=False)
    params = nnx.to_pure_dict(weights(config)[1])
    assert params["text"]["vocab_head"]["kernel"].shape == (WIDTH, VOCAB)
    assert "vocab_head" not in nnx.to_pure_dict(weights()[1])["text"]
    assert num_params(config)["total"] - num_params(CONFIG)["total"] == WIDTH * VOCAB
    other = run(batch, config)
    close(other["caption_features"], out["caption_features"])
    close(
        other["logits"],
        out["caption_features"] @ np.asarray(params["text"]["vocab_head"]["kernel"]),
        1e-4,
    )
    close(
        out["logits"],
        out["caption_features"] @ np.asarray(params["text"]["token_embed"]["embedding"]).T,
        1e-4,
    )


def test_a_zero_vector_stays_zero_with_a_finite_gradient_and_length_does_not_matter():
    x = jnp.array([[0.0, 0.0], [3.0, 4.0], [3e-6, 4e-6]])
    np.testing.assert_allclose(unit(x), [[0, 0], [0.6, 0.8], [0.6, 0.8]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: unit(x).sum())(x)).all()


# Pixels


def test_patches_are_cut_row_by_row():
    """A picture whose pixels say where they are."""
    down, across = np.mgrid[:6, :9]
    image = np.stack([down, across, 0 * down], -1).astype(np.float32)[None]
    patches = np.asarray(vit.patchify(image, 3)).reshape(6, 3, 3, 3)
    for patch, (top, left) in zip(patches, [(0, 0), (0, 3), (0, 6), (3, 0), (3, 3), (3, 6)]):
        np.testing.assert_array_equal(patch, image[0, top : top + 3, left : left + 3])


def test_what_no_whole_patch_covers_is_cut_off_as_by_a_convolution_without_padding():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, 13, 11, 3)).astype(np.float32)
    kernel = rng.normal(size=(4, 4, 3, 5)).astype(np.float32)
    expected = np.zeros((2, 3, 2, 5))
    for down in range(3):
        for across in range(2):
            part = image[:, 4 * down : 4 * down + 4, 4 * across : 4 * across + 4]
            expected[:, down, across] = np.einsum("bhwc,hwcd->bd", part, kernel)
    ours = np.asarray(vit.patchify(image, 4)) @ kernel.reshape(48, 5)
    np.testing.assert_allclose(ours.reshape(2, 3, 2, 5), expected, atol=1e-4)


def test_an_encoder_that_cuts_the_rest_off_gives_the_tokens_of_the_part_that_is_left():
    whole = tiny_config().vision
    cut = dataclasses.replace(whole, image_size=21, low_image_size=11, cut_rest=True)
    assert (cut.grid, cut.num_tokens, cut.covered_size) == ((2, 2), 4, 16)
    config = dataclasses.replace(tiny_config(), vision=cut)
    image = np.random.default_rng(0).integers(0, 256, (1, 21, 21, 3), np.uint8)
    model, other = tiny_model(config), tiny_model()
    expected = other.encode_image(image[:, :16, :16])
    np.testing.assert_array_equal(model.encode_image(image), expected)
    assert model.image_tokens(image[:, :11, :11]).grid == (1, 1)  # the smaller size
    half = model.image_tokens(image, Augment(jax.random.key(0), AugmentConfig(patch_drop=0.5)))
    assert half.tokens.shape[1] == 2
    with pytest.raises(ValueError, match=r"\(16, 16, 3\), expected \(21, 21, 3\)"):
        model.encode_image(image[:, :16, :16])


@pytest.mark.parametrize("patch", range(6))
def test_one_bright_patch_is_one_token(patch):
    image = np.zeros((1, 8, 12, 3), np.float32)
    top, left = divmod(patch, 3)
    image[:, 4 * top : 4 * top + 4, 4 * left : 4 * left + 4] = 1
    np.testing.assert_array_equal(
        np.asarray(vit.patchify(image, 4))[0].mean(1), np.arange(6) == patch
    )


def test_bytes_are_normalised_as_the_config_says(batch):
    config = with_vision(CONFIG, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.25, 0.3))
    normalised = (batch["image"] / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]
    graphdef, params = weights(config)
    encode = jax.jit(lambda params, image: nnx.merge(graphdef, params).encode_image(image))
    close(encode(params, batch["image"]), encode(params, normalised.astype(np.float32)))
    assert changed(
        encode(params, batch["image"]), encode(params, batch["image"] / np.float32(255))
    ).all()


# Numbers, against a second implementation in float64


def np_norm(x, p, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * p[
        "scale"
    ] + p["bias"]


def np_gelu(x, activation):
    if activation == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def np_layer(x, p, config, kv=None, mask=None):
    """One example [L, D]: p holds the parameters, mask bool[L, S]."""
    y = np_norm(x, p["attn_norm"], config.norm_eps)
    source = y if kv is None else kv
    attended = np.zeros_like(x)
    for head in range(config.num_heads):
        query, key, value = (
            z @ p["attn"][name]["kernel"][:, head] + p["attn"][name]["bias"][head]
            for name, z in (("query", y), ("key", source), ("value", source))
        )
        scores = query @ key.T / np.sqrt(config.width / config.num_heads)
        if mask is not None:
            scores = np.where(mask, scores, -1e30)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        attended += (
            shares / shares.sum(-1, keepdims=True) @ value @ p["attn"]["out"]["kernel"][head]
        )
    x = x + attended + p["attn"]["out"]["bias"]
    y = np_norm(x, p["mlp_norm"], config.norm_eps)
    hidden = np_gelu(y @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"], config.activation)
    return x + hidden @ p["mlp"]["down"]["kernel"] + p["mlp"]["down"]["bias"]


def np_model(p, config, image, tokens, text_valid):
    """One example: its image embedding, its text embedding, its logits."""

    def at(stack, i):
        return jax.tree.map(lambda leaf: leaf[i], stack)

    size = config.vision.patch_size
    x = np.stack(
        [
            (image[top : top + size, left : left + size] / 255 - 0.5).ravel() / 0.5
            for top in range(0, image.shape[0], size)
            for left in range(0, image.shape[1], size)
        ]
    )
    vision, text = p["vision"], p["text"]
    x = x @ vision["patch_embed"]["kernel"] + vision["patch_embed"]["bias"]
    x = x + vision["pos_embed"].reshape(len(x), -1)
    for i in range(config.vision.depth):
        x = np_layer(x, at(vision["layers"], i), config.vision)
    x = np_norm(x, vision["norm"], config.vision.norm_eps)
    image_tokens = x @ p["image_projection"]["kernel"] + p["image_projection"]["bias"]

    embedded = text["token_embed"]["embedding"][tokens] + text["pos_embed"][: len(tokens)]
    contrastive = caption = embedded
    bidirectional = np.tile(text_valid, (len(tokens), 1))
    causal = bidirectional & np.tri(len(tokens), dtype=bool)
    for i in range(config.text.depth):
        contrastive = np_layer(contrastive, at(text["layers"], i), config.text, mask=bidirectional)
        caption = np_layer(caption, at(text["layers"], i), config.text, mask=causal)
        if (i + 1) % config.text.cross_attn_every == 0:
            cross = at(text["cross_layers"], i // config.text.cross_attn_every)
            caption = np_layer(caption, cross, config.text, kv=image_tokens)
    contrastive = np_norm(contrastive, text["norm"], config.text.norm_eps)[text_valid]
    logits = (
        np_norm(caption, text["norm"], config.text.norm_eps) @ text["token_embed"]["embedding"].T
    )
    embeds = (x / np.linalg.norm(x) for x in (image_tokens.mean(0), contrastive.mean(0)))
    return *embeds, logits


def float64(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(params))


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        with_text(
            with_vision(CONFIG, activation="gelu", norm_eps=1e-2),
            cross_attn_every=1,
            activation="gelu",
        ),
    ],
    ids=["tanh, every second", "erf, every one"],
)
def test_the_whole_model_equals_a_second_implementation(batch, config):
    out, params = run(batch, config), float64(weights(config)[1])
    for row in range(4):
        image, tokens, text_valid = (value[row] for value in batch.values())
        image_embed, text_embed, logits = np_model(params, config, image, tokens, text_valid)
        close(out["image_embed"][row], image_embed, 2e-5)
        close(out["text_embed"][row], text_embed, 2e-5)
        close(out["logits"][row][text_valid], logits[text_valid], 2e-4)


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_a_layer_equals_a_second_implementation(kind):
    rng = np.random.default_rng(0)
    x, kv = rng.normal(size=(2, 5, WIDTH)), rng.normal(size=(2, 7, WIDTH))
    mask = rng.random((2, 1, 5, 5)) < 0.6
    mask[:, :, range(5), range(5)] = True
    graphdef, params = nnx.split(Layer(CONFIG.text, dtypes=FLOAT32))
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), params
    )

    @jax.jit
    def run(params, x, kv, mask):
        layer = nnx.merge(graphdef, params)
        return layer(x, mask=mask) if kind == "self" else layer(x, layer.attn.keys_values(kv))

    actual = run(params, jnp.float32(x), jnp.float32(kv), mask)
    for row in range(2):
        if kind == "self":
            expected = np_layer(x[row], float64(params), CONFIG.text, mask=mask[row, 0])
        else:
            expected = np_layer(x[row], float64(params), CONFIG.text, kv=kv[row])
        close(actual[row], expected, 2e-5)


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_layer_norm_divides_by_the_root_of_variance_plus_eps(eps):
    """A row of variance 1e-4: with an eps of 1e-3 it comes out at 0.30 of its length."""
    norm = initialise(LayerNorm(2, eps, dtypes=FLOAT32), jax.random.key(0))
    x = jnp.array([[5.01, 4.99]])
    expected = 0.01 / math.sqrt(1e-4 + eps)
    np.testing.assert_allclose(norm(x), [[expected, -expected]], rtol=1e-3)


def test_layer_norm_of_bfloat16_has_statistics_in_float32():
    """Around 3, bfloat16 has steps of 1/64.

    A mean rounded to one would be off by up to an eighth of this spread.
    """
    x = jnp.asarray(3 + 0.06 * np.random.default_rng(0).normal(size=(20, 64)), jnp.bfloat16)
    y = initialise(LayerNorm(64, 1e-6, dtypes=FLOAT32), jax.random.key(0))(x)
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize(
    ("activation", "at_1", "at_minus_2"),
    [("gelu", 0.841345, -0.045500), ("gelu_tanh", 0.841192, -0.045402)],
)
def test_the_two_kinds_of_gelu(activation, at_1, at_minus_2):
    """x times the normal distribution's share below x, and its approximation.

    They differ in the fourth digit.
    """
    config = LayerConfig(width=1, num_heads=1, mlp_dim=1, activation=activation)
    mlp = initialise(MLP(config, dtypes=FLOAT32), jax.random.key(0))
    for linear in (mlp.up, mlp.down):
        linear.kernel[...] = jnp.ones((1, 1))
    np.testing.assert_allclose(
        mlp(jnp.array([[[1.0], [-2.0]]]))[0, :, 0], [at_1, at_minus_2], atol=2e-6
    )


def test_a_query_without_a_key_attends_evenly_and_is_finite():
    rng = np.random.default_rng(0)
    query, key, value = (jnp.float32(rng.normal(size=(1, 3, 2, 4))) for _ in range(3))
    mask = jnp.array([[[[True, False, False], [False, False, False], [True, True, True]]]])
    out, grad = jax.value_and_grad(lambda q: dot_product_attention(q, key, value, mask).sum())(
        query
    )
    assert np.isfinite(out) and np.isfinite(grad).all()
    attended = dot_product_attention(query, key, value, mask)
    close(attended[0, 0], value[0, 0])
    close(attended[0, 1], value[0].mean(0))


# Initial weights


def test_initial_weights_have_the_documented_spread():
    make = jax.jit(
        lambda seed: nnx.state(
            MaMMUT(CONFIG, rngs=nnx.Rngs(params=jax.random.key(seed))), nnx.Param
        )
    )
    params, other = (nnx.to_pure_dict(jax.tree.map(np.asarray, make(seed))) for seed in (0, 1))
    # CLIP's inverse temperature; a run begins with that of its loss.
    assert params["logit_scale"] == pytest.approx(math.log(1 / 0.07)) and params["logit_bias"] == 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if "'bias'" in name:
            assert (leaf == 0).all(), name
        elif "'scale'" in name:
            assert (leaf == 1).all(), name
        elif "'kernel'" in name:
            stacked = leaf.reshape(-1, *leaf.shape[-(2 + ("'attn'" in name)) :])
            fan_in = math.prod(stacked.shape[1:3]) if "'out'" in name else stacked.shape[1]
            assert stacked.std() * math.sqrt(fan_in) == pytest.approx(1, abs=0.1), name
            assert all(changed(layer.ravel(), stacked[0].ravel()) for layer in stacked[1:]), (
                f"{name}: copies"
            )
    assert params["text"]["token_embed"]["embedding"].std() == pytest.approx(0.02, rel=0.1)
    assert (
        np.abs(
            params["text"]["token_embed"]["embedding"] - other["text"]["token_embed"]["embedding"]
        ).min()
        > 0
    )


# Precision


def abstract_out(compute, batch):
    graphdef, params = weights(CONFIG, compute)
    shapes = jax.eval_shape(lambda p, b: forward(nnx.merge(graphdef, p), **b), params, batch)
    return jax.tree.map(lambda leaf: leaf.dtype.name, shapes)


def test_bfloat16_compute_keeps_parameters_embeddings_logits_and_losses_in_float32(batch):
    compute = ComputeConfig(dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(weights(CONFIG, compute)[1])} == {"float32"}
    kinds = abstract_out(compute, batch)
    for name in ("image_tokens", "contrastive_features", "caption_features"):
        assert kinds[name] == "bfloat16", name
    for name in ("logits", "image_embed", "text_embed", "token_losses"):
        assert kinds[name] == "float32", name
    assert set(kinds["metrics"].values()) == {"float32"}
    assert set(jax.tree.leaves(abstract_out(ComputeConfig(), batch))) == {"float32"}


def test_bfloat16_storage_keeps_the_logit_scale_in_float32():
    params = nnx.to_pure_dict(weights(CONFIG, ComputeConfig(param_dtype="bfloat16"))[1])
    kinds = {
        jax.tree_util.keystr(path): leaf.dtype.name
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert {name for name, kind in kinds.items() if kind == "float32"} == {
        "['logit_scale']",
        "['logit_bias']",
    }
    assert set(kinds.values()) == {"float32", "bfloat16"}


def test_bfloat16_compute_says_nearly_the_same(batch, out):
    other = run(batch, compute=ComputeConfig(dtype="bfloat16"))
    for name in ("image_embed", "text_embed"):
        assert ((other[name] * out[name]).sum(1) > 0.995).all()
    close(other["metrics"]["loss_caption"], out["metrics"]["loss_caption"], 0.05)


# Memory policies: the same numbers


@functools.cache
def tower():
    """Four layers of width 48 in one stack, and something to put through them."""
    graphdef, params = nnx.split(stack(Layer(CONFIG.text, dtypes=FLOAT32), 4))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32), params
    )
    return graphdef, params, jnp.float32(rng.normal(size=(2, 5, WIDTH)))


def through(remat, unroll):
    graphdef, params, x = tower()

    def run(params, x):
        return scan(
            lambda x, layer: layer(x), x, nnx.merge(graphdef, params), remat=remat, unroll=unroll
        )

    return run, params, x


@functools.cache
def through_gradients(remat, unroll):
    run, params, x = through(remat, unroll)
    return jax.jit(jax.value_and_grad(lambda *args: (run(*args) ** 2).sum(), argnums=(0, 1)))(
        params, x
    )


@pytest.mark.parametrize(
    ("remat", "unroll"),
    [("none", 3), long("none", 100), long("dots", 1), ("dots", 4), ("full", 1), long("full", 3)],
)
def test_neither_recomputing_nor_unrolling_changes_a_tower_or_its_gradients(remat, unroll):
    """Three layers at a time do not divide the four there are."""
    close(through_gradients(remat, unroll), through_gradients("none", 1), 2e-5)


def test_what_is_recomputed_is_not_kept_for_the_backward_pass():
    kept = {}
    for remat in ("none", "dots", "full"):
        run, params, x = through(remat, 1)
        _, pullback = jax.eval_shape(lambda params, x, run=run: jax.vjp(run, params, x), params, x)
        kept[remat] = sum(leaf.size for leaf in jax.tree.leaves(pullback))
    assert kept["full"] < kept["dots"] < kept["none"]
    own = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert kept["full"] - own == pytest.approx(4 * x.size, rel=0.5)  # the input of each layer


def test_neither_recomputing_nor_unrolling_changes_the_loss_or_its_gradients(batch):
    expected = loss_and_gradients(batch)
    actual = loss_and_gradients(batch, ComputeConfig(unroll=2, remat="full"))
    close(actual, expected)


# Cropped positional embedding


def crop_matrix(start, extent, size):
    return np.asarray(positions._crop_matrix(jnp.float32(start), jnp.float32(extent), size))


def test_a_crop_is_two_linear_interpolations():
    """Compared with NumPy's: positions become 64 cells, which the crop samples at its centres."""
    rng = np.random.default_rng(0)
    for size in (2, 7, 14):
        table = rng.normal(size=size)
        start, extent = np.array([0.0, 0.3, 0.75]), np.array([1.0, 0.5, 0.25])
        enlarged = np.interp((np.arange(64) + 0.5) / 64, (np.arange(size) + 0.5) / size, table)
        actual = crop_matrix(start, extent, size) @ table
        for row in range(3):
            points = start[row] + extent[row] * (np.arange(size) + 0.5) / size
            np.testing.assert_allclose(
                actual[row], np.interp(points, (np.arange(64) + 0.5) / 64, enlarged), atol=2e-5
            )


def test_the_whole_box_gives_the_table_back_but_for_the_resampling():
    for size in (4, 14, 16):
        matrix = crop_matrix([0.0], [1.0], size)[0]
        assert np.diag(matrix).min() > 0.8
        far = np.abs(np.subtract.outer(np.arange(size), np.arange(size))) > 1
        assert np.abs(matrix[far]).max() < 1e-6


def test_a_crop_is_an_average_and_keeps_a_ramp_inside():
    size = 14
    start, extent = np.array([0.0, 0.2, 0.5]), np.array([1.0, 0.6, 0.5])
    matrix = crop_matrix(start, extent, size)
    np.testing.assert_allclose(matrix.sum(-1), 1, atol=1e-5)
    assert matrix.min() >= 0
    ramp = (np.arange(size) + 0.5) / size  # the place of a position, in 0..1
    points = start[:, None] + extent[:, None] * ramp
    inside = (points > 1 / size) & (points < 1 - 1 / size)
    assert inside.sum(1).min() >= 11
    np.testing.assert_allclose((matrix @ ramp)[inside], points[inside], atol=1e-5)


def test_crops_are_boxes_inside_the_image_of_the_documented_area_and_aspect():
    """Positions that say where they are.

    Their slope tells the box's extent, their middle where it lies.
    """
    size, number = 16, 512
    ramp = (np.arange(size, dtype=np.float32) + 0.5) / size
    table = np.stack(np.meshgrid(ramp, ramp, indexing="ij"), -1)
    crops = np.asarray(positions.crop_pos_embed(jax.random.key(0), jnp.asarray(table), number))
    assert crops.shape == (number, size, size, 2)
    middle = crops[:, 7:9, 7:9]
    height = (middle[:, 1, 0, 0] - middle[:, 0, 0, 0]) * size
    width = (middle[:, 0, 1, 1] - middle[:, 0, 0, 1]) * size
    area, aspect = height * width, width / height
    centre = middle.mean((1, 2))
    assert (centre[:, 0] - height / 2 > -1e-4).all() and (
        centre[:, 0] + height / 2 < 1 + 1e-4
    ).all()
    assert (centre[:, 1] - width / 2 > -1e-4).all() and (centre[:, 1] + width / 2 < 1 + 1e-4).all()
    assert area.min() > 0.099 and area.max() < 1.001 and area.min() < 0.13 and area.max() > 0.85
    # a box too long for the image is cut, which moves its aspect
    whole_sides = (height > 0.999) | (width > 0.999)
    assert (0.499 < aspect).all() and (aspect < 2.001).all() and not whole_sides.all()
    assert aspect.min() < 0.55 and aspect.max() > 1.85
    assert np.median(aspect) == pytest.approx(1, abs=0.1)  # as often tall as wide
    assert np.median(area) == pytest.approx(0.55, abs=0.06)  # uniform in 0.1..1


@pytest.fixture(scope="module")
def cropped(batch):
    """Image tokens of two equal images, with crops of the positions drawn where there is a key."""
    graphdef, params = weights()
    image = np.repeat(batch["image"][:1], 2, axis=0)

    @jax.jit
    def encode(params, image, augment):
        return nnx.merge(graphdef, params).image_tokens(image, augment).tokens

    def tokens(key=None):
        augment = Augment()
        if key is not None:
            augment = Augment(key, AugmentConfig(crop_positions=True))
        return np.asarray(encode(params, image, augment))

    return tokens


def test_with_a_key_every_image_has_a_crop_of_its_own(cropped):
    tokens = cropped(jax.random.key(0))
    assert changed(tokens[0], tokens[1]).any()
    np.testing.assert_array_equal(tokens, cropped(jax.random.key(0)))
    assert changed(tokens, cropped(jax.random.key(1))).any(1).all()


def test_without_a_key_nothing_is_random_and_positions_are_whole(cropped, batch, out):
    tokens = cropped()
    np.testing.assert_array_equal(tokens[0], tokens[1])
    close(tokens[0], out["image_tokens"][0])
    assert changed(tokens, cropped(jax.random.key(0))).any(1).all()


def test_a_key_changes_nothing_where_positions_are_not_cropped(batch, out):
    graphdef, params = weights()
    encode = jax.jit(lambda p, x, augment: nnx.merge(graphdef, p).encode_image(x, augment))
    close(encode(params, batch["image"], Augment(jax.random.key(3))), out["image_embed"])


def test_the_defaults_are_those_of_vit_not_of_flax():
    """LayerNorm's eps of 1e-6 and the tanh approximation of GELU, in both towers."""
    for tower in (VisionConfig(), tiny_config().text):
        assert tower.norm_eps == 1e-6 and tower.activation == "gelu_tanh"
