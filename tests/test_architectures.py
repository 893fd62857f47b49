"""The models of others as values of the config.

The tests must hold for each, whatever its pooling, masks and slots.
"""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from marks import long

from mammut.config import DecoderConfig, LossConfig, MeshConfig, ModelConfig, VisionConfig
from mammut.core import sharding
from mammut.core.params import logical_axes
from mammut.generation.likelihood import text_logprob
from mammut.models.cached_decoder import cached_step, prefill
from mammut.models.compute import Augment
from mammut.models.flops import num_params
from mammut.models.mammut import MaMMUT
from mammut.testing import tiny_batch, tiny_model
from mammut.training.tasks import ImageTextTask, TextTask

LENGTH, VOCAB, WIDTH = 8, 50, 24
VISION = VisionConfig(image_size=16, patch_size=8, width=32, depth=2, num_heads=2, mlp_dim=48)
TEXT = DecoderConfig(
    vocab_size=VOCAB,
    max_length=LENGTH,
    width=WIDTH,
    depth=4,
    num_heads=3,
    mlp_dim=40,
    tie_embeddings=False,
)
CLIP_VISION = dataclasses.replace(
    VISION,
    activation="gelu",
    norm_eps=1e-5,
    patch_bias=False,
    class_token=True,
    input_norm=True,
    norm_after_pooling=True,
)
CLIP_TEXT = dataclasses.replace(
    TEXT, activation="gelu", norm_eps=1e-5, cross_attn_position="first", image_norm=True
)
OPENMAMMUT = ModelConfig(
    dataclasses.replace(CLIP_VISION, pooling="mean_all"),
    dataclasses.replace(CLIP_TEXT, pooling="mean_all", pad_masking="none", pad_id=0),
    image_projection="separate",
    projection_bias=False,
)
MAMMUT2 = ModelConfig(
    CLIP_VISION,
    dataclasses.replace(CLIP_TEXT, pad_masking="contrastive"),
    embed_dim=20,
    image_projection="separate",
    text_projection=True,
    projection_bias=False,
)
BIASLESS = {"norm": "rms", "attn_bias": False, "mlp_bias": False}
CONFIGS = {
    "openmammut": OPENMAMMUT,
    "openmammut_small": dataclasses.replace(
        OPENMAMMUT, text=dataclasses.replace(OPENMAMMUT.text, cross_attn_position="first_bare")
    ),
    "bare_last": dataclasses.replace(
        OPENMAMMUT,
        text=dataclasses.replace(TEXT, cross_attn_every=4, cross_attn_position="last_bare"),
    ),
    "mammut2": MAMMUT2,
    "moderntext": dataclasses.replace(
        MAMMUT2,
        text=dataclasses.replace(
            TEXT, **BIASLESS, activation="swiglu", positions="rope", cross_attn_position="inside",
            qk_norm=True, attn_gate=True, pad_masking="contrastive", pooling="end",
        ),
    ),
    "coca": ModelConfig(
        dataclasses.replace(
            CLIP_VISION, pooling="queries", pool_queries=5, pool_heads=4, activation="quick_gelu",
            norm_after_pooling=False,
        ),
        dataclasses.replace(
            CLIP_TEXT, depth=2, text_only_depth=3, cross_attn_every=1, pooling="class",
            causal_contrastive=True, pad_masking="shifted", pad_id=0,
        ),
        image_projection="embedding",
        text_projection=True,
        projection_bias=False,
    ),
    "pad_by_id": ModelConfig(VISION, dataclasses.replace(TEXT, pad_id=0)),
    "siglip": ModelConfig(
        dataclasses.replace(VISION, pooling="map"),
        dataclasses.replace(TEXT, depth=0, text_only_depth=2, pooling="last", pad_masking="none"),
        embed_dim=32,
        image_projection="none",
        text_projection=True,
    ),
    "cappa": ModelConfig(
        VISION,
        dataclasses.replace(
            TEXT, cross_attn_every=1, cross_attn_position="inside", pooling="none",
            attn_bias=False, mlp_bias=False, vocab_bias=True, activation="relu2",
        ),
        image_projection="none",
    ),
    # What neither paper has: MAGMA's image prefix with both losses, cross-attention in the layers
    # of GPT-J.
    "prefix": ModelConfig(
        VISION,
        dataclasses.replace(TEXT, cross_attn_every=0, max_length=LENGTH + 3),
        prefix_norm=True,
    ),
    "gptj": ModelConfig(
        VISION,
        dataclasses.replace(
            TEXT, cross_attn_every=1, positions="rope", rope_dims=4, layout="parallel",
            attn_bias=False, vocab_bias=True,
        ),
    ),
}  # fmt: skip
CAPTIONING = [name for name, config in CONFIGS.items() if config.text.depth]
CONTRASTIVE = [name for name, config in CONFIGS.items() if config.text.pooling != "none"]
BOTH = [name for name in CAPTIONING if name in CONTRASTIVE]


