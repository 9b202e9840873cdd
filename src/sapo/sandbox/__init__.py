"""Running Python programs nobody has read: no network, no files, no memory beyond a limit, no process left behind.

    from sapo.sandbox import Limits, run_program
    result = run_program("print(int(input()) + 1)", stdin="41")
    result.outcome, result.stdout                     # Outcome.FINISHED, "42\\n"

Two ways, the first that proves itself on this machine: bubblewrap (namespaces of its own for everything), or Landlock
with a system call filter. Without either a program is refused, with what to install: limits alone are no sandbox. In
both the program sees the interpreter /usr/bin/python3 with its library, writes no file anywhere and inherits no
environment. They differ in one thing: under bubblewrap it may start a few processes, under Landlock none.
"""

from sapo.sandbox.choice import BackendReport, choose_backend, describe, run_program
from sapo.sandbox.result import Limits, Outcome, ProgramResult, SandboxError, SandboxUnavailable

__all__ = [
    "BackendReport",
    "Limits",
    "Outcome",
    "ProgramResult",
    "SandboxError",
    "SandboxUnavailable",
    "choose_backend",
    "describe",
    "run_program",
]
