"""The adapters for CLIP_benchmark and lmms-eval, scored by the functions of those packages.

Each test is skipped where its package is missing; what the adapters hand over needs torch alone.
"""

import dataclasses
import importlib.util
import pathlib
import pickle
import sys
import weakref

import jax
import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest
from embedding_recall import embedding_recall
from flax import nnx
from video_files import marked, save

import mammut
from mammut.data.video import Clip, VideoTransform
from mammut.generation.search import GenerateConfig
from mammut.generation.text import generate
from mammut.testing import tiny_config, tiny_model, tiny_processor

torch = pytest.importorskip("torch", reason="the adapters speak torch, which is not installed")

from mammut.interop import clip_benchmark as adapter  # noqa: E402

# What is here is compiled more than it is run.
TEXTS = [
    "one red circle",
    "a",
    "",
    "one blue square on the left or right",
    "green triangle right",
    "yellow",
]


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def model():
    """A model whose texts differ from image to image; it knows 4 ids that no text has."""
    text = dataclasses.replace(tiny_config().text, vocab_size=64)
    model = tiny_model(dataclasses.replace(tiny_config(), text=text), seed=1)
    cross = model.text.cross_layers.attn.out.kernel
    cross[...] = 4 * cross[...]
    return model


@pytest.fixture(scope="module")
def pictures():
    """Larger than the model's images, so that they must be resized."""
    rng = np.random.default_rng(5)
    return [PIL.Image.fromarray(rng.integers(0, 256, (24, 20, 3), np.uint8)) for _ in range(11)]


@pytest.fixture(scope="module")
def adapted(model, processor):
    return adapter.ClipBenchmarkModel(model, processor, batch_size=4)


@pytest.fixture(scope="module")
def embeds(model, processor, pictures):
    """The embeddings of all pictures and texts in one batch, without the adapter."""
    graphdef, params = nnx.split(model)

    @jax.jit
    def encode(params, image, tokens, text_valid):
        model = nnx.merge(graphdef, params)
        return model.encode_image(image), model.encode_text(tokens, text_valid)

    return tuple(map(np.asarray, encode(params, **processor(images=pictures, text=TEXTS))))


# ---- CLIP_benchmark


class Pictures(torch.utils.data.Dataset):
    """What CLIP_benchmark's datasets are: a transformed picture and its class or captions."""

    def __init__(self, pictures, targets, transform):
        self.pictures, self.targets, self.transform = pictures, targets, transform

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, place):
        return self.transform(self.pictures[place]), self.targets[place]


def loader(pictures, targets, adapted, collate=None, batch_size=3):
    dataset = Pictures(pictures, targets, adapted.transform)
    return torch.utils.data.DataLoader(dataset, batch_size=batch_size, collate_fn=collate)


def with_captions(batch):
    """CLIP_benchmark's collation of captions: a tuple of lists, one an image."""
    images, captions = zip(*batch)
    return torch.utils.data.default_collate(images), captions


def test_tokens_keep_the_pads_apart_from_a_word_whose_id_is_the_pads(
    adapted, processor, monkeypatch
):
    tokens, valid = processor.encode_text(TEXTS)
    assert not valid.all()
    for pad_id in (0, int(tokens[0, 1])):  # the second is a word's, too
        monkeypatch.setattr(processor.tokenizer, "pad_id", pad_id)
        given = adapted.tokenizer(TEXTS)
        assert given.dtype == torch.int64
        np.testing.assert_array_equal(given.numpy() >= 0, valid)
        np.testing.assert_array_equal(given.numpy()[valid], tokens[valid])


def test_text_embeddings_are_the_models_whatever_the_batch(adapted, embeds):
    for rows in (1, 4, 6):  # one batch of the adapter's, filled; full; two
        got = adapted.encode_text(adapted.tokenizer(TEXTS[:rows]))
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got.numpy(), embeds[1][:rows], atol=2e-6)


def test_a_word_whose_id_is_the_pads_counts(adapted, model):
    tokens = adapted.tokenizer(TEXTS)
    tokens[:, 1] = 0
    expected = model.encode_text(
        np.where(tokens < 0, 9, tokens).astype(np.int32), tokens.numpy() >= 0
    )
    np.testing.assert_allclose(adapted.encode_text(tokens).numpy(), expected, atol=2e-6)


def test_a_lone_text_is_a_batch_of_one(adapted):
    assert torch.equal(adapted.tokenizer("one red circle"), adapted.tokenizer(["one red circle"]))


def test_image_embeddings_are_the_models_whatever_the_batch(adapted, pictures, embeds):
    images = torch.stack([adapted.transform(picture) for picture in pictures])
    for rows in (1, 4, 11):
        got = adapted.encode_image(images[:rows])
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got.numpy(), embeds[0][:rows], atol=2e-6)
    assert tuple(adapted.encode_image(images[:0]).shape) == (0, embeds[0].shape[1])


