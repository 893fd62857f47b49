"""Image transform against open_clip's, what every kind of picture becomes, text batches, saving."""

import io
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import warnings
import zlib

import jax.numpy as jnp
import jaxtyping
import numpy as np
import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from mammut.data.images import BadImage, ImageTransform
from mammut.data.processor import Processor
from mammut.data.tokenizer import load_tokenizer, train_sentencepiece
from mammut.testing import shared_dir, tiny_processor

SHARED = shared_dir()
needs_shared = pytest.mark.skipif(
    SHARED is None, reason="the shared folder with the reference outputs is absent"
)
CLIP_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
CLIP_STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)
WHITE, RED, BLUE = [255, 255, 255], [255, 0, 0], [0, 0, 255]
SAME = ImageTransform(2)  # of 2 x 2 pictures: leaves the pixels alone


@pytest.fixture(scope="module")
def processor():
    captions = ["A dog runs on green grass .", "Two dogs play with a red ball ."] * 4
    return Processor(
        train_sentencepiece(captions, 600, lowercase=True), ImageTransform(8), max_length=12
    )


@pytest.fixture(scope="module")
def clip():
    return load_tokenizer(SHARED / "vocabs/clip_bpe_simple_vocab_16e6.txt.gz", lowercase=True)


def encoded(picture, format="PNG", **options):
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def noise(height=48, width=64):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def png_header(width, height):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def cause_of(image, transform=SAME):
    with pytest.raises(BadImage) as raised:
        transform(image)
    assert "\n" not in str(raised.value)
    return raised.value.cause


# ---- the transform ----


@needs_shared
@pytest.mark.parametrize("mode", ["squash", "shortest", "longest"])
@pytest.mark.parametrize("name", ["gray_333x251", "land_640x427", "small_90x70"])
def test_transform_is_open_clips(mode, name):
    folder = SHARED / "fixtures/preprocess"
    expected = load_file(folder / "preprocessed.safetensors")[f"{mode}.{name}"]
    pixels = ImageTransform(224, mode=mode)(folder / f"{name}.png")
    assert pixels.shape == (224, 224, 3) and pixels.dtype == np.uint8
    ours = (pixels / np.float32(255) - CLIP_MEAN) / CLIP_STD
    difference = np.abs(ours.transpose(2, 0, 1)[:, ::4, ::4] - expected) * CLIP_STD[:, None, None]
    assert difference.max() < 1e-6  # of pixels in 0..1: not one of them is a step of 1 / 255 off


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (7, 8), (8, 9), (200, 31)])
@pytest.mark.parametrize("mode", ["squash", "shortest", "longest"])
def test_every_shape_gives_the_output_shape(mode, size):
    assert ImageTransform(8, mode=mode)(noise(*size)).shape == (8, 8, 3)


def test_longest_pads_with_fill_and_centres():
    pixels = ImageTransform(8, mode="longest", fill=7)(np.full((4, 8, 3), 200, np.uint8))
    assert (pixels[2:6] == 200).all()
    assert (pixels[[0, 1, 6, 7]] == 7).all()


def test_interpolation_is_used():
    bicubic, bilinear = (
        ImageTransform(20, interpolation=name)(noise()) for name in ("bicubic", "bilinear")
    )
    assert (bicubic != bilinear).any()
    picture = PIL.Image.fromarray(noise())
    assert (bilinear == np.asarray(picture.resize((20, 20), PIL.Image.Resampling.BILINEAR))).all()


def test_aliased_bilinear_looks_at_two_pixels_a_side_and_cuts_fractions_off():
    """Enlarged, the outermost new pixels are the edge's; reduced, pixels between are not seen."""
    row = np.array([0, 10, 21, 255, 9, 100, 201, 7], np.uint8)

    def resized(row, size):
        picture = np.broadcast_to(row[None, :, None], (5, len(row), 3)).copy()
        pixels = ImageTransform(size, interpolation="bilinear_aliased")(picture)
        assert pixels.shape == (size, size, 3) and (pixels == pixels[:1, :, :1]).all()
        return pixels[0, :, 0].tolist()

    assert resized(row, 2) == [15, 150]  # (10 + 21) / 2, (100 + 201) / 2
    assert resized(row[:2], 4) == [0, 2, 7, 10]
    assert resized(row, 8) == row.tolist()


