"""The figures of a comparison from the records of its runs; expected numbers are counted by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sapo.diagnostics.warnings import OF_THE_LOOP
from sapo.errors import ConfigError
from sapo.evaluation.estimates import bootstrap, bootstrap_crossed
from sapo.run.directory import FAILURE_FILE
from sapo.workflows.comparing.alarms import Alarms
from sapo.workflows.comparing.outcomes import Curve, EvaluationPoint, RunOutcome
from sapo.workflows.comparing.plan import ComparisonPlan
from sapo.workflows.comparing.results import ComparisonResults
from sapo.workflows.comparing.table import as_markdown

BASE = {
    "model": {"path": "m"},
    "tasks": [{"name": "arithmetic"}],
    "train": {"steps": 2},
    "eval": {"problems": 4, "samples": 2},
}


def a_plan(rates: Sequence[float] = (1e-4,), seeds: Sequence[int] = (0, 1)) -> ComparisonPlan:
    arms = {"a": {"objective.name": "sapo"}, "b": {"objective.name": "grpo"}}
    return ComparisonPlan.of("mine", BASE, arms, learning_rates=list(rates), seeds=list(seeds))


def write_run(run: Path, looks: Sequence[Sequence[int]], end: str = "finished") -> None:
    """A run of one evaluation per step, of problems with two samples each."""
    run.mkdir(parents=True)
    lines = []
    for step, correct in enumerate(looks):
        lines.append({"kind": "eval", "step": step, "task": "add4", "samples": 2, "correct": list(correct)})
        lines.append({"kind": "step", "step": step + 1})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if end == "finished":
        summary = {"steps": 2, "tokens": {"generated": 100}, "seconds": {"total": 3.0}}
        (run / "summary.json").write_text(json.dumps(summary))
    elif end == "failed":
        (run / FAILURE_FILE).write_text(json.dumps({"reason": "step 2: the loss is nan"}))


def results_of(directory: Path, plan: ComparisonPlan, runs: dict[str, tuple]) -> ComparisonResults:
    for name, (looks, *end) in runs.items():
        write_run(directory / "runs" / name, looks, *end)
    return ComparisonResults.of(plan, [RunOutcome.of(run) for run in plan.runs(directory)])


def counts(results: ComparisonResults) -> dict[str, int]:
    """The numbers of the alarms on the one task."""
    return {name: value for name, value in results.alarms("add4").to_json().items() if isinstance(value, int)}


def test_means_differences_and_bests_are_those_counted_by_hand(tmp_path: Path) -> None:
    results = results_of(
        tmp_path,
        a_plan(),
        {
            "a-lr1e-4-seed0": ([[1, 0, 0, 0], [2, 2, 2, 0], [2, 2, 0, 0]],),
            "a-lr1e-4-seed1": ([[1, 0, 0, 0], [1, 0, 0, 0], [2, 2, 2, 2]],),
            "b-lr1e-4-seed0": ([[1, 0, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0]],),
            "b-lr1e-4-seed1": ([[1, 0, 0, 0], [1, 0, 0, 0], [2, 2, 1, 1]],),
        },
    )
    a, b = results.cells
    assert (a.arm, a.seeds, a.failed, a.collapsed) == ("a", (0, 1), (), 0)
    assert a.start.value == 1 / 8
    assert a.final.value == (4 + 8) / 16
    assert a.best.value == (6 + 8) / 16, "the best of seed 0 is its middle evaluation"
    assert a.difference is None
    assert b.final.value == (2 + 6) / 16
    assert b.difference.value == pytest.approx((8 - 12) / 16)
    assert a.tokens == {"generated": 100.0}
    assert a.seconds == {"total": 3.0}


def test_the_interval_of_a_difference_is_that_of_pairs(tmp_path: Path) -> None:
    # Problems differ as much as they can; on each of them, after each seed, b is right once less in two.
    results = results_of(
        tmp_path,
        a_plan(),
        {
            "a-lr1e-4-seed0": ([[0] * 4, [0] * 4, [2, 2, 1, 1]],),
            "a-lr1e-4-seed1": ([[0] * 4, [0] * 4, [1, 1, 2, 2]],),
            "b-lr1e-4-seed0": ([[0] * 4, [0] * 4, [1, 1, 0, 0]],),
            "b-lr1e-4-seed1": ([[0] * 4, [0] * 4, [0, 0, 1, 1]],),
        },
    )
    difference = results.cells[1].difference
    assert (difference.value, difference.low, difference.high) == (-0.5, -0.5, -0.5)
    assert results.cells[1].final.low < results.cells[1].final.high


def test_a_run_that_failed_is_a_collapse_counts_as_0_and_says_why(tmp_path: Path) -> None:
    results = results_of(
        tmp_path,
        a_plan(),
        {
            "a-lr1e-4-seed0": ([[1, 1, 1, 1], [2, 2, 2, 2]], "failed"),
            "a-lr1e-4-seed1": ([[1, 1, 1, 1], [2, 2, 2, 2], [2, 2, 2, 2]],),
            "b-lr1e-4-seed0": ([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]],),
        },
    )
    a, b = results.cells
    assert (a.failed, a.collapsed, a.final.value, a.best.value) == ((0,), 1, 0.5, 1.0)
    assert (b.seeds, b.difference.value) == ((0,), 0.5), "b's seed 1 has not ended: seed 0 alone is compared"
    record = results.to_json()
    failed = record["runs"][0]
    assert (failed["state"], failed["reason"]) == ("failed", "step 2: the loss is nan")
    assert failed["tasks"]["add4"]["final"] is None, "what was not measured is not written as 0"
    table = as_markdown(results)
    assert "a-lr1e-4-seed0 failed: step 2: the loss is nan" in table
    assert "not ended, and in no figure: b-lr1e-4-seed1" in table
    assert "| x 1.000 |" in table


def test_warnings_are_those_the_run_gave_of_a_rollback_too(tmp_path: Path) -> None:
    results = results_of(
        tmp_path,
        a_plan(seeds=(0,)),
        {
            "a-lr1e-4-seed0": ([[1, 1, 1, 1], [2, 2, 2, 2], [2, 2, 2, 2]],),
            "b-lr1e-4-seed0": ([[1, 1, 1, 1], [2, 2, 2, 2], [0, 0, 0, 0]],),
        },
    )
    assert counts(results) == {"collapsed": 1, "detected": 0, "in_time": 0, "healthy": 1, "false_alarms": 0}
    flood = {
        "kind": "warning",
        "step": 2,
        "cause": "zero_variance_flood",
        "collapse": True,
        "value": 1,
        "threshold": 0.7,
    }
    plain = {"kind": "warning", "step": 1, "cause": "unequal_old_logprobs", "text": "of the set-up, by no rule"}
    for run, lines in (("a", [flood, {"kind": "rollback", "step": 2, "to": 1}]), ("b", [plain])):
        with (tmp_path / "runs" / f"{run}-lr1e-4-seed0" / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    results = ComparisonResults.of(results.plan, [RunOutcome.of(run) for run in results.plan.runs(tmp_path)])
    # The warned run went back and is well; what was said of the other's set-up is no early warning.
    assert counts(results) == {"collapsed": 1, "detected": 0, "in_time": 0, "healthy": 1, "false_alarms": 1}
    assert results.outcomes[0].warnings == ({"step": 2, "cause": "zero_variance_flood", "collapse": True},)
    assert "0 of 1 collapsed runs were warned, and 1 of 1 healthy ones" in as_markdown(results)


def test_a_lead_runs_from_the_first_alarm_to_the_first_evaluation_that_shows_a_lasting_fall() -> None:
    """Evaluations every 10 steps; pass@1 is below half of the best at 20, back at 30, and below for good from 40 on."""
    rates = {0: 2, 10: 8, 20: 2, 30: 8, 40: 3, 50: 1}
    curve = Curve(tuple(EvaluationPoint(step, 1, (1,) * right + (0,) * (8 - right)) for step, right in rates.items()))
    assert (
        curve.collapsed_since,
        Curve(curve.points[:3]).collapsed_since,
        Curve(curve.points[:2]).collapsed_since,
    ) == (
        40,
        20,
        None,
    )
    run = RunOutcome("a", "a", 1e-4, 0, "finished", None, 50, {"t": curve}, {}, (), {}, 50, {})
    alarms = ({"step": 33, "cause": "ratio_tail"}, {"step": 36, "cause": "reward_collapse"})
    late, warned = (
        replace(run, name="b", warnings=({"step": 45, "cause": "ratio_tail"},)),
        replace(run, warnings=alarms),
    )
    failed = replace(run, state="failed", curves={"t": Curve(curve.points[:2])}, last_step=17)
    failed = replace(failed, warnings=({"step": 16, "cause": "gradient_spike"},))
    found = Alarms.of([warned, late, run, failed], "t")
    assert [(c.visible, c.step, c.lead) for c in found.collapses] == [
        (40, 33, 7),
        (40, 45, -5),
        (40, None, None),
        (17, 16, 1),
    ]
    assert found.collapses[2].to_json() == {"run": "a", "visible": 40}, "no alarm, and no lead of 0"
    assert (found.detected, found.in_time) == (3, 2)
    assert found.causes == {"gradient_spike": (1, 0), "ratio_tail": (2, 0), "reward_collapse": (1, 0)}
    assert (
        "3 of 4 collapsed runs were warned (2 no later than it showed, 4 steps before in the median)" in found.sentence
    )


def test_a_failure_after_a_rollback_is_dated_by_its_own_step_and_not_by_those_undone(tmp_path: Path) -> None:
    plan = a_plan(seeds=(0,))
    run = next(iter(plan.runs(tmp_path)))
    write_run(run.directory, [[2, 2, 2, 2]], "failed")
    with (run.directory / "metrics.jsonl").open("a") as file:
        for kind, step in (("warning", 9), ("rollback", 9), ("step", 3), ("warning", 4)):
            file.write(json.dumps({"kind": kind, "step": step, "cause": "non_finite", "collapse": True}) + "\n")
    assert RunOutcome.of(run).collapse_visible("add4") == 4


def test_what_the_loop_warns_of_itself_describes_the_set_up_of_a_run(tmp_path: Path) -> None:
    plan = a_plan(seeds=[0])
    for run in plan.runs(tmp_path):
        write_run(run.directory, [[1], [1], [2]])
        with (run.directory / "metrics.jsonl").open("a") as file:  # lines as `Journal.warn` writes them
            for cause in OF_THE_LOOP:
                file.write(json.dumps({"kind": "warning", "step": 2, "cause": cause, "text": "of the loop"}) + "\n")
    outcome = RunOutcome.of(next(iter(plan.runs(tmp_path))))
    assert outcome.warnings == ()
    assert outcome.set_up == dict.fromkeys(sorted(OF_THE_LOOP), 1)


def test_what_describes_the_set_up_is_counted_apart_and_is_no_alarm(tmp_path: Path) -> None:
    well = [[1, 1, 1, 1], [2, 2, 2, 2], [2, 2, 2, 2]]
    plan = a_plan(seeds=(0,))
    for run in plan.runs(tmp_path):
        write_run(run.directory, well)
        with (run.directory / "metrics.jsonl").open("a") as file:
            for step in (1, 2):
                line = {"kind": "warning", "step": step, "cause": "unfaithful_old_logprobs", "collapse": False}
                file.write(json.dumps({**line, "value": 0.02, "threshold": 0.01}) + "\n")
    results = ComparisonResults.of(plan, [RunOutcome.of(run) for run in plan.runs(tmp_path)])
    assert counts(results) == {"collapsed": 0, "detected": 0, "in_time": 0, "healthy": 2, "false_alarms": 0}
    assert results.to_json()["warnings"]["add4"]["set_up"] == {"unfaithful_old_logprobs": 2}
    assert results.to_json()["runs"][0]["set_up_warnings"] == {"unfaithful_old_logprobs": 2}, "in two steps of the run"
    said = "Warnings about the set-up, which predict no collapse: unfaithful_old_logprobs in 2 of 2 runs"
    assert said in as_markdown(results)


def test_each_arm_is_also_compared_at_its_own_best_learning_rate(tmp_path: Path) -> None:
    none, half, all_right = [0] * 4, [1] * 4, [2] * 4
    results = results_of(
        tmp_path,
        a_plan(rates=(1e-4, 2e-4), seeds=(0,)),
        {
            "a-lr1e-4-seed0": ([none, none, all_right],),
            "a-lr2e-4-seed0": ([none, none, none],),
            "b-lr1e-4-seed0": ([none, none, none],),
            "b-lr2e-4-seed0": ([none, none, half],),
        },
    )
    a, b = results.tuned
    assert (a.learning_rate, a.final.value, a.difference) == (1e-4, 1.0, None)
    assert (b.learning_rate, b.final.value, b.difference.value) == (2e-4, 0.5, -0.5)
    assert [c.difference.value for c in results.cells if c.arm == "b"] == [-1.0, 0.5], "same rate against same rate"


def test_every_run_is_in_the_table(tmp_path: Path) -> None:
    plan = a_plan()
    table = as_markdown(results_of(tmp_path, plan, {"a-lr1e-4-seed0": ([[2, 0, 0, 0]] * 3,)}))
    for run in plan.runs(tmp_path):
        assert f"| {run.name} |" in table
    assert "| a-lr1e-4-seed0 | finished | 0.250 | 0.250 (0) | 0.250 | no | 100 | 3 |" in table


@pytest.mark.parametrize(
    ("looks", "collapsed"),
    [
        ([[1, 1, 1, 1], [2, 2, 2, 2], [1, 1, 1, 1]], False),  # half of the best, no less
        ([[1, 1, 1, 1], [2, 2, 2, 2], [1, 1, 1, 0]], True),
        ([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], False),
        ([[2, 1, 2, 1], [1, 2, 1, 1]], False),  # below the start by less than problems differ
        ([[2] * 40, [2] * 30 + [1] * 10], True),  # below it on a quarter of the problems, above it on none
    ],
)
def test_a_collapse_is_a_fall_below_half_of_the_best_or_below_the_start(looks: list, collapsed: bool) -> None:
    curve = Curve(tuple(EvaluationPoint(step, 2, tuple(correct)) for step, correct in enumerate(looks)))
    assert curve.collapsed == collapsed


def test_a_metrics_file_cut_in_a_line_is_read_up_to_it(tmp_path: Path) -> None:
    plan = a_plan()
    run = plan.runs(tmp_path)[0]
    write_run(run.directory, [[2, 2, 2, 2]], end="unfinished")
    with (run.directory / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "eval", "st')
    outcome = RunOutcome.of(run)
    assert (outcome.state, outcome.ended, len(outcome.curves["add4"].points)) == ("unfinished", False, 1)


def test_seeds_widen_an_interval_that_is_over_problems_alone_otherwise() -> None:
    generator = np.random.Generator(np.random.PCG64(0))
    problems = generator.random(200)
    same, apart = np.stack([problems] * 3), np.stack([problems, problems + 0.3, problems - 0.3])
    alone = bootstrap(problems)
    over_one, over_same, over_apart = map(bootstrap_crossed, (problems[None], same, apart))
    width = lambda e: e.high - e.low  # noqa: E731
    # Resampling equal seeds changes nothing, so all three are the bootstrap over problems, up to other draws.
    assert width(over_one) == pytest.approx(width(alone), rel=0.1)
    assert width(over_same) == pytest.approx(width(alone), rel=0.1)
    # Means of three draws with replacement of (0, .3, -.3) have a deviation of sqrt(.06 / 3) = .141, so the interval is
    # far wider than the .08 of the problems; its ends are those of a discrete distribution, hence a bound.
    assert 0.4 < width(over_apart) < 0.8
    assert over_apart.value == pytest.approx(problems.mean())


def test_problems_that_a_run_did_not_judge_leave_the_figures(tmp_path: Path) -> None:
    looks = ([[2, 0, 0, 0]] * 3,)
    results_of(tmp_path, a_plan(), {f"{arm}-lr1e-4-seed{seed}": looks for arm in "ab" for seed in (0, 1)})
    file = tmp_path / "runs" / "a-lr1e-4-seed0" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "eval"][-1]
    last |= {"correct": [1, 0, 0, 0], "judged": [1, 0, 2, 2]}
    lines.append({**last, "step": 3, "correct": [0] * 4, "judged": [0] * 4})  # the environment was away
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan = a_plan()
    outcomes = [RunOutcome.of(run) for run in plan.runs(tmp_path)]
    assert outcomes[0].curves["add4"].final.figure == 1 / 3, "one right of one, and two problems of none"
    assert not outcomes[0].curves["add4"].collapsed
    a = ComparisonResults.of(plan, outcomes).cells[0]
    assert a.final.value == 1 / 3, "over the three problems that both seeds judged"
    with pytest.raises(ConfigError, match="problems that all of them judged; got none"):
        bootstrap_crossed(np.array([[np.nan, 1.0], [0.0, np.nan]]))


def write_graded(run: Path, looks: Sequence[Sequence[float]], end: str = "finished") -> None:
    """A run of one evaluation per step, of problems with mean rewards of their own; none of them is right."""
    write_run(run, [[0] * len(rewards) for rewards in looks], end)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evals = [line for line in lines if line["kind"] == "eval"]
    for line, rewards in zip(evals, looks, strict=True):
        line |= {"binary": False, "rewards": list(rewards)}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_graded_rewards_are_compared_by_their_mean(tmp_path: Path) -> None:
    plan = a_plan(seeds=(0,))
    write_graded(tmp_path / "runs" / "a-lr1e-4-seed0", [[0.1] * 4, [0.3] * 4, [0.5, 0.7, 0.5, 0.7]])
    write_graded(tmp_path / "runs" / "b-lr1e-4-seed0", [[0.1] * 4, [0.1] * 4, [-0.1, 0.1, 0.3, 0.5]])
    results = ComparisonResults.of(plan, [RunOutcome.of(run) for run in plan.runs(tmp_path)])
    a, b = results.cells
    assert (a.final.value, b.final.value) == (pytest.approx(0.6), pytest.approx(0.2))
    assert b.difference is not None
    assert b.difference.value == pytest.approx(-0.4)
    record = results.to_json()
    assert record["figures"] == {"add4": "mean reward"}
    assert record["runs"][0]["tasks"]["add4"]["mean reward"] == [[0, 0.1], [1, 0.3], [2, pytest.approx(0.6)]]
    markdown = as_markdown(results)
    assert "final mean reward" in markdown
    assert "final pass@1" not in markdown
    assert "Rewards on add4 are not only 0 and 1" in markdown


def test_a_failure_never_counts_above_the_lowest_evaluation_of_its_run(tmp_path: Path) -> None:
    plan = a_plan(seeds=(0,))
    write_graded(tmp_path / "runs" / "a-lr1e-4-seed0", [[-2.0] * 4, [-1.0] * 4], "failed")
    write_graded(tmp_path / "runs" / "b-lr1e-4-seed0", [[0.5] * 4, [0.6] * 4], "failed")
    results = ComparisonResults.of(plan, [RunOutcome.of(run) for run in plan.runs(tmp_path)])
    assert [cell.final.value for cell in results.cells] == [-2.0, 0.0]
    assert [run["tasks"]["add4"]["counts_as"] for run in results.to_json()["runs"]] == [-2.0, 0.0]


@pytest.mark.parametrize(
    ("looks", "collapsed"),
    [
        ([[-1.0] * 4, [-0.5] * 4, [-0.6] * 4], False),  # below half of its best, and better than its start
        ([[0.0] * 4, [1.0] * 4, [0.4] * 4], True),  # less than half of the gain is left
        ([[0.0] * 4, [1.0] * 4, [0.6] * 4], False),
        ([[0.5] * 4, [0.5] * 4, [0.4] * 4], True),  # below its start
        (
            [[0.50] * 4, [0.6, 0.5, 0.4, 0.6], [0.51, 0.5, 0.5, 0.5]],
            False,
        ),  # what was lost is within the problems' noise
    ],
)
def test_a_collapse_of_graded_rewards_is_measured_from_the_start(looks: list, collapsed: bool) -> None:
    points = tuple(EvaluationPoint(step, 2, (0,) * 4, rewards=tuple(look)) for step, look in enumerate(looks))
    assert Curve(points).collapsed == collapsed
