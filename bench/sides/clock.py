"""What a side measures itself with: a clock, and which library its matrix products went through."""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def use_machine(settings: dict[str, Any]) -> torch.device:
    """Threads and device of the settings, applied."""
    torch.set_num_threads(settings["threads"])
    return torch.device(settings["device"])


class Stopwatch:
    """Runs from its making; on a GPU between two events of its stream, everything before it finished."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._on_gpu = self._device.type == "cuda"
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
            self._start, self._end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._start.record(torch.cuda.current_stream(self._device))
        self._started = time.perf_counter()

    def stop(self) -> float:
        """Seconds since it was made."""
        if not self._on_gpu:
            return time.perf_counter() - self._started
        self._end.record(torch.cuda.current_stream(self._device))
        torch.cuda.synchronize(self._device)
        return float(self._start.elapsed_time(self._end)) / 1000


def timed(function: Callable[[], T], device: torch.device | str = "cpu") -> tuple[float, T]:
    """Seconds of a call, and its result."""
    watch = Stopwatch(device)
    result = function()
    return watch.stop(), result


_MKL = re.compile(r"^MKL_VERBOSE (\w*GEMM\w*)\(.*?\) ([\d.]+)(ns|us|ms|s)\b")
_ONEDNN = re.compile(r"^onednn_verbose,(?:v\d+,)?primitive,exec,\w+,(matmul|inner_product),([^,]+),.*,([\d.]+)$")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}


def parse_gemms(text: str) -> dict[str, float]:
    """Seconds by library in the verbose output of MKL and oneDNN.

    >>> parse_gemms("MKL_VERBOSE SGEMM(N,N,8,8,8) 2.50us CNR:OFF\\nMKL_VERBOSE SGEMM(T,N,4,4,4) 1.5us CNR:OFF")
    {'MKL SGEMM': 4e-06}
    >>> parse_gemms("onednn_verbose,v1,primitive,exec,cpu,matmul,brg_matmul:avx512_core_bf16,undef,src:bf16,,,8x8,0.25")
    {'oneDNN brg_matmul:avx512_core_bf16': 0.00025}
    """
    seconds: dict[str, float] = defaultdict(float)
    for line in text.splitlines():
        if found := _MKL.match(line):
            seconds[f"MKL {found[1]}"] += float(found[2]) * _SECONDS[found[3]]
        elif found := _ONEDNN.match(line):
            seconds[f"oneDNN {found[2]}"] += float(found[3]) / 1000
    return dict(seconds)


def describe_gemms(seconds: dict[str, float]) -> str:
    """Libraries by their share of the time, those below a twentieth left out.

    >>> describe_gemms({"MKL SGEMM": 3.0, "oneDNN gemm:jit": 1.0, "MKL SGEMV": 0.01})
    'MKL SGEMM 75%, oneDNN gemm:jit 25%'
    """
    total = sum(seconds.values())
    shares = sorted(((s / total, name) for name, s in seconds.items()), reverse=True) if total else []
    return ", ".join(f"{name} {share:.0%}" for share, name in shares if share >= 0.05)


class Listening:
    """Has MKL and oneDNN tell what they do from its making to its stop; stdout goes to a file meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._stack = ExitStack()
        self._file = os.fdopen(os.memfd_create("heard"), "rb")
        self._stdout = os.dup(1)
        self._stack.callback(self._give_back)
        os.dup2(self._file.fileno(), 1)
        for library in (torch.backends.mkl, torch.backends.mkldnn):
            if library.is_available() and not self._on_gpu:
                self._stack.enter_context(library.verbose(library.VERBOSE_ON))

    def stop(self, own: dict[str, float] | None = None) -> str:
        """Which libraries multiplied matrices, by their share of the time.

        Args:
            own: seconds of a side's own products, which no library tells of.
        """
        self._stack.close()
        with self._file as heard:
            heard.seek(0)
            text = heard.read().decode(errors="replace")
        if self._on_gpu:
            return "cuBLASLt" if "lt" in str(torch.backends.cuda.preferred_blas_library()).lower() else "cuBLAS"
        return describe_gemms({**parse_gemms(text), **(own or {})})

    def _give_back(self) -> None:
        os.dup2(self._stdout, 1)
        os.close(self._stdout)


def gemm_backends(function: Callable[[], object], device: torch.device, own: dict[str, float] | None = None) -> str:
    """Run a function once and say which libraries multiplied its matrices; `own` is read afterwards."""
    listening = Listening(device)
    try:
        function()
    finally:
        heard = listening.stop(own)
    return heard
