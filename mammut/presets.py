"""Named architectures. Each function returns a `ModelConfig`; `dataclasses.replace` changes what a run needs changed.

S, B and L are the ViT sizes of the field, each with a decoder of the same width and depth. The two `paper_*` presets
are the models of the MaMMUT paper (arXiv 2303.16839): sizes from its text and tables; patch size, heads and vocabulary,
which it does not state, are ours (16 pixels, 64-wide heads, 64,000 pieces).
"""

from mammut.config import DecoderConfig, ModelConfig, VisionConfig


def _vit(patch_size: int, width: int, depth: int, image_size: int = 224) -> VisionConfig:
    # ViT-H is the exception: its 80-wide heads are set by its preset.
    return VisionConfig(
        image_size=image_size, patch_size=patch_size, width=width, depth=depth, num_heads=width // 64, mlp_dim=4 * width
    )


def _decoder(width: int, depth: int, mlp_dim: int | None = None) -> DecoderConfig:
    return DecoderConfig(width=width, depth=depth, num_heads=width // 64, mlp_dim=mlp_dim or 4 * width)


def tiny() -> ModelConfig:
    """0.4M parameters for 48-pixel images: trains on a CPU in minutes."""
    return ModelConfig(
        vision=VisionConfig(image_size=48, patch_size=8, width=64, depth=4, num_heads=4, mlp_dim=256),
        text=DecoderConfig(vocab_size=512, max_length=16, width=64, depth=2, num_heads=4, mlp_dim=256),
        unroll=4,
    )


def mammut_s16() -> ModelConfig:
    """ViT-S/16 and a decoder of 12 x 384."""
    return ModelConfig(vision=_vit(16, 384, 12), text=_decoder(384, 12), dtype="bfloat16", remat="dots")


def mammut_s14() -> ModelConfig:
    """ViT-S/14 and a decoder of 12 x 384."""
    return ModelConfig(vision=_vit(14, 384, 12), text=_decoder(384, 12), dtype="bfloat16", remat="dots")


def mammut_b16() -> ModelConfig:
    """ViT-B/16 and a decoder of 12 x 768."""
    return ModelConfig(vision=_vit(16, 768, 12), text=_decoder(768, 12), dtype="bfloat16", remat="dots")


def mammut_b14() -> ModelConfig:
    """ViT-B/14 and a decoder of 12 x 768."""
    return ModelConfig(vision=_vit(14, 768, 12), text=_decoder(768, 12), dtype="bfloat16", remat="dots")


def mammut_l16() -> ModelConfig:
    """ViT-L/16 and a decoder of 24 x 1024."""
    return ModelConfig(vision=_vit(16, 1024, 24), text=_decoder(1024, 24), dtype="bfloat16", remat="dots")


def mammut_l14() -> ModelConfig:
    """ViT-L/14 and a decoder of 24 x 1024."""
    return ModelConfig(vision=_vit(14, 1024, 24), text=_decoder(1024, 24), dtype="bfloat16", remat="dots")


def paper_ablation() -> ModelConfig:
    """The paper's ablation model (section 4.5): ViT-B and a decoder of 8 x 1024."""
    return ModelConfig(vision=_vit(16, 768, 12), text=_decoder(1024, 8), dtype="bfloat16", remat="dots")


def paper_2b() -> ModelConfig:
    """The paper's main model (section 4.1): ViT-H and a decoder of 18 x 1536, cross-attention every second layer."""
    vision = VisionConfig(patch_size=16, width=1280, depth=32, num_heads=16, mlp_dim=5120)
    return ModelConfig(vision=vision, text=_decoder(1536, 18, mlp_dim=12_288), dtype="bfloat16", remat="full")
