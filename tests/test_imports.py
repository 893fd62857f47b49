"""Rules for imports and for public names.

What importing mammut loads, which module may import which, and that the public names explain
themselves.
"""

import ast
import functools
import inspect
import pathlib
import subprocess
import sys

import pytest

import mammut
from mammut import presets

ROOT = pathlib.Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT / "mammut").with_suffix("").parts): path
    for path in (ROOT / "mammut").rglob("*.py")
    if path.stem != "__init__"
}
HEAVY = (
    *(
        "tensorflow",
        "tensorflow_datasets",
        "torch",
        "PIL",
        "big_vision",
        "grain",
        "orbax",
        "array_record",
    ),
    *("sentencepiece", "tokenizers", "ftfy", "transformers", "tyro", "tensorboardX"),
    *("jinja2", "matplotlib", "pycocoevalcap", "clip_benchmark", "lmms_eval"),
)
# The folders of mammut/, and which others each may import. The files beside them are for users and
# may import anything. Within a folder only cycles are caught
# (`test_no_module_imports_itself_by_way_of_others`): its files may import each other.
MAY_IMPORT = {
    "core": (),
    "models": ("core",),
    "data": ("core",),
    "generation": ("core", "models", "data"),
    "detection": ("core", "models"),
    "weights": ("core", "models", "data", "detection"),
    "evaluation": ("core", "models", "data", "generation", "detection"),
    "training": ("core", "models", "data", "generation", "detection", "weights", "evaluation"),
    "pages": (
        "core",
        "models",
        "data",
        "generation",
        "detection",
        "weights",
        "evaluation",
        "training",
    ),
    "performance": ("core", "models", "data", "generation", "detection", "weights", "training"),
    "interop": ("core", "models", "data", "generation", "weights"),
}
# Presets by name are part of big_vision's model contract.
EXCEPTIONS = {("interop/big_vision.py", "mammut"), ("interop/big_vision.py", "mammut.presets")}


def imported_by(path: pathlib.Path) -> set[str]:
    """Return every module that a file imports, anywhere in the file.

    Imports at its top and inside functions count, with the names taken from packages.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@functools.cache
def neighbours(module: str) -> frozenset[str]:
    names = {name.removeprefix("mammut.") for name in imported_by(MODULES[module])}
    return frozenset(names & set(MODULES))


def reached_from(module: str) -> set[str]:
    """The modules of mammut that `module` imports, by way of others too."""
    found, left = set(), [module]
    while left:
        new = neighbours(left.pop()) - found
        found |= new
        left += new
    return found


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_mammut_loads_no_heavy_package():
    code = f"import sys, mammut; print([name for name in {HEAVY} if name in sys.modules])"
    assert run(code).strip() == "[]"


def test_model_step_and_evaluation_code_import_without_the_packages_they_do_not_need():
    """A model can be made and trained without the optional packages.

    These are grain, tensorflow-datasets, Pillow and the tokenizer libraries.
    """
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY}:
            raise ImportError("refused " + name)
sys.meta_path.insert(0, Refuse())
import mammut, mammut.training.step, mammut.training.tasks, mammut.models.losses, mammut.testing
import mammut.evaluation.metrics.rankings, mammut.generation.text
from mammut.config import MeshConfig, TrainConfig
from mammut.training.tasks import TASKS
config = TrainConfig(model=mammut.testing.tiny_config())
trainer = mammut.training.step.make_trainer(
    config, TASKS[config.task](config.loss), mammut.training.step.sharding.make_mesh(MeshConfig()))
print(sorted(trainer.abstract_state.params))
try:
    import grain
except ImportError as error:
    print(error)
"""
    first, second = run(code).splitlines()
    assert first == "['image_projection', 'logit_bias', 'logit_scale', 'text', 'vision']"
    assert second == "refused grain"  # the refusal works


