"""Retrieval in a whole set: by embedding, and by the likelihood of the best candidates."""

import numpy as np

_RANKED = 10  # of the candidates of a query, so many are kept: recall at 10 needs no more


def _ranking(ranked: np.ndarray, scores: np.ndarray) -> dict[str, list]:
    return {"ranked": ranked.tolist(), "scores": scores.tolist()}
