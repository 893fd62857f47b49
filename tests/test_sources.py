"""Benchmarks as they are downloaded, and questions and names in JSON lines and in prepared sets."""

import collections
import contextlib
import copy
import errno
import io
import json
import os
import pathlib
import re
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from mammut.config import DataConfig
from mammut.data import jsonl, sources
from mammut.data.batches import TrainBatches
from mammut.data.config import Field
from mammut.data.examples import BadExample, Example, Question, Source
from mammut.data.images import BadImage
from mammut.data.jsonl import JsonlSource
from mammut.evaluation.predictions import Predictions
from mammut.testing import tiny_processor


def open_set(spec: str, field: Field = "captions", **options) -> Source:
    return sources.open_source(spec, image_size=16, field=field, **options)


def write(path: pathlib.Path, content) -> pathlib.Path:
    path.write_text(json.dumps(content), "utf-8")
    return path


def picture(path: pathlib.Path) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(path)
    return path


def refusal(spec: str, field: Field = "captions", **options) -> str:
    with pytest.raises(ValueError) as error:
        open_set(spec, field, **options)
    assert repr(spec) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def changed(content, *path, to=None):
    """A copy with another value at a path of keys and places, or without it."""
    content = copy.deepcopy(content)
    *parents, last = path
    inner = content
    for step in parents:
        inner = inner[step]
    if to is None:
        del inner[last]
    else:
        inner[last] = to
    return content


# COCO captions

COCO = {
    "info": {"description": "COCO 2017 Dataset", "year": 2017},
    "licenses": [
        {
            "url": "http://creativecommons.org/licenses/by/2.0/",
            "id": 4,
            "name": "Attribution License",
        }
    ],
    "images": [
        {"license": 4, "file_name": "000000397133.jpg", "height": 427, "width": 640, "id": 397133},
        {"license": 4, "file_name": "000000037777.jpg", "height": 230, "width": 352, "id": 37777},
        {"license": 4, "file_name": "000000252219.jpg", "height": 428, "width": 640, "id": 252219},
    ],
    "annotations": [
        {"image_id": 252219, "id": 38, "caption": "A person on a street."},
        {"image_id": 397133, "id": 41, "caption": "A man in a kitchen."},
        {"image_id": 252219, "id": 12, "caption": "Zwölf Leute."},
        {"image_id": 397133, "id": 7, "caption": " \n"},
    ],
}


@pytest.fixture
def coco(tmp_path) -> str:
    (tmp_path / "val2017").mkdir()
    write(tmp_path / "captions_val2017.json", COCO)
    return f"coco:{tmp_path}/captions_val2017.json,{tmp_path}/val2017"


def test_coco_captions_are_in_the_order_of_the_images(coco, tmp_path):
    source = open_set(coco)
    assert len(source) == 3 and source.notes() == []
    first, last = source[0], source[2]
    assert (first.key, first.captions) == ("000000397133.jpg", ["A man in a kitchen."])
    assert (last.key, last.captions) == (
        "000000252219.jpg",
        ["A person on a street.", "Zwölf Leute."],
    )
    assert (
        last.image == tmp_path / "val2017/000000252219.jpg" and last.qa == [] and last.name is None
    )
    assert list(sources.texts(source)) == [
        "A man in a kitchen.",
        "A person on a street.",
        "Zwölf Leute.",
    ]


def test_an_image_that_coco_has_no_caption_of_is_bad(coco):
    with pytest.raises(
        BadExample, match="captions_val2017.json, image 000000037777.jpg has no caption"
    ) as bad:
        open_set(coco)[1]
    assert bad.value.cause == "no caption"


def test_benchmarks_are_sliced_by_images(coco):
    assert [example.key for example in open_set(f"{coco}[2:]")] == ["000000252219.jpg"]
    assert [example.key for example in open_set(f"{coco}[:34%]")] == ["000000397133.jpg"]
    assert "the set has 3" in refusal(f"{coco}[3:]")


def test_the_home_folder_is_found_in_every_part_of_a_benchmark(coco, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        open_set("coco:~/captions_val2017.json,~/val2017")[0].image
        == tmp_path / "val2017/000000397133.jpg"
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([COCO], "is not a JSON object"),
        (changed(COCO, "images"), 'json has no "images", a list'),
        (changed(COCO, "annotations"), 'json has no "annotations", a list'),
        (changed(COCO, "images", 1, "id"), r'images\[1\] has no "id", a whole number or a text'),
        (changed(COCO, "images", 2, "file_name"), r'images\[2\] has no "file_name", a text'),
        (changed(COCO, "images", 0, to="000000397133.jpg"), r"images\[0\] is not a JSON object"),
        (
            changed(COCO, "images", 2, "id", to=37777),
            r"images\[2\] has the id 37777 of an image before it",
        ),
        (changed(COCO, "annotations", 3, "image_id"), r'annotations\[3\] has no "image_id"'),
        (
            changed(COCO, "annotations", 3, "image_id", to=5),
            r"annotations\[3\] has the image_id 5, expected the id of",
        ),
        (
            changed(COCO, "annotations", 0, "caption", to=["A person"]),
            r'annotations\[0\] has no "caption", a text',
        ),
        (
            changed(COCO, "images", to=[]) | {"annotations": []},
            "is empty, expected at least one example",
        ),
    ],
)
def test_what_is_not_of_cocos_format_is_named(tmp_path, content, expected):
    path = write(tmp_path / "captions.json", content)
    assert re.search(expected, refusal(f"coco:{path},{tmp_path}"))


