"""The log of a run: on the terminal and in files.

The terminal shows a progress bar or plain lines. The files hold TensorBoard events and JSON lines.
"""

import json
import pathlib
import sys
import time
from typing import Any

from mammut.core.files import replacing_file
from mammut.data.batches import describe_bad
from mammut.training.validation import ValidationResult


class RunLog:
    """The log of a run in `workdir`: `metrics.jsonl` and TensorBoard events.

    `metrics.jsonl` has one JSON object a line, for each step that is recorded. On a terminal a
    progress bar shows the losses, the rates and the time left; elsewhere a line is printed for each
    recorded step.

    What a run logged past the checkpoint that it is resumed from, at step `start`, is dropped: it
    is logged again. One of several processes logs; with `silent`, nothing is printed or written.
    """

    def __init__(
        self, workdir: pathlib.Path, *, start: int, steps: int, batch_size: int, silent: bool
    ):
        self._steps = steps
        self._batch_size = batch_size
        self._silent = silent
        if silent:
            return
        self._step: int | None = None  # step of the last record
        self._time = time.perf_counter()  # time of the last record
        self._waited = 0.0  # seconds that steps have waited for data since the last record
        from tensorboardX import SummaryWriter
        from tqdm import tqdm

        path = workdir / "metrics.jsonl"
        _drop_after(path, start)
        self._file = open(path, "a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
        self._bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            disable=not sys.stderr.isatty(),
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
            text = f"{losses}  {rate:,.0f} images/s  data wait {wait:.0%}"
        if skipped := int(values["train/nonfinite"]):
            text += f"  {skipped} updates skipped: not finite"
        self.record(step, values)
        if not self._bar.disable:
            self._bar.set_postfix_str(text)
        else:
            left = "" if compiled else f"  {_duration((self._steps - step) * seconds / done)} left"
            print(f"step {step}/{self._steps}  {text}{left}", flush=True)
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
        self.record(
            step, {f"eval/{name}/{metric}": value for metric, value in evaluation.metrics.items()}
        )
        images = evaluation.num_images
        metrics = dict(evaluation.metrics)
        lines = [f"{name} at step {step}: {images} images, {evaluation.num_texts} texts"]
        if "t2i_r1" in metrics:
            lines[0] += f" (chance R@1 {1 / images:.1%})"
        if "top1" in metrics:
            classes = evaluation.predictions[-1].settings["classes"]
            lines[0] += f" (chance top-1 {1 / len(classes):.1%})"
        for way, key in (("text to image", "t2i"), ("image to text", "i2t")):
            recalls = [
                f"  R@{k} {metrics.pop(f'{key}_r{k}'):.1%}"
                for k in (1, 5, 10)
                if f"{key}_r{k}" in metrics
            ]
            if recalls:
                lines.append(f"  {way}{''.join(recalls)}")
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

    def record(self, step: int, values: dict[str, float]) -> None:
        """Writes values to the JSON lines and to TensorBoard."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def print(self, text: str) -> None:
        """Prints between the bar's updates."""
        if self._silent:
            return
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Closes the files."""
        if self._silent:
            return
        self._bar.close()
        self._board.close()
        self._file.close()


def _drop_after(path: pathlib.Path, step: int) -> None:
    """Drops the records after `step`.

    A last line that a kill has cut short is dropped, too.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    with replacing_file(path) as new:
        new.write_text("".join(kept), encoding="utf-8")


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
