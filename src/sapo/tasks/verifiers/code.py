"""The verifier `code`: run a completion's program in the sandbox against tests; it is right when all pass.

No expected result enters the process of the program. Stdin and functional tests are scored here, from what the program
printed or returned. Unit tests, as in HumanEval and MBPP, are Python statements: they run in a sandbox of their own
(code_judge.py), and ask the program's process for the results of its functions. What comes back is rebuilt as a value
of a built-in type, so that a program can neither see the tests nor change what `==` means in them (docs/adr/0025).
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sapo.data import Prompt, Score, Status
from sapo.errors import TaskError
from sapo.sandbox import Limits, Outcome, ProgramResult, SandboxError, SandboxUnavailable, choose_backend, run_program
from sapo.tasks.verifiers.code_outputs import same_output, same_value
from sapo.tasks.verifiers.code_program import complete_program, find_program, names_wanted
from sapo.tasks.verifiers.code_tests import CodeTests

# Longer programs are unparseable, before the interpreter fails on them.
MAX_PROGRAM_LENGTH = 256 * 1024

# For all tests of one completion, by the clock. A program that takes longer without a failure is not scored.
BUDGET_SECONDS = 240.0
# Seconds by the clock for each second of CPU time, since other work may share the machine, and for the start.
WALL_FACTOR, WALL_EXTRA = 2.5, 10.0


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
    program = find_program(text, names_wanted(tests))
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
code.check_reference = lambda prompt: _tests_of(prompt)  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------------------- judging


def _judge_stdin(source: str, tests: CodeTests) -> CodeVerdict:
    begin, passed, failure, run = time.monotonic(), 0, "", 0
    for number, (given, expected) in enumerate(tests.cases, start=1):
        _check_budget(begin, number, tests)
        result = _run("stdin", source, given, tests)
        run = number
        if result.succeeded and _agrees(tests, given, result.stdout, expected):
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
    with all_digits():
        return _judge_calls(source, tests)


def _judge_calls(source: str, tests: CodeTests) -> CodeVerdict:
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
        if said.get("value", 0) is None and said.get("empty") is True and answer == []:
            said = {"value": []}
        if "value" in said and _agrees(tests, calls[number - 1], said["value"], answer):
            passed += 1
        elif not failure:
            missing = result.reason if not result.succeeded else "no result"
            wrong = f"returned {str(said.get('value'))[:60]}, expected {str(answer)[:60]}"
            failure = f"test {number}: {wrong if 'value' in said else said.get('error', missing)}"
    return CodeVerdict(passed, len(tests), failure, bool(unloaded) or len(reports) == len(tests), _is_syntax(unloaded))


def _agrees(tests: CodeTests, given: Any, got: Any, expected: Any) -> bool:
    """Return whether an output is right: as the tests' checker says, or because it is the expected one."""
    if not tests.checker:
        compare = same_output if tests.kind == "stdin" else same_value
        return compare(got, expected, tests.float_tolerance)
    order = json.dumps([given, got, expected])
    digits = "getattr(sys, 'set_int_max_str_digits', int)(0)"
    source = f"{tests.checker}\nimport json, sys\n{digits}\nprint(bool(check(*json.loads(sys.stdin.read()))))\n"
    result = run_program(source, stdin=order, limits=_limits(tests))
    if not result.succeeded:
        raise SandboxError(f"the tests' checker failed: {result.reason}")
    return result.stdout.strip().rpartition("\n")[2] == "True"


def _judge_unit(source: str, tests: CodeTests) -> CodeVerdict:
    order = {
        **{"function": tests.function, "prefix": tests.prefix},
        **{"tests": list(tests.statements), "setup": tests.setup},
    }
    judge, program = _run_beside(source, json.dumps(order), tests)
    reports, unloaded = _reports(judge.stdout)
    passed = {said.get("number") for said in reports if said.get("passed") is True}
    failure = unloaded
    if len(passed) < len(tests) and not failure:
        errors = [said["error"] for said in reports if "error" in said]
        ended = program.reason if not program.succeeded else judge.reason if not judge.succeeded else ""
        failure = str(errors[0]) if errors else ended or "it ended before the tests"
    return CodeVerdict(
        len(passed), len(tests), failure, bool(unloaded) or len(reports) == len(tests), _is_syntax(unloaded)
    )


# ---------------------------------------------------------------------------------------------------------- running

_digits_lock = threading.Lock()
_digits_wanted: list[int] = []
"""Python's limit before, once for each judgement under way."""


@contextmanager
def all_digits() -> Iterator[None]:
    """Lift Python's limit of 4,300 digits of an integer in text: judges of competitions have none."""
    if not hasattr(sys, "set_int_max_str_digits"):
        yield
        return
    with _digits_lock:
        _digits_wanted.append(_digits_wanted[0] if _digits_wanted else sys.get_int_max_str_digits())
        sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        with _digits_lock:
            before = _digits_wanted.pop()
            if not _digits_wanted:
                sys.set_int_max_str_digits(before)


@cache
def _driver(name: str) -> str:
    """Return the source of what runs in a sandbox: the text of two of our files, as one program."""
    here = Path(__file__).parent
    wire, driver = (here.joinpath(f"{part}.py").read_text() for part in ("code_wire", name))
    ours = ("from __future__", "from sapo.")
    return wire + "\n".join(line for line in driver.splitlines() if not line.startswith(ours))


def _limits(tests: CodeTests, runs: int = 1) -> Limits:
    seconds = max(1, min(tests.cpu_seconds * runs, int((BUDGET_SECONDS - WALL_EXTRA) / WALL_FACTOR)))
    wall = WALL_EXTRA + WALL_FACTOR * seconds
    return Limits(cpu_seconds=seconds, wall_seconds=wall, memory_bytes=tests.memory_mb * 2**20)


def _run(kind: str, source: str, stdin: str, tests: CodeTests, runs: int = 1) -> ProgramResult:
    # !a writes any text as an ASCII literal, including half surrogate pairs.
    program = f"{_driver('code_driver')}\n\nmain({kind!r}, {source!a})\n"
    return run_program(program, stdin=stdin, limits=_limits(tests, runs))


def _run_beside(source: str, order: str, tests: CodeTests) -> tuple[ProgramResult, ProgramResult]:
    """Run the judge of unit tests and the program, each in its sandbox, joined by a socket; return both results."""
    end_of_judge, end_of_program = socket.socketpair()
    judge = f"{_driver('code_judge')}\n\nmain({end_of_judge.fileno()})\n"
    program = f"{_driver('code_driver')}\n\nmain('unit', {source!a}, {end_of_program.fileno()})\n"
    limits = _limits(tests)
    with end_of_judge, end_of_program, ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_program, program, stdin="{}", limits=limits, handed=(end_of_program,))
        try:
            result = run_program(judge, stdin=order, limits=limits, handed=(end_of_judge,))
        finally:
            end_of_judge.close()  # so that the program sees the end of the tests, also where the judge did not start
        return result, running.result()


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
