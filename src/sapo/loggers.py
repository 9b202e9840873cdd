"""Where figures go beside metrics.jsonl: TensorBoard, Weights & Biases, trackio. All get the same ones.

metrics.jsonl is the record; a logger is a view of it. None of them is asked for anything but `log` and `close`, none
takes part in the state that resumes to the bit, and a resumed run goes on in the same remote run: its id is kept in
loggers.json of the run directory, not in the recipe, so that repeating a recipe is another run.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from sapo.config import RunConfig, TrackioConfig, WandbConfig
from sapo.errors import ConfigError

IDENTITY = "loggers.json"

EXTRAS = {"wandb": "Weights & Biases", "trackio": "trackio"}


class Logger(Protocol):
    """Takes the figures of a step."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures by name; `task/<name>/...` are those of one task."""

    def close(self) -> None:
        """Everything is written down when this returns."""


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
    if config.log.wandb is not None and _wandb_mode(config.log.wandb) == "online" and not _has_wandb_key():
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
        """The run goes on from an earlier step: what was logged after it is logged anew."""
        self.close()
        self.resumed_at = step
        self.open()

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Hand figures to every logger."""
        for logger in self._loggers:
            logger.log(step, figures)

    def close(self) -> None:
        """Close what was opened."""
        while self._loggers:
            self._loggers.pop().close()


def panel_name(name: str) -> str:
    """A figure's name for loggers that make a panel of what stands before the first slash: one for each task.

    >>> panel_name("task/add4/reward/mean"), panel_name("train/reward/mean")
    ('task_add4/reward/mean', 'train/reward/mean')
    """
    return f"task_{name.removeprefix('task/')}" if name.startswith("task/") else name


def run_identity(directory: Path) -> str:
    """What names this run to loggers outside it: drawn once, the same after every resume."""
    file = directory / IDENTITY
    if not file.exists():
        aside = file.with_name(f".{IDENTITY}.writing")
        aside.write_text(json.dumps({"id": secrets.token_hex(4)}) + "\n")
        aside.rename(file)
    identity: str = json.loads(file.read_text())["id"]
    return identity


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


class WeightsAndBiases:
    """A run of wandb: files under the run directory's wandb/, sent from there when online.

    The x axis is the figure `step` and not wandb's own counter, which cannot go back: a run resumed from a checkpoint
    before its last line logs those steps again, with the same values.
    """

    def __init__(self, config: WandbConfig, directory: Path, identity: str, settings: Mapping[str, Any]) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                name=config.name or directory.name,
                group=config.group,
                tags=config.tags or None,
                id=identity,
                resume="allow",
                mode=config.mode,
                dir=str(directory),
                config=dict(settings),
                # The terminal is the display's, and neither code nor machine was asked for.
                settings=wandb.Settings(console="off", silent=True, save_code=False, disable_git=True),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"log.wandb could not begin: {' '.join(str(error).split())}; log.wandb.mode=offline needs no server"
            ) from error
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """See `Logger.log`."""
        self._run.log({"step": step, **{panel_name(name): value for name, value in figures.items()}})

    def close(self) -> None:
        """See `Logger.close`."""
        self._run.finish()


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

    def close(self) -> None:
        """See `Logger.close`."""
        with redirect_stdout(io.StringIO()):
            self._run.finish()


def _wandb_mode(config: WandbConfig) -> str:
    return config.mode or os.environ.get("WANDB_MODE", "online")


def _has_wandb_key() -> bool:
    """Whether wandb would find a key without asking for one."""
    import wandb

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    from wandb.sdk.lib.wbauth import read_netrc_auth

    base_url = wandb.Settings().base_url
    return read_netrc_auth(host=base_url) is not None
