"""Early warning: rules that find a run going wrong in the figures it logs. docs/metrics.md has them in full.

Pure functions over the lines of metrics.jsonl: what a run was warned of while it went on can be found again from its
file, under other thresholds too (`replay_warnings`). What the rules remember of the lines before is a `Health`, which
belongs to the run's state.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sapo.config.diagnostics import WarningsConfig

Record = Mapping[str, Any]

OF_UPDATES = ("ratio_tail", "gradient_spike")
"""Causes found in a single update."""

OF_THE_LOOP = ("unequal_old_logprobs", "engine_mismatch", "unfilled_groups", "verifier_failed", "environment_failed")
"""Causes that the loop warns of itself. They follow no rule of this file, and their lines have no figures."""

OF_THE_SET_UP = ("reward_status", "unfaithful_old_logprobs", "long_trajectories", *OF_THE_LOOP)
"""Causes that lie in the verifier, the sampler or the recipe and not in the policy: they foretell no collapse, and a
checkpoint made under them is healthy."""


@dataclass(frozen=True)
class Warning:
    """A cause that was found.

    >>> Warning(5, "zero_variance_flood", 0.88, 0.7, "0.88 of the groups have no right completion").line
    'step 5: zero_variance_flood: 0.88 of the groups have no right completion'
    """

    step: int
    cause: str
    value: float | None
    """The figure that broke the rule; None of non_finite, which is no figure."""
    threshold: float | None
    """What the rule allows; likewise."""
    text: str
    collapse: bool = False
    """It counts as a collapse: it is one of `collapse_causes`, and the run has once been without it; or non_finite."""

    @property
    def line(self) -> str:
        """Return a line for a person to read."""
        return f"step {self.step}: {self.cause}: {self.text}"

    def to_json(self) -> dict[str, Any]:
        """Return the warning as metrics.jsonl has it."""
        return {
            "kind": "warning",
            "step": self.step,
            "cause": self.cause,
            **({} if self.value is None else {"value": self.value}),
            **({} if self.threshold is None else {"threshold": self.threshold}),
            "collapse": self.collapse,
            "text": self.line,
        }


@dataclass(frozen=True)
class Health:
    """What the rules remember between two lines of metrics.jsonl.

    >>> Health(held={"ratio_tail": 1}).healthy, Health(held={"reward_status": 3}).healthy
    (False, True)
    """

    reference: dict[str, list[float]] = field(default_factory=dict)
    """Entropy, length and reward of the first steps that had them."""
    held: dict[str, int] = field(default_factory=dict)
    """Cause -> steps on end for which it has held by now; an update's cause holds for the step it is in."""
    raised: tuple[str, ...] = ()
    """Causes that were warned of and still hold: they are not repeated."""
    clear: tuple[str, ...] = ()
    """Causes that the run has once been measured to be without."""
    bad_updates: tuple[str, ...] = ()
    """Causes found in the present step's updates so far."""
    rewards: tuple[float, ...] = ()
    """Mean rewards of the last steps."""
    best_reward: float | None = None
    """Best mean of `reward_steps` steps so far, or that of the first `reference_steps`; and its standard error."""
    best_error: float = 0.0
    gradient_norms: tuple[float, ...] = ()
    """Of the last updates."""

    @property
    def healthy(self) -> bool:
        """Return whether no rule about the policy is broken now, be it for too short a time to be warned of."""
        return not any(cause not in OF_THE_SET_UP for cause in (*self.held, *self.bad_updates))

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Health:
        """Read what dataclasses.asdict wrote, also after a trip through text."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**values)


@dataclass(frozen=True)
class Finding:
    """A rule held against a line: what was measured, what is allowed, and in words."""

    cause: str
    bad: bool
    value: float
    threshold: float
    text: str = ""


def observe(health: Health, record: Record, settings: WarningsConfig) -> tuple[Health, tuple[Warning, ...]]:
    """Hold the rules against the next line.

    Args:
        health: after the lines before.
        record: a line of metrics.jsonl; kinds other than update and step say nothing.

    Returns:
        The health after it, and what is to be warned of now. A cause is warned of once until it has passed;
        unfaithful_old_logprobs at every step.
    """
    if record["kind"] == "update" and not record.get("skipped", False):
        return _observe_update(health, record, settings)
    if record["kind"] == "step":
        return _observe_step(health, record, settings)
    return health, ()


def replay_warnings(records: Iterable[Record], settings: WarningsConfig | None = None) -> list[Warning]:
    """Return all that a run would be warned of, from the lines of its metrics.jsonl.

    A run that was rolled back keeps what it took back in rolled-back/; its metrics.jsonl has the warning of it, as a
    line of kind "warning".

    Args:
        records: in their order.
        settings: the thresholds; the defaults when None.
    """
    settings = settings or WarningsConfig()
    health = Health()
    found: list[Warning] = []
    for record in records:
        health, warnings = observe(health, record, settings)
        found += warnings
    return found


def _observe_update(health: Health, record: Record, settings: WarningsConfig) -> tuple[Health, tuple[Warning, ...]]:
    findings = update_findings(health, record, settings)
    bad = [f for f in findings if f.bad]
    new = [f for f in bad if f.cause not in health.raised]
    norm = record.get("grad_norm")
    norms = health.gradient_norms if norm is None else (*health.gradient_norms, norm)[-settings.gradient_updates :]
    lasting = [f.cause for f in bad if f.cause in OF_UPDATES]
    health = replace(
        health,
        clear=_union(health.clear, [f.cause for f in findings if not f.bad]),
        raised=_union(health.raised, lasting),
        bad_updates=_union(health.bad_updates, lasting),
        gradient_norms=norms,
    )
    return health, tuple(_warning(record["step"], f, health, settings) for f in new)


def _observe_step(health: Health, record: Record, settings: WarningsConfig) -> tuple[Health, tuple[Warning, ...]]:
    health = _remember(health, record, settings)
    findings = step_findings(health, record, settings)
    measured = {f.cause for f in findings}
    held = {c: n for c, n in health.held.items() if c not in measured and c not in OF_UPDATES}
    held |= {c: health.held.get(c, 0) + 1 for c in health.bad_updates}
    held |= {f.cause: health.held.get(f.cause, 0) + 1 for f in findings if f.bad}
    due = [f for f in findings if f.bad and held[f.cause] >= settings.patience and f.cause not in health.raised]
    health = replace(
        health,
        held=held,
        raised=_union([c for c in health.raised if c in held], [f.cause for f in due]),
        clear=_union(health.clear, [f.cause for f in findings if not f.bad]),
        bad_updates=(),
    )
    return health, tuple(_warning(record["step"], f, health, settings) for f in due)


def _remember(health: Health, record: Record, settings: WarningsConfig) -> Health:
    """Take a step's figures into the references and the run of rewards."""
    reference = dict(health.reference)
    for name in ("update/entropy", "length/mean", "reward/mean"):
        known = reference.get(name, [])
        if name in record and len(known) < settings.reference_steps:
            reference[name] = [*known, record[name]]
    measured = (record["reward/mean"],) if "reward/mean" in record else ()  # not where every completion failed
    rewards = (*health.rewards, *measured)[-settings.reward_steps :]
    best, error = health.best_reward, health.best_error
    start = reference.get("reward/mean", [])
    if best is None and len(start) >= settings.reference_steps:  # a run may fall before it has a mean of so many steps
        best, error = statistics.fmean(start), _standard_error(start)
    if len(rewards) == settings.reward_steps and (best is None or statistics.fmean(rewards) > best):
        best, error = statistics.fmean(rewards), _standard_error(rewards)
    return replace(health, reference=reference, rewards=rewards, best_reward=best, best_error=error)


