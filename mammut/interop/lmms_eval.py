"""A model for lmms-eval (EvolvingLMMs-Lab/lmms-eval 0.7, package `lmms_eval`).

    model = LmmsEvalModel(*mammut.load("runs/vqa"))
    lmms_eval.evaluator.simple_evaluate(model, tasks=["vqav2_val_lite"])

With `manifest` in the entry-point group `lmms_eval.models`, its command line takes
`--model mammut --model_args pretrained=runs/vqa --batch_size 32`; for videos of 16 frames,
`--model_args pretrained=runs/msrvtt,frames=16`.
"""

import copy
import dataclasses
import functools
import os
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
from mammut.data.video import Clip, is_animation, is_video
from mammut.generation.rows import require_numbers
from mammut.generation.search import GenerateConfig
from mammut.generation.text import generate_text
from mammut.models.mammut import MaMMUT


class LmmsEvalModel(lmms):
    """Answers requests of one image or video and one question each.

    The answers are in the order of the requests.

    A task's images are videos if they are what lmms-eval's own models read as one: the path of a
    video or of a folder of frames, a list of frames inside of the task's list, uint8[N, height,
    width, 3]; or the task's list itself, where the task's metadata hold `task_type: video` and
    `sample_frames`. Without these two, several images are several images, which are refused. The
    times of the frames are those of `VideoTransform`, not `sample_frames` or lmms-eval's own.

    Args:
      batch_size: requests at a time; the last batch is padded to it.
      prompt: the text that the model continues, {} in place of the task's question. Use "" for a
        model that captions: it would take a task's instruction for the beginning of a caption.
      frames: frames that are read of each video; None: those of `Processor.video`, or else of the
        model's `VideoConfig`, or else 8.
    """

    def __init__(
        self,
        model: MaMMUT,
        processor: Processor,
        batch_size: int = 32,
        prompt: str = "{}",
        frames: int | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        super().__init__()
        video = processor.for_model(model.config).video_transform
        if frames is not None:
            video = dataclasses.replace(video, frames=frames)
        self._model = model
        self._processor = copy.copy(processor)
        self._processor.video = video
        self._batch_size = batch_size
        self._prompt = prompt
        self._max_length = model.config.text_length

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict | None = None
    ) -> "LmmsEvalModel":
        """Loads the model of `--model_args` and `--batch_size`.

        The model's arguments are pretrained=FOLDER[,prompt=TEXT][,frames=N]. JAX chooses the
        device.

        Raises:
          ValueError: there are other arguments, or the folder cannot be read.
        """
        arguments = simple_parse_args_string(arg_string)
        if not {"pretrained"} <= set(arguments) <= {"pretrained", "prompt", "frames"}:
            raise ValueError(
                f"model_args name {sorted(arguments)}, expected pretrained and perhaps prompt and "
                "frames"
            )
        batch_size = str((additional_config or {}).get("batch_size") or 32)
        if not batch_size.isdigit():
            raise ValueError(f"batch_size is {batch_size!r}, expected a number")
        model, processor = mammut.weights.model_folder.load(arguments.pop("pretrained"))
        return cls(model, processor, int(batch_size), **arguments)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generates the text after each question, up to a stop.

        The stops are the strings of `until`.

        Of the generation kwargs, which have Hugging Face's names, `do_sample` and the fields of
        `GenerateConfig` have an effect. A sample depends on the request's position in the list:
        repeats of one request differ.

        Raises:
          ValueError: a request does not have one image or video, a task has both, a prompt leaves
            no room for a text, or the kwargs contradict each other.
        """
        configs = [_generate_config(request.args[1]) for request in requests]
        moving, read = self._moving(requests)
        kinds = list(zip(configs, moving, strict=True))
        texts = [""] * len(requests)
        for config, moves in dict.fromkeys(kinds):
            positions = [n for n, own in enumerate(kinds) if own == (config, moves)]
            image_of = functools.partial(self._image, moves=moves, read=read)
            images = _Images(image_of, [requests[position] for position in positions])
            prompts = [self._prompt_of(requests[position]) for position in positions]
            generated = generate_text(
                self._model, self._processor, images, prompts, config, batch_size=self._batch_size
            )
            for position, text in zip(positions, generated):
                texts[position] = _cut(text.text, requests[position].args[1].get("until"))
        return texts

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Computes -log P(continuation | image, context) of each request.

        Returns also whether the continuation is greedy.

        P is the probability of the continuation's tokens, without an end token; the continuation is
        greedy if each of its tokens is the likeliest. In spite of the method's name the number is a
        loss: lmms-eval's own models return one, and its multiple-choice tasks choose the *smallest*
        (its issue 370).

        Raises:
          ValueError: a request does not have one image or video, a task has both, a continuation
            is empty, or both texts together are too long.
        """
        moving, read = self._moving(requests)
        results: dict[int, tuple[float, bool]] = {}
        for moves in dict.fromkeys(moving):
            positions = [position for position, own in enumerate(moving) if own == moves]
            scored = self._scored([requests[n] for n in positions], moves, read)
            results |= zip(positions, scored, strict=True)
        return [results[position] for position in range(len(requests))]

    def _scored(
        self, requests: list[Instance], moves: bool, read: dict[int, Any]
    ) -> list[tuple[float, bool]]:
        """Scores requests that are all about videos, or all about pictures."""
        results = []
        split = nnx.split(self._model)
        for start in range(0, len(requests), self._batch_size):
            chunk = requests[start : start + self._batch_size]
            images = [self._image(request, moves, read) for request in chunk]
            image = self._processor(images=images)["image"]
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
                # Each token is scored at the position before it.
                own = slice(len(prompt) - 1, len(prompt) + len(text) - 1)
                require_numbers(logprobs[own], "the model's log-probabilities")
                results.append((-float(logprobs[own].sum()), bool(likeliest[own].all())))
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Raises NotImplementedError: the model holds no conversation."""
        raise NotImplementedError(
            "a MaMMUT answers one question about one image or video, it holds no conversation"
        )

    def _prompt_of(self, request: Instance) -> str:
        return self._prompt.replace("{}", request.args[0])

    def _prompt_and_continuation(self, request: Instance) -> tuple[list[int], list[int]]:
        text = request.args[1]
        if not isinstance(text, str):
            text = text(self._document(request))
        prompt = [self._processor.bos_id, *self._processor.encode_prompt(self._prompt_of(request))]
        ids = self._processor.encode_after(self._prompt_of(request), text)
        if not ids or len(prompt) + len(ids) > self._max_length:
            raise ValueError(
                f"{_name(request)} has a prompt of {len(prompt)} tokens and a continuation "
                f"{text!r:.60} of {len(ids)}, expected at least 1 and together no more than "
                f"DecoderConfig.max_length {self._max_length}"
            )
        return prompt, ids

    def _document(self, request: Instance) -> Any:
        if len(request.args) != 6:  # as in the metric acc_mutual_info
            raise ValueError(f"{_name(request)} comes without an image, expected one")
        _, _, _, doc_id, task, split = request.args
        return self.task_dict[task][split][doc_id]

    def _visual(self, request: Instance) -> Any:
        """Returns the request's image; a video as a Clip."""
        document = self._document(request)
        visuals = request.args[2](document)
        if visuals is None:
            visuals = []
        elif not isinstance(visuals, list):
            visuals = [visuals]
        one_video = len(visuals) == 1 and is_video(visuals[0])
        if visuals and not one_video and _lists_frames(request):
            return Clip(visuals)
        if len(visuals) != 1:
            raise ValueError(
                f"{_name(request)} comes with {len(visuals)} images, expected one, or in the "
                "task's metadata task_type video and sample_frames, for frames of a video"
            )
        (visual,) = visuals
        # A picture comes as one of Pillow: what has a path is moving.
        is_path = isinstance(visual, str | os.PathLike)
        if is_video(visual) or (is_path and is_animation(visual)):
            return visual if isinstance(visual, Clip) else Clip(visual)
        return visual

    def _moving(self, requests: list[Instance]) -> tuple[list[bool], dict[int, Any]]:
        """Tells which requests are about videos, by the first document of each task.

        To read all documents for it would decode all pictures twice. Returns also the images that
        were read, by the ids of their requests.
        """
        moving: dict[tuple, bool] = {}
        read: dict[int, Any] = {}
        for request in requests:
            source = request.args[4:]  # task and split
            if source not in moving:
                read[id(request)] = self._visual(request)
                moving[source] = isinstance(read[id(request)], Clip)
        return [moving[request.args[4:]] for request in requests], read

    def _image(self, request: Instance, moves: bool, read: dict[int, Any]) -> Any:
        """Returns the Clip or the pixels of a request; takes it out of `read` if it is there."""
        known = id(request) in read
        visual = read.pop(id(request)) if known else self._visual(request)
        if isinstance(visual, Clip) != moves:
            own, other = ("picture", "video") if moves else ("video", "picture")
            raise ValueError(
                f"{_name(request)} comes with a {own} and the task's first document with a "
                f"{other}, expected videos alone or pictures alone"
            )
        # A GIF that a data set holds as a picture is none of the processor's videos.
        return visual if moves else self._processor.image(visual)


