"""Reads open_clip's model JSON as our `ModelConfig`.

`open_clip_export` writes the JSON. `open_clip_config.json` holds `model_cfg` and `preprocess_cfg`.
Four families of `model_cfg` are supported:

    text_cfg with does_full_decoding   openMaMMUT: LAION's fork, at ed2d1f6 of
                                       github.com/LAION-AI/open_clip_mammut
    multimodal_cfg                     mammut_* and mammut2_* of open_clip's main branch
    ... with text_arch "modern"        mammut2-moderntext_*
    multimodal_cfg and text_cfg        CoCa, as in open_clip_torch 3.3.0

Each key is either read, or listed here as a key without effect on the output of a trained model, or
refused.
"""

from typing import Any

from mammut.data.images import ImageTransform
from mammut.models.decoder import DecoderConfig
from mammut.models.mammut import ModelConfig
from mammut.models.vit import VisionConfig
from mammut.weights.files.tensor_file import CheckpointError
from mammut.weights.formats.json_object import JsonObject

CLIP_VOCAB = 49_408
_OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
_OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
NORM_EPS = 1e-5  # PyTorch's

# Keys without effect on the output of a trained model. They are about how the model is made, how it
# is trained, and its tokenizer, which is read elsewhere.
_MAKING = {
    "custom_text", "cast_dtype", "output_dict", "output_tokens", "nonscalar_logit_scale",
    "zero_init_residual", "init_logit_scale", "init_logit_bias", "timm_model_pretrained",
    "hf_model_pretrained",
}  # fmt: skip
_TRAINING = {"patch_dropout", "timm_drop", "timm_drop_path", "freeze_pad_embed"}
_TOKENIZER = {
    "hf_tokenizer_name", "tokenizer_type", "tiktoken_name", "tokenizer_mode", "tokenizer_kwargs",
    "bos_id", "eos_id", "variable_text",
}  # fmt: skip
# Keys of towers that timm or Hugging Face would make; `timm_model_name` and `hf_model_name`
# themselves are refused.
_TIMM = {"timm_pool", "timm_proj", "timm_proj_bias", "timm_model_kwargs", "image_seq_len"}
_HF = {"hf_proj_type", "hf_pooler_type", "hf_model_config"}
# Fields that the classes of these decoders share: no class reads the first, and only the modern
# one the second.
_UNREAD = {
    "dim_head", "n_queries", "attn_pooler_heads", "final_ln_after_pool", "attention_mode",
    "token_average_pool", "block_type", "scaled_cosine_attn", "scale_heads", "scale_attn_inner",
    "scale_attn", "scale_fc", "is_multimodal_decoder",
}  # fmt: skip
_MODERN = {
    "qk_norm", "attn_gated", "pos_embed", "rope_temperature", "mlp_type", "norm_type", "norm_eps",
    "tie_lm_head", "pre_norm", "norm_placement", "reg_tokens", "value_residual", "attention_bias",
    "mlp_bias", "gate_bias",
}  # fmt: skip
_OF_TEXT = _MAKING | _TRAINING | _TOKENIZER | _HF | _UNREAD
_OF_DECODER = _OF_TEXT | {
    "embed_cls",
    "correct_cls_mask",
    "no_causal_mask",
    "act_kwargs",
    "norm_kwargs",
    "pad_id",
}

# decoder width; vision width, heads, layers; decoder layers; whether all decoder layers have an MLP
OPENMAMMUT_SIZES = {
    **dict.fromkeys(("ViT-S-32", "ViT-S-16", "ViT-S-14"), (384, 384, 6, 12, 12, False)),
    **dict.fromkeys(("ViT-M-32", "ViT-M-16", "ViT-M-14"), (512, 512, 8, 12, 12, False)),
    **dict.fromkeys(("ViT-B-32", "ViT-B-14"), (512, 768, 12, 12, 12, False)),
    "ViT-B-16": (768, 768, 12, 12, 12, True),
    **dict.fromkeys(("ViT-L-32", "ViT-L-16", "ViT-L-14"), (768, 1024, 16, 24, 12, True)),
    **dict.fromkeys(("ViT-H-32", "ViT-H-16", "ViT-H-14"), (1024, 1280, 16, 32, 24, True)),
}


