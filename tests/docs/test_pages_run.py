"""Pages for newcomers and guides, followed literally: `make test-docs`.

Each page is a directory of its own. Its blocks run in order, commands in this process. What makes them small is here
and in the marks of the page: a tiny model stands for the one from the hub, and `SMALL` has settings of a test's size.
"""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sapo
import sapo.front.train
from sapo.cli import main
from sapo.config.recipes import change_recipe, parse_override
from support.pages import FOLLOWED, Block, blocks, commands
from support.runs import write_model

pytestmark = pytest.mark.docs

STEPS = [
    "threads=1", "train.steps=2", "train.minibatches=2", "rollout.prompts_per_step=2", "rollout.samples_per_prompt=2",
    "rollout.max_new_tokens=8", "eval.problems=2", "eval.samples=2", "eval.k=[1]", "log.tensorboard=false",
    "log.rollouts_every=1",
]  # fmt: skip
COLDSTART = [
    "model.coldstart.hidden_size=16", "model.coldstart.layers=1", "model.coldstart.heads=2",
    "model.coldstart.kv_heads=1", "model.coldstart.intermediate_size=16", "model.coldstart.target=0",
    "model.coldstart.max_updates=2",
    "model.coldstart.examples=16", "model.coldstart.batch_size=4", "model.coldstart.eval_problems=8",
]  # fmt: skip
COMPARED = [*STEPS, *COLDSTART, "warnings.on_collapse=warn"]
SMALL = {
    "quickstart": [*STEPS, *COLDSTART],
    "python": [*STEPS, *COLDSTART],
    "file": STEPS,
    "compare": COMPARED,
    "compare-python": COMPARED,
}
REPLACED = {
    "Qwen/Qwen3-0.6B": "model",
    "train.steps=40": "train.steps=4",
    "steps=40)": "steps=4)",
    "--learning-rates 5e-5,1e-4 --seeds 3": "--learning-rates 1e-4 --seeds 1 --jobs 1",
    "--seeds 2 --out": "--seeds 1 --jobs 1 --out",
}
"""A hub id by a tiny model; a comparison's size by that of a test."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a tiny model, in which a page is followed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SAPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "100")
    write_model(tmp_path / "model")
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:  # my_rewards of one page is not that of another
        if name.startswith("my_"):
            del sys.modules[name]


def replaced(text: str) -> str:
    """Return the text of a block at a test's size."""
    for long, short in REPLACED.items():
        text = text.replace(long, short)
    return text


def run_command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a `sapo` command in this process, and return what it printed.

    Raises:
        AssertionError: it ended with another code than 0.
    """
    monkeypatch.setattr(sys, "argv", ["sapo", *arguments])
    printed, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0, f"sapo {' '.join(arguments)}\n{printed.getvalue()}\n{said.getvalue()}"
    return printed.getvalue()


def run_block(block: Block, here: Path, space: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what a reader does with a block: save it, type it, or look at it."""
    text = replaced(block.text)
    if "file" in block.marks:
        (here / block.marks["file"]).write_text(text)
        return
    small = SMALL[block.marks["small"]] if "small" in block.marks else []
    if block.kind == "bash":
        lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        typed = list(commands(text))
        assert len(typed) == len(lines), f"only `sapo` commands are run; mark the block with skip: {lines}"
        for command, *arguments in typed:
            sized = [*arguments, *small] if command in ("train", "compare", "coldstart") else arguments
            run_command([command, *sized], monkeypatch)
    elif block.kind == "python":
        file = here / "block.py"
        file.write_text(text)
        if small:
            monkeypatch.setattr(sapo, "load_recipe", sized_loader("sapo.config.recipes", "load_recipe", small))
            monkeypatch.setattr(sapo.front.train, "change_recipe", sized_change(small))
            monkeypatch.setattr(
                sapo, "load_comparison", sized_loader("sapo.workflows.comparing", "load_comparison", small)
            )
        space.update(runpy.run_path(str(file), init_globals=space))


def sized_loader(module: str, name: str, small: list[str]) -> Any:
    """Return a loader of recipes that adds the settings of a test to those of the caller."""
    load = getattr(__import__(module, fromlist=[name]), name)

    def sized(recipe: Any, overrides: Any = None, **options: Any) -> Any:
        more = {"seeds": 1} if "seeds" in options else {}
        return load(recipe, [*(overrides or ()), *small], **{**options, **more})

    return sized


def sized_change(small: list[str]) -> Any:
    """Return a `change_recipe` of `sapo.train` that adds the settings of a test."""

    def sized(raw: Any, changes: Any, label: str) -> Any:
        return change_recipe(raw, [*changes, *map(parse_override, small)], label)

    return sized


def tensors() -> dict[str, torch.Tensor]:
    """Return tensors by their names of docs/notation.md, for blocks that start from them."""
    logp = torch.tensor([[-1.0, -0.5, -2.0], [-0.1, -3.0, -1.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    return {
        "logp_BT": logp.clone().requires_grad_(),
        "logp_old_BT": logp,
        "advantages_B": torch.tensor([1.0, -1.0]),
        "mask_BT": mask,
    }


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_page_does_what_it_says(name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space: dict[str, Any] = dict(tensors())
    for block in blocks(FOLLOWED[name].read_text()):
        if "skip" not in block.marks and block.language != "text":
            try:
                run_block(block, here, space, monkeypatch)
            except BaseException as error:
                error.add_note(f"{name}:{block.line}")
                raise


def test_a_command_that_fails_fails_its_page(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="no_such_recipe"):
        run_block(Block("bash", "sapo train no_such_recipe\n", 1), here, {}, monkeypatch)


def test_a_block_of_another_program_has_to_be_marked(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="skip"):
        run_block(Block("bash", "make test\n", 1), here, {}, monkeypatch)