def test_batches_of_any_size_compile_once(model, processor, pictures):
    adapted = adapter.ClipBenchmarkModel(model, processor, batch_size=5)
    images = torch.stack([adapted.transform(picture) for picture in pictures])
    compiled = adapter._encode_image._cache_size()
    for rows in (2, 5, 1, 11):
        adapted.encode_image(images[:rows])
    assert adapter._encode_image._cache_size() == compiled + 1


def test_the_parameters_are_not_constants_of_the_compiled_program(
    adapted, model, processor, pictures
):
    other = adapter.ClipBenchmarkModel(tiny_model(model.config, seed=2), processor, batch_size=4)
    images = torch.stack([adapted.transform(picture) for picture in pictures[:2]])
    adapted.encode_image(images)
    compiled = adapter._encode_image._cache_size()
    assert not torch.allclose(adapted.encode_image(images), other.encode_image(images), atol=1e-2)
    assert adapter._encode_image._cache_size() == compiled


def test_transform_and_tokenizer_go_to_the_workers_of_a_loader(adapted, pictures):
    transform, tokenizer = pickle.loads(pickle.dumps((adapted.transform, adapted.tokenizer)))
    assert torch.equal(transform(pictures[0]), adapted.transform(pictures[0]))
    assert torch.equal(tokenizer(TEXTS), adapted.tokenizer(TEXTS))


def test_videos_are_refused(adapted):
    """CLIP_benchmark has no set of videos."""
    for video in ("a.mp4", Clip("a.mp4"), CLIPS[0], np.stack(CLIPS[0])):
        with pytest.raises(mammut.BadImage, match="is a video, expected a picture: CLIP_benchmark"):
            adapted.transform(video)
    with pytest.raises(ValueError, match=r"expected uint8\[B, 16, 16, 3\]"):
        adapted.encode_image(torch.zeros((2, 3, 16, 16, 3), dtype=torch.uint8))


def test_a_video_of_torch_is_one(of_three_frames):
    video, picture = torch.tensor(np.stack(CLIPS[1])), torch.tensor(CLIPS[1][0])
    found = of_three_frames(images=[video])["image"]
    np.testing.assert_array_equal(found, of_three_frames(images=[CLIPS[1]])["image"])
    assert of_three_frames(images=[picture])["image"].shape == (1, 16, 16, 3)


def test_the_switches_of_a_torch_module_are_harmless(adapted):
    assert adapted.to("cpu").eval().train().train(False) is adapted


def test_load_is_called_as_clip_benchmark_calls_its_loaders(
    tmp_path, model, processor, adapted, pictures
):
    mammut.save(tmp_path, model, processor)
    loaded, transform, tokenizer = adapter.load(
        model_name="mammut", pretrained=str(tmp_path), cache_dir=None, device="cpu"
    )
    images = torch.stack([transform(picture) for picture in pictures[:4]])
    assert torch.allclose(loaded.encode_image(images), adapted.encode_image(images), atol=2e-6)
    assert torch.equal(tokenizer(TEXTS), adapted.tokenizer(TEXTS))


@pytest.mark.parametrize(
    "spoil", [lambda x: x.float(), lambda x: x[:, :-1], lambda x: x.permute(0, 3, 1, 2)]
)
def test_images_of_another_transform_are_refused(adapted, pictures, spoil):
    images = torch.stack([adapted.transform(picture) for picture in pictures[:2]])
    with pytest.raises(
        ValueError,
        match=r"expected uint8\[B, 16, 16, 3\]: the transform that belongs to this model",
    ):
        adapted.encode_image(spoil(images))


@pytest.mark.parametrize(
    "spoil", [lambda x: x + 1000, lambda x: x - 1, lambda x: x.int(), lambda x: x[0]]
)
def test_tokens_of_another_tokenizer_are_refused(adapted, spoil):
    with pytest.raises(
        ValueError, match="-1 at pads: the tokenizer that belongs to this model makes them"
    ):
        adapted.encode_text(spoil(adapted.tokenizer(TEXTS)))


def test_a_batch_of_nothing_is_refused(model, processor):
    with pytest.raises(ValueError, match="batch_size is 0, expected at least 1"):
        adapter.ClipBenchmarkModel(model, processor, batch_size=0)


