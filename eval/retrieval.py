"""Retrieval of images by text and of texts by image.

The scores are recall at 1, 5 and 10, and the median and the mean rank.

    python -m eval.retrieval CHECKPOINT --data jsonl:PATH [--rerank 10] [--out FILE.json]
    python -m eval.retrieval FILE.predictions.jsonl

An image may have several texts. With `--rerank N` the N best candidates by embedding are scored
again by the likelihood of the text given the image.
"""

import dataclasses
import sys

from eval import program
from mammut.evaluation.retrieval import predict_rankings


@dataclasses.dataclass(frozen=True)
class Options(program.Options):
    """Options of this program."""

    # Number of candidates of each query that are scored again by caption likelihood.
    rerank: int = 0
    # Share of log P(text) without the image that is subtracted from log P(text | image).
    prior: float = 0.0

    def check(self) -> None:
        """See `program.Options`."""
        super().check()
        program.require_range(self, "rerank", 0)
        program.require_range(self, "prior", 0, 1)


def predict(predictor, params, source, options):
    settings = {"rerank": options.rerank, "prior": options.prior}
    return predict_rankings(predictor, params, source, limit=options.limit, **settings)


def main(argv: list[str]) -> None:
    program.run(argv, Options, "retrieval", predict, __doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
