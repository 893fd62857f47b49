"""A small language model from the captions of Flickr8k alone, no photo seen: what `configs/flickr8k_magma.py` freezes.

The layers are GPT-J's: attention and MLP side by side on one norm, rotary positions, a vocabulary head of its own. It
has places for an image of 64 tokens before a text. The captions of the first 1,000 photos are kept for validation.
"""

import pathlib

from mammut.config import (
    DataConfig,
    DecoderConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
    VisionConfig,
)
from mammut.testing import shared_dir


def get_config() -> TrainConfig:
    captions = f"jsonl:{(shared_dir() or pathlib.Path('shared')) / 'data' / 'flickr8k' / 'captions.jsonl'}"
    return TrainConfig(
        task="text",
        model=ModelConfig(
            vision=VisionConfig(image_size=64, patch_size=8, width=192, depth=6, num_heads=3, mlp_dim=768),
            text=DecoderConfig(
                vocab_size=3_000, max_length=96, width=128, depth=4, num_heads=4, mlp_dim=512, norm_eps=1e-5,
                layout="parallel", attn_bias=False, positions="rope", tie_embeddings=False, vocab_bias=True,
                cross_attn_every=0, pooling="none",
            ),
            conditioning="prefix",
            image_projection="decoder",
            prefix_dropout=0.1,
            prefix_norm=True,
            unroll=6,
        ),
        data=DataConfig(
            train=f"{captions}[1000:]", val=f"{captions}[:1000]", batch_size=250, eval_batch_size=250, blind=True
        ),
        tokenizer=TokenizerConfig(max_length=24),
        trainable=("text.*",),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50, weight_decay=0.1, b2=0.98),
        steps=450,  # four readings of every caption: on captions it has not read it gets worse from there on
        log_every=50,
        eval_every=150,
        checkpoint_every=150,
    )
