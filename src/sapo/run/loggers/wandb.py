"""Runs of Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sapo.config import WandbConfig
from sapo.errors import ConfigError
from sapo.run.loggers.base import SAMPLE_COLUMNS, panel_name, sample_rows


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

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """See `Logger.log_samples`."""
        import wandb

        table = wandb.Table(columns=list(SAMPLE_COLUMNS), data=sample_rows(step, samples))
        self._run.log({"step": step, "samples": table})

    def close(self) -> None:
        """See `Logger.close`."""
        self._run.finish()


def wandb_mode(config: WandbConfig) -> str:
    """Return online, offline or disabled: the recipe's, else that of the environment."""
    return config.mode or os.environ.get("WANDB_MODE", "online")


def has_wandb_key() -> bool:
    """Return whether wandb would find a key without asking for one."""
    import wandb

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    from wandb.sdk.lib.wbauth import read_netrc_auth

    base_url = wandb.Settings().base_url
    return read_netrc_auth(host=base_url) is not None
