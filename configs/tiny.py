"""The default run: 0.4M parameters learn drawn scenes.

It takes minutes on a CPU, offline.
"""

from mammut import presets
from mammut.config import ComputeConfig, DataConfig, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=presets.tiny(),
        compute=ComputeConfig(unroll=4),
        data=DataConfig(
            train="synthetic:train", val="synthetic:val", batch_size=128, eval_batch_size=128
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100),
        steps=1_600,
        log_every=100,
        eval_every=400,
        checkpoint_every=400,
    )
