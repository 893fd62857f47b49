"""MAGMA in miniature, asked about drawn shapes: the frozen models and the variants of `configs/flickr8k_magma.py`.

The questions are put in the paper's form, `Q: ... A:`. 200 of the 1,500 pictures are kept for validation. Score it with
`python -m eval.vqa runs/easy_vqa_magma --data jsonl:PATH[1300:] --prompt 'Q: {} A:'`.
"""

import dataclasses
import pathlib

from mammut.config import DataConfig, TokenizerConfig, TrainConfig
from mammut.recipes import load_recipe
from mammut.testing import shared_dir


def get_config() -> TrainConfig:
    questions = f"jsonl:{(shared_dir() or pathlib.Path('shared')) / 'data' / 'easy_vqa' / 'qa.jsonl'}"
    captioning = load_recipe(pathlib.Path(__file__).with_name("flickr8k_magma.py"))
    return dataclasses.replace(
        captioning,
        task="vqa",
        data=DataConfig(
            train=f"{questions}[:1300]",
            val=f"{questions}[1300:]",
            batch_size=64,
            eval_batch_size=256,
            crop_scale=(0.5, 1.0),
            horizontal_flip=True,  # no question is about left or right
            prompt="Q: {} A:",
        ),
        tokenizer=TokenizerConfig(max_length=32),
        steps=400,
        checkpoint_every=400,
    )
