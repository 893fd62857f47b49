"""The annotation files of video benchmarks, read as they are downloaded.

Each reader checks the whole file and returns a record for each video or clip. It raises ValueError
with the file and the line, or the field, where the file is missing, not of its format, or has an id
twice. Pickles are never read: they can run code.
"""

import dataclasses
import pathlib
from typing import Any

from mammut.data.annotation_files import (
    ID,
    get_field,
    objects_in,
    objects_of,
    read_json,
    read_text,
    require_once,
    rows_of,
)

_LISTS = (".csv", ".txt")  # ends of the names of files that list videos
_MAX_SECONDS = 1e9


@dataclasses.dataclass(frozen=True, slots=True)
class VideoRecord:
    """A video, or a clip of it, and what people said of it.

    Attributes:
      names: names that its file may have, without the extension.
      texts: captions; or questions, in the form that JSON lines have.
      start: where the clip begins, in seconds; None for a whole video.
      end: where it ends.
      number: the number of the clip in its video.
    """

    names: tuple[str, ...]
    texts: list[Any]
    start: float | None = None
    end: float | None = None
    number: int | None = None


def read_msrvtt(annotations: pathlib.Path | None, part: str) -> list[VideoRecord]:
    """Reads MSR-VTT: videos with about 20 captions each.

    The files are already cut: "start time" and "end time" are places in the film that they come
    from. The file of another layout that has "images" and "annotations", as COCO has them, is read
    with a list.

    Args:
      annotations: `train_val_videodatainfo.json`, `test_videodatainfo.json` or the two in one; None
        where `part` has the captions.
      part: splits of the file, such as "test" or "train+validate"; or the path of a list of videos.
        That is a text file of one id a line, or a CSV file with the column "video_id", and where it
        has a column "sentence" this is the caption: of `MSRVTT_JSFUSION_test.csv`, 1k-A, one each.
    """
    listed = None
    if part.endswith(_LISTS):
        listed = _listed(pathlib.Path(part))
    if listed is not None and all(sentence is not None for _, _, sentence in listed):
        return _with_sentences(listed)
    if annotations is None:
        raise ValueError(f"{part} has no column 'sentence', expected ANNOTATIONS.json beside it")

    content = read_json(annotations)
    of_videos, video_id, of_texts, about = ("videos", "video_id", "sentences", "video_id")
    if of_videos not in content and "images" in content:
        of_videos, video_id, of_texts, about = ("images", "id", "annotations", "image_id")
    captions: dict[str, list[str]] = {}
    split_of = {}
    for where, video in objects_in(content, of_videos, annotations):
        identity = get_field(video, video_id, str, where)
        require_once(identity, captions, where, video_id)
        captions[identity] = []
        if listed is None:
            split_of[identity] = get_field(video, "split", str, where)
    for where, sentence in objects_in(content, of_texts, annotations):
        identity = get_field(sentence, about, str, where)
        if identity not in captions:
            raise ValueError(
                f'{where} has the {about} {identity!r}, expected that of one of the "{of_videos}"'
            )
        captions[identity].append(get_field(sentence, "caption", str, where))

    if listed is None:
        wanted = part.split("+")
        if missing := set(wanted) - set(split_of.values()):
            raise ValueError(
                f"{annotations} has no split {min(missing)!r}, expected one of "
                f"{', '.join(sorted(set(split_of.values())))}, several joined by +, or the path of "
                "a list that ends in .csv or .txt"
            )
        chosen = [identity for identity, split in split_of.items() if split in wanted]
    else:
        chosen = _chosen(listed, captions, annotations)
    return [VideoRecord((identity,), captions[identity]) for identity in chosen]


def read_msvd(
    descriptions: pathlib.Path, videos: pathlib.Path, mapping: pathlib.Path | None
) -> list[VideoRecord]:
    """Reads MSVD: videos with about 41 captions each.

    Args:
      descriptions: `AllVideoDescriptions.txt`; a line has an id and a caption.
      videos: `train_list.txt`, `val_list.txt` or `test_list.txt`; a line has an id.
      mapping: `youtube_mapping.txt`; a line has an id and another name that its file may have, such
        as "vid1". None: files are named by the ids.
    """
    captions: dict[str, list[str]] = {}
    for _, identity, caption in _pairs(descriptions, "a video and a caption"):
        captions.setdefault(identity, []).append(caption)
    names = {}
    if mapping is not None:
        names = {identity: name for _, identity, name in _pairs(mapping, "two names of a video")}
    chosen = _chosen(_listed(videos), captions, descriptions)
    return [
        VideoRecord((identity, *filter(None, [names.get(identity)])), captions[identity])
        for identity in chosen
    ]


