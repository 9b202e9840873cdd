"""Rows of packed tensors, by index."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gather_rows(source_NX: Tensor, index_K: Tensor) -> Tensor:
    """Gather rows of a tensor by index, through F.embedding: its backward on a CPU is several times faster."""
    flat = F.embedding(index_K, source_NX.reshape(source_NX.shape[0], -1))
    return flat.view(index_K.shape[0], *source_NX.shape[1:])
