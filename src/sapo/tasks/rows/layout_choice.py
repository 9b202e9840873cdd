"""Choose the layout of a file by its rows, where the recipe names none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sapo.errors import TaskError
from sapo.tasks.rows.layouts import LAYOUTS, Layout, is_empty, value_at
from sapo.tasks.rows.reading import Row
from sapo.utils.names import did_you_mean

AUTO = "auto"
PLAIN = "plain"
"""What a file with the columns of `prompt_field` and `answer_field` is called beside the layouts."""


def choose_layout(wanted: str | None, where: str, row: Row, *, needs_answer: bool) -> Layout | None:
    """Return the layout of a file by its first row; None for one with columns `prompt` and `answer`.

    Args:
        wanted: a layout's name, or auto. None is auto for a file of whose layout nothing is said.
        where: place of the first row.
        needs_answer: whether the verifier compares with an answer. Otherwise a prompt alone is read as TRL does.

    Raises:
        TaskError: the row fits several layouts, which find different questions or answers in it.
    """
    if wanted not in (None, AUTO):
        return LAYOUTS[wanted]
    plain = {"prompt", "answer"} <= set(row)
    found = {layout.name: layout.find(where, row) and layout.read(where, row) for layout in LAYOUTS.values()
             if layout.marks(row)}  # fmt: skip
    readings = {name: (r.question, r.answer) for name, r in found.items() if r is not None}
    if plain:
        readings[PLAIN] = (row["prompt"], row["answer"])
    if any(reading != next(iter(readings.values())) for reading in readings.values()):
        raise TaskError(
            f"{where}: the row could be of the layouts {' or '.join(readings)}, which find different questions or "
            f"answers in it; it has {list(row)}; set layout={next(iter(readings))}, or prompt_field and answer_field"
        )
    if plain:
        return None
    if readings:
        layout = LAYOUTS[next(iter(readings))]
        _refuse_two_answers(where, row, layout)
        return layout
    return LAYOUTS["trl"] if "prompt" in row and not needs_answer else None


def first_disagreement(layout: Layout | None, rows: Sequence[tuple[str, Row]], *, needs_answer: bool) -> str | None:
    """Describe the first row that looks like another layout than the one a file is read in; None without one.

    Args:
        layout: what `choose_layout` returned for the file.
        rows: places and rows behind the first.
    """
    taken = PLAIN if layout is None else layout.name
    for where, row in rows:
        try:
            own = choose_layout(None, where, row, needs_answer=needs_answer)
        except TaskError:  # of several layouts, or malformed: reading it says so, if it matters in this layout
            continue
        name = PLAIN if own is None else own.name
        if name != taken and (own is not None or {"prompt", "answer"} <= set(row)):
            return (
                f"{where}: the row looks like the layout {name}, and the first row like {taken}, in which all are read"
            )
    return None


def check_layout(name: Any) -> None:
    """Refuse a layout that does not exist.

    Raises:
        TaskError: it does not.
    """
    known = (AUTO, *LAYOUTS)
    if name is not None and name not in known:
        hint = did_you_mean(str(name), known)
        raise TaskError(f"layout must be one of {', '.join(known)}; got {name!r}{hint}")


def _refuse_two_answers(where: str, row: Row, layout: Layout) -> None:
    """Refuse to choose between columns that could both be the answer. A layout that is named has an order."""
    named = {name: value for name in layout.answers if not is_empty(value := value_at(row, name))}
    if any(value != next(iter(named.values())) for value in named.values()):
        first, *_ = named
        raise TaskError(
            f"{where}: the row has several columns that could be the answer, {' and '.join(named)}; set answer_field "
            f"to one of them, or layout={layout.name} for {first}"
        )
