"""Every setting of a model and of a run, as frozen dataclasses.

`ModelConfig` is the architecture and travels with the weights; `TrainConfig` is one run and contains it. Named
architectures are in `mammut.presets`, named runs in `configs/`. A dataclass refuses values that cannot work when it is
built, in one sentence that names the field.
"""

import dataclasses
import math
from typing import Any, Literal, get_args, get_origin

Activation = Literal["gelu", "gelu_tanh"]
Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full"]
Field = Literal["captions", "qa", "name"]  # of an example: its captions, its questions and answers, what it shows

# The logit scale is kept below this in training, as in CLIP: past it the softmax of cosines is all but one-hot.
MAX_LOGIT_SCALE = 100.0


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0, f"{type(config).__name__}.{name} is {value}, expected a positive number")


def _require_share(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 <= value < 1, f"{type(config).__name__}.{name} is {value}, expected a number in [0, 1)")


def _require_choices(config: Any) -> None:
    # Unchecked, a misspelt choice would silently be the last one: code asks for one value after the other, then "else".
    for field in dataclasses.fields(config):
        if get_origin(field.type) is Literal:
            value, choices = getattr(config, field.name), get_args(field.type)
            _require(
                value in choices,
                f"{type(config).__name__}.{field.name} is {value!r}, expected one of {', '.join(choices)}",
            )


