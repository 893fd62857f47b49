"""Retrieval and classification scores, as shares from 0 to 1.

They are computed from arrays or ranked lists. Nothing here knows a model.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32, Int


def nearest(
    query: Float[np.ndarray, "Q E"],
    candidates: Float[np.ndarray, "C E"],
    k: int,
    *,
    chunk: int = 1024,
) -> tuple[Int[np.ndarray, "Q k"], Float32[np.ndarray, "Q k"]]:
    """Finds the k candidates with the highest dot product with each query.

    The best come first, equals by position. At most `chunk` x (`chunk` + k) scores exist at a time.
    A score that is not a number counts as -inf and ranks last.

    Args:
      query: float[Q, E].
      candidates: float[C, E].
      k: at most C are found.

    Returns:
      Positions in `candidates`, int[Q, k], and their scores, float32[Q, k].

    Raises:
      ValueError: k or chunk below 1, no candidates, or widths that differ.
    """
    if k < 1 or chunk < 1:
        raise ValueError(f"nearest needs k and chunk of 1 or more, got k={k} and chunk={chunk}")
    if not len(candidates) or query.shape[1] != candidates.shape[1]:
        raise ValueError(
            f"nearest needs candidates as wide as the queries, got {query.shape} and "
            f"{candidates.shape}"
        )
    k = min(k, len(candidates))
    indices = np.empty((len(query), k), np.int64)
    scores = np.empty((len(query), k), np.float32)
    for row in range(0, len(query), chunk):
        rows = query[row : row + chunk]
        best = np.empty((len(rows), 0), np.float32)
        best_index = np.empty((len(rows), 0), np.int64)
        for start in range(0, len(candidates), chunk):
            block = _scores(rows, candidates[start : start + chunk])
            index = np.broadcast_to(np.arange(start, start + block.shape[1]), block.shape)
            # The best so far come first: their positions are lower, and `_top` keeps the order of
            # equals.
            best = np.concatenate([best, block], 1)
            best_index = np.concatenate([best_index, index], 1)
            top = _top(best, k)
            best = np.take_along_axis(best, top, 1)
            best_index = np.take_along_axis(best_index, top, 1)
        indices[row : row + chunk] = best_index
        scores[row : row + chunk] = best
    return indices, scores


def ranking_recall(
    ranked: Sequence[Sequence[int]],
    relevant: Sequence[Sequence[int]],
    ks: Sequence[int] = (1, 5, 10),
    *,
    num_candidates: int | None = None,
) -> dict[str, float]:
    """Computes recall at k of stored rankings: `r1`, `r5`, `r10`.

    It is the share of queries with any relevant id among the first k, as in the COCO protocol and
    CLIP_benchmark's retrieval; how many of the relevant ids are there does not count.

    Args:
      ranked: ids for each query, the best first.
      relevant: the ids that are right for each query.
      num_candidates: the number of ids that could be ranked, counted from 0; a ranking shorter than
        the largest k must hold them all.

    Raises:
      ValueError: no queries, no ks, lengths that differ, a query without relevant ids, a relevant
        id that is none of `num_candidates`, an id ranked twice, or a ranking that is too short or
        longer than `num_candidates`.
    """
    _check_ks(ks)
    if not len(ranked) or len(ranked) != len(relevant):
        raise ValueError(
            f"recall needs ids for each ranking, got {len(relevant)} lists for {len(ranked)} "
            "rankings"
        )
    for query, (ids, right) in enumerate(zip(ranked, relevant)):
        if not len(right):
            raise ValueError(f"query {query} has no relevant ids")
        for candidate in right:
            if num_candidates is not None and not 0 <= candidate < num_candidates:
                raise ValueError(
                    f"query {query} has the relevant id {candidate}, expected ids from 0 to "
                    f"{num_candidates - 1} for {num_candidates} candidates"
                )
        _check_ranking(f"query {query}", ids, max(ks), num_candidates)
    ranks = [_first_rank(ids, set(right)) for ids, right in zip(ranked, relevant)]
    return {f"r{k}": sum(rank <= k for rank in ranks) / len(ranked) for k in ks}


def first_ranks(
    query: Float[np.ndarray, "Q E"],
    candidates: Float[np.ndarray, "C E"],
    relevant: Sequence[Sequence[int]],
    ranked: Sequence[Sequence[int]],
    *,
    chunk: int = 1024,
) -> list[int]:
    """Finds the rank of the first relevant candidate of each query, from 1.

    Equal scores rank by position, as in `nearest`. Candidates are counted only for queries that
    have no relevant one in `ranked`.

    Args:
      query: float[Q, E].
      candidates: float[C, E].
      relevant: positions in `candidates` that are right for each query, at least one.
      ranked: the positions that `nearest` found for each query.
      chunk: at most `chunk` x `chunk` scores exist at a time.

    Raises:
      ValueError: a query has no relevant ids.
    """
    ranks = []
    rest = []
    for row, (ids, right) in enumerate(zip(ranked, relevant, strict=True)):
        if not len(right):
            raise ValueError(f"query {row} has no relevant ids")
        rank = _first_rank(ids, set(right))
        if rank == math.inf:
            rest.append(row)
            rank = len(ids) + 1  # at least
        ranks.append(rank)
    for start in range(0, len(rest), chunk):
        rows = rest[start : start + chunk]
        own = [relevant[row] for row in rows]
        for row, rank in zip(rows, _counted_ranks(query[rows], candidates, own, chunk)):
            ranks[row] = max(ranks[row], int(rank))
    return ranks


def _counted_ranks(
    query: Float[np.ndarray, "Q E"],
    candidates: Float[np.ndarray, "C E"],
    relevant: Sequence[Sequence[int]],
    chunk: int,
) -> Int[np.ndarray, " Q"]:
    """Counts the candidates before the best relevant one of each query, and that one."""
    starts = range(0, len(candidates), chunk)
    owner = np.repeat(np.arange(len(query)), [len(own) for own in relevant])
    position = np.concatenate(relevant)
    scores = np.empty(len(position), np.float32)
    for start in starts:
        block = _scores(query, candidates[start : start + chunk])
        here = (start <= position) & (position < start + chunk)
        scores[here] = block[owner[here], position[here] - start]
    # The best relevant one of each query; of equals the first.
    order = np.lexsort((position, -scores, owner))
    first = order[np.unique(owner[order], return_index=True)[1]]
    best = scores[first, None]
    place = position[first, None]
    ranks = np.ones(len(query), np.int64)
    for start in starts:
        block = _scores(query, candidates[start : start + chunk])
        columns = np.arange(start, start + block.shape[1])
        ranks += ((block > best) | ((block == best) & (columns < place))).sum(1)
    return ranks


def rank_scores(
    ranked: Sequence[Sequence[int]],
    relevant: Sequence[Sequence[int]],
    ranks: Sequence[int],
    *,
    num_candidates: int,
) -> dict[str, float]:
    """Computes the median and the mean rank of the first relevant ids: `medr`, `meanr`.

    Args:
      ranked: ids for each query, the best first; all candidates or the first of them.
      relevant: the ids that are right for each query.
      ranks: the rank of each query's first relevant id among all candidates, from 1. Where `ranked`
        has a relevant id, its rank there counts.
      num_candidates: the number of ids that could be ranked.

    Raises:
      ValueError: a rank lies within `ranked` where no relevant id is, or after all candidates.
    """
    own = []
    for query, (ids, right, rank) in enumerate(zip(ranked, relevant, ranks, strict=True)):
        first = _first_rank(ids, set(right))
        if first == math.inf and not len(ids) < rank <= num_candidates:
            raise ValueError(
                f"query {query} has the rank {rank}, expected one of {len(ids) + 1} to "
                f"{num_candidates}: none of its {len(ids)} ranked ids is relevant"
            )
        own.append(rank if first == math.inf else first)
    return {"medr": float(np.median(own)), "meanr": float(np.mean(own))}


def chance_recall(
    relevant: Sequence[Sequence[int]], num_candidates: int, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Computes the recall at k that rankings in random order have on average.

    Args:
      relevant: the ids that are right for each query.
      num_candidates: the number of ids that are ranked.
    """
    recalls = {}
    for k in ks:
        # The share of choices of k candidates without any relevant one.
        missed = [
            math.comb(num_candidates - count, k) / math.comb(num_candidates, k)
            if k <= num_candidates
            else 0.0
            for count in (len(set(right)) for right in relevant)
        ]
        recalls[f"r{k}"] = 1 - sum(missed) / len(missed)
    return recalls


