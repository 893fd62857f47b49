"""Whether a model sees motion: drawn shapes that move on a torus, for a CPU.

A single frame says nothing of direction and speed, and frames without their order nothing of which
colour came first (`mammut.data.moving`). The recipe has not been trained to its end yet: what it
reaches is not known. By default the model learns captions; `--task vqa` learns the questions
instead. Score it and its controls, whose scores should be chance, with

    python -m eval.vqa runs/moving --data moving:val
    python -m eval.vqa runs/moving --data moving:val --frames 1
    python -m eval.vqa runs/moving --data moving:val --shuffle-frames
"""

from mammut import presets
from mammut.config import ComputeConfig, DataConfig, OptimizerConfig, TrainConfig
from mammut.data.moving import NUM_FRAMES


def get_config() -> TrainConfig:
    return TrainConfig(
        model=presets.tiny_video(NUM_FRAMES),
        compute=ComputeConfig(unroll=4),
        data=DataConfig(
            train="moving:train",
            val="moving:val",
            frames=NUM_FRAMES,
            batch_size=64,
            eval_batch_size=160,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100),
        steps=3_000,
        log_every=100,
        eval_every=1_000,
        checkpoint_every=1_000,
    )
