"""The machine and the versions that a figure belongs to."""

from __future__ import annotations

from datetime import date
from importlib import metadata
from typing import Any

from bench.contest import Machine
from sapo.utils.machine import processor_name

PACKAGES = ("torch", "transformers", "trl", "liger_kernel")


def describe_machine(machine: Machine) -> dict[str, Any]:
    """Date, processor, threads and versions."""
    import torch

    about = {
        "date": date.today().isoformat(),
        "cpu": processor_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": machine.threads,
        "device": machine.device if machine.device == "cpu" else torch.cuda.get_device_name(),
        **{name: _version(name) for name in PACKAGES},
    }
    return {key: value for key, value in about.items() if value is not None}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
