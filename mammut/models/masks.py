"""The only builder of attention and loss masks. Arrays in, arrays out."""

import jax.numpy as jnp
from jaxtyping import Bool, Int

from mammut.core.typing import Array


def attn_mask(valid: Bool[Array, "B S"], causal: Bool[Array, "S"]) -> Bool[Array, "B 1 S S"]:
    """Who may attend to whom, from two boolean vectors: bool[B, 1, L, S], True = may attend (query, key).

    `valid` marks real tokens: a pad is never attended to. `causal[s]` says that token s is hidden
    from all before it:

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
    """`valid` one position later, bool[B, L + 1]: True, then `valid`.

    open_clip's CoCa puts the place of its class token, at the end of the text, at the front of this
    mask, and its weights are trained with that: a token is hidden when the one before it is a pad.
    """
    return jnp.pad(valid, ((0, 0), (1, 0)), constant_values=True)


def caption_labels(
    tokens: Int[Array, "B L"],
    text_valid: Bool[Array, "B L"],
    target: Bool[Array, "B L"] | None = None,
) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
    """The labels of the caption pass, int[B, L]: `tokens` shifted left by one; and their loss mask, bool[B, L].

    The mask follows the labels, not the inputs: the end token, as an input, would be asked to
    predict a pad. Ids play
    no part in it: 0 is a pad here and "!" in CLIP's vocabulary. `target` marks the tokens to be
    predicted, such as an answer and its end after a question; None: all.
    """
    labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    predicted = text_valid if target is None else text_valid & target
    # Nothing is learned from the pads before a text; one inside it, of those who know pads by their
    # id, is an input.
    loss_mask = jnp.pad(predicted[:, 1:], ((0, 0), (0, 1))) & (jnp.cumsum(text_valid, axis=1) > 0)
    return labels, loss_mask


def within(
    mask: Bool[Array, "#B 1 L S"], window: int, first: Int[Array, ""] | int = 0
) -> Bool[Array, "#B 1 L S"]:
    """Limits a mask to the last `window` tokens before each query; 0: leaves it as it is.

    The first query stands at position `first`.
    """
    if not window:
        return mask
    asking = jnp.arange(mask.shape[2]) + first
    attended = jnp.arange(mask.shape[3])
    return mask & (asking[:, None] - attended < window)
