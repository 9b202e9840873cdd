"""The verifier `zebra`: a logic grid as JSON, as ZebraLogic is scored.

The completion ends in {"reasoning": ..., "solution": {"House 1": {"Name": ..., ...}, ...}}. The reference is `solution`
in the metadata, {header: ["House", "Name", ...], rows: [["1", ...], ...]}. As in ZeroEval, cells are compared without
case and surrounding blanks, a missing cell is wrong, and further cells are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sapo.data import Prompt, Score
from sapo.errors import TaskError
from sapo.tasks.verifiers.base import unparseable
from sapo.tasks.verifiers.extract import last_json_object


@dataclass(frozen=True)
class Zebra:
    """Gives reward 1 where every cell is right. The figure `cell_accuracy` is the share of right cells.

    >>> solution = {"header": ["House", "Name"], "rows": [["1", "Bob"], ["2", "Eve"]]}
    >>> prompt = Prompt(id=0, task="zebralogic", text="?", metadata={"solution": solution})
    >>> score = Zebra()('{"solution": {"House 1": {"Name": "bob"}, "House 2": {"Name": "Al"}}}', prompt)
    >>> score.reward, dict(score.figures)
    (0.0, {'cell_accuracy': 0.5})
    """

    solution_field: str = "solution"
    """Field of the prompt's metadata with the reference."""

    def __post_init__(self) -> None:
        if not isinstance(self.solution_field, str):
            raise TaskError(f"zebra's solution_field must name a field of the rows; got {self.solution_field!r}")

    def __call__(self, text: str, prompt: Prompt) -> Score:
        reference = _reference(prompt.metadata.get(self.solution_field), self.solution_field)
        found = last_json_object(text)
        if found is None:
            return unparseable("no JSON object in the completion")
        solution = found.get("solution")
        if not isinstance(solution, Mapping):
            return unparseable(f"the JSON has no object 'solution'; it has {list(found)[:5]}")
        houses = {_key(house): cells for house, cells in solution.items() if isinstance(cells, Mapping)}
        given = {
            (house, column): _cell({_key(name): value for name, value in houses.get(house, {}).items()}.get(column))
            for house, column in reference
        }
        right = sum(given[place] == value for place, value in reference.items())
        answer = json.dumps([given[place] for place in sorted(reference)])
        return Score(float(right == len(reference)), answer=answer, figures={"cell_accuracy": right / len(reference)})


def _reference(solution: Any, field: str) -> dict[tuple[str, str], str]:
    """Return a reference as {(house, column): value}."""
    try:
        header, rows = list(solution["header"]), [list(row) for row in solution["rows"]]
        # The first column numbers the houses.
        cells = {
            (_key(f"House {row[0]}"), _key(column)): str(value).strip().lower()
            for row in rows
            for column, value in zip(header[1:], row[1:], strict=True)
        }
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise ValueError(f"zebra needs metadata[{field!r}] = {{header, rows}}; got {str(solution)[:80]}") from error
    if not cells:
        raise ValueError(f"zebra needs a solution with cells; got {str(solution)[:80]}")
    return cells


def _key(name: Any) -> str:
    return " ".join(str(name).split()).lower()


def _cell(value: Any) -> str | None:
    """Return the text of a cell, or of the first entry of a list. Return None for what cannot be a cell."""
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    return str(value).strip().lower()
