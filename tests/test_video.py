"""Videos of every kind: which frames are read, odd and damaged files, clips, processors, sets."""

import io
import pathlib
import sys
import time
import typing

import numpy as np
import PIL.Image
import pytest
from marks import long
from video_files import marked, number_of, save, video_file

from mammut.data import images, video_reader
from mammut.data.animation import is_animation
from mammut.data.images import BadImage, ImageTransform
from mammut.data.video import BadVideo, Clip, VideoTransform, is_video

pytest.importorskip("av", reason="PyAV is not installed: pip install 'mammut-jax[video]'")

CAUSES = typing.get_args(images.Cause)
IMAGE = ImageTransform(32)
WHOLE = 1.0, 1.0
X264 = {"preset": "ultrafast"}


def read(video, frames=8, fps=None, **limits):
    return VideoTransform(frames, fps)(video, ImageTransform(32, **limits))


def numbers(video, frames=8, fps=None):
    """The numbers that the frames read of a `marked` video show."""
    return [number_of(frame) for frame in read(video, frames, fps)]


def cause_of(video, **settings):
    with pytest.raises(BadVideo) as raised:
        read(video, **settings)
    assert "\n" not in str(raised.value)
    return raised.value.cause


def centres(count, frames=8):
    """What the issue's formula says of a constant rate."""
    return [int((segment + 0.5) * count / frames) for segment in range(frames)]


# ---- which frames ----


@pytest.mark.parametrize("count", [1, 2, 5, 8, 16, 20, 24, 100])
@pytest.mark.parametrize("frames", [1, 3, 8])
def test_the_centre_of_each_segment_is_read(count, frames):
    pictures = np.array([marked(number) for number in range(count)])
    assert numbers(pictures, frames) == centres(count, frames)


def test_fewer_frames_are_repeated_in_order():
    assert numbers([marked(number) for number in range(5)]) == [0, 0, 1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("a.mp4", {"options": {"g": "6", "bf": "2"}}),
        ("a.mov", {"sound": True}),
        ("a.webm", {"codec": "libvpx-vp9", "options": {"g": "6", "lag-in-frames": "10"}}),
        ("vp8.webm", {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "10"}}),
        ("live.webm", {"codec": "libvpx", "container_options": {"live": "1"}}),
        ("a.mkv", {"options": {"g": "5"}}),
        ("a.avi", {"codec": "mpeg4", "options": {"bf": "2"}}),
        ("b_frames.avi", {"options": {"bf": "3"}}),
        ("bare.h264", {"options": {"bf": "2"}}),
        ("a.ts", {"options": {"g": "6"} | X264}),  # a seek lands behind the keyframe
        ("fragments.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
        ("10bit.mp4", {"pix_fmt": "yuv420p10le"}),
        ("444.mp4", {"pix_fmt": "yuv444p"}),
        ("open_gop.mp4", {"options": {"x264-params": "open-gop=1:keyint=6:bframes=3"}}),
        ("hevc.mp4", {"codec": "libx265", "options": {"x265-params": "keyint=6:log-level=none"}}),
    ],
)
def test_every_format_gives_the_frames_of_the_formula(tmp_path, name, settings):
    path = save(tmp_path, name, **settings)
    for frames in (1, 4, 7, 20):
        assert numbers(path, frames) == centres(20, frames)
    assert numbers(path.read_bytes(), 4) == numbers(path, 4)
    with path.open("rb") as file:
        assert numbers(file, 4) == numbers(file, 4) == centres(20, 4)


def test_frames_after_a_keyframe_may_need_others_before_it(tmp_path):
    """Of an open group of pictures; the decoder refuses to begin with some of its keyframes."""
    settings = "open-gop=1:keyint=12:min-keyint=12:bframes=3:scenecut=0"
    path = save(tmp_path, "a.mp4", frames=120, options={"x264-params": settings})
    for frames in (7, 10, 12, 40):
        assert numbers(path, frames) == centres(120, frames)


def test_frames_that_an_edit_list_hides_are_no_frames():
    """A part cut out of a video without encoding it begins with the keyframe before it."""
    content = video_file(times=range(-50, 150, 10), rate=100, options=X264)
    assert numbers(Clip(content, 0, 1.4), 14) == list(range(5, 19))
    assert sorted(set(numbers(content, 200))) == list(range(5, 20))
    assert numbers(Clip(content, 0, 0.2), 2) == [5, 6]


