"""The training step: its time and rate, the share of the device's arithmetic that it uses, the memory it wants."""

import dataclasses
import math
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mammut.core import sharding
from mammut.core.sharding import MeshConfig
from mammut.data.config import DataConfig
from mammut.models.attention_kernels import Kernel, attention_kernel
from mammut.models.compute import ComputeConfig, Dtype, Remat
from mammut.models.mammut import MaMMUT, ModelConfig
from mammut.models.resnet import ResNetConfig
from mammut.performance.chips import find_chip
from mammut.performance.compile_report import step_flops
from mammut.performance.out_of_memory import enough_memory
from mammut.performance.timing import summary, timed
from mammut.training.config import LossConfig, TrainConfig
from mammut.training.step import Trainer, make_trainer
from mammut.training.tasks import ImageTextTask

FORMULA = (
    "3 x forward FLOPs x batch / seconds; 2 a multiply-add, attention half where it is causal, nothing for what is "
    "computed again; MFU divides by the peak x devices"
)


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """How the step computes what it computes.

    None: float32 without remat on a CPU, elsewhere bfloat16 with remat "dots".
    """

    dtype: Dtype | None = None
    remat: Remat | None = None
    unroll: int | None = None  # None: on a CPU, all layers
    passes: Literal["two_calls", "fused"] | None = None
    image_attention: Literal["auto", "xla"] | None = None
    vocab_chunk: int = LossConfig.vocab_chunk
    accumulation: int = 1
    mesh: MeshConfig = MeshConfig()

    def compute(self, model: ModelConfig) -> ComputeConfig:
        """How `model` is computed this way."""
        if jax.default_backend() == "cpu":
            depths = (model.vision.depth, model.text.depth, model.text.text_only_depth)
            usual = ComputeConfig(unroll=max(depths))
        else:
            usual = ComputeConfig(dtype="bfloat16", remat="dots")
        names = ("dtype", "remat", "unroll", "passes", "image_attention")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(usual, **given)

    def train_config(self, model: ModelConfig, batch_size: int, **others: Any) -> TrainConfig:
        """A run that trains `model` this way; `others` are fields of `TrainConfig`."""
        return TrainConfig(
            model=model,
            compute=self.compute(model),
            data=DataConfig(batch_size=batch_size),
            loss=LossConfig(vocab_chunk=self.vocab_chunk),
            accumulation=self.accumulation,
            mesh=self.mesh,
            **others,
        )


def computed(model: MaMMUT, settings: RunSettings) -> MaMMUT:
    """The same weights in a model that computes as `settings` say."""
    compute = settings.compute(model.config)

    def make() -> MaMMUT:
        return MaMMUT(model.config, compute=compute, rngs=nnx.Rngs(0))

    graphdef = nnx.graphdef(nnx.eval_shape(make))
    return nnx.merge(graphdef, nnx.state(model))


def exact_float32(dtype: Dtype) -> Any:
    """A context in which products in float32 are that: a GPU's would have 10 bits otherwise, and results come apart."""
    return jax.default_matmul_precision("highest" if dtype == "float32" else None)


