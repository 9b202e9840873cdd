"""Conversations: turns drawn in place are those that waves draw and plain forwards compute, whatever is parked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from sapo.data import Prompt
from sapo.errors import Interrupted
from sapo.model.loading import prepare_policy
from sapo.model.policy import Policy
from sapo.rollout.conversation import Waves, begin_conversation
from sapo.rollout.engine import Request
from sapo.rollout.local.conversation import READ_TOKENS
from sapo.rollout.local.cpu.own_tokens import OwnTokens
from sapo.rollout.local.device_steps import DeviceSteps
from sapo.rollout.local.engine import LocalEngine, RowsInPlace
from support import row_cases
from support.engine_cases import params, ragged_requests, random_ids, request
from support.recurrent_cases import TOKENIZER, make_model
from support.talks import Talk, assert_plain, assert_same_talks, ragged, talk
from support.vision_cases import SQUARE, WIDE, OwnForward, make_vision_policy, shown


def waves(engine: LocalEngine, params: Any) -> Waves:
    return Waves(engine)


def in_place(policy: Policy, *arguments: Any, max_rows: int = 256, graphs: Any = False, **options: Any) -> list[Talk]:
    engine = LocalEngine(policy, max_rows, graphs)
    assert engine.converse(params()).in_place
    return talk(engine, *arguments, **options)


class Counted:
    """Tokens that were prefilled and rows that were given up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prefilled: list[int] = []
        self.given_up = 0
        prefill, give_up = RowsInPlace._prefill, RowsInPlace._give_up_coldest

        def prefilling(rows: RowsInPlace, chosen: list[int]) -> None:
            self.prefilled += [int(rows.cache.prompt_length[i]) for i in chosen]
            prefill(rows, chosen)

        def giving_up(rows: RowsInPlace) -> None:
            self.given_up += 1
            give_up(rows)

        monkeypatch.setattr(RowsInPlace, "_prefill", prefilling)
        monkeypatch.setattr(RowsInPlace, "_give_up_coldest", giving_up)


@pytest.mark.parametrize(("max_rows", "graphs"), [(5, False), (256, "eager")], ids=["few rows", "device steps"])
def test_turns_in_place_are_those_of_waves_and_of_plain_forwards(policy, plain, max_rows, graphs, monkeypatch):
    asked = ragged_requests()
    theirs = talk(LocalEngine(policy, max_rows, False), asked, params(), within=waves)
    counted = Counted(monkeypatch)
    ours = in_place(policy, asked, params(), max_rows=max_rows, graphs=graphs)
    assert {len(one.turns) for one in ours} >= {3, 4, 5}
    assert_same_talks(ours, theirs)
    assert_plain(plain(policy), ours)
    assert bool(counted.given_up) == (max_rows == 5)
    if max_rows == 256:  # each prompt once, and nothing else
        assert sorted(counted.prefilled) == sorted(len(r.prompt.token_ids) for r in asked)


def test_rows_that_fill_up_a_shape_leave_what_parked_rows_hold(policies, monkeypatch):
    # Turns of more tokens than the host lets pass between two looks, and shapes that are larger than the rows in use.
    policy, asked, settings = policies("qwen3"), ragged_requests(), params(max_new_tokens=16)
    filled, bring = [], DeviceSteps._bring

    def bringing(steps: DeviceSteps, shape: Any, group_R: Any, *numbers: Any) -> None:
        filled.append(shape.rows - len(group_R))
        bring(steps, shape, group_R, *numbers)

    monkeypatch.setattr(DeviceSteps, "_bring", bringing)
    ours, theirs = (
        in_place(policy, asked, settings, graphs=graphs, turns=4, limit=lambda turn: 12 + turn)
        for graphs in ("eager", False)
    )
    assert max(filled) > 0
    assert_same_talks(ours, theirs)


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize("shared", [0, 20])
def test_prompts_that_share_a_beginning_go_on_in_place(policies, plain, monkeypatch, shared, native):
    monkeypatch.setenv("SAPO_NATIVE", native)
    policy = policies("mistral")  # its window of 6 is shorter than every history
    lengths = (90, 3, 40, 1, 85, 7)
    asked = [request((*random_ids(shared, 7), i, *random_ids(n, i)), 2, prompt_id=i) for i, n in enumerate(lengths)]
    ours = in_place(policy, asked, params(), max_rows=7)
    assert_plain(plain(policy), ours)
    assert_same_talks(ours, talk(LocalEngine(policy, 7, False), asked, params(), within=waves))


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.7}, {"top_p": 0.8}, {"top_k": 3}], ids=str)
def test_every_way_of_drawing_is_the_same_in_place(policies, options):
    policy, asked = policies("qwen3"), ragged_requests()
    theirs = talk(LocalEngine(policy), asked, params(**options), within=waves)
    assert_same_talks(in_place(policy, asked, params(**options)), theirs)


