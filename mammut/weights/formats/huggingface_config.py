"""Reads the config.json of transformers' language models as a `DecoderConfig`.

The models are GPT-2, GPT-Neo, GPT-J and GPT-NeoX. A key is read by its name in transformers 4 or 5,
or by its general name; a key that is left out has transformers' default. An unknown key is refused,
and so is a value that our decoder cannot compute.
"""

from collections.abc import Callable
from typing import Any

from mammut.models.decoder import DecoderConfig
from mammut.weights.files.tensor_file import CheckpointError
from mammut.weights.formats.json_object import JsonObject, shown

_ACTIVATIONS = {
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    "quick_gelu": "quick_gelu",
    "relu2": "relu2",
}
# Keys about who saved the model, when, and as which type: `mammut` reads the type from the tensors.
_MAKING = {
    "_name_or_path", "architectures", "dtype", "model_type", "name_or_path", "tokenizer_class",
    "torch_dtype", "transformers_version", "transformers_weights",
}  # fmt: skip
_TRAINING = {
    "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "embd_pdrop",
    "embed_dropout", "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob",
    "initializer_range", "resid_dropout", "resid_pdrop",
}  # fmt: skip
# Keys about how transformers runs it. Our attention is always in float32.
_RUNNING = {
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    "attn_implementation", "chunk_size_feed_forward", "is_decoder", "output_attentions",
    "output_hidden_states", "output_past", "reorder_and_upcast_attn", "return_dict",
    "tf_legacy_loss", "tie_last_hidden_states", "torchscript", "use_bfloat16", "use_cache",
    "use_return_dict",
}  # fmt: skip
# Keys about other heads on the same decoder, and about the generation of text.
_OTHER_TASKS = {
    "_num_labels", "classifier_dropout", "finetuning_task", "id2label", "label2id", "num_labels",
    "problem_type", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj", "task_specific_params",
}  # fmt: skip
_GENERATING = {
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "eos_token_id", "exponential_decay_length_penalty", "forced_bos_token_id",
    "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "pad_token_id",
    "prefix", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
}  # fmt: skip
_WITHOUT_EFFECT = _MAKING | _TRAINING | _RUNNING | _OTHER_TASKS | _GENERATING


def decoder_config(values: dict[str, Any], where: str) -> DecoderConfig:
    """Makes the decoder config from a config.json's values.

    `where` names the file in errors.

    Raises:
      CheckpointError: the model is of another type, or a key has a value that our decoder cannot
        have. Every such key is named.
    """
    kind = values.get("model_type")
    read = _MODELS.get(kind) if isinstance(kind, str) else None
    if read is None:
        raise CheckpointError(
            f"{where} has model_type {shown(kind)}, expected one of {', '.join(_MODELS)}"
        )
    problems: list[str] = []
    config = JsonObject("config", values, problems)
    fields = read(config, problems)
    for key in ("add_cross_attention", "is_encoder_decoder", "tie_encoder_decoder"):
        config.only(key, False)
    for key in ("cross_attention_hidden_size", "per_layer_config", "quantization_config"):
        config.only(key, None)
    config.only("pruned_heads", {}, None)
    config.close(_WITHOUT_EFFECT)
    if not problems:
        try:
            return DecoderConfig(cross_attn_every=0, pooling="none", **fields)
        except ValueError as error:
            problems = [str(error)]
    raise CheckpointError(
        f"{where} describes a model that mammut does not have: {'; '.join(problems)}"
    )


# The general name of each size, which transformers accepts besides the type's own, and its limit.
_SIZES = {
    "width": ("hidden_size", 2**16),
    "depth": ("num_hidden_layers", 2**10),
    "num_heads": ("num_attention_heads", 2**16),
    "max_length": ("max_position_embeddings", 2**17),
    "vocab_size": ("vocab_size", 2**24),
}


def _shared(
    config: JsonObject,
    sizes: dict[str, tuple[str, int]],
    *,
    inner: tuple[str, int | None],
    activation: tuple[str, str] = ("activation_function", "gelu_new"),
    eps: str = "layer_norm_epsilon",
    tied: bool,
) -> dict[str, Any]:
    """Reads the fields that all model types have.

    Args:
      config: the values of the file.
      sizes: key and default of each size.
      inner: key and default of the MLP's size; a default of None is four times the width.
      activation: key and default of the activation.
      eps: the key of the norms' epsilon.
      tied: whether the head is the embedding where the file has no setting for it.
    """
    read: dict[str, Any] = {}
    for field, (name, default) in sizes.items():
        general, limit = _SIZES[field]
        key = general if config.value(name) is None and config.value(general) is not None else name
        read[field] = config.whole(key, default, high=limit)
        if config.value(general) not in (None, read[field]):
            config.refuse(general, f"{read[field]}, as {name}")
    width = read["width"]
    name, default = inner
    if default is None:
        default = 4 * width
    read["mlp_dim"] = default
    if config.value(name) is not None:
        read["mlp_dim"] = config.whole(name, default, high=2**18)
    if width % read["num_heads"]:
        config.refuse(sizes["num_heads"][0], f"a divisor of the width {width}")
    return read | {
        "activation": config.choice(*activation, _ACTIVATIONS),
        "norm_eps": config.number(eps, 1e-5, 1e-12, 1.0),
        "tie_embeddings": config.flag("tie_word_embeddings", tied),
    }


