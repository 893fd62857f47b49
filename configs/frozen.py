"""Frozen (arXiv 2106.13884) as MAGMA's authors rebuilt it.

An image encoder learns to speak to a frozen language model.

    python train.py configs/frozen.py --init-text GPT_J --init-vision NF_RESNET50

GPT_J is EleutherAI/gpt-j-6b as Hugging Face has it, NF_RESNET50 timm's nf_resnet50; without
--init-vision it starts from random weights, as in the paper. The run trains the image encoder and
its projection to two tokens, at a constant rate; there is no adapter. The pairs are Conceptual
Captions 3M as img2dataset writes them.
"""

from mammut import presets
from mammut.config import (
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
        trainable=("image_projection.*", "vision.*"),
        model=presets.frozen(),
        compute=ComputeConfig(dtype="bfloat16", text_param_dtype="bfloat16", remat="full"),
        data=DataConfig(
            train="tar:data/cc3m/{00000..00331}.tar",
            val="tar:data/cc3m_val/{00000..00001}.tar",
            batch_size=128,
            eval_batch_size=64,
            crop_scale=(0.5, 1.0),
            horizontal_flip=True,
        ),
        tokenizer=TokenizerConfig(max_length=64),
        optimizer=OptimizerConfig(learning_rate=3e-4, schedule="constant", weight_decay=0.0),
        mesh=MeshConfig(data=1, fsdp=-1),
        steps=30_000,
        eval_every=5_000,
    )
