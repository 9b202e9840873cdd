"""Optimizers by name, over float32 master weights, with gradient clipping and the learning-rate schedule.

A float32 policy is its own master. A bfloat16 policy computes in 16 bits while its gradients are summed over
micro-batches, and its weights kept, in float32.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sapo.errors import CheckpointError, ConfigError
from sapo.model.sharding import own_part, shard_like, whole
from sapo.training.optimizer_state import OptimizerState
from sapo.utils.names import did_you_mean
from sapo.utils.plugins import import_named


def learning_rate_at(
    step: int, *, peak: float, warmup_steps: int, total_steps: int, schedule: str, minimum: float = 0.0
) -> float:
    """Return the learning rate of all updates of a step (0-based): linear warm-up, then the schedule.

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


@dataclass(frozen=True)
class OptimizerOptions:
    """Hyperparameters of an optimizer, by the names that torch gives them.

    >>> OptimizerOptions(weight_decay=0.1).betas
    (0.9, 0.95)
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True)
class OptimizerKind:
    """An entry of the registry: how an optimizer is made, and what memory it takes.

    >>> OPTIMIZERS["adamw"].state_bytes(32, 4)
    256
    """

    make: Callable[[list[nn.Parameter], OptimizerOptions], torch.optim.Optimizer]
    """Takes the master weights; the learning rate is set before each step."""
    state_bytes: Callable[[int, int], int] | None = None
    """(elements of a master weight, bytes of each) -> bytes it keeps for it; None where they have to be measured."""
    takes: tuple[str, ...] = ("betas", "eps", "weight_decay")
    """Fields of `OptimizerOptions` that it reads."""


def find_optimizer(name: str) -> OptimizerKind:
    """Return an entry of OPTIMIZERS, or one for a class of the user's own (`module:Class`).

    Raises:
        ConfigError: no such entry, module or class, a class that is no optimizer, or a package that is not installed.
    """
    if ":" in name:
        return _users_own(name)
    if name not in OPTIMIZERS:
        raise ConfigError(
            f"train.optimizer must be one of {', '.join(OPTIMIZERS)}, or module:Class; got {name!r}"
            f"{did_you_mean(name, OPTIMIZERS)}"
        )
    if name == "adamw_8bit" and importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            "train.optimizer=adamw_8bit needs torchao, which is not installed; pip install 'sapo-rl[optim]', or use "
            "train.optimizer=adamw"
        )
    return OPTIMIZERS[name]


def _adamw(masters: list[nn.Parameter], options: OptimizerOptions) -> torch.optim.Optimizer:
    return torch.optim.AdamW(masters, lr=0.0, **asdict(options), fused=True)


def _adamw_bytes(elements: int, itemsize: int) -> int:
    return 2 * elements * itemsize


def _adamw_8bit(masters: list[nn.Parameter], options: OptimizerOptions) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    # Said by torch.compile of torchao's tensors: it then keeps no cache of their graphs.
    warnings.filterwarnings("ignore", message=r"\w+ does not implement _stable_hash_for_caching")
    optimizer: torch.optim.Optimizer = AdamW8bit(masters, lr=0.0, **asdict(options))
    return optimizer


def _adamw_8bit_bytes(elements: int, itemsize: int) -> int:
    """Count the bytes of both moments: a byte an element and a float32 scale a block of 256, and a table of 256 float32
    values for each moment.

    torchao leaves parameters below 4096 elements, and those that do not divide into blocks, in their own precision.
    """
    if elements < 4096 or elements % 256:
        return _adamw_bytes(elements, itemsize)
    return 2 * (elements + 4 * elements // 256 + 4 * 256)


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(_adamw, _adamw_bytes),
    "adamw_8bit": OptimizerKind(_adamw_8bit, _adamw_8bit_bytes),
}
"""What `train.optimizer` may name, beside a class of the user's own."""


def _users_own(spec: str) -> OptimizerKind:
    found = import_named(spec, what="train.optimizer", noun="class", error=ConfigError)
    if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(
            f"train.optimizer {spec!r} must be a class derived from torch.optim.Optimizer; got {found!r}; derive it "
            f"from that, or use one of {', '.join(OPTIMIZERS)}"
        )
    parameters = inspect.signature(found).parameters.values()
    every = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes = tuple(name for name in asdict(OptimizerOptions()) if every or name in named)
    rate: dict[str, Any] = {"lr": 0.0} if every or "lr" in named else {}

    def make(masters: list[nn.Parameter], options: OptimizerOptions) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = found(masters, **rate, **{name: getattr(options, name) for name in takes})
        return optimizer

    return OptimizerKind(make, None, takes)


