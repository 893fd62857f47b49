"""Scores: NumPy arrays in, numbers out. Nothing here knows a model."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


def retrieval_recall(
    image_embed: Float[np.ndarray, "I E"],
    text_embed: Float[np.ndarray, "T E"],
    image_of_text: Int[np.ndarray, "T"],
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 1024,
) -> dict[str, float]:
    """Recall at k both ways, as shares: `t2i_r1`, `i2t_r1`, ... with several texts an image.

    Text-to-image: the share of texts whose image is among the k nearest. Image-to-text: the share of images with any of
    their texts among the k nearest (the COCO and Flickr protocol). Equal scores rank by position, so that an encoder
    that maps everything to one point scores chance. `chunk` rows of the I x T scores exist at a time.

    Args:
      image_embed: float[I, E].
      text_embed: float[T, E].
      image_of_text: int[T], the row in `image_embed` of each text's image.

    Raises:
      ValueError: no images, no texts, or an image without a text.
    """
    num_images, num_texts = len(image_embed), len(text_embed)
    if not num_images or not num_texts:
        raise ValueError(f"recall needs images and texts, got {num_images} images and {num_texts} texts")
    if missing := num_images - len(np.unique(image_of_text)):
        raise ValueError(f"{missing} of {num_images} images have no text in image_of_text")
    text_ranks = np.concatenate([
        _ranks(_scores(text_embed[start : start + chunk], image_embed), image_of_text[start : start + chunk])
        for start in range(0, num_texts, chunk)
    ])
    # The best-ranked text of an image is its highest-scoring one, at the lowest position among equals.
    order = np.argsort(image_of_text, kind="stable")
    texts_of_image = np.split(order, np.cumsum(np.bincount(image_of_text, minlength=num_images))[:-1])
    image_ranks = []
    for start in range(0, num_images, chunk):
        scores = _scores(image_embed[start : start + chunk], text_embed)
        own = texts_of_image[start : start + chunk]
        best = np.array([texts[np.argmax(row[texts])] for row, texts in zip(scores, own, strict=True)])
        image_ranks.append(_ranks(scores, best))
    recalls = {"t2i": text_ranks, "i2t": np.concatenate(image_ranks)}
    return {f"{way}_r{k}": float((ranks < k).mean()) for way, ranks in recalls.items() for k in ks}


def _scores(query: Float[np.ndarray, "Q E"], candidates: Float[np.ndarray, "C E"]) -> Float[np.ndarray, "Q C"]:
    # A float32 product gives equal scores other last bits at other places in the matrix: ties would not be ties.
    return (query.astype(np.float64) @ candidates.astype(np.float64).T).astype(np.float32)


def _ranks(scores: Float[np.ndarray, "Q C"], target: Int[np.ndarray, "Q"]) -> Int[np.ndarray, "Q"]:
    """How many candidates come before each query's target: int[Q]."""
    own = np.take_along_axis(scores, target[:, None], axis=1)
    earlier = np.arange(scores.shape[1]) < target[:, None]
    better = ~(scores <= own)  # and not `>`: with NaN, a model that has diverged would be first everywhere
    return (better | ((scores == own) & earlier)).sum(1)
