"""What a `ModelConfig` refuses, and which videos a model does.

The parts of a model are checked one by one where they are configured; here is how they go together.
"""

from typing import Any

from mammut.core.fields import require
from mammut.models.compute import Augment, AugmentConfig
from mammut.models.video import count_left_out, reads_tubes


def require_embedding(config: Any) -> None:
    """Checks that both towers of a `ModelConfig` make embeddings of one size."""
    vision = config.vision
    text = config.text
    projection = config.image_projection
    require(
        config.embed_dim is None or 0 < config.embed_dim <= 2**16,
        f"ModelConfig.embed_dim is {config.embed_dim}, expected 1 to {2**16}",
    )
    require(
        config.text_projection or text.pooling == "none" or config.embed_size == text.width,
        f"ModelConfig.embed_dim is {config.embed_dim}, which without text_projection is the text "
        f"width {text.width}",
    )
    require(
        projection != "shared" or config.embed_size == text.width,
        f"ModelConfig.embed_dim is {config.embed_dim}, which with image_projection 'shared' is "
        f"the text width {text.width}",
    )
    mean_of_tokens = vision.pooling in ("mean", "mean_all") and not vision.norm_after_pooling
    require(
        projection != "shared" or mean_of_tokens,
        f"ModelConfig.image_projection is 'shared', which goes with VisionConfig.pooling "
        f"'mean' or 'mean_all' and norm_after_pooling False, not {vision.pooling!r} and "
        f"{vision.norm_after_pooling}",
    )
    require(
        projection != "none" or text.pooling == "none" or config.vision_size == config.embed_size,
        f"ModelConfig.image_projection is 'none', which needs images of {config.embed_size} "
        f"numbers, not {config.vision_size}",
    )
    require(
        projection != "decoder" or text.pooling == "none",
        f"ModelConfig.image_projection is 'decoder', which makes no image embedding for "
        f"DecoderConfig.pooling {text.pooling!r}",
    )
    if vision.pooling == "queries":
        require(
            config.embed_size % vision.pool_heads == 0,
            f"ModelConfig.embed_dim {config.embed_size} is not a multiple of "
            f"VisionConfig.pool_heads {vision.pool_heads}",
        )


def require_prefix(config: Any) -> None:
    """Checks the settings of a `ModelConfig` that go with an image prefix, and its length."""
    text = config.text
    prefix = text.has_prefix
    require(
        prefix or (config.prefix_tokens is None and not config.prefix_norm),
        "ModelConfig.prefix_tokens and prefix_norm need an image prefix: "
        "DecoderConfig.cross_attn_every 0",
    )
    require(
        config.prefix_tokens is None
        or (config.prefix_tokens > 0 and config.image_projection in ("separate", "decoder")),
        f"ModelConfig.prefix_tokens is {config.prefix_tokens}, expected at least 1, with "
        f"image_projection 'separate' or 'decoder', not {config.image_projection!r}",
    )
    require(
        not prefix or config.image_token_size == text.width,
        f"ModelConfig.image_projection is {config.image_projection!r}, which leaves image tokens "
        f"of {config.image_token_size} numbers: a prefix has those of the decoder, {text.width}",
    )
    require(
        config.text_length >= 2,
        f"DecoderConfig.max_length {text.max_length} has no room for text after the "
        f"{config.num_prefix_tokens} tokens of an image",
    )
    require(
        not prefix or not text.text_only_depth,
        f"DecoderConfig.text_only_depth is {text.text_only_depth}, expected 0 with an image prefix",
    )


def require_video_config(config: Any) -> None:
    """Checks that a `ModelConfig` has a place for the tokens of its `VisionConfig.video`."""
    video = config.vision.video
    if video is None:
        return
    require(
        not video.frame_embed or not config.text.has_prefix,
        "VideoConfig.frame_embed is True, which needs cross-attention to the tokens of frames: "
        "DecoderConfig.cross_attn_every above 0",
    )
    require(
        not _prefix_grows(config),
        f"VisionConfig.video is of mode {video.mode!r}, which has no place in an image prefix of "
        f"{config.num_prefix_tokens} tokens: expected ModelConfig.prefix_tokens, of the pooled "
        "video, or DecoderConfig.cross_attn_every above 0",
    )


def _prefix_grows(config: Any) -> bool:
    """Whether a video would be a longer prefix than an image."""
    same = reads_tubes(config.vision) and config.vision.pooling == "queries"
    return config.text.has_prefix and config.prefix_tokens is None and not same


def require_video(
    config: Any, frames: int, augment: Augment | AugmentConfig, given: str = "image"
) -> None:
    """Checks that a model with the `ModelConfig` `config` reads videos of `frames` frames.

    A video of one frame is an image, which every model reads. `given` is what the message calls the
    videos.

    Raises:
      ValueError: it does not.
    """
    if frames == 1:
        return
    given = f"{given} is a video of {frames} frames"
    require(
        not _prefix_grows(config),
        f"{given}, which has no place in an image prefix of {config.num_prefix_tokens} tokens: "
        "expected images, or a model with ModelConfig.prefix_tokens",
    )
    require(
        not augment.crop_positions,
        f"{given}, which AugmentConfig.crop_positions True has no place for: cropped positions are "
        "those of images",
    )
    video = config.vision.video
    longest = video.frames if video is not None and video.frame_embed else frames
    require(
        frames <= longest,
        f"{given}, more than VideoConfig.frames {longest}, each of which has a vector by "
        "VideoConfig.frame_embed",
    )


def require_tubes(config: Any, frames: int) -> None:
    """Checks that training on videos of `frames` frames trains all kinds of tubes of a model.

    Training on images, `frames` 1, trains none of them.

    Raises:
      ValueError: a kind of tube would have no token.
    """
    if frames == 1 or not reads_tubes(config.vision):
        return
    left_out = count_left_out(config.vision, frames)
    video = config.vision.video
    require(
        not left_out,
        f"data.frames is {frames}, too few for {left_out} of the {len(video.tubes)} kinds of "
        f"VideoConfig.tubes, which would have no token: expected VideoConfig.frames, "
        f"{video.frames}, or tubes of fewer frames",
    )
