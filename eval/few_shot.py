"""Options of the programs that can show a model examples first."""

import dataclasses

from eval import program
from mammut.data.config import Field
from mammut.data.examples import Source
from mammut.data.sources import open_source
from mammut.evaluation.few_shot import FewShot
from mammut.evaluation.predictor import Predictor


@dataclasses.dataclass(frozen=True)
class Options(program.Options):
    """Options of evaluations that can show a model examples first."""

    # Number of examples, images and texts, in front of each query; the prediction is cut at a line
    # break or the next example. 0: the same prompt without examples. It needs a model with an image
    # prefix.
    shots: int | None = None
    # Set that the examples are drawn from. By default the set itself, without the query's own
    # image.
    shots_data: str | None = None
    # Random seed for drawing the examples.
    shots_seed: int = 0
    # Text in front of every example.
    instruction: str = ""

    @property
    def part(self) -> str:
        """See `program.Options`."""
        if self.shots is None:
            return super().part
        return f"{super().part}_{self.shots}_shots"

    def check(self) -> None:
        """See `program.Options`."""
        super().check()
        for name in ("shots", "shots_seed"):
            program.require_range(self, name, 0)
        for name in ("num_beams", "max_new_tokens"):  # of the programs that generate
            program.require_range(self, name, 1)


def few_shot(
    predictor: Predictor, source: Source, options: Options, field: Field
) -> FewShot | None:
    """Makes the examples that `--shots` asks for; None without it.

    Args:
      field: what an example must have.

    Raises:
      ValueError: options that need `--shots` are given without it, or `FewShot` refuses them.
    """
    if options.shots is None:
        for name in ("shots_data", "shots_seed", "instruction"):
            if value := getattr(options, name):
                raise ValueError(f"--{name.replace('_', '-')} is {value!r}, which needs --shots")
        return None
    if options.shots_data is not None:
        settings = {"image_size": predictor.image_size, "tfds_dir": options.tfds_dir}
        settings["video"] = len(predictor.image_shape) == 4
        source = open_source(options.shots_data, field=field, **settings)
    return FewShot(source, options.shots, seed=options.shots_seed, instruction=options.instruction)
