"""Sets of videos: processors, JSON lines, tar shards, batches, bad clips."""

import dataclasses
import functools
import io
import json
import shutil
import tarfile

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from video_files import marked, number_of, save, video_file

import mammut
from mammut.config import DataConfig, TrainConfig, VideoConfig
from mammut.data.batches import TrainBatches, eval_batches
from mammut.data.examples import BadExample
from mammut.data.images import BadImage, ImageTransform
from mammut.data.processor import Processor
from mammut.data.sources import open_source
from mammut.data.video import Clip, VideoTransform, is_video
from mammut.data.video_reader import open_video
from mammut.evaluation.predictor import Predictor
from mammut.generation import text
from mammut.generation.text import generate_text
from mammut.prepare import prepare_frames
from mammut.testing import tiny_config, tiny_model, tiny_processor
from mammut.training.new_processor import make_processor

pytest.importorskip("av", reason="PyAV is not installed: pip install 'mammut-jax[video]'")

X264 = {"preset": "ultrafast"}
SIZE = 32


TINY = functools.cache(tiny_processor)


def processor(frames=None, fps=None):
    video = None if frames is None else VideoTransform(frames, fps)
    tiny = TINY()
    return Processor(tiny.tokenizer, ImageTransform(SIZE), tiny.max_length, video=video)


def picture(number):
    return PIL.Image.fromarray(marked(number))


def gif(path, count=4):
    first, *others = map(picture, range(count))
    first.save(path, save_all=True, append_images=others, duration=100)
    return path


def numbers(video):
    return [number_of(frame) for frame in video]


def open_set(spec, **settings):
    return open_source(spec, image_size=SIZE, **settings)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A set of 12 clips of 4 frames: clip i shows the numbers from 10 i on."""
    folder = tmp_path_factory.mktemp("clips")
    lines = []
    for clip in range(12):
        frames = [marked(10 * clip + number) for number in range(4)]
        (folder / f"{clip}.mp4").write_bytes(video_file(frames, options=X264))
        lines.append({"file": f"{clip}.mp4", "captions": ["one red circle", "a blue square"]})
    (folder / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


# ---- the processor ----


def test_videos_make_a_batch_of_videos(tmp_path):
    path = save(tmp_path, "a.mp4", options=X264)
    array = np.array([marked(number) for number in range(20)])
    videos = [path, str(path), path.read_bytes(), Clip(path), list(array), array]
    for made, frames in ((processor(), 8), (processor(5), 5)):
        batch = made(images=videos, text=["one"])
        assert batch["image"].shape == (6, frames, SIZE, SIZE, 3)
        assert len({tuple(numbers(video)) for video in batch["image"]}) == 1
        assert made(images=np.stack([array, array]))["image"].shape[:2] == (2, frames)
    assert processor(4)(images=[])["image"].shape == (0, SIZE, SIZE, 3)


class Wrapped:
    """An array of a library that NumPy can read, without NumPy's attributes."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


def test_arrays_and_paths_of_other_libraries_are_videos_and_pictures(tmp_path):
    array = np.array([marked(number) for number in range(4)])
    path = np.str_(save(tmp_path, "a.mp4", frames=4, options=X264))
    for video in (Wrapped(array), jnp.asarray(array), path):
        assert is_video(video)
        (found,) = processor(4)(images=[video])["image"]
        assert numbers(found) == [0, 1, 2, 3]
    PIL.Image.fromarray(marked(3)).save(tmp_path / "a.png")
    for made in (processor(), processor(4)):
        (expected,) = made(images=[marked(3)])["image"]
        for picture in (Wrapped(marked(3)), np.str_(tmp_path / "a.png")):
            assert not is_video(picture)
            np.testing.assert_array_equal(made(images=[picture])["image"], [expected])


def test_a_video_in_place_of_a_picture_is_named(tmp_path):
    """Not as a damaged picture: in a list of frames, or given to the image transform."""
    path = save(tmp_path, "a.mp4", frames=2, options=X264)
    for call in (lambda: processor()(images=[[path]]), lambda: processor().image(path)):
        with pytest.raises(BadImage, match="image .*a.mp4 is a video, expected a picture"):
            call()


