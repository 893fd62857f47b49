"""Retrieval of images by text and of texts by image: recall at 1, 5 and 10, with several texts an image.

    python -m eval.retrieval CHECKPOINT --data jsonl:PATH [--rerank 10] [--out FILE.json]
    python -m eval.retrieval FILE.predictions.jsonl

With `--rerank N` the N best candidates by embedding are scored again by the likelihood of the text
given the image.
"""

import dataclasses
import sys

from eval import program


@dataclasses.dataclass(frozen=True)
class Options(program.Options):
    rerank: int = 0  # candidates of each query that are scored again by caption likelihood
    prior: float = 0.0  # how much of log P(text) without the image is taken off log P(text | image)


def predict(predictor, params, source, options):
    settings = {"rerank": options.rerank, "prior": options.prior}
    return predictor.retrieval(params, source, limit=options.limit, **settings)


def main(argv: list[str]) -> None:
    program.run(argv, Options, "retrieval", "captions", predict, __doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
