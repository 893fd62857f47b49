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
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh

from mammut.core import distributed
from mammut.core.fields import to_dict
from mammut.core.files import make_manifest, read_json_object, replacing, write_json
from mammut.core.params import by_name
from mammut.core.sharding import MESH_AXES, param_shardings
from mammut.data.processor import Processor
from mammut.data.tokenizer import MissingTokenizer, Tokenizer
from mammut.models.decoder import TextDecoder
from mammut.models.mammut import MaMMUT, ModelConfig, logical_axes
from mammut.weights.files.tensor_file import SUFFIXES, CheckpointError, write_sharded
from mammut.weights.formats import (
    big_vision,
    huggingface,
    magma,
    mammut_folder,
    mammut_run,
    open_clip,
    resnets,
)
from mammut.weights.formats.open_clip_folder import CONFIG_FILE
from mammut.weights.model_card import write_card
from mammut.weights.opened import (
    LazyTensors,
    OpenedModel,
    host_tensors,
    require_target,
)
from mammut.weights.resample import at_image_size

_WEIGHT_FILES = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
MAX_SHARD_BYTES = 4 * 2**30


@runtime_checkable
class Format(Protocol):
    """What a module of `FORMATS` has.

    Attributes:
      KIND: what it opens, in words that fit behind "no", for the error about any other path.
    """

    KIND: str

    def recognises(self, path: pathlib.Path) -> bool:
        """Whether the file or folder is of this format, by its names and headers.

        Raises:
          CheckpointError: it is of this format or of one like it, and damaged.
        """

    def open_model(self, path: pathlib.Path, *, image_size: int | None = None) -> OpenedModel:
        """The model in it, with nothing but headers read; `image_size` where the files lack it.

        Raises:
          CheckpointError: it is damaged, or no model that mammut has. Every mismatch is named.
        """


# The formats that `load` reads, one module each. No file or folder is of two of them.
FORMATS: tuple[Format, ...] = (
    mammut_folder,
    mammut_run,
    big_vision,
    open_clip,
    resnets,
    magma,
    huggingface,
)


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
    opened = OpenedModel(model.config, _tensors_of(model), processor, "the model")
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
            mammut_folder.WEIGHTS_STEM,
            specs,
            read,
            max_bytes=max_shard_bytes,
            metadata={"format": "mammut"},
            progress=progress,
        )
        write_json(
            new / "config.json",
            {"format": "mammut", "version": mammut_folder.VERSION, "model": to_dict(opened.config)},
        )
        write_json(new / "manifest.json", make_manifest(new, [new / name for name in files]))
    write_card(folder, opened.config, opened.processor)
    tokenizer = opened.processor.tokenizer
    return (tokenizer.problem,) if isinstance(tokenizer, MissingTokenizer) else ()


def load(
    path: str | os.PathLike, *, mesh: Mesh | None = None, image_size: int | None = None
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
    return place(opened, mesh), opened.processor


def load_language_model(
    path: str | os.PathLike, *, mesh: Mesh | None = None
) -> tuple[TextDecoder, Tokenizer]:
    """A text decoder and its tokenizer: a GPT-2, GPT-Neo, GPT-J or GPT-NeoX (Pythia) folder of Hugging Face.

    Of a whole model, such as `load` reads, it is that model's decoder.

    Args:
      path: the folder.
      mesh: as for `load`.

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
    return place(opened, mesh, part="text"), opened.processor.tokenizer


def open_model(path: str | os.PathLike, *, image_size: int | None = None) -> OpenedModel:
    """What `load` loads, with nothing but headers read; or a part of a model.

    Args:
      path: as for `load`; or a folder or file that holds an image encoder or a text decoder alone.
      image_size: pixels, for a file that does not tell them: a model of big_vision with computed
        positions. All others ignore it.

    Raises:
      CheckpointError: as for `load`.
    """
    path = pathlib.Path(path)
    for row in FORMATS:
        if row.recognises(path):
            return row.open_model(path, image_size=image_size)
    raise CheckpointError(_why_none(path))


def _why_none(path: pathlib.Path) -> str:
    """Why no format recognises `path`, in a sentence."""
    if not os.path.exists(path):
        return f"there is no {path}: expected a folder or a file on this machine, nothing is downloaded"
    if path.is_dir():
        names = sorted(item.name for item in path.iterdir())
        # an .npz tells itself, and is given by its own path
        weights = [name for name in names if name.endswith(SUFFIXES) and not name.endswith(".npz")]
        if weights:
            return f"{path} holds {weights[0]} and no {CONFIG_FILE}, which says what model it is of"
    return f"{path} is {', '.join(f'no {row.KIND}' for row in FORMATS)}"


def place(
    opened: OpenedModel, mesh: Mesh | None = None, part: str | None = None
) -> MaMMUT | TextDecoder:
    """The model, or the `part` of it with that name, with its parameters on `mesh`, or on the default device.

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
    abstract = nnx.eval_shape(lambda: MaMMUT(opened.config, rngs=nnx.Rngs(0)))
    abstract, prefix = (abstract, "") if part is None else (getattr(abstract, part), f"{part}.")
    graphdef, state = nnx.split(abstract)
    state = nnx.to_pure_dict(state)
    shardings = mesh and param_shardings(state, logical_axes(abstract), mesh)

    def put(path, leaf, sharding=None):
        array = opened.tensors.read(prefix + ".".join(entry.key for entry in path))
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
    config = path / mammut_folder.CONFIG_FILE
    if os.path.exists(config) and "format" in read_json_object(config):
        return mammut_folder.read_model_config(path)
    if os.path.exists(path / mammut_run.RUN_FILE):
        return mammut_run.read_model_config(path)
    return open_model(path).config


def _tensors_of(model: MaMMUT) -> LazyTensors:
    return LazyTensors(*host_tensors(by_name(nnx.to_pure_dict(nnx.state(model, nnx.Param)))))
