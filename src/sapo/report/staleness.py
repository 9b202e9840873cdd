"""How old what was trained on was, in the free schedule: by step, and over the whole run."""

from __future__ import annotations

from collections.abc import Sequence

from sapo.diagnostics.titles import metric_title
from sapo.report.arms import Arm
from sapo.report.curves import arm_traces, in_figure, rate_panels
from sapo.report.figure import Figure, Trace, outline
from sapo.report.runs import ReportedRun

MEAN, LARGEST = "rollout/staleness_mean", "rollout/staleness_max"


def staleness_figures(arms: Sequence[Arm]) -> list[Figure]:
    """Make the figure of staleness; no figure where no run has a free schedule."""
    measured = [arm for arm in arms if any(run.of_kind("staleness") for run in arm.runs)]
    if not measured:
        return []
    title = metric_title("step", MEAN)
    panels = [
        *rate_panels(measured, "step", title.label, _by_step, title="by step"),
        *rate_panels(
            measured,
            metric_title("staleness", "staleness").label,
            "share of tokens",
            _over_the_run,
            title="all steps together",
        ),
    ]
    steps = (r for arm in measured for run in arm.runs for r in run.of_kind("step"))
    discarded = sum(r.get("rollout/discarded_stale", 0) for r in steps)
    caption = (
        "Updates made between the draw of a token and the first update of the step that took it up: the mean (solid) "
        "and the largest (dotted) of each step, and how all tokens of the run spread. Measured, token by token. Groups "
        f"that became too old and were drawn again: {discarded}."
    )
    return [in_figure("staleness", title.heading, panels, caption=caption)]


def _by_step(arm: Arm) -> list[Trace]:
    mean = arm_traces(arm, lambda run: run.series(MEAN))
    return [*mean, *arm_traces(arm, lambda run: run.series(LARGEST), dash="dot")]


def _over_the_run(arm: Arm) -> list[Trace]:
    tokens = tokens_by_staleness(arm.runs)
    if not tokens:
        return []
    ages = range(max(tokens) + 1)
    edges = [age - 0.5 for age in (*ages, max(tokens) + 1)]
    total = sum(tokens.values())
    x, y = outline(edges, [tokens.get(age, 0) / total for age in ages], to_zero=True)
    return [Trace("steps", x, y, name=arm.name, color=arm.color)]


def tokens_by_staleness(runs: Sequence[ReportedRun]) -> dict[int, int]:
    """Return how many tokens of all steps were so many updates old."""
    tokens: dict[int, int] = {}
    for record in (r for run in runs for r in run.of_kind("staleness")):
        for age, count in zip(record["staleness"], record["tokens"], strict=True):
            tokens[age] = tokens.get(age, 0) + count
    return tokens
