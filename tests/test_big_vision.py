"""Our model under big_vision's contract.

The tests call it as big_vision's trainers and evaluators call a model, without big_vision.
"""

import dataclasses
import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from mammut import presets
from mammut.config import to_dict
from mammut.interop import big_vision
from mammut.models.compute import ComputeConfig
from mammut.models.layers import unit
from mammut.models.losses import contrastive_logits, sigmoid_contrastive
from mammut.models.mammut import MaMMUT
from mammut.models.video import TubeConfig, VideoConfig
from mammut.testing import tiny_config, tiny_model, tiny_processor
from mammut.weights.model_folder import save
from mammut.weights.opened import model_specs
from mammut.weights.resample import resample_positions

CONFIG = tiny_config()
FIELDS = to_dict(CONFIG)
SIZE, LENGTH, VOCAB = CONFIG.vision.image_size, CONFIG.text.max_length, CONFIG.text.vocab_size


class Nested(dict):
    """A dict as big_vision's config files nest them (`ml_collections.ConfigDict`)."""

    def to_dict(self):
        return dict(self)


def fields(**changes) -> dict:
    """Those of the tiny model; "vision" and "text" change some of their own."""
    inner = {name: Nested(FIELDS[name] | changes.pop(name, {})) for name in ("vision", "text")}
    return FIELDS | inner | changes


def params_of(model: MaMMUT) -> dict:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def batch() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (4, SIZE, SIZE, 3)).astype(np.float32)
    return image, rng.integers(2, VOCAB, (4, LENGTH), np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _directly(method: str, model: MaMMUT, *args):
    return getattr(model, method)(*args)


def directly(method: str, *args) -> np.ndarray:
    return np.asarray(_directly(method, tiny_model(), *args))


def test_parameters_are_a_dict_by_their_paths_for_every_way_of_tracing():
    """Trainers take the shapes first, then make the parameters under jit.

    They find parameters by regular expressions.
    """
    model = big_vision.Model(**fields())
    image, text = batch()

    def init(rng):
        return model.init(rng, jnp.zeros(image.shape), jnp.zeros(text.shape, jnp.int64))["params"]

    key = jax.random.PRNGKey(0)
    abstract, params = jax.eval_shape(init, key), jax.jit(init)(key)
    assert jax.tree.structure(abstract) == jax.tree.structure(params)
    flat = flatten_dict(params, sep="/")
    assert all(isinstance(name, str) for path in flatten_dict(params) for name in path)
    assert {name.replace("/", "."): leaf.shape for name, leaf in flat.items()} == {
        name: tuple(spec.shape) for name, spec in model_specs(CONFIG).items()
    }
    decayed = {name for name in flat if re.fullmatch(".*/kernel", name)}
    assert decayed == {name for name in flat if flat[name].ndim > 1 and name.endswith("kernel")}
    assert all(np.ptp(flat[name]) > 0 for name in decayed)
    other = flatten_dict(jax.jit(init)(jax.random.PRNGKey(1)), sep="/")
    assert all((other[name] != flat[name]).any() for name in decayed)


def test_two_towers_are_the_models_own_embeddings():
    model, variables = big_vision.Model(**fields()), {"params": params_of(tiny_model())}
    image, text = batch()
    valid = np.ones(text.shape, bool)
    zimg, ztxt, out = jax.jit(
        lambda v, *x: model.apply(v, *x, train=True, rngs={"dropout": jax.random.PRNGKey(0)})
    )(variables, image, text)
    np.testing.assert_allclose(zimg, directly("encode_image", image), atol=1e-6)
    np.testing.assert_allclose(ztxt, directly("encode_text", text, valid), atol=1e-6)
    np.testing.assert_array_equal(out["img/normalized"], zimg)
    np.testing.assert_array_equal(out["txt/normalized"], ztxt)
    params = variables["params"]
    np.testing.assert_allclose(out["t"], [np.exp(params["logit_scale"])], rtol=1e-6)
    np.testing.assert_array_equal(out["t/parameter"], [params["logit_scale"]])
    np.testing.assert_array_equal(out["b"], [params["logit_bias"]])
    encoded = jax.jit(lambda model, x: model.vision(x))(tiny_model(), image)
    np.testing.assert_allclose(out["img/pre_logits"], encoded.pooled, atol=1e-5)
    vector = jax.jit(lambda model, x: model.image_tokens(x))(tiny_model(), image).vector
    np.testing.assert_allclose(out["img/norm"] * zimg, vector, atol=1e-5)
    np.testing.assert_allclose(
        out["txt/norm"] * ztxt, directly("text_vector", text, valid), atol=1e-5
    )


def test_one_tower_alone_gives_none_for_the_other():
    model, variables = big_vision.Model(**fields()), {"params": params_of(tiny_model())}
    image, text = batch()
    zimg, none, out = jax.jit(lambda v, x: model.apply(v, x, None))(variables, image)
    assert none is None and not any(name.startswith("txt/") for name in out)
    nothing, ztxt, out = jax.jit(lambda v, x: model.apply(v, None, x))(variables, text)
    assert nothing is None and not any(name.startswith("img/") for name in out)
    both = jax.jit(model.apply)(variables, image, text)
    np.testing.assert_allclose(zimg, both[0], atol=1e-6)
    np.testing.assert_allclose(ztxt, both[1], atol=1e-6)


VIDEO = VideoConfig(patch_stride=2, tubes=(TubeConfig((2, 8, 8), (2, 8, 8)),))


@pytest.mark.parametrize("video", [None, VIDEO], ids=["frames", "tubes"])
def test_videos_are_embedded_as_by_the_model(video):
    """`init` takes their shape, `apply` their pixels, all outputs are theirs."""
    config = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, video=video))
    model, ours = big_vision.Model(**to_dict(config)), tiny_model(config)
    videos = np.random.default_rng(0).uniform(-1, 1, (2, 3, SIZE, SIZE, 3)).astype(np.float32)
    text = batch()[1][:2]
    made = jax.eval_shape(lambda: model.init(jax.random.key(0), videos, text))["params"]
    variables = {"params": params_of(ours)}
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, variables["params"])

    @jax.jit
    def outputs(variables, ours):
        zimg, _, out = model.apply(variables, videos, None)
        tokens, features = model.apply(variables, videos, return_enc_features=True)
        frames = ours.vision(videos.reshape(6, SIZE, SIZE, 3)).pooled
        expected = ours.image_tokens(videos)
        own = ours.vision(videos).pooled if video else frames.reshape(2, 3, -1).mean(1)
        return zimg, tokens, out["img/pre_logits"], features["pre_logits"], expected, own

    zimg, tokens, pooled, pre_logits, expected, own = outputs(variables, ours)
    np.testing.assert_allclose(zimg, unit(expected.vector), atol=1e-5)
    np.testing.assert_allclose(tokens, expected.tokens, atol=1e-5)
    np.testing.assert_allclose(pooled, own, atol=1e-5)
    np.testing.assert_allclose(pre_logits, own, atol=1e-5)


