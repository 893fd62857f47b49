"""Reads the tensors of a `torch.save` file without torch.

Nothing in the file is executed.

Such a file is a zip archive of a pickle and of the bytes of each storage. A pickle is a program for
a small stack machine, which may call any function of any module. The machine here can call nothing:
it knows the opcodes that `torch.save` writes and, by name, the few functions and classes that
rebuild tensors, and notes their arguments. It also never hashes, compares or prints nested values,
so that no pickle can make it recurse or wait.
"""

import dataclasses
import pickletools
from typing import Any

import ml_dtypes
import numpy as np

from mammut.core.mapped_file import CheckpointError, StoredTensor, tensor_spec
from mammut.weights.files.zip_archive import Member, ZipArchive

# A checkpoint of 855 parameters with AdamW's state has 0.3 million bytes and 0.1 million opcodes.
_MAX_PICKLE = 32_000_000  # bytes
_MAX_OPCODES = 2_000_000
_MAX_SIZE = 2**48  # the largest size of an axis, a stride, an offset or a storage
_SAVE_AGAIN = (
    "save it again with torch.save(model.state_dict(), ...) of torch 1.6 or later, "
    "or as safetensors"
)

_DTYPES = {
    f"torch.{name}": np.dtype(getattr(ml_dtypes if hasattr(ml_dtypes, name) else np, name))
    for name in (
        "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
        "float16", "bfloat16", "float32", "float64", "complex64", "complex128",
        "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
    )
}  # fmt: skip
_STORAGES = {
    f"torch.{name}": _DTYPES[f"torch.{dtype}"]
    for name, dtype in {
        "BoolStorage": "bool", "ByteStorage": "uint8", "CharStorage": "int8",
        "ShortStorage": "int16", "IntStorage": "int32", "LongStorage": "int64",
        "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "FloatStorage": "float32",
        "DoubleStorage": "float64", "ComplexFloatStorage": "complex64",
        "ComplexDoubleStorage": "complex128", "storage.UntypedStorage": "uint8",
    }.items()
}  # fmt: skip
_TENSORS = {
    f"torch._utils.{name}"
    for name in (
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
    )
}
# Values beside the tensors of a training checkpoint, such as a NumPy learning rate, a device or a
# set. None of them is kept.
_UNKEPT = {
    "torch.Size", "torch.device", "numpy.dtype", "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar", "_codecs.encode", "__builtin__.set", "builtins.set",
}  # fmt: skip
_KNOWN = {"collections.OrderedDict"} | _TENSORS | _UNKEPT | _STORAGES.keys() | _DTYPES.keys()


@dataclasses.dataclass(frozen=True, eq=False)
class _Global:
    """The name of a function or class, which is never looked up."""

    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class _Unkept:
    """A value that is not kept."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
    """A storage: `count` numbers, the archive's member `data/{key}`."""

    key: str
    dtype: np.dtype
    count: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Tensor:
    """The arguments that a tensor is rebuilt from, unchecked.

    Offset and strides count elements of `dtype`.
    """

    storage: _Storage
    offset: Any
    shape: Any
    strides: Any
    dtype: np.dtype
    flagged: bool  # whether its numbers have to be negated or conjugated


def torch_tensors(archive: ZipArchive) -> dict[str, StoredTensor]:
    """Reads the state dict of a `torch.save` archive.

    The tensors are views of the archive's storages.

    The state dict is the saved dict, or its entry "state_dict", "model" or "module" (DeepSpeed).
    Other saved values are ignored. The prefixes "module." and "_orig_mod." of wrapped models are
    removed where every key has them.

    Raises:
      CheckpointError: the file is damaged, calls a function that does not rebuild tensors, or holds
        no state dict.
    """
    path = archive.file.path
    pickles = [
        name for name in archive.members if name.endswith("/data.pkl") and name.count("/") == 1
    ]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{path} holds {len(pickles)} of data.pkl, expected one: {_SAVE_AGAIN}"
        )
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in archive.members or any(
        name.startswith(f"{root}code/") for name in archive.members
    ):
        raise CheckpointError(f"{path} is a TorchScript program, not a state dict: {_SAVE_AGAIN}")
    program = archive.members[pickles[0]]
    if program.size > _MAX_PICKLE:
        raise CheckpointError(
            f"{path}: {program.name!r} has {program.size} bytes, more than {_MAX_PICKLE}"
        )
    byteorder = "little"
    if order := archive.members.get(f"{root}byteorder"):
        byteorder = archive.head(order, 7).decode("latin-1")
        if byteorder not in ("little", "big"):
            raise CheckpointError(
                f"{path}: {order.name!r} is {byteorder!r}, expected little or big"
            )
    state = _state_dict(_unpickle(archive.read(program), f"{path}: {program.name!r}"), f"{path}")
    tensors = {}
    for name, tensor in state.items():
        member = archive.members.get(f"{root}data/{tensor.storage.key}")
        tensors[name] = _stored(archive, f"{path}: {name!r}", tensor, member, byteorder)
    return _without_prefixes(tensors)


