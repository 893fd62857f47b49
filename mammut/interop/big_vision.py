"""Our model under big_vision's model contract, for its trainers and evaluators.

These are proj/image_text and proj/cappa. They import a model by its name in
`big_vision.models`. In a config file:

    import sys
    import mammut.interop.big_vision
    sys.modules["big_vision.models.mammut"] = mammut.interop.big_vision

    def get_config():
        ...
        config.model_name = "mammut"
        config.model = dict(preset="mammut_b16", outputs="embeddings")
        config.model_init = "runs/flickr8k"

`mammut.config.to_dict(mammut.weights.model_folder.read_model_config(PATH))` gives the fields of an
existing model. big_vision itself is needed only for checkpoints that its trainers
wrote.
"""

import dataclasses
import inspect
import math
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from mammut import presets
from mammut.core.fields import from_dict, require, to_dict
from mammut.models.compute import Augment, AugmentConfig, ComputeConfig
from mammut.models.layers import unit
from mammut.models.mammut import MAX_LOGIT_SCALE, MaMMUT, ModelConfig, require_computable
from mammut.models.requirements import require_video
from mammut.models.video import reads_tubes
from mammut.weights.files.tensor_file import TensorSpec
from mammut.weights.formats import big_vision as big_vision_weights
from mammut.weights.model_folder import open_model
from mammut.weights.old_configs import upgraded
from mammut.weights.opened import LazyTensors, OpenedModel, model_specs
from mammut.weights.warm_start import Start, WarmStart, warm_start

# The names of a model's parts: ours, those of two towers, CapPa's.
_PARTS: dict[str, Start] = dict.fromkeys(("vision", "image", "img", "encoder"), "init_vision")
_PARTS |= dict.fromkeys(("text", "txt"), "init_text")
# Arguments of `Model` that set how it is called, not what it is.
_OF_CALLS = ("outputs", "start_id")


@dataclasses.dataclass(frozen=True)
class _Starts:
    """Where the scalars of the contrastive loss start."""

    logit_scale_init: float = 1 / 0.07
    logit_bias_init: float = 0.0

    def __post_init__(self):
        require(
            0 < self.logit_scale_init <= MAX_LOGIT_SCALE,
            f"logit_scale_init is {self.logit_scale_init}, expected more than 0 and at most "
            f"{MAX_LOGIT_SCALE:g}",
        )
        require(
            math.isfinite(self.logit_bias_init),
            f"logit_bias_init is {self.logit_bias_init}, expected a finite number",
        )


