"""Small whole runs in this process, and a listener that remembers what it heard."""

from __future__ import annotations

from pathlib import Path

import sapo
from sapo.training.checkpoint import Checkpoint
from support.runs import write_recipe


class Recorder:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.records: list[dict] = []
        self.warnings: list[str] = []
        self.checkpoints: list[Checkpoint] = []

    def started(self, config: sapo.RunConfig) -> None: ...

    def record(self, record: dict) -> None:
        self.records.append(record)

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        self.checkpoints.append(checkpoint)

    def resumed(self, checkpoint: Checkpoint) -> None: ...


def run_recipe(directory: Path, listener: Recorder | None = None, should_stop=lambda: False, **changes) -> Path:
    directory.mkdir(exist_ok=True)
    config = sapo.load_recipe(write_recipe(directory, **changes))
    return sapo.train(config, listener=listener, should_stop=should_stop).directory
