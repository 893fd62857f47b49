"""Models as files: `save`, `load`, and the formats that `load` reads.

`save` writes a model folder (docs/model_folder.md):

    config.json         format, version, the `ModelConfig` and the `ComputeConfig`
    model.safetensors   the parameters by their path in the model; or its shards and their index
    processor.json ...  the processor with its tokenizer files
    manifest.json       size and SHA-256 of every file above, checked by `load`
    README.md           the model card

`load` reads such a folder, a run, and the foreign formats in `FORMATS`. Only headers are read until
everything fits. Then one parameter after the other goes to its devices, so that there is never a
second copy of the model.
"""

import os
import pathlib
import re
from collections.abc import Callable
from types import NoneType
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh

from mammut.core import distributed
from mammut.core.environment import require_arithmetic
from mammut.core.fields import require_kind, to_dict
from mammut.core.files import make_manifest, read_json_object, replacing, write_json
from mammut.core.params import by_name, logical_axes, path_name
from mammut.core.sharding import MESH_AXES, param_shardings
from mammut.data.processor import Processor
from mammut.data.tokenizer import MissingTokenizer, Tokenizer
from mammut.models.compute import ComputeConfig
from mammut.models.decoder import TextDecoder
from mammut.models.mammut import MaMMUT, ModelConfig
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
    """The interface of a module of `FORMATS`.

    Attributes:
      KIND: its kind of model, in words that fit behind "no", for the error about any other path.
    """

    KIND: str

    def recognises(self, path: pathlib.Path) -> bool:
        """Whether the file or folder is of this format.

        Names and headers decide.

        Raises:
          CheckpointError: it is of this format or of one like it, and damaged.
        """

    def open_model(self, path: pathlib.Path, *, image_size: int | None = None) -> OpenedModel:
        """Opens the model; only headers are read.

        `image_size` is used where the files lack it.

        Raises:
          CheckpointError: it is damaged, or no model that mammut has. Every mismatch is named.
        """


# The formats that `load` reads, one module each. No file or folder belongs to two formats.
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
    """Writes a model folder.

    Of several processes, all have to call it: split parameters are brought together one by one, and
    process 0 writes them.

    Args:
      folder: made where it is missing.
      model: the model.
      processor: makes images and texts for it.
      overwrite: whether a model of ours that is in the folder is replaced.
      max_shard_bytes: the largest size of one file of weights; more becomes several files.

    Raises:
      ValueError: the folder holds a model already and `overwrite` is False, or one of open_clip; or
        the processor is of another model.

    Example:
      >>> model = mammut.MaMMUT(config, rngs=nnx.Rngs(0))
      >>> mammut.save("models/new", model, processor)
    """
    require_kind("folder", folder, str, os.PathLike)
    require_kind("model", model, MaMMUT)
    require_kind("processor", processor, Processor, NoneType)
    tensors = _tensors_of(model)
    opened = OpenedModel(model.config, tensors, processor, "the model", compute=model.compute)
    if not distributed.first():
        for name in opened.tensors.specs:  # in the order in which process 0 writes them
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
    """Saves an opened model as `save` does.

    One tensor is in memory at a time.

    A model that is in the folder stays there until all of the new one is written.

    Args:
      folder: as for `save`.
      opened: a whole model, with its processor.
      overwrite: as for `save`.
      max_shard_bytes: as for `save`.
      progress: called with the number of bytes of each tensor written.

    Returns:
      Sentences on what the model needs and the folder does not have.

    Raises:
      ValueError: as for `save`; or `opened` is a part of a model, or is read from `folder` itself.
    """
    folder = pathlib.Path(folder)
    files = []
    if opened.processor is not None:
        files = [mammut_folder.CONFIG_FILE, "processor.json", *opened.processor.tokenizer.files]
    weights = sorted(path.name for path in folder.glob("*") if _WEIGHT_FILES.fullmatch(path.name))
    require_target(
        folder, opened, [*files, mammut_folder.MANIFEST_FILE, *weights], [CONFIG_FILE], overwrite
    )
    with replacing(folder, mammut_folder.MANIFEST_FILE, stale=weights) as new:
        opened.processor.save(new)
        files += write_sharded(
            new,
            mammut_folder.WEIGHTS_STEM,
            opened.tensors.specs,
            opened.tensors.read,
            max_bytes=max_shard_bytes,
            metadata={"format": "mammut"},
            progress=progress,
        )
        write_json(
            new / mammut_folder.CONFIG_FILE,
            {
                "format": "mammut",
                "version": mammut_folder.VERSION,
                "model": to_dict(opened.config),
                "compute": to_dict(opened.compute),
            },
        )
        manifest = make_manifest(new, [new / name for name in files])
        write_json(new / mammut_folder.MANIFEST_FILE, manifest)
    write_card(folder, opened.config, opened.processor, opened.compute)
    tokenizer = opened.processor.tokenizer
    if isinstance(tokenizer, MissingTokenizer):
        return (tokenizer.problem,)
    return ()


