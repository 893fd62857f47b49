"""Files of tensors, damaged at random.

Whatever is done to a file, it is read, or refused by our own error, in little memory.
"""

import contextlib
import io
import json
import pickle
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from fuzz import damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mammut.weights.files.tensor_file import CheckpointError, open_tensors

pytestmark = pytest.mark.long

_ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([True]),
    "c": np.array(2.5),
}
_fuzzed = settings(
    max_examples=150,
    deadline=2000,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)


def read_or_refuse(path):
    """Return True where every tensor could be read.

    Nothing but our own error comes out, and at most 64 MB are taken.
    """
    tracemalloc.start()
    try:
        file = open_tensors(path)
        for name, spec in file.specs.items():
            array = file.read(name)
            assert (array.shape, array.dtype) == (spec.shape, spec.dtype)
            array.sum()  # touches every byte
        return True
    except CheckpointError as error:
        assert str(path.parent) in str(error)
        return False
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 64e6


def zip_of(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def members_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A valid file of each kind, as bytes."""
    folder = tmp_path_factory.mktemp("originals")
    save_file(_ARRAYS, folder / "safetensors", metadata={"format": "np"})
    np.savez(folder / "npz.npz", **_ARRAYS)
    np.savez_compressed(folder / "packed.npz", **_ARRAYS)
    files = {
        "safetensors": folder / "safetensors",
        "npz": folder / "npz.npz",
        "packed": folder / "packed.npz",
    }
    with contextlib.suppress(ImportError):
        import torch

        tensors = {name: torch.from_numpy(array) for name, array in _ARRAYS.items()}
        state = torch.nn.Linear(2, 2).state_dict() | tensors | {"t": tensors["a.weight"].T}
        torch.save({"epoch": 1, "state_dict": state, "lr": np.float64(0.1)}, folder / "torch")
        files["torch"] = folder / "torch"
    return {kind: path.read_bytes() for kind, path in files.items()}


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target.bin"


@pytest.mark.parametrize("kind", ["safetensors", "npz", "packed", "torch"])
@_fuzzed
@given(data=st.data())
def test_bytes_damaged_at_random_are_read_or_refused(originals, target, kind, data):
    if kind not in originals:
        pytest.skip("torch is not here")
    target.write_bytes(originals[kind])
    assert read_or_refuse(target)
    target.write_bytes(data.draw(damaged(originals[kind])))
    read_or_refuse(target)


@_fuzzed
@given(data=st.data())
def test_a_pickle_damaged_at_random_is_read_or_refused(originals, target, data):
    if "torch" not in originals:
        pytest.skip("torch is not here")
    members = members_of(originals["torch"])
    members["torch/data.pkl"] = data.draw(damaged(members["torch/data.pkl"]))
    target.write_bytes(zip_of(members))
    read_or_refuse(target)


_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@_fuzzed
@given(value=_values, protocol=st.integers(0, 5))
def test_a_pickle_of_anything_is_read_or_refused(target, value, protocol):
    target.write_bytes(zip_of({"x/data.pkl": pickle.dumps({"state_dict": value}, protocol)}))
    read_or_refuse(target)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@_fuzzed
@given(data=st.data())
def test_an_array_damaged_at_random_is_read_or_refused(originals, target, compression, data):
    members = members_of(originals["npz"])
    name = data.draw(st.sampled_from(sorted(members)))
    members[name] = data.draw(damaged(members[name]))
    target.write_bytes(zip_of(members, compression))
    read_or_refuse(target)


_numbers = st.integers(-2, 30) | st.sampled_from([2**31, 2**63, 2**64, 10**400])
_dtypes = st.sampled_from(
    ["<f4", "|b1", ">i8", "<V2", "|O", "|V1", "<c16", "", "f4", "<f4,<f4", "<U1"]
)


@_fuzzed
@given(
    descr=_dtypes | st.text(max_size=3) | _values,
    fortran=st.booleans() | _values,
    shape=st.lists(_numbers, max_size=4).map(tuple) | _values,
    data=st.binary(max_size=64),
)
def test_an_array_of_any_header_is_read_or_refused(target, descr, fortran, shape, data):
    header = repr({"descr": descr, "fortran_order": fortran, "shape": shape}).encode(
        "utf-8", "surrogatepass"
    )
    target.write_bytes(
        zip_of({"a.npy": b"\x93NUMPY\3\0" + struct.pack("<I", len(header)) + header + data})
    )
    read_or_refuse(target)


_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "BOOL", "F4", "U8"]) | _values,
        "shape": st.lists(_numbers, max_size=4) | _values,
        "data_offsets": st.lists(_numbers, min_size=1, max_size=3) | _values,
    },
    optional={"x": _values},
)


def as_json(value) -> bytes:
    return json.dumps(value, default=lambda other: other.decode("latin-1")).encode()


@_fuzzed
@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__"]) | st.text(max_size=2), _entries | _values
    ),
    extra=st.integers(-9, 9),
    data=st.binary(max_size=64),
)
def test_a_safetensors_header_of_anything_is_read_or_refused(target, header, extra, data):
    raw = as_json(header)
    target.write_bytes(max(0, len(raw) + extra).to_bytes(8, "little") + raw + data)
    read_or_refuse(target)


@_fuzzed
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=4),
    trailing=st.sampled_from([0, 0, 0, 1]),
)
def test_a_safetensors_header_that_fits_is_read_and_one_that_does_not_is_refused(
    target, shapes, trailing
):
    header, at = {}, 0
    for number, shape in enumerate(shapes):
        size = int(np.prod(shape))
        header[f"t{number}"] = {"dtype": "U8", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = as_json(header)
    target.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(at + trailing))
    assert read_or_refuse(target) == (trailing == 0)


@_fuzzed
@given(
    weight_map=st.dictionaries(
        st.sampled_from(["a.weight", "b", "c"]), st.sampled_from(["one", "two", ".."])
    )
)
def test_an_index_of_anything_is_read_or_refused(originals, target, weight_map):
    (target.parent / "one").write_bytes(originals["safetensors"])
    (target.parent / "two").write_bytes(originals["packed"])
    target.write_bytes(as_json({"weight_map": weight_map}))
    assert read_or_refuse(target) == (weight_map == dict.fromkeys(_ARRAYS, "one") or not weight_map)


@pytest.mark.parametrize("kind", ["torch", "npz"])
@_fuzzed
@given(data=st.data())
def test_numbers_overwritten_in_the_directory_of_an_archive_are_refused_or_do_not_matter(
    originals, target, kind, data
):
    if kind not in originals:
        pytest.skip("torch is not here")
    raw = bytearray(originals[kind])
    records = (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7")
    record = data.draw(st.sampled_from([record for record in records if record in raw]))
    places = [at for at in range(len(raw)) if raw.startswith(record, at)]
    at = data.draw(st.sampled_from(places)) + data.draw(st.integers(4, 45))
    number = data.draw(_numbers | st.integers(0, len(raw)))
    width = data.draw(st.sampled_from([1, 2, 4, 8]))
    raw[at : at + width] = (number % 256**width).to_bytes(width, "little")
    target.write_bytes(raw)
    read_or_refuse(target)


@_fuzzed
@given(size=st.integers(0, 10**5), promised=st.integers(0, 10**6))
def test_an_array_that_unpacks_to_another_size_than_promised_is_refused(target, size, promised):
    header = repr({"descr": "|u1", "fortran_order": False, "shape": (promised,)}).encode()
    member = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header
    true = member + bytes(size)
    raw = bytearray(zip_of({"a.npy": true}, zipfile.ZIP_DEFLATED))
    at = raw.index(b"PK\1\2")
    raw[at + 16 : at + 20] = struct.pack("<I", zlib.crc32(member + bytes(promised)))
    raw[at + 24 : at + 28] = struct.pack("<I", len(member) + promised)
    target.write_bytes(raw)
    assert read_or_refuse(target) == (size == promised)
