"""The log of a run: no output that is full, broken or foreign ends a run or stops it."""

import contextlib
import io
import json
import math
import os
import pathlib
import pty
import re
import resource
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import pytest

from mammut.core import terminal
from mammut.core.terminal import is_terminal, say
from mammut.pages.report_scores import read_training
from mammut.training.log import RunLog
from mammut.training.validation import ValidationResult


def make_log(folder: pathlib.Path, start: int = 0, steps: int = 100) -> RunLog:
    return RunLog(folder, start=start, steps=steps, batch_size=4, silent=False)


def log_steps(log: RunLog, first: int, last: int, loss: float = 1.0) -> None:
    for step in range(first, last + 1):
        log.step(step, {"loss": loss, "nonfinite": 0}, 0.0, record=True)


def rows(folder: pathlib.Path) -> list[dict]:
    def refuse(name: str):
        raise ValueError(f"{name} is no JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def events(folder: pathlib.Path) -> list[bytes]:
    """The records of the one file of events, each with its length before it."""
    (path,) = (folder / "tensorboard").iterdir()
    content = path.read_bytes()
    found = []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        assert len(content) >= 16 + length
        found.append(content[12 : 12 + length])
        content = content[16 + length :]
    return found


@contextlib.contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """A file cannot grow beyond `size` bytes: what is beyond fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class Broken(io.TextIOWrapper):
    """An output whose reader has gone."""

    def __init__(self):
        super().__init__(io.BytesIO(), encoding="utf-8")

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    def isatty(self):
        return True


RETRIEVAL = {
    "t2i_r1": 0.25, "t2i_r5": 0.5, "t2i_r10": 1.0, "t2i_medr": 5.5, "t2i_meanr": 5.3,
    "i2t_r1": 0.5, "i2t_r5": 0.75, "i2t_r10": 1.0, "i2t_medr": 2.0, "i2t_meanr": 3.75,
    "mean_recall": 2 / 3,
}  # fmt: skip
OF_IMAGES = """\
step 2/100  caption 1.000  N images/s  data wait 0%  LEFT
val at step 2: 20 images, 40 texts (chance R@1 5.0%)
  text to image  R@1 25.0%  R@5 50.0%  R@10 100.0%
  image to text  R@1 50.0%  R@5 75.0%  R@10 100.0%
"""
OF_VIDEOS = """\
step 2/100  caption 1.000  N.n videos/s  data wait 0%  LEFT
val at step 2: 20 videos, 40 texts (chance R@1 5.0%)
  text to video  R@1 25.0%  R@5 50.0%  R@10 100.0%  median rank 5.5  mean rank 5.3
  video to text  R@1 50.0%  R@5 75.0%  R@10 100.0%  median rank 2.0  mean rank 3.8
"""


@pytest.mark.parametrize(("videos", "expected"), [(False, OF_IMAGES), (True, OF_VIDEOS)])
def test_the_lines_of_a_run_speak_of_images_or_of_videos_and_their_ranks(
    tmp_path, capsys, videos, expected
):
    log = RunLog(tmp_path, start=0, steps=100, batch_size=4, silent=False, videos=videos)
    for step in (1, 2):
        log.step(step, {"loss_caption": 1.0, "nonfinite": 0}, 0.0, record=True)
    log.evaluation(2, "val", ValidationResult(RETRIEVAL, [], 20, 40, {}), samples=0)
    log.close()
    lines = capsys.readouterr().out.splitlines(keepends=True)[1:]
    said = re.sub(r"\.\d videos/s", ".n videos/s", "".join(lines))
    said = re.sub(r"[\d,]+(\.n)? (images|videos)/s", r"N\1 \2/s", said)
    assert re.sub(r"%  \S+ left", "%  LEFT", said) == expected
    # The files have one set of names.
    assert rows(tmp_path)[-1] == {"step": 2} | {f"eval/val/{k}": v for k, v in RETRIEVAL.items()}


# --- files


def test_a_full_disk_neither_ends_nor_stops_a_run_and_is_said_once(tmp_path, capsys):
    log = make_log(tmp_path)
    with files_at_most(1_000):
        log_steps(log, 1, 60)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("cannot be written, and is left out" in line for line in said)
    assert all(any(name in line for line in said) for name in ("metrics.jsonl", "events.out"))
    written = rows(tmp_path)  # whole lines
    assert 3 < len(written) < 30
    assert 3 < len(events(tmp_path)) < 30

    log_steps(log, 61, 61)  # the disk has room again
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == [*range(1, 62)]
    assert len(events(tmp_path)) == 2 + 61  # two are of the file itself
    assert not capsys.readouterr().err


def test_logs_that_cannot_be_opened_are_left_out(tmp_path, capfd):
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "tensorboard").write_text("no folder")
    log = make_log(tmp_path)
    log_steps(log, 1, 3)
    log.close()
    said = capfd.readouterr()
    assert len(said.out.splitlines()) == 3
    assert "metrics.jsonl cannot be written, and is left out" in said.err
    assert said.err.count("events.out") == 1


@pytest.mark.parametrize("is_opened", [False, True])
def test_a_pipe_in_place_of_a_log_is_not_waited_for(tmp_path, capfd, is_opened):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with contextlib.ExitStack() as stack:
        if is_opened:  # and not read
            reader = os.open(tmp_path / "metrics.jsonl", os.O_RDONLY | os.O_NONBLOCK)
            stack.callback(os.close, reader)
        log = make_log(tmp_path)
        log_steps(log, 1, 3)
        log.close()
    assert capfd.readouterr().err.count("metrics.jsonl cannot be written, and is left out") == 1


def test_numbers_that_are_not_finite_are_null_in_the_json_lines(tmp_path):
    log = make_log(tmp_path)
    log_steps(log, 1, 1, math.nan)
    log_steps(log, 2, 2, math.inf)
    log_steps(log, 3, 3, 0.5)
    log.close()
    assert [row["train/loss"] for row in rows(tmp_path)] == [None, None, 0.5]
    (curve,) = read_training(tmp_path / "metrics.jsonl")["curves"][:1]
    assert "steps 1 to 3" in curve["alt"]


FOREIGN = [
    b"no JSON\n",
    b'{"train/loss": 1.0}\n',
    b'{"step": "7"}\n',
    b'{"step": NaN}\n',
    b"[1]\n",
    b"null\n",
    b"\xff\xfe\n",
    b"[" * 100_000 + b"\n",
    b"\n",
    b'{"step": 1, "train/lo',
    b"\0" * 50,
]


@pytest.mark.parametrize("line", FOREIGN, ids=lambda line: repr(line[:20]))
def test_a_line_that_is_no_record_is_dropped_and_said_when_a_run_is_resumed(tmp_path, capfd, line):
    records = [b'{"step": %d, "train/loss": 1.0}\n' % step for step in range(1, 6)]
    where = 2 if line.endswith(b"\n") else 5
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([*records[:where], line, *records[where:]]))
    log = make_log(tmp_path, start=4)
    log_steps(log, 5, 5)
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]
    assert "metrics.jsonl: 1 lines that are no records are dropped" in capfd.readouterr().err


def test_the_evaluations_of_a_resumed_run_are_known(tmp_path):
    lines = [{"step": 4, "eval/val/t2i_r1": 1.0}, {"step": 6, "eval_failed": "no"}, {"step": 8}]
    lines += [{"step": 10, "eval/val/t2i_r1": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = make_log(tmp_path, start=8)
    assert [step for step in range(12) if log.evaluated(step)] == [4, 6]
    log.evaluation_failed(8, "ValueError: twice")
    assert log.evaluated(8)
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == [4, 6, 8, 8]
    assert rows(tmp_path)[-1] == {"step": 8, "eval_failed": "ValueError: twice"}


def test_the_last_evaluation_of_a_run_is_logged_once_when_it_is_made_again(tmp_path):
    lines = [{"step": 4, "eval/val/t2i_r1": 1.0}, {"step": 5}, {"step": 5, "eval/val/t2i_r1": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    make_log(tmp_path, start=5, steps=5).close()
    assert rows(tmp_path) == lines[:2]


def test_events_are_those_that_tensorboard_reads(tmp_path):
    """Compared byte by byte with tensorboardX's own writer of records."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter

    log = make_log(tmp_path)
    log_steps(log, 1, 2)
    log.close()
    found = [Event.FromString(record) for record in events(tmp_path)]
    assert found[0].file_version == "brain.Event:2" and found[1].session_log.status == 1
    assert [event.step for event in found[1:]] == [1, 1, 2]
    scalars = {value.tag: value.simple_value for value in found[-1].summary.value}
    assert scalars["train/loss"] == 1.0
    writer = RecordWriter(str(tmp_path / "expected"))
    for record in events(tmp_path):
        writer.write(record)
    writer.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert path.read_bytes() == (tmp_path / "expected").read_bytes()


# --- the terminal


@pytest.mark.parametrize("stdout", [None, Broken(), "closed", "full"], ids=str)
def test_a_run_goes_on_where_stdout_is_gone(tmp_path, monkeypatch, capfd, stdout):
    if stdout == "closed":
        stdout = io.StringIO()
        stdout.close()
    if stdout == "full":
        stdout = open("/dev/full", "w")
    monkeypatch.setattr(sys, "stdout", stdout)
    log = make_log(tmp_path)
    log.print("beginning")
    log_steps(log, 1, 3)
    log.close()
    assert len(rows(tmp_path)) == 3
    said = capfd.readouterr().err
    assert said.count("stdout cannot be written to") == (0 if stdout is None else 1)


@pytest.fixture(params=["pipe", "terminal"])
def unread(request) -> Iterator[tuple[int, io.TextIOWrapper]]:
    """An output that takes no more, and its reader's side."""
    if request.param == "pipe":
        reader, writer = os.pipe()
    else:
        reader, writer = pty.openpty()
        termios.tcflow(writer, termios.TCOOFF)  # as by Ctrl-S
    stream = open(writer, "w", encoding="utf-8")
    if request.param == "pipe":
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 1000)
        os.set_blocking(writer, True)
    yield reader, stream
    if request.param == "terminal":
        termios.tcflow(writer, termios.TCOON)
    stream.close()
    os.close(reader)


