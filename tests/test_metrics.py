"""Retrieval and classification scores: cases worked by hand, ties, and against a full sort."""

import json

import numpy as np
import pytest
from embedding_recall import embedding_recall

from mammut.evaluation.metrics.rankings import (
    classification_scores,
    first_ranks,
    nearest,
    rank_scores,
    ranking_recall,
)
from mammut.evaluation.predictions import Predictions
from mammut.evaluation.scoring import score


def by_sorting(image_embed, text_embed, image_of_text, ks):
    """The definition: sort all candidates, best first, equals by position; find the right ones."""
    scores = text_embed.astype(np.float64) @ image_embed.astype(np.float64).T
    recalls = {}
    for k in ks:
        nearest_images = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        recalls[f"t2i_r{k}"] = np.mean(
            [image_of_text[t] in row for t, row in enumerate(nearest_images)]
        )
        nearest_texts = np.argsort(-scores.T, axis=1, kind="stable")[:, :k]
        recalls[f"i2t_r{k}"] = np.mean(
            [i in image_of_text[row] for i, row in enumerate(nearest_texts)]
        )
    return recalls | {"mean_recall": np.mean(list(recalls.values()))}


def test_a_case_worked_by_hand():
    """Texts score the images (0.8, 0.6, 0), (0.6, 0.8, 0) and (0, 0.6, 0.8).

    The second text prefers a wrong image.
    """
    images = np.eye(3, dtype=np.float32)
    texts = np.array([[0.8, 0.6, 0], [0.6, 0.8, 0], [0, 0.6, 0.8]], np.float32)
    recalls = embedding_recall(images, texts, np.array([0, 2, 1]), (1, 2, 3))
    # Text 0 wants image 0: ranks it first. Text 1 wants image 2: third. Text 2 wants image 1:
    # second.
    assert recalls["t2i_r1"] == pytest.approx(1 / 3)
    assert recalls["t2i_r2"] == pytest.approx(2 / 3)
    assert recalls["t2i_r3"] == 1
    # Image 0 scores its texts (0.8, 0.6, 0), own is 0: first. Image 1: (0.6, 0.8, 0.6), own is 2:
    # third, as 0 ties with it and comes before. Image 2: (0, 0, 0.8), own is 1: third, for the same
    # reason.
    assert recalls["i2t_r1"] == recalls["i2t_r2"] == pytest.approx(1 / 3)
    assert recalls["i2t_r3"] == 1
    assert recalls["mean_recall"] == pytest.approx((1 / 3 + 2 / 3 + 1 + 1 / 3 + 1 / 3 + 1) / 6)


def test_the_names_follow_k():
    recalls = embedding_recall(np.eye(3), np.eye(3), np.arange(3), (1, 7))
    assert set(recalls) == {"t2i_r1", "i2t_r1", "t2i_r7", "i2t_r7", "mean_recall"}
    assert set(recalls.values()) == {1.0}
    assert {type(value) for value in recalls.values()} == {float}


def test_any_of_an_images_texts_will_do():
    """Image 0 has texts 1 and 2; text 2 is its nearest of all, text 1 the farthest."""
    images = np.eye(2, dtype=np.float32)
    texts = np.array([[0.5, 0.9], [0.0, 0.1], [0.9, 0.0]], np.float32)
    recalls = embedding_recall(images, texts, np.array([1, 0, 0]), (1, 2))
    assert recalls["i2t_r1"] == 1
    assert recalls["t2i_r1"] == pytest.approx(2 / 3)  # text 1 is nearer to image 1
    assert recalls["t2i_r2"] == 1


