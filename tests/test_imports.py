"""What importing mammut loads, which module may import which, and that the public names explain themselves."""

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
    *("tensorflow", "tensorflow_datasets", "torch", "PIL", "big_vision", "grain", "orbax", "array_record"),
    *("sentencepiece", "tokenizers", "ftfy", "transformers", "tyro", "tensorboardX"),
    *("jinja2", "matplotlib", "pycocoevalcap", "clip_benchmark", "lmms_eval"),
)
# Each may import those before it, in groups that do not know each other.
LAYERS = (
    ("core.typing",),
    ("config", "core.mapped_file", "performance.hlo", "performance.chips"),
    ("weights.files.zip_archive",),
    ("weights.files.torch_archive",),
    ("weights.files.tensor_file",),
    ("models.masks", "core.sharding", "generation.search", "core.files", "models.attention_kernels", "core.params"),
    ("models.layers", "core.distributed", "performance.out_of_memory"),
    ("models.vit", "models.decoder", "models.adapter_modules"),
    ("models.resnet",),
    ("models.mammut",),
    ("models.losses", "models.ring_loss"),
    ("training.tasks",),
    ("training.step", "data.tokenizer"),
    ("data.processor",),
    ("generation.text", "weights.checkpoints", "data.annotations", "data.tar_shards", "weights.model_card", "weights.tables"),
    ("weights.formats.json_object", "weights.warm_start", "models.adapters", "generation.interleaved"),
    ("weights.formats.open_clip_config", "weights.formats.open_clip_tables", "weights.formats.open_clip_tokenizer"),
    ("weights.formats.big_vision_tables", "weights.formats.resnets", "weights.formats.huggingface_config", "weights.formats.huggingface_tables"),
    ("weights.formats.huggingface_tokenizer",),
    ("weights.formats.huggingface", "weights.formats.magma"),
    ("weights.formats.open_clip_export", "weights.formats.big_vision"),
    ("weights.formats.open_clip",),
    ("weights.model_folder",),
    ("data.sources", "training.run", "convert"),
    ("data.batches", "training.new_processor", "evaluation.metrics.rankings", "evaluation.metrics.vqa", "evaluation.metrics.ptb_tokenizer", "evaluation.predictions", "evaluation.few_shot"),
    ("evaluation.metrics.captions",),
    ("evaluation.predictor", "evaluation.scoring", "pages.word_maps"),
    ("training.validation", "pages.report_pictures"),
    ("pages.report", "training.log", "performance.compile_report"),
    ("performance.timing", "performance.peers", "performance.tables"),
    ("performance.step_time",),
    ("performance.step_parts", "performance.growth", "performance.child", "performance.generation_time"),
    ("performance.beside_peer",),
)


def imported_by(path: pathlib.Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function, with the names taken from packages."""
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
    """A machine without grain, tensorflow-datasets, Pillow or a tokenizer library can still make and train a model."""
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
    code = f"import importlib.util; print([name for name in {HEAVY} if importlib.util.find_spec(name)])"
    assert {"PIL", "grain", "orbax", "sentencepiece", "tensorflow_datasets"} <= set(ast.literal_eval(run(code)))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_nothing_of_the_programs_around_the_library(module):
    roots = {name.split(".")[0] for name in imported_by(MODULES[module])}
    assert not roots & {"configs", "eval", "train", "tests", "conftest"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_imports_itself_by_way_of_others(module):
    assert module not in reached_from(module)


def test_imports_run_one_way():
    rank = {name: place for place, group in enumerate(LAYERS) for name in group}
    assert set(rank) <= set(MODULES)
    wrong = [f"{a} imports {b}" for a in rank for b in neighbours(a) if b in rank and rank[b] >= rank[a]]
    assert not wrong


@pytest.mark.parametrize("module", ["models.masks", "models.losses", "evaluation.metrics.rankings"])
def test_masks_losses_and_metrics_know_no_model(module):
    """They take arrays."""
    assert reached_from(module) <= {"core.typing"}
    assert not {name.split(".")[0] for name in imported_by(MODULES[module])} & {"flax", "optax"}


def test_metrics_need_no_jax():
    assert "jax" not in {name.split(".")[0] for name in imported_by(MODULES["evaluation.metrics.rankings"])}


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
    public = [item for item in inspect.getmembers(presets, inspect.isfunction) if not item[0].startswith("_")]
    assert public
    assert [silent for item in public for silent in explained(*item)] == []
