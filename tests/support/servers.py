"""Fake vLLM servers (support/fake_vllm) of the tests: started by hand at an address, or by a run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from sapo.rollout.servers.guard import TOKEN

FAKE = Path(__file__).parent / "fake_vllm"
PATIENCE = 300.0  # seconds; a limit for a hung process, not a measurement
SERVE = "sapo.rollout.servers.serve"


def with_fake(environment: dict[str, str], **knobs: dict[str, Any]) -> dict[str, str]:
    """Return an environment in which vLLM is the fake one; `knobs` by server, as `s1` for server 1."""
    path = os.pathsep.join([str(FAKE), *filter(None, sys.path)])
    named = {name.removeprefix("s") or "*": wrong for name, wrong in knobs.items()}
    return {**environment, "PYTHONPATH": path, "FAKE_VLLM": json.dumps(named)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(
    model: Path, count: int = 1, *, token: str | None = None, port: int = 0, wrong: dict[str, Any] | None = None
) -> Iterator[list[tuple[str, subprocess.Popen]]]:
    """Start fake servers by hand, side by side; give the address and the process of each, and end them."""
    environment = with_fake(dict(os.environ), s=wrong or {})
    environment.pop(TOKEN, None)
    if token is not None:
        environment[TOKEN] = token
    started = []
    try:
        for _ in range(count):
            own = port or free_port()
            command = [sys.executable, "-m", SERVE, str(model), "--port", str(own), "--dtype", "float32"]
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            started.append((f"http://127.0.0.1:{own}", process))
        for address, process in started:
            wait_for(address, process)
        yield started
    finally:
        for _, process in started:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()


def order(address: str, **wrong: Any) -> int:
    """Have a fake server do something wrong from now on; return how many requests it has had since the last order."""
    return httpx.post(f"{address}/fake", json=wrong, timeout=30).json()["requests"]


def wait_for(address: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr and process.stderr.read()
        with suppress(httpx.HTTPError):
            httpx.get(f"{address}/health", timeout=5)
            return
        time.sleep(0.1)
    raise AssertionError("the server never answered")


def servers_of(pid: int) -> list[psutil.Process]:
    """Return the server processes that a process has started, the oldest first."""
    with suppress(psutil.NoSuchProcess):
        found = [p for p in psutil.Process(pid).children(recursive=True) if _serves(p)]
        return sorted(found, key=lambda p: p.create_time())
    return []


def _serves(process: psutil.Process) -> bool:
    try:
        return SERVE in process.cmdline()
    except psutil.Error:
        return False


def gone(processes: list[psutil.Process], seconds: float = 30.0) -> bool:
    """Return whether all have ended, zombies that wait for their parent counted."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
            return True
        time.sleep(0.05)
    return False


def kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)
