"""A disk that is full, a directory that is removed, a lock that is deleted: one line, and nothing lost."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sapo
from sapo.errors import ConfigError, MemoryShortage, StorageError
from sapo.run.directory import RunDirectory
from sapo.training.checkpoint import list_checkpoints
from sapo.utils.files import lock_directory
from support.kernels import fresh_cache
from support.runs import REWARD, metrics, write_recipe
from trials.damage import SMALL


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_a_test.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SAPO_CACHE", fresh_cache(tmp_path / "cache"))


class At:
    """A listener that acts after a step."""

    def __init__(self, step: int, act) -> None:
        self.step, self.act = step, act

    def started(self, config: object) -> None: ...

    def record(self, record: dict) -> None:
        if (record["kind"], record["step"]) == ("step", self.step):
            self.act()

    def warning(self, text: str) -> None: ...

    def checkpoint(self, checkpoint: object) -> None: ...

    def resumed(self, checkpoint: object) -> None: ...


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the thread of TensorBoard
def test_a_full_disk_is_one_line_the_checkpoint_before_is_whole_and_the_run_goes_on(tmp_path: Path) -> None:
    config = sapo.load_recipe(write_recipe(tmp_path, **{**SMALL, "train__steps": 3, "log__tensorboard": True}))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does: the write fails with EFBIG

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))

    try:
        with pytest.raises(StorageError) as failure:
            sapo.train(config, listener=At(2, fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    line = str(failure.value)
    run = tmp_path / "run"
    assert "\n" not in line
    assert "File too large" in line
    assert "the checkpoint of step 1 is safe" in line
    assert f"`sapo resume {run}` goes on" in line
    assert not list((run / "checkpoints").glob(".writing-*"))
    for checkpoint in list_checkpoints(run / "checkpoints"):
        checkpoint.verify()
    sapo.resume(run)
    assert [m["step"] for m in metrics(run) if m["kind"] == "step"] == [1, 2, 3]


def test_a_removed_run_directory_is_one_line(tmp_path: Path) -> None:
    config = sapo.load_recipe(write_recipe(tmp_path, **SMALL))
    with pytest.raises(StorageError, match=r"the run directory .*run is gone; start the run again") as failure:
        sapo.train(config, listener=At(1, lambda: shutil.rmtree(tmp_path / "run")))
    assert "\n" not in str(failure.value)


def test_a_run_without_enough_memory_is_one_line_and_goes_on(tmp_path: Path) -> None:
    def ask() -> None:
        torch.empty(2**58)  # more bytes than any machine has

    with pytest.raises(MemoryShortage) as failure:
        sapo.train(sapo.load_recipe(write_recipe(tmp_path, **SMALL)), listener=At(2, ask))
    line, run = str(failure.value), tmp_path / "run"
    assert "\n" not in line
    assert "you tried to allocate 1152921504606846976 bytes" in line  # 4 bytes each
    assert "the checkpoint of step 1 is safe" in line
    assert f"`sapo resume {run} train.tokens_per_microbatch=N` with less than 8192" in line
    sapo.resume(run)
    assert metrics(run)[-1]["step"] == SMALL["train__steps"]


def test_a_run_that_was_killed_before_it_began_is_begun_by_the_same_command(tmp_path: Path) -> None:
    config, run = sapo.load_recipe(write_recipe(tmp_path, **SMALL)), tmp_path / "run"
    run.mkdir()
    RunDirectory.check_free(run)  # killed before it was locked
    for name in (".lock", ".inputs.json.writing", "inputs.json", ".config.yaml.writing"):
        (run / name).touch()
        RunDirectory.check_free(run)
    with pytest.raises(ConfigError, match="stopped before it began; `sapo train` begins it"):
        sapo.resume(run)
    (run / "mine").touch()
    with pytest.raises(ConfigError, match="exists already"):
        sapo.train(config)
    (run / "mine").unlink()
    (run / ".lock").rename(tmp_path / "lock")
    with pytest.raises(ConfigError, match="exists already"):
        RunDirectory.check_free(run)  # a user's own inputs.json, in a directory that no run has locked
    (tmp_path / "lock").rename(run / ".lock")
    sapo.train(config)
    assert not (run / ".config.yaml.writing").exists()
    assert metrics(run)[-1]["step"] == SMALL["train__steps"]


def test_a_deleted_lock_file_frees_nothing(tmp_path: Path) -> None:
    lock = lock_directory(tmp_path)
    (tmp_path / ".lock").unlink()
    with pytest.raises(ConfigError, match="another process is writing"):
        lock_directory(tmp_path)
    lock.close()
    lock_directory(tmp_path).close()


def test_an_inherited_lock_outlives_its_maker_and_the_deletion_of_its_file(tmp_path: Path) -> None:
    lock = lock_directory(tmp_path)
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, pass_fds=lock.descriptors
    )
    lock.close()
    (tmp_path / ".lock").unlink()
    with pytest.raises(ConfigError, match="another process is writing"):
        lock_directory(tmp_path)
    child.communicate(timeout=60)
    lock_directory(tmp_path).close()
