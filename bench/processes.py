"""The processes that a run starts, found from outside by the module that they run."""

from __future__ import annotations

from contextlib import suppress

import psutil

RANK = "sapo.workflows.training_group"
"""What a rank other than the driver runs."""

ENGINE = "sapo.rollout.remote.process"
"""What an engine in a process of its own runs."""


def processes_of(driver: int, module: str = RANK) -> list[psutil.Process]:
    """Return the processes below a driver that run a module with `-m`, in the order they were started."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(driver).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if module in child.cmdline():
                    found.append(child)
    return found
