"""Benchmarks of videos, read from files as they are downloaded."""

import json
import logging
import pathlib
import re

import pytest

from mammut.data import sources
from mammut.data.examples import BadExample, Source
from mammut.data.video import Clip


def open_set(spec: str, field: str = "captions") -> Source:
    return sources.open_source(spec, image_size=16, field=field)


def refusal(spec: str, field: str = "captions") -> str:
    with pytest.raises(ValueError) as error:
        open_set(spec, field)
    assert repr(spec) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def write(path: pathlib.Path, content) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


@pytest.fixture
def videos(tmp_path):
    """Makes a folder of empty files; no test here decodes one."""

    def make(*names: str) -> pathlib.Path:
        for name in names:
            write(tmp_path / "videos" / name, "")
        return tmp_path / "videos"

    return make


def examples(source: Source) -> list[tuple[str, list[str]]]:
    return [(example.key, example.captions) for example in source]


# MSR-VTT


def msrvtt_video(number: int, split: str) -> dict:
    return {
        "category": 9,
        "url": "https://www.youtube.com/watch?v=9lZi22qLlEo",
        "video_id": f"video{number}",
        "start time": 137.72,
        "end time": 149.44,
        "split": split,
        "id": number,
    }


def msrvtt_sentence(number: int, video: int, caption: str) -> dict:
    return {"caption": caption, "video_id": f"video{video}", "sen_id": number}


MSRVTT = {
    "info": {"contributor": "Microsoft multimedia group"},
    "videos": [
        msrvtt_video(7, "test"),
        msrvtt_video(0, "train"),
        msrvtt_video(6, "validate"),
        msrvtt_video(9, "test"),
    ],
    "sentences": [
        msrvtt_sentence(3, 9, "a man cooks"),
        msrvtt_sentence(1, 7, "a car is shown"),
        msrvtt_sentence(2, 7, "someone drives"),
        msrvtt_sentence(0, 0, "a cartoon"),
        msrvtt_sentence(5, 6, "a dog"),
    ],
}
JSFUSION = """key,vid_key,video_id,sentence
ret0,msr9,video9,a man cooks
ret1,msr7,video7,"a car, red and
fast"
"""


@pytest.fixture
def msrvtt(tmp_path, videos) -> str:
    write(tmp_path / "MSRVTT_data.json", MSRVTT)
    write(tmp_path / "MSRVTT_JSFUSION_test.csv", JSFUSION)
    return f"{tmp_path}/MSRVTT_data.json,{videos('video0.mp4', 'video6.webm', 'video7.mp4')}"


def test_a_split_of_msrvtt_has_its_videos_with_all_captions(msrvtt, videos):
    videos("video9.mp4")
    source = open_set(f"msrvtt:{msrvtt},test")
    assert examples(source) == [
        ("video7.mp4", ["a car is shown", "someone drives"]),
        ("video9.mp4", ["a man cooks"]),
    ]
    # The files are cut already: the times are those of the film.
    assert source[0].image == Clip(videos() / "video7.mp4", None, None)
    assert source.notes() == ["split test of MSRVTT_data.json: 2 of 2 videos found"]
    both = open_set(f"msrvtt:{msrvtt},train+validate")
    assert [example.key for example in both] == ["video0.mp4", "video6.webm"]
    assert list(sources.texts(both)) == ["a cartoon", "a dog"]


def test_missing_videos_are_left_out_and_counted_once(msrvtt, videos, caplog):
    with caplog.at_level(logging.WARNING):
        source = open_set(f"msrvtt:{msrvtt},test")
        assert examples(source) == [("video7.mp4", ["a car is shown", "someone drives"])]
        list(source)
    (said,) = caplog.records
    assert "1 of 2 videos found in" in said.getMessage() and "videos" in said.getMessage()
    assert source.notes() == ["split test of MSRVTT_data.json: 1 of 2 videos found"]
    before = source.fingerprint()
    videos("video9.mp4")
    caplog.clear()
    assert open_set(f"msrvtt:{msrvtt},test").fingerprint() != before
    assert not caplog.records


def test_a_folder_without_any_of_the_videos_is_refused(tmp_path, msrvtt):
    empty = write(tmp_path / "empty/captions.txt", "").parent
    spec = f"msrvtt:{tmp_path}/MSRVTT_data.json,{empty},test"
    assert "has none of 2 videos, expected files such as video7.mp4" in refusal(spec)


