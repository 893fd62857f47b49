"""Tubes of a video to tokens, and the positions of the tokens.

It follows section 3.3 of the paper, which takes both from TubeViT (arXiv 2212.03229).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Shaped

from mammut.core.sharding import constrain
from mammut.core.typing import Array
from mammut.models.compute import Dtypes
from mammut.models.layers import Constant, Linear, param
from mammut.models.video import TubeConfig, token_kinds

# Base of the frequencies of the fixed code, in frames or pixels.
_CODE_BASE = 10_000.0


def cut_tubes(
    video: Shaped[Array, "B T height width C"], tube: TubeConfig
) -> Shaped[Array, "B P S C"]:
    """Cuts the tubes of one kind out of videos.

    Returns [B, P, S, C] of the video's number type, with S the pixels of a tube: frame by frame,
    row by row, as `vit.patchify` lays out a patch. Only these pixels are read: a convolution over
    all of them would take several times the time and memory.
    """
    batch, frames, size, _, channels = video.shape
    counts = []
    for axis, (starts, extent) in enumerate(zip(tube.starts(frames, size), tube.size), start=1):
        index = np.add.outer(np.array(starts, int), np.arange(extent))
        video = jnp.take(video, index.ravel(), axis=axis)
        counts += index.shape
    x = video.reshape(batch, *counts, channels).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(batch, math.prod(counts[::2]), math.prod(tube.size), channels)


def join_tubes(
    x: Float[Array, "B Q F"], tube: TubeConfig, counts: tuple[int, int, int]
) -> Float[Array, "B P D"]:
    """Joins neighbouring tubes to tokens, channel behind channel (space-to-depth).

    Args:
      x: float[B, Q, D / parts], the tubes of one kind.
      tube: their kind.
      counts: the number of tokens along each axis.

    Returns:
      float[B, P, D].
    """
    sizes = [size for axis in zip(counts, tube.join) for size in axis]
    x = x.reshape(len(x), *sizes, x.shape[-1]).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(len(x), math.prod(counts), tube.parts * x.shape[-1])


def fixed_code(
    t: np.ndarray, y: np.ndarray, x: np.ndarray, width: int
) -> Float[jax.Array, "t y x D"]:
    """Computes the fixed code of the points of a grid, float32[t, y, x, D].

    An axis has D // 6 frequencies. The blocks of channels are sin t, cos t, sin y, cos y, sin x,
    cos x, and zeros to fill up. (TubeViT, section 3.3; its order of channels is another, which a
    learned model cannot tell.)

    Args:
      t, y, x: the coordinates along each axis, as indices of frames and pixels.
      width: D.
    """
    frequencies = width // 6
    rates = _CODE_BASE ** (-np.arange(frequencies) / max(frequencies, 1))
    shape = len(t), len(y), len(x)
    blocks = []
    for axis, centres in enumerate((t, y, x)):
        angles = np.multiply.outer(centres, rates)
        code = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
        # Spread over the grid on the device: the whole code of a large model has megabytes.
        code = jnp.expand_dims(code, [other for other in range(3) if other != axis])
        blocks.append(jnp.broadcast_to(code, (*shape, 2 * frequencies)))
    blocks.append(jnp.zeros((*shape, width - 6 * frequencies), jnp.float32))
    return jnp.concatenate(blocks, axis=-1)


def _read_table(
    table: Float[Array, "down across D"], y: np.ndarray, x: np.ndarray, covered: int
) -> Float[jax.Array, "y x D"]:
    """Reads a table of positions at pixels y and x, bilinearly.

    Its places are the centres of equal cells, which cover `covered` pixels a side. Beyond the
    outermost centres the value of the nearest one holds.
    """
    for axis, centres in enumerate((y, x)):
        cells = table.shape[axis]
        place = np.clip((centres + 0.5) * cells / covered - 0.5, 0, cells - 1)
        before = np.floor(place).astype(int)
        after = np.minimum(before + 1, cells - 1)
        share = jnp.asarray(place - before, table.dtype)
        share = share[:, None, None] if axis == 0 else share[:, None]
        before, after = (jnp.take(table, index, axis=axis) for index in (before, after))
        table = (1 - share) * before + share * after
    return table


class VideoEmbed(nnx.Module):
    """What an encoder of mode "tubes" has beside the image's: kernels of tubes, and the gate.

    Args:
      config: the `VisionConfig` of the encoder.
      dtypes: number types.
    """

    def __init__(self, config: Any, *, dtypes: Dtypes):
        self.config = config
        self.dtype = dtypes.compute
        video = config.video
        self.tubes = nnx.Dict()
        for number, tube in enumerate(video.tubes):
            pixels = {"patch": math.prod(tube.size) * 3}
            embed = {"embed": config.width // tube.parts}
            linear = Linear(pixels, embed, dtypes=dtypes, use_bias=config.patch_bias)
            self.tubes[str(number)] = linear
        # The code is as long as sqrt(D / 2), the learned positions of a new model as 1.
        gate = Constant(1 / math.sqrt(config.width / 2))
        gated = video.fixed_code == "gated"
        self.gate = param(gate, (), dtypes.param) if gated else None

    def tokens(
        self,
        video: Shaped[Array, "B T height width 3"],
        normalise: Callable[[Array], jax.Array],
    ) -> list[Float[jax.Array, "B _ D"]]:
        """Embeds the tubes of videos, without positions: float[B, P, D] of each kind.

        `normalise` acts on the pixels that were cut out, which are far fewer than all.
        """
        frames, size = video.shape[1:3]
        tokens = []
        for number, tube in enumerate(self.config.video.tubes):
            pixels = normalise(cut_tubes(video, tube)).astype(self.dtype)
            batch, count, size_of_tube, channels = pixels.shape
            pixels = pixels.reshape(batch, count, size_of_tube * channels)
            # Without this line the tokens were split by channels, as the kernels are, and brought
            # to the patches by all-to-alls.
            embedded = constrain(self.tubes[str(number)](pixels), "batch", "patch", "embed")
            tokens.append(join_tubes(embedded, tube, tube.counts(frames, size)))
        return tokens

    def positions(
        self, table: Float[Array, "down across D"], frames: int
    ) -> Float[jax.Array, "P D"]:
        """Computes the positions of a video's patches and tubes, float[P, D].

        They are the image's learned positions, read from its table at the centre of a tube, which
        tell no time, and the fixed code.
        """
        config = self.config
        parts = []
        for number, kind in enumerate(token_kinds(config)):
            t, y, x = kind.centres(frames, config.image_size)
            # Patches have a place of the table each.
            learned = table if number == 0 else _read_table(table, y, x, config.covered_size)
            position = jnp.broadcast_to(learned, (len(t), *learned.shape))
            if config.video.fixed_code != "none":
                code = fixed_code(t, y, x, config.width)
                gate = 1.0 if self.gate is None else self.gate[...].astype(jnp.float32)
                position = position + (gate * code).astype(self.dtype)
            parts.append(position.reshape(-1, config.width))
        return jnp.concatenate(parts)