def test_times_of_a_clip_count_from_the_first_frame(tmp_path):
    for name, codec in (("a.ts", "libx264"), ("a.avi", "mpeg4")):  # they begin after 0
        path = save(tmp_path, name, codec=codec)
        assert [numbers(Clip(path, i / 10, i / 10 + 0.02), 1) for i in (0, 7, 19)] == [
            [0],
            [7],
            [19],
        ]


def test_times_count_where_the_rate_is_not_constant():
    """4 s long: the first ten frames fill 1 s, the last ten 3 s and the last of them 0.3 s."""
    times = [*range(0, 100, 10), *range(100, 400, 30)]
    content = video_file(times=times, rate=100, options=X264)
    ends = [*times[1:], times[-1] + 1]  # of the last frame: a unit, as the encoder has it
    moments = [(segment + 0.5) * ends[-1] / 8 for segment in range(8)]
    expected = [max(i for i, start in enumerate(times) if start <= moment) for moment in moments]
    assert numbers(content) == expected != centres(20)


def test_training_draws_one_frame_of_each_segment(tmp_path):
    path = save(tmp_path, "a.mp4", frames=40)
    transform = VideoTransform(4)
    seen = set()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        shares = np.random.default_rng(seed).random(4)
        video = transform.random(path, rng, IMAGE, WHOLE, WHOLE)
        found = [number_of(frame) for frame in video]
        assert found == [int((i + share) * 10) for i, share in enumerate(shares)]
        seen |= set(found)
    assert len(seen) > 30


def test_training_draws_the_same_numbers_for_any_video():
    states = set()
    for frames in ([marked(0)], [marked(number) for number in range(30)]):
        for crop in (WHOLE, (0.3, 0.6)):
            rng = np.random.default_rng(0)
            VideoTransform(4).random(frames, rng, IMAGE, crop, WHOLE)
            states.add(rng.random())
    assert len(states) == 1


def test_all_frames_of_a_video_have_one_crop():
    frame = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    draws = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        video = VideoTransform(3).random([frame] * 9, rng, IMAGE, (0.2, 0.5), (3 / 4, 4 / 3))
        assert (video == video[:1]).all()
        rng = np.random.default_rng(seed)
        rng.random(3)  # the frames
        alone = IMAGE.random_resized_crop(frame, rng, (0.2, 0.5), (3 / 4, 4 / 3))
        assert (video[0] == alone).all()
        draws.append(video[0])
    assert (draws[0] != draws[1]).any() and (draws[1] != draws[2]).any()


def test_a_rate_reads_frames_one_after_the_other(tmp_path):
    path = save(tmp_path, "a.mp4", frames=100, rate=10, options=X264)  # 10 s
    assert numbers(path, 4, fps=10.0) == [48, 49, 50, 51]
    assert numbers(path, 4, fps=2.0) == [42, 47, 52, 57]  # 2 s in the middle
    assert numbers(path, 4, fps=0.1) == centres(100, 4)  # 40 s are not there
    transform = VideoTransform(4, 5.0)
    starts = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        video = transform.random(path, rng, IMAGE, WHOLE, WHOLE)
        found = np.array([number_of(frame) for frame in video])
        assert set(np.diff(found)) == {2}
        starts.add(int(found[0]))
    assert len(starts) > 12 and max(starts) > 70 and min(starts) < 20


def test_a_clip_is_a_part_of_a_video(tmp_path):
    path = save(tmp_path, "a.mp4", frames=100, rate=10, options={"g": "7"} | X264)
    assert numbers(Clip(path, 2.0, 4.0), 4) == [22, 27, 32, 37]
    assert numbers(Clip(path, 8.0), 4) == [82, 87, 92, 97]
    assert numbers(Clip(path, end=2.0), 4) == numbers(Clip(path, -1.0, 2.0), 4) == [2, 7, 12, 17]
    assert numbers(Clip(path, 9.0, 99.0), 2) == [92, 97]
    assert numbers(Clip(path, 2.0, 4.0), 4, fps=10.0) == [28, 29, 30, 31]
    assert numbers(Clip(path, 2.01, 2.02), 2) == [20, 20]
    rng = np.random.default_rng(0)
    video = VideoTransform(8).random(Clip(path, 3.0, 5.0), rng, IMAGE, WHOLE, WHOLE)
    assert all(30 <= number_of(frame) < 50 for frame in video)


