"""Writes our models as open_clip's: folders that open_clip loads ("local-dir:FOLDER")."""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from mammut.core.files import replacing, write_json
from mammut.data.processor import Processor
from mammut.data.tokenizer import ClipTokenizer, MissingTokenizer, Tokenizer
from mammut.models.layers import LayerConfig
from mammut.models.mammut import ModelConfig
from mammut.models.resnet import ResNetConfig
from mammut.models.vit import VisionConfig
from mammut.weights.files.tensor_file import TensorSpec, write_safetensors
from mammut.weights.formats import mammut_folder, mammut_run
from mammut.weights.formats.open_clip_config import CLIP_VOCAB, NORM_EPS, mlp_dim, try_model_config
from mammut.weights.formats.open_clip_folder import CONFIG_FILE, WEIGHTS_FILE
from mammut.weights.formats.open_clip_tables import table
from mammut.weights.opened import OpenedModel, require_target


def save(
    folder: pathlib.Path,
    opened: OpenedModel,
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[str, ...]:
    """Writes a folder of open_clip's, as on the Hugging Face hub.

    One tensor is in memory at a time. The folder holds the config, the weights and our processor's
    files. open_clip uses CLIP's tokenizer for it; tokens of another vocabulary have to come from
    our processor. Nothing in the folder changes until all files are written.

    Args:
      folder: made where it is missing.
      opened: a whole model.
      overwrite: whether an open_clip model in the folder is replaced; a model folder of ours or a
        run is never replaced.
      progress: called with the number of bytes of each tensor written.

    Returns:
      Sentences on the differences between open_clip and our processor.

    Raises:
      ValueError: the folder holds a model already or is where `opened` is read from, `opened` is a
        part of a model, or open_clip cannot express the model or its processor.
    """
    folder = pathlib.Path(folder)
    files = CONFIG_FILE, WEIGHTS_FILE, "processor.json"
    require_target(
        folder, opened, files, (mammut_folder.MANIFEST_FILE, mammut_run.RUN_FILE), overwrite
    )
    model_cfg = to_open_clip(opened.config)
    preprocess_cfg = _preprocess_json(opened.processor, opened.config.vision)
    names = {"logit_scale", "text.lm_head.weight"}
    # open_clip has no bias unless the config sets one.
    if bias := float(opened.tensors.read("logit_bias")):
        model_cfg["init_logit_bias"] = bias
        names.add("logit_bias")
    if "text_cfg" not in model_cfg:
        names.add("text.lm_head")
        model_cfg["multimodal_cfg"] |= _special_ids(opened.processor)
    # The tensor names in open_clip's files of such a model; see `table`.
    theirs = table(
        opened.config, dict.fromkeys(names, TensorSpec((), np.dtype("float32")))
    ).to_theirs(opened.tensors)
    with replacing(folder, CONFIG_FILE, stale=["processor.json"]) as new:
        write_safetensors(
            new / WEIGHTS_FILE,
            dict(theirs.specs),
            theirs.read,
            metadata={"format": "pt"},
            progress=progress,
        )
        # A missing tokenizer is not saved: when the folder is read, it is looked for again.
        if not isinstance(opened.processor.tokenizer, MissingTokenizer):
            opened.processor.save(new)
        write_json(new / CONFIG_FILE, {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})
    if _has_clip_ids(opened.processor.tokenizer):
        return ()
    return (
        "open_clip takes CLIP's tokenizer for this model: "
        "texts must become tokens by mammut's processor instead",
    )


def _has_clip_ids(tokenizer: Tokenizer) -> bool:
    missing = isinstance(tokenizer, MissingTokenizer) and tokenizer.vocab_size == CLIP_VOCAB
    return missing or isinstance(tokenizer, ClipTokenizer)


def _special_ids(processor: Processor) -> dict[str, int]:
    """Lists the special ids of a vocabulary.

    CLIP's has none here, since open_clip knows them.
    """
    tokenizer = processor.tokenizer
    if isinstance(tokenizer, ClipTokenizer | MissingTokenizer):
        return {}
    return {"pad_id": tokenizer.pad_id, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}


def _preprocess_json(processor: Processor, vision: VisionConfig) -> dict[str, Any]:
    image = processor.image
    problems = []
    if image.interpolation not in ("bicubic", "bilinear"):
        problems.append(
            f"ImageTransform.interpolation is {image.interpolation!r}, "
            "expected 'bicubic' or 'bilinear'"
        )
    if processor.text_form != "start_end":
        problems.append(f"text_form is {processor.text_form!r}, expected 'start_end'")
    if problems:
        raise ValueError(f"open_clip cannot express this processor: {'; '.join(problems)}")
    return {
        "size": vision.image_size,
        "mode": "RGB",
        "mean": list(vision.image_mean),
        "std": list(vision.image_std),
        "interpolation": image.interpolation,
        "resize_mode": image.mode,
        "fill_color": image.fill,
    }


def to_open_clip(config: ModelConfig) -> dict[str, Any]:
    """Makes the `model_cfg` of a model.

    It is one of CoCa, of openMaMMUT's fork where `pad_id` is 0, or else of open_clip's main branch.
    Fields about training or arithmetic alone are left out; read back, the rest gives the same
    config.

    Raises:
      ValueError: the format cannot express the model. Every field that stands in the way is named.
    """
    text = config.text
    if isinstance(config.vision, ResNetConfig):
        raise ValueError(
            "open_clip cannot express this model: its ResNets have an attention pool, ours has none"
        )
    sizes = {
        "context_length": text.max_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.num_heads,
    }
    quick = {"quick_gelu": True} if config.vision.activation == "quick_gelu" else {}
    model_cfg = {"embed_dim": config.embed_size, "vision_cfg": _vision_json(config), **quick}
    if text.text_only_depth:
        projection = {} if config.text_projection else {"proj_type": "none"}
        extra = {"embed_cls": True, "output_tokens": True, **projection}
        heads = text.text_only_heads or text.num_heads
        model_cfg["text_cfg"] = {**sizes, "layers": text.text_only_depth, "heads": heads, **extra}
        model_cfg["multimodal_cfg"] = {**sizes, "layers": text.depth}
    elif text.pad_id == 0 or text.has_bare_layers:
        extra = {
            "output_tokens": True,
            "does_full_decoding": True,
            "has_mlp": not text.has_bare_layers,
        }
        model_cfg["text_cfg"] = {
            **sizes,
            "layers": text.depth,
            "cross_attn_ratio": text.cross_attn_every,
            **extra,
        }
    else:
        model_cfg["multimodal_cfg"] = {**sizes, "layers": text.depth, **_decoder_json(config)}
    model_cfg["custom_text"] = True
    read, problems = try_model_config(model_cfg, None)
    if read is not None:
        problems = _differences(_comparable(config), _comparable(read))
    if problems:
        raise ValueError(f"open_clip cannot express this model: {'; '.join(problems)}")
    return model_cfg


def _ratio(layer: LayerConfig) -> float:
    """Finds the ratio from which open_clip computes `mlp_dim`.

    It is the ratio of `mlp_dim` to the width.
    """
    ratio = layer.mlp_dim / layer.width
    return (
        ratio if mlp_dim(layer.width, ratio) == layer.mlp_dim else math.nextafter(ratio, math.inf)
    )


def _vision_json(config: ModelConfig) -> dict[str, Any]:
    vision = config.vision
    cfg = {
        "image_size": vision.image_size,
        "layers": vision.depth,
        "width": vision.width,
        "head_width": vision.width // vision.num_heads,
        "patch_size": vision.patch_size,
        "mlp_ratio": _ratio(vision),
        "no_ln_pre": not vision.input_norm,
        "output_tokens": True,
    }
    if vision.norm_eps != NORM_EPS:
        cfg["norm_kwargs"] = {"eps": vision.norm_eps}
    if vision.activation == "gelu_tanh":
        cfg["act_kwargs"] = {"approximate": "tanh"}
    if config.text.text_only_depth:
        pool = {"attn_pooler_queries": vision.pool_queries, "attn_pooler_heads": vision.pool_heads}
        return {**cfg, "attentional_pool": True, **pool}
    pool_type = {"class": "tok", "mean": "avg"}.get(vision.pooling, "avg_all")
    return {**cfg, "pool_type": pool_type, "final_ln_after_pool": vision.norm_after_pooling}


def _decoder_json(config: ModelConfig) -> dict[str, Any]:
    text = config.text
    cfg = {
        "mlp_ratio": _ratio(text),
        "cross_attn_ratio": text.cross_attn_every,
        "proj_type": "linear" if config.text_projection else "none",
    }
    if text.positions == "learned":
        pool_type = "avg" if text.pooling == "mean" else "avg_all"
        return {**cfg, "pool_type": pool_type, "use_pad_mask": text.pad_masking != "none"}
    return {
        **cfg,
        "text_arch": "modern",
        "pool_type": "eos" if text.pooling == "end" else "avg",
        "pos_embed": "rope",
        "rope_temperature": text.rope_theta,
        "mlp_type": {"swiglu": "swiglu", "relu2": "relu2"}.get(text.activation, "mlp"),
        "norm_type": "rmsnorm" if text.norm == "rms" else "layernorm",
        "norm_eps": text.norm_eps,
        "qk_norm": text.qk_norm,
        "attn_gated": text.attn_gate,
        "attention_bias": text.attn_bias,
        **({"gate_bias": text.gate_bias} if text.attn_gate else {}),
        "mlp_bias": text.mlp_bias,
        "tie_lm_head": text.tie_embeddings,
    }


def _comparable(config: ModelConfig) -> dict[str, Any]:
    """Lists the fields that decide what a model computes.

    Fields that this model does not use are left out.
    """
    fields = dataclasses.asdict(config)
    vision, text = fields["vision"], fields["text"]
    fields["embed_dim"] = config.embed_size
    for name in ("image_mean", "image_std", "low_image_size", "cut_rest"):
        del vision[name]
    if config.vision.pooling == "queries":
        del vision["norm_after_pooling"]
    else:
        del vision["pool_queries"], vision["pool_heads"]
    if config.text.positions == "learned":
        del text["rope_theta"]
    if not config.text.attn_gate:
        del text["gate_bias"]
    text["text_only_heads"] = config.text.text_only_heads or config.text.num_heads
    if config.text.cross_attn_every == 1:  # the last layer of a single one is its first
        text["cross_attn_position"] = text["cross_attn_position"].replace("last", "first")
    return fields


def _differences(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    differences = []
    for name in ours.keys() & theirs.keys():
        if isinstance(ours[name], dict) and isinstance(theirs[name], dict):
            differences += _differences(ours[name], theirs[name], f"{prefix}{name}.")
        elif ours[name] != theirs[name]:
            differences.append(f"{prefix}{name} is {ours[name]!r}, expected {theirs[name]!r}")
    return sorted(differences)
