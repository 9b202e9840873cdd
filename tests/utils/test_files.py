"""Whole-file and whole-directory writing, and the lock of a directory."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sapo.errors import ConfigError
from sapo.utils.files import lock_directory, new_directory, replace_directory, write_whole

HOLD = """
import sys
from pathlib import Path
from sapo.utils.files import lock_directory
lock = lock_directory(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""

INHERIT = """
import subprocess, sys
from pathlib import Path
from sapo.utils.files import lock_directory
lock = lock_directory(Path(sys.argv[1]))
child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], pass_fds=[lock.fileno()])
print(child.pid, flush=True)
child.wait()
"""


def test_a_whole_file_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    for text in ("old", "new é"):
        write_whole(file, text)
    assert file.read_text(encoding="utf-8") == "new é"
    assert list(tmp_path.iterdir()) == [file]


def test_a_directory_appears_only_when_it_is_filled(tmp_path: Path) -> None:
    with new_directory(tmp_path / "model") as aside:
        (aside / "config.json").write_text("{}")
        assert not (tmp_path / "model").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "config.json").read_text() == "{}"


def test_an_error_while_a_directory_is_filled_leaves_nothing(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with new_directory(tmp_path / "model") as aside:
            (aside / "config.json").write_text("{}")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []


def test_of_two_processes_that_make_one_shared_directory_the_first_is_kept(tmp_path: Path) -> None:
    def make(text: str, shared: bool) -> None:
        with new_directory(tmp_path / "model", shared=shared) as aside:
            (aside / "config.json").write_text(text)

    make("first", shared=True)
    make("second", shared=True)
    with pytest.raises(OSError):
        make("third", shared=False)
    assert (tmp_path / "model" / "config.json").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_directory_is_replaced_by_the_one_written_aside(tmp_path: Path) -> None:
    for text in ("old", "new"):
        aside = tmp_path / ".writing"
        aside.mkdir()
        (aside / "state.json").write_text(text)
        replace_directory(aside, tmp_path / "step", tmp_path / ".replaced")
    assert (tmp_path / "step" / "state.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["step"]


def test_a_locked_directory_refuses_a_second_writer_until_it_is_given_back(tmp_path: Path) -> None:
    lock = lock_directory(tmp_path)
    with pytest.raises(ConfigError, match=r"another process is writing .*; wait for it or stop it"):
        lock_directory(tmp_path)
    lock.close()
    lock_directory(tmp_path).close()


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is of Unix")
def test_a_killed_process_gives_its_lock_back(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match="another process"):
            lock_directory(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    lock_directory(tmp_path).close()


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors are inherited on Unix")
def test_a_process_that_inherits_a_lock_keeps_it_after_the_first_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", INHERIT, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        int(parent.stdout.readline())  # the child is at work
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        with pytest.raises(ConfigError, match="another process"):
            lock_directory(tmp_path)
        assert parent.stdin is not None
        parent.stdin.close()  # the child reads to the end of it, and leaves
        parent.stdout.read()
    lock_directory(tmp_path).close()