def test_aliased_bilinear_does_not_mix_up_the_sides():
    picture = noise(20, 30)
    aliased = ImageTransform(10, interpolation="bilinear_aliased")
    tall = aliased(picture.transpose(1, 0, 2).copy())
    np.testing.assert_array_equal(tall.transpose(1, 0, 2), aliased(picture))
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(
        aliased.random_resized_crop(picture, rng, (1.0, 1.0), (1.0, 1.0)), aliased(picture)
    )


def test_a_thread_of_pixels_is_not_blown_up():
    transform = ImageTransform(224, mode="shortest", max_image_pixels=10**6)
    assert cause_of(np.zeros((1, 10**5), np.uint8), transform) == "oversized"


@pytest.mark.parametrize(
    "field",
    [
        {"mode": "crop"},
        {"interpolation": "nearest"},
        {"fill": 256},
        {"max_image_pixels": 0},
        {"image_size": 0},
    ],
)
def test_settings_that_cannot_work_are_refused(field):
    # Run-time type checks, where they are on, refuse a name that is none of the Literal first.
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match=next(iter(field))):
        ImageTransform(**({"image_size": 8} | field))


# ---- random crops ----


def test_whole_crop_is_a_plain_squash():
    transform = ImageTransform(16)
    crop = transform.random_resized_crop(noise(), np.random.default_rng(0), (1.0, 1.0), (1.0, 1.0))
    assert (crop == transform(noise())).all()


def test_crops_repeat_for_a_seed_and_differ_within_it():
    def crops(seed):
        rng = np.random.default_rng(seed)
        return [
            ImageTransform(16).random_resized_crop(noise(), rng, (0.2, 1.0), (0.5, 2.0))
            for _ in range(4)
        ]

    assert all((a == b).all() for a, b in zip(crops(0), crops(0)))
    assert (crops(0)[0] != crops(0)[1]).any()
    assert (crops(0)[0] != crops(1)[0]).any()


def crop_boxes(scale, ratio, count=400):
    # The picture's pixels are their own coordinates, so that the edges of a crop can be read off it
    # (200 pixels each).
    grid = np.zeros((200, 200, 3), np.uint8)
    grid[:, :, 0], grid[:, :, 1] = np.arange(200), np.arange(200)[:, None]
    transform, rng = ImageTransform(64, interpolation="bilinear"), np.random.default_rng(0)
    boxes = []
    for _ in range(count):
        crop = transform.random_resized_crop(PIL.Image.fromarray(grid), rng, scale, ratio).astype(
            float
        )
        across, down = (np.ptp(crop[:, :, axis]) / 200 * 64 / 63 for axis in (0, 1))
        boxes.append((across, down, crop[:, :, 0].min() / 200, crop[:, :, 1].min() / 200))
    return np.array(boxes).T


def test_crops_cover_the_whole_range_of_scale_ratio_and_place():
    across, down, left, top = crop_boxes((0.1, 0.5), (0.5, 2.0))
    area, ratio = across * down, across / down
    assert 0.08 < area.min() < 0.13 and 0.47 < area.max() < 0.53
    assert abs(area.mean() - 0.3) < 0.02  # uniform
    assert 0.46 < ratio.min() < 0.54 and 1.85 < ratio.max() < 2.15
    assert abs(np.log(ratio).mean()) < 0.05  # wide as often as tall
    for start, side in ((left, across), (top, down)):
        assert start.min() < 0.01 and (start + side).max() > 0.98
        assert abs(np.corrcoef(start / (1.001 - side), side)[0, 1]) < 0.2


def test_the_area_is_kept_where_the_ratio_does_not_fit():
    across, down, _, _ = crop_boxes((0.81, 0.81), (0.1, 10.0), count=50)
    assert np.abs(across * down - 0.81).max() < 0.03


def test_ratio_is_relative_to_the_pictures():
    picture = PIL.Image.fromarray(noise(30, 90))
    whole = ImageTransform(16).random_resized_crop(
        picture, np.random.default_rng(0), (1.0, 1.0), (0.5, 2.0)
    )
    assert (whole == ImageTransform(16)(picture)).all()


def test_a_large_jpeg_is_cropped_like_its_pixels():
    smooth = PIL.Image.fromarray(noise(8, 8)).resize((1024, 768), PIL.Image.Resampling.BICUBIC)
    file = encoded(smooth, "JPEG", quality=95)
    crops = [
        ImageTransform(32)
        .random_resized_crop(image, np.random.default_rng(3), (0.3, 0.6), (0.8, 1.2))
        .astype(int)
        for image in (file, ImageTransform(32).read(file))
    ]
    assert np.abs(crops[0] - crops[1]).max() <= 6
    assert np.abs(crops[0] - crops[1]).mean() < 1


