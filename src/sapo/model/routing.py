"""The routers of a mixture of experts: which experts a forward chose, recorded, and sent there again.

Routing replay (https://arxiv.org/abs/2507.18071, section 5.3; R2 and R3 of https://arxiv.org/abs/2512.01374): between
two updates the routers move too, and a token that goes to other experts has another probability for that reason alone.
Replay freezes the discrete choice and nothing else. The chosen experts' weights are computed of the live router's
logits as the model does it (router_families.py), so that gradient reaches the router, and with unchanged weights every
bit is that of a forward without replay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from sapo.data import RoutedExperts
from sapo.errors import ModelError
from sapo.model.router_families import ROUTERS, RouterFamily, WeightsOf, router_family

# For the annotation only: what packs records needs no transformers.
if TYPE_CHECKING:
    from sapo.model.policy import Policy


class Routers:
    """The routers of a policy's decoder, in the order of its layers.

    Args:
        policy: a mixture of experts of a family in `ROUTERS`.

    Raises:
        ModelError: a dense model, or a mixture whose routers are others.
    """

    def __init__(self, policy: Policy) -> None:
        families = {m: family for m in policy.decoder.modules() if (family := router_family(m)) is not None}
        found = list(families)
        if not found:
            names = [family.name for family in ROUTERS.values()]
            raise ModelError(
                f"routing replay needs a mixture of experts of the families {', '.join(names[:-1])} or {names[-1]}; "
                f"got {type(policy.model).__name__}; set model.routing_replay=false"
            )
        if policy.path == "rows":
            raise ModelError(
                f"routing replay needs a model that runs on packed tokens; {type(policy.model).__name__} runs in rows "
                f"({policy.path_reason}); set model.routing_replay=false"
            )
        self.modules: list[nn.Module] = found
        # Asked here and not in a forward, during which peft makes an adapted router a class of its own.
        self._families = list(families.values())
        self._weights = [family.weights(m) for m, family in families.items()]
        self.per_token = int(found[0].top_k)  # type: ignore[arg-type]
        self.num_experts = int(found[0].num_experts)  # type: ignore[arg-type]
        self.active: Recording | Replay | None = None
        """Recording or replay that the present forward belongs to."""

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes of a record: one for each layer and expert, two where an expert's number needs them."""
        return len(self.modules) * self.per_token * _record_dtype(self.num_experts).itemsize

    @contextmanager
    def recording(self, hooked: bool = True) -> Iterator[Recording]:
        """Record every forward pass of the block; call `Recording.take` after each.

        Args:
            hooked: the modules are listened to. Otherwise whoever makes the forwards calls `Recording.note`.
        """
        recording = Recording(self._families, self.num_experts)
        with self._hooked(recording) if hooked else nullcontext():
            yield recording
        recording.check_taken()

    @contextmanager
    def listening(self, recording: Recording) -> Iterator[None]:
        """Let a record made with `hooked=False` take one forward that goes through the modules."""
        with self._hooked(recording):
            yield

    @contextmanager
    def replay(self, experts_Nlk: Tensor, recomputed: bool = False) -> Iterator[Replay]:
        """Replay the experts given in one forward pass over N tokens, and its backward.

        Args:
            experts_Nlk: of each token, layer and place.
            recomputed: the backward runs each layer again (activation checkpointing), by the same experts.
        """
        expected = (len(self.modules), self.per_token)
        assert experts_Nlk.shape[1:] == expected, f"experts of {tuple(experts_Nlk.shape[1:])} for routers {expected}"
        replay = Replay(experts_Nlk, self._families, self._weights, recomputed)
        with self._hooked(replay):
            yield replay
        replay.check_consumed()

    @contextmanager
    def _hooked(self, hook: Recording | Replay) -> Iterator[None]:
        assert self.active is None, "a forward is recorded or replayed, not both, and once"
        self.active = hook
        handles = [
            module.register_forward_hook(lambda _, __, output, layer=layer: hook(layer, output))
            for layer, module in enumerate(self.modules)
        ]
        try:
            yield
        finally:
            self.active = None
            for handle in handles:
                handle.remove()


def _record_dtype(num_experts: int) -> torch.dtype:
    return torch.uint8 if num_experts <= 256 else torch.int16


