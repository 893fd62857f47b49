"""A model as lmms-eval (EvolvingLMMs-Lab/lmms-eval 0.7, package `lmms_eval`) scores it.

    lmms_eval.evaluator.simple_evaluate(LmmsEvalModel(*mammut.load("runs/vqa")),
    tasks=["vqav2_val_lite"])

With `manifest` in the entry-point group `lmms_eval.models`, its command line takes
`--model mammut --model_args pretrained=runs/vqa --batch_size 32`.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.utils import simple_parse_args_string

import mammut.weights.model_folder
from mammut.data.processor import Processor
from mammut.generation.search import GenerateConfig
from mammut.generation.text import generate_text
from mammut.models.mammut import MaMMUT


class LmmsEvalModel(lmms):
    """One image and one question a request; results come in the order of the requests.

    Args:
      batch_size: requests at a time; the last batch is filled up to it.
      prompt: what the model is given before it speaks, the task's question in place of its {}. ""
        is for a model that captions, which would take a task's instruction for the beginning of a
        caption.
    """

    def __init__(
        self, model: MaMMUT, processor: Processor, batch_size: int = 32, prompt: str = "{}"
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        super().__init__()
        self._model, self._processor, self._batch_size, self._prompt = (
            model,
            processor,
            batch_size,
            prompt,
        )
        self._max_length = model.config.text_length

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict | None = None
    ) -> "LmmsEvalModel":
        """The model of `--model_args pretrained=FOLDER[,prompt=TEXT]` and `--batch_size`; JAX chooses the device.

        Raises:
          ValueError: other arguments are given, or the folder cannot be read.
        """
        given = simple_parse_args_string(arg_string)
        if not {"pretrained"} <= set(given) <= {"pretrained", "prompt"}:
            raise ValueError(
                f"model_args name {sorted(given)}, expected pretrained and perhaps prompt"
            )
        batch_size = str((additional_config or {}).get("batch_size") or 32)
        if not batch_size.isdigit():
            raise ValueError(f"batch_size is {batch_size!r}, expected a number")
        return cls(
            *mammut.weights.model_folder.load(given.pop("pretrained")), int(batch_size), **given
        )

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What the model says after each question, up to a string of `until`, `max_new_tokens` or its own length.

        Of the generation kwargs, which have Hugging Face's names, `do_sample` and those of
        `GenerateConfig` are followed. A sample depends on the request's place in the list: repeats
        of one request differ.

        Raises:
          ValueError: a request has not one image, its prompt leaves no room for a text, or its
            kwargs contradict themselves.
        """
        configs = [_generate_config(request.args[1]) for request in requests]
        texts = [""] * len(requests)
        for config in dict.fromkeys(configs):
            places = [place for place, own in enumerate(configs) if own == config]
            images = _Images(self._image, [requests[place] for place in places])
            asked = [self._prompt_of(requests[place]) for place in places]
            found = generate_text(
                self._model, self._processor, images, asked, config, batch_size=self._batch_size
            )
            for place, text in zip(places, found):
                texts[place] = _cut(text.text, requests[place].args[1].get("until"))
        return texts

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(-log P(continuation | image, context), whether each of its tokens is the likeliest) of each request.

        P is that of the continuation's tokens, without an end. In spite of the method's name it is
        a loss: lmms-eval's own models return one, and its multiple-choice tasks choose the
        *smallest* (its issue 370).

        Raises:
          ValueError: a request has not one image, its continuation is empty, or both texts together
            are too long.
        """
        results, split = [], nnx.split(self._model)
        for start in range(0, len(requests), self._batch_size):
            chunk = requests[start : start + self._batch_size]
            image = self._processor(images=[self._image(request) for request in chunk])["image"]
            prompts, texts = zip(*map(self._prompt_and_continuation, chunk))
            tokens = np.full((len(chunk), self._max_length), self._processor.pad_id, np.int32)
            for row, ids in enumerate(prompt + text for prompt, text in zip(prompts, texts)):
                tokens[row, : len(ids)] = ids
            # one shape for all batches
            rows = [*range(len(chunk)), *[0] * (self._batch_size - len(chunk))]
            scores = _score(
                *split, image[rows], tokens[rows], vocab_size=self._processor.vocab_size
            )
            for prompt, text, logprobs, likeliest in zip(prompts, texts, *map(np.asarray, scores)):
                # scored at the position before each
                own = slice(len(prompt) - 1, len(prompt) + len(text) - 1)
                results.append((-float(logprobs[own].sum()), bool(likeliest[own].all())))
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Raises NotImplementedError: there is no conversation with this model."""
        raise NotImplementedError(
            "a MaMMUT answers one question about one image, it holds no conversation"
        )

    def _prompt_of(self, request: Instance) -> str:
        return self._prompt.replace("{}", request.args[0])

    def _prompt_and_continuation(self, request: Instance) -> tuple[list[int], list[int]]:
        text = (
            request.args[1]
            if isinstance(request.args[1], str)
            else request.args[1](self._document(request))
        )
        prompt = [self._processor.bos_id, *self._processor.encode_prompt(self._prompt_of(request))]
        ids = self._processor.encode_after(self._prompt_of(request), text)
        if not ids or len(prompt) + len(ids) > self._max_length:
            raise ValueError(
                f"{_name(request)} has a prompt of {len(prompt)} tokens and a continuation {text!r:.60} of {len(ids)}, "
                f"expected at least 1 and together no more than DecoderConfig.max_length {self._max_length}"
            )
        return prompt, ids

    def _document(self, request: Instance) -> Any:
        if len(request.args) != 6:  # as in the metric acc_mutual_info
            raise ValueError(f"{_name(request)} comes without an image, expected one")
        _, _, _, doc_id, task, split = request.args
        return self.task_dict[task][split][doc_id]

    def _image(self, request: Instance) -> Any:
        document = self._document(request)
        visuals = request.args[2](document)
        visuals = visuals if isinstance(visuals, list) else [] if visuals is None else [visuals]
        if len(visuals) != 1:
            raise ValueError(f"{_name(request)} comes with {len(visuals)} images, expected one")
        return visuals[0]


