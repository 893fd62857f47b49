"""open_clip's tensors and our parameters, a table for each family of models.

`open_clip_config` has the families.
"""

from collections.abc import Iterable, Mapping

from mammut.models.decoder import DecoderConfig
from mammut.models.mammut import ModelConfig
from mammut.weights.files.tensor_file import TensorSpec
from mammut.weights.tables import (
    Entry,
    Joined,
    Patches,
    Reshaped,
    Rows,
    Same,
    Table,
    Transposed,
    linear_entries,
    norm_entries,
)

_MASKS = "attn_mask", "text.attn_mask", "text_decoder.attn_mask"  # older releases saved them


def table(config: ModelConfig, theirs: Mapping[str, TensorSpec]) -> Table:
    """Makes the table for a model and for the file's tensors.

    The tensors show what depends on the writer of the file: the name of the vocabulary head, which
    LAION's fork calls `text.text_projection`; the shape of the contrastive loss's scalars, [] or
    [1]; whether it has a bias; and whether a head that is the embedding is stored as well.

    Args:
      config: the config of the model.
      theirs: the tensors of the file.
    """
    coca = config.text.text_only_depth > 0
    modern = config.text.cross_attn_position == "inside"
    entries = list(_vision(config))
    if not coca:
        entries.append(Entry("map_viz2txt_kv", ("image_projection.kernel",)))
    if coca:
        entries += _coca(config)
    elif modern:
        entries += _modern(config, "text.lm_head.weight" in theirs)
    else:
        head = "text.lm_head" if "text.lm_head" in theirs else "text.text_projection"
        entries += _classic(config, head)
    constant = {}
    for name in ("logit_scale", "logit_bias"):
        if name == "logit_bias" and name not in theirs:
            constant[name] = (0.0, "the model was trained without")
            continue
        shape = ()
        if name in theirs and theirs[name].shape == (1,):
            shape = (1,)
        entries.append(Entry(name, (name,), Reshaped(shape)))
    unused = {key: "a causal mask, which is no parameter" for key in _MASKS if key in theirs}
    return Table(entries, unused, constant)


def _joined(
    theirs: str,
    ours: str,
    names: tuple[str, ...],
    bias: bool = True,
    layer: int | None = None,
    dot: str = ".",
) -> Iterable[Entry]:
    """Lists the entries of several linear maps as one.

    `dot` stands before "weight": torch.nn.MultiheadAttention has "_" there, in `in_proj_weight`.
    """
    kernels = tuple(f"{ours}.{name}.kernel" for name in names)
    yield Entry(f"{theirs}{dot}weight", kernels, Joined(Transposed()), layer)
    if bias:
        biases = tuple(f"{ours}.{name}.bias" for name in names)
        yield Entry(f"{theirs}{dot}bias", biases, Joined(Same(flat=True)), layer)


_QKV = "query", "key", "value"


def _block(
    theirs: str, ours: str, layer: int, *, mlp: bool = True, image: bool = False
) -> Iterable[Entry]:
    """Lists the entries of a layer, except the modern decoder's."""
    yield from norm_entries(f"{theirs}.ln_1", f"{ours}.attn_norm", layer=layer)
    if image:
        yield from norm_entries(f"{theirs}.ln_1_kv", f"{ours}.image_norm", layer=layer)
    yield from _joined(f"{theirs}.attn.in_proj", f"{ours}.attn", _QKV, layer=layer, dot="_")
    yield from linear_entries(f"{theirs}.attn.out_proj", f"{ours}.attn.out", layer, Transposed(2))
    if mlp:
        yield from norm_entries(f"{theirs}.ln_2", f"{ours}.mlp_norm", layer=layer)
        yield from linear_entries(f"{theirs}.mlp.c_fc", f"{ours}.mlp.up", layer=layer)
        yield from linear_entries(f"{theirs}.mlp.c_proj", f"{ours}.mlp.down", layer=layer)


def _vision(config: ModelConfig) -> Iterable[Entry]:
    vision = config.vision
    yield Entry("visual.conv1.weight", ("vision.patch_embed.kernel",), Patches(vision.patch_size))
    yield Entry("visual.class_embedding", ("vision.class_embed",))
    yield Entry(
        "visual.positional_embedding",
        ("vision.class_pos_embed", "vision.pos_embed"),
        Joined(Rows()),
    )
    if vision.input_norm:
        yield from norm_entries("visual.ln_pre", "vision.input_norm")
    for i in range(vision.depth):
        yield from _block(f"visual.transformer.resblocks.{i}", "vision.layers", i)
    if vision.pooling == "queries":
        yield from _pool(config)
    yield from norm_entries("visual.ln_post", "vision.norm")
    yield Entry("visual.proj", ("image_embed_projection.kernel",))


def _pool(config: ModelConfig) -> Iterable[Entry]:
    theirs = "visual.attn_pool"
    ours = "vision.pool"
    yield Entry(f"{theirs}.query", (f"{ours}.query",))
    yield from norm_entries(f"{theirs}.ln_q", f"{ours}.query_norm")
    yield from norm_entries(f"{theirs}.ln_k", f"{ours}.token_norm")
    fused, *biases = _joined(f"{theirs}.attn.in_proj", f"{ours}.attn", _QKV, dot="_")
    yield from biases
    if config.vision.width == config.vision_size:
        yield fused
    else:  # torch.nn.MultiheadAttention fuses the three maps only where their inputs have one size
        for name in _QKV:
            yield Entry(
                f"{theirs}.attn.{name[0]}_proj_weight",
                (f"{ours}.attn.{name}.kernel",),
                Transposed(),
            )
    yield from linear_entries(f"{theirs}.attn.out_proj", f"{ours}.attn.out", layout=Transposed(2))


