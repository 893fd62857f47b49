"""Formats of weights: every file and folder is recognised by one of them, by what it holds."""

import json
import pathlib
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
from damage import one_sentence
from open_clip_models import CONFIGS, random_arrays, write_folder
from safetensors.numpy import save_file

import mammut
from mammut.models.resnet import ResNetConfig
from mammut.testing import tiny_model, tiny_processor
from mammut.weights.files.tensor_file import CheckpointError
from mammut.weights.formats import (
    big_vision,
    huggingface,
    magma,
    mammut_folder,
    mammut_run,
    open_clip,
    resnets,
)
from mammut.weights.model_folder import FORMATS, Format, open_model

ARCHIVE = pathlib.Path(__file__).parent / "data" / "version_0_1.tar.xz"
OPEN_CLIP = tuple(random_arrays(CONFIGS["mammut2"]))
CLIP_RESNET = tuple(
    entry.theirs
    for entry in resnets.clip_entries(ResNetConfig(stem_width=8, stages=(1, 2, 1, 1)), "visual.")
)
NORM_FREE = "stem.conv.weight", "stem.conv.gain", "stages.0.0.conv1.gain", "head.fc.weight"
MAGMA = (
    "lm.transformer.wte.weight",
    "lm.transformer.h.0.ln_1.weight",
    "lm.lm_head.weight",
    "image_prefix.enc.conv1.weight",
    "image_prefix.enc.conv3.weight",
    "image_prefix.enc.layer1.0.conv1.weight",
    "word_embedding.weight",
    "transformer.0.ln_1.weight",
)
LANGUAGE_MODEL = "transformer.wte.weight", "transformer.h.0.ln_1.weight"
# The names of weights alone, as a file has them: what kind of file, and whose it is.
FILES = {
    "open_clip.safetensors": (OPEN_CLIP, open_clip),
    "epoch_3.pt": (OPEN_CLIP, open_clip),
    "open_clip_pytorch_model.bin": (OPEN_CLIP, open_clip),
    "rn50.safetensors": (CLIP_RESNET, resnets),
    "rn50.pt": (CLIP_RESNET, resnets),
    "visual.pth": (tuple(name.removeprefix("visual.") for name in CLIP_RESNET), resnets),
    "clip.pt": (("logit_scale", "token_embedding.weight", *CLIP_RESNET), resnets),
    "nf_resnet50.safetensors": (NORM_FREE, resnets),
    "mp_rank_00_model_states.pt": (MAGMA, magma),
    "magma.safetensors": (MAGMA, magma),
    "siglip.npz": (("img/embedding/kernel", "txt/Embed_0/embedding", "t", "b"), big_vision),
    "vit.npz": (("embedding/kernel", "Transformer/encoder_norm/bias", "cls"), big_vision),
    "cappa.npz": (("encoder/embedding/kernel", "decoder/LayerNorm/scale"), big_vision),
    "state.npz": (("params/img/embedding/kernel", "opt/0/mu/img/embedding/kernel"), big_vision),
    "old_state.npz": (("opt/target/embedding/kernel", "opt/state/step"), big_vision),
}
# And some that nobody has: a language model without its folder, ours without its own, all others.
NOBODYS = {
    "model.safetensors": LANGUAGE_MODEL,
    "pytorch_model.bin": LANGUAGE_MODEL,
    "ours.safetensors": ("vision.patch_embed.kernel", "text.token_embed.embedding"),
    "detector.pt": ("backbone.conv1.weight", "head.weight"),
    "arrays.npz": ("x", "y"),
}


