"""Counts of a model's parameters and of the floating-point operations (FLOPs) of its passes."""

import math

from flax import nnx

from mammut.models.mammut import MaMMUT, ModelConfig
from mammut.models.resnet import ResNetConfig
from mammut.models.vit import patches_kept


def num_params(config: ModelConfig) -> dict[str, int]:
    """Parameters of a MaMMUT without making one: by part, and their `total`."""
    abstract = nnx.eval_shape(lambda: MaMMUT(config, rngs=nnx.Rngs(0)))
    counts = {
        **{"vision": 0, "image_projection": 0, "token_embed": 0, "layers": 0, "cross_layers": 0},
        **({"adapters": 0} if config.adapters else {}),
        "other": 0,
    }
    for path, param in nnx.to_flat_state(nnx.state(abstract, nnx.Param)):
        part = path[1] if path[0] == "text" else path[0]
        part = "layers" if part in ("bare_layers", "text_only_layers") else part
        counts[part if part in counts else "other"] += param.get_value().size
    return {**counts, "total": sum(counts.values())}


def forward_flops(
    config: ModelConfig,
    patch_drop: float = 0.0,
    length: int | None = None,
    sees_image: bool = True,
) -> dict[str, int]:
    """FLOPs of one example forward (2 a multiply-add), by part: vision, contrastive pass, caption pass, vocabulary.

    A text has `length` tokens, beside those of an image prefix; None: as many as the model has
    places for. `patch_drop` is the share of patches that a training step leaves out
    (`AugmentConfig.patch_drop`); such a step is three times the sum. Without `sees_image` the caption pass is
    a language pass. Attention counts in full where it is bidirectional and half where it is causal.
    What remat recomputes is not counted, nor are the B x B contrastive logits, nor adapters.
    """
    vision, text = config.vision, config.text
    length = config.text_length if length is None else length
    # Of the caption pass: a prefix takes the start's place.
    sequence = length + (max(config.num_prefix_tokens - 1, 0) if sees_image else 0)
    patches = vision.grid[0] * vision.grid[1]
    dropped = patches - patches_kept(patches, patch_drop) if patch_drop else 0
    tokens = patches - dropped + vision.class_token
    seen = vision.num_tokens - (0 if vision.pooling == "queries" else dropped)  # by the decoder

    # `size` of what is attended to
    def attention(tower, asking, attended, causal=False, size=None):
        own = (3 if tower.attn_gate else 2) * asking * tower.width
        maps = 2 * tower.width * (own + 2 * attended * (size or tower.width))
        return maps + 4 * asking * attended * tower.width // (2 if causal else 1)

    def mlp(tower, asking):
        return (6 if tower.activation == "swiglu" else 4) * asking * tower.width * tower.mlp_dim

    def projected(count, *sizes):
        return 2 * count * math.prod(sizes)

    groups, inside = text.num_cross_layers, text.cross_attn_position == "inside"
    mlps = text.depth - groups if text.has_bare_layers else text.depth
    text_only = text.text_only_depth

    def text_layers(depth, mlps, causal, length):
        return depth * attention(text, length, length, causal) + mlps * mlp(text, length)

    def vit():
        pool = {
            "map": attention(vision, 1, tokens) + mlp(vision, 1),
            "queries": 4 * vision.pool_queries * tokens * config.vision_size
            + projected(
                2,
                config.vision_size,
                vision.pool_queries * config.vision_size + tokens * vision.width,
            ),
        }
        layers = vision.depth * (attention(vision, tokens, tokens) + mlp(vision, tokens))
        return (
            projected(patches, vision.patch_size**2 * 3, vision.width)
            + layers
            + pool.get(vision.pooling, 0)
        )

    to_decoder = config.image_projection in ("shared", "separate", "decoder")
    to_embedding = config.image_projection in ("separate", "embedding")
    cross = attention(text, length, seen, size=config.image_token_size)
    cross += 0 if inside else mlp(text, length)
    contrastive = (text_only, text_only) if text_only else (text.depth, mlps)
    early = text_layers(text_only, text_only, True, sequence) if text.depth else 0
    of_pooled = config.prefix_tokens is not None
    return {
        "vision": (resnet_flops(vision) if isinstance(vision, ResNetConfig) else vit())
        + to_decoder
        * projected(config.prefix_tokens if of_pooled else seen, config.vision_size, text.width)
        + to_embedding * projected(1, config.vision_size, config.embed_size),
        "contrastive_pass": 0
        if text.pooling == "none"
        else text_layers(*contrastive, text.causal_contrastive, length)
        + config.text_projection * projected(1, text.width, config.embed_size),
        "caption_pass": early
        + text_layers(text.depth, mlps, True, sequence)
        + sees_image * groups * cross,
        "vocabulary": projected(length, text.width, text.vocab_size) if text.depth else 0,
    }


def resnet_flops(config: ResNetConfig) -> int:
    """FLOPs of the convolutions for one image (2 a multiply-add, the zeros around an image included)."""
    width, side, norm_free = config.stem_width, config.image_size // 2, config.kind == "nf"
    half = width // 2
    stem = 7 * 7 * 3 * width if norm_free else 3 * 3 * (3 * half + half * half + half * width)
    macs, side, inputs = stem * side**2, side // 2, width
    for place, depth in enumerate(config.stages):
        middle, outputs = width * 2**place, 4 * width * 2**place
        after = side // 2 if place else side
        # the 3 x 3 convolution has a stride, or an average follows it
        halved = after if norm_free else side
        macs += (
            inputs * middle * side**2
            + 9 * middle**2 * halved**2
            + (middle + inputs) * outputs * after**2
        )
        macs += (depth - 1) * (2 * middle * outputs + 9 * middle**2) * after**2
        side, inputs = after, outputs
    return 2 * macs
