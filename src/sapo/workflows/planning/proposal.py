"""What to change where a plan does not fit: settings that exist, tried by planning anew with each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sapo.config import RunConfig
from sapo.model.context import check_heads
from sapo.workflows.planning.memory import draws_elsewhere
from sapo.workflows.planning.plan import Plan, make_plan

MOST_RANKS = 1024
LEAST_GAIN = 0.01
"""Share of what is missing that a change must save to be kept."""

Changes = dict[str, Any]


@dataclass(frozen=True)
class Proposal:
    """Settings under which a recipe fits, or comes as near as it can.

    >>> print(Proposal({"train.ranks": 16, "train.activation_checkpointing": True}, None).overrides)
    train.ranks=16 train.activation_checkpointing=true
    """

    changes: Changes
    remaining: str | None
    """What still does not fit with all changes; None where everything does."""

    @property
    def overrides(self) -> str:
        """Return the changes as they are written on the command line."""
        return " ".join(
            f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in self.changes.items()
        )


def propose(plan: Plan) -> Proposal | None:
    """Return the least that makes a plan fit; None for one that does.

    One change that is enough by itself is preferred, in the order of what it costs: none in the result or in time
    first, more GPUs last. Otherwise changes are added one after the other.
    """
    if plan.fits:
        return None
    for changes in _singly(plan):
        if (found := _replan(plan, changes)) is not None and found.fits:
            return Proposal(changes, None)
    kept: Changes = {}
    best = plan
    for setting in _SETTINGS:
        for changes in setting(best):
            found = _replan(best, changes)
            if found is None or best.needed - found.needed < LEAST_GAIN * (best.needed - best.capacity):
                continue
            kept, best = kept | changes, found
            if best.fits:
                return Proposal(_needed_of(plan, kept), None)
    return Proposal(kept, best.first_too_large())


def _needed_of(plan: Plan, changes: Changes) -> Changes:
    """Return the changes without those that later ones have made needless."""
    for key in list(changes):
        without = {k: v for k, v in changes.items() if k != key}
        if without and (found := _replan(plan, without)) is not None and found.fits:
            changes = without
    return changes


def _replan(plan: Plan, changes: Changes) -> Plan | None:
    """Return the plan with some settings changed; None where they do not go together."""
    try:
        return make_plan(_changed(plan.config, changes), plan.machine, plan.work.prompt_tokens)
    except ValueError:
        return None


def _changed(config: RunConfig, changes: Changes) -> RunConfig:
    settings = config.model_dump(mode="json")
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        place = settings
        for part in section.split("."):
            place[part] = place[part] or {}
            place = place[part]
        place[name] = value
    return RunConfig.model_validate(settings, context={"recorded": True})


def _singly(plan: Plan) -> Iterator[Changes]:
    for setting in _SETTINGS:
        yield from setting(plan)


def _fewer_tokens(plan: Plan) -> Iterator[Changes]:
    """Bounds activations and changes no result; below the longest sequence nothing more is saved."""
    longest = plan.work.prompt_tokens + plan.work.new_tokens - 1
    tokens = plan.config.train.tokens_per_microbatch // 2
    while tokens >= longest:
        yield {"train.tokens_per_microbatch": tokens}
        tokens //= 2


def _fewer_rows(plan: Plan) -> Iterator[Changes]:
    """Bounds the cache of the engine and changes no completion."""
    rows = min(plan.config.rollout.max_rows, plan.work.rows) // 2
    while plan.config.rollout.engine == "local" and not draws_elsewhere(plan.config) and rows >= plan.work.samples:
        yield {"rollout.max_rows": rows}
        rows //= 2


def _checkpointing(plan: Plan) -> Iterator[Changes]:
    """Costs about a third more time."""
    if not plan.config.train.activation_checkpointing:
        yield {"train.activation_checkpointing": True}


def _smaller_engine(plan: Plan) -> Iterator[Changes]:
    """Leaves vLLM less of the GPU, as long as its weights fit."""
    vllm = plan.config.rollout.vllm
    share = 0.5 if vllm is None else vllm.gpu_memory_utilization
    least = 1.1 * plan.shape.weight_bytes / (plan.machine.gpu_memory * 2**30)
    here = plan.config.rollout.engine == "vllm" and not draws_elsewhere(plan.config)
    while here and (share := round(share - 0.1, 2)) >= max(least, 0.1):
        yield {"rollout.vllm.gpu_memory_utilization": share}


def _shared_microbatches(plan: Plan) -> Iterator[Changes]:
    """Splits each micro-batch over several ranks."""
    train, sharing = plan.config.train, plan.config.train.context_parallel * 2
    while sharing <= min(train.ranks, 8):
        shape = plan.shape
        splits = shape.path == "packed" and train.ranks % sharing == 0
        if splits and check_heads(shape.heads, shape.kv_heads, sharing, shape.chunk_tokens > 0) is None:
            yield {"train.context_parallel": sharing}
        sharing *= 2


def _fewer_replicas(plan: Plan) -> Iterator[Changes]:
    """Slices the weights over more ranks."""
    replicas = plan.config.train.replicas // 2
    while replicas >= 1:
        yield {"train.replicas": replicas}
        replicas //= 2


def _narrow(plan: Plan) -> Iterator[Changes]:
    """Passes in 16 bits round their results."""
    if plan.config.model.dtype == "float32":
        yield {"model.dtype": "bfloat16"}


def _more_ranks(plan: Plan) -> Iterator[Changes]:
    """Slices everything but activations over more GPUs."""
    ranks = plan.config.train.ranks * 2
    while ranks <= MOST_RANKS:
        yield {"train.ranks": ranks}
        ranks *= 2


_SETTINGS = (
    _fewer_tokens,
    _fewer_rows,
    _checkpointing,
    _smaller_engine,
    _fewer_replicas,
    _shared_microbatches,
    _narrow,
    _more_ranks,
)
