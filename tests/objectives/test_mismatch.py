"""Truncated importance weights and their relatives, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sapo.objectives import LOG_RATIO_LIMIT, TIS

SEQUENCE = torch.tensor([0, 0, 0, 1, 1])
RATIOS = [0.4, 1.0, 6.0, 1.5, 1.2]  # rho is 2.4 and 1.8


@pytest.mark.parametrize(
    ("tis", "expected", "clipped"),
    [
        (TIS(), [0.4, 1.0, 2.0, 1.5, 1.2], [False, False, True, False, False]),
        (TIS(cap=1.3), [0.4, 1.0, 1.3, 1.3, 1.2], [False, False, True, True, False]),
        (TIS(mode="sequence"), [2.0] * 3 + [1.8] * 2, [True] * 3 + [False] * 2),
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


@pytest.mark.parametrize("mode", ["token", "sequence", "icepop", "sequence_mask"])
def test_a_sampler_that_is_the_policy_weighs_one(mode: str) -> None:
    found = TIS(mode=mode).weigh(torch.zeros(5), SEQUENCE, 2)
    assert found.weight_M.tolist() == [1.0] * 5
    assert not found.clipped_M.any()


def test_nothing_overflows_and_a_nan_stays_one() -> None:
    far = torch.tensor([800.0, -800.0, math.inf, -math.inf, 0.0])
    alone = torch.arange(5)
    assert TIS(cap=3.0).weigh(far, alone, 5).weight_M.tolist() == [3.0, math.exp(-LOG_RATIO_LIMIT)] * 2 + [1.0]
    for mode in ("token", "sequence", "icepop", "sequence_mask"):
        found = TIS(mode=mode).weigh(torch.tensor([math.nan, 0.0]), torch.tensor([0, 1]), 2)
        assert math.isnan(found.weight_M[0])
        assert found.weight_M[1] == 1.0


def test_no_gradient_flows_into_the_weights() -> None:
    assert not TIS().weigh(torch.zeros(2, requires_grad=True), torch.tensor([0, 0]), 1).weight_M.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "tokens"}, "tis mode must be one of icepop, sequence, sequence_mask, token; got 'tokens'"),
        ({"cap": 0.5}, "cap must be finite and at least 1; got 0.5"),
        ({"floor": 0.5}, "floor is for mode icepop; got 0.5 with token; leave it out"),
        ({"mode": "icepop", "floor": 1.5}, r"floor must lie in \(0, 1\]; got 1.5; IcePop has 0.5"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TIS(**options)
