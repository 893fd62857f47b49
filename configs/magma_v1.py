"""MAGMA (arXiv 2112.05253) at its own size.

The adapters are those of its public checkpoint.

    python train.py configs/magma_v1.py --init-text GPT_J --init-vision RN50x16

GPT_J is EleutherAI/gpt-j-6b as Hugging Face has it, RN50x16 CLIP's weights in a file of open_clip.
The run trains the adapters, the image projection and its norm, and, at its own learning rate, the
image encoder. The learning rate would be 0 at step 300,000; the ablations of the paper end at
15,000. The pairs are Conceptual Captions 3M as img2dataset writes them.
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
        model=presets.magma_v1(),
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
        steps=15_000,
        eval_every=5_000,
    )
