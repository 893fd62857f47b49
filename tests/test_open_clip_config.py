"""The JSON of open_clip's models.

What is read, what has no effect, and what is refused by name.
"""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip_models import (
    CONFIGS,
    JSON,
    TEXT,
    VISION,
    changed,
    random_arrays,
    write_folder,
)

from mammut import presets
from mammut.models.compute import ComputeConfig
from mammut.weights.files.tensor_file import CheckpointError
from mammut.weights.formats import open_clip


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("fork", "text_cfg.does_full_decoding", False),
        ("fork", "text_cfg.vocab_size", 60),
        ("fork", "text_cfg.ls_init_value", 1e-4),
        ("fork", "text_cfg.hf_model_name", "roberta-base"),
        ("fork", "vision_cfg.timm_model_name", "vit_base_patch16_224"),
        ("fork", "vision_cfg.layers", [3, 4, 6, 3]),
        ("fork", "vision_cfg.image_size", [224, 336]),
        ("fork", "vision_cfg.width", 10**9),
        ("fork", "vision_cfg.head_width", 12),
        ("fork", "embed_dim", 20),
        ("mammut2", "multimodal_cfg.layers", 10**9),
        ("mammut2", "multimodal_cfg.vocab_size", 10**12),
        ("mammut2", "multimodal_cfg.context_length", 10**9),
        ("mammut2", "multimodal_cfg.cross_attn_ratio", 3),
        ("mammut2", "multimodal_cfg.heads", 5),
        ("mammut2", "multimodal_cfg.pool_type", "map"),
        ("mammut2", "multimodal_cfg.mlp_ratio", float("nan")),
        ("mammut2", "vision_cfg.pool_type", "none"),
        ("mammut2", "vision_cfg.attentional_pool", True),
        ("mammut2", "vision_cfg.pos_embed_type", "sin_cos_2d"),
        ("mammut2", "vision_cfg.norm_kwargs", {"eps": 1e-6, "affine": False}),
        ("mammut2", "vision_cfg.act_kwargs", {"approximate": "tanh"}),  # together with quick_gelu
        ("modern", "multimodal_cfg.value_residual", True),
        ("modern", "multimodal_cfg.norm_placement", "sandwich"),
        ("modern", "multimodal_cfg.reg_tokens", 4),
        ("modern", "multimodal_cfg.pre_norm", True),
        ("modern", "multimodal_cfg.pool_type", "map"),
        ("modern", "multimodal_cfg.pos_embed", "none"),
        ("modern", "multimodal_cfg.proj_bias", True),
        ("modern", "multimodal_cfg.text_arch", "postmodern"),
        ("coca", "text_cfg.embed_cls", False),
        ("coca", "text_cfg.correct_cls_mask", True),
        ("coca", "text_cfg.mlp_ratio", 2),
        ("coca", "multimodal_cfg.width", 12),
        ("coca", "multimodal_cfg.context_length", 8),
        ("coca", "vision_cfg.attentional_pool", "parallel"),
        ("coca", "quick_gelu", "yes"),
        ("coca", "text_cfg", 7),
        ("coca", "vision_cfg", None),
        ("coca", "audio_cfg", {}),
    ],
)
def test_a_model_that_mammut_does_not_have_is_refused_by_the_key(name, key, value):
    with pytest.raises(CheckpointError) as error:
        open_clip.model_config(
            changed(CONFIGS[name], key, value), None, "folder/open_clip_config.json"
        )
    message = str(error.value)
    assert message.startswith(
        "folder/open_clip_config.json describes a model that mammut does not have: "
    )
    assert key.rpartition(".")[2] in message and "\n" not in message and len(message) < 500


def test_all_keys_that_cannot_be_are_named_at_once():
    model_cfg = changed(CONFIGS["fork"], "text_cfg.tempo", 1)
    model_cfg = changed(model_cfg, "vision_cfg.qk_norm", True)
    with pytest.raises(CheckpointError) as error:
        open_clip.model_config(
            changed(model_cfg, "embed_dim", "wide"), {"std": [1, 1, 0], "resize_mode": "zoom"}, "it"
        )
    for name in (
        "model_cfg.text_cfg.tempo",
        "vision_cfg.qk_norm",
        "embed_dim",
        "preprocess_cfg.std",
        "resize_mode",
    ):
        assert name in str(error.value)