def test_a_benchmarks_missing_or_damaged_files_are_named(coco, tmp_path):
    assert "absent.json cannot be read: No such file or directory" in refusal(
        f"coco:{tmp_path}/absent.json,{tmp_path}"
    )
    assert "nowhere is not a folder" in refusal(
        f"coco:{tmp_path}/captions_val2017.json,{tmp_path}/nowhere"
    )
    for content in (b'{"images": [', b"", b'{"images": "caf\xe9"}', b"[" * 100_000):
        (tmp_path / "bad.json").write_bytes(content)
        assert "bad.json is not JSON" in refusal(f"coco:{tmp_path}/bad.json,{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "field", "form"),
    [
        ("coco:a.json", "captions", "ANNOTATIONS.json,IMAGES"),
        ("coco:a.json,", "captions", "ANNOTATIONS.json,IMAGES"),
        ("coco:a.json,b,c", "captions", "ANNOTATIONS.json,IMAGES"),
        ("karpathy:a.json,images", "captions", "DATASET.json,IMAGES,SPLIT"),
        ("karpathy:a.json,images,", "captions", "DATASET.json,IMAGES,SPLIT"),
        ("vqav2:q.json,images", "qa", "QUESTIONS.json,ANNOTATIONS.json,IMAGES"),
        ("vqav2:,a.json,images", "qa", "QUESTIONS.json,ANNOTATIONS.json,IMAGES"),
        ("coco:", "captions", "coco:ANNOTATIONS.json,IMAGES"),
    ],
)
def test_a_benchmark_in_another_form_is_told_the_form(spec, field, form):
    assert f"is not {form}, with no comma in a path" in refusal(
        spec, field
    ) or f", {form}," in refusal(spec, field)


@pytest.mark.parametrize(
    ("spec", "field", "offered"),
    [
        ("coco:a.json,images", "qa", "captions"),
        ("karpathy:a.json,images,test", "name", "captions"),
        ("vqav2:q.json,a.json,images", "captions", "qa"),
    ],
)
def test_a_benchmark_opened_for_another_field_says_what_it_offers(spec, field, offered):
    assert f"offers the field {offered!r}, expected one that offers {field!r}" in refusal(
        spec, field
    )


# Karpathy's splits


def karpathy_image(filename: str, split: str, sentences: list[str], **more) -> dict:
    said = [
        {"tokens": text.lower().split(), "raw": text, "imgid": 0, "sentid": n}
        for n, text in enumerate(sentences)
    ]
    return {"imgid": 0, "sentences": said, "split": split, "filename": filename, **more}


KARPATHY_COCO = {
    "dataset": "coco",
    "images": [
        karpathy_image(
            "COCO_val2014_000000391895.jpg", "test", ["A man."], filepath="val2014", cocoid=391895
        ),
        karpathy_image(
            "COCO_val2014_000000060623.jpg",
            "restval",
            ["A girl."],
            filepath="val2014",
            cocoid=60623,
        ),
        karpathy_image(
            "COCO_train2014_000000000009.jpg", "train", ["A meal."], filepath="train2014", cocoid=9
        ),
        karpathy_image(
            "COCO_val2014_000000483108.jpg",
            "test",
            ["A bike.", "A train."],
            filepath="val2014",
            cocoid=1,
        ),
        karpathy_image("COCO_val2014_000000000042.jpg", "test", [], filepath="val2014", cocoid=42),
    ],
}


def test_karpathys_split_has_its_images_alone_in_their_order(tmp_path):
    path = write(tmp_path / "dataset_coco.json", KARPATHY_COCO)
    source = open_set(f"karpathy:{path},{tmp_path},test")
    assert len(source) == 3
    assert [source[i].captions for i in (0, 1)] == [["A man."], ["A bike.", "A train."]]
    assert source[1].key == "val2014/COCO_val2014_000000483108.jpg"
    assert source[1].image == tmp_path / "val2014/COCO_val2014_000000483108.jpg"
    with pytest.raises(BadExample, match="has no caption"):
        source[2]
    (restval,) = open_set(f"karpathy:{path},{tmp_path},restval")
    assert restval.captions == ["A girl."]
    assert source.notes() == ["split test of dataset_coco.json"]


def test_karpathys_flickr30k_has_its_pictures_in_one_folder(tmp_path):
    content = {
        "dataset": "flickr30k",
        "images": [karpathy_image("1007129816.jpg", "test", ["A man in a hat."])],
    }
    (example,) = open_set(
        f"karpathy:{write(tmp_path / 'dataset_flickr30k.json', content)},{tmp_path},test"
    )
    assert (example.key, example.image) == ("1007129816.jpg", tmp_path / "1007129816.jpg")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (changed(KARPATHY_COCO, "images"), 'has no "images", a list'),
        (changed(KARPATHY_COCO, "images", 2, "split"), r'images\[2\] has no "split", a text'),
        (changed(KARPATHY_COCO, "images", 0, "filename"), r'images\[0\] has no "filename", a text'),
        (
            changed(KARPATHY_COCO, "images", 0, "filepath", to=3),
            r'images\[0\] has no "filepath", a text',
        ),
        (
            changed(KARPATHY_COCO, "images", 0, "sentences"),
            r'images\[0\] has no "sentences", a list',
        ),
        (
            changed(KARPATHY_COCO, "images", 3, "sentences", 1, "raw"),
            r'images\[3\], sentences\[1\] has no "raw"',
        ),
        (
            changed(KARPATHY_COCO, "images", 4, to=KARPATHY_COCO["images"][0]),
            r"images\[4\] is val2014/COCO_val2014_000000391895.jpg, like an image before it",
        ),
        (
            changed(KARPATHY_COCO, "images", to=KARPATHY_COCO["images"][1:3]),
            "has no split 'test', expected one of restval, train",
        ),
    ],
)
def test_what_is_not_of_karpathys_format_is_named(tmp_path, content, expected):
    path = write(tmp_path / "dataset_coco.json", content)
    assert re.search(expected, refusal(f"karpathy:{path},{tmp_path},test"))


# VQA v2

