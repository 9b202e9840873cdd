"""Every objective of ours obeys every law; and every law is broken by a loss made to break it, at the smallest case."""

import math

import pytest
import torch

from sapo.conformance import (
    BROKEN,
    DOES_NOT_APPLY,
    HELD,
    LAWS,
    Batch,
    Case,
    Response,
    Subject,
    Verdict,
    Whole,
    judge,
    own_subjects,
)
from sapo.conformance.cases import shrink
from sapo.conformance.reference import SLOPES
from sapo.objectives import OBJECTIVES, make_objective, policy_loss


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_of_ours_obeys_every_law(name: str) -> None:
    verdicts = judge(own_subjects([name])[0])
    assert [v for v in verdicts if v.status == BROKEN] == []
    temperatures = name in ("sapo", "sapo_seq")
    assert {v.law for v in verdicts if v.status == DOES_NOT_APPLY} == (
        set() if temperatures else {"refuses_a_temperature_of_zero_or_less"}
    )


def test_every_objective_has_a_reference_of_its_own() -> None:
    assert set(SLOPES) == set(OBJECTIVES)


def grpo(batch: Batch, whole: Whole, *, old_shift: float = 0.0) -> torch.Tensor:
    """A right loss: GRPO with the mean over sequences of token means, in the counts of the mini-batch."""
    return policy_loss(
        "grpo",
        batch.logp_BT,
        batch.logp_old_BT - old_shift,
        batch.advantages_B,
        batch.mask_BT,
        num_sequences=whole.num_sequences,
        num_tokens=whole.num_tokens,
    )


def subject(loss, **options) -> Subject:
    return Subject("a loss", make_objective("grpo"), "sequence_mean", loss, **options)


def terms(batch: Batch, whole: Whole) -> torch.Tensor:
    """GRPO's terms without any care: (B, T), to be multiplied by the mask."""
    ratio = (batch.logp_BT - batch.logp_old_BT).exp()
    advantages = batch.advantages_B[:, None]
    mask = batch.mask_BT
    clipped = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.27) * advantages)
    return -clipped / mask.sum(1, keepdim=True).clamp(min=1) / whole.num_sequences


def one(advantage: float, *log_ratios: float) -> Response:
    return Response(advantage, log_ratios)


def twice_for_negative(batch, whole):
    scaled = torch.where(batch.advantages_B < 0, 2 * batch.advantages_B, batch.advantages_B)
    return grpo(Batch(batch.logp_BT, batch.logp_old_BT, scaled, batch.mask_BT), whole)


def careless(batch, whole):
    return (terms(batch, whole) * batch.mask_BT).sum()


def selects(batch, whole):
    """Picks response tokens out first and so never reads padding, but does not bound the ratio."""
    mask = batch.mask_BT
    picked = Batch(*(torch.where(mask, x, 0.0) for x in (batch.logp_BT, batch.logp_old_BT)), batch.advantages_B, mask)
    return careless(picked, whole)


def by_column(batch, whole):
    return grpo(batch, whole) * batch.mask_BT.sum(1).max().clamp(min=1) / batch.mask_BT.shape[1]


def first_heavier(batch, whole):
    heavier = batch.advantages_B * (1 + 0.5 * (torch.arange(len(batch.advantages_B)) == 0))
    return grpo(Batch(batch.logp_BT, batch.logp_old_BT, heavier, batch.mask_BT), whole)


def own_mean(batch, whole):
    """Divides by the micro-batch and not by the mini-batch."""
    rows = len(batch.advantages_B)
    return grpo(batch, Whole(rows, int(batch.mask_BT.sum()), 1))


def mean_of_means(batch, whole):
    return own_mean(batch, whole) / whole.num_microbatches


def without_empty_rows(batch, whole):
    filled = int(batch.mask_BT.any(1).sum())
    return grpo(batch, whole) * (len(batch.mask_BT) / max(filled, 1))


def by_tokens_unguarded(batch, whole):
    return grpo(batch, whole) / batch.mask_BT.sum() * max(int(batch.mask_BT.sum()), 0)


def nan_to_zero(batch, whole):
    clean = Batch(batch.logp_BT.nan_to_num(), batch.logp_old_BT.nan_to_num(), batch.advantages_B, batch.mask_BT)
    return grpo(clean, whole)


def raises(batch, whole):
    raise RuntimeError("no\nsecond line")


NAN = math.nan
BREAKERS = [
    ("gradient_is_the_papers", twice_for_negative, Case((one(-1, 0),))),
    ("weight_is_one_on_policy", twice_for_negative, Case((one(-1, 0),))),
    ("finite_far_off_policy", selects, Case((one(1, 89),))),
    ("no_gradient_without_advantage", selects, Case((one(0, 89),))),
    ("padding_is_not_read", careless, Case((one(1, 0),), padding=1, filler=89)),
    ("padding_adds_nothing", by_column, Case((one(1, 0),), padding=1)),
    ("order_changes_nothing", first_heavier, Case((one(-1, 0), one(-1, 0)))),
    ("equal_microbatches_add_up", own_mean, Case((one(1, 0), one(-1, 0)))),
    ("unequal_microbatches_add_up", mean_of_means, Case((one(1, 0), one(1, 0), one(-1, 0)))),
    ("an_empty_response_counts", without_empty_rows, Case((one(1, 0), one(1)))),
    ("no_tokens_no_gradient", by_tokens_unguarded, Case((one(1),))),
    ("nan_is_not_hidden", nan_to_zero, Case((one(1, NAN),))),
]


