"""`sapo recipes`, `sapo --version`, and what is said on systems other than Linux."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import sapo
from sapo.cli.recipes import purpose
from sapo.config.recipes import known_comparisons, known_recipes
from sapo.sandbox import choice
from sapo.tasks.verifiers.limits import memory_limit
from sapo.tasks.workers import guard
from support.commands import call


def called(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Return the exit code and both outputs of a command, run in this process."""
    code, printed = call(*arguments), capsys.readouterr()
    return code, printed.out, printed.err


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert called(capsys, "--version") == (0, f"sapo {sapo.__version__}\n", "")


def test_recipes_are_listed_each_with_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = called(capsys, "recipes")
    assert code == 0
    listed = {line.split()[0] for line in out.splitlines() if line.startswith("  ")}
    assert listed >= {*known_recipes(), *known_comparisons()}
    assert [name for name, file in known_recipes().items() if not purpose(file)] == []


def test_a_purpose_is_the_first_sentence_of_the_opening_comment(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("# One thing\n# and another. More.\nseed: 0\n# no\n")
    assert purpose(file) == "One thing and another"
    file.write_text("seed: 0\n")
    assert purpose(file) == ""


def test_windows_is_refused_in_one_line_that_names_wsl(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    code, _, err = called(capsys, "recipes")
    assert (code, err.count("\n")) == (2, 1)
    assert "WSL2" in err


def test_objectives_import_where_there_are_no_modules_of_posix() -> None:
    absent = ("fcntl", "resource", "termios", "pwd", "grp")
    hidden = f"import sys; sys.modules.update(dict.fromkeys({absent!r}))"
    program = f"{hidden}; import sapo.objectives as o; print(len(o.OBJECTIVES))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(ran.stdout) > 10


def test_on_macos_programs_of_models_are_refused_and_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_proven", {})
    monkeypatch.setattr(choice, "_refused", {})
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not choice._try("bubblewrap")
    assert choice._refused["bubblewrap"] == "it needs Linux, and this is darwin"


def test_on_macos_a_worker_has_no_guard_and_forks_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("os.fork", lambda: pytest.fail("a guard needs Linux"))
    assert guard.stand_guard(parent=1, channel=0) == 1


def test_a_memory_limit_that_a_system_lacks_limits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with memory_limit("RLIMIT_DATA", 1):
        assert len(bytearray(1 << 20)) == 1 << 20
