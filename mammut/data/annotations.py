"""Captioning, retrieval and question answering benchmarks, read as they are downloaded.

Each reader returns the set as records, the objects that its JSON lines would be: `{"file",
"captions"}` or `{"file", "qa"}`, with files relative to the folder of the images.
`mammut.data.records` checks the texts, as it checks the texts of JSON lines.
"""

import os
import pathlib
import re
import sys
from typing import Any

from mammut.data.annotation_files import (
    ID,
    digest_of,
    expanded,
    get_field,
    objects_in,
    read_json,
    require_offered,
)
from mammut.data.config import Field
from mammut.data.examples import Example, Source, SourceOptions
from mammut.data.records import make_example

# For each kind: the field that it offers, and the text that follows its name and a colon in a spec.
FORMS: dict[str, tuple[Field, str]] = {
    "coco": ("captions", "ANNOTATIONS.json,IMAGES"),
    "karpathy": ("captions", "DATASET.json,IMAGES,SPLIT"),
    "vqav2": ("qa", "QUESTIONS.json,ANNOTATIONS.json,IMAGES"),
}


class BenchmarkSource(Source):
    """A benchmark as it is downloaded; its kind is one of `FORMS`."""

    def __init__(self, options: SourceOptions):
        offered, _ = FORMS[options.kind]
        require_offered(options, offered)
        try:
            self._path, self._images, self._records = read(options.kind, options.name)
        except ValueError as error:
            raise ValueError(f"data source {options.spec!r}: {error}") from error
        self._field = options.field
        self._digest = digest_of(options.name)
        self._notes = []
        if options.kind == "karpathy":
            self._notes = [f"split {options.name.rpartition(',')[2]} of {self._path.name}"]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        file = record["file"]
        where = f"{self._path}, image {file}"
        return make_example(self._images / file, file, self._field, record[self._field], where)

    def fingerprint(self) -> str:
        return self._digest

    def notes(self) -> list[str]:
        return self._notes


def read(kind: str, form: str) -> tuple[pathlib.Path, pathlib.Path, list[dict[str, Any]]]:
    """Reads a benchmark that a spec names.

    Commas separate the parts of `form`, so no path can have one; `~` is the home folder.
    ANNOTATIONS.json may be empty in vqav2.

    Returns:
      The first file, the folder of the images, and the records.

    Raises:
      ValueError: `form` does not have the form in `FORMS`, IMAGES is not a folder, or a file does
        not have the format that its reader expects.
    """
    match (kind, *form.split(",")):
        case "coco", file, images if file and images:
            records = read_coco(expanded(file))
        case "karpathy", file, images, split if file and images and split:
            records = read_karpathy(expanded(file), split)
        case "vqav2", file, annotations, images if file and images:
            records = read_vqav2(
                expanded(file), expanded(annotations) if annotations else None, _folder(images)
            )
        case _:
            raise ValueError(f"{form!r} is not {FORMS[kind][1]}, with no comma in a path")
    return expanded(file), _folder(images), records


def read_coco(annotations: pathlib.Path) -> list[dict[str, Any]]:
    """Reads a COCO captions file (`captions_val2017.json`): its images in order, with captions.

    Format: "Data format" at cocodataset.org.

    Raises:
      ValueError: the file is missing or not of that format, an image is in it twice, or a caption
        belongs to no image.
    """
    content = read_json(annotations)
    records = {}
    for where, image in objects_in(content, "images", annotations):
        identity = get_field(image, "id", ID, where)
        if identity in records:
            raise ValueError(
                f"{where} has the id {identity!r} of an image before it, expected each image once"
            )
        records[identity] = {"file": get_field(image, "file_name", str, where), "captions": []}
    for where, annotation in objects_in(content, "annotations", annotations):
        identity = get_field(annotation, "image_id", ID, where)
        if identity not in records:
            raise ValueError(
                f'{where} has the image_id {identity!r}, expected the id of one of the "images"'
            )
        records[identity]["captions"].append(get_field(annotation, "caption", str, where))
    return list(records.values())


