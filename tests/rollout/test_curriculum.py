"""The curriculum: who is asked less, how much less, and that nothing else decides it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sapo
from sapo.config import CurriculumConfig, RolloutConfig
from sapo.data import Completion, Group, Prompt, Score, Status
from sapo.errors import ConfigError
from sapo.rollout.curriculum import Curriculum
from sapo.rollout.selection import Position, Selector
from sapo.run.preflight import load_tasks
from sapo.tasks import ArithmeticTask, FiniteTask
from support.runs import write_recipe


class Rows:
    """A task of rows in the same order every epoch; a row's number is its text."""

    def __init__(self, rows: int, name: str = "rows") -> None:
        self.num_train = rows
        self.name = name

    def train_row(self, index: int) -> int:
        return index % self.num_train

    def train_prompt(self, index: int) -> Prompt:
        return Prompt(index, self.name, str(self.train_row(index)))

    def held_out(self, count: int) -> list[Prompt]:
        return []

    def verify(self, text: str, prompt: Prompt) -> Score:
        return Score(0.0)


def group(prompt: Prompt, rewards: list[float]) -> Group:
    return Group(prompt, tuple(Completion((1,), (-0.1,), "stop", score=Score(r)) for r in rewards))


def sample_by_row(prompts: list[Prompt]) -> list[Group]:
    """Rows below 20 are always solved, the others half of the time."""
    return [group(p, [1.0, 1.0] if int(p.text) < 20 else [1.0, 0.0]) for p in prompts]


def run(selector: Selector, steps: int, position: Position | None = None, first: int = 0) -> tuple[list[str], Position]:
    """Texts asked in some steps, and where they end."""
    asked: list[str] = []
    position = position or Position()
    for step in range(first, first + steps):
        selection = selector.select(step, position, sample_by_row)
        asked += [g.prompt.text for g in selection.groups]
        position = selection.position
    return asked, position


def selector(task: FiniteTask, seed: int = 5, **settings: float) -> Selector:
    rule = Curriculum(CurriculumConfig(**settings), seed)
    return Selector([task], [1.0], RolloutConfig(prompts_per_step=8), {task.name: rule})


def test_rows_outside_the_band_come_at_the_given_rate_and_the_others_every_time() -> None:
    asked, position = run(selector(Rows(40), outside=0.25), steps=300)
    first_epoch, later = asked[:40], asked[40:]
    assert first_epoch == [str(i) for i in range(40)], "nothing is known of a row before its first visit"
    easy, medium = ([later.count(str(i)) for i in rows] for rows in (range(20), range(20, 40)))
    assert max(medium) - min(medium) <= 1, "rows inside the band come once in every epoch"
    epochs = sum(medium) / 20
    # About 88 epochs of 20 draws with chance 1/4: a standard deviation of .25 * .75 / 1760 under the root, .0103.
    assert sum(easy) / 20 / epochs == pytest.approx(0.25, abs=4 * 0.0103)
    assert position.pass_rates["rows"] == {**dict.fromkeys(range(20), 1.0), **dict.fromkeys(range(20, 40), 0.5)}


def test_every_number_is_asked_or_passed_over_once() -> None:
    choice = selector(Rows(40), outside=0.25)
    position, used = Position(), 0
    for step in range(40):
        selection = choice.select(step, position, sample_by_row)
        used += len(selection.groups) + selection.passed_over["rows"]
        position = selection.position
        assert position.offsets.get("rows", 0) == used - 8 * (step + 1)
    assert used > 8 * 40


def test_what_is_asked_depends_on_the_seed_and_the_recorded_rates_alone() -> None:
    whole, end = run(selector(Rows(40)), steps=30)
    head, middle = run(selector(Rows(40)), steps=11)
    recorded = json.loads(json.dumps({"offsets": middle.offsets, "rates": middle.pass_rates["rows"]}))
    taken_up = Position(recorded["offsets"], {"rows": {int(row): rate for row, rate in recorded["rates"].items()}})
    tail, same_end = run(selector(Rows(40)), steps=19, position=taken_up, first=11)
    assert (head + tail, same_end) == (whole, end)
    assert run(selector(Rows(40), seed=6), steps=30)[0] != whole


def test_a_task_whose_rows_are_all_outside_still_gives_prompts() -> None:
    choice = selector(Rows(10), outside=1e-12)
    solved = Position({}, {"rows": dict.fromkeys(range(10), 1.0)})
    selection = choice.select(0, solved, sample_by_row)
    assert len(selection.groups) == 8
    assert selection.passed_over == {"rows": 80}, (
        "an epoch at most is passed over before a prompt is asked all the same"
    )


