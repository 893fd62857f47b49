"""Pretraining on videos at ViT-L/14 size in bfloat16, for 64 accelerators or more.

The model is `mammut_l14` with the paper's tubes: 704 tokens of 32 frames. It is best started from
an image model of the same size, `--init FOLDER`; a video without tubes, frame by frame, is what
`configs/mammut_l14.py --data.frames 32` trains on.

You name the data: `--data.train webvid:RESULTS.csv,VIDEOS` (or any other source of videos) with
`--tokenizer.path`. `--compile-only --topology v5e:8x8` reports the costs of a step before there is
a device; docs/scaling.md has the table.
"""

from mammut import presets
from mammut.config import ComputeConfig, DataConfig, MeshConfig, OptimizerConfig, TrainConfig

FRAMES = 32


def get_config() -> TrainConfig:
    return TrainConfig(
        model=presets.mammut_l14_video(FRAMES),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        data=DataConfig(
            train="webvid:results_2M_train.csv,videos",
            val=None,
            frames=FRAMES,
            batch_size=1_024,
            crop_scale=(0.5, 1.0),
            threads=32,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, warmup_steps=2_000, weight_decay=0.2, b2=0.98
        ),
        mesh=MeshConfig(data=-1, fsdp=16),
        steps=50_000,
        log_every=100,
        eval_every=0,
        checkpoint_every=5_000,
    )
