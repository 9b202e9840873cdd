"""Cold start: a tiny model from scratch, trained on worked examples until it sometimes answers right.

Reinforcement learning needs a policy that sometimes succeeds. This one is trained on the task's own worked examples by
maximum likelihood and stopped at a chosen pass@1 on the training side's next problems, never the held-out ones. It is
cached by the hash of its recipe, so that runs that differ in objective or seed share it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from sapo.config import ColdStartConfig, PromptConfig, RolloutConfig, RunConfig
from sapo.data import Completion, Group, PackedBatch, Prompt
from sapo.errors import ColdStartError, ConfigError, Interrupted
from sapo.model.head import policy_head
from sapo.model.loading import prepare_policy
from sapo.model.policy import Policy
from sapo.model.sources import cache_directory
from sapo.model.tiny import character_tokenizer, tiny_model
from sapo.rollout.drawing import draw
from sapo.rollout.engine import Request
from sapo.rollout.params import SamplingParams
from sapo.rollout.prompting import PromptFormat
from sapo.rollout.registry import make_engine
from sapo.rollout.weights import loaded
from sapo.tasks import ALPHABET, WorkedTask, make_task, score_groups
from sapo.training.batch import pack
from sapo.training.forward import response_states
from sapo.training.optimizer import PolicyOptimizer, learning_rate_at
from sapo.utils.files import new_directory

RECIPE_VERSION = 1
"""Increased when the same recipe would make another model."""

TOKENS_PER_MICROBATCH = 16384
"""Packed tokens of one forward pass: bounds memory and does not change the model."""

RECORDED_PROBLEMS = 512
"""Number of fresh problems behind the pass@1 in coldstart.json."""


@dataclass(frozen=True)
class ColdStartProgress:
    """One evaluation of a cold start in progress."""

    update: int
    loss: float
    pass_at_1: float
    seconds: float


def coldstart_path(config: RunConfig) -> Path:
    """Return the cache entry of a recipe's cold start: a hash of everything that shapes the model, and of nothing
    else."""
    recipe = {
        "version": RECIPE_VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "coldstart": _section(config).model_dump(mode="json"),
        "task": config.tasks[0].model_dump(mode="json", exclude={"weight", "label", "curriculum", "prompt"}),
        "prompt": _prompt_section(config).model_dump(mode="json"),
        "max_new_tokens": config.rollout.max_new_tokens,
        "threads": torch.get_num_threads(),  # another number may sum in another order
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    return cache_directory() / "coldstart" / f"{config.tasks[0].name}-{_section(config).architecture}-{digest}"


def ensure_coldstart(
    config: RunConfig,
    on_progress: Callable[[ColdStartProgress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[Path, bool]:
    """Return the model directory of a recipe's cold start, made if the cache has none, and whether it was made now.

    Raises:
        ConfigError: a task without worked examples, or a prompt format that it cannot be put in.
        ModelError: a prompt format of which the cold start's characters lack some, or a chat, which it has no template
            for.
        ColdStartError: the target was not reached.
    """
    path = coldstart_path(config)
    if (path / "coldstart.json").is_file():
        return path, False
    policy, history = train_coldstart(config, on_progress, should_stop)
    record = {
        "coldstart": _section(config).model_dump(mode="json"),
        "task": config.tasks[0].model_dump(mode="json"),
        "prompt": _prompt_section(config).model_dump(mode="json"),
        "parameters": policy.num_parameters,
        "updates": history[-1].update,
        "pass@1": _recorded_pass_at_1(policy, config),
        "seconds": history[-1].seconds,
    }
    with new_directory(path, shared=True) as aside:
        policy.save(aside)
        (aside / "coldstart.json").write_text(json.dumps(record, indent=2) + "\n")
    return path, True


def train_coldstart(
    config: RunConfig,
    on_progress: Callable[[ColdStartProgress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[Policy, list[ColdStartProgress]]:
    """Train a tiny model on worked examples to the target; return the policy and its evaluations."""
    settings = _section(config)
    task, prompt_format = _taught(config)
    policy = fresh_policy(settings)
    examples = _encode_examples(policy, task, prompt_format, settings.examples)
    optimizer = PolicyOptimizer(
        list(policy.model.named_parameters()), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, grad_clip=1.0
    )
    order = np.random.Generator(np.random.PCG64(settings.seed))
    history: list[ColdStartProgress] = []
    started = time.perf_counter()
    queue: list[int] = []
    for update in range(1, settings.max_updates + 1):
        if should_stop():
            raise Interrupted
        while len(queue) < settings.batch_size:
            queue += order.permutation(len(examples)).tolist()
        batch, queue = queue[: settings.batch_size], queue[settings.batch_size :]
        loss = _supervised_update(policy, optimizer, [examples[i] for i in batch], _rate(settings, update))
        if update % settings.eval_every == 0 or update == settings.max_updates:
            # Not the held-out problems: the stopping rule must not see them either.
            score = _pass_at_1(policy, config, settings.examples, settings.eval_problems)
            history.append(ColdStartProgress(update, loss, score, time.perf_counter() - started))
            on_progress(history[-1])
            if settings.target > 0 and score >= settings.target:
                return policy, history
    if settings.target > 0:
        raise ColdStartError(
            f"the cold start reached pass@1 {history[-1].pass_at_1:.3f} of {settings.target} in {settings.max_updates} "
            "updates; raise model.coldstart.max_updates or examples, or lower the target"
        )
    return policy, history


def _section(config: RunConfig) -> ColdStartConfig:
    if config.model.coldstart is None:
        raise ConfigError("the recipe has no model.coldstart section: it starts from model.path")
    return config.model.coldstart


def _prompt_section(config: RunConfig) -> PromptConfig:
    return config.tasks[0].prompt or config.prompt


def _taught(config: RunConfig) -> tuple[WorkedTask, PromptFormat]:
    """Return the task that is taught, and the format in which the run will ask its questions."""
    task = make_task(config.tasks[0].name, seed=_section(config).seed, **config.tasks[0].options)
    if not isinstance(task, WorkedTask):
        raise ConfigError(
            f"a cold start needs a task that writes worked examples (arithmetic); got {config.tasks[0].name!r}; "
            "give model.path instead"
        )
    return task, PromptFormat.of(_prompt_section(config), task)


def _rate(settings: ColdStartConfig, update: int) -> float:
    return learning_rate_at(
        update - 1,
        peak=settings.learning_rate,
        warmup_steps=settings.warmup_updates,
        total_steps=settings.max_updates,
        schedule="constant",
    )


def fresh_policy(settings: ColdStartConfig) -> Policy:
    """Make the model of a cold start before its first update."""
    tokenizer = character_tokenizer(ALPHABET)
    model = tiny_model(
        settings.architecture,
        len(tokenizer),
        seed=settings.seed,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=settings.hidden_size,
        layers=settings.layers,
        heads=settings.heads,
        kv_heads=settings.kv_heads,
        intermediate_size=settings.intermediate_size,
        experts=settings.experts,
        experts_per_token=settings.experts_per_token,
        max_length=settings.max_length,
    )
    return prepare_policy(model, tokenizer)


def _encode_examples(policy: Policy, task: WorkedTask, prompt_format: PromptFormat, count: int) -> list[Group]:
    """Encode worked examples as groups of one completion, the end token included."""
    prompts, texts = zip(*(task.worked_example(i) for i in range(count)), strict=True)
    groups = []
    for prompt, text in zip(prompt_format.encode(policy, prompts), texts, strict=True):
        ids = (*policy.encode(text), policy.tokenizer.eos_token_id)
        completion = Completion(ids, (0.0,) * len(ids), "stop", text)
        groups.append(Group(prompt, (completion,), advantages=(1.0,)))
    return groups


def _supervised_update(
    policy: Policy, optimizer: PolicyOptimizer, examples: Sequence[Group], learning_rate: float
) -> float:
    """Make one step of maximum likelihood, a mean over response tokens; return the loss in nats per token."""
    minibatch = pack(
        examples,
        normalizer="token_mean",
        tokens_per_microbatch=TOKENS_PER_MICROBATCH,
        max_new_tokens=1,
        device=policy.device,
        include_all=True,
    )
    loss = 0.0
    for batch in minibatch.microbatches:
        part = policy.run(partial(_supervised_loss, policy, batch))
        part.backward()
        optimizer.collect_gradients()
        loss += part.item()
    optimizer.step(learning_rate, optimizer.gradient_norm())
    return loss


def _supervised_loss(policy: Policy, batch: PackedBatch) -> Tensor:
    head = policy_head(
        response_states(policy, batch),
        policy.head_weight,
        batch.target_M,
        _negative_log_likelihood(batch),
        bias_V=policy.head_bias,
    )
    return head.loss


def _negative_log_likelihood(batch: PackedBatch) -> Callable[[Tensor, slice], tuple[Tensor, Tensor]]:
    weight_M = batch.weights_B[batch.sequence_M]
    return lambda logprob, at: (-(weight_M[at] * logprob).sum(), -weight_M[at])


def _recorded_pass_at_1(policy: Policy, config: RunConfig) -> float:
    """Measure pass@1 on problems that did not decide when to stop: the first evaluation to reach the target is a lucky
    one."""
    settings = _section(config)
    return _pass_at_1(policy, config, settings.examples + settings.eval_problems, RECORDED_PROBLEMS)


def _pass_at_1(policy: Policy, config: RunConfig, first: int, count: int) -> float:
    """Measure pass@1 on `count` problems of the training side, asked as the run asks them."""
    task, prompt_format = _taught(config)
    prompts: list[Prompt] = [replace(task.train_prompt(first + i), id=i) for i in range(count)]
    prompts = prompt_format.encode(policy, prompts)
    params = SamplingParams(
        max_new_tokens=config.rollout.max_new_tokens,
        seed=_section(config).seed,
        stop_token_ids=policy.stop_token_ids,
    )
    # The local engine, whichever draws for the run: the model is cached, and runs of several engines share it.
    made = make_engine(policy, RolloutConfig(cuda_graphs=config.rollout.cuda_graphs))
    with closing(made) as engine, loaded(engine, policy.weights(), version=0):
        drawn = draw(engine, [Request(p, 1) for p in prompts], params)
    scored = score_groups([(task, p, c) for p, c in zip(prompts, drawn, strict=True)])
    return float(np.mean([c.score.reward >= 1.0 for completions in scored for c in completions]))


def describe(path: Path) -> dict[str, Any]:
    """Read the record of a cached cold start."""
    record: dict[str, Any] = json.loads((path / "coldstart.json").read_text())
    return record
