"""Visual question answering fine-tuned on a CPU: templated questions about drawn shapes (easy-VQA).

Starts from the default run, `python train.py`, with a vocabulary of its own: the one made for scenes knows few of the
questions' words. `--init` names another model to start from. 300 of the 1,500 pictures are kept for validation. Score
it with `python -m eval.vqa runs/easy_vqa --data jsonl:PATH[1200:]`.
"""

import pathlib

from mammut.config import DataConfig, OptimizerConfig, TokenizerConfig, TrainConfig
from mammut.testing import shared_dir


def get_config() -> TrainConfig:
    questions = f"jsonl:{(shared_dir() or pathlib.Path('shared')) / 'data' / 'easy_vqa' / 'qa.jsonl'}"
    return TrainConfig(
        task="vqa",
        init="runs/tiny",
        tokenizer=TokenizerConfig(replace=True),
        data=DataConfig(
            train=f"{questions}[:1200]",
            val=f"{questions}[1200:]",
            batch_size=128,
            eval_batch_size=256,
            crop_scale=(0.8, 1.0),
            horizontal_flip=True,  # no question is about left or right
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100, weight_decay=0.1),
        steps=1_500,
        log_every=100,
        eval_every=250,
        checkpoint_every=500,
    )
