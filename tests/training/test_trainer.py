"""The update: its gradient is the paper's, whatever the packing; what it refuses; what it leaves alone."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from sapo.data import Group
from sapo.errors import Interrupted, NonFiniteError
from sapo.model.adapters import add_adapter
from sapo.model.policy import Policy
from sapo.objectives import NORMALIZERS, OBJECTIVES
from sapo.rollout.engine import Request
from sapo.rollout.local.decoder import refusal
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.params import SamplingParams
from sapo.training.batch import split_minibatches
from sapo.training.optimizer import learning_rate_at
from sapo.workflows.activations import count_kept
from support.trainer_cases import (
    MAX_NEW_TOKENS,
    assert_same,
    make_groups,
    make_optimizer,
    make_policy,
    make_trainer,
    packed_gradient,
    plain_gradient,
)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_the_packed_gradient_equals_autograd_through_padded_rows(objective: str, normalizer: str) -> None:
    policy, groups = make_policy(), make_groups()
    trainer = make_trainer(policy, objective, normalizer=normalizer)
    assert_same(packed_gradient(trainer, groups), plain_gradient(policy, groups, objective, normalizer))


@pytest.mark.parametrize("architecture", ["qwen3_moe", "llama"])
def test_the_packed_gradient_is_right_on_other_architectures(architecture: str) -> None:
    policy, groups = make_policy(architecture=architecture), make_groups()
    assert_same(packed_gradient(make_trainer(policy), groups), plain_gradient(policy, groups, "sapo", "sequence_mean"))


def test_the_temperature_of_sampling_is_the_temperature_of_the_loss() -> None:
    policy, groups = make_policy(), make_groups()
    got = packed_gradient(make_trainer(policy, temperature=0.7), groups)
    assert_same(got, plain_gradient(policy, groups, "sapo", "sequence_mean", temperature=0.7))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("tokens", [1, 17, 40])
def test_microbatch_split_leaves_gradient_unchanged(objective: str, tokens: int) -> None:
    policy, groups = make_policy(), make_groups()
    whole = packed_gradient(make_trainer(policy, objective), groups)
    trainer = make_trainer(policy, objective, tokens_per_microbatch=tokens)
    assert len(trainer.pack(groups).microbatches) > 1
    assert_same(packed_gradient(trainer, groups), whole)


def test_the_order_of_groups_leaves_gradient_unchanged() -> None:
    policy, groups = make_policy(), make_groups()
    assert_same(packed_gradient(make_trainer(policy), groups[::-1]), packed_gradient(make_trainer(policy), groups))


def test_a_shared_preamble_leaves_gradient_unchanged() -> None:
    policy = make_policy()
    preamble = tuple(range(16)) + (3, 1)
    groups = [replace(g, prompt=replace(g.prompt, token_ids=preamble + g.prompt.token_ids)) for g in make_groups()]
    trainer = make_trainer(policy)
    packed_tokens = sum(b.num_tokens for b in trainer.pack(groups).microbatches)
    without = sum(b.num_tokens for b in trainer.pack(make_groups()).microbatches)
    assert packed_tokens - without == len(preamble), "the preamble is packed once, not once a prompt"
    assert_same(packed_gradient(trainer, groups), plain_gradient(policy, groups, "sapo", "sequence_mean"))


def test_activation_checkpointing_leaves_gradient_unchanged() -> None:
    groups = make_groups()
    plain = packed_gradient(make_trainer(make_policy()), groups)
    trainer = make_trainer(make_policy(), activation_checkpointing=True)
    calls = count_block_calls(trainer.policy)
    trainer.policy.model.train()
    assert_same(packed_gradient(trainer, groups), plain)
    assert calls["n"] == 2 * 2, "each of the two blocks runs once forward and once again in the backward pass"


@pytest.mark.parametrize("lora", [False, True])
def test_activation_checkpointing_leaves_the_policy_to_the_fast_forward_of_an_engine(lora: bool) -> None:
    policy = make_policy(torch.float32)
    if lora:
        add_adapter(policy, rank=2, alpha=4, targets=["q_proj", "down_proj"], seed=3)
    trainer = make_trainer(policy, activation_checkpointing=True)
    trainer.update(trainer.pack(make_groups()), 1e-2)
    assert refusal(policy) is None
    count_kept(policy, lambda: trainer.logprobs(trainer.pack(make_groups())), checkpointing=True)
    assert refusal(policy) is None


def count_block_calls(policy: Policy) -> dict[str, int]:
    calls = {"n": 0}
    for layer in policy.decoder.layers:  # type: ignore[union-attr]
        layer.self_attn.register_forward_pre_hook(lambda *_: calls.__setitem__("n", calls["n"] + 1))
    return calls


def test_zero_variance_groups_cost_no_compute_but_stay_in_the_denominators() -> None:
    policy, groups = make_policy(), make_groups()
    trainer = make_trainer(policy, normalizer="token_mean")
    minibatch = trainer.pack(groups)
    teaching = [g for g in groups if not g.zero_variance]
    assert len(teaching) == len(groups) - 1
    assert minibatch.num_targets == sum(len(c) for g in teaching for c in g.completions)
    assert minibatch.num_tokens == sum(len(c) for g in groups for c in g.completions)
    assert minibatch.microbatches[0].weights_B[0].item() == pytest.approx(1 / minibatch.num_tokens)
    assert_same(packed_gradient(trainer, groups), packed_gradient(trainer, groups, include_all=True))


@pytest.mark.parametrize("objective", ["sapo", "gspo"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_the_gradient_with_dropped_groups_is_that_of_the_smaller_batch(objective: str, normalizer: str) -> None:
    policy, groups = make_policy(), make_groups()
    kept = [g for g in groups if not g.zero_variance]
    assert len(kept) == len(groups) - 1
    trainer = make_trainer(policy, objective, normalizer=normalizer)
    assert_same(packed_gradient(trainer, kept), plain_gradient(policy, kept, objective, normalizer))
    if normalizer == "sequence_mean":  # 4 groups of 3: dropping one of them takes 3 sequences from the denominator
        scaled = {name: g * 12 / 9 for name, g in packed_gradient(trainer, groups).items()}
        assert_same(packed_gradient(trainer, kept), scaled)


@pytest.mark.parametrize("objective", ["sapo", "gspo"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_masked_completions_contribute_nothing(objective: str, normalizer: str) -> None:
    policy, groups = make_policy(), make_groups()
    masks = [tuple((i + j) % 3 == 0 for j in range(len(g.completions))) for i, g in enumerate(groups)]
    masked = [replace(g, masked=mask) for g, mask in zip(groups, masks, strict=True)]
    without = [
        Group(g.prompt, _unmasked(g.completions, mask), _unmasked(g.advantages, mask))
        for g, mask in zip(groups, masks, strict=True)
    ]
    trainer = make_trainer(policy, objective, normalizer=normalizer)
    assert_same(packed_gradient(trainer, masked), plain_gradient(policy, without, objective, normalizer))


def _unmasked(values: tuple, mask: tuple[bool, ...]) -> tuple:
    return tuple(v for v, m in zip(values, mask, strict=True) if not m)


def test_an_empty_minibatch_changes_nothing() -> None:
    policy = make_policy()
    before = {n: p.clone() for n, p in policy.model.named_parameters()}
    trainer = make_trainer(policy)
    assert trainer.update(trainer.pack(()), learning_rate=1e-2).skipped
    assert trainer.updates == 0
    assert all(torch.equal(p, before[n]) for n, p in policy.model.named_parameters())


def test_an_update_is_one_step_of_plain_adamw() -> None:
    policy, groups = make_policy(), make_groups()
    reference = copy.deepcopy(policy.model)
    for (name, parameter), gradient in zip(
        reference.named_parameters(), plain_gradient(policy, groups, "sapo", "sequence_mean").values(), strict=True
    ):
        parameter.grad = gradient
        assert name
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
    torch.optim.AdamW(reference.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1).step()
    trainer = make_trainer(policy)
    trainer.optimizer = make_optimizer(policy, weight_decay=0.1, grad_clip=0.05)
    result = trainer.update(trainer.pack(groups), learning_rate=1e-2)
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-6)
    for (name, ours), theirs in zip(policy.model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_chunks_of_the_head_leave_gradient_unchanged(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, groups = make_policy(), make_groups()
    monkeypatch.setattr("sapo.model.head.CHUNK_BYTES", 1)
    monkeypatch.setattr("sapo.model.head.MIN_CHUNK", 16)  # tokens a chunk
    trainer = make_trainer(policy, objective)
    assert trainer.pack(groups).num_targets > 3 * 16
    assert_same(packed_gradient(trainer, groups), plain_gradient(policy, groups, objective, "sequence_mean"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_microbatches_add_up_in_gradient_and_loss(dtype: torch.dtype) -> None:
    results = []
    for tokens in (10_000, 1):
        trainer = make_trainer(make_policy(dtype), tokens_per_microbatch=tokens)
        results.append(trainer.update(trainer.pack(make_groups()), learning_rate=0.0))
    tolerance = 1e-6 if dtype is torch.float64 else 0.02  # 8 bits of mantissa
    assert results[1].loss == pytest.approx(results[0].loss, rel=tolerance, abs=tolerance)
    assert results[1].grad_norm == pytest.approx(results[0].grad_norm, rel=tolerance)


def test_an_update_reports_what_it_did_token_by_token() -> None:
    policy, groups = make_policy(), make_groups()
    trainer = make_trainer(policy, tokens_per_microbatch=20)
    before = trainer.groups.compute(groups)
    result = trainer.update(trainer.pack(groups), learning_rate=1e-3)
    lengths = result.sequence_M.bincount().tolist()
    flat = [
        (c, logprobs)
        for g, per in zip(groups, before, strict=True)
        for c, logprobs in zip(g.completions, per, strict=True)
    ]
    for sequence, part in zip(result.sequence_ids, result.log_ratio_M.split(lengths), strict=True):
        completion, logprobs = flat[sequence]
        expected = torch.tensor(logprobs).double() - torch.tensor(completion.logprobs).double()
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-5)
    assert len(result.sequence_ids) == 3 * 3
    assert trainer.updates == 1


def test_a_minibatch_in_which_nothing_teaches_moves_nothing() -> None:
    policy = make_policy()
    trainer = make_trainer(policy)
    flat = [make_groups()[1]]
    trainer.update(trainer.pack(make_groups()), 1e-3)  # momentum that would move the weights
    before = copy.deepcopy(policy.model.state_dict())
    result = trainer.update(trainer.pack(flat), learning_rate=1e-3)
    assert result.skipped
    for name, tensor in policy.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("where", "cause"), [("old_logprobs", "log pi_old is not finite"), ("advantages", "an advantage is not finite")]
)
def test_a_nonfinite_update_stops_names_its_cause_and_changes_nothing(where: str, cause: str) -> None:
    policy, groups = make_policy(), make_groups()
    trainer = make_trainer(policy)
    first = groups[0]
    if where == "old_logprobs":
        broken = replace(first.completions[0], logprobs=(math.nan,) * len(first.completions[0]))
        groups[0] = replace(first, completions=(broken, *first.completions[1:]))
    else:
        groups[0] = replace(first, advantages=(math.nan, *first.advantages[1:]))
    before = copy.deepcopy(policy.model.state_dict())
    with pytest.raises(NonFiniteError, match=cause):
        trainer.update(trainer.pack(groups), 1e-3)
    assert all(torch.equal(t, before[n]) for n, t in policy.model.state_dict().items())
    assert all(p.grad is None for p in policy.model.parameters())


def test_weights_that_are_not_finite_are_named_as_the_cause() -> None:
    policy = make_policy()
    with torch.no_grad():
        policy.model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    trainer = make_trainer(policy)
    with pytest.raises(NonFiniteError, match="log pi of the policy is not finite"):
        trainer.update(trainer.pack(make_groups()), 1e-3)


def test_a_stop_between_microbatches_changes_nothing() -> None:
    policy, groups = make_policy(), make_groups()
    trainer = make_trainer(policy, tokens_per_microbatch=1)
    before = copy.deepcopy(policy.model.state_dict())
    asked = iter([False, True])
    with pytest.raises(Interrupted):
        trainer.update(trainer.pack(groups), 1e-3, should_stop=lambda: next(asked))
    assert all(torch.equal(t, before[n]) for n, t in policy.model.state_dict().items())
    assert all(p.grad is None for p in policy.model.parameters())


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
def test_the_engines_logprobs_are_the_trainers(architecture: str) -> None:
    policy = make_policy(torch.float32, architecture)
    prompts = [g.prompt for g in make_groups()]
    params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, temperature=0.8, stop_token_ids=policy.stop_token_ids)
    drawn = LocalEngine(policy).generate([Request(p, 3) for p in prompts], params)
    groups = [Group(p, c, (0.0,) * 3) for p, c in zip(prompts, drawn, strict=True)]
    trainer = make_trainer(policy, temperature=0.8)
    for group, per_group in zip(groups, trainer.groups.compute(groups), strict=True):
        for completion, logprobs in zip(group.completions, per_group, strict=True):
            assert logprobs == pytest.approx(completion.logprobs, abs=2e-5)


def test_recomputed_old_logprobs_make_the_first_update_exactly_on_policy() -> None:
    policy, groups = make_policy(torch.float32), make_groups()
    trainer = make_trainer(policy)
    recomputed = trainer.groups.attach_old(groups, sampled_at=0)
    assert len(recomputed[1].completions[0].old_logprobs) == 0, "a zero-variance group costs nothing"
    result = trainer.update(trainer.pack(recomputed), 1e-3)
    assert result.log_ratio_M.abs().max().item() < 1e-6
    with pytest.raises(AssertionError, match="sampled at update 0, weights are at 1"):
        trainer.groups.attach_old(groups, sampled_at=0)


def test_bfloat16_keeps_float32_masters_that_see_small_updates() -> None:
    policy, groups = make_policy(torch.bfloat16), make_groups()
    trainer = make_trainer(policy)
    weight = policy.model.model.layers[0].mlp.up_proj.weight
    master = trainer.optimizer.masters[[id(p) for p in trainer.optimizer.parameters].index(id(weight))]
    start = master.detach().clone()
    for _ in range(3):
        trainer.update(trainer.pack(groups), learning_rate=1e-6)
    assert weight.dtype is torch.bfloat16
    assert master.dtype is torch.float32
    assert (master - start).abs().max() > 1e-6, "the masters moved by less than bfloat16 resolves at most weights"
    assert torch.equal(weight, master.to(torch.bfloat16))


def test_a_bfloat16_gradient_points_where_the_float32_one_does() -> None:
    groups = make_groups()
    wide = packed_gradient(make_trainer(make_policy(torch.float32)), groups)
    narrow = packed_gradient(make_trainer(make_policy(torch.bfloat16)), groups)
    a, b = (torch.cat([g.flatten().double() for g in gradient.values()]) for gradient in (wide, narrow))
    # bfloat16 keeps 8 bits of mantissa: a relative error of 2^-8 a product, some ten in a row.
    assert torch.nn.functional.cosine_similarity(a, b, dim=0).item() > 0.99


def test_the_optimizer_goes_on_bitwise_from_its_saved_state() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        first = make_policy(dtype)
        trainer = make_trainer(first)
        groups = make_groups()
        trainer.update(trainer.pack(groups), 1e-3)
        second = make_policy(dtype, seed=2)
        second.model.load_state_dict(first.model.state_dict())
        resumed = make_trainer(second)
        resumed.optimizer.load_state_tensors({k: v.clone() for k, v in trainer.optimizer.state_tensors().items()})
        for each in (trainer, resumed):
            each.update(each.pack(groups), 1e-3)
        for name, tensor in first.model.state_dict().items():
            assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_minibatches_are_dealt_whole_and_evenly() -> None:
    groups = make_groups(6)
    parts = split_minibatches(groups, 3)
    assert [[g.prompt.id for g in part] for part in parts] == [[0, 3], [1, 4], [2, 5]]
    with pytest.raises(ValueError, match=r"multiple of minibatches; got 6 and 4; use 8 prompts"):
        split_minibatches(groups, 4)


def test_minibatches_of_what_was_left_differ_by_one_group_and_may_be_empty() -> None:
    groups = make_groups(5)
    assert [len(part) for part in split_minibatches(groups, 3, uneven=True)] == [2, 2, 1]
    assert [len(part) for part in split_minibatches(groups[:2], 4, uneven=True)] == [1, 1, 0, 0]
    assert split_minibatches([], 2, uneven=True) == [(), ()]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # by hand: two steps of warm-up to 1.0, then ten steps of schedule towards 0.1
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.1 + 0.9 * 0.5, 0.1 + 0.9 * 0.1]),
        ("cosine", [0.5, 1.0, 1.0, 0.1 + 0.9 * 0.5, 0.1 + 0.45 * (1 + math.cos(0.9 * math.pi))]),
    ],
)
def test_learning_rate_warms_up_and_then_follows_its_schedule(schedule: str, expected: list[float]) -> None:
    rates = [
        learning_rate_at(s, peak=1.0, warmup_steps=2, total_steps=12, schedule=schedule, minimum=0.1)
        for s in (0, 1, 2, 7, 11)
    ]
    assert rates == pytest.approx(expected)
