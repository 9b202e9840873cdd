"""Pictures in packed batches: log-probabilities and gradients are those of transformers' own forward, one by one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sapo.data import Completion, Group, Score
from sapo.data.messages import decode, encode
from sapo.model.context import ContextGroup, own_slice
from sapo.model.policy import Policy
from sapo.model.routing import Routers
from sapo.objectives import group_advantages, policy_loss
from sapo.rollout.engine import Request
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.params import SamplingParams
from sapo.training.batch import pack
from sapo.training.forward import response_logprobs
from sapo.training.ranks import Shares
from sapo.training.wire import read_share, share_message
from support.pictures import picture
from support.trainer_cases import MAX_NEW_TOKENS, assert_same, make_trainer, packed_gradient
from support.vision_cases import FAMILY_NAMES, SMALL, WIDE, OwnForward, make_vision_policy, mixed_prompts, shown


def groups_of(policy: Policy, prompts, samples: int = 3, seed: int = 0) -> list[Group]:
    """Random completions of unequal length; the first of each has an image token, and what else stands for pictures."""
    generator = torch.Generator().manual_seed(seed)
    marks = policy.tokenizer.convert_tokens_to_ids(policy.vision.family.image_token)
    special = [marks, *(i for i in policy.tokenizer.added_tokens_decoder if i > policy.tokenizer.pad_token_id)][:3]
    groups = []
    for number, prompt in enumerate(prompts):
        completions = []
        for j in range(samples):
            length = int(torch.randint(3, MAX_NEW_TOKENS + 1, (1,), generator=generator))
            ids = torch.randint(0, 15, (length,), generator=generator).tolist()
            if j == 0:
                ids[1 : 1 + len(special)] = special
            noise = (0.3 * torch.randn(len(ids), generator=generator)).tolist()
            reward = Score(float((number + j) % 2))
            completions.append(Completion(ids, [-3 + n for n in noise], "stop", score=reward))
        rewards = torch.tensor([c.score.reward for c in completions], dtype=torch.float64)
        groups.append(Group(prompt, tuple(completions), tuple(group_advantages(rewards).tolist())))
    return groups


def own_gradient(policy: Policy, groups: list[Group]) -> dict[str, torch.Tensor]:
    """The gradient by the plainest means: the model's own forward, a response at a time, autograd throughout."""
    own = OwnForward(policy)
    rows = [(g.prompt, c, a) for g in groups for c, a in zip(g.completions, g.advantages, strict=True)]
    longest = max(len(c) for _, c, _ in rows)
    pad = torch.nn.functional.pad
    logps = [own.logprobs(p, c.token_ids.tolist()).double() for p, c, _ in rows]
    olds = [torch.from_numpy(c.logprobs.copy()).double() for _, c, _ in rows]
    loss = policy_loss(
        "sapo",
        torch.stack([pad(x, (0, longest - len(x)), value=math.nan) for x in logps]),
        torch.stack([pad(x, (0, longest - len(x))) for x in olds]),
        torch.tensor([a for _, _, a in rows], dtype=torch.float64),
        torch.stack([pad(torch.ones(len(x), dtype=torch.bool), (0, longest - len(x))) for x in logps]),
        normalizer="sequence_mean",
        max_length=MAX_NEW_TOKENS,
    )
    loss.backward()
    return own.gradients()


def pack_all(groups, **options) -> Shares:
    settings = {"normalizer": "sequence_mean", "tokens_per_microbatch": 10_000, "max_new_tokens": MAX_NEW_TOKENS}
    return pack(groups, include_all=True, **{**settings, **options})


def packed_logprobs(policy: Policy, batch) -> torch.Tensor:
    return response_logprobs(policy, batch, temperature=1.0)


def worst_difference(policy: Policy, groups: list[Group]) -> float:
    (batch,) = pack_all(groups).microbatches
    own = OwnForward(policy)
    with torch.no_grad():
        expected = torch.cat([own.logprobs(g.prompt, c.token_ids.tolist()) for g in groups for c in g.completions])
    return (packed_logprobs(policy, batch) - expected).abs().max().item()


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_two_pictures_text_and_one_picture_in_a_row_have_the_log_probabilities_of_plain_sequences(name):
    policy = make_vision_policy(name)
    assert worst_difference(policy, groups_of(policy, mixed_prompts(policy))) < 1e-5


def test_wrong_rows_and_columns_would_be_seen(monkeypatch):
    """Positions that go by the text alone change log-probabilities, and by far more than the tolerance."""
    policy = make_vision_policy()
    groups = groups_of(policy, mixed_prompts(policy))
    monkeypatch.setattr(policy.vision.family, "positions", lambda *_: None)
    assert worst_difference(policy, groups_of(policy, mixed_prompts(policy))) > 1e-2
    monkeypatch.undo()
    assert worst_difference(policy, groups) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe"])