@pytest.mark.parametrize(
    "times", [(4.0, 2.0), (3.0, 3.0), (99.0, None), (None, -1.0), (50.0, 60.0)]
)
def test_a_clip_that_ends_before_it_starts_is_none(tmp_path, times):
    path = save(tmp_path, "a.mp4", options=X264)
    assert cause_of(Clip(path, *times)) == "empty clip"


def test_pictures_have_no_times():
    assert cause_of(Clip([marked(0), marked(1)], 0.0, 1.0)) == "unsupported"
    assert numbers([marked(number) for number in range(16)], 8, fps=3.0) == centres(16)


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("value", ["1", float("nan"), float("inf"), 10**400, [1], True])
def test_times_and_rates_are_numbers(value):
    for make in (lambda: Clip("a.mp4", value), lambda: Clip("a.mp4", 0, value)):
        with pytest.raises(ValueError, match="expected seconds"):
            make()
    with pytest.raises(ValueError, match="VideoTransform.fps"):
        VideoTransform(8, value)


# ---- odd and damaged files ----


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 3000, b"<!DOCTYPE html><html>", b"#EXTM3U\nx.mp4"]
)
def test_no_video_at_all(tmp_path, content):
    expected = "corrupt" if content else "empty"
    (tmp_path / "a.mp4").write_bytes(content)
    assert cause_of(tmp_path / "a.mp4") == cause_of(Clip(content)) == expected
    assert cause_of(Clip(io.BytesIO(content))) == expected


def test_a_missing_file_or_an_address_is_not_opened(tmp_path):
    for path in (tmp_path / "none.mp4", "http://localhost:9/a.mp4", "concat:a.mp4|b.mp4"):
        assert cause_of(path) == "missing file"


def test_a_playlist_does_not_open_other_files(tmp_path):
    path = save(tmp_path, "a.mp4", options=X264)
    for content in (
        f"#EXTM3U\n#EXTINF:2,\n{path}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile {path}",
    ):
        assert cause_of(Clip(content.encode())) == "corrupt"


def test_only_formats_of_the_list_are_opened():
    y4m = b"YUV4MPEG2 W16 H16 F10:1 C444\n" + 4 * (b"FRAME\n" + bytes(3 * 16 * 16))
    assert cause_of(Clip(y4m)) == "corrupt"


