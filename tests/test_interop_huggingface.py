"""Language models of Hugging Face against transformers.

Each number is compared on random weights; then come configs, tokenizers and files.
"""

import json
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import mammut
from mammut.config import DecoderConfig, ModelConfig, VisionConfig
from mammut.data.images import ImageTransform
from mammut.data.processor import Processor
from mammut.data.tokenizer import MissingTokenizer, restore_tokenizer
from mammut.models import losses
from mammut.models.cached_decoder import cached_step, prefill
from mammut.models.compute import ComputeConfig
from mammut.models.decoder import TextDecoder
from mammut.testing import tiny_model, tiny_processor
from mammut.weights.files.tensor_file import (
    CheckpointError,
    TensorSpec,
    open_tensors,
    write_safetensors,
)
from mammut.weights.formats.huggingface_config import decoder_config
from mammut.weights.formats.huggingface_tables import table
from mammut.weights.model_folder import open_model, read_model_config
from mammut.weights.opened import model_specs
from mammut.weights.warm_start import start_config, warm_start

torch = pytest.importorskip("torch", reason="the models to compare with are PyTorch's")
transformers = pytest.importorskip(
    "transformers", reason="the models to compare with are transformers'"
)

VOCAB, LENGTH = 101, 32
NEOX = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 160,
}
GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4}
NEO = {
    "hidden_size": 64,
    "num_layers": 4,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 2]],
}
MODELS = {
    "gpt2": ("GPT2", GPT | {"n_inner": 160}),
    "gpt_neo": ("GPTNeo", NEO | {"window_size": 5}),
    "gptj": ("GPTJ", GPT | {"rotary_dim": 8}),  # of heads of 16
    "gpt_neox": (
        "GPTNeoX",
        NEOX | {"rope_parameters": {"rope_theta": 5e3, "partial_rotary_factor": 0.25}},
    ),
    "gpt_neox_serial": (
        "GPTNeoX",
        NEOX | {"use_parallel_residual": False, "hidden_act": "gelu_new"},
    ),
}
VARIANTS = [
    (
        "GPT2",
        GPT
        | {"scale_attn_weights": False, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-2},
    ),
    (
        "GPTNeo",
        NEO | {"attention_types": [[["local", "global", "global", "local"], 1]], "window_size": 3},
    ),
    (
        "GPTJ",
        GPT | {"tie_word_embeddings": True, "activation_function": "quick_gelu", "rotary_dim": 16},
    ),
    (
        "GPTNeoX",
        NEOX | {"attention_bias": False, "tie_word_embeddings": True, "layer_norm_eps": 1e-2},
    ),
]
TEXT = np.random.default_rng(0).integers(0, VOCAB, (3, 20)).astype(np.int32)
PREFIX = np.random.default_rng(1).normal(size=(3, 12, 64)).astype(np.float32)
# in the form of this library: the prefix stands in place of the start
START = np.pad(TEXT[:, :3], ((0, 0), (1, 0)))
STEPS = 10


def make(kind: str, settings: dict[str, Any], seed: int = 0):
    """Make a model of transformers with noise on every parameter.

    Without noise, norms of 1 and biases of 0 would hide errors.
    """
    shared = {
        "bos_token_id": 0,
        "eos_token_id": 0,
        "vocab_size": VOCAB,
        "max_position_embeddings": LENGTH,
    }
    config = getattr(transformers, f"{kind}Config")(**shared | settings)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class Pair(NamedTuple):
    theirs: Any
    ours: TextDecoder
    folder: pathlib.Path
    start: Any  # the text START behind a prefix, and the cache with room for STEPS tokens more
    step: Any  # one token more

    def embedded(self, prefix: np.ndarray, text: np.ndarray) -> Any:
        """What transformers takes for a prefix and the text behind it."""
        return torch.cat(
            [torch.tensor(prefix), self.theirs.get_input_embeddings()(torch.tensor(text))], dim=1
        )


def save(model, folder: pathlib.Path, **options) -> pathlib.Path:
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory) -> Pair:
    theirs = make(*MODELS[request.param])
    folder = save(theirs, tmp_path_factory.mktemp(request.param))
    ours, _ = mammut.load_language_model(folder)

    @jax.jit
    def start(prefix, prefix_valid):
        x, cache = prefill(ours, START, prefix, START.shape[1] + STEPS, prefix_valid)
        return ours.logits(x[:, PREFIX.shape[1] - 1 :]), cache

    @jax.jit
    def step(tokens, position, cache):
        x, cache = cached_step(ours, tokens, position, cache)
        return ours.logits(x), cache

    return Pair(theirs, ours, folder, start, step)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> pathlib.Path:
    return save(make("GPT2", GPT), tmp_path_factory.mktemp("folder"))


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"), torch.no_grad():
        yield


