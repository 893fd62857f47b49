"""Tasks: what each answers for, and the loss of an answer and its end, not of its question."""

import dataclasses
import json
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mammut.config import DataConfig, LossConfig, MeshConfig, OptimizerConfig, TrainConfig
from mammut.core import sharding
from mammut.core.params import by_name
from mammut.data import sources
from mammut.data.batches import TooManyBadExamples, TrainBatches
from mammut.models.compute import Augment
from mammut.models.flops import forward_flops
from mammut.testing import tiny_batch, tiny_config, tiny_model, tiny_processor
from mammut.training.step import make_trainer
from mammut.training.tasks import TASKS, TextTask

TASK = TextTask(LossConfig(vocab_chunk=5), "qa")


def qa_batch(size: int = 8) -> dict[str, jax.Array]:
    """Random texts, of each the last few tokens to be said; the first row has nothing to say."""
    batch = tiny_batch(batch_size=size)
    lengths = batch["text_valid"].sum(1)
    start = np.maximum(lengths - np.arange(size) % 5, 1)
    target = (np.arange(12) >= start[:, None]) & batch["text_valid"]
    return jax.tree.map(jnp.asarray, batch | {"target": target})


def loss_of(params, batch, task=TASK):
    model = nnx.merge(nnx.graphdef(tiny_model()), params)
    return task.loss(model, batch, Augment())[0]


@pytest.fixture(scope="module")
def params():
    return nnx.to_pure_dict(nnx.state(tiny_model(), nnx.Param))


@pytest.fixture(scope="module")
def grads(params):
    return jax.jit(jax.grad(loss_of))(params, qa_batch())


def test_the_loss_is_the_mean_over_the_answers_tokens(params):
    batch = qa_batch()
    model = tiny_model()
    logits = np.asarray(
        jax.jit(type(model).caption_logits)(
            model, batch["image"], batch["tokens"], batch["text_valid"]
        ),
        np.float64,
    )
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    costs = [
        -logprobs[row, place - 1, int(batch["tokens"][row, place])]
        for row in range(8)
        for place in range(1, 12)
        if batch["target"][row, place]
    ]
    assert len(costs) == 0 + 1 + 2 + 3 + 4 + 0 + 1 + 2
    np.testing.assert_allclose(jax.jit(loss_of)(params, batch), np.mean(costs), rtol=1e-5)


def test_a_batch_with_nothing_to_say_costs_nothing(params):
    batch = qa_batch()
    batch["target"] = jnp.zeros_like(batch["target"])
    assert float(jax.jit(loss_of)(params, batch)) == 0.0


def test_the_contrastive_parameters_get_no_gradient_and_the_cross_attention_does(grads):
    assert float(grads["logit_scale"]) == 0.0 and float(grads["logit_bias"]) == 0.0
    assert float(jnp.abs(grads["text"]["cross_layers"]["attn"]["key"]["kernel"]).max()) > 1e-6
    assert float(jnp.abs(grads["vision"]["patch_embed"]["kernel"]).max()) > 1e-7


def test_micro_batches_give_the_gradient_of_the_whole_batch(params, grads):
    """Their numbers of answer tokens differ: a mean of means would not do."""

    def merge(params):
        return nnx.merge(nnx.graphdef(tiny_model()), params)

    @jax.jit
    def gradients(params, batch):
        return TASK.gradients(merge, params, batch, Augment(jax.random.key(0)), 4)

    accumulated, metrics = gradients(params, qa_batch())
    np.testing.assert_allclose(metrics["loss"], jax.jit(loss_of)(params, qa_batch()), rtol=1e-5)
    for whole, parts in zip(jax.tree.leaves(grads), jax.tree.leaves(accumulated), strict=True):
        np.testing.assert_allclose(parts, whole, rtol=1e-3, atol=1e-6)


