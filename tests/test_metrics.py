"""Retrieval recall: cases worked by hand, ties, several captions an image, against a full sort."""

import numpy as np
import pytest

from mammut.metrics import retrieval_recall


def by_sorting(image_embed, text_embed, image_of_text, ks):
    """The definition: sort all candidates, the best first and equals by position, and look for the right ones."""
    scores = text_embed.astype(np.float64) @ image_embed.astype(np.float64).T
    recalls = {}
    for k in ks:
        nearest_images = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        recalls[f"t2i_r{k}"] = np.mean([image_of_text[t] in row for t, row in enumerate(nearest_images)])
        nearest_texts = np.argsort(-scores.T, axis=1, kind="stable")[:, :k]
        recalls[f"i2t_r{k}"] = np.mean([i in image_of_text[row] for i, row in enumerate(nearest_texts)])
    return recalls


def test_a_case_worked_by_hand():
    """Texts score the images (0.8, 0.6, 0), (0.6, 0.8, 0) and (0, 0.6, 0.8): the second text prefers a wrong image."""
    images = np.eye(3, dtype=np.float32)
    texts = np.array([[0.8, 0.6, 0], [0.6, 0.8, 0], [0, 0.6, 0.8]], np.float32)
    recalls = retrieval_recall(images, texts, np.array([0, 2, 1]), (1, 2, 3))
    # Text 0 wants image 0: ranks it first. Text 1 wants image 2: third. Text 2 wants image 1: second.
    assert recalls["t2i_r1"] == pytest.approx(1 / 3)
    assert recalls["t2i_r2"] == pytest.approx(2 / 3)
    assert recalls["t2i_r3"] == 1
    # Image 0 scores its texts (0.8, 0.6, 0), own is 0: first. Image 1: (0.6, 0.8, 0.6), own is 2: third, as 0 ties with
    # it and comes before. Image 2: (0, 0, 0.8), own is 1: third, for the same reason.
    assert recalls["i2t_r1"] == recalls["i2t_r2"] == pytest.approx(1 / 3)
    assert recalls["i2t_r3"] == 1


def test_the_names_follow_k():
    recalls = retrieval_recall(np.eye(3), np.eye(3), np.arange(3), (1, 7))
    assert set(recalls) == {"t2i_r1", "i2t_r1", "t2i_r7", "i2t_r7"}
    assert set(recalls.values()) == {1.0}
    assert {type(value) for value in recalls.values()} == {float}


def test_any_of_an_images_texts_will_do():
    """Image 0 has texts 1 and 2; text 2 is its nearest of all, text 1 the farthest."""
    images = np.eye(2, dtype=np.float32)
    texts = np.array([[0.5, 0.9], [0.0, 0.1], [0.9, 0.0]], np.float32)
    recalls = retrieval_recall(images, texts, np.array([1, 0, 0]), (1, 2))
    assert recalls["i2t_r1"] == 1
    assert recalls["t2i_r1"] == pytest.approx(2 / 3)  # text 1 is nearer to image 1
    assert recalls["t2i_r2"] == 1


@pytest.mark.parametrize("chunk", [1024, 100, 7])
@pytest.mark.parametrize(("num_images", "texts_each"), [(77, 5), (40, 1)])
def test_an_encoder_that_maps_all_to_one_point_scores_chance(num_images, texts_each, chunk):
    """And exactly so: equals rank by position, although float32 products of equal rows differ in their last bit."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        point = rng.normal(size=192).astype(np.float32)
        point /= np.linalg.norm(point)
        images, texts = np.tile(point, (num_images, 1)), np.tile(point, (num_images * texts_each, 1))
        recalls = retrieval_recall(images, texts, np.repeat(np.arange(num_images), texts_each), (1, 5, 10), chunk)
        for k in (1, 5, 10):
            assert recalls[f"t2i_r{k}"] == k / num_images  # the first k images are found, by each of their texts
            assert recalls[f"i2t_r{k}"] == -(-k // texts_each) / num_images  # the images of the first k texts


def test_embeddings_that_are_not_numbers_find_nothing():
    """Every comparison with NaN is False: counted carelessly, a model that has diverged would be perfect."""
    rng = np.random.default_rng(0)
    embed, nan = rng.normal(size=(20, 8)).astype(np.float32), np.full((20, 8), np.nan, np.float32)
    for images, texts in ((nan, nan), (embed, nan), (nan, embed)):
        assert set(retrieval_recall(images, texts, np.arange(20)).values()) == {0.0}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ties", [False, True])
def test_recall_equals_a_full_sort(seed, ties):
    """Uneven numbers of texts an image, in any order; small whole numbers tie often and multiply exactly."""
    rng = np.random.default_rng(seed)
    num_images, num_texts = rng.integers(2, 12), rng.integers(12, 40)
    image_of_text = rng.permutation(np.r_[np.arange(num_images), rng.integers(0, num_images, num_texts - num_images)])
    shapes = (num_images, 3), (num_texts, 3)
    images, texts = ((rng.integers(-1, 2, s) if ties else rng.normal(size=s)).astype(np.float32) for s in shapes)
    expected = by_sorting(images, texts, image_of_text, (1, 2, 5))
    for chunk in (1, 5, 1024):
        assert retrieval_recall(images, texts, image_of_text, (1, 2, 5), chunk) == pytest.approx(expected)


def test_the_best_text_of_an_image_is_not_hidden_by_equals_of_other_images():
    """All three texts score the same; image 1 owns the first and the last, image 0 the middle one."""
    images, texts = np.ones((2, 1), np.float32), np.ones((3, 1), np.float32)
    recalls = retrieval_recall(images, texts, np.array([1, 0, 1]), (1, 2))
    assert recalls["i2t_r1"] == 0.5 and recalls["i2t_r2"] == 1
    assert recalls["t2i_r1"] == pytest.approx(1 / 3)  # image 0 comes first for every text


def test_recall_does_not_depend_on_the_length_of_the_embeddings():
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(10, 4)).astype(np.float32), rng.normal(size=(10, 4)).astype(np.float32)
    small = retrieval_recall(1e-6 * images, 1e-6 * texts, np.arange(10))
    assert small == retrieval_recall(images, texts, np.arange(10))


def test_an_image_without_a_text_is_refused():
    with pytest.raises(ValueError, match="1 of 3 images have no text in image_of_text"):
        retrieval_recall(np.eye(3), np.eye(3), np.array([0, 2, 2]))


@pytest.mark.parametrize(("num_images", "num_texts"), [(0, 0), (2, 0), (0, 2)])
def test_an_empty_set_is_refused(num_images, num_texts):
    with pytest.raises(ValueError, match=f"got {num_images} images and {num_texts} texts"):
        retrieval_recall(np.ones((num_images, 2)), np.ones((num_texts, 2)), np.zeros(num_texts, int))