@functools.cache
def weights(name: str):
    return nnx.split(tiny_model(CONFIGS[name]))


def batch_of(name: str, **options):
    return tiny_batch(CONFIGS[name], **options)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(method, graphdef, params, *args):
    return getattr(nnx.merge(graphdef, params), method)(*args)


def call(name: str, method: str, *args) -> np.ndarray:
    return np.asarray(call_tree(name, method, *args))


def call_tree(name: str, method: str, *args):
    return _call(method, *weights(name), *args)


@functools.partial(jax.jit, static_argnums=0)
def _cached_logits(graphdef, params, image, tokens):
    """Logits of every position, from a prompt of two tokens and then one token at a time."""
    model = nnx.merge(graphdef, params)
    features, cache = prefill(
        model.text, tokens[:, :2], model.image_tokens(image).tokens, tokens.shape[1]
    )

    def step(cache, inputs):
        features, cache = cached_step(model.text, *inputs, cache)
        return cache, model.text.logits(features)

    positions = jnp.arange(2, tokens.shape[1])
    _, rest = jax.lax.scan(step, cache, (tokens[:, 2:].T, positions))
    # a prefix stands before the prompt
    return jnp.concatenate([model.text.logits(features[:, -2:]), rest.swapaxes(0, 1)], axis=1)


@pytest.mark.parametrize(
    "name",
    [
        long("openmammut_small"),
        long("bare_last"),
        "moderntext",
        "coca",
        "cappa",
        "pad_by_id",
        "prefix",
        "gptj",
    ],
)
def test_the_cached_step_equals_the_full_pass(name):
    """Also behind a token that passes for a pad: id 0 inside a text."""
    batch = batch_of(name)
    tokens = batch["tokens"].copy()
    tokens[:, 3] = 0
    graphdef, params = weights(name)
    full = call(name, "caption_logits", batch["image"], tokens)
    np.testing.assert_allclose(
        _cached_logits(graphdef, params, batch["image"], tokens), full, atol=2e-5
    )