class Model:
    """A model with big_vision's `init` and `apply`.

    Both take a nested dict of parameters. Parameters are named by their paths in `MaMMUT`.

    Images are float, normalised already (`value_range(-1, 1)`, for mean and deviation 0.5), or
    uint8; or videos of both, [B, T, height, width, 3], as `MaMMUT.image_tokens` takes them. Texts
    are ids without a start and without a mask: pads are the tokens with the id `text.pad_id`, if it
    is set.

    Args:
      preset: a function of `mammut.presets`; the fields below change it. None: they change
      `ModelConfig()`.
      outputs: the outputs of `apply(variables, image, text)`: "embeddings", as two towers give, for
      SigLIP's and the contrastive trainer; or "logits" of the text, as CapPa gives, for its
      trainer. The model must have that pass.
      start_id: the id in front of a text where its logits are computed. CapPa's is 0.
      fields: fields of `ModelConfig`; `vision` and `text` are dicts of their fields. `compute` and
      `augment` are dicts of `ComputeConfig` and `AugmentConfig`; `logit_scale_init` and
      `logit_bias_init` are the initial scalars of the loss.

    Raises:
      ValueError: a field that is not known, or fields or outputs that do not go together.
    """

    def __init__(
        self,
        preset: str | None = None,
        outputs: Literal["embeddings", "logits"] = "embeddings",
        start_id: int = 0,
        **fields: Any,
    ):
        self.config, self.compute, self._augment, self._scalars = _configs(preset, fields)
        self._outputs = outputs
        self._start_id = start_id
        text = self.config.text
        if outputs not in ("embeddings", "logits"):
            raise ValueError(f"outputs is {outputs!r}, expected 'embeddings' or 'logits'")
        if outputs == "embeddings" and text.pooling == "none":
            raise ValueError(
                "outputs is 'embeddings', which needs a contrastive pass: text.pooling is 'none'"
            )
        if outputs == "logits" and text.depth == 0:
            raise ValueError("outputs is 'logits', which needs a caption pass: text.depth is 0")
        if not 0 <= start_id < text.vocab_size:
            raise ValueError(
                f"start_id is {start_id}, expected an id below text.vocab_size {text.vocab_size}"
            )
        if outputs == "logits" and start_id == text.pad_id:
            raise ValueError(
                f"start_id {start_id} is text.pad_id, so that no token would see the start"
            )
        self._graphdef = nnx.graphdef(nnx.eval_shape(lambda: self._make(jax.random.key(0))))

    def _make(self, key: jax.Array) -> MaMMUT:
        model = MaMMUT(self.config, compute=self.compute, rngs=nnx.Rngs(key))
        for name, value in self._scalars.items():
            getattr(model, name).set_value(jnp.float32(value))
        return model

    def init(self, rng: jax.Array, image: Any, text: Any = None) -> dict[str, Any]:
        """Makes random parameters, `{"params": ...}`.

        `image` and `text` are examples of the inputs of `apply`.

        Raises:
          ValueError: the images are of another size than `vision.image_size`, or videos that the
            model does not read, or the texts longer than the longest.
        """
        size, longest = self.config.vision.image_size, self.config.text_length
        if len(image.shape) not in (4, 5) or tuple(image.shape[-3:]) != (size, size, 3):
            raise ValueError(
                f"images are {list(image.shape)}, expected [B, {size}, {size}, 3] by "
                f"vision.image_size, or videos [B, T, {size}, {size}, 3]"
            )
        if len(image.shape) == 5:
            require_video(self.config, image.shape[1], self._augment)
        if text is not None and text.shape[1] > longest:
            raise ValueError(
                f"texts are {list(text.shape)}, expected {longest} tokens at most by "
                f"text.max_length"
            )
        return {"params": nnx.to_pure_dict(nnx.state(self._make(rng), nnx.Param))}

    def apply(
        self,
        variables: Mapping[str, Any],
        image: Any,
        text: Any = None,
        *,
        train: bool = False,
        rngs: Mapping[str, jax.Array] | None = None,
        method: Any = None,
        return_enc_features: bool = False,
        decode: bool = False,
    ) -> Any:
        """Computes the outputs for images and texts, int[B, L].

        Args:
          variables: `{"params": ...}`, as `init` makes it.
          image: the images; None where only texts are embedded. With `method=model.decode`, what
            `encode` gave.
          train: whether the draws of `augment` are made, with `rngs["dropout"]`.
          method: `encode` or `decode` of this object; None: both.
          return_enc_features: what CapPa gives for images alone.
          decode: must be False: a cache is `mammut.generation.text`'s affair.

        Returns:
          Of "embeddings": `zimg` and `ztxt`, float32[B, E] of unit norm, None where not given; and
          a dict with the factor "t" and the summand "b" of the logits, float32[1] each,
          "t/parameter", the logarithm of "t", "img/norm", "img/normalized", the same of "txt", and
          "img/pre_logits", the encoder's own vector (`_pre_logits`). Of "logits": float32[B, L, V],
          of every token given those before it. With `return_enc_features`: the image tokens, and a
          dict with "encoded" and "pre_logits".

        Raises:
          ValueError: a combination that has no meaning.
        """
        if set(variables) != {"params"}:
            raise ValueError(f"variables hold {sorted(variables)}, expected params alone")
        if decode:
            raise ValueError(
                "decode is True, expected False: mammut.generation.text decodes step by step"
            )
        if method is not None and method not in (self.encode, self.decode):
            raise ValueError(f"method is {method!r}, expected encode or decode of this model")
        if method is not None:
            return method(variables, image) if text is None else method(variables, image, text)
        model = self._merge(variables)
        if return_enc_features:
            tokens = model.image_tokens(image).tokens
            return tokens, {"encoded": tokens, "pre_logits": _pre_logits(model, image)}
        augment = Augment()
        if train and rngs and self._augment != AugmentConfig():
            key = rngs["dropout"]
            if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
                key = jax.random.wrap_key_data(key)
            augment = Augment(key, self._augment)
        if self._outputs == "logits":
            return self._logits(model, model.image_tokens(image, augment).tokens, text)
        return _embeddings(model, image, text, augment)

    def encode(self, variables: Mapping[str, Any], image: Any) -> jax.Array:
        """Makes the image tokens of a text, float[B, P, D].

        The text is decoded from them.
        """
        return self._merge(variables).image_tokens(image).tokens

    def decode(self, variables: Mapping[str, Any], encoded: jax.Array, text: Any) -> jax.Array:
        """Scores every token of `text`, float32[B, L, V].

        The scores depend on the tokens before it and on `encoded`.
        """
        return self._logits(self._merge(variables), encoded, text)

    def _merge(self, variables: Mapping[str, Any]) -> MaMMUT:
        return nnx.merge(self._graphdef, variables["params"])

    def _logits(self, model: MaMMUT, image_tokens: jax.Array, text: Any) -> jax.Array:
        tokens = jnp.pad(text[:, :-1], ((0, 0), (1, 0)), constant_values=self._start_id).astype(
            jnp.int32
        )
        return model.text.logits(
            model.decoder.caption_pass(tokens, jnp.ones(tokens.shape, bool), image_tokens)
        )