@pytest.mark.parametrize("family", ["lfm2", "falcon_h1"])
def test_recurrent_models_go_on_from_their_states(family):
    model = make_model(family)
    policy = prepare_policy(make_model(family), TOKENIZER)
    ours = in_place(policy, ragged_requests(), params(), max_rows=7)
    assert_plain(model, ours)
    assert_same_talks(ours, talk(LocalEngine(policy, 7), ragged_requests(), params(), within=waves))


def test_a_model_that_transformers_decodes_takes_waves():
    model = row_cases.stablelm()
    engine = LocalEngine(prepare_policy(row_cases.stablelm(), row_cases.TOKENIZER))
    assert isinstance(begin_conversation(engine, params()), Waves)
    assert_plain(model, talk(engine, ragged_requests(), params()))


def test_prompts_with_pictures_go_on_in_place():
    policy = make_vision_policy("qwen3_vl")
    questions = [("1+<image>=<image>?", (WIDE, SQUARE), 3), ("ab", (SQUARE,), 2), ("12+3=", (), 2)]
    asked = [Request(shown(policy, t, *seen, prompt_id=i), n) for i, (t, seen, n) in enumerate(questions)]
    ours = in_place(policy, asked, params())
    assert_same_talks(ours, talk(LocalEngine(policy), asked, params(), within=waves))
    own = OwnForward(policy)
    for one in ours:
        with torch.no_grad():
            whole = own.logprobs(one.first.prompt, one.ids)
        for begin, turn in zip(one.begins, one.turns, strict=True):
            start = begin - len(one.first.prompt.token_ids)
            expected = whole[start : start + len(turn)]
            torch.testing.assert_close(torch.tensor(turn.logprobs), expected, rtol=0, atol=1e-5)


def test_what_a_row_has_computed_outlives_the_growth_of_its_room(policies):
    # Room for eight tokens at the beginning grows several times; a row's numbers depend on nothing around it.
    for options in ({}, {"dtype": torch.bfloat16}):
        policy, asked, settings = policies("qwen3", hidden_size=64, **options), ragged_requests(), params()
        drawn = [
            talk(
                LocalEngine(policy), asked, settings, within=lambda e, p, n=n: e.converse(replace(p, max_new_tokens=n))
            )
            for n in (8, 200)
        ]
        for one, other in zip(*drawn, strict=True):
            assert one.turns == other.turns


def test_own_tokens_keep_their_places_when_they_grow():
    own = OwnTokens(3, 16, 1, 2, 4, torch.float32)
    before = torch.arange(own.layers[0].numel(), dtype=torch.float32).view(2, 3 * 2, -1)
    own.layers[0].view(2, 6, -1).copy_(before)
    own.grow(40)
    after = own.layers[0].view(2, 6, own.length * 4)
    assert own.length >= 40
    assert torch.equal(after[:, :, : before.shape[2]], before)
    assert not after[:, :, before.shape[2] :].any()


