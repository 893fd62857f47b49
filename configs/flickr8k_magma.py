"""MAGMA in miniature: a frozen language model learns to see.

It learns through adapters and a prefix.

The language model has only ever read captions.

Run `python train.py configs/caption_lm.py` and `python train.py configs/flickr8k.py` first: the
language model and the image encoder come from these runs, both frozen; `--init-text` and
`--init-vision` name others. The run trains the image prefix (a linear map and a norm) and one
bottleneck behind every MLP of the decoder. Variants to compare with:

    attention too    --model.adapters.0.sites text.layers.mlp text.layers.attn
                     --model.adapters.0.reduction 8
    LoRA             --model.adapters.0.kind lora --model.adapters.0.sites 'text.layers.attn.*'
    prefix alone     --model.adapters.0.init zero --trainable 'image_projection.*' 'prefix_norm.*'
    full tuning      --model.adapters.0.init zero
                     --trainable 'image_projection.*' 'prefix_norm.*' 'text.*'
                     --optimizer.learning-rate 1e-3
    no image         --data.blind True

Score it with `python -m eval.caption runs/flickr8k_magma --data jsonl:PATH[:1000]`.
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
    photos = f"jsonl:{shared_data('flickr8k') / 'captions.jsonl'}"
    return TrainConfig(
        task="caption",
        init_text="runs/caption_lm",
        init_vision="runs/flickr8k",
        trainable=("adapters.*", "image_projection.*", "prefix_norm.*"),
        model=presets.magma_tiny(),
        compute=ComputeConfig(unroll=6),
        augment=AugmentConfig(prefix_dropout=0.1),
        data=DataConfig(
            train=f"{photos}[1000:]",
            val=f"{photos}[:1000]",
            batch_size=50,
            eval_batch_size=250,
            crop_scale=(0.5, 1.0),
            horizontal_flip=True,
        ),
        tokenizer=TokenizerConfig(max_length=24),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, warmup_steps=50, schedule="linear", weight_decay=0.0, b2=0.95
        ),
        steps=600,
        log_every=50,
        eval_every=0,
        checkpoint_every=600,
    )
