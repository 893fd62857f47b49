"""The command line of `train.py`: program options and run settings.

Both are options of one parser, tyro's: `--workdir DIR` and `--optimizer.learning-rate 1e-3` stand
in one help, and a misspelled option of either kind is rejected, with the closest valid names. The
program's own options are read first, since they say which recipe gives the defaults of the
settings.
"""

import dataclasses
import importlib.util
import itertools
import operator
import os
import pathlib
from typing import Annotated, Any

from mammut.core.coordination import Processes
from mammut.core.fields import field_texts
from mammut.models.video import VideoConfig
from mammut.training.config import TrainConfig, fitting_warmup
from mammut.weights.old_configs import DERIVED, MOVED

_OF_VIDEOS = "--model.vision.video."


@dataclasses.dataclass(frozen=True)
class Program:
    """What `train.py` is to do, beside the settings of the run."""

    # Folder of the run; default: runs/RECIPE, or runs/RECIPE-2, -3 ... where that is used.
    workdir: pathlib.Path | None = None
    # Continue the run in the folder, bit for bit.
    resume: bool = False
    # Start afresh in a folder that holds a run; all that this run wrote is removed.
    overwrite: bool = False
    # Compile the step and report its memory, FLOPs and traffic; nothing is trained or written.
    compile_only: bool = False
    # TPU slice to compile for with --compile-only, such as v5e:8x8; no TPU is needed.
    topology: str | None = None
    # One of the processes that a TPU pod, Slurm or Open MPI has started.
    distributed: bool = False
    # Address HOST:PORT of process 0, for processes started by hand.
    coordinator: str | None = None
    # Number of processes, for processes started by hand.
    num_processes: int | None = None
    # Number of this process, from 0, for processes started by hand.
    process_id: int | None = None
    # Seconds without a sign of life from a process after which all others end.
    peer_timeout: float = Processes.timeout


def parse(argv: list[str]) -> tuple[pathlib.Path | None, Program, list[str]]:
    """Splits a command line into recipe, program options and settings.

    The settings are the options of the run.

    The recipe comes first: later on, a bare word is the value of an option.
    """
    import tyro

    recipe = None
    if argv and not argv[0].startswith("-"):
        recipe = pathlib.Path(argv[0])
        argv = argv[1:]
    known, overrides = tyro.cli(
        Program,
        args=[arg for arg in argv if arg not in ("-h", "--help")],
        prog="train.py",
        return_unknown_args=True,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return recipe, known, overrides


def print_help(config: TrainConfig, description: str) -> None:
    """Prints every option with its text and default; ends the program.

    The defaults are the values of `config`.
    """
    _cli(config, ["--help"], description=description)


def parse_overrides(config: TrainConfig, overrides: list[str]) -> TrainConfig:
    """Applies `--dotted.name VALUE` overrides to a config.

    A name of version 0.1 is taken for today's. An unknown name is refused, with the nearest that
    exists: the program ends with status 2.

    Raises:
      ValueError: a field of version 0.1 that now follows from others is given another value.
    """
    todays, derived = _in_todays_names(overrides)
    config = _cli(_with_videos(config, todays), todays)
    for name, value in derived.items():
        follows = operator.attrgetter(name)(config)
        if value != str(follows):
            raise ValueError(
                f"--{name} is {value}, expected {follows}: it follows from --{DERIVED[name]}"
            )
    return config


def _with_videos(config: TrainConfig, overrides: list[str]) -> TrainConfig:
    """Gives an image encoder a `VideoConfig` where an option sets one of its fields.

    tyro has options for the fields of a value, not for those of None. The mode is "frames", as
    which an image encoder reads videos anyway: an option changes what it names, and nothing else.
    """
    of_videos = [arg[2:] for arg in overrides if arg.startswith(_OF_VIDEOS)]
    if config.model.vision.video is not None or not of_videos:
        return config
    # The other options may make the model one that has a place for videos.
    names = {arg.partition("=")[0].replace("-", "_") for arg in of_videos}
    config = _cli(config, without(overrides, names))
    vision = dataclasses.replace(config.model.vision, video=VideoConfig(mode="frames"))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vision=vision))


def _cli(config: TrainConfig, args: list[str], description: str | None = None) -> TrainConfig:
    import tyro

    # Every setting has a value, booleans too; the recipe chooses the kind of the image encoder.
    settings = Annotated[
        TrainConfig,
        tyro.conf.arg(name=""),
        tyro.conf.FlagConversionOff,
        tyro.conf.AvoidSubcommands,
    ]
    program = Annotated[Program, tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff]
    both = dataclasses.make_dataclass(
        "Options", [("program", program, Program()), ("run", settings, config)]
    )
    # No class of this package: it has no source to read texts from. Python 3.11 says so by itself.
    both.__module__ = "types"
    registry = tyro.constructors.ConstructorRegistry()
    registry.struct_rule(_hidden if "--help" in args else _shown)
    return tyro.cli(
        both, args=args, prog="train.py", description=description or "", registry=registry
    ).run


