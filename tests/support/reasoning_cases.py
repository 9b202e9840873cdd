"""Settings of data sets of reasoning-gym, and programs in processes with a hash seed of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def knobs(**settings: Any) -> str:
    """Settings of a data set as JSON."""
    return json.dumps({"seed": 0, "size": 1000, **settings}, sort_keys=True)


def in_another_process(code: str, argument: str, hash_seed: str) -> Any:
    """What a program prints as JSON."""
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", code, argument]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)