class Recording:
    """Record what the routers choose, forward after forward.

    Args:
        families: of the routers.
        num_experts: of a layer, which says how many bytes a choice takes.
    """

    def __init__(self, families: Sequence[RouterFamily], num_experts: int) -> None:
        self._families = families
        self._dtype = _record_dtype(num_experts)
        self._chosen: list[Tensor | None] = [None] * len(families)

    def __call__(self, layer: int, output: tuple[Tensor, Tensor, Tensor]) -> None:
        self.note(layer, output[self._families[layer].order[2]])

    def note(self, layer: int, experts_Nk: Tensor) -> None:
        """Record what one layer has chosen in the present forward; layers without a router are not counted."""
        assert self._chosen[layer] is None, f"layer {layer} was run again before its record was taken"
        self._chosen[layer] = experts_Nk.to(self._dtype)

    def take(self) -> Tensor:
        """Return the (N, l, k) experts of the forward just made, each taken once."""
        chosen = [c for c in self._chosen if c is not None]
        assert len(chosen) == len(self._chosen), f"{len(chosen)} of {len(self._chosen)} layers were recorded"
        self._chosen = [None] * len(chosen)
        return torch.stack(chosen, dim=1)

    def check_taken(self) -> None:
        """Check that nothing recorded is left over."""
        assert not any(c is not None for c in self._chosen), "a forward was recorded and its record not taken"


class Replay:
    """Sends the tokens of one forward where a record says.

    Args:
        experts_Nlk: of each token, layer and place.
        families, weights: of each layer's router.
        recomputed: see `Routers.replay`.
    """

    def __init__(
        self, experts_Nlk: Tensor, families: Sequence[RouterFamily], weights: Sequence[WeightsOf], recomputed: bool
    ) -> None:
        self._experts_Nlk = experts_Nlk
        self._families, self._weights = families, weights
        self._recomputed = recomputed
        layers = experts_Nlk.shape[1]
        self._runs = [0] * layers
        self._in_graph = [False] * layers
        self._changed: list[Tensor] = []

    def __call__(self, layer: int, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        order = self._families[layer].order
        logits_NE, live_weights_Nk, live_Nk = (output[i] for i in order)
        experts_Nk = self._experts_Nlk[:, layer].long()
        assert experts_Nk.shape == live_Nk.shape, f"{len(experts_Nk)} tokens recorded, {len(live_Nk)} in the forward"
        self._runs[layer] += 1
        assert self._runs[layer] <= 1 + self._recomputed, f"layer {layer} was run {self._runs[layer]} times"
        if self._runs[layer] == 1:
            self._in_graph[layer] = logits_NE.requires_grad
            kept_Nk = (experts_Nk[:, :, None] == live_Nk[:, None, :]).any(-1)
            self._changed.append((~kept_Nk).sum())
        weights_Nk = self._weights[layer](logits_NE, experts_Nk).to(live_weights_Nk.dtype)
        replayed = (logits_NE, weights_Nk, experts_Nk)
        return tuple(replayed[order.index(i)] for i in range(3))

    @property
    def choices(self) -> int:
        """Count the choices replayed: tokens x layers x experts per token."""
        return self._experts_Nlk.numel()

    @property
    def changed(self) -> int:
        """Count those among them whose expert the live router would not have chosen."""
        return int(torch.stack(self._changed).sum())

    def check_consumed(self) -> None:
        """Check that the forward used every layer's record once, and the backward once more where it recomputes."""
        for layer, (runs, in_graph) in enumerate(zip(self._runs, self._in_graph, strict=True)):
            # A layer below everything that is trained has no backward, and may or may not be recomputed.
            least = 2 if self._recomputed and in_graph else 1
            assert runs >= least, f"the record of layer {layer} was used {runs} times instead of {least}"


def routed_experts(experts_nlk: np.ndarray) -> RoutedExperts:
    """Make a record to keep: (tokens, layers, experts per token), uint8 or int16.

    >>> routed_experts(np.array([[[3, 1]], [[0, 2]]], dtype=np.uint8))
    RoutedExperts(indices=b'\\x03\\x01\\x00\\x02', layers=1, per_token=2, wide=False)
    """
    assert experts_nlk.dtype in (np.uint8, np.int16), f"experts are recorded as uint8 or int16, not {experts_nlk.dtype}"
    _, layers, per_token = experts_nlk.shape
    wide = experts_nlk.dtype == np.int16
    return RoutedExperts(experts_nlk.astype("<i2" if wide else "u1").tobytes(), layers, per_token, wide)


def pack_experts(spans: Sequence[tuple[RoutedExperts | None, int, int]]) -> Tensor:
    """Join recorded experts to (N, l, k) experts of packed tokens.

    Args:
        spans: records with the first token to take and one past the last, which together are all packed tokens.
    """
    parts = []
    for experts, start, stop in spans:
        assert experts is not None, "some sequences of a batch have their experts recorded and others not"
        assert stop <= experts.num_tokens, f"tokens {start}..{stop - 1} of a record of {experts.num_tokens}"
        array = np.frombuffer(experts.indices, dtype="<i2" if experts.wide else "u1")
        parts.append(array.reshape(experts.num_tokens, experts.layers, experts.per_token)[start:stop])
    packed = np.concatenate(parts)
    return torch.from_numpy(packed.astype(np.int16) if packed.dtype.itemsize == 2 else packed)