def test_a_lost_index_is_no_video():
    content = video_file(60)  # its index comes last
    assert cause_of(content[: len(content) * 2 // 3]) == "no video"


def test_sound_alone_is_no_video(tmp_path):
    assert cause_of(save(tmp_path, "a.mp4", frames=[], sound=True)) == "no video"
    assert cause_of(save(tmp_path, "a.mkv", frames=[], sound=True)) == "no video"


@pytest.mark.parametrize(
    "settings",
    [
        {"container_options": {"movflags": "faststart"}},
        {"container_options": {"movflags": "frag_keyframe+empty_moov"}, "options": {"g": "5"}},
        {"format": "webm", "codec": "libvpx-vp9"},
        {"format": "matroska"},
        {"format": "avi", "codec": "mpeg4"},
    ],
    ids=["faststart", "fragments", "webm", "mkv", "avi"],
)
def test_half_a_video_is_never_taken_for_a_whole_one(settings):
    content = video_file(60, **settings)
    assert len(read(content)) == 8
    for share in (0.5, 0.7, 0.9, 0.99):
        assert cause_of(content[: int(share * len(content))]) == "truncated"
    assert cause_of(content[:-1]) == "truncated"


def test_a_cut_file_of_unknown_size_gives_fewer_frames_or_an_error():
    """A live recording says nothing of its length: what is there is all that can be asked for."""
    content = video_file(60, format="matroska", container_options={"live": "1"})
    assert max(numbers(content[: len(content) // 2])) < 50


def test_frames_that_the_index_has_and_the_file_has_not():
    """The box with the frames ends with the file, and its size was corrected."""
    content = video_file(60, container_options={"movflags": "faststart"}, options=X264)
    at = content.rindex(b"mdat") - 4
    cut = content[: at + (len(content) - at) // 2]
    cut = cut[:at] + (len(cut) - at).to_bytes(4, "big") + cut[at + 4 :]
    with pytest.raises(BadVideo, match=r"\d+ of its 60 frames") as bad:
        read(cut)
    assert bad.value.cause == "truncated"


@pytest.mark.parametrize("format", ["mp4", "matroska", "avi"])
def test_bit_rot_is_found(format):
    frames = np.random.default_rng(0).integers(0, 256, (24, 48, 64, 3), np.uint8)
    settings = {"container_options": {"movflags": "faststart"}} if format == "mp4" else {}
    content = video_file(list(frames), format=format, **settings)
    found = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        rotten = bytearray(content)
        for place in rng.integers(len(content) // 4, len(content) * 3 // 4, 30):
            rotten[place] ^= 1 << int(rng.integers(8))
        try:
            read(bytes(rotten))
        except BadVideo as error:
            assert error.cause in ("corrupt", "truncated")
            found += 1
    assert found == 6


def test_lost_packets_at_the_end_are_found():
    """A reader of Matroska looks for the next whole packet, and may find none."""
    content = bytearray(video_file(100, format="matroska", options=X264))
    content[len(content) // 2 : -300] = bytes(len(content) - 300 - len(content) // 2)
    assert cause_of(bytes(content)) == "corrupt"


@pytest.mark.parametrize(("rotation", "turns"), [(90, 1), (-90, 3), (180, 2)])
def test_a_rotated_video_is_turned_upright(rotation, turns):
    frame = np.zeros((32, 64, 3), np.uint8)
    frame[:16, :32] = 255, 0, 0
    content = video_file([frame] * 3, rotation=rotation, pix_fmt="yuv444p")
    upright = ImageTransform(16)(np.rot90(frame, turns))
    assert np.abs(VideoTransform(1)(content, ImageTransform(16))[0] - upright.astype(int)).max() < 9


def test_odd_sides():
    frame = np.full((33, 47, 3), (200, 40, 90), np.uint8)
    video = read(video_file([frame] * 3, pix_fmt="yuv444p"))
    assert np.abs(video - frame[0, 0].astype(int)).max() < 9


def test_too_many_pixels_are_refused_before_anything_is_decoded():
    black = np.zeros((2048, 2048, 3), np.uint8)
    content = video_file([black] * 2, options=X264)
    assert len(content) < 20_000
    assert cause_of(content, max_image_pixels=1_000_000) == "oversized"
    assert len(read(content, max_image_pixels=2048 * 2048)) == 8


def test_frames_that_grow_in_the_middle_are_refused_by_the_decoder():
    frames = [np.zeros((side, side, 3), np.uint8) for side in (64, 512)]
    parts = [
        video_file([frame] * count, format="h264", options=X264)
        for frame, count in zip(frames, (400, 4), strict=True)
    ]
    assert len(read(b"".join(parts), frames=200)) == 200
    assert cause_of(b"".join(parts), frames=200, max_image_pixels=10_000) == "corrupt"


def test_one_frame_is_repeated():
    assert numbers(video_file([marked(7)])) == [7] * 8


def test_a_cover_picture_is_no_video():
    import av

    file = io.BytesIO(video_file([], sound=True))
    cover = io.BytesIO()
    PIL.Image.fromarray(marked(3)).save(cover, "JPEG")
    output = io.BytesIO()
    with av.open(file) as source, av.open(output, "w", format="mp4") as target:
        sound = target.add_stream_from_template(source.streams.audio[0])
        with av.open(io.BytesIO(cover.getvalue()), format="image2pipe") as picture:
            stream = target.add_stream_from_template(picture.streams.video[0])
            stream.disposition = av.stream.Disposition.attached_pic.value
            for packet in picture.demux():
                if packet.size:
                    packet.stream = stream
                    target.mux(packet)
        for packet in source.demux():
            if packet.size:
                packet.stream = sound
                target.mux(packet)
    assert cause_of(output.getvalue()) == "no video"


def test_only_as_much_is_decoded_as_is_needed(monkeypatch):
    """Only wanted frames become pictures; a clip at the end is found by its keyframe."""
    content = video_file(100, options={"g": "10", "bf": "0"} | X264, container_options={})
    seen, made = [], []
    timed, picture = video_reader._timed, video_reader._picture

    def counted(decoded):
        return ((seen.append(place) or (place, frame)) for place, frame in timed(decoded))

    monkeypatch.setattr(video_reader, "_timed", counted)
    monkeypatch.setattr(
        video_reader, "_picture", lambda frame: made.append(frame.pts) or picture(frame)
    )
    read(Clip(content, end=1.0), 2)
    assert len(made) == 2 and len(seen) == 8  # frames 2 and 7
    seen.clear()
    made.clear()
    read(Clip(content, 9.0), 2)
    assert len(made) == 2 and len(seen) == 8  # of the last group of pictures alone


# ---- other kinds of videos ----


def gif(frames, durations=200, **options):
    file = io.BytesIO()
    first, *others = (PIL.Image.fromarray(frame) for frame in frames)
    settings = {"save_all": True, "append_images": others, "duration": durations, "loop": 0}
    first.save(file, options.pop("format", "GIF"), **settings | options)
    return file.getvalue()


FRAMES = [marked(number) for number in range(10)]


@pytest.mark.parametrize("options", [{}, {"format": "WEBP", "lossless": True}])
def test_animations(tmp_path, options):
    content = gif(FRAMES, **options)
    assert is_animation(content) and not is_video(content)
    assert numbers(content) == centres(10)
    assert numbers(Clip(content, 1.0, 2.0), 5) == [5, 6, 7, 8, 9]
    # the first frame fills half of the time
    assert numbers(gif(FRAMES, [1800, *[200] * 9], **options), 4) == [0, 0, 3, 7]
    path = tmp_path / f"a.{options.get('format', 'gif').lower()}"
    path.write_bytes(content)
    assert is_animation(path) and numbers(path, 5) == centres(10, 5)
    picture = PIL.Image.open(path)
    picture.seek(3)
    assert is_animation(picture) and numbers(picture, 5) == centres(10, 5)
    assert picture.tell() == 3


def test_animations_are_whole_or_refused():
    for content in (gif(FRAMES), gif(FRAMES, format="WEBP")):
        for share in (0.3, 0.6, 0.95):
            assert cause_of(content[: int(share * len(content))]) == "truncated"
        assert cause_of(content, max_image_pixels=100) == "oversized"


def test_a_picture_is_a_video_of_one_frame(tmp_path):
    path = tmp_path / "a.png"
    PIL.Image.fromarray(marked(9)).save(path)
    assert numbers(path) == numbers(path.read_bytes()) == numbers(marked(9)) == [9] * 8
    assert not is_video(path) and not is_animation(path)


def test_a_folder_of_frames_is_read_in_natural_order(tmp_path):
    for number in range(12):
        PIL.Image.fromarray(marked(number)).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    (tmp_path / "._frame3.png").write_text("no frame")
    assert is_video(tmp_path) and is_video(str(tmp_path))
    assert numbers(tmp_path, 12) == list(range(12))
    (tmp_path / "frame5.png").write_bytes(b"")
    with pytest.raises(BadImage, match="frame5.png is empty"):
        read(tmp_path, 12)
    (tmp_path / "none").mkdir()
    assert cause_of(tmp_path / "none") == cause_of([]) == "empty"


def test_arrays_of_another_kind_are_refused():
    assert cause_of(np.zeros((2, 8, 8, 3), np.float32)) == "unsupported"
    assert cause_of(np.zeros((1, 2, 8, 8, 3), np.uint8)) == "unsupported"
    assert cause_of(np.zeros((0, 8, 8, 3), np.uint8)) == "empty"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a.mp4", True),
        (pathlib.Path("A.WEBM"), True),
        ("a.gif", False),
        ("a.jpg", False),
        (Clip("a"), True),
        ([marked(0)], True),
        (np.zeros((2, 8, 8, 3), np.uint8), True),
        (np.zeros((2, 8, 8, 3), np.float32), False),
        (np.zeros((8, 8, 3), np.uint8), False),
        (b"\0\0\0\x20ftypisom", True),
        (b"\0\0\0\x20ftypavif", False),
        (b"\0\0\0\x20ftypavis", False),
        (b"\0\0\0\x20ftypmsf1", False),
        (b"\x1aE\xdf\xa3", True),
        (b"RIFF\0\0\0\0AVI LIST", True),
        (b"RIFF\0\0\0\0WEBPVP8X", False),
        (b"", False),
        (None, False),
        (7, False),
    ],
)
def test_what_is_surely_a_video(value, expected):
    assert is_video(value) == expected
    if isinstance(value, bytes):
        assert is_video(io.BytesIO(value)) == is_video(bytearray(value)) == expected


def test_without_pyav_the_error_says_what_to_install(tmp_path, monkeypatch):
    path = save(tmp_path, "a.mp4", frames=2, options=X264)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"pip install 'mammut-jax\[video\]'") as error:
        read(path)
    assert not isinstance(error.value, BadImage)  # no example is left out for it


# ---- whatever is given is read or refused ----


def test_titles_need_not_be_utf_8():
    content = video_file(8, format="matroska", options=X264)
    assert content.count(b"Lavf") > 0
    assert numbers(content.replace(b"Lavf", b"L\xfcvf")) == list(range(8))


def test_a_codec_that_nobody_knows():
    content = video_file(4, format="matroska", options=X264)
    assert cause_of(content.replace(b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/XVC")) == "unsupported"


def test_a_gif_that_grows_is_refused_before_it_is_decoded():
    content = bytearray(gif(FRAMES))
    last = content.rindex(b"\x21\xf9\x04") + 8  # the picture after its control extension
    assert content[last] == ord(",")
    content[last + 5 : last + 9] = (20_000).to_bytes(2, "little") * 2
    started = time.process_time()
    assert cause_of(bytes(content), max_image_pixels=10**6) == "oversized"
    assert time.process_time() - started < 1


SEEDS = {
    "mp4": {"options": {"g": "5"} | X264},
    "fragments": {"container_options": {"movflags": "frag_keyframe+empty_moov"}, "options": X264},
    "matroska": {"format": "matroska", "options": {"g": "5"} | X264},
    "webm": {"format": "webm", "codec": "libvpx"},
    "avi": {"format": "avi", "codec": "mpeg4"},
    "mpegts": {"format": "mpegts", "options": X264},
    "h264": {"format": "h264", "options": X264},
    "GIF": None,
    "WEBP": None,
}


def damaged(content, rng):
    content = bytearray(content)
    match rng.integers(4):
        case 0:
            return content[: rng.integers(len(content) + 1)]
        case 1:
            for place in rng.integers(0, len(content), rng.integers(1, 6)):
                content[place] = rng.integers(256)
        case 2:
            place = rng.integers(len(content))
            del content[place : place + rng.integers(1, 40)]
        case 3:  # the headers
            for place in rng.integers(0, min(len(content), 200), 3):
                content[place] = rng.choice([0, 1, 127, 128, 255])
    return content


@pytest.mark.parametrize("trials", [12, long(400)])
@pytest.mark.parametrize("kind", SEEDS)
def test_a_damaged_file_is_read_or_refused_in_one_sentence(kind, trials):
    settings = SEEDS[kind]
    content = gif(FRAMES, format=kind) if settings is None else video_file(12, **settings)
    assert len(read(content, 4)) == 4
    for seed in range(trials):
        given = bytes(damaged(content, np.random.default_rng(seed)))
        try:
            assert read(given, 4, max_image_pixels=10**6).shape == (4, 32, 32, 3)
        except BadImage as error:
            assert error.cause in CAUSES and "\n" not in str(error)


def test_shuffled_frames_are_the_same_frames_in_an_order_of_their_own():
    frames = np.arange(16, dtype=np.uint8)[:, None, None, None] * np.ones((8, 8, 3), np.uint8)
    plain = VideoTransform(16)(frames, ImageTransform(8))
    shuffled = VideoTransform(16, shuffled=True)(frames, ImageTransform(8))
    assert np.array_equal(plain, frames) and not np.array_equal(shuffled, frames)
    assert np.array_equal(np.sort(shuffled, 0), frames)
    assert np.array_equal(VideoTransform(16, shuffled=True)(frames, ImageTransform(8)), shuffled)
