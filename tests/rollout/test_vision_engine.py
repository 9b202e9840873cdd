"""The local engine on prompts with pictures: every log-probability is the model's own, fast path on and off."""

from __future__ import annotations

import pytest
import torch

from sapo.rollout.engine import Request
from sapo.rollout.local import engine as local
from sapo.rollout.local.decoder import FastDecoder, decoder_of, refusal
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.params import SamplingParams
from support.engine_cases import assert_same
from support.pictures import picture
from support.vision_cases import FAMILY_NAMES, SMALL, SQUARE, WIDE, OwnForward, make_vision_policy, shown

FAST = ("qwen3_vl", "qwen3_vl_moe", "smolvlm", "idefics3", "internvl", "llava")


def requests(policy):
    """Pictures of other sizes, the same ones again, and text; more rows than are decoded together."""
    questions = [
        ("1+<image>=<image>?", (WIDE, SQUARE), 3),
        ("12+3=", (), 2),
        ("ab", (SMALL,), 4),
        ("ab", (picture(9, 40, 24),), 4),
        ("abc", (SMALL,), 1),
        ("0", (), 5),
    ]
    return [Request(shown(policy, text, *shown_in, prompt_id=i), n) for i, (text, shown_in, n) in enumerate(questions)]


def params(**options):
    return SamplingParams(**{"max_new_tokens": 16, "seed": 3, "stop_token_ids": frozenset({2, 7}), **options})


def worst(policy, asked, drawn):
    own = OwnForward(policy)
    with torch.no_grad():
        return max(
            (own.logprobs(r.prompt, c.token_ids.tolist()) - torch.from_numpy(c.logprobs.copy())).abs().max().item()
            for r, completions in zip(asked, drawn, strict=True)
            for c in completions
        )


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize("fast", [True, False])
def test_every_log_probability_is_the_models_own(name, fast, monkeypatch):
    policy = make_vision_policy(name)
    assert (refusal(policy) is None) == (name in FAST)
    if not fast:
        monkeypatch.setattr(local, "decoder_of", lambda policy, *_: policy)
    elif name in FAST:
        assert isinstance(decoder_of(policy, 100), FastDecoder)
    asked = requests(policy)
    for rows in (6, 256):
        drawn = LocalEngine(policy, max_rows=rows).generate(asked, params())
        assert worst(policy, asked, drawn) < 1e-5


def test_what_is_drawn_for_a_prompt_does_not_depend_on_its_company():
    policy = make_vision_policy()
    asked = requests(policy)
    together = LocalEngine(policy, max_rows=6).generate(asked, params())
    for request, completions in zip(asked, together, strict=True):
        (alone,) = LocalEngine(policy).generate([request], params())
        for ours, theirs in zip(alone, completions, strict=True):
            assert_same(ours, theirs)


def test_prompts_that_begin_alike_share_their_picture_and_those_with_others_do_not(monkeypatch):
    policy = make_vision_policy()
    seen = []
    embed = policy.vision.embed
    monkeypatch.setattr(policy.vision, "embed", lambda ids, packed: seen.append(packed.pictures) or embed(ids, packed))
    text = "<image>0123456789"
    same = [Request(shown(policy, text + end, WIDE, prompt_id=i), 2) for i, end in enumerate("abc")]
    drawn = LocalEngine(policy).generate(same, params())
    assert seen == [(WIDE,)]
    assert worst(policy, same, drawn) < 1e-5
    seen.clear()
    others = [Request(shown(policy, text, p, prompt_id=i), 2) for i, p in enumerate((WIDE, picture(8, 48, 32)))]
    assert others[0].prompt.token_ids == others[1].prompt.token_ids
    drawn = LocalEngine(policy).generate(others, params())
    assert seen == [(WIDE, picture(8, 48, 32))]
    assert worst(policy, others, drawn) < 1e-5


def test_greedy_text_equals_that_of_transformers_generate():
    policy = make_vision_policy()
    asked = [Request(shown(policy, "1+<image>=<image>?", WIDE, SQUARE), 1), Request(shown(policy, "ab", SMALL), 1)]
    drawn = LocalEngine(policy).generate(asked, params(temperature=0.0, max_new_tokens=20, stop_token_ids=frozenset()))
    own = OwnForward(policy)
    for request, (completion,) in zip(asked, drawn, strict=True):
        prompt = request.prompt
        ids = torch.tensor([prompt.token_ids])
        pixels = [policy.vision.pixels(p) for p in prompt.pictures]
        inputs = {name: torch.cat([p[name] for p in pixels]) for name in pixels[0]}
        generated = own.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **inputs,
            **policy.vision.family.own_inputs(ids),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=None,
        )
        assert completion.token_ids.tolist() == generated[0, len(prompt.token_ids) :].tolist()
