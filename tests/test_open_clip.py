"""Models of open_clip: the same numbers as the original, in and out; and what is refused, by name.

Numbers are those of PyTorch models on random weights (`shared/fixtures/open_clip`), never our own.
"""

import copy
import dataclasses
import importlib.util
import json
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mammut import presets
from mammut.config import LossConfig
from mammut.generate import generate
from mammut.interop import open_clip
from mammut.interop.open_clip_config import OPENMAMMUT_SIZES
from mammut.interop.rules import LazyTensors, OpenedModel, model_specs
from mammut.model import MaMMUT
from mammut.processor import ImageTransform, Processor
from mammut.search import GenerateConfig
from mammut.tasks import ImageTextTask
from mammut.tensor_files import CheckpointError, TensorSpec, open_tensors
from mammut.testing import tiny_model, tiny_processor
from mammut.tokenizer import MissingTokenizer

FIXTURES = "mammut_v1_mlp", "mammut2_classic", "mammut2_modern", "coca"
VISION = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "output_tokens": True}
MAMMUT_VISION = VISION | {"pool_type": "avg", "final_ln_after_pool": True}
TEXT = {"context_length": 12, "vocab_size": 60, "width": 24, "heads": 3, "layers": 4}
MODERN = TEXT | {"text_arch": "modern", "heads": 2, "cross_attn_ratio": 2, "tokenizer_type": "tiktoken"}
FORK_TEXT = TEXT | {"vocab_size": 49_408, "cross_attn_ratio": 2, "does_full_decoding": True}
COCA = {
    "embed_dim": 24,
    "vision_cfg": VISION | {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 3},
    "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
    "multimodal_cfg": TEXT | {"layers": 2},
}
CONFIGS = {
    "fork": {"embed_dim": 24, "vision_cfg": MAMMUT_VISION, "text_cfg": FORK_TEXT},
    "fork without MLPs": {"embed_dim": 24, "vision_cfg": MAMMUT_VISION, "text_cfg": FORK_TEXT | {"has_mlp": False}},
    "mammut": {
        "embed_dim": 24,
        "vision_cfg": MAMMUT_VISION | {"pool_type": "avg_all"},
        "multimodal_cfg": TEXT | {"pool_type": "avg_all", "use_pad_mask": False},
    },
    "mammut2": {
        "embed_dim": 20,
        "vision_cfg": MAMMUT_VISION | {"no_ln_pre": True, "pool_type": "tok", "mlp_ratio": 2.6667},
        "multimodal_cfg": TEXT | {"cross_attn_ratio": 2, "proj_type": "linear"},
        "quick_gelu": True,
    },
    "modern": {
        "embed_dim": 20,
        "vision_cfg": MAMMUT_VISION | {"norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}},
        "multimodal_cfg": MODERN | {"qk_norm": True, "attn_gated": True, "proj_type": "linear", "pool_type": "eos"},
    },
    "modern with LayerNorms": {
        "embed_dim": 24,
        "vision_cfg": MAMMUT_VISION,
        "multimodal_cfg": MODERN
        | {"norm_type": "layernorm", "attention_bias": True, "mlp_bias": True, "mlp_type": "mlp", "tie_lm_head": True},
    },
    "coca": COCA,
    "coca as wide as its images": {**COCA, "vision_cfg": COCA["vision_cfg"] | {"width": 24, "head_width": 8}},
}


def fixture_config(name: str, fixture: dict) -> dict:
    """The `model_cfg` of a fixture, some of which give what was built in other words."""
    if "config" in fixture:
        return fixture["config"]
    vision, (vocab_size, width) = dict(fixture["vision"]), fixture["shapes"]["text.token_embedding.weight"]
    vision["head_width"] = vision["width"] // vision.pop("heads")
    text = {"width": width, "heads": 4, "layers": 4, "cross_attn_ratio": 2, "vocab_size": vocab_size}
    if name == "mammut2_modern":
        text |= {"text_arch": "modern", "context_length": 24, "qk_norm": True, "attn_gated": True}
    return {"embed_dim": width, "vision_cfg": vision, "multimodal_cfg": text}


def write_folder(folder: pathlib.Path, model_cfg: dict, arrays: dict, **preprocess_cfg) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays, folder / "open_clip_model.safetensors")
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def random_arrays(model_cfg: dict, dtype=np.float32) -> dict[str, np.ndarray]:
    """Tensors of the right names and shapes, all numbers different."""
    config, names = open_clip.model_config(model_cfg, None, "it"), {"logit_scale"}
    names |= {"text.lm_head", "text.lm_head.weight"} if "text_cfg" not in model_cfg else set()
    rules = open_clip.table(config, dict.fromkeys(names, TensorSpec((), np.dtype("float32"))))
    specs = rules.to_theirs(LazyTensors(model_specs(config), lambda name: None)).specs
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=spec.shape).astype(dtype) for name, spec in specs.items()}
    if config.text.tie_embeddings:
        arrays["text.lm_head.weight"] = arrays["text.token_embedding.weight"]
    return arrays


