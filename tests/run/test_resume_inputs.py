"""A run that is resumed is held against what it began with: rows, models, modules, settings, its own checkpoint."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import sapo
from sapo.config import TaskConfig
from sapo.errors import ConfigError, UserError
from sapo.run.inputs import modules_of
from sapo.run.state import RunState
from sapo.training.checkpoint import list_checkpoints
from sapo.utils.fingerprints import READ_IN_FULL, fingerprint_file
from support.game import GAME
from support.kernels import fresh_cache
from support.pictures import encoded, noise
from support.runs import REWARD, metrics, write_model, write_recipe
from support.vision_recipes import write_vision_recipe

SMALL = {
    "train__steps": 2,
    "checkpoint__every": 1,
    "eval__every": 0,
    "rollout__max_new_tokens": 4,
    "log__rollouts_every": 1,
}


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


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_a_test.py").write_text(REWARD)
    (tmp_path / "game_of_a_test.py").write_text(GAME)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "game_of_a_test", raising=False)
    monkeypatch.setenv("SAPO_CACHE", fresh_cache(tmp_path / "cache"))


def run_in(directory: Path, **changes: object) -> Path:
    return sapo.train(sapo.load_recipe(write_recipe(directory, **{**SMALL, **changes}))).directory


def everything(run: Path) -> dict[str, bytes]:
    return {str(f.relative_to(run)): f.read_bytes() for f in sorted(run.rglob("*")) if f.is_file()}


def edit(run: Path, **changes: object) -> None:
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = recipe
        for parent in parents:
            place = place[int(parent) if parent.isdigit() else parent]
        place[last] = value
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))


def refused_then_accepted(run: Path, key: str) -> list[str]:
    """Resume is refused by a line that names `key` and changes nothing, and goes on where it is accepted."""
    before = everything(run)
    with pytest.raises(ConfigError) as refusal:
        sapo.resume(run, ["train.steps=3"])
    assert key in str(refusal.value)
    assert f"--accept-changes {key}" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert everything(run) == before
    told = Told()
    sapo.resume(run, ["train.steps=3"], accept_changes=[key], listener=told)
    assert metrics(run)[-1]["step"] == 3
    accepted = [text for text in told.warnings if key in text and "accepted" in text]
    sapo.resume(run, ["train.steps=4"])  # known from now on
    return accepted


def replace_rows(at: Path) -> None:
    (at / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i}*3=", "answer": "1"}) + "\n" for i in range(24))
    )


def replace_module(at: Path) -> None:
    (at / "rewards_of_a_test.py").write_text(REWARD + "\n# another\n")


@pytest.mark.parametrize(
    ("change", "key", "recipe"),
    [
        (replace_rows, "tasks.0.path", {}),
        (replace_module, "tasks.0.verifier", {}),
        (
            lambda at: (at / "game_of_a_test.py").write_text(GAME + "# another\n"),
            "tasks.0.name",
            {"tasks": [{"name": "game_of_a_test:Next"}]},
        ),
        (
            lambda at: write_model(at / "reference", seed=8),
            "objective.kl.reference",
            {"objective__kl": {"coefficient": 0.1, "reference": "reference"}},
        ),
        (lambda at: write_model(at / "model", seed=8), "model.path", {"objective__kl": {"coefficient": 0.1}}),
        (lambda at: write_model(at / "model", seed=8), "model.path", {"model__lora": {"rank": 2}}),
        (lambda at: edit(at / "run", seed=5), "seed", {}),
        (lambda at: edit(at / "run", objective__name="grpo"), "objective.name", {}),
        (lambda at: edit(at / "run", train__minibatches=4), "train.minibatches", {}),
        (lambda at: edit(at / "run", train__learning_rate=0.5), "train.learning_rate", {}),
        (lambda at: edit(at / "run", tasks__0__score_truncated=False), "tasks.0.score_truncated", {}),
    ],
)
def test_what_changed_since_the_run_began_is_refused_until_it_is_accepted(
    change: Callable[[Path], object], key: str, recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "reference", seed=7)
    run = run_in(tmp_path, **recipe)
    change(tmp_path)
    assert refused_then_accepted(run, key)


@pytest.mark.parametrize(
    ("task", "keys"),
    [
        ({"name": "parts_of_a_test:Rows"}, ["tasks.0.name"]),
        ({"name": "parts_of_a_test:Rows", "label": "rows"}, ["tasks.0.name"]),
        ({"name": "arithmetic", "tools": ["calculator", "parts_of_a_test:lookup"]}, ["tasks.0.tools"]),
        ({"name": "arithmetic", "environment": "trl:parts_of_a_test:Room"}, ["tasks.0.environment"]),
        (
            {
                "name": "arithmetic",
                "environment": {
                    "name": "openenv:parts_of_a_test:Client",
                    **{"url": "http://localhost:1", "action": "more_of_a_test:act", "show": "more_of_a_test:show"},
                },
            },
            ["tasks.0.environment", "tasks.0.environment.1", "tasks.0.environment.2"],
        ),
        ({"name": "arithmetic", "environment": "skyrl:gsm8k"}, []),
    ],
)
def test_every_module_that_a_task_names_has_a_fingerprint(task: dict, keys: list[str], tmp_path: Path) -> None:
    for name in ("parts_of_a_test", "more_of_a_test"):
        (tmp_path / f"{name}.py").write_text("")
    section = TaskConfig(**task)
    before = modules_of(section, "tasks.0")
    assert list(before) == keys
    for name in ("parts_of_a_test", "more_of_a_test"):
        (tmp_path / f"{name}.py").write_text("# another\n")
    after = modules_of(section, "tasks.0")
    assert all(before[key]["digest"] != after[key]["digest"] for key in keys)


def pictured_run_in(directory: Path, **changes: object) -> Path:
    """Train on eight rows, each with a picture in a file beside them."""
    recipe = write_vision_recipe(directory, **{**SMALL, **changes})
    (directory / "pictures").mkdir()
    rows = []
    for i in range(8):
        replace_picture(directory, i, seed=i)
        rows.append({"prompt": f"<image>{i}=", "answer": "7", "image": f"pictures/{i}.png"})
    (directory / "pictured.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = yaml.safe_load(recipe.read_text())
    settings["tasks"] = [{**settings["tasks"][1], "path": str(directory / "pictured.jsonl"), "held_out_fraction": 0.4}]
    recipe.write_text(yaml.safe_dump(settings))
    return sapo.train(sapo.load_recipe(recipe)).directory


def replace_picture(directory: Path, number: int, seed: int) -> None:
    """Write a picture of the same size as all others, so that its tokens are those of any."""
    (directory / "pictures" / f"{number}.png").write_bytes(encoded(noise(seed)))


def test_a_picture_that_is_replaced_is_noticed_like_a_row(tmp_path: Path) -> None:
    run = pictured_run_in(tmp_path)
    replace_picture(tmp_path, 3, seed=100)
    (told,) = refused_then_accepted(run, "tasks.0.pictures")
    assert f"tasks.0.pictures (a picture of {tmp_path / 'pictured.jsonl'} has other content)" in told


def test_a_batch_that_was_sampled_with_a_picture_needs_that_picture(tmp_path: Path) -> None:
    run = pictured_run_in(tmp_path, rollout__staleness=2, train__steps=3)
    newest = list_checkpoints(run / "checkpoints")[0]
    shutil.rmtree(newest.path)
    newest = list_checkpoints(run / "checkpoints")[0]
    state = RunState.deserialise(newest.state(), newest.batches())
    (picture, *_) = (p for group in state.waiting() for p in group.prompt.pictures)
    number, before = int(Path(picture.path).stem), everything(run)
    replace_picture(tmp_path, number, seed=100)
    with pytest.raises(ConfigError) as refusal:
        sapo.resume(run, accept_changes=["tasks.0.pictures"])
    assert f"{newest.path} holds a batch that was sampled and is still to be trained on" in str(refusal.value)
    assert f"the picture {picture.path} has changed" in str(refusal.value)
    assert f"delete {newest.path} to go on from the checkpoint before" in str(refusal.value)
    assert everything(run) == before
    replace_picture(tmp_path, number, seed=number)
    assert sapo.resume(run).summary["steps"] == 3


def test_a_gone_file_is_named(tmp_path: Path) -> None:
    run = run_in(tmp_path, objective__kl={"coefficient": 0.1})
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"model\.path \(.*model is gone\)"):
        sapo.resume(run, ["train.steps=3"])


def test_a_start_that_is_not_read_again_may_change(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    write_model(tmp_path / "model", seed=8)
    assert sapo.resume(run, ["train.steps=3"]).summary["steps"] == 3


def test_paths_are_kept_absolute_so_that_a_run_resumes_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_recipe(tmp_path / "here", **SMALL)
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    recipe["model"]["path"], recipe["tasks"][0]["path"] = "model", "prompts.jsonl"
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = sapo.train(sapo.load_recipe("recipe.yaml")).directory
    monkeypatch.chdir(tmp_path)
    assert sapo.resume(run, ["train.steps=3"]).summary["steps"] == 3


def test_a_checkpoint_of_another_run_or_model_is_refused(tmp_path: Path) -> None:
    run = run_in(tmp_path / "a", **{**SMALL})
    same = run_in(tmp_path / "b", seed=3)
    newest = list_checkpoints(run / "checkpoints")[0].path
    shutil.rmtree(newest)
    shutil.copytree(same / "checkpoints" / newest.name, newest)
    with pytest.raises(
        ConfigError, match=r"checkpoint\.path .*written by another run.*--accept-changes checkpoint\.path"
    ):
        sapo.resume(run, ["train.steps=3"])
    write_recipe(tmp_path / "c", **SMALL)
    write_model(tmp_path / "c" / "model", architecture="llama")
    other = sapo.train(sapo.load_recipe(tmp_path / "c" / "recipe.yaml")).directory
    shutil.rmtree(newest)
    shutil.copytree(other / "checkpoints" / newest.name, newest)
    with pytest.raises(UserError, match="model of other weights"):
        sapo.resume(run, ["train.steps=3"])


def test_fewer_steps_than_begun_are_refused_and_a_stretched_schedule_is_said(tmp_path: Path) -> None:
    run = run_in(tmp_path, train__steps=4, train__schedule="linear")
    before = everything(run)
    with pytest.raises(ConfigError, match=r"train\.steps must not be below .* got 3 .* step 4"):
        sapo.resume(run, ["train.steps=3"])
    assert everything(run) == before
    told = Told()
    sapo.resume(run, ["train.steps=8"], listener=told)
    # Linear to 0 one step after the last, 2 of warm-up, peak 1e-3: 0 at step 5 of 4; 1 - 2/6 of it at step 5 of 8.
    assert any("learning rate of step 5 is 0.000667, where it would have been 0" in text for text in told.warnings)


def test_an_unchanged_run_is_not_warned_of_and_an_unknown_key_is_refused(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    told = Told()
    sapo.resume(run, ["train.steps=3"], listener=told)
    assert told.warnings == []
    with pytest.raises(ConfigError, match=r"got 'tasks\.0\.pth'; did you mean tasks\.0\.path"):
        sapo.resume(run, accept_changes=["tasks.0.pth"])


def test_a_kill_between_the_files_of_an_override_is_no_change(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    old = (run / "config.yaml").read_text()
    sapo.resume(run, ["train.steps=3"])
    record = json.loads((run / "inputs.json").read_text())
    before = {**record["settings"], "train": {**record["settings"]["train"], "steps": 2}}
    (run / "inputs.json").write_text(json.dumps({**record, "settings_before": before}))
    (run / "config.yaml").write_text(old)
    assert sapo.resume(run, ["train.steps=4"]).summary["steps"] == 4


def test_a_run_of_an_earlier_version_goes_on_and_is_said_to_be_unknown(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    (run / "inputs.json").unlink()
    told = Told()
    sapo.resume(run, ["train.steps=3"], listener=told)
    assert any("no inputs.json" in text for text in told.warnings)


def test_the_fingerprint_of_large_weights_sees_their_training_and_reads_little(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.truncate(READ_IN_FULL + 5 * 2**20 + 17)  # sparse
    before = fingerprint_file(file, sampled=True)
    for offset in (0, 40 * 2**20 + 100, READ_IN_FULL + 5 * 2**20 + 16):  # header, a block within, the last byte
        with file.open("r+b") as stream:
            stream.seek(offset)
            stream.write(b"x")
        assert fingerprint_file(file, sampled=True) != before
        before = fingerprint_file(file, sampled=True)
