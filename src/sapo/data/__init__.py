"""The data that packages hand to each other: frozen dataclasses, each with a worked example."""

from sapo.data.packed import PackedBatch, Segment
from sapo.data.rollouts import Completion, Group, Prompt, RoutedExperts, Score, Status

__all__ = ["Completion", "Group", "PackedBatch", "Prompt", "RoutedExperts", "Score", "Segment", "Status"]
