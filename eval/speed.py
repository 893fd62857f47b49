"""Times a model: training step, generation, data and start.

The model is timed alone or beside a peer.

    python -m eval.speed [CHECKPOINT] [--preset NAME] [--what train parts ...] [--out FILE.json]
    python -m eval.speed --peer open_clip [--peer-family coca] [--peer-size tiny] [--out FILE.json]

| --what   | measures |
|---|---|
| train    | images/s of the real training step on noise, TFLOP/s, MFU, memory |
| parts    | the parts of that step, each compiled alone, in time and in FLOPs |
| generate | captions/s of `mammut.generation.text.generate`, and of the same search without cache |
| growth   | how the step grows with batch, resolution and text length, and over devices |
| startup  | seconds to the end of a first step in a fresh process: cold, then with a warm cache |
| data     | images/s of --data |
| video    | clips/s and CPU ms a clip of --videos: decoded, resized too, encoded, captioned |

The search without cache runs the caption pass over the whole text for each new token. It therefore
makes the image's keys and values again each time, for every beam. Texts have --new-tokens tokens
after a start token, and no text ends early. A time is the median over batches, each waited for; the
IQR is taken over the single times. Videos are read in one thread. CPU ms are those of all threads
of this process, and hardly change with what else the machine does. With --peer both sides do the
same work on the same weights (this is checked first), in turns A-B-B-A: see
`mammut.performance.peers`.
"""

import dataclasses
import os
import pathlib
import platform
import sys
import tempfile
from typing import Annotated, Any, Literal

import jax
import jaxlib
import numpy as np
import tyro
from flax import nnx

import mammut
from mammut.config import DataConfig, ModelConfig, to_dict
from mammut.core.files import write_json
from mammut.generation.search import GenerateConfig
from mammut.performance import beside_peer, child, growth, tables
from mammut.performance.generation_time import measure_generation
from mammut.performance.peers import SIZES, Family, Mode, OpenClip, num_cores, peer_config
from mammut.performance.step_parts import measure_parts
from mammut.performance.step_time import (
    FORMULA,
    RunSettings,
    computed,
    make_step,
    measure,
    measured_peak,
)

