"""The experts that the trainer's own forward chose (routing replay R2), taken from packed batches to their groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from sapo.data import Group, PackedBatch
from sapo.model.routing import routed_experts


class RecordedExperts:
    """Collects records batch by batch."""

    def __init__(self) -> None:
        self._paths: dict[int, np.ndarray] = {}

    def add(self, batch: PackedBatch, experts_Nlk: Tensor) -> None:
        """Record the experts that a forward pass over a batch chose."""
        experts = experts_Nlk.cpu().numpy()
        predictor_M, sequence_M = batch.predictor_M.cpu().numpy(), batch.sequence_M.cpu().numpy()
        ends = {segment.stop - 1: place for place, segment in enumerate(batch.segments)}
        bounds = np.searchsorted(sequence_M, np.arange(batch.num_sequences + 1))
        for b, sequence in enumerate(batch.sequence_ids):
            # The last token is predicted from the last input. What that sees is the prompt and all inputs.
            last = int(predictor_M[bounds[b + 1] - 1])
            assert sequence not in self._paths, f"sequence {sequence} was recorded twice"
            self._paths[sequence] = experts[_path(batch, ends[last])]

    def attach(self, groups: Sequence[Group]) -> list[Group]:
        """Return the groups with the recorded experts; a sequence that was not packed gets none.

        The prompt of a group that two batches shared was computed in both: the record of the first is taken.
        """
        first, found = 0, []
        for group in groups:
            places = range(first, first + len(group.completions))
            paths = [self._paths.pop(i, None) for i in places]
            prompt = len(group.prompt.token_ids)
            completions = tuple(
                replace(c, experts=None if path is None else routed_experts(path[prompt:]))
                for c, path in zip(group.completions, paths, strict=True)
            )
            prompts = [routed_experts(path[:prompt]) for path in paths if path is not None]
            found.append(replace(group, completions=completions, prompt_experts=prompts[0] if prompts else None))
            first = places.stop
        assert not self._paths, f"{len(self._paths)} records belong to no sequence"
        return found


def without_experts(groups: Sequence[Group]) -> list[Group]:
    """Return the groups without recorded experts: a forward pass over them goes where the live routers send it."""
    return [
        replace(g, prompt_experts=None, completions=tuple(replace(c, experts=None) for c in g.completions))
        for g in groups
    ]


def _path(batch: PackedBatch, place: int) -> list[int]:
    """List the packed positions of a segment and of all segments it continues, from the root on."""
    positions: list[int] = []
    while place >= 0:
        segment = batch.segments[place]
        positions = [*range(segment.start, segment.stop), *positions]
        place = segment.parent
    return positions
