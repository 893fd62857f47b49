"""What a run says of itself on a validation set: retrieval recall and captions."""

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mammut import sharding
from mammut.config import DataConfig
from mammut.data import EvalBatch, describe_bad, eval_batches
from mammut.generate import generate
from mammut.metrics import retrieval_recall
from mammut.processor import Processor
from mammut.sources import Source
from mammut.training import Trainer


@dataclasses.dataclass(frozen=True)
class Sample:
    """One validation image: what the model says, and what people (or the drawing program) said."""

    key: str
    caption: str
    references: list[str]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Metrics by name, as shares, and the captions of the first batch."""

    metrics: dict[str, float]
    samples: list[Sample]
    num_images: int
    num_texts: int
    bad: dict[str, int]  # examples that could not be used, by cause


class Evaluator:
    """Retrieval over a validation set, and greedy captions of its first batch, by the model in training.

    Every process reads the whole (small) set and hands its devices their rows, so scores are exact on any mesh.

    Raises:
      ValueError: `config.eval_batch_size` does not divide over the mesh, or more than `config.max_bad_share` of the
        first batch could not be used.
    """

    def __init__(self, source: Source, processor: Processor, config: DataConfig, trainer: Trainer):
        sharding.require_divisible(config.eval_batch_size, trainer.mesh, "data.eval_batch_size")
        self._source, self._processor, self._config, self._mesh = source, processor, config, trainer.mesh
        # A set that cannot be used is found out now, not after hours of training.
        for batch in self._batches(min(config.eval_batch_size, config.val_examples)):
            self._check_share(collections.Counter(batch.bad), int(batch.example_valid.sum()))
        replicated = jax.NamedSharding(trainer.mesh, jax.P())

        def compiled(function):
            return jax.jit(lambda params, *args: function(trainer.model(params), *args), out_shardings=replicated)

        def caption(model, image):
            prompt = jnp.full((len(image), 1), processor.bos_id)
            ids = {"eos_id": processor.eos_id, "vocab_size": processor.vocab_size}
            return generate(model, image, prompt, jnp.ones_like(prompt, bool), **ids).tokens[:, 0]

        self._encode_image = compiled(lambda model, image: model.encode_image(image))
        self._encode_text = compiled(lambda model, tokens, valid: model.encode_text(tokens, valid))
        self._caption = compiled(caption)

    def __call__(self, params: Any) -> Evaluation:
        """Evaluates the parameters, inside `jax.set_mesh`.

        `caption_exact` is the share of the first batch's captions that equal one of their references.

        Raises:
          ValueError: more than `config.max_bad_share` of the examples could not be used.
        """
        image_embeds, references, samples = [], [], []
        bad = collections.Counter()
        for batch in self._batches(self._config.val_examples):
            image = sharding.replicated_batch(batch.image, self._mesh)
            valid = batch.example_valid
            image_embeds.append(np.asarray(self._encode_image(params, image))[valid])
            examples = [example for example in batch.examples if example is not None]
            references += [example.captions for example in examples]
            if not samples:
                captions = self._processor.decode(np.asarray(self._caption(params, image))[valid])
                samples = [Sample(e.key, text, e.captions) for e, text in zip(examples, captions, strict=True)]
            bad.update(batch.bad)
        self._check_share(bad, len(references))

        texts = [text for captions in references for text in captions]
        image_of_text = np.repeat(np.arange(len(references)), [len(captions) for captions in references])
        metrics = retrieval_recall(np.concatenate(image_embeds), self._embed_texts(params, texts), image_of_text)
        metrics["caption_exact"] = float(np.mean([self._exact(sample) for sample in samples]))
        return Evaluation(metrics, samples, len(references), len(texts), dict(bad))

    def _batches(self, limit: int) -> Iterator[EvalBatch]:
        size, threads = self._config.eval_batch_size, self._config.threads
        return eval_batches(self._source, self._processor, batch_size=size, limit=limit, threads=threads)

    def _check_share(self, bad: collections.Counter, good: int) -> None:
        share, allowed = bad.total() / (bad.total() + good), self._config.max_bad_share
        if share > allowed or not good:
            raise ValueError(
                f"{bad.total()} of {bad.total() + good} examples read from data.val {self._source.spec!r} could not be "
                f"used ({describe_bad(bad)}), data.max_bad_share allows {allowed:.0%}"
            )

    def _embed_texts(self, params: Any, texts: list[str]) -> np.ndarray:
        batch_size = self._config.eval_batch_size
        embeds = []
        for start in range(0, len(texts), batch_size):
            tokens, valid = self._processor.encode_text(texts[start : start + batch_size])
            rows = len(tokens)
            pad = ((0, batch_size - rows), (0, 0))
            tokens = sharding.replicated_batch(np.pad(tokens, pad), self._mesh)
            valid = sharding.replicated_batch(np.pad(valid, pad), self._mesh)
            embeds.append(np.asarray(self._encode_text(params, tokens, valid))[:rows])
        return np.concatenate(embeds)

    def _exact(self, sample: Sample) -> bool:
        # References are compared as the tokenizer gives them back: lower-cased, say, where it lower-cases.
        references = self._processor.decode(self._processor.encode_text(sample.references)[0])
        return sample.caption in references
