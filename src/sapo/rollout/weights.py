"""Bring weights to an engine for as long as something is drawn from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sapo.rollout.engine import Engine, Weights


@contextmanager
def loaded(engine: Engine, weights: Weights, version: int) -> Iterator[None]:
    """Wake an engine and give it weights; let it sleep again afterwards, whatever happened.

    Args:
        version: updates made by the weights.
    """
    engine.wake()
    try:
        engine.set_weights(weights, version)
        yield
    finally:
        engine.sleep()
