"""The faults of a soak: of a program that runs, and of the files of one that does not.

A fault of a program is struck by a function of the run and the program. It says what to expect. A
fault of files keeps what it damages, so that a fault that is refused can be repaired.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import time
from typing import TYPE_CHECKING

from soak_program import LIMIT, PEER_TIMEOUT, Program

if TYPE_CHECKING:
    from pathlib import Path

    from soak import Run

ANSWER = 60  # seconds in which a signal is answered: the machine may be busy


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault that has been struck.

    Attributes:
      kind: its name in the table.
      words: where it ends a program, one of these is in the sentence that the program ends with.
      seconds: how long the program may take to its end.
      of_peer: it strikes one of several processes. JAX ends the others, in words of its own.
    """

    kind: str
    words: tuple[str, ...] = ()
    seconds: float = LIMIT
    of_peer: bool = False


# --- faults that end a program


def kill(run: "Run", program: Program) -> Fault:
    program.send(signal.SIGKILL)
    return Fault("kill -9")


def terminate(run: "Run", program: Program) -> Fault:
    program.send(signal.SIGTERM)
    return Fault("SIGTERM", seconds=ANSWER)


def interrupt(run: "Run", program: Program) -> Fault:
    program.send(signal.SIGINT)
    return Fault("Ctrl-C", seconds=ANSWER)


def fill_disk(run: "Run", program: Program) -> Fault:
    run.disk.fill(program.processes)
    return Fault("a full disk", ("No space left", "File too large", "NO_SPACE", "no space"))


def cut_shard_in_use(run: "Run", program: Program) -> Fault:
    path = run.rng.choice(sorted((run.folder / "train").iterdir()))
    run.keep(path)
    os.truncate(path, 512 * run.rng.randint(0, 10))
    return Fault("a shard cut short while it is read", (path.name,))


def lose_peer(run: "Run", program: Program) -> Fault:
    program.send(signal.SIGKILL, [run.rng.choice(program.processes)])
    return Fault("a peer killed", of_peer=True)


def stop_peer(run: "Run", program: Program) -> Fault:
    """A peer stands still for longer than the others wait."""
    peer = run.rng.choice(program.processes)
    program.send(signal.SIGSTOP, [peer])
    if program.until(lambda: False, 4 * PEER_TIMEOUT) or program.runs():
        run.problem("a peer stopped, and the others wait for it")
    peer.kill()
    return Fault("a peer stopped", of_peer=True)


ENDINGS = [kill, kill, terminate, interrupt, fill_disk, cut_shard_in_use]
PEER_ENDINGS = [lose_peer, lose_peer, stop_peer]


# --- faults that a program outlives


def pause(run: "Run", program: Program) -> None:
    """A process stands still for a moment: one of several is a slow peer."""
    paused = [run.rng.choice(program.processes)]
    program.send(signal.SIGSTOP, paused)
    time.sleep(run.rng.uniform(0.2, 3))
    program.send(signal.SIGCONT, paused)
    run.strike("a pause")
    if program.runs():
        run.count("resumed", "a pause")


def start_another(run: "Run", program: Program) -> None:
    """A second program resumes the run while the first, which stands still, holds it."""
    lock = run.workdir / "run.lock"
    pid = str(program.processes[0].pid)
    if not (lock.exists() and pid in lock.read_text(errors="replace")):
        return  # it does not hold the run yet, or no more
    program.send(signal.SIGSTOP)
    run.strike("a second program")
    other = run.start(["--workdir", str(run.workdir), "--resume"], processes=1)
    began = re.compile(r"^(starting|resuming) at", re.M)
    other.until(lambda: began.search(other.out()) is not None)
    if other.runs() or began.search(other.out()):
        run.problem("a second program runs in the folder of the first")
    elif "Traceback" not in other.errors() and str(run.workdir) in other.errors():
        run.count("refused", "a second program")
    else:
        run.problem(f"a second program is not refused by name: {other.errors()[-300:]!r}")
    other.send(signal.SIGKILL)
    other.ended(LIMIT)
    program.send(signal.SIGCONT)


GENTLE = [pause, pause, start_another]
PEER_GENTLE = [pause]  # several that stand still for longer would miss each other


# --- faults of files, None where there is no such file yet


