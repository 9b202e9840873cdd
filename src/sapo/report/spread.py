"""How ratios spread: histogram of r under the gate, Var_i, and D_i against its bound; Figures 2 and 3 of the paper.

The figures come from a run's records of kind "distribution". A run without them is counted from the completions in
rollouts/, with the same bins. Only off-policy updates are counted, as in the paper: in a step's first update r = 1 up
to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sapo.diagnostics.titles import metric_title
from sapo.report.arms import Arm, by_rate
from sapo.report.figure import Dash, Figure, Mark, Panel, Trace, outline
from sapo.report.gates import gate_curve, objective_of
from sapo.report.rollouts import evenly, is_off_policy, rollouts_of
from sapo.report.runs import ReportedRun
from sapo.workflows.comparing.plan import format_rate

_STEPS = np.logspace(-4, 1, 41)
LOG_RATIO_EDGES = np.concatenate([-_STEPS[::-1], _STEPS])
"""Edges of the bins of log r, in nats: eight bins to a decade on both sides of a bin that holds |log r| < 1e-4."""

VARIANCE_EDGES = np.logspace(-8, 2, 41)
"""Edges of the bins of Var_i, in nats squared, four bins to a decade."""

VARIANCE = metric_title("distribution", "variance")

LOW_VARIANCE = 0.02
"""Assumption A2: most sequences of the paper's Figures 2 and 3 have a smaller Var_i."""

MOST_FILES = 6
"""Largest number of files of rollouts/ read for a run that wrote no distributions, evenly spaced."""

MOST_PAIRS = 500
"""Largest number of points in an arm's scatter, evenly spaced in the order of Var_i."""


@dataclass
class Spread:
    """Counts of one arm; each list of counts has an entry more at either end, for what lies beyond the edges."""

    log_ratio: dict[str, np.ndarray] = field(
        default_factory=lambda: {s: np.zeros(len(LOG_RATIO_EDGES) + 1) for s in ("pos", "neg")}
    )
    log_ratio_edges: np.ndarray = field(default_factory=lambda: LOG_RATIO_EDGES)
    variance: np.ndarray = field(default_factory=lambda: np.zeros(len(VARIANCE_EDGES) + 1))
    variance_edges: np.ndarray = field(default_factory=lambda: VARIANCE_EDGES)
    pairs: list[tuple[float, float, bool]] = field(default_factory=list)
    """(Var_i, D_i, whether A_i > 0)."""
    updates: int = 0
    from_rollouts: bool = False

    @property
    def tokens(self) -> int:
        """Return the tokens counted in the histogram of ratios."""
        return int(sum(c.sum() for c in self.log_ratio.values()))


def spread_of(arm: Arm) -> Spread | None:
    """Sum all off-policy updates of an arm's runs; None where none was logged."""
    total = Spread()
    for run in arm.runs:
        records = [r for r in run.of_kind("distribution") if is_off_policy(r)]
        if records:
            _add_records(total, records)
        elif not run.of_kind("distribution"):
            _add_rollouts(total, run)
    total.pairs.sort()
    return total if total.tokens else None


def _add_records(total: Spread, records: Iterable[dict[str, Any]]) -> None:
    for record in records:
        ratios, variance, scatter = record["log_ratio"], record["variance"], record["scatter"]
        edges = np.array(ratios["edges"])
        if total.tokens and (len(edges) != len(total.log_ratio_edges) or not np.allclose(edges, total.log_ratio_edges)):
            continue  # of another version: bins with other edges do not add up
        if not total.tokens:
            total.log_ratio_edges, total.variance_edges = edges, np.array(variance["edges"])
            total.log_ratio = {s: np.zeros(len(edges) + 1) for s in ("pos", "neg")}
            total.variance = np.zeros(len(variance["edges"]) + 1)
        for side in ("pos", "neg"):
            if side in ratios:
                total.log_ratio[side] += np.array(ratios[side])
        total.variance += np.array(variance["count"])
        total.pairs += zip(scatter["variance"], scatter["discrepancy"], scatter["positive"], strict=True)
        total.updates += 1


