"""AdamW over float32 master weights, gradient clipping and the learning-rate schedule.

A float32 policy is its own master. A bfloat16 policy computes in 16 bits while its gradients are summed over
micro-batches, and its weights kept, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def learning_rate_at(
    step: int, *, peak: float, warmup_steps: int, total_steps: int, schedule: str, minimum: float = 0.0
) -> float:
    """Learning rate of all updates of a step (0-based): linear warm-up, then the schedule.

    >>> [learning_rate_at(s, peak=1.0, warmup_steps=4, total_steps=10, schedule="constant") for s in (0, 3, 9)]
    [0.25, 1.0, 1.0]
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    shape = 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return minimum + (peak - minimum) * shape


class PolicyOptimizer:
    """AdamW on the policy's parameters through float32 masters.

    Args:
        named_parameters: what to train; float64 parameters (tests) are their own masters too.
    """

    def __init__(
        self,
        named_parameters: Sequence[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        grad_clip: float | None,
    ) -> None:
        self.names = [name for name, _ in named_parameters]
        self.parameters = [p for _, p in named_parameters]
        self.masters = [
            p if p.dtype in (torch.float32, torch.float64) else nn.Parameter(p.detach().float())
            for p in self.parameters
        ]
        self.grad_clip = grad_clip
        self.adam = torch.optim.AdamW(self.masters, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    def collect_gradients(self) -> None:
        """Add the gradients of one backward pass to the masters' (a no-op where a parameter is its own master)."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def gradient_norm(self) -> Tensor:
        """Global L2 norm of the collected gradients."""
        grads = [m.grad for m in self.masters if m.grad is not None]
        return torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())

    def gradients(self) -> dict[int, Tensor]:
        """Return the collected gradient of every master weight that has one, by its place."""
        return {i: m.grad for i, m in enumerate(self.masters) if m.grad is not None}

    def first_nonfinite_gradient(self) -> str | None:
        """Name of the first parameter whose gradient is not finite."""
        for name, master in zip(self.names, self.masters, strict=True):
            if master.grad is not None and not torch.isfinite(master.grad).all():
                return name
        return None

    def step(self, learning_rate: float, norm: Tensor) -> None:
        """Clip by the norm given, update the masters, copy them to the policy, drop the gradients."""
        if self.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.masters, self.grad_clip, norm)
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        self.adam.step()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for tensor in (*self.parameters, *self.masters):
            tensor.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything a bitwise resume needs, as flat names to tensors: moments, step counts, masters."""
        tensors: dict[str, Tensor] = {}
        for name, parameter, master in zip(self.names, self.parameters, self.masters, strict=True):
            for key, value in self.adam.state.get(master, {}).items():
                tensors[f"{key}/{name}"] = value
            if master is not parameter:
                tensors[f"master/{name}"] = master.detach()
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the state that `state_tensors` gave in place of the present one.

        Raises:
            ValueError: tensors of another model.
        """
        known = {f"{key}/{name}" for key in ("step", "exp_avg", "exp_avg_sq", "master") for name in self.names}
        if unknown := sorted(set(tensors) - known):
            raise ValueError(
                f"the optimiser state is of another model: it has {unknown[0]} and {len(unknown) - 1} more"
            )
        self.adam.state.clear()  # the checkpoint of a run's start has no moments to overwrite the present ones with
        for name, parameter, master in zip(self.names, self.parameters, self.masters, strict=True):
            if master is not parameter:
                with torch.no_grad():
                    master.copy_(tensors[f"master/{name}"])
            keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}/{name}" in tensors]
            state = {k: tensors[f"{k}/{name}"].to(master.device, copy=True) for k in keys}
            if state:
                self.adam.state[master] = state
