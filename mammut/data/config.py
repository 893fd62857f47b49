"""Where a run's examples come from, and how its texts become ids."""

import dataclasses
from typing import Literal

from mammut.core.fields import require, require_positive, require_share

# of an example: its captions, its questions and answers, what it shows
Field = Literal["captions", "qa", "name"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the examples come from and how an image becomes an array."""

    # a spec that mammut.data.sources.open_source reads, such as jsonl:PATH[1000:]
    train: str = "synthetic:train"
    val: str | None = "synthetic:val"  # None: no evaluation during the run
    batch_size: int = 256  # examples a step, over all devices and processes
    eval_batch_size: int = 256
    val_examples: int = 1_000  # at most so many validation examples are evaluated
    # area of the random crop as a share of the image; (1, 1): none
    crop_scale: tuple[float, float] = (1.0, 1.0)
    # width / height of the random crop, relative to the image's
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    # off: a mirrored image contradicts "left" and "right" in its caption
    horizontal_flip: bool = False
    # What the model goes on from, in training and evaluation: {} is the question, of captions and
    # names nothing, as in "Q: {} A:" and "A picture of".
    prompt: str = "{}"
    # every image is black: what can be said from the text alone, to compare with
    blind: bool = False
    threads: int = 4  # decode and resize in so many threads
    # stop when more than this share of the examples read could not be used
    max_bad_share: float = 0.1
    max_image_pixels: int = 100_000_000  # an image whose header promises more is skipped undecoded
    tfds_dir: str | None = None  # tensorflow-datasets' data_dir

    def __post_init__(self):
        require_positive(
            self, "batch_size", "eval_batch_size", "val_examples", "threads", "max_image_pixels"
        )
        require_share(self, "max_bad_share")
        low, high = self.crop_scale
        require(
            0 < low <= high <= 1,
            f"DataConfig.crop_scale is {self.crop_scale}, expected 0 < low <= high <= 1",
        )
        low, high = self.crop_ratio
        require(
            0 < low <= high, f"DataConfig.crop_ratio is {self.crop_ratio}, expected 0 < low <= high"
        )

    def prompt_of(self, question: str) -> str:
        """What the model goes on from when it is asked a question, or, where that is empty, nothing."""
        prompt = self.prompt.replace("{}", question)
        # a space before a caption is the tokenizer's business
        return prompt if question else prompt.strip()


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes ids. The vocabulary must not be larger than `DecoderConfig.vocab_size`."""

    # CLIP's bpe*.txt.gz, a SentencePiece .model or a Hugging Face tokenizer.json
    path: str | None = None
    # None: a SentencePiece vocabulary of at most DecoderConfig.vocab_size pieces is trained on the
    # training captions.
    lowercase: bool = True  # CLIP's BPE always lower-cases
    # Of a run that starts from a model (TrainConfig.init, init_text): False keeps that model's
    # tokenizer, or says that `path` is it where the model comes without; True makes one as above,
    # and the token embeddings start from random.
    replace: bool = False
    # tokens of a text, start and end included; None: as many as the model has places for
    max_length: int | None = None