def _first_rank(ids: Sequence[int], relevant: set[int]) -> int | float:
    """Returns the rank of the first relevant id, from 1.

    It is infinity if there is none.
    """
    for rank, candidate in enumerate(ids, 1):
        if candidate in relevant:
            return rank
    return math.inf


def classification_scores(
    ranked: Sequence[Sequence[str]], labels: Sequence[str], classes: Sequence[str]
) -> dict[str, float | int | dict[str, float] | dict[str, int]]:
    """Computes `top1`, `top5`, `mean_per_class_recall` and their parts.

    The input is stored rankings of classes.

    Args:
      ranked: class names for each item, the best first; at least 5, or all of them.
      labels: the right class of each item.
      classes: all class names.

    Returns:
      `top1` and `top5`, the shares of items whose label is first or among the first five (among all
      where there are fewer classes); `per_class_recall`, the top1 share of the items of each class
      that occurs, in the order of `classes`; `mean_per_class_recall`, their mean, where a rare
      class counts as much as a frequent one; `per_class_items` and `items`, the numbers of items.

    Raises:
      ValueError: no items, lengths that differ, a class named twice, a label or a ranked name that
        is not among the classes, a name ranked twice or a ranking that is too short.
    """
    if not len(ranked) or len(ranked) != len(labels):
        raise ValueError(
            f"scores need a label for each ranking, got {len(labels)} labels for {len(ranked)} "
            "rankings"
        )
    known = set(classes)
    if len(known) < len(classes):
        twice = [name for name, count in Counter(classes).items() if count > 1]
        raise ValueError(f"classes are named twice: {twice}")
    for item, (names, label) in enumerate(zip(ranked, labels)):
        if label not in known:
            raise ValueError(
                f"item {item} has the label {label!r}, which is not among the {len(classes)} "
                "classes"
            )
        if unknown := set(names) - known:
            raise ValueError(
                f"item {item} ranks {sorted(unknown)}, not among the {len(classes)} classes"
            )
        _check_ranking(f"item {item}", names, 5, len(classes))

    right = Counter(label for names, label in zip(ranked, labels) if names[0] == label)
    per_class_items = Counter(labels)
    per_class_items = {name: per_class_items[name] for name in classes if name in per_class_items}
    per_class_recall = {name: right[name] / count for name, count in per_class_items.items()}
    return {
        "top1": right.total() / len(labels),
        "top5": sum(label in names[:5] for names, label in zip(ranked, labels)) / len(labels),
        "mean_per_class_recall": sum(per_class_recall.values()) / len(per_class_recall),
        "per_class_recall": per_class_recall,
        "per_class_items": per_class_items,
        "items": len(labels),
    }


