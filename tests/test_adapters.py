"""Adapters on a whole model.

The tests show where they go, what they leave alone, and how they are added, merged, saved and
loaded.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damage import flip, one_sentence
from flax import nnx
from marks import long

import mammut
from mammut.config import AdapterConfig, ComputeConfig, MeshConfig, ModelConfig
from mammut.core import sharding
from mammut.core.params import logical_axes
from mammut.generation.search import GenerateConfig
from mammut.generation.text import generate
from mammut.models.cached_decoder import cached_step, prefill
from mammut.models.mammut import MaMMUT
from mammut.testing import tiny_batch, tiny_config, tiny_model, tiny_processor
from mammut.weights.adapter_folder import base_hash

BOTTLENECKS = ("sequential", "parallel", "scaled_parallel")
# Half as deep as `tiny_config`, which compiles faster.
CONFIG = dataclasses.replace(
    tiny_config(), text=dataclasses.replace(tiny_config().text, depth=2, cross_attn_every=1)
)
BATCH = tiny_batch(CONFIG)
IMAGE, TOKENS, VALID = (jnp.asarray(BATCH[name]) for name in ("image", "tokens", "text_valid"))


def adapter(kind: str, name: str = "", **options) -> AdapterConfig:
    """An adapter at every site that there is for its kind."""
    sites = ("*.attn", "*.mlp") if kind in BOTTLENECKS else ("*",)
    return AdapterConfig(**{"name": name or kind, "kind": kind, "sites": sites, **options})


def with_adapters(
    *configs: AdapterConfig,
    base: ModelConfig | None = None,
    compute: ComputeConfig = ComputeConfig(),
) -> MaMMUT:
    """A model with random numbers in its adapters, too; the base is that of `tiny_model`."""
    return tiny_model(dataclasses.replace(base or CONFIG, adapters=configs), compute=compute)


def prefix_config() -> ModelConfig:
    """The model of `tiny_config` with its image in front of the text, and nothing for retrieval."""
    text = dataclasses.replace(CONFIG.text, cross_attn_every=0, pooling="none", max_length=16)
    return dataclasses.replace(CONFIG, text=text, image_projection="decoder", prefix_norm=True)


@jax.jit
def outputs(model: MaMMUT) -> dict[str, jax.Array]:
    """What the caption pass, the contrastive pass and the image encoder give."""
    found = {"logits": model.caption_logits(IMAGE, TOKENS, VALID)}
    if model.config.text.pooling != "none":
        found |= {"text": model.encode_text(TOKENS, VALID), "image": model.encode_image(IMAGE)}
    return found


def apart(a: dict[str, jax.Array], b: dict[str, jax.Array]) -> dict[str, float]:
    """The largest difference of each output, relative to its largest number."""
    return {name: float(jnp.abs(a[name] - b[name]).max() / jnp.abs(b[name]).max()) for name in a}


def params(model: nnx.Module) -> dict[str, np.ndarray]:
    return {
        ".".join(path): np.asarray(leaf[...])
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


@pytest.fixture(scope="module")
def base() -> MaMMUT:
    return tiny_model(CONFIG)


@pytest.fixture(scope="module")
def plain(base) -> dict[str, jax.Array]:
    return outputs(base)


@pytest.fixture(scope="module")
def several() -> MaMMUT:
    """Three adapters on one base: two of LoRA and a bottleneck."""
    second = adapter(
        "lora", "second", rank=3, alpha=5.0, sites=("text.layers.*", "vision.layers.attn.value")
    )
    return with_adapters(adapter("lora", "first"), second, adapter("parallel", "third"))


# --- what they change


@pytest.mark.long
def test_adapters_that_start_from_zero_change_nothing_at_all(base):
    zeros = [adapter(kind, init="zero", norm=kind == "parallel") for kind in BOTTLENECKS]
    model = mammut.add_adapter(base, *zeros, adapter("lora"), adapter("ia3"), rngs=nnx.Rngs(0))
    assert len(model.active_adapters) == 5

    @jax.jit
    def generated(model):
        prompt = jnp.ones((4, 1), int)
        return generate(
            model, IMAGE, prompt, prompt == 1, GenerateConfig(max_new_tokens=3), eos_id=2
        )

    for function in (outputs, generated):
        expected, got = (jax.tree.leaves(function(m)) for m in (base, model))
        assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.long
def test_a_fresh_bottleneck_of_magma_changes_every_output_a_little(base, plain):
    model = mammut.add_adapter(base, *map(adapter, BOTTLENECKS), rngs=nnx.Rngs(0))
    for kind in BOTTLENECKS:
        drawn = params(model.adapters[kind])
        values = np.concatenate(
            [x.ravel() for name, x in drawn.items() if not name.endswith("scale")]
        )
        assert np.abs(values).max() == np.float32(2e-3)
        # The standard deviation of a standard normal number clipped at 2 is 0.9594.
        assert values.std() == pytest.approx(0.9594e-3, rel=0.03) and abs(values.mean()) < 5e-5
        assert all((x == 1).all() for name, x in drawn.items() if name.endswith("scale"))
    moved = apart(outputs(mammut.set_active_adapters(model, "parallel")), plain)
    assert all(1e-6 < value < 0.1 for value in moved.values()), moved


@pytest.mark.parametrize(
    "site", ["text.layers.mlp", "text.cross_layers.attn", "vision.layers.attn"]
)
def test_an_adapter_changes_what_goes_through_its_site_alone(site, plain):
    moved = apart(outputs(with_adapters(AdapterConfig(sites=(site,)))), plain)
    through = {
        "text.layers.mlp": {"logits", "text"},
        "text.cross_layers.attn": {"logits"},
        "vision.layers.attn": {"logits", "image"},
    }
    assert {name for name, value in moved.items() if value > 1e-3} == through[site]
    assert all(value == 0 for name, value in moved.items() if name not in through[site])


@pytest.mark.parametrize("of", [long("logits"), "text"])
def test_gradients_reach_every_parameter_of_every_adapter_that_a_pass_goes_through(of):
    model = with_adapters(
        *(adapter(kind, norm=True) for kind in BOTTLENECKS), adapter("lora"), adapter("ia3")
    )

    @jax.jit
    @jax.grad
    def gradient(adapters):
        changed = jax.tree.map(lambda leaf: leaf, model)
        changed.adapters = adapters
        if of == "logits":
            return changed.caption_logits(IMAGE, TOKENS, VALID).var()
        return (changed.encode_text(TOKENS, VALID) ** 3).sum()

    silent = {
        name
        for name, value in params(gradient(model.adapters)).items()
        if not np.abs(value).max() > 1e-9
    }
    elsewhere = {
        name for name in params(model.adapters) if not name.split(".")[1].startswith("text/layers")
    }
    assert silent == (set() if of == "logits" else elsewhere)


@pytest.mark.long
def test_both_passes_in_one_traversal_are_adapted_as_in_two_calls():
    configs = adapter("sequential"), adapter("lora"), adapter("ia3")

    def two_pass(passes):
        model = with_adapters(*configs, compute=ComputeConfig(passes=passes))
        return jax.jit(lambda model: vars(model.two_pass(IMAGE, TOKENS, VALID)))(model)

    assert max(apart(two_pass("fused"), two_pass("two_calls")).values()) < 1e-5


@pytest.mark.parametrize("config", [CONFIG, prefix_config()], ids=["cross-attention", "prefix"])
def test_cached_steps_are_adapted_as_the_whole_pass_is(config):
    model = with_adapters(
        adapter("scaled_parallel", norm=True), adapter("lora"), adapter("ia3"), base=config
    )
    tokens, begun = TOKENS[:1].repeat(4, 0), 5

    @jax.jit
    def both(model):
        image, decoder = model.image_tokens(IMAGE).tokens, model.decoder
        whole = decoder.caption_pass(tokens, jnp.ones(tokens.shape, bool), image)
        first, cache = prefill(decoder, tokens[:, :begun], image, tokens.shape[1])

        def step(cache, inputs):
            row, cache = cached_step(decoder, *inputs, cache)
            return cache, row

        positions = jnp.arange(begun, tokens.shape[1])
        _, rows = jax.lax.scan(step, cache, (jnp.asarray(tokens[:, begun:].T), positions))
        steps = jnp.concatenate([first[:, -begun:], rows.swapaxes(0, 1)], axis=1)
        return {"features": steps}, {"features": whole}

    assert apart(*both(model))["features"] < 1e-5


# --- sites


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            AdapterConfig(sites=("text.layer.mlp",)),
            "'text.layer.mlp', which is no site .* text.layers.mlp",
        ),
        (
            AdapterConfig(sites=("*.attn", "text.layers.attn.key")),
            "is not an attention or MLP .* text.layers.attn",
        ),
        (
            AdapterConfig(kind="lora", sites=("vision.layers.mlp",)),
            "is not a linear map .* vision.layers.mlp.up",
        ),
        (
            AdapterConfig(kind="ia3", sites=("image_projection",)),
            "is no site of this model: 'ia3' goes on",
        ),
        (AdapterConfig(reduction=49), "reduction is 49, expected at most the width 48"),
        (
            AdapterConfig(kind="lora", sites=("*.up",), rank=33),
            "rank is 33, expected at most 32, the smaller size of vision.layers.mlp",
        ),
        (AdapterConfig(name="items"), "name is 'items', which has another meaning"),
    ],
)
def test_an_adapter_that_cannot_be_is_refused(config, message, base):
    with pytest.raises(ValueError, match=message) as error:
        mammut.add_adapter(base, config, rngs=nnx.Rngs(0))
    assert one_sentence(error)


def test_two_adapters_of_one_name_share_no_site(base):
    one, other = (
        AdapterConfig(sites=("*.mlp",)),
        AdapterConfig(sites=("text.layers.mlp",), kind="parallel"),
    )
    with pytest.raises(ValueError, match="'default' are on the site text.layers.mlp"):
        mammut.add_adapter(base, one, other, rngs=nnx.Rngs(0))
    elsewhere = dataclasses.replace(other, sites=("text.layers.attn",))
    model = mammut.add_adapter(base, one, elsewhere, rngs=nnx.Rngs(0))
    assert model.active_adapters == ("default",)
    assert {"text/layers/mlp", "text/layers/attn", "vision/layers/mlp"} < set(
        model.adapters["default"]
    )


def test_every_stack_of_layers_has_sites(base):
    vision = dataclasses.replace(CONFIG.vision, attn_gate=True, activation="swiglu")
    text = dataclasses.replace(
        tiny_config().text,
        pooling="end",
        text_only_depth=1,
        cross_attn_position="last_bare",
        qk_norm=True,
    )
    model = with_adapters(
        adapter("lora"), base=dataclasses.replace(CONFIG, vision=vision, text=text)
    )
    sites = set(model.adapters["lora"])
    for stack in (
        "text/layers",
        "text/cross_layers",
        "text/bare_layers",
        "text/text_only_layers",
        "vision/layers",
    ):
        assert f"{stack}/attn/query" in sites
    assert {
        "vision/layers/mlp/gate",
        "vision/layers/attn/gate",
        "text/text_only_layers/mlp/down",
    } < sites
    assert not any(site.startswith("text/bare_layers/mlp") or "norm" in site for site in sites)


def test_a_model_with_adapters_has_the_random_weights_of_one_without():
    configs = (
        CONFIG,
        dataclasses.replace(
            CONFIG, adapters=(AdapterConfig(), adapter("lora", sites=("*.query",)))
        ),
    )
    without, with_them = (params(MaMMUT(config, rngs=nnx.Rngs(3))) for config in configs)
    assert all(np.array_equal(with_them[name], value) for name, value in without.items())
    assert {name.split(".")[0] for name in with_them.keys() - without.keys()} == {"adapters"}


# --- several adapters on one base


def test_adapters_of_one_base_are_switched_on_and_off(several, plain):
    alone = outputs(mammut.remove_adapter(mammut.remove_adapter(several, "first"), "third"))
    assert max(apart(outputs(mammut.set_active_adapters(several, "second")), alone).values()) == 0
    assert min(apart(alone, plain).values()) > 1e-3
    assert min(apart(alone, outputs(several)).values()) > 1e-3
    assert max(apart(outputs(mammut.set_active_adapters(several)), plain).values()) == 0
    assert mammut.set_active_adapters(several, "third", "first").active_adapters == (
        "first",
        "third",
    )
    assert several.active_adapters == ("first", "second", "third")


def test_adding_and_removing_leaves_the_model_that_was_given_alone(base, plain):
    added = mammut.add_adapter(base, adapter("lora"), rngs=nnx.Rngs(0))
    assert base.adapters is None and base.config == CONFIG and base.active_adapters == ()
    assert max(apart(outputs(base), plain).values()) == 0
    removed = mammut.remove_adapter(added, "lora")
    assert nnx.graphdef(removed) == nnx.graphdef(base)
    assert "lora" in added.adapters
    assert nnx.graphdef(added) == nnx.graphdef(tiny_model(added.config))


@pytest.mark.parametrize(
    "act", [mammut.remove_adapter, mammut.set_active_adapters, mammut.merge_adapter]
)
def test_an_adapter_that_there_is_not_is_refused(act, several, base):
    with pytest.raises(ValueError, match="no adapter 'fourth', it has first, second, third"):
        act(several, "fourth")
    with pytest.raises(ValueError, match="no adapter 'fourth', it has none"):
        act(base, "fourth")


def test_a_name_is_given_once(several):
    with pytest.raises(ValueError, match="has an adapter 'second' already"):
        mammut.add_adapter(several, adapter("ia3", "second"), rngs=nnx.Rngs(0))


def test_parameters_are_counted_by_adapter(several):
    # rank 3 on the maps of 2 layers of width 48 (heads 3 x 16, MLP 80), and on value of 2 layers of
    # width 32.
    assert mammut.num_adapter_params(several, "second") == 2 * 3 * (
        4 * (48 + 48) + 2 * (48 + 80)
    ) + 2 * 3 * (32 + 32)
    names = ("first", "second", "third")
    assert mammut.num_adapter_params(several) == sum(
        mammut.num_adapter_params(several, name) for name in names
    )


# --- merged


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_merged_adapter_is_plain_weights_that_do_the_same(kind, base, plain):
    model = with_adapters(adapter(kind, **({"alpha": 2.0} if kind == "lora" else {})))
    merged = mammut.merge_adapter(model, kind)
    assert nnx.graphdef(merged) == nnx.graphdef(base) and merged.config == base.config
    # Logits have numbers of a hundred terms of both signs: float32 carries 1e-6 of the largest of
    # them.
    assert max(apart(outputs(merged), outputs(model)).values()) < 3e-6
    assert min(apart(outputs(merged), plain).values()) > 0.02
    # the base is not written to
    assert max(apart(outputs(mammut.set_active_adapters(model)), plain).values()) == 0


def test_adapters_of_lora_merge_in_any_order(several):
    without = mammut.remove_adapter(several, "third")
    for first, second in (("first", "second"), ("second", "first")):
        merged = mammut.merge_adapter(mammut.merge_adapter(without, first), second)
        assert max(apart(outputs(merged), outputs(without)).values()) < 3e-6


def test_what_weights_cannot_stand_for_is_not_merged(several):
    with pytest.raises(ValueError, match="'third' is a bottleneck on text.cross_layers.attn"):
        mammut.merge_adapter(several, "third")
    model = with_adapters(adapter("lora"), adapter("ia3"))
    with pytest.raises(
        ValueError, match="another adapter works on text.* before 'ia3': merge or remove that one"
    ):
        mammut.merge_adapter(model, "ia3")
    merged = mammut.merge_adapter(mammut.merge_adapter(model, "lora"), "ia3")
    assert max(apart(outputs(merged), outputs(model)).values()) < 3e-6


# --- saved and loaded


@pytest.fixture
def folder(several, tmp_path):
    mammut.save_adapter(tmp_path / "adapter", several, "second")
    return tmp_path / "adapter"


def test_a_saved_adapter_does_on_its_base_what_it_did(folder, several, base):
    loaded = mammut.load_adapter(base, folder)
    assert (
        loaded.active_adapters == ("second",)
        and loaded.config.adapters == several.config.adapters[1:2]
    )
    assert (
        max(apart(outputs(loaded), outputs(mammut.set_active_adapters(several, "second"))).values())
        == 0
    )
    size = 4 * mammut.num_adapter_params(several, "second")
    assert size < (folder / "adapter.safetensors").stat().st_size < size + 3_000


def test_an_adapter_is_loaded_under_another_name_beside_others(folder, several):
    with pytest.raises(ValueError, match="has an adapter 'second' already"):
        mammut.load_adapter(several, folder)
    loaded = mammut.load_adapter(several, folder, "again")
    assert loaded.active_adapters == ("first", "second", "third", "again")
    second, again = (
        outputs(mammut.set_active_adapters(loaded, name)) for name in ("second", "again")
    )
    assert max(apart(again, second).values()) == 0


def test_the_maps_that_make_a_prefix_are_saved_with_its_adapter_and_others_when_asked(tmp_path):
    config = prefix_config()
    trained, other = with_adapters(AdapterConfig(), base=config), tiny_model(config, seed=1)
    mammut.save_adapter(tmp_path, trained, "default")
    loaded, was, now = mammut.load_adapter(other, tmp_path), params(other), params(trained)
    for name, value in params(loaded).items():
        of_prefix = name.startswith(("image_projection.", "prefix_norm.", "adapters."))
        assert np.array_equal(value, now[name] if of_prefix else was[name]), name
    mammut.save_adapter(tmp_path, trained, "default", also=("vision.norm.*",))
    assert json.loads((tmp_path / "adapter.json").read_text())["also"] == [
        "vision.norm.bias",
        "vision.norm.scale",
    ]
    with pytest.raises(ValueError, match="'vision.nrm.*', which fits no parameter of the base"):
        mammut.save_adapter(tmp_path, trained, "default", also=("vision.nrm.*",))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("text", {"mlp_dim": 96}, "another base: text.mlp_dim is 96, it was 80"),
        (
            "vision",
            {"image_mean": (0.4, 0.5, 0.5)},
            r"another base: vision.image_mean is \[0.4, 0.5, 0.5\], it was",
        ),
        (None, {"projection_bias": False}, "another base: projection_bias is False, it was True"),
    ],
)
def test_an_adapter_of_another_base_is_refused(part, change, message, folder):
    config = CONFIG
    if part:
        change = {part: dataclasses.replace(getattr(config, part), **change)}
    with pytest.raises(ValueError, match=message):
        mammut.load_adapter(tiny_model(dataclasses.replace(config, **change)), folder)


def test_how_a_base_is_computed_and_stored_makes_no_other_base(folder):
    other = dataclasses.replace(CONFIG, adapters=(adapter("ia3"),))
    compute = ComputeConfig(param_dtype="bfloat16", remat="full", unroll=2)
    assert base_hash(other) == base_hash(CONFIG) != base_hash(tiny_config())
    loaded = mammut.load_adapter(tiny_model(other, compute=compute), folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.adapters["second"])} == {
        jnp.dtype("bfloat16")
    }


def test_a_damaged_adapter_is_refused(folder, base):
    for name in ("adapter.json", "adapter.safetensors"):
        before = (folder / name).read_bytes()
        flip(folder / name)
        with pytest.raises(mammut.CheckpointError, match=f"{name} does not have the SHA-256"):
            mammut.load_adapter(base, folder)
        (folder / name).write_bytes(before)
    (folder / "adapter.json").unlink()
    with pytest.raises(mammut.CheckpointError, match="adapter.json is missing"):
        mammut.load_adapter(base, folder)


def test_a_model_folder_holds_the_adapters_too(several, tmp_path):
    mammut.save(tmp_path, several, tiny_processor(CONFIG))
    loaded, _ = mammut.load(tmp_path)
    assert loaded.config == several.config and loaded.active_adapters == several.active_adapters
    got, expected = params(loaded), params(several)
    assert got.keys() == expected.keys() and all(
        np.array_equal(got[name], value) for name, value in expected.items()
    )


# --- on a mesh


@pytest.mark.long
def test_adapters_on_a_mesh_do_what_they_do_on_one_device():
    model = with_adapters(
        *(adapter(kind, norm=True) for kind in BOTTLENECKS), adapter("lora"), adapter("ia3")
    )
    axes, graphdef = logical_axes(model), nnx.graphdef(model)
    of_adapters = {path: names for path, names in axes.items() if path[0] == "adapters"}
    assert of_adapters and all(
        names[0] == "layer" and {*names} <= {*sharding.RULES} for names in of_adapters.values()
    )
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    state = nnx.to_pure_dict(nnx.state(model))
    shardings = sharding.param_shardings(state, axes, mesh)
    split = shardings["adapters"]["sequential"]["text/layers/mlp"]["down"]["kernel"].spec
    assert tuple(split) == (None, "fsdp", "model")

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def logits(state, batch):
        return nnx.merge(graphdef, state).caption_logits(
            batch["image"], batch["tokens"], batch["text_valid"]
        )

    expected = logits(state, BATCH)
    with jax.set_mesh(mesh):
        placed = jax.tree.map(jax.device_put, state, shardings)
        got = logits(placed, sharding.device_batch(BATCH, mesh))
    assert (
        np.abs(np.asarray(got) - np.asarray(expected)).max()
        < 1e-5 * np.abs(np.asarray(expected)).max()
    )
