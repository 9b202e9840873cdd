"""What a report is made of: runs, arms, figures, words. Nothing is drawn here."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from sapo.diagnostics import distributions
from sapo.errors import ConfigError
from sapo.report import make_report
from sapo.report.arms import group_runs
from sapo.report.curves import MOST_POINTS
from sapo.report.figure import Figure
from sapo.report.gates import gate_curve, objective_of
from sapo.report.runs import find_runs, read_runs, thinned
from sapo.report.spread import LOG_RATIO_EDGES, VARIANCE_EDGES, spread_of
from support.report_cases import default_rows, rollout_row, settings, step_records, write_run


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
    assert pos.y == tuple(1 - r["gate/eur_pos"] for r in last)
    assert neg.y == tuple(1 - r["gate/eur_neg"] for r in last)
    evaluations = [r for r in records if r["kind"] == "eval"]
    band, line = figures["pass1"].panels[0].traces
    assert line.y == tuple(r["pass@1"] for r in evaluations)
    assert (band.low, band.high) == tuple(tuple(r[f"pass@1/{end}"] for r in evaluations) for end in ("low", "high"))


def test_a_headline_has_the_mean_reward_where_rewards_are_not_0_and_1(tmp_path: Path) -> None:
    records = [
        {**r, "binary": False, "reward/mean": 0.4 + r["step"] / 10} if r["kind"] == "eval" else r
        for r in step_records(4, 0.0)
    ]
    write_run(tmp_path / "graded", config=settings(0), records=records)
    [headline] = make_report([tmp_path]).headlines
    assert "held-out mean reward 0.400 → 0.800 at step 4 on add4" in headline
    assert "pass@1" not in headline


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
    assert [t.name for t in strong(figures["fig5"])] == ["τ_neg = 1.05", "τ_neg = 2"]


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


def distribution(log_ratio: dict[int, int], variance: dict[int, int]) -> dict:
    """A record of an off-policy update with these counts at these places, the one below all edges first."""
    counts, variances = [0] * (len(LOG_RATIO_EDGES) + 1), [0] * (len(VARIANCE_EDGES) + 1)
    for made, places in ((counts, log_ratio), (variances, variance)):
        for place, count in places.items():
            made[place] = count
    return {
        "kind": "distribution", "step": 1, "update": 1, "on_policy": False,
        "log_ratio": {"edges": LOG_RATIO_EDGES.tolist(), "pos": counts},
        "variance": {"edges": VARIANCE_EDGES.tolist(), "count": variances},
        "scatter": {"variance": [1e-3], "discrepancy": [2e-4], "bound": [2.5e-4], "positive": [True]},
    }  # fmt: skip


def widths(trace) -> list[tuple[float, float, float]]:
    """Bins of a histogram's outline that hold something: left edge, right edge, height."""
    points = list(zip(trace.x, trace.y, strict=True))
    return [(a, b, y) for (a, y), (b, z) in pairwise(points) if y and y == z and a < b]


def test_every_bin_of_a_histogram_is_drawn_at_its_width_a_lone_one_too(tmp_path: Path) -> None:
    # Two neighbours, an empty bin, a lone bin; of Var_i what is below its edges, an empty bin, and a lone one.
    record = distribution({41: 80, 42: 10, 44: 10}, {0: 3, 1: 0, 2: 97})
    figures = figures_of(make_report([write_run(tmp_path / "a", records=[*step_records(4), record])]))
    for panel in (figures["ratios"].panels[0], figures["fig3"].panels[0]):
        ratios = next(t for t in panel.traces if t.kind == "steps" and t.name == "A > 0")
        edges = LOG_RATIO_EDGES
        # counts[k] lies between edges[k - 1] and edges[k]; density per nat, 100 tokens
        expected = [
            (edges[k - 1], edges[k], n / 100 / (edges[k] - edges[k - 1])) for k, n in ((41, 80), (42, 10), (44, 10))
        ]
        found = [(math.log(a), math.log(b), y) for a, b, y in widths(ratios)]
        np.testing.assert_allclose(found, expected, atol=1e-12)
        assert ratios.y.count(None) == 1, "a log axis has no 0: the empty bin is a gap"
    for panel in (figures["variance"].panels[0], figures["fig3"].panels[1]):
        [shares] = [t for t in panel.traces if t.kind == "steps"]
        # Four bins to a decade, and one more of that width below 1e-8 for what lies there.
        np.testing.assert_allclose(widths(shares), [(10**-8.25, 1e-8, 0.03), (10**-7.75, 10**-7.5, 0.97)], rtol=1e-9)
        assert sum(y for *_, y in widths(shares)) == pytest.approx(1), "nothing is dropped"
        assert None not in shares.y, "a linear axis has a 0"
        assert (shares.y[0], shares.y[-1]) == (0, 0)
    for key in ("variance", "fig3"):
        assert "The first bin holds all that lies below 1e-8, 0 too: 3.0%." in figures[key].caption


