"""The short form of the soak: a run under a few faults is the undisturbed one, bit for bit."""

import shutil

import pytest
from damage import flip
from soak import soak
from soak_compare import differences

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return soak(tmp_path_factory.mktemp("soak"), seed=0, faults=8, minutes=20, processes=(1,))


def test_a_run_under_faults_goes_on_or_names_them_and_ends_as_the_undisturbed_one(short):
    assert short.problems == []
    assert short.counts["struck"].total() >= 8 and short.finished >= 1
    told = short.counts["resumed"].total() + short.counts["refused"].total()
    assert told >= short.counts["struck"].total() - 1  # the last one may end with the soak


def test_the_comparison_sees_one_bit(short, tmp_path):
    run = tmp_path / "straight1"
    straight = short.folder / "straight1"
    shutil.copytree(straight, run)
    assert differences(run, straight, set()) == []
    flip(run / "model.safetensors")
    assert differences(run, straight, set()) == ["model.safetensors"]
    log = run / "metrics.jsonl"
    log.write_text(log.read_text().replace('"step": 7,', '"step": 8,', 1))
    found = differences(run, straight, set())
    assert len(found) == 2 and found[0].startswith('the record {"step": 8')
    assert differences(run, straight, {7, 8}) == ["model.safetensors"]
