"""Make a group of scored completions: shape its rewards, compute its advantages, mask its overlong completions.

The verifier's reward itself never changes: pass@1, the curriculum and the logs use it. Overlong completions can be
handled in the two ways of DAPO (https://arxiv.org/abs/2503.14476, section 3.4).

Overlong filtering masks the loss of truncated completions. As in the paper, the mean and the deviation of the group
still include their rewards. A masked completion leaves every denominator, so the gradient is that of the batch without
it. The paper's token mean does the same, whereas TRL's mean over sequences shrinks with each masked one.

Soft overlong punishment, equation (13), is added to the reward before the advantages.

A completion whose verifier or environment failed is masked, and its reward is in neither the mean nor the deviation of
the group: a reward of 0 would say that the answer was wrong.

Where an environment says what each turn earned, turns have advantages of their own; see `objectives.turn_advantages`.

Random rewards are a control experiment: the advantages carry no information on the answers. Each is a function of the
seed, the prompt, the place in the group and the tokens, so that a resumed run draws the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch

from sapo.config import RolloutConfig
from sapo.data import Completion, Group, Prompt
from sapo.errors import ConfigError
from sapo.objectives import OBJECTIVES, Objective, group_advantages, turn_advantages


def overlong_penalty(length: int, *, max_length: int, buffer: int) -> float:
    """Return DAPO's length penalty: 0 up to max_length - buffer, then linear down to -1 at max_length. Equation (13):

        R_length(y) = ((L_max - L_cache) - |y|) / L_cache      for L_max - L_cache < |y| <= L_max

    Args:
        length: |y|, tokens of the response, stop token included.
        max_length: L_max, the limit of the sampler.
        buffer: L_cache, the tokens before the limit over which the penalty falls.

    >>> [overlong_penalty(n, max_length=20, buffer=4) for n in (16, 17, 19, 20)]
    [0.0, -0.25, -0.75, -1.0]
    """
    return min(0, max_length - buffer - length) / buffer


def random_reward(seed: int, prompt: Prompt, sample: int, completion: Completion) -> float:
    """Return 0 or 1 with equal probability, independent of the answer and of every other completion.

    >>> completion = Completion((5, 2), (-0.1, -0.2), "stop")
    >>> [random_reward(0, Prompt(7, "t", "?"), sample, completion) for sample in range(6)]
    [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    """
    about = f"{seed}/{prompt.task}/{prompt.id}/{sample}/{tuple(completion.token_ids.tolist())}"
    return float(hashlib.blake2b(about.encode(), digest_size=1).digest()[0] & 1)


def shape_group(
    prompt: Prompt, scored: Sequence[Completion], settings: RolloutConfig, advantage: str, coin_seed: int | None = None
) -> Group:
    """Return the group of scored completions with its advantages.

    Args:
        settings: `overlong`, `overlong_buffer`, `max_new_tokens` and `turns.credit` are used.
        advantage: kind of advantage, see `objectives.group_advantages`.
        coin_seed: seed of random rewards (experiments.rewards=random); None takes the verifier's rewards.
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
    failed = [c.score.status.failed for c in scored]
    if any(failed):
        masked = tuple(m or f for m, f in zip(masked or [False] * len(scored), failed, strict=True))
    by_turn: tuple[tuple[float, ...], ...] = ()
    if has_turn_rewards(scored, settings) and coin_seed is None:
        by_turn = _by_turn(scored, rewards, failed, advantage)
    return Group(
        prompt,
        tuple(scored),
        advantages_of_scored(rewards, failed, advantage),
        shaped,
        masked,
        turn_advantages=by_turn,
    )


def has_turn_rewards(scored: Iterable[Completion], settings: RolloutConfig) -> bool:
    """Return whether turns are to have advantages of their own: an environment told their rewards apart."""
    return settings.turns.credit == "turn" and any(c.score.turn_rewards for c in scored)


def require_token_advantages(objective: Objective, whose: str) -> None:
    """Refuse rewards of single turns under an objective that gates whole sequences.

    >>> require_token_advantages(OBJECTIVES["sapo"](), "task 'guess'")

    Raises:
        ConfigError: the objective takes one advantage for a sequence.
    """
    if objective.shared_advantage:
        able = ", ".join(name for name, known in OBJECTIVES.items() if not known.shared_advantage)
        raise ConfigError(
            f"{whose} gives a reward for each turn, which takes an objective with an advantage of its own for each "
            f"token ({able}); got {objective.name}, which takes one for a sequence; choose one of those, or set "
            "rollout.turns.credit=episode"
        )


def _by_turn(
    scored: Sequence[Completion], rewards: Sequence[float], failed: Sequence[bool], kind: str
) -> tuple[tuple[float, ...], ...]:
    """Return the advantages of the turns of each completion; 0 for those that failed."""
    kept = [
        (list(c.score.turn_rewards or (0.0,) * len(c.turns)), reward)
        for c, reward, without in zip(scored, rewards, failed, strict=True)
        if not without
    ]
    returns = torch.tensor([reward for _, reward in kept], dtype=torch.float64)
    found = iter(turn_advantages([by_turn for by_turn, _ in kept], returns, kind) if kept else [])
    return tuple(
        (0.0,) * len(c.turns) if without else tuple(next(found)) for c, without in zip(scored, failed, strict=True)
    )


def advantages_of_scored(rewards: Sequence[float], failed: Sequence[bool], kind: str) -> tuple[float, ...]:
    """Return the advantages among those that did not fail, and 0 for the others."""
    kept = [reward for reward, without in zip(rewards, failed, strict=True) if not without]
    if not kept:
        return (0.0,) * len(rewards)
    found = iter(group_advantages(torch.tensor(kept, dtype=torch.float64), kind).tolist())
    return tuple(0.0 if without else next(found) for without in failed)
