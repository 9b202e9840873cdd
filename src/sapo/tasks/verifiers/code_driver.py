"""Run a model's program inside the sandbox, and unit tests in its process. sapo does not import this file.

code.py sends the text of this file, with a call of `main` at its end, to the sandbox's own interpreter. That may be
older than ours, so only the standard library is used. Reports go to the standard output with which the process was
started. What the program prints goes there too in stdin tests, where it is scored, and is dropped otherwise.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import json
import os
import signal
import sys
import types
from collections.abc import Callable
from typing import Any, TextIO

# The imports that LiveCodeBench puts before every program: its starter code uses List[int] without an import.
PREAMBLE = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "sys", "json", "builtins", "typing"),
)
RECURSION_LIMIT = 50_000  # as in LiveCodeBench

# Values that tests may compare. Objects of other classes are allowed where they inherit their equality, or where the
# class is of these modules.
PLAIN = (bool, int, float, complex, str, bytes, bytearray, type(None), range)
CONTAINERS = (list, tuple, set, frozenset, dict)
TRUSTED_MODULES = ("builtins", "array", "collections", "datetime", "decimal", "fractions", "numbers")


def main(kind: str, program: str) -> None:
    """Run a program, and then, depending on `kind`, nothing ("stdin"), calls ("functional") or tests ("unit")."""
    sys.setrecursionlimit(RECURSION_LIMIT)
    if kind == "stdin":
        load(program)
        return
    order = json.loads(sys.stdin.read())
    report = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(nowhere, descriptor)
    if kind == "functional":
        answer_calls(report, program, order)
    else:
        run_tests(report, program, order)


def load(program: str) -> types.ModuleType:
    """Run a program and return its module. A program may end itself early by SystemExit."""
    code = compile(program, "program.py", "exec", dont_inherit=True)
    # It replaces the driver as __main__, for programs that look themselves up.
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    module.__file__ = "/program.py"
    if lacks_names(program):
        for name in PREAMBLE:
            exec(f"from {name} import *\nimport {name}", module.__dict__)
    with contextlib.suppress(SystemExit):
        exec(code, module.__dict__)
    return module


def lacks_names(program: str) -> bool:
    """Return whether a program uses a name that it neither defines nor imports, and so needs the preamble."""
    import symtable

    used: set[str] = set()
    defined = {*dir(builtins), "__name__", "__file__", "__doc__", "__builtins__", "__annotations__"}
    todo = [symtable.symtable(program, "program.py", "exec")]
    while todo:
        table = todo.pop()
        todo += table.get_children()
        for symbol in table.get_symbols():
            if table.get_type() == "module" or symbol.is_global():
                (defined if symbol.is_assigned() or symbol.is_imported() else used).add(symbol.get_name())
    return bool(used - defined)


# ------------------------------------------------------------------------------------------------------------- calls


def answer_calls(report: TextIO, program: str, order: dict[str, Any]) -> None:
    """Call the function with each list of arguments and report what it returns, one JSON object a line."""

    def out_of_time(number: int, frame: object) -> None:
        write_report(report, error="timed out")
        os._exit(0)

    signal.signal(signal.SIGPROF, out_of_time)
    signal.setitimer(signal.ITIMER_PROF, order["seconds"])
    try:
        module = load(program)
        owner = module.Solution() if hasattr(module, "Solution") else module
        function = getattr(owner, order["function"])
    except BaseException as error:
        write_report(report, load=brief(error))
        return
    for arguments in order["calls"]:
        signal.setitimer(signal.ITIMER_PROF, order["seconds"])
        try:
            line = json.dumps({"value": function(*arguments)})
        except BaseException as error:
            write_report(report, error=brief(error))
        else:
            report.write(line + "\n")
            report.flush()


# ------------------------------------------------------------------------------------------------------------- tests


def run_tests(report: TextIO, program: str, order: dict[str, Any]) -> None:
    """Run each test in the program's namespace, and report it with the token, which the program does not get."""
    pristine = dict(vars(builtins))
    token = order["token"]
    try:
        module = load(program)
    except BaseException as error:
        write_report(report, load=brief(error))
        return
    namespace = dict(module.__dict__)
    for name, value in module.__dict__.items():
        if callable(value) and not (isinstance(value, type) and makes_only_itself(value)):
            namespace[name] = guarded(value)
    namespace["__builtins__"] = pristine
    for number, test in enumerate(order["tests"]):
        try:
            exec(compile(test, f"test{number}.py", "exec", dont_inherit=True), namespace)
        except BaseException as error:
            write_report(report, number=number, error=brief(error))
        else:
            write_report(report, number=number, token=token)


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that it cannot return an object of a class that could be equal to everything."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        value = function(*args, **kwargs)
        refuse_own_equality(value)
        return value

    return call


def refuse_own_equality(value: Any, depth: int = 0) -> None:
    """Refuse a value that is, or contains, an object of an untrusted class that defines its own equality."""
    kind = type(value)
    if kind in CONTAINERS and depth < 20:
        for item in [*value, *value.values()] if kind is dict else value:
            refuse_own_equality(item, depth + 1)
    elif kind not in PLAIN and defines_equality(kind):
        raise TypeError(f"a result of class {kind.__name__}, which defines its own equality, proves nothing")


def makes_only_itself(cls: type) -> bool:
    """Return whether calling a class gives an object of that class with inherited equality, which needs no guard."""
    own = [base for base in cls.__mro__ if not is_trusted(base)]
    return type(cls) is type and not defines_equality(cls) and not any("__new__" in vars(base) for base in own)


def defines_equality(cls: type) -> bool:
    """Return whether an untrusted class defines the equality of a class's objects."""
    return any("__eq__" in vars(base) and not is_trusted(base) for base in cls.__mro__)


def is_trusted(cls: type) -> bool:
    """Return whether a class is really the one of its name in a trusted module."""
    if cls.__module__ not in TRUSTED_MODULES:
        return False
    try:
        return functools.reduce(getattr, cls.__qualname__.split("."), sys.modules[cls.__module__]) is cls
    except (AttributeError, KeyError):
        return False


# ------------------------------------------------------------------------------------------------------------ shared


def write_report(report: TextIO, **what: Any) -> None:
    """Write one line of the report and flush it, since the next test may end the process."""
    report.write(json.dumps(what) + "\n")
    report.flush()


def brief(error: BaseException) -> str:
    """Return an exception as one short line."""
    try:
        text = " ".join(str(error).split())
    except BaseException:  # an exception of the program may raise another when it is printed
        text = ""
    return (type(error).__name__ + (f": {text}" if text else ""))[:200]
