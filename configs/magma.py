r"""MAGMA on your own pictures, in one command.

A frozen language model learns to see.

The recipe needs a JSONL file beside the pictures.

    python train.py configs/magma.py --data.train 'jsonl:photos/photos.jsonl[200:]' \
        --data.val 'jsonl:photos/photos.jsonl[:200]' [--init-text GPT] [--init-vision TOWER]

Without `--init-text` a small language model is trained first, for `text_steps` steps on the
captions without their pictures. Then it is frozen; the image encoder, the image prefix and the
adapters learn to speak through it. With the folder of a GPT-2, GPT-Neo, GPT-J or Pythia from
Hugging Face, `--init-text` uses that model instead. `--init-vision` takes an image encoder that has
seen more than your pictures, and `--trainable 'adapters.*' 'image_projection.*' 'prefix_norm.*'`
freezes it, too. The run takes minutes on a CPU; configs/magma_v1.py has the paper's size.
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


def get_config() -> TrainConfig:
    return TrainConfig(
        task="caption",
        text_steps=600,
        trainable=("adapters.*", "image_projection.*", "prefix_norm.*", "vision.*"),
        model=presets.magma_tiny(),
        compute=ComputeConfig(unroll=6),
        augment=AugmentConfig(prefix_dropout=0.1),
        data=DataConfig(
            train="jsonl:photos/photos.jsonl[200:]",
            val="jsonl:photos/photos.jsonl[:200]",
            batch_size=32,
            eval_batch_size=32,
            crop_scale=(0.5, 1.0),
        ),
        tokenizer=TokenizerConfig(max_length=24),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50, weight_decay=0.1, b2=0.98),
        steps=1_000,
        log_every=50,
        eval_every=250,
        checkpoint_every=250,
    )
