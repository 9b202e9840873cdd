"""The notebook of examples/ runs from its first cell to its last: in a kernel where there is one, else cell by cell."""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "first_run.ipynb"
KERNEL = all(importlib.util.find_spec(name) for name in ("nbclient", "ipykernel"))


def outputs_of_cells(cells: list[str]) -> list[Any]:
    """Return the value of the last expression of each cell, None where it ends with a statement."""
    names: dict[str, Any] = {"__name__": "__main__"}
    found = []
    for cell in cells:
        tree = ast.parse(cell)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), names)
        found.append(None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names))
    return found


def test_every_cell_of_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAPO_CACHE", str(tmp_path / "cache"))
    shutil.copy(NOTEBOOK, tmp_path / "first_run.ipynb")
    if KERNEL:
        import nbformat
        from nbclient import NotebookClient

        notebook = nbformat.read(tmp_path / "first_run.ipynb", as_version=4)
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
        shown = json.dumps(notebook)
        assert "<progress" in shown, "the progress is a block of HTML"
        assert "<iframe" in shown, "the report stands inline"
        assert "a callback asked the run to stop" in shown
        return
    cells = ["".join(c["source"]) for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    metrics, samples, report, texts = outputs_of_cells(cells)[-4:]
    assert metrics["reward/mean"].iloc[-1] > 0.3
    assert list(samples.columns) == ["prompt", "text", "reward"]
    assert report._repr_html_().startswith("<iframe")
    assert len(texts) == 2
