"""Tables between transformers' language models and our parameters.

There is one table for each model: GPT-2, GPT-Neo, GPT-J and GPT-NeoX.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from mammut.models.decoder import DecoderConfig
from mammut.weights.files.tensor_file import TensorSpec
from mammut.weights.tables import (
    Entry,
    Joined,
    Kernel,
    Layout,
    Same,
    Shape,
    Table,
    Transposed,
    linear_entries,
    norm_entries,
)

_QKV = "query", "key", "value"
_OURS = "text.layers"
_HEADS = "lm_head.weight", "embed_out.weight"
_MASK = "a causal mask, which is no parameter"
_ANGLES = "rotary angles, which are no parameters"


@dataclasses.dataclass(frozen=True)
class HeadByHead:
    """A layout in which each head has its query, key and value.

    The first head comes first, then the second, and so on. A weight [N * 3 * K, D] holds three
    kernels [D, N, K], a bias [N * 3 * K] three biases [N, K].
    """

    def shape(self, ours: Sequence[Shape]) -> Shape:
        """Returns the shape of a weight or a bias.

        It is [N * 3 * K, D] or [N * 3 * K].
        """
        return len(ours) * math.prod(ours[0][-2:]), *ours[0][:-2]

    def load(self, theirs: np.ndarray, ours: Sequence[Shape], index: int) -> np.ndarray:
        """Loads the query, key or value of every head."""
        heads, size = ours[index][-2:]
        part = theirs.reshape(heads, len(ours), size, -1)[:, index]
        return np.moveaxis(part, -1, 0).reshape(ours[index])

    def save(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Joins query, key and value head by head."""
        shapes = [array.shape for array in ours]
        heads = [np.moveaxis(array.reshape(-1, *array.shape[-2:]), 0, -1) for array in ours]
        return np.stack(heads, axis=1).reshape(self.shape(shapes))


