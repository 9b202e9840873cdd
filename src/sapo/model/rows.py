"""The forward of a decoder that cannot run on packed tokens: one padded row for each sequence, as transformers runs it.

Every leaf of the tree is a row from the root on, so that shared tokens are computed once for each of their leaves. What
stands behind a row is padding that no token of it sees. Slower than a packed forward, and right for every causal
decoder, whatever it carries from token to token.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sapo.errors import ModelError
from sapo.model.attention import Layout, TreeLayout
from sapo.model.gather import gather_rows


def row_paths(layout: TreeLayout) -> list[np.ndarray]:
    """Return the packed positions of each row: the paths of the segments that no other continues."""
    inner = {segment.parent for segment in layout.segments}
    return [path for i, path in enumerate(layout.paths) if i not in inner]


def row_index(layout: TreeLayout) -> np.ndarray:
    """Return (R, T) packed positions of the tokens of each row; a shorter one is padded with its last."""
    paths = row_paths(layout)
    longest = max(map(len, paths))
    return np.stack([np.concatenate([path, np.full(longest - len(path), path[-1])]) for path in paths])


def hidden_of_rows(decoder: Any, token_ids_N: Tensor, layout: Layout) -> Tensor:
    """Compute (N, H) last hidden states of packed tokens, row by row; a shared token's are those of its first row.

    Raises:
        ModelError: the layout is not of whole sequences (context parallelism).
    """
    if not isinstance(layout, TreeLayout):
        raise ModelError(
            f"{type(decoder).__name__} runs in rows, whose tokens are not split over ranks; set "
            "train.context_parallel=1"
        )
    paths, index_RT = row_paths(layout), row_index(layout)
    longest = index_RT.shape[1]
    place_N = np.empty(len(token_ids_N), dtype=np.int64)
    for row in reversed(range(len(paths))):
        place_N[paths[row]] = row * longest + np.arange(len(paths[row]))
    device = token_ids_N.device
    positions = row_positions(decoder, len(paths), 0, longest, device)
    output = decoder(input_ids=token_ids_N[torch.from_numpy(index_RT).to(device)], use_cache=False, **positions)
    return gather_rows(last_hidden(output).flatten(0, 1), torch.from_numpy(place_N).to(device))


def row_positions(decoder: Any, rows: int, start: int, stop: int, device: torch.device) -> dict[str, Tensor]:
    """Return the positions of rows that stand at the same place, where a decoder takes them.

    One that is left to count for itself may count for the first row alone (the indexer of MiniMax M3).
    """
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        return {}
    return {"position_ids": torch.arange(start, stop, device=device).expand(rows, -1).contiguous()}


def last_hidden(output: Any) -> Tensor:
    """Return the (B, T, H) last hidden states that a decoder gives."""
    found: Tensor = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
    return found
