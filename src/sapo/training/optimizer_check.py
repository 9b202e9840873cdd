"""Proof before a run that an optimizer runs here and can be resumed from a checkpoint bit for bit.

AdamW is proven by our tests. Of another one, two small parameters are trained a few steps; its state goes through the
bytes of a checkpoint into a fresh optimizer; then both go on, and must not differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from sapo.errors import ConfigError
from sapo.training.optimizer import OptimizerOptions, PolicyOptimizer, find_optimizer
from sapo.utils.text import first_line

PROBE_SHAPES = ((64, 64), (5,))
"""Of the parameters trained: one as large as torchao's smallest quantised one, and one that is left as it is."""


def prove_optimizer(name: str, options: OptimizerOptions, device: torch.device | str) -> None:
    """Refuse an optimizer that cannot be run on a device, or not be resumed bit for bit.

    Raises:
        ConfigError: see `find_optimizer`; or what failed, and the way out.
    """
    find_optimizer(name)
    if name == "adamw":
        return
    try:
        whole, resumed = _train_and_resume(name, options, torch.device(device))
    except ConfigError:
        raise
    except Exception as error:  # of other people's code, compilers among it
        raise ConfigError(
            f"train.optimizer={name} cannot run on {device}: {type(error).__name__}: {first_line(error)}; use "
            "train.optimizer=adamw"
        ) from error
    if not all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True)):
        raise ConfigError(
            f"train.optimizer={name} cannot be resumed from a checkpoint: with its state written and read again it "
            "does not go on as it would have; keep all that changes from step to step in `state` or in the parameter "
            "groups, and draw no random numbers, or use train.optimizer=adamw"
        )


def state_bytes(name: str, parameters: Sequence[Tensor]) -> int:
    """Return the bytes that an optimizer keeps for parameters, their masters left out.

    An optimizer of the user's own is run on one small parameter; its bytes are taken to grow with the elements.
    """
    kind = find_optimizer(name)
    if kind.state_bytes is not None:
        return sum(kind.state_bytes(p.numel(), max(4, p.element_size())) for p in parameters)
    probe = _Probe(name, OptimizerOptions(), torch.device("cpu"), PROBE_SHAPES[:1])
    probe.train(range(1))
    kept = sum(t.nbytes for t in probe.optimizer.state_tensors().values())
    return kept * sum(p.numel() for p in parameters) // probe.parameters[0].numel()


def _train_and_resume(name: str, options: OptimizerOptions, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters after four steps, made in one go and with a checkpoint between the second and the third."""
    whole = _Probe(name, options, device)
    whole.train(range(2))
    written = save({k: v.detach().cpu().contiguous() for k, v in whole.optimizer.state_tensors().items()})
    resumed = _Probe(name, options, device)
    with torch.no_grad():
        for mine, theirs in zip(resumed.parameters, whole.parameters, strict=True):
            mine.copy_(theirs)
    resumed.optimizer.load_state_tensors(load(written))
    for probe in (whole, resumed):
        probe.train(range(2, 4))
    return [p.detach() for p in whole.parameters], [p.detach() for p in resumed.parameters]


class _Probe:
    """A few parameters under an optimizer."""

    def __init__(
        self,
        name: str,
        options: OptimizerOptions,
        device: torch.device,
        shapes: tuple[tuple[int, ...], ...] = PROBE_SHAPES,
    ) -> None:
        self.parameters = [nn.Parameter(_noise(shape, i, device)) for i, shape in enumerate(shapes)]
        named = [(f"probe.{i}", p) for i, p in enumerate(self.parameters)]
        self.optimizer = PolicyOptimizer(named, **asdict(options), grad_clip=None, name=name)

    def train(self, steps: range) -> None:
        """Make steps with gradients and a learning rate of their own each."""
        for step in steps:
            for i, parameter in enumerate(self.parameters):
                parameter.grad = _noise(tuple(parameter.shape), 10 * step + i, parameter.device)
            self.optimizer.step(1e-3 / (1 + step), self.optimizer.gradient_norm())


def _noise(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
