"""Training tasks: batch, loss and gradients of a run.

Each task trains a model for one purpose.

To add a task, write a class here and give it a row of `TASKS` (and its name to `TrainConfig.task`,
and its evaluation to `mammut.training.validation.Evaluator`).

A loss over pairs of examples needs the whole batch at once, a loss over single examples does not. A
task keeps the two apart, so that a step may run in micro-batches and still see every negative.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from mammut.core.params import Params
from mammut.core.sharding import constrain
from mammut.core.typing import Batch, Metrics
from mammut.data.config import Field
from mammut.models.compute import Augment
from mammut.models.flops import forward_flops
from mammut.models.losses import CONTRASTIVE, caption_sum, contrastive_logits
from mammut.models.mammut import MaMMUT
from mammut.training.accumulation import (
    joined_rows,
    micro_batches,
    pinned,
    split_rows,
    summed_gradients,
)
from mammut.training.config import LossConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class Task:
    """A training task; subclasses give the loss.

    They also give its parts and its gradients.

    Attributes:
      config: Settings of the losses.
      field: The part of an example that gives its texts: captions, questions and answers, or names.
      sees_images: Whether the model is shown the images. If not, a batch has none.
      flop_parts: The parts of `forward_flops` that a training step runs.
      recomputed_parts: The parts that run forward once more in micro-batches.
    """

    sees_images: ClassVar[bool] = True
    flop_parts: ClassVar[tuple[str, ...]] = ()
    recomputed_parts: ClassVar[tuple[str, ...]] = ()

    config: LossConfig
    field: Field

    def loss(self, model: MaMMUT, batch: Batch, augment: Augment) -> tuple[jax.Array, Metrics]:
        """Computes the training loss and the metrics of the step.

        The metrics are `loss` and its parts.
        """
        raise NotImplementedError

    def gradients(
        self,
        merge: Callable[[Params], MaMMUT],
        params: Params,
        batch: Batch,
        augment: Augment,
        accumulation: int = 1,
    ) -> tuple[Params, Metrics]:
        """Computes the gradient of `loss` in `params`, and metrics.

        Args:
          merge: Makes the model of its trained parameters.
          params: The trained parameters.
          batch: Arrays as `abstract_batch` describes them.
          augment: The random draws of the step.
          accumulation: Micro-batches to split the batch into. The gradient stays that of the whole
            batch, every negative included.
        """
        if accumulation > 1:
            return self.accumulated_gradients(merge, params, batch, augment, accumulation)

        def loss(params):
            return self.loss(merge(params), batch, augment)

        return jax.grad(loss, has_aux=True)(params)

    def accumulated_gradients(
        self,
        merge: Callable[[Params], MaMMUT],
        params: Params,
        batch: Batch,
        augment: Augment,
        accumulation: int,
    ) -> tuple[Params, Metrics]:
        """Computes `gradients` in micro-batches."""
        raise NotImplementedError

    def runs(self, name: str) -> bool:
        """Whether the task runs the parameter of this path, such as "text.norm.scale".

        A parameter that is not run has no gradient: weight decay alone would move it.
        """
        return True

    def abstract_batch(self, config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
        """Describes the batch of a step, as shapes and types.

        This is the batch contract. `image` is uint8[B, height, width, 3] or, with
        `DataConfig.frames`, uint8[B, T, height, width, 3], `tokens` int32[B, L], `text_valid`
        bool[B, L], False for pads, and `target` bool[B, L], True for the tokens to predict: an
        answer and its end, not its question. A task that does not see images has no `image`;
        `ImageTextTask` does not read `target`.
        """
        rows = config.data.batch_size
        text = rows, config.text_length
        side = config.model.vision.image_size
        batch = {
            "tokens": jax.ShapeDtypeStruct(text, jnp.int32),
            "text_valid": jax.ShapeDtypeStruct(text, jnp.bool_),
            "target": jax.ShapeDtypeStruct(text, jnp.bool_),
        }
        if self.sees_images:
            frames = config.data.frames
            axes = (rows,) if frames is None else (rows, frames)
            batch["image"] = jax.ShapeDtypeStruct((*axes, side, side, 3), jnp.uint8)
        return batch

    def flops(self, config: TrainConfig) -> dict[str, int]:
        """FLOPs of one example forward in a training step, by part (`forward_flops`)."""
        parts = forward_flops(
            config.model,
            config.augment.patch_drop,
            config.text_length,
            sees_image=self.sees_images,
            frames=config.data.frames or 1,
        )
        return {part: count for part, count in parts.items() if part in self.flop_parts}


@dataclasses.dataclass(frozen=True)
class ImageTextTask(Task):
    """The task of the paper, with two losses on the same pairs.

    They are a contrastive and a captioning loss.

    Batch: `image`, `tokens` and `text_valid` of `Task.abstract_batch`.
    """

    flop_parts: ClassVar[tuple[str, ...]] = (
        "vision",
        "contrastive_pass",
        "caption_pass",
        "vocabulary",
    )
    recomputed_parts: ClassVar[tuple[str, ...]] = ("vision", "contrastive_pass")

    field: Field = "captions"

    def loss(self, model: MaMMUT, batch: Batch, augment: Augment) -> tuple[jax.Array, Metrics]:
        """Computes the weighted sum of both losses.

        Each loss alone is a metric.

        The contrastive loss is the mean over the pairs of the batch, the caption loss the mean over
        its caption tokens.
        """
        out = model.two_pass(batch["image"], batch["tokens"], batch["text_valid"], augment)
        contrastive = self.contrastive(model, out.image_embed, out.text_embed)
        caption = self._caption_sum(model, out.features, batch) / self.caption_tokens(model, batch)
        return self.total(contrastive, caption)

    def total(self, contrastive: jax.Array, caption: jax.Array) -> tuple[jax.Array, Metrics]:
        """Computes the weighted sum of the two losses, and metrics."""
        loss = self.config.contrastive_weight * contrastive + self.config.caption_weight * caption
        return loss, {"loss": loss, "loss_contrastive": contrastive, "loss_caption": caption}

    def contrastive(
        self, model: MaMMUT, image_embed: jax.Array, text_embed: jax.Array
    ) -> jax.Array:
        """Computes the contrastive loss of a whole batch, a scalar.

        The embeddings are float[B, E]. Only the logit scale and the logit bias of `model` are used.
        """
        config = self.config
        row = CONTRASTIVE[config.contrastive]
        options = config.contrastive_options
        scale_and_bias = [model.logit_scale[...]]
        if row.uses_bias:
            scale_and_bias.append(model.logit_bias[...])

        if config.contrastive_form == "ring":
            losses = row.ring(
                image_embed,
                text_embed,
                *scale_and_bias,
                chunk=config.contrastive_chunk,
                **options,
            )
            return losses.mean()

        # All texts are gathered, once: each device scores its own images with them.
        image_embed = constrain(image_embed, "batch", None)
        text_embed = constrain(text_embed, None, None)
        logits = contrastive_logits(image_embed, text_embed, *scale_and_bias)
        return row.matrix(constrain(logits, "batch", None), **options).mean()

    def embed(self, model: MaMMUT, batch: Batch, augment: Augment) -> tuple[jax.Array, jax.Array]:
        """Embeds images and texts, float[B, E] each.

        The contrastive loss needs nothing else.
        """
        image_embed = model.encode_image(batch["image"], augment)
        return image_embed, model.encode_text(batch["tokens"], batch["text_valid"])

    def embed_and_caption(
        self, model: MaMMUT, batch: Batch, augment: Augment
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        """Computes `embed` and the summed caption loss together.

        The images are encoded once.
        """
        out = model.two_pass(batch["image"], batch["tokens"], batch["text_valid"], augment)
        return (out.image_embed, out.text_embed), self._caption_sum(model, out.features, batch)

    def caption_tokens(self, model: MaMMUT, batch: Batch) -> jax.Array:
        """Counts the labels of the batch's caption loss, at least 1."""
        return jnp.maximum(model.caption_labels(batch["tokens"], batch["text_valid"])[1].sum(), 1)

    def _caption_sum(self, model: MaMMUT, features: jax.Array, batch: Batch) -> jax.Array:
        return caption_sum(
            features,
            model.text.vocab_kernel,
            model.text.vocab_bias,
            *model.caption_labels(batch["tokens"], batch["text_valid"]),
            **self.config.caption_options,
        )

    def accumulated_gradients(
        self,
        merge: Callable[[Params], MaMMUT],
        params: Params,
        batch: Batch,
        augment: Augment,
        accumulation: int,
    ) -> tuple[Params, Metrics]:
        """Computes the gradient of both losses in micro-batches (GradCache).

        The gradient is over the whole batch.

        The contrastive loss depends on the parameters only through the embeddings and the logit
        scale and bias. So: embed all micro-batches without gradients. Take the contrastive loss of
        the whole batch, and its gradient in every embedding, once. Then run each micro-batch again,
        and pull its share of that gradient back together with its caption loss (arXiv 2101.06983).
        """
        micros, augments = micro_batches(batch, augment, accumulation)

        def embed_micro(xs):
            micro, augment = xs
            return self.embed(merge(params), pinned(micro), augment)

        embeds = [joined_rows(x) for x in jax.lax.map(embed_micro, (micros, augments))]

        def contrastive_loss(params, image_embed, text_embed):
            return self.contrastive(merge(params), image_embed, text_embed)

        contrastive, (grads, *embed_grads) = jax.value_and_grad(
            contrastive_loss, argnums=(0, 1, 2)
        )(params, *embeds)
        embed_grads = [split_rows(grad, accumulation) for grad in embed_grads]
        num_tokens = self.caption_tokens(merge(params), batch)
        weight = self.config.contrastive_weight
        grads = jax.tree.map(lambda grad: weight * grad, grads)

        def add(sums, xs):
            grads, caption = sums
            micro, augment, embed_grads = xs
            image_grad, text_grad = (constrain(grad, "batch", None) for grad in embed_grads)

            def surrogate(params):
                (image_embed, text_embed), micro_sum = self.embed_and_caption(
                    merge(params), pinned(micro), augment
                )
                # The gradient of this product is the contrastive one, by the chain rule.
                pulled = (image_embed * image_grad).sum() + (text_embed * text_grad).sum()
                micro_caption = micro_sum / num_tokens
                total = weight * pulled + self.config.caption_weight * micro_caption
                return total, micro_caption

            micro_grads, micro_caption = jax.grad(surrogate, has_aux=True)(params)
            return (jax.tree.map(jnp.add, grads, micro_grads), caption + micro_caption), None

        (grads, caption), _ = jax.lax.scan(
            add, (grads, jnp.float32(0)), (micros, augments, embed_grads)
        )
        _, metrics = self.total(contrastive, caption)
        return grads, metrics


