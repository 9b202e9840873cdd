"""A side's end of the wire: JSON lines in, JSON lines out.

A side warms up by itself and says that it is ready. Then the parent writes {"do": "run"} for each round; the side
answers with its seconds, its units of work and facts by which the parent sees that both sides did the same work. Only
the standard library is imported, since vLLM's side runs in an environment without sapo.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LEARNING_RATE = 1e-6
WARM_TOKENS = 4
"""New tokens of each sequence in a round that only warms up."""


class Commands:
    """What the parent asks for, in order. Made before anything else is imported: libraries print as they load.

    Args:
        settings: a JSON file.
    """

    def __init__(self, settings: Path) -> None:
        # The wire keeps the real stdout; whatever a library prints goes to stderr.
        self._wire = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.settings: dict[str, Any] = json.loads(settings.read_text())
        self.imports: int | None = None
        """Bytes resident once everything was imported and nothing loaded."""

    def imported(self) -> None:
        """Everything is imported and nothing loaded yet: what is resident now is no matter of the work."""
        self.imports = self.peak_bytes()

    def ready(self, **about: Any) -> None:
        """Loaded and waiting."""
        self._send({"ready": True, "imports": self.imports, **about})

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = sys.stdin.readline()
        if not line:
            raise StopIteration
        return str(json.loads(line)["do"])

    def reply(self, seconds: float, work: float, **facts: Any) -> None:
        """One round: how long it took and how many units of work it was."""
        self._send({"seconds": seconds, "work": work, "peak": self.peak_bytes(), "facts": facts})

    def peak_bytes(self) -> int:
        """See `peak_bytes`; of the device that the settings name."""
        return peak_bytes(self.settings["device"])

    def _send(self, message: dict[str, Any]) -> None:
        self._wire.write(json.dumps(message) + "\n")
        self._wire.flush()


def peak_bytes(device: str) -> int:
    """Most that this process ever had resident, the device's memory instead where the work is on one."""
    if device.startswith("cuda"):
        return int(sys.modules["torch"].cuda.max_memory_allocated())
    [line] = [s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def limits_of(settings: dict[str, Any], do: str) -> list[list[int]]:
    """New tokens of each sample of each prompt: those of the workload, or a few to warm up."""
    limits: list[list[int]] = settings["limits"]
    return limits if do == "run" else [[min(WARM_TOKENS, n) for n in group] for group in limits]


def completions_of(limits: list[list[int]]) -> list[list[list[int]]]:
    """Token ids of given completions, the same on every side: of the first few hundred of the vocabulary, drawn by a
    seed."""
    generator = random.Random(3)
    return [[[generator.randrange(20, 500) for _ in range(count)] for count in group] for group in limits]