def test_the_width_of_an_mlp_is_rounded_down_as_in_pytorch():
    model_cfg = changed(CONFIGS["mammut2"], "vision_cfg.mlp_ratio", 2.68)  # of 32: 85.76
    assert open_clip.model_config(model_cfg, None, "it").vision.mlp_dim == 85


def test_a_clip_has_no_decoder_and_is_refused():
    model_cfg = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
    with pytest.raises(CheckpointError, match="it has no decoder$"):
        open_clip.model_config(model_cfg, None, "it")


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_without_effect_change_nothing(name):
    model_cfg = changed(CONFIGS[name], "custom_text", True)
    for key, value in {
        "vision_cfg.patch_dropout": 0.5,
        "vision_cfg.timm_pool": "avg",
        "init_logit_scale": 2.0,
    }.items():
        model_cfg = changed(model_cfg, key, value)
    for tower in ("text_cfg", "multimodal_cfg"):
        if tower in model_cfg:
            model_cfg = changed(model_cfg, f"{tower}.output_tokens", False)
            model_cfg = changed(model_cfg, f"{tower}.hf_model_pretrained", True)
            model_cfg = changed(model_cfg, f"{tower}.dim_head", 7)
    assert open_clip.model_config(model_cfg, None, "it") == open_clip.model_config(
        CONFIGS[name], None, "it"
    )


PATHS = sorted(
    {
        f"{tower}.{key}"
        for cfg in CONFIGS.values()
        for tower in cfg
        if "cfg" in tower
        for key in cfg[tower]
    }
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(CONFIGS)), st.sampled_from(PATHS), JSON)
def test_no_value_in_a_config_does_more_than_be_refused(name, path, value):
    if path.partition(".")[0] not in CONFIGS[name]:
        return
    try:
        config = open_clip.model_config(changed(CONFIGS[name], path, value), None, "it")
    except CheckpointError:
        return
    assert open_clip.model_config(open_clip.to_open_clip(config), None, "it") == config


@pytest.mark.parametrize("preset", [presets.mammut_b16(), presets.tiny()], ids=["b16", "tiny"])
def test_a_mammut_that_open_clip_cannot_express_is_refused_with_every_field(preset):
    with pytest.raises(ValueError, match="open_clip cannot express this model") as error:
        open_clip.to_open_clip(preset)
    for field in (
        "image_projection is 'shared'",
        "text.tie_embeddings is True",
        "vision.class_token is False",
    ):
        assert field in str(error.value)


def test_a_size_that_is_no_multiple_of_the_patch_size_stays_as_open_clip_computes_it():
    """Its convolution has no padding: a rest below and on the right belongs to no patch."""
    model_cfg = changed(CONFIGS["mammut2"], "vision_cfg.image_size", 21)
    config = open_clip.model_config(model_cfg, None, "it")
    assert config.vision.image_size == 21 and config.vision.cut_rest
    assert config.vision.grid == (21 // config.vision.patch_size,) * 2
    again = open_clip.model_config(open_clip.to_open_clip(config), None, "it")
    assert again.vision == config.vision
    small = changed(CONFIGS["mammut2"], "vision_cfg.image_size", 3)
    with pytest.raises(CheckpointError, match="image_size 3 is smaller than patch_size"):
        open_clip.model_config(small, None, "it")


def test_settings_of_training_and_arithmetic_do_not_stand_in_the_way_of_open_clip(tmp_path):
    config = open_clip.model_config(CONFIGS["mammut2"], None, "it")
    vision = dataclasses.replace(config.vision, low_image_size=8)
    other = dataclasses.replace(config, vision=vision)
    assert open_clip.to_open_clip(other) == open_clip.to_open_clip(config)
    arrays = random_arrays(CONFIGS["mammut2"])
    opened = open_clip.open_model(write_folder(tmp_path / "in", CONFIGS["mammut2"], arrays))
    compute = ComputeConfig(dtype="bfloat16", remat="full", unroll=4)
    open_clip.save(tmp_path / "out", opened)
    open_clip.save(tmp_path / "other", dataclasses.replace(opened, compute=compute))
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        written = (tmp_path / "out" / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() == written
