"""Attention and loss masks; all masks are made here.

Functions take arrays and return arrays.
"""

import jax.numpy as jnp
from jaxtyping import Bool, Int

from mammut.core.typing import Array


def attn_mask(valid: Bool[Array, "B S"], causal: Bool[Array, "S"]) -> Bool[Array, "B 1 S S"]:
    """Makes an attention mask from two boolean vectors, bool[B, 1, S, S].

    The third axis has the queries, the last the keys; True: the query may attend to
    the key. `valid` marks real tokens: nothing attends to a pad. `causal[s]` hides token s from all
    tokens before it:

        causal = 0 0 0 0 (contrastive pass)   1 1 1 1 (caption pass)   0 0 1 1 (prefix, then text)
                 x x x x                      x . . .                  x x . .
                 x x x x                      x x . .                  x x . .
                 x x x x                      x x x .                  x x x .
                 x x x x                      x x x x                  x x x x
    """
    block = jnp.cumsum(causal)
    visible = block[None, :] <= block[:, None]
    return (visible[None] & valid[:, None, :])[:, None]


def shift_valid(valid: Bool[Array, "B L"]) -> Bool[Array, "B Lc"]:
    """Moves `valid` one position to the right, bool[B, L + 1].

    The result is True, then `valid`.

    The class token of open_clip's CoCa stands behind the text, but this mask has its entry in
    front. The weights were trained with that: a token is hidden where the one before it is a pad.
    """
    return jnp.pad(valid, ((0, 0), (1, 0)), constant_values=True)


def behind_prefix(
    prefix_valid: Bool[Array, "B P"], valid: Bool[Array, "B L"]
) -> Bool[Array, "B Lp"]:
    """Marks the real tokens of a prefix and its text.

    Returns bool[B, P - 1 + L].

    The prefix stands in place of the text's first token. A text without any token leaves it without
    its last position.
    """
    together = jnp.concatenate([prefix_valid, valid[:, 1:]], axis=1)
    return together[:, : prefix_valid.shape[1] - 1 + valid.shape[1]]


def caption_labels(
    tokens: Int[Array, "B L"],
    text_valid: Bool[Array, "B L"],
    target: Bool[Array, "B L"] | None = None,
) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
    """Makes the labels of the caption pass and their loss mask.

    Returns int[B, L] and bool[B, L].

    Labels are `tokens` shifted left by one. The mask follows the labels, not the inputs: the end
    token, as an input, would have to predict a pad. It does not depend on ids: 0 is a pad here and
    "!" in CLIP's vocabulary.

    Args:
      tokens: the ids of the texts.
      text_valid: marks real tokens.
      target: marks the tokens to predict, such as an answer and its end behind a question; None:
        all.
    """
    labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    predicted = text_valid if target is None else text_valid & target
    loss_mask = jnp.pad(predicted[:, 1:], ((0, 0), (0, 1)))
    # A pad before a text predicts nothing. A pad inside it (`DecoderConfig.pad_id`) is an input
    # like any other.
    begun = jnp.cumsum(text_valid, axis=1) > 0
    return labels, loss_mask & begun


def within(
    mask: Bool[Array, "#B 1 L S"], window: int, first: Int[Array, ""] | int = 0
) -> Bool[Array, "#B 1 L S"]:
    """Limits a mask to the last `window` tokens of each query.

    The query itself is one of them.

    A window of 0 leaves the mask as it is. The first query stands at position `first`.
    """
    if not window:
        return mask
    queries = jnp.arange(mask.shape[2]) + first
    keys = jnp.arange(mask.shape[3])
    return mask & (queries[:, None] - keys < window)
