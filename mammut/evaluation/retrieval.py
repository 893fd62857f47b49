"""Retrieval of images by text, and of texts by image.

Candidates are ranked by embedding. A model with both passes can also score the best candidates
again, by the likelihood of the text given the image.
"""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mammut.data.examples import Source
from mammut.evaluation.likelihood import black_image_tokens, image_tokens, pair_logprobs
from mammut.evaluation.metrics.rankings import (
    chance_recall,
    first_ranks,
    nearest,
    rank_scores,
    ranking_recall,
)
from mammut.evaluation.predictions import Predictions
from mammut.evaluation.predictor import Predictor, require_new, require_prior
from mammut.evaluation.scores import Scores
from mammut.models.mammut import MaMMUT

_RANKED = 10  # candidates that are kept for each query: recall at 10 needs no more


def predict_rankings(
    predictor: Predictor,
    params: Any,
    source: Source,
    *,
    limit: int | None = None,
    rerank: int = 0,
    prior: float = 0.0,
) -> Predictions:
    """Ranks all texts for each image, and all images for each text.

    They are ranked by embedding.

    Args:
      params: the model's parameters, on the predictor's mesh.
      limit: the number of examples, from the first on; None for all.
      rerank: the number of best candidates of each query that are scored again, by
        log P(text | image) - prior * log P(text). log P(text) is computed with a black image.
      prior: the share of log P(text) that is subtracted. A short or frequent text is likely for any
        image, which spoils the order of texts at prior 0; the order of images for one text is the
        same at any prior (arXiv 2306.01879).

    Raises:
      ValueError: too many examples cannot be used, two have one key, or `rerank` or `prior` is out
        of its range.
    """
    require_prior(prior)
    if rerank < 0:
        raise ValueError(f"rerank is {rerank}, expected at least 0 candidates")
    left_out = collections.Counter()
    captions, image_embed = _embed_images(predictor, params, source, limit, left_out)
    encoded = predictor.processor.encode_text(captions.texts)
    text_embed = predictor.run_rows(MaMMUT.encode_text, params, *encoded)
    size = max(rerank, _RANKED)
    texts_of, text_scores = nearest(image_embed, text_embed, size)
    images_of, image_scores = nearest(text_embed, image_embed, size)
    own_texts = captions.texts_of_images()
    own_images = [[image] for image in captions.image_of_text]
    text_ranks = first_ranks(image_embed, text_embed, own_texts, texts_of.tolist())
    image_ranks = first_ranks(text_embed, image_embed, own_images, images_of.tolist())
    image_records = _image_records(captions, texts_of, text_scores, text_ranks)
    text_records = _text_records(captions, images_of, image_scores, image_ranks)
    if rerank:

        def pair_scores(pairs: np.ndarray) -> np.ndarray:
            """Computes the new scores of sorted pairs."""
            indices = captions.indices
            return _pair_scores(predictor, params, source, limit, indices, encoded, pairs, prior)

        of_images, of_texts = _score_both_ways(
            texts_of[:, :rerank], images_of[:, :rerank], pair_scores
        )
        _add_reranked(image_records, of_images)
        _add_reranked(text_records, of_texts)

    settings = {"images": len(captions.keys), "texts": len(captions.texts)}
    settings |= {"rerank": rerank, "prior": prior}
    records = image_records + text_records
    return predictor.predictions("retrieval", records, source, left_out, settings)


@dataclasses.dataclass
class _Captions:
    """The images of a set and their texts.

    Both are numbered from 0, without gaps.
    """

    indices: list[int] = dataclasses.field(default_factory=list)  # of each image in the set
    keys: list[str] = dataclasses.field(default_factory=list)  # of each image
    texts: list[str] = dataclasses.field(default_factory=list)
    image_of_text: list[int] = dataclasses.field(default_factory=list)

    def texts_of_images(self) -> list[list[int]]:
        """Lists the numbers of each image's texts, which lie side by side."""
        counts = np.bincount(self.image_of_text, minlength=len(self.keys))
        split = np.split(np.arange(len(self.texts)), np.cumsum(counts)[:-1])
        return [texts.tolist() for texts in split]


