"""The correction for a sampler that is not the policy, in the update: held against autograd in float64."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from sapo.data import Group
from sapo.diagnostics import update_metrics
from sapo.errors import NonFiniteError
from sapo.objectives import OBJECTIVES, TIS, TIS_CAPS, KLPenalty, make_objective
from support.trainer_cases import assert_same, make_groups, make_policy, make_trainer, packed_gradient


def groups_with_both(old: float = 0.6) -> list[Group]:
    """Groups whose trainer says otherwise than their sampler: by up to `old` and more, a token at a time."""
    generator = torch.Generator().manual_seed(5)

    def recomputed(group: Group) -> Group:
        completions = []
        for c in group.completions:
            noise = (old * torch.randn(len(c), generator=generator)).tolist()
            completions.append(replace(c, old_logprobs=tuple(x + n for x, n in zip(c.logprobs, noise, strict=True))))
        return replace(group, completions=tuple(completions))

    return [recomputed(g) for g in make_groups()]


def autograd_gradient(policy, groups: list[Group], name: str, tis: TIS) -> dict[str, torch.Tensor]:
    """-sum over tokens of w / (length x sequences) times the objective's value, by autograd through a plain forward."""
    model = copy.deepcopy(policy.model)
    model.set_attn_implementation("sdpa")
    sequences = sum(len(g.completions) for g in groups)
    loss = torch.zeros((), dtype=torch.float64)
    for group in groups:
        for completion, advantage in zip(group.completions, group.advantages, strict=True):
            ids = torch.tensor([[*group.prompt.token_ids, *completion.token_ids]])
            logits = model(input_ids=ids, use_cache=False).logits[0]
            start = len(group.prompt.token_ids) - 1
            logp = torch.log_softmax(logits[start:-1], -1).gather(1, ids[0, start + 1 :, None])[:, 0]
            old = torch.tensor(completion.old_logprobs).double()
            w = (old - torch.tensor(completion.logprobs).double()).exp()
            if tis.mode.startswith("sequence"):
                rho = w.prod() ** (1 / len(completion)) if tis.mode == "sequence_mean" else w.prod()
                w = rho.expand(len(completion))
            cap = TIS_CAPS[tis.mode]
            if tis.mode in ("token", "sequence", "sequence_mean"):
                w = w.clamp(max=cap)
            else:
                w = torch.where((w > cap) | (w < (0.5 if tis.mode == "icepop" else 0.0)), 0.0, w)
            zeros = torch.zeros(len(completion), dtype=torch.int64)
            value = make_objective(name).surrogate(logp - old, torch.full_like(logp, advantage), zeros, 1, old).value_M
            loss = loss - (w * value).sum() / (len(completion) * sequences)
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("mode", TIS_CAPS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gradient_is_autograds_of_the_weighted_values(objective: str, mode: str) -> None:
    policy, groups, tis = make_policy(), groups_with_both(), TIS(mode=mode)
    trainer = make_trainer(policy, objective, tis=tis)
    expected = autograd_gradient(policy, groups, objective, tis)
    assert_same(packed_gradient(trainer, groups), expected)
    without = packed_gradient(make_trainer(policy, objective), groups)
    assert any((without[n] - expected[n]).abs().max() > 1e-3 * expected[n].abs().max() for n in expected)


@pytest.mark.parametrize("objective", ["sapo", "gspo"])
def test_the_split_into_micro_batches_leaves_the_weighted_gradient_unchanged(objective: str) -> None:
    policy, groups = make_policy(), groups_with_both()
    tis = TIS(mode="token")
    whole = packed_gradient(make_trainer(policy, objective, tis=tis), groups)
    parts = packed_gradient(make_trainer(policy, objective, tis=tis, tokens_per_microbatch=30), groups)
    assert_same(parts, whole, tolerance=1e-12)


def test_a_penalty_is_not_weighted() -> None:
    policy = make_policy()
    # Everything masked: what is left of the gradient is the penalty's, that of a trainer whose advantages are 0.
    groups = [
        replace(g, completions=tuple(replace(c, reference_logprobs=c.logprobs) for c in g.completions))
        for g in groups_with_both(old=0.0)
    ]
    silent = [
        replace(g, completions=tuple(replace(c, old_logprobs=c.logprobs - 9) for c in g.completions)) for g in groups
    ]
    flat = [replace(g, advantages=(0.0,) * len(g.completions)) for g in groups]
    kl = KLPenalty(coefficient=0.5, estimator="k2")
    masked = packed_gradient(make_trainer(policy, kl=kl, tis=TIS(mode="icepop")), silent)
    assert_same(masked, packed_gradient(make_trainer(policy, kl=kl), flat), tolerance=1e-12)


def test_the_figures_are_of_the_tokens_that_carried_a_gradient() -> None:
    groups = groups_with_both()
    trainer = make_trainer(make_policy(), tis=TIS())
    result = trainer.update(trainer.pack(groups), 0.0)
    figures = update_metrics(result)
    teaching = [c for g in groups if not g.zero_variance for c in g.completions]
    # by hand, in plain Python, from float32 log-probabilities
    ratio = [
        torch.tensor(o - m).exp().item() for c in teaching for o, m in zip(c.old_logprobs, c.logprobs, strict=True)
    ]
    assert figures["mismatch/abs_dev"] == pytest.approx(sum(abs(w - 1) for w in ratio) / len(ratio), rel=1e-4)
    assert figures["tis/mean"] == pytest.approx(sum(min(w, 2.0) for w in ratio) / len(ratio), rel=1e-4)
    assert figures["tis/clipped_share"] == pytest.approx(sum(w > 2 for w in ratio) / len(ratio))
    assert figures["tis/clipped_share"] > 0, "nothing would be compared"


def test_what_was_not_measured_is_left_out() -> None:
    trainer = make_trainer(make_policy())
    figures = update_metrics(trainer.update(trainer.pack(make_groups()), 0.0))  # log pi_old is the sampler's
    assert not {k for k in figures if k.startswith(("tis/", "mismatch/"))}
    figures = update_metrics(trainer.update(trainer.pack(groups_with_both()), 0.0))
    assert {k for k in figures if k.startswith(("tis/", "mismatch/"))} == {"mismatch/abs_dev"}


def test_a_mismatch_that_is_not_finite_is_named() -> None:
    groups = groups_with_both()
    first = groups[0].completions[0]
    poisoned = replace(first, logprobs=(float("nan"),) * len(first))
    groups[0] = replace(groups[0], completions=(poisoned, *groups[0].completions[1:]))
    trainer = make_trainer(make_policy(), tis=TIS())
    with pytest.raises(NonFiniteError, match="log mu is not finite"):
        trainer.update(trainer.pack(groups), 1e-3)