def openmammut(size: str) -> dict[str, Any]:
    """Makes the `model_cfg` of an openMaMMUT size.

    The size is one of `OPENMAMMUT_SIZES`.

    Source: the fork's model_configs.
    """
    text_width, width, heads, layers, text_layers, has_mlp = OPENMAMMUT_SIZES[size]
    return {
        "embed_dim": text_width,
        "vision_cfg": {
            "image_size": 224,
            "layers": layers,
            "width": width,
            "head_width": width // heads,
            "patch_size": int(size.rpartition("-")[2]),
            "output_tokens": True,
            "pool_type": "avg_all",
            "final_ln_after_pool": True,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": CLIP_VOCAB,
            "width": text_width,
            "heads": text_width // 64,
            "layers": text_layers,
            "output_tokens": True,
            "cross_attn_ratio": 2,
            "does_full_decoding": True,
            "has_mlp": has_mlp,
        },
        "custom_text": True,
    }


def model_config(model_cfg: Any, preprocess_cfg: Any, where: str) -> ModelConfig:
    """Reads the architecture in `open_clip_config.json`.

    It is described by two objects.

    Args:
      model_cfg: the object of that key.
      preprocess_cfg: the object of that key; None: there is none.
      where: their file, for errors.

    Raises:
      CheckpointError: the model is of none of the families above, or a key has a value that our
        model cannot have. Every such key is named.
    """
    config, problems = try_model_config(model_cfg, preprocess_cfg)
    if config is None:
        raise CheckpointError(
            f"{where} describes a model that mammut does not have: {'; '.join(problems)}"
        )
    return config


def try_model_config(model_cfg: Any, preprocess_cfg: Any) -> tuple[ModelConfig | None, list[str]]:
    """Tries `model_config` and returns it without problems.

    Otherwise it returns None and the problems, in sentences.
    """
    problems: list[str] = []
    fields = _fields(model_cfg, preprocess_cfg, problems)
    if problems:
        return None, problems
    try:
        vision, text = VisionConfig(**fields.pop("vision")), DecoderConfig(**fields.pop("text"))
        return ModelConfig(vision=vision, text=text, **fields), []
    except ValueError as error:
        return None, [str(error)]


def _fields(model_cfg: Any, preprocess_cfg: Any, problems: list[str]) -> dict[str, Any]:
    """Reads the fields of the `ModelConfig`.

    They are complete only where there are no problems.
    """
    top = JsonObject("model_cfg", model_cfg, problems)
    quick = top.flag("quick_gelu")
    embed_dim = top.whole("embed_dim", None)
    text_cfg, multimodal_cfg = top.value("text_cfg"), top.value("multimodal_cfg")
    coca = text_cfg is not None and multimodal_cfg is not None
    vision = _vision(
        JsonObject("model_cfg.vision_cfg", top.value("vision_cfg"), problems), quick, coca
    )
    multimodal = multimodal_cfg is not None and JsonObject(
        "model_cfg.multimodal_cfg", multimodal_cfg, problems
    )
    text = {}
    if coca:
        text = _coca(JsonObject("model_cfg.text_cfg", text_cfg, problems), multimodal, quick)
    elif multimodal:
        modern = multimodal.choice("text_arch", "clip", {"clip": False, "modern": True})
        text = _modern(multimodal) if modern else _classic(multimodal, quick)
    elif isinstance(text_cfg, dict) and text_cfg.get("does_full_decoding"):
        text = _fork(JsonObject("model_cfg.text_cfg", text_cfg, problems), quick)
    else:
        problems.append(
            "neither model_cfg.multimodal_cfg nor model_cfg.text_cfg.does_full_decoding: "
            "it has no decoder"
        )
    top.close(_MAKING)
    image = read_preprocess(preprocess_cfg, problems)
    return {
        "vision": {**vision, "image_mean": image["mean"], "image_std": image["std"]},
        "embed_dim": embed_dim,
        "image_projection": "embedding" if coca else "separate",
        "text_projection": text.pop("text_projection", False),
        "projection_bias": False,
        "text": text,
    }


