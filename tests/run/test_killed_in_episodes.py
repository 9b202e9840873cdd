"""kill -9 in the middle of episodes, then a resume: the run is the one that was not killed, to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PATH = os.pathsep.join(sys.path)


@pytest.mark.scale
def test_a_run_killed_in_an_episode_leaves_no_process_and_resumes_to_the_bit(tmp_path: Path) -> None:
    """At two seeded moments: one of episodes in processes of their own, one of episodes in the run's.

    `python -m support.killed_in_episodes DIRECTORY 0 20` was run for docs/reliability.md.
    """
    done = subprocess.run(
        [sys.executable, "-m", "support.killed_in_episodes", str(tmp_path), "1", "2"],
        env={**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert [kill["play_in"] for kill in kills] == ["process", "driver"]
    assert kills[0]["processes"] >= 2, "a guard and a host at least"
    for kill in kills:
        assert kill["killed"], kill
        assert kill["equal"], kill
        assert not kill["left"], kill