def model_of(opened: OpenedModel) -> MaMMUT:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: MaMMUT(opened.config, rngs=nnx.Rngs(0))))

    def read(path, leaf):
        return jnp.asarray(opened.tensors.read(".".join(entry.key for entry in path)))

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(read, nnx.to_pure_dict(state)))


@pytest.fixture(scope="module", params=FIXTURES)
def reference(request, shared, tmp_path_factory, quick_compilation):
    """A PyTorch model's inputs and outputs, and the model opened from a folder as on the hub."""
    folder = shared / "fixtures" / "open_clip"
    spec = importlib.util.spec_from_file_location("random_weights", shared / "fixtures" / "random_weights.py")
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    fixture = json.loads((folder / f"{request.param}.json").read_text())
    arrays = weights.random_state_dict(fixture["shapes"], fixture["weights_seed"])
    arrays = {name: np.array(array) for name, array in arrays.items()}
    path = write_folder(tmp_path_factory.mktemp(request.param), fixture_config(request.param, fixture), arrays)
    opened = open_clip.open_model(path)
    with jax.default_matmul_precision("highest"):
        yield fixture, load_file(folder / f"{request.param}.safetensors"), opened, model_of(opened), arrays


def batch_of(fixture: dict, outputs: dict) -> dict:
    image, tokens = jnp.asarray(outputs["images"].transpose(0, 2, 3, 1)), jnp.asarray(outputs["text"])
    return {"image": image, "tokens": tokens, "text_valid": tokens != fixture.get("pad_id", 0)}


def test_embeddings_and_caption_logits_are_those_of_pytorch(reference):
    fixture, outputs, opened, model, _ = reference
    batch = batch_of(fixture, outputs)
    length = outputs["caption_logits_argmax"].shape[1]

    @nnx.jit
    def forward(model, image, tokens, text_valid, text_mask):
        logits = model.caption_logits(image, tokens[:, :length])
        embeds = [model.encode_text(tokens, valid) for valid in (text_valid, text_mask)]
        return model.encode_image(image), *embeds, logits

    text_mask = jnp.asarray(outputs["text_valid"] > 0) if "text_valid" in outputs else batch["text_valid"]
    image_embed, text_embed, text_embed_mask, logits = forward(model, *batch.values(), text_mask)
    np.testing.assert_allclose(image_embed, outputs["image_embed"], atol=1e-5)
    expected = outputs["text_embed"] if "text_embed" in outputs else outputs["text_embed_padvalue"]
    np.testing.assert_allclose(text_embed, expected, atol=1e-5)
    np.testing.assert_allclose(text_embed_mask, outputs.get("text_embed_mask", expected), atol=1e-5)
    np.testing.assert_allclose(logits[..., outputs["vocab_subset"]], outputs["caption_logits_subset"], atol=1e-4)
    np.testing.assert_allclose(jax.nn.logsumexp(logits, -1), outputs["caption_logits_logsumexp"], atol=1e-4)
    np.testing.assert_array_equal(logits.argmax(-1), outputs["caption_logits_argmax"])


