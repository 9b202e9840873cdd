"""What a step asks and keeps: exact ratios, every number once, the same after a stop."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.config import RolloutConfig
from sapo.data import Completion, Group, Prompt, Score
from sapo.rollout.selection import Position, Selection, Selector
from sapo.run.state import RunState
from sapo.tasks import prompts_for_step
from sapo.utils.hashing import hashed_integer


class Numbers:
    """An endless task whose questions are its indices."""

    def __init__(self, name: str) -> None:
        self.name = name

    def train_prompt(self, index: int) -> Prompt:
        return Prompt(index, self.name, str(index))

    def held_out(self, count: int) -> list[Prompt]:
        return []

    def verify(self, text: str, prompt: Prompt) -> Score:
        return Score(0.0)


def group(prompt: Prompt, flat: bool) -> Group:
    rewards = (0.0, 0.0) if flat else (0.0, 1.0)
    return Group(prompt, tuple(Completion((1, 2), (-0.1, -0.1), "stop", score=Score(r)) for r in rewards))


class Sampler:
    """Groups of which a share, chosen by name and number, has zero variance; remembers what it was asked."""

    def __init__(self, is_flat: Callable[[Prompt], bool]) -> None:
        self.is_flat = is_flat
        self.rounds: list[list[Prompt]] = []

    @classmethod
    def of_shares(cls, shares: dict[str, float], seed: int = 0) -> Sampler:
        return cls(lambda p: hashed_integer(seed, p.task, p.text) % 1000 < 1000 * shares[p.task])

    def __call__(self, prompts: list[Prompt]) -> list[Group]:
        self.rounds.append(prompts)
        return [group(p, self.is_flat(p)) for p in prompts]


def selector(weights: list[float], prompts: int, **settings: object) -> Selector:
    tasks = [Numbers(f"t{i}") for i in range(len(weights))]
    return Selector(tasks, weights, RolloutConfig(prompts_per_step=prompts, **settings))


def steps(choice: Selector, sampler: Sampler, count: int, position: Position | None = None) -> list[Selection]:
    selections: list[Selection] = []
    for step in range(count):
        position = selections[-1].position if selections else position or Position()
        selections.append(choice.select(step, position, sampler))
    return selections


def places(groups: list[Group]) -> list[tuple[str, int]]:
    return [(g.prompt.task, int(g.prompt.text)) for g in groups]


def test_without_options_a_step_is_the_mixtures() -> None:
    sampler = Sampler(lambda p: True)
    for step, selection in enumerate(steps(selector([2, 1, 1], 8), sampler, 5)):
        expected = prompts_for_step([("t0", 2), ("t1", 1), ("t2", 1)], step, 8)
        assert places(selection.groups) == expected
        assert [g.prompt.id for g in selection.groups] == [step << 32 | i for i in range(8)]
        assert (selection.dropped, selection.position, selection.refill_rounds) == ([], Position(), 0)
    assert len(sampler.rounds) == 5


def test_dropped_groups_leave_the_batch_in_order_and_are_kept_apart() -> None:
    sampler = Sampler(lambda p: int(p.text) % 3 == 0)
    (selection,) = steps(selector([1, 1], 8, zero_variance="drop"), sampler, 1)
    assert places(selection.groups) == [("t0", 1), ("t0", 2), ("t1", 1), ("t1", 2)]
    assert places(selection.dropped) == [("t0", 0), ("t0", 3), ("t1", 0), ("t1", 3)]
    assert selection.position == Position(), "nothing was drawn beyond the mixture"


def test_a_refilled_batch_is_full_has_spread_and_the_exact_ratio_by_hand() -> None:
    # t0 needs 4 and draws 0 1 2 3 | 4 5 | 6: of these 1, 2, 5, 6 have spread. t1 needs 2: 0, then 1, 2.
    flat = {("t0", 0), ("t0", 3), ("t0", 4), ("t1", 1)}
    sampler = Sampler(lambda p: (p.task, int(p.text)) in flat)
    first, second = steps(selector([2, 1], 6, zero_variance="refill"), sampler, 2)
    assert places(first.groups) == [("t0", 1), ("t0", 2), ("t0", 5), ("t0", 6), ("t1", 0), ("t1", 2)]
    assert places(first.dropped) == [("t0", 0), ("t0", 3), ("t0", 4), ("t1", 1)]
    assert (first.refill_rounds, first.unfilled) == (2, 0)
    assert first.position.offsets == {"t0": 3, "t1": 1}
    assert [[(p.task, int(p.text)) for p in r] for r in sampler.rounds[1:3]] == [
        [("t0", 4), ("t0", 5), ("t1", 2)],
        [("t0", 6)],
    ]
    ids = [p.id for r in sampler.rounds for p in r]
    assert len(set(ids)) == len(ids), "a prompt's id names its noise"
    assert places(second.groups) == [("t0", i) for i in (7, 8, 9, 10)] + [("t1", i) for i in (3, 4)]


def test_when_refills_are_spent_the_batch_is_filled_with_what_there_is() -> None:
    sampler = Sampler(lambda p: p.task == "t0" and int(p.text) != 5)
    (selection,) = steps(selector([1, 1], 4, zero_variance="refill", max_refills=2), sampler, 1)
    # t0 draws 0 1 | 2 3 | 4 5: 5 has spread, 0 is the first of the others.
    assert places(selection.groups) == [("t0", 5), ("t0", 0), ("t1", 0), ("t1", 1)]
    assert places(selection.dropped) == [("t0", i) for i in (1, 2, 3, 4)]
    assert (selection.refill_rounds, selection.unfilled) == (2, 1)


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(1, 16),
    st.lists(st.sampled_from([0.0, 0.3, 0.8, 1.0]), min_size=4, max_size=4),
    st.sampled_from(["drop", "refill"]),
    st.integers(0, 1000),
)
@settings(max_examples=120, deadline=None)
def test_every_number_is_asked_once_and_nothing_sampled_is_lost(
    weights: list[int], prompts: int, shares: list[float], mode: str, seed: int
) -> None:
    sampler = Sampler.of_shares({f"t{i}": share for i, share in enumerate(shares)}, seed)
    choice = selector(weights, prompts, zero_variance=mode)
    mixture = [(f"t{i}", w) for i, w in enumerate(weights)]
    for step, selection in enumerate(steps(choice, sampler, 6)):
        exact = Counter(name for name, _ in prompts_for_step(mixture, step, prompts))
        if mode == "refill":
            assert Counter(g.prompt.task for g in selection.groups) == exact
            assert sum(g.zero_variance for g in selection.groups) == selection.unfilled
        else:
            assert not any(g.zero_variance for g in selection.groups)
        assert all(g.zero_variance for g in selection.dropped), "no group with spread is thrown away"
    asked = [(p.task, int(p.text)) for r in sampler.rounds for p in r]
    for name, _ in mixture:
        own = [index for task, index in asked if task == name]
        assert own == list(range(len(own)))
    sampled = sorted(places([g for s in steps(choice, Sampler(sampler.is_flat), 6) for g in (*s.groups, *s.dropped)]))
    assert sampled == sorted(asked)


@pytest.mark.parametrize("weights", [[2, 1, 1], [9, 1]])
def test_a_state_read_back_goes_on_where_it_was(weights: list[float]) -> None:
    shares = {f"t{i}": 0.5 for i in range(len(weights))}
    choice = selector(weights, 4, zero_variance="refill")
    whole = steps(choice, Sampler.of_shares(shares), 12)
    state = RunState()
    for step, expected in enumerate(whole):
        state = RunState.deserialise(json.loads(json.dumps(state.serialise()[0])), {})
        selection = choice.select(step, state.position, Sampler.of_shares(shares))
        assert selection == expected
        state.position = selection.position


def test_a_step_stopped_in_a_refill_begins_anew_and_comes_out_the_same() -> None:
    choice = selector([1, 1], 6, zero_variance="refill")
    sampler = Sampler.of_shares({"t0": 0.5, "t1": 0.5})
    before = Position({"t0": 4, "t1": 0})
    whole = choice.select(3, before, sampler)
    assert whole.refill_rounds >= 1

    class Stop(Exception):  # noqa: N818 (a request, not an error)
        pass

    def stopped_in_the_second_round(prompts: list[Prompt]) -> list[Group]:
        if len(prompts) < 6:
            raise Stop
        return Sampler(sampler.is_flat)(prompts)

    with pytest.raises(Stop):
        choice.select(3, before, stopped_in_the_second_round)
    assert before == Position({"t0": 4, "t1": 0})
    assert choice.select(3, before, Sampler(sampler.is_flat)) == whole


def test_the_first_prompts_are_those_the_step_asks_first() -> None:
    choice = selector([2, 1], 6, zero_variance="refill")
    sampler = Sampler.of_shares({"t0": 0.5, "t1": 0.5})
    position = Position({"t0": 2, "t1": 9})
    assert choice.first_prompts(4, position) == choice.first_prompts(4, position)
    choice.select(4, position, sampler)
    assert choice.first_prompts(4, position) == sampler.rounds[0]


def test_the_figures_say_what_was_asked_for_and_nothing_else() -> None:
    sampler = Sampler(lambda p: int(p.text) < 3)
    kept = selector([1], 4)
    assert kept.figures(steps(kept, sampler, 1)[0]) == {}
    refilled = selector([1], 4, zero_variance="refill")
    assert refilled.figures(steps(refilled, sampler, 1)[0]) == {"groups/refill_rounds": 1, "groups/unfilled": 0}
