"""For tests: a config of today as version 0.1 wrote it."""

import json
from typing import Any

from mammut.config import AugmentConfig, ComputeConfig, ModelConfig, VisionConfig, to_dict


def as_version_0_1(
    config: ModelConfig,
    compute: ComputeConfig = ComputeConfig(),
    augment: AugmentConfig = AugmentConfig(),
    logit_scale_init: float = 1 / 0.07,
    logit_bias_init: float = 0.0,
) -> dict[str, Any]:
    """The "model" of version 0.1, which held all of this; every layer norm has a bias."""
    old = to_dict(config)
    computed = to_dict(compute)
    old["text"]["param_dtype"] = computed.pop("text_param_dtype")
    old |= computed
    old["logit_scale_init"] = logit_scale_init
    old["logit_bias_init"] = logit_bias_init
    old["prefix_dropout"] = augment.prefix_dropout
    old["conditioning"] = "prefix" if config.text.cross_attn_every == 0 else "cross_attention"
    if isinstance(config.vision, VisionConfig):
        old["vision"]["patch_drop"] = augment.patch_drop
        old["vision"]["cropped_pos_embed"] = augment.crop_positions
        old["vision"]["norm_bias"] = True
    text = old["text"]
    text["norm_bias"] = True
    text["class_token"] = config.text.pooling == "class"
    position, bare, _ = text["cross_attn_position"].partition("_bare")
    text["cross_attn_position"] = position
    text["mlp_before_cross_attn"] = not bare
    return json.loads(json.dumps(old))
