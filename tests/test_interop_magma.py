"""Checkpoints of MAGMA.

The logits against a PyTorch model of the same names, the published sizes, bad files.
"""

import collections
import dataclasses
import math
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from open_clip_models import original_package
from resnet_originals import original

import mammut
from mammut import presets
from mammut.config import AdapterConfig, AugmentConfig, ResNetConfig
from mammut.convert import convert
from mammut.data.images import ImageTransform
from mammut.data.tokenizer import MissingTokenizer
from mammut.models.flops import num_params
from mammut.training.command_line import load_recipe
from mammut.weights.files.tensor_file import (
    CheckpointError,
    TensorSpec,
    open_tensors,
    write_safetensors,
)
from mammut.weights.formats.magma import open_magma
from mammut.weights.model_folder import open_model, place
from mammut.weights.opened import LazyTensors, model_specs

torch = pytest.importorskip("torch", reason="MAGMA is a PyTorch model")
nn = torch.nn

ROOT = pathlib.Path(__file__).parents[1]
TOWER = ResNetConfig(stem_width=8, stages=(1, 2, 1, 1))
TINY = {"num_heads": 4, "rope_dims": 4, "max_length": 64}
VOCAB, WIDTH, PREFIX = 61, 32, 49
V1 = {"mlp": ("normal", 4, False)}
V2 = {"mlp": ("normal", 8, False), "attn": ("normal", 8, False)}
PARALLEL = {"mlp": ("scaled_parallel", 4, True), "attn": ("parallel", 6, False)}
ADAPTERS = {
    "v2": V2,
    "behind attention, with a norm": {"attn": ("normal", 2, True)},
    "parallel": PARALLEL,
    "none": {},
}


