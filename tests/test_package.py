"""The package as a stranger gets it: documents that run, recipes inside the wheel, one front door."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sapo

ROOT = Path(__file__).resolve().parents[1]
MODULES = [m.name for m in pkgutil.walk_packages(sapo.__path__, "sapo.")]
HOSTS = {
    "sapo.integrations.trl": "trl",
    "sapo.integrations.verl": "verl",
    "sapo.rollout.servers.worker": "vllm",
    "sapo.utils.hosted": "ray",
}
"""What these modules live inside: verl only in .venv-verl, and likewise vllm and ray."""


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_are_true(name: str) -> None:
    if name in HOSTS:
        pytest.importorskip(HOSTS[name])
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_there_are_examples_in_docstrings() -> None:
    total = sum(doctest.testmod(importlib.import_module(name)).attempted for name in MODULES if name not in HOSTS)
    assert total > 40


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it would be published."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (made,) = out.glob("sapo_rl-*.whl")
    return made


def test_the_wheel_carries_the_recipes(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    recipes = list((ROOT / "recipes").rglob("*.yaml"))
    assert any("studies" in recipe.parts for recipe in recipes)
    for recipe in recipes:
        assert f"sapo/{recipe.relative_to(ROOT).as_posix()}" in names
    for part in ("html", "css", "js"):
        assert f"sapo/evaluation/page/completions.{part}" in names
    assert "sapo/py.typed" in names


def test_the_wheel_works_in_an_empty_directory(wheel: Path, tmp_path: Path) -> None:
    """Unpacked where nothing else of the repository is; what it depends on is that of this environment."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(tmp_path / "site")}
    program = (
        "import sys, sapo; from sapo.cli import main; print(sapo.__file__); "
        "sapo.load_recipe('quickstart', ['train.steps=1']); sys.argv = ['sapo', 'recipes']; main()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path / "empty",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert Path(ran.stdout.splitlines()[0]).is_relative_to(tmp_path / "site")
    assert "paper_fig4" in ran.stdout
    assert list((tmp_path / "empty").iterdir()) == []


def test_the_front_door_has_what_it_names() -> None:
    for name in sapo.__all__:
        assert getattr(sapo, name) is not None
    assert callable(sapo.train)
    assert callable(sapo.evaluate)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sapo.nothing  # noqa: B018


def test_the_objectives_load_no_library_but_torch_and_of_ours_errors_and_helpers() -> None:
    code = (
        "import sys, sapo.objectives; "
        "heavy = {'transformers', 'pydantic', 'omegaconf', 'rich'} & set(sys.modules); assert not heavy, heavy; "
        "ours = {m.split('.')[1] for m in sys.modules if m.startswith('sapo.')}; "
        "assert ours == {'errors', 'objectives', 'utils'}, ours"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torchao_loads_without_a_word() -> None:
    pytest.importorskip("torchao")
    program = "import sapo; from transformers import modeling_utils; import sys; assert 'torchao' in sys.modules"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stderr == ""


def test_every_public_name_of_the_design_is_there() -> None:
    import torch

    from sapo.objectives import OBJECTIVES, gate_weight, policy_loss

    logp = torch.zeros(2, 3, requires_grad=True)
    old, advantages, mask = torch.zeros(2, 3), torch.tensor([1.0, -1.0]), torch.ones(2, 3, dtype=torch.bool)
    assert {"sapo", "grpo", "gspo", "gspo_token", "sapo_seq"} <= set(OBJECTIVES)
    loss = policy_loss("sapo", logp, old, advantages, mask, tau_pos=1.0, tau_neg=1.05)
    assert loss.shape == ()
    weight = gate_weight("sapo", logp.detach() - old, advantages, mask, tau_pos=1.0, tau_neg=1.05)
    assert torch.equal(weight, torch.ones(2, 3)), "weight 1 at r = 1"
