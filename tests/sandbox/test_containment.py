"""Hostile programs, each in every backend, as root and as a plain user.

After every one of them `Sandbox.run` looks through /proc for what it left behind, and that it ended with the deadline.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

import sapo
from support.sandbox_cases import PLAIN_USER, SECRET, attempts

# ------------------------------------------------------------------------------------------------------- the network


def test_no_network_is_reached(sandbox):
    with socket.socket() as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen(5)
        udp.bind(("127.0.0.1", 0))
        body = """
import socket
def tcp():
    socket.create_connection(("127.0.0.1", order["tcp"]), 1)
def udp():
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", order["udp"]))
def raw_tcp():
    # through the C library, whatever Python's module thinks of it
    call("socket", 2, 1, 0)
attempt("tcp", tcp)
attempt("udp", udp)
attempt("raw tcp", raw_tcp)
attempt("listen", lambda: socket.create_server(("0.0.0.0", 0)))
attempt("resolve", lambda: socket.getaddrinfo("example.org", 80))
attempt("netlink", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))
"""
        assert attempts(sandbox, body, {"tcp": tcp.getsockname()[1], "udp": udp.getsockname()[1]}) == []
        tcp.setblocking(False)
        udp.setblocking(False)
        with pytest.raises(BlockingIOError):
            tcp.accept()
        with pytest.raises(BlockingIOError):
            udp.recv(1)


def test_no_abstract_socket_is_reached(sandbox):
    with (
        socket.socket(socket.AF_UNIX) as stream,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram,
    ):
        names = [f"\0sapo-test-{kind}-{os.urandom(8).hex()}" for kind in ("stream", "datagram")]
        stream.bind(names[0])
        stream.listen(5)
        datagram.bind(names[1])
        body = """
import socket
attempt("stream", lambda: socket.socket(socket.AF_UNIX).connect(order[0]))
attempt("datagram", lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"x", order[1]))
pair = []
attempt("a pair", lambda: pair.extend(socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)) or print("made a pair"))
if pair:
    attempt("out of a pair", lambda: pair[0].sendto(b"x", order[1]))
"""
        assert set(attempts(sandbox, body, names)) <= {"made a pair", "did a pair"}
        datagram.setblocking(False)
        with pytest.raises(BlockingIOError):
            datagram.recv(1)


# ------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def outside():
    """A directory open to everybody, so that it is the sandbox that refuses and not the rights on a file."""
    import shutil
    import tempfile

    directory = Path(tempfile.mkdtemp(prefix="sapo-outside-", dir="/var/tmp"))
    directory.chmod(0o777)
    (directory / "secret").write_text("secret")
    (directory / "secret").chmod(0o666)
    if os.geteuid() == 0:
        os.chown(directory / "secret", PLAIN_USER, PLAIN_USER)
    yield directory
    shutil.rmtree(directory)


def test_no_file_outside_is_read(sandbox, outside):
    body = """
for path in order:
    attempt(path, lambda: open(path, "rb").read(1))
    attempt("list " + path, lambda: os.listdir(path))
"""
    project = Path(sapo.__file__)
    paths = [
        outside / "secret",
        outside,
        project,
        project.parent,
        "/etc/shadow",
        "/etc/passwd",
        "/root",
        "/home",
        "/var",
    ]
    assert attempts(sandbox, body, [str(path) for path in paths]) == []


def test_no_file_is_written_anywhere(sandbox, outside):
    body = """
def write(path, mode):
    with open(path, mode) as file:
        file.write("x")
targets = [order + "/new", order + "/secret"]
for directory in ["/", "/tmp", "/dev", "/dev/shm", "/usr", "/usr/lib", "/usr/bin", "/etc", "/var/tmp", "/proc", "/run"]:
    targets.append(directory + "/sapo-was-here")
for target in targets:
    attempt("write " + target, lambda: write(target, "w"))
    attempt("mkdir " + target, lambda: os.mkdir(target + "-d"))
    attempt("symlink " + target, lambda: os.symlink("/etc", target + "-s"))
attempt("append to the program", lambda: write(__file__, "a"))
attempt("overwrite the program", lambda: write(__file__, "r+"))
attempt("write to standard input", lambda: write("/dev/stdin", "a"))
attempt("unlink", lambda: os.unlink(order + "/secret"))
attempt("rename", lambda: os.rename(order + "/secret", order + "/other"))
attempt("link", lambda: os.link(order + "/secret", order + "/other"))
attempt("chmod", lambda: os.chmod(order + "/secret", 0o777))
attempt("utime", lambda: os.utime(order + "/secret"))
attempt("truncate", lambda: os.truncate(order + "/secret", 0))
attempt("xattr", lambda: os.setxattr(order + "/secret", "user.x", b"x"))
attempt("fifo", lambda: os.mkfifo(order + "/fifo"))
"""
    before = os.stat(outside / "secret")
    assert attempts(sandbox, body, str(outside)) == []
    assert [p.name for p in outside.iterdir()] == ["secret"]
    after = os.stat(outside / "secret")
    assert (after.st_mode, after.st_size, after.st_mtime_ns) == (before.st_mode, before.st_size, before.st_mtime_ns)
    for directory in ("/tmp", "/dev", "/dev/shm", "/var/tmp", "/"):
        assert not Path(directory, "sapo-was-here").exists()


def test_every_directory_a_program_can_see_refuses_a_file(sandbox):
    body = """
seen = 0
for top, directories, _ in os.walk("/"):
    if top == "/proc":
        directories[:] = ["self", "sys"]
    seen += 1
    try:
        os.close(os.open(top + "/sapo-was-here", os.O_CREAT | os.O_WRONLY))
    except OSError:
        continue
    print("wrote in", top)
"""
    assert attempts(sandbox, body, cpu_seconds=10, wall_seconds=20.0) == []


# ----------------------------------------------------------------------------------------------------------- secrets


def test_no_secret_of_the_environment_is_seen(sandbox):
    body = """
def look(path):
    with open(path, "rb") as file:
        if order.encode() in file.read():
            print("found it in", path)
print("found it") if order in repr(dict(os.environ)) else None
for pid in {"self", "1", str(os.getppid()), *(str(n) for n in range(1, 70000, 1) if os.path.exists(f"/proc/{n}"))}:
    for name in ("environ", "cmdline"):
        attempt_path = f"/proc/{pid}/{name}"
        try:
            look(attempt_path)
        except OSError:
            pass
"""
    assert attempts(sandbox, body, SECRET, cpu_seconds=5, wall_seconds=15.0) == []


def test_no_descriptor_of_ours_is_inherited(sandbox):
    body = """
import fcntl
order = None
for number in range(3, 256):
    try:
        target = os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        try:
            kind = os.fstat(number)
            target = f"mode {kind.st_mode:o}"
        except OSError:
            continue
    writable = (fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE) != os.O_RDONLY
    print(number, target, writable)
"""
    # The program itself, read-only, where it is not a file of its own.
    allowed = [line for line in attempts(sandbox, body) if not line.endswith("False") or "program" not in line]
    assert [line for line in allowed if not (line.split()[1] == "mode" and line.endswith("False"))] == []