def image_transform(preprocess_cfg: Any, image_size: int) -> ImageTransform:
    """Makes the image transform of a `preprocess_cfg`.

    `model_config` must have accepted it.

    The size comes from the model, as in open_clip.
    """
    image = read_preprocess(preprocess_cfg, [])
    return ImageTransform(image_size, image["mode"], image["interpolation"], image["fill"])


def read_preprocess(
    values: Any, problems: list[str], name: str = "preprocess_cfg"
) -> dict[str, Any]:
    """Reads mode, interpolation, fill, mean and std of a `preprocess_cfg`.

    Args:
      values: the object; None: all defaults.
      problems: the list that problems are added to.
      name: the name of the object in the problems.
    """
    image = JsonObject(name, {} if values is None else values, problems)
    read = {
        "mode": image.choice(
            "resize_mode",
            None,
            {None: "shortest", "shortest": "shortest", "longest": "longest", "squash": "squash"},
        ),
        "interpolation": image.choice(
            "interpolation",
            None,
            {None: "bicubic", "bicubic": "bicubic", "bilinear": "bilinear", "random": "bicubic"},
        ),
        "fill": image.whole("fill_color", 0, low=0, high=255),
    }
    for key, default, low in (("mean", _OPENAI_MEAN, -1), ("std", _OPENAI_STD, 1e-6)):
        value = image.value(key) or default
        value = [value] * 3 if type(value) in (int, float) else value
        if not isinstance(value, list | tuple) or not all(
            type(x) in (int, float) and low <= x <= 256 for x in value
        ):
            value = ()
        if len(value) != 3:
            image.refuse(key, f"three numbers from {low} to 256")
        read[key] = tuple(map(float, value))
    image.only("mode", "RGB")
    image.close({"size"})
    return read


def mlp_dim(width: int, ratio: float) -> int:
    """Computes the hidden size of an MLP, rounded as in open_clip."""
    return max(1, int(width * ratio))