What = Literal["train", "parts", "generate", "growth", "startup", "data", "video"]
Axis = Literal["batch", "image_size", "length", "devices"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of this program."""

    # A model folder or run. Without one: random weights.
    checkpoint: Annotated[str | None, tyro.conf.Positional] = None
    # A function of mammut.presets, for random weights. By default: tiny.
    preset: str | None = None
    # What to measure.
    what: tuple[What, ...] = ("train", "parts", "generate", "growth", "startup")
    run: Annotated[RunSettings, tyro.conf.arg(name="")] = RunSettings()
    # Examples of a training step.
    batch_size: int = 32
    # Training steps that are timed. By default 20, on a CPU 10.
    steps: int | None = None
    # Training steps before those that are timed.
    warmup: int = 5
    # Sizes over which the growth of the training step is measured.
    grow: tuple[Axis, ...] = ("batch", "image_size", "length", "devices")
    # Sizes to grow over. By default 0.5, 1 and 2 times the model's (images: 1.5 times); devices: 1,
    # 2, 4, 8.
    grow_sizes: tuple[int, ...] | None = None
    # Images of a batch in generation.
    batch_sizes: tuple[int, ...] = (1, 16, 64)
    # Beams in generation; 1 is greedy search.
    beams: tuple[int, ...] = (1, 4)
    # Tokens of every generated text, after its start.
    new_tokens: int = 20
    # Rounds of turns, each from the first contestant to the last and back.
    rounds: int = 3
    # A set to read, as in an evaluation's --data.
    data: str | None = None
    # Threads that read and decode it.
    threads: int = 4
    # Video files to read. By default one that the program makes: H.264, 300 frames of 320 x 240.
    videos: tuple[str, ...] = ()
    # Frames that are read of each video.
    frames: int = 16
    # open_clip to compare with: "open_clip", or a folder that holds the package or its src.
    peer: str | None = None
    # The kind of model that both sides build.
    peer_family: Family = "coca"
    # The size of the model that both sides build.
    peer_size: Literal["tiny", "small"] = "tiny"
    # A model of open_clip's in place of family and size: the name of one of its configs, or a JSON
    # file. The batch is --batch-size.
    peer_config: str | None = None
    # Vocabulary of a model of --peer-size.
    vocab_size: int = 49_408
    # Modes of PyTorch to compare with.
    peer_modes: tuple[Mode, ...] = ("eager",)
    # A JSON file for all numbers, single times included.
    out: pathlib.Path | None = None

    def __post_init__(self):
        for name in ("batch_sizes", "beams", "what", "peer_modes"):
            values = getattr(self, name)
            if not values or type(values[0]) is int and min(values) < 1:
                given = " ".join(map(str, values)) or "empty"
                expected = "one or more"
                if name in ("batch_sizes", "beams"):
                    expected = "numbers of at least 1"
                raise ValueError(f"--{name.replace('_', '-')} is {given}, expected {expected}")
        for name, low in (
            ("new_tokens", 1),
            ("batch_size", 1),
            ("steps", 1),
            ("warmup", 0),
            ("threads", 1),
            ("frames", 1),
            ("vocab_size", 8),
        ):
            if (value := getattr(self, name)) is not None and value < low:
                raise ValueError(f"--{name.replace('_', '-')} is {value}, expected at least {low}")
        if self.rounds < 3:
            raise ValueError(
                f"--rounds is {self.rounds}, expected at least 3, for medians of 6 times"
            )
        if self.checkpoint is not None and self.preset is not None:
            raise ValueError(
                f"both CHECKPOINT {self.checkpoint} and --preset {self.preset} are given, "
                "expected one"
            )
        if self.peer is not None and (self.checkpoint or self.preset):
            raise ValueError(
                "--peer is given with a model, expected --peer-size or --peer-config: "
                "both sides build it"
            )
        if "data" in self.what and self.data is None:
            raise ValueError(
                "--what has data, expected --data with what to read: "
                "jsonl:PATH, tfds:NAME/SPLIT, ..."
            )
        if self.grow_sizes is not None and min(self.grow_sizes, default=0) < 1:
            given = " ".join(map(str, self.grow_sizes)) or "empty"
            raise ValueError(f"--grow-sizes is {given}, expected numbers of at least 1")
        if self.grow_sizes is not None and len(self.grow) != 1:
            raise ValueError(f"--grow-sizes is given for {len(self.grow)} of --grow, expected one")
        if self.out is not None and self.out.suffix != ".json":
            raise ValueError(f"--out is {self.out}, expected a name that ends in .json")


def load_model(options: Options) -> tuple[mammut.MaMMUT, mammut.Processor | None, str]:
    """Loads the model to time.

    Returns the model as it is stored, its processor if it has one, and its source.
    """
    if options.checkpoint is not None:
        model, processor = mammut.load(options.checkpoint)
        return model, processor, options.checkpoint
    name = options.preset or "tiny"
    preset = vars(mammut.presets).get(name)
    # The module has classes and helpers beside the presets.
    if name.startswith("_") or isinstance(preset, type) or not callable(preset):
        raise ValueError(
            f"--preset is {name!r}, "
            "expected a function of mammut.presets such as tiny or mammut_b16"
        )
    return mammut.MaMMUT(preset(), rngs=nnx.Rngs(0)), None, f"preset {name} with random weights"


def require_room(options: Options, model: mammut.MaMMUT) -> None:
    """Checks that the model's texts have room for --new-tokens."""
    longest = model.config.text_length
    if options.new_tokens >= longest:
        raise ValueError(
            f"--new-tokens is {options.new_tokens}, "
            f"expected fewer than the {longest} of DecoderConfig.max_length"
        )


def generation_rows(options: Options, model: mammut.MaMMUT, bos_id: int) -> list[dict[str, Any]]:
    """Measures and prints every batch size with every number of beams."""
    require_room(options, model)
    side = model.config.vision.image_size
    print(tables.GENERATION, flush=True)
    noise = np.random.default_rng(0)
    rows = []
    for batch_size in options.batch_sizes:
        image = jax.device_put(noise.integers(0, 256, (batch_size, side, side, 3), np.uint8))
        start = jax.device_put(np.full((batch_size, 1), bos_id, np.int32))
        for beams in options.beams:
            config = GenerateConfig(max_new_tokens=options.new_tokens, num_beams=beams)
            rows.append(measure_generation(model, image, start, config, options.rounds))
            print(tables.generation(rows[-1]), flush=True)
    return rows


def growth_rows(
    options: Options, model: mammut.MaMMUT, steps: int, peak: float
) -> list[dict[str, Any]]:
    """Measures and prints the step over everything that --grow names."""
    architecture = model.config
    measured = []
    for axis in options.grow:
        if axis == "devices":
            counts = options.grow_sizes
            counts = counts or [n for n in (1, 2, 4, 8) if options.batch_size % n == 0]
            config = options.run.train_config(architecture, options.batch_size, model.compute)
            measured.append(child.over_devices(config, list(counts)))
        else:
            sizes = options.grow_sizes or growth.default_sizes(
                axis, architecture, options.batch_size
            )
            timed = {"steps": steps, "warmup": options.warmup, "peak": peak}
            measured.append(
                growth.measure_growth(
                    axis,
                    sizes,
                    architecture,
                    options.batch_size,
                    options.run,
                    model.compute,
                    **timed,
                )
            )
        print(tables.grown(measured[-1]), flush=True)
    return measured


def reading(
    options: Options, model: ModelConfig, processor: mammut.Processor | None
) -> dict[str, float]:
    """Measures images/s of --data, decoded and cropped as in training."""
    from mammut import testing
    from mammut.data import sources
    from mammut.data.batches import TrainBatches
    from mammut.performance.reading_time import measure_reading

    source = sources.open_source(options.data, image_size=model.vision.image_size, field="captions")
    processor = processor or testing.tiny_processor(model)
    config = DataConfig(train=options.data, batch_size=options.batch_size, threads=options.threads)
    return measure_reading(TrainBatches(source, processor, config, seed=0))


def video_rows(
    options: Options, model: mammut.MaMMUT, processor: mammut.Processor | None, bos_id: int
) -> list[dict[str, Any]]:
    """Measures and prints every stage of a video, from its file to its caption."""
    from mammut.performance import video_time

    require_room(options, model)
    image = processor.image if processor else mammut.ImageTransform(model.config.vision.image_size)
    transform = mammut.VideoTransform(options.frames)
    calls = 2 * options.rounds
    print(tables.VIDEO, flush=True)
    rows = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(tables.video(row), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        videos = options.videos
        if not videos:
            videos = (f"{folder}/clip.mp4",)
            video_time.make_clip(videos[0])
        for row in video_time.measure_reading(videos, transform, image, calls):
            add(row)
        largest = video_time.batch_of(videos, transform, image, max(options.batch_sizes))
    for batch_size in options.batch_sizes:
        video = jax.device_put(largest[:batch_size])
        add(video_time.measure_encoding(model, video, calls))
        start = jax.device_put(np.full((batch_size, 1), bos_id, np.int32))
        for beams in options.beams:
            config = GenerateConfig(max_new_tokens=options.new_tokens, num_beams=beams)
            add(video_time.measure_captioning(model, video, start, config, calls))
    return rows


def measure_model(options: Options) -> dict[str, Any]:
    """Measures everything that --what names, and prints it part by part."""
    model, processor, source = load_model(options)
    compute = options.run.compute(model.config, model.compute)
    bos_id = processor.bos_id if processor else 1
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    print(
        f"{source}: {parameters / 1e6:.1f}M parameters, {compute.dtype}, remat {compute.remat}, "
        f"unroll {compute.unroll}"
    )
    result: dict[str, Any] = {"model": source, "parameters": parameters}
    result |= {"config": to_dict(model.config), "compute": to_dict(compute)}
    steps = options.steps or (10 if jax.default_backend() == "cpu" else 20)
    if {"train", "parts", "growth"} & {*options.what}:
        result["peak_flops"] = peak = measured_peak(compute.dtype)
        print(f"peak: {peak / 1e12:.3g} TFLOP/s, measured in {compute.dtype} products")
        print(f"TFLOP/s: {FORMULA}")
    if {"train", "parts"} & {*options.what}:
        run = options.run.train_config(model.config, options.batch_size, model.compute)
        step = make_step(run, model)
    if "train" in options.what:
        result["train"] = measure(step, steps, options.warmup, peak)
        print(tables.steps([result["train"]]), flush=True)
    if "parts" in options.what:
        result["parts"] = measure_parts(step, options.rounds)
        print(tables.parts(result["parts"]), flush=True)
    step = None  # frees its memory for the next ones
    if "generate" in options.what:
        result["new_tokens"] = options.new_tokens
        result["rounds"] = options.rounds
        result["generate"] = generation_rows(options, computed(model, options.run), bos_id)
    if "growth" in options.what:
        result["growth"] = growth_rows(options, model, steps, peak)
    if "startup" in options.what:
        with tempfile.TemporaryDirectory() as cache:
            run = options.run.train_config(model.config, options.batch_size, model.compute)
            result["startup"] = child.startup(run, cache)
        print(tables.startup(result["startup"]), flush=True)
    if "data" in options.what:
        result["data"] = {"spec": options.data, **reading(options, model.config, processor)}
        print(tables.data(result["data"]), flush=True)
    if "video" in options.what:
        result |= {"frames": options.frames, "videos": list(options.videos)}
        model = computed(model, options.run)
        result["video"] = video_rows(options, model, processor, bos_id)
    return result


def measure_peer(options: Options) -> dict[str, Any]:
    """Measures training and generation of both sides.

    Both sides use one set of weights.
    """
    if options.peer_config is None:
        size = SIZES[options.peer_size]
        model_cfg = peer_config(size, options.peer_family, options.vocab_size)
        rows = size.batch
    else:
        model_cfg = options.peer_config
        rows = options.batch_size
    peer = OpenClip(options.peer, model_cfg, options.peer_family, rows)
    ours = beside_peer.load_ours(peer)
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(ours)))
    print(f"{options.peer_family} of {peer.version}: {parameters / 1e6:.1f}M parameters")
    result: dict[str, Any] = {
        "peer": peer.version,
        "family": options.peer_family,
        "model_cfg": peer.model_cfg,
        "parameters": parameters,
        "config": to_dict(ours.config),
        "compute": to_dict(beside_peer.as_peer(options.run).compute(ours.config, ours.compute)),
        "threads": num_cores(),
        "environment": {
            name: os.environ.get(name)
            for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "XLA_FLAGS")
        },
    }
    if "train" in options.what:
        turns = {
            "rounds": options.rounds,
            "per_turn": max(1, (options.steps or 24) // (2 * options.rounds)),
        }
        result["train"] = beside_peer.train(
            peer, ours, options.run, modes=options.peer_modes, **turns
        )
        print(tables.beside(result["train"]), flush=True)
    if "generate" in options.what:
        ours = beside_peer.load_ours(peer)  # again: training has changed the peer's weights
        result["generate"] = []
        for images in options.batch_sizes:
            for beams in options.beams:
                case = images, beams, options.new_tokens
                row = beside_peer.generation(peer, ours, options.run, *case, rounds=options.rounds)
                result["generate"].append(row)
                print(tables.beside_generation(row), flush=True)
    return result


def run(options: Options) -> dict[str, Any]:
    """Measures, prints, and writes the file."""
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    print(
        f"{jax.device_count()} {device.device_kind} ({device.platform}), {num_cores()} CPU cores, "
        f"jax {jax.__version__}, jaxlib {jaxlib.__version__}"
    )
    machine = {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cpu_cores": num_cores(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    versions = {"mammut": mammut.__version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__}
    versions["python"] = platform.python_version()
    result = {"machine": machine, "versions": versions}
    result |= measure_model(options) if options.peer is None else measure_peer(options)
    if options.out is not None:
        write_json(options.out, result)
        print(f"times: {options.out}")
    return result


def main(argv: list[str]) -> None:
    try:
        run(tyro.cli(Options, args=argv, prog="python -m eval.speed", description=__doc__))
    except KeyboardInterrupt:
        print("python -m eval.speed: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if os.environ.get("MAMMUT_TRACEBACK"):
            raise
        sys.exit(f"python -m eval.speed: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
