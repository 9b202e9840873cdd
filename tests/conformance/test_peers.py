"""The neighbours that are installed, judged: what is known of them is found again, with the smallest case."""

import math

import pytest

from sapo.conformance import BROKEN, Case, Response, judge
from sapo.conformance.peers import FAMILIES

TOKEN = Response(1.0, (0.0,))
OVERFLOW = 89.0
"""The first whole number whose exponential float32 cannot hold: log(3.4e38) = 88.7."""


def broken_laws(family: str, name: str) -> dict[str, Case | None]:
    pytest.importorskip({"liger": "liger_kernel"}.get(family, family))
    (subject,) = (s for s in FAMILIES[family].load() if s.name == f"{family} {name}")
    return {v.law: v.counterexample for v in judge(subject) if v.status == BROKEN}


@pytest.mark.parametrize("name", ["sapo", "grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("family", ["trl", "liger"])
def test_trl_and_liger_give_nan_at_a_log_ratio_of_89_on_padding_and_without_advantage(family: str, name: str) -> None:
    broken = broken_laws(family, name)
    assert broken["finite_far_off_policy"] == Case((Response(1.0, (OVERFLOW,)),))
    assert broken["no_gradient_without_advantage"] == Case((Response(0.0, (OVERFLOW,)),))
    assert broken["padding_is_not_read"] == Case((TOKEN,), padding=1, filler=OVERFLOW)
    assert "gradient_is_the_papers" not in broken
    assert "weight_is_one_on_policy" not in broken
    assert "order_changes_nothing" not in broken


@pytest.mark.parametrize("name", ["gspo", "luspo", "cispo", "vespo"])
@pytest.mark.parametrize("family", ["trl", "liger"])
def test_the_other_losses_of_trl_and_liger_have_the_gradient_of_their_papers_too(family: str, name: str) -> None:
    broken = broken_laws(family, name)
    assert "gradient_is_the_papers" not in broken
    assert "padding_is_not_read" in broken


def test_trl_rloo_and_gmpo_have_the_gradient_of_their_papers_and_overflow() -> None:
    for name in ("rloo", "gmpo"):
        broken = broken_laws("trl", name)
        assert "gradient_is_the_papers" not in broken
        assert broken["no_gradient_without_advantage"] == Case((Response(0.0, (OVERFLOW,)),))


def test_trl_accepts_a_temperature_of_zero_and_liger_refuses_it() -> None:
    law = "refuses_a_temperature_of_zero_or_less"
    assert law in broken_laws("trl", "sapo")
    assert law not in broken_laws("liger", "sapo")


def test_the_mean_of_microbatch_means_is_not_the_mean_of_the_minibatch() -> None:
    broken = broken_laws("trl", "grpo")
    assert "equal_microbatches_add_up" not in broken
    assert broken["unequal_microbatches_add_up"] == Case((TOKEN, TOKEN, Response(-1.0, (0.0,))))
    assert "unequal_microbatches_add_up" not in broken_laws("trl", "dapo")  # it is told the tokens of the mini-batch


def test_verls_vanilla_loss_is_not_grpo_where_its_dual_clip_cuts() -> None:
    # It clips at r = 3 where A < 0: log 3 = 1.1, and 2 is the first of our log-ratios beyond.
    assert broken_laws("verl", "vanilla")["gradient_is_the_papers"] == Case((Response(-1.0, (2.0,)),))


@pytest.mark.parametrize("name", ["sapo", "gspo", "cispo", "geo_mean", "dppo_tv"])
def test_verls_other_losses_have_the_gradient_of_their_papers_and_read_padding(name: str) -> None:
    broken = broken_laws("verl", name)
    assert "gradient_is_the_papers" not in broken
    padding = broken["padding_is_not_read"]
    assert padding is not None
    assert not math.isfinite(padding.filler)


def test_verls_geo_mean_is_not_told_the_size_of_the_minibatch() -> None:
    assert broken_laws("verl", "geo_mean")["equal_microbatches_add_up"] == Case((TOKEN, Response(-1.0, (0.0,))))
