"""The sides of bench.ranks do the same update, ours and TRL's, on one rank and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.contest import Machine
from bench.ranks import TINY, measure, table

pytest.importorskip("trl")


@pytest.mark.scale
def test_one_and_two_ranks_of_ours_and_of_trl_make_the_same_update(tmp_path: Path) -> None:
    result = measure(TINY, Machine(1, "cpu", timeout=300.0), 2, tmp_path, say=lambda _: None)
    sides = result["sides"]
    assert not [side["error"] for side in sides.values() if "error" in side]
    losses = [side["facts"][0]["losses"] for side in sides.values()]
    assert abs(losses[0][0]) > 1e-3
    for loss in losses:
        assert loss == pytest.approx(losses[0], rel=5e-3)  # TRL divides by the deviation plus 1e-4
    two = sides["sapo, ranks 2"]
    assert two["weights"] < 1e-5
    assert two["norm_gap"] < 1e-4
    assert not sides["TRL, ranks 1"]["sharded"]
    if not sides["TRL, ranks 2"]["sharded"]:  # accelerate on CPUs: the table has to say so
        assert table(result).splitlines()[-1].endswith("all weights on each rank |")
    assert table(result).count("\n") == 5
