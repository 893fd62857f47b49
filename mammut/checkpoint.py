"""Two kinds of folder: a model folder (weights, config, processor) and a run's checkpoints (its whole state).

A model folder is what `save` writes and `load` reads:

    config.json         format, version and the `ModelConfig`
    model.safetensors   the parameters, named by their path in the model
    processor.json ...  the processor with its tokenizer files
    manifest.json       size and SHA-256 of every file above, checked by `load`

A run's checkpoints are Orbax steps, each atomic, with the position in the data in its metadata. Orbax restores a
flipped bit silently, so each step has a manifest of checksums too; `restore` falls back to the newest step that passes.
"""

import dataclasses
import logging
import os
import pathlib
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mammut.config import ModelConfig, TrainConfig, from_dict, to_dict
from mammut.manifest import check_manifest, make_manifest, read_json_object, write_json
from mammut.model import MaMMUT
from mammut.processor import Processor
from mammut.tensor_files import CheckpointError

_log = logging.getLogger(__name__)

_VERSION = 1


def save(folder: str | os.PathLike, model: MaMMUT, processor: Processor, *, overwrite: bool = False) -> None:
    """Writes a model folder.

    Raises:
      ValueError: the folder holds a model already and `overwrite` is False.
    """
    from safetensors.numpy import save_file

    folder = pathlib.Path(folder)
    files = ["config.json", "model.safetensors", "processor.json", *processor.tokenizer.files]
    there = [name for name in (*files, "manifest.json") if (folder / name).exists()]
    if there and not overwrite:
        raise ValueError(f"{folder} holds {there[0]} already: give a new folder, or overwrite=True")
    folder.mkdir(parents=True, exist_ok=True)
    # The manifest is removed first and written last: a folder with a manifest is complete.
    (folder / "manifest.json").unlink(missing_ok=True)
    processor.save(folder)
    arrays = {".".join(path): np.asarray(value) for path, value in _flat(nnx.state(model, nnx.Param)).items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "mammut"})
    write_json(folder / "config.json", {"format": "mammut", "version": _VERSION, "model": to_dict(model.config)})
    write_json(folder / "manifest.json", make_manifest(folder, [folder / name for name in files]))


def load(folder: str | os.PathLike) -> tuple[MaMMUT, Processor]:
    """The model and its processor, from a model folder or from the newest good checkpoint of a run.

    Raises:
      CheckpointError: neither is there, a file is damaged or missing, or the weights do not fit the config. Every
        mismatch is named.
    """
    folder = pathlib.Path(folder)
    if (folder / "manifest.json").exists():
        return _load_model_folder(folder)
    if (folder / "checkpoints").is_dir():
        return _load_run(folder)
    raise CheckpointError(f"{folder} is no model folder (no manifest.json) and no run (no checkpoints)")


def _load_model_folder(folder: pathlib.Path) -> tuple[MaMMUT, Processor]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if problems := check_manifest(folder, folder / "manifest.json"):
        raise CheckpointError(f"{folder} is damaged: {'; '.join(problems)}")
    model_config = _model_config(folder / "config.json")
    try:
        arrays = load_file(folder / "model.safetensors")
    except SafetensorError as error:
        raise CheckpointError(f"{folder / 'model.safetensors'} cannot be read: {error}") from error
    model = _with_arrays(model_config, arrays, str(folder / "model.safetensors"))
    return model, _processor(folder)


def _load_run(folder: pathlib.Path) -> tuple[MaMMUT, Processor]:
    config, _ = read_run(folder)
    with Checkpoints(folder, keep=config.keep_checkpoints) as checkpoints:
        params = checkpoints.restore_params()
    arrays = {".".join(path): value for path, value in _flat(params).items()}
    return _with_arrays(config.model, arrays, str(folder / "checkpoints")), _processor(folder)