def test_gates_have_a_key_reach_the_end_of_the_ratios_and_are_drawn_once(tmp_path: Path) -> None:
    records = [*step_records(4), distribution({41: 90, 78: 10}, {20: 1})]
    plain = {"name": "grpo", "normalizer": "sequence_mean", "eps_low": 0.2, "eps_high": 0.27}
    for name, objective in (
        ("a", {}),
        ("b", plain),
        ("c", {**plain, "advantage": "group_mean"}),
        ("d", {"name": "gspo"}),
    ):
        config = settings()
        config["objective"] = objective or config["objective"]
        write_run(tmp_path / name, config=config, records=records)
    report = make_report([tmp_path])
    labels = {arm.runs[0].name: arm.label for arm in group_runs(read_runs(find_runs([tmp_path])))}
    for key in ("ratios", "fig3"):
        figure = figures_of(report)[key]
        gates = [t for t in figure.panels[0].traces if t.second]
        assert [(t.name, t.dash, t.color) for t in gates] == [
            ("gate, A > 0", "dash", 0),
            ("gate, A ≤ 0", "dot", 0),
            ("gate, A > 0", "dash", 1),
            ("gate, A ≤ 0", "dot", 1),
        ]
        for gate in gates:
            assert gate.x[-1] == pytest.approx(math.exp(LOG_RATIO_EDGES[78])), "the right edge of the last bin"
        assert labels["b"] in gates[2].hover
        assert labels["c"] in gates[2].hover
        assert "dashed for A > 0, dotted for A ≤ 0" in figure.caption
        assert f"{labels['b']} and {labels['c']} have the same gate" in figure.caption
        assert f"No gate is drawn of {labels['d']}, which gates a sequence by all its tokens." in figure.caption


def with_updates(**figures: list[float]) -> list[dict]:
    """Records of four steps whose last updates have these figures."""
    records = step_records(4)
    last = [r for r in records if r["kind"] == "update" and r["update"] == 1]
    for name, values in figures.items():
        for record, value in zip(last, values, strict=True):
            record[name.replace("__", "/")] = value
    return records


def test_what_is_lost_is_on_a_log_axis_and_exact_zeros_are_gaps_and_counted(tmp_path: Path) -> None:
    eurs = {"counterfactual__soft__eur": [0.99, 0.999, 1 - 1e-13, 0.5], "counterfactual__never__eur": [1.0] * 4}
    records = with_updates(gate__eur_pos=[1.0, 0.75, 1.0, 0.875], **eurs)
    figures = figures_of(make_report([write_run(tmp_path / "a", records=records)]))
    [panel] = figures["eur"].panels
    pos, neg, points = panel.traces
    assert panel.y_log
    assert pos.y == (None, 0.25, None, 0.125)
    assert (points.kind, points.name, points.x, points.y) == ("points", "A > 0", (2, 4), (0.25, 0.125)), "between gaps"
    assert neg.y == tuple(1 - r["gate/eur_neg"] for r in records if r["kind"] == "update" and r["update"] == 1)
    assert "2 of 8 values are 0 or less than a millionth of the largest" in figures["eur"].caption
    [panel] = figures["counterfactual"].panels
    assert [(t.name, t.y) for t in panel.traces if t.kind == "line"] == [("soft", (1 - 0.99, 1 - 0.999, None, 0.5))]
    assert "5 of 8 values are 0" in figures["counterfactual"].caption
    assert "No value of never is drawn." in figures["counterfactual"].caption


