"""A soak: a small run under random faults, and the same result to the last bit.

    python tests/soak.py --minutes 60 --seed 0

First a run is trained that nothing disturbs. Then the same run is trained again and again while
faults strike it: it is killed, its disk is full, its files are damaged, its peers stop. After each
fault it is resumed. It has to go on, or to refuse the fault in one sentence that names it; what is
refused is repaired. At the end of each run its parameters, optimizer, position in the data and
records have to be those of the undisturbed run, byte for byte.

The faults and their moments follow from the seed, but how far a program is at such a moment depends
on the machine. The folder of a soak (`--folder`) keeps its history and all that was printed.
"""

import argparse
import collections
import dataclasses
import itertools
import pathlib
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable

import conftest  # noqa: F401  (the settings of JAX that the tests have)
from soak_compare import differences
from soak_faults import ENDINGS, FILE_FAULTS, GENTLE, PEER_ENDINGS, PEER_GENTLE, Fault
from soak_program import (
    EVAL_EVERY,
    LIMIT,
    STEPS,
    Disk,
    Footprint,
    Program,
    last_step,
    rows,
    write_data,
)

from mammut.core.files import check_manifest

SIGNALS = {"SIGTERM", "Ctrl-C"}
# Statuses of a run that a signal has ended.
STOPPED = {75, 128 + 2, 128 + 15, -2, -15}
IN_MAIN = re.compile(r'train.py", line \d+, in main')
STEP = re.compile(r"/(?:checkpoints|checkpoint_manifests)/(\d+)")
BEGINNING = re.compile(r"^(?:starting|resuming) at step (\d+)", re.M)


@dataclasses.dataclass
class Soak:
    """What all runs of a soak share, and its counts.

    Attributes:
      folder: data, runs, and what they print.
      faults: how many may be struck; `deadline` may come first.
    """

    folder: pathlib.Path
    disk: Disk
    rng: random.Random
    faults: int
    deadline: float
    programs: list[Program] = dataclasses.field(default_factory=list)
    starts: int = 0
    finished: int = 0  # runs that are the same as the undisturbed one
    counts: dict[str, collections.Counter] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(collections.Counter)
    )
    longest: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds to an end
    problems: list[str] = dataclasses.field(default_factory=list)

    def is_over(self) -> bool:
        return self.counts["struck"].total() >= self.faults or time.monotonic() > self.deadline

    def note(self, text: str) -> None:
        with (self.folder / "history.txt").open("a") as file:
            file.write(f"{text}\n")

    def table(self) -> str:
        """How often each kind of fault was struck, outlived, and refused by name."""
        lines = [
            f"{'fault':<36}{'struck':>8}{'resumed':>9}{'refused by name':>17}{'at most s':>11}"
        ]
        for kind in (*sorted(self.counts["struck"]), "all"):
            counts = [
                self.counts[of].total() if kind == "all" else self.counts[of][kind]
                for of in ("struck", "resumed", "refused")
            ]
            seconds = max(self.longest.values()) if kind == "all" else self.longest.get(kind, 0)
            lines.append(f"{kind:<36}{counts[0]:>8}{counts[1]:>9}{counts[2]:>17}{seconds:>11.1f}")
        return "\n".join(lines)


def _copy(path: pathlib.Path, copy: pathlib.Path) -> None:
    """Copies a file or a folder; a link stays one, also one to nothing."""
    if path.is_dir():
        shutil.copytree(path, copy, symlinks=True)
    else:
        shutil.copy2(path, copy)


