"""Archives of tensors: torch.save and .npz.

The numbers are those of torch and NumPy, no code in a file is run, and damage is refused.
"""

import argparse
import collections
import io
import os
import pathlib
import pickle
import struct
import tracemalloc
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest

from mammut.weights.files.tensor_file import CheckpointError, open_tensors


def all_of(path):
    file = open_tensors(path)
    return {name: file.read(name) for name in file.specs}


def assert_same(path, want):
    got = all_of(path)
    assert list(got) == list(want)
    for name, array in want.items():
        assert (got[name].shape, got[name].dtype) == (array.shape, array.dtype), name
        assert got[name].tobytes() == array.tobytes(), name
        assert not got[name].flags.writeable


def refused(path, message):
    with pytest.raises(CheckpointError, match=message) as error:
        all_of(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def zipped(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def unzipped(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# torch.save


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def numbers_of(tensor):
    """The array of a tensor, through torch's own conversions alone."""
    torch = pytest.importorskip("torch")
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if str(tensor.dtype).startswith("torch.float8"):
        return tensor.view(torch.uint8).numpy().view(getattr(ml_dtypes, str(tensor.dtype)[6:]))
    return tensor.numpy()


def state_dict(torch):
    """A tensor of every kind that torch.save writes in a way of its own."""
    torch.manual_seed(0)
    weight = torch.randn(4, 6)
    kinds = (
        "float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128 uint16 "
        "uint32 uint64 "
        "float8_e4m3fn float8_e5m2"
    ).split()
    return collections.OrderedDict(
        {f"{kind}.x": (torch.randn(3) * 4).abs().to(getattr(torch, kind)) for kind in kinds},
        weight=weight,
        parameter=torch.nn.Parameter(torch.randn(2, 2)),
        tied=weight,
        part=weight[1:3, 2:5],
        last_part=weight[2:, 3:],
        transposed=weight.T,
        permuted=torch.randn(2, 3, 4, 5).permute(3, 0, 2, 1),
        one_row=weight[2:3].expand(1, 6),
        scalar=torch.tensor(2.6593),
        empty=torch.zeros(0, 3),
    )


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_state_dict_is_read_as_torch_saved_it(torch, tmp_path, protocol):
    state = state_dict(torch)
    state["parameter"].note = 1  # saved by another function than a parameter without attributes
    torch.save(state, tmp_path / "x.pt", pickle_protocol=protocol)
    assert_same(tmp_path / "x.pt", {name: numbers_of(tensor) for name, tensor in state.items()})
    file = open_tensors(tmp_path / "x.pt")
    assert np.shares_memory(file.read("weight"), file.read("transposed"))


@pytest.mark.parametrize(
    "wrapped", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_a_training_checkpoint_gives_its_state_dict_without_the_names_of_wrappers(
    torch, tmp_path, wrapped
):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3).bfloat16()).sum().backward()
    optimizer.step()
    # as open_clip's schedule leaves it
    optimizer.param_groups[0]["lr"] = np.float64(1e-3) * np.cos(0.5)
    scaler = torch.amp.GradScaler("cpu")
    state = model.state_dict(prefix=wrapped)
    checkpoint = {"epoch": 3, "name": "x", "state_dict": state, "optimizer": optimizer.state_dict()}
    torch.save(checkpoint | {"scaler": scaler.state_dict()}, tmp_path / "x.pt")
    assert_same(
        tmp_path / "x.pt", {name: numbers_of(tensor) for name, tensor in model.state_dict().items()}
    )
    torch.save({"model": state, "args": None}, tmp_path / "x.pt")
    assert list(open_tensors(tmp_path / "x.pt").specs) == list(model.state_dict())


def test_a_prefix_that_not_every_key_has_stays(torch, tmp_path):
    names = ["module.a", "b"]
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "x.pt")
    assert list(open_tensors(tmp_path / "x.pt").specs) == names


def test_big_endian_storages_are_read_as_torch_reads_them(torch, tmp_path):
    path = tmp_path / "x.pt"
    # torch leaves the wider unsigned integers as they are, whatever machine wrote them.
    unswapped = ("parameter", "uint16.x", "uint32.x", "uint64.x")
    state = {name: tensor for name, tensor in state_dict(torch).items() if name not in unswapped}
    torch.save(state, path)
    members = unzipped(path)
    zipped(path, members | {"x/byteorder": b"big"})
    assert_same(path, {name: numbers_of(tensor) for name, tensor in torch.load(path).items()})


def saved(torch, path, state, storage=bytes(24), **more):
    """A torch.save archive of a state dict of `Told` tensors over one storage."""

    class Pickler(pickle.Pickler):
        def reducer_override(self, told):
            if isinstance(told, Told):
                return told.call, told.args
            return NotImplemented

        def persistent_id(self, value):
            return (
                ("storage", *value[1])
                if isinstance(value, tuple) and value[:1] == ("id",)
                else None
            )

    file = io.BytesIO()
    Pickler(file, 2).dump(state)
    return zipped(
        path, {"x/data.pkl": file.getvalue(), "x/byteorder": b"little", "x/data/0": storage} | more
    )


class Told:
    def __init__(self, call, *args):
        self.call, self.args = call, args


@pytest.mark.parametrize("offset, shape, strides, message", [
    (0, (7,), (1,),
     r"'a' is float32\[7\] with strides \[1\] from element 0 on, beyond its storage of 24 bytes"),
    (5, (2,), (1,), r"'a' is float32\[2\] with strides \[1\] from element 5 on, beyond"),
    (0, (2,), (6,), "beyond its storage of 24 bytes"),
    (0, (6,), (0,), r"'a' has strides \[0\], by which its elements share places"),
    (0, (2, 3), (1, 1), "by which its elements share places"),
    (0, (2, 3), (2, 1), "by which its elements share places"),
    (-1, (2,), (1,), "'a' has a shape, strides or an offset that are no sizes"),
    (0, (2,), (-1,), "that are no sizes"),
    (0, (-2,), (1,), "that are no sizes"),
    (0, (2,), (2**70,), "that are no sizes"),
    (10**5000, (2,), (1,), "that are no sizes"),
    (0, [2], (1,), "that are no sizes"),
    (0, (2.0,), (1,), "that are no sizes"),
    (0, (2, 3), (1,), "'a' has 1 strides for 2 axes"),
    (0, (1,) * 40, (1,) * 40, "'a' has no shape of at most 32 axes"),
    (0, (2**40, 2**40), (1, 2**40), "'a' is said to take more than"),
], ids=range(16))  # fmt: skip
def test_a_tensor_that_leaves_its_storage_or_folds_upon_itself_is_refused(
    torch, tmp_path, offset, shape, strides, message
):
    storage = ("id", (torch.FloatStorage, "0", "cpu", 6))
    tensor = Told(torch._utils._rebuild_tensor_v2, storage, offset, shape, strides, False, {})
    refused(saved(torch, tmp_path / "x.pt", {"a": tensor}), message)


@pytest.mark.parametrize("storage, message", [
    (("FloatStorage", "0", "cpu", 5),
     "'a' lies in a storage of 5 float32, but 'x/data/0' has 24 bytes"),
    (("DoubleStorage", "0", "cpu", 6), "'a' lies in a storage of 6 float64, but"),
    (("FloatStorage", "1", "cpu", 6), "'a' lies in the storage '1', which is missing"),
    (("FloatStorage", "../byteorder", "cpu", 6), "which is missing"),
    (("FloatStorage", 0, "cpu", 6), "a storage does not give its type, key, device and size"),
    (("FloatStorage", "0", "cpu", -6), "a storage does not give"),
    (("FloatStorage", "0", "cpu", 10**5000), "a storage does not give"),
    (("Size", "0", "cpu", 6), "a storage does not give"),
], ids=range(8))  # fmt: skip
def test_a_storage_that_is_not_as_told_is_refused(torch, tmp_path, storage, message):
    storage = ("id", (getattr(torch, storage[0]), *storage[1:]))
    tensor = Told(torch._utils._rebuild_tensor_v2, storage, 0, (2,), (1,), False, {})
    refused(saved(torch, tmp_path / "x.pt", {"a": tensor}), message)


def test_a_tensor_saved_as_a_view_of_its_negative_or_by_another_function_is_refused(
    torch, tmp_path
):
    torch.save({"a": torch._neg_view(torch.ones(2))}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "'a' is stored as its negative or conjugate")
    torch.save({"a": torch.ones(2).to_sparse()}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "wants to call 'torch._utils._rebuild_sparse_tensor'")
    torch.save({"a": torch.ones(1).expand(5)}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "'a' has strides .0., by which its elements share places")


class Runs:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("where", ["state_dict", "extra"])
@pytest.mark.parametrize(
    "call", [os.system, eval, pickle.loads, getattr, io.open], ids=lambda call: call.__name__
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_would_run_code_is_refused_by_the_name_of_what_it_calls(
    torch, tmp_path, where, call, protocol
):
    marker = tmp_path / "it ran"
    state = {"state_dict": {"a": torch.zeros(2)}, "extra": 1}
    evil = Runs(call, f"touch '{marker}'")
    state |= {"extra": evil} if where == "extra" else {"state_dict": {"a": evil}}
    torch.save(state, tmp_path / "x.pt", pickle_protocol=protocol)
    refused(
        tmp_path / "x.pt",
        rf"'x/data.pkl' wants to call '\w+\.{call.__name__}', none of the few functions that",
    )
    assert not marker.exists()


def test_a_class_of_torch_is_not_enough_to_be_called(torch, tmp_path):
    torch.save({"a": torch.nn.Linear(2, 2)}, tmp_path / "x.pt")
    refused(
        tmp_path / "x.pt",
        "wants to call 'torch.nn.modules.linear.Linear', none of the few functions",
    )
    saved(torch, tmp_path / "x.pt", {"a": Told(torch.FloatStorage, 10**9)})
    refused(tmp_path / "x.pt", "torch.FloatStorage is called with what it does not take")


@pytest.mark.parametrize(
    "value", [frozenset({1}), pathlib.PurePosixPath("x"), argparse.Namespace(lr=1)]
)
def test_what_is_harmless_and_rebuilds_no_tensor_is_not_said_to_run_code(torch, tmp_path, value):
    torch.save({"state_dict": {"a": torch.ones(1)}, "args": value}, tmp_path / "x.pt")
    with pytest.raises(
        CheckpointError, match=f"{type(value).__name__}', none of the few functions that"
    ) as error:
        open_tensors(tmp_path / "x.pt")
    assert "run code" not in str(error.value)


@pytest.mark.parametrize("program, message", [
    (b"", "is a damaged pickle: pickle exhausted"),
    (b"\x80\x02.", "is a damaged pickle"),
    (b"\x80\x02}", "is a damaged pickle"),
    (b"\x80\x02a.", "its stack lacks a value or a mark"),
    (b"\x80\x02K\x01}s.", "its stack lacks a value or a mark"),
    (b"\x80\x02t.", "is a damaged pickle"),
    (b"\x80\x02h\x05.", "its memo has no 5"),
    (b"\x80\x02q\x05.", "its stack lacks a value or a mark"),
    (b"\x80\x02K\x01K\x02K\x03s.", "int is where another kind of value belongs"),
    (b"\x80\x02K\x01K\x02R.", "int is where another kind of value belongs"),
    (b"\x80\x02}r\xff\xff\xff\xff.", None),
    (b"\x80\x02}X\xff\xff\xff\x7fa.", "is a damaged pickle"),
    (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "is a damaged pickle"),
    (b"\x80\x02}(K\x01u.", "is a damaged pickle"),
    (b"\x80\x02}X\1\0\0\0aK\1sX\1\0\0\0aK\1s.", "a dict has a key twice"),
    (b"\x80\x02})K\1s.", "a dict has a key of type tuple"),
    (b"\x80\x02}q\0X\1\0\0\0ah\0s.", "'a' is not a tensor, expected a state dict"),
    (b"\x80\x02}K\1K\1s.", "has a key that is not text"),
    (b"\x80\x02}\x8b\x00\x10\x00\x00" + b"\xff" * 4095 + b"\x7fK\1s.",
     "has a key that is not text"),
    (b"\x80\x02K\1.", "does not hold a dict"),
    (b"\x80\x02" + b"(" * 10**5 + b".", "is a damaged pickle"),
    (b"\x80\x02)" + b"\x85" * 10**5 + b".", "does not hold a dict"),
    (b"\x80\x02)q\0" + b"(h\0h\0tq\0" * 100 + b"0}h\0K\1s.", "has the opcode POP"),
    (b"\x80\x02)q\0" + b"h\0h\0\x86q\0" * 100 + b"}h\0K\1s.", "a dict has a key of type tuple"),
    (b"\x80\x02" + b"]" * 2_000_001 + b".", "has more than 2000000 steps"),
    (b"\x80\x02c__builtin__\neval\n.", "wants to call '__builtin__.eval'"),
    (b"I1\n.", "has the opcode INT"),
    (b"\x80\x02\x82\x01.", "has the opcode EXT1"),
    (b"\x80\x02}\x81.", "has the opcode NEWOBJ"),
    (b"\x80\x02}.", None),
], ids=range(30))  # fmt: skip
def test_a_damaged_or_endless_pickle_is_refused(tmp_path, program, message):
    path = zipped(tmp_path / "x.pt", {"x/data.pkl": program})
    if message is None:
        assert open_tensors(path).specs == {}
    else:
        refused(path, message)


def test_what_is_not_a_state_dict_is_refused_with_what_to_do(torch, tmp_path):
    path = tmp_path / "x.pt"
    torch.save([torch.zeros(1)], path)
    refused(
        path, r"does not hold a dict: save it again with torch.save\(model.state_dict\(\), ...\)"
    )
    torch.save({"state_dict": {"a": torch.zeros(1), "b": 3}}, path)
    refused(path, "entry 'state_dict': 'b' is not a tensor")
    torch.save({"a": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)
    refused(path, "is a bare pickle or a tar archive, as torch before 1.6 wrote: save it again")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    refused(path, "is a TorchScript program, not a state dict: save it again")
    path.write_bytes(pickle.dumps({"a": 1}))
    refused(path, "is a bare pickle or a tar archive")


def test_a_program_too_long_or_an_unknown_byte_order_is_refused(tmp_path):
    zipped(tmp_path / "x.pt", {"x/data.pkl": bytes(32_000_001)})
    refused(tmp_path / "x.pt", "'x/data.pkl' has 32000001 bytes, more than 32000000")
    zipped(tmp_path / "x.pt", {"x/data.pkl": b"\x80\x02}.", "x/byteorder": b"middle"})
    refused(tmp_path / "x.pt", "'x/byteorder' is 'middle', expected little or big")
    zipped(tmp_path / "x.pt", {"x/data.pkl": b"\x80\x02}.", "y/data.pkl": b"\x80\x02}."})
    refused(tmp_path / "x.pt", "holds 2 of data.pkl, expected one")


def test_a_flipped_bit_in_a_storage_is_found_when_it_is_read(torch, tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(5), "b": torch.full((1000,), 3.0)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(np.float32(3).tobytes()) + 100] ^= 1
    path.write_bytes(data)
    file = open_tensors(path)
    assert not file.read("a").any()
    with pytest.raises(CheckpointError, match="'x/data/1' does not have its checksum"):
        file.read("b")


# .npz

ARRAYS = {
    "params/img/kernel": np.arange(12, dtype=np.float32).reshape(3, 4),
    "fortran": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
    "big": np.arange(3, dtype=">i4"),
    "scalar": np.array(1.5, np.float16),
    "empty": np.zeros((0, 2), np.uint8),
    "mask": np.array([True, False]),
    "bfloat16": np.array([1.5, -2, 3e38], ml_dtypes.bfloat16),
    "complex": np.array([1 + 2j]),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_as_numpy_saved_it(tmp_path, save):
    path = tmp_path / "x.npz"
    save(path, **ARRAYS)
    native = {
        name: array.astype(array.dtype.newbyteorder("="))
        for name, array in ARRAYS.items()
        if name != "bfloat16"
    }
    assert_same(path, {name: native.get(name, ARRAYS[name]) for name in ARRAYS})
    file = open_tensors(path)
    one, other = file.read("fortran"), file.read("fortran")
    assert one.flags.f_contiguous and np.shares_memory(one, other) == (save is np.savez)


def test_every_version_of_npy_and_an_archive_of_nothing_are_read(tmp_path):
    members = {}
    for version in [(1, 0), (2, 0), (3, 0)]:
        file = io.BytesIO()
        np.lib.format.write_array(file, ARRAYS["params/img/kernel"], version)
        members[f"v{version[0]}.npy"] = file.getvalue()
    zipped(tmp_path / "x.npz", members, zipfile.ZIP_DEFLATED)
    assert_same(tmp_path / "x.npz", {f"v{i}": ARRAYS["params/img/kernel"] for i in (1, 2, 3)})
    np.savez(tmp_path / "x.npz")
    assert open_tensors(tmp_path / "x.npz").specs == {}


def npy(header, data=bytes(8), version=b"\1\0"):
    header = header if isinstance(header, bytes) else repr(header).encode()
    return (
        b"\x93NUMPY"
        + version
        + len(header).to_bytes(2 if version == b"\1\0" else 4, "little")
        + header
        + data
    )


HEADER = {"descr": "<f4", "fortran_order": False, "shape": (2,)}


@pytest.mark.parametrize("member, message", [
    (npy(HEADER | {"descr": "|O"}), "'a' holds Python objects, which would run code"),
    (npy(HEADER | {"descr": [("x", "<f4")]}), "'a' is a table of named fields, expected numbers"),
    (npy(HEADER | {"descr": "<U10"}), "'a' has dtype '<U10', expected one of b1, "),
    (npy(HEADER | {"descr": "<M8[ns]"}), "'a' has dtype"),
    (npy(HEADER | {"descr": "<f4,<f4"}), "'a' has dtype"),
    (npy(HEADER | {"descr": ""}), "'a' has dtype"),
    (npy(HEADER | {"shape": (3,)}), r"'a' is float32\[3\], 12 bytes, and has 8"),
    (npy(HEADER | {"shape": (1,)}), r"'a' is float32\[1\], 4 bytes, and has 8"),
    (npy(HEADER | {"shape": (-2,)}), "'a' has no shape"),
    (npy(HEADER | {"shape": (2.0,)}), "'a' has no shape"),
    (npy(HEADER | {"shape": (2**62, 2**62)}), "'a' is said to take more than"),
    (npy(HEADER | {"shape": [2]}),
     "'a' has a header that does not give descr, fortran_order and shape"),
    (npy(HEADER | {"x": 1}), "'a' has a header that does not give"),
    (npy(b"(" * 5000), "'a' has a header that does not give"),
    (npy(b"-" * 5000 + b"1"), "'a' has a header that does not give"),
    (npy(b"{'shape': (" + b"9" * 5000 + b",)}"), "'a' has a header that does not give"),
    (npy(b"__import__('os').abort()"), "'a' has a header that does not give"),
    (npy(HEADER)[:20], "'a' has a header longer than itself or 10000 bytes"),
    (npy(HEADER, bytes(8), b"\2\0")[:9], "'a' has a header longer"),
    (npy(repr(HEADER).encode() + b" " * 20_000), "'a' has a header longer"),
    (npy(HEADER, version=b"\4\0"), "'a' is not an array in format 1 to 3 of .npy"),
    (b"hello", "'a' is not an array in format"),
    (b"", "'a' is not an array in format"),
], ids=range(23))  # fmt: skip
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_array_that_is_none_or_lies_is_refused(tmp_path, member, message, compression):
    refused(zipped(tmp_path / "x.npz", {"a.npy": member}, compression), message)


def test_an_archive_of_something_else_is_refused(tmp_path):
    refused(
        zipped(tmp_path / "x.npz", {"word/document.xml": b"<x/>"}),
        "is a zip archive of 'word/document.xml'",
    )


# the archive itself


def patched(path, signature, offset, value, after=0):
    """Writes `value` at `offset` from the signature of a record."""
    data = bytearray(path.read_bytes())
    at = data.index(signature, after) + offset
    data[at : at + len(value)] = value
    path.write_bytes(data)


CENTRAL, LOCAL, END = b"PK\1\2", b"PK\3\4", b"PK\5\6"


@pytest.mark.parametrize("signature, offset, value, message", [
    (CENTRAL, 8, b"\1", "'a.npy' is encrypted"),
    (CENTRAL, 10, b"\x0e", "'a.npy' is packed by method 14, expected stored or deflated"),
    (CENTRAL, 20, b"\1", "'a.npy' is said to hold [0-9]+ bytes in [0-9]+"),
    (CENTRAL, 24, struct.pack("<I", 2**31), "'a.npy' is said to hold 2147483648 bytes in"),
    (CENTRAL, 42, b"\xff\xff\xff\x7f", "'a.npy' begins at byte 2147483647"),
    (CENTRAL, 42, b"\xff\xff\xff\xff", "'a.npy' begins at byte 4294967295"),
    (CENTRAL, 42, b"\1", "'a.npy' is not at byte 1, where its directory says"),
    (CENTRAL, 46, b"c", "'c.npy' is not at byte 0"),
    (CENTRAL, 28, b"\xff", "is not at byte 0, where"),
    (LOCAL, 26, b"\xff", "'a.npy' is not at byte 0"),
    (LOCAL, 28, b"\xff", "'a.npy' runs into 'b.npy'"),
    (END, 8, b"\1\0\1\0", "its 1 members take"),
    (END, 8, b"\3\0\3\0", "there is no member at byte|ends within"),
    (END, 8, b"\xff\xff\xff\xff", "there is no member at byte|ends within"),
    (END, 8, b"\1\0\2\0", "it is one of several volumes"),
    (END, 12, b"\xff\xff\xff\xff", "more than 200000 in 100000000"),
    (END, 16, b"\xff\xff\xff\x7f", "its directory of [0-9]+ bytes at byte 2147483647 does not end"),
    (END, 20, b"\1", "its directory is not at its end"),
])  # fmt: skip
def test_a_directory_that_lies_is_refused(tmp_path, signature, offset, value, message):
    path = tmp_path / "x.npz"
    zipped(path, {"a.npy": npy(HEADER), "b.npy": npy(HEADER)})
    assert all(name in all_of(path) for name in "ab")
    patched(path, signature, offset, value)
    refused(path, message)


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "x.npz", "w") as archive,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        archive.writestr("a.npy", npy(HEADER))
        archive.writestr("a.npy", npy(HEADER))
    refused(tmp_path / "x.npz", "the name 'a.npy' is there twice")


def test_members_that_share_their_bytes_or_lie_in_the_directory_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    inner = npy(HEADER)
    local = (
        LOCAL
        + struct.pack("<5H3I2H", 20, 0, 0, 0, 0, zlib.crc32(inner), len(inner), len(inner), 5, 0)
        + b"b.npy"
    )
    zipped(path, {"a.npy": local + inner, "b.npy": inner})
    second = path.read_bytes().index(CENTRAL, path.read_bytes().index(CENTRAL) + 1)
    patched(path, CENTRAL, 42, struct.pack("<I", 35), after=second)
    refused(path, "'a.npy' runs into 'b.npy'")

    # A directory may carry comments: here one that looks like a member.
    with zipfile.ZipFile(path, "w") as archive:
        entry = zipfile.ZipInfo("a.npy")
        entry.comment = local + inner
        archive.writestr(entry, inner)
        archive.writestr("b.npy", inner)
    data = path.read_bytes()
    second = data.rindex(CENTRAL)
    patched(path, CENTRAL, 42, struct.pack("<I", data.rindex(LOCAL)), after=second)
    refused(path, "its directory runs into 'b.npy'")


@pytest.mark.parametrize("size", [100, 10**8])
def test_a_member_that_does_not_unpack_to_its_size_is_refused_without_unpacking_it(tmp_path, size):
    path = tmp_path / "x.npz"
    header = HEADER | {"shape": (250_000,)}
    zipped(
        path, {"a.npy": npy(header, bytes(10**6 if size < 10**6 else 10**8))}, zipfile.ZIP_DEFLATED
    )
    promised = len(npy(header)) - 8 + 10**6
    data = path.read_bytes()
    if size == 100:  # the bytes end too early: the stream is of a shorter array
        packed = zlib.compressobj(wbits=-15)
        shorter = packed.compress(npy(header, bytes(size))) + packed.flush()
        data = data[:35] + shorter + data[data.index(CENTRAL) :]
        path.write_bytes(data)
        patched(path, CENTRAL, 20, struct.pack("<I", len(shorter)))
        patched(path, END, 16, struct.pack("<I", data.index(CENTRAL)))
        refused(path, rf"'a.npy' is said to hold {promised} bytes in {len(shorter)}")
    else:  # they go on and on
        patched(path, CENTRAL, 24, struct.pack("<I", promised))
        tracemalloc.start()
        refused(path, rf"'a.npy' does not unpack to the {promised} bytes that its directory says")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 10e6


def test_a_flipped_bit_in_an_array_is_found_when_it_is_read(tmp_path):
    path = tmp_path / "x.npz"
    for save in (np.savez, np.savez_compressed):
        save(path, a=np.random.default_rng(0).normal(size=1000))
        file = open_tensors(path)
        patched(
            path, LOCAL, 5000, bytes([path.read_bytes()[path.read_bytes().index(LOCAL) + 5000] ^ 1])
        )
        with pytest.raises(
            CheckpointError, match="'a.npy' (does not have its checksum|cannot be unpacked)"
        ):
            file.read("a")


def test_an_archive_cut_anywhere_is_refused(torch, tmp_path):
    torch.save({"a": torch.arange(3.0)}, tmp_path / "x.pt")
    np.savez(tmp_path / "x.npz", a=np.arange(3.0))
    np.savez_compressed(tmp_path / "y.npz", a=np.arange(3.0))
    for name in ("x.pt", "x.npz", "y.npz"):
        data = (tmp_path / name).read_bytes()
        for size in range(len(data)):
            (tmp_path / name).write_bytes(data[:size])
            refused(tmp_path / name, name)