@pytest.mark.long
def test_eight_devices_take_the_step_of_one(params):
    config = TrainConfig(
        task="vqa", model=tiny_config(), data=DataConfig(batch_size=8), steps=10,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0), loss=TASK.config,
    )  # fmt: skip
    states = []
    for devices, mesh in (
        (jax.devices()[:1], MeshConfig()),
        (jax.devices(), MeshConfig(data=2, fsdp=2, model=2)),
    ):
        mesh = sharding.make_mesh(mesh, devices)
        with jax.set_mesh(mesh):
            trainer = make_trainer(config, TASKS["vqa"](config.loss), mesh)
            batch = sharding.device_batch(jax.tree.map(np.asarray, qa_batch()), mesh)
            state, metrics = trainer.step(trainer.init_from(jax.tree.map(jnp.array, params)), batch)
            states.append(
                (jax.device_get(state.params), float(metrics["loss"]), float(metrics["grad_norm"]))
            )
    (one, *one_numbers), (eight, *eight_numbers) = states
    np.testing.assert_allclose(one_numbers, eight_numbers, rtol=1e-4)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), one, params)
    assert moved["image_projection"]["kernel"] > 1e-3
    assert moved["logit_scale"] == 0.0  # nothing but the gradient moves it


# What a task answers for


def test_the_tasks_of_a_config_are_those_of_the_table():
    fields = {field.name: field.type for field in dataclasses.fields(TrainConfig)}
    assert get_args(fields["task"]) == tuple(TASKS)


@pytest.mark.parametrize("task, parts", [
    ("image_text", ["vision", "contrastive_pass", "caption_pass", "vocabulary"]),
    ("caption", ["vision", "caption_pass", "vocabulary"]),
    ("vqa", ["vision", "caption_pass", "vocabulary"]),
    ("classify", ["vision", "caption_pass", "vocabulary"]),
    ("text", ["caption_pass", "vocabulary"]),
])  # fmt: skip
def test_a_task_counts_the_flops_of_the_parts_that_it_runs(task, parts):
    config = TrainConfig(task=task, model=tiny_config())
    made = TASKS[task](config.loss)
    whole = forward_flops(config.model, sees_image=task != "text")
    assert made.flops(config) == {part: whole[part] for part in parts}
    again = ("vision", "contrastive_pass") if task == "image_text" else ()
    assert made.recomputed_parts == again


def test_a_language_task_runs_the_decoder_without_its_cross_attention_and_the_others_run_all(
    params,
):
    names = by_name(params)
    assert all(TASKS[task](TASK.config).runs(name) for task in list(TASKS)[:4] for name in names)
    run = {name for name in names if TASKS["text"](TASK.config).runs(name)}
    assert {name.split(".")[0] for name in run} == {"text"}
    left_out = {name for name in names if name.startswith("text.")} - run
    assert left_out and all(name.startswith("text.cross_layers.") for name in left_out)


# What a task's examples are made into


@pytest.fixture
def folder(tmp_path):
    qa = [
        {"question": "one red circle", "answers": ["left", "right"]},
        {"question": "on the right?", "answers": []},
    ]
    qa.append({"question": "green " * 20, "answers": ["left"]})
    line = {"file": "a.png", "captions": ["one red circle"], "qa": qa[:2], "name": "triangle"}
    lines = [line, line | {"qa": qa[1:2]}, line | {"qa": qa[2:]}]
    from PIL import Image

    Image.new("RGB", (16, 16), (200, 100, 50)).save(tmp_path / "a.png")
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def batches_of(folder, task: str, rows: str = "[:1]", **settings):
    made = TASKS[task](TASK.config)
    field, images = made.field, made.sees_images
    source = sources.open_source(f"jsonl:{folder / 'x.jsonl'}{rows}", image_size=16, field=field)
    config = dataclasses.replace(DataConfig(batch_size=len(source), threads=1), **settings)
    return TrainBatches(source, tiny_processor(), config, seed=0, images=images)


def said(batch) -> tuple[str, str]:
    """What the first row is given, and what it is to say."""
    processor, tokens, target = tiny_processor(), batch["tokens"][0], batch["target"][0]
    start = target.argmax()
    assert tokens[0] == processor.bos_id and not target[0]
    assert (
        tokens[target][-1] == processor.eos_id
        and batch["text_valid"][0].sum() == start + target.sum()
    )
    return processor.tokenizer.decode(tokens[1:start].tolist()), processor.tokenizer.decode(
        tokens[target].tolist()
    )