def test_1k_a_has_one_sentence_a_video_in_the_order_of_its_list(tmp_path, msrvtt, videos):
    folder = videos("video9.mp4")
    expected = [("video9.mp4", ["a man cooks"]), ("video7.mp4", ["a car, red and\nfast"])]
    for annotations in (f"{tmp_path}/MSRVTT_data.json", ""):
        source = open_set(f"msrvtt:{annotations},{folder},{tmp_path}/MSRVTT_JSFUSION_test.csv")
        assert examples(source) == expected
    assert source.notes() == ["MSRVTT_JSFUSION_test.csv: 2 of 2 videos found"]


def test_a_list_of_ids_has_all_captions(tmp_path, msrvtt):
    for name, content in (
        ("MSRVTT_train.9k.csv", "video_id\nvideo6\nvideo7\n"),
        ("train_list_jsfusion.txt", "video6\n\nvideo7\n"),
    ):
        write(tmp_path / name, content)
        assert examples(open_set(f"msrvtt:{msrvtt},{tmp_path}/{name}")) == [
            ("video6.webm", ["a dog"]),
            ("video7.mp4", ["a car is shown", "someone drives"]),
        ]


def test_msrvtt_in_cocos_form_is_read_with_a_list(tmp_path, msrvtt):
    content = {
        "images": [{"id": video["video_id"]} for video in MSRVTT["videos"]],
        "annotations": [
            {"image_id": s["video_id"], "caption": s["caption"], "id": s["sen_id"]}
            for s in MSRVTT["sentences"]
        ],
    }
    file = write(tmp_path / "MSR_VTT.json", content)
    folder = msrvtt.partition(",")[2]
    listed = write(tmp_path / "val_list.txt", "video7\n")
    source = open_set(f"msrvtt:{file},{folder},{listed}")
    assert examples(source) == [("video7.mp4", ["a car is shown", "someone drives"])]
    assert 'images[0] has no "split", a text' in refusal(f"msrvtt:{file},{folder},test")


def test_a_file_counts_before_a_folder_of_frames_and_a_folder_where_there_is_no_file(
    msrvtt, videos
):
    folder = videos("video7/0001.jpg", "video9/0001.jpg", "video7.txt", "video7.AVI")
    keys = [example.key for example in open_set(f"msrvtt:{msrvtt},test")]
    assert keys == ["video7.AVI", "video9"]
    assert (folder / keys[1]).is_dir()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([], "is not a JSON object"),
        ("{", "is not JSON"),
        (MSRVTT | {"videos": {}}, 'has no "videos", a list'),
        (MSRVTT | {"videos": [7]}, r"videos\[0\] is not a JSON object"),
        (MSRVTT | {"videos": [{"video_id": 7}]}, r'videos\[0\] has no "video_id", a text'),
        (MSRVTT | {"videos": [{"video_id": "a"}]}, r'videos\[0\] has no "split", a text'),
        (
            MSRVTT | {"videos": MSRVTT["videos"][:1] * 2},
            r"videos\[1\] has the video_id 'video7' of one before it",
        ),
        (MSRVTT | {"sentences": None}, 'has no "sentences", a list'),
        (
            MSRVTT | {"sentences": [msrvtt_sentence(0, 5, "a")]},
            r"sentences\[0\] has the video_id 'video5', expected that of one of the \"videos\"",
        ),
        (
            MSRVTT | {"sentences": [{"video_id": "video7", "caption": ["a"]}]},
            r'sentences\[0\] has no "caption", a text',
        ),
        (
            MSRVTT | {"videos": MSRVTT["videos"][1:3], "sentences": []},
            "has no split 'test', expected one of train, validate, several joined by +",
        ),
    ],
)
def test_what_is_not_of_msrvtts_format_is_named(tmp_path, videos, content, expected):
    file = write(tmp_path / "MSRVTT_data.json", content)
    said = refusal(f"msrvtt:{file},{videos('video7.mp4')},test")
    assert str(file) in said and re.search(expected.replace("+", r"\+"), said)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("key,video\n1,2\n", "line 1 has no column 'video_id'"),
        ("", "line 1 has no column 'video_id'"),
        ("video_id,sentence\nvideo7,a\nvideo9\n", "line 3 has 1 cells, expected 2"),
        ("video_id\nvideo7\nvideo8\n", "line 3 is 'video8', a video that"),
        ("video_id\nvideo7\n\nvideo7\n", "line 4 has the video 'video7' of one before it"),
    ],
)
def test_a_list_of_another_form_is_named(tmp_path, msrvtt, content, expected):
    path = write(tmp_path / "list.csv", content)
    assert f"list.csv, {expected}" in refusal(f"msrvtt:{msrvtt},{path}")