def open_clip_decode(ids) -> str:
    """Decodes as `clip_benchmark.metrics.captioning` does.

    Only open_clip's tokenizer is loaded, since open_clip needs torchvision.
    """
    spec = importlib.util.find_spec("open_clip")
    if spec is None or importlib.util.find_spec("regex") is None:
        pytest.skip("CLIP_benchmark decodes captions with open_clip, which is not installed")
    path = pathlib.Path(spec.submodule_search_locations[0]) / "tokenizer.py"
    module = sys.modules.get("_open_clip_tokenizer")
    if module is None:
        spec = importlib.util.spec_from_file_location("_open_clip_tokenizer", path)
        module = sys.modules["_open_clip_tokenizer"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return (
        module._tokenizer.decode(ids)
        .split("<end_of_text>")[0]
        .replace("<start_of_text>", "")
        .strip()
    )


def test_captions_come_back_from_clip_benchmarks_decoding(adapted, model, processor, pictures):
    images = torch.stack([adapted.transform(picture) for picture in pictures])
    captions = mammut.caption(model, processor, pictures)
    assert len(set(captions)) > 3
    assert [open_clip_decode(ids) for ids in adapted.generate(images).cpu().numpy()] == captions


def test_any_caption_comes_back_from_clip_benchmarks_decoding():
    said = [
        "A dog's T-shirt: 50 % off!",
        "zażółć gęślą jaźń 猫 🐈",
        "",
        "tab\tand  two  spaces",
        "~¡¬­®ÿĀ",
    ]
    assert [open_clip_decode(ids) for ids in adapter._spelled(said).numpy()] == said


def test_clip_benchmark_finds_the_retrieval_recall_that_metrics_finds(adapted, pictures, embeds):
    scorer = pytest.importorskip(
        "clip_benchmark.metrics.zeroshot_retrieval", reason="CLIP_benchmark is not installed"
    )
    captions = [TEXTS[:2], TEXTS[2:3], TEXTS[3:]]
    expected = embedding_recall(embeds[0][:3], embeds[1], np.array([0, 0, 1, 2, 2, 2]), ks=(1, 2))
    batches = loader(pictures[:3], captions, adapted, with_captions, batch_size=2)
    got = scorer.evaluate(
        adapted, batches, adapted.tokenizer, "cpu", amp=False, recall_k_list=[1, 2]
    )
    assert got == pytest.approx(
        {
            "image_retrieval_recall@1": expected["t2i_r1"],
            "text_retrieval_recall@1": expected["i2t_r1"],
            "image_retrieval_recall@2": expected["t2i_r2"],
            "text_retrieval_recall@2": expected["i2t_r2"],
        }
    )
    assert len(set(expected.values())) > 2  # not all 0 or 1


def test_clip_benchmark_finds_the_zero_shot_scores_that_numpy_finds(
    adapted, model, processor, pictures, embeds
):
    scorer = pytest.importorskip(
        "clip_benchmark.metrics.zeroshot_classification",
        reason="CLIP_benchmark and scikit-learn are not installed",
    )
    names, templates = (
        ["circle", "square", "triangle", "left"],
        ["one {c}", "red {c}", "{c} on the left"],
    )
    classes = []
    for name in names:
        own = model.encode_text(
            *processor.encode_text([template.format(c=name) for template in templates])
        )
        classes.append(np.asarray(own).mean(0) / np.linalg.norm(np.asarray(own).mean(0)))
    scores = embeds[0] @ np.stack(classes).T

    classifier = scorer.zero_shot_classifier(
        adapted, adapted.tokenizer, names, templates, "cpu", amp=False
    )
    single = loader(pictures, list(range(11)), adapted)
    logits, target = scorer.run_classification(adapted, classifier, single, "cpu", amp=False)
    np.testing.assert_allclose(logits.numpy(), 100 * scores, atol=5e-4)
    assert target.tolist() == list(range(11))

    # `evaluate` on one class an image needs NumPy < 2.4 (it makes a float of an array of one); on
    # several it does not.
    labels = np.random.default_rng(0).integers(0, 2, scores.shape)
    several = loader(pictures, [torch.tensor(row) for row in labels], adapted)
    got = scorer.evaluate(adapted, several, adapted.tokenizer, names, templates, "cpu", amp=False)
    precisions = []
    for score, label in zip(scores.T, labels.T):
        ranked = label[np.argsort(-score)]
        precisions.append((ranked.cumsum() / np.arange(1, 12))[ranked == 1].mean())
    assert got == pytest.approx({"mean_average_precision": np.mean(precisions)})


def test_clip_benchmark_selects_the_captions_that_numpy_selects(adapted, pictures, embeds):
    """The task of SugarCrepe: one image, its caption first, a false one second."""
    scorer = pytest.importorskip(
        "clip_benchmark.metrics.image_caption_selection", reason="CLIP_benchmark is not installed"
    )
    scores = embeds[0] @ embeds[1].T
    pairs = [[place % 6, (place + 1) % 6] for place in range(11)]
    expected = np.mean(
        [scores[place, true] >= scores[place, false] for place, (true, false) in enumerate(pairs)]
    )
    assert 0 < expected < 1
    captions = [[TEXTS[text] for text in pair] for pair in pairs]
    batches = loader(pictures, captions, adapted, with_captions)
    assert scorer.evaluate(adapted, batches, adapted.tokenizer, "cpu", amp=False)[
        "text_acc"
    ] == pytest.approx(expected)


# ---- lmms-eval


@pytest.fixture(scope="module")
def lmms():
    """The adapter's module."""
    for needed in ("lmms_eval.api.model", "lmms_eval.models.registry_v2"):
        pytest.importorskip(needed, reason="lmms-eval is not installed, or something that it needs")
    from mammut.interop import lmms_eval

    return lmms_eval


@pytest.fixture  # for each test anew: the evaluator of lmms-eval changes its tasks
def speaker(lmms, model, processor, pictures):
    """The adapter, its task known as the evaluator makes it known."""
    speaker = lmms.LmmsEvalModel(model, processor, batch_size=4)
    speaker.task_dict["drawings"] = {"test": pictures}
    return speaker


def requests(kind, contexts, seconds, visual=lambda picture: [picture]):
    """`Instance`s of lmms-eval; `seconds` are generation kwargs or continuations."""
    from lmms_eval.api.instance import Instance

    made = []
    for place, (context, second) in enumerate(zip(contexts, seconds)):
        metadata = {"task": "drawings", "doc_id": place, "repeats": 1}
        made.append(
            Instance(kind, (context, second, visual, place, "drawings", "test"), 0, metadata)
        )
    return made


def ask(speaker, contexts, kwargs, **more):
    kwargs = kwargs if isinstance(kwargs, list) else [kwargs] * len(contexts)
    return speaker.generate_until(requests("generate_until", contexts, kwargs, **more))


GREEDY = {"until": ["\n\n"], "do_sample": False}
# leave room to answer
SHORT = ["one", "a", "green", "one red", "yellow", "blue", "on", "left", "right", "red", "a"]
ASKED = [
    "one red",
    "",
    "green",
    "one blue square on",
    "yellow",
    "",
    "triangle",
    "left",
    "right",
    "red",
    "a",
]


def test_answers_are_those_of_answer_in_the_order_of_the_requests(
    speaker, model, processor, pictures
):
    expected = mammut.answer(model, processor, pictures, ASKED)
    assert len(set(expected)) > 3
    assert ask(speaker, ASKED, GREEDY) == expected


def test_requests_that_want_different_things_keep_their_order(speaker, model, processor, pictures):
    greedy = mammut.answer(model, processor, pictures[:6], ASKED[:6])
    beams = mammut.answer(model, processor, pictures[:6], ASKED[:6], num_beams=2)
    assert greedy != beams
    got = ask(speaker, ASKED[:6], [GREEDY, {"num_beams": 2}] * 3)
    assert got == [*sum(([greedy[place], beams[place + 1]] for place in (0, 2, 4)), [])]


def test_an_empty_prompt_gives_captions_whatever_is_asked(lmms, model, processor, pictures):
    speaker = lmms.LmmsEvalModel(model, processor, batch_size=4, prompt="")
    speaker.task_dict["drawings"] = {"test": pictures}
    assert ask(speaker, ["Describe this image in one sentence."] * 5, GREEDY) == mammut.caption(
        model, processor, pictures[:5]
    )


def test_a_prompt_goes_around_the_question(lmms, speaker, model, processor, pictures):
    around = lmms.LmmsEvalModel(model, processor, batch_size=4, prompt="one {} circle")
    around.task_dict["drawings"] = {"test": pictures}
    assert ask(around, ["red", "blue"], GREEDY) == ask(
        speaker, ["one red circle", "one blue circle"], GREEDY
    )


def test_an_answer_ends_before_the_first_of_its_stops(speaker, model, processor, pictures):
    whole = mammut.answer(model, processor, pictures[:1], ["one red"])[0]
    first, second = whole[3:5], whole[1:3]
    assert ask(speaker, ["one red"], {"until": first}) == [whole[: whole.index(first)].strip()]
    assert ask(speaker, ["one red"], {"until": ["", first, second]}) == [
        whole[: whole.index(second)].strip()
    ]
    assert ask(speaker, ["one red"], {"until": None}) == ask(speaker, ["one red"], {}) == [whole]


def test_max_new_tokens_keeps_so_many_of_the_answers_tokens(speaker, model, processor, pictures):
    asked = [processor.bos_id, *processor.tokenizer.encode("one red")]
    graphdef, params = nnx.split(model)
    ids = {"eos_id": processor.eos_id, "vocab_size": processor.vocab_size}

    @jax.jit
    def said(params, image, prompt):
        return generate(nnx.merge(graphdef, params), image, prompt, prompt >= 0, **ids).tokens[0, 0]

    tokens = said(
        params, processor(images=pictures[:1])["image"], np.array([asked], np.int32)
    ).tolist()[len(asked) :]
    texts = [ask(speaker, ["one red"], {"max_new_tokens": most})[0] for most in (1, 3)]
    assert texts == [processor.tokenizer.decode(tokens[:most]).strip() for most in (1, 3)]
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    ("kwargs", "config"),
    [
        ({"temperature": 0, "top_p": 0, "num_beams": 1, "do_sample": False}, GenerateConfig()),
        ({"temperature": 0.7, "do_sample": False}, GenerateConfig()),
        ({"temperature": None, "top_p": None, "num_beams": None}, GenerateConfig()),
        ({"temperature": 1, "top_p": 1}, GenerateConfig(temperature=1.0)),
        ({"do_sample": True, "top_k": 5}, GenerateConfig(temperature=1.0, top_k=5)),
        ({"temperature": 0.2, "top_p": 0.9}, GenerateConfig(temperature=0.2, top_p=0.9)),
        ({"temperature": 0, "repetition_penalty": 1.2}, GenerateConfig(repetition_penalty=1.2)),
        ({"num_beams": 4, "length_penalty": 0}, GenerateConfig(num_beams=4, length_penalty=0.0)),
    ],
)
def test_generation_kwargs_mean_what_they_mean_to_hugging_face(lmms, kwargs, config):
    assert lmms._generate_config(kwargs) == config