def _embed_images(
    predictor: Predictor,
    params: Any,
    source: Source,
    limit: int | None,
    left_out: collections.Counter,
) -> tuple[_Captions, Float[np.ndarray, "I E"]]:
    """Embeds the images of a set, and collects their texts.

    Returns:
      The images with their texts, and the embeddings float[I, E].
    """
    captions = _Captions()
    seen = set()
    embeds = []
    for batch in predictor.batches(source, limit, left_out):
        embed = np.asarray(predictor.run(MaMMUT.encode_image, params, batch.image))
        embeds.append(embed[batch.example_valid])
        for index, example in zip(batch.index.tolist(), batch.examples, strict=True):
            if example is not None:
                require_new(example.key, seen, source)
                captions.image_of_text += [len(captions.keys)] * len(example.captions)
                captions.indices.append(index)
                captions.keys.append(example.key)
                captions.texts += example.captions
    return captions, np.concatenate(embeds)


def _image_records(
    captions: _Captions,
    texts_of: Int[np.ndarray, "I n"],
    scores: Float[np.ndarray, "I n"],
    ranks: list[int],
) -> list[dict[str, Any]]:
    """Makes the records of the images as queries, with the best texts of each."""
    return [
        {
            "query": "image",
            "id": image,
            "key": captions.keys[image],
            "index": captions.indices[image],
            "relevant": own_texts,
            "ranked": texts_of[image].tolist(),
            "scores": scores[image].tolist(),
            "rank": ranks[image],
        }
        for image, own_texts in enumerate(captions.texts_of_images())
    ]


def _text_records(
    captions: _Captions,
    images_of: Int[np.ndarray, "T m"],
    scores: Float[np.ndarray, "T m"],
    ranks: list[int],
) -> list[dict[str, Any]]:
    """Makes the records of the texts as queries, with the best images of each."""
    return [
        {
            "query": "text",
            "id": text,
            "text": captions.texts[text],
            "relevant": [image],
            "ranked": images_of[text].tolist(),
            "scores": scores[text].tolist(),
            "rank": ranks[text],
        }
        for text, image in enumerate(captions.image_of_text)
    ]


def _score_both_ways(
    texts_of: Int[np.ndarray, "I n"],
    images_of: Int[np.ndarray, "T m"],
    pair_scores: Callable[[np.ndarray], np.ndarray],
) -> tuple[Float[np.ndarray, "I n"], Float[np.ndarray, "T m"]]:
    """Scores the candidates of images and of texts.

    A pair that is a candidate both ways is scored once.

    Args:
      texts_of: the candidate texts of each image.
      images_of: the candidate images of each text.
      pair_scores: scores pairs int[N], image * texts + text, which are sorted.
    """
    num_texts = len(images_of)
    images = np.arange(len(texts_of))[:, None]
    texts = np.arange(num_texts)[:, None]
    pairs_of_images = images * num_texts + texts_of
    pairs_of_texts = images_of * num_texts + texts
    both = np.concatenate([pairs_of_images.ravel(), pairs_of_texts.ravel()])
    pairs, inverse = np.unique(both, return_inverse=True)
    of_images, of_texts = np.split(pair_scores(pairs)[inverse], [pairs_of_images.size])
    return of_images.reshape(pairs_of_images.shape), of_texts.reshape(pairs_of_texts.shape)


