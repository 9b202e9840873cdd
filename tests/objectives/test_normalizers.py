"""Weights of tokens in the loss, by hand."""

import pytest
import torch

from sapo.objectives import NORMALIZERS, sequence_weights

LENGTHS_B = torch.tensor([3, 1, 0])


def test_each_normalizer_by_hand_with_an_empty_sequence_kept_in_the_denominator():
    assert sequence_weights(LENGTHS_B, "sequence_mean").tolist() == pytest.approx([1 / 9, 1 / 3, 0], rel=1e-15)
    assert sequence_weights(LENGTHS_B, "token_mean").tolist() == [1 / 4, 1 / 4, 0]
    assert sequence_weights(LENGTHS_B, "constant_length", max_length=8).tolist() == [1 / 24, 1 / 24, 0]
    assert sequence_weights(LENGTHS_B, "sequence_sum").tolist() == pytest.approx([1 / 3, 1 / 3, 0], rel=1e-15)
    assert sequence_weights(LENGTHS_B, "token_mean").dtype == torch.float64


def test_denominators_of_the_mini_batch_replace_those_of_the_micro_batch():
    given = {"num_sequences": 10, "num_tokens": 40}
    assert sequence_weights(LENGTHS_B, "sequence_mean", **given).tolist() == pytest.approx([1 / 30, 1 / 10, 0])
    assert sequence_weights(LENGTHS_B, "token_mean", **given).tolist() == [1 / 40, 1 / 40, 0]
    assert sequence_weights(LENGTHS_B, "constant_length", max_length=8, **given).tolist() == [1 / 80, 1 / 80, 0]
    assert sequence_weights(LENGTHS_B, "sequence_sum", **given).tolist() == [1 / 10, 1 / 10, 0]


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_but_empty_sequences_weighs_nothing(normalizer, lengths):
    weights = sequence_weights(torch.tensor(lengths, dtype=torch.int64), normalizer, max_length=4)
    assert weights.tolist() == [0.0] * len(lengths)


def test_wrong_options_are_refused_with_rule_value_and_way_out():
    with pytest.raises(ValueError, match=r"normalizer must be one of .*; got 'tokenmean'; did you mean 'token_mean'"):
        sequence_weights(LENGTHS_B, "tokenmean")
    with pytest.raises(ValueError, match=r"constant_length needs a positive max_length; got None; pass the longest"):
        sequence_weights(LENGTHS_B, "constant_length")
    with pytest.raises(ValueError, match=r"max_length; got 0"):
        sequence_weights(LENGTHS_B, "constant_length", max_length=0)
    with pytest.raises(ValueError, match=r"num_sequences counts the whole mini-batch.* at least the 3 here; got 2"):
        sequence_weights(LENGTHS_B, "sequence_mean", num_sequences=2)
    with pytest.raises(ValueError, match=r"num_tokens counts the whole mini-batch.* at least the 4 here; got 3"):
        sequence_weights(LENGTHS_B, "token_mean", num_tokens=3)
    for wrong in (torch.tensor([1.0]), torch.tensor([[1]]), torch.tensor([-1])):
        with pytest.raises(ValueError, match=r"lengths must be \(B,\) integers >= 0; got"):
            sequence_weights(wrong, "token_mean")