def _add_rollouts(total: Spread, run: ReportedRun) -> None:
    import torch

    from sapo.objectives import gate_discrepancy, variance

    total.from_rollouts = True
    for file in evenly(list(run.rollouts.values()), MOST_FILES):
        rows = [r for r in rollouts_of(file) if is_off_policy(r) and r.get("log_ratio")]
        if not rows:
            continue
        lengths = [len(r["log_ratio"]) for r in rows]
        log_ratio_M = torch.tensor([z for r in rows for z in r["log_ratio"]], dtype=torch.float64)
        sequence_M = torch.repeat_interleave(torch.tensor(lengths))
        positive_B = torch.tensor([r["advantage"] > 0 for r in rows])
        pos, neg = temperatures(run)
        tau_B = torch.where(positive_B, pos, neg).double()
        variance_B = variance(log_ratio_M, sequence_M, len(rows))
        discrepancy_B = gate_discrepancy(log_ratio_M, sequence_M, len(rows), tau=tau_B)
        for side, own_M in (("pos", positive_B[sequence_M]), ("neg", ~positive_B[sequence_M])):
            total.log_ratio[side] += _counts(log_ratio_M[own_M].numpy(), LOG_RATIO_EDGES)
        total.variance += _counts(variance_B.numpy(), VARIANCE_EDGES)
        total.pairs += zip(variance_B.tolist(), discrepancy_B.tolist(), positive_B.tolist(), strict=True)
        total.updates += len({r["update"] for r in rows})


def _counts(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)


def temperatures(run: ReportedRun) -> tuple[float, float]:
    """Return tau_pos and tau_neg of the run's objective; the paper's where it has none."""
    from sapo.objectives import TAU_NEG, TAU_POS

    objective = run.settings["objective"]
    return float(objective.get("tau_pos", TAU_POS)), float(objective.get("tau_neg", TAU_NEG))


MISSING = (
    "Not measured: no off-policy update was logged. diagnostics.distributions_every=N or log.rollouts_every=N log "
    "them; a run of train.minibatches=1 has none."
)


def spread_figures(arms: Sequence[Arm], spreads: Sequence[Spread | None]) -> list[Figure]:
    """Make the three figures of all arms that measured their ratios."""
    own = [(arm, s) for arm, s in zip(arms, spreads, strict=True) if s is not None]
    found = [s for _, s in own]
    captions = {
        "ratios": "How the ratios r of off-policy tokens spread: share of tokens for each factor e of r, on two log "
        "axes; over it the gate weight (right axis).",
        "variance": "Var_i, the variance of log r over the tokens of a response: how far its tokens' ratios differ. "
        "Assumption A2 asks it to be small; in the paper most lie below 0.02.",
        "bound": "D_i, how far the mean token gate of a response is from one gate on its sequence ratio, against "
        "Var_i; the lines are the bound (τ²/4) Var_i of equation (21), which no point may exceed.",
    }
    titles = {
        "ratios": "Ratios under the gate",
        "variance": "Spread of ratios within a response",
        "bound": "Token gates against a sequence gate",
    }
    if not own:
        return [Figure(key, title, missing=MISSING) for key, title in titles.items()]
    beside = {"ratios": _beyond(found) + gate_words(own), "variance": _variance_beyond(own), "bound": _at_zero(found)}
    return [
        Figure(
            key, titles[key], f"{captions[key]} {source_of(found)}{beside[key]}", tuple(panels), wide=len(panels) > 1,
            columns=min(len(panels), 3),
        )
        for key, panels in zip(titles, spread_panels(own), strict=True)
    ]  # fmt: skip


def source_of(spreads: Sequence[Spread]) -> str:
    """Return a sentence on where the counts come from."""
    tokens, updates = sum(s.tokens for s in spreads), sum(s.updates for s in spreads)
    words = f"{tokens:,} tokens of {updates} off-policy updates that were logged"
    if any(s.from_rollouts for s in spreads):
        words += f", from rollouts/ where no distributions were logged (at most {MOST_FILES} steps of a run)"
    return words + "."


def notes_of(own: Own) -> str:
    """Return sentences on what the three figures do not show, and the key of the gates."""
    found = [s for _, s in own]
    return _beyond(found) + gate_words(own) + _variance_beyond(own) + _at_zero(found)


def _beyond(spreads: Sequence[Spread]) -> str:
    count = int(sum(c[0] + c[-1] for s in spreads for c in s.log_ratio.values()))
    return f" {count:,} {'token lies' if count == 1 else 'tokens lie'} beyond e^-10 .. e^10." if count else ""


def _variance_beyond(own: Own) -> str:
    """Return a sentence on the bins that hold what lies beyond the others, with its share."""
    words = ""
    for place, side, end in ((0, "below", 0), (-1, "above", -1)):
        shares = [(arm, float(s.variance[place] / s.variance.sum())) for arm, s in own if s.variance[place]]
        if shares:
            edge = format_rate(float(own[0][1].variance_edges[end]))
            several = len(own) > 1
            each = ", ".join(f"{arm.label} {share:.1%}" if several else f"{share:.1%}" for arm, share in shares)
            words += f" The {'first' if end == 0 else 'last'} bin holds all that lies {side} {edge}"
            words += f"{', 0 too' if end == 0 else ''}: {each}."
    return words


