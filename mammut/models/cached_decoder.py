"""The caption pass one token at a time: what it keeps of the tokens before."""

import operator

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float, Int

from mammut.core.typing import Array
from mammut.models.decoder import TextDecoder, within
from mammut.models.masks import shift_valid
from mammut.models.transformer import KeyValue


@struct.dataclass
class TextCache:
    """What the caption pass has seen of R texts; of S positions the first are written. Rows are the third axis."""

    layers: KeyValue  # float[groups, layers of a group, R, S, N, K] each
    text_only: KeyValue | None  # float[1, text_only_depth, R, S, N, K] each
    valid: jax.Array  # bool[1, 1, R, S]: no pad, by `DecoderConfig.pad_id`, or of the prefix
    prefix: "Prefix | None" = None


@struct.dataclass
class Prefix:
    """What stands before the text of R rows, in place of the start token, as far as a cache needs it."""

    last: jax.Array  # float[1, 1, R, D]: the embedding of its last position
    before: jax.Array  # int[1, 1, R]: its positions before the last, without pads
    size: int = struct.field(pytree_node=False)  # its positions, pads included


@struct.dataclass
class DecodeCache:
    """Keys and values of the caption pass; R rows of text share the B images."""

    text: TextCache
    # float[groups, B, P, N, K] each, by group of layers; None: there is no cross-attention
    image: KeyValue | None


def prefill(
    decoder: TextDecoder,
    tokens: Int[Array, "B L"],
    image_tokens: Float[Array, "B P Dv"],
    length: int,
    prefix_valid: Bool[Array, "B P"] | None = None,
) -> tuple[Float[Array, "B Lp D"], DecodeCache]:
    """The caption pass over prompts, and the cache to go on from it, with room for `length` positions of text.

    Pads may stand at the end of a prompt: what the cache holds of them is overwritten before it is
    attended to. Features are of all positions, those of a prefix included.
    """
    text_valid = jnp.ones(tokens.shape, bool)
    valid, prefix = decoder.valid(tokens, text_valid), None
    if decoder.has_prefix:
        batch, size, _ = image_tokens.shape
        prefix_valid = jnp.ones((batch, size), bool) if prefix_valid is None else prefix_valid
        valid = decoder.behind_prefix(prefix_valid, valid)
        last = image_tokens[None, None, :, -1].astype(decoder.dtype)
        prefix = Prefix(last, prefix_valid[None, None, :, :-1].sum(-1), size)
        length += size - 1
    room = ((0, 0), (0, length - valid.shape[1]))

    def remember(kept, layer, x, mask, rotate):
        kv = layer.own_keys_values(x, rotate)
        kept.append(jax.tree.map(lambda y: jnp.pad(y, (*room, (0, 0), (0, 0))), kv))
        return layer.attend(x, kv, mask, rotate)

    text_only = []

    def text_only_layer(layer, x, mask, rotate):
        return layer.feed_forward(remember(text_only, layer, x, mask, rotate))

    x, mask, rotate = decoder.caption_start(
        tokens, text_valid, image_tokens, prefix_valid, text_only_layer
    )

    def group(x, stacked):
        kept, image = [], []

        def see_image(layer, x):
            image.append(layer.image_keys_values(image_tokens))
            return layer(x, image[0])

        def attend_text(layer, x, window):
            return remember(kept, layer, x, within(mask, window), rotate)

        x = decoder.caption_group(stacked, x, attend_text, see_image)
        return x, (_stacked(kept), image[0] if image else None)

    x, (layers, image) = jax.lax.scan(group, x, decoder.groups())
    text_only = jax.tree.map(lambda y: y[None], _stacked(text_only)) if text_only else None
    valid = jnp.pad(valid, room)[None, None]
    return decoder.norm(x), DecodeCache(TextCache(layers, text_only, valid, prefix), image)


def cached_step(
    decoder: TextDecoder, tokens: Int[Array, "R"], position: Int[Array, ""], cache: DecodeCache
) -> tuple[Float[Array, "R D"], DecodeCache]:
    """The caption pass for one more token of each of R rows, all at `position`: float[R, D], and the next cache.

    R is a multiple of the B images of the cache: rows [i * R / B, (i + 1) * R / B) belong to image
    i, whose keys and values they share. Position 0 of a model with an image prefix is the prefix's
    last.
    """
    rows, past = tokens.shape[0], cache.text
    x = decoder.token_embed(tokens[:, None])
    if past.prefix is None:
        slot, places = position, position[None, None]
    else:
        x = jnp.where(position == 0, past.prefix.last[0, 0][:, None], x)
        slot, places = (
            position + past.prefix.size - 1,
            (past.prefix.before[0, 0] + position)[:, None],
        )
    if decoder.pos_embed is not None:
        x = x + decoder.pos_embed[...][places].astype(decoder.dtype)
    rotate = decoder.rotation_at(places)
    valid = jax.lax.dynamic_update_slice_in_dim(
        past.valid, decoder.valid(tokens, jnp.ones(rows, bool))[None, None, :, None], slot, axis=3
    )
    seen = (jnp.arange(valid.shape[3]) <= slot)[None, None, None]
    if past.prefix is not None or (
        decoder.config.pad_id is not None and decoder.config.pad_masking == "both"
    ):
        seen = seen & valid[0, 0][:, None, None, :]

    def remember(kept, layer, x, old, mask):
        new = layer.own_keys_values(x, rotate)
        kept.append(
            jax.tree.map(
                lambda o, n: jax.lax.dynamic_update_slice_in_dim(o, n, slot, axis=1), old, new
            )
        )
        return layer.attend(x, kept[-1], mask, rotate)

    text_only = past.text_only
    if text_only is not None:
        kept = []
        mask = (
            seen & shift_valid(valid[0, 0])[:, None, None, : valid.shape[3]]
            if decoder.shifted
            else seen
        )
        for i in range(decoder.config.text_only_depth):
            layer = jax.tree.map(operator.itemgetter(i), decoder.text_only_layers)
            old = jax.tree.map(lambda y, i=i: y[0, i], text_only)
            x = layer.feed_forward(remember(kept, layer, x, old, mask))
        text_only = jax.tree.map(lambda y: y[None], _stacked(kept))

    def group(x, stacked):
        stacked, old, image = stacked
        kept = []

        def attend_text(layer, x, window):
            own = jax.tree.map(operator.itemgetter(len(kept)), old)
            return remember(kept, layer, x, own, within(seen, window, slot))

        def see_image(layer, x):
            # The rows of an image ask together, as if they were the tokens of one text: its cache
            # is not repeated.
            images = image.key.shape[0]
            return layer(x.reshape(images, rows // images, -1), image).reshape(rows, 1, -1)

        x = decoder.caption_group(stacked, x, attend_text, see_image)
        return x, _stacked(kept)

    x, layers = jax.lax.scan(group, x, (decoder.groups(), past.layers, cache.image))
    return decoder.norm(x)[:, 0], DecodeCache(
        TextCache(layers, text_only, valid, past.prefix), cache.image
    )


def _stacked(kept: list[KeyValue]) -> KeyValue:
    return jax.tree.map(lambda *x: jnp.stack(x), *kept)
