"""Cold start: a tiny model from scratch, trained on worked examples until it sometimes answers right.

Reinforcement learning needs a policy that sometimes succeeds. This one is trained on the tasks' own worked examples by
maximum likelihood and stopped at a chosen pass@1 on the training side's next problems, never the held-out ones. It is
cached by the hash of its recipe, so that runs that differ in objective or seed share it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from sapo.config import ColdStartConfig, RolloutConfig, RunConfig, TaskConfig
from sapo.config.recipes import RESUMABLE_KEYS
from sapo.config.rollout import TurnsConfig
from sapo.data import Completion, Group, Observation, PackedBatch, Prompt
from sapo.environments import Said, WorkedEnvironment, is_environment
from sapo.errors import ColdStartError, ConfigError, Interrupted
from sapo.model.head import policy_head
from sapo.model.loading import prepare_policy
from sapo.model.policy import Policy
from sapo.model.sources import cache_directory
from sapo.model.tiny import TinyShape, character_tokenizer, tiny_model
from sapo.model.tiny_vision import VISION_ARCHITECTURES, picture_tokenizer, tiny_vision_model
from sapo.rollout.drawing import draw
from sapo.rollout.engine import Request
from sapo.rollout.episodes.driver import EpisodeDriver
from sapo.rollout.episodes.joining import encode_observation
from sapo.rollout.episodes.live import Play
from sapo.rollout.params import SamplingParams
from sapo.rollout.prompting import PromptFormat
from sapo.rollout.registry import make_engine
from sapo.rollout.weights import loaded
from sapo.run.inputs import modules_of
from sapo.tasks import ALPHABET, WorkedTask, make_task, prompts_for_step, score_groups
from sapo.training.batch import pack
from sapo.training.forward import response_states
from sapo.training.optimizer import PolicyOptimizer, learning_rate_at
from sapo.utils.files import new_directory
from sapo.utils.reading import read_json
from sapo.utils.rewards import is_right

RECIPE_VERSION = 1
"""Increased when the same recipe would make another model."""

TOKENS_PER_MICROBATCH = 16384
"""Packed tokens of one forward pass: bounds memory and does not change the model."""

PICTURE_TOKENS_PER_MICROBATCH = 4096
"""Likewise of the vision tower."""

RECORDED_PROBLEMS = 512
"""Number of fresh problems behind the pass@1 in coldstart.json."""


@dataclass(frozen=True)
class ColdStartProgress:
    """One evaluation of a cold start in progress."""

    update: int
    loss: float
    pass_at_1: float
    """Of several tasks, the lowest."""
    seconds: float


@dataclass(frozen=True)
class Taught:
    """A task that is taught, the format in which the run asks its questions, and how many of its examples are shown."""

    task: WorkedTask | WorkedEnvironment
    form: PromptFormat
    examples: int


def coldstart_path(config: RunConfig) -> Path:
    """Return the cache entry of a recipe's cold start: a hash of everything that shapes the model, and of nothing
    else."""
    recipe = {
        "version": RECIPE_VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **_written(config),
        "max_new_tokens": config.rollout.max_new_tokens,
        "threads": torch.get_num_threads(),  # another number may sum in another order
    }
    made = [make_task(t.name, seed=_section(config).seed, **t.options) for t in _teaching(config)]
    if any(map(is_environment, made)):
        recipe["turns"] = _turns(config)
    if modules := _own_modules(config):
        recipe["modules"] = modules
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
    scores = _recorded_pass_at_1(policy, config)
    record = {
        **_written(config),
        "parameters": policy.num_parameters,
        "updates": history[-1].update,
        "pass@1": min(scores.values()),
        "seconds": history[-1].seconds,
    } | ({"pass@1 by task": scores} if len(scores) > 1 else {})
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
    taught = _taught(config)
    policy = fresh_policy(settings)
    examples = [example for each in taught for example in _encode_examples(policy, each)]
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
            score = min(_pass_at_1(policy, config, taught, settings.eval_problems).values())
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


def _teaching(config: RunConfig) -> list[TaskConfig]:
    """Return the sections of the tasks that are taught."""
    return config.tasks if _section(config).tasks == "all" else config.tasks[:1]


def _written(config: RunConfig) -> dict[str, Any]:
    """Return what shapes the model of the sections of a recipe, as JSON."""
    section = _section(config).model_dump(mode="json")
    if section["tasks"] == "all":
        tasks = [
            t.model_dump(mode="json", exclude={"label", "curriculum"}) | {"prompt": _prompt(config, t)}
            for t in _teaching(config)
        ]
        return {"coldstart": section, "tasks": tasks}
    del section["tasks"]  # models that are cached from before the setting existed stay what they were
    task = config.tasks[0].model_dump(mode="json", exclude={"weight", "label", "curriculum", "prompt"})
    return {"coldstart": section, "task": task, "prompt": _prompt(config, config.tasks[0])}


def _turns(config: RunConfig) -> dict[str, Any]:
    """Return the limits of episodes, as JSON; those that may change in mid-run, where the model must be found again,
    at their defaults. Where episodes play and what their turns are credited with shape no cold start, and are left out:
    models that are cached from before these settings stay what they were."""
    prefix, place = "rollout.turns.", {"play_in", "env", "credit"}
    resumable = {key.removeprefix(prefix) for key in RESUMABLE_KEYS if key.startswith(prefix)} - place
    defaults = TurnsConfig().model_dump(mode="json", include=resumable)
    return config.rollout.turns.model_dump(mode="json", exclude=place) | defaults


def _own_modules(config: RunConfig) -> dict[str, str]:
    """Return the fingerprints of the modules of the user's own that the taught tasks name, by their keys."""
    found: dict[str, str] = {}
    for place, section in enumerate(_teaching(config)):
        found |= {key: each["digest"] for key, each in modules_of(section, f"tasks.{place}").items()}
    return found