@pytest.mark.parametrize(
    ("scale", "ratio"),
    [((0.0, 1.0), (1.0, 1.0)), ((0.5, 1.5), (1.0, 1.0)), ((0.5, 1.0), (2.0, 1.0))],
)
def test_impossible_crops_are_refused(scale, ratio):
    with pytest.raises(ValueError, match="expected 0 < low <= high"):
        ImageTransform(8).random_resized_crop(noise(), np.random.default_rng(0), scale, ratio)


# ---- what each kind of picture becomes ----


def test_bytes_paths_pictures_and_arrays_are_the_same(tmp_path):
    array = noise()
    picture = PIL.Image.fromarray(array)
    path = tmp_path / "a.png"
    picture.save(path)
    expected = ImageTransform(16)(array)
    for image in (picture, path, str(path), path.read_bytes(), PIL.Image.open(path)):
        assert (ImageTransform(16)(image) == expected).all()


def test_grey_becomes_three_equal_channels():
    grey = np.array([[0, 100], [200, 255]], np.uint8)
    for image in (grey, grey[:, :, None], encoded(PIL.Image.fromarray(grey))):
        assert (SAME(image) == grey[:, :, None]).all()
    assert SAME(encoded(PIL.Image.fromarray(grey > 150))).tolist() == [
        [[0] * 3, [0] * 3],
        [WHITE, WHITE],
    ]


@pytest.mark.parametrize("values", [[[0, 255], [256, 65535]], [[511, 512], [32767, 32768]]])
def test_16_bits_lose_the_low_byte(values):
    array = np.array(values, np.uint16)
    files = [encoded(PIL.Image.fromarray(array), format) for format in ("PNG", "TIFF")]
    files.append(b"P5 2 2 65535\n" + array.astype(">u2").tobytes())
    for file in files:
        assert (SAME(file) == (array >> 8)[:, :, None]).all()


def test_transparency_is_composited_on_white():
    array = np.array(
        [[[255, 0, 0, 255], [255, 0, 0, 0]], [[0, 0, 255, 255], [0, 0, 0, 51]]], np.uint8
    )
    expected = [[RED, WHITE], [BLUE, [204, 204, 204]]]
    assert SAME(array).tolist() == expected
    assert SAME(encoded(PIL.Image.fromarray(array))).tolist() == expected
    grey = PIL.Image.fromarray(np.array([[[9, 255], [9, 0]], [[9, 255], [9, 0]]], np.uint8), "LA")
    assert SAME(encoded(grey)).tolist() == [[[9] * 3, WHITE]] * 2


def test_palettes_are_looked_up():
    picture = PIL.Image.new("P", (2, 2))
    picture.putpalette(RED + BLUE)
    picture.putdata([0, 1, 1, 0])
    assert SAME(encoded(picture)).tolist() == [[RED, BLUE], [BLUE, RED]]
    assert SAME(encoded(picture, transparency=1)).tolist() == [[RED, WHITE], [WHITE, RED]]


def test_cmyk_is_converted():
    picture = PIL.Image.new("CMYK", (2, 2), (0, 255, 255, 0))
    assert (SAME(encoded(picture, "TIFF")) == RED).all()
    assert np.abs(SAME(encoded(picture, "JPEG", quality=100)).astype(int) - RED).max() <= 3


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_is_used(format):
    frames = [PIL.Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    lossless = {"lossless": True} if format == "WEBP" else {}
    file = encoded(frames[0], format, save_all=True, append_images=frames[1:], **lossless)
    assert (SAME(file) == RED).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_applied_once(orientation, format):
    upright = np.zeros((32, 16, 3), np.uint8)  # taller than wide, each quarter its own grey
    upright[:16, :8], upright[:16, 8:], upright[16:, :8], upright[16:, 8:] = 30, 90, 150, 210
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),  # shown turned by 90 degrees clockwise
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    file = encoded(PIL.Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif)
    picture = SAME.read(file)
    assert picture.mode == "RGB" and picture.size == (16, 32)
    assert np.abs(np.asarray(picture).astype(int) - upright).max() <= 2  # JPEG
    assert SAME.read(picture).size == (16, 32)


