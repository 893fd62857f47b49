"""Every setting of a model and of a run, as frozen dataclasses.

`ModelConfig` is the architecture and travels with the weights; `TrainConfig` is one run and contains it. Named
architectures are in `mammut.presets`, named runs in `configs/`. A dataclass refuses values that cannot work when it is
built, in one sentence that names the field.
"""

import dataclasses
import math
import types
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu2", "swiglu"]
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
        _require(0 < value < math.inf, f"{type(config).__name__}.{name} is {value}, expected a positive number")


def _require_at_most(config: Any, limits: dict[str, int]) -> None:
    # Past these no model is: a file that says so is damaged or a trap, and is refused before anything is allocated.
    for name, limit in limits.items():
        value = getattr(config, name)
        _require(value <= limit, f"{type(config).__name__}.{name} is {value}, expected at most {limit}")


def _require_share(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 <= value < 1, f"{type(config).__name__}.{name} is {value}, expected a number in [0, 1)")


def _require_pixels(config: Any) -> None:
    # `image_mean` and `image_std` of either tower.
    for name, low, expected in (("image_mean", -math.inf, "finite"), ("image_std", 0, "positive")):
        values = getattr(config, name)
        _require(
            all(low < value < math.inf for value in values),
            f"{type(config).__name__}.{name} is {values}, expected {expected} numbers",
        )


def _require_choices(config: Any) -> None:
    # Unchecked, a misspelt choice would silently be the last one: code asks for one value after the other, then "else".
    for field in dataclasses.fields(config):
        kinds = get_args(field.type) if get_origin(field.type) in (Union, types.UnionType) else (field.type,)
        for kind in kinds:
            if get_origin(kind) is Literal:
                value, choices = getattr(config, field.name), get_args(kind)
                _require(
                    value in choices or (value is None and type(None) in kinds),
                    f"{type(config).__name__}.{field.name} is {value!r}, expected one of {', '.join(choices)}",
                )


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """What the layers of a tower are made of; the defaults are those of the vision transformer as published."""

    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    # gelu is exact (PyTorch's default), gelu_tanh its approximation (Flax's), quick_gelu x * sigmoid(1.702 x) (OpenAI's
    # CLIP), relu2 the square of a ReLU, swiglu a linear map gated by the SiLU of another
    activation: Activation = "gelu_tanh"
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-6
    norm_bias: bool = True  # of LayerNorm; an RMSNorm has none
    attn_bias: bool = True
    attn_out_bias: bool | None = None  # of attention's last map; None: as `attn_bias`
    attn_scale: bool = True  # attention scores are divided by the root of the head size; GPT-Neo's are not
    mlp_bias: bool = True
    # serial: the MLP reads what attention has been added to. parallel: both read one norm of the layer's input (GPT-J);
    # parallel_two_norms: each has a norm of its own (GPT-NeoX).
    layout: Literal["serial", "parallel", "parallel_two_norms"] = "serial"
    qk_norm: bool = False  # a norm over each head's queries and keys
    attn_gate: bool = False  # what a layer attended to is multiplied by a sigmoid of the layer's normed input
    gate_bias: bool = True

    def __post_init__(self):
        _require_choices(self)
        _require_positive(self, "width", "num_heads", "mlp_dim", "norm_eps")
        _require_at_most(self, {"width": 2**16, "depth": 2**10, "mlp_dim": 2**18})
        _require(
            self.width % self.num_heads == 0,
            f"{type(self).__name__}.width {self.width} is not a multiple of num_heads {self.num_heads}",
        )