def _pair_scores(
    predictor: Predictor,
    params: Any,
    source: Source,
    limit: int | None,
    indices: list[int],
    encoded: tuple[np.ndarray, np.ndarray],
    pairs: Int[np.ndarray, " N"],
    prior: float,
) -> Float[np.ndarray, " N"]:
    """Computes log P(text | image) - prior * log P(text) of pairs.

    The result is float[N]. The images are read again.

    Args:
      indices: the index in the set of each image.
      encoded: tokens and text_valid of all texts.
      pairs: int[N], image * texts + text, sorted.
    """
    num_texts = len(encoded[0])
    images, texts = np.divmod(pairs, num_texts)
    scores = np.empty(len(pairs))
    image_of_index = {index: image for image, index in enumerate(indices)}
    for batch in predictor.batches(source, limit, collections.Counter()):
        rows = np.flatnonzero(batch.example_valid)
        if not len(rows):
            continue
        # Pairs are sorted by image, so that the pairs of a batch of images lie side by side.
        first = image_of_index[int(batch.index[rows[0]])]
        own = slice(*np.searchsorted(images, [first, first + len(rows)]))
        of_batch = image_tokens(predictor, params, batch.image)
        own_rows = rows[images[own] - first]
        scores[own] = pair_logprobs(predictor, params, of_batch, own_rows, encoded, texts[own])
    if prior:
        black = black_image_tokens(predictor, params)
        every_text = np.arange(num_texts)
        first_row = np.zeros_like(every_text)
        unseen = pair_logprobs(predictor, params, black, first_row, encoded, every_text)
        scores -= prior * unseen[texts]
    return scores


def _add_reranked(records: list[dict[str, Any]], scores: Float[np.ndarray, "Q n"]) -> None:
    """Adds to each record its n best candidates, scored again.

    They come in the order of their new scores.
    """
    for record, own in zip(records, scores, strict=True):
        # Candidates of equal score stay in the order of their embeddings.
        order = np.argsort(-own, kind="stable")
        candidates = np.array(record["ranked"][: len(own)])
        record["reranked"] = candidates[order].tolist()
        record["reranked_scores"] = own[order].tolist()


def score_rankings(predictions: Predictions) -> Scores:
    """Computes recall at 1, 5 and 10, and the median and the mean rank, both ways.

    It adds the mean recall, and the same scores of the reranked candidates. A file of an older
    version has no ranks.

    Raises:
      ValueError: a ranking or a rank cannot be.
    """
    settings = predictions.settings
    metrics = {}
    chance = {}
    has_ranks = all("rank" in record for record in predictions.records)
    for lists, suffix in (("ranked", ""), ("reranked", "_reranked")):
        if any(lists not in record for record in predictions.records):
            continue
        recalls = {}
        ranks = {}
        for query, way, candidates in (("text", "t2i", "images"), ("image", "i2t", "texts")):
            records = [record for record in predictions.records if record["query"] == query]
            rankings = [_whole_ranking(record, lists) for record in records]
            relevant = [record["relevant"] for record in records]
            recall = ranking_recall(rankings, relevant, num_candidates=settings[candidates])
            recalls |= {f"{way}_{name}": value for name, value in recall.items()}
            by_chance = chance_recall(relevant, settings[candidates])
            chance |= {f"{way}_{name}": value for name, value in by_chance.items()}
            if has_ranks:
                own = [record["rank"] for record in records]
                own = rank_scores(rankings, relevant, own, num_candidates=settings[candidates])
                ranks |= {f"{way}_{name}": value for name, value in own.items()}
        recalls["mean_recall"] = sum(recalls.values()) / len(recalls)
        metrics |= {name + suffix: value for name, value in (recalls | ranks).items()}
    chance["mean_recall"] = sum(chance.values()) / len(chance)
    items = {name: settings[name] for name in ("images", "texts")}
    notes = [] if has_ranks else ["no median and mean rank: records have no rank"]
    return Scores(metrics, notes, items, chance=chance)


def _whole_ranking(record: dict[str, Any], lists: str) -> list[int]:
    """Returns the whole ranking of a query.

    Candidates that were not ranked again come after the others, by embedding.
    """
    first = record[lists]
    known = set(first)
    return first + [candidate for candidate in record["ranked"] if candidate not in known]
