"""What a run says of itself on its validation set: the predictions and scores of the evaluation programs."""

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
from mammut.evaluation.classification import class_names
from mammut.evaluation.predictions import Predictions
from mammut.evaluation.predictor import Predictor
from mammut.evaluation.scoring import save_scores, score
from mammut.training.config import LossConfig, TrainConfig
from mammut.training.step import Trainer
from mammut.training.tasks import TASKS


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Metrics by name, shares as 0 to 1, and the predictions they were scored from."""

    metrics: dict[str, float]
    predictions: list[Predictions]
    num_images: int
    num_texts: int
    bad: dict[str, int]  # examples that could not be used, by cause

    def save(self, workdir: pathlib.Path, name: str) -> None:
        """Writes predictions and scores into a run, as the programs of `eval/` would."""
        for predictions in self.predictions:
            stem = workdir / "eval" / f"{predictions.task}_{name}"
            predictions.save(stem.with_name(stem.name + ".predictions.jsonl"))
            save_scores(
                stem.with_name(stem.name + ".json"), predictions, score(predictions, java=False)
            )


class Evaluator:
    """Evaluates the parameters of a run on its validation set, each task by its own measure.

    | task | predictions | metrics |
    |---|---|---|
    | image_text | retrieval; greedy captions of one batch | t2i_r1 ... i2t_r10, mean_recall; caption_exact |
    | caption | greedy captions | cider, bleu_1 ... bleu_4, rouge_l (without Java) |
    | vqa | greedy answers | exact_match; vqa_acc where the questions have enough answers |
    | classify | the likeliest of the set's names | top1, top5, mean_per_class_recall |
    | text | - | loss of a token, perplexity |

    `alive` is called with every batch. Several processes all evaluate, and come to the same.

    Raises:
      ValueError: `data.eval_batch_size` does not divide over the mesh, or more than
        `data.max_bad_share` of the first batch could not be used.
    """

    def __init__(
        self, source: Source, processor: Processor, config: TrainConfig, trainer: Trainer, checkpoint: str,
        alive: Callable[[], None],
    ):  # fmt: skip
        data = config.data
        sharding.require_divisible(data.eval_batch_size, trainer.mesh, "data.eval_batch_size")
        settings = {
            "batch_size": data.eval_batch_size,
            "threads": data.threads,
            "max_bad_share": data.max_bad_share,
        }
        self._predictor = Predictor(
            trainer.model, processor, trainer.mesh, checkpoint=checkpoint, blind=data.blind or config.task == "text",
            alive=alive, **settings,
        )  # fmt: skip
        self._source, self._processor, self._task, self._limit = (
            source,
            processor,
            config.task,
            data.val_examples,
        )
        self._prompt, self._stem = data.prompt, data.prompt_of("")
        # A set that cannot be used is found out now, not after hours of training.
        self._predictor.check(source, min(data.eval_batch_size, data.val_examples))
        self._classes = class_names(source) if config.task == "classify" else []
        self._caption_limit = min(data.eval_batch_size, data.val_examples)
        self._language = (
            _Language(processor, config, trainer, alive) if config.task == "text" else None
        )

    def __call__(self, params: Any) -> Evaluation:
        """Evaluates the parameters, inside `jax.set_mesh`.

        `caption_exact` is the share of the captions that equal one of their references.

        Raises:
          ValueError: more than `data.max_bad_share` of the examples could not be used.
        """
        ask, source, limit = self._predictor, self._source, self._limit
        if self._language is not None:
            return self._language(params, source, limit)
        if self._task == "image_text":
            retrieval = ask.retrieval(params, source, limit=limit)
            captions = ask.captions(params, source, prompt=self._stem, limit=self._caption_limit)
            metrics = score(retrieval).metrics | {"caption_exact": self._exact(captions)}
            images, texts = retrieval.settings["images"], retrieval.settings["texts"]
            return Evaluation(metrics, [retrieval, captions], images, texts, retrieval.left_out)
        if self._task == "caption":
            predictions = ask.captions(params, source, prompt=self._stem, limit=limit)
        elif self._task == "vqa":
            predictions = ask.answers(params, source, prompt=self._prompt, limit=limit)
        else:
            templates = (f"{self._stem} {{}}".strip(),)
            predictions = ask.classes(
                params, source, self._classes, templates=templates, method="likelihood", limit=limit
            )
        metrics = score(predictions, java=False).metrics
        metrics = {name: value for name, value in metrics.items() if isinstance(value, float)}
        images = len({record["index"] for record in predictions.records})
        return Evaluation(
            metrics, [predictions], images, len(predictions.records), predictions.left_out
        )

    def _exact(self, captions: Predictions) -> float:
        # References are compared as the tokenizer gives them back: lower-cased, say, where it
        # lower-cases.
        given_back = lambda texts: self._processor.decode(self._processor.encode_text(texts)[0])  # noqa: E731
        exact = [
            record["prediction"] in given_back(record["references"]) for record in captions.records
        ]
        return sum(exact) / len(exact)


class _Language:
    """How well a model foretells the texts of a set without their images."""

    def __init__(
        self, processor: Processor, config: TrainConfig, trainer: Trainer, alive: Callable[[], None]
    ):
        self._processor, self._data, self._mesh, self._alive = (
            processor,
            config.data,
            trainer.mesh,
            alive,
        )
        task = TASKS["text"](LossConfig(vocab_chunk=config.loss.vocab_chunk))

        def loss(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            model = trainer.model(params)
            return task.loss_sum(model, batch, jax.random.key(0)), task.target_tokens(model, batch)

        replicated = jax.NamedSharding(trainer.mesh, jax.P())
        self._loss = distributed.compiled_by_all(jax.jit(loss, out_shardings=replicated))

    def __call__(self, params: Any, source: Source, limit: int) -> Evaluation:
        pairs, bad = [], collections.Counter()
        for index in range(min(limit, len(source))):
            try:
                pairs += [
                    (self._data.prompt_of(question), text) for question, text in source.pairs(index)
                ]
            except BadExample as error:
                bad[error.cause] += 1
        left_out = bad.total()
        if not pairs or left_out > self._data.max_bad_share * (left_out + len(pairs)):
            raise ValueError(
                f"{left_out} examples of {source.spec!r} could not be used beside {len(pairs)} texts "
                f"({describe_bad(bad)}), data.max_bad_share allows {self._data.max_bad_share:.0%}"
            )
        total, tokens, rows = 0.0, 0, self._data.eval_batch_size
        for start in range(0, len(pairs), rows):
            arrays = self._processor.encode_pairs(pairs[start : start + rows])
            padded = (np.pad(x, ((0, rows - len(x)), (0, 0))) for x in arrays)
            names = ("tokens", "text_valid", "target")
            batch = {
                name: sharding.replicated_batch(x, self._mesh)
                for name, x in zip(names, padded, strict=True)
            }
            self._alive()
            loss, count = self._loss(params, batch)
            total, tokens = total + float(loss), tokens + int(count)
        metrics = {"loss_caption": total / tokens, "perplexity": math.exp(min(total / tokens, 700))}
        return Evaluation(metrics, [], min(limit, len(source)), len(pairs), dict(bad))
