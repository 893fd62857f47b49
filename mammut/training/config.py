"""Settings of a run: its losses, its optimizer, and the rest.

Every setting is an option of `train.py`.
"""

import dataclasses
import math
from typing import Any, Literal

from mammut.core.fields import (
    require,
    require_choices,
    require_fraction,
    require_positive,
    require_types,
)
from mammut.core.sharding import MeshConfig
from mammut.data.config import DataConfig, TokenizerConfig
from mammut.models.compute import AugmentConfig, ComputeConfig
from mammut.models.losses import CONTRASTIVE
from mammut.models.mammut import MAX_LOGIT_SCALE, ModelConfig, require_computable
from mammut.models.requirements import require_tubes, require_video


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Settings of the losses of a run.

    The total is `contrastive_weight` x contrastive loss + `caption_weight` x caption loss. The
    paper weighs both by 1 (section 3.2).

    Example:
      >>> import mammut
      >>> loss = mammut.LossConfig(contrastive="focal", focal_gamma=2.0)
      >>> loss.first_logit_scale
      10.0
    """

    # Contrastive loss, by its name in mammut.models.losses.CONTRASTIVE.
    contrastive: Literal[*CONTRASTIVE] = "softmax"
    # Weight of the contrastive loss in the total.
    contrastive_weight: float = 1.0
    # Weight of the caption loss in the total.
    caption_weight: float = 1.0
    # Logit scale (inverse temperature) at the start of a fresh run. None: the value of the
    # contrastive loss, which is 1/0.07 for softmax, 10 for focal and sigmoid. A run with `init`
    # keeps the scale of that model.
    logit_scale_init: float | None = None
    # Logit bias at the start of a fresh run. None: the value of the contrastive loss, which is -10
    # for focal and sigmoid, as most pairs do not match; softmax has no bias. A run with `init`
    # keeps the bias of that model.
    logit_bias_init: float | None = None
    # Exponent of the focal loss: a larger one gives less weight to pairs that are already right.
    focal_gamma: float = 1.0
    # Weight of the matching pairs in the focal loss; the other pairs have 1 - alpha.
    focal_alpha: float = 0.5
    # Divisor of the focal loss, summed over B x B pairs: B (paper) or B * B.
    focal_normalization: Literal["batch", "pairs"] = "batch"
    # Share of the target that the caption loss spreads evenly over the vocabulary.
    label_smoothing: float = 0.0
    # Weight of log(Z)^2 in the caption loss.
    z_loss: float = 0.0
    # How the contrastive loss is computed. matrix: every device holds its rows of the B x B logits.
    # ring: the texts go round the devices, and a device holds one tile of the logits at a time.
    contrastive_form: Literal["matrix", "ring"] = "matrix"
    # Side of a tile of the form ring: the largest number of its images, and of its texts.
    contrastive_chunk: int = 4_096
    # Text positions whose logits the caption loss holds at once.
    vocab_chunk: int = 16

    def __post_init__(self):
        require_types(self)
        require_choices(self)
        require_fraction(self, "label_smoothing")
        require_positive(self, "vocab_chunk", "contrastive_chunk")
        require(
            self.contrastive_form != "ring" or CONTRASTIVE[self.contrastive].ring is not None,
            f"LossConfig.contrastive_form is 'ring', which LossConfig.contrastive "
            f"{self.contrastive!r} does not have: expected 'matrix'",
        )
        if self.logit_scale_init is not None:
            require_positive(self, "logit_scale_init")
            require(
                self.logit_scale_init <= MAX_LOGIT_SCALE,
                f"LossConfig.logit_scale_init is {self.logit_scale_init}, expected at most "
                f"{MAX_LOGIT_SCALE}",
            )
        require(
            self.logit_bias_init is None or math.isfinite(self.logit_bias_init),
            f"LossConfig.logit_bias_init is {self.logit_bias_init}, expected a finite number",
        )
        require(
            0 < self.focal_alpha < 1,
            f"LossConfig.focal_alpha is {self.focal_alpha}, expected 0 < alpha < 1",
        )
        for name in ("contrastive_weight", "caption_weight", "focal_gamma", "z_loss"):
            require(
                0 <= getattr(self, name) < math.inf,
                f"LossConfig.{name} is {getattr(self, name)}, expected a number of at least 0",
            )

    @property
    def first_logit_scale(self) -> float:
        """Logit scale at the start of a fresh run."""
        if self.logit_scale_init is not None:
            return self.logit_scale_init
        return CONTRASTIVE[self.contrastive].logit_scale_init

    @property
    def first_logit_bias(self) -> float:
        """Logit bias at the start of a fresh run."""
        if self.logit_bias_init is not None:
            return self.logit_bias_init
        return CONTRASTIVE[self.contrastive].logit_bias_init

    @property
    def contrastive_options(self) -> dict[str, Any]:
        """Options of the contrastive loss, for both of its forms."""
        if self.contrastive != "focal":
            return {}
        return {
            "gamma": self.focal_gamma,
            "alpha": self.focal_alpha,
            "normalization": self.focal_normalization,
        }

    @property
    def caption_options(self) -> dict[str, Any]:
        """Options of `losses.caption_sum`."""
        return {
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "chunk": self.vocab_chunk,
        }


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the optimizer: AdamW or Adafactor, with warm-up and decay.

    Weight decay acts on kernels only: not on biases, norms or embeddings.

    Example:
      >>> import mammut
      >>> optimizer = mammut.OptimizerConfig(learning_rate=3e-4, warmup_steps=1_000)
      >>> config = mammut.TrainConfig(optimizer=optimizer)
    """

    # Update rule.
    name: Literal["adamw", "adafactor"] = "adamw"
    # Learning rate at its peak, after the warm-up.
    learning_rate: float = 1e-3
    # Peak learning rates of some parameters, by patterns (fnmatch) of their paths, such as
    # ("vision.*", 2e-6). The first pattern that fits counts.
    learning_rates: tuple[tuple[str, float], ...] = ()
    # Steps in which the learning rate rises from 0 to its peak.
    warmup_steps: int = 0
    # Learning rate after the warm-up: it falls to 0 at `decay_steps`, or stays constant.
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    # Step at which the learning rate reaches 0; None: the last step.
    decay_steps: int | None = None
    # Weight decay, decoupled: it is multiplied by the learning rate.
    weight_decay: float = 0.01
    # Decay of the average of gradients (AdamW) or of updates (Adafactor).
    b1: float = 0.9
    # Decay of AdamW's average of squared gradients; Adafactor has a rule of its own.
    b2: float = 0.95
    # Number that AdamW adds to the root of the squared gradients.
    eps: float = 1e-8
    # Largest global norm of the gradient; 0: no clipping.
    clip_norm: float = 1.0

    def __post_init__(self):
        require_types(self)
        require_choices(self)
        require_positive(self, "learning_rate", "eps")
        require_fraction(self, "b1", "b2")
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            require(
                getattr(self, name) >= 0,
                f"OptimizerConfig.{name} is {getattr(self, name)}, expected at least 0",
            )
        for pattern, peak in self.learning_rates:
            require(
                0 < peak < math.inf,
                f"OptimizerConfig.learning_rates has {peak} for {pattern!r}, expected a positive "
                "number (TrainConfig.trainable leaves out what is not to be trained)",
            )


