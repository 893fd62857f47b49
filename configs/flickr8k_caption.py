"""Captioning fine-tuned: the Flickr8k run goes on with the captioning loss alone.

Run `python train.py configs/flickr8k.py` first; `--init` names another model to start from. Score
it with `python -m eval.caption runs/flickr8k_caption --data jsonl:PATH[:1000]`.
"""

from mammut.config import ComputeConfig, DataConfig, LossConfig, OptimizerConfig, TrainConfig
from mammut.testing import shared_data


def get_config() -> TrainConfig:
    photos = f"jsonl:{shared_data('flickr8k') / 'captions.jsonl'}"
    return TrainConfig(
        task="caption",
        init="runs/flickr8k",
        compute=ComputeConfig(unroll=6),
        data=DataConfig(
            train=f"{photos}[1000:]",
            val=f"{photos}[:1000]",
            batch_size=100,
            eval_batch_size=250,
            crop_scale=(0.5, 1.0),
            horizontal_flip=True,
        ),
        loss=LossConfig(label_smoothing=0.1),
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=20, weight_decay=0.1, b2=0.98),
        steps=300,
        log_every=25,
        eval_every=100,
        checkpoint_every=100,
    )
