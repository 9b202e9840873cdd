"""The verifier `code`: run a completion's program in the sandbox against tests; it is right when all pass.

Stdin and functional tests are scored here, from what the program printed or returned. The program shares no process
with the verifier and cannot know the expected output. Unit tests, as in HumanEval and MBPP, are Python statements that
must run beside the program. They count as passed only when a random token comes back with them, which the test driver
has and the program has not been given. That stops a program that ends early in any way (sys.exit, os._exit, a crash),
prints a report of success, replaces built-in functions that the tests use, or returns an object that is equal to
everything. It does not stop a program that searches its own process for the token or the tests, or that patches a
library module that the tests use.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cache
from pathlib import Path
from typing import Any

from sapo.data import Prompt, Score, Status
from sapo.errors import TaskError
from sapo.sandbox import Limits, Outcome, ProgramResult, SandboxError, SandboxUnavailable, choose_backend, run_program
from sapo.tasks.verifiers.code_tests import CodeTests

# Longer programs are unparseable, before the interpreter fails on them.
MAX_PROGRAM_LENGTH = 256 * 1024

# For all tests of one completion, by the clock. A program that takes longer without a failure is not scored.
BUDGET_SECONDS = 240.0
# Seconds by the clock for each second of CPU time, since other work may share the machine, and for the start.
WALL_FACTOR, WALL_EXTRA = 2.5, 10.0

_FENCE = re.compile(r"^[ \t]*```+[ \t]*([\w+#.-]*)[^\n]*$", re.MULTILINE)
_PYTHON = ("python", "python3", "py", "")


@dataclass(frozen=True)
class Program:
    """The program found in a completion.

    >>> find_program("Here it is:\\n```python\\nprint(1)\\n```")
    Program(source='print(1)\\n', fenced=True)
    """

    source: str
    fenced: bool
    """Whether it stood in a code block. Otherwise it is the whole completion, which may be no program at all."""


@dataclass(frozen=True)
class CodeVerdict:
    """The results of the tests.

    >>> CodeVerdict(passed=2, total=3, failure="test 3: exit code 1: ZeroDivisionError").passed
    2
    """

    passed: int
    total: int
    failure: str = ""
    """First failure on one line, empty where all passed."""
    complete: bool = True
    """Whether all tests were run, or the rest cannot pass, so that `passed` of `total` is measured."""
    syntax_error: bool = False
    """Whether the program is no valid Python."""


def code(text: str, prompt: Prompt) -> Score:
    """Give reward 1 where the completion's program passes all tests in `prompt.metadata["tests"]`, else 0.

    The program is the last code block marked as Python, or else the last unmarked block. Without any block it is the
    whole text, which is `unparseable` when it is no Python. The tests are a `CodeTests` or its JSON. Where they have a
    `prefix`, a program that does not define their function continues it.

    A wrong output, an exception or running out of time or memory is a wrong answer: status `scored`, reward 0, with the
    reason in `detail`. The share of tests that pass is in `figures["tests_passed"]`.

    Raises:
        TaskError: the prompt has no tests.
        SandboxUnavailable: no sandbox works on this machine.
        SandboxError: the sandbox failed, or the tests take longer than `BUDGET_SECONDS`. The program is not scored.
    """
    tests = _tests_of(prompt)
    program = find_program(text)
    if program is None:
        return Score(0.0, Status.UNPARSEABLE, "no program in the completion")
    if len(program.source) > MAX_PROGRAM_LENGTH:
        return Score(0.0, Status.UNPARSEABLE, f"a program of {len(program.source)} characters")
    source = complete_program(program, tests)
    verdict = {"stdin": _judge_stdin, "functional": _judge_functional, "unit": _judge_unit}[tests.kind](source, tests)
    if verdict.syntax_error and not program.fenced:
        return Score(0.0, Status.UNPARSEABLE, f"no code block, and the text is no program: {verdict.failure}")
    figures = {"tests_passed": verdict.passed / verdict.total} if verdict.complete else {}
    return Score(float(verdict.passed == verdict.total), detail=verdict.failure, figures=figures)


def require_sandbox() -> None:
    """Refuse a machine without a working sandbox, on which every completion would fail.

    Raises:
        TaskError: no sandbox works here; the message says why, and what to install.
    """
    try:
        choose_backend()
    except SandboxUnavailable as error:
        raise TaskError(f"verifier 'code': {error}") from error


# The attributes of an isolated verifier: see `Verifier`.
code.isolated = True  # type: ignore[attr-defined]
code.deadline = BUDGET_SECONDS + 60.0  # type: ignore[attr-defined]
code.check_machine = require_sandbox  # type: ignore[attr-defined]
code.prepare = require_sandbox  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------ the program


def find_program(text: str) -> Program | None:
    """Return the program in a completion: the last Python block, else the last unmarked one, else the text.

    A block that is not closed ends with the text, since a stop string may have removed its end. None
    stands for an empty program.

    >>> find_program("```\\nx = 1\\n```\\n```bash\\nls\\n```").source
    'x = 1\\n'
    """
    blocks: list[tuple[str, str]] = []
    opened: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif not fence[1]:
            blocks.append((opened[1].lower(), text[opened.end() + 1 : fence.start()]))
            opened = None
    if opened is not None:
        blocks.append((opened[1].lower(), text[opened.end() + 1 :]))
    python = [source for mark, source in blocks if mark in _PYTHON[:-1]]
    unmarked = [source for mark, source in blocks if not mark]
    for source in reversed(python or unmarked):
        return Program(source, fenced=True) if source.strip() else None
    return Program(text, fenced=False) if text.strip() and not blocks else None


def complete_program(program: Program, tests: CodeTests) -> str:
    """Return the source to run: the tests' prefix, followed by the program.

    A prefix ends with the signature and docstring of a function, which is a valid function by itself. A program that
    defines the function again replaces it, and uses the imports and helpers before it.
    """
    if not tests.prefix:
        return program.source
    names = rf"^(async\s+)?(def|class)\s+{re.escape(tests.function)}\b|^{re.escape(tests.function)}\s*[:=]"
    if re.search(names, program.source, re.MULTILINE):
        return f"{tests.prefix}\n{program.source}"
    lines = program.source.splitlines()
    first = next(line for line in lines if line.strip())
    if program.fenced and not first[0].isspace():  # a body that lost its indentation in the block
        lines = [f"    {line}" for line in lines]
    return tests.prefix + "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------- judging


def _judge_stdin(source: str, tests: CodeTests) -> CodeVerdict:
    begin, passed, failure, run = time.monotonic(), 0, "", 0
    for number, (given, expected) in enumerate(tests.cases, start=1):
        _check_budget(begin, number, tests)
        result = _run("stdin", source, given, tests)
        run = number
        if result.succeeded and same_output(result.stdout, expected):
            passed += 1
            continue
        wrong = f"printed {result.stdout.strip()[:60]!r}, expected {expected.strip()[:60]!r}"
        failure = failure or f"test {number}: {wrong if result.succeeded else result.reason}"
        if _is_syntax(result.stderr.strip().rpartition("\n")[2]):
            return CodeVerdict(0, len(tests), failure, syntax_error=True)
        # The other tests would probably run to the limit too, which is slow.
        if not tests.partial or result.outcome is Outcome.TIMED_OUT:
            break
    return CodeVerdict(passed, len(tests), failure, complete=run == len(tests))


def _judge_functional(source: str, tests: CodeTests) -> CodeVerdict:
    calls, expected = [], []
    for number, (given, answer) in enumerate(tests.cases, start=1):
        try:
            calls.append([json.loads(line) for line in given.split("\n") if line.strip()])
            expected.append(json.loads(answer))
        except ValueError as error:
            raise TaskError(f"functional tests must be JSON; test {number} is {given[:40]!r} ({error})") from error
    order = {"function": tests.function, "calls": calls, "seconds": tests.cpu_seconds}
    result = _run("functional", source, json.dumps(order), tests, runs=len(calls))
    reports, unloaded = _reports(result.stdout)
    passed, failure = 0, unloaded
    for number, answer in enumerate(expected, start=1):
        said = reports[number - 1] if number <= len(reports) else {}
        if "value" in said and said["value"] == answer:
            passed += 1
        elif not failure:
            missing = result.reason if not result.succeeded else "no result"
            wrong = f"returned {str(said.get('value'))[:60]}, expected {str(answer)[:60]}"
            failure = f"test {number}: {wrong if 'value' in said else said.get('error', missing)}"
    return CodeVerdict(passed, len(tests), failure, bool(unloaded) or len(reports) == len(tests), _is_syntax(unloaded))


def _judge_unit(source: str, tests: CodeTests) -> CodeVerdict:
    token = secrets.token_hex(16)
    statements = [f"{tests.setup}\n{statement}" if tests.setup else statement for statement in tests.statements]
    order = {"token": token, "tests": statements}
    result = _run("unit", source, json.dumps(order), tests)
    reports, unloaded = _reports(result.stdout)
    passed = {said.get("number") for said in reports if said.get("token") == token}
    failure = unloaded
    if len(passed) < len(tests) and not failure:
        errors = [said["error"] for said in reports if "error" in said]
        failure = str(errors[0]) if errors else result.reason if not result.succeeded else "it ended before the tests"
    return CodeVerdict(
        len(passed), len(tests), failure, bool(unloaded) or len(reports) == len(tests), _is_syntax(unloaded)
    )


def same_output(printed: str, expected: str) -> bool:
    """Return whether two outputs are equal line by line, as LiveCodeBench compares them.

    Blanks around the output and around each line are ignored. Lines of numbers alone are equal when the values are
    exactly equal.

    >>> same_output("1.0 2\\n", "1 2.00"), same_output("1 2", "1\\n2")
    (True, False)
    """
    ours = [line.strip() for line in printed.strip().split("\n")]
    theirs = [line.strip() for line in expected.strip().split("\n")]
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _same_line(printed: str, expected: str) -> bool:
    if printed == expected:
        return True
    try:
        return [Decimal(word) for word in printed.split()] == [Decimal(word) for word in expected.split()]
    except InvalidOperation:  # a word that is no number, or a signalling NaN
        return False


# ---------------------------------------------------------------------------------------------------------- running


@cache
def _driver() -> str:
    return Path(__file__).with_name("code_driver.py").read_text()


def _run(kind: str, source: str, stdin: str, tests: CodeTests, runs: int = 1) -> ProgramResult:
    seconds = max(1, min(tests.cpu_seconds * runs, int((BUDGET_SECONDS - WALL_EXTRA) / WALL_FACTOR)))
    wall = WALL_EXTRA + WALL_FACTOR * seconds
    limits = Limits(cpu_seconds=seconds, wall_seconds=wall, memory_bytes=tests.memory_mb * 2**20)
    # !a writes any text as an ASCII literal, including half surrogate pairs.
    return run_program(f"{_driver()}\n\nmain({kind!r}, {source!a})\n", stdin=stdin, limits=limits)


def _check_budget(begin: float, number: int, tests: CodeTests) -> None:
    if time.monotonic() - begin > BUDGET_SECONDS:
        raise SandboxError(f"{len(tests)} tests take longer than {BUDGET_SECONDS:g} s: stopped before test {number}")


def _reports(printed: str) -> tuple[list[dict[str, Any]], str]:
    """Return the driver's reports on the tests, and why the program did not load, or "".

    Lines that are no reports are skipped: the program may have printed them.
    """
    found: list[dict[str, Any]] = []
    for line in printed.splitlines():
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(said, dict) and "load" in said:
            return found, str(said["load"])
        if isinstance(said, dict):
            found.append(said)
    return found, ""


def _is_syntax(complaint: str) -> bool:
    return complaint.startswith(("SyntaxError", "IndentationError", "TabError"))


def _tests_of(prompt: Prompt) -> CodeTests:
    tests = prompt.metadata.get("tests")
    if isinstance(tests, CodeTests):
        return tests
    if isinstance(tests, Mapping):
        return CodeTests.from_json(tests)
    raise TaskError(
        f"verifier 'code' needs tests in the prompt's metadata; got {type(tests).__name__}; "
        "set metadata['tests'] to CodeTests(...).to_json()"
    )
