"""Runs killed inside episodes at seeded moments, then resumed: equal to the uninterrupted run, no process left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from trials.harness import Tally

MOMENTS = 20


def run(place: Path, share: float = 1.0, seed: int = 0) -> Tally:
    """Kill runs at a share of the moments, every other one with episodes in processes of their own."""
    moments = max(1, round(MOMENTS * share))
    done = subprocess.run(
        [sys.executable, "-m", "support.killed_in_episodes", str(place), str(seed), str(moments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    tally = Tally()
    for kill in map(json.loads, done.stdout.splitlines()):
        tally.tried += 1
        below = 2 if kill["play_in"] == "process" else 0  # at least a guard and a host, which have to end too
        if kill["killed"] and kill["equal"] and kill["processes"] >= below and not kill["left"]:
            tally.accepted += 1
        else:
            tally.broken.append(f"episodes: {kill}")
    return tally
