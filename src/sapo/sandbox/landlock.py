"""Contain one process without namespaces: Landlock for files, a system call filter for everything else, and limits.

The filter lets a program start threads but no process, so that nothing can outlive it. The program can open for reading
what the interpreter needs, and nothing else. Landlock does not hide that other files exist, nor their sizes. Root
privileges are dropped first.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sapo.sandbox import landlock_launcher, seccomp
from sapo.sandbox.bubblewrap import INTERPRETER, NOBODY, ROOT_DIRECTORIES, SYSTEM_DIRECTORIES
from sapo.sandbox.result import Limits, SandboxError
from sapo.sandbox.supervisor import Ending, Launch, memory_file

READABLE_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


class Landlock:
    """The backend for machines where no namespaces can be made, such as most containers."""

    name = "landlock"

    def __init__(self) -> None:
        self.detail = "Landlock and seccomp"

    def why_not(self) -> str | None:
        """Return what is missing on this machine, or None. Nothing is run in a sandbox yet."""
        version = landlock_version()
        if version is None:
            return "the kernel has no Landlock: Linux 5.13 or newer, with landlock among its security modules (lsm=)"
        self.detail = f"Landlock {version} and seccomp"
        try:
            seccomp.allowed_calls()
        except ImportError:
            return "no pyseccomp: pip install 'sapo-rl[sandbox]'"
        except RuntimeError as error:
            return f"{error}: apt-get install libseccomp2"
        return None

    @contextmanager
    def launch(self, source: bytes, limits: Limits, status_write: int) -> Iterator[Launch]:
        """Yield the command of the launcher, which contains itself and then executes the program."""
        program = memory_file("program", source)
        try:
            order = {
                "parent": os.getpid(),
                "user": NOBODY if os.geteuid() == 0 else None,
                "status": status_write,
                "readable": [*SYSTEM_DIRECTORIES, *ROOT_DIRECTORIES, "/etc/ld.so.cache"],
                "devices": READABLE_DEVICES,
                "limits": _limits(limits),
                "threads": limits.processes,
                "filter": base64.b64encode(seccomp.allowed_calls()).decode(),
                "argv": [INTERPRETER, "-s", f"/dev/fd/{program}"],
            }
            launcher = [sys.executable or INTERPRETER, "-I", "-S", landlock_launcher.__file__, json.dumps(order)]
            yield Launch(tuple(launcher), (status_write, program), status_write)
        finally:
            os.close(program)

    def exit_code(self, ending: Ending) -> int:
        """Return the program's exit code, 128 + n for signal n.

        Raises:
            SandboxError: the launcher failed before it executed the program.
        """
        if ending.status != landlock_launcher.READY:
            said = (ending.status or ending.stderr).decode(errors="replace").strip()[-300:]
            raise SandboxError(f"a program could not be contained: {said or f'exit code {ending.returncode}'}")
        return ending.returncode if ending.returncode >= 0 else 128 - ending.returncode


def landlock_version() -> int | None:
    """Return the version of the kernel's Landlock, or None where it is missing or switched off."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = int(libc.syscall(landlock_launcher.CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))
    return version if version > 0 else None


def _limits(limits: Limits) -> dict[str, list[int]]:
    return {
        "RLIMIT_AS": [limits.memory_bytes, limits.memory_bytes],
        "RLIMIT_CPU": [limits.cpu_seconds, limits.cpu_seconds + 1],
        "RLIMIT_NOFILE": [limits.open_files, limits.open_files],
        "RLIMIT_STACK": [limits.stack_bytes, limits.stack_bytes],
        "RLIMIT_FSIZE": [0, 0],
        "RLIMIT_CORE": [0, 0],
        "RLIMIT_MEMLOCK": [0, 0],
    }