def test_repeats_of_one_request_are_different_samples(speaker):
    request = requests("generate_until", ["one"], [{"temperature": 1.0}])[0]
    first = speaker.generate_until([request] * 6)
    assert len(set(first)) > 2
    assert speaker.generate_until([request] * 6) == first


def test_images_are_read_a_batch_at_a_time(speaker):
    made, most = [], []

    def visual(picture):
        copy = picture.copy()
        made.append(weakref.ref(copy))
        most.append(sum(reference() is not None for reference in made))
        return [copy]

    ask(speaker, ASKED, GREEDY, visual=visual)
    # a batch of 4, while the one before may still be there
    assert len(most) == 11 and max(most) <= 2 * 4


def test_generation_kwargs_that_mean_nothing_here_are_named(speaker):
    with pytest.warns(UserWarning, match=r"\['num_beans'\] mean nothing to this model"):
        ask(speaker, ["one red"], {"num_beans": 4})


def test_likelihoods_are_the_whole_models_token_by_token(speaker, model, processor, pictures):
    contexts = ["one red", "one red", "", "one", "green", "one"]
    said = [" circle", "ri", " one blue square", "left", " triangle on the left", " red"]
    graphdef, params = nnx.split(model)
    logits_of = jax.jit(lambda params, *args: nnx.merge(graphdef, params).caption_logits(*args))
    expected, greedy = [], []
    for picture, context, text in zip(pictures, contexts, said):
        ids, prompt = (
            processor.tokenizer.encode(text),
            [processor.bos_id, *processor.tokenizer.encode(context)],
        )
        tokens = np.full((1, 12), 7, np.int32)  # what follows changes nothing
        tokens[0, : len(prompt + ids)] = prompt + ids
        logits = np.asarray(
            logits_of(params, processor(images=[picture])["image"], tokens), np.float64
        )[0]
        logits = logits[len(prompt) - 1 :][: len(ids), : processor.vocab_size]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected.append(-sum(logprobs[place, token] for place, token in enumerate(ids)))
        greedy.append(logits.argmax(-1).tolist() == ids)
    assert 0 < sum(greedy) < 6

    got = speaker.loglikelihood(requests("loglikelihood", contexts, said))
    np.testing.assert_allclose([loss for loss, _ in got], expected, atol=1e-4)
    assert [is_greedy for _, is_greedy in got] == greedy