def test_a_band_that_would_reach_down_to_0_has_a_gap_there(tmp_path: Path) -> None:
    for seed, values in enumerate(([1.0, 0.5, 1.0, 0.75], [1.0, 1.0, 0.5, 0.875])):
        records = with_updates(gate__eur_pos=values, gate__eur_neg=values)
        write_run(tmp_path / str(seed), config=settings(seed), records=records)
    [panel] = figures_of(make_report([tmp_path]))["eur"].panels
    [band] = [t for t in panel.traces if t.kind == "band" and t.name == "A > 0"]
    assert (band.x, band.low, band.high) == ((4,), (0.125,), (0.25,))
    [mean] = [t for t in panel.traces if t.kind == "line" and t.name == "A > 0" and not t.faint]
    assert mean.y == (None, 0.25, 0.25, (0.25 + 0.125) / 2), "the seed that lost nothing counts in the mean"


def test_of_a_hard_clip_the_share_of_tokens_it_clips_is_shown(tmp_path: Path) -> None:
    figures = {"gate__p01_pos": [1.0, 0.0, 1.0, 0.0], "gate__p01_neg": [0.0] * 4}
    figures |= {"gate__below_half_pos": [0.0, 0.02, 0.005, 0.03], "gate__below_half_neg": [0.1, 0.2, 0.3, 0.4]}
    grpo = settings()
    grpo["objective"] = {"name": "grpo"}
    write_run(tmp_path / "hard", config=grpo, records=with_updates(**figures))
    alone = figures_of(make_report([tmp_path / "hard"]))["low_weights"]
    [panel] = alone.panels
    assert [(t.name, t.y) for t in panel.traces] == [
        ("A > 0", (0.0, 0.02, 0.005, 0.03)),
        ("A ≤ 0", (0.1, 0.2, 0.3, 0.4)),
    ]
    assert panel.y == "gate weight below 1/2 (share of tokens)"
    assert "A hard clip weighs a token 1 or 0" in alone.caption
    write_run(tmp_path / "soft", records=with_updates(gate__p01_pos=[0.9] * 4, gate__p01_neg=[0.8] * 4))
    both = figures_of(make_report([tmp_path]))["low_weights"]
    assert [(p.title, p.y, [t.name for t in p.traces]) for p in both.panels] == [
        ("A > 0", "1% quantile of the gate weight", ["SAPO"]),
        ("A ≤ 0", "1% quantile of the gate weight", ["SAPO"]),
        ("A > 0", "gate weight below 1/2 (share of tokens)", ["GRPO"]),
        ("A ≤ 0", "gate weight below 1/2 (share of tokens)", ["GRPO"]),
    ]
    assert "A hard clip (GRPO) weighs" in both.caption


def test_runs_that_share_too_little_are_called_by_their_names(tmp_path: Path) -> None:
    write_run(tmp_path / "far", config=settings(0, 4))
    config = settings(0, tau_pos=2.0, tau_neg=0.5, gate="erf")
    config["train"] |= {"learning_rate": 2.5e-4, "minibatches": 4}
    write_run(tmp_path / "near", config=config)
    assert [arm.label for arm in group_runs(read_runs(find_runs([tmp_path])))] == [
        "far: SAPO, lr 1e-4",
        "near: SAPO, lr 2.5e-4",
    ]


def test_settings_in_labels_are_written_as_people_write_them(tmp_path: Path) -> None:
    for name, rate, checkpointing in (("a", 1e-3, True), ("b", 2.5e-4, False)):
        config = settings()
        config["train"] |= {"learning_rate": rate, "activation_checkpointing": checkpointing}
        write_run(tmp_path / name, config=config)
    assert [arm.label for arm in group_runs(read_runs(find_runs([tmp_path])))] == [
        "SAPO, lr 1e-3, activation_checkpointing yes",
        "SAPO, lr 2.5e-4, activation_checkpointing no",
    ]


