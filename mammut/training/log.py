"""The log of a run: on the terminal and in files.

The terminal shows a progress bar or plain lines. The files hold TensorBoard events and JSON lines.
"""

import collections
import contextlib
import errno
import json
import math
import os
import pathlib
import socket
import struct
import sys
import time
from typing import Any

from mammut.core.files import replacing_file
from mammut.core.terminal import is_read, is_terminal, say
from mammut.data.batches import describe_bad
from mammut.training.validation import ValidationResult

_MAX_PENDING = 10_000  # records that wait for a file that cannot be written


class RunLog:
    """The log of a run in `workdir`: `metrics.jsonl` and TensorBoard events.

    `metrics.jsonl` has one JSON object a line, for each step that is recorded; a number that is not
    finite is null. On a terminal a progress bar shows the losses, the rates and the time left;
    elsewhere a line is printed for each recorded step.

    What a run logged past the checkpoint that it is resumed from, at step `start`, is dropped: it
    is logged again. One of several processes logs; with `silent`, nothing is printed or written.
    The lines speak of images, or with `videos` of videos, whose retrieval is told by ranks, too.

    No log is waited for, and none ends the run: what cannot be written is said once on stderr, and
    left out.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        start: int,
        steps: int,
        batch_size: int,
        silent: bool,
        videos: bool = False,
    ):
        self._steps = steps
        self._batch_size = batch_size
        self._silent = silent
        self._example = "video" if videos else "image"
        self._rate = "{:,.1f} videos/s" if videos else "{:,.0f} images/s"
        if silent:
            return
        self._step: int | None = None  # step of the last record
        self._time = time.perf_counter()  # time of the last record
        self._waited = 0.0  # seconds that steps have waited for data since the last record
        from tqdm import tqdm

        path = workdir / "metrics.jsonl"
        kept = _kept_records(path, start, steps)
        # The steps that were evaluated, and those of them whose evaluation failed.
        self._evaluated = {row["step"] for row in kept if any(key[:4] == "eval" for key in row)}
        self._failed = sum("eval_failed" in row for row in kept)
        self._file = _Records(path)
        self._board = _TensorBoard(workdir / "tensorboard", purge_step=start + 1)
        self._bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            file=_Terminal(),
            disable=not is_terminal("stderr"),
            dynamic_ncols=True,
        )

    def step(self, step: int, metrics: dict[str, Any], waited: float, *, record: bool) -> None:
        """Counts a step and records it if `record`.

        The step waited `waited` seconds for its batch.

        The first step of a run is always recorded, without rates: it is mostly compilation.
        """
        if self._silent:
            return
        self._waited += waited
        self._bar.update()
        compiled = self._step is None
        if not (record or compiled):
            return
        # This waits for the step to end.
        values = {f"train/{name}": float(value) for name, value in metrics.items()}
        seconds = time.perf_counter() - self._time
        parts = {name: values.get(f"train/loss_{name}") for name in ("contrastive", "caption")}
        losses = "  ".join(
            f"{name} {value:.3f}" for name, value in parts.items() if value is not None
        )
        if compiled:
            text = f"{losses}  first step after {seconds:.0f} s"
        else:
            done = step - self._step
            rate = done * self._batch_size / seconds
            wait = self._waited / seconds
            values |= {"perf/examples_per_sec": rate, "perf/data_wait": wait}
            text = f"{losses}  {self._rate.format(rate)}  data wait {wait:.0%}"
        if skipped := int(values["train/nonfinite"]):
            text += f"  {skipped} updates skipped: not finite"
        self.record(step, values)
        if not self._bar.disable:
            self._bar.set_postfix_str(text)
        else:
            left = "" if compiled else f"  {_duration((self._steps - step) * seconds / done)} left"
            say(f"step {step}/{self._steps}  {text}{left}")
        self._restart_clock(step)

    def _restart_clock(self, step: int) -> None:
        self._step = step
        self._time = time.perf_counter()
        self._waited = 0.0

    def evaluation(self, step: int, name: str, evaluation: ValidationResult, samples: int) -> None:
        """Records an evaluation and prints it.

        The first `samples` texts of the model are printed, too.
        """
        if self._silent:
            return
        self._evaluated.add(step)
        self.record(
            step, {f"eval/{name}/{metric}": value for metric, value in evaluation.metrics.items()}
        )
        images = evaluation.num_images
        metrics = dict(evaluation.metrics)
        example = self._example
        lines = [f"{name} at step {step}: {images} {example}s, {evaluation.num_texts} texts"]
        if "t2i_r1" in metrics:
            lines[0] += f" (chance R@1 {1 / images:.1%})"
        if "top1" in metrics:
            classes = evaluation.predictions[-1].settings["classes"]
            lines[0] += f" (chance top-1 {1 / len(classes):.1%})"
        for way, key in ((f"text to {example}", "t2i"), (f"{example} to text", "i2t")):
            found = [
                f"  R@{k} {metrics.pop(f'{key}_r{k}'):.1%}"
                for k in (1, 5, 10)
                if f"{key}_r{k}" in metrics
            ]
            for title, rank in (("median", f"{key}_medr"), ("mean", f"{key}_meanr")):
                value = metrics.pop(rank, None)
                if value is not None and example == "video":  # as text-video retrieval is scored
                    found.append(f"  {title} rank {value:.1f}")
            if found:
                lines.append(f"  {way}{''.join(found)}")
        metrics.pop("mean_recall", None)
        records = evaluation.predictions[-1].records if evaluation.predictions else []
        if "caption_exact" in metrics:
            exact = metrics.pop("caption_exact")
            lines.append(f"  captions equal to a reference: {exact:.1%} of {len(records)}")
        lines += [f"  {metric} {value:.4f}" for metric, value in metrics.items()]
        if evaluation.bad:
            lines.append(f"  examples that could not be used: {describe_bad(evaluation.bad)}")
        for record in records[:samples]:
            lines += [f"  {record['key']}", *(f"    {line}" for line in _sample(record))]
        self.print("\n".join(lines))
        self._restart_clock(step)  # the rates do not count the evaluation

    def evaluated(self, step: int) -> bool:
        """Tells whether the log has an evaluation of a step, a failed one too."""
        return not self._silent and step in self._evaluated

    def evaluation_failed(self, step: int, cause: str) -> None:
        """Records and prints that an evaluation failed, in one line."""
        if self._silent:
            return
        self._evaluated.add(step)
        self._failed += 1
        self._file.write(_json_line({"step": step, "eval_failed": cause}))
        self.print(
            f"the evaluation at step {step} failed, number {self._failed} of this run that did: "
            f"{cause}"
        )
        self._restart_clock(step)

    def record(self, step: int, values: dict[str, float]) -> None:
        """Writes values to the JSON lines and to TensorBoard."""
        self._file.write(_json_line({"step": step, **values}))
        self._board.write(step, values)

    def print(self, text: str) -> None:
        """Prints between the bar's updates."""
        if self._silent:
            return
        self._bar.clear()
        say(text)
        self._bar.refresh()

    def close(self) -> None:
        """Ends the bar."""
        if not self._silent:
            self._bar.close()