def test_losses_and_gradients_are_those_of_pytorch(reference):
    fixture, outputs, opened, model, arrays = reference
    if "losses" not in fixture:
        pytest.skip("the fixture has no losses")
    batch = batch_of(fixture, outputs)
    task = ImageTextTask(LossConfig(caption_weight=2.0))

    @nnx.jit
    def step(model, batch):
        return nnx.value_and_grad(lambda m: task.loss(m, batch, jax.random.key(0)), has_aux=True)(model)

    from_processor = jnp.asarray(opened.processor(text=fixture["captions"])["text_valid"])  # knows "!" from a pad
    for text_valid in (batch["text_valid"], from_processor):
        (_, metrics), gradients = step(model, batch | {"text_valid": text_valid})
        assert metrics["loss_contrastive"] == pytest.approx(fixture["losses"]["contrastive_loss"], rel=1e-5)
        assert 2 * metrics["loss_caption"] == pytest.approx(fixture["losses"]["caption_loss"], rel=1e-5)
    flat = {".".join(path): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(nnx.state(gradients))}
    ours = LazyTensors(opened.tensors.specs, flat.__getitem__)
    theirs = open_clip.table(opened.config, open_specs(arrays)).to_theirs(ours)
    if expected := fixture.get("grad_norms"):
        norms = {name: np.linalg.norm(theirs.read(name).astype(np.float64)) for name in theirs.specs}
        assert norms == pytest.approx(expected, rel=1e-3)


def test_greedy_captions_are_those_of_pytorch(reference):
    _, outputs, opened, model, _ = reference
    if "gen_greedy" not in outputs:
        pytest.skip("the fixture has no captions")
    expected = outputs["gen_greedy"][:, :-1]  # the last is the end, forced
    image = jnp.asarray(outputs["images"].transpose(0, 2, 3, 1))
    prompt = jnp.full((len(image), 1), opened.processor.bos_id)
    config = GenerateConfig(max_new_tokens=expected.shape[1] - 1)

    @nnx.jit
    def greedy(model, image):
        return generate(model, image, prompt, prompt > 0, config, eos_id=opened.processor.eos_id).tokens[:, 0]

    np.testing.assert_array_equal(greedy(model, image), expected)


def test_what_was_read_is_written_back_bit_for_bit(reference, tmp_path):
    _, _, opened, _, arrays = reference
    open_clip.save(tmp_path, opened)
    written = load_file(tmp_path / "open_clip_model.safetensors")
    assert written.keys() == arrays.keys()
    for name, array in arrays.items():
        assert written[name].dtype == array.dtype and written[name].tobytes() == array.tobytes(), name
    again = open_clip.open_model(tmp_path)
    assert again.config == opened.config
    assert type(again.processor.tokenizer) is type(opened.processor.tokenizer)


def open_specs(arrays: dict) -> dict[str, TensorSpec]:
    return {name: TensorSpec(array.shape, array.dtype) for name, array in arrays.items()}


@pytest.mark.parametrize("size", OPENMAMMUT_SIZES)
def test_every_tensor_of_every_openmammut_size_has_its_place(size, shared, tmp_path):
    """The file has its header and no numbers: a hole of up to 4.7 GB. No config is beside it."""
    manifest = json.loads((shared / "fixtures" / "open_clip" / "manifests" / f"mammut_{size}.json").read_text())
    shapes = manifest.get("shapes", manifest)
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path = tmp_path / "epoch_latest.safetensors"
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    opened = open_clip.open_model(path)
    theirs = open_clip.table(opened.config, open_tensors(path).specs).to_theirs(opened.tensors)
    assert {name: list(spec.shape) for name, spec in theirs.specs.items()} == shapes
    assert opened.config.vision.width // opened.config.vision.num_heads == (80 if "H" in size else 64)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_comes_back_as_it_was(name, tmp_path):
    """theirs -> ours -> theirs, bit for bit, and the config too."""
    model_cfg, arrays = CONFIGS[name], random_arrays(CONFIGS[name])
    opened = open_clip.open_model(write_folder(tmp_path / "in", model_cfg, arrays, size=16, mean=0.4, fill_color=7))
    open_clip.save(tmp_path / "out", opened)
    written = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    assert written.keys() == arrays.keys()
    for key, array in arrays.items():
        assert written[key].tobytes() == array.tobytes(), key
    again = open_clip.open_model(tmp_path / "out")
    assert again.config == opened.config
    assert again.processor.image == opened.processor.image
    assert again.config.vision.image_mean == (0.4, 0.4, 0.4)