@pytest.mark.parametrize("chunk", [1024, 100, 7])
@pytest.mark.parametrize(("num_images", "texts_each"), [(77, 5), (40, 1)])
def test_an_encoder_that_maps_all_to_one_point_scores_chance(num_images, texts_each, chunk):
    """Exactly so: equals rank by position, although float32 products differ in their last bit."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        point = rng.normal(size=192).astype(np.float32)
        point /= np.linalg.norm(point)
        images, texts = (
            np.tile(point, (num_images, 1)),
            np.tile(point, (num_images * texts_each, 1)),
        )
        recalls = embedding_recall(
            images, texts, np.repeat(np.arange(num_images), texts_each), (1, 5, 10), chunk
        )
        for k in (1, 5, 10):
            # the first k images are found, by each of their texts
            assert recalls[f"t2i_r{k}"] == k / num_images
            # the images of the first k texts
            assert recalls[f"i2t_r{k}"] == -(-k // texts_each) / num_images


def rankings(images, texts, image_of_text, k=10):
    """The predictions of a set with these embeddings."""
    records = []
    for query, queries, candidates in (("image", images, texts), ("text", texts, images)):
        ranked, scores = nearest(queries, candidates, k)
        for i in range(len(queries)):
            relevant = [image_of_text[i].item()]
            if query == "image":
                relevant = np.flatnonzero(image_of_text == i).tolist()
            own = {"ranked": ranked[i].tolist(), "scores": scores[i].tolist()}
            records.append({"query": query, "id": i, "relevant": relevant} | own)
    settings = {"images": len(images), "texts": len(texts)}
    return Predictions("retrieval", records, "none", "none", settings)


def test_embeddings_that_are_not_numbers_find_nothing():
    """Every comparison with NaN is False: a diverged model could be counted as perfect."""
    rng = np.random.default_rng(0)
    embed, nan = rng.normal(size=(20, 8)).astype(np.float32), np.full((20, 8), np.nan, np.float32)
    for images, texts in ((nan, nan), (embed, nan), (nan, embed)):
        with pytest.raises(ValueError, match="scores that is not finite: the model has diverged"):
            rankings(images, texts, np.arange(20))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ties", [False, True])
def test_recall_equals_a_full_sort(seed, ties):
    """Uneven numbers of texts an image; small whole numbers tie often and multiply exactly."""
    rng = np.random.default_rng(seed)
    num_images, num_texts = rng.integers(2, 12), rng.integers(12, 40)
    image_of_text = rng.permutation(
        np.r_[np.arange(num_images), rng.integers(0, num_images, num_texts - num_images)]
    )
    shapes = (num_images, 3), (num_texts, 3)
    images, texts = (
        (rng.integers(-1, 2, s) if ties else rng.normal(size=s)).astype(np.float32) for s in shapes
    )
    expected = by_sorting(images, texts, image_of_text, (1, 2, 5))
    for chunk in (1, 5, 1024):
        assert embedding_recall(images, texts, image_of_text, (1, 2, 5), chunk) == pytest.approx(
            expected
        )


def test_the_best_text_of_an_image_is_not_hidden_by_equals_of_other_images():
    """All texts score the same; image 1 has the first and the last, image 0 the middle one."""
    images, texts = np.ones((2, 1), np.float32), np.ones((3, 1), np.float32)
    recalls = embedding_recall(images, texts, np.array([1, 0, 1]), (1, 2))
    assert recalls["i2t_r1"] == 0.5 and recalls["i2t_r2"] == 1
    assert recalls["t2i_r1"] == pytest.approx(1 / 3)  # image 0 comes first for every text


def test_recall_does_not_depend_on_the_length_of_the_embeddings():
    rng = np.random.default_rng(0)
    images, texts = (
        rng.normal(size=(10, 4)).astype(np.float32),
        rng.normal(size=(10, 4)).astype(np.float32),
    )
    small = embedding_recall(1e-6 * images, 1e-6 * texts, np.arange(10))
    assert small == embedding_recall(images, texts, np.arange(10))


@pytest.mark.parametrize("chunk", [3, 1024])
def test_an_embedding_that_is_not_a_number_hides_no_other(chunk):
    """Images 0 and 3 are NaN: their texts find others, the other texts find their own first."""
    images, texts = np.eye(6, dtype=np.float32), np.eye(6, dtype=np.float32)
    images[[0, 3]] = np.nan
    recalls = embedding_recall(images, texts, np.arange(6), (1, 4), chunk)
    assert recalls["t2i_r1"] == recalls["t2i_r4"] == pytest.approx(4 / 6)
    # All texts of a NaN image are equal, so that they keep their order: image 0 finds text 0.
    assert recalls["i2t_r1"] == pytest.approx(5 / 6)
    ranked, scores = nearest(texts, images, 6, chunk=chunk)
    assert (ranked[:, 4:] == [0, 3]).all() and (scores[:, 4:] == -np.inf).all()
    assert (nearest(images, texts, 6, chunk=chunk)[1][[0, 3]] == -np.inf).all()


def test_one_image_is_always_found():
    recalls = embedding_recall(
        np.ones((1, 4)), np.random.default_rng(0).normal(size=(5, 4)), np.zeros(5, int)
    )
    assert set(recalls.values()) == {1.0}


def test_an_image_without_a_text_is_refused():
    with pytest.raises(ValueError, match="query 1 has no relevant ids"):
        score(rankings(np.eye(3), np.eye(3), np.array([0, 2, 2])))


@pytest.mark.parametrize(("num_images", "num_texts"), [(0, 0), (2, 0), (0, 2)])
def test_an_empty_set_is_refused(num_images, num_texts):
    with pytest.raises(ValueError, match=r"nearest needs candidates .* and \(0, 2\)"):
        rankings(np.ones((num_images, 2)), np.ones((num_texts, 2)), np.zeros(num_texts, int))


@pytest.mark.parametrize("image_of_text", [[0, 1, 5], [0, 1, -1]])
def test_a_text_of_an_image_that_is_not_there_is_refused(image_of_text):
    with pytest.raises(
        ValueError, match="query 2 has the relevant id (5|-1), expected ids from 0 to 2"
    ):
        embedding_recall(np.eye(3), np.eye(3), np.array(image_of_text))


@pytest.mark.parametrize("ks", [(), (0, 1)])
def test_recall_at_no_k_is_refused(ks):
    with pytest.raises(ValueError, match="ks of 1 or more"):
        embedding_recall(np.eye(3), np.eye(3), np.arange(3), ks)
    with pytest.raises(ValueError, match="ks of 1 or more"):
        ranking_recall([[0]], [[0]], ks)


def best_by_sorting(query, candidates, k):
    """Python's stable sort of (score, position) pairs."""
    scores = [
        [float(np.float32(np.dot(q, c))) for c in candidates] for q in query.astype(np.float64)
    ]
    scores = np.nan_to_num(scores, nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    indices = [sorted(range(len(row)), key=lambda c: (-row[c], c))[:k] for row in scores]
    return np.array(indices), np.take_along_axis(scores, np.array(indices), 1)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 16, 1024])