def _prompt(config: RunConfig, task: TaskConfig) -> dict[str, Any]:
    return (task.prompt or config.prompt).model_dump(mode="json")


def _taught(config: RunConfig) -> list[Taught]:
    """Return the tasks that are taught; several share the examples by their weights."""
    settings = _section(config)
    made = []
    for section in _teaching(config):
        task = make_task(section.name, seed=settings.seed, **section.options)
        if not isinstance(task, WorkedTask | WorkedEnvironment):
            raise ConfigError(
                f"a cold start needs tasks that write worked examples (arithmetic, picture_sums, calculator); got "
                f"{section.name!r}; give it worked_example, or give model.path instead"
            )
        made.append((task, PromptFormat.of(section.prompt or config.prompt, task), section.weight))
    chosen = prompts_for_step([(task, weight) for task, _, weight in made], 0, settings.examples)
    return [Taught(task, form, sum(t is task for t, _ in chosen)) for task, form, _ in made]


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
    if settings.architecture in VISION_ARCHITECTURES:
        tokenizer = picture_tokenizer(ALPHABET)
        pictured, family = tiny_vision_model(settings.architecture, tokenizer, **_shape(settings))
        return prepare_policy(pictured, family.tokenizer, family)
    tokenizer = character_tokenizer(ALPHABET)
    return prepare_policy(_untrained_model(settings, tokenizer), tokenizer)


def coldstart_config(settings: ColdStartConfig) -> Any:
    """Return the transformers config of a cold start's model, whose weights are not made."""
    with torch.device("meta"):
        if settings.architecture in VISION_ARCHITECTURES:
            tokenizer = picture_tokenizer(ALPHABET)
            return tiny_vision_model(settings.architecture, tokenizer, **_shape(settings))[0].config
        return _untrained_model(settings, character_tokenizer(ALPHABET)).config


def _untrained_model(settings: ColdStartConfig, tokenizer: Any) -> Any:
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return tiny_model(settings.architecture, len(tokenizer), **ends, **_shape(settings))


