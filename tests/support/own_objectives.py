"""Objectives as a user would write them, `support.own_objectives:Plateau`: a right one, and others with one fault."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sapo.objectives import Factors, Ratios, SequenceObjective, Surrogate, TokenObjective, Tokens
from sapo.objectives.surrogates import make_surrogate


@dataclass(frozen=True, kw_only=True)
class Plateau(TokenObjective):
    """A gate that is open within `width` of r = 1 and falls as 1 / |r - 1| beyond: f'(r) = min(1, width / |r - 1|)."""

    name: ClassVar[str] = "plateau"
    normalizer: ClassVar[str] = "token_mean"
    advantage: ClassVar[str] = "group_mean"

    width: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.width < 1:
            raise ValueError(f"width must lie in (0, 1); got {self.width}; 0.2 is a clip's")

    def factors(self, at: Ratios) -> Factors:
        away = at.ratio - 1
        far = away.abs() > self.width
        beyond = self.width * (1 + torch.where(far, away.abs() / self.width, 1.0).log())
        value = 1 + torch.where(far, away.sign() * beyond, away)
        weight = torch.where(far, self.width / away.abs(), torch.ones_like(away))
        return value, weight * at.ratio, weight


@dataclass(frozen=True, kw_only=True)
class WrongSlope(Plateau):
    """The slope leaves out the factor r."""

    name: ClassVar[str] = "wrong_slope"

    def factors(self, at: Ratios) -> Factors:
        value, _, weight = super().factors(at)
        return value, weight, weight


@dataclass(frozen=True, kw_only=True)
class HalfOpen(Plateau):
    """Weight 1/2 on policy: a matter of design."""

    name: ClassVar[str] = "half_open"

    def factors(self, at: Ratios) -> Factors:
        return tuple(x / 2 for x in super().factors(at))  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class StoppedGradient(Plateau):
    """The published form -sg(w) A log pi: the right slope, by autograd too, and another value."""

    name: ClassVar[str] = "stopped_gradient"

    def factors(self, at: Ratios) -> Factors:
        _, slope, weight = super().factors(at)
        return slope.detach() * at.log_ratio, slope, weight


@dataclass(frozen=True, kw_only=True)
class HiddenMean(Plateau):
    """The gate reads the mean ratio of the batch and does not say so."""

    name: ClassVar[str] = "hidden_mean"

    def factors(self, at: Ratios) -> Factors:
        value, slope, weight = super().factors(at)
        scale = at.ratio.detach().mean().clamp(0.5, 2)
        return value * scale, slope * scale, weight * scale


@dataclass(frozen=True, kw_only=True)
class OneNumber(Plateau):
    """A surrogate of another shape than the tokens."""

    name: ClassVar[str] = "one_number"

    def evaluate(self, tokens: Tokens) -> Surrogate:
        at = Ratios.of(tokens.log_ratio_M, tokens.advantages_M)
        value, slope, weight = (x * at.advantages for x in self.factors(at))
        return make_surrogate(value, slope.sum(), weight, at.inside.all(), tokens.dtype)


@dataclass(frozen=True, kw_only=True)
class WholeRatio(SequenceObjective):
    """A right objective of sequences, without hyperparameters: the mean ratio, ungated."""

    name: ClassVar[str] = "whole_ratio"

    def factors(self, at: Ratios) -> Factors:
        return at.ratio, at.ratio, torch.ones_like(at.ratio)


@dataclass(frozen=True, kw_only=True)
class NameOfAnother(Plateau):
    """It has the name of an objective of ours."""

    name: ClassVar[str] = "sapo"


@dataclass(frozen=True, kw_only=True)
class NoName(Plateau):
    """It has no name of its own, but that of the class it derives from."""


class NoDataclass(Plateau):
    """Its hyperparameter would not be one."""

    name: ClassVar[str] = "no_dataclass"
    height: float = 1.0


@dataclass(frozen=True, kw_only=True)
class NoFactors(TokenObjective):
    """It leaves out its gate."""

    name: ClassVar[str] = "no_factors"


@dataclass(frozen=True, kw_only=True)
class WrongNormalizer(Plateau):
    """Its normalizer is none of NORMALIZERS."""

    name: ClassVar[str] = "wrong_normalizer"
    normalizer: ClassVar[str] = "token_meen"


@dataclass(frozen=True, kw_only=True)
class NameAsField(Plateau):
    """Its name would be a hyperparameter."""

    name: str = "name_as_field"  # type: ignore[misc]


@dataclass(frozen=True, kw_only=True)
class HiddenByTheRecipe(Plateau):
    """Its hyperparameter has the name of a key of the recipe."""

    name: ClassVar[str] = "hidden_by_the_recipe"
    kl: float = 0.1


def not_a_class() -> None:
    """Not an objective."""