def read_video_qa(
    questions: pathlib.Path, prefix: str, mapping: pathlib.Path | None = None
) -> list[VideoRecord]:
    """Reads MSRVTT-QA or MSVD-QA: questions with one answer each, put together by video.

    Args:
      questions: `train_qa.json`, `val_qa.json` or `test_qa.json`.
      prefix: what stands before "video_id" in the name of a file: "video" or "vid".
      mapping: `youtube_mapping.txt` of MSVD, for files that are named by YouTube's ids; or None.
    """
    names = {}
    if mapping is not None:
        names = {name: identity for _, identity, name in _pairs(mapping, "two names of a video")}
    seen = set()
    by_video: dict[str, list[dict[str, Any]]] = {}
    for where, question in objects_of(questions):
        identity = get_field(question, "id", int, where)
        require_once(identity, seen, where, "id")
        seen.add(identity)
        video = f"{prefix}{get_field(question, 'video_id', int, where)}"
        by_video.setdefault(video, []).append(_question(question, where, identity))
    return [
        VideoRecord((video, *filter(None, [names.get(video)])), qa)
        for video, qa in by_video.items()
    ]


def read_activitynet(annotations: pathlib.Path, paragraphs: bool) -> list[VideoRecord]:
    """Reads ActivityNet Captions: clips with a sentence each, or whole videos with a paragraph.

    Args:
      annotations: `train.json`, `val_1.json` or `val_2.json`.
      paragraphs: True: all sentences of a video, joined by spaces, are its one caption, as for
        paragraph retrieval.
    """
    records = []
    for video, value in read_json(annotations).items():
        where = f"{annotations}, {video}"
        if not isinstance(value, dict):
            raise ValueError(f"{where} is not a JSON object")
        sentences = get_field(value, "sentences", list, where)
        if not all(isinstance(sentence, str) for sentence in sentences):
            raise ValueError(f'{where} has no "sentences", a list of texts')
        sentences = [sentence.strip() for sentence in sentences]
        spans = get_field(value, "timestamps", list, where)
        if len(spans) != len(sentences):
            raise ValueError(
                f"{where} has {len(spans)} timestamps, expected one for each of the "
                f"{len(sentences)} sentences"
            )
        for number, span in enumerate(spans):
            _require_span(span, f"{where}, timestamps[{number}]")
        if paragraphs:
            records.append(VideoRecord((video,), [" ".join(sentences)]))
            continue
        for number, (span, sentence) in enumerate(zip(spans, sentences, strict=True)):
            records.append(VideoRecord((video,), [sentence], *map(float, span), number))
    return records


def read_activitynet_qa(questions: pathlib.Path, answers: pathlib.Path) -> list[VideoRecord]:
    """Reads ActivityNet-QA: questions with one answer each, put together by video.

    Args:
      questions: `test_q.json`; a question has "question", "question_id" and "video_name".
      answers: `test_a.json`; an answer has "answer" and "question_id".
    """
    answer_of = {}
    for where, answer in objects_of(answers):
        identity = get_field(answer, "question_id", ID, where)
        require_once(identity, answer_of, where, "question_id")
        answer_of[identity] = get_field(answer, "answer", str, where)
    seen = set()
    by_video: dict[str, list[dict[str, Any]]] = {}
    for where, question in objects_of(questions):
        identity = get_field(question, "question_id", ID, where)
        require_once(identity, seen, where, "question_id")
        seen.add(identity)
        if identity not in answer_of:
            raise ValueError(f"{where} has the question_id {identity!r}, which {answers} lacks")
        video = f"v_{get_field(question, 'video_name', str, where)}"
        answered = question | {"answer": answer_of[identity]}
        by_video.setdefault(video, []).append(_question(answered, where, identity))
    return [VideoRecord((video,), qa) for video, qa in by_video.items()]


