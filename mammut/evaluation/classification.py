"""Classification of images: by embedding, or by likelihood of class names."""

import collections
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from mammut.data.examples import BadExample, Source
from mammut.evaluation.likelihood import black_image_tokens, image_tokens, pair_logprobs
from mammut.evaluation.metrics.rankings import classification_scores, nearest
from mammut.evaluation.predictions import Predictions
from mammut.evaluation.predictor import Predictor, require_new, require_prior, require_slot
from mammut.evaluation.scores import Scores
from mammut.models.mammut import MaMMUT

Method = Literal["contrastive", "likelihood"]

_RANKED = 5  # classes that are kept for each image: top-5 needs no more


def class_names(source: Source, alive: Callable[[], None] = lambda: None) -> list[str]:
    """Lists the names that occur in a set, sorted.

    Examples that cannot be read are left out. `alive` is called for every example.
    """
    names = set()
    for index in range(len(source)):
        alive()
        try:
            names.update(text for _, text in source.pairs(index))
        except BadExample:
            continue
    return sorted(names)


def require_labels(source: Source, classes: Sequence[str], limit: int | None = None) -> None:
    """Checks that every label of a set is a class; the model is not asked.

    Raises:
      ValueError: a label is not.
    """
    known = set(classes)
    size = len(source)
    for index in range(size if limit is None else min(limit, size)):
        try:
            example = source[index]
        except BadExample:
            continue
        if example.name is not None and example.name not in known:
            raise ValueError(
                f"{example.key!r} is {example.name!r}, not one of the {len(classes)} classes"
            )


def predict_classes(
    predictor: Predictor,
    params: Any,
    source: Source,
    classes: Sequence[str],
    *,
    templates: Sequence[str] = ("{}",),
    method: Method = "contrastive",
    prior: float = 0.0,
    limit: int | None = None,
) -> Predictions:
    """Ranks the classes of every image and keeps the best five.

    Args:
      params: the model's parameters, on the predictor's mesh.
      classes: all class names.
      templates: texts with {} in place of the name.
      method: "contrastive": the score of a class is the product of the image's embedding and the
        mean embedding of the name in every template (CLIP, arXiv 2103.00020, section 3.1.4).
        "likelihood": it is the log of the mean over templates of P(text | image).
      prior: of "likelihood", the share of the score for a black image that is subtracted.
      limit: the number of examples, from the first on; None for all.

    Raises:
      ValueError: there are no classes or no templates; a template has no {}; an example's name is
        not a class; a class is named twice; too many examples cannot be used; two have one key; or
        `method` or `prior` is none that there is.
    """
    for template in templates:
        require_slot(template, "template")
    require_prior(prior)
    if method not in get_args(Method):
        raise ValueError(f"method is {method!r}, expected one of {', '.join(get_args(Method))}")
    if not classes or not templates:
        raise ValueError(
            f"there are {len(classes)} classes and {len(templates)} templates, "
            "expected some of each"
        )
    twice = [name for name, count in collections.Counter(classes).items() if count > 1]
    if twice:
        raise ValueError(f"the class {twice[0]!r} is named twice, expected each class once")
    require_labels(source, classes, limit)
    texts = [template.replace("{}", name) for name in classes for template in templates]
    encoded = predictor.processor.encode_text(texts)
    if method == "contrastive":
        ranked_by = _ByEmbedding(predictor, params, encoded, len(classes))
    else:
        ranked_by = _ByLikelihood(predictor, params, encoded, len(classes), prior)

    records = []
    seen = set()
    left_out = collections.Counter()
    for batch in predictor.batches(source, limit, left_out):
        order, scores = ranked_by(batch.image)
        for row, example in enumerate(batch.examples):
            if example is None:
                continue
            require_new(example.key, seen, source)
            record = {
                "key": example.key,
                "index": int(batch.index[row]),
                "label": example.name,
                "ranked": [classes[i] for i in order[row]],
                "scores": scores[row].tolist(),
            }
            records.append(record)
            predictor.finished(record)

    settings = {
        "classes": list(classes),
        "templates": list(templates),
        "method": method,
        "prior": prior,
    }
    trained = predictor.processor.classes
    if trained is not None:
        settings["untrained"] = sorted(set(classes) - set(trained.names))
    return predictor.predictions("classify", records, source, left_out, settings)


