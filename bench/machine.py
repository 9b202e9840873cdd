"""The machine and the versions that a figure belongs to."""

from __future__ import annotations

import platform
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.contest import Machine

PACKAGES = ("torch", "transformers", "trl", "liger_kernel")


def describe_machine(machine: Machine) -> dict[str, Any]:
    """Date, processor, threads and versions."""
    import torch

    about = {
        "date": date.today().isoformat(),
        "cpu": _cpu_name(),
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


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [s.split(":", 1)[1].strip() for s in info.read_text().splitlines() if s.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
