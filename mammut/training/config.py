"""The settings of a run: its losses, its optimizer, and all else that `train.py` takes."""

import dataclasses
import math
from typing import Any, Literal

from mammut.core.fields import require, require_choices, require_positive, require_share
from mammut.core.sharding import MeshConfig
from mammut.data.config import DataConfig, TokenizerConfig
from mammut.models.compute import AugmentConfig, ComputeConfig
from mammut.models.mammut import ModelConfig, require_computable


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """total = contrastive_weight * contrastive + caption_weight * caption (paper, section 3.2: 1 and 1)."""

    # sigmoid and focal want model.logit_scale_init 10 and model.logit_bias_init -10: most pairs do
    # not match
    contrastive: Literal["softmax", "focal", "sigmoid"] = "softmax"
    contrastive_weight: float = 1.0
    caption_weight: float = 1.0
    focal_gamma: float = 1.0
    focal_alpha: float = 0.5
    # divide the sum over B x B pairs by B (paper) or B * B
    focal_normalization: Literal["batch", "pairs"] = "batch"
    label_smoothing: float = 0.0  # of the caption loss
    z_loss: float = 0.0  # weight of log(Z)^2 in the caption loss
    # Of the contrastive loss: every device holds its rows of the B x B matrix, or the texts go
    # round the devices and only tiles of `contrastive_chunk` images by as many texts are ever held.
    contrastive_form: Literal["matrix", "ring"] = "matrix"
    contrastive_chunk: int = 4_096
    vocab_chunk: int = 16  # text positions whose logits are held at once by the caption loss

    def __post_init__(self):
        require_choices(self)
        require_share(self, "label_smoothing")
        require_positive(self, "vocab_chunk", "contrastive_chunk")
        require(
            0 < self.focal_alpha < 1,
            f"LossConfig.focal_alpha is {self.focal_alpha}, expected 0 < alpha < 1",
        )
        for name in ("contrastive_weight", "caption_weight", "focal_gamma", "z_loss"):
            require(
                getattr(self, name) >= 0,
                f"LossConfig.{name} is {getattr(self, name)}, expected at least 0",
            )

    @property
    def caption_options(self) -> dict[str, Any]:
        """The options of `losses.caption_sum`."""
        return {
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "chunk": self.vocab_chunk,
        }


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Adafactor with warm-up and decay. Weight decay touches kernels only: no bias, norm, embedding."""

    name: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: float = 1e-3  # the peak
    # Peaks of some parameters, by pattern of their path, such as ("vision.*", 2e-6); the first that
    # fits counts.
    learning_rates: tuple[tuple[str, float], ...] = ()
    warmup_steps: int = 0
    # from the peak to 0 at `decay_steps`, or at the peak
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    decay_steps: int | None = None  # None: the last step
    weight_decay: float = 0.01  # decoupled: multiplied by the learning rate
    b1: float = 0.9
    b2: float = 0.95  # AdamW's second moment; Adafactor sets its own
    eps: float = 1e-8  # of AdamW
    clip_norm: float = 1.0  # global norm of the gradient; 0: no clipping

    def __post_init__(self):
        require_choices(self)
        require_positive(self, "learning_rate", "eps")
        require_share(self, "b1", "b2")
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            require(
                getattr(self, name) >= 0,
                f"OptimizerConfig.{name} is {getattr(self, name)}, expected at least 0",
            )
        for pattern, peak in self.learning_rates:
            require(
                0 < peak < math.inf,
                f"OptimizerConfig.learning_rates has {peak} for {pattern!r}, expected a positive number (what is not "
                "to be trained TrainConfig.trainable leaves out)",
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run. The resolved config is saved beside its checkpoints."""

    # A key of mammut.training.tasks.TASKS: both losses on captions; the caption pass alone on
    # captions, answers, names; or on captions without their images, whose files need not be there:
    # a language model, such as `init_text` starts from.
    task: Literal["image_text", "caption", "vqa", "classify", "text"] = "image_text"
    # A model to start from, of any format that mammut.load reads: its weights, processor and
    # `model` settings, of which image and patch size and text length may differ.
    # `mammut.weights.warm_start` has the rules. None: random weights.
    init: str | None = None
    # An image encoder alone: its weights, its `model.vision` settings but for the pooling, and how
    # it takes images.
    init_vision: str | None = None
    # a text decoder alone: its weights, `model.text` settings and tokenizer
    init_text: str | None = None
    # Without `init` and `init_text`, the decoder is trained for so many steps of the task `text`
    # first, in a run of its own in WORKDIR/language_model, and that is what the run starts from.
    text_steps: int = 0
    # Patterns of paths (fnmatch) of the parameters to train, such as adapters.*; the others are
    # frozen: they have no gradient and no optimizer state.
    trainable: tuple[str, ...] = ("*",)
    model: ModelConfig = ModelConfig()
    compute: ComputeConfig = ComputeConfig()
    augment: AugmentConfig = AugmentConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    steps: int = 10_000
    # the first so many steps see images of `model.vision.low_image_size` (RECLIP, CLIPA)
    low_image_steps: int = 0
    seed: int = 0  # of the initial weights, the data order, the crops
    accumulation: int = 1  # micro-batches a step; the contrastive loss still sees the whole batch
    log_every: int = 50  # steps
    eval_every: int = 1_000  # steps; 0: only at the end
    checkpoint_every: int = 1_000  # steps; there is always one at the end
    keep_checkpoints: int = 2
    max_nonfinite_steps: int = 10  # stop after so many skipped updates in a row
    # seconds; a process that makes no step for so long says where it is and ends
    step_timeout: float = 3_600.0
    compilation_cache: str | None = "~/.cache/mammut/xla"

    def __post_init__(self):
        require_choices(self)
        require_positive(
            self, "steps", "accumulation", "log_every", "checkpoint_every", "keep_checkpoints"
        )
        require_positive(self, "max_nonfinite_steps", "step_timeout")
        require(
            0 <= self.seed < 2**31, f"TrainConfig.seed is {self.seed}, expected 0 to {2**31 - 1}"
        )
        for name in ("eval_every", "low_image_steps", "text_steps"):
            require(
                getattr(self, name) >= 0,
                f"TrainConfig.{name} is {getattr(self, name)}, expected at least 0",
            )
        require(
            not self.low_image_steps or self.model.vision.low_image_size is not None,
            f"TrainConfig.low_image_steps is {self.low_image_steps}, which needs model.vision.low_image_size",
        )
        require_computable(self.model, self.compute, self.augment)
        text = self.model.text
        require(
            text.depth > 0,
            f"TrainConfig.task is {self.task!r}, which needs a caption pass: model.text.depth is 0 (of a SigLIP, "
            "init_vision takes the image encoder)",
        )
        require(
            self.task != "image_text" or text.pooling != "none",
            "TrainConfig.task is 'image_text', but with model.text.pooling 'none' there is no text embedding",
        )
        require(
            self.task != "vqa" or "{}" in self.data.prompt,
            f"data.prompt is {self.data.prompt!r}, expected a text with {{}} in it, the place of the question",
        )
        longest = self.model.text_length
        require(
            2 <= self.text_length <= longest,
            f"tokenizer.max_length is {self.text_length}, expected 2 to the {longest} that model.text has places for",
        )
        require(
            not text.whole_length or self.text_length == longest,
            f"tokenizer.max_length is {self.text_length}, which with model.text.pooling {text.pooling!r} is {longest}",
        )
        require(
            self.data.batch_size % self.accumulation == 0,
            f"data.batch_size {self.data.batch_size} is not a multiple of accumulation {self.accumulation}",
        )
        require(
            self.optimizer.warmup_steps < self.steps,
            f"optimizer.warmup_steps {self.optimizer.warmup_steps} is not below steps {self.steps}",
        )
        decay = self.optimizer.decay_steps
        require(
            decay is None or decay >= self.steps,
            f"optimizer.decay_steps is {decay}, expected at least the {self.steps} of steps",
        )

    @property
    def makes_language_model(self) -> bool:
        """Whether the run trains its language model first: `text_steps`, and nothing to take it from."""
        return bool(self.text_steps) and self.init is None and self.init_text is None

    @property
    def text_length(self) -> int:
        """Tokens of a text, start and end included, as a fresh run's processor makes them."""
        return (
            self.model.text_length
            if self.tokenizer.max_length is None
            else self.tokenizer.max_length
        )