def _with_arrays(config: ModelConfig, arrays: dict[str, np.ndarray], where: str) -> MaMMUT:
    """A model of `config` with these parameters; every key that is missing, left over or misshapen is reported."""
    abstract = nnx.eval_shape(lambda: MaMMUT(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    expected = {".".join(path): value for path, value in _flat(state).items()}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - arrays.keys())]
    problems += [f"{name} is not a parameter of the model" for name in sorted(arrays.keys() - expected.keys())]
    for name in sorted(expected.keys() & arrays.keys()):
        want, got = expected[name], arrays[name]
        if want.shape != got.shape or want.dtype != got.dtype:
            problems.append(f"{name} is {got.dtype}{list(got.shape)}, expected {want.dtype}{list(want.shape)}")
    if problems:
        raise CheckpointError(f"{where} does not fit its config: {'; '.join(problems)}")
    params: dict[str, Any] = {}
    for name, value in arrays.items():
        *parents, leaf = name.split(".")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jnp.asarray(value)
    return nnx.merge(graphdef, params)


def write_run(workdir: pathlib.Path, config: TrainConfig, overrides: list[str]) -> None:
    """Writes `run.json`: the resolved config of a run, and the command-line overrides that are part of it."""
    write_json(workdir / "run.json", {"config": to_dict(config), "overrides": overrides})


def read_run(workdir: pathlib.Path) -> tuple[TrainConfig, list[str]]:
    """The config and overrides in `run.json`.

    Raises:
      CheckpointError: it is missing or not what `write_run` writes.
    """
    path = workdir / "run.json"
    run = read_json_object(path)
    if run.keys() != {"config", "overrides"}:
        raise CheckpointError(f"{path} is not a run's config, expected the keys config and overrides")
    return read_config(TrainConfig, run["config"], path), run["overrides"]


def read_model_config(folder: str | os.PathLike) -> ModelConfig:
    """The architecture of a model folder or of a run, without its weights.

    Raises:
      CheckpointError: the folder is neither.
    """
    folder = pathlib.Path(folder)
    if (folder / "config.json").exists():
        return _model_config(folder / "config.json")
    if (folder / "run.json").exists():
        return read_run(folder)[0].model
    raise CheckpointError(f"{folder} is no model folder (no config.json) and no run (no run.json)")


def _model_config(path: pathlib.Path) -> ModelConfig:
    config = read_json_object(path)
    if config.get("format") != "mammut" or config.get("version") != _VERSION:
        raise CheckpointError(
            f"{path} has format {config.get('format')!r} version {config.get('version')!r}, "
            f"expected 'mammut' version {_VERSION}"
        )
    return read_config(ModelConfig, config.get("model"), path)


def read_config(cls: type, values: Any, path: pathlib.Path) -> Any:
    """A config of type `cls` from the values in the file `path`; raises CheckpointError when they are none."""
    try:
        return from_dict(cls, values, str(path))
    except (ValueError, TypeError) as error:  # a field that there is not, a value that cannot be
        raise CheckpointError(f"{path} does not hold a {cls.__name__}: {error}") from error


