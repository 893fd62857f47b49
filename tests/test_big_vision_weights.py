"""Weights of big_vision's models.

Their numerics are written once more in Flax Linen, whose modules name their parameters as
big_vision's do.
"""

import functools
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.ndimage
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from marks import long

from mammut.models.image_encoder import EncoderOutput
from mammut.models.mammut import MaMMUT
from mammut.weights.files.tensor_file import CheckpointError, TensorSpec
from mammut.weights.formats import big_vision
from mammut.weights.formats.big_vision import open_model
from mammut.weights.formats.big_vision_arrays import Arrays
from mammut.weights.formats.big_vision_tables import cappa, two_towers
from mammut.weights.model_folder import load, place, save
from mammut.weights.opened import OpenedModel
from mammut.weights.tables import Table

SIZE, PATCH, WIDTH, TEXT_WIDTH, LENGTH, VOCAB = 24, 8, 32, 24, 10, 61
DECODER_WIDTH = 40  # of captions
IMAGE_DEPTH, TEXT_DEPTH = 3, 2


class MlpBlock(nn.Module):
    size: int
    bias: bool = True

    @nn.compact
    def __call__(self, x):
        hidden = nn.gelu(nn.Dense(self.size, use_bias=self.bias)(x))
        return nn.Dense(x.shape[-1], use_bias=self.bias)(hidden)


class Encoder1DBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(y, y)
        return x + MlpBlock(80)(nn.LayerNorm()(x))


class Encoder(nn.Module):
    depth: int

    @nn.compact
    def __call__(self, x):
        for i in range(self.depth):
            x = Encoder1DBlock(name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class MAPHead(nn.Module):
    @nn.compact
    def __call__(self, x):
        probe = self.param("probe", nn.initializers.normal(), (1, 1, x.shape[-1]))
        probe = jnp.broadcast_to(probe, (len(x), 1, x.shape[-1]))
        x = nn.MultiHeadDotProductAttention(num_heads=4)(probe, x)
        return (x + MlpBlock(80)(nn.LayerNorm()(x)))[:, 0]


class Vit(nn.Module):
    """Returns the patches and the image: both for `pool` "mean", "class" or "map"."""

    pool: str
    head: int | None = None
    learned: bool = True

    @nn.compact
    def __call__(self, image):
        x = nn.Conv(WIDTH, (PATCH, PATCH), (PATCH, PATCH), padding="VALID", name="embedding")(image)
        x = x.reshape(len(x), -1, WIDTH)
        if self.learned:
            x = x + self.param("pos_embedding", nn.initializers.normal(), (1, x.shape[1], WIDTH))
        else:
            x = x + positions_by_the_formula(SIZE // PATCH, SIZE // PATCH, WIDTH)
        if self.pool == "class":
            first = self.param("cls", nn.initializers.normal(), (1, 1, WIDTH))
            x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, WIDTH)), x], axis=1)
        x = Encoder(IMAGE_DEPTH, name="Transformer")(x)
        pooled = (
            x.mean(1) if self.pool == "mean" else x[:, 0] if self.pool == "class" else MAPHead()(x)
        )
        patches = x[:, 1:] if self.pool == "class" else x
        return patches, pooled if self.head is None else nn.Dense(self.head, name="head")(pooled)


class TextTower(nn.Module):
    head: int | None

    @nn.compact
    def __call__(self, text):
        x = nn.Embed(VOCAB, TEXT_WIDTH)(text)
        x = x + self.param("pos_embedding", nn.initializers.normal(), (1, LENGTH, TEXT_WIDTH))
        x = Encoder(TEXT_DEPTH)(x)[:, -1]
        return x if self.head is None else nn.Dense(self.head, name="head")(x)


class Siglip(nn.Module):
    pool: str = "map"
    heads: tuple = (None, WIDTH)

    @nn.compact
    def __call__(self, image, text):
        self.param("t", nn.initializers.normal(), (1,))
        self.param("b", nn.initializers.normal(), (1,))
        embeds = (
            Vit(self.pool, self.heads[0], name="img")(image)[1],
            TextTower(self.heads[1], name="txt")(text),
        )
        return [z / jnp.linalg.norm(z, axis=1, keepdims=True) for z in embeds]


