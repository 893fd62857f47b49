"""Packs a JSONL set or tar shards into a tensorflow-datasets set.

Such a set is a few large files in place of many small ones.

    python -m mammut.prepare jsonl:PATH --data-dir DIR --name NAME

writes DIR/NAME/1.0.0 with one split, `train`, in the order of the set. mammut reads it as
`tfds:NAME/train` with data.tfds_dir DIR; others read it by `tfds.builder(NAME, data_dir=DIR)`.
TensorFlow is not needed.
"""

import argparse
import collections
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from mammut.data.batches import describe_bad
from mammut.data.config import DataConfig
from mammut.data.examples import BadExample, Source
from mammut.data.images import BadImage, ImageTransform
from mammut.data.sources import open_source

_VERSION = "1.0.0"


def prepare(
    spec: str, data_dir: str, name: str, max_bad_share: float = DataConfig.max_bad_share
) -> dict[str, int]:
    """Writes the examples of a source as a tensorflow-datasets set.

    Its fields are `image`, `image/filename` and `captions`. Images keep their original bytes.
    Examples that cannot be used are left out.

    Args:
      spec: `jsonl:PATH` or `tar:PATTERN`, with an optional slice; see
        `mammut.data.sources.open_source`.
      data_dir: the `data_dir` of tensorflow-datasets.
      name: the name of the set: lower-case letters, digits and underscores, a letter first.
      max_bad_share: the share of examples that may be unusable; with more, nothing is written.

    Returns:
      How many examples were left out, by cause.

    Raises:
      ValueError: the spec or the name is not of that form, the set exists already, or too much of
        it cannot be used.
    """
    if not spec.startswith(("jsonl:", "tar:")):
        raise ValueError(f"the set to prepare is {spec!r}, expected jsonl:PATH or tar:PATTERN")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(
            f"--name is {name!r}, expected lower-case letters, digits and underscores, "
            "a letter first"
        )
    folder = pathlib.Path(os.path.expanduser(data_dir)).resolve()
    if (folder / name / _VERSION).exists():
        raise ValueError(
            f"{folder / name / _VERSION} exists already: remove it or choose another --name"
        )
    source = open_source(spec, image_size=1)  # a size that only drawn scenes use
    bad = collections.Counter()
    examples = list(_usable(source, bad))
    if not examples or bad.total() > max_bad_share * len(source):
        raise ValueError(
            f"{bad.total()} of the {len(source)} examples of {spec!r} cannot be used "
            f"({describe_bad(bad)}), --max-bad-share allows {max_bad_share:.0%}"
        )
    _write(source, examples, folder, name)
    return dict(bad)


def _usable(source: Source, bad: collections.Counter) -> Iterator[int]:
    """Yields the indices of the examples that can be used.

    The others are counted in `bad`, by cause.
    """
    transform = ImageTransform(image_size=1)
    for index in range(len(source)):
        try:
            transform.read(source[index].image)
            yield index
        except (BadExample, BadImage) as error:
            bad[error.cause] += 1


def _write(source: Source, examples: list[int], folder: pathlib.Path, name: str) -> None:
    import tensorflow_datasets as tfds

    set_name = name

    class Captions(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = set_name
        VERSION = tfds.core.Version(_VERSION)

        def _info(self) -> tfds.core.DatasetInfo:
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(),
                    "image/filename": tfds.features.Text(),
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                }
            )
            description = f"Images and captions of {source.spec}."
            # Not shuffled: examples keep the order of the set.
            return tfds.core.DatasetInfo(
                builder=self, description=description, features=features, disable_shuffling=True
            )

        def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            for key, index in enumerate(examples):
                example = source[index]
                image = example.image
                if not isinstance(image, bytes):  # a path
                    image = image.read_bytes()
                fields = {"image": image, "image/filename": example.key}
                yield key, fields | {"captions": example.captions}

    builder = Captions(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )


def _main() -> None:
    parser = argparse.ArgumentParser(
        description="Pack a JSONL set or tar shards into a tensorflow-datasets set."
    )
    parser.add_argument("spec", help="jsonl:PATH or tar:PATTERN, with an optional [a:b]")
    parser.add_argument("--data-dir", required=True, help="the data_dir of tensorflow-datasets")
    parser.add_argument("--name", required=True, help="the name of the set")
    parser.add_argument("--max-bad-share", type=float, default=DataConfig.max_bad_share)
    arguments = parser.parse_args()
    try:
        bad = prepare(**vars(arguments))
    except (ValueError, OSError) as error:
        parser.exit(1, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "prepare: Ctrl-C: the set is not prepared\n")
    left_out = describe_bad(bad) or "nothing"
    print(f"prepared {arguments.name} in {arguments.data_dir}; left out: {left_out}")


if __name__ == "__main__":
    _main()