def _processor(folder: pathlib.Path) -> Processor:
    try:
        return Processor.load(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint: the state, and what was saved beside it."""

    step: int
    state: Any
    data: Any


class Checkpoints:
    """The checkpoints of a run, under `workdir/checkpoints`, the newest `keep` of them.

    `save` returns once the arrays are copied from the devices; writing goes on behind. `cleanup` removes what
    a killed run left half-written: for the run itself, not for those who read beside it.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int, *, cleanup: bool = False):
        from orbax.checkpoint import v1 as ocp

        logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax tells of every file at INFO
        self._folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self._manifests = self._folder.parent / "checkpoint_manifests"
        latest = ocp.training.preservation_policies.LatestN(keep)
        try:
            self._checkpointer = ocp.training.Checkpointer(
                self._folder, preservation_policy=latest, cleanup_tmp_directories=cleanup
            )
        except ValueError as error:  # Orbax reads a little of every step here
            manifests = sorted(self._manifests.glob("*.json"))
            damaged = [path.stem for path in manifests if check_manifest(self._folder / path.stem, path)]
            raise CheckpointError(
                f"{self._folder} cannot be opened ({error}): remove its damaged steps, {', '.join(damaged)}"
            ) from error
        self._left_behind: list[int] = []  # newer than the step restored: damaged or unchecked
        self._writing: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def steps(self) -> list[int]:
        """The steps saved, oldest first."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, step: int, state: Any, data: Any) -> None:
        """Saves `state` (arrays) and `data` (JSON: the position in the data) as one step.

        A second save of a step does nothing. An error of an earlier background write is raised here.
        """
        self.wait()
        for newer in self._left_behind:  # Orbax saves no step older than one that is there
            self._checkpointer.delete(newer, missing_ok=True)
        self._left_behind = []
        if step in self.steps:
            return
        self._manifests.mkdir(parents=True, exist_ok=True)
        response = self._checkpointer.save_checkpointables_async(step, {"state": state}, custom_metadata={"data": data})
        self._writing = threading.Thread(target=self._finish, args=(step, response), daemon=True)
        self._writing.start()

    def _finish(self, step: int, response: Any) -> None:
        try:
            response.result()
            if jax.process_index() == 0:
                folder = self._folder / str(step)
                write_json(self._manifests / f"{step}.json", make_manifest(folder, _files(folder)))
                for manifest in self._manifests.glob("*.json"):
                    if int(manifest.stem) not in self.steps:
                        manifest.unlink()
        except BaseException as error:  # raised by the next wait()
            self._error = error

    def wait(self) -> None:
        """Waits for the background write; raises its error."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Waits, then lets go of the folder."""
        self.wait()
        self._checkpointer.close()

    def restore(self, abstract_state: Any) -> Restored:
        """The newest good checkpoint, placed as the shardings of `abstract_state` say.

        Raises:
          CheckpointError: there is none, or the state saved is of another model or optimizer.
        """
        step = self._newest_good()
        saved = self._checkpointer.checkpointables_metadata(step)
        if problems := _mismatches(saved.metadata["state"], abstract_state):
            raise CheckpointError(
                f"{self._folder / str(step)} does not fit this run's model and optimizer: {'; '.join(problems)}"
            )
        loaded = self._checkpointer.load_checkpointables(step, {"state": abstract_state})
        self._left_behind = [newer for newer in self.steps if newer > step]
        return Restored(step, loaded["state"], saved.custom_metadata["data"])

    def restore_params(self) -> Any:
        """The parameters of the newest good checkpoint as host arrays, a nested dict."""
        step = self._newest_good()
        saved = self._checkpointer.checkpointables_metadata(step).metadata["state"]
        abstract = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), saved)
        return self._checkpointer.load_checkpointables(step, {"state": abstract})["state"]["params"]

    def _newest_good(self) -> int:
        steps = self.steps
        unchecked = []
        for step in reversed(steps):
            manifest = self._manifests / f"{step}.json"
            if not manifest.exists():  # killed after the step was complete and before its checksums were
                unchecked.append(step)
            elif problems := check_manifest(self._folder / str(step), manifest):
                _log.warning("checkpoint %d is damaged (%s): trying the one before", step, problems[0])
            else:
                return step
        if unchecked:
            _log.warning("checkpoint %d has no checksums and is used unchecked", unchecked[0])
            return unchecked[0]
        damaged = f": all of {steps} are damaged" if steps else ""
        raise CheckpointError(f"{self._folder} holds no good checkpoint{damaged}")


def _mismatches(saved: Any, expected: Any) -> list[str]:
    """Where two trees of arrays differ in path, shape or type."""

    def flat(tree):
        names = jax.tree_util.tree_leaves_with_path(tree)
        return {
            ".".join(str(getattr(e, "key", getattr(e, "name", getattr(e, "idx", e)))) for e in path): leaf
            for path, leaf in names
        }

    saved, expected = flat(saved), flat(expected)
    problems = [f"{name} is missing" for name in sorted(expected.keys() - saved.keys())]
    problems += [f"{name} is left over" for name in sorted(saved.keys() - expected.keys())]
    for name in sorted(saved.keys() & expected.keys()):
        got, want = saved[name], expected[name]
        if tuple(got.shape) != tuple(want.shape) or got.dtype != want.dtype:
            problems.append(f"{name} is {got.dtype}{list(got.shape)}, expected {want.dtype}{list(want.shape)}")
    return problems


def _flat(state: Any) -> dict[tuple[str, ...], Any]:
    pure = nnx.to_pure_dict(state) if isinstance(state, nnx.State) else state
    return {tuple(e.key for e in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(pure)}


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