def test_a_continuation_may_be_a_function_of_the_document(speaker, pictures):
    given = requests(
        "loglikelihood", ["one"], [lambda picture: " red" if picture is pictures[0] else " blue"]
    )
    assert speaker.loglikelihood(given) == speaker.loglikelihood(
        requests("loglikelihood", ["one"], [" red"])
    )


def test_no_requests_give_no_results(speaker):
    assert speaker.generate_until([]) == [] and speaker.loglikelihood([]) == []


@pytest.mark.parametrize(
    ("visual", "count"),
    [(lambda _: None, 0), (lambda _: [], 0), (lambda picture: [picture, picture], 2)],
)
def test_a_question_without_exactly_one_image_is_refused(speaker, visual, count):
    message = f"document 0 of task 'drawings' comes with {count} images, expected one"
    with pytest.raises(ValueError, match=message):
        ask(speaker, ["one red"], GREEDY, visual=visual)
    with pytest.raises(ValueError, match=message):
        speaker.loglikelihood(requests("loglikelihood", ["one"], [" red"], visual=visual))


def test_a_likelihood_without_an_image_is_refused(speaker):
    request = requests("loglikelihood", [""], ["red"])[0]
    request.arguments = ("", "red")  # as for the metric acc_mutual_info
    with pytest.raises(
        ValueError, match="document 0 of task 'drawings' comes without an image, expected one"
    ):
        speaker.loglikelihood([request])


