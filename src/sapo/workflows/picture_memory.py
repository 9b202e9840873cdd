"""What pictures take of a run's memory: their pixels, their features where the tower is frozen, its activations where
it is trained.

As with the decoder's activations, the tower's are measured and not derived: one picture is run through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sapo.data import PackedBatch, Picture, Prompt
from sapo.model.policy import Policy
from sapo.model.vision import FEATURE_BYTES, PIXEL_BYTES
from sapo.model.vision_proof import probe_picture
from sapo.workflows.activations import count_kept


@dataclass(frozen=True)
class PictureCost:
    """Bytes of the pictures of a run.

    >>> PictureCost(pixels=1000, features=0, tower_per_token=8.0).activations(None)
    0
    """

    pixels: int
    """Preprocessed pictures that are kept on the CPU."""
    features: int
    """Features that are kept where the tower is frozen."""
    tower_per_token: float
    """What a forward pass of a trained tower keeps for its backward pass, per token of a picture."""

    def activations(self, batch: PackedBatch | None) -> int:
        """Return the bytes that the tower keeps for a micro-batch."""
        return 0 if batch is None or batch.pictures is None else int(self.tower_per_token * batch.pictures.num_tokens)


def measure_pictures(policy: Policy, prompts: Sequence[Prompt], checkpointing: bool) -> PictureCost:
    """Measure what the pictures of some prompts take, by one picture that is run through the tower."""
    vision = policy.vision
    tokens = _distinct_tokens(prompts)
    if vision is None or not tokens:
        return PictureCost(0, 0, 0.0)
    pixels = vision.pixels(probe_picture())
    kept = count_kept(policy, lambda: vision.features([probe_picture()]), checkpointing)
    (features,) = vision.features([probe_picture()])
    own = len(features.tokens_IH)
    per_token = sum(t.nbytes for t in pixels.values()) / own
    found = (features.tokens_IH, *features.deepstack_IH)
    per_feature = sum(t.nbytes for t in found) / own
    total = sum(tokens.values())
    return PictureCost(
        pixels=min(PIXEL_BYTES, int(per_token * total)),
        features=min(FEATURE_BYTES, int(per_feature * total)) if vision.frozen else 0,
        tower_per_token=0.0 if vision.frozen else kept / own,
    )


def _distinct_tokens(prompts: Sequence[Prompt]) -> dict[Picture, int]:
    shown = [(p.pictures, p.picture_tokens.places) for p in prompts if p.picture_tokens is not None]
    return {picture: len(own) for pictures, places in shown for picture, own in zip(pictures, places, strict=True)}
