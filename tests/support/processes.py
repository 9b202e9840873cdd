"""A run as a process of its own, to be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from support.kernels import fresh_cache
from support.zygote import Forked

PATIENCE = 300.0  # seconds; a limit for a hung process, not a measurement

Process = subprocess.Popen | Forked


def start(
    *arguments: str, cwd: Path, torchrun: int | None = None, new_session: bool = False, anew: bool = False
) -> Process:
    """Start the command line.

    Args:
        arguments: of it.
        cwd: working directory.
        torchrun: by torchrun on so many processes.
        new_session: in a session of its own.
        anew: by an interpreter of its own, which a sitecustomize on its path may change.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SAPO_CACHE": fresh_cache(cwd / "cache")}
    if torchrun is None and not anew:
        return Forked("sapo", arguments, cwd, environment, new_session)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"] if torchrun else []
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "sapo", *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=new_session,
    )


def finish(process: Process, code: int = 0) -> str:
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, output
    return output


def kill_when(process: Process, moment: Callable[[], bool]) -> bool:
    """SIGKILL as soon as the moment comes; False when the process ended before it did."""
    deadline = time.monotonic() + PATIENCE
    while not moment():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return True


def last_line(run: Path) -> dict:
    """Last whole line of metrics.jsonl, empty when there is none."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1]) if lines else {}
    except (OSError, json.JSONDecodeError):
        return {}