def test_texts_that_do_not_fit_are_refused(speaker):
    long = "one red circle on the left or right " * 3
    with pytest.raises(ValueError, match="tokens with the start, expected fewer than the 12 for"):
        ask(speaker, [long], GREEDY)
    for text in ("", long):
        message = (
            f"a prompt of 2 tokens and a continuation {text!r:.60} of .* "
            "together no more than .*max_length 12"
        )
        with pytest.raises(ValueError, match=message):
            speaker.loglikelihood(requests("loglikelihood", ["one"], [text]))


def test_a_conversation_is_refused(speaker):
    with pytest.raises(NotImplementedError, match="one question about one image"):
        speaker.generate_until_multi_round([])


def test_lmms_evals_register_makes_the_model_of_a_folder(
    lmms, tmp_path, model, processor, pictures
):
    from lmms_eval import models

    mammut.save(tmp_path, model, processor)
    models.MODEL_REGISTRY_V2.register_manifest(lmms.manifest())
    given = {"batch_size": 4, "max_batch_size": None, "device": None}
    made = models.get_model("mammut").create_from_arg_string(
        f"pretrained={tmp_path},prompt=", given
    )
    made.task_dict["drawings"] = {"test": pictures}
    assert ask(made, ["What is this?"] * 3, GREEDY) == mammut.caption(
        model, processor, pictures[:3]
    )


@pytest.mark.parametrize(
    ("args", "given", "message"),
    [
        ("prompt=x", {}, r"model_args name \['prompt'\], expected pretrained"),
        (
            "pretrained=x,promt=y",
            {},
            r"model_args name \['pretrained', 'promt'\], expected pretrained",
        ),
        ("pretrained=x", {"batch_size": "auto"}, "batch_size is 'auto', expected a number"),
    ],
)
def test_other_model_arguments_are_refused(lmms, args, given, message):
    with pytest.raises(ValueError, match=message):
        lmms.LmmsEvalModel.create_from_arg_string(args, given)


@pytest.fixture(scope="module")
def make_task(pictures):
    """Makes a task of lmms-eval's own kind from a config, about the pictures."""
    before = PIL.ImageFile.LOAD_TRUNCATED_IMAGES
    tasks = pytest.importorskip(
        "lmms_eval.api.task", reason="lmms-eval's tasks need datasets and accelerate"
    )
    # they let half pictures through, in the whole process
    PIL.ImageFile.LOAD_TRUNCATED_IMAGES = before
    import datasets

    class Drawings(tasks.ConfigurableTask):
        def download(self, dataset_kwargs=None):
            questions, choices = SHORT, ["circle", "green triangle", "left"]
            rows = [
                {
                    "image": picture,
                    "question": question,
                    "choices": choices,
                    "gold": self.config.metadata[place],
                }
                for place, (picture, question) in enumerate(zip(pictures, questions))
            ]
            self.dataset = self.dataset_no_image = datasets.DatasetDict(
                test=datasets.Dataset.from_list(rows)
            )

    def make(gold, **config):
        return Drawings(
            config={
                "task": "drawings",
                "test_split": "test",
                "doc_to_visual": lambda document: [document["image"]],
                "doc_to_text": "question",
                "doc_to_target": "gold",
                "metadata": gold,
                **config,
            }
        )

    return make


def test_the_evaluator_scores_the_answers_of_the_model(
    speaker, make_task, model, processor, pictures
):
    """`simple_evaluate` from documents to score: every other gold answer is the model's own."""
    evaluator = pytest.importorskip(
        "lmms_eval.evaluator", reason="lmms-eval's evaluator is not installed"
    )
    answers = mammut.answer(model, processor, pictures, SHORT)
    gold = [answer if place % 2 else f"not {answer}" for place, answer in enumerate(answers)]
    task = make_task(gold, output_type="generate_until", metric_list=[{"metric": "exact_match"}])
    scores = evaluator.simple_evaluate(
        speaker, tasks=[task], task_manager=object(), log_samples=False
    )["results"]
    assert scores["drawings"]["exact_match,none"] == pytest.approx(5 / 11)


