"""Optimizers in a run: resumed bit for bit, or refused before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sapo
from sapo.errors import ConfigError
from sapo.workflows.train import dry_run
from support.runs import fingerprint, metrics, write_model, write_recipe

OWN = "support.own_optimizers:SignMomentum"


@pytest.fixture
def torchao() -> Iterator[None]:
    """torchao's own arithmetic and tensors, without the minutes that compiling its step takes."""
    pytest.importorskip("torchao", reason="torchao is in the extra optim")
    with torch.compiler.set_stance("force_eager"):
        yield


def recipe_in(directory: Path, name: str, **changes: object) -> sapo.RunConfig:
    directory.mkdir(exist_ok=True)
    file = write_recipe(directory, **{"train__optimizer": name, "train__steps": 4, **changes})
    write_model(directory / "model", hidden_size=64, intermediate_size=64)  # of 4096 elements and more: quantised
    return sapo.load_recipe(file)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (OWN, {"train__learning_rate": 0.05}),
        (OWN, {"model__dtype": "bfloat16", "train__betas": [0.8, 0.95]}),
        ("adamw_8bit", {}),
        ("adamw_8bit", {"model__dtype": "bfloat16"}),
    ],
)
@pytest.mark.usefixtures("torchao")
def test_a_run_that_was_stopped_and_resumed_is_the_run_that_was_not(
    name: str, changes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "whole"))
    whole = sapo.train(recipe_in(tmp_path / "whole", name, **changes)).directory
    asked = iter(range(10_000))
    stopped = sapo.train(recipe_in(tmp_path / "stopped", name, **changes), should_stop=lambda: next(asked) > 70)
    assert stopped.stopped is not None
    assert 0 < stopped.stopped.checkpoint.step < 4
    assert sapo.resume(stopped.directory).stopped is None
    assert fingerprint(whole, 4) == fingerprint(stopped.directory, 4)
    assert all(m["grad_norm"] > 0 for m in metrics(whole) if m["kind"] == "update" and not m["skipped"])
    state = (whole / "checkpoints" / "step-000004" / "optimizer.safetensors").read_bytes()
    assert (b"codes#exp_avg/model.layers.0.mlp" in state) == (name == "adamw_8bit")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adam", r"must be one of adamw, adamw_8bit, or module:Class; got 'adam'; did you mean 'adamw'\?"),
        ("no_such_module:Adam", "'no_such_module:Adam': importing 'no_such_module' failed: ModuleNotFoundError"),
        ("support.own_optimizers:SignMomentun", "has no class 'SignMomentun'; did you mean 'SignMomentum'"),
        ("support.own_optimizers:NOT_A_CLASS", "must be a class derived from torch.optim.Optimizer; got <function"),
        ("torch.nn:Linear", "must be a class derived from torch.optim.Optimizer; got <class"),
        ("support.own_optimizers:Failing", "cannot run on cpu: NotImplementedError: no kernel for float32 here; use"),
        ("support.own_optimizers:Forgetful", "cannot be resumed from a checkpoint: .* keep all that changes"),
        ("support.own_optimizers:Unwritable", "can hold; got builtins.set at history/probe.0; use"),
        ("torch.optim:LBFGS", "cannot run on cpu: TypeError: .*closure"),
    ],
)
def test_what_cannot_be_run_or_resumed_is_refused_before_anything_is_written(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    config = recipe_in(tmp_path, name)
    for enter in (sapo.train, dry_run):
        with pytest.raises(ConfigError, match=message):
            enter(config)
    assert not (tmp_path / "run").exists()


def test_a_setting_that_the_optimizer_does_not_take_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"SignMomentum takes no weight_decay; got train.weight_decay=0.1; leave"):
        sapo.train(recipe_in(tmp_path, OWN, train__weight_decay=0.1))
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("torchao")
def test_a_dry_run_counts_the_state_of_the_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    phases = {name: dry_run(recipe_in(tmp_path, name)).memory.phases for name in ("adamw", "adamw_8bit", OWN)}
    wide, narrow, own = (parts["checkpoint"] for parts in phases.values())
    assert narrow["moments of AdamW"] < wide["moments of AdamW"] / 2
    assert own["state of the optimizer"] == pytest.approx(wide["moments of AdamW"] / 2, rel=0.05)
