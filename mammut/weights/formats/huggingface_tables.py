"""The tensors of transformers' GPT-2, GPT-Neo, GPT-J and GPT-NeoX and our parameters: one table for each."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from mammut.models.decoder import DecoderConfig
from mammut.weights.files.tensor_file import TensorSpec
from mammut.weights.tables import Entry, Joined, Kernel, Layout, Same, Shape, Table, Transposed

_QKV = "query", "key", "value"
_HEADS = "lm_head.weight", "embed_out.weight"
_MASK = "a causal mask, which is no parameter"
_ANGLES = "rotary angles, which are no parameters"


@dataclasses.dataclass(frozen=True)
class HeadByHead:
    """Query, key and value of one head after the other: a weight [N * 3 * K, D] of kernels [D, N, K], or a bias."""

    def shape(self, ours: Sequence[Shape]) -> Shape:
        """[N * 3 * K, D], or [N * 3 * K]."""
        return len(ours) * math.prod(ours[0][-2:]), *ours[0][:-2]

    def load(self, theirs: np.ndarray, ours: Sequence[Shape], place: int) -> np.ndarray:
        """Ours."""
        heads, size = ours[place][-2:]
        return np.moveaxis(theirs.reshape(heads, len(ours), size, -1)[:, place], -1, 0).reshape(
            ours[place]
        )

    def save(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Theirs."""
        shapes = [array.shape for array in ours]
        heads = [np.moveaxis(array.reshape(-1, *array.shape[-2:]), 0, -1) for array in ours]
        return np.stack(heads, axis=1).reshape(self.shape(shapes))


def table(model_type: str, text: DecoderConfig, theirs: Mapping[str, TensorSpec]) -> Table:
    """The table for a model and for the tensors in its file.

    Of those it looks at what depends on who wrote the file: whether the names have the prefix of a
    model with a head, the name of the head, a head that is the embedding and may be there twice,
    what is no parameter.
    """
    prefix, make = _TABLES[model_type]
    if not any(name.startswith(prefix) for name in theirs):
        prefix = ""
    entries, buffers = make(prefix, text)
    head = next((name for name in _HEADS if name in theirs), _HEADS[0])
    if not text.tie_embeddings:
        entries.append(Entry(head, ("text.vocab_head.kernel",), Transposed()))
    elif head in theirs:
        entries.append(Entry(head, ("text.token_embed.embedding",)))
    if text.vocab_bias:
        entries.append(Entry("lm_head.bias", ("text.vocab_head_bias",)))
    return Table(entries, {name: reason for name, reason in buffers.items() if name in theirs})


def _affine(
    theirs: str,
    ours: str,
    layer: int,
    layout: Layout = Transposed(),
    *,
    weight: bool = True,
    bias: bool = True,
) -> Iterable[Entry]:
    """A torch.nn.Linear, or with the layout `Kernel` a Conv1D."""
    yield Entry(f"{theirs}.weight", (f"{ours}.kernel",), layout, layer)
    if bias:
        yield Entry(f"{theirs}.bias", (f"{ours}.bias",), Same(flat=True), layer)


def _norm(theirs: str, ours: str, layer: int | None = None) -> Iterable[Entry]:
    yield Entry(f"{theirs}.weight", (f"{ours}.scale",), layer=layer)
    yield Entry(f"{theirs}.bias", (f"{ours}.bias",), layer=layer)


def _fused(
    theirs: str, layer: int, weight: Layout, vector: Layout, *, bias: bool = True
) -> Iterable[Entry]:
    """Query, key and value as one map."""
    kernels, biases = (
        tuple(f"text.layers.attn.{name}.{leaf}" for name in _QKV) for leaf in ("kernel", "bias")
    )
    yield Entry(f"{theirs}.weight", kernels, weight, layer)
    if bias:
        yield Entry(f"{theirs}.bias", biases, vector, layer)


# entries, and what files may hold beside parameters, with the reason
_Made = tuple[list[Entry], dict[str, str]]


def _gpt2(prefix: str, text: DecoderConfig) -> _Made:
    entries, buffers, ours = _ends(prefix, "wte", "ln_f"), {}, "text.layers"
    entries.append(Entry(f"{prefix}wpe.weight", ("text.pos_embed",)))
    for i in range(text.depth):
        block = f"{prefix}h.{i}"
        entries += _norm(f"{block}.ln_1", f"{ours}.attn_norm", i)
        entries += _fused(
            f"{block}.attn.c_attn", i, Joined(Kernel(), axis=1), Joined(Same(flat=True))
        )
        entries += _affine(f"{block}.attn.c_proj", f"{ours}.attn.out", i, Kernel(2))
        entries += _norm(f"{block}.ln_2", f"{ours}.mlp_norm", i)
        entries += _affine(f"{block}.mlp.c_fc", f"{ours}.mlp.up", i, Kernel())
        entries += _affine(f"{block}.mlp.c_proj", f"{ours}.mlp.down", i, Kernel())
        buffers |= {f"{block}.attn.{name}": _MASK for name in ("bias", "masked_bias")}
    return entries, buffers


