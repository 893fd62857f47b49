"""Zero-shot classification: top-1, top-5 and mean per-class recall.

    python -m eval.classify CHECKPOINT --data jsonl:PATH [--method likelihood]
        [--classes FILE.json] [--out FILE.json]
    python -m eval.classify FILE.predictions.jsonl

Classes are ranked by embedding or by the likelihood of their names. The lines of the JSONL hold
`{"file", "name"}`. `--classes` is a JSON list of names; by default the classes are the names in the
set.
"""

import dataclasses
import json
import pathlib
import sys

from eval import program
from mammut.evaluation.classification import Method, class_names, predict_classes


@dataclasses.dataclass(frozen=True)
class Options(program.Options):
    """Options of this program."""

    # How classes are ranked: by embedding, or by the likelihood of the class as a caption.
    method: Method = "contrastive"
    # Texts in which {} stands for the class. Scores are averaged over the templates.
    templates: tuple[str, ...] = ("a photo of a {}.", "a picture of a {}.", "{}")
    # A JSON list of all class names, in any order. By default the names in the set.
    classes: pathlib.Path | None = None
    # For the method "likelihood": share of log P(class) without the image that is subtracted.
    prior: float = 0.0


def predict(predictor, params, source, options):
    if options.classes is None:
        classes = class_names(source)
    else:
        classes = json.loads(options.classes.read_text(encoding="utf-8"))
    settings = {"templates": options.templates, "method": options.method, "prior": options.prior}
    return predict_classes(predictor, params, source, classes, limit=options.limit, **settings)


def main(argv: list[str]) -> None:
    program.run(argv, Options, "classify", predict, __doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