def test_our_own_numbers_come_back_as_they_were_also_in_bfloat16(tmp_path):
    config = open_clip.model_config(CONFIGS["mammut2"], None, "it")
    model = tiny_model(dataclasses.replace(config, param_dtype="bfloat16"))
    arrays = {".".join(path): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(nnx.state(model))}
    opened = OpenedModel(model.config, LazyTensors(open_specs(arrays), arrays.__getitem__), tiny_processor(), "it")
    open_clip.save(tmp_path, opened)
    assert {str(spec.dtype) for spec in open_tensors(tmp_path / "open_clip_model.safetensors").specs.values()} == {
        "bfloat16",
        "float32",
    }
    again = open_clip.open_model(tmp_path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(again.tensors.read(name), array.astype(np.float32), err_msg=name)
    assert float(arrays["logit_bias"]) != 0
    text = ["a dog", "two dogs"]
    np.testing.assert_array_equal(again.processor(text=text)["tokens"], opened.processor(text=text)["tokens"])


def test_a_coca_of_ours_gives_the_same_in_open_clip(tmp_path):
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("open_clip", exc_type=ImportError)
    config = open_clip.model_config({**COCA, "text_cfg": COCA["text_cfg"] | {"vocab_size": 49_408}}, None, "it")
    model = tiny_model(config)
    arrays = {".".join(path): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(nnx.state(model))}
    arrays["logit_bias"] = np.float32(0)
    processor = Processor(MissingTokenizer((1, 2, 0), 60, "nothing"), ImageTransform(16), 12)
    opened = OpenedModel(config, LazyTensors(open_specs(arrays), arrays.__getitem__), processor, "it")
    open_clip.save(tmp_path, opened)
    original = theirs.create_model(f"local-dir:{tmp_path}").eval()
    rng = np.random.default_rng(0)
    image = rng.normal(size=(3, 16, 16, 3)).astype(np.float32)
    tokens = rng.integers(1, 49_408, (3, 12)).astype(np.int32)
    tokens[0, 7:], tokens[1, 4] = 0, 0
    with torch.no_grad():
        out = original(torch.from_numpy(image).permute(0, 3, 1, 2), torch.from_numpy(tokens).long())
    with jax.default_matmul_precision("highest"):
        two = model.two_pass(jnp.asarray(image), jnp.asarray(tokens), jnp.ones(tokens.shape, bool))
        logits = model.text.logits(two.features)
    np.testing.assert_allclose(two.image_embed, out["image_features"], atol=1e-5)
    np.testing.assert_allclose(two.text_embed, out["text_features"], atol=1e-5)
    np.testing.assert_allclose(logits[:, :-1], out["logits"], atol=1e-5)
    assert float(out["logit_scale"]) == pytest.approx(math.exp(arrays["logit_scale"]), rel=1e-6)


def test_a_training_checkpoint_is_read_without_running_it(tmp_path):
    torch = pytest.importorskip("torch")
    arrays = random_arrays(CONFIGS["mammut2"])
    folder = write_folder(tmp_path / "hub", CONFIGS["mammut2"], arrays)
    expected = open_clip.open_model(folder).tensors
    (folder / "open_clip_model.safetensors").unlink()
    state = {f"module.{name}": torch.from_numpy(array) for name, array in arrays.items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"state": {}}}, folder / "epoch_3.pt")
    for path in (folder, folder / "epoch_3.pt"):
        tensors = open_clip.open_model(path).tensors
        for name in expected.specs:
            np.testing.assert_array_equal(tensors.read(name), expected.read(name))

    class Trap:
        def __reduce__(self):
            return print, ("it ran",)

    torch.save({"state_dict": state, "trap": Trap()}, folder / "epoch_3.pt")
    with pytest.raises(CheckpointError, match="print"):
        open_clip.open_model(folder)