def _shown(info: Any) -> Any:
    return _fields(info, hide=False)


def _hidden(info: Any) -> Any:
    return _fields(info, hide=True)


def _fields(info: Any, hide: bool) -> Any:
    """Chooses the fields of a config that are options, for tyro.

    It gives their texts, too. With `hide`, the help leaves out fields that are set only for other
    people's weights (`OF_WEIGHTS`).
    """
    import tyro

    if not dataclasses.is_dataclass(info.type) or not info.type.__module__.startswith("mammut."):
        return None
    texts = field_texts(info.type)
    of_weights = getattr(info.type, "OF_WEIGHTS", ())
    fields = []
    for field in dataclasses.fields(info.type):
        default = getattr(info.default, field.name, field.default)
        kind = field.type
        if hide and field.name in of_weights:
            kind = tyro.conf.Suppress[kind]
        spec = tyro.constructors.StructFieldSpec(
            name=field.name, type=kind, default=default, helptext=texts.get(field.name)
        )
        fields.append(spec)
    return tyro.constructors.StructConstructorSpec(instantiate=info.type, fields=tuple(fields))


def _in_todays_names(overrides: list[str]) -> tuple[list[str], dict[str, str]]:
    """Replaces option names of version 0.1.

    Fields that now follow from other fields are no options: their values come apart, by name.
    """
    todays = []
    derived = {}
    old = ""
    for arg in overrides:
        if arg.startswith("--"):
            name, equals, value = arg[2:].partition("=")
            old = name.replace("-", "_")
            if old in MOVED:
                arg = f"--{MOVED[old]}{equals}{value}"
            if old in DERIVED:
                derived[old] = value
                continue
        elif old in DERIVED:
            derived[old] = arg
            continue
        todays.append(arg)
    return todays, derived


def with_fitting_warmup(config: TrainConfig, overrides: list[str]) -> list[str]:
    """Adds a shorter warm-up where `--steps` leaves no room for that of the recipe `config`.

    A warm-up that is given stays as it is.
    """
    steps = _value(overrides, "steps")
    warmup = config.optimizer.warmup_steps
    if steps is None or not steps.isdecimal():
        return overrides
    fitting = fitting_warmup(warmup, int(steps))
    if fitting == warmup or _value(overrides, "optimizer.warmup_steps") is not None:
        return overrides
    return [*overrides, "--optimizer.warmup-steps", str(fitting)]


def _value(overrides: list[str], name: str) -> str | None:
    """Finds the value of the option `name`, the last one; None where it is not given."""
    value = None
    for arg, after in itertools.pairwise([*overrides, ""]):
        option, equals, inline = arg.partition("=")
        if option.startswith("--") and option[2:].replace("-", "_") == name:
            value = inline if equals else after
    return value


def without(overrides: list[str], names: set[str]) -> list[str]:
    """Leaves out the options `names` and their values."""
    kept = []
    skip = False
    for arg in overrides:
        if arg.startswith("--"):
            skip = arg[2:].partition("=")[0].replace("-", "_") in names
        if not skip:
            kept.append(arg)
    return kept


def load_recipe(path: pathlib.Path) -> TrainConfig:
    """Runs a recipe file and returns the config that its `get_config()` makes.

    Raises:
      ValueError: there is no such file, or it has no `get_config()` that returns a `TrainConfig`.
    """
    if not path.is_file():
        raise ValueError(
            f"there is no recipe {path}, expected a Python file with get_config() -> TrainConfig"
        )
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(
            f"the recipe {path} has no get_config(), expected one that returns a TrainConfig"
        )
    config = module.get_config()
    if not isinstance(config, TrainConfig):
        raise ValueError(
            f"get_config() of {path} returns a {type(config).__name__}, expected a TrainConfig"
        )
    return config


def default_workdir(recipe: str, resume: bool) -> pathlib.Path:
    """Chooses a work folder: runs/RECIPE, or with -2, -3 ...

    To resume, it is the newest folder, else the first free one.
    """
    newest = workdir = pathlib.Path("runs") / recipe
    number = 1
    while os.path.lexists(workdir):
        if workdir.is_dir():
            newest = workdir
        number += 1
        workdir = pathlib.Path("runs") / f"{recipe}-{number}"
    return newest if resume else workdir
