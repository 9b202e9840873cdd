"""Start a vLLM server that sapo can train with: `python -m sapo.rollout.servers.serve MODEL [options of vLLM's]`.

MODEL is a directory with a config.json, or a name on the hub. Its weights are not read: the run sends them. What the
run needs of the server is set here, and what else is given goes to vLLM's server as it is. The token that every request
must have is read from SAPO_SERVER_TOKEN. An address beyond loopback is refused without one.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import runpy
import signal
import socket
import sys
import threading
from collections.abc import Sequence

from sapo.errors import ConfigError
from sapo.rollout.servers.address import is_loopback
from sapo.rollout.servers.description import BACKEND
from sapo.rollout.servers.guard import TOKEN
from sapo.utils.signals import ANNOUNCING, ignore

SERVER = "vllm.entrypoints.openai.api_server"
ENDS_WITH_PARENT = "SAPO_SERVER_ENDS_WITH_STDIN"
"""Set by a run for a server of its own: the server ends when its standard input closes."""

ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
DEFAULTS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
FIXED = [
    ("--load-format", "dummy"),
    ("--generation-config", "vllm"),
    ("--logprobs-mode", "processed_logprobs"),
    ("--weight-transfer-config", f'{{"backend": "{BACKEND}"}}'),
    ("--worker-extension-cls", "sapo.rollout.servers.worker.SapoWorker"),
    ("--middleware", "sapo.rollout.servers.guard.Guard"),
]


def arguments(model: str, options: Sequence[str]) -> list[str]:
    """Return the arguments of vLLM's server.

    Raises:
        ConfigError: an address beyond loopback without a token, or a port that is in use.
    """
    host = _given(options, "--host", "127.0.0.1")
    if not is_loopback(host) and not os.environ.get(TOKEN):
        raise ConfigError(
            f"a server beyond loopback takes weights and requests from whoever reaches it, and needs a token; got "
            f"--host {host} and no {TOKEN} in the environment; set it to a random word, for the run too"
        )
    _check_port(host, _given(options, "--port", "8000"))
    made = ["--model", model, "--host", "127.0.0.1", "--skip-tokenizer-init", "--enable-scale-out"]
    return [*made, *(part for pair in FIXED for part in pair), *options]


def _given(options: Sequence[str], name: str, default: str) -> str:
    """Return the last value that the options give a name."""
    values = [b for a, b in itertools.pairwise(options) if a == name]
    values += [option.removeprefix(f"{name}=") for option in options if option.startswith(f"{name}=")]
    return values[-1] if values else default


def _check_port(host: str, port: str) -> None:
    """Refuse a port that is in use, before vLLM has loaded for a minute to find that out."""
    try:
        family, _, _, _, place = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--host and --port must be free; got {host} {port}: {error}; choose another port") from error


def main(argv: Sequence[str]) -> None:
    """Run the server until it is ended."""
    if not argv or argv[0].startswith("-"):
        raise ConfigError("the server of which model? python -m sapo.rollout.servers.serve MODEL [options of vLLM's]")
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed here; docs/engines.md says how")
    os.environ.update(ENVIRONMENT)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if os.environ.pop(ENDS_WITH_PARENT, None):
        ignore(*ANNOUNCING)  # the run ends its servers by SIGTERM
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    sys.argv = [SERVER, *arguments(argv[0], argv[1:])]
    runpy.run_module(SERVER, run_name="__main__", alter_sys=True)


def _end_with_stdin() -> None:
    """Wait until nobody holds the other end of the standard input, then end this process and all it has started."""
    with open(0, "rb", buffering=0, closefd=False) as stream:
        while stream.read(1):
            pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"error: {error}")
