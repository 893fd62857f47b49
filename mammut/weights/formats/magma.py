"""MAGMA's checkpoint (arXiv 2112.05253), as published or its tensors alone.

The published file is DeepSpeed's mp_rank_00_model_states.pt. Names are those of its public code,
Aleph-Alpha-Research/magma; of a layer i, `h.i` stands for `lm.transformer.h.i`:

    lm.transformer.wte.weight                  GPT-J, by the names of GPT-Neo
    lm.transformer.ln_f.weight
    lm.lm_head.weight
    h.i.attn.attention.q_proj.weight           a layer without adapters
    h.i.mlp.c_fc.weight
    h.i.attn.attn_block.attention.q_proj.weight    attention with a sequential adapter behind it
    h.i.attn.adapter.0.weight
    h.i.mlp.0.c_fc.weight                      an MLP with a sequential adapter behind it
    h.i.mlp.1.adapter.0.weight
    h.i.mlp.module.c_fc.weight                 either of them with a parallel adapter beside it,
    h.i.mlp.adapter.0.weight                   with a factor where the adapter is scaled
    h.i.mlp.adapter_scale
    image_prefix.enc.conv1.weight              CLIP's ResNet, the projection and its norm
    image_prefix.proj.weight
    image_prefix.ln.weight
    word_embedding.weight                      embedding and layers, by a second name
    transformer.i.ln_1.weight

The sizes are read from the shapes. Numbers that the shapes do not give are taken from GPT-J 6B and
the published training.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping

import numpy as np

from mammut.data.images import ImageTransform
from mammut.data.processor import Processor
from mammut.models.adapter_modules import AdapterConfig
from mammut.models.decoder import DecoderConfig
from mammut.models.mammut import ModelConfig
from mammut.models.resnet import ResNetConfig
from mammut.weights.files.tensor_file import (
    CheckpointError,
    TensorSpec,
    open_tensors,
    stored_specs,
)
from mammut.weights.formats.huggingface_tokenizer import open_tokenizer
from mammut.weights.formats.resnets import clip_entries, stages
from mammut.weights.opened import LazyTensors, OpenedModel, Tensors, model_specs
from mammut.weights.tables import (
    Entry,
    Reshaped,
    Shape,
    Table,
    Transposed,
    linear_entries,
    norm_entries,
    unused_notes,
)

KIND = "file of MAGMA's weights"
_BLOCKS = "lm.transformer.h."
_TOWER = "image_prefix.enc."
_SECOND_NAMES = {"word_embedding.": "lm.transformer.wte.", "transformer.": _BLOCKS}
# Image size in pixels by the width of the stem, for CLIP's RN50x16 and RN50x4. Other ResNets have
# 224.
_IMAGE_SIZES = {96: 384, 80: 288}
# The names of an attention or MLP that has an adapter: first its own, then its adapter's.
_WRAPPED = {
    "mlp": {"sequential": ("mlp.0", "mlp.1.adapter"), "parallel": ("mlp.module", "mlp.adapter")},
    "attn": {
        "sequential": ("attn.attn_block", "attn.adapter"),
        "parallel": ("attn.module", "attn.adapter"),
    },
}
_NOT_LEARNED = {
    "attention.bias": "a causal mask, which is no parameter",
    "attention.masked_bias": "a causal mask, which is no parameter",
    "attention.sin": "rotary angles, which are no parameters",
    "attention.cos": "rotary angles, which are no parameters",
    "num_batches_tracked": "how many batches its statistics are of",
}


@dataclasses.dataclass(frozen=True)
class _Site:
    """The attention or the MLP of every layer.

    It includes the adapter if there is one.
    """

    inner: str  # beginning of the module's names
    adapter: str | None = None  # beginning of the adapter's names
    kind: str | None = None  # the kind of the adapter, as in `AdapterConfig`
    norm: bool = False  # whether the adapter begins with a norm

    @property
    def maps(self) -> tuple[str, str]:
        """The names of the adapter's two linear maps.

        They are children of a torch.nn.Sequential, with a norm before and a ReLU between them.
        """
        return f"{self.adapter}.{int(self.norm)}", f"{self.adapter}.{2 + self.norm}"


def recognises(path: pathlib.Path) -> bool:
    """Whether `path` is a file with a MAGMA model.

    The file has the language model and the image prefix.

    Raises:
      CheckpointError: the file is damaged.
    """
    specs = stored_specs(path)
    has_text = any(name.startswith("lm.transformer.") for name in specs)
    has_image = any(name.startswith("image_prefix.") for name in specs)
    return has_text and has_image


def open_model(path: pathlib.Path, *, image_size: int | None = None) -> OpenedModel:
    """Opens the whole model, with its processor.

    It calls `open_magma` for a file.

    Args:
      path: for which `recognises` holds. A tokenizer may lie beside it.
      image_size: not used: the image encoder determines it.

    Raises:
      CheckpointError: as for `open_magma`.
    """
    return open_magma(open_tensors(path), path.parent, str(path))


def open_magma(
    theirs: Tensors,
    folder: pathlib.Path,
    where: str,
    *,
    num_heads: int = 16,
    rope_dims: int = 64,
    max_length: int = 2048,
) -> OpenedModel:
    """Opens the whole model with its processor.

    Only the headers of the weights are read. Reading a tensor that has two names raises
    CheckpointError where their values differ.

    Args:
      theirs: the tensors of the file.
      folder: the folder that may hold GPT-2's tokenizer.json, or its vocab.json and merges.txt.
      where: the file, for errors.
      num_heads: heads of a layer. The tensors do not give this number and the next two; the
      defaults are GPT-J's.
      rope_dims: the numbers of a head that are rotated by their position.
      max_length: the positions of image and text together.

    Raises:
      CheckpointError: the tensors are not those of one such model, or the tokenizer does not fit
      them. Every mismatch is named.
    """
    config, sites = _config(
        theirs.specs, where, num_heads=num_heads, rope_dims=rope_dims, max_length=max_length
    )
    second = _second_names(theirs.specs)
    unused = _not_learned(theirs.specs)
    unused |= dict.fromkeys(second.values(), "a second name of a tensor that is used")
    constant = dict.fromkeys(("logit_scale", "logit_bias"), (0.0, "there is no contrastive pass"))
    rules = Table(list(_entries(config, sites)), unused, constant)
    tensors = rules.to_ours(_compared(theirs, second, where), model_specs(config), where)
    vocab_size = config.text.vocab_size - 1  # the last id is <|image|>, which no text has
    special_ids = {f"{role}_token_id": vocab_size - 1 for role in ("bos", "eos", "pad")}
    try:
        tokenizer = open_tokenizer(folder, special_ids, vocab_size)
        transform = ImageTransform(config.vision.image_size, "shortest")
        processor = Processor(tokenizer, transform, config.text_length)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    notes = [f"{name} is {value}: {reason}" for name, (value, reason) in rules.constant.items()]
    return OpenedModel(
        config, tensors, processor, where, notes=(*unused_notes(rules.unused), *notes)
    )


def _config(
    specs: Mapping[str, TensorSpec], where: str, **text_fields: int
) -> tuple[ModelConfig, dict[str, _Site]]:
    """Makes the config from the shapes, and finds the adapters' sites.

    The table checks later, tensor by tensor, that the shapes fit each other. `text_fields` are
    the settings that no shape gives.
    """

    def shape(name: str, axes: int) -> Shape:
        if name not in specs:
            raise CheckpointError(
                f"{where} has no {name}, which gives a size of a MAGMA with CLIP's ResNet"
            )
        if len(specs[name].shape) != axes or 0 in specs[name].shape:
            raise CheckpointError(
                f"{where}: {name} is {list(specs[name].shape)}, expected {axes} axes, none empty"
            )
        return tuple(specs[name].shape)

    vocab_size, width = shape("lm.transformer.wte.weight", 2)
    layers = {
        match[1] for match in map(re.compile(rf"{re.escape(_BLOCKS)}(\d+)\.").match, specs) if match
    }
    sites = {site: _site(specs, site) for site in _WRAPPED}
    adapters: dict[AdapterConfig, list[str]] = {}
    stem = shape(f"{_TOWER}conv3.weight", 4)[0]
    try:
        for name, site in sites.items():
            if site.kind is not None:
                hidden = shape(f"{_BLOCKS}0.{site.maps[0]}.weight", 2)[0]
                adapter = AdapterConfig(kind=site.kind, reduction=width // hidden, norm=site.norm)
                adapters.setdefault(adapter, []).append(f"text.layers.{name}")
        vision = ResNetConfig(
            stem_width=stem,
            stages=stages(specs, rf"{re.escape(_TOWER)}layer(\d+)\.(\d+)\.", where),
            image_size=_IMAGE_SIZES.get(stem, 224),
        )
        text = DecoderConfig(
            width=width,
            depth=len(layers),
            mlp_dim=shape(f"{_BLOCKS}0.{sites['mlp'].inner}.c_fc.weight", 2)[0],
            norm_eps=1e-5,
            attn_bias=False,
            layout="parallel",
            vocab_size=vocab_size,
            cross_attn_every=0,
            positions="rope",
            tie_embeddings=False,
            vocab_bias=True,
            pooling="none",
            **text_fields,
        )
        config = ModelConfig(
            vision=vision,
            text=text,
            image_projection="decoder",
            prefix_norm="image_prefix.ln.weight" in specs,
            adapters=tuple(
                dataclasses.replace(adapter, sites=tuple(at)) for adapter, at in adapters.items()
            ),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(
            f"{where} describes a model that mammut does not have: {error}"
        ) from error
    return config, sites


def _site(specs: Mapping[str, TensorSpec], site: str) -> _Site:
    """Reads the site "mlp" or "attn".

    It is recognised by the names of the first layer.
    """
    for kind, (inner, adapter) in _WRAPPED[site].items():
        if any(name.startswith(f"{_BLOCKS}0.{inner}.") for name in specs):
            if f"{_BLOCKS}0.{site}.adapter_scale" in specs:
                kind = f"scaled_{kind}"
            # Without a norm, the second child of the adapter is a ReLU, which has no weight.
            norm = f"{_BLOCKS}0.{adapter}.1.weight" in specs
            return _Site(inner, adapter, kind, norm)
    return _Site(site)


def _not_learned(specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Lists the tensors that are not parameters, with the reasons."""
    return {
        name: why for name in specs for end, why in _NOT_LEARNED.items() if name.endswith(f".{end}")
    }


