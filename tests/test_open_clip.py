"""Models of open_clip, read and written.

They give the original's numbers, in and out, and bad files are refused by name.

Numbers are those of PyTorch models on random weights (`shared/fixtures/open_clip`), never our own.
"""

import dataclasses
import importlib.util
import json
import math
import shutil
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from open_clip_models import (
    COCA,
    CONFIGS,
    open_specs,
    original_package,
    random_arrays,
    write_folder,
)
from safetensors.numpy import load_file

from mammut.config import LossConfig
from mammut.data.images import ImageTransform
from mammut.data.processor import Processor
from mammut.data.tokenizer import MissingTokenizer
from mammut.generation.search import GenerateConfig
from mammut.generation.text import generate
from mammut.models.compute import Augment, ComputeConfig
from mammut.models.mammut import MaMMUT
from mammut.testing import tiny_model, tiny_processor
from mammut.training.tasks import ImageTextTask
from mammut.weights.files.tensor_file import CheckpointError, open_tensors
from mammut.weights.formats import open_clip
from mammut.weights.formats.open_clip_config import OPENMAMMUT_SIZES
from mammut.weights.opened import LazyTensors, OpenedModel

FIXTURES = "mammut_v1_mlp", "mammut2_classic", "mammut2_modern", "coca"


def fixture_config(name: str, fixture: dict) -> dict:
    """The `model_cfg` of a fixture, some of which give what was built in other words."""
    if "config" in fixture:
        return fixture["config"]
    vision, (vocab_size, width) = (
        dict(fixture["vision"]),
        fixture["shapes"]["text.token_embedding.weight"],
    )
    vision["head_width"] = vision["width"] // vision.pop("heads")
    text = {
        "width": width,
        "heads": 4,
        "layers": 4,
        "cross_attn_ratio": 2,
        "vocab_size": vocab_size,
    }
    if name == "mammut2_modern":
        text |= {"text_arch": "modern", "context_length": 24, "qk_norm": True, "attn_gated": True}
    return {"embed_dim": width, "vision_cfg": vision, "multimodal_cfg": text}


def model_of(opened: OpenedModel) -> MaMMUT:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: MaMMUT(opened.config, rngs=nnx.Rngs(0))))

    def read(path, leaf):
        return jnp.asarray(opened.tensors.read(".".join(entry.key for entry in path)))

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(read, nnx.to_pure_dict(state)))


@pytest.fixture(scope="module", params=FIXTURES)
def reference(request, shared, tmp_path_factory):
    """A PyTorch model's inputs and outputs, and the model opened from a folder as on the hub."""
    folder = shared / "fixtures" / "open_clip"
    spec = importlib.util.spec_from_file_location(
        "random_weights", shared / "fixtures" / "random_weights.py"
    )
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    fixture = json.loads((folder / f"{request.param}.json").read_text())
    arrays = weights.random_state_dict(fixture["shapes"], fixture["weights_seed"])
    arrays = {name: np.array(array) for name, array in arrays.items()}
    path = write_folder(
        tmp_path_factory.mktemp(request.param), fixture_config(request.param, fixture), arrays
    )
    if request.param != "mammut2_modern":  # which has another vocabulary, of 2,000 ids
        shutil.copy(shared / "vocabs" / "clip_bpe_simple_vocab_16e6.txt.gz", path)
    opened = open_clip.open_model(path)
    with jax.default_matmul_precision("highest"):
        yield (
            fixture,
            load_file(folder / f"{request.param}.safetensors"),
            opened,
            model_of(opened),
            arrays,
        )