class EncDecBlock(nn.Module):
    bias: bool

    @nn.compact
    def __call__(self, x, image, mask):
        y = nn.LayerNorm(use_bias=self.bias, name="LayerNorm1")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, use_bias=False, name="SelfAttn")(
            y, y, mask=mask
        )
        y = nn.LayerNorm(use_bias=self.bias, name="LayerNorm2")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, use_bias=False, name="CrossAttn")(
            y, image
        )
        return x + MlpBlock(72, self.bias, name="MLP")(
            nn.LayerNorm(use_bias=self.bias, name="LayerNorm3")(x)
        )


class Decoder(nn.Module):
    bias: bool
    masked: bool

    @nn.compact
    def __call__(self, image, text, positions):
        start = jnp.zeros_like(text[:, :1])
        shifted = jnp.concatenate([start, text[:, :-1]], axis=1)
        x = nn.Embed(VOCAB + self.masked, DECODER_WIDTH, name="EmbedTargets")(shifted) + positions
        mask = nn.make_causal_mask(text)
        for i in range(TEXT_DEPTH):
            x = EncDecBlock(self.bias, name=f"EncDecBlock{i}")(x, image, mask)
        return nn.Dense(VOCAB, name="LogitsDense")(nn.LayerNorm(name="LayerNorm")(x))


class Cappa(nn.Module):
    bias: bool = True
    masked: bool = False
    learned: bool = True

    @nn.compact
    def __call__(self, image, text):
        encoded = Vit("mean", learned=self.learned, name="encoder")(image)[0]
        positions = positions_by_the_formula(1, LENGTH, DECODER_WIDTH)
        if self.learned:
            positions = self.param(
                "pos_embedding_decoder", nn.initializers.normal(), (1, LENGTH, DECODER_WIDTH)
            )
        return Decoder(self.bias, self.masked, name="decoder")(encoded, text, positions)


