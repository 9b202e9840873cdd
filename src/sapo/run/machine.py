"""The machine of a run: its device and threads, and the record of what decides its bits."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sapo.config import RunConfig
from sapo.config.model import ModelConfig
from sapo.errors import ConfigError
from sapo.rollout.local.cpu.native import kernels_in_use
from sapo.utils.machine import processor_name

RECORDED_PACKAGES = ("sapo-rl", "torch", "transformers", "tokenizers", "safetensors", "numpy")


DECIDING_BITS = ("versions", "processor", "cpu_capability", "mkl_cbwr", "kernels", "gpu")
"""What of `provenance` has to be the same for the same bits."""


def resolve_device(device: str) -> str:
    """Resolve `auto` to the device the machine has.

    Raises:
        ConfigError: a device that is not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N; got {device!r}") from error
    kind, number = asked.type, asked.index
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N; got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} was asked for but this machine has no CUDA device; use cpu or auto")
    if kind == "cuda" and number is not None and number >= (count := torch.cuda.device_count()):
        raise ConfigError(f"device {device!r} was asked for but this machine has {count} CUDA devices, counted from 0")
    return device


def resolve_dtype(config: RunConfig, device: str) -> str:
    """Return the precision that a model computes in: bfloat16 on a GPU that has it, unless the recipe names another.

    Everything on a CPU stays in float32.
    """
    if not device.startswith("cuda") or not has_bfloat16(device):
        return config.model.dtype
    return dtype_on_gpu(config.model)


def dtype_on_gpu(model: ModelConfig) -> str:
    """Return the precision on a GPU that has bfloat16.

    Weights and gradients are summed in float32 then (training/optimizer.py). An adapter stays in float32, in which it
    is folded into the weights that draw; so do cold starts, which are tiny.
    """
    stays = "dtype" in model.model_fields_set or model.lora is not None or model.coldstart is not None
    return model.dtype if stays else "bfloat16"


def has_bfloat16(device: str | int) -> bool:
    """Return whether a GPU computes in bfloat16 itself: older ones emulate it, slowly."""
    return torch.version.hip is not None or torch.cuda.get_device_properties(device).major >= 8


def resolve_machine(config: RunConfig) -> RunConfig:
    """Choose threads, device and precision, and apply the threads: another count is another rounding.

    Ranks that are started with the run share the machine's threads; torchrun's have been given theirs.

    Raises:
        ConfigError: a device that is not there, or CUDA graphs on one that has none.
    """
    sharing = 1 if "TORCHELASTIC_RUN_ID" in os.environ else config.train.ranks
    threads = config.threads or max(1, torch.get_num_threads() // sharing)
    torch.set_num_threads(threads)
    device = resolve_device(config.device)
    if config.rollout.cuda_graphs is True and not device.startswith("cuda"):
        raise ConfigError(
            f"rollout.cuda_graphs=true needs a CUDA device; got device {device}; auto leaves them out there"
        )
    model = config.model.model_copy(update={"dtype": resolve_dtype(config, device)})
    return config.model_copy(update={"threads": threads, "device": device, "model": model})


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Return versions, commit and machine, for config.yaml; of a run on a GPU what it is too."""
    gpu = {"gpu": gpu_identity(torch.device(device))} if device.startswith("cuda") else {}
    return gpu | {
        "versions": {name: metadata.version(name) for name in RECORDED_PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkl_cbwr": os.environ.get("MKL_CBWR"),
        "kernels": kernels_in_use(),
        "git_commit": _git_commit(),
    }


def gpu_identity(device: torch.device) -> dict[str, Any]:
    """Return the name of a GPU, its architecture, and the libraries that choose its kernels."""
    properties = torch.cuda.get_device_properties(device)
    driver = getattr(torch._C, "_cuda_getDriverVersion", None)
    return {
        "name": properties.name,
        "architecture": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": driver() if driver is not None and torch.version.cuda else None,
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


def _git_commit() -> str | None:
    """Return the commit of the source checkout, marked when it has been changed; None for an installed package."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        tracked = subprocess.run(
            ["git", "-C", str(here), "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10
        )
        changed = subprocess.run(
            ["git", "-C", str(here), "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    if tracked.returncode:  # some other repository that we happen to be installed under
        return None
    return commit + ("+changes" if changed else "")