# ---- images that cannot be used ----


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_files_are_refused(format, share):
    file = encoded(PIL.Image.fromarray(noise()), format)
    assert cause_of(file[: int(len(file) * share)]) == "truncated"


def test_every_cut_of_a_webp_is_refused():
    file = encoded(PIL.Image.fromarray(noise()), "WEBP")
    assert {cause_of(file[:length]) for length in range(1, len(file), 97)} == {"corrupt"}


@pytest.mark.parametrize(
    ("image", "cause"),
    [
        (b"", "empty"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (b"<svg/>", "corrupt"),
        (encoded(PIL.Image.fromarray(noise()))[:20] + b"\0" * 40, "corrupt"),
        (np.zeros((4, 4, 3), np.float32), "unsupported"),
        (np.zeros((4, 4, 2), np.uint8), "unsupported"),
        (np.zeros((4,), np.uint8), "unsupported"),
        (PIL.Image.new("F", (4, 4)), "unsupported"),
        (PIL.Image.new("I", (4, 4)), "unsupported"),
        (encoded(PIL.Image.new("F", (4, 4)), "TIFF"), "unsupported"),
        (None, "unsupported"),
        (7, "unsupported"),
    ],
)
def test_bad_images_have_a_cause(image, cause):
    assert cause_of(image) == cause


def test_bad_files_are_named(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    causes = {
        "empty.jpg": "empty",
        "text.jpg": "corrupt",
        ".": "missing file",
        "none.jpg": "missing file",
    }
    for name, cause in causes.items():
        with pytest.raises(BadImage, match=str(tmp_path / name)) as raised:
            SAME(tmp_path / name)
        assert raised.value.cause == cause
    copy = pickle.loads(pickle.dumps(raised.value))
    assert (str(copy), copy.cause) == (str(raised.value), raised.value.cause)


def test_the_header_decides_what_is_oversized():
    limit = PIL.Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        # Pillow warns from 89 million pixels on and stops at twice that
        warnings.simplefilter("error")
        assert cause_of(png_header(20_000, 20_000)) == "oversized"
        assert cause_of(png_header(10_000, 10_001)) == "oversized"
        # allowed, so it went on to decode
        assert cause_of(png_header(10_000, 9_500)) == "truncated"
        assert (
            cause_of(png_header(20_000, 20_000), ImageTransform(2, max_image_pixels=10**9))
            == "truncated"
        )
    assert PIL.Image.MAX_IMAGE_PIXELS == limit
    assert (
        cause_of(PIL.Image.new("L", (5, 5)), ImageTransform(2, max_image_pixels=24)) == "oversized"
    )
    assert ImageTransform(2, max_image_pixels=25)(PIL.Image.new("L", (5, 5))).shape == (2, 2, 3)


@pytest.mark.parametrize("format", ["TIFF", "PNG", "WEBP", "GIF", "JPEG", "BMP", "PPM"])
def test_pillows_own_limit_is_not_asked_in_any_format(format, monkeypatch):
    file = encoded(PIL.Image.new("RGB", (8, 8), "red"), format)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 3)  # 64 is more than twice that
    assert SAME(file).shape == (2, 2, 3)
    assert cause_of(file, ImageTransform(2, max_image_pixels=63)) == "oversized"
    assert PIL.Image.MAX_IMAGE_PIXELS == 3


def test_pillows_own_limit_is_back_when_the_last_thread_has_read(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 3)
    seen = []
    decode = ImageTransform._decoded

    def slow(self, content, sides):
        if content == second:
            SAME(first)  # another picture is begun and done meanwhile
        seen.append(PIL.Image.MAX_IMAGE_PIXELS)
        return decode(self, content, sides)

    monkeypatch.setattr(ImageTransform, "_decoded", slow)
    first, second = (
        encoded(PIL.Image.new("RGB", (8, 8), name), "TIFF") for name in ("red", "blue")
    )
    assert (SAME(second) == BLUE).all()
    assert seen == [None, None] and PIL.Image.MAX_IMAGE_PIXELS == 3


def test_a_limit_that_the_program_sets_meanwhile_stays(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 3)
    monkeypatch.setattr(
        ImageTransform,
        "_decoded",
        lambda *_: setattr(PIL.Image, "MAX_IMAGE_PIXELS", 5) or PIL.Image.new("RGB", (2, 2)),
    )
    SAME(b"a picture")
    assert PIL.Image.MAX_IMAGE_PIXELS == 5


BROKEN_EXIF = b"Exif\0\0" + b"no TIFF header"


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize(
    "metadata", [{"exif": BROKEN_EXIF}, {"icc_profile": b"no profile"}, {"xmp": b"\xff<x:xmpmeta"}]
)
def test_pixels_are_taken_where_metadata_is_damaged(format, metadata):
    options = {"lossless": True} if format == "WEBP" else {}
    plain = encoded(PIL.Image.fromarray(noise()), format, **options)
    file = encoded(PIL.Image.fromarray(noise()), format, **options, **metadata)
    assert file != plain or "xmp" in metadata  # this Pillow may not write XMP to every format
    assert np.array_equal(ImageTransform(16)(file), ImageTransform(16)(plain))


def png_with(
    kind: bytes, data: bytes, checksum: int | None = None, file: bytes | None = None
) -> bytes:
    """A PNG, by default of noise, with one more chunk behind its header."""
    file = file or encoded(PIL.Image.fromarray(noise()))
    checksum = zlib.crc32(kind + data) if checksum is None else checksum
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
    return file[:33] + chunk + file[33:]


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (b"iCCP", b"name\0\7not deflated"),
        (b"iTXt", b"key\0\1\0en\0key\0not deflated"),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0\xff\xfe"),
        (b"zTXt", b"key\0\7of another method"),
        (b"zTXt", b"key\0\0" + zlib.compress(bytes(2**21))),  # more than Pillow unpacks
        (b"tEXt", b"\xff" * 9),
        (b"eXIf", b""),
        (b"gAMA", b"\1"),
        (b"acTL", b"\1"),
        (b"pHYs", b""),
    ],
)
@pytest.mark.parametrize("checksum", [None, 0])
def test_a_png_is_read_whatever_its_metadata_is(kind, data, checksum):
    plain = encoded(PIL.Image.fromarray(noise()))
    file = png_with(kind, data, checksum)
    assert np.array_equal(ImageTransform(16)(file), ImageTransform(16)(plain))
    assert cause_of(file[: int(len(file) * 0.9)]) == "truncated"