def test_safetensors_are_taken_before_a_pickle(tmp_path):
    folder = write_folder(tmp_path, CONFIGS["mammut2"], random_arrays(CONFIGS["mammut2"]))
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"not even a pickle")
    assert open_clip.open_model(folder).notes == ("logit_bias is 0.0: the model was trained without",)


def test_a_folder_with_two_files_of_weights_wants_to_be_told_which(tmp_path):
    folder = write_folder(tmp_path, CONFIGS["mammut2"], random_arrays(CONFIGS["mammut2"]))
    shutil.copy(folder / "open_clip_model.safetensors", folder / "a.safetensors")
    (folder / "open_clip_model.safetensors").rename(folder / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"2 files of weights, a\.safetensors, b\.safetensors"):
        open_clip.open_model(folder)
    assert open_clip.open_model(folder / "b.safetensors").config.embed_dim == 20


def test_scalars_of_the_loss_may_have_an_axis_and_a_bias(tmp_path):
    arrays = random_arrays(CONFIGS["mammut2"])
    arrays |= {"logit_scale": np.float32([2.5]), "logit_bias": np.float32([-10.5])}
    opened = open_clip.open_model(write_folder(tmp_path, CONFIGS["mammut2"], arrays))
    assert opened.tensors.read("logit_scale").shape == opened.tensors.read("logit_bias").shape == ()
    assert opened.tensors.read("logit_scale") == 2.5 and opened.tensors.read("logit_bias") == -10.5
    assert not opened.notes
    open_clip.save(tmp_path / "out", opened)
    assert load_file(tmp_path / "out" / "open_clip_model.safetensors")["logit_bias"] == np.float32(-10.5)
    config = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert config["model_cfg"]["init_logit_bias"] == -10.5  # without it open_clip's model has no place for the tensor


def test_all_that_does_not_fit_the_config_is_named_at_once(tmp_path):
    arrays = random_arrays(CONFIGS["mammut2"])
    arrays["text.lm_haed"] = arrays.pop("text.resblocks.2.ln_1.bias")
    arrays["visual.proj"] = arrays["visual.proj"].T.copy()
    arrays["text.ln_final.weight"] = arrays["text.ln_final.weight"].astype(np.int32)
    with pytest.raises(CheckpointError) as error:
        open_clip.open_model(write_folder(tmp_path, CONFIGS["mammut2"], arrays))
    for problem in (
        "open_clip_model.safetensors does not fit its config",
        "text.resblocks.2.ln_1.bias is missing",
        "text.lm_haed is not a tensor of this model",
        "visual.proj is [20, 32], expected [32, 20]",
        "text.ln_final.weight holds int32, expected floats",
    ):
        assert problem in str(error.value)


