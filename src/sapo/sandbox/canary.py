"""Test a backend with a program that tries to escape, and check from outside whether it did.

A backend is used only after it passed. That bubblewrap or Landlock is installed is not enough: in a container they may
be forbidden, or contain less than they promise.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from sapo.sandbox.result import Limits, ProgramResult

SECRET = "the canary's secret"

# Each attempt should end in an exception. The last line reports those that did not, and proves that the program ran.
PROGRAM = """
import json, os, socket, sys

order = json.loads(sys.stdin.read())
got_out = []

def attempt(name, action):
    try:
        action()
    except Exception:
        return
    got_out.append(name)

def connect(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.settimeout(1)
        s.connect(address)

def read(path):
    with open(path, "rb") as file:
        file.read(1)

def environment():
    with open(f"/proc/{order['parent']}/environ", "rb") as file:
        if not file.read(1):
            raise OSError("empty")

def signal_parent():
    # In a PID namespace of its own this number may belong to no process or to the program itself: no escape.
    if order["parent"] == os.getpid():
        raise OSError("myself")
    os.kill(order["parent"], 0)

attempt("connect by TCP", lambda: connect(socket.AF_INET, ("127.0.0.1", order["port"])))
attempt("connect to an abstract socket", lambda: connect(socket.AF_UNIX, order["abstract"]))
attempt("connect to a socket file", lambda: connect(socket.AF_UNIX, order["path"]))
attempt("read a file", lambda: read(order["secret"]))
attempt("write a file", lambda: open(order["target"], "w").close())
attempt("write in /tmp", lambda: open(order["temporary"], "w").close())
attempt("read the environment of the process that started it", environment)
attempt("signal that process", signal_parent)
print(json.dumps({"got_out": got_out, "uid": os.getuid(), "environment": sorted(os.environ)}))
"""


def prove(run: Callable[[str, str, Limits], ProgramResult]) -> str | None:
    """Return why a backend's `run(source, stdin, limits)` does not contain the test program, or None if it does."""
    with ExitStack() as stack:
        # Open to every user, so that the sandbox refuses access and not the permissions of the file.
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sapo-canary-")))
        directory.chmod(0o777)
        secret, target = directory / "secret", directory / "target"
        secret.write_text(SECRET)
        secret.chmod(0o644)
        temporary = Path("/tmp", f"sapo-canary-{os.urandom(8).hex()}")
        stack.callback(temporary.unlink, missing_ok=True)
        abstract = f"\0sapo-canary-{os.getpid()}-{os.urandom(8).hex()}"
        listeners = [
            _listen(stack, socket.AF_INET, ("127.0.0.1", 0)),
            _listen(stack, socket.AF_UNIX, abstract),
            _listen(stack, socket.AF_UNIX, str(directory / "socket")),
        ]
        (directory / "socket").chmod(0o777)
        order = {
            "parent": os.getpid(),
            "port": listeners[0].getsockname()[1],
            "abstract": abstract,
            "path": str(directory / "socket"),
            "secret": str(secret),
            "target": str(target),
            "temporary": str(temporary),
        }
        result = run(PROGRAM, json.dumps(order), Limits())
        if not result.succeeded:
            return f"a harmless program did not finish: {result.reason}"
        try:
            said = json.loads(result.stdout)
        except ValueError:
            return f"a harmless program printed {result.stdout[:200]!r} instead of its report"
        reached = list(said["got_out"])
        reached += ["write a file, seen from outside"] if target.exists() else []
        reached += ["connect, seen from outside" for listener in listeners if _was_called(listener)][:1]
        reached += ["be root"] if said["uid"] == 0 else []
        inherited = {"HOME", "USER", "VIRTUAL_ENV", "PYTHONPATH"}.intersection(said["environment"])
        reached += [f"see the environment's {name}" for name in sorted(inherited)]
        return f"a program could {', '.join(reached)}" if reached else None


def _listen(stack: ExitStack, family: int, address: object) -> socket.socket:
    listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
    listener.bind(address)  # type: ignore[arg-type]  # each family has its own form
    listener.listen(1)
    listener.setblocking(False)
    return listener


def _was_called(listener: socket.socket) -> bool:
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return False
    return True
