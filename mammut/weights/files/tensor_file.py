"""Files of tensors: opens files that strangers wrote, and writes safetensors.

    .safetensors               github.com/huggingface/safetensors, one file
    *.safetensors.index.json   in shards: {"metadata": ..., "weight_map": {tensor: file}}
    .pt .pth .bin .ckpt        torch.save of torch 1.6 or later (`torch_archive`)
    .npz                       numpy.savez and savez_compressed (`zip_archive`)

Nothing in a file is run, and nothing in it is trusted: sizes, offsets and names are checked
before memory is taken.
"""

import contextlib
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from mammut.core.files import replacing_file
from mammut.core.mapped_file import (
    MAX_HEADER,
    MAX_TENSORS,
    CheckpointError,
    MappedFile,
    StoredTensor,
    TensorSpec,
    json_object,
    tensor_spec,
)
from mammut.weights.files.torch_archive import torch_tensors
from mammut.weights.files.zip_archive import ZipArchive, npz_tensors

__all__ = [
    "SUFFIXES",
    "CheckpointError",
    "TensorFile",
    "TensorSpec",
    "open_tensors",
    "stored_specs",
    "write_safetensors",
    "write_sharded",
]

# The endings of the names of these files.
SUFFIXES = (".safetensors", ".safetensors.index.json", ".pt", ".pth", ".bin", ".ckpt", ".npz")
_DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16,
        "U32": np.uint32, "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16,
        "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64, "C64": np.complex64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorFile:
    """An opened file of tensors, or a set of shards.

    Only headers have been read.

    Attributes:
      path: the file; of a set of shards, their index.
      specs: shape and type of every tensor, in the file's order.
      metadata: the texts in a safetensors file's `__metadata__`; of shards, the texts that all of
        them have. Files of other kinds have none.

    Raises:
      CheckpointError: there are too many tensors, or a name is not text.
    """

    def __init__(
        self, path: pathlib.Path, tensors: dict[str, StoredTensor], metadata: dict[str, str]
    ):
        self.path = path
        self.metadata = metadata
        self._tensors = tensors
        if len(tensors) > MAX_TENSORS:
            raise CheckpointError(f"{path} has {len(tensors)} tensors, more than {MAX_TENSORS}")
        if bad := next((name for name in tensors if not _is_text(name)), None):
            raise CheckpointError(f"{path}: the name {bad!r} is not text")
        self.specs = {name: tensor.spec for name, tensor in tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor; the array is read-only.

        It is a view of the mapped file, or one copy where the tensor is compressed or big endian. A
        view stays valid as long as the file is not cut short.

        Raises:
          CheckpointError: there is no such tensor, or its bytes are damaged.
        """
        if name not in self._tensors:
            raise CheckpointError(f"{self.path} has no tensor {name!r}")
        return self._tensors[name].read()


def open_tensors(path: str | os.PathLike) -> TensorFile:
    """Opens a file of tensors; its first bytes show its kind.

    Raises:
      CheckpointError: the file is missing, damaged or of an unknown kind, or would run code. File
        and key are named.
    """
    path = pathlib.Path(path)
    file = MappedFile(path)
    head = file.bytes(0, 512)
    if head[4:9] == b"\0\0\0\0{":  # a header of less than 4 GB follows its length
        tensors, metadata = _safetensors(file)
    elif head.lstrip().startswith(b"{"):
        tensors, metadata = _shards(file)
    elif head.startswith((b"PK\3\4", b"PK\5\6")):
        archive = ZipArchive(file)
        metadata = {}
        if any(name.endswith("data.pkl") for name in archive.members):
            tensors = torch_tensors(archive)
        else:
            tensors = npz_tensors(archive)
    elif path.suffix == ".safetensors":
        tensors, metadata = _safetensors(file)
    elif head.startswith(b"\x80") or head[257:262] == b"ustar":
        raise CheckpointError(
            f"{path} is a bare pickle or a tar archive, as torch before 1.6 wrote: save it again "
            "with torch.save(model.state_dict(), ...) of torch 1.6 or later, or as safetensors"
        )
    else:
        raise CheckpointError(
            f"{path} is not safetensors, an index of it, a torch.save archive or .npz"
        )
    file.let_go()
    return TensorFile(path, tensors, metadata)


def stored_specs(path: pathlib.Path) -> Mapping[str, TensorSpec]:
    """Reads the specs of the tensors in a file.

    A format recognises its files by them.

    There are none in a folder, or in a file whose name ends with none of `SUFFIXES`. Only headers
    are read.

    Raises:
      CheckpointError: as `open_tensors`.
    """
    if os.path.isdir(path) or not path.name.endswith(SUFFIXES):
        return {}
    try:
        status = path.stat()
    except OSError:
        return open_tensors(path).specs  # raises, with the reason
    return _specs(path, status.st_ino, status.st_mtime_ns, status.st_size)


# Several formats read the same file in turn, and the pickle of a large training checkpoint
# takes seconds. The arguments beside the path distinguish two states of the file.
@functools.lru_cache(maxsize=1)
def _specs(path: pathlib.Path, inode: int, mtime_ns: int, size: int) -> Mapping[str, TensorSpec]:
    return open_tensors(path).specs


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # it has half of a surrogate pair
        return False
    return True


def _safetensors(file: MappedFile) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Reads the tensors and the metadata of a safetensors file."""
    length = int.from_bytes(file.bytes(0, 8), "little")
    if length > min(MAX_HEADER, file.size - 8):
        raise CheckpointError(
            f"{file.path} is cut short or damaged: it has {file.size} bytes, "
            f"and a header of {length}, which may be {MAX_HEADER} at most"
        )
    header = json_object(file.bytes(8, 8 + length), f"the header of {file.path}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise CheckpointError(f"{file.path} has a __metadata__ that is not made of texts")
    ranges = []
    for name, entry in header.items():
        start, end, spec = _safetensors_entry(f"{file.path}: {name!r}", entry)
        ranges.append((start, end, name, spec))

    # The tensors must fill the file, one after the other.
    tensors = {}
    data_start = 8 + length
    at = 0
    for start, end, name, spec in sorted(ranges, key=lambda entry: entry[:2]):
        where = f"{file.path}: {name!r}"
        if start != at or end - start != spec.nbytes:
            raise CheckpointError(
                f"{where} is {spec.dtype}{list(spec.shape)}, "
                f"expected at bytes {at} to {at + spec.nbytes}, and said to be at {start} to {end}"
            )
        read = functools.partial(file.array, where, data_start + start, spec)
        tensors[name] = StoredTensor(spec, read)
        at = end
    if data_start + at != file.size:
        raise CheckpointError(
            f"{file.path} has {file.size - data_start} bytes of tensors, its header gives {at}"
        )
    return tensors, metadata


def _safetensors_entry(where: str, entry: Any) -> tuple[int, int, TensorSpec]:
    """Reads a tensor's entry in a safetensors header.

    Returns its first byte, last byte and spec.
    """
    match entry:
        case {
            "dtype": str(kind),
            "shape": list(shape),
            "data_offsets": [int(start), int(end)],
            **rest,
        } if not rest:
            pass
        case _:
            raise CheckpointError(f"{where} does not give dtype, shape and data_offsets alone")
    if kind not in _DTYPES:
        raise CheckpointError(f"{where} has dtype {kind!r}, expected one of {', '.join(_DTYPES)}")
    return start, end, tensor_spec(where, shape, _DTYPES[kind])


def _shards(index: MappedFile) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Opens the tensors of all shards.

    Returns also the metadata that all shards have.
    """
    weight_map = json_object(index.bytes(0, MAX_HEADER + 1), f"{index.path}").get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise CheckpointError(f"{index.path} has no weight_map from tensors to files")
    tensors: dict[str, StoredTensor] = {}
    shared: list[dict[str, str]] = []
    for shard in dict.fromkeys(weight_map.values()):
        file = MappedFile(_shard_path(index.path, shard))
        in_shard, metadata = _safetensors(file)
        file.let_go()
        for name in in_shard:
            if weight_map.get(name) != shard:
                listed = f"in {weight_map[name]!r}" if name in weight_map else "nowhere"
                raise CheckpointError(f"{index.path} has {name!r} {listed}, and {shard!r} has it")
        tensors |= in_shard
        shared.append(metadata)
    if missing := weight_map.keys() - tensors.keys():
        name = min(missing)
        raise CheckpointError(
            f"{index.path} has {name!r} in {weight_map[name]!r}, which does not have it"
        )
    common = shared[0] if shared else {}
    for metadata in shared[1:]:
        common = {key: text for key, text in common.items() if metadata.get(key) == text}
    return tensors, common


def _shard_path(index: pathlib.Path, shard: str) -> pathlib.Path:
    """Finds the file of a shard, in the folder of the index.

    Where the index is a link, as every file in the cache of Hugging Face is, the shard may also lie
    beside the file that the link leads to.
    """
    try:
        path = (index.parent / shard).resolve(strict=True)
        homes = (index.parent.resolve(), index.resolve().parent)
    # It is missing, is no name of a file, or is a loop of links.
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{index} names the shard {shard!r}, which cannot be found"
        ) from error
    if pathlib.PurePath(shard).is_absolute() or not any(
        path.is_relative_to(home) for home in homes
    ):
        raise CheckpointError(f"{index} names the shard {shard!r}, which is outside its folder")
    return path


def write_safetensors(
    path: str | os.PathLike,
    specs: dict[str, TensorSpec],
    read: Callable[[str], np.ndarray],
    *,
    metadata: dict[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes a safetensors file, whole or not at all.

    One tensor is in memory at a time.

    Tensors of wide numbers come first, and else keep their order: each then lies at a multiple of
    the size of its numbers.

    Args:
      path: the file; one that is there is replaced at the end.
      specs: shape and type of each tensor, by name.
      read: gives the tensor of a name. It is called once for each, in the file's order.
      metadata: texts for the header.
      progress: called with the number of bytes of each tensor written.

    Raises:
      ValueError: the format lacks a dtype, a name or a text cannot be stored, or `read` gives
        another shape or dtype than its spec.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as new:
        _write(new, specs, read, metadata, progress)


def write_sharded(
    folder: str | os.PathLike,
    stem: str,
    specs: dict[str, TensorSpec],
    read: Callable[[str], np.ndarray],
    *,
    max_bytes: int,
    metadata: dict[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Writes `{stem}.safetensors`, or shards of it and their index.

    Nothing in the folder changes until all files are written. Then a file or an index of the same
    stem that was there before is replaced or removed.

    Args:
      folder: the folder; made where it is missing.
      stem: the beginning of the files' names.
      specs: as for `write_safetensors`.
      read: as for `write_safetensors`.
      max_bytes: the largest size of the tensors in one shard. A tensor that is larger has a shard
        of its own.
      metadata: texts for the header of every file.
      progress: as for `write_safetensors`.

    Returns:
      The names of the files written, the index last.

    Raises:
      ValueError: as for `write_safetensors`, or `max_bytes` is not positive.
    """
    if max_bytes < 1:
        raise ValueError(f"max_bytes is {max_bytes}, expected at least 1")
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    single = folder / f"{stem}.safetensors"
    index = folder / f"{stem}.safetensors.index.json"
    parts: list[dict[str, TensorSpec]] = [{}]
    room = max_bytes
    for name, spec in specs.items():
        if spec.nbytes > room and parts[-1]:
            parts.append({})
            room = max_bytes
        parts[-1][name] = spec
        room -= spec.nbytes
    if len(parts) == 1:
        with replacing_file(single) as new:
            _write(new, specs, read, metadata, progress)
            index.unlink(missing_ok=True)
        return [single.name]
    names = [
        f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors"
        for number in range(1, len(parts) + 1)
    ]
    with contextlib.ExitStack() as files:
        new_index = files.enter_context(replacing_file(index))  # entered first, so replaced last
        for name, part in zip(names, parts):
            new = files.enter_context(replacing_file(folder / name))
            _write(new, part, read, metadata, progress)
        weight_map = {tensor: name for name, part in zip(names, parts) for tensor in part}
        total = {"total_size": sum(spec.nbytes for spec in specs.values())}
        new_index.write_text(
            json.dumps({"metadata": total, "weight_map": weight_map}, indent=2) + "\n"
        )
        for old in (single, index):
            old.unlink(missing_ok=True)
    return [*names, index.name]


def _write(
    path: pathlib.Path,
    specs: dict[str, TensorSpec],
    read: Callable[[str], np.ndarray],
    metadata: dict[str, str] | None,
    progress: Callable[[int], None] | None,
) -> None:
    """Writes a safetensors file straight to `path`."""
    header: dict[str, dict] = {}
    if metadata:
        header["__metadata__"] = dict(metadata)
    for text in (*specs, *(metadata or {}), *(metadata or {}).values()):
        if not isinstance(text, str) or not _is_text(text) or text == "__metadata__":
            raise ValueError(f"{text!r} cannot be a name or a text in a safetensors file")
    for name, spec in specs.items():
        if spec.dtype not in _DTYPE_NAMES:
            raise ValueError(
                f"{name!r} is {spec.dtype}, expected one of {', '.join(map(str, _DTYPE_NAMES))}"
            )
    ordered = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    at = 0
    for name in ordered:
        spec = specs[name]
        offsets = [at, at + spec.nbytes]
        header[name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": offsets,
        }
        at = offsets[1]
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # so that the first tensor lies at a multiple of 8
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in ordered:
            array = np.asarray(read(name))
            if TensorSpec(array.shape, array.dtype) != specs[name]:
                raise ValueError(
                    f"{name!r} was read as {array.dtype}{list(array.shape)}, "
                    f"expected {specs[name].dtype}{list(specs[name].shape)}"
                )
            if sys.byteorder == "big":
                array = array.byteswap()
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            if progress is not None:
                progress(specs[name].nbytes)