def _at_zero(spreads: Sequence[Spread]) -> str:
    count = sum(1 for s in spreads for v, d, _ in s.pairs if not (v > 0 and d > 0))
    return f" {count} sequences at 0, which a log axis cannot show." if count else ""


Own = Sequence[tuple[Arm, Spread]]


def spread_panels(own: Own) -> tuple[list[Panel], list[Panel], list[Panel]]:
    """Draw ratios, variances and scatter of some arms, each with its colour, on axes for each learning rate."""
    spreads = {id(arm): spread for arm, spread in own}
    ratios: list[Panel] = []
    variances: list[Panel] = []
    bounds: list[Panel] = []
    for rate, arms in by_rate([arm for arm, _ in own]):
        for panels, panel in zip(
            (ratios, variances, bounds), _panels([(a, spreads[id(a)]) for a in arms], rate), strict=True
        ):
            panels.append(panel)
    return ratios, variances, bounds


def _panels(own: Own, title: str) -> tuple[Panel, Panel, Panel]:
    single = len(own) == 1
    ratio_traces: list[Trace] = []
    variance_traces: list[Trace] = []
    points: list[Trace] = []
    for arm, spread in own:
        if single:
            sides = (("pos", "A > 0", 0), ("neg", "A ≤ 0", 1))
            ratio_traces += [_density(spread, (side,), words, c) for side, words, c in sides]
        else:
            ratio_traces.append(_density(spread, ("pos", "neg"), arm.name, arm.color))
        x, y = outline(*_used(*_variance_shares(spread)), to_zero=True)
        name, color = ("responses", 0) if single else (arm.name, arm.color)
        variance_traces.append(Trace("steps", x, y, name=name, color=color))
        points += _points(arm, spread, single)
    ratio_traces += _curves(own)
    mark = Mark("x", LOW_VARIANCE, f"{LOW_VARIANCE}")
    return (
        Panel(
            "r", "density (log)", tuple(ratio_traces), title, x_log=True, y_log=True, second="gate weight",
            marks=(Mark("x", 1.0, ""),),
        ),
        Panel(VARIANCE.label, "share of responses", tuple(variance_traces), title, x_log=True, marks=(mark,)),
        Panel(VARIANCE.label, "D_i", (*points, *_bounds(own)), title, x_log=True, y_log=True),
    )  # fmt: skip


def _density(spread: Spread, sides: tuple[str, ...], name: str, color: int) -> Trace:
    counts = sum((spread.log_ratio[s] for s in sides), start=np.zeros(len(spread.log_ratio_edges) + 1))
    density = counts[1:-1] / max(counts.sum(), 1) / np.diff(spread.log_ratio_edges)
    x, y = outline(np.exp(spread.log_ratio_edges).tolist(), density.tolist())
    return Trace("steps", x, y, name=name, color=color)


def _variance_shares(spread: Spread) -> tuple[np.ndarray, np.ndarray]:
    """Return edges and shares that sum to 1; what lies beyond the edges has a bin as wide as its neighbour."""
    edges = spread.variance_edges
    low, high = edges[0] ** 2 / edges[1], edges[-1] ** 2 / edges[-2]
    return np.concatenate([[low], edges, [high]]), spread.variance / spread.variance.sum()


def _used(edges: np.ndarray, values: np.ndarray) -> tuple[list[float], list[float]]:
    """Return the part from the first bin that is not empty to the last."""
    used = np.flatnonzero(values)
    first, last = (int(used[0]), int(used[-1])) if len(used) else (0, -1)
    return edges[first : last + 2].tolist(), values[first : last + 1].tolist()


@dataclass(frozen=True)
class _Gate:
    """A gate that one or several arms have, with f' for A > 0 and A <= 0 at ratios that tell it from others."""

    arms: tuple[Arm, ...]
    told_by: tuple[np.ndarray, np.ndarray]

    def weights(self, ratios: np.ndarray, sign: int) -> np.ndarray:
        """Return f' at some ratios."""
        objective = objective_of(self.arms[0].objective)
        assert objective is not None
        return gate_curve(objective, ratios, sign)[1]


_TELLING = np.linspace(0.05, 20.0, 400)
"""Ratios at which gates are compared, far beyond those of a figure: gates that differ only there are not the same."""