@dataclasses.dataclass(frozen=True)
class VisionConfig(LayerConfig):
    """The ViT image encoder: patches, learned positions, pre-norm blocks; by default no class token."""

    image_size: int = 224  # pixels; images are square
    patch_size: int = 16  # pixels
    patch_bias: bool = True
    class_token: bool = False  # a learned token before the patches
    input_norm: bool = False  # a norm before the first layer
    # What an image is represented by: the mean of its patches, of all tokens, the class token, the first of
    # `pool_queries` learned queries that attend to all tokens (CoCa; the others go to the decoder in place of the
    # patches), or one such query with an MLP (the MAP head of SigLIP).
    pooling: Literal["mean", "mean_all", "class", "queries", "map"] = "mean"
    pool_queries: int = 256  # of pooling "queries"
    pool_heads: int = 8  # of pooling "queries"
    norm_after_pooling: bool = False  # the last norm is of the pooled image alone; the decoder sees tokens without
    cropped_pos_embed: bool = False  # train with a random crop of the position table for each image (RO-ViT)
    patch_drop: float = 0.0  # in training, this share of an image's patches is left out at random (FLIP)
    # Images of this size are taken too, with the positions resampled: those of `TrainConfig.low_image_steps`.
    low_image_size: int | None = None
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of pixels scaled to 0..1
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        super().__post_init__()
        _require_positive(self, "depth", "image_size", "patch_size", "pool_queries", "pool_heads")
        _require_at_most(self, {"image_size": 2**14, "pool_queries": 2**14})
        _require(
            self.image_size % self.patch_size == 0,
            f"VisionConfig.image_size {self.image_size} is not a multiple of patch_size {self.patch_size}",
        )
        low = self.low_image_size
        _require(
            low is None or (0 < low < self.image_size and low % self.patch_size == 0),
            f"VisionConfig.low_image_size is {low}, expected a multiple of patch_size {self.patch_size} below "
            f"image_size {self.image_size}",
        )
        _require_share(self, "patch_drop")
        _require_pixels(self)
        _require(
            self.class_token or self.pooling != "class",
            "VisionConfig.pooling is 'class', which needs class_token True",
        )
        _require(
            self.pooling != "queries" or self.pool_queries > 1,
            f"VisionConfig.pool_queries is {self.pool_queries}, expected at least 2: the first is not the decoder's",
        )
        _require(
            self.pooling != "map" or not self.norm_after_pooling,
            "VisionConfig.norm_after_pooling is True, which does not go with pooling 'map'",
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_tokens(self) -> int:
        """Image tokens that the decoder attends to."""
        if self.pooling == "queries":
            return self.pool_queries - 1
        return self.grid[0] * self.grid[1] + (self.class_token and self.pooling == "mean_all")

    @property
    def summary(self) -> str:
        """In words, for reports and model cards."""
        return f"patches of {self.patch_size}; {self.depth} layers of width {self.width}, {self.num_heads} heads"


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """A ResNet image encoder, four stages of bottlenecks; an image token is what its last stage says of 32 x 32 pixels.

    clip: that of CLIP (arXiv 2103.00020, section 2.4) without its attention pool: three convolutions first, averages
    in place of strides, batch norms that keep their stored statistics. nf: the norm-free ResNet (arXiv 2101.08692):
    standardised kernels, activations in front. The defaults are CLIP's RN50; RN50x16, that of MAGMA, has stem_width 96,
    stages (6, 8, 18, 8) and an image_size of 384.
    """

    kind: Literal["clip", "nf"] = "clip"
    stem_width: int = 64  # channels of the stem; those of the bottlenecks, and 2, 4 and 8 times as many in later stages
    stages: tuple[int, int, int, int] = (3, 4, 6, 3)  # bottlenecks of each
    image_size: int = 224  # pixels; images are square
    # Images of this size are taken too: those of `TrainConfig.low_image_steps`.
    low_image_size: int | None = None
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # of pixels scaled to 0..1: CLIP's
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    # What a `VisionConfig` may say, and what holds of every ResNet.
    pooling: ClassVar[str] = "mean"
    norm_after_pooling: ClassVar[bool] = False
    class_token: ClassVar[bool] = False
    cropped_pos_embed: ClassVar[bool] = False
    patch_drop: ClassVar[float] = 0.0

    def __post_init__(self):
        _require_choices(self)
        _require_positive(self, "stem_width", "image_size")
        _require_at_most(self, {"stem_width": 2**11, "image_size": 2**14})
        _require(
            all(0 < depth <= 2**10 for depth in self.stages),
            f"ResNetConfig.stages is {self.stages}, expected numbers of bottlenecks, 1 to {2**10}",
        )
        _require(
            self.kind != "clip" or self.stem_width % 2 == 0,
            f"ResNetConfig.stem_width is {self.stem_width}, expected an even number: the stem begins with half of it",
        )
        _require(
            self.image_size % 32 == 0, f"ResNetConfig.image_size {self.image_size} is not a multiple of 32, its stride"
        )
        low = self.low_image_size
        _require(
            low is None or (0 < low < self.image_size and low % 32 == 0),
            f"ResNetConfig.low_image_size is {low}, expected a multiple of 32 below image_size {self.image_size}",
        )
        _require_pixels(self)

    @property
    def width(self) -> int:
        """The size of an image token: the channels of the last stage."""
        return 32 * self.stem_width

    @property
    def depth(self) -> int:
        """Bottlenecks of all stages."""
        return sum(self.stages)

    @property
    def grid(self) -> tuple[int, int]:
        """Image tokens down and across."""
        return self.image_size // 32, self.image_size // 32

    @property
    def num_tokens(self) -> int:
        """Image tokens that the decoder attends to."""
        return self.grid[0] * self.grid[1]

    @property
    def summary(self) -> str:
        """In words, for reports and model cards."""
        kind = {"clip": "CLIP's ResNet", "nf": "a norm-free ResNet"}[self.kind]
        stages = ", ".join(map(str, self.stages))
        return f"{kind}, stages of {stages} bottlenecks, stem of {self.stem_width}, tokens of {self.width} numbers"


@dataclasses.dataclass(frozen=True)
class DecoderConfig(LayerConfig):
    """The text decoder: `depth` self-attention layers and `depth / cross_attn_every` cross-attention layers, or none.

    The defaults are MaMMUT as its paper has it; the other values make up the models of others (`mammut.interop`).
    """

    vocab_size: int = 64_000
    max_length: int = 64  # tokens, start and end included
    cross_attn_every: int = 2  # one cross-attention layer for every k self-attention layers; 0: none
    # Where in such a group: after its last layer or its first, as a layer with an MLP of its own; or between the
    # self-attention and the MLP of the first, without.
    cross_attn_position: Literal["last", "first", "inside"] = "last"
    mlp_before_cross_attn: bool = True  # False: the layer that a cross-attention layer follows has no MLP
    image_norm: bool = False  # every cross-attention layer norms the image tokens first
    # Rotary, in self-attention: rope turns interleaved pairs of a head's numbers (GPT-J), rope_half pairs its first
    # half with its second (GPT-NeoX).
    positions: Literal["learned", "rope", "rope_half"] = "learned"
    rope_dims: int | None = None  # the first so many of a head's numbers are turned; None: all
    rope_theta: float = 10_000.0
    # In the caption pass a token of layer i sees the last local_windows[i % n] tokens, itself included; 0: all.
    local_windows: tuple[int, ...] = (0,)
    tie_embeddings: bool = True  # the vocabulary head is the token embedding, transposed
    vocab_bias: bool = False
    # How the contrastive pass becomes an embedding: the mean over real tokens, over all positions, the token at the
    # last position, the last real token (the end), the class token; none: there is no contrastive pass.
    pooling: Literal["mean", "mean_all", "last", "end", "class", "none"] = "mean"
    # Layers in front of the others, without cross-attention, that alone make the text embedding: the text tower of
    # CoCa; with `depth` 0, a model without a caption pass, that of SigLIP.
    text_only_depth: int = 0
    text_only_heads: int | None = None  # None: `num_heads`
    causal_contrastive: bool = False  # the contrastive pass is causal, too
    class_token: bool = False  # a learned token at the end of the contrastive pass
    # Pads that no token attends to: in both passes, in the contrastive pass, in none. "shifted" is open_clip's CoCa: of
    # its text-only layers, and one position too late.
    pad_masking: Literal["both", "contrastive", "none", "shifted"] = "both"
    pad_id: int | None = None  # this id is a pad wherever it stands; None: only `text_valid` tells
    # Storage of the decoder's parameters; None: `ModelConfig.param_dtype`. bfloat16 is for a frozen decoder: of a
    # trained one it would round small updates away.
    param_dtype: Dtype | None = None

    def __post_init__(self):
        super().__post_init__()
        _require_positive(self, "vocab_size", "rope_theta")
        _require_at_most(self, {"vocab_size": 2**24, "max_length": 2**17, "text_only_depth": 2**10})
        _require(self.max_length >= 2, f"DecoderConfig.max_length is {self.max_length}, expected at least 2 tokens")
        for name in ("depth", "text_only_depth"):
            _require(getattr(self, name) >= 0, f"DecoderConfig.{name} is {getattr(self, name)}, expected at least 0")
        _require(self.depth + self.text_only_depth > 0, "DecoderConfig.depth is 0, expected at least 1 layer")
        every, windows = self.cross_attn_every, self.local_windows
        _require(every >= 0, f"DecoderConfig.cross_attn_every is {every}, expected at least 0")
        _require(
            not every or self.depth % every == 0,
            f"DecoderConfig.depth {self.depth} is not a multiple of cross_attn_every {every}",
        )
        _require(
            len(windows) > 0 and min(windows) >= 0 and (every or self.depth) % len(windows) == 0,
            f"DecoderConfig.local_windows is {windows}, expected numbers of tokens, 0 or more, as many as divide "
            f"{f'cross_attn_every {every}' if every else f'the depth {self.depth}'}",
        )
        _require(
            windows == (0,) or self.pooling == "none",
            f"DecoderConfig.local_windows is {windows}, which needs pooling 'none': a contrastive pass has no windows",
        )
        _require(
            self.layout == "serial" or not every or self.cross_attn_position != "inside",
            f"DecoderConfig.layout is {self.layout!r}, which has no place between attention and MLP for "
            "cross_attn_position 'inside'",
        )
        _require(
            every > 0 or self.mlp_before_cross_attn,
            "DecoderConfig.mlp_before_cross_attn is False, which needs cross-attention: cross_attn_every is 0",
        )
        _require(
            self.mlp_before_cross_attn or self.cross_attn_position != "inside",
            "DecoderConfig.mlp_before_cross_attn is False, which cross_attn_position 'inside' has no place for",
        )
        _require(
            self.pad_id is None or 0 <= self.pad_id < self.vocab_size,
            f"DecoderConfig.pad_id is {self.pad_id}, expected an id below vocab_size {self.vocab_size}",
        )
        _require(
            not self.vocab_bias or self.depth > 0,
            "DecoderConfig.vocab_bias is True, which needs a caption pass: depth is 0",
        )
        heads = self.text_only_heads
        _require(
            heads is None or (heads > 0 and self.width % heads == 0),
            f"DecoderConfig.text_only_heads is {heads}, expected a divisor of the width {self.width}",
        )
        _require(
            self.class_token == (self.pooling == "class"),
            f"DecoderConfig.class_token is {self.class_token}, which does not go with pooling {self.pooling!r}",
        )
        head_size = self.width // self.num_heads
        _require(
            self.positions == "learned" or head_size % 2 == 0,
            f"DecoderConfig.positions is {self.positions!r}, which needs heads of even size, not {head_size}",
        )
        dims = self.rope_dims
        _require(
            dims is None or (self.positions != "learned" and 0 < dims <= head_size and dims % 2 == 0),
            f"DecoderConfig.rope_dims is {dims}, expected an even number up to the head size {head_size}, with rotary "
            f"positions, not {self.positions!r}",
        )
        _require(
            self.pad_masking != "shifted" or (self.class_token and self.text_only_depth > 0),
            "DecoderConfig.pad_masking is 'shifted', which needs class_token and text_only_depth",
        )

    @property
    def num_cross_layers(self) -> int:
        """Layers that attend to the image."""
        return self.depth // self.cross_attn_every if self.cross_attn_every else 0

    @property
    def whole_length(self) -> bool:
        """Whether the text embedding depends on the last position, so that texts are padded to `max_length`."""
        return self.pooling in ("mean_all", "last", "class")

    @property
    def group_size(self) -> int:
        """Self-attention layers that are laid out together: those that share a cross-attention layer, or windows."""
        return self.cross_attn_every or len(self.local_windows)


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Small modules on the maps, attentions and MLPs of a model that is otherwise left as it is (`mammut.models.adapter_modules`).

    Several with one `name` make up one adapter, which is saved, loaded and switched on as a whole.
    """

    name: str = "default"
    # Bottlenecks (down, ReLU, up) on the output of an attention or MLP: of its output (sequential), or of its input
    # (parallel), times a learned number (scaled_parallel). lora: a product of two thin matrices beside a linear map.
    # ia3: a learned factor for each output of a map, or input of an MLP's second.
    kind: Literal["sequential", "parallel", "scaled_parallel", "lora", "ia3"] = "sequential"
    # Patterns of paths (fnmatch), such as text.layers.mlp, text.layers.attn.query, vision.layers.*.value
    sites: tuple[str, ...] = ("text.layers.mlp",)
    reduction: int = 4  # of a bottleneck: the width over its hidden size
    rank: int = 8  # of lora
    alpha: float = 8.0  # of lora: the product is multiplied by alpha / rank
    norm: bool = False  # of a bottleneck: a layer norm in front
    # magma: N(0, 1e-3) cut at 2e-3, biases too (MAGMA); zero: the second map is zero, the adapter changes nothing yet.
    # lora and ia3 always change nothing at first.
    init: Literal["magma", "zero"] = "magma"

    def __post_init__(self):
        _require_choices(self)
        _require_positive(self, "reduction", "rank", "alpha")
        _require(
            self.name.isidentifier(), f"AdapterConfig.name is {self.name!r}, expected letters, digits and underscores"
        )
        _require(len(self.sites) > 0, "AdapterConfig.sites is empty, expected patterns such as text.layers.mlp")
        bottleneck, lora = ("reduction", "norm", "init"), ("rank", "alpha")
        unread = {"lora": bottleneck, "ia3": bottleneck + lora}.get(self.kind, lora)
        for field in dataclasses.fields(self):
            # A setting that would do nothing is a misunderstanding; "zero" is what lora and ia3 always start from.
            value = getattr(self, field.name)
            _require(
                field.name not in unread or value == field.default or value == "zero",
                f"AdapterConfig.{field.name} is {value!r}, which {self.kind!r} does not have",
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One image encoder and one text decoder: a MaMMUT, or with an image prefix a MAGMA (arXiv 2112.05253)."""

    vision: VisionConfig | ResNetConfig = VisionConfig()
    text: DecoderConfig = DecoderConfig()
    embed_dim: int | None = None  # E of the embeddings; None: the decoder's width
    # From the image encoder: one map takes the tokens to the decoder and, averaged, to the embedding; two maps do; one
    # takes them to the decoder and there is no embedding; one makes the embedding and the decoder sees the tokens as
    # they are; none does either.
    image_projection: Literal["shared", "separate", "decoder", "embedding", "none"] = "shared"
    # How the decoder sees the image: its cross-attention layers attend to the image tokens, or these stand in front of
    # the text, in place of its start token.
    conditioning: Literal["cross_attention", "prefix"] = "cross_attention"
    prefix_tokens: int | None = None  # so many are made of the pooled image; None: every image token is one
    prefix_dropout: float = 0.0  # in training, after the projection
    prefix_norm: bool = False  # a layer norm after that
    adapters: tuple[AdapterConfig, ...] = ()
    text_projection: bool = False  # a map takes the pooled text to the embedding
    projection_bias: bool = True
    logit_scale_init: float = 1 / 0.07  # the inverse temperature of the contrastive logits at the start
    logit_bias_init: float = 0.0  # added to the contrastive logits by the sigmoid and focal losses
    dtype: Dtype = "float32"  # compute
    param_dtype: Dtype = "float32"  # storage
    remat: Remat = "none"  # what the backward pass keeps of a layer: all of it, its matrix products, its input
    unroll: int = 1  # layers unrolled per step of the scan over layers; a small model on a CPU wants all of them
    # Training runs the decoder twice, or once with both passes stacked on a new axis: split weights are gathered once.
    passes: Literal["two_calls", "fused"] = "two_calls"
    # auto: a fused kernel where there is one that works here, else XLA's.
    image_attention: Literal["auto", "xla"] = "auto"

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
        _require(
            self.embed_dim is None or 0 < self.embed_dim <= 2**16,
            f"ModelConfig.embed_dim is {self.embed_dim}, expected 1 to {2**16}",
        )
        _require(
            self.text_projection or self.text.pooling == "none" or self.embed_size == self.text.width,
            f"ModelConfig.embed_dim is {self.embed_dim}, which without text_projection is the text width "
            f"{self.text.width}",
        )
        _require(
            self.image_projection != "shared" or self.embed_size == self.text.width,
            f"ModelConfig.embed_dim is {self.embed_dim}, which with image_projection 'shared' is the text width "
            f"{self.text.width}",
        )
        _require(
            self.image_projection != "shared"
            or (self.vision.pooling in ("mean", "mean_all") and not self.vision.norm_after_pooling),
            f"ModelConfig.image_projection is 'shared', which goes with VisionConfig.pooling 'mean' or 'mean_all' and "
            f"norm_after_pooling False, not {self.vision.pooling!r} and {self.vision.norm_after_pooling}",
        )
        _require(
            self.image_projection != "none" or self.text.pooling == "none" or self.vision_size == self.embed_size,
            f"ModelConfig.image_projection is 'none', which needs images of {self.embed_size} numbers, not "
            f"{self.vision_size}",
        )
        if self.vision.pooling == "queries":
            _require(
                self.embed_size % self.vision.pool_heads == 0,
                f"ModelConfig.embed_dim {self.embed_size} is not a multiple of VisionConfig.pool_heads "
                f"{self.vision.pool_heads}",
            )
        text = self.text
        prefix = self.conditioning == "prefix"
        _require(
            prefix == (text.cross_attn_every == 0),
            f"ModelConfig.conditioning is {self.conditioning!r}, which does not go with DecoderConfig.cross_attn_every "
            f"{text.cross_attn_every}: 0 goes with 'prefix', others with 'cross_attention'",
        )
        _require_share(self, "prefix_dropout")
        _require(
            prefix or (self.prefix_tokens is None and not self.prefix_dropout and not self.prefix_norm),
            "ModelConfig.prefix_tokens, prefix_dropout and prefix_norm need conditioning 'prefix'",
        )
        _require(
            self.prefix_tokens is None
            or (self.prefix_tokens > 0 and self.image_projection in ("separate", "decoder")),
            f"ModelConfig.prefix_tokens is {self.prefix_tokens}, expected at least 1, with image_projection 'separate' "
            f"or 'decoder', not {self.image_projection!r}",
        )
        _require(
            self.image_projection != "decoder" or text.pooling == "none",
            f"ModelConfig.image_projection is 'decoder', which makes no image embedding for DecoderConfig.pooling "
            f"{text.pooling!r}",
        )
        _require(
            not prefix or self.image_token_size == text.width,
            f"ModelConfig.image_projection is {self.image_projection!r}, which leaves image tokens of "
            f"{self.image_token_size} numbers: a prefix has those of the decoder, {text.width}",
        )
        _require(
            self.text_length >= 2,
            f"DecoderConfig.max_length {text.max_length} has no room for text after the {self.num_prefix_tokens} "
            "tokens of an image",
        )
        _require(
            not prefix or not text.text_only_depth,
            f"DecoderConfig.text_only_depth is {text.text_only_depth}, expected 0 with ModelConfig.conditioning "
            "'prefix'",
        )
        _require(
            self.passes != "fused" or (text.pooling not in ("none", "class") and not text.text_only_depth),
            "ModelConfig.passes is 'fused', which needs two passes over the same tokens and layers: not "
            f"DecoderConfig.pooling {text.pooling!r} with text_only_depth {text.text_only_depth}",
        )
        _require(not prefix or self.passes != "fused", "ModelConfig.passes is 'fused', which has no place for a prefix")

    @property
    def embed_size(self) -> int:
        """E, the size of the embeddings."""
        return self.text.width if self.embed_dim is None else self.embed_dim

    @property
    def vision_size(self) -> int:
        """The size of an image token; learned queries have that of the embedding."""
        return self.embed_size if self.vision.pooling == "queries" else self.vision.width

    @property
    def image_token_size(self) -> int:
        """The size of an image token as the decoder attends to it."""
        return self.text.width if self.image_projection in ("shared", "separate", "decoder") else self.vision_size

    @property
    def num_prefix_tokens(self) -> int:
        """Positions of the decoder that an image takes; 0 where cross-attention sees it."""
        if self.conditioning != "prefix":
            return 0
        return self.vision.num_tokens if self.prefix_tokens is None else self.prefix_tokens

    @property
    def text_length(self) -> int:
        """Tokens of a text beside its image, start and end included: an image prefix takes the start's place."""
        return self.text.max_length - max(self.num_prefix_tokens - 1, 0)


# How a run computes and trains a model, which its weights do not depend on: fields of ModelConfig and VisionConfig.
RUN_FIELDS = ("dtype", "param_dtype", "remat", "unroll", "passes", "image_attention", "prefix_dropout")
RUN_VISION_FIELDS = ("cropped_pos_embed", "patch_drop", "low_image_size")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the examples come from and how an image becomes an array."""

    train: str = "synthetic:train"  # a spec that mammut.data.sources.open_source reads, such as jsonl:PATH[1000:]
    val: str | None = "synthetic:val"  # None: no evaluation during the run
    batch_size: int = 256  # examples a step, over all devices and processes
    eval_batch_size: int = 256
    val_examples: int = 1_000  # at most so many validation examples are evaluated
    crop_scale: tuple[float, float] = (1.0, 1.0)  # area of the random crop as a share of the image; (1, 1): none
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the random crop, relative to the image's
    horizontal_flip: bool = False  # off: a mirrored image contradicts "left" and "right" in its caption
    # What the model goes on from, in training and evaluation: {} is the question, of captions and names nothing, as in
    # "Q: {} A:" and "A picture of".
    prompt: str = "{}"
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

    def prompt_of(self, question: str) -> str:
        """What the model goes on from when it is asked a question, or, where that is empty, nothing."""
        prompt = self.prompt.replace("{}", question)
        return prompt if question else prompt.strip()  # a space before a caption is the tokenizer's business


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes ids. The vocabulary must not be larger than `DecoderConfig.vocab_size`."""

    path: str | None = None  # CLIP's bpe*.txt.gz, a SentencePiece .model or a Hugging Face tokenizer.json
    # None: a SentencePiece vocabulary of at most DecoderConfig.vocab_size pieces is trained on the training captions.
    lowercase: bool = True  # CLIP's BPE always lower-cases
    # Of a run that starts from a model (TrainConfig.init, init_text): False keeps that model's tokenizer, or says that
    # `path` is it where the model comes without; True makes one as above, and the token embeddings start from random.
    replace: bool = False
    max_length: int | None = None  # tokens of a text, start and end included; None: as many as the model has places for


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
    # Of the contrastive loss: every device holds its rows of the B x B matrix, or the texts go round the devices and
    # only tiles of `contrastive_chunk` images by as many texts are ever held.
    contrastive_form: Literal["matrix", "ring"] = "matrix"
    contrastive_chunk: int = 4_096
    vocab_chunk: int = 16  # text positions whose logits are held at once by the caption loss

    def __post_init__(self):
        _require_choices(self)
        _require_share(self, "label_smoothing")
        _require_positive(self, "vocab_chunk", "contrastive_chunk")
        _require(0 < self.focal_alpha < 1, f"LossConfig.focal_alpha is {self.focal_alpha}, expected 0 < alpha < 1")
        for name in ("contrastive_weight", "caption_weight", "focal_gamma", "z_loss"):
            _require(getattr(self, name) >= 0, f"LossConfig.{name} is {getattr(self, name)}, expected at least 0")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Adafactor with warm-up and decay. Weight decay touches kernels only: no bias, norm, embedding."""

    name: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: float = 1e-3  # the peak
    # Peaks of some parameters, by pattern of their path, such as ("vision.*", 2e-6); the first that fits counts.
    learning_rates: tuple[tuple[str, float], ...] = ()
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # from the peak to 0 at `decay_steps`, or at the peak
    decay_steps: int | None = None  # None: the last step
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
        for pattern, peak in self.learning_rates:
            _require(
                0 < peak < math.inf,
                f"OptimizerConfig.learning_rates has {peak} for {pattern!r}, expected a positive number (what is not "
                "to be trained TrainConfig.trainable leaves out)",
            )


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

    # A key of mammut.training.tasks.TASKS: both losses on captions; the caption pass alone on captions, answers, names; or on
    # captions without their images, whose files need not be there: a language model, such as `init_text` starts from.
    task: Literal["image_text", "caption", "vqa", "classify", "text"] = "image_text"
    # A model to start from, of any format that mammut.load reads: its weights, processor and `model` settings, of which
    # image and patch size and text length may differ. `mammut.weights.warm_start` has the rules. None: random weights.
    init: str | None = None
    # An image encoder alone: its weights, its `model.vision` settings but for the pooling, and how it takes images.
    init_vision: str | None = None
    init_text: str | None = None  # a text decoder alone: its weights, `model.text` settings and tokenizer
    # Without `init` and `init_text`, the decoder is trained for so many steps of the task `text` first, in a run of its
    # own in WORKDIR/language_model, and that is what the run starts from.
    text_steps: int = 0
    # Patterns of paths (fnmatch) of the parameters to train, such as adapters.*; the others are frozen: they have no
    # gradient and no optimizer state.
    trainable: tuple[str, ...] = ("*",)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    steps: int = 10_000
    low_image_steps: int = 0  # the first so many steps see images of `model.vision.low_image_size` (RECLIP, CLIPA)
    seed: int = 0  # of the initial weights, the data order, the crops
    accumulation: int = 1  # micro-batches a step; the contrastive loss still sees the whole batch
    log_every: int = 50  # steps
    eval_every: int = 1_000  # steps; 0: only at the end
    checkpoint_every: int = 1_000  # steps; there is always one at the end
    keep_checkpoints: int = 2
    max_nonfinite_steps: int = 10  # stop after so many skipped updates in a row
    step_timeout: float = 3_600.0  # seconds; a process that makes no step for so long says where it is and ends
    compilation_cache: str | None = "~/.cache/mammut/xla"

    def __post_init__(self):
        _require_choices(self)
        _require_positive(self, "steps", "accumulation", "log_every", "checkpoint_every", "keep_checkpoints")
        _require_positive(self, "max_nonfinite_steps", "step_timeout")
        _require(0 <= self.seed < 2**31, f"TrainConfig.seed is {self.seed}, expected 0 to {2**31 - 1}")
        for name in ("eval_every", "low_image_steps", "text_steps"):
            _require(getattr(self, name) >= 0, f"TrainConfig.{name} is {getattr(self, name)}, expected at least 0")
        _require(
            not self.low_image_steps or self.model.vision.low_image_size is not None,
            f"TrainConfig.low_image_steps is {self.low_image_steps}, which needs model.vision.low_image_size",
        )
        text = self.model.text
        _require(
            text.depth > 0,
            f"TrainConfig.task is {self.task!r}, which needs a caption pass: model.text.depth is 0 (of a SigLIP, "
            "init_vision takes the image encoder)",
        )
        _require(
            self.task != "image_text" or text.pooling != "none",
            "TrainConfig.task is 'image_text', but with model.text.pooling 'none' there is no text embedding",
        )
        _require(
            self.task != "vqa" or "{}" in self.data.prompt,
            f"data.prompt is {self.data.prompt!r}, expected a text with {{}} in it, the place of the question",
        )
        longest = self.model.text_length
        _require(
            2 <= self.text_length <= longest,
            f"tokenizer.max_length is {self.text_length}, expected 2 to the {longest} that model.text has places for",
        )
        _require(
            not text.whole_length or self.text_length == longest,
            f"tokenizer.max_length is {self.text_length}, which with model.text.pooling {text.pooling!r} is {longest}",
        )
        _require(
            self.data.batch_size % self.accumulation == 0,
            f"data.batch_size {self.data.batch_size} is not a multiple of accumulation {self.accumulation}",
        )
        _require(
            self.optimizer.warmup_steps < self.steps,
            f"optimizer.warmup_steps {self.optimizer.warmup_steps} is not below steps {self.steps}",
        )
        decay = self.optimizer.decay_steps
        _require(
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
        return self.model.text_length if self.tokenizer.max_length is None else self.tokenizer.max_length


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return dataclasses.asdict(config)


def differences(old: dict[str, Any], new: dict[str, Any], free: set[str], prefix: str = "") -> list[str]:
    """The fields of a config as `to_dict` gives it that are not what they were, but for those in `free`, in words."""
    changed = []
    for name, value in new.items():
        field, was = prefix + name, old.get(name)
        if field in free or value == was:
            continue
        if isinstance(value, dict) and isinstance(was, dict):
            changed += differences(was, value, free, field + ".")
        else:
            changed.append(f"{field} is {value}, it was {was}")
    return changed


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
        kind = _dataclass_for(value, fields[name].type)
        if dataclasses.is_dataclass(kind):
            value = from_dict(kind, value, f"{where}: {name}")
        elif _is_list_of(kind, dataclasses.is_dataclass) and isinstance(value, list | tuple):
            value = [from_dict(get_args(kind)[0], item, f"{where}: {name}") for item in value]
        elif not _fits(value, kind):
            expected = kind.__name__ if isinstance(kind, type) else str(kind)
            raise ValueError(f"{where} has {name} {value!r}, expected {expected} for {cls.__name__}.{name}")
        built[name] = _as_tuples(value)
    return cls(**built)


def _dataclass_for(value: Any, kind: Any) -> Any:
    """Of a field that holds one of several dataclasses, that which knows most of the value's names, or the first."""
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else ()
    if not options or not all(map(dataclasses.is_dataclass, options)):
        return kind
    names = set(value) if isinstance(value, dict) else set()
    return max(options, key=lambda option: len(names & {field.name for field in dataclasses.fields(option)}))


def _is_list_of(kind: Any, what: Callable[[Any], bool] = lambda item: True) -> bool:
    """Whether a field's type is that of a tuple of any length, of items that are `what`."""
    args = get_args(kind)
    return get_origin(kind) is tuple and len(args) == 2 and args[1] is Ellipsis and what(args[0])


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value can be of the type of a field."""
    if get_origin(kind) is Literal:
        return isinstance(value, str)  # which one, the config checks itself
    if get_origin(kind) in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(kind))
    if _is_list_of(kind):
        return isinstance(value, list | tuple) and all(_fits(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        return isinstance(value, list | tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if kind is float:
        return isinstance(value, float) or type(value) is int and abs(value) < 2**53
    return type(value) is kind
