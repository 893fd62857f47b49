"""Both passes in one traversal of the decoder.

It gives the numbers of two calls, gathers each weight once and adds no work.
"""

import collections
import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from flax import nnx
from marks import long
from test_architectures import CONFIGS
from test_flops import product_flops

from mammut.config import AugmentConfig, ComputeConfig, LossConfig, MeshConfig, ModelConfig
from mammut.core import sharding
from mammut.core.params import logical_axes
from mammut.models.compute import Augment
from mammut.models.flops import forward_flops
from mammut.models.mammut import MaMMUT, require_computable
from mammut.testing import tiny_batch, tiny_config, tiny_model
from mammut.training.tasks import ImageTextTask

# Half as deep as `tiny_config`, which compiles faster.
OWN = dataclasses.replace(
    tiny_config(), text=dataclasses.replace(tiny_config().text, depth=2, cross_attn_every=1)
)
CAUSAL = dataclasses.replace(
    tiny_config(), text=dataclasses.replace(tiny_config().text, causal_contrastive=True)
)
FUSABLE = {
    "own": (OWN, ComputeConfig()),
    "own, full remat": (OWN, ComputeConfig(remat="full")),
    "own, causal, dots, unrolled": (CAUSAL, ComputeConfig(remat="dots", unroll=4)),
    "openmammut": (CONFIGS["openmammut"], ComputeConfig()),
    "openmammut_small": (CONFIGS["openmammut_small"], ComputeConfig()),
    "bare_last": (CONFIGS["bare_last"], ComputeConfig()),
    "moderntext": (CONFIGS["moderntext"], ComputeConfig()),
}
PASSES = ("two_calls", "fused")


@functools.cache
def outputs_and_gradients(config: ModelConfig, compute: ComputeConfig):
    """Results of a training forward, and gradients of a sum that depends on all numbers."""
    graphdef, params = nnx.split(tiny_model(config, compute=compute))
    batch = tiny_batch(config)

    def weighted(params):
        rng = np.random.default_rng(1)
        out = vars(nnx.merge(graphdef, params).two_pass(*batch.values()))
        return sum(
            (leaf * np.float32(rng.normal(size=leaf.shape))).sum() for leaf in jax.tree.leaves(out)
        ), out

    (_, out), grads = jax.jit(jax.value_and_grad(weighted, has_aux=True))(params)
    return jax.device_get((out, nnx.to_pure_dict(grads)))


@pytest.mark.parametrize("name", [name if name == "own" else long(name) for name in FUSABLE])
def test_one_traversal_gives_the_numbers_and_the_gradients_of_two(name):
    """They are equal up to rounding, which adds up in gradients.

    The sums of gradients over both passes are taken in another order. Nothing of the two calls is
    computed again or unrolled, which test_model.py compares.
    """
    config, compute = FUSABLE[name]
    expected = outputs_and_gradients(config, ComputeConfig(passes="two_calls"))
    actual = outputs_and_gradients(config, dataclasses.replace(compute, passes="fused"))
    for (path, want), got in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual), strict=True
    ):
        where = jax.tree_util.keystr(path)
        tolerance = 1e-6 if where.startswith("[0]") else 1e-5
        assert np.abs(got - want).max() <= tolerance * max(np.abs(want).max(), 1), where
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(actual[1])) > 1


@pytest.mark.parametrize("name", ["coca", "siglip", "cappa"])
def test_a_model_whose_passes_differ_in_length_or_layers_is_refused(name):
    fused = ComputeConfig(passes="fused")
    message = "ComputeConfig.passes is 'fused', which needs two passes over the same"
    with pytest.raises(ValueError, match=message):
        require_computable(CONFIGS[name], fused)
    with pytest.raises(ValueError, match=message):
        MaMMUT(CONFIGS[name], compute=fused, rngs=nnx.Rngs(0))
    require_computable(CONFIGS[name], ComputeConfig())


