"""Model folders: saved, loaded, checked and placed.

They are exact when whole, refused when damaged, and placed parameter by parameter on any mesh.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damage import assert_identical, flip, one_sentence
from flax import nnx
from safetensors.numpy import load_file, save_file

import mammut
from mammut.config import MeshConfig, VideoConfig
from mammut.core import sharding
from mammut.data.tokenizer import MissingTokenizer
from mammut.data.video import VideoTransform
from mammut.models.compute import ComputeConfig
from mammut.models.flops import num_params
from mammut.testing import tiny_batch, tiny_config, tiny_model, tiny_processor
from mammut.training.run_folder import read_run, write_run
from mammut.weights.files.tensor_file import CheckpointError
from mammut.weights.model_card import write_card
from mammut.weights.model_folder import open_model, save_opened
from mammut.weights.opened import LazyTensors, OpenedModel, model_specs

TEXTS = ["one red circle on the left", "two squares", ""]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    mammut.save(folder, tiny_model(), tiny_processor())
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> pathlib.Path:
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "copy")


def sign(folder: pathlib.Path) -> None:
    """Makes the manifest fit the files again, as one would who changed them on purpose."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest:
        content = (folder / name).read_bytes()
        manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def rewrite_weights(folder: pathlib.Path, change: Callable[[dict], None]) -> None:
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors")
    sign(folder)


