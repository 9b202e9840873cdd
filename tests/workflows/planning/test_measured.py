"""A plan's memory is within 15% of what real processes take, on one and two CPU ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.plan import AT_ONCE, CASES, PROMPT_TOKENS, Case, baseline, peaks, planned, save_model, write_recipe

from sapo.config.recipes import load_recipe
from sapo.workflows.planning.plan import make_plan

pytestmark = [
    pytest.mark.scale,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc"),
]

BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", [BY_NAME["dense"], BY_NAME["mixture of experts"]], ids=lambda c: c.name)
def test_the_plan_is_within_15_percent_of_each_ranks_peak(case: Case, ranks: int, tmp_path: Path) -> None:
    recipe = write_recipe(case, save_model(case.model, tmp_path / "model"), tmp_path / "run", ranks)
    plan = make_plan(load_recipe(recipe), prompt_tokens=PROMPT_TOKENS)
    beyond = baseline(case)
    # Where glibc gives freed blocks back at once: the plan has no share of what it would keep.
    measured = [peak - beyond for peak in peaks(recipe, AT_ONCE)]
    assert len(measured) == ranks
    for estimate, peak in zip(plan.memory.ranks.values(), measured, strict=True):
        assert planned(estimate) == pytest.approx(peak, rel=0.15), (estimate, measured)
