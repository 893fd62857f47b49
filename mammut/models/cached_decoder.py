"""The caption pass, one token at a time, with a cache.

The cache holds keys and values.

`prefill` runs the prompts, `cached_step` one token more.
"""

import operator

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float, Int

from mammut.core.typing import Array
from mammut.models.decoder import Stacks, TextDecoder
from mammut.models.masks import behind_prefix, shift_valid, within
from mammut.models.transformer import KeyValue, Layer, Rotation


@struct.dataclass
class Prefix:
    """An image prefix in a cache.

    It stands in place of the start token.
    """

    last: jax.Array  # float[1, 1, R, D]: the embedding of its last position
    before: jax.Array  # int[1, 1, R]: the count of its positions before the last, without pads
    size: int = struct.field(pytree_node=False)  # the count of its positions, pads included


@struct.dataclass
class TextCache:
    """Keys and values of R texts, with room for S positions.

    Positions are written from the first on. Rows of text are the third axis of every array.
    """

    layers: KeyValue  # float[groups, layers of a group, R, S, N, K] each
    text_only: KeyValue | None  # float[1, text_only_depth, R, S, N, K] each
    valid: jax.Array  # bool[1, 1, R, S]: False where a pad stands, in the text or in the prefix
    prefix: Prefix | None = None  # None: the model has no image prefix


@struct.dataclass
class DecodeCache:
    """Keys and values of R texts and of their images.

    The R rows of text share B images.
    """

    text: TextCache
    # float[groups, B, P, N, K] each, by group of layers; None: there is no cross-attention.
    image: KeyValue | None


def prefill(
    decoder: TextDecoder,
    tokens: Int[Array, "B L"],
    image_tokens: Float[Array, "B P Dv"],
    length: int,
    prefix_valid: Bool[Array, "B P"] | None = None,
) -> tuple[Float[Array, "B Lp D"], DecodeCache]:
    """Runs the caption pass over prompts; returns its features and a cache.

    The features cover all positions, an image prefix included.

    Args:
      decoder: the text decoder.
      tokens: the prompts. Pads may stand at the end of a prompt: what the cache holds of them is
        overwritten before anything attends to it.
      image_tokens: the images, as `MaMMUT.image_tokens` gives them.
      length: the number of text positions that the cache has room for.
      prefix_valid: marks the positions of an image prefix that are not pads; None: all of them.
    """
    text_valid = jnp.ones(tokens.shape, bool)
    valid = decoder.valid(tokens, text_valid)
    prefix = None
    if decoder.has_prefix:
        batch, size, _ = image_tokens.shape
        if prefix_valid is None:
            prefix_valid = jnp.ones((batch, size), bool)
        valid = behind_prefix(prefix_valid, valid)
        last = image_tokens[None, None, :, -1].astype(decoder.dtype)
        prefix = Prefix(last, prefix_valid[None, None, :, :-1].sum(-1), size)
        length += size - 1
    room = ((0, 0), (0, length - valid.shape[1]))

    def remember(
        kept: list[KeyValue], layer: Layer, x: jax.Array, mask: jax.Array, rotate: Rotation | None
    ) -> jax.Array:
        kv = layer.own_keys_values(x, rotate)
        kept.append(jax.tree.map(lambda y: jnp.pad(y, (*room, (0, 0), (0, 0))), kv))
        return layer.attend(x, kv, mask, rotate)

    kept_of_text_only: list[KeyValue] = []

    def run_text_only_layer(
        layer: Layer, x: jax.Array, mask: jax.Array, rotate: Rotation | None
    ) -> jax.Array:
        return layer.feed_forward(remember(kept_of_text_only, layer, x, mask, rotate))

    x, mask, rotate = decoder.caption_start(
        tokens, text_valid, image_tokens, prefix_valid, run_text_only_layer
    )

    def group(x: jax.Array, stacks: Stacks) -> tuple[jax.Array, tuple[KeyValue, KeyValue | None]]:
        kept: list[KeyValue] = []
        image: list[KeyValue] = []

        def see_image(layer: Layer, x: jax.Array) -> jax.Array:
            image.append(layer.image_keys_values(image_tokens))
            return layer(x, image[0])

        def attend_text(layer: Layer, x: jax.Array, window: int) -> jax.Array:
            return remember(kept, layer, x, within(mask, window), rotate)

        x = decoder.caption_group(stacks, x, attend_text, see_image)
        return x, (_stacked(kept), image[0] if image else None)

    x, (layers, image) = jax.lax.scan(group, x, decoder.groups())
    text_only = _one_group(kept_of_text_only) if kept_of_text_only else None
    cache = TextCache(layers, text_only, jnp.pad(valid, room)[None, None], prefix)
    return decoder.norm(x), DecodeCache(cache, image)