def write(path: pathlib.Path, names: tuple[str, ...]) -> pathlib.Path:
    """A file of tensors with these names, of the kind that its own name ends with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ones(1, np.float32) for name in names}
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".safetensors":
        save_file(arrays, path)
    else:
        torch = pytest.importorskip("torch", reason="it writes .pt files")
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        torch.save({"epoch": 3, "state_dict": tensors}, path)
    return path


def rows(path: pathlib.Path) -> list[Format]:
    return [row for row in FORMATS if row.recognises(path)]


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> pathlib.Path:
    """Model folders of version 0.1, and a run that was killed."""
    folder = tmp_path_factory.mktemp("version_0_1")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_every_row_is_a_format_with_words_of_its_own():
    assert all(isinstance(row, Format) for row in FORMATS)
    assert len({row.KIND for row in FORMATS}) == len(FORMATS)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_weights_is_recognised_by_the_names_in_it(name, tmp_path):
    names, row = FILES[name]
    assert rows(write(tmp_path / name, names)) == [row]


@pytest.mark.parametrize("name", NOBODYS)
def test_a_file_of_other_weights_is_nobodys_and_the_error_lists_what_is_read(name, tmp_path):
    path = write(tmp_path / name, NOBODYS[name])
    assert rows(path) == []
    with pytest.raises(CheckpointError) as error:
        open_model(path)
    text = one_sentence(error)
    assert text.startswith(f"{path} is no model folder (no manifest.json), no run ")
    assert all(row.KIND in text for row in FORMATS)


def test_the_part_of_a_file_is_recognised_as_the_file_is(tmp_path):
    path = write(tmp_path / "siglip.npz", FILES["siglip.npz"][0])
    assert rows(pathlib.Path(f"{path}:img")) == [big_vision]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_open_clip_and_its_weights_alone_are_open_clips(name, tmp_path):
    folder = write_folder(tmp_path / "hub", CONFIGS[name], random_arrays(CONFIGS[name]))
    assert rows(folder) == rows(folder / "open_clip_model.safetensors") == [open_clip]
    # What the hub has beside it, for transformers.
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    assert rows(folder) == [open_clip]


def test_a_folder_of_open_clip_with_a_resnet_is_that_of_the_resnets(tmp_path):
    write(tmp_path / "open_clip_model.safetensors", CLIP_RESNET)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}}))
    assert rows(tmp_path) == [resnets]


@pytest.mark.parametrize("beside", [{}, {"model_type": "timm_wrapper"}])
def test_a_folder_of_timms_is_that_of_the_resnets(beside, tmp_path):
    write(tmp_path / "model.safetensors", NORM_FREE)
    config = {"architecture": "nf_resnet50", "pretrained_cfg": {}} | beside
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert rows(tmp_path) == rows(tmp_path / "model.safetensors") == [resnets]


def test_a_folder_of_timms_with_other_weights_is_refused_by_their_file(tmp_path):
    write(tmp_path / "model.safetensors", LANGUAGE_MODEL)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "nf_resnet50"}))
    with pytest.raises(
        CheckpointError, match="model.safetensors holds other tensors than a ResNet"
    ):
        open_model(tmp_path)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "bert"])
def test_a_folder_with_a_model_type_is_hugging_faces_whatever_the_type(model_type, tmp_path):
    write(tmp_path / "model.safetensors", LANGUAGE_MODEL)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert rows(tmp_path) == [huggingface]


@pytest.mark.parametrize("max_shard_bytes", [2**30, 50_000])
def test_a_folder_of_ours_is_a_model_folder_and_nothing_else(max_shard_bytes, tmp_path):
    mammut.save(tmp_path, tiny_model(), tiny_processor(), max_shard_bytes=max_shard_bytes)
    assert rows(tmp_path) == [mammut_folder]
    for path in tmp_path.glob("*.safetensors*"):
        assert rows(path) == []


@pytest.mark.parametrize("name", ["mammut", "coca", "magma"])
def test_a_folder_of_the_version_before_is_a_model_folder(old, name):
    assert rows(old / name) == [mammut_folder]


def test_a_run_is_a_run_until_its_model_is_saved(old, tmp_path):
    run = shutil.copytree(old / "run", tmp_path / "run")
    assert rows(run) == [mammut_run]
    mammut.save(run, *mammut.load(run), overwrite=True)
    assert rows(run) == [mammut_folder]


@pytest.mark.parametrize("name", ["nothing", "nothing.pt", "nothing.npz", "empty", "text.pt"])
def test_what_is_no_model_is_recognised_by_none_or_refused_by_name(name, tmp_path):
    path = tmp_path / name
    if name == "empty":
        path.mkdir()
    elif name == "text.pt":
        path.write_text("no tensors")
    with pytest.raises(CheckpointError, match=name) as error:
        open_model(path)
    one_sentence(error)


def test_nothing_in_a_file_is_run_when_it_is_recognised(tmp_path):
    torch = pytest.importorskip("torch", reason="it writes .pt files")

    class Trap:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    torch.save(
        {"state_dict": {"visual.conv1.weight": torch.ones(1)}, "trap": Trap()}, tmp_path / "x.pt"
    )
    with pytest.raises(CheckpointError, match="x.pt"):
        open_model(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


def test_a_large_file_is_recognised_by_its_headers_alone(tmp_path, monkeypatch):
    """The numbers of this one are not there at all: reading one would fail."""
    path = write(tmp_path / "siglip.npz", FILES["siglip.npz"][0])
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("t.npy").header_offset
    content = bytearray(path.read_bytes())
    data = content.index(np.ones(1, np.float32).tobytes(), place)
    content[data : data + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert rows(path) == [big_vision]