def test_the_refused_packages_would_be_found():
    """Else the two tests above could not fail."""
    code = (
        "import importlib.util; "
        f"print([name for name in {HEAVY} if importlib.util.find_spec(name)])"
    )
    assert {"PIL", "grain", "orbax", "sentencepiece", "tensorflow_datasets"} <= set(
        ast.literal_eval(run(code))
    )


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_nothing_of_the_programs_around_the_library(module):
    roots = {name.split(".")[0] for name in imported_by(MODULES[module])}
    assert not roots & {"configs", "eval", "train", "tests", "conftest"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_imports_itself_by_way_of_others(module):
    assert module not in reached_from(module)


def forbidden(package: pathlib.Path, file: pathlib.Path) -> list[str]:
    """What `file` of `package` imports although the folder that it lies in may not."""
    folder, *below = file.relative_to(package).parts
    if not below:
        return []
    assert folder in MAY_IMPORT, f"{folder}/ has no row in the table of folders"
    wrong = []
    for name in imported_by(file):
        top, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if top != "mammut" or other in (folder, *MAY_IMPORT[folder]):
            continue
        if (file.relative_to(package).as_posix(), name) not in EXCEPTIONS:
            wrong.append(name)
    return wrong


def test_every_file_imports_what_its_folder_may():
    package = ROOT / "mammut"
    wrong = {
        str(path.relative_to(package)): forbidden(package, path) for path in package.rglob("*.py")
    }
    assert {name: imports for name, imports in wrong.items() if imports} == {}


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("core/new.py", "from mammut.models.masks import attn_mask"),
        ("models/new.py", "import mammut.data.batches"),
        ("data/new.py", "def f():\n    from mammut.weights import tables"),
        ("weights/formats/new.py", "from mammut.training.config import TrainConfig"),
        ("evaluation/metrics/new.py", "import mammut"),
        ("generation/new.py", "from mammut import presets"),
        ("rooms/new.py", "import mammut.core.typing"),
    ],
)
def test_a_file_put_into_the_wrong_folder_is_caught(tmp_path, place, line):
    file = tmp_path / place
    file.parent.mkdir(parents=True)
    file.write_text(line)
    try:
        assert forbidden(tmp_path, file)
    except AssertionError as error:
        assert "has no row" in str(error)


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("models.masks", {"core.typing"}),
        ("models.losses", {"core.typing", "core.sharding", "models.ring_loss"}),
        ("evaluation.metrics.rankings", set()),
    ],
)
def test_masks_losses_and_metrics_know_no_model(module, allowed):
    """They take arrays."""
    assert reached_from(module) <= allowed
    assert not {name.split(".")[0] for name in imported_by(MODULES[module])} & {"flax", "optax"}


def test_metrics_need_no_jax():
    assert "jax" not in {
        name.split(".")[0] for name in imported_by(MODULES["evaluation.metrics.rankings"])
    }


def test_every_public_name_exists_once():
    assert len(mammut.__all__) == len(set(mammut.__all__))
    for name in mammut.__all__:
        assert hasattr(mammut, name)


def explained(name: str, thing) -> list[str]:
    """The public names in `thing`, itself included, that have no text of their own."""
    silent = [] if (thing.__doc__ or "").strip() else [name]
    if inspect.isclass(thing):
        for key, value in vars(thing).items():
            value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if inspect.isfunction(value) and not key.startswith("_"):
                silent += explained(f"{name}.{key}", value)
    return silent


@pytest.mark.parametrize("name", mammut.__all__)
def test_every_public_name_has_a_docstring(name):
    thing = getattr(mammut, name)
    assert explained(name, thing) == []
    if inspect.isclass(thing):  # a dataclass without one is given its signature
        assert not thing.__doc__.startswith(f"{name}(")


def test_every_preset_has_a_docstring():
    public = [
        item
        for item in inspect.getmembers(presets, inspect.isfunction)
        if not item[0].startswith("_")
    ]
    assert public
    assert [silent for item in public for silent in explained(*item)] == []