def everything(tokens: np.ndarray) -> np.ndarray:
    return np.ones(tokens.shape, bool)


def logits(ours: TextDecoder, tokens: np.ndarray) -> np.ndarray:
    found = jax.jit(lambda tokens, valid: ours.logits(ours.language_pass(tokens, valid)))
    return np.asarray(found(tokens, everything(tokens)))


# --- numbers


def test_logits_of_ids_are_those_of_transformers(pair):
    theirs = pair.theirs(torch.tensor(TEXT)).logits.numpy()
    assert theirs.std() > 0.5
    np.testing.assert_allclose(logits(pair.ours, TEXT), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind, settings", VARIANTS)
def test_logits_of_other_settings_are_those_of_transformers(kind, settings, tmp_path):
    theirs = make(kind, settings)
    ours, _ = mammut.load_language_model(save(theirs, tmp_path))
    np.testing.assert_allclose(
        logits(ours, TEXT), theirs(torch.tensor(TEXT)).logits.numpy(), rtol=0, atol=1e-5
    )


def test_logits_behind_a_prefix_of_vectors_are_those_of_transformers(pair):
    theirs = pair.theirs(inputs_embeds=pair.embedded(PREFIX, TEXT)).logits.numpy()
    embedded = np.concatenate([PREFIX, np.asarray(pair.ours.token_embed(TEXT))], axis=1)
    ours = pair.ours.logits(pair.ours.causal_pass(jnp.asarray(embedded)))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    tokens = np.pad(TEXT, ((0, 0), (1, 0)))
    ours = pair.ours.logits(pair.ours.caption_pass(tokens, everything(tokens), jnp.asarray(PREFIX)))
    np.testing.assert_allclose(ours, theirs[:, 11:], rtol=0, atol=1e-5)


def test_pads_in_front_of_a_text_change_none_of_its_logits(pair):
    pads = np.array([0, 3, 7])
    valid = np.arange(TEXT.shape[1]) >= pads[:, None]
    ours = np.asarray(pair.ours.logits(pair.ours.language_pass(TEXT, valid)))
    for row, count in enumerate(pads):
        theirs = pair.theirs(torch.tensor(TEXT[row : row + 1, count:])).logits.numpy()
        np.testing.assert_allclose(ours[row, count:], theirs[0], rtol=0, atol=1e-5)


def test_cached_steps_behind_a_padded_prefix_are_those_of_transformers(pair):
    pads = np.array([0, 3, 7])
    prefix_valid = jnp.arange(PREFIX.shape[1]) >= pads[:, None]
    first, cache = pair.start(PREFIX, prefix_valid)
    ours = [*jnp.moveaxis(first, 1, 0)]
    for position in range(START.shape[1], START.shape[1] + STEPS):
        next_logits, cache = pair.step(TEXT[:, position - 1], jnp.asarray(position), cache)
        ours.append(next_logits)
    tokens = np.pad(TEXT[:, : len(ours) - 1], ((0, 0), (1, 0)))
    whole = pair.ours.logits(
        pair.ours.caption_pass(tokens, everything(tokens), jnp.asarray(PREFIX), prefix_valid)
    )
    np.testing.assert_allclose(np.stack(ours, axis=1), whole, rtol=0, atol=1e-5)
    for row, count in enumerate(pads):
        alone = pair.embedded(PREFIX[row : row + 1, count:], tokens[row : row + 1, 1:])
        theirs = pair.theirs(inputs_embeds=alone).logits.numpy()[0, 11 - count :]
        np.testing.assert_allclose(whole[row], theirs, rtol=0, atol=1e-5)


def test_greedy_text_behind_a_prefix_is_that_of_transformers_token_for_token(pair):
    embedded = pair.embedded(PREFIX, START[:, 1:])
    theirs = pair.theirs.generate(
        inputs_embeds=embedded,
        attention_mask=torch.ones(embedded.shape[:2], dtype=torch.long),
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    ).numpy()
    found, cache = pair.start(PREFIX, jnp.ones(PREFIX.shape[:2], bool))
    ours = [found[:, -1].argmax(-1).astype(jnp.int32)]
    for position in range(START.shape[1], START.shape[1] + STEPS - 1):
        found, cache = pair.step(ours[-1], jnp.asarray(position), cache)
        ours.append(found.argmax(-1).astype(jnp.int32))
    np.testing.assert_array_equal(np.stack(ours, axis=1), theirs)
    assert len({tuple(row) for row in theirs.tolist()}) == 3


def test_loss_over_the_text_alone_is_that_of_transformers(pair):
    counted = np.random.default_rng(2).random(TEXT.shape) < 0.6
    labels = np.concatenate(
        [np.full(PREFIX.shape[:2], -100), np.where(counted, TEXT, -100)], axis=1
    )
    theirs = pair.theirs(
        inputs_embeds=pair.embedded(PREFIX, TEXT), labels=torch.tensor(labels)
    ).loss.item()
    tokens = np.pad(TEXT, ((0, 0), (1, 0)))
    features = pair.ours.caption_pass(tokens, everything(tokens), jnp.asarray(PREFIX))[:, :-1]
    ours = losses.caption_loss(
        features, pair.ours.vocab_kernel, TEXT, counted, vocab_bias=pair.ours.vocab_bias
    )
    assert float(ours.sum() / counted.sum()) == pytest.approx(theirs, abs=1e-6 * theirs)


@pytest.mark.parametrize(
    "kind, settings, atol",
    [
        (
            "GPTNeo",
            {"hidden_size": 1024, "num_layers": 2, "num_heads": 16, "intermediate_size": 2048},
            1e-3,
        ),
        (
            "GPTJ",
            {"n_embd": 1024, "n_layer": 2, "n_head": 16, "n_inner": 2048, "rotary_dim": 32},
            1e-4,
        ),
    ],
)
def test_logits_of_a_wide_model_are_those_of_transformers(kind, settings, atol, tmp_path):
    windows = (
        {"attention_types": [[["global", "local"], 1]], "window_size": 6}
        if kind == "GPTNeo"
        else {}
    )
    theirs = make(kind, settings | windows)
    for parameter in theirs.parameters():  # noise of 0.1 in a thousand inputs saturates everything
        parameter.mul_(0.3 if parameter.ndim > 1 else 1)
    ours, _ = mammut.load_language_model(save(theirs, tmp_path))
    np.testing.assert_allclose(
        logits(ours, TEXT), theirs(torch.tensor(TEXT)).logits.numpy(), rtol=0, atol=atol
    )


# --- files


def test_shards_and_a_pickle_hold_the_same_model(gpt2, tmp_path):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(gpt2)
    save(theirs, tmp_path / "shards", max_shard_size="50KB")
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 2
    (tmp_path / "pickle").mkdir()
    shutil.copy(gpt2 / "config.json", tmp_path / "pickle")
    # with the head, which is the embedding
    torch.save(theirs.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    whole = open_model(gpt2)
    for name in ("shards", "pickle"):
        opened = open_model(tmp_path / name)
        assert opened.config == whole.config and opened.tensors.specs == whole.tensors.specs
        for path in whole.tensors.specs:
            np.testing.assert_array_equal(
                opened.tensors.read(path), whole.tensors.read(path), err_msg=path
            )


@pytest.mark.parametrize(
    "name, attention",
    [
        ("gpt2", "h.0.attn"),
        ("gpt_neo", "h.0.attn.attention"),
        ("gptj", "h.0.attn"),
        ("gpt_neox", "layers.0.attention"),
    ],
)
def test_names_of_older_files_are_read(name, attention, tmp_path):
    """Older files name some tensors in another way.

    Names lack the prefix of the model, and GPT-NeoX's head has another name. Masks and angles are
    in the file too, though they are no parameters.
    """
    kind, settings = MODELS[name]
    theirs = make(kind, settings)
    save(theirs, tmp_path)
    state = {key: value.numpy() for key, value in theirs.state_dict().items()}
    prefix = "gpt_neox." if kind == "GPTNeoX" else "transformer."
    state = {key.removeprefix(prefix): value for key, value in state.items()}
    state |= {f"{attention}.bias": np.ones((1, 1, 8, 8), np.uint8)}
    state |= {f"{attention}.masked_bias": np.full((), -1e4, np.float32)}
    if kind == "GPTNeoX":
        state["embed_out.weight"] = state.pop("lm_head.weight")
        state["layers.0.attention.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    torch.save(
        {key: torch.tensor(value) for key, value in state.items()}, tmp_path / "pytorch_model.bin"
    )
    (tmp_path / "model.safetensors").unlink()
    ours, _ = mammut.load_language_model(tmp_path)
    np.testing.assert_allclose(
        logits(ours, TEXT), theirs(torch.tensor(TEXT)).logits.numpy(), rtol=0, atol=1e-5
    )
    assert any("masked_bias" in note for note in open_model(tmp_path).notes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_two_bytes_are_widened(dtype, tmp_path):
    save(make("GPTJ", MODELS["gptj"][1]).to(getattr(torch, dtype)), tmp_path)
    theirs = transformers.GPTJForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours, _ = mammut.load_language_model(tmp_path)
    assert ours.layers.mlp.up.kernel.dtype == jnp.float32
    np.testing.assert_allclose(
        logits(ours, TEXT), theirs(torch.tensor(TEXT)).logits.numpy(), rtol=0, atol=1e-5
    )


def test_tables_give_back_the_tensors_that_they_read(pair):
    """Every tensor of the file, bit for bit."""
    theirs, opened = open_tensors(pair.folder / "model.safetensors"), open_model(pair.folder)
    rules = table(pair.theirs.config.model_type, opened.config.text, theirs.specs)
    back = rules.to_theirs(opened.tensors)
    assert back.specs.keys() == theirs.specs.keys()
    for name in theirs.specs:
        np.testing.assert_array_equal(back.read(name), theirs.read(name), err_msg=name)


# --- config


OF_TRANSFORMERS_4 = {
    # As published beside the weights of pythia-70m, gpt-neo-125m (with fewer layers), gpt-j-6b and
    # gpt2.
    "gpt_neox": {
        "architectures": ["GPTNeoXForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_size": 512,
        "initializer_range": 0.02,
        "intermediate_size": 2048,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "model_type": "gpt_neox",
        "num_attention_heads": 8,
        "num_hidden_layers": 6,
        "rotary_emb_base": 20000,
        "rotary_pct": 0.5,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.24.0",
        "use_cache": True,
        "use_parallel_residual": True,
        "vocab_size": 50304,
    },
    "gpt_neo": {
        "activation_function": "gelu_new",
        "architectures": ["GPTNeoForCausalLM"],
        "attention_dropout": 0,
        "attention_layers": ["global", "local", "global", "local"],
        "attention_types": [[["global", "local"], 2]],
        "bos_token_id": 50256,
        "embed_dropout": 0,
        "eos_token_id": 50256,
        "gradient_checkpointing": False,
        "hidden_size": 768,
        "initializer_range": 0.02,
        "intermediate_size": None,
        "layer_norm_epsilon": 1e-05,
        "max_position_embeddings": 2048,
        "model_type": "gpt_neo",
        "num_heads": 12,
        "num_layers": 4,
        "resid_dropout": 0,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "transformers_version": "4.9.0.dev0",
        "use_cache": True,
        "vocab_size": 50257,
        "window_size": 256,
    },
    "gptj": {
        "activation_function": "gelu_new",
        "architectures": ["GPTJForCausalLM"],
        "attn_pdrop": 0.0,
        "bos_token_id": 50256,
        "embd_pdrop": 0.0,
        "eos_token_id": 50256,
        "gradient_checkpointing": False,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gptj",
        "n_embd": 4096,
        "n_head": 16,
        "n_inner": None,
        "n_layer": 28,
        "n_positions": 2048,
        "resid_pdrop": 0.0,
        "rotary": True,
        "rotary_dim": 64,
        "scale_attn_weights": True,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {
            "text-generation": {"do_sample": True, "max_length": 50, "temperature": 1.0}
        },
        "tie_word_embeddings": False,
        "tokenizer_class": "GPT2Tokenizer",
        "transformers_version": "4.18.0.dev0",
        "use_cache": True,
        "vocab_size": 50400,
    },
    "gpt2": {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    },
}


@pytest.mark.parametrize("kind", OF_TRANSFORMERS_4)
def test_both_spellings_of_a_config_are_one_decoder(kind):
    """transformers 5 reads the older spelling itself, and writes its own."""
    old = OF_TRANSFORMERS_4[kind]
    new = transformers.AutoConfig.for_model(**old).to_dict()
    assert kind != "gpt_neox" or (
        "rotary_pct" in old and "rope_parameters" in new and "rotary_pct" not in new
    )
    assert decoder_config(old, "old") == decoder_config(json.loads(json.dumps(new)), "new")


def test_a_published_config_becomes_its_decoder():
    shared = {"cross_attn_every": 0, "pooling": "none", "norm_eps": 1e-5}
    read = {kind: decoder_config(values, kind) for kind, values in OF_TRANSFORMERS_4.items()}
    assert read["gptj"] == DecoderConfig(
        **shared,
        vocab_size=50400,
        max_length=2048,
        width=4096,
        depth=28,
        num_heads=16,
        mlp_dim=16384,
        layout="parallel",
        attn_bias=False,
        positions="rope",
        rope_dims=64,
        tie_embeddings=False,
        vocab_bias=True,
    )
    assert read["gpt_neo"] == DecoderConfig(
        **shared,
        vocab_size=50257,
        max_length=2048,
        width=768,
        depth=4,
        num_heads=12,
        mlp_dim=3072,
        attn_bias=False,
        attn_out_bias=True,
        attn_scale=False,
        local_windows=(0, 256),
    )
    assert read["gpt_neox"] == DecoderConfig(
        **shared,
        vocab_size=50304,
        max_length=2048,
        width=512,
        depth=6,
        num_heads=8,
        mlp_dim=2048,
        activation="gelu",
        layout="parallel_two_norms",
        positions="rope_half",
        rope_dims=32,
        rope_theta=2e4,
        tie_embeddings=False,
    )
    assert read["gpt2"] == DecoderConfig(**shared, vocab_size=50257, max_length=1024)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo", "gptj", "gpt_neox"])
def test_what_a_config_leaves_out_is_as_in_transformers(kind):
    full = json.loads(json.dumps(transformers.AutoConfig.for_model(kind).to_dict()))
    assert decoder_config({"model_type": kind}, "bare") == decoder_config(full, "full")


@pytest.mark.parametrize(
    "depth, kinds, windows",
    [
        (4, [[["global"], 4]], (0,)),
        (4, [[["local"], 4]], (7,)),
        (3, [[["global", "local"], 1], [["global"], 1]], (0, 7, 0)),
        (6, [[["global", "local", "local"], 2]], (0, 7, 7)),
    ],
)
def test_windows_are_cut_to_their_shortest_period(depth, kinds, windows):
    values = {
        "model_type": "gpt_neo",
        "num_layers": depth,
        "attention_types": kinds,
        "window_size": 7,
    }
    assert decoder_config(values, "config").local_windows == windows


@pytest.mark.parametrize(
    "kind, changes, problem",
    [
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx is true, expected false",
        ),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is true, expected false"),
        (
            "gpt2",
            {"activation_function": "relu"},
            'activation_function is "relu", expected "gelu_new" or',
        ),
        ("gpt2", {"n_head": 7}, "n_head is 7, expected a divisor of the width 768"),
        ("gpt2", {"hidden_size": 512}, "hidden_size is 512, expected 768, as n_embd"),
        ("gpt2", {"n_layer": "twelve"}, 'n_layer is "twelve", expected a whole number'),
        (
            "gpt2",
            {"quantization_config": {"bits": 4}},
            "quantization_config is an object, expected null",
        ),
        ("gpt2", {"extra_norm": True}, "extra_norm is not known"),
        (
            "gpt_neo",
            {"attention_types": [[["global", "sliding"], 2]]},
            "attention_types is a list, expected lists of",
        ),
        (
            "gpt_neo",
            {"num_layers": 6},
            "attention_types is a list, expected one kind for each of the 6 layers",
        ),
        (
            "gpt_neo",
            {"attention_layers": ["local"] * 4},
            "attention_layers is a list, expected what attention_types",
        ),
        ("gptj", {"rotary_dim": None}, "rotary_dim is null, expected a whole number"),
        ("gptj", {"rotary_dim": 63}, "rope_dims is 63, expected an even number"),
        (
            "gpt_neox",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling is an object, expected null",
        ),
        (
            "gpt_neox",
            {"rope_parameters": {"rope_type": "yarn"}},
            'rope_type is "yarn", expected "default"',
        ),
        (
            "gpt_neox",
            {"rope_parameters": {"rope_theta": 1e4}},
            "rotary_emb_base is 20000, expected 10000.0",
        ),
        ("gpt_neox", {"rotary_pct": 0.01}, "rope_dims is 0, expected an even number"),
    ],
)
def test_a_setting_that_our_decoder_does_not_have_is_refused(kind, changes, problem):
    with pytest.raises(
        CheckpointError, match="the file describes a model that mammut does not have: "
    ) as caught:
        decoder_config(OF_TRANSFORMERS_4[kind] | changes, "the file")
    assert problem in str(caught.value)


# --- tokenizer


SENTENCES = [
    "Q: what is this? A: it's a dog, and they've two of them.",
    "A picture of the dog and the other dogs; naïve café, 123 times  twice",
    "yes or no, the answer is yes",
]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> pathlib.Path:
    """Write a byte-level BPE tokenizer of transformers.

    It has 256 bytes, 60 merges and the end token, as tokenizer.json and as two files.
    """
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    trained = ByteLevelBPETokenizer()
    options = {
        "vocab_size": 317,
        "min_frequency": 1,
        "special_tokens": ["<|endoftext|>"],
        "show_progress": False,
    }
    trained.train_from_iterator(SENTENCES * 3, **options)
    (folder / "pair").mkdir()
    trained.save_model(str(folder / "pair"))
    vocab = json.loads((folder / "pair" / "vocab.json").read_text("utf-8"))
    merges = [
        tuple(line.split())
        for line in (folder / "pair" / "merges.txt").read_text("utf-8").splitlines()[1:]
    ]
    transformers.GPT2TokenizerFast(vocab=vocab, merges=merges).save_pretrained(folder / "one")
    return folder


@pytest.fixture(scope="module")
def talking(tokenizer_folder, tmp_path_factory) -> pathlib.Path:
    """Make a GPT-J with a tokenizer and a padded vocabulary.

    Its head prefers the ids that mean nothing.
    """
    theirs = make("GPTJ", GPT | {"vocab_size": 330, "rotary_dim": 8})
    with torch.no_grad():
        theirs.lm_head.bias[317:] += 50
    folder = save(theirs, tmp_path_factory.mktemp("talking"))
    return pathlib.Path(shutil.copytree(tokenizer_folder / "one", folder, dirs_exist_ok=True))


def language_model(
    folder: pathlib.Path, files: pathlib.Path, vocab_size: int = 320
) -> pathlib.Path:
    save(make("GPT2", GPT | {"vocab_size": vocab_size}), folder)
    return pathlib.Path(shutil.copytree(files, folder, dirs_exist_ok=True))


@pytest.mark.parametrize("form", ["one", "pair"])
def test_ids_are_those_of_transformers(form, tokenizer_folder, tmp_path):
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_folder / "one")
    _, ours = mammut.load_language_model(language_model(tmp_path, tokenizer_folder / form))
    for text in [
        *SENTENCES,
        "",
        " dog",
        "dog",
        "  two   spaces ",
        "Ünïcode ☃ 狗",
        "line\nbreak\ttab",
        "I'll DON'T",
    ]:
        assert ours.encode(text) == theirs(text)["input_ids"], text
        assert ours.decode(ours.encode(text)) == text
    end = theirs.eos_token_id
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (end, end, end, 317)
    assert end not in ours.encode("<|endoftext|> is text")


def test_a_vocabulary_of_two_files_is_saved_as_one(tokenizer_folder, tmp_path):
    _, ours = mammut.load_language_model(
        language_model(tmp_path / "model", tokenizer_folder / "pair")
    )
    (tmp_path / "saved").mkdir()
    again = restore_tokenizer(tmp_path / "saved", ours.save(tmp_path / "saved"))
    assert (tmp_path / "saved" / "tokenizer.json").exists() and not (
        tmp_path / "saved" / "vocab.json"
    ).exists()
    assert [again.encode(text) for text in SENTENCES] == [ours.encode(text) for text in SENTENCES]


def test_added_tokens_have_their_ids(tokenizer_folder, tmp_path):
    folder = language_model(tmp_path, tokenizer_folder / "pair")
    (folder / "added_tokens.json").write_text('{"[PAD]": 317, "[SAY]": 318}')
    (folder / "special_tokens_map.json").write_text('{"pad_token": "[PAD]"}')
    assert mammut.load_language_model(folder)[1].pad_id == 317
    (folder / "added_tokens.json").write_text('{"[PAD]": 318}')
    with pytest.raises(CheckpointError, match=r'"\[PAD\]" the id 318, which is not the next one'):
        open_model(folder)


def test_a_text_behind_a_prompt_is_encoded_as_in_one_sentence(tokenizer_folder, tmp_path):
    _, tokenizer = mammut.load_language_model(language_model(tmp_path, tokenizer_folder / "one"))
    processor = Processor(tokenizer, ImageTransform(16), 40)
    pairs = [("Q: is it? A:", "yes"), ("Q: is it? A: ", "yes"), ("", "a dog")]
    tokens, valid, target = processor.encode_pairs(pairs)
    for row, sentence in enumerate(["Q: is it? A: yes", "Q: is it? A: yes", "a dog"]):
        assert tokens[row, valid[row]].tolist() == [
            tokenizer.bos_id,
            *tokenizer.encode(sentence),
            tokenizer.eos_id,
        ]
    assert tokenizer.decode(tokens[0, target[0]].tolist()) == " yes"
    assert tokenizer.decode(tokens[2, target[2]].tolist()) == "a dog"
    assert processor.encode_prompt("A: ") == processor.encode_prompt("A:") == tokenizer.encode("A:")
    # Generation goes on from the prompt alone, as training taught it.
    prompt = [processor.bos_id, *processor.encode_prompt("Q: is it? A:")]
    assert tokens[0, : len(prompt)].tolist() == prompt and target[0].argmax() == len(prompt)


def test_a_vocabulary_that_adds_spaces_itself_is_left_alone():
    processor = tiny_processor()
    tokens, valid, _ = processor.encode_pairs([("one red ", "circle")])
    encode = processor.tokenizer.encode
    assert tokens[0, valid[0]].tolist() == [1, *encode("one red "), *encode("circle"), 2]


def test_a_model_without_tokenizer_says_which_files_it_wants(gpt2):
    _, tokenizer = mammut.load_language_model(gpt2)
    assert isinstance(tokenizer, MissingTokenizer) and tokenizer.eos_id == 0
    with pytest.raises(
        ValueError, match="put its tokenizer.json, or its vocab.json and merges.txt, into "
    ):
        tokenizer.encode("a dog")


# --- use


def prefix_model(folder: pathlib.Path) -> ModelConfig:
    config = ModelConfig(
        vision=VisionConfig(
            image_size=16, patch_size=8, width=32, depth=1, num_heads=2, mlp_dim=64
        ),
        text=read_model_config(folder).text,
        image_projection="decoder",
    )
    return start_config(config, {"init_text": open_model(folder)})


def test_a_run_starts_from_a_language_model(talking):
    starts = {"init_text": open_model(talking)}
    config = prefix_model(talking)
    assert config.text == starts["init_text"].config.text and config.text_length == LENGTH - 3
    warm = warm_start(config, starts)
    assert {row.what for row in warm.rows if row.path.startswith("text.")} == {"loaded"}
    assert all(path.split(".")[0] != "text" for path in warm.random)
    np.testing.assert_array_equal(
        warm.read("text.vocab_head.kernel"),
        open_tensors(talking / "model.safetensors").read("lm_head.weight").T,
    )


def test_a_base_is_held_in_bfloat16_where_the_run_says_so(talking):
    config = prefix_model(talking)
    compute = ComputeConfig(text_param_dtype="bfloat16")
    warm = warm_start(config, {"init_text": open_model(talking)}, compute=compute)
    kernel = open_tensors(talking / "model.safetensors").read("transformer.h.2.mlp.fc_in.weight").T
    read = warm.read("text.layers.mlp.up.kernel")
    assert read.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read[2], kernel.astype(ml_dtypes.bfloat16))
    specs = model_specs(config, compute)
    assert specs["text.norm.scale"].dtype == ml_dtypes.bfloat16
    assert specs["image_projection.kernel"].dtype == np.float32


def test_ids_of_a_padded_vocabulary_are_never_generated(talking):
    """Ids that the tokenizer does not know are never generated.

    The head prefers them, but the tokenizer's `decode` would refuse them.
    """
    config = prefix_model(talking)
    model = tiny_model(config)
    model.text, tokenizer = mammut.load_language_model(talking)
    assert logits(model.text, TEXT).argmax(-1).min() >= tokenizer.vocab_size
    processor = Processor(tokenizer, ImageTransform(16), config.text_length)
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    found = mammut.generate_text(
        model, processor, images, ["A:"] * 2, mammut.GenerateConfig(max_new_tokens=4)
    )
    assert [len(text.token_logprobs) for text in found] == [4, 4]


def test_loading_it_as_a_whole_model_says_what_it_is(gpt2):
    with pytest.raises(
        CheckpointError,
        match="holds text alone, expected a whole model: mammut.load_language_model",
    ):
        mammut.load(gpt2)


# --- bad files


def changed(folder: pathlib.Path, target: pathlib.Path, **config) -> pathlib.Path:
    """A copy with other values in its config."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(values | config))
    return target


@pytest.mark.parametrize("kind", ["llama", 7, None])
def test_a_model_of_another_type_is_refused(kind, gpt2, tmp_path):
    with pytest.raises(
        CheckpointError, match="has model_type .*, expected one of gpt2, gpt_neo, gptj, gpt_neox$"
    ):
        open_model(changed(gpt2, tmp_path, model_type=kind))


def test_weights_that_do_not_fit_are_named_all_at_once(gpt2, tmp_path):
    folder = changed(gpt2, tmp_path)
    file = open_tensors(gpt2 / "model.safetensors")
    tensors = {name: file.read(name) for name in file.specs}
    del tensors["transformer.h.1.ln_2.bias"]
    tensors["transformer.h.0.attn.c_attn.weight"] = np.zeros((192, 64), np.float32)
    tensors["transformer.h.0.adapter.weight"] = np.zeros(3, np.float32)
    specs = {name: TensorSpec(value.shape, value.dtype) for name, value in tensors.items()}
    write_safetensors(folder / "model.safetensors", specs, tensors.__getitem__)
    with pytest.raises(CheckpointError) as caught:
        open_model(folder)
    assert "transformer.h.1.ln_2.bias is missing" in str(caught.value)
    assert "transformer.h.0.attn.c_attn.weight is [192, 64], expected [64, 192]" in str(
        caught.value
    )
    assert "transformer.h.0.adapter.weight is not a tensor of this model" in str(caught.value)


def test_a_missing_shard_is_named(gpt2, tmp_path):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(gpt2)
    save(theirs, tmp_path, max_shard_size="50KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(
        CheckpointError, match=f"names the shard '{shard.name}', which cannot be found"
    ):
        open_model(tmp_path)


def test_a_folder_without_weights_says_which_files_were_expected(gpt2, tmp_path):
    shutil.copy(gpt2 / "config.json", tmp_path)
    with pytest.raises(
        CheckpointError,
        match="no weights, expected one of model.safetensors.index.json, model.safet",
    ):
        open_model(tmp_path)


def test_a_head_that_should_be_the_embedding_and_is_not_is_refused(gpt2, tmp_path):
    folder = changed(gpt2, tmp_path)
    (folder / "model.safetensors").unlink()
    state = transformers.GPT2LMHeadModel.from_pretrained(gpt2).state_dict()
    torch.save(
        state | {"lm_head.weight": state["lm_head.weight"] + 1}, folder / "pytorch_model.bin"
    )
    with pytest.raises(
        CheckpointError, match="differ, which tie_word_embeddings in config.json makes one"
    ):
        mammut.load_language_model(folder)


def test_a_tokenizer_of_another_model_is_refused(tokenizer_folder, tmp_path):
    folder = language_model(tmp_path, tokenizer_folder / "one", vocab_size=300)
    with pytest.raises(
        CheckpointError, match="the tokenizer has 317 ids, too many for a vocab_size of 300"
    ):
        open_model(folder)


@pytest.mark.parametrize("form", ["one", "pair"])
def test_a_tokenizer_without_end_is_refused(form, tokenizer_folder, tmp_path):
    folder = language_model(tmp_path, tokenizer_folder / form)
    for file in folder.glob("*"):
        if file.name in ("tokenizer.json", "vocab.json"):
            file.write_text(file.read_text("utf-8").replace("<|endoftext|>", "<|other|>"), "utf-8")
        elif file.name == "tokenizer_config.json":
            file.unlink()
    with pytest.raises(CheckpointError, match="it has no end token"):
        open_model(folder)