class _Images(Sequence):
    """The images of requests, each made when it is asked for: those of a benchmark may not fit in memory together."""

    def __init__(self, image_of: Callable[[Instance], Any], requests: list[Instance]):
        self._image_of, self._requests = image_of, requests

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, at):
        found = self._requests[at]
        return (
            [self._image_of(request) for request in found]
            if isinstance(at, slice)
            else self._image_of(found)
        )


def manifest() -> ModelManifest:
    """The name `mammut` in lmms-eval's register of models."""
    return ModelManifest("mammut", simple_class_path=f"{__name__}.LmmsEvalModel")


def _name(request: Instance) -> str:
    return f"document {request.doc_id} of task {request.task_name!r}"


def _cut(text: str, stops: str | list[str] | None) -> str:
    for stop in [stops] if isinstance(stops, str) else stops or []:
        text = text.split(stop)[0] if stop else text
    return text.strip()


def _generate_config(kwargs: dict[str, Any]) -> GenerateConfig:
    fields = dataclasses.fields(GenerateConfig)
    kinds = {field.name: float if isinstance(field.default, float) else int for field in fields}
    if unknown := sorted(set(kwargs) - set(kinds) - {"until", "do_sample"}):
        warnings.warn(
            f"generation_kwargs {unknown} mean nothing to this model and are left out", stacklevel=3
        )
    chosen = {
        name: kind(kwargs[name]) for name, kind in kinds.items() if kwargs.get(name) is not None
    }
    chosen.setdefault("temperature", 1.0 if kwargs.get("do_sample") else 0.0)
    if chosen["temperature"] == 0 or kwargs.get("do_sample") is False:
        # As with Hugging Face's `generate`, what shapes a sample (often top_p 0) means nothing
        # where none is drawn.
        chosen = {
            name: chosen[name] for name in set(chosen) - {"temperature", "top_k", "top_p", "min_p"}
        }
    return GenerateConfig(**chosen)


@functools.partial(jax.jit, static_argnames=("graphdef", "vocab_size"))
def _score(graphdef, params, image, tokens, *, vocab_size):
    # The log-probability float[B, L-1] of each token after the first, and whether it is the
    # likeliest.
    logits = nnx.merge(graphdef, params).caption_logits(image, tokens[:, :-1])  # pads come last
    logits = logits[..., :vocab_size].astype(jnp.float32)
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]
    return own, logits.argmax(-1) == tokens[:, 1:]