def cached_step(
    decoder: TextDecoder, tokens: Int[Array, "R"], position: Int[Array, ""], cache: DecodeCache
) -> tuple[Float[Array, "R D"], DecodeCache]:
    """Runs the caption pass for one more token of each text.

    Returns the features of the tokens and the next cache.

    Args:
      decoder: the text decoder.
      tokens: one token of each of R rows. R is a multiple of the B images of the cache: rows [i * R
        / B, (i + 1) * R / B) belong to image i, whose keys and values they share.
      position: the position of these tokens in their texts, the same in all rows. Position 0 of a
        model with an image prefix is the prefix's last.
      cache: what `prefill` or the step before gave.
    """
    rows = tokens.shape[0]
    past = cache.text
    x, slot, positions = _next_input(decoder, tokens, position, past.prefix)
    rotate = decoder.rotation_at(positions)

    real = decoder.valid(tokens, jnp.ones(rows, bool))[None, None, :, None]
    valid = jax.lax.dynamic_update_slice_in_dim(past.valid, real, slot, axis=3)
    seen = (jnp.arange(valid.shape[3]) <= slot)[None, None, None]
    config = decoder.config
    pads_by_id = config.pad_id is not None and config.pad_masking == "both"
    if past.prefix is not None or pads_by_id:
        seen = seen & valid[0, 0][:, None, None, :]

    def remember(
        kept: list[KeyValue], layer: Layer, x: jax.Array, old: KeyValue, mask: jax.Array
    ) -> jax.Array:
        def written(old: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=1)

        new = layer.own_keys_values(x, rotate)
        kept.append(jax.tree.map(written, old, new))
        return layer.attend(x, kept[-1], mask, rotate)

    text_only = past.text_only
    if text_only is not None:
        kept: list[KeyValue] = []
        mask = seen
        if decoder.shifted:
            mask = seen & shift_valid(valid[0, 0])[:, None, None, : valid.shape[3]]
        for i in range(config.text_only_depth):
            layer = jax.tree.map(operator.itemgetter(i), decoder.text_only_layers)
            old = jax.tree.map(operator.itemgetter((0, i)), text_only)
            x = layer.feed_forward(remember(kept, layer, x, old, mask))
        text_only = _one_group(kept)

    def group(x: jax.Array, stacks: tuple) -> tuple[jax.Array, KeyValue]:
        stacks, old, image = stacks
        kept: list[KeyValue] = []

        def attend_text(layer: Layer, x: jax.Array, window: int) -> jax.Array:
            own = jax.tree.map(operator.itemgetter(len(kept)), old)
            return remember(kept, layer, x, own, within(seen, window, slot))

        def see_image(layer: Layer, x: jax.Array) -> jax.Array:
            # The rows of an image attend to it together, as if they were the tokens of one text: so
            # its keys and values need not be repeated.
            images = image.key.shape[0]
            return layer(x.reshape(images, rows // images, -1), image).reshape(rows, 1, -1)

        x = decoder.caption_group(stacks, x, attend_text, see_image)
        return x, _stacked(kept)

    x, layers = jax.lax.scan(group, x, (decoder.groups(), past.layers, cache.image))
    text = TextCache(layers, text_only, valid, past.prefix)
    return decoder.norm(x)[:, 0], DecodeCache(text, cache.image)


def _next_input(
    decoder: TextDecoder, tokens: Int[Array, "R"], position: Int[Array, ""], prefix: Prefix | None
) -> tuple[jax.Array, Int[Array, ""], Int[Array, "*R 1"]]:
    """Embeds the tokens of a step.

    Returns also their slot in the cache and their positions.

    Pads of a prefix have slots but no positions.
    """
    x = decoder.token_embed(tokens[:, None])
    if prefix is None:
        slot = position
        positions = position[None, None]
    else:
        x = jnp.where(position == 0, prefix.last[0, 0][:, None], x)
        slot = position + prefix.size - 1
        positions = (prefix.before[0, 0] + position)[:, None]
    if decoder.pos_embed is not None:
        x = x + decoder.pos_embed[...][positions].astype(decoder.dtype)
    return x, slot, positions


def _stacked(kept: list[KeyValue]) -> KeyValue:
    """Stacks keys and values of layers on a new leading axis."""
    return jax.tree.map(lambda *x: jnp.stack(x), *kept)


def _one_group(kept: list[KeyValue]) -> KeyValue:
    """Stacks the text-only layers as if they were one group of layers."""
    return jax.tree.map(lambda y: y[None], _stacked(kept))