def _pre_logits(model: MaMMUT, image: Any, augment: Augment = Augment()) -> jax.Array:
    """Computes the encoder's own vector; of a video that it reads by frames, their mean."""
    if image.ndim == 4 or reads_tubes(model.config.vision):
        return model.encoder(image, augment).pooled
    pooled = model.encoder(image.reshape(-1, *image.shape[2:]), augment).pooled
    return pooled.reshape(*image.shape[:2], -1).mean(1)


def _embeddings(
    model: MaMMUT, image: Any, text: Any, augment: Augment
) -> tuple[Any, Any, dict[str, Any]]:
    """Computes the outputs of two towers."""
    zimg, ztxt, scale = None, None, model.logit_scale[...][None]
    out = {"t": jnp.exp(scale), "t/parameter": scale, "b": model.logit_bias[...][None]}
    if image is not None:
        pooled = model.image_tokens(image, augment).vector
        out["img/norm"] = jnp.linalg.norm(pooled, axis=1, keepdims=True)
        out["img/normalized"] = zimg = unit(pooled)
        out["img/pre_logits"] = _pre_logits(model, image, augment)
    if text is not None:
        tokens = text.astype(jnp.int32)
        pooled = model.text_vector(tokens, jnp.ones(tokens.shape, bool))
        out["txt/norm"] = jnp.linalg.norm(pooled, axis=1, keepdims=True)
        out["txt/normalized"] = ztxt = unit(pooled)
    return zimg, ztxt, out


def model_config(preset: str | None = None, **fields: Any) -> ModelConfig:
    """Makes the architecture of `Model(preset, **fields)`.

    Raises:
      ValueError: a preset or field that is not known, or fields that do not go together.
    """
    return _configs(preset, fields)[0]


def _configs(
    preset: str | None, fields: Mapping[str, Any]
) -> tuple[ModelConfig, ComputeConfig, AugmentConfig, dict[str, float]]:
    """Makes the configs of a model from its fields.

    Returns the model, how it is computed, what training draws, and the initial scalars of the loss.
    """
    known = {
        name: make
        for name, make in inspect.getmembers(presets, inspect.isfunction)
        if not name.startswith("_")
    }
    if preset is not None and preset not in known:
        raise ValueError(f"preset is {preset!r}, expected one of {', '.join(known)}")
    values = to_dict(known[preset]()) if preset is not None else {}
    for name, value in fields.items():
        value = value.to_dict() if hasattr(value, "to_dict") else value  # a ConfigDict
        values[name] = values.get(name, {}) | value if name in ("vision", "text") else value
    beside = {name: values.pop(name) for name in ("compute", "augment") if name in values}
    current = upgraded({"model": values, **beside})
    if current.without_norm_bias:
        raise ValueError(
            f"{current.without_norm_bias[0]}.norm_bias is False, expected True: every layer norm "
            "of mammut has a bias"
        )
    config = current.config
    model = from_dict(ModelConfig, config["model"], "the model")
    compute = from_dict(ComputeConfig, config.get("compute", {}), "compute")
    augment = from_dict(AugmentConfig, config.get("augment", {}), "augment")
    require_computable(model, compute, augment)
    starts = from_dict(_Starts, config.get("loss", {}), "the model")
    scalars = {"logit_scale": math.log(starts.logit_scale_init)}
    scalars["logit_bias"] = starts.logit_bias_init
    return model, compute, augment, scalars


