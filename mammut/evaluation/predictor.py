"""A model asked about a whole set: captions, answers, classes, retrieval, in batches of one shape on any mesh.

Every method of `Predictor` gives `Predictions`, ready to be written and scored. Two of them do what
only a model of two passes can: retrieval by embedding whose best candidates are scored again by the
likelihood of the text given the image, and classification by that likelihood.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mammut.core import distributed, sharding
from mammut.core.params import logical_axes
from mammut.data.batches import EvalBatch, describe_bad, eval_batches
from mammut.data.examples import Example, Question, Source
from mammut.data.processor import Processor
from mammut.evaluation.classification import Method
from mammut.evaluation.few_shot import FewShot, Query, answer_part
from mammut.evaluation.generated_texts import _TOO_LONG, _ahead, _settings
from mammut.evaluation.metrics.rankings import nearest
from mammut.evaluation.predictions import Predictions
from mammut.evaluation.retrieval import _RANKED, _ranking
from mammut.generation.interleaved import (
    EncodedPrompt,
    encode_prompt,
    generate_interleaved,
    padded_size,
    prompt_batch,
    prompt_room,
    require_room,
)
from mammut.generation.likelihood import _text_logprob
from mammut.generation.search import GenerateConfig
from mammut.generation.text import generate
from mammut.models.mammut import MaMMUT


def place(model: MaMMUT, mesh: Mesh) -> tuple[Callable[[Any], MaMMUT], Any]:
    """A model's parameters on a mesh, and the function that makes the model of them again."""
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    shardings = sharding.param_shardings(params, logical_axes(model), mesh)
    return functools.partial(nnx.merge, graphdef), jax.device_put(params, shardings)