@pytest.mark.parametrize("k", [1, 4, 30, 100])
@pytest.mark.parametrize("ties", [True, False])
def test_nearest_equals_a_full_stable_sort_whatever_the_chunks(chunk, k, ties):
    """Whole numbers from -1 to 1 in 2 columns: five scores for 30 candidates, nearly all tied."""
    rng = np.random.default_rng(k)
    query, candidates = rng.normal(size=(9, 2)), rng.normal(size=(30, 2))
    if ties:
        query, candidates = rng.integers(-1, 2, size=(9, 2)), rng.integers(-1, 2, size=(30, 2))
    query, candidates = query.astype(np.float32), candidates.astype(np.float32)
    candidates[[2, 11]] = np.nan
    indices, scores = nearest(query, candidates, k, chunk=chunk)
    expected_indices, expected_scores = best_by_sorting(query, candidates, k)
    assert indices.shape == (9, min(k, 30)) and scores.dtype == np.float32
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-6)


def test_equal_candidates_rank_by_position_whatever_the_chunks():
    """Float32 products of equal rows differ in their last bit, by their place in the matrix."""
    rng = np.random.default_rng(0)
    candidates = np.tile(rng.normal(size=(40, 192)).astype(np.float32), (5, 1))
    query = rng.normal(size=(50, 192)).astype(np.float32)
    for chunk in (7, 33, 1024):
        indices, scores = nearest(query, candidates, 15, chunk=chunk)
        np.testing.assert_array_equal(indices[:, ::5] + 40, indices[:, 1::5])
        np.testing.assert_array_equal(indices[:, ::5] + 160, indices[:, 4::5])
        np.testing.assert_array_equal(scores[:, ::5], scores[:, 4::5])