@pytest.mark.long
def test_a_step_of_the_siglip_trainer_lowers_its_loss():
    model, params = big_vision.Model(**fields()), params_of(tiny_model())
    image, text = batch()

    def loss(params):
        zimg, ztxt, out = model.apply(
            {"params": params}, image, text, train=True, rngs={"dropout": jax.random.key(0)}
        )
        logits = zimg @ ztxt.T * out["t"] + out["b"]
        signs = 2 * jnp.eye(len(logits)) - 1
        return -jax.nn.log_sigmoid(signs * logits).sum(-1).mean()

    step = jax.jit(jax.value_and_grad(loss))
    before, grads = step(params)
    logits = contrastive_logits(
        directly("encode_image", image),
        directly("encode_text", text, np.ones(text.shape, bool)),
        params["logit_scale"],
        params["logit_bias"],
    )
    np.testing.assert_allclose(before, sigmoid_contrastive(logits).mean(), rtol=1e-5)
    after, _ = step(jax.tree.map(lambda x, g: x - 0.01 * g / length_of(grads), params, grads))
    assert after < before


def length_of(tree) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))


def test_logits_of_a_text_are_those_of_the_tokens_before():
    """CapPa's trainer gives the labels themselves; they are shifted inside, behind `start_id`."""
    image, text = batch()
    variables = {"params": params_of(tiny_model())}
    for start in (0, 7):
        model = big_vision.Model(**fields(), outputs="logits", start_id=start)
        logits = jax.jit(lambda v, *x, model=model: model.apply(v, *x, train=False))(
            variables, image, text
        )
        before = np.concatenate([np.full((4, 1), start), text[:, :-1]], axis=1).astype(np.int32)
        np.testing.assert_allclose(logits, directly("caption_logits", image, before), atol=1e-5)
        changed = text.copy()
        changed[:, 5] = (changed[:, 5] + 1) % VOCAB
        other = jax.jit(model.apply)(variables, image, changed)
        np.testing.assert_allclose(other[:, :6], logits[:, :6], atol=1e-5)
        assert np.abs(other[:, 6] - logits[:, 6]).max() > 1e-3