def _require_tower(config: Any) -> None:
    _require_choices(config)
    _require_positive(config, "width", "depth", "num_heads", "mlp_dim", "norm_eps")
    _require(
        config.width % config.num_heads == 0,
        f"{type(config).__name__}.width {config.width} is not a multiple of num_heads {config.num_heads}",
    )


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The ViT image encoder: patches, learned positions, pre-norm blocks, no class token."""

    image_size: int = 224  # pixels; images are square
    patch_size: int = 16  # pixels
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    activation: Activation = "gelu_tanh"
    norm_eps: float = 1e-6
    cropped_pos_embed: bool = False  # train with a random crop of the position table for each image (RO-ViT)
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of pixels scaled to 0..1
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        _require_tower(self)
        _require_positive(self, "image_size", "patch_size")
        _require(
            self.image_size % self.patch_size == 0,
            f"VisionConfig.image_size {self.image_size} is not a multiple of patch_size {self.patch_size}",
        )
        _require(min(self.image_std) > 0, f"VisionConfig.image_std is {self.image_std}, expected positive numbers")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        side = self.image_size // self.patch_size
        return side, side


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The text decoder: `depth` self-attention layers and `depth / cross_attn_every` cross-attention layers."""

    vocab_size: int = 64_000
    max_length: int = 64  # tokens, start and end included
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    cross_attn_every: int = 2  # one cross-attention layer (with its own MLP) after every k-th self-attention layer
    tie_embeddings: bool = True  # the vocabulary head is the token embedding, transposed
    activation: Activation = "gelu_tanh"
    norm_eps: float = 1e-6

    def __post_init__(self):
        _require_tower(self)
        _require_positive(self, "vocab_size", "cross_attn_every")
        _require(self.max_length >= 2, f"DecoderConfig.max_length is {self.max_length}, expected at least 2 tokens")
        _require(
            self.depth % self.cross_attn_every == 0,
            f"DecoderConfig.depth {self.depth} is not a multiple of cross_attn_every {self.cross_attn_every}",
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A MaMMUT: one image encoder and one text decoder."""

    vision: VisionConfig = VisionConfig()
    text: DecoderConfig = DecoderConfig()
    logit_scale_init: float = 1 / 0.07  # the inverse temperature of the contrastive logits at the start
    logit_bias_init: float = 0.0  # added to the contrastive logits by the sigmoid and focal losses
    dtype: Dtype = "float32"  # compute
    param_dtype: Dtype = "float32"  # storage
    remat: Remat = "none"  # what the backward pass keeps of a layer: all of it, its matrix products, its input
    unroll: int = 1  # layers unrolled per step of the scan over layers; a small model on a CPU wants all of them

    def __post_init__(self):
        _require_choices(self)
        _require_positive(self, "logit_scale_init", "unroll")
        _require(
            math.isfinite(self.logit_bias_init),
            f"ModelConfig.logit_bias_init is {self.logit_bias_init}, expected a finite number",
        )
        _require(
            self.logit_scale_init <= MAX_LOGIT_SCALE,
            f"ModelConfig.logit_scale_init is {self.logit_scale_init}, expected at most {MAX_LOGIT_SCALE}",
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the examples come from and how an image becomes an array."""

    train: str = "synthetic:train"  # a spec that mammut.sources.open_source reads, such as jsonl:PATH[1000:]
    val: str | None = "synthetic:val"  # None: no evaluation during the run
    batch_size: int = 256  # examples a step, over all devices and processes
    eval_batch_size: int = 256
    val_examples: int = 1_000  # at most so many validation examples are evaluated
    crop_scale: tuple[float, float] = (1.0, 1.0)  # area of the random crop as a share of the image; (1, 1): none
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the random crop, relative to the image's
    horizontal_flip: bool = False  # off: a mirrored image contradicts "left" and "right" in its caption
    blind: bool = False  # every image is black: what can be said from the text alone, to compare with
    threads: int = 4  # decode and resize in so many threads
    max_bad_share: float = 0.1  # stop when more than this share of the examples read could not be used
    max_image_pixels: int = 100_000_000  # an image whose header promises more is skipped undecoded
    tfds_dir: str | None = None  # tensorflow-datasets' data_dir

    def __post_init__(self):
        _require_positive(self, "batch_size", "eval_batch_size", "val_examples", "threads", "max_image_pixels")
        _require_share(self, "max_bad_share")
        low, high = self.crop_scale
        _require(0 < low <= high <= 1, f"DataConfig.crop_scale is {self.crop_scale}, expected 0 < low <= high <= 1")
        low, high = self.crop_ratio
        _require(0 < low <= high, f"DataConfig.crop_ratio is {self.crop_ratio}, expected 0 < low <= high")


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes ids. The vocabulary must not be larger than `DecoderConfig.vocab_size`."""

    path: str | None = None  # CLIP's bpe*.txt.gz, a SentencePiece .model or a Hugging Face tokenizer.json
    # None: a SentencePiece vocabulary of at most DecoderConfig.vocab_size pieces is trained on the training captions.
    lowercase: bool = True  # CLIP's BPE always lower-cases
    # Of a run that starts from a model (TrainConfig.init): False keeps that model's tokenizer; True makes one as above,
    # and the token embeddings start from random.
    replace: bool = False


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """total = contrastive_weight * contrastive + caption_weight * caption (paper, section 3.2: 1 and 1)."""

    # sigmoid and focal want model.logit_scale_init 10 and model.logit_bias_init -10: most pairs do not match
    contrastive: Literal["softmax", "focal", "sigmoid"] = "softmax"
    contrastive_weight: float = 1.0
    caption_weight: float = 1.0
    focal_gamma: float = 1.0
    focal_alpha: float = 0.5
    focal_normalization: Literal["batch", "pairs"] = "batch"  # divide the sum over B x B pairs by B (paper) or B * B
    label_smoothing: float = 0.0  # of the caption loss
    z_loss: float = 0.0  # weight of log(Z)^2 in the caption loss
    vocab_chunk: int = 16  # text positions whose logits are held at once by the caption loss

    def __post_init__(self):
        _require_choices(self)
        _require_share(self, "label_smoothing")
        _require_positive(self, "vocab_chunk")
        _require(0 < self.focal_alpha < 1, f"LossConfig.focal_alpha is {self.focal_alpha}, expected 0 < alpha < 1")
        for name in ("contrastive_weight", "caption_weight", "focal_gamma", "z_loss"):
            _require(getattr(self, name) >= 0, f"LossConfig.{name} is {getattr(self, name)}, expected at least 0")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Adafactor with warm-up and decay. Weight decay touches kernels only: no bias, norm, embedding."""

    name: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: float = 1e-3  # the peak
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear"] = "cosine"  # from the peak to 0 at the last step
    weight_decay: float = 0.01  # decoupled: multiplied by the learning rate
    b1: float = 0.9
    b2: float = 0.95  # AdamW's second moment; Adafactor sets its own
    eps: float = 1e-8  # of AdamW
    clip_norm: float = 1.0  # global norm of the gradient; 0: no clipping

    def __post_init__(self):
        _require_choices(self)
        _require_positive(self, "learning_rate", "eps")
        _require_share(self, "b1", "b2")
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            _require(getattr(self, name) >= 0, f"OptimizerConfig.{name} is {getattr(self, name)}, expected at least 0")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1, at most once, takes all that are left."""

    data: int = -1  # batch split, parameters replicated
    fsdp: int = 1  # batch split, parameters split
    model: int = 1  # heads, MLP and vocabulary split

    def sizes(self, num_devices: int) -> tuple[int, int, int]:
        """The three sizes for `num_devices`; raises ValueError when they do not multiply to it."""
        sizes = dataclasses.astuple(self)
        known = math.prod(size for size in sizes if size != -1)
        if sizes.count(-1) == 1 and known > 0 and num_devices % known == 0:
            sizes = tuple(num_devices // known if size == -1 else size for size in sizes)
        if min(sizes) < 1 or math.prod(sizes) != num_devices:
            given = " x ".join(map(str, dataclasses.astuple(self)))
            raise ValueError(f"mesh.data x fsdp x model is {given}, expected a product of {num_devices} devices")
        return sizes


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run. The resolved config is saved beside its checkpoints."""

    # A key of mammut.tasks.TASKS: both losses on captions, or the caption pass alone on captions, answers, names.
    task: Literal["image_text", "caption", "vqa", "classify"] = "image_text"
    # A model folder or run to start from: its weights, processor and `model` settings. None: random weights.
    init: str | None = None
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    steps: int = 10_000
    seed: int = 0  # of the initial weights, the data order, the crops
    accumulation: int = 1  # micro-batches a step; the contrastive loss still sees the whole batch
    log_every: int = 50  # steps
    eval_every: int = 1_000  # steps; 0: only at the end
    checkpoint_every: int = 1_000  # steps; there is always one at the end
    keep_checkpoints: int = 2
    max_nonfinite_steps: int = 10  # stop after so many skipped updates in a row
    compilation_cache: str | None = "~/.cache/mammut/xla"

    def __post_init__(self):
        _require_choices(self)
        _require_positive(self, "steps", "accumulation", "log_every", "checkpoint_every", "keep_checkpoints")
        _require_positive(self, "max_nonfinite_steps")
        _require(0 <= self.seed < 2**31, f"TrainConfig.seed is {self.seed}, expected 0 to {2**31 - 1}")
        _require(self.eval_every >= 0, f"TrainConfig.eval_every is {self.eval_every}, expected at least 0")
        _require(
            self.data.batch_size % self.accumulation == 0,
            f"data.batch_size {self.data.batch_size} is not a multiple of accumulation {self.accumulation}",
        )
        _require(
            self.optimizer.warmup_steps < self.steps,
            f"optimizer.warmup_steps {self.optimizer.warmup_steps} is not below steps {self.steps}",
        )


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: Any, where: str = "config"):
    """Builds the dataclass `cls` from plain JSON values; `where` names their file in errors.

    Raises:
      ValueError: `values` is not an object, or has a field that `cls` does not have. A missing field takes its default.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} holds {type(values).__name__}, expected an object with the fields of {cls.__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"{where} has {', '.join(unknown)}, which {cls.__name__} does not know")
    built = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(fields[name].type):
            value = from_dict(fields[name].type, value, f"{where}: {name}")
        built[name] = tuple(value) if isinstance(value, list) else value
    return cls(**built)
