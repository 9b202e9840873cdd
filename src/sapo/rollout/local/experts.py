"""The experts that the engine's own forwards chose (routing replay R3), gathered while it samples.

The engine says after each forward which rows it was of; rows move and leave, so what is kept goes by request and
sample. A completion's last token never goes through the model and has no record, as it has no place in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sapo.data import Completion, Group, RoutedExperts
from sapo.model.routing import Recording, Routers, routed_experts


class ExpertLog:
    """Records the experts of one call of generate.

    Args:
        routers: of the policy that samples.
    """

    def __init__(self, routers: Routers) -> None:
        self._routers = routers
        self._recording: Recording | None = None
        self._prompts: dict[int, RoutedExperts] = {}
        self._request: list[np.ndarray] = []
        self._sample: list[np.ndarray] = []
        self._experts: list[Tensor] = []

    @contextmanager
    def recording(self, hooked: bool) -> Iterator[None]:
        """Held by the engine while it makes forwards; each is followed by `prefilled` or `decoded`.

        Args:
            hooked: the forwards go through the model's modules; otherwise they tell `chosen`.
        """
        with self._routers.recording(hooked) as self._recording:
            yield

    def chosen(self, layer: int, experts_NX: Tensor) -> None:
        """What one layer of the present forward has chosen, of those that have a router."""
        assert self._recording is not None
        self._recording.note(layer, experts_NX)

    def prefilled(self, requests: Sequence[int], paths: Sequence[np.ndarray]) -> None:
        """The forward was of prompts.

        Args:
            requests: whose prompts.
            paths: packed positions of each prompt.
        """
        assert self._recording is not None
        experts_Nlk = self._recording.take().cpu().numpy()
        for request, path in zip(requests, paths, strict=True):
            self._prompts[request] = routed_experts(experts_Nlk[path])

    def decoded(self, request_R: np.ndarray, sample_R: np.ndarray) -> None:
        """The forward was of one token of each row.

        Args:
            request_R, sample_R: whose token it was.
        """
        assert self._recording is not None
        self._experts.append(self._recording.take())
        self._request.append(request_R.copy())
        self._sample.append(sample_R.copy())

    def attach(self, groups: Sequence[Group]) -> list[Group]:
        """The groups, one for each request, with the experts of their prompts and completions.

        Every record goes to one completion, and none is left.
        """
        of = self._by_completion()
        found = [
            replace(
                group,
                prompt_experts=self._prompts[i],
                completions=tuple(
                    replace(c, experts=self._of(c, of.pop((i, j), None))) for j, c in enumerate(group.completions)
                ),
            )
            for i, group in enumerate(groups)
        ]
        assert not of, f"experts were recorded of {len(of)} completions that are not there"
        return found

    def _by_completion(self) -> dict[tuple[int, int], np.ndarray]:
        """(request, sample) -> (tokens, layers, experts per token), in the order decoded."""
        if not self._experts:
            return {}
        request, sample = np.concatenate(self._request), np.concatenate(self._sample)
        order = np.lexsort((sample, request))  # stable: each completion's tokens stay in order
        experts = torch.cat(self._experts).cpu().numpy()[order]
        keys = np.stack([request, sample], axis=1)[order]
        starts = np.flatnonzero(np.any(np.diff(keys, axis=0, prepend=-1) != 0, axis=1))
        parts = np.split(experts, starts[1:])
        return {(int(r), int(s)): part for (r, s), part in zip(keys[starts], parts, strict=True)}

    def _of(self, completion: Completion, experts_nlk: np.ndarray | None) -> RoutedExperts:
        if experts_nlk is None:
            prompt = next(iter(self._prompts.values()))
            recorded = replace(prompt, indices=b"")
        else:
            recorded = routed_experts(experts_nlk)
        tokens = len(completion) - 1
        assert recorded.num_tokens == tokens, f"{recorded.num_tokens} records of {tokens} tokens"
        return recorded
