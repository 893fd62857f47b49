"""Models as files: `save`, `load`, and what other people's formats become on the way in.

A model folder (docs/model_folder.md) is what `save` writes:

    config.json         format, version and the `ModelConfig`
    model.safetensors   the parameters, named by their path in the model; or shards of it and their index
    processor.json ...  the processor with its tokenizer files
    manifest.json       size and SHA-256 of every file above, checked by `load`
    README.md           the model card

`load` reads such a folder, a run, and the formats of `mammut.interop`. Nothing but headers is read until all fits; then
parameter after parameter goes to its place on the mesh, so that no second copy of the model is ever held.
"""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mammut import checkpoint
from mammut.config import ModelConfig, to_dict
from mammut.interop import big_vision_weights, open_clip
from mammut.interop.rules import LazyTensors, OpenedModel, model_specs
from mammut.manifest import check_manifest, make_manifest, read_json_object, write_json
from mammut.model import MaMMUT, logical_axes
from mammut.model_card import write_card
from mammut.processor import Processor
from mammut.sharding import param_shardings
from mammut.tensor_files import CheckpointError, TensorSpec, open_tensors, write_sharded
from mammut.warm_start import at_image_size

_VERSION = 1
_WEIGHTS = "model"
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

    Raises:
      ValueError: the folder holds a model already and `overwrite` is False, or the processor has no vocabulary to save.
    """
    opened = OpenedModel(model.config, _tensors_of(model), processor, "the model")
    save_opened(folder, opened, overwrite=overwrite, max_shard_bytes=max_shard_bytes)


def save_opened(
    folder: str | os.PathLike,
    opened: OpenedModel,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], None] | None = None,
) -> None:
    """`save` of a model that is still in its files: one tensor of it is held at a time.

    `progress` is called with the bytes of each tensor written.
    """
    folder = pathlib.Path(folder)
    if opened.processor is None or set(opened.parts) != {"vision", "text", "rest"}:
        raise ValueError(f"{opened.where} is {' and '.join(opened.parts)} without a processor, expected a whole model")
    files = ["config.json", "processor.json", *opened.processor.tokenizer.files]
    weights = sorted(path.name for path in folder.glob(f"{_WEIGHTS}*.safetensors*"))
    there = [name for name in (*files, "manifest.json") if (folder / name).exists()] + weights
    if there and not overwrite:
        raise ValueError(f"{folder} holds {there[0]} already: give a new folder, or overwrite=True")
    folder.mkdir(parents=True, exist_ok=True)
    # The manifest is removed first and written last: a folder with a manifest is complete.
    (folder / "manifest.json").unlink(missing_ok=True)
    for name in weights:
        (folder / name).unlink()
    opened.processor.save(folder)
    specs, read = opened.tensors.specs, opened.tensors.read
    files += write_sharded(
        folder, _WEIGHTS, specs, read, max_bytes=max_shard_bytes, metadata={"format": "mammut"}, progress=progress
    )
    write_json(folder / "config.json", {"format": "mammut", "version": _VERSION, "model": to_dict(opened.config)})
    write_json(folder / "manifest.json", make_manifest(folder, [folder / name for name in files]))
    write_card(folder, opened.config, opened.processor)


def load(
    path: str | os.PathLike, *, mesh: Mesh | None = None, image_size: int | None = None
) -> tuple[MaMMUT, Processor]:
    """The model and its processor.

    Args:
      path: a model folder of ours; a run, for its newest good checkpoint; a folder or file of open_clip's MaMMUT and
        CoCa or of LAION's openMaMMUT; a SigLIP or CapPa `.npz` of big_vision. `mammut.interop` says which.
      mesh: where the parameters go, split by `mammut.sharding.RULES`. None: one device.
      image_size: pixels; the position table is resampled to it, as the model's makers do. None: as it was trained.

    Raises:
      CheckpointError: none of these is there, a file is damaged or missing, or the weights do not fit the config. Every
        mismatch is named.
    """
    opened = open_model(path)
    if opened.processor is None or set(opened.parts) != {"vision", "text", "rest"}:
        raise CheckpointError(
            f"{opened.where} holds {' and '.join(opened.parts)} alone, expected a whole model: a run can start from it "
            "with --init-vision or --init-text"
        )
    if image_size is not None:
        opened = at_image_size(opened, image_size)
    return place(opened, mesh), opened.processor


def open_model(path: str | os.PathLike) -> OpenedModel:
    """What `load` loads, with nothing but headers read.

    Raises:
      CheckpointError: as for `load`.
    """
    path = pathlib.Path(path)
    if (path / "manifest.json").exists():
        return _open_model_folder(path)
    if (path / "checkpoints").is_dir():
        return _open_run(path)
    if big_vision_weights.is_big_vision(path):
        return big_vision_weights.open_model(path)
    if open_clip.is_open_clip(path):
        return open_clip.open_model(path)
    raise CheckpointError(
        f"{path} is no model folder (no manifest.json), no run (no checkpoints), no folder with an "
        "open_clip_config.json, and no .npz, .pt or .safetensors file"
    )


def place(opened: OpenedModel, mesh: Mesh | None = None) -> MaMMUT:
    """The model with its parameters on `mesh`, or on the default device."""
    abstract = nnx.eval_shape(lambda: MaMMUT(opened.config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    state = nnx.to_pure_dict(state)
    shardings = mesh and param_shardings(state, logical_axes(abstract), mesh)

    def put(path, leaf, sharding=None):
        array = opened.tensors.read(".".join(entry.key for entry in path))
        # A copy of what is mapped: an array on the CPU may share its memory, and files change.
        array = array if array.flags.writeable else np.array(array)
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
    if (path / "config.json").exists():
        return _model_config(path / "config.json")
    if (path / "run.json").exists():
        return checkpoint.read_run(path)[0].model
    return open_model(path).config


def _open_model_folder(folder: pathlib.Path) -> OpenedModel:
    if problems := check_manifest(folder, folder / "manifest.json"):
        raise CheckpointError(f"{folder} is damaged: {'; '.join(problems)}")
    config = _model_config(folder / "config.json")
    index = folder / f"{_WEIGHTS}.safetensors.index.json"
    weights = index if index.exists() else folder / f"{_WEIGHTS}.safetensors"
    tensors = open_tensors(weights)
    _require_fit(config, tensors.specs, str(weights))
    return OpenedModel(config, tensors, _processor(folder), str(folder))


def _open_run(folder: pathlib.Path) -> OpenedModel:
    config, _ = checkpoint.read_run(folder)
    with checkpoint.Checkpoints(folder, keep=config.keep_checkpoints) as checkpoints:
        arrays = _by_name(checkpoints.restore_params())
    specs = {name: TensorSpec(array.shape, array.dtype) for name, array in arrays.items()}
    _require_fit(config.model, specs, str(folder / "checkpoints"))
    return OpenedModel(config.model, LazyTensors(specs, arrays.__getitem__), _processor(folder), str(folder))


def _require_fit(config: ModelConfig, specs: Any, where: str) -> None:
    """Reports every key that is missing, left over, misshapen or of another type."""
    expected = model_specs(config)
    problems = [f"{name} is missing" for name in sorted(expected.keys() - specs.keys())]
    problems += [f"{name} is not a parameter of the model" for name in sorted(specs.keys() - expected.keys())]
    for name in sorted(expected.keys() & specs.keys()):
        want, got = expected[name], specs[name]
        if tuple(want.shape) != tuple(got.shape) or want.dtype != got.dtype:
            problems.append(f"{name} is {got.dtype}{list(got.shape)}, expected {want.dtype}{list(want.shape)}")
    if problems:
        raise CheckpointError(f"{where} does not fit its config: {'; '.join(problems)}")


def _model_config(path: pathlib.Path) -> ModelConfig:
    config = read_json_object(path)
    if config.get("format") != "mammut" or config.get("version") != _VERSION:
        raise CheckpointError(
            f"{path} has format {config.get('format')!r} version {config.get('version')!r}, "
            f"expected 'mammut' version {_VERSION}"
        )
    return checkpoint.read_config(ModelConfig, config.get("model"), path)


def _processor(folder: pathlib.Path) -> Processor:
    try:
        return Processor.load(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _tensors_of(model: MaMMUT) -> LazyTensors:
    arrays = _by_name(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    specs = {name: TensorSpec(array.shape, np.dtype(array.dtype)) for name, array in arrays.items()}
    return LazyTensors(specs, lambda name: np.asarray(arrays[name]))  # off their devices one by one


def _by_name(tree: Any) -> dict[str, Any]:
    return {
        ".".join(entry.key for entry in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
