"""`open_source` opens a set of examples by its spec, such as `jsonl:PATH[1000:]`.

A source is opened for one `Field`: captions, questions with answers ("qa"), or the name of the
image's class. `KINDS` has a row for each kind of source.

A spec is a kind, a colon, and the name of the set:

  `synthetic:train`, `synthetic:val`: the drawn scenes of `mammut.data.synthetic`.

  `moving:train`, `moving:val`: the drawn clips of `mammut.data.moving`.

  `jsonl:PATH`: one object a line. PATH is the .jsonl or a folder that holds exactly one. A line
    has a "file", relative to the .jsonl, with a "start" and "end" in seconds where it is a part of
    a video; or a "video_id" and its "frames", a list of `{"file"}`; and the field asked for:
    "captions", a list of texts; "qa", a list of `{"question", "answers": [...]}`, optionally with
    "question_id", "answer_type" and "question_type"; or "name". Only the place of each line is kept
    in memory.
    Other sets' names for these are taken, too: `SPELLINGS` of `mammut.data.records`, one text in
    place of a list, and a line of one question that has "question" and "answer" itself.

  `tar:PATTERN`: plain tar files as webdataset has them, such as `tar:data/{00000..00127}.tar`.
    Wildcards work too, and several patterns joined by `::`; a path that exists is meant before a
    pattern. Files that share a key are an example: an image (jpg, jpeg, png, webp) or a video (mp4,
    webm, mkv, mov, avi, gif) and either a caption in a `txt`, the name of a class in a `cls`, or a
    `json` that has the field asked for as a JSON line has it. Other files are counted and named in
    a warning. The shards' headers are read once; see `mammut.data.tar_shards`.

  `coco:ANNOTATIONS.json,IMAGES`, `karpathy:DATASET.json,IMAGES,SPLIT` (captions) and
    `vqav2:QUESTIONS.json,ANNOTATIONS.json,IMAGES` (qa; without answers where ANNOTATIONS.json
    is left empty): benchmarks as they are downloaded. IMAGES is a folder; no path has a comma.
    See `mammut.data.annotations`.

  `msrvtt:...`, `msvd:...`, `msrvtt-qa:...` and others: benchmarks of videos, listed in
    `mammut.data.video_benchmarks`.

  `tfds:NAME/SPLIT`: a set that tensorflow-datasets has prepared as array_record. NAME may have
    a config and a version, or be the folder of the prepared set. The image is its field
    `image`. Captions are its first field of `captions` (a sequence of texts, or of objects with
    a `text`, as in COCO), `caption` and `text`. Questions are its sequence `qa`, `qas` or
    `question_answer` (as in CLEVR) of objects with a `question` and with `answers` or an
    `answer`, or it has these fields itself. The name is its `label`, a class, or its `name`, a
    text.

A slice may follow: `[1000:]`, `[:90%]`, or `[::5]`, every fifth example; `[!::5]` is all the
others.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mammut.data.annotations import FORMS, BenchmarkSource
from mammut.data.config import Field
from mammut.data.examples import BadExample, Example, Source, SourceOptions
from mammut.data.jsonl import JsonlSource
from mammut.data.moving import MovingSource
from mammut.data.synthetic import SyntheticSource
from mammut.data.tar_shards import TarSource
from mammut.data.tfds_sets import TfdsSource
from mammut.data.video_benchmarks import FORMS as VIDEO_FORMS
from mammut.data.video_benchmarks import VideoBenchmarkSource
from mammut.data.webvid import WebVidSource


class Kind(NamedTuple):
    """A kind of source, named before the colon of a spec."""

    open: Callable[[SourceOptions], Source]
    forms: tuple[str, ...]  # the forms of the part after the colon, for messages
    pattern: str = ".+"  # a regular expression for these forms


KINDS: dict[str, Kind] = {
    "synthetic": Kind(SyntheticSource, ("train", "val"), "train|val"),
    "moving": Kind(MovingSource, ("train", "val"), "train|val"),
    "jsonl": Kind(JsonlSource, ("PATH",)),
    "tar": Kind(TarSource, ("PATTERN",)),
    **{kind: Kind(BenchmarkSource, (form,)) for kind, (_, form) in FORMS.items()},
    **{kind: Kind(VideoBenchmarkSource, (form,)) for kind, (_, form) in VIDEO_FORMS.items()},
    "webvid": Kind(WebVidSource, ("RESULTS.csv,VIDEOS",)),
    "tfds": Kind(TfdsSource, ("NAME/SPLIT",), ".+/[^/]+"),
}

# A spec: its kind and name, and the slice [start:stop:step], or [!...] for all other examples.
_SPEC = re.compile(r"(.*?)(?:\[(!)?(-?\d+%?)?:(-?\d+%?)?(?::([1-9]\d*)?)?\])?", re.DOTALL)


def open_source(
    spec: str,
    *,
    image_size: int,
    tfds_dir: str | None = None,
    field: Field = "captions",
    video: bool = False,
    alive: Callable[[], None] = lambda: None,
) -> Source:
    """Opens a set of images with captions, questions or names.

    Example:
      >>> source = open_source("jsonl:photos/captions.jsonl[1000:]", image_size=224)
      >>> source[0].captions
      ['a dog runs on green grass']

    Args:
      spec: which set; see the top of this module.
      image_size: pixels of the drawn scenes; other sources give their images as they are stored.
      tfds_dir: the `data_dir` of tensorflow-datasets; None: its default.
      field: the field that an example must have; an example without it raises BadExample.
      video: the examples are read as videos (`Processor.video` is set): where a key of tar shards
        has an image and a video, the video counts.
      alive: is called again and again while a large set is opened.

    Raises:
      ValueError: the spec has none of these forms; or the set does not exist, is empty, has another
        format, or does not have the field.
    """
    whole, others, start, stop, step = _SPEC.fullmatch(spec).groups()
    if os.path.exists(os.path.expanduser(spec.partition(":")[2])):
        whole, others, start, stop, step = spec, *[None] * 4  # a path that ends like a slice
    name, _, rest = whole.partition(":")
    kind = KINDS.get(name)
    if kind is None or not re.fullmatch(kind.pattern, rest, re.DOTALL):
        forms = [f"{name}:{form}" for name, kind in KINDS.items() for form in kind.forms]
        raise ValueError(
            f"data source {spec!r} is not {', '.join(forms[:-1])} or {forms[-1]}, "
            "each with an optional [a:b] in examples or percent, [a:b:step], or [!a:b:step] for "
            "all the others"
        )
    settings = {"image_size": image_size, "tfds_dir": tfds_dir, "video": video, "alive": alive}
    options = SourceOptions(spec, name, rest, field, **settings)
    source = kind.open(options)

    def bound(text: str | None) -> int | None:
        if text is None or not text.endswith("%"):
            return text and int(text)
        return round(len(source) * int(text[:-1]) / 100)

    rows = range(len(source))[bound(start) : bound(stop) : step and int(step)]
    if others:
        rows = np.setdiff1d(range(len(source)), rows).tolist()
    if not rows:
        raise ValueError(
            f"data source {spec!r} is empty, expected at least one example; "
            f"the set has {len(source)}"
        )
    return _Slice(spec, source, rows)


def texts(source: Source, begun: Callable[[int], None] = lambda index: None) -> Iterator[str]:
    """Yields all texts in order, to train a tokenizer on.

    Unreadable examples are left out. `begun` is called with the index of every example.
    """
    for index in range(len(source)):
        begun(index)
        try:
            yield from (text for pair in source.pairs(index) for text in pair if text)
        except BadExample:
            continue


class _Slice(Source):
    """Some rows of a source, under the spec that names them."""

    def __init__(self, spec: str, source: Source, rows: Sequence[int]):
        self.spec = spec
        self._source = source
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        return self._source[self._rows[index]]

    def pairs(self, index: int) -> list[tuple[str, str]]:
        return self._source.pairs(self._rows[index])

    def fingerprint(self) -> str | None:
        # The rows follow from the spec, which a resumed run keeps.
        return self._source.fingerprint()

    def notes(self) -> list[str]:
        return self._source.notes()
