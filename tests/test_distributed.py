"""Runs over several processes: the same numbers as one, and every process ends when one does."""

import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest

from mammut.config import MeshConfig
from mammut.core import distributed, sharding
from mammut.core.distributed import Processes
from mammut.training.run_folder import position_of_all, position_of_one, read_run
from mammut.training.step import make_trainer
from mammut.training.tasks import ImageTextTask
from mammut.weights.checkpoints import Checkpoints, Restored
from mammut.weights.model_folder import load

pytestmark = pytest.mark.long

# What the library that connects processes prints of its own: several threads write its pieces,
# which may come in any order, and leave empty lines.
GLOO = re.compile(
    r"(\[Gloo\] Rank | is connected to | peer ranks\. |"
    r"Expected number of connected peer ranks is : |\d+)*"
)

ROOT = pathlib.Path(__file__).parents[1]
STEPS, BATCH, EVERY = 16, 8, 4
RECIPE = f"""
from mammut.config import (
    DataConfig, DecoderConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig, VisionConfig
)


def get_config():
    size = dict(width=16, num_heads=2, mlp_dim=32, depth=1)
    return TrainConfig(
        model=ModelConfig(
            vision=VisionConfig(image_size=16, patch_size=8, **size),
            text=DecoderConfig(vocab_size=64, max_length=16, cross_attn_every=1, **size),
        ),
        data=DataConfig(train="jsonl:set.jsonl[4:]", val="jsonl:set.jsonl[4:]",
                        batch_size={BATCH}, eval_batch_size=8,
                        threads=1, val_examples=8, max_bad_share=0.5),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        mesh=MeshConfig(data=2, fsdp=2),
        steps={STEPS}, log_every=1, eval_every=0, checkpoint_every={EVERY},
    )
"""
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "SLURM_STEP_NUM_TASKS"}
ENVIRONMENT |= {
    "XLA_FLAGS": " ".join(
        flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag
    ),
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "PYTHONPATH": str(ROOT),
}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def start(folder: pathlib.Path, *argv: str, devices: int = 1) -> subprocess.Popen:
    environment = ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": str(devices)}
    return subprocess.Popen([sys.executable, *argv], cwd=folder, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def start_two(folder: pathlib.Path, *argv: str, devices: int = 1) -> list[subprocess.Popen]:
    """Two processes of one program, told of each other."""
    where = ["--coordinator", f"localhost:{free_port()}", "--num-processes", "2", "--process-id"]
    return [start(folder, *argv, *where, str(index), devices=devices) for index in range(2)]


def ended(processes: list[subprocess.Popen], seconds: float = 1200) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of processes that all have to end."""
    deadline, results = time.monotonic() + seconds, []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(1, deadline - time.monotonic()))
            results.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return results


def own_lines(out: str) -> list[str]:
    """The lines that a process printed, without those of the library that connects processes."""
    return [line for line in out.splitlines() if not GLOO.fullmatch(line)]


class Runs:
    """Runs of one recipe in one folder, by one process of four devices or by two of two."""

    def __init__(self, folder: pathlib.Path):
        from PIL import Image

        self.folder = folder
        (folder / "small.py").write_text(RECIPE)
        rng, lines = np.random.default_rng(0), []
        for i in range(44):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{i}.png")
            lines.append(
                {"file": f"{i}.png", "captions": [f"picture {i} of the set", f"this is number {i}"]}
            )
        (folder / "10.png").write_bytes(b"no picture")
        (folder / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def argv(self, workdir: str, *more: str) -> list[str]:
        first = [] if "--resume" in more else ["small.py"]
        return [
            str(ROOT / "train.py"),
            *first,
            "--workdir",
            workdir,
            *more,
            "--compilation-cache",
            "xla",
        ]

    def one(self, workdir: str, *more: str) -> str:
        """What a run by one process prints."""
        ((code, out, err),) = ended([start(self.folder, *self.argv(workdir, *more), devices=4)])
        assert code == 0, out + err
        return out

    def two(self, workdir: str, *more: str) -> list[subprocess.Popen]:
        return start_two(self.folder, *self.argv(workdir, *more), "--peer-timeout", "30", devices=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def by_one(runs) -> pathlib.Path:
    """The folder of a run that one process of four devices has done."""
    runs.one("by_one")
    return runs.folder / "by_one"


def rows(workdir: pathlib.Path) -> list[dict[str, float]]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def until(condition: Callable[[], bool], processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 1200
    while not condition():
        assert all(process.poll() is None for process in processes), [
            process.communicate() for process in processes
        ]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def restore(workdir: pathlib.Path) -> Restored:
    config, _ = read_run(workdir)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with Checkpoints(workdir, keep=config.keep_checkpoints) as checkpoints:
        return checkpoints.restore(
            make_trainer(config, ImageTextTask(config.loss), mesh).abstract_state
        )


def assert_same_run(workdir: pathlib.Path, expected: pathlib.Path) -> None:
    """The same losses, scores, parameters and position in the data, up to the order of sums."""
    got, want = restore(workdir), restore(expected)
    assert got.step == want.step == STEPS and got.data == want.data  # bad examples are counted once
    for (path, x), y in zip(
        jax.tree.leaves_with_path(got.state.params), jax.tree.leaves(want.state.params), strict=True
    ):
        # The gradient of a key's bias is zero but for rounding, which Adam makes as large as any.
        atol = (
            5e-3
            if "key" in jax.tree_util.keystr(path) and "bias" in jax.tree_util.keystr(path)
            else 1e-4
        )
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))
    learned = {}
    for row in rows(expected):
        learned[row["step"]] = learned.get(row["step"], {}) | row
    assert {row["step"] for row in rows(workdir)} == {*range(1, STEPS + 1)}
    for row in rows(workdir):
        for name, value in row.items():
            if name.startswith("train/loss"):
                assert value == pytest.approx(learned[row["step"]][name], rel=1e-5), (
                    row["step"],
                    name,
                )
            elif name.startswith("eval/"):
                assert value == pytest.approx(learned[row["step"]][name], abs=1e-6), name
    (model, processor), (same, _) = load(workdir), load(expected)
    assert model.config == same.config
    texts = ["picture 7 of the set"]
    tokens, valid = processor.encode_text(texts)
    np.testing.assert_allclose(
        model.encode_text(tokens, valid), same.encode_text(tokens, valid), atol=1e-4
    )


# --- runs


def test_two_processes_lose_one_are_terminated_and_one_process_ends_what_they_began(runs, by_one):
    """kill -9, SIGTERM, then a resume by one process of as many devices: the undisturbed run."""
    workdir = runs.folder / "by_two"
    pair = runs.two("by_two")
    # Written beside the steps: a run that is killed before is begun again.
    first_saved = workdir / "checkpoint_manifests" / f"{EVERY}.json"
    until(lambda: any(row["step"] > EVERY for row in rows(workdir)) and first_saved.exists(), pair)
    pair[1].kill()
    (code, out, err), (killed, other_out, _) = ended(pair, 120)
    assert killed == -signal.SIGKILL and code not in (0, None)
    assert (
        "train.py: the processes cannot go on together" in err
        or "distributed service detected fatal errors" in err
    )
    assert f"starting at step 0 of {STEPS} in by_two" in out and "starting" not in other_out
    assert not (workdir / "manifest.json").exists()

    pair = runs.two("by_two", "--resume")
    while not pair[0].stdout.readline().startswith("mesh: "):
        assert pair[0].poll() is None, pair[0].communicate()
    pair[1].send_signal(signal.SIGTERM)  # long before the first step
    # Not by `communicate`, which leaves out the lines that were read ahead with the last one.
    out = pair[0].stdout.read()
    (code, _, err), (other, other_out, other_err) = ended(pair)
    assert code == other == 75, err + other_err
    began = int(re.search(rf"resuming at step (\d+) of {STEPS} in by_two", out)[1])
    stopped = int(re.search(r"SIGTERM: saved step (\d+), go on with --resume", out)[1])
    assert began % EVERY == 0 and stopped == began + 1 and "SIGTERM: saved" not in other_out
    assert restore(workdir).step == stopped

    out = runs.one("by_two", "--resume")
    assert f"resuming at step {stopped} of {STEPS}" in out
    assert_same_run(workdir, by_one)
    assert re.search(r"examples that could not be used: \d+ corrupt", out)


def test_two_processes_end_what_one_began(runs, by_one):
    began = STEPS - EVERY
    workdir = runs.folder / "begun"
    shutil.copytree(by_one, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    (workdir / "checkpoint_manifests" / f"{STEPS}.json").unlink()
    (code, out, err), (other, other_out, other_err) = ended(runs.two("begun", "--resume"))
    assert code == other == 0, err + other_err
    assert (
        f"resuming at step {began} of {STEPS}" in out and "model saved: mammut.load('begun')" in out
    )
    assert not own_lines(other_out)
    assert_same_run(workdir, by_one)
    manifests = {path.name for path in (workdir / "checkpoint_manifests").iterdir()}
    assert manifests == {f"{began}.json", f"{STEPS}.json"}


def test_processes_that_are_asked_for_different_runs_all_end_before_anything_is_written(runs):
    where = ["--coordinator", f"localhost:{free_port()}", "--num-processes", "2", "--process-id"]
    pair = [
        start(runs.folder, *runs.argv("differs", "--seed", str(i)), *where, str(i), devices=2)
        for i in range(2)
    ]
    (code, _, err), (other, _, other_err) = ended(pair)
    assert code == other == 1
    assert other_err == (
        "train.py: this process was asked for another run than process 0: "
        "seed is 1, it was 0 there\n"
    )
    assert err.startswith(
        "train.py: process 1 has ended: this process was asked for another run than process 0"
    )
    assert not (runs.folder / "differs").exists()


@pytest.mark.parametrize("override, message", [
    (["--mesh.data", "3"],
     "mesh.data x fsdp x model is 3 x 2 x 1, expected a product of 4 devices"),
    (["--data.batch-size", "6"],
     "data.batch_size / accumulation 6 does not divide over the 4 devices"),
])  # fmt: skip
def test_what_does_not_divide_ends_all_processes_in_one_sentence(runs, override, message):
    for code, _, err in ended(runs.two("undivided", *override)):
        assert code == 1 and message in err and "Traceback" not in err
    assert not (runs.folder / "undivided").exists()


def test_a_step_that_gets_no_data_ends_the_run_with_all_stacks(runs):
    """The first picture is a pipe that nobody writes to."""
    os.mkfifo(runs.folder / "pipe.png")
    line = {"file": "pipe.png", "captions": ["nothing"]}
    (runs.folder / "pipe.jsonl").write_text("\n".join([json.dumps(line)] * 8))
    argv = runs.argv(
        "stuck", "--data.train", "jsonl:pipe.jsonl", "--data.val", "None", "--step-timeout", "15"
    )
    ((code, _, err),) = ended([start(runs.folder, *argv, devices=4)])
    assert code == 1
    last = err.strip().splitlines()[-1]
    assert last == (
        "train.py: waiting for the batch of step 1: no progress for 15 s, "
        "the limit that step_timeout sets"
    )
    assert err.count("Thread 0x") > 1 and "batches.py" in err and "in loop" in err


# --- how processes end together, without a model

PROGRAM = """
import os, signal, sys, time
from mammut.core import distributed
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
index = int(options["--process-id"])
count = int(options["--num-processes"])
settings = distributed.Processes(False, options["--coordinator"], count, index, TIMEOUT)
with distributed.processes(settings, "program"):
    BODY
print("done")
"""


def run_two(folder: pathlib.Path, body: str, timeout: float = 20) -> list[subprocess.Popen]:
    path = folder / "program.py"
    path.write_text(
        PROGRAM.replace("TIMEOUT", str(timeout)).replace("BODY", "\n    ".join(body.splitlines()))
    )
    return start_two(folder, str(path), devices=2)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_process_ends_the_other_too_with_a_sentence_each(tmp_path, failing):
    body = f"if index == {failing}: raise ValueError('the file x is bad')\n"
    body += "distributed.barrier('never')"
    results = ended(run_two(tmp_path, body), 60)
    code, out, err = results[failing]
    assert code == 1 and not out and err == "program: the file x is bad\n"
    code, out, err = results[1 - failing]
    assert (
        code == 1
        and not out
        and err == f"program: process {failing} has ended: the file x is bad\n"
    )


@pytest.mark.parametrize("failing", [0, 1])
def test_a_write_that_fails_on_one_process_ends_all_though_the_others_wait_for_it(
    tmp_path, failing
):
    body = f"""
import dataclasses, resource, jax, numpy as np
from mammut.weights.checkpoints import Checkpoints
@dataclasses.dataclass
class State:
    params: dict
    frozen: dict
mesh = jax.make_mesh((4,), ("data",))
shards = jax.NamedSharding(mesh, jax.P("data"))
array = jax.make_array_from_callback((4, 99_999), shards, lambda at: np.ones((1, 99_999)))
with Checkpoints({str(tmp_path)!r}, keep=2) as checkpoints:
    if index == {failing}:  # fails a write as a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    checkpoints.save(1, State({{"array": array}}, {{}}), {{}})
    checkpoints.wait()"""
    results = ended(run_two(tmp_path, body), 300)  # Orbax would wait for 1,200 s
    sentence = "step 1 could not be saved: .*File too large.*"
    code, _, err = results[failing]
    # tensorstore may print tracebacks of its own.
    assert code == 1 and re.search(f"^program: {sentence}$", err, re.M), err
    code, _, err = results[1 - failing]
    assert code == 1
    assert re.fullmatch(f"program: process {failing} has ended: {sentence}\n", err), err


def test_a_defect_is_shown_with_its_traceback_and_ends_all(tmp_path):
    first, second = ended(
        run_two(tmp_path, "if index: {}['gone']\ndistributed.barrier('never')"), 60
    )
    assert first[0] == second[0] == 1
    assert "Traceback" in second[2] and second[2].endswith("program: KeyError: 'gone'\n")
    assert first[2] == "program: process 1 has ended: KeyError: 'gone'\n"


def test_what_one_process_gives_and_what_all_give_is_the_same_for_all(tmp_path):
    body = """
value = distributed.broadcast_from_first("value", lambda: b"x" * 9_000_000 + str(index).encode())
print(len(value), value[-1:], distributed.gather("all", {"index": index}), distributed.first())
distributed.say("once")"""
    (code, out, err), (other, other_out, _) = ended(run_two(tmp_path, body), 60)
    assert code == other == 0, err
    assert out == "9000001 b'0' [{'index': 0}, {'index': 1}] True\nonce\ndone\n"
    assert other_out == "9000001 b'0' [] False\ndone\n"


def test_what_fails_alike_everywhere_is_told_from_what_fails_on_one_alone(tmp_path):
    body = """
print(distributed.same_everywhere("a", "cause", 60))
print(distributed.same_everywhere("b", f"cause {index}", 60))
distributed.barrier("b")
if index == 1:
    print(distributed.same_everywhere("c", "cause", 0.5))
distributed.barrier("c")
"""
    outs = [out.split() for code, out, _ in ended(run_two(tmp_path, body)) if code == 0]
    assert [[word for word in out if word in ("True", "False")] for out in outs] == [
        ["True", "False"],
        ["True", "False", "False"],
    ]


def test_each_process_reads_the_rows_that_its_devices_hold(tmp_path):
    """Where the axis `model` goes across processes, all rows; over the devices each row once."""
    body = """
import jax, numpy as np
from mammut.core import sharding
from mammut.config import MeshConfig
for sizes in ((4, 1, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4)):
    mesh = sharding.make_mesh(MeshConfig(*sizes))
    shard_index, shard_count = distributed.batch_shard(mesh)
    rows = np.arange(8)[shard_index::shard_count]
    batch = sharding.device_batch({"x": rows}, mesh)["x"]
    total = jax.jit(lambda x: (x * x).sum(), out_shardings=jax.NamedSharding(mesh, jax.P()))(batch)
    print(shard_index, shard_count, batch.shape, int(total))"""
    results = ended(run_two(tmp_path, body), 120)
    for index, (code, out, err) in enumerate(results):
        assert code == 0, err
        assert own_lines(out) == [f"{index} 2 (8,) 140"] * 4 + ["0 1 (8,) 140", "done"]


def test_a_process_that_is_stopped_ends_the_others_within_the_limit_and_itself_when_it_goes_on(
    tmp_path,
):
    pair = run_two(
        tmp_path,
        "if index: os.kill(os.getpid(), signal.SIGSTOP)\ndistributed.barrier('never')",
        timeout=3,
    )
    out, err = pair[0].communicate(timeout=60)
    assert pair[0].returncode not in (0, None) and "stopped sending heartbeats" in err
    assert "Thread 0x" in err or "program: the processes cannot go on together" in err
    pair[1].send_signal(signal.SIGCONT)
    ((code, _, _),) = ended(pair[1:], 60)
    assert code not in (0, None)


def test_processes_that_do_not_come_together_are_waited_for_so_long_and_no_longer(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM.replace("TIMEOUT", "1").replace("BODY", "pass"))
    nobody = ["--coordinator", f"localhost:{free_port()}", "--num-processes", "2", "--process-id"]
    pair = [start(tmp_path, "program.py", *nobody, "1")]
    alone = ["--coordinator", f"localhost:{free_port()}", "--num-processes", "2", "--process-id"]
    pair.append(start(tmp_path, "program.py", *alone, "0"))
    for (code, _, err), where in zip(ended(pair, 60), (nobody[1], alone[1]), strict=True):
        assert code == 1 and err.count("\n") == 1
        assert err.startswith(
            f"program: not all processes came together at {where} within 3 s (three times "
            f"--peer-tim"
        )


def test_processes_that_count_differently_all_end(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM.replace("TIMEOUT", "20").replace("BODY", "pass"))
    where = ["--coordinator", f"localhost:{free_port()}", "--num-processes"]
    pair = [
        start(tmp_path, "program.py", *where, str(2 + i), "--process-id", str(i)) for i in range(2)
    ]
    message = (
        "process 1 is one of 3, process 0 one of 2: expected the same --num-processes everywhere\n"
    )
    (code, _, err), (other, _, other_err) = ended(pair, 60)
    assert code == other == 1 and other_err == f"program: {message}"
    assert err == f"program: process 1 has ended: {message}"


def test_workers_of_a_program_connect_nothing(tmp_path):
    """Neither by importing train.py, as spawned ones do, nor by asking to."""
    (tmp_path / "workers.py").write_text("""
import multiprocessing
import train

def work(queue):
    import jax
    from jax._src import xla_bridge
    from mammut.core import distributed
    connected = jax.distributed.is_initialized(), xla_bridge.backends_are_initialized()
    try:
        train.main(["--coordinator", "localhost:1", "--num-processes", "2", "--process-id", "0"])
    except RuntimeError as error:
        queue.put((connected, str(error)))

if __name__ == "__main__":
    for kind in ("spawn", "fork"):
        context = multiprocessing.get_context(kind)
        queue = context.Queue()
        worker = context.Process(target=work, args=[queue])
        worker.start()
        print(queue.get(timeout=60))
        worker.join()
""")
    ((code, out, err),) = ended([start(tmp_path, "workers.py")], 120)
    assert code == 0, err
    refusal = "the processes of a run are connected by its main process, not by a worker of it"
    assert out.splitlines() == [str(((False, False), refusal))] * 2


# --- what is asked for


@pytest.mark.parametrize("asked, message", [
    ({"cluster": True, "index": 0},
     "--distributed is given with --coordinator, --num-processes or --process-id"),
    ({"coordinator": "a:1", "count": 2},
     "--coordinator, --num-processes and --process-id go together"),
    ({"count": 2}, "--coordinator, --num-processes and --process-id go together"),
    ({"coordinator": "a", "count": 2, "index": 0},
     "--coordinator is 'a', expected HOST:PORT of process 0"),
    ({"coordinator": "a:x", "count": 2, "index": 0},
     "--coordinator is 'a:x', expected HOST:PORT of process 0"),
    ({"coordinator": "a:70000", "count": 2, "index": 0},
     "--coordinator is 'a:70000', expected HOST:PORT"),
    ({"coordinator": "a:1", "count": 2, "index": 2},
     "--process-id is 2 of --num-processes 2, expected 0 to 1"),
    ({"coordinator": "a:1", "count": 2, "index": -1},
     "--process-id is -1 of --num-processes 2, expected 0 to 1"),
    ({"timeout": 0.0}, "--peer-timeout is 0, expected 1 to 86400 seconds"),
    ({"timeout": float("nan")}, "--peer-timeout is nan, expected 1 to 86400 seconds"),
])  # fmt: skip
def test_processes_that_cannot_be_are_refused(asked, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Processes(**asked)


@pytest.mark.parametrize("variable, value, launcher", [
    ("SLURM_STEP_NUM_TASKS", "8", "Slurm (SLURM_STEP_NUM_TASKS) has started 8 processes"),
    ("OMPI_COMM_WORLD_SIZE", "2", "Open MPI (OMPI_COMM_WORLD_SIZE) has started 2 processes"),
    ("TPU_WORKER_HOSTNAMES", "a,b,c,d",
     "the TPU pod (TPU_WORKER_HOSTNAMES) has started 4 processes"),
])  # fmt: skip
def test_what_a_launcher_has_started_several_times_is_not_run_several_times_by_accident(
    monkeypatch, variable, value, launcher
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(
        ValueError, match=re.escape(launcher) + ": --distributed makes one run of them, --num-proc"
    ):
        with distributed.processes(Processes(), "program"):
            pass
    with pytest.raises(
        ValueError, match=re.escape(launcher) + ", expected one: eval.x does not divide its work"
    ):
        distributed.require_one_process("eval.x")
    with distributed.processes(Processes(count=1), "program"):
        assert not jax.distributed.is_initialized()


@pytest.mark.parametrize("variable, value", [
    ("SLURM_STEP_NUM_TASKS", "1"), ("SLURM_NTASKS", "8"),
    ("TPU_WORKER_HOSTNAMES", "localhost"), ("PATH", "/bin"),
])  # fmt: skip
def test_one_process_is_asked_for_nothing(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    distributed.require_one_process("eval.x")
    with distributed.processes(Processes(), "program"):
        assert not jax.distributed.is_initialized()


def test_a_cluster_that_is_none_is_an_error_that_says_what_else_to_give(tmp_path):
    code = (
        "from mammut.core.distributed import *\n"
        "with processes(Processes(cluster=True), 'program'): pass"
    )
    ((code, _, err),) = ended([start(tmp_path, "-c", code)], 60)
    assert (
        code == 1
        and "ValueError: --distributed found no processes of a TPU pod, Slurm or Open MPI" in err
    )
    assert err.strip().endswith("or --coordinator, --num-processes and --process-id")


def test_a_watchdog_lets_be_what_makes_progress_and_ends_what_makes_none(tmp_path):
    body = """
import time
from mammut.core.distributed import Watchdog
with Watchdog(3, "program") as watchdog:
    for i in range(50):
        time.sleep(0.1)
        watchdog.alive()
    print("alive")
    watchdog.doing("sleeping")
    time.sleep(60)"""
    started = time.monotonic()
    ((code, out, err),) = ended([start(tmp_path, "-c", body)], 60)
    assert code == 1 and out == "alive\n" and time.monotonic() - started > 7
    assert err.endswith(
        "program: sleeping: no progress for 3 s, the limit that step_timeout sets\n"
    )


def test_counts_of_all_shards_are_saved_and_taken_over_once():
    position = {"position": 64, "read": 40, "bad": {"corrupt": 3}}
    assert position_of_all(1, position, 0) == position
    shards = [position_of_one(position, shard_index) for shard_index in range(3)]
    assert sum(shard["read"] for shard in shards) == 40 and [
        shard["bad"] for shard in shards[1:]
    ] == [{}, {}]
    assert {shard["position"] for shard in shards} == {64} and list(
        itertools.chain(*shards[0]["bad"])
    ) != []
