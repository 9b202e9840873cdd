"""What the ranks of a training group agree on, beside the gradients that FSDP sums.

No rank may leave a collective alone: whatever ends an update (a request to stop, a quantity that is not finite) is
agreed on first, and then ends it on every rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from sapo.training.heartbeat import Progress


class Collective:
    """A training group as one of its ranks sees it. The rank of one process, which is the default, asks nobody.

    Args:
        rank: of this process; rank 0 is the driver's.
        size: ranks of the group.
        group: of CPU tensors.
        progress: of this process; a heartbeat may read it.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        group: dist.ProcessGroup | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.rank = rank
        self.size = size
        self.group = group
        self.progress = progress or Progress()

    def sum(self, value: float) -> float:
        """Sum a number over the ranks, in float64."""
        return float(self._reduced(torch.tensor(value, dtype=torch.float64), dist.ReduceOp.SUM))

    def least(self, value: int) -> int:
        """Return the least of the ranks' numbers."""
        return int(self._reduced(torch.tensor(value), dist.ReduceOp.MIN))

    def any(self, ask: Callable[[], bool]) -> bool:
        """Return whether one rank or more says yes."""
        return bool(self._reduced(torch.tensor(int(ask())), dist.ReduceOp.MAX))

    def _reduced(self, value: torch.Tensor, by: dist.ReduceOp.RedOpType) -> torch.Tensor:
        if self.size > 1:
            dist.all_reduce(value, by, group=self.group)
        return value