@pytest.mark.parametrize("name", CAPTIONING)
def test_a_later_token_changes_no_earlier_logit_and_the_image_changes_them(name):
    batch = batch_of(name)
    logits = call(name, "caption_logits", batch["image"], batch["tokens"])
    other = batch["tokens"].copy()
    other[:, 5] = (other[:, 5] + 7) % VOCAB
    changed = call(name, "caption_logits", batch["image"], other)
    np.testing.assert_allclose(changed[:, :5], logits[:, :5], atol=1e-5)
    assert np.abs(changed[:, 5] - logits[:, 5]).max() > 1e-3
    assert (
        np.abs(call(name, "caption_logits", batch["image"][::-1], batch["tokens"]) - logits).max()
        > 1e-3
    )


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_embeddings_are_unit_vectors_of_the_shared_size(name):
    batch, size = batch_of(name), CONFIGS[name].embed_size
    for embed in (
        call(name, "encode_image", batch["image"]),
        call(name, "encode_text", batch["tokens"], batch["text_valid"]),
    ):
        assert embed.shape == (4, size)
        np.testing.assert_allclose(np.linalg.norm(embed, axis=1), 1, atol=1e-5)
        assert np.abs(embed[0] - embed[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "same"),
    [("mammut2", True), ("moderntext", True), ("openmammut", False), ("siglip", False)],
)
def test_only_a_model_that_masks_its_pads_does_not_see_them(name, same):
    """openMaMMUT and SigLIP are trained with pads among the tokens.

    More pads give another embedding.
    """
    batch = batch_of(name)
    tokens, valid = batch["tokens"], np.arange(LENGTH)[None].repeat(4, 0) < 5
    short = call(name, "encode_text", tokens[:, :5], valid[:, :5])
    difference = np.abs(call(name, "encode_text", tokens * valid, valid) - short).max()
    assert difference < 1e-5 if same else difference > 1e-3


def test_an_id_that_is_a_pad_by_config_is_one_wherever_it_stands():
    """In CLIP's vocabulary 0 is a pad and "!".

    CoCa hides the token after it, and no loss is taken of it.
    """
    tokens = np.random.default_rng(0).integers(1, VOCAB, (4, LENGTH), np.int32)
    tokens[:, 3] = 0
    valid = np.ones(tokens.shape, bool)
    without = valid.copy()
    without[:, 3] = False
    np.testing.assert_array_equal(
        call("coca", "encode_text", tokens, valid), call("coca", "encode_text", tokens, without)
    )
    model = nnx.merge(*weights("coca"))
    masked = {"tokens": jnp.asarray(tokens), "text_valid": jnp.asarray(valid)}
    # All but the start and the pad.
    assert int(ImageTextTask(LossConfig()).caption_tokens(model, masked)) == 4 * (LENGTH - 2)


def test_the_probability_of_a_text_is_of_the_tokens_the_loss_is_of():
    """Where an id passes for a pad, nothing was learnt of it as a label."""
    model, batch = nnx.merge(*weights("pad_by_id")), batch_of("pad_by_id", batch_size=1)
    tokens, valid = batch["tokens"].copy(), np.ones((1, LENGTH), bool)
    tokens[:, 3] = 0
    image_tokens = call_tree("pad_by_id", "image_tokens", batch["image"]).tokens
    found = jax.jit(text_logprob)(
        model, image_tokens, np.array([0]), jnp.asarray(tokens), jnp.asarray(valid)
    )
    logp = jax.nn.log_softmax(call("pad_by_id", "caption_logits", batch["image"], tokens)[0])
    expected = sum(logp[i, tokens[0, i + 1]] for i in range(LENGTH - 1) if tokens[0, i + 1] != 0)
    np.testing.assert_allclose(found, [expected], rtol=1e-5)


def test_in_coca_the_token_after_a_pad_is_hidden_and_not_the_pad():
    """By hand: what open_clip's misplaced mask says of one text with a pad in the middle."""
    batch = batch_of("coca")
    tokens, valid = batch["tokens"][:1], np.ones((1, LENGTH), bool)
    valid[0, 3] = False
    reference = call("coca", "encode_text", tokens, valid)
    for place, hidden in ((3, False), (4, True)):
        other = tokens.copy()
        other[0, place] = (other[0, place] + 7) % VOCAB or 1
        changed = np.abs(call("coca", "encode_text", other, valid) - reference).max()
        assert (changed < 1e-6) == hidden, place


def test_with_an_image_prefix_the_caption_pass_alone_sees_the_image():
    batch, (graphdef, params) = batch_of("prefix"), weights("prefix")
    two_pass = jax.jit(
        lambda image: nnx.merge(graphdef, params).two_pass(
            image, batch["tokens"], batch["text_valid"]
        )
    )
    out, turned = two_pass(batch["image"]), two_pass(batch["image"][::-1])
    np.testing.assert_array_equal(turned.text_embed, out.text_embed)
    np.testing.assert_allclose(turned.image_embed, out.image_embed[::-1], atol=1e-6)
    assert np.abs(turned.features - out.features).max(-1).min() > 1e-3  # at every token