class Predictor:
    """Asks a model about sets of examples. To be called inside `jax.set_mesh(mesh)`.

    Every process reads the whole set and hands its devices their rows, so that results are exact on
    any mesh. The last, smaller batch is padded. An example that cannot be used is left out and
    counted.

    Args:
      model_of: the model of given parameters: `Trainer.model`, or what `place` returns.
      checkpoint: the folder the parameters are of, to be named in predictions.
      blind: every image is black.
      max_bad_share: more examples that cannot be used than this share are an error.
      alive: called with every batch that the model is asked about.

    Raises:
      ValueError: `batch_size` does not divide over the mesh. When called: too many examples cannot
        be used, or, as soon as it is read, a second example has the key (a second question the id)
        of one before.
    """

    def __init__(
        self,
        model_of: Callable[[Any], MaMMUT],
        processor: Processor,
        mesh: Mesh,
        *,
        checkpoint: str,
        batch_size: int,
        threads: int = 4,
        max_bad_share: float = 0.1,
        blind: bool = False,
        progress: bool = False,
        alive: Callable[[], None] = lambda: None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        sharding.require_divisible(batch_size, mesh, "batch_size")
        self._processor, self._mesh, self._checkpoint, self._batch_size = (
            processor,
            mesh,
            checkpoint,
            batch_size,
        )
        self._threads, self._max_bad_share, self._blind, self._progress = (
            threads,
            max_bad_share,
            blind,
            progress,
        )
        self._alive, self._model_of = alive, model_of
        replicated = jax.NamedSharding(mesh, jax.P())

        def compiled(function, out_shardings=replicated):
            of_params = lambda params, *args: function(model_of(params), *args)  # noqa: E731
            return distributed.compiled_by_all(jax.jit(of_params, out_shardings=out_shardings))

        @functools.cache
        def generator(config: GenerateConfig):
            ids = {"eos_id": processor.eos_id, "vocab_size": processor.vocab_size}
            return compiled(
                lambda model, image, prompt, valid: generate(
                    model, image, prompt, valid, config, **ids
                )
            )

        @functools.cache
        def interleaved_generator(config: GenerateConfig):
            ids = {
                "bos_id": processor.bos_id,
                "eos_id": processor.eos_id,
                "vocab_size": processor.vocab_size,
            }
            return compiled(
                lambda model, *batch: generate_interleaved(model, *batch, config, **ids)
            )

        self._generator, self._interleaved_generator = generator, interleaved_generator
        self._encode_image = compiled(lambda model, image: model.encode_image(image))
        self._encode_text = compiled(lambda model, tokens, valid: model.encode_text(tokens, valid))
        self._image_tokens = compiled(lambda model, image: model.image_tokens(image).tokens, None)
        self._text_logprob = compiled(_text_logprob)

    def check(self, source: Source, limit: int) -> None:
        """Reads the first examples; raises ValueError where too many of them cannot be used."""
        for _ in self._batches(source, limit, collections.Counter()):
            pass

    def captions(
        self,
        params: Any,
        source: Source,
        config: GenerateConfig = GenerateConfig(),
        *,
        prompt: str = "",
        limit: int | None = None,
        few_shot: FewShot | None = None,
    ) -> Predictions:
        """A caption of every image: what the model says after `prompt`, which is no part of it.

        With `few_shot`, after examples, and only up to a line break or the next `prompt`.
        """
        records, seen, ids = [], set(), self._processor.encode_prompt(prompt)

        def rows():
            for index, image, example in self._examples(source, limit, left_out):
                _require_new(example.key, seen, source)
                records.append({"key": example.key, "index": index, "references": example.captions})
                yield image, ids if few_shot is None else Query(index, example.key, prompt)

        left_out = collections.Counter()
        if few_shot is None:
            said = self._texts(params, rows(), config, 1 + len(ids))
        else:
            said = self._few_shot_texts(params, rows(), config, few_shot, prompt)
        for number, values in enumerate(said):
            records[number] |= values
        settings = _settings(config) | ({"prompt": prompt} if prompt else {})
        settings |= few_shot.settings if few_shot else {}
        return self._predictions("caption", records, source, left_out, settings)

    def answers(
        self,
        params: Any,
        source: Source,
        config: GenerateConfig = GenerateConfig(),
        *,
        prompt: str = "{}",
        limit: int | None = None,
        few_shot: FewShot | None = None,
    ) -> Predictions:
        """An answer to every question; the empty one, marked `too_long`, to a question longer than the context.

        The model is asked to go on from `prompt`, with the question in place of its {}. With
        `few_shot`, after examples, and only up to a line break or the next example ("Q:").
        """
        _require_slot(prompt, "prompt")
        records = []

        def record_of(index: int, example: Example, question: Question) -> dict[str, Any]:
            values = {
                "id": question.id,
                "key": example.key,
                "index": index,
                "question": question.text,
            }
            values |= {"answers": question.answers}
            types = {"answer_type": question.answer_type, "question_type": question.question_type}
            return values | {name: value for name, value in types.items() if value is not None}

        def rows():
            for index, image, example in self._examples(source, limit, left_out):
                for place, question in enumerate(example.qa):
                    _require_new(question.id, seen, source)
                    record = record_of(index, example, question)
                    records.append(record)
                    text = prompt.replace("{}", question.text)
                    if few_shot is not None:
                        asked.append(record)
                        yield image, Query(index, example.key, text, place, question.question_type)
                        continue
                    if self._processor.room(text) < 1:
                        record |= _TOO_LONG
                        continue
                    asked.append(record)
                    yield image, self._processor.encode_prompt(text)

        asked, seen, left_out = [], set(), collections.Counter()
        if few_shot is None:
            said = self._texts(params, rows(), config, self._processor.max_length - 1)
        else:
            said = self._few_shot_texts(params, rows(), config, few_shot, prompt)
        for number, values in enumerate(said):
            asked[number] |= values
        settings = _settings(config) | ({} if prompt == "{}" else {"prompt": prompt})
        settings |= few_shot.settings if few_shot else {}
        return self._predictions("vqa", records, source, left_out, settings)

    def retrieval(
        self,
        params: Any,
        source: Source,
        *,
        limit: int | None = None,
        rerank: int = 0,
        prior: float = 0.0,
    ) -> Predictions:
        """The best candidates of every image among all texts and of every text among all images, by embedding.

        With `rerank`, the best n candidates of each are scored again by log P(text | image) - prior
        * log P(text), the latter with a black image in place of the image. A short or frequent text
        is likely for any image, which spoils the order of texts at prior 0; the order of images for
        one text is the same at any prior (arXiv 2306.01879).
        """
        left_out = collections.Counter()
        indices, keys, texts, image_of_text, embeds, seen = [], [], [], [], [], set()
        for batch in self._batches(source, limit, left_out):
            embeds.append(self._array(self._encode_image, params, batch.image)[batch.example_valid])
            for index, example in zip(batch.index.tolist(), batch.examples, strict=True):
                if example is not None:
                    _require_new(example.key, seen, source)
                    image_of_text += [len(keys)] * len(example.captions)
                    indices.append(index)
                    keys.append(example.key)
                    texts += example.captions
        tokens = self._processor.encode_text(texts)
        image_embed, text_embed = np.concatenate(embeds), self._embed_texts(params, tokens)
        size = max(rerank, _RANKED)
        texts_of, text_scores = nearest(image_embed, text_embed, size)
        images_of, image_scores = nearest(text_embed, image_embed, size)

        own_texts = np.split(
            np.arange(len(texts)), np.cumsum(np.bincount(image_of_text, minlength=len(keys)))[:-1]
        )
        records = [
            {"query": "image", "id": image, "key": keys[image], "index": indices[image]}
            | {"relevant": own_texts[image].tolist()}
            | _ranking(texts_of[image], text_scores[image])
            for image in range(len(keys))
        ]
        records += [
            {"query": "text", "id": text, "text": texts[text], "relevant": [image_of_text[text]]}
            | _ranking(images_of[text], image_scores[text])
            for text in range(len(texts))
        ]
        if rerank:
            images, candidates = np.arange(len(keys))[:, None], np.arange(len(texts))[:, None]
            to_text = images * len(texts) + texts_of[:, :rerank]
            to_image = images_of[:, :rerank] * len(texts) + candidates
            pairs, place = np.unique(
                np.concatenate([to_text.ravel(), to_image.ravel()]), return_inverse=True
            )
            scores = self._rescore(params, source, limit, indices, tokens, pairs, prior)[place]
            of_images, of_texts = np.split(scores, [to_text.size])
            for record, own in zip(
                records,
                [*of_images.reshape(to_text.shape), *of_texts.reshape(to_image.shape)],
                strict=True,
            ):
                # equals stay in the order of their embeddings
                order = np.argsort(-own, kind="stable")
                record["reranked"] = np.array(record["ranked"][:rerank])[order].tolist()
                record["reranked_scores"] = own[order].tolist()
        settings = {"images": len(keys), "texts": len(texts), "rerank": rerank, "prior": prior}
        return self._predictions("retrieval", records, source, left_out, settings)

    def classes(
        self,
        params: Any,
        source: Source,
        classes: Sequence[str],
        *,
        templates: Sequence[str] = ("{}",),
        method: Method = "contrastive",
        prior: float = 0.0,
        limit: int | None = None,
    ) -> Predictions:
        """The five best classes of every image.

        By "contrastive", a class is the mean of the embeddings of its name in every template (CLIP,
        arXiv 2103.00020, section 3.1.4); by "likelihood", its score is the log of the mean over
        templates of P(text | image), less `prior` times the same for a black image.
        """
        left_out = collections.Counter()
        for template in templates:
            _require_slot(template, "template")
        if not classes or not templates:
            raise ValueError(
                f"there are {len(classes)} classes and {len(templates)} templates, expected some of each"
            )
        texts = [template.replace("{}", name) for name in classes for template in templates]
        tokens = self._processor.encode_text(texts)
        if method == "contrastive":
            embed = (
                self._embed_texts(params, tokens).reshape(len(classes), len(templates), -1).mean(1)
            )
            embed /= np.maximum(np.linalg.norm(embed, axis=1, keepdims=True), 1e-12)
        else:
            embed = None
            black = np.zeros((self._batch_size, *self._image_shape), np.uint8)
            prior_scores = self._class_scores(params, black, 1, tokens, len(classes))
        records, seen = [], set()
        for batch in self._batches(source, limit, left_out):
            if embed is None:
                scores = self._class_scores(
                    params, batch.image, len(batch.examples), tokens, len(classes)
                )
                scores = scores - prior * prior_scores
                order = np.argsort(-scores, axis=1, kind="stable")[:, :5]
                scores = np.take_along_axis(scores, order, axis=1)
            else:
                order, scores = nearest(
                    self._array(self._encode_image, params, batch.image), embed, 5
                )
            for row, (index, example) in enumerate(
                zip(batch.index.tolist(), batch.examples, strict=True)
            ):
                if example is not None:
                    _require_new(example.key, seen, source)
                    if example.name not in classes:
                        raise ValueError(
                            f"{example.key!r} is {example.name!r}, not one of the {len(classes)} classes"
                        )
                    ranked = {
                        "ranked": [classes[i] for i in order[row]],
                        "scores": scores[row].tolist(),
                    }
                    records.append(
                        {"key": example.key, "index": index, "label": example.name} | ranked
                    )
        settings = {
            "classes": list(classes),
            "templates": list(templates),
            "method": method,
            "prior": prior,
        }
        return self._predictions("classify", records, source, left_out, settings)

    @property
    def image_size(self) -> int:
        """The pixels of a side of what the model sees."""
        return self._processor.image.image_size

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        return self.image_size, self.image_size, 3

    def _predictions(self, task, records, source, left_out, settings) -> Predictions:
        settings = settings | {"image_size": self.image_size, "blind": self._blind}
        return Predictions(task, records, source.spec, self._checkpoint, settings, dict(left_out))

    def _batches(
        self, source: Source, limit: int | None, left_out: collections.Counter
    ) -> Iterator[EvalBatch]:
        """Batches over the set, with a progress bar; at the end too many examples left out are an error."""
        from tqdm import tqdm

        settings = {"batch_size": self._batch_size, "threads": self._threads, "blind": self._blind}
        total = len(source) if limit is None else min(limit, len(source))
        good = 0
        with tqdm(
            total=total,
            unit="example",
            disable=None if self._progress else True,
            dynamic_ncols=True,
        ) as bar:
            for batch in eval_batches(source, self._processor, limit=limit, **settings):
                left_out.update(batch.bad)
                good += int(batch.example_valid.sum())
                yield batch
                bar.update(int((batch.index >= 0).sum()))
        bad = left_out.total()
        if not good or bad > self._max_bad_share * (good + bad):
            raise ValueError(
                f"{bad} of {good + bad} examples of {source.spec!r} could not be used ({describe_bad(left_out)}), "
                f"max_bad_share allows {self._max_bad_share:.0%}"
            )

    def _examples(
        self, source: Source, limit: int | None, left_out: collections.Counter
    ) -> Iterator[tuple[int, np.ndarray, Example]]:
        for batch in self._batches(source, limit, left_out):
            for index, image, example in zip(
                batch.index.tolist(), batch.image, batch.examples, strict=True
            ):
                if example is not None:
                    yield index, image, example

    def _texts(
        self,
        params: Any,
        rows: Iterable[tuple[np.ndarray, list[int]]],
        config: GenerateConfig,
        width: int = 1,
    ) -> Iterator[dict[str, Any]]:
        """What is said after each image's prompt, with its log-probability; prompts are padded to `width` tokens.

        A text has the processor's length at most: the context of a language model may be a hundred
        times as long.
        """
        processor = self._processor
        config = dataclasses.replace(
            config, max_new_tokens=config.max_new_tokens or processor.max_length - 1
        )
        for chunk in _chunked(rows, self._batch_size):
            images = [image for image, _ in chunk] + [np.zeros_like(chunk[0][0])] * (
                self._batch_size - len(chunk)
            )
            prompts = [[processor.bos_id, *prompt] for _, prompt in chunk]
            # ends when the first does: no row runs on
            prompts += [prompts[0]] * (self._batch_size - len(chunk))
            tokens = np.array(
                [ids + [processor.pad_id] * (width - len(ids)) for ids in prompts], np.int32
            )
            valid = np.arange(width) < np.array([len(ids) for ids in prompts])[:, None]
            out = jax.device_get(
                self._call(self._generator(config), params, np.stack(images), tokens, valid)
            )
            for row in range(len(chunk)):
                own = out.tokens[row, 0].tolist()[len(prompts[row]) :]
                text = processor.tokenizer.decode(own).strip()
                yield {"prediction": text, "logprob": float(out.logprobs[row, 0].sum())}

    def _few_shot_texts(
        self,
        params: Any,
        rows: Iterable[tuple[np.ndarray, Query]],
        config: GenerateConfig,
        few_shot: FewShot,
        prompt: str,
    ) -> Iterator[dict[str, Any]]:
        """What is said after each query's examples, with the log-probability of all that was generated.

        What is generated has `config.max_new_tokens` at most, or else as many as a text of the
        processor's.
        """
        if prompt.endswith(" "):
            raise ValueError(
                f"the prompt {prompt!r} ends in a space, expected none: what is said begins with it"
            )
        processor, model_config = self._processor, self._model_of(params).config
        config = dataclasses.replace(
            config, max_new_tokens=config.max_new_tokens or processor.max_length - 1
        )
        room, image_tokens = (
            prompt_room(model_config, config.max_new_tokens),
            model_config.num_prefix_tokens,
        )
        try:
            require_room(few_shot.shots + 1, 0, room, model_config)
        except ValueError as error:
            raise ValueError(f"a query after {few_shot.shots} shots {error}") from error
        blank = np.zeros(self._image_shape, np.uint8)
        read = (lambda _: blank) if self._blind else processor.image

        def encoded(row: tuple[np.ndarray, Query]) -> EncodedPrompt:
            image, query = row
            return encode_prompt(
                few_shot.pieces(query, image, prompt, read), processor, image_tokens
            )

        with futures.ThreadPoolExecutor(self._threads) as pool:
            for prompts in _ahead(
                pool.map(encoded, chunk) for chunk in _chunked(rows, self._batch_size)
            ):
                prompts = list(prompts)
                fitting = [own for own in prompts if len(own) <= room]
                said = []
                if fitting:
                    size = min(padded_size(max(map(len, fitting))), room)
                    padded = fitting + fitting[:1] * (self._batch_size - len(fitting))
                    batch = prompt_batch(padded, size, self._image_shape)
                    out = jax.device_get(
                        self._call(self._interleaved_generator(config), params, *batch)
                    )
                    for tokens, logprobs in zip(
                        out.tokens[: len(fitting), 0, 1:], out.logprobs[:, 0], strict=False
                    ):
                        text = answer_part(
                            processor.tokenizer.decode(tokens.tolist()),
                            prompt,
                            few_shot.instruction,
                        )
                        said.append({"prediction": text, "logprob": float(logprobs.sum())})
                said = iter(said)
                for own in prompts:
                    yield next(said) if len(own) <= room else _TOO_LONG

    def _embed_texts(self, params: Any, encoded: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        embeds = []
        for start in range(0, len(encoded[0]), self._batch_size):
            tokens, valid = (self._padded(x[start : start + self._batch_size]) for x in encoded)
            embeds.append(self._array(self._encode_text, params, tokens, valid))
        return np.concatenate(embeds)[: len(encoded[0])]

    def _rescore(self, params, source, limit, indices, encoded, pairs, prior) -> np.ndarray:
        """log P(text | image) - prior * log P(text) of pairs int[N], image * texts + text, sorted: float[N]."""
        images, texts = np.divmod(pairs, len(encoded[0]))
        scores = np.empty(len(pairs))
        image_of_index = {index: image for image, index in enumerate(indices)}
        for batch in self._batches(source, limit, collections.Counter()):
            rows = np.flatnonzero(batch.example_valid)
            if not len(rows):
                continue
            first = image_of_index[int(batch.index[rows[0]])]
            # Pairs are sorted by image, so that those of a batch of images lie together.
            own = slice(*np.searchsorted(images, [first, first + len(rows)]))
            image_tokens = self._call(self._image_tokens, params, batch.image)
            scores[own] = self._logprobs(
                params, image_tokens, rows[images[own] - first], encoded, texts[own]
            )
        if prior:
            black = np.zeros((self._batch_size, *self._image_shape), np.uint8)
            image_tokens = self._call(self._image_tokens, params, black)
            every = np.arange(len(encoded[0]))
            scores -= (
                prior
                * self._logprobs(params, image_tokens, np.zeros_like(every), encoded, every)[texts]
            )
        return scores

    def _class_scores(self, params, image, rows: int, encoded, num_classes: int) -> np.ndarray:
        """The log of the mean over templates of P(text | image): float[rows, classes]."""
        image_tokens = self._call(self._image_tokens, params, image)
        every = np.arange(len(encoded[0]))
        pairs = np.repeat(np.arange(rows), len(every)), np.tile(every, rows)
        logprobs = self._logprobs(params, image_tokens, pairs[0], encoded, pairs[1])
        logprobs = logprobs.reshape(rows, num_classes, -1)
        return np.logaddexp.reduce(logprobs, axis=2) - np.log(logprobs.shape[2])

    def _logprobs(self, params, image_tokens, rows, encoded, texts) -> np.ndarray:
        """log P of texts int[N] given the images at rows int[N] of `image_tokens`: float[N]."""
        out = []
        for start in range(0, len(texts), self._batch_size):
            chunk = slice(start, start + self._batch_size)
            arrays = (rows[chunk].astype(np.int32), *(x[texts[chunk]] for x in encoded))
            out.append(
                self._array(self._text_logprob, params, image_tokens, *map(self._padded, arrays))
            )
        return np.concatenate(out)[: len(texts)]

    def _padded(self, x: np.ndarray) -> np.ndarray:
        return np.pad(x, ((0, self._batch_size - len(x)), *((0, 0),) * (x.ndim - 1)))

    def _call(self, function: Callable, params: Any, *args: Any) -> Any:
        placed = (
            sharding.replicated_batch(x, self._mesh) if isinstance(x, np.ndarray) else x
            for x in args
        )
        self._alive()
        return function(params, *placed)

    def _array(self, function: Callable, params: Any, *args: Any) -> np.ndarray:
        return np.asarray(self._call(function, params, *args))


def _require_slot(text: str, what: str) -> None:
    if "{}" not in text:
        raise ValueError(f"the {what} is {text!r}, expected a text with {{}} in it")


def _require_new(name: str, seen: set[str], source: Source) -> None:
    """Adds a key or question id to those seen; refuses it the second time, before the model is asked any further."""
    if name in seen:
        raise ValueError(
            f"{source.spec!r} has {name!r} more than once, expected every image and question id once"
        )
    seen.add(name)


def _chunked(rows: Iterable, size: int) -> Iterator[list]:
    chunk = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
