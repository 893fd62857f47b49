"""Captions and answers of a whole set, and their scores."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from concurrent import futures
from typing import Any

import numpy as np

from mammut.data.examples import Example, Question, Source
from mammut.evaluation.few_shot import FewShot, Query, answer_part
from mammut.evaluation.metrics.captions import caption_scores
from mammut.evaluation.metrics.vqa import VqaScores, magma_truncated_accuracy, vqa_scores
from mammut.evaluation.predictions import Predictions
from mammut.evaluation.predictor import Predictor, require_new, require_slot
from mammut.evaluation.scores import Scores
from mammut.generation.interleaved import (
    START_LENGTH,
    EncodedPrompt,
    encode_prompt,
    generate_interleaved,
    padded_size,
    prompt_batch,
    prompt_room,
    require_room,
)
from mammut.generation.rows import GeneratedRow, Row, batched, generate_rows
from mammut.generation.search import GenerateConfig, Generation
from mammut.generation.text import generate, image_prompt_batch, with_text_limit

# Record of a prompt that does not fit the model's context: nothing is generated.
_TOO_LONG = {"prediction": "", "logprob": 0.0, "too_long": True}


# Captions
# -------------------------------------------------------------------------------------------------


def predict_captions(
    predictor: Predictor,
    params: Any,
    source: Source,
    config: GenerateConfig = GenerateConfig(),
    *,
    prompt: str = "",
    limit: int | None = None,
    few_shot: FewShot | None = None,
) -> Predictions:
    """Captions every image of a set.

    Args:
      params: the model's parameters, on the predictor's mesh.
      prompt: the beginning of every caption, which is not part of the result.
      limit: the number of examples, from the first on; None for all.
      few_shot: shows examples first. A caption then ends at a line break or the next `prompt`.

    Raises:
      ValueError: too many examples cannot be used, or two have one key.
    """
    records = []
    seen = set()
    left_out = collections.Counter()
    ids = predictor.processor.encode_prompt(prompt)

    def rows() -> Iterator[tuple[np.ndarray, Any]]:
        for index, image, example in predictor.examples(source, limit, left_out):
            require_new(example.key, seen, source)
            records.append({"key": example.key, "index": index, "references": example.captions})
            if few_shot is None:
                yield image, ids
            else:
                yield image, Query(index, example.key, prompt)

    if few_shot is None:
        generated = _generated(predictor, params, rows(), config, width=1 + len(ids))
    else:
        generated = _generated_few_shot(predictor, params, rows(), config, few_shot, prompt)
    for number, values in enumerate(generated):
        records[number] |= values
        predictor.finished(records[number])

    settings = _changed_fields(config)
    if prompt:
        settings["prompt"] = prompt
    if few_shot is not None:
        settings |= few_shot.settings
    return predictor.predictions("caption", records, source, left_out, settings)


def score_captions(predictions: Predictions, *, java: bool | None = None) -> Scores:
    """Scores captions as the COCO caption evaluation does; `java` as in `caption_scores`."""
    records = predictions.records
    captions = [record["prediction"] for record in records]
    references = [record["references"] for record in records]
    scores = caption_scores(captions, references, java=java)
    notes = [f"scored by {scores.tool}, text split by {scores.tokenizer}"]
    notes += [f"no {name}: {reason}" for name, reason in scores.left_out.items()]
    notes += _too_long_notes(records)
    return Scores(scores.metrics, notes, {"captions": len(captions)})


# Answers
# -------------------------------------------------------------------------------------------------


def predict_answers(
    predictor: Predictor,
    params: Any,
    source: Source,
    config: GenerateConfig = GenerateConfig(),
    *,
    prompt: str = "{}",
    limit: int | None = None,
    few_shot: FewShot | None = None,
) -> Predictions:
    """Answers every question of a set.

    A question longer than the context has the empty answer and is marked `too_long`.

    Args:
      params: the model's parameters, on the predictor's mesh.
      prompt: a text with {} in place of the question, which the model continues.
      limit: the number of examples, from the first on; None for all.
      few_shot: shows examples first. An answer then ends at a line break or the next example.

    Raises:
      ValueError: `prompt` has no {}; too many examples cannot be used; or two questions have one
        id.
    """
    require_slot(prompt, "prompt")
    processor = predictor.processor
    records = []
    answered = []  # the records of the questions that fit the context
    seen = set()
    left_out = collections.Counter()

    def rows() -> Iterator[tuple[np.ndarray, Any]]:
        for index, image, example in predictor.examples(source, limit, left_out):
            for number, question in enumerate(example.qa):
                require_new(question.id, seen, source)
                record = _question_record(index, example, question)
                records.append(record)
                text = prompt.replace("{}", question.text)
                if few_shot is not None:
                    answered.append(record)
                    kind = question.question_type
                    yield image, Query(index, example.key, text, number, kind)
                elif processor.room(text) < 1:
                    record |= _TOO_LONG
                    predictor.finished(record)
                else:
                    answered.append(record)
                    yield image, processor.encode_prompt(text)

    if few_shot is None:
        width = processor.max_length - 1
        generated = _generated(predictor, params, rows(), config, width)
    else:
        generated = _generated_few_shot(predictor, params, rows(), config, few_shot, prompt)
    for number, values in enumerate(generated):
        answered[number] |= values
        predictor.finished(answered[number])

    settings = _changed_fields(config)
    if prompt != "{}":
        settings["prompt"] = prompt
    if few_shot is not None:
        settings |= few_shot.settings
    return predictor.predictions("vqa", records, source, left_out, settings)


def _question_record(index: int, example: Example, question: Question) -> dict[str, Any]:
    record = {
        "id": question.id,
        "key": example.key,
        "index": index,
        "question": question.text,
        "answers": question.answers,
    }
    if question.answer_type is not None:
        record["answer_type"] = question.answer_type
    if question.question_type is not None:
        record["question_type"] = question.question_type
    return record


def score_answers(predictions: Predictions) -> Scores:
    """Scores answers by the official VQA accuracy and by exact match.

    Where each question has one answer, `exact` comes first, the score of benchmarks of videos.

    Raises:
      ValueError: a question has no answers to score against.
    """
    records = predictions.records
    if without := sum(not record["answers"] for record in records):
        raise ValueError(
            f"{without} of {len(records)} questions of {predictions.data!r} have no answers to "
            "score against: send the predictions file to the server that has the answers"
        )
    scores = vqa_scores(records)
    types = {
        "records": "those of the set",
        "derived": "derived from the answers, they are not the official ones",
    }
    notes = [
        f"always saying {scores.most_common_answer!r}, the commonest answer here: "
        f"exact match {scores.most_common_exact_match:.2%}",
        f"answer types are {types[scores.answer_type_source]}",
    ]
    metrics = {}
    if scores.exact is not None:
        metrics["exact"] = scores.exact
        notes.append(
            "exact: equal to the one answer but for case and the space around it, as MSRVTT-QA and "
            "MSVD-QA are scored; exact_match also evens out punctuation, articles and numbers"
        )
    if scores.vqa_acc is None:
        notes.append(f"no VQA accuracy: {scores.vqa_acc_missing}")
    else:
        metrics["vqa_acc"] = scores.vqa_acc
    notes += _too_long_notes(records)

    if "shots" in predictions.settings and scores.vqa_acc is not None:
        truncated = [
            magma_truncated_accuracy(record["prediction"], record["answers"]) for record in records
        ]
        metrics["magma_truncated_accuracy"] = sum(truncated) / len(truncated)
        notes.append(
            "magma_truncated_accuracy, MAGMA's own score, cuts a prediction to the number of words "
            "of the longest answer: this raises the score, so do not compare it with vqa_acc"
        )
    metrics["exact_match"] = scores.exact_match
    metrics["most_common_exact_match"] = scores.most_common_exact_match
    metrics |= _scores_by_type(scores)
    return Scores(metrics, notes, {"questions": len(records)})


def _scores_by_type(scores: VqaScores) -> dict[str, dict[str, Any]]:
    """Returns the scores of each answer type, question type and first word.

    Scores that are missing are left out.
    """
    metrics = {}
    for by in ("by_answer_type", "by_question_type", "by_first_word"):
        for name, of_type in getattr(scores, by).items():
            values = dataclasses.asdict(of_type).items()
            present = {key: value for key, value in values if value is not None}
            metrics.setdefault(by, {})[name] = present
    return metrics


# What both share
# -------------------------------------------------------------------------------------------------


def _generated(
    predictor: Predictor,
    params: Any,
    rows: Iterable[tuple[np.ndarray, list[int]]],
    config: GenerateConfig,
    width: int,
) -> Iterator[dict[str, Any]]:
    """Generates the text after each image and its prompt's ids.

    Each comes with its log-probability.

    Prompts are padded to `width` tokens, the start token included.
    """
    processor = predictor.processor
    settings = {
        "config": with_text_limit(config, processor),
        "eos_id": processor.eos_id,
        "vocab_size": processor.vocab_size,
    }

    def run(rows: list[Row]) -> Generation:
        batch = image_prompt_batch(rows, width, processor.pad_id)
        return predictor.run(generate, params, *batch, **settings)

    prompts = ((image, [processor.bos_id, *ids]) for image, ids in rows)
    prompt_rows = (Row((image, ids), len(ids)) for image, ids in prompts)
    for row in generate_rows(prompt_rows, run, processor, batch_size=predictor.batch_size):
        yield {"prediction": row.text.strip(), "logprob": float(row.logprobs.sum())}


def _generated_few_shot(
    predictor: Predictor,
    params: Any,
    rows: Iterable[tuple[np.ndarray, Query]],
    config: GenerateConfig,
    few_shot: FewShot,
    prompt: str,
) -> Iterator[dict[str, Any]]:
    """Generates the text after each query and its examples.

    Its log-probability counts all generated tokens, even the ones that were cut off. The examples
    of the next batch are read while the model runs.
    """
    if prompt.endswith(" "):
        raise ValueError(
            f"the prompt {prompt!r} ends in a space, expected none: the generated text begins with "
            "one"
        )
    processor = predictor.processor
    model_config = predictor.model_of(params).config
    config = with_text_limit(config, processor)
    room = prompt_room(model_config, config.max_new_tokens)
    try:
        require_room(few_shot.shots + 1, 0, room, model_config)
    except ValueError as error:
        raise ValueError(f"a query after {few_shot.shots} shots {error}") from error

    blank = np.zeros(predictor.image_shape, np.uint8)

    def read(image: Any) -> np.ndarray:
        return blank if predictor.blind else processor.read(image)

    def encoded(row: tuple[np.ndarray, Query]) -> EncodedPrompt:
        image, query = row
        pieces = few_shot.pieces(query, image, prompt, read)
        return encode_prompt(pieces, processor, model_config.num_prefix_tokens)

    with futures.ThreadPoolExecutor(predictor.threads) as pool:
        batches = (pool.map(encoded, batch) for batch in batched(rows, predictor.batch_size))
        for prompts in _ahead(batches):
            prompts = list(prompts)
            fitting = [own for own in prompts if len(own) <= room]
            generated = _generated_after_prompts(predictor, params, fitting, config, room)
            for own in prompts:
                if len(own) > room:
                    yield _TOO_LONG
                    continue
                row = next(generated)
                text = answer_part(row.text, prompt, few_shot.instruction)
                yield {"prediction": text, "logprob": float(row.logprobs.sum())}


def _generated_after_prompts(
    predictor: Predictor,
    params: Any,
    prompts: list[EncodedPrompt],
    config: GenerateConfig,
    room: int,
) -> Iterator[GeneratedRow]:
    """Generates the texts after one batch of prompts.

    All prompts are padded to the size of the longest.
    """
    processor = predictor.processor
    settings = {
        "config": config,
        "bos_id": processor.bos_id,
        "eos_id": processor.eos_id,
        "vocab_size": processor.vocab_size,
    }
    size = min(padded_size(max(map(len, prompts), default=0)), room)

    def run(rows: list[Row]) -> Generation:
        batch = prompt_batch([row.prompt for row in rows], size, predictor.image_shape)
        return predictor.run(generate_interleaved, params, *batch, **settings)

    rows = (Row(prompt, START_LENGTH) for prompt in prompts)
    return generate_rows(rows, run, processor, batch_size=predictor.batch_size)


def _changed_fields(config: GenerateConfig) -> dict[str, Any]:
    """Lists the fields of a GenerateConfig that differ from their defaults."""
    defaults = GenerateConfig()
    return {name: value for name, value in vars(config).items() if value != getattr(defaults, name)}


def _ahead(items: Iterable) -> Iterator:
    """Yields the items of an iterator, one step ahead.

    The next item is started before the last one is used.
    """
    started = collections.deque()
    for item in items:
        started.append(item)
        if len(started) > 1:
            yield started.popleft()
    yield from started


def _too_long_notes(records: list[dict[str, Any]]) -> list[str]:
    count = sum(record.get("too_long", False) for record in records)
    if not count:
        return []
    return [f"{count} prompts are longer than the model's context: answered with the empty text"]