def test_the_scoring_evaluators_two_steps_are_the_whole():
    model = big_vision.Model(**fields(), outputs="logits")
    image, text = batch()
    variables = {"params": params_of(tiny_model())}
    whole = jax.jit(model.apply)(variables, image, text)

    @jax.jit
    def scored(variables, image, text):
        encoded = model.apply(variables, image, train=False, method=model.encode)
        return encoded, model.apply(
            variables, encoded, text, train=False, decode=False, method=model.decode
        )

    encoded, logits = scored(variables, image, text)
    np.testing.assert_allclose(logits, whole, atol=1e-5)

    asked = {"train": False, "return_enc_features": True}
    features, out = jax.jit(lambda v, x: model.apply(v, x, None, **asked))(variables, image)
    np.testing.assert_allclose(features, encoded, atol=1e-6)
    np.testing.assert_array_equal(out["encoded"], features)
    assert out["pre_logits"].shape == (4, CONFIG.vision.width)


@pytest.mark.parametrize("changes", [
    {"augment": Nested(crop_positions=True)},
    {"vision": {"cropped_pos_embed": True}},  # as version 0.1 called it
])  # fmt: skip
def test_cropped_positions_are_drawn_in_training_alone(changes):
    model = big_vision.Model(**fields(**changes))
    image, _ = batch()
    variables = {"params": params_of(tiny_model())}

    @jax.jit
    def embed(key):
        kept = model.apply(variables, image, None, train=False, rngs={"dropout": key})[0]
        return kept, model.apply(variables, image, None, train=True, rngs={"dropout": key})[0]

    for key in (jax.random.PRNGKey(0), jax.random.key(0)):
        kept, drawn = embed(key)
        np.testing.assert_allclose(kept, directly("encode_image", image), atol=1e-6)
        assert np.abs(drawn - kept).max() > 1e-3


def test_without_draws_training_needs_no_dropout_key():
    """Trainers give a key to a model that has dropout, or keys of other names."""
    image, _ = batch()
    variables = {"params": params_of(tiny_model())}
    keys = {"params": jax.random.key(0)}

    def embed(model):
        return jax.jit(lambda v: model.apply(v, image, None, train=True, rngs=keys)[0])(variables)

    without = big_vision.Model(**fields())
    np.testing.assert_allclose(embed(without), directly("encode_image", image), atol=1e-6)
    with pytest.raises(KeyError, match="dropout"):
        embed(big_vision.Model(**fields(augment=Nested(crop_positions=True))))


def test_a_preset_is_changed_by_fields():
    expected = presets.mammut_s16()
    expected = dataclasses.replace(expected, text=dataclasses.replace(expected.text, depth=6))
    # The second is as version 0.1 had it.
    for computed in ({"compute": Nested(remat="full")}, {"remat": "full"}):
        asked = {"preset": "mammut_s16", "text": Nested(depth=6), **computed}
        assert big_vision.model_config(**asked) == expected
        model = big_vision.Model(**asked)
        assert (model.config, model.compute) == (expected, ComputeConfig(remat="full"))


def test_the_scalars_of_the_loss_start_where_they_are_told_to():
    image, text = batch()
    for told, scale, bias in (
        ({}, 1 / 0.07, 0),
        ({"logit_scale_init": 10.0, "logit_bias_init": -10.0}, 10, -10),
    ):
        model = big_vision.Model(**fields(**told))

        @jax.jit
        def scalars(key, model=model):
            params = model.init(key, image, text)["params"]
            return {name: params[name] for name in ("logit_scale", "logit_bias")}

        params = scalars(jax.random.key(0))
        np.testing.assert_allclose(params["logit_scale"], np.log(scale), rtol=1e-6)
        assert params["logit_bias"] == bias


