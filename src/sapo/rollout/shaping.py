"""From scored completions to a group: what its advantages are made of, and which completions carry loss.

The verifier's reward is never changed: pass@1, the curriculum and the logs are about it. Overlong completions may be
handled in two ways of DAPO (https://arxiv.org/abs/2503.14476, section 3.4), both of which act on the side.

Overlong filtering masks the loss of truncated completions. As there, the mean and the deviation of the group still
hold their rewards. A masked completion leaves every denominator, so the gradient is that of the batch without it; the
paper's token mean does the same, while a mean over sequences of which some are masked (TRL) shrinks with each of them.

Soft overlong punishment, equation (13), is added to the reward before the advantages.

Random rewards are a control: what a run does when its advantages say nothing of the answers. A coin is a function of
seed, prompt, place in the group and tokens, so that a run that is resumed tosses the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from sapo.config import RolloutConfig
from sapo.data import Completion, Group, Prompt
from sapo.objectives import group_advantages


def overlong_penalty(length: int, *, max_length: int, buffer: int) -> float:
    """DAPO's equation (13): 0 up to max_length - buffer, then a line down to -1 at max_length.

        R_length(y) = ((L_max - L_cache) - |y|) / L_cache      for L_max - L_cache < |y| <= L_max

    Args:
        length: |y|, tokens of the response, the stop token counted.
        max_length: L_max, the most the sampler allows.
        buffer: L_cache.

    >>> [overlong_penalty(n, max_length=20, buffer=4) for n in (16, 17, 19, 20)]
    [0.0, -0.25, -0.75, -1.0]
    """
    return min(0, max_length - buffer - length) / buffer


def random_reward(seed: int, prompt: Prompt, sample: int, completion: Completion) -> float:
    """0 or 1 with equal chances, whatever was answered; independent for every completion of a run.

    >>> completion = Completion((5, 2), (-0.1, -0.2), "stop")
    >>> [random_reward(0, Prompt(7, "t", "?"), sample, completion) for sample in range(6)]
    [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    """
    about = f"{seed}/{prompt.task}/{prompt.id}/{sample}/{tuple(completion.token_ids.tolist())}"
    return float(hashlib.blake2b(about.encode(), digest_size=1).digest()[0] & 1)


def shape_group(
    prompt: Prompt, scored: Sequence[Completion], settings: RolloutConfig, advantage: str, coin_seed: int | None = None
) -> Group:
    """The group of scored completions with its advantages.

    Args:
        settings: `overlong`, `overlong_buffer` and `max_new_tokens` are used.
        advantage: see `objectives.group_advantages`.
        coin_seed: seed of random rewards (experiments.rewards=random); None for the verifier's.
    """
    rewards = [c.score.reward for c in scored]
    shaped: tuple[float, ...] = ()
    masked: tuple[bool, ...] = ()
    if coin_seed is not None:
        rewards = [random_reward(coin_seed, prompt, sample, c) for sample, c in enumerate(scored)]
        shaped = tuple(rewards)
    if settings.overlong == "penalty":
        assert settings.overlong_buffer is not None
        limit, buffer = settings.max_new_tokens, settings.overlong_buffer
        rewards = [
            r + overlong_penalty(len(c), max_length=limit, buffer=buffer) for r, c in zip(rewards, scored, strict=True)
        ]
        shaped = tuple(rewards)
    if settings.overlong == "mask":
        masked = tuple(c.finish_reason == "length" for c in scored)
    advantages = group_advantages(torch.tensor(rewards, dtype=torch.float64), advantage)
    return Group(prompt, tuple(scored), tuple(advantages.tolist()), shaped, masked)