@pytest.mark.parametrize(
    ("marker", "data"),
    [
        (0xE0, b"JFIF\0"),
        (0xE0, b"JFIF\0\1\2\1"),
        (0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff"),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xE2, b"ICC_PROFILE\0\1"),
        (0xE2, b"MPF\0"),
        (0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\x10x"),
        (0xEE, b"Adobe"),
        (0xEE, b"Adobe\0d"),
        (0xFE, b"\xff"),
    ],
)
def test_a_jpeg_is_read_whatever_its_metadata_is(marker, data):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    plain = encoded(PIL.Image.fromarray(noise()), "JPEG", exif=exif)
    segment = bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data
    for at in (2, 20):  # before the header JFIF, and behind it
        file = plain[:at] + segment + plain[at:]
        if not data.startswith(b"Exif"):  # of two, the first one counts
            assert np.array_equal(ImageTransform(16)(file), ImageTransform(16)(plain))
        assert ImageTransform(16)(file).shape == (16, 16, 3)
        assert cause_of(file[: int(len(file) * 0.9)]) == "truncated"


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB"])
def test_the_colours_of_a_jpeg_are_kept_where_its_metadata_is_damaged(mode):
    plain = encoded(PIL.Image.fromarray(noise()).convert(mode), "JPEG")
    file = plain[:2] + b"\xff\xe2\0\x0eICC_PROFILE\0" + plain[2:]
    assert np.array_equal(ImageTransform(16)(file), ImageTransform(16)(plain))


def test_the_orientation_is_kept_where_other_metadata_is_damaged():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = png_with(b"iCCP", b"name\0\7", file=encoded(PIL.Image.new("RGB", (8, 4)), exif=exif))
    assert SAME.read(turned).size == (4, 8)


def test_damage_to_what_a_png_shows_is_no_metadata():
    assert cause_of(png_with(b"tRNS", bytes(6), checksum=0)) == "corrupt"
    assert cause_of(png_with(b"PLTE", bytes(6), checksum=0)) == "corrupt"


def test_a_picture_of_pillow_with_damaged_exif_is_read():
    picture = PIL.Image.open(io.BytesIO(encoded(PIL.Image.new("RGB", (2, 2), "red"))))
    picture.info["exif"] = BROKEN_EXIF
    assert (SAME(picture) == RED).all()


# ---- text ----


@needs_shared
@pytest.mark.parametrize("max_length", [77, 76, 16])
def test_hard_strings_are_tokenized_as_by_open_clip(clip, max_length):
    golden = json.loads((SHARED / "fixtures/preprocess/tokens.json").read_text("utf-8"))
    tokens, text_valid = Processor(clip, ImageTransform(8), max_length).encode_text(golden["texts"])
    assert tokens.shape == (28, max_length) and tokens.dtype == np.int32
    assert tokens.tolist() == golden[f"ctx{max_length}"]
    lengths = [len(clip.encode(text)) + 2 for text in golden["texts"]]
    assert text_valid.sum(1).tolist() == [min(length, max_length) for length in lengths]


@needs_shared
def test_hard_strings_are_decoded_as_by_open_clip(clip):
    golden = json.loads((SHARED / "fixtures/preprocess/tokens.json").read_text("utf-8"))
    for row, decoded in zip(golden["ctx77"], golden["decode"], strict=True):
        # The reference took every 0 for a pad, and lost the "!" of "x!=y" by it.
        row = [token for token in row if token != 0]
        assert clip.decode(row) == decoded.replace("<start_of_text>", "").replace(
            "<end_of_text>", ""
        )
    processor = Processor(clip, ImageTransform(8), 77)
    assert processor.decode(processor.encode_text(["x!=y", "A  Dog"])[0]) == ["x != y", "a dog"]


@needs_shared
def test_an_exclamation_mark_is_no_pad(clip):
    tokens, text_valid = Processor(clip, ImageTransform(8), 8).encode_text(["x!=y"])
    assert tokens.tolist() == [[49406, 343, 0, 284, 344, 49407, 0, 0]]
    assert text_valid.tolist() == [[True] * 6 + [False] * 2]


def test_a_long_text_keeps_its_end(processor):
    tokens, text_valid = processor.encode_text(["a dog " * 50, "a dog", ""])
    assert tokens[0, 0] == processor.bos_id and tokens[0, -1] == processor.eos_id
    assert (tokens[0, 1:-1] != processor.eos_id).all()
    assert text_valid[0].all()
    assert tokens[2].tolist() == [processor.bos_id, processor.eos_id] + [processor.pad_id] * 10
    assert text_valid[2].tolist() == [True] * 2 + [False] * 10
    assert processor.decode(tokens)[1:] == ["a dog", ""]


@pytest.mark.parametrize(("text_form", "pad"), [("end", 0), ("end_filled", 2)])
def test_without_a_start_the_end_comes_once_or_to_the_last_place(
    processor, text_form, pad, tmp_path
):
    endless = Processor(processor.tokenizer, processor.image, 12, text_form)
    ids = processor.tokenizer.encode("a dog")
    tokens, text_valid = endless.encode_text(["a dog", "", "a dog " * 50])
    assert tokens[0].tolist() == [*ids, 2] + [pad] * (11 - len(ids))
    assert text_valid[0].sum() == len(ids) + 1
    assert tokens[1].tolist() == [2] + [pad] * 11
    assert (
        tokens[2, :-1].tolist() == processor.tokenizer.encode("a dog " * 50)[:11]
        and tokens[2, -1] == 2
    )
    assert endless.decode(tokens)[:2] == ["a dog", ""]
    assert endless.room("") == 11 and processor.room("") == 10
    endless.save(tmp_path)
    np.testing.assert_array_equal(Processor.load(tmp_path).encode_text(["a dog"])[0], tokens[:1])


def test_a_processor_saved_before_there_were_text_forms_has_the_first(processor, tmp_path):
    processor.save(tmp_path)
    path = tmp_path / "processor.json"
    values = json.loads(path.read_text())
    assert values.pop("text_form") == "start_end"
    path.write_text(json.dumps(values))
    assert Processor.load(tmp_path).text_form == "start_end"


def test_a_batch_of_images_and_text(processor):
    batch = processor(
        images=[noise(), PIL.Image.fromarray(noise(9, 5))], text=["A dog", "a ball", ""]
    )
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "image": ((2, 8, 8, 3), "uint8"),
        "tokens": ((3, 12), "int32"),
        "text_valid": ((3, 12), "bool"),
    }
    assert set(processor(text=("a",))) == {"tokens", "text_valid"}
    assert (processor(images=noise()[None])["image"][0] == processor.image(noise())).all()


def test_empty_batches_keep_their_shape(processor):
    batch = processor(images=[], text=[])
    assert batch["image"].shape == (0, 8, 8, 3)
    assert batch["tokens"].shape == batch["text_valid"].shape == (0, 12)
    assert processor.decode(batch["tokens"]) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": "a dog"}, "expected a list of str"),
        ({"text": ["a", None]}, "text 1 is a NoneType"),
        ({"images": noise()}, "expected a list of images"),
        ({"images": "a.png"}, "expected a list of images"),
        ({}, "neither images nor text"),
    ],
)
def test_what_is_no_batch_is_refused(processor, given, message):
    with pytest.raises(ValueError, match=message):
        processor(**given)


