"""Both passes on one batch: their results, and one traversal of the decoder for both."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float, Int

from mammut.core.typing import Array
from mammut.models.decoder import Stacks, TextDecoder
from mammut.models.transformer import Layer


@struct.dataclass
class TwoPassOutput:
    """Results of both passes on one batch, whose images were encoded once."""

    image_embed: jax.Array  # float[B, E], unit vectors
    text_embed: jax.Array  # float[B, E], unit vectors
    features: jax.Array  # float[B, L, D] of the caption pass; `model.text.logits` scores them


def both_passes(
    decoder: TextDecoder,
    tokens: Int[Array, "B L"],
    text_valid: Bool[Array, "B L"],
    image_tokens: Float[Array, "B P Dv"],
) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"]]:
    """Runs `contrastive_pass` and `caption_pass` in one traversal; returns the results of both.

    With parameters split over devices (FSDP) each weight is gathered once. The passes are stacked
    on a new leading axis, float[2, B, L, D]. The batch axis is split over devices: side by side on
    it, rows would move between devices. Cross-attention layers run in the caption pass alone.
    `require_computable` refuses models whose passes differ in length or layers.
    """
    x, caption_mask, rotate = decoder.caption_start(tokens, text_valid, image_tokens)
    contrastive_mask = decoder.contrastive_mask(tokens, text_valid, x.shape[1])
    masks = jnp.stack(jnp.broadcast_arrays(contrastive_mask, caption_mask))

    def in_both(step: Callable, *stacked: jax.Array) -> jax.Array:
        # An empty tuple says that no mesh axis splits the new dimension; `None` would leave that
        # to the compiler.
        return jax.vmap(step, spmd_axis_name=())(*stacked)

    def attend_text(layer: Layer, x: jax.Array, window: int) -> jax.Array:
        def attend(x: jax.Array, mask: jax.Array) -> jax.Array:
            return layer.attend(x, mask=mask, rotate=rotate)

        return in_both(attend, x, masks)

    def see_image(layer: Layer, x: jax.Array) -> jax.Array:
        caption = layer(x[1], layer.image_keys_values(image_tokens))
        return jnp.stack([x[0], caption])

    def feed_forward(layer: Layer, x: jax.Array) -> jax.Array:
        return in_both(layer.feed_forward, x)

    def group(x: jax.Array, stacks: Stacks) -> jax.Array:
        return decoder.caption_group(stacks, x, attend_text, see_image, feed_forward)

    x = jnp.stack([x, x])
    contrastive, caption = decoder.norm(
        decoder.scan(group, x, decoder.groups(), decoder.unrolled_groups)
    )
    return contrastive, caption
