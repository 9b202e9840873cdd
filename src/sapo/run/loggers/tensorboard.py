"""TensorBoard event files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class TensorBoard:
    """Event files in the run directory.

    Args:
        purge_step: figures of an earlier process from this step on are hidden.
        panels: a layout of custom scalars.
    """

    def __init__(self, directory: Path, purge_step: int, panels: Mapping[str, Any] | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._writer = SummaryWriter(str(directory), purge_step=purge_step)
        if panels:
            self._writer.add_custom_scalars(dict(panels))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """See `Logger.log`."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """See `Logger.log_samples`. TensorBoard reads markdown, so texts are indented: shown as they are."""
        parts = [
            f"**{s['task']}**, reward {s['reward']:.3f}\n\n{_code(s['prompt'])}\n\n{_code(s['text'])}" for s in samples
        ]
        self._writer.add_text("samples", "\n\n---\n\n".join(parts), step)

    def close(self) -> None:
        """See `Logger.close`."""
        self._writer.close()


def _code(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