def damage_bytes(run: "Run", path: "Path") -> None:
    """Flips a bit, cuts the file short, or takes it away."""
    run.keep(path)
    content = bytearray(path.read_bytes())
    how = run.rng.choice(["flip", "flip", "flip", "cut", "missing"])
    run.note(f"  {how} {path.relative_to(run.workdir)}")
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: run.rng.randrange(max(1, len(content)))])
    elif content:
        content[run.rng.randrange(len(content))] ^= 1 << run.rng.randrange(8)
        path.write_bytes(content)


def damage_checkpoint(run: "Run") -> Fault | None:
    """Damages any file of any step that has checksums."""
    manifests = run.workdir / "checkpoint_manifests"
    steps = {
        step: path for step, path in run.steps().items() if (manifests / f"{step}.json").exists()
    }
    if not steps:
        return None
    step = run.rng.choice(sorted(steps))
    files = sorted(path for path in steps[step].rglob("*") if path.is_file())
    damage_bytes(run, run.rng.choice(files))
    return Fault("a damaged checkpoint", (str(step), "checkpoints"))


def damage_manifest(run: "Run") -> Fault | None:
    manifests = sorted((run.workdir / "checkpoint_manifests").glob("[0-9]*.json"))
    if not manifests:
        return None
    path = run.rng.choice(manifests)
    damage_bytes(run, path)
    return Fault("damaged checksums", (path.stem, "checkpoints"))


def damage_run_file(run: "Run") -> Fault | None:
    damage_bytes(run, run.workdir / "run.json")
    return Fault("a damaged run.json", ("run.json",))


def damage_processor(run: "Run") -> Fault | None:
    path = run.workdir / run.rng.choice(["processor.json", "tokenizer.model"])
    if not path.exists():
        return None
    damage_bytes(run, path)
    return Fault("a damaged processor or tokenizer", (path.name,))


def damage_log(run: "Run") -> Fault | None:
    """Flips a bit of the log: the records of its line may be lost or changed, no others."""
    path = run.workdir / "metrics.jsonl"
    before = path.read_bytes() if path.exists() else b""
    if not before:
        return None
    run.keep(path)
    changed = bytearray(before)
    changed[run.rng.randrange(len(changed))] ^= 1 << run.rng.randrange(8)
    path.write_bytes(changed)
    for line in {*before.split(b"\n")} ^ {*bytes(changed).split(b"\n")}:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            run.exempt_steps.add(json.loads(line)["step"])
    return Fault("a damaged log", ("metrics.jsonl",))


def remove_folder(run: "Run") -> Fault | None:
    path = run.workdir / run.rng.choice(["checkpoints", "checkpoint_manifests"])
    if not path.exists() or not run.steps():
        return None
    run.keep(path)
    shutil.rmtree(path)
    return Fault(f"{path.name}/ is gone", ("checkpoints", "checkpoint_manifests"))


def leave_strange_files(run: "Run") -> Fault | None:
    """Leaves what other programs leave in folders; it stays there."""
    folders = [run.workdir, run.workdir / "checkpoints", run.workdir / "checkpoint_manifests"]
    folder = run.rng.choice([folder for folder in folders if folder.exists()])
    name = run.rng.choice(["._4.json", ".DS_Store", "nohup.out", "lost+found", "link", "9.json~"])
    path = folder / name
    if os.path.lexists(path):
        return None
    if name == "lost+found":
        path.mkdir()
    elif name == "link":
        path.symlink_to("nowhere")
    else:
        path.write_bytes(b"\0\5\x16\7")
    run.strange.append(path)
    run.note(f"  {path.relative_to(run.workdir)}")
    return Fault("a stranger's file", (name,))


def damage_shard(run: "Run") -> Fault | None:
    path = run.rng.choice(sorted((run.folder / "train").iterdir()))
    run.keep(path)
    how = run.rng.choice(["cut", "missing", "folder"])
    if how == "cut":
        os.truncate(path, run.rng.randrange(path.stat().st_size // 2))
    else:
        path.unlink()
    if how == "folder":
        path.mkdir()
    return Fault("a shard that cannot be read", (path.name,))


def damage_validation(run: "Run") -> Fault | None:
    """Takes the pictures away that the evaluations of the next start need."""
    for path in sorted((run.folder / "val").glob("*.png")):
        run.keep(path)
        path.write_bytes(b"no picture")
    return Fault("an evaluation that fails", ("val",))


FILE_FAULTS = [
    damage_checkpoint, damage_checkpoint, damage_checkpoint, damage_manifest, damage_run_file,
    damage_processor, damage_log, remove_folder, leave_strange_files, damage_shard,
    damage_validation,
]  # fmt: skip
