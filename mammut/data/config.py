"""Where a run's examples come from, and how its texts become ids."""

import dataclasses
from typing import Literal

from mammut.core.fields import require, require_fraction, require_positive

# The texts that a source has for each image: captions, questions with answers ("qa"), or the name
# of its class.
Field = Literal["captions", "qa", "name"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the examples come from and how an image becomes an array.

    Example:
      >>> data = mammut.DataConfig(train="jsonl:photos[1000:]", val="jsonl:photos[:1000]")
      >>> config = mammut.TrainConfig(model=mammut.presets.tiny(), data=data)
    """

    # The training set: a spec of mammut.data.sources, such as jsonl:PATH[1000:].
    train: str = "synthetic:train"
    # The validation set, a spec as for the training set. None: no evaluation during the run.
    val: str | None = "synthetic:val"
    # Number of examples in a training step, over all devices and processes.
    batch_size: int = 256
    # Number of examples in an evaluation batch, over all devices and processes.
    eval_batch_size: int = 256
    # Largest number of validation examples that are evaluated.
    val_examples: int = 1_000
    # Area of the random crop as a share of the image, low and high. (1, 1): no crop.
    crop_scale: tuple[float, float] = (1.0, 1.0)
    # Width / height of the random crop relative to the image's, low and high.
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    # Mirror half of the training images. A mirrored image contradicts "left" and "right" in its
    # caption.
    horizontal_flip: bool = False
    # Read every example as a video of so many frames. None: as a picture.
    frames: int | None = None
    # Frames a second: `frames` frames of a video one after the other, in training from a random
    # place in it. None: the whole video, one frame from each of `frames` parts of equal length.
    frame_rate: float | None = None
    # Prompt before the text that the model has to produce, in training and evaluation. {} stands
    # for the question, if there is one: "Q: {} A:" for questions, "A picture of" for captions.
    prompt: str = "{}"
    # Make every image black, to measure how well the model does with the text alone.
    blind: bool = False
    # Threads that read, decode and resize images.
    threads: int = 4
    # Stop when a larger share of the examples than this cannot be used.
    max_bad_share: float = 0.1
    # Skip an image, without decoding it, if its header states more pixels than this.
    max_image_pixels: int = 100_000_000
    # The data_dir of tensorflow-datasets. None: the default of that library.
    tfds_dir: str | None = None

    def __post_init__(self):
        require_positive(
            self, "batch_size", "eval_batch_size", "val_examples", "threads", "max_image_pixels"
        )
        require_fraction(self, "max_bad_share")
        for name in ("frames", "frame_rate"):
            if getattr(self, name) is not None:
                require_positive(self, name)
        require(
            self.frame_rate is None or self.frames is not None,
            f"DataConfig.frame_rate is {self.frame_rate}, which needs DataConfig.frames",
        )
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
        """Returns the text before the answer to a question.

        With an empty question it is the text before a caption.
        """
        prompt = self.prompt.replace("{}", question)
        # The tokenizer adds a space before a caption where it needs one.
        return prompt if question else prompt.strip()


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes ids; the vocabulary must not exceed `DecoderConfig.vocab_size`.

    Example:
      >>> tokenizer = mammut.TokenizerConfig(path="bpe_simple_vocab_16e6.txt.gz")
    """

    # The vocabulary: CLIP's bpe*.txt.gz, a SentencePiece .model or a Hugging Face tokenizer.json.
    # None: a SentencePiece vocabulary of at most DecoderConfig.vocab_size pieces is trained on the
    # training captions.
    path: str | None = None
    # Lower-case texts before they are encoded; CLIP's vocabulary always does.
    lowercase: bool = True
    # For a run that starts from a model (TrainConfig.init, init_text). True: use a new tokenizer,
    # as above; the token embeddings start at random. False: keep that model's tokenizer, or take
    # `path` as its tokenizer where it came without one.
    replace: bool = False
    # Tokens of a text, start and end included. None: as many as the model has positions for.
    max_length: int | None = None
