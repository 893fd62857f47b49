"""The time of a training step, and its memory.

The share of the device's peak FLOP/s is computed, too.
"""

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
from mammut.models.attention_kernels import Kernel, attention_kernel
from mammut.models.compute import ComputeConfig, Dtype, Remat
from mammut.models.mammut import MaMMUT, ModelConfig
from mammut.models.resnet import ResNetConfig
from mammut.models.video import count_patches, reads_tubes
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
    """How a training step is computed.

    A field that is None has its usual value: on a CPU float32 without remat and all layers
    unrolled, elsewhere bfloat16 with remat "dots".
    """

    # Number type of the computation.
    dtype: Dtype | None = None
    # Parts that the backward pass computes again.
    remat: Remat | None = None
    # Layers unrolled in each turn of the loop over layers.
    unroll: int | None = None
    # Whether the decoder runs twice, or once with both passes stacked.
    passes: Literal["two_calls", "fused"] | None = None
    # The kernel of image attention.
    image_attention: Literal["auto", "xla"] | None = None
    # Tokens of a chunk of the vocabulary loss.
    vocab_chunk: int = LossConfig.vocab_chunk
    # Micro-batches of a step.
    accumulation: int = 1
    mesh: MeshConfig = MeshConfig()

    def compute(self, model: ModelConfig, stored: ComputeConfig = ComputeConfig()) -> ComputeConfig:
        """Makes the compute config of `model` with these settings.

        The number types of the stored parameters are those of `stored`, the compute config of a
        loaded model.
        """
        if jax.default_backend() == "cpu":
            depths = (model.vision.depth, model.text.depth, model.text.text_only_depth)
            usual = ComputeConfig(unroll=max(depths))
        else:
            usual = ComputeConfig(dtype="bfloat16", remat="dots")
        names = ("dtype", "remat", "unroll", "passes", "image_attention")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        given |= {name: getattr(stored, name) for name in ("param_dtype", "text_param_dtype")}
        return dataclasses.replace(usual, **given)

    def train_config(
        self,
        model: ModelConfig,
        batch_size: int,
        stored: ComputeConfig = ComputeConfig(),
        **others: Any,
    ) -> TrainConfig:
        """Makes a run that trains `model` with these settings.

        `stored` is as for `compute`; `others` are fields of `TrainConfig`.
        """
        return TrainConfig(
            model=model,
            compute=self.compute(model, stored),
            data=DataConfig(batch_size=batch_size),
            loss=LossConfig(vocab_chunk=self.vocab_chunk),
            accumulation=self.accumulation,
            mesh=self.mesh,
            **others,
        )


def computed(model: MaMMUT, settings: RunSettings) -> MaMMUT:
    """Makes a model with the same weights and the given settings."""
    compute = settings.compute(model.config, model.compute)

    def make() -> MaMMUT:
        return MaMMUT(model.config, compute=compute, rngs=nnx.Rngs(0))

    graphdef = nnx.graphdef(nnx.eval_shape(make))
    return nnx.merge(graphdef, nnx.state(model))


def exact_float32(dtype: Dtype) -> Any:
    """Makes a context for exact products in float32.

    A GPU would round them to TF32's 10 bits.
    """
    return jax.default_matmul_precision("highest" if dtype == "float32" else None)


def noise_batch(config: TrainConfig) -> dict[str, np.ndarray]:
    """Makes a batch of random pixels and tokens for `ImageTextTask`.

    Half of a text or more is real.
    """
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
    """The real training step of a run, compiled.

    Its batch is already on the devices.
    """

    config: TrainConfig
    trainer: Trainer
    batch: dict[str, jax.Array]
    state: Any
    compiled: Any
    compile_s: float
    metrics: dict[str, float]  # seconds of the first call

    def __call__(self) -> None:
        """Runs one step and waits for it.

        The state is donated from call to call.
        """
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
            # Copies: the step takes over its arguments.
            state = trainer.init_from(jax.tree.map(np.array, params))
        batch = sharding.device_batch(batch, mesh)
        began = time.perf_counter()
        compiled = trainer.step.lower(state, batch).compile()
        compile_s = time.perf_counter() - began
        state, metrics = compiled(state, batch)
        metrics = {name: float(x) for name, x in jax.device_get(metrics).items()}
    return Step(config, trainer, batch, state, compiled, compile_s, metrics)


def memory(compiled: Any) -> dict[str, float]:
    """Counts the GiB of one device that a compiled program takes.

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
    """Measures FLOP/s of one device by square matrix products.

    The fastest of `calls` counts.
    """
    side = 2_048 if jax.default_backend() == "cpu" else 8_192
    # Noise: zeros take less power, and on some devices less time.
    left, right = (jax.random.normal(jax.random.key(i), (side, side), dtype) for i in range(2))
    product = jax.jit(jnp.matmul)
    return 2 * side**3 / min(timed(lambda: product(left, right).block_until_ready(), calls))


def utilisation(config: TrainConfig, seconds: float, peak: float) -> dict[str, float]:
    """Computes the rate of a step of `seconds` by `FORMULA`.

    `peak` is the FLOP/s of one device.

    Returns:
      `tflops` of all devices together, `mfu` against `peak`, and for bfloat16 on a known chip
      `mfu_stated`, against the maker's figure.
    """
    devices = int(np.prod(config.mesh.sizes(jax.device_count())))
    rate = step_flops(config)[0] / seconds
    shares = {"tflops": rate / 1e12, "mfu": rate / (peak * devices)}
    chip = find_chip(jax.devices()[0].device_kind)
    if chip and config.compute.dtype == "bfloat16":
        shares["mfu_stated"] = rate / (chip.flops * devices)
    return shares


def measure(step: Step, steps: int, warmup: int, peak: float) -> dict[str, Any]:
    """Measures a step: time, rate, utilisation and memory.

    The result names the sizes of the step.
    """
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
        "attention": image_attention_kernel(
            config.model, config.compute, frames=config.data.frames or 1
        ),
    }


def image_attention_kernel(
    config: ModelConfig, compute: ComputeConfig, platform: str | None = None, frames: int = 1
) -> Kernel:
    """Finds the kernel of the image encoder's attention.

    It is the kernel for images of `image_size`, or for videos of `frames` frames. A ResNet has
    none. `platform` is "cpu", "gpu" or "tpu"; None: the platform of the current mesh, or the
    default one.
    """
    vision = config.vision
    if compute.image_attention == "xla" or isinstance(vision, ResNetConfig):
        return "xla"
    at_once = frames if reads_tubes(vision) else 1
    tokens = count_patches(vision, at_once) + vision.class_token
    head_size = vision.width // vision.num_heads
    return attention_kernel(compute.dtypes.compute, tokens, head_size, platform)