def _shape(settings: ColdStartConfig) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in (*(f.name for f in fields(TinyShape)), "seed")}


def _encode_examples(policy: Policy, taught: Taught) -> list[Group]:
    """Encode a task's worked examples as groups of one completion, the end token included."""
    if not taught.examples:
        return []
    prompts, answers = zip(*(taught.task.worked_example(i) for i in range(taught.examples)), strict=True)
    groups = []
    for prompt, answer in zip(taught.form.encode(policy, prompts), answers, strict=True):
        completion = _encode_answer(policy, [("policy", answer)] if isinstance(answer, str) else answer, prompt.stop)
        groups.append(Group(prompt, (completion,), advantages=(1.0,)))
    return groups


def _encode_answer(policy: Policy, said: Sequence[Said], stop: tuple[str, ...]) -> Completion:
    """Encode an answer, or an episode, each of whose turns ends with a stop string or the end token."""
    ids: list[int] = []
    observations: list[Observation] = []
    for who, text in said:
        if who == "environment":
            observations.append(Observation(len(ids), encode_observation(policy, text), text))
            continue
        ids += policy.encode(text)
        if not any(text.endswith(string) for string in stop):
            ids.append(policy.tokenizer.eos_token_id)
    return Completion(ids, (0.0,) * len(ids), "stop", said[-1][1], observations=tuple(observations))


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
        picture_tokens_per_microbatch=PICTURE_TOKENS_PER_MICROBATCH,
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


def _recorded_pass_at_1(policy: Policy, config: RunConfig) -> dict[str, float]:
    """Measure pass@1 on problems that did not decide when to stop: the first evaluation to reach the target is a lucky
    one."""
    skipped = _section(config).eval_problems
    return _pass_at_1(policy, config, _taught(config), RECORDED_PROBLEMS, skipped)


def _pass_at_1(
    policy: Policy, config: RunConfig, taught: Sequence[Taught], count: int, skipped: int = 0
) -> dict[str, float]:
    """Measure pass@1 of each task on `count` problems of the training side, asked as the run asks them."""
    asked: list[tuple[Any, Prompt]] = []
    for each in taught:
        first = each.examples + skipped
        prompts = [replace(each.task.train_prompt(first + i), id=i) for i in range(count)]
        asked += [(each.task, p) for p in each.form.encode(policy, prompts)]
    params = SamplingParams(
        max_new_tokens=config.rollout.max_new_tokens,
        seed=_section(config).seed,
        stop_token_ids=policy.stop_token_ids,
    )
    # The local engine, whichever draws for the run: the model is cached, and runs of several engines share it.
    made = make_engine(policy, RolloutConfig(cuda_graphs=config.rollout.cuda_graphs))
    with closing(made) as engine, loaded(engine, policy.weights(), version=0):
        judged = [(task, p) for task, p in asked if not is_environment(task)]
        drawn = draw(engine, [Request(p, 1) for _, p in judged], params) if judged else []
        driver = EpisodeDriver(policy, engine, params, config.rollout.turns)
        played = iter(driver.play([Play(task, p, 1) for task, p in asked if is_environment(task)]))
    answered = iter(score_groups([(task, p, c) for (task, p), c in zip(judged, drawn, strict=True)]))
    scored = [next(played if is_environment(task) else answered) for task, _ in asked]
    return {
        each.task.name: _share_right(list(chain.from_iterable(scored[i * count : (i + 1) * count])))
        for i, each in enumerate(taught)
    }


def _share_right(completions: Sequence[Completion]) -> float:
    """Return the share of right completions among those that did not fail; 0 where all failed."""
    judged = [c.score for c in completions if not c.score.status.failed]
    return sum(is_right(score.reward) for score in judged) / max(len(judged), 1)


def describe(path: Path) -> dict[str, Any]:
    """Read the record of a cached cold start."""
    return read_json(path / "coldstart.json", "the record of a cold start", way_out=f"delete {path} to make it again")
