"""MAGMA in miniature, with questions about drawn shapes.

The frozen models and the variants are the same as in `configs/flickr8k_magma.py`.

The questions are put in the paper's form, `Q: ... A:`. 200 of the 1,500 pictures are kept for
validation. Score it with `python -m eval.vqa runs/easy_vqa_magma --data jsonl:PATH[1300:] --prompt
'Q: {} A:'`.
"""

from mammut import presets
from mammut.config import (
    AugmentConfig,
    ComputeConfig,
    DataConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
)
from mammut.testing import shared_data


def get_config() -> TrainConfig:
    questions = f"jsonl:{shared_data('easy_vqa') / 'qa.jsonl'}"
    return TrainConfig(
        task="vqa",
        init_text="runs/caption_lm",
        init_vision="runs/flickr8k",
        trainable=("adapters.*", "image_projection.*", "prefix_norm.*"),
        model=presets.magma_tiny(),
        compute=ComputeConfig(unroll=6),
        augment=AugmentConfig(prefix_dropout=0.1),
        data=DataConfig(
            train=f"{questions}[:1300]",
            val=f"{questions}[1300:]",
            batch_size=64,
            eval_batch_size=256,
            crop_scale=(0.5, 1.0),
            horizontal_flip=True,  # no question is about left or right
            prompt="Q: {} A:",
        ),
        tokenizer=TokenizerConfig(max_length=32),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, warmup_steps=50, schedule="linear", weight_decay=0.0, b2=0.95
        ),
        steps=800,
        log_every=50,
        eval_every=0,
        checkpoint_every=800,
    )
