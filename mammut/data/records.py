"""Examples from the records of a set, with every value checked.

The values of a record have JSON's types. A record that cannot be used raises BadExample. `where`
names its place in messages, such as "set.jsonl, line 7".
"""

import errno
import itertools
import json
import pathlib
import reprlib
from typing import Any

from mammut.data.config import Field
from mammut.data.examples import BadExample, Example, Question, is_blank, spelled
from mammut.data.video import Clip

# The cause under which an example without the field is counted.
ABSENT: dict[Field, str] = {"captions": "no caption", "qa": "no question", "name": "no name"}

# The names that sets give to our fields. The first that a record has counts.
SPELLINGS: dict[str, tuple[str, ...]] = {
    "file": ("file", "image", "file_name", "filename", "image_path", "path"),
    "captions": ("captions", "caption", "texts", "text"),
    "qa": ("qa",),
    "name": ("name", "label", "class", "class_name"),
    "answers": ("answers", "answer"),
}
# The names of files that have no times.
_STILL = ".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".ppm"
_FIELDS_SHOWN = 8  # fields of a record, in messages


def require_readable(error: OSError, where: str) -> None:
    """Raises BadExample where the disk cannot read a part of a file: the others may be whole."""
    if error.errno == errno.EIO:
        raise BadExample(f"{where} cannot be read: {error.strerror}", "unreadable") from error


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """Parses a JSON object; raises BadExample where it is none."""
    text = decode_text(content, where)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadExample(f"{where} is not JSON", "not JSON") from error
    if not isinstance(record, dict):
        raise BadExample(f"{where} is not a JSON object", "not an object")
    return record


