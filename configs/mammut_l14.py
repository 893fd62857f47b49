"""Pretraining at ViT-L/14 size in bfloat16, for 64 accelerators or more.

Parameters are split over all of them.

You name the data: `--data.train tfds:NAME/SPLIT` (or any other source) with
`--tokenizer.path`; the default is a public set of the right kind, to be prepared by
tensorflow-datasets. `--compile-only --topology v5e:8x8` reports the costs of a step before there is
a device; docs/scaling.md has the table.
"""

from mammut import presets
from mammut.config import ComputeConfig, DataConfig, MeshConfig, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=presets.mammut_l14(),
        # With remat "dots", the activations of 64 examples a device would take about 12 GiB, of 16
        # on a v5e.
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        data=DataConfig(
            train="tfds:laion400m/images/train",
            val=None,
            batch_size=4_096,
            crop_scale=(0.5, 1.0),
            threads=32,
        ),
        optimizer=OptimizerConfig(
            learning_rate=5e-4, warmup_steps=5_000, weight_decay=0.2, b2=0.98
        ),
        mesh=MeshConfig(data=-1, fsdp=16),
        steps=300_000,
        log_every=100,
        eval_every=0,
        checkpoint_every=5_000,
    )