def changed(model_cfg: dict, path: str, value) -> dict:
    model_cfg = copy.deepcopy(model_cfg)
    *parents, key = path.split(".")
    place = model_cfg
    for parent in parents:
        place = place[parent]
    place[key] = value
    return model_cfg


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("fork", "text_cfg.does_full_decoding", False),
        ("fork", "text_cfg.vocab_size", 60),
        ("fork", "text_cfg.ls_init_value", 1e-4),
        ("fork", "text_cfg.hf_model_name", "roberta-base"),
        ("fork", "vision_cfg.timm_model_name", "vit_base_patch16_224"),
        ("fork", "vision_cfg.layers", [3, 4, 6, 3]),
        ("fork", "vision_cfg.image_size", [224, 336]),
        ("fork", "vision_cfg.width", 10**9),
        ("fork", "vision_cfg.head_width", 12),
        ("fork", "embed_dim", 20),
        ("mammut2", "multimodal_cfg.layers", 10**9),
        ("mammut2", "multimodal_cfg.vocab_size", 10**12),
        ("mammut2", "multimodal_cfg.context_length", 10**9),
        ("mammut2", "multimodal_cfg.cross_attn_ratio", 3),
        ("mammut2", "multimodal_cfg.heads", 5),
        ("mammut2", "multimodal_cfg.pool_type", "map"),
        ("mammut2", "multimodal_cfg.mlp_ratio", float("nan")),
        ("mammut2", "vision_cfg.pool_type", "none"),
        ("mammut2", "vision_cfg.attentional_pool", True),
        ("mammut2", "vision_cfg.pos_embed_type", "sin_cos_2d"),
        ("mammut2", "vision_cfg.norm_kwargs", {"eps": 1e-6, "affine": False}),
        ("mammut2", "vision_cfg.act_kwargs", {"approximate": "tanh"}),  # together with quick_gelu
        ("modern", "multimodal_cfg.value_residual", True),
        ("modern", "multimodal_cfg.norm_placement", "sandwich"),
        ("modern", "multimodal_cfg.reg_tokens", 4),
        ("modern", "multimodal_cfg.pre_norm", True),
        ("modern", "multimodal_cfg.gate_bias", True),
        ("modern", "multimodal_cfg.pool_type", "map"),
        ("modern", "multimodal_cfg.pos_embed", "none"),
        ("modern", "multimodal_cfg.proj_bias", True),
        ("modern", "multimodal_cfg.text_arch", "postmodern"),
        ("coca", "text_cfg.embed_cls", False),
        ("coca", "text_cfg.correct_cls_mask", True),
        ("coca", "text_cfg.mlp_ratio", 2),
        ("coca", "multimodal_cfg.heads", 6),
        ("coca", "multimodal_cfg.context_length", 8),
        ("coca", "vision_cfg.attentional_pool", "parallel"),
        ("coca", "quick_gelu", "yes"),
        ("coca", "text_cfg", 7),
        ("coca", "vision_cfg", None),
        ("coca", "audio_cfg", {}),
    ],
)
def test_a_model_that_mammut_does_not_have_is_refused_by_the_key(name, key, value):
    with pytest.raises(CheckpointError) as error:
        open_clip.model_config(changed(CONFIGS[name], key, value), None, "folder/open_clip_config.json")
    message = str(error.value)
    assert message.startswith("folder/open_clip_config.json tells of a model that mammut does not have: ")
    assert key.rpartition(".")[2] in message and "\n" not in message and len(message) < 500


def test_all_keys_that_cannot_be_are_named_at_once():
    model_cfg = changed(CONFIGS["fork"], "text_cfg.tempo", 1)
    model_cfg = changed(model_cfg, "vision_cfg.qk_norm", True)
    with pytest.raises(CheckpointError) as error:
        open_clip.model_config(changed(model_cfg, "embed_dim", "wide"), {"std": [1, 1, 0], "resize_mode": "zoom"}, "it")
    for name in ("model_cfg.text_cfg.tempo", "vision_cfg.qk_norm", "embed_dim", "preprocess_cfg.std", "resize_mode"):
        assert name in str(error.value)


def test_a_clip_has_no_decoder_and_is_refused():
    model_cfg = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
    with pytest.raises(CheckpointError, match="it has no decoder$"):
        open_clip.model_config(model_cfg, None, "it")


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_without_effect_change_nothing(name):
    model_cfg = changed(CONFIGS[name], "custom_text", True)
    for key, value in {"vision_cfg.patch_dropout": 0.5, "vision_cfg.timm_pool": "avg", "init_logit_scale": 2.0}.items():
        model_cfg = changed(model_cfg, key, value)
    for tower in ("text_cfg", "multimodal_cfg"):
        if tower in model_cfg:
            model_cfg = changed(model_cfg, f"{tower}.output_tokens", False)
            model_cfg = changed(model_cfg, f"{tower}.hf_model_pretrained", True)
            model_cfg = changed(model_cfg, f"{tower}.dim_head", 7)
    assert open_clip.model_config(model_cfg, None, "it") == open_clip.model_config(CONFIGS[name], None, "it")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=3,
)
PATHS = sorted({f"{tower}.{key}" for cfg in CONFIGS.values() for tower in cfg if "cfg" in tower for key in cfg[tower]})


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(CONFIGS)), st.sampled_from(PATHS), JSON)
def test_no_value_in_a_config_does_more_than_be_refused(name, path, value):
    if path.partition(".")[0] not in CONFIGS[name]:
        return
    try:
        config = open_clip.model_config(changed(CONFIGS[name], path, value), None, "it")
    except CheckpointError:
        return
    model_specs(config)