def _gpt_neo(prefix: str, text: DecoderConfig) -> _Made:
    entries, buffers, ours = _ends(prefix, "wte", "ln_f"), {}, "text.layers"
    entries.append(Entry(f"{prefix}wpe.weight", ("text.pos_embed",)))
    for i in range(text.depth):
        block = f"{prefix}h.{i}"
        attention = f"{block}.attn.attention"
        entries += _norm(f"{block}.ln_1", f"{ours}.attn_norm", i)
        for name in _QKV:
            entries += _affine(f"{attention}.{name[0]}_proj", f"{ours}.attn.{name}", i, bias=False)
        entries += _affine(f"{attention}.out_proj", f"{ours}.attn.out", i, Transposed(2))
        entries += _norm(f"{block}.ln_2", f"{ours}.mlp_norm", i)
        entries += _affine(f"{block}.mlp.c_fc", f"{ours}.mlp.up", i)
        entries += _affine(f"{block}.mlp.c_proj", f"{ours}.mlp.down", i)
        buffers |= {f"{attention}.{name}": _MASK for name in ("bias", "masked_bias")}
    return entries, buffers


def _gptj(prefix: str, text: DecoderConfig) -> _Made:
    entries, buffers, ours = _ends(prefix, "wte", "ln_f"), {}, "text.layers"
    for i in range(text.depth):
        block = f"{prefix}h.{i}"
        entries += _norm(f"{block}.ln_1", f"{ours}.attn_norm", i)
        for name in _QKV:
            entries += _affine(f"{block}.attn.{name[0]}_proj", f"{ours}.attn.{name}", i, bias=False)
        entries += _affine(
            f"{block}.attn.out_proj", f"{ours}.attn.out", i, Transposed(2), bias=False
        )
        entries += _affine(f"{block}.mlp.fc_in", f"{ours}.mlp.up", i)
        entries += _affine(f"{block}.mlp.fc_out", f"{ours}.mlp.down", i)
        buffers |= {f"{block}.attn.{name}": _MASK for name in ("bias", "masked_bias")}
        buffers[f"{block}.attn.embed_positions"] = _ANGLES
    return entries, buffers


def _gpt_neox(prefix: str, text: DecoderConfig) -> _Made:
    entries, ours = _ends(prefix, "embed_in", "final_layer_norm"), "text.layers"
    buffers = {f"{prefix}rotary_emb.inv_freq": _ANGLES}
    for i in range(text.depth):
        block = f"{prefix}layers.{i}"
        entries += _norm(f"{block}.input_layernorm", f"{ours}.attn_norm", i)
        entries += _norm(f"{block}.post_attention_layernorm", f"{ours}.mlp_norm", i)
        fused = f"{block}.attention.query_key_value"
        entries += _fused(fused, i, HeadByHead(), HeadByHead(), bias=text.attn_bias)
        entries += _affine(
            f"{block}.attention.dense", f"{ours}.attn.out", i, Transposed(2), bias=text.attn_bias
        )
        entries += _affine(f"{block}.mlp.dense_h_to_4h", f"{ours}.mlp.up", i)
        entries += _affine(f"{block}.mlp.dense_4h_to_h", f"{ours}.mlp.down", i)
        buffers |= {f"{block}.attention.{name}": _MASK for name in ("bias", "masked_bias")}
        buffers[f"{block}.attention.rotary_emb.inv_freq"] = _ANGLES
    return entries, buffers


def _ends(prefix: str, embedding: str, norm: str) -> list[Entry]:
    """What stands before and after the layers."""
    return [
        Entry(f"{prefix}{embedding}.weight", ("text.token_embed.embedding",)),
        *_norm(f"{prefix}{norm}", "text.norm"),
    ]


# By `model_type`: what the names start with in a model with a head, and the table of what is below
# it.
_TABLES: dict[str, tuple[str, Callable[[str, DecoderConfig], _Made]]] = {
    "gpt2": ("transformer.", _gpt2),
    "gpt_neo": ("transformer.", _gpt_neo),
    "gptj": ("transformer.", _gptj),
    "gpt_neox": ("gpt_neox.", _gpt_neox),
}