def _own_layers(text: DecoderConfig) -> Iterable[tuple[str, int, bool]]:
    """Lists the self-attention layers in order.

    Each has our path, its index there, and whether it has an MLP.
    """
    if not text.has_bare_layers:
        yield from (("text.layers", i, True) for i in range(text.depth))
    else:
        for i in range(text.depth):
            group, index = divmod(i, text.cross_attn_every)
            if index == 0:
                yield "text.bare_layers", group, False
            else:
                yield "text.layers", group * (text.cross_attn_every - 1) + index - 1, True


def _classic(config: ModelConfig, head: str) -> Iterable[Entry]:
    yield Entry("text.token_embedding.weight", ("text.token_embed.embedding",))
    yield Entry("text.positional_embedding", ("text.pos_embed",))
    for i, (ours, index, mlp) in enumerate(_own_layers(config.text)):
        yield from _block(f"text.resblocks.{i}", ours, index, mlp=mlp)
    for i in range(config.text.num_cross_layers):
        yield from _block(f"text.cross_attn.{i}", "text.cross_layers", i, image=True)
    yield from norm_entries("text.ln_final", "text.norm")
    yield Entry(head, ("text.vocab_head.kernel",))
    if config.text_projection:
        yield Entry("text.text_projection", ("text_embed_projection.kernel",))


def _coca(config: ModelConfig) -> Iterable[Entry]:
    yield Entry("text.token_embedding.weight", ("text.token_embed.embedding",))
    yield Entry("text.positional_embedding", ("text.pos_embed",))
    yield Entry("text.cls_emb", ("text.class_embed",), Same(flat=True))
    for i in range(config.text.text_only_depth):
        yield from _block(f"text.transformer.resblocks.{i}", "text.text_only_layers", i)
    yield from norm_entries("text.ln_final", "text.text_only_norm")
    if config.text_projection:
        yield Entry("text.text_projection", ("text_embed_projection.kernel",))
    for i in range(config.text.depth):
        yield from _block(f"text_decoder.resblocks.{i}", "text.layers", i)
        yield from _block(f"text_decoder.cross_attn.{i}", "text.cross_layers", i, image=True)
    yield from norm_entries("text_decoder.ln_final", "text.norm")
    yield Entry("text_decoder.text_projection", ("text.vocab_head.kernel",))


def _modern(config: ModelConfig, head: bool) -> Iterable[Entry]:
    text = config.text
    own = "text.layers"
    cross = "text.cross_layers"
    yield Entry("text.token_embedding.weight", ("text.token_embed.embedding",))
    for i in range(text.depth):
        block = f"text.blocks.{i}"
        yield from norm_entries(f"{block}.norm1", f"{own}.attn_norm", i, bias=text.norm == "layer")
        yield from _joined(f"{block}.attn.qkv", f"{own}.attn", _QKV, text.attn_bias, i)
        yield from _modern_attention(f"{block}.attn", f"{own}.attn", text, i)
        yield from norm_entries(f"{block}.norm2", f"{own}.mlp_norm", i, bias=text.norm == "layer")
        if text.activation == "swiglu":
            yield from _joined(f"{block}.mlp.w12", f"{own}.mlp", ("up", "gate"), text.mlp_bias, i)
            yield from linear_entries(
                f"{block}.mlp.w3", f"{own}.mlp.down", bias=text.mlp_bias, layer=i
            )
        else:
            yield from linear_entries(
                f"{block}.mlp.c_fc", f"{own}.mlp.up", bias=text.mlp_bias, layer=i
            )
            yield from linear_entries(
                f"{block}.mlp.c_proj", f"{own}.mlp.down", bias=text.mlp_bias, layer=i
            )
    for group in range(text.num_cross_layers):
        block = f"text.blocks.{group * text.cross_attn_every}"
        yield from norm_entries(
            f"{block}.norm_x", f"{cross}.attn_norm", group, bias=text.norm == "layer"
        )
        yield from linear_entries(
            f"{block}.xattn.q", f"{cross}.attn.query", bias=text.attn_bias, layer=group
        )
        yield from _joined(
            f"{block}.xattn.kv", f"{cross}.attn", ("key", "value"), text.attn_bias, group
        )
        yield from _modern_attention(f"{block}.xattn", f"{cross}.attn", text, group)
    yield from norm_entries("text.ln_final", "text.norm", bias=text.norm == "layer")
    if not text.tie_embeddings:
        yield Entry("text.lm_head.weight", ("text.vocab_head.kernel",), Transposed())
    elif head:  # after the embedding: where the two differ, open_clip also uses the head for both
        yield Entry("text.lm_head.weight", ("text.token_embed.embedding",))
    if config.text_projection:
        yield Entry("text.text_projection.weight", ("text_embed_projection.kernel",), Transposed())


def _modern_attention(theirs: str, ours: str, text: DecoderConfig, layer: int) -> Iterable[Entry]:
    if text.qk_norm:
        yield from norm_entries(
            f"{theirs}.q_norm", f"{ours}.query_norm", layer, bias=text.norm == "layer"
        )
        yield from norm_entries(
            f"{theirs}.k_norm", f"{ours}.key_norm", layer, bias=text.norm == "layer"
        )
    if text.attn_gate:
        yield from linear_entries(
            f"{theirs}.gate", f"{ours}.gate", bias=text.gate_bias, layer=layer
        )
    yield from linear_entries(
        f"{theirs}.proj", f"{ours}.out", layer, Transposed(2), bias=text.attn_bias
    )
