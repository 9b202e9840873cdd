"""sapo's side: the local engine, the trainer, or a whole step of the loop.

rollout: LocalEngine.generate. update: pack and update for each mini-batch, log pi_old having come with the rollout, as
it does in a run. step: TrainingRun.step, everything a run does and logs between two steps.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench.rewards import of_place
from bench.sides.clock import gemm_backends, timed, use_machine
from bench.sides.serve import LEARNING_RATE, Commands, completions_of, limits_of
from sapo.config.recipes import parse_recipe
from sapo.data import Completion, Group, Prompt, Score
from sapo.model.loading import load_policy
from sapo.model.policy import Policy
from sapo.objectives import group_advantages, make_objective
from sapo.rollout.engine import Request
from sapo.rollout.experts import ExpertLog
from sapo.rollout.local.cpu.native import Kernels
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.params import SamplingParams
from sapo.run.directory import RunDirectory
from sapo.run.loop import TrainingRun
from sapo.run.machine import resolve_machine
from sapo.run.preflight import load_tasks
from sapo.training.logprobs import GroupLogprobs
from sapo.training.optimizer import PolicyOptimizer
from sapo.training.packer import Packer
from sapo.training.settings import TrainerSettings
from sapo.training.trainer import Trainer

Limits = list[list[int]]
Facts = dict[str, Any]
Work = Callable[[Limits], tuple[float, Facts]]
"""Limits of each sample to seconds and facts."""


class FixedLengths(LocalEngine):
    """An engine that gives every sample the length it is told to have, whatever ends it might draw."""

    limits: Limits = []  # noqa: RUF012 (set before it draws)

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        should_stop: Callable[[], bool] = lambda: False,
        experts: ExpertLog | None = None,
    ) -> list[tuple[Completion, ...]]:
        """See `LocalEngine.generate`."""
        held = [replace(r, limits=tuple(limits)) for r, limits in zip(requests, self.limits, strict=True)]
        return super().generate(held, replace(params, stop_token_ids=frozenset()), should_stop, experts)


def rollout(settings: dict[str, Any], device: torch.device) -> Work:
    """Draw completions of all prompts."""
    return rollout_of(load_policy(settings["model"], settings["dtype"], device), settings, device)


def rollout_of(policy: Policy, settings: dict[str, Any], device: torch.device) -> Work:
    """The same with a policy at hand."""
    prompts = [Prompt(i, "bench", "", tuple(ids)) for i, ids in enumerate(settings["prompts"])]
    sequences = sum(map(len, settings["limits"]))
    engine = FixedLengths(policy, max_rows=max(256, sequences))
    params = SamplingParams(max_new_tokens=max(map(max, settings["limits"])))

    def work(limits: Limits) -> tuple[float, Facts]:
        engine.limits = limits
        requests = [Request(p, settings["samples"]) for p in prompts]
        seconds, drawn = timed(lambda: engine.generate(requests, params), device)
        return seconds, {"tokens": sum(len(c) for group in drawn for c in group)}

    return work


def update(settings: dict[str, Any], device: torch.device) -> Work:
    """Train on given completions: a pass of mini-batches, one step of the optimizer each."""
    return update_of(load_policy(settings["model"], settings["dtype"], device), settings, device)


def update_of(policy: Policy, settings: dict[str, Any], device: torch.device) -> Work:
    """The same with a policy at hand."""
    trainer = _trainer(policy)
    packer = Packer("sequence_mean", 8192, max(map(max, settings["limits"])), policy.device)
    logprobs = GroupLogprobs(trainer, packer)

    def work(limits: Limits) -> tuple[float, Facts]:
        groups = _groups(settings["prompts"], completions_of(limits))
        groups = logprobs.attach_old(groups, trainer.updates)  # what the engine would have brought along

        def updates() -> list[Any]:
            # Groups that follow one another, as in TRL's unshuffled batch; a run deals them out like cards.
            size = len(groups) // settings["minibatches"]
            minibatches = [groups[at : at + size] for at in range(0, len(groups), size)]
            return [trainer.update(packer.pack(m), learning_rate=LEARNING_RATE) for m in minibatches]

        seconds, results = timed(updates, device)
        return seconds, {
            "tokens": sum(map(sum, limits)),
            "losses": [r.loss for r in results],
            "norms": [r.grad_norm for r in results],
        }

    return work


def _groups(prompts: list[list[int]], completions: list[list[list[int]]]) -> list[Group]:
    groups: list[Group] = []
    place = 0
    for i, (prompt, samples) in enumerate(zip(prompts, completions, strict=True)):
        rewards = [of_place(place + j) for j in range(len(samples))]
        place += len(samples)
        scored = tuple(
            Completion(tuple(ids), (0.0,) * len(ids), "length", score=Score(reward))
            for ids, reward in zip(samples, rewards, strict=True)
        )
        advantages = group_advantages(torch.tensor(rewards, dtype=torch.float64), "group_std")
        groups.append(Group(Prompt(i, "bench", "", tuple(prompt)), scored, tuple(advantages.tolist())))
    return groups


def _trainer(policy: Policy) -> Trainer:
    optimizer = PolicyOptimizer(
        [(n, p) for n, p in policy.model.named_parameters() if p.requires_grad],
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.0,
        grad_clip=1.0,
    )
    return Trainer(policy, optimizer, TrainerSettings(make_objective("sapo"), temperature=1.0))


def step(settings: dict[str, Any], device: torch.device) -> Work:
    """One step of a run: sample, score, update, log."""
    return step_of(settings, device)[0]


def step_of(settings: dict[str, Any], device: torch.device) -> tuple[Work, TrainingRun]:
    """The same, and the run."""
    run = _training_run(settings, device)
    run.loggers.open()
    engine = FixedLengths.from_settings(run.policy, run.config.rollout)
    run.engine = run.collector.engine = engine

    def work(limits: Limits) -> tuple[float, Facts]:
        engine.limits = limits
        before = dict(run.state.tokens)
        seconds, _ = timed(run.step, device)
        return seconds, {
            "tokens": run.state.tokens["generated"] - before["generated"],
            "old_logprobs": run.state.old_logprobs,
        }

    return work, run


def _training_run(settings: dict[str, Any], device: torch.device) -> TrainingRun:
    directory = Path(tempfile.mkdtemp(prefix="step-", dir=settings["scratch"]))
    asked, held = directory / "prompts.jsonl", directory / "held_out.jsonl"
    asked.write_text("".join(json.dumps({"prompt": text, "answer": ""}) + "\n" for text in settings["texts"]))
    held.write_text(json.dumps({"prompt": settings["texts"][0][::-1], "answer": ""}) + "\n")
    config = resolve_machine(
        parse_recipe(
            {
                "run_dir": str(directory / "run"),
                "threads": settings["threads"],
                "device": str(device),
                "model": {"path": settings["model"], "dtype": settings["dtype"]},
                "tasks": [
                    {
                        "name": "file",
                        "path": str(asked),
                        "held_out_path": str(held),
                        "verifier": "bench.rewards:of_text",
                        "score_truncated": True,
                    }
                ],
                "prompt": {"style": "plain"},
                "rollout": {
                    "prompts_per_step": len(settings["texts"]),
                    "samples_per_prompt": settings["samples"],
                    "max_new_tokens": max(map(max, settings["limits"])),
                },
                "train": {
                    "steps": 10_000,
                    "minibatches": settings["minibatches"],
                    "learning_rate": LEARNING_RATE,
                },
                **settings.get("recipe", {}),
            }
        )
    )
    policy = load_policy(settings["model"], settings["dtype"], device)
    return TrainingRun(config, RunDirectory.create(config), policy, load_tasks(config))


@contextmanager
def own_products() -> Iterator[dict[str, float]]:
    """Seconds in the products of packed.c meanwhile, with what it does between those of a step."""
    seconds: dict[str, float] = {}
    packed = Kernels.packed

    def timed_packed(self: Kernels, name: str, *numbers: int) -> int | None:
        start = time.perf_counter()
        result = packed(self, name, *numbers)
        if name in ("multiply", "step"):
            seconds["packed.c"] = seconds.get("packed.c", 0.0) + time.perf_counter() - start
        return result

    with patch.object(Kernels, "packed", timed_packed):
        yield seconds


ROLES = {"rollout": rollout, "update": update, "step": step}


def main(commands: Commands) -> None:
    """Serve rounds until the parent hangs up."""
    settings = commands.settings
    device = use_machine(settings)
    commands.imported()
    work = ROLES[settings["role"]](settings, device)
    warm = limits_of(settings, "warm")
    work(warm)
    with own_products() as own:
        backends = gemm_backends(lambda: work(warm), device, own)
    commands.ready(backends=backends)
    for do in commands:
        limits = limits_of(settings, do)
        seconds, facts = work(limits)
        commands.reply(seconds, sum(map(sum, limits)), **facts)