class Adapter(nn.Module):
    """A bottleneck around a module, which has its place in the tree of names."""

    def __init__(self, width: int, reduction: int, norm: bool, scaled: bool = False, **around: Any):
        super().__init__()
        maps = [
            nn.Linear(width, width // reduction),
            nn.ReLU(),
            nn.Linear(width // reduction, width),
        ]
        self.adapter = nn.Sequential(*([nn.LayerNorm(width)] if norm else []), *maps)
        for name, module in around.items():
            setattr(self, name, module)
        self.adapter_scale = nn.Parameter(torch.ones(1)) if scaled else 1

    def forward(self, x):
        if hasattr(self, "module"):
            return self.module(x) + self.adapter_scale * self.adapter(x)
        y = self.attn_block(x) if hasattr(self, "attn_block") else x
        return y + self.adapter(y)


def adapted(
    module: nn.Module, site: str, width: int, kind: str, reduction: int, norm: bool
) -> nn.Module:
    if kind != "normal":
        return Adapter(width, reduction, norm, kind == "scaled_parallel", module=module)
    if site == "attn":
        return Adapter(width, reduction, norm, attn_block=module)
    return nn.Sequential(module, Adapter(width, reduction, norm))


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, turned: int):
        super().__init__()
        self.heads, self.turned = heads, turned
        for name in ("k", "v", "q", "out"):
            setattr(self, f"{name}_proj", nn.Linear(width, width, bias=False))
        self.register_buffer("bias", torch.ones(1, 1, 64, 64, dtype=torch.bool).tril())
        self.register_buffer("masked_bias", torch.tensor(-1e9))

    def rotated(self, x):
        """Pairs of numbers as complex ones, turned by their position times a frequency."""
        place = torch.arange(x.shape[1], dtype=torch.float64)
        angle = place[:, None] * 10_000 ** (
            -torch.arange(0, self.turned, 2, dtype=torch.float64) / self.turned
        )
        pairs = torch.view_as_complex(x[..., : self.turned].double().unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(
            pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
        ).flatten(-2)
        return torch.cat([turned.to(x.dtype), x[..., self.turned :]], -1)

    def forward(self, x):
        query, key, value = (
            m(x).unflatten(-1, (self.heads, -1)) for m in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = (
            torch.einsum("blnk,bsnk->bnls", self.rotated(query), self.rotated(key))
            / query.shape[-1] ** 0.5
        )
        scores = scores.masked_fill(~self.bias[..., : x.shape[1], : x.shape[1]], -torch.inf)
        return self.out_proj(torch.einsum("bnls,bsnk->blnk", scores.softmax(-1), value).flatten(-2))


class MLP(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        return self.c_proj(nn.functional.gelu(self.c_fc(x), approximate="tanh"))


class Attention(nn.Module):
    def __init__(self, *sizes: int):
        super().__init__()
        self.attention = SelfAttention(*sizes)

    def forward(self, x):
        return self.attention(x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, turned: int, inner: int, adapters: dict[str, tuple]):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, heads, turned), MLP(width, inner)
        for site, how in adapters.items():
            setattr(self, site, adapted(getattr(self, site), site, width, *how))

    def forward(self, x):
        y = self.ln_1(x)
        return x + self.attn(y) + self.mlp(y)


class Magma(nn.Module):
    """MAGMA in PyTorch, with the names of the public code.

    Where that code has a module under two names, this model has both.
    """

    def __init__(
        self,
        tower: nn.Module,
        channels: int,
        adapters: dict[str, tuple],
        *,
        vocab=VOCAB,
        width=WIDTH,
        depth=2,
        heads=4,
        turned=4,
        inner=48,
        norm=True,
    ):
        super().__init__()
        self.lm = nn.Module()
        self.lm.transformer = nn.Module()
        self.lm.transformer.wte = nn.Embedding(vocab, width)
        self.lm.transformer.h = nn.ModuleList(
            Block(width, heads, turned, inner, adapters) for _ in range(depth)
        )
        self.lm.transformer.ln_f = nn.LayerNorm(width)
        self.lm.lm_head = nn.Linear(width, vocab)
        self.word_embedding, self.transformer = self.lm.transformer.wte, self.lm.transformer.h
        self.image_prefix = nn.Module()
        self.image_prefix.enc = tower
        self.image_prefix.proj = nn.Linear(channels, width)
        if norm:
            self.image_prefix.ln = nn.LayerNorm(width)

    def forward(self, image, tokens):
        """Logits behind every position of the image and of the tokens after it."""
        grid = self.image_prefix.enc(image).flatten(2).transpose(1, 2)
        prefix = self.image_prefix.proj(grid)
        prefix = self.image_prefix.ln(prefix) if hasattr(self.image_prefix, "ln") else prefix
        x = torch.cat([prefix, self.word_embedding(tokens)], 1)
        for block in self.transformer:
            x = block(x)
        return self.lm.lm_head(self.lm.transformer.ln_f(x))


def make(adapters: dict[str, tuple], **sizes: Any) -> Magma:
    """A model with noise on every parameter: norms of 1 and biases of 0 would hide errors."""
    tower = original(TOWER)
    tower.attnpool = nn.Identity()
    model = Magma(tower, TOWER.width, adapters, **sizes).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("image_prefix.enc."):
                parameter.add_((0.2 if parameter.ndim == 1 else 0.1) * torch.randn_like(parameter))
    return model


def deepspeed(model: nn.Module, path: Any) -> Any:
    """Saves it with what DeepSpeed saves beside."""
    shapes = collections.OrderedDict(
        (name, value.shape) for name, value in model.named_parameters()
    )
    beside = {
        "optimizer": None,
        "lr_scheduler": {"last_batch_iteration": 3},
        "csr_tensor_module_names": set("a"),
    }
    beside |= {
        "skipped_steps": 0,
        "param_shapes": [shapes],
        "config": {"encoder_name": "clip_resnet_large"},
    }
    torch.save({"module": model.state_dict(), **beside}, path)
    return path


def opened(model: nn.Module, tmp_path: Any, **sizes: int) -> Any:
    return open_magma(
        open_tensors(deepspeed(model, tmp_path / "x.pt")), tmp_path, "x.pt", **TINY | sizes
    )


IMAGE = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32)  # normalised
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (2, 9)).astype(np.int32)


def logits_of(model: nn.Module) -> np.ndarray:
    """Of the tokens, the first of which is the start, whose place the image takes."""
    with torch.no_grad():
        image, tokens = torch.tensor(IMAGE).permute(0, 3, 1, 2), torch.tensor(TOKENS[:, 1:]).long()
        return model(image, tokens)[:, PREFIX - 1 :].numpy()


@jax.jit
def ours(model: mammut.MaMMUT) -> jax.Array:
    return model.caption_logits(IMAGE, jnp.asarray(TOKENS))


@pytest.mark.parametrize("adapters", ADAPTERS.values(), ids=ADAPTERS)
def test_logits_are_those_of_the_original(adapters, tmp_path):
    theirs = make(adapters, norm=bool(adapters))
    expected, found = logits_of(theirs), opened(theirs, tmp_path)
    np.testing.assert_allclose(ours(place(found)), expected, atol=1e-5 * np.abs(expected).max())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".adapter." in name:
                parameter.zero_()
    if adapters:  # they have a share in it
        assert np.abs(logits_of(theirs) - expected).max() > 0.1


def test_the_config_is_told_by_the_shapes(tmp_path):
    found = opened(make(PARALLEL), tmp_path).config
    assert found.vision == TOWER
    assert (found.text.width, found.text.depth, found.text.mlp_dim, found.text.vocab_size) == (
        32,
        2,
        48,
        VOCAB,
    )
    assert found.adapters == (
        AdapterConfig(kind="scaled_parallel", reduction=4, norm=True, sites=("text.layers.mlp",)),
        AdapterConfig(kind="parallel", reduction=6, sites=("text.layers.attn",)),
    )
    assert opened(make(V2), tmp_path).config.adapters == (
        AdapterConfig(reduction=8, sites=("text.layers.mlp", "text.layers.attn")),
    )
    assert found.prefix_norm and not opened(make({}, norm=False), tmp_path).config.prefix_norm


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A file in float16 with the heads of GPT-J, and what its model says."""
    theirs = make(V1, width=1024, depth=1, heads=16, turned=64).half()
    path = deepspeed(theirs, tmp_path_factory.mktemp("magma") / "mp_rank_00_model_states.pt")
    return path, logits_of(theirs.float())


def test_a_file_is_loaded_and_converted_and_stays_the_same(half, tmp_path):
    path, expected = half
    model, processor = mammut.load(path)
    found = ours(model)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    convert(path, tmp_path / "converted", "mammut")
    mammut.save(tmp_path / "saved", model, processor)
    for folder in ("converted", "saved"):
        again, restored = mammut.load(tmp_path / folder)
        assert (
            again.config == model.config
            and restored.max_length == processor.max_length == 2048 - PREFIX + 1
        )
        np.testing.assert_array_equal(ours(again), found)


def test_a_bare_state_dict_and_safetensors_hold_the_same_model(half, tmp_path):
    path, _ = half
    expected = open_model(path)
    state = {name: value for name, value in torch.load(path)["module"].items() if value.ndim}
    torch.save(state, tmp_path / "bare.pt")
    arrays = {name: value.numpy() for name, value in state.items()}
    specs = {name: TensorSpec(array.shape, array.dtype) for name, array in arrays.items()}
    write_safetensors(tmp_path / "x.safetensors", specs, arrays.__getitem__)
    for name in ("bare.pt", "x.safetensors"):
        found = open_model(tmp_path / name)
        assert found.config == expected.config
        for parameter in (
            "text.token_embed.embedding",
            "adapters.default.text/layers/mlp.up.kernel",
        ):
            np.testing.assert_array_equal(
                found.tensors.read(parameter), expected.tensors.read(parameter)
            )


def published(
    adapters: dict[str, tuple], width: int = 96, stages: tuple = (6, 8, 18, 8), depth: int = 28
) -> dict[str, TensorSpec]:
    """Names and shapes of a file of the published size; there are no numbers."""
    original_package()
    with torch.device("meta"):
        tower = sys.modules["open_clip.modified_resnet"].ModifiedResNet(
            list(stages), 16, 4, 64, width
        )
        tower.attnpool = nn.Identity()
        sizes = {
            "vocab": 50_258,
            "width": 4096,
            "depth": depth,
            "heads": 16,
            "turned": 64,
            "inner": 16_384,
        }
        model = Magma(tower, 32 * width, adapters, **sizes)
    return {
        name: TensorSpec(tuple(value.shape), np.dtype("float16"))
        for name, value in model.state_dict().items()
    }


def no_numbers(name: str) -> np.ndarray:
    raise AssertionError(f"{name} was read")


def test_a_file_of_the_published_size_is_opened_by_its_header_alone(tmp_path):
    specs = published(V1)
    found = open_magma(LazyTensors(specs, no_numbers), tmp_path, "x.pt")
    assert found.config.num_prefix_tokens == 144 and found.processor.max_length == 2048 - 143
    counts = num_params(found.config)
    assert counts["adapters"] == 28 * (2 * 4096 * 1024 + 4096 + 1024)
    computed = "attention.masked_bias", "attention.bias", "num_batches_tracked"
    learned = [
        name
        for name in specs
        if name.startswith(("lm.", "image_prefix.")) and not name.endswith(computed)
    ]
    # scalars of another loss
    assert counts["total"] == sum(math.prod(specs[name].shape) for name in learned) + 2
    assert set(found.tensors.specs) == set(model_specs(found.config))


@pytest.mark.parametrize(
    ("version", "adapters", "preset"),
    [("v1", V1, presets.magma_v1()), ("v2", V2, presets.magma_v2())],
    ids=["v1", "v2"],
)
def test_a_file_of_the_published_size_has_the_config_of_the_preset(
    version, adapters, preset, tmp_path
):
    """But for the vocabulary, which MAGMA cuts to that of GPT-2 and the image."""
    recipe = load_recipe(ROOT / "configs" / f"magma_{version}.py")
    assert recipe.model == preset and recipe.augment == AugmentConfig(prefix_dropout=0.1)
    text = dataclasses.replace(preset.text, vocab_size=50_258)
    expected = dataclasses.replace(preset, text=text)
    assert (
        open_magma(LazyTensors(published(adapters), no_numbers), tmp_path, "x.pt").config
        == expected
    )


@pytest.mark.parametrize(
    ("width", "stages", "size"), [(80, (4, 6, 10, 6), 288), (64, (3, 4, 6, 3), 224)]
)
def test_the_tower_tells_the_image_size(width, stages, size, tmp_path):
    found = open_magma(
        LazyTensors(published(V1, width, stages, depth=1), no_numbers), tmp_path, "x.pt"
    )
    assert found.config.vision == ResNetConfig(stem_width=width, stages=stages, image_size=size)
    assert found.processor.image == ImageTransform(size, mode="shortest", interpolation="bicubic")


def test_without_a_tokenizer_the_ids_of_the_end_and_of_the_image_are_known(tmp_path):
    tokenizer = opened(make(V1), tmp_path).processor.tokenizer
    assert isinstance(tokenizer, MissingTokenizer)
    assert tokenizer.vocab_size == VOCAB - 1  # the image's is the last, and never generated
    assert tokenizer.eos_id == tokenizer.pad_id == VOCAB - 2


def test_a_tokenizer_beside_the_file_is_taken(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="GPT-2's tokenizer is Hugging Face's")
    pieces = {piece: place for place, piece in enumerate(["a", "b", "ab", "Ġ", "<|endoftext|>"])}
    pipeline = tokenizers.Tokenizer(tokenizers.models.BPE(pieces, [("a", "b")]))
    pipeline.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = tokenizers.decoders.ByteLevel()
    pipeline.save(str(tmp_path / "tokenizer.json"))
    processor = opened(make(V1), tmp_path).processor
    tokens, valid = processor.encode_text(["ab b"])
    assert tokens[0, valid[0]].tolist() == [4, 2, 3, 1, 4] and processor.decode(tokens[:, 1:]) == [
        "ab b"
    ]


WTE = "lm.transformer.wte.weight"
QUERY = "lm.transformer.h.1.attn.attention.q_proj.weight"
BAD = {
    "missing": ({QUERY: None}, f"{QUERY} is missing"),
    "unknown": (
        {"lm.transformer.h.0.ln_2.weight": (32,)},
        "h.0.ln_2.weight is not a tensor of this model",
    ),
    "misshapen": ({QUERY: (16, 32)}, rf"{QUERY} is \[16, 32\], expected \[32, 32\]"),
    "second name of another shape": (
        {"word_embedding.weight": (9, 9)},
        "word_embedding.weight is not a tensor",
    ),
    "no embedding": ({WTE: None}, f"has no {WTE}, which gives a size"),
    "no matrix": ({WTE: (32,)}, rf"{WTE} is \[32\], expected 2 axes"),
    "empty": (
        {"lm.transformer.h.0.mlp.1.adapter.0.weight": (0, 32)},
        "expected 2 axes, none empty",
    ),
    "wide adapter": (
        {"lm.transformer.h.0.mlp.1.adapter.0.weight": (64, 32)},
        "AdapterConfig.reduction is 0",
    ),
    "adapter that is too few": (
        {"lm.transformer.h.1.mlp.1.adapter.2.bias": None},
        "adapter.2.bias is missing",
    ),
    "other tower": (
        {"image_prefix.enc.conv3.weight": None},
        "has no image_prefix.enc.conv3.weight",
    ),
    "other heads": ({WTE: (VOCAB, 30)}, "width 30 is not a multiple of num_heads 4"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_file_that_does_not_fit_is_reported(change, message, tmp_path):
    theirs = open_tensors(deepspeed(make(V1), tmp_path / "x.pt"))
    changed = {
        name: shape and TensorSpec(shape, np.dtype("float32")) for name, shape in change.items()
    }
    specs = {
        name: spec for name, spec in (dict(theirs.specs) | changed).items() if spec is not None
    }
    with pytest.raises(CheckpointError, match=message):
        open_magma(LazyTensors(specs, theirs.read), tmp_path, "x.pt", **TINY)


def test_a_second_name_with_other_numbers_is_found_when_it_is_read(tmp_path):
    theirs = open_tensors(deepspeed(make(V1), tmp_path / "x.pt"))

    def changed(name: str) -> np.ndarray:
        return theirs.read(name) + (name == "word_embedding.weight")

    found = open_magma(LazyTensors(theirs.specs, changed), tmp_path, "x.pt", **TINY)
    with pytest.raises(CheckpointError, match=rf"{WTE} and word_embedding.weight differ"):
        found.tensors.read("text.token_embed.embedding")
    assert found.tensors.read("text.layers.attn.query.kernel").shape == (2, 32, 4, 8)


def test_what_is_left_out_has_its_reason(tmp_path):
    notes = "; ".join(opened(make(V1), tmp_path).notes)
    assert (
        "a second name of a tensor that is used" in notes
        and "a causal mask" in notes
        and "logit_scale" in notes
    )