@pytest.mark.parametrize("tokens", [[1, 2], [[0.5]]])
def test_decode_takes_rows_of_ids_only(processor, tokens):
    with pytest.raises(ValueError, match=r"expected int\[B, L\]"):
        processor.decode(np.array(tokens))


# ---- saving ----


@needs_shared
def test_saved_clip_processor_is_the_same(clip, tmp_path):
    check_saved(Processor(clip, ImageTransform(24, "longest", "bilinear", 9, 10**6), 20), tmp_path)


def test_saved_trained_processor_is_the_same(processor, tmp_path):
    check_saved(processor, tmp_path / "new" / "folder")


def check_saved(processor, folder):
    processor.save(folder)
    loaded = Processor.load(folder)
    assert loaded.image == processor.image and loaded.max_length == processor.max_length
    texts = ["A Dog's ball!", "x!=y &amp; </s>", "naïve 東京", "", "a dog " * 40]
    for ours, theirs in zip(loaded.encode_text(texts), processor.encode_text(texts)):
        assert (ours == theirs).all()
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id"):
        assert getattr(loaded, name) == getattr(processor, name)
    assert (loaded(images=[noise()])["image"] == processor(images=[noise()])["image"]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2, this version reads 1"),
        ({"extra": 1}, "expected format, image, max_length, text_form and tokenizer"),
        ({"max_length": 1}, "processor.json: max_length is 1, expected 2 tokens"),
        (
            {"max_length": 2**17 + 1},
            "processor.json: max_length is 131073, expected 2 tokens, .* to 131072",
        ),
        ({"image": {"image_size": 0}}, "processor.json: ImageTransform.image_size is 0"),
        ({"image": {"image_size": 8, "colour": 1}}, "processor.json: image has colour"),
        ({"text_form": "ends"}, "text_form.*ends"),
        ({"image": {}}, "processor.json holds a value of the wrong type"),
        ({"tokenizer": None}, "processor.json holds a value of the wrong type"),
        ({"tokenizer": {"kind": "sentencepiece", "file": "/etc/passwd"}}, "tokenizer settings"),
        (
            {"tokenizer": {"kind": "missing", "vocab_size": 9}},
            "processor.json: settings of a missing tokenizer",
        ),
    ],
)
def test_a_changed_processor_file_is_refused(processor, tmp_path, change, message):
    processor.save(tmp_path)
    path = tmp_path / "processor.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        Processor.load(tmp_path)


