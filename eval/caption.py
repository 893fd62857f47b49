"""Captions the images of a set and scores them: BLEU, METEOR, ROUGE-L, CIDEr, SPICE as far as they can be computed.

    python -m eval.caption CHECKPOINT --data jsonl:PATH [--num-beams 4] [--out FILE.json]
    python -m eval.caption FILE.predictions.jsonl

Where Java and pycocoevalcap are found they score; without, the same BLEU, ROUGE-L and CIDEr are computed here.
"""

import dataclasses
import sys

from eval import program
from mammut.search import GenerateConfig


@dataclasses.dataclass(frozen=True)
class Options(program.Options):
    num_beams: int = 4  # 1: greedy
    length_penalty: float = 1.0  # a beam's log-probability is divided by its length to this power


def predict(predictor, params, source, options):
    config = GenerateConfig(num_beams=options.num_beams, length_penalty=options.length_penalty)
    return predictor.captions(params, source, config, limit=options.limit)


def main(argv: list[str]) -> None:
    program.run(argv, Options, "caption", "captions", predict, __doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