def test_an_arm_is_called_by_its_routing_replay_and_what_that_changed_is_a_figure(tmp_path: Path) -> None:
    check = {"kind": "self_check", "step": 1, "routing_replay": "R3"}
    shares = [0.01, 0.02, 0.015, 0.03]
    for name, setting, told in (("a", True, [check]), ("b", "R2", []), ("c", True, []), ("d", False, [])):
        config = settings()
        config["objective"] = {"name": "grpo"}
        config["model"]["routing_replay"] = setting
        config["rollout"] = {"max_new_tokens": 1}
        records = step_records(4)
        if setting:
            for record, share in zip([r for r in records if r["kind"] == "step"], shares, strict=True):
                record["update/routing/changed_share"] = share
        write_run(tmp_path / name, config=config, records=[*told, *records])
    runs = {run.name: run for run in read_runs(find_runs([tmp_path]))}
    alone = {name: group_runs([run])[0].label for name, run in runs.items()}
    assert alone == {"a": "GRPO-R3", "b": "GRPO-R2", "c": "GRPO with routing replay", "d": "GRPO"}
    together = {run.name: arm.label for arm in group_runs(list(runs.values())) for run in arm.runs}
    assert together == {**alone, "c": "GRPO-R3"}, "one arm with a, whose self-check says what both ask for"
    figures = figures_of(make_report([tmp_path / "a"]))
    [line] = strong(figures["routing"])
    assert line.y == tuple(shares)
    assert "routing" not in figures_of(make_report([tmp_path / "d"])), "a run without it has no such figure"


def test_the_staleness_of_a_free_schedule_is_a_figure_by_step_and_over_all_tokens(tmp_path: Path) -> None:
    histograms = [([0], [8]), ([0, 2], [6, 2]), ([1, 2], [4, 4]), ([2], [8])]
    records = []
    for record in step_records(4):
        if record["kind"] == "step":
            ages, tokens = histograms[record["step"] - 1]
            records.append({"kind": "staleness", "step": record["step"], "staleness": ages, "tokens": tokens})
            mean = sum(a * t for a, t in zip(ages, tokens, strict=True)) / 8
            found = {"rollout/staleness_mean": mean, "rollout/staleness_max": max(ages), "rollout/discarded_stale": 1}
            record |= found
        records.append(record)
    write_run(tmp_path / "free", config=settings(), records=records)
    write_run(tmp_path / "fixed", config=settings(), records=step_records(4))
    figure = figures_of(make_report([tmp_path / "free"]))["staleness"]
    (mean, largest), (spread,) = (panel.traces for panel in figure.panels)
    assert (mean.y, largest.y) == ((0.0, 0.5, 1.5, 2.0), (0, 2, 2, 2))
    # Of 32 tokens 14 are new, 4 are one update old, and 14 two.
    assert spread.y == (0.0, 14 / 32, 14 / 32, 4 / 32, 4 / 32, 14 / 32, 14 / 32, 0.0)
    assert spread.x == (-0.5, -0.5, 0.5, 0.5, 1.5, 1.5, 2.5, 2.5)
    assert "drawn again: 4." in figure.caption
    assert "staleness" not in figures_of(make_report([tmp_path / "fixed"])), "a fixed schedule has no such figure"


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
    assert "rollback to step 1, continued at 0.5 times the learning rate" in report.warnings[1]["text"]
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


@pytest.mark.parametrize(
    ("config", "models"),
    [
        ({"num_experts": 128}, "mixture of experts"),
        ({"text_config": {"num_experts": 128}, "vision_config": {}}, "mixture of experts"),  # as Qwen3-VL-MoE has it
        ({"text_config": {"hidden_size": 64}}, "dense"),
    ],
)
def test_a_mixture_of_experts_is_known_by_the_config_of_its_checkpoint(
    config: dict, models: str, tmp_path: Path
) -> None:
    own = settings()
    own["model"] = {"path": "somewhere/model"}
    run = write_run(tmp_path / "a", config=own)
    (run / "checkpoints" / "step-000004" / "config.json").write_text(json.dumps(config))
    assert make_report([run]).lines[0].models == models