def test_a_list_without_captions_needs_the_annotations(tmp_path, videos):
    path = write(tmp_path / "MSRVTT_train.9k.csv", "video_id\nvideo7\n")
    said = refusal(f"msrvtt:,{videos('video7.mp4')},{path}")
    assert "has no column 'sentence', expected ANNOTATIONS.json beside it" in said
    assert "cannot be read: No such file" in refusal(f"msrvtt:,{videos()},{tmp_path}/no.csv")


# MSVD

DESCRIPTIONS = """# the videos of MSVD
-4wsuPCjDBc_5_15 a squirrel is eating a peanut in it's shell
-4wsuPCjDBc_5_15 a chipmunk is eating
mv89psg6zh4_33_46 a bird is bathing in a sink
-7KMZQEsJW4_205_208 a man cuts paper
"""


@pytest.fixture
def msvd(tmp_path) -> pathlib.Path:
    write(tmp_path / "youtube_mapping.txt", "-4wsuPCjDBc_5_15 vid1\nmv89psg6zh4_33_46 vid2\n")
    write(tmp_path / "test_list.txt", "mv89psg6zh4_33_46\n-4wsuPCjDBc_5_15\n")
    return write(tmp_path / "AllVideoDescriptions.txt", DESCRIPTIONS)


@pytest.mark.parametrize(
    ("names", "mapping"),
    [
        (("-4wsuPCjDBc_5_15.avi", "mv89psg6zh4_33_46.avi"), ""),
        (("vid1.avi", "vid2.avi"), ",youtube_mapping.txt"),
    ],
)
def test_msvd_has_the_videos_of_a_list_with_all_captions(tmp_path, msvd, videos, names, mapping):
    mapping = mapping.replace(",", f",{tmp_path}/")
    source = open_set(f"msvd:{msvd},{videos(*names)},{tmp_path}/test_list.txt{mapping}")
    assert examples(source) == [
        (names[1], ["a bird is bathing in a sink"]),
        (names[0], ["a squirrel is eating a peanut in it's shell", "a chipmunk is eating"]),
    ]
    assert source.notes() == ["test_list.txt: 2 of 2 videos found"]


def test_what_is_not_of_msvds_format_is_named(tmp_path, msvd, videos):
    folder = videos("vid1.avi")
    listed = write(tmp_path / "list.txt", "vid1\n")
    said = refusal(f"msvd:{msvd},{folder},{listed}")
    assert "list.txt, line 1 is 'vid1', a video that" in said
    write(msvd, DESCRIPTIONS + "\nalone\n")
    said = refusal(f"msvd:{msvd},{folder},{tmp_path}/test_list.txt")
    assert "AllVideoDescriptions.txt, line 7 has one word, expected a video and a caption" in said
    msvd.write_bytes(b"a caption\nb caf\xe9\n")
    assert "AllVideoDescriptions.txt, line 2 is not UTF-8" in refusal(
        f"msvd:{msvd},{folder},{tmp_path}/test_list.txt"
    )


# Questions

MSRVTT_QA = [
    {"answer": "couch", "category_id": 14, "id": 158581, "question": "what?", "video_id": 6513},
    {"answer": "peson", "category_id": 14, "id": 158582, "question": "who?", "video_id": 6514},
    {"answer": "two", "category_id": 14, "id": 158583, "question": "how many?", "video_id": 6513},
]


def asked(source: Source) -> list[tuple]:
    return [(e.key, [(q.id, q.text, q.answers) for q in e.qa]) for e in source]


def test_msrvtt_qa_has_every_question_under_its_id(tmp_path, videos):
    path = write(tmp_path / "test_qa.json", MSRVTT_QA)
    source = open_set(f"msrvtt-qa:{path},{videos('video6513.mp4', 'video6514.mp4')}", "qa")
    assert asked(source) == [
        ("video6513.mp4", [("158581", "what?", ["couch"]), ("158583", "how many?", ["two"])]),
        ("video6514.mp4", [("158582", "who?", ["peson"])]),
    ]
    (videos() / "video6514.mp4").unlink()
    source = open_set(f"msrvtt-qa:{path},{videos()}", "qa")
    assert source.notes() == ["test_qa.json: 1 of 2 videos found, with 2 of 3 questions"]


