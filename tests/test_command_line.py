"""The command line of `train.py`: its help, names of version 0.1, and what is refused."""

import dataclasses
import pathlib
import re

import pytest

import mammut
from mammut.config import (
    ComputeConfig,
    ModelConfig,
    OptimizerConfig,
    ResNetConfig,
    TrainConfig,
    VideoConfig,
)
from mammut.training import command_line

PROGRAM = {"--workdir", "--resume", "--overwrite", "--compile-only", "--topology", "--distributed"}
PROGRAM |= {"--coordinator", "--num-processes", "--process-id", "--peer-timeout"}
RESNET = TrainConfig(
    task="caption",
    model=dataclasses.replace(mammut.presets.limber(), vision=ResNetConfig()),
)


def shown(config: TrainConfig, capsys, monkeypatch) -> dict[str, str]:
    """Every option of the help, with its text."""
    monkeypatch.setenv("COLUMNS", "100")  # one column of boxes
    with pytest.raises(SystemExit) as ended:
        command_line.print_help(config, "What it does.")
    assert ended.value.code == 0
    options: dict[str, str] = {}
    name = None
    for line in capsys.readouterr().out.splitlines():
        text = line.strip("│ ").rstrip()
        if line.startswith(("╭", "╰")):
            name = None  # a box ends or begins, with its title
        elif match := re.match(r"(--\w[\w.-]*)", text):
            name = match[1]
            options[name] = ""
        elif name is not None:
            options[name] = f"{options[name]} {text}"
    return {name: re.sub(r"\(default: .*\)$", "", text).strip() for name, text in options.items()}


@pytest.mark.parametrize("config", [TrainConfig(), RESNET], ids=["vit", "resnet"])
def test_every_option_is_shown_with_a_text_of_its_own(config, capsys, monkeypatch):
    options = shown(config, capsys, monkeypatch)
    assert PROGRAM < options.keys() and len(options) > 80
    assert [name for name, text in options.items() if len(text) < 10] == []
    texts = list(options.values())
    assert [name for name, text in options.items() if texts.count(text) > 1] == []


def test_what_only_the_weights_of_others_set_is_not_shown_and_can_be_set(capsys, monkeypatch):
    options = shown(TrainConfig(), capsys, monkeypatch)
    hidden = ["--model.text.norm", "--model.vision.input-norm", "--model.text.pad-id"]
    assert not options.keys() & set(hidden)
    config = command_line.parse_overrides(TrainConfig(), ["--model.text.norm", "rms"])
    assert config.model.text.norm == "rms"


def test_the_recipe_comes_first_and_what_the_program_knows_is_taken_out():
    argv = ["configs/tiny.py", "--steps", "10", "--workdir", "runs/a", "--resume", "--seed", "3"]
    recipe, program, overrides = command_line.parse(argv)
    assert recipe == pathlib.Path("configs/tiny.py")
    assert program == command_line.Program(workdir=pathlib.Path("runs/a"), resume=True)
    assert overrides == ["--steps", "10", "--seed", "3"]
    assert command_line.parse([]) == (None, command_line.Program(), [])


@pytest.mark.parametrize(
    ("argv", "nearest"),
    [
        (["--optimizer.learning-rat", "1"], "--optimizer.learning-rate"),
        (["--workdr", "a"], "--workdir"),
    ],
)
def test_a_misspelt_option_is_refused_with_the_nearest(argv, nearest, capsys):
    _, _, overrides = command_line.parse(argv)
    with pytest.raises(SystemExit) as ended:
        command_line.parse_overrides(TrainConfig(), overrides)
    assert ended.value.code == 2
    assert nearest in capsys.readouterr().err


def test_names_of_version_0_1_are_taken_for_todays():
    old = ["--model.dtype", "bfloat16", "--model.vision.patch-drop=0.5", "--model.passes", "fused"]
    old += ["--model.text.param_dtype", "bfloat16", "--model.conditioning", "cross_attention"]
    config = command_line.parse_overrides(TrainConfig(), [*old, "--steps", "7"])
    assert config.compute == ComputeConfig("bfloat16", text_param_dtype="bfloat16", passes="fused")
    assert config.augment.patch_drop == 0.5 and config.steps == 7


OF_RESNET = TrainConfig(model=ModelConfig(ResNetConfig()))


@pytest.mark.parametrize("config", [TrainConfig(), OF_RESNET], ids=["vit", "resnet"])
def test_an_option_of_videos_makes_an_image_recipe_one_of_frames(config):
    """An image model reads videos as mode "frames" does: an option changes what it names."""

    def video(*overrides: str) -> VideoConfig | None:
        return command_line.parse_overrides(config, [*overrides, "--steps", "7"]).model.vision.video

    assert video("--model.vision.video.mode", "frames") == VideoConfig("frames")
    embed = video("--model.vision.video.frame_embed", "True", "--model.vision.video.frames=8")
    assert embed == VideoConfig("frames", frames=8, frame_embed=True)


