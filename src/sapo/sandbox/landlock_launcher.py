"""Contain this process, then execute the untrusted program in it. Needs the standard library alone.

landlock.py calls it as `python -I -S landlock_launcher.py ORDER`, where ORDER is JSON. A failure is written to the
status descriptor, and the program is not started. READY is written last, and exec closes the descriptor.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture
PATH_BENEATH = 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
# Rights on files that each version of Landlock handles: 13 at first, then REFER, TRUNCATE, IOCTL_DEV.
HANDLED_BITS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
HANDLED_NETWORK = 0b11  # bind and connect of TCP, from version 4
SCOPED = 0b11  # abstract sockets and signals, from version 6

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2

READY = b"ready"

libc = ctypes.CDLL(None, use_errno=True)


class RulesetAttributes(ctypes.Structure):
    """The kernel's struct landlock_ruleset_attr."""

    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class PathBeneath(ctypes.Structure):
    """The kernel's struct landlock_path_beneath_attr."""

    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


class Filter(ctypes.Structure):
    """The kernel's struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def contain(order: dict[str, Any]) -> None:
    """Drop root, set the limits, restrict files and filter system calls. No step can be undone."""
    become(order["user"])
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != order["parent"]:
        raise RuntimeError("the process that started this program has ended")
    used = threads_of(os.getuid())
    limits = {**order["limits"], "RLIMIT_NPROC": [used + order["threads"]] * 2}
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    restrict_files(order["readable"], order["devices"])
    for name, (soft, hard) in limits.items():
        most = resource.getrlimit(getattr(resource, name))[1]
        lowered = [value if most == resource.RLIM_INFINITY else min(value, most) for value in (soft, hard)]
        resource.setrlimit(getattr(resource, name), (lowered[0], lowered[1]))
    code = base64.b64decode(order["filter"])
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(Filter(len(code) // 8, code)), 0, 0)


def become(user: int | None) -> None:
    """Drop root for good to a user id; None where this process is not root."""
    if user is None:
        return
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def threads_of(user: int) -> int:
    """Count the threads that a user runs now: the limit counts all of them, not only those of one program."""
    count = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                if entry.stat().st_uid == user:
                    count += len(os.listdir(f"/proc/{entry.name}/task"))
            except OSError:  # it has ended
                pass
    return count


def restrict_files(readable: list[str], devices: list[str]) -> None:
    """Restrict this process to reading the named directories and files, and to writing /dev/null."""
    version = call("syscall", CREATE_RULESET, None, 0, 1)
    handled = (1 << HANDLED_BITS.get(version, HANDLED_BITS[5])) - 1
    network = HANDLED_NETWORK if version >= 4 else 0
    attributes = RulesetAttributes(handled, network, SCOPED if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = call("syscall", CREATE_RULESET, ctypes.byref(attributes), size, 0)
    for path in readable:
        allow(ruleset, path, EXECUTE | READ_FILE | READ_DIR)
    for path in devices:
        allow(ruleset, path, READ_FILE | (WRITE_FILE if path == "/dev/null" else 0))
    call("syscall", RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def allow(ruleset: int, path: str, rights: int) -> None:
    """Allow rights at and below a path. A path that does not exist needs no rule."""
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    if not os.path.isdir(path):
        rights &= ~READ_DIR
    rule = PathBeneath(rights, parent)
    call("syscall", ADD_RULE, ruleset, PATH_BENEATH, ctypes.byref(rule), 0)
    os.close(parent)


def call(name: str, *arguments: Any) -> int:
    """Call a function of the C library and raise OSError where it fails. Integers are passed in 64 bits."""
    wide = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    result = int(getattr(libc, name)(*wide))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}({arguments[0]}): {os.strerror(number)}")
    return result


def main() -> None:
    """Contain this process, then execute the program."""
    order = json.loads(sys.argv[1])
    status = order["status"]
    os.set_inheritable(status, False)
    try:
        contain(order)
        os.write(status, READY)
        os.execve(order["argv"][0], order["argv"], dict(os.environ))
    except BaseException as error:
        os.write(status, f"{type(error).__name__}: {error}".encode())
        os._exit(1)


if __name__ == "__main__":
    main()
