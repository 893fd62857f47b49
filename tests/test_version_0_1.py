"""Files that version 0.1.0 wrote, before the library had folders.

Its models load to the same numbers, and a run of it goes on.

The archive holds three model folders (a MaMMUT, a CoCa, a MAGMA with an adapter), what the version
itself gave for two pictures and two texts, and a run of six steps as a kill after its third leaves
it, with the losses of all six.
"""

import json
import pathlib
import shutil
import sys
import tarfile

import numpy as np
import pytest
from marks import long

import mammut

ROOT = pathlib.Path(__file__).parents[1]
ARCHIVE = pathlib.Path(__file__).parent / "data" / "version_0_1.tar.xz"
IMAGES = [
    np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3),
    np.full((16, 16, 3), 90, np.uint8),
]
TEXTS = ["one red circle on the left", "one blue square"]


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("version_0_1")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("name", [long("mammut"), long("coca"), "magma"])
def test_a_model_folder_gives_the_numbers_that_it_gave(old, name):
    expected = json.loads((old / "expected.json").read_text())[name]
    model, processor = mammut.load(old / name)
    batch = processor(images=IMAGES, text=TEXTS)
    logits = model.caption_logits(batch["image"], batch["tokens"], batch["text_valid"])
    np.testing.assert_allclose(logits[:, :, :8], expected["logits"], atol=2e-5)
    if name != "magma":  # it has no contrastive pass
        text_embed = model.encode_text(batch["tokens"], batch["text_valid"])
        np.testing.assert_allclose(text_embed, expected["text_embed"], atol=1e-6)
        np.testing.assert_allclose(
            model.encode_image(batch["image"]), expected["image_embed"], atol=1e-6
        )
    assert mammut.caption(model, processor, IMAGES) == expected["captions"]


@pytest.mark.long
def test_a_run_goes_on_as_it_would_have_gone_on(old, monkeypatch):
    """A run of version 0.1.0 goes on with the same losses.

    It has a frozen part, learning rates of its own for some layers, and the random crops of its
    seed.
    """
    monkeypatch.syspath_prepend(str(ROOT))
    import train

    workdir = old / "resumed"
    shutil.copytree(old / "run", workdir)
    losses = [
        json.loads(line)["train/loss"]
        for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]
    monkeypatch.setattr(sys, "argv", ["train.py"])
    train.main(["--workdir", str(workdir), "--resume"])
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    resumed = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    np.testing.assert_allclose([resumed[step] for step in range(1, 7)], losses, rtol=1e-5)
