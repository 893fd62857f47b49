"""Models as files: `save`, `load`, and what other people's formats become on the way in.

A model folder (docs/model_folder.md) is what `save` writes:

    config.json         format, version and the `ModelConfig`
    model.safetensors   the parameters, named by their path in the model; or shards of it and their index
    processor.json ...  the processor with its tokenizer files
    manifest.json       size and SHA-256 of every file above, checked by `load`
    README.md           the model card

`load` reads such a folder, a run, and the formats of `mammut.interop`. Nothing but headers is read
until all fits; then parameter after parameter goes to its place on the mesh, so that no second copy
of the model is ever held.
"""

import os
import pathlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh

from mammut.core import distributed
from mammut.core.fields import to_dict
from mammut.core.files import check_manifest, make_manifest, read_json_object, replacing, write_json
from mammut.core.mapped_file import MAX_HEADER
from mammut.core.params import by_name, logical_axes
from mammut.core.sharding import MESH_AXES, param_shardings
from mammut.data.processor import Processor
from mammut.data.tokenizer import MissingTokenizer, Tokenizer
from mammut.models.compute import ComputeConfig
from mammut.models.decoder import TextDecoder
from mammut.models.mammut import MaMMUT, ModelConfig
from mammut.weights.checkpoints import Checkpoints
from mammut.weights.files.tensor_file import (
    CheckpointError,
    TensorSpec,
    open_tensors,
    write_sharded,
)
from mammut.weights.formats import big_vision, huggingface, open_clip, resnets
from mammut.weights.formats.open_clip_export import CONFIG_FILE
from mammut.weights.model_card import write_card
from mammut.weights.opened import (
    LazyTensors,
    OpenedModel,
    Tensors,
    host_tensors,
    mismatches,
    model_specs,
    read_model,
    require_target,
)
from mammut.weights.resample import at_image_size

_VERSION = 2
_WEIGHTS = "model"
_WEIGHT_FILES = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
MAX_SHARD_BYTES = 4 * 2**30


