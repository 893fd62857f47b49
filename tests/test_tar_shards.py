"""Tar shards against Python's tarfile, which reads from front to back; broken shards."""

import collections
import errno
import gzip
import io
import json
import os
import pathlib
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image

from mammut import prepare
from mammut.config import DataConfig
from mammut.data import sources, tar_shards
from mammut.data.batches import TrainBatches
from mammut.data.config import Field
from mammut.data.examples import BadExample, Question, Source
from mammut.data.tar_paths import shard_paths
from mammut.testing import tiny_processor

SIZE = 16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    """Where indexes are kept during a test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mammut" / "shards"


def open_set(spec: str, field: Field = "captions") -> Source:
    return sources.open_source(spec, image_size=SIZE, field=field)


def picture(level: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (level, level, level)).save(file, kind)
    return file.getvalue()


def write_tar(
    path: pathlib.Path, files: list[tuple[str, bytes]], tar_format: int = tarfile.GNU_FORMAT
) -> pathlib.Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pairs_of(first: int, count: int) -> list[tuple[str, bytes]]:
    """Files of examples: image i is of grey level i."""
    names = range(first, first + count)
    return [
        (f"{i:06d}.{end}", said)
        for i in names
        for end, said in (("png", picture(i)), ("txt", b"level %d\n" % i))
    ]


def write_shards(folder: pathlib.Path, count: int = 3, examples: int = 4) -> str:
    for shard in range(count):
        write_tar(folder / f"{shard:05d}.tar", pairs_of(shard * examples, examples))
    return f"tar:{folder}/{{00000..{count - 1:05d}}}.tar"


def refusal(spec: str, field: Field = "captions") -> str:
    with pytest.raises(ValueError) as error:
        open_set(spec, field)
    assert repr(spec) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def outcomes(source: Source) -> list[list[str] | str]:
    """The captions of each example, or the cause why it has none."""
    found = []
    for index in range(len(source)):
        try:
            found.append(source[index].captions)
        except BadExample as error:
            found.append(error.cause)
    return found


# The tar format


def as_tarfile_reads(path: pathlib.Path) -> dict[str, dict[str, bytes]]:
    """The files of each key by what follows the first dot of their names."""
    examples = collections.defaultdict(dict)
    with tarfile.open(path, ignore_zeros=True) as tar:
        for member in tar:
            if member.isfile():
                folder, slash, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                examples[folder + slash + stem][extension] = tar.extractfile(member).read()
    return examples


def as_we_read(path: pathlib.Path) -> list[dict[str, bytes]]:
    shards = tar_shards.TarShards(str(path))
    found = []
    for example in range(len(shards)):
        files = [
            shards.read(example, column)
            for column in tar_shards.COLUMNS
            if shards.count(example, column)
        ]
        found.append(
            {name.rpartition("/")[2].partition(".")[2]: content for name, content in files}
        )
    return found


LONG = "folder.with.dots/" + "long/" * 40 + "ünï" * 20


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_random_access_equals_reading_from_front_to_back(tmp_path, tar_format):
    rng = np.random.default_rng(0)
    path, long = (
        tmp_path / "set.tar",
        LONG if tar_format != tarfile.USTAR_FORMAT else "a/" * 90 + "b" * 60,
    )
    with tarfile.open(path, "w", format=tar_format) as tar:
        for number, stem in enumerate(
            ["./first", "a/b.c/second", long, "third", f"{long}2", "last"]
        ):
            folder = tarfile.TarInfo(f"folder{number}")
            folder.type, folder.size = tarfile.DIRTYPE, 0
            tar.addfile(folder)
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                link = tarfile.TarInfo(f"linked{number}.jpg")
                link.type, link.linkname = (
                    kind,
                    "l" * 99 if tar_format == tarfile.USTAR_FORMAT else long + ".jpg",
                )
                tar.addfile(link)
            for extension in ("jpg", "txt", "json"):
                # Around a multiple of the block, where sizes and ends go wrong.
                content = rng.bytes(512 * int(rng.integers(0, 30)) + int(rng.integers(-1, 2)) + 1)
                info = tarfile.TarInfo(f"{stem}.{extension}")
                info.size, info.mtime = len(content), 1.5 if tar_format == tarfile.PAX_FORMAT else 1
                tar.addfile(info, io.BytesIO(content))
    assert as_we_read(path) == list(as_tarfile_reads(path).values())
    assert len(as_we_read(path)) == 6


def test_a_global_header_and_sizes_in_pax_records_are_read(tmp_path):
    path = tmp_path / "set.tar"
    with tarfile.open(
        path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "of a commit"}
    ) as tar:
        info = tarfile.TarInfo("0.jpg")
        info.size, info.pax_headers = 700, {"size": "700", "path": "other.jpg", "note": "a=b\nc"}
        tar.addfile(info, io.BytesIO(bytes(700)))
        tar.addfile(tarfile.TarInfo("other.txt"))
    assert (
        as_we_read(path)
        == list(as_tarfile_reads(path).values())
        == [{"jpg": bytes(700), "txt": b""}]
    )


def test_gnus_large_numbers_are_read(tmp_path):
    path = write_tar(tmp_path / "set.tar", [("0.jpg", bytes(range(256)) * 3)])
    block = bytearray(path.read_bytes())
    block[124:136] = b"\x80" + (768).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    path.write_bytes(block)
    assert (
        as_we_read(path)
        == list(as_tarfile_reads(path).values())
        == [{"jpg": bytes(range(256)) * 3}]
    )


def test_shards_joined_into_one_file_are_read_to_the_end(tmp_path):
    parts = [write_tar(tmp_path / f"{n}.tar", pairs_of(10 * n, 3)).read_bytes() for n in range(3)]
    joined = tmp_path / "joined.tar"
    joined.write_bytes(b"".join(parts))
    assert as_we_read(joined) == list(as_tarfile_reads(joined).values())
    assert len(as_we_read(joined)) == 9


def test_a_key_ends_at_the_first_dot_after_the_last_slash(tmp_path):
    names = [
        "a.b/c.jpg",
        "a.b/c.seg.png",
        "a.b/c.JSON",
        "a/c.TXT",
        ".hidden.jpg",
        "._c.jpg",
        "noext",
        "a.b/c.npy",
    ]
    shards = tar_shards.TarShards(
        str(write_tar(tmp_path / "set.tar", [(name, name.encode()) for name in names]))
    )
    found = [
        [shards.count(example, column) for column in tar_shards.COLUMNS]
        for example in range(len(shards))
    ]
    assert found == [[1, 0, 1], [0, 1, 0]]
    assert [shards.name(0), shards.read(0, tar_shards.JSON), shards.name(1)] == [
        "a.b/c.jpg",
        ("a.b/c.JSON", b"a.b/c.JSON"),
        "a/c.TXT",
    ]


def test_of_several_images_of_one_key_jpg_is_meant_before_png(tmp_path):
    files = [
        (f"{key}.{end}", end.encode())
        for key, ends in {"0": "png jpg", "1": "webp png"}.items()
        for end in ends.split()
    ]
    shards = tar_shards.TarShards(str(write_tar(tmp_path / "set.tar", files)))
    assert [shards.read(example, tar_shards.IMAGE) for example in (0, 1)] == [
        ("0.jpg", b"jpg"),
        ("1.png", b"png"),
    ]


# Patterns


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{00008..00010}.tar", ["00008.tar", "00009.tar", "00010.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}{0..1}.tar", ["a0.tar", "a1.tar", "b0.tar", "b1.tar"]),
        ("[0-1]x?.tar", ["0x1.tar", "0x9.tar", "1x1.tar"]),
        ("b*.tar::a0.tar", ["b0.tar", "b1.tar", "a0.tar"]),
        ("**/in.tar", ["deep/er/in.tar"]),
    ],
)
def test_patterns_mean_what_they_mean_in_a_shell(tmp_path, pattern, names):
    (tmp_path / "deep/er").mkdir(parents=True)
    shards = (
        "00008.tar 00009.tar 00010.tar 8 9 10 2 1 0 a0.tar a1.tar b0.tar b1.tar 1x1.tar 0x9.tar"
    )
    for name in f"{shards} 0x1.tar".split():
        (tmp_path / name).touch()
    (tmp_path / "deep/er/in.tar").touch()
    whole = "::".join(f"{tmp_path}/{part}" for part in pattern.split("::"))
    assert tar_shards.shard_paths(whole) == [tmp_path / name for name in names]


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_shards(tmp_path)
    assert len(open_set("tar:~/{00000..00001}.tar::~/*2.tar")) == 12


@pytest.mark.parametrize(
    "folder", ["set[1]", "set[0-9]", "a::b", "a*b", "{a,b}", "[2:]", "v{0..3}"]
)
def test_a_path_that_exists_is_meant_before_a_pattern(tmp_path, folder):
    for name in (folder, "set1"):  # `set[1]` as a wildcard is this one
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, count=3 if name == folder else 1)
    path = tmp_path / folder
    assert len(open_set(f"tar:{path}/00000.tar")) == 4
    assert len(open_set(f"tar:{path}/00000.tar[1:3]")) == 2
    for pattern in ("*.tar", "0000[0-2].tar", "{00000..00002}.tar"):
        assert len(open_set(f"tar:{path}/{pattern}")) == 12
    assert len(open_set(f"tar:{path}/0000?.tar[:50%]")) == 6


@pytest.mark.parametrize("name", ["{a,b}", "{1..3}", "x{a,b}y{0..1}"])
@pytest.mark.parametrize("pattern", ["*.tar", "{0..1}.tar", "?.tar", "{0,1}.t[a]r"])
def test_a_folder_with_braces_is_meant_before_a_pattern(tmp_path, name, pattern):
    (tmp_path / name).mkdir()
    for number in range(2):
        (tmp_path / name / f"{number}.tar").write_bytes(b"")
    found = shard_paths(f"{tmp_path}/{name}/{pattern}")
    assert found == [tmp_path / name / "0.tar", tmp_path / name / "1.tar"]


@pytest.mark.parametrize("name", ["set[1].tar", "set?.tar", "set*.tar", "set{1,2}.tar"])
def test_a_shard_that_exists_is_meant_before_a_pattern(tmp_path, name):
    for other in (name, "set1.tar", "set2.tar"):
        (tmp_path / other).write_bytes(b"")
    assert shard_paths(f"{tmp_path}/{name}") == [tmp_path / name]


@pytest.mark.parametrize("name", ["pipe:0.tar", "s3://b/0.tar"])
def test_a_path_that_looks_like_an_address_is_a_path(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is not a path"):
        shard_paths(name)
    pathlib.Path(name).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(name).write_bytes(b"")
    assert shard_paths(name) == [pathlib.Path(name)]


def test_a_path_that_ends_like_a_slice_is_a_path(tmp_path):
    (tmp_path / "photos[1:2]").mkdir()
    lines = [json.dumps({"file": f"{n}.jpg", "captions": ["x"]}) for n in range(5)]
    (tmp_path / "photos[1:2]" / "set.jsonl").write_text("\n".join(lines))
    assert len(open_set(f"jsonl:{tmp_path}/photos[1:2]")) == 5
    assert len(open_set(f"jsonl:{tmp_path}/photos[1:2][1:]")) == 4


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("/nowhere/{00..11}.tar", "12 of the 12 shards do not exist, the first is /nowhere/00.tar"),
        ("/nowhere/*.tar", "no file is called /nowhere/.*, expected at least one shard"),
        ("/nowhere/{0..9999999999}.tar", "range of more than 1,000,000"),
        ("/nowhere/{0..9999}{0..9999}.tar", "more than 1,000,000"),
        ("s3://bucket/{0..3}.tar", "is not a path: .* copy or mount them first"),
        ("pipe:gsutil cat gs://b/0.tar", "is not a path"),
        ("/", "is not a file"),
    ],
)
def test_patterns_that_mean_nothing_are_refused(pattern, expected):
    with pytest.raises(ValueError, match=expected):
        tar_shards.TarShards(pattern)


def test_a_missing_shard_of_a_range_is_named(tmp_path):
    spec = write_shards(tmp_path)
    (tmp_path / "00001.tar").unlink()
    said = refusal(spec)
    assert (
        "1 of the 3 shards do not exist" in said
        and "00001.tar" in said
        and "narrower pattern" in said
    )
    assert len(open_set(f"tar:{tmp_path}/00000.tar::{tmp_path}/00002.tar")) == 8


# Broken shards


def test_a_shard_cut_short_anywhere_is_refused_by_name(tmp_path):
    spec = write_shards(tmp_path)
    path = tmp_path / "00001.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    # In a header, in the bytes of a file, in its padding, between files, and where only the end
    # mark is missing.
    last = members[-1]
    between = [member.offset for member in members]
    cuts = [
        0,
        100,
        512,
        members[0].offset_data + 5,
        last.offset_data + 3,
        last.offset_data + last.size,
        *between,
    ]
    for cut in [*cuts, 1024 * 3, last.offset_data + 512]:
        path.write_bytes(whole[:cut])
        said = refusal(spec)
        assert (
            "00001.tar" in said
            and ("cut short" in said or "damaged" in said)
            and "leave it out" in said
        ), cut
    path.write_bytes(whole[: last.offset_data + 1024])
    assert len(open_set(spec)) == 12  # the end mark is there: what is missing is filler


def test_a_header_with_another_checksum_is_refused_where_tarfile_stops_in_silence(tmp_path):
    path = write_tar(tmp_path / "0.tar", pairs_of(0, 4))
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        place = tar.getmembers()[4].offset
    content[place + 3] ^= 1
    path.write_bytes(content)
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 4
    assert f"damaged at byte {place:,}" in refusal(f"tar:{path}")


def with_header(path: pathlib.Path, change) -> None:
    """Changes the first header and gives it the checksum it then has."""
    content = bytearray(path.read_bytes())
    change(content)
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (b"00000070000\0", "should end at byte 29,184"),  # past the end
        (b"00000000001\0", "damaged at byte"),  # the next header is looked for in the picture
        (b"\x80" + b"\xff" * 11, "should end at byte"),
        (b"\xff" * 12, "for a number"),
        (b"-0000000001\0", "for a number"),
        (b"12 34\0      ", "for a number"),
    ],
)
def test_sizes_that_lie_are_refused(tmp_path, size, expected):
    rng = np.random.default_rng(0)
    path = write_tar(tmp_path / "0.tar", [("0.jpg", rng.bytes(3000)), ("0.txt", b"a caption")])
    with_header(path, lambda content: content.__setitem__(slice(124, 136), size))
    said = refusal(f"tar:{path}")
    assert "0.tar" in said and expected in said


def test_long_names_and_pax_records_that_lie_are_refused(tmp_path):
    name = "n" * 200 + ".jpg"
    for tar_format, size, expected in (
        (tarfile.GNU_FORMAT, b"77777777777\0", "expected at most 1 MiB"),
        (tarfile.GNU_FORMAT, b"00003000000\0", "cut short"),
        (tarfile.PAX_FORMAT, b"00000000010\0", "pax records"),
    ):
        path = write_tar(tmp_path / "0.tar", [(name, b"x" * 99)], tar_format)
        with_header(path, lambda content, size=size: content.__setitem__(slice(124, 136), size))
        assert expected in refusal(f"tar:{path}")
    path = write_tar(tmp_path / "0.tar", [(name, b"x" * 99)], tarfile.PAX_FORMAT)
    for wrong in (b"999 path=", b"000 path=", b"2xx path=", b"213_path="):
        content = bytearray(path.read_bytes())
        content[512 : 512 + len(wrong)] = wrong
        (tmp_path / "1.tar").write_bytes(content)
        assert "damaged" in refusal(f"tar:{tmp_path}/1.tar")


def test_no_damage_gives_anything_but_a_refusal_or_a_whole_reading(tmp_path):
    rng = np.random.default_rng(0)
    path = write_tar(
        tmp_path / "0.tar", [("l" * 150 + "0.png", picture(1)), ("0.txt", b"a")], tarfile.PAX_FORMAT
    )
    whole = path.read_bytes()
    refused = 0
    for _ in range(120):
        content = bytearray(whole)
        for place in rng.integers(len(whole), size=3):
            content[place] = rng.integers(256)
        path.write_bytes(content[: rng.integers(len(whole)) if rng.random() < 0.2 else None])
        try:
            as_we_read(path)
        except ValueError:
            refused += 1
    assert 20 < refused < 120


def test_compressed_shards_are_refused_and_told_why(tmp_path):
    path = write_tar(tmp_path / "0.tar", pairs_of(0, 2))
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert "compressed (gzip), which has no random access: unpack it" in refusal(
        f"tar:{tmp_path}/0.tar.gz"
    )
    (tmp_path / "text.tar").write_text("not a tar file\n" * 100)
    assert "no tar file" in refusal(f"tar:{tmp_path}/text.tar")


def test_sparse_files_are_refused(tmp_path):
    path = write_tar(tmp_path / "0.tar", pairs_of(0, 1))
    with_header(path, lambda content: content.__setitem__(156, ord("S")))
    assert "pack it again without --sparse" in refusal(f"tar:{path}")


def test_all_shards_that_cannot_be_used_are_counted(tmp_path):
    spec = write_shards(tmp_path, 5)
    for shard in (1, 3):
        (tmp_path / f"{shard:05d}.tar").write_bytes(b"")
    assert "00001.tar" in refusal(
        spec
    ) and "1 of the other shards cannot be used either" in refusal(spec)


def test_a_shard_without_files_adds_nothing_and_a_set_of_them_is_refused(tmp_path):
    spec = write_shards(tmp_path)
    write_tar(tmp_path / "00001.tar", [])
    assert outcomes(open_set(spec)) == [[f"level {i}"] for i in (0, 1, 2, 3, 8, 9, 10, 11)]
    assert "is empty" in refusal(f"tar:{tmp_path}/00001.tar")


def test_a_pipe_in_place_of_a_shard_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "0.tar")
    assert "is not a file" in refusal(f"tar:{tmp_path}/0.tar")


def test_a_tail_of_zeros_is_damage_and_no_short_shard(tmp_path):
    path = write_tar(tmp_path / "0.tar", pairs_of(0, 40))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    for member in members[:60:7]:  # those behind start in the last record, as files may end
        for start in (member.offset, member.offset_data, member.offset_data + member.size // 2):
            path.write_bytes(whole[:start] + bytes(len(whole) - start))
            said = refusal(f"tar:{path}")
            assert "zeros from byte" in said and "files may be missing" in said, start


@pytest.mark.parametrize("length", [512, 1024, 4096, 8192, 20_480])
def test_zeros_between_files_are_damage(tmp_path, length):
    path = write_tar(tmp_path / "0.tar", pairs_of(0, 40))
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        start = tar.getmembers()[7].offset
    content[start : start + length] = bytes(length)
    path.write_bytes(content)
    assert "damaged" in refusal(f"tar:{path}")


def test_a_shard_of_zeros_is_damage_unless_it_is_an_empty_tar(tmp_path):
    (tmp_path / "0.tar").write_bytes(bytes(10_240))
    (tmp_path / "1.tar").write_bytes(bytes(51_200))
    assert "the set has 0" in refusal(f"tar:{tmp_path}/0.tar")
    assert "zeros from byte 0 to 51,200" in refusal(f"tar:{tmp_path}/1.tar")


@pytest.mark.parametrize("record", [512, 10_240, 32_768, 65_536, 2**20])
def test_every_size_of_a_record_is_taken(tmp_path, record):
    path = write_tar(tmp_path / "0.tar", pairs_of(0, 11))
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    used = last.offset_data + 512
    content = path.read_bytes()[:used]
    path.write_bytes(content + bytes(-(-(used + 1024) // record) * record - used))
    assert len(open_set(f"tar:{path}")) == 11


def test_checksums_of_signed_bytes_are_taken(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("ü.jpg", b"x"), ("ü.txt", b"a")], tarfile.USTAR_FORMAT)
    content = bytearray(path.read_bytes())
    signed = sum(content[:148]) + sum(content[156:512]) + 8 * 32 - 2 * 256
    content[148:156] = b"%06o\0 " % signed
    path.write_bytes(content)
    assert outcomes(open_set(f"tar:{path}")) == [["a"]]
    content[148:156] = b"%06o\0 " % (signed + 256)
    path.write_bytes(content)
    assert "damaged" in refusal(f"tar:{path}")


# Files that are left out

STRANGE = {
    "b.second.jpg": "files with a second dot in their names",
    "b.second.txt": "files with a second dot in their names",
    "._a.jpg": "hidden files",
    "README": "files without an extension",
    "a.npy": "files .npy",
}


def test_files_that_are_no_part_of_an_example_are_counted_and_named(tmp_path, caplog):
    for shard in range(2):
        write_tar(
            tmp_path / f"{shard}.tar",
            [("a.jpg", b"x"), ("a.txt", b"y"), *((name, b"") for name in STRANGE)],
        )
    with tarfile.open(tmp_path / "1.tar", "a") as tar:
        link = tarfile.TarInfo("c.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
        tar.addfile(link)
    for _ in range(2):  # from the headers, and from the kept index
        caplog.clear()
        assert outcomes(open_set(f"tar:{tmp_path}/*.tar")) == [["y"]] * 2
        (said,) = caplog.messages
        assert said == (
            f"tar:{tmp_path}/*.tar: 4 files with a second dot in their names (such as "
            "'b.second.jpg'), 2 hidden files (such as '._a.jpg'), 2 files without an extension "
            "(such as 'README'), 2 files .npy (such as 'a.npy'), 1 links (such as 'c.jpg') are "
            "left out, expected names of a key, one dot, and one of jpg, jpeg, png, webp, txt, "
            "json, cls, mp4, webm, mkv, mov, avi, gif"
        )


def test_entries_that_are_no_files_are_counted_by_their_kind(tmp_path, caplog):
    path = write_tar(tmp_path / "0.tar", [("a.jpg", b"x"), ("a.txt", b"y")])
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, b"Z"):
            entry = tarfile.TarInfo("c.jpg")
            entry.type = kind
            entry.size = 700 if kind == b"Z" else 0
            tar.addfile(entry, io.BytesIO(bytes(700)))
        tar.addfile(tarfile.TarInfo("d.txt"))
    assert len(open_set(f"tar:{path}")) == 2  # a and d: what comes after is found
    (said,) = caplog.messages
    for expected in ("1 links (such as 'c.jpg')", "1 pipes", "1 devices", "1 entries of kind 'Z'"):
        assert expected in said
    assert "folder" not in said


def test_a_set_of_nothing_but_files_that_are_left_out_says_why(tmp_path):
    files = [(f"img.{n:04d}.{end}", b"x") for n in range(9) for end in ("jpg", "txt")]
    said = refusal(f"tar:{write_tar(tmp_path / '0.tar', files)}")
    assert "is empty" in said and "18 files with a second dot" in said and "img.0000.jpg" in said


def test_many_kinds_of_files_that_are_left_out_are_told_in_one_line(tmp_path, caplog):
    files = [("a.jpg", b"x"), ("a.txt", b"y"), *((f"a.{n}", b"") for n in range(99))]
    open_set(f"tar:{write_tar(tmp_path / '0.tar', files)}")
    (said,) = caplog.messages
    assert said.count("files .") == 20 and "79 other files" in said


def test_what_macos_puts_beside_shards_is_not_matched(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    spec = write_shards(folder)
    for name in ("._00000.tar", ".DS_Store"):
        (folder / name).write_bytes(b"\0\5\x16\7")
    assert len(open_set(spec)) == len(open_set(f"tar:{folder}/*")) == 12


# Examples


def test_examples_have_their_image_and_captions_and_the_name_of_both(tmp_path):
    source = open_set(write_shards(tmp_path))
    assert outcomes(source) == [[f"level {i}"] for i in range(12)]
    assert [source[i].image for i in (0, 11)] == [picture(0), picture(11)]
    assert source[5].key == "00001.tar/000005.png"
    assert list(sources.texts(source)) == [f"level {i}" for i in range(12)]


def test_keys_of_shards_in_different_folders_differ(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_shards(tmp_path / folder, 1)
    source = open_set(f"tar:{tmp_path}/{{a,b}}/00000.tar")
    assert [source[i].key for i in (0, 4)] == ["a/00000.tar/000000.png", "b/00000.tar/000000.png"]


def test_slices_of_shards(tmp_path):
    spec = write_shards(tmp_path)
    assert outcomes(open_set(f"{spec}[10:]")) == [["level 10"], ["level 11"]]
    assert outcomes(open_set(f"{spec}[::5]")) == [["level 0"], ["level 5"], ["level 10"]]
    assert len(open_set(f"{spec}[!::5]")) == 9
    assert len(open_set(f"tar:{tmp_path}/0000[0-1].tar[:50%]")) == 4


def test_files_of_an_example_need_not_stand_side_by_side(tmp_path):
    files = sorted(pairs_of(0, 6), key=lambda file: file[0].partition(".")[::-1])
    assert [name for name, _ in files][5:7] == ["000005.png", "000000.txt"]
    path = write_tar(tmp_path / "0.tar", files)
    source = open_set(f"tar:{path}")
    assert [(e.image, e.captions) for e in source] == [
        (picture(i), [f"level {i}"]) for i in range(6)
    ]


RECORD = {
    "caption": "one",
    "qa": [{"question": "why?", "answers": ["so"]}],
    "name": "cat",
    "url": None,
}


def test_json_has_the_fields_that_json_lines_have(tmp_path):
    both = {"captions": ["two", "three"], "caption": "one"}
    files = [
        ("0.jpg", b"x"),
        ("0.json", json.dumps(RECORD).encode()),
        ("1.jpg", b"y"),
        ("1.json", json.dumps(both).encode()),
    ]
    spec = f"tar:{write_tar(tmp_path / '0.tar', files)}"
    assert outcomes(open_set(spec)) == [["one"], ["two", "three"]]
    (question,) = open_set(spec, "qa")[0].qa
    assert question == Question("why?", ["so"], "0.tar/0.json#0")
    assert open_set(spec, "name")[0].name == "cat"
    with pytest.raises(BadExample, match='0.tar, 1.json has no "qa"') as error:
        open_set(spec, "qa")[1]
    assert error.value.cause == "missing field"


def test_a_class_is_read_from_cls_or_json(tmp_path):
    files = [
        ("0.jpg", b"x"),
        ("0.cls", b"7\n"),
        ("0.txt", b"a caption"),
        ("1.jpg", b"y"),
        ("1.json", b'{"label": "cat"}'),
    ]
    write_tar(tmp_path / "0.tar", files)
    write_tar(tmp_path / "1.tar", files[3:])  # without a column of classes
    spec = f"tar:{tmp_path}/*.tar"
    assert [example.name for example in open_set(spec, "name")] == ["7", "cat", "cat"]
    assert open_set(spec)[0].captions == ["a caption"]
    assert [example.name for example in open_set(spec, "name")] == ["7", "cat", "cat"]  # kept


def test_a_field_that_no_file_of_the_key_has_is_named_with_the_files_looked_for(tmp_path):
    files = [("0.jpg", b"x"), ("0.cls", b"7"), ("1.txt", b"a caption")]
    spec = f"tar:{write_tar(tmp_path / '0.tar', files)}"
    for index, field, expected in (
        (0, "captions", "the key of 0.jpg has no caption, a file of txt, json"),
        (1, "captions", "the key of 1.txt has no image, a file of jpg, jpeg, png, webp"),
        (0, "qa", "the key of 0.jpg has no question, a file of json"),
    ):
        with pytest.raises(BadExample, match=expected):
            open_set(spec, field)[index]


def test_names_that_are_not_utf8_are_told_apart(tmp_path):
    files = [
        (os.fsdecode(name) + end, content)
        for name in (b"caf\xe9", b"caf\xe8")
        for end, content in ((".jpg", b"x"), (".json", b'{"qa": [{"question": "why?"}]}'))
    ]
    source = open_set(f"tar:{write_tar(tmp_path / '0.tar', files)}", "qa")
    assert [example.key for example in source] == [
        "0.tar/caf\\udce9.jpg",
        "0.tar/caf\\udce8.jpg",
    ]
    assert len({question.id for example in source for question in example.qa}) == 2


def test_a_caption_of_nuls_is_none(tmp_path):
    files = [("0.jpg", b"x"), ("0.txt", bytes(20)), ("1.jpg", b"x"), ("1.txt", b"a dog")]
    assert outcomes(open_set(f"tar:{write_tar(tmp_path / '0.tar', files)}")) == [
        "no caption",
        ["a dog"],
    ]


def test_a_caption_in_txt_comes_before_one_in_json(tmp_path):
    files = [
        ("0.jpg", b"x"),
        ("0.json", json.dumps(RECORD).encode()),
        ("0.txt", "\ufeff zwölf\n".encode()),
    ]
    assert outcomes(open_set(f"tar:{write_tar(tmp_path / '0.tar', files)}")) == [["zwölf"]]


def test_each_broken_example_says_why_and_where(tmp_path):
    broken = {
        "no image": [("a.txt", b"a caption")],
        "no caption": [("b.jpg", b"x")],
        "duplicate key": [("c.jpg", b"x"), ("c.txt", b"1"), ("c.jpg", b"y"), ("c.txt", b"2")],
        "not UTF-8": [("d.jpg", b"x"), ("d.txt", b"caf\xe9")],
        "not JSON": [("e.jpg", b"x"), ("e.json", b"[" * 10_000)],
        "not an object": [("f.jpg", b"x"), ("f.json", b"[]")],
        "missing field": [("g.jpg", b"x"), ("g.json", b'{"caption": 3}')],
    }
    files = [("../../etc/0.jpg", b"x"), ("../../etc/0.txt", b"never written anywhere")]
    path = write_tar(
        tmp_path / "0.tar", sum(broken.values(), files) + [("h.jpg", b"x"), ("h.txt", b"  \n")]
    )
    source = open_set(f"tar:{path}")
    assert outcomes(source) == [["never written anywhere"], *broken, "no caption"]
    for index, name in ((1, "a.txt"), (2, "b.jpg"), (3, "c.jpg"), (4, "d.txt"), (5, "e.json")):
        with pytest.raises(BadExample, match=f"{path}, .*{name} (has|is)"):
            source[index]


def test_training_replaces_broken_examples_and_resumes_exactly(tmp_path):
    for shard in range(2):
        files = pairs_of(20 * shard, 20)
        files[3] = ("000001.txt" if not shard else "other.txt", b"\xff")
        write_tar(tmp_path / f"{shard}.tar", files)
    source = open_set(f"tar:{tmp_path}/*.tar")
    config = DataConfig(batch_size=8, threads=3, max_bad_share=0.5)
    batches = TrainBatches(source, tiny_processor(), config, seed=0)
    for _ in range(3):
        next(batches)
    state = json.loads(json.dumps(batches.state()))
    following = [next(batches) for _ in range(5)]
    resumed = TrainBatches(source, tiny_processor(), config, seed=0, state=state)
    for batch in following:
        again = next(resumed)
        assert all((again[name] == batch[name]).all() for name in batch)
    assert set(batches.bad_counts) == {"not UTF-8", "no caption", "no image"}
    batches.close()
    resumed.close()


def test_threads_read_more_shards_than_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_shards, "_MAX_OPEN", 2)
    source = open_set(write_shards(tmp_path, 6))
    wrong = []

    def read(seed):
        for i in np.random.default_rng(seed).integers(24, size=300).tolist():
            if (example := source[i]).captions != [f"level {i}"] or example.image != picture(i):
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    held = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]
    assert sum(str(tmp_path) in path for path in held) <= 2


def test_a_part_that_the_disk_cannot_read_is_a_bad_example(tmp_path, monkeypatch):
    source = open_set(write_shards(tmp_path))
    read = os.pread

    def damaged(descriptor: int, length: int, start: int) -> bytes:
        if start == bad_part:
            raise OSError(errno.EIO, "Input/output error")
        return read(descriptor, length, start)

    with tarfile.open(tmp_path / "00001.tar") as tar:
        bad_part = tar.getmember("000007.txt").offset
    monkeypatch.setattr(os, "pread", damaged)
    assert source[6].captions == ["level 6"]
    with pytest.raises(BadExample, match="00001.tar, byte .* cannot be read: Input") as bad:
        source[7]
    assert bad.value.cause == "unreadable"


def test_a_shard_that_shrinks_vanishes_or_is_overwritten_in_use_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_shards, "_MAX_OPEN", 1)
    spec = write_shards(tmp_path)
    source, path = open_set(spec), tmp_path / "00001.tar"
    whole = path.read_bytes()
    assert source[6].captions == ["level 6"]
    with tarfile.open(path) as tar:
        last = tar.getmember("000007.txt").offset_data
    for size in (last + 3, last - 5, 0):  # in the caption, in its header
        os.truncate(path, size)
        with pytest.raises(ValueError, match="shard .*00001.tar has changed while it was in use"):
            source[7]
    path.write_bytes(whole[512:] + bytes(512))
    with pytest.raises(ValueError, match="shard .*00001.tar has changed while it was in use"):
        source[6]
    assert source[0].captions == ["level 0"]
    path.unlink()
    config = DataConfig(batch_size=4, threads=2, max_bad_share=0.99)
    batches = TrainBatches(source, tiny_processor(), config, seed=0)
    with pytest.raises(ValueError, match="shard .*00001.tar cannot be read any more: No such file"):
        for _ in range(6):
            next(batches)
    batches.close()


def test_shards_can_be_prepared_for_tensorflow_datasets(tmp_path):
    spec = write_shards(tmp_path)
    with tarfile.open(tmp_path / "00001.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("without.jpg"))
    assert prepare.prepare(spec, str(tmp_path / "tfds"), "packed") == {"no caption": 1}
    packed = sources.open_source(
        "tfds:packed/train", image_size=SIZE, tfds_dir=str(tmp_path / "tfds")
    )
    assert [(e.image, e.captions) for e in packed] == [
        (picture(i), [f"level {i}"]) for i in range(12)
    ]
    assert packed[5].key == "00001.tar/000005.png"


# Kept indexes


@pytest.fixture
def indexed(monkeypatch) -> list[int]:
    """The sizes of the shards whose headers were read since."""
    sizes, make = [], tar_shards._make_index

    def counted(read, size):
        sizes.append(size)
        return make(read, size)

    monkeypatch.setattr(tar_shards, "_make_index", counted)
    return sizes


def test_a_shard_is_indexed_once_until_it_changes(tmp_path, indexed, cache):
    spec = write_shards(tmp_path)
    first = outcomes(open_set(spec))
    assert len(indexed) == len(list(cache.iterdir())) == 3
    assert outcomes(open_set(spec)) == first and len(indexed) == 3
    path = tmp_path / "00001.tar"
    write_tar(path, pairs_of(40, 4))  # of the same size
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert (
        outcomes(open_set(spec))[4:8] == [[f"level {i}"] for i in range(40, 44)]
        and len(indexed) == 4
    )
    at = path.stat().st_mtime_ns
    write_tar(path, pairs_of(60, 20))
    os.utime(path, ns=(0, at))
    assert len(open_set(spec)) == 28 and len(indexed) == 5
    assert len(list(cache.iterdir())) == 3  # in place of the old ones; nothing half-written is left


def test_a_damaged_index_is_made_again(tmp_path, indexed, cache):
    spec = write_shards(tmp_path, 1)
    expected = outcomes(open_set(spec))
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for damaged in (
        b"",
        whole[:-36],
        whole[: len(whole) // 2],
        flipped,
        whole.replace(b'"format": 3', b'"format": 9'),
    ):
        kept.write_bytes(damaged)
        indexed.clear()
        assert outcomes(open_set(spec)) == expected and len(indexed) == 1
        assert kept.read_bytes() == whole


def test_where_nothing_can_be_kept_a_warning_says_so_and_the_set_is_read(
    tmp_path, indexed, monkeypatch, caplog
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    spec = write_shards(tmp_path)
    assert len(open_set(spec)) == len(open_set(spec)) == 12 and len(indexed) == 6
    assert [
        message for message in caplog.messages if "cannot be kept" in message
    ] == caplog.messages[:1]


def test_indexes_made_at_the_same_time_are_whole(tmp_path, cache):
    spec = write_shards(tmp_path)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(outcomes(open_set(spec)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[[f"level {i}"] for i in range(12)]] * 4
    assert len(list(cache.iterdir())) == 3


def test_an_example_takes_36_bytes_of_memory(tmp_path):
    index = tar_shards.open_index(write_tar(tmp_path / "0.tar", pairs_of(0, 50)))
    assert index.starts.nbytes + index.lengths.nbytes == 50 * 36
    assert index.starts.base is None or isinstance(index.starts.base, np.ndarray | bytes)


# Real photographs


def test_real_photographs_packed_and_read_in_any_order(shared, tmp_path):
    plain = open_set(f"jsonl:{shared}/data/flickr8k[:60]")
    examples = [plain[i] for i in range(60)]
    files = []
    for number, example in enumerate(examples):
        record = {"captions": example.captions}
        files += [
            (f"{number:05d}.jpg", example.image.read_bytes()),
            (f"{number:05d}.json", json.dumps(record).encode()),
        ]
    packed = open_set(f"tar:{write_tar(tmp_path / '0.tar', files, tarfile.PAX_FORMAT)}")
    for number in np.random.default_rng(0).permutation(60).tolist():
        assert packed[number].captions == examples[number].captions
        assert packed[number].image == examples[number].image.read_bytes()
