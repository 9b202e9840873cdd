"""Rules of alarms, refitted on recorded runs: what they count, by hand."""

from __future__ import annotations

from research.evidence.alarm_rules import AlarmRule, RecordedRun, fit, halves, judge, recorded_runs, table

FALLEN = RecordedRun(0, 25, ((10, "tail"), (20, "reward")))
LATE = RecordedRun(1, 25, ((30, "reward"),))
NOISY = RecordedRun(2, None, ((5, "tail"),))
QUIET = RecordedRun(3, None, ())
RUNS = [FALLEN, LATE, NOISY, QUIET]


def test_a_rule_is_judged_by_its_first_alarm() -> None:
    found = judge(AlarmRule(("reward",)), RUNS)
    assert (found.leads, found.false_alarms) == ((5, -5), 0)
    assert (found.detection, found.in_time, found.false_share) == (1.0, 0.5, 0.0)
    found = judge(AlarmRule(("reward", "tail")), RUNS)
    assert (found.leads, found.false_share) == ((15, -5), 0.5)
    assert judge(AlarmRule(("reward", "tail"), 2), RUNS).leads == (5,)


def test_the_fitted_rule_detects_most_within_its_limit() -> None:
    assert fit(RUNS, 0.0) == AlarmRule(("reward",))
    only_tail = [RecordedRun(0, 25, ((10, "tail"),)), NOISY, QUIET]
    assert judge(fit(only_tail, 0.1), only_tail).detection == 0.0, "its one cause is false in half of the healthy"
    assert fit(only_tail, 0.5) == AlarmRule(("tail",))


def test_runs_of_results_are_read_and_halves_are_fitted_and_judged_apart() -> None:
    runs = [
        {"name": f"a-{seed}", "seed": seed, "tasks": {"add": {}},
         "warnings": [{"step": 3, "cause": "tail"}] if seed < 2 else []}
        for seed in range(4)
    ]  # fmt: skip
    collapses = [{"run": "a-0", "visible": 10}, {"run": "a-1", "visible": 20}]
    studies = {"s": {"results": {"runs": runs, "warnings": {"add": {"collapses": collapses}}}}}
    read = recorded_runs(studies)
    assert [(run.seed, run.visible, run.warnings) for run in read] == [
        (0, 10, ((3, "tail"),)), (1, 20, ((3, "tail"),)), (2, None, ()), (3, None, ()),
    ]  # fmt: skip
    assert [[run.seed for run in half] for half in halves(read)] == [[0, 2], [1, 3]]
    row = table(studies).splitlines()[2]
    assert row == "| 5% | tail | 1 of 1 (100%) | 100% | 17 | 0 of 1 (0%) |"