@pytest.mark.parametrize(("law", "loss", "smallest"), BREAKERS, ids=[law for law, *_ in BREAKERS])
def test_a_loss_made_to_break_a_law_is_caught_at_the_smallest_case(law, loss, smallest) -> None:
    verdict = LAWS[law](subject(loss))
    assert verdict.status == BROKEN
    assert str(verdict.counterexample) == str(smallest)
    assert verdict.detail


def test_the_laws_are_told_apart() -> None:
    # The mean of micro-batch means is right where they are equal and wrong where they are not, and else a good loss.
    verdicts = judge(subject(mean_of_means))
    assert [v.law for v in verdicts if v.status == BROKEN] == ["unequal_microbatches_add_up"]
    assert [v.law for v in judge(subject(selects)) if v.status == BROKEN] == [
        "finite_far_off_policy",
        "no_gradient_without_advantage",
    ]


def test_every_law_is_broken_by_some_loss_here() -> None:
    assert {law for law, *_ in BREAKERS} | {"refuses_a_temperature_of_zero_or_less"} == set(LAWS)


def sapo_unchecked(hyper: dict[str, float]):
    """SAPO without a look at its temperatures."""

    def loss(batch: Batch, whole: Whole) -> torch.Tensor:
        taus = {"tau_pos": 1.0, "tau_neg": 1.05, **hyper}
        tau_B = torch.where(batch.advantages_B > 0, taus["tau_pos"], taus["tau_neg"]).double()[:, None]
        ratio = (batch.logp_BT - batch.logp_old_BT).exp()
        value = torch.sigmoid(tau_B * (ratio - 1)) * 4 / tau_B * batch.advantages_B[:, None]
        per_token = value / batch.mask_BT.sum(1, keepdim=True) / whole.num_sequences
        return -per_token[batch.mask_BT].sum()

    return loss


def test_an_accepted_temperature_of_zero_or_less_is_reported_by_name() -> None:
    law = "refuses_a_temperature_of_zero_or_less"
    tunable = Subject("it", make_objective("sapo"), "sequence_mean", sapo_unchecked({}), remake=sapo_unchecked)
    expected = "accepts tau_pos = 0, tau_pos = -1, tau_neg = 0, tau_neg = -1"
    assert LAWS[law](tunable) == Verdict(law, BROKEN, expected)
    fixed = Subject("it", make_objective("sapo"), "sequence_mean", sapo_unchecked({}))
    assert LAWS[law](fixed) == Verdict(law, DOES_NOT_APPLY, "its temperature cannot be set")


def test_a_weight_that_leaves_one_at_another_temperature_only_is_found_with_that_temperature() -> None:
    def off_by_tau(hyper):
        right, scale = sapo_unchecked(hyper), 1.0 if hyper.get("tau_pos", 1.0) < 2 else 0.5
        return lambda batch, whole: scale * right(batch, whole)

    it = Subject("it", make_objective("sapo"), "sequence_mean", off_by_tau({}), remake=off_by_tau)
    verdict = LAWS["weight_is_one_on_policy"](it)
    assert verdict.status == BROKEN
    assert verdict.detail.endswith("-0.5 and not -1, tau_pos = 4, tau_neg = 4")


def test_an_error_of_the_loss_is_its_answer_and_its_first_line_the_detail() -> None:
    verdict = LAWS["finite_far_off_policy"](subject(raises))
    assert (verdict.status, verdict.detail) == (BROKEN, "RuntimeError: no (float32)")


def test_a_loss_that_cannot_be_asked_for_a_part_is_not_judged_by_the_split() -> None:
    verdict = LAWS["equal_microbatches_add_up"](subject(own_mean, unsplittable="it cannot"))
    assert verdict == Verdict("equal_microbatches_add_up", DOES_NOT_APPLY, "it cannot")


def test_a_gradient_that_is_off_by_a_little_is_found_and_by_rounding_is_not() -> None:
    def off(by):
        return subject(lambda batch, whole: grpo(batch, whole) * (1 + by))

    assert LAWS["gradient_is_the_papers"](off(1e-5)).status == BROKEN
    assert LAWS["gradient_is_the_papers"](off(1e-9)).status == HELD


def test_shrinking_ends_at_the_smallest_case_that_is_still_broken() -> None:
    messy = Case((Response(-1.5, (0.123, 97.3, -4.0), -3.0), Response(0.5, (0.2,))), padding=3, filler=12.5)

    def broken(case: Case) -> bool:
        return any(z >= 7 and r.advantage < 0 for r in case.responses for z in r.log_ratios)

    assert shrink(messy, broken) == Case((Response(-1.0, (7.0,)),))
    assert shrink(messy, lambda case: case == messy) == messy
    tried: list[Case] = []
    shrink(messy, lambda case: bool(tried.append(case)), budget=5)
    assert len(tried) == 5


def test_a_case_becomes_log_probabilities_with_that_log_ratio() -> None:
    batch = Case((one(1.0, 100.0, -100.0), one(-0.5, 0.25)), padding=1, filler=NAN).tensors(torch.float32)
    ratios_BT = (batch.logp_BT - batch.logp_old_BT).detach()
    assert ratios_BT[0, :2].tolist() == [100, -100]
    assert ratios_BT[1, 0].item() == 0.25
    assert bool((batch.logp_BT[batch.mask_BT] <= 0).all())
    assert bool((batch.logp_old_BT[batch.mask_BT] <= 0).all())
    assert batch.mask_BT.tolist() == [[True, True, False], [True, False, False]]
    assert bool(batch.logp_BT[~batch.mask_BT].isnan().all())
    assert bool(batch.logp_old_BT[~batch.mask_BT].isnan().all())
