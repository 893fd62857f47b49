"""What the train step takes of each device, found out by compiling it: nothing runs."""

import time

import jax
import jax.numpy as jnp

from mammut import sharding
from mammut.config import TrainConfig
from mammut.tasks import TASKS
from mammut.training import make_trainer


def compile_report(config: TrainConfig, topology: str | None = None) -> str:
    """Compiles the step of a run for `topology`, such as "v5e:8x8", or for the devices here."""
    trainer = make_trainer(config, TASKS[config.task](config.loss), sharding.make_mesh(config.mesh))
    rows, text, side = config.data.batch_size, config.model.text, config.model.vision.image_size
    place = sharding.batch_sharding(trainer.mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((rows, side, side, 3), jnp.uint8, sharding=place),
        "tokens": jax.ShapeDtypeStruct((rows, text.max_length), jnp.int32, sharding=place),
        "text_valid": jax.ShapeDtypeStruct((rows, text.max_length), jnp.bool_, sharding=place),
        "target": jax.ShapeDtypeStruct((rows, text.max_length), jnp.bool_, sharding=place),
    }
    start = time.perf_counter()
    with jax.set_mesh(trainer.mesh):
        memory = trainer.step.lower(trainer.abstract_state, batch).compile().memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "of them donated": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    return f"compiled in {time.perf_counter() - start:.0f} s; MB a device: " + ", ".join(
        f"{name} {size / 1e6:,.1f}" for name, size in sizes.items()
    )
