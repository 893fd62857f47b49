"""Tables between big_vision's arrays and our parameters.

Names and shapes of the arrays in a file show which model it holds.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from jaxtyping import Float32

from mammut.data.processor import TextForm
from mammut.models.decoder import DecoderConfig
from mammut.models.mammut import ModelConfig
from mammut.models.vit import VisionConfig
from mammut.weights.formats.big_vision_arrays import Arrays
from mammut.weights.tables import Entry, Joined, Layout, Reshaped, Rows, Same, Shape

_ATTENTION = "MultiHeadDotProductAttention_0"
_KERNEL = ("kernel", "bias")
_SCALE = ("scale", "bias")
# The vocabulary of SigLIP 2, whose texts are filled up with pads; SigLIP's are filled up with ends.
_GEMMA_VOCAB = 256_000
# Pixels along one side by patch size and patches along one side, where they are no multiple of the
# patch size: So400m/14 of SigLIP and SigLIP 2.
_PUBLISHED_SIZES = {(14, 27): 384}


@dataclasses.dataclass(frozen=True)
class Model:
    """The model in a file; arrays have the names of `Arrays`."""

    config: ModelConfig  # for an image encoder alone, only its `vision` has a meaning
    entries: list[Entry]
    # the way in which its texts are made; None: it is an image encoder alone
    text_form: TextForm | None
    unused: Mapping[str, str]  # arrays that our model does not have, and why
    zero: Mapping[str, str]  # our parameters that are 0, and why
    computed: Mapping[str, Callable[[], np.ndarray]]  # our parameters that are computed
    notes: tuple[str, ...]


def image_encoder(arrays: Arrays, image_size: int | None) -> Model:
    """Reads a ViT (models/vit.py), alone or in a larger model.

    Args:
      arrays: the arrays of the file.
      image_size: pixels, as in `open_model`.

    Raises:
      CheckpointError: the arrays do not belong to a ViT that mammut has.
    """
    prefix = next((prefix for prefix in ("img/", "encoder/") if arrays.under(prefix)), "")
    vision = _vision(arrays, prefix, image_size)
    unused = _classifier(arrays, prefix)
    unused |= {name: "of a contrastive loss" for name in ("t", "b") if prefix and name in arrays}
    config = arrays.build(ModelConfig, vision.config, image_projection="separate")
    notes = *vision.notes, *vision.pooling_note
    return Model(config, vision.entries, None, unused, vision.zero, vision.computed, notes)


def two_towers(arrays: Arrays, image_size: int | None = None) -> Model:
    """Reads an image and a text encoder.

    They are big_vision's models/proj/image_text/two_towers.py.

    Args:
      arrays: the arrays of the file.
      image_size: pixels, as in `open_model`.

    Raises:
      CheckpointError: the arrays do not belong to two towers that mammut has.
    """
    sizes, layers = _encoder(arrays, "txt/Encoder_0/")
    vocab_size, _ = arrays.shape("txt/Embed_0/embedding", 2)
    _, max_length, _ = arrays.shape("txt/pos_embedding", 3)
    arrays.shape("t", 1)
    img_head, txt_head = (bool(arrays.under(f"{tower}/head/")) for tower in ("img", "txt"))
    embed_dim = arrays.shape("txt/head/kernel", 2)[1] if txt_head else None
    refused = {
        "txt/MAPHead_0/": "texts are pooled by a MAP head, expected their last token",
        "img/pre_logits/": "there is a layer before the image's head, expected none",
    }
    for prefix, why in refused.items():
        arrays.require(not arrays.under(prefix), f"{arrays.key(prefix)}: {why}")
    vision = _vision(arrays, "img/", image_size)
    text = arrays.build(
        DecoderConfig, vocab_size=vocab_size, max_length=max_length, depth=0,
        text_only_depth=layers.depth, pooling="last", pad_masking="none", **sizes,
    )  # fmt: skip
    config = arrays.build(
        ModelConfig, vision.config, text, embed_dim=embed_dim, text_projection=txt_head,
        image_projection="embedding" if img_head else "none",
    )  # fmt: skip
    entries = vision.entries + [
        Entry("txt/Embed_0/embedding", ("text.token_embed.embedding",)),
        Entry("txt/pos_embedding", ("text.pos_embed",), _Batched(Same())),
        Entry("t", ("logit_scale",), Reshaped((1,))),
        *_encoder_entries("txt/Encoder_0/", layers, "text.text_only_layers", "text.text_only_norm"),
        *(_each("img/head", "image_embed_projection", _KERNEL) if img_head else ()),
        *(_each("txt/head", "text_embed_projection", _KERNEL) if txt_head else ()),
    ]
    zero = dict(vision.zero)
    if "b" in arrays:
        entries.append(Entry("b", ("logit_bias",), Reshaped((1,))))
    else:
        zero["logit_bias"] = "the model was trained without"
    note = (
        "text.pooling is 'last'; "
        "the file does not tell pool_type 'last' from 'first', 'mean' and 'max'"
    )
    form = "end" if vocab_size == _GEMMA_VOCAB else "end_filled"
    return Model(config, entries, form, {}, zero, {}, (*vision.notes, *vision.pooling_note, note))


def cappa(arrays: Arrays, image_size: int | None, max_length: int | None) -> Model:
    """Reads an image encoder and a caption decoder.

    They are big_vision's models/proj/cappa/cappa.py.

    Args:
      arrays: the arrays of the file.
      image_size: pixels, as in `open_model`.
      max_length: tokens of a text, for computed positions of the decoder.

    Raises:
      CheckpointError: the arrays do not belong to such a model that mammut has.
    """
    layers, shape = _layers(arrays, "decoder/EncDecBlock", "LayerNorm1/scale", axis=1)
    width, heads, _ = shape("SelfAttn/query/kernel", 3)
    _, mlp_dim = shape("MLP/Dense_0/kernel", 2)
    _, vocab_size = arrays.shape("decoder/LogitsDense/kernel", 2)
    rows, _ = arrays.shape("decoder/EmbedTargets/embedding", 2)
    biased = any(name.endswith("/MLP/Dense_0/bias") for name in arrays.under("decoder/"))
    arrays.require(
        "encoder/cls" not in arrays,
        f"{arrays.key('encoder/cls')}: there is a class token, expected none",
    )
    if learned := "pos_embedding_decoder" in arrays:
        _, max_length, _ = arrays.shape("pos_embedding_decoder", 3)
    else:
        _require_computable(arrays, "pos_embedding_decoder", "max_length", max_length, width)
    vision = _vision(arrays, "encoder/", image_size)
    text = arrays.build(
        DecoderConfig, vocab_size=vocab_size, max_length=max_length, width=width,
        depth=layers.depth, num_heads=heads, mlp_dim=mlp_dim, attn_bias=False, mlp_bias=biased,
        cross_attn_every=1, cross_attn_position="inside", tie_embeddings=False,
        vocab_bias=True, pooling="none", pad_masking="none",
    )  # fmt: skip
    config = arrays.build(ModelConfig, vision.config, text, image_projection="none")
    # A CapPa is also trained to predict all tokens at once: one more row stands for a masked token.
    masked = int(rows == vocab_size + 1)
    notes = list(vision.notes)
    if masked:
        embedding = arrays.key("decoder/EmbedTargets/embedding")
        notes.append(f"the last row of {embedding} is not used: of masked tokens")
    entries = [*vision.entries, *_caption_entries(layers, biased, masked)]
    computed = dict(vision.computed)
    if learned:
        entries.append(Entry("pos_embedding_decoder", ("text.pos_embed",), _Batched(Same())))
    else:
        computed["text.pos_embed"] = lambda: sincos2d(1, max_length, width)
        notes.append("text.pos_embed is computed: the file has no positions")
    zero = dict(vision.zero)
    zero |= dict.fromkeys(("logit_scale", "logit_bias"), "there is no contrastive pass")
    if not biased:
        norms = _CAPTION_NORMS.values()
        zero |= {f"{ours}.bias": "the last norm alone has a bias" for ours in norms}
    unused = _classifier(arrays, "encoder/")
    return Model(config, entries, "start_end", unused, zero, computed, tuple(notes))


def sincos2d(down: int, across: int, width: int) -> Float32[np.ndarray, "positions width"]:
    """Computes the positions of a grid, row by row.

    Source: `posemb_sincos_2d` of models/vit.py, after MoCo v3.

    Returns:
      float32[down * across, width].
    """
    y, x = np.mgrid[:down, :across].reshape(2, -1, 1).astype(np.float32)
    frequencies = np.float32(1) / np.float32(10_000) ** np.linspace(
        0, 1, width // 4, dtype=np.float32
    )
    angles = x * frequencies, y * frequencies
    return np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1)


@dataclasses.dataclass(frozen=True)
class _Vision:
    """An image encoder in a file, with the fields of `Model`."""

    config: VisionConfig
    entries: list[Entry]
    zero: Mapping[str, str]
    computed: Mapping[str, Callable[[], np.ndarray]]
    notes: tuple[str, ...]

    @property
    def pooling_note(self) -> tuple[str, ...]:
        """Notes what the file does not tell about pooling.

        The tuple is empty where the file gives everything.
        """
        if self.config.pooling != "mean":
            return ()
        return (
            "vision.pooling is 'mean'; the file does not tell pool_type 'gap' from '0' and 'none'",
        )


def _vision(arrays: Arrays, prefix: str, image_size: int | None) -> _Vision:
    """Reads the image encoder whose names begin with `prefix`."""
    sizes, layers = _encoder(arrays, f"{prefix}Transformer/")
    embedding = f"{prefix}embedding/kernel"
    positions = f"{prefix}pos_embedding"
    patch, across, channels, width = kernel = arrays.shape(embedding, 4)
    arrays.require(
        (across, channels) == (patch, 3),
        f"{arrays.key(embedding)} is {list(kernel)}, expected square patches of 3 channels",
    )
    class_token = f"{prefix}cls" in arrays
    map_head = bool(arrays.under(f"{prefix}MAPHead_0/"))
    ours: tuple[str, ...] = ("vision.pos_embed",)
    layout: Layout = Rows()
    zero = {}
    if class_token:
        zero["vision.class_pos_embed"] = "the class token has no position"
    computed = {}
    notes = []
    if positions in arrays:
        _, count, _ = arrays.shape(positions, 3)
        side = math.isqrt(count)
        arrays.require(
            count - side**2 in (0, 1),
            f"{arrays.key(positions)} is of {count} positions, expected those of a square",
        )
        image_size = _image_size(patch, side, image_size, notes)
        if count > side**2 and class_token:  # an old file, in which the class token has a position
            ours = ("vision.class_pos_embed", *ours)
            layout = Joined(Rows())
            zero = {}
        elif count > side**2:
            layout = _Among(Rows(), 1, 0)
            notes.append(
                f"the first row of {arrays.key(positions)} is not used: "
                "of a class token, which is not there"
            )
    else:
        _require_computable(arrays, positions, "image_size", image_size, width)
        side = (image_size or 0) // patch
        computed["vision.pos_embed"] = lambda: sincos2d(side, side, width).reshape(
            side, side, width
        )
        notes.append("vision.pos_embed is computed: the file has no positions")
    pooling = "class" if class_token else "mean"
    if map_head:
        pooling = "map"
    # The config is made before the entries: it limits the number of layers.
    config = arrays.build(
        VisionConfig, image_size=image_size, patch_size=patch, class_token=class_token,
        cut_rest=(image_size or 0) % patch != 0,
        depth=layers.depth, pooling=pooling, **sizes,
    )  # fmt: skip
    entries = [
        Entry(embedding, ("vision.patch_embed.kernel",), Reshaped(kernel)),
        Entry(f"{prefix}embedding/bias", ("vision.patch_embed.bias",)),
        *([] if computed else [Entry(positions, ours, _Batched(layout))]),
        *_encoder_entries(f"{prefix}Transformer/", layers, "vision.layers", "vision.norm"),
    ]
    if class_token:
        entries.append(Entry(f"{prefix}cls", ("vision.class_embed",), Reshaped((1, 1, width))))
    if map_head:
        head = f"{prefix}MAPHead_0"
        entries.append(Entry(f"{head}/probe", ("vision.pool.query",), Reshaped((1, 1, width))))
        entries += _attention(f"{head}/{_ATTENTION}", "vision.pool.attn", _KERNEL)
        entries += _each(f"{head}/LayerNorm_0", "vision.pool.mlp_norm", _SCALE)
        entries += _mlp(f"{head}/MlpBlock_0", "vision.pool.mlp", _KERNEL)
    return _Vision(config, entries, zero, computed, tuple(notes))


def _image_size(patch: int, side: int, given: int | None, notes: list[str]) -> int:
    """Finds the pixels along one side of images of `side` patches.

    A convolution without padding makes as many patches of a somewhat larger image.
    """
    least, most = side * patch, side * patch + patch - 1
    if given is not None and least <= given <= most:
        return given
    if (patch, side) not in _PUBLISHED_SIZES:
        return least
    size = _PUBLISHED_SIZES[patch, side]
    notes.append(
        f"vision.image_size is {size}, as published for {side} x {side} patches of {patch}: the "
        f"file does not tell it from {least} to {most}, an image_size given to mammut.load does"
    )
    return size


def _require_computable(
    arrays: Arrays, name: str, field: str, size: int | None, width: int
) -> None:
    """Adds a problem unless the missing positions can be computed.

    The positions are not in the file.
    """
    missing = f"{arrays.key(name)} is missing"
    arrays.require(
        size is not None,
        f"{missing}: if positions are computed (sincos2d), say for which {field}",
    )
    arrays.require(
        size is None or width % 4 == 0 and width > 4,
        f"{missing}, and cannot be computed for a width of {width}, expected 8, 12, 16 or more",
    )


def _classifier(arrays: Arrays, prefix: str) -> dict[str, str]:
    return dict.fromkeys(
        arrays.under(f"{prefix}head/") + arrays.under(f"{prefix}pre_logits/"), "of a classifier"
    )


@dataclasses.dataclass(frozen=True)
class _Batched:
    """The layout `layout` behind an axis of size 1."""

    layout: Layout

    def shape(self, ours):
        return 1, *self.layout.shape(ours)

    def load(self, theirs, ours, index):
        return self.layout.load(theirs[0], ours, index)

    def save(self, ours):
        return self.layout.save(ours)[None]


@dataclasses.dataclass(frozen=True)
class _Among:
    """The layout `layout` among rows that our model lacks.

    These rows are written as zeros.
    """

    layout: Layout
    before: int  # number of such rows before ours
    after: int  # number of such rows after ours

    def shape(self, ours):
        rows, *others = self.layout.shape(ours)
        return self.before + rows + self.after, *others

    def load(self, theirs, ours, index):
        return self.layout.load(theirs[self.before : len(theirs) - self.after], ours, index)

    def save(self, ours):
        rows = self.layout.save(ours)
        return np.pad(rows, [(self.before, self.after), *[(0, 0)] * (rows.ndim - 1)])


@dataclasses.dataclass(frozen=True)
class _SecondAxis:
    """The same numbers with our first axis as the second.

    The first axis is the axis of layers.
    """

    def shape(self, ours):
        layers, first, *others = ours[0]
        return first, layers, *others

    def load(self, theirs, ours, index):
        return theirs.swapaxes(0, 1)

    def save(self, ours):
        return ours[0].swapaxes(0, 1)


# The layout of an array, and the number of our layer; None: the whole parameter.
_At = tuple[Layout, int | None]
_WHOLE: _At = (Same(), None)


@dataclasses.dataclass(frozen=True)
class _Layers:
    """The layers of a tower: separate or stacked.

    Separate layers are named {stem}0, {stem}1, ...
    """

    stem: str
    depth: int
    layout: Layout | None

    def each(self) -> Iterator[tuple[str, _At]]:
        """Yields the name of each layer and its storage.

        The storage says how and where its arrays are stored.
        """
        if self.layout is not None:
            yield self.stem, (self.layout, None)
        else:
            yield from ((f"{self.stem}{i}", (Same(), i)) for i in range(self.depth))


def _layers(
    arrays: Arrays, stem: str, scale: str, axis: int
) -> tuple[_Layers, Callable[[str, int], Shape]]:
    """Finds the layers whose names begin with `stem`.

    Args:
      arrays: the arrays of the file.
      stem: the beginning of the layers' names.
      scale: the name of an array that has one axis in each layer.
      axis: the axis of that array that counts the layers, where they are stacked (`scan=True`).

    Returns:
      The layers; and a function of a name and a number of axes, the shape of that array in one
      layer.
    """
    stacked = stem.removesuffix("_")
    if not arrays.under(f"{stacked}/"):
        # The count, not the largest number: a foreign file may leave out numbers below it.
        numbers = {name[len(stem) :].partition("/")[0] for name in arrays.under(stem)}
        return _Layers(stem, len(numbers), None), lambda name, axes: arrays.shape(
            f"{stem}0/{name}", axes
        )

    def shape(name: str, axes: int) -> Shape:
        sizes = arrays.shape(f"{stacked}/{name}", axes + 1)
        return sizes[:axis] + sizes[axis + 1 :]

    depth = arrays.shape(f"{stacked}/{scale}", 2)[axis]
    return _Layers(stacked, depth, _SecondAxis() if axis else Same()), shape


def _encoder(arrays: Arrays, prefix: str) -> tuple[dict[str, int], _Layers]:
    """Reads the sizes of a transformer encoder and its layers.

    The encoder is class `Encoder` of models/vit.py.
    """
    layers, shape = _layers(arrays, f"{prefix}encoderblock_", "LayerNorm_0/scale", axis=0)
    width, heads, _ = shape(f"{_ATTENTION}/query/kernel", 3)
    _, mlp_dim = shape("MlpBlock_0/Dense_0/kernel", 2)
    return {"width": width, "num_heads": heads, "mlp_dim": mlp_dim}, layers


def _encoder_entries(prefix: str, layers: _Layers, ours: str, norm: str) -> Iterable[Entry]:
    for name, at in layers.each():
        yield from _each(f"{name}/LayerNorm_0", f"{ours}.attn_norm", _SCALE, at)
        yield from _attention(f"{name}/{_ATTENTION}", f"{ours}.attn", _KERNEL, at)
        yield from _each(f"{name}/LayerNorm_1", f"{ours}.mlp_norm", _SCALE, at)
        yield from _mlp(f"{name}/MlpBlock_0", f"{ours}.mlp", _KERNEL, at)
    yield from _each(f"{prefix}encoder_norm", norm, _SCALE)


_CAPTION_NORMS = {
    "LayerNorm1": "text.layers.attn_norm",
    "LayerNorm2": "text.cross_layers.attn_norm",
    "LayerNorm3": "text.layers.mlp_norm",
}
_CAPTION_ATTENTION = {"SelfAttn": "text.layers.attn", "CrossAttn": "text.cross_layers.attn"}


def _caption_entries(layers: _Layers, biased: bool, masked: int) -> Iterable[Entry]:
    """Lists the entries of a CapPa's decoder, except its positions.

    Args:
      layers: its layers.
      biased: whether norms and MLPs of the layers have biases.
      masked: the number of rows behind the embedding, of masked tokens.
    """
    embedding = _Among(Same(), 0, masked)
    yield Entry("decoder/EmbedTargets/embedding", ("text.token_embed.embedding",), embedding)
    norm_arrays = _SCALE if biased else ("scale",)
    mlp_arrays = _KERNEL if biased else ("kernel",)
    for name, at in layers.each():
        for theirs, ours in _CAPTION_NORMS.items():
            yield from _each(f"{name}/{theirs}", ours, norm_arrays, at)
        for theirs, ours in _CAPTION_ATTENTION.items():
            yield from _attention(f"{name}/{theirs}", ours, ("kernel",), at)
        yield from _mlp(f"{name}/MLP", "text.layers.mlp", mlp_arrays, at)
    yield from _each("decoder/LayerNorm", "text.norm", _SCALE)
    yield Entry("decoder/LogitsDense/kernel", ("text.vocab_head.kernel",))
    yield Entry("decoder/LogitsDense/bias", ("text.vocab_head_bias",))


def _attention(theirs: str, ours: str, names: tuple[str, ...], at: _At = _WHOLE) -> Iterable[Entry]:
    for part in ("query", "key", "value", "out"):
        yield from _each(f"{theirs}/{part}", f"{ours}.{part}", names, at)


def _mlp(theirs: str, ours: str, names: tuple[str, ...], at: _At = _WHOLE) -> Iterable[Entry]:
    yield from _each(f"{theirs}/Dense_0", f"{ours}.up", names, at)
    yield from _each(f"{theirs}/Dense_1", f"{ours}.down", names, at)


def _each(theirs: str, ours: str, names: tuple[str, ...], at: _At = _WHOLE) -> Iterable[Entry]:
    for name in names:
        yield Entry(f"{theirs}/{name}", (f"{ours}.{name}",), *at)
