"""The objective of a recipe, its KL penalty and its correction for a sampler that is not the policy."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, model_validator

from sapo.config.section import CheckedNumbers, Section, check_size
from sapo.objectives import NORMALIZERS, TIS, KLPenalty, Objective, find_objective, is_plugin, make_objective
from sapo.utils.names import nearest


class KLConfig(Section):
    """A KL penalty towards a reference policy; the paper has none."""

    coefficient: float = Field(gt=0)
    """Factor of the estimated KL in the loss. The KL of a token has the same weight as its policy term."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL divergence from sampled tokens; k3 is GRPO's. objectives/kl.py has the formulas."""
    reference: str | None = None
    """Reference model, a directory or a name on the Hub. null: the model that the run starts from, which is the model
    without its adapter under LoRA and a frozen copy otherwise."""

    @property
    def penalty(self) -> KLPenalty:
        """Return the penalty, as the trainer takes it."""
        return KLPenalty(coefficient=self.coefficient, estimator=self.estimator)


class TISConfig(Section):
    """Truncated importance sampling: a weight w = pi_old / mu on the loss of each token, for the mismatch between the
    sampler mu and the trainer. The gate's ratio does not contain it. It needs log pi_old from the trainer, where
    train.old_logprobs=auto then takes it."""

    mode: Literal["token", "sequence", "sequence_mean", "icepop", "sequence_mask"] = "token"
    """Weight of a token. token: min(w, cap). sequence: min(prod w, cap) for every token of a response. sequence_mean:
    the same with the geometric mean of w, for long responses and episodes, where a product leaves next to no loss.
    icepop: w within floor..cap, else 0. sequence_mask: prod w, or 0 where it exceeds cap. objectives/mismatch.py has
    the sources."""
    cap: float | None = None
    """Largest weight. null: 2 for token, sequence and sequence_mean, 5 for icepop, 3 for sequence_mask."""
    floor: float | None = None
    """Smallest weight of icepop; 0.5 when null."""

    @property
    def weights(self) -> TIS:
        """Return the correction, as the trainer takes it."""
        return TIS(mode=self.mode, cap=self.cap, floor=self.floor)

    @model_validator(mode="after")
    def _in_range(self) -> TISConfig:
        _ = self.weights
        return self


class NamedObjective(CheckedNumbers):
    """An objective by its name. Hyperparameters beside the keys below are the objective's own, checked by it."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    name: str
    """One of sapo.objectives.OBJECTIVES, or an objective of your own as module:Class."""

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Return the objective's own settings, as `make_objective` takes them."""
        return dict(self.model_extra or {})

    def make(self) -> Objective:
        """Make the objective with its hyperparameters.

        Raises:
            ValueError: an unknown name or hyperparameter, or a value out of its range.
        """
        for key, value in self.hyperparameters.items():
            check_size(key, value)
            if isinstance(value, bool) and _is_number(self.name, key):
                raise ValueError(f"{key} must be a number; got {str(value).lower()}; write 1 or 0")
        made = make_objective(self.name, **self.hyperparameters)
        if hidden := sorted({f.name for f in fields(made)} & set(type(self).model_fields)):
            raise ValueError(
                f"hyperparameters of {self.name} must not be called {', '.join(type(self).model_fields)}, which are "
                f"keys of the recipe; got {', '.join(hidden)}; rename it"
            )
        return made


def _is_number(objective: str, key: str) -> bool:
    """Tell whether a hyperparameter of an objective is declared as a number."""
    found = known_objective(objective)
    kinds = {f.name: str(f.type) for f in fields(found)} if found is not None else {}
    kind = kinds.get(key, "")
    return "bool" not in kind and ("int" in kind or "float" in kind)


class ObjectiveConfig(NamedObjective):
    """The objective that is maximised. Hyperparameters beside these are the objective's own, checked by it."""

    name: str = "sapo"
    """One of sapo.objectives.OBJECTIVES, or an objective of your own as module:Class. Such a class derives from
    sapo.objectives.TokenObjective or SequenceObjective. It must obey the conformance laws before a run begins."""
    normalizer: str = "sequence_mean"
    """Weight of a token in the loss: sequence_mean (the paper), token_mean (DAPO), constant_length (Dr.GRPO) or
    sequence_sum (MiniRL). Left out, that of the objective's source."""
    advantage: Literal["group_std", "group_mean", "leave_one_out"] = "group_std"
    """Advantage of a completion. group_std: (R - mean) / std over the group. group_mean: R - mean. leave_one_out:
    R - mean of the others. Left out, that of the objective's source."""

    kl: KLConfig | None = None
    """KL penalty towards a reference policy; null for none."""
    tis: TISConfig | None = None
    """Truncated importance sampling, a correction for the mismatch between sampler and trainer; null for none."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_its_source(cls, raw: Any, info: ValidationInfo) -> Any:
        """Take normalizer and advantage from the objective where they are left out: `name: dapo` alone is DAPO."""
        name = str(raw.get("name", "sapo")) if isinstance(raw, dict) else ""
        if not name or {"normalizer", "advantage"} <= raw.keys() or left_alone(name, info):
            return raw
        source = known_objective(name)
        return raw if source is None else {"normalizer": source.normalizer, "advantage": source.advantage, **raw}

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> ObjectiveConfig:
        if not left_alone(self.name, info):
            self.make()
        if self.normalizer not in NORMALIZERS:
            raise ValueError(f"unknown normalizer {self.normalizer!r}{nearest(self.normalizer, NORMALIZERS)}")
        return self


def left_alone(name: str, info: ValidationInfo) -> bool:
    """Tell whether an objective is a user's own in the recipe that a run recorded.

    It was checked when the run began. To read a run, perhaps a stranger's, no module of its recipe is imported; to
    resume it, the recipe is checked again as one that is to be run.
    """
    return is_plugin(name) and bool(info.context and info.context.get("recorded"))


def known_objective(name: str) -> type[Objective] | None:
    """Return the class of an objective, or None where there is none of that name."""
    try:
        return find_objective(name)
    except ValueError:
        return None
