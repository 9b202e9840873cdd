"""Record the experts that the local engine's forwards choose, for an `ExpertLog`.

The engine says after each forward which rows it was of; rows move and leave, so what is kept goes by request and
sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from sapo.model.policy import Policy
from sapo.model.routing import Recording, Routers, routed_experts
from sapo.rollout.experts import ExpertLog


class ExpertRecorder:
    """Records one call of `generate`.

    Args:
        policy: the one whose modules make the forwards.
        log: is told everything in the end.

    Raises:
        ModelError: a policy without routers that can be recorded.
    """

    def __init__(self, policy: Policy, log: ExpertLog) -> None:
        self._routers = Routers(policy)
        self._log = log
        self._recording: Recording | None = None
        self._request: list[np.ndarray] = []
        self._sample: list[np.ndarray] = []
        self._experts: list[Tensor] = []

    @contextmanager
    def recording(self, hooked: bool) -> Iterator[None]:
        """Record the forwards made within, each followed by `prefilled` or `decoded`; fill the log at the end.

        Args:
            hooked: the forwards go through the model's modules; otherwise they tell `chosen`.
        """
        with self._routers.recording(hooked) as self._recording:
            yield
        self._fill_log()

    def chosen(self, layer: int, experts_NX: Tensor) -> None:
        """Take what one layer of the present forward has chosen, of those that have a router."""
        assert self._recording is not None
        self._recording.note(layer, experts_NX)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take a forward that goes through the model's modules, where the others tell `chosen`."""
        assert self._recording is not None
        with self._routers.listening(self._recording):
            yield

    def prefilled(self, requests: Sequence[int], paths: Sequence[np.ndarray]) -> None:
        """Take the forward just made as one of prompts.

        Args:
            requests: whose prompts.
            paths: packed positions of each prompt.
        """
        assert self._recording is not None
        experts_Nlk = self._recording.take().cpu().numpy()
        for request, path in zip(requests, paths, strict=True):
            self._log.note_prompt(request, routed_experts(experts_Nlk[path]))

    def decoded(self, request_R: np.ndarray, sample_R: np.ndarray) -> None:
        """Take the forward just made as one of a token of each row.

        Args:
            request_R, sample_R: whose token it was.
        """
        assert self._recording is not None
        self._experts.append(self._recording.take())
        self._request.append(request_R.copy())
        self._sample.append(sample_R.copy())

    def _fill_log(self) -> None:
        """Sort the tokens by completion, each completion's in the order decoded."""
        if not self._experts:
            return
        request, sample = np.concatenate(self._request), np.concatenate(self._sample)
        order = np.lexsort((sample, request))  # stable: each completion's tokens stay in order
        experts = torch.cat(self._experts).cpu().numpy()[order]
        keys = np.stack([request, sample], axis=1)[order]
        starts = np.flatnonzero(np.any(np.diff(keys, axis=0, prepend=-1) != 0, axis=1))
        for (r, s), part in zip(keys[starts], np.split(experts, starts[1:]), strict=True):
            self._log.note_completion(int(r), int(s), routed_experts(part))