@pytest.mark.parametrize("text", ["", "[1]", '{"model_cfg": 1}', "{", '{"model_cfg": {}, "weights": "../x"}', "\x00"])
def test_a_damaged_config_is_refused_by_its_name(text, tmp_path):
    folder = write_folder(tmp_path, CONFIGS["mammut2"], random_arrays(CONFIGS["mammut2"]))
    (folder / "open_clip_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="open_clip_config.json"):
        open_clip.open_model(folder)


def test_weights_without_a_config_that_are_no_openmammut_want_one(tmp_path):
    folder = write_folder(tmp_path, CONFIGS["mammut2"], random_arrays(CONFIGS["mammut2"]))
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(CheckpointError, match="none of the 15 openMaMMUT sizes: put the open_clip_config.json"):
        open_clip.open_model(folder / "open_clip_model.safetensors")
    assert not open_clip.is_open_clip(folder) and open_clip.is_open_clip(folder / "open_clip_model.safetensors")


@pytest.mark.parametrize("preset", [presets.mammut_b16(), presets.tiny()], ids=["b16", "tiny"])
def test_a_mammut_that_open_clip_cannot_express_is_refused_with_every_field(preset):
    with pytest.raises(ValueError, match="open_clip cannot express this model") as error:
        open_clip.to_open_clip(preset)
    for field in ("image_projection is 'shared'", "text.tie_embeddings is True", "vision.class_token is False"):
        assert field in str(error.value)


def test_settings_of_training_and_arithmetic_do_not_stand_in_the_way_of_open_clip():
    config = open_clip.model_config(CONFIGS["mammut2"], None, "it")
    other = dataclasses.replace(config, dtype="bfloat16", remat="full", unroll=4, logit_scale_init=10.0)
    assert open_clip.to_open_clip(other) == open_clip.to_open_clip(config)


def test_a_folder_is_not_overwritten_unasked(tmp_path):
    opened = open_clip.open_model(
        write_folder(tmp_path / "in", CONFIGS["mammut2"], random_arrays(CONFIGS["mammut2"]))
    )
    open_clip.save(tmp_path / "out", opened)
    with pytest.raises(ValueError, match="open_clip_config.json already: give a new folder, or overwrite=True"):
        open_clip.save(tmp_path / "out", opened)
    sizes = []
    open_clip.save(tmp_path / "out", opened, overwrite=True, progress=sizes.append)
    assert sum(sizes) == sum(spec.nbytes for spec in opened.tensors.specs.values()) - 4  # all but the logit bias


def test_texts_become_the_tokens_of_open_clip(shared, tmp_path):
    golden = json.loads((shared / "fixtures" / "preprocess" / "tokens.json").read_text("utf-8"))
    for length in (77, 76, 16):
        model_cfg = changed(CONFIGS["fork"], "text_cfg.context_length", length)
        folder = write_folder(tmp_path / str(length), model_cfg, random_arrays(model_cfg))
        shutil.copy(next((shared / "vocabs").rglob("*.txt.gz")), folder)
        processor = open_clip.open_model(folder).processor
        assert processor(text=golden["texts"])["tokens"].tolist() == golden[f"ctx{length}"]


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("picture", ["gray_333x251", "land_640x427", "small_90x70"])
def test_pictures_become_the_pixels_of_open_clip(mode, picture, shared, tmp_path):
    folder = shared / "fixtures" / "preprocess"
    model_cfg = changed(CONFIGS["mammut2"], "vision_cfg.image_size", 224)
    opened = open_clip.open_model(write_folder(tmp_path, model_cfg, random_arrays(model_cfg), resize_mode=mode))
    pixels = opened.processor(images=[folder / f"{picture}.png"])["image"][0, ::4, ::4].transpose(2, 0, 1)
    expected = load_file(folder / "preprocessed.safetensors")[f"{mode}.{picture}"]
    vision = opened.config.vision
    mean, std = (np.array(x)[:, None, None] for x in (vision.image_mean, vision.image_std))
    assert np.abs(pixels / 255 - (expected * std + mean)).max() < 1 / 255


def test_without_a_vocabulary_images_and_ready_tokens_still_work(tmp_path):
    folder = write_folder(tmp_path, CONFIGS["mammut2"], random_arrays(CONFIGS["mammut2"]))
    processor = open_clip.open_model(folder).processor
    assert processor(images=[np.zeros((5, 7, 3), np.uint8)])["image"].shape == (1, 16, 16, 3)
    tokens = np.array([[1, 2]])
    for call in (lambda: processor(text=["a dog"]), lambda: processor.decode(tokens), lambda: processor.bos_id):
        with pytest.raises(ValueError, match="came without a vocabulary .* put its "):
            call()


def test_a_vocabulary_that_is_larger_than_the_model_is_refused(shared, tmp_path):
    folder = write_folder(tmp_path, CONFIGS["mammut2"], random_arrays(CONFIGS["mammut2"]))
    shutil.copy(next((shared / "vocabs").rglob("*.txt.gz")), folder)
    with pytest.raises(CheckpointError, match="vocab_size of 60, too few for the 49408 ids"):
        open_clip.open_model(folder)


def write_words(folder: pathlib.Path, template: bool) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "a", "dog", "Dog"])}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        special = [("<s>", 1), ("</s>", 2)]
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=special)
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_named_tokenizer_has_the_ids_of_the_config(tmp_path):
    ids = {"bos_id": 58, "eos_id": 57, "pad_id": 59}  # tiktoken's, which the vocabulary itself does not have
    model_cfg = {**CONFIGS["modern"], "multimodal_cfg": MODERN | ids | {"tokenizer_kwargs": {"clean": "whitespace"}}}
    model_cfg["embed_dim"] = 24
    folder = write_folder(tmp_path, model_cfg, random_arrays(model_cfg))
    assert open_clip.open_model(folder).processor.eos_id == 57
    write_words(folder, template=False)
    opened = open_clip.open_model(folder)
    expected = [[58, 3, 5, 57] + [59] * 8]
    assert opened.processor(text=["a &#68;og"])["tokens"].tolist() == expected
    open_clip.save(tmp_path / "out", opened)
    assert open_clip.open_model(tmp_path / "out").processor(text=["a &#68;og"])["tokens"].tolist() == expected