QUESTIONS = {
    "info": {"description": "This is v2.0 of the VQA dataset.", "version": "2.0"},
    "task_type": "Open-Ended",
    "data_type": "mscoco",
    "license": {"name": "Creative Commons Attribution 4.0 International License"},
    "data_subtype": "val2014",
    "questions": [
        {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
        {"image_id": 42, "question": "How many shoes?", "question_id": 42001},
        {"image_id": 262148, "question": "Is he skating?", "question_id": 262148002},
    ],
}
SAID = {
    42001: ["2"] * 8 + ["two", ""],
    262148002: ["yes"] * 10,
    262148000: ["down"] * 5 + ["at table"] * 3 + ["skateboard", "his feet"],
}
ANNOTATIONS = {
    "info": {},
    "license": {},
    "data_subtype": "val2014",
    "data_type": "mscoco",
    "annotations": [
        {
            "question_type": kind,
            "multiple_choice_answer": SAID[question][0],
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": n + 1}
                for n, answer in enumerate(SAID[question])
            ],
            "image_id": question // 1000,
            "answer_type": answer_type,
            "question_id": question,
        }
        for question, kind, answer_type in (
            (42001, "how many", "number"),
            (262148002, "is he", "yes/no"),
            (262148000, "where is the", "other"),
        )
    ],
}


def vqav2(folder: pathlib.Path, questions=QUESTIONS, annotations=ANNOTATIONS) -> str:
    write(folder / "questions.json", questions)
    given = "" if annotations is None else write(folder / "annotations.json", annotations)
    return f"vqav2:{folder}/questions.json,{given},{folder}"


def test_vqav2_gives_each_image_with_its_questions_and_what_ten_people_said(tmp_path):
    source = open_set(vqav2(tmp_path), "qa")
    assert [example.key for example in source] == [
        "COCO_val2014_000000262148.jpg",
        "COCO_val2014_000000000042.jpg",
    ]
    assert (
        source[0].image == tmp_path / "COCO_val2014_000000262148.jpg" and source[0].captions == []
    )
    assert source[0].qa == [
        Question("Where is he looking?", SAID[262148000], "262148000", "other", "where is the"),
        Question("Is he skating?", SAID[262148002], "262148002", "yes/no", "is he"),
    ]
    assert source[1].qa == [Question("How many shoes?", SAID[42001], "42001", "number", "how many")]
    assert len(open_set(f"{vqav2(tmp_path)}[1:]", "qa")[0].qa) == 1


def test_one_who_said_nothing_is_counted_but_not_learnt_from(tmp_path):
    example = open_set(vqav2(tmp_path), "qa")[1]
    assert example.qa[0].answers[-1] == "" and len(example.qa[0].answers) == 10
    assert collections.Counter(example.pairs) == {
        ("How many shoes?", "2"): 8,
        ("How many shoes?", "two"): 1,
    }


def test_a_vqav2_test_set_has_questions_without_answers(tmp_path):
    for subset in ("test2015", "test-dev2015"):
        questions = QUESTIONS | {"data_subtype": subset}
        first, _ = open_set(vqav2(tmp_path, questions, annotations=None), "qa")
        assert first.key == "COCO_test2015_000000262148.jpg" and first.pairs == []
        assert first.qa[0] == Question("Where is he looking?", [], "262148000")


def test_vqav2_finds_pictures_by_their_names_of_2017(tmp_path):
    picture(tmp_path / "000000262148.jpg")
    source = open_set(vqav2(tmp_path), "qa")
    assert [example.key for example in source] == [
        "000000262148.jpg",
        "COCO_val2014_000000000042.jpg",
    ]
    picture(tmp_path / "COCO_val2014_000000262148.jpg")
    assert open_set(vqav2(tmp_path), "qa")[0].key == "COCO_val2014_000000262148.jpg"


ANNOTATED = ANNOTATIONS["annotations"]


@pytest.mark.parametrize(
    ("questions", "annotations", "expected"),
    [
        (changed(QUESTIONS, "questions"), ANNOTATIONS, 'questions.json has no "questions", a list'),
        (
            changed(QUESTIONS, "data_subtype"),
            ANNOTATIONS,
            'questions.json has no "data_subtype", a text',
        ),
        (
            changed(QUESTIONS, "questions", 1, "question"),
            ANNOTATIONS,
            r'questions\[1\] has no "question", a text',
        ),
        (
            changed(QUESTIONS, "questions", 1, "image_id"),
            ANNOTATIONS,
            r'\[1\] has no "image_id", a whole number',
        ),
        (
            changed(QUESTIONS, "questions", 1, "question_id"),
            ANNOTATIONS,
            r'questions\[1\] has no "question_id"',
        ),
        (
            changed(QUESTIONS, "questions", 2, "question_id", to=42001),
            ANNOTATIONS,
            r"questions\[2\] has the question_id 42001 of a question before it",
        ),
        (QUESTIONS, QUESTIONS, 'annotations.json has no "annotations", a list'),
        (
            QUESTIONS,
            changed(ANNOTATIONS, "annotations", 0, "question_id"),
            r'annotations\[0\] has no "question_id"',
        ),
        (
            QUESTIONS,
            changed(ANNOTATIONS, "annotations", 0, "image_id"),
            r'annotations\[0\] has no "image_id"',
        ),
        (
            QUESTIONS,
            changed(ANNOTATIONS, "annotations", 0, "answers"),
            r'annotations\[0\] has no "answers", a list',
        ),
        (
            QUESTIONS,
            changed(ANNOTATIONS, "annotations", 0, "answer_type"),
            r'\[0\] has no "answer_type", a text',
        ),
        (
            QUESTIONS,
            changed(ANNOTATIONS, "annotations", 0, "question_type"),
            r'\[0\] has no "question_type", a text',
        ),
        (
            QUESTIONS,
            changed(ANNOTATIONS, "annotations", 2, "answers", 9, "answer"),
            r'annotations\[2\] has one of the "answers" without "answer", a text',
        ),
        (
            QUESTIONS,
            changed(ANNOTATIONS, "annotations", 2, "answers", 9, "answer", to=2),
            r'annotations\[2\] has one of the "answers" without "answer", a text',
        ),
        (
            changed(QUESTIONS, "questions", 1),
            ANNOTATIONS,
            r"annotations\[0\] has the question_id 42001, expected one of the questions file",
        ),
        (
            QUESTIONS,
            changed(ANNOTATIONS, "annotations", to=[*ANNOTATED, ANNOTATED[0]]),
            r"annotations\[3\] has the question_id 42001 of one before it",
        ),
        (
            QUESTIONS,
            changed(ANNOTATIONS, "annotations", 0, "image_id", to=43),
            r"annotations\[0\] has the image_id 43, expected 42 as its question has",
        ),
        (
            QUESTIONS,
            changed(ANNOTATIONS, "annotations", 1),
            "annotations.json has no annotation of 1 of the questions, such as 262148002",
        ),
    ],
)
def test_what_is_not_of_vqav2s_format_is_named(tmp_path, questions, annotations, expected):
    assert re.search(expected, refusal(vqav2(tmp_path, questions, annotations), "qa"))