def test_missing_and_damaged_files_are_named(processor, tmp_path):
    with pytest.raises(ValueError, match="processor.json is missing"):
        Processor.load(tmp_path)
    processor.save(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="no vocabulary file .*tokenizer.model"):
        Processor.load(tmp_path)
    (tmp_path / "processor.json").write_text("{")
    with pytest.raises(ValueError, match="processor.json is not JSON"):
        Processor.load(tmp_path)
    (tmp_path / "processor.json").unlink()
    os.mkfifo(tmp_path / "processor.json")  # must not be waited for
    with pytest.raises(
        ValueError, match="processor.json is a folder, a pipe or a device, expected a file"
    ):
        Processor.load(tmp_path)


def test_importing_it_loads_no_heavy_library():
    heavy = "{'PIL', 'sentencepiece', 'tokenizers', 'ftfy', 'grain', 'tensorflow', 'torch'}"
    program = (
        f"import sys, mammut.data.processor; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# --- whatever is given

TINY = tiny_processor()
WITH_FIXTURE = {"suppress_health_check": [HealthCheck.function_scoped_fixture]}


def some_pictures():
    """The same picture as everything that a picture may be."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")  # its position is now the end
    encoded = file.getvalue()
    return pixels, [
        pixels, jnp.asarray(pixels), PIL.Image.fromarray(pixels), file, encoded,
        bytearray(encoded), memoryview(encoded),
    ]  # fmt: skip


def test_a_picture_is_read_from_whatever_holds_it(tmp_path):
    pixels, pictures = some_pictures()
    (tmp_path / "a.png").write_bytes(pictures[4])
    pictures += [tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").open("rb")]
    for picture in pictures:
        np.testing.assert_array_equal(TINY(images=[picture])["image"][0], pixels)


def test_any_list_of_pictures_or_texts_is_one():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    for images in (list(pixels), tuple(pixels), iter(pixels), pixels, jnp.asarray(pixels)):
        np.testing.assert_array_equal(TINY(images=images)["image"], pixels)
    texts = ["one red circle", "right"]
    expected = TINY(text=texts)["tokens"]
    for text in (tuple(texts), iter(texts), np.array(texts), (text for text in texts)):
        np.testing.assert_array_equal(TINY(text=text)["tokens"], expected)


@pytest.mark.parametrize("alone", [
    "photo.jpg", b"photo", pathlib.Path("photo.jpg"), io.BytesIO(b"photo"),
    PIL.Image.new("RGB", (3, 3)), np.zeros((3, 3, 3), np.uint8), jnp.zeros((3, 3), np.uint8), 3,
    {"a": 1}, {"a"}, None,
])  # fmt: skip
def test_a_picture_or_text_alone_is_no_list(as_users_have_it, alone):
    if alone is not None:
        with pytest.raises(ValueError, match="^images is one .*expected a list of images: give"):
            TINY(images=alone)
        with pytest.raises(ValueError, match="^text is one .*, expected a list of str: give"):
            TINY(text=alone)
    with pytest.raises(ValueError, match="^text is one .*, expected a list of str"):
        TINY.encode_text(alone)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
@pytest.mark.parametrize("mode", ["squash", "shortest", "longest"])
def test_a_picture_without_pixels_is_refused(size, mode):
    for picture in (PIL.Image.new("RGB", size), np.zeros((*size, 3), np.uint8)):
        with pytest.raises(BadImage, match="pixel") as error:
            ImageTransform(8, mode)(picture)
        assert error.value.cause == "empty"


PICTURES = (
    st.builds(
        np.zeros,
        st.lists(st.sampled_from([0, 1, 3, 4, 9]), max_size=4).map(tuple),
        st.sampled_from([np.uint8, np.int32, np.float32, bool, object]),
    )
    | st.builds(
        PIL.Image.new,
        st.sampled_from(["1", "L", "P", "RGB", "RGBA", "CMYK", "I", "F", "LA", "I;16", "HSV"]),
        st.tuples(st.sampled_from([0, 1, 7]), st.sampled_from([0, 1, 9])),
    )
    | st.binary(max_size=8) | st.binary(max_size=8).map(io.BytesIO) | st.just(io.StringIO("a"))
    | st.text(max_size=4) | st.text(max_size=4).map(pathlib.PurePosixPath)
    | st.sampled_from([None, 3, 1.5, [], {}, (), iter(()), object(), "nul\0", "\ud800"])
)  # fmt: skip
LISTS = st.sampled_from([list, tuple, iter, lambda items: items, lambda items: {"a": items}])


@settings(max_examples=150, deadline=None, **WITH_FIXTURE)
@given(st.lists(PICTURES, max_size=2), LISTS, st.sampled_from(["squash", "shortest", "longest"]))
def test_whatever_is_given_as_pictures_is_read_or_refused(as_users_have_it, pictures, make, mode):
    eight = Processor(TINY.tokenizer, ImageTransform(8, mode), 12)
    for images in (make(pictures), *pictures):
        try:
            image = eight(images=images)["image"]
        except ValueError:
            continue
        # an array of four axes in a list is a video
        assert image.dtype == np.uint8 and image.shape[1:] in [(8, 8, 3), (8, 8, 8, 3)]
        assert image.ndim == 4 or any(getattr(picture, "ndim", 0) == 4 for picture in pictures)


@settings(max_examples=100, deadline=None, **WITH_FIXTURE)
@given(st.lists(st.text(max_size=9) | PICTURES, max_size=3), LISTS)
def test_whatever_is_given_as_texts_is_encoded_or_refused(as_users_have_it, texts, make):
    for text in (make(texts), *texts):
        try:
            batch = TINY(text=text)
        except ValueError:
            continue
        assert batch["tokens"].shape == batch["text_valid"].shape
        assert batch["tokens"].shape[1] == TINY.max_length