def test_a_tokenizer_of_hugging_face_must_put_texts_between_start_and_end(tmp_path):
    model_cfg = changed(CONFIGS["mammut"], "multimodal_cfg.hf_tokenizer_name", "words")
    folder = write_folder(tmp_path, model_cfg, random_arrays(model_cfg))
    write_words(folder, template=True)
    assert open_clip.open_model(folder).processor(text=["a dog"])["tokens"][0, :5].tolist() == [1, 3, 4, 2, 2]
    write_words(folder, template=False)
    with pytest.raises(CheckpointError, match="expected its ids between a start and an end"):
        open_clip.open_model(folder)


def test_clips_merges_in_a_tokenizer_json_are_clips_tokenizer(shared, tmp_path):
    from mammut.tokenizer import load_tokenizer

    clip = load_tokenizer(next((shared / "vocabs").rglob("*.txt.gz")), True)
    model_cfg = CONFIGS["fork"]
    folder = write_folder(tmp_path, model_cfg, random_arrays(model_cfg))
    merges = [list(merge) for merge in merges_of(clip)]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "merges": merges}}))
    processor = open_clip.open_model(folder).processor
    text = "x!=y &amp; Zebras"
    assert processor.tokenizer.encode(text) == clip.encode(text) and processor.pad_id == 0


def merges_of(clip):
    import gzip

    lines = gzip.decompress(clip._content).decode().split("\n")
    return [line.split() for line in lines[1 : 1 + 49_152 - 256 - 2]]
