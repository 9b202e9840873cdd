"""The objective of a recipe, its KL penalty and its correction for a sampler that is not the policy."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sapo.config.section import Section
from sapo.objectives import NORMALIZERS, OBJECTIVES, TIS, KLPenalty, make_objective
from sapo.utils.names import nearest


class KLConfig(Section):
    """A penalty for leaving a reference policy; the paper has none."""

    coefficient: float = Field(gt=0)
    """How much of the estimate is added to the loss, with the normaliser of the policy term."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """See objectives/kl.py; k3 is GRPO's."""
    reference: str | None = None
    """Model to stay close to; null is the one the run starts from: with LoRA the adapter switched off, else a frozen
    copy."""

    @property
    def penalty(self) -> KLPenalty:
        """What the trainer takes."""
        return KLPenalty(coefficient=self.coefficient, estimator=self.estimator)


class TISConfig(Section):
    """A weight on each token for a sampler that is not the policy: w = pi_old / mu, apart from the gate's ratio. It
    needs log pi_old from the trainer, and train.old_logprobs=auto takes it from there."""

    mode: Literal["token", "sequence", "icepop", "sequence_mask"] = "token"
    """token: min(w, cap). sequence: min(prod w, cap) for every token of a response. icepop: w within floor..cap, else
    0. sequence_mask: prod w, or 0 where it exceeds cap. See objectives/mismatch.py."""
    cap: float | None = None
    """Largest weight; null is 2 for token and sequence, 5 for icepop, 3 for sequence_mask."""
    floor: float | None = None
    """Smallest weight of icepop; 0.5 when null."""

    @property
    def weights(self) -> TIS:
        """What the trainer takes."""
        return TIS(mode=self.mode, cap=self.cap, floor=self.floor)

    @model_validator(mode="after")
    def _in_range(self) -> TISConfig:
        _ = self.weights
        return self


class ObjectiveConfig(BaseModel):
    """What is maximised. Hyperparameters beside these are the objective's own, checked by it."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    name: str = "sapo"
    """One of sapo.objectives.OBJECTIVES."""
    normalizer: str = "sequence_mean"
    """sequence_mean (the paper), token_mean (DAPO), constant_length (Dr.GRPO), sequence_sum (MiniRL); left out, that of
    the objective's source."""
    advantage: Literal["group_std", "group_mean", "leave_one_out"] = "group_std"
    """(R - mean) / std over the group, R - mean, or R - mean of the others; left out, that of the source as well."""

    kl: KLConfig | None = None
    """Penalty for leaving a reference policy; null for none."""
    tis: TISConfig | None = None
    """Correction for a sampler that is not the policy (truncated importance sampling); null for none."""

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The objective's own settings, as `make_objective` takes them."""
        return dict(self.model_extra or {})

    @model_validator(mode="before")
    @classmethod
    def _as_its_source_has_it(cls, raw: Any) -> Any:
        """`name: dapo` alone is DAPO, its normalizer too; what is written down stands."""
        source = OBJECTIVES.get(str(raw.get("name", "sapo"))) if isinstance(raw, dict) else None
        return raw if source is None else {"normalizer": source.normalizer, "advantage": source.advantage, **raw}

    @model_validator(mode="after")
    def _known(self) -> ObjectiveConfig:
        make_objective(self.name, **self.hyperparameters)
        if self.normalizer not in NORMALIZERS:
            raise ValueError(f"unknown normalizer {self.normalizer!r}{nearest(self.normalizer, NORMALIZERS)}")
        return self