def test_msvd_qa_finds_its_videos_under_either_name(tmp_path, videos):
    content = [{"answer": "man", "id": 30933, "question": "who?", "video_id": 1201}]
    path = write(tmp_path / "val_qa.json", content)
    mapping = write(tmp_path / "youtube_mapping.txt", "-4wsuPCjDBc_5_15 vid1201\n")
    folder = videos("vid1201.avi")
    assert [key for key, _ in asked(open_set(f"msvd-qa:{path},{folder}", "qa"))] == ["vid1201.avi"]
    (folder / "vid1201.avi").rename(folder / "-4wsuPCjDBc_5_15.avi")
    source = open_set(f"msvd-qa:{path},{folder},{mapping}", "qa")
    assert asked(source) == [("-4wsuPCjDBc_5_15.avi", [("30933", "who?", ["man"])])]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"questions": []}, "is not a JSON list"),
        ([7], "item 0 is not a JSON object"),
        ([MSRVTT_QA[0], MSRVTT_QA[0]], "item 1 has the id 158581 of one before it"),
        ([MSRVTT_QA[0] | {"id": "x"}], 'item 0 has no "id", a whole number'),
        ([MSRVTT_QA[0] | {"video_id": "x"}], 'item 0 has no "video_id", a whole number'),
        ([MSRVTT_QA[0] | {"question": None}], 'item 0 has no "question", a text'),
        ([MSRVTT_QA[0] | {"answer": ["a"]}], 'item 0 has no "answer", a text'),
    ],
)
def test_questions_of_another_format_are_named(tmp_path, videos, content, expected):
    path = write(tmp_path / "test_qa.json", content)
    said = refusal(f"msrvtt-qa:{path},{videos('video6513.mp4')}", "qa")
    assert str(path) in said and expected in said


def test_activitynet_qa_joins_questions_and_answers(tmp_path, videos):
    questions = [
        {"question": "is it indoors", "question_id": "1QIUV7WYKXg_3", "video_name": "1QIUV7WYKXg"}
    ]
    answers = [{"answer": "yes", "question_id": "1QIUV7WYKXg_3", "type": 3}]
    q = write(tmp_path / "test_q.json", questions)
    a = write(tmp_path / "test_a.json", answers)
    folder = videos("v_1QIUV7WYKXg.mkv")
    source = open_set(f"activitynet-qa:{q},{a},{folder}", "qa")
    assert asked(source) == [("v_1QIUV7WYKXg.mkv", [("1QIUV7WYKXg_3", "is it indoors", ["yes"])])]
    write(a, [])
    said = refusal(f"activitynet-qa:{q},{a},{folder}", "qa")
    assert "item 0 has the question_id '1QIUV7WYKXg_3', which" in said
    write(q, questions * 2)
    write(a, answers)
    assert "item 1 has the question_id" in refusal(f"activitynet-qa:{q},{a},{folder}", "qa")


def test_tgif_qa_has_its_open_ended_questions(tmp_path, videos):
    rows = "gif_name\tquestion\tanswer\tvid_id\tkey\ntumblr_a1\twhat is red ?\tball\tID1\t7\n"
    rows += "tumblr_a1\thow many ?\ttwo\tID1\t8\n"
    path = write(tmp_path / "Test_frameqa_question.csv", rows)
    folder = videos("tumblr_a1.gif")
    ((key, questions),) = asked(open_set(f"tgif-qa:{path},{folder}", "qa"))
    assert key == "tumblr_a1.gif"
    assert [question[1:] for question in questions] == [
        ("what is red ?", ["ball"]),
        ("how many ?", ["two"]),
    ]
    choices = "gif_name\tquestion\ta1\ta2\tanswer\nx\twhat ?\ta\tb\t0\n"
    write(path, choices)
    assert "has choices a1 ... a5" in refusal(f"tgif-qa:{path},{folder}", "qa")


# Captions of clips

ACTIVITYNET = {
    "v_QOlSCBRmfWY": {
        "duration": 82.73,
        "timestamps": [[0.83, 19.86], [17.37, 12]],
        "sentences": ["A young woman is seen.", " The girl dances around. "],
    },
    "v_ehGHCYKzyZ8": {"duration": 61.7, "timestamps": [[0, 61.7]], "sentences": ["A man sits."]},
}