def test_a_model_with_an_image_prefix_is_refused():
    """Its caption pass is longer than its contrastive pass."""
    message = "ComputeConfig.passes is 'fused', which has no place for a prefix"
    with pytest.raises(ValueError, match=message):
        require_computable(CONFIGS["prefix"], ComputeConfig(passes="fused"))
    require_computable(CONFIGS["prefix"], ComputeConfig())


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("name", ["own", "openmammut_small", "moderntext"])
def test_a_training_forward_encodes_the_image_once_and_scores_no_word(name, passes):
    """All of its matrix products are counted.

    One more encoded image, or one cross-attention in the contrastive pass, would show.
    """
    config, compute = FUSABLE[name]
    compute = dataclasses.replace(compute, passes=passes)
    graphdef, params = nnx.split(
        nnx.eval_shape(lambda: MaMMUT(config, compute=compute, rngs=nnx.Rngs(0)))
    )
    batch, flops, text = tiny_batch(config, batch_size=1), forward_flops(config), config.text
    program = jax.make_jaxpr(lambda p: nnx.merge(graphdef, p).two_pass(*batch.values()))(params)
    causal = 2 * text.max_length**2 * text.width * text.depth  # counts half there and whole here
    expected = flops["vision"] + flops["contrastive_pass"] + flops["caption_pass"] + causal
    assert product_flops(program.jaxpr) == expected


def products(jaxpr):
    """The shapes of the results of all matrix products, in loops too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.outvars[0].aval.shape
        for inner in jax.tree.leaves(eqn.params):
            if hasattr(inner, "eqns"):
                yield from products(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("name", ["own", "openmammut_small"])
def test_the_contrastive_pass_has_no_product_with_the_vocabulary(name):
    config, _ = FUSABLE[name]
    vocab = config.text.vocab_size
    graphdef, params = nnx.split(nnx.eval_shape(lambda: MaMMUT(config, rngs=nnx.Rngs(0))))
    batch = tiny_batch(config)

    def shapes(method, *args):
        program = jax.make_jaxpr(lambda p: getattr(nnx.merge(graphdef, p), method)(*args))(params)
        return {size for shape in products(program.jaxpr) for size in shape}

    assert vocab not in shapes("encode_text", batch["tokens"], batch["text_valid"])
    assert vocab in shapes("caption_logits", batch["image"], batch["tokens"])


@pytest.mark.long
def test_over_eight_devices_each_decoder_weight_is_gathered_once_forward_and_once_backward():
    """The layers are laid out one by one.

    Between devices, arrays are gathered and reduced, and nothing else is moved.
    """
    vision = dataclasses.replace(OWN.vision, depth=1, image_size=32)
    text = dataclasses.replace(tiny_config().text, depth=2)
    config = dataclasses.replace(OWN, vision=vision, text=text)
    compute = ComputeConfig(passes="fused", unroll=2)
    augment = Augment(jax.random.key(0), AugmentConfig(patch_drop=0.5, crop_positions=True))
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8))
    abstract = nnx.eval_shape(lambda: MaMMUT(config, compute=compute, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(abstract)
    params = nnx.to_pure_dict(params)
    places = sharding.param_shardings(params, logical_axes(abstract), mesh)
    task, rows = ImageTextTask(LossConfig()), sharding.batch_sharding(mesh)
    batch = tiny_batch(config, batch_size=16)

    def loss(params, batch):
        return task.loss(nnx.merge(graphdef, params), batch, augment)[0]

    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss), in_shardings=(places, rows), out_shardings=places).lower(
            params, batch
        )
    program = step.compile(compiler_options={"xla_backend_optimization_level": 0}).as_text()
    assert not re.search(r" (all-to-all|collective-permute)", program)
    gathers = re.findall(r" = (.+?) all-gather(?:-start)?\(", program)
    gathered = collections.Counter(
        shape for line in gathers for shape in re.findall(r"\[([\d,]+)\]", line)
    )
    layers = text.depth + text.num_cross_layers
    assert {shape: gathered[shape] for shape in ("48,80", "80,48", "3,16,48", "48,3,16")} == {
        "48,80": 2 * layers,  # into the MLP
        "80,48": 2 * layers,  # and out of it
        "3,16,48": 2 * layers,  # out of the heads
        "48,3,16": 2 * 3 * layers,  # queries, keys, values
    }
    assert gathered["60,48"] <= 2  # the token embedding: the lookup of both passes, the scores
