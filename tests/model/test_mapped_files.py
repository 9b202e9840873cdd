"""No memory of a run is a file's that somebody may write anew or delete: the system would end the run by SIGBUS."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import sapo
from sapo.model.loading import load_policy
from sapo.rollout.local.cpu.packed import fresh_memory
from sapo.run.listener import Silent
from support.runs import REWARD, write_model, write_recipe


def mapped_below(directory: Path) -> list[str]:
    """Return the files below a directory that this process has in its memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split(maxsplit=5)[-1] for line in lines if str(directory) in line})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_model_does_not_change_with_its_file(tmp_path: Path, dtype: str) -> None:
    directory = write_model(tmp_path / "model")
    policy = load_policy(directory, dtype)
    before = policy.fingerprint()
    assert mapped_below(tmp_path) == []
    (directory / "model.safetensors").write_bytes(b"")
    assert policy.fingerprint() == before


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    policy = load_policy(write_model(tmp_path / "model", tie_embeddings=True))
    assert policy.head_weight is policy.model.get_input_embeddings().weight


def test_a_resumed_run_has_nothing_of_its_checkpoint_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_a_test.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = sapo.load_recipe(write_recipe(tmp_path, train__steps=1, checkpoint__every=1))
    sapo.train(config)
    mapped = []

    class Watch(Silent):
        def record(self, record: dict[str, Any]) -> None:
            mapped.append(mapped_below(tmp_path))

    sapo.resume(config.run_dir, ["train.steps=2"], listener=Watch())
    assert mapped
    assert not any(mapped)


def test_fresh_memory_is_not_shared_with_a_fork() -> None:
    memory = fresh_memory(4096)
    child = os.fork()
    if not child:
        memory[0] = 7
        os._exit(int(memory[0]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not memory.any()
    assert memory.dtype is torch.uint8