def _gpt2(config: JsonObject, problems: list[str]) -> dict[str, Any]:
    sizes = {
        "width": ("n_embd", 768),
        "depth": ("n_layer", 12),
        "num_heads": ("n_head", 12),
        "max_length": ("n_positions", 1024),
        "vocab_size": ("vocab_size", 50_257),
    }
    read = _shared(config, sizes, inner=("n_inner", None), tied=True)
    config.only("n_ctx", read["max_length"])
    config.only("scale_attn_by_inverse_layer_idx", False)
    return read | {"attn_scale": config.flag("scale_attn_weights", True)}


def _gpt_neo(config: JsonObject, problems: list[str]) -> dict[str, Any]:
    sizes = {
        "width": ("hidden_size", 2048),
        "depth": ("num_layers", 24),
        "num_heads": ("num_heads", 16),
        "max_length": ("max_position_embeddings", 2048),
        "vocab_size": ("vocab_size", 50_257),
    }
    read = _shared(config, sizes, inner=("intermediate_size", None), tied=True)
    read |= {"attn_scale": False, "attn_bias": False, "attn_out_bias": True}
    return read | {"local_windows": _windows(config, read["depth"])}


def _windows(config: JsonObject, depth: int) -> tuple[int, ...]:
    """Lists the windows of the layers, as one period."""
    sizes = {"global": 0, "local": config.whole("window_size", 256, high=2**17)}
    groups = config.value("attention_types")
    kinds = config.value("attention_layers")
    if groups is None and kinds is None:
        groups = [[["global", "local"], 12]]
    if groups is not None:
        listed = kinds
        kinds = _expanded(groups)
        if listed not in (None, kinds):
            config.refuse("attention_layers", "what attention_types gives")
    key = "attention_layers" if groups is None else "attention_types"
    if not isinstance(kinds, list) or any(
        not isinstance(kind, str) or kind not in sizes for kind in kinds
    ):
        config.refuse(key, 'lists of "global" and "local"')
        return (0,)
    if len(kinds) != depth:
        config.refuse(key, f"one kind for each of the {depth} layers")
        return (0,)
    windows = tuple(sizes[kind] for kind in kinds)
    periods = (
        n for n in range(1, depth + 1) if depth % n == 0 and windows == windows[:n] * (depth // n)
    )
    return windows[: next(periods)]


def _expanded(groups: Any) -> list[Any] | None:
    """Expands [[["global", "local"], 12]] to 24 kinds.

    Returns None where the form is another one.
    """
    kinds: list[Any] = []
    for group in groups if isinstance(groups, list) else [None]:
        match group:
            case [list(names), int(count)] if 0 < count <= 2**10 and len(names) <= 2**10:
                kinds += names * count
            case _:
                return None
    return kinds


def _gptj(config: JsonObject, problems: list[str]) -> dict[str, Any]:
    sizes = {
        "width": ("n_embd", 4096),
        "depth": ("n_layer", 28),
        "num_heads": ("n_head", 16),
        "max_length": ("n_positions", 2048),
        "vocab_size": ("vocab_size", 50_400),
    }
    read = _shared(config, sizes, inner=("n_inner", None), tied=False)
    config.only("rotary", True)
    config.only("scale_attn_weights", True)
    return read | {
        "layout": "parallel",
        "attn_bias": False,
        "positions": "rope",
        "rope_dims": config.whole("rotary_dim", 64),
        "vocab_bias": True,
    }


def _gpt_neox(config: JsonObject, problems: list[str]) -> dict[str, Any]:
    sizes = {
        "width": ("hidden_size", 6144),
        "depth": ("num_hidden_layers", 44),
        "num_heads": ("num_attention_heads", 64),
        "max_length": ("max_position_embeddings", 2048),
        "vocab_size": ("vocab_size", 50_432),
    }
    options = {
        "inner": ("intermediate_size", 24_576),
        "activation": ("hidden_act", "gelu"),
        "eps": "layer_norm_eps",
    }
    read = _shared(config, sizes, **options, tied=False)
    nested = config.value("rope_parameters")
    rope = JsonObject("config.rope_parameters", {} if nested is None else nested, problems)
    rope.only("rope_type", "default")
    config.only("rope_scaling", None)
    share = _given_once(
        0.25,
        1e-6,
        1.0,
        (rope, "partial_rotary_factor"),
        (config, "rotary_pct"),
        (config, "partial_rotary_factor"),
    )
    theta = _given_once(
        1e4, 1.0, 1e12, (rope, "rope_theta"), (config, "rotary_emb_base"), (config, "rope_theta")
    )
    rope.close()
    return read | {
        "layout": "parallel_two_norms" if config.flag("use_parallel_residual", True) else "serial",
        "attn_bias": config.flag("attention_bias", True),
        "positions": "rope_half",
        "rope_dims": int(read["width"] // read["num_heads"] * share),
        "rope_theta": theta,
    }


def _given_once(default: float, low: float, high: float, *places: tuple[JsonObject, str]) -> float:
    """Reads a number that may stand under several keys.

    All keys that are present must have the same value.
    """
    given = [(config, key) for config, key in places if config.value(key) is not None]
    numbers = [config.number(key, low, low, high) for config, key in given]
    for (config, key), number in zip(given, numbers):
        if number != numbers[0]:
            config.refuse(key, f"{numbers[0]}, as {given[0][1]}")
    return numbers[0] if numbers else default


_MODELS: dict[str, Callable[[JsonObject, list[str]], dict[str, Any]]] = {
    "gpt2": _gpt2,
    "gpt_neo": _gpt_neo,
    "gptj": _gptj,
    "gpt_neox": _gpt_neox,
}