@pytest.mark.parametrize("task", TASKS)
def test_the_batches_that_are_read_keep_the_contract_of_the_task(folder, task):
    config = TrainConfig(task=task, model=tiny_config(), data=DataConfig(batch_size=1))
    batch = next(batches_of(folder, task))
    contract = TASKS[task](config.loss).abstract_batch(config)
    got = {name: (x.shape, x.dtype) for name, x in batch.items()}
    assert got == {name: (x.shape, x.dtype) for name, x in contract.items()}


def test_each_visit_draws_one_of_the_answers_after_its_question(folder):
    batches = batches_of(folder, "vqa")
    seen = {said(next(batches)) for _ in range(12)}
    assert seen == {("one red circle", "left"), ("one red circle", "right")}


def test_a_caption_and_a_name_have_no_prompt(folder):
    assert said(next(batches_of(folder, "caption"))) == ("", "one red circle")
    assert said(next(batches_of(folder, "classify"))) == ("", "triangle")
    batch = next(batches_of(folder, "image_text"))
    np.testing.assert_array_equal(batch["target"][:, 1:], batch["text_valid"][:, 1:])


@pytest.mark.parametrize("task, prompt, given, text", [
    ("vqa", "red {} on", "red one red circle on", None),
    ("caption", "on the left", "on the left", "one red circle"),
    ("caption", "on the left {}", "on the left", "one red circle"),
    ("classify", "one", "one", "triangle"),
])  # fmt: skip
def test_what_is_to_be_said_follows_the_prompt_of_the_run(folder, task, prompt, given, text):
    seen = said(next(batches_of(folder, task, prompt=prompt)))
    assert seen[0] == given and (seen[1] in ("left", "right") if text is None else seen[1] == text)


def test_a_prompt_that_leaves_no_room_or_has_no_place_for_the_question_is_refused(folder):
    with pytest.raises(
        ValueError,
        match="data.prompt is 'one red circle on .* leaves no room in a text of 12 tokens",
    ):
        batches_of(folder, "caption", prompt="one red circle on the left or right " * 2)
    with pytest.raises(ValueError, match="data.prompt is 'Q: A:', expected a text with {} in it"):
        TrainConfig(task="vqa", data=DataConfig(prompt="Q: A:"))


def test_a_language_task_reads_no_image_and_is_the_loss_of_a_text_alone(folder, params):
    (folder / "a.png").unlink()
    batch = next(batches_of(folder, "text"))
    assert batch.keys() == {"tokens", "text_valid", "target"} and said(batch) == (
        "",
        "one red circle",
    )
    model = tiny_model()
    batch = jax.tree.map(jnp.asarray, batch)
    logits = model.text.logits(model.text.language_pass(batch["tokens"], batch["text_valid"]))
    logprobs = np.asarray(jax.nn.log_softmax(logits.astype(jnp.float32)))
    last = int(batch["text_valid"].sum()) - 1  # the end, which is learnt; what comes after is not
    costs = [
        -logprobs[0, place - 1, int(batch["tokens"][0, place])] for place in range(1, last + 1)
    ]
    assert batch["tokens"][0, last] == tiny_processor().eos_id
    np.testing.assert_allclose(
        loss_of(params, batch, TASKS["text"](LossConfig())), np.mean(costs), rtol=1e-5
    )


def test_a_prompt_and_its_text_are_encoded_as_when_the_text_is_generated():
    processor = tiny_processor()
    tokens, valid, target = processor.encode_pairs([("one red", "circle"), ("", "one red")])
    encode = processor.tokenizer.encode
    ids = [processor.bos_id, *encode("one red"), *encode("circle"), processor.eos_id]
    assert tokens[0, : len(ids)].tolist() == ids and valid[0].sum() == len(ids)
    assert target[0].sum() == len(processor.tokenizer.encode("circle")) + 1
    np.testing.assert_array_equal(tokens[1], processor.encode_text(["one red"])[0][0])
    assert processor.room("one red") == 12 - 2 - len(processor.tokenizer.encode("one red"))


def test_questions_without_answers_or_longer_than_the_context_are_not_learnt_from(folder):
    for rows, cause in (("[1:2]", "no answer"), ("[2:3]", "too long")):
        with pytest.raises(TooManyBadExamples, match=cause):
            next(batches_of(folder, "vqa", rows))


def test_a_blind_run_sees_black(folder):
    assert next(batches_of(folder, "vqa"))["image"].max() == 200
    assert next(batches_of(folder, "vqa", blind=True))["image"].max() == 0
