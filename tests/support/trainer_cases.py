"""Groups, policies and trainers of the tests of updates."""

from __future__ import annotations

import torch

from sapo.data import Completion, Group, Prompt, Score
from sapo.model.loading import prepare_policy
from sapo.model.policy import Policy
from sapo.model.tiny import character_tokenizer, tiny_model
from sapo.objectives import group_advantages, make_objective
from sapo.training.optimizer import PolicyOptimizer
from sapo.training.trainer import Trainer

ALPHABET = "0123456789+-*%=;#"


MAX_NEW_TOKENS = 12


def make_policy(dtype: torch.dtype = torch.float64, architecture: str = "qwen3", seed: int = 1) -> Policy:
    tokenizer = character_tokenizer(ALPHABET)
    model = tiny_model(
        architecture,
        len(tokenizer),
        seed=seed,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=16,
        layers=2,
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


def make_trainer(policy: Policy, objective: str = "sapo", **options: object) -> Trainer:
    optimizer = PolicyOptimizer(
        list(policy.model.named_parameters()), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, grad_clip=None
    )
    settings: dict = {
        "temperature": 1.0,
        "normalizer": "sequence_mean",
        "tokens_per_microbatch": 10_000,
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    return Trainer(policy, make_objective(objective), optimizer, **{**settings, **options})


def packed_gradient(trainer: Trainer, groups: list[Group], include_all: bool = False) -> dict[str, torch.Tensor]:
    """The gradient the trainer would step with."""
    for batch in trainer.pack(groups, include_all).microbatches:
        trainer._forward(batch)[0].loss.backward()
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
