r"""Your own pictures: a JSONL beside them, and nothing else to write.

    python train.py configs/folder.py --data.train 'jsonl:photos/photos.jsonl[200:]' \
        --data.val 'jsonl:photos/photos.jsonl[:200]' [--task vqa] [--init MODEL]

`--task` chooses the task: `caption` (the default here), `vqa`, `classify`, or `image_text` for
retrieval and captions. With `--init` a model is fine-tuned and brings its architecture and
vocabulary; a learning rate of 1e-4 to 3e-4 suits that. `--init-vision` takes an image encoder
alone, such as a ViT of big_vision; the decoder is new. Without either, a small model is trained
from scratch, which needs thousands of pictures to learn much.
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


def get_config() -> TrainConfig:
    return TrainConfig(
        task="caption",
        model=ModelConfig(
            vision=VisionConfig(
                image_size=64, patch_size=8, width=192, depth=6, num_heads=3, mlp_dim=768
            ),
            text=DecoderConfig(
                vocab_size=3_000,
                max_length=32,
                width=192,
                depth=4,
                num_heads=3,
                mlp_dim=768,
                cross_attn_every=2,
            ),
        ),
        compute=ComputeConfig(unroll=6),
        data=DataConfig(
            train="jsonl:photos/photos.jsonl[200:]",
            val="jsonl:photos/photos.jsonl[:200]",
            batch_size=32,
            eval_batch_size=32,
            crop_scale=(0.5, 1.0),
        ),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=50, weight_decay=0.1, b2=0.98),
        steps=1_000,
        log_every=50,
        eval_every=250,
        checkpoint_every=250,
    )
