"""vLLM servers that a run starts by itself: child processes on loopback that end when the run does, however it ends."""

from __future__ import annotations

import copy
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sapo.config import VllmConfig
from sapo.model.policy import Policy
from sapo.rollout.servers.guard import TOKEN
from sapo.rollout.servers.serve import ENDS_WITH_PARENT

GIB = 2**30
PREFILL_TOKENS = 8192
ENDING_SECONDS = 10.0
"""How long a server may take to end by itself, before it is ended."""


class ServerProcess:
    """One server of this run's own.

    Args:
        model: directory with the policy's config.
        options: of vLLM's server.
        log: takes what the server prints, appended.
        token: that it asks for.
        device: number of the CUDA device it has for itself; None on a CPU.
    """

    def __init__(self, model: Path, options: Sequence[str], log: Path, token: str, device: int | None) -> None:
        self._model, self._options, self._log = model, list(options), log
        self._environment = {**os.environ, TOKEN: token, ENDS_WITH_PARENT: "1"}
        self._environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        if device is not None:
            self._environment["CUDA_VISIBLE_DEVICES"] = str(device)
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def start(self) -> str:
        """Start the server on a free port; return its address, where it does not answer yet."""
        assert self._process is None, "a server is ended before it is started again"
        self.port = _free_port()
        command = [sys.executable, "-m", "sapo.rollout.servers.serve", str(self._model), "--port", str(self.port)]
        with self._log.open("ab") as log:
            # In a session of its own, a Ctrl-C in the terminal is the run's to answer. Its standard input is a pipe
            # that nobody writes to: it closes when the run ends, however that is.
            self._process = subprocess.Popen(
                [*command, *self._options],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        return f"http://127.0.0.1:{self.port}"

    @property
    def started(self) -> bool:
        """Return whether it was started and not ended by us since."""
        return self._process is not None

    def ending(self) -> str | None:
        """Return how the process has ended and what it said last, None while it lives."""
        if self._process is None or (code := self._process.poll()) is None:
            return None
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"process {self._process.pid} {how}; {self._last_words()}"

    def end(self, seconds: float = ENDING_SECONDS) -> None:
        """End the server with all processes it has started; it has some seconds to do so by itself."""
        process, self._process = self._process, None
        if process is None:
            return
        if seconds and process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdin is not None
        process.stdin.close()

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{self._log} ends with: {lines[-1].strip()[:300]}" if lines else f"{self._log} is empty"


def save_config(policy: Policy, directory: Path) -> None:
    """Write the config that servers are started from; they are sent the weights."""
    config = copy.deepcopy(policy.model.config)
    config.architectures = [type(policy.model).__name__]
    config.save_pretrained(directory)


def server_options(policy: Policy, max_rows: int, settings: VllmConfig) -> list[str]:
    """Return the options of vLLM's server for a policy; see `VllmCore` for those of the engine in process."""
    on_cpu = policy.device.type == "cpu"
    gib = settings.kv_cache_gib or (1.0 if on_cpu else None)
    eager = on_cpu if settings.enforce_eager is None else settings.enforce_eager
    options = ["--dtype", str(policy.dtype).removeprefix("torch."), "--max-num-seqs", str(max_rows)]
    options += ["--max-model-len", str(settings.max_model_len or -1)]
    options += ["--gpu-memory-utilization", str(settings.gpu_memory_utilization)]
    if gib is not None:
        options += ["--kv-cache-memory-bytes", str(int(gib * GIB))]
    if eager:
        options += ["--enforce-eager"]
    if on_cpu:  # a prompt that is cut turns the generator of its request back, which a CPU's cannot do
        longest = settings.max_model_len or policy.max_length or 0
        options += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(PREFILL_TOKENS, longest))]
    return options


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
