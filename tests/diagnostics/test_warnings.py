"""The rules of early warning on series made by hand: each finds what it is for, once, and leaves the rest alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from sapo.config.diagnostics import WarningsConfig
from sapo.diagnostics import Health, observe, replay_warnings

HEALTHY = {
    "reward/mean": 0.3,
    "update/entropy": 0.5,
    "length/mean": 40.0,
    "tis": "sequence",
    "groups/none_right": 0.2,
    "status/scored": 60,
    "status/unparseable": 4,
    "status/truncated": 0,
    "status/verifier_error": 0,
}


def step(number: int, **changes: Any) -> dict[str, Any]:
    return {"kind": "step", "step": number, **HEALTHY, **{k.replace("__", "/"): v for k, v in changes.items()}}


def update(number: int, place: int = 1, **changes: Any) -> dict[str, Any]:
    figures = {"grad_norm": 1.0, "ratio/p01": 0.9, "ratio/p99": 1.1, "ratio/abs_dev": 0.02}
    figures |= {k.replace("__", "/"): v for k, v in changes.items()}
    return {"kind": "update", "step": number, "update": place, "on_policy": place == 0, "skipped": False, **figures}


def causes(records: list[dict[str, Any]], **settings: Any) -> list[tuple[int, str]]:
    return [(w.step, w.cause) for w in replay_warnings(records, WarningsConfig(**settings))]


BEGINNING = [step(i) for i in range(1, 11)]  # ten steps, so that every reference and the run of rewards are complete


@pytest.mark.parametrize(
    ("cause", "bad", "just_allowed"),
    [
        ("entropy_collapse", {"update__entropy": 0.049}, {"update__entropy": 0.05}),  # a tenth of 0.5
        ("entropy_explosion", {"update__entropy": 1.51}, {"update__entropy": 1.5}),  # three times 0.5
        ("zero_variance_flood", {"groups__none_right": 0.71}, {"groups__none_right": 0.7}),
        ("length_collapse", {"length__mean": 19.9}, {"length__mean": 20.0}),  # half of 40
        ("reward_status", {"status__unparseable": 65}, {"status__unparseable": 60}),  # against 60 scored
        ("long_trajectories", {"length__mean": 1001}, {"length__mean": 1000}),
        (
            "long_trajectories",
            {"length__mean": 1001, "tis": "sequence_mask"},
            {"length__mean": 9e3, "tis": "sequence_mean"},
        ),
        ("reward_status", {"status__verifier_error": 4}, {"status__verifier_error": 3}),  # of 68 and 67: 5.9% and 4.5%
    ],
)
def test_a_rule_of_a_step_speaks_once_after_three_steps_and_not_at_its_threshold(
    cause: str, bad: dict, just_allowed: dict
) -> None:
    assert causes([*BEGINNING, *(step(i, **bad) for i in range(11, 20))]) == [(13, cause)]
    assert causes([*BEGINNING, *(step(i, **just_allowed) for i in range(11, 20))]) == []
    interrupted = [step(11, **bad), step(12, **bad), step(13), step(14, **bad), step(15, **bad)]
    assert causes([*BEGINNING, *interrupted]) == [], "two steps on end are fewer than three, twice"


def test_a_cause_that_has_passed_is_said_again_when_it_comes_back() -> None:
    flood = [step(i, groups__none_right=0.9) for i in (11, 12, 13, 15, 16, 17)]
    records = sorted([*BEGINNING, *flood, step(14)], key=lambda r: r["step"])
    assert causes(records) == [(13, "zero_variance_flood"), (17, "zero_variance_flood")]


def test_certainty_and_brevity_that_are_paid_for_are_no_collapse() -> None:
    solved = {"update__entropy": 0.01, "reward__mean": 0.9}
    assert causes([*BEGINNING, *(step(i, **solved) for i in range(11, 20))]) == []
    brief = {"length__mean": 10.0, "reward__mean": 0.31}
    assert causes([*BEGINNING, *(step(i, **brief) for i in range(11, 20))]) == []


def test_a_fall_of_reward_is_told_from_noise() -> None:
    fallen = [step(i, reward__mean=0.0) for i in range(11, 21)]
    # Means of ten steps fall by .03 a step from .3: below half of it with the sixth, when the spread of the window, 0.3
    # times sqrt(6 x 4 / 10 / 9), gives the mean a standard error of .049, and .18 is more than three of them. Said at
    # the third such step.
    assert causes([*BEGINNING, *fallen]) == [(18, "reward_collapse")]
    noisy = [step(i, reward__mean=0.02 if i % 2 else 0.0) for i in range(1, 11)]
    assert causes([*noisy, *(step(i, reward__mean=0.01 if i == 12 else 0.0) for i in range(11, 16))]) == []


def test_a_tail_of_ratios_is_found_in_the_update_itself_on_either_side() -> None:
    up, down = update(1, ratio__p99=20.1), update(1, ratio__p01=1 / 20.1)
    assert causes([up]) == causes([down]) == [(1, "ratio_tail")]
    assert causes([update(1, ratio__p99=20.0, ratio__p01=0.051)]) == []
    again = [up, update(1, ratio__p99=30.0), step(1), update(2, ratio__p99=30.0), step(2), update(3), step(3)]
    assert causes([*again, update(4, ratio__p99=30.0)]) == [(1, "ratio_tail"), (4, "ratio_tail")]


def test_a_gradient_is_a_spike_against_the_median_of_late_and_not_of_nothing() -> None:
    calm = [update(i, grad_norm=1.0 + i % 2) for i in range(1, 11)]  # median 1.5
    assert causes([*calm, update(11, grad_norm=15.1)]) == [(11, "gradient_spike")]
    assert causes([*calm, update(11, grad_norm=15.0)]) == []
    assert causes([*calm[:9], update(11, grad_norm=1e6)]) == [], "nine norms are too few to say what is usual"


def test_an_unfaithful_first_update_is_said_at_every_step_and_others_are_not_asked() -> None:
    records = [update(i, place, ratio__abs_dev=0.02) for i in (1, 2) for place in (0, 1)]
    assert causes(records) == [(1, "unfaithful_old_logprobs"), (2, "unfaithful_old_logprobs")]


def test_a_run_that_was_never_well_is_warned_of_but_has_not_collapsed() -> None:
    flooded = [step(i, groups__none_right=1.0) for i in range(1, 6)]
    (from_the_start,) = replay_warnings(flooded)
    assert (from_the_start.cause, from_the_start.collapse) == ("zero_variance_flood", False)
    (later,) = replay_warnings([step(1), *({**r, "step": r["step"] + 1} for r in flooded)])
    assert later.collapse


def test_a_figure_that_was_not_measured_breaks_no_rule() -> None:
    bare = [{"kind": "step", "step": i, "reward/mean": 0.0} for i in range(1, 30)]
    assert causes([*bare, {"kind": "update", "step": 30, "update": 0, "skipped": True}]) == []


def test_a_step_in_which_every_completion_failed_says_nothing_of_rewards() -> None:
    records = [step(n) for n in range(1, 40)]
    for record in records[25:30]:
        del record["reward/mean"]
    assert causes(records) == []
    fallen = [step(n) if n < 30 else step(n, **{"reward/mean": 0.0}) for n in range(1, 60)]
    del fallen[28]["reward/mean"]
    assert "reward_collapse" in {cause for _, cause in causes(fallen)}


def test_health_is_pure_and_survives_a_trip_through_text_at_every_line() -> None:
    settings = WarningsConfig()
    records = [r for i in range(1, 30) for r in (update(i, 0), update(i, ratio__p99=25.0 if i == 20 else 1.1), step(i))]
    straight = through_text = Health()
    for record in records:
        before = asdict(straight)
        after, warnings = observe(straight, record, settings)
        assert asdict(straight) == before
        through_text, same = observe(Health.from_json(json.loads(json.dumps(asdict(through_text)))), record, settings)
        assert (through_text, same) == (after, warnings)
        straight = after


def test_a_rule_broken_for_too_short_a_time_to_be_warned_of_is_not_healthy_and_a_broken_verifier_is() -> None:
    settings = WarningsConfig()
    health, warnings = observe(Health(), step(1, groups__none_right=0.9), settings)
    assert not warnings
    assert not health.healthy
    health, _ = observe(health, step(2), settings)
    assert health.healthy
    for i in range(3, 8):
        health, warnings = observe(health, step(i, status__verifier_error=60), settings)
    assert health.healthy, "the policy is not at fault"