def test_options_of_videos_keep_what_the_recipe_has(capsys):
    tubes = TrainConfig(model=mammut.presets.tiny_video())
    found = command_line.parse_overrides(tubes, ["--model.vision.video.fixed-code", "none"])
    expected = dataclasses.replace(tubes.model.vision.video, fixed_code="none")
    assert found.model.vision.video == expected
    plain = command_line.parse_overrides(TrainConfig(), ["--model.vision.video.mode", "tubes"])
    assert plain.model.vision.video == VideoConfig()
    with pytest.raises(SystemExit):
        command_line.parse_overrides(TrainConfig(), ["--model.vision.video.modes", "frames"])
    assert "--model.vision.video.mode" in capsys.readouterr().err
    low = TrainConfig(model=mammut.presets.tiny())
    vision = dataclasses.replace(low.model.vision, low_image_size=24)
    low = dataclasses.replace(low, model=dataclasses.replace(low.model, vision=vision))
    with pytest.raises(ValueError, match="VisionConfig.low_image_size is 24, expected None"):
        command_line.parse_overrides(low, ["--model.vision.video.mode", "frames"])
    both = ["--model.vision.video.mode", "frames", "--model.vision.low-image-size", "None"]
    assert command_line.parse_overrides(low, both).model.vision.video == VideoConfig("frames")


# The options of a model that sees images by a prefix, with room for text after it.
PREFIX = ["--model.text.cross-attn-every", "0", "--model.text.max-length", "300"]
PREFIX += ["--model.text.pooling", "none", "--task", "caption"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["--model.conditioning", "prefix"],
            "--model.conditioning is prefix, expected cross_attention: it follows from "
            "--model.text.cross_attn_every",
        ),
        (
            [*PREFIX, "--model.conditioning=cross_attention"],
            "--model.conditioning is cross_attention, expected prefix: it follows from "
            "--model.text.cross_attn_every",
        ),
        (
            ["--model.text.class-token", "True", "--steps", "7"],
            "--model.text.class_token is True, expected False: it follows from "
            "--model.text.pooling",
        ),
    ],
)
def test_an_option_of_version_0_1_that_contradicts_the_rest_is_refused(overrides, message):
    with pytest.raises(ValueError) as error:
        command_line.parse_overrides(TrainConfig(), overrides)
    assert str(error.value) == message


def test_an_option_of_version_0_1_that_follows_from_the_rest_is_no_error():
    overrides = ["--model.conditioning", "prefix", *PREFIX, "--model.text.class_token=False"]
    config = command_line.parse_overrides(TrainConfig(), overrides)
    assert config.model.conditioning == "prefix" and not config.model.text.class_token


def test_options_are_left_out_with_their_values():
    overrides = [
        "--model.text.max-length",
        "9",
        "--steps=3",
        "--model.vision.image_size=5",
        "--seed",
        "1",
    ]
    names = {"model.text.max_length", "model.vision.image_size"}
    assert command_line.without(overrides, names) == ["--steps=3", "--seed", "1"]


@pytest.mark.parametrize("given, added", [
    (["--steps", "60"], ["--optimizer.warmup-steps", "6"]),
    (["--seed", "3", "--steps=100", "--task", "caption"], ["--optimizer.warmup-steps", "10"]),
    (["--steps", "3"], ["--optimizer.warmup-steps", "0"]),
    (["--steps", "2000", "--steps", "60"], ["--optimizer.warmup-steps", "6"]),
    (["--steps", "60", "--steps", "2000"], []),
    (["--steps", "101"], []),
    (["--steps", "60", "--optimizer.warmup-steps", "100"], []),
    (["--optimizer.warmup_steps=70", "--steps", "60"], []),
    (["--steps", "many"], []),
    (["--steps"], []),
    (["--log-every", "60"], []),
    ([], []),
])  # fmt: skip
def test_steps_alone_shorten_a_warm_up_that_they_leave_no_room_for(given, added):
    """A warm-up that is given stays, and is refused where it does not fit."""
    config = TrainConfig(optimizer=OptimizerConfig(warmup_steps=100))
    overrides = command_line.with_fitting_warmup(config, given)
    assert overrides == given + added
    if added:
        run = command_line.parse_overrides(config, overrides)
        assert run.optimizer.warmup_steps == int(added[1]) < run.steps


def test_the_newest_run_is_resumed_whatever_files_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny-3").mkdir()
    (tmp_path / "runs" / "tiny-2").write_text("a stranger's")
    (tmp_path / "runs" / "tiny-4").symlink_to("nowhere")
    assert command_line.default_workdir("tiny", resume=True) == pathlib.Path("runs/tiny-3")
    assert command_line.default_workdir("tiny", resume=False) == pathlib.Path("runs/tiny-5")


def test_a_new_run_gets_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(command_line.default_workdir("small", resume=False)) == "runs/small"
    assert str(command_line.default_workdir("small", resume=True)) == "runs/small"
    (tmp_path / "runs" / "small").mkdir(parents=True)
    (tmp_path / "runs" / "small-2").mkdir()
    assert str(command_line.default_workdir("small", resume=False)) == "runs/small-3"
    assert str(command_line.default_workdir("small", resume=True)) == "runs/small-2"