class _Images(Sequence):
    """The images of requests, each made when it is needed.

    All images of a benchmark together may not fit in memory.
    """

    def __init__(self, image_of: Callable[[Instance], Any], requests: list[Instance]):
        self._image_of = image_of
        self._requests = requests

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self._image_of(request) for request in self._requests[index]]
        return self._image_of(self._requests[index])


def manifest() -> ModelManifest:
    """Makes the entry `mammut` of lmms-eval's register of models."""
    return ModelManifest("mammut", simple_class_path=f"{__name__}.LmmsEvalModel")


def _name(request: Instance) -> str:
    return f"document {request.doc_id} of task {request.task_name!r}"


def _lists_frames(request: Instance) -> bool:
    """Whether a request's images are the frames of one video, as LLaVA-OneVision reads them."""
    metadata = request.metadata
    return metadata.get("task_type") == "video" and "sample_frames" in metadata


def _cut(text: str, stops: str | list[str] | None) -> str:
    """Cuts the text at the first of the strings `stops`."""
    if isinstance(stops, str):
        stops = [stops]
    for stop in stops or []:
        if stop:
            text = text.split(stop)[0]
    return text.strip()


def _generate_config(kwargs: dict[str, Any]) -> GenerateConfig:
    """Makes the config of generation kwargs.

    The kwargs have Hugging Face's names.
    """
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
        # As in Hugging Face's `generate`, settings of sampling (often top_p 0) have no effect if
        # nothing is sampled.
        for name in ("temperature", "top_k", "top_p", "min_p"):
            chosen.pop(name, None)
    return GenerateConfig(**chosen)


@functools.partial(jax.jit, static_argnames=("graphdef", "vocab_size"))
def _score(graphdef, params, image, tokens, *, vocab_size):
    """Scores each token after the first, float[B, L-1].

    The score is the log-probability. Returns also whether the token is the likeliest.
    """
    logits = nnx.merge(graphdef, params).caption_logits(image, tokens[:, :-1])  # pads come last
    logits = logits[..., :vocab_size].astype(jnp.float32)
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]
    return own, logits.argmax(-1) == tokens[:, 1:]
