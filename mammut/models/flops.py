"""Counts of a model's parameters and floating-point operations (FLOPs).

Every count of FLOPs in mammut is made here. tests/test_flops.py compares them with the matrix
products and convolutions of the traced program.
"""

import math
from collections.abc import Iterable, Mapping

from flax import nnx

from mammut.models.layers import LayerConfig
from mammut.models.mammut import MaMMUT, ModelConfig
from mammut.models.resnet import ResNetConfig
from mammut.models.video import count_patches, count_tokens, reads_tubes, token_kinds
from mammut.models.vit import VisionConfig, patches_kept


def num_params(config: ModelConfig) -> dict[str, int]:
    """Counts the parameters of a MaMMUT by part.

    `total` is their sum. No model is made.
    """
    abstract = nnx.eval_shape(lambda: MaMMUT(config, rngs=nnx.Rngs(0)))
    counts = {"vision": 0, "image_projection": 0, "token_embed": 0, "layers": 0, "cross_layers": 0}
    if config.adapters:
        counts["adapters"] = 0
    counts["other"] = 0

    for path, param in nnx.to_flat_state(nnx.state(abstract, nnx.Param)):
        part = path[1] if path[0] == "text" else path[0]
        if part in ("bare_layers", "text_only_layers"):
            part = "layers"
        elif part not in counts:
            part = "other"
        counts[part] += param.get_value().size

    return {**counts, "total": sum(counts.values())}


def forward_flops(
    config: ModelConfig,
    patch_drop: float = 0.0,
    length: int | None = None,
    sees_image: bool = True,
    frames: int = 1,
) -> dict[str, int]:
    """Counts the FLOPs of one example's forward pass, 2 for each multiply-add.

    Counted are matrix products and convolutions. Attention counts in full where it is
    bidirectional, and half where it is causal, with or without a local window. Not counted are
    adapters, the B x B contrastive logits, and what remat computes again.

    Args:
      config: the model.
      patch_drop: the share of patches that a training step leaves out
        (`AugmentConfig.patch_drop`).
      length: tokens of the text, without an image prefix; None: `config.text_length`.
      sees_image: False: the caption pass is a language pass.
      frames: T, where an example is a video; 1: it is an image.

    Returns:
      The FLOPs of each part: `vision`, `contrastive_pass`, `caption_pass`, `vocabulary`.
      `training_flops` computes the FLOPs of a training step from them.
    """
    vision = config.vision
    text = config.text
    length = config.text_length if length is None else length
    # Frames that the encoder sees at once; others are encoded as so many images.
    at_once = frames if reads_tubes(vision) else 1
    alone = frames // at_once
    patches = count_patches(vision, at_once)
    dropped = patches - patches_kept(patches, patch_drop) if patch_drop else 0

    # Tokens that the decoder sees: learned queries stay when patches are dropped.
    seen = count_tokens(vision, at_once)
    if vision.pooling != "queries":
        seen -= dropped

    if isinstance(vision, ResNetConfig):
        tower = resnet_flops(vision)
    else:
        tower = _vit_flops(vision, at_once, dropped, query_width=config.vision_size)
    encoded = alone * (tower + _projection_flops(config, seen))
    seen *= alone

    return {
        "vision": encoded,
        "contrastive_pass": _contrastive_flops(config, length),
        "caption_pass": _caption_flops(config, length, seen, sees_image),
        "vocabulary": _product(length, text.width, text.vocab_size) if text.depth else 0,
    }


def training_flops(parts: Mapping[str, int], recomputed: Iterable[str] = ()) -> int:
    """Counts the FLOPs of a training step.

    The step costs three times the forward pass (`forward_flops`): the backward pass of a product y
    = x W has two products of the same size, one for the gradient of x and one for the gradient of
    W. Where W is frozen, or x needs no gradient, fewer products run; this saving is not subtracted.

    Args:
      parts: FLOPs of the forward pass by part.
      recomputed: parts that the backward pass computes once more, each as often as it is named.
    """
    return 3 * sum(parts.values()) + sum(parts[part] for part in recomputed)


def resnet_flops(config: ResNetConfig) -> int:
    """Counts the FLOPs of a ResNet's convolutions for one image.

    The zeros around the image are included.
    """
    width = config.stem_width
    half = width // 2
    norm_free = config.kind == "nf"

    # Multiply-adds. The stem's first convolution has stride 2, the pooling behind it 2 again.
    side = config.image_size // 2
    if norm_free:
        macs = 7 * 7 * 3 * width * side**2
    else:
        macs = 3 * 3 * (3 * half + half * half + half * width) * side**2
    side //= 2

    inputs = width
    for stage, depth in enumerate(config.stages):
        middle = width * 2**stage
        outputs = 4 * middle
        halved = side // 2 if stage else side
        # In the first bottleneck of a stage, the norm-free 3 x 3 convolution has the stride; in
        # CLIP's an average follows it.
        side_of_3x3 = halved if norm_free else side
        macs += (
            inputs * middle * side**2
            + 9 * middle**2 * side_of_3x3**2
            + (middle + inputs) * outputs * halved**2
        )
        macs += (depth - 1) * (2 * middle * outputs + 9 * middle**2) * halved**2
        side = halved
        inputs = outputs
    return 2 * macs


