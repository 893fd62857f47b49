"""eval.speed --what video: the clip that it makes, what it times, and what it prints."""

import json

import numpy as np
import pytest

import mammut
from eval import speed
from mammut.data.images import ImageTransform
from mammut.data.video import VideoTransform
from mammut.data.video_reader import open_video
from mammut.performance import tables, video_time
from mammut.testing import tiny_model, tiny_processor

pytest.importorskip("av", reason="PyAV is not installed: pip install 'mammut-jax[video]'")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    video_time.make_clip(path, frames=12, height=48, width=64)
    return path


class Counted(VideoTransform):
    """Notes what it reads, and in what way."""

    def __init__(self):
        super().__init__(frames=2)
        object.__setattr__(self, "calls", [])

    def map(self, video, picture, max_image_pixels):
        self.calls.append(("decoded", video))

    def __call__(self, video, image):
        self.calls.append(("read", video))
        return np.full((2, 4, 4, 3), video, np.uint8)


def test_the_clip_has_the_frames_asked_for_and_they_move(clip):
    with open_video(clip, max_pixels=10_000) as frames:
        pictures = list(frames.read(range(len(frames.starts))))
    assert len(pictures) == 12 and pictures[0].shape == (48, 64, 3)
    for before, after in zip(pictures, pictures[1:]):
        moved = np.roll(before, (1, 2), (0, 1))[8:, 8:].astype(int)
        still = abs(before[8:, 8:].astype(int) - after[8:, 8:]).mean()
        assert abs(moved - after[8:, 8:]).mean() < still / 2


def test_each_call_reads_every_video_once():
    transform = Counted()
    rows = video_time.measure_reading([7, 8], transform, ImageTransform(4), calls=3)
    # One call of each kind is not timed.
    assert transform.calls == [("decoded", 7), ("decoded", 8)] * 4 + [("read", 7), ("read", 8)] * 4
    assert [row["work"] for row in rows] == ["decoded", "read"]
    assert all(row["calls"] == 3 for row in rows)


def test_a_batch_repeats_the_videos_that_there_are():
    image = ImageTransform(4)
    assert video_time.batch_of([7, 8], Counted(), image, 3)[:, 0, 0, 0, 0].tolist() == [7, 8, 7]
    assert video_time.batch_of([7, 8], Counted(), image, 1).shape == (1, 2, 4, 4, 3)


@pytest.mark.long
def test_every_stage_is_timed_and_its_rates_follow_from_the_times(clip, tmp_path, capsys):
    mammut.save(tmp_path / "model", tiny_model(), tiny_processor())
    options = "--what video --frames 4 --batch-sizes 1 2 --beams 1 2 --new-tokens 3".split()
    out = tmp_path / "times.json"
    model = str(tmp_path / "model")
    speed.main([model, *options, "--videos", str(clip), "--out", str(out)])
    result = json.loads(out.read_text("utf-8"))
    rows = result["video"]
    assert (result["frames"], result["videos"]) == (4, [str(clip)])
    assert [(row["work"], row.get("batch"), row.get("beams")) for row in rows] == [
        ("decoded", None, None),
        ("read", None, None),
        *(("encoded", 1, None), ("captioned", 1, 1), ("captioned", 1, 2)),
        *(("encoded", 2, None), ("captioned", 2, 1), ("captioned", 2, 2)),
    ]
    printed = capsys.readouterr().out
    for row in rows:
        clips = row.get("batch", 1)
        assert len(row["all_seconds"]) == len(row["all_cpu_seconds"]) == 6
        assert row["per_s"] == pytest.approx(clips / np.median(row["all_seconds"]))
        assert row["cpu_ms"] == pytest.approx(1000 * np.median(row["all_cpu_seconds"]) / clips)
        assert row["cpu_ms"] > 0 and tables.video(row) in printed


@pytest.mark.long
def test_without_files_the_program_makes_its_clip(monkeypatch):
    made = []

    def measure(videos, transform, image, calls):
        with open_video(videos[0], max_pixels=100_000) as frames:
            made.append((len(frames.starts), next(frames.read([0])).shape))
        raise ValueError("seen")

    monkeypatch.setattr(video_time, "measure_reading", measure)
    with pytest.raises(ValueError, match="seen"):
        speed.video_rows(speed.Options(new_tokens=3), tiny_model(), None, bos_id=1)
    assert made == [(300, (240, 320, 3))]
