"""Models by path: a directory, a hub id, or the newest checkpoint of a run."""

from __future__ import annotations

import os
from pathlib import Path

from sapo.config.model import VisionConfig
from sapo.errors import ConfigError
from sapo.model.loading import load_policy
from sapo.model.policy import Policy
from sapo.run.directory import RunDirectory
from sapo.run.machine import resolve_device
from sapo.training.checkpoint import newest_whole

DEFAULT_PICTURE_TOKENS = VisionConfig().max_tokens_per_picture
"""Most tokens of a picture for a model that is of no run. Image processors allow up to 16,384."""


def newest_model(path: Path) -> Path:
    """Return the model directory meant by a path: itself, or the newest whole checkpoint of a run.

    Raises:
        ConfigError: a run without a checkpoint.
    """
    if not (path / "config.yaml").is_file():
        return path
    checkpoint = newest_whole(path / "checkpoints", on_broken=lambda _: None)
    if checkpoint is None:
        raise ConfigError(f"the run {path} has no whole checkpoint whose model could be used; resume it first")
    return checkpoint.path


def run_of(model: Path) -> Path | None:
    """Return the run directory that a path is, or is a checkpoint of."""
    real = Path(os.path.realpath(model))  # a link that leads to itself is no error here; loading it is one
    checkpoint_of = real.parent.parent if real.parent.name == "checkpoints" else None
    return next((d for d in (model, checkpoint_of) if d is not None and (d / "config.yaml").is_file()), None)


def load_model(model: str | Path, dtype: str | None = None, device: str = "auto") -> tuple[Policy, Path]:
    """Load a model by path or hub id, or the newest whole checkpoint of a run as the run's own recipe says.

    Args:
        dtype: that of a run's recipe, else float32, when None.

    Returns:
        The policy and where it was found.

    Raises:
        ConfigError, ModelError: it cannot be used.
    """
    run = run_of(Path(model))
    config = None if run is None else RunDirectory.read_config(run).model
    if dtype is None:
        dtype = "float32" if config is None else config.dtype
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"--dtype must be float32 or bfloat16; got {dtype!r}")
    directory = newest_model(Path(model))
    trusted = config is not None and config.trust_remote_code
    # A run's model says itself how large its pictures are: it was saved with the image processor it was trained with.
    most = DEFAULT_PICTURE_TOKENS if config is None else None
    policy = load_policy(
        directory,
        dtype,
        resolve_device(device),
        trust_remote_code=trusted,
        max_tokens_per_picture=most,
        text_only=config is not None and not config.vision.load,
    )
    return policy, directory
