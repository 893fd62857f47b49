"""Evaluations of a set: against public functions and brute force, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import TypeCheckError

import mammut
from mammut.config import MeshConfig
from mammut.core import sharding
from mammut.data.examples import BadExample, Example, Question, Source
from mammut.evaluation.classification import predict_classes
from mammut.evaluation.generated_texts import predict_answers, predict_captions
from mammut.evaluation.predictor import Predictor, place_on_mesh
from mammut.evaluation.retrieval import predict_rankings
from mammut.evaluation.scoring import score
from mammut.generation.search import GenerateConfig
from mammut.testing import tiny_model, tiny_processor

EVALUATIONS = {
    "captions": predict_captions,
    "answers": predict_answers,
    "retrieval": predict_rankings,
    "classes": predict_classes,
}
COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle")
QUESTIONS = ("on the left?", "one red circle?", "right")


class Pictures(Source):
    """Ten random pictures with captions, questions and a name; the fourth is broken."""

    spec = "pictures"

    def __init__(self, size: int = 10, same_key: bool = False):
        self._size, self._same_key = size, same_key

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        if index == 3:
            raise BadExample("the fourth is broken", "broken")
        image = np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8)
        names = [
            f"{COLOURS[(index + n) % 4]} {SHAPES[(index * 2 + n) % 3]}"
            for n in range(2 + index % 2)
        ]
        qa = [
            Question(text, ["one", "left"], f"{index}-{n}", answer_type="other")
            for n, text in enumerate(QUESTIONS[: 1 + index % 3])
        ]
        key = "picture" if self._same_key else f"picture {index}"
        return Example(
            image, [f"one {name} on the left" for name in names], key, qa, name=SHAPES[index % 3]
        )


GOOD = [index for index in range(10) if index != 3]


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def model():
    """Confident, so that its texts differ and no two devices disagree about the likeliest token."""
    model = tiny_model()
    model.text.token_embed.embedding[...] *= 3
    return model


def one_device():
    axes = {
        "axis_names": ("data", "fsdp", "model"),
        "axis_types": (jax.sharding.AxisType.Auto,) * 3,
    }
    return jax.make_mesh((1, 1, 1), devices=jax.devices()[:1], **axes)


@pytest.fixture(scope="module")
def ask(model, processor):
    """Runs an evaluation on a mesh of one device: `ask("captions", source, ...)`."""
    return asker(model, processor, one_device())


@pytest.fixture(scope="module")
def ask_eight(model, processor):
    return asker(model, processor, sharding.make_mesh(MeshConfig(data=2, fsdp=2, model=2)))


def asker(model, processor, mesh, **settings):
    with jax.set_mesh(mesh):
        model_of, params = place_on_mesh(model, mesh)
        options = {
            "checkpoint": "here",
            "batch_size": 4,
            "threads": 2,
            "max_bad_share": 0.2,
        } | settings
        predictor = Predictor(model_of, processor, mesh, **options)

    def ask(name: str, source: Source = Pictures(), /, *args, **kwargs):
        with jax.set_mesh(mesh):
            return EVALUATIONS[name](predictor, params, source, *args, **kwargs)

    return ask


@pytest.fixture(scope="module")
def logprob(model, processor):
    """log P(text | image) from the caption pass over the whole text, in float64."""
    graphdef, params = nnx.split(model)
    logits = jax.jit(
        lambda params, image, tokens: nnx.merge(graphdef, params).caption_logits(image, tokens)
    )

    def logprob(images: np.ndarray, texts: list[str]) -> np.ndarray:
        tokens, valid = processor.encode_text(texts)
        rows = np.empty((len(images), len(texts)))
        for i, image in enumerate(images):
            batch = np.broadcast_to(image, (len(texts), *image.shape))
            scores = np.asarray(logits(params, jnp.asarray(batch), jnp.asarray(tokens)), np.float64)
            scores -= np.log(
                np.exp(scores - scores.max(-1, keepdims=True)).sum(-1, keepdims=True)
            ) + scores.max(-1, keepdims=True)
            own = np.take_along_axis(scores[:, :-1], tokens[:, 1:, None], axis=2)[..., 0]
            rows[i] = np.where(valid[:, 1:], own, 0).sum(1)
        return rows

    return logprob


def images(indices=GOOD) -> np.ndarray:
    return np.stack([Pictures()[index].image for index in indices])


def all_texts() -> list[str]:
    return [text for index in GOOD for text in Pictures()[index].captions]


@pytest.fixture(scope="module")
def ask_diverged(processor):
    diverged = tiny_model()
    diverged.text.norm.bias[...] = jnp.full(48, jnp.nan)
    return asker(diverged, processor, one_device())


@pytest.mark.parametrize("name, settings", [
    ("captions", [GenerateConfig()]),
    ("captions", [GenerateConfig(num_beams=3)]),
    ("captions", [GenerateConfig(num_beams=4, num_groups=2, diversity_penalty=0.5)]),
    ("answers", [GenerateConfig(num_beams=3)]),
])  # fmt: skip
def test_a_model_that_diverged_is_asked_for_no_text(ask_diverged, name, settings):
    with pytest.raises(ValueError, match="logits for a prompt are not numbers: .* diverged$"):
        ask_diverged(name, Pictures(), *settings)


@pytest.mark.parametrize("name, args, settings", [
    ("retrieval", [], {}),
    ("retrieval", [], {"rerank": 2}),
    ("classes", [SHAPES], {}),
    ("classes", [SHAPES], {"method": "likelihood"}),
    ("classes", [SHAPES], {"method": "likelihood", "prior": 1.0}),
])  # fmt: skip
def test_a_model_that_diverged_ranks_nothing(ask_diverged, name, args, settings):
    with pytest.raises(ValueError, match="not finite: the model has diverged"):
        ask_diverged(name, Pictures(), *args, **settings)


# Captions and answers


@pytest.mark.parametrize("num_beams", [1, 3])
def test_captions_are_those_of_the_public_function_with_their_references(
    ask, model, processor, num_beams
):
    predictions = ask("captions", Pictures(), GenerateConfig(num_beams=num_beams))
    assert [record["index"] for record in predictions.records] == GOOD
    said = [record["prediction"] for record in predictions.records]
    assert said == mammut.caption(
        model, processor, list(images()), num_beams=num_beams, batch_size=9
    )
    assert len(set(said)) > 1
    assert [record["references"] for record in predictions.records] == [
        Pictures()[i].captions for i in GOOD
    ]
    assert predictions.left_out == {"broken": 1} and predictions.settings["image_size"] == 16


def test_answers_are_those_of_the_public_function_question_by_question(ask, model, processor):
    predictions = ask("answers")
    asked = [(index, question) for index in GOOD for question in Pictures()[index].qa]
    assert [record["id"] for record in predictions.records] == [
        question.id for _, question in asked
    ]
    questions, pictures = (
        [question.text for _, question in asked],
        images([index for index, _ in asked]),
    )
    said = [record["prediction"] for record in predictions.records]
    assert said == mammut.answer(model, processor, list(pictures), questions, batch_size=8)
    assert len(set(said)) > 2 and all(
        record["answer_type"] == "other" for record in predictions.records
    )


def test_a_prompt_is_put_around_the_question(ask, model, processor):
    predictions = ask("answers", Pictures(3), prompt="on {} left")
    asked = [(index, question.text) for index in range(3) for question in Pictures()[index].qa]
    prompts = [f"on {text} left" for _, text in asked]
    said = mammut.answer(
        model, processor, list(images([index for index, _ in asked])), prompts, batch_size=6
    )
    assert [record["prediction"] for record in predictions.records] == said
    with pytest.raises(ValueError, match="the prompt is 'left', expected a text with {} in it"):
        ask("answers", prompt="left")


class Long(Pictures):
    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        example.qa = [Question("one red circle " * 9, ["one"], f"{index}-long"), *example.qa]
        return example


def test_a_question_longer_than_the_context_is_answered_with_nothing_and_marked(ask):
    records = ask("answers", Long(3)).records
    expected = ask("answers", Pictures(3)).records
    assert [record["prediction"] for record in records if record.get("too_long")] == [""] * 3
    assert [record for record in records if not record.get("too_long")] == expected


@pytest.mark.long
def test_eight_devices_say_what_one_says(ask, ask_eight):
    for method, config in (
        ("captions", GenerateConfig(num_beams=2)),
        ("answers", GenerateConfig()),
    ):
        one, eight = (asks(method, Pictures(), config).records for asks in (ask, ask_eight))
        assert [record.pop("logprob") for record in one] == pytest.approx(
            [r.pop("logprob") for r in eight], abs=1e-3
        )
        assert one == eight


@pytest.mark.long
def test_a_blind_model_sees_black(model, processor):
    mesh = sharding.make_mesh(MeshConfig(data=8))
    blind = asker(model, processor, mesh, batch_size=8, blind=True)
    black = mammut.caption(model, processor, [np.zeros((16, 16, 3), np.uint8)], batch_size=1)
    assert {record["prediction"] for record in blind("captions").records} == {*black}


# Retrieval


def test_retrieval_ranks_by_embedding(ask, ask_eight, model, processor):
    predictions = ask("retrieval")
    tokens, valid = processor.encode_text(all_texts())
    image_embed = np.asarray(
        jax.jit(type(model).encode_image)(model, jnp.asarray(images())), np.float64
    )
    text_embed = np.asarray(
        jax.jit(type(model).encode_text)(model, jnp.asarray(tokens), valid), np.float64
    )
    scores = image_embed @ text_embed.T
    image_of_text = np.repeat(range(9), [len(Pictures()[i].captions) for i in GOOD])
    of_images, of_texts = predictions.records[:9], predictions.records[9:]
    assert [record["index"] for record in of_images] == GOOD
    assert [record["text"] for record in of_texts] == all_texts()
    for record in of_images:
        assert record["relevant"] == np.flatnonzero(image_of_text == record["id"]).tolist()
        np.testing.assert_allclose(
            record["scores"], np.sort(scores[record["id"]])[::-1][:10], rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(
            record["scores"], scores[record["id"]][record["ranked"]], rtol=1e-4, atol=1e-5
        )
        # Texts that are there twice have equal scores but for rounding.
        ahead = scores[record["id"]] - scores[record["id"]][record["relevant"]].max()
        assert 1 + (ahead > 1e-5).sum() <= record["rank"] <= (ahead > -1e-5).sum()
    for record in of_texts:
        assert record["relevant"] == [image_of_text[record["id"]]] and len(record["ranked"]) == 9
        assert record["rank"] == 1 + record["ranked"].index(record["relevant"][0])
        np.testing.assert_allclose(
            record["scores"], np.sort(scores[:, record["id"]])[::-1], rtol=1e-4, atol=1e-5
        )
    for one, eight in zip(predictions.records, ask_eight("retrieval").records, strict=True):
        np.testing.assert_allclose(one["scores"], eight["scores"], rtol=1e-4, atol=1e-5)


class OfASplit(Pictures):
    def notes(self) -> list[str]:
        return ["split test: 9 of 10 videos found"]


def test_what_a_set_says_of_itself_is_in_its_scores(ask):
    assert "set_notes" not in ask("retrieval").settings
    predictions = ask("retrieval", OfASplit())
    assert predictions.settings["set_notes"] == OfASplit().notes()
    assert score(predictions).notes == [*OfASplit().notes(), "left out: 1 broken"]


@pytest.mark.parametrize("prior", [0.0, 0.7])
def test_candidates_are_scored_again_by_caption_likelihood(ask, logprob, prior):
    predictions = ask("retrieval", rerank=3, prior=prior)
    black = np.zeros((1, 16, 16, 3), np.uint8)
    scores = logprob(images(), all_texts()) - prior * logprob(black, all_texts())
    plain = ask("retrieval").records
    changed = 0
    for record, before in zip(predictions.records, plain, strict=True):
        assert record["ranked"] == before["ranked"]
        assert sorted(record["reranked"]) == sorted(record["ranked"][:3])
        own = scores[record["id"]] if record["query"] == "image" else scores[:, record["id"]]
        np.testing.assert_allclose(
            record["reranked_scores"], own[record["reranked"]], rtol=1e-4, atol=1e-3
        )
        assert record["reranked_scores"] == sorted(record["reranked_scores"], reverse=True)
        changed += record["reranked"] != record["ranked"][:3]
    assert changed > 3


# Classes


def test_classes_by_embedding_average_the_templates(ask, model, processor):
    templates = ("one {} on the left", "{} right")
    predictions = ask("classes", Pictures(), SHAPES, templates=templates)
    tokens, valid = processor.encode_text([t.format(name) for name in SHAPES for t in templates])
    embed = (
        np.asarray(jax.jit(type(model).encode_text)(model, jnp.asarray(tokens), valid))
        .reshape(3, 2, -1)
        .mean(1)
    )
    embed /= np.linalg.norm(embed, axis=1, keepdims=True)
    scores = np.asarray(jax.jit(type(model).encode_image)(model, jnp.asarray(images()))) @ embed.T
    for row, record in enumerate(predictions.records):
        assert record["label"] == SHAPES[GOOD[row] % 3] and sorted(record["ranked"]) == sorted(
            SHAPES
        )
        by_name = dict(zip(SHAPES, scores[row]))
        np.testing.assert_allclose(
            record["scores"], [by_name[name] for name in record["ranked"]], rtol=1e-4, atol=1e-5
        )
        assert record["scores"] == sorted(record["scores"], reverse=True)


@pytest.mark.parametrize("prior", [0.0, 1.0])
def test_classes_by_likelihood_average_the_templates(ask, logprob, prior):
    templates = ("one {}", "{} on the right")
    predictions = ask(
        "classes", Pictures(), SHAPES, templates=templates, method="likelihood", prior=prior
    )
    texts = [t.format(name) for name in SHAPES for t in templates]
    black = np.zeros((1, 16, 16, 3), np.uint8)
    seen, unseen = (
        np.log(np.exp(logprob(x, texts)).reshape(-1, 3, 2).mean(2)) for x in (images(), black)
    )
    scores = seen - prior * unseen
    for row, record in enumerate(predictions.records):
        by_name = dict(zip(SHAPES, scores[row]))
        np.testing.assert_allclose(
            record["scores"], [by_name[name] for name in record["ranked"]], rtol=1e-4, atol=1e-3
        )
        assert record["scores"] == sorted(record["scores"], reverse=True)
    with pytest.raises(
        ValueError, match="the template is 'no slot', expected a text with {} in it"
    ):
        ask("classes", Pictures(), SHAPES, templates=("no slot",))


# What cannot be used


def test_a_key_twice_is_refused(ask):
    for method, *args in (("captions",), ("retrieval",), ("classes", SHAPES)):
        with pytest.raises(
            ValueError, match="'pictures' has 'picture' more than once, expected every image"
        ):
            ask(method, Pictures(3, same_key=True), *args)


class Asked(Pictures):
    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        example.qa = [Question("right", ["one"], "7")]
        return example


def test_a_question_id_twice_is_refused_and_a_picture_of_two_lines_is_not(ask):
    with pytest.raises(ValueError, match="'pictures' has '7' more than once"):
        ask("answers", Asked(3))
    assert len(ask("answers", Pictures(3, same_key=True)).records) == 1 + 2 + 3


def test_too_many_bad_examples_are_refused_with_their_causes(model, processor, ask):
    mesh = sharding.make_mesh(MeshConfig(data=8))
    strict = asker(model, processor, mesh, batch_size=8, max_bad_share=0.05)
    with pytest.raises(
        ValueError, match=r"1 of 10 examples of 'pictures' could not be used \(1 broken\), .*5%"
    ):
        strict("captions")
    with pytest.raises(ValueError, match="8 devices"):
        asker(model, processor, mesh, batch_size=12)
    with pytest.raises(ValueError, match="batch_size is 0"):
        asker(model, processor, mesh, batch_size=0)


class Broken(Pictures):
    """The first 8 examples are good, all others are broken."""

    def __init__(self, size: int):
        super().__init__(size)
        self.read = 0

    def __getitem__(self, index: int) -> Example:
        self.read += 1
        if index >= 8:
            raise BadExample("broken", "broken")
        return super().__getitem__(index)


def test_too_many_bad_examples_are_refused_as_soon_as_they_are_too_many(ask):
    source = Broken(1000)
    with pytest.raises(ValueError, match="of 1000 examples of 'pictures' could not be used"):
        ask("retrieval", source)
    assert source.read < 300  # 20 % of 1000 may be broken


@pytest.mark.parametrize("name, args, settings, message", [
    ("retrieval", (), {"rerank": -1}, "rerank is -1, expected at least 0"),
    ("retrieval", (), {"prior": float("nan")}, "prior is nan, expected a number from 0 to 1"),
    ("retrieval", (), {"limit": 0}, "limit is 0, expected at least 1"),
    ("captions", (), {"limit": -1}, "limit is -1, expected at least 1"),
    ("classes", (SHAPES,), {"prior": float("inf")}, "prior is inf, expected a number from 0 to 1"),
    ("classes", (SHAPES,), {"method": "luck"}, "luck"),
    ("classes", (SHAPES[:1] * 2,), {}, "the class 'circle' is named twice"),
    ("classes", (SHAPES[:1],), {}, "is '.*', not one of the 1 classes"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_the_model_is_asked(
    ask, monkeypatch, name, args, settings, message
):
    def never(*_):
        raise AssertionError("the model was asked")

    monkeypatch.setattr(Predictor, "_run", never)
    # The tests check types at every call, and see a wrong choice before the function does.
    with pytest.raises((ValueError, TypeCheckError), match=message):
        ask(name, Pictures(), *args, **settings)


def test_a_set_of_one_image_has_predictions(ask):
    (record,) = ask("captions", Pictures(1)).records
    assert record["key"] == "picture 0"
    assert len(ask("retrieval", Pictures(1), rerank=5).records) == 1 + 2