def update_findings(health: Health, record: Record, settings: WarningsConfig) -> list[Finding]:
    """Apply the rules about one update; a rule whose figures are missing is left out."""
    findings = []
    if "ratio/p99" in record:
        factor = max(record["ratio/p99"], 1 / max(record["ratio/p01"], 1e-300))
        text = f"one token in a hundred of an update has a ratio {factor:.3g} times above or below 1"
        text += f" (limit {settings.ratio_tail:g})"
        findings.append(Finding("ratio_tail", factor > settings.ratio_tail, factor, settings.ratio_tail, text))
    if "grad_norm" in record and len(health.gradient_norms) >= settings.gradient_updates // 5:
        limit = settings.gradient_spike * statistics.median(health.gradient_norms)
        norm = record["grad_norm"]
        text = f"gradient norm {norm:.3g} is above {limit:.3g}, {settings.gradient_spike:g} times the recent median"
        findings.append(Finding("gradient_spike", norm > limit, norm, limit, text))
    if "ratio/abs_dev" in record and record.get("on_policy", record["update"] == 0):
        moved, limit = record["ratio/abs_dev"], settings.unfaithful
        text = f"mean |r - 1| of the first update is {moved:.3g} (above {limit:g})"
        text += ": log pi_old is not that of the policy that sampled"
        findings.append(Finding("unfaithful_old_logprobs", moved > limit, moved, limit, text))
    return findings


