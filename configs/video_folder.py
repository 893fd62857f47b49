r"""Your own videos: a JSONL beside them or tar shards, and nothing else to write.

    python train.py configs/video_folder.py --data.train 'jsonl:clips/clips.jsonl[20:]' \
        --data.val 'jsonl:clips/clips.jsonl[:20]' [--task vqa] [--init MODEL]

It reads 8 frames of each video, in training a random one of each eighth. For more, set FRAMES here,
or both `--data.frames` and `--model.vision.video.frames`. The model encodes them one by one, as
images, and the decoder is told which frame is which. So `--init` takes any image model with
cross-attention, and nothing of it is lost; a video model brings its own way to read videos, made
for its own number of frames. `--task` and the learning rate are as in `configs/folder.py`.

The paper's tubes, which the encoder sees all at once, are one other line here, with the patch size
of the model: `video=VideoConfig(frames=FRAMES, patch_stride=FRAMES, tubes=paper_tubes(FRAMES, 8))`,
and `from mammut.models.video import paper_tubes`.
"""

from mammut.config import (
    ComputeConfig,
    DataConfig,
    DecoderConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    VideoConfig,
    VisionConfig,
)

FRAMES = 8


def get_config() -> TrainConfig:
    return TrainConfig(
        task="caption",
        model=ModelConfig(
            vision=VisionConfig(
                image_size=64,
                patch_size=8,
                width=192,
                depth=6,
                num_heads=3,
                mlp_dim=768,
                video=VideoConfig(mode="frames", frames=FRAMES, frame_embed=True),
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
            train="jsonl:clips/clips.jsonl[20:]",
            val="jsonl:clips/clips.jsonl[:20]",
            frames=FRAMES,
            batch_size=16,
            eval_batch_size=16,
            crop_scale=(0.5, 1.0),
        ),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=50, weight_decay=0.1, b2=0.98),
        steps=1_000,
        log_every=50,
        eval_every=250,
        checkpoint_every=250,
    )
