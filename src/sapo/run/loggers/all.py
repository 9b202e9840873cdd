"""Where figures go beside metrics.jsonl: TensorBoard, Weights & Biases, trackio. All get the same ones.

metrics.jsonl is the record; a logger is a view of it, with the methods `log` and `close`, and no part of the state that
resumes bit for bit. A resumed run continues the same remote run. Its id is kept in loggers.json of the run directory
and not in the recipe, so that repeating a recipe makes another remote run.
"""

from __future__ import annotations

import importlib.util
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sapo.config import RunConfig
from sapo.errors import ConfigError
from sapo.run.loggers.base import Logger
from sapo.run.loggers.tensorboard import TensorBoard
from sapo.run.loggers.trackio import Trackio
from sapo.run.loggers.wandb import WeightsAndBiases, has_wandb_key, wandb_mode
from sapo.utils.files import write_whole
from sapo.utils.reading import read_json

IDENTITY = "loggers.json"


EXTRAS = {"wandb": "Weights & Biases", "trackio": "trackio"}


def check_loggers(config: RunConfig) -> None:
    """Refuse a logger that could not be opened, before anything is written.

    Raises:
        ConfigError: naming the extra and the command that adds it, or the key that is missing.
    """
    for extra, title in EXTRAS.items():
        if getattr(config.log, extra) is not None and importlib.util.find_spec(extra) is None:
            raise ConfigError(
                f"log.{extra} needs {title}, which is not installed; pip install 'sapo-rl[{extra}]' adds it, "
                f"log.{extra}=null does without"
            )
    if config.log.wandb is not None and wandb_mode(config.log.wandb) == "online" and not has_wandb_key():
        raise ConfigError(
            "log.wandb is online and no key is known; `wandb login` or WANDB_API_KEY gives one, "
            "log.wandb.mode=offline writes to the run directory"
        )


class LoggerSet:
    """The loggers of a run.

    Args:
        config: the run's.
        directory: the run directory.
        resumed_at: the step a resumed run goes on from, None for a run from its start.
        panels: a layout of custom scalars for TensorBoard; the others lay panels out by names.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: Path,
        resumed_at: int | None = None,
        panels: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.directory = directory
        self.resumed_at = resumed_at
        self.panels = panels
        self._loggers: list[Logger] = []

    def open(self) -> None:
        """Open all the recipe names.

        Raises:
            ConfigError: one cannot begin.
        """
        log, loggers = self.config.log, self._loggers
        if log.tensorboard:
            # Told to forget what a killed process wrote beyond its checkpoint; of a start over, everything.
            purge = 0 if self.resumed_at is None else self.resumed_at + 1
            loggers.append(TensorBoard(self.directory / "tensorboard", purge, self.panels))
        if log.wandb is not None or log.trackio is not None:
            settings = self.config.model_dump(mode="json", exclude={"log"})
            identity = run_identity(self.directory)
            if log.wandb is not None:
                loggers.append(WeightsAndBiases(log.wandb, self.directory, identity, settings))
            if log.trackio is not None:
                loggers.append(Trackio(log.trackio, self.directory.name, identity, settings))

    def go_back(self, step: int) -> None:
        """Log anew from an earlier step on, after a rollback."""
        self.close()
        self.resumed_at = step
        self.open()

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Hand figures to every logger."""
        for logger in self._loggers:
            logger.log(step, figures)

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Hand sampled completions to every logger."""
        for logger in self._loggers:
            logger.log_samples(step, samples)

    def close(self) -> None:
        """Close what was opened."""
        while self._loggers:
            self._loggers.pop().close()


def run_identity(directory: Path) -> str:
    """Return what names this run to loggers outside it: drawn once, the same after every resume."""
    file = directory / IDENTITY
    if not file.exists():
        write_whole(file, json.dumps({"id": secrets.token_hex(4)}) + "\n")
    identity = read_json(file, "the name that loggers know a run by").get("id")
    if not isinstance(identity, str) or not identity:
        raise ConfigError(f"{file} must hold the id that loggers know the run by; got {identity!r}; delete the file")
    return identity
