"""Small models of every family of open_clip, for tests.

Each is given as its JSON and as tensors of random numbers.
"""

import copy
import json
import pathlib
import sys

import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mammut.weights.files.tensor_file import TensorSpec
from mammut.weights.formats import open_clip
from mammut.weights.opened import LazyTensors, model_specs

VISION = {
    "image_size": 16,
    "layers": 2,
    "width": 32,
    "head_width": 16,
    "patch_size": 8,
    "output_tokens": True,
}
MAMMUT_VISION = VISION | {"pool_type": "avg", "final_ln_after_pool": True}
TEXT = {"context_length": 12, "vocab_size": 60, "width": 24, "heads": 3, "layers": 4}
MODERN = TEXT | {
    "text_arch": "modern",
    "heads": 2,
    "cross_attn_ratio": 2,
    "tokenizer_type": "tiktoken",
}
FORK_TEXT = TEXT | {"vocab_size": 49_408, "cross_attn_ratio": 2, "does_full_decoding": True}
COCA = {
    "embed_dim": 24,
    "vision_cfg": VISION
    | {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 3},
    "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
    "multimodal_cfg": TEXT | {"layers": 2, "heads": 6},
}
CONFIGS = {
    "fork": {"embed_dim": 24, "vision_cfg": MAMMUT_VISION, "text_cfg": FORK_TEXT},
    "fork without MLPs": {
        "embed_dim": 24,
        "vision_cfg": MAMMUT_VISION,
        "text_cfg": FORK_TEXT | {"has_mlp": False},
    },
    "mammut": {
        "embed_dim": 24,
        "vision_cfg": MAMMUT_VISION | {"pool_type": "avg_all"},
        "multimodal_cfg": TEXT | {"pool_type": "avg_all", "use_pad_mask": False},
    },
    "mammut2": {
        "embed_dim": 20,
        "vision_cfg": MAMMUT_VISION | {"no_ln_pre": True, "pool_type": "tok", "mlp_ratio": 2.6667},
        "multimodal_cfg": TEXT | {"cross_attn_ratio": 2, "proj_type": "linear"},
        "quick_gelu": True,
    },
    "modern": {
        "embed_dim": 20,
        "vision_cfg": MAMMUT_VISION
        | {"norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}},
        "multimodal_cfg": MODERN
        | {
            "qk_norm": True,
            "attn_gated": True,
            "gate_bias": True,
            "proj_type": "linear",
            "pool_type": "eos",
        },
    },
    "modern with LayerNorms": {
        "embed_dim": 24,
        "vision_cfg": MAMMUT_VISION,
        "multimodal_cfg": MODERN
        | {
            "norm_type": "layernorm",
            "attention_bias": True,
            "mlp_bias": True,
            "mlp_type": "mlp",
            "tie_lm_head": True,
        },
    },
    "coca": COCA,
    "coca as wide as its images": {
        **COCA,
        "vision_cfg": COCA["vision_cfg"] | {"width": 24, "head_width": 8},
    },
}


def original_package():
    """open_clip itself, which imports torchvision.

    torchvision's wheel names operators of a GPU library that is not there beside CPU torch.
    Installed like any other package it would break whoever imports it, so it may lie in a folder of
    its own in the environment.
    """
    torch = pytest.importorskip("torch")
    register = torch.library.register_fake

    def register_known(name, *args, **kwargs):
        return (
            (lambda function: function)
            if str(name).startswith("torchvision::")
            else register(name, *args, **kwargs)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.library, "register_fake", register_known)
        patch.syspath_prepend(pathlib.Path(sys.prefix) / "torchvision")
        return pytest.importorskip("open_clip", exc_type=ImportError)


def write_folder(
    folder: pathlib.Path, model_cfg: dict, arrays: dict, **preprocess_cfg
) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays, folder / "open_clip_model.safetensors")
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def random_arrays(model_cfg: dict, dtype=np.float32) -> dict[str, np.ndarray]:
    """Tensors of the right names and shapes, all numbers different."""
    config, names = open_clip.model_config(model_cfg, None, "it"), {"logit_scale"}
    names |= {"text.lm_head", "text.lm_head.weight"} if "text_cfg" not in model_cfg else set()
    rules = open_clip.table(config, dict.fromkeys(names, TensorSpec((), np.dtype("float32"))))
    specs = rules.to_theirs(LazyTensors(model_specs(config), lambda name: None)).specs
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=spec.shape).astype(dtype) for name, spec in specs.items()}
    if config.text.tie_embeddings:
        arrays["text.lm_head.weight"] = arrays["text.token_embedding.weight"]
    return arrays


def open_specs(arrays: dict) -> dict[str, TensorSpec]:
    return {name: TensorSpec(array.shape, array.dtype) for name, array in arrays.items()}


def changed(model_cfg: dict, path: str, value) -> dict:
    model_cfg = copy.deepcopy(model_cfg)
    *parents, key = path.split(".")
    place = model_cfg
    for parent in parents:
        place = place[parent]
    place[key] = value
    return model_cfg


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=3,
)
