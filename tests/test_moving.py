"""The moving shapes: a single frame and frames without their order tell nothing of motion."""

import collections

import numpy as np
import pytest

from mammut.data import moving
from mammut.data.moving import NUM_FRAMES, combination, combinations, draw, path
from mammut.data.sources import open_source


def test_held_out_combinations_are_never_shown_in_training_and_all_words_are():
    train, val = set(combinations("train")), set(combinations("val"))
    assert len(train) == 800 and len(val) == 160 and not train & val
    assert combinations("val") == combinations("val")
    for field in moving.Combination._fields:
        words = {getattr(item, field) for item in val}
        assert words == {getattr(item, field) for item in train}
    assert {combination("train", index) for index in range(300)} <= train


@pytest.mark.parametrize("frame", [0, 8, NUM_FRAMES - 1])
def test_a_frame_shows_the_shape_anywhere_whatever_its_direction_and_speed(frame):
    starts = np.random.default_rng(0).random((500, 2))
    # Shares of a torus are uniform again after any shift: their Fourier coefficients are zero.
    for direction in ("left", "right", "up", "down"):
        for speed in ("slowly", "fast"):
            places = np.array([path(start, direction, speed)[frame] for start in starts])
            assert abs(np.exp(2j * np.pi * places).mean(0)).max() < 0.1


def test_the_shape_moves_as_its_caption_says():
    start = np.array([0.5, 0.5])
    assert np.allclose(path(start, "left", "slowly")[:2], [[0.5, 0.5], [0.5, 0.48]])
    assert np.allclose(path(start, "down", "fast")[8], [0.0, 0.5])  # once over the edge
    for index in range(12):
        shown = combination("val", index)
        clip = draw("val", index, 32).astype(int)
        assert clip.shape == (NUM_FRAMES, 32, 32, 3)
        background = np.median(clip, (0, 1, 2))
        mask = np.abs(clip - background).max(-1) > 40
        axis = 0 if shown.direction in ("up", "down") else 1
        sign = 1 if shown.direction in ("right", "down") else -1
        # The phase of the first Fourier coefficient is a place on a torus.
        profile = mask[:5].sum(2 - axis)
        phase = np.unwrap(np.angle(profile @ np.exp(2j * np.pi * np.arange(32) / 32)))
        step = (phase[4] - phase[0]) / (2 * np.pi * 4)
        assert step == pytest.approx(sign * moving._SPEEDS[shown.speed], abs=0.012)


def test_neither_the_middle_frame_nor_a_bag_of_frames_tells_which_colour_came_first():
    changes = moving._CHANGES
    assert sum(change > NUM_FRAMES // 2 for change in changes) * 2 == len(changes)
    # As many clips have k frames of their first colour as have k frames of their last one.
    assert sorted(NUM_FRAMES - change for change in changes) == sorted(changes)


def test_the_source_gives_captions_questions_and_names_of_the_same_clips():
    sources = {
        field: open_source("moving:val", image_size=16, field=field)
        for field in ("captions", "qa", "name")
    }
    assert len(sources["qa"]) == 160
    examples = {field: source[7] for field, source in sources.items()}
    shown = combination("val", 7)
    assert examples["name"].name == shown.direction
    assert shown.first in examples["captions"].captions[0]
    answers = {question.question_type: question.answers for question in examples["qa"].qa}
    assert answers["direction"] == [shown.direction] and answers["last color"] == [shown.last]
    images = [example.image for example in examples.values()]
    assert all(np.array_equal(image, images[0]) for image in images)
    counts = collections.Counter(q.id for i in range(160) for q in sources["qa"][i].qa)
    assert max(counts.values()) == 1 and len(counts) == 800
    assert sources["captions"].pairs(7) == examples["captions"].pairs
