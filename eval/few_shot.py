"""Options of the programs that can show a model examples first, and the examples they ask for."""

import dataclasses

from eval import program
from mammut.data.config import Field
from mammut.data.examples import Source
from mammut.data.sources import open_source
from mammut.evaluation.few_shot import FewShot
from mammut.evaluation.predictor import Predictor


@dataclasses.dataclass(frozen=True)
class Options(program.Options):
    """`program.Options`, and how a model with an image prefix is shown examples."""

    # So many examples, images and texts, in front of each query, and what is said cut at a line
    # break or the next example; 0: the same prompt without examples. It needs a model with an image
    # prefix.
    shots: int | None = None
    # where they are drawn from; by default the set itself, never the query's own image
    shots_data: str | None = None
    shots_seed: int = 0
    instruction: str = ""  # said in front of every example

    @property
    def part(self) -> str:
        """See `program.Options`."""
        return super().part + ("" if self.shots is None else f"_{self.shots}_shots")


def few_shot(
    predictor: Predictor, source: Source, options: Options, field: Field
) -> FewShot | None:
    """What `--shots` asks for; None without.

    Raises:
      ValueError: options that go with it are given without, or `FewShot` refuses them.
    """
    if options.shots is None:
        for name in ("shots_data", "shots_seed", "instruction"):
            if value := getattr(options, name):
                raise ValueError(f"--{name.replace('_', '-')} is {value!r}, which needs --shots")
        return None
    if options.shots_data is not None:
        settings = {"image_size": predictor.image_size, "tfds_dir": options.tfds_dir}
        source = open_source(options.shots_data, field=field, **settings)
    return FewShot(source, options.shots, seed=options.shots_seed, instruction=options.instruction)