def test_pictures_stay_pictures_in_direct_calls():
    for made in (processor(), processor(4)):
        assert made(images=[picture(3), marked(5)])["image"].shape == (2, SIZE, SIZE, 3)
        array = np.array([marked(number) for number in range(3)])
        assert made(images=array)["image"].shape == (3, SIZE, SIZE, 3)


def test_a_gif_is_a_video_where_the_processor_is_one_of_videos(tmp_path):
    path = gif(tmp_path / "a.gif")
    for given in (path, path.read_bytes(), PIL.Image.open(path)):
        assert processor()(images=[given])["image"].shape == (1, SIZE, SIZE, 3)
        (video,) = processor(4)(images=[given])["image"]
        assert numbers(video) == [0, 1, 2, 3]


def test_videos_beside_pictures_are_refused(tmp_path):
    path = save(tmp_path, "a.mp4", options=X264)
    with pytest.raises(ValueError, match="a video at 1 and a picture at 0"):
        processor()(images=[marked(1), path])
    with pytest.raises(ValueError, match="a video at 0 and a picture at 1"):
        processor(4)(images=[gif(tmp_path / "a.gif"), marked(1)])


@pytest.mark.long
def test_videos_after_pictures_are_refused_in_later_batches_too():
    with pytest.raises(ValueError, match="videos and pictures"):
        generate_text(tiny_model(), tiny_processor(), [marked(1), [marked(1)]], batch_size=1)


@pytest.mark.parametrize("video", [None, VideoTransform(4), VideoTransform(16, 7.5)])
def test_a_saved_processor_has_its_videos(tmp_path, video):
    made = processor()
    made.video = video
    made.save(tmp_path)
    assert Processor.load(tmp_path).video == video
    values = json.loads((tmp_path / "processor.json").read_text())
    assert ("video" in values) == (video is not None)  # old files have none


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"frames": 0, "fps": None}, "VideoTransform.frames is 0"),
        ({"frames": 4, "fps": -1.0}, "VideoTransform.fps"),
        ({"frames": "4"}, "frames"),
        ({"speed": 4}, "speed"),
        (7, "video"),
    ],
)
def test_a_damaged_processor_is_refused(tmp_path, value, said):
    processor(4).save(tmp_path)
    path = tmp_path / "processor.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"video": value}))
    with pytest.raises(ValueError, match=said) as error:
        Processor.load(tmp_path)
    assert "processor.json" in str(error.value)


def test_a_set_is_read_as_videos_or_as_pictures(tmp_path):
    path = save(tmp_path, "a.mp4", options=X264)
    still = tmp_path / "a.png"
    picture(9).save(still)
    videos, pictures = processor(5), processor()
    assert numbers(videos.read(path)) == [2, 6, 10, 14, 18]
    assert numbers(videos.read(still)) == [9] * 5
    assert numbers(videos.read(gif(tmp_path / "a.gif", 3))) == [0, 0, 1, 2, 2]
    assert number_of(pictures.read(still)) == 9 and pictures.image_shape == (SIZE, SIZE, 3)
    assert number_of(pictures.read(tmp_path / "a.gif")) == 0
    assert videos.image_shape == (5, SIZE, SIZE, 3)
    for video in (path, Clip(path), path.read_bytes(), [marked(0)]):
        with pytest.raises(BadImage, match="is a video, expected a picture: data.frames") as bad:
            pictures.read(video)
        assert bad.value.cause == "unsupported"


# ---- JSON lines and tar shards ----


def example_of(folder, line, field="captions"):
    (folder / "set.jsonl").write_text(json.dumps({"captions": ["x"]} | line))
    return open_set(f"jsonl:{folder}", field=field)[0]