def load(
    init_params: Mapping[str, Any] | None,
    init_files: str | Mapping[str, str],
    model_cfg: Mapping[str, Any] | None = None,
    dont_load: str | Sequence[str] = (),
) -> dict[str, Any]:
    """Loads the parameters that a model starts from.

    big_vision calls it with `config.model_init` and `config.model_load`.

    Other sizes of image, patch and text follow the rules of `mammut.weights.warm_start`. Whatever
    else does not fit is an error, but for what `dont_load` names.

    Args:
      init_params: random parameters, for those that are not loaded. None: all must be loaded.
      init_files: what `mammut.load` reads, or a checkpoint that a trainer of big_vision wrote of
        this model; or a part each, {"vision": PATH, "text": PATH}, where "img" and "txt" or
        "encoder" will do as well.
      model_cfg: the arguments of `Model`. None: the model in the file, unchanged.
      dont_load: regular expressions for names such as "text/token_embed/embedding" that keep their
        random values.

    Returns:
      A nested dict of NumPy arrays, and of `init_params` as they were where nothing was loaded.

    Raises:
      ValueError: something is missing, or does not fit. Every mismatch is named.
    """
    config, compute = None, ComputeConfig()
    if model_cfg is not None:
        fields = {name: value for name, value in model_cfg.items() if name not in _OF_CALLS}
        config, compute, _, _ = _configs(fields.pop("preset", None), fields)
    parts = {"": init_files} if isinstance(init_files, str) else dict(init_files)
    if unknown := sorted(parts.keys() - {"", *_PARTS}):
        raise ValueError(
            f"model_init names {', '.join(unknown)}, expected a path, or some of "
            f"{', '.join(_PARTS)}"
        )
    starts = {_PARTS.get(part, "init"): _open(path, config) for part, path in parts.items()}
    if config is None:
        if "init" not in starts:
            raise ValueError(
                "model_cfg is None, expected the arguments of Model, since model_init names parts"
            )
        config = starts["init"].config
        compute = starts["init"].compute
    specs = model_specs(config, compute)
    random = {} if init_params is None else flatten_dict(init_params, sep=".")
    kept = _matching(specs, dont_load)
    vocabulary = {
        name for name in specs if name.startswith(("text.token_embed.", "text.vocab_head"))
    }
    new_vocabulary = vocabulary <= kept
    plan = warm_start(config, starts, compute=compute, new_vocabulary=new_vocabulary)
    if problems := _unfit(specs, random, kept, plan, starts):
        raise ValueError(f"the model does not fit model_init {init_files}: {'; '.join(problems)}")
    values = {
        name: random[name] if name in kept else plan.read(name, random.get(name)) for name in specs
    }
    return unflatten_dict(values, sep=".")


def _matching(names: Collection[str], patterns: str | Sequence[str]) -> set[str]:
    """Lists the names that a regular expression fits.

    The names are written with slashes, as in big_vision.
    """
    if isinstance(patterns, str):
        patterns = [patterns]
    return {
        name
        for name in names
        if any(re.fullmatch(pattern, name.replace(".", "/")) for pattern in patterns)
    }


def _unfit(
    specs: Mapping[str, TensorSpec],
    random: Mapping[str, Any],
    kept: Collection[str],
    plan: WarmStart,
    starts: Collection[Start],
) -> list[str]:
    """Lists arrays that are missing, left over or of another shape."""
    problems = [
        f"{name} of init_params is not one of its parameters"
        for name in sorted(random.keys() - specs.keys())
    ]
    for name, spec in specs.items():
        named = "init" in starts or f"init_{name.partition('.')[0]}" in starts
        if name in random and tuple(random[name].shape) != tuple(spec.shape):
            problems.append(
                f"{name} is {list(random[name].shape)} in init_params, expected {list(spec.shape)}"
            )
        elif name in plan.random and name not in kept and named:
            problems.append(f"{name} is in no file, wholly or in part, and not in dont_load")
        elif name in plan.random | kept and name not in random:
            problems.append(f"{name} is neither loaded nor in init_params")
    return problems


def _open(path: str, config: ModelConfig | None) -> OpenedModel:
    """Opens a model in a file; `config` gives what a file lacks."""
    if ".bv-" in pathlib.Path(path).name:  # big_vision's name for its checkpoints
        if config is None:
            raise ValueError(
                f"model_cfg is None, expected the arguments of Model: {path} does not tell them"
            )
        from big_vision import utils

        arrays = flatten_dict(
            jax.device_get(utils.load_params(str(pathlib.Path(path).absolute()))), sep="."
        )
        specs = {
            name: TensorSpec(array.shape, np.dtype(array.dtype)) for name, array in arrays.items()
        }
        return OpenedModel(config, LazyTensors(specs, arrays.__getitem__), None, path)
    if config is not None and big_vision_weights.recognises(path):
        sizes = {"image_size": config.vision.image_size, "max_length": config.text_length}
        return big_vision_weights.open_model(path, **sizes)
    return open_model(path)