def test_the_pass_rate_is_a_running_one_of_rewards_of_one() -> None:
    rule = Curriculum(CurriculumConfig(memory=0.75), seed=0)
    prompt = Prompt(0, "t", "")
    first = rule.updated(None, group(prompt, [1.0, 0.0, 0.99, 0.0]))
    assert first == 0.25, "a reward below 1 is no pass"
    assert rule.updated(first, group(prompt, [1.0, 1.0])) == 0.75 * 0.25 + 0.25 * 1.0


def test_failed_completions_say_nothing_of_a_row() -> None:
    rule, prompt = Curriculum(CurriculumConfig(memory=0.75), seed=0), Prompt(0, "t", "")
    lost = Completion((), (), "stop", score=Score(0.0, Status.VERIFIER_ERROR))
    half = group(prompt, [1.0, 0.0]).completions
    assert rule.updated(None, Group(prompt, (*half, lost, lost))) == 0.5
    assert rule.updated(0.25, Group(prompt, (lost, lost))) == 0.25
    assert rule.updated(None, Group(prompt, (lost, lost))) is None

    selection = selector(Rows(40)).select(
        0, Position({}, {"rows": {3: 0.5}}), lambda prompts: [Group(p, (lost,) * 4) for p in prompts]
    )
    assert selection.position.pass_rates["rows"] == {3: 0.5}, "rows that were not judged count as not seen"


def test_each_epoch_of_a_file_gives_every_row_once_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (task,) = load_tasks(sapo.load_recipe(write_recipe(tmp_path))).train
    assert isinstance(task, FiniteTask)
    texts = {}
    for epoch in range(3):
        rows = [task.train_row(epoch * task.num_train + i) for i in range(task.num_train)]
        assert sorted(rows) == list(range(task.num_train))
        for i, row in enumerate(rows):
            text = task.train_prompt(epoch * task.num_train + i).text
            assert texts.setdefault(row, text) == text, "a row keeps its number"


def test_a_visit_is_added_to_the_rows_earlier_rate_in_the_order_of_visits() -> None:
    choice = selector(Rows(4), memory=0.75)  # 8 prompts: two visits of each row
    before = Position({}, {"rows": {0: 0.5, 1: 0.75}})
    results = iter([1, 1, 0, 0, 0, 1, 1, 0])
    selection = choice.select(0, before, lambda prompts: [group(p, [float(next(results))] * 2) for p in prompts])
    assert [g.prompt.text for g in selection.groups] == ["0", "1", "2", "3"] * 2
    assert selection.position.pass_rates["rows"] == {
        0: 0.75 * (0.75 * 0.5 + 0.25 * 1.0) + 0.25 * 0.0,
        1: 0.75 * (0.75 * 0.75 + 0.25 * 1.0) + 0.25 * 1.0,
        2: 0.75 * 0.0 + 0.25 * 1.0,
        3: 0.0,
    }
    assert before.pass_rates == {"rows": {0: 0.5, 1: 0.75}}


@pytest.mark.parametrize("of_the_task", [True, False])
def test_a_curriculum_of_an_endless_task_is_refused_in_one_line(tmp_path: Path, of_the_task: bool) -> None:
    settings = sapo.load_recipe(write_recipe(tmp_path)).model_dump(mode="json")
    settings["tasks"] = [{"name": "arithmetic", "digits": 2}]
    (settings["tasks"][0] if of_the_task else settings)["curriculum"] = {"low": 0.2}
    (tmp_path / "r.yaml").write_text(json.dumps(settings))
    with pytest.raises(ConfigError) as caught:
        sapo.train(sapo.load_recipe(tmp_path / "r.yaml"))
    message = str(caught.value)
    assert "finite number of rows; got 'add2', whose prompts never repeat" in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    assert not isinstance(ArithmeticTask(), FiniteTask)


def test_a_tasks_own_curriculum_goes_before_the_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = sapo.load_recipe(write_recipe(tmp_path)).model_dump(mode="json")
    settings["tasks"] = [settings["tasks"][0], {**settings["tasks"][0], "label": "other", "curriculum": {"high": 0.7}}]
    settings["curriculum"] = {"high": 0.8}
    (tmp_path / "r.yaml").write_text(json.dumps(settings))
    rules = load_tasks(sapo.load_recipe(tmp_path / "r.yaml")).curricula
    assert {name: rule.settings.high for name, rule in rules.items()} == {"prompts": 0.8, "other": 0.7}
    assert rules["prompts"].seed != rules["other"].seed
