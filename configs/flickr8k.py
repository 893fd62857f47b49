"""Flickr8k from scratch on a CPU: 5,000 photos with five captions each.

1,000 more photos are kept for validation.

The photos are read from `flickr8k/captions.jsonl` under the folder of data sets that
`MAMMUT_SHARED` names (by default `shared` beside the checkout); `--data.train jsonl:PATH[1000:]
--data.val jsonl:PATH[:1000]` reads another file.
"""

from mammut.config import (
    ComputeConfig,
    DataConfig,
    DecoderConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    VisionConfig,
)
from mammut.testing import shared_data


def get_config() -> TrainConfig:
    photos = f"jsonl:{shared_data('flickr8k') / 'captions.jsonl'}"
    return TrainConfig(
        model=ModelConfig(
            vision=VisionConfig(
                image_size=64, patch_size=8, width=192, depth=6, num_heads=3, mlp_dim=768
            ),
            text=DecoderConfig(
                vocab_size=3_000,
                max_length=24,
                width=192,
                depth=4,
                num_heads=3,
                mlp_dim=768,
                cross_attn_every=2,
            ),
        ),
        compute=ComputeConfig(unroll=6),
        data=DataConfig(
            train=f"{photos}[1000:]",
            val=f"{photos}[:1000]",
            batch_size=200,
            eval_batch_size=250,
            val_examples=1_000,
            # 5,000 photos are few: each is seen about 50 times, never twice the same. Hardly a
            # caption of Flickr8k has "left" or "right", so that a mirrored photo contradicts next
            # to nothing.
            crop_scale=(0.35, 1.0),
            horizontal_flip=True,
        ),
        loss=LossConfig(label_smoothing=0.1),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100, weight_decay=0.1, b2=0.98),
        steps=1_300,
        log_every=50,
        eval_every=260,
        checkpoint_every=260,
    )