def test_activitynet_has_a_sentence_for_each_clip(tmp_path, videos):
    path = write(tmp_path / "val_1.json", ACTIVITYNET)
    folder = videos("v_QOlSCBRmfWY.mp4", "v_ehGHCYKzyZ8.mkv")
    source = open_set(f"activitynet:{path},{folder},clips")
    assert [(e.key, e.image, e.captions) for e in source] == [
        (
            "v_QOlSCBRmfWY.mp4#0",
            Clip(folder / "v_QOlSCBRmfWY.mp4", 0.83, 19.86),
            ["A young woman is seen."],
        ),
        # Its end lies before its start: the reader refuses and counts it.
        (
            "v_QOlSCBRmfWY.mp4#1",
            Clip(folder / "v_QOlSCBRmfWY.mp4", 17.37, 12.0),
            ["The girl dances around."],
        ),
        ("v_ehGHCYKzyZ8.mkv#0", Clip(folder / "v_ehGHCYKzyZ8.mkv", 0.0, 61.7), ["A man sits."]),
    ]
    assert source.notes() == ["val_1.json, clips: 2 of 2 videos found"]


def test_paragraphs_are_all_sentences_of_a_whole_video(tmp_path, videos):
    path = write(tmp_path / "val_1.json", ACTIVITYNET)
    folder = videos("v_QOlSCBRmfWY.mp4", "v_ehGHCYKzyZ8.mkv")
    source = open_set(f"activitynet:{path},{folder},paragraphs")
    assert examples(source) == [
        ("v_QOlSCBRmfWY.mp4", ["A young woman is seen. The girl dances around."]),
        ("v_ehGHCYKzyZ8.mkv", ["A man sits."]),
    ]
    assert source[0].image == Clip(folder / "v_QOlSCBRmfWY.mp4", None, None)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7, "v_a is not a JSON object"),
        ({"timestamps": []}, 'v_a has no "sentences", a list'),
        ({"timestamps": [], "sentences": [7]}, 'v_a has no "sentences", a list of texts'),
        ({"sentences": ["a"]}, 'v_a has no "timestamps", a list'),
        ({"timestamps": [[0, 1]], "sentences": []}, "v_a has 1 timestamps, expected one for each"),
        *(
            ({"timestamps": [span], "sentences": ["a"]}, "timestamps[0] is not two numbers")
            for span in (7, [0], [0, "1"], [0, None], [True, 1], [-1, 1], [0, 10**400])
        ),
    ],
)
def test_what_is_not_of_activitynets_format_is_named(tmp_path, videos, value, expected):
    path = write(tmp_path / "val_1.json", {"v_a": value})
    for part in ("clips", "paragraphs"):
        assert expected in refusal(f"activitynet:{path},{videos('v_a.mp4')},{part}")


def test_vatex_has_ten_english_captions(tmp_path, videos):
    english = [f"caption {number}" for number in range(10)]
    content = [{"videoID": "ID_000010_000020", "enCap": english, "chCap": ["你好"] * 10}]
    path = write(tmp_path / "vatex_validation_v1.0.json", content)
    folder = videos("ID_000010_000020.mp4")
    assert examples(open_set(f"vatex:{path},{folder}")) == [("ID_000010_000020.mp4", english)]
    for change, expected in (
        ({"enCap": None}, 'item 0 has no "enCap", a list'),
        ({"enCap": [1]}, 'item 0 has no "enCap", a list of texts'),
        ({"videoID": 1}, 'item 0 has no "videoID", a text'),
    ):
        write(path, [content[0] | change])
        assert expected in refusal(f"vatex:{path},{folder}")
    write(path, content * 2)
    assert "item 1 has the videoID" in refusal(f"vatex:{path},{folder}")


# WebVid

WEBVID = """videoid,contentUrl,duration,page_dir,name
21179416,https://ak.picdn.net/21179416.mp4,PT00H00M11S,006001_006050,Aerial shot of a forest
5629184,https://ak.picdn.net/5629184.mp4,PT00H00M29S,071501_071550,"Senior couple, ""happy""
at home"

1063125190,https://ak.picdn.net/1063125190.mp4,PT00H00M15S,006001_006050,A train - june
"""


