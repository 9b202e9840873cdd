"""The self-check of the first step: which log pi_old a run uses, and what it says of them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from sapo.config import TrainConfig
from sapo.data import Completion, Group, Prompt
from sapo.errors import NonFiniteError
from sapo.run.self_check import CHECKED_GROUPS, check_old_logprobs


def check(ours: list[float], old_logprobs: str = "auto", full_distribution: bool = True, groups: int = 1):
    """The check of groups of one completion, whose engine says -1 of every token and whose trainer says `ours`."""
    completion = Completion((0,) * len(ours), (-1.0,) * len(ours), "stop")
    logprobs = SimpleNamespace(compute=lambda checked: [[ours] for _ in checked])
    settings = TrainConfig(steps=1, old_logprobs=old_logprobs)
    return check_old_logprobs(
        logprobs, [Group(Prompt(0, "t", ""), (completion,))] * groups, settings, full_distribution
    )


def test_the_figures_are_of_all_tokens_compared() -> None:
    seen = check([-1.0, -1.0 + math.log(1.5), -1.0 - math.log(2.0), -1.0])
    # by hand: r is 1, 3/2, 1/2 and 1, so |r - 1| sums to 1 over 4 tokens; the largest |log r| is log 2
    assert seen.ratio_abs_dev == pytest.approx(0.25)
    assert seen.log_ratio_max_abs == pytest.approx(math.log(2.0))
    assert seen.tokens == 4
    assert check([-1.0] * 3, groups=CHECKED_GROUPS + 5).tokens == 3 * CHECKED_GROUPS


@pytest.mark.parametrize(
    ("difference", "setting", "full_distribution", "source", "warning"),
    [
        (0.0009, "auto", True, "engine", None),  # the tolerance is 0.001
        (0.0011, "auto", True, "trainer", None),
        (0.0, "auto", False, "trainer", None),
        (0.0, "trainer", True, "trainer", None),
        (0.0, "engine", True, "engine", None),
        (0.5, "engine", True, "engine", "differs from the trainer's by up to 0.5"),
        (0.0, "engine", False, "engine", "is of a cut distribution"),
        (0.5, "trainer", True, "trainer", None),
    ],
)
def test_the_engines_serve_where_they_are_the_trainers_or_the_recipe_insists(
    difference: float, setting: str, full_distribution: bool, source: str, warning: str | None
) -> None:
    seen = check([-1.0 + difference], setting, full_distribution)
    assert seen.old_logprobs == source
    assert seen.equal == (difference <= 0.001 and full_distribution)
    assert (seen.warning is None) == (warning is None)
    assert warning is None or warning in str(seen.warning)


@pytest.mark.parametrize(
    ("difference", "dtype", "full_distribution", "warned"),
    [
        (1.3, "float32", True, True),
        (0.04, "float32", True, False),  # the limit is .05
        (1.3, "bfloat16", True, False),
        (1.3, "float32", False, False),
    ],
)
def test_an_engine_that_computes_another_model_is_warned_of(
    difference: float, dtype: str, full_distribution: bool, warned: bool
) -> None:
    found = check([-1.0 + difference], "auto", full_distribution).mismatch(dtype)
    assert (found is not None) == warned
    assert not warned or "differ from the trainer's by up to 1.3 nats" in str(found)


def test_the_figures_are_those_of_a_loop_over_python_numbers_to_the_bit() -> None:
    """The reference is the loop that the check once was, over every token of every completion in turn."""
    generator = np.random.default_rng(0)
    groups, found = [], []
    for i in range(3):
        lengths = generator.integers(1, 400, 4)
        theirs = [-np.exp(generator.normal(size=n)).astype(np.float32) for n in lengths]
        found.append([(t + generator.normal(0, 4, len(t))).astype(np.float32) for t in theirs])
        groups.append(Group(Prompt(i, "t", ""), tuple(Completion((0,) * len(t), t, "stop") for t in theirs)))
    worst, total, count = 0.0, 0.0, 0
    for group, per_group in zip(groups, found, strict=True):
        for completion, logprobs in zip(group.completions, per_group, strict=True):
            for theirs, ours in zip(completion.logprobs.tolist(), logprobs.tolist(), strict=True):
                worst = max(worst, abs(ours - theirs))
                total += abs(math.expm1(min(20.0, ours - theirs)))
                count += 1
    seen = check_old_logprobs(SimpleNamespace(compute=lambda _: found), groups, TrainConfig(steps=1), True)
    assert (seen.log_ratio_max_abs, seen.ratio_abs_dev, seen.tokens) == (worst, total / count, count)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_log_probability_that_is_not_finite_is_an_error(value: float) -> None:
    with pytest.raises(NonFiniteError, match=f"self-check: -1.0 by the engine, {value} by the trainer"):
        check([-1.0, value])
