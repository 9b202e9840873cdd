"""Weights rounded to fewer bits for as long as a sampler reads them: those of an engine of that precision.

A weight goes to the narrow dtype and back, so that everything is still computed in the policy's own precision: this is
the rounding of the weights alone, not of activations or of the cache, which an engine may round as well.

Matrices are rounded, and stacks of them (the experts of a mixture): the linear layers, router, embedding and head.
Vectors, the norms and biases, are not unless asked for: no engine has its norms in 8 bits. Departure from common
engines: these keep embedding, head and router in 16 bits, and so an adapter; here one rule holds for all matrices, and
those of an adapter are rounded each by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sapo.model.policy import Policy

ROUNDED_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
SCALINGS = ("none", "tensor", "channel")


@dataclass(frozen=True)
class Rounding:
    """How a sampler's weights are rounded.

    >>> Rounding("float8_e4m3fn", scaling="none").round(torch.tensor([[0.3, 1000.0, -0.001]])).tolist()
    [[0.3125, 448.0, -0.001953125]]
    """

    dtype: str
    """A name in ROUNDED_DTYPES."""
    scaling: str = "tensor"
    """What a weight is divided by before it is rounded, and multiplied with after: nothing, or what brings the largest
    of the matrix (tensor), or of each of its rows (channel: one output), to the largest number of the dtype. For 8 bits
    only: the range of bfloat16 is that of float32."""
    vectors: bool = False
    """Round norms and biases as well."""

    def __post_init__(self) -> None:
        if self.dtype not in ROUNDED_DTYPES:
            raise ValueError(
                f"dtype must be one of {', '.join(ROUNDED_DTYPES)}; got {self.dtype!r}; choose one of these"
            )
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}; got {self.scaling!r}; choose one of these")

    def round(self, weight: Tensor) -> Tensor:
        """The weight (..., rows, columns), or the vector, after the round trip; in its own dtype.

        Beyond the largest number of the dtype a weight becomes that number, as engines have it, and not NaN, which is
        what a plain cast to float8_e4m3fn makes of it.
        """
        narrow = ROUNDED_DTYPES[self.dtype]
        if narrow == torch.bfloat16:
            return weight.to(narrow).to(weight.dtype)
        largest = torch.finfo(narrow).max
        wide = weight.float() if weight.dtype == torch.bfloat16 else weight  # no second rounding by the division
        scale = self._scale(wide, largest)
        return ((wide / scale).clamp(-largest, largest).to(narrow).to(wide.dtype) * scale).to(weight.dtype)

    def _scale(self, weight: Tensor, largest: float) -> Tensor:
        if self.scaling == "none":
            return weight.new_ones(())
        over = (-1,) if self.scaling == "channel" or weight.dim() == 1 else (-2, -1)  # of each expert by itself
        peak = weight.abs().amax(dim=over, keepdim=True)
        return torch.where(peak > 0, peak / largest, torch.ones_like(peak))


@contextmanager
def rounded_weights(policy: Policy, rounding: Rounding | None) -> Iterator[None]:
    """Within it the policy's matrices, or all its weights, are their rounded selves; after it the tensors they were.

    The originals are set aside, not overwritten: they come back to the bit, and whoever reads the policy's parameters
    in between (the engine) reads the rounded ones, tied weights included. Costs a second copy of the weights.

    Args:
        rounding: None leaves everything as it is.
    """
    if rounding is None:
        yield
        return
    parameters = [p for p in policy.model.parameters() if p.dim() > 1 or rounding.vectors]
    kept = [p.data for p in parameters]
    try:
        for parameter in parameters:
            parameter.data = rounding.round(parameter.data)
        yield
    finally:
        for parameter, own in zip(parameters, kept, strict=True):
            parameter.data = own