class _Terminal:
    """stderr, on which the bar is drawn; one that is gone, or not read, is left out."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed
            if is_read(sys.stderr):
                sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            if is_read(sys.stderr):
                sys.stderr.flush()


class _Records:
    """A file of records, to which whole records are appended.

    Records that cannot be written, as on a full disk, are written with a later one.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._pending: collections.deque[bytes] = collections.deque(maxlen=_MAX_PENDING)
        self._said = False

    def write(self, record: bytes) -> None:
        self._pending.append(record)
        try:
            self._write_pending()
        except OSError as error:
            if not self._said:
                cause = error.strerror or error
                say(f"{self._path} cannot be written, and is left out so long: {cause}", "stderr")
            self._said = True

    def _write_pending(self) -> None:
        with open(self._path, "ab", buffering=0, opener=_without_waiting) as file:
            whole = file.tell()
            records = b"".join(self._pending)
            if file.write(records) < len(records):
                file.truncate(whole)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._pending.clear()


def _without_waiting(path: str, flags: int) -> int:
    """Opens a file; a pipe that nobody reads is an error, not waited for."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


class _TensorBoard:
    """TensorBoard's events, written at once.

    The writer of tensorboardX writes in a thread: where that has ended, on a full disk, its queue
    fills up and the run would wait for ever.
    """

    def __init__(self, folder: pathlib.Path, purge_step: int):
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        with contextlib.suppress(OSError):  # the first record says it
            folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self._records = _Records(folder / name)
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # Later steps of the files before are not shown.
        session = SessionLog(status=SessionLog.START)
        self._append(Event(wall_time=time.time(), step=purge_step, session_log=session))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one event with all values."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        summary = Summary(value=scalars)
        self._append(Event(wall_time=time.time(), step=step, summary=summary))

    def _append(self, event: Any) -> None:
        """Appends an event as a record of TFRecord: its length and itself, with their checksums."""
        from tensorboardX.record_writer import masked_crc32c

        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checksums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
        self._records.write(length + next(checksums) + data + next(checksums))


def _json_line(row: dict[str, Any]) -> bytes:
    """Makes a line of JSON, which has no NaN and no infinity."""
    row = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return (json.dumps(row, allow_nan=False) + "\n").encode()


def _kept_records(path: pathlib.Path, start: int, steps: int) -> list[dict[str, Any]]:
    """Drops the records after step `start` from the file, and returns those that are kept.

    An evaluation of the last step is dropped, too: it is made again. A line that is no record, as
    one that a kill has cut short, is dropped and said.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    except OSError as error:
        say(f"{path} cannot be read: {error}", "stderr")
        return []
    rows = []
    kept = []
    foreign = 0
    for line in lines:
        row = _row(line)
        if row is None:
            foreign += 1
        elif row["step"] <= start and not (
            row["step"] == steps and any(key[:4] == "eval" for key in row)
        ):
            rows.append(row)
            kept.append(line)
    if foreign:
        say(f"{path}: {foreign} lines that are no records are dropped", "stderr")
    if len(kept) < len(lines):
        try:
            with replacing_file(path) as new:
                new.write_bytes(b"".join(kept))
        except OSError as error:
            say(f"{path} cannot be written: {error}", "stderr")
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    """Reads a record; None where the line is none."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    is_record = line.endswith(b"\n") and isinstance(row, dict) and type(row.get("step")) is int
    return row if is_record else None


def _sample(record: dict[str, Any]) -> list[str]:
    """Makes lines that show a text of the model and its reference.

    Both are in the record.
    """
    if "question" in record:
        return [
            f"asks  {record['question']}",
            f"says  {record['prediction']}",
            f"ref   {', '.join(record['answers'])}",
        ]
    if "ranked" in record:
        return [f"says  {record['ranked'][0]}", f"ref   {record['label']}"]
    return [f"says  {record['prediction']}", f"ref   {record['references'][0]}"]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