def test_a_line_may_be_a_part_of_a_video(tmp_path):
    path = save(tmp_path, "a.mp4", frames=100, options=X264)
    for times, clip, key in (
        ({"start": 2, "end": 4.5}, Clip(path, 2, 4.5), "a.mp4#t=2,4.5"),
        ({"start": 2.25}, Clip(path, 2.25), "a.mp4#t=2.25"),
        ({"end": 3, "start": None}, Clip(path, None, 3), "a.mp4#t=,3"),
    ):
        example = example_of(tmp_path, {"file": "a.mp4"} | times)
        assert example.image == clip and example.key == key
    assert example_of(tmp_path, {"file": "a.mp4"}).image == path
    assert numbers(processor(2).read(Clip(path, 2, 4))) == [25, 35]
    # a picture may have such fields, of another meaning
    assert example_of(tmp_path, {"file": "a.jpg", "start": "now"}).key == "a.jpg"


@pytest.mark.parametrize("value", ["3", [], True, float("inf"), 10**400])
@pytest.mark.parametrize("name", ["start", "end"])
def test_times_of_another_kind_are_counted(tmp_path, name, value):
    with pytest.raises(BadExample, match=f"set.jsonl, line 1.*{name}.*seconds") as bad:
        example_of(tmp_path, {"file": "a.mp4", name: value})
    assert bad.value.cause == "missing field"


@pytest.mark.parametrize(
    "line",
    [
        {"file": "a.mp4", "start": 0.5, "end": 2},
        {"video_id": "v", "frames": [{"file": "1.png"}, {"file": "2.png"}]},
    ],
)
def test_any_value_of_a_field_is_read_or_refused(tmp_path, line):
    values = [
        None,
        "x",
        "",
        7,
        -1,
        0.5,
        1e300,
        float("nan"),
        True,
        [],
        [1.5],
        {},
        "\ud800",
        "nul\0",
    ]
    for field in line:
        for value in [*values, 10**400, [{"file": 7}], [{"file": "1.png"}, None]]:
            try:
                example = example_of(tmp_path, line | {field: value})
                processor(2).read(example.image)
            except (BadExample, BadImage) as error:
                assert "\n" not in str(error)


def test_questions_about_parts_of_one_video_have_ids_of_their_own(tmp_path):
    lines = [
        {"file": "a.mp4", "start": start, "qa": [{"question": "what?", "answers": ["so"]}]}
        for start in (0, 5)
    ]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = open_set(f"jsonl:{tmp_path}", field="qa")
    assert [source[i].qa[0].id for i in range(2)] == ["a.mp4#t=0#0", "a.mp4#t=5#0"]


def test_a_line_may_list_the_frames_of_a_video(tmp_path):
    for number in range(6):
        picture(number).save(tmp_path / f"{number}.png")
    frames = [{"file": f"{number}.png", "shot": 1} for number in (5, 0, 3)]
    example = example_of(tmp_path, {"video_id": "video7", "frames": frames})
    assert example.key == "video7"
    assert numbers(processor(3).read(example.image)) == [5, 0, 3]
    with pytest.raises(BadImage, match="has no frames") as bad:
        processor(3).read(example_of(tmp_path, {"video_id": 7, "frames": []}).image)
    assert bad.value.cause == "empty"


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return f"tar:{path}"


def test_tar_shards_may_have_videos(tmp_path):
    mp4 = video_file(8, options=X264)
    webm = video_file(8, format="webm", codec="libvpx")
    still = gif(tmp_path / "a.gif", 8).read_bytes()
    files = {}
    for key, (end, content) in enumerate({"mp4": mp4, "webm": webm, "gif": still}.items()):
        files |= {f"00_{key}.{end}": content, f"00_{key}.txt": b"one", f"00_{key}.json": b"{}"}
    spec = write_tar(tmp_path / "0.tar", files)
    for _ in range(2):  # from the headers, and from the kept index
        source = open_set(spec, video=True)
        assert [source[i].key for i in range(3)] == [
            "0.tar/00_0.mp4",
            "0.tar/00_1.webm",
            "0.tar/00_2.gif",
        ]
        assert {source[i].captions[0] for i in range(3)} == {"one"}
        for index in range(3):
            assert numbers(processor(4).read(source[index].image)) == [1, 3, 5, 7]