def step_findings(health: Health, record: Record, settings: WarningsConfig) -> list[Finding]:
    """Apply the rules about a step; a rule whose figures or reference are missing is left out."""
    return [
        *_entropy_findings(health, record, settings),
        *_batch_findings(health, record, settings),
        *_reward_findings(health, settings),
        *_status_findings(record, settings),
        *_correction_findings(record, settings),
    ]


def _entropy_findings(health: Health, record: Record, settings: WarningsConfig) -> list[Finding]:
    reference = _reference(health, "update/entropy", settings)
    if reference is None or not {"update/entropy", "reward/mean"} <= record.keys():
        return []
    entropy, low, high = record["update/entropy"], settings.entropy_low * reference, settings.entropy_high * reference
    solved = record["reward/mean"] >= settings.entropy_solved
    of = f"nats, from {reference:.3g} at the start"
    return [
        Finding(
            "entropy_collapse",
            entropy < low and not solved,
            entropy,
            low,
            f"entropy is {entropy:.3g} {of} (below {low:.3g}) at mean reward {record['reward/mean']:.3g}",
        ),
        Finding(
            "entropy_explosion", entropy > high, entropy, high, f"entropy is {entropy:.3g} {of} (above {high:.3g})"
        ),
    ]


def _batch_findings(health: Health, record: Record, settings: WarningsConfig) -> list[Finding]:
    findings = []
    if "groups/none_right" in record:
        share, most = record["groups/none_right"], settings.zero_variance
        text = f"{share:.0%} of the groups have equal rewards and no right completion (above {most:.0%})"
        findings.append(Finding("zero_variance_flood", share > most, share, most, text))
    length, reward = _reference(health, "length/mean", settings), _reference(health, "reward/mean", settings)
    if length is not None and reward is not None and "reward/mean" in record:
        low = settings.length_low * length
        short = record["length/mean"] < low and record["reward/mean"] <= reward
        text = f"mean length is {record['length/mean']:.3g} tokens, from {length:.3g} at the start"
        text += ", and the reward is no better"
        findings.append(Finding("length_collapse", short, record["length/mean"], low, text))
    return findings


def _reward_findings(health: Health, settings: WarningsConfig) -> list[Finding]:
    """Find a reward fallen by more than the steps' spread explains: few completions make a noisy mean."""
    if health.best_reward is None or health.best_reward <= 0 or len(health.rewards) < settings.reward_steps:
        return []
    now, best = statistics.fmean(health.rewards), health.best_reward
    doubt = 3 * math.hypot(_standard_error(health.rewards), health.best_error)
    low = settings.reward_low * best
    text = f"mean reward of {settings.reward_steps} steps is {now:.3g}; the best so far was {best:.3g}"
    return [Finding("reward_collapse", now < low and best - now > doubt, now, low, text)]


def _status_findings(record: Record, settings: WarningsConfig) -> list[Finding]:
    counts = {k.removeprefix("status/"): v for k, v in record.items() if k.startswith("status/")}
    total = sum(counts.values())
    if not total:
        return []
    broken = counts.get("verifier_error", 0) / total
    unread = (counts.get("unparseable", 0) + counts.get("truncated", 0)) / total
    limit = settings.verifier_errors
    if broken > limit:
        return [
            Finding("reward_status", True, broken, limit, f"the verifier failed on {broken:.0%} of the completions")
        ]
    most = settings.unparseable
    text = f"{unread:.0%} of the completions were unparseable or truncated (above {most:.0%})"
    return [Finding("reward_status", unread > most, unread, most, text)]


def _correction_findings(record: Record, settings: WarningsConfig) -> list[Finding]:
    """Find a correction for the sampler that multiplies over too many tokens."""
    if record.get("tis") not in ("sequence", "sequence_mask") or "length/mean" not in record:
        return []
    length, most = record["length/mean"], settings.long_trajectories
    text = (
        f"objective.tis.mode={record['tis']} multiplies pi_old / mu over {length:.0f} tokens on average (above {most})"
    )
    text += ": small differences add up, and next to no loss may be left; use sequence_mean, or token"
    return [Finding("long_trajectories", length > most, length, most, text)]


def _reference(health: Health, name: str, settings: WarningsConfig) -> float | None:
    """Return the mean of the first steps; None before they are complete."""
    known = health.reference.get(name, [])
    return statistics.fmean(known) if len(known) >= settings.reference_steps else None


def _standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of independent values; 0 for a single one."""
    if len(values) < 2:
        return 0.0
    mean = statistics.fmean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def _union(known: Iterable[str], more: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*known, *more]))


def _warning(step: int, finding: Finding, health: Health, settings: WarningsConfig) -> Warning:
    cause = finding.cause
    collapse = cause in settings.collapse_causes and cause in health.clear
    return Warning(step, cause, finding.value, finding.threshold, finding.text, collapse)