class Run:
    """A run from its first step to its last, under faults."""

    def __init__(self, soak: Soak, workdir: pathlib.Path, processes: int):
        self.soak, self.workdir, self.processes = soak, workdir, processes
        self.rng, self.folder, self.disk = soak.rng, soak.folder, soak.disk
        self.exempt_steps: set[int] = set()  # their records were damaged, or not made
        self.strange: list[pathlib.Path] = []
        self.footprint = Footprint()  # of the last program
        self.refusals = 0  # in a row, without a fault
        self._begun = False
        self._damage: Fault | None = None  # of files; no start has told yet whether it matters
        self._ended_by: list[Fault] = []  # what ended programs since the run last began
        self._kept: dict[pathlib.Path, pathlib.Path] = {}  # copies of what was damaged

    # --- for the faults

    def note(self, text: str) -> None:
        self.soak.note(text)

    def problem(self, text: str) -> None:
        """Something that must not happen."""
        text = f"start {self.soak.starts}, {self.workdir.name}: {text}"
        self.note(f"  PROBLEM {text}")
        self.soak.problems.append(text)

    def count(self, what: str, kind: str) -> None:
        self.soak.counts[what][kind] += 1

    def strike(self, kind: str) -> None:
        self.note(f"  {kind}, step {last_step(self.workdir)} in the log")
        self.count("struck", kind)

    def start(self, argv: list[str], processes: int) -> Program:
        self.soak.starts += 1
        self.note(f"start {self.soak.starts}: {' '.join(argv)}")
        program = Program(self.folder, self.soak.starts, argv, processes)
        self.soak.programs.append(program)
        return program

    def steps(self) -> dict[int, pathlib.Path]:
        folders = self.workdir.glob("checkpoints/*")
        return {int(path.name): path for path in folders if path.name.isdecimal()}

    def keep(self, path: pathlib.Path) -> None:
        """Keeps a copy of a file or folder that is about to be damaged."""
        if path in self._kept:
            return
        kept = self.folder / "kept"
        kept.mkdir(exist_ok=True)
        copy = kept / str(len([*kept.iterdir()]))
        _copy(path, copy)
        self._kept[path] = copy

    # --- the start of a program, and its end

    def live(self) -> bool:
        """Starts or resumes the run, under faults; True at its end."""
        if self._begun and self._damage is None and self.rng.random() < 0.75:
            self._damage_files()
        whole = self._newest_whole()
        argv = ["--workdir", str(self.workdir), "--resume"]
        if not self._begun:
            argv = ["small.py", "--workdir", str(self.workdir)]
        before = last_step(self.workdir)
        program = self.start(argv, self.processes)
        struck = Fault("")
        if not self.soak.is_over() and self._moment(program, before):
            if self.rng.random() < 0.4:
                self.rng.choice(GENTLE if self.processes == 1 else PEER_GENTLE)(self, program)
            endings = ENDINGS if self.processes == 1 else ENDINGS + PEER_ENDINGS
            struck = self.rng.choice(endings)(self, program)
            self.strike(struck.kind)
        at = time.monotonic()
        try:
            statuses = program.ended(struck.seconds)
        except TimeoutError as error:
            self.problem(f"a process {error} of {struck.kind or 'its start'}")
            statuses = [-6]
        if struck.kind:
            self._took(struck.kind, at)
        self.disk.free()
        self.footprint = program.footprint
        self._begun = self._begun or (self.workdir / "run.json").exists()
        return self._judge(program, statuses, struck, whole)

    def _moment(self, program: Program, before: int) -> bool:
        """Waits for a random moment of the start, the steps or an evaluation.

        False if the program has ended before.
        """
        where = self.rng.random()
        if where < 0.2:
            deadline = time.monotonic() + self.rng.uniform(0, 12)
            return program.until(lambda: time.monotonic() > deadline)
        at = min(STEPS, before + self.rng.randint(0, 7))
        if where < 0.3:
            at = min(STEPS, (before // EVAL_EVERY + 1) * EVAL_EVERY)
        # Until the program begins, the log may have records that it drops.
        reached = program.until(lambda: BEGINNING.search(program.out()) is not None)
        reached = reached and program.until(lambda: last_step(self.workdir) >= at)
        time.sleep(self.rng.uniform(0, 0.1))
        return reached and program.runs()

    def _judge(self, program: Program, statuses: list[int], struck: Fault, whole: int) -> bool:
        """Judges how a program has ended; True at the end of the run."""
        out, errors = program.out(), program.errors()
        sentence = "; ".join(x for x in errors.splitlines() if x.startswith("train.py: "))
        self.note(f"  statuses {statuses} {sentence}")
        beginning = BEGINNING.search(out)
        if beginning:
            for fault in self._ended_by:
                self.count("resumed", fault.kind)
            self._ended_by = []
        if beginning and int(beginning[1]) < whole:
            self.problem(f"the run begins at step {beginning[1]}, though step {whole} is whole")
        # A signal that comes while Python imports ends it in Python's own way.
        is_importing = struck.kind in SIGNALS and not IN_MAIN.search(errors) and not out
        if "Traceback" in errors and not struck.of_peer and not is_importing:
            self.problem(f"a traceback after {struck.kind or self._damage}")

        is_stopped = "SIGTERM: saved" in out or bool(STOPPED & {*statuses})
        is_stopped = is_stopped or is_importing and any(statuses)
        is_done = not any(statuses) and not is_stopped
        is_refused = not (is_done or is_stopped or -9 in statuses or struck.of_peer)
        if beginning or is_refused or not self._damage:  # the data, whatever became of it
            self._repair(lambda path: self.workdir not in path.parents)
        if not is_refused or struck.kind or self._damage:
            self.refusals = 0
        if is_refused:
            self._refused(sentence or errors[-300:], struck, program, bool(beginning))
        elif struck.kind and is_done:
            self.count("resumed", struck.kind)
        elif struck.kind:
            self._ended_by.append(struck)
        if beginning:
            self._went_on(int(beginning[1]))
        return is_done

    def _went_on(self, step: int) -> None:
        """Notes that the run has begun at a step: newer steps are written anew."""
        if self._damage:
            self.count("resumed", self._damage.kind)
            self._damage = None
        of_step = {path: STEP.search(str(path)) for path in self._kept}
        for path, found in of_step.items():
            if found is None or int(found[1]) > step:
                del self._kept[path]

    def _refused(self, sentence: str, struck: Fault, program: Program, begun: bool) -> None:
        """Judges the sentence of a program that has ended by itself.

        What kept it from the beginning is repaired.
        """
        self.refusals += 1
        damage = self._damage or Fault("")
        if any(word in sentence for word in struck.words):
            self.count("refused", struck.kind)
            return
        if any(word in sentence for word in damage.words):
            self.count("refused", damage.kind)
            self._took(damage.kind, program.began)
        else:
            kind = damage.kind or struck.kind or "no fault"
            self.problem(f"{kind} is not named: {sentence!r}")
        self._damage = None
        if begun:
            return
        self._repair(lambda path: True)
        for path in self.strange:
            if path.name in sentence:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _took(self, kind: str, since: float) -> None:
        longest = self.soak.longest
        longest[kind] = max(longest.get(kind, 0), time.monotonic() - since)

    def _repair(self, which: Callable[[pathlib.Path], bool]) -> None:
        """Puts back what was damaged."""
        for path in [path for path in self._kept if which(path)]:
            copy = self._kept.pop(path)
            if not path.parent.exists():  # of a step that has been deleted since
                continue
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
            _copy(copy, path)

    def _damage_files(self) -> None:
        if not self.soak.is_over():
            self._damage = self.rng.choice(FILE_FAULTS)(self)
        if self._damage:
            self.strike(self._damage.kind)

    def _newest_whole(self) -> int:
        """The newest step whose files have the right checksums; 0 without one."""
        manifests = self.workdir / "checkpoint_manifests"
        return max(
            (
                step
                for step, folder in self.steps().items()
                if (manifests / f"{step}.json").exists()
                and not check_manifest(folder, manifests / f"{step}.json")
            ),
            default=0,
        )


# --- all of it


def soak(
    folder: pathlib.Path, *, seed: int, faults: int, minutes: float, processes: tuple[int, ...]
) -> Soak:
    """Soaks; the result has the counts and the problems.

    Args:
      folder: an empty folder.
      faults: the most faults that are struck.
      minutes: no fault is struck after so many.
      processes: how many processes each run has, one run after the other.
    """
    (folder / "printed").mkdir()
    write_data(folder)
    deadline = time.monotonic() + 60 * minutes
    disk = Disk(folder / "disk")
    result = Soak(folder, disk, random.Random(seed), faults, deadline)
    try:
        undisturbed = {}
        first = None
        number = 0
        for count in itertools.cycle(processes):
            if result.is_over():
                break
            number += 1
            if count not in undisturbed:
                undisturbed[count] = straight(result, count)
            run = Run(result, disk.folder / f"run{number}", count)
            if first is None:
                first = undisturbed[count].footprint
            finish(run, undisturbed[count].workdir)
            print(f"{time.strftime('%X')}  run {number}, processes: {count}: "
                  f"{result.counts['struck'].total()} faults, {result.starts} starts, "
                  f"{len(result.problems)} problems", flush=True)  # fmt: skip
        print(result.table())
        print(f"{result.finished} of {number} runs are the undisturbed one, byte for byte")
        print(f"first process: {first}; last process: {run.footprint}")
    finally:
        for program in result.programs:
            program.end()
        disk.close()
    return result


def straight(soak: Soak, processes: int) -> Run:
    """Trains a run that nothing disturbs."""
    run = Run(soak, soak.folder / f"straight{processes}", processes)
    program = run.start(["small.py", "--workdir", str(run.workdir)], processes)
    statuses = program.ended(3 * LIMIT)
    if any(statuses):
        raise RuntimeError(f"an undisturbed run ends with {statuses}: {program.errors()}")
    run.footprint = program.footprint
    return run


def finish(run: Run, undisturbed: pathlib.Path) -> None:
    """Resumes a run to its end, and compares it with the undisturbed one."""
    while not run.live():
        if run.refusals > 5:
            run.problem("the run goes on no more")
            return
    run.exempt_steps |= {row["step"] for row in rows(run.workdir) if "eval_failed" in row}
    try:
        found = differences(run.workdir, undisturbed, run.exempt_steps)
    except (OSError, ValueError) as error:
        found = [str(error)]
    if found:
        run.problem(f"the run is another one: {'; '.join(found[:5])}")
        return
    run.soak.finished += 1
    shutil.rmtree(run.workdir)


def long_run(folder: pathlib.Path, steps: int) -> str:
    """Trains a run of many steps in one process: what it holds early, and at its end."""
    (folder / "printed").mkdir()
    write_data(folder)
    workdir = folder / "long"
    argv = ["small.py", "--workdir", str(workdir), "--steps", str(steps)]
    program = Program(folder, 0, argv)
    held = []
    for step in (steps // 10, steps - 1):
        while program.runs() and last_step(workdir) < step:
            time.sleep(0.5)
        footprint = Footprint()
        footprint.sample(program.processes[0].pid)
        held.append(f"{footprint} by step {step}")
    if program.ended(LIMIT) != [0]:
        raise RuntimeError(f"the long run failed: {program.errors()}")
    return "; ".join(held)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--faults", type=int, default=10**6, help="the most faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 1],
                        help="how many each run has, one run after the other")  # fmt: skip
    parser.add_argument("--long-run", type=int, metavar="STEPS",
                        help="instead: one run of so many steps, to see what it holds")  # fmt: skip
    parser.add_argument("--folder", type=pathlib.Path, help="kept; a new or empty folder")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # frees the disk
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or pathlib.Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if args.long_run:
            print(long_run(folder, args.long_run))
            return 0
        result = soak(folder, seed=args.seed, faults=args.faults, minutes=args.minutes,
                      processes=tuple(args.processes))  # fmt: skip
    print("\n".join(["", f"{len(result.problems)} problems", *result.problems]))
    return min(1, len(result.problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