class _ByEmbedding:
    """Ranks classes by the product of embeddings."""

    def __init__(self, predictor: Predictor, params: Any, encoded: tuple, num_classes: int):
        self._predictor = predictor
        self._params = params
        embed = predictor.run_rows(MaMMUT.encode_text, params, *encoded)
        embed = embed.reshape(num_classes, -1, embed.shape[-1]).mean(1)  # over the templates
        embed /= np.maximum(np.linalg.norm(embed, axis=1, keepdims=True), 1e-12)
        self._class_embed = embed

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ranks the classes for a batch of images.

        Returns:
          The best classes int[B, 5], and their scores float[B, 5].
        """
        image_embed = np.asarray(self._predictor.run(MaMMUT.encode_image, self._params, image))
        return nearest(image_embed, self._class_embed, _RANKED)


class _ByLikelihood:
    """Ranks classes by the likelihood of their texts."""

    def __init__(
        self, predictor: Predictor, params: Any, encoded: tuple, num_classes: int, prior: float
    ):
        self._predictor = predictor
        self._params = params
        self._encoded = encoded
        self._num_classes = num_classes
        self._prior = prior
        self._prior_scores = self._scores(black_image_tokens(predictor, params), rows=1)

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ranks the classes for a batch of images.

        Returns:
          The best classes int[B, 5], and their scores float[B, 5].
        """
        scores = self._scores(image_tokens(self._predictor, self._params, image), len(image))
        scores = scores - self._prior * self._prior_scores
        order = np.argsort(-scores, axis=1, kind="stable")[:, :_RANKED]
        return order, np.take_along_axis(scores, order, axis=1)

    def _scores(self, tokens_of_images: Any, rows: int) -> Float[np.ndarray, "B C"]:
        """Scores the classes for the images in the first rows.

        A score is the log of the mean over templates of P(text | image).
        """
        every_text = np.arange(len(self._encoded[0]))
        image_of_pair = np.repeat(np.arange(rows), len(every_text))
        text_of_pair = np.tile(every_text, rows)
        logprobs = pair_logprobs(
            self._predictor,
            self._params,
            tokens_of_images,
            image_of_pair,
            self._encoded,
            text_of_pair,
        )
        logprobs = logprobs.reshape(rows, self._num_classes, -1)
        return np.logaddexp.reduce(logprobs, axis=2) - np.log(logprobs.shape[2])


def score_classes(predictions: Predictions) -> Scores:
    """Computes top-1, top-5 and mean per-class recall.

    Notes say where the names make the scores higher or lower than they look.
    """
    classes = predictions.settings["classes"]
    ranked = [record["ranked"] for record in predictions.records]
    labels = [record["label"] for record in predictions.records]
    metrics = classification_scores(ranked, labels, classes)
    count = len(classes)
    chance = {"top1": 1 / count, "top5": min(5, count) / count, "mean_per_class_recall": 1 / count}
    notes = []
    if count == 1:
        notes.append(f"{classes[0]!r} is the only class: every image is right, whatever the model")
    if predictions.settings.get("names_of_set"):
        notes.append(
            "the classes are the names in this set: another set or slice has others, and other "
            "scores"
        )
    if unseen := sorted(set(classes) - set(labels)):
        notes.append(f"{len(unseen)} of {count} classes have no image here, such as {unseen[0]!r}")
    if untrained := predictions.settings.get("untrained"):
        notes.append(
            f"{len(untrained)} of {count} classes are not among those that the model was trained "
            f"on, such as {untrained[0]!r}"
        )
    return Scores(metrics, notes, {"images": len(labels), "classes": count}, chance=chance)
