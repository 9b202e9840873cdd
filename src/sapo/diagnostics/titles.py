"""The words for metrics: one table that the report, the terminal and docs/metrics.md read.

A metric has one name, that of metrics.jsonl; TensorBoard and the other loggers show it. Where a person reads words in
its place, the words are these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MetricTitle:
    """What a metric is called in prose, and its unit.

    >>> MetricTitle("entropy", "nats per token").label
    'entropy (nats per token)'
    """

    title: str
    unit: str = ""

    @property
    def label(self) -> str:
        """Return the title with its unit, as an axis has it."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def heading(self) -> str:
        """Return the title with a capital, as a figure has it."""
        return self.title[:1].upper() + self.title[1:]


TITLES: dict[tuple[str, str], MetricTitle] = {
    ("step", "reward/mean"): MetricTitle("mean reward"),
    ("step", "pass@1"): MetricTitle("batch pass@1"),
    ("step", "groups/zero_variance"): MetricTitle("zero-variance groups", "share"),
    ("step", "tokens/generated"): MetricTitle("sampled tokens"),
    ("step", "length/mean"): MetricTitle("mean length", "tokens"),
    ("step", "update/entropy"): MetricTitle("entropy", "nats per token"),
    ("step", "update/gate/eur"): MetricTitle("EUR"),
    ("step", "update/ratio/abs_dev"): MetricTitle("|r - 1|"),
    ("step", "update/routing/changed_share"): MetricTitle("changed choices of experts", "share"),
    ("step", "rollout/staleness_mean"): MetricTitle("staleness", "updates"),
    ("staleness", "staleness"): MetricTitle("staleness", "updates"),
    ("update", "gate/eur"): MetricTitle("EUR"),
    ("update", "gate/p01_pos"): MetricTitle("1% quantile of the gate weight"),
    ("update", "gate/p01_neg"): MetricTitle("1% quantile of the gate weight"),
    ("update", "gate/min"): MetricTitle("smallest gate weight"),
    ("update", "gate/below_half"): MetricTitle("gate weight below 1/2", "share of tokens"),
    ("update", "counterfactual/<name>/eur"): MetricTitle("EUR"),
    ("distribution", "variance"): MetricTitle("Var_i"),
    ("eval", "reward/mean"): MetricTitle("mean reward"),
    ("eval", "pass@1"): MetricTitle("held-out pass@1"),
    ("eval", "mean@<n>"): MetricTitle("held-out pass@1"),
    ("eval", "greedy"): MetricTitle("greedy"),
    ("eval", "constant"): MetricTitle("best constant"),
    ("eval", "length/mean"): MetricTitle("mean length", "tokens"),
}
"""(kind of line, name) -> title. EUR is the effective update ratio, the mean gate weight."""


_ROUNDED = 1e-9
"""Difference of figures that rounding explains."""


def metric_title(kind: str, name: str) -> MetricTitle:
    """Return the title of a metric of a kind of line.

    >>> metric_title("step", "update/entropy").label
    'entropy (nats per token)'
    """
    return TITLES[kind, name]


def shown_figures(record: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Return which of the names a step has to show. Of rewards other than 0 and 1 the mean stands without pass@1.

    Rewards are all 0 or 1 where their mean is the share of right ones p and their variance is p (1 - p).

    >>> step = {"reward/mean": 0.4, "reward/std": 0.1, "pass@1": 0.0}
    >>> shown_figures(step, ("reward/mean", "pass@1")), shown_figures({"pass@1": 0.5}, ("reward/mean", "pass@1"))
    (['reward/mean'], ['pass@1'])
    """
    graded = False
    if {"pass@1", "reward/mean", "reward/std"} <= record.keys():
        share, variance = record["pass@1"], record["reward/std"] ** 2
        graded = max(abs(record["reward/mean"] - share), abs(variance - share * (1 - share))) > _ROUNDED
    return [name for name in names if name in record and not (graded and name == "pass@1")]


def titles_table() -> list[str]:
    """Return the table as lines of markdown, for docs/metrics.md."""
    rows = [f"| `{kind}` | `{name}` | {_cell(t.title)} | {t.unit} |" for (kind, name), t in TITLES.items()]
    return ["| kind | name | title | unit |", "|---|---|---|---|", *rows]


def _cell(text: str) -> str:
    """Return a text as it stands in a table of markdown, where a bar would end the cell."""
    return text.replace("|", r"\|")