def batch_of(fixture: dict, outputs: dict) -> dict:
    image, tokens = (
        jnp.asarray(outputs["images"].transpose(0, 2, 3, 1)),
        jnp.asarray(outputs["text"]),
    )
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

    text_mask = (
        jnp.asarray(outputs["text_valid"] > 0) if "text_valid" in outputs else batch["text_valid"]
    )
    image_embed, text_embed, text_embed_mask, logits = forward(model, *batch.values(), text_mask)
    np.testing.assert_allclose(image_embed, outputs["image_embed"], atol=1e-5)
    expected = outputs["text_embed"] if "text_embed" in outputs else outputs["text_embed_padvalue"]
    np.testing.assert_allclose(text_embed, expected, atol=1e-5)
    np.testing.assert_allclose(text_embed_mask, outputs.get("text_embed_mask", expected), atol=1e-5)
    np.testing.assert_allclose(
        logits[..., outputs["vocab_subset"]], outputs["caption_logits_subset"], atol=1e-4
    )
    np.testing.assert_allclose(
        jax.nn.logsumexp(logits, -1), outputs["caption_logits_logsumexp"], atol=1e-4
    )
    np.testing.assert_array_equal(logits.argmax(-1), outputs["caption_logits_argmax"])


@pytest.mark.long
def test_losses_and_gradients_are_those_of_pytorch(reference):
    fixture, outputs, opened, model, arrays = reference
    if "losses" not in fixture:
        pytest.skip("the fixture has no losses")
    task, batch = ImageTextTask(LossConfig(caption_weight=2.0)), batch_of(fixture, outputs)

    def loss(model, text_valid):
        return task.loss(model, batch | {"text_valid": text_valid}, Augment())

    expected = fixture.get("grad_norms", {})
    step = nnx.jit(
        nnx.value_and_grad(loss, has_aux=True) if expected else lambda *args: (loss(*args), None)
    )
    # knows "!" from a pad
    from_processor = jnp.asarray(opened.processor(text=fixture["captions"])["text_valid"])
    for text_valid in (batch["text_valid"], from_processor):
        (_, metrics), gradients = step(model, text_valid)
        assert metrics["loss_contrastive"] == pytest.approx(
            fixture["losses"]["contrastive_loss"], rel=1e-5
        )
        assert 2 * metrics["loss_caption"] == pytest.approx(
            fixture["losses"]["caption_loss"], rel=1e-5
        )
    if expected:
        flat = {
            ".".join(path): np.asarray(leaf.get_value())
            for path, leaf in nnx.to_flat_state(nnx.state(gradients))
        }
        ours = LazyTensors(opened.tensors.specs, flat.__getitem__)
        theirs = open_clip.table(opened.config, open_specs(arrays)).to_theirs(ours)
        norms = {
            name: np.linalg.norm(theirs.read(name).astype(np.float64)) for name in theirs.specs
        }
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
        return generate(
            model, image, prompt, prompt > 0, config, eos_id=opened.processor.eos_id
        ).tokens[:, 0]

    np.testing.assert_array_equal(greedy(model, image), expected)


def test_what_was_read_is_written_back_bit_for_bit(reference, tmp_path):
    _, _, opened, _, arrays = reference
    open_clip.save(tmp_path, opened)
    written = load_file(tmp_path / "open_clip_model.safetensors")
    assert written.keys() == arrays.keys()
    for name, array in arrays.items():
        assert written[name].dtype == array.dtype and written[name].tobytes() == array.tobytes(), (
            name
        )
    again = open_clip.open_model(tmp_path)
    assert again.config == opened.config
    assert type(again.processor.tokenizer) is type(opened.processor.tokenizer)