def test_webvid_has_the_rows_whose_video_is_there(tmp_path, videos, caplog):
    path = write(tmp_path / "results_2M_val.csv", WEBVID)
    folder = videos("071501_071550/5629184.mp4", "006001_006050/1063125190.mp4")
    source = open_set(f"webvid:{path},{folder}")
    assert examples(source) == [
        ("071501_071550/5629184.mp4", ['Senior couple, "happy"\nat home']),
        ("006001_006050/1063125190.mp4", ["A train - june"]),
    ]
    assert source[1].image == Clip(folder / "006001_006050/1063125190.mp4")
    assert source.notes() == ["results_2M_val.csv: 2 of 3 videos found"]
    assert len(caplog.records) == 1 and "2 of 3 videos found" in caplog.text
    before = source.fingerprint()
    videos("006001_006050/21179416.mp4")
    source = open_set(f"webvid:{path},{folder}[:1]")
    assert examples(source) == [("006001_006050/21179416.mp4", ["Aerial shot of a forest"])]
    assert source.fingerprint() != before


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "line 1 has no column 'videoid'"),
        ("videoid,name\n", "line 1 has no column 'page_dir'"),
        (WEBVID + "\n1,2\n", "line 8 has 2 cells, expected 5"),
        (WEBVID + '"open\n', "line 7 has a quote that is never closed"),
        (WEBVID.replace("21179416", "1"), "has none of 3 videos, expected files such as 006001"),
    ],
)
def test_what_is_not_of_webvids_format_is_named(tmp_path, videos, content, expected):
    path = write(tmp_path / "results_2M_val.csv", content)
    assert expected in refusal(f"webvid:{path},{videos('006001_006050/21179416.mp4')}")


def test_webvid_names_bytes_that_are_not_utf_8_and_what_is_missing(tmp_path, videos):
    path = tmp_path / "results.csv"
    path.write_bytes(WEBVID.encode() + b"1,2,3,4,caf\xe9\n")
    assert "line 7 is not UTF-8" in refusal(f"webvid:{path},{videos('a/b.mp4')}")
    assert "no.csv cannot be read: No such file" in refusal(f"webvid:{tmp_path}/no.csv,{videos()}")
    assert "nowhere is not a folder" in refusal(f"webvid:{path},{tmp_path}/nowhere")


# Specs


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ("msrvtt:a.json,videos", "captions"),
        ("msrvtt:a.json,videos,", "captions"),
        ("msvd:a.txt,videos", "captions"),
        ("msvd:a.txt,videos,b.txt,c.txt,d.txt", "captions"),
        ("msrvtt-qa:a.json", "qa"),
        ("msvd-qa:a.json,videos,b.txt,c", "qa"),
        ("activitynet:a.json,videos,sentences", "captions"),
        ("activitynet-qa:a.json,videos", "qa"),
        ("vatex:a.json,", "captions"),
        ("tgif-qa:a.csv", "qa"),
        ("webvid:a.csv", "captions"),
    ],
)
def test_a_benchmark_in_another_form_is_told_the_form(spec, field):
    kind = spec.partition(":")[0]
    form = sources.KINDS[kind].forms[0]
    assert f"is not {form}, with no comma in a path" in refusal(spec, field)
    other = "qa" if field == "captions" else "captions"
    assert f"offers the field {field!r}, expected one that offers {other!r}" in refusal(spec, other)


def test_no_benchmark_reads_a_pickle(tmp_path, videos):
    pickled = tmp_path / "raw-captions.pkl"
    pickled.write_bytes(b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94.")
    listed = write(tmp_path / "test_list.txt", "a\n")
    assert "line 1 is not UTF-8" in refusal(f"msvd:{pickled},{videos('a.avi')},{listed}")


def test_a_blank_caption_is_left_out_and_a_video_without_one_is_bad(tmp_path, videos):
    content = [{"videoID": "a", "enCap": [" "]}, {"videoID": "b", "enCap": ["", "a dog"]}]
    path = write(tmp_path / "vatex.json", content)
    source = open_set(f"vatex:{path},{videos('a.mp4', 'b.mp4')}")
    assert source[1].captions == ["a dog"]
    with pytest.raises(BadExample, match=r"vatex.json, video a.mp4 has no caption") as bad:
        source[0]
    assert bad.value.cause == "no caption"


def test_the_home_folder_is_found_in_every_part(tmp_path, msvd, videos, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    videos("vid2.avi")
    spec = "msvd:~/AllVideoDescriptions.txt,~/videos,~/test_list.txt,~/youtube_mapping.txt"
    assert [example.key for example in open_set(spec)] == ["vid2.avi"]


def test_real_questions_about_videos_have_one_answer_each(shared):
    """So that `exact` scores them, as it scores MSRVTT-QA."""
    source = open_set(f"jsonl:{shared}/data/easy_vqa_video[::30]", "qa")
    answers = [question.answers for example in source for question in example.qa]
    assert len(source) == 30 and all(len(own) == 1 for own in answers)
