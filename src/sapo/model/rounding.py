"""Round weights to fewer bits, as an engine of that precision has them.

A weight goes to the narrow dtype and back, so that everything is still computed in the policy's own precision: this is
the rounding of the weights alone, not of activations or of the cache, which an engine may round as well.

Matrices are rounded, and stacks of them (the experts of a mixture): the linear layers, router, embedding and head.
Vectors, the norms and biases, are not unless asked for: no engine has its norms in 8 bits. Departure from common
engines: these keep embedding, head and router in 16 bits, and so an adapter; here one rule holds for all matrices, and
those of an adapter are rounded each by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDED_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
SCALINGS = ("none", "tensor", "channel")


@dataclass(frozen=True)
class Rounding:
    """Describe how a sampler's weights are rounded.

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
        """Return the weight (..., rows, columns), or the vector, after the round trip; in its own dtype.

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


def rounded_weights(weights: Iterable[tuple[str, Tensor]], rounding: Rounding | None) -> Iterator[tuple[str, Tensor]]:
    """Yield weights by name, rounded: matrices in copies, vectors as they are unless `rounding` takes them too.

    Args:
        weights: never changed.
        rounding: None yields all of them as they are.
    """
    for name, weight in weights:
        takes_it = rounding is not None and (weight.dim() > 1 or rounding.vectors)
        yield name, rounding.round(weight) if rounding is not None and takes_it else weight
