"""The program that a soak starts, the disk it writes to, and the data it reads."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import resource
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from conftest import QUICK
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
STEPS, EVAL_EVERY = 60, 20
PEER_TIMEOUT = 20  # seconds
LIMIT = 400  # seconds that a program may take to start or to end: the machine may be busy
RECIPE = f"""
from mammut.config import (
    DataConfig, DecoderConfig, ModelConfig, OptimizerConfig, TrainConfig, VisionConfig
)


def get_config():
    size = dict(width=16, num_heads=2, mlp_dim=32, depth=1)
    return TrainConfig(
        model=ModelConfig(
            vision=VisionConfig(image_size=16, patch_size=8, **size),
            text=DecoderConfig(vocab_size=64, max_length=16, cross_attn_every=1, **size),
        ),
        data=DataConfig(train="tar:train/{{0..3}}.tar", val="jsonl:val/set.jsonl",
                        batch_size=8, eval_batch_size=8, threads=1, val_examples=8,
                        max_bad_share=0.5, crop_scale=(0.5, 1.0)),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        steps={STEPS}, log_every=1, eval_every={EVAL_EVERY}, checkpoint_every=3, keep_checkpoints=2,
    )
"""


def write_data(folder: pathlib.Path) -> None:
    """Writes the recipe, four shards of 16 pictures, and a validation set of 8.

    One picture is broken: the position in the data counts it.
    """
    rng = np.random.default_rng(0)

    def picture() -> bytes:
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(file, "png")
        return file.getvalue()

    (folder / "small.py").write_text(RECIPE)
    (folder / "train").mkdir()
    for shard in range(4):
        with tarfile.open(folder / "train" / f"{shard}.tar", "w") as tar:
            for number in range(16 * shard, 16 * shard + 16):
                caption = f"picture {number} of the set".encode()
                content = b"no picture" if number == 5 else picture()
                for name, data in ((f"{number}.png", content), (f"{number}.txt", caption)):
                    header = tarfile.TarInfo(name)
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))
    (folder / "val").mkdir()
    lines = []
    for number in range(8):
        (folder / "val" / f"{number}.png").write_bytes(picture())
        lines.append({"file": f"{number}.png", "captions": [f"this is number {number}"]})
    (folder / "val" / "set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def environment(folder: pathlib.Path) -> dict[str, str]:
    """The environment of the programs: one CPU device, quick compilation, caches in `folder`."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONFAULTHANDLER": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
        "XLA_FLAGS": QUICK,
    }


def rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The whole records of a run, without lines that are no JSON."""
    found = []
    path = workdir / "metrics.jsonl"
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if line.endswith(b"\n") and isinstance(row, dict):
                found.append(row)
    return found


def last_step(workdir: pathlib.Path) -> int:
    return max((row.get("step", 0) for row in rows(workdir) if "train/loss" in row), default=0)


class Disk:
    """A disk that can be full: a small one of its own, or else a limit for the files of a process.

    Only root may mount a disk. The limit fails a write as a full disk does, with another error.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
        self.is_mounted = os.geteuid() == 0 and not subprocess.run(
            mount, stderr=subprocess.DEVNULL
        ).returncode  # fmt: skip
        self._balloon = folder / "balloon"

    def fill(self, processes: list[subprocess.Popen]) -> None:
        if self.is_mounted:
            with contextlib.suppress(OSError), open(self._balloon, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            return
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))

    def free(self) -> None:
        self._balloon.unlink(missing_ok=True)

    def close(self) -> None:
        if self.is_mounted:
            subprocess.run(["umount", str(self.folder)], check=True)


@dataclasses.dataclass
class Footprint:
    """The most memory and open files of a process, sampled while it runs."""

    peak_mb: int = 0
    files: int = 0

    def sample(self, pid: int) -> None:
        with contextlib.suppress(OSError, TypeError):  # the process may have ended
            status = pathlib.Path(f"/proc/{pid}/status").read_text()
            self.peak_mb = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) // 1024
            self.files = max(self.files, len(os.listdir(f"/proc/{pid}/fd")))

    def __str__(self) -> str:
        return f"at most {self.peak_mb} MB and {self.files} open files"


class Program:
    """One start of `train.py`, in one process or in two."""

    def __init__(self, folder: pathlib.Path, number: int, argv: list[str], count: int = 1):
        command = [sys.executable, str(ROOT / "train.py"), *argv]
        command += ["--compilation-cache", str(folder / "xla")]
        if count > 1:
            with socket.socket() as server:
                server.bind(("localhost", 0))
                port = server.getsockname()[1]
            command += ["--coordinator", f"localhost:{port}", "--num-processes", str(count)]
            command += ["--peer-timeout", str(PEER_TIMEOUT), "--process-id"]
        self.printed = [folder / "printed" / f"{number}.{index}" for index in range(count)]
        self.processes = []
        for index, path in enumerate(self.printed):
            with open(f"{path}.out", "w") as out, open(f"{path}.err", "w") as err:
                self.processes.append(
                    subprocess.Popen(
                        [*command, str(index)] if count > 1 else command,
                        cwd=folder, env=environment(folder), stdout=out, stderr=err,
                    )
                )  # fmt: skip
        self.began = time.monotonic()
        self.footprint = Footprint()
        self._sampled = 0.0

    def runs(self) -> bool:
        """Tells whether all processes run."""
        if time.monotonic() > self._sampled + 0.2:
            self._sampled = time.monotonic()
            self.footprint.sample(self.processes[0].pid)
        return all(process.poll() is None for process in self.processes)

    def until(self, condition: Callable[[], bool], seconds: float = LIMIT) -> bool:
        """Waits for the condition; False if a process ends before it, or the time is over."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not self.runs() or time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return self.runs()

    def send(self, kind: signal.Signals, processes: list[subprocess.Popen] | None = None) -> None:
        for process in processes or self.processes:
            process.send_signal(kind)

    def ended(self, seconds: float) -> list[int]:
        """Waits for the end of all processes; their statuses.

        Raises:
          TimeoutError: one has not ended; the stacks of all are in `printed`.
        """
        deadline = time.monotonic() + seconds
        while any(process.poll() is None for process in self.processes):
            self.runs()
            if time.monotonic() > deadline:
                self.send(signal.SIGCONT)
                self.send(signal.SIGABRT)
                for process in self.processes:
                    process.wait()
                raise TimeoutError(f"has not ended after {seconds:.0f} s")
            time.sleep(0.01)
        return [process.returncode for process in self.processes]

    def end(self) -> None:
        """Kills what still runs."""
        for process in self.processes:
            process.kill()
            process.wait()

    def out(self) -> str:
        return pathlib.Path(f"{self.printed[0]}.out").read_text(errors="replace")

    def errors(self) -> str:
        """What all processes wrote to stderr."""
        return "".join(
            pathlib.Path(f"{path}.err").read_text(errors="replace") for path in self.printed
        )
