"""Times generation with and without the cache: the same images, the same search, the same run.

    python -m eval.speed [CHECKPOINT] [--preset NAME] [--batch-sizes 1 16 64] [--beams 1 4] [--out FILE.json]

The cached loop is `mammut.generate.generate`. The uncached one runs the caption pass over all places of the text for
each new token, and so makes the image's keys and values again each time, and for every beam; it encodes the image once,
too. Both make --new-tokens tokens from a start token: nothing ends early. A time is that of a batch, image encoder
included; ms/token divides it by --new-tokens, tokens/s counts those of the best text of each image.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import tyro
from flax import nnx

import mammut
from mammut.config import Dtype, ModelConfig, to_dict
from mammut.generate import generate
from mammut.search import Decoding, GenerateConfig, Generation, search

_NO_END = -1  # an id that no token has


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time."""

    # A model folder or run. Without one: random weights.
    checkpoint: Annotated[str | None, tyro.conf.Positional] = None
    # A function of mammut.presets, for random weights; its max_length follows --new-tokens. By default: tiny.
    preset: str | None = None
    batch_sizes: tuple[int, ...] = (1, 16, 64)
    beams: tuple[int, ...] = (1, 4)  # 1: greedy
    new_tokens: int = 20  # of every text
    # The compute type; by default the model's. Only in float32 can the two loops be expected to say all the same.
    dtype: Dtype | None = None
    rounds: int = 3  # each loop is timed twice a round: cached, uncached, uncached, cached
    # A JSON file for all numbers, single times included.
    out: pathlib.Path | None = None

    def __post_init__(self):
        for name in ("batch_sizes", "beams"):
            values = getattr(self, name)
            if min(values, default=0) < 1:
                given = " ".join(map(str, values)) or "empty"
                raise ValueError(f"--{name.replace('_', '-')} is {given}, expected numbers of at least 1")
        if self.new_tokens < 1:
            raise ValueError(f"--new-tokens is {self.new_tokens}, expected at least 1")
        if self.rounds < 3:
            raise ValueError(f"--rounds is {self.rounds}, expected at least 3, for medians of 6 times")
        if self.checkpoint is not None and self.preset is not None:
            raise ValueError(f"both CHECKPOINT {self.checkpoint} and --preset {self.preset} are given, expected one")
        if self.out is not None and self.out.suffix != ".json":
            raise ValueError(f"--out is {self.out}, expected a name that ends in .json")


def load_model(options: Options) -> tuple[mammut.MaMMUT, int, str]:
    """The model to time, the id of its start token, and where it is from, in words."""
    if options.checkpoint is not None:
        model, processor = mammut.load(options.checkpoint)
        places = model.config.text.max_length
        if options.new_tokens >= places:
            raise ValueError(
                f"--new-tokens is {options.new_tokens}, expected fewer than the {places} of DecoderConfig.max_length "
                f"in {options.checkpoint}"
            )
        bos_id, source = processor.bos_id, options.checkpoint
    else:
        name = options.preset or "tiny"
        preset = vars(mammut.presets).get(name)
        # Beside the presets, the module holds the classes and helpers that they are made of.
        if name.startswith("_") or isinstance(preset, type) or not callable(preset):
            raise ValueError(f"--preset is {name!r}, expected a function of mammut.presets such as tiny or mammut_b16")
        config: ModelConfig = preset()
        text = dataclasses.replace(config.text, max_length=1 + options.new_tokens)
        model = mammut.MaMMUT(dataclasses.replace(config, text=text), rngs=nnx.Rngs(0))
        bos_id, source = 1, f"preset {name} with random weights"
    if options.dtype is not None:
        config = dataclasses.replace(model.config, dtype=options.dtype)
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: mammut.MaMMUT(config, rngs=nnx.Rngs(0))))
        model = nnx.merge(graphdef, nnx.state(model))
    return model, bos_id, source


def cached(model: mammut.MaMMUT, image: jax.Array, start: jax.Array, config: GenerateConfig) -> Generation:
    """`generate` from start tokens int[B, 1], without an end."""
    return generate(model, image, start, jnp.ones(start.shape, bool), config, eos_id=_NO_END)


