"""MAGMA (arXiv 2112.05253) with the adapters of its largest run.

There is one behind every MLP and every attention.

    python train.py configs/magma_v2.py --init-text GPT_J --init-vision RN50x16

GPT_J is EleutherAI/gpt-j-6b as Hugging Face has it, RN50x16 CLIP's weights in a file of open_clip.
The run trains the adapters, the image projection and its norm, and, at its own learning rate, the
image encoder. The learning rate would be 0 at step 300,000; that run ended at 30,000. It read more
sets than this one: `data.train` takes the shards of several, joined by `::`. The pairs are
Conceptual Captions 3M as img2dataset writes them.
"""

from mammut import presets
from mammut.config import (
    AugmentConfig,
    ComputeConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
)


def get_config() -> TrainConfig:
    return TrainConfig(
        task="caption",
        trainable=("adapters.*", "image_projection.*", "prefix_norm.*", "vision.*"),
        model=presets.magma_v2(),
        compute=ComputeConfig(dtype="bfloat16", text_param_dtype="bfloat16", remat="full"),
        augment=AugmentConfig(prefix_dropout=0.1),
        data=DataConfig(
            train="tar:data/cc3m/{00000..00331}.tar",
            val="tar:data/cc3m_val/{00000..00001}.tar",
            batch_size=256,
            eval_batch_size=64,
        ),
        tokenizer=TokenizerConfig(max_length=64),
        optimizer=OptimizerConfig(
            learning_rate=8e-4,
            learning_rates=(("vision.*", 2e-6),),
            warmup_steps=100,
            schedule="linear",
            decay_steps=300_000,
            weight_decay=0.0,
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
        steps=30_000,
        eval_every=5_000,
    )