def read_vatex(annotations: pathlib.Path) -> list[VideoRecord]:
    """Reads the English captions of VATEX, 10 a clip.

    Args:
      annotations: a list of objects with "videoID", such as "ID_000010_000020", and "enCap".
    """
    captions: dict[str, list[str]] = {}
    for where, video in objects_of(annotations):
        identity = get_field(video, "videoID", str, where)
        require_once(identity, captions, where, "videoID")
        captions[identity] = get_field(video, "enCap", list, where)
        if not all(isinstance(caption, str) for caption in captions[identity]):
            raise ValueError(f'{where} has no "enCap", a list of texts')
    return [VideoRecord((identity,), texts) for identity, texts in captions.items()]


def read_tgif_qa(questions: pathlib.Path) -> list[VideoRecord]:
    """Reads the open-ended questions of TGIF-QA, put together by GIF.

    Args:
      questions: such as `Test_frameqa_question.csv`: cells separated by tabs, "gif_name",
        "question" and "answer" among their names. The files of transitions and repeated actions
        have choices instead.
    """
    by_gif: dict[str, list[dict[str, Any]]] = {}
    for where, row in rows_of(questions, ("gif_name", "question", "answer"), delimiter="\t"):
        if "a1" in row:
            raise ValueError(f"{questions} has choices a1 ... a5, expected open-ended questions")
        by_gif.setdefault(row["gif_name"], []).append(_question(row, where))
    return [VideoRecord((gif,), qa) for gif, qa in by_gif.items()]


def _question(value: dict[str, Any], where: str, identity: int | str | None = None) -> dict:
    question = {
        "question": get_field(value, "question", str, where),
        "answers": [get_field(value, "answer", str, where)],
    }
    if identity is not None:
        question["question_id"] = identity
    return question


def _require_span(span: Any, where: str) -> None:
    """Checks that `span` is two numbers of seconds.

    Their order is a matter of the video's reader, which counts what it cannot use.
    """
    numbers = isinstance(span, list) and len(span) == 2
    for value in span if numbers else ():
        # Every comparison with NaN is False.
        number = isinstance(value, int | float) and not isinstance(value, bool)
        numbers = numbers and number and 0 <= value < _MAX_SECONDS
    if not numbers:
        raise ValueError(f"{where} is not two numbers of seconds")


# Lists of videos: the place, the id and the caption, if there is one, of each.
_Listed = list[tuple[str, str, str | None]]


def _listed(path: pathlib.Path) -> _Listed:
    path = path.expanduser()
    if path.suffix == ".csv":
        rows = rows_of(path, ("video_id",))
        return [(where, row["video_id"], row.get("sentence")) for where, row in rows]
    return [(where, line, None) for where, line in _lines(path)]


def _with_sentences(listed: _Listed) -> list[VideoRecord]:
    captions: dict[str, list[str]] = {}
    for _, identity, sentence in listed:
        captions.setdefault(identity, []).append(sentence)
    return [VideoRecord((identity,), texts) for identity, texts in captions.items()]


def _chosen(
    listed: _Listed, captions: dict[str, list[str]], annotations: pathlib.Path
) -> list[str]:
    """Returns the ids of a list, each of which has captions."""
    chosen: dict[str, None] = {}
    for where, identity, _ in listed:
        require_once(identity, chosen, where, "video")
        if identity not in captions:
            raise ValueError(f"{where} is {identity!r}, a video that {annotations} lacks")
        chosen[identity] = None
    return list(chosen)


def _lines(path: pathlib.Path) -> list[tuple[str, str]]:
    """Returns the lines of a text that are not empty, each with its place."""
    lines = enumerate(map(str.strip, read_text(path).split("\n")), 1)
    return [(f"{path}, line {number}", line) for number, line in lines if line]


def _pairs(path: pathlib.Path, what: str) -> list[tuple[str, str, str]]:
    """Returns the first word of each line and the text after it; comments are left out."""
    pairs = []
    for where, line in _lines(path):
        if line.startswith("#"):
            continue
        words = line.split(maxsplit=1)
        if len(words) < 2:
            raise ValueError(f"{where} has one word, expected {what}")
        pairs.append((where, *words))
    return pairs
