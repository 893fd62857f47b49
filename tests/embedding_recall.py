"""Recall of embeddings, by the functions that the retrieval evaluation ranks and scores with."""

from collections.abc import Sequence

import numpy as np

from mammut.evaluation.metrics.rankings import nearest, ranking_recall


def embedding_recall(
    image_embed: np.ndarray,
    text_embed: np.ndarray,
    image_of_text: np.ndarray,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 1024,
) -> dict[str, float]:
    """`t2i_r1`, `i2t_r1`, ... and `mean_recall`; `image_of_text` is the row of a text's image."""
    own_texts = [np.flatnonzero(image_of_text == i).tolist() for i in range(len(image_embed))]
    ways = {
        "t2i": (text_embed, image_embed, [[image] for image in image_of_text.tolist()]),
        "i2t": (image_embed, text_embed, own_texts),
    }
    recalls = {}
    for way, (queries, candidates, relevant) in ways.items():
        ranked = nearest(queries, candidates, max(ks, default=1), chunk=chunk)[0].tolist()
        recall = ranking_recall(ranked, relevant, ks, num_candidates=len(candidates))
        recalls |= {f"{way}_{name}": value for name, value in recall.items()}
    return recalls | {"mean_recall": sum(recalls.values()) / len(recalls)}