def _gates(arms: Sequence[Arm]) -> tuple[list[_Gate], dict[str, list[Arm]]]:
    """Return the different gates of some arms, and the arms without a gate by the reason."""
    found: list[_Gate] = []
    without: dict[str, list[Arm]] = {}
    for arm in arms:
        objective = objective_of(arm.objective)
        reason = (
            "of an objective of its user's own, which a report does not import"
            if objective is None and ":" in str(arm.objective.get("name"))
            else "of an objective that this version does not know" if objective is None
            else "which gates a sequence by all its tokens" if objective.coupled
            else "which gates by probability as well" if objective.needs_old_logprob
            else ""
        )  # fmt: skip
        if reason:
            without.setdefault(reason, []).append(arm)
            continue
        pos, neg = (gate_curve(objective, _TELLING, sign)[1] for sign in (1, -1))
        for place, gate in enumerate(found):
            if all(np.array_equal(a, b) for a, b in zip(gate.told_by, (pos, neg), strict=True)):
                found[place] = _Gate((*gate.arms, arm), gate.told_by)
                break
        else:
            found.append(_Gate((arm,), (pos, neg)))
    return found, without


GATE_NAMES: dict[int, tuple[str, Dash]] = {1: ("gate, A > 0", "dash"), -1: ("gate, A ≤ 0", "dot")}


def gate_words(own: Own) -> str:
    """Return the key of the gates: the meaning of dashes and dots, arms that share a gate, arms that have none."""
    arms = list({arm.name: arm for arm, _ in own}.values())
    gates, without = _gates(arms)
    words = ""
    if gates:
        words = (
            " Gates: dashed for A > 0, dotted for A ≤ 0" + (", in the colours of their arms" * (len(arms) > 1)) + "."
        )
    for gate in gates:
        if len(gate.arms) > 1:
            first = gate.arms[0].name
            words += f" {_listed(gate.arms)} have the same gate: it is drawn once, in the colour of {first}."
    for reason, lacking in without.items():
        words += f" No gate is drawn of {_listed(lacking)}, {reason}."
    return words


def _listed(arms: Sequence[Arm]) -> str:
    names = [arm.name for arm in arms]
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _curves(own: Own) -> list[Trace]:
    """Draw each gate once over the range of the ratios; only objectives that gate a token by its own ratio have one."""
    logs = [
        (edges[used[0]], edges[used[-1] + 1])
        for edges, used in ((s.log_ratio_edges, np.flatnonzero(c[1:-1])) for _, s in own for c in s.log_ratio.values())
        if len(used)  # none where every ratio is beyond the bins
    ]
    low, high = min((float(a) for a, _ in logs), default=0.0), max((float(b) for _, b in logs), default=0.0)
    ratios = np.exp(np.linspace(low, high, 400) if high > low else np.linspace(-0.05, 0.05, 400))
    gates, _ = _gates([arm for arm, _ in own])
    traces = []
    for gate in gates:
        for sign, (name, dash) in GATE_NAMES.items():
            color = (0 if sign > 0 else 1) if len(own) == 1 else gate.arms[0].color
            hover = f"weight of {', '.join(arm.label for arm in gate.arms)}"
            x, y = tuple(ratios.tolist()), tuple(gate.weights(ratios, sign).tolist())
            traces.append(Trace("line", x, y, name=name, color=color, dash=dash, second=True, hover=hover))
    return traces


def _points(arm: Arm, spread: Spread, single: bool) -> list[Trace]:
    shown = evenly([p for p in spread.pairs if p[0] > 0 and p[1] > 0], MOST_PAIRS)
    if not single:
        x, y = tuple(v for v, _, _ in shown), tuple(d for _, d, _ in shown)
        return [Trace("points", x, y, name=arm.name, color=arm.color)] if shown else []
    traces = []
    for positive, name, shade in ((True, "A > 0", 0), (False, "A ≤ 0", 1)):
        side = [p for p in shown if p[2] == positive]
        if side:
            traces.append(Trace("points", tuple(p[0] for p in side), tuple(p[1] for p in side), name=name, color=shade))
    return traces


def _bounds(own: Own) -> list[Trace]:
    """Draw a line for each temperature; of more than two the legend has one entry for all of them."""
    values = [v for _, s in own for v, d, _ in s.pairs if v > 0 and d > 0]
    if not values:
        return []
    taus = sorted({tau for arm, _ in own for tau in temperatures(arm.runs[0])})
    ends = (min(values), max(values))
    dashes: list[Dash] = ["solid", "dash"] if len(taus) <= 2 else ["dot"] * len(taus)
    together = f"bounds, τ {taus[0]:g} to {taus[-1]:g}" if len(taus) > 2 else ""
    return [
        Trace(
            "line", ends, tuple(tau**2 / 4 * v for v in ends), name=together or f"bound, τ {tau:g}", color=-1,
            dash=dash, hover=f"τ {tau:g}" if together else "",
        )
        for tau, dash in zip(taus, dashes, strict=False)
    ]  # fmt: skip
