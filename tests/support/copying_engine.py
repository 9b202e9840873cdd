"""An engine that copies the weights, and can be told to keep old ones: what a faulty sync does."""

from __future__ import annotations

from typing import ClassVar

from sapo.rollout.engine import Capabilities
from sapo.rollout.local.engine import LocalEngine


class CopyingEngine(LocalEngine):
    """The local engine, sampling from a copy; from the version `stale_from` on it keeps the copy it has."""

    capabilities: ClassVar[Capabilities] = Capabilities(copies_weights=True)
    stale_from: int | None = None

    def set_weights(self, weights, version):
        if self.stale_from is None or version < self.stale_from:
            self.copy = {name: tensor.clone() for name, tensor in weights}
        super().set_weights(iter(self.copy.items()), version)
