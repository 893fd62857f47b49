"""Named architectures: each function returns a `ModelConfig`.

`dataclasses.replace` returns a copy with another value of a field. How the model is computed, such
as in bfloat16, is set by the `ComputeConfig` of the run.

S, B and L are the usual ViT sizes, each with a decoder of the same width and depth. The two
`paper_*` presets are the models of the MaMMUT paper (arXiv 2303.16839). Their sizes come from its
text and tables. The paper does not state patch size, heads and vocabulary: they are chosen here (16
pixels, 64-wide heads, 64,000 pieces).

The `*_video` presets are image models with the paper's tubes, for videos of 32 frames, which see an
image as the others do. `frames` scales their tubes to other videos.

`magma_v1`, `magma_v2`, `frozen` and `limber` put an image in front of GPT-J 6B, whose weights come
from a file (`TrainConfig.init_text`). The recipes of the same names set which of its parameters are
trained (`TrainConfig.trainable`).

Example:
  >>> config = mammut.presets.mammut_b16()
  >>> config = dataclasses.replace(config, projection_bias=False)
"""

import dataclasses

from mammut.models import video
from mammut.models.adapter_modules import AdapterConfig
from mammut.models.decoder import DecoderConfig
from mammut.models.mammut import ModelConfig
from mammut.models.resnet import ResNetConfig
from mammut.models.vit import VisionConfig


def _vit(patch_size: int, width: int, depth: int, image_size: int = 224) -> VisionConfig:
    # ViT-H is the exception: its 80-wide heads are set by its preset.
    return VisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        depth=depth,
        num_heads=width // 64,
        mlp_dim=4 * width,
    )


def _decoder(width: int, depth: int, mlp_dim: int | None = None) -> DecoderConfig:
    return DecoderConfig(
        width=width, depth=depth, num_heads=width // 64, mlp_dim=mlp_dim or 4 * width
    )


def tiny() -> ModelConfig:
    """0.4M parameters for 48-pixel images: trains on a CPU in minutes."""
    return ModelConfig(
        vision=VisionConfig(
            image_size=48, patch_size=8, width=64, depth=4, num_heads=4, mlp_dim=256
        ),
        text=DecoderConfig(
            vocab_size=512, max_length=16, width=64, depth=2, num_heads=4, mlp_dim=256
        ),
    )


def mammut_s16() -> ModelConfig:
    """ViT-S/16 and a decoder of 12 x 384."""
    return ModelConfig(vision=_vit(16, 384, 12), text=_decoder(384, 12))


def mammut_s14() -> ModelConfig:
    """ViT-S/14 and a decoder of 12 x 384."""
    return ModelConfig(vision=_vit(14, 384, 12), text=_decoder(384, 12))


def mammut_b16() -> ModelConfig:
    """ViT-B/16 and a decoder of 12 x 768."""
    return ModelConfig(vision=_vit(16, 768, 12), text=_decoder(768, 12))


def mammut_b14() -> ModelConfig:
    """ViT-B/14 and a decoder of 12 x 768."""
    return ModelConfig(vision=_vit(14, 768, 12), text=_decoder(768, 12))


def mammut_l16() -> ModelConfig:
    """ViT-L/16 and a decoder of 24 x 1024."""
    return ModelConfig(vision=_vit(16, 1024, 24), text=_decoder(1024, 24))


def mammut_l14() -> ModelConfig:
    """ViT-L/14 and a decoder of 24 x 1024."""
    return ModelConfig(vision=_vit(14, 1024, 24), text=_decoder(1024, 24))


def paper_ablation() -> ModelConfig:
    """The paper's ablation model (section 4.5).

    It has a ViT-B and a decoder of 8 x 1024.
    """
    return ModelConfig(vision=_vit(16, 768, 12), text=_decoder(1024, 8))


def paper_2b() -> ModelConfig:
    """The paper's main model (section 4.1).

    It has a ViT-H and a decoder of 18 x 1536. Every second layer of the decoder has
    cross-attention.
    """
    vision = VisionConfig(patch_size=16, width=1280, depth=32, num_heads=16, mlp_dim=5120)
    return ModelConfig(vision=vision, text=_decoder(1536, 18, mlp_dim=12_288))