def _second_names(specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Lists the second name of each tensor that has two.

    The first name is the key.
    """
    second = {}
    for name, spec in specs.items():
        for start, first in _SECOND_NAMES.items():
            original = first + name.removeprefix(start)
            if name.startswith(start) and specs.get(original) == spec:
                second[original] = name
    return second


def _compared(theirs: Tensors, second: Mapping[str, str], where: str) -> LazyTensors:
    """Adds a check of second names to `theirs`.

    Reading a tensor whose second name holds other numbers raises CheckpointError.
    """

    def read(name: str) -> np.ndarray:
        tensor = theirs.read(name)
        if name in second:
            other = theirs.read(second[name])
            # Where PyTorch saved both, they are the same bytes of the file and need not be read.
            same_bytes = tensor.__array_interface__ == other.__array_interface__
            if not same_bytes and tensor.tobytes() != other.tobytes():
                raise CheckpointError(
                    f"{where}: {name} and {second[name]} differ, expected one tensor by two names"
                )
        return tensor

    return LazyTensors(theirs.specs, read)


def _entries(config: ModelConfig, sites: Mapping[str, _Site]) -> Iterable[Entry]:
    yield from clip_entries(config.vision, _TOWER)
    yield from linear_entries("image_prefix.proj", "image_projection")
    if config.prefix_norm:
        yield from norm_entries("image_prefix.ln", "prefix_norm")
    yield Entry("lm.transformer.wte.weight", ("text.token_embed.embedding",))
    yield from norm_entries("lm.transformer.ln_f", "text.norm")
    yield Entry("lm.lm_head.weight", ("text.vocab_head.kernel",), Transposed())
    yield Entry("lm.lm_head.bias", ("text.vocab_head_bias",))
    for i in range(config.text.depth):
        block = f"{_BLOCKS}{i}"
        attention = f"{block}.{sites['attn'].inner}.attention"
        mlp = f"{block}.{sites['mlp'].inner}"
        yield from norm_entries(f"{block}.ln_1", "text.layers.attn_norm", i)
        for name in ("query", "key", "value"):
            yield from linear_entries(
                f"{attention}.{name[0]}_proj", f"text.layers.attn.{name}", i, bias=False
            )
        yield from linear_entries(
            f"{attention}.out_proj", "text.layers.attn.out", i, Transposed(2), bias=False
        )
        yield from linear_entries(f"{mlp}.c_fc", "text.layers.mlp.up", i)
        yield from linear_entries(f"{mlp}.c_proj", "text.layers.mlp.down", i)
        for name, site in sites.items():
            if site.kind is not None:
                yield from _adapter(block, name, site, i)


def _adapter(block: str, name: str, site: _Site, layer: int) -> Iterable[Entry]:
    ours = f"adapters.{AdapterConfig.name}.text/layers/{name}"
    if site.norm:
        yield from norm_entries(f"{block}.{site.adapter}.0", f"{ours}.norm", layer)
    for theirs, part in zip(site.maps, ("down", "up")):
        yield from linear_entries(f"{block}.{theirs}", f"{ours}.{part}", layer)
    if site.kind == "scaled_parallel":
        yield Entry(f"{block}.{name}.adapter_scale", (f"{ours}.scale",), Reshaped((1,)), layer)
