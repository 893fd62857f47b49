"""The paper's main model and pretraining: 2B parameters, batches of 16,384.

MaMMUT, arXiv 2303.16839, section 4.1.

From the paper: 500,000 steps of AdamW with weight decay 0.01, a learning rate of 1e-3 after 10,000
steps and falling linearly, the focal loss, weights 1 and 1, 224-pixel crops of 272-pixel images.
Not from the paper: scale and bias of the contrastive logits at the start (its temperature of 1
without a bias starts the focal loss at about 5,700, beside a captioning loss of 11), clipping and
betas, which it does not state, and the data, since ALIGN is not public: name yours with
`--data.train` and `--tokenizer.path`. `--compile-only --topology v5p:4x4x4` reports the costs of a
step.
"""

from mammut import presets
from mammut.config import (
    ComputeConfig,
    DataConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)

CROP = (224 / 272) ** 2  # of the area


def get_config() -> TrainConfig:
    return TrainConfig(
        model=presets.paper_2b(),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        data=DataConfig(
            train="tfds:laion400m/images/train",
            val=None,
            batch_size=16_384,
            crop_scale=(CROP, CROP),
            crop_ratio=(1.0, 1.0),
            threads=32,
        ),
        loss=LossConfig(contrastive="focal"),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_steps=10_000, schedule="linear", weight_decay=0.01, b2=0.999
        ),
        mesh=MeshConfig(data=-1, fsdp=16),
        steps=500_000,
        log_every=100,
        eval_every=0,
        checkpoint_every=5_000,
    )