@dataclasses.dataclass(frozen=True)
class TextTask(Task):
    """The caption pass alone, on texts after a prompt.

    The texts are captions, answers or names of classes. The loss covers the target tokens,
    `target`: an answer and its end, not its question (paper, section 3.3: visual question answering
    as open-ended generation).

    Batch: all arrays of `Task.abstract_batch`.
    """

    flop_parts: ClassVar[tuple[str, ...]] = ("vision", "caption_pass", "vocabulary")

    def loss(self, model: MaMMUT, batch: Batch, augment: Augment) -> tuple[jax.Array, Metrics]:
        """Computes the mean over the target tokens of the batch."""
        loss = self.loss_sum(model, batch, augment) / self.target_tokens(model, batch)
        return loss, {"loss": loss, "loss_caption": loss}

    def loss_sum(self, model: MaMMUT, batch: Batch, augment: Augment) -> jax.Array:
        """Sums the loss over the target tokens of a batch.

        The batch may be a micro-batch.
        """
        return caption_sum(
            self.features(model, batch, augment),
            model.text.vocab_kernel,
            model.text.vocab_bias,
            *model.caption_labels(batch["tokens"], batch["text_valid"], batch["target"]),
            **self.config.caption_options,
        )

    def features(self, model: MaMMUT, batch: Batch, augment: Augment) -> jax.Array:
        """Features float[B, L, D] that the next tokens are predicted from."""
        image_tokens = model.image_tokens(batch["image"], augment).tokens
        return model.decoder.caption_pass(batch["tokens"], batch["text_valid"], image_tokens)

    def target_tokens(self, model: MaMMUT, batch: Batch) -> jax.Array:
        """Counts the labels of the batch's loss, at least 1."""
        return jnp.maximum(
            model.caption_labels(batch["tokens"], batch["text_valid"], batch["target"])[1].sum(), 1
        )

    def accumulated_gradients(
        self,
        merge: Callable[[Params], MaMMUT],
        params: Params,
        batch: Batch,
        augment: Augment,
        accumulation: int,
    ) -> tuple[Params, Metrics]:
        """Computes the mean gradient over all target tokens, in micro-batches.

        The mean is over the whole batch.
        """
        num_tokens = self.target_tokens(merge(params), batch)

        def share(params, micro, augment):
            return self.loss_sum(merge(params), micro, augment) / num_tokens

        loss, grads = summed_gradients(share, params, batch, augment, accumulation)
        return grads, {"loss": loss, "loss_caption": loss}


class LanguageTask(TextTask):
    """Language modelling on the texts of `TextTask`, without images.

    Batch: `tokens`, `text_valid` and `target` of `Task.abstract_batch`.
    """

    sees_images: ClassVar[bool] = False
    flop_parts: ClassVar[tuple[str, ...]] = ("caption_pass", "vocabulary")

    def features(self, model: MaMMUT, batch: Batch, augment: Augment) -> jax.Array:
        """Computes features float[B, L, D] of the text alone.

        The next tokens are predicted from them.
        """
        return model.decoder.language_pass(batch["tokens"], batch["text_valid"])

    def runs(self, name: str) -> bool:
        """Whether it is a parameter of the decoder, other than its cross-attention."""
        return name.startswith("text.") and not name.startswith("text.cross_layers.")


# The tasks by name, as `TrainConfig.task` takes it.
TASKS: dict[str, Callable[[LossConfig], Task]] = {
    "image_text": ImageTextTask,
    "caption": functools.partial(TextTask, field="captions"),
    "vqa": functools.partial(TextTask, field="qa"),
    "classify": functools.partial(TextTask, field="name"),
    "text": functools.partial(LanguageTask, field="captions"),
}
