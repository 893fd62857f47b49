"""The drawn scenes: what is held out, that the pictures show what the captions say."""

import itertools

import numpy as np
import pytest

from mammut.data import synthetic


def read_off(image: np.ndarray) -> tuple[int, str, str, str, str]:
    """What a scene shows, from its pixels alone."""
    from scipy import ndimage

    side = len(image)
    pixels = image.astype(int)
    away = np.abs(pixels - np.median(pixels, axis=(0, 1))).max(axis=-1) > 45
    regions, count = ndimage.label(away)
    boxes = ndimage.find_objects(regions)
    middles = np.array([[(s.start + s.stop) / 2 / side for s in box] for box in boxes])
    width = np.mean([box[1].stop - box[1].start for box in boxes]) / side
    colour = np.median(pixels[ndimage.binary_erosion(away)], axis=0)
    names = {
        "red": (215, 35, 35),
        "green": (35, 160, 50),
        "blue": (40, 70, 225),
        "yellow": (240, 220, 40),
        "white": (245,) * 3,
        "black": (12,) * 3,
    }
    box = boxes[0]
    top, left = box[0].start, box[1].start
    high, wide = box[0].stop - top, box[1].stop - left

    def filled(y, x):
        return away[top + int(y * high), left + int(x * wide)]

    corners = filled(0.08, 0.08), filled(0.92, 0.08)
    shape = {(True, True): "square", (False, True): "triangle"}.get(corners)
    shape = shape or ("circle" if filled(0.22, 0.22) else "cross")
    down, across = middles.mean(axis=0) - 0.5
    if abs(across) > abs(down):
        place = "left" if across < 0 else "right"
    else:
        place = "top" if down < 0 else "bottom"
    nearest = min(names, key=lambda name: np.abs(colour - names[name]).sum())
    return count, "large" if width > 0.225 else "small", nearest, shape, place


def test_held_out_combinations_are_a_sixth_and_never_in_training():
    train, val = synthetic.combinations("train"), synthetic.combinations("val")
    assert len(set(train) | set(val)) == len(train) + len(val) == 576
    assert len(val) == 96
    said = {
        caption
        for index in range(5_000)
        for caption in synthetic.captions(synthetic.combination("train", index))
    }
    held_out = {caption for combination in val for caption in synthetic.captions(combination)}
    assert len(held_out) == 3 * 96 and not said & held_out


def test_the_split_never_changes():
    assert synthetic.captions(synthetic.combination("val", 0)) == [
        "three large white squares on the right",
        "on the right three large white squares",
        "a picture of three large white squares on the right",
    ]
    assert (
        synthetic.captions(synthetic.combination("train", 0))[0]
        == "one large yellow circle at the top"
    )


def test_val_shows_each_held_out_combination_once():
    shown = [synthetic.combination("val", index) for index in range(synthetic.num_scenes("val"))]
    assert sorted(shown) == sorted(synthetic.combinations("val"))


def test_every_pair_of_attributes_is_learnable_from_training():
    for a, b in itertools.combinations(range(5), 2):
        pairs = {
            split: {(c[a], c[b]) for c in synthetic.combinations(split)}
            for split in ("train", "val")
        }
        assert pairs["val"] <= pairs["train"]


def test_captions_read_as_english():
    made = synthetic.captions(synthetic.Combination(1, "small", "red", "cross", "top"))
    assert made[0] == "one small red cross at the top"
    made = synthetic.captions(synthetic.Combination(2, "small", "red", "cross", "left"))
    assert made[0] == "two small red crosses on the left"


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_scene_is_a_pure_function(split):
    first = synthetic.draw(split, 7, 32)
    synthetic.draw(split, 8, 32)
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(synthetic.draw(split, 7, 32), first)
    assert (synthetic.draw(split, 8, 32) != first).any()


def test_scenes_of_a_combination_differ():
    combination = synthetic.combination("train", 0)
    same = [i for i in range(3_000) if synthetic.combination("train", i) == combination]
    assert len(same) > 2
    assert (synthetic.draw("train", same[0], 32) != synthetic.draw("train", same[1], 32)).any()


def test_pictures_at_32_pixels_show_what_the_captions_say():
    for split in ("train", "val"):
        for index in range(96):
            count, size, colour, _, place = read_off(synthetic.draw(split, index, 32))
            shown = synthetic.combination(split, index)
            assert (count, size, colour, place) == (
                shown.count,
                shown.size,
                shown.colour,
                shown.place,
            ), (split, index)


def test_larger_pictures_show_the_same_scene():
    for index in range(96):
        assert read_off(synthetic.draw("val", index, 96)) == synthetic.combination("val", index), (
            index
        )
