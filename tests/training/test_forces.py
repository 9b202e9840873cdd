"""The bias forces of `sapo diagnose` are what its docstring defines: held against autograd and the rules by loops."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from sapo.objectives import make_objective
from sapo.workflows.sampler_mismatch import SYMMETRIC, SymmetricMask, _GradientSums
from support.trainer_cases import make_groups, make_policy


def by_hand(name: str, ratios: list[float], advantage: float) -> list[float]:
    """The coefficients on grad log pi, written as loops from the definitions."""
    mean = math.exp(sum(math.log(r) for r in ratios) / len(ratios))
    found = []
    for r in ratios:
        if name == "true":
            found.append(r * advantage)
        elif name == "pull":
            found.append(1 - r)
        elif name == "grpo":  # c+ is r up to 1.27, c- is r from 0.8 on
            found.append(0.5 * ((r if r <= 1.27 else 0.0) - (r if r >= 0.8 else 0.0)))
        elif name == "gspo":  # one ratio for the response, its gradient spread over its tokens
            found.append(0.5 * ((mean if mean <= 1 + 4e-4 else 0.0) - (mean if mean >= 1 - 3e-4 else 0.0)))
        elif name == "sapo":
            plus, minus = (1 / math.cosh(tau * (r - 1) / 2) ** 2 for tau in (1.0, 1.05))
            found.append(0.5 * (plus - minus) * r)
    return found


@pytest.mark.parametrize("name", ["true", "pull", "sapo", "grpo", "gspo"])
def test_the_gradients_are_those_of_the_definition(name: str) -> None:
    policy, groups = make_policy(), make_groups()
    measured = _GradientSums(policy, {n: make_objective(n) for n in ("sapo", "grpo", "gspo")}, 1.0)
    measured.add(groups, tokens_per_microbatch=60)
    model = copy.deepcopy(policy.model)
    model.set_attn_implementation("sdpa")
    sequences = sum(len(g.completions) for g in groups)
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        for completion, advantage in zip(group.completions, group.advantages, strict=True):
            ids = torch.tensor([[*group.prompt.token_ids, *completion.token_ids]])
            logits = model(input_ids=ids, use_cache=False).logits[0]
            start = len(group.prompt.token_ids) - 1
            logp = torch.log_softmax(logits[start:-1], -1).gather(1, ids[0, start + 1 :, None])[:, 0]
            ratios = (logp.detach() - torch.tensor(completion.logprobs).double()).exp().tolist()
            coefficients = torch.tensor(by_hand(name, ratios, advantage), dtype=torch.float64)
            total = total + (coefficients * logp).sum() / (len(completion) * sequences)
    expected = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    scale = max(g.abs().max().item() for g in expected if g is not None)
    assert scale > 0, "nothing would be compared"
    for got, reference in zip(measured.sums[name], expected, strict=True):
        reference = torch.zeros_like(got) if reference is None else reference
        torch.testing.assert_close(got, reference, rtol=0, atol=1e-6 * scale)


def test_a_gate_that_does_not_ask_for_the_sign_has_no_force() -> None:
    objectives = {
        "cispo": make_objective("cispo"),
        "reinforce": make_objective("reinforce"),
        SYMMETRIC: SymmetricMask(),
    }
    measured = _GradientSums(make_policy(), objectives, 1.0)
    measured.add(make_groups(), 10_000)
    for name in objectives:
        force = measured.force(name)
        assert (force.force, force.cosine) == (0.0, None)
    assert measured.force(SYMMETRIC).silenced > 0, "some ratios are outside the band"


def test_the_unbiased_square_takes_the_noise_of_the_parts_out() -> None:
    measured = _GradientSums(make_policy(), {}, 1.0)
    parts = torch.tensor([[3.0, 1.0], [3.0, -1.0], [3.0, 5.0]])
    measured.parts = len(parts)
    measured.sums["true"] = [parts.sum(0)]
    measured.squares["true"] = parts.square().sum().item()
    # by hand: the mean over the three pairs of their products, 9 - 1, 9 + 5 and 9 - 5
    assert measured.unbiased_square("true") == pytest.approx((8 + 14 + 4) / 3)
    assert measured.norm("true") == pytest.approx(math.hypot(3, 5 / 3))
