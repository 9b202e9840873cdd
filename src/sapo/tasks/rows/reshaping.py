"""Reshape rows of benchmarks whose question or tests are spread over several columns.

Each function takes a row and its place, and returns a row in which one column is the whole question. Tests of code go
to the column `tests` in the schema of `CodeTests` (verifiers/code_tests.py), and the columns they come from are
removed.
"""

from __future__ import annotations

import json
from dataclasses import replace

from sapo.data import Prompt
from sapo.errors import TaskError
from sapo.tasks.rows.columns import present
from sapo.tasks.rows.reading import Row, brief

FENCE = "Put the whole program into one block that begins with ```python and ends with ```."


def reshape_zebralogic(where: str, row: Row) -> Row:
    """Append to the puzzle the object to fill in: the houses and attributes of the solution without its values."""
    puzzle = _text(where, row, "puzzle")
    solution = row[present(where, row, "path", ("solution",))]
    try:
        attributes = [str(name) for name in list(solution["header"])[1:]]
        houses, cells = len(solution["rows"]), [str(cell) for house in solution["rows"] for cell in house]
    except (TypeError, KeyError) as error:
        raise TaskError(
            f"{where}: field 'solution' must be an object with header and rows; got {brief(solution)}; fix the row"
        ) from error
    if "___" in cells:
        raise TaskError(
            f"{where}: its solution is blanked out, as in the public copy, so that no answer could be right; "
            "set path= to rows with solutions"
        )
    form = {f"House {house}": dict.fromkeys(attributes, "...") for house in range(1, houses + 1)}
    question = (
        f"{puzzle.strip()}\n\nSolve the puzzle. Give your reasoning and the solution as one JSON object of this form, "
        f"with every ... replaced:\n{json.dumps({'reasoning': '...', 'solution': form}, indent=2)}"
    )
    return {**row, "puzzle": question}


def reshape_mathvision(where: str, row: Row) -> Row:
    """Append the options to the question, by letter. A question without options is left as it is."""
    options = row.get("options")
    if options is None or len(options) == 0:
        return row
    lettered = "\n".join(f"({chr(ord('A') + place)}) {option}" for place, option in enumerate(options))
    question = f"{_text(where, row, 'question')}\nOptions:\n{lettered}\nAnswer with the letter of one option."
    return {**row, "question": question}


def reshape_livecodebench(where: str, row: Row) -> Row:
    """Join the title, the question and the form of the program: one that reads stdin, or completed starter code."""
    title, content = str(row.get("question_title") or ""), _text(where, row, "question_content")
    _text(where, row, "public_test_cases")
    starter = str(row.get("starter_code") or "").strip()
    if starter:
        form = f"Complete this Python code:\n```python\n{starter}\n```\n{FENCE}"
    else:
        form = f"Write a Python program that reads the input from stdin and writes the answer to stdout.\n{FENCE}"
    question = "\n\n".join(part for part in (title, content.strip(), form) if part)
    return {**row, "question_content": question}


def finish_livecodebench(prompt: Prompt) -> Prompt:
    """Decode the tests of a prompt, public ones first. Done on demand, since those of all rows take gigabytes.

    Raises:
        TaskError: the tests of the row cannot be read.
    """
    from sapo.tasks.verifiers.code import (
        CodeTests,  # imported late, here and below: only tasks of code need it
    )

    metadata = dict(prompt.metadata)
    columns = [metadata.pop(name, None) for name in ("public_test_cases", "private_test_cases", "metadata")]
    try:
        metadata["tests"] = CodeTests.from_livecodebench(*columns).to_json()
    except TaskError as error:
        raise TaskError(f"{prompt.task}, question {metadata.get('question_id', prompt.id)}: {error}") from error
    return replace(prompt, metadata=metadata)


def reshape_humaneval(where: str, row: Row) -> Row:
    """Ask for the whole function that the signature begins. The tests call it by its name."""
    from sapo.tasks.verifiers.code import CodeTests

    signature, test, entry_point = (_text(where, row, field) for field in ("prompt", "test", "entry_point"))
    rest = {key: value for key, value in row.items() if key not in ("test", "entry_point")}
    question = (
        "Complete this Python function. Give the whole function with its imports.\n"
        f"```python\n{signature.rstrip()}\n```\n{FENCE}"
    )
    return {**rest, "prompt": question, "tests": CodeTests.from_humaneval(signature, test, entry_point).to_json()}


def reshape_mbpp(where: str, row: Row) -> Row:
    """Append to the description the assertions that the function must pass, since only they give its name."""
    from sapo.tasks.verifiers.code import CodeTests

    field = present(where, row, "prompt_field", ("text", "prompt"))
    tests = row[present(where, row, "path", ("test_list",))]
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise TaskError(f"{where}: field 'test_list' must be a list of assertions; got {brief(tests)}; fix the row")
    # The full configuration has code to run before the tests; the sanitized one has a list of imports.
    setup, imports = row.get("test_setup_code") or "", row.get("test_imports") or []
    dropped = ("test_list", "challenge_test_list", "test_setup_code", "test_imports")
    rest = {key: value for key, value in row.items() if key not in dropped}
    question = f"{_text(where, row, field)}\nThe code must pass these tests:\n" + "\n".join(tests) + f"\n{FENCE}"
    return {**rest, field: question, "tests": CodeTests.from_mbpp(tests, setup, imports).to_json()}


def _text(where: str, row: Row, field: str) -> str:
    value = row[present(where, row, "path", (field,))]
    if not isinstance(value, str):
        raise TaskError(f"{where}: field {field!r} must be a string; got {brief(value)}; fix the row")
    return value