def test_nearest_gives_each_candidate_once_although_no_score_is_a_number():
    indices, scores = nearest(np.full((3, 2), np.nan), np.ones((5, 2)), 4, chunk=2)
    np.testing.assert_array_equal(indices, np.tile(np.arange(4), (3, 1)))
    assert (scores == -np.inf).all()


def test_no_queries_have_no_nearest():
    indices, scores = nearest(np.ones((0, 2)), np.ones((5, 2)), 3)
    assert indices.shape == scores.shape == (0, 3)


@pytest.mark.parametrize(
    ("candidates", "settings", "error"),
    [
        ((0, 2), {"k": 1}, r"got \(3, 2\) and \(0, 2\)"),
        ((4, 2), {"k": 0}, "got k=0"),
        ((4, 2), {"k": 1, "chunk": 0}, "chunk=0"),
    ],
)
def test_nearest_refuses_what_it_cannot_rank(candidates, settings, error):
    with pytest.raises(ValueError, match=error):
        nearest(np.ones((3, 2)), np.ones(candidates), **settings)


def test_any_relevant_id_is_enough():
    """The any-of rule of CLIP_benchmark: a query counts once, whatever number of ids it finds.

    Query 0 has ids 4 and 7, at places 2 and 6: found from k=2 on. Query 1 has id 3, first. Query 2
    has ids 1, 2 and 5,
    at the first three places: 1, and not 3. Query 3 has id 9, which is not among the six first.
    """
    ranked = [[0, 4, 1, 2, 3, 7], [3, 0, 1, 2, 4, 5], [5, 1, 2, 0, 3, 4], [0, 1, 2, 3, 4, 5]]
    recalls = ranking_recall(ranked, [[4, 7], [3], [1, 2, 5], [9]], (1, 2, 6))
    assert recalls == {"r1": 2 / 4, "r2": 3 / 4, "r6": 3 / 4}


@pytest.mark.parametrize("num_images", [1, 4, 30])
def test_stored_rankings_score_as_the_embeddings_do(num_images):
    rng = np.random.default_rng(num_images)
    image_of_text = rng.permutation(np.repeat(np.arange(num_images), 3))
    images = rng.integers(-2, 3, size=(num_images, 3)).astype(np.float32)
    texts = images[image_of_text] + rng.integers(-2, 3, size=(3 * num_images, 3))
    expected = by_sorting(images, texts, image_of_text, (1, 5, 10))
    assert score(rankings(images, texts, image_of_text)).metrics == pytest.approx(expected)
    assert embedding_recall(images, texts, image_of_text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ranked", "relevant", "num_candidates", "error"),
    [
        ([], [], None, "got 0 lists for 0 rankings"),
        ([[1, 2]], [[1], [2]], None, "got 2 lists for 1 rankings"),
        ([[1, 2], [1, 2]], [[1], []], None, "query 1 has no relevant ids"),
        (
            [[1, 2], [1]],
            [[1], [2]],
            None,
            "ranking of query 1 has 1 places, the scores need the first 2",
        ),
        ([[1]], [[1]], 5, "ranking of query 0 has 1 places, the scores need the first 2"),
        ([[1, 2, 3]], [[1]], 2, "has 3 places for 2 candidates"),
        ([[1, 2, 1]], [[1]], None, "ranking of query 0 names a candidate twice"),
    ],
)
def test_rankings_that_cannot_be_scored_are_refused(ranked, relevant, num_candidates, error):
    with pytest.raises(ValueError, match=error):
        ranking_recall(ranked, relevant, (1, 2), num_candidates=num_candidates)


