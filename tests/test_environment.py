"""What the environment of a program may set: it works, or one sentence says what does not."""

import contextlib
import pwd

import jax
import pytest

import mammut
from mammut.core import environment
from mammut.core.environment import (
    cache_folder,
    require_arithmetic,
    require_device,
    set_arithmetic,
    use_compilation_cache,
)
from mammut.data.sources import open_source


@pytest.fixture
def homeless(monkeypatch) -> None:
    """No HOME, and a user without an entry in passwd, as in many containers."""

    def no_entry(*_):
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)


def test_without_a_home_folder_nothing_is_cached_there(homeless, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cache_folder("~/.cache/mammut/xla") is None
    assert cache_folder("/tmp/xla").name == "xla"
    before = jax.config.jax_compilation_cache_dir
    use_compilation_cache("~/.cache/mammut/xla")
    assert jax.config.jax_compilation_cache_dir == before
    assert capsys.readouterr().err == (
        "there is no home folder for ~/.cache/mammut/xla: compiled programs are not kept\n"
    )
    assert not [*tmp_path.iterdir()]


def test_a_path_below_a_home_folder_that_is_none_is_not_there(homeless):
    with pytest.raises(ValueError, match="there is no ~/nowhere: expected a folder or a file"):
        mammut.load("~/nowhere")
    with pytest.raises(ValueError, match="~/set.jsonl"):
        open_source("jsonl:~/set.jsonl", image_size=16)
    with pytest.raises(ValueError, match="~/a.tar"):
        open_source("tar:~/a.tar", image_size=16)


STRICT = {
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_enable_x64": True,
    "jax_transfer_guard": "disallow",
}


@contextlib.contextmanager
def set_by_the_user(name: str):
    before = getattr(jax.config, name)
    jax.config.update(name, STRICT[name])
    try:
        yield
    finally:
        jax.config.update(name, before)


@pytest.mark.parametrize("name", STRICT)
def test_a_program_computes_with_the_rules_that_it_is_written_for(capsys, name):
    usual = getattr(jax.config, name)
    usual = getattr(usual, "value", usual)
    with set_by_the_user(name):
        set_arithmetic()
        assert getattr(jax.config, name) == usual
    said = capsys.readouterr().err
    assert said == f"{name} is {STRICT[name]!r}: set to {usual!r}, as this program needs it\n"
    set_arithmetic()
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", ["jax_numpy_dtype_promotion", "jax_numpy_rank_promotion"])
def test_a_model_is_not_loaded_where_it_could_not_compute(tmp_path, name):
    with set_by_the_user(name):
        for load in (mammut.load, mammut.load_language_model):
            with pytest.raises(ValueError, match=f"{name} is '.*', set in the program or by JAX_"):
                load(tmp_path)
    require_arithmetic()


def test_a_platform_that_is_not_here_is_told_in_one_sentence(monkeypatch):
    def absent():
        raise RuntimeError("Unable to initialize backend 'tpu': no libtpu.so\nand more")

    monkeypatch.setattr(environment.jax, "devices", absent)
    with pytest.raises(ValueError) as refused:
        require_device()
    assert str(refused.value) == (
        "JAX finds no device to compute on: Unable to initialize backend 'tpu': no libtpu.so"
    )
