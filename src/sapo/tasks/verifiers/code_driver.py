"""Runs a model's program inside the sandbox, and tests in its process where they ask for that. Not imported by sapo.

code.py sends this file's text with a call of `main` at its end to the sandbox's own interpreter, which may be older
than ours: it needs the standard library alone. What it reports goes to the standard output it was started with; what
the program prints goes there too when that is what is judged, and nowhere otherwise.
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

# What LiveCodeBench puts before every program: its starter code writes List[int] and imports nothing.
PREAMBLE = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "sys", "json", "builtins", "typing"),
)
RECURSION_LIMIT = 50_000  # likewise LiveCodeBench's

# The values that tests compare; of other classes only such as keep the equality they inherit, or are of these modules.
PLAIN = (bool, int, float, complex, str, bytes, bytearray, type(None), range)
CONTAINERS = (list, tuple, set, frozenset, dict)
TRUSTED_MODULES = ("builtins", "array", "collections", "datetime", "decimal", "fractions", "numbers")


def main(kind: str, program: str) -> None:
    """Run `program` and, by `kind`, nothing more ("stdin"), calls ("functional") or tests ("unit")."""
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
    """The program's module after it has run; an exit of its own ends it early and is not an error."""
    code = compile(program, "program.py", "exec", dont_inherit=True)
    # In the driver's place, so that what looks itself up as __main__ finds the program.
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    module.__file__ = "/program.py"
    if lacks_names(program):
        for name in PREAMBLE:
            exec(f"from {name} import *\nimport {name}", module.__dict__)
    with contextlib.suppress(SystemExit):
        exec(code, module.__dict__)
    return module


def lacks_names(program: str) -> bool:
    """Whether the program uses a name that it nowhere defines or imports: then it counts on the preamble."""
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
    """Call the function with each list of arguments and write what it returns, one JSON object a line."""

    def out_of_time(number: int, frame: object) -> None:
        say(report, error="timed out")
        os._exit(0)

    signal.signal(signal.SIGPROF, out_of_time)
    signal.setitimer(signal.ITIMER_PROF, order["seconds"])
    try:
        module = load(program)
        owner = module.Solution() if hasattr(module, "Solution") else module
        function = getattr(owner, order["function"])
    except BaseException as error:
        say(report, load=brief(error))
        return
    for arguments in order["calls"]:
        signal.setitimer(signal.ITIMER_PROF, order["seconds"])
        try:
            line = json.dumps({"value": function(*arguments)})
        except BaseException as error:
            say(report, error=brief(error))
        else:
            report.write(line + "\n")
            report.flush()


# ------------------------------------------------------------------------------------------------------------- tests


def run_tests(report: TextIO, program: str, order: dict[str, Any]) -> None:
    """Run each test in the program's namespace and report it with the token, which the program has not been told."""
    pristine = dict(vars(builtins))
    token = order["token"]
    try:
        module = load(program)
    except BaseException as error:
        say(report, load=brief(error))
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
            say(report, number=number, error=brief(error))
        else:
            say(report, number=number, token=token)


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, refusing to return an object of the program's own class, which could call itself equal to all."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        value = function(*args, **kwargs)
        refuse_own_equality(value)
        return value

    return call


def refuse_own_equality(value: Any, depth: int = 0) -> None:
    """TypeError for a value that is, or holds, an object of a class that defines equality and is not a trusted one."""
    kind = type(value)
    if kind in CONTAINERS and depth < 20:
        for item in [*value, *value.values()] if kind is dict else value:
            refuse_own_equality(item, depth + 1)
    elif kind not in PLAIN and defines_equality(kind):
        raise TypeError(f"a result of class {kind.__name__}, which defines its own equality, proves nothing")


def makes_only_itself(cls: type) -> bool:
    """Whether calling a class gives an object of it that is equal to what any object is: no guard is needed."""
    own = [base for base in cls.__mro__ if not is_trusted(base)]
    return type(cls) is type and not defines_equality(cls) and not any("__new__" in vars(base) for base in own)


def defines_equality(cls: type) -> bool:
    """Whether equality of its objects is the work of a class that is not trusted."""
    return any("__eq__" in vars(base) and not is_trusted(base) for base in cls.__mro__)


def is_trusted(cls: type) -> bool:
    """Whether a class is found where it says it is, in one of the trusted modules."""
    if cls.__module__ not in TRUSTED_MODULES:
        return False
    try:
        return functools.reduce(getattr, cls.__qualname__.split("."), sys.modules[cls.__module__]) is cls
    except (AttributeError, KeyError):
        return False


# ------------------------------------------------------------------------------------------------------------ shared


def say(report: TextIO, **what: Any) -> None:
    """One line of the report, at once: the next thing may end the process."""
    report.write(json.dumps(what) + "\n")
    report.flush()


def brief(error: BaseException) -> str:
    """An exception in one short line."""
    try:
        text = " ".join(str(error).split())
    except BaseException:  # an exception of the program's may not want to be printed
        text = ""
    return (type(error).__name__ + (f": {text}" if text else ""))[:200]
