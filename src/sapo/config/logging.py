"""Where a recipe's figures go beside metrics.jsonl, and its profile."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sapo.config.section import Section


class WandbConfig(Section):
    """A run of Weights & Biases (extra `wandb`)."""

    project: str = "sapo"
    """Project of the run."""
    name: str | None = None
    """Name of the run; the run directory's name when null."""
    entity: str | None = None
    """User or team that owns the run; the one logged in when null."""
    group: str | None = None
    """Group of runs that are shown together, for example several seeds."""
    tags: list[str] = Field([])
    """Labels of the run."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """offline writes wandb/ in the run directory, for `wandb sync` later; null takes WANDB_MODE, else online."""


class TrackioConfig(Section):
    """A run of trackio (extra `trackio`)."""

    project: str = "sapo"
    """Project of the run."""
    name: str | None = None
    """Name of the run; the run directory's name when null. An id is added, because trackio tells runs apart by name."""
    space_id: str | None = None
    """A Space of the hub to log to; null keeps everything on this machine, in $TRACKIO_DIR."""


class LogConfig(Section):
    """What is written beside metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard event files to tensorboard/ in the run directory."""
    wandb: WandbConfig | None = None
    """Also log to Weights & Biases; null does not."""
    trackio: TrackioConfig | None = None
    """Also log to trackio; null does not."""
    rollouts_every: int = Field(10, ge=0)
    """Steps between files in rollouts/; 0 writes none."""
    samples_every: int = Field(10, ge=0)
    """Steps between two sampled completions with their rewards in the terminal and the loggers; 0 shows none."""
    keep_pictures: bool = True
    """Keep what the prompts of rollouts/ show in pictures/, each picture once, by its hash. The report shows them."""


class ProfileConfig(Section):
    """Where the time goes: parts of phases timed, some steps traced operator by operator."""

    first_step: int = Field(2, ge=1)
    """First step that is traced, counted from 1. Step 1, the only one to do some work once, is left out by default."""
    steps: int = Field(1, ge=0)
    """Number of steps that are traced. A traced step is slower, and its file grows with the tokens it generates. 0 only
    times."""