def fitting_warmup(warmup_steps: int, steps: int) -> int:
    """Returns the warm-up of a run of so many steps: a tenth where it would fill the whole run."""
    return warmup_steps if warmup_steps < steps else steps // 10


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run; the resolved config is saved beside its checkpoints.

    Example:
      >>> import mammut
      >>> config = mammut.TrainConfig(model=mammut.presets.tiny(), steps=2_000, seed=1)
      >>> config.loss.contrastive
      'softmax'
    """

    # What is trained, by its name in mammut.training.tasks.TASKS. image_text: both losses on
    # captions. caption, vqa, classify: the caption pass alone on captions, answers, names. text:
    # the decoder on captions without their images, whose files need not exist, as a language
    # model for `init_text`.
    task: Literal["image_text", "caption", "vqa", "classify", "text"] = "image_text"
    # Model to start from, of any format that mammut.load reads: its weights, its processor and its
    # `model` settings; image size, patch size and text length may differ
    # (mammut.weights.warm_start has the rules). Its number types (`compute`) and the random draws
    # of its training (`augment`) are not taken over. None: random weights.
    init: str | None = None
    # Image encoder to start from: its weights, its `model.vision` settings except the pooling, and
    # its image preprocessing.
    init_vision: str | None = None
    # Text decoder to start from: its weights, its `model.text` settings and its tokenizer.
    init_text: str | None = None
    # Steps of the task `text` that train the decoder first, where neither `init` nor `init_text` is
    # given. They are a run of their own in WORKDIR/language_model, from which this run starts.
    text_steps: int = 0
    # Patterns (fnmatch) of the paths of the parameters to train, such as adapters.*. The others are
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
    # Steps of the whole run.
    steps: int = 10_000
    # Steps at the start that see images of `model.vision.low_image_size` (RECLIP, CLIPA).
    low_image_steps: int = 0
    # Seed of the initial weights, the order of the data and the crops.
    seed: int = 0
    # Micro-batches of a step; the contrastive loss still sees the whole batch.
    accumulation: int = 1
    # Steps between two records of the log.
    log_every: int = 50
    # Steps between two evaluations; 0: one at the end only.
    eval_every: int = 1_000
    # Stop when an evaluation fails. False: the failure is logged, and training goes on.
    stop_on_failed_evaluation: bool = False
    # Steps between two checkpoints; the last step always has one.
    checkpoint_every: int = 1_000
    # Number of newest checkpoints that are kept.
    keep_checkpoints: int = 2
    # Skipped updates in a row (loss or gradient not finite) after which the run stops.
    max_nonfinite_steps: int = 10
    # Seconds without progress after which a process reports where it hangs, and stops the run.
    step_timeout: float = 3_600.0
    # Folder of XLA's compiled programs; None: they are not kept.
    compilation_cache: str | None = "~/.cache/mammut/xla"

    def __post_init__(self):
        require_types(self)
        require_choices(self)
        self._require_numbers()
        self._require_task()
        self._require_text_length()
        self._require_batch_and_schedule()

    def _require_numbers(self) -> None:
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
            f"TrainConfig.low_image_steps is {self.low_image_steps}, which needs "
            "model.vision.low_image_size",
        )
        require(
            not self.low_image_steps or self.data.frames is None,
            f"TrainConfig.low_image_steps is {self.low_image_steps} with data.frames "
            f"{self.data.frames}: videos have one size",
        )
        require_computable(self.model, self.compute, self.augment)
        frames = self.data.frames or 1
        require_video(self.model, frames, self.augment, given="an example of data.frames")
        require_tubes(self.model, frames)

    def _require_task(self) -> None:
        text = self.model.text
        require(
            text.depth > 0,
            f"TrainConfig.task is {self.task!r}, which needs a caption pass: model.text.depth is 0 "
            "(of a SigLIP, init_vision takes the image encoder)",
        )
        require(
            self.task != "image_text" or text.pooling != "none",
            "TrainConfig.task is 'image_text', but with model.text.pooling 'none' there is no text "
            "embedding",
        )
        contrasts = self.loss.contrastive_weight > 0 and self.data.batch_size > 1
        require(
            self.task != "image_text" or self.loss.caption_weight > 0 or contrasts,
            f"loss.caption_weight is 0, loss.contrastive_weight {self.loss.contrastive_weight} and "
            f"data.batch_size {self.data.batch_size}, from which nothing is learnt: expected a "
            "weight above 0, and two examples to contrast",
        )
        require(
            self.task != "vqa" or "{}" in self.data.prompt,
            f"data.prompt is {self.data.prompt!r}, expected a text with {{}} in it, the place of "
            "the question",
        )

    def _require_text_length(self) -> None:
        text = self.model.text
        longest = self.model.text_length
        require(
            2 <= self.text_length <= longest,
            f"tokenizer.max_length is {self.text_length}, expected 2 to the {longest} that "
            "model.text has places for",
        )
        require(
            not text.whole_length or self.text_length == longest,
            f"tokenizer.max_length is {self.text_length}, which with model.text.pooling "
            f"{text.pooling!r} is {longest}",
        )

    def _require_batch_and_schedule(self) -> None:
        require(
            self.data.batch_size % self.accumulation == 0,
            f"data.batch_size {self.data.batch_size} is not a multiple of accumulation "
            f"{self.accumulation}",
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
    def starts_from(self) -> dict[str, str]:
        """Models to start from, by the field that names each."""
        named = {"init": self.init, "init_vision": self.init_vision, "init_text": self.init_text}
        return {name: path for name, path in named.items() if path is not None}

    @property
    def makes_language_model(self) -> bool:
        """Whether the run trains a language model first.

        It does with `text_steps` and without a given decoder.
        """
        return bool(self.text_steps) and self.init is None and self.init_text is None

    @property
    def text_length(self) -> int:
        """Number of tokens of a text, start and end included.

        The processor of a fresh run makes texts of this length.
        """
        if self.tokenizer.max_length is not None:
            return self.tokenizer.max_length
        return self.model.text_length