def test_multiple_choice_takes_the_likeliest_choice(speaker, make_task, model, processor, pictures):
    """The task's own requests and its own scorer, which takes the choice with the smallest number.

    The evaluator between them (0.7.2 and 0.7.3) makes a str of every pair and fails for any model.
    """
    config = {
        "output_type": "multiple_choice",
        "metric_list": [{"metric": "acc"}],
        "doc_to_choice": "choices",
    }
    task = make_task([0] * 11, **config)
    task.set_config("num_fewshot", 0)
    task.build_all_requests()
    speaker.task_dict["drawings"] = task.dataset
    results = speaker.loglikelihood(task.instances)
    assert len(results) == 33

    graphdef, params = nnx.split(model)
    logits_of = jax.jit(lambda params, *args: nnx.merge(graphdef, params).caption_logits(*args))
    right = 0
    for place, (picture, question) in enumerate(zip(pictures, SHORT)):
        prompt, scores = [processor.bos_id, *processor.tokenizer.encode(question)], []
        for choice in ("circle", "green triangle", "left"):
            ids = processor.tokenizer.encode(choice)
            tokens = np.zeros((1, 12), np.int32)
            tokens[0, : len(prompt + ids)] = prompt + ids
            logits = logits_of(params, processor(images=[picture])["image"], tokens)[
                0, :, : processor.vocab_size
            ]
            logprobs = np.asarray(jax.nn.log_softmax(logits))[len(prompt) - 1 :]
            scores.append(sum(logprobs[at, token] for at, token in enumerate(ids)))
        document = task.dataset["test"][place]
        acc = task.process_results(document, results[3 * place : 3 * place + 3])["acc"]
        assert acc == (np.argmax(scores) == 0)
        right += acc
    assert 0 < right < 11


# ---- lmms-eval, videos

CLIPS = [[marked(number) for number in range(start, start + 6)] for start in (0, 90, 170)]
QUESTIONS = ["one red", "", "green"]
ONE_VIDEO = {"task_type": "video", "sample_frames": 32}


@pytest.fixture(scope="module")
def watcher(lmms, model, processor, tmp_path_factory):
    """The adapter, reading 3 frames; its task's documents are paths of clips."""
    pytest.importorskip("av", reason="PyAV, which writes and reads the clips, is not installed")
    folder = tmp_path_factory.mktemp("clips")
    watcher = lmms.LmmsEvalModel(model, processor, batch_size=4, frames=3)
    names = ["a.mp4", "b.mkv", "c.avi"]
    paths = [save(folder, name, frames=clip) for name, clip in zip(names, CLIPS, strict=True)]
    watcher.task_dict["drawings"] = {"test": [str(path) for path in paths]}
    return watcher


@pytest.fixture(scope="module")
def of_three_frames(model, processor):
    """A processor of videos of three frames."""
    video = VideoTransform(3)
    return mammut.Processor(processor.tokenizer, processor.image, processor.max_length, video=video)


def test_videos_are_answered_as_by_answer(watcher, model, of_three_frames):
    paths = watcher.task_dict["drawings"]["test"]
    expected = mammut.answer(model, of_three_frames, paths, QUESTIONS)
    assert len(set(expected)) == 3
    for visual in (lambda path: [path], lambda path: path, lambda path: [Clip(path)]):
        assert ask(watcher, QUESTIONS, GREEDY, visual=visual) == expected


def frames_of(path):
    """The clip of a path, as frames that Pillow holds."""
    return [PIL.Image.fromarray(frame) for frame in CLIPS["abc".index(pathlib.Path(path).stem)]]


def test_frames_are_one_video_where_the_task_says_so(watcher, model, of_three_frames):
    clips = [frames_of(path) for path in watcher.task_dict["drawings"]["test"]]
    expected = mammut.answer(model, of_three_frames, clips, QUESTIONS)
    nested = (lambda path: [frames_of(path)], lambda path: [np.stack(frames_of(path))])
    for visual in nested:
        assert ask(watcher, QUESTIONS, GREEDY, visual=visual) == expected
    given = requests("generate_until", QUESTIONS, [GREEDY] * 3, frames_of)
    for missing in ({}, {"task_type": "video"}, ONE_VIDEO | {"task_type": "image"}):
        given[0].metadata = {"task": "drawings", "doc_id": 0, "repeats": 1, **missing}
        with pytest.raises(ValueError, match="comes with 6 images, expected one, or in the task's"):
            watcher.generate_until(given[:1])
    for request in given:
        request.metadata |= ONE_VIDEO
    assert watcher.generate_until(given) == expected


def test_the_frames_are_the_processors_where_no_number_is_given(lmms, model, of_three_frames):
    by_processor = lmms.LmmsEvalModel(model, of_three_frames, batch_size=4)
    by_processor.task_dict["drawings"] = {"test": CLIPS}
    expected = mammut.answer(model, of_three_frames, CLIPS, QUESTIONS)
    assert ask(by_processor, QUESTIONS, GREEDY) == expected


