"""A small language model from the captions of Flickr8k alone.

It sees no photo; `configs/flickr8k_magma.py` freezes it.

Its layers are GPT-J's: attention and MLP side by side on one norm, rotary positions, a vocabulary
head of its own. The captions of the first 1,000 photos are kept for validation.
"""

import dataclasses

from mammut import presets
from mammut.config import ComputeConfig, DataConfig, OptimizerConfig, TokenizerConfig, TrainConfig
from mammut.testing import shared_data


def get_config() -> TrainConfig:
    captions = f"jsonl:{shared_data('flickr8k') / 'captions.jsonl'}"
    return TrainConfig(
        task="text",
        trainable=("text.*",),
        model=dataclasses.replace(presets.magma_tiny(), adapters=()),
        compute=ComputeConfig(unroll=6),
        data=DataConfig(
            train=f"{captions}[1000:]",
            val=f"{captions}[:1000]",
            batch_size=250,
            eval_batch_size=250,
        ),
        tokenizer=TokenizerConfig(max_length=24),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50, weight_decay=0.1, b2=0.98),
        steps=450,  # after this step, the loss on unseen captions rises
        log_every=50,
        eval_every=150,
        checkpoint_every=150,
    )