@pytest.mark.parametrize("graphs", [False, "eager"], ids=["step by step", "device steps"])
def test_a_stop_string_does_not_begin_in_what_was_said(policies, graphs):
    policy = policies("qwen3")
    settings = params(max_new_tokens=40, stop_token_ids=frozenset())
    asked = [Request(Prompt(i, "t", "", random_ids(4, i), stop=("77",)), 8) for i in range(4)]
    seven = policy.encode("7")[-1:]
    ours = in_place(policy, asked, settings, graphs=graphs, turns=6, said=lambda *_: seven, limit=lambda _: 4)
    later = [turn for one in ours for turn in one.turns[1:]]
    assert any(turn.token_ids[0] == seven[0] for turn in later), "one begins with the string's other half"
    for turn in later:
        text = policy.decode(turn.token_ids.tolist())
        assert (turn.finish_reason == "stop") == text.endswith("77")
    assert_same_talks(ours, talk(LocalEngine(policy), asked, settings, 6, lambda *_: seven, lambda _: 4, within=waves))


def test_turns_fill_the_models_positions_to_the_last(new_policy):
    policy = new_policy("llama", max_length=40)
    asked, settings = [request(random_ids(9, 1), 3)], params(stop_token_ids=frozenset())
    # 9 of the prompt and 3 turns of 8 with 3 and then 4 tokens before: 40.
    said = lambda _, sample, turn: random_ids(2 + turn, sample)  # noqa: E731
    ours = in_place(policy, asked, settings, turns=3, said=said, limit=lambda _: 8)
    assert {len(one.ids) + 9 for one in ours} == {40}
    too_long = ours[0].request((), 1)
    with pytest.raises(ValueError, match="must fit the model's 40 positions"):
        LocalEngine(policy).converse(settings).generate([too_long], settings)


def test_what_is_longer_to_read_than_to_prefill_is_prefilled(policies, plain, monkeypatch):
    policy, counted = policies("qwen3"), Counted(monkeypatch)
    lengths = (READ_TOKENS, READ_TOKENS + 1)
    asked = [request(random_ids(5, i), 1, prompt_id=i) for i in range(2)]
    said = lambda i, _, turn: random_ids(lengths[i], turn)  # noqa: E731
    ours = in_place(policy, asked, params(), turns=3, said=said)
    assert_plain(plain(policy), ours)
    assert counted.prefilled[:2] == [5, 5]
    assert len(counted.prefilled) == 2 + 2, "the second sample, at each of its later turns"


def test_a_history_that_is_another_than_the_rows_is_prefilled(policies, plain, monkeypatch):
    policy, counted = policies("qwen3"), Counted(monkeypatch)
    conversation = LocalEngine(policy).converse(params())
    one = Talk(request(random_ids(6, 3)), 0)
    one.take((), conversation.generate([one.first], params())[0][0])
    one.ids[-1] = (one.ids[-1] + 1) % 15
    one.take((4,), conversation.generate([one.request((4,), 9)], params())[0][0])
    assert_plain(plain(policy), [replace(one, turns=one.turns[1:], begins=one.begins[1:])])
    assert len(counted.prefilled) == 2


def test_prompts_that_come_later_are_drawn_beside_those_that_go_on(policies, plain):
    policy = policies("qwen3")
    shared = random_ids(20, 7)
    for max_rows in (3, 256):
        conversation = LocalEngine(policy, max_rows).converse(params())
        talks = [Talk(request((*shared, i), prompt_id=i), 0) for i in range(3)]
        talks.append(Talk(request((*shared, 9), prompt_id=9), 0))
        talks.append(Talk(request(random_ids(30, 1), prompt_id=10), 0))  # begins otherwise than the others
        for asked in (talks[:3], talks[:2] + talks[3:4], talks[1:], talks):
            later = [one.request((3,) if one.turns else (), 5) for one in asked]
            drawn = conversation.generate(later, params())
            for one, (completion,) in zip(asked, drawn, strict=True):
                one.take((3,) if one.turns else (), completion)
        assert_plain(plain(policy), talks)