def test_beside_a_video_a_picture_counts_where_pictures_are_read(tmp_path):
    files = {"a.jpg": b"picture", "a.mp4": b"video", "a.txt": b"x", "b.avi": b"avi", "b.txt": b"y"}
    spec = write_tar(tmp_path / "0.tar", files)
    assert [open_set(spec, video=False)[i].image for i in range(2)] == [b"picture", b"avi"]
    assert [open_set(spec, video=True)[i].image for i in range(2)] == [b"video", b"avi"]


# ---- batches ----

CONFIG = DataConfig(batch_size=4, crop_scale=(0.5, 1.0), horizontal_flip=True, threads=2)


def batches(folder, config=CONFIG, frames=3, state=None, **settings):
    source = open_set(f"jsonl:{folder}")
    made = processor(frames)
    return TrainBatches(source, made, config, seed=0, state=state, **settings)


def test_training_batches_are_exact_on_resume(clips):
    run = batches(clips)
    first = [next(run) for _ in range(3)]
    state = json.loads(json.dumps(run.state()))
    later = [next(run) for _ in range(4)]
    assert {batch["image"].shape for batch in first} == {(4, 3, SIZE, SIZE, 3)}
    again = batches(clips, state=state)
    for expected in later:
        batch = next(again)
        assert all((batch[name] == expected[name]).all() for name in expected)
    images = np.concatenate([batch["image"] for batch in first + later])
    assert len({image.tobytes() for image in images}) > 20  # other frames, crops and flips


def test_processes_together_have_the_batch_of_one(clips):
    whole = next(batches(clips))["image"]
    parts = [
        next(batches(clips, process_index=index, process_count=2))["image"] for index in range(2)
    ]
    assert (whole[0::2] == parts[0]).all() and (whole[1::2] == parts[1]).all()


