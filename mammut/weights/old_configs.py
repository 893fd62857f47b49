"""Configs as version 0.1 wrote them, in the fields of today.

Version 0.1 kept in a model's config how a run computes it, what a run draws at random, and how its
loss starts. These are configs of their own now; fields that follow from others are properties.
"""

import dataclasses
from typing import Any

_COMPUTE = ("dtype", "param_dtype", "remat", "unroll", "passes", "image_attention")
_LOSS = ("logit_scale_init", "logit_bias_init")
# Where a field of version 0.1 is today, by its dotted name in a run's config.
MOVED = {
    **{f"model.{name}": f"compute.{name}" for name in _COMPUTE},
    **{f"model.{name}": f"loss.{name}" for name in _LOSS},
    "model.text.param_dtype": "compute.text_param_dtype",
    "model.prefix_dropout": "augment.prefix_dropout",
    "model.vision.patch_drop": "augment.patch_drop",
    "model.vision.cropped_pos_embed": "augment.crop_positions",
}
# Fields that follow from others today.
DERIVED = ("model.conditioning", "model.text.class_token")


@dataclasses.dataclass(frozen=True)
class Upgraded:
    """A run's config in the fields of today, and what no field says any more."""

    config: dict[str, Any]
    # Towers, "vision" or "text", whose layer norms have no bias: it is zero.
    without_norm_bias: tuple[str, ...] = ()


def upgraded(config: dict[str, Any]) -> Upgraded:
    """Brings the config of a run, or {"model": ...} of a model, to the fields of today.

    A config in today's fields comes back as it is. Values that are no objects, and names that no
    version had, are left for `from_dict` to refuse.
    """
    config = _copied(config)
    for old, new in MOVED.items():
        value = _taken(config, old)
        if value is not None:
            section, name = new.split(".")
            config.setdefault(section, {})[name] = value
    for name in DERIVED:
        _taken(config, name)

    without = []
    for tower in ("vision", "text"):
        if _taken(config, f"model.{tower}.norm_bias") is False:
            without.append(tower)
    if _taken(config, "model.text.mlp_before_cross_attn") is False:
        text = config["model"]["text"]
        text["cross_attn_position"] = f"{text.get('cross_attn_position', 'last')}_bare"
    return Upgraded(config, tuple(without))


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copied(item) for name, item in value.items()}
    return value


def _taken(config: dict[str, Any], name: str) -> Any:
    """Takes a field out by its dotted name; None: it is not there."""
    *sections, field = name.split(".")
    for section in sections:
        config = config.get(section)
        if not isinstance(config, dict):
            return None
    return config.pop(field, None)
