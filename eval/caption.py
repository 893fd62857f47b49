"""Captions the images of a set and scores them: BLEU, METEOR, ROUGE-L, CIDEr, SPICE as far as they can be computed.

    python -m eval.caption CHECKPOINT --data jsonl:PATH [--num-beams 4] [--out FILE.json]
    python -m eval.caption FILE.predictions.jsonl

Where Java and pycocoevalcap are found they score; without, the same BLEU, ROUGE-L and CIDEr are
computed here. A model with an image prefix can be shown examples first, in the format of MAGMA:

    python -m eval.caption CHECKPOINT --data jsonl:PATH --shots 4

asks for each image: image, "A picture of" and a caption of 4 others of the set, then the image and
"A picture of".
"""

import dataclasses
import sys

from eval import few_shot, program
from mammut.generation.search import GenerateConfig

_NEW_TOKENS = 50  # after examples, as MAGMA has for NoCaps


@dataclasses.dataclass(frozen=True)
class Options(few_shot.Options):
    """Options of this program."""

    num_beams: int = 4  # 1: greedy
    length_penalty: float = 1.0  # a beam's log-probability is divided by its length to this power
    # what the caption goes on from; by default nothing, with --shots "A picture of"
    prompt: str | None = None
    # of a caption; by default 50 with --shots, else as many as there is room for
    max_new_tokens: int | None = None


def predict(predictor, params, source, options):
    shown = few_shot.few_shot(predictor, source, options, "captions")
    prompt = ("A picture of" if shown else "") if options.prompt is None else options.prompt
    default = _NEW_TOKENS if shown else None
    max_new_tokens = default if options.max_new_tokens is None else options.max_new_tokens
    settings = {"num_beams": options.num_beams, "length_penalty": options.length_penalty}
    config = GenerateConfig(**settings, max_new_tokens=max_new_tokens)
    return predictor.captions(
        params, source, config, prompt=prompt, limit=options.limit, few_shot=shown
    )


def main(argv: list[str]) -> None:
    program.run(argv, Options, "caption", "captions", predict, __doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
