"""Rewards that differ within nearly every group, whatever the model says, and are the same function on every side."""

from __future__ import annotations


def of_text(completion: str) -> float:
    """By the characters of a completion; a verifier of sapo, and within TRL's reward function."""
    return sum(map(ord, completion)) % 7 / 7


def of_place(place: int) -> float:
    """By the place of a sequence in the batch, where both sides are given the same completions."""
    return place * 5 % 7 / 7