# JSON lines


def one_line(folder: pathlib.Path, line: dict, field: Field) -> Example:
    return open_set(f"jsonl:{write(folder / 'set.jsonl', line)}", field)[0]


def test_questions_are_named_by_their_id_or_their_place(tmp_path):
    asked = [
        {
            "question": "what is it?",
            "answers": ["a cat", ""],
            "answer_type": "other",
            "question_type": "what is",
        },
        {"question": "how many?", "answers": [], "question_id": 7},
        {"question": "why?", "question_id": "eight", "answers": None, "answer_type": None},
    ]
    example = one_line(
        tmp_path, {"file": "1.png", "qa": asked, "captions": None, "name": "a cat"}, "qa"
    )
    assert example.qa == [
        Question("what is it?", ["a cat", ""], "1.png#0", "other", "what is"),
        Question("how many?", [], "7"),
        Question("why?", [], "eight"),
    ]
    assert example.pairs == [("what is it?", "a cat")]
    assert example.captions == [] and example.name is None


def test_a_name_is_all_that_is_said_of_an_image(tmp_path):
    example = one_line(tmp_path, {"file": "1.png", "name": "a cat", "captions": ["no"]}, "name")
    assert (example.name, example.pairs, example.captions) == ("a cat", [("", "a cat")], [])


def asked(**question) -> dict:
    return {
        "file": "1.png",
        "qa": [{"question": "why?", "answers": ["so"]}, {"question": "how?", **question}],
    }


@pytest.mark.parametrize(
    ("field", "line", "cause", "expected"),
    [
        (
            "captions",
            {"file": "1.png", "captions": None},
            "no caption",
            'not annotated: its "captions" is null',
        ),
        (
            "captions",
            {"file": "1.png", "captions": [2]},
            "missing field",
            'no "captions", a list of texts',
        ),
        ("qa", {"file": "1.png"}, "missing field", 'no "qa"'),
        ("qa", {"file": "1.png", "qa": None}, "no question", 'not annotated: its "qa" is null'),
        ("qa", {"file": "1.png", "qa": []}, "no question", "has no question"),
        (
            "qa",
            {"file": "1.png", "qa": ["why?"]},
            "missing field",
            "a list of objects with a question and answers",
        ),
        ("qa", asked(answers={"so": 1}), "missing field", "answers {'so': 1}, expected a list"),
        ("qa", asked(answer=2), "missing field", "answers 2, expected a list of texts"),
        ("qa", asked(question="\0\u200b"), "missing field", "for a question, expected a text"),
        (
            "name",
            {"file": "1.png", "name": "\0\0"},
            "missing field",
            "for its name, expected a text",
        ),
        ("captions", {"file": "1.png", "captions": "\u200b"}, "no caption", "has no caption"),
        (
            "captions",
            {"file": "1.png", "captions": ["\0\0", "\ufeff "]},
            "no caption",
            "no caption",
        ),
        (
            "captions",
            {"file": "1.png", "sentences": ["x"], "url": 3},
            "missing field",
            """has no "captions", its fields are 'file', 'sentences', 'url'""",
        ),
        (
            "captions",
            {"picture": "1.png", "captions": ["x"]},
            "missing field",
            """has no "file", its fields are 'picture', 'captions'""",
        ),
        ("qa", asked(answers=[2]), "missing field", "2 for an answer, expected a text"),
        ("qa", asked(answers=2), "missing field", "answers 2, expected a list of texts"),
        (
            "qa",
            asked(question=" ", answers=["so"]),
            "missing field",
            "' ' for a question, expected a text",
        ),
        (
            "qa",
            asked(question=None, answers=["so"]),
            "missing field",
            "None for a question, expected a text",
        ),
        ("qa", asked(answers=["\ud800"]), "not UTF-8", "a text that is not UTF-8"),
        ("qa", asked(question_id=[1]), "missing field", r"question_id \[1\], expected a text"),
        ("qa", asked(question_id="1.png#0"), "duplicate id", "the question_id '1.png#0' twice"),
        ("qa", asked(answer_type=3), "missing field", "3 for answer_type, expected a text"),
        ("name", {"file": "1.png"}, "missing field", 'no "name"'),
        ("name", {"file": "1.png", "name": None}, "no name", 'not annotated: its "name" is null'),
        (
            "name",
            {"file": "1.png", "name": ""},
            "missing field",
            "'' for its name, expected a text",
        ),
        ("name", {"file": "1.png", "name": 7}, "missing field", "7 for its name, expected a text"),
        (
            "qa",
            {"video_id": "v", "frames": [{"file": "1.png"}], "qa": []},
            "no question",
            "no question",
        ),
        (
            "captions",
            {"video_id": "v", "frames": ["1.png"], "captions": ["x"]},
            "missing field",
            'no "frames", a list of objects with a file',
        ),
        (
            "captions",
            {"video_id": "v", "frames": [{"name": "1.png"}], "captions": ["x"]},
            "missing field",
            'no "file"',
        ),
        (
            "captions",
            {"frames": [{"file": "1.png"}], "captions": ["x"]},
            "missing field",
            "None for video_id, expected a text",
        ),
        (
            "captions",
            {"file": "1.mp4", "start": "2", "captions": ["x"]},
            "missing field",
            "'2' for start, expected seconds",
        ),
    ],
)
def test_a_line_without_the_field_says_what_is_wrong(tmp_path, field, line, cause, expected):
    with pytest.raises(BadExample, match=expected) as bad:
        one_line(tmp_path, line, field)
    assert bad.value.cause == cause
    assert "set.jsonl, line 1 " in str(bad.value) and "\n" not in str(bad.value)