def read_karpathy(dataset: pathlib.Path, split: str) -> list[dict[str, Any]]:
    """Reads one of Karpathy's splits (arXiv:1412.2306): its images with their captions.

    The files are `dataset_coco.json` and `dataset_flickr30k.json`. Retrieval and captioning results
    are quoted on "test": 5,000 images of COCO, 1,000 of Flickr30k. The training images of COCO are
    in two splits, "train" and "restval". An image is in the folder that its "filepath" names, where
    it has one.

    Raises:
      ValueError: the file is missing or not of that format, has no such split, or an image of it
        twice.
    """
    records = {}
    splits = set()
    for where, image in objects_in(read_json(dataset), "images", dataset):
        name = get_field(image, "split", str, where)
        splits.add(name)
        if name != split:
            continue
        file = get_field(image, "filename", str, where)
        if "filepath" in image:
            file = f"{get_field(image, 'filepath', str, where)}/{file}"
        if file in records:
            raise ValueError(
                f"{where} is {file}, like an image before it, expected each image once"
            )
        sentences = objects_in(image, "sentences", where)
        records[file] = {
            "file": file,
            "captions": [get_field(sentence, "raw", str, at) for at, sentence in sentences],
        }
    if split not in splits:
        raise ValueError(
            f"{dataset} has no split {split!r}, expected one of {', '.join(sorted(splits))}"
        )
    return list(records.values())


def read_vqav2(
    questions: pathlib.Path, annotations: pathlib.Path | None, images: pathlib.Path
) -> list[dict[str, Any]]:
    """Reads VQA v2: each image with its questions and answers.

    The images come in the order of the questions file. A record is `{"file", "qa": [{"question",
    "question_id", "answers", "answer_type", "question_type"}]}`. Without `annotations`, as in a
    test set, it has the question and its id alone. Images are named as in COCO 2014, by
    `COCO_val2014_` and twelve digits, or as in 2017, by the digits alone, where the folder `images`
    has them so; test-dev asks about images of test2015. Format: visualqa.org/vqa_v1_download.html,
    "Input Questions Format".

    Raises:
      ValueError: a file is missing or not of that format, an id is there twice, or the annotations
        do not belong to the questions.
    """
    content = read_json(questions)
    subset = re.sub(r"^test-[a-z]+", "test", get_field(content, "data_subtype", str, questions))
    asked = {}  # questions by id
    image_of = {}  # the image of each question
    for where, question in objects_in(content, "questions", questions):
        identity = get_field(question, "question_id", ID, where)
        if identity in asked:
            raise ValueError(
                f"{where} has the question_id {identity!r} of a question before it, "
                "expected each once"
            )
        image_of[identity] = get_field(question, "image_id", int, where)
        asked[identity] = {
            "question": get_field(question, "question", str, where),
            "question_id": identity,
        }
    if annotations is not None:
        _add_answers(asked, image_of, annotations)

    names = set(os.listdir(images))
    records = {}
    for identity, image in image_of.items():
        if image not in records:
            of_2017 = f"{image:012d}.jpg"
            file = f"COCO_{subset}_{image:012d}.jpg"
            if of_2017 in names and file not in names:
                file = of_2017
            records[image] = {"file": file, "qa": []}
        records[image]["qa"].append(asked[identity])
    return list(records.values())


def _folder(text: str) -> pathlib.Path:
    if not expanded(text).is_dir():
        raise ValueError(f"{expanded(text)} is not a folder, expected that of the images")
    return expanded(text)


def _add_answers(
    asked: dict[Any, dict[str, Any]], image_of: dict[Any, int], annotations: pathlib.Path
) -> None:
    """Adds answers and types to questions from VQA v2 annotations.

    `asked` has the questions by id, and `image_of` their images.
    """
    content = read_json(annotations, _answer_alone)
    for where, annotation in objects_in(content, "annotations", annotations):
        identity = get_field(annotation, "question_id", ID, where)
        if identity not in asked:
            raise ValueError(
                f"{where} has the question_id {identity!r}, expected one of the questions file"
            )
        if "answers" in asked[identity]:
            raise ValueError(
                f"{where} has the question_id {identity!r} of one before it, expected each once"
            )
        image = get_field(annotation, "image_id", int, where)
        if image != image_of[identity]:
            raise ValueError(
                f"{where} has the image_id {image}, "
                f"expected {image_of[identity]} as its question has"
            )
        answers = get_field(annotation, "answers", list, where)
        if not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f'{where} has one of the "answers" without "answer", a text')
        types = {
            name: sys.intern(get_field(annotation, name, str, where))
            for name in ("answer_type", "question_type")
        }
        asked[identity] |= {"answers": answers} | types
    missing = [identity for identity, question in asked.items() if "answers" not in question]
    if missing:
        raise ValueError(
            f"{annotations} has no annotation of {len(missing)} of the questions, "
            f"such as {missing[0]!r}"
        )


def _answer_alone(value: dict[str, Any]) -> Any:
    """Replaces an answer's object by its text.

    This saves memory: a training set has millions of answers.
    """
    answer = value.get("answer")
    return sys.intern(answer) if isinstance(answer, str) else value