def load(
    path: str | os.PathLike,
    *,
    mesh: Mesh | None = None,
    image_size: int | None = None,
    compute: ComputeConfig | None = None,
) -> tuple[MaMMUT, Processor]:
    """Loads a model and its processor.

    Args:
      path: a model folder of ours; a run, for its newest good checkpoint; a folder or file of
        open_clip's MaMMUT and CoCa or of LAION's openMaMMUT; a SigLIP or CapPa `.npz` of
        big_vision; a checkpoint of MAGMA's code. A part of a model is refused:
        `load_language_model` reads the language models of Hugging Face.
      mesh: the devices for the parameters, split by `mammut.core.sharding.RULES`. None: the default
        device.
      image_size: pixels along one side. The position table is resampled to it as the makers of the
        model do. None: the size that the model was trained with. A `.npz` of big_vision does not
        tell the size from others with as many patches.
      compute: how the model is computed, and the number types of its parameters. None: as the
        folder says, float32 for third-party models.

    Returns:
      The model, and the processor that makes its images and texts.

    Raises:
      CheckpointError: there is no model at the path, a file is damaged or missing, or the weights
        do not fit the config. Every mismatch is named.
      ValueError: `image_size` is not a positive multiple of the patch size, which only some
        published models allow (`VisionConfig.cut_rest`).

    Example:
      >>> model, processor = mammut.load("runs/flickr8k")
      >>> batch = processor(images=["dog.jpg"], text=["a dog on grass"])
      >>> image_embed = model.encode_image(batch["image"])
    """
    if image_size is not None and (type(image_size) is not int or not 1 <= image_size <= 2**14):
        raise ValueError(
            f"image_size is {image_size!r}, expected a positive whole number of pixels, "
            f"at most {2**14}"
        )
    require_arithmetic()
    opened = open_model(path, image_size=image_size)
    if opened.processor is None or set(opened.parts) != {"vision", "text", "rest"}:
        use = "a run can start from it with --init"
        if opened.parts == ("vision",):
            use = "a run can start from it with --init-vision"
        elif opened.parts == ("text",):
            use = (
                "mammut.load_language_model reads it, and a run can start from it with --init-text"
            )
        raise CheckpointError(
            f"{opened.where} holds {' and '.join(opened.parts)} alone, "
            f"expected a whole model: {use}"
        )
    if image_size is not None:
        opened = at_image_size(opened, image_size)
    return place(opened, mesh, compute=compute), opened.processor.for_model(opened.config)


def load_language_model(
    path: str | os.PathLike, *, mesh: Mesh | None = None, compute: ComputeConfig | None = None
) -> tuple[TextDecoder, Tokenizer]:
    """Loads a text decoder and its tokenizer.

    Args:
      path: a folder of Hugging Face with a GPT-2, GPT-Neo, GPT-J or GPT-NeoX (Pythia). Of a whole
        model, such as `load` reads, its decoder is loaded.
      mesh: as for `load`.
      compute: as for `load`.

    Raises:
      CheckpointError: as for `load`; or there is no text decoder.

    Example:
      >>> decoder, tokenizer = mammut.load_language_model("downloads/pythia-70m")
      >>> ids = tokenizer.encode("a dog")
    """
    require_arithmetic()
    opened = open_model(path)
    if "text" not in opened.parts:
        raise CheckpointError(
            f"{opened.where} holds {' and '.join(opened.parts)} alone, expected a text decoder"
        )
    if opened.processor is None:
        raise CheckpointError(
            f"{opened.where} has no tokenizer, expected one with the text decoder"
        )
    decoder = place(opened, mesh, part="text", compute=compute)
    return decoder, opened.processor.tokenizer


