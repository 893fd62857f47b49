"""Classification as text, fine-tuned on five kinds of flowers.

The model writes the name of the flower in the photo.

Run `python train.py configs/flickr8k.py` first; `--init` names another model to start from. The
file is sorted by class, so every fifth line is kept for validation. Score it with `python -m
eval.classify runs/flowers --data jsonl:PATH[::5]`.
"""

from mammut.config import ComputeConfig, DataConfig, OptimizerConfig, TrainConfig
from mammut.testing import shared_data


def get_config() -> TrainConfig:
    photos = f"jsonl:{shared_data('flowers') / 'labels.jsonl'}"
    return TrainConfig(
        task="classify",
        init="runs/flickr8k",
        compute=ComputeConfig(unroll=6),
        data=DataConfig(
            train=f"{photos}[!::5]",
            val=f"{photos}[::5]",
            batch_size=60,
            eval_batch_size=60,
            crop_scale=(0.5, 1.0),
            horizontal_flip=True,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=20, weight_decay=0.1, b2=0.98),
        steps=200,
        log_every=20,
        eval_every=50,
        checkpoint_every=50,
    )
