"""Optimizers of a user's own, `support.own_optimizers:Class` in a recipe."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SignMomentum(torch.optim.Optimizer):
    """Lion that slows down, with all kinds of state that a checkpoint has to keep.

    The number of steps is a Python integer, the norms of the last two gradients are a list, the running mean is in a
    mapping, and the parameter group remembers the largest gradient and, in a tensor, the sum of those.
    """

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "largest": 0.0, "seen": torch.zeros(2)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make one step."""
        for group in self.param_groups:
            group["largest"] = max(group["largest"], *(float(p.grad.abs().max()) for p in group["params"]))
            group["seen"] += torch.tensor([1.0, group["largest"]])
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(step=0, norms=[0.0, 0.0], kept={"mean": torch.zeros_like(parameter), "none": None})
                state["step"] += 1
                state["norms"] = [state["norms"][1], float(parameter.grad.norm())]
                mean: Tensor = state["kept"]["mean"]
                direction = torch.lerp(parameter.grad, mean, group["betas"][0]).sign()
                mean.lerp_(parameter.grad, 1 - group["betas"][1])
                slower = 1 + 0.01 * state["step"] + sum(state["norms"]) + float(group["seen"][1])
                parameter.add_(direction, alpha=-group["lr"] / slower)


class Forgetful(torch.optim.SGD):
    """Keeps what it counts on itself, where no checkpoint finds it."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr)
        self.steps = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make one step, each shorter than the last."""
        self.steps += 1
        for group in self.param_groups:
            group["lr"] /= self.steps
        super().step()


class Unwritable(torch.optim.SGD):
    """Keeps what is neither tensor nor JSON."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make one step."""
        super().step()
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["history"] = {1, 2}


class Failing(torch.optim.SGD):
    """Has no kernel for the device."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Refuse."""
        raise NotImplementedError("no kernel for float32 here")


NOT_A_CLASS = SignMomentum.step