def uncached(model: mammut.MaMMUT, image: jax.Array, start: jax.Array, config: GenerateConfig) -> Generation:
    """The same by the caption pass over the whole text at every step."""

    def step(text, position, image_tokens):
        features = model.text.caption_pass(text, jnp.ones(text.shape, bool), image_tokens)
        return model.text.logits(features[:, position]), image_tokens

    def take(image_tokens, beam):
        # The rows of an image see the same image tokens: what matters is how many there are.
        rows_now = len(image_tokens) // len(beam)
        return jnp.repeat(image_tokens, beam.shape[1] // rows_now, axis=0)

    decoding = Decoding(step, take, model.image_tokens(image).tokens)
    text = jnp.pad(start, ((0, 0), (0, config.max_new_tokens)), constant_values=_NO_END)
    return search(decoding, text, jnp.ones(len(text), int), config, eos_id=_NO_END)


def time_case(
    model: mammut.MaMMUT, image: jax.Array, start: jax.Array, config: GenerateConfig, rounds: int
) -> dict[str, Any]:
    """Both loops for one batch: first whether they give the same texts, then their times."""
    graphdef, params = nnx.split(model)
    row: dict[str, Any] = {"batch": len(image), "beams": config.num_beams}
    programs, found = {}, {}
    for name, loop in (("cached", cached), ("uncached", uncached)):

        def run(params, image, start, loop=loop):
            return loop(nnx.merge(graphdef, params), image, start, config)

        began = time.perf_counter()
        programs[name] = jax.jit(run).lower(params, image, start).compile()
        row[name] = {"compile_s": time.perf_counter() - began}
        found[name] = jax.device_get(programs[name](params, image, start))
    of_cached, of_uncached = found.values()
    row["steps"] = [int(of_cached.steps), int(of_uncached.steps)]
    row["texts_equal"] = int((of_cached.tokens[:, 0] == of_uncached.tokens[:, 0]).all(1).sum())
    row["max_score_difference"] = float(abs(of_cached.scores[:, 0] - of_uncached.scores[:, 0]).max())

    times = {name: [] for name in programs}
    for name in ("cached", "uncached", "uncached", "cached") * rounds:
        began = time.perf_counter()
        jax.block_until_ready(programs[name](params, image, start))
        times[name].append(time.perf_counter() - began)
    for name, seconds in times.items():
        low, median, high = (float(x) for x in np.percentile(seconds, [25, 50, 75]))
        row[name] |= {
            "seconds": median,
            "seconds_iqr": high - low,
            "captions_per_s": len(image) / median,
            "new_tokens_per_s": len(image) * config.max_new_tokens / median,
            "ms_per_token": 1000 * median / config.max_new_tokens,
            "all_seconds": seconds,
        }
    row["speedup"] = row["uncached"]["seconds"] / row["cached"]["seconds"]
    return row


HEADING = (
    f"{'batch':>5} {'beams':>5} {'equal':>7} {'loop':<8} {'compile s':>9} {'ms/batch':>9} {'IQR':>8} "
    f"{'captions/s':>10} {'tokens/s':>9} {'ms/token':>8} {'speedup':>8}"
)


def lines(row: dict[str, Any]) -> str:
    """A case as two lines of the table."""
    equal = f"{row['texts_equal']}/{row['batch']}"
    cases = {"cached": f"{row['batch']:>5} {row['beams']:>5} {equal:>7}", "uncached": " " * 19}
    ends = {"cached": f" {row['speedup']:>7.2f}x", "uncached": ""}
    return "\n".join(
        f"{case} {name:<8} {row[name]['compile_s']:>9.1f} {1000 * row[name]['seconds']:>9.1f} "
        f"{1000 * row[name]['seconds_iqr']:>8.1f} {row[name]['captions_per_s']:>10.1f} "
        f"{row[name]['new_tokens_per_s']:>9.0f} {row[name]['ms_per_token']:>8.2f}{ends[name]}"
        for name, case in cases.items()
    )


def measure(options: Options) -> dict[str, Any]:
    """Times all cases, prints each as it is done, and writes the file."""
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    model, bos_id, source = load_model(options)
    config, device = model.config, jax.devices()[0]
    size = config.vision.image_size
    result = {
        "model": source,
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(model))),
        "config": to_dict(config),
        "machine": {"platform": device.platform, "device": device.device_kind, "cpu_cores": os.cpu_count()},
        "versions": {"mammut": mammut.__version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__},
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "rows": [],
    }
    print(f"{source}: {result['parameters'] / 1e6:.1f}M parameters, {config.dtype}, {options.new_tokens} new tokens")
    print(f"one {device.device_kind} ({device.platform}), {os.cpu_count()} CPU cores, jax {jax.__version__}")
    print(HEADING, flush=True)
    noise = np.random.default_rng(0)
    for batch_size in options.batch_sizes:
        image = jax.device_put(noise.integers(0, 256, (batch_size, size, size, 3), np.uint8), device)
        start = jax.device_put(np.full((batch_size, 1), bos_id, np.int32), device)
        for beams in options.beams:
            search_config = GenerateConfig(max_new_tokens=options.new_tokens, num_beams=beams)
            # Float32 is to mean float32: a GPU's products would have 10 bits otherwise, and texts come apart.
            with jax.default_matmul_precision("highest" if config.dtype == "float32" else None):
                row = time_case(model, image, start, search_config, options.rounds)
            result["rows"].append(row)
            print(lines(row), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
        print(f"times: {options.out}")
    return result


def main(argv: list[str]) -> None:
    try:
        options = tyro.cli(Options, args=argv, prog="python -m eval.speed", description=__doc__)
        measure(options)
    except (ValueError, OSError) as error:
        if os.environ.get("MAMMUT_TRACEBACK"):
            raise
        sys.exit(f"python -m eval.speed: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