def save(
    folder: str | os.PathLike,
    model: MaMMUT,
    processor: Processor,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a model folder; weights of more than `max_shard_bytes` become several files.

    Of several processes, all call it, process 0 writes: parameters split over them are brought
    together one by one.

    Raises:
      ValueError: the folder holds a model already and `overwrite` is False, or one of open_clip; or
        the processor is of another model.
    """
    tensors = _tensors_of(model)
    opened = OpenedModel(model.config, tensors, processor, "the model", compute=model.compute)
    if not distributed.first():
        for name in opened.tensors.specs:  # in the order in which they are written
            opened.tensors.read(name)
        return
    save_opened(folder, opened, overwrite=overwrite, max_shard_bytes=max_shard_bytes)


def save_opened(
    folder: str | os.PathLike,
    opened: OpenedModel,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], None] | None = None,
) -> tuple[str, ...]:
    """`save` of a model that is still in its files: one tensor of it is held at a time.

    A folder that holds a model keeps it until all of the new one is written. `progress` is called
    with the bytes of each tensor written.

    Returns:
      What the folder is without, in sentences.

    Raises:
      ValueError: as for `save`; or `opened` is a part of a model, or read from `folder` itself.
    """
    folder = pathlib.Path(folder)
    files = (
        ["config.json", "processor.json", *opened.processor.tokenizer.files]
        if opened.processor
        else []
    )
    weights = sorted(path.name for path in folder.glob("*") if _WEIGHT_FILES.fullmatch(path.name))
    require_target(folder, opened, [*files, "manifest.json", *weights], [CONFIG_FILE], overwrite)
    specs, read = opened.tensors.specs, opened.tensors.read
    with replacing(folder, "manifest.json", stale=weights) as new:
        opened.processor.save(new)
        files += write_sharded(
            new,
            _WEIGHTS,
            specs,
            read,
            max_bytes=max_shard_bytes,
            metadata={"format": "mammut"},
            progress=progress,
        )
        write_json(
            new / "config.json",
            {
                "format": "mammut",
                "version": _VERSION,
                "model": to_dict(opened.config),
                "compute": to_dict(opened.compute),
            },
        )
        write_json(new / "manifest.json", make_manifest(new, [new / name for name in files]))
    write_card(folder, opened.config, opened.processor, opened.compute)
    tokenizer = opened.processor.tokenizer
    return (tokenizer.problem,) if isinstance(tokenizer, MissingTokenizer) else ()


def load(
    path: str | os.PathLike,
    *,
    mesh: Mesh | None = None,
    image_size: int | None = None,
    compute: ComputeConfig | None = None,
) -> tuple[MaMMUT, Processor]:
    """The model and its processor.

    Args:
      path: a model folder of ours; a run, for its newest good checkpoint; a folder or file of
        open_clip's MaMMUT and CoCa or of LAION's openMaMMUT; a SigLIP or CapPa `.npz` of
        big_vision; a checkpoint of MAGMA's code. `mammut.interop` says which. Parts of a model are
        refused: `load_language_model` reads the language models of Hugging Face.
      mesh: where the parameters go, split by `mammut.core.sharding.RULES`. None: one device.
      image_size: pixels; the position table is resampled to it, as the model's makers do. None: as
        it was trained.
      compute: how the model is computed, and the number types of its parameters. None: as the
        folder says, float32 for the models of others.

    Raises:
      CheckpointError: none of these is there, a file is damaged or missing, or the weights do not
        fit the config. Every mismatch is named.
      ValueError: `image_size` is no positive multiple of the patch size.
    """
    if image_size is not None and (type(image_size) is not int or image_size < 1):
        raise ValueError(
            f"image_size is {image_size!r}, expected a positive whole number of pixels"
        )
    opened = open_model(path, image_size=image_size)
    if opened.processor is None or set(opened.parts) != {"vision", "text", "rest"}:
        use = {
            ("vision",): "a run can start from it with --init-vision",
            (
                "text",
            ): "mammut.load_language_model reads it, and a run can start from it with --init-text",
        }
        raise CheckpointError(
            f"{opened.where} holds {' and '.join(opened.parts)} alone, expected a whole model: "
            f"{use.get(opened.parts, 'a run can start from it with --init')}"
        )
    if image_size is not None:
        opened = at_image_size(opened, image_size)
    return place(opened, mesh, compute=compute), opened.processor


def load_language_model(
    path: str | os.PathLike, *, mesh: Mesh | None = None, compute: ComputeConfig | None = None
) -> tuple[TextDecoder, Tokenizer]:
    """A text decoder and its tokenizer: a GPT-2, GPT-Neo, GPT-J or GPT-NeoX (Pythia) folder of Hugging Face.

    Of a whole model, such as `load` reads, it is that model's decoder.

    Args:
      path: the folder.
      mesh: as for `load`.
      compute: as for `load`.

    Raises:
      CheckpointError: as for `load`; or there is no text decoder.
    """
    opened = open_model(path)
    if "text" not in opened.parts:
        raise CheckpointError(
            f"{opened.where} holds {' and '.join(opened.parts)} alone, expected a text decoder"
        )
    if opened.processor is None:
        raise CheckpointError(
            f"{opened.where} says nothing of a tokenizer, expected one with the text decoder"
        )
    decoder = place(opened, mesh, part="text", compute=compute)
    return decoder, opened.processor.tokenizer


def open_model(path: str | os.PathLike, *, image_size: int | None = None) -> OpenedModel:
    """What `load` loads, with nothing but headers read.

    `image_size` is that of a model of big_vision whose positions are computed, which its file does
    not tell.

    Raises:
      CheckpointError: as for `load`.
    """
    path = pathlib.Path(path)
    if os.path.exists(path / "manifest.json"):
        return _open_model_folder(path)
    if os.path.isdir(path / "checkpoints"):
        return _open_run(path)
    if big_vision.is_big_vision(path):
        return big_vision.open_model(path, image_size=image_size)
    if open_clip.is_open_clip(path) or resnets.is_timm(path):
        return open_clip.open_model(path)
    if huggingface.is_huggingface(path):
        return huggingface.open_model(path)
    if not os.path.exists(path):
        raise CheckpointError(
            f"there is no {path}: expected a folder or a file on this machine, nothing is downloaded"
        )
    weights = (
        sorted(item.name for item in path.glob("*.*") if open_clip.is_open_clip(item))
        if path.is_dir()
        else []
    )
    if weights:
        raise CheckpointError(
            f"{path} holds {weights[0]} and no {CONFIG_FILE}, which says what model it is of"
        )
    raise CheckpointError(
        f"{path} is no model folder (no manifest.json), no run (no checkpoints), no folder with an "
        "open_clip_config.json or a config.json of a known model_type, and no .npz, .pt or .safetensors file"
    )


def place(
    opened: OpenedModel,
    mesh: Mesh | None = None,
    part: str | None = None,
    compute: ComputeConfig | None = None,
) -> MaMMUT | TextDecoder:
    """Reads the model, or the `part` of it with that name, onto `mesh` or the default device.

    `compute` is how it is computed; None: as the opened model says.

    Raises:
      ValueError: the mesh has other axes than those of `mammut.core.sharding.make_mesh`, or other
        than automatic ones.
    """
    if mesh is not None and (
        set(mesh.axis_names) - set(MESH_AXES) or set(mesh.axis_types) != {AxisType.Auto}
    ):
        raise ValueError(
            f"the mesh has the axes {mesh.axis_names} of {', '.join(map(str, mesh.axis_types))}, expected automatic "
            f"axes among {MESH_AXES}: mammut.core.sharding.make_mesh makes one"
        )
    compute = compute or opened.compute

    def make() -> MaMMUT:
        return MaMMUT(opened.config, compute=compute, rngs=nnx.Rngs(0))

    abstract, prefix = nnx.eval_shape(make), ""
    if part is not None:
        abstract, prefix = getattr(abstract, part), f"{part}."
    graphdef, state = nnx.split(abstract)
    state = nnx.to_pure_dict(state)
    shardings = mesh and param_shardings(state, logical_axes(abstract), mesh)

    def put(path, leaf, sharding=None):
        array = opened.tensors.read(prefix + ".".join(entry.key for entry in path))
        # A copy of what is mapped: an array on the CPU may share its memory, and files change.
        array = array if array.flags.writeable else np.array(array)
        array = array.astype(leaf.dtype, copy=False)
        if sharding is None:
            return jax.device_put(array)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: array[index])

    trees = (state,) if shardings is None else (state, shardings)
    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(put, *trees))


def read_model_config(path: str | os.PathLike) -> ModelConfig:
    """The architecture of a model folder, of a run or of a foreign model, without its weights.

    Raises:
      CheckpointError: the path is none of these.
    """
    path = pathlib.Path(path)
    if os.path.exists(path / "config.json") and not (
        huggingface.is_huggingface(path) or resnets.is_timm(path)
    ):
        return _model_config(path / "config.json")[0]
    if os.path.exists(path / "run.json"):
        return _run_model_config(path)[0]
    return open_model(path).config


def _open_model_folder(folder: pathlib.Path) -> OpenedModel:
    if problems := check_manifest(folder, folder / "manifest.json"):
        raise CheckpointError(f"{folder} is damaged: {'; '.join(problems)}")
    config, compute, without_norm_bias = _model_config(folder / "config.json")
    index = folder / f"{_WEIGHTS}.safetensors.index.json"
    weights = index if index.exists() else folder / f"{_WEIGHTS}.safetensors"
    tensors, processor = open_tensors(weights), _processor(folder)
    opened = {"config.json", "processor.json", *processor.tokenizer.files, weights.name}
    if weights == index:
        opened |= set(read_json_object(index, MAX_HEADER)["weight_map"].values())
    if unlisted := sorted(opened - read_json_object(folder / "manifest.json", MAX_HEADER).keys()):
        raise CheckpointError(f"{folder / 'manifest.json'} does not list {', '.join(unlisted)}")
    if without_norm_bias:
        tensors = _with_norm_biases(tensors, model_specs(config, compute), without_norm_bias)
    _require_fit(config, compute, tensors.specs, str(weights))
    return OpenedModel(config, tensors, processor, str(folder), compute=compute)


def _open_run(folder: pathlib.Path) -> OpenedModel:
    config, compute, without_norm_bias = _run_model_config(folder)
    with Checkpoints(folder, keep=None) as checkpoints:
        arrays = checkpoints.restore_params()
    specs = {name: TensorSpec(array.shape, array.dtype) for name, array in arrays.items()}
    tensors = LazyTensors(specs, arrays.__getitem__)
    if without_norm_bias:
        tensors = _with_norm_biases(tensors, model_specs(config, compute), without_norm_bias)
    _require_fit(config, compute, tensors.specs, str(folder / "checkpoints"))
    return OpenedModel(config, tensors, _processor(folder), str(folder), compute=compute)


def _with_norm_biases(
    tensors: Tensors, expected: Mapping[str, TensorSpec], towers: Collection[str]
) -> LazyTensors:
    """Adds biases of zero to the layer norms of `towers`, which version 0.1 could leave out."""
    zero = {
        path: spec
        for path, spec in expected.items()
        if path not in tensors.specs and path.endswith("norm.bias") and path.split(".")[0] in towers
    }

    def read(path: str) -> np.ndarray:
        if path in zero:
            return np.zeros(zero[path].shape, zero[path].dtype)
        return tensors.read(path)

    return LazyTensors({**tensors.specs, **zero}, read)


def _require_fit(config: ModelConfig, compute: ComputeConfig, specs: Any, where: str) -> None:
    """Reports every key that is missing, left over, misshapen or of another type."""
    expected = model_specs(config, compute)
    if problems := mismatches(specs, expected, "is not a parameter of the model"):
        raise CheckpointError(f"{where} does not fit its config: {'; '.join(problems)}")


def _model_config(path: pathlib.Path) -> tuple[ModelConfig, ComputeConfig, tuple[str, ...]]:
    config = read_json_object(path)
    if config.get("format") != "mammut" or config.get("version") not in (1, _VERSION):
        raise CheckpointError(
            f"{path} has format {config.get('format')!r} version {config.get('version')!r}, "
            f"expected 'mammut' version {_VERSION}"
        )
    return read_model(config, path)


def _run_model_config(
    folder: pathlib.Path,
) -> tuple[ModelConfig, ComputeConfig, tuple[str, ...]]:
    """Reads the model of a run's config, and nothing else of it."""
    path = folder / "run.json"
    config = read_json_object(path).get("config")
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{path} is not a run's config, expected the key config with an object"
        )
    return read_model(config, path)


def _processor(folder: pathlib.Path) -> Processor:
    try:
        return Processor.load(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _tensors_of(model: MaMMUT) -> LazyTensors:
    return LazyTensors(*host_tensors(by_name(nnx.to_pure_dict(nnx.state(model, nnx.Param)))))
