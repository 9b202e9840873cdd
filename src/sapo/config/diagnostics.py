"""What a run measures beside its loss, and what it does when the measurements turn bad.

None of these settings changes a healthy run.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, model_validator

from sapo.config.objective import NamedObjective, left_alone
from sapo.config.section import Section
from sapo.objectives import LONG_TRAJECTORY, TAU_NEG, is_plugin


class CounterfactualConfig(NamedObjective):
    """An objective whose gate is evaluated on the batch of another. Further settings are its own, checked by it."""

    label: str | None = None
    """Name in metrics, as in counterfactual/LABEL/eur; the objective's name when null."""

    @property
    def key(self) -> str:
        """Return the label in force."""
        return self.name if self.label is None else self.label

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> CounterfactualConfig:
        if not left_alone(self.name, info):
            made = self.make()
            if is_plugin(self.name) and self.label is None:
                self.label = made.name
        if not self.key or "/" in self.key:
            raise ValueError(f"a label must be a word without /, for it is part of a figure's name; got {self.key!r}")
        return self


def default_counterfactuals() -> list[CounterfactualConfig]:
    """Return the paper's three objectives, SAPO at other temperatures and SAPO on the side of drift alone.

    The other temperatures have the paper's ratio, tau_neg = TAU_NEG tau_pos.
    """
    settings: list[dict[str, Any]] = [
        {"name": "sapo"},
        {"name": "grpo"},
        {"name": "gspo"},
        *({"name": "sapo", "label": f"sapo_tau_{t}", "tau_pos": t, "tau_neg": TAU_NEG * t} for t in (0.5, 2.0, 10.0)),
        {"name": "sapo", "label": "sapo_one_sided", "side": "drift"},
    ]
    return [CounterfactualConfig(**s) for s in settings]


class DiagnosticsConfig(Section):
    """Diagnostics that are too costly to measure at every update. Those of every update need no setting."""

    distributions_every: int = Field(10, ge=0)
    """Steps between lines of kind "distribution" in metrics.jsonl: histograms and a scatter for the report. The
    first step has them too. 0 writes none."""
    counterfactuals_every: int = Field(10, ge=0)
    """Steps between measurements of the counterfactual gates. The first step has them too. 0 measures none."""
    counterfactuals: list[CounterfactualConfig] = Field(default_factory=default_counterfactuals)
    """Objectives whose gate weights are computed for each token of the same batch; [] computes none."""
    true_gradient_every: int = Field(0, ge=0)
    """Steps between comparisons of the parameter gradients of the counterfactual objectives. Each costs one more
    backward pass. 0 compares none."""

    @model_validator(mode="after")
    def _labels_differ(self) -> DiagnosticsConfig:
        keys = [c.key for c in self.counterfactuals]
        if twice := sorted({k for k in keys if keys.count(k) > 1}):
            raise ValueError(f"counterfactuals must differ in their label; got {twice[0]!r} twice; give one a label")
        return self


class WarningsConfig(Section):
    """Early warnings: the thresholds of each rule, and the response to a collapse.

    A rule that compares with the start of the run takes the mean of the first `reference_steps` steps. Rules of a step
    must hold for `patience` consecutive steps. docs/metrics.md has the rules in full, research/log.md what the defaults
    were held against.
    """

    on_collapse: Literal["warn", "stop", "rollback"] = "warn"
    """Response to a collapse. warn: report it and go on. stop: end the run at its last healthy checkpoint. rollback:
    go on from that checkpoint with the learning rate times `rollback_learning_rate`, and from an earlier one if that
    collapses too. A non-finite loss is a collapse as well; under warn it ends the run."""
    collapse_causes: list[
        Literal[
            "entropy_collapse",
            "entropy_explosion",
            "ratio_tail",
            "zero_variance_flood",
            "length_collapse",
            "reward_collapse",
            "gradient_spike",
        ]
    ] = Field(["entropy_collapse", "entropy_explosion", "zero_variance_flood", "length_collapse", "reward_collapse"])
    """Causes that count as a collapse. A heavy tail or a gradient spike may precede one, and may pass."""
    rollback_learning_rate: float = Field(0.5, gt=0, le=1)
    """Factor applied to the learning rate at each rollback, on top of the schedule and of earlier rollbacks."""
    max_rollbacks: int = Field(3, ge=1)
    """Number of rollbacks; the next collapse after them stops the run."""
    reference_steps: int = Field(5, ge=1)
    """Number of first steps whose mean is the reference for entropy and length."""
    patience: int = Field(3, ge=1)
    """Number of consecutive steps for which a rule of a step must hold."""
    entropy_low: float = Field(0.1, ge=0, lt=1)
    """entropy_collapse: entropy below this share of the reference."""
    entropy_solved: float = 0.8
    """entropy_collapse: the rule is off at a mean reward from here on, where low entropy is expected."""
    entropy_high: float = Field(3.0, gt=1)
    """entropy_explosion: entropy above this multiple of the reference."""
    ratio_tail: float = Field(20.0, gt=1)
    """ratio_tail: more than one token in a hundred of an update beyond this factor, up or down."""
    zero_variance: float = Field(0.7, gt=0, le=1)
    """zero_variance_flood: share of zero-variance groups in which no completion is right. Groups that are all right
    do not count."""
    length_low: float = Field(0.5, gt=0, lt=1)
    """length_collapse: mean length below this share of the reference, at a reward no better than the reference's."""
    reward_low: float = Field(0.5, gt=0, lt=1)
    """reward_collapse: mean reward of `reward_steps` steps below this share of the best such mean so far, or of the
    reference."""
    reward_steps: int = Field(10, ge=1)
    """Number of steps that `reward_low` averages over."""
    unparseable: float = Field(0.5, gt=0, le=1)
    """reward_status: share of a step's completions that were unparseable, or truncated where that gives no answer."""
    verifier_errors: float = Field(0.05, gt=0, le=1)
    """reward_status: share of a step's completions on which the verifier failed."""
    long_trajectories: int = Field(LONG_TRAJECTORY, ge=1)
    """long_trajectories: tokens of the mean completion, all turns of an episode counted, above which a correction by a
    product over them (objective.tis.mode sequence or sequence_mask) is warned of."""
    gradient_spike: float = Field(10.0, gt=1)
    """gradient_spike: gradient norm of an update above this multiple of the median of the last `gradient_updates`."""
    gradient_updates: int = Field(50, ge=5)
    """Number of last updates whose median gradient norm `gradient_spike` compares with. The rule is off before a
    fifth of them are known."""
    unfaithful: float = Field(0.01, gt=0)
    """unfaithful_old_logprobs: mean |r - 1| of a step's first update. On policy it is 0; from .011 on, prototype
    runs saw hard clips follow the difference."""
