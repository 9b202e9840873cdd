"""A process of a run on a node of a Ray cluster: what is imported there first, so it imports nothing of ours.

On the driver it is imported where a process is started, and not before: Ray need not be installed.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray


class HostedProcess:
    """The actor that a process of a run lives in.

    Args:
        name: of the process, for the first line of its log.
    """

    def __init__(self, name: str) -> None:
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
        self._object: Any = None
        self._name = name

    def whereabouts(self) -> tuple[str, int]:
        """Return the name of the node and the number of the process."""
        return platform.node(), os.getpid()

    def gpus(self) -> str:
        """Return the CUDA devices that Ray has given to this process, as in CUDA_VISIBLE_DEVICES."""
        return os.environ.get("CUDA_VISIBLE_DEVICES", "")

    def run(self, target: str, *arguments: Any) -> None:
        """Call a function, named as module:function. An error it raises is printed, and ends the process.

        A process that lived on would keep its connections, and whoever waits for an answer over one would wait forever.
        """
        try:
            with _printing_errors():
                _find(target)(*arguments)
        except Exception:
            sys.stdout.flush()
            os._exit(1)

    def build(self, target: str) -> None:
        """Make the object, of the class named as module:class, whose method `call` answers from now on."""
        with _printing_errors():
            self._object = _find(target)()

    def call(self, number: int, *data: bytes) -> tuple[bytes, ...]:
        """Have the object answer a call; what goes there and back is bytes.

        Args:
            number: of the call; each is greater than the one before.
        """
        assert self._object is not None, "it could not be built; its log says why"
        with _printing_errors():
            return tuple(self._object.call(number, *data))

    @ray.method(concurrency_group="beside")
    def stop(self, number: int) -> None:
        """Ask the object to leave its work at a call, in a thread beside that call."""
        self._object.stop(number)

    @ray.method(concurrency_group="beside")
    def log_to(self, log: str) -> bool:
        """Print to a file from now on, if the node reaches its directory; return whether it does."""
        if not Path(log).parent.is_dir():
            return False
        _print_to(log)
        print(f"{self._name} on node {platform.node()}, process {os.getpid()}", flush=True)
        return True


def _find(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


@contextmanager
def _printing_errors() -> Iterator[None]:
    try:
        yield
    except Exception:
        traceback.print_exc()
        raise


def _print_to(log: str) -> None:
    """Print to a file, libraries' own output included."""
    file = open(log, "a", buffering=1)  # noqa: SIM115 (for as long as the process lives)
    for stream in (1, 2):
        os.dup2(file.fileno(), stream)
    sys.stdout = sys.stderr = file


def _end_with_parent(parent: int) -> None:
    """End this process soon after Ray's on its node has died: Ray lets an actor in the middle of a call live on."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
