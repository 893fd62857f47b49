"""Adapters on GPT-2 and GPT-J against PyTorch.

Bottlenecks are compared with a wrapper around transformers' sublayers, LoRA and (IA)^3 with peft.
"""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mammut
from mammut.config import AdapterConfig
from mammut.models.mammut import MaMMUT
from mammut.weights.files.tensor_file import TensorSpec
from mammut.weights.formats.huggingface import model_config
from mammut.weights.formats.huggingface_config import decoder_config
from mammut.weights.formats.huggingface_tables import table
from mammut.weights.opened import LazyTensors, model_specs

REASON = "the test extra is not installed"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
peft = pytest.importorskip("peft", reason=REASON)

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 9))
SIZES = {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 16}
# Our maps of a layer and those of transformers' GPT-J.
MAPS = {
    "attn/query": "attn.q_proj",
    "attn/key": "attn.k_proj",
    "attn/value": "attn.v_proj",
    "attn/out": "attn.out_proj",
    "mlp/up": "mlp.fc_in",
    "mlp/down": "mlp.fc_out",
}


def numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return 0.3 * np.random.default_rng(list(name.encode())).normal(size=shape).astype(np.float32)


def fill(module: "torch.nn.Module") -> None:
    """Random numbers in every parameter."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(numbers(name, tuple(parameter.shape))))


@functools.cache
def theirs(kind: str) -> "torch.nn.Module":
    made = {
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES)),
        "gptj": lambda: transformers.GPTJForCausalLM(
            transformers.GPTJConfig(**SIZES, rotary_dim=4)
        ),
    }[kind]()
    fill(made)
    return made.eval()


def their_logits(model: "torch.nn.Module") -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def ours(model: "torch.nn.Module", *adapters: AdapterConfig) -> MaMMUT:
    """Our model with the weights of one of transformers."""
    values, tensors = model.config.to_dict(), {k: v.numpy() for k, v in model.state_dict().items()}
    found = LazyTensors(
        {k: TensorSpec(v.shape, v.dtype) for k, v in tensors.items()}, tensors.__getitem__
    )
    config = model_config(decoder_config(values, "config.json"))
    specs = {path: spec for path, spec in model_specs(config).items() if path.startswith("text.")}
    weights = table(values["model_type"], config.text, found.specs).to_ours(found, specs, "model")
    abstract = nnx.eval_shape(lambda: MaMMUT(config, rngs=nnx.Rngs(0)))
    # Of the image encoder nothing is used.
    made = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
    for path in specs:
        functools.reduce(getattr, path.split("."), made).set_value(jnp.asarray(weights.read(path)))
    return mammut.add_adapter(made, *adapters, rngs=nnx.Rngs(0)) if adapters else made


@jax.jit
def our_logits(model: MaMMUT) -> jax.Array:
    tokens = jnp.asarray(TOKENS)
    return model.text.logits(model.decoder.language_pass(tokens, jnp.ones(tokens.shape, bool)))


def assert_close(model: MaMMUT, adapted: "torch.nn.Module", base: "torch.nn.Module") -> None:
    """Asserts that the logits are those of the adapted model, to 1e-5 of their size.

    They are far from those of its base.
    """
    got, expected, before = np.asarray(our_logits(model)), their_logits(adapted), their_logits(base)
    size = np.abs(expected).max()
    assert np.abs(got - expected).max() < 1e-5 * size
    assert np.abs(expected - before).max() > 0.05 * size


class Bottleneck(torch.nn.Module):
    """A sublayer of transformers with an adapter, as arXiv 2112.05253 describes it."""

    def __init__(self, sublayer: "torch.nn.Module", kind: str, width: int, inside: int, norm: bool):
        super().__init__()
        self.sublayer, self.kind = sublayer, kind
        self.norm = torch.nn.LayerNorm(width) if norm else torch.nn.Identity()
        self.down, self.up = torch.nn.Linear(width, inside), torch.nn.Linear(inside, width)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, *args, **options):
        x = args[0] if args else options["hidden_states"]
        given = self.sublayer(*args, **options)
        y, *rest = given if isinstance(given, tuple) else (given,)
        z = self.up(torch.relu(self.down(self.norm(y if self.kind == "sequential" else x))))
        y = y + (self.scale * z if self.kind == "scaled_parallel" else z)
        return (y, *rest) if isinstance(given, tuple) else y


@pytest.mark.parametrize("sublayers", [("mlp",), ("attn", "mlp")], ids=["feed-forward", "both"])
@pytest.mark.parametrize("kind", ["sequential", "parallel", "scaled_parallel"])
@pytest.mark.parametrize("base", ["gpt2", "gptj"])
def test_bottlenecks_are_those_of_a_pytorch_wrapper(base, kind, sublayers):
    norm = base == "gpt2"  # the optional layer norm, in half of the cases
    adapted, reduction = copy.deepcopy(theirs(base)), 4
    config = AdapterConfig(
        kind=kind, sites=tuple(f"text.layers.{name}" for name in sublayers), norm=norm
    )
    model = ours(theirs(base), dataclasses.replace(config, reduction=reduction))
    for name in sublayers:
        of_ours = model.adapters["default"][f"text/layers/{name}"]
        for i, block in enumerate(adapted.transformer.h):
            wrapped = Bottleneck(getattr(block, name), kind, 24, 24 // reduction, norm)
            for part in ("norm", "down", "up"):
                fill_part(getattr(of_ours, part), getattr(wrapped, part), f"{name}.{i}.{part}", i)
            if kind == "scaled_parallel":
                wrapped.scale.data.fill_(0.5 + i)
                of_ours.scale.set_value(of_ours.scale[...].at[i].set(0.5 + i))
            setattr(block, name, wrapped)
    assert_close(model, adapted, theirs(base))


def fill_part(
    of_ours: nnx.Module | None, of_theirs: "torch.nn.Module", name: str, layer: int
) -> None:
    """The same random numbers in a layer of ours and in a module of theirs."""
    for parameter, value in of_theirs.named_parameters():
        drawn = numbers(f"{name}.{parameter}", tuple(value.shape))
        value.data.copy_(torch.from_numpy(drawn))
        key = "bias" if parameter == "bias" else "scale" if value.ndim == 1 else "kernel"
        param = getattr(of_ours, key)
        param.set_value(param[...].at[layer].set(drawn.T))


def test_lora_is_that_of_peft():
    targets = [name.split(".")[1] for name in MAPS.values()]
    adapted = peft.get_peft_model(
        copy.deepcopy(theirs("gptj")),
        peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, lora_dropout=0.0),
    ).eval()
    fresh = {
        name: value.detach().numpy().copy()
        for name, value in adapted.named_parameters()
        if "lora_" in name
    }
    model = ours(
        theirs("gptj"), AdapterConfig(kind="lora", sites=("text.layers.*",), rank=4, alpha=6.0)
    )
    sites = model.adapters["default"]
    assert {site.removeprefix("text/layers/") for site in sites} == MAPS.keys()
    for site, name in MAPS.items():
        adapter = sites[f"text/layers/{site}"]
        for i in range(2):
            for part, letter in ((adapter.down, "A"), (adapter.up, "B")):
                path = f"base_model.model.transformer.h.{i}.{name}.lora_{letter}.default.weight"
                was, start = fresh[path], np.asarray(part.kernel[i])
                # Drawn from the same range.
                assert np.abs(start).max() <= 1 / np.sqrt(was.shape[1]) and np.abs(
                    start
                ).std() == pytest.approx(np.abs(was).std(), rel=0.35)
                drawn = numbers(path, was.shape)
                adapted.get_parameter(path).data.copy_(torch.from_numpy(drawn))
                part.kernel.set_value(part.kernel[...].at[i].set(drawn.T.reshape(start.shape)))
    assert_close(model, adapted, theirs("gptj"))
    assert_merged_alike(model, adapted)


def test_ia3_is_that_of_peft():
    # Keys and values without biases, an output with one, and an input.
    sites = {site: MAPS[site] for site in ("attn/key", "attn/value", "mlp/up", "mlp/down")}
    targets = [name.split(".")[1] for name in sites.values()]
    adapted = peft.get_peft_model(
        copy.deepcopy(theirs("gptj")),
        peft.IA3Config(target_modules=targets, feedforward_modules=["fc_out"]),
    ).eval()
    patterns = tuple(f"text.layers.{site.replace('/', '.')}" for site in sites)
    model = ours(theirs("gptj"), AdapterConfig(kind="ia3", sites=patterns))
    for site, name in sites.items():
        scale = model.adapters["default"][f"text/layers/{site}"].scale
        for i in range(2):
            path = f"base_model.model.transformer.h.{i}.{name}.ia3_l.default"
            value = adapted.get_parameter(path)
            assert (value == 1).all() and (scale[i] == 1).all()
            drawn = 1 + numbers(path, tuple(value.shape))
            value.data.copy_(torch.from_numpy(drawn))
            scale.set_value(scale[...].at[i].set(drawn.reshape(scale.shape[1:])))
    assert_close(model, adapted, theirs("gptj"))
    assert_merged_alike(model, adapted)


def assert_merged_alike(model: MaMMUT, adapted: "torch.nn.Module") -> None:
    """Merged by us and by peft, the weights are the same, and none is that of the base."""
    got, expected = mammut.merge_adapter(model, "default"), ours(adapted.merge_and_unload())
    for site in model.adapters["default"]:
        path = site.split("/")[1:]
        a, b, base = (functools.reduce(getattr, path, m.text) for m in (got, expected, model))
        assert np.abs(a.kernel[...] - b.kernel[...]).max() < 1e-6
        assert np.abs(a.kernel[...] - base.kernel[...]).max() > 0.1
        assert a.bias is None or np.abs(a.bias[...] - b.bias[...]).max() < 1e-6
