"""Answers the questions of a set and scores the answers.

The scores are the official VQA accuracy and exact match. Where each question has one answer, as in
MSRVTT-QA and MSVD-QA, the score of these benchmarks comes first: `exact`, also by first word.

    python -m eval.vqa CHECKPOINT --data jsonl:PATH [--out FILE.json]
    python -m eval.vqa CHECKPOINT --data vqav2:QUESTIONS.json,ANNOTATIONS.json,IMAGES
    python -m eval.vqa FILE.predictions.jsonl

Both scores are also given by type of question and answer. A model that was trained on questions
needs only the question. A model that has only learnt captions continues a text such as
`--prompt "question: {} answer:"`. A model with an image prefix can be shown examples first, as
MAGMA is:

    python -m eval.vqa CHECKPOINT --data jsonl:PATH --shots 4

The prompt for each question is then: 4 other images of the set, each with "Q: question A: answer";
then the image and "Q: question A:". MAGMA's own accuracy, which truncates the prediction to the
length of the answers, is reported beside the official one.
"""

import dataclasses
import sys

from eval import few_shot, program
from mammut.evaluation.generated_texts import predict_answers
from mammut.generation.search import GenerateConfig

_NEW_TOKENS = 10  # of an answer after examples, as in MAGMA


@dataclasses.dataclass(frozen=True)
class Options(few_shot.Options):
    """Options of this program."""

    # Number of beams. 1: greedy search.
    num_beams: int = 1
    # Text that the model continues; {} is the question. By default only the question; with --shots
    # "Q: {} A:".
    prompt: str | None = None
    # Largest number of tokens of an answer. By default 10 with --shots, else as many as fit.
    max_new_tokens: int | None = None


def predict(predictor, params, source, options):
    shown = few_shot.few_shot(predictor, source, options, "qa")
    prompt = options.prompt
    if prompt is None:
        prompt = "Q: {} A:" if shown else "{}"
    max_new_tokens = options.max_new_tokens
    if max_new_tokens is None and shown:
        max_new_tokens = _NEW_TOKENS
    config = GenerateConfig(num_beams=options.num_beams, max_new_tokens=max_new_tokens)
    settings = {"prompt": prompt, "limit": options.limit, "few_shot": shown}
    return predict_answers(predictor, params, source, config, **settings)


def main(argv: list[str]) -> None:
    program.run(argv, Options, "vqa", predict, __doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
