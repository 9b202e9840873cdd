"""Runs of trackio."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

from sapo.config import TrackioConfig
from sapo.run.loggers.base import SAMPLE_COLUMNS, panel_name, sample_rows


class Trackio:
    """A run of trackio in its local store ($TRACKIO_DIR), or in a Space of the hub when one is named."""

    def __init__(self, config: TrackioConfig, run_name: str, identity: str, settings: Mapping[str, Any]) -> None:
        import trackio

        with redirect_stdout(io.StringIO()):  # it greets on standard output, which is the display's
            self._run = trackio.init(
                project=config.project,
                # It finds a run to resume by its name, so that must be this run's alone.
                name=f"{config.name or run_name}-{identity}",
                space_id=config.space_id,
                config=dict(settings),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """See `Logger.log`."""
        self._run.log({panel_name(name): value for name, value in figures.items()}, step=step)

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """See `Logger.log_samples`."""
        import trackio

        with redirect_stdout(io.StringIO()):
            table = trackio.Table(columns=list(SAMPLE_COLUMNS), data=sample_rows(step, samples))
            self._run.log({"samples": table}, step=step)

    def close(self) -> None:
        """See `Logger.close`."""
        with redirect_stdout(io.StringIO()):
            self._run.finish()