def noise_batch(config: TrainConfig) -> dict[str, np.ndarray]:
    """Random pixels and tokens for `ImageTextTask`; at least half of each text is real."""
    arrays = ImageTextTask(config.loss).abstract_batch(config)
    rows, length = arrays["tokens"].shape
    rng = np.random.default_rng(0)
    real = rng.integers(max(length // 2, 2), length + 1, (rows, 1))
    return {
        "image": rng.integers(0, 256, arrays["image"].shape, np.uint8),
        "tokens": rng.integers(1, config.model.text.vocab_size, (rows, length)).astype(np.int32),
        "text_valid": np.arange(length) < real,
    }


@dataclasses.dataclass
class Step:
    """The real training step of a run, compiled, with its batch on its devices already."""

    config: TrainConfig
    trainer: Trainer
    batch: dict[str, jax.Array]
    state: Any
    compiled: Any
    compile_s: float
    metrics: dict[str, float]  # of the first call

    def __call__(self) -> None:
        """One step, waited for; the state goes from call to call, donated."""
        self.state, metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready(metrics)


def make_step(
    config: TrainConfig, model: MaMMUT | None = None, batch: dict[str, np.ndarray] | None = None
) -> Step:
    """Builds, compiles and calls the step of `config` once.

    Args:
      model: whose weights to start from. None: random ones.
      batch: what to train on. None: noise of `config.data.batch_size` examples.

    Raises:
      ValueError: the batch or the mesh do not divide over the devices.
      MemoryError: it does not fit.
    """
    mesh = sharding.make_mesh(config.mesh)
    batch = noise_batch(config) if batch is None else batch
    trainer = make_trainer(config, ImageTextTask(config.loss), mesh)
    with jax.set_mesh(mesh), enough_memory(config):
        if model is None:
            state = trainer.init(config.seed)
        else:  # copies: the step takes over what it is given
            state = trainer.init_from(
                jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
            )
        batch = sharding.device_batch(batch, mesh)
        began = time.perf_counter()
        compiled = trainer.step.lower(state, batch).compile()
        compile_s = time.perf_counter() - began
        state, metrics = compiled(state, batch)
        found = {name: float(x) for name, x in jax.device_get(metrics).items()}
    return Step(config, trainer, batch, state, compiled, compile_s, found)


def memory(compiled: Any) -> dict[str, float]:
    """GiB of one device that a compiled program takes; `peak`: the most that this process has held, where known."""
    told, stats = compiled.memory_analysis(), jax.devices()[0].memory_stats() or {}
    output = told.output_size_in_bytes - told.alias_size_in_bytes
    sizes = {
        "state_and_batch": told.argument_size_in_bytes,
        "temporaries": told.temp_size_in_bytes,
        "total": told.argument_size_in_bytes + told.temp_size_in_bytes + output,
        **({"peak": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}),
    }
    return {name: size / 2**30 for name, size in sizes.items()}


def measured_peak(dtype: Dtype, calls: int = 5) -> float:
    """FLOP/s of one device in the product of two square matrices: the fastest of a few calls."""
    side = 2_048 if jax.default_backend() == "cpu" else 8_192
    # Noise: zeros take less power, and on some devices less time.
    left, right = (jax.random.normal(jax.random.key(i), (side, side), dtype) for i in range(2))
    product = jax.jit(jnp.matmul)
    return 2 * side**3 / min(timed(lambda: product(left, right).block_until_ready(), calls))


def utilisation(config: TrainConfig, seconds: float, peak: float) -> dict[str, float]:
    """TFLOP/s of all devices together, and MFU against `peak` FLOP/s a device and the maker's figure: see `FORMULA`."""
    devices = config.mesh.sizes(jax.device_count())
    count, chip = int(np.prod(devices)), find_chip(jax.devices()[0].device_kind)
    rate = step_flops(config)[0] / seconds
    stated = (
        {"mfu_stated": rate / (chip.flops * count)}
        if chip and config.compute.dtype == "bfloat16"
        else {}
    )
    return {"tflops": rate / 1e12, "mfu": rate / (peak * count), **stated}


def measure(step: Step, steps: int, warmup: int, peak: float) -> dict[str, Any]:
    """Time, rate, utilisation and memory of a step, and what it was."""
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
        "attention": image_attention_kernel(config.model, config.compute),
    }


def image_attention_kernel(
    config: ModelConfig, compute: ComputeConfig, platform: str | None = None
) -> Kernel:
    """The kernel that the image encoder's attention runs on, for images of `image_size`.

    A ResNet has none. `platform` is "cpu", "gpu" or "tpu"; None: that of the current mesh, or the
    default one.
    """
    vision = config.vision
    if compute.image_attention == "xla" or isinstance(vision, ResNetConfig):
        return "xla"
    tokens = math.prod(vision.grid) + vision.class_token
    head_size = vision.width // vision.num_heads
    return attention_kernel(compute.dtypes.compute, tokens, head_size, platform)
