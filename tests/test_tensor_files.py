"""Files of tensors, read and written.

What others wrote is read as it is, what we write they read, and damage is refused.
"""

import json
import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mammut.weights.files import tensor_file
from mammut.weights.files.tensor_file import (
    CheckpointError,
    TensorSpec,
    open_tensors,
    write_safetensors,
    write_sharded,
)

RNG = np.random.default_rng(0)
ARRAYS = {
    "text.weight": RNG.normal(size=(3, 4)).astype(np.float32),
    "scale": np.array(2.5),
    "empty": np.zeros((0, 5), np.int64),
    "odd": np.arange(3, dtype=np.uint8),
    "mask": np.array([[True], [False]]),
    "visual.ünïcode": RNG.normal(size=5).astype(np.float16),
    "z": (np.arange(3) + 1j).astype(np.complex64),
    "big": np.array([2**63], np.uint64),
}


def specs_of(arrays):
    return {name: TensorSpec(array.shape, array.dtype) for name, array in arrays.items()}


def all_of(path):
    file = open_tensors(path)
    return {name: file.read(name) for name in file.specs}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert (got[name].shape, got[name].dtype) == (array.shape, array.dtype), name
        assert got[name].tobytes() == array.tobytes(), name


def raw_safetensors(path, header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(
        (len(header) if length is None else length).to_bytes(8, "little") + header + data
    )
    return path


def test_what_the_safetensors_library_writes_is_read_as_it_is(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(ARRAYS, path, metadata={"format": "np", "run": "7"})
    file = open_tensors(path)
    assert file.metadata == {"format": "np", "run": "7"} and file.path == path
    assert file.specs == specs_of(ARRAYS)
    assert file.specs["text.weight"].nbytes == 48
    assert_same(all_of(path), ARRAYS)


def test_what_we_write_the_safetensors_library_reads(tmp_path):
    path = tmp_path / "new" / "x.safetensors"
    told = []
    arrays = ARRAYS | {"transposed": RNG.normal(size=(4, 3)).astype(np.float32).T}
    write_safetensors(
        path, specs_of(arrays), arrays.__getitem__, metadata={"a": "ö"}, progress=told.append
    )
    assert_same(load_file(path), arrays)
    with safe_open(path, "np") as file:
        assert file.metadata() == {"a": "ö"}
    assert sum(told) == sum(array.nbytes for array in arrays.values()) and len(told) == len(arrays)
    assert_same(all_of(path), arrays)
    assert [file.name for file in path.parent.iterdir()] == ["x.safetensors"]


def test_every_tensor_lies_where_its_numbers_can_be_used_in_place(tmp_path):
    arrays = {"odd": np.ones(3, np.uint8), "half": np.ones(3, np.float16), "double": np.ones(3)}
    for size in range(1, 9):  # of the header
        arrays = {"x" * size: np.ones(1)} | arrays
        write_safetensors(tmp_path / "x.safetensors", specs_of(arrays), arrays.__getitem__)
        assert all(array.flags.aligned for array in all_of(tmp_path / "x.safetensors").values())


def test_half_and_quarter_precision_are_the_same_numbers_to_torch(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    kinds = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]
    numbers = torch.tensor([0.5, -1.75, 24.0, float("nan")])
    save_torch(
        {kind: numbers.to(getattr(torch, kind)) for kind in kinds}, tmp_path / "torch.safetensors"
    )
    arrays = all_of(tmp_path / "torch.safetensors")
    assert {name: array.dtype for name, array in arrays.items()} == {
        kind: np.dtype(getattr(ml_dtypes, kind)) for kind in kinds
    }
    write_safetensors(tmp_path / "ours.safetensors", specs_of(arrays), arrays.__getitem__)
    for kind, tensor in load_torch(tmp_path / "ours.safetensors").items():
        assert str(tensor.dtype) == f"torch.{kind}"
        np.testing.assert_array_equal(tensor.float().numpy(), numbers.numpy())
        np.testing.assert_array_equal(arrays[kind].astype(np.float32), numbers.numpy())


def test_a_tensor_is_a_read_only_view_of_the_file(tmp_path):
    save_file(ARRAYS, tmp_path / "x.safetensors")
    file = open_tensors(tmp_path / "x.safetensors")
    first, second = file.read("text.weight"), file.read("text.weight")
    assert np.shares_memory(first, second) and not first.flags.writeable
    with pytest.raises(CheckpointError, match="x.safetensors has no tensor 'head'"):
        file.read("head")


def test_a_link_to_a_file_is_opened(tmp_path):
    save_file(ARRAYS, tmp_path / "blob")
    (tmp_path / "x.safetensors").symlink_to(tmp_path / "blob")
    assert_same(all_of(tmp_path / "x.safetensors"), ARRAYS)


@pytest.mark.parametrize("given, message", [
    (np.zeros((4, 3), np.float32),
     r"'text.weight' was read as float32\[4, 3\], expected float32\[3, 4\]"),
    (np.zeros((3, 4)), r"'text.weight' was read as float64\[3, 4\], expected float32"),
])  # fmt: skip
def test_a_tensor_that_is_not_as_told_is_refused_and_the_old_file_stays(tmp_path, given, message):
    path = tmp_path / "x.safetensors"
    save_file({"old": np.ones(2)}, path)
    with pytest.raises(ValueError, match=message):
        write_safetensors(path, specs_of(ARRAYS), (ARRAYS | {"text.weight": given}).__getitem__)
    assert_same(load_file(path), {"old": np.ones(2)})
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize("specs, metadata, message", [
    ({"a": TensorSpec((1,), np.dtype(np.complex128))}, None,
     "'a' is complex128, expected one of bool"),
    ({"a": TensorSpec((1,), np.dtype(">f4"))}, None, "'a' is >f4, expected one of bool"),
    ({"__metadata__": TensorSpec((1,), np.dtype("f4"))}, None, "'__metadata__' cannot be a name"),
    ({"\ud800": TensorSpec((1,), np.dtype("f4"))}, None, "cannot be a name"),
    ({}, {"a": "\ud800"}, "cannot be a name or a text"),
])  # fmt: skip
def test_what_the_format_cannot_hold_is_refused_before_anything_is_read(
    tmp_path, specs, metadata, message
):
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path / "x.safetensors", specs, {}.__getitem__, metadata=metadata)
    assert os.listdir(tmp_path) == []


def test_shards_hold_as_much_as_they_may_and_are_read_as_one_file(tmp_path):
    arrays = {f"layer.{i}": np.full(10, i, np.float32) for i in range(5)} | {
        "head": np.ones(100, np.float32)
    }
    names = write_sharded(
        tmp_path, "model", specs_of(arrays), arrays.__getitem__, max_bytes=80, metadata={"a": "b"}
    )
    assert names == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)] + [
        "model.safetensors.index.json"
    ]
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    held = [list(load_file(tmp_path / name)) for name in names[:-1]]
    assert [sorted(names) for names in held] == [
        ["layer.0", "layer.1"],
        ["layer.2", "layer.3"],
        ["layer.4"],
        ["head"],
    ]
    index = json.loads((tmp_path / names[-1]).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    file = open_tensors(tmp_path / names[-1])
    assert list(file.specs) == list(arrays) and file.metadata == {"a": "b"}
    assert_same(all_of(tmp_path / names[-1]), arrays)


def test_what_was_written_before_is_not_mixed_with_what_is_written_now(tmp_path):
    old, new = ({f"layer.{i}": np.full(10, i + value) for i in range(3)} for value in (0, 100))

    def write(arrays, max_bytes):
        return write_sharded(
            tmp_path, "model", specs_of(arrays), arrays.__getitem__, max_bytes=max_bytes
        )

    index = tmp_path / "model.safetensors.index.json"
    assert write(old, 10**6) == ["model.safetensors"]
    write(new, 80)
    assert_same(all_of(index), new)
    assert not (tmp_path / "model.safetensors").exists()
    files = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    with pytest.raises(KeyError):
        write_sharded(
            tmp_path, "model", specs_of(old), {"layer.0": old["layer.0"]}.__getitem__, max_bytes=80
        )
    assert files == {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    write(old, 10**6)
    assert_same(load_file(tmp_path / "model.safetensors"), old)
    assert not index.exists()
    with pytest.raises(ValueError, match="max_bytes is 0, expected at least 1"):
        write(old, 0)


def test_a_file_is_written_from_the_very_file_that_it_replaces(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(ARRAYS, path)
    file = open_tensors(path)
    write_safetensors(path, file.specs, file.read)
    assert_same(all_of(path), ARRAYS)


@pytest.mark.long
@pytest.mark.skipif(
    not pathlib.Path("/proc/self/status").exists(), reason="tells the peak of resident memory"
)
def test_a_large_file_is_written_and_read_with_one_tensor_in_memory(tmp_path):
    script = """
import pathlib, re, sys
import numpy as np
from mammut.weights.files.tensor_file import TensorSpec, open_tensors, write_safetensors

def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) * 1024

specs = {f"layer.{i}": TensorSpec((2**18, 10), np.dtype(np.float32)) for i in range(30)}
before = peak()
write_safetensors(sys.argv[1], specs, lambda name: np.full((2**18, 10), int(name[6:]), np.float32))
written = peak()
file = open_tensors(sys.argv[1])
assert all(file.read(name).max() == int(name[6:]) for name in file.specs)
print(written - before, peak() - before)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "x.safetensors")]
    grown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert (tmp_path / "x.safetensors").stat().st_size > 300e6
    assert max(map(int, grown)) < 60e6


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize("header, size, message", [
    ({"a": ENTRY}, 4, "has 4 bytes of tensors, its header gives 8"),
    ({"a": ENTRY}, 12, "has 12 bytes of tensors, its header gives 8"),
    ({"a": ENTRY, "b": ENTRY}, 8,
     r"'b' is float32\[2\], expected at bytes 8 to 16, and said to be at 0 to 8"),
    ({"a": ENTRY | {"data_offsets": [4, 12]}}, 12,
     "'a' is .* expected at bytes 0 to 8, and said to be at 4 to 12"),
    ({"a": ENTRY | {"data_offsets": [-8, 0]}}, 0, "'a' is .* said to be at -8 to 0"),
    ({"a": ENTRY | {"data_offsets": [8, 0]}}, 8, "'a' is .* said to be at 8 to 0"),
    ({"a": ENTRY | {"shape": [3]}}, 8, "'a' is .* expected at bytes 0 to 12"),
    ({"a": ENTRY | {"shape": [-2]}}, 8,
     "'a' has no shape of at most 32 axes, none of them negative"),
    ({"a": ENTRY | {"shape": [2.0]}}, 8, "'a' has no shape"),
    ({"a": ENTRY | {"shape": [True, 2]}}, 8, "'a' has no shape"),
    ({"a": ENTRY | {"shape": [1] * 99}}, 8, "'a' has no shape"),
    ({"a": ENTRY | {"shape": [2**40, 2**40]}}, 8, "'a' is said to take more than"),
    ({"a": ENTRY | {"shape": [0, 2**62]}}, 8, "'a' is said to take more than"),
    ({"a": ENTRY | {"dtype": "F4"}}, 8, "'a' has dtype 'F4', expected one of BOOL, U8"),
    ({"a": ENTRY | {"scale": 2}}, 8, "'a' does not give dtype, shape and data_offsets alone"),
    ({"a": {"dtype": "F32", "shape": [2]}}, 8, "'a' does not give dtype"),
    ({"a": None}, 8, "'a' does not give dtype"),
    ({"__metadata__": {"a": 1}}, 0, "has a __metadata__ that is not made of texts"),
    ({"\ud800": ENTRY}, 8, r"the name '\\ud800' is not text"),
    (b'{"a": {}, "a": {}}', 0, "the key 'a' is there 2 times"),
    (b'{"a": NaN}', 0, "is not JSON: NaN is no number"),
    (b'{"a": ' + b"[" * 10**5, 0, "is not JSON"),
    (b'{"a": ' + b"9" * 10**4 + b"}", 0, "is not JSON"),
    (b'{"a": "\xff"}', 0, "is not JSON"),
    (b'{"a": [' + b"{}," * 2_000_000 + b"0]}", 0,
     "has more than 100000000 bytes or 3200000 values"),
    (b"{", 0, "is not JSON"),
])  # fmt: skip
def test_a_safetensors_header_that_lies_is_refused_by_file_and_key(tmp_path, header, size, message):
    path = raw_safetensors(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(CheckpointError, match=message) as error:
        open_tensors(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("length, message", [
    (3, "is not JSON"),
    *((n, "is cut short or damaged") for n in (10**6, 10**8 + 1, 2**63, 2**64 - 1)),
])  # fmt: skip
def test_a_header_that_is_not_as_long_as_it_says_is_refused(tmp_path, length, message):
    path = raw_safetensors(tmp_path / "x.safetensors", {"a": ENTRY}, bytes(8), length)
    with pytest.raises(CheckpointError, match=f"x.safetensors {message}"):
        open_tensors(path)


def test_a_header_that_is_no_object_or_of_too_many_tensors_is_refused(tmp_path, monkeypatch):
    assert tensor_file.MAX_TENSORS == 100_000
    monkeypatch.setattr(tensor_file, "MAX_TENSORS", 1_000)  # to write fewer
    with pytest.raises(CheckpointError, match="is a JSON list, expected an object"):
        open_tensors(raw_safetensors(tmp_path / "x.safetensors", [1]))
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    with pytest.raises(CheckpointError, match="has 1001 tensors, more than 1000"):
        open_tensors(
            raw_safetensors(tmp_path / "x.safetensors", {str(i): entry for i in range(1_001)})
        )


def test_a_truth_value_that_is_neither_is_refused_when_read(tmp_path):
    header = {"a": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}
    file = open_tensors(raw_safetensors(tmp_path / "x.safetensors", header, b"\1\2"))
    with pytest.raises(CheckpointError, match="'a' holds bytes that are neither true nor false"):
        file.read("a")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    save_file(ARRAYS, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    for size in range(len(data)):
        (tmp_path / "x.safetensors").write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="x.safetensors"):
            open_tensors(tmp_path / "x.safetensors")


def test_what_is_no_file_is_refused_at_once(tmp_path):
    (tmp_path / "empty.pt").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe.pt")
    for name, message in {
        "nothing": "nothing is missing",
        "empty.pt": "empty.pt is empty",
        "": "is a folder, a pipe or a device",
        "pipe.pt": "is a folder, a pipe or a device",
        "loop": "loop cannot be read",
        "x" * 300: "cannot be read",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            open_tensors(tmp_path / name)


@pytest.mark.parametrize(
    "content", [b"hello", b"\0" * 600, b"\x89PNG\r\n", b"[1, 2]", b"\x93NUMPY\1\0"]
)
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(
        CheckpointError,
        match="x.bin is not safetensors, an index of it, a torch.save archive or .npz",
    ):
        open_tensors(tmp_path / "x.bin")


@pytest.fixture
def sharded(tmp_path):
    """Write two shards; return their index and a way to rewrite it.

    The first shard holds `a`, the second `b`; the function writes another weight_map.
    """
    folder = tmp_path / "model"
    arrays = {"a": np.zeros(4), "b": np.ones(4)}
    *_, index = write_sharded(folder, "model", specs_of(arrays), arrays.__getitem__, max_bytes=32)

    def write(weight_map):
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))

    return folder / index, write


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("weight_map, message", [
    ({"a": FIRST, "b": FIRST}, f"has 'b' in '{FIRST}', which does not have it"),
    ({"a": FIRST, "b": SECOND, "c": SECOND}, f"has 'c' in '{SECOND}', which does not have it"),
    ({"a": FIRST, "c": SECOND}, f"has 'b' nowhere, and '{SECOND}' has it"),
    ({"a": FIRST, "b": "copy.safetensors"}, f"has 'a' in '{FIRST}', and 'copy.safetensors' has it"),
    ({"a": "nothing.safetensors"}, "names the shard 'nothing.safetensors', which cannot be found"),
    ({"a": "../outside.safetensors"},
     "names the shard '../outside.safetensors', which is outside its folder"),
    ({"a": "/etc/passwd"}, "names the shard '/etc/passwd', which is outside its folder"),
    ({"a": "link.safetensors"}, "names the shard 'link.safetensors', which is outside its folder"),
    ({"a": "."}, "is a folder, a pipe or a device"),
    ({"a": "\0"}, "which cannot be found"),
    ({"a": 1}, "has no weight_map from tensors to files"),
    ([], "has no weight_map from tensors to files"),
])  # fmt: skip
def test_an_index_that_lies_or_leaves_its_folder_is_refused(sharded, weight_map, message):
    path, write = sharded
    folder = path.parent
    save_file({"a": np.zeros(4)}, folder.parent / "outside.safetensors")
    save_file({"a": np.zeros(4), "b": np.ones(4)}, folder / "copy.safetensors")
    (folder / "link.safetensors").symlink_to(folder.parent / "outside.safetensors")
    write(weight_map)
    with pytest.raises(CheckpointError, match=message):
        open_tensors(path)


def test_a_shard_named_by_its_whole_path_is_refused_wherever_it_lies(sharded):
    path, write = sharded
    write({"a": str(path.parent / FIRST)})
    with pytest.raises(CheckpointError, match="which is outside its folder"):
        open_tensors(path)


def test_the_metadata_of_shards_is_what_all_of_them_say(sharded):
    path, _ = sharded
    save_file(
        {"a": np.zeros(4)}, path.parent / FIRST, metadata={"format": "np", "part": "1", "first": ""}
    )
    save_file({"b": np.ones(4)}, path.parent / SECOND, metadata={"format": "np", "part": "2"})
    assert open_tensors(path).metadata == {"format": "np"}


def test_a_cache_that_links_index_and_shards_to_one_folder_is_read(sharded, tmp_path):
    path, _ = sharded
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in path.parent.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert list(open_tensors(snapshot / path.name).specs) == ["a", "b"]
