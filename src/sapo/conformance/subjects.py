"""Subjects of the laws: a loss with the objective, settings and normalizer that it claims to have."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sapo.conformance.cases import Batch, Case
from sapo.errors import ConfigError
from sapo.objectives import NORMALIZERS, OBJECTIVES, Objective, make_objective, policy_loss
from sapo.utils.plugins import import_named

MAX_LENGTH = 16
"""Length of the longest response, for `constant_length`."""


@dataclass(frozen=True)
class Whole:
    """The mini-batch that a micro-batch is part of.

    Three responses of 2, 1 and 1 tokens, each a micro-batch of its own: Whole(3, 4, 3).
    """

    num_sequences: int
    num_tokens: int
    num_microbatches: int


Loss = Callable[[Batch, Whole], Tensor]
"""Returns a scalar to minimise: the part of a micro-batch, which may be all of it, in the loss of the mini-batch."""


@dataclass(frozen=True)
class Subject:
    """A loss, and the objective that it claims to be.

    >>> own_subjects(["grpo"])[0].name
    'grpo'
    """

    name: str
    objective: Objective
    """With the settings of the loss."""
    normalizer: str
    """A name in NORMALIZERS."""
    loss: Loss
    remake: Callable[[dict[str, Any]], Loss] | None = None
    """Makes the loss with other hyperparameters, and raises where the loss refuses them. None when none can be set."""
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)
    """Dtypes that it can compute in, the most precise first."""
    rtol: float = 1e-6
    """Relative tolerance of a gradient."""
    unsplittable: str = ""
    """Reason why it has no part of a mini-batch; empty where it has."""
    call: str = ""
    """Call of the loss, for the report."""


@dataclass(frozen=True)
class LossOutcome:
    """A loss and its gradient in log pi, or the error that was raised.

    LossOutcome(-1.0, tensor([[-1.0]]), "") on policy with A = 1; where an error was raised,
    LossOutcome(nan, tensor([[nan]]), "RuntimeError: ...").
    """

    loss: float
    gradient_BT: Tensor
    error: str = ""


def measure(subject: Subject, case: Case, dtype: torch.dtype | None = None, whole: Whole | None = None) -> LossOutcome:
    """Compute loss and gradient of a subject on a case.

    Args:
        dtype: the subject's most precise one when left out.
        whole: the mini-batch that the case is a part of; the case alone when left out.
    """
    batch = case.tensors(dtype or subject.dtypes[0])
    whole = whole or Whole(len(case.responses), case.num_tokens, 1)
    try:
        loss = subject.loss(batch, whole)
        gradient_BT = torch.zeros_like(batch.logp_BT)
        if loss.requires_grad:
            (found,) = torch.autograd.grad(loss, batch.logp_BT, allow_unused=True)
            gradient_BT = gradient_BT if found is None else found
    except Exception as error:  # any error of a user's loss is its outcome
        nothing = torch.full_like(batch.logp_BT.detach(), torch.nan)
        return LossOutcome(
            float("nan"), nothing, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
    return LossOutcome(loss.item(), gradient_BT.detach().double())


def own_subjects(names: list[str] | None = None) -> list[Subject]:
    """Return this package's objectives by name, all of them by default, with their source's settings."""
    return [objective_subject(name) for name in names or list(OBJECTIVES)]


def objective_subject(name: str, hyper: dict[str, Any] | None = None) -> Subject:
    """Return an objective as a subject: one of OBJECTIVES, or a user's own as `module:Class`.

    Raises:
        ValueError: no such objective, or a wrong hyperparameter.
    """
    settings = hyper or {}
    objective = make_objective(name, **settings)
    return Subject(
        name=name,
        objective=objective,
        normalizer=objective.normalizer,
        loss=_own_loss(name, settings),
        remake=lambda other: _own_loss(name, {**settings, **other}),
        call=f"sapo.objectives.policy_loss({name!r}, ...)",
    )


def _own_loss(name: str, hyper: dict[str, Any]) -> Loss:
    """Return `policy_loss` of an objective as a loss, after a check of its hyperparameters."""
    make_objective(name, **hyper)

    def loss(batch: Batch, whole: Whole) -> Tensor:
        return policy_loss(
            name,
            batch.logp_BT,
            batch.logp_old_BT,
            batch.advantages_B,
            batch.mask_BT,
            max_length=MAX_LENGTH,
            num_sequences=whole.num_sequences,
            num_tokens=whole.num_tokens,
            **hyper,
        )

    return loss


def is_objective(path: str) -> bool:
    """Tell whether `module:name` is a class of objectives, and not a loss function.

    Raises:
        ConfigError: nothing of that name can be called.
    """
    found = _load(path)
    return inspect.isclass(found) and issubclass(found, Objective)


def function_subject(
    path: str, *, objective: str = "sapo", normalizer: str | None = None, hyper: dict[str, Any] | None = None
) -> Subject:
    """Return a user's loss as a subject.

    It is called as function(logp_BT, logp_old_BT, advantages_B, mask_BT, **hyper).

    Args:
        path: `module:function`; the working directory is searched too.
        objective: a name in OBJECTIVES, the objective that the function claims to be.
        normalizer: a name in NORMALIZERS; the objective's own when left out.
        hyper: settings of objective and function. A setting that the function has no parameter for is taken to be
            built into it.

    The mask is bool. A function that takes max_length is given MAX_LENGTH. One that takes num_sequences,
    num_tokens or num_microbatches is given those of the mini-batch. One that takes none of them is not judged on parts
    of a mini-batch. A tuple's first element is the loss.

    Raises:
        ConfigError: no such function, objective, setting or normalizer.
    """
    function = _load(path)
    settings = hyper or {}
    try:
        claimed = make_objective(objective, **settings)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    normalizer = normalizer or claimed.normalizer
    if normalizer not in NORMALIZERS:
        raise ConfigError(
            f"normalizer must be one of {', '.join(NORMALIZERS)}; got {normalizer!r}; choose one of these"
        )
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    known = [field.name for field in fields(claimed)]
    counts = [field.name for field in fields(Whole) if field.name in parameters]
    tunable = takes_any or any(name in parameters for name in known)

    def with_settings(other: dict[str, Any]) -> Loss:
        given = {k: v for k, v in {**settings, **other}.items() if takes_any or k in parameters}
        if "max_length" in parameters:
            given["max_length"] = MAX_LENGTH

        def loss(batch: Batch, whole: Whole) -> Tensor:
            part = {name: getattr(whole, name) for name in counts}
            out = function(batch.logp_BT, batch.logp_old_BT, batch.advantages_B, batch.mask_BT, **given, **part)
            scalar: Tensor = out[0] if isinstance(out, tuple) else out
            return scalar

        return loss

    return Subject(
        name=path,
        objective=claimed,
        normalizer=normalizer,
        loss=with_settings({}),
        remake=with_settings if tunable else None,
        unsplittable="" if counts else "it takes none of num_sequences, num_tokens and num_microbatches",
        call=f"{path}(logp_BT, logp_old_BT, advantages_B, mask_BT, ...)",
    )


def _load(path: str) -> Callable[..., Any]:
    """Import the function or the class that `module:name` names."""
    found: Callable[..., Any] = import_named(path, what="loss", noun="function", error=ConfigError)
    return found
