"""Checkpoints of a run: everything that a step changes.

The checkpoints are Orbax steps. Each is atomic, and its metadata has the position in the data.
Orbax restores a flipped bit silently. Each step therefore has a manifest of checksums, too, and
`restore` falls back to the newest step that passes. The frozen parameters are the same in all
checkpoints: they are written once, as safetensors with a manifest, to `frozen/`.
"""

import dataclasses
import logging
import os
import pathlib
import threading
from typing import Any

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

_log = logging.getLogger(__name__)

_FROZEN_FILE = "frozen.safetensors"
_FROZEN_MANIFEST = "manifest.json"


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
      keep: how many of the newest checkpoints are kept; None: all.
      cleanup: removes what a killed run left half-written. Only the run itself may ask for it: a
        reader would remove what the run is writing.

    Raises:
      CheckpointError: Orbax cannot open the folder, since a step is damaged.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int | None, *, cleanup: bool = False):
        from orbax.checkpoint import v1 as ocp

        logging.getLogger("absl").setLevel(logging.WARNING)  # at INFO, Orbax logs every file
        self._folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self._frozen = self._folder.parent / "frozen"
        self._manifests = self._folder.parent / "checkpoint_manifests"
        latest = ocp.training.preservation_policies.LatestN(keep)
        try:
            self._checkpointer = ocp.training.Checkpointer(
                self._folder, preservation_policy=latest, cleanup_tmp_directories=cleanup
            )
        except ValueError as error:  # Orbax reads a little of every step here
            manifests = sorted(self._manifests.glob("*.json"))
            damaged = [
                path.stem for path in manifests if check_manifest(self._folder / path.stem, path)
            ]
            raise CheckpointError(
                f"{self._folder} cannot be opened ({error}): "
                f"remove its damaged steps, {', '.join(damaged)}"
            ) from error
        # Steps newer than the one restored: they are damaged or unchecked.
        self._left_behind: list[int] = []
        self._writing: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        # Once this process has failed, a write that needs the other processes, too, may never end:
        # the step is left half-written.
        if kind is None or jax.process_count() == 1:
            self.close()

    @property
    def steps(self) -> list[int]:
        """The saved steps, oldest first."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, step: int, state: Any, data: Any) -> None:
        """Saves one step.

        The first save of a run also writes the frozen parameters, before it returns. A second save
        of a step does nothing. An error of an earlier background write is raised here.

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
        response = self._checkpointer.save_checkpointables_async(
            step, saved, custom_metadata={"data": data}
        )
        self._writing = threading.Thread(target=self._finish, args=(step, response), daemon=True)
        self._writing.start()

    def _finish(self, step: int, response: Any) -> None:
        try:
            response.result()
            if distributed.first():  # Orbax has waited for all processes
                folder = self._folder / str(step)
                write_json(self._manifests / f"{step}.json", make_manifest(folder, _files(folder)))
                for manifest in self._manifests.glob("*.json"):
                    if int(manifest.stem) not in self.steps:
                        manifest.unlink()
        except BaseException as error:
            self._error = error  # the next wait() raises the error

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

    def wait(self) -> None:
        """Waits for the background write, and raises its error."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._error is not None:
            error = self._error
            self._error = None
            raise error

    def close(self) -> None:
        """Waits for the background write, then closes the folder."""
        self.wait()
        self._checkpointer.close()

    def restore(self, abstract_state: Any) -> Restored:
        """Restores the newest good checkpoint.

        Args:
          abstract_state: shapes, types and shardings of the `TrainState`.

        Raises:
          CheckpointError: there is no good checkpoint, or the saved state is of another model or
            optimizer.
        """
        # One process reads all files for their checksums; all processes restore the same step.
        step = int(
            distributed.broadcast_from_first("restored", lambda: str(self._newest_good()).encode())
        )
        saved = self._checkpointer.checkpointables_metadata(step)
        changing = _changing(abstract_state)
        if problems := _mismatches(saved.metadata["state"], changing):
            raise CheckpointError(
                f"{self._folder / str(step)} does not fit this run's model and optimizer: "
                f"{'; '.join(problems)}"
            )
        frozen = {}
        if abstract_state.frozen:
            frozen = self._restore_frozen(abstract_state.frozen)
        loaded = self._checkpointer.load_checkpointables(step, {"state": changing})
        self._left_behind = [newer for newer in self.steps if newer > step]
        return Restored(
            step,
            abstract_state.replace(**loaded["state"], frozen=frozen),
            saved.custom_metadata["data"],
        )

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

        step = self._newest_good()
        saved = self._checkpointer.checkpointables_metadata(step).metadata["state"]["params"]
        abstract = {"params": jax.tree.map(lambda x: np.empty(x.shape, x.dtype), saved)}
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            loaded = self._checkpointer.load_checkpointables(step, {"state": abstract})
        params = by_name(loaded["state"]["params"])
        if self._frozen.exists():
            file = self._open_frozen(self._frozen_problems())
            params |= {name: file.read(name) for name in file.specs}
        return params

    def _newest_good(self) -> int:
        steps = self.steps
        unchecked = []
        for step in reversed(steps):
            manifest = self._manifests / f"{step}.json"
            if not manifest.exists():
                # The run was killed between the step and its checksums.
                unchecked.append(step)
            elif problems := check_manifest(self._folder / str(step), manifest):
                _log.warning(
                    "checkpoint %d is damaged (%s): trying the one before", step, problems[0]
                )
            else:
                return step
        if unchecked:
            _log.warning("checkpoint %d has no checksums and is used unchecked", unchecked[0])
            return unchecked[0]
        damaged = ""
        if steps:
            damaged = f": all of {steps} are damaged"
        raise CheckpointError(f"{self._folder} holds no good checkpoint{damaged}")


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