def table(model_type: str, text: DecoderConfig, theirs: Mapping[str, TensorSpec]) -> Table:
    """Makes the table for a model and for the file's tensors.

    The tensors show what depends on the writer of the file: whether names have the prefix of a
    model with a head, the name of the head, whether a tied head is stored as well, and which
    tensors are no parameters.

    Args:
      model_type: the key of config.json.
      text: the decoder.
      theirs: the tensors of the file.
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


def _fused(
    theirs: str, layer: int, weight: Layout, vector: Layout, *, bias: bool = True
) -> Iterable[Entry]:
    """Lists the entries of query, key and value as one map."""
    kernels, biases = (
        tuple(f"text.layers.attn.{name}.{leaf}" for name in _QKV) for leaf in ("kernel", "bias")
    )
    yield Entry(f"{theirs}.weight", kernels, weight, layer)
    if bias:
        yield Entry(f"{theirs}.bias", biases, vector, layer)


# The entries; and the tensors that files may hold beside parameters, each with the reason.
_Made = tuple[list[Entry], dict[str, str]]


def _gpt2(prefix: str, text: DecoderConfig) -> _Made:
    entries = _ends(prefix, "wte", "ln_f")
    buffers = {}
    entries.append(Entry(f"{prefix}wpe.weight", ("text.pos_embed",)))
    for i in range(text.depth):
        block = f"{prefix}h.{i}"
        entries += norm_entries(f"{block}.ln_1", f"{_OURS}.attn_norm", i)
        entries += _fused(
            f"{block}.attn.c_attn", i, Joined(Kernel(), axis=1), Joined(Same(flat=True))
        )
        entries += linear_entries(f"{block}.attn.c_proj", f"{_OURS}.attn.out", i, Kernel(2))
        entries += norm_entries(f"{block}.ln_2", f"{_OURS}.mlp_norm", i)
        entries += linear_entries(f"{block}.mlp.c_fc", f"{_OURS}.mlp.up", i, Kernel())
        entries += linear_entries(f"{block}.mlp.c_proj", f"{_OURS}.mlp.down", i, Kernel())
        buffers |= {f"{block}.attn.{name}": _MASK for name in ("bias", "masked_bias")}
    return entries, buffers


def _gpt_neo(prefix: str, text: DecoderConfig) -> _Made:
    entries = _ends(prefix, "wte", "ln_f")
    buffers = {}
    entries.append(Entry(f"{prefix}wpe.weight", ("text.pos_embed",)))
    for i in range(text.depth):
        block = f"{prefix}h.{i}"
        attention = f"{block}.attn.attention"
        entries += norm_entries(f"{block}.ln_1", f"{_OURS}.attn_norm", i)
        for name in _QKV:
            entries += linear_entries(
                f"{attention}.{name[0]}_proj", f"{_OURS}.attn.{name}", i, bias=False
            )
        entries += linear_entries(f"{attention}.out_proj", f"{_OURS}.attn.out", i, Transposed(2))
        entries += norm_entries(f"{block}.ln_2", f"{_OURS}.mlp_norm", i)
        entries += linear_entries(f"{block}.mlp.c_fc", f"{_OURS}.mlp.up", i)
        entries += linear_entries(f"{block}.mlp.c_proj", f"{_OURS}.mlp.down", i)
        buffers |= {f"{attention}.{name}": _MASK for name in ("bias", "masked_bias")}
    return entries, buffers


def _gptj(prefix: str, text: DecoderConfig) -> _Made:
    entries = _ends(prefix, "wte", "ln_f")
    buffers = {}
    for i in range(text.depth):
        block = f"{prefix}h.{i}"
        entries += norm_entries(f"{block}.ln_1", f"{_OURS}.attn_norm", i)
        for name in _QKV:
            entries += linear_entries(
                f"{block}.attn.{name[0]}_proj", f"{_OURS}.attn.{name}", i, bias=False
            )
        entries += linear_entries(
            f"{block}.attn.out_proj", f"{_OURS}.attn.out", i, Transposed(2), bias=False
        )
        entries += linear_entries(f"{block}.mlp.fc_in", f"{_OURS}.mlp.up", i)
        entries += linear_entries(f"{block}.mlp.fc_out", f"{_OURS}.mlp.down", i)
        buffers |= {f"{block}.attn.{name}": _MASK for name in ("bias", "masked_bias")}
        buffers[f"{block}.attn.embed_positions"] = _ANGLES
    return entries, buffers


def _gpt_neox(prefix: str, text: DecoderConfig) -> _Made:
    entries = _ends(prefix, "embed_in", "final_layer_norm")
    buffers = {f"{prefix}rotary_emb.inv_freq": _ANGLES}
    for i in range(text.depth):
        block = f"{prefix}layers.{i}"
        entries += norm_entries(f"{block}.input_layernorm", f"{_OURS}.attn_norm", i)
        entries += norm_entries(f"{block}.post_attention_layernorm", f"{_OURS}.mlp_norm", i)
        fused = f"{block}.attention.query_key_value"
        entries += _fused(fused, i, HeadByHead(), HeadByHead(), bias=text.attn_bias)
        entries += linear_entries(
            f"{block}.attention.dense", f"{_OURS}.attn.out", i, Transposed(2), bias=text.attn_bias
        )
        entries += linear_entries(f"{block}.mlp.dense_h_to_4h", f"{_OURS}.mlp.up", i)
        entries += linear_entries(f"{block}.mlp.dense_4h_to_h", f"{_OURS}.mlp.down", i)
        buffers |= {f"{block}.attention.{name}": _MASK for name in ("bias", "masked_bias")}
        buffers[f"{block}.attention.rotary_emb.inv_freq"] = _ANGLES
    return entries, buffers


def _ends(prefix: str, embedding: str, norm: str) -> list[Entry]:
    """Lists the entries of the embedding and of the last norm."""
    return [
        Entry(f"{prefix}{embedding}.weight", ("text.token_embed.embedding",)),
        *norm_entries(f"{prefix}{norm}", "text.norm"),
    ]


# For each `model_type`: the beginning of names in a model with a head, and a function that makes
# the table without the head.
_TABLES: dict[str, tuple[str, Callable[[str, DecoderConfig], _Made]]] = {
    "gpt2": ("transformer.", _gpt2),
    "gpt_neo": ("transformer.", _gpt_neo),
    "gptj": ("transformer.", _gptj),
    "gpt_neox": ("gpt_neox.", _gpt_neox),
}