@pytest.mark.long
def test_a_model_stored_in_bfloat16_is_loaded_in_bfloat16(folder):
    """By the arguments of the model, or without them by the folder."""
    compute = ComputeConfig(param_dtype="bfloat16")
    asked = fields(compute=Nested(param_dtype="bfloat16"))
    expected = params_of(tiny_model(seed=1, compute=compute))
    assert_same(big_vision.load(None, folder, asked), expected)
    variables = big_vision.Model(**asked).init(jax.random.key(0), *batch())
    loaded = big_vision.load(variables["params"], folder, asked)
    types = jax.tree.map(lambda x: str(x.dtype), loaded)
    assert types == jax.tree.map(lambda x: str(x.dtype), variables["params"])
    assert types["text"]["norm"]["scale"] == "bfloat16" and types["logit_scale"] == "float32"


def test_a_folder_in_bfloat16_stays_so_without_arguments(tmp_path):
    model = tiny_model(seed=1, compute=ComputeConfig(param_dtype="bfloat16"))
    save(tmp_path / "half", model, tiny_processor())
    loaded = big_vision.load(None, str(tmp_path / "half"))
    assert_same(loaded, params_of(model))
    assert loaded["text"]["norm"]["scale"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "mammut_xxl"}, "preset is 'mammut_xxl', expected one of .*mammut_b16"),
        ({"vision": {"widht": 3}}, "widht, which VisionConfig does not know"),
        ({"compute": {"rmat": "full"}}, "compute has rmat, which ComputeConfig does not know"),
        ({"augment": {"crop": True}}, "augment has crop, which AugmentConfig does not know"),
        (
            {"augment": {"prefix_dropout": 0.1}},
            "prefix_dropout is 0.1, which needs an image prefix",
        ),
        (
            {"logit_scale_init": 0.0},
            "logit_scale_init is 0.0, expected more than 0 and at most 100",
        ),
        ({"vision": {"norm_bias": False}}, "vision.norm_bias is False, expected True"),
        ({"text": {"norm_bias": False}}, "text.norm_bias is False, expected True"),
        ({"conditioning": "prefix"}, "conditioning, which ModelConfig does not know"),
        ({"outputs": "both"}, "outputs.*both"),
        ({"text": {"pooling": "none"}}, "outputs is 'embeddings', which needs a contrastive pass"),
        (
            {"text": {"depth": 0, "text_only_depth": 2}, "outputs": "logits"},
            "needs a caption pass: text.depth is 0",
        ),
        (
            {"outputs": "logits", "start_id": VOCAB},
            "start_id is 60, expected an id below text.vocab_size 60",
        ),
        ({"outputs": "logits", "text": {"pad_id": 0}}, "start_id 0 is text.pad_id"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(changes, message):
    # the type checks of these tests come first
    with pytest.raises((ValueError, TypeError), match=message):
        big_vision.Model(**fields(**changes))


def test_calls_without_a_meaning_are_refused():
    model, variables = big_vision.Model(**fields()), {"params": params_of(tiny_model())}
    image, text = batch()
    for message, call in {
        "decode is True": lambda: model.apply(variables, image, text, decode=True),
        "method is .*, expected encode or decode": lambda: model.apply(
            variables, image, method=print
        ),
        "variables hold .*batch_stats": lambda: model.apply(variables | {"batch_stats": {}}, image),
        "images are .*expected .* by vision.image_size": lambda: model.init(
            jax.random.key(0), image[:, :8], text
        ),
        r"images are \[16, 16, 3\], expected .*or videos": lambda: model.init(
            jax.random.key(0), image[0], text
        ),
        "texts are .*text.max_length": lambda: model.init(
            jax.random.key(0), image, np.tile(text, 2)
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_videos_that_the_model_does_not_read_are_refused_at_init():
    prefix = {"cross_attn_every": 0, "max_length": 64, "pooling": "none"}
    model = big_vision.Model(outputs="logits", **fields(text=prefix, image_projection="decoder"))
    videos = np.zeros((2, 3, SIZE, SIZE, 3), np.uint8)
    with pytest.raises(ValueError, match="a video of 3 frames, which has no place in an image pre"):
        model.init(jax.random.key(0), videos)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save(path, tiny_model(seed=1), tiny_processor())
    return str(path)


@pytest.fixture(scope="module")
def init_params():
    return params_of(tiny_model(seed=2))


def assert_same(tree, other, names=None) -> None:
    flat, expected = flatten_dict(tree, sep="/"), flatten_dict(other, sep="/")
    assert flat.keys() == expected.keys()
    for name in names or flat:
        np.testing.assert_array_equal(flat[name], expected[name], err_msg=name)


def test_a_folder_of_ours_is_loaded_whole(folder, init_params):
    saved = params_of(tiny_model(seed=1))
    assert_same(big_vision.load(init_params, folder, Nested(fields())), saved)
    assert_same(big_vision.load(None, folder), saved)
    assert_same(big_vision.load(None, folder, fields(outputs="logits", start_id=1)), saved)
    # Where the loss would start is of no matter.
    assert_same(
        big_vision.load(None, folder, fields(logit_scale_init=10.0, logit_bias_init=-10.0)), saved
    )


def test_what_is_not_to_be_loaded_keeps_its_value(folder, init_params):
    loaded = big_vision.load(
        init_params, folder, fields(), dont_load=["text/norm/.*", "logit_bias"]
    )
    flat = flatten_dict(loaded, sep="/")
    kept = {name for name in flat if name.startswith("text/norm/")} | {"logit_bias"}
    assert_same(loaded, init_params, kept)
    assert_same(loaded, params_of(tiny_model(seed=1)), flat.keys() - kept)


def test_positions_are_resampled_to_the_models_image_size(folder):
    changed = fields(vision={"image_size": 2 * SIZE})
    init_params = jax.eval_shape(
        lambda: params_of(MaMMUT(big_vision.model_config(**changed), rngs=nnx.Rngs(0)))
    )
    positions = big_vision.load(init_params, folder, changed)["vision"]["pos_embed"]
    old = np.asarray(tiny_model(seed=1).vision.pos_embed[...])
    np.testing.assert_array_equal(positions, resample_positions(old, (4, 4), "bicubic"))


def test_a_tower_is_loaded_by_its_name_and_the_rest_stays(folder, init_params):
    saved = params_of(tiny_model(seed=1))
    names = flatten_dict(saved, sep="/").keys()
    for tower, called in {"vision": ("vision", "img", "encoder"), "text": ("text", "txt")}.items():
        of_tower = {name for name in names if name.startswith(f"{tower}/")}
        for name in called:
            loaded = big_vision.load(init_params, {name: folder}, fields())
            assert_same(loaded, saved, of_tower)
            assert_same(loaded, init_params, names - of_tower)


def test_another_vocabulary_is_loaded_but_for_its_table(folder, init_params):
    changed = fields(text={"vocab_size": 50})
    table = np.ones((50, CONFIG.text.width), np.float32)
    flat = flatten_dict(init_params, sep="/") | {"text/token_embed/embedding": table}
    init_params = unflatten_dict(flat, sep="/")
    loaded = big_vision.load(init_params, folder, changed, dont_load="text/token_embed/embedding")
    np.testing.assert_array_equal(loaded["text"]["token_embed"]["embedding"], table)
    with pytest.raises(ValueError, match="model.text.vocab_size is 50, it was 60"):
        big_vision.load(init_params, folder, changed)


def test_whatever_does_not_fit_is_named(folder, init_params):
    wrong = {**init_params, "image_projection": {"kernel": np.ones((3, 3)), "surplus": np.ones(2)}}
    with pytest.raises(ValueError) as caught:
        big_vision.load(wrong, folder, fields())
    for problem in (
        "image_projection.surplus of init_params is not one of its parameters",
        "image_projection.kernel is [3, 3] in init_params, expected [32, 48]",
    ):
        assert problem in str(caught.value)
    for message, call in {
        "text.token_embed.embedding is neither loaded nor in init_params": lambda: big_vision.load(
            None, {"vision": folder}, fields()
        ),
        "text.pos_embed is in no file, wholly or in part": lambda: big_vision.load(
            None, folder, fields(text={"max_length": 20})
        ),
        "vision.depth is 3, it was 2": lambda: big_vision.load(
            None, folder, fields(vision={"depth": 3})
        ),
        "model_init names head, expected a path, or some of": lambda: big_vision.load(
            None, {"head": folder}, fields()
        ),
        "model_cfg is None, expected the arguments": lambda: big_vision.load(
            init_params, {"img": folder}
        ),
        "there is no nowhere": lambda: big_vision.load(None, "nowhere", fields()),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_the_module_needs_no_big_vision():
    code = (
        "import sys; sys.modules['big_vision'] = None; sys.modules['tensorflow'] = None\n"
        "import mammut.interop.big_vision as m; print(callable(m.Model), callable(m.load))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True True\n", done.stderr