@pytest.mark.parametrize("chunk", [1, 4, 1024])
@pytest.mark.parametrize("k", [1, 3, 40])
def test_ranks_are_those_of_a_full_stable_sort(chunk, k):
    """Small whole numbers make many ties; a query has one to three relevant candidates."""
    rng = np.random.default_rng(k)
    query = rng.integers(-1, 2, (21, 3)).astype(np.float32)
    candidates = rng.integers(-1, 2, (40, 3)).astype(np.float32)
    candidates[7] = np.nan  # ranks last
    relevant = [rng.choice(40, 1 + row % 3, replace=False).tolist() for row in range(21)]
    relevant[4] = [7]
    scores = query.astype(np.float64) @ candidates.T
    scores[:, 7] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")
    expected = [
        1 + min(np.flatnonzero(np.isin(row, own))) for row, own in zip(order, relevant, strict=True)
    ]
    ranked, _ = nearest(query, candidates, k)
    assert first_ranks(query, candidates, relevant, ranked.tolist(), chunk=chunk) == expected
    assert expected[4] == 40 and len(set(expected)) > 10


def test_a_query_without_anything_relevant_has_no_rank():
    with pytest.raises(ValueError, match="query 1 has no relevant ids"):
        first_ranks(np.eye(2), np.eye(2), [[0], []], [[0], [1]])


def test_median_and_mean_rank_worked_by_hand():
    """Ranks 1, 2, 7 and 40; the relevant ids of the last two are not among the ranked."""
    ranked = [[0, 1], [1, 0], [5, 6], [5, 6]]
    relevant = [[0], [0, 3], [1], [2]]
    scores = rank_scores(ranked, relevant, [1, 2, 7, 40], num_candidates=40)
    assert scores == {"medr": 4.5, "meanr": 12.5}
    with pytest.raises(ValueError, match="query 2 has the rank 2, expected one of 3 to 40: none"):
        rank_scores(ranked, relevant, [1, 2, 2, 40], num_candidates=40)
    with pytest.raises(ValueError, match="query 3 has the rank 41, expected one of 3 to 40"):
        rank_scores(ranked, relevant, [1, 2, 7, 41], num_candidates=40)


def ranking(query: str, number: int, relevant: list[int], rank: int | None, **more) -> dict:
    record = {"query": query, "id": number, "relevant": relevant, "ranked": list(range(10))}
    return record | ({} if rank is None else {"rank": rank}) | more


