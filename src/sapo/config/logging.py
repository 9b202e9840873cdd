"""Where a recipe's figures go beside metrics.jsonl, and its profile."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sapo.config.section import Section


class WandbConfig(Section):
    """A run of Weights & Biases (extra `wandb`)."""

    project: str = "sapo"
    """The project it belongs to."""
    name: str | None = None
    """What the run is called; the run directory's name when null."""
    entity: str | None = None
    """User or team; the one logged in when null."""
    group: str | None = None
    """Runs shown together, several seeds for instance."""
    tags: list[str] = Field([])
    """Labels of the run."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """offline writes wandb/ in the run directory, for `wandb sync` later; null takes WANDB_MODE, else online."""


class TrackioConfig(Section):
    """A run of trackio (extra `trackio`)."""

    project: str = "sapo"
    """The project it belongs to."""
    name: str | None = None
    """What the run is called; the run directory's name when null. An id is added, since trackio knows runs by name."""
    space_id: str | None = None
    """A Space of the hub to log to; null keeps everything on this machine, in $TRACKIO_DIR."""


class LogConfig(Section):
    """What is written beside metrics.jsonl."""

    tensorboard: bool = True
    """Write tensorboard/."""
    wandb: WandbConfig | None = None
    """Log to Weights & Biases as well; null does not."""
    trackio: TrackioConfig | None = None
    """Log to trackio as well; null does not."""
    rollouts_every: int = Field(10, ge=0)
    """Steps between files in rollouts/; 0 writes none."""


class ProfileConfig(Section):
    """Where the time goes: parts of phases timed, some steps traced operator by operator."""

    first_step: int = Field(2, ge=1)
    """The first step traced, 1-based; the run's first one also pays for what is done once."""
    steps: int = Field(1, ge=0)
    """Steps traced; a traced step is slower, and its file grows with the tokens it generates. 0 only times."""
