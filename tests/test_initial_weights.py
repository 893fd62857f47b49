"""Random weights: the key of a parameter is folded from its path.

So an option that adds or removes parameters changes no other.
"""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from flax import nnx

import mammut
from mammut.config import AdapterConfig, ComputeConfig, ModelConfig, ResNetConfig
from mammut.models.layers import Constant
from mammut.models.mammut import MaMMUT
from mammut.testing import tiny_config

BASE = tiny_config()
ADAPTERS = (AdapterConfig(), AdapterConfig(name="low", kind="lora", sites=("*.query",)))


def changed(*, vision: dict | None = None, text: dict | None = None, **fields) -> ModelConfig:
    return dataclasses.replace(
        BASE,
        vision=dataclasses.replace(BASE.vision, **(vision or {})),
        text=dataclasses.replace(BASE.text, **(text or {})),
        **fields,
    )


# Each differs from BASE by an option that adds or removes parameters.
OPTIONS = {
    "vision class token": changed(vision={"class_token": True, "pooling": "mean_all"}),
    "vision input norm": changed(vision={"input_norm": True}),
    "vision without patch bias": changed(vision={"patch_bias": False}),
    "learned queries": changed(
        vision={"pooling": "queries", "pool_queries": 5, "pool_heads": 4},
        image_projection="separate",
    ),
    "map pooling": changed(vision={"pooling": "map"}, image_projection="separate"),
    "a ResNet": dataclasses.replace(
        BASE, vision=ResNetConfig(stem_width=8, stages=(1, 2, 1, 1), image_size=64)
    ),
    "adapters": changed(adapters=ADAPTERS),
    "text-only layers": changed(text={"text_only_depth": 2}),
    "text class token": changed(text={"pooling": "class"}),
    "text projection": changed(text_projection=True),
    "untied head": changed(text={"tie_embeddings": False}),
    "head bias": changed(text={"vocab_bias": True}),
    "rotary positions": changed(text={"positions": "rope"}),
    "attention gate": changed(text={"attn_gate": True, "qk_norm": True}),
    "bare layers": changed(text={"cross_attn_position": "last_bare"}),
    "prefix": changed(text={"cross_attn_every": 0}, prefix_norm=True),
}


@functools.cache
def weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """The parameters of a new model by path."""
    model = MaMMUT(config, rngs=nnx.Rngs(seed))
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(param[...]) for path, param in params}


@functools.cache
def constants(config: ModelConfig) -> frozenset[str]:
    """The paths of parameters that start with one value."""
    model = nnx.eval_shape(lambda: MaMMUT(config, rngs=nnx.Rngs(0)))
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return frozenset(
        ".".join(map(str, path))
        for path, param in params
        if isinstance(param.initializer, Constant)
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_changes_no_parameter_that_both_models_have(name):
    config = OPTIONS[name]
    base, other = weights(BASE), weights(config)
    assert base.keys() != other.keys()
    both = {path for path in base.keys() & other.keys() if base[path].shape == other[path].shape}
    # Not of the norms and biases alone, whose start is one value.
    drawn = both - constants(BASE) - constants(config)
    assert len(drawn) > 8
    differing = [path for path in both if not np.array_equal(base[path], other[path])]
    assert not differing


@pytest.mark.parametrize("config", [BASE, OPTIONS["adapters"], OPTIONS["text-only layers"]])
def test_parameters_of_one_shape_and_different_paths_differ(config):
    values = weights(config)
    drawn = sorted(values.keys() - constants(config))
    pairs = [
        (one, other)
        for one, other in itertools.combinations(drawn, 2)
        if values[one].shape == values[other].shape
    ]
    assert len(pairs) >= 9  # queries, keys and values of three stacks of layers
    for one, other in pairs:
        assert (values[one] != values[other]).mean() > 0.9, f"{one} and {other}"


def test_layers_of_a_stack_differ():
    for path, value in weights(BASE).items():
        if "layers." in path and path not in constants(BASE):
            for one, other in itertools.combinations(value, 2):
                assert (one != other).mean() > 0.9, path


def test_another_seed_changes_all_that_is_drawn():
    one, other = weights(BASE), weights(BASE, seed=1)
    for path in one:
        same = np.array_equal(one[path], other[path])
        assert same == (path in constants(BASE)), path


def test_a_model_made_in_one_program_has_the_weights_of_one_made_step_by_step():
    @jax.jit
    def make(key):
        return nnx.state(MaMMUT(BASE, rngs=nnx.Rngs(params=key)), nnx.Param)

    whole = nnx.to_flat_state(make(jax.random.key(0)))
    for path, param in whole:
        expected = weights(BASE)[".".join(map(str, path))]
        np.testing.assert_array_equal(np.asarray(param[...]), expected, err_msg=str(path))


@pytest.mark.long
def test_how_a_model_is_computed_changes_no_weight_but_by_rounding():
    compute = ComputeConfig(param_dtype="bfloat16", remat="full", unroll=2, passes="fused")
    model = MaMMUT(BASE, compute=compute, rngs=nnx.Rngs(0))
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = ".".join(map(str, path))
        value = np.asarray(param[...])
        assert (value.dtype == np.float32) == name.startswith("logit_"), name
        np.testing.assert_array_equal(value, weights(BASE)[name].astype(value.dtype), err_msg=name)


def test_adapters_that_are_added_have_the_weights_of_a_model_made_with_them():
    base = MaMMUT(BASE, rngs=nnx.Rngs(0))
    model = mammut.add_adapter(base, *ADAPTERS, rngs=nnx.Rngs(0))
    expected = weights(OPTIONS["adapters"])
    added = nnx.to_flat_state(nnx.state(model.adapters, nnx.Param))
    assert len(added) == len(expected) - len(weights(BASE))
    for path, param in added:
        name = ".".join(("adapters", *map(str, path)))
        np.testing.assert_array_equal(np.asarray(param[...]), expected[name], err_msg=name)
