"""Visual question answering on a CPU: questions about drawn shapes (easy-VQA).

The model starts from random weights.

The question is the prompt, the answer is generated, and the loss is the answer's alone. 200 of the
1,500 pictures are kept for validation. Score it with `python -m eval.vqa runs/easy_vqa --data
jsonl:PATH[1300:]`.
"""

from mammut import presets
from mammut.config import ComputeConfig, DataConfig, OptimizerConfig, TrainConfig
from mammut.testing import shared_data


def get_config() -> TrainConfig:
    questions = f"jsonl:{shared_data('easy_vqa') / 'qa.jsonl'}"
    return TrainConfig(
        task="vqa",
        model=presets.tiny(),
        compute=ComputeConfig(unroll=4),
        data=DataConfig(
            train=f"{questions}[:1300]",
            val=f"{questions}[1300:]",
            batch_size=64,
            eval_batch_size=256,
            crop_scale=(0.5, 1.0),
            horizontal_flip=True,  # no question is about left or right
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=200, weight_decay=0.05),
        steps=9_000,  # colours are learnt in 2,000 steps, shapes need all steps
        log_every=250,
        eval_every=1_000,
        checkpoint_every=1_000,
    )
