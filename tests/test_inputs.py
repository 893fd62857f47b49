"""What a model refuses to be given: at every public method, in one sentence, before it computes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

import mammut
from mammut.config import (
    AdapterConfig,
    AugmentConfig,
    ComputeConfig,
    DataConfig,
    DecoderConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ResNetConfig,
    TokenizerConfig,
    TrainConfig,
    VisionConfig,
)
from mammut.models.inputs import require_images, require_texts
from mammut.testing import tiny_batch, tiny_config, tiny_model, tiny_processor

CONFIG = tiny_config()
IMAGE, TOKENS, VALID = tiny_batch(batch_size=2).values()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(autouse=True)
def untyped(as_users_have_it):
    """Every test here is of our own checks."""


def entrances(model):
    """The public methods, as functions of an image, tokens and text_valid."""
    return {
        "image_tokens": lambda image, tokens, valid: model.image_tokens(image),
        "encode_image": lambda image, tokens, valid: model.encode_image(image),
        "encode_text": lambda image, tokens, valid: model.encode_text(tokens, valid),
        "text_vector": lambda image, tokens, valid: model.text_vector(tokens, valid),
        "caption_logits": model.caption_logits,
        "cross_attention": model.cross_attention,
        "two_pass": model.two_pass,
        "caption_labels": lambda image, tokens, valid: model.caption_labels(tokens, valid),
        "language_pass": lambda image, tokens, valid: model.text.language_pass(tokens, valid),
    }


NAMES = list(entrances(tiny_model()))
SEE_IMAGES = [name for name in NAMES if name not in
              ("encode_text", "text_vector", "caption_labels", "language_pass")]  # fmt: skip
READ_TEXTS = [name for name in NAMES if name not in ("image_tokens", "encode_image")]
NORMAL = "float pixels normalised by VisionConfig"
BAD_IMAGES = {
    "a list": (IMAGE.tolist(), "image is a list, expected an array uint8"),
    "None": (None, "image is a NoneType, expected an array uint8"),
    "one image": (IMAGE[0], r"image is uint8\[16, 16, 3\], expected uint8\[B, height"),
    "channels first": (IMAGE.transpose(0, 3, 1, 2), r"images are \(3, 16, 16\), expected \(16"),
    "another size": (IMAGE[:, :8], r"images are \(8, 16, 3\), expected \(16, 16, 3\) from Vision"),
    "int32": (IMAGE.astype(np.int32), rf"image is int32.* or {NORMAL}"),
    "bool": (IMAGE > 9, rf"image is bool.* or {NORMAL}"),
    "0 to 255": (IMAGE.astype(np.float32), f"image is float32 with numbers up to .*{NORMAL}"),
    "NaN": (np.full(IMAGE.shape, np.nan, np.float32), f"numbers up to nan, expected {NORMAL}"),
    "inf": (np.full(IMAGE.shape, np.inf, np.float32), f"numbers up to inf, expected {NORMAL}"),
}
LONGER = np.ones((2, 13), np.int32)
BAD_TEXTS = {
    "a list": (TOKENS.tolist(), VALID, r"tokens is a list, expected an array int\[B, L\]"),
    "one text": (TOKENS[0], VALID[0], r"tokens is int32\[12\], expected int\[B, L\]"),
    "no token": (TOKENS[:, :0], VALID[:, :0], r"tokens is int32\[2, 0\], expected .* or more"),
    "float": (TOKENS * 1.0, VALID, r"tokens is float64\[2, 12\], expected int\[B, L\]"),
    "bool": (TOKENS > 3, VALID, r"tokens is bool\[2, 12\], expected int\[B, L\]"),
    "a large id": (TOKENS + 10**6, VALID, r"tokens hold the id \d+, expected 0 to 59 by Decoder"),
    "a negative id": (TOKENS - 99, VALID, r"tokens hold the id -\d+, expected 0 to 59 by Decoder"),
    "one id": (np.where(TOKENS == 2, 60, TOKENS), VALID, "tokens hold the id 60, expected 0 to 59"),
    "valid of others": (TOKENS, VALID[:1], r"text_valid is bool\[1, 12\], expected bool\[2, 12\]"),
    "valid is int": (TOKENS, VALID.astype(int), r"text_valid is int64\[2, 12\], expected bool"),
    "other bytes": (TOKENS.astype(">i4"), VALID, "tokens is >i4, expected .* byte order"),
    "valid is a list": (TOKENS, VALID.tolist(), "text_valid is a list, expected an array bool"),
}


@pytest.mark.parametrize("given", BAD_IMAGES)
@pytest.mark.parametrize("name", SEE_IMAGES)
def test_every_entrance_refuses_what_is_no_image(model, name, given):
    image, message = BAD_IMAGES[given]
    for array in (image, jnp.asarray(image) if isinstance(image, np.ndarray) else image):
        with pytest.raises(ValueError, match=message):
            entrances(model)[name](array, TOKENS, VALID)


@pytest.mark.parametrize("given", BAD_TEXTS)
@pytest.mark.parametrize("name", READ_TEXTS)
def test_every_entrance_refuses_what_is_no_text(model, name, given):
    tokens, valid, message = BAD_TEXTS[given]
    with pytest.raises(ValueError, match=message):
        entrances(model)[name](IMAGE, tokens, valid)
    if given != "other bytes" and isinstance(tokens, np.ndarray) and isinstance(valid, np.ndarray):
        # JAX has 32 bits by default.
        message = message.replace("float64", "float32").replace("int64", "int32")
        with pytest.raises(ValueError, match=message):
            entrances(model)[name](IMAGE, jnp.asarray(tokens), jnp.asarray(valid))


@pytest.mark.parametrize("name", ["caption_logits", "cross_attention", "two_pass"])
def test_there_is_a_text_for_each_image(model, name):
    with pytest.raises(ValueError, match="there are 2 texts in tokens for 1 images, expected one"):
        entrances(model)[name](IMAGE[:1], TOKENS, VALID)


def test_marks_of_what_to_predict_belong_to_the_tokens(model):
    with pytest.raises(ValueError, match=r"target is bool\[1, 12\], expected bool\[2, 12\]"):
        model.caption_labels(TOKENS, VALID, VALID[:1])


@pytest.mark.parametrize("name", NAMES)
def test_under_a_trace_shapes_and_types_are_checked_and_values_are_not(model, name):
    graphdef, params = nnx.split(model)

    def traced(*arrays):
        return jax.eval_shape(
            lambda params, *arrays: entrances(nnx.merge(graphdef, params))[name](*arrays),
            params,
            *arrays,
        )

    traced(np.full(IMAGE.shape, 255.0, np.float32), TOKENS + 10**6, VALID)
    with pytest.raises(ValueError, match="expected"):
        traced(IMAGE.astype(np.int32), TOKENS.astype(np.float32), VALID)


def test_images_that_are_normalised_already_are_those_of_their_bytes(model):
    normal = (IMAGE / 255 - 0.5) / 0.5
    expected = model.encode_image(IMAGE)
    for dtype in (np.float32, np.float16):
        found = model.encode_image(normal.astype(dtype))
        np.testing.assert_allclose(found, expected, atol=1e-2 if dtype == np.float16 else 1e-5)


# --- fuzz

DTYPES = st.sampled_from([np.uint8, np.int32, np.int64, np.uint32, np.float32, np.float16, bool,
                          np.float64, np.complex64, "<U2", object, "datetime64[s]"])  # fmt: skip
SIDES = st.sampled_from([0, 1, 2, 3, 12, 16])
SHAPES = st.lists(SIDES, max_size=5).map(tuple) | st.sampled_from([(2, 16, 16, 3), (2, 12)])
ARRAYS = st.builds(np.zeros, SHAPES, DTYPES)
ANYTHING = ARRAYS | st.none() | st.text(max_size=3) | st.lists(st.integers(), max_size=3)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(NAMES), ANYTHING, ANYTHING, ANYTHING)
def test_arrays_of_any_shape_and_type_are_taken_or_refused(model, name, image, tokens, valid):
    """Traced: what is taken has a shape for its result, and nothing is compiled."""
    arrays = [image, tokens, valid]
    numeric = [isinstance(x, np.ndarray) and x.dtype.kind in "biufc" for x in arrays]

    def call(*traced):
        traced = iter(traced)
        given = [next(traced) if is_array else x for x, is_array in zip(arrays, numeric)]
        return entrances(model)[name](*given)

    try:
        jax.eval_shape(call, *(x for x, is_array in zip(arrays, numeric) if is_array))
    except ValueError as error:
        assert re.search("expected|DecoderConfig.max_length", str(error))


@settings(max_examples=100, deadline=None)
@given(
    nps.arrays(np.float32, (1, 16, 16, 3), elements=st.floats(width=32), fill=st.just(0.0))
    | nps.arrays(np.float16, (1, 16, 16, 3), elements=st.floats(width=16), fill=st.just(1.0))
)
def test_float_pixels_are_taken_where_they_can_be_normalised_ones(image):
    try:
        require_images(image, CONFIG.vision)
    except ValueError as error:
        assert "normalised" in str(error) and not np.abs(image).max() <= 10
    else:
        assert np.abs(image).max() <= 10


@settings(max_examples=100, deadline=None)
@given(nps.arrays(st.sampled_from([np.int8, np.int32, np.int64, np.uint64]), (2, 3)))
def test_ids_are_taken_where_all_are_in_the_vocabulary(tokens):
    inside = all(0 <= token < 60 for token in tokens.ravel().tolist())
    for array in (tokens, jnp.asarray(tokens)) if tokens.dtype.itemsize < 8 else (tokens,):
        try:
            require_texts(array, None, CONFIG.text)
        except ValueError as error:
            assert "tokens hold the id" in str(error) and not inside
        else:
            assert inside


VALUES = (
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=3)
    | st.lists(st.integers(-1, 9), max_size=4) | st.just((0.5, 0.5, 0.5)) | st.integers(1, 64)
)  # fmt: skip


@pytest.mark.parametrize(
    "cls",
    [VisionConfig, ResNetConfig, DecoderConfig, ModelConfig, AdapterConfig, ComputeConfig,
     TrainConfig, DataConfig, TokenizerConfig, LossConfig, OptimizerConfig, AugmentConfig,
     MeshConfig, mammut.ImageTransform],
)  # fmt: skip
def test_a_config_of_any_values_is_made_or_refused_by_name(cls):
    names = [field.name for field in dataclasses.fields(cls)]
    whole = {field.name for field in dataclasses.fields(cls) if field.type is int}

    @settings(max_examples=150, deadline=None)
    @given(st.dictionaries(st.sampled_from(names), VALUES, max_size=4))
    def check(values):
        try:
            config = cls(**({"image_size": 16} if "image_size" in names else {}) | values)
        except ValueError as error:
            assert re.search(r"[A-Z]\w+(Config|Transform)|data\.|optimizer\.", str(error))
        else:
            hash(config)
            assert all(type(getattr(config, name)) is int for name in whole)

    check()


# --- numbers and names beside the arrays


@pytest.mark.parametrize("size", [True, 0, "16", 16.0, float("nan"), 2**70])
def test_an_image_size_that_is_no_number_of_pixels_is_refused(size, tmp_path):
    with pytest.raises(ValueError, match="^image_size is .*, expected a positive whole number"):
        mammut.load(tmp_path, image_size=size)


@pytest.mark.parametrize("wrong", [None, 3, "x", b"x", ["x"], CONFIG.vision, 0.5])
def test_what_is_no_model_folder_or_random_key_is_refused_by_its_name(model, tmp_path, wrong):
    processor = tiny_processor()
    lora = AdapterConfig("shapes", "lora", sites=("text.layers.attn.*",))
    rngs = nnx.Rngs(0)
    calls = {
        "config": lambda: mammut.MaMMUT(wrong, rngs=rngs),
        "rngs": lambda: mammut.MaMMUT(CONFIG, rngs=wrong),
        "compute": lambda: mammut.MaMMUT(CONFIG, compute=wrong, rngs=rngs),
        "model": lambda: mammut.add_adapter(wrong, lora, rngs=rngs),
        "rngs ": lambda: mammut.add_adapter(model, lora, rngs=wrong),
        "model ": lambda: mammut.remove_adapter(wrong, "shapes"),
        "model  ": lambda: mammut.num_adapter_params(wrong),
        "model   ": lambda: mammut.save(tmp_path / "a", wrong, processor),
        "image": lambda: mammut.Processor(processor.tokenizer, wrong, 12),
        "tokenizer": lambda: mammut.Processor(wrong, processor.image, 12),
    }
    if wrong is not None:
        calls["processor"] = lambda: mammut.save(tmp_path / "a", model, wrong)
    if not isinstance(wrong, str):
        calls["folder"] = lambda: mammut.save(wrong, model, processor)
        calls["path"] = lambda: mammut.load(wrong)
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"^{name.strip()} is .*, expected "):
            call()


def test_patterns_of_parameters_are_a_list(model, tmp_path):
    lora = AdapterConfig("shapes", "lora", sites=("text.layers.attn.*",))
    model = mammut.add_adapter(model, lora, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^also is 'vision.\*', expected list or tuple"):
        mammut.save_adapter(tmp_path, model, "shapes", also="vision.*")


def test_adapters_are_added_and_named_by_their_own_kinds_of_values(model):
    for wrong in ("lora", None, {"kind": "lora"}, [AdapterConfig()]):
        with pytest.raises(ValueError, match="expected an AdapterConfig"):
            mammut.add_adapter(model, wrong, rngs=nnx.Rngs(0))
    for call in (
        mammut.remove_adapter,
        mammut.merge_adapter,
        mammut.set_active_adapters,
        mammut.num_adapter_params,
    ):
        for name in ("shapes", 3, ["shapes"]):
            with pytest.raises(ValueError, match="the model has no adapter"):
                call(model, name)
