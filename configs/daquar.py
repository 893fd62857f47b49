"""Visual question answering on a CPU: human questions about indoor photos (DAQUAR).

Answers are words, and the model starts from random weights.

The question is the prompt, the answer is generated, and the loss is the answer's alone.
`--data.blind True` trains the model that sees no image, to compare with; `--init runs/flickr8k`
fine-tunes a trained model instead of this small one, with a peak learning rate of 3e-4. Every fifth
photo is kept for validation: neighbouring views of a room fall into both parts, as they do in the
official split. Score it with `python -m eval.vqa runs/daquar --data jsonl:PATH[::5]`.
"""

from mammut.config import (
    ComputeConfig,
    DataConfig,
    DecoderConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    VisionConfig,
)
from mammut.testing import shared_data


def get_config() -> TrainConfig:
    questions = f"jsonl:{shared_data('daquar') / 'qa.jsonl'}"
    return TrainConfig(
        task="vqa",
        model=ModelConfig(
            vision=VisionConfig(
                image_size=48, patch_size=8, width=96, depth=3, num_heads=4, mlp_dim=384
            ),
            text=DecoderConfig(
                vocab_size=1_000,
                max_length=24,
                width=96,
                depth=2,
                num_heads=4,
                mlp_dim=384,
                cross_attn_every=1,
            ),
        ),
        compute=ComputeConfig(unroll=4),
        data=DataConfig(
            train=f"{questions}[!::5]",
            val=f"{questions}[::5]",
            batch_size=128,
            eval_batch_size=256,
            crop_scale=(0.6, 1.0),  # no flips: many questions are about left and right
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100, weight_decay=0.1, b2=0.98),
        steps=1_500,
        log_every=50,
        eval_every=250,
        checkpoint_every=250,
    )
