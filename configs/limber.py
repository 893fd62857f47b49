"""LiMBeR: a linear map from an image encoder to a language model.

Only this map is trained (arXiv 2209.15162).

    python train.py configs/limber.py --init-text GPT_J --init-vision RN50x16

GPT_J is EleutherAI/gpt-j-6b as Hugging Face has it, RN50x16 CLIP's weights in a file of open_clip.
The optimizer is MAGMA's, since LiMBeR's code was made from MAGMA's; 15,000 steps are run.
The pairs are Conceptual Captions 3M as img2dataset writes them.
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
        trainable=("image_projection.*",),
        model=presets.limber(),
        compute=ComputeConfig(dtype="bfloat16", text_param_dtype="bfloat16", remat="full"),
        data=DataConfig(
            train="tar:data/cc3m/{00000..00331}.tar",
            val="tar:data/cc3m_val/{00000..00001}.tar",
            batch_size=256,
            eval_batch_size=64,
        ),
        tokenizer=TokenizerConfig(max_length=64),
        optimizer=OptimizerConfig(
            learning_rate=8e-4,
            warmup_steps=100,
            schedule="linear",
            decay_steps=300_000,
            weight_decay=0.0,
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
        steps=15_000,
        eval_every=5_000,
    )