def test_a_gif_is_a_video_by_its_path_and_a_picture_in_a_data_set(
    watcher, model, processor, of_three_frames, tmp_path
):
    path = tmp_path / "a.gif"
    first, *others = frames_of("a")
    first.save(path, save_all=True, append_images=others)
    moving = ask(watcher, QUESTIONS, GREEDY, visual=lambda _: [str(path)])
    assert moving == mammut.answer(model, of_three_frames, [path] * 3, QUESTIONS)
    still = ask(watcher, QUESTIONS, GREEDY, visual=lambda _: [PIL.Image.open(path)])
    assert still == mammut.answer(model, processor, [path] * 3, QUESTIONS) != moving


def test_tasks_of_videos_and_of_pictures_are_scored_together(
    watcher, speaker, model, of_three_frames, pictures
):
    """lmms-eval hands over the requests of all tasks at once."""
    watcher.task_dict["photos"] = {"test": pictures}

    def mixed(kind, seconds):
        """A photo after each video."""
        videos, photos = (requests(kind, QUESTIONS, seconds) for _ in range(2))
        for request in photos:
            request.arguments = (*request.args[:4], "photos", "test")
        return [request for pair in zip(videos, photos, strict=True) for request in pair]

    found = watcher.generate_until(mixed("generate_until", [GREEDY] * 3))
    paths = watcher.task_dict["drawings"]["test"]
    assert found[::2] == mammut.answer(model, of_three_frames, paths, QUESTIONS)
    assert found[1::2] == ask(speaker, QUESTIONS, GREEDY) != found[::2]

    said = [" circle", " one blue square", "left"]
    found = watcher.loglikelihood(mixed("loglikelihood", said))
    assert found[1::2] == speaker.loglikelihood(requests("loglikelihood", QUESTIONS, said))
    tokenizer = of_three_frames.tokenizer
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in QUESTIONS]
    tokens = np.full((3, 12), 7, np.int32)  # what follows changes nothing
    for row, (prompt, text) in enumerate(zip(prompts, said, strict=True)):
        ids = prompt + tokenizer.encode(text)
        tokens[row, : len(ids)] = ids
    graphdef, params = nnx.split(model)
    logits_of = jax.jit(lambda params, *args: nnx.merge(graphdef, params).caption_logits(*args))
    logits = logits_of(params, of_three_frames(images=paths)["image"], tokens)
    logprobs = np.asarray(jax.nn.log_softmax(logits[..., : tokenizer.vocab_size]))
    for row, (prompt, text) in enumerate(zip(prompts, said, strict=True)):
        ids = tokenizer.encode(text)
        own = logprobs[row, np.arange(len(ids)) + len(prompt) - 1, ids]
        assert found[2 * row][0] == pytest.approx(-own.sum(), abs=1e-4)


def test_a_task_of_videos_and_pictures_is_refused(watcher, pictures):
    paths = watcher.task_dict["drawings"]["test"]
    for first, second, own in ((paths[0], pictures[0], "pict"), (pictures[0], paths[0], "vid")):
        visual = lambda path: [first if path == paths[0] else second]  # noqa: B023, E731
        with pytest.raises(ValueError, match=f"document 1 of task 'drawings' comes with a {own}"):
            ask(watcher, QUESTIONS, GREEDY, visual=visual)
        with pytest.raises(ValueError, match="expected videos alone or pictures alone"):
            watcher.loglikelihood(requests("loglikelihood", QUESTIONS, [" red"] * 3, visual=visual))


def test_a_video_that_cannot_be_read_is_named(watcher, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"\0" * 64)
    with pytest.raises(mammut.BadVideo, match="video .*a.mp4 is"):
        ask(watcher, QUESTIONS, GREEDY, visual=lambda _: [str(path)])
    with pytest.raises(mammut.BadImage, match="image is of type dict, expected"):
        ask(watcher, QUESTIONS, GREEDY, visual=lambda _: [{"video_path": str(path)}])


def test_the_number_of_frames_is_a_model_argument(
    lmms, tmp_path, model, processor, of_three_frames
):
    mammut.save(tmp_path, model, processor)
    make = lmms.LmmsEvalModel.create_from_arg_string
    made = make(f"pretrained={tmp_path},frames=3", {"batch_size": 4})
    made.task_dict["drawings"] = {"test": CLIPS}
    expected = mammut.answer(model, of_three_frames, CLIPS, QUESTIONS)
    assert ask(made, QUESTIONS, GREEDY) == expected
    with pytest.raises(ValueError, match="frames is 0, expected a whole number from 1"):
        make(f"pretrained={tmp_path},frames=0")
