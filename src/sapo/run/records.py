"""Records of rollouts/*.jsonl: one for each completion, with what its update measured token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sapo.data import Group
from sapo.training.update_result import UpdateResult


def token_gates(
    result: UpdateResult, update: int, minibatches: int, samples: int, on_policy: bool
) -> dict[str, dict[str, Any]]:
    """Return what an update measured token by token, as arrays by sequence of the step.

    Args:
        update: which of the step's `minibatches`.
        samples: per prompt.
        on_policy: the update was made at the weights that sampled; the first of a stale batch is not.
    """
    lengths = result.sequence_M.bincount().tolist()
    measured = {"log_ratio": result.log_ratio_M, "gate_weight": result.weight_M, "entropy": result.entropy_M}
    by_name = {name: values.cpu().split(lengths) for name, values in measured.items() if values is not None}
    gates: dict[str, dict[str, Any]] = {}
    for number, sequence in enumerate(result.sequence_ids):
        group, sample = divmod(sequence, samples)
        place = (update + group * minibatches) * samples + sample  # the inverse of split_minibatches
        own = {name: parts[number].numpy() for name, parts in by_name.items()}
        gates[str(place)] = {"update": update, "on_policy": on_policy, **own}
    return gates


def rollout_records(
    groups: Sequence[Group],
    gates: dict[str, dict[str, Any]],
    *,
    sampler_is_old: bool,
    dropped: Sequence[Group] = (),
) -> Iterator[dict[str, Any]]:
    """Yield one record per completion for rollouts/: text, tokens, reward, advantage, log-probabilities, gates.

    What a completion does not have (a shaped reward, a mask, further figures of its verifier) is left out.

    Args:
        gates: sequence number in the step -> update, log-ratios, gate weights and entropies; a completion of a
            zero-variance group has none, and its record leaves them out.
        sampler_is_old: log pi_old is the sampler's; otherwise it is left out where the trainer computed none.
        dropped: groups that were sampled and left the batch; they come last and say so.
    """
    sequence = 0
    for place, group in enumerate((*groups, *dropped)):
        for sample, (completion, advantage) in enumerate(zip(group.completions, group.advantages, strict=True)):
            old = completion.old_logprobs
            if sampler_is_old and not len(old):
                old = completion.logprobs
            measured = gates.get(str(sequence), {})
            yield {
                "prompt_id": group.prompt.id,
                "task": group.prompt.task,
                "prompt": group.prompt.text,
                "answer": group.prompt.answer,
                "sample": sample,
                "text": completion.text,
                "reward": completion.score.reward,
                **({"shaped_reward": group.shaped_rewards[sample]} if group.shaped_rewards else {}),
                **({"masked": group.masked[sample]} if group.masked else {}),
                **({"dropped": True} if place >= len(groups) else {}),
                "status": completion.score.status.value,
                "detail": completion.score.detail,
                **({"figures": dict(completion.score.figures)} if completion.score.figures else {}),
                "advantage": advantage,
                "finish_reason": completion.finish_reason,
                "prompt_token_ids": list(group.prompt.token_ids),
                "token_ids": completion.token_ids.tolist(),
                "logprobs": completion.logprobs.tolist(),
                **({"old_logprobs": old.tolist()} if len(old) else {}),
                **{k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in measured.items()},
            }
            sequence += 1
