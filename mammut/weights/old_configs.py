"""Upgrades the configs of version 0.1 to the current fields.

Version 0.1 kept in a model's config how a run computes it, what a run draws at random, and how its
loss starts. These are configs of their own now; fields that follow from others are properties.
"""

import dataclasses
from typing import Any

from mammut.models.losses import CONTRASTIVE

_COMPUTE = ("dtype", "param_dtype", "remat", "unroll", "passes", "image_attention")
_LOSS = ("logit_scale_init", "logit_bias_init")
# Current place of a field of version 0.1, by its dotted name in a run's config.
MOVED = {
    **{f"model.{name}": f"compute.{name}" for name in _COMPUTE},
    **{f"model.{name}": f"loss.{name}" for name in _LOSS},
    "model.text.param_dtype": "compute.text_param_dtype",
    "model.prefix_dropout": "augment.prefix_dropout",
    "model.vision.patch_drop": "augment.patch_drop",
    "model.vision.cropped_pos_embed": "augment.crop_positions",
}
# Fields that now follow from other fields, and the field that each follows from.
DERIVED = {
    "model.conditioning": "model.text.cross_attn_every",
    "model.text.class_token": "model.text.pooling",
}

_ABSENT = object()


@dataclasses.dataclass(frozen=True)
class Upgraded:
    """A run's config, upgraded to the current fields.

    It also says which settings no current field expresses.
    """

    config: dict[str, Any]
    # Towers, "vision" or "text", whose layer norms have no bias: it is zero.
    without_norm_bias: tuple[str, ...] = ()


def upgraded(config: dict[str, Any]) -> Upgraded:
    """Brings a config to the current fields.

    The config is a run's, or {"model": ...} of a model. A config in the current fields is returned
    unchanged. Values that are not objects, names that no version had, and old fields that do not
    fit the others are left for `from_dict` to refuse.
    """
    config = _copied(config)
    for old, new in MOVED.items():
        _move(config, old, new)

    text = _section(config, "model.text")
    conditioning = "cross_attention" if text.get("cross_attn_every", 2) else "prefix"
    _taken(config, "model.conditioning", conditioning)
    _taken(config, "model.text.class_token", text.get("pooling", "mean") == "class")

    without = []
    for tower in ("vision", "text"):
        _taken(config, f"model.{tower}.norm_bias", True)
        if _taken(config, f"model.{tower}.norm_bias", False) is False:
            without.append(tower)
    _taken(config, "model.text.mlp_before_cross_attn", True)
    if _taken(config, "model.text.mlp_before_cross_attn", False) is False:
        text["cross_attn_position"] = f"{text.get('cross_attn_position', 'last')}_bare"
    # Without cross-attention version 0.1 accepted every position of it, though none has an effect.
    if conditioning == "prefix" and text.get("cross_attn_position") == "inside":
        text["cross_attn_position"] = "last"
    return Upgraded(config, tuple(without))


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copied(item) for name, item in value.items()}
    return value


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Finds a part of a config by its dotted name.

    Returns {} where it is missing or not an object.
    """
    part = config
    for key in name.split("."):
        part = part.get(key)
        if not isinstance(part, dict):
            return {}
    return part


def _move(config: dict[str, Any], old: str, new: str) -> None:
    """Moves a field to another dotted name, if it is present."""
    section, name = new.split(".")
    if not isinstance(config.get(section, {}), dict):
        return
    value = _taken(config, old)
    if value is _ABSENT:
        return
    if section == "loss":
        # Version 0.1 wrote the loss's own start into every config; a recipe today may set none.
        loss = _section(config, "loss").get("contrastive", "softmax")
        row = CONTRASTIVE.get(loss) if isinstance(loss, str) else None
        if row and value == getattr(row, name):
            return
    config.setdefault(section, {})[name] = value


def _taken(config: dict[str, Any], name: str, only: Any = _ABSENT) -> Any:
    """Takes a field out by its dotted name, and returns its value.

    With `only`, a field of another value stays. `_ABSENT`: nothing was taken out.
    """
    section, _, field = name.rpartition(".")
    part = _section(config, section)
    value = part.get(field, _ABSENT)
    if only is not _ABSENT and (type(value) is not type(only) or value != only):
        return _ABSENT
    part.pop(field, None)
    return value
