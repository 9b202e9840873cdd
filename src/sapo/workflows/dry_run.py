"""A dry run: everything a run would load and check, its memory, and the prompts as the model would see them.

Nothing is written and no cold start is made: where the cache has none, an untrained model of its shape is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sapo.config import RunConfig
from sapo.data import Prompt
from sapo.model.adapters import add_adapter, trained_sentence
from sapo.model.policy import Policy
from sapo.rollout.prompting import encode_by_task
from sapo.rollout.registry import prove_engine
from sapo.rollout.selection import Position, Selector
from sapo.run.preflight import check_prompts, limit_prompts, load_tasks, prompt_warnings, try_rewards
from sapo.tasks import TriedReward, notices_of
from sapo.utils.hashing import seed_for
from sapo.workflows.coldstart import coldstart_path, fresh_policy
from sapo.workflows.memory import MemoryEstimate, baseline_bytes, estimate_memory
from sapo.workflows.rehearsal import rehearse_saving
from sapo.workflows.start import train_vision

SHOWN_PROMPTS = 2


@dataclass(frozen=True)
class SeenPrompt:
    """A prompt as the model sees it.

    >>> SeenPrompt("add4", (1, 2, 10, 3, 11), ("1", "2", "+", "3", "="), "12+3=", "15", ("\\n",)).text
    '12+3='
    """

    task: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    """Each token's own text, special tokens by their names."""
    text: str
    """All tokens decoded together, special tokens included."""
    answer: str | None
    stop: tuple[str, ...]
    """Strings that end a completion, in addition to the end token."""


@dataclass(frozen=True)
class DryRun:
    """What a recipe would do. See `sapo.workflows.train.dry_run`."""

    config: RunConfig
    batch_sentence: str
    model: str
    """Architecture, parameters, precision, device."""
    coldstart_missing: bool
    """The starting model is not in the cache: a run would make it first."""
    held_out: dict[str, int]
    """Held-out problems found, by task."""
    prompts: tuple[SeenPrompt, ...]
    rewards: tuple[TriedReward, ...]
    """What the user's own reward functions gave for a made completion."""
    memory: MemoryEstimate
    warnings: tuple[str, ...] = ()
    """What is no mistake and rarely meant."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value, without the recipe."""
        return {
            "batches": self.batch_sentence,
            "model": self.model,
            "coldstart_missing": self.coldstart_missing,
            "held_out": self.held_out,
            "prompts": [dict(p.__dict__) for p in self.prompts],
            "rewards": [{"task": r.task, "completion": r.completion, "reward": r.score.reward} for r in self.rewards],
            "memory": self.memory.to_json(),
            "warnings": list(self.warnings),
        }


def rehearse(
    config: RunConfig,
    load: Callable[[RunConfig], Policy],
    load_reference: Callable[[RunConfig], Policy | None] = lambda _: None,
) -> DryRun:
    """Load tasks and model, check what a run checks, and estimate its memory.

    Args:
        config: with its threads and device resolved.
        load: the policy of a recipe, from its directory or the cold start's cache.
        load_reference: the frozen policy a run keeps beside it, when it keeps one.

    Raises:
        ConfigError, ModelError, TaskError: what a run would raise before it begins.
    """
    tasks = load_tasks(config)
    rewards = try_rewards(tasks)
    missing = config.model.coldstart is not None and not (coldstart_path(config) / "coldstart.json").is_file()
    policy = _stand_in(config) if missing else load(config)
    limit_prompts(policy, tasks)
    check_prompts(config, policy, tasks)
    rehearse_saving(policy)
    prove_engine(policy, config.rollout)
    warnings = (*notices_of(tasks.train), *prompt_warnings(config, policy, tasks), *policy.notices)
    selector = Selector(tasks.train, [t.weight for t in config.tasks], config.rollout, tasks.curricula)
    prompts = encode_by_task(policy, tasks.formats, tasks.train, selector.first_prompts(0, Position()))
    reference = _stand_in(config) if missing and _copy_is_kept(config) else load_reference(config)
    baseline = baseline_bytes(*(p for p in (policy, reference) if p is not None))
    return DryRun(
        config=config,
        batch_sentence=config.batch_sentence(),
        model=(
            f"{type(policy.model).__name__}, {policy.num_parameters:,} parameters, {str(policy.dtype)[6:]} on "
            f"{policy.device}, {'on packed tokens' if policy.path == 'packed' else 'in padded rows'}"
            + ("" if policy.adapter is None else f"; {trained_sentence(policy)}")
        ),
        coldstart_missing=missing,
        held_out={t.name: len(t.held_out(config.eval.problems)) for t in tasks.held_out},
        prompts=tuple(_seen(policy, p) for p in _one_of_each_task(prompts)),
        rewards=rewards,
        memory=estimate_memory(config, policy, prompts, baseline, reference),
        warnings=warnings,
    )


def _one_of_each_task(prompts: list[Prompt]) -> list[Prompt]:
    """Return two prompts, of different tasks where there are several."""
    first_of_task = list({p.task: p for p in reversed(prompts)}.values())
    rest = [p for p in prompts if p not in first_of_task]
    return [*reversed(first_of_task), *rest][:SHOWN_PROMPTS]


def _seen(policy: Policy, prompt: Prompt) -> SeenPrompt:
    ids = list(prompt.token_ids)
    decode = policy.tokenizer.decode
    return SeenPrompt(
        task=prompt.task,
        token_ids=prompt.token_ids,
        tokens=tuple(decode([i], skip_special_tokens=False, clean_up_tokenization_spaces=False) for i in ids),
        text=policy.show_prompt(prompt),
        answer=prompt.answer,
        stop=prompt.stop,
    )


def _stand_in(config: RunConfig) -> Policy:
    assert config.model.coldstart is not None
    policy = fresh_policy(config.model.coldstart)
    if config.model.dtype == "bfloat16":
        policy.model.bfloat16()
    policy.model.to(config.device)
    if config.model.lora is not None:
        seed, vision = seed_for(config.seed, "adapter"), config.model.vision.train
        add_adapter(policy, **config.model.lora.model_dump(), seed=seed, vision=vision)
    if policy.vision is not None:
        policy.vision.family.limit(config.model.vision.max_tokens_per_picture)
    train_vision(config, policy)
    return policy


def _copy_is_kept(config: RunConfig) -> bool:
    """Tell whether a run keeps a frozen copy of the model it starts from, for a KL penalty."""
    kl = config.objective.kl
    return kl is not None and kl.reference is None and config.model.lora is None
