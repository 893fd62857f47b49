"""How likely a text is, given an image."""

import jax

from mammut.models.losses import caption_loss
from mammut.models.mammut import MaMMUT


def _text_logprob(model: MaMMUT, image_tokens, rows, tokens, text_valid) -> jax.Array:
    """log P of each text given the image at its row of `image_tokens`: float[R]."""
    features = model.decoder.caption_pass(tokens, text_valid, image_tokens[rows])
    targets, loss_mask = model.caption_labels(tokens, text_valid)
    head = {"vocab_kernel": model.text.vocab_kernel, "vocab_bias": model.text.vocab_bias}
    return -caption_loss(features, labels=targets, loss_mask=loss_mask, **head).sum(1)
