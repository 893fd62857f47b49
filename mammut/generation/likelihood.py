"""The likelihood of a text, given an image."""

import jax
from jaxtyping import Bool, Float, Int

from mammut.core.typing import Array
from mammut.models.losses import caption_loss
from mammut.models.mammut import MaMMUT


def text_logprob(
    model: MaMMUT,
    image_tokens: Float[Array, "B P D"],
    rows: Int[Array, " R"],
    tokens: Int[Array, "R L"],
    text_valid: Bool[Array, "R L"],
) -> Float[jax.Array, " R"]:
    """Computes log P(text | image) of R texts, float[R].

    Text r is about the image at row `rows[r]`.
    """
    features = model.decoder.caption_pass(tokens, text_valid, image_tokens[rows])
    labels, loss_mask = model.caption_labels(tokens, text_valid)
    head = {"vocab_kernel": model.text.vocab_kernel, "vocab_bias": model.text.vocab_bias}
    return -caption_loss(features, labels=labels, loss_mask=loss_mask, **head).sum(1)