FACTOR = "learning_rate_scale"
"""Key of a parameter group whose learning rate is that of the others times a factor."""


class PolicyOptimizer:
    """An optimizer on the policy's parameters through float32 masters.

    Args:
        named_parameters: what to train; float64 parameters (tests) are their own masters too.
        betas, eps, weight_decay: see `OptimizerOptions`.
        grad_clip: largest norm of the gradient; None does not clip.
        name: one of OPTIMIZERS, or `module:Class`.
        scaled: factors of the learning rate, by the parameter's name; 1 for those that are not named.
        rounded: passes run on a copy of the parameters in 16 bits (model/sharding.py), so the parameters themselves are
            kept as masters.

    Raises:
        ConfigError: see `find_optimizer`.
    """

    def __init__(
        self,
        named_parameters: Sequence[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        grad_clip: float | None,
        name: str = "adamw",
        scaled: Mapping[str, float] | None = None,
        rounded: bool = False,
    ) -> None:
        self.names = [name for name, _ in named_parameters]
        self.parameters = [p for _, p in named_parameters]
        self.masters = [
            p if p.dtype in (torch.float32, torch.float64) else nn.Parameter(p.detach().float())
            for p in self.parameters
        ]
        self.grad_clip = grad_clip
        self._kept = {
            f"master/{name}": master
            for name, parameter, master in zip(self.names, self.parameters, self.masters, strict=True)
            if rounded or master is not parameter
        }
        """Masters that a checkpoint needs beside the weights."""
        factors = [(scaled or {}).get(name, 1.0) for name in self.names]
        by_factor = {f: [m for m, own in zip(self.masters, factors, strict=True) if own == f] for f in factors}
        first = 1.0 if 1.0 in by_factor or not factors else factors[0]
        options = OptimizerOptions(betas, eps, weight_decay)
        self.inner = find_optimizer(name).make(by_factor.pop(first, []), options)
        """The torch optimizer over the masters."""
        if first != 1.0:
            self.inner.param_groups[0][FACTOR] = first
        for factor, group in by_factor.items():
            self.inner.add_param_group({"params": group, FACTOR: factor})
        self._state = OptimizerState(self.inner, dict(zip(self.names, self.masters, strict=True)))

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
        """Compute the global L2 norm of the collected gradients."""
        grads = [m.grad for m in self.masters if m.grad is not None]
        return whole(torch.nn.utils.get_total_norm(grads)) if grads else torch.zeros(())

    def gradients(self) -> dict[int, Tensor]:
        """Return the collected gradient of every master weight that has one, by its place."""
        return {i: m.grad for i, m in enumerate(self.masters) if m.grad is not None}

    def first_nonfinite_gradient(self) -> int:
        """Return the place in `names` of the first parameter whose gradient is not finite, of a sharded one this rank's
        slice; their number where there is none."""
        for place, master in enumerate(self.masters):
            if master.grad is not None and not torch.isfinite(own_part(master.grad)).all():
                return place
        return len(self.names)

    def step(self, learning_rate: float, norm: Tensor) -> None:
        """Clip by the norm given, update the masters, copy them to the policy, drop the gradients."""
        if self.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.masters, self.grad_clip, norm)
        for group in self.inner.param_groups:
            rate = learning_rate * group.get(FACTOR, 1.0)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)  # a compiled step would be compiled anew for another number
            else:
                group["lr"] = rate
        self.inner.step()
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
        """Return everything a bitwise resume needs, as flat names to plain tensors: the optimizer's state and masters.

        Of sharded parameters they are sharded alike.

        Raises:
            ConfigError: the optimizer keeps something that a checkpoint cannot hold.
        """
        return self._state.to_tensors() | {key: master.detach() for key, master in self._kept.items()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the state that `state_tensors` gave in place of the present one.

        Raises:
            CheckpointError: tensors of another model or of another optimizer.
        """
        for key, master in self._kept.items():
            if key not in tensors or tensors[key].shape != master.shape:
                got = f"one of shape {tuple(tensors[key].shape)}" if key in tensors else "none"
                raise CheckpointError(
                    f"the optimizer's state must hold {key} of shape {tuple(master.shape)}; got {got}; resume from a "
                    "checkpoint of this run"
                )
        of_masters = {f"master/{name}" for name in self.names}
        self._state.from_tensors({k: v for k, v in tensors.items() if k not in of_masters})
        with torch.no_grad():
            for key, master in self._kept.items():
                master.copy_(shard_like(master, tensors[key]))