@pytest.mark.parametrize(
    "name",
    [
        long("openmammut_small"),
        long("moderntext"),
        "coca",
        "siglip",
        "cappa",
        "prefix",
        long("gptj"),
    ],
)
def test_every_parameter_is_trained_by_the_losses_the_model_has(name):
    config = CONFIGS[name]
    graphdef, params = weights(name)
    batch = jax.tree.map(jnp.asarray, batch_of(name) | {"target": batch_of(name)["text_valid"]})
    pairs = ImageTextTask(LossConfig(contrastive="sigmoid"))

    def loss(model):
        if name == "siglip":
            image_embed = model.encode_image(batch["image"])
            text_embed = model.encode_text(batch["tokens"], batch["text_valid"])
            return pairs.contrastive(model, image_embed, text_embed)
        task = TextTask(LossConfig(), "captions") if name == "cappa" else pairs
        return task.loss(model, batch, Augment(jax.random.key(0)))[0]

    grads = jax.jit(jax.grad(lambda params: loss(nnx.merge(graphdef, params))))(params)
    untrained = {
        jax.tree_util.keystr(path)
        for path, grad in jax.tree_util.tree_leaves_with_path(grads)
        if not np.abs(grad).max() > 0
    }
    scalars = {name for name in untrained if "logit" in name}
    assert untrained == scalars and (config.text.pooling == "none") == bool(scalars)


