"""Captions the images of a set and scores the captions.

The scores are BLEU, METEOR, ROUGE-L, CIDEr and SPICE.

    python -m eval.caption CHECKPOINT --data jsonl:PATH [--num-beams 4] [--out FILE.json]
    python -m eval.caption FILE.predictions.jsonl

METEOR and SPICE need Java and pycocoevalcap, and are left out without them. BLEU, ROUGE-L and CIDEr
are computed without them too, with the same results. A model with an image prefix can be shown
examples first, in the format of MAGMA:

    python -m eval.caption CHECKPOINT --data jsonl:PATH --shots 4

The prompt for each image is then: 4 other images of the set, each with "A picture of" and its
caption; then the image and "A picture of".
"""

import dataclasses
import sys

from eval import few_shot, program
from mammut.evaluation.generated_texts import predict_captions
from mammut.generation.search import GenerateConfig

_NEW_TOKENS = 50  # of a caption after examples, as MAGMA has for NoCaps


@dataclasses.dataclass(frozen=True)
class Options(few_shot.Options):
    """Options of this program."""

    # Number of beams. 1: greedy search.
    num_beams: int = 4
    # Power of a beam's length by which its log-probability is divided.
    length_penalty: float = 1.0
    # Beginning of every caption. By default none; with --shots "A picture of".
    prompt: str | None = None
    # Largest number of tokens of a caption. By default 50 with --shots, else as many as fit.
    max_new_tokens: int | None = None

    def check(self) -> None:
        """See `program.Options`."""
        super().check()
        program.require_range(self, "length_penalty", -10, 10)


def predict(predictor, params, source, options):
    shown = few_shot.few_shot(predictor, source, options, "captions")
    prompt = options.prompt
    if prompt is None:
        prompt = "A picture of" if shown else ""
    max_new_tokens = options.max_new_tokens
    if max_new_tokens is None and shown:
        max_new_tokens = _NEW_TOKENS
    config = GenerateConfig(
        num_beams=options.num_beams,
        length_penalty=options.length_penalty,
        max_new_tokens=max_new_tokens,
    )
    settings = {"prompt": prompt, "limit": options.limit, "few_shot": shown}
    return predict_captions(predictor, params, source, config, **settings)


def main(argv: list[str]) -> None:
    program.run(argv, Options, "caption", predict, __doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
