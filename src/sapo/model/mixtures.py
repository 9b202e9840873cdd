"""What a model's config says of its experts, under the names that transformers has for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NAMES = ("num_experts", "num_local_experts", "n_routed_experts")


def num_experts(settings: Mapping[str, Any]) -> int:
    """Return the experts of a block, 0 of a dense model.

    Args:
        settings: what config.json holds. A model with a vision tower has those of its decoder under text_config.

    >>> num_experts({"num_local_experts": 8}), num_experts({"text_config": {"num_experts": 128}}), num_experts({})
    (8, 128, 0)
    """
    decoder = settings.get("text_config")
    sections = (settings, decoder) if isinstance(decoder, Mapping) else (settings,)
    found = (section.get(name) for section in sections for name in _NAMES)
    return next((count for count in found if isinstance(count, int) and count > 0), 0)
