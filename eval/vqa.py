"""Answers the questions of a set and scores them: the official VQA accuracy, exact match, both by type.

    python -m eval.vqa CHECKPOINT --data jsonl:PATH [--out FILE.json]
    python -m eval.vqa CHECKPOINT --data vqav2:QUESTIONS.json,ANNOTATIONS.json,IMAGES
    python -m eval.vqa FILE.predictions.jsonl

A model that was trained on questions answers what it is asked; one that only learnt captions goes
on from `--prompt "question: {} answer:"`. One with an image prefix can be shown examples first, as
MAGMA is:

    python -m eval.vqa CHECKPOINT --data jsonl:PATH --shots 4

asks for each question: image, "Q: question A: answer" of 4 others of the set, then its image and
"Q: question A:". Beside the official accuracy stands MAGMA's own, which truncates what was said to
the answers' length.
"""

import dataclasses
import sys

from eval import few_shot, program
from mammut.generation.search import GenerateConfig

_NEW_TOKENS = 10  # after examples, as in MAGMA


@dataclasses.dataclass(frozen=True)
class Options(few_shot.Options):
    """Options of this program."""

    num_beams: int = 1  # 1: greedy
    # What the model is asked to go on from; {} is the question. By default it alone, with --shots
    # "Q: {} A:".
    prompt: str | None = None
    # of an answer; by default 10 with --shots, else as many as there is room for
    max_new_tokens: int | None = None


def predict(predictor, params, source, options):
    shown = few_shot.few_shot(predictor, source, options, "qa")
    prompt = ("Q: {} A:" if shown else "{}") if options.prompt is None else options.prompt
    default = _NEW_TOKENS if shown else None
    max_new_tokens = default if options.max_new_tokens is None else options.max_new_tokens
    config = GenerateConfig(num_beams=options.num_beams, max_new_tokens=max_new_tokens)
    return predictor.answers(
        params, source, config, prompt=prompt, limit=options.limit, few_shot=shown
    )


def main(argv: list[str]) -> None:
    program.run(argv, Options, "vqa", "qa", predict, __doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