def test_a_clip_with_many_captions_counts_by_the_best_of_them():
    """12 clips with 2 captions each: each caption has a rank, a clip that of its first caption."""
    texts = [ranking("text", text, [text // 2], 1 + text // 2) for text in range(24)]
    images = [
        ranking("image", clip, [2 * clip, 2 * clip + 1], 2 * clip + 1, key=str(clip), index=clip)
        for clip in range(12)
    ]
    settings = {"images": 12, "texts": 24}
    metrics = score(Predictions("retrieval", images + texts, "set", "here", settings)).metrics
    assert metrics["t2i_medr"] == metrics["t2i_meanr"] == 6.5
    assert metrics["i2t_medr"] == metrics["i2t_meanr"] == 12
    assert metrics["i2t_r1"] == 1 / 12 and metrics["t2i_r1"] == 2 / 24
    recalls = [value for name, value in metrics.items() if name[-2:] in ("r1", "r5", "10")]
    assert metrics["mean_recall"] == pytest.approx(np.mean(recalls))


def test_the_ranks_of_reranked_candidates_are_those_of_their_new_order():
    """The second query's relevant candidate is not among those that were scored again."""
    swapped = {"reranked": [1, 0], "reranked_scores": [2.0, 1.0]}
    records = [
        ranking(query, number, [own], rank, **swapped)
        for query in ("image", "text")
        for number, own, rank in ((0, 0, 1), (1, 11, 12), (2, 1, 2))
    ]
    settings = {"images": 12, "texts": 12}
    metrics = score(Predictions("retrieval", records, "set", "here", settings)).metrics
    assert metrics["t2i_medr"] == metrics["t2i_medr_reranked"] == 2
    assert metrics["i2t_meanr"] == metrics["i2t_meanr_reranked"] == 5
    assert metrics["t2i_r1"] == metrics["t2i_r1_reranked"] == pytest.approx(1 / 3)


def test_a_file_without_ranks_has_recall_alone():
    records = [ranking(query, 0, [0], None) for query in ("image", "text")]
    scores = score(Predictions("retrieval", records, "set", "here", {"images": 10, "texts": 10}))
    assert scores.metrics["t2i_r1"] == 1 and "t2i_medr" not in scores.metrics
    assert scores.notes == ["no median and mean rank: records have no rank"]


def test_a_ranking_of_all_candidates_may_be_shorter_than_k():
    assert ranking_recall([[1, 0]], [[0]], num_candidates=2) == {"r1": 0, "r5": 1, "r10": 1}


def test_a_classification_worked_by_hand():
    """Three cats of which two are ranked first and one sixth, one dog ranked second, no cow."""
    classes = ["dog", "cow", "cat", "pig", "hen", "fox"]
    ranked = [
        ["cat", "dog", "cow", "pig", "hen"],
        ["cat", "cow", "dog", "pig", "hen", "fox"],
        ["dog", "cow", "pig", "hen", "fox", "cat"],
        ["fox", "dog", "cow", "cat", "pig"],
    ]
    scores = classification_scores(ranked, ["cat", "cat", "cat", "dog"], classes)
    assert scores == {
        "top1": 2 / 4,
        "top5": 3 / 4,
        "mean_per_class_recall": (2 / 3 + 0 / 1) / 2,
        "per_class_recall": {"dog": 0.0, "cat": 2 / 3},
        "per_class_items": {"dog": 1, "cat": 3},
        "items": 4,
    }
    assert list(scores["per_class_recall"]) == ["dog", "cat"]  # in the order of the classes
    assert json.loads(json.dumps(scores)) == scores


def test_with_fewer_than_five_classes_top5_finds_all():
    scores = classification_scores([["a", "b"], ["a", "b"]], ["a", "b"], ["a", "b"])
    assert (scores["top1"], scores["top5"]) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("ranked", "labels", "classes", "error"),
    [
        ([], [], ["a", "b"], "got 0 labels for 0 rankings"),
        ([["a", "b"]], ["a", "b"], ["a", "b"], "got 2 labels for 1 rankings"),
        (
            [["a", "b"]],
            ["A"],
            ["a", "b"],
            "item 0 has the label 'A', which is not among the 2 classes",
        ),
        ([["a", "c"]], ["a"], ["a", "b"], r"item 0 ranks \['c'\], not among the 2 classes"),
        ([["a", "b"]], ["a"], ["a", "b", "a"], r"classes are named twice: \['a'\]"),
        ([["a", "a"]], ["a"], ["a", "b"], "ranking of item 0 names a candidate twice"),
        (
            [["a", "b"], ["a"]],
            ["a", "a"],
            ["a", "b"],
            "ranking of item 1 has 1 places, the scores need the first 2",
        ),
        (
            [["a", "b", "c", "d"]],
            ["a"],
            list("abcdef"),
            "has 4 places, the scores need the first 5",
        ),
    ],
)
def test_a_classification_that_cannot_be_scored_is_refused(ranked, labels, classes, error):
    with pytest.raises(ValueError, match=error):
        classification_scores(ranked, labels, classes)