@pytest.mark.parametrize("name", ["file", "image", "file_name", "filename", "image_path", "path"])
def test_the_names_that_sets_give_to_the_image_are_taken(tmp_path, name):
    example = one_line(tmp_path, {name: "a/1.png", "captions": ["x"]}, "captions")
    assert (example.image, example.key) == (tmp_path / "a/1.png", "a/1.png")


@pytest.mark.parametrize(
    ("field", "line", "expected"),
    [
        ("captions", {"captions": "x"}, [("", "x")]),
        ("captions", {"caption": "x"}, [("", "x")]),
        ("captions", {"caption": ["x", "y"]}, [("", "x"), ("", "y")]),
        ("captions", {"text": "x"}, [("", "x")]),
        ("captions", {"captions": ["x"], "caption": "y", "text": "z"}, [("", "x")]),
        ("captions", {"captions": ["\0", "x\u200by", "\u200b"]}, [("", "x\u200by")]),
        ("name", {"label": "cat"}, [("", "cat")]),
        ("name", {"class": "cat"}, [("", "cat")]),
        ("qa", {"qa": [{"question": "why?", "answer": "so"}]}, [("why?", "so")]),
        ("qa", {"qa": [{"question": "why?", "answers": "so"}]}, [("why?", "so")]),
        (
            "qa",
            {"qa": [{"question": "why?", "answers": [{"answer": "so", "answer_id": 1}]}]},
            [("why?", "so")],
        ),
        ("qa", {"question": "why?", "answer": "so", "question_id": 7}, [("why?", "so")]),
        ("qa", {"question": "why?", "answers": ["so", "\u200b"]}, [("why?", "so")]),
    ],
)
def test_the_names_that_sets_give_to_texts_are_taken(tmp_path, field, line, expected):
    assert one_line(tmp_path, {"file": "1.png", **line}, field).pairs == expected


def test_lines_of_one_question_each_about_one_image_have_ids_of_their_own(tmp_path):
    lines = [{"image": "1.png", "question": "why?", "answer": text} for text in ("so", "no")]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = open_set(f"jsonl:{tmp_path}", "qa")
    assert [example.qa[0].id for example in source] == ["1.png, line 1#0", "1.png, line 2#0"]


def test_a_line_that_the_disk_cannot_read_is_a_bad_example(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "set.jsonl", ["one", "two"])
    source = open_set(f"jsonl:{tmp_path}")
    read = os.pread

    def damaged(descriptor: int, length: int, start: int) -> bytes:
        if start == 0:
            raise OSError(errno.EIO, "Input/output error")
        return read(descriptor, length, start)

    monkeypatch.setattr(os, "pread", damaged)
    assert source[1].captions == ["two"]
    with pytest.raises(BadExample, match="set.jsonl, line 1 cannot be read: Input") as bad:
        source[0]
    assert bad.value.cause == "unreadable"


def test_files_of_macos_beside_a_jsonl_are_not_taken_for_one(tmp_path):
    write(tmp_path / "set.jsonl", {"file": "1.png", "captions": ["x"]})
    (tmp_path / "._set.jsonl").write_bytes(b"\0\5\x16\7")
    assert open_set(f"jsonl:{tmp_path}")[0].captions == ["x"]


def test_names_that_are_not_utf8_are_read_told_apart_and_saved(tmp_path):
    names = [os.fsdecode(b"caf\xe9.png"), os.fsdecode(b"caf\xe8.png"), "café.png"]
    for name in names:
        picture(tmp_path / name)
    lines = [
        {"file": name, "qa": [{"question": "why?", "question_id": f"{name}?"}]} for name in names
    ]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    spec = f"jsonl:{tmp_path}/set.jsonl"
    examples = list(open_set(spec, "qa"))
    assert [example.key for example in examples] == [
        "caf\\udce9.png",
        "caf\\udce8.png",
        "café.png",
    ]
    assert all(example.image.is_file() for example in examples)
    records = [
        {"id": question.id, "key": example.key} for example in examples for question in example.qa
    ]
    # A path on the command line comes as Python decodes it.
    made = Predictions("vqa", records, os.fsdecode(b"jsonl:\xe9.jsonl"), "runs/tiny")
    made.save(tmp_path / "made.predictions.jsonl")
    assert Predictions.load(tmp_path / "made.predictions.jsonl") == made


# Prepared sets


