"""Environments of other projects, played by ours: `environment: trl:module:Class` in a task of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sapo.environments.adapters.openenv import OpenEnvEnvironment
from sapo.environments.adapters.skyrl import SkyRlEnvironment
from sapo.environments.adapters.trl import TrlEnvironment
from sapo.errors import TaskError
from sapo.utils.names import did_you_mean


def _verifiers(name: str, task: Any, **options: Any) -> Any:
    from sapo.environments.verifiers.environment import VerifiersEnvironment  # which loads a web server

    return VerifiersEnvironment.named(name, task, **options)


ADAPTERS: dict[str, Callable[..., Any]] = {
    "trl": TrlEnvironment.named,
    "skyrl": SkyRlEnvironment.named,
    "openenv": OpenEnvEnvironment.named,
    "verifiers": _verifiers,
}
"""Adapters by the name that `environment` begins with."""


def adapted(spec: Any, task: Any, **options: Any) -> Any:
    """Return a task whose prompts are played by an environment of another project.

    Args:
        spec: as a recipe writes it, `trl:module:Class`.
        task: source of the prompts.
        options: of the adapter.

    Raises:
        TaskError: there is no such adapter or environment, or it cannot do what is asked.
    """
    kind, _, name = str(spec).partition(":")
    if kind not in ADAPTERS or not name:
        raise TaskError(
            f"environment must be one of {', '.join(f'{known}:...' for known in ADAPTERS)}; got {spec!r:.60}"
            f"{did_you_mean(kind, ADAPTERS)}"
        )
    try:
        return ADAPTERS[kind](name, task, **options)
    except TypeError as error:
        if options and "unexpected keyword" in str(error):
            raise TaskError(f"environment {spec!r} does not take the options {', '.join(options)}: {error}") from error
        raise
