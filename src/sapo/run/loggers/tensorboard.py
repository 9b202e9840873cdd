"""TensorBoard event files."""

from __future__ import annotations

from collections.abc import Mapping
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

    def close(self) -> None:
        """See `Logger.close`."""
        self._writer.close()