@pytest.fixture
def prepared(tmp_path):
    """Writes images with these features as a set and opens it; its files hold `nested`, if any."""
    import tensorflow_datasets as tfds

    pixels = picture(tmp_path / "nine.png").read_bytes()

    def prepare(features: dict, examples: list[dict], field: Field, nested: dict | None = None):
        class Set(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            name = "prepared"
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                every = tfds.features.FeaturesDict({"image": tfds.features.Image(), **features})
                return tfds.core.DatasetInfo(builder=self, features=every, disable_shuffling=True)

            def _split_generators(self, dl_manager):
                return {"val": enumerate({"image": pixels, **example} for example in examples)}

            def _generate_examples(self):
                raise NotImplementedError

        builder = Set(data_dir=str(tmp_path), file_format="array_record")
        builder.download_and_prepare()
        if nested:
            tfds.features.FeaturesDict({"image": tfds.features.Image(), **nested}).save_config(
                builder.data_dir
            )
        return open_set("tfds:prepared/val", field, tfds_dir=str(tmp_path))

    return prepare


def tfds_features():
    """The features for a text and for texts, and the module of the others."""
    from tensorflow_datasets import features

    return features.Text(), features.Sequence(features.Text()), features


def test_a_label_of_a_prepared_set_is_its_class(prepared):
    _, _, features = tfds_features()
    labels = {"label": features.ClassLabel(names=["cat", "dog"]), "image/filename": features.Text()}
    source = prepared(
        labels, [{"label": n, "image/filename": f"{n}.png"} for n in (1, 0, -1)], "name"
    )
    assert [(source[i].name, source[i].key) for i in (0, 1)] == [("dog", "1.png"), ("cat", "0.png")]
    with pytest.raises(BadExample, match="example 2 is not annotated") as bad:
        source[2]  # tensorflow-datasets' label where a test set keeps it back
    assert bad.value.cause == "no name"


def test_a_prepared_set_may_have_its_names_as_texts(prepared):
    text, _, _ = tfds_features()
    (example,) = prepared(
        {"name": text, "label": np.int64}, [{"name": "ein Kätzchen", "label": 5}], "name"
    )
    assert example.name == "ein Kätzchen" and example.pairs == [("", "ein Kätzchen")]


def test_clevrs_questions_are_read_from_a_prepared_set(prepared):
    text, _, features = tfds_features()
    asked = [
        {"question": "how many?", "answer": "2"},
        {"question": "what color?", "answer": "rot, süß"},
    ]
    source = prepared(
        {
            "file_name": text,
            "question_answer": features.Sequence({"question": text, "answer": text}),
        },
        [
            {"file_name": "a.png", "question_answer": asked},
            {"file_name": "b.png", "question_answer": []},
        ],
        "qa",
    )
    assert [(q.text, q.answers) for q in source[0].qa] == [
        ("how many?", ["2"]),
        ("what color?", ["rot, süß"]),
    ]
    assert [q.id for q in source[0].qa] == [
        "tfds:prepared/val, example 0#0",
        "tfds:prepared/val, example 0#1",
    ]
    with pytest.raises(BadExample, match="has no question"):
        source[1]


def test_a_prepared_set_may_have_one_question_an_example(prepared):
    text, texts, _ = tfds_features()
    asked = [
        {"question": "how many?", "answers": ["2", "two"]},
        {"question": "why?", "answers": []},
    ]
    rows = [
        {**question, "question_id": n, "image/filename": "a.png"}
        for n, question in enumerate(asked, start=7)
    ]
    types = {"question": text, "answers": texts, "question_id": np.int64, "image/filename": text}
    first, second = prepared(types, rows, "qa")
    assert first.qa == [Question("how many?", ["2", "two"], "7")] and first.key == "a.png"
    assert second.qa == [Question("why?", [], "8")]


def test_questions_about_one_image_in_several_examples_have_names_of_their_own(prepared):
    text, _, _ = tfds_features()
    rows = [{"question": f"why {n}?", "answer": "so", "image/filename": "a.png"} for n in range(2)]
    first, second = prepared({"question": text, "answer": text, "image/filename": text}, rows, "qa")
    assert first.key == second.key == "a.png" and first.qa[0].id != second.qa[0].id


def test_a_prepared_set_may_have_several_answers_to_each_of_several_questions(prepared):
    text, texts, features = tfds_features()
    # Sequences in sequences, as they are stored: without TensorFlow tensorflow-datasets reads but
    # does not write them.
    stored = {
        "qa/question": texts,
        "qa/question_id": features.Sequence(np.int64),
        "qa/answers/ragged_flat_values": texts,
        "qa/answers/ragged_row_lengths_0": features.Sequence(np.int64),
    }
    row = dict(
        zip(
            stored,
            [["how many?", "why?", "who?"], [5, 6, 7], ["2", "two", "he"], [2, 0, 1]],
            strict=True,
        )
    )
    nested = {
        "qa": features.Sequence({"question": text, "question_id": np.int64, "answers": texts})
    }
    (example,) = prepared(stored, [row], "qa", nested)
    assert [(q.text, q.answers) for q in example.qa] == [
        ("how many?", ["2", "two"]),
        ("why?", []),
        ("who?", ["he"]),
    ]
    assert [q.id for q in example.qa] == ["5", "6", "7"]


def test_a_prepared_set_without_the_field_is_told_what_was_looked_for(prepared, tmp_path):
    text, _, _ = tfds_features()
    prepared({"caption": text, "label": np.int64}, [{"caption": "a cat", "label": 1}], "captions")
    looked_for = {
        "name": "has the fields caption (Text), image (Image), label (Tensor), "
        "expected image and one of label, name (",
        "qa": "expected image and one of qa, qas, question_answer, question (Sequence or Text)",
    }
    for field, expected in looked_for.items():
        assert expected in refusal("tfds:prepared/val", field, tfds_dir=str(tmp_path))


def test_captions_of_tensorflow_datasets_own_coco(prepared):
    text, _, features = tfds_features()
    said = [{"id": 7, "text": "A cat."}, {"id": 3, "text": "Eine Katze, süß."}]
    (example,) = prepared(
        {
            "captions": features.Sequence({"id": np.int64, "text": text}),
            "image/filename": text,
            "image/id": np.int64,
        },
        [{"captions": said, "image/filename": "COCO_val2014_000000000042.jpg", "image/id": 42}],
        "captions",
    )
    assert (example.key, example.captions) == (
        "COCO_val2014_000000000042.jpg",
        ["A cat.", "Eine Katze, süß."],
    )


@pytest.fixture
def greys(prepared, tmp_path):
    """A prepared set of 20 captions, and its one shard."""
    _, texts, features = tfds_features()
    rows = [
        {"captions": [f"level {n}"], "image/filename": b"caf\xe9%d.png" % (n % 10)}
        for n in range(20)
    ]
    source = prepared(
        {"captions": texts, "image/filename": features.Text()}, rows, field="captions"
    )
    (shard,) = (tmp_path / "prepared/1.0.0").glob("*.array_record*")
    return source, shard


def test_a_damaged_record_is_a_bad_example_and_the_others_are_read(greys, tmp_path):
    _, shard = greys
    content = bytearray(shard.read_bytes())
    content[content.index(b"level 7")] ^= 1
    shard.write_bytes(content)
    source = open_set("tfds:prepared/val", tfds_dir=str(tmp_path))
    for index in range(20):
        if index == 7:
            with pytest.raises(BadExample, match="val, example 7 cannot be read: Corrupted") as bad:
                source[index]
            assert bad.value.cause == "corrupt record" and "\n" not in str(bad.value)
        else:
            assert source[index].captions == [f"level {index}"]
    assert list(sources.texts(source)) == [f"level {n}" for n in range(20) if n != 7]


def test_a_label_without_a_name_is_a_bad_example(prepared, tmp_path):
    _, _, features = tfds_features()
    labels = {"label": features.ClassLabel(names=["a", "b"])}
    prepared(labels, [{"label": n % 2} for n in range(4)], "name")
    (names,) = (tmp_path / "prepared/1.0.0").glob("*.labels.txt")
    names.write_text("a\n")
    source = open_set("tfds:prepared/val", field="name", tfds_dir=str(tmp_path))
    assert source[0].name == "a"
    with pytest.raises(BadExample, match="example 1 is not of the form of its set") as bad:
        source[1]
    assert bad.value.cause == "corrupt record"


def test_a_shard_that_is_not_whole_is_refused_at_the_start(greys, tmp_path):
    _, shard = greys
    whole = shard.read_bytes()
    for content in (
        b"",
        whole[:100],
        whole[: len(whole) // 2],
        whole[:-1],
        whole[:-5000],
        whole + bytes(9),
        bytes(len(whole)),
    ):
        shard.write_bytes(content)
        said = refusal("tfds:prepared/val", tfds_dir=str(tmp_path))
        assert shard.name in said and "missing, cut short or damaged" in said
    shard.unlink()
    assert "No such file" in refusal("tfds:prepared/val", tfds_dir=str(tmp_path))


def test_a_shard_of_fewer_records_than_its_set_is_refused(greys, tmp_path):
    _, shard = greys
    info = shard.with_name("dataset_info.json")
    info.write_text(info.read_text().replace('"20"', '"21"'))
    said = refusal("tfds:prepared/val", tfds_dir=str(tmp_path))
    assert "has 20 records, expected 21" in said


def test_a_prepared_set_without_its_description_is_refused_in_one_sentence(greys, tmp_path):
    _, shard = greys
    info = shard.with_name("dataset_info.json")
    for content in (b"", b"{", info.read_bytes()[:200]):
        info.write_bytes(content)
        assert "dataset_info.json" in refusal("tfds:prepared/val", tfds_dir=str(tmp_path))
    info.unlink()
    assert "dataset_info.json" in refusal("tfds:prepared/val", tfds_dir=str(tmp_path))


def test_names_of_a_prepared_set_that_are_not_utf8_are_spelled(greys):
    source, _ = greys
    assert source[3].key == "caf\\udce93.png"


def test_opening_a_large_set_gives_signs_of_life(greys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(jsonl, "_LINES", 10)
    write_jsonl(tmp_path / "set.jsonl", ["x"] * 35)
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", ["x"])
    for spec, expected in (
        (f"jsonl:{tmp_path}/set.jsonl", 3),
        (f"tar:{tmp_path}/*.tar", 3),
        ("tfds:prepared/val", 1),
    ):
        calls = []
        open_set(spec, tfds_dir=str(tmp_path), alive=lambda calls=calls: calls.append(0))
        assert len(calls) == expected


# Fingerprints


def write_tar(path: pathlib.Path, texts: list[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, text in enumerate(texts):
            for name, content in ((f"{number}.jpg", b"x"), (f"{number}.txt", text.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_jsonl(path: pathlib.Path, texts: list[str]) -> None:
    lines = [
        json.dumps({"file": f"{number}.jpg", "captions": [text]})
        for number, text in enumerate(texts)
    ]
    path.write_text("\n".join(lines))


def write_coco(path: pathlib.Path, texts: list[str]) -> None:
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in range(len(texts))]
    annotations = [{"image_id": n, "caption": text} for n, text in enumerate(texts)]
    write(path, {"images": images, "annotations": annotations})


@pytest.mark.parametrize(
    ("write_set", "spec"),
    [
        (write_tar, "tar:{path}"),
        (write_tar, "tar:{path}[1:]"),
        (write_jsonl, "jsonl:{path}"),
        (write_coco, "coco:{path},{folder}"),
    ],
)
def test_a_fingerprint_is_of_the_examples_and_not_of_their_place_or_age(
    tmp_path, monkeypatch, write_set, spec
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = []
    for folder, texts, age in (
        ("a", ["one", "two"], 1),
        ("b", ["one", "two"], 2),
        ("c", ["one", "owt"], 1),  # of the same length
        ("d", ["two", "one"], 1),
    ):
        path = tmp_path / folder / "set.tar"
        path.parent.mkdir()
        write_set(path, texts)
        os.utime(path, (age, age))
        source = open_set(spec.format(path=path, folder=path.parent))
        found.append(source.fingerprint())
    assert found[0] == found[1] and len({*found}) == 3


def test_the_fingerprint_of_a_prepared_set_is_that_of_its_shards(greys, tmp_path):
    source, shard = greys
    before = source.fingerprint()
    assert open_set("tfds:prepared/val", tfds_dir=str(tmp_path)).fingerprint() == before
    moved = shutil.copytree(tmp_path / "prepared", tmp_path / "moved/prepared")
    assert open_set(f"tfds:{moved}/1.0.0/val").fingerprint() == before


def test_a_prepared_set_that_changes_at_the_same_length_has_another_fingerprint(prepared, tmp_path):
    """Also where the change is before the last part of the shard, with the places of records."""
    _, texts, _ = tfds_features()
    rows = [{"captions": [f"level {n:3d} {'x' * 900}"]} for n in range(300)]
    found = prepared({"captions": texts}, rows, "captions").fingerprint()
    (shard,) = (tmp_path / "prepared/1.0.0").glob("*.array_record*")
    content = bytearray(shard.read_bytes())
    place = len(content) - 2**16 - 9
    content[place] ^= 1
    shard.write_bytes(content)
    changed = open_set("tfds:prepared/val", tfds_dir=str(tmp_path)).fingerprint()
    assert changed != found
    assert changed.split("+")[0] == found.split("+")[0]  # all that earlier versions looked at


def test_a_set_of_the_users_own_needs_no_fingerprint():
    class Own(Source):
        spec = "own"

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return Example(None, ["x"], "0")

    assert Own().fingerprint() is None


def test_a_run_does_not_go_on_with_other_examples_of_the_same_number(tmp_path, monkeypatch):
    path = tmp_path / "set.jsonl"
    config = DataConfig(batch_size=2, threads=1)

    def batches(state=None):
        source = open_set(f"jsonl:{path}")
        return TrainBatches(source, tiny_processor(), config, seed=0, images=False, state=state)

    write_jsonl(path, ["one", "two", "six", "ten"])
    begun = batches()
    next(begun)
    state = json.loads(json.dumps(begun.state()))
    begun.close()
    resumed = batches(state)
    assert resumed.state() == state
    resumed.close()

    write_jsonl(path, ["one", "two", "six", "net"])
    with pytest.raises(ValueError) as error:
        batches(state)
    assert "set.jsonl' has changed since the run began, though it still has 4 examples" in str(
        error.value
    )
    # A run of an older version has no fingerprint: it takes that of the set that it goes on with.
    older = batches({name: value for name, value in state.items() if name != "fingerprint"})
    assert older.state()["fingerprint"] not in (None, state["fingerprint"])
    older.close()
    # One of an earlier version may be the beginning of today's.
    monkeypatch.setattr(JsonlSource, "fingerprint", lambda _: "places+parts")
    for before, is_taken in (("places", True), ("places+parts", True), ("pla", False), ("", False)):
        with contextlib.nullcontext() if is_taken else pytest.raises(ValueError, match="changed"):
            taken = batches(state | {"fingerprint": before})
            assert taken.state()["fingerprint"] == "places+parts"
            taken.close()


# Real sets


def lines_of(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("name", ["easy_vqa", "daquar"])
def test_real_questions(shared, name):
    lines = lines_of(shared / "data" / name / "qa.jsonl")
    source = open_set(f"jsonl:{shared}/data/{name}", "qa")
    examples = list(source)
    expected = [(line["file"], q["question"], q["answers"]) for line in lines for q in line["qa"]]
    assert [(e.key, q.text, q.answers) for e in examples for q in e.qa] == expected
    assert len(examples) == len(lines) > 1_000
    assert len({q.id for e in examples for q in e.qa}) == len(expected)
    assert examples[-1].image.is_file()


def test_real_names(shared):
    source = open_set(f"jsonl:{shared}/data/cifar10", "name")
    lines = lines_of(shared / "data/cifar10/labels.jsonl")
    assert [(example.key, example.name) for example in source] == [
        (line["file"], line["name"]) for line in lines
    ]
    assert set(collections.Counter(example.name for example in source).values()) == {300}


def test_real_captions(shared):
    lines = lines_of(shared / "data/flickr8k/captions.jsonl")
    said = [caption for line in lines for caption in line["captions"]]
    assert list(sources.texts(open_set(f"jsonl:{shared}/data/flickr8k"))) == [
        text for text in said if text.strip()
    ]


def test_real_images_that_were_not_captioned_are_bad_and_the_others_are_not(shared):
    lines = lines_of(shared / "data/coco_mini/annotations.jsonl")
    source = open_set(f"jsonl:{shared}/data/coco_mini")
    causes, captions = [], 0
    for index in range(len(source)):
        try:
            captions += len(source[index].captions)
        except BadExample as bad:
            causes.append(bad.cause)
    assert causes == ["no caption"] * sum(line["captions"] is None for line in lines)
    assert captions == sum(len(line["captions"] or []) for line in lines)
    assert causes and captions


@pytest.mark.parametrize(
    ("name", "field"), [("flickr8k", "qa"), ("daquar", "name"), ("cifar10", "captions")]
)
def test_a_real_set_opened_for_another_field_has_no_usable_example(shared, name, field):
    source = open_set(f"jsonl:{shared}/data/{name}[:20]", field)
    for index in range(20):
        with pytest.raises(BadExample, match=f'has no "{field}"') as bad:
            source[index]
        assert bad.value.cause == "missing field"


def test_real_videos_are_not_taken_for_images(shared):
    example = open_set(f"jsonl:{shared}/data/msrvtt_frames")[0]
    assert example.key.startswith("video") and len(example.image.file) > 1
    with pytest.raises(BadImage, match="is a video, expected a picture"):
        tiny_processor().read(example.image)