@pytest.mark.parametrize("part", ["tower", "merger", "none"])
def test_all_gradients_are_those_of_plain_sequences(name, part, checkpointing):
    policy = make_vision_policy(name)
    groups = groups_of(policy, mixed_prompts(policy))
    expected = own_gradient(policy, groups)
    policy.vision.train(part)
    trainer = make_trainer(policy, activation_checkpointing=checkpointing)
    with trainer._training():
        got = packed_gradient(trainer, groups)
    trained = {n: g for n, g in expected.items() if dict(policy.model.named_parameters())[n].requires_grad}
    assert any("visual" in n for n in trained) == (part != "none")
    assert_same({n: got[n] for n in trained}, trained, tolerance=1e-5)
    assert all(not got[n].any() for n in got.keys() - trained.keys())
    if part == "tower":
        for n, gradient in trained.items():
            assert gradient.any() or "lm_head" in n or "rotary" in n, n


@pytest.mark.parametrize("name", FAMILY_NAMES[2:])
def test_the_gradients_of_every_family_are_those_of_plain_sequences(name):
    policy = make_vision_policy(name)
    groups = groups_of(policy, mixed_prompts(policy))
    expected = own_gradient(policy, groups)
    assert_same(packed_gradient(make_trainer(policy), groups), expected, tolerance=1e-5)


def test_one_picture_in_three_prompts_goes_through_the_tower_once_and_its_gradient_is_whole(monkeypatch):
    policy = make_vision_policy()
    prompts = [shown(policy, f"<image>0123456789{last}", WIDE, prompt_id=last) for last in range(3)]
    groups = groups_of(policy, prompts)
    (batch,) = pack_all(groups).microbatches
    assert len(batch.pictures.pictures) == 1
    assert batch.segments[0].length == 6 + 2 + 10
    assert_same(packed_gradient(make_trainer(policy), groups), own_gradient(policy, groups), tolerance=1e-5)


def test_two_prompts_with_other_pictures_and_the_same_ids_are_told_apart():
    policy = make_vision_policy()
    prompts = [shown(policy, "<image>0123456789+", p, prompt_id=i) for i, p in enumerate((WIDE, SMALL, WIDE))]
    other = shown(policy, "<image>0123456789+", type(WIDE)(SMALL.sha256, WIDE.size, data=SMALL.data), prompt_id=3)
    assert other.token_ids == prompts[0].token_ids
    assert worst_difference(policy, groups_of(policy, prompts)) < 1e-5


def test_micro_batches_hold_no_more_of_pictures_than_their_budget_and_change_no_gradient():
    policy = make_vision_policy()
    prompts = [*mixed_prompts(policy), shown(policy, "<image>7", WIDE, prompt_id=4), *mixed_prompts(policy)[1:]]
    groups = groups_of(policy, prompts)
    whole = packed_gradient(make_trainer(policy), groups)
    for budget in (1, 10, 12, 100):
        batches = pack_all(groups, picture_tokens_per_microbatch=budget).microbatches
        held = [0 if b.pictures is None else b.pictures.num_tokens for b in batches]
        assert all(h <= budget or h in (10, 6, 4) for h in held), held  # a group by itself is not cut
        trainer = make_trainer(policy, picture_tokens_per_microbatch=budget)
        assert_same(packed_gradient(trainer, groups), whole, tolerance=1e-5)
    assert len(pack_all(groups, picture_tokens_per_microbatch=1).microbatches) > len(
        pack_all(groups, picture_tokens_per_microbatch=12).microbatches
    )


def test_groups_are_dealt_with_the_work_of_the_tower_counted():
    """Two prompts with 60 picture tokens, and one of text with 40 tokens more: by tokens, both were one rank's."""
    policy = make_vision_policy()
    prompts = [shown(policy, "<image>", picture(i, 160, 96), prompt_id=i) for i in range(2)]
    prompts.append(shown(policy, "1" * (len(prompts[0].token_ids) + 40), prompt_id=2))
    shares = pack_all(groups_of(policy, prompts, samples=1), ranks=2).of_rank
    assert [sum(b.pictures.num_tokens for b in share if b.pictures) for share in shares] == [60, 60]


def test_a_share_travels_with_the_bytes_of_its_pictures(tmp_path):
    """As a rank on another machine needs it: log pi is the same, and no file is read."""
    policy = make_vision_policy()
    file = tmp_path / "picture.png"
    file.write_bytes(WIDE.read())
    prompts = [shown(policy, "1+<image>=<image>?", replace(WIDE, data=None, path=str(file)), SMALL)]
    prompts += [shown(policy, "12+3=", prompt_id=2), shown(policy, "ab<image>", WIDE, prompt_id=3)]
    shares = pack_all(groups_of(policy, prompts), tokens_per_microbatch=30, picture_tokens_per_microbatch=12)
    message = decode(*encode(share_message(shares, 0)))
    file.unlink()
    received = read_share(message, torch.device("cpu"))
    assert sum(name.startswith("picture/") for name in message.tensors) == 2, "a picture that comes twice goes once"
    assert any(batch.pictures is None for batch in received.microbatches)
    for mine, theirs in zip(received.microbatches, shares.microbatches, strict=True):
        assert torch.equal(packed_logprobs(policy, mine), packed_logprobs(policy, theirs))


