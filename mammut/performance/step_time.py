"""The time of a training step, its share of the device's peak FLOP/s, and its memory."""

import dataclasses
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mammut.core import sharding
from mammut.core.sharding import MeshConfig
from mammut.data.config import DataConfig
from mammut.models.compute import Dtype, Remat
from mammut.models.mammut import MaMMUT, ModelConfig, image_attention_kernel
from mammut.performance.chips import GIB, find_chip
from mammut.performance.compile_report import step_flops
from mammut.performance.out_of_memory import enough_memory
from mammut.performance.timing import summary, timed
from mammut.training.config import LossConfig, TrainConfig
from mammut.training.step import Trainer, make_trainer
from mammut.training.tasks import ImageTextTask

FORMULA = (
    "3 x forward FLOPs x batch / seconds; 2 a multiply-add, attention half where it is causal, "
    "nothing for what is computed again; MFU divides by the peak x devices"
)


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """How a training step is computed; a field that is None keeps the model's own setting."""

    dtype: Dtype | None = None
    remat: Remat | None = None
    unroll: int | None = None  # None: on a CPU, all layers
    passes: Literal["two_calls", "fused"] | None = None
    image_attention: Literal["auto", "xla"] | None = None
    # Tokens of a chunk of the vocabulary loss.
    vocab_chunk: int = LossConfig.vocab_chunk
    # Micro-batches of a step.
    accumulation: int = 1
    mesh: MeshConfig = MeshConfig()

    def applied(self, model: ModelConfig) -> ModelConfig:
        """The config of `model` with these settings."""
        names = "dtype", "remat", "unroll", "passes", "image_attention"
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if jax.default_backend() == "cpu":
            given = {
                "unroll": max(model.vision.depth, model.text.depth, model.text.text_only_depth),
                **given,
            }
        return dataclasses.replace(model, **given)

    def train_config(self, model: ModelConfig, batch_size: int, **others: Any) -> TrainConfig:
        """A run that trains `model` with these settings; `others` are fields of `TrainConfig`."""
        return TrainConfig(
            model=self.applied(model),
            data=DataConfig(batch_size=batch_size),
            loss=LossConfig(vocab_chunk=self.vocab_chunk),
            accumulation=self.accumulation,
            mesh=self.mesh,
            **others,
        )


def computed(model: MaMMUT, settings: RunSettings) -> MaMMUT:
    """A model with the same weights and the settings of `settings`."""
    config = settings.applied(model.config)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: MaMMUT(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, nnx.state(model))


def exact_float32(dtype: Dtype) -> Any:
    """A context for exact products in float32; a GPU would round them to TF32's 10 bits."""
    return jax.default_matmul_precision("highest" if dtype == "float32" else None)


def noise_batch(config: TrainConfig) -> dict[str, np.ndarray]:
    """A batch of random pixels and tokens for `ImageTextTask`; at least half of a text is real."""
    rng = np.random.default_rng(0)
    rows = config.data.batch_size
    size = config.model.vision.image_size
    length = config.text_length
    real = rng.integers(max(length // 2, 2), length + 1, (rows, 1))
    return {
        "image": rng.integers(0, 256, (rows, size, size, 3), np.uint8),
        "tokens": rng.integers(1, config.model.text.vocab_size, (rows, length)).astype(np.int32),
        "text_valid": np.arange(length) < real,
    }


@dataclasses.dataclass
class Step:
    """The real training step of a run, compiled, with a batch that is on the devices already."""

    config: TrainConfig
    trainer: Trainer
    batch: dict[str, jax.Array]
    state: Any
    compiled: Any
    compile_s: float
    metrics: dict[str, float]  # of the first call

    def __call__(self) -> None:
        """Runs one step and waits for it; the state is donated from call to call."""
        self.state, metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready(metrics)


def make_step(
    config: TrainConfig, model: MaMMUT | None = None, batch: dict[str, np.ndarray] | None = None
) -> Step:
    """Builds, compiles and calls the step of `config` once.

    Args:
      config: the run.
      model: a model whose weights to start from; None: random weights.
      batch: the batch to train on; None: noise of `config.data.batch_size` examples.

    Raises:
      ValueError: the batch or the mesh do not divide over the devices.
      MemoryError: the step does not fit into the memory of a device.
    """
    mesh = sharding.make_mesh(config.mesh)
    batch = noise_batch(config) if batch is None else batch
    trainer = make_trainer(config, ImageTextTask(config.loss), mesh)
    with jax.set_mesh(mesh), enough_memory(config):
        if model is None:
            state = trainer.init(config.seed)
        else:
            params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
            # Copies: the step takes over what it is given.
            state = trainer.init_from(jax.tree.map(np.array, params))
        batch = sharding.device_batch(batch, mesh)
        began = time.perf_counter()
        compiled = trainer.step.lower(state, batch).compile()
        compile_s = time.perf_counter() - began
        state, metrics = compiled(state, batch)
        metrics = {name: float(x) for name, x in jax.device_get(metrics).items()}
    return Step(config, trainer, batch, state, compiled, compile_s, metrics)


def memory(compiled: Any) -> dict[str, float]:
    """GiB of one device that a compiled program takes.

    Returns:
      `state_and_batch`, `temporaries`, `total`, and `peak`, the most that this process has held,
      where the device counts it.
    """
    sizes = compiled.memory_analysis()
    output = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    amounts = {
        "state_and_batch": sizes.argument_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "total": sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + output,
    }
    counters = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in counters:
        amounts["peak"] = counters["peak_bytes_in_use"]
    return {name: amount / GIB for name, amount in amounts.items()}


def measured_peak(dtype: Dtype, calls: int = 5) -> float:
    """Measures FLOP/s of one device in products of two square matrices: the fastest of `calls`."""
    side = 2_048 if jax.default_backend() == "cpu" else 8_192
    # Noise: zeros take less power, and on some devices less time.
    left, right = (jax.random.normal(jax.random.key(i), (side, side), dtype) for i in range(2))
    product = jax.jit(jnp.matmul)
    return 2 * side**3 / min(timed(lambda: product(left, right).block_until_ready(), calls))


def utilisation(config: TrainConfig, seconds: float, peak: float) -> dict[str, float]:
    """The rate of a step of `seconds` by `FORMULA`; `peak` is the FLOP/s of one device.

    Returns:
      `tflops` of all devices together, `mfu` against `peak`, and for bfloat16 on a known chip
      `mfu_stated`, against the maker's figure.
    """
    devices = int(np.prod(config.mesh.sizes(jax.device_count())))
    rate = step_flops(config)[0] / seconds
    shares = {"tflops": rate / 1e12, "mfu": rate / (peak * devices)}
    chip = find_chip(jax.devices()[0].device_kind)
    if chip and config.model.dtype == "bfloat16":
        shares["mfu_stated"] = rate / (chip.flops * devices)
    return shares


def measure(step: Step, steps: int, warmup: int, peak: float) -> dict[str, Any]:
    """Measures a step: time, rate, utilisation and memory, with the sizes that it had."""
    config = step.config
    with jax.set_mesh(step.trainer.mesh):
        times = summary(timed(step, steps, warmup), config.data.batch_size)
    return {
        "batch": config.data.batch_size,
        "image_size": config.model.vision.image_size,
        "length": config.text_length,
        "compile_s": step.compile_s,
        **times,
        **utilisation(config, times["seconds"], peak),
        "memory_gib": memory(step.compiled),
        "losses": {name: step.metrics[name] for name in ("loss_contrastive", "loss_caption")},
        "attention": image_attention_kernel(config.model),
    }
