"""Zero-shot classification: top-1, top-5 and mean per-class recall.

    python -m eval.classify CHECKPOINT --data jsonl:PATH [--method likelihood]
        [--classes FILE.json] [--out FILE.json]
    python -m eval.classify FILE.predictions.jsonl

Classes are ranked by embedding or by the likelihood of their names. The lines of the JSONL hold
`{"file", "name"}`. `--classes` is a JSON list of names. By default a model that was trained with
`--task classify` is asked as it was trained: for the names of its training set, by likelihood.
Other models are asked for the names in the set, by embedding.
"""

import dataclasses
import json
import pathlib
import sys

from eval import program
from mammut.evaluation.classification import Method, class_names, predict_classes

_TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "{}")


@dataclasses.dataclass(frozen=True)
class Options(program.Options):
    """Options of this program."""

    # How classes are ranked: by embedding, or by the likelihood of the class as a caption. By
    # default as the model was trained to; by embedding where it was trained on no classes.
    method: Method | None = None
    # Texts in which {} stands for the class. Scores are averaged over the templates. By default the
    # text of training, or "a photo of a {}.", "a picture of a {}." and "{}".
    templates: tuple[str, ...] | None = None
    # A JSON list of all class names, in any order. By default those that the model was trained on,
    # or the names in the set.
    classes: pathlib.Path | None = None
    # For the method "likelihood": share of log P(class) without the image that is subtracted.
    prior: float = 0.0

    def check(self) -> None:
        """See `program.Options`."""
        super().check()
        program.require_range(self, "prior", 0, 1)


def predict(predictor, params, source, options):
    trained = predictor.processor.classes
    if options.classes is not None:
        classes = read_classes(options.classes)
    elif trained is not None:
        classes = list(trained.names)
    else:
        classes = class_names(source)
    method = options.method or (trained.method if trained else "contrastive")
    templates = options.templates
    if templates is None:
        asked_as_trained = trained is not None and method == trained.method
        templates = (trained.template,) if asked_as_trained else _TEMPLATES
    settings = {"templates": templates, "method": method, "prior": options.prior}
    predictions = predict_classes(
        predictor, params, source, classes, limit=options.limit, **settings
    )
    if options.classes is None and trained is None:
        predictions.settings["names_of_set"] = True
    return predictions


def read_classes(path: pathlib.Path) -> list[str]:
    """Reads a JSON list of class names.

    Raises:
      ValueError: the file is missing or holds something else.
    """
    try:
        names = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--classes {path} is not JSON: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"--classes {path} is not a JSON list of texts")
    return names


def main(argv: list[str]) -> None:
    program.run(argv, Options, "classify", predict, __doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