def decode_text(content: bytes, where: str) -> str:
    """Decodes UTF-8, with or without a byte order mark.

    Raises:
      BadExample: the bytes are not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadExample(f"{where} is not UTF-8", "not UTF-8") from error


def file_of(record: dict[str, Any], where: str) -> str:
    """Returns the file of the image that a record names.

    Raises:
      BadExample: it names none.
    """
    name = _spelling(record, "file")
    if name is not None and isinstance(record[name], str) and record[name]:
        return record[name]
    raise BadExample(f'{where} has no "file"{_fields(record)}', "missing field")


def image_of(record: dict[str, Any], folder: pathlib.Path, where: str) -> tuple[Any, str]:
    """Returns the image or video that a record names, and the key of the example.

    It is a "file"; a "file" with a "start" and an "end" in seconds, or one of them; or a "video_id"
    with its "frames", a list of objects with a "file".

    Args:
      record: the record.
      folder: the folder that files are relative to.
      where: the place of the record, for messages.

    Raises:
      BadExample: it names none.
    """
    if "frames" in record and _spelling(record, "file") is None:
        frames = record["frames"]
        if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
            raise BadExample(
                f'{where} has no "frames", a list of objects with a file', "missing field"
            )
        identity = record.get("video_id")
        if not isinstance(identity, int | str) or isinstance(identity, bool):
            raise BadExample(
                f"{where} has {reprlib.repr(identity)} for video_id, expected a text",
                "missing field",
            )
        files = tuple(folder / file_of(frame, where) for frame in frames)
        return Clip(files), str(identity)
    file = file_of(record, where)
    times = {name: record[name] for name in ("start", "end") if record.get(name) is not None}
    # Pictures may have such fields too, of another meaning.
    if not times or file.lower().endswith(_STILL):
        return folder / file, file
    for name, value in times.items():
        if type(value) not in (int, float):
            raise BadExample(
                f"{where} has {reprlib.repr(value)} for {name}, expected seconds", "missing field"
            )
    try:
        clip = Clip(folder / file, **times)
    except ValueError as error:  # infinite
        raise BadExample(f"{where}: {error}", "missing field") from error
    # W3C, "Media Fragments URI 1.0", section 4.2.1: many clips may be of one file.
    end = f",{times['end']}" if "end" in times else ""
    return clip, f"{file}#t={times.get('start', '')}{end}"


def value_of(record: dict[str, Any], field: Field, where: str) -> Any:
    """Returns the value of a field of a record.

    Raises:
      BadExample: the record has the field under no name of `SPELLINGS`.
    """
    name = _spelling(record, field)
    if name is not None:
        return record[name]
    # A record of one question has its parts itself.
    if field == "qa" and isinstance(record.get("question"), str):
        return [record]
    raise BadExample(f'{where} has no "{field}"{_fields(record)}', "missing field")


def _spelling(record: dict[str, Any], field: str) -> str | None:
    """Returns the name that a record has for a field; the first of `SPELLINGS` counts."""
    return next((name for name in SPELLINGS[field] if name in record), None)


def _fields(record: dict[str, Any]) -> str:
    names = ", ".join(reprlib.repr(name) for name in itertools.islice(record, _FIELDS_SHOWN))
    more = ", ..." if len(record) > _FIELDS_SHOWN else ""
    return f", its fields are {names}{more}" if record else ""


def make_example(
    image: Any, key: str, field: Field, value: Any, where: str, questions: str | None = None
) -> Example:
    """Makes an example of an image and the value of its field.

    The value is in the form that JSON lines have.

    Args:
      image: anything that `Example.image` may be.
      key: names the example; bytes that are not UTF-8 are spelled out.
      field: the field that has `value`.
      value: a list of captions or one caption, a list of questions, or a name.
      where: the place of the record, for messages.
      questions: the start of the ids of questions that have none; None: `key`.

    Raises:
      BadExample: the value cannot be used.
    """
    key = spelled(key)
    # null differs from a missing field: the set has the field, but this image has no annotation
    if value is None:
        raise BadExample(f'{where} is not annotated: its "{field}" is null', ABSENT[field])
    if field == "captions":
        return Example(image, _captions(value, where), key)
    if field == "name":
        return Example(image, [], key, name=_text(value, where, "its name"))
    return Example(image, [], key, _questions(value, where, spelled(questions or key)))


def _text(value: Any, where: str, what: str, blank: bool = False) -> str:
    """Checks a text of the set and returns it.

    `what` names the text in messages.
    """
    if not isinstance(value, str) or (is_blank(value) and not blank):
        raise BadExample(
            f"{where} has {reprlib.repr(value)} for {what}, expected a text", "missing field"
        )
    try:
        value.encode()
    # JSON can spell half a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise BadExample(f"{where} has a text that is not UTF-8", "not UTF-8") from error
    return value


def _captions(values: Any, where: str) -> list[str]:
    if isinstance(values, str):
        values = [values]
    if not isinstance(values, list) or not all(isinstance(caption, str) for caption in values):
        raise BadExample(f'{where} has no "captions", a list of texts', "missing field")
    captions = [_text(caption, where, "a caption") for caption in values if not is_blank(caption)]
    if not captions:
        raise BadExample(f"{where} has no caption", "no caption")
    return captions


def _questions(values: Any, where: str, prefix: str) -> list[Question]:
    if not isinstance(values, list) or not all(isinstance(question, dict) for question in values):
        raise BadExample(
            f'{where} has no "qa", a list of objects with a question and answers', "missing field"
        )
    questions = {}
    for number, value in enumerate(values):
        value = {name: item for name, item in value.items() if item is not None}
        answers = _answers(value)
        identity = value.get("question_id", f"{prefix}#{number}")
        if not isinstance(answers, list):
            raise BadExample(
                f"{where} has answers {reprlib.repr(answers)}, expected a list of texts",
                "missing field",
            )
        if not isinstance(identity, int | str):
            raise BadExample(
                f"{where} has question_id {reprlib.repr(identity)}, expected a text",
                "missing field",
            )
        identity = spelled(str(identity))
        if identity in questions:
            raise BadExample(f"{where} has the question_id {identity!r} twice", "duplicate id")

        question = _text(value.get("question"), where, "a question")
        # A blank answer stays: a person who gave no answer counts among the people asked.
        answers = [_text(answer, where, "an answer", blank=True) for answer in answers]
        types = {
            name: _text(value[name], where, name)
            for name in ("answer_type", "question_type")
            if name in value
        }
        questions[identity] = Question(question, answers, identity, **types)
    if not questions:
        raise BadExample(f"{where} has no question", "no question")
    return list(questions.values())


def _answers(question: dict[str, Any]) -> Any:
    """Returns the answers to a question in our form, a list of texts, as far as they have another.

    One answer is a list of one, and each answer of VQA v2 is an object.
    """
    name = _spelling(question, "answers")
    value = [] if name is None else question[name]
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        return value
    return [item.get("answer") if isinstance(item, dict) else item for item in value]
