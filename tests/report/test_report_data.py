"""What a report is made of: runs, arms, figures, words. Nothing is drawn here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from report_cases import default_rows, rollout_row, settings, step_records, write_run
from sapo.config import ConfigError
from sapo.diagnostics import distributions
from sapo.report import make_report
from sapo.report.arms import group_runs
from sapo.report.curves import MOST_POINTS
from sapo.report.figure import Figure
from sapo.report.gates import gate_curve, objective_of
from sapo.report.runs import find_runs, read_runs, thinned
from sapo.report.spread import LOG_RATIO_EDGES, VARIANCE_EDGES, spread_of


def figures_of(report) -> dict[str, Figure]:
    return {f.key: f for f in (*report.story, *report.paper)}


def strong(figure: Figure, panel: int = 0):
    """The lines of a figure without bands and single seeds."""
    return [t for t in figure.panels[panel].traces if t.kind == "line" and not t.faint]


def test_a_curve_holds_the_numbers_of_metrics_jsonl(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = figures_of(make_report([run]))
    for key, metric in (
        ("reward", "reward/mean"),
        ("entropy", "update/entropy"),
        ("zero_variance", "groups/zero_variance"),
    ):
        [line] = strong(figures[key])
        steps = [r for r in records if r["kind"] == "step"]
        assert line.x == tuple(r["step"] for r in steps)
        assert line.y == tuple(r[metric] for r in steps)
    last = [r for r in records if r["kind"] == "update" and r["update"] == 1]
    pos, neg = strong(figures["eur"])
    assert pos.y == tuple(r["gate/eur_pos"] for r in last)
    assert neg.y == tuple(r["gate/eur_neg"] for r in last)
    evaluations = [r for r in records if r["kind"] == "eval"]
    band, line = figures["pass1"].panels[0].traces
    assert line.y == tuple(r["pass@1"] for r in evaluations)
    assert (band.low, band.high) == tuple(tuple(r[f"pass@1/{end}"] for r in evaluations) for end in ("low", "high"))


def test_seeds_of_an_arm_are_a_mean_in_a_band_and_every_seed_is_a_line(tmp_path: Path) -> None:
    for seed, shift in enumerate((0.0, 0.1, 0.05)):
        write_run(tmp_path / f"s{seed}", config=settings(seed), records=step_records(4, shift))
    report = make_report([tmp_path])
    assert len(report.headlines) == 1
    assert "SAPO, 3 seeds: 4 steps" in report.headlines[0]
    # start .25, .35, .30; end .35, .45, .40
    assert "pass@1 0.300 → 0.400 (seeds 0.350 to 0.450) on add4" in report.headlines[0]
    band, *seeds, mean = figures_of(report)["reward"].panels[0].traces
    assert [t.faint for t in seeds] == [True] * 3
    columns = list(zip(*(t.y for t in seeds), strict=True))
    assert mean.y == pytest.approx([sum(c) / 3 for c in columns])
    assert (band.low, band.high) == (tuple(map(min, columns)), tuple(map(max, columns)))


def test_a_mean_ends_with_the_slowest_seed(tmp_path: Path) -> None:
    write_run(tmp_path / "fast", config=settings(0))
    slow = [r for r in step_records(4, 0.1) if r["step"] <= 2]
    write_run(tmp_path / "slow", config=settings(1), records=slow, finished=False)
    report = make_report([tmp_path])
    [mean] = strong(figures_of(report)["reward"])
    assert mean.x == (1, 2)
    assert "2 to 4 steps so far of 4 (1 not finished)" in report.headlines[0]
    assert not report.finished


def test_runs_that_differ_in_more_than_their_seed_are_arms_named_by_the_difference(tmp_path: Path) -> None:
    write_run(tmp_path / "a", config=settings(0))
    write_run(tmp_path / "b", config=settings(0, tau_neg=2.0))
    grpo = settings(0)
    grpo["objective"] = {"name": "grpo", "normalizer": "sequence_mean", "eps_low": 0.2, "eps_high": 0.27}
    write_run(tmp_path / "c", config=grpo)
    other = settings(1)
    other["eval"], other["log"] = {"every": 5}, {"rollouts_every": 1}  # how it is looked at is no arm of its own
    write_run(tmp_path / "d", config=other)
    arms = group_runs(read_runs(find_runs([tmp_path])))
    assert [(a.label, a.seeds) for a in arms] == [
        ("SAPO, tau_neg 1.05", (0, 1)),
        ("SAPO, tau_neg 2", (0,)),
        ("GRPO", (0,)),
    ]
    figures = figures_of(make_report([tmp_path]))
    assert [t.name for t in strong(figures["fig4"])] == ["SAPO, tau_neg 1.05", "SAPO, tau_neg 2", "GRPO"]
    assert [t.name for t in strong(figures["fig5"])] == ["SAPO, tau_neg 1.05", "SAPO, tau_neg 2"]


def test_another_sampler_is_another_experiment_and_not_in_the_figure_of_objectives(tmp_path: Path) -> None:
    for number, (name, sampler) in enumerate(
        (("sapo", None), ("grpo", None), ("gspo", "float8_e4m3fn"), ("grpo", "float8_e4m3fn"), ("cispo", None))
    ):
        config = settings() | {"rollout": {"sampler_dtype": sampler}}
        config["objective"]["name"] = name
        write_run(tmp_path / str(number), config=config)
    (figure,) = [f for f in make_report([tmp_path]).paper if f.key == "fig4"]
    assert sorted(t.name.split(",")[0] for t in strong(figure)) == ["CISPO", "GRPO", "SAPO"], "the larger of the two"


def test_bins_made_of_rollouts_are_those_of_a_run_s_own_distributions() -> None:
    np.testing.assert_array_equal(LOG_RATIO_EDGES, distributions.LOG_RATIO_EDGES)
    np.testing.assert_array_equal(VARIANCE_EDGES, distributions.VARIANCE_EDGES)


def test_a_comparison_s_directory_gives_its_runs_by_arm_and_rate(tmp_path: Path) -> None:
    for arm, name in (("soft", "sapo"), ("hard", "grpo")):
        for seed in range(2):
            config = settings(seed)
            config["objective"]["name"] = name
            write_run(tmp_path / "runs" / f"{arm}-lr1e-4-seed{seed}", config=config)
    (tmp_path / "comparison.yaml").write_text("arms: {}\n")
    arms = group_runs(read_runs(find_runs([tmp_path])))
    assert [(a.label, a.seeds) for a in arms] == [("hard, lr 1e-4", (0, 1)), ("soft, lr 1e-4", (0, 1))]


def test_what_no_run_measured_says_so_and_how_to_have_it(tmp_path: Path) -> None:
    bare = [{k: v for k, v in r.items() if k != "update/entropy"} for r in step_records(4) if r["kind"] == "step"]
    figures = figures_of(make_report([write_run(tmp_path / "a", records=bare, rollouts={}, tokenizer=False)]))
    for key, way_out in (
        ("entropy", "train.entropy=true"),
        ("pass1", "eval.every"),
        ("ratios", "log.rollouts_every"),
        ("fig2", "moe_quickstart"),
        ("fig4", "sapo compare"),
        ("fig5", "objective.tau_neg"),
        ("fig6", "mixture"),
    ):
        assert figures[key].missing.startswith("Not measured: "), key
        assert way_out in figures[key].missing
        assert figures[key].panels == ()
    line = make_report([tmp_path / "a"]).lines[0]
    assert (line.start, line.final) == ((), ())


def test_the_histogram_counts_off_policy_tokens_by_sign(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", rollouts={4: default_rows()})
    [arm] = group_runs(read_runs([run]))
    spread = spread_of(arm)
    # Only prompt 1 was in update 1: one sample of either sign, 11 tokens each, z = .1 (t % 9 - 4).
    z = np.array([0.1 * (t % 9 - 4) for t in range(11)])
    expected = np.bincount(np.searchsorted(LOG_RATIO_EDGES, z, side="right"), minlength=len(LOG_RATIO_EDGES) + 1)
    for side in ("pos", "neg"):
        np.testing.assert_array_equal(spread.log_ratio[side], expected)
    assert spread.tokens == 22
    variances = sorted(v for v, _, _ in spread.pairs)
    assert variances == pytest.approx([z.var()] * 2)
    for value, discrepancy, positive in spread.pairs:
        tau = 1.0 if positive else 1.05
        gates = 1 / np.cosh(tau * z / 2) ** 2
        assert discrepancy == pytest.approx(abs(gates.mean() - 1 / math.cosh(tau * z.mean() / 2) ** 2))
        assert discrepancy <= tau**2 / 4 * value


def test_distributions_that_a_run_wrote_are_taken_as_they_are(tmp_path: Path) -> None:
    def record(update: int, on_policy: bool) -> dict:
        counts = [0] * (len(LOG_RATIO_EDGES) + 1)
        counts[41] = 5 * (update + 1)
        return {
            "kind": "distribution", "step": 1, "update": update, "on_policy": on_policy,
            "log_ratio": {"edges": LOG_RATIO_EDGES.tolist(), "pos": counts},
            "variance": {"edges": [1e-4, 1e-2], "count": [0, 3, 1]},
            "scatter": {"variance": [1e-3], "discrepancy": [2e-4], "bound": [2.5e-4], "positive": [True]},
        }  # fmt: skip

    records = [*step_records(4), record(0, True), record(1, False), record(2, False)]
    [arm] = group_runs(read_runs([write_run(tmp_path / "a", records=records)]))
    spread = spread_of(arm)
    assert (spread.tokens, spread.updates, spread.from_rollouts) == (10 + 15, 2, False)
    assert spread.variance.tolist() == [0, 6, 2]
    assert spread.pairs == [(1e-3, 2e-4, True)] * 2


def test_figure_1_has_the_closed_forms_of_the_paper() -> None:
    r = np.array([0.5, 0.9, 1.0, 1.2, 2.0])
    value, weight = gate_curve(objective_of({"name": "sapo"}), r, 1)
    np.testing.assert_allclose(value, 4 / (1 + np.exp(-(r - 1))))  # equation (6) at tau = 1
    np.testing.assert_allclose(weight, 1 / np.cosh((r - 1) / 2) ** 2)
    value, weight = gate_curve(objective_of({"name": "grpo"}), r, 1)
    np.testing.assert_allclose(value, np.minimum(r, 1.27))
    assert weight.tolist() == [1, 1, 1, 1, 0]
    assert gate_curve(objective_of({"name": "grpo"}), r, -1)[1].tolist() == [0, 1, 1, 1, 1]


def test_a_very_long_curve_is_thinned_and_never_averaged() -> None:
    points = [(i, i * i) for i in range(10 * MOST_POINTS + 3)]
    x, y = thinned(points)
    assert len(x) <= MOST_POINTS + 1
    assert (x[0], x[-1]) == (0, 10 * MOST_POINTS + 2)
    assert y == tuple(v * v for v in x)


def test_a_line_that_is_being_written_is_left_for_the_next_time(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 5, "rew')
    assert read_runs([run])[0].steps == 4


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "config.yaml").unlink(), "neither a run nor a directory of runs"),
        (lambda run: (run / "config.yaml").write_text("a: ["), "config.yaml is not valid YAML"),
        (lambda run: (run / "config.yaml").write_text("- 1"), "must hold a run's settings"),
        (lambda run: (run / "metrics.jsonl").write_text("{}\nnonsense\n"), "metrics.jsonl, line 2 is not JSON"),
        (lambda run: (run / "metrics.jsonl").write_text("[]\n"), "line 1 must be an object; got list"),
        (lambda run: (run / "summary.json").write_text("{"), "summary.json is not JSON"),
        (lambda run: (run / "rollouts/step-000004.jsonl").write_text("{\n"), "step-000004.jsonl, line 1 is not JSON"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path, spoil, message: str) -> None:
    run = write_run(tmp_path / "a")
    spoil(run)
    with pytest.raises(ConfigError, match=message) as raised:
        make_report([run])
    assert "\n" not in str(raised.value)


def test_nothing_at_a_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run directory at"):
        make_report([tmp_path / "nothing"])


def test_warnings_and_their_causes_are_kept(tmp_path: Path) -> None:
    warning = {"kind": "warning", "step": 3, "cause": "ratio_tail", "text": "ratios reach 40\u202e"}
    report = make_report([write_run(tmp_path / "a", records=[*step_records(4), warning])])
    assert report.warnings == ({"run": "a", "step": 3, "cause": "ratio_tail", "text": "ratios reach 40\\u202e"},)
    assert report.lines[0].warnings == 1


def test_a_run_that_went_back_says_so_after_the_warning_that_made_it(tmp_path: Path) -> None:
    warning = {"kind": "warning", "step": 3, "cause": "ratio_tail", "text": "ratios reach 40"}
    back = {"kind": "rollback", "step": 3, "to": 1, "cause": "ratio_tail", "rollbacks": 1, "learning_rate_scale": 0.5}
    report = make_report([write_run(tmp_path / "a", records=[*step_records(4), warning, back])])
    assert [(w["cause"], w["step"]) for w in report.warnings] == [("ratio_tail", 3), ("rollback", 3)]
    assert "went back to step 1 and goes on at 0.5 times the learning rate" in report.warnings[1]["text"]
    assert report.lines[0].warnings == 1


def test_parts_of_phases_are_not_counted_twice_and_a_profile_makes_no_arm(tmp_path: Path) -> None:
    plain = write_run(tmp_path / "plain")
    profiled = write_run(tmp_path / "profiled", config={**settings(1), "profile": {"first_step": 2, "steps": 1}})
    seconds = {"generate": 4.0, "update": 2.5, "update/backward": 1.5, "total": 6.5}
    (profiled / "summary.json").write_text(json.dumps({"steps": 4, "tokens": {"generated": 410}, "seconds": seconds}))
    report = make_report([plain, profiled])
    assert [line.seconds for line in report.lines] == [6.5, 6.5]
    assert len(report.headlines) == 1, "two seeds of one arm"
    (profiled / "summary.json").unlink()  # the run goes on: from its steps
    records = step_records(4)
    for record in records:
        if record["kind"] == "step":
            record["timing"]["update/backward"] = 0.25
    (profiled / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert make_report([profiled]).lines[0].seconds == 4 * 1.5


def test_the_first_update_of_a_stale_batch_is_off_policy(tmp_path: Path) -> None:
    def tokens(**changes: object) -> str:
        rows = [rollout_row(0, 0, [1, 2, 3], update=0, **changes), rollout_row(0, 1, [1, 2, 3], update=1)]
        run = write_run(tmp_path / str(len(list(tmp_path.iterdir()))), rollouts={4: rows})
        (figure,) = [f for f in make_report([run]).story if f.key == "variance"]
        return figure.caption

    assert "3 tokens of 1 off-policy updates" in tokens(), "by its number, where a run did not say"
    assert "3 tokens of 1 off-policy updates" in tokens(on_policy=True)
    assert "6 tokens of 2 off-policy updates" in tokens(on_policy=False)


def test_a_run_that_broke_says_so_and_why(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", records=[r for r in step_records(4) if r["step"] <= 2], finished=False)
    (run / "failure.json").write_text(json.dumps({"reason": "step 3: the loss is not finite"}))
    report = make_report([run])
    assert report.lines[0].state == "failed"
    assert report.headlines[0].startswith("SAPO: 2 steps of 4, then it failed; held-out")
    assert report.warnings == ({"run": "a", "step": 2, "cause": "failed", "text": "step 3: the loss is not finite"},)


def test_a_rollout_row_of_the_cases_is_consistent() -> None:
    row = rollout_row(0, 1, [1, 2, 3], update=1)
    assert row["gate_weight"][0] == pytest.approx(1 / math.cosh(1.05 * (math.exp(-0.4) - 1) / 2) ** 2)