@pytest.mark.parametrize("name", [
    long("openmammut_small"), long("moderntext"), long("coca"), "siglip", "prefix",
])  # fmt: skip
def test_eight_devices_say_what_one_says(name):
    config, batch = CONFIGS[name], batch_of(name)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, model=2))
    graphdef, params = weights(name)
    abstract = nnx.eval_shape(lambda: MaMMUT(config, rngs=nnx.Rngs(0)))
    placed = jax.device_put(
        nnx.to_pure_dict(params),
        sharding.param_shardings(
            nnx.to_pure_dict(nnx.state(abstract)), logical_axes(abstract), mesh
        ),
    )

    def outputs(params, image, tokens, valid):
        model = nnx.merge(graphdef, params)
        out = [model.encode_image(image), model.encode_text(tokens, valid)]
        return [*out, model.caption_logits(image, tokens, valid)] if config.text.depth else out

    args = (batch["image"], batch["tokens"], batch["text_valid"])
    expected = jax.jit(outputs)(params, *args)
    with jax.set_mesh(mesh):
        got = jax.jit(outputs)(placed, *(sharding.global_batch(x, mesh) for x in args))
    for one, eight in zip(expected, got):
        np.testing.assert_allclose(eight, one, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_counts_of_parameters_and_image_tokens_are_those_of_the_model(name):
    config = CONFIGS[name]
    leaves = jax.tree.leaves(weights(name)[1])
    assert num_params(config)["total"] == sum(leaf.size for leaf in leaves)
    graphdef, params = weights(name)
    tokens = jax.eval_shape(
        lambda p, x: nnx.merge(graphdef, p).image_tokens(x).tokens, params, batch_of(name)["image"]
    )
    assert tokens.shape[1:] == (config.vision.num_tokens, config.image_token_size)


@pytest.mark.parametrize(
    "name", [name for name in CAPTIONING if CONFIGS[name].conditioning == "cross_attention"]
)
def test_where_the_decoder_looks_sums_to_one_over_what_it_sees(name):
    config, batch = CONFIGS[name], batch_of(name)
    looks = call(name, "cross_attention", batch["image"], batch["tokens"])
    text = config.text
    assert looks.shape == (
        text.num_cross_layers,
        4,
        text.num_heads,
        LENGTH,
        config.vision.num_tokens,
    )
    np.testing.assert_allclose(looks.sum(-1), 1, atol=1e-5)


def test_a_pass_that_a_model_does_not_have_is_refused_by_the_field():
    batch = batch_of("siglip")
    with pytest.raises(ValueError, match="no caption pass: DecoderConfig.depth is 0"):
        call("siglip", "caption_logits", batch["image"], batch["tokens"])
    batch = batch_of("cappa")
    for method, args in (
        ("encode_image", (batch["image"],)),
        ("encode_text", (batch["tokens"], batch["text_valid"])),
    ):
        with pytest.raises(
            ValueError, match="no contrastive pass: DecoderConfig.pooling is 'none'"
        ):
            call("cappa", method, *args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 20}, "embed_dim is 20, which without text_projection is the text width 24"),
        (
            {"vision": dataclasses.replace(VISION, pooling="map")},
            "image_projection is 'shared', which goes with",
        ),
        (
            {"image_projection": "none"},
            "image_projection is 'none', which needs images of 24 numbers, not 32",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_their_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ModelConfig(VISION, TEXT), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"positions": "rope", "num_heads": 8},
            "positions is 'rope', which needs heads of even size, not 3",
        ),
        (
            {"cross_attn_every": 0, "cross_attn_position": "first_bare"},
            "cross_attn_position is 'first_bare', which needs cross-attention",
        ),
        (
            {"cross_attn_position": "inside", "layout": "parallel"},
            "layout is 'parallel', which has no place .* for cross_attn_position 'inside'",
        ),
        ({"pad_masking": "shifted"}, "'shifted', which needs pooling 'class' and text_only_depth"),
        ({"depth": 0}, "depth is 0, expected at least 1 layer"),
        (
            {"depth": 0, "text_only_depth": 2, "vocab_bias": True},
            "vocab_bias is True, which needs a caption pass",
        ),
        ({"pad_id": VOCAB}, "pad_id is 50, expected an id below vocab_size 50"),
        ({"pad_id": -1}, "pad_id is -1, expected an id below vocab_size 50"),
        ({"norm_eps": float("inf")}, "norm_eps is inf, expected a positive number"),
        ({"rope_theta": float("nan")}, "rope_theta is nan, expected a positive number"),
        ({"width": 2**40 * 3}, "width is .*, expected at most 65536"),
    ],
)
def test_a_decoder_that_cannot_be_is_refused_by_its_field(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TEXT, **changes)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_follows_from_other_fields_is_what_the_model_has(name):
    """A class token goes with its pooling, a prefix with the lack of cross-attention.

    No config contradicts itself.
    """
    config, (graphdef, params) = CONFIGS[name], weights(name)
    model = nnx.merge(graphdef, params)
    text = config.text
    assert text.class_token == (text.pooling == "class") == (model.text.class_embed is not None)
    assert (config.conditioning == "prefix") == (text.cross_attn_every == 0) == text.has_prefix
    assert (text.has_prefix or text.depth == 0) == (model.text.cross_layers is None)
    assert text.has_bare_layers == (model.text.bare_layers is not None)
    fields = {field.name for part in (config, text) for field in dataclasses.fields(part)}
    assert not fields & {"class_token", "conditioning", "norm_bias", "mlp_before_cross_attn"}


def test_layers_without_an_mlp_are_those_before_cross_attention():
    """No config asks for a layer that loses the MLP that its cross-attention is inside of."""
    position = DecoderConfig.__dataclass_fields__["cross_attn_position"].type
    choices = typing.get_args(position)
    bare = {
        choice
        for choice in choices
        if dataclasses.replace(TEXT, cross_attn_position=choice).has_bare_layers
    }
    assert bare == {"last_bare", "first_bare"} and "inside" in choices
    for choice, slot in (("last_bare", 1), ("first_bare", 0)):
        text = dataclasses.replace(TEXT, cross_attn_position=choice)
        assert text.cross_attn_slot == slot
