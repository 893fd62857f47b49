"""Validation during a run: the loss of texts without their images."""

import jax
import numpy as np
import pytest

from mammut.config import DataConfig, LossConfig, MeshConfig, TrainConfig
from mammut.core import sharding
from mammut.data.examples import BadExample, Example, Question, Source
from mammut.data.sources import open_source
from mammut.testing import tiny_config, tiny_processor
from mammut.training.step import make_trainer
from mammut.training.tasks import TASKS
from mammut.training.validation import Evaluator, require_scored


def test_the_loss_of_texts_is_their_mean_over_all_tokens():
    """Batches of 4 of which the last is not full, compared with one mean in float64."""
    config = TrainConfig(
        task="text",
        model=tiny_config(),
        data=DataConfig(batch_size=4, eval_batch_size=4, val_examples=2),
        loss=LossConfig(vocab_chunk=5),
    )
    source = open_source("synthetic:val[:2]", image_size=16)
    processor = tiny_processor()
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        trainer = make_trainer(config, TASKS["text"](config.loss), mesh)
        params = trainer.init(0).all_params
        evaluate = Evaluator(source, processor, config, trainer, "run", alive=lambda: None)
        evaluation = evaluate(params)
        texts = [text for index in range(2) for _, text in source.pairs(index)]
        tokens, text_valid = processor.encode_text(texts)
        decoder = trainer.model(params).decoder
        logits = decoder.logits(decoder.language_pass(tokens, text_valid))
    logits = np.asarray(logits, np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    of_next = np.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    loss = -of_next[text_valid[:, 1:]].mean()
    assert len(texts) == evaluation.num_texts == 6
    assert evaluation.metrics["loss_caption"] == pytest.approx(loss, rel=1e-5)
    assert evaluation.metrics["perplexity"] == pytest.approx(np.exp(loss), rel=1e-5)


def test_a_task_without_an_evaluation_is_refused():
    """As a task is that was added to the tasks alone."""
    config = TrainConfig(model=tiny_config(), data=DataConfig(batch_size=4, eval_batch_size=4))
    source = open_source("synthetic:val[:2]", image_size=16)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        trainer = make_trainer(config, TASKS["image_text"](config.loss), mesh)
        object.__setattr__(config, "task", "rhyme")
        with pytest.raises(ValueError, match="task is 'rhyme', which has no evaluation: expected"):
            Evaluator(source, tiny_processor(), config, trainer, "run", alive=lambda: None)


class Given(Source):
    """Examples as they are given; None is one that cannot be used."""

    spec = "given"

    def __init__(self, *examples: Example | None):
        self._examples = examples

    def __len__(self):
        return len(self._examples)

    def __getitem__(self, index):
        if self._examples[index] is None:
            raise BadExample("no picture", "corrupt")
        return self._examples[index]


def example(key, **fields) -> Example:
    made = Example(**{"image": None, "captions": ["a cat"], "key": "", "name": "cat"} | fields)
    made.key = key  # also what is no text
    return made


def asked(key: str, *questions: Question) -> Example:
    return example(key, captions=[], qa=list(questions))


@pytest.mark.parametrize("task, examples, message", [
    ("image_text", [example("a"), example("b"), example("a")], "has 'a' more than once"),
    ("caption", [example("a"), None, example("a")], "has 'a' more than once"),
    ("classify", [example("a"), example("a")], "has 'a' more than once"),
    ("vqa", [asked("a", Question("?", ["yes"], "1")), asked("b", Question("?", ["no"], "1"))],
     "has the question '1' more than once"),
    ("vqa", [asked("a", Question("?", ["yes"], "1"), Question("!", ["yes"], "1"))],
     "has the question '1' more than once"),
    ("vqa", [asked("a", Question("?", ["yes"], "1"), Question("?", [], "2"))],
     "1 of 2 questions of 'given' have no answers"),
    ("vqa", [asked("a", Question("?", [], "1"))], "has nothing to score '1' against"),
    ("caption", [example("a", captions=[])], "has nothing to score 'a' against"),
    ("classify", [example("a", name=None)], "has nothing to score 'a' against"),
    ("caption", [example(7)], "has the key 7, expected a text"),
])  # fmt: skip
def test_a_set_that_cannot_be_scored_is_refused_before_training(task, examples, message):
    with pytest.raises(ValueError, match=message):
        require_scored(Given(*examples), 100, task)
    require_scored(Given(*examples), 100, "text")  # a loss needs neither


def test_a_set_that_can_be_scored_is_taken():
    two = Given(example("a"), None, example("b"), example("b"))
    for task in ("image_text", "caption", "classify"):
        require_scored(two, 3, task)  # what is not evaluated is not asked for
    require_scored(
        Given(asked("a", Question("?", ["no"], "1"), Question("?", [""], "2"))), 9, "vqa"
    )


def test_an_evaluator_asks_for_a_set_that_can_be_scored():
    config = TrainConfig(model=tiny_config(), data=DataConfig(batch_size=4, eval_batch_size=4))
    scene = open_source("synthetic:val[:1]", image_size=16)[0]
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        trainer = make_trainer(config, TASKS["image_text"](config.loss), mesh)
        with pytest.raises(ValueError, match="more than once"):
            Evaluator(
                Given(scene, scene), tiny_processor(), config, trainer, "run", alive=lambda: None
            )