def open_model(path: str | os.PathLike, *, image_size: int | None = None) -> OpenedModel:
    """Opens a model, or a part of one; only headers are read.

    `load` loads the same models.

    Args:
      path: as for `load`; or a folder or file that holds an image encoder or a text decoder alone.
      image_size: pixels, for a file that does not give them: a model of big_vision. All others
        ignore it.

    Raises:
      CheckpointError: as for `load`.
    """
    require_kind("path", path, str, os.PathLike)
    path = pathlib.Path(path)
    for row in FORMATS:
        if row.recognises(path):
            return row.open_model(path, image_size=image_size)
    raise CheckpointError(_why_none(path))


def _why_none(path: pathlib.Path) -> str:
    """Explains in a sentence why no format recognises `path`."""
    if not os.path.exists(path):
        return (
            f"there is no {path}: expected a folder or a file on this machine, "
            "nothing is downloaded"
        )
    if path.is_dir():
        names = sorted(item.name for item in path.iterdir())
        # an .npz is recognised by itself, and is given by its own path
        weights = [name for name in names if name.endswith(SUFFIXES) and not name.endswith(".npz")]
        if weights:
            return f"{path} holds {weights[0]} and no {CONFIG_FILE}, which says what model it is of"
    return f"{path} is {', '.join(f'no {row.KIND}' for row in FORMATS)}"


def place(
    opened: OpenedModel,
    mesh: Mesh | None = None,
    part: str | None = None,
    compute: ComputeConfig | None = None,
) -> MaMMUT | TextDecoder:
    """Reads the parameters of an opened model onto their devices.

    Args:
      opened: the model.
      mesh: the devices; None: the default device.
      part: the name of the part to read, such as "text"; None: the whole model.
      compute: how it is computed; None: as in the opened model.

    Returns:
      The model, or the part.

    Raises:
      ValueError: the mesh has axes that are not automatic, or other ones than those of
        `mammut.core.sharding.make_mesh`.
    """
    if mesh is not None:
        _require_mesh(mesh)
    compute = compute or opened.compute

    def make() -> MaMMUT:
        return MaMMUT(opened.config, compute=compute, rngs=nnx.Rngs(0))

    abstract = nnx.eval_shape(make)
    prefix = ""
    if part is not None:
        abstract = getattr(abstract, part)
        prefix = f"{part}."
    graphdef, state = nnx.split(abstract)
    state = nnx.to_pure_dict(state)
    shardings = mesh and param_shardings(state, logical_axes(abstract), mesh)

    def put(path, leaf, sharding=None):
        array = opened.tensors.read(prefix + path_name(path))
        if not array.flags.writeable:
            # A copy of the mapped file: an array on the CPU may share its memory, and files change.
            array = np.array(array)
        array = array.astype(leaf.dtype, copy=False)
        if sharding is None:
            return jax.device_put(array)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: array[index])

    trees = (state,) if shardings is None else (state, shardings)
    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(put, *trees))


def _require_mesh(mesh: Mesh) -> None:
    """Checks that a mesh is like a mesh of `sharding.make_mesh`; raises ValueError."""
    unknown = set(mesh.axis_names) - set(MESH_AXES)
    if unknown or set(mesh.axis_types) != {AxisType.Auto}:
        types = ", ".join(map(str, mesh.axis_types))
        raise ValueError(
            f"the mesh has the axes {mesh.axis_names} of {types}, expected automatic axes "
            f"among {MESH_AXES}: mammut.core.sharding.make_mesh makes one"
        )


def read_model_config(path: str | os.PathLike) -> ModelConfig:
    """Reads the config of a model without its weights.

    The model is a model folder, a run or a foreign model.

    Raises:
      CheckpointError: there is no model at the path.
    """
    path = pathlib.Path(path)
    config = path / mammut_folder.CONFIG_FILE
    if os.path.exists(config) and "format" in read_json_object(config):
        return mammut_folder.read_configs(path)[0]
    if os.path.exists(path / mammut_run.RUN_FILE):
        return mammut_run.read_configs(path)[0]
    return open_model(path).config


def _tensors_of(model: MaMMUT) -> LazyTensors:
    return LazyTensors(*host_tensors(by_name(nnx.to_pure_dict(nnx.state(model, nnx.Param)))))
