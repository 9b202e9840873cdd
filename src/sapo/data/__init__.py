"""The data that packages hand to each other: frozen dataclasses, each with a worked example."""

from sapo.data.packed import PackedBatch, PackedPictures, Segment
from sapo.data.pictures import Picture, PictureTokens
from sapo.data.rollouts import Completion, Group, Observation, Prompt, RoutedExperts, Score, Status

__all__ = [
    "Completion",
    "Group",
    "Observation",
    "PackedBatch",
    "PackedPictures",
    "Picture",
    "PictureTokens",
    "Prompt",
    "RoutedExperts",
    "Score",
    "Segment",
    "Status",
]
