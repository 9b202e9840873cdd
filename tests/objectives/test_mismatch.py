"""Truncated importance weights and their relatives, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sapo.objectives import LOG_RATIO_LIMIT, TIS, TIS_CAPS

SEQUENCE = torch.tensor([0, 0, 0, 1, 1])
RATIOS = [0.4, 1.0, 6.0, 1.5, 1.2]  # rho is 2.4 and 1.8


@pytest.mark.parametrize(
    ("tis", "expected", "clipped"),
    [
        (TIS(), [0.4, 1.0, 2.0, 1.5, 1.2], [False, False, True, False, False]),
        (TIS(cap=1.3), [0.4, 1.0, 1.3, 1.3, 1.2], [False, False, True, True, False]),
        (TIS(mode="sequence"), [2.0] * 3 + [1.8] * 2, [True] * 3 + [False] * 2),
        # The geometric means: 2.4^(1/3) and 1.8^(1/2).
        (TIS(mode="sequence_mean"), [2.4 ** (1 / 3)] * 3 + [1.8**0.5] * 2, [False] * 5),
        (TIS(mode="sequence_mean", cap=1.34), [2.4 ** (1 / 3)] * 3 + [1.34] * 2, [False] * 3 + [True] * 2),
        (TIS(mode="icepop"), [0.0, 1.0, 0.0, 1.5, 1.2], [True, False, True, False, False]),
        (TIS(mode="icepop", cap=7.0, floor=0.3), RATIOS, [False] * 5),
        (TIS(mode="sequence_mask"), [2.4] * 3 + [1.8] * 2, [False] * 5),
        (TIS(mode="sequence_mask", cap=2.0), [0.0] * 3 + [1.8] * 2, [True] * 3 + [False] * 2),
    ],
    ids=str,
)
def test_the_weights_are_those_of_the_table(tis: TIS, expected: list[float], clipped: list[bool]) -> None:
    found = tis.weigh(torch.tensor(RATIOS, dtype=torch.float64).log(), SEQUENCE, 2)
    assert found.weight_M.tolist() == pytest.approx(expected)
    assert found.clipped_M.tolist() == clipped


@pytest.mark.parametrize("mode", list(TIS_CAPS))
def test_a_sampler_that_is_the_policy_weighs_one(mode: str) -> None:
    found = TIS(mode=mode).weigh(torch.zeros(5), SEQUENCE, 2)
    assert found.weight_M.tolist() == [1.0] * 5
    assert not found.clipped_M.any()


def test_nothing_overflows_and_a_nan_stays_one() -> None:
    far = torch.tensor([800.0, -800.0, math.inf, -math.inf, 0.0])
    alone = torch.arange(5)
    assert TIS(cap=3.0).weigh(far, alone, 5).weight_M.tolist() == [3.0, math.exp(-LOG_RATIO_LIMIT)] * 2 + [1.0]
    for mode in TIS_CAPS:
        found = TIS(mode=mode).weigh(torch.tensor([math.nan, 0.0]), torch.tensor([0, 1]), 2)
        assert math.isnan(found.weight_M[0])
        assert found.weight_M[1] == 1.0


def test_no_gradient_flows_into_the_weights() -> None:
    assert not TIS().weigh(torch.zeros(2, requires_grad=True), torch.tensor([0, 0]), 1).weight_M.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mode": "tokens"},
            "tis mode must be one of icepop, sequence, sequence_mask, sequence_mean, token; got 'tokens'",
        ),
        ({"cap": 0.5}, "cap must be finite and at least 1; got 0.5"),
        ({"floor": 0.5}, "floor is for mode icepop; got 0.5 with token; leave it out"),
        ({"mode": "icepop", "floor": 1.5}, r"floor must lie in \(0, 1\]; got 1.5; IcePop has 0.5"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TIS(**options)


@given(st.lists(st.floats(-0.5, 0.5), min_size=1, max_size=12), st.integers(2, 40))
def test_the_mean_form_does_not_depend_on_the_length_and_the_product_does(log_w: list[float], times: int) -> None:
    """A response said `times` over: rho becomes rho^times, its geometric mean stays, and one token has w itself."""
    once, more = (torch.tensor(log_w * n, dtype=torch.float64) for n in (1, times))
    weight = {
        (mode, len(z)): TIS(mode=mode, cap=1e9).weigh(z, torch.zeros(len(z), dtype=torch.int64), 1).weight_M[0].item()
        for mode in ("sequence", "sequence_mean")
        for z in (once, more)
    }
    assert weight["sequence_mean", len(more)] == pytest.approx(weight["sequence_mean", len(once)], rel=1e-9)
    assert weight["sequence_mean", len(once)] ** len(once) == pytest.approx(weight["sequence", len(once)], rel=1e-9)
    bounded = max(-LOG_RATIO_LIMIT, min(LOG_RATIO_LIMIT, times * sum(log_w)))
    assert weight["sequence", len(more)] == pytest.approx(min(math.exp(bounded), 1e9), rel=1e-9)


def test_a_healthy_sampler_keeps_its_loss_over_eight_thousand_tokens_by_the_mean_alone() -> None:
    """Off by -3.5e-4 nats at every token, as a sampler of 16 bits may be: exp(-2.8) = .06 of the loss is left by the
    product (NeMo-RL #2269), and .99965 by the mean."""
    log_w, one = torch.full((8000,), -3.5e-4, dtype=torch.float64), torch.zeros(8000, dtype=torch.int64)
    assert TIS(mode="sequence").weigh(log_w, one, 1).weight_M[0].item() == pytest.approx(0.0608, abs=1e-4)
    assert TIS(mode="sequence_mean").weigh(log_w, one, 1).weight_M[0].item() == pytest.approx(0.99965, abs=1e-6)
