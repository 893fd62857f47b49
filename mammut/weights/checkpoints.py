"""Checkpoints of a run: everything that a step changes.

The checkpoints are Orbax steps. Each is atomic, and its metadata has the position in the data.
Orbax restores a flipped bit silently. Each step therefore has a manifest of checksums, too, and
`restore` falls back to the newest step that passes. A step that a killed run has finished without
its manifest passes if it can be read. The frozen parameters are the same in all checkpoints: they
are written once, as safetensors with a manifest, to `frozen/`.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import os
import pathlib
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np

from mammut.core import distributed
from mammut.core.files import check_manifest, make_manifest, replacing, write_json
from mammut.core.params import by_name, path_name
from mammut.weights.files.tensor_file import (
    CheckpointError,
    TensorFile,
    open_tensors,
    write_safetensors,
)
from mammut.weights.opened import host_tensors, mismatches
from mammut.weights.orbax_log import orbax_log

_log = logging.getLogger(__name__)

_FROZEN_FILE = "frozen.safetensors"
_FROZEN_MANIFEST = "manifest.json"
_STEP = re.compile(r"[0-9]+")
_MANIFEST = re.compile(r"([0-9]+)\.json")
_Loaded = TypeVar("_Loaded")


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """Lists the steps under `workdir/checkpoints` by their folders' names, without reading them."""
    folders = (workdir / "checkpoints").glob("*")
    return sorted(int(x.name) for x in folders if _STEP.fullmatch(x.name) and x.is_dir())


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored checkpoint.

    It has a step, a state and a position in the data.
    """

    step: int
    state: Any
    data: Any


class Checkpoints:
    """The checkpoints of a run, under `workdir/checkpoints`.

    `save` returns once the arrays are copied from the devices; a background thread writes them. Of
    several processes, each saves and restores its part of the arrays; process 0 writes and checks
    the checksums.

    Args:
      workdir: the folder of the run.
      keep: how many of the newest checkpoints are kept; None: all. One more is there between two
        saves: the next save removes it, once the newest has its checksums.
      cleanup: removes what a killed run left half-written, and adds checksums that it left out.
        Only the run itself may ask for it: a reader would remove what the run is writing.
      saved: called on process 0, in the background, when a step and its checksums are written.

    Raises:
      CheckpointError: Orbax cannot open the folder, since a step is damaged.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        keep: int | None,
        *,
        cleanup: bool = False,
        saved: Callable[[], None] | None = None,
    ):
        from orbax.checkpoint import v1 as ocp

        orbax_log.open()
        self._folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self._frozen = self._folder.parent / "frozen"
        self._manifests = self._folder.parent / "checkpoint_manifests"
        self._keep = keep
        self._owned = cleanup
        self._saved = saved
        # Orbax keeps all: it would remove an old step before the new one has its checksums.
        all_steps = ocp.training.preservation_policies.PreserveAll()
        try:
            self._checkpointer = ocp.training.Checkpointer(
                self._folder, preservation_policy=all_steps, cleanup_tmp_directories=cleanup
            )
        except ValueError as error:  # Orbax reads a little of every step here
            damaged = [
                str(step)
                for step, path in self._manifest_files().items()
                if check_manifest(self._folder / str(step), path)
            ]
            raise CheckpointError(
                f"{self._folder} cannot be opened ({error}): "
                f"remove its damaged steps, {', '.join(damaged)}"
            ) from error
        # Steps newer than the one restored: they are damaged or unchecked.
        self._left_behind: list[int] = []
        self._writing: threading.Thread | None = None
        self._error: OSError | None = None
        self._has_saved = False

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        # Once this process has failed, a write that needs the other processes, too, may never end:
        # the step is left half-written.
        if kind is None:
            self.close()
        elif jax.process_count() == 1:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                self.close()

    @property
    def steps(self) -> list[int]:
        """The saved steps, oldest first."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, step: int, state: Any, data: Any) -> None:
        """Saves one step.

        The first save of a run also writes the frozen parameters, before it returns. A second save
        of a step does nothing. An error of an earlier background write is raised here, unless
        `poll` has raised it.

        Args:
          step: the number of the step.
          state: the `TrainState`.
          data: the position in the data, as JSON values; process 0 saves its own.
        """
        self.wait()
        for newer in self._left_behind:  # Orbax saves no step that is older than an existing one
            self._checkpointer.delete(newer, missing_ok=True)
        self._left_behind = []
        if step in self.steps:
            return
        self._remove_old()
        # Either all processes have to take part or none, so they use the list of process 0: the
        # list of another process may be a moment older.
        if state.frozen:
            is_later = distributed.broadcast_from_first(
                f"frozen/{step}", lambda: b"1" if self.steps else b""
            )
            if not is_later:
                self._save_frozen(state.frozen)
        self._manifests.mkdir(parents=True, exist_ok=True)
        saved = {"state": _changing(state)}
        if jax.process_count() > 1:
            orbax_log.failed = functools.partial(self._fail, step)
        response = self._checkpointer.save_checkpointables_async(
            step, saved, custom_metadata={"data": data}
        )
        self._has_saved = True
        self._writing = threading.Thread(target=self._finish, args=(step, response), daemon=True)
        self._writing.start()

    def _finish(self, step: int, response: Any) -> None:
        try:
            response.result()
            if distributed.first():  # Orbax has waited for all processes
                self._write_manifest(step)
                if self._saved:
                    self._saved()
        except BaseException as error:
            self._fail(step, error)
        finally:
            orbax_log.failed = None

    def _fail(self, step: int, cause: BaseException) -> None:
        error = OSError(f"step {step} could not be saved: {_reason(cause)}")
        error.__cause__ = cause
        self._error = error

    def _write_manifest(self, step: int) -> None:
        folder = self._folder / str(step)
        self._manifests.mkdir(parents=True, exist_ok=True)
        write_json(self._manifests / f"{step}.json", make_manifest(folder, _files(folder)))

    def _manifest_files(self) -> dict[int, pathlib.Path]:
        """Finds the manifests by their step; files of other names are not ours."""
        found = {}
        for path in sorted(self._manifests.glob("*.json")):
            if match := _MANIFEST.fullmatch(path.name):
                found[int(match[1])] = path
        return found

    def _remove_old(self) -> None:
        """Removes all but the newest `keep` steps; all of them are whole."""
        if self._keep is not None:
            for old in self.steps[: -self._keep]:
                self._checkpointer.delete(old, missing_ok=True)
        if distributed.first():
            for step, manifest in self._manifest_files().items():
                if step not in self.steps:
                    manifest.unlink(missing_ok=True)

    def _save_frozen(self, frozen: Any) -> None:
        specs, read = host_tensors(by_name(frozen))
        if not distributed.first():
            for name in specs:
                read(name)
            return
        with replacing(self._frozen, _FROZEN_MANIFEST) as new:
            write_safetensors(new / _FROZEN_FILE, specs, read)
            write_json(new / _FROZEN_MANIFEST, make_manifest(new, [new / _FROZEN_FILE]))

    def _frozen_problems(self) -> bytes:
        return "; ".join(check_manifest(self._frozen, self._frozen / _FROZEN_MANIFEST)).encode()

    def _open_frozen(self, problems: bytes) -> TensorFile:
        if problems:
            raise CheckpointError(
                f"{self._frozen}, the frozen parameters of the run, is damaged: {problems.decode()}"
            )
        return open_tensors(self._frozen / _FROZEN_FILE)

    def poll(self) -> None:
        """Raises the error of a background write that has failed; waits for nothing."""
        if self._error is not None:
            self.wait()

    def wait(self) -> None:
        """Waits for the background write, and raises its error.

        Raises:
          OSError: the step could not be saved, for example since the disk is full.
        """
        if self._writing is not None:
            # A thread whose write has failed may wait for other processes, which wait elsewhere.
            while self._writing.is_alive() and self._error is None:
                self._writing.join(0.1)
            self._writing = None
        if self._error is not None:
            error = self._error
            self._error = None
            raise error

    def close(self) -> None:
        """Waits for the background write, then closes the folder."""
        self.wait()
        if self._has_saved:
            self._remove_old()
        self._checkpointer.close()

    def restore(self, abstract_state: Any) -> Restored:
        """Restores the newest good checkpoint.

        Args:
          abstract_state: shapes, types and shardings of the `TrainState`.

        Raises:
          CheckpointError: there is no good checkpoint, or the saved state is of another model or
            optimizer.
        """
        changing = _changing(abstract_state)

        def load(step: int) -> tuple[Any, Any]:
            saved = self._checkpointer.checkpointables_metadata(step)
            if problems := _mismatches(saved.metadata["state"], changing):
                raise CheckpointError(
                    f"{self._folder / str(step)} does not fit this run's model and optimizer: "
                    f"{'; '.join(problems)}"
                )
            loaded = self._checkpointer.load_checkpointables(step, {"state": changing})
            return loaded["state"], saved.custom_metadata["data"]

        # One process reads all files for their checksums; all processes restore the same step.
        step, (state, data) = self._newest_good(_of_first(self._candidates()), load)
        frozen = {}
        if abstract_state.frozen:
            frozen = self._restore_frozen(abstract_state.frozen)
        self._left_behind = [newer for newer in self.steps if newer > step]
        if self._owned and distributed.first() and step not in self._manifest_files():
            self._write_manifest(step)
        return Restored(step, abstract_state.replace(**state, frozen=frozen), data)

    def _restore_frozen(self, abstract: Any) -> Any:
        # One process reads the file for its checksum.
        file = self._open_frozen(distributed.broadcast_from_first("frozen", self._frozen_problems))
        if problems := mismatches(file.specs, by_name(abstract), "is left over"):
            raise CheckpointError(
                f"{file.path} does not fit this run's model: {'; '.join(problems)}"
            )

        def put(path, leaf):
            array = file.read(path_name(path))
            # A copy of the mapped memory: an array on the CPU may share it, and a training step
            # gives the memory of its state away.
            return jax.make_array_from_callback(
                leaf.shape, leaf.sharding, lambda index: np.array(array[index])
            )

        return jax.tree_util.tree_map_with_path(put, abstract)

    def restore_params(self) -> dict[str, np.ndarray]:
        """Reads the parameters of the newest good checkpoint.

        They are arrays on the host, by name.

        Nothing else of the checkpoint is read. Frozen parameters are views of their file.

        Raises:
          CheckpointError: there is no good checkpoint, or the frozen parameters are damaged.
        """
        from orbax.checkpoint import v1 as ocp

        def load(step: int) -> dict[str, np.ndarray]:
            saved = self._checkpointer.checkpointables_metadata(step).metadata["state"]["params"]
            abstract = {"params": jax.tree.map(lambda x: np.empty(x.shape, x.dtype), saved)}
            context = ocp.Context()
            context.pytree.loading.partial_load = True
            with context:
                loaded = self._checkpointer.load_checkpointables(step, {"state": abstract})
            return by_name(loaded["state"]["params"])

        _, params = self._newest_good(self._candidates(), load)
        if self._frozen.exists():
            file = self._open_frozen(self._frozen_problems())
            params |= {name: file.read(name) for name in file.specs}
        return params

    def _newest_good(
        self, candidates: Iterator[tuple[int, bool]], load: Callable[[int], _Loaded]
    ) -> tuple[int, _Loaded]:
        """Loads the newest good step."""
        for step, checked in candidates:
            if checked:
                return step, load(step)
            try:
                loaded = load(step)
            except Exception as error:
                message = (
                    f"checkpoint {step} has no checksums and cannot be read ({_reason(error)})"
                )
                if jax.process_count() > 1:  # the others may have read their part
                    raise CheckpointError(
                        f"{message}: remove {self._folder / str(step)}"
                    ) from error
                _log.warning("%s: trying the one before", message)
            else:
                _log.warning(
                    "checkpoint %d has no checksums, as the run was killed before they were "
                    "written: it can be read, and is used",
                    step,
                )
                return step, loaded
        damaged = ""
        if self.steps:
            damaged = f": all of {self.steps} are damaged"
        raise CheckpointError(f"{self._folder} holds no good checkpoint{damaged}")

    def _candidates(self) -> Iterator[tuple[int, bool]]:
        """Lists the steps that may be good, newest first, and whether checksums say so."""
        manifests = self._manifest_files()
        for step in reversed(self.steps):
            if step not in manifests:
                yield step, False
            elif problems := check_manifest(self._folder / str(step), manifests[step]):
                _log.warning(
                    "checkpoint %d is damaged (%s): trying the one before", step, problems[0]
                )
            else:
                yield step, True


def _of_first(candidates: Iterator[tuple[int, bool]]) -> Iterator[tuple[int, bool]]:
    """Lists the candidates of process 0, on every process."""
    for number in itertools.count():
        candidate = json.loads(
            distributed.broadcast_from_first(
                f"restored/{number}", lambda: json.dumps(next(candidates, None)).encode()
            )
        )
        if candidate is None:
            return
        yield candidate


def _reason(error: BaseException) -> str:
    """Returns the beginning of an error's text; Orbax writes whole pages."""
    return (str(error) or type(error).__name__).splitlines()[0][:500]


def _changing(state: Any) -> dict[str, Any]:
    """Lists the fields of a train state that a step changes."""
    return {
        field.name: getattr(state, field.name)
        for field in dataclasses.fields(state)
        if field.name != "frozen"
    }


def _mismatches(saved: Any, expected: Any) -> list[str]:
    """Lists the differences of two trees of arrays.

    Each is a sentence on a path, a shape or a type.
    """

    def entry_name(entry: Any) -> str:
        for attribute in ("key", "name", "idx"):  # of a dict, an object, a list
            if hasattr(entry, attribute):
                return str(getattr(entry, attribute))
        return str(entry)

    def flat(tree: Any) -> dict[str, Any]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {".".join(map(entry_name, path)): leaf for path, leaf in leaves}

    return mismatches(flat(saved), flat(expected), "is left over")


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
