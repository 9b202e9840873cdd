"""What is judged: a loss, and the objective, settings and normaliser it says it has."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sapo.conformance.cases import Batch, Case
from sapo.errors import ConfigError
from sapo.objectives import NORMALIZERS, OBJECTIVES, Objective, make_objective, policy_loss

MAX_LENGTH = 16
"""The longest response, for `constant_length`."""


@dataclass(frozen=True)
class Whole:
    """The mini-batch that a micro-batch is part of.

    Three responses of 2, 1 and 1 tokens, each a micro-batch of its own: Whole(3, 4, 3).
    """

    num_sequences: int
    num_tokens: int
    num_microbatches: int


Loss = Callable[[Batch, Whole], Tensor]
"""A scalar to minimise: what this micro-batch, which may be all of it, adds to the loss of the mini-batch."""


@dataclass(frozen=True)
class Subject:
    """A loss and what it claims to be.

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
    """The loss with other hyperparameters in place of its own, refused as the loss itself refuses them; None when it
    has none that can be set."""
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)
    """What it can compute in, the most precise first."""
    rtol: float = 1e-6
    """How near a gradient must come to the formula's."""
    unsplittable: str = ""
    """Why it cannot be asked for its part of a mini-batch, if it cannot."""
    call: str = ""
    """How it was called, for the report."""


@dataclass(frozen=True)
class Outcome:
    """A loss and its gradient in log pi, or the error that came instead.

    Outcome(-1.0, tensor([[-1.0]]), "") on policy with A = 1, and Outcome(nan, tensor([[nan]]), "RuntimeError: ...").
    """

    loss: float
    gradient_BT: Tensor
    error: str = ""


def measure(subject: Subject, case: Case, dtype: torch.dtype | None = None, whole: Whole | None = None) -> Outcome:
    """Value and gradient of the subject's loss on a case, in its most precise dtype and as a whole unless told."""
    batch = case.tensors(dtype or subject.dtypes[0])
    whole = whole or Whole(len(case.responses), case.num_tokens, 1)
    try:
        loss = subject.loss(batch, whole)
        gradient_BT = torch.zeros_like(batch.logp_BT)
        if loss.requires_grad:
            (found,) = torch.autograd.grad(loss, batch.logp_BT, allow_unused=True)
            gradient_BT = gradient_BT if found is None else found
    except Exception as error:  # whatever a stranger's loss raises is its answer to this case
        nothing = torch.full_like(batch.logp_BT.detach(), torch.nan)
        return Outcome(
            float("nan"), nothing, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
    return Outcome(loss.item(), gradient_BT.detach().double())


def own_subjects(names: list[str] | None = None) -> list[Subject]:
    """This package's objectives by name, all of them by default, with their source's settings."""
    return [_own(name) for name in names or list(OBJECTIVES)]


def _own(name: str) -> Subject:
    objective = make_objective(name)
    return Subject(
        name=name,
        objective=objective,
        normalizer=objective.normalizer,
        loss=_own_loss(name, {}),
        remake=lambda hyper: _own_loss(name, hyper),
        call=f"sapo.objectives.policy_loss({name!r}, ...)",
    )


def _own_loss(name: str, hyper: dict[str, Any]) -> Loss:
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


def function_subject(
    path: str, *, objective: str = "sapo", normalizer: str | None = None, hyper: dict[str, Any] | None = None
) -> Subject:
    """A user's loss, `module:function`, called as function(logp_BT, logp_old_BT, advantages_B, mask_BT, **hyper).

    Args:
        path: where it is; the working directory is searched too when the caller put it on sys.path.
        objective: a name in OBJECTIVES, what the function says it is; `hyper` are settings of both. Those the function
            does not take by name are taken to be built into it.
        normalizer: a name in NORMALIZERS; the objective's own when left out.

    The mask is bool. A function that takes max_length is given MAX_LENGTH. One that takes num_sequences,
    num_tokens or num_microbatches is given those of the mini-batch; one that takes none of them is not asked for a part
    of it. A tuple's first element is the loss.

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
    known = [field.name for field in fields(claimed)]  # type: ignore[arg-type]
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
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and asks for one that is not
        raise ConfigError(
            f"no module named {module_name!r}; got {path!r}; run from its folder or set PYTHONPATH"
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        known = ", ".join(k for k, v in vars(module).items() if callable(v) and not k.startswith("_")) or "none"
        raise ConfigError(f"{module_name} has no function {name!r}; it has {known}")
    return function