def _state_dict(saved: Any, path: str) -> dict[str, _Tensor]:
    """Finds the state dict in the saved value."""
    if not isinstance(saved, dict):
        raise CheckpointError(f"{path} does not hold a dict: {_SAVE_AGAIN}")
    state = saved
    for key in ("state_dict", "model", "module"):
        if isinstance(inner := saved.get(key), dict):
            state = inner
            path = f"{path}, entry {key!r}"
            break
    for name, value in state.items():
        # the value is not shown: an integer may have a million digits
        if not isinstance(name, str):
            raise CheckpointError(
                f"{path} has a key that is not text, expected a state dict: {_SAVE_AGAIN}"
            )
        if not isinstance(value, _Tensor):
            raise CheckpointError(
                f"{path}: {name!r} is not a tensor, expected a state dict: {_SAVE_AGAIN}"
            )
    return state


def _without_prefixes(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    # A model may be compiled and then distributed, or the other way round.
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _stored(
    archive: ZipArchive, where: str, tensor: _Tensor, member: Member | None, byteorder: str
) -> StoredTensor:
    """Makes a stored tensor whose elements lie within its storage.

    No two elements lie at the same place.

    Args:
      archive: the archive.
      where: file and key, for errors.
      tensor: the arguments that rebuild the tensor.
      member: its storage in the archive; None: it is missing.
      byteorder: the byte order of the storage.
    """
    storage = tensor.storage
    dtype = tensor.dtype
    if not all(map(_are_sizes, (tensor.shape, tensor.strides, (tensor.offset,)))):
        raise CheckpointError(f"{where} has a shape, strides or an offset that are no sizes")
    spec = tensor_spec(where, tensor.shape, dtype)
    strides = tensor.strides
    if len(strides) != len(spec.shape):
        raise CheckpointError(f"{where} has {len(strides)} strides for {len(spec.shape)} axes")
    if tensor.flagged:
        raise CheckpointError(
            f"{where} is stored as its negative or conjugate: save its resolve_neg().resolve_conj()"
        )
    if member is None:
        raise CheckpointError(f"{where} lies in the storage {storage.key!r}, which is missing")
    if member.deflated or storage.count * storage.dtype.itemsize != member.size:
        deflated = ", deflated" if member.deflated else ""
        raise CheckpointError(
            f"{where} lies in a storage of {storage.count} {storage.dtype}, "
            f"but {member.name!r} has {member.size} bytes{deflated}"
        )
    if spec.nbytes:
        reach = _reach(where, spec.shape, strides)
        if (tensor.offset + reach) * dtype.itemsize > member.size:
            raise CheckpointError(
                f"{where} is {dtype}{list(spec.shape)} with strides {list(strides)} "
                f"from element {tensor.offset} on, beyond its storage of {member.size} bytes"
            )
    start = member.start + tensor.offset * dtype.itemsize
    byte_strides = tuple(stride * dtype.itemsize for stride in strides)

    def read() -> np.ndarray:
        archive.check(member)
        return archive.file.array(where, start, spec, byte_strides, byteorder)

    return StoredTensor(spec, read)


def _reach(where: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Counts the elements of storage that a tensor spans.

    They reach from its first element to its last.

    Raises:
      CheckpointError: two elements may lie at one place.
    """
    reach = 1
    axes = [(stride, size) for stride, size in zip(strides, shape) if size > 1]
    for stride, size in sorted(axes):
        # Along this axis, each step must go beyond the reach of the axes so far.
        if stride < reach:
            raise CheckpointError(
                f"{where} has strides {list(strides)}, by which its elements share places"
            )
        reach += stride * (size - 1)
    return reach


def _are_sizes(values: Any) -> bool:
    return isinstance(values, tuple) and all(
        type(value) is int and 0 <= value <= _MAX_SIZE for value in values
    )


# Number of values that an opcode takes off the stack; those in _MARKED take all since the last
# mark.
_TAKES = {
    "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2, "REDUCE": 2, "BUILD": 1,
    "STACK_GLOBAL": 2, "BINPERSID": 1,
}  # fmt: skip
_MARKED = {"TUPLE", "APPENDS", "SETITEMS"}
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip


# One branch for each kind of opcode: in one place, the reader can see that none is missing.
def _unpickle(program: bytes | bytearray, where: str) -> Any:  # noqa: C901, PLR0915
    """Builds the value of a pickle.

    The value consists of dicts, lists, tuples, numbers, texts and `_Tensor`s.

    Raises:
      CheckpointError: the pickle calls a function that is not known here, or is damaged.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stack as it was at each mark
    memo: dict[int, Any] = {}
    try:
        for count, (opcode, value, _) in enumerate(pickletools.genops(program)):
            if count == _MAX_OPCODES:
                raise ValueError(f"it has more than {_MAX_OPCODES} steps")
            if opcode.name in _MARKED:
                taken = stack
                stack = below.pop()
            else:
                kept = len(stack) - _TAKES.get(opcode.name, 0)
                if kept < 0:
                    raise IndexError
                taken = stack[kept:]
                del stack[kept:]
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack[-1]
                case "MARK":
                    below.append(stack)
                    stack = []
                case "BINPUT" | "LONG_BINPUT":
                    memo[value] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[value])
                case "NONE":
                    stack.append(None)
                case "NEWTRUE" | "NEWFALSE":
                    stack.append(opcode.name == "NEWTRUE")
                case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                    stack.append(tuple(taken))
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append({})
                case "APPEND" | "APPENDS":
                    _is_a(list, stack[-1]).extend(taken)
                case "SETITEM" | "SETITEMS":
                    _set_items(_is_a(dict, stack[-1]), taken)
                case "GLOBAL":
                    stack.append(_known(where, value.replace(" ", ".")))
                case "STACK_GLOBAL":
                    stack.append(_known(where, ".".join(_is_a(str, part) for part in taken)))
                case "REDUCE":
                    stack.append(_call(_is_a(_Global, taken[0]).name, taken[1]))
                case "BUILD":  # the attributes of a state dict, or of a NumPy dtype
                    _is_a(dict | _Unkept, stack[-1])
                case "BINPERSID":
                    stack.append(_storage(taken[0]))
                case name if name in _LITERALS:
                    stack.append(value)
                case name:
                    raise ValueError(f"it has the opcode {name}, which torch.save does not write")
        raise ValueError("it does not stop")
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{where} is a damaged pickle: its memo has no {error}") from None
    except IndexError:
        raise CheckpointError(
            f"{where} is a damaged pickle: its stack lacks a value or a mark that an opcode takes"
        ) from None
    # DeprecationWarning: a bad escape in a text, where warnings are errors.
    except (ValueError, DeprecationWarning) as error:
        raise CheckpointError(f"{where} is a damaged pickle: {error}") from error


def _is_a(kind: Any, value: Any) -> Any:
    """Returns the value if it is of the given kind.

    Raises ValueError where it is of another kind.
    """
    if not isinstance(value, kind):
        raise ValueError(f"{type(value).__name__} is where another kind of value belongs")
    return value


def _set_items(target: dict, items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int):  # the hash of a nested tuple may never end
            raise ValueError(f"a dict has a key of type {type(key).__name__}")
        if key in target:
            raise ValueError("a dict has a key twice")
        target[key] = value


def _known(where: str, name: str) -> _Global:
    if name not in _KNOWN:
        raise CheckpointError(
            f"{where} wants to call {name[:200]!r}, "
            f"none of the few functions that rebuild tensors: {_SAVE_AGAIN}"
        )
    return _Global(name)


def _storage(arguments: Any) -> _Storage:
    match arguments:
        case ("storage", _Global(name), str(key), _, int(count)) if (
            name in _STORAGES and 0 <= count <= _MAX_SIZE
        ):
            return _Storage(key, _STORAGES[name], count)
    raise ValueError("a storage does not give its type, key, device and size")


def _call(name: str, arguments: Any) -> Any:
    """Makes the note that stands for the result of a call."""
    match name.rpartition(".")[2], arguments:
        case "OrderedDict", ():
            return {}
        case "_rebuild_tensor_v2", (_Storage() as storage, offset, shape, strides, _, _, *flags):
            return _Tensor(storage, offset, shape, strides, storage.dtype, any(flags))
        case "_rebuild_tensor_v3", (
            _Storage() as storage,
            offset,
            shape,
            strides,
            _,
            _,
            _Global(kind),
            *flags,
        ) if kind in _DTYPES:
            return _Tensor(storage, offset, shape, strides, _DTYPES[kind], any(flags))
        case "_rebuild_parameter", (_Tensor() as tensor, _, _):
            return tensor
        case "_rebuild_parameter_with_state", (_Tensor() as tensor, _, _, _):
            return tensor
    if name in _UNKEPT:
        return _Unkept()
    raise ValueError(f"{name} is called with what it does not take")
