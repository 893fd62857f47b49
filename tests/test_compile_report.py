"""What is read from a compiled program, and the report of a step that has only been compiled."""

import dataclasses
import functools
import importlib.util
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mammut import presets
from mammut.config import (
    ComputeConfig,
    DataConfig,
    DecoderConfig,
    MeshConfig,
    ModelConfig,
    TrainConfig,
    VisionConfig,
)
from mammut.core import sharding
from mammut.models.flops import forward_flops
from mammut.performance import chips
from mammut.performance.chips import Chip, find_chip
from mammut.performance.compile_report import (
    compile_report,
    compile_step,
    estimate,
    step_flops,
    topology_devices,
)
from mammut.performance.hlo import Collective, Program

CONFIG = TrainConfig(
    model=ModelConfig(
        vision=VisionConfig(
            image_size=16, patch_size=8, width=32, depth=1, num_heads=2, mlp_dim=64
        ),
        text=DecoderConfig(vocab_size=64, max_length=8, width=32, depth=2, num_heads=2, mlp_dim=64),
    ),
    data=DataConfig(batch_size=16),
    mesh=MeshConfig(data=1, fsdp=8),
    steps=10,
)


# --- the text of a program


def test_collectives_are_found_with_how_often_they_run_and_what_they_move():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))

    def program(x):  # float32[1, 32] on each of 8 devices
        def turn(_, x):
            return jax.lax.psum(x, "fsdp") * 0.5

        x = jax.lax.fori_loop(0, 5, turn, x)
        gathered = jax.lax.all_gather(x, "data")  # 2 x 128 bytes
        # of 128 bytes
        scattered = jax.lax.psum_scatter(x, ("data", "fsdp"), scatter_dimension=1, tiled=True)
        moved = jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
        swapped = jax.lax.all_to_all(x, "fsdp", split_axis=1, concat_axis=0, tiled=True)
        return gathered.sum() + moved.sum() + scattered.sum() + swapped.max() + x

    split = PartitionSpec(("data", "fsdp"))
    program = jax.jit(
        jax.shard_map(program, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    )
    text = program.lower(jax.ShapeDtypeStruct((8, 32), jnp.float32)).compile().as_text()
    found = {c.kind: c for c in Program(text).collectives()}
    assert {kind: (c.runs, len(c.group), c.bytes, c.sent) for kind, c in found.items()} == {
        "all-reduce": (5, 4, 128, 192),  # 2 x 128 x 3 / 4
        "all-gather": (1, 2, 256, 128),
        "reduce-scatter": (1, 8, 128, 112),
        "collective-permute": (1, 2, 128, 128),
        "all-to-all": (1, 4, 128, 96),
    }
    assert found["all-reduce"].group == (0, 1, 2, 3) and found["all-gather"].group == (0, 4)


# As the TPU compiler writes them: one gather in three fused computations, one of which runs in a
# loop; a reduction that is cut at once; a product taken apart into a loop of permutes.
TPU_TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=8

%start (p.0: bf16[2,64]) -> bf16[16,64] {
  %p.0 = bf16[2,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[16,64]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=7, \
replica_groups=mesh['a'=8] {'a'}
}

%meanwhile (p.1: bf16[2,64]) -> bf16[16,64] {
  %p.1 = bf16[2,64]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[16,64]{1,0} all-gather(%p.1), channel_id=7, \
replica_groups=mesh['a'=8] {'a'}
}

%all-reduce-scatter.5 (p.2: f32[64,64]) -> f32[16,64] {
  %p.2 = f32[64,64]{1,0} parameter(0)
  %all-reduce.5 = f32[64,64]{1,0} all-reduce(%p.2), channel_id=9, \
replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
  %offset = s32[]{:S(4)} constant(0)
  ROOT %cut = f32[16,64]{1,0:S(1)} dynamic-slice(%all-reduce.5, %offset, %offset), \
dynamic_slice_sizes={16,64}
}

%windowed_dot_general_body.3 (t.3: (bf16[16,64], u32[])) -> (bf16[16,64], u32[]) {
  %t.3 = (bf16[16,64]{1,0}, u32[]) parameter(0)
  %x.3 = bf16[16,64]{1,0} get-tuple-element(%t.3), index=0
  %i.3 = u32[] get-tuple-element(%t.3), index=1
  %collective-permute-start = (bf16[16,64]{1,0}, bf16[16,64]{1,0}, u32[]) \
collective-permute-start(%x.3), \
channel_id=11, source_target_pairs={{0,7},{1,0},{2,1}}
  %collective-permute-done = bf16[16,64]{1,0} collective-permute-done(%collective-permute-start)
  ROOT %r.3 = (bf16[16,64]{1,0}, u32[]) tuple(%collective-permute-done, %i.3)
}

%condition (t.4: (bf16[16,64], u32[])) -> pred[] {
  %t.4 = (bf16[16,64]{1,0}, u32[]) parameter(0)
  %i.4 = u32[] get-tuple-element(%t.4), index=1
  %bound = u32[]{:T(128)} constant(6)
  ROOT %less = pred[]{:T(512)} compare(%i.4, %bound), direction=LT
}

%body (t.5: (bf16[2,64], u32[])) -> (bf16[2,64], u32[]) {
  %t.5 = (bf16[2,64]{1,0}, u32[]) parameter(0)
  %x.5 = bf16[2,64]{1,0} get-tuple-element(%t.5), index=0
  %i.5 = u32[] get-tuple-element(%t.5), index=1
  %under-way = bf16[16,64]{1,0} fusion(%x.5), kind=kCustom, calls=%meanwhile
  %inner = (bf16[16,64]{1,0}, u32[]) tuple(%under-way, %i.5)
  %loop.2 = (bf16[16,64]{1,0}, u32[]) while(%inner), condition=%condition, \
body=%windowed_dot_general_body.3
  ROOT %r.5 = (bf16[2,64]{1,0}, u32[]) tuple(%x.5, %i.5)
}

ENTRY %main (x: bf16[2,64], y: f32[64,64], i: u32[]) -> f32[16,64] {
  %x = bf16[2,64]{1,0} parameter(0)
  %y = f32[64,64]{1,0} parameter(1)
  %i = u32[] parameter(2)
  %begun = bf16[16,64]{1,0} fusion(%x), kind=kCustom, calls=%start
  %outer = (bf16[2,64]{1,0}, u32[]) tuple(%x, %i)
  %loop.1 = (bf16[2,64]{1,0}, u32[]) while(%outer), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %token = token[] after-all()
  %send = (f32[64,64]{1,0}, u32[], token[]) send(%y, %token), channel_id=13, \
is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_megascale_transfer_type="ALL_GATHER"}
  ROOT %fusion = f32[16,64]{1,0:S(1)} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.5
}
"""


def test_tpu_programs_are_read_as_what_they_do_and_not_as_they_are_written():
    program = Program(TPU_TEXT)
    found = {c.kind: c for c in program.collectives()}
    assert len(program.collectives()) == len(found) == 4 and program.unknown_loops == 0
    gather, scatter, permute = (
        found[k] for k in ("all-gather", "reduce-scatter", "collective-permute")
    )
    assert (gather.runs, gather.bytes, gather.sent, len(gather.group)) == (
        1,
        16 * 64 * 2,
        14 * 64 * 2,
        8,
    )
    assert (scatter.runs, scatter.bytes, scatter.sent, scatter.group) == (
        1,
        64 * 64 * 4,
        48 * 64 * 4,
        (0, 1, 2, 3),
    )
    assert (permute.runs, permute.bytes, permute.in_product) == (3 * 6, 16 * 64 * 2, True)
    assert (found["send"].runs, found["send"].sent) == (1, 64 * 64 * 4)
    assert not gather.in_product and not scatter.in_product


@pytest.mark.parametrize("groups, expected", [
    ("replica_groups={{0,2},{1,3}}", (0, 2)),
    ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
    ("replica_groups={}", tuple(range(8))),
    ("replica_groups=mesh['x'=2,'y'=4] {'x'}", (0, 4)),
    ("replica_groups=mesh['x'=2,'y'=4] {'x','y'}", tuple(range(8))),
    ("replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", (0, 1, 2, 3)),
    ("replica_groups=mesh['x'=8] {'x':(1)2}", (0, 4)),
    ("replica_groups=mesh['x'=8] {'x':(2)2}", (0, 2)),
])  # fmt: skip
def test_groups_of_devices_are_read_in_every_notation(groups, expected):
    line = f"  ROOT %r = f32[4]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add"
    entry = "ENTRY %main (x: f32[4]) -> f32[4] {\n  %x = f32[4] parameter(0)"
    text = f"HloModule m, num_partitions=8\n{entry}\n{line}\n}}\n"
    (collective,) = Program(text).collectives()
    assert collective.group == expected


def test_a_loop_that_does_not_say_how_often_it_runs_is_told():
    def program(x):
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x * 2, x)

    text = jax.jit(program).lower(jnp.ones(4)).compile().as_text()
    assert Program(text).unknown_loops == 1


def test_bytes_accessed_are_those_of_slices_and_of_every_turn_of_a_loop():
    rows = jax.ShapeDtypeStruct((10, 256, 256), jnp.float32)

    def once(x):
        return x * 2.0

    def ten_times(carry, rows):
        return jax.lax.scan(lambda carry, row: (jnp.sin(carry) + row, None), carry, rows)[0]

    def accessed(function, *args):
        return Program(jax.jit(function).lower(*args).compile().as_text()).bytes_accessed()

    assert accessed(once, rows) == 2 * 10 * 2**18
    carry = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    # A turn reads a row and the carry and writes the carry: three of 2^18 bytes, at most twice that
    # with copies.
    assert 3 * 10 * 2**18 <= accessed(ten_times, carry, rows) <= 6 * 10 * 2**18


# --- FLOPs and the estimate


def test_what_is_computed_again_is_counted_once_and_the_models_flops_never():
    forward = forward_flops(CONFIG.model)
    total = sum(forward.values())
    assert step_flops(CONFIG) == (3 * 16 * total,) * 2
    towers = total - forward["vocabulary"]
    full = dataclasses.replace(CONFIG, compute=ComputeConfig(remat="full"))
    assert step_flops(full) == (3 * 16 * total, 16 * (3 * total + towers))
    accumulated = dataclasses.replace(CONFIG, accumulation=2)
    again = forward["vision"] + forward["contrastive_pass"]
    assert step_flops(accumulated) == (3 * 16 * total, 16 * (3 * total + again))
    caption = dataclasses.replace(CONFIG, task="caption", accumulation=2)
    assert step_flops(caption) == (3 * 16 * (total - forward["contrastive_pass"]),) * 2


@dataclasses.dataclass
class Device:
    """As much of a TPU device as the estimate looks at."""

    coords: tuple[int, int, int]
    slice_index: int = 0


def devices_of(*lengths: int, slices: int = 1) -> list[Device]:
    return [Device(place, s) for s in range(slices) for place in np.ndindex(*lengths)]


def test_traffic_of_gpu_programs_holds_library_calls_and_asynchronous_gathers():
    text = """HloModule m

ENTRY %main (x: f32[64,64], s: f32[4,64]) -> f32[64,64] {
  %x = f32[64,64]{1,0} parameter(0)
  %s = f32[4,64]{1,0} parameter(1)
  %product = f32[64,64]{1,0} custom-call(%x, %x), custom_call_target="__cublas$gemm"
  %mark = f32[64,64]{1,0} custom-call(%product), custom_call_target="Sharding"
  %begun = (f32[4,64]{1,0}, f32[64,64]{1,0}) all-gather-start(%s), channel_id=1, \
replica_groups=[1,16]<=[16], \
dimensions={0}
  ROOT %done = f32[64,64]{1,0} all-gather-done(%begun)
}
""".replace("\\\n", "")
    assert Program(text).bytes_accessed() == 3 * 64 * 64 * 4 + (4 * 64 + 64 * 64) * 4


def test_the_estimate_is_the_roofline_by_hand():
    empty = Program("")
    chip = Chip(flops=1e9, memory=1e9, memory_bandwidth=1e9, link=1e6, network=1e5, ring=4)
    of = functools.partial(Collective, runs=3, shapes=(), in_product=False, source="")
    gather = of("all-gather", group=tuple(range(8)), local=1_000)
    got = estimate(CONFIG, empty, [gather], devices_of(4, 2, 1), chip)
    assert got.compute == pytest.approx(step_flops(CONFIG)[1] / 8 / 1e9)
    assert got.memory == 0
    assert got.links == pytest.approx(3 * 7_000 / 3e6)  # the axis of 4 is a ring, that of 2 is not
    assert got.best == max(got.compute, got.links) and got.worst == got.compute + got.links
    # Over two slices: 3/4 of the tensor twice within each, half of what is left twice over the
    # network.
    reduce = of("all-reduce", group=tuple(range(8)), local=8_000)
    got = estimate(CONFIG, empty, [reduce], devices_of(2, 2, 1, slices=2), chip)
    assert got.links == pytest.approx(3 * 2 * 8_000 * 3 / 4 / 2e6 + 3 * 2 * 2_000 / 2 / 1e5)


def test_known_chips_are_found_by_the_kind_of_their_devices_and_others_are_not():
    assert find_chip("TPU v5 lite").flops == 197e12 and find_chip("TPU v5").flops == 459e12
    assert find_chip("TPU v5e") == find_chip("TPU v5 lite") and find_chip("TPU v5p") == find_chip(
        "TPU v5"
    )
    assert find_chip("NVIDIA H200").memory > find_chip("NVIDIA H100 80GB HBM3").memory
    assert find_chip("NVIDIA A100-SXM4-40GB") is None  # not one of 80 GB
    assert find_chip("cpu") is None


# --- the report


@pytest.fixture(scope="module")
def compile_once():
    """Compiles the step of a run the first time: reports differ in the figures of the device."""
    compiled = {}

    def once(config, trainer):
        if config not in compiled:
            compiled[config] = compile_step(config, trainer)
        return compiled[config]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mammut.performance.compile_report.compile_step", once)
        yield


def number(report: str, line: str) -> float:
    return float(re.search(rf"^ *{line} +([\d,.]+)", report, re.MULTILINE)[1].replace(",", ""))


def test_the_report_says_memory_flops_and_collectives_of_a_device_without_known_figures(
    compile_once,
):
    report = compile_report(CONFIG)
    assert "8 x cpu, mesh data 1 x fsdp 8 x model 1; 2 examples a device" in report
    sizes = {
        name: number(report, name)
        for name in ("arguments", "temporaries", "output", "code", "total")
    }
    assert sizes["total"] == pytest.approx(sum(sizes.values()) - sizes["total"], abs=0.3)
    flops = 3 * 16 * sum(forward_flops(CONFIG.model).values())
    assert number(report, "GFLOP of a step:") == pytest.approx(flops / 1e9, abs=0.05)
    assert re.search(r"^  all-gather +fsdp +\d+", report, re.MULTILINE)
    assert "all-to-all" not in report and "collective-permute" not in report
    assert "no figures of 'cpu'" in report


def test_with_figures_of_the_device_there_is_an_estimate_or_advice_where_the_step_does_not_fit(
    monkeypatch, compile_once
):
    monkeypatch.setitem(chips.CHIPS, "cpu", Chip(1e12, 1e9, 1e11, 1e10, 1e9))
    report = compile_report(CONFIG)
    best, worst = (float(re.search(rf"{word} ([\d.]+) ms", report)[1]) for word in ("takes", "to"))
    assert 0 < best <= worst and "no measurement" in report
    low, high = (
        int(x.replace(",", ""))
        for x in re.search(r"([\d,]+) to ([\d,]+) images/s", report).groups()
    )
    assert low >= high > 0
    monkeypatch.setitem(chips.CHIPS, "cpu", Chip(1e12, 1e5, 1e11, 1e10, 1e9))
    with pytest.raises(
        ValueError, match=r"does not fit.*--accumulation 2.*--compute\.remat full.*--mesh\.fsdp"
    ):
        compile_report(CONFIG)


@pytest.mark.parametrize("config, message", [
    (dataclasses.replace(CONFIG, mesh=MeshConfig(data=3)), "mesh.data x fsdp x model is 3 x 1 x 1"),
    (dataclasses.replace(CONFIG, data=DataConfig(batch_size=12)), "data.batch_size"),
])  # fmt: skip
def test_what_does_not_divide_is_refused_before_anything_is_compiled(config, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        compile_report(config)


# --- for a TPU that is not there

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install 'jax[tpu]'",
)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_a_topology_without_libtpu_says_what_to_install():
    with pytest.raises(ValueError, match=r"^--topology v5e:8x8 needs libtpu, .*mammut-jax\[tpu\]"):
        topology_devices("v5e:8x8")


@pytest.mark.parametrize("topology", ["", "v5e", "0*v5e:4x4", "v5e:4x4*2"])
def test_what_is_no_topology_is_refused_by_its_name(topology):
    with pytest.raises(
        ValueError,
        match=rf"^--topology is {re.escape(repr(topology))}, expected a TPU slice such as",
    ):
        topology_devices(topology)


def in_a_process(code: str) -> dict:
    """The JSON that a fresh process prints: it compiles for devices other than the tests'."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@needs_libtpu
def test_a_step_is_compiled_for_a_tpu_slice_that_is_not_there():
    code = """
import dataclasses, json
from mammut.performance.compile_report import compile_report
from mammut.config import *
model = ModelConfig(
    vision=VisionConfig(image_size=16, patch_size=8, width=128, depth=2, num_heads=2, mlp_dim=128),
    text=DecoderConfig(vocab_size=256, max_length=8, width=128, depth=2, num_heads=2, mlp_dim=128))
compute = ComputeConfig(dtype="bfloat16")
mesh = MeshConfig(data=1, fsdp=-1)
data = DataConfig(batch_size=16)
config = TrainConfig(model=model, compute=compute, data=data, mesh=mesh, steps=10)
print(json.dumps({"report": compile_report(config, "v5e:2x2")}))
"""
    report = in_a_process(code)["report"]
    assert "v5e:2x2: 4 x TPU v5 lite, mesh data 1 x fsdp 4 x model 1; 4 examples a device" in report
    assert re.search(r"^  total +[\d.]+  0% of 17,180$", report, re.MULTILINE)
    assert re.search(r"^  all-gather +fsdp +\d+", report, re.MULTILINE)
    assert "loops do not say" not in report
    assert re.search(r"MFU \d+% to \d+%, [\d,]+ to [\d,]+ images/s$", report)


@needs_libtpu
def test_slices_lie_along_data_and_unknown_topologies_are_refused():
    code = """
import json
from mammut.performance.compile_report import topology_devices
from mammut.config import MeshConfig
from mammut.core.sharding import make_mesh
mesh = make_mesh(MeshConfig(data=-1, fsdp=8), topology_devices("2*v5e:4x4"))
slices = [[d.slice_index for d in row.flat] for row in mesh.devices]
said = {"shape": dict(mesh.shape), "slices": slices}
for name in ("v9:2x2", "v5e:5x7"):
    try:
        topology_devices(name)
    except ValueError as error:
        said[name] = str(error)
print(json.dumps(said))
"""
    said = in_a_process(code)
    assert said["shape"] == {"data": 4, "fsdp": 8, "model": 1}
    assert said["slices"] == [[0] * 8] * 2 + [[1] * 8] * 2
    for name in ("v9:2x2", "v5e:5x7"):
        assert (
            said[name].startswith(f"--topology is {name!r}, expected a TPU slice")
            and "\n" not in said[name]
        )


# --- the recipes


@pytest.mark.parametrize("recipe, preset", [
    ("mammut_b16", presets.mammut_b16),
    ("mammut_l14", presets.mammut_l14),
    ("paper_2b", presets.paper_2b),
])  # fmt: skip
def test_the_recipes_of_full_size_train_their_preset(recipe, preset, request):
    from mammut.training.run import load_recipe

    config = load_recipe(request.config.rootpath / "configs" / f"{recipe}.py")
    assert config.model == preset()
    assert config.mesh.sizes(64) == (4, 16, 1) and config.data.batch_size % 64 == 0
    assert recipe != "paper_2b" or (config.data.batch_size, config.steps) == (16_384, 500_000)
