"""Placement: the same training on every mesh, what FSDP splits, and the rules that say so."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from marks import long

from mammut.config import (
    ComputeConfig,
    DataConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from mammut.core import sharding
from mammut.core.sharding import partition_spec
from mammut.models.flops import num_params
from mammut.models.losses import caption_sum
from mammut.performance.hlo import Program
from mammut.testing import tiny_batch, tiny_config, tiny_model
from mammut.training.optimizer import make_optimizer
from mammut.training.step import TrainState, make_trainer
from mammut.training.tasks import ImageTextTask

# Half as deep as `tiny_config`, which compiles faster.
MODEL = dataclasses.replace(
    tiny_config(), text=dataclasses.replace(tiny_config().text, depth=2, cross_attn_every=1)
)
CONFIG = TrainConfig(
    model=MODEL,
    data=DataConfig(batch_size=16),
    optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.1),
    steps=10,
)
STEPS = 4
MESHES = {
    "one device": MeshConfig(),
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "2 x 2 x 2": MeshConfig(data=2, fsdp=2, model=2),
}


def uneven_batch() -> dict[str, np.ndarray]:
    """Of 8 devices with 2 rows each, the first has captions of 3 tokens, the others of 12."""
    batch = tiny_batch(batch_size=16)
    length = np.where(np.arange(16) < 2, 3, 12)[:, None]
    valid = np.arange(12) < length
    tokens = np.random.default_rng(0).integers(3, 60, (16, 12), np.int32)
    return {
        "image": batch["image"],
        "tokens": np.where(valid, tokens, 0).astype(np.int32),
        "text_valid": valid,
    }


@dataclasses.dataclass
class Run:
    """A few steps on one mesh."""

    trainer: object
    state: TrainState  # on the devices, after STEPS steps
    metrics: list[dict[str, float]]
    uneven: dict[str, float]  # metrics of the uneven batch, from the first parameters
    text: str  # the compiled step


@functools.cache
def run(name: str) -> Run:
    devices = jax.devices()[:1] if name == "one device" else jax.devices()
    mesh = sharding.make_mesh(MESHES[name], devices)
    trainer = make_trainer(CONFIG, ImageTextTask(CONFIG.loss), mesh)
    params = nnx.to_pure_dict(nnx.state(tiny_model(MODEL), nnx.Param))
    zero = np.int32(0)
    begun = TrainState(
        zero, params, make_optimizer(CONFIG.optimizer, CONFIG.steps).init(params), zero, zero
    )

    def place():
        host = jax.tree.map(np.array, begun)
        return jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding), host, trainer.abstract_state
        )

    with jax.set_mesh(mesh):
        batches = [
            sharding.device_batch(tiny_batch(batch_size=16, seed=seed), mesh)
            for seed in range(STEPS)
        ]
        step = trainer.step.lower(place(), batches[0]).compile()
        uneven = jax.device_get(step(place(), sharding.device_batch(uneven_batch(), mesh))[1])
        state, metrics = place(), []
        for batch in batches:
            state, values = step(state, batch)
            metrics.append(jax.device_get(values))
    return Run(trainer, state, metrics, uneven, step.as_text())


def by_name(tree) -> dict:
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


# --- the same training on every mesh


@pytest.mark.parametrize("name", [long("data 8"), "fsdp 8", long("2 x 2 x 2")])
def test_a_mesh_of_devices_trains_as_one_device_does(name):
    one, many = run("one device"), run(name)
    for step, (metrics, expected) in enumerate(zip(many.metrics, one.metrics, strict=True)):
        for loss in ("loss_contrastive", "loss_caption"):
            assert metrics[loss] == pytest.approx(expected[loss], rel=1e-5), (
                f"{loss} of step {step}"
            )
        assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert one.metrics[-1]["loss"] < one.metrics[0]["loss"] - 0.1
    # Adam's moments are sums of gradients and of their squares: equal when every gradient was.
    for moment, tolerance in (("mu", 1e-4), ("nu", 1e-4)):
        expected, got = (by_name(getattr(r.state.opt_state[1], moment)) for r in (one, many))
        for leaf, want in expected.items():
            want = np.asarray(want)
            assert np.abs(np.asarray(got[leaf]) - want).max() <= tolerance * max(
                np.abs(want).max(), 1e-3
            ), leaf
    expected, got = by_name(one.state.params), by_name(many.state.params)
    for leaf, want in expected.items():
        # no score depends on it: its gradient is rounding, and Adam makes steps of that
        if "key']['bias" not in leaf:
            apart = np.abs(np.asarray(got[leaf]) - np.asarray(want))
            assert apart.max() < CONFIG.optimizer.learning_rate and np.median(apart) < 1e-6, leaf


@pytest.mark.parametrize("name", [long("data 8"), "fsdp 8"])
def test_the_caption_loss_is_a_mean_over_tokens_not_over_devices(name):
    batch = uneven_batch()
    graphdef, params = nnx.split(tiny_model(MODEL))

    @jax.jit
    def logits(params):
        return nnx.merge(graphdef, params).caption_logits(*map(jax.numpy.asarray, batch.values()))

    scores = np.asarray(logits(params), np.float64)[:, :-1]
    scores -= scores.max(-1, keepdims=True)
    nats = (
        np.log(np.exp(scores).sum(-1))
        - np.take_along_axis(scores, batch["tokens"][:, 1:, None], -1)[..., 0]
    )
    counted = batch["text_valid"][:, 1:]
    per_token = nats[counted].mean()
    devices = [slice(i, i + 2) for i in range(0, 16, 2)]
    per_device = np.mean([nats[rows][counted[rows]].mean() for rows in devices])
    assert abs(per_device / per_token - 1) > 1e-3
    assert run(name).uneven["loss_caption"] == pytest.approx(per_token, rel=1e-5)
    assert run("one device").uneven["loss_caption"] == pytest.approx(per_token, rel=1e-5)


# --- what FSDP splits


def test_fsdp_keeps_an_eighth_of_every_kernel_and_of_both_its_moments_on_a_device():
    state = run("fsdp 8").state
    moments = state.opt_state[1]
    for tree in (state.params, moments.mu, moments.nu):
        whole = split = 0
        for leaf, x in by_name(tree).items():
            local = x.addressable_shards[0].data
            assert len(x.addressable_shards) == 8
            if "kernel" in leaf or "embed" in leaf and "bias" not in leaf:
                assert local.nbytes * 8 == x.nbytes, leaf
                split += x.nbytes
            else:
                assert local.shape == x.shape, leaf
                whole += x.nbytes
        assert split > 20 * whole


@pytest.mark.long
def test_data_parallelism_keeps_every_parameter_whole():
    for leaf, x in by_name(run("data 8").state.params).items():
        assert x.addressable_shards[0].data.shape == x.shape, leaf


@pytest.mark.long
def test_heads_mlp_and_vocabulary_are_split_over_the_model_axis():
    params = run("2 x 2 x 2").state.params
    vision = params["vision"]["layers"]
    assert vision["attn"]["query"]["kernel"].sharding.spec == PartitionSpec(
        None, "fsdp", "model", None
    )
    assert vision["attn"]["out"]["kernel"].sharding.spec == PartitionSpec(
        None, "model", None, "fsdp"
    )
    assert vision["mlp"]["up"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "model")
    assert params["text"]["token_embed"]["embedding"].sharding.spec == PartitionSpec(
        "model", "fsdp"
    )
    # Three heads do not split in two.
    query = params["text"]["layers"]["attn"]["query"]["kernel"]
    assert query.shape[2] == 3 and query.sharding.spec == PartitionSpec(None, "fsdp", None, None)


@functools.cache
def fsdp_program(passes: str, accumulation: int) -> Program:
    """The step over 8 devices that split the parameters, compiled."""
    config = dataclasses.replace(
        CONFIG, compute=ComputeConfig(passes=passes), accumulation=accumulation
    )
    if config == CONFIG:
        return Program(run("fsdp 8").text)
    mesh = sharding.make_mesh(MESHES["fsdp 8"])
    trainer = make_trainer(config, ImageTextTask(config.loss), mesh)
    with jax.set_mesh(mesh):
        batch = sharding.device_batch(tiny_batch(batch_size=16), mesh)
        return Program(trainer.step.lower(trainer.abstract_state, batch).compile().as_text())


@pytest.mark.parametrize(
    "passes, accumulation", [("two_calls", 1), ("fused", 1), long("two_calls", 2)]
)
def test_the_fsdp_step_gathers_and_reduces_and_never_reshuffles(passes, accumulation):
    program = fsdp_program(passes, accumulation)
    kinds = {collective.kind for collective in program.collectives()}
    assert "all-gather" in kinds and kinds & {"all-reduce", "reduce-scatter"}
    assert kinds <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert program.unknown_loops == 0


def test_fused_passes_gather_the_decoders_weights_half_as_often():
    text = CONFIG.model.text
    own = {
        text.width,
        text.mlp_dim,
        text.num_heads,
        text.width // text.num_heads,
        text.depth,
        text.num_cross_layers,
        1,
    }

    def gathered(passes):  # bytes of what has the decoder's sizes, and no others
        collectives = [c for c in fsdp_program(passes, 1).collectives() if c.kind == "all-gather"]
        mine = [
            c for c in collectives if all(set(s.dims) <= own and len(s.dims) > 1 for s in c.shapes)
        ]
        return sum(c.runs * c.bytes for c in mine)

    assert gathered("fused") < 0.7 * gathered("two_calls")


@pytest.mark.long
def test_a_vocabulary_split_over_the_model_axis_is_never_gathered_and_its_gradient_reduced_once():
    mesh, vocab, width = sharding.make_mesh(MESHES["2 x 2 x 2"]), 1_000, 32
    table = jax.sharding.NamedSharding(
        mesh, partition_spec(("vocab", "embed"), (vocab, width), mesh)
    )
    rows = sharding.batch_sharding(mesh)

    def loss(table, features, labels, mask):
        # in four chunks
        options = LossConfig(vocab_chunk=4).caption_options
        return caption_sum(features, table.T, None, labels, mask, **options)

    args = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((vocab, width), float),
            ((16, 16, width), float),
            ((16, 16), int),
            ((16, 16), bool),
        )
    ]
    with jax.set_mesh(mesh):
        step = jax.jit(
            jax.value_and_grad(loss, argnums=(0, 1)), in_shardings=(table, rows, rows, rows),
            out_shardings=(None, (table, rows)),
        )  # fmt: skip
        program = Program(step.lower(*args).compile().as_text())
    sizes = [
        (c, max(size for s in c.shapes for size in (*s.dims, 0))) for c in program.collectives()
    ]
    with_vocabulary = [c for c, size in sizes if size >= vocab // 2]
    assert max(size for _, size in sizes) == vocab // 2
    # neighbours share the model axis
    assert all(c.group[1] - c.group[0] > 1 for c in with_vocabulary)
    assert {c.kind for c in with_vocabulary} <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert sum(c.runs for c in with_vocabulary if c.kind != "all-gather") == 1
    # The whole step: no array that is exchanged has the vocabulary as a dimension.
    whole = Program(run("2 x 2 x 2").text).collectives()
    assert not [c for c in whole if any(CONFIG.model.text.vocab_size in s.dims for s in c.shapes)]


@pytest.mark.long
def test_data_parallelism_gathers_no_parameter_and_fsdp_does():
    shapes = {tuple(x.shape) for x in jax.tree.leaves(run("data 8").state.params) if x.ndim > 1}

    def gathered(name):
        found = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", run(name).text)
        return shapes & {tuple(map(int, dims.split(","))) for dims in found}

    assert gathered("fsdp 8") and not gathered("data 8")


def test_adafactors_moment_is_split_as_its_parameter_and_its_factors_are_whole():
    config = dataclasses.replace(CONFIG, optimizer=OptimizerConfig("adafactor"))
    mesh = sharding.make_mesh(MESHES["fsdp 8"])
    abstract = make_trainer(config, ImageTextTask(config.loss), mesh).abstract_state
    specs = {
        leaf: x.sharding.spec for leaf, x in by_name(abstract).items() if "['up']['kernel']" in leaf
    }
    expected = PartitionSpec(None, "fsdp", None)
    # three layers' worth of parameters, and as many averages of their updates
    assert sum(spec == expected for leaf, spec in specs.items() if leaf.startswith(".params")) == 3
    assert sum(spec == expected for leaf, spec in specs.items() if ".ema" in leaf) == 3
    factors = [spec for leaf, spec in specs.items() if ".v_row" in leaf or ".v_col" in leaf]
    assert len(factors) == 6 and set(factors) == {PartitionSpec()}


# --- the rules


@pytest.mark.parametrize("axes, shape, spec", [
    (("embed", "mlp"), (8, 8), ("fsdp", "model")),
    (("mlp", "embed"), (8, 8), ("model", "fsdp")),
    (("layer", "embed", "heads", "head_size"), (6, 8, 4, 2), (None, "fsdp", "model", None)),
    (("batch", "text", "embed"), (8, 6, 8), (("data", "fsdp"), None, None)),  # the batch was first
    (("batch", None, "mlp"), (8, 6, 8), (("data", "fsdp"), None, "model")),
    (("embed", "shared"), (8, 8), ("fsdp", None)),  # both want fsdp
    (("heads", "vocab"), (4, 4), ("model", None)),
    (("embed", "heads"), (7, 3), (None, None)),  # odd sizes stay whole
    (("shared", "embed"), (7, 8), (None, "fsdp")),  # and leave their mesh axis to the next
    (("batch",), (2,), ("data",)),  # 2 rows split once
    (("batch",), (3,), (None,)),
    ((None, None), (8, 8), (None, None)),
])  # fmt: skip
def test_a_mesh_axis_is_used_once_from_the_left_where_it_divides(axes, shape, spec):
    mesh = sharding.make_mesh(MESHES["2 x 2 x 2"])
    assert partition_spec(axes, shape, mesh) == PartitionSpec(*spec)


def test_a_mesh_axis_of_one_device_is_not_named():
    mesh = sharding.make_mesh(MESHES["data 8"])
    assert partition_spec(("embed", "mlp"), (8, 8), mesh) == PartitionSpec(None, None)
    assert partition_spec(("batch", "embed"), (8, 8), mesh) == PartitionSpec("data", None)


def test_an_axis_that_no_rule_names_is_an_error():
    with pytest.raises(KeyError, match="colour"):
        partition_spec(("colour",), (8,), sharding.make_mesh(MeshConfig()))


def test_without_a_mesh_nothing_is_constrained():
    x = jax.numpy.zeros((2, 3))
    assert sharding.constrain(x, "batch", "embed") is x


@pytest.mark.parametrize("config, sizes", [
    (MeshConfig(), (8, 1, 1)),
    (MeshConfig(data=2, fsdp=-1), (2, 4, 1)),
    (MeshConfig(data=1, fsdp=2, model=-1), (1, 2, 4)),
    (MeshConfig(data=-1, fsdp=8), (1, 8, 1)),
    (MeshConfig(data=2, fsdp=2, model=2), (2, 2, 2)),
])  # fmt: skip
def test_minus_one_takes_the_devices_that_are_left(config, sizes):
    assert config.sizes(8) == sizes
    assert tuple(sharding.make_mesh(config).shape.values()) == sizes


@pytest.mark.parametrize(
    "sizes",
    [
        (3, 1, 1),
        (-1, 3, 1),
        (-1, -1, 1),
        (2, 2, 1),
        (16, 1, 1),
        (0, 1, 1),
        (-1, 0, 1),
        (-2, -4, 1),
        (-1, -8, 1),
    ],
)
def test_sizes_that_do_not_make_up_the_devices_are_refused(sizes):
    with pytest.raises(ValueError, match=rf"^mesh.* {' x '.join(map(str, sizes))}, .* 8 devices$"):
        sharding.make_mesh(MeshConfig(*sizes))


def test_a_batch_that_does_not_split_over_the_devices_is_refused_by_its_field():
    # 4 shares: the model axis does not split the batch
    mesh = sharding.make_mesh(MESHES["2 x 2 x 2"])
    for size, accumulation in ((18, 1), (24, 4)):
        config = dataclasses.replace(
            CONFIG, data=DataConfig(batch_size=size), accumulation=accumulation
        )
        with pytest.raises(
            ValueError,
            match=rf"^data.batch_size.* {size // accumulation} does not divide over the 4",
        ):
            make_trainer(config, ImageTextTask(CONFIG.loss), mesh)
    sharding.require_divisible(24, mesh, "data.eval_batch_size")
    with pytest.raises(ValueError, match="^data.eval_batch_size 25 "):
        sharding.require_divisible(25, mesh, "data.eval_batch_size")


# --- batches and the report


def test_a_batch_arrives_whole_and_split_by_rows():
    mesh = sharding.make_mesh(MESHES["2 x 2 x 2"])
    rows = np.arange(24).reshape(8, 3)
    for placed in (
        sharding.device_batch({"x": rows}, mesh)["x"],
        sharding.global_batch(rows, mesh),
    ):
        np.testing.assert_array_equal(placed, rows)
        assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}


def test_the_placement_report_adds_up_to_the_model():
    trainer = run("fsdp 8").trainer
    params = trainer.abstract_state.params
    report = sharding.placement_report(params, jax.tree.map(lambda x: x.sharding, params))
    rows = [line.split() for line in report.splitlines()[1:]]
    counts = {row[0]: int(row[1].replace(",", "")) for row in rows}
    total = counts.pop("total")
    expected = num_params(CONFIG.model)
    assert total == sum(counts.values()) == expected["total"]
    assert counts["text.token_embed"] == expected["token_embed"] == 60 * 48
    megabytes, local = map(float, rows[-1][2:4])
    assert megabytes == pytest.approx(4 * total / 1e6, abs=0.05)
    on_first = sum(
        x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(run("fsdp 8").state.params)
    )
    assert local == pytest.approx(on_first / 1e6, abs=0.05)
    assert all(
        "fsdp" in line for line in report.splitlines() if "layers" in line or "kernel" in line
    )
