"""Packs a set of images into a tensorflow-datasets set, or decodes a set of videos once.

A tensorflow-datasets set is a few large files in place of many small ones.

    python -m mammut.prepare jsonl:PATH --data-dir DIR --name NAME

writes DIR/NAME/1.0.0 with one split, `train`, in the order of the set. mammut reads it as
`tfds:NAME/train` with data.tfds_dir DIR; others read it by `tfds.builder(NAME, data_dir=DIR)`.
TensorFlow is not needed.

    python -m mammut.prepare SPEC --data-dir DIR --name NAME --frames 16

writes 16 frames of every video as JPEG, and DIR/NAME/videos.jsonl, which mammut reads as
`jsonl:DIR/NAME`: reading such frames costs a twentieth of decoding the video.
"""

import argparse
import collections
import dataclasses
import io
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, get_args

from mammut.core.files import replacing_file
from mammut.data.batches import describe_bad
from mammut.data.config import DataConfig, Field
from mammut.data.examples import BadExample, Example, Source
from mammut.data.images import BadImage, ImageTransform
from mammut.data.sources import open_source
from mammut.data.video import VideoTransform

_VERSION = "1.0.0"
_QUALITY = 90  # of a frame as JPEG


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
    _require_name(name)
    folder = pathlib.Path(os.path.expanduser(data_dir)).resolve()
    if (folder / name / _VERSION).exists():
        raise ValueError(
            f"{folder / name / _VERSION} exists already: remove it or choose another --name"
        )
    source = open_source(spec, image_size=1)  # a size that only drawn scenes use
    bad = collections.Counter()
    examples = list(_usable(source, bad))
    _require_few_bad(source, bad, max_bad_share)
    _write(source, examples, folder, name)
    return dict(bad)


def prepare_frames(
    spec: str,
    data_dir: str,
    name: str,
    frames: int,
    *,
    field: Field = "captions",
    size: int = 256,
    max_bad_share: float = DataConfig.max_bad_share,
) -> dict[str, int]:
    """Decodes the videos of a source once: writes frames as JPEG, and a JSONL set of them.

    The frames are those that `VideoTransform(frames)` reads. Videos that cannot be used are left
    out. The set is DIR/NAME/videos.jsonl; it is written last.

    Args:
      spec: the videos; see `mammut.data.sources.open_source`.
      data_dir: the folder in which the set is made.
      name: the name of the set, as of `prepare`.
      frames: frames of a video; training draws from them.
      field: what the set has for each video.
      size: pixels of the shorter side of a frame; smaller frames stay as they are.
      max_bad_share: as of `prepare`, but the frames that were written stay.

    Returns:
      How many videos were left out, by cause.

    Raises:
      ValueError: as of `prepare`.
    """
    _require_name(name)
    folder = pathlib.Path(os.path.expanduser(data_dir)).resolve() / name
    if folder.exists():
        raise ValueError(f"{folder} exists already: remove it or choose another --name")
    source = open_source(spec, image_size=size, field=field, video=True)
    transform = VideoTransform(frames)

    def jpeg(frame: Any) -> bytes:
        picture = ImageTransform(size).read(frame)
        shrunk = min(1.0, size / min(picture.size))
        picture = picture.resize([max(1, round(side * shrunk)) for side in picture.size])
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=_QUALITY)
        return file.getvalue()

    bad = collections.Counter()
    lines = []
    for index in range(len(source)):
        try:
            example = source[index]
            pictures = transform.map(example.image, jpeg, ImageTransform(size).max_image_pixels)
        except (BadExample, BadImage) as error:
            bad[error.cause] += 1
            continue
        files = {}  # of each picture: one that is repeated is written once
        for number, picture in enumerate(pictures):
            files.setdefault(id(picture), f"frames/{index:08d}/{number:03d}.jpg")
        (folder / f"frames/{index:08d}").mkdir(parents=True)
        for picture in pictures:
            (folder / files[id(picture)]).write_bytes(picture)
        lines.append(_line(example, [files[id(picture)] for picture in pictures]))
    _require_few_bad(source, bad, max_bad_share)
    with replacing_file(folder / "videos.jsonl") as new:
        new.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return dict(bad)


def _line(example: Example, files: list[str]) -> dict[str, Any]:
    """Makes the line of a video, as `mammut.data.jsonl` reads it."""
    line = {"video_id": example.key, "frames": [{"file": file} for file in files]}
    if example.captions:
        line["captions"] = example.captions
    if example.name is not None:
        line["name"] = example.name
    if example.qa:
        questions = [dataclasses.asdict(question) for question in example.qa]
        line["qa"] = [
            {"question": question.pop("text"), "question_id": question.pop("id")} | question
            for question in questions
        ]
    return line


def _require_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(
            f"--name is {name!r}, expected lower-case letters, digits and underscores, "
            "a letter first"
        )


def _require_few_bad(source: Source, bad: collections.Counter, max_bad_share: float) -> None:
    if bad.total() == len(source) or bad.total() > max_bad_share * len(source):
        raise ValueError(
            f"{bad.total()} of the {len(source)} examples of {source.spec!r} cannot be used "
            f"({describe_bad(bad)}), --max-bad-share allows {max_bad_share:.0%}"
        )


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
        description="Pack a set of images into a tensorflow-datasets set, or decode videos once."
    )
    parser.add_argument("spec", help="jsonl:PATH or tar:PATTERN, with an optional [a:b]")
    parser.add_argument("--data-dir", required=True, help="the data_dir of tensorflow-datasets")
    parser.add_argument("--name", required=True, help="the name of the set")
    parser.add_argument("--max-bad-share", type=float, default=DataConfig.max_bad_share)
    parser.add_argument("--frames", type=int, help="write so many frames of each video as JPEG")
    parser.add_argument(
        "--field", default="captions", choices=get_args(Field), help="with --frames"
    )
    parser.add_argument("--size", type=int, default=256, help="shorter side of these frames")
    arguments = parser.parse_args()
    common = arguments.spec, arguments.data_dir, arguments.name
    share = arguments.max_bad_share
    try:
        if arguments.frames is None:
            bad = prepare(*common, share)
        else:
            settings = {"field": arguments.field, "size": arguments.size}
            bad = prepare_frames(*common, arguments.frames, max_bad_share=share, **settings)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "prepare: Ctrl-C: the set is not prepared\n")
    left_out = describe_bad(bad) or "nothing"
    print(f"prepared {arguments.name} in {arguments.data_dir}; left out: {left_out}")


if __name__ == "__main__":
    _main()