@pytest.mark.parametrize("name", ["qwen3_vl", "smolvlm"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_slices_of_packed_tokens_have_their_part_of_each_picture(name, size):
    """A slice may begin within a picture, or have none."""
    policy = make_vision_policy(name)
    (batch,) = pack_all(groups_of(policy, mixed_prompts(policy))).microbatches
    with torch.no_grad():
        whole = policy.vision.embed(batch.token_ids_N, batch.pictures)
        cut = []
        for rank in range(size):
            own = own_slice(batch, ContextGroup(rank, size), torch.device("cpu")).batch
            plain = {"inputs_embeds": policy.model.get_input_embeddings()(own.token_ids_N)[None]}
            cut.append(plain if own.pictures is None else policy.vision.embed(own.token_ids_N, own.pictures))
    assert torch.equal(torch.cat([part["inputs_embeds"] for part in cut], dim=1), whole["inputs_embeds"])
    if "visual_pos_masks" in whole:
        layers_of = [part["deepstack_visual_embeds"] for part in cut if "visual_pos_masks" in part]
        deepstack = [torch.cat(layers) for layers in zip(*layers_of, strict=True)]
        for mine, theirs in zip(deepstack, whole["deepstack_visual_embeds"], strict=True):
            assert torch.equal(mine, theirs)


def sampled(policy, prompts, samples=3, **options):
    params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, seed=5, stop_token_ids=frozenset({2, 7}))
    return LocalEngine(policy, **options).generate([Request(p, samples) for p in prompts], params)


def test_a_response_that_sampled_image_tokens_trains():
    """Such tokens are text like any other: in the engine, in log pi, and in the gradient."""
    policy = make_vision_policy()
    prompts = mixed_prompts(policy)
    often = np.bincount(np.concatenate([c.token_ids for group in sampled(policy, prompts, 6) for c in group])).argmax()
    with torch.no_grad():  # as likely as the token drawn most often
        policy.head_weight[policy.vision.family.image_token_id] = policy.head_weight[int(often)]
    drawn = sampled(policy, prompts, 6)
    assert sum(policy.vision.family.image_token_id in c.token_ids for group in drawn for c in group) >= 2
    groups = []
    for prompt, completions in zip(prompts, drawn, strict=True):
        advantages = tuple(group_advantages(torch.arange(6.0, dtype=torch.float64)).tolist())
        scored = tuple(replace(c, score=Score(float(i))) for i, c in enumerate(completions))
        groups.append(Group(prompt, scored, advantages))
    assert worst_difference(policy, groups) < 1e-5
    (batch,) = pack_all(groups).microbatches
    assert (packed_logprobs(policy, batch) - batch.old_logprobs_M).abs().max() < 1e-5
    assert_same(packed_gradient(make_trainer(policy), [*groups]), own_gradient(policy, groups), tolerance=1e-5)


# ---------------------------------------------------------------------------------------------- routing replay


def test_replayed_experts_of_pictures_are_those_the_engine_went_through():
    """R3: recorded in a prefill with pictures, which goes through the modules, and in decode steps, which do not."""
    from sapo.rollout.experts import ExpertLog

    policy = make_vision_policy("qwen3_vl_moe")
    prompts = mixed_prompts(policy)
    log = ExpertLog()
    params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, seed=5)
    drawn = LocalEngine(policy).generate([Request(p, 3) for p in prompts], params, experts=log)
    advantages = tuple(group_advantages(torch.arange(3.0, dtype=torch.float64)).tolist())
    groups = log.attach([Group(p, c, advantages) for p, c in zip(prompts, drawn, strict=True)])
    routers = Routers(policy)
    trainer = make_trainer(policy, routers=routers)
    (batch,) = trainer.pack(groups, include_all=True).microbatches
    with trainer.replaying(batch) as replay:
        got = packed_logprobs(policy, batch)
    assert replay.changed == 0
    assert (got - batch.old_logprobs_M).abs().max() < 1e-5
    # R2: recorded by the trainer's own forward, the same experts.
    with routers.recording() as recording:
        plain = pack_all([Group(g.prompt, tuple(without(c) for c in g.completions), g.advantages) for g in groups])
        packed_logprobs(policy, plain.microbatches[0])
        assert torch.equal(recording.take(), batch.experts_Nlk)


def without(completion: Completion) -> Completion:
    return Completion(completion.token_ids, completion.logprobs, completion.finish_reason)
