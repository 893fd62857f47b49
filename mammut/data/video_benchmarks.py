"""Benchmarks of videos, opened by a spec that names their files as they are downloaded.

  `msrvtt:ANNOTATIONS.json,VIDEOS,SPLIT`: captions of MSR-VTT. SPLIT is train, validate or test,
    several joined by `+`, or the path of a list that ends in .csv or .txt. Of 1k-A these are
    `MSRVTT_JSFUSION_test.csv`, which has captions itself, so that ANNOTATIONS.json may be left
    empty, and `MSRVTT_train.9k.csv`. The test list has 5 captions twice: no model finds more than
    99.5 % of the videos first by text.

  `msvd:AllVideoDescriptions.txt,VIDEOS,LIST.txt`: captions of MSVD. A fourth part
    `youtube_mapping.txt` finds files by their other names, such as vid1.avi.

  `msrvtt-qa:QUESTIONS.json,VIDEOS`, `msvd-qa:QUESTIONS.json,VIDEOS`: questions; msvd-qa takes the
    mapping as a third part, too.

  `activitynet:ANNOTATIONS.json,VIDEOS,clips`: each sentence with its clip; `...,paragraphs`: whole
    videos with all their sentences as one caption.

  `activitynet-qa:QUESTIONS.json,ANSWERS.json,VIDEOS`, `vatex:ANNOTATIONS.json,VIDEOS`,
    `tgif-qa:QUESTIONS.csv,GIFS`: questions, English captions, open-ended questions.

VIDEOS is a folder of video files, or of folders of frames, named by the ids of the benchmark.
Videos get lost where a benchmark lives on YouTube: what is missing is left out, and counted in one
warning and in the notes of the scores.
"""

import hashlib
import logging
import os
import pathlib

from mammut.data.annotation_files import digest_of, expanded, require_offered
from mammut.data.config import Field
from mammut.data.examples import Example, Source, SourceOptions
from mammut.data.records import make_example
from mammut.data.video import Clip
from mammut.data.video_annotations import (
    VideoRecord,
    read_activitynet,
    read_activitynet_qa,
    read_msrvtt,
    read_msvd,
    read_tgif_qa,
    read_vatex,
    read_video_qa,
)

_log = logging.getLogger(__name__)

# For each kind: the field that it offers, and the text that follows its name and a colon in a spec.
FORMS: dict[str, tuple[Field, str]] = {
    "msrvtt": ("captions", "ANNOTATIONS.json,VIDEOS,SPLIT or LIST"),
    "msvd": ("captions", "AllVideoDescriptions.txt,VIDEOS,LIST.txt[,youtube_mapping.txt]"),
    "msrvtt-qa": ("qa", "QUESTIONS.json,VIDEOS"),
    "msvd-qa": ("qa", "QUESTIONS.json,VIDEOS[,youtube_mapping.txt]"),
    "activitynet": ("captions", "ANNOTATIONS.json,VIDEOS,clips or paragraphs"),
    "activitynet-qa": ("qa", "QUESTIONS.json,ANSWERS.json,VIDEOS"),
    "vatex": ("captions", "ANNOTATIONS.json,VIDEOS"),
    "tgif-qa": ("qa", "QUESTIONS.csv,GIFS"),
}

_SUFFIXES = (".mp4", ".m4v", ".webm", ".mkv", ".mov", ".avi", ".gif")