def _vit_flops(config: VisionConfig, frames: int, dropped: int, query_width: int) -> int:
    """Counts the FLOPs of the ViT with its pooling.

    `dropped` patches are embedded, but the layers do not see them.
    """
    tokens = count_patches(config, frames) - dropped + config.class_token
    patch_embed = 0
    for kind in token_kinds(config):
        count = math.prod(kind.counts(frames, config.image_size))
        patch_embed += _product(count, math.prod(kind.size) * 3, config.width)
    layers = config.depth * (_attention(config, tokens, tokens) + _mlp(config, tokens))

    if config.pooling == "map":
        pool = _attention(config, 1, tokens) + _mlp(config, 1)
    elif config.pooling == "queries":
        pool = _attention(
            config, config.pool_queries, tokens, width=query_width, kv_width=config.width
        )
    else:
        pool = 0
    return patch_embed + layers + pool


def _projection_flops(config: ModelConfig, seen: int) -> int:
    """Counts the FLOPs of the maps after the image encoder.

    The maps lead to the decoder's width and to the embedding.
    """
    flops = 0
    if config.maps_tokens:
        # Prefix tokens are made from the pooled image.
        tokens = seen if config.prefix_tokens is None else config.prefix_tokens
        flops += _product(tokens, config.vision_size, config.text.width)
    if config.maps_embedding:
        flops += _product(config.vision_size, config.embed_size)
    return flops


def _contrastive_flops(config: ModelConfig, length: int) -> int:
    """Counts the FLOPs of the contrastive pass and its projection."""
    text = config.text
    if text.pooling == "none":
        return 0

    positions = length + text.class_token
    if text.text_only_depth:
        flops = _text_only_layers(config, positions, text.causal_contrastive)
    else:
        flops = _self_attention_layers(config, positions, text.causal_contrastive)
    if config.text_projection:
        flops += _product(text.width, config.embed_size)
    return flops


def _caption_flops(config: ModelConfig, length: int, seen: int, sees_image: bool) -> int:
    """Counts the FLOPs of the caption pass without the vocabulary.

    The pass sees `seen` image tokens; without `sees_image` it is the language pass.
    """
    text = config.text
    if not text.depth:
        return 0

    positions = length
    if sees_image and text.has_prefix:
        prefix = seen if config.prefix_tokens is None else config.prefix_tokens
        positions += prefix - 1  # the prefix takes the place of the start token
    flops = _text_only_layers(config, positions, causal=True)
    flops += _self_attention_layers(config, positions, causal=True)

    if sees_image:
        layer = _attention(text, length, seen, kv_width=config.image_token_size)
        if text.cross_attn_position != "inside":
            layer += _mlp(text, length)
        flops += text.num_cross_layers * layer
    return flops


def _text_only_layers(config: ModelConfig, positions: int, causal: bool) -> int:
    text = config.text
    layer = _attention(text, positions, positions, causal=causal) + _mlp(text, positions)
    return text.text_only_depth * layer


def _self_attention_layers(config: ModelConfig, positions: int, causal: bool) -> int:
    text = config.text
    mlps = text.depth
    if text.has_bare_layers:
        mlps -= text.num_cross_layers
    attention = _attention(text, positions, positions, causal=causal)
    return text.depth * attention + mlps * _mlp(text, positions)


def _attention(
    tower: LayerConfig,
    queries: int,
    keys: int,
    *,
    causal: bool = False,
    width: int | None = None,
    kv_width: int | None = None,
) -> int:
    """Counts attention with its maps.

    `width` is the width of the queries (None: the tower's), `kv_width` the width of the tokens
    attended to (None: as `width`).
    """
    width = tower.width if width is None else width
    kv_width = width if kv_width is None else kv_width
    query_maps = 3 if tower.attn_gate else 2  # maps of the query, of the output, of the gate
    maps = query_maps * _product(queries, width, width) + 2 * _product(keys, kv_width, width)
    scores_and_sum = 2 * _product(queries, keys, width)
    return maps + (scores_and_sum // 2 if causal else scores_and_sum)


def _mlp(tower: LayerConfig, tokens: int) -> int:
    maps = 3 if tower.activation == "swiglu" else 2
    return maps * _product(tokens, tower.width, tower.mlp_dim)


def _product(*sizes: int) -> int:
    """Counts the FLOPs of a matrix product, 2 for each multiply-add."""
    return 2 * math.prod(sizes)
