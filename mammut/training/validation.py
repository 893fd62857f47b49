"""Validation during a run: predictions and scores of its validation set."""

import collections
import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mammut.core import distributed, sharding
from mammut.data.batches import describe_bad
from mammut.data.examples import BadExample, Source
from mammut.data.processor import Processor
from mammut.evaluation.classification import class_names, predict_classes
from mammut.evaluation.generated_texts import predict_answers, predict_captions
from mammut.evaluation.predictions import PREDICTIONS_SUFFIX, Predictions
from mammut.evaluation.predictor import Predictor
from mammut.evaluation.requirements import readable, require_scorable
from mammut.evaluation.retrieval import predict_rankings
from mammut.evaluation.scores import save_scores
from mammut.evaluation.scoring import score
from mammut.models.compute import Augment
from mammut.training.config import LossConfig, TrainConfig
from mammut.training.step import Trainer
from mammut.training.tasks import TASKS

# The evaluation, of `mammut.evaluation.scoring.EVALUATIONS`, that scores a task.
_EVALUATIONS = {
    "image_text": "retrieval",
    "caption": "caption",
    "vqa": "vqa",
    "classify": "classify",
}


@dataclasses.dataclass(frozen=True)
class ValidationResult:
    """Metrics by name, and the predictions that they score.

    Shares are numbers from 0 to 1.
    """

    metrics: dict[str, float]
    predictions: list[Predictions]
    num_images: int
    num_texts: int
    bad: dict[str, int]  # the number of examples that could not be used, by cause

    def save(self, workdir: pathlib.Path, name: str) -> None:
        """Writes predictions and scores into a run.

        The programs of `eval/` write them in the same way.
        """
        for predictions in self.predictions:
            stem = workdir / "eval" / f"{predictions.task}_{name}"
            predictions.save(stem.with_name(stem.name + PREDICTIONS_SUFFIX))
            scores = score(predictions, java=False)
            save_scores(stem.with_name(stem.name + ".json"), predictions, scores)


class Evaluator:
    """Evaluates the parameters of a run on its validation set.

    The task decides which metrics are computed.

    | task | predictions | metrics |
    |---|---|---|
    | image_text | retrieval | t2i_r1 ... i2t_r10, mean_recall, t2i_medr ... i2t_meanr |
    | | greedy captions of one batch | caption_exact: the share that equals a reference |
    | caption | greedy captions | cider, bleu_1 ... bleu_4, rouge_l (without Java) |
    | vqa | greedy answers | exact_match; exact of one answer each, vqa_acc of enough |
    | classify | the likeliest of the training set's names | top1, top5, mean_per_class_recall |
    | text | - | loss of a token, perplexity |

    With several processes all of them evaluate, with the same result.

    Args:
      checkpoint: the run's folder, named in the predictions.
      alive: called before every batch that the model is run on.

    Raises:
      ValueError: the task has no evaluation, `data.eval_batch_size` does not divide over the mesh,
        more than `data.max_bad_share` of the first batch could not be used, or the set cannot be
        scored.
    """

    def __init__(
        self,
        source: Source,
        processor: Processor,
        config: TrainConfig,
        trainer: Trainer,
        checkpoint: str,
        alive: Callable[[], None],
    ):
        data = config.data
        sharding.require_divisible(data.eval_batch_size, trainer.mesh, "data.eval_batch_size")
        self._predictor = Predictor(
            trainer.model,
            processor,
            trainer.mesh,
            checkpoint=checkpoint,
            batch_size=data.eval_batch_size,
            threads=data.threads,
            max_bad_share=data.max_bad_share,
            blind=data.blind or config.task == "text",
            alive=alive,
        )
        self._source = source
        self._processor = processor
        self._limit = data.val_examples
        self._prompt = data.prompt
        self._caption_prompt = data.prompt_of("")
        self._first_batch = min(data.eval_batch_size, data.val_examples)
        # A set that cannot be used is an error now, not after hours of training.
        self._predictor.check(source, self._first_batch)
        require_scored(source, self._limit, config.task)

        evaluate = {
            "image_text": self._image_text,
            "caption": self._captions,
            "vqa": self._answers,
            "classify": self._classes,
            "text": self._language,
        }
        if config.task not in evaluate:
            raise ValueError(
                f"task is {config.task!r}, which has no evaluation: expected one of "
                f"{', '.join(evaluate)}, or a row for it in mammut.training.validation.Evaluator"
            )
        self._evaluate = evaluate[config.task]
        if config.task == "classify":
            self._classes_of = _classes_of(source, processor, self._caption_prompt, alive)
        self._language_loss = None
        if config.task == "text":
            self._language_loss = _LanguageLoss(processor, config, trainer, alive)

    def __call__(self, params: Any) -> ValidationResult:
        """Evaluates parameters, inside `jax.set_mesh`.

        Raises:
          ValueError: more than `data.max_bad_share` of the examples could not be used.
        """
        return self._evaluate(params)

    def _image_text(self, params: Any) -> ValidationResult:
        """Scores retrieval and exact captions.

        A caption is exact where it equals one of its references.
        """
        inputs = (self._predictor, params, self._source)
        retrieval = predict_rankings(*inputs, limit=self._limit)
        captions = predict_captions(*inputs, prompt=self._caption_prompt, limit=self._first_batch)
        metrics = score(retrieval).metrics | {"caption_exact": self._exact(captions)}
        images = retrieval.settings["images"]
        texts = retrieval.settings["texts"]
        return ValidationResult(metrics, [retrieval, captions], images, texts, retrieval.left_out)

    def _captions(self, params: Any) -> ValidationResult:
        settings = {"prompt": self._caption_prompt, "limit": self._limit}
        return _scored(predict_captions(self._predictor, params, self._source, **settings))

    def _answers(self, params: Any) -> ValidationResult:
        settings = {"prompt": self._prompt, "limit": self._limit}
        return _scored(predict_answers(self._predictor, params, self._source, **settings))

    def _classes(self, params: Any) -> ValidationResult:
        names, template = self._classes_of
        settings = {"templates": (template,), "method": "likelihood", "limit": self._limit}
        inputs = (self._predictor, params, self._source, names)
        return _scored(predict_classes(*inputs, **settings))

    def _language(self, params: Any) -> ValidationResult:
        return self._language_loss(params, self._source, self._limit)

    def _exact(self, captions: Predictions) -> float:
        exact = []
        for record in captions.records:
            # References are compared in the tokenizer's decoded form: in lower case where the
            # tokenizer lower-cases.
            references = self._processor.decode(
                self._processor.encode_text(record["references"])[0]
            )
            exact.append(record["prediction"] in references)
        return sum(exact) / len(exact)