def _with_tubes(image_model: ModelConfig, frames: int) -> ModelConfig:
    """Gives an image model the paper's tubes, and its patches of the first frame."""
    tubes = video.paper_tubes(frames, image_model.vision.patch_size)
    settings = video.VideoConfig(frames=frames, patch_stride=frames, tubes=tubes)
    vision = dataclasses.replace(image_model.vision, video=settings)
    return dataclasses.replace(image_model, vision=vision)


def tiny_video(frames: int = 16) -> ModelConfig:
    """`tiny` for videos of 32-pixel frames: 44 tokens of 16 frames."""
    config = tiny()
    vision = dataclasses.replace(config.vision, image_size=32)
    return _with_tubes(dataclasses.replace(config, vision=vision), frames)


def mammut_b16_video(frames: int = 32) -> ModelConfig:
    """`mammut_b16` for videos: 539 tokens of 32 frames."""
    return _with_tubes(mammut_b16(), frames)


def mammut_l14_video(frames: int = 32) -> ModelConfig:
    """`mammut_l14` for videos: 704 tokens of 32 frames."""
    return _with_tubes(mammut_l14(), frames)


def paper_2b_video(frames: int = 32) -> ModelConfig:
    """The paper's video model (section 3.3): `paper_2b` with its tubes."""
    return _with_tubes(paper_2b(), frames)


def _gpt_j() -> DecoderConfig:
    """GPT-J 6B."""
    return DecoderConfig(
        vocab_size=50_400,
        max_length=2_048,
        width=4096,
        depth=28,
        num_heads=16,
        mlp_dim=16_384,
        norm_eps=1e-5,
        layout="parallel",
        attn_bias=False,
        positions="rope",
        rope_dims=64,
        cross_attn_every=0,
        tie_embeddings=False,
        vocab_bias=True,
        pooling="none",
    )


def _on_gpt_j(vision: ResNetConfig, **settings) -> ModelConfig:
    return ModelConfig(
        vision=vision,
        text=_gpt_j(),
        image_projection="decoder",
        **settings,
    )


def _rn50x16() -> ResNetConfig:
    return ResNetConfig(stem_width=96, stages=(6, 8, 18, 8), image_size=384)


def magma_v1() -> ModelConfig:
    """MAGMA as in its public checkpoint.

    It has CLIP's RN50x16 and an adapter after every MLP. The hidden size of an adapter is a quarter
    of the width.
    """
    return _on_gpt_j(_rn50x16(), prefix_norm=True, adapters=(AdapterConfig(reduction=4),))


def magma_v2() -> ModelConfig:
    """MAGMA as trained on the large mix.

    It has an adapter after every MLP and after every attention layer. The hidden size of an adapter
    is an eighth of the width.
    """
    adapters = (AdapterConfig(sites=("text.layers.mlp", "text.layers.attn"), reduction=8),)
    return _on_gpt_j(_rn50x16(), prefix_norm=True, adapters=adapters)


def frozen() -> ModelConfig:
    """Frozen (arXiv 2106.13884) as MAGMA's authors rebuilt it.

    A norm-free ResNet-50 gives two prefix tokens; there are no adapters.
    """
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
    vision = ResNetConfig(kind="nf", image_size=256, image_mean=mean, image_std=std)
    return _on_gpt_j(vision, prefix_tokens=2)


def limber() -> ModelConfig:
    """LiMBeR (arXiv 2209.15162): CLIP's RN50x16 with one linear map.

    The map leads from the features of the image to the language model.
    """
    return _on_gpt_j(_rn50x16())


def magma_tiny() -> ModelConfig:
    """MAGMA in 4.3M parameters, for 64-pixel images.

    It trains on a CPU in minutes. A prompt may hold seven images.
    """
    return ModelConfig(
        vision=VisionConfig(
            image_size=64, patch_size=8, width=192, depth=6, num_heads=3, mlp_dim=768
        ),
        text=DecoderConfig(
            vocab_size=3_000,
            max_length=512,
            width=128,
            depth=4,
            num_heads=4,
            mlp_dim=512,
            norm_eps=1e-5,
            layout="parallel",
            attn_bias=False,
            positions="rope",
            tie_embeddings=False,
            vocab_bias=True,
            cross_attn_every=0,
            pooling="none",
        ),
        image_projection="decoder",
        prefix_norm=True,
        adapters=(AdapterConfig(reduction=4),),
    )
