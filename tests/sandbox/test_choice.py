"""Which backend is used, that each has to prove itself, and what is said when none can be had."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import sapo
from sapo.sandbox import (
    Limits,
    Outcome,
    ProgramResult,
    SandboxError,
    SandboxUnavailable,
    canary,
    choice,
    choose_backend,
    describe,
    run_program,
    seccomp,
)
from sapo.sandbox.bubblewrap import Bubblewrap, find_bubblewrap
from sapo.sandbox.landlock import Landlock
from sapo.sandbox.supervisor import Launch
from support.sandbox_cases import SERVER, left_behind, machine_allows

USABLE = [report.name for report in describe() if report.usable]
needs_any = pytest.mark.skipif(not USABLE, reason=f"no sandbox here: {'; '.join(map(str, describe()))}")


@pytest.fixture
def unproven(monkeypatch):
    """As in a process that has not tried any backend yet."""
    monkeypatch.setattr(choice, "_proven", {})
    monkeypatch.setattr(choice, "_refused", {})


class Bare:
    """What must never be used: the interpreter with nothing around it, or with a part of what is promised."""

    name = "bubblewrap"
    detail = "nothing at all"

    def __init__(self, *prefix: str) -> None:
        self.prefix = prefix

    def why_not(self) -> None:
        return None

    @contextmanager
    def launch(self, source, limits, status_write):
        argv = (*self.prefix, sys.executable, "-c", source.decode())
        yield Launch(argv, (status_write,), status_write)

    def exit_code(self, ending) -> int:
        return ending.returncode


def test_a_backend_that_contains_nothing_does_not_pass_the_canary(monkeypatch):
    name = os.urandom(8)
    monkeypatch.setattr(canary.os, "urandom", lambda size: name)
    reason = choice._prove(Bare())
    assert not Path(f"/tmp/sapo-canary-{name.hex()}").exists()  # what it wrote is taken away
    for escape in ("connect by TCP", "abstract socket", "socket file", "read a file", "write a file", "signal that"):
        assert escape in reason
    assert "write in /tmp" in reason
    assert "seen from outside" in reason


@pytest.mark.skipif(os.geteuid() != 0, reason="drops from root")
def test_another_user_alone_does_not_pass_the_canary():
    bare = Bare("/usr/bin/setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
    reason = choice._prove(bare)
    assert "connect by TCP" in reason
    assert "be root" not in reason


def test_the_canary_needs_its_own_report():
    silent = ProgramResult(Outcome.FINISHED, 0, None, "", "", 0.1)
    assert "instead of its report" in canary.prove(lambda *_: silent)
    failed = ProgramResult(Outcome.FINISHED, 1, None, "", "bwrap: no namespaces", 0.1)
    assert canary.prove(lambda *_: failed) == "a harmless program did not finish: exit code 1: bwrap: no namespaces"


def test_without_a_backend_a_program_is_refused_with_what_to_install(unproven, monkeypatch):
    monkeypatch.setattr(choice, "find_bubblewrap", list)
    monkeypatch.setattr(Landlock, "why_not", lambda self: "the kernel has no Landlock")
    with pytest.raises(SandboxUnavailable) as caught:
        run_program("print(1)")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("bubblewrap: no bwrap", "landlock: the kernel has no Landlock", "apt-get install bubblewrap"):
        assert part in message
    assert "pip install 'sapo-rl[sandbox]'" in message
    assert [(report.usable, report.chosen) for report in describe()] == [(False, False)] * 2


def test_a_backend_that_fails_its_proof_is_passed_over_with_the_reason(unproven, monkeypatch):
    monkeypatch.setattr(choice, "find_bubblewrap", lambda: [Bare()])
    reports = describe()
    assert not reports[0].usable
    assert "a program could connect by TCP" in reports[0].detail
    with pytest.raises(SandboxUnavailable, match="a program could connect by TCP"):
        choose_backend("bubblewrap")


def test_the_proof_is_made_once_in_a_process(unproven, monkeypatch):
    count = []
    monkeypatch.setattr(choice, "find_bubblewrap", lambda: [Bare()])
    monkeypatch.setattr(choice, "_prove", lambda candidate: count.append(candidate.name))
    for _ in range(3):
        assert choose_backend().name == "bubblewrap"
    assert count == ["bubblewrap"]


def test_without_an_interpreter_the_message_names_it(unproven, monkeypatch):
    monkeypatch.setattr(choice, "INTERPRETER", "/usr/bin/no-such-python3")
    with pytest.raises(SandboxUnavailable, match=r"no interpreter /usr/bin/no-such-python3.*apt-get install python3"):
        choose_backend()


def test_on_another_system_a_program_is_refused(unproven, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxUnavailable, match="it needs Linux, and this is darwin"):
        choose_backend()


def test_a_bubblewrap_too_old_is_refused_with_its_version(tmp_path):
    old = tmp_path / "bwrap"
    old.write_text("#!/bin/sh\necho bubblewrap 0.6.1\n")
    old.chmod(0o755)
    assert "is bubblewrap 0.6.1, and 0.8 or newer is needed" in Bubblewrap(old, "the system's").why_not()


def test_a_bubblewrap_that_may_make_no_namespace_is_refused_with_what_it_said(tmp_path):
    refusing = tmp_path / "bwrap"
    refusing.write_text(
        '#!/bin/sh\ncase "$1" in --version) echo bubblewrap 0.11.0;; '
        "*) echo 'bwrap: No permissions to create new namespace' >&2; exit 1;; esac\n"
    )
    refusing.chmod(0o755)
    for directory in [tmp_path, *tmp_path.parents[:-1]]:
        if directory.stat().st_uid == os.geteuid():
            directory.chmod(directory.stat().st_mode | stat.S_IXOTH)
    candidate = Bubblewrap(refusing, "the system's")
    assert candidate.why_not() is None
    assert "No permissions to create new namespace" in choice._prove(candidate)


def test_without_pyseccomp_landlock_says_what_to_install(monkeypatch):
    seccomp.allowed_calls.cache_clear()
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    assert Landlock().why_not() in (
        "no pyseccomp: pip install 'sapo-rl[sandbox]'",
        "the kernel has no Landlock: Linux 5.13 or newer, with landlock among its security modules (lsm=)",
    )


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="one of bubblewrap, landlock; got 'docker'"):
        run_program("print(1)", backend="docker")


@pytest.mark.parametrize("limit", [{"cpu_seconds": 0}, {"wall_seconds": -1}, {"memory_bytes": 0}, {"cpu_seconds": 1.5}])
def test_a_limit_that_is_none_is_refused(limit):
    with pytest.raises(ValueError, match="must be"):
        Limits(**limit)


@pytest.mark.parametrize("backend", USABLE)
def test_a_backend_says_what_it_is(backend):
    report = next(report for report in describe() if report.name == backend)
    assert report.usable
    assert report.chosen is (backend == USABLE[0])
    assert str(report).startswith(f"{backend}: {'in use' if report.chosen else 'usable'}: ")


@pytest.mark.skipif("bubblewrap" not in USABLE, reason="no bubblewrap here")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root drops to a user who cannot get there")
def test_a_bubblewrap_below_a_private_directory_is_used_all_the_same(tmp_path):
    original = next(found for found in find_bubblewrap() if "package" in found.origin).executable.resolve()
    package = original.parents[1]
    for directory in (package, package.with_name(f"{package.name}.libs")):
        subprocess.run(["/bin/cp", "-r", str(directory), str(tmp_path)], check=True)
    tmp_path.chmod(0o700)
    private = Bubblewrap(tmp_path / original.relative_to(package.parent), "a private one")
    assert private.why_not() is None
    assert tmp_path not in private.executable.parents
    assert choice._prove(private) is None


@pytest.mark.parametrize("backend", choice.BACKENDS)
def test_a_backend_is_used_wherever_the_machine_allows_it(backend):
    if not machine_allows(backend):
        pytest.skip(f"this machine cannot have {backend}")
    assert backend in USABLE, [str(report) for report in describe()]


def test_a_forked_child_proves_its_backend_anew(monkeypatch):
    monkeypatch.setattr(choice, "_proven", {"bubblewrap": Bare()})
    monkeypatch.setattr(choice, "_refused", {"landlock": "not tried"})
    monkeypatch.setattr(choice, "_process", os.getpid() + 1)
    monkeypatch.setattr(choice, "find_bubblewrap", list)
    monkeypatch.setattr(Landlock, "why_not", lambda self: "no")
    with pytest.raises(SandboxUnavailable):
        choose_backend()


# --------------------------------------------------------------------------------------------------- the user's side


@pytest.mark.parametrize("backend", USABLE)
def test_programs_run_side_by_side_from_threads(backend):
    results = {}

    def work(number):
        source = "import sys, time\ntime.sleep(0.2)\nprint(int(sys.stdin.read()) ** 2)"
        results[number] = run_program(source, stdin=str(number), backend=backend).stdout

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: f"{number**2}\n" for number in range(8)}


def children_of_this_process() -> set[str]:
    """Ids of the processes that any of our threads has started, the dead ones nobody has waited for included."""
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


@pytest.mark.parametrize("backend", USABLE)
def test_many_runs_leave_no_descriptor_and_no_child(backend):
    run_program("print(1)", backend=backend)
    before, children = sorted(os.listdir("/proc/self/fd")), children_of_this_process()
    for _ in range(10):
        run_program("print(1)", backend=backend)
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert children_of_this_process() == children  # other tests of this process may have some, a browser's driver say


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_program_ends_with_the_process_that_started_it(backend, sig):
    mark = 512 * 2**20 + 4096 * random.randrange(3000, 6000)
    environment = {**os.environ, "PYTHONPATH": str(Path(sapo.__file__).parents[1])}
    limits = f"Limits(memory_bytes={mark}, wall_seconds=600)"
    program = repr("import time\ntime.sleep(600)")
    # Tests that a shell runs in the background inherit that Ctrl-C is ignored.
    code = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += f"from sapo.sandbox import *\nrun_program({program}, limits={limits}, backend={backend!r})"
    # The number is not to be found in this process's own command.
    started = subprocess.Popen(
        [sys.executable, "-"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
    )
    started.stdin.write(code)
    started.stdin.close()
    end = time.monotonic() + 60
    while not any("program" in line or "/dev/fd" in line for line in left_behind(mark)) and time.monotonic() < end:
        time.sleep(0.05)
    assert left_behind(mark) != []
    time.sleep(0.3)  # from the launcher to the program
    started.send_signal(sig)
    started.wait()
    end = time.monotonic() + 30  # the kernel tells the orphans, which takes it a moment
    while left_behind(mark) and time.monotonic() < end:
        time.sleep(0.05)
    assert left_behind(mark) == []


@needs_any
def test_a_backend_that_cannot_start_is_an_error_of_the_sandbox_and_not_of_the_program():
    class Missing(Bare):
        @contextmanager
        def launch(self, source, limits, status_write):
            yield Launch(("/no/such/file",), (status_write,), status_write)

    with pytest.raises(SandboxError, match="/no/such/file could not be started"):
        choice._run(Missing(), "print(1)", "", Limits())


@pytest.mark.skipif("landlock" not in USABLE, reason="no Landlock here")
def test_a_launcher_that_cannot_contain_does_not_start_the_program(monkeypatch):
    monkeypatch.setattr(seccomp, "allowed_calls", lambda: b"\0" * 8)  # no filter the kernel would take
    with pytest.raises(SandboxError, match="could not be contained: OSError"):
        choice._run(Landlock(), "print(1)", "", Limits())


def test_the_filter_of_unknown_machines_is_none():
    assert seccomp.refused_calls("riscv64") is None


def test_the_server_of_the_tests_needs_no_other_package():
    code = "import sys; sys.argv = ['x']; import runpy; runpy.run_path(sys.stdin.read())\n"
    code += "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules), 'the sandbox imports what it should not'"
    environment = {"PYTHONPATH": str(Path(sapo.__file__).parents[1]), "PATH": os.environ["PATH"]}
    subprocess.run([sys.executable, "-c", code], input=str(SERVER), text=True, env=environment, check=True)
