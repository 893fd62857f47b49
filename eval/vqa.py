"""Answers the questions of a set and scores them: the official VQA accuracy, exact match, both by type.

    python -m eval.vqa CHECKPOINT --data jsonl:PATH [--out FILE.json]
    python -m eval.vqa CHECKPOINT --data vqav2:QUESTIONS.json,ANNOTATIONS.json,IMAGES
    python -m eval.vqa FILE.predictions.jsonl

A model that was trained on questions answers what it is asked; one that only learnt captions goes on from
`--prompt "question: {} answer:"`.
"""

import dataclasses
import sys

from eval import program
from mammut.search import GenerateConfig


@dataclasses.dataclass(frozen=True)
class Options(program.Options):
    num_beams: int = 1  # 1: greedy
    prompt: str = "{}"  # what the model is asked to go on from; {} is the question


def predict(predictor, params, source, options):
    config = GenerateConfig(num_beams=options.num_beams)
    return predictor.answers(params, source, config, prompt=options.prompt, limit=options.limit)


def main(argv: list[str]) -> None:
    program.run(argv, Options, "vqa", "qa", predict, __doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
