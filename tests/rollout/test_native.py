"""How the kernels are compiled, kept and loaded; what they compute is in test_fast.py and rollout/test_cache.py."""

from __future__ import annotations

import ctypes
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sapo.rollout.local.cpu import native

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache directory, and a process that has loaded nothing yet."""
    monkeypatch.setenv("SAPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("SAPO_NATIVE", raising=False)
    monkeypatch.setattr(native, "FLAGS", ("-O0", *native.FLAGS[1:]))  # a fifth of the time to compile
    native._load.cache_clear()
    yield tmp_path / "cache"
    native._load.cache_clear()


def loaded() -> native.Kernels | None:
    """As a fresh process would find them."""
    native._load.cache_clear()
    return native.kernels(torch.device("cpu"), torch.float32)


def compute(found: native.Kernels | None) -> None:
    assert found is not None
    # By hand: silu(0) is 0, silu(x) is x where x is large.
    assert found.gate(torch.tensor([[0.0, 50.0, 3.0, 2.0]])).tolist() == [[0.0, 100.0]]


@needs_compiler
def test_they_are_compiled_once_and_kept(cache, monkeypatch):
    compute(loaded())
    [library] = (cache / "kernels").iterdir()
    made = library.stat().st_mtime_ns
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("it was compiled again"))
    compute(loaded())
    assert library.stat().st_mtime_ns == made
    assert native.kernels_in_use() == f"compiled {library.stem}"


@needs_compiler
def test_trying_the_compiler_out_keeps_nothing(cache):
    assert native.compiles_here()
    assert not cache.exists()


@needs_compiler
def test_processes_that_start_at_once_leave_one_library(cache):
    name = native._name(["cc"])
    with ThreadPoolExecutor(4) as pool:
        libraries = list(pool.map(lambda _: native._kept(["cc"], name), range(4)))
    assert [f.name for f in (cache / "kernels").iterdir()] == [f"{name}.so"]
    for library in libraries:
        compute(native.Kernels(library, name))


@needs_compiler
@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_a_directory_that_others_may_write_to_is_not_read(cache, mode):
    planted = cache / "kernels" / f"{native._name(['cc'])}.so"
    planted.parent.mkdir(parents=True)
    planted.write_bytes(b"planted")
    planted.parent.chmod(mode)
    compute(loaded())
    assert planted.read_bytes() == b"planted"
    assert len(list(planted.parent.iterdir())) == 1


@needs_compiler
def test_a_directory_of_another_user_is_not_read(cache, monkeypatch):
    (cache / "kernels").mkdir(parents=True)
    if os.geteuid() == 0:
        os.chown(cache / "kernels", 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    compute(loaded())
    assert list((cache / "kernels").iterdir()) == []


@needs_compiler
def test_a_cache_that_cannot_be_made_costs_a_compilation_and_nothing_else(cache):
    cache.write_text("a file where the directory would be")
    compute(loaded())


@needs_compiler
def test_a_cache_that_runs_no_programs_costs_a_compilation_and_nothing_else(cache, monkeypatch):
    load = ctypes.CDLL

    def refuse(path, *rest):
        if Path(path).is_relative_to(cache):
            raise OSError("failed to map segment from shared object")
        return load(path, *rest)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    compute(loaded())


@needs_compiler
def test_a_library_that_cannot_be_loaded_is_made_again(cache):
    path = cache / "kernels" / f"{native._name(['cc'])}.so"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    compute(loaded())
    assert path.stat().st_size > 0


@pytest.mark.parametrize("compiler", ["", "false", "/nowhere/cc", "'unclosed"])
def test_without_a_working_compiler_torch_computes(cache, monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    assert loaded() is None
    assert not native.compiles_here()
    assert native.kernels_in_use() == "torch"
    assert not list(cache.rglob("*.so"))


@needs_compiler
def test_a_compiler_that_fails_on_the_source_leaves_nothing_behind(cache, monkeypatch):
    monkeypatch.setattr(native, "FLAGS", ("-no-such-flag",))
    assert loaded() is None
    assert list((cache / "kernels").iterdir()) == []


@needs_compiler
def test_another_processor_or_compiler_has_a_library_of_its_own(cache, monkeypatch):
    own = native._name(["cc"])
    assert native._name(["cc", "-DOTHER"]) != own
    monkeypatch.setattr(native, "_processor", lambda: "another")
    assert native._name(["cc"]) != own


def test_they_can_be_switched_off(cache, monkeypatch):
    monkeypatch.setenv("SAPO_NATIVE", "0")
    assert loaded() is None
    assert not cache.exists()
