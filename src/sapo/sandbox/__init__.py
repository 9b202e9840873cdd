"""Run untrusted Python programs: no network, no files, no memory beyond a limit, no process left behind.

    from sapo.sandbox import Limits, run_program
    result = run_program("print(int(input()) + 1)", stdin="41")
    result.outcome, result.stdout                     # Outcome.FINISHED, "42\\n"

There are two backends: bubblewrap, which gives the program its own namespaces, and Landlock with a system call filter.
The first that passes a test on this machine is used. Where neither does, programs are refused with what to install:
limits alone are no sandbox. In both, the program sees the interpreter /usr/bin/python3 with its library, can write no
file and inherits no environment. Under bubblewrap it may start a few processes, under Landlock none.
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