def test_layers_without_an_mlp_are_those_whose_mlp_says_nothing(tmp_path):
    """Layers without an MLP equal layers whose MLP gives zero.

    The layout of the small openMaMMUT sizes is compared with that of the others, which other tests
    compare with PyTorch.
    """
    full = random_arrays(CONFIGS["fork"])
    bare = dict(full)
    for layer in (0, 2):  # those that a cross-attention layer follows
        for part in ("mlp.c_proj.weight", "mlp.c_proj.bias"):
            full[f"text.resblocks.{layer}.{part}"] = np.zeros_like(
                full[f"text.resblocks.{layer}.{part}"]
            )
        bare = {
            name: array
            for name, array in bare.items()
            if not name.startswith(f"text.resblocks.{layer}.mlp")
        }
        bare = {
            name: array
            for name, array in bare.items()
            if not name.startswith(f"text.resblocks.{layer}.ln_2")
        }
    image, tokens = jnp.ones((1, 16, 16, 3)), jnp.array([[49_406, 5, 7, 9, 49_407]])

    @nnx.jit
    def forward(model):
        two = model.two_pass(image, tokens, tokens > 0)
        return two.text_embed, two.features

    outputs = [
        forward(
            model_of(open_clip.open_model(write_folder(tmp_path / name, CONFIGS[name], arrays)))
        )
        for name, arrays in {"fork": full, "fork without MLPs": bare}.items()
    ]
    for one, other in zip(*outputs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("size", OPENMAMMUT_SIZES)
def test_every_tensor_of_every_openmammut_size_has_its_place(size, shared, tmp_path):
    """The file has its header and no numbers: a hole of up to 4.7 GB. No config is beside it."""
    manifest = json.loads(
        (shared / "fixtures" / "open_clip" / "manifests" / f"mammut_{size}.json").read_text()
    )
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
    assert opened.config.vision.width // opened.config.vision.num_heads == (
        80 if "H" in size else 64
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_comes_back_as_it_was(name, tmp_path):
    """theirs -> ours -> theirs, bit for bit, and the config too."""
    model_cfg, arrays = CONFIGS[name], random_arrays(CONFIGS[name])
    opened = open_clip.open_model(
        write_folder(tmp_path / "in", model_cfg, arrays, size=16, mean=0.4, fill_color=7)
    )
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
    model = tiny_model(config, compute=ComputeConfig(param_dtype="bfloat16"))
    arrays = {
        ".".join(path): np.asarray(leaf.get_value())
        for path, leaf in nnx.to_flat_state(nnx.state(model))
    }
    opened = OpenedModel(
        model.config,
        LazyTensors(open_specs(arrays), arrays.__getitem__),
        tiny_processor(),
        "it",
        compute=model.compute,
    )
    open_clip.save(tmp_path, opened)
    assert {
        str(spec.dtype)
        for spec in open_tensors(tmp_path / "open_clip_model.safetensors").specs.values()
    } == {
        "bfloat16",
        "float32",
    }
    again = open_clip.open_model(tmp_path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(
            again.tensors.read(name), array.astype(np.float32), err_msg=name
        )
    assert float(arrays["logit_bias"]) != 0
    text = ["a dog", "two dogs"]
    np.testing.assert_array_equal(
        again.processor(text=text)["tokens"], opened.processor(text=text)["tokens"]
    )


def test_a_coca_of_ours_gives_the_same_in_open_clip(tmp_path):
    torch, theirs = pytest.importorskip("torch"), original_package()
    config = open_clip.model_config(
        {**COCA, "text_cfg": COCA["text_cfg"] | {"vocab_size": 49_408}}, None, "it"
    )
    model = tiny_model(config)
    arrays = {
        ".".join(path): np.asarray(leaf.get_value())
        for path, leaf in nnx.to_flat_state(nnx.state(model))
    }
    arrays["logit_bias"] = np.float32(0)
    processor = Processor(MissingTokenizer((1, 2, 0), 60, "nothing"), ImageTransform(16), 12)
    opened = OpenedModel(
        config, LazyTensors(open_specs(arrays), arrays.__getitem__), processor, "it"
    )
    open_clip.save(tmp_path, opened)
    original = theirs.create_model(f"local-dir:{tmp_path}").eval()
    rng = np.random.default_rng(0)
    image = rng.normal(size=(3, 16, 16, 3)).astype(np.float32)
    tokens = rng.integers(1, 49_408, (3, 12)).astype(np.int32)
    tokens[0, 7:], tokens[1, 4] = 0, 0
    with torch.no_grad():
        out = original(torch.from_numpy(image).permute(0, 3, 1, 2), torch.from_numpy(tokens).long())

    @nnx.jit
    def forward(model):
        two = model.two_pass(jnp.asarray(image), jnp.asarray(tokens), jnp.ones(tokens.shape, bool))
        return two, model.text.logits(two.features)

    with jax.default_matmul_precision("highest"):
        two, logits = forward(model)
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
    torch.save(
        {"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"state": {}}},
        folder / "epoch_3.pt",
    )
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
    assert open_clip.open_model(folder).notes == (
        "logit_bias is 0.0: the model was trained without",
    )


def test_a_folder_with_two_files_of_weights_wants_to_be_told_which(tmp_path):
    folder = write_folder(tmp_path, CONFIGS["mammut2"], random_arrays(CONFIGS["mammut2"]))
    shutil.copy(folder / "open_clip_model.safetensors", folder / "a.safetensors")
    (folder / "open_clip_model.safetensors").rename(folder / "b.safetensors")
    with pytest.raises(
        CheckpointError, match=r"2 files of weights, a\.safetensors, b\.safetensors"
    ):
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
    assert load_file(tmp_path / "out" / "open_clip_model.safetensors")["logit_bias"] == np.float32(
        -10.5
    )
    config = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    # without it open_clip's model has no place for the tensor
    assert config["model_cfg"]["init_logit_bias"] == -10.5


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


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"model_cfg": 1}', "{", '{"model_cfg": {}, "weights": "../x"}', "\x00"]
)
def test_a_damaged_config_is_refused_by_its_name(text, tmp_path):
    folder = write_folder(tmp_path, CONFIGS["mammut2"], random_arrays(CONFIGS["mammut2"]))
    (folder / "open_clip_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="open_clip_config.json"):
        open_clip.open_model(folder)


def test_weights_without_a_config_that_are_no_openmammut_want_one(tmp_path):
    folder = write_folder(tmp_path, CONFIGS["mammut2"], random_arrays(CONFIGS["mammut2"]))
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(
        CheckpointError, match="none of the 15 openMaMMUT sizes: put the open_clip_config.json"
    ):
        open_clip.open_model(folder / "open_clip_model.safetensors")
    assert not open_clip.recognises(folder)
    assert open_clip.recognises(folder / "open_clip_model.safetensors")


def test_a_folder_is_not_overwritten_unasked(tmp_path):
    opened = open_clip.open_model(
        write_folder(tmp_path / "in", CONFIGS["mammut2"], random_arrays(CONFIGS["mammut2"]))
    )
    open_clip.save(tmp_path / "out", opened)
    with pytest.raises(
        ValueError, match="open_clip_config.json already: give a new folder, or overwrite=True"
    ):
        open_clip.save(tmp_path / "out", opened)
    sizes = []
    open_clip.save(tmp_path / "out", opened, overwrite=True, progress=sizes.append)
    # all but the logit bias
    assert sum(sizes) == sum(spec.nbytes for spec in opened.tensors.specs.values()) - 4


def test_a_model_that_cannot_be_written_whole_leaves_the_one_that_is_there(tmp_path):
    opened = open_clip.open_model(
        write_folder(tmp_path / "in", CONFIGS["mammut2"], random_arrays(CONFIGS["mammut2"]))
    )
    open_clip.save(tmp_path / "out", opened)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def read(name):
        if name == "text.norm.scale":
            raise OSError("no space left on device")
        return opened.tensors.read(name)

    failing = dataclasses.replace(opened, tensors=LazyTensors(opened.tensors.specs, read))
    with pytest.raises(OSError, match="no space left"):
        open_clip.save(tmp_path / "out", failing, overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_folder_that_is_read_from_or_of_another_kind_is_never_written_to(tmp_path):
    folder = write_folder(tmp_path / "in", CONFIGS["mammut2"], random_arrays(CONFIGS["mammut2"]))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "link").symlink_to(folder)
    for source in (folder, folder / "open_clip_model.safetensors"):
        with pytest.raises(ValueError, match="is where .*in.* is read from: give a new folder"):
            open_clip.save(tmp_path / "link", open_clip.open_model(source), overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "out").mkdir()
    for name in ("manifest.json", "run.json"):
        (tmp_path / "out" / name).write_text("{}")
        with pytest.raises(ValueError, match=f"holds {name} of a folder of another kind"):
            open_clip.save(tmp_path / "out", open_clip.open_model(folder), overwrite=True)
        (tmp_path / "out" / name).unlink()
    assert not list((tmp_path / "out").iterdir())


def test_a_processor_that_open_clip_cannot_express_is_refused_by_name(tmp_path):
    opened = open_clip.open_model(
        write_folder(tmp_path / "in", CONFIGS["mammut2"], random_arrays(CONFIGS["mammut2"]))
    )
    image = ImageTransform(16, interpolation="bilinear_aliased")
    processor = Processor(opened.processor.tokenizer, image, 12, "end_filled")
    message = (
        "interpolation is 'bilinear_aliased', expected 'bicubic' or 'bilinear'; "
        "text_form is 'end_filled'"
    )
    with pytest.raises(ValueError, match=message):
        open_clip.save(tmp_path / "out", dataclasses.replace(opened, processor=processor))
    assert not (tmp_path / "out").exists()


def test_numbers_that_float32_does_not_hold_are_refused_and_those_that_are_none_stay(tmp_path):
    arrays = random_arrays(CONFIGS["mammut2"])
    wide = arrays["text.ln_final.weight"].astype(np.float64)
    wide[:3] = np.nan, np.inf, 1e300
    folder = write_folder(tmp_path, CONFIGS["mammut2"], arrays | {"text.ln_final.weight": wide})
    read = open_clip.open_model(folder).tensors.read
    with pytest.raises(
        CheckpointError, match="safetensors: text.ln_final.weight holds finite numbers .* float32"
    ):
        read("text.norm.scale")
    wide[2] = 1e30
    folder = write_folder(tmp_path, CONFIGS["mammut2"], arrays | {"text.ln_final.weight": wide})
    np.testing.assert_array_equal(
        open_clip.open_model(folder).tensors.read("text.norm.scale"), wide.astype(np.float32)
    )


@pytest.mark.parametrize(
    "config", [b'{"model_cfg": {}, "model_cfg": {}}', b'{"model_cfg": {"embed_dim": NaN}}']
)
def test_a_config_with_a_key_twice_or_without_a_number_is_refused(tmp_path, config):
    folder = write_folder(tmp_path, CONFIGS["mammut2"], random_arrays(CONFIGS["mammut2"]))
    (folder / "open_clip_config.json").write_bytes(config)
    with pytest.raises(CheckpointError, match="open_clip_config.json is not JSON: (the key|NaN)"):
        open_clip.open_model(folder)


def test_a_model_is_written_with_few_of_its_parameters_in_memory(tmp_path):
    opened = open_clip.open_model(
        write_folder(tmp_path / "in", CONFIGS["modern"], random_arrays(CONFIGS["modern"]))
    )
    held, most, reads = weakref.WeakSet(), 0, []

    def read(name):
        nonlocal most
        array = opened.tensors.read(name).view(_Watched)
        held.add(array)
        most = max(most, len(held))
        reads.append(name)
        return array

    watched = dataclasses.replace(opened, tensors=LazyTensors(opened.tensors.specs, read))
    open_clip.save(tmp_path / "out", watched)
    # each once; the logit bias, to see whether it is 0
    assert sorted(reads) == sorted([*opened.tensors.specs])
    assert most <= 4  # queries, keys and values are one tensor in PyTorch


class _Watched(np.ndarray):
    """Hashed by identity: an array of NumPy's own cannot be in a set."""

    __hash__ = object.__hash__