def _scores(
    query: Float[np.ndarray, "Q E"], candidates: Float[np.ndarray, "C E"]
) -> Float32[np.ndarray, "Q C"]:
    # A float32 product gives equal scores different last bits at different positions in the
    # matrix: ties would not be ties.
    scores = (query.astype(np.float64) @ candidates.astype(np.float64).T).astype(np.float32)
    # Every comparison with NaN is False: the candidates of a diverged model could come first.
    scores[np.isnan(scores)] = -np.inf
    return scores


def _top(scores: Float32[np.ndarray, "Q C"], k: int) -> Int[np.ndarray, "Q k"]:
    """Finds the columns of the k highest scores of each row.

    The best come first, equal scores by column. It returns all columns if there are fewer than k.
    """
    k = min(k, scores.shape[1])
    # argpartition picks any of the scores that equal the k-th best; here the first of them fill
    # what room is left.
    threshold = np.partition(scores, -k, axis=1)[:, -k, None]
    above = scores > threshold
    equal = scores == threshold
    room = k - above.sum(1, keepdims=True)
    columns = np.nonzero(above | (equal & (equal.cumsum(1) <= room)))[1].reshape(-1, k)
    order = np.argsort(-np.take_along_axis(scores, columns, 1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, 1)


def _check_ks(ks: Sequence[int]) -> None:
    if not len(ks) or min(ks) < 1:
        raise ValueError(f"recall needs ks of 1 or more, got {tuple(ks)}")


def _check_ranking(
    whose: str, ranking: Sequence[int] | Sequence[str], k: int, num_candidates: int | None
) -> None:
    needed = k
    if num_candidates is not None:
        needed = min(k, num_candidates)
    if len(ranking) < needed:
        raise ValueError(
            f"the ranking of {whose} has {len(ranking)} places, the scores need the first {needed}"
        )
    if num_candidates is not None and len(ranking) > num_candidates:
        raise ValueError(
            f"the ranking of {whose} has {len(ranking)} places for {num_candidates} candidates"
        )
    if num_candidates is not None and isinstance(ranking[0], int):
        for candidate in ranking:
            if not 0 <= candidate < num_candidates:
                raise ValueError(
                    f"the ranking of {whose} has the id {candidate}, expected ids from 0 to "
                    f"{num_candidates - 1}"
                )
    if len(set(ranking)) < len(ranking):
        raise ValueError(f"the ranking of {whose} names a candidate twice")