def test_all_frames_are_flipped_or_none(tmp_path):
    left = np.zeros((SIZE, SIZE, 3), np.uint8)
    left[:, : SIZE // 2] = 255
    PIL.Image.fromarray(left).save(tmp_path / "a.png")
    line = {"video_id": "v", "frames": [{"file": "a.png"}] * 3, "captions": ["x"]}
    (tmp_path / "set.jsonl").write_text("\n".join([json.dumps(line)] * 4))
    config = DataConfig(batch_size=4, horizontal_flip=True)
    run = batches(tmp_path, config)
    white = np.concatenate([next(run)["image"][:, :, 0, 0, 0] for _ in range(8)]) == 255
    assert (white == white[:, :1]).all() and 4 < white[:, 0].sum() < 28


def test_evaluation_reads_the_centres(clips):
    source = open_set(f"jsonl:{clips}")
    settings = {"batch_size": 5, "threads": 2}
    found = list(eval_batches(source, processor(4), **settings))
    assert [batch.image.shape for batch in found] == [(5, 4, SIZE, SIZE, 3)] * 3
    expected = [[10 * clip + number for number in range(4)] for clip in range(12)]
    assert [numbers(video) for batch in found for video in batch.image][:12] == expected
    black = next(eval_batches(source, processor(4), blind=True, **settings))
    assert black.image.shape == (5, 4, SIZE, SIZE, 3) and not black.image.any()


def test_blind_training_has_black_videos(clips):
    run = batches(clips, DataConfig(batch_size=4, blind=True))
    image = next(run)["image"]
    assert image.shape == (4, 3, SIZE, SIZE, 3) and not image.any()


def test_bad_clips_are_replaced_and_counted(clips, tmp_path):
    lines = (clips / "set.jsonl").read_text().splitlines()
    for path in clips.glob("*.mp4"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = (clips / "0.mp4").read_bytes()
    fast = video_file(40, container_options={"movflags": "faststart"}, options=X264)
    bad = {
        "empty": b"",
        "corrupt": b"<html>" * 99,
        "no video": video_file([], sound=True),
        "truncated": fast[: len(fast) - 50],
        "oversized": video_file([np.zeros((600, 600, 3), np.uint8)], options=X264),
    }
    for cause, content in bad.items():
        (tmp_path / f"{cause}.mp4").write_bytes(content)
        lines.append(json.dumps({"file": f"{cause}.mp4", "captions": ["x"]}))
    lines.append(json.dumps({"file": "none.mp4", "captions": ["x"]}))
    lines.append(json.dumps({"file": "0.mp4", "start": 3, "end": 1, "captions": ["x"]}))
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    assert whole
    made = processor(3)
    made.image = ImageTransform(SIZE, max_image_pixels=100_000)
    source = open_set(f"jsonl:{tmp_path}")
    config = DataConfig(batch_size=6, max_bad_share=0.9)
    run = TrainBatches(source, made, config, seed=0)
    for _ in range(4):
        assert next(run)["image"].shape == (6, 3, SIZE, SIZE, 3)
    assert set(run.bad_counts) == {*bad, "missing file", "empty clip"}
    (batch,) = eval_batches(source, made, batch_size=19)
    assert batch.example_valid.sum() == 12
    assert batch.bad == {**dict.fromkeys(bad, 1), "missing file": 1, "empty clip": 1}


def test_a_set_of_videos_that_is_read_as_pictures_says_what_to_set(clips):
    with pytest.raises(ValueError, match="unsupported"):
        next(batches(clips, frames=None))


# ---- decoded once ----


def test_frames_that_are_decoded_once_give_the_same_videos(tmp_path):
    save(tmp_path, "a.mp4", frames=40, options=X264)
    save(tmp_path, "b.webm", codec="libvpx", frames=3)
    (tmp_path / "c.mp4").write_bytes(b"")
    asked = {"question": "what?", "answers": ["so", ""], "question_id": "7", "answer_type": "other"}
    lines = [
        {"file": "a.mp4", "start": 2, "qa": [asked]},
        {"file": "b.webm", "qa": [asked | {"question_id": "8"}]},
        {"file": "c.mp4", "qa": [asked]},
    ]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    common = f"jsonl:{tmp_path}/set.jsonl", str(tmp_path), "once", 8
    with pytest.raises(ValueError, match=r"1 of the 3 examples .*\(1 empty\)"):
        prepare_frames(*common, field="qa")
    shutil.rmtree(tmp_path / "once")
    bad = prepare_frames(*common, field="qa", size=24, max_bad_share=0.5)
    assert bad == {"empty": 1}
    source, original = (
        open_set(spec, field="qa") for spec in (f"jsonl:{tmp_path}/once", common[0])
    )
    assert len(source) == 2
    for index in range(2):
        ours, theirs = source[index], original[index]
        assert ours.qa == theirs.qa and ours.key == theirs.key
        assert numbers(processor(8).read(ours.image)) == numbers(processor(8).read(theirs.image))
    assert numbers(processor(8).read(source[1].image)) == [0, 0, 0, 1, 1, 2, 2, 2]
    assert len(list((tmp_path / "once/frames/00000001").iterdir())) == 3
    assert PIL.Image.open(source[0].image.file[0]).size == (32, 24)
    with pytest.raises(ValueError, match="exists already"):
        prepare_frames(*common, field="qa")
    with pytest.raises(ValueError, match="'My Set', expected lower-case"):
        prepare_frames(*common[:2], "My Set", 8)


def test_in_calls_a_video_has_the_frames_that_its_model_is_made_for(tmp_path, monkeypatch):
    """With fewer a kind of tube may have no token."""
    config = tiny_config()
    vision = dataclasses.replace(config.vision, video=VideoConfig(frames=6, patch_stride=3))
    model = tiny_model(dataclasses.replace(config, vision=vision))
    made = tiny_processor()
    mammut.save(tmp_path / "model", model, made)
    _, loaded = mammut.load(tmp_path / "model")
    clip = np.zeros((20, 16, 16, 3), np.uint8)
    assert loaded(images=[clip])["image"].shape[1] == 6 and loaded.video is None
    assert loaded(images=[clip[0]])["image"].shape == (1, 16, 16, 3)

    def stop(graphdef, params, image, *others, **settings):
        raise InterruptedError(image.shape)

    monkeypatch.setattr(text, "_generate", stop)
    for given in (made, loaded):
        with pytest.raises(InterruptedError, match=r"\(1, 6, 16, 16, 3\)"):
            generate_text(model, given, [clip])
    assert made(images=[clip])["image"].shape[1] == 8  # the caller's own is as it was
    loaded.video = VideoTransform(3)
    assert loaded(images=[clip])["image"].shape[1] == 3


# ---- a run ----


def test_a_run_reads_the_frames_that_its_config_says():
    config = TrainConfig(model=tiny_config(), data=DataConfig(frames=6, frame_rate=2.5), steps=10)
    source = open_set("synthetic:val[:40]")
    assert make_processor(config, source, {}).video == VideoTransform(6, 2.5)
    config = TrainConfig(model=tiny_config(), steps=10)
    assert make_processor(config, source, {}).video is None


def test_settings_that_make_no_sense_with_videos_are_refused(clips):
    vision = dataclasses.replace(tiny_config().vision, low_image_size=8)
    model = dataclasses.replace(tiny_config(), vision=vision)
    with pytest.raises(ValueError, match="low_image_steps is 5 with data.frames 4"):
        TrainConfig(model=model, data=DataConfig(frames=4), steps=10, low_image_steps=5)
    with pytest.raises(ValueError, match="low_steps is 2 with data.frames 3"):
        batches(clips, low_image_size=8, low_steps=2)
    with pytest.raises(ValueError, match="frame_rate is 2.0, which needs DataConfig.frames"):
        DataConfig(frame_rate=2.0)
    for name, value in (("frames", 0), ("frame_rate", 0.0)):
        with pytest.raises(ValueError, match=f"DataConfig.{name}"):
            DataConfig(**{"frames": 4, name: value})


def test_a_predictor_knows_the_shape_of_a_video():
    mesh = mammut.make_mesh(mammut.MeshConfig())
    made = Predictor(lambda params: None, processor(4), mesh, checkpoint="x", batch_size=8)
    assert made.image_shape == (4, SIZE, SIZE, 3) and made.image_size == SIZE


# ---- real sets ----


def test_real_frames_and_gifs(shared):
    source = open_set(f"jsonl:{shared}/data/msrvtt_frames")
    video = processor(8).read(source[0].image)
    assert len(source[0].image.file) == 8 and len({frame.tobytes() for frame in video}) == 8
    source = open_set(f"jsonl:{shared}/data/easy_vqa_video", field="qa")
    video = processor(10).read(source[0].image)
    assert len({frame.tobytes() for frame in video}) == 10 and source[0].qa


@pytest.mark.long
def test_all_real_gifs_and_frames_are_whole(shared):
    for name, field in (("msrvtt_frames", "captions"), ("easy_vqa_video", "qa")):
        source = open_set(f"jsonl:{shared}/data/{name}", field=field)
        for index in range(len(source)):
            assert processor(4).read(source[index].image).shape == (4, SIZE, SIZE, 3)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("bigbuckbunny", (720, 1280)),
        ("maxtext_test_video", (480, 454)),
        ("videoprism_water_bottle", (512, 512)),
    ],
)
def test_real_clips_have_the_pixels_of_another_decoder(shared, name, shape):
    cv2 = pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    path = shared / f"data/clips/{name}.mp4"
    expected = []
    capture = cv2.VideoCapture(str(path))
    while (found := capture.read())[0]:
        expected.append(found[1][..., ::-1])
    assert expected[0].shape == (*shape, 3)

    wanted = [int((segment + 0.5) * len(expected) / 7) for segment in range(7)]
    with open_video(path, max_pixels=10**7) as frames:
        assert len(frames.starts) == len(expected)
        for index, frame in zip(wanted, frames.read(wanted), strict=True):
            difference = np.abs(frame.astype(int) - expected[index])
            assert difference.max() <= 1, (index, difference.max())
    assert VideoTransform(7)(path, ImageTransform(SIZE)).shape == (7, SIZE, SIZE, 3)
