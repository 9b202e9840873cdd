"""Records of rollouts/*.jsonl: one for each completion, with what its update measured token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from sapo.data import Completion, Group, Prompt
from sapo.data.transcripts import in_one_text, transcript
from sapo.training.update_result import UpdateResult


def token_gates(
    result: UpdateResult, update: int, minibatches: int, samples: Sequence[int], on_policy: bool
) -> dict[str, dict[str, Any]]:
    """Return what an update measured token by token, as arrays by sequence of the step.

    Args:
        update: which of the step's `minibatches`.
        samples: how many completions each group of the step has.
        on_policy: the update was made at the weights that sampled; the first of a stale batch is not.
    """
    starts = np.cumsum([0, *samples])
    places = [
        place for group in range(update, len(samples), minibatches) for place in range(*starts[group : group + 2])
    ]
    lengths = result.sequence_M.bincount().tolist()
    measured = {"log_ratio": result.log_ratio_M, "gate_weight": result.weight_M, "entropy": result.entropy_M}
    by_name = {name: values.cpu().split(lengths) for name, values in measured.items() if values is not None}
    gates: dict[str, dict[str, Any]] = {}
    for number, sequence in enumerate(result.sequence_ids):
        own = {name: parts[number].numpy() for name, parts in by_name.items()}
        gates[str(places[sequence])] = {"update": update, "on_policy": on_policy, **own}
    return gates


def rollout_records(
    groups: Sequence[Group],
    gates: dict[str, dict[str, Any]],
    *,
    sampler_is_old: bool,
    dropped: Sequence[Group] = (),
    show: Callable[[Sequence[int]], str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield one record per completion for rollouts/: text, tokens, reward, advantage, log-probabilities, gates.

    What a completion does not have (a shaped reward, a mask, further figures of its verifier) is left out.

    Args:
        gates: sequence number in the step -> update, log-ratios, gate weights and entropies; a completion of a
            zero-variance group has none, and its record leaves them out.
        sampler_is_old: log pi_old is the sampler's; otherwise it is left out where the trainer computed none.
        dropped: groups that were sampled and left the batch; they come last and say so.
        show: spells token ids out, for the transcripts of episodes; None leaves them out.
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
                **_shown(group.prompt),
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
                **_turn_fields(group, sample),
                "finish_reason": completion.finish_reason,
                "prompt_token_ids": list(group.prompt.token_ids),
                "token_ids": completion.token_ids.tolist(),
                "logprobs": completion.logprobs.tolist(),
                **({"old_logprobs": old.tolist()} if len(old) else {}),
                **({"versions": completion.versions} if completion.versions else {}),
                **_episode(completion, len(group.prompt.token_ids), show),
                **{k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in measured.items()},
            }
            sequence += 1


def sampled_completions(
    groups: Sequence[Group], show: Callable[[Sequence[int]], str] | None = None
) -> list[dict[str, Any]]:
    """Return two completions of one prompt to look at: the best and the worst of the group whose rewards differ most.

    Args:
        show: spells token ids out, so that the text of an episode is that of all its turns; None gives the last turn's.

    >>> from sapo.data import Completion, Score
    >>> wrong = Completion((5,), (-1.0,), "stop", "a", Score(0.0))
    >>> right = Completion((6,), (-1.0,), "stop", "b", Score(1.0))
    >>> [s["text"] for s in sampled_completions([Group(Prompt(0, "t", "q"), (wrong, right))])]
    ['b', 'a']
    """
    if not groups:
        return []

    def spread(group: Group) -> float:
        rewards = [completion.score.reward for completion in group.completions]
        return max(rewards) - min(rewards)

    group = max(groups, key=spread)
    ranked = sorted(group.completions, key=lambda completion: -completion.score.reward)
    return [
        {
            "task": group.prompt.task,
            "prompt": group.prompt.text,
            "text": whole_text(group, c, show),
            "reward": c.score.reward,
        }
        for c in (ranked[0], ranked[-1])
    ]


def whole_text(group: Group, completion: Completion, show: Callable[[Sequence[int]], str] | None) -> str:
    """Return the text of a completion; of an episode all turns, and what was said between them."""
    said = () if show is None else transcript(completion, len(group.prompt.token_ids), show)
    return in_one_text(said) if said else completion.text


def _turn_fields(group: Group, sample: int) -> dict[str, Any]:
    """Return rewards and advantages of single turns, where they were told apart."""
    rewards = group.completions[sample].score.turn_rewards
    return {
        **({"turn_rewards": list(rewards)} if rewards else {}),
        **({"turn_advantages": list(group.turn_advantages[sample])} if group.turn_advantages else {}),
    }


def _episode(completion: Completion, prompt_length: int, show: Callable[[Sequence[int]], str] | None) -> dict[str, Any]:
    """Return what the environment said, and all of an episode as text; nothing in a single turn.

    An observation is [own tokens before, ids, text, tokens kept], and where tools speak also who does, and in how many
    characters.
    """
    if not completion.observations:
        return {}
    said = [
        [o.at, list(o.token_ids), o.text, o.keep, *([list(map(list, o.speakers))] if o.speakers else [])]
        for o in completion.observations
    ]
    read = {} if show is None else {"transcript": list(map(list, transcript(completion, prompt_length, show)))}
    return {"observations": said, **read}


def _shown(prompt: Prompt) -> dict[str, Any]:
    """Return the pictures of a prompt by hash, with the size of each, and how many tokens in what grid it is."""
    if not prompt.pictures:
        return {}
    record: dict[str, Any] = {
        "pictures": [p.sha256 for p in prompt.pictures],
        "picture_sizes": [list(p.size) for p in prompt.pictures],
    }
    if (tokens := prompt.picture_tokens) is not None:
        record["picture_tokens"] = [len(places) for places in tokens.places]
        if tokens.positions is not None:
            _, height, width = tokens.positions
            record["picture_grids"] = [
                [len({axis[i] for i in places}) for axis in (height, width)] for places in tokens.places
            ]
    return record
