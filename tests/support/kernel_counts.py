"""Operations counted by dispatch: each is at least one kernel on a GPU, and views are none."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = (
    *(
        "aten.view",
        "aten._unsafe_view",
        "aten.as_strided.",
        "aten.slice.",
        "aten.select.",
        "aten.t.",
        "aten.transpose.",
    ),
    *("aten.unsqueeze", "aten.squeeze", "aten.expand.", "aten.detach", "aten.empty", "aten.new_empty", "aten.alias."),
    *("aten.unflatten", "aten.permute", "aten.lift", "aten.split", "aten.unbind", "aten.chunk", "aten.diagonal."),
    *("aten._reshape_alias", "aten.sym_", "aten.is_same_size", "prim.device"),
)
HOST_READS = ("_local_scalar_dense", "aten.nonzero", "is_nonzero", "aten.equal", "bincount", "masked_select")


class KernelCount(TorchDispatchMode):
    """Counts what would be launched while it is on, and what would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: Counter[str] = Counter()
        self.host_reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(read in name for read in HOST_READS):
            self.host_reads[name] += 1
        elif not name.startswith(VIEWS):
            self.launched[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def kernels(self) -> int:
        """All of them."""
        return sum(self.launched.values())
