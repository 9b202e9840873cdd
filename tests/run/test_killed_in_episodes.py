"""kill -9 in the middle of episodes, then a resume: the run is the one that was not killed, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from trials import episodes


@pytest.mark.scale
def test_a_run_killed_in_an_episode_leaves_no_process_and_resumes_to_the_bit(tmp_path: Path) -> None:
    """At two seeded moments: one of episodes in processes of their own, one of episodes in the run's.

    `make trials` has twenty.
    """
    tally = episodes.run(tmp_path, share=0.1, seed=1)
    assert tally.broken == []
    assert (tally.tried, tally.accepted) == (2, 2)