def rewrite_config(folder: pathlib.Path, change: Callable[[dict], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    sign(folder)


def test_a_saved_model_loads_bit_for_bit_with_its_processor(saved):
    model, processor = mammut.load(saved)
    expected, expected_processor = tiny_model(), tiny_processor()
    assert model.config == expected.config
    assert_identical(nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(expected)))
    for got, want in zip(
        processor.encode_text(TEXTS), expected_processor.encode_text(TEXTS), strict=True
    ):
        np.testing.assert_array_equal(got, want)
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    np.testing.assert_array_equal(processor.image(picture), expected_processor.image(picture))

    batch = tiny_batch()
    graphdef = nnx.graphdef(expected)
    embed = jax.jit(
        lambda state: nnx.merge(graphdef, state).encode_text(batch["tokens"], batch["text_valid"])
    )
    np.testing.assert_array_equal(embed(nnx.state(model)), embed(nnx.state(expected)))


def test_weights_in_bfloat16_stay_bfloat16(tmp_path):
    compute = ComputeConfig(param_dtype="bfloat16", remat="dots", unroll=3)
    model = tiny_model(compute=compute)
    mammut.save(tmp_path / "model", model, tiny_processor())
    loaded, _ = mammut.load(tmp_path / "model")
    assert (loaded.config, loaded.compute) == (tiny_config(), compute)
    assert (
        loaded.text.token_embed.embedding.dtype == jnp.bfloat16
        and loaded.logit_scale.dtype == jnp.float32
    )
    assert_identical(nnx.to_pure_dict(nnx.state(loaded)), nnx.to_pure_dict(nnx.state(model)))


def test_the_weights_are_named_by_their_path_and_need_nothing_of_this_library(saved):
    arrays = load_file(saved / "model.safetensors")
    assert arrays["vision.layers.attn.query.kernel"].shape == (2, 32, 2, 16)
    assert arrays["text.token_embed.embedding"].shape == (60, 48)
    assert sum(x.size for x in arrays.values()) == num_params(tiny_config())["total"]


def test_a_folder_that_holds_a_model_is_not_overwritten_unasked(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="holds config.json already"):
        mammut.save(folder, tiny_model(seed=1), tiny_processor())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    mammut.save(folder, tiny_model(seed=1), tiny_processor(), overwrite=True)
    loaded = nnx.to_pure_dict(nnx.state(mammut.load(folder)[0]))
    assert_identical(loaded, nnx.to_pure_dict(nnx.state(tiny_model(seed=1))))


def test_a_save_that_fails_leaves_the_model_that_is_there(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    opened = OpenedModel(tiny_config(), open_model(folder).tensors, tiny_processor(), "it")

    def read(name):
        if name == "vision.pos_embed":
            raise OSError("no space left on device")
        return opened.tensors.read(name)

    failing = dataclasses.replace(opened, tensors=LazyTensors(opened.tensors.specs, read))
    with pytest.raises(OSError, match="no space left"):
        save_opened(folder, failing, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    mammut.load(folder)
    (folder / ".partial").mkdir()
    (folder / ".partial" / "model.safetensors").write_text("of a save that was killed")
    save_opened(folder, opened, overwrite=True)
    assert {path.name for path in folder.iterdir()} == before.keys()
    mammut.load(folder)


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_a_model_is_not_saved_to_where_it_is_read_from(folder, name):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    opened = dataclasses.replace(open_model(folder), where=str(folder / name))
    with pytest.raises(ValueError, match="is where .* is read from: give a new folder"):
        save_opened(
            folder.parent / "copy" / ".." / folder.name if name else folder, opened, overwrite=True
        )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_of_open_clip_and_a_file_are_not_written_to_even_when_asked(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "open_clip_config.json").write_text("{}")
    (tmp_path / "file").write_text("text")
    for name, message in (
        ("theirs", "holds open_clip_config.json of a folder of another kind"),
        ("file", "is a file"),
    ):
        with pytest.raises(ValueError, match=message):
            mammut.save(tmp_path / name, tiny_model(), tiny_processor(), overwrite=True)
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["open_clip_config.json"]


def test_weights_of_other_names_are_nobodys_business(folder):
    (folder / "model_ema.safetensors").write_text("mine")
    mammut.save(folder, tiny_model(), tiny_processor(), overwrite=True)
    assert (folder / "model_ema.safetensors").read_text() == "mine"


def other_processor(what: str) -> mammut.Processor:
    processor = tiny_processor()
    if what == "vocabulary":
        return mammut.Processor(MissingTokenizer((1, 2, 0), 61, "nothing"), processor.image, 12)
    image = dataclasses.replace(processor.image, image_size=24 if what == "image" else 16)
    return mammut.Processor(processor.tokenizer, image, 13 if what == "length" else 12)


@pytest.mark.parametrize("what, message", [
    ("vocabulary", "the tokenizer has 61 ids, too many for a vocab_size of 60"),
    ("image", "images of 24 pixels, expected an image_size of 16"),
    ("length", "texts of 13 tokens, expected a max_length of 12"),
])  # fmt: skip
def test_the_processor_of_another_model_is_neither_saved_nor_loaded(
    folder, tmp_path, what, message
):
    with pytest.raises(
        ValueError, match=f"the processor of the model is of another model: {message}"
    ):
        mammut.save(tmp_path / "new", tiny_model(), other_processor(what))
    assert not (tmp_path / "new").exists()
    other_processor(what).save(folder)
    sign(folder)
    with pytest.raises(
        CheckpointError, match=f"the processor of {folder} is of another model: {message}"
    ):
        mammut.load(folder)


def test_a_model_without_a_vocabulary_is_saved_and_still_wants_one(tmp_path):
    tiny = tiny_processor()
    missing = mammut.Processor(
        MissingTokenizer((1, 2, None), 60, "put it into here"), tiny.image, 12
    )
    mammut.save(tmp_path / "model", tiny_model(), missing)
    _, processor = mammut.load(tmp_path / "model")
    assert processor.bos_id == 1 and processor(images=[np.zeros((5, 7, 3), np.uint8)])[
        "image"
    ].shape == (1, 16, 16, 3)
    with pytest.raises(ValueError, match="put it into here"):
        processor(text=["a dog"])


@pytest.mark.parametrize("image_size", [True, 0, -8])
def test_an_image_size_that_is_none_is_refused(saved, image_size):
    with pytest.raises(ValueError, match="image_size is .*, expected a positive whole number"):
        mammut.load(saved, image_size=image_size)


LONG = "a" * 5000


@pytest.mark.parametrize(
    "name", [LONG, f"{LONG}.npz", f"{LONG}.pt", "b/" * 3000 + "x.safetensors", "\0"]
)
def test_a_path_that_can_be_none_is_a_checkpoint_error(name):
    with pytest.raises(CheckpointError) as error:
        mammut.load(name)
    one_sentence(error)


FILES = ["config.json", "model.safetensors", "processor.json", "tokenizer.model"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "longer", "gone"])
def test_every_damage_to_a_file_is_noticed_and_the_file_named(folder, name, damage):
    assert {path.name for path in folder.iterdir()} == {*FILES, "manifest.json", "README.md"}
    path = folder / name
    if damage == "flipped bit":
        flip(path)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(
            path.read_bytes()[:-1] if damage == "cut short" else path.read_bytes() + b" "
        )
    with pytest.raises(CheckpointError, match=rf"is damaged: {name} ") as error:
        mammut.load(folder)
    assert str(folder) in one_sentence(error)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '"text"', "{}]", "{}", '{"config.json": 3}', '{"config.json": {}}']
)
def test_a_manifest_that_is_none_is_an_error_that_names_it(folder, content):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match="manifest.json") as error:
        mammut.load(folder)
    one_sentence(error)


