"""Visual question answering fine-tuned: human questions about indoor photos (DAQUAR), answered in words.

The question is the prompt, the answer is generated, and the loss is the answer's alone (MaMMUT, section 3.3). Run
`python train.py configs/flickr8k.py` first; `--init` names another model to start from, `--data.blind True` trains the
model that sees no image, to compare with. Every fifth photo is kept for validation: neighbouring views of a room fall
into both parts, as they do in the official split. Score it with
`python -m eval.vqa runs/daquar --data jsonl:PATH[::5]`.
"""

import pathlib

from mammut.config import DataConfig, LossConfig, OptimizerConfig, TrainConfig
from mammut.testing import shared_dir


def get_config() -> TrainConfig:
    questions = f"jsonl:{(shared_dir() or pathlib.Path('shared')) / 'data' / 'daquar' / 'qa.jsonl'}"
    return TrainConfig(
        task="vqa",
        init="runs/flickr8k",
        data=DataConfig(
            train=f"{questions}[!::5]",
            val=f"{questions}[::5]",
            batch_size=100,
            eval_batch_size=100,
            crop_scale=(0.6, 1.0),  # no flips: many questions are about left and right
        ),
        loss=LossConfig(label_smoothing=0.1),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=50, weight_decay=0.1, b2=0.98),
        steps=450,
        log_every=50,
        eval_every=150,
        checkpoint_every=150,
    )
