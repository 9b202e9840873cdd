"""Damaged files of a run: an older whole checkpoint is used where there is one, and nothing ends in a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import sapo
from sapo.errors import CheckpointError, ConfigError, UserError
from sapo.training.checkpoint import Checkpoint, list_checkpoints
from support.runs import REWARD, metrics, write_recipe
from trials.damage import SMALL, remanifest
from trials.harness import everything


class Told:
    """A listener that keeps warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def started(self, config: object) -> None: ...

    def record(self, record: dict) -> None: ...

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def checkpoint(self, checkpoint: object) -> None: ...

    def resumed(self, checkpoint: object) -> None: ...


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    (directory / "rewards_of_a_test.py").write_text(REWARD)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(directory))
        sapo.train(sapo.load_recipe(write_recipe(directory, **SMALL)))
    return directory


@pytest.fixture
def run(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(whole))
    shutil.copytree(whole / "run", tmp_path / "run")
    return tmp_path / "run"


def rewrite(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        value = json.loads((checkpoint / name).read_text())
        changed = change(value)
        (checkpoint / name).write_text(json.dumps(value if changed is None else changed))
        if name != "manifest.json":
            remanifest(checkpoint)

    return damage


def content(name: str, data: bytes) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        (checkpoint / name).write_bytes(data)
        if name != "manifest.json":
            remanifest(checkpoint)

    return damage


def other_update(checkpoint: Path) -> None:
    rewrite("state.json", lambda s: s.update(step=1))(checkpoint)


@pytest.mark.parametrize(
    "damage",
    [
        rewrite("manifest.json", lambda m: {}),
        rewrite("manifest.json", lambda m: []),
        content("manifest.json", b"null"),
        content("manifest.json", b"\xff\xfe"),
        rewrite("manifest.json", lambda m: dict.fromkeys(m, 7)),
        rewrite("manifest.json", lambda m: {name: {"size": "x", "sha256": 3} for name in m}),
        rewrite("manifest.json", lambda m: m.update({"../run/config.yaml": {"size": 1, "sha256": "x"}})),
        rewrite("manifest.json", lambda m: m.pop("state.json") and None),
        rewrite("manifest.json", lambda m: m.pop("model.safetensors") and None),
        rewrite("state.json", lambda s: s.update(of_another_version=1)),
        rewrite("state.json", lambda s: s.pop("position") and None),
        rewrite("state.json", lambda s: s.update(groups="x")),
        rewrite("state.json", lambda s: s.update(metrics_bytes=True)),
        rewrite("state.json", lambda s: []),
        content("state.json", b"\xff"),
        content("batches.safetensors", b"x" * 40),
        other_update,
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    damage: Callable[[Path], None], run: Path
) -> None:
    newest = list_checkpoints(run / "checkpoints")[0].path
    damage(newest)
    told = Told()
    sapo.resume(run, listener=told)
    assert [w for w in told.warnings if "checkpoint not used" in w and "step-000002" in w]
    assert metrics(run)[-1]["step"] == 2
    assert (run / "checkpoints" / "broken-step-000002").is_dir()


def test_a_run_without_a_whole_checkpoint_begins_again_only_where_that_is_accepted(run: Path) -> None:
    for checkpoint in list_checkpoints(run / "checkpoints"):
        (checkpoint.path / "state.json").write_text("[]")
    before = everything(run)
    with pytest.raises(
        ConfigError, match=r"a checkpoint that is whole; got \d that are not.*begins at step 1 again"
    ) as e:
        sapo.resume(run)
    assert "\n" not in str(e.value)
    assert "sets checkpoint.path" not in str(e.value)
    assert everything(run) == before
    told = Told()
    sapo.resume(run, accept_changes=["checkpoint.path"], listener=told)
    assert [w for w in told.warnings if "checkpoint not used" in w]
    assert metrics(run)[-1]["step"] == 2


def another_models_optimizer(checkpoint: Path) -> None:
    tensors = {
        name: t.repeat(2, *[1] * (t.dim() - 1)) if t.dim() else t
        for name, t in load_file(checkpoint / "optimizer.safetensors").items()
    }
    save_file(tensors, checkpoint / "optimizer.safetensors")
    remanifest(checkpoint)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (another_models_optimizer, "optimizer's state must be of the model that is trained"),
        (content("optimizer.safetensors", b"x" * 100), "must be the state of an optimizer"),
        (content("config.json", b"[]"), "a model's settings: it is a list"),
        (content("config.json", b"\xff"), "a model's settings"),
        (content("tokenizer.json", b"null"), "tokenizer"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_in_a_line_and_nothing_is_lost(
    damage: Callable[[Path], None], message: str, run: Path
) -> None:
    damage(list_checkpoints(run / "checkpoints")[0].path)
    lines = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=message) as refusal:
        sapo.resume(run, ["train.steps=3"])
    assert "\n" not in str(refusal.value)
    assert (run / "metrics.jsonl").read_bytes() == lines


@pytest.mark.parametrize("name", ["metrics.jsonl", ".lock", "summary.json", "inputs.json"])
def test_a_directory_in_the_place_of_a_file_is_named(name: str, run: Path) -> None:
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir()
    with pytest.raises(ConfigError, match=rf"{name} must be a file; got a directory; move it away"):
        sapo.resume(run, ["train.steps=3"])


@pytest.mark.parametrize("name", ["checkpoints", "rollouts"])
def test_a_file_in_the_place_of_a_directory_is_named(name: str, run: Path) -> None:
    shutil.rmtree(run / name)
    (run / name).write_text("x")
    with pytest.raises(ConfigError, match=rf"{name} must be a directory; got a file; move it away"):
        sapo.resume(run, ["train.steps=3"])


def test_what_a_checkpoint_needs_is_what_a_checkpoint_writes(run: Path) -> None:
    for checkpoint in list_checkpoints(run / "checkpoints"):
        checkpoint.verify()
    with pytest.raises(CheckpointError, match="no readable manifest"):
        Checkpoint(run / "rollouts", 0, 0).verify()