def _vision(cfg: JsonObject, quick: bool, coca: bool) -> dict[str, Any]:
    width, head_width = cfg.whole("width", 768), cfg.whole("head_width", 64)
    if width % head_width:
        cfg.refuse("head_width", f"a divisor of the width {width}")
    act, norm = cfg.value("act_kwargs") or {}, cfg.value("norm_kwargs") or {}
    if act not in ({}, {"approximate": "none"}, {"approximate": "tanh"}) or (act and quick):
        cfg.refuse("act_kwargs", 'null or {"approximate": "tanh"}, without quick_gelu')
    eps = norm.get("eps", NORM_EPS) if isinstance(norm, dict) and set(norm) <= {"eps"} else None
    if type(eps) is not float or not 0 < eps < 1:
        cfg.refuse("norm_kwargs", 'null or {"eps": a small number}')
    exact = "gelu_tanh" if act == {"approximate": "tanh"} else "gelu"
    read = {
        "width": width,
        "depth": cfg.whole("layers", 12, high=2**10),
        "num_heads": max(1, width // head_width),
        "mlp_dim": mlp_dim(width, cfg.number("mlp_ratio", 4.0, 0.0, 64.0)),
        "activation": "quick_gelu" if quick else exact,
        "norm_eps": eps,
        "image_size": cfg.side("image_size", 224),
        "patch_size": cfg.side("patch_size", 16),
        "patch_bias": False,
        "class_token": True,
        "input_norm": not cfg.flag("no_ln_pre"),
        "norm_after_pooling": cfg.flag("final_ln_after_pool") and not coca,
    }
    queries = {
        "pool_queries": cfg.whole("attn_pooler_queries", 256),
        "pool_heads": cfg.whole("attn_pooler_heads", 8),
    }
    if coca:
        cfg.only("attentional_pool", True)
        cfg.only("pool_type", "tok")
        read |= {"pooling": "queries"} | queries
    else:
        cfg.only("attentional_pool", False)
        read["pooling"] = cfg.choice(
            "pool_type", "tok", {"tok": "class", "avg": "mean", "avg_all": "mean_all"}
        )
    # open_clip's convolution has no padding.
    read["cut_rest"] = read["image_size"] % max(read["patch_size"], 1) != 0
    cfg.only("timm_model_name", None)
    cfg.only("ls_init_value", None)
    cfg.only("pos_embed_type", "learnable")
    cfg.only("block_type", None, "default")
    for key in (
        "qk_norm",
        "scaled_cosine_attn",
        "scale_heads",
        "scale_attn_inner",
        "scale_attn",
        "scale_fc",
    ):
        cfg.only(key, False)
    cfg.close(_MAKING | _TRAINING | _TIMM)
    return read


def _sizes(cfg: JsonObject) -> dict[str, Any]:
    """Reads the settings that all decoders have."""
    width, heads = cfg.whole("width", 512), cfg.whole("heads", 8)
    if width % heads:
        cfg.refuse("heads", f"a divisor of the width {width}")
    cfg.only("ls_init_value", None)
    cfg.only("hf_model_name", None)
    return {"width": width, "num_heads": heads}


def _decoder(cfg: JsonObject) -> dict[str, Any]:
    """Settings that the decoders of MaMMUT read."""
    layers, ratio = cfg.whole("layers", 12, high=2**10), cfg.whole("cross_attn_ratio", 1)
    if layers % ratio:
        cfg.refuse("cross_attn_ratio", f"a divisor of the {layers} layers")
    return _sizes(cfg) | {
        "depth": layers,
        "cross_attn_every": ratio,
        "max_length": cfg.whole("context_length", 77, low=2),
        "vocab_size": cfg.whole("vocab_size", CLIP_VOCAB, high=2**24),
        "tie_embeddings": False,
    }


def _torch_layers(quick: bool) -> dict[str, Any]:
    """Reads the layer settings of all but the modern decoder."""
    return {
        "activation": "quick_gelu" if quick else "gelu",
        "norm_eps": NORM_EPS,
        "cross_attn_position": "first",
        "image_norm": True,
    }


def _fork(cfg: JsonObject, quick: bool) -> dict[str, Any]:
    read = _decoder(cfg) | _torch_layers(quick)
    # the fork's table of embeddings always has that size
    cfg.only("vocab_size", CLIP_VOCAB)
    cfg.only("does_full_decoding", True)
    read["cross_attn_position"] = "first" if cfg.flag("has_mlp", True) else "first_bare"
    cfg.close(_OF_DECODER | _MODERN | {"mlp_ratio", "pool_type", "proj_type", "proj_bias"})
    return read | {
        "mlp_dim": 4 * read["width"],
        "pooling": "mean_all",
        "pad_masking": "none",
        "pad_id": 0,
    }


def _mammut2(cfg: JsonObject) -> dict[str, Any]:
    """Reads the settings that both decoders of mammut2 have."""
    read = _decoder(cfg)
    read["mlp_dim"] = mlp_dim(read["width"], cfg.number("mlp_ratio", 4.0, 0.0, 64.0))
    read["text_projection"] = cfg.choice("proj_type", "none", {"none": False, "linear": True})
    return read


def _classic(cfg: JsonObject, quick: bool) -> dict[str, Any]:
    read = _mammut2(cfg) | _torch_layers(quick)
    read["pooling"] = cfg.choice("pool_type", "avg", {"avg": "mean", "avg_all": "mean_all"})
    read["pad_masking"] = "contrastive" if cfg.flag("use_pad_mask", True) else "none"
    cfg.close(_OF_DECODER | _MODERN | {"proj_bias"})
    return read


def _modern(cfg: JsonObject) -> dict[str, Any]:
    norm = cfg.choice("norm_type", None, {None: "rms", "rmsnorm": "rms", "layernorm": "layer"})
    bias, gated = cfg.flag("attention_bias", None), cfg.flag("attn_gated")
    read = _mammut2(cfg) | {
        "activation": cfg.choice(
            "mlp_type", "swiglu", {"swiglu": "swiglu", "mlp": "gelu", "relu2": "relu2"}
        ),
        "norm": norm,
        "norm_eps": cfg.number("norm_eps", 1e-6, 1e-12, 1.0),
        "attn_bias": bias,
        "mlp_bias": cfg.flag("mlp_bias", None),
        "qk_norm": cfg.flag("qk_norm"),
        "attn_gate": gated,
        "gate_bias": bias if cfg.value("gate_bias", None) is None else cfg.flag("gate_bias"),
        "cross_attn_position": "inside",
        "positions": "rope",
        "rope_theta": cfg.number("rope_temperature", 10_000.0, 1.0, 1e12),
        "tie_embeddings": cfg.flag("tie_lm_head"),
        "pooling": cfg.choice(
            "pool_type", "avg", {"avg": "mean", "mean": "mean", "eos": "end", "argmax": "end"}
        ),
        "pad_masking": "contrastive",
    }
    cfg.only("pos_embed", "rope")
    cfg.only("norm_placement", "pre")
    for key in ("value_residual", "pre_norm", "proj_bias"):
        cfg.only(key, False)
    cfg.only("reg_tokens", 0)
    cfg.close(_OF_DECODER | {"use_pad_mask"})
    return read


def _coca(text: JsonObject, multimodal: JsonObject, quick: bool) -> dict[str, Any]:
    early, read = _sizes(text), _sizes(multimodal) | _torch_layers(quick)
    if early["width"] != read["width"]:
        multimodal.refuse("width", f"{early['width']}, as in model_cfg.text_cfg")
    length = text.whole("context_length", 77, low=2)
    if multimodal.whole("context_length", 77) < length:
        multimodal.refuse("context_length", f"{length} or more, as in model_cfg.text_cfg")
    for cfg in (text, multimodal):
        cfg.only("text_arch", "clip")
    # open_clip reads only the sizes of the decoder: its MLP is four times its width.
    text.only("mlp_ratio", 4)
    text.only("embed_cls", True)
    text.only("pad_id", 0)
    for key in ("no_causal_mask", "proj_bias", "correct_cls_mask"):
        text.only(key, False)
    for key in ("act_kwargs", "norm_kwargs"):
        text.only(key, None, {})
    read |= {
        "mlp_dim": 4 * read["width"],
        "depth": multimodal.whole("layers", 12, high=2**10),
        "text_only_depth": text.whole("layers", 12, high=2**10),
        "text_only_heads": None if early["num_heads"] == read["num_heads"] else early["num_heads"],
        "cross_attn_every": 1,
        "max_length": length,
        "vocab_size": text.whole("vocab_size", CLIP_VOCAB, high=2**24),
        "tie_embeddings": False,
        "pooling": "class",
        "causal_contrastive": True,
        "pad_masking": "shifted",
        "pad_id": 0,
        "text_projection": text.choice("proj_type", "linear", {"linear": True, "none": False}),
    }
    text.close(_OF_TEXT | _MODERN | {"pool_type", "use_pad_mask"})
    ignored = {
        "vocab_size",
        "mlp_ratio",
        "pool_type",
        "proj_type",
        "proj_bias",
        "use_pad_mask",
        "cross_attn_ratio",
    }
    multimodal.close(_OF_DECODER | _MODERN | ignored)
    return read