def test_an_output_that_nobody_reads_is_left_out_until_it_is_read(unread, monkeypatch, capfd):
    reader, stream = unread
    monkeypatch.setattr(terminal, "_PATIENCE", 0.05)
    monkeypatch.setattr(sys, "stdout", stream)
    for number in range(3):
        say(f"left out {number}" * 1000)
    said = capfd.readouterr().err
    assert said == "stdout is not read: what it would show is left out so long\n"
    if os.isatty(reader):
        termios.tcflow(stream.fileno(), termios.TCOON)
    else:
        os.read(reader, 2**20)
    say("shown")
    shown = os.read(reader, 2**20)
    assert shown.split() == [b"shown"] and not capfd.readouterr().err


def test_a_bar_that_nobody_reads_is_left_out(unread, monkeypatch, tmp_path):
    _, stream = unread
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("mammut.training.log.is_terminal", lambda _: True)
    log = make_log(tmp_path)
    for step in range(1, 4):
        log_steps(log, step, step)
        time.sleep(0.11)  # a bar is drawn at most ten times a second
    log.close()
    assert len(rows(tmp_path)) == 3


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_stdout_cannot_show_is_escaped(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    say("a caf\u00e9 in \u6771\u4eac, \udcff")
    assert raw.getvalue().decode(encoding).strip() in (
        "a caf\\xe9 in \\u6771\\u4eac, \\udcff",
        "a caf\u00e9 in \\u6771\\u4eac, \\udcff",
    )


@pytest.mark.parametrize("stderr", [None, Broken(), "closed"], ids=str)
def test_a_bar_whose_terminal_is_gone_is_left_out(tmp_path, monkeypatch, capfd, stderr):
    if stderr == "closed":
        stderr = io.StringIO()
        stderr.close()
    monkeypatch.setattr(sys, "stderr", stderr)
    assert is_terminal("stderr") == isinstance(stderr, Broken)
    log = make_log(tmp_path)
    log_steps(log, 1, 3)
    log.print("printed")
    log.close()
    assert len(rows(tmp_path)) == 3 and "printed" in capfd.readouterr().out


def test_the_end_of_a_run_whose_stdout_broke_does_not_fail(tmp_path):
    """Python flushes stdout when it ends, and exits with 120 where that fails."""
    read, write = os.pipe()
    os.close(read)
    path = pathlib.Path(__file__).parents[1] / "mammut" / "core" / "terminal.py"
    code = f"import runpy; say = runpy.run_path({str(path)!r})['say']; say('a'); say('b')"
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert done.returncode == 0 and done.stderr.count(b"stdout cannot be written") == 1