def test_weights_that_are_set_between_turns_draw_the_next(policies, new_policy, plain):
    policy, other = new_policy("qwen3"), policies("qwen3", gain=4.0)
    engine = LocalEngine(policy)
    conversation = engine.converse(params())
    one = Talk(request(random_ids(6, 3)), 0)
    one.take((), conversation.generate([one.first], params())[0][0])
    engine.set_weights(other.weights(), version=1)
    one.take((4,), conversation.generate([one.request((4,), 9)], params())[0][0])
    assert_plain(plain(other), [replace(one, turns=one.turns[1:], begins=one.begins[1:])])


def test_a_conversation_that_was_interrupted_begins_its_turns_anew(policies, plain):
    policy = policies("qwen3")
    conversation = LocalEngine(policy).converse(params())
    one = Talk(request(random_ids(6, 3)), 0)
    one.take((), conversation.generate([one.first], params())[0][0])
    answers = iter([False, True])
    with pytest.raises(Interrupted):
        conversation.generate([one.request((4,), 9)], params(), lambda: next(answers))
    one.take((4,), conversation.generate([one.request((4,), 9)], params())[0][0])
    assert_plain(plain(policy), [one])


def test_the_order_of_the_requests_changes_no_turn(policies):
    policy = policies("llama")
    asked = ragged_requests()
    ours = in_place(policy, asked, params(), max_rows=9)
    back = in_place(policy, asked[::-1], params(), said=lambda i, j, turn: ragged(5 - i, j, turn), max_rows=9)
    by_name = {(one.first.prompt.id, one.sample): one for one in back}
    assert_same_talks(ours, [by_name[one.first.prompt.id, one.sample] for one in ours])


def test_nothing_asked_in_a_conversation_gives_nothing(policies):
    conversation = LocalEngine(policies("qwen3")).converse(params())
    assert conversation.generate([], params()) == []


def test_few_samples_leave_room_for_the_many_that_follow(policies, plain, monkeypatch):
    policy, counted = policies("qwen3"), Counted(monkeypatch)
    conversation = LocalEngine(policy).converse(params())
    talks = [Talk(request(random_ids(6, i), prompt_id=i), 0) for i in range(6)]
    for asked in (talks[:1], talks, talks):
        said: Callable[[Talk], tuple[int, ...]] = lambda one: (3,) if one.turns else ()  # noqa: E731
        drawn = conversation.generate([one.request(said(one), 5) for one in asked], params())
        for one, (completion,) in zip(asked, drawn, strict=True):
            one.take(said(one), completion)
    assert_plain(plain(policy), talks)
    assert (len(counted.prefilled), counted.given_up) == (1 + 6, 0)


@pytest.mark.parametrize("graphs", [False, "eager"], ids=["step by step", "device steps"])
def test_histories_that_were_given_up_keep_no_memory(policies, plain, graphs):
    policy = policies("qwen3")
    conversation = LocalEngine(policy, cuda_graphs=graphs).converse(params())
    one = Talk(request(random_ids(6, 3)), 0)
    one.take((), conversation.generate([one.first], params())[0][0])
    for _ in range(5):
        one.ids[-1] = (one.ids[-1] + 1) % 15  # another history than the row's
        one.take((4,), conversation.generate([one.request((4,), 9)], params())[0][0])
        cache = conversation._rows.cache
        assert len(cache.pool_of) == 1
        assert len(cache.pools) <= 2, "the history, and the one that made room for it"
    assert_plain(plain(policy), [replace(one, turns=one.turns[-1:], begins=one.begins[-1:])])


def test_a_generate_of_ones_own_draws_the_turns_too(policies, plain):
    drawn: list[int] = []

    class Counting(LocalEngine):
        def generate(self, requests, *arguments, **options):
            drawn.append(len(requests))
            return super().generate(requests, *arguments, **options)

    class Renamed(LocalEngine):
        """Overrides nothing that draws."""

    asked, policy = ragged_requests(), policies("qwen3")
    assert_plain(plain(policy), talk(Counting(policy), asked, params()))
    assert len(drawn) >= 3
    assert Renamed(policy).converse(params()).in_place
