"""A task is a batch contract and the loss of a model on such a batch.

A loss over pairs of examples needs the whole batch at once, a loss over single examples does not. A
task keeps the two apart, so that a step may run in micro-batches and still see every negative
(`training.step.accumulated_gradients`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from mammut.core.sharding import constrain
from mammut.data.config import Field
from mammut.models.compute import Augment
from mammut.models.losses import (
    caption_sum,
    contrastive_logits,
    focal_contrastive,
    focal_pairs,
    sigmoid_contrastive,
    sigmoid_pairs,
    softmax_contrastive,
)
from mammut.models.mammut import Batch, MaMMUT, Metrics
from mammut.models.ring_loss import ring_pairs, ring_softmax
from mammut.training.config import LossConfig


@dataclasses.dataclass(frozen=True)
class ImageTextTask:
    """The paper's training task: a contrastive and a captioning loss on the same pairs.

    Batch: `image` uint8[B, height, width, 3], `tokens` int[B, L], `text_valid` bool[B, L].
    """

    sees_images: ClassVar[bool] = True
    config: LossConfig
    field: Field = "captions"  # what its examples are made of

    def loss(self, model: MaMMUT, batch: Batch, augment: Augment) -> tuple[jax.Array, Metrics]:
        """The weighted sum and both raw losses, as means over the pairs and over the caption tokens of the batch."""
        out = model.two_pass(batch["image"], batch["tokens"], batch["text_valid"], augment)
        contrastive = self.contrastive(model, out.image_embed, out.text_embed)
        caption = self._caption_sum(model, out.features, batch) / self.caption_tokens(model, batch)
        return self.total(contrastive, caption)

    def total(self, contrastive: jax.Array, caption: jax.Array) -> tuple[jax.Array, Metrics]:
        """The weighted sum, and the two raw losses as metrics."""
        loss = self.config.contrastive_weight * contrastive + self.config.caption_weight * caption
        return loss, {"loss": loss, "loss_contrastive": contrastive, "loss_caption": caption}

    def embed(self, model: MaMMUT, batch: Batch, augment: Augment) -> tuple[jax.Array, jax.Array]:
        """Image and text embeddings, float[B, E] each: all that the contrastive loss sees of an example."""
        image_embed = model.encode_image(batch["image"], augment)
        return image_embed, model.encode_text(batch["tokens"], batch["text_valid"])

    def contrastive(
        self, model: MaMMUT, image_embed: jax.Array, text_embed: jax.Array
    ) -> jax.Array:
        """The contrastive loss over all pairs of the batch; of `model` it uses the logit scale and bias alone."""
        config, scale, bias = self.config, model.logit_scale[...], model.logit_bias[...]
        if config.contrastive == "softmax":
            bias = 0.0  # it would cancel
        if config.contrastive_form == "ring":
            return self._ring(image_embed, text_embed, scale, bias).mean()
        # All texts are gathered, once: each device scores its own images with them.
        image_embed, text_embed = (
            constrain(image_embed, "batch", None),
            constrain(text_embed, None, None),
        )
        logits = constrain(contrastive_logits(image_embed, text_embed, scale, bias), "batch", None)
        if config.contrastive == "softmax":
            losses = softmax_contrastive(logits)
        elif config.contrastive == "sigmoid":
            losses = sigmoid_contrastive(logits)
        else:
            losses = focal_contrastive(
                logits,
                gamma=config.focal_gamma,
                alpha=config.focal_alpha,
                normalization=config.focal_normalization,
            )
        return losses.mean()

    def _ring(
        self,
        image_embed: jax.Array,
        text_embed: jax.Array,
        scale: jax.Array,
        bias: jax.Array | float,
    ) -> jax.Array:
        config = self.config
        if config.contrastive == "softmax":
            return ring_softmax(image_embed, text_embed, scale, chunk=config.contrastive_chunk)
        pairs = sigmoid_pairs
        if config.contrastive == "focal":
            pairs = functools.partial(
                focal_pairs, gamma=config.focal_gamma, alpha=config.focal_alpha
            )
        losses = ring_pairs(
            pairs, image_embed, text_embed, scale, bias, chunk=config.contrastive_chunk
        )
        by_pairs = config.contrastive == "focal" and config.focal_normalization == "pairs"
        return losses / len(losses) if by_pairs else losses

    def embed_and_caption(
        self, model: MaMMUT, batch: Batch, augment: Augment
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        """What `embed` gives, and the caption loss summed over the tokens of a micro-batch; one image encoding."""
        out = model.two_pass(batch["image"], batch["tokens"], batch["text_valid"], augment)
        return (out.image_embed, out.text_embed), self._caption_sum(model, out.features, batch)

    def caption_tokens(self, model: MaMMUT, batch: Batch) -> jax.Array:
        """How many labels the caption loss of the batch has, at least 1."""
        return jnp.maximum(model.caption_labels(batch["tokens"], batch["text_valid"])[1].sum(), 1)

    def _caption_sum(self, model: MaMMUT, features: jax.Array, batch: Batch) -> jax.Array:
        head = model.text.vocab_kernel, model.text.vocab_bias
        return caption_sum(
            features,
            *head,
            *model.caption_labels(batch["tokens"], batch["text_valid"]),
            **self.config.caption_options,
        )


@dataclasses.dataclass(frozen=True)
class TextTask:
    """The caption pass alone, on texts that start with a prompt: captions, answers to questions, names of classes.

    The loss is that of the tokens to be said, `target`: of an answer and its end, not of its
    question (paper, section
    3.3: visual question answering as open-ended generation).

    Batch: `image` uint8[B, height, width, 3], `tokens` int[B, L], `text_valid` bool[B, L], `target`
      bool[B, L].
    """

    sees_images: ClassVar[bool] = True
    config: LossConfig
    field: Field

    def loss(self, model: MaMMUT, batch: Batch, augment: Augment) -> tuple[jax.Array, Metrics]:
        """The mean over the target tokens of the batch."""
        loss = self.loss_sum(model, batch, augment) / self.target_tokens(model, batch)
        return loss, {"loss": loss, "loss_caption": loss}

    def loss_sum(self, model: MaMMUT, batch: Batch, augment: Augment) -> jax.Array:
        """The loss summed over the target tokens of a micro-batch."""
        features = self.features(model, batch, augment)
        head = model.text.vocab_kernel, model.text.vocab_bias
        return caption_sum(
            features,
            *head,
            *model.caption_labels(batch["tokens"], batch["text_valid"], batch["target"]),
            **self.config.caption_options,
        )

    def features(self, model: MaMMUT, batch: Batch, augment: Augment) -> jax.Array:
        """What the next tokens are predicted from, float[B, L, D]."""
        image_tokens = model.image_tokens(batch["image"], augment).tokens
        return model.decoder.caption_pass(batch["tokens"], batch["text_valid"], image_tokens)

    def target_tokens(self, model: MaMMUT, batch: Batch) -> jax.Array:
        """How many labels the loss of the batch has, at least 1."""
        return jnp.maximum(
            model.caption_labels(batch["tokens"], batch["text_valid"], batch["target"])[1].sum(), 1
        )


class LanguageTask(TextTask):
    """Language modelling: the texts of `TextTask`, of which the model sees no image; its batch has none."""

    sees_images: ClassVar[bool] = False

    def features(self, model: MaMMUT, batch: Batch, augment: Augment) -> jax.Array:
        """What the next tokens are predicted from, float[B, L, D]: the tokens before."""
        return model.decoder.language_pass(batch["tokens"], batch["text_valid"])


TASKS: dict[str, Callable[[LossConfig], ImageTextTask | TextTask]] = {
    "image_text": ImageTextTask,
    "caption": functools.partial(TextTask, field="captions"),
    "vqa": functools.partial(TextTask, field="qa"),
    "classify": functools.partial(TextTask, field="name"),
    "text": functools.partial(LanguageTask, field="captions"),
}
