"""Groups, policies and trainers of the tests of updates."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import torch

from sapo.data import Completion, Group, Prompt, Score
from sapo.model.loading import prepare_policy
from sapo.model.policy import Policy
from sapo.model.routing import Routers
from sapo.model.tiny import character_tokenizer, tiny_model
from sapo.objectives import Objective, group_advantages, make_objective, policy_loss
from sapo.training.forward import loss_and_surrogate
from sapo.training.logprobs import GroupLogprobs
from sapo.training.optimizer import PolicyOptimizer
from sapo.training.packer import Packer
from sapo.training.settings import TrainerSettings
from sapo.training.trainer import Trainer
from support.plain_models import plain_copy

ALPHABET = "0123456789+-*%=;#"


MAX_NEW_TOKENS = 12


def make_policy(
    dtype: torch.dtype = torch.float64, architecture: str = "qwen3", seed: int = 1, layers: int = 2
) -> Policy:
    tokenizer = character_tokenizer(ALPHABET)
    model = tiny_model(
        architecture,
        len(tokenizer),
        seed=seed,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=16,
        layers=layers,
        heads=2,
        kv_heads=1,
        intermediate_size=24,
        max_length=64,
    )
    if architecture == "qwen3_moe":
        model.set_experts_implementation("eager")  # torch's grouped product has no float64
    return prepare_policy(model.to(dtype), tokenizer)


def make_groups(count: int = 4, samples: int = 3, seed: int = 0) -> list[Group]:
    """Groups of random completions of unequal length, log pi_old near the truth of a fresh model, one flat group."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, size: int) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    groups = []
    for i in range(count):
        prompt = Prompt(id=i, task="random", text="", token_ids=tuple(integers(0, 17, 3 + 2 * i)))
        completions = []
        for j in range(samples):
            length = integers(1, MAX_NEW_TOKENS + 1, 1)[0]
            noise = (0.4 * torch.randn(length, generator=generator)).tolist()
            reward = 1.0 if i == 1 else float((i + j) % 2)  # the group of prompt 1 has zero variance
            completions.append(
                Completion(tuple(integers(0, 18, length)), tuple(-2.9 + n for n in noise), "stop", score=Score(reward))
            )
        rewards = torch.tensor([c.score.reward for c in completions], dtype=torch.float64)
        groups.append(Group(prompt, tuple(completions), tuple(group_advantages(rewards).tolist())))
    return groups


class DrivenTrainer(Trainer):
    """A trainer with the driver's side of it, which tests play themselves."""

    def __init__(
        self, policy: Policy, optimizer: PolicyOptimizer, settings: TrainerSettings, packer: Packer, **options
    ):
        super().__init__(policy, optimizer, settings, **options)
        self.pack = packer.pack
        self.groups = GroupLogprobs(self, packer)


def make_optimizer(policy: Policy, **options: Any) -> PolicyOptimizer:
    """AdamW over what the policy trains, without clipping."""
    trained = [(n, p) for n, p in policy.model.named_parameters() if p.requires_grad]
    defaults: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "grad_clip": None}
    return PolicyOptimizer(trained, **{**defaults, **options})


def make_trainer(
    policy: Policy,
    objective: str | Objective = "sapo",
    *,
    reference: Policy | None = None,
    routers: Routers | None = None,
    **options,
) -> DrivenTrainer:
    """Make a trainer; `options` are settings of the trainer and of the packer."""
    packing = {f.name: options.pop(f.name) for f in fields(Packer) if f.name in options}
    made = make_objective(objective) if isinstance(objective, str) else objective
    settings = TrainerSettings(**{"objective": made, "temperature": 1.0, **options})
    packer = Packer(
        **{
            "normalizer": "sequence_mean",
            "tokens_per_microbatch": 10_000,
            "max_new_tokens": MAX_NEW_TOKENS,
            "device": policy.device,
            "include_flat": settings.kl is not None,
            **packing,
        }
    )
    return DrivenTrainer(policy, make_optimizer(policy), settings, packer, reference=reference, routers=routers)


def packed_gradient(trainer: DrivenTrainer, groups: list[Group], include_all: bool = False) -> dict[str, torch.Tensor]:
    """The gradient the trainer would step with."""
    for batch in trainer.pack(groups, include_all).microbatches:
        with trainer.replaying(batch):
            loss_and_surrogate(trainer.policy, batch, trainer.settings)[0].backward()
    return take_gradient(trainer.policy)


def take_gradient(policy: Policy) -> dict[str, torch.Tensor]:
    gradient = {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in policy.model.named_parameters()
    }
    policy.model.zero_grad()
    return gradient


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    """Equal up to the float32 in which transformers computes norms and rotations whatever the model's dtype."""
    scale = max(g.abs().max().item() for g in right.values())
    assert scale > 0, "the reference gradient is zero: nothing would be compared"
    for name, gradient in right.items():
        torch.testing.assert_close(
            left[name], gradient, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def plain_gradient(
    policy: Policy, groups: list[Group], objective: str, normalizer: str, temperature: float = 1.0
) -> dict[str, torch.Tensor]:
    """The same by the plainest means: transformers' own forward, one padded row a sequence, autograd throughout."""
    model = plain_copy(policy.model)
    rows = [(g.prompt, c, a) for g in groups for c, a in zip(g.completions, g.advantages, strict=True)]
    longest = max(len(c) for _, c, _ in rows)
    logps, olds, masks = [], [], []
    for prompt, completion, _ in rows:
        ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
        logits = model(input_ids=ids, use_cache=False).logits[0] / temperature
        start = len(prompt.token_ids) - 1
        logp = torch.log_softmax(logits[start:-1], -1).gather(1, ids[0, start + 1 :, None])[:, 0]
        pad = (0, longest - len(completion))
        logps.append(torch.nn.functional.pad(logp, pad, value=math.nan))
        olds.append(torch.nn.functional.pad(torch.tensor(completion.logprobs).float().double(), pad))
        masks.append(torch.nn.functional.pad(torch.ones(len(completion), dtype=torch.bool), pad))
    loss = policy_loss(
        objective,
        torch.stack(logps),
        torch.stack(olds),
        torch.tensor([a for _, _, a in rows], dtype=torch.float64),
        torch.stack(masks),
        normalizer=normalizer,
        max_length=MAX_NEW_TOKENS,
    )
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