@pytest.mark.parametrize("name", FILES)
def test_every_file_that_is_opened_must_be_in_the_manifest(folder, name):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest[name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"manifest.json does not list {name}$"):
        mammut.load(folder)


def test_every_shard_that_is_opened_must_be_in_the_manifest(tmp_path):
    mammut.save(tmp_path, tiny_model(), tiny_processor(), max_shard_bytes=100_000)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    shard = next(name for name in manifest if name.startswith("model-00002"))
    del manifest[shard]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"manifest.json does not list {shard}$"):
        mammut.load(tmp_path)


@pytest.mark.parametrize("content", ["", "no JSON", "[1, 2]", "\udcff"])
def test_a_config_that_is_no_json_object_is_an_error_that_names_it(folder, content):
    (folder / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    sign(folder)
    with pytest.raises(
        CheckpointError, match=r"config\.json is (empty|not JSON|a JSON list)"
    ) as error:
        mammut.load(folder)
    one_sentence(error)


@pytest.mark.parametrize("change, message", [
    (lambda c: c.update(version=99),
     "format 'mammut' version 99, expected 'mammut' version 1 or 2"),
    (lambda c: c.update(format="open_clip"), "format 'open_clip' version 2"),
    (lambda c: c.pop("version"), "version None"),
    (lambda c: c.pop("model"), "holds NoneType, expected an object"),
    (lambda c: c["model"].update(colour="red"), "has colour, which ModelConfig does not know"),
    (lambda c: c["compute"].update(colour="red"), "has colour, which ComputeConfig does not know"),
    (lambda c: c["compute"].update(unroll=0),
     "ComputeConfig.unroll is 0, expected a positive number"),
    (lambda c: c["model"]["text"].update(depth=5),
     "depth 5 is not a multiple of cross_attn_every 2"),
])  # fmt: skip
def test_a_config_that_cannot_be_is_refused_by_its_file(folder, change, message):
    rewrite_config(folder, change)
    with pytest.raises(CheckpointError) as error:
        mammut.load(folder)
    assert message in one_sentence(error) and str(folder / "config.json") in str(error.value)


def test_a_setting_of_another_type_is_an_error_that_names_the_file(folder, tmp_path):
    rewrite_config(folder, lambda c: c["model"]["text"].update(width="48"))
    with pytest.raises(
        CheckpointError, match=f"{folder / 'config.json'} does not hold a ModelConfig"
    ):
        mammut.load(folder)
    (tmp_path / "run.json").write_text('{"config": {"steps": "many"}, "overrides": []}')
    with pytest.raises(
        CheckpointError, match=f"{tmp_path / 'run.json'} does not hold a TrainConfig"
    ):
        read_run(tmp_path)


def test_the_config_of_another_model_is_refused_and_every_misfit_named(folder):
    rewrite_config(folder, lambda c: c["model"]["vision"].update(width=64))
    with pytest.raises(CheckpointError, match="does not fit its config") as error:
        mammut.load(folder)
    text = one_sentence(error)
    assert "vision.patch_embed.kernel is float32[192, 32], expected float32[192, 64]" in text
    assert "image_projection.kernel is float32[32, 48], expected float32[64, 48]" in text
    assert "text." not in text.replace("does not fit its config", "")


def test_keys_missing_left_over_misshapen_and_of_another_type_are_all_reported_at_once(folder):
    def change(arrays):
        del arrays["text.norm.scale"], arrays["vision.pos_embed"]
        arrays["text.norm.gain"] = np.zeros(3, np.float32)
        arrays["text.pos_embed"] = arrays["text.pos_embed"][:-1]
        arrays["logit_scale"] = arrays["logit_scale"].astype(np.float16)

    rewrite_weights(folder, change)
    with pytest.raises(CheckpointError, match="model.safetensors does not fit its config") as error:
        mammut.load(folder)
    text = one_sentence(error)
    for problem in (
        "text.norm.scale is missing",
        "vision.pos_embed is missing",
        "text.norm.gain is not a parameter of the model",
        "text.pos_embed is float32[11, 48], expected float32[12, 48]",
        "logit_scale is float16[], expected float32[]",
    ):
        assert problem in text


def test_weights_that_are_no_safetensors_are_refused(folder):
    (folder / "model.safetensors").write_bytes(b"\x80\x04pickle" * 10)
    sign(folder)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        mammut.load(folder)


def test_a_processor_that_cannot_be_read_is_a_checkpoint_error_too(folder):
    (folder / "processor.json").write_text("{}")
    sign(folder)
    with pytest.raises(CheckpointError, match="processor"):
        mammut.load(folder)


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_a_model_is_refused(tmp_path, exists):
    folder = tmp_path / "nothing"
    if exists:
        folder.mkdir()
    message = (
        r"nothing is no model folder \(no manifest.json\), no run"
        if exists
        else "there is no .*nothing"
    )
    with pytest.raises(CheckpointError, match=message) as error:
        mammut.load(folder)
    one_sentence(error)


@pytest.mark.parametrize("name", ["/etc/hostname", "../outside", "a/../../outside"])
def test_a_manifest_cannot_reach_out_of_its_folder(folder, name):
    (folder.parent / "outside").write_text("secret")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(
        json.dumps(manifest | {name: {"bytes": 6, "sha256": "0" * 64}})
    )
    with pytest.raises(CheckpointError, match="which is not in") as error:
        mammut.load(folder)
    one_sentence(error)


@pytest.mark.parametrize(
    "field, value", [("width", 2**40), ("depth", 10**9), ("mlp_dim", -1), ("vocab_size", 1.5)]
)
def test_absurd_sizes_are_refused_before_anything_is_made(folder, field, value):
    rewrite_config(folder, lambda c: c["model"]["text"].update({field: value}))
    with pytest.raises(CheckpointError, match=field) as error:
        mammut.load(folder)
    one_sentence(error)


# --- many files, many devices


def test_weights_past_a_size_are_several_files_that_load_as_one(saved, tmp_path):
    model = tiny_model()
    mammut.save(tmp_path / "model", model, tiny_processor(), max_shard_bytes=20_000)
    shards = sorted(path.name for path in (tmp_path / "model").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert len(shards) > 3 and set(index["weight_map"].values()) == set(shards)
    assert set(index["weight_map"]) == set(model_specs(model.config))
    loaded = mammut.load(tmp_path / "model")[0]
    assert_identical(nnx.to_pure_dict(nnx.state(loaded)), nnx.to_pure_dict(nnx.state(model)))

    flip(tmp_path / "model" / shards[1])
    with pytest.raises(CheckpointError, match=rf"is damaged: {shards[1]} "):
        mammut.load(tmp_path / "model")
    # in one file again: no shard is left
    mammut.save(tmp_path / "model", model, tiny_processor(), overwrite=True)
    assert not list((tmp_path / "model").glob("model-*")) and not list(
        (tmp_path / "model").glob("*.index.json")
    )
    assert_identical(
        nnx.to_pure_dict(nnx.state(mammut.load(tmp_path / "model")[0])),
        nnx.to_pure_dict(nnx.state(model)),
    )


@pytest.mark.parametrize("mesh", [MeshConfig(data=1, fsdp=8), MeshConfig(data=2, fsdp=2, model=2)])
def test_parameters_go_straight_to_their_devices(saved, mesh):
    mesh = sharding.make_mesh(mesh)
    model = mammut.load(saved, mesh=mesh)[0]
    state = nnx.to_pure_dict(nnx.state(model))
    assert_identical(state, nnx.to_pure_dict(nnx.state(tiny_model())))
    kernel = state["text"]["token_embed"]["embedding"]
    assert kernel.sharding.mesh == mesh and len(kernel.addressable_shards) == 8
    assert kernel.addressable_shards[0].data.size < kernel.size
    embed = jax.jit(lambda state, image: nnx.merge(nnx.graphdef(model), state).encode_image(image))
    expected = jax.jit(
        lambda state, image: nnx.merge(nnx.graphdef(model), state).encode_image(image)
    )
    image = tiny_batch()["image"]
    one_device = nnx.state(mammut.load(saved)[0])
    with jax.set_mesh(mesh):
        got = embed(nnx.state(model), image)
    np.testing.assert_allclose(got, expected(one_device, image), atol=1e-5)


@pytest.mark.long
def test_loading_and_saving_hold_one_copy_of_the_model(tmp_path):
    """Of 500 MB of parameters; a second copy would be 500 MB more."""
    code = f"""
import dataclasses, resource, sys
import jax, numpy as np
import mammut
from mammut import testing
from mammut.weights.opened import LazyTensors, OpenedModel, model_specs
from mammut.weights.model_folder import save_opened
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
config = testing.tiny_config()
text = dataclasses.replace(config.text, width=1536, num_heads=8, mlp_dim=4096)
config = dataclasses.replace(config, text=text)
specs = model_specs(config)
jax.block_until_ready(jax.numpy.zeros(3))
before = peak()
read = lambda name: np.full(specs[name].shape, 0.5, specs[name].dtype)
save_opened(
    {str(tmp_path / "model")!r},
    OpenedModel(config, LazyTensors(specs, read), testing.tiny_processor(), "it"),
)
saved = peak() - before
model, _ = mammut.load({str(tmp_path / "model")!r})
print(sum(spec.nbytes for spec in specs.values()) // 2**20, saved, peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size, saved, loaded = map(int, done.stdout.split())
    assert 400 < size < 600
    assert saved < 0.6 * size  # the largest parameter is a quarter of it
    assert loaded < 1.8 * size  # what is mapped of the file counts until it is let go


# --- the card


def test_the_card_says_what_the_model_is_and_what_it_scored(folder):
    assert "No evaluation is recorded" in (folder / "README.md").read_text()
    (folder / "eval").mkdir()
    scores = {
        "task": "caption",
        "data": "coco:val",
        "metrics": {"cider": 1.2345, "by_type": {"x": 1}},
    }
    (folder / "eval" / "caption_val.json").write_text(json.dumps(scores))
    mammut.save(folder, tiny_model(), tiny_processor(), overwrite=True)
    card = (folder / "README.md").read_text()
    total = num_params(tiny_config())["total"]
    assert (
        f"| parameters | {total:,} |" in card and "| caption | coco:val | cider | 1.234 |" in card
    )
    assert "16 x 16 pixels (squash), patches of 8" in card and "library_name: mammut" in card


def test_the_card_says_where_the_model_is_and_what_it_started_from(folder, monkeypatch):
    monkeypatch.chdir(folder)
    train = mammut.config.TrainConfig(model=tiny_config(), init_vision="vit.npz", init_text="bert")
    write_run(folder, train, [])
    mammut.save(".", tiny_model(), tiny_processor(), overwrite=True)
    card = (folder / "README.md").read_text()
    assert f'mammut.load("{folder.name}")' in card and f"# {folder.name}\n" in card
    assert (
        "| image encoder started from | vit.npz |" in card
        and "| text decoder started from | bert |" in card
    )


@pytest.mark.parametrize("change, tags, family", [
    ({}, {"image-text-retrieval", "image-captioning"}, True),
    ({"depth": 0, "text_only_depth": 2, "vocab_bias": False}, {"image-text-retrieval"}, False),
    ({"pooling": "none"}, {"image-captioning"}, False),
])  # fmt: skip
def test_the_card_promises_what_the_model_can_do(tmp_path, change, tags, family):
    config = dataclasses.replace(
        tiny_config(), text=dataclasses.replace(tiny_config().text, **change)
    )
    write_card(tmp_path, config, tiny_processor())
    card = (tmp_path / "README.md").read_text()
    assert {tag for tag in ("image-text-retrieval", "image-captioning") if tag in card} == tags
    assert ("of the MaMMUT family" in card) == family


@pytest.mark.parametrize(("settings", "transform", "row"), [
    (None, None, None),
    (None, VideoTransform(4), "4 frames of each, from its whole length; frames one by one"),
    (VideoConfig(mode="frames"), VideoTransform(4, 2.5),
     "4 frames of each, 2.5 a second; frames one by one"),
    (VideoConfig(frames=4, patch_stride=2), VideoTransform(4),
     "4 frames of each, from its whole length; 4 frames at once: patches, 2 frames apart"),
    (VideoConfig(mode="frames"), None, "frames one by one"),
])  # fmt: skip
def test_the_card_of_a_model_of_videos_reads_one(tmp_path, settings, transform, row):
    vision = dataclasses.replace(tiny_config().vision, video=settings)
    config = dataclasses.replace(tiny_config(), vision=vision)
    processor = tiny_processor()
    processor.video = transform
    write_card(tmp_path, config, processor)
    card = (tmp_path / "README.md").read_text()
    assert [line for line in card.splitlines() if line.startswith("| video")] == (
        [] if row is None else [f"| video | {row} |"]
    )
    (use,) = re.findall(r"^\w+_embed = .*$", card, re.MULTILINE)
    if transform is None:
        assert use == 'image_embed = model.encode_image(processor(images=["photo.jpg"])["image"])'
        return
    assert use == 'video_embed = model.encode_video(processor(images=["clip.mp4"])["image"])'


def test_a_card_that_somebody_else_wrote_is_left_alone(folder):
    (folder / "README.md").write_text("# My notes\n")
    mammut.save(folder, tiny_model(), tiny_processor(), overwrite=True)
    assert (folder / "README.md").read_text() == "# My notes\n"
    mammut.load(folder)


def test_opening_a_folder_reads_no_parameter(saved):
    opened = open_model(saved)
    assert {name: (spec.shape, spec.dtype) for name, spec in opened.tensors.specs.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in model_specs(tiny_config()).items()
    }
    assert (
        opened.config == tiny_config()
        and opened.processor.vocab_size == tiny_processor().vocab_size
    )


def test_a_mesh_may_have_fewer_axes_and_one_of_another_kind_is_refused(saved):
    devices = np.array(jax.devices())
    fewer = jax.sharding.Mesh(devices, ("fsdp",))
    kernel = mammut.load(saved, mesh=fewer)[0].text.token_embed.embedding[...]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    for mesh in (jax.sharding.Mesh(devices, ("x",)), jax.make_mesh((8,), ("fsdp",))):
        with pytest.raises(
            ValueError, match="expected automatic axes among .*: mammut.core.sharding.make_mesh"
        ) as error:
            mammut.load(saved, mesh=mesh)
        one_sentence(error)


def test_a_path_where_nothing_is_and_weights_without_their_config_are_told_apart(tmp_path):
    with pytest.raises(
        CheckpointError,
        match="there is no .*laion/model: expected a folder or a file on this machine",
    ):
        mammut.load(tmp_path / "laion/model")
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match="holds open_clip_model.safetensors and no open_clip_config.json"
    ):
        mammut.load(tmp_path)