def positions_by_the_formula(down: int, across: int, width: int) -> np.ndarray:
    rows = []
    for y in range(down):
        for x in range(across):
            turns = [10_000 ** (-i / (width // 4 - 1)) for i in range(width // 4)]
            rows.append([f(at * turn) for at in (x, y) for f in (np.sin, np.cos) for turn in turns])
    return np.array(rows, np.float32)


def image_and_text() -> tuple[np.ndarray, np.ndarray]:
    """Texts end in ends, as SigLIP's do, but for the last."""
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (3, SIZE, SIZE, 3)).astype(np.float32)
    text = rng.integers(0, VOCAB, (3, LENGTH), np.int32)
    text[0, 4:] = text[1, 7:] = 1
    return image, text


def arrays_of(module: nn.Module, *args) -> dict[str, np.ndarray]:
    """Random parameters of a module, flat."""
    shapes = flatten_dict(jax.eval_shape(module.init, jax.random.key(0), *args)["params"], sep="/")
    rng = np.random.default_rng(1)
    arrays = {}
    for name, leaf in shapes.items():
        values = rng.normal(size=leaf.shape) * (0.3 if leaf.ndim > 1 else 0.2) + name.endswith(
            "scale"
        )
        arrays[name] = values.astype(np.float32)
    return arrays


def arrays_and_outputs(module: nn.Module, *args) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Random parameters of a module, and what it makes of `args` with them."""
    arrays = arrays_of(module, *args)
    return arrays, outputs_of(module, arrays, *args)


@functools.partial(jax.jit, static_argnums=0)
def _applied(module: nn.Module, params: dict, *args):
    """Compiled once for all tests with the same module."""
    return module.apply({"params": params}, *args)


def outputs_of(module: nn.Module, arrays: dict[str, np.ndarray], *args) -> list[np.ndarray]:
    with jax.default_matmul_precision("highest"):
        outputs = _applied(module, unflatten_dict(arrays, sep="/"), *args)
    return [np.asarray(x) for x in jax.tree.leaves(outputs)]


def written(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> pathlib.Path:
    np.savez(folder / "model.npz", **arrays)
    return folder / "model.npz"


@functools.partial(jax.jit, static_argnums=(0, 1))
def _called(method: str, graphdef: nnx.GraphDef, params: nnx.State | dict, *args):
    """Compiled once for all tests with the same model."""
    return getattr(nnx.merge(graphdef, params), method)(*args)


def encoded_by(opened: OpenedModel, image: np.ndarray) -> EncoderOutput:
    """What the image encoder alone makes of images."""
    assert opened.parts == ("vision",)
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: MaMMUT(opened.config, rngs=nnx.Rngs(0))).vision
    )

    def read(path, leaf):
        return jnp.asarray(
            opened.tensors.read(".".join(["vision", *(entry.key for entry in path)]))
        )

    params = jax.tree_util.tree_map_with_path(read, nnx.to_pure_dict(state))
    with jax.default_matmul_precision("highest"):
        return _called("__call__", graphdef, params, image)


def called(model: MaMMUT, method: str, *args) -> np.ndarray:
    graphdef, params = nnx.split(model)
    with jax.default_matmul_precision("highest"):
        return np.asarray(_called(method, graphdef, params, *args))


def embeddings(model: MaMMUT, image: np.ndarray, text: np.ndarray) -> list[np.ndarray]:
    return [called(model, "encode_image", image), called(model, "encode_text", text, text != 1)]


def shifted(text: np.ndarray) -> np.ndarray:
    """As our decoder is given a text: with the start, which CapPa puts there itself."""
    return np.concatenate([np.zeros_like(text[:, :1]), text[:, :-1]], axis=1)


def assert_close(ours, theirs) -> None:
    assert np.abs(theirs).max() > 0.1  # else the bound says nothing
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


def scanned(arrays: dict[str, np.ndarray], stem: str, axis: int) -> dict[str, np.ndarray]:
    """The arrays of layers `stem`0, `stem`1, ... stacked on `axis`, as `scan=True` stores them."""
    stacked, rest = {}, {}
    for name, array in arrays.items():
        match = re.fullmatch(rf"(.*{stem})_?(\d+)(/.*)", name)
        if match is None:
            rest[name] = array
        else:
            stacked.setdefault(match[1] + match[3], []).append(array)
    assert stacked
    return rest | {name: np.stack(layers, axis) for name, layers in stacked.items()}


def prefixed(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {f"{prefix}{name}": array for name, array in arrays.items()}


@pytest.mark.parametrize("pool", ["mean", "class", "map"])
def test_an_image_encoder_gives_the_patches_and_the_image_of_its_original(pool, tmp_path):
    image, _ = image_and_text()
    arrays, (patches, pooled) = arrays_and_outputs(Vit(pool), image)
    opened = open_model(
        written(tmp_path, arrays | {"head/kernel": np.ones((WIDTH, 7)), "head/bias": np.ones(7)})
    )
    encoded = encoded_by(opened, image)
    assert_close(encoded.tokens, patches)
    assert_close(encoded.pooled, pooled)
    assert opened.processor is None
    assert "head/kernel, head/bias is not used: of a classifier" in opened.notes


def test_layers_in_one_array_are_the_layers_one_by_one(tmp_path):
    image, _ = image_and_text()
    arrays, (patches, pooled) = arrays_and_outputs(Vit("map"), image)
    encoded = encoded_by(open_model(written(tmp_path, scanned(arrays, "encoderblock", 0))), image)
    assert_close(encoded.tokens, patches)
    assert_close(encoded.pooled, pooled)


OLD_BLOCK = {
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "LayerNorm_1": "LayerNorm_2",
    "MlpBlock_0": "MlpBlock_3",
}


@pytest.mark.parametrize(
    "place", ["Transformer/posembed_input/pos_embedding", "Transformer/pos_embedding"]
)
def test_an_old_file_with_a_position_of_the_class_token_is_read(place, tmp_path):
    """Its blocks count their modules together, and the class token's position comes first."""
    image, _ = image_and_text()
    arrays = arrays_of(Vit("class"), image)
    own = np.full((1, 1, WIDTH), 0.3, np.float32)
    old = {
        re.sub(
            r"(?<=encoderblock_\d/)\w+", lambda match: OLD_BLOCK.get(match[0], match[0]), name
        ): array
        for name, array in arrays.items()
    }
    old[place] = np.concatenate([own, old.pop("pos_embedding")], axis=1)
    patches, pooled = outputs_of(Vit("class"), arrays | {"cls": arrays["cls"] + own}, image)
    encoded = encoded_by(open_model(written(tmp_path, old)), image)
    assert_close(encoded.tokens, patches)
    assert_close(encoded.pooled, pooled)


def test_an_old_file_whose_map_head_is_no_module_is_read(tmp_path):
    image, _ = image_and_text()
    arrays, (_, pooled) = arrays_and_outputs(Vit("map"), image)
    old = {name.removeprefix("MAPHead_0/"): array for name, array in arrays.items()}
    assert_close(encoded_by(open_model(written(tmp_path, old)), image).pooled, pooled)


def test_a_position_of_a_class_token_that_is_not_there_is_left_out(tmp_path):
    image, _ = image_and_text()
    arrays, (patches, _) = arrays_and_outputs(Vit("mean"), image)
    row = np.full((1, 1, WIDTH), 0.3, np.float32)
    opened = open_model(
        written(
            tmp_path,
            arrays | {"pos_embedding": np.concatenate([row, arrays["pos_embedding"]], axis=1)},
        )
    )
    assert_close(encoded_by(opened, image).tokens, patches)
    assert (
        "the first row of pos_embedding is not used: of a class token, which is not there"
        in opened.notes
    )


def test_positions_that_are_computed_are_computed_for_a_given_size(tmp_path):
    image, _ = image_and_text()
    arrays, (patches, _) = arrays_and_outputs(Vit("mean", learned=False), image)
    path = written(tmp_path, arrays)
    assert_close(encoded_by(open_model(path, image_size=SIZE), image).tokens, patches)
    with pytest.raises(
        CheckpointError, match="pos_embedding is missing: if .* say for which image_size"
    ):
        open_model(path)


@pytest.mark.parametrize(
    ("pool", "heads"),
    [
        long("map", (None, WIDTH)),
        ("map", (20, 20)),
        long("mean", (20, 20)),
        ("class", (None, WIDTH)),
    ],
    ids=str,
)
def test_both_towers_give_their_embeddings(pool, heads, tmp_path):
    batch = image_and_text()
    arrays, embeds = arrays_and_outputs(Siglip(pool, heads), *batch)
    model, _ = load(written(tmp_path, arrays))
    for ours, theirs in zip(embeddings(model, *batch), embeds, strict=True):
        assert_close(ours, theirs)
    assert float(model.logit_scale[...]) == arrays["t"][0]  # of both the logarithm
    assert float(model.logit_bias[...]) == arrays["b"][0]


def test_the_parameters_of_a_train_state_are_those_that_are_read(tmp_path):
    batch = image_and_text()
    arrays, embeds = arrays_and_outputs(Siglip(), *batch)
    state = (
        prefixed(arrays, "params/")
        | prefixed(arrays, "opt/0/mu/")
        | {"chrono/examples_seen": np.int64(7)}
    )
    for top in ("params/", "opt/target/"):
        named = {name.replace("params/", top): array for name, array in state.items()}
        path = written(
            tmp_path, scanned(scanned(named, "img/Transformer/encoderblock", 0), "encoderblock", 0)
        )
        opened = open_model(path)
        for ours, theirs in zip(embeddings(place(opened), *batch), embeds, strict=True):
            assert_close(ours, theirs)
        assert any(
            re.match(r"\d+ arrays, opt/0/mu/.* are not used: of the training", note)
            for note in opened.notes
        )


def test_bfloat16_is_widened_exactly(tmp_path):
    """NumPy stores it as two bytes of no type."""
    arrays = arrays_of(Siglip(), *image_and_text())
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    opened = open_model(written(tmp_path, {name: array.view("V2") for name, array in half.items()}))
    wide = tmp_path / "wide"
    wide.mkdir()
    same = open_model(
        written(wide, {name: array.astype(np.float32) for name, array in half.items()})
    )
    for name, spec in opened.tensors.specs.items():
        assert spec.dtype == np.float32
        np.testing.assert_array_equal(opened.tensors.read(name), same.tensors.read(name))


def test_a_model_without_a_bias_has_one_of_zero(tmp_path):
    arrays = arrays_of(Siglip(), *image_and_text())
    del arrays["b"]
    opened = open_model(written(tmp_path, arrays))
    assert opened.tensors.read("logit_bias") == 0
    assert "logit_bias is 0: the model was trained without" in opened.notes


def test_the_image_encoder_of_two_towers_is_a_part_of_their_file(tmp_path):
    image, text = image_and_text()
    arrays = arrays_of(Siglip(), image, text)
    path = written(tmp_path, arrays)
    _, pooled = outputs_of(
        Vit("map"), {n[4:]: array for n, array in arrays.items() if n.startswith("img/")}, image
    )
    opened = open_model(f"{path}:img")
    assert_close(encoded_by(opened, image).pooled, pooled)
    assert any("not used: not of img/" in note for note in opened.notes)


@pytest.mark.parametrize("bias", [long(True), False])
@pytest.mark.parametrize("scan", [True, False])
def test_captions_have_the_logits_of_the_original(bias, scan, tmp_path):
    image, text = image_and_text()
    arrays, (logits,) = arrays_and_outputs(Cappa(bias, masked=scan), image, text)
    if scan:
        arrays = scanned(scanned(arrays, "encoderblock", 0), "EncDecBlock", 1)
    opened = open_model(written(tmp_path, arrays))
    assert_close(called(place(opened), "caption_logits", image, shifted(text)), logits)
    assert any("of masked tokens" in note for note in opened.notes) == scan
    assert any("the last norm alone has a bias" in note for note in opened.notes) != bias


def test_a_caption_model_with_computed_positions_needs_both_sizes(tmp_path):
    image, text = image_and_text()
    arrays, (logits,) = arrays_and_outputs(Cappa(learned=False), image, text)
    path = written(tmp_path, arrays)
    model = place(open_model(path, image_size=SIZE, max_length=LENGTH))
    assert_close(called(model, "caption_logits", image, shifted(text)), logits)
    with pytest.raises(
        CheckpointError, match="pos_embedding_decoder is missing.*max_length; .*image_size"
    ):
        open_model(path)


def test_an_image_that_is_larger_than_its_patches_gives_what_the_original_gives(tmp_path):
    """As So400m/14 of SigLIP: 384 pixels, of which 27 patches of 14 cover 378."""
    image, text = image_and_text()
    larger = np.random.default_rng(2).uniform(-1, 1, (3, 30, 30, 3)).astype(np.float32)
    arrays, embeds = arrays_and_outputs(Siglip(), larger, text)
    path = written(tmp_path, arrays)
    model, processor = load(path, image_size=30)
    vision = model.config.vision
    assert (vision.image_size, vision.grid, vision.cut_rest) == (30, (3, 3), True)
    assert processor.image.image_size == 30
    assert_close(called(model, "encode_image", larger), embeds[0])
    assert load(path)[0].config.vision.image_size == SIZE
    assert load(path, image_size=40)[0].config.vision.grid == (5, 5)
    save(tmp_path / "ours", model, processor)
    ours, again = load(tmp_path / "ours")
    assert ours.config == model.config and again.image == processor.image


def test_the_published_size_is_taken_where_it_is_no_multiple_of_the_patch_size(tmp_path):
    arrays = arrays_of(Siglip(), *image_and_text())
    kernel = np.ones((14, 14, 3, WIDTH), np.float32)
    positions = np.ones((1, 27 * 27, WIDTH), np.float32)
    path = written(
        tmp_path, arrays | {"img/embedding/kernel": kernel, "img/pos_embedding": positions}
    )
    opened = open_model(path)
    assert opened.config.vision.image_size == opened.processor.image.image_size == 384
    assert opened.config.vision.grid == (27, 27)
    [note] = [note for note in opened.notes if "image_size" in note]
    assert note.startswith("vision.image_size is 384, as published for 27 x 27 patches of 14")
    assert open_model(path, image_size=378).config.vision.image_size == 378
    larger = load(path, image_size=448)[0].config.vision
    assert (larger.image_size, larger.grid) == (448, (32, 32))


def test_positions_are_resampled_to_another_image_size_with_corners_on_corners(tmp_path):
    image, text = image_and_text()
    arrays = arrays_of(Siglip(), image, text)
    path = written(tmp_path, arrays)
    larger = np.random.default_rng(2).uniform(-1, 1, (2, 40, 40, 3)).astype(np.float32)
    grid = scipy.ndimage.zoom(
        arrays["img/pos_embedding"].reshape(3, 3, WIDTH), (5 / 3, 5 / 3, 1), order=1
    )
    arrays["img/pos_embedding"] = grid.reshape(1, 25, WIDTH)
    embeds = outputs_of(Siglip(), arrays, larger, text[:2])
    model, processor = load(path, image_size=40)
    assert_close(called(model, "encode_image", larger), embeds[0])
    assert processor.image.image_size == 40


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> bytes:
    """Of the kind that big_vision uses: pad 0, end 1, unknown 2, and no start."""
    import sentencepiece

    stem = tmp_path_factory.mktemp("vocabulary") / "v"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle on a green square", "two dogs run in the snow"]),
        model_prefix=str(stem),
        vocab_size=40,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return stem.with_suffix(".model").read_bytes()


def test_texts_of_two_towers_end_in_ends_and_have_no_start(vocabulary, tmp_path):
    arrays = arrays_of(Siglip(), *image_and_text())
    path = written(tmp_path, arrays)
    (tmp_path / "cc_en.model").write_bytes(vocabulary)
    model, processor = load(path)
    ids = processor.tokenizer.encode("red dogs")
    batch = processor(text=["Red DOGS", "a red circle on a green square on a red circle", ""])
    assert batch["tokens"][0].tolist() == ids + [1] * (LENGTH - len(ids))
    assert batch["tokens"][1, -1] == 1 and 1 not in batch["tokens"][1, :-1]
    assert batch["tokens"][2].tolist() == [1] * LENGTH
    save(tmp_path / "saved", model, processor)
    again, restored = load(tmp_path / "saved")
    np.testing.assert_array_equal(restored(text=["Red DOGS"])["tokens"], batch["tokens"][:1])
    np.testing.assert_array_equal(again.text.pos_embed[...], model.text.pos_embed[...])


def test_texts_of_captions_start_with_zero(vocabulary, tmp_path):
    arrays = arrays_of(Cappa(), *image_and_text())
    path = written(tmp_path, arrays)
    (tmp_path / "cc_en.model").write_bytes(vocabulary)
    _, processor = load(path)
    ids = processor.tokenizer.encode("red dogs")
    assert processor(text=["red dogs"])["tokens"][0].tolist() == [0, *ids, 1] + [0] * (
        LENGTH - len(ids) - 2
    )


def test_without_a_vocabulary_texts_alone_are_refused(vocabulary, tmp_path):
    arrays = arrays_of(Siglip(), *image_and_text())
    path = written(tmp_path, arrays)
    processor = open_model(path).processor
    assert processor(images=[np.zeros((30, 50, 3), np.uint8)])["image"].shape == (1, SIZE, SIZE, 3)
    with pytest.raises(ValueError, match=f"one \\*.model file, beside {path} \\(there is none\\)"):
        processor(text=["a dog"])
    for name in ("a.model", "b.model"):
        (tmp_path / name).write_bytes(vocabulary)
    with pytest.raises(ValueError, match="there are a.model, b.model"):
        open_model(path).processor(text=["a dog"])
    (tmp_path / "b.model").unlink()
    (tmp_path / "a.model").write_bytes(b"no vocabulary")
    with pytest.raises(CheckpointError, match="a.model cannot be used"):
        open_model(path)


def test_a_file_with_more_layers_than_any_model_is_refused_at_once(tmp_path):
    arrays = siglip() | {
        f"{BLOCK[:-1]}{i}/LayerNorm_0/scale": np.ones(WIDTH, np.float32) for i in range(3, 1100)
    }
    with pytest.raises(CheckpointError, match="VisionConfig.depth is 1100, expected at most 1024"):
        open_model(written(tmp_path, arrays))


@pytest.mark.parametrize(
    "module", [Siglip("class", (20, 20)), Cappa(bias=False, masked=True)], ids=str
)
def test_the_table_read_the_other_way_gives_the_file(module, tmp_path):
    """But for the row of masked tokens, which our model has not."""
    arrays = arrays_of(module, *image_and_text())
    for name in ("encoderblock", "EncDecBlock") if isinstance(module, Cappa) else ():
        arrays = scanned(arrays, name, int(name == "EncDecBlock"))
    path = written(tmp_path, arrays)
    opened = open_model(path)
    found = Arrays(
        str(path),
        {name: TensorSpec(array.shape, array.dtype) for name, array in arrays.items()},
        "",
    )
    model = cappa(found, None, None) if isinstance(module, Cappa) else two_towers(found)
    table = Table(model.entries, {}, {name: (0.0, why) for name, why in model.zero.items()})
    theirs = table.to_theirs(opened.tensors)
    if isinstance(module, Cappa):
        arrays["decoder/EmbedTargets/embedding"][-1] = 0
    assert theirs.specs.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(theirs.read(name), array, err_msg=name)


def siglip() -> dict[str, np.ndarray]:
    return arrays_of(Siglip(), *image_and_text())


@pytest.mark.long
def test_whatever_array_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(big_vision, "model_specs", functools.cache(big_vision.model_specs))
    # `b` may be missing; the rest is as in `img`
    for make, seen in ((Siglip, "b$|txt/Encoder"), (Cappa, "encoder")):
        arrays = arrays_of(make(), *image_and_text())
        one_of_each = {
            re.sub(r"(encoderblock_|EncDecBlock)\d", r"\1N", name): name for name in arrays
        }
        for name in one_of_each.values():
            if re.match(seen, name):
                continue
            left = {other: array for other, array in arrays.items() if other != name}
            with pytest.raises(CheckpointError, match=f"model.npz .*{re.escape(name)}"):
                open_model(written(tmp_path, left))


def test_every_mismatch_is_named_at_once(tmp_path):
    arrays = siglip()
    block = "img/Transformer/encoderblock_1/MlpBlock_0/Dense_0"
    arrays[f"{block}/kernels"] = arrays.pop(f"{block}/kernel")
    arrays["txt/head/bias"] = np.ones(5, np.float32)
    arrays["img/MAPHead_0/LayerNorm_0/scale"] = np.ones(WIDTH, np.int32)
    with pytest.raises(CheckpointError) as caught:
        open_model(written(tmp_path, arrays))
    for problem in (
        f"{block}/kernel is missing",
        f"{block}/kernels is not a tensor of this model",
        "txt/head/bias is [5], expected [32]",
        "img/MAPHead_0/LayerNorm_0/scale holds int32, expected floats",
    ):
        assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


BLOCK = "img/Transformer/encoderblock_0"
ATTENTION = f"{BLOCK}/MultiHeadDotProductAttention_0"


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("img/embedding/kernel", np.ones((8, 6, 3, WIDTH)),
         r"embedding/kernel is \[8, 6, 3, 32\], expected square"),
        ("img/embedding/kernel", np.ones((8, 8, WIDTH)), r"is \[8, 8, 32\], expected 4 axes"),
        ("img/pos_embedding", np.ones((1, 15, WIDTH)),
         "img/pos_embedding is of 15 positions, expected"),
        ("img/pos_embedding", np.ones((1, 0, WIDTH)),
         r"img/pos_embedding is \[1, 0, 32\], expected 3 axes, none"),
        ("img/pos_embedding", np.ones((1, 40_000**2, 0)),
         r"img/pos_embedding is \[1, 1600000000, 0\]"),
        (f"{ATTENTION}/query/kernel", np.ones((WIDTH, 5, 8)), "not a multiple of num_heads 5"),
        (f"{BLOCK}999/LayerNorm_0/scale", np.ones(WIDTH),
         "encoderblock_0999/LayerNorm_0/scale is not a tensor"),
        (f"{BLOCK[:-1]}3/LayerNorm_0/scale", np.ones(WIDTH),
         "encoderblock_3/LayerNorm_0/bias is missing"),
        ("img/Transformer/encoderblock/LayerNorm_0/scale", np.ones((3, WIDTH)),
         "query/kernel is missing"),
        (f"{BLOCK}/MlpBlock_3/Dense_0/kernel", np.ones((WIDTH, 80)), "are names of the same array"),
        ("txt/MAPHead_0/probe", np.ones((1, 1, TEXT_WIDTH)), "txt/MAPHead_0/: texts are pooled"),
        ("img/pre_logits/kernel", np.ones((WIDTH, WIDTH)), "img/pre_logits/: there is a layer"),
        ("img/cls", np.ones((1, 1, 5)), r"img/cls is \[1, 1, 5\], expected \[1, 1, 32\]"),
        ("t", np.ones(()), r"t is \[\], expected 1 axes"),
        ("surplus", np.ones(2), "surplus is not a tensor of this model"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_model_is_refused_by_name(name, array, message, tmp_path):
    with pytest.raises(CheckpointError, match=f"model.npz .*{message}"):
        open_model(written(tmp_path, siglip() | {name: array.astype(np.float32)}))


def test_a_file_of_anything_else_is_refused(tmp_path):
    for arrays in ({}, {"x": np.ones(3)}, {"params/x": np.ones(3)}):
        with pytest.raises(
            CheckpointError, match="model.npz is no model of big_vision.*kernel is missing"
        ):
            open_model(written(tmp_path, arrays))
    with pytest.raises(CheckpointError, match="model.npz"):
        open_model(written(tmp_path, {"x": np.array([{}], object)}))
    with pytest.raises(CheckpointError, match="missing.npz"):
        open_model(tmp_path / "missing.npz")
