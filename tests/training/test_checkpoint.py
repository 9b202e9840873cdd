"""Checkpoints: whole or not used, newest first, ordinary to load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sapo.errors import CheckpointError
from sapo.model.loading import load_policy
from sapo.model.policy import Policy
from sapo.training.checkpoint import list_checkpoints, newest_whole, prune, save_checkpoint
from sapo.training.optimizer_files import OptimizerFiles, write_own_rows
from support.runs import write_model


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    return load_policy(write_model(tmp_path / "model"))


def save(policy: Policy, directory: Path, step: int, update: int = 0, **state):
    tensors = {"exp_avg/x": torch.arange(3.0), "step/x": torch.tensor(4.0)}
    batches = {"token_ids": np.arange(5, dtype=np.int32), "logprobs": np.zeros(0, np.float32)}
    return save_checkpoint(
        directory,
        step,
        update,
        policy=policy,
        save_optimizer=lambda aside: write_own_rows(aside, tensors, 0, 1),
        state=state,
        batches=batches,
    )


def test_a_checkpoint_gives_back_what_it_was_given(policy: Policy, tmp_path: Path) -> None:
    state = {"x": [0.1, 1 / 3, 1e-300, float("-1.5e300")], "text": "é\u2028</script>\x00"}
    checkpoint = save(policy, tmp_path / "c", 7, 2, **state)
    checkpoint.verify()
    assert checkpoint.label == "step 7, update 2"
    assert checkpoint.state() == state
    tensors = OptimizerFiles(checkpoint.path).read({})
    assert torch.equal(tensors["exp_avg/x"], torch.arange(3.0))
    assert tensors["step/x"].item() == 4.0
    batches = checkpoint.batches()
    assert sorted(batches) == ["logprobs", "token_ids"]
    assert np.array_equal(batches["token_ids"], np.arange(5))
    assert (batches["token_ids"].dtype, batches["logprobs"].dtype) == (np.int32, np.float32)
    assert not len(batches["logprobs"])


def test_a_checkpoint_is_an_ordinary_hugging_face_directory(policy: Policy, tmp_path: Path) -> None:
    checkpoint = save(policy, tmp_path / "c", 1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path)
    assert model.config._attn_implementation == "sdpa"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, policy.model.state_dict()[name]), name
    ids = torch.tensor([[1, 10, 2, 14]])
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_whoever_may_read_a_file_of_a_checkpoint_may_read_all_of_them(policy: Policy, tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    files = list(save(policy, tmp_path / "c", 1).path.iterdir())
    assert {"optimizer.safetensors", "batches.safetensors", "model.safetensors"} <= {f.name for f in files}
    assert {f.stat().st_mode for f in files} == {(tmp_path / "ordinary").stat().st_mode}


def test_newest_first_with_the_middle_of_a_step_after_its_beginning(policy: Policy, tmp_path: Path) -> None:
    for step, update in [(2, 0), (10, 0), (2, 3), (2, 1)]:
        save(policy, tmp_path / "c", step, update)
    (tmp_path / "c" / "step-junk").mkdir()
    (tmp_path / "c" / "notes.txt").write_text("mine")
    assert [(c.step, c.update) for c in list_checkpoints(tmp_path / "c")] == [(10, 0), (2, 3), (2, 1), (2, 0)]
    assert list_checkpoints(tmp_path / "nowhere") == []


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (cut, "model.safetensors", r"holds \d+ bytes where \d+ were written"),
        (flip, "model.safetensors", "SHA-256 differs"),
        (flip, "optimizer.safetensors", "SHA-256 differs"),
        (Path.unlink, "state.json", "is missing"),
        (flip, "batches.safetensors", "SHA-256 differs"),
        (cut, "batches.safetensors", r"holds \d+ bytes where \d+ were written"),
        (Path.unlink, "batches.safetensors", "is missing"),
        (Path.unlink, "manifest.json", "no readable manifest"),
        (cut, "manifest.json", "no readable manifest"),
    ],
)
def test_damage_is_found_named_and_the_one_before_used(damage, file, message, policy: Policy, tmp_path: Path) -> None:
    save(policy, tmp_path / "c", 1)
    newest = save(policy, tmp_path / "c", 2)
    damage(newest.path / file)
    with pytest.raises(CheckpointError, match=message):
        newest.verify()
    heard: list[CheckpointError] = []
    used = newest_whole(tmp_path / "c", heard.append)
    assert used is not None
    assert used.step == 1
    assert len(heard) == 1
    assert "step-000002" in str(heard[0])


def test_no_whole_checkpoint_is_none(policy: Policy, tmp_path: Path) -> None:
    checkpoint = save(policy, tmp_path / "c", 1)
    cut(checkpoint.path / "model.safetensors")
    assert newest_whole(tmp_path / "c", lambda _: None) is None


def test_a_write_that_was_interrupted_is_never_seen(policy: Policy, tmp_path: Path, monkeypatch) -> None:
    save(policy, tmp_path / "c", 1)

    def power_cut(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", power_cut)
    with pytest.raises(KeyboardInterrupt):
        save(policy, tmp_path / "c", 2)
    monkeypatch.undo()
    assert [c.step for c in list_checkpoints(tmp_path / "c")] == [1]
    save(policy, tmp_path / "c", 2)
    prune(tmp_path / "c", keep=1)
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step-000002"]