class VideoBenchmarkSource(Source):
    """A benchmark of videos as it is downloaded; its kind is one of `FORMS`.

    Its examples have a `Clip`. Videos that are missing are left out.
    """

    def __init__(self, options: SourceOptions):
        offered, _ = FORMS[options.kind]
        require_offered(options, offered)
        try:
            self._path, self._videos, about, records = read(options.kind, options.name)
            found = find_videos(self._videos)
        except ValueError as error:
            raise ValueError(f"data source {options.spec!r}: {error}") from error
        self._field = options.field
        self._records = []
        for record in records:
            file = next((found[name] for name in record.names if name in found), None)
            if file is not None:
                self._records.append((file, record))
        self._notes = [f"{about}: {_counted(records, self._records, offered)}"]
        if records and not self._records:
            raise ValueError(
                f"data source {options.spec!r}: {self._videos} has none of {len(records):,} videos,"
                f" expected files such as {records[0].names[0]}.mp4"
            )
        if len(self._records) < len(records):
            _log.warning("%s: %s in %s", options.spec, self._notes[0], self._videos)
        # The examples depend on the videos that are there.
        digest = hashlib.sha256(digest_of(options.name).encode())
        for file, _ in self._records:
            digest.update(os.fsencode(file) + b"\0")
        self._digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        file, record = self._records[index]
        key = file if record.number is None else f"{file}#{record.number}"
        clip = Clip(self._videos / file, record.start, record.end)
        return make_example(clip, key, self._field, record.texts, f"{self._path}, video {key}")

    def fingerprint(self) -> str:
        return self._digest

    def notes(self) -> list[str]:
        return self._notes


def _counted(records: list[VideoRecord], found: list[tuple[str, VideoRecord]], field: Field) -> str:
    """Says how many of the videos and questions of a set are there."""
    wanted = len({record.names for record in records})
    there = len({record.names for _, record in found})
    text = f"{there:,} of {wanted:,} videos found"
    if field == "qa":
        questions = sum(len(record.texts) for record in records)
        asked = sum(len(record.texts) for _, record in found)
        text += f", with {asked:,} of {questions:,} questions"
    return text


def find_videos(folder: pathlib.Path) -> dict[str, str]:
    """Returns the video files of a folder, and its folders of frames, by name without extension.

    Of several with one name a file counts before a folder, and then the first in the alphabet.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder, expected that of the videos")
    files: dict[str, str] = {}
    folders: dict[str, str] = {}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            stem, suffix = os.path.splitext(entry.name)
            if suffix.lower() in _SUFFIXES:
                files.setdefault(stem, entry.name)
            elif entry.is_dir():
                folders[entry.name] = entry.name
    return folders | files


def read(kind: str, form: str) -> tuple[pathlib.Path, pathlib.Path, str, list[VideoRecord]]:
    """Reads a benchmark that a spec names.

    Commas separate the parts of `form`, so no path can have one; `~` is the home folder.

    Returns:
      The first file, the folder of the videos, the name of the split, and the records.

    Raises:
      ValueError: `form` does not have the form in `FORMS`, or a file does not have the format that
        its reader expects.
    """
    match (kind, *form.split(",")):
        case "msrvtt", file, videos, part if videos and part:
            path = expanded(file or part)
            records = read_msrvtt(expanded(file) if file else None, part)
            about = f"split {part} of {path.name}"
            if part.endswith((".csv", ".txt")):
                about = expanded(part).name
        case "msvd", file, videos, part, *mapping if file and videos and part and len(mapping) < 2:
            path = expanded(file)
            records = read_msvd(path, expanded(part), _optional(mapping))
            about = expanded(part).name
        case "msrvtt-qa", file, videos if file and videos:
            path = expanded(file)
            records = read_video_qa(path, "video")
            about = path.name
        case "msvd-qa", file, videos, *mapping if file and videos and len(mapping) < 2:
            path = expanded(file)
            records = read_video_qa(path, "vid", _optional(mapping))
            about = path.name
        case "activitynet", file, videos, ("clips" | "paragraphs") as part if file and videos:
            path = expanded(file)
            records = read_activitynet(path, paragraphs=part == "paragraphs")
            about = f"{path.name}, {part}"
        case "activitynet-qa", file, answers, videos if file and answers and videos:
            path = expanded(file)
            records = read_activitynet_qa(path, expanded(answers))
            about = path.name
        case (("vatex" | "tgif-qa"), file, videos) if file and videos:
            path = expanded(file)
            records = read_vatex(path) if kind == "vatex" else read_tgif_qa(path)
            about = path.name
        case _:
            raise ValueError(f"{form!r} is not {FORMS[kind][1]}, with no comma in a path")
    return path, expanded(videos), about, records


def _optional(parts: list[str]) -> pathlib.Path | None:
    return expanded(parts[0]) if parts and parts[0] else None