def _classes_of(
    source: Source,
    processor: Processor,
    prompt: str,
    alive: Callable[[], None] = lambda: None,
) -> tuple[list[str], str]:
    """Lists the classes to choose from, and the template of their texts.

    They are those of the training set. Names that the validation set alone has are added, so that
    their images count as they are: not learnt. A run of an older version has no names of its
    training set.
    """
    own = class_names(source, alive)
    if processor.classes is None:
        return own, f"{prompt} {{}}".strip()
    trained = processor.classes.names
    if new := [name for name in own if name not in set(trained)]:
        distributed.say(
            f"{len(new)} of {len(own)} names of {source.spec!r} are not in the training set, such "
            f"as {new[0]!r}: split a file that is sorted by [!::5] and [::5]"
        )
    return [*trained, *new], processor.classes.template


def _scored(predictions: Predictions) -> ValidationResult:
    """Scores one set of predictions.

    The evaluation has the metrics that are numbers.
    """
    metrics = score(predictions, java=False).metrics
    metrics = {name: value for name, value in metrics.items() if isinstance(value, float)}
    images = len({record["index"] for record in predictions.records})
    texts = len(predictions.records)
    return ValidationResult(metrics, [predictions], images, texts, predictions.left_out)


def require_scored(source: Source, limit: int, task: str) -> None:
    """Checks that what a model says of the first examples of a set can be scored.

    No image is decoded. Examples that cannot be used are passed over.

    Raises:
      ValueError: two examples have one key, or two questions one id; or there is nothing to compare
        with.
    """
    if task not in _EVALUATIONS:
        return
    require_scorable(source, _EVALUATIONS[task], limit)
    for example in readable(source, limit):
        truth = {example.key: example.captions}
        if task == "classify":
            truth = {example.key: example.name}
        if task == "vqa":
            truth = {question.id: question.answers for question in example.qa}
        for name, value in truth.items():
            if not value:
                raise ValueError(
                    f"{source.spec!r} has nothing to score {name!r} against, expected it for every "
                    "example of data.val"
                )


class _LanguageLoss:
    """The loss of the texts of a set without their images."""

    def __init__(
        self, processor: Processor, config: TrainConfig, trainer: Trainer, alive: Callable[[], None]
    ):
        self._processor = processor
        self._data = config.data
        self._mesh = trainer.mesh
        self._alive = alive
        task = TASKS["text"](LossConfig(vocab_chunk=config.loss.vocab_chunk))

        def loss(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            model = trainer.model(params)
            return task.loss_sum(model, batch, Augment()), task.target_tokens(model, batch)

        replicated = jax.NamedSharding(trainer.mesh, jax.P())
        self._loss = distributed.compiled_by_all(jax.jit(loss, out_shardings=replicated))

    def __call__(self, params: Any, source: Source, limit: int) -> ValidationResult:
        """Computes the loss of a token and its perplexity.

        The texts belong to the first `limit` examples.
        """
        limit = min(limit, len(source))
        pairs, bad = self._pairs(source, limit)
        total = 0.0
        tokens = 0
        rows = self._data.eval_batch_size
        for start in range(0, len(pairs), rows):
            arrays = self._processor.encode_pairs(pairs[start : start + rows])
            padded = (np.pad(x, ((0, rows - len(x)), (0, 0))) for x in arrays)
            names = ("tokens", "text_valid", "target")
            batch = {
                name: sharding.global_batch(x, self._mesh)
                for name, x in zip(names, padded, strict=True)
            }
            self._alive()
            loss, count = self._loss(params, batch)
            total += float(loss)
            tokens += int(count)
        metrics = {"loss_caption": total / tokens, "perplexity": math.exp(min(total / tokens, 700))}
        return ValidationResult(metrics, [], limit, len(pairs), bad)

    def _pairs(self, source: Source, limit: int) -> tuple[list[tuple[str, str]], dict[str, int]]:
        """Lists the prompts and texts of the first examples.

        Returns also the counts of unusable examples, by cause.
        """
        pairs = []
        bad = collections.Counter()
        for index in range(limit):
            try:
                for question, text in source.pairs(index):
                    pairs.append((self._data.prompt_of(question), text))
            except BadExample as error:
                bad[error.cause] += 1
        left_out = bad.total()
        if not pairs or left_out > self._data.max_bad_share * (left_out + len(pairs)):
            raise ValueError(
                f"{left_out} examples of {source.spec!r} could not be used beside {len(pairs)} "
                f"texts ({describe_bad(bad)}), data.max_bad_share allows "
                f"{self._data.max_bad_share:.0%}"
            )
        return pairs, dict(bad)
